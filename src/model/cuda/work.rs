//! The memory that steps are computed in, grown as steps grow, and what goes to the GPU and comes back.

use anyhow::{Result, ensure};
use mlx_pipe_cuda::{Best, Buffer, Gpu, Numbers, PROGRESS_BYTES, Pinned};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of each buffer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sizes {
    pub(super) x: usize,
    pub(super) normed: usize,
    pub(super) qkv: usize,
    pub(super) queries: usize,
    pub(super) attended: usize,
    pub(super) mlp: usize,
    pub(super) partial: usize,
    pub(super) arrived: usize,
    pub(super) logits: usize,
    pub(super) best_work: usize,
    pub(super) best: usize,
    pub(super) numbers: usize,
}

/// The buffers. What is in them lasts for a step.
#[derive(Debug)]
pub(super) struct Work {
    gpu: Arc<Gpu>,
    /// `[rows, hidden]`, what enters and leaves.
    pub(super) x: Buffer,
    pub(super) normed: Buffer,
    pub(super) qkv: Buffer,
    pub(super) queries: Buffer,
    pub(super) attended: Buffer,
    pub(super) mlp: Buffer,
    pub(super) partial: Buffer,
    /// Zeros between steps.
    pub(super) arrived: Buffer,
    /// Zeros between steps.
    pub(super) progress: Buffer,
    pub(super) logits: Buffer,
    pub(super) best_work: Buffer,
    pub(super) best: Buffer,
    numbers: Buffer,
    /// The host's side of `numbers`.
    numbers_out: Pinned,
    /// The host's side of all else.
    passage: Pinned,
}

impl Work {
    /// Without room for anything.
    ///
    /// # Errors
    /// The GPU or the host has no memory left.
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let none = || Buffer::zeroed(gpu, 0);
        Ok(Self {
            x: none()?,
            normed: none()?,
            qkv: none()?,
            queries: none()?,
            attended: none()?,
            mlp: none()?,
            partial: none()?,
            arrived: none()?,
            progress: Buffer::zeroed(gpu, PROGRESS_BYTES)?,
            logits: none()?,
            best_work: none()?,
            best: none()?,
            numbers: none()?,
            numbers_out: Pinned::zeroed(gpu, 0)?,
            passage: Pinned::zeroed(gpu, 0)?,
            gpu: Arc::clone(gpu),
        })
    }

    /// Room for a step of these sizes. Whether any buffer has moved.
    ///
    /// # Errors
    /// The GPU or the host has too little memory left.
    pub(super) fn make_room(&mut self, sizes: &Sizes) -> Result<bool> {
        let mut has_moved = false;
        let gpu = &self.gpu;
        for (buffer, bytes) in [
            (&mut self.x, sizes.x),
            (&mut self.normed, sizes.normed),
            (&mut self.qkv, sizes.qkv),
            (&mut self.queries, sizes.queries),
            (&mut self.attended, sizes.attended),
            (&mut self.mlp, sizes.mlp),
            (&mut self.partial, sizes.partial),
            (&mut self.arrived, sizes.arrived),
            (&mut self.logits, sizes.logits),
            (&mut self.best_work, sizes.best_work),
            (&mut self.best, sizes.best),
            (&mut self.numbers, sizes.numbers),
        ] {
            if buffer.bytes() < bytes {
                *buffer = Buffer::zeroed(gpu, with_reserve(bytes))?;
                has_moved = true;
            }
        }
        if self.numbers_out.capacity() < sizes.numbers {
            self.numbers_out = Pinned::zeroed(gpu, with_reserve(sizes.numbers))?;
        }
        let most = sizes.x.max(sizes.logits).max(sizes.best);
        if self.passage.capacity() < most {
            self.passage = Pinned::zeroed(gpu, with_reserve(most))?;
        }
        Ok(has_moved)
    }

    /// Some of the step's numbers, on the GPU.
    pub(super) fn numbers(&self, range: &Range<usize>) -> Numbers<'_> {
        Numbers {
            buffer: &self.numbers,
            at: range.start,
            count: range.len(),
        }
    }

    /// Begins to send a step's numbers.
    ///
    /// # Errors
    /// There is no room for them, or the GPU fails.
    pub(super) fn write_numbers(&mut self, numbers: &[i32]) -> Result<()> {
        let to = self.numbers_out.bytes_mut()?;
        ensure!(
            to.len() >= numbers.len() * 4,
            "there is no room for a step's numbers"
        );
        for (to, number) in to.as_chunks_mut::<4>().0.iter_mut().zip(numbers) {
            *to = number.to_le_bytes();
        }
        self.numbers
            .begin_write(&self.numbers_out, numbers.len() * 4)
    }

    /// Begins to send elements to `x`.
    ///
    /// # Errors
    /// There is no room for them, or the GPU fails.
    pub(super) fn write_x(&mut self, elements: &[u8]) -> Result<()> {
        let to = self.passage.bytes_mut()?;
        ensure!(
            to.len() >= elements.len(),
            "there is no room for a step's activations"
        );
        to[..elements.len()].copy_from_slice(elements);
        self.x.begin_write(&self.passage, elements.len())
    }

    /// The first bytes of `x`, once all work is done.
    ///
    /// # Errors
    /// The work failed.
    pub(super) fn read_x(&mut self, bytes: usize) -> Result<&[u8]> {
        self.x.begin_read(0, &mut self.passage, bytes)?;
        Ok(&self.passage.bytes()?[..bytes])
    }

    /// The best tokens of the first rows, once all work is done.
    ///
    /// # Errors
    /// The work failed.
    pub(super) fn read_best(&mut self, rows: usize) -> Result<&[u8]> {
        let bytes = rows * Best::BYTES;
        self.best.begin_read(0, &mut self.passage, bytes)?;
        Ok(&self.passage.bytes()?[..bytes])
    }

    /// Logits, once all work is done.
    ///
    /// # Errors
    /// The work failed.
    pub(super) fn read_logits(&mut self, at: usize, bytes: usize) -> Result<&[u8]> {
        self.logits.begin_read(at, &mut self.passage, bytes)?;
        Ok(&self.passage.bytes()?[..bytes])
    }
}

/// A little more than is needed now, so that not every step grows it.
fn with_reserve(bytes: usize) -> usize {
    (bytes + bytes / 4).next_multiple_of(1 << 12)
}
