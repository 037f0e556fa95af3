//! How much is under way at a time: what the user asked for, or what the plan has room for and its ranks are best
//! kept busy by.

use crate::cli::{KernelName, RunOptions};
use crate::meeting::{Cluster, Place};
use crate::plan::{Lookup, Plan};
use crate::schedule::{BLOCK_TOKENS, Limits};

/// Prompt tokens in a step where a rank computes on a CPU and times are unknown: enough for the weights to be read for
/// many tokens at once, few enough for steps to be short.
const CPU_CHUNK_TOKENS: usize = 64;
/// The same of GPUs, which need more tokens to be busy.
const GPU_CHUNK_TOKENS: usize = 512;

/// The limits of a run.
pub fn limits(options: &RunOptions, cluster: &Cluster, plan: &Plan) -> Limits {
    let ranks = plan.stages.len();
    let max_batch = options.max_batch as usize;
    let steps_in_flight = options.steps_in_flight.map_or(ranks + 1, |n| n as usize);
    let sequences = max_batch.saturating_mul(steps_in_flight);
    let asked = options.model.max_sequences.unwrap_or(u64::MAX) as usize;
    Limits {
        ranks,
        max_batch,
        step_tokens: prefill_chunk(options, cluster, plan),
        steps_in_flight,
        sequences: sequences.min(asked),
        kv_blocks: kv_blocks(plan),
        forks_are_copies: cluster
            .ranks
            .iter()
            .any(|place| !shares_blocks(options, place)),
        looks_up: ranks == 1 || plan.lookup == Lookup::OnFirst,
    }
}

/// Most prompt tokens in a step.
pub fn prefill_chunk(options: &RunOptions, cluster: &Cluster, plan: &Plan) -> usize {
    let by_device = || match cluster.ranks.iter().all(|place| place.device == "gpu") {
        true => GPU_CHUNK_TOKENS,
        false => CPU_CHUNK_TOKENS,
    };
    let asked = options.prefill_chunk.map(|tokens| tokens as usize);
    let predicted = || plan.best_prefill_chunk().map(|tokens| tokens as usize);
    asked.or_else(predicted).unwrap_or_else(by_device)
}

/// What the plan has memory for, at least one sequence of full length.
fn kv_blocks(plan: &Plan) -> usize {
    let of_one = plan.context_tokens.div_ceil(BLOCK_TOKENS as u64);
    let of_all = plan.context_tokens.saturating_mul(plan.sequences) / BLOCK_TOKENS as u64;
    usize::try_from(of_all.max(of_one))
        .unwrap_or(usize::MAX)
        .min(u32::MAX as usize)
}

/// This program's kernels share blocks of caches; MLX's have a copy for each sequence.
fn shares_blocks(options: &RunOptions, place: &Place) -> bool {
    place.device == "cpu" && options.model.kernels == KernelName::Own
}
