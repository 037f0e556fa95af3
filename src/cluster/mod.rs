//! What each rank runs on: the cluster file, the probe of this host, and both merged.
//!
//! Every rank probes its own host (`probe`), the profiles are gathered, and [`assign`] lays the cluster
//! file (`file`) over them; what comes out feeds the planner ([`RankDevice::plan_device`]). `mlx-pipe
//! plan` has nobody to gather from and uses [`describe`] instead. Separate from `plan` because this part
//! reads files and asks the operating system, and from `transport` because it sends nothing.

mod error;
mod file;
mod probe;
#[cfg(test)]
mod tests;

use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};

use crate::plan::{Device, Rates};

pub use error::ClusterError;
pub use file::{ClusterFile, DeviceEntry};
pub use probe::{available_bytes, probe_local};

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
    /// `gpu_cores` of the cluster file, else the number of CPU cores, or as many as a GPU is worth.
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
