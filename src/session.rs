//! A run on one rank, from the start of MPI to the report: every rank does the same, in the same order,
//! and differs only by its place in the plan.

use crate::agree::{self, Failure, KnownTo, Usage};
use crate::calibrate;
use crate::checkpoint::Consumed;
use crate::cli::{RunOptions, ServerOptions};
use crate::cores;
use crate::cost_store::CostStore;
use crate::handover;
use crate::hub::{self, Found};
use crate::launcher;
use crate::limits::limits;
use crate::log::{RankFormat, tell};
use crate::meeting::{Cluster, Place};
use crate::model::ModelFiles;
use crate::pipeline::{Rows, Worker};
use crate::plan::{self, Costs, Plan};
use crate::planning;
use crate::progress::Progress;
use crate::prompts::{self, Prompts};
use crate::report::{self, Measured, RankReport, Report};
use crate::request::{AnswerWriter, Identity, Tally, WriteError, Written};
use crate::schedule::{BLOCK_TOKENS, Limits, PromptRows, Schedule};
use crate::sequence::Rules;
use crate::serve::{About, RankAbout, Server};
use crate::slice::{Loaded, Slice};
use crate::stage::{self, CoreShare, Stage};
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::trace::{self, RankTrace, Recorder};
use crate::transport::{self, MpiTransport, Transport};
use crate::wait::{self, Interrupted, Signals};
use anyhow::{Context, Result, anyhow, bail};
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tracing::{info, warn};

/// Generates for every prompt on standard input, or for every request to the server that is asked for. Returns the
/// exit status of the program.
pub fn run(options: &RunOptions, server_options: Option<&ServerOptions>) -> u8 {
    let (mut transport, started) = match join(options.verbose) {
        Ok(joined) => joined,
        Err(status) => return status,
    };
    if server_options.is_some() && transport.rank() > 0 {
        wait::take_signals_as(Signals::EndButUsr1);
    }
    let mut server = None;
    let done = generate(
        options,
        server_options,
        &mut server,
        &mut transport,
        started,
    );
    match done {
        Ok(status) => status,
        Err(failure) => {
            if let Some(server) = &mut server {
                server.fail();
            }
            end(failure, transport.rank())
        }
    }
}

/// Joins the other ranks, and sees to it that no failure of this one leaves them waiting. Also when that
/// began; or the exit status, if MPI cannot be started.
pub fn join(verbose: u8) -> Result<(MpiTransport, Instant), u8> {
    let started = Instant::now();
    cores::undo_default_binding();
    wait::sleep_exactly();
    if cores::usable() >= 2 * launcher::seat().ranks {
        wait::look_often();
    }
    let joined = wait::end_on_signals().and_then(|()| MpiTransport::start());
    let transport = joined.map_err(|error| {
        tell(&format!("mlx-pipe: {error:#}\n"));
        1
    })?;
    end_job_on_panic(transport.rank());
    log_to_stderr(verbose, transport.rank(), started);
    Ok((transport, started))
}

/// The route of a run.
fn generate(
    options: &RunOptions,
    server_options: Option<&ServerOptions>,
    server: &mut Option<Server>,
    transport: &mut MpiTransport,
    started: Instant,
) -> Result<u8, Failure> {
    let rank = transport.rank();
    let cluster = Cluster::meet(options, transport)?;
    if let Some(server_options) = server_options {
        let started = (rank == 0).then(|| Server::start(server_options, now_s()));
        let started = started.transpose().map_err(Usage::of);
        *server = agree::all_succeeded(transport, started)?;
    }
    let files = open_model(options, &cluster, transport)?;
    compare_files(&cluster, &files, transport)?;
    let measuring = Instant::now();
    let costs = costs(options, &cluster, &files, transport)?;
    // Measuring is no part of the time to load.
    let started = started + measuring.elapsed();
    let plan = make_plan(options, &cluster, &files, costs.as_ref());
    let plan = agree::all_succeeded(transport, plan)?;
    compare_plans(&cluster, &plan, transport)?;
    let rules = rules(options, &files, &plan, rank);
    let rules = agree::all_succeeded(transport, rules)?;
    if rank == 0 {
        tell(&plan::plan_table(&plan));
    }
    let cache_dir = options.shard_cache.as_deref();
    let slice = Slice::new(&files, &plan, rank, &cluster.kernels, cache_dir);
    let slice = agree::all_succeeded(transport, slice)?;
    let (mut stage, consumed) = load(options, &slice, transport)?;
    stage.share_cores(core_share(options, &cluster, rank));
    let limits = limits(options, &cluster, &plan);
    stage.reserve_cache(limits.kv_blocks.saturating_mul(BLOCK_TOKENS))?;
    let mut report = loaded(&cluster, &plan, consumed, rank, started)?;
    agree::all_succeeded(transport, Ok(()))?;

    let mut worker = Worker::new(&mut *transport, stage, rows(&files, &plan, &limits));
    if options.trace.is_some() {
        worker.trace = Some(Recorder::start(&mut worker.transport)?);
    }
    let outcome = match (rules, &server) {
        (None, _) => {
            worker.follow()?;
            None
        }
        (Some(rules), None) => Some(lead(options, &cluster, &rules, limits, &mut worker)?),
        (Some(rules), Some(server)) => {
            let about = about(&cluster, &plan, &limits, options.model.memory_limit)?;
            Some(serve(options, server, rules, about, limits, &mut worker)?)
        }
    };
    if let Some(server) = server {
        server.finish();
    }
    let (counters, trace) = (worker.counters, worker.trace.take());
    report = report.with_counters(counters);
    report.peak_rss_bytes = report::peak_rss_bytes();
    report.peak_array_bytes = stage::peak_array_bytes(&cluster.kernels);
    let ranks = agree::gather(transport, Ok(report), None)?;
    let status = match outcome {
        None => 0,
        Some((written, measured)) => {
            let report = Report {
                plan: &plan,
                ranks,
                measured,
                active_s: counters.active.as_secs_f64(),
                most_at_once: counters.most_sequences,
                written,
                prefill_chunk: limits.step_tokens as u64,
            };
            publish(options, &report)?;
            match server_options {
                None => exit_status(report.written.tally),
                Some(_) => 0,
            }
        }
    };
    write_trace(options, &cluster, trace, transport)?;
    Ok(status)
}

/// Finds the model on every host; where it is missing, the first rank of the host downloads it, or the rank
/// that `--weights-from` names tells of it.
fn open_model(
    options: &RunOptions,
    cluster: &Cluster,
    transport: &mut MpiTransport,
) -> Result<ModelFiles, Failure> {
    if let Some(source) = options.weights_from {
        agree::all_succeeded(transport, check_source(source, cluster.ranks.len()))?;
        let cache_dir = options.shard_cache.as_deref();
        return handover::open(transport, &cluster.model, source, cache_dir);
    }
    let rank = transport.rank();
    let found = agree::gather(transport, hub::find(&cluster.model), None)?;
    // What is a directory on one host may look like an id on another.
    let is_directory = found
        .iter()
        .any(|found| matches!(found, Found::Directory(_)));
    let host = |rank: usize| cluster.ranks[rank].host();
    let is_first_on_host = (0..rank).all(|other| host(other) != host(rank));
    let dir = match &found[rank] {
        Found::Directory(dir) | Found::Cached(dir) => Ok(Some(dir.clone())),
        Found::NotCached(id) if is_directory => Err(Usage::of(anyhow!(
            "no directory \"{id}\" on this host, though there is one on others; copy the model to every host"
        ))),
        Found::NotCached(id) if is_first_on_host => {
            info!(id, "downloading");
            hub::download(id).map(Some)
        }
        Found::NotCached(_) => Ok(None),
    };
    let dir = agree::all_succeeded(transport, dir)?;
    let opened = resolve_again(dir, &cluster.model).and_then(|dir| ModelFiles::open(&dir));
    agree::all_succeeded(transport, opened)
}

/// Whether `--weights-from` names a rank of this run.
fn check_source(source: usize, rank_count: usize) -> Result<()> {
    match source < rank_count {
        true => Ok(()),
        false => Err(Usage::of(anyhow!(
            "--weights-from {source}: there is no such rank; this run has {rank_count}, counted from 0"
        ))),
    }
}

/// The directory found, or the one that another rank of this host has downloaded meanwhile.
fn resolve_again(here: Option<PathBuf>, model: &str) -> Result<PathBuf> {
    match here {
        Some(dir) => Ok(dir),
        None => match hub::find(model)? {
            Found::Directory(dir) | Found::Cached(dir) => Ok(dir),
            Found::NotCached(id) => bail!("{id} is still not in the cache after its download"),
        },
    }
}

/// The same configuration and tensors on all ranks, or an error that says who differs.
fn compare_files(
    cluster: &Cluster,
    files: &ModelFiles,
    transport: &mut MpiTransport,
) -> Result<(), Failure> {
    let copy = "copy the same model directory to every host";
    let configs = agree::gather(transport, Ok(files.config_hash.clone()), None)?;
    agree::same_on_all("config.json", cluster.by_host(&configs), copy)?;
    let tensors = agree::gather(transport, Ok(files.tensor_hash()), None)?;
    agree::same_on_all("weights", cluster.by_host(&tensors), copy)
}

/// What the hosts and links cost: measured now if asked for, else what an earlier calibration has left on
/// rank 0's host, if it knows all of them.
fn costs(
    options: &RunOptions,
    cluster: &Cluster,
    files: &ModelFiles,
    transport: &mut MpiTransport,
) -> Result<Option<Costs>, Failure> {
    let wire_dtype = cluster.wire_dtype(files);
    let shape = files.shape(wire_dtype, cluster.caches(), options.model.tied.into());
    let store = match transport.rank() {
        0 => CostStore::of(&shape, wire_dtype),
        _ => None,
    };
    let seats = cluster.seats();
    if !options.calibrate {
        let kept = store.and_then(|store| store.find(&seats));
        let kept = agree::gather(transport, Ok(kept), None)?;
        return Ok(kept.into_iter().next().flatten());
    }
    let own = cluster.devices().ok();
    let own = own.and_then(|devices| devices.into_iter().nth(transport.rank()));
    let own = own.map(|device| device.plan_device(options.model.memory_limit));
    let question = calibrate::Question {
        seats: &seats,
        files,
        shape: &shape,
        wire_dtype,
        kernels: &cluster.kernels,
        // A rank that cannot have a limit gets no plan either; that is told when the plan is made.
        limit_bytes: own.map_or(0, |device| device.memory_limit_bytes),
    };
    let costs = calibrate::measure(&question, transport)?;
    // What was made up is no part of the run's memory.
    report::forget_peak_rss();
    // What later runs will read is what this one goes by, so that they come to the same plan.
    let kept = store.and_then(|store| match store.keep(&seats, &costs) {
        Ok(()) => store.find(&seats),
        Err(error) => {
            warn!("{error:#}");
            None
        }
    });
    let kept = agree::gather(transport, Ok(kept), None)?;
    Ok(kept.into_iter().next().flatten().or(Some(costs)))
}

fn make_plan(
    options: &RunOptions,
    cluster: &Cluster,
    files: &ModelFiles,
    costs: Option<&Costs>,
) -> Result<Plan> {
    let ranks = cluster.devices()?;
    let wire_dtype = cluster.wire_dtype(files);
    let question = planning::Question {
        options: &options.model,
        cluster: cluster.file.as_ref(),
        ranks: &ranks,
        shape: &files.shape(wire_dtype, cluster.caches(), options.model.tied.into()),
        longest_context_tokens: files.longest_context_tokens(),
        wire_dtype,
        costs,
    };
    question.plan()
}

fn compare_plans(
    cluster: &Cluster,
    plan: &Plan,
    transport: &mut MpiTransport,
) -> Result<(), Failure> {
    let plans = agree::gather(transport, Ok(plan.fingerprint_hex()), None)?;
    agree::same_on_all(
        "plan",
        cluster.by_host(&plans),
        "build the same commit on every host",
    )
}

/// What sequences need to know, on rank 0.
fn rules(
    options: &RunOptions,
    files: &ModelFiles,
    plan: &Plan,
    rank: usize,
) -> Result<Option<Rules>> {
    if rank != 0 {
        return Ok(None);
    }
    let tokenizer = match Tokenizer::load(&files.dir, now_s() as i64) {
        Ok(mut tokenizer) => {
            tokenizer.limit_texts(plan.context_tokens as usize);
            Some(tokenizer)
        }
        Err(TokenizerError::Missing { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let mut end_ids = files.end_ids.clone();
    if end_ids.is_empty() {
        end_ids.extend(tokenizer.as_ref().and_then(Tokenizer::eos_token_id));
    }
    Ok(Some(Rules {
        tokenizer,
        raw: options.raw,
        context_tokens: plan.context_tokens as usize,
        vocab_size: files.architecture.vocab_size,
        end_ids,
        seed: options.sampling.seed,
    }))
}

/// Loads this rank's slice.
fn load(
    options: &RunOptions,
    slice: &Slice,
    transport: &mut MpiTransport,
) -> Result<Loaded, Failure> {
    match options.weights_from {
        None => Ok(slice.load()?),
        Some(source) => slice.load_with_help(transport, source),
    }
}

/// What was loaded is what was planned; the beginning of this rank's report.
fn loaded(
    cluster: &Cluster,
    plan: &Plan,
    consumed: Consumed,
    rank: usize,
    started: Instant,
) -> Result<RankReport> {
    let part = &plan.stages[rank];
    if consumed.bytes != part.footprint.weights_bytes() {
        bail!(
            "{} bytes of weights were planned for this rank, but {} were loaded",
            part.footprint.weights_bytes(),
            consumed.bytes
        );
    }
    let load_s = started.elapsed().as_secs_f64();
    info!(
        tensors = consumed.tensors,
        bytes = consumed.bytes,
        "loaded layers {}-{}",
        part.layers.start,
        part.layers.end - 1
    );
    let place = &cluster.ranks[rank];
    Ok(RankReport {
        host: place.host().to_owned(),
        device: place.device.clone(),
        loaded_bytes: consumed.bytes,
        load_s,
        ..RankReport::default()
    })
}

/// The cores of this rank's host, and how many ranks they are shared by, unless the user has said how many threads.
fn core_share(options: &RunOptions, cluster: &Cluster, rank: usize) -> CoreShare {
    let host = cluster.ranks[rank].host();
    let on_host = cluster.ranks.iter().filter(|place| place.host() == host);
    let on_host = on_host.count();
    let (cores, ranks) = match options.model.threads {
        Some(threads) => (threads, 1),
        None => (cores::usable(), on_host),
    };
    CoreShare {
        cores,
        ranks,
        is_shared: on_host > 1,
    }
}

/// Gathers the ranks' traces and writes them on rank 0's host, where they are wanted.
fn write_trace(
    options: &RunOptions,
    cluster: &Cluster,
    trace: Option<Recorder>,
    transport: &mut MpiTransport,
) -> Result<(), Failure> {
    let (Some(path), Some(trace)) = (&options.trace, trace) else {
        return Ok(());
    };
    let traces: Vec<RankTrace> = agree::gather(transport, Ok(trace.finish()), None)?;
    if transport.rank() == 0 {
        let hosts: Vec<&str> = cluster.ranks.iter().map(Place::host).collect();
        let file = File::create(path).map(BufWriter::new);
        file.and_then(|file| trace::write(file, &traces, &hosts))
            .with_context(|| format!("writing the trace {}", path.display()))?;
    }
    Ok(())
}

/// How the first rank comes by its rows.
fn rows(files: &ModelFiles, plan: &Plan, limits: &Limits) -> Rows {
    match limits.rows {
        PromptRows::Known => Rows::Local,
        PromptRows::AskedFor => Rows::FromLast {
            row_bytes: files.architecture.hidden_size * plan.wire_dtype.size_bytes(),
        },
    }
}

/// Rank 0's part of the run: requests in, answers out.
fn lead(
    options: &RunOptions,
    cluster: &Cluster,
    rules: &Rules,
    limits: Limits,
    worker: &mut Worker<&mut MpiTransport, Stage>,
) -> Result<(Written, Measured)> {
    let identity = Identity {
        model: cluster.model.clone(),
        created_s: now_s(),
    };
    let requests = prompts::read_requests(prompts::standard_input(), options.sampling.defaults());
    let writer = AnswerWriter::new(std::io::stdout(), options.format.into(), identity);
    let mut prompts = Prompts::new(requests, rules, writer, Progress::new());
    let mut schedule = Schedule::new(limits);
    worker.lead(&mut schedule, &mut prompts, options.step_limit())?;
    prompts.finish()
}

/// The same for a server: requests come and are answered until it is told to end.
fn serve(
    options: &RunOptions,
    server: &Server,
    rules: Rules,
    about: About,
    limits: Limits,
    worker: &mut Worker<&mut MpiTransport, Stage>,
) -> Result<(Written, Measured)> {
    wait::take_signals_as(match launcher::is_launched() {
        true => Signals::DrainUnlessLauncher,
        false => Signals::Drain,
    });
    let mut feed = server.ready(rules, options.sampling.defaults(), about);
    let mut schedule = Schedule::new(limits);
    worker.lead(&mut schedule, &mut feed, options.step_limit())?;
    let (tally, measured) = feed.finish();
    let digest = String::new();
    Ok((Written { tally, digest }, measured))
}

/// What the server tells of the pipeline.
fn about(
    cluster: &Cluster,
    plan: &Plan,
    limits: &Limits,
    memory_limit: Option<u64>,
) -> Result<About> {
    let devices = cluster.devices()?;
    let ranks = plan.stages.iter().zip(&cluster.ranks).zip(devices);
    let ranks = ranks.map(|((stage, place), device)| RankAbout {
        host: place.host().to_owned(),
        device: place.device.clone(),
        layers: stage.layers.clone(),
        has_embedding: stage.role.owns_embedding(),
        has_head: stage.role.owns_head(),
        weight_bytes: stage.footprint.weights_bytes(),
        cache_bytes: stage.footprint.kv_bytes,
        memory_limit_bytes: Some(device.plan_device(memory_limit).memory_limit_bytes),
    });
    // Where the model lies on this host is no client's business.
    let dir = Path::new(&cluster.model);
    let name = dir.file_name().filter(|_| dir.is_dir());
    let name = name.map(|name| name.to_string_lossy().into_owned());
    Ok(About {
        model: name.unwrap_or_else(|| cluster.model.clone()),
        fingerprint: format!("fp_{:.12}", plan.fingerprint_hex()),
        ranks: ranks.collect(),
        sequences: limits.sequences,
        kv_total_tokens: limits.kv_blocks * BLOCK_TOKENS,
    })
}

/// Seconds since 1970.
fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// Prints the report, and writes it where it was asked for.
fn publish(options: &RunOptions, report: &Report) -> Result<()> {
    tell(&report.to_table());
    if let Some(path) = &options.report {
        let text = serde_json::to_string_pretty(&report.to_json())?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("writing the report {}", path.display()))?;
    }
    Ok(())
}

/// The status of a run that got to its end. One without a prompt was surely not meant.
fn exit_status(tally: Tally) -> u8 {
    if tally.answered + tally.failed == 0 {
        tell(
            "mlx-pipe: no prompts on standard input; give one a line, such as: \
             echo \"Hello\" | mlx-pipe --model ...\n",
        );
        return 2;
    }
    tally.exit_status()
}

/// Says what went wrong and ends this rank, and if need be the others. Returns the exit status.
pub fn end(failure: Failure, rank: usize) -> u8 {
    let error = &failure.error;
    let interrupted = error.downcast_ref::<Interrupted>();
    let status = match interrupted {
        Some(by) => 128 + by.signal as u8,
        None => agree::exit_status(error),
    };
    match failure.known_to {
        KnownTo::All => {
            if rank == 0 {
                tell(&format!("mlx-pipe: {error:#}\n"));
            }
            transport::limit_ending(status.into());
            status
        }
        KnownTo::ThisRank => {
            let written = error.downcast_ref::<WriteError>();
            // Nobody reads the output any more, as with `| head`; or the launcher ends the job, and has
            // said why.
            let is_known = matches!(written, Some(WriteError::Closed { .. }))
                || (launcher::is_launched() && interrupted.is_some_and(|by| by.from_parent));
            if !is_known {
                tell(&format!(
                    "mlx-pipe: rank {rank} on {}: {error:#}\n",
                    MpiTransport::host()
                ));
            }
            transport::abort(status.into())
        }
    }
}

/// A panic is a bug of ours, but must not leave the other ranks waiting.
fn end_job_on_panic(rank: usize) {
    std::panic::set_hook(Box::new(move |panic| {
        tell(&format!(
            "mlx-pipe: rank {rank} on {}: this is a bug: {panic}\n{}",
            MpiTransport::host(),
            std::backtrace::Backtrace::capture()
        ));
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
    // It fails only if there is a logger already, which then does as well.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .event_format(RankFormat::new(place, started))
        .try_init();
}
