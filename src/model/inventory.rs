//! The checkpoint held against the architecture: every tensor that the model needs is there with the
//! right shape and dtype, nothing else is, and how many bytes each part of the model weighs. Reads
//! headers only; this is what the plan counts with.

use super::architecture::{
    Architecture, ElementKind, HeadSpec, KvNumber, LayerSpec, LinearSpec, TensorSpec,
};
use super::weights::allowed_dtypes;
use crate::checkpoint::{Headers, Listed, TensorInfo};
use crate::plan::{Head, ModelShape, Stage, TiedTable, WireDtype};
use anyhow::{Result, bail};
use safetensors::Dtype;
use std::collections::BTreeSet;

/// Whose caches keys and values are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caches {
    /// This program's, on CPUs and NVIDIA GPUs: whole numbers of 16 bits and a scale for each head where weights are
    /// quantised and activations f32, and once what sequences have in common.
    Own,
    /// MLX's: numbers of the dtype that is computed in.
    Mlx,
}

/// The tensors of each part of the model, all of them proven to be in the checkpoint.
#[derive(Debug)]
pub struct Inventory {
    embedding: Part,
    layers: Vec<Part>,
    norm: Part,
    /// Empty when tied.
    head: Part,
}

/// Tensors that a rank holds together.
#[derive(Debug, Default)]
struct Part {
    tensors: Vec<TensorSpec>,
    /// Their bytes as the checkpoint stores them.
    bytes: u64,
}

impl Part {
    fn of(tensors: Vec<TensorSpec>) -> Self {
        Self { tensors, bytes: 0 }
    }
}

impl Inventory {
    /// Lists what `architecture` needs and checks `checkpoint` for it.
    ///
    /// # Errors
    /// A tensor missing, of another shape or dtype, or one that no part of the model would use: it
    /// would change the answers if it were used, so it must not be passed over.
    pub fn check(architecture: &Architecture, checkpoint: &Headers) -> Result<Self> {
        let mut inventory = Self::needed_by(architecture);
        for spec in inventory.all() {
            check_tensor(spec, checkpoint)?;
        }
        let names = checkpoint.iter().map(|(name, _)| name);
        inventory.refuse_leftovers(architecture, names, |name| place(name, checkpoint))?;
        inventory.weigh(|spec| checkpoint.get(&spec.name).map_or(0, TensorInfo::bytes));
        Ok(inventory)
    }

    /// The same where no header is there to tell shapes and dtypes. The names must be those that
    /// `architecture` needs; shapes follow from it, and so do dtypes if all plain numbers have the same:
    /// 16 or 32 bits, whichever makes the bytes those that the index states.
    ///
    /// # Errors
    /// A name missing or too many, or bytes that come out otherwise.
    pub fn from_index(architecture: &Architecture, listed: &Listed) -> Result<Self> {
        let mut inventory = Self::needed_by(architecture);
        let path = listed.path.display();
        if let Some(spec) = inventory
            .all()
            .find(|spec| !listed.tensors.contains(&spec.name))
        {
            bail!(
                "{path}: it lists no tensor `{}` (expected shape {:?}); config.json and the index do not \
                 belong together",
                spec.name,
                spec.shape
            );
        }
        let names = listed.tensors.iter().map(String::as_str);
        inventory.refuse_leftovers(architecture, names, |_| format!("{path}: "))?;
        let Some(stated_bytes) = listed.total_bytes else {
            bail!(
                "{path}: it has no whole number as metadata.total_size, and without the weight files nothing \
                 else tells their bytes; fetch the weight files, or their headers"
            );
        };
        let candidates = FLOAT_BYTES.map(|float_bytes| inventory.bytes_with(float_bytes));
        let fitting = candidates.iter().position(|bytes| *bytes == stated_bytes);
        let Some(fitting) = fitting else {
            bail!(
                "{path}: metadata.total_size is {stated_bytes}, but the tensors that config.json makes have \
                 {} bytes with numbers of 16 bits, {} with 32; expected one of the two. They do not belong \
                 together, or dtypes are mixed: fetch the weight files, or their headers",
                candidates[0],
                candidates[1]
            );
        };
        inventory.weigh(|spec| spec_bytes(spec, FLOAT_BYTES[fitting]));
        Ok(inventory)
    }

    /// What `architecture` needs, not weighed yet.
    fn needed_by(architecture: &Architecture) -> Self {
        let layers = architecture.layers.iter();
        Self {
            embedding: Part::of(architecture.embed_tokens.tensors()),
            layers: layers.map(|layer| Part::of(layer.tensors())).collect(),
            norm: Part::of(vec![architecture.norm.tensor()]),
            head: match &architecture.head {
                HeadSpec::Tied => Part::default(),
                HeadSpec::Own(linear) => Part::of(linear.tensors()),
            },
        }
    }

    /// Saturating, since headers without tensors may claim any size; the plan refuses what is too much.
    fn weigh(&mut self, bytes: impl Fn(&TensorSpec) -> u64) {
        let ends = [&mut self.embedding, &mut self.norm, &mut self.head];
        for part in self.layers.iter_mut().chain(ends) {
            part.bytes = part.tensors.iter().map(&bytes).fold(0, u64::saturating_add);
        }
    }

    fn bytes_with(&self, float_bytes: u64) -> u64 {
        let bytes = self.all().map(|spec| spec_bytes(spec, float_bytes));
        bytes.fold(0, u64::saturating_add)
    }

    /// Bytes of each part as the checkpoint stores it, of a row of activations in `wire_dtype`, and of what these
    /// caches keep; `tied` says where a tied table stands, once if the plan is to choose.
    pub fn shape(
        &self,
        architecture: &Architecture,
        wire_dtype: WireDtype,
        caches: Caches,
        tied: TiedTable,
    ) -> ModelShape {
        let tied_head = match tied {
            TiedTable::Once | TiedTable::Auto => Head::TiedOnce,
            TiedTable::Both => Head::Tied,
        };
        let kv_number = match (caches, wire_dtype) {
            (Caches::Own, WireDtype::F32) if architecture.is_quantized() => KvNumber {
                bytes: size_of::<i16>(),
                scale_bytes: size_of::<f32>(),
            },
            _ => KvNumber {
                bytes: wire_dtype.size_bytes(),
                scale_bytes: 0,
            },
        };
        let layer_weights = architecture.layers.iter().map(matrix_weights);
        ModelShape {
            layer_bytes: self.layers.iter().map(|layer| layer.bytes).collect(),
            embedding_bytes: self.embedding.bytes,
            norm_bytes: self.norm.bytes,
            head: match architecture.head {
                HeadSpec::Tied => tied_head,
                HeadSpec::Own(_) => Head::Own {
                    bytes: self.head.bytes,
                },
            },
            kv_bytes_per_token_per_layer: architecture.kv_bytes_per_token_per_layer(kv_number),
            hidden_row_bytes: architecture
                .hidden_size
                .saturating_mul(wire_dtype.size_bytes()) as u64,
            layer_weights: layer_weights.fold(0, u64::saturating_add),
        }
    }

    /// The tensors that a stage holds, each once.
    pub fn of_stage(&self, stage: &Stage) -> Vec<&str> {
        let tied = self.head.tensors.is_empty();
        let with_table = stage.role.owns_embedding() || (stage.role.owns_head() && tied);
        let ends = [
            (with_table, &self.embedding),
            (stage.role.owns_norm(), &self.norm),
            (stage.role.owns_head(), &self.head),
        ];
        let ends = ends
            .into_iter()
            .filter_map(|(owned, part)| owned.then_some(part));
        let parts = self.layers[stage.layers.clone()].iter().chain(ends);
        parts
            .flat_map(|part| &part.tensors)
            .map(|spec| spec.name.as_str())
            .collect()
    }

    fn all(&self) -> impl Iterator<Item = &TensorSpec> {
        let ends = [&self.norm, &self.head];
        [&self.embedding]
            .into_iter()
            .chain(&self.layers)
            .chain(ends)
            .flat_map(|part| &part.tensors)
    }

    fn refuse_leftovers<'n>(
        &self,
        architecture: &Architecture,
        names: impl Iterator<Item = &'n str>,
        place: impl Fn(&str) -> String,
    ) -> Result<()> {
        let known: BTreeSet<&str> = self.all().map(|spec| spec.name.as_str()).collect();
        let tied = architecture.head == HeadSpec::Tied;
        let left: Vec<&str> = names
            .filter(|name| !known.contains(name) && !is_redundant(name, tied))
            .collect();
        if let Some(first) = left.first() {
            bail!(
                "{}`{first}` is a tensor that a {} model of {} layers has no use for ({} such in all); \
                 config.json and the weights do not belong together, or this version lacks a feature of the \
                 model",
                place(first),
                architecture.model_type,
                architecture.layers.len(),
                left.len(),
            );
        }
        Ok(())
    }
}

/// Bytes of a plain number, as checkpoints have them.
const FLOAT_BYTES: [u64; 2] = [2, 4];
/// Bytes of a word of packed codes.
const WORD_BYTES: u64 = 4;

/// Bytes of a tensor whose plain numbers have so many each.
fn spec_bytes(spec: &TensorSpec, float_bytes: u64) -> u64 {
    let element_bytes = match spec.kind {
        ElementKind::Codes => WORD_BYTES,
        ElementKind::Float => float_bytes,
    };
    let dimensions = spec.shape.iter().map(|dimension| *dimension as u64);
    dimensions.fold(element_bytes, u64::saturating_mul)
}

/// Weights of a layer's matrices, which are what a token is multiplied with.
fn matrix_weights(layer: &LayerSpec) -> u64 {
    let weights = |matrix: &LinearSpec| matrix.outputs.saturating_mul(matrix.inputs) as u64;
    layer
        .linears()
        .into_iter()
        .map(weights)
        .fold(0, u64::saturating_add)
}

/// Tensors that older tools write although they follow from the others: precomputed rotary
/// frequencies, and a copy of the tied table under the head's name.
fn is_redundant(name: &str, tied: bool) -> bool {
    name.ends_with(".self_attn.rotary_emb.inv_freq") || (tied && name.starts_with("lm_head."))
}

fn check_tensor(spec: &TensorSpec, checkpoint: &Headers) -> Result<()> {
    let name = &spec.name;
    let Some(info) = checkpoint.get(name) else {
        bail!(
            "{}the checkpoint has no tensor `{name}` (expected shape {:?}); config.json and the weights do \
             not belong together, or a file is missing",
            place_of_sibling(name, checkpoint),
            spec.shape
        );
    };
    refuse_codes_without_format(spec, info, checkpoint)?;
    if info.shape != spec.shape {
        bail!(
            "{}tensor `{name}` has shape {:?}, but config.json makes it {:?}; they do not belong together",
            place(name, checkpoint),
            info.shape,
            spec.shape
        );
    }
    if !allowed_dtypes(spec.kind).contains(&info.dtype) {
        bail!(
            "{}tensor `{name}` has dtype {}, expected one of {:?}",
            place(name, checkpoint),
            info.dtype,
            allowed_dtypes(spec.kind)
        );
    }
    Ok(())
}

/// A matrix of packed codes where plain numbers are expected is no wrong shape: what says how to read it is
/// not there.
fn refuse_codes_without_format(
    spec: &TensorSpec,
    info: &TensorInfo,
    checkpoint: &Headers,
) -> Result<()> {
    let expects_numbers = spec.kind == ElementKind::Float && spec.shape.len() == 2;
    let module = spec.name.strip_suffix(".weight");
    let Some(module) = module.filter(|_| expects_numbers && info.dtype == Dtype::U32) else {
        return Ok(());
    };
    let place = place(&spec.name, checkpoint);
    let scales = format!("{module}.scales");
    if checkpoint.get(&scales).is_none() {
        bail!(
            "{place}the checkpoint has no tensor `{scales}`, without which the codes of `{}` mean nothing; a \
             file is missing, or the weights were damaged: download or convert the model again",
            spec.name
        );
    }
    bail!(
        "{place}`{}` holds quantised codes, but config.json does not say how `{module}` is quantised \
         (`quantization`); they do not belong together",
        spec.name
    );
}

/// The file that holds a tensor, to begin a message with; empty if no file does.
fn place(name: &str, checkpoint: &Headers) -> String {
    let path = checkpoint.file_holding(name);
    path.map_or_else(String::new, |path| format!("{}: ", path.display()))
}

/// The file that holds other tensors of the module that a missing one belongs to.
fn place_of_sibling(name: &str, checkpoint: &Headers) -> String {
    let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
    let siblings = ["weight", "scales", "biases", "bias"].map(|part| format!("{module}.{part}"));
    let places = siblings.iter().map(|sibling| place(sibling, checkpoint));
    places
        .into_iter()
        .find(|place| !place.is_empty())
        .unwrap_or_default()
}
