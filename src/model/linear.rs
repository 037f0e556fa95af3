//! Weights `[outputs, inputs]` on the device: linear layers, and the embedding table, which is looked
//! up by row at one end of the model and, when tied, multiplied with at the other.

use super::architecture::{LinearSpec, NormSpec};
use super::quantization::Affine;
use super::weights::Weights;
use anyhow::Result;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::ops::{concatenate, dequantize, matmul, quantized_matmul};
use mlx_rs::{Array, Dtype, fast};

/// A weight in the form in which the checkpoint holds it.
#[derive(Debug, Clone)]
enum Weight {
    /// `[outputs, inputs]`, floats.
    Plain { weight: Array },
    /// Packed codes `[outputs, words]` (u32) with scales and biases `[outputs, groups]`.
    Quantized {
        weight: Array,
        scales: Array,
        biases: Array,
        affine: Affine,
    },
}

/// `y = x W^T + b`. Cloning shares the arrays.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    /// `[outputs]`
    bias: Option<Array>,
}

impl Linear {
    /// Loads the tensors that the spec names.
    pub fn load(spec: &LinearSpec, weights: &mut Weights) -> Result<Self> {
        let mut arrays = weights.take_all(&spec.tensors())?.into_iter();
        let mut next = || {
            arrays
                .next()
                .expect("the spec names every tensor read here")
        };
        let weight = match spec.quantized {
            None => Weight::Plain { weight: next() },
            Some(affine) => Weight::Quantized {
                weight: next(),
                scales: next(),
                biases: next(),
                affine,
            },
        };
        Ok(Self {
            weight,
            bias: spec.bias.then(next),
        })
    }

    /// `x`: `[tokens, inputs]` -> `[tokens, outputs]`, in the dtype of `x`.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        let product = match &self.weight {
            Weight::Plain { weight } => product(x, weight)?,
            Weight::Quantized {
                weight,
                scales,
                biases,
                affine,
            } => {
                let product = quantized_matmul(
                    x,
                    weight,
                    scales.as_dtype(x.dtype())?,
                    &biases.as_dtype(x.dtype())?,
                    true,
                    affine.group_size as i32,
                    affine.bits as i32,
                )?;
                if scales.dtype() != x.dtype() {
                    drop_conversions(&product)?;
                }
                product
            }
        };
        match &self.bias {
            None => Ok(product),
            Some(bias) => Ok(product.add(bias.as_dtype(x.dtype())?)?),
        }
    }

    /// The rows `ids` (`[tokens]`, u32) of the weight as an embedding: `[tokens, inputs]`, `dtype`.
    pub fn rows(&self, ids: &Array, dtype: Dtype) -> Result<Array> {
        match &self.weight {
            Weight::Plain { weight } => Ok(weight.take_axis(ids, 0)?.as_dtype(dtype)?),
            Weight::Quantized {
                weight,
                scales,
                biases,
                affine,
            } => Ok(dequantize(
                weight.take_axis(ids, 0)?,
                scales.take_axis(ids, 0)?.as_dtype(dtype)?,
                &biases.take_axis(ids, 0)?.as_dtype(dtype)?,
                affine.group_size as i32,
                affine.bits as i32,
            )?),
        }
    }
}

/// Elements of a weight that are converted to another dtype at a time: 16 MiB of f32.
const CONVERTED_AT_ONCE: i32 = 1 << 22;

/// `x W^T`. A weight of another dtype is converted a block of rows at a time: a whole copy in 32 bits of a
/// head in 16 is over a gigabyte for a large vocabulary, which no plan has counted.
fn product(x: &Array, weight: &Array) -> Result<Array> {
    if weight.dtype() == x.dtype() {
        return Ok(matmul(x, weight.t())?);
    }
    let (outputs, inputs) = (weight.dim(0), weight.dim(1));
    let block = (CONVERTED_AT_ONCE / inputs).max(1);
    let parts = (0..outputs)
        .step_by(block as usize)
        .map(|row| {
            let rows = weight.try_index((row..outputs.min(row + block), ..))?;
            let part = matmul(x, rows.as_dtype(x.dtype())?.t())?;
            drop_conversions(&part)?;
            Ok(part)
        })
        .collect::<Result<Vec<_>>>()?;
    match parts.len() {
        1 => Ok(parts.into_iter().next().expect("there is one")),
        _ => Ok(concatenate(&parts, -1)?),
    }
}

/// Computes a product now. MLX allocates ahead of what it computes, so that without this the converted
/// copies of many weights would be there at the same time.
fn drop_conversions(product: &Array) -> Result<()> {
    Ok(product.eval()?)
}

/// `y = x / rms(x) * weight`, over the last axis.
#[derive(Debug)]
pub struct RmsNorm {
    /// `[width]`, in the dtype of the activations.
    weight: Array,
    eps: f32,
}

impl RmsNorm {
    /// Loads the norm's weight.
    pub fn load(spec: &NormSpec, eps: f32, weights: &mut Weights) -> Result<Self> {
        let dtype = weights.activation_dtype();
        let weight = weights.take(&spec.tensor())?.as_dtype(dtype)?;
        Ok(Self { weight, eps })
    }

    /// `x`: `[..., width]` -> the same shape and dtype.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        Ok(fast::rms_norm(x, Some(&self.weight), self.eps)?)
    }
}
