//! Each kernel on its own. `cargo bench -p mlx-pipe-kernels`; a shape's name says what it is.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mlx_pipe_kernels::{
    FloatType, Isa, Linear, PackedRows, Pool, Quantized, QuantizedShape, Rows, Weight, multiply,
    wanted,
};
use std::time::Duration;

fn weight(bits: usize, outputs: usize, inputs: usize) -> Linear {
    let shape = QuantizedShape {
        outputs,
        inputs,
        bits,
        group_size: 64,
        scale_type: FloatType::Bf16,
    };
    let mut weight = Quantized::zeroed(shape);
    let codes: Vec<u8> = (0..16 * shape.row_bytes())
        .map(|at| (at * 151 % 251) as u8)
        .collect();
    // 2^-7 in bf16.
    let floats = [0, 0x3C].repeat(16 * shape.groups());
    for block in 0..shape.blocks() {
        let rows = PackedRows {
            codes: &codes,
            scales: &floats,
            biases: &floats,
        };
        weight.pack(&Pool::new(1), block, rows);
    }
    Linear {
        weight: Weight::Quantized(weight),
        bias: None,
    }
}

/// Bytes of weights a second for one token, multiplications a second for many.
fn quantized_linear(criterion: &mut Criterion) {
    let isa = Isa::chosen().unwrap();
    for (bits, outputs) in [(8, 98_304), (4, 98_304), (6, 49_152)] {
        let linear = weight(bits, outputs, 2048);
        let bytes = (outputs * 2048 * bits / 8 + outputs * 2048 / 64 * 4) as u64;
        for threads in [1, 2] {
            let pool = Pool::new(threads);
            let mut group = criterion.benchmark_group(format!("{bits} bits {threads} threads"));
            group
                .sample_size(10)
                .measurement_time(Duration::from_secs(3));
            for tokens in [1, 2, 4, 8, 16, 64] {
                let x: Vec<f32> = (0..tokens * 2048)
                    .map(|at| (at % 97) as f32 - 48.0)
                    .collect();
                let mut rows = Rows::default();
                let mut out = vec![0.0; tokens * outputs];
                let work = match tokens {
                    1 => Throughput::Bytes(bytes),
                    _ => Throughput::Elements((tokens * outputs * 2048) as u64),
                };
                group.throughput(work);
                group.bench_function(BenchmarkId::new(isa.name(), tokens), |bencher| {
                    bencher.iter(|| {
                        rows.prepare((isa, &pool), &x, 2048, None, &wanted([&linear]));
                        multiply((isa, &pool), &[&linear], &rows, None, &mut out);
                    });
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, quantized_linear);
criterion_main!(benches);
