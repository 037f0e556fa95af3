//! Fast sampling against a plain twin that sorts everything, and what is promised of random numbers.

use super::*;
use proptest::prelude::*;

/// The softmax as it is.
fn warm() -> SampleParams {
    SampleParams {
        temperature: 1.0,
        ..SampleParams::GREEDY
    }
}

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
    let mut params = params;
    for seed in 0..DRAWS {
        params.seed = seed;
        let token = sample(logits, &params, &[]).token;
        counts[token as usize] += 1.0 / DRAWS as f64;
    }
    counts
}

/// The plain twin of all that is fast above: sorts everything, copies everything, adds best first.
mod plain {
    use super::SampleParams;

    pub fn add(mut logits: Vec<f32>, params: &SampleParams, history: &[u32]) -> Vec<f32> {
        let answer = history
            .get(params.prompt_tokens as usize..)
            .unwrap_or_default();
        for (id, logit) in logits.iter_mut().enumerate() {
            let bias = params
                .logit_bias
                .iter()
                .find(|(other, _)| *other as usize == id);
            let count = answer.iter().filter(|&&other| other as usize == id).count();
            let penalty = params.presence_penalty + params.frequency_penalty * count as f32;
            let is_off = params.presence_penalty == 0.0 && params.frequency_penalty == 0.0;
            // Adding nothing is not adding 0, which makes 0 of -0.
            match (bias, count > 0 && !is_off) {
                (None, false) => {}
                (Some((_, bias)), false) => *logit += bias,
                (None, true) => *logit += 0.0 - penalty,
                (Some((_, bias)), true) => *logit += bias - penalty,
            }
        }
        logits
    }

    pub fn penalize(logits: &[f32], penalty: f32, history: &[u32]) -> Vec<f32> {
        let seen = |token: usize| history.contains(&(token as u32));
        let penalized = |(token, &logit): (usize, &f32)| match (seen(token), logit > 0.0) {
            (false, _) => logit,
            (true, true) => logit / penalty,
            (true, false) => logit * penalty,
        };
        logits.iter().enumerate().map(penalized).collect()
    }

    pub fn ranked(logits: &[f32]) -> Vec<u32> {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        order
    }

    /// Tokens that may be drawn, most likely first, with their shares of the weight.
    pub fn shares(
        logits: &[f32],
        params: &SampleParams,
        top_p: f64,
        min_p: f64,
    ) -> Vec<(u32, f64)> {
        let order = ranked(logits);
        let largest = logits[order[0] as usize] as f64;
        let weight = |token: u32| {
            let relative = (logits[token as usize] as f64 - largest) / params.temperature as f64;
            if relative.is_nan() {
                1.0
            } else {
                relative.exp()
            }
        };
        let mut kept: Vec<_> = order.iter().map(|&token| (token, weight(token))).collect();
        if params.top_k > 0 {
            kept.truncate(params.top_k as usize);
        }
        if params.top_p < 1.0 {
            let target = top_p * kept.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut sum = 0.0;
            let reached = kept.iter().position(|(_, weight)| {
                sum += weight;
                sum >= target
            });
            kept.truncate(reached.map_or(kept.len(), |index| index + 1));
        }
        kept.retain(|(_, weight)| *weight >= min_p);
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        kept.iter_mut().for_each(|(_, weight)| *weight /= total);
        kept
    }

    pub fn draw(shares: &[(u32, f64)], at: f64) -> u32 {
        let mut sum = 0.0;
        let drawn = shares.iter().find(|(_, share)| {
            sum += share;
            at < sum
        });
        drawn.or(shares.last()).map_or(0, |(token, _)| *token)
    }

    /// Whether `token` is drawn if `at` moves by at most 1e-9.
    pub fn may_draw(shares: &[(u32, f64)], at: f64, token: u32) -> bool {
        let mut end = 0.0;
        shares.iter().any(|&(other, share)| {
            let begin = end;
            end += share;
            other == token && begin - 1e-9 <= at && at <= end + 1e-9
        })
    }

    pub fn logprobs(logits: &[f32]) -> Vec<f32> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let exps = logits.iter().map(|&logit| (logit as f64 - largest).exp());
        let normalizer = largest + exps.sum::<f64>().ln();
        let logprob = |&logit: &f32| (logit as f64 - normalizer) as f32;
        logits.iter().map(logprob).collect()
    }
}

/// Random logits: of `levels` values if not 0, which makes many equal; with infinities among them
/// where `infinite` says so.
fn logits(count: usize, seed: u64, spread: f32, levels: u32, infinite: [bool; 2]) -> Vec<f32> {
    let logit = |id| {
        let number = |salt| uniform(seed ^ salt, id) as f32;
        // A sum of uniform numbers has a tail, as logits do.
        let level = (number(1) + number(2) + number(3) - 1.5) * 2.0;
        match (number(4) < 0.1, number(5) < 0.05) {
            (true, _) if infinite[0] => f32::NEG_INFINITY,
            (_, true) if infinite[1] => f32::INFINITY,
            _ if levels > 0 => spread * (level * levels as f32).round() / levels as f32,
            _ => spread * level,
        }
    };
    (0..count as u64).map(logit).collect()
}

#[test]
fn greedy_takes_the_best_and_the_lower_id_of_equals() {
    let token = |logits: &[f32]| sample(logits, &SampleParams::GREEDY, &[]).token;
    assert_eq!(token(&[0.0, 3.0, 2.0]), 1);
    assert_eq!(token(&[1.0, 3.0, 3.0]), 1);
    assert_eq!(token(&[f32::NEG_INFINITY, -1e30]), 1);
}

#[test]
fn greedy_orders_zeros_infinities_and_nans_as_a_sort_does() {
    const ODD: [f32; 8] = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        -f32::NAN,
    ];
    let penalized = SampleParams {
        repetition_penalty: 1.5,
        ..SampleParams::GREEDY
    };
    for index in 0..ODD.len().pow(3) {
        let mut logits = vec![-f32::NAN; 2 * BLOCK + 3];
        for (token, digit) in [(5, 1), (BLOCK + 7, 8), (2 * BLOCK + 2, 64)] {
            logits[token] = ODD[index / digit % 8];
        }
        for (params, history) in [(&SampleParams::GREEDY, [0, 0]), (&penalized, [5, 4])] {
            let sorted = plain::ranked(&plain::penalize(
                &logits,
                params.repetition_penalty,
                &history,
            ));
            assert_eq!(sample(&logits, params, &history).token, sorted[0]);
        }
    }
}

#[test]
fn the_ranking_is_that_of_a_sort_across_all_batches() {
    for (count, levels) in [(0, 0), (1, 0), (700, 3), (5000, 0), (5000, 1), (20_000, 50)] {
        let logits = logits(count, 9, 5.0, levels, [true, true]);
        for first_batch in [1, 7, BATCH] {
            let unpenalized = Penalized::unpenalized(&logits);
            let ranked: Vec<u32> = unpenalized.ranked(first_batch).map(|(id, _)| id).collect();
            assert_eq!(ranked, plain::ranked(&logits));
        }
    }
}

#[test]
fn exp_is_that_of_the_standard_library_to_1e14() {
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-708.1), 0.0);
    assert_eq!(exp(-1e300), 0.0);
    assert_eq!(exp(f64::NEG_INFINITY), 0.0);
    for step in 0..=708_000 {
        let x = -f64::from(step) / 1000.0;
        let error = exp(x) / x.exp() - 1.0;
        assert!(error.abs() < 1e-14, "{error} at {x}");
    }
}

#[test]
fn a_token_without_weight_is_never_drawn() {
    let mut logits = vec![f32::NEG_INFINITY; 3000];
    logits[17] = 0.1;
    logits[2900] = 0.0;
    let last = 1.0 - f64::EPSILON / 2.0;
    for top_p in [1.0, 1.0f32.next_down()] {
        let params = SampleParams { top_p, ..warm() };
        let token = drawn(&Penalized::unpenalized(&logits), &params, last);
        assert_eq!(token, 2900);
        // Nor where the target lies beyond all weight, as rounding can have it.
        let token = drawn(&Penalized::unpenalized(&logits), &params, 1.1);
        assert_eq!(token, 2900);
    }
}

#[test]
fn draws_follow_the_softmax_over_seeds_and_over_positions() {
    let logits = [0.0, 1.0, 2.0, -1.0];
    let sum: f64 = logits.iter().map(|&logit: &f32| (logit as f64).exp()).sum();
    for drawn in [
        frequencies(&logits, warm()),
        frequencies_by_seed(&logits, warm()),
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
        .map(|n| sample(&logits, &warm(), &vec![0; n]).token)
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
                ..warm()
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
    assert_eq!(drawn(warm()), 4);
    assert_eq!(drawn(SampleParams { top_k: 2, ..warm() }), 2);
    assert_eq!(drawn(SampleParams { top_k: 9, ..warm() }), 4);
    // Shares are 0.644, 0.237, 0.087, 0.032.
    assert_eq!(
        drawn(SampleParams {
            top_p: 0.5,
            ..warm()
        }),
        1
    );
    assert_eq!(
        drawn(SampleParams {
            top_p: 0.7,
            ..warm()
        }),
        2
    );
    assert_eq!(
        drawn(SampleParams {
            top_p: 0.9,
            ..warm()
        }),
        3
    );
    // Relative to the best: 1, 0.368, 0.135, 0.050.
    assert_eq!(
        drawn(SampleParams {
            min_p: 0.1,
            ..warm()
        }),
        3
    );
    assert_eq!(
        drawn(SampleParams {
            min_p: 1.0,
            ..warm()
        }),
        1
    );
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
        upkeep: release.iter().copied().map(Upkeep::Release).collect(),
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

/// A sampler that knows `tokens` in slot 3.
fn sampler_of(tokens: &[u32]) -> Sampler {
    let entry = crate::wire::Entry {
        slot: 3,
        start: 0,
        tokens: tokens.to_vec(),
        sample: None,
    };
    let mut sampler = Sampler::default();
    let entries = vec![entry];
    sampler.sample_step(
        &Step {
            entries,
            ..Step::default()
        },
        &[],
    );
    sampler
}

#[test]
fn a_fork_begins_as_its_origin_which_stays_whole() {
    for tokens in 0..=3 {
        let mut sampler = sampler_of(&[1, 2, 3]);
        sampler.histories.insert(5, vec![9; 9]);
        sampler.fork(3, 5, tokens);
        assert_eq!(sampler.histories[&5], [1, 2, 3][..tokens]);
        assert_eq!(sampler.histories[&3], [1, 2, 3]);
    }
    let mut sampler = sampler_of(&[1, 2, 3]);
    sampler.fork(3, 5, 2);
    sampler.fork(5, 6, 1);
    sampler.sample_step(
        &Step {
            upkeep: vec![Upkeep::Release(3)],
            ..Step::default()
        },
        &[],
    );
    assert_eq!(sampler.histories[&5], [1, 2]);
    assert_eq!(sampler.histories[&6], [1]);
}

#[test]
#[should_panic(expected = "4 tokens forked from slot 3, which has 3")]
fn a_fork_of_more_tokens_than_there_are_is_refused() {
    sampler_of(&[1, 2, 3]).fork(3, 5, 4);
}

#[test]
#[should_panic(expected = "into its own slot")]
fn a_fork_into_its_own_slot_is_refused() {
    sampler_of(&[1, 2, 3]).fork(3, 3, 1);
}

/// Presence and frequency penalty, tokens of the prompt, bias.
fn added_strategy() -> impl Strategy<Value = (f32, f32, u32, Vec<(u32, f32)>)> {
    let penalty = || prop_oneof![Just(0.0f32), -2.0f32..=2.0];
    let bias = prop::collection::btree_map(0u32..4000, -100.0f32..=100.0, 0..20);
    let bias = prop_oneof![
        Just(Vec::new()),
        bias.prop_map(|bias| bias.into_iter().collect())
    ];
    (penalty(), penalty(), 0u32..120, bias)
}

/// Logits of 0 but for these tokens.
fn flat_but(tokens: &[(usize, f32)]) -> Vec<f32> {
    let mut logits = vec![0.0; 2 * BLOCK];
    for &(token, logit) in tokens {
        logits[token] = logit;
    }
    logits
}

#[test]
fn a_bias_moves_a_token_to_the_front_or_bans_it() {
    let logits = flat_but(&[(3, 5.0), (BLOCK + 1, 4.0)]);
    let token = |logit_bias| {
        let params = SampleParams {
            logit_bias,
            ..SampleParams::GREEDY
        };
        sample(&logits, &params, &[]).token as usize
    };
    assert_eq!(token(vec![]), 3);
    assert_eq!(token(vec![(3, -100.0)]), BLOCK + 1);
    assert_eq!(token(vec![(9, 5.5)]), 9);
    assert_eq!(
        token(vec![(9, 5.5), (2 * BLOCK as u32 - 1, 100.0)]),
        2 * BLOCK - 1
    );
}

#[test]
fn presence_counts_once_and_frequency_every_time_and_only_in_the_answer() {
    let logits = flat_but(&[(3, 5.0), (4, 4.5), (5, 4.2)]);
    let token = |presence_penalty, frequency_penalty, history: &[u32]| {
        let params = SampleParams {
            presence_penalty,
            frequency_penalty,
            prompt_tokens: 2,
            ..SampleParams::GREEDY
        };
        sample(&logits, &params, history).token
    };
    // What the prompt has does not count.
    assert_eq!(token(2.0, 2.0, &[3, 3]), 3);
    assert_eq!(token(0.6, 0.0, &[0, 0, 3, 3, 3]), 4);
    assert_eq!(token(0.4, 0.0, &[0, 0, 3, 3, 3]), 3);
    assert_eq!(token(0.0, 0.2, &[0, 0, 3, 3]), 3);
    assert_eq!(token(0.0, 0.2, &[0, 0, 3, 3, 3]), 4);
    assert_eq!(token(0.0, 0.2, &[0, 0, 3, 3, 3, 4, 4]), 3);
    // A negative one makes repetition more likely.
    assert_eq!(token(-0.6, 0.0, &[0, 0, 4]), 4);
}

proptest! {
    #[test]
    fn fast_and_plain_pick_the_same_token(
        count in prop_oneof![1usize..40, 200usize..3000, 15_000usize..25_000],
        random: u64,
        spread in prop_oneof![Just(0.0f32), 0.01f32..1.0, 1.0f32..30.0],
        levels in prop_oneof![Just(0u32), 1u32..20],
        infinite: [bool; 2],
        temperature in prop_oneof![0.1f32..3.0, Just(1e-30f32), Just(1e30f32)],
        top_p in prop_oneof![Just(1.0f32), Just(0.9f32), 0.0001f32..1.0],
        top_k in prop_oneof![Just(0u32), 1u32..50, 1u32..30_000],
        min_p in prop_oneof![Just(0.0f32), Just(1.0f32), 0.0f32..0.2],
        repetition_penalty in prop_oneof![Just(1.0f32), 1.01f32..2.0, 0.5f32..1.0],
        ats in prop::collection::vec(prop_oneof![0.0f64..1.0, Just(0.0), Just(1.0 - 1e-12)], 4),
        history in prop::collection::vec(0u32..3000, 0..100),
        added in added_strategy(),
    ) {
        let (presence_penalty, frequency_penalty, prompt_tokens, logit_bias) = added;
        let params = SampleParams {
            temperature, top_p, top_k, min_p, repetition_penalty,
            presence_penalty, frequency_penalty, prompt_tokens, logit_bias,
            ..SampleParams::GREEDY
        };
        let logits = logits(count, random, spread, levels, infinite);
        let fast = Penalized::new(&logits, &params, &history);
        let plain = plain::penalize(&logits, repetition_penalty, &history);
        let plain = plain::add(plain, &params, &history);
        prop_assert_eq!(fast.best().unwrap().0, plain::ranked(&plain)[0]);

        // The cuts too may fall otherwise within 1e-9 of their boundary.
        let near = [0.0, -1e-9, 1e-9];
        let (top_p, min_p) = (top_p as f64, min_p as f64);
        let shares = plain::shares(&plain, &params, top_p, min_p);
        for at in ats {
            let token = drawn(&fast, &params, at);
            let same = token == plain::draw(&shares, at);
            prop_assert!(same || near.iter().any(|more_p| near.iter().any(|more_min_p| {
                let shares = plain::shares(&plain, &params, top_p + more_p, min_p + more_min_p);
                plain::may_draw(&shares, at, token)
            })), "{} at {}", token, at);
        }
    }

    #[test]
    fn fast_and_plain_give_the_same_logprobs(
        count in prop_oneof![1usize..40, 200usize..5000],
        random: u64,
        levels in 0u32..20,
        infinite: [bool; 2],
        asked in 0u8..=255,
    ) {
        let logits = logits(count, random, 10.0, levels, infinite);
        let params = SampleParams { logprobs: Some(asked), ..SampleParams::GREEDY };
        let sampled = sample(&logits, &params, &[]);
        let plain = plain::logprobs(&logits);
        let ids: Vec<u32> = sampled.top.iter().map(|(id, _)| *id).collect();
        prop_assert_eq!(&ids[..], &plain::ranked(&logits)[..count.min(asked as usize)]);
        let own = (sampled.token, sampled.logprob.unwrap());
        for (id, logprob) in sampled.top.into_iter().chain([own]) {
            let expected = plain[id as usize];
            let same = logprob.to_bits() == expected.to_bits()
                || logprob.is_nan() && expected.is_nan()
                || (logprob - expected).abs() <= 1e-6 * expected.abs();
            prop_assert!(same, "{} for {}", logprob, expected);
        }
    }

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
            presence_penalty: 2.0, frequency_penalty: -2.0, prompt_tokens: 5,
            logit_bias: vec![(0, -100.0), (7, 100.0), (u32::MAX, 1.0)],
        };
        let sampled = sample(&logits, &params, &history);
        prop_assert!((sampled.token as usize) < logits.len());
        prop_assert_eq!(sampled.top.len(), 3.min(logits.len()));
    }
}
