//! The commands that need no MPI: `plan` and `import`.

use crate::agree::{self, Usage};
use crate::cli::{self, PlanOptions};
use crate::cluster::{self, ClusterFile, RankDevice};
use crate::cost_store::{CostStore, Seat};
use crate::hub::{self, Found};
use crate::launcher;
use crate::log::tell;
use crate::model::Outline;
use crate::plan::{self, Costs, Gain, ModelShape, Plan, WireDtype};
use crate::planning::{self, Question};
use anyhow::{Result, bail};
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Each host is left out in turn, which means as many plans; with more hosts than this nobody waits for that.
const MOST_HOSTS_TO_DOUBT: usize = 32;

/// Prints the plan, the memory report and what is predicted.
///
/// # Errors
/// No model, a bad cluster file, or nothing that fits.
pub fn plan(options: &PlanOptions) -> Result<()> {
    crate::log::warn_on_stderr();
    let cluster = options.model.cluster.as_deref();
    let file = cluster
        .map(ClusterFile::read)
        .transpose()
        .map_err(Usage::of)?;
    let files = Outline::open(&find_model(options, file.as_ref())?)?;
    let ranks = options
        .ranks
        .map(|count| count as usize)
        .and_then(NonZeroUsize::new);
    let ranks =
        cluster::describe(file.as_ref(), ranks, &cluster::probe_local()?).map_err(Usage::of)?;
    let tied = options.model.tied.into();
    let caches = options.model.kernels.into();
    let (wire_dtype, costs) = calibrated(&ranks, &options.model.kernels_label(), |wire_dtype| {
        files.shape(wire_dtype, caches, tied)
    });
    let question = Question {
        options: &options.model,
        cluster: file.as_ref(),
        ranks: &ranks,
        shape: &files.shape(wire_dtype, caches, tied),
        longest_context_tokens: files.longest_context_tokens(),
        wire_dtype,
        costs: costs.as_ref(),
    };
    if options.what_if {
        return print(&what_if(&question)?);
    }
    let plan = question.plan()?;
    print(&format!(
        "{}\n{}\n{}{}",
        plan::plan_table(&plan),
        plan::memory_table(&plan),
        plan::outlook(
            &plan,
            &plan.shape_of(question.shape),
            question.longest_context_tokens
        ),
        hosts_that_slow_down(&question, &plan)?
    ))
}

/// What a run from this host has measured of these ranks, and the dtype that it ran in; f32 and nothing if
/// there was none. What the hosts compute on is known from there only.
fn calibrated(
    ranks: &[RankDevice],
    asked: &str,
    shape: impl Fn(WireDtype) -> ModelShape,
) -> (WireDtype, Option<Costs>) {
    let runs = [
        ("gpu", WireDtype::Bf16),
        ("gpu", WireDtype::F16),
        ("gpu", WireDtype::F32),
        ("cpu", WireDtype::F32),
    ];
    let found = runs.into_iter().find_map(|(device, wire_dtype)| {
        let seat = |rank: &RankDevice| Seat {
            host: rank.profile.hostname.clone(),
            device: Seat::device_label(device, asked),
        };
        let seats: Vec<Seat> = ranks.iter().map(seat).collect();
        let costs = CostStore::of(&shape(wire_dtype), wire_dtype)?.find(&seats)?;
        Some((wire_dtype, Some(costs)))
    });
    found.unwrap_or((WireDtype::F32, None))
}

/// The plans for the first device only, the first two, and so on.
fn what_if(question: &Question) -> Result<String> {
    let plans = (1..=question.ranks.len()).map(|ranks| {
        let kept: Vec<usize> = (0..ranks).collect();
        Ok((ranks, question.plan_of(&kept)?))
    });
    Ok(plan::what_if_table(&plans.collect::<Result<Vec<_>>>()?))
}

/// A line for each host without which one stream, or the full pipeline, were faster; hosts that are alike in
/// this share one. Empty if there is none.
fn hosts_that_slow_down(question: &Question, plan: &Plan) -> Result<String> {
    let hosts = cluster::ranks_by_host(question.ranks);
    if hosts.len() > MOST_HOSTS_TO_DOUBT {
        return Ok(String::new());
    }
    let mut without: Vec<(Vec<&str>, Gain, Plan)> = Vec::new();
    for (host, its_ranks) in &hosts {
        let all = 0..question.ranks.len();
        let kept: Vec<usize> = all.filter(|rank| !its_ranks.contains(rank)).collect();
        if kept.is_empty() {
            continue;
        }
        // Others that cannot hold the model alone are no alternative.
        let Ok(fewer) = question.plan_of(&kept)? else {
            continue;
        };
        let Some(gain) = plan::gain_of_fewer(plan, &fewer) else {
            continue;
        };
        let alike = without.iter_mut().find(|(_, other_gain, other)| {
            *other_gain == gain && other.layer_ranges() == fewer.layer_ranges()
        });
        match alike {
            Some((hosts, ..)) => hosts.push(host),
            None => without.push((vec![host], gain, fewer)),
        }
    }
    let lines = without.iter();
    Ok(lines
        .map(|(hosts, gain, fewer)| plan::without_line(hosts, *gain, fewer))
        .collect())
}

/// The model's directory, without a download: a plan is a question, not an order.
fn find_model(options: &PlanOptions, file: Option<&ClusterFile>) -> Result<PathBuf> {
    let model = planning::choose_model(
        options.model.model.clone(),
        file.and_then(|file| file.model_name.clone()),
        cli::model_of_environment(),
    )?;
    match hub::find(&model)? {
        Found::Directory(dir) | Found::Cached(dir) => Ok(dir),
        Found::NotCached(id) => bail!(
            "the model {id} is not in the Hugging Face cache of this host; a plan needs its config.json and \
             the headers of its weights"
        ),
    }
}

/// Converts a GGUF file.
///
/// # Errors
/// A file that cannot be read or expressed, or a directory that cannot be written.
pub fn import(gguf: &Path, out_dir: &Path) -> Result<()> {
    let summary = crate::import::import(gguf, out_dir)?;
    for warning in &summary.warnings {
        tell(&format!("mlx-pipe: {warning}\n"));
    }
    print(&format!(
        "{}: {} with {} layers, {} tensors, {:.3} GB\n",
        out_dir.display(),
        summary.architecture,
        summary.layers,
        summary.tensors,
        summary.bytes as f64 / 1e9
    ))
}

/// Writes to standard output. That its reader has seen enough, as with `| head`, is no error.
pub fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("writing to standard output"))
        }
        _ => Ok(()),
    }
}

/// Runs a command, on the first rank only if it was launched on several; tells its error. The exit status.
pub fn finish(command: impl FnOnce() -> Result<()>) -> ExitCode {
    if launcher::rank() != 0 {
        return ExitCode::SUCCESS;
    }
    match command() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&format!("mlx-pipe: {error:#}\n"));
            agree::exit_status(&error).into()
        }
    }
}
