//! Attention and its cache.

use super::{Numbers, assert_same_bits, relative_error};
use crate::*;
use proptest::prelude::*;

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

fn shapes() -> impl Strategy<Value = HeadShape> {
    (1..4usize, 1..4usize, 1..20usize).prop_map(|(kv_head_count, group, half)| HeadShape {
        head_count: kv_head_count * group,
        kv_head_count,
        head_dim: 2 * half,
    })
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
        prop_assert!(relative_error(&alone, &exactly(&attention, &own)) < 1e-5);
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
}

#[test]
fn the_error_is_bounded_for_the_shapes_of_real_models() {
    for (head_count, kv_head_count, head_dim) in [(16, 8, 128), (9, 3, 64)] {
        let shape = HeadShape {
            head_count,
            kv_head_count,
            head_dim,
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
                "{head_count} heads, {kv_head_count} of keys, {head_dim} wide, {}: {error:.1e}",
                isa.name()
            );
            assert!(error < 1e-5, "{error:e}");
        }
    }
}

#[test]
fn scores_far_apart_leave_one_value() {
    let shape = HeadShape {
        head_count: 1,
        kv_head_count: 1,
        head_dim: 2,
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
