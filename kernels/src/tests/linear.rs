//! Linear layers.

use super::{Numbers, assert_same_bits, bytes_of, relative_error};
use crate::*;
use proptest::prelude::*;

const BITS: [usize; 6] = [2, 3, 4, 5, 6, 8];
const FLOATS: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

/// A weight, and the same as 64-bit floats, row-major.
struct Sample {
    linear: Linear,
    exact: Vec<f64>,
}

/// A quantised weight as a checkpoint has it.
fn quantized(shape: QuantizedShape, numbers: &mut Numbers, largest_codes: bool) -> Sample {
    let QuantizedShape {
        outputs,
        inputs,
        bits,
        group_size,
        scale_type,
    } = shape;
    let groups = shape.groups();
    let code = |numbers: &mut Numbers| match largest_codes {
        true => (1u64 << bits) - 1,
        false => numbers.bits() >> (64 - bits),
    };
    let codes: Vec<u64> = (0..outputs * inputs).map(|_| code(numbers)).collect();
    let mut packed = vec![0u8; outputs * shape.row_bytes()];
    for (index, code) in codes.iter().enumerate() {
        for bit in 0..bits {
            let at = index * bits + bit;
            packed[at / 8] |= ((code >> bit & 1) as u8) << (at % 8);
        }
    }
    let step = 2.0 / (1 << bits) as f32;
    let floats = |numbers: &mut Numbers, middle: f32| -> Vec<f32> {
        let all = (0..outputs * groups).map(|_| middle * (1.0 + 0.3 * numbers.uniform()));
        all.collect()
    };
    let scales = bytes_of(&floats(numbers, step), scale_type);
    let biases = bytes_of(&floats(numbers, -1.0), scale_type);
    let mut weight = Quantized::zeroed(shape);
    let rows = PackedRows {
        codes: &packed,
        scales: &scales,
        biases: &biases,
    };
    weight.pack(&Pool::new(2), 0, rows);
    let exact = codes.iter().enumerate().map(|(index, &code)| {
        let group = index / inputs * groups + index % inputs / group_size;
        let scale = f64::from(scale_type.get(&scales, group));
        scale * code as f64 + f64::from(scale_type.get(&biases, group))
    });
    Sample {
        exact: exact.collect(),
        linear: Linear {
            weight: Weight::Quantized(weight),
            bias: None,
        },
    }
}

fn plain(shape: PlainShape, numbers: &mut Numbers) -> Sample {
    let values: Vec<f32> = (0..shape.outputs * shape.inputs)
        .map(|_| numbers.uniform())
        .collect();
    let bytes = bytes_of(&values, shape.float_type);
    let mut weight = Plain::zeroed(shape);
    weight.pack(&Pool::new(2), 0, &bytes);
    let exact = (0..values.len()).map(|index| f64::from(shape.float_type.get(&bytes, index)));
    Sample {
        exact: exact.collect(),
        linear: Linear {
            weight: Weight::Plain(weight),
            bias: None,
        },
    }
}

fn times(isa: Isa, threads: usize, linear: &Linear, x: &[f32]) -> Vec<f32> {
    // One more than may take part: a limit is to change no bit either.
    let pool = Pool::new(threads + 1);
    pool.limit(threads);
    let machine = (isa, &pool);
    let mut rows = Rows::default();
    rows.prepare(machine, x, linear.inputs(), None, &wanted([linear]));
    let mut out = vec![f32::NAN; rows.tokens() * linear.outputs()];
    multiply(machine, &[linear], &rows, None, &mut out);
    out
}

fn exactly(sample: &Sample, x: &[f32]) -> Vec<f64> {
    let inputs = sample.linear.inputs();
    let dot = |x: &[f32], w: &[f64]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * w).sum();
    let rows = x.chunks_exact(inputs);
    rows.flat_map(|x| sample.exact.chunks_exact(inputs).map(move |w| dot(x, w)))
        .collect()
}

/// The bits of all instruction sets, of every chunk, of one to three threads.
fn check_all_ways(linear: &Linear, x: &[f32], chunk: usize) -> Vec<f32> {
    let inputs = linear.inputs();
    let expected = times(Isa::Scalar, 1, linear, x);
    for isa in Isa::available() {
        // At an address that no vector is aligned to.
        let moved: Vec<f32> = [0.0].iter().chain(x).copied().collect();
        let whole = times(isa, 1 + chunk % 3, linear, &moved[1..]);
        assert_same_bits(&whole, &expected, isa.name());
        let parts = x
            .chunks(chunk * inputs)
            .flat_map(|x| times(isa, 1, linear, x));
        assert_same_bits(&parts.collect::<Vec<_>>(), &expected, "in chunks");
    }
    expected
}

fn quantized_shapes() -> impl Strategy<Value = QuantizedShape> {
    let sizes = (1..70usize, 1..5usize);
    let kinds = (0..6usize, 0..3usize, 0..3usize);
    (sizes, kinds).prop_map(|((outputs, groups), (bits, group, float))| QuantizedShape {
        outputs,
        inputs: groups * [32, 64, 128][group],
        bits: BITS[bits],
        group_size: [32, 64, 128][group],
        scale_type: FLOATS[float],
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_quantized_layer_gives_the_same_bits_in_all_ways(
        shape in quantized_shapes(), tokens in 1..80usize, chunk in 1..20usize, seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        let sample = quantized(shape, &mut numbers, false);
        let x = numbers.activations(tokens * shape.inputs);
        let found = check_all_ways(&sample.linear, &x, chunk);
        // A single token may fall on sums that nearly cancel.
        let error = relative_error(&found, &exactly(&sample, &x));
        prop_assert!(error < 1e-3, "{error:e}");
    }

    #[test]
    fn a_layer_of_floats_gives_the_same_bits_in_all_ways(
        outputs in 1..70usize, inputs in 1..200usize, float in 0..3usize,
        tokens in 1..80usize, chunk in 1..20usize, seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        let sample = plain(PlainShape { outputs, inputs, float_type: FLOATS[float] }, &mut numbers);
        let x = numbers.activations(tokens * inputs);
        let found = check_all_ways(&sample.linear, &x, chunk);
        let error = relative_error(&found, &exactly(&sample, &x));
        prop_assert!(error < 1e-5, "{error:e}");
    }

    #[test]
    fn a_row_is_what_was_packed(shape in quantized_shapes(), seed: u64) {
        let sample = quantized(shape, &mut Numbers::new(seed), false);
        let mut row = vec![0.0; shape.inputs];
        for (index, exact) in sample.exact.chunks_exact(shape.inputs).enumerate() {
            sample.linear.row(index, &mut row);
            prop_assert!(relative_error(&row, exact) < 1e-6);
        }
    }
}

#[test]
fn the_error_is_bounded_for_every_format() {
    for bits in BITS {
        for (group_size, scale_type) in [(32, FLOATS[0]), (64, FLOATS[1]), (128, FLOATS[2])] {
            let mut numbers = Numbers::new(7 + bits as u64);
            let shape = QuantizedShape {
                outputs: 96,
                inputs: 2048,
                bits,
                group_size,
                scale_type,
            };
            let sample = quantized(shape, &mut numbers, false);
            let x = numbers.activations(8 * shape.inputs);
            let exact = exactly(&sample, &x);
            for isa in Isa::available() {
                let error = relative_error(&times(isa, 2, &sample.linear, &x), &exact);
                println!(
                    "{bits} bits, groups of {group_size}, {}: {error:.1e}",
                    isa.name()
                );
                assert!(
                    error < 1e-4,
                    "{bits} bits, groups of {group_size}: {error:e}"
                );
            }
        }
    }
    for float_type in FLOATS {
        let mut numbers = Numbers::new(5);
        let sample = plain(
            PlainShape {
                outputs: 96,
                inputs: 6144,
                float_type,
            },
            &mut numbers,
        );
        let x = numbers.activations(8 * 6144);
        let exact = exactly(&sample, &x);
        for isa in Isa::available() {
            let error = relative_error(&times(isa, 2, &sample.linear, &x), &exact);
            println!("{float_type:?}, {}: {error:.1e}", isa.name());
            assert!(error < 1e-5, "{float_type:?}: {error:e}");
        }
    }
}

#[test]
fn the_largest_codes_and_activations_do_not_overflow() {
    for bits in BITS {
        for group_size in [32, 64, 128] {
            let shape = QuantizedShape {
                outputs: 16,
                inputs: 2 * group_size,
                bits,
                group_size,
                scale_type: FloatType::F32,
            };
            let sample = quantized(shape, &mut Numbers::new(3), true);
            for value in [1.0, -1.0, 3.0e38, -1e-20, f32::MIN_POSITIVE, 1e-40, 0.0] {
                let x = vec![value; 3 * shape.inputs];
                let found = check_all_ways(&sample.linear, &x, 2);
                if value.abs() == 1.0 {
                    assert!(relative_error(&found, &exactly(&sample, &x)) < 1e-4);
                }
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_none_and_touches_no_other_token() {
    let shape = QuantizedShape {
        outputs: 20,
        inputs: 128,
        bits: 4,
        group_size: 64,
        scale_type: FloatType::Bf16,
    };
    let sample = quantized(shape, &mut Numbers::new(3), false);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = Numbers::new(4).activations(9 * 128);
        let clean = times(Isa::Scalar, 1, &sample.linear, &x);
        x[4 * 128 + 100] = bad;
        let found = check_all_ways(&sample.linear, &x, 3);
        let (before, rest) = found.split_at(4 * 20);
        let (hit, after) = rest.split_at(20);
        assert!(hit.iter().all(|value| value.is_nan()));
        assert_same_bits(before, &clean[..4 * 20], "before");
        assert_same_bits(after, &clean[5 * 20..], "after");
    }
}

#[test]
fn norms_residuals_biases_and_gates_are_what_they_say() {
    let mut numbers = Numbers::new(11);
    let shape = QuantizedShape {
        outputs: 37,
        inputs: 192,
        bits: 8,
        group_size: 64,
        scale_type: FloatType::F16,
    };
    let mut gate = quantized(shape, &mut numbers, false);
    let up = plain(
        PlainShape {
            outputs: 37,
            inputs: 192,
            float_type: FloatType::Bf16,
        },
        &mut numbers,
    );
    let bias = numbers.activations(37);
    gate.linear.bias = Some(bias.clone());
    let x = numbers.activations(7 * 192);
    let norm = Norm {
        weight: numbers.activations(192),
        eps: 1e-5,
    };
    let residual = numbers.activations(7 * 74);

    let normed: Vec<f64> = x
        .chunks_exact(192)
        .flat_map(|x| {
            let square: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
            let rms = (square / 192.0 + 1e-5).sqrt();
            x.iter()
                .zip(&norm.weight)
                .map(move |(x, w)| f64::from(*x) / rms * f64::from(*w))
                .collect::<Vec<_>>()
        })
        .collect();
    let normed: Vec<f32> = normed.into_iter().map(|x| x as f32).collect();
    let mut of_gate = exactly(&gate, &normed);
    of_gate
        .iter_mut()
        .enumerate()
        .for_each(|(at, y)| *y += f64::from(bias[at % 37]));
    let of_up = exactly(&up, &normed);
    let beside: Vec<f64> = (0..7 * 74)
        .map(|at| {
            let (token, column) = (at / 74, at % 74);
            let product = match column < 37 {
                true => of_gate[token * 37 + column],
                false => of_up[token * 37 + column - 37],
            };
            product + f64::from(residual[at])
        })
        .collect();
    let gated: Vec<f64> = of_gate
        .iter()
        .zip(&of_up)
        .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
        .collect();

    let mut first: Option<[Vec<f32>; 2]> = None;
    for isa in Isa::available() {
        let pool = Pool::new(2);
        let machine = (isa, &pool);
        let mut rows = Rows::default();
        let both = [&gate.linear, &up.linear];
        rows.prepare(machine, &x, 192, Some(&norm), &wanted(both));
        let (mut out, mut product) = (vec![0.0; 7 * 74], vec![0.0; 7 * 37]);
        multiply(machine, &both, &rows, Some(&residual), &mut out);
        multiply_gated(machine, both, &rows, &mut product);
        assert!(relative_error(&out, &beside) < 1e-4);
        assert!(relative_error(&product, &gated) < 1e-4);
        let [expected_out, expected_product] =
            first.get_or_insert_with(|| [out.clone(), product.clone()]);
        assert_same_bits(&out, expected_out, isa.name());
        assert_same_bits(&product, expected_product, isa.name());
    }
}
