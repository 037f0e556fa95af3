//! Fields of a JSON object as they are taken out of it, and how what is wrong with one is said.

use super::{Rejection, RejectionCode};
use serde_json::{Map, Value};

/// The fields of an object that nobody has taken yet.
pub(super) struct Fields(pub(super) Map<String, Value>);

impl Fields {
    /// Takes a field out; `null` counts as absent, as in OpenAI's API.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn required(&mut self, name: &str) -> Result<Value, Rejection> {
        self.take(name)
            .ok_or_else(|| missing(name, &format!("`{name}` is missing")))
    }

    pub(super) fn required_string(&mut self, name: &str) -> Result<String, Rejection> {
        string(name, self.required(name)?)
    }

    pub(super) fn boolean(&mut self, name: &str) -> Result<Option<bool>, Rejection> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| wrong_type(name, "true or false", &value))
    }

    /// A number, narrowed to f32. What does not fit becomes infinite or 0 and is left to [`Sampling::validate`].
    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, Rejection> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        value
            .as_f64()
            .map(|number| Some(number as f32))
            .ok_or_else(|| wrong_type(name, "a number", &value))
    }

    /// A whole number in `[least, most]`.
    pub(super) fn integer(
        &mut self,
        name: &str,
        least: i64,
        most: i64,
    ) -> Result<Option<i64>, Rejection> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match value.as_i64() {
            Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
            Some(_) => Err(wrong_value(name, &integer_range(least, most), &value)),
            None if value.is_u64() => Err(wrong_value(name, &integer_range(least, most), &value)),
            None => Err(wrong_type(name, "an integer", &value)),
        }
    }
}

pub(super) fn string(at: &str, value: Value) -> Result<String, Rejection> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(wrong_type(at, "a string", &other)),
    }
}

pub(super) fn integer_range(least: i64, most: i64) -> String {
    match most {
        i64::MAX => format!("an integer of {least} or more"),
        _ => format!("an integer from {least} to {most}"),
    }
}

pub(super) fn missing(field: &str, message: &str) -> Rejection {
    Rejection::of_field(RejectionCode::MissingField, field, message)
}

pub(super) fn wrong_type(field: &str, expected: &str, value: &Value) -> Rejection {
    let message = format!("`{field}` must be {expected}, found {}", found(value));
    Rejection::of_field(RejectionCode::InvalidType, field, message)
}

pub(super) fn wrong_value(field: &str, expected: &str, value: &Value) -> Rejection {
    let message = format!("`{field}` must be {expected}, found {}", found(value));
    Rejection::of_field(RejectionCode::InvalidValue, field, message)
}

/// What serde_json says about bytes that start `skipped_bytes` into the line, with the place as a column of that line.
pub(super) fn invalid_json(error: &serde_json::Error, skipped_bytes: usize) -> Rejection {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let what = text.strip_suffix(&place).unwrap_or(&text);
    let place = match error.line() {
        0 | 1 => format!("column {}", error.column().saturating_add(skipped_bytes)),
        line => format!("line {line} of the body, column {}", error.column()),
    };
    Rejection::new(
        RejectionCode::InvalidJson,
        format!("not valid JSON at {place}: {what}"),
    )
}

/// A value as an error text shows it: whole if it is short, else by kind.
pub(super) fn found(value: &Value) -> String {
    match value {
        Value::Array(items) if items.is_empty() => "an empty array".to_owned(),
        Value::Array(items) => format!("an array of {}", items.len()),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) => format!("{:?}", shorten(text)),
        other => other.to_string(),
    }
}

/// The first characters of a text that may be of any length.
pub(super) fn shorten(text: &str) -> String {
    const CHARS_MAX: usize = 60;
    match text.char_indices().nth(CHARS_MAX) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
    }
}

/// Whether it is an array without elements.
pub(super) fn is_empty_array(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}
