//! How long the kernels take, each by itself, in a layer, and as one kernel of all layers; and the share of the memory
//! bandwidth that the linear layers reach.
//!
//!     kernel_rate [SHAPE] [BITS]      shapes: 1.7b (default), 8b; bits: 8 (default), 4, 16
//!
//! Every launch reads a weight that the second-level cache no longer has. Times are of many launches played as one
//! recording, medians of repeats.

use anyhow::{Context, Result};
use mlx_pipe_cuda::{
    AttendWork, Buffer, Decode, DecodeWork, Element, Epilogue, Format, Gpu, Heads, Input, Kernels,
    LayerOperands, Model, Normed, Numbers, PAGE_TOKENS, PROGRESS_BYTES, Pools, Rotation, Tiles,
    Weight,
};
use std::sync::Arc;
use std::time::Instant;

const LAUNCHES: usize = 24;
/// Layers of a step of one token.
const LAYERS: usize = 12;
const REPEATS: usize = 9;

struct Shape {
    hidden: usize,
    mlp: usize,
    heads: usize,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let shape = match arguments.next().as_deref() {
        Some("8b") => Shape {
            hidden: 4096,
            mlp: 12288,
            heads: 32,
        },
        _ => Shape {
            hidden: 2048,
            mlp: 6144,
            heads: 16,
        },
    };
    let bits = arguments.next().map_or(Ok(8), |bits| bits.parse())?;
    let format = match bits {
        16 => Format::PLAIN,
        bits => Format {
            bits,
            group_size: 64,
        },
    };
    let heads = Heads {
        queries: shape.heads,
        kv: 8,
        dim: 128,
        has_norm: true,
    };
    let gpu = Gpu::open(0)?;
    let began = Instant::now();
    let model = Model {
        element: Element::Bf16,
        formats: [format].into(),
        heads,
        decode: Some(Decode {
            format,
            layers: LAYERS,
            widest: shape.mlp,
        }),
    };
    let kernels = Kernels::load(&gpu, &model, None)?;
    println!(
        "{}: kernels compiled in {:.1} s",
        gpu.name(),
        began.elapsed().as_secs_f64()
    );
    let bandwidth = copy_bandwidth(&gpu)?;
    println!("copying: {:.0} GB/s", bandwidth / 1e9);
    layers(&gpu, &kernels, heads, &shape, format)?;
    let linears = [
        ("qkv_proj", heads.qkv_width(), shape.hidden, false),
        ("o_proj", shape.hidden, shape.heads * 128, false),
        ("gate_up_proj", 2 * shape.mlp, shape.hidden, true),
        ("down_proj", shape.hidden, shape.mlp, false),
        ("head", 151936, shape.hidden, false),
    ];
    for (name, outputs, inputs, is_gated) in linears {
        let bytes = outputs * inputs * bits / 8
            + if bits < 16 {
                outputs * inputs / 64 * 4
            } else {
                0
            };
        let copies = (400_000_000 / bytes).clamp(1, LAUNCHES);
        let weights = (0..copies)
            .map(|_| weight(&gpu, format, outputs, inputs))
            .collect::<Result<Vec<_>>>()?;
        print!("{name:>13} {outputs:>6} x {inputs:>5}");
        for rows in [1, 4, 8, 16, 32, 64, 128, 512] {
            if name == "head" && rows > 64 {
                break;
            }
            let x = pattern(&gpu, rows * inputs * 2)?;
            let out = Buffer::zeroed(&gpu, rows * outputs * 4)?;
            let epilogue = if is_gated {
                Epilogue::Gated
            } else {
                Epilogue::Plain
            };
            let us = time(&gpu, |index| {
                kernels.linear(
                    &weights[index % copies],
                    Input::Plain(&x),
                    rows,
                    epilogue,
                    &out,
                    name == "head",
                )
            })?;
            print!(" | {rows}: {us:.1} us");
            match rows {
                ..=64 => print!(" {:.0} %", bytes as f64 / us / bandwidth * 1e8),
                _ => print!(
                    " {:.0} T",
                    2.0 * (rows * outputs * inputs) as f64 / us / 1e6
                ),
            }
        }
        println!();
    }
    others(&gpu, &kernels, heads, &shape)
}

fn others(gpu: &Arc<Gpu>, kernels: &Kernels, heads: Heads, shape: &Shape) -> Result<()> {
    for (sequences, count, held) in [
        (1usize, 1usize, 640usize),
        (1, 1, 4096),
        (8, 1, 640),
        (32, 1, 640),
        (1, 512, 0),
        (1, 512, 3584),
    ] {
        let rows = sequences * count;
        let pages = (held + count).div_ceil(PAGE_TOKENS);
        let bytes = sequences * pages * heads.kv * heads.dim * PAGE_TOKENS * 2;
        let pools = Pools {
            keys: pattern(gpu, bytes)?,
            values: pattern(gpu, bytes)?,
        };
        let (mut places, mut few, mut many, mut table) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for sequence in 0..sequences {
            let first = table.len();
            table.extend((0..pages).map(|page| (sequence * pages + page) as i32));
            places.extend((held..held + count).flat_map(|position| {
                let page = table[first + position / PAGE_TOKENS] as usize;
                [
                    position as i32,
                    (page * PAGE_TOKENS + position % PAGE_TOKENS) as i32,
                ]
            }));
            let (tiles, size) = match count <= kernels.few_tokens() {
                true => (&mut few, kernels.few_tokens()),
                false => (&mut many, kernels.many_tokens()),
            };
            for at in (0..count).step_by(size) {
                let numbers = [
                    sequence * count + at,
                    size.min(count - at),
                    held + at,
                    first,
                    sequence * count,
                ];
                tiles.extend(numbers.map(|number| number as i32));
            }
        }
        let mut all: Vec<i32> = Vec::new();
        let mut put = |numbers: &[i32]| {
            all.extend(numbers);
            (all.len() - numbers.len(), numbers.len())
        };
        let ranges = [put(&places), put(&few), put(&many), put(&table)];
        let bytes: Vec<u8> = all.iter().flat_map(|number| number.to_le_bytes()).collect();
        let buffer = Buffer::of(gpu, &bytes)?;
        let [places, few, many, table] = ranges.map(|(at, count)| Numbers {
            buffer: &buffer,
            at,
            count,
        });
        let parts = mlx_pipe_cuda::parts(held + count);
        let tiles = Tiles {
            few,
            many,
            table,
            parts,
            few_tokens: rows,
        };
        let width = heads.queries * heads.dim;
        let queries = pattern(gpu, rows * width * 2)?;
        let out = pattern(gpu, rows * width * 2)?;
        let partial = Buffer::zeroed(gpu, mlx_pipe_cuda::partial_bytes(heads, rows, parts))?;
        let arrived = Buffer::zeroed(gpu, 1 << 16)?;
        let work = AttendWork {
            partial: &partial,
            arrived: &arrived,
        };
        let attend = time(gpu, |_| {
            kernels.attend(&queries, &pools, tiles, work, &out, rows)
        })?;
        let qkv = pattern(gpu, rows * heads.qkv_width() * 2)?;
        let norm = pattern(gpu, shape.hidden * 2)?;
        let frequencies = pattern(gpu, heads.dim * 4)?;
        let rotation = Rotation {
            norms: Some((&norm, &norm)),
            eps: 1e-6,
            frequencies: &frequencies,
            places,
        };
        let rotate = time(gpu, |_| {
            kernels.rotate(&qkv, rotation, &queries, &pools, rows)
        })?;
        println!(
            "{sequences} x {count} after {held}: attend {attend:.1} us, rotate {rotate:.1} us"
        );
    }
    Ok(())
}

/// Layers as a decoding step has them, and what one takes less without some of its kernels.
fn layers(
    gpu: &Arc<Gpu>,
    kernels: &Kernels,
    heads: Heads,
    shape: &Shape,
    format: Format,
) -> Result<()> {
    let (count, held) = (LAYERS, 640);
    let width = heads.queries * heads.dim;
    let weights = (0..count)
        .map(|_| {
            Ok([
                weight(gpu, format, heads.qkv_width(), shape.hidden)?,
                weight(gpu, format, shape.hidden, width)?,
                weight(gpu, format, 2 * shape.mlp, shape.hidden)?,
                weight(gpu, format, shape.hidden, shape.mlp)?,
            ])
        })
        .collect::<Result<Vec<_>>>()?;
    let pages = 16;
    let pool = heads.kv * heads.dim * PAGE_TOKENS * 2 * pages;
    let pools = (0..count)
        .map(|_| {
            Ok(Pools {
                keys: pattern(gpu, pool)?,
                values: pattern(gpu, pool)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let numbers: Vec<i32> = [held as i32, held as i32, 0, 1, held as i32, 0, 0]
        .into_iter()
        .chain(0..pages as i32)
        .collect();
    let bytes: Vec<u8> = numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect();
    let buffer = Buffer::of(gpu, &bytes)?;
    let part = |at, count| Numbers {
        buffer: &buffer,
        at,
        count,
    };
    let parts = mlx_pipe_cuda::parts(held + 1);
    let tiles = Tiles {
        few: part(2, 5),
        many: part(7, 0),
        table: part(7, pages),
        parts,
        few_tokens: 1,
    };
    let norm = pattern(gpu, shape.hidden * 2)?;
    let frequencies = pattern(gpu, heads.dim * 4)?;
    let rotation = Rotation {
        norms: Some((&norm, &norm)),
        eps: 1e-6,
        frequencies: &frequencies,
        places: part(0, 2),
    };
    let [x, normed, qkv, queries, attended, mlp] = [
        shape.hidden,
        shape.hidden,
        heads.qkv_width(),
        width,
        width,
        shape.mlp,
    ]
    .map(|width| pattern(gpu, width * 2));
    let (x, normed, qkv, queries, attended, mlp) = (x?, normed?, qkv?, queries?, attended?, mlp?);
    let partial = Buffer::zeroed(gpu, mlx_pipe_cuda::decode_partial_bytes(heads, parts))?;
    let arrived = Buffer::zeroed(gpu, 1 << 16)?;
    let work = AttendWork {
        partial: &partial,
        arrived: &arrived,
    };
    let normed_of = |weight| {
        Input::Normed(Normed {
            x: &x,
            weight,
            eps: 1e-6,
            rows: None,
            into: &normed,
        })
    };
    let names = [
        "nothing",
        "qkv_proj",
        "rotate",
        "attend",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    ];
    let all: Vec<LayerOperands> = weights
        .iter()
        .zip(&pools)
        .map(|(weights, pools)| LayerOperands {
            weights: weights.each_ref(),
            norms: [&norm, &norm],
            qk_norms: Some((&norm, &norm)),
            pools,
        })
        .collect();
    let progress = Buffer::zeroed(gpu, PROGRESS_BYTES)?;
    let decode_work = DecodeWork {
        x: &x,
        qkv: &qkv,
        attended: &attended,
        mlp: &mlp,
        attend: work,
        progress: &progress,
    };
    let bytes: usize = weights
        .iter()
        .flatten()
        .map(|weight| weight.codes.bytes() + weight.scales.as_ref().map_or(0, Buffer::bytes))
        .sum();
    let us = time(gpu, |_| kernels.decode(&all, rotation, tiles, decode_work))? / count as f64;
    println!(
        "a layer after {held} tokens, of {count} in one kernel: {us:.1} us, {:.0} GB/s of weights",
        bytes as f64 / count as f64 / us / 1e3
    );
    let mut whole = 0.0;
    for (left_out, name) in names.iter().enumerate() {
        let us = time(gpu, |index| {
            let layer = index % count;
            let [qkv_proj, o_proj, gate_up_proj, down_proj] = &weights[layer];
            if left_out != 1 {
                kernels.linear(qkv_proj, normed_of(&norm), 1, Epilogue::Plain, &qkv, false)?;
            }
            if left_out != 2 {
                kernels.rotate(&qkv, rotation, &queries, &pools[layer], 1)?;
            }
            if left_out != 3 {
                kernels.attend(&queries, &pools[layer], tiles, work, &attended, 1)?;
            }
            if left_out != 4 {
                let of = Input::Plain(&attended);
                kernels.linear(o_proj, of, 1, Epilogue::Add(&x), &x, false)?;
            }
            if left_out != 5 {
                let of = normed_of(&norm);
                kernels.linear(gate_up_proj, of, 1, Epilogue::Gated, &mlp, false)?;
            }
            if left_out != 6 {
                let of = Input::Plain(&mlp);
                kernels.linear(down_proj, of, 1, Epilogue::Add(&x), &x, false)?;
            }
            Ok(())
        })?;
        match left_out {
            0 => {
                whole = us;
                println!("a layer after {held} tokens: {us:.1} us");
            }
            _ => println!("  {name}: {:.1} us", whole - us),
        }
    }
    Ok(())
}

/// Microseconds of one launch among many.
fn time(gpu: &Arc<Gpu>, launch: impl Fn(usize) -> Result<()>) -> Result<f64> {
    let recording = gpu.record(|| (0..LAUNCHES).try_for_each(&launch))?;
    recording.play()?;
    gpu.finish()?;
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        let began = Instant::now();
        recording.play()?;
        gpu.finish()?;
        times.push(began.elapsed().as_secs_f64() * 1e6 / LAUNCHES as f64);
    }
    times.sort_by(f64::total_cmp);
    times.get(REPEATS / 2).copied().context("there are times")
}

/// Bytes a second that are read and written, together.
fn copy_bandwidth(gpu: &Arc<Gpu>) -> Result<f64> {
    let bytes = 1 << 30;
    let (from, to) = (Buffer::zeroed(gpu, bytes)?, Buffer::zeroed(gpu, bytes)?);
    let us = time(gpu, |_| to.copy_from(0, &from, 0, bytes))?;
    Ok(2.0 * bytes as f64 / us * 1e6)
}

fn weight(gpu: &Arc<Gpu>, format: Format, outputs: usize, inputs: usize) -> Result<Weight> {
    let groups = outputs * inputs / format.group_size * 2;
    Ok(Weight {
        format,
        outputs,
        inputs,
        codes: pattern(gpu, outputs * inputs * format.bits / 8)?,
        scales: match format {
            Format::PLAIN => None,
            _ => Some(pattern(gpu, 2 * groups)?),
        },
        bias: None,
    })
}

/// Numbers without a pattern: as bf16 between 2^-3 and 2^-1.
fn pattern(gpu: &Arc<Gpu>, bytes: usize) -> Result<Buffer> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as u16
    };
    let numbers: Vec<u8> = (0..bytes.div_ceil(2).min(1 << 20))
        .flat_map(|_| {
            let bits = next();
            (0x3E00 | (bits & 0x80FF)).to_le_bytes()
        })
        .collect();
    let repeated: Vec<u8> = numbers.iter().copied().cycle().take(bytes).collect();
    Buffer::of(gpu, &repeated)
}
