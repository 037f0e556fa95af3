//! Keys and values of one sequence in one layer, in blocks of 64 positions that begin at multiples of 64. In a block
//! sixteen positions of a key's column are one vector, and sixteen columns of a position's value, in the order in
//! which attention reads them.
//!
//! Sequences that begin alike can hold the same blocks. A cache writes only to blocks that it holds alone: one that it
//! shares is copied first, which costs nothing where whole blocks are shared, since what follows goes into new ones.

use crate::arch::{LANES, Simd};
use std::sync::Arc;

/// Positions of a block.
pub const BLOCK_TOKENS: usize = 64;

/// What keys and values are kept in. They are computed in f32 before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// As they are.
    F32,
    /// As whole numbers of 16 bits, of which the largest of a head's key or value is 32767: half the memory, and an error
    /// of a 65534th of that largest one at most.
    I16,
}

/// The largest of the whole numbers.
pub(crate) const LARGEST_KEPT: f32 = 32767.0;

/// A number of a cache.
pub(crate) trait Number: Copy + Default {
    /// Whether it is a whole number, to be multiplied with its head's scale.
    const IS_SCALED: bool;

    /// Sixteen numbers.
    ///
    /// # Safety
    /// The processor has `S`; there are sixteen numbers at `from`.
    unsafe fn load<S: Simd>(from: *const Self) -> S::F;

    /// Keeps sixteen numbers.
    ///
    /// # Safety
    /// The processor has `S`; there is room for sixteen numbers at `to`.
    unsafe fn store<S: Simd>(to: *mut Self, numbers: S::F);
}

impl Number for f32 {
    const IS_SCALED: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { S::load(from) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, numbers: S::F) {
        // SAFETY: the caller's promise.
        unsafe { S::store(to, numbers) }
    }
}

impl Number for i16 {
    const IS_SCALED: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { S::load_i16(from) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, numbers: S::F) {
        // SAFETY: the caller's promise.
        unsafe { S::store_i16(to, numbers) }
    }
}

/// Sizes of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Heads of the queries, a multiple of those of keys and values.
    pub head_count: usize,
    /// Heads of keys and values.
    pub kv_head_count: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// What keys and values are kept in.
    pub kept: Kept,
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

    /// Numbers of a block's keys, `[kv_heads, 4, head_dim, 16 positions]`.
    pub(crate) fn keys_len(&self) -> usize {
        self.kv_head_count * self.head_dim * BLOCK_TOKENS
    }

    /// Words of 32 bits before a block's scales: its keys, then its values, `[kv_heads, padded / 16, 64, 16 columns]`.
    pub(crate) fn numbers_words(&self) -> usize {
        let numbers = self.keys_len() + self.kv_head_count * BLOCK_TOKENS * self.padded();
        match self.kept {
            Kept::F32 => numbers,
            Kept::I16 => numbers / 2,
        }
    }

    /// Words of 32 bits of a block: its numbers and, of whole ones, the scales of keys, then those of values,
    /// `[kv_heads, 64]`.
    fn block_words(&self) -> usize {
        let scales = match self.kept {
            Kept::F32 => 0,
            Kept::I16 => 2 * self.kv_head_count * BLOCK_TOKENS,
        };
        self.numbers_words() + scales
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
            let block_words = self.shape.block_words();
            // Zeros that the system gives untouched: threads touch them, as they come to write.
            let block = || Arc::new(vec![0f32; block_words]);
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
