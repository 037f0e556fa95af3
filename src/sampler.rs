//! Logits to a token, on the last rank. The same logits, parameters and position give the same token
//! on any number of ranks: random numbers are a function of (seed, position), not a stream with state.
//!
//! Order: repetition penalty, temperature, top-k, top-p, min-p, then one draw. Equal logits are
//! ordered by token id, so that no sort can decide.

use crate::wire::{SampleParams, SampledToken, Step};
use std::borrow::Cow;
use std::collections::HashMap;

/// Samples for a run: knows the tokens of every sequence in flight, which the penalty looks at.
#[derive(Debug, Default)]
pub struct Sampler {
    histories: HashMap<u32, Vec<u32>>,
}

impl Sampler {
    /// The tokens that answer a step. `logits`: one vector over the vocabulary for every sampled entry.
    /// Every step has to be shown, those that sample nothing too.
    pub fn sample_step(&mut self, step: &Step, logits: &[Vec<f32>]) -> Vec<SampledToken> {
        for slot in &step.release {
            self.histories.remove(slot);
        }
        for entry in &step.entries {
            let history = self.histories.entry(entry.slot).or_default();
            history.truncate(entry.start as usize);
            history.extend(&entry.tokens);
        }
        step.sampled()
            .zip(logits)
            .map(|((entry, params), logits)| sample(logits, params, &self.histories[&entry.slot]))
            .collect()
    }
}

/// Picks the token that follows `history` (prompt and answer so far; the penalty looks at all of it).
///
/// `logits`: one f32 for every token of the vocabulary, none of them NaN (the stage sees to that).
pub fn sample(logits: &[f32], params: &SampleParams, history: &[u32]) -> SampledToken {
    let penalized = penalize(logits, params.repetition_penalty, history);
    let token = if params.temperature == 0.0 {
        ranked(&penalized, 1).first().copied().unwrap_or(0)
    } else {
        let candidates = candidates(&penalized, params);
        draw(&candidates, uniform(params.seed, history.len() as u64))
    };
    let (logprob, top) = logprobs(logits, token, params.logprobs);
    SampledToken {
        token,
        logprob,
        top,
    }
}

/// The penalty of Keskar et al. 2019 (CTRL): tokens already seen lose, once each.
fn penalize<'a>(logits: &'a [f32], penalty: f32, history: &[u32]) -> Cow<'a, [f32]> {
    if penalty == 1.0 {
        return Cow::Borrowed(logits);
    }
    let mut logits = logits.to_vec();
    let mut seen = history.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = match *logit > 0.0 {
                true => *logit / penalty,
                false => *logit * penalty,
            };
        }
    }
    Cow::Owned(logits)
}

/// The `count` tokens of the largest logits, best first; equal logits by token id.
fn ranked(logits: &[f32], count: usize) -> Vec<u32> {
    let by_rank = |a: &u32, b: &u32| {
        let (x, y) = (logits[*a as usize], logits[*b as usize]);
        y.total_cmp(&x).then(a.cmp(b))
    };
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    if count < order.len() {
        order.select_nth_unstable_by(count, by_rank);
        order.truncate(count);
    }
    order.sort_unstable_by(by_rank);
    order
}

/// Tokens that may be drawn, most likely first, with weights relative to the best (which has 1).
fn candidates(logits: &[f32], params: &SampleParams) -> Vec<(u32, f64)> {
    let kept = match params.top_k as usize {
        0 => logits.len(),
        top_k => top_k,
    };
    let order = ranked(logits, kept);
    let largest = order.first().map_or(0.0, |&token| logits[token as usize]) as f64;
    let mut candidates: Vec<(u32, f64)> = order
        .into_iter()
        .map(|token| {
            let relative = (logits[token as usize] as f64 - largest) / params.temperature as f64;
            // The best weighs 1 even where infinite logits make the difference NaN.
            (
                token,
                if relative.is_nan() {
                    1.0
                } else {
                    relative.exp()
                },
            )
        })
        .collect();
    candidates.truncate(nucleus(&candidates, params.top_p as f64));
    candidates.retain(|(_, weight)| *weight >= params.min_p as f64);
    candidates
}

/// Length of the shortest head of `candidates` that holds the share `top_p` of the weight.
fn nucleus(candidates: &[(u32, f64)], top_p: f64) -> usize {
    if top_p >= 1.0 {
        return candidates.len();
    }
    let target = top_p * candidates.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    for (index, (_, weight)) in candidates.iter().enumerate() {
        sum += weight;
        if sum >= target {
            return index + 1;
        }
    }
    candidates.len()
}

/// The candidate at the share `at` (0 <= at < 1) of the total weight.
fn draw(candidates: &[(u32, f64)], at: f64) -> u32 {
    let target = at * candidates.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    for (token, weight) in candidates {
        sum += weight;
        if target < sum {
            return *token;
        }
    }
    // Rounding can leave the target at the very end.
    candidates.last().map_or(0, |(token, _)| *token)
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
/// `count` largest.
fn logprobs(logits: &[f32], token: u32, count: Option<u8>) -> (Option<f32>, Vec<(u32, f32)>) {
    let Some(count) = count else {
        return (None, Vec::new());
    };
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits
        .iter()
        .map(|&logit| (logit as f64 - largest).exp())
        .sum();
    let normalizer = largest + sum.ln();
    let logprob = |token: u32| (logits[token as usize] as f64 - normalizer) as f32;
    let top = ranked(logits, count as usize)
        .into_iter()
        .map(|id| (id, logprob(id)))
        .collect();
    (Some(logprob(token)), top)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WARM: SampleParams = SampleParams {
        temperature: 1.0,
        ..SampleParams::GREEDY
    };

    /// How often each token is drawn over many positions.
    fn frequencies(logits: &[f32], params: SampleParams) -> Vec<f64> {
        const DRAWS: u32 = 20_000;
        let mut counts = vec![0.0; logits.len()];
        let mut history = Vec::new();
        for position in 0..DRAWS {
            let token = sample(logits, &params, &history).token;
            counts[token as usize] += 1.0 / DRAWS as f64;
            history.clear();
            history.resize(position as usize % 997 + 1, 0);
        }
        counts
    }

    /// As [`frequencies`], by seeds instead of positions.
    fn frequencies_by_seed(logits: &[f32], params: SampleParams) -> Vec<f64> {
        const DRAWS: u64 = 20_000;
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..DRAWS {
            let token = sample(logits, &SampleParams { seed, ..params }, &[]).token;
            counts[token as usize] += 1.0 / DRAWS as f64;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_best_and_the_lower_id_of_equals() {
        let token = |logits: &[f32]| sample(logits, &SampleParams::GREEDY, &[]).token;
        assert_eq!(token(&[0.0, 3.0, 2.0]), 1);
        assert_eq!(token(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(token(&[f32::NEG_INFINITY, -1e30]), 1);
    }

    #[test]
    fn draws_follow_the_softmax_over_seeds_and_over_positions() {
        let logits = [0.0, 1.0, 2.0, -1.0];
        let sum: f64 = logits.iter().map(|&logit: &f32| (logit as f64).exp()).sum();
        for drawn in [
            frequencies(&logits, WARM),
            frequencies_by_seed(&logits, WARM),
        ] {
            for (logit, frequency) in logits.iter().zip(drawn) {
                let expected = (*logit as f64).exp() / sum;
                assert!(
                    (frequency - expected).abs() < 0.03,
                    "{frequency} for {expected}"
                );
            }
        }
    }

    #[test]
    fn two_draws_of_one_sequence_differ() {
        let logits = [0.0; 64];
        let tokens: Vec<u32> = (0..8)
            .map(|n| sample(&logits, &WARM, &vec![0; n]).token)
            .collect();
        let mut distinct = tokens.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert!(distinct.len() > 4, "{tokens:?}");
    }

    #[test]
    fn temperature_sharpens_and_flattens() {
        let at = |temperature| {
            frequencies_by_seed(
                &[0.0, 1.0],
                SampleParams {
                    temperature,
                    ..WARM
                },
            )[1]
        };
        assert!(at(0.1) > 0.99);
        assert!(at(100.0) < 0.53);
        assert!(at(f32::MIN_POSITIVE) > 0.9999);
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let logits = [3.0, 2.0, 1.0, 0.0];
        let drawn = |params| {
            let frequencies = frequencies_by_seed(&logits, params);
            frequencies
                .iter()
                .filter(|&&frequency| frequency > 0.0)
                .count()
        };
        assert_eq!(drawn(WARM), 4);
        assert_eq!(drawn(SampleParams { top_k: 2, ..WARM }), 2);
        assert_eq!(drawn(SampleParams { top_k: 9, ..WARM }), 4);
        // Shares are 0.644, 0.237, 0.087, 0.032.
        assert_eq!(drawn(SampleParams { top_p: 0.5, ..WARM }), 1);
        assert_eq!(drawn(SampleParams { top_p: 0.7, ..WARM }), 2);
        assert_eq!(drawn(SampleParams { top_p: 0.9, ..WARM }), 3);
        // Relative to the best: 1, 0.368, 0.135, 0.050.
        assert_eq!(drawn(SampleParams { min_p: 0.1, ..WARM }), 3);
        assert_eq!(drawn(SampleParams { min_p: 1.0, ..WARM }), 1);
    }

    #[test]
    fn the_penalty_moves_seen_tokens_down_whatever_their_sign() {
        let params = SampleParams {
            repetition_penalty: 2.0,
            ..SampleParams::GREEDY
        };
        assert_eq!(sample(&[3.0, 2.0], &params, &[]).token, 0);
        assert_eq!(sample(&[3.0, 2.0], &params, &[0, 0, 0]).token, 1);
        assert_eq!(sample(&[-1.0, -1.5], &params, &[0]).token, 1);
    }

    #[test]
    fn logprobs_are_of_the_untempered_softmax_without_penalty() {
        let params = SampleParams {
            temperature: 0.5,
            repetition_penalty: 5.0,
            logprobs: Some(2),
            ..SampleParams::GREEDY
        };
        let sampled = sample(&[0.0, 2.0f32.ln(), 0.0], &params, &[1]);
        let (token, logprob) = sampled.top[0];
        assert_eq!(token, 1);
        assert!((logprob - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(sampled.top[1].0, 0);
        let own = if sampled.token == 1 { 0.5f32 } else { 0.25 };
        assert!((sampled.logprob.unwrap() - own.ln()).abs() < 1e-6);
    }

    #[test]
    fn a_history_is_cut_back_with_its_sequence_and_dropped_on_release() {
        let entry = |start, tokens: &[u32]| crate::wire::Entry {
            slot: 3,
            start,
            tokens: tokens.to_vec(),
            sample: None,
        };
        let step = |release: &[u32], entry| Step {
            number: 0,
            release: release.to_vec(),
            entries: vec![entry],
            ..Step::default()
        };
        let mut sampler = Sampler::default();
        sampler.sample_step(&step(&[], entry(0, &[1, 2, 3])), &[]);
        sampler.sample_step(&step(&[], entry(1, &[7])), &[]);
        assert_eq!(sampler.histories[&3], [1, 7]);
        sampler.sample_step(&step(&[3], entry(0, &[4])), &[]);
        assert_eq!(sampler.histories[&3], [4]);
    }

    proptest! {
        #[test]
        fn any_logits_and_parameters_give_a_token_of_the_vocabulary(
            logits in prop::collection::vec(prop_oneof![
                -50.0f32..50.0, Just(f32::NEG_INFINITY), Just(f32::INFINITY), Just(f32::MAX), Just(0.0),
            ], 1..40),
            temperature in prop_oneof![Just(0.0f32), 1e-30f32..5.0],
            top_p in 0.0001f32..=1.0,
            top_k in 0u32..50,
            min_p in 0.0f32..=1.0,
            seed: u64,
            history in prop::collection::vec(0u32..50, 0..20),
        ) {
            let params = SampleParams {
                temperature, top_p, top_k, min_p, repetition_penalty: 1.3, seed, logprobs: Some(3),
            };
            let sampled = sample(&logits, &params, &history);
            prop_assert!((sampled.token as usize) < logits.len());
            prop_assert_eq!(sampled.top.len(), 3.min(logits.len()));
        }
    }
}
