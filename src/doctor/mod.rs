//! `mlx-pipe doctor` under `mpirun`: looks at every host and every link before a byte of weights is loaded, and
//! says what stands in the way of a run and what to do about it.
//!
//! A run stops at the first thing that is wrong; here each rank says all that it knows, whether or not it
//! fits the others, and rank 0 makes one page of it. Nothing is compared by clocks: links are timed by round
//! trips.

mod page;

use crate::agree::{self, Failure, KnownTo, Usage};
use crate::calibrate::{self, Link};
use crate::cli::{self, ModelOptions, RunOptions};
use crate::cluster::{self, ClusterFile, DeviceProfile};
use crate::commands;
use crate::cores;
use crate::hub::{self, Found};
use crate::launcher;
use crate::meeting;
use crate::model::ModelFiles;
use crate::plan::{Plan, PlanError};
use crate::planning::{self, Question};
use crate::session;
use crate::stage;
use crate::transport::{MpiTransport, Transport};
use anyhow::{Context, Result, anyhow};
use page::Page;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// How long ranks wait for each other to say who they are: shorter than in a run, whose hosts may be busy.
const MEETING_LIMIT: Duration = Duration::from_secs(60);
/// What a message of a run weighs at least; any model's hidden state is about this.
const ROW_BYTES: usize = 8192;

/// What a rank knows of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Facts {
    host: String,
    version: String,
    mpi: String,
    threading: String,
    /// `cpu` or `gpu`, or why it cannot be told.
    device: Result<String, String>,
    profile: Result<DeviceProfile, String>,
    /// Memory that is free or could be freed, bytes; `None` where the system does not tell.
    available_bytes: Option<u64>,
    /// Cores that this process may use.
    usable_cores: u64,
    /// Names and addresses of the interfaces, but for loopback.
    interfaces: Vec<(String, IpAddr)>,
    /// What a run could not differ in between ranks, and its value here.
    options: Vec<(String, String)>,
    /// The model, or what is the matter with it.
    model: Result<Model, NoModel>,
}

/// Why a rank has no model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum NoModel {
    /// None was named.
    NotAsked,
    /// It is not on this host.
    Missing(String),
    /// It is there and cannot be used.
    Unusable(String),
}

/// A model as it lies on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Model {
    config_hash: String,
    tensor_hash: String,
}

/// A link of the pipeline, and what it went over.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Measured {
    link: Link,
    /// The interface whose counter grew with the messages; `None` where there is no counter.
    over: Option<String>,
}

/// From which rank to which, and what came of measuring it.
type Examined = (usize, usize, Result<Measured, String>);

/// Looks, prints the page on rank 0, and returns the exit status: 0 where a run should succeed, else 1.
pub fn run(options: &RunOptions) -> u8 {
    let (mut transport, _) = match session::join(options.verbose) {
        Ok(joined) => joined,
        Err(status) => return status,
    };
    match examine(options, &mut transport) {
        Ok(status) => status,
        Err(failure) => session::end(failure, transport.rank()),
    }
}

fn examine(options: &RunOptions, transport: &mut MpiTransport) -> Result<u8, Failure> {
    let rank = transport.rank();
    let asked = match rank {
        0 => asked(options).map(Some),
        _ => Ok(None),
    };
    let asked = agree::gather(transport, asked, Some(MEETING_LIMIT));
    let asked = asked.map_err(with_network_hint)?;
    let asked = asked.into_iter().next().flatten();
    let asked = asked.context("rank 0 says what is asked")?;

    let (facts, files) = facts(options, asked.model.as_deref());
    let all = agree::gather(transport, Ok(facts), Some(MEETING_LIMIT));
    let all = all.map_err(with_network_hint)?;
    let links = links(&all, transport)?;
    if rank != 0 {
        // The status is rank 0's: `mpirun` passes on any that is not 0.
        return Ok(0);
    }
    let plan = files.map(|files| plan(options, &asked, &all, &files));
    let page = Page {
        all: &all,
        links: &links,
        plan: plan.as_ref(),
        weights_from: options.weights_from,
    };
    let problems = page.problems();
    commands::print(&page.print(&problems))?;
    Ok(u8::from(!problems.is_empty()))
}

/// What rank 0 was asked to look at.
#[derive(Debug, Serialize, Deserialize)]
struct Asked {
    /// `None` if no model was named: then hosts and links are looked at.
    model: Option<String>,
    cluster: Option<(String, String)>,
}

impl Asked {
    fn cluster_file(&self) -> Result<Option<ClusterFile>> {
        let parse = |(path, text): &(String, String)| ClusterFile::parse(path.as_ref(), text);
        self.cluster
            .as_ref()
            .map(parse)
            .transpose()
            .map_err(Usage::of)
    }
}

fn asked(options: &RunOptions) -> Result<Asked> {
    let cluster = match &options.model.cluster {
        Some(path) => {
            let text = ClusterFile::read_text(path).map_err(Usage::of)?;
            Some((path.display().to_string(), text))
        }
        None => None,
    };
    let mut asked = Asked {
        model: None,
        cluster,
    };
    let file = asked.cluster_file()?;
    let in_file = file.and_then(|file| file.model_name);
    let named = options.model.model.clone();
    asked.model = planning::choose_model(named, in_file, cli::model_of_environment()).ok();
    Ok(asked)
}

/// Ranks that do not even meet are mostly on a network that MPI chose badly. An error that all have heard of is
/// another matter.
fn with_network_hint(failure: Failure) -> Failure {
    if failure.known_to == KnownTo::All {
        return failure;
    }
    let names: BTreeSet<String> = interfaces().into_iter().map(|(name, _)| name).collect();
    let names: Vec<String> = names.into_iter().collect();
    Failure {
        error: failure.error.context(format!(
            "the ranks do not all reach each other, or one is stopped; this host's interfaces are {}: name the one \
             that connects the hosts with --mca btl_tcp_if_include, and let the firewall pass what comes from them",
            names.join(", ")
        )),
        ..failure
    }
}

/// What this rank knows, and the model that it found.
fn facts(options: &RunOptions, model: Option<&str>) -> (Facts, Option<ModelFiles>) {
    let told = |error: anyhow::Error| format!("{error:#}");
    // As a run does before it counts cores.
    cores::undo_default_binding();
    let ModelOptions {
        device, kernels, ..
    } = options.model;
    let computer = stage::computer(
        device.into(),
        kernels.into(),
        cores::usable(),
        launcher::seat(),
    );
    let opened = open(model);
    let facts = Facts {
        host: gethostname::gethostname().to_string_lossy().into_owned(),
        version: meeting::version(),
        mpi: MpiTransport::library(),
        threading: MpiTransport::threading(),
        device: computer
            .map(|computer| computer.kind.to_owned())
            .map_err(told),
        profile: cluster::probe_local().map_err(|error| error.to_string()),
        available_bytes: cluster::available_bytes(),
        usable_cores: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64),
        interfaces: interfaces(),
        options: options.shared_options(),
        model: match &opened {
            Ok(files) => Ok(Model {
                config_hash: files.config_hash.clone(),
                tensor_hash: files.tensor_hash(),
            }),
            Err(why) => Err(why.clone()),
        },
    };
    (facts, opened.ok())
}

fn open(model: Option<&str>) -> Result<ModelFiles, NoModel> {
    let model = model.ok_or(NoModel::NotAsked)?;
    match hub::find(model) {
        Ok(Found::Directory(dir) | Found::Cached(dir)) => {
            ModelFiles::open(&dir).map_err(|error| NoModel::Unusable(format!("{error:#}")))
        }
        Ok(Found::NotCached(id)) => Err(NoModel::Missing(format!(
            "there is no directory {id}, and it is not in the Hugging Face cache of this host"
        ))),
        Err(error) => Err(NoModel::Missing(format!("{error:#}"))),
    }
}

fn interfaces() -> Vec<(String, IpAddr)> {
    let all = if_addrs::get_if_addrs().unwrap_or_default();
    all.into_iter()
        .filter(|interface| !interface.is_loopback())
        .map(|interface| (interface.name.clone(), interface.ip()))
        .collect()
}

/// The links of the pipeline in its order, the one that closes the ring last. One that fails does not stop
/// the others.
fn links(all: &[Facts], transport: &mut MpiTransport) -> Result<Vec<Examined>, Failure> {
    let last = all.len() - 1;
    let mut pairs: Vec<(usize, usize)> = (0..last).map(|rank| (rank, rank + 1)).collect();
    if last > 1 {
        pairs.push((last, 0));
    }
    let mut links = Vec::new();
    for (from, to) in pairs {
        let before = sent_bytes_by_interface();
        let measured = calibrate::link(transport, from, to, ROW_BYTES);
        let measured = measured.map(|link| {
            link.map(|link| Measured {
                over: grown_most(&before, &sent_bytes_by_interface(), link.long_bytes),
                link,
            })
        });
        let told = measured.map_err(|error| format!("{error:#}"));
        let told = agree::gather(transport, Ok(told), Some(MEETING_LIMIT))?;
        let failed = told.iter().find_map(|told| told.as_ref().err().cloned());
        let measured = told.get(from).cloned().and_then(|told| told.ok().flatten());
        let measured = measured.ok_or(failed.unwrap_or_else(|| "was not measured".into()));
        links.push((from, to, measured));
    }
    Ok(links)
}

/// What the kernel says each interface has sent, in bytes; empty where it does not.
fn sent_bytes_by_interface() -> BTreeMap<String, u64> {
    let Ok(interfaces) = std::fs::read_dir("/sys/class/net") else {
        return BTreeMap::new();
    };
    let sent = |entry: std::fs::DirEntry| {
        let text = std::fs::read_to_string(entry.path().join("statistics/tx_bytes")).ok()?;
        let bytes = text.trim().parse().ok()?;
        Some((entry.file_name().to_string_lossy().into_owned(), bytes))
    };
    interfaces.flatten().filter_map(sent).collect()
}

/// The interface that carried the messages: it has sent at least their bytes meanwhile. Shared memory, if
/// none has.
fn grown_most(
    before: &BTreeMap<String, u64>,
    after: &BTreeMap<String, u64>,
    sent_bytes: u64,
) -> Option<String> {
    if after.is_empty() {
        return None;
    }
    let growth = |(name, bytes): (&String, &u64)| {
        let grown = bytes.saturating_sub(before.get(name).copied().unwrap_or(0));
        (grown >= sent_bytes).then(|| (grown, name.clone()))
    };
    let carrier = after.iter().filter_map(growth).max();
    Some(carrier.map_or_else(|| "shared memory".to_owned(), |(_, name)| name))
}

/// The plan that a run would make, or why it would make none.
fn plan(
    options: &RunOptions,
    asked: &Asked,
    all: &[Facts],
    files: &ModelFiles,
) -> Result<Plan, NoPlan> {
    let make = || -> Result<Plan> {
        let profiles = all.iter().map(|facts| facts.profile.clone());
        let profiles: Vec<DeviceProfile> = profiles
            .collect::<Result<_, String>>()
            .map_err(|error| anyhow!(error))?;
        let file = asked.cluster_file()?;
        let ranks = cluster::assign(file.as_ref(), &profiles)?;
        // Where it cannot be told what a rank computes on, it is no GPU.
        let devices = all
            .iter()
            .map(|facts| facts.device.as_deref().unwrap_or("cpu"));
        let wire_dtype = planning::wire_dtype(devices, files.native_dtype());
        Question {
            options: &options.model,
            cluster: file.as_ref(),
            ranks: &ranks,
            shape: &files.shape(
                wire_dtype,
                options.model.kernels.into(),
                options.model.tied.into(),
            ),
            longest_context_tokens: files.longest_context_tokens(),
            wire_dtype,
            costs: None,
        }
        .plan()
    };
    make().map_err(|error| NoPlan {
        does_not_fit: matches!(error.downcast_ref(), Some(PlanError::DoesNotFit(_))),
        why: format!("{error:#}"),
    })
}

/// Why a run would not come to a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
struct NoPlan {
    /// The hosts have not enough memory; else something about the question is wrong.
    does_not_fit: bool,
    why: String,
}
