//! What kernels compute with: weights, the numbers of a step, pages, and the memory that they work in.

use crate::device::Buffer;
use crate::program::{Format, Heads, PAGE_TOKENS};
use anyhow::{Result, ensure};

/// Bytes of an element of activations.
pub const ELEMENT_BYTES: usize = 2;
/// Numbers of a tile (`TILE` of the kernels).
pub const TILE: usize = 5;
/// Pages of a part of attention (`PART` of the kernels).
pub(crate) const PART_PAGES: usize = 4;
/// Thread blocks that look for the best logit of a row.
pub(crate) const BEST_PARTS: usize = 32;

/// A weight `[outputs, inputs]` on the GPU.
#[derive(Debug)]
pub struct Weight {
    /// What it is made of.
    pub format: Format,
    /// Rows, a multiple of 16.
    pub outputs: usize,
    /// Width of a row, a multiple of the format's block.
    pub inputs: usize,
    /// Codes or elements, as [`crate::arrange_codes`] lays them out.
    pub codes: Buffer,
    /// A scale and a bias for each group, as [`crate::arrange_scales`] lays them out; unless plain.
    pub scales: Option<Buffer>,
    /// A bias for each output.
    pub bias: Option<Buffer>,
}

impl Weight {
    /// Whether its buffers have what its sizes say, and there are kernels for them.
    pub(crate) fn check(&self) -> Result<()> {
        let elements = self.outputs * self.inputs;
        let groups = elements / self.format.group_size;
        ensure!(
            self.format.is_supported()
                && self.outputs.is_multiple_of(16)
                && self.inputs.is_multiple_of(self.format.group_size)
                && self.codes.bytes() >= elements * self.format.bits / 8,
            "a weight of {} x {} in {:?} has no kernels",
            self.outputs,
            self.inputs,
            self.format
        );
        if self.format != Format::PLAIN {
            let bytes = self.scales.as_ref().map_or(0, Buffer::bytes);
            ensure!(
                bytes >= groups * 2 * ELEMENT_BYTES,
                "a weight without scales and biases"
            );
        }
        if let Some(bias) = &self.bias {
            ensure!(
                bias.bytes() >= self.outputs * ELEMENT_BYTES,
                "a bias that is too short"
            );
        }
        Ok(())
    }
}

/// What a linear layer multiplies.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// `[rows, inputs]`
    Plain(&'a Buffer),
    /// What is made of it first.
    Normed(Normed<'a>),
}

/// `x[i] / rms(x[i]) * weight`, or of row `rows[i]`.
#[derive(Debug, Clone, Copy)]
pub struct Normed<'a> {
    /// `[rows, inputs]`
    pub x: &'a Buffer,
    /// `[inputs]`
    pub weight: &'a Buffer,
    /// Added to the mean square.
    pub eps: f32,
    /// Which rows of `x`. That it has them is the caller's to see to.
    pub rows: Option<Numbers<'a>>,
    /// Memory for `[rows, inputs]`, where the normed rows may be put.
    pub into: &'a Buffer,
}

impl Normed<'_> {
    /// Whether its buffers have `count` rows of `width`.
    pub(crate) fn check(&self, count: usize, width: usize) -> Result<()> {
        let bytes = width * ELEMENT_BYTES;
        ensure!(self.weight.bytes() >= bytes, "a norm that is too short");
        ensure!(
            self.rows.is_some() || self.x.bytes() >= count * bytes,
            "x is too short"
        );
        Ok(())
    }

    /// The address of the rows' numbers, 0 without.
    pub(crate) fn row_numbers(&self, count: usize) -> Result<u64> {
        self.rows.map_or(Ok(0), |rows| rows.address(count))
    }
}

/// What is done with the sums of a linear layer.
#[derive(Debug, Clone, Copy)]
pub enum Epilogue<'a> {
    /// They are written as they are.
    Plain,
    /// `[rows, outputs]` is added to them. May be the output itself.
    Add(&'a Buffer),
    /// Rows of the weight come as eight of a gate and eight of the other factor; `silu(gate) * other` is written,
    /// `[rows, outputs / 2]`.
    Gated,
}

/// Numbers of a step, in one buffer.
#[derive(Debug, Clone, Copy)]
pub struct Numbers<'a> {
    /// All of them, i32.
    pub buffer: &'a Buffer,
    /// Where these begin, in numbers.
    pub at: usize,
    /// How many they are.
    pub count: usize,
}

impl Numbers<'_> {
    /// Where they are, if they are at least so many.
    pub(crate) fn address(&self, wanted: usize) -> Result<u64> {
        ensure!(
            self.count >= wanted && (self.at + self.count) * 4 <= self.buffer.bytes(),
            "{} numbers at {} of {} bytes, where {wanted} are needed",
            self.count,
            self.at,
            self.buffer.bytes()
        );
        Ok(self.buffer.address() + self.at as u64 * 4)
    }
}

/// Keys and values of one layer, in pages.
#[derive(Debug)]
pub struct Pools {
    /// `[pages, kv heads, PAGE_TOKENS, head_dim]`
    pub keys: Buffer,
    /// `[pages, kv heads, head_dim, PAGE_TOKENS]`
    pub values: Buffer,
}

/// What the norms and rotation of queries and keys need, of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// Weights of the norms of queries and keys over a head, where there are some.
    pub norms: Option<(&'a Buffer, &'a Buffer)>,
    /// Added to the mean square.
    pub eps: f32,
    /// Radians by which a position turns each pair of a head, f32.
    pub frequencies: &'a Buffer,
    /// `[rows, 2]`: position of each token, and its place in the pools (page * PAGE_TOKENS + place in it).
    pub places: Numbers<'a>,
}

/// Which tokens attend to which pages.
#[derive(Debug, Clone, Copy)]
pub struct Tiles<'a> {
    /// `[tiles, TILE]`: the first token's row, tokens (at most [`crate::Kernels::few_tokens`]), the first one's position,
    /// where its sequence's pages begin in `table`, tokens of few tiles before it.
    pub few: Numbers<'a>,
    /// The same, of at most [`crate::Kernels::many_tokens`] tokens.
    pub many: Numbers<'a>,
    /// Pages of sequences.
    pub table: Numbers<'a>,
    /// Parts of the longest sequence in `few`: [`parts`] of its tokens.
    pub parts: usize,
    /// Tokens of tiles of few.
    pub few_tokens: usize,
}

/// Parts into which attention to so many tokens is cut.
pub fn parts(tokens: usize) -> usize {
    tokens.div_ceil(PART_PAGES * PAGE_TOKENS)
}

/// Memory that attention works in.
#[derive(Debug, Clone, Copy)]
pub struct AttendWork<'a> {
    /// [`partial_bytes`].
    pub partial: &'a Buffer,
    /// [`arrived_bytes`], all zero before; and after.
    pub arrived: &'a Buffer,
}

/// Bytes of counters for so many tiles of few.
pub fn arrived_bytes(heads: Heads, tiles: usize) -> usize {
    tiles * heads.kv * 4
}

/// Bytes of the partial results of attention, for so many tokens in steps of few.
pub fn partial_bytes(heads: Heads, tokens: usize, parts: usize) -> usize {
    tokens * heads.queries * parts * (heads.dim + 2) * 4
}

/// The largest logit of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Best {
    /// The logit.
    pub logit: f32,
    /// Its place, the first of equals; `None` if one of the row's logits is not a number.
    pub token: Option<u32>,
}

impl Best {
    /// Bytes of one on the GPU.
    pub const BYTES: usize = 8;

    /// Out of its bytes.
    pub fn from_bytes(bytes: [u8; 8]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            logit: f32::from_le_bytes([a, b, c, d]),
            token: u32::try_from(i32::from_le_bytes([e, f, g, h])).ok(),
        }
    }
}

/// Bytes of memory that [`crate::Kernels::best`] works in, for so many rows.
pub fn best_bytes(rows: usize) -> usize {
    rows * BEST_PARTS * Best::BYTES
}
