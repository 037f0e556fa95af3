//! How much is under way at a time: what the user asked for, or what the plan has room for and its ranks are best
//! kept busy by.

use crate::cli::RunOptions;
use crate::meeting::Cluster;
use crate::model::{self, Caches};
use crate::plan::{Lookup, Plan};
use crate::schedule::{BLOCK_TOKENS, Forks, Limits, PromptRows};

/// Prompt tokens in a step where a rank computes on a CPU and times are unknown: enough for the weights to be read for
/// many tokens at once, few enough for steps to be short.
const CPU_CHUNK_TOKENS: usize = 64;
/// The same of GPUs, which need more tokens to be busy.
const GPU_CHUNK_TOKENS: usize = 512;

// The blocks that are counted are those that there are.
const _: () = assert!(BLOCK_TOKENS == model::OWN_CACHE_BLOCK_TOKENS);

/// The limits of a run.
pub fn limits(options: &RunOptions, cluster: &Cluster, plan: &Plan) -> Limits {
    let ranks = plan.stages.len();
    let max_batch = options.max_batch as usize;
    let steps_in_flight = options.steps_in_flight.map_or(ranks + 1, |n| n as usize);
    let sequences = max_batch.saturating_mul(steps_in_flight);
    let asked = options.model.max_sequences.unwrap_or(u64::MAX) as usize;
    let forks = match cluster.caches() {
        Caches::Own => Forks::Shared,
        Caches::Mlx => Forks::Copied {
            growth: model::MLX_CACHE_GROWTH_TOKENS.div_ceil(BLOCK_TOKENS),
        },
    };
    Limits {
        ranks,
        max_batch,
        step_tokens: prefill_chunk(options, cluster, plan),
        steps_in_flight,
        sequences: sequences.min(asked),
        kv_blocks: kv_blocks(plan, forks),
        forks,
        // One rank alone has the table anyway.
        rows: match plan.lookup {
            Lookup::OnLast if ranks > 1 => PromptRows::AskedFor,
            Lookup::OnLast | Lookup::OnFirst => PromptRows::Known,
        },
    }
}

/// Most prompt tokens in a step.
fn prefill_chunk(options: &RunOptions, cluster: &Cluster, plan: &Plan) -> usize {
    let by_device = || match cluster.ranks.iter().all(|place| place.device == "gpu") {
        true => GPU_CHUNK_TOKENS,
        false => CPU_CHUNK_TOKENS,
    };
    let asked = options.prefill_chunk.map(|tokens| tokens as usize);
    let predicted = || plan.best_prefill_chunk().map(|tokens| tokens as usize);
    asked.or_else(predicted).unwrap_or_else(by_device)
}

/// What the plan has memory for, at least one sequence of full length.
fn kv_blocks(plan: &Plan, forks: Forks) -> usize {
    let block_tokens = BLOCK_TOKENS as u64;
    let growth = match forks {
        Forks::Shared => 1,
        Forks::Copied { growth } => growth as u64,
    };
    let of_one = plan
        .context_tokens
        .div_ceil(block_tokens)
        .next_multiple_of(growth);
    let of_all = plan.context_tokens.saturating_mul(plan.sequences) / block_tokens;
    of_all.max(of_one).min(u32::MAX.into()) as usize
}
