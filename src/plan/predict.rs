//! Seconds out of a plan: time to the first token, tokens a second, idle shares, for any prompt.
//!
//! Separate because nothing is decided by these figures but where a tied table stands, and by that in
//! integers. Everything rests on [`DeviceCost`] and [`LinkCost`]; a plan whose devices or links are
//! unknown has no [`Predictor`].

use super::cost::scaled;
use super::{DeviceCost, LinkCost, Lookup, Plan, Stage, TimeSource};

/// Tokens of the prompt for which predictions are printed and tied tables decided.
pub const SAMPLE_PROMPT_TOKENS: u64 = 512;

/// What a message holds besides rows: length, step, entry, sampling parameters.
const HEADER_BYTES: u64 = 64;
/// A sampled token on its way back.
const TOKEN_BYTES: u64 = 16;
/// A token's id in the question for its row.
const ID_BYTES: u64 = 4;
/// Cached tokens that [`DeviceCost::context_ns`] is for.
const CONTEXT_UNIT_TOKENS: u128 = 1024;

/// How fast a plan is predicted to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// From a prompt's start to its first token, on an idle pipeline.
    pub time_to_first_token_s: f64,
    /// Prompt tokens over that time.
    pub prefill_tokens_per_s: f64,
    /// Tokens after the first, of one sequence alone.
    pub decode_tokens_per_s: f64,
    /// Tokens of all sequences together when every rank always has work.
    pub pipeline_tokens_per_s: f64,
    /// Share of all ranks' time without computing while one sequence decodes.
    pub idle_share_one: f64,
    /// The same of a full pipeline.
    pub idle_share_full: f64,
}

/// What one request of a run takes, or is predicted to take.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RequestTimes {
    /// From its start to its first token.
    pub first_token_s: f64,
    /// From there to its last token.
    pub decode_s: f64,
}

/// A plan with everything known that takes time.
#[derive(Debug)]
pub struct Predictor<'a> {
    parts: Vec<Part<'a>>,
    /// From each rank to the next.
    forward: &'a [LinkCost],
    /// From the last rank to the first; `None` for one rank, which needs no link.
    back: Option<LinkCost>,
    row_bytes: u64,
    lookup: Lookup,
}

/// One rank's part of a step.
#[derive(Debug)]
struct Part<'a> {
    cost: &'a DeviceCost,
    layers: u64,
    layers_bytes: u64,
    owns_head: bool,
}

/// Tokens of one sequence in one step.
#[derive(Clone, Copy)]
struct Chunk {
    tokens: u64,
    /// Tokens in the cache before it.
    position: u64,
    /// Whether a token is sampled after it.
    samples: bool,
}

impl Plan {
    /// What predicts this plan's times; `None` where costs or links are unknown.
    pub fn predictor(&self) -> Option<Predictor<'_>> {
        if self.times == TimeSource::Relative {
            return None;
        }
        let parts = self
            .stages
            .iter()
            .map(Part::of)
            .collect::<Option<Vec<_>>>()?;
        let (forward, back) = match (&self.links, parts.len()) {
            (_, 1) => (&[][..], None),
            (Some(links), _) => (&links.forward[..], Some(links.back)),
            (None, _) => return None,
        };
        Some(Predictor {
            parts,
            forward,
            back,
            row_bytes: self.hidden_row_bytes,
            lookup: self.lookup,
        })
    }

    /// How fast this plan is predicted to be with a prompt of so many tokens, taken in chunks of at most
    /// `prefill_chunk`; `None` where costs or links are unknown.
    pub fn predict(&self, prompt_tokens: u64, prefill_chunk: u64) -> Option<Prediction> {
        let predictor = self.predictor()?;
        let slowest_ns = self.slowest()?.ns()?;
        let first_token_s = seconds(predictor.first_token_ns(prompt_tokens, prefill_chunk));
        let decode_ns = predictor.decode_ns(prompt_tokens);
        let busy_ns = predictor.decode_busy_ns(prompt_tokens);
        let all_ranks_ns = decode_ns as f64 * self.stages.len() as f64;
        Some(Prediction {
            time_to_first_token_s: first_token_s,
            prefill_tokens_per_s: prompt_tokens as f64 / first_token_s,
            decode_tokens_per_s: per_second(decode_ns),
            pipeline_tokens_per_s: per_second(slowest_ns),
            idle_share_one: 1.0 - busy_ns as f64 / all_ranks_ns,
            idle_share_full: 1.0 - self.balance(),
        })
    }

    /// Tokens of the prompt that predictions are printed for: [`SAMPLE_PROMPT_TOKENS`], or the context if
    /// that is less.
    pub fn sample_prompt_tokens(&self) -> u64 {
        SAMPLE_PROMPT_TOKENS.min(self.context_tokens)
    }

    /// Predicts a run that answers the requests `(prompt tokens, sampled tokens)` one after the other;
    /// `None` where costs or links are unknown.
    pub fn predict_run(
        &self,
        requests: &[(u64, u64)],
        prefill_chunk: u64,
    ) -> Option<Vec<RequestTimes>> {
        let predictor = self.predictor()?;
        let times = |(prompt_tokens, sampled_tokens): &(u64, u64)| RequestTimes {
            first_token_s: seconds(predictor.first_token_ns(*prompt_tokens, prefill_chunk)),
            decode_s: seconds(predictor.continue_ns(*prompt_tokens, *sampled_tokens)),
        };
        Some(requests.iter().map(times).collect())
    }
}

impl Predictor<'_> {
    /// Nanoseconds from one sampled token to the next, of one sequence alone whose cache holds
    /// `context_tokens`.
    pub fn decode_ns(&self, context_tokens: u64) -> u64 {
        let forward = self.forward.iter().map(|link| link.ns(self.rows_bytes(1)));
        forward
            .chain([self.return_ns()])
            .fold(self.decode_busy_ns(context_tokens), u64::saturating_add)
    }

    /// Nanoseconds from the start of a prompt to its first token, on an idle pipeline. Its chunks follow
    /// each other without waiting, so that the ranks compute different ones at a time.
    pub fn first_token_ns(&self, prompt_tokens: u64, prefill_chunk: u64) -> u64 {
        let chunk_tokens = prefill_chunk.max(1);
        let chunk_count = prompt_tokens.max(1).div_ceil(chunk_tokens);
        // finish[rank]: when it is done with the chunk before.
        let mut finish = vec![0_u64; self.parts.len()];
        // The rows of later chunks come while earlier ones are computed.
        let start_ns = self.question_ns(prompt_tokens.min(chunk_tokens));
        for number in 0..chunk_count {
            let position = number * chunk_tokens;
            let chunk = Chunk {
                tokens: chunk_tokens
                    .min(prompt_tokens.saturating_sub(position))
                    .max(1),
                position,
                samples: number + 1 == chunk_count,
            };
            let mut arrival_ns = start_ns;
            for (rank, part) in self.parts.iter().enumerate() {
                let alone_ns = part.ns(chunk);
                let slot = number.saturating_add(rank as u64);
                let own_ns = match self.chunks_under_way(slot, chunk_count) {
                    0..=1 => alone_ns,
                    _ => part.cost.crowded(alone_ns),
                };
                finish[rank] = arrival_ns.max(finish[rank]).saturating_add(own_ns);
                let link = self.forward.get(rank);
                let link_ns = link.map_or(0, |link| link.ns(self.rows_bytes(chunk.tokens)));
                arrival_ns = finish[rank].saturating_add(link_ns);
            }
        }
        let last_ns = finish.last().copied().unwrap_or(0);
        last_ns.saturating_add(self.return_ns())
    }

    /// Chunks that ranks compute at the same time in `slot`, when each takes one slot a rank: fewer while
    /// the pipeline fills and empties.
    fn chunks_under_way(&self, slot: u64, chunk_count: u64) -> u64 {
        let ranks = self.parts.len() as u64;
        let until_end = chunk_count.saturating_add(ranks).saturating_sub(slot + 1);
        (slot + 1).min(until_end).min(chunk_count).min(ranks)
    }

    /// Nanoseconds of all tokens after the first.
    fn continue_ns(&self, prompt_tokens: u64, sampled_tokens: u64) -> u64 {
        let steps = sampled_tokens.saturating_sub(1);
        let Some(last) = steps.checked_sub(1) else {
            return 0;
        };
        // A step's time grows in proportion to the context, so the mean of first and last is the mean.
        let first_ns = self.decode_ns(prompt_tokens);
        let last_ns = self.decode_ns(prompt_tokens.saturating_add(last));
        let twice_ns = (u128::from(first_ns) + u128::from(last_ns)) * u128::from(steps);
        u64::try_from(twice_ns / 2).unwrap_or(u64::MAX)
    }

    /// Nanoseconds that the ranks compute for one token, one after the other.
    fn decode_busy_ns(&self, context_tokens: u64) -> u64 {
        let step = Chunk {
            tokens: 1,
            position: context_tokens,
            samples: true,
        };
        let parts = self.parts.iter().map(|part| part.ns(step));
        parts.fold(0, u64::saturating_add)
    }

    /// Where the last rank has the table, the first asks it for a prompt's rows before it begins.
    fn question_ns(&self, prompt_tokens: u64) -> u64 {
        match (self.back, self.lookup) {
            (Some(back), Lookup::OnLast) => {
                let ids_bytes = prompt_tokens.saturating_mul(ID_BYTES);
                let question_ns = back.ns(ids_bytes.saturating_add(HEADER_BYTES));
                question_ns.saturating_add(back.ns(self.rows_bytes(prompt_tokens)))
            }
            _ => 0,
        }
    }

    /// The sampled token's way back, with its row where the last rank looks it up.
    fn return_ns(&self) -> u64 {
        let row_bytes = match self.lookup {
            Lookup::OnLast => self.row_bytes,
            Lookup::OnFirst => 0,
        };
        self.back
            .map_or(0, |back| back.ns(row_bytes.saturating_add(TOKEN_BYTES)))
    }

    fn rows_bytes(&self, tokens: u64) -> u64 {
        self.row_bytes
            .saturating_mul(tokens)
            .saturating_add(HEADER_BYTES)
    }
}

impl<'a> Part<'a> {
    fn of(stage: &'a Stage) -> Option<Self> {
        Some(Self {
            cost: stage.device.cost.as_ref()?,
            layers: stage.layers.len() as u64,
            layers_bytes: stage.footprint.layers_bytes,
            owns_head: stage.role.owns_head(),
        })
    }

    /// Nanoseconds for a chunk, with the host to itself. Each of its tokens sees the cache before it.
    fn ns(&self, chunk: Chunk) -> u64 {
        let cost = self.cost;
        let layers_ns = scaled(
            cost.layer_ns(chunk.tokens),
            self.layers_bytes,
            cost.layer_bytes,
        );
        let head_ns = match self.owns_head && chunk.samples {
            true => cost.head_ns,
            false => 0,
        };
        [self.context_ns(chunk), head_ns, cost.step_ns]
            .into_iter()
            .fold(layers_ns, u64::saturating_add)
    }

    fn context_ns(&self, chunk: Chunk) -> u64 {
        let pairs = u128::from(chunk.tokens) * u128::from(chunk.position);
        let per_layer_ns = pairs.saturating_mul(self.cost.context_ns.into()) / CONTEXT_UNIT_TOKENS;
        let ns = per_layer_ns.saturating_mul(self.layers.into());
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn per_second(ns: u64) -> f64 {
    1e9 / ns.max(1) as f64
}

/// Whether `new_ns` is less than `old_ns` by so much that the speed grows by 5 % or more.
pub(super) fn clearly_faster(new_ns: u64, old_ns: u64) -> bool {
    u128::from(new_ns) * 105 <= u128::from(old_ns) * 100 && new_ns < old_ns
}

#[cfg(test)]
mod tests;
