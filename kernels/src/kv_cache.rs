//! Keys and values of one sequence in one layer, in blocks of 64 positions that begin at multiples of 64. In a block
//! sixteen positions of a key's column are one vector, and sixteen columns of a position's value, in the order in
//! which attention reads them.

use crate::arch::LANES;

/// Positions of a block.
pub const BLOCK_TOKENS: usize = 64;

/// Sizes of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Heads of the queries, a multiple of those of keys and values.
    pub head_count: usize,
    /// Heads of keys and values.
    pub kv_head_count: usize,
    /// Width of a head, even.
    pub head_dim: usize,
}

impl HeadShape {
    /// Columns of the projections to queries, keys and values beside one another.
    pub fn qkv_width(&self) -> usize {
        (self.head_count + 2 * self.kv_head_count) * self.head_dim
    }

    /// Columns of what attention gives.
    pub fn width(&self) -> usize {
        self.head_count * self.head_dim
    }

    /// Width of a head's values in the cache: whole vectors.
    pub(crate) fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Floats of a block's keys, `[kv_heads, 4, head_dim, 16 positions]`.
    pub(crate) fn keys_len(&self) -> usize {
        self.kv_head_count * self.head_dim * BLOCK_TOKENS
    }

    /// Floats of a block: its keys, then its values, `[kv_heads, padded / 16, 64, 16 columns]`.
    fn block_len(&self) -> usize {
        self.keys_len() + self.kv_head_count * BLOCK_TOKENS * self.padded()
    }
}

/// Keys and values of one sequence in one layer.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) shape: HeadShape,
    /// As long as [`HeadShape`] says.
    pub(crate) blocks: Vec<Box<[f32]>>,
    length: usize,
}

impl KvCache {
    /// An empty cache.
    pub fn new(shape: HeadShape) -> Self {
        Self {
            shape,
            blocks: Vec::new(),
            length: 0,
        }
    }

    /// Tokens held.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Holds `length` tokens from now on: those beyond are forgotten, or zeros where there were none.
    pub fn resize(&mut self, length: usize) {
        let blocks = length.div_ceil(BLOCK_TOKENS);
        if self.blocks.len() < blocks {
            let block_len = self.shape.block_len();
            let block = || vec![0f32; block_len].into_boxed_slice();
            self.blocks.resize_with(blocks, block);
        }
        self.length = length;
    }
}
