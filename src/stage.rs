//! This rank's slice of the model: token ids or hidden states in, hidden states or logits out.
//!
//! A stage that begins the model has an embedding, one that ends it has a head; a stage without either
//! has no field that could be misused. Arrays are evaluated at the stage's border and nowhere else.

use crate::checkpoint::{Checkpoint, Consumed};
use crate::model::{
    Engine, HeadSpec, Kernels, LinearSpec, Machine, ModelFiles, Part, Parts, Span, Weights,
};
use crate::pipeline::Compute;
use crate::plan::{self, Role, WireDtype};
use crate::wire::{Step, Upkeep};
use anyhow::{Context, Result, bail, ensure};
use mlx_rs::{Array, Device, DeviceType, Dtype, memory};
use std::sync::Arc;

/// What a stage's rows are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inlet {
    /// The first stage looks token ids up.
    Embedding,
    /// The others receive hidden states.
    Upstream,
}

/// What a stage's rows become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outlet {
    /// Hidden states for the next stage.
    Downstream,
    /// The last stage: logits over this many tokens.
    Head { vocab_size: usize },
}

/// What a stage made of a step.
#[derive(Debug)]
pub enum Output {
    /// `[rows, hidden]` in the wire dtype, little-endian, for the next rank.
    Hidden(Vec<u8>),
    /// For every sampled entry in order, its logits over the vocabulary.
    Logits(Vec<Vec<f32>>),
}

/// The contiguous layers of one rank, and the caches of the sequences in flight.
#[derive(Debug)]
pub struct Stage {
    engine: Box<dyn Engine>,
    inlet: Inlet,
    outlet: Outlet,
    hidden_size: usize,
    /// Rows of the embedding table.
    table_rows: usize,
    /// The head, where there is one, is the embedding table.
    is_tied: bool,
    wire_dtype: Dtype,
    core_share: Option<CoreShare>,
}

/// The cores that a rank computes on.
#[derive(Debug, Clone, Copy)]
pub struct CoreShare {
    /// Cores of the host.
    pub cores: usize,
    /// Ranks that share them, while as many steps are on their way.
    pub ranks: usize,
}

impl CoreShare {
    /// Threads for a step that sets out as one of `in_flight`: all cores where the other ranks have nothing to do
    /// meanwhile.
    fn threads(self, in_flight: u16) -> usize {
        let sharers = self.ranks.min(in_flight.into()).max(1);
        (self.cores / sharers).max(1)
    }
}

impl Stage {
    /// Loads the tensors that the plan gives to this stage, and nothing else, out of `checkpoint`: that of
    /// `files`, or one with this stage's tensors only.
    ///
    /// # Errors
    /// A tensor that cannot be read, or a difference between what was planned and what was loaded.
    pub fn load(
        files: &ModelFiles,
        checkpoint: &Checkpoint,
        stage: &plan::Stage,
        wire_dtype: WireDtype,
        kernels: &Kernels,
    ) -> Result<(Self, Consumed)> {
        let architecture = &files.architecture;
        let wire_dtype = to_mlx(wire_dtype);
        let (inlet, outlet) = ends(stage.role, architecture.vocab_size);
        let mut weights = Weights::new(checkpoint.reader(), wire_dtype);
        let parts = Parts {
            architecture,
            layers: &architecture.layers[stage.layers.clone()],
            table: (inlet == Inlet::Embedding).then_some(&architecture.embed_tokens),
            head: (outlet != Outlet::Downstream).then(|| architecture.head_weight()),
        };
        let engine = kernels.load(parts, &mut weights)?;
        let consumed = weights.finish(files.inventory.of_stage(stage))?;
        let loaded = Self {
            engine,
            inlet,
            outlet,
            hidden_size: architecture.hidden_size,
            table_rows: architecture.vocab_size,
            is_tied: architecture.head == HeadSpec::Tied,
            wire_dtype,
            core_share: None,
        };
        Ok((loaded, consumed))
    }

    /// A stage of made-up weights in the shapes of the model's, to time: its first `layers`, or, with
    /// `head_rows`, final norm and that many rows of the head too. Loads nothing.
    ///
    /// # Errors
    /// MLX cannot make the arrays.
    pub fn made_up(
        files: &ModelFiles,
        layers: usize,
        head_rows: Option<usize>,
        wire_dtype: WireDtype,
        kernels: &Kernels,
    ) -> Result<Self> {
        let architecture = &files.architecture;
        let wire_dtype = to_mlx(wire_dtype);
        let mut weights = Weights::made_up(&files.checkpoint, wire_dtype);
        let head = head_rows.map(|rows| LinearSpec {
            outputs: rows,
            ..architecture.head_weight().clone()
        });
        let parts = Parts {
            architecture,
            layers: &architecture.layers[..layers.min(architecture.layers.len())],
            table: None,
            head: head.as_ref(),
        };
        Ok(Self {
            engine: kernels.load(parts, &mut weights)?,
            inlet: Inlet::Upstream,
            outlet: match head_rows {
                None => Outlet::Downstream,
                Some(vocab_size) => Outlet::Head { vocab_size },
            },
            hidden_size: architecture.hidden_size,
            table_rows: 0,
            is_tied: false,
            wire_dtype,
            core_share: None,
        })
    }

    /// From now on each step is computed on as many of the cores as it leaves to this rank; till then on all.
    pub fn share_cores(&mut self, share: CoreShare) {
        self.core_share = Some(share);
    }

    /// Computes only the first `count` layers from now on, and forgets all sequences.
    pub fn use_layers(&mut self, count: usize) {
        self.engine.use_layers(count);
    }

    /// Makes the cache of a slot hold this many tokens, all of them zeros, as if they had been computed.
    ///
    /// # Errors
    /// MLX cannot make the arrays.
    pub fn pretend_cached(&mut self, slot: u32, tokens: usize) -> Result<()> {
        self.engine.pretend_cached(slot, tokens)
    }

    /// The step's rows, `[rows, hidden]`.
    fn enter(&self, step: &Step, payload: &[u8]) -> Result<Array> {
        let rows = step.row_count();
        match self.inlet {
            Inlet::Embedding => {
                ensure!(payload.is_empty(), "the first stage was sent activations");
                self.look_up(&step.tokens())
            }
            Inlet::Upstream => {
                let expected = rows * self.hidden_size * element_bytes(self.wire_dtype);
                ensure!(
                    payload.len() == expected,
                    "step {} came with {} bytes of activations, expected {rows} x {} x {} = {expected}",
                    step.number,
                    payload.len(),
                    self.hidden_size,
                    element_bytes(self.wire_dtype),
                );
                let shape = [rows as i32, self.hidden_size as i32];
                // SAFETY: MLX copies as many bytes as shape and dtype make before it returns; the
                // length was checked right above.
                Ok(unsafe {
                    Array::from_raw_data(payload.as_ptr().cast(), &shape, self.wire_dtype)
                })
            }
        }
    }

    /// Rows of the embedding table, `[tokens, hidden]`.
    fn look_up(&self, tokens: &[u32]) -> Result<Array> {
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= self.table_rows) {
            bail!(
                "token id {id} is outside the vocabulary of {}",
                self.table_rows
            );
        }
        self.engine.look_up(tokens)
    }

    /// Evaluates what the step becomes.
    fn leave(&self, step: &Step, parts: &[Part], x: &Array) -> Result<Output> {
        let Outlet::Head { vocab_size } = self.outlet else {
            return Ok(Output::Hidden(to_bytes(x)?));
        };
        let last_rows: Vec<u32> = step
            .entries
            .iter()
            .zip(parts)
            .filter(|(entry, _)| entry.sample.is_some())
            .map(|(_, part)| (part.span.row + part.span.count - 1) as u32)
            .collect();
        if last_rows.is_empty() {
            // Nothing to read, but the caches must be brought up to date now, while the
            // step's inputs are here.
            x.eval()?;
            return Ok(Output::Logits(Vec::new()));
        }
        let logits = self.engine.logits(x, &last_rows)?;
        logits.eval()?;
        let logits: Vec<Vec<f32>> = logits
            .as_slice::<f32>()
            .chunks_exact(vocab_size)
            .map(<[f32]>::to_vec)
            .collect();
        check_numbers(step, &logits)?;
        Ok(Output::Logits(logits))
    }
}

impl Compute for Stage {
    /// Computes a step. `payload`: the hidden states that came with it, `[rows, hidden]` in the wire
    /// dtype; empty on the first stage.
    ///
    /// # Errors
    /// A payload of another size than the step says, a position that the cache has not reached, or
    /// logits that are not numbers.
    fn run(&mut self, step: &Step, payload: &[u8]) -> Result<Output> {
        if let Some(share) = self.core_share {
            self.engine.use_threads(share.threads(step.in_flight));
        }
        for &upkeep in &step.upkeep {
            match upkeep {
                Upkeep::Release(slot) => self.engine.release(slot),
                Upkeep::Fork(fork) => {
                    let forked = self.engine.fork(fork.from, fork.to, fork.tokens as usize);
                    forked.with_context(|| format!("step {}", step.number))?;
                }
            }
        }
        let parts = parts(step)?;
        let x = self.enter(step, payload)?;
        let x = self.engine.forward(x, &parts);
        let x = x.with_context(|| format!("step {}", step.number))?;
        self.leave(step, &parts, &x)
    }

    /// `[tokens, hidden]` in the wire dtype, on the stage that holds a tied table for the first.
    ///
    /// # Errors
    /// A token outside the vocabulary, or a stage without the table.
    fn embed(&mut self, tokens: &[u32]) -> Result<Vec<u8>> {
        match self.outlet {
            Outlet::Head { .. } if self.is_tied => to_bytes(&self.look_up(tokens)?),
            _ => bail!("this rank holds no embedding table to look tokens up in"),
        }
    }
}

/// What this rank computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The GPU where MLX finds one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU.
    Gpu,
}

/// Makes MLX compute on the device chosen, for all that follows in this process.
///
/// # Errors
/// A GPU is asked for where MLX finds none.
pub fn use_device(choice: DeviceChoice) -> Result<()> {
    match choice {
        DeviceChoice::Auto => {}
        DeviceChoice::Cpu => Device::set_default(&Device::cpu()),
        DeviceChoice::Gpu if device_kind()? == "gpu" => {}
        DeviceChoice::Gpu => bail!("--device gpu, but MLX finds no GPU on this host"),
    }
    Ok(())
}

/// The kernels for what MLX computes on here: this program's on a CPU, unless MLX's are asked for, on so many
/// threads.
///
/// # Errors
/// MLX cannot tell, or an instruction set that this processor lacks was asked for.
pub fn kernels(choice: KernelChoice, threads: usize) -> Result<Kernels> {
    Ok(match (choice, device_kind()?) {
        (KernelChoice::Own, "cpu") => Kernels::Own(Arc::new(Machine::new(threads)?)),
        _ => Kernels::Mlx,
    })
}

/// Whose kernels compute on a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelChoice {
    /// This program's.
    Own,
    /// MLX's.
    Mlx,
}

/// The device that MLX computes on here: `cpu` or `gpu`.
///
/// # Errors
/// MLX cannot tell.
pub fn device_kind() -> Result<&'static str> {
    Ok(match Device::try_default()?.get_type()? {
        DeviceType::Cpu => "cpu",
        DeviceType::Gpu => "gpu",
    })
}

/// What a role has at its ends.
fn ends(role: Role, vocab_size: usize) -> (Inlet, Outlet) {
    let inlet = match role {
        Role::Middle | Role::Last | Role::LastWithTable => Inlet::Upstream,
        Role::Only | Role::First => Inlet::Embedding,
    };
    let outlet = match role.owns_head() {
        false => Outlet::Downstream,
        true => Outlet::Head { vocab_size },
    };
    (inlet, outlet)
}

/// Gives back what MLX keeps of arrays that are gone, and counts their peak anew. Where MLX cannot, nothing
/// but the report is the worse for it.
pub fn forget_peak() {
    let _ = memory::clear_cache();
    let _ = memory::reset_peak_memory();
}

/// Most bytes that MLX ever held in arrays in this process: on a GPU the measure of memory, where the
/// kernel's count does not see it.
pub fn peak_array_bytes() -> u64 {
    memory::peak_memory().map_or(0, |bytes| bytes as u64)
}

/// Where each entry's rows stand.
fn parts(step: &Step) -> Result<Vec<Part>> {
    let mut row = 0;
    let part = |(index, entry): (usize, &crate::wire::Entry)| {
        let before = &step.entries[..index];
        ensure!(
            before.iter().all(|other| other.slot != entry.slot),
            "step {} has slot {} twice",
            step.number,
            entry.slot
        );
        let span = Span {
            row,
            count: entry.tokens.len(),
            start: entry.start as usize,
        };
        row += span.count;
        Ok(Part {
            slot: entry.slot,
            span,
        })
    };
    step.entries.iter().enumerate().map(part).collect()
}

/// Logits that are not numbers mean broken weights; a token drawn from them would look like an answer.
fn check_numbers(step: &Step, logits: &[Vec<f32>]) -> Result<()> {
    for ((entry, _), logits) in step.sampled().zip(logits) {
        if let Some(token) = logits.iter().position(|logit| logit.is_nan()) {
            bail!(
                "step {}: the logits at position {} are not numbers (the first for token {token}); the \
                 weights are damaged, or overflow in the dtype computed in",
                step.number,
                entry.start as usize + entry.tokens.len(),
            );
        }
    }
    Ok(())
}

/// The plan's wire dtype as MLX's. Activations are computed in it.
fn to_mlx(dtype: WireDtype) -> Dtype {
    match dtype {
        WireDtype::F32 => Dtype::Float32,
        WireDtype::F16 => Dtype::Float16,
        WireDtype::Bf16 => Dtype::Bfloat16,
    }
}

fn element_bytes(dtype: Dtype) -> usize {
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
