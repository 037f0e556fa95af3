//! `mlx-pipe doctor` under `mpirun`: looks at every host and every link before a byte of weights is loaded, and
//! says what stands in the way of a run and what to do about it.
//!
//! A run stops at the first thing that is wrong; here each rank says all that it knows, whether or not it
//! fits the others, and rank 0 makes one page of it. Nothing is compared by clocks: links are timed by round
//! trips.

use crate::agree::{self, Failure, Usage};
use crate::calibrate::{self, Link};
use crate::cli::{self, DoctorOptions};
use crate::cluster::{self, ClusterFile, DeviceProfile};
use crate::commands;
use crate::hub::{self, Found};
use crate::model::ModelFiles;
use crate::plan::{Align, Plan, Table, WireDtype, printable};
use crate::planning::Question;
use crate::report::PEAK_ALLOWANCE_BYTES;
use crate::session;
use crate::stage;
use crate::transport::{MpiTransport, Transport};
use crate::wire::PROTOCOL_VERSION;
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;
use std::time::Duration;

/// How long ranks wait for each other to say who they are: shorter than in a run, whose hosts may be busy.
const MEETING_LIMIT: Duration = Duration::from_secs(60);
/// What a message of a run weighs at least; any model's hidden state is about this.
const ROW_BYTES: usize = 8192;
/// A link above this is no wired network of today.
const SLOW_LATENCY_NS: u64 = 2_000_000;
/// A link below this, in bytes a second, is slower than 500 Mbit/s.
const SLOW_BYTES_PER_S: u64 = 62_500_000;

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
    /// The directory it was found in.
    model: Result<Model, String>,
}

/// A model as it lies on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Model {
    dir: String,
    config_hash: String,
    tensor_hash: String,
    native_dtype: String,
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
pub fn run(options: &DoctorOptions) -> u8 {
    let (mut transport, _) = match session::join(options.verbose) {
        Ok(joined) => joined,
        Err(status) => return status,
    };
    match examine(options, &mut transport) {
        Ok(status) => status,
        Err(failure) => session::end(failure, transport.rank()),
    }
}

fn examine(options: &DoctorOptions, transport: &mut MpiTransport) -> Result<u8, Failure> {
    let rank = transport.rank();
    let asked = match rank {
        0 => asked(options).map(Some),
        _ => Ok(None),
    };
    let asked = agree::gather(transport, asked, Some(MEETING_LIMIT)).map_err(with_network_hint)?;
    let asked = asked.into_iter().next().flatten();
    let asked = asked.context("rank 0 says what is asked")?;

    let (facts, files) = facts(options, asked.model.as_deref());
    let all = agree::gather(transport, Ok(facts), None)?;
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
        asked: &asked,
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

fn asked(options: &DoctorOptions) -> Result<Asked> {
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
    asked.model = options
        .model
        .model
        .clone()
        .or(in_file)
        .or(cli::model_of_environment());
    Ok(asked)
}

/// Ranks that do not even meet are mostly on a network that MPI chose badly.
fn with_network_hint(failure: Failure) -> Failure {
    let names: BTreeSet<String> = interfaces().into_iter().map(|(name, _)| name).collect();
    let names: Vec<String> = names.into_iter().collect();
    Failure {
        error: failure.error.context(format!(
            "the ranks do not all reach each other; this host's interfaces are {}: name the one that connects \
             the hosts with --mca btl_tcp_if_include, and let the firewall pass what comes from them",
            names.join(", ")
        )),
        ..failure
    }
}

/// What this rank knows, and the model that it found.
fn facts(options: &DoctorOptions, model: Option<&str>) -> (Facts, Option<ModelFiles>) {
    let told = |error: anyhow::Error| format!("{error:#}");
    let chosen = stage::use_device(options.model.device.into());
    let device = chosen.and_then(|()| stage::device_kind());
    let opened = open(model);
    let facts = Facts {
        host: gethostname::gethostname().to_string_lossy().into_owned(),
        version: format!(
            "{} (protocol {PROTOCOL_VERSION})",
            env!("CARGO_PKG_VERSION")
        ),
        mpi: MpiTransport::library(),
        threading: MpiTransport::threading(),
        device: device.map(str::to_owned).map_err(told),
        profile: cluster::probe_local().map_err(|error| error.to_string()),
        available_bytes: cluster::available_bytes(),
        usable_cores: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64),
        interfaces: interfaces(),
        model: match &opened {
            Ok(files) => Ok(Model {
                dir: files.dir.display().to_string(),
                config_hash: files.config_hash.clone(),
                tensor_hash: files.tensor_hash(),
                native_dtype: files.native_dtype().name().to_owned(),
            }),
            Err(error) => Err(format!("{error:#}")),
        },
    };
    (facts, opened.ok())
}

fn open(model: Option<&str>) -> Result<ModelFiles> {
    let model = model.context("no model was named; give --model to have it looked at")?;
    match hub::find(model)? {
        Found::Directory(dir) | Found::Cached(dir) => ModelFiles::open(&dir),
        Found::NotCached(id) => Err(anyhow!(
            "{id} is not in the Hugging Face cache of this host"
        )),
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
    options: &DoctorOptions,
    asked: &Asked,
    all: &[Facts],
    files: &ModelFiles,
) -> Result<Plan, String> {
    let make = || -> Result<Plan> {
        let profiles = all.iter().map(|facts| facts.profile.clone());
        let profiles: Vec<DeviceProfile> = profiles
            .collect::<Result<_, String>>()
            .map_err(|error| anyhow!(error))?;
        let file = asked.cluster_file()?;
        let ranks = cluster::assign(file.as_ref(), &profiles)?;
        let on_gpus = all.iter().all(|facts| facts.device == Ok("gpu".into()));
        let wire_dtype = match on_gpus {
            true => files.native_dtype(),
            false => WireDtype::F32,
        };
        Question {
            options: &options.model,
            cluster: file.as_ref(),
            ranks: &ranks,
            shape: &files.shape(wire_dtype, options.model.tied.into()),
            longest_context_tokens: files.longest_context_tokens(),
            wire_dtype,
            costs: None,
        }
        .plan()
    };
    make().map_err(|error| format!("{error:#}"))
}

/// Something that stands in the way, and what to do.
#[derive(Debug, PartialEq, Eq)]
struct Problem {
    what: String,
    remedy: String,
}

/// All that rank 0 has heard.
struct Page<'a> {
    all: &'a [Facts],
    links: &'a [Examined],
    plan: Option<&'a Result<Plan, String>>,
    asked: &'a Asked,
}

impl Page<'_> {
    fn print(&self, problems: &[Problem]) -> String {
        let mut page = String::new();
        let first = &self.all[0];
        let _ = writeln!(page, "mlx-pipe {} on rank 0", first.version);
        let _ = writeln!(
            page,
            "{}, threads {}",
            printable(&first.mpi),
            first.threading
        );
        let _ = write!(page, "\n{}", self.hosts());
        if !self.links.is_empty() {
            let _ = write!(page, "\n{}", self.link_table());
        }
        match self.plan {
            Some(Ok(plan)) => {
                let _ = write!(page, "\n{}", self.memory(plan));
            }
            Some(Err(_)) => {}
            None => page += "\nwithout a model on rank 0 there is no plan to hold memory against\n",
        }
        for (number, Problem { what, remedy }) in problems.iter().enumerate() {
            let _ = write!(page, "\nproblem {}: {what}\n  -> {remedy}\n", number + 1);
        }
        page += match problems.is_empty() {
            true => "\nnothing stands in the way of a run\n",
            false => "",
        };
        page
    }

    fn hosts(&self) -> Table {
        let mut table = Table::new(&[
            ("rank", Align::Right),
            ("host", Align::Left),
            ("device", Align::Left),
            ("cores", Align::Right),
            ("GB", Align::Right),
            ("free", Align::Right),
            ("model", Align::Left),
            ("addresses", Align::Left),
        ]);
        for (rank, facts) in self.all.iter().enumerate() {
            let profile = facts.profile.as_ref().ok();
            let unknown = || "?".to_owned();
            let addresses = facts.interfaces.iter().filter(|(_, ip)| ip.is_ipv4());
            let addresses: Vec<String> = addresses
                .map(|(name, ip)| format!("{name} {ip}"))
                .take(2)
                .collect();
            table.row(vec![
                rank.to_string(),
                printable(&facts.host),
                facts.device.clone().unwrap_or_else(|_| unknown()),
                format!(
                    "{}/{}",
                    facts.usable_cores,
                    profile.map_or_else(unknown, |profile| profile.cores.to_string())
                ),
                profile.map_or_else(unknown, |profile| tenths_of_gb(profile.memory_bytes)),
                facts.available_bytes.map_or_else(unknown, tenths_of_gb),
                match &facts.model {
                    Ok(model) => model.tensor_hash[..8].to_owned(),
                    Err(_) => "none".to_owned(),
                },
                printable(&addresses.join(", ")),
            ]);
        }
        table
    }

    fn link_table(&self) -> Table {
        let mut table = Table::new(&[
            ("link", Align::Left),
            ("host", Align::Left),
            ("over", Align::Left),
            ("one way", Align::Right),
            ("asleep", Align::Right),
            ("MB/s", Align::Right),
        ]);
        for (from, to, measured) in self.links {
            let hosts = format!("{} > {}", self.all[*from].host, self.all[*to].host);
            let mut row = vec![format!("{from} > {to}"), printable(&hosts)];
            row.extend(match measured {
                Ok(Measured { link, over }) => [
                    printable(over.as_deref().unwrap_or("?")),
                    format!("{} us", link.eager_latency_ns / 1000),
                    format!("{} us", link.latency_ns / 1000),
                    (link.bytes_per_s / 1_000_000).to_string(),
                ],
                Err(_) => ["failed", "", "", ""].map(str::to_owned),
            });
            table.row(row);
        }
        table
    }

    /// What each rank would hold, beside what its host has free.
    fn memory(&self, plan: &Plan) -> Table {
        let mut table = Table::new(&[
            ("rank", Align::Right),
            ("host", Align::Left),
            ("layers", Align::Left),
            ("plan", Align::Right),
            ("limit", Align::Right),
            ("free", Align::Right),
        ]);
        for (rank, (facts, stage)) in self.all.iter().zip(&plan.stages).enumerate() {
            table.row(vec![
                rank.to_string(),
                printable(&facts.host),
                format!("{}-{}", stage.layers.start, stage.layers.end - 1),
                tenths_of_gb(stage.footprint.total_bytes()),
                tenths_of_gb(stage.device.memory_limit_bytes),
                facts
                    .available_bytes
                    .map_or_else(|| "?".to_owned(), tenths_of_gb),
            ]);
        }
        table
    }

    fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        self.differences(&mut problems);
        self.host_problems(&mut problems);
        self.model_problems(&mut problems);
        self.link_problems(&mut problems);
        self.plan_problems(&mut problems);
        problems
    }

    /// What must be the same everywhere and is not.
    fn differences(&self, problems: &mut Vec<Problem>) {
        let mut compare = |what: &str, value: fn(&Facts) -> String, remedy: &str| {
            let first = value(&self.all[0]);
            for (rank, facts) in self.all.iter().enumerate() {
                let own = value(facts);
                if own != first {
                    problems.push(Problem {
                        what: format!(
                            "rank {rank} ({}) has {what} {own}, rank 0 ({}) has {first}",
                            facts.host, self.all[0].host
                        ),
                        remedy: remedy.to_owned(),
                    });
                }
            }
        };
        compare(
            "mlx-pipe",
            |facts| facts.version.clone(),
            "build the same commit on every host",
        );
        compare(
            "MPI",
            |facts| facts.mpi.clone(),
            "install the same release of Open MPI on every host, and build mlx-pipe against it",
        );
    }

    fn host_problems(&self, problems: &mut Vec<Problem>) {
        for (rank, facts) in self.all.iter().enumerate() {
            let of_rank = format!("rank {rank} ({})", facts.host);
            if let Err(error) = &facts.device {
                problems.push(Problem {
                    what: format!("{of_rank}: {error}"),
                    remedy: "use --device auto or cpu, or install what MLX needs for the GPU"
                        .into(),
                });
            }
            if let Err(error) = &facts.profile {
                problems.push(Problem {
                    what: format!("{of_rank}: {error}"),
                    remedy: "state memory_gb for this host in the cluster file".into(),
                });
            }
            let cores = facts.profile.as_ref().map_or(1, |profile| profile.cores);
            if facts.usable_cores < cores {
                problems.push(Problem {
                    what: format!(
                        "{of_rank} may use {} of the host's {cores} cores: it is bound to them, or its \
                         container has no more",
                        facts.usable_cores
                    ),
                    remedy: "start with mpirun --bind-to none".into(),
                });
            }
        }
    }

    fn model_problems(&self, problems: &mut Vec<Problem>) {
        if self.asked.model.is_none() {
            return;
        }
        let known = self.all.iter().enumerate().find_map(|(rank, facts)| {
            let model = facts.model.as_ref().ok()?;
            Some((rank, model))
        });
        for (rank, facts) in self.all.iter().enumerate() {
            let of_rank = format!("rank {rank} ({})", facts.host);
            match (&facts.model, known) {
                (Err(error), None) => problems.push(Problem {
                    what: format!("{of_rank}: {error}"),
                    remedy:
                        "no host has the model: name it with --model, download it or copy it here"
                            .into(),
                }),
                (Err(error), Some((holder, _))) => problems.push(Problem {
                    what: format!("{of_rank}: {error}"),
                    remedy: format!(
                        "copy the model directory of rank {holder} ({}) to this host, or run with \
                         --weights-from {holder}",
                        self.all[holder].host
                    ),
                }),
                (Ok(own), Some((holder, model)))
                    if (&own.config_hash, &own.tensor_hash)
                        != (&model.config_hash, &model.tensor_hash) =>
                {
                    problems.push(Problem {
                        what: format!(
                            "{of_rank} has another model under that name than rank {holder} ({}): {} and {}",
                            self.all[holder].host,
                            &own.tensor_hash[..8],
                            &model.tensor_hash[..8]
                        ),
                        remedy: "copy the same model directory to every host; for an id, the same revision"
                            .into(),
                    });
                }
                _ => {}
            }
        }
    }

    fn link_problems(&self, problems: &mut Vec<Problem>) {
        for (from, to, measured) in self.links {
            let (a, b) = (&self.all[*from], &self.all[*to]);
            let between = format!("from rank {from} ({}) to rank {to} ({})", a.host, b.host);
            let remedy = "a wired network between the hosts, named with --mca btl_tcp_if_include; \
                          ranks at both ends of a slow link are better one rank";
            match measured {
                Err(error) => problems.push(Problem {
                    what: format!("{between}: {error}"),
                    remedy: "let the firewalls of both hosts pass what comes from the other, and name the \
                             interface that connects them with --mca btl_tcp_if_include"
                        .into(),
                }),
                Ok(Measured { link, over }) if a.host != b.host => {
                    let over = over.as_deref().unwrap_or("an unknown interface");
                    if link.eager_latency_ns > SLOW_LATENCY_NS {
                        problems.push(Problem {
                            what: format!(
                                "{between}: a message over {over} takes {:.1} ms; every token waits for it",
                                link.eager_latency_ns as f64 / 1e6
                            ),
                            remedy: remedy.into(),
                        });
                    }
                    if link.bytes_per_s < SLOW_BYTES_PER_S {
                        problems.push(Problem {
                            what: format!(
                                "{between}: {over} carries {} MB/s; prompts wait for it",
                                link.bytes_per_s / 1_000_000
                            ),
                            remedy: remedy.into(),
                        });
                    }
                }
                Ok(_) => {}
            }
        }
    }

    /// What does not fit: by the limits, which is an error of the plan, or beside what else runs there.
    fn plan_problems(&self, problems: &mut Vec<Problem>) {
        let plan = match self.plan {
            None => return,
            Some(Err(error)) => {
                problems.push(Problem {
                    what: error.clone(),
                    remedy: "see above; `mlx-pipe plan --what-if` shows what other numbers of hosts come to"
                        .into(),
                });
                return;
            }
            Some(Ok(plan)) => plan,
        };
        let mut needed: BTreeMap<&str, (u64, Option<u64>)> = BTreeMap::new();
        for (facts, stage) in self.all.iter().zip(&plan.stages) {
            let host = needed
                .entry(&facts.host)
                .or_insert((0, facts.available_bytes));
            host.0 = host
                .0
                .saturating_add(stage.footprint.total_bytes())
                .saturating_add(PEAK_ALLOWANCE_BYTES);
        }
        for (host, (needed_bytes, available_bytes)) in needed {
            if available_bytes.is_some_and(|available| available < needed_bytes) {
                problems.push(Problem {
                    what: format!(
                        "{host}: its ranks will need up to {} GB, and {} GB are free",
                        tenths_of_gb(needed_bytes),
                        available_bytes.map_or_else(String::new, tenths_of_gb)
                    ),
                    remedy: "end other programs there, or lower --context, or set --memory-limit so that \
                             other hosts take more"
                        .into(),
                });
            }
        }
    }
}

fn tenths_of_gb(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests;
