//! Linear layers: blocks of sixteen rows of a weight times prepared rows.
//!
//! For every token and row of the weight, group by group in the order of the columns:
//! `y = fma(float(sum of codes * q), weight scale * row scale, y)`, then `y = fma(bias, row scale * sum of q, y)`; for
//! plain floats column by column `y = fma(x, w, y)`. The order is the same for one token and for many, so a token's
//! result does not depend on its neighbours, nor on threads, for a block is one thread's.

use crate::arch::{Kernel, LANES, QUAD_BYTES, Simd, VECTOR_BYTES};
use crate::isa::Isa;
use crate::math::{load_part, store_part, swiglu};
use crate::plain::Plain;
use crate::pool::Pool;
use crate::quantized::{FloatType, Quantized, UNIT_COLUMNS};
use crate::rows::{QuantizedRows, Rows, Wanted};
use std::mem::MaybeUninit;

/// Most tokens that go by a block at a time; a multiple of all tiles.
const CHUNK: usize = 64;

/// Fewest of them.
const SMALLEST_CHUNK: usize = 8;

/// Bytes of activations that go by a block at a time: half of a second cache, whose other half is for the block.
const CHUNK_BYTES: usize = 256 << 10;

/// How far ahead weights are asked for where few tokens use them.
const AHEAD_BYTES: usize = 4096;

/// Blocks that a chunk goes by before the next chunk comes, at most.
const BLOCKS_AT_ONCE: usize = 16;

/// Quads of four columns in the largest group.
const MOST_QUADS: usize = 128 / 4;

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
    let per_unit = match pool.threads() {
        1 => most,
        threads => places.len().div_ceil(threads * UNITS_PER_THREAD).min(most),
    };
    let per_unit = per_unit.max(1);
    pool.run(places.len().div_ceil(per_unit), &|unit| {
        let places = &places[unit * per_unit..];
        isa.run(Multiply {
            places: &places[..per_unit.min(places.len())],
            rows,
            residual,
            out: &out,
        });
    });
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

/// Block `block` of a weight times `count` rows from `first` on: `sums` is `[count, 16]`.
///
/// # Safety
/// The processor has `S`; the rows are prepared for the weight; `count` is at most [`CHUNK`].
#[inline(always)]
unsafe fn block_times_rows<S: Simd>(
    linear: &Linear,
    block: usize,
    rows: &Rows,
    first: usize,
    count: usize,
    sums: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match &linear.weight {
            Weight::Plain(weight) => {
                let rows = &rows.floats()[first * rows.width()..];
                plain_block::<S>(weight, block, rows, count, sums);
            }
            Weight::Quantized(weight) => {
                let rows = rows.quantized(weight.shape().group_size);
                let task = QuantizedBlock {
                    weight,
                    block: weight.block(block).as_ptr(),
                    rows,
                    first,
                    count,
                    sums,
                };
                task.run::<S>();
            }
        }
    }
}

/// Sixteen floats of a dtype.
///
/// # Safety
/// The processor has `S`; they can be read.
#[inline(always)]
unsafe fn load_floats<S: Simd>(from: *const u8, float_type: FloatType) -> S::F {
    // SAFETY: the caller's promise.
    unsafe {
        match float_type {
            FloatType::F32 => S::load(from.cast()),
            FloatType::F16 => S::load_f16(from.cast()),
            FloatType::Bf16 => S::load_bf16(from.cast()),
        }
    }
}

#[derive(Clone, Copy)]
struct QuantizedBlock<'a> {
    weight: &'a Quantized,
    block: *const u8,
    rows: &'a QuantizedRows,
    first: usize,
    count: usize,
    sums: *mut f32,
}

impl QuantizedBlock<'_> {
    /// # Safety
    /// The processor has `S`; the pointers are good.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match (self.weight.shape().bits, self.count) {
                (8, _) => self.in_tiles::<S, 8>(),
                (4, _) => self.in_tiles::<S, 4>(),
                (2, 1) => self.tile::<S, 2, 1>(0),
                (3, 1) => self.tile::<S, 3, 1>(0),
                (5, 1) => self.tile::<S, 5, 1>(0),
                (6, 1) => self.tile::<S, 6, 1>(0),
                _ => self.unpacked_once::<S>(),
            }
        }
    }

    /// Tile after tile. Codes of 8 and 4 bits are unpacked by few enough instructions to do it for each tile anew, which
    /// spares writing them to memory and keeps the totals in registers.
    #[inline(always)]
    unsafe fn in_tiles<S: Simd, const BITS: usize>(self) {
        let mut token = 0;
        while token < self.count {
            let left = self.count - token;
            // SAFETY: as many tokens are left.
            unsafe {
                token += if S::TILE >= 8 && left >= 8 {
                    self.tile::<S, BITS, 8>(token);
                    8
                } else if S::TILE >= 4 && left >= 4 {
                    self.tile::<S, BITS, 4>(token);
                    4
                } else if left >= 2 {
                    self.tile::<S, BITS, 2>(token);
                    2
                } else {
                    self.tile::<S, BITS, 1>(token);
                    1
                };
            }
        }
    }

    /// The quads of a token and those behind it in its tile, and the bytes from a quad to the next.
    #[inline(always)]
    unsafe fn quads<S: Simd>(&self, group: usize, token: usize) -> (*const u8, usize) {
        let (first, in_tile) = QuantizedRows::tile::<S>(self.count, token);
        let at = group * self.rows.tokens + self.first + first;
        // SAFETY: a group of a token of the rows; a chunk begins with a tile.
        let quads = unsafe {
            let tile = self.rows.quads.as_ptr().add(at * self.rows.group_bytes());
            tile.add((token - first) * QUAD_BYTES)
        };
        (quads, in_tile * QUAD_BYTES)
    }

    /// All groups of as many tokens as the registers hold the sums of. Codes are used where they are unpacked.
    #[inline(always)]
    unsafe fn tile<S: Simd, const BITS: usize, const TOKENS: usize>(&self, token: usize) {
        let shape = *self.weight.shape();
        // SAFETY: all groups of the block, and all places of the rows, are inside of their buffers.
        unsafe {
            let mut totals = [S::splat(0.0); TOKENS];
            for group in 0..shape.groups() {
                let codes = self.block.add(group * shape.group_bytes());
                let (quads, stride) = self.quads::<S>(group, token);
                // A whole tile is the usual one: its stride is known while this is compiled.
                let stride = match TOKENS == S::TILE {
                    true => TOKENS * QUAD_BYTES,
                    false => stride,
                };
                let mut sums = [S::no_sum(); TOKENS];
                if TOKENS <= 2 {
                    // The memory's pace counts here, and processors look ahead less far than it takes.
                    for line in (0..shape.group_bytes()).step_by(VECTOR_BYTES) {
                        S::prefetch(codes.wrapping_add(AHEAD_BYTES + line));
                    }
                }
                for unit in 0..shape.group_size / UNIT_COLUMNS {
                    let dot = Dot::<S, TOKENS> {
                        sums: &mut sums,
                        quads: quads.add(unit * UNIT_COLUMNS / 4 * stride),
                        stride,
                    };
                    unpack::<S, BITS>(codes.add(unit * BITS * VECTOR_BYTES), dot);
                }
                self.scale::<S, TOKENS>(group, token, self.scales::<S>(group), sums, &mut totals);
            }
            for (index, total) in totals.into_iter().enumerate() {
                S::store(self.sums.add((token + index) * LANES), total);
            }
        }
    }

    /// Any number of tokens: a group's codes are unpacked once for all.
    #[inline(always)]
    unsafe fn unpacked_once<S: Simd>(self) {
        let shape = *self.weight.shape();
        let mut unpacked = [const { MaybeUninit::<S::Codes>::uninit() }; MOST_QUADS];
        // SAFETY: as above; a group has at most `MOST_QUADS` quads, and those it has are written first.
        unsafe {
            for token in 0..self.count {
                S::store(self.sums.add(token * LANES), S::splat(0.0));
            }
            for group in 0..shape.groups() {
                let codes = self.block.add(group * shape.group_bytes());
                for unit in 0..shape.group_size / UNIT_COLUMNS {
                    let to = &mut unpacked[unit * UNIT_COLUMNS / 4..][..UNIT_COLUMNS / 4];
                    unpack_any::<S>(shape.bits, codes.add(unit * shape.unit_bytes()), to);
                }
                let unpacked = unpacked.as_ptr().cast::<S::Codes>();
                let scales = self.scales::<S>(group);
                let mut token = 0;
                while token < self.count {
                    let left = self.count - token;
                    token += if S::TILE >= 8 && left >= 8 {
                        self.unpacked_tile::<S, 8>(group, token, unpacked, scales)
                    } else if S::TILE >= 4 && left >= 4 {
                        self.unpacked_tile::<S, 4>(group, token, unpacked, scales)
                    } else if left >= 2 {
                        self.unpacked_tile::<S, 2>(group, token, unpacked, scales)
                    } else {
                        self.unpacked_tile::<S, 1>(group, token, unpacked, scales)
                    };
                }
            }
        }
    }

    /// One group of some tokens, with codes unpacked before. The number of tokens.
    #[inline(always)]
    unsafe fn unpacked_tile<S: Simd, const TOKENS: usize>(
        &self,
        group: usize,
        token: usize,
        unpacked: *const S::Codes,
        scales: [S::F; 2],
    ) -> usize {
        // SAFETY: as above.
        unsafe {
            let (mut quads, stride) = self.quads::<S>(group, token);
            let mut sums = [S::no_sum(); TOKENS];
            for quad in 0..self.rows.group_size / 4 {
                let codes = *unpacked.add(quad);
                for (token, sum) in sums.iter_mut().enumerate() {
                    *sum = S::dot(*sum, codes, quads.add(token * QUAD_BYTES));
                }
                quads = quads.add(stride);
            }
            let at = self.sums.add(token * LANES);
            let mut totals = [S::splat(0.0); TOKENS];
            for (token, total) in totals.iter_mut().enumerate() {
                *total = S::load(at.add(token * LANES));
            }
            self.scale::<S, TOKENS>(group, token, scales, sums, &mut totals);
            for (token, total) in totals.into_iter().enumerate() {
                S::store(at.add(token * LANES), total);
            }
        }
        TOKENS
    }

    /// The scales and the biases of a group's rows.
    #[inline(always)]
    unsafe fn scales<S: Simd>(&self, group: usize) -> [S::F; 2] {
        let shape = self.weight.shape();
        // SAFETY: as above.
        unsafe {
            let at = group * shape.group_bytes() + shape.codes_bytes();
            let floats = self.block.add(at);
            let biases = floats.add(LANES * shape.scale_type.bytes());
            [
                load_floats::<S>(floats, shape.scale_type),
                load_floats::<S>(biases, shape.scale_type),
            ]
        }
    }

    /// Adds a group's sums to the totals.
    #[inline(always)]
    unsafe fn scale<S: Simd, const TOKENS: usize>(
        &self,
        group: usize,
        token: usize,
        [scale, bias]: [S::F; 2],
        sums: [S::Sum; TOKENS],
        totals: &mut [S::F; TOKENS],
    ) {
        // SAFETY: as above.
        unsafe {
            let at = group * self.rows.tokens + self.first + token;
            let of_rows = self.rows.scales.as_ptr().add(at);
            for (token, (sum, total)) in sums.into_iter().zip(totals).enumerate() {
                let [row_scale, row_sum, quanta] = *of_rows.add(token);
                let factor = S::mul(scale, S::splat(row_scale));
                *total = S::mul_add(S::finish(sum, quanta), factor, *total);
                *total = S::mul_add(bias, S::splat(row_sum), *total);
            }
        }
    }
}

/// Where unpacked quads go. No closure: it has to be compiled into what calls it, for the instruction set.
trait TakeQuads<S: Simd> {
    /// # Safety
    /// The processor has `S`.
    unsafe fn take(&mut self, quad: usize, codes: S::Codes);
}

/// Multiplies each with the rows of some tokens at once.
struct Dot<'a, S: Simd, const TOKENS: usize> {
    sums: &'a mut [S::Sum; TOKENS],
    quads: *const u8,
    stride: usize,
}

impl<S: Simd, const TOKENS: usize> TakeQuads<S> for Dot<'_, S, TOKENS> {
    #[inline(always)]
    unsafe fn take(&mut self, quad: usize, codes: S::Codes) {
        for token in 0..TOKENS {
            // SAFETY: `quads` has a unit's quads of a tile of `TOKENS`.
            unsafe {
                let quad = self.quads.add(quad * self.stride + token * QUAD_BYTES);
                self.sums[token] = S::dot(self.sums[token], codes, quad);
            }
        }
    }
}

/// Keeps them for later.
struct Write<'a, S: Simd>(&'a mut [MaybeUninit<S::Codes>]);

impl<S: Simd> TakeQuads<S> for Write<'_, S> {
    #[inline(always)]
    unsafe fn take(&mut self, quad: usize, codes: S::Codes) {
        self.0[quad].write(codes);
    }
}

/// Unpacks a unit of codes to memory.
///
/// # Safety
/// The processor has `S`; `unit` is a unit of codes of `bits` bits.
#[inline(always)]
unsafe fn unpack_any<S: Simd>(bits: usize, unit: *const u8, to: &mut [MaybeUninit<S::Codes>]) {
    let write = Write::<S>(to);
    // SAFETY: the caller's promise.
    unsafe {
        match bits {
            2 => unpack::<S, 2>(unit, write),
            3 => unpack::<S, 3>(unit, write),
            4 => unpack::<S, 4>(unit, write),
            5 => unpack::<S, 5>(unit, write),
            6 => unpack::<S, 6>(unit, write),
            _ => unpack::<S, 8>(unit, write),
        }
    }
}

/// Hands over the eight quads of a unit's codes, in the order of the columns.
///
/// # Safety
/// The processor has `S`; `unit` is a unit of codes of `BITS` bits.
#[inline(always)]
unsafe fn unpack<S: Simd, const BITS: usize>(unit: *const u8, mut to: impl TakeQuads<S>) {
    // SAFETY: the caller's promise.
    unsafe {
        match BITS {
            8 => {
                to.take(0, S::codes(S::load_words(unit.add(0 * VECTOR_BYTES))));
                to.take(1, S::codes(S::load_words(unit.add(1 * VECTOR_BYTES))));
                to.take(2, S::codes(S::load_words(unit.add(2 * VECTOR_BYTES))));
                to.take(3, S::codes(S::load_words(unit.add(3 * VECTOR_BYTES))));
                to.take(4, S::codes(S::load_words(unit.add(4 * VECTOR_BYTES))));
                to.take(5, S::codes(S::load_words(unit.add(5 * VECTOR_BYTES))));
                to.take(6, S::codes(S::load_words(unit.add(6 * VECTOR_BYTES))));
                to.take(7, S::codes(S::load_words(unit.add(7 * VECTOR_BYTES))));
            }
            4 => {
                let [a, b] = S::codes_of_nibbles(S::load_words(unit.add(0 * VECTOR_BYTES)));
                to.take(0, a);
                to.take(1, b);
                let [a, b] = S::codes_of_nibbles(S::load_words(unit.add(1 * VECTOR_BYTES)));
                to.take(2, a);
                to.take(3, b);
                let [a, b] = S::codes_of_nibbles(S::load_words(unit.add(2 * VECTOR_BYTES)));
                to.take(4, a);
                to.take(5, b);
                let [a, b] = S::codes_of_nibbles(S::load_words(unit.add(3 * VECTOR_BYTES)));
                to.take(6, a);
                to.take(7, b);
            }
            _ => {
                to.take(0, planes::<S, BITS>(unit, 0));
                to.take(1, planes::<S, BITS>(unit, 1));
                to.take(2, planes::<S, BITS>(unit, 2));
                to.take(3, planes::<S, BITS>(unit, 3));
                to.take(4, planes::<S, BITS>(unit, 4));
                to.take(5, planes::<S, BITS>(unit, 5));
                to.take(6, planes::<S, BITS>(unit, 6));
                to.take(7, planes::<S, BITS>(unit, 7));
            }
        }
    }
}

/// Quad `quad` of a unit of codes of 2, 3, 5 or 6 bits.
///
/// # Safety
/// As [`unpack`].
#[inline(always)]
unsafe fn planes<S: Simd, const BITS: usize>(unit: *const u8, quad: usize) -> S::Codes {
    // SAFETY: the caller's promise.
    unsafe {
        let low_bits = match BITS {
            2 | 3 => 2,
            _ => 4,
        };
        let low_vectors = low_bits;
        let of_low = 8 / low_bits;
        let low = S::load_words(unit.add(quad / of_low * VECTOR_BYTES));
        let low = S::shift_right(low, (low_bits * (quad % of_low)) as u32);
        let low = S::and(low, 0x0101_0101 * ((1 << low_bits) - 1));
        let high_bits = BITS - low_bits;
        if high_bits == 0 {
            return S::codes(low);
        }
        let of_high = 8 / high_bits;
        let high = S::load_words(unit.add((low_vectors + quad / of_high) * VECTOR_BYTES));
        let high = S::shift_right(high, (high_bits * (quad % of_high)) as u32);
        let high = S::and(high, 0x0101_0101 * ((1 << high_bits) - 1));
        S::codes(S::or(low, S::shift_left(high, low_bits as u32)))
    }
}

/// Block `block` of floats times `count` rows (`[count, inputs]`): `sums` is `[count, 16]`.
///
/// # Safety
/// The processor has `S`; `rows` has `count` rows of as many columns as the weight, and `sums` room for them.
#[inline(always)]
unsafe fn plain_block<S: Simd>(
    weight: &Plain,
    block: usize,
    rows: &[f32],
    count: usize,
    sums: *mut f32,
) {
    let weights = weight.block(block).as_ptr();
    let (width, float_type) = (weight.shape().inputs, weight.shape().float_type);
    // SAFETY: the caller's promise.
    unsafe {
        let mut token = 0;
        while token < count {
            let rows = rows.as_ptr().add(token * width);
            let sums = sums.add(token * LANES);
            token += match S::TILE.min(count - token) {
                8.. => plain_tile::<S, 8>(weights, float_type, rows, width, sums),
                4.. => plain_tile::<S, 4>(weights, float_type, rows, width, sums),
                2.. => plain_tile::<S, 2>(weights, float_type, rows, width, sums),
                _ => plain_tile::<S, 1>(weights, float_type, rows, width, sums),
            };
        }
    }
}

/// # Safety
/// As [`plain_block`], for `TOKENS` rows.
#[inline(always)]
unsafe fn plain_tile<S: Simd, const TOKENS: usize>(
    weights: *const u8,
    float_type: FloatType,
    rows: *const f32,
    width: usize,
    sums: *mut f32,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let totals = match float_type {
            FloatType::F32 => plain_sums::<S, TOKENS>(weights, FloatType::F32, rows, width),
            FloatType::F16 => plain_sums::<S, TOKENS>(weights, FloatType::F16, rows, width),
            FloatType::Bf16 => plain_sums::<S, TOKENS>(weights, FloatType::Bf16, rows, width),
        };
        for (token, total) in totals.into_iter().enumerate() {
            S::store(sums.add(token * LANES), total);
        }
    }
    TOKENS
}

/// # Safety
/// As [`plain_tile`].
#[inline(always)]
unsafe fn plain_sums<S: Simd, const TOKENS: usize>(
    weights: *const u8,
    float_type: FloatType,
    rows: *const f32,
    width: usize,
) -> [S::F; TOKENS] {
    let column_bytes = LANES * float_type.bytes();
    // SAFETY: the caller's promise.
    unsafe {
        let mut totals = [S::splat(0.0); TOKENS];
        for column in 0..width {
            let weights = load_floats::<S>(weights.add(column * column_bytes), float_type);
            for (token, total) in totals.iter_mut().enumerate() {
                let x = S::splat(*rows.add(token * width + column));
                *total = S::mul_add(x, weights, *total);
            }
        }
        totals
    }
}
