//! The rows that a linear layer multiplies its weight with: normalised, and quantised for every group size
//! that the weights have.
//!
//! A group of a row becomes whole numbers `q` of at most ±[`LARGEST_QUANTUM`] and one scale: `x = scale * q`, with an
//! error of at most half a scale, 1.5e-5 of the group's largest element. The products with codes are then exact
//! integers, in any order; and a row's numbers depend on the row alone.

use crate::arch::{Kernel, LANES, LARGEST_QUANTUM, QUAD_BYTES, Simd};
use crate::isa::Isa;
use crate::math::{inverse_rms, load_part, scale_to, store_part, whole_numbers};
use crate::pool::Pool;

/// The largest tile, and a multiple of all.
pub(crate) const MOST_TILE: usize = 8;

/// Elements that are worth the attention of several threads.
const WORTH_SHARING: usize = 8192;

/// An RMS norm.
#[derive(Debug)]
pub struct Norm {
    /// `[width]`
    pub weight: Vec<f32>,
    /// Added to the mean of the squares.
    pub eps: f32,
}

/// Rows quantised in groups of one size.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    /// Columns of a group.
    pub(crate) group_size: usize,
    /// Rows.
    pub(crate) tokens: usize,
    /// Groups, of tiles of [`Simd::TILE`] tokens (the last one of what is left), of quads of four columns, of the tile's
    /// tokens: what is multiplied together lies together. Were the tokens a group's bytes apart, a power of two,
    /// the loads of a tile would get in one another's way.
    pub(crate) quads: Vec<u8>,
    /// `[groups, tokens]` of scale, scale times the sum of the whole numbers, and that sum.
    pub(crate) scales: Vec<[f32; 3]>,
}

impl QuantizedRows {
    /// Bytes of a group of a row.
    pub(crate) fn group_bytes(&self) -> usize {
        self.group_size / 4 * QUAD_BYTES
    }

    /// The tile of a token: its first token, and how many it has.
    #[inline(always)]
    pub(crate) fn tile<S: Simd>(tokens: usize, token: usize) -> (usize, usize) {
        let first = token / S::TILE * S::TILE;
        (first, S::TILE.min(tokens - first))
    }

    fn resize(&mut self, group_size: usize, tokens: usize, width: usize) {
        self.group_size = group_size;
        self.tokens = tokens;
        let groups = width / group_size;
        self.quads.resize(groups * tokens * self.group_bytes(), 0);
        self.scales.resize(groups * tokens, [0.0; 3]);
    }
}

/// What weights want of the rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The rows as floats.
    pub floats: bool,
    /// The group sizes to quantise them for, each once.
    pub group_sizes: Vec<usize>,
}

/// Rows, ready. Kept and used again, for its memory.
#[derive(Debug, Default)]
pub struct Rows {
    tokens: usize,
    width: usize,
    /// `[tokens, width]`, if wanted or normalised.
    floats: Vec<f32>,
    quantized: Vec<QuantizedRows>,
}

impl Rows {
    /// Makes the rows of `x`, `[tokens, width]`, ready.
    ///
    /// # Panics
    /// A group size that does not divide the width, or a norm of another width.
    pub fn prepare(
        &mut self,
        (isa, pool): (Isa, &Pool),
        x: &[f32],
        width: usize,
        norm: Option<&Norm>,
        wanted: &Wanted,
    ) {
        self.tokens = x.len() / width;
        self.width = width;
        assert_eq!(x.len(), self.tokens * width);
        assert!(norm.is_none_or(|norm| norm.weight.len() == width));
        let rows = match norm {
            None if !wanted.floats => x,
            _ => {
                self.floats.resize(x.len(), 0.0);
                let floats = Floats(self.floats.as_mut_ptr());
                pool.run(self.tokens, &|token| {
                    isa.run(PrepareRow {
                        x: &x[token * width..][..width],
                        norm,
                        token,
                        floats: &floats,
                    });
                });
                &self.floats[..x.len()]
            }
        };
        let quantized = &mut self.quantized;
        quantized.resize_with(wanted.group_sizes.len(), Default::default);
        for (rows, &group_size) in quantized.iter_mut().zip(&wanted.group_sizes) {
            assert!(width.is_multiple_of(group_size) && group_size.is_multiple_of(LANES));
            rows.resize(group_size, self.tokens, width);
        }
        let destinations = Destinations {
            tokens: self.tokens,
            quantized: quantized
                .iter_mut()
                .map(|rows| Destination {
                    group_size: rows.group_size,
                    group_bytes: rows.group_bytes(),
                    quads: rows.quads.as_mut_ptr(),
                    scales: rows.scales.as_mut_ptr(),
                })
                .collect(),
        };
        // Tokens of a tile lie together in lines of memory, which threads had better not share. So where there are
        // too few tiles, threads share the columns.
        let chunks = self.tokens.div_ceil(MOST_TILE);
        let parts = match pool.limited_threads() {
            threads if chunks < threads && x.len() >= WORTH_SHARING => threads,
            _ => 1,
        };
        pool.run(chunks * parts, &|unit| {
            isa.run(QuantizePart {
                rows,
                width,
                first: unit / parts * MOST_TILE,
                part: unit % parts,
                parts,
                destinations: &destinations,
            });
        });
    }

    /// Rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// `[tokens, width]`; there if wanted.
    pub(crate) fn floats(&self) -> &[f32] {
        &self.floats[..self.tokens * self.width]
    }

    /// The rows in groups of that size; there if wanted.
    pub(crate) fn quantized(&self, group_size: usize) -> &QuantizedRows {
        let found = self
            .quantized
            .iter()
            .find(|rows| rows.group_size == group_size);
        found.expect("prepared for all group sizes of the weights")
    }
}

/// Where one group size's numbers go.
struct Destination {
    group_size: usize,
    group_bytes: usize,
    quads: *mut u8,
    scales: *mut [f32; 3],
}

/// Where all group sizes' numbers go: a group of a tile by one thread.
struct Destinations {
    tokens: usize,
    quantized: Vec<Destination>,
}

// SAFETY: the pointers are into vectors that `prepare` holds; every place is written by one thread only.
unsafe impl Sync for Destinations {}

/// Where floats go: a token's by one thread.
struct Floats(*mut f32);

// SAFETY: as above.
unsafe impl Sync for Floats {}

struct PrepareRow<'a> {
    x: &'a [f32],
    norm: Option<&'a Norm>,
    token: usize,
    floats: &'a Floats,
}

impl Kernel for PrepareRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the vectors have been made long enough for all tokens; the norm is as wide as `x`.
        unsafe {
            let own = self.floats.0.add(self.token * self.x.len());
            match self.norm {
                Some(norm) => normalise::<S>(self.x.as_ptr(), norm, own),
                None => std::ptr::copy_nonoverlapping(self.x.as_ptr(), own, self.x.len()),
            }
        }
    }
}

/// Some groups of at most [`MOST_TILE`] tokens, whole tiles or what is left.
struct QuantizePart<'a> {
    /// `[tokens, width]`
    rows: &'a [f32],
    width: usize,
    /// The first token.
    first: usize,
    /// Of so many parts of a row's groups.
    part: usize,
    parts: usize,
    destinations: &'a Destinations,
}

impl Kernel for QuantizePart<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let tokens = self.destinations.tokens;
        for to in &self.destinations.quantized {
            let groups = self.width / to.group_size;
            let border = |part: usize| groups * part / self.parts;
            for token in self.first..tokens.min(self.first + MOST_TILE) {
                let (first, in_tile) = QuantizedRows::tile::<S>(tokens, token);
                for group in border(self.part)..border(self.part + 1) {
                    // SAFETY: the vectors have been made long enough for all tokens.
                    unsafe {
                        let quads = to.quads.add((group * tokens + first) * to.group_bytes);
                        let quads = quads.add((token - first) * QUAD_BYTES);
                        let from = self.rows.as_ptr();
                        let from = from.add(token * self.width + group * to.group_size);
                        let stride = in_tile * QUAD_BYTES;
                        *to.scales.add(group * tokens + token) =
                            quantize::<S>(from, to.group_size, quads, stride);
                    }
                }
            }
        }
    }
}

/// `x / rms(x) * weight`.
///
/// # Safety
/// The processor has `S`; `x` and `out` are as long as the norm.
#[inline(always)]
pub(crate) unsafe fn normalise<S: Simd>(x: *const f32, norm: &Norm, out: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let width = norm.weight.len();
        let inverse = S::splat(inverse_rms::<S>(x, width, norm.eps));
        let mut at = 0;
        while at < width {
            let lanes = load_part::<S>(x.add(at), width - at);
            let weight = load_part::<S>(norm.weight.as_ptr().add(at), width - at);
            let normed = S::mul(S::mul(lanes, inverse), weight);
            store_part::<S>(out.add(at), width - at, normed);
            at += LANES;
        }
    }
}

/// Quantises a group; its scale, scale times the sum, and the sum. Elements that are no numbers make the scale none.
///
/// # Safety
/// The processor has `S`; `x` has `count` elements, a multiple of sixteen, and `quads` room for a quad every
/// `stride` bytes.
#[inline(always)]
unsafe fn quantize<S: Simd>(
    x: *const f32,
    count: usize,
    quads: *mut u8,
    stride: usize,
) -> [f32; 3] {
    // SAFETY: the caller's promise.
    unsafe {
        let (scale, inverse) = scale_to::<S>(x, count, LARGEST_QUANTUM);
        let mut sum = S::splat(0.0);
        for at in (0..count).step_by(LANES) {
            let whole = whole_numbers::<S>(S::load(x.add(at)), inverse, LARGEST_QUANTUM);
            sum = S::add(sum, whole);
            let mut packed = [[0u8; QUAD_BYTES]; LANES / 4];
            S::pack(whole, packed.as_mut_ptr().cast());
            for (quad, packed) in packed.into_iter().enumerate() {
                let to = quads.add((at / 4 + quad) * stride);
                to.cast::<[u8; QUAD_BYTES]>().write(packed);
            }
        }
        // Whole numbers below 2^24: exact in any order.
        let sum = S::sum(sum);
        [scale, scale * sum, sum]
    }
}
