//! Typed access to the fields of a `config.json` or `generation_config.json`, so that every complaint names the file, the field,
//! what was expected and what stands there. Pure: knows JSON, not arrays.

use serde_json::{Map, Value};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// A field that has no default is not there.
    #[error("{file}: the field `{field}` is missing; expected {expected}")]
    Missing {
        /// The file.
        file: &'static str,
        /// Name of the field, with the objects that hold it.
        field: String,
        /// What the field should be.
        expected: &'static str,
    },
    /// A field holds something else than its type or range.
    #[error("{file}: `{field}` is {found}; expected {expected}")]
    Wrong {
        /// The file.
        file: &'static str,
        /// Name of the field, with the objects that hold it.
        field: String,
        /// The JSON text found, shortened.
        found: String,
        /// What the field should be.
        expected: String,
    },
    /// The model family is not one of ours.
    #[error("config.json: `model_type` is \"{found}\"; this version runs llama, qwen2 and qwen3")]
    UnknownModelType {
        /// The `model_type` found.
        found: String,
    },
    /// A feature that would change the answers is asked for and not implemented.
    #[error("{file}: `{field}` asks for {what}, which this version does not implement")]
    Unsupported {
        /// The file.
        file: &'static str,
        /// Name of the field.
        field: String,
        /// The feature.
        what: String,
    },
    /// Two parts of the checkpoint contradict each other.
    #[error("config.json: {0}")]
    Inconsistent(String),
}

/// Sizes above this are mistakes or attacks, not models.
const LARGEST_SIZE: u64 = 1 << 31;

/// The fields of one JSON object, with its file and path for messages (empty for the top level).
pub struct Fields<'a> {
    file: &'static str,
    path: String,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The top level of the configuration in `file`; an error if it is not a JSON object.
    pub fn top(config: &'a Value, file: &'static str) -> Result<Self, ConfigError> {
        let object = config.as_object().ok_or_else(|| ConfigError::Wrong {
            file,
            field: "(top level)".into(),
            found: shortened(config),
            expected: "a JSON object".into(),
        })?;
        Ok(Self {
            file,
            path: String::new(),
            object,
        })
    }

    /// The raw value of a field; `null` counts as absent.
    pub fn value(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// The field as an object of its own, if present.
    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ConfigError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields {
                file: self.file,
                path: self.full(name),
                object,
            })),
            Some(other) => Err(self.wrong(name, other, "a JSON object")),
        }
    }

    /// Names and values of all fields, in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.object.iter()
    }

    /// A size: an integer from 1 to 2^31.
    pub fn size(&self, name: &str) -> Result<usize, ConfigError> {
        self.size_or_none(name)?
            .ok_or_else(|| self.missing(name, "a positive integer"))
    }

    /// A size, or the default if absent.
    pub fn size_or(&self, name: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.size_or_none(name)?.unwrap_or(default))
    }

    /// A size, if present.
    pub fn size_or_none(&self, name: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(size) if (1..=LARGEST_SIZE).contains(&size) => Ok(Some(size as usize)),
            _ => Err(self.wrong(name, value, "an integer from 1 to 2147483648")),
        }
    }

    /// A positive finite number.
    pub fn positive(&self, name: &str) -> Result<f64, ConfigError> {
        self.positive_or_none(name)?
            .ok_or_else(|| self.missing(name, "a positive number"))
    }

    /// A positive finite number, or the default if absent.
    pub fn positive_or(&self, name: &str, default: f64) -> Result<f64, ConfigError> {
        Ok(self.positive_or_none(name)?.unwrap_or(default))
    }

    /// A positive finite number, if present.
    pub fn positive_or_none(&self, name: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
            _ => Err(self.wrong(name, value, "a positive number")),
        }
    }

    /// A boolean, or the default if absent.
    pub fn flag_or(&self, name: &str, default: bool) -> Result<bool, ConfigError> {
        match self.value(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.wrong(name, other, "true or false")),
        }
    }

    /// A string.
    pub fn text(&self, name: &str) -> Result<&'a str, ConfigError> {
        self.text_or_none(name)?
            .ok_or_else(|| self.missing(name, "a string"))
    }

    /// A string, if present.
    pub fn text_or_none(&self, name: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, other, "a string")),
        }
    }

    /// The error for a field that is there but wrong.
    pub fn wrong(&self, name: &str, found: &Value, expected: impl Into<String>) -> ConfigError {
        ConfigError::Wrong {
            file: self.file,
            field: self.full(name),
            found: shortened(found),
            expected: expected.into(),
        }
    }

    /// The error for a feature that this version lacks.
    pub fn unsupported(&self, name: &str, what: impl Into<String>) -> ConfigError {
        ConfigError::Unsupported {
            file: self.file,
            field: self.full(name),
            what: what.into(),
        }
    }

    /// The error for a field that is not there.
    pub fn missing(&self, name: &str, expected: &'static str) -> ConfigError {
        ConfigError::Missing {
            file: self.file,
            field: self.full(name),
            expected,
        }
    }

    fn full(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }
}

/// JSON text, cut to a length that fits a message.
fn shortened(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
