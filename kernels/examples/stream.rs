use mlx_pipe_kernels::*;
use std::time::Instant;
fn main() {
    let isa = Isa::chosen().unwrap();
    for threads in [1usize, 2] {
        let pool = Pool::new(threads);
        for bits in [8usize, 4] {
            let (outputs, inputs) = (100_000, 2048);
            let shape = QuantizedShape {
                outputs,
                inputs,
                bits,
                group_size: 64,
                scale_type: FloatType::Bf16,
            };
            let mut w = Quantized::zeroed(shape);
            let codes: Vec<u8> = (0..16 * shape.row_bytes())
                .map(|at| (at * 151 % 251) as u8)
                .collect();
            let floats = [0, 0x3C].repeat(16 * shape.groups());
            for b in 0..shape.blocks() {
                w.pack(
                    &pool,
                    b,
                    PackedRows {
                        codes: &codes,
                        scales: &floats,
                        biases: &floats,
                    },
                );
            }
            let l = Linear {
                weight: Weight::Quantized(w),
                bias: None,
            };
            let x: Vec<f32> = (0..inputs).map(|at| (at % 97) as f32 - 48.0).collect();
            let mut rows = Rows::default();
            let mut out = vec![0.0; outputs];
            rows.prepare((isa, &pool), &x, inputs, None, &wanted([&l]));
            let mut all = vec![];
            for _ in 0..40 {
                let t = Instant::now();
                multiply((isa, &pool), &[&l], &rows, None, &mut out);
                all.push(
                    (shape.blocks() * shape.block_bytes()) as f64 / t.elapsed().as_secs_f64() / 1e9,
                );
            }
            all.sort_by(f64::total_cmp);
            print!(
                "{threads}t {bits}b median {:.1} best {:.1} GB/s; ",
                all[20], all[39]
            );
        }
    }
    println!();
}
