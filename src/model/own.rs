//! A stage on the CPU kernels of this program: each layer one MLX primitive, its weights repacked as they are
//! loaded, its caches in blocks of 64 tokens.

use super::architecture::{Architecture, LayerSpec, LinearSpec, NormSpec};
use super::engine::{Arrays, Part, Parts, ensure_held, unknown};
use super::rope::frequencies;
use super::weights::Weights;
use anyhow::{Context, Result, anyhow, ensure};
use mlx_pipe_kernels::primitive::{Compute, computed};
use mlx_pipe_kernels::{
    Attention, FloatType, HeadShape, Isa, Kept, KvCache, Layer, Linear, Norm, PackedRows, Plain,
    PlainShape, Pool, Quantized, QuantizedShape, Rotation, Rows, Scratch, Span, Step, Weight,
    multiply, wanted,
};
use mlx_rs::Array;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Codes that are read at a time, to be repacked.
const PIECE_BYTES: usize = 4 << 20;

/// Rows of a block of the kernels: pieces are whole blocks.
const BLOCK_ROWS: usize = 16;

/// What the kernels run on, in this process.
#[derive(Debug)]
pub struct Machine {
    isa: Isa,
    pool: Pool,
    scratch: Mutex<Scratch>,
}

impl Machine {
    /// The best instruction set of this processor, and so many threads.
    ///
    /// # Errors
    /// An instruction set that this processor lacks was asked for.
    pub fn new(threads: usize) -> Result<Self> {
        Ok(Self {
            isa: Isa::chosen().map_err(|error| anyhow!(error))?,
            pool: Pool::new(threads),
            scratch: Mutex::default(),
        })
    }

    fn parts(&self) -> (Isa, &Pool) {
        (self.isa, &self.pool)
    }
}

/// The cache of one sequence in one layer. Locked by whoever computes the layer.
type Cache = Arc<Mutex<KvCache>>;

/// Layers, caches and ends as the kernels have them.
#[derive(Debug)]
pub struct OwnEngine {
    machine: Arc<Machine>,
    table: Option<Arc<Linear>>,
    layers: Vec<Arc<Layer>>,
    /// Layers that are computed.
    used: usize,
    head: Option<Arc<Head>>,
    hidden_size: usize,
    head_shape: HeadShape,
    /// Radians by which a position turns each pair of a head.
    frequencies: Vec<f64>,
    /// For every sequence in flight, a cache for each layer.
    caches: HashMap<u32, Vec<Cache>>,
}

/// The final norm and the head.
#[derive(Debug)]
struct Head {
    norm: Norm,
    projection: Arc<Linear>,
}

impl OwnEngine {
    /// Loads the parts.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn load(parts: Parts, weights: &mut Weights, machine: Arc<Machine>) -> Result<Self> {
        let Parts { architecture, .. } = parts;
        let mut loader = Loader {
            weights,
            pool: &machine.pool,
            eps: architecture.rms_norm_eps,
        };
        let layers = parts
            .layers
            .iter()
            .map(|spec| Ok(Arc::new(loader.layer(architecture, spec)?)))
            .collect::<Result<Vec<_>>>()?;
        let table = match parts.table {
            None => None,
            Some(spec) => Some(Arc::new(loader.linear(spec)?)),
        };
        let head = match parts.head {
            None => None,
            Some(spec) => {
                let norm = loader.norm(&architecture.norm)?;
                let projection = match &table {
                    Some(table) if parts.table == parts.head => Arc::clone(table),
                    _ => Arc::new(loader.linear(spec)?),
                };
                Some(Arc::new(Head { norm, projection }))
            }
        };
        Ok(Self {
            table,
            used: layers.len(),
            layers,
            head,
            hidden_size: architecture.hidden_size,
            head_shape: head_shape(architecture),
            frequencies: frequencies(architecture),
            caches: HashMap::new(),
            machine,
        })
    }

    /// The caches of the parts' sequences, cut back to where each part starts.
    fn caches_of(&mut self, parts: &[Part]) -> Result<Vec<Vec<Cache>>> {
        let (used, shape) = (self.used, self.head_shape);
        let of_part = |part: &Part| {
            let new = || (0..used).map(|_| Arc::new(Mutex::new(KvCache::new(shape))));
            let caches = self
                .caches
                .entry(part.slot)
                .or_insert_with(|| new().collect());
            for cache in &*caches {
                let mut cache = lock(cache);
                ensure!(
                    part.span.start <= cache.length(),
                    "the step starts at position {}, but this rank's cache holds only {} tokens",
                    part.span.start,
                    cache.length()
                );
                cache.resize(part.span.start);
            }
            Ok(caches.clone())
        };
        parts.iter().map(of_part).collect()
    }
}

impl Arrays for OwnEngine {
    fn look_up(&self, tokens: &[u32]) -> Result<Array> {
        let table = self.table.as_ref();
        let table = table.or(self.head.as_ref().map(|head| &head.projection));
        let table = table.context("this stage has no embedding table")?;
        let mut rows = vec![0f32; tokens.len() * self.hidden_size];
        for (&token, row) in tokens.iter().zip(rows.chunks_exact_mut(self.hidden_size)) {
            table.row(token as usize, row);
        }
        let shape = [tokens.len() as i32, self.hidden_size as i32];
        Ok(Array::from_slice(&rows, &shape))
    }

    fn forward(&mut self, mut x: Array, parts: &[Part]) -> Result<Array> {
        let caches = self.caches_of(parts)?;
        let spans: Vec<Span> = parts.iter().map(|part| part.span).collect();
        let step = Arc::new(Step {
            rotation: Rotation::new(&self.frequencies, &spans),
            spans,
        });
        for (index, layer) in self.layers[..self.used].iter().enumerate() {
            let (machine, layer) = (Arc::clone(&self.machine), Arc::clone(layer));
            let of_layer = caches.iter().map(|caches| Arc::clone(&caches[index]));
            let (of_layer, step): (Vec<Cache>, _) = (of_layer.collect(), Arc::clone(&step));
            let compute: Compute = Box::new(move |inputs, y| {
                let mut locked: Vec<_> = of_layer.iter().map(|cache| lock(cache)).collect();
                let mut caches: Vec<&mut KvCache> =
                    locked.iter_mut().map(|cache| &mut **cache).collect();
                let scratch = &mut lock(&machine.scratch);
                layer.forward(machine.parts(), &step, &mut caches, scratch, (inputs[0], y));
            });
            x = computed(&[&x], x.shape(), compute).context("MLX cannot make an array")?;
        }
        Ok(x)
    }

    fn logits(&self, x: &Array, rows: &[u32]) -> Result<Array> {
        let head = self.head.as_ref().context("this stage has no head")?;
        let shape = [rows.len() as i32, head.projection.outputs() as i32];
        let (machine, head) = (Arc::clone(&self.machine), Arc::clone(head));
        let (rows, width) = (rows.to_vec(), self.hidden_size);
        let compute: Compute = Box::new(move |inputs, logits| {
            let row = |&row: &u32| &inputs[0][row as usize * width..][..width];
            let x: Vec<f32> = rows.iter().flat_map(row).copied().collect();
            let linears = [&*head.projection];
            let mut prepared = Rows::default();
            prepared.prepare(
                machine.parts(),
                &x,
                width,
                Some(&head.norm),
                &wanted(linears),
            );
            multiply(machine.parts(), &linears, &prepared, None, logits);
        });
        computed(&[x], &shape, compute).context("MLX cannot make an array")
    }

    /// Holds the tokens once: both sequences' caches share their blocks.
    fn fork(&mut self, from: u32, to: u32, tokens: usize) -> Result<()> {
        let caches = self.caches.get(&from).with_context(|| unknown(from))?;
        let share = |cache: &Cache| {
            let cache = lock(cache);
            ensure_held(from, tokens, cache.length())?;
            Ok(Arc::new(Mutex::new(cache.share(tokens))))
        };
        let forked = caches.iter().map(share).collect::<Result<_>>()?;
        self.caches.insert(to, forked);
        Ok(())
    }

    fn release(&mut self, slot: u32) {
        self.caches.remove(&slot);
    }

    fn use_threads(&mut self, threads: usize) {
        self.machine.pool.limit(threads);
    }

    fn use_layers(&mut self, count: usize) {
        self.caches.clear();
        self.used = count.min(self.layers.len());
    }

    fn pretend_cached(&mut self, slot: u32, tokens: usize) -> Result<()> {
        let cache = || {
            let mut cache = KvCache::new(self.head_shape);
            cache.resize(tokens);
            Arc::new(Mutex::new(cache))
        };
        self.caches
            .insert(slot, (0..self.used).map(|_| cache()).collect());
        Ok(())
    }
}

/// What is locked is used by one computation at a time; one that panicked has ended the process.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn head_shape(architecture: &Architecture) -> HeadShape {
    HeadShape {
        head_count: architecture.head_count,
        kv_head_count: architecture.family.kv_head_count,
        head_dim: architecture.family.head_dim,
        // As exact as what is computed with.
        kept: match architecture.is_quantized() {
            true => Kept::I16,
            false => Kept::F32,
        },
    }
}

/// Makes weights of tensors.
struct Loader<'a, 'w, 'c> {
    weights: &'w mut Weights<'c>,
    pool: &'a Pool,
    eps: f32,
}

impl Loader<'_, '_, '_> {
    fn layer(&mut self, architecture: &Architecture, spec: &LayerSpec) -> Result<Layer> {
        Ok(Layer {
            input_layernorm: self.norm(&spec.input_layernorm)?,
            qkv_proj: [
                self.linear(&spec.q_proj)?,
                self.linear(&spec.k_proj)?,
                self.linear(&spec.v_proj)?,
            ],
            attention: Attention {
                shape: head_shape(architecture),
                qk_norm: match &spec.qk_norm {
                    None => None,
                    Some((q, k)) => Some([self.norm(q)?, self.norm(k)?]),
                },
            },
            o_proj: self.linear(&spec.o_proj)?,
            post_attention_layernorm: self.norm(&spec.post_attention_layernorm)?,
            gate_proj: self.linear(&spec.gate_proj)?,
            up_proj: self.linear(&spec.up_proj)?,
            down_proj: self.linear(&spec.down_proj)?,
        })
    }

    fn norm(&mut self, spec: &NormSpec) -> Result<Norm> {
        let (bytes, dtype) = self.weights.take_bytes(&spec.tensor())?;
        Ok(Norm {
            weight: floats(&bytes, float_type(dtype)?),
            eps: self.eps,
        })
    }

    fn linear(&mut self, spec: &LinearSpec) -> Result<Linear> {
        let tensors = spec.tensors();
        let weight = match spec.quantized {
            None => self.plain(spec)?,
            Some(_) => self.quantized(spec)?,
        };
        let bias = match spec.bias {
            false => None,
            true => {
                let of_bias = tensors.last().context("a spec names its tensors")?;
                let (bytes, dtype) = self.weights.take_bytes(of_bias)?;
                Some(floats(&bytes, float_type(dtype)?))
            }
        };
        Ok(Linear { weight, bias })
    }

    fn plain(&mut self, spec: &LinearSpec) -> Result<Weight> {
        let pool = self.pool;
        let tensor = &spec.tensors()[0];
        // In the widest dtype, so that a piece is whole blocks in all.
        let block_bytes = BLOCK_ROWS * 4 * spec.inputs;
        let piece_bytes = block_bytes * (PIECE_BYTES / block_bytes).max(1);
        let begin = |dtype| {
            let shape = PlainShape {
                outputs: spec.outputs,
                inputs: spec.inputs,
                float_type: float_type(dtype)?,
            };
            Ok((Plain::zeroed(shape), 0))
        };
        let (weight, _) =
            self.weights
                .take_in_pieces(tensor, piece_bytes, begin, |state, piece| {
                    let (weight, block) = state;
                    weight.pack(pool, *block, piece);
                    *block += piece.len() / weight.shape().block_bytes();
                })?;
        Ok(Weight::Plain(weight))
    }

    fn quantized(&mut self, spec: &LinearSpec) -> Result<Weight> {
        let affine = spec.quantized.context("a quantised weight")?;
        let [codes, scales, biases, ..] = &spec.tensors()[..] else {
            return Err(anyhow!("{} has no scales and biases", spec.name));
        };
        let (scales, scale_dtype) = self.weights.take_bytes(scales)?;
        let (biases, bias_dtype) = self.weights.take_bytes(biases)?;
        ensure!(
            scale_dtype == bias_dtype,
            "the scales of {} are {scale_dtype}, its biases {bias_dtype}; expected the same dtype (or --kernels mlx)",
            spec.name
        );
        let shape = QuantizedShape {
            outputs: spec.outputs,
            inputs: spec.inputs,
            bits: affine.bits,
            group_size: affine.group_size,
            scale_type: float_type(scale_dtype)?,
        };
        let (pool, row_floats) = (self.pool, shape.groups() * shape.scale_type.bytes());
        let block_codes = BLOCK_ROWS * shape.row_bytes();
        let piece_bytes = block_codes * (PIECE_BYTES / block_codes).max(1);
        let begin = |_| Ok((Quantized::zeroed(shape), 0));
        let (weight, _) =
            self.weights
                .take_in_pieces(codes, piece_bytes, begin, |state, codes| {
                    let (weight, row) = state;
                    let rows = *row..*row + codes.len() / shape.row_bytes();
                    let floats = rows.start * row_floats..rows.end * row_floats;
                    let packed = PackedRows {
                        codes,
                        scales: &scales[floats.clone()],
                        biases: &biases[floats],
                    };
                    weight.pack(pool, rows.start / BLOCK_ROWS, packed);
                    *row = rows.end;
                })?;
        Ok(Weight::Quantized(weight))
    }
}

fn floats(bytes: &[u8], float_type: FloatType) -> Vec<f32> {
    (0..bytes.len() / float_type.bytes())
        .map(|index| float_type.get(bytes, index))
        .collect()
}

fn float_type(dtype: safetensors::Dtype) -> Result<FloatType> {
    match dtype {
        safetensors::Dtype::F32 => Ok(FloatType::F32),
        safetensors::Dtype::F16 => Ok(FloatType::F16),
        safetensors::Dtype::BF16 => Ok(FloatType::Bf16),
        other => Err(anyhow!("{other} is no dtype of floats that weights have")),
    }
}
