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
    let generation_config = generation_config.map(|json| (json, "generation_config.json"));
    for (json, file) in generation_config
        .into_iter()
        .chain([(config, "config.json")])
    {
        let fields = Fields::top(json, file)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn generation_config_goes_before_config() {
        let config = json!({"eos_token_id": 1});
        let ids = |generation: Value| end_of_sequence_ids(&config, Some(&generation)).unwrap();
        assert_eq!(ids(json!({"eos_token_id": [2, 3]})), [2, 3]);
        assert_eq!(ids(json!({"eos_token_id": null})), [1]);
        assert_eq!(end_of_sequence_ids(&config, None).unwrap(), [1]);
        assert!(end_of_sequence_ids(&json!({}), None).unwrap().is_empty());
    }

    #[test]
    fn a_bad_id_is_blamed_on_the_file_that_holds_it() {
        let (good, bad) = (json!({}), json!({"eos_token_id": "</s>"}));
        let message = |config: &Value, generation: &Value| {
            let error = end_of_sequence_ids(config, Some(generation)).unwrap_err();
            error.to_string()
        };
        assert!(message(&good, &bad).starts_with("generation_config.json: `eos_token_id`"));
        assert!(message(&bad, &good).starts_with("config.json: `eos_token_id`"));
        assert!(message(&good, &json!([])).starts_with("generation_config.json: `(top level)`"));
    }
}
