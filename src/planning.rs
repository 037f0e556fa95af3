//! From what the user asked for to a plan: the same steps for a run and for `mlx-pipe plan`, so that the
//! one shows what the other does.

use crate::agree::Usage;
use crate::cli::ModelOptions;
use crate::cluster::RankDevice;
use crate::model::ModelFiles;
use crate::plan::{self, Device, Plan, PlanRequest, WireDtype};
use anyhow::{Result, anyhow};

/// Sequences in flight.
const SEQUENCES: u64 = 1;
/// Context where neither the user nor the model says less, tokens.
const DEFAULT_CONTEXT_TOKENS: u64 = 4096;

/// The model's name: as asked for, else as the cluster file has it, else as the environment does.
///
/// # Errors
/// None of them names one.
pub fn choose_model(
    asked: Option<String>,
    in_cluster_file: Option<String>,
    in_environment: Option<String>,
) -> Result<String> {
    asked.or(in_cluster_file).or(in_environment).ok_or_else(|| {
        Usage::of(anyhow!(
            "no model given; use --model DIR_OR_ID, a cluster file with `model_name`, or MLX_PIPE_MODEL"
        ))
    })
}

/// The plan for these ranks.
///
/// # Errors
/// Options that cannot be met, or nothing that fits.
pub fn make_plan(
    options: &ModelOptions,
    ranks: &[RankDevice],
    files: &ModelFiles,
    wire_dtype: WireDtype,
) -> Result<Plan> {
    let devices: Vec<Device> = ranks
        .iter()
        .map(|rank| rank.plan_device(options.memory_limit))
        .collect();
    let request = PlanRequest {
        shape: &files.shape(wire_dtype, options.tied.into()),
        devices: &devices,
        strategy: options.strategy(),
        context_tokens: context_tokens(options.context, files)?,
        sequences: SEQUENCES,
        wire_dtype,
    };
    plan::plan(&request).map_err(|error| match error.is_usage() {
        true => Usage::of(error),
        false => error.into(),
    })
}

/// The context asked for, at most the model's.
fn context_tokens(asked: Option<u64>, files: &ModelFiles) -> Result<u64> {
    let longest = files.architecture.family.context_tokens as u64;
    match asked {
        None => Ok(longest.min(DEFAULT_CONTEXT_TOKENS)),
        Some(asked) if asked <= longest => Ok(asked),
        Some(asked) => Err(Usage::of(anyhow!(
            "--context {asked} is more than the {longest} tokens that the model was made for"
        ))),
    }
}
