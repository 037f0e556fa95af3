//! What the ranks run on: the cluster file, a probe of this host, and the two merged into one
//! [`plan::Device`] a rank.
//!
//! The file has the shape of the reference system's (`devices[].capabilities`), every part optional; what
//! it leaves out is probed on each rank and gathered. Ranks of one host share its memory and cores evenly.

use crate::plan::Device;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Share of a host's memory that its ranks may use where nobody says otherwise, percent.
const MEMORY_SHARE_PERCENT: u64 = 80;
/// Names in a cluster file that stand for any host: the machine that the program is tried on.
const ANY_HOST: [&str; 2] = ["localhost", "127.0.0.1"];

/// What a rank knows of the machine under it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceProfile {
    /// Name of the host.
    pub hostname: String,
    /// `cpu` or `gpu`: what arrays are computed on.
    pub device: String,
    /// Memory of the host, or of the container that the rank runs in, in bytes.
    pub memory_bytes: u64,
    /// Processor cores that the rank may use.
    pub core_count: u64,
}

/// Looks at this host.
pub fn probe_local(device: &str) -> DeviceProfile {
    DeviceProfile {
        hostname: hostname(),
        device: device.to_owned(),
        memory_bytes: memory_bytes(),
        core_count: std::thread::available_parallelism().map_or(1, |count| count.get() as u64),
    }
}

/// A cluster file, checked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClusterFile {
    /// Checkpoint directory or id.
    pub model_name: Option<String>,
    /// Ranks that the file is meant for.
    pub model_parallel_size: Option<usize>,
    /// One a rank, in rank order; empty if the file names none.
    pub devices: Vec<NamedDevice>,
}

/// One device of a cluster file.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedDevice {
    /// Its name for people; the host name if it has none.
    pub device_id: String,
    /// Its host.
    pub hostname: String,
    /// Memory of the device, bytes.
    pub memory_bytes: Option<u64>,
    /// Cores of its GPU; the measure of its speed.
    pub gpu_cores: Option<u64>,
    /// Largest part of a model to be put on it, bytes.
    pub max_model_bytes: Option<u64>,
}

/// Why a cluster file, or its fit with the ranks, is no good.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Not JSON, or a field of the wrong type.
    #[error("cluster file {path}: {cause}")]
    Malformed {
        /// The file.
        path: String,
        /// What is wrong, with line and column.
        cause: serde_json::Error,
    },
    /// A value that cannot be.
    #[error("cluster file {path}: {field} is {found}; expected {expected}")]
    Value {
        /// The file.
        path: String,
        /// Path of the field.
        field: String,
        /// What stands there.
        found: String,
        /// What should.
        expected: &'static str,
    },
    /// The file is for another number of ranks.
    #[error(
        "the cluster file is for {in_file} ranks ({because}), but this run has {launched}; start \
         mpirun with -np {in_file}, or change the file"
    )]
    RankCount {
        /// Ranks that the file is for.
        in_file: usize,
        /// The field that says so.
        because: &'static str,
        /// Ranks in the run.
        launched: usize,
    },
    /// A rank runs on a host that the file does not name.
    #[error(
        "rank {rank} runs on host {host}, which the cluster file does not name (it names {known}); correct \
         its `hostname`, or the hostfile given to mpirun"
    )]
    UnknownHost {
        /// The rank.
        rank: usize,
        /// Its host.
        host: String,
        /// Hosts in the file.
        known: String,
    },
}

/// The file as JSON has it.
#[derive(Deserialize)]
struct RawFile {
    model_name: Option<String>,
    model_parallel_size: Option<usize>,
    devices: Option<Vec<RawDevice>>,
}

#[derive(Deserialize)]
struct RawDevice {
    device_id: Option<String>,
    hostname: Option<String>,
    #[serde(default)]
    capabilities: RawCapabilities,
}

#[derive(Deserialize, Default)]
struct RawCapabilities {
    memory_gb: Option<f64>,
    gpu_cores: Option<u64>,
    max_recommended_model_size_gb: Option<f64>,
}

impl ClusterFile {
    /// Reads the text of a cluster file; `path` is for messages. Fields that it does not know are passed
    /// over: the reference system's files carry more.
    ///
    /// # Errors
    /// Text that is no cluster file, or a value that cannot be.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ClusterError> {
        let path = path.display().to_string();
        let raw: RawFile = serde_json::from_str(text).map_err(|cause| ClusterError::Malformed {
            path: path.clone(),
            cause,
        })?;
        if raw.model_parallel_size == Some(0) {
            return Err(ClusterError::Value {
                path,
                field: "model_parallel_size".into(),
                found: "0".into(),
                expected: "1 or more",
            });
        }
        let devices = raw.devices.unwrap_or_default();
        Ok(Self {
            model_name: raw.model_name,
            model_parallel_size: raw.model_parallel_size,
            devices: devices
                .into_iter()
                .enumerate()
                .map(|(index, device)| check_device(device, index, &path))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Ranks that the file is for, and the field that says so.
    pub fn rank_count(&self) -> Option<(usize, &'static str)> {
        match (self.model_parallel_size, self.devices.len()) {
            (Some(size), _) => Some((size, "`model_parallel_size`")),
            (None, 0) => None,
            (None, count) => Some((count, "the length of `devices`")),
        }
    }

    /// The devices as profiles of ranks, for a plan of a cluster that is not there. What the file leaves
    /// out is taken from `like`.
    pub fn profiles(&self, like: &DeviceProfile) -> Vec<DeviceProfile> {
        let named = self.devices.iter().map(|device| DeviceProfile {
            hostname: device.hostname.clone(),
            ..like.clone()
        });
        let count = self.rank_count().map_or(0, |(count, _)| count);
        named
            .chain(std::iter::repeat_with(|| like.clone()))
            .take(count.max(self.devices.len()))
            .collect()
    }
}

fn check_device(raw: RawDevice, index: usize, path: &str) -> Result<NamedDevice, ClusterError> {
    let wrong = |field: &str, found: String, expected| ClusterError::Value {
        path: path.to_owned(),
        field: format!("devices[{index}].{field}"),
        found,
        expected,
    };
    let Some(hostname) = raw.hostname.or_else(|| raw.device_id.clone()) else {
        return Err(wrong("hostname", "missing".into(), "the name of a host"));
    };
    let bytes = |field: &str, gigabytes: Option<f64>| match gigabytes {
        None => Ok(None),
        // A petabyte is more than any of them has.
        Some(number) if number > 0.0 && number < 1e6 => Ok(Some((number * 1e9) as u64)),
        Some(number) => Err(wrong(
            &format!("capabilities.{field}"),
            number.to_string(),
            "a positive number of gigabytes",
        )),
    };
    let capabilities = raw.capabilities;
    if capabilities.gpu_cores == Some(0) {
        return Err(wrong("capabilities.gpu_cores", "0".into(), "1 or more"));
    }
    Ok(NamedDevice {
        device_id: raw.device_id.unwrap_or_else(|| hostname.clone()),
        hostname,
        memory_bytes: bytes("memory_gb", capabilities.memory_gb)?,
        gpu_cores: capabilities.gpu_cores,
        max_model_bytes: bytes(
            "max_recommended_model_size_gb",
            capabilities.max_recommended_model_size_gb,
        )?,
    })
}

/// One device a rank: each profile completed by what the file says of its host. A rank may use
/// `memory_limit` bytes, else its share of what the file recommends or of the host's memory.
///
/// # Errors
/// Another number of ranks than the file is for, or a host that it does not name.
pub fn devices(
    profiles: &[DeviceProfile],
    file: Option<&ClusterFile>,
    memory_limit: Option<u64>,
) -> Result<Vec<Device>, ClusterError> {
    if let Some((in_file, because)) = file.and_then(ClusterFile::rank_count)
        && in_file != profiles.len()
    {
        return Err(ClusterError::RankCount {
            in_file,
            because,
            launched: profiles.len(),
        });
    }
    let named = match file {
        Some(file) if !file.devices.is_empty() => assign(profiles, &file.devices)?,
        _ => vec![None; profiles.len()],
    };
    // Speeds compare only where they count the same thing.
    let all_have_gpu_cores = named
        .iter()
        .all(|device| device.is_some_and(|device| device.gpu_cores.is_some()));
    Ok(profiles
        .iter()
        .zip(&named)
        .map(|(profile, named)| {
            // A device of the file is one rank's own; a probed host is shared by its ranks.
            let sharing = profiles
                .iter()
                .filter(|other| same_host(&other.hostname, &profile.hostname))
                .count() as u64;
            let shared_limit = profile.memory_bytes / 100 * MEMORY_SHARE_PERCENT / sharing;
            let limit = named.and_then(|device| {
                let of_memory = device
                    .memory_bytes
                    .map(|bytes| bytes / 100 * MEMORY_SHARE_PERCENT);
                device.max_model_bytes.or(of_memory)
            });
            Device {
                name: named
                    .map_or(&profile.hostname, |device| &device.device_id)
                    .clone(),
                memory_limit_bytes: memory_limit.or(limit).unwrap_or(shared_limit),
                speed: match named.and_then(|device| device.gpu_cores) {
                    Some(gpu_cores) if all_have_gpu_cores => gpu_cores,
                    // Scaled, so that sharing rounds nothing away.
                    _ => (profile.core_count * 1000 / sharing).max(1),
                },
            }
        })
        .collect())
}

/// The device of the file that each rank runs on. Several ranks of one host take its devices in order.
fn assign<'f>(
    profiles: &[DeviceProfile],
    devices: &'f [NamedDevice],
) -> Result<Vec<Option<&'f NamedDevice>>, ClusterError> {
    let mut free: Vec<&NamedDevice> = devices.iter().collect();
    let mut assigned = Vec::with_capacity(profiles.len());
    for (rank, profile) in profiles.iter().enumerate() {
        let fits = |device: &&NamedDevice| {
            ANY_HOST.contains(&device.hostname.as_str())
                || same_host(&device.hostname, &profile.hostname)
                || same_host(&device.device_id, &profile.hostname)
        };
        let Some(place) = free.iter().position(fits) else {
            let known: Vec<&str> = devices
                .iter()
                .map(|device| device.hostname.as_str())
                .collect();
            return Err(ClusterError::UnknownHost {
                rank,
                host: profile.hostname.clone(),
                known: known.join(", "),
            });
        };
        assigned.push(Some(free.remove(place)));
    }
    Ok(assigned)
}

/// Whether two names are of one host: equal, or one the first label of the other, in any case
/// (`mini1` and `Mini1.local`).
fn same_host(one: &str, other: &str) -> bool {
    let first_label = |name: &str| name.split('.').next().unwrap_or(name).to_ascii_lowercase();
    let is_short =
        |name: &str| !name.contains('.') || name.to_ascii_lowercase().ends_with(".local");
    one.eq_ignore_ascii_case(other)
        || ((is_short(one) || is_short(other)) && first_label(one) == first_label(other))
}

fn hostname() -> String {
    let mut buffer = [0u8; 256];
    // SAFETY: the buffer is writable for the length given; the last byte stays 0 whatever the call does.
    let failed = unsafe { libc::gethostname(buffer.as_mut_ptr().cast(), buffer.len() - 1) } != 0;
    let end = buffer.iter().position(|&byte| byte == 0).unwrap_or(0);
    match failed || end == 0 {
        true => "localhost".into(),
        false => String::from_utf8_lossy(&buffer[..end]).into_owned(),
    }
}

/// Memory that this process could use at most: the host's, or its container's if that is less.
fn memory_bytes() -> u64 {
    // SAFETY: `sysconf` has no preconditions.
    let (pages, page_bytes) = unsafe {
        (
            libc::sysconf(libc::_SC_PHYS_PAGES),
            libc::sysconf(libc::_SC_PAGESIZE),
        )
    };
    let host = pages.max(0) as u64 * page_bytes.max(0) as u64;
    [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ]
    .into_iter()
    .filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok())
    .fold(host, u64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(hostname: &str) -> DeviceProfile {
        DeviceProfile {
            hostname: hostname.into(),
            device: "cpu".into(),
            memory_bytes: 10_000_000_000,
            core_count: 4,
        }
    }

    fn parse(text: &str) -> Result<ClusterFile, ClusterError> {
        ClusterFile::parse(text, Path::new("c.json"))
    }

    #[test]
    fn the_file_for_three_minis_gives_three_equal_devices() {
        let text = include_str!("../hostfiles/minis.json");
        let file = parse(text).unwrap();
        let profiles = ["mini1.local", "mini2", "MINI3.local"].map(profile);
        let devices = devices(&profiles, Some(&file), None).unwrap();
        for device in &devices {
            assert_eq!(
                (device.memory_limit_bytes, device.speed),
                (12_000_000_000, 10)
            );
        }
        assert_eq!(file.rank_count().unwrap().0, 3);
    }

    #[test]
    fn an_empty_file_changes_nothing() {
        let profiles = [profile("a"), profile("b")];
        let file = parse("{}").unwrap();
        let with = devices(&profiles, Some(&file), None).unwrap();
        assert_eq!(with, devices(&profiles, None, None).unwrap());
        assert_eq!(with[0].memory_limit_bytes, 8_000_000_000);
    }

    #[test]
    fn ranks_of_one_host_share_its_memory_and_cores() {
        let devices = devices(&[profile("a"), profile("a"), profile("b")], None, None).unwrap();
        let of = |rank: usize| (devices[rank].memory_limit_bytes, devices[rank].speed);
        assert_eq!(of(0), (4_000_000_000, 2000));
        assert_eq!(of(1), of(0));
        assert_eq!(of(2), (8_000_000_000, 4000));
    }

    #[test]
    fn an_explicit_limit_is_each_ranks() {
        let devices = devices(&[profile("a"), profile("a")], None, Some(77)).unwrap();
        assert!(devices.iter().all(|device| device.memory_limit_bytes == 77));
    }

    #[test]
    fn localhost_stands_for_any_host_in_rank_order() {
        let file = parse(
            r#"{"devices": [{"device_id": "x", "hostname": "localhost"},
                            {"device_id": "y", "hostname": "127.0.0.1"}]}"#,
        )
        .unwrap();
        let devices = devices(&[profile("m"), profile("m")], Some(&file), None).unwrap();
        assert_eq!([&devices[0].name[..], &devices[1].name[..]], ["x", "y"]);
    }

    #[test]
    fn a_host_that_the_file_does_not_name_is_an_error_that_lists_the_known_ones() {
        let file = parse(r#"{"devices": [{"hostname": "mini1"}, {"hostname": "mini2"}]}"#).unwrap();
        let error = devices(&[profile("mini1"), profile("desk")], Some(&file), None).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("rank 1") && text.contains("desk"), "{text}");
        assert!(text.contains("mini1, mini2"), "{text}");
    }

    #[test]
    fn another_number_of_ranks_is_an_error_that_says_which_to_change() {
        let file = parse(r#"{"model_parallel_size": 3}"#).unwrap();
        let text = devices(&[profile("a")], Some(&file), None)
            .unwrap_err()
            .to_string();
        assert!(text.contains("-np 3") && text.contains("has 1"), "{text}");
    }

    #[test]
    fn values_that_cannot_be_are_named_by_path() {
        let device = |capabilities: &str| {
            format!(r#"{{"devices": [{{"hostname": "a", "capabilities": {{{capabilities}}}}}]}}"#)
        };
        for (text, field) in [
            (
                device(r#""memory_gb": -1"#),
                "devices[0].capabilities.memory_gb",
            ),
            (
                device(r#""memory_gb": 0"#),
                "devices[0].capabilities.memory_gb",
            ),
            (
                device(r#""gpu_cores": 0"#),
                "devices[0].capabilities.gpu_cores",
            ),
            (device(r#""memory_gb": "16""#), "line 1"),
            (r#"{"devices": [{}]}"#.into(), "devices[0].hostname"),
            (
                r#"{"model_parallel_size": 0}"#.into(),
                "model_parallel_size",
            ),
            ("{".into(), "c.json"),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(field), "{text}: {error}");
        }
    }

    #[test]
    fn names_of_one_host_are_recognised() {
        assert!(same_host("mini1", "Mini1.local"));
        assert!(same_host("mini1", "mini1"));
        assert!(same_host("mini1.lan", "mini1"));
        assert!(!same_host("mini1.lan", "mini1.org"));
        assert!(!same_host("mini1", "mini11"));
    }

    #[test]
    fn the_probe_finds_memory_and_cores() {
        let here = probe_local("cpu");
        assert!(here.memory_bytes > 1 << 28 && here.core_count > 0 && !here.hostname.is_empty());
    }
}
