//! Tensors of the checkpoint as MLX arrays: the one place where bytes become arrays. They are read
//! straight into the array's memory, so nothing is held twice, and no byte of a tensor that this rank did not
//! ask for.

use super::architecture::{ElementKind, TensorSpec};
use super::filled::filled;
use crate::checkpoint::{Checkpoint, Consumed, Reader, Tensor, TensorInfo};
use anyhow::{Context, Result, bail};
use mlx_rs::{Array, Dtype};

/// Takes arrays out of a checkpoint.
#[derive(Debug)]
pub struct Weights<'c> {
    source: Source<'c>,
    activation_dtype: Dtype,
}

/// Where the numbers come from.
#[derive(Debug)]
enum Source<'c> {
    /// The files.
    Files(Reader<'c>),
    /// Nowhere: every tensor has its shape and dtype, and numbers that keep activations finite.
    MadeUp(&'c Checkpoint),
}

impl<'c> Weights<'c> {
    /// `activation_dtype`: what this rank computes in.
    pub fn new(reader: Reader<'c>, activation_dtype: Dtype) -> Self {
        Self {
            source: Source::Files(reader),
            activation_dtype,
        }
    }

    /// Weights that take as long to compute with as the checkpoint's and say nothing: no tensor is read.
    pub fn made_up(checkpoint: &'c Checkpoint, activation_dtype: Dtype) -> Self {
        Self {
            source: Source::MadeUp(checkpoint),
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
        let reader = match &mut self.source {
            Source::Files(reader) => reader,
            Source::MadeUp(checkpoint) => return made_up(spec, checkpoint),
        };
        let tensor = reader.take(&spec.name, &spec.shape, allowed_dtypes(spec.kind))?;
        to_array(tensor).with_context(|| format!("loading the tensor {}", spec.name))
    }

    /// One tensor's bytes (row-major, little-endian), in pieces of `piece_bytes`; before them its dtype.
    ///
    /// # Errors
    /// As [`Self::take`], or what `begin` fails with.
    pub fn take_in_pieces<T>(
        &mut self,
        spec: &TensorSpec,
        piece_bytes: usize,
        begin: impl FnOnce(safetensors::Dtype) -> Result<T>,
        mut with: impl FnMut(&mut T, &[u8]),
    ) -> Result<T> {
        match &mut self.source {
            Source::Files(reader) => {
                let tensor = reader.take(&spec.name, &spec.shape, allowed_dtypes(spec.kind))?;
                let mut state = begin(tensor.dtype())?;
                tensor
                    .read_in_pieces(piece_bytes, |piece| with(&mut state, piece))
                    .with_context(|| format!("loading the tensor {}", spec.name))?;
                Ok(state)
            }
            Source::MadeUp(checkpoint) => {
                let info = find(checkpoint, spec)?;
                let mut state = begin(info.dtype)?;
                let bytes = spec.shape.iter().product::<usize>() * info.dtype.bitsize() / 8;
                let mut piece = vec![0; piece_bytes.min(bytes)];
                fill_with_pattern(info.dtype, &mut piece);
                let mut left = bytes;
                while left > 0 {
                    let count = piece.len().min(left);
                    with(&mut state, &piece[..count]);
                    left -= count;
                }
                Ok(state)
            }
        }
    }

    /// One tensor's bytes as they are, and their dtype.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_bytes(&mut self, spec: &TensorSpec) -> Result<(Vec<u8>, safetensors::Dtype)> {
        let elements: usize = spec.shape.iter().product();
        let begin = |dtype: safetensors::Dtype| {
            Ok((Vec::with_capacity(elements * dtype.bitsize() / 8), dtype))
        };
        self.take_in_pieces(spec, 1 << 20, begin, |(bytes, _), piece| {
            bytes.extend_from_slice(piece);
        })
    }

    /// Several tensors, in the order given.
    pub fn take_all(&mut self, specs: &[TensorSpec]) -> Result<Vec<Array>> {
        specs.iter().map(|spec| self.take(spec)).collect()
    }

    /// Ends the loading: what was taken must be what was planned.
    pub fn finish<'p>(self, planned: impl IntoIterator<Item = &'p str>) -> Result<Consumed> {
        match self.source {
            Source::Files(reader) => Ok(reader.finish(planned)?),
            Source::MadeUp(_) => bail!("made-up weights are no part of a plan"),
        }
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
    let (shape, dtype) = (to_mlx_shape(tensor.shape())?, to_mlx_dtype(tensor.dtype())?);
    let fill = Box::new(move |bytes: &mut [u8]| Ok(tensor.read(bytes)?));
    filled(&shape, dtype, fill)
}

/// An array of the spec's shape, in the dtype of the checkpoint's tensor of that name.
fn made_up(spec: &TensorSpec, checkpoint: &Checkpoint) -> Result<Array> {
    let dtype = find(checkpoint, spec)?.dtype;
    let fill = Box::new(move |bytes: &mut [u8]| {
        fill_with_pattern(dtype, bytes);
        Ok(())
    });
    filled(&to_mlx_shape(&spec.shape)?, to_mlx_dtype(dtype)?, fill)
}

fn find<'c>(checkpoint: &'c Checkpoint, spec: &TensorSpec) -> Result<&'c TensorInfo> {
    checkpoint
        .get(&spec.name)
        .with_context(|| format!("the checkpoint has no tensor {}", spec.name))
}

/// 2^-7 in each dtype of floats; codes are bits without order.
fn fill_with_pattern(dtype: safetensors::Dtype, bytes: &mut [u8]) {
    let pattern: &[u8] = match dtype {
        safetensors::Dtype::F32 => &[0, 0, 0, 0x3C],
        safetensors::Dtype::F16 => &[0, 0x20],
        safetensors::Dtype::BF16 => &[0, 0x3C],
        _ => &[0x3A, 0xC5, 0x96, 0x69, 0x1E, 0xE1, 0x78, 0x87],
    };
    let mut written = pattern.len().min(bytes.len());
    bytes[..written].copy_from_slice(&pattern[..written]);
    while written < bytes.len() {
        let more = written.min(bytes.len() - written);
        bytes.copy_within(..more, written);
        written += more;
    }
}

fn to_mlx_dtype(dtype: safetensors::Dtype) -> Result<Dtype> {
    Ok(match dtype {
        safetensors::Dtype::U32 => Dtype::Uint32,
        safetensors::Dtype::F32 => Dtype::Float32,
        safetensors::Dtype::F16 => Dtype::Float16,
        safetensors::Dtype::BF16 => Dtype::Bfloat16,
        other => bail!("dtype {other} cannot be an array of this model"),
    })
}

fn to_mlx_shape(shape: &[usize]) -> Result<Vec<i32>> {
    let dims = shape.iter().map(|&dimension| i32::try_from(dimension));
    dims.collect::<Result<_, _>>()
        .context("a dimension is over 2^31")
}
