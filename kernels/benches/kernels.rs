//! Each kernel on its own. `cargo bench -p mlx-pipe-kernels`; a shape's name says what it is.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mlx_pipe_kernels::{
    Attention, FloatType, HeadShape, Isa, Kept, KvCache, Linear, Norm, PackedRows, Plain,
    PlainShape, Pool, Quantized, QuantizedShape, Rotation, Rows, Span, Step, Weight, attend,
    multiply, wanted,
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

/// A weight of floats, one token and many.
fn plain_linear(criterion: &mut Criterion) {
    let (isa, pool) = (Isa::chosen().unwrap(), Pool::new(1));
    let shape = PlainShape {
        outputs: 16_384,
        inputs: 2048,
        float_type: FloatType::Bf16,
    };
    let linear = Linear {
        weight: Weight::Plain(Plain::zeroed(shape)),
        bias: None,
    };
    let mut group = criterion.benchmark_group("bf16 weights 1 thread");
    group.sample_size(10);
    for tokens in [1, 64] {
        let x = vec![1.0; tokens * shape.inputs];
        let mut rows = Rows::default();
        let mut out = vec![0.0; tokens * shape.outputs];
        group.throughput(match tokens {
            1 => Throughput::Bytes((shape.outputs * shape.row_bytes()) as u64),
            _ => Throughput::Elements((tokens * shape.outputs * shape.inputs) as u64),
        });
        group.bench_function(BenchmarkId::new(isa.name(), tokens), |bencher| {
            bencher.iter(|| {
                rows.prepare((isa, &pool), &x, shape.inputs, None, &wanted([&linear]));
                multiply((isa, &pool), &[&linear], &rows, None, &mut out);
            });
        });
    }
    group.finish();
}

/// RMS norm and quantisation of a row, in elements a second.
fn norm(criterion: &mut Criterion) {
    let (isa, pool) = (Isa::chosen().unwrap(), Pool::new(1));
    let norm = Norm {
        weight: vec![1.0; 2048],
        eps: 1e-6,
    };
    let linear = weight(8, 16, 2048);
    let x: Vec<f32> = (0..2048).map(|at| (at % 97) as f32 - 48.0).collect();
    let mut rows = Rows::default();
    let mut group = criterion.benchmark_group("norm and quantise 2048");
    group.throughput(Throughput::Elements(2048));
    group.bench_function(isa.name(), |bencher| {
        let wanted = wanted([&linear]);
        bencher.iter(|| rows.prepare((isa, &pool), &x, 2048, Some(&norm), &wanted));
    });
    group.finish();
}

/// Attention of Qwen3-1.7B's heads: one token over a long context, and a prompt's chunk, in queries a second.
fn attention(criterion: &mut Criterion) {
    let (isa, pool) = (Isa::chosen().unwrap(), Pool::new(1));
    let shape = HeadShape {
        head_count: 16,
        kv_head_count: 8,
        head_dim: 128,
        kept: Kept::I16,
    };
    let attention = Attention {
        shape,
        qk_norm: None,
    };
    let frequencies = vec![0.01; shape.head_dim / 2];
    let mut group = criterion.benchmark_group("attention 1 thread");
    group.sample_size(10);
    for (start, count) in [(1024, 1), (0, 256)] {
        let spans = vec![Span {
            row: 0,
            count,
            start,
        }];
        let step = Step {
            rotation: Rotation::new(&frequencies, &spans),
            spans,
        };
        let mut cache = KvCache::new(shape);
        let mut qkv = vec![0.5; count * shape.qkv_width()];
        let mut out = vec![0.0; count * shape.width()];
        group.throughput(Throughput::Elements(count as u64));
        let name = format!("{count} after {start}");
        group.bench_function(BenchmarkId::new(isa.name(), name), |bencher| {
            bencher.iter(|| {
                cache.resize(start);
                let caches = &mut [&mut cache];
                attend((isa, &pool), &attention, &step, caches, &mut qkv, &mut out);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, quantized_linear, plain_linear, norm, attention);
criterion_main!(benches);
