//! A stage on the CUDA kernels of this program: launched straight through the driver, in one stream, a decoding step
//! recorded once and played again. What a step needs goes to the GPU in one copy, what it becomes comes back in one.

mod launch;
mod load;
mod pages;
mod step;
mod work;

use super::architecture::LinearSpec;
use super::engine::{Engine, Entering, Leaving, Left, Part, Parts, Wanted};
use super::weights::Weights;
use crate::sampler::Scores;
use anyhow::{Context, Result, ensure};
use load::{Layer, Loader};
use mlx_pipe_cuda::{
    Best, Buffer, ELEMENT_BYTES, Gpu, Heads, Kernels, Model, Pools, Recording, Weight,
};
use mlx_rs::Dtype;
use pages::{PAGE_TOKENS, Pages};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use step::{Numbers, TileSizes};
use work::Work;

/// Rows up to which a step is worth recording: those of decoding.
const MOST_RECORDED_ROWS: usize = 128;
/// Recordings that are kept; then all are made anew.
const MOST_RECORDINGS: usize = 256;

/// GPUs that the kernels can use on this host.
pub fn devices() -> usize {
    mlx_pipe_cuda::count()
}

/// A GPU, and where compiled kernels are kept.
#[derive(Debug)]
pub struct Cuda {
    gpu: Arc<Gpu>,
    cache: Option<PathBuf>,
}

impl Cuda {
    /// The GPU of this number. `cache`: folder for compiled kernels.
    ///
    /// # Errors
    /// There is none, it is too old, or it fails.
    pub fn open(ordinal: usize, cache: Option<PathBuf>) -> Result<Self> {
        Ok(Self {
            gpu: Gpu::open(ordinal)?,
            cache,
        })
    }

    /// What its maker calls it.
    pub fn name(&self) -> &str {
        self.gpu.name()
    }

    /// Bytes a second that the GPU's memory carries, by what its driver says; 0 where that says nothing.
    pub fn bytes_per_s(&self) -> u64 {
        self.gpu.bytes_per_s()
    }

    /// Bytes of its memory.
    pub fn memory_bytes(&self) -> u64 {
        self.gpu.memory_bytes()
    }

    /// Most bytes that this process ever held in it.
    pub fn peak_bytes(&self) -> u64 {
        self.gpu.peak_bytes()
    }

    /// Counts the peak anew.
    pub fn forget_peak(&self) {
        self.gpu.forget_peak();
    }
}

/// The version of the run-time compiler.
///
/// # Errors
/// There is none.
pub fn compiler() -> Result<String> {
    mlx_pipe_cuda::compiler()
}

/// Layers, caches and ends on a GPU.
#[derive(Debug)]
pub struct CudaEngine {
    kernels: Kernels,
    model: Model,
    /// Activations enter and leave in this, and are computed in the model's element.
    dtype: Dtype,
    hidden_size: usize,
    table: Option<Weight>,
    layers: Vec<Layer>,
    /// Layers that are computed.
    used: usize,
    head: Option<Head>,
    eps: f32,
    frequencies: Buffer,
    pages: Pages,
    /// Keys and values of each layer.
    pools: Vec<Pools>,
    /// Pages that each pool has.
    pool_pages: usize,
    work: Work,
    recordings: HashMap<Shape, Option<Recording>>,
}

/// The final norm and the head.
#[derive(Debug)]
struct Head {
    norm: Buffer,
    /// `None`: the embedding table.
    projection: Option<Weight>,
    vocab_size: usize,
}

/// All that decides which kernels a step launches, and with what: steps of one shape are one recording.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    tokens: usize,
    few: usize,
    few_tokens: usize,
    many: usize,
    parts: usize,
    wanted: usize,
    is_for_head: bool,
    used: usize,
}

impl CudaEngine {
    /// Loads the parts, and compiles the kernels for them unless an earlier run has.
    ///
    /// # Errors
    /// A tensor that cannot be read, a model without kernels, or a GPU that fails or is too small.
    pub fn load(parts: Parts, weights: &mut Weights, cuda: &Cuda) -> Result<Self> {
        let architecture = parts.architecture;
        let model = load::model(parts).context(
            "this model cannot be computed by our CUDA kernels; try --kernels mlx, or --device cpu",
        )?;
        let dtype = weights.activation_dtype();
        let kernels = Kernels::load(&cuda.gpu, &model, cuda.cache.as_deref())?;
        let mut loader = Loader {
            weights,
            gpu: &cuda.gpu,
            element: model.element,
        };
        let layers = parts
            .layers
            .iter()
            .map(|spec| loader.layer(spec))
            .collect::<Result<Vec<_>>>()?;
        let table = parts.table.map(|spec| loader.linear(spec)).transpose()?;
        let head = parts
            .head
            .map(|spec| Self::load_head(&mut loader, parts, spec))
            .transpose()?;
        let frequencies = loader.frequencies(architecture)?;
        Ok(Self {
            work: Work::new(&cuda.gpu)?,
            kernels,
            dtype,
            hidden_size: architecture.hidden_size,
            table,
            used: layers.len(),
            layers,
            head,
            eps: architecture.rms_norm_eps,
            frequencies,
            pages: Pages::default(),
            pools: Vec::new(),
            pool_pages: 0,
            recordings: HashMap::new(),
            model,
        })
    }

    fn load_head(loader: &mut Loader, parts: Parts, spec: &LinearSpec) -> Result<Head> {
        let is_table = parts.table == parts.head;
        Ok(Head {
            norm: loader.norm(&parts.architecture.norm)?,
            projection: (!is_table).then(|| loader.linear(spec)).transpose()?,
            vocab_size: spec.outputs,
        })
    }

    fn heads(&self) -> Heads {
        self.model.heads
    }

    /// The weight that tokens are looked up in.
    fn table(&self) -> Result<&Weight> {
        let of_head = self.head.as_ref().and_then(|head| head.projection.as_ref());
        let table = self.table.as_ref().or(of_head);
        table.context("this stage has no embedding table")
    }

    fn projection<'a>(&'a self, head: &'a Head) -> Result<&'a Weight> {
        let projection = head.projection.as_ref().or(self.table.as_ref());
        projection.context("this stage has no head")
    }

    /// Bytes of a page of keys (or of values) in one layer.
    fn page_bytes(&self) -> usize {
        let heads = self.heads();
        heads.kv * heads.dim * PAGE_TOKENS * ELEMENT_BYTES
    }

    /// Pools of at least so many pages, with what they hold. One layer at a time, so that little is there twice.
    fn grow_pools(&mut self, pages: usize) -> Result<()> {
        if pages <= self.pool_pages && !self.pools.is_empty() {
            return Ok(());
        }
        let gpu = self.kernels.gpu();
        let (bytes, held) = (
            pages.max(1) * self.page_bytes(),
            self.pool_pages * self.page_bytes(),
        );
        for layer in 0..self.layers.len() {
            let pools = Pools {
                keys: Buffer::zeroed(gpu, bytes)?,
                values: Buffer::zeroed(gpu, bytes)?,
            };
            match self.pools.get_mut(layer) {
                None => self.pools.push(pools),
                Some(old) => {
                    pools.keys.copy_from(0, &old.keys, 0, held)?;
                    pools.values.copy_from(0, &old.values, 0, held)?;
                    *old = pools;
                }
            }
        }
        self.pool_pages = pages;
        self.recordings.clear();
        Ok(())
    }

    /// Pages for the parts' tokens, none of which another sequence reads.
    fn make_room(&mut self, parts: &[Part]) -> Result<()> {
        let mut copies = Vec::new();
        for part in parts {
            let span = part.span;
            copies.extend(self.pages.extend(part.slot, span.start, span.count)?);
        }
        let needed = self.pages.count();
        if needed > self.pool_pages {
            self.grow_pools(needed.max(self.pool_pages + self.pool_pages / 2))?;
        }
        let bytes = self.page_bytes();
        for copy in copies {
            let (from, to) = (copy.from as usize * bytes, copy.to as usize * bytes);
            for pools in &self.pools[..self.used] {
                for pool in [&pools.keys, &pools.values] {
                    pool.copy_from(to, pool, from, bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Launches a step's kernels: as they were recorded, if steps of this shape come again and again.
    fn compute(&mut self, numbers: &Numbers, shape: Shape) -> Result<()> {
        if shape.rows > MOST_RECORDED_ROWS || shape.many > 0 {
            return self.launch(numbers, &shape);
        }
        if self.recordings.len() >= MOST_RECORDINGS {
            self.recordings.clear();
        }
        match self.recordings.get(&shape) {
            // The first of its shape may be the last.
            None => {
                self.launch(numbers, &shape)?;
                self.recordings.insert(shape, None);
            }
            Some(Some(recording)) => recording.play()?,
            Some(None) => {
                let recording = self.kernels.gpu().record(|| self.launch(numbers, &shape))?;
                recording.play()?;
                self.recordings.insert(shape, Some(recording));
            }
        }
        Ok(())
    }

    /// Elements of activations as they travel.
    fn to_wire(&self, elements: &[u8]) -> Vec<u8> {
        match self.dtype {
            Dtype::Float32 => load::to_floats(self.model.element, elements),
            _ => elements.to_vec(),
        }
    }

    /// What the rows wanted have come to.
    fn scores(&mut self, wanted: &[Wanted]) -> Result<Vec<Scores>> {
        if wanted.is_empty() {
            self.kernels.gpu().finish()?;
            return Ok(Vec::new());
        }
        let head = self.head.as_ref().context("this stage has no head")?;
        let (vocab_size, stride) = (head.vocab_size, self.projection(head)?.outputs);
        let best = self.work.read_best(wanted.len())?;
        let mut scores: Vec<Scores> = best
            .chunks_exact(Best::BYTES)
            .map(|bytes| {
                let best = Best::from_bytes(bytes.try_into().unwrap_or_default());
                Scores::Best(best.token)
            })
            .collect();
        for (row, wanted) in wanted.iter().enumerate() {
            if !wanted.is_best_enough {
                let bytes = self.work.read_logits(row * stride * 4, vocab_size * 4)?;
                let logits = bytes
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|&bytes| f32::from_le_bytes(bytes));
                scores[row] = Scores::All(logits.collect());
            }
        }
        Ok(scores)
    }
}

impl Engine for CudaEngine {
    fn embed(&mut self, tokens: &[u32]) -> Result<Vec<u8>> {
        let ids: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
        let sizes = self.sizes(tokens.len(), 0, 0);
        if self.work.make_room(&sizes)? {
            self.recordings.clear();
        }
        self.work.write_numbers(&ids)?;
        self.kernels.look_up(
            self.table()?,
            self.work.numbers(&(0..ids.len())),
            &self.work.x,
        )?;
        let elements = self
            .work
            .read_x(tokens.len() * self.hidden_size * ELEMENT_BYTES)?
            .to_vec();
        Ok(self.to_wire(&elements))
    }

    fn run(&mut self, entering: Entering, parts: &[Part], leaving: Leaving) -> Result<Left> {
        self.make_room(parts)?;
        let rows: usize = parts.iter().map(|part| part.span.count).sum();
        let (tokens, hidden): (&[u32], &[u8]) = match entering {
            Entering::Tokens(tokens) => (tokens, &[]),
            Entering::Hidden(hidden) => (&[], hidden),
        };
        let wanted = match leaving {
            Leaving::Hidden => &[],
            Leaving::Scores(wanted) => wanted,
        };
        ensure!(rows > 0, "a step without rows");
        let tile_sizes = TileSizes {
            few: self.kernels.few_tokens(),
            many: self.kernels.many_tokens(),
        };
        let numbers = Numbers::new(tokens, parts, wanted, &self.pages, tile_sizes);
        let heads = self.heads();
        let of_few = mlx_pipe_cuda::partial_bytes(heads, numbers.few_tokens, numbers.parts);
        let of_one = mlx_pipe_cuda::decode_partial_bytes(heads, numbers.parts);
        let partial_bytes = of_few.max(of_one);
        let mut sizes = self.sizes(rows, wanted.len(), partial_bytes);
        sizes.numbers = numbers.all.len() * 4;
        sizes.arrived =
            mlx_pipe_cuda::arrived_bytes(heads, numbers.few.len() / mlx_pipe_cuda::TILE);
        if self.work.make_room(&sizes)? {
            self.recordings.clear();
        }
        self.work.write_numbers(&numbers.all)?;
        if !hidden.is_empty() {
            match self.dtype {
                Dtype::Float32 => {
                    let floats = hidden
                        .as_chunks::<4>()
                        .0
                        .iter()
                        .map(|&bytes| f32::from_le_bytes(bytes));
                    self.work
                        .write_x(&load::from_floats(self.model.element, floats))?;
                }
                _ => self.work.write_x(hidden)?,
            }
        }
        let shape = Shape {
            rows,
            tokens: tokens.len(),
            few: numbers.few.len(),
            few_tokens: numbers.few_tokens,
            many: numbers.many.len(),
            parts: numbers.parts,
            wanted: wanted.len(),
            is_for_head: matches!(leaving, Leaving::Scores(_)),
            used: self.used,
        };
        self.compute(&numbers, shape)?;
        match leaving {
            Leaving::Hidden => {
                let elements = self
                    .work
                    .read_x(rows * self.hidden_size * ELEMENT_BYTES)?
                    .to_vec();
                Ok(Left::Hidden(self.to_wire(&elements)))
            }
            Leaving::Scores(wanted) => Ok(Left::Scores(self.scores(wanted)?)),
        }
    }

    /// Holds the tokens once: both sequences have the same pages.
    fn fork(&mut self, from: u32, to: u32, tokens: usize) -> Result<()> {
        self.pages.fork(from, to, tokens)
    }

    fn release(&mut self, slot: u32) {
        self.pages.release(slot);
    }

    fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.grow_pools(tokens.div_ceil(PAGE_TOKENS))
    }

    fn use_layers(&mut self, count: usize) {
        self.pages.clear();
        self.used = count.min(self.layers.len());
    }

    fn pretend_cached(&mut self, slot: u32, tokens: usize) -> Result<()> {
        self.pages.release(slot);
        self.pages.extend(slot, 0, tokens)?;
        self.grow_pools(self.pages.count())
    }
}

impl CudaEngine {
    /// Memory to work in for so many rows, of which so many are wanted.
    fn sizes(&self, rows: usize, wanted: usize, partial_bytes: usize) -> work::Sizes {
        let heads = self.heads();
        let row = |width: usize| rows * width * ELEMENT_BYTES;
        let mlp = self
            .layers
            .first()
            .map_or(0, |layer| layer.gate_up_proj.outputs / 2);
        let stride = self
            .head
            .as_ref()
            .and_then(|head| self.projection(head).ok());
        work::Sizes {
            x: row(self.hidden_size),
            normed: rows.max(wanted) * self.hidden_size * ELEMENT_BYTES,
            qkv: row(heads.qkv_width()),
            queries: row(heads.queries * heads.dim),
            attended: row(heads.queries * heads.dim),
            mlp: row(mlp),
            partial: partial_bytes,
            arrived: 0,
            logits: wanted * stride.map_or(0, |weight| weight.outputs) * 4,
            best_work: mlx_pipe_cuda::best_bytes(wanted),
            best: wanted * Best::BYTES,
            numbers: rows * 4,
        }
    }
}
