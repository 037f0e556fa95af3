use mlx_pipe_kernels::*;
use std::time::Instant;
fn main() {
    let isa = Isa::chosen().unwrap();
    let pool = Pool::new(1);
    for bits in [8usize, 4] {
        let (outputs, inputs) = (64, 2048);
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
        for tokens in [1usize, 2, 4, 8, 16, 64, 512] {
            let x: Vec<f32> = (0..tokens * inputs)
                .map(|at| (at % 97) as f32 - 48.0)
                .collect();
            let mut rows = Rows::default();
            let mut out = vec![0.0; tokens * outputs];
            rows.prepare((isa, &pool), &x, inputs, None, &wanted([&l]));
            let mut best = f64::MAX;
            let reps = (400 / tokens).max(1);
            for _ in 0..60 {
                let t = Instant::now();
                for _ in 0..reps {
                    multiply((isa, &pool), &[&l], &rows, None, &mut out);
                }
                best = best.min(t.elapsed().as_secs_f64() / reps as f64);
            }
            print!(
                "{bits}b T={tokens}: {:.1} GMAC/s  ",
                (tokens * outputs * inputs) as f64 / best / 1e9
            );
        }
        println!();
    }
}
