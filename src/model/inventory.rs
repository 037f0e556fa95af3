//! The checkpoint held against the architecture: every tensor that the model needs is there with the
//! right shape and dtype, nothing else is, and how many bytes each part of the model weighs. Reads
//! headers only; this is what the plan counts with.

use super::architecture::{
    Architecture, ElementKind, HeadSpec, LayerSpec, LinearSpec, TensorSpec,
};
use super::weights::allowed_dtypes;
use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::plan::{Head, ModelShape, Stage};
use anyhow::{Result, bail};
use safetensors::Dtype;
use std::collections::BTreeSet;

/// The tensors of each part of the model, all of them proven to be in the checkpoint.
#[derive(Debug)]
pub struct Inventory {
    embedding: Vec<TensorSpec>,
    layers: Vec<Vec<TensorSpec>>,
    norm: Vec<TensorSpec>,
    /// Empty when tied.
    head: Vec<TensorSpec>,
}

impl Inventory {
    /// Lists what `architecture` needs and checks `checkpoint` for it.
    ///
    /// # Errors
    /// A tensor missing, of another shape or dtype, or one that no part of the model would use: it
    /// would change the answers if it were used, so it must not be passed over.
    pub fn check(architecture: &Architecture, checkpoint: &Checkpoint) -> Result<Self> {
        let inventory = Self {
            embedding: architecture.embed_tokens.tensors(),
            layers: architecture
                .layers
                .iter()
                .map(|layer| layer.tensors())
                .collect(),
            norm: vec![architecture.norm.tensor()],
            head: match &architecture.head {
                HeadSpec::Tied => Vec::new(),
                HeadSpec::Own(linear) => linear.tensors(),
            },
        };
        for spec in inventory.all() {
            check_tensor(spec, checkpoint)?;
        }
        inventory.refuse_leftovers(architecture, checkpoint)?;
        Ok(inventory)
    }

    /// Bytes of each part as the checkpoint stores it; `kv_element_bytes` is the cache's element size,
    /// `tied_head` where a tied table is to stand.
    pub fn shape(
        &self,
        architecture: &Architecture,
        checkpoint: &Checkpoint,
        kv_element_bytes: usize,
        tied_head: Head,
    ) -> ModelShape {
        let layer_weights = architecture.layers.iter().map(matrix_weights);
        let bytes = |specs: &[TensorSpec]| {
            specs
                .iter()
                .filter_map(|spec| checkpoint.get(&spec.name))
                .map(|info| info.bytes())
                .sum()
        };
        ModelShape {
            layer_bytes: self.layers.iter().map(|layer| bytes(layer)).collect(),
            embedding_bytes: bytes(&self.embedding),
            norm_bytes: bytes(&self.norm),
            head: match architecture.head {
                HeadSpec::Tied => tied_head,
                HeadSpec::Own(_) => Head::Own {
                    bytes: bytes(&self.head),
                },
            },
            kv_bytes_per_token_per_layer: architecture
                .kv_bytes_per_token_per_layer(kv_element_bytes),
            hidden_row_bytes: architecture.hidden_size.saturating_mul(kv_element_bytes) as u64,
            layer_weights: layer_weights.fold(0, u64::saturating_add),
        }
    }

    /// The tensors that a stage holds, each once.
    pub fn of_stage(&self, stage: &Stage) -> Vec<&str> {
        let tied = self.head.is_empty();
        let with_table = stage.role.owns_embedding() || (stage.role.owns_head() && tied);
        let layers = self.layers[stage.layers.clone()].iter().flatten();
        layers
            .chain(with_table.then_some(&self.embedding).into_iter().flatten())
            .chain(
                stage
                    .role
                    .owns_norm()
                    .then_some(&self.norm)
                    .into_iter()
                    .flatten(),
            )
            .chain(
                stage
                    .role
                    .owns_head()
                    .then_some(&self.head)
                    .into_iter()
                    .flatten(),
            )
            .map(|spec| spec.name.as_str())
            .collect()
    }

    fn all(&self) -> impl Iterator<Item = &TensorSpec> {
        self.embedding
            .iter()
            .chain(self.layers.iter().flatten())
            .chain(&self.norm)
            .chain(&self.head)
    }

    fn refuse_leftovers(&self, architecture: &Architecture, checkpoint: &Checkpoint) -> Result<()> {
        let known: BTreeSet<&str> = self.all().map(|spec| spec.name.as_str()).collect();
        let tied = architecture.head == HeadSpec::Tied;
        let left: Vec<&str> = checkpoint
            .iter()
            .map(|(name, _)| name)
            .filter(|name| !known.contains(name) && !is_redundant(name, tied))
            .collect();
        if let Some(first) = left.first() {
            bail!(
                "{}`{first}` is a tensor that a {} model of {} layers has no use for ({} such in all); \
                 config.json and the weights do not belong together, or this version lacks a feature of the \
                 model",
                place(first, checkpoint),
                architecture.model_type,
                architecture.layers.len(),
                left.len(),
            );
        }
        Ok(())
    }
}

/// Weights of a layer's matrices, which are what a token is multiplied with.
fn matrix_weights(layer: &LayerSpec) -> u64 {
    let matrices = [
        &layer.q_proj,
        &layer.k_proj,
        &layer.v_proj,
        &layer.o_proj,
        &layer.gate_proj,
        &layer.up_proj,
        &layer.down_proj,
    ];
    let weights = |matrix: &LinearSpec| matrix.outputs.saturating_mul(matrix.inputs) as u64;
    matrices
        .into_iter()
        .map(weights)
        .fold(0, u64::saturating_add)
}

/// Tensors that older tools write although they follow from the others: precomputed rotary
/// frequencies, and a copy of the tied table under the head's name.
fn is_redundant(name: &str, tied: bool) -> bool {
    name.ends_with(".self_attn.rotary_emb.inv_freq") || (tied && name.starts_with("lm_head."))
}

fn check_tensor(spec: &TensorSpec, checkpoint: &Checkpoint) -> Result<()> {
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
    checkpoint: &Checkpoint,
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
fn place(name: &str, checkpoint: &Checkpoint) -> String {
    let path = checkpoint.file_holding(name);
    path.map_or_else(String::new, |path| format!("{}: ", path.display()))
}

/// The file that holds other tensors of the module that a missing one belongs to.
fn place_of_sibling(name: &str, checkpoint: &Checkpoint) -> String {
    let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
    let siblings = ["weight", "scales", "biases", "bias"].map(|part| format!("{module}.{part}"));
    let places = siblings.iter().map(|sibling| place(sibling, checkpoint));
    places
        .into_iter()
        .find(|place| !place.is_empty())
        .unwrap_or_default()
}
