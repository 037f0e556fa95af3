//! A stage on MLX's own kernels, on whatever device MLX computes on.

use super::architecture::Architecture;
use super::cache::{KvShape, LayerCache};
use super::engine::{Arrays, Part, Parts, element_bytes, ensure_held, unknown};
use super::layer::Layer;
use super::linear::{Linear, RmsNorm};
use super::rope::Rope;
use super::weights::Weights;
use anyhow::{Context, Result};
use mlx_rs::ops::zeros_dtype;
use mlx_rs::{Array, Dtype};
use std::collections::HashMap;

/// Activations that may be allocated ahead of what has been computed. MLX allocates as it queues, so a
/// long prompt through many layers would hold those of all of them at the same time.
const MOST_AHEAD_BYTES: usize = 48 << 20;

/// Layers, caches and ends as MLX arrays.
#[derive(Debug)]
pub struct MlxEngine {
    table: Option<Linear>,
    layers: Vec<Layer>,
    /// Layers that are computed.
    used: usize,
    head: Option<(RmsNorm, Linear)>,
    rope: Rope,
    /// What one row's activations take in one layer, about.
    layer_row_bytes: usize,
    kv_shape: KvShape,
    dtype: Dtype,
    /// For every sequence in flight, a cache for each layer.
    caches: HashMap<u32, Vec<LayerCache>>,
}

impl MlxEngine {
    /// Loads the parts.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn load(parts: Parts, weights: &mut Weights) -> Result<Self> {
        let Parts { architecture, .. } = parts;
        let dtype = weights.activation_dtype();
        let layers = parts
            .layers
            .iter()
            .map(|spec| Layer::load(architecture, spec, weights))
            .collect::<Result<Vec<_>>>()?;
        let table = match parts.table {
            None => None,
            Some(spec) => Some(Linear::load(spec, weights)?),
        };
        let head = match parts.head {
            None => None,
            Some(spec) => {
                let norm = RmsNorm::load(&architecture.norm, architecture.rms_norm_eps, weights)?;
                let projection = match &table {
                    Some(table) if parts.table == parts.head => table.clone(),
                    _ => Linear::load(spec, weights)?,
                };
                Some((norm, projection))
            }
        };
        Ok(Self {
            table,
            used: layers.len(),
            layers,
            head,
            rope: Rope::new(architecture),
            layer_row_bytes: layer_row_bytes(architecture, dtype),
            kv_shape: KvShape {
                kv_head_count: architecture.family.kv_head_count as i32,
                head_dim: architecture.family.head_dim as i32,
                dtype,
            },
            dtype,
            caches: HashMap::new(),
        })
    }

    /// The caches of the parts' sequences, cut back to where each part starts. They are put back after
    /// the step; a step that fails ends the run, so none is missed.
    fn take_caches(&mut self, parts: &[Part]) -> Result<Vec<Vec<LayerCache>>> {
        parts
            .iter()
            .map(|part| {
                let mut of_sequence = match self.caches.remove(&part.slot) {
                    Some(caches) => caches,
                    None => self.new_caches()?,
                };
                for cache in &mut of_sequence {
                    cache.cut_back(part.span.start)?;
                }
                Ok(of_sequence)
            })
            .collect()
    }

    fn new_caches(&self) -> Result<Vec<LayerCache>> {
        (0..self.used)
            .map(|_| LayerCache::new(self.kv_shape))
            .collect()
    }
}

impl Arrays for MlxEngine {
    fn look_up(&self, tokens: &[u32]) -> Result<Array> {
        let table = self.table.as_ref();
        let table = table.or(self.head.as_ref().map(|(_, projection)| projection));
        let table = table.context("this stage has no embedding table")?;
        table.rows(
            &Array::from_slice(tokens, &[tokens.len() as i32]),
            self.dtype,
        )
    }

    fn forward(&mut self, mut x: Array, parts: &[Part]) -> Result<Array> {
        let mut caches = self.take_caches(parts)?;
        let spans: Vec<_> = parts.iter().map(|part| part.span).collect();
        let rows: usize = spans.iter().map(|span| span.count).sum();
        let mut ahead_bytes = 0;
        for (index, layer) in self.layers[..self.used].iter().enumerate() {
            let mut of_layer: Vec<&mut LayerCache> =
                caches.iter_mut().map(|cache| &mut cache[index]).collect();
            x = layer.forward(&x, &self.rope, &spans, &mut of_layer)?;
            ahead_bytes += rows * self.layer_row_bytes;
            if ahead_bytes > MOST_AHEAD_BYTES {
                x.eval()?;
                ahead_bytes = 0;
            }
        }
        let slots = parts.iter().map(|part| part.slot);
        self.caches.extend(slots.zip(caches));
        Ok(x)
    }

    fn logits(&self, x: &Array, rows: &[u32]) -> Result<Array> {
        let (norm, projection) = self.head.as_ref().context("this stage has no head")?;
        let rows = Array::from_slice(rows, &[rows.len() as i32]);
        let normed = norm.forward(&x.take_axis(rows, 0)?)?;
        Ok(projection.forward(&normed)?.as_dtype(Dtype::Float32)?)
    }

    /// Holds the tokens twice: arrays are values, so the new sequence has copies.
    fn fork(&mut self, from: u32, to: u32, tokens: usize) -> Result<()> {
        let caches = self.caches.get(&from).with_context(|| unknown(from))?;
        let fork = |cache: &LayerCache| {
            ensure_held(from, tokens, cache.length())?;
            cache.fork(tokens)
        };
        let forked = caches.iter().map(fork).collect::<Result<_>>()?;
        self.caches.insert(to, forked);
        Ok(())
    }

    fn release(&mut self, slot: u32) {
        self.caches.remove(&slot);
    }

    fn use_layers(&mut self, count: usize) {
        self.caches.clear();
        self.used = count.min(self.layers.len());
    }

    fn pretend_cached(&mut self, slot: u32, tokens: usize) -> Result<()> {
        let shape = self.kv_shape;
        let dims = [1, shape.kv_head_count, tokens as i32, shape.head_dim];
        let zeros = zeros_dtype(&dims, shape.dtype)?;
        let mut caches = self.new_caches()?;
        for cache in &mut caches {
            let (keys, values) = cache.extend(&zeros, &zeros)?;
            keys.eval()?;
            values.eval()?;
        }
        self.caches.insert(slot, caches);
        Ok(())
    }
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
