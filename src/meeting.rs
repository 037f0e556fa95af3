//! The ranks meet: each says who it is and how it was started, all hear all, and rank 0's words count for what
//! only one can decide. Before that no rank knows where the others run, afterwards all know the same.

use crate::agree::{self, Failure, Usage};
use crate::cli::{self, ModelOptions, RunOptions};
use crate::cluster::{self, ClusterFile, DeviceProfile, RankDevice};
use crate::cores;
use crate::cost_store::Seat;
use crate::launcher;
use crate::model::{Caches, Kernels, ModelFiles};
use crate::plan::WireDtype;
use crate::planning;
use crate::stage::{self, Computer};
use crate::transport::{MpiTransport, Transport};
use crate::wire::PROTOCOL_VERSION;
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the ranks wait for each other to say who they are. Later waits have no limit: a download or a
/// slow disk takes as long as it takes, and MPI notices a rank that has died.
const MEETING_LIMIT: Duration = Duration::from_secs(120);

/// What ranks must have in common to understand each other.
pub fn version() -> String {
    format!(
        "{} (protocol {PROTOCOL_VERSION})",
        env!("CARGO_PKG_VERSION")
    )
}

/// What the ranks know of each other before they look at a model.
pub struct Cluster {
    /// One a rank.
    pub ranks: Vec<Place>,
    /// The cluster file that rank 0 read.
    pub file: Option<ClusterFile>,
    /// The model as it was named.
    pub model: String,
    /// What this rank computes with.
    pub kernels: Kernels,
    /// What was asked of CPUs beside the default.
    kernels_label: String,
}

/// Where a rank runs.
#[derive(Serialize, Deserialize)]
pub struct Place {
    profile: DeviceProfile,
    /// `cpu` or `gpu`: what it computes on.
    pub device: String,
    /// Its caches are this program's.
    has_own_caches: bool,
}

impl Place {
    /// Its host's name.
    pub fn host(&self) -> &str {
        &self.profile.hostname
    }
}

/// What a rank tells the others first.
#[derive(Serialize, Deserialize)]
struct Introduction {
    version: String,
    place: Place,
    options: Vec<(String, String)>,
    /// The port of its bell, for the ranks of its host.
    bell_port: Option<u16>,
    /// Path and text of the cluster file, and what names a model; those of rank 0 count.
    cluster_file: Option<(PathBuf, String)>,
    model: Option<String>,
    model_of_environment: Option<String>,
}

/// Chooses what this rank computes with, and what it says of itself.
fn introduce(options: &RunOptions, transport: &MpiTransport) -> Result<(Kernels, Introduction)> {
    let (usable, seat) = (cores::usable(), launcher::seat());
    let threads = options.model.threads.unwrap_or(usable);
    let ModelOptions {
        device, kernels, ..
    } = options.model;
    let computer = stage::computer(device.into(), kernels.into(), threads, seat);
    let computer = computer.map_err(Usage::of)?;
    let introduction = Introduction::of(options, transport, &computer)?;
    Ok((computer.kernels, introduction))
}

impl Introduction {
    fn of(options: &RunOptions, transport: &MpiTransport, computer: &Computer) -> Result<Self> {
        let mut cluster_file = None;
        if transport.rank() == 0 {
            if let Some(path) = &options.model.cluster {
                let text = ClusterFile::read_text(path).map_err(Usage::of)?;
                cluster_file = Some((path.clone(), text));
            }
            for (name, path) in [("--report", &options.report), ("--trace", &options.trace)] {
                path.as_deref()
                    .map(|path| try_file(name, path))
                    .transpose()?;
            }
        }
        let mut profile = cluster::probe_local()?;
        if let Some(bytes) = computer.memory_bytes {
            profile.memory_bytes = bytes;
        }
        if let Some(cores) = computer.worth_cores {
            profile.cores = cores;
        }
        Ok(Self {
            version: version(),
            place: Place {
                profile,
                device: computer.kind.to_owned(),
                has_own_caches: matches!(computer.kernels, Kernels::Own(_) | Kernels::Cuda(_)),
            },
            options: options.shared_options(),
            bell_port: transport.bell_port(),
            cluster_file,
            model: options.model.model.clone(),
            model_of_environment: cli::model_of_environment(),
        })
    }
}

/// A file that cannot be written is better known before the run than after it.
fn try_file(name: &str, path: &Path) -> Result<()> {
    std::fs::File::create(path)
        .map(|_| ())
        .map_err(|error| Usage::of(anyhow!("{name} {}: {error}", path.display())))
}

impl Cluster {
    /// Hears who the others are, and makes sure that all are of one mind. All ranks call this first.
    ///
    /// # Errors
    /// A rank that does not come, or ranks of different versions or options; a bad cluster file, or no model.
    pub fn meet(options: &RunOptions, transport: &mut MpiTransport) -> Result<Self, Failure> {
        let (kernels, local) = match introduce(options, transport) {
            Ok((kernels, local)) => (Some(kernels), Ok(local)),
            Err(error) => (None, Err(error)),
        };
        let all = agree::gather(transport, local, Some(MEETING_LIMIT))?;
        let each = |field: fn(&Introduction) -> &String| {
            let values = all
                .iter()
                .map(move |rank| (rank.place.host(), field(rank).as_str()));
            values.collect::<Vec<_>>()
        };
        agree::same_on_all(
            "version of mlx-pipe",
            each(|rank| &rank.version),
            "build the same commit on every host",
        )?;
        let of_ranks: Vec<_> = all
            .iter()
            .map(|rank| (rank.place.host(), &rank.options[..]))
            .collect();
        agree::same_options(&of_ranks)?;
        let own_host = all[transport.rank()].place.host();
        let port = |rank: &Introduction| rank.bell_port.filter(|_| rank.place.host() == own_host);
        transport.meet_neighbours(all.iter().map(port).collect());
        let chosen = all.first().context("a run has a rank 0").and_then(choose);
        let (file, model) = agree::all_succeeded(transport, chosen)?;
        Ok(Self {
            ranks: all.into_iter().map(|rank| rank.place).collect(),
            file,
            model,
            kernels: kernels.context("a rank that introduced itself has kernels")?,
            kernels_label: options.model.kernels_label(),
        })
    }

    /// Activations travel in what all ranks can compute in: f32 as soon as one of them is a CPU.
    pub fn wire_dtype(&self, files: &ModelFiles) -> WireDtype {
        let devices = self.ranks.iter().map(|place| place.device.as_str());
        planning::wire_dtype(devices, files.native_dtype())
    }

    /// Whose caches the plan counts with: MLX's, which take no less, as soon as one rank has them.
    pub fn caches(&self) -> Caches {
        match self.ranks.iter().all(|place| place.has_own_caches) {
            true => Caches::Own,
            false => Caches::Mlx,
        }
    }

    /// Each rank's device, as probed and as the cluster file has it.
    ///
    /// # Errors
    /// A cluster file that is not for these hosts.
    pub fn devices(&self) -> Result<Vec<RankDevice>> {
        let profiles: Vec<DeviceProfile> = self
            .ranks
            .iter()
            .map(|place| place.profile.clone())
            .collect();
        cluster::assign(self.file.as_ref(), &profiles).map_err(Usage::of)
    }

    /// Where each rank computes.
    pub fn seats(&self) -> Vec<Seat> {
        let seat = |place: &Place| Seat {
            host: place.host().to_owned(),
            device: Seat::device_label(&place.device, &self.kernels_label),
        };
        self.ranks.iter().map(seat).collect()
    }

    /// A value of each rank, with the rank's host.
    pub fn by_host<'a>(&'a self, values: &'a [String]) -> impl Iterator<Item = (&'a str, &'a str)> {
        let hosts = self.ranks.iter().map(Place::host);
        hosts.zip(values.iter().map(String::as_str))
    }
}

/// The cluster file and the model that rank 0 named.
fn choose(first: &Introduction) -> Result<(Option<ClusterFile>, String)> {
    let file = match &first.cluster_file {
        Some((path, text)) => Some(ClusterFile::parse(path, text).map_err(Usage::of)?),
        None => None,
    };
    let model = planning::choose_model(
        first.model.clone(),
        file.as_ref().and_then(|file| file.model_name.clone()),
        first.model_of_environment.clone(),
    )?;
    Ok((file, model))
}
