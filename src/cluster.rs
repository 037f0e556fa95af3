//! What each rank runs on: the cluster file, the probe of this host, and both merged.
//!
//! Every rank probes its own host, the profiles are gathered, and [`assign`] lays the cluster file
//! over them; what comes out feeds the planner ([`RankDevice::plan_device`]). `mlx-pipe plan` has
//! nobody to gather from and uses [`describe`] instead. Separate from `plan` because this part
//! reads files and asks the operating system, and from `transport` because it sends nothing.

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::net::IpAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::plan::{Device, LinkCost, LinkCosts, Rates};

/// Largest cluster file read: some thousand devices. Anything larger is not a cluster file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Largest memory a device may claim, in GB; keeps every size far from 64 bits.
const MAX_GIGABYTES: f64 = 1e9;

/// Largest rate or latency a file may state, in the unit that it states it in.
const MAX_STATED: f64 = 1e6;

/// From one rank to another of the same host: through shared memory, and as fast as a poll of the
/// receiver comes round (see `wait`).
const LOCAL_LINK: LinkCost = LinkCost {
    latency_ns: 20_000,
    bytes_per_s: 4_000_000_000,
};

/// Least common multiple of 1 to 16: a core's speed, so that up to 16 ranks on a host share its
/// cores without rounding.
const SPEED_OF_A_CORE: u64 = 720_720;

/// One host or accelerator, as probed or as the cluster file describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceProfile {
    /// Name of the device; the host name unless the cluster file gives another.
    pub device_id: String,
    /// Name of the host.
    pub hostname: String,
    /// Memory of the host that this process may use.
    pub memory_bytes: u64,
    /// `gpu_cores` of the cluster file, else the number of CPU cores.
    pub cores: u64,
    /// Most bytes the device should hold (`max_recommended_model_size_gb`), if known.
    pub max_model_bytes: Option<u64>,
    /// `memory_bandwidth_gb_s` and `compute_tflops` of the cluster file.
    pub rates: Option<Rates>,
}

impl DeviceProfile {
    /// Bytes that all ranks on this device may hold together: the recommended maximum, or 80 % of
    /// the memory, which leaves the rest to the system and the activations.
    pub fn usable_bytes(&self) -> u64 {
        match self.max_model_bytes {
            Some(max_bytes) => max_bytes.min(self.memory_bytes),
            None => self.memory_bytes / 5 * 4,
        }
    }
}

/// A rank's device, and how many ranks share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankDevice {
    /// The device.
    pub profile: DeviceProfile,
    /// Ranks on the device, this one included; at least 1.
    pub sharers: NonZeroUsize,
    /// Position of the device in the cluster file's `devices`, if it is there.
    pub entry: Option<usize>,
}

impl RankDevice {
    /// What the planner needs to know: this rank's even share of the device's memory and cores.
    /// `memory_limit_bytes` (`--memory-limit`) is this rank's own and stands in place of its share.
    pub fn plan_device(&self, memory_limit_bytes: Option<u64>) -> Device {
        let sharers = self.sharers.get() as u64;
        let usable_bytes = self.profile.usable_bytes();
        let speed = self.profile.cores.saturating_mul(SPEED_OF_A_CORE) / sharers;
        Device {
            name: self.profile.hostname.clone(),
            memory_limit_bytes: memory_limit_bytes.unwrap_or(usable_bytes / sharers),
            speed: speed.max(1),
            cost: None,
        }
    }

    fn shares_device_with(&self, other: &Self) -> bool {
        let one_host = self.is_on_host_of(other) && self.entry == other.entry;
        one_host && self.sharers.get() > 1 && other.sharers.get() > 1
    }

    fn is_on_host_of(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.profile.hostname, &other.profile.hostname);
        ours.eq_ignore_ascii_case(theirs)
    }
}

/// The hosts in the order of their first ranks, each with the positions of its ranks.
pub fn ranks_by_host(ranks: &[RankDevice]) -> Vec<(&str, Vec<usize>)> {
    let mut hosts: Vec<(&str, Vec<usize>)> = Vec::new();
    for (rank, device) in ranks.iter().enumerate() {
        let name = device.profile.hostname.as_str();
        let known = hosts
            .iter_mut()
            .find(|(host, _)| host.eq_ignore_ascii_case(name));
        match known {
            Some((_, its_ranks)) => its_ranks.push(rank),
            None => hosts.push((name, vec![rank])),
        }
    }
    hosts
}

/// The ranks `kept` (positions, ascending) of `ranks`, when the others do not take part: those that shared
/// a device with them have more of it.
pub fn part_of(ranks: &[RankDevice], kept: &[usize]) -> Vec<RankDevice> {
    let kept: Vec<&RankDevice> = kept.iter().filter_map(|rank| ranks.get(*rank)).collect();
    let alone = |rank: &&RankDevice| RankDevice {
        sharers: count(&kept, |other| rank.shares_device_with(other)),
        ..(*rank).clone()
    };
    kept.iter().map(alone).collect()
}

/// A checked cluster file. Every part is optional; fields it does not know are ignored, because
/// files of the reference system carry more than what is used here.
#[derive(Clone, Debug)]
pub struct ClusterFile {
    /// Where it was read, for messages.
    pub path: PathBuf,
    /// Model directory or Hugging Face id.
    pub model_name: Option<String>,
    /// Number of ranks the file is meant for.
    pub model_parallel_size: Option<NonZeroUsize>,
    /// The devices, in rank order where they share a name.
    pub devices: Vec<DeviceEntry>,
    /// What links between hosts cost where `links` says nothing else.
    link: Option<LinkFields>,
    /// Links of named devices.
    links: Vec<NamedLink>,
}

/// One entry of the file's `devices`.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "DeviceFields")]
pub struct DeviceEntry {
    /// The entry's names: `hostname` and `device_id`, at least one of them.
    names: Names,
    capabilities: Capabilities,
}

/// The top of the file as it stands in JSON.
#[derive(Deserialize)]
struct FileFields {
    model_name: Option<String>,
    model_parallel_size: Option<NonZeroUsize>,
    devices: Option<Vec<DeviceEntry>>,
    link: Option<LinkFields>,
    links: Option<Vec<NamedLink>>,
}

/// A link as it stands in JSON.
#[derive(Clone, Copy, Debug, Deserialize)]
struct LinkFields {
    latency_us: Stated,
    bandwidth_gbit_s: Stated,
}

impl LinkFields {
    fn cost(self) -> LinkCost {
        LinkCost {
            latency_ns: self.latency_us.times(1e3),
            bytes_per_s: self.bandwidth_gbit_s.times(1e9 / 8.0),
        }
    }
}

/// A link between two devices as it stands in JSON, in either direction.
#[derive(Clone, Debug, Deserialize)]
struct NamedLink {
    from: String,
    to: String,
    #[serde(flatten)]
    link: LinkFields,
}

/// A device as it stands in JSON.
#[derive(Deserialize)]
struct DeviceFields {
    device_id: Option<String>,
    hostname: Option<String>,
    capabilities: Option<Capabilities>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Capabilities {
    memory_gb: Option<Gigabytes>,
    gpu_cores: Option<NonZeroU32>,
    max_recommended_model_size_gb: Option<Gigabytes>,
    memory_bandwidth_gb_s: Option<Stated>,
    compute_tflops: Option<Stated>,
}

impl Capabilities {
    fn rates(&self) -> Option<Rates> {
        self.memory_bandwidth_gb_s.map(|bandwidth| Rates {
            bandwidth_bytes_per_s: bandwidth.times(1e9),
            flops_per_s: self.compute_tflops.map(|flops| flops.times(1e12)),
        })
    }
}

/// A device is known by its host, by an id, or by both.
#[derive(Clone, Debug)]
struct Names {
    device_id: String,
    hostname: String,
}

impl TryFrom<DeviceFields> for DeviceEntry {
    type Error = &'static str;

    fn try_from(fields: DeviceFields) -> Result<Self, Self::Error> {
        let given = |name: Option<String>| name.filter(|name| !name.trim().is_empty());
        let (device_id, hostname) = (given(fields.device_id), given(fields.hostname));
        let one = hostname.clone().or(device_id.clone());
        let one = one.ok_or("the device has no name; expected `hostname` or `device_id`")?;
        Ok(Self {
            names: Names {
                device_id: device_id.unwrap_or_else(|| one.clone()),
                hostname: hostname.unwrap_or(one),
            },
            capabilities: fields.capabilities.unwrap_or_default(),
        })
    }
}

/// Bytes, read from a number of GB (1e9 bytes).
#[derive(Clone, Copy, Debug)]
struct Gigabytes(u64);

impl<'de> Deserialize<'de> for Gigabytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let gigabytes = f64::deserialize(deserializer)?;
        let bytes = (gigabytes * 1e9).round();
        if !(gigabytes <= MAX_GIGABYTES && bytes >= 1.0) {
            let found = de::Unexpected::Float(gigabytes);
            return Err(de::Error::invalid_value(
                found,
                &"a size in GB above 0 and up to 1e9",
            ));
        }
        Ok(Self(bytes as u64))
    }
}

/// A rate or a latency, above 0 and at most [`MAX_STATED`] in its unit.
#[derive(Clone, Copy, Debug)]
struct Stated(f64);

impl Stated {
    /// In a finer unit, as a whole number above 0. The only rounding between the text and the plan, so all
    /// ranks get the same.
    fn times(self, unit: f64) -> u64 {
        ((self.0 * unit).round() as u64).max(1)
    }
}

impl<'de> Deserialize<'de> for Stated {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let stated = f64::deserialize(deserializer)?;
        if !(stated > 0.0 && stated <= MAX_STATED) {
            let found = de::Unexpected::Float(stated);
            return Err(de::Error::invalid_value(
                found,
                &"a number above 0 and up to 1e6",
            ));
        }
        Ok(Self(stated))
    }
}

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

impl ClusterFile {
    /// Reads and checks a cluster file.
    ///
    /// # Errors
    ///
    /// The file cannot be read, is larger than 1 MiB, or is malformed.
    pub fn read(path: &Path) -> Result<Self, ClusterError> {
        Self::parse(path, &Self::read_text(path)?)
    }

    /// Reads the text of a cluster file, for ranks that have no copy of it.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or is larger than 1 MiB.
    pub fn read_text(path: &Path) -> Result<String, ClusterError> {
        let failed = |cause| ClusterError::Read {
            path: path.to_owned(),
            cause,
        };
        let mut text = String::new();
        let file = fs::File::open(path).map_err(failed)?;
        // One byte more than allowed, so that too large a file is told from one of just this size.
        file.take(MAX_FILE_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(failed)?;
        match text.len() as u64 > MAX_FILE_BYTES {
            true => Err(ClusterError::TooLarge {
                path: path.to_owned(),
            }),
            false => Ok(text),
        }
    }

    /// Checks the text of a cluster file; `path` is for messages only.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Malformed`] with the field's path, line and column.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ClusterError> {
        let malformed = |field: String, error: serde_json::Error| ClusterError::Malformed {
            path: path.to_owned(),
            field,
            message: error.to_string(),
        };
        let mut json = serde_json::Deserializer::from_str(text);
        let fields: FileFields = serde_path_to_error::deserialize(&mut json)
            .map_err(|error| malformed(error.path().to_string(), error.into_inner()))?;
        json.end()
            .map_err(|error| malformed(".".to_owned(), error))?;
        let file = Self {
            path: path.to_owned(),
            model_name: fields.model_name,
            model_parallel_size: fields.model_parallel_size,
            devices: fields.devices.unwrap_or_default(),
            link: fields.link,
            links: fields.links.unwrap_or_default(),
        };
        file.check_measures()?;
        file.check_links()?;
        Ok(file)
    }

    /// A measure of speed counts only if all devices have it: cores of GPUs and of CPUs do not compare,
    /// nor do times with what is no time.
    fn check_measures(&self) -> Result<(), ClusterError> {
        self.check_all_or_none("gpu_cores", |stated| stated.gpu_cores.is_some())?;
        self.check_all_or_none("memory_bandwidth_gb_s", |stated| {
            stated.memory_bandwidth_gb_s.is_some()
        })?;
        self.check_all_or_none("compute_tflops", |stated| stated.compute_tflops.is_some())
    }

    fn check_all_or_none(
        &self,
        field: &'static str,
        is_stated: fn(&Capabilities) -> bool,
    ) -> Result<(), ClusterError> {
        let stated = |entry: &&DeviceEntry| is_stated(&entry.capabilities);
        let with = self.devices.iter().find(stated);
        let without = self.devices.iter().find(|entry| !stated(entry));
        match (with, without) {
            (Some(with), Some(without)) => Err(ClusterError::Mixed {
                path: self.path.clone(),
                field,
                with: with.names.hostname.clone(),
                without: without.names.hostname.clone(),
            }),
            _ => Ok(()),
        }
    }

    fn check_links(&self) -> Result<(), ClusterError> {
        for (index, link) in self.links.iter().enumerate() {
            for (end, name) in [("from", &link.from), ("to", &link.to)] {
                if !self.devices.iter().any(|entry| entry.names.include(name)) {
                    return Err(ClusterError::UnknownLinkEnd {
                        path: self.path.clone(),
                        index,
                        end,
                        name: name.clone(),
                    });
                }
            }
        }
        Ok(())
    }

    /// The links of a pipeline over these ranks, as the file states them; `None` if it says nothing of one
    /// of them.
    pub fn links(&self, ranks: &[RankDevice]) -> Option<LinkCosts> {
        let pairs = ranks.windows(2);
        let forward = pairs
            .map(|pair| self.link(&pair[0], &pair[1]))
            .collect::<Option<_>>()?;
        let back = self.link(ranks.last()?, ranks.first()?)?;
        Some(LinkCosts { forward, back })
    }

    fn link(&self, from: &RankDevice, to: &RankDevice) -> Option<LinkCost> {
        if from.is_on_host_of(to) {
            return Some(LOCAL_LINK);
        }
        let is_called = |rank: &RankDevice, name: &str| {
            let entry = rank.entry.and_then(|entry| self.devices.get(entry));
            entry.is_some_and(|entry| entry.names.include(name))
        };
        let named = self.links.iter().find(|link| {
            let joins = |a: &str, b: &str| is_called(from, a) && is_called(to, b);
            joins(&link.from, &link.to) || joins(&link.to, &link.from)
        });
        named
            .map(|named| named.link)
            .or(self.link)
            .map(LinkFields::cost)
    }

    fn check_ranks(&self, found: usize) -> Result<(), ClusterError> {
        match self.model_parallel_size.map(NonZeroUsize::get) {
            Some(expected) if expected != found => Err(ClusterError::ParallelSize {
                path: self.path.clone(),
                expected,
                found,
            }),
            _ => Ok(()),
        }
    }

    /// Positions of the entries that name `profile`'s host, by the best kind of match there is.
    fn matching(&self, profile: &DeviceProfile, one_host: bool) -> Vec<usize> {
        let quality = |entry: &DeviceEntry| entry.names.matches(profile, one_host);
        let best = self.devices.iter().filter_map(quality).min();
        let entries = self.devices.iter().enumerate();
        entries
            .filter(|(_, entry)| best.is_some() && quality(entry) == best)
            .map(|(index, _)| index)
            .collect()
    }

    fn unknown_host(&self, rank: usize, profile: &DeviceProfile) -> ClusterError {
        let known: Vec<String> = self.devices.iter().map(|d| d.names.to_string()).collect();
        ClusterError::UnknownHost {
            path: self.path.clone(),
            rank,
            host: profile.hostname.clone(),
            known: known.join(", "),
        }
    }
}

impl DeviceEntry {
    /// The probed profile with everything that the entry states laid over it. The host keeps the
    /// name that it gave itself.
    fn over(&self, probed: &DeviceProfile) -> DeviceProfile {
        let stated = self.capabilities;
        DeviceProfile {
            device_id: self.names.device_id.clone(),
            hostname: probed.hostname.clone(),
            memory_bytes: stated
                .memory_gb
                .map_or(probed.memory_bytes, |memory| memory.0),
            cores: stated
                .gpu_cores
                .map_or(probed.cores, |cores| cores.get().into()),
            max_model_bytes: stated
                .max_recommended_model_size_gb
                .map_or(probed.max_model_bytes, |max| Some(max.0)),
            rates: stated.rates(),
        }
    }
}

/// How an entry names a host; the better kind first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    /// `hostname` or `device_id` is the host's whole name.
    Name,
    /// They agree up to the first dot: `mini1.local` and `mini1.lan`.
    FirstLabel,
    /// `localhost`, and all ranks run on one host.
    Local,
}

impl Names {
    fn matches(&self, profile: &DeviceProfile, one_host: bool) -> Option<Match> {
        let names = [self.hostname.as_str(), self.device_id.as_str()];
        let host = profile.hostname.as_str();
        if self.include(host) {
            Some(Match::Name)
        } else if names.iter().any(|name| same_first_label(name, host)) {
            Some(Match::FirstLabel)
        } else {
            (one_host && self.is_local()).then_some(Match::Local)
        }
    }

    fn include(&self, name: &str) -> bool {
        self.hostname.eq_ignore_ascii_case(name) || self.device_id.eq_ignore_ascii_case(name)
    }

    fn is_local(&self) -> bool {
        let loopback = self
            .hostname
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip.is_loopback());
        loopback || self.hostname.eq_ignore_ascii_case("localhost")
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.hostname)?;
        match self.device_id == self.hostname {
            true => Ok(()),
            false => write!(f, " (device_id `{}`)", self.device_id),
        }
    }
}

/// Whether two host names agree up to the first dot. An address has no labels.
fn same_first_label(a: &str, b: &str) -> bool {
    let label = |name: &str| name.split('.').next().unwrap_or(name).to_ascii_lowercase();
    let is_address = |name: &str| name.parse::<IpAddr>().is_ok();
    !is_address(a) && !is_address(b) && label(a) == label(b)
}

/// Each rank's device: the profiles probed by the ranks (`gathered`, in rank order), with the
/// cluster file laid over them. Ranks that come to the same device share it; where the file has
/// several devices for one host, the host's ranks take one each in their order.
///
/// # Errors
///
/// The file is meant for another number of ranks, does not name a rank's host although it names
/// devices, or has several devices for a host but not one a rank.
pub fn assign(
    file: Option<&ClusterFile>,
    gathered: &[DeviceProfile],
) -> Result<Vec<RankDevice>, ClusterError> {
    if let Some(file) = file {
        file.check_ranks(gathered.len())?;
        if !file.devices.is_empty() {
            return assign_named(file, gathered);
        }
    }
    let same_host =
        |a: &DeviceProfile, b: &DeviceProfile| a.hostname.eq_ignore_ascii_case(&b.hostname);
    let share = |profile: &DeviceProfile| RankDevice {
        profile: profile.clone(),
        sharers: count(gathered, |other| same_host(profile, other)),
        entry: None,
    };
    Ok(gathered.iter().map(share).collect())
}

fn assign_named(
    file: &ClusterFile,
    gathered: &[DeviceProfile],
) -> Result<Vec<RankDevice>, ClusterError> {
    let first = gathered.first();
    let one_host = gathered.iter().all(|profile| {
        first.is_some_and(|first| first.hostname.eq_ignore_ascii_case(&profile.hostname))
    });
    let matches: Vec<Vec<usize>> = gathered
        .iter()
        .map(|profile| file.matching(profile, one_host))
        .collect();
    let mut ranks = Vec::with_capacity(gathered.len());
    for (rank, (profile, entries)) in gathered.iter().zip(&matches).enumerate() {
        let sharers = count(&matches, |other| other == entries);
        let before = matches
            .iter()
            .take(rank)
            .filter(|other| *other == entries)
            .count();
        let (entry, sharers) = match entries.as_slice() {
            [] => return Err(file.unknown_host(rank, profile)),
            [only] => (*only, sharers),
            several if several.len() == sharers.get() => (several[before], NonZeroUsize::MIN),
            several => {
                return Err(ClusterError::Ambiguous {
                    path: file.path.clone(),
                    host: profile.hostname.clone(),
                    devices: several.len(),
                    ranks: sharers.get(),
                });
            }
        };
        ranks.push(RankDevice {
            profile: file.devices[entry].over(profile),
            sharers,
            entry: Some(entry),
        });
    }
    Ok(ranks)
}

/// How many of `items` are alike; at least 1, for an item is always like itself.
fn count<T>(items: &[T], alike: impl Fn(&T) -> bool) -> NonZeroUsize {
    let count = items.iter().filter(|item| alike(item)).count();
    NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN)
}

/// Each rank's device for `mlx-pipe plan`, without any rank running: the file's devices, one a rank
/// (the first `ranks` of them; a single one is shared by all `ranks`), or, without devices in a
/// file, `ranks` ranks that share this host. `ranks` defaults to the file's `model_parallel_size`,
/// then to its number of devices, then to 1.
///
/// # Errors
///
/// `ranks` contradicts `model_parallel_size`, the file names too few devices, or leaves out what
/// must be known about a host that is not this one.
pub fn describe(
    file: Option<&ClusterFile>,
    ranks: Option<NonZeroUsize>,
    probed: &DeviceProfile,
) -> Result<Vec<RankDevice>, ClusterError> {
    let devices = file.map_or(0, |file| file.devices.len());
    let stated = file.and_then(|file| file.model_parallel_size);
    let ranks = ranks
        .or(stated)
        .or(NonZeroUsize::new(devices))
        .unwrap_or(NonZeroUsize::MIN);
    if let Some(file) = file {
        file.check_ranks(ranks.get())?;
    }
    match file {
        Some(file) if devices > 1 => {
            if devices < ranks.get() {
                let (path, ranks) = (file.path.clone(), ranks.get());
                return Err(ClusterError::TooFewDevices {
                    path,
                    devices,
                    ranks,
                });
            }
            let one_each = |index| file.describe(index, NonZeroUsize::MIN, probed);
            (0..ranks.get()).map(one_each).collect()
        }
        Some(file) if devices == 1 => Ok(vec![file.describe(0, ranks, probed)?; ranks.get()]),
        _ => Ok(vec![
            RankDevice {
                profile: probed.clone(),
                sharers: ranks,
                entry: None,
            };
            ranks.get()
        ]),
    }
}

impl ClusterFile {
    /// The device at `index`, whose host need not be there. Only this host's gaps can be filled by
    /// the probe.
    fn describe(
        &self,
        index: usize,
        sharers: NonZeroUsize,
        probed: &DeviceProfile,
    ) -> Result<RankDevice, ClusterError> {
        let entry = &self.devices[index];
        if entry.names.matches(probed, true).is_some() {
            return Ok(RankDevice {
                profile: entry.over(probed),
                sharers,
                entry: Some(index),
            });
        }
        let host = entry.names.hostname.clone();
        let Capabilities {
            memory_gb,
            gpu_cores,
            max_recommended_model_size_gb,
            ..
        } = entry.capabilities;
        let Some(memory) = memory_gb.or(max_recommended_model_size_gb) else {
            return Err(ClusterError::NoMemory {
                path: self.path.clone(),
                index,
                host,
            });
        };
        let Some(cores) = gpu_cores else {
            return Err(ClusterError::NoCores {
                path: self.path.clone(),
                index,
                host,
            });
        };
        let profile = DeviceProfile {
            device_id: entry.names.device_id.clone(),
            hostname: host,
            memory_bytes: memory.0,
            cores: cores.get().into(),
            max_model_bytes: max_recommended_model_size_gb.map(|max| max.0),
            rates: entry.capabilities.rates(),
        };
        Ok(RankDevice {
            profile,
            sharers,
            entry: Some(index),
        })
    }
}

/// This host: name, the memory that this process may use (control groups heeded), CPU cores.
///
/// The core count is the host's and not the process's: MPI binds ranks to cores, and the cores are
/// divided among the host's ranks afterwards.
///
/// # Errors
///
/// [`ClusterError::Probe`] if the system does not tell its memory.
pub fn probe_local() -> Result<DeviceProfile, ClusterError> {
    let hostname = gethostname::gethostname().to_string_lossy().into_owned();
    Ok(DeviceProfile {
        device_id: hostname.clone(),
        hostname,
        memory_bytes: probe::memory_bytes()?,
        cores: probe::cores(),
        max_model_bytes: None,
        rates: None,
    })
}

/// Memory of this host that is free or that the system would free for a program, in bytes; `None` where
/// it does not tell.
pub fn available_bytes() -> Option<u64> {
    probe::available_bytes()
}

/// What every system tells without being asked specially.
fn available_cores() -> u64 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64)
}

/// Questions to Linux: files of `/proc` and `/sys`.
#[cfg(target_os = "linux")]
mod probe {
    use std::fs;
    use std::io;
    use std::path::{Path, PathBuf};

    use super::ClusterError;

    const MEMINFO: &str = "/proc/meminfo";

    pub(super) fn memory_bytes() -> Result<u64, ClusterError> {
        let failed = |cause| ClusterError::Probe {
            asked: MEMINFO,
            cause,
        };
        let text = fs::read_to_string(MEMINFO).map_err(failed)?;
        let total_bytes = total_bytes(&text);
        let total_bytes = total_bytes.ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        // A limit that cannot be read, or reads `max`, is no limit.
        let limits = limit_files(&groups).into_iter().filter_map(|file| {
            fs::read_to_string(file)
                .ok()?
                .trim()
                .parse::<u64>()
                .ok()
                .filter(|bytes| *bytes > 0)
        });
        Ok(limits.fold(total_bytes, u64::min))
    }

    pub(super) fn available_bytes() -> Option<u64> {
        field_bytes(&fs::read_to_string(MEMINFO).ok()?, "MemAvailable:")
    }

    pub(super) fn cores() -> u64 {
        let online = fs::read_to_string("/sys/devices/system/cpu/online").ok();
        online
            .and_then(|text| online_cores(&text))
            .unwrap_or_else(super::available_cores)
    }

    /// `MemTotal` of `/proc/meminfo`, which counts in KiB (proc_meminfo(5)).
    pub(super) fn total_bytes(meminfo: &str) -> Option<u64> {
        field_bytes(meminfo, "MemTotal:")
    }

    fn field_bytes(meminfo: &str, field: &str) -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(field))?;
        let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kibibytes.checked_mul(1024).filter(|bytes| *bytes > 0)
    }

    /// The files that may limit this process's memory, from `/proc/self/cgroup` (cgroups(7)): in
    /// its own group and all those above, of which the tightest counts. Inside a container the
    /// group's path may be the host's and then leads nowhere, but the last one, the root, is there.
    pub(super) fn limit_files(groups: &str) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for line in groups.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else {
                continue;
            };
            let (root, name) = if controllers.is_empty() {
                ("/sys/fs/cgroup", "memory.max")
            } else if controllers
                .split(',')
                .any(|controller| controller == "memory")
            {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            } else {
                continue;
            };
            let group = Path::new(group.trim_start_matches('/'));
            files.extend(
                group
                    .ancestors()
                    .map(|group| Path::new(root).join(group).join(name)),
            );
        }
        files
    }

    /// The number of CPUs in a list such as `0-3,8`.
    pub(super) fn online_cores(list: &str) -> Option<u64> {
        let count = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
            last.checked_sub(first)?.checked_add(1)
        };
        list.trim()
            .split(',')
            .map(count)
            .try_fold(0_u64, |sum, cores| sum.checked_add(cores?))
    }
}

/// Questions to macOS: `sysctl`.
#[cfg(target_os = "macos")]
mod probe {
    use std::io;

    use super::ClusterError;

    pub(super) fn memory_bytes() -> Result<u64, ClusterError> {
        let mut bytes = 0_u64;
        let mut size = size_of::<u64>();
        // SAFETY: the name ends with a zero byte; `bytes` and `size` are live and writable, `size`
        // is the size of `bytes`, and the last two arguments ask for nothing to be changed.
        let status = unsafe {
            libc::sysctlbyname(
                c"hw.memsize".as_ptr(),
                (&raw mut bytes).cast(),
                &raw mut size,
                std::ptr::null_mut(),
                0,
            )
        };
        if status != 0 || size != size_of::<u64>() {
            let cause = io::Error::last_os_error();
            return Err(ClusterError::Probe {
                asked: "sysctl hw.memsize",
                cause,
            });
        }
        Ok(bytes)
    }

    pub(super) fn cores() -> u64 {
        super::available_cores()
    }

    pub(super) fn available_bytes() -> Option<u64> {
        None
    }
}

/// Other systems do not tell.
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod probe {
    use super::ClusterError;

    pub(super) fn memory_bytes() -> Result<u64, ClusterError> {
        let cause = std::io::ErrorKind::Unsupported.into();
        Err(ClusterError::Probe {
            asked: "on Linux and macOS only",
            cause,
        })
    }

    pub(super) fn cores() -> u64 {
        super::available_cores()
    }

    pub(super) fn available_bytes() -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests;
