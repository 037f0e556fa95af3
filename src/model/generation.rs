//! What ends an answer: the end-of-sequence ids of `generation_config.json`, else of `config.json`;
//! one number or several. Pure.

use super::fields::{ConfigError, Fields};
use serde_json::Value;

/// The ids after which a sequence ends; empty if the checkpoint names none.
///
/// # Errors
/// An `eos_token_id` that is neither a token id nor a list of them.
pub fn end_of_sequence_ids(
    config: &Value,
    generation_config: Option<&Value>,
) -> Result<Vec<u32>, ConfigError> {
    for source in generation_config.into_iter().chain([config]) {
        let fields = Fields::top(source)?;
        let Some(value) = fields.value("eos_token_id") else {
            continue;
        };
        let listed = value
            .as_array()
            .map_or(std::slice::from_ref(value), Vec::as_slice);
        return listed
            .iter()
            .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect::<Option<Vec<u32>>>()
            .ok_or_else(|| {
                fields.wrong("eos_token_id", value, "a token id or a list of token ids")
            });
    }
    Ok(Vec::new())
}
