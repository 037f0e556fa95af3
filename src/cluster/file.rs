//! The cluster file: its JSON as types checked once, and which of its devices a host is.

use std::fmt;
use std::fs;
use std::io::Read;
use std::net::IpAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, de};

use super::{ClusterError, DeviceProfile, RankDevice};
use crate::plan::{LinkCost, LinkCosts, Rates};

/// Largest cluster file read: some thousand devices. Anything larger is not a cluster file.
pub(super) const MAX_FILE_BYTES: u64 = 1 << 20;

/// Largest memory a device may claim, in GB; keeps every size far from 64 bits.
const MAX_GIGABYTES: f64 = 1e9;

/// Smallest rate or latency a file may state, in the unit that it states it in: less is a slip.
const LEAST_STATED: f64 = 1e-3;

/// Largest rate or latency a file may state, in the unit that it states it in.
const MAX_STATED: f64 = 1e6;

/// From one rank to another of the same host: through shared memory, and as fast as a poll of the
/// receiver comes round (see `wait`).
pub(super) const LOCAL_LINK: LinkCost = LinkCost {
    latency_ns: 20_000,
    bytes_per_s: 4_000_000_000,
};

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
#[serde(
    expecting = "an object with `model_name`, `model_parallel_size`, `devices`, `link` and `links`, each optional"
)]
struct FileFields {
    model_name: Option<String>,
    model_parallel_size: Option<NonZeroUsize>,
    devices: Option<Vec<DeviceEntry>>,
    link: Option<LinkFields>,
    links: Option<Vec<NamedLink>>,
}

/// A link as it stands in JSON.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(expecting = "an object with `latency_us` and `bandwidth_gbit_s`")]
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
#[serde(expecting = "an object with `from`, `to`, `latency_us` and `bandwidth_gbit_s`")]
struct NamedLink {
    from: String,
    to: String,
    #[serde(flatten)]
    link: LinkFields,
}

/// A device as it stands in JSON.
#[derive(Deserialize)]
#[serde(expecting = "an object with `hostname` or `device_id`, and `capabilities`")]
struct DeviceFields {
    device_id: Option<String>,
    hostname: Option<String>,
    capabilities: Option<Capabilities>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(expecting = "an object such as {\"memory_gb\": 16, \"gpu_cores\": 10}")]
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
        if !(LEAST_STATED..=MAX_STATED).contains(&stated) {
            let found = de::Unexpected::Float(stated);
            return Err(de::Error::invalid_value(
                found,
                &"a number from 0.001 to 1e6",
            ));
        }
        Ok(Self(stated))
    }
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
        let fields: FileFields = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            // Where the text ends too early there is no path, which the crate writes `?`.
            let field = error.path().to_string().replace('?', ".");
            malformed(field, error.into_inner())
        })?;
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

    pub(super) fn check_ranks(&self, found: usize) -> Result<(), ClusterError> {
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
    pub(super) fn matching(&self, profile: &DeviceProfile, one_host: bool) -> Vec<usize> {
        let quality = |entry: &DeviceEntry| entry.names.matches(profile, one_host);
        let best = self.devices.iter().filter_map(quality).min();
        let entries = self.devices.iter().enumerate();
        entries
            .filter(|(_, entry)| best.is_some() && quality(entry) == best)
            .map(|(index, _)| index)
            .collect()
    }

    pub(super) fn unknown_host(&self, rank: usize, profile: &DeviceProfile) -> ClusterError {
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
    pub(super) fn over(&self, probed: &DeviceProfile) -> DeviceProfile {
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

impl ClusterFile {
    /// The device at `index`, whose host need not be there. Only this host's gaps can be filled by
    /// the probe.
    pub(super) fn describe(
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
