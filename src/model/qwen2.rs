//! `model_type: qwen2` (Qwen2 and Qwen2.5): biases on queries, keys and values; tied head and
//! 1 000 000 as rotary base by default (the defaults of mlx-lm's `models/qwen2.py`).

use super::architecture::{Family, head_dim_or_derived, rope_theta};
use super::fields::{ConfigError, Fields};

/// What a qwen2 configuration fixes.
pub fn family(fields: &Fields) -> Result<Family, ConfigError> {
    Ok(Family {
        head_dim: head_dim_or_derived(fields)?,
        kv_head_count: fields.size("num_key_value_heads")?,
        qkv_bias: true,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tied: fields.flag_or("tie_word_embeddings", true)?,
        context_tokens: fields.size_or("max_position_embeddings", 32_768)?,
        rope_theta: rope_theta(fields)?.unwrap_or(1_000_000.0),
    })
}
