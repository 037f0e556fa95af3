//! What calibrations have measured, kept in the user's cache directory from one run to the next: a file for
//! each shape of model, in it each host and each link. So two of three hosts need no calibration of their
//! own, and `mlx-pipe plan` knows what rank 0 of a run knew.
//!
//! Only rank 0 reads and writes it, and tells the others. A file that is damaged or of another version counts
//! as none: a calibration takes seconds.

use crate::bounded_file;
use crate::plan::{Costs, DeviceCost, LinkCost, LinkCosts, ModelShape, WireDtype};
use crate::user_cache;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use tracing::{info, warn};

/// Raise it when a number changes its meaning.
const SCHEMA: u32 = 2;
/// Longer times were not measured: half an hour.
const LONGEST_NS: u64 = 1_800_000_000_000;
/// Larger files are not ours: a thousand hosts take less.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Where a rank computes, as far as its costs depend on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    /// Name of the host.
    pub host: String,
    /// `cpu` or `gpu`, and what was asked of a CPU.
    pub device: String,
}

impl Seat {
    /// A device and, of a CPU, what was asked of it beside the default.
    pub fn device_label(device: &str, asked: &str) -> String {
        match device {
            "cpu" => format!("{device}{asked}"),
            _ => device.to_owned(),
        }
    }
}

/// The measurements for one shape of model.
#[derive(Debug)]
pub struct CostStore {
    path: PathBuf,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    schema: u32,
    /// By host, device and number of ranks that share them.
    devices: BTreeMap<String, DeviceCost>,
    /// By sender and receiver.
    links: BTreeMap<String, LinkCost>,
}

impl CostStore {
    /// The store for models of this shape, computed in `wire_dtype`; `None` where there is no home directory.
    pub fn of(shape: &ModelShape, wire_dtype: WireDtype) -> Option<Self> {
        let name = format!("{}-{wire_dtype}.json", &shape_hash(shape)[..16]);
        Some(Self {
            path: user_cache::dir()?.join("calibration").join(name),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is known of these ranks: all of it, or nothing.
    pub fn find(&self, seats: &[Seat]) -> Option<Costs> {
        let kept = self.read()?;
        let device = |seat| kept.devices.get(&device_key(seat, seats)).cloned();
        let devices = seats.iter().map(device).collect::<Option<Vec<_>>>()?;
        // A cable is taken to be as fast the other way.
        let link = |from: &Seat, to: &Seat| {
            let known = kept.links.get(&link_key(from, to));
            known
                .or_else(|| kept.links.get(&link_key(to, from)))
                .copied()
        };
        let links = match seats {
            [] => return None,
            [_] => None,
            [first, .., last] => {
                let forward = seats.windows(2).map(|pair| link(&pair[0], &pair[1]));
                Some(LinkCosts {
                    forward: forward.collect::<Option<_>>()?,
                    back: link(last, first)?,
                })
            }
        };
        Some(Costs { devices, links })
    }

    /// Adds what was measured of these ranks, in place of what was known of the same hosts.
    ///
    /// # Errors
    /// The directory or the file cannot be written.
    pub fn keep(&self, seats: &[Seat], costs: &Costs) -> Result<()> {
        let mut kept = self.read().unwrap_or_default();
        kept.schema = SCHEMA;
        for (seat, cost) in seats.iter().zip(&costs.devices) {
            kept.devices.insert(device_key(seat, seats), cost.clone());
        }
        if let Some(links) = &costs.links {
            for (pair, link) in seats.windows(2).zip(&links.forward) {
                kept.links.insert(link_key(&pair[0], &pair[1]), *link);
            }
            if let [first, .., last] = seats {
                kept.links.insert(link_key(last, first), links.back);
            }
        }
        self.write(&kept).with_context(|| {
            format!(
                "the calibration could not be kept in {}",
                self.path.display()
            )
        })
    }

    fn read(&self) -> Option<Kept> {
        let not_used = |why: String| warn!("{} is not used: {why}", self.path.display());
        let bytes = match bounded_file::read(&self.path, MAX_FILE_BYTES) {
            Ok(bytes) => bytes?,
            Err(error) => {
                not_used(error.to_string());
                return None;
            }
        };
        let kept: Kept = match serde_json::from_slice(&bytes) {
            Ok(kept) => kept,
            Err(error) => {
                not_used(error.to_string());
                return None;
            }
        };
        if let Some(fault) = kept.fault() {
            not_used(fault);
            return None;
        }
        info!("costs from {}", self.path.display());
        Some(kept)
    }

    /// Whole or not at all: written beside, then renamed.
    fn write(&self, kept: &Kept) -> Result<()> {
        let dir = self.path.parent().context("a file has a directory")?;
        fs::create_dir_all(dir)?;
        let beside = dir.join(format!(".{}.tmp", std::process::id()));
        let put = || -> Result<()> {
            let mut file = fs::File::create(&beside)?;
            file.write_all(&serde_json::to_vec_pretty(kept)?)?;
            file.sync_all()?;
            Ok(fs::rename(&beside, &self.path)?)
        };
        put().inspect_err(|_| {
            let _ = fs::remove_file(&beside);
        })
    }
}

impl Kept {
    fn fault(&self) -> Option<String> {
        if self.schema != SCHEMA {
            return Some(format!("schema {}, expected {SCHEMA}", self.schema));
        }
        let of_device = |(key, cost): (&String, &DeviceCost)| {
            let times = cost.layer.iter().map(|point| point.ns);
            let mut times = times.chain([cost.head_ns, cost.step_ns, cost.context_ns]);
            let fault =
                match times.any(|ns| ns > LONGEST_NS) || cost.layer.iter().any(|at| at.ns == 0) {
                    true => Some("a time that no computation takes"),
                    false => cost.fault(),
                };
            Some(format!("{key}: {}", fault?))
        };
        let of_link = |(key, link): (&String, &LinkCost)| {
            (link.bytes_per_s == 0).then(|| format!("{key}: a link that carries nothing"))
        };
        let devices = self.devices.iter().find_map(of_device);
        devices.or_else(|| self.links.iter().find_map(of_link))
    }
}

fn device_key(seat: &Seat, all: &[Seat]) -> String {
    let same = |other: &&Seat| (other.name(), &other.device) == (seat.name(), &seat.device);
    let sharers = all.iter().filter(same).count();
    format!("{} {} shared by {sharers}", seat.name(), seat.device)
}

fn link_key(from: &Seat, to: &Seat) -> String {
    format!("{} > {}", from.name(), to.name())
}

impl Seat {
    /// The host's name up to its first dot, as the cluster file's names are compared; an address whole.
    fn name(&self) -> String {
        let is_address = self.host.parse::<std::net::IpAddr>().is_ok();
        let label = match is_address {
            true => &self.host,
            false => self.host.split('.').next().unwrap_or(&self.host),
        };
        label.to_ascii_lowercase()
    }
}

/// Equal for models whose parts have equal sizes, wherever a tied table stands.
fn shape_hash(shape: &ModelShape) -> String {
    let mut hash = Sha256::new_with_prefix(b"mlx-pipe shape 1\0");
    let ends = [
        shape.embedding_bytes,
        shape.norm_bytes,
        shape.head_step_bytes(),
        shape.kv_bytes_per_token_per_layer,
        shape.hidden_row_bytes,
        shape.layer_weights,
    ];
    for number in ends.iter().chain(&shape.layer_bytes) {
        hash.update(number.to_le_bytes());
    }
    hex::encode(hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::StepCost;

    fn store(dir: &tempfile::TempDir) -> CostStore {
        CostStore {
            path: dir.path().join("deep/down/costs.json"),
        }
    }

    fn seats(hosts: &[&str]) -> Vec<Seat> {
        let seat = |host: &&str| Seat {
            host: (*host).to_owned(),
            device: "cpu".to_owned(),
        };
        hosts.iter().map(seat).collect()
    }

    fn device(ns: u64) -> DeviceCost {
        DeviceCost {
            layer: vec![StepCost { tokens: 1, ns }],
            layer_bytes: 10,
            context_ns: 1,
            head_ns: 2,
            step_ns: 3,
            crowding_per_mille: 1000,
        }
    }

    fn link(latency_ns: u64) -> LinkCost {
        LinkCost {
            latency_ns,
            bytes_per_s: 1,
        }
    }

    fn three_hosts() -> (Vec<Seat>, Costs) {
        let costs = Costs {
            devices: vec![device(100), device(200), device(300)],
            links: Some(LinkCosts {
                forward: vec![link(12), link(23)],
                back: link(31),
            }),
        };
        (seats(&["a", "b", "c"]), costs)
    }

    #[test]
    fn what_was_kept_is_found_for_the_same_hosts_and_for_some_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let (seats_of_three, costs) = three_hosts();
        assert_eq!(store.find(&seats_of_three), None);
        store.keep(&seats_of_three, &costs).unwrap();
        assert_eq!(store.find(&seats_of_three).as_ref(), Some(&costs));
        let alone = store.find(&seats(&["b"])).unwrap();
        assert_eq!((alone.devices, alone.links), (vec![device(200)], None));
        // From b to a was never measured: it is taken to be as from a to b.
        let two = store.find(&seats(&["a.local", "B"])).unwrap();
        assert_eq!(two.links.map(|links| links.back), Some(link(12)));
        // Nor were two ranks on one host, nor a host of another name.
        assert_eq!(store.find(&seats(&["a", "d"])), None);
        assert_eq!(store.find(&seats(&["a", "a"])), None);
    }

    #[test]
    fn a_later_calibration_replaces_the_hosts_that_it_measured_only() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let (seats_of_three, mut costs) = three_hosts();
        store.keep(&seats_of_three, &costs).unwrap();
        let again = Costs {
            devices: vec![device(7)],
            links: None,
        };
        store.keep(&seats(&["c"]), &again).unwrap();
        costs.devices[2] = device(7);
        assert_eq!(store.find(&seats_of_three), Some(costs));
    }

    #[test]
    fn a_damaged_file_counts_as_none_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let (seats, costs) = three_hosts();
        store.keep(&seats, &costs).unwrap();
        let good = fs::read_to_string(&store.path).unwrap();
        for damaged in [
            String::new(),
            good[..good.len() / 2].to_owned(),
            good.replace(
                &format!("\"schema\": {SCHEMA}"),
                &format!("\"schema\": {}", SCHEMA + 1),
            ),
            good.replace("\"tokens\": 1", "\"tokens\": 2"),
            good.replace("\"bytes_per_s\": 1", "\"bytes_per_s\": 0"),
            good.replace("\"ns\": 100", "\"ns\": 0"),
            good.replace("\"ns\": 100", "\"ns\": 18446744073709551615"),
        ] {
            fs::write(&store.path, &damaged).unwrap();
            assert_eq!(store.find(&seats), None, "{damaged}");
        }
        store.keep(&seats, &costs).unwrap();
        assert_eq!(store.find(&seats), Some(costs));
    }
}
