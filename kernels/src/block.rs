//! A block of sixteen rows of a weight times some rows: the inner loops.
//!
//! For every token and row of the weight, group by group in the order of the columns:
//! `y = fma(float(sum of codes * q), weight scale * row scale, y)`, then `y = fma(bias, row scale * sum of q, y)`; for
//! plain floats column by column `y = fma(x, w, y)`. The order is the same for one token and for many, so a token's
//! result does not depend on its neighbours, nor on threads, for a block is one thread's.

use crate::ahead::{Ask, asking};
use crate::arch::{LANES, QUAD_BYTES, Simd, VECTOR_BYTES};
use crate::linear::{Linear, Weight};
use crate::plain::Plain;
use crate::quantized::{FloatType, Quantized, UNIT_COLUMNS};
use crate::rows::{QuantizedRows, Rows};
use crate::unpack::{TakeQuads, unpack, unpack_any};
use std::mem::MaybeUninit;

/// Quads of four columns in the largest group.
const MOST_QUADS: usize = 128 / 4;

/// How far ahead a single tile asks for weights, into the first cache or the second: a little further than memory
/// takes, or far enough that the second one always has lines to wait for.
const NEAR_BYTES: usize = 4 << 10;
const FAR_BYTES: usize = 32 << 10;

/// Block `block` of a weight times `count` rows from `first` on: `sums` is `[count, 16]`.
///
/// # Safety
/// The processor has `S`; the rows are prepared for the weight; `sums` has room for `count` rows.
#[inline(always)]
pub unsafe fn block_times_rows<S: Simd>(
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

/// Lines of each group that are asked for so many bytes ahead.
#[derive(Clone, Copy)]
struct Ahead {
    ask: Ask,
    bytes: usize,
    first_line: usize,
    end_line: usize,
}

impl Ahead {
    /// Asks for what lies ahead of a group.
    #[inline(always)]
    fn ask_from<S: Simd>(self, group: *const u8) {
        for line in self.first_line..self.end_line {
            let line = group.wrapping_add(self.bytes + line * VECTOR_BYTES);
            // SAFETY: any address will do, and who holds this computes with `S`.
            unsafe {
                match self.ask {
                    Ask::Never => return,
                    Ask::Near => S::prefetch_near(line),
                    Ask::Far => S::prefetch_far(line),
                }
            }
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
                (2, 1) => self.only::<S, 2>(),
                (3, 1) => self.only::<S, 3>(),
                (5, 1) => self.only::<S, 5>(),
                (6, 1) => self.only::<S, 6>(),
                _ => self.unpacked_once::<S>(),
            }
        }
    }

    /// A single token.
    #[inline(always)]
    unsafe fn only<S: Simd, const BITS: usize>(self) {
        // SAFETY: there is one.
        unsafe { self.tile::<S, BITS, 1>(0, self.ahead::<S>(0)) };
    }

    /// Tile after tile. Codes of 8 and 4 bits are unpacked by few enough instructions to do it for each tile anew, which
    /// spares writing them to memory and keeps the totals in registers.
    #[inline(always)]
    unsafe fn in_tiles<S: Simd, const BITS: usize>(self) {
        let mut token = 0;
        while token < self.count {
            let left = self.count - token;
            let ahead = self.ahead::<S>(token);
            // SAFETY: as many tokens are left.
            unsafe {
                token += match S::TILE.min(left) {
                    8.. if S::TILE >= 8 => self.tile::<S, BITS, 8>(token, ahead),
                    7 if S::TILE >= 8 => self.tile::<S, BITS, 7>(token, ahead),
                    6 if S::TILE >= 8 => self.tile::<S, BITS, 6>(token, ahead),
                    5 if S::TILE >= 8 => self.tile::<S, BITS, 5>(token, ahead),
                    4.. if S::TILE >= 4 => self.tile::<S, BITS, 4>(token, ahead),
                    3 if S::TILE >= 4 => self.tile::<S, BITS, 3>(token, ahead),
                    2.. => self.tile::<S, BITS, 2>(token, ahead),
                    _ => self.tile::<S, BITS, 1>(token, ahead),
                };
            }
        }
    }

    /// What a tile asks for of the weights to come. A single tile goes by them once, at memory's pace, and asks for
    /// what it needs soon, where that helps; several share the next block, so that memory works while they compute.
    #[inline(always)]
    fn ahead<S: Simd>(&self, token: usize) -> Ahead {
        let shape = self.weight.shape();
        let lines = shape.group_bytes() / VECTOR_BYTES;
        let (tile, tiles) = (token / S::TILE, self.count.div_ceil(S::TILE));
        let (ask, bytes) = match tiles {
            1 => match asking(shape.bits, self.count) {
                ask @ Ask::Far => (ask, FAR_BYTES),
                ask => (ask, NEAR_BYTES),
            },
            _ => (Ask::Far, shape.block_bytes()),
        };
        Ahead {
            ask,
            bytes,
            first_line: tile * lines / tiles,
            end_line: (tile + 1) * lines / tiles,
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
    unsafe fn tile<S: Simd, const BITS: usize, const TOKENS: usize>(
        &self,
        token: usize,
        ahead: Ahead,
    ) -> usize {
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
                ahead.ask_from::<S>(codes);
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
        TOKENS
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
