//! Attention and its cache.

use super::{Numbers, assert_same_bits, relative_error};
use crate::*;
use proptest::prelude::*;
use std::sync::Arc;

/// Queries, keys and values of the tokens of one sequence, from position 0 on.
struct Sequence {
    qkv: Vec<f32>,
    tokens: usize,
}

fn frequencies(shape: HeadShape) -> Vec<f64> {
    let dim = shape.head_dim as f64;
    (0..shape.head_dim / 2)
        .map(|pair| 10_000f64.powf(-2.0 * pair as f64 / dim))
        .collect()
}

fn attention(shape: HeadShape, normed: bool, numbers: &mut Numbers) -> Attention {
    let mut norm = || Norm {
        weight: numbers.activations(shape.head_dim),
        eps: 1e-6,
    };
    Attention {
        shape,
        qk_norm: normed.then(|| [norm(), norm()]),
    }
}

/// The last tokens of all sequences, from the positions given on, in one step.
fn step(
    isa: Isa,
    threads: usize,
    attention: &Attention,
    parts: &[(&Sequence, std::ops::Range<usize>)],
    caches: &mut [&mut KvCache],
) -> Vec<f32> {
    let width = attention.shape.qkv_width();
    let (mut spans, mut qkv) = (Vec::new(), Vec::new());
    for (sequence, range) in parts {
        spans.push(Span {
            row: qkv.len() / width,
            count: range.len(),
            start: range.start,
        });
        qkv.extend_from_slice(&sequence.qkv[range.start * width..range.end * width]);
    }
    let rotation = Rotation::new(&frequencies(attention.shape), &spans);
    let mut out = vec![f32::NAN; qkv.len() / width * attention.shape.width()];
    let pool = Pool::new(threads);
    let step = Step { spans, rotation };
    attend((isa, &pool), attention, &step, caches, &mut qkv, &mut out);
    out
}

/// As the mathematics has it.
fn exactly(attention: &Attention, sequence: &Sequence) -> Vec<f64> {
    let HeadShape {
        head_count,
        kv_head_count,
        head_dim,
        ..
    } = attention.shape;
    let frequencies = frequencies(attention.shape);
    let head = |token: usize, index: usize, norm: Option<&Norm>, rotated: bool| -> Vec<f64> {
        let at = token * attention.shape.qkv_width() + index * head_dim;
        let mut x: Vec<f64> = sequence.qkv[at..at + head_dim]
            .iter()
            .map(|x| f64::from(*x))
            .collect();
        if let Some(norm) = norm {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / head_dim as f64;
            let rms = (mean + f64::from(norm.eps)).sqrt();
            x.iter_mut()
                .zip(&norm.weight)
                .for_each(|(x, w)| *x = *x / rms * f64::from(*w));
        }
        if rotated {
            for pair in 0..head_dim / 2 {
                let (sin, cos) = (token as f64 * frequencies[pair]).sin_cos();
                let (a, b) = (x[pair], x[pair + head_dim / 2]);
                x[pair] = a * cos - b * sin;
                x[pair + head_dim / 2] = b * cos + a * sin;
            }
        }
        x
    };
    let norms = attention.qk_norm.as_ref();
    let mut out = Vec::new();
    for token in 0..sequence.tokens {
        for index in 0..head_count {
            let query = head(token, index, norms.map(|norms| &norms[0]), true);
            let kv_head = head_count + index / (head_count / kv_head_count);
            let weights: Vec<f64> = (0..=token)
                .map(|other| {
                    let key = head(other, kv_head, norms.map(|norms| &norms[1]), true);
                    let dot: f64 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
                    dot / (head_dim as f64).sqrt()
                })
                .collect();
            let largest = weights.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = weights.iter().map(|w| (w - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut value = vec![0.0; head_dim];
            for (other, weight) in weights.iter().enumerate() {
                let of_other = head(other, kv_head + kv_head_count, None, false);
                value
                    .iter_mut()
                    .zip(of_other)
                    .for_each(|(value, v)| *value += weight * v);
            }
            out.extend(value.into_iter().map(|value| value / sum));
        }
    }
    out
}

fn sequence(shape: HeadShape, tokens: usize, numbers: &mut Numbers) -> Sequence {
    Sequence {
        qkv: numbers.activations(tokens * shape.qkv_width()),
        tokens,
    }
}

/// The first `tokens` tokens of a sequence, and new ones up to `end`.
fn branch(
    shape: HeadShape,
    from: &Sequence,
    tokens: usize,
    end: usize,
    numbers: &mut Numbers,
) -> Sequence {
    let mut branch = sequence(shape, end, numbers);
    let shared = tokens * shape.qkv_width();
    branch.qkv[..shared].copy_from_slice(&from.qkv[..shared]);
    branch
}

fn shapes() -> impl Strategy<Value = HeadShape> {
    let kept = prop::sample::select(&[Kept::F32, Kept::I16][..]);
    (1..4usize, 1..4usize, 1..20usize, kept).prop_map(|(kv_head_count, group, half, kept)| {
        HeadShape {
            head_count: kv_head_count * group,
            kv_head_count,
            head_dim: 2 * half,
            kept,
        }
    })
}

/// What attention may differ by from the mathematics.
fn tolerance(kept: Kept) -> f64 {
    match kept {
        Kept::F32 => 1e-5,
        Kept::I16 => 1e-3,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn chunks_neighbours_threads_and_instruction_sets_change_no_bit(
        shape in shapes(), normed: bool, tokens in 1..150usize, others in 1..90usize,
        chunk in 1..70usize, seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        let attention = attention(shape, normed, &mut numbers);
        let (own, other) = (sequence(shape, tokens, &mut numbers), sequence(shape, others, &mut numbers));
        let alone = step(Isa::Scalar, 1, &attention, &[(&own, 0..tokens)], &mut [&mut KvCache::new(shape)]);
        prop_assert!(relative_error(&alone, &exactly(&attention, &own)) < tolerance(shape.kept));
        for isa in Isa::available() {
            let (mut cache, mut of_other) = (KvCache::new(shape), KvCache::new(shape));
            let mut found = Vec::new();
            let mut at = 0;
            while at < tokens {
                let end = tokens.min(at + chunk);
                // The neighbour is cut back and comes again, from another place, at every step.
                let from = (at + 7) % others;
                of_other.resize(from);
                let mut caches = [&mut of_other, &mut cache];
                let parts = [(&other, from..others), (&own, at..end)];
                let both = step(isa, 1 + at % 3, &attention, &parts, &mut caches);
                found.extend_from_slice(&both[(others - from) * shape.width()..]);
                at = end;
            }
            assert_same_bits(&found, &alone, isa.name());
        }
    }

    #[test]
    fn caches_that_share_blocks_give_the_bits_of_caches_of_their_own(
        shape in shapes(), tokens in 1..200usize, part in 0.0..1.0, cut in 0.0..1.0,
        chunk in 1..70usize, seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        let attention = attention(shape, false, &mut numbers);
        let shared = (part * tokens as f64) as usize;
        let cut = (cut * tokens as f64) as usize;
        let first = sequence(shape, tokens + 1, &mut numbers);
        // One goes on from what it shares, the other from where it is cut back to: to the same length.
        let other = branch(shape, &first, shared, tokens + 70, &mut numbers);
        let again = branch(shape, &first, cut, tokens + 70, &mut numbers);
        let alone = |sequence: &Sequence, from: usize| {
            let parts = [(sequence, 0..sequence.tokens)];
            let caches = &mut [&mut KvCache::new(shape)];
            step(Isa::Scalar, 1, &attention, &parts, caches).split_off(from * shape.width())
        };
        let isa = Isa::chosen().unwrap();
        let mut cache = KvCache::new(shape);
        step(isa, 2, &attention, &[(&first, 0..tokens)], &mut [&mut cache]);
        let (mut of_other, mut kept) = (cache.share(shared), cache.share(tokens));
        cache.resize(cut);
        let mut found = [Vec::new(), Vec::new()];
        let mut at = [shared, cut];
        while at != [other.tokens, again.tokens] {
            let end = at.map(|at| (at + chunk).min(other.tokens));
            let parts = [(&other, at[0]..end[0]), (&again, at[1]..end[1])];
            let both = step(isa, 2, &attention, &parts, &mut [&mut of_other, &mut cache]);
            let (of_first, of_second) = both.split_at((end[0] - at[0]) * shape.width());
            found[0].extend_from_slice(of_first);
            found[1].extend_from_slice(of_second);
            at = end;
        }
        assert_same_bits(&found[0], &alone(&other, shared), "what shares");
        assert_same_bits(&found[1], &alone(&again, cut), "what was shared");
        let last = step(isa, 2, &attention, &[(&first, tokens..tokens + 1)], &mut [&mut kept]);
        assert_same_bits(&last, &alone(&first, tokens), "what waited");
    }
}

/// A small shape, its attention, and a cache of so many tokens of a sequence.
fn filled(tokens: usize) -> (Attention, Sequence, KvCache) {
    let shape = HeadShape {
        head_count: 2,
        kv_head_count: 1,
        head_dim: 8,
        kept: Kept::I16,
    };
    let mut numbers = Numbers::new(5);
    let attention = attention(shape, false, &mut numbers);
    let own = sequence(shape, 300, &mut numbers);
    let mut cache = KvCache::new(shape);
    go_on(&attention, &own, &mut cache, tokens);
    (attention, own, cache)
}

/// Computes the sequence up to `end`.
fn go_on(attention: &Attention, own: &Sequence, cache: &mut KvCache, end: usize) {
    let part = (own, cache.length()..end);
    step(Isa::Scalar, 1, attention, &[part], &mut [cache]);
}

/// Which blocks of two caches are the same memory.
fn same_blocks(one: &KvCache, other: &KvCache) -> Vec<bool> {
    let blocks = one.blocks.iter().zip(&other.blocks);
    blocks.map(|(one, other)| Arc::ptr_eq(one, other)).collect()
}

#[test]
fn whole_blocks_stay_shared_and_one_in_part_is_copied_when_it_is_written() {
    let (attention, own, cache) = filled(130);
    let mut whole = cache.share(128);
    assert_eq!(whole.blocks.len(), 2);
    go_on(&attention, &own, &mut whole, 200);
    assert_eq!(same_blocks(&cache, &whole), [true, true, false]);
    assert_eq!(Arc::strong_count(&cache.blocks[1]), 2);

    let mut in_part = cache.share(100);
    assert_eq!(same_blocks(&cache, &in_part), [true, true]);
    go_on(&attention, &own, &mut in_part, 101);
    assert_eq!(same_blocks(&cache, &in_part), [true, false]);
    assert_eq!(cache.share(0).blocks.len(), 0);
}

#[test]
fn who_holds_a_block_last_writes_it_in_place() {
    let (attention, own, cache) = filled(100);
    let mut last = cache.share(100);
    let block = Arc::as_ptr(&cache.blocks[1]);
    drop(cache);
    go_on(&attention, &own, &mut last, 101);
    assert_eq!(Arc::as_ptr(&last.blocks[1]), block);
}

#[test]
fn a_block_is_freed_when_the_last_cache_that_holds_it_goes() {
    let (_, _, cache) = filled(128);
    let block = Arc::downgrade(&cache.blocks[0]);
    let other = cache.share(64);
    let another = other.share(64);
    drop(cache);
    drop(other);
    assert!(block.upgrade().is_some());
    drop(another);
    assert!(block.upgrade().is_none());
}

#[test]
fn a_cache_cut_back_keeps_memory_of_its_own_and_gives_up_what_it_shares() {
    let (_, _, mut cache) = filled(250);
    let shared = cache.share(128);
    cache.resize(10);
    // The second block is the other's, the third and the fourth are still this one's.
    assert_eq!(same_blocks(&cache, &shared), [true, false]);
    assert_eq!(cache.blocks.len(), 3);
    assert_eq!(Arc::strong_count(&shared.blocks[1]), 1);
}

#[test]
#[should_panic(expected = "11 tokens of 10 are shared")]
fn no_more_tokens_can_be_shared_than_are_held() {
    filled(10).2.share(11);
}

#[test]
fn the_error_is_bounded_for_the_shapes_of_real_models() {
    for (head_count, kv_head_count, head_dim, kept) in [
        (16, 8, 128, Kept::F32),
        (16, 8, 128, Kept::I16),
        (9, 3, 64, Kept::F32),
        (9, 3, 64, Kept::I16),
    ] {
        let shape = HeadShape {
            head_count,
            kv_head_count,
            head_dim,
            kept,
        };
        let mut numbers = Numbers::new(9);
        let attention = attention(shape, head_dim == 128, &mut numbers);
        let own = sequence(shape, 130, &mut numbers);
        let exact = exactly(&attention, &own);
        for isa in Isa::available() {
            let found = step(
                isa,
                2,
                &attention,
                &[(&own, 0..130)],
                &mut [&mut KvCache::new(shape)],
            );
            let error = relative_error(&found, &exact);
            println!(
                "{head_count} heads, {kv_head_count} of keys, {head_dim} wide, {kept:?}, {}: {error:.1e}",
                isa.name()
            );
            assert!(error < tolerance(kept), "{error:e}");
        }
    }
}

#[test]
fn scores_far_apart_leave_one_value() {
    let shape = HeadShape {
        head_count: 1,
        kv_head_count: 1,
        head_dim: 2,
        kept: Kept::F32,
    };
    let attention = Attention {
        shape,
        qk_norm: None,
    };
    // Scores of 1e6 times the position: only the newest counts.
    let qkv = (0..100)
        .flat_map(|token| [0.0, 0.0, 0.0, 0.0, token as f32, 1.0])
        .collect();
    let mut own = Sequence { qkv, tokens: 100 };
    for token in 0..100 {
        own.qkv[6 * token] = 1e3;
        own.qkv[6 * token + 2] = 1e3 * token as f32;
    }
    let exact = exactly(&attention, &own);
    for isa in Isa::available() {
        let found = step(
            isa,
            1,
            &attention,
            &[(&own, 0..100)],
            &mut [&mut KvCache::new(shape)],
        );
        assert!(found.iter().all(|value| value.is_finite()));
        assert!(relative_error(&found, &exact) < 1e-5);
    }
}

/// A value that holds what is no number gives none to those that see it.
#[test]
fn what_is_no_number_among_whole_numbers_stays_none() {
    for bad in [f32::NAN, f32::INFINITY] {
        let (attention, mut own, _) = filled(0);
        let width = attention.shape.qkv_width();
        own.qkv[20 * width + 24] = bad;
        for isa in Isa::available() {
            let mut cache = KvCache::new(attention.shape);
            let found = step(isa, 1, &attention, &[(&own, 0..40)], &mut [&mut cache]);
            let since = &found[20 * attention.shape.width()..];
            assert!(since.iter().all(|x| x.is_nan()), "{bad}, {}", isa.name());
        }
    }
}
