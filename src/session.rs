//! A run on one rank, from the start of MPI to the report: every rank does the same, in the same order,
//! and differs only by its place in the plan.

use crate::agree::{self, Failure, KnownTo};
use crate::cli::{self, RunOptions};
use crate::cluster::{self, ClusterFile, DeviceProfile};
use crate::hub::{self, Found};
use crate::model::ModelFiles;
use crate::pipeline::Worker;
use crate::plan::{self, Device, Plan, PlanRequest, WireDtype};
use crate::progress::Progress;
use crate::prompts::{self, Prompts};
use crate::report::{self, RankReport, Report};
use crate::request::{AnswerWriter, Identity, Tally, WriteError, Written};
use crate::schedule::Schedule;
use crate::sequence::Rules;
use crate::stage::{self, Stage};
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::transport::{self, MpiTransport, Transport};
use crate::wait::{self, Interrupted};
use crate::wire::PROTOCOL_VERSION;
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tracing::info;

/// Sequences in flight.
pub const SEQUENCES: u64 = 1;
/// What to say when nothing names a model.
pub const NO_MODEL: &str =
    "no model given; use --model DIR_OR_ID, a cluster file with `model_name`, or MLX_PIPE_MODEL";
/// Context where neither the user nor the model says less, tokens.
const DEFAULT_CONTEXT_TOKENS: u64 = 4096;

/// Generates for every prompt on standard input. Returns the exit status of the program.
pub fn run(options: &RunOptions) -> u8 {
    let started = Instant::now();
    let joined = wait::end_on_signals().and_then(|()| MpiTransport::start());
    let mut transport = match joined {
        Ok(transport) => transport,
        Err(error) => {
            eprintln!("mlx-pipe: {error:#}");
            return 1;
        }
    };
    let rank = transport.rank();
    end_job_on_panic(rank);
    log_to_stderr(options.verbose, rank, started);
    match generate(options, &mut transport, started) {
        Ok(status) => status,
        Err(failure) => end(failure, rank),
    }
}

/// The route of a run.
fn generate(
    options: &RunOptions,
    transport: &mut MpiTransport,
    started: Instant,
) -> Result<u8, Failure> {
    let rank = transport.rank();
    let cluster = Cluster::meet(options, transport)?;
    let files = open_model(&cluster, transport)?;
    let plan = make_plan(options, &cluster, &files)?;
    compare(&cluster, &files, &plan, transport)?;
    if rank == 0 {
        eprint!("{}", plan::plan_table(&plan));
    }
    let (stage, mut report) = load(&cluster, &files, &plan, rank, started)?;
    agree::all_succeeded(transport, Ok(()))?;

    let mut worker = Worker::new(&mut *transport, stage);
    let outcome = match rank {
        0 => Some(lead(options, &cluster, &files, &plan, &mut worker)?),
        _ => {
            worker.follow()?;
            None
        }
    };
    report = report.with_counters(worker.counters);
    report.peak_rss_bytes = report::peak_rss_bytes();
    let ranks = agree::gather(transport, Ok(report))?;
    match outcome {
        None => Ok(0),
        Some((written, measured)) => {
            let report = Report {
                plan: &plan,
                plan_hash: plan.fingerprint_hex(),
                ranks,
                measured,
                written,
            };
            publish(options, &report)?;
            Ok(exit_status(report.written.tally))
        }
    }
}

/// What the ranks know of each other before they look at a model.
struct Cluster {
    ranks: Vec<Place>,
    file: Option<ClusterFile>,
    model: String,
}

/// Where a rank runs.
#[derive(Serialize, Deserialize)]
struct Place {
    profile: DeviceProfile,
    /// `cpu` or `gpu`: what its arrays are computed on.
    device: String,
}

impl Place {
    fn host(&self) -> &str {
        &self.profile.hostname
    }
}

/// What a rank tells the others first.
#[derive(Serialize, Deserialize)]
struct Introduction {
    version: String,
    place: Place,
    /// Text of the cluster file, and what names a model; those of rank 0 count.
    cluster_file: Option<String>,
    model: Option<String>,
    model_of_environment: Option<String>,
}

impl Cluster {
    fn meet(options: &RunOptions, transport: &mut MpiTransport) -> Result<Self, Failure> {
        let local = introduce(options, transport.rank());
        let all = agree::gather(transport, local)?;
        let hosts = all.iter().map(|other| other.place.host());
        let versions = all.iter().map(|other| other.version.as_str());
        agree::same_on_all(
            "version of mlx-pipe",
            hosts.zip(versions),
            "copy the same binary to every host",
        )?;
        let first = all.first().context("a run has a rank 0")?;
        let file = match (&first.cluster_file, &options.model.cluster) {
            (Some(text), Some(path)) => Some(
                ClusterFile::parse(path, text)
                    .map_err(|error| Failure::of_all(error).as_usage())?,
            ),
            _ => None,
        };
        let asked = first.model.clone();
        let named = file.as_ref().and_then(|file| file.model_name.clone());
        let model = asked
            .or(named)
            .or_else(|| first.model_of_environment.clone())
            .ok_or_else(|| Failure::of_all(anyhow!(NO_MODEL)).as_usage())?;
        Ok(Self {
            ranks: all.into_iter().map(|other| other.place).collect(),
            file,
            model,
        })
    }

    /// Activations travel in what all ranks can compute in: f32 as soon as one of them is a CPU.
    fn wire_dtype(&self, files: &ModelFiles) -> WireDtype {
        match self.ranks.iter().all(|place| place.device == "gpu") {
            true => files.native_dtype(),
            false => WireDtype::F32,
        }
    }
}

fn introduce(options: &RunOptions, rank: usize) -> Result<Introduction> {
    let place = Place {
        profile: cluster::probe_local()?,
        device: stage::device_kind()?.to_owned(),
    };
    let cluster_file = match &options.model.cluster {
        Some(path) if rank == 0 => Some(ClusterFile::read_text(path)?),
        _ => None,
    };
    Ok(Introduction {
        version: format!(
            "{} (protocol {PROTOCOL_VERSION})",
            env!("CARGO_PKG_VERSION")
        ),
        place,
        cluster_file,
        model: options.model.model.clone(),
        model_of_environment: cli::model_of_environment(),
    })
}

/// Finds the model on every host; where it is missing, the first rank of the host downloads it.
fn open_model(cluster: &Cluster, transport: &mut MpiTransport) -> Result<ModelFiles, Failure> {
    let rank = transport.rank();
    let host = |rank: usize| cluster.ranks[rank].host();
    let is_first_on_host = (0..rank).all(|other| host(other) != host(rank));
    let found = hub::find(&cluster.model).and_then(|found| match found {
        Found::NotCached(id) if is_first_on_host => {
            info!(id, "downloading");
            Ok(Some(hub::download(&id)?))
        }
        Found::NotCached(_) => Ok(None),
        Found::Here(dir) => Ok(Some(dir)),
    });
    let here = agree::all_succeeded(transport, found)?;
    let opened = resolve_again(here, &cluster.model).and_then(|dir| ModelFiles::open(&dir));
    agree::all_succeeded(transport, opened)
}

/// The directory found, or the one that another rank of this host has downloaded meanwhile.
fn resolve_again(here: Option<PathBuf>, model: &str) -> Result<PathBuf> {
    match here {
        Some(dir) => Ok(dir),
        None => match hub::find(model)? {
            Found::Here(dir) => Ok(dir),
            Found::NotCached(id) => {
                Err(anyhow!("{id} is still not in the cache after its download"))
            }
        },
    }
}

fn make_plan(options: &RunOptions, cluster: &Cluster, files: &ModelFiles) -> Result<Plan, Failure> {
    let wire_dtype = cluster.wire_dtype(files);
    let gathered: Vec<DeviceProfile> = cluster
        .ranks
        .iter()
        .map(|place| place.profile.clone())
        .collect();
    let assigned = cluster::assign(cluster.file.as_ref(), &gathered)
        .map_err(|error| Failure::of_all(error).as_usage())?;
    let devices: Vec<Device> = assigned
        .iter()
        .map(|rank| rank.plan_device(options.model.memory_limit))
        .collect();
    let context_tokens = context_tokens(options.model.context, files)
        .map_err(|error| Failure::of_all(error).as_usage())?;
    plan::plan(&PlanRequest {
        shape: &files.shape(wire_dtype),
        devices: &devices,
        strategy: options.model.strategy(),
        context_tokens,
        sequences: SEQUENCES,
        wire_dtype,
    })
    .map_err(Failure::of_all)
}

/// The context asked for, at most the model's.
pub fn context_tokens(asked: Option<u64>, files: &ModelFiles) -> Result<u64> {
    let longest = files.architecture.family.context_tokens as u64;
    match asked {
        None => Ok(longest.min(DEFAULT_CONTEXT_TOKENS)),
        Some(asked) if asked <= longest => Ok(asked),
        Some(asked) => Err(anyhow!(
            "--context {asked} is more than the {longest} tokens that the model was made for"
        )),
    }
}

/// What must be equal on all ranks before a tensor is read.
#[derive(Serialize, Deserialize)]
struct Fingerprints {
    config: String,
    tensors: String,
    plan: String,
}

fn compare(
    cluster: &Cluster,
    files: &ModelFiles,
    plan: &Plan,
    transport: &mut MpiTransport,
) -> Result<(), Failure> {
    let local = Fingerprints {
        config: files.config_hash.clone(),
        tensors: files.tensor_hash(),
        plan: plan.fingerprint_hex(),
    };
    let all = agree::gather(transport, Ok(local))?;
    let host = |rank: usize| cluster.ranks[rank].host();
    let each = |field: fn(&Fingerprints) -> &String| {
        all.iter()
            .enumerate()
            .map(move |(rank, prints)| (host(rank), field(prints).as_str()))
            .collect::<Vec<_>>()
    };
    let copy = "copy the same model directory to every host";
    agree::same_on_all("config.json", each(|prints| &prints.config), copy)?;
    agree::same_on_all("weights", each(|prints| &prints.tensors), copy)?;
    agree::same_on_all(
        "plan",
        each(|prints| &prints.plan),
        "run the same version on every host",
    )
}

/// Loads this rank's slice.
fn load(
    cluster: &Cluster,
    files: &ModelFiles,
    plan: &Plan,
    rank: usize,
    started: Instant,
) -> Result<(Stage, RankReport), Failure> {
    let part = &plan.stages[rank];
    let (stage, consumed) = Stage::load(files, part, plan.wire_dtype).with_context(|| {
        format!(
            "loading layers {}-{}",
            part.layers.start,
            part.layers.end - 1
        )
    })?;
    if consumed.bytes != part.footprint.weights_bytes() {
        return Err(anyhow!(
            "{} bytes of weights were planned for this rank, but {} were loaded",
            part.footprint.weights_bytes(),
            consumed.bytes
        )
        .into());
    }
    let place = &cluster.ranks[rank];
    let load_s = started.elapsed().as_secs_f64();
    info!(
        tensors = consumed.tensors,
        bytes = consumed.bytes,
        load_s,
        "loaded layers {}-{}",
        part.layers.start,
        part.layers.end - 1
    );
    let report = RankReport {
        host: place.host().to_owned(),
        device: place.device.clone(),
        loaded_bytes: consumed.bytes,
        load_s,
        ..RankReport::default()
    };
    Ok((stage, report))
}

/// Rank 0's part of the run: requests in, answers out.
fn lead(
    options: &RunOptions,
    cluster: &Cluster,
    files: &ModelFiles,
    plan: &Plan,
    worker: &mut Worker<&mut MpiTransport, Stage>,
) -> Result<(Written, report::Measured), Failure> {
    let now_s = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let rules = rules(options, files, plan, now_s)?;
    let identity = Identity {
        model: cluster.model.clone(),
        created_s: now_s,
    };
    let requests = prompts::read_requests(prompts::standard_input(), options.sampling.defaults());
    let writer = AnswerWriter::new(std::io::stdout(), options.format.into(), identity);
    let mut prompts = Prompts::new(requests, &rules, writer, Progress::new());
    let mut schedule = Schedule::new(options.prefill_chunk as usize);
    worker.lead(&mut schedule, &mut prompts, options.step_limit())?;
    Ok(prompts.finish()?)
}

fn rules(options: &RunOptions, files: &ModelFiles, plan: &Plan, now_s: u64) -> Result<Rules> {
    let tokenizer = match Tokenizer::load(&files.dir, now_s as i64) {
        Ok(tokenizer) => Some(tokenizer),
        Err(TokenizerError::Missing { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let mut end_ids = files.end_ids.clone();
    if end_ids.is_empty() {
        end_ids.extend(tokenizer.as_ref().and_then(Tokenizer::eos_token_id));
    }
    Ok(Rules {
        tokenizer,
        raw: options.raw,
        context_tokens: plan.context_tokens as usize,
        vocab_size: files.architecture.vocab_size,
        end_ids,
        seed: options.sampling.seed,
    })
}

/// The status of a run that got to its end. One without a prompt was surely not meant.
fn exit_status(tally: Tally) -> u8 {
    if tally.answered + tally.failed == 0 {
        eprintln!(
            "mlx-pipe: no prompts on standard input; give one a line, such as: echo \"Hello\" | mlx-pipe --model ..."
        );
        return 2;
    }
    tally.exit_status()
}

/// Prints the report, and writes it where it was asked for.
fn publish(options: &RunOptions, report: &Report) -> Result<()> {
    eprint!("{}", report.to_table());
    if let Some(path) = &options.report {
        let text = serde_json::to_string_pretty(&report.to_json())?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("writing the report {}", path.display()))?;
    }
    Ok(())
}

/// Says what went wrong and ends this rank, and if need be the others. Returns the exit status.
fn end(failure: Failure, rank: usize) -> u8 {
    let interrupted = failure.error.downcast_ref::<Interrupted>();
    let status = interrupted.map_or(failure.status, |by| 128 + by.signal as u8);
    match failure.known_to {
        KnownTo::All => {
            if rank == 0 {
                eprintln!("mlx-pipe: {:#}", failure.error);
            }
            transport::limit_ending(status.into());
            status
        }
        KnownTo::ThisRank => {
            let written = failure.error.downcast_ref::<WriteError>();
            // Nobody reads the output any more, as with `| head`; or the launcher ends the job, and has
            // said why.
            let is_known = matches!(written, Some(WriteError::Closed { .. }))
                || (cli::is_launched() && interrupted.is_some_and(|by| by.from_parent));
            if !is_known {
                eprintln!(
                    "mlx-pipe: rank {rank} on {}: {:#}",
                    MpiTransport::host(),
                    failure.error
                );
            }
            transport::abort(status.into())
        }
    }
}

/// A panic is a bug of ours, but must not leave the other ranks waiting.
fn end_job_on_panic(rank: usize) {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        eprintln!(
            "mlx-pipe: rank {rank} on {}: this is a bug:",
            MpiTransport::host()
        );
        tell(panic);
        transport::abort(1);
    }));
}

fn log_to_stderr(verbose: u8, rank: usize, started: Instant) {
    let level = match verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        _ => tracing::Level::DEBUG,
    };
    let place = format!("rank {rank} {}", MpiTransport::host());
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .event_format(crate::log::RankFormat::new(place, started))
        .try_init();
}
