//! `config.json` and `generation_config.json`, with the keys mlx-lm and transformers read.
//!
//! Separate so that one place says how a checkpoint spells what `architecture.rs` and `tokenizer.rs` know.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::architecture::{Architecture, Family};
use super::blocks::{Encoding, Float, GROUP_SIZE};
use super::rope::{RopeScaling, decimal};
use super::tensors::Tensors;
use super::tokenizer::SpecialIds;

/// The contents of `config.json`.
pub fn config(architecture: &Architecture, tensors: &Tensors<'_>, ids: &SpecialIds) -> Value {
    let mut config = Map::new();
    let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
    set("model_type", json!(architecture.family.name()));
    set("architectures", json!([architecture.family.class()]));
    set("hidden_size", json!(architecture.hidden_size));
    set("num_hidden_layers", json!(architecture.layer_count));
    set("intermediate_size", json!(architecture.intermediate_size));
    set("num_attention_heads", json!(architecture.head_count));
    set("num_key_value_heads", json!(architecture.kv_head_count));
    set("head_dim", json!(architecture.head_size));
    set("hidden_act", json!("silu"));
    set("rms_norm_eps", json!(decimal(architecture.rms_norm_eps)));
    set("rope_theta", json!(decimal(architecture.rope_theta)));
    if let Some(scaling) = &architecture.rope_scaling {
        set("rope_scaling", rope_scaling(scaling));
    }
    set(
        "max_position_embeddings",
        json!(architecture.context_length),
    );
    set("vocab_size", json!(architecture.vocab_size));
    set("tie_word_embeddings", json!(architecture.tied));
    if architecture.family == Family::Llama {
        set("attention_bias", json!(architecture.attention_bias));
        set("mlp_bias", json!(architecture.mlp_bias));
    }
    for (key, id) in ids.by_config_key() {
        set(key, json!(id));
    }
    set("torch_dtype", json!(dtype_name(tensors.dtype)));
    if let Some(quantization) = quantization(tensors) {
        // mlx-lm reads the first and writes both; transformers reads the second.
        set("quantization", quantization.clone());
        set("quantization_config", quantization);
    }
    Value::Object(config)
}

fn dtype_name(float: Float) -> &'static str {
    match float {
        Float::F32 => "float32",
        Float::F16 => "float16",
        Float::BF16 => "bfloat16",
    }
}

fn rope_scaling(scaling: &RopeScaling) -> Value {
    match scaling {
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 {
            factor,
            high_freq_factor,
            original_context_length,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_context_length,
        }),
    }
}

/// The commonest bit width at the top, an entry for every matrix that differs: its own width, or `false` for one that
/// is not quantised. `None` if no matrix is.
fn quantization(tensors: &Tensors<'_>) -> Option<Value> {
    let mut counts = BTreeMap::new();
    for (_, encoding) in &tensors.matrices {
        if let Encoding::Blocks(kind) = encoding {
            *counts.entry(kind.bits()).or_insert(0usize) += 1;
        }
    }
    let (&bits, _) = counts.iter().max_by_key(|(_, count)| **count)?;
    let mut quantization = Map::new();
    quantization.insert("group_size".into(), json!(GROUP_SIZE));
    quantization.insert("bits".into(), json!(bits));
    quantization.insert("mode".into(), json!("affine"));
    for (module, encoding) in &tensors.matrices {
        let entry = match encoding {
            Encoding::Blocks(kind) if kind.bits() == bits => continue,
            Encoding::Blocks(kind) => json!({"group_size": GROUP_SIZE, "bits": kind.bits()}),
            Encoding::Plain(_) => json!(false),
        };
        quantization.insert(module.clone(), entry);
    }
    Some(Value::Object(quantization))
}

/// The contents of `generation_config.json`: where generation starts and ends.
pub fn generation_config(ids: &SpecialIds) -> Value {
    let mut config = Map::new();
    for (key, id) in ids.by_config_key() {
        config.insert(key.to_owned(), json!(id));
    }
    match ids.ends().as_slice() {
        [] => {}
        [end] => drop(config.insert("eos_token_id".into(), json!(end))),
        ends => drop(config.insert("eos_token_id".into(), json!(ends))),
    }
    Value::Object(config)
}
