//! Keys and values of one sequence in one layer, in blocks of 64 positions that begin at multiples of 64. In a block
//! sixteen positions of a key's column are one vector, and sixteen columns of a position's value, in the order in
//! which attention reads them.
//!
//! Sequences that begin alike can hold the same blocks. A cache writes only to blocks that it holds alone: one that it
//! shares is copied first, which costs nothing where whole blocks are shared, since what follows goes into new ones.

use crate::arch::LANES;
use std::sync::Arc;

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
    /// As long as [`HeadShape`] says. Those beyond the length are kept for what comes, and are this cache's alone.
    pub(crate) blocks: Vec<Arc<Vec<f32>>>,
    length: usize,
}

/// Where the blocks of a cache are: those that may only be read, and behind them those that are the cache's alone.
pub(crate) struct Places {
    pub(crate) shared: Vec<*const f32>,
    pub(crate) own: Vec<*mut f32>,
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

    /// A cache that holds the first `tokens` tokens of this one, in the same memory. Neither sees what the other
    /// does later.
    ///
    /// # Panics
    /// This cache holds fewer tokens.
    pub fn share(&self, tokens: usize) -> Self {
        assert!(
            tokens <= self.length,
            "{tokens} tokens of {} are shared",
            self.length
        );
        Self {
            shape: self.shape,
            blocks: self.blocks[..tokens.div_ceil(BLOCK_TOKENS)].to_vec(),
            length: tokens,
        }
    }

    /// Holds `length` tokens from now on: those beyond are forgotten, or zeros where there were none. The memory of
    /// those forgotten is kept, unless another cache holds it too: it would be copied to be written.
    pub fn resize(&mut self, length: usize) {
        let blocks = length.div_ceil(BLOCK_TOKENS);
        let spare = self.blocks.split_off(blocks.min(self.blocks.len()));
        let is_own = |block: &Arc<_>| Arc::strong_count(block) == 1;
        self.blocks.extend(spare.into_iter().filter(is_own));
        if self.blocks.len() < blocks {
            let block_len = self.shape.block_len();
            // Zeros that the system gives untouched: threads touch them, as they come to write.
            let block = || Arc::new(vec![0f32; block_len]);
            self.blocks.resize_with(blocks, block);
        }
        self.length = length;
    }

    /// Where the blocks are, to write from position `start` on, at most the length: copies what is shared of these.
    /// Good until the cache is used otherwise.
    pub(crate) fn places(&mut self, start: usize) -> Places {
        let (shared, own) = self.blocks.split_at_mut(start / BLOCK_TOKENS);
        Places {
            shared: shared.iter().map(|block| block.as_ptr()).collect(),
            own: own
                .iter_mut()
                .map(|block| Arc::make_mut(block).as_mut_ptr())
                .collect(),
        }
    }
}
