//! A transformer layer, in the order of the mathematics:
//! `h = x + o_proj(attention(norm(x)))`, `y = h + down_proj(silu(gate_proj(n)) * up_proj(n))` with `n = norm(h)`.

use crate::attention::{Attention, attend};
use crate::isa::Isa;
use crate::kv_cache::KvCache;
use crate::linear::{Linear, multiply, multiply_gated, wanted};
use crate::pool::Pool;
use crate::rows::{Norm, Rows};
use crate::step::Step;

/// The weights of a layer.
#[derive(Debug)]
pub struct Layer {
    /// Before attention.
    pub input_layernorm: Norm,
    /// To queries, keys and values.
    pub qkv_proj: [Linear; 3],
    /// Attention itself.
    pub attention: Attention,
    /// Out of attention.
    pub o_proj: Linear,
    /// Before the MLP.
    pub post_attention_layernorm: Norm,
    /// Gate of the MLP.
    pub gate_proj: Linear,
    /// What the gate is for.
    pub up_proj: Linear,
    /// Out of the MLP.
    pub down_proj: Linear,
}

/// Memory for what goes between the parts of a layer, used again by every layer and step.
#[derive(Debug, Default)]
pub struct Scratch {
    rows: Rows,
    /// `[tokens, qkv_width]`
    qkv: Vec<f32>,
    /// `[tokens, heads * head_dim]`
    attended: Vec<f32>,
    /// `[tokens, hidden]`
    h: Vec<f32>,
    /// `[tokens, intermediate]`
    gated: Vec<f32>,
}

/// Makes a vector so long; what was in it is of no use to anybody.
fn sized(values: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if values.len() < length {
        values.resize(length, 0.0);
    }
    &mut values[..length]
}

impl Layer {
    /// `x`: `[tokens, hidden]`; `caches`: this layer's of each span's sequence; `y`: `x`'s shape.
    ///
    /// # Panics
    /// Weights that do not fit one another, or slices of other lengths.
    pub fn forward(
        &self,
        machine: (Isa, &Pool),
        step: &Step,
        caches: &mut [&mut KvCache],
        scratch: &mut Scratch,
        (x, y): (&[f32], &mut [f32]),
    ) {
        let hidden = self.input_layernorm.weight.len();
        let tokens = x.len() / hidden;
        let Scratch {
            rows,
            qkv,
            attended,
            h,
            gated,
        } = scratch;

        let shape = self.attention.shape;
        let projections = self.qkv_proj.each_ref();
        rows.prepare(
            machine,
            x,
            hidden,
            Some(&self.input_layernorm),
            &wanted(projections),
        );
        let qkv = sized(qkv, tokens * shape.qkv_width());
        multiply(machine, &projections, rows, None, qkv);
        let attended = sized(attended, tokens * shape.width());
        attend(machine, &self.attention, step, caches, qkv, attended);
        let h = sized(h, x.len());
        project(machine, rows, attended, &self.o_proj, x, h);

        let sides = [&self.gate_proj, &self.up_proj];
        let norm = Some(&self.post_attention_layernorm);
        rows.prepare(machine, h, hidden, norm, &wanted(sides));
        let gated = sized(gated, tokens * self.gate_proj.outputs());
        multiply_gated(machine, sides, rows, gated);
        project(machine, rows, gated, &self.down_proj, h, y);
    }
}

/// `y = residual + x W^T`.
fn project(
    machine: (Isa, &Pool),
    rows: &mut Rows,
    x: &[f32],
    linear: &Linear,
    residual: &[f32],
    y: &mut [f32],
) {
    rows.prepare(machine, x, linear.inputs(), None, &wanted([linear]));
    multiply(machine, &[linear], rows, Some(residual), y);
}
