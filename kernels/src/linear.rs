//! Linear layers: blocks of sixteen rows of one or several weights times prepared rows, with what is done to the
//! results on the way to memory: biases, gates, residuals.

use crate::ahead::multiply_and_learn;
use crate::arch::{Kernel, LANES, Simd};
use crate::block::block_times_rows;
use crate::isa::Isa;
use crate::math::{load_part, store_part, swiglu};
use crate::plain::Plain;
use crate::pool::Pool;
use crate::quantized::Quantized;
use crate::rows::{MOST_TILE, Rows, Wanted};
use std::mem::MaybeUninit;

/// Most tokens that go by a block at a time; a multiple of all tiles.
const CHUNK: usize = 64;

/// Fewest of them.
const SMALLEST_CHUNK: usize = MOST_TILE;

/// Bytes of activations that go by a block at a time: half of a second cache, whose other half is for the block.
const CHUNK_BYTES: usize = 256 << 10;

/// Blocks that a chunk goes by before the next chunk comes, at most.
const BLOCKS_AT_ONCE: usize = 16;

/// Units of work for each thread, so that one that is held up holds up little.
const UNITS_PER_THREAD: usize = 8;

/// A weight `[outputs, inputs]`.
#[derive(Debug)]
pub enum Weight {
    /// Codes with scales and biases.
    Quantized(Quantized),
    /// Floats.
    Plain(Plain),
}

/// `y = x W^T + b`.
#[derive(Debug)]
pub struct Linear {
    /// The weight.
    pub weight: Weight,
    /// `[outputs]`
    pub bias: Option<Vec<f32>>,
}

impl Linear {
    /// Rows of the weight.
    pub fn outputs(&self) -> usize {
        match &self.weight {
            Weight::Quantized(weight) => weight.shape().outputs,
            Weight::Plain(weight) => weight.shape().outputs,
        }
    }

    /// Columns of the weight.
    pub fn inputs(&self) -> usize {
        match &self.weight {
            Weight::Quantized(weight) => weight.shape().inputs,
            Weight::Plain(weight) => weight.shape().inputs,
        }
    }

    /// Row `row` of the weight, `[inputs]`.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        match &self.weight {
            Weight::Quantized(weight) => weight.row(row, out),
            Weight::Plain(weight) => weight.row(row, out),
        }
    }

    fn blocks(&self) -> usize {
        self.outputs().div_ceil(LANES)
    }
}

/// What these weights want of the rows they are multiplied with.
pub fn wanted<'a>(linears: impl IntoIterator<Item = &'a Linear>) -> Wanted {
    let mut wanted = Wanted::default();
    for linear in linears {
        match &linear.weight {
            Weight::Plain(_) => wanted.floats = true,
            Weight::Quantized(weight) => {
                let group_size = weight.shape().group_size;
                if !wanted.group_sizes.contains(&group_size) {
                    wanted.group_sizes.push(group_size);
                }
            }
        }
    }
    wanted
}

/// Several weights times the same rows, their results beside one another: `out` is `[tokens, all outputs]`;
/// `residual`, of the same shape, is added.
///
/// # Panics
/// Rows that were not prepared for these weights, or slices of other lengths.
pub fn multiply(
    (isa, pool): (Isa, &Pool),
    linears: &[&Linear],
    rows: &Rows,
    residual: Option<&[f32]>,
    out: &mut [f32],
) {
    let stride: usize = linears.iter().map(|linear| linear.outputs()).sum();
    assert_eq!(out.len(), rows.tokens() * stride);
    assert!(residual.is_none_or(|residual| residual.len() == out.len()));
    for linear in linears {
        check(linear, rows);
    }
    let mut places = Vec::new();
    let mut column = 0;
    for &linear in linears {
        places.extend((0..linear.blocks()).map(|block| Place {
            linear,
            up: None,
            block,
            column: column + block * LANES,
            width: LANES.min(linear.outputs() - block * LANES),
        }));
        column += linear.outputs();
    }
    multiply_places((isa, pool), &places, rows, residual, out);
}

/// `silu(x gate^T) * (x up^T)`, `[tokens, outputs]`.
///
/// # Panics
/// As [`multiply`]; weights of different shapes.
pub fn multiply_gated(
    (isa, pool): (Isa, &Pool),
    [gate, up]: [&Linear; 2],
    rows: &Rows,
    out: &mut [f32],
) {
    assert_eq!(gate.outputs(), up.outputs());
    assert_eq!(out.len(), rows.tokens() * gate.outputs());
    check(gate, rows);
    check(up, rows);
    let places = (0..gate.blocks()).map(|block| Place {
        linear: gate,
        up: Some(up),
        block,
        column: block * LANES,
        width: LANES.min(gate.outputs() - block * LANES),
    });
    multiply_places((isa, pool), &places.collect::<Vec<_>>(), rows, None, out);
}

/// Divides the places among the threads.
fn multiply_places(
    (isa, pool): (Isa, &Pool),
    places: &[Place],
    rows: &Rows,
    residual: Option<&[f32]>,
    out: &mut [f32],
) {
    let out = Out {
        stride: out.len() / rows.tokens().max(1),
        start: out.as_mut_ptr(),
    };
    let most = match rows.tokens() > SMALLEST_CHUNK {
        true => BLOCKS_AT_ONCE,
        false => places.len(),
    };
    let per_unit = match pool.limited_threads() {
        1 => most,
        threads => places.len().div_ceil(threads * UNITS_PER_THREAD).min(most),
    };
    let per_unit = per_unit.max(1);
    let multiply = || {
        pool.run(places.len().div_ceil(per_unit), &|unit| {
            let places = &places[unit * per_unit..];
            isa.run(Multiply {
                places: &places[..per_unit.min(places.len())],
                rows,
                residual,
                out: &out,
            });
        });
    };
    match places.first().map(|place| &place.linear.weight) {
        Some(Weight::Quantized(weight)) => {
            let sides = if places[0].up.is_some() { 2 } else { 1 };
            let bytes = sides * places.len() * weight.shape().block_bytes();
            multiply_and_learn(weight.shape().bits, rows.tokens(), bytes, multiply);
        }
        _ => multiply(),
    }
}

fn check(linear: &Linear, rows: &Rows) {
    assert_eq!(linear.inputs(), rows.width());
    assert!(
        linear
            .bias
            .as_ref()
            .is_none_or(|bias| bias.len() == linear.outputs())
    );
    match &linear.weight {
        Weight::Quantized(weight) => {
            let quantized = rows.quantized(weight.shape().group_size);
            assert_eq!(quantized.tokens, rows.tokens());
        }
        Weight::Plain(_) => assert_eq!(rows.floats().len(), rows.tokens() * rows.width()),
    }
}

/// A block of one of the weights, and where its results go.
struct Place<'a> {
    /// Of which the result is wanted, or the gate.
    linear: &'a Linear,
    /// What the gate is for.
    up: Option<&'a Linear>,
    block: usize,
    column: usize,
    /// Rows of the block that are the weight's.
    width: usize,
}

/// Where results are written: every column by one thread.
struct Out {
    start: *mut f32,
    stride: usize,
}

// SAFETY: the pointer is into a slice that the caller holds; blocks are units, and write columns of their own.
unsafe impl Sync for Out {}

struct Multiply<'a> {
    places: &'a [Place<'a>],
    rows: &'a Rows,
    residual: Option<&'a [f32]>,
    out: &'a Out,
}

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut sums = MaybeUninit::<[[f32; CHUNK * LANES]; 2]>::uninit();
        let sums = sums.as_mut_ptr().cast::<f32>();
        let tokens = self.rows.tokens();
        let chunk = CHUNK_BYTES / (2 * self.rows.width()) / SMALLEST_CHUNK * SMALLEST_CHUNK;
        let chunk = chunk.clamp(SMALLEST_CHUNK, CHUNK);
        for first in (0..tokens).step_by(chunk) {
            let count = chunk.min(tokens - first);
            for place in self.places {
                let sides = [Some(place.linear), place.up];
                // SAFETY: rows and weights match (`check`), and the sums have room for a chunk of both.
                unsafe {
                    for (side, linear) in sides.into_iter().flatten().enumerate() {
                        let sums = sums.add(side * CHUNK * LANES);
                        block_times_rows::<S>(linear, place.block, self.rows, first, count, sums);
                        if let Some(bias) = &linear.bias {
                            let bias = bias.as_ptr().add(place.block * LANES);
                            add_to_all::<S>(load_part::<S>(bias, place.width), sums, count);
                        }
                    }
                    self.write::<S>(place, first, count, sums);
                }
            }
        }
    }
}

impl Multiply<'_> {
    /// Writes the results of a chunk of rows.
    ///
    /// # Safety
    /// The processor has `S`; `sums` has `count` rows of sums, and as many of the other side `CHUNK` rows on.
    #[inline(always)]
    unsafe fn write<S: Simd>(&self, place: &Place, first: usize, count: usize, sums: *const f32) {
        // SAFETY: rows and columns are inside of `out` and `residual`.
        unsafe {
            for token in 0..count {
                let at = (first + token) * self.out.stride + place.column;
                let mut result = S::load(sums.add(token * LANES));
                if place.up.is_some() {
                    let up = S::load(sums.add((CHUNK + token) * LANES));
                    result = swiglu::<S>(result, up);
                }
                if let Some(residual) = self.residual {
                    let residual = load_part::<S>(residual.as_ptr().add(at), place.width);
                    result = S::add(residual, result);
                }
                store_part::<S>(self.out.start.add(at), place.width, result);
            }
        }
    }
}

/// Adds a bias to every row of sums.
///
/// # Safety
/// The processor has `S`; `sums` is `[count, 16]`.
#[inline(always)]
unsafe fn add_to_all<S: Simd>(bias: S::F, sums: *mut f32, count: usize) {
    for token in 0..count {
        // SAFETY: the caller's promise.
        unsafe {
            let sum = sums.add(token * LANES);
            S::store(sum, S::add(S::load(sum), bias));
        }
    }
}
