//! What the GGUF's metadata says about the network: architecture, sizes, rotary scaling.
//!
//! Separate from `tensors.rs` (what must be in the file for such a network) and `config.rs` (how a checkpoint says
//! the same). All numbers are checked here, so that products of them further on cannot overflow.

use std::cell::RefCell;
use std::collections::HashSet;

use super::ModelError;
use super::gguf::{Gguf, Metadata, required};
use super::rope::{self, RopeScaling};

/// Largest size taken from metadata. Far above any model, and three of them multiply within 64 bits.
const SIZE_MAX: usize = 1 << 21;
/// The base of the rotary frequencies when the file names none, as in llama.cpp.
const ROPE_THETA_DEFAULT: f32 = 10_000.0;

/// Keys that change nothing in the networks imported here.
const WITHOUT_EFFECT: [&str; 4] = [
    "expert_used_count",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
];

/// The architectures that are imported; the same names in GGUF's `general.architecture` and MLX's `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama, and models built like it (SmolLM2, ...). Stores q and k rows interleaved.
    Llama,
    /// Qwen 2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen 3: norms on q and k.
    Qwen3,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 3] = [Family::Llama, Family::Qwen2, Family::Qwen3];

    /// The name in both formats.
    pub fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }

    /// The class that `config.json` names under `architectures`.
    pub fn class(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// The network's sizes and constants.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// Which network it is.
    pub family: Family,
    /// Transformer layers.
    pub layer_count: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub head_count: usize,
    /// Key and value heads.
    pub kv_head_count: usize,
    /// Values per head, even.
    pub head_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence the model was made for, in tokens.
    pub context_length: usize,
    /// Added to the mean square in RMS norms.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Change of the rotary frequencies, if any.
    pub rope_scaling: Option<RopeScaling>,
    /// The head is the embedding.
    pub tied: bool,
    /// q, k, v and o have biases although the family does not prescribe them.
    pub attention_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// Metadata keys of the architecture that nothing here asks for, sorted: what they say gets lost.
    pub unread_keys: Vec<String>,
}

impl Architecture {
    /// Reads and checks everything the network's shape depends on.
    ///
    /// # Errors
    /// An architecture, a rotary scaling or another feature that is not imported; a metadata key that is missing or
    /// whose value cannot be.
    pub fn read(gguf: &Gguf<'_>) -> Result<Architecture, ModelError> {
        let family = family(&gguf.metadata)?;
        let keys = Keys {
            metadata: &gguf.metadata,
            family,
            asked: RefCell::default(),
        };
        reject_what_config_cannot_say(&keys)?;
        let hidden_size = keys.size("embedding_length")?;
        let head_count = keys.size("attention.head_count")?;
        let kv_head_count = keys
            .optional_size("attention.head_count_kv")?
            .unwrap_or(head_count);
        let architecture = Architecture {
            family,
            layer_count: keys.size("block_count")?,
            hidden_size,
            intermediate_size: keys.size("feed_forward_length")?,
            head_count,
            kv_head_count,
            head_size: head_size(&keys, hidden_size, head_count)?,
            vocab_size: vocab_size(gguf, &keys)?,
            context_length: keys.context_length()?,
            rms_norm_eps: keys.positive("attention.layer_norm_rms_epsilon", None)?,
            rope_theta: keys.positive("rope.freq_base", Some(ROPE_THETA_DEFAULT))?,
            rope_scaling: None,
            tied: gguf.tensor("output.weight").is_none(),
            attention_bias: family == Family::Llama && gguf.tensor("blk.0.attn_q.bias").is_some(),
            mlp_bias: family == Family::Llama && gguf.tensor("blk.0.ffn_gate.bias").is_some(),
            unread_keys: Vec::new(),
        };
        if head_count % kv_head_count != 0 {
            let expected = format!("a divisor of attention.head_count ({head_count})");
            return Err(keys.bad("attention.head_count_kv", kv_head_count, expected));
        }
        // Every layer has tensors, so more layers than tensors cannot be; this bounds the list of expected tensors.
        if architecture.layer_count > gguf.tensors.len() {
            let expected = format!("at most the {} tensors of the file", gguf.tensors.len());
            return Err(keys.bad("block_count", architecture.layer_count, expected));
        }
        let rope_scaling = rope::read(gguf, &architecture, &keys)?;
        Ok(Architecture {
            rope_scaling,
            unread_keys: keys.unread(),
            ..architecture
        })
    }

    /// Rows of the q projection.
    pub fn query_rows(&self) -> usize {
        self.head_count * self.head_size
    }

    /// Rows of the k and of the v projection.
    pub fn key_rows(&self) -> usize {
        self.kv_head_count * self.head_size
    }
}

fn family(metadata: &Metadata<'_>) -> Result<Family, ModelError> {
    let key = "general.architecture";
    let found = required(key, metadata.text(key)?)?;
    Family::ALL
        .into_iter()
        .find(|family| family.name() == found)
        .ok_or_else(|| ModelError::Architecture {
            found: found.to_owned(),
            supported: Family::ALL.map(Family::name).join(", "),
        })
}

/// The metadata below the architecture's name: `block_count` is `llama.block_count`.
pub struct Keys<'m, 'a> {
    metadata: &'m Metadata<'a>,
    family: Family,
    asked: RefCell<HashSet<String>>,
}

impl Keys<'_, '_> {
    /// The whole key, which counts as read from now on.
    fn full(&self, key: &str) -> String {
        let full = format!("{}.{key}", self.family.name());
        self.asked.borrow_mut().insert(full.clone());
        full
    }

    /// The architecture's keys that were never asked for, sorted.
    fn unread(&self) -> Vec<String> {
        let prefix = self.full("");
        let asked = self.asked.borrow();
        let mut unread: Vec<String> = self
            .metadata
            .keys()
            .filter(|key| key.starts_with(&prefix) && !asked.contains(*key))
            .filter(|key| !WITHOUT_EFFECT.contains(&&key[prefix.len()..]))
            .map(str::to_owned)
            .collect();
        unread.sort_unstable();
        unread
    }

    /// The error for a value that cannot be.
    pub fn bad(&self, key: &str, value: impl ToString, expected: impl Into<String>) -> ModelError {
        ModelError::Value {
            key: self.full(key),
            value: value.to_string(),
            expected: expected.into(),
        }
    }

    /// Whether there is such a key.
    pub fn has(&self, key: &str) -> bool {
        self.metadata.has(&self.full(key))
    }

    /// A string.
    ///
    /// # Errors
    /// A value of another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        Ok(self.metadata.text(&self.full(key))?)
    }

    /// A float that is finite and above zero; `default` if the key is absent.
    ///
    /// # Errors
    /// A value of another type or range; no value and no default.
    pub fn positive(&self, key: &str, default: Option<f32>) -> Result<f32, ModelError> {
        let value = self.metadata.float(&self.full(key))?.or(default);
        let value = required(&self.full(key), value)?;
        if value.is_finite() && value > 0.0 {
            Ok(value)
        } else {
            Err(self.bad(key, value, "a finite number above 0"))
        }
    }

    fn size(&self, key: &str) -> Result<usize, ModelError> {
        let size = self.optional_size(key)?;
        Ok(required(&self.full(key), size)?)
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match self.metadata.count(&self.full(key))? {
            Some(size) if !(1..=SIZE_MAX).contains(&size) => {
                Err(self.bad(key, size, format!("1 to {SIZE_MAX}")))
            }
            size => Ok(size),
        }
    }

    /// Not held to [`SIZE_MAX`]: it multiplies nothing, and a context of millions of tokens is possible.
    fn context_length(&self) -> Result<usize, ModelError> {
        let key = "context_length";
        match required(&self.full(key), self.metadata.count(&self.full(key))?)? {
            0 => Err(self.bad(key, 0, "at least 1")),
            tokens => Ok(tokens),
        }
    }
}

/// Refuses what llama.cpp would compute and the checkpoint's `config.json` has no field for.
fn reject_what_config_cannot_say(keys: &Keys<'_, '_>) -> Result<(), ModelError> {
    for (key, feature) in [
        ("expert_count", "mixture of experts"),
        ("attention.sliding_window", "sliding-window attention"),
    ] {
        match keys.metadata.count(&keys.full(key))? {
            None | Some(0) => {}
            Some(value) => {
                return Err(keys.bad(key, value, format!("0: {feature} is not imported")));
            }
        }
    }
    for key in [
        "attention.scale",
        "attention.clamp_kqv",
        "attention.max_alibi_bias",
        "embedding_scale",
        "logit_scale",
        "residual_scale",
    ] {
        match keys.metadata.float(&keys.full(key))? {
            None | Some(0.0) => {}
            Some(value) => return Err(keys.bad(key, value, "no such key: it is not imported")),
        }
    }
    let key = "attention.causal";
    if keys.metadata.flag(&keys.full(key))? == Some(false) {
        return Err(keys.bad(key, false, "true: only causal language models are imported"));
    }
    let key = "use_parallel_residual";
    if keys.metadata.flag(&keys.full(key))? == Some(true) {
        return Err(keys.bad(key, true, "false"));
    }
    Ok(())
}

/// Values per head. The file gives it up to three times: for keys, for values, and as what is rotated.
fn head_size(
    keys: &Keys<'_, '_>,
    hidden_size: usize,
    head_count: usize,
) -> Result<usize, ModelError> {
    let even_share = hidden_size / head_count;
    let key_length = keys.optional_size("attention.key_length")?;
    let head_size = key_length.unwrap_or(even_share);
    let shares_evenly = even_share * head_count == hidden_size;
    if key_length.is_none() && !shares_evenly {
        let expected = format!("a divisor of embedding_length ({hidden_size})");
        return Err(keys.bad("attention.head_count", head_count, expected));
    }
    // Its config.json has no head size: readers divide hidden_size by the heads.
    if keys.family == Family::Qwen2 && (head_size != even_share || !shares_evenly) {
        let expected = format!("embedding_length / attention.head_count ({even_share})");
        return Err(keys.bad("attention.key_length", head_size, expected));
    }
    if head_size % 2 != 0 {
        return Err(keys.bad("attention.key_length", head_size, "an even number"));
    }
    for key in ["attention.value_length", "rope.dimension_count"] {
        match keys.optional_size(key)? {
            Some(size) if size != head_size => {
                let expected = format!("the head size ({head_size}), others are not imported");
                return Err(keys.bad(key, size, expected));
            }
            _ => {}
        }
    }
    Ok(head_size)
}

/// Rows of the embedding. `vocab_size` in the metadata is optional and must agree.
fn vocab_size(gguf: &Gguf<'_>, keys: &Keys<'_, '_>) -> Result<usize, ModelError> {
    let name = "token_embd.weight";
    let embedding = gguf
        .tensor(name)
        .ok_or_else(|| ModelError::MissingTensors {
            names: vec![name.to_owned()],
        })?;
    let rows = embedding.shape.first().copied().unwrap_or(0);
    if rows > SIZE_MAX {
        return Err(ModelError::Tensor {
            tensor: name.to_owned(),
            problem: format!("{rows} rows, expected at most {SIZE_MAX}"),
        });
    }
    match keys.optional_size("vocab_size")? {
        Some(size) if size != rows => {
            let expected = format!("the {rows} rows of {name}");
            Err(keys.bad("vocab_size", size, expected))
        }
        _ => Ok(rows),
    }
}
