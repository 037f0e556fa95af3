//! One transformer layer, in the order of the mathematics:
//! `h = x + o_proj(attention(norm(x)))`, `y = h + down_proj(silu(gate_proj(n)) * up_proj(n))`.
//!
//! The tokens of a step are one `[tokens, hidden]` array, whatever sequences they belong to; only
//! rotary position and attention look at one sequence (a [`Span`]) at a time.

use super::architecture::{Architecture, LayerSpec};
use super::cache::LayerCache;
use super::linear::{Linear, RmsNorm};
use super::rope::Rope;
use super::weights::Weights;
use anyhow::Result;
use mlx_pipe_kernels::Span;
use mlx_rs::fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention};
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::ops::{concatenate, sigmoid};
use mlx_rs::{Array, Device, DeviceType};

/// The weights of one layer.
#[derive(Debug)]
pub struct Layer {
    input_layernorm: RmsNorm,
    attention: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    /// Loads the layer that the spec describes.
    pub fn load(
        architecture: &Architecture,
        spec: &LayerSpec,
        weights: &mut Weights,
    ) -> Result<Self> {
        let eps = architecture.rms_norm_eps;
        Ok(Self {
            input_layernorm: RmsNorm::load(&spec.input_layernorm, eps, weights)?,
            attention: Attention::load(architecture, spec, weights)?,
            post_attention_layernorm: RmsNorm::load(&spec.post_attention_layernorm, eps, weights)?,
            mlp: Mlp::load(spec, weights)?,
        })
    }

    /// `x`: `[tokens, hidden]`, `caches`: this layer's cache of each span's sequence -> `x`'s shape.
    pub fn forward(
        &self,
        x: &Array,
        rope: &Rope,
        spans: &[Span],
        caches: &mut [&mut LayerCache],
    ) -> Result<Array> {
        let normed = self.input_layernorm.forward(x)?;
        let h = x.add(self.attention.forward(&normed, rope, spans, caches)?)?;
        let normed = self.post_attention_layernorm.forward(&h)?;
        Ok(h.add(self.mlp.forward(&normed)?)?)
    }
}

/// Causal attention with grouped queries.
#[derive(Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    /// Norms of queries and keys over `head_dim`.
    qk_norm: Option<(RmsNorm, RmsNorm)>,
    head_count: i32,
    kv_head_count: i32,
    head_dim: i32,
    /// The device is a CPU.
    writes_scores: bool,
}

impl Attention {
    fn load(architecture: &Architecture, spec: &LayerSpec, weights: &mut Weights) -> Result<Self> {
        let eps = architecture.rms_norm_eps;
        let qk_norm = match &spec.qk_norm {
            None => None,
            Some((q, k)) => Some((
                RmsNorm::load(q, eps, weights)?,
                RmsNorm::load(k, eps, weights)?,
            )),
        };
        Ok(Self {
            q_proj: Linear::load(&spec.q_proj, weights)?,
            k_proj: Linear::load(&spec.k_proj, weights)?,
            v_proj: Linear::load(&spec.v_proj, weights)?,
            o_proj: Linear::load(&spec.o_proj, weights)?,
            qk_norm,
            head_count: architecture.head_count as i32,
            kv_head_count: architecture.family.kv_head_count as i32,
            head_dim: architecture.family.head_dim as i32,
            writes_scores: matches!(Device::try_default()?.get_type()?, DeviceType::Cpu),
        })
    }

    fn forward(
        &self,
        x: &Array,
        rope: &Rope,
        spans: &[Span],
        caches: &mut [&mut LayerCache],
    ) -> Result<Array> {
        let tokens = x.dim(0);
        // [tokens, heads, head_dim]
        let mut q = self
            .q_proj
            .forward(x)?
            .reshape(&[tokens, self.head_count, self.head_dim])?;
        let kv_shape = [tokens, self.kv_head_count, self.head_dim];
        let mut k = self.k_proj.forward(x)?.reshape(&kv_shape)?;
        let v = self.v_proj.forward(x)?.reshape(&kv_shape)?;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q = q_norm.forward(&q)?;
            k = k_norm.forward(&k)?;
        }
        let attended = spans
            .iter()
            .zip(caches)
            .map(|(span, cache)| self.attend(rope, span, [&q, &k, &v], cache))
            .collect::<Result<Vec<_>>>()?;
        self.o_proj.forward(&joined(attended)?)
    }

    /// One sequence's rows of `q`, `k`, `v` (`[tokens, heads, head_dim]`) against its cache ->
    /// `[span.count, heads * head_dim]`.
    fn attend(
        &self,
        rope: &Rope,
        span: &Span,
        [q, k, v]: [&Array; 3],
        cache: &mut LayerCache,
    ) -> Result<Array> {
        let start = span.start as i32;
        let q = rope.forward(&heads_first(q, span)?, start)?;
        let k = rope.forward(&heads_first(k, span)?, start)?;
        let (keys, values) = cache.extend(&k, &heads_first(v, span)?)?;
        let count = span.count as i32;
        let block = self.queries_at_once(start + count).min(count);
        let parts = (0..count)
            .step_by(block as usize)
            .map(|from| {
                let to = count.min(from + block);
                let seen = start + to;
                let part = self.weigh(
                    &rows_of(&q, from, to)?,
                    &rows_of(&keys, 0, seen)?,
                    &rows_of(&values, 0, seen)?,
                )?;
                if self.writes_scores {
                    // MLX allocates ahead of what it computes: several blocks' scores at a time.
                    part.eval()?;
                }
                Ok(part)
            })
            .collect::<Result<Vec<_>>>()?;
        joined(parts)
    }

    /// Attention of the last tokens that the keys hold, `[1, heads, count, head_dim]` ->
    /// `[count, heads * head_dim]`.
    fn weigh(&self, q: &Array, keys: &Array, values: &Array) -> Result<Array> {
        let count = q.dim(2);
        let scale = (self.head_dim as f32).sqrt().recip();
        let mask = (count > 1).then_some(ScaledDotProductAttentionMask::Causal);
        let attended = scaled_dot_product_attention(q, keys, values, scale, mask, None)?;
        Ok(attended
            .transpose_axes(&[0, 2, 1, 3])?
            .reshape(&[count, self.head_count * self.head_dim])?)
    }

    /// How many queries may attend to so many keys at once. MLX's CPU backend writes all their scores to
    /// memory, which for a long prompt would be more than the weights; its GPU kernels do not.
    fn queries_at_once(&self, keys: i32) -> i32 {
        match self.writes_scores {
            false => i32::MAX,
            true => (SCORES_AT_ONCE / keys.saturating_mul(self.head_count)).max(1),
        }
    }
}

/// Attention scores in memory at a time, as elements of four bytes: 8 MiB.
const SCORES_AT_ONCE: i32 = 1 << 21;

/// Tokens `from..to` of `[1, heads, tokens, head_dim]`.
fn rows_of(x: &Array, from: i32, to: i32) -> Result<Array> {
    match (from, to) == (0, x.dim(2)) {
        true => Ok(x.clone()),
        false => Ok(x.try_index((.., .., from..to, ..))?),
    }
}

/// The span's rows of `[tokens, heads, head_dim]` as `[1, heads, count, head_dim]`.
fn heads_first(x: &Array, span: &Span) -> Result<Array> {
    let (from, to) = (span.row as i32, (span.row + span.count) as i32);
    let rows = match x.dim(0) == to - from {
        true => x.clone(),
        false => x.try_index((from..to, .., ..))?,
    };
    Ok(rows.transpose_axes(&[1, 0, 2])?.expand_dims(0)?)
}

/// The spans' results below one another, `[tokens, width]`.
fn joined(mut parts: Vec<Array>) -> Result<Array> {
    match parts.len() {
        1 => Ok(parts.remove(0)),
        _ => Ok(concatenate(&parts, 0)?),
    }
}

/// The gated MLP (SwiGLU).
#[derive(Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn load(spec: &LayerSpec, weights: &mut Weights) -> Result<Self> {
        Ok(Self {
            gate_proj: Linear::load(&spec.gate_proj, weights)?,
            up_proj: Linear::load(&spec.up_proj, weights)?,
            down_proj: Linear::load(&spec.down_proj, weights)?,
        })
    }

    fn forward(&self, x: &Array) -> Result<Array> {
        // Spelled out, since mlx-rs compiles its silu, for which MLX's CPU backend calls a C++
        // compiler at run time.
        let gate = self.gate_proj.forward(x)?;
        let activated = gate.multiply(sigmoid(&gate)?)?;
        self.down_proj
            .forward(&activated.multiply(self.up_proj.forward(x)?)?)
    }
}
