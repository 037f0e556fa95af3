//! Keys and values of one sequence in one layer: grown in blocks as the sequence grows, cut back when
//! the schedule starts again further to the left.

use anyhow::{Result, ensure};
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::ops::{concatenate, zeros_dtype};
use mlx_rs::{Array, Dtype};

/// Tokens by which the store grows.
pub const BLOCK_TOKENS: i32 = 256;

/// Shape of what one token adds.
#[derive(Debug, Clone, Copy)]
pub struct KvShape {
    /// Heads of keys and values.
    pub kv_head_count: i32,
    /// Width of a head.
    pub head_dim: i32,
    /// Element type.
    pub dtype: Dtype,
}

/// The cache of one sequence in one layer.
#[derive(Debug)]
pub struct LayerCache {
    /// `[1, kv_heads, capacity, head_dim]`
    keys: Array,
    /// `[1, kv_heads, capacity, head_dim]`
    values: Array,
    /// Tokens held, at most the capacity.
    length: i32,
    shape: KvShape,
}

impl LayerCache {
    /// An empty cache with room for one block.
    pub fn new(shape: KvShape) -> Result<Self> {
        Ok(Self {
            keys: block(shape)?,
            values: block(shape)?,
            length: 0,
            shape,
        })
    }

    /// Tokens held.
    pub fn length(&self) -> usize {
        self.length as usize
    }

    /// A cache of the first `tokens` tokens, in memory of its own as soon as either is written. Evaluated here: a
    /// copy yet to be made would keep all of this cache's arrays until then.
    ///
    /// # Panics
    /// This cache holds fewer tokens.
    pub fn fork(&self, tokens: usize) -> Result<Self> {
        assert!(tokens <= self.length());
        let blocks = tokens.div_ceil(BLOCK_TOKENS as usize).max(1) as i32;
        let copy = |of: &Array| -> Result<Array> {
            let first = of.try_index((.., .., ..blocks * BLOCK_TOKENS, ..))?;
            let copied = first.contiguous()?;
            copied.eval()?;
            Ok(copied)
        };
        Ok(Self {
            keys: copy(&self.keys)?,
            values: copy(&self.values)?,
            length: tokens as i32,
            shape: self.shape,
        })
    }

    /// Forgets everything from position `length` on.
    ///
    /// # Errors
    /// If fewer than `length` tokens are held: a token was lost on the way here.
    pub fn cut_back(&mut self, length: usize) -> Result<()> {
        let held = self.length as usize;
        ensure!(
            length <= held,
            "the step starts at position {length}, but this rank's cache holds only {held} tokens"
        );
        self.length = length as i32;
        Ok(())
    }

    /// Adds the keys and values of new tokens (`[1, kv_heads, tokens, head_dim]`) and returns all
    /// that are held, `[1, kv_heads, length, head_dim]`.
    pub fn extend(&mut self, keys: &Array, values: &Array) -> Result<(Array, Array)> {
        let (start, end) = (self.length, self.length + keys.dim(2));
        while self.keys.dim(2) < end {
            self.keys = concatenate(&[&self.keys, &block(self.shape)?], 2)?;
            self.values = concatenate(&[&self.values, &block(self.shape)?], 2)?;
        }
        self.keys.try_index_mut((.., .., start..end, ..), keys)?;
        self.values
            .try_index_mut((.., .., start..end, ..), values)?;
        self.length = end;
        Ok((
            self.keys.try_index((.., .., ..end, ..))?,
            self.values.try_index((.., .., ..end, ..))?,
        ))
    }
}

/// Zeros for one block, `[1, kv_heads, BLOCK_TOKENS, head_dim]`.
fn block(shape: KvShape) -> Result<Array> {
    let dims = [1, shape.kv_head_count, BLOCK_TOKENS, shape.head_dim];
    Ok(zeros_dtype(&dims, shape.dtype)?)
}
