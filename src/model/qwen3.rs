//! `model_type: qwen3` (dense): an RMS norm on every query and key head, no biases; head width,
//! tying, context and rotary base must be given (as in mlx-lm's `models/qwen3.py`).

use super::architecture::{Family, rope_theta};
use super::fields::{ConfigError, Fields};

/// What a qwen3 configuration fixes.
pub fn family(fields: &Fields) -> Result<Family, ConfigError> {
    if fields.flag_or("attention_bias", false)? {
        return Err(fields.unsupported("attention_bias", "biases in attention for qwen3"));
    }
    if fields.value("tie_word_embeddings").is_none() {
        return Err(fields.missing("tie_word_embeddings", "true or false"));
    }
    Ok(Family {
        head_dim: fields.size("head_dim")?,
        kv_head_count: fields.size("num_key_value_heads")?,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: true,
        tied: fields.flag_or("tie_word_embeddings", false)?,
        context_tokens: fields.size("max_position_embeddings")?,
        rope_theta: rope_theta(fields)?
            .ok_or_else(|| fields.missing("rope_theta", "a positive number"))?,
    })
}
