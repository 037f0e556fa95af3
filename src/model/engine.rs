//! What computes a stage's arrays: MLX's own kernels, or those of this program on a CPU.
//!
//! A stage asks for the same things of both, in the order of the mathematics, and knows no more of them.

use super::architecture::{Architecture, LayerSpec, LinearSpec};
use super::mlx::MlxEngine;
use super::own::{Machine, OwnEngine};
use super::weights::Weights;
use anyhow::{Result, ensure};
use mlx_pipe_kernels::Span;
use mlx_rs::Array;
use std::fmt::Debug;
use std::sync::Arc;

/// The kernels of an engine.
#[derive(Debug, Clone)]
pub enum Kernels {
    /// MLX's, for every device.
    Mlx,
    /// This program's, for CPUs, in f32.
    Own(Arc<Machine>),
}

/// The parts of a model that an engine is to hold.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// The model.
    pub architecture: &'a Architecture,
    /// Layers, in their order.
    pub layers: &'a [LayerSpec],
    /// The embedding table, to look tokens up in.
    pub table: Option<&'a LinearSpec>,
    /// The head, behind the final norm. Held once if it is the table.
    pub head: Option<&'a LinearSpec>,
}

impl Kernels {
    /// Loads the parts.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn load(&self, parts: Parts, weights: &mut Weights) -> Result<Box<dyn Engine>> {
        Ok(match self {
            Self::Mlx => Box::new(MlxEngine::load(parts, weights)?),
            Self::Own(machine) => Box::new(OwnEngine::load(parts, weights, Arc::clone(machine))?),
        })
    }
}

/// The rows of a step that belong to one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// The sequence.
    pub slot: u32,
    /// Its rows, and where they stand in it.
    pub span: Span,
}

/// Layers, their caches, and the ends of the model where the stage has them.
pub trait Engine: Debug {
    /// Rows of the embedding table, or of the head that is one too: `[tokens, hidden]`.
    ///
    /// # Errors
    /// The stage has neither.
    fn look_up(&self, tokens: &[u32]) -> Result<Array>;

    /// `x`: `[tokens, hidden]` -> the same shape, through all layers. Afterwards the sequences' caches hold the
    /// parts' tokens too; what they held from a part's start on is forgotten.
    ///
    /// # Errors
    /// A cache that has not reached a part's start.
    fn forward(&mut self, x: Array, parts: &[Part]) -> Result<Array>;

    /// Logits of the rows `rows` of `x`, `[rows, vocabulary]`, f32.
    ///
    /// # Errors
    /// The stage has no head.
    fn logits(&self, x: &Array, rows: &[u32]) -> Result<Array>;

    /// The sequence `to` begins as the first `tokens` tokens of `from`, and what it was before is forgotten. They are
    /// not computed again. Our own kernels hold them once, for both sequences; MLX's twice. Only what has been
    /// evaluated of `from` counts.
    ///
    /// # Errors
    /// `from` is unknown or holds fewer tokens: nothing has changed then.
    fn fork(&mut self, from: u32, to: u32, tokens: usize) -> Result<()>;

    /// Forgets a sequence, if there is one.
    fn release(&mut self, slot: u32);

    /// Computes on at most so many threads from the next evaluation on, at least one and at most as many as there
    /// are. No result depends on it. Only for kernels that have threads of their own, and then for all engines that
    /// share these.
    fn use_threads(&mut self, threads: usize);

    /// Computes only the first `count` layers from now on, and forgets all sequences.
    fn use_layers(&mut self, count: usize);

    /// Makes the caches of a sequence hold this many tokens, all of them zeros, as if they had been computed.
    ///
    /// # Errors
    /// MLX cannot make the arrays.
    fn pretend_cached(&mut self, slot: u32, tokens: usize) -> Result<()>;
}

/// Why a sequence cannot begin as one that is not there.
pub(super) fn unknown(slot: u32) -> String {
    format!("a sequence is to begin as slot {slot}, but this rank holds no such slot")
}

/// A sequence can begin as no more than there is of another.
pub(super) fn ensure_held(slot: u32, tokens: usize, held: usize) -> Result<()> {
    ensure!(
        tokens <= held,
        "a sequence is to begin as the first {tokens} tokens of slot {slot}, but this rank's cache holds only {held}"
    );
    Ok(())
}
