//! What is wrong with a cluster file, or between it and the ranks that run, and what to do about it.

use std::io;
use std::path::PathBuf;

use super::file::MAX_FILE_BYTES;

/// What is wrong with a cluster file, or between it and the ranks that run.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The file cannot be read.
    #[error("cannot read the cluster file {path}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// The file is too large to be a cluster file.
    #[error("cluster file {path}: larger than {MAX_FILE_BYTES} bytes; is it a cluster file?")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is not JSON, or a field has the wrong type or value.
    #[error("cluster file {path}, field `{field}`: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Path of the field, such as `devices[1].capabilities.memory_gb`; `.` is the whole file.
        field: String,
        /// What was found and expected, with line and column.
        message: String,
    },
    /// `model_parallel_size` is not the number of ranks.
    #[error(
        "cluster file {path}: model_parallel_size is {expected}, but the number of ranks is \
         {found}; start {expected} ranks (mpirun -np {expected}, or plan --ranks {expected}), or \
         change model_parallel_size to {found}"
    )]
    ParallelSize {
        /// The file.
        path: PathBuf,
        /// `model_parallel_size`.
        expected: usize,
        /// Ranks.
        found: usize,
    },
    /// A rank runs on a host that the file does not name.
    #[error(
        "unknown host `{host}` (rank {rank}): the cluster file {path} names {known}; add the host \
         to `devices`, or take it out of the hostfile"
    )]
    UnknownHost {
        /// The file.
        path: PathBuf,
        /// The rank.
        rank: usize,
        /// Name of its host.
        host: String,
        /// The names in the file.
        known: String,
    },
    /// Several devices on one host, and not one a rank.
    #[error(
        "cluster file {path}: {devices} devices match host `{host}`, where {ranks} ranks run; \
         expected one device for all of them, or one a rank"
    )]
    Ambiguous {
        /// The file.
        path: PathBuf,
        /// The host.
        host: String,
        /// Entries that match it.
        devices: usize,
        /// Ranks that run there.
        ranks: usize,
    },
    /// `plan` for a host that is not there, whose memory the file leaves out.
    #[error(
        "cluster file {path}, field `devices[{index}].capabilities`: neither memory_gb nor \
         max_recommended_model_size_gb is given for `{host}`, and without it a plan for that host \
         cannot be made from here"
    )]
    NoMemory {
        /// The file.
        path: PathBuf,
        /// Position in `devices`.
        index: usize,
        /// The host.
        host: String,
    },
    /// `plan` for a host that is not there, whose cores the file leaves out.
    #[error(
        "cluster file {path}, field `devices[{index}].capabilities.gpu_cores`: not given for \
         `{host}`, and without it a plan for that host cannot be made from here"
    )]
    NoCores {
        /// The file.
        path: PathBuf,
        /// Position in `devices`.
        index: usize,
        /// The host.
        host: String,
    },
    /// `plan` for more ranks than the file names devices.
    #[error(
        "cluster file {path} names {devices} devices, too few for {ranks} ranks; \
         use --ranks {devices} or name more devices"
    )]
    TooFewDevices {
        /// The file.
        path: PathBuf,
        /// Devices.
        devices: usize,
        /// Ranks.
        ranks: usize,
    },
    /// Some devices have `gpu_cores`, say, and some have not, so their speeds do not compare.
    #[error(
        "cluster file {path}: `{field}` is given for `{with}` but not for `{without}`; give it for \
         all devices or for none, for speeds in different measures do not compare"
    )]
    Mixed {
        /// The file.
        path: PathBuf,
        /// The field of `capabilities`.
        field: &'static str,
        /// A host that has it.
        with: String,
        /// A host that has not.
        without: String,
    },
    /// A link begins or ends at a device that is not there.
    #[error(
        "cluster file {path}, field `links[{index}].{end}`: no device is called `{name}`; expected a \
         `hostname` or `device_id` of `devices`"
    )]
    UnknownLinkEnd {
        /// The file.
        path: PathBuf,
        /// Position in `links`.
        index: usize,
        /// `from` or `to`.
        end: &'static str,
        /// What stands there.
        name: String,
    },
    /// This host does not tell its memory.
    #[error("cannot find out this host's memory ({asked}): {cause}; name it in a --cluster file")]
    Probe {
        /// What was asked.
        asked: &'static str,
        /// The system's reason.
        cause: io::Error,
    },
}
