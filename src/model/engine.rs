//! What computes a stage: MLX's own kernels, or those of this program, for CPUs and for CUDA.
//!
//! A stage asks for the same things of all: rows in, rows or scores out. Two of them make MLX arrays ([`Arrays`]), and
//! share how bytes become arrays and back.

use super::architecture::{Architecture, LayerSpec, LinearSpec};
use super::cuda::{Cuda, CudaEngine};
use super::mlx::MlxEngine;
use super::own::{Machine, OwnEngine};
use super::weights::Weights;
use crate::plan::WireDtype;
use crate::sampler::Scores;
use anyhow::{Result, bail, ensure};
use mlx_pipe_kernels::Span;
use mlx_rs::{Array, Dtype};
use std::fmt::Debug;
use std::sync::Arc;

/// The kernels of an engine.
#[derive(Debug, Clone)]
pub enum Kernels {
    /// MLX's, for every device.
    Mlx,
    /// This program's, for CPUs, in f32.
    Own(Arc<Machine>),
    /// This program's, for CUDA; MLX's for a model that they are not made for.
    Cuda(Arc<Cuda>),
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
    /// What the checkpoint is made for computing in.
    pub native_dtype: WireDtype,
}

impl Kernels {
    /// Loads the parts.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn load(&self, parts: Parts, weights: &mut Weights) -> Result<Box<dyn Engine>> {
        let dtype = weights.activation_dtype();
        let hidden_size = parts.architecture.hidden_size;
        Ok(match self {
            Self::Mlx => Box::new(OnArrays::new(
                MlxEngine::load(parts, weights)?,
                dtype,
                hidden_size,
            )),
            Self::Own(machine) => {
                let engine = OwnEngine::load(parts, weights, Arc::clone(machine))?;
                Box::new(OnArrays::new(engine, dtype, hidden_size))
            }
            Self::Cuda(cuda) => Box::new(CudaEngine::load(parts, weights, cuda)?),
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

/// What a step's rows are made of.
#[derive(Debug, Clone, Copy)]
pub enum Entering<'a> {
    /// Rows of the embedding table: of the first stage. All of them are in the vocabulary.
    Tokens(&'a [u32]),
    /// Hidden states `[rows, hidden]` in the dtype of activations, little-endian.
    Hidden(&'a [u8]),
}

/// What is wanted of a step's rows.
#[derive(Debug, Clone, Copy)]
pub enum Leaving<'a> {
    /// Hidden states, as they enter the next stage.
    Hidden,
    /// Of some rows what comes after them; perhaps of none.
    Scores(&'a [Wanted]),
}

/// A row of which it is wanted what comes after it.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// The row in the step.
    pub row: u32,
    /// The best token is enough.
    pub is_best_enough: bool,
}

/// What a step has become.
#[derive(Debug)]
pub enum Left {
    /// `[rows, hidden]` in the dtype of activations, little-endian.
    Hidden(Vec<u8>),
    /// One a wanted row.
    Scores(Vec<Scores>),
}

/// Layers, their caches, and the ends of the model where the stage has them.
pub trait Engine: Debug {
    /// Rows of the embedding table, or of the head that is one too: `[tokens, hidden]` in the dtype of activations,
    /// little-endian.
    ///
    /// # Errors
    /// The stage has neither.
    fn embed(&mut self, tokens: &[u32]) -> Result<Vec<u8>>;

    /// The rows of a step through all layers, evaluated. Afterwards the sequences' caches hold the parts' tokens too;
    /// what they held from a part's start on is forgotten.
    ///
    /// # Errors
    /// A cache that has not reached a part's start, or an end that the stage does not have.
    fn run(&mut self, entering: Entering, parts: &[Part], leaving: Leaving) -> Result<Left>;

    /// The sequence `to` begins as the first `tokens` tokens of `from`, and what it was before is forgotten. They are
    /// not computed again. Our own kernels hold them once, for both sequences; MLX's twice. Only what has been
    /// evaluated of `from` counts.
    ///
    /// # Errors
    /// `from` is unknown or holds fewer tokens: nothing has changed then.
    fn fork(&mut self, from: u32, to: u32, tokens: usize) -> Result<()>;

    /// Forgets a sequence, if there is one.
    fn release(&mut self, slot: u32);

    /// Makes room for so many tokens in all caches together, where caches have room of their own from the start.
    ///
    /// # Errors
    /// There is no memory for them.
    fn reserve(&mut self, _tokens: usize) -> Result<()> {
        Ok(())
    }

    /// Computes on at most so many threads from the next evaluation on, at least one and at most as many as there
    /// are. No result depends on it. Only for kernels that have threads of their own, and then for all engines that
    /// share these.
    fn use_threads(&mut self, _threads: usize) {}

    /// Computes only the first `count` layers from now on, and forgets all sequences.
    fn use_layers(&mut self, count: usize);

    /// Makes the caches of a sequence hold this many tokens, all of them zeros, as if they had been computed.
    ///
    /// # Errors
    /// There is no memory for them.
    fn pretend_cached(&mut self, slot: u32, tokens: usize) -> Result<()>;
}

/// What an engine does that makes MLX arrays.
pub trait Arrays: Debug {
    /// Rows of the embedding table, or of the head that is one too: `[tokens, hidden]`.
    ///
    /// # Errors
    /// The stage has neither.
    fn look_up(&self, tokens: &[u32]) -> Result<Array>;

    /// `x`: `[tokens, hidden]` -> the same shape, through all layers.
    ///
    /// # Errors
    /// A cache that has not reached a part's start.
    fn forward(&mut self, x: Array, parts: &[Part]) -> Result<Array>;

    /// Logits of the rows `rows` of `x`, `[rows, vocabulary]`, f32.
    ///
    /// # Errors
    /// The stage has no head.
    fn logits(&self, x: &Array, rows: &[u32]) -> Result<Array>;

    /// As [`Engine::fork`].
    ///
    /// # Errors
    /// As there.
    fn fork(&mut self, from: u32, to: u32, tokens: usize) -> Result<()>;

    /// As [`Engine::release`].
    fn release(&mut self, slot: u32);

    /// As [`Engine::use_threads`].
    fn use_threads(&mut self, _threads: usize) {}

    /// As [`Engine::use_layers`].
    fn use_layers(&mut self, count: usize);

    /// As [`Engine::pretend_cached`].
    ///
    /// # Errors
    /// As there.
    fn pretend_cached(&mut self, slot: u32, tokens: usize) -> Result<()>;
}

/// An engine of one that makes arrays. They are evaluated at the step's end and nowhere else.
#[derive(Debug)]
struct OnArrays<A> {
    arrays: A,
    /// Of activations.
    dtype: Dtype,
    hidden_size: usize,
}

impl<A: Arrays> OnArrays<A> {
    fn new(arrays: A, dtype: Dtype, hidden_size: usize) -> Self {
        Self {
            arrays,
            dtype,
            hidden_size,
        }
    }

    /// The step's rows, `[rows, hidden]`.
    fn enter(&self, entering: Entering) -> Result<Array> {
        let bytes = match entering {
            Entering::Tokens(tokens) => return self.arrays.look_up(tokens),
            Entering::Hidden(bytes) => bytes,
        };
        let row_bytes = self.hidden_size * element_bytes(self.dtype);
        ensure!(
            bytes.len().is_multiple_of(row_bytes),
            "activations end within a row"
        );
        let shape = [(bytes.len() / row_bytes) as i32, self.hidden_size as i32];
        // SAFETY: MLX copies as many bytes as shape and dtype make before it returns; they were counted right above.
        Ok(unsafe { Array::from_raw_data(bytes.as_ptr().cast(), &shape, self.dtype) })
    }
}

impl<A: Arrays> Engine for OnArrays<A> {
    fn embed(&mut self, tokens: &[u32]) -> Result<Vec<u8>> {
        to_bytes(&self.arrays.look_up(tokens)?)
    }

    fn run(&mut self, entering: Entering, parts: &[Part], leaving: Leaving) -> Result<Left> {
        let x = self.enter(entering)?;
        let x = self.arrays.forward(x, parts)?;
        let wanted = match leaving {
            Leaving::Hidden => return Ok(Left::Hidden(to_bytes(&x)?)),
            Leaving::Scores(wanted) => wanted,
        };
        if wanted.is_empty() {
            // Nothing to read, but the caches must be brought up to date now, while the step's inputs are here.
            x.eval()?;
            return Ok(Left::Scores(Vec::new()));
        }
        let rows: Vec<u32> = wanted.iter().map(|wanted| wanted.row).collect();
        let logits = self.arrays.logits(&x, &rows)?;
        logits.eval()?;
        let rows = logits
            .as_slice::<f32>()
            .chunks_exact(logits.dim(1) as usize);
        Ok(Left::Scores(
            rows.map(|row| Scores::All(row.to_vec())).collect(),
        ))
    }

    fn fork(&mut self, from: u32, to: u32, tokens: usize) -> Result<()> {
        self.arrays.fork(from, to, tokens)
    }

    fn release(&mut self, slot: u32) {
        self.arrays.release(slot);
    }

    fn use_threads(&mut self, threads: usize) {
        self.arrays.use_threads(threads);
    }

    fn use_layers(&mut self, count: usize) {
        self.arrays.use_layers(count);
    }

    fn pretend_cached(&mut self, slot: u32, tokens: usize) -> Result<()> {
        self.arrays.pretend_cached(slot, tokens)
    }
}

/// Bytes of an element of activations.
pub(super) fn element_bytes(dtype: Dtype) -> usize {
    match dtype {
        Dtype::Float32 => 4,
        _ => 2,
    }
}

/// The array's elements in row-major order, little-endian.
fn to_bytes(x: &Array) -> Result<Vec<u8>> {
    let x = x.contiguous()?;
    x.eval()?;
    Ok(match x.dtype() {
        Dtype::Float32 => bytes_of(x.as_slice::<f32>(), |value| value.to_le_bytes()),
        Dtype::Float16 => bytes_of(x.as_slice::<half::f16>(), |value| value.to_le_bytes()),
        Dtype::Bfloat16 => bytes_of(x.as_slice::<half::bf16>(), |value| value.to_le_bytes()),
        other => bail!("activations of dtype {other:?} cannot be sent"),
    })
}

fn bytes_of<T: Copy, const N: usize>(values: &[T], to_le: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&value| to_le(value)).collect()
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
