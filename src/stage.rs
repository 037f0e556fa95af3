//! This rank's slice of the model: token ids or hidden states in, hidden states or logits out.
//!
//! A stage that begins the model has an embedding, one that ends it has a head; a stage without either
//! has no field that could be misused.

use crate::checkpoint::{Checkpoint, Consumed};
use crate::model::{
    Cuda, Engine, Entering, HeadSpec, Kernels, Leaving, Left, LinearSpec, Machine, ModelFiles,
    Part, Parts, Span, Wanted, Weights, cuda_compiler, cuda_devices,
};
use crate::pipeline::Compute;
use crate::plan::{self, Role, WireDtype};
use crate::sampler::Scores;
use crate::user_cache;
use crate::wire::{Step, Upkeep};
use anyhow::{Context, Result, bail, ensure};
use mlx_rs::{Device, DeviceType, Dtype, memory};
use std::sync::Arc;
use tracing::{info, warn};

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
    /// The last stage: what may come next.
    Head,
}

/// What a stage made of a step.
#[derive(Debug)]
pub enum Output {
    /// `[rows, hidden]` in the wire dtype, little-endian, for the next rank.
    Hidden(Vec<u8>),
    /// What may come next, for every sampled entry in order.
    Scores(Vec<Scores>),
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
    wire_dtype: WireDtype,
    core_share: Option<CoreShare>,
}

/// The cores that a rank computes on.
#[derive(Debug, Clone, Copy)]
pub struct CoreShare {
    /// Cores of the host.
    pub cores: usize,
    /// Ranks that share them, while as many steps are on their way.
    pub ranks: usize,
    /// The host has other ranks, which want to compute as soon as this one is done.
    pub is_shared: bool,
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
        let (inlet, outlet) = ends(stage.role);
        let mut weights = Weights::new(checkpoint.reader(), to_mlx(wire_dtype));
        let parts = Parts {
            architecture,
            layers: &architecture.layers[stage.layers.clone()],
            table: (inlet == Inlet::Embedding).then_some(&architecture.embed_tokens),
            head: (outlet != Outlet::Downstream).then(|| architecture.head_weight()),
            native_dtype: files.native_dtype(),
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
        let mut weights = Weights::made_up(&files.checkpoint, to_mlx(wire_dtype));
        let head = head_rows.map(|rows| LinearSpec {
            outputs: rows,
            ..architecture.head_weight().clone()
        });
        let parts = Parts {
            architecture,
            layers: &architecture.layers[..layers.min(architecture.layers.len())],
            table: None,
            head: head.as_ref(),
            native_dtype: files.native_dtype(),
        };
        Ok(Self {
            engine: kernels.load(parts, &mut weights)?,
            inlet: Inlet::Upstream,
            outlet: match head_rows {
                None => Outlet::Downstream,
                Some(_) => Outlet::Head,
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

    /// Makes room for so many tokens in all caches together, where caches have room of their own from the start.
    ///
    /// # Errors
    /// There is no memory for them.
    pub fn reserve_cache(&mut self, tokens: usize) -> Result<()> {
        self.engine.reserve(tokens)
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

    /// What the step's rows are made of, once it is sure that they can be.
    fn entering<'a>(
        &self,
        step: &Step,
        tokens: &'a [u32],
        payload: &'a [u8],
    ) -> Result<Entering<'a>> {
        match self.inlet {
            Inlet::Embedding => {
                ensure!(payload.is_empty(), "the first stage was sent activations");
                self.check_tokens(tokens)?;
                Ok(Entering::Tokens(tokens))
            }
            Inlet::Upstream => {
                let rows = step.row_count();
                let element_bytes = self.wire_dtype.size_bytes();
                let expected = rows * self.hidden_size * element_bytes;
                ensure!(
                    payload.len() == expected,
                    "step {} came with {} bytes of activations, expected {rows} x {} x {element_bytes} = {expected}",
                    step.number,
                    payload.len(),
                    self.hidden_size,
                );
                Ok(Entering::Hidden(payload))
            }
        }
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= self.table_rows) {
            bail!(
                "token id {id} is outside the vocabulary of {}",
                self.table_rows
            );
        }
        Ok(())
    }

    /// What is wanted of the step's rows: of the last one of each entry that samples, what comes next.
    fn wanted(step: &Step, parts: &[Part]) -> Vec<Wanted> {
        let of_entry = |(entry, part): (&crate::wire::Entry, &Part)| {
            let params = entry.sample.as_ref()?;
            Some(Wanted {
                row: (part.span.row + part.span.count - 1) as u32,
                is_best_enough: params.takes_the_best(),
            })
        };
        step.entries
            .iter()
            .zip(parts)
            .filter_map(of_entry)
            .collect()
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
        let tokens = step.tokens();
        let entering = self.entering(step, &tokens, payload)?;
        let wanted = Self::wanted(step, &parts);
        let leaving = match self.outlet {
            Outlet::Downstream => Leaving::Hidden,
            Outlet::Head => Leaving::Scores(&wanted),
        };
        let left = self.engine.run(entering, &parts, leaving);
        if self.core_share.is_some_and(|share| share.is_shared) {
            // The others sleep at once, instead of looking for more work on cores that the next rank needs.
            self.engine.use_threads(1);
        }
        match left.with_context(|| format!("step {}", step.number))? {
            Left::Hidden(rows) => Ok(Output::Hidden(rows)),
            Left::Scores(scores) => {
                check_numbers(step, &scores)?;
                Ok(Output::Scores(scores))
            }
        }
    }

    /// `[tokens, hidden]` in the wire dtype, on the stage that holds a tied table for the first.
    ///
    /// # Errors
    /// A token outside the vocabulary, or a stage without the table.
    fn embed(&mut self, tokens: &[u32]) -> Result<Vec<u8>> {
        match self.outlet {
            Outlet::Head if self.is_tied => {
                self.check_tokens(tokens)?;
                self.engine.embed(tokens)
            }
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

/// A rank's place among those on its host.
#[derive(Debug, Clone, Copy)]
pub struct Seat {
    /// Counted from 0.
    pub rank: usize,
    /// Ranks on the host.
    pub ranks: usize,
}

/// What this rank computes with.
#[derive(Debug)]
pub struct Computer {
    /// Its kernels.
    pub kernels: Kernels,
    /// `cpu` or `gpu`.
    pub kind: &'static str,
    /// Bytes that the ranks of this host have together on its GPUs, where these have memory of their own.
    pub memory_bytes: Option<u64>,
    /// CPU cores that its GPUs are worth to all ranks of this host together, where that can be told.
    pub worth_cores: Option<u64>,
}

/// What a core reads of its host's memory, about: by this a GPU is compared with cores as long as no times are known.
const BYTES_PER_S_OF_A_CORE: u64 = 10_000_000_000;

/// Chooses what this rank computes with, for all that follows in this process: our CUDA kernels where there is a GPU for
/// them (ranks of one host take its GPUs in turns), else MLX's on its GPU, else ours on the CPU, on so many threads.
///
/// # Errors
/// A GPU is asked for where there is none, MLX cannot tell, or an instruction set that this processor lacks was asked
/// for.
pub fn computer(
    device: DeviceChoice,
    kernels: KernelChoice,
    threads: usize,
    seat: Seat,
) -> Result<Computer> {
    let gpus = match (device, kernels) {
        (DeviceChoice::Cpu, _) | (_, KernelChoice::Mlx) => 0,
        (DeviceChoice::Auto | DeviceChoice::Gpu, KernelChoice::Own) => cuda_devices(),
    };
    if gpus > 0 {
        match open_gpu(gpus, seat) {
            Ok(computer) => return Ok(computer),
            Err(error) if device == DeviceChoice::Gpu => return Err(error),
            Err(error) => warn!("not using the GPU: {error:#}"),
        }
    }
    if device == DeviceChoice::Cpu {
        Device::set_default(&Device::cpu());
    }
    let kind = match Device::try_default()?.get_type()? {
        DeviceType::Cpu => "cpu",
        DeviceType::Gpu => "gpu",
    };
    if device == DeviceChoice::Gpu && kind == "cpu" {
        bail!("--device gpu, but there is no GPU on this host that this program can use");
    }
    Ok(Computer {
        kernels: match (kernels, kind) {
            (KernelChoice::Own, "cpu") => Kernels::Own(Arc::new(Machine::new(threads)?)),
            _ => Kernels::Mlx,
        },
        kind,
        memory_bytes: None,
        worth_cores: None,
    })
}

/// One of the host's `gpus` GPUs.
fn open_gpu(gpus: usize, seat: Seat) -> Result<Computer> {
    cuda_compiler()?;
    let cuda = Cuda::open(
        seat.rank % gpus,
        user_cache::dir().map(|dir| dir.join("cuda")),
    )?;
    let ranks = seat.ranks.max(1);
    // As much as lets the ranks of the fullest GPU have an even share of it.
    let of_all = |one: u64| one / ranks.div_ceil(gpus) as u64 * ranks as u64;
    let worth_cores = of_all(cuda.bytes_per_s() / BYTES_PER_S_OF_A_CORE);
    info!(name = cuda.name(), worth_cores, "using a GPU");
    Ok(Computer {
        memory_bytes: Some(of_all(cuda.memory_bytes())),
        worth_cores: (worth_cores > 0).then_some(worth_cores),
        kernels: Kernels::Cuda(Arc::new(cuda)),
        kind: "gpu",
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

/// What a role has at its ends.
fn ends(role: Role) -> (Inlet, Outlet) {
    let inlet = match role {
        Role::Middle | Role::Last | Role::LastWithTable => Inlet::Upstream,
        Role::Only | Role::First => Inlet::Embedding,
    };
    let outlet = match role.owns_head() {
        false => Outlet::Downstream,
        true => Outlet::Head,
    };
    (inlet, outlet)
}

/// Gives back what MLX keeps of arrays that are gone, and counts the peak anew. Where MLX cannot, nothing
/// but the report is the worse for it.
pub fn forget_peak(kernels: &Kernels) {
    if let Kernels::Cuda(cuda) = kernels {
        cuda.forget_peak();
    }
    let _ = memory::clear_cache();
    let _ = memory::reset_peak_memory();
}

/// Most bytes that MLX's arrays, or our buffers on a GPU, ever had in this process: on a GPU the measure of memory,
/// where the kernel's count does not see it.
pub fn peak_array_bytes(kernels: &Kernels) -> u64 {
    match kernels {
        Kernels::Cuda(cuda) => cuda.peak_bytes(),
        Kernels::Own(_) | Kernels::Mlx => memory::peak_memory().map_or(0, |bytes| bytes as u64),
    }
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
fn check_numbers(step: &Step, scores: &[Scores]) -> Result<()> {
    for ((entry, _), scores) in step.sampled().zip(scores) {
        let are_numbers = match scores {
            Scores::All(logits) => logits.iter().all(|logit| !logit.is_nan()),
            Scores::Best(token) => token.is_some(),
        };
        if !are_numbers {
            bail!(
                "step {}: the logits at position {} are not numbers; the weights are damaged, or overflow \
                 in the dtype computed in",
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
