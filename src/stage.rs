//! This rank's slice of the model: token ids or hidden states in, hidden states or logits out.
//!
//! A stage that begins the model has an embedding, one that ends it has a head; a stage without either
//! has no field that could be misused. Arrays are evaluated at the stage's border and nowhere else.

use crate::checkpoint::{Checkpoint, Consumed};
use crate::model::{
    Architecture, HeadSpec, KvShape, Layer, LayerCache, Linear, LinearSpec, ModelFiles, RmsNorm,
    Rope, Span, Weights,
};
use crate::pipeline::Compute;
use crate::plan::{self, Role, WireDtype};
use crate::wire::Step;
use anyhow::{Context, Result, bail, ensure};
use mlx_rs::ops::zeros_dtype;
use mlx_rs::{Array, Device, DeviceType, Dtype, memory};
use std::collections::HashMap;

/// Activations that may be allocated ahead of what has been computed. MLX allocates as it queues, so a
/// long prompt through many layers would hold those of all of them at the same time.
const MOST_AHEAD_BYTES: usize = 48 << 20;

/// What a stage's rows are made of.
#[derive(Debug)]
enum Inlet {
    /// The first stage looks token ids up, `[vocabulary, hidden]`.
    Embedding(Linear),
    /// The others receive hidden states.
    Upstream,
}

/// What a stage's rows become.
#[derive(Debug)]
enum Outlet {
    /// Hidden states for the next stage.
    Downstream,
    /// The last stage: final norm, then `[vocabulary, hidden]`.
    Head { norm: RmsNorm, projection: Linear },
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
    inlet: Inlet,
    layers: Vec<Layer>,
    outlet: Outlet,
    rope: Rope,
    hidden_size: usize,
    vocab_size: usize,
    /// What one row's activations take in one layer, about.
    layer_row_bytes: usize,
    /// The head, where there is one, is the embedding table.
    is_tied: bool,
    kv_shape: KvShape,
    wire_dtype: Dtype,
    /// For every sequence in flight, a cache for each layer.
    caches: HashMap<u32, Vec<LayerCache>>,
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
    ) -> Result<(Self, Consumed)> {
        let architecture = &files.architecture;
        let activation_dtype = to_mlx(wire_dtype);
        let mut weights = Weights::new(checkpoint.reader(), activation_dtype);
        let layers = architecture.layers[stage.layers.clone()]
            .iter()
            .map(|spec| Layer::load(architecture, spec, &mut weights))
            .collect::<Result<Vec<_>>>()?;
        let (inlet, outlet) = load_ends(architecture, stage, &mut weights)?;
        let planned = files.inventory.of_stage(stage);
        let consumed = weights.finish(planned)?;
        let loaded = Self {
            inlet,
            layers,
            outlet,
            rope: Rope::new(architecture),
            hidden_size: architecture.hidden_size,
            vocab_size: architecture.vocab_size,
            layer_row_bytes: layer_row_bytes(architecture, activation_dtype),
            is_tied: architecture.head == HeadSpec::Tied,
            kv_shape: kv_shape(architecture, activation_dtype),
            wire_dtype: activation_dtype,
            caches: HashMap::new(),
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
    ) -> Result<Self> {
        let architecture = &files.architecture;
        let dtype = to_mlx(wire_dtype);
        let mut weights = Weights::made_up(&files.checkpoint, dtype);
        let layers = architecture.layers[..layers.min(architecture.layers.len())]
            .iter()
            .map(|spec| Layer::load(architecture, spec, &mut weights))
            .collect::<Result<Vec<_>>>()?;
        let head = match &architecture.head {
            HeadSpec::Own(spec) => spec,
            HeadSpec::Tied => &architecture.embed_tokens,
        };
        let outlet = match head_rows {
            None => Outlet::Downstream,
            Some(rows) => {
                let head = LinearSpec {
                    outputs: rows,
                    ..head.clone()
                };
                Outlet::Head {
                    norm: RmsNorm::load(
                        &architecture.norm,
                        architecture.rms_norm_eps,
                        &mut weights,
                    )?,
                    projection: Linear::load(&head, &mut weights)?,
                }
            }
        };
        Ok(Self {
            inlet: Inlet::Upstream,
            layers,
            outlet,
            rope: Rope::new(architecture),
            hidden_size: architecture.hidden_size,
            vocab_size: head_rows.unwrap_or(0),
            layer_row_bytes: layer_row_bytes(architecture, dtype),
            is_tied: false,
            kv_shape: kv_shape(architecture, dtype),
            wire_dtype: dtype,
            caches: HashMap::new(),
        })
    }

    /// Takes out the layers from `first` on, and all caches with them.
    pub fn set_aside(&mut self, first: usize) -> Vec<Layer> {
        self.caches.clear();
        self.layers.split_off(first.min(self.layers.len()))
    }

    /// Puts layers that were set aside back behind the others.
    pub fn put_back(&mut self, layers: Vec<Layer>) {
        self.caches.clear();
        self.layers.extend(layers);
    }

    /// Makes the cache of a slot hold this many tokens, all of them zeros, as if they had been computed.
    ///
    /// # Errors
    /// MLX cannot make the arrays.
    pub fn pretend_cached(&mut self, slot: u32, tokens: usize) -> Result<()> {
        let shape = self.kv_shape;
        let dims = [1, shape.kv_head_count, tokens as i32, shape.head_dim];
        let zeros = zeros_dtype(&dims, shape.dtype)?;
        let caches = (0..self.layers.len()).map(|_| {
            let mut cache = LayerCache::new(shape)?;
            let (keys, values) = cache.extend(&zeros, &zeros)?;
            keys.eval()?;
            values.eval()?;
            Ok(cache)
        });
        let caches = caches.collect::<Result<_>>()?;
        self.caches.insert(slot, caches);
        Ok(())
    }

    /// The caches of the step's entries, cut back to where each entry starts. They are put back after
    /// the step; a step that fails ends the run, so none is missed.
    fn take_caches(&mut self, step: &Step) -> Result<Vec<Vec<LayerCache>>> {
        let mut taken = Vec::with_capacity(step.entries.len());
        for entry in &step.entries {
            ensure!(
                step.entries
                    .iter()
                    .filter(|other| other.slot == entry.slot)
                    .count()
                    == 1,
                "step {} has slot {} twice",
                step.number,
                entry.slot
            );
            let mut of_sequence = match self.caches.remove(&entry.slot) {
                Some(caches) => caches,
                None => (0..self.layers.len())
                    .map(|_| LayerCache::new(self.kv_shape))
                    .collect::<Result<_>>()?,
            };
            for cache in &mut of_sequence {
                cache
                    .cut_back(entry.start as usize)
                    .with_context(|| format!("step {}, slot {}", step.number, entry.slot))?;
            }
            taken.push(of_sequence);
        }
        Ok(taken)
    }

    /// The step's rows, `[rows, hidden]`.
    fn enter(&self, step: &Step, payload: &[u8]) -> Result<Array> {
        let rows = step.row_count();
        match &self.inlet {
            Inlet::Embedding(table) => {
                ensure!(payload.is_empty(), "the first stage was sent activations");
                self.look_up(table, &step.tokens())
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
    fn look_up(&self, table: &Linear, tokens: &[u32]) -> Result<Array> {
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= self.vocab_size) {
            bail!(
                "token id {id} is outside the vocabulary of {}",
                self.vocab_size
            );
        }
        table.rows(
            &Array::from_slice(tokens, &[tokens.len() as i32]),
            self.wire_dtype,
        )
    }

    /// Evaluates what the step becomes.
    fn leave(&self, step: &Step, spans: &[Span], x: &Array) -> Result<Output> {
        match &self.outlet {
            Outlet::Downstream => Ok(Output::Hidden(to_bytes(x)?)),
            Outlet::Head { norm, projection } => {
                let last_rows: Vec<u32> = step
                    .entries
                    .iter()
                    .zip(spans)
                    .filter(|(entry, _)| entry.sample.is_some())
                    .map(|(_, span)| (span.row + span.count - 1) as u32)
                    .collect();
                if last_rows.is_empty() {
                    // Nothing to read, but the caches must be brought up to date now, while the
                    // step's inputs are here.
                    x.eval()?;
                    return Ok(Output::Logits(Vec::new()));
                }
                let rows = Array::from_slice(&last_rows, &[last_rows.len() as i32]);
                let logits = projection
                    .forward(&norm.forward(&x.take_axis(rows, 0)?)?)?
                    .as_dtype(Dtype::Float32)?;
                logits.eval()?;
                let logits: Vec<Vec<f32>> = logits
                    .as_slice::<f32>()
                    .chunks_exact(self.vocab_size)
                    .map(<[f32]>::to_vec)
                    .collect();
                check_numbers(step, &logits)?;
                Ok(Output::Logits(logits))
            }
        }
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
        for slot in &step.release {
            self.caches.remove(slot);
        }
        let spans = spans(step);
        let mut caches = self.take_caches(step)?;
        let mut x = self.enter(step, payload)?;
        let mut ahead_bytes = 0;
        for (index, layer) in self.layers.iter().enumerate() {
            let mut of_layer: Vec<&mut LayerCache> =
                caches.iter_mut().map(|cache| &mut cache[index]).collect();
            x = layer.forward(&x, &self.rope, &spans, &mut of_layer)?;
            ahead_bytes += step.row_count() * self.layer_row_bytes;
            if ahead_bytes > MOST_AHEAD_BYTES {
                x.eval()?;
                ahead_bytes = 0;
            }
        }
        let slots = step.entries.iter().map(|entry| entry.slot);
        self.caches.extend(slots.zip(caches));
        self.leave(step, &spans, &x)
    }

    /// `[tokens, hidden]` in the wire dtype, on the stage that holds a tied table for the first.
    ///
    /// # Errors
    /// A token outside the vocabulary, or a stage without the table.
    fn embed(&mut self, tokens: &[u32]) -> Result<Vec<u8>> {
        match &self.outlet {
            Outlet::Head { projection, .. } if self.is_tied => {
                to_bytes(&self.look_up(projection, tokens)?)
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

/// Loads embedding, norm and head where the stage owns them. A tied table is loaded once, also by a
/// stage that is both ends.
fn load_ends(
    architecture: &Architecture,
    stage: &plan::Stage,
    weights: &mut Weights,
) -> Result<(Inlet, Outlet)> {
    let mut table = None;
    let inlet = match stage.role {
        Role::Middle | Role::Last | Role::LastWithTable => Inlet::Upstream,
        Role::Only | Role::First => {
            let loaded = Linear::load(&architecture.embed_tokens, weights)?;
            table = Some(loaded.clone());
            Inlet::Embedding(loaded)
        }
    };
    let outlet = match stage.role.owns_head() {
        false => Outlet::Downstream,
        true => Outlet::Head {
            norm: RmsNorm::load(&architecture.norm, architecture.rms_norm_eps, weights)?,
            projection: match (&architecture.head, table) {
                (HeadSpec::Own(spec), _) => Linear::load(spec, weights)?,
                (HeadSpec::Tied, Some(table)) => table,
                (HeadSpec::Tied, None) => Linear::load(&architecture.embed_tokens, weights)?,
            },
        },
    };
    Ok((inlet, outlet))
}

/// Gives back what MLX keeps of arrays that are gone, and counts their peak anew. Where MLX cannot, nothing
/// but the report is the worse for it.
pub fn forget_peak() {
    let _ = memory::clear_cache();
    let _ = memory::reset_peak_memory();
}

/// Around the attention eight arrays as wide as the hidden state or the heads, around the MLP four as wide as
/// that.
fn layer_row_bytes(architecture: &Architecture, dtype: Dtype) -> usize {
    let mlp = architecture
        .layers
        .first()
        .map_or(0, |layer| layer.gate_proj.outputs);
    (8 * architecture.hidden_size + 4 * mlp) * element_bytes(dtype)
}

fn kv_shape(architecture: &Architecture, dtype: Dtype) -> KvShape {
    KvShape {
        kv_head_count: architecture.family.kv_head_count as i32,
        head_dim: architecture.family.head_dim as i32,
        dtype,
    }
}

/// Most bytes that MLX ever held in arrays in this process: on a GPU the measure of memory, where the
/// kernel's count does not see it.
pub fn peak_array_bytes() -> u64 {
    memory::peak_memory().map_or(0, |bytes| bytes as u64)
}

/// Where each entry's rows stand.
fn spans(step: &Step) -> Vec<Span> {
    let mut row = 0;
    step.entries
        .iter()
        .map(|entry| {
            let span = Span {
                row,
                count: entry.tokens.len(),
                start: entry.start as usize,
            };
            row += span.count;
            span
        })
        .collect()
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
