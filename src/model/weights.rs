//! Tensors of the checkpoint as MLX arrays: the one place where bytes become arrays. They are read
//! straight into the array's memory, so nothing is held twice, and no byte of a tensor that this rank did not
//! ask for.

use super::architecture::{ElementKind, TensorSpec};
use super::filled::filled;
use crate::checkpoint::{Consumed, Reader, Tensor};
use anyhow::{Context, Result, bail};
use mlx_rs::{Array, Dtype};

/// Takes arrays out of a checkpoint.
#[derive(Debug)]
pub struct Weights<'c> {
    reader: Reader<'c>,
    activation_dtype: Dtype,
}

impl<'c> Weights<'c> {
    /// `activation_dtype`: what this rank computes in.
    pub fn new(reader: Reader<'c>, activation_dtype: Dtype) -> Self {
        Self {
            reader,
            activation_dtype,
        }
    }

    /// What this rank computes in.
    pub fn activation_dtype(&self) -> Dtype {
        self.activation_dtype
    }

    /// One tensor, in the checkpoint's dtype.
    ///
    /// # Errors
    /// No such tensor, another shape or dtype, or taken before.
    pub fn take(&mut self, spec: &TensorSpec) -> Result<Array> {
        let tensor = self
            .reader
            .take(&spec.name, &spec.shape, allowed_dtypes(spec.kind))?;
        to_array(tensor).with_context(|| format!("loading the tensor {}", spec.name))
    }

    /// Several tensors, in the order given.
    pub fn take_all(&mut self, specs: &[TensorSpec]) -> Result<Vec<Array>> {
        specs.iter().map(|spec| self.take(spec)).collect()
    }

    /// Ends the loading: what was taken must be what was planned.
    pub fn finish<'p>(self, planned: impl IntoIterator<Item = &'p str>) -> Result<Consumed> {
        Ok(self.reader.finish(planned)?)
    }
}

/// The dtypes that a tensor of this kind may have.
pub fn allowed_dtypes(kind: ElementKind) -> &'static [safetensors::Dtype] {
    use safetensors::Dtype::{BF16, F16, F32, U32};
    match kind {
        ElementKind::Codes => &[U32],
        ElementKind::Float => &[F32, F16, BF16],
    }
}

/// Reads a tensor into an array of the same shape and dtype.
fn to_array(tensor: Tensor) -> Result<Array> {
    let dtype = match tensor.dtype() {
        safetensors::Dtype::U32 => Dtype::Uint32,
        safetensors::Dtype::F32 => Dtype::Float32,
        safetensors::Dtype::F16 => Dtype::Float16,
        safetensors::Dtype::BF16 => Dtype::Bfloat16,
        other => bail!("dtype {other} cannot be an array of this model"),
    };
    let shape = tensor
        .shape()
        .iter()
        .map(|&dimension| i32::try_from(dimension))
        .collect::<Result<Vec<i32>, _>>()
        .context("a dimension is over 2^31")?;
    let fill = Box::new(move |bytes: &mut [u8]| Ok(tensor.read(bytes)?));
    filled(&shape, dtype, fill)
}
