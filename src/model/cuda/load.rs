//! Weights of the checkpoint as the CUDA kernels have them: queries, keys and values in one, gate and the other factor
//! rows in turns of eight, outputs filled up to whole tiles.

use super::super::architecture::{Architecture, LayerSpec, LinearSpec, NormSpec, TensorSpec};
use super::super::engine::Parts;
use super::super::rope::frequencies;
use super::super::weights::Weights;
use crate::plan::WireDtype;
use anyhow::{Context, Result, anyhow, bail, ensure};
use half::{bf16, f16};
use mlx_pipe_cuda::{
    Buffer, Decode, Element, Format, Gpu, Heads, Model, Weight, arrange_codes, arrange_scales,
};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Outputs of a tile of the kernels.
const TILE_OUTPUTS: usize = 16;
/// Rows that gate and the other factor take turns in.
const TURN_ROWS: usize = 8;

/// One layer's weights.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) input_layernorm: Buffer,
    pub(super) qkv_proj: Weight,
    pub(super) qk_norm: Option<(Buffer, Buffer)>,
    pub(super) o_proj: Weight,
    pub(super) post_attention_layernorm: Buffer,
    pub(super) gate_up_proj: Weight,
    pub(super) down_proj: Weight,
}

/// What the kernels are to compute, or why there are none for it.
///
/// # Errors
/// The reason.
pub(super) fn model(parts: Parts) -> Result<Model> {
    let architecture = parts.architecture;
    let heads = heads(architecture);
    ensure!(
        heads.is_supported(),
        "there are CUDA kernels for heads of 64 or 128, up to 16 of which share keys; this model has heads of {}, \
         {} of which share keys",
        heads.dim,
        heads.group()
    );
    let mut formats = BTreeSet::new();
    let ends = parts.table.into_iter().chain(parts.head);
    for spec in parts.layers.iter().flat_map(LayerSpec::linears).chain(ends) {
        let format = format_of(spec);
        ensure!(
            format.is_supported() && spec.inputs.is_multiple_of(format.block()),
            "there are CUDA kernels for weights of 4 and 8 bits in groups of 32, 64 or 128 and of 16 bits; {} has {}",
            spec.name,
            match spec.quantized {
                Some(affine) => format!("{} bits in groups of {}", affine.bits, affine.group_size),
                None => format!("rows of {}", spec.inputs),
            }
        );
        formats.insert(format);
    }
    for layer in parts.layers {
        let together = [&layer.q_proj, &layer.k_proj, &layer.v_proj];
        let of_mlp = [&layer.gate_proj, &layer.up_proj];
        for (specs, unit) in [(&together[..], TILE_OUTPUTS), (&of_mlp[..], TURN_ROWS)] {
            let is_one = specs.iter().all(|spec| {
                spec.quantized == specs[0].quantized
                    && spec.bias == specs[0].bias
                    && spec.outputs.is_multiple_of(unit)
            });
            ensure!(
                is_one,
                "the CUDA kernels compute {} and its like in one; they differ, or are no multiple of {unit} wide",
                specs[0].name
            );
        }
        ensure!(
            !layer.gate_proj.bias && layer.o_proj.outputs.is_multiple_of(TILE_OUTPUTS),
            "there are no CUDA kernels for an MLP with biases, or a hidden size that is no multiple of {TILE_OUTPUTS}"
        );
    }
    Ok(Model {
        element: match parts.native_dtype {
            WireDtype::F16 => Element::F16,
            WireDtype::Bf16 | WireDtype::F32 => Element::Bf16,
        },
        formats,
        heads,
        decode: decode(parts.layers),
    })
}

/// What a kernel of all layers is to be made for; `None` if they differ in what they are made of.
fn decode(layers: &[LayerSpec]) -> Option<Decode> {
    let shapes = |layer: &LayerSpec| {
        let linears = layer.linears();
        linears.map(|spec| (format_of(spec), spec.outputs, spec.inputs))
    };
    let first = shapes(layers.first()?);
    let &(format, ..) = first.first()?;
    let is_one = first.iter().all(|&(other, ..)| other == format)
        && layers.iter().all(|layer| shapes(layer) == first);
    is_one.then_some(Decode {
        format,
        layers: layers.len(),
        widest: first.iter().map(|&(.., inputs)| inputs).max()?,
    })
}

fn heads(architecture: &Architecture) -> Heads {
    Heads {
        queries: architecture.head_count,
        kv: architecture.family.kv_head_count,
        dim: architecture.family.head_dim,
        has_norm: architecture.family.qk_norm,
    }
}

fn format_of(spec: &LinearSpec) -> Format {
    spec.quantized.map_or(Format::PLAIN, |affine| Format {
        bits: affine.bits,
        group_size: affine.group_size,
    })
}

/// Makes weights of tensors.
#[derive(Debug)]
pub(super) struct Loader<'a, 'w> {
    pub(super) weights: &'a mut Weights<'w>,
    pub(super) gpu: &'a Arc<Gpu>,
    pub(super) element: Element,
}

/// A weight's tensors in the host's memory, row by row.
struct Rows {
    codes: Vec<u8>,
    scales: Vec<u8>,
    biases: Vec<u8>,
    bias: Vec<u8>,
}

impl Rows {
    fn parts(&mut self) -> [&mut Vec<u8>; 4] {
        [
            &mut self.codes,
            &mut self.scales,
            &mut self.biases,
            &mut self.bias,
        ]
    }
}

impl Loader<'_, '_> {
    pub(super) fn layer(&mut self, spec: &LayerSpec) -> Result<Layer> {
        Ok(Layer {
            input_layernorm: self.norm(&spec.input_layernorm)?,
            qkv_proj: self.below_one_another(&[&spec.q_proj, &spec.k_proj, &spec.v_proj])?,
            qk_norm: match &spec.qk_norm {
                None => None,
                Some((q, k)) => Some((self.norm(q)?, self.norm(k)?)),
            },
            o_proj: self.linear(&spec.o_proj)?,
            post_attention_layernorm: self.norm(&spec.post_attention_layernorm)?,
            gate_up_proj: self.in_turns(&spec.gate_proj, &spec.up_proj)?,
            down_proj: self.linear(&spec.down_proj)?,
        })
    }

    pub(super) fn norm(&mut self, spec: &NormSpec) -> Result<Buffer> {
        let elements = self.elements(&spec.tensor())?;
        Buffer::of(self.gpu, &elements)
    }

    pub(super) fn linear(&mut self, spec: &LinearSpec) -> Result<Weight> {
        self.below_one_another(&[spec])
    }

    /// Radians by which a position turns each pair of a head.
    pub(super) fn frequencies(&self, architecture: &Architecture) -> Result<Buffer> {
        let radians = frequencies(architecture);
        let bytes: Vec<u8> = radians
            .iter()
            .flat_map(|&radians| (radians as f32).to_le_bytes())
            .collect();
        Buffer::of(self.gpu, &bytes)
    }

    /// Weights of one format as one, outputs filled up to whole tiles.
    fn below_one_another(&mut self, specs: &[&LinearSpec]) -> Result<Weight> {
        let mut all = self.rows(specs[0])?;
        for spec in &specs[1..] {
            let mut more = self.rows(spec)?;
            for (part, more) in all.parts().into_iter().zip(more.parts()) {
                part.append(more);
            }
        }
        let outputs: usize = specs.iter().map(|spec| spec.outputs).sum();
        let whole = outputs.next_multiple_of(TILE_OUTPUTS);
        for part in all.parts() {
            let filled = part.len() / outputs * whole;
            part.resize(filled, 0);
        }
        self.weight(specs[0], whole, &all)
    }

    /// Two weights of one format as one, rows in turns.
    fn in_turns(&mut self, gate: &LinearSpec, up: &LinearSpec) -> Result<Weight> {
        let (mut gates, mut ups) = (self.rows(gate)?, self.rows(up)?);
        let turns = gate.outputs / TURN_ROWS;
        let [codes, scales, biases, bias] = std::array::from_fn(|part| {
            let (gates, ups) = (&gates.parts()[part][..], &ups.parts()[part][..]);
            let turn = (gates.len() / turns).max(1);
            let mut both = Vec::with_capacity(gates.len() + ups.len());
            for (gate, up) in gates.chunks(turn).zip(ups.chunks(turn)) {
                both.extend_from_slice(gate);
                both.extend_from_slice(up);
            }
            both
        });
        let rows = Rows {
            codes,
            scales,
            biases,
            bias,
        };
        self.weight(gate, 2 * gate.outputs, &rows)
    }

    fn weight(&self, spec: &LinearSpec, outputs: usize, rows: &Rows) -> Result<Weight> {
        let buffer = |bytes: &[u8]| match bytes.is_empty() {
            true => Ok(None),
            false => Buffer::of(self.gpu, bytes).map(Some),
        };
        let (format, inputs) = (format_of(spec), spec.inputs);
        let groups = inputs / format.group_size;
        Ok(Weight {
            format,
            outputs,
            inputs,
            codes: Buffer::of(self.gpu, &arrange_codes(format, inputs, &rows.codes))?,
            scales: buffer(&arrange_scales(groups, &rows.scales, &rows.biases))?,
            bias: buffer(&rows.bias)?,
        })
    }

    fn rows(&mut self, spec: &LinearSpec) -> Result<Rows> {
        let tensors = spec.tensors();
        let (mut scales, mut biases) = (Vec::new(), Vec::new());
        let codes = match (spec.quantized, &tensors[..]) {
            (None, [weight, ..]) => self.elements(weight)?,
            (Some(_), [codes, of_groups, to_groups, ..]) => {
                scales = self.elements(of_groups)?;
                biases = self.elements(to_groups)?;
                self.weights.take_bytes(codes)?.0
            }
            _ => bail!("{} has no scales and biases", spec.name),
        };
        let bias = match spec.bias {
            false => Vec::new(),
            true => self.elements(tensors.last().context("a spec names its tensors")?)?,
        };
        Ok(Rows {
            codes,
            scales,
            biases,
            bias,
        })
    }

    /// A tensor of floats as elements of activations.
    fn elements(&mut self, spec: &TensorSpec) -> Result<Vec<u8>> {
        let (bytes, dtype) = self.weights.take_bytes(spec)?;
        let float = |bytes: &[u8]| match *bytes {
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            [a, b] if dtype == safetensors::Dtype::F16 => f16::from_le_bytes([a, b]).to_f32(),
            [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
            _ => 0.0,
        };
        let size = match (dtype, self.element) {
            (safetensors::Dtype::BF16, Element::Bf16) | (safetensors::Dtype::F16, Element::F16) => {
                return Ok(bytes);
            }
            (safetensors::Dtype::F32, _) => 4,
            (safetensors::Dtype::BF16 | safetensors::Dtype::F16, _) => 2,
            (other, _) => return Err(anyhow!("{other} is no dtype of floats that weights have")),
        };
        Ok(from_floats(
            self.element,
            bytes.chunks_exact(size).map(float),
        ))
    }
}

/// Floats as elements.
pub(super) fn from_floats(element: Element, floats: impl Iterator<Item = f32>) -> Vec<u8> {
    match element {
        Element::Bf16 => floats
            .flat_map(|float| bf16::from_f32(float).to_le_bytes())
            .collect(),
        Element::F16 => floats
            .flat_map(|float| f16::from_f32(float).to_le_bytes())
            .collect(),
    }
}

/// Elements as floats, little-endian.
pub(super) fn to_floats(element: Element, bytes: &[u8]) -> Vec<u8> {
    let pairs = bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    match element {
        Element::Bf16 => pairs
            .flat_map(|pair| bf16::from_le_bytes(pair).to_f32().to_le_bytes())
            .collect(),
        Element::F16 => pairs
            .flat_map(|pair| f16::from_le_bytes(pair).to_f32().to_le_bytes())
            .collect(),
    }
}
