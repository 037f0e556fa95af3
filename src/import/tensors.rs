//! Which tensors a network of this architecture has, under both names, and what each becomes in the checkpoint.
//!
//! Separate because it is a table: GGUF name, checkpoint name (as in mlx-lm), shape, row order. The file must hold
//! exactly these tensors, none missing and none left over, so nothing of the model is dropped in silence.

use std::borrow::Cow;
use std::collections::HashMap;

use safetensors::{Dtype, View};

use super::ModelError;
use super::architecture::{Architecture, Family};
use super::blocks::{
    BlockKind, BlockMatrix, Encoding, Float, GROUP_SIZE, RowOrder, Rows, unsupported_type_name,
};
use super::gguf::{Gguf, Payload, Tensor};
use super::rope::DIVISORS_TENSOR;

/// The checkpoint's tensors before they are written.
#[derive(Debug)]
pub struct Tensors<'a> {
    /// Name in the checkpoint and content. Data is converted only when it is asked for.
    pub outputs: Vec<(String, Output<'a>)>,
    /// Every embedding and linear layer by module name, such as `model.layers.0.mlp.up_proj`.
    pub matrices: Vec<(String, Encoding)>,
    /// The float type of the embedding (of its scales, if it is quantised), which names the checkpoint's dtype.
    pub dtype: Float,
}

/// One tensor of the checkpoint.
#[derive(Debug)]
pub struct Output<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    content: Content<'a>,
}

/// Where an output's bytes come from.
#[derive(Debug)]
enum Content<'a> {
    Plain(Rows<'a>),
    Codes(BlockMatrix<'a>),
    Scales(BlockMatrix<'a>),
    Biases(BlockMatrix<'a>),
}

impl View for &Output<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match &self.content {
            Content::Plain(rows) => rows.in_order(),
            Content::Codes(matrix) => matrix.codes().into(),
            Content::Scales(matrix) => matrix.scales().into(),
            Content::Biases(matrix) => matrix.biases().into(),
        }
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// A tensor the file must have.
struct Slot {
    /// Its name in the file.
    gguf: String,
    /// The checkpoint's module.
    module: String,
    part: Part,
    /// Slowest dimension first.
    shape: Vec<usize>,
    order: RowOrder,
}

/// What a slot is to its module.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    /// The weight of a linear layer or embedding: may be quantised.
    Matrix,
    /// The weight of a norm: floats.
    Norm,
    /// The bias of a linear layer: floats.
    Bias,
}

impl Part {
    /// The last word of its name, the same in both formats.
    fn leaf(self) -> &'static str {
        match self {
            Part::Matrix | Part::Norm => "weight",
            Part::Bias => "bias",
        }
    }
}

/// Matches the file's tensors with those the architecture calls for.
///
/// # Errors
/// Missing tensors; tensors left over; a wrong shape; a type that is not converted; a block that holds no number.
pub fn plan<'a>(gguf: &Gguf<'a>, architecture: &Architecture) -> Result<Tensors<'a>, ModelError> {
    let mut left: HashMap<&str, &Tensor<'a>> = gguf
        .tensors
        .iter()
        .map(|tensor| (tensor.name, tensor))
        .collect();
    left.remove(DIVISORS_TENSOR);
    let mut missing = Vec::new();
    let mut pairs = Vec::new();
    for slot in slots(architecture) {
        match left.remove(slot.gguf.as_str()) {
            Some(tensor) => pairs.push((slot, tensor)),
            None => missing.push(slot.gguf),
        }
    }
    if !missing.is_empty() {
        return Err(ModelError::MissingTensors { names: missing });
    }
    if !left.is_empty() {
        let mut names: Vec<String> = left.into_keys().map(str::to_owned).collect();
        names.sort_unstable();
        return Err(ModelError::UnknownTensors {
            names,
            architecture: architecture.family.name(),
        });
    }
    let mut tensors = Tensors {
        outputs: Vec::new(),
        matrices: Vec::new(),
        dtype: Float::F16,
    };
    for (slot, tensor) in pairs {
        tensors.add(slot, tensor)?;
    }
    Ok(tensors)
}

impl<'a> Tensors<'a> {
    fn add(&mut self, slot: Slot, tensor: &Tensor<'a>) -> Result<(), ModelError> {
        if tensor.shape != slot.shape {
            return Err(ModelError::Tensor {
                tensor: slot.gguf,
                problem: format!("shape {:?}, expected {:?}", tensor.shape, slot.shape),
            });
        }
        let (encoding, bytes) = match tensor.payload {
            Payload::Stored { encoding, bytes } => (encoding, bytes),
            Payload::Unsupported { type_id } => {
                return Err(ModelError::TensorType {
                    tensor: slot.gguf,
                    found: unsupported_type_name(type_id),
                    supported: Encoding::supported(),
                });
            }
        };
        let row_count = slot.shape.first().copied().unwrap_or(1).max(1);
        let rows = Rows {
            bytes,
            row_bytes: bytes.len() / row_count,
            order: slot.order,
        };
        if slot.part == Part::Matrix {
            self.matrices.push((slot.module.clone(), encoding));
        }
        let dtype = match encoding {
            Encoding::Plain(float) => self.add_plain(&slot, float, rows),
            Encoding::Blocks(kind) => self.add_blocks(&slot, kind, rows)?,
        };
        if slot.module == EMBEDDING {
            self.dtype = dtype;
        }
        Ok(())
    }

    fn add_plain(&mut self, slot: &Slot, float: Float, rows: Rows<'a>) -> Float {
        let leaf = slot.part.leaf();
        let output = Output {
            dtype: float.dtype(),
            shape: slot.shape.clone(),
            content: Content::Plain(rows),
        };
        self.outputs
            .push((format!("{}.{leaf}", slot.module), output));
        float
    }

    /// Adds weight, scales and biases of a quantised matrix, and returns the type of the latter two.
    fn add_blocks(
        &mut self,
        slot: &Slot,
        kind: BlockKind,
        rows: Rows<'a>,
    ) -> Result<Float, ModelError> {
        let bad = |problem: String| ModelError::Tensor {
            tensor: slot.gguf.clone(),
            problem,
        };
        let &[row_count, column_count] = slot.shape.as_slice() else {
            return Err(bad("norms and biases must be F32, F16 or BF16".into()));
        };
        let matrix = BlockMatrix::survey(kind, rows).map_err(|error| {
            bad(format!(
                "block {} has a scale or minimum that is not a finite number; the file is corrupt",
                error.block
            ))
        })?;
        let precision = matrix.precision();
        let groups = vec![row_count, column_count / GROUP_SIZE];
        let packed = vec![row_count, column_count / (32 / kind.bits())];
        for (leaf, dtype, shape, content) in [
            ("weight", Dtype::U32, packed, Content::Codes(matrix)),
            (
                "scales",
                precision.dtype(),
                groups.clone(),
                Content::Scales(matrix),
            ),
            ("biases", precision.dtype(), groups, Content::Biases(matrix)),
        ] {
            let output = Output {
                dtype,
                shape,
                content,
            };
            self.outputs
                .push((format!("{}.{leaf}", slot.module), output));
        }
        Ok(precision)
    }
}

/// The embedding's module name.
pub const EMBEDDING: &str = "model.embed_tokens";

/// Every tensor of the network, embedding first.
fn slots(architecture: &Architecture) -> Vec<Slot> {
    let hidden_size = architecture.hidden_size;
    let table = vec![architecture.vocab_size, hidden_size];
    let mut slots = vec![
        Slot::matrix("token_embd", EMBEDDING, table.clone()),
        Slot::norm("output_norm", "model.norm", hidden_size),
    ];
    if !architecture.tied {
        slots.push(Slot::matrix("output", "lm_head", table));
    }
    for layer in 0..architecture.layer_count {
        let layer_slots = attention(architecture).into_iter().chain(mlp(architecture));
        slots.extend(layer_slots.map(|slot| slot.in_layer(layer)));
    }
    slots
}

/// One layer's attention, with names relative to the layer.
fn attention(architecture: &Architecture) -> Vec<Slot> {
    let hidden_size = architecture.hidden_size;
    let (query_rows, key_rows) = (architecture.query_rows(), architecture.key_rows());
    let rotated = match architecture.family {
        Family::Llama => RowOrder::Interleaved {
            head_rows: architecture.head_size,
        },
        Family::Qwen2 | Family::Qwen3 => RowOrder::Natural,
    };
    let linears = [
        (
            "attn_q",
            "self_attn.q_proj",
            query_rows,
            hidden_size,
            rotated,
        ),
        ("attn_k", "self_attn.k_proj", key_rows, hidden_size, rotated),
        (
            "attn_v",
            "self_attn.v_proj",
            key_rows,
            hidden_size,
            RowOrder::Natural,
        ),
        (
            "attn_output",
            "self_attn.o_proj",
            hidden_size,
            query_rows,
            RowOrder::Natural,
        ),
    ];
    let mut slots = vec![Slot::norm("attn_norm", "input_layernorm", hidden_size)];
    for (gguf, module, rows, columns, order) in linears {
        slots.push(Slot::matrix(gguf, module, vec![rows, columns]).ordered(order));
        let biased = match architecture.family {
            Family::Llama => architecture.attention_bias,
            Family::Qwen2 => gguf != "attn_output",
            Family::Qwen3 => false,
        };
        if biased {
            slots.push(Slot::bias(gguf, module, rows).ordered(order));
        }
    }
    if architecture.family == Family::Qwen3 {
        let head_size = architecture.head_size;
        slots.push(Slot::norm("attn_q_norm", "self_attn.q_norm", head_size));
        slots.push(Slot::norm("attn_k_norm", "self_attn.k_norm", head_size));
    }
    slots
}

/// One layer's MLP, with names relative to the layer.
fn mlp(architecture: &Architecture) -> Vec<Slot> {
    let (hidden_size, inner) = (architecture.hidden_size, architecture.intermediate_size);
    let mut slots = vec![Slot::norm(
        "ffn_norm",
        "post_attention_layernorm",
        hidden_size,
    )];
    for (gguf, module, rows, columns) in [
        ("ffn_gate", "mlp.gate_proj", inner, hidden_size),
        ("ffn_up", "mlp.up_proj", inner, hidden_size),
        ("ffn_down", "mlp.down_proj", hidden_size, inner),
    ] {
        slots.push(Slot::matrix(gguf, module, vec![rows, columns]));
        if architecture.mlp_bias {
            slots.push(Slot::bias(gguf, module, rows));
        }
    }
    slots
}

impl Slot {
    fn new(gguf: &str, module: &str, part: Part, shape: Vec<usize>) -> Slot {
        Slot {
            gguf: format!("{gguf}.{}", part.leaf()),
            module: module.to_owned(),
            part,
            shape,
            order: RowOrder::Natural,
        }
    }

    fn matrix(gguf: &str, module: &str, shape: Vec<usize>) -> Slot {
        Slot::new(gguf, module, Part::Matrix, shape)
    }

    fn norm(gguf: &str, module: &str, size: usize) -> Slot {
        Slot::new(gguf, module, Part::Norm, vec![size])
    }

    fn bias(gguf: &str, module: &str, size: usize) -> Slot {
        Slot::new(gguf, module, Part::Bias, vec![size])
    }

    fn ordered(self, order: RowOrder) -> Slot {
        Slot { order, ..self }
    }

    fn in_layer(self, layer: usize) -> Slot {
        Slot {
            gguf: format!("blk.{layer}.{}", self.gguf),
            module: format!("model.layers.{layer}.{}", self.module),
            ..self
        }
    }
}
