//! A step of one token through all layers as one kernel.

use crate::device::{Buffer, Gpu};
use crate::kernels::Kernels;
use crate::launch::{Words, address};
use crate::operands::{
    AttendWork, ELEMENT_BYTES, PART_PAGES, Pools, Rotation, TILE, Tiles, Weight, arrived_bytes,
    partial_bytes,
};
use crate::program::{Format, Heads, PAGE_TOKENS};
use anyhow::{Context, Result, ensure};

/// Bytes of the counters by which thread blocks wait for one another.
pub const PROGRESS_BYTES: usize = 3 * 4;

/// What a kernel of all layers is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decode {
    /// Of all weights of all layers.
    pub format: Format,
    /// Layers that there are.
    pub layers: usize,
    /// Columns of the widest weight.
    pub widest: usize,
}

/// What decides which kernels a GPU has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    pub(crate) capability: (i32, i32),
    /// Of a thread block.
    pub(crate) shared_bytes: usize,
    pub(crate) multiprocessors: usize,
}

impl Target {
    pub(crate) fn of(gpu: &Gpu) -> Self {
        Self {
            capability: gpu.capability(),
            shared_bytes: gpu.shared_bytes(),
            multiprocessors: gpu.multiprocessors(),
        }
    }
}

/// Lowest compute capability of the kernel of all layers: copies by the GPU's own engine.
pub(crate) const LEAST_CAPABILITY: (i32, i32) = (9, 0);
/// Warps of a thread block (`WARPS` of the kernels), and tiles whose sums it has at a time (`ROUND`).
const WARPS: usize = 16;
const ROUND: usize = 12;
/// Most layers whose addresses a kernel's arguments have room for.
const MOST_LAYERS: usize = 200;
/// Chunks of weights that each warp is to have asked for, at least and at most.
const STAGES: std::ops::RangeInclusive<usize> = 3..=16;

impl Decode {
    /// Bytes of a chunk of weights (`Chunks::BYTES` of the kernels).
    fn chunk_bytes(self) -> usize {
        let scales = if self.format == Format::PLAIN { 0 } else { 64 };
        let blocks = if self.format == Format::PLAIN { 1 } else { 2 };
        blocks * (16 * self.format.block() * self.format.bits / 8 + scales)
    }

    /// Bytes of a row of activations, a block more, and the sums of its blocks.
    fn row_bytes(self) -> usize {
        let block = self.format.block();
        (self.widest + block) * 2 + (self.widest / block + 2) * 4
    }

    /// Chunks that each warp has room for beside a row of activations, of so much shared memory; `None` if
    /// they are too few.
    pub(crate) fn stages(self, heads: Heads, target: Target) -> Option<usize> {
        if target.capability < LEAST_CAPABILITY || target.multiprocessors < heads.kv {
            return None;
        }
        // Sums, products of a page, parts that are merged, queries, a key and a value, barriers, and a few numbers.
        let of_heads = (heads.group() + 2) * heads.dim * 2;
        let barriers = WARPS * STAGES.end() * 8;
        let declared =
            ROUND * WARPS * 16 * 4 + 8 * 32 * 16 + WARPS * 32 * 16 + of_heads + barriers + 256;
        let left = target
            .shared_bytes
            .checked_sub(declared + self.row_bytes())?;
        let stages = (left / (WARPS * self.chunk_bytes())).min(*STAGES.end());
        (stages >= *STAGES.start() && self.layers <= MOST_LAYERS).then_some(stages)
    }

    /// Shared memory of a thread block beside what its kernel declares; `None` if there is no kernel.
    pub(crate) fn shared_bytes(self, heads: Heads, gpu: &Gpu) -> Option<usize> {
        let stages = self.stages(heads, Target::of(gpu))?;
        Some(stages * WARPS * self.chunk_bytes() + self.row_bytes())
    }
}

/// Words of `Decode` of the kernels before its layers, and of a layer.
const HEADER_WORDS: usize = 16;
const LAYER_WORDS: usize = 18;

/// One layer's operands.
#[derive(Debug, Clone, Copy)]
pub struct LayerOperands<'a> {
    /// Queries, keys and values; output; gate and the other factor in turns of eight rows; down.
    pub weights: [&'a Weight; 4],
    /// Of what enters, and of what attention leaves: `[hidden]`.
    pub norms: [&'a Buffer; 2],
    /// As in [`Rotation::norms`].
    pub qk_norms: Option<(&'a Buffer, &'a Buffer)>,
    /// Keys and values.
    pub pools: &'a Pools,
}

/// Where a step of one token is computed.
#[derive(Debug, Clone, Copy)]
pub struct DecodeWork<'a> {
    /// `[hidden]`, what enters and leaves.
    pub x: &'a Buffer,
    /// `[(queries + 2 kv) * head_dim]`
    pub qkv: &'a Buffer,
    /// `[queries * head_dim]`
    pub attended: &'a Buffer,
    /// As wide as the MLP.
    pub mlp: &'a Buffer,
    /// Of attention; `partial` as [`decode_partial_bytes`] says.
    pub attend: AttendWork<'a>,
    /// [`PROGRESS_BYTES`], all zero before; and after.
    pub progress: &'a Buffer,
}

impl Kernels {
    /// Whether there is a kernel for all layers.
    pub fn can_decode(&self) -> bool {
        self.decode.is_some()
    }

    /// Computes `layers` for one token: the bits of [`Self::linear`], [`Self::rotate`] and [`Self::attend`]. `tiles` has
    /// one of few, `rotation` what layers share.
    ///
    /// # Errors
    /// There is no such kernel, layers are not of what it is made for, buffers are too small, or the driver fails. That
    /// places, tiles and tables are right is the caller's to see to.
    pub fn decode(
        &self,
        layers: &[LayerOperands],
        rotation: Rotation,
        tiles: Tiles,
        work: DecodeWork,
    ) -> Result<()> {
        let (kernel, made_for) = self.decode.as_ref().context("no kernel for all layers")?;
        let heads = self.heads;
        let first = layers.first().context("a step without layers")?;
        let sizes = first.weights.map(|weight| (weight.outputs, weight.inputs));
        let [(qkv, hidden), (_, queries), _, (_, mlp)] = sizes;
        ensure!(
            layers.len() <= made_for.layers
                && sizes.iter().all(|&(_, inputs)| inputs <= made_for.widest)
                && qkv == heads.qkv_width()
                && queries == heads.queries * heads.dim
                && sizes[1..] == [(hidden, queries), (2 * mlp, hidden), (hidden, mlp)],
            "the kernel for all layers is not made for {sizes:?}"
        );
        let pool = heads.kv * heads.dim * PAGE_TOKENS * ELEMENT_BYTES;
        for layer in layers {
            for (weight, size) in layer.weights.iter().zip(sizes) {
                weight.check()?;
                ensure!(
                    weight.format == made_for.format && (weight.outputs, weight.inputs) == size,
                    "layers differ in what their weights are"
                );
            }
            ensure!(
                layer.weights[2].bias.is_none() && layer.qk_norms.is_some() == heads.has_norm,
                "norms of queries and keys, or a gated layer with a bias"
            );
            let (q, k) = layer.qk_norms.unzip();
            let of_heads = q.into_iter().chain(k).map(|norm| (norm, heads.dim));
            for (norm, width) in layer
                .norms
                .map(|norm| (norm, hidden))
                .into_iter()
                .chain(of_heads)
            {
                ensure!(
                    norm.bytes() >= width * ELEMENT_BYTES,
                    "a norm that is too short"
                );
            }
            ensure!(
                layer.pools.keys.bytes() >= pool && layer.pools.values.bytes() >= pool,
                "a pool without pages"
            );
        }
        for (buffer, width) in [
            (work.x, hidden),
            (work.qkv, qkv),
            (work.attended, queries),
            (work.mlp, mlp),
        ] {
            ensure!(
                buffer.bytes() >= width * ELEMENT_BYTES,
                "a buffer is too short"
            );
        }
        ensure!(
            work.progress.bytes() >= PROGRESS_BYTES
                && work.attend.arrived.bytes() >= arrived_bytes(heads, 1)
                && work.attend.partial.bytes() >= decode_partial_bytes(heads, tiles.parts)
                && rotation.frequencies.bytes() >= heads.dim / 2 * 4,
            "a buffer is too short"
        );
        let pair = |low: usize, high: usize| (low as u32 as u64) | ((high as u32 as u64) << 32);
        let mut words = vec![
            work.x.address(),
            work.qkv.address(),
            work.attended.address(),
            work.mlp.address(),
            work.attend.partial.address(),
            work.attend.arrived.address(),
            work.progress.address(),
            rotation.frequencies.address(),
            rotation.places.address(2)?,
            tiles.few.address(TILE)?,
            tiles.table.address(tiles.table.count)?,
            pair(sizes[0].1, sizes[1].1),
            pair(sizes[2].1, sizes[3].1),
            pair(sizes[0].0, sizes[1].0),
            pair(sizes[2].0, sizes[3].0),
            pair(rotation.eps.to_bits() as usize, layers.len()),
        ];
        for layer in layers {
            for weight in layer.weights {
                words.extend([
                    weight.codes.address(),
                    address(weight.scales.as_ref()),
                    address(weight.bias.as_ref()),
                ]);
            }
            let (q, k) = layer.qk_norms.unzip();
            words.extend(layer.norms.map(Buffer::address));
            words.extend([address(q), address(k)]);
            words.extend([layer.pools.keys.address(), layer.pools.values.address()]);
        }
        // The kernel's parameter has room for all layers, also where fewer are computed.
        words.resize(HEADER_WORDS + made_for.layers * LAYER_WORDS, 0);
        let grid = [self.gpu.multiprocessors(), 1, 1];
        // SAFETY: the words are `Decode` of the kernels; sizes were checked above. There is a thread block for each
        // multiprocessor, which has room for it once the work before has ended, so that all are there to be waited for.
        unsafe { kernel.launch(&self.gpu, grid, &[&Words(words)]) }
    }
}

/// Bytes of partial results of a step of one token that sees so many [`crate::parts`].
pub fn decode_partial_bytes(heads: Heads, parts: usize) -> usize {
    partial_bytes(heads, 1, parts * PART_PAGES)
}
