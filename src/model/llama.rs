//! `model_type: llama`: no norms on queries and keys; biases only where the configuration says so;
//! tied head and 10 000 as rotary base by default (the defaults of mlx-lm's `models/llama.py`).

use super::architecture::{Family, head_dim_or_derived, rope_theta};
use super::fields::{ConfigError, Fields};

/// What a llama configuration fixes.
pub fn family(fields: &Fields) -> Result<Family, ConfigError> {
    let attention_bias = fields.flag_or("attention_bias", false)?;
    Ok(Family {
        head_dim: head_dim_or_derived(fields)?,
        kv_head_count: fields
            .size_or("num_key_value_heads", fields.size("num_attention_heads")?)?,
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: fields.flag_or("mlp_bias", false)?,
        qk_norm: false,
        tied: fields.flag_or("tie_word_embeddings", true)?,
        context_tokens: fields.size_or("max_position_embeddings", 2048)?,
        rope_theta: rope_theta(fields)?.unwrap_or(10_000.0),
    })
}
