//! Logits to a token, on the last rank. The same logits, parameters and position give the same token
//! on any number of ranks: random numbers are a function of (seed, position), not a stream with state.
//!
//! Order: repetition penalty, bias with presence and frequency penalty, temperature, top-k, top-p, min-p, then one
//! draw. Equal logits are ordered by token id, so that no sort can decide.
//!
//! All ranks wait for this, so the logits are sorted only as far down as the draw looks, and never
//! copied as a whole. Float operations have a fixed order: weights are added best first, but those of
//! the whole vocabulary as `Penalized::total` says.

use crate::wire::{SampleParams, SampledToken, Step, Upkeep};
use std::collections::{BTreeMap, HashMap};
use std::f64::consts::LOG2_E;

/// Tokens read at a time: 4 KiB of logits, which stay in the first-level cache.
const BLOCK: usize = 1024;
/// Tokens that selection passes over together if even the best of them is too bad.
const CHUNK: usize = 64;
/// Partial sums of a total; as many f64 as the widest vectors hold.
const LANES: usize = 8;
/// Tokens ranked first, of which a draw rarely needs more; each further batch is larger by `GROWTH`.
const BATCH: usize = 256;
const GROWTH: usize = 8;

/// What is known of the token that comes next.
#[derive(Debug, Clone, PartialEq)]
pub enum Scores {
    /// A logit for every token of the vocabulary.
    All(Vec<f32>),
    /// The token of the largest logit, the lowest of equals; of which it is enough to know for
    /// [`SampleParams::takes_the_best`]. `None` if a logit is not a number.
    Best(Option<u32>),
}

/// Samples for a run: knows the tokens of every sequence in flight, which the penalty looks at.
#[derive(Debug, Default)]
pub struct Sampler {
    histories: HashMap<u32, Vec<u32>>,
}

impl Sampler {
    /// The tokens that answer a step. `scores`: one for every sampled entry, none of which is not a number (the stage
    /// sees to that). Every step has to be shown, those that sample nothing too.
    pub fn sample_step(&mut self, step: &Step, scores: &[Scores]) -> Vec<SampledToken> {
        for &upkeep in &step.upkeep {
            match upkeep {
                Upkeep::Fork(fork) => self.fork(fork.from, fork.to, fork.tokens as usize),
                Upkeep::Release(slot) => {
                    self.histories.remove(&slot);
                }
            }
        }
        for entry in &step.entries {
            let history = self.histories.entry(entry.slot).or_default();
            history.truncate(entry.start as usize);
            history.extend(&entry.tokens);
        }
        step.sampled()
            .zip(scores)
            .map(|((entry, params), scores)| match scores {
                Scores::All(logits) => sample(logits, params, &self.histories[&entry.slot]),
                Scores::Best(token) => SampledToken {
                    token: token.unwrap_or(0),
                    logprob: None,
                    top: Vec::new(),
                },
            })
            .collect()
    }

    /// Slot `to` holds a sequence that begins as the first `tokens` tokens of the one in `from`, which
    /// stays as it is. What `to` held is forgotten.
    ///
    /// # Panics
    /// If `from` has fewer tokens, or is `to`.
    fn fork(&mut self, from: u32, to: u32, tokens: usize) {
        assert_ne!(from, to, "a sequence is forked into its own slot");
        let history = self.histories.get(&from).map_or(&[][..], Vec::as_slice);
        assert!(
            tokens <= history.len(),
            "{tokens} tokens forked from slot {from}, which has {}",
            history.len()
        );
        let history = history[..tokens].to_vec();
        self.histories.insert(to, history);
    }
}

/// Picks the token that follows `history` (prompt and answer so far; the repetition penalty looks at all of it, those
/// for presence and frequency at the answer).
///
/// `logits`: one f32 for every token of the vocabulary, none of them NaN (the stage sees to that).
pub fn sample(logits: &[f32], params: &SampleParams, history: &[u32]) -> SampledToken {
    let penalized = Penalized::new(logits, params, history);
    let token = if params.temperature == 0.0 {
        penalized.best().map_or(0, |(token, _)| token)
    } else {
        drawn(
            &penalized,
            params,
            uniform(params.seed, history.len() as u64),
        )
    };
    let (logprob, top) = logprobs(logits, token, params.logprobs);
    SampledToken {
        token,
        logprob,
        top,
    }
}

/// Logits under the penalty of Keskar et al. 2019 (CTRL): tokens already seen lose, once each. And under the biases and
/// the penalties of OpenAI's API, which are added.
struct Penalized<'a> {
    logits: &'a [f32],
    penalty: f32,
    /// A bit for every token, set where it was seen; empty where there is no penalty.
    seen: Vec<[u64; BLOCK / 64]>,
    /// What is added to the logits of these tokens, which are in order.
    added: Vec<(u32, f32)>,
}

impl<'a> Penalized<'a> {
    fn new(logits: &'a [f32], params: &SampleParams, history: &[u32]) -> Self {
        let penalty = params.repetition_penalty;
        let mut seen = Vec::new();
        if penalty != 1.0 {
            seen.resize(logits.len().div_ceil(BLOCK), [0; BLOCK / 64]);
            for token in history.iter().map(|&token| token as usize) {
                if token < logits.len() {
                    seen[token / BLOCK][token % BLOCK / 64] |= 1 << (token % 64);
                }
            }
        }
        Self {
            logits,
            penalty,
            seen,
            added: added(params, history),
        }
    }

    fn unpenalized(logits: &'a [f32]) -> Self {
        Self {
            logits,
            penalty: 1.0,
            seen: Vec::new(),
            added: Vec::new(),
        }
    }

    /// Shows all logits in the order of their tokens, `BLOCK` at a time, with the first one's token.
    fn for_each_block(&self, mut visit: impl FnMut(u32, &[f32])) {
        let mut buffer = [0.0; BLOCK];
        let mut added = self.added.as_slice();
        for (index, mut block) in self.logits.chunks(BLOCK).enumerate() {
            let first = index * BLOCK;
            let end = added.partition_point(|&(token, _)| (token as usize) < first + block.len());
            let (here, later) = added.split_at(end);
            added = later;
            let seen = self
                .seen
                .get(index)
                .filter(|seen| **seen != [0; BLOCK / 64]);
            if seen.is_some() || !here.is_empty() {
                let copy = &mut buffer[..block.len()];
                copy.copy_from_slice(block);
                if let Some(seen) = seen {
                    penalize(copy, seen, self.penalty);
                }
                for &(token, bias) in here {
                    copy[token as usize - first] += bias;
                }
                block = copy;
            }
            visit(first as u32, block);
        }
    }

    /// The token of the largest logit, the lowest of equals, and the logit.
    fn best(&self) -> Option<(u32, f32)> {
        let mut best = None;
        self.for_each_block(|first, block| {
            let largest = largest(block);
            if best.is_none_or(|(_, other)| largest > other) {
                let mut orders = block.iter().map(|&logit| order(logit));
                let index = orders.position(|order| order == largest);
                best = index.map(|index| (first + index as u32, largest));
            }
        });
        best.map(|(token, order)| (token, from_order(order)))
    }

    /// All tokens and their logits, best first, equal ones by token id. Sorted in batches, the first of
    /// which has `count` tokens, as they are asked for.
    fn ranked(&self, mut count: usize) -> impl Iterator<Item = (u32, f32)> {
        let mut from = i64::MIN;
        std::iter::from_fn(move || {
            let batch = self.best_places(from, count);
            from = batch.last()? + 1;
            count = count.saturating_mul(GROWTH);
            Some(batch)
        })
        .flatten()
        .map(|place| (place as u32, from_order(!((place >> 32) as i32))))
    }

    /// The `count` first [`place`]s that are not before `from`, in order.
    fn best_places(&self, from: i64, count: usize) -> Vec<i64> {
        let room = count.saturating_mul(2);
        let mut kept = Vec::with_capacity(room.min(self.logits.len()));
        let mut end = i64::MAX;
        self.for_each_block(|first, block| {
            for (chunk, first) in block.chunks(CHUNK).zip((first..).step_by(CHUNK)) {
                if place(largest(chunk), 0) >= end {
                    continue;
                }
                for (&logit, token) in chunk.iter().zip(first..) {
                    let place = place(order(logit), token);
                    if from <= place && place < end {
                        kept.push(place);
                        if kept.len() == room {
                            end = keep_first(&mut kept, count);
                        }
                    }
                }
            }
        });
        if kept.len() > count {
            keep_first(&mut kept, count);
        }
        kept.sort_unstable();
        kept
    }

    /// Sum of all weights: `LANES` partial sums, each of the tokens whose id leaves the same remainder,
    /// in the order of the ids; then the partial sums from first to last.
    fn total(&self, weights: Weights) -> f64 {
        let mut lanes = [0.0; LANES];
        self.for_each_block(|_, block| lanes = weights.add(lanes, block));
        lanes.iter().sum()
    }
}

/// What is added to logits: the bias, less the penalties of the tokens that the answer has. In the order of tokens.
fn added(params: &SampleParams, history: &[u32]) -> Vec<(u32, f32)> {
    let (presence, frequency) = (params.presence_penalty, params.frequency_penalty);
    if presence == 0.0 && frequency == 0.0 {
        return params.logit_bias.clone();
    }
    let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
    let answer = history.get(params.prompt_tokens as usize..);
    for &token in answer.unwrap_or_default() {
        *counts.entry(token).or_default() += 1;
    }
    let mut added: BTreeMap<u32, f32> = params.logit_bias.iter().copied().collect();
    for (token, count) in counts {
        *added.entry(token).or_default() -= presence + frequency * count as f32;
    }
    added.into_iter().collect()
}

fn penalize(block: &mut [f32], seen: &[u64; BLOCK / 64], penalty: f32) {
    for (logits, mut bits) in block.chunks_mut(64).zip(seen.iter().copied()) {
        while bits != 0 {
            let logit = &mut logits[bits.trailing_zeros() as usize];
            *logit = match *logit > 0.0 {
                true => *logit / penalty,
                false => *logit * penalty,
            };
            bits &= bits - 1;
        }
    }
}

/// A number that is larger for the larger logit, as [`f32::total_cmp`] has it. Integers, because their
/// maximum becomes vector instructions.
fn order(logit: f32) -> i32 {
    flip_magnitude_of_negatives(logit.to_bits() as i32)
}

fn from_order(order: i32) -> f32 {
    f32::from_bits(flip_magnitude_of_negatives(order) as u32)
}

fn flip_magnitude_of_negatives(bits: i32) -> i32 {
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

fn largest(logits: &[f32]) -> i32 {
    let orders = logits.iter().map(|&logit| order(logit));
    orders.fold(i32::MIN, i32::max)
}

/// Where a token stands in the ranking: smaller for the larger logit, then for the lower id.
fn place(order: i32, token: u32) -> i64 {
    (i64::from(!order) << 32) | i64::from(token)
}

/// Keeps the `count` first of more places, in any order, and returns the one that follows them.
fn keep_first(places: &mut Vec<i64>, count: usize) -> i64 {
    let (_, &mut next, _) = places.select_nth_unstable(count);
    places.truncate(count);
    next
}

/// Probabilities at a temperature, relative to that of the largest logit.
#[derive(Clone, Copy)]
struct Weights {
    largest: f64,
    inverse_temperature: f64,
}

impl Weights {
    fn new(largest: f32, temperature: f32) -> Self {
        Self {
            largest: largest as f64,
            inverse_temperature: 1.0 / temperature as f64,
        }
    }

    fn of(self, logit: f32) -> f64 {
        let relative = (logit as f64 - self.largest) * self.inverse_temperature;
        // The best weighs 1 even where infinite logits make the difference NaN.
        exp(if relative < 0.0 { relative } else { 0.0 })
    }

    /// Adds each logit's weight to the next lane. The lanes go in and out by value, so that they stay
    /// in registers.
    fn add(self, mut lanes: [f64; LANES], logits: &[f32]) -> [f64; LANES] {
        let (rows, rest) = logits.as_chunks::<LANES>();
        for row in rows {
            lanes = std::array::from_fn(|lane| lanes[lane] + self.of(row[lane]));
        }
        for (lane, &logit) in lanes.iter_mut().zip(rest) {
            *lane += self.of(logit);
        }
        lanes
    }
}

/// e^x for x <= 0 with a relative error of 1e-14, 0 below -708. Not [`f64::exp`], which may round
/// otherwise on another platform, and does not become vector instructions.
///
/// As usual, x = n ln 2 + r with an integer n: a Taylor series of r, times 2^n by way of the exponent's
/// bits. ln 2 is in two parts, the high one short enough for n times it to be exact (Cody & Waite 1980).
fn exp(x: f64) -> f64 {
    const LN_2_HIGH: f64 = f64::from_bits(0x3FE6_2E42_FEE0_0000);
    const LN_2_LOW: f64 = f64::from_bits(0x3DEA_39EF_3579_3C76);
    // Added to a number, leaves it no bits behind the point: the integer stands in the lowest.
    const TO_INTEGER: f64 = 1.5 * (1u64 << 52) as f64;
    let shifted = x * LOG2_E + TO_INTEGER;
    let n = shifted - TO_INTEGER;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let scaled = f64::from_bits(series(r).to_bits().wrapping_add(shifted.to_bits() << 52));
    if x < -708.0 { 0.0 } else { scaled }
}

/// The sum of r^k / k! for k up to 11: for |r| <= ln 2 / 2 the rest is below 1e-14. In pairs (Estrin's
/// scheme), because a chain of 11 multiplications would have to wait for each.
fn series(r: f64) -> f64 {
    let (r2, r4) = (r * r, (r * r) * (r * r));
    let head = (1.0 + r) + (1.0 / 2.0 + r * (1.0 / 6.0)) * r2;
    let middle = (1.0 / 24.0 + r * (1.0 / 120.0)) + (1.0 / 720.0 + r * (1.0 / 5_040.0)) * r2;
    let tail = (1.0 / 40_320.0 + r * (1.0 / 362_880.0))
        + (1.0 / 3_628_800.0 + r * (1.0 / 39_916_800.0)) * r2;
    (head + middle * r4) + tail * (r4 * r4)
}

/// The token at the share `at` (0 <= at < 1) of the weight of those that top-k, top-p and min-p leave.
fn drawn(logits: &Penalized, params: &SampleParams, at: f64) -> u32 {
    let (top_p, min_p) = (params.top_p as f64, params.min_p as f64);
    let top_k =
        Some(params.top_k as usize).filter(|top_k| (1..logits.logits.len()).contains(top_k));
    let mut ranked = logits.ranked(top_k.unwrap_or(BATCH)).peekable();
    let Some(&(_, largest)) = ranked.peek() else {
        return 0;
    };
    let weights = Weights::new(largest, params.temperature);
    let weighted = ranked
        .map(|(token, logit)| (token, weights.of(logit)))
        .take_while(|(_, weight)| *weight > 0.0);
    let mut candidates: Vec<(u32, f64)>;
    if let Some(top_k) = top_k {
        candidates = weighted.take(top_k).collect();
        if top_p < 1.0 {
            let target = top_p * sum(&candidates);
            candidates = nucleus(candidates.into_iter(), target);
        }
    } else if top_p < 1.0 {
        candidates = nucleus(weighted, top_p * logits.total(weights));
    } else if min_p > 0.0 {
        candidates = weighted
            .take_while(|(_, weight)| *weight >= min_p)
            .collect();
    } else {
        return draw(weighted, at * logits.total(weights));
    }
    candidates.retain(|(_, weight)| *weight >= min_p);
    let target = at * sum(&candidates);
    draw(candidates.into_iter(), target)
}

fn sum(candidates: &[(u32, f64)]) -> f64 {
    candidates.iter().map(|(_, weight)| weight).sum()
}

/// The shortest head of `candidates` that weighs `target`; all if none does.
fn nucleus(candidates: impl Iterator<Item = (u32, f64)>, target: f64) -> Vec<(u32, f64)> {
    let mut sum = 0.0;
    let mut head = Vec::new();
    for (token, weight) in candidates {
        sum += weight;
        head.push((token, weight));
        if sum >= target {
            break;
        }
    }
    head
}

/// The first candidate with which the weights sum to more than `target`. Rounding can leave the target
/// at the very end: then the last.
fn draw(candidates: impl Iterator<Item = (u32, f64)>, target: f64) -> u32 {
    let (mut sum, mut drawn) = (0.0, 0);
    for (token, weight) in candidates {
        (sum, drawn) = (sum + weight, token);
        if target < sum {
            break;
        }
    }
    drawn
}

/// A number in [0, 1) that is a function of its arguments alone: two rounds of SplitMix64's finaliser
/// (Steele et al. 2014), 53 bits.
fn uniform(seed: u64, position: u64) -> f64 {
    let bits = mix(mix(seed) ^ position.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// A bijection of 64-bit numbers that scatters neighbours; also derives seeds from seeds.
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// Natural logarithms of the softmax of the logits as the model gave them: the token's own, and the
/// `count` largest. NaN where infinite logits leave no softmax.
fn logprobs(logits: &[f32], token: u32, count: Option<u8>) -> (Option<f32>, Vec<(u32, f32)>) {
    let Some(count) = count else {
        return (None, Vec::new());
    };
    let unpenalized = Penalized::unpenalized(logits);
    let normalizer = match unpenalized.best() {
        Some((_, largest)) if largest.is_finite() => {
            largest as f64 + unpenalized.total(Weights::new(largest, 1.0)).ln()
        }
        _ => f64::NAN,
    };
    let logprob = |logit: f32| (logit as f64 - normalizer) as f32;
    let ranked = unpenalized.ranked(count as usize).take(count as usize);
    let top = ranked.map(|(id, logit)| (id, logprob(logit))).collect();
    (Some(logprob(logits[token as usize])), top)
}

#[cfg(test)]
mod tests;
