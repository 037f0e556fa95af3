//! The `quantization` object of a checkpoint: MLX's affine format, its default and the exceptions
//! that single modules make. Pure.
//!
//! A weight of `inputs` columns is cut into groups along the row; each group has a scale and a bias
//! and its codes are packed, low bits first, into 32-bit words: `w = scale * code + bias`.

use super::fields::{ConfigError, Fields};
use serde_json::Value;
use std::collections::BTreeMap;

/// Code width and group length of one quantised weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affine {
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: usize,
    /// Weights that share a scale and a bias: 32, 64 or 128.
    pub group_size: usize,
}

impl Affine {
    /// 32-bit words that hold one row of `inputs` codes.
    pub fn words(self, inputs: usize) -> usize {
        inputs * self.bits / 32
    }

    /// Groups in one row of `inputs` codes.
    pub fn groups(self, inputs: usize) -> usize {
        inputs / self.group_size
    }
}

/// How each module of a checkpoint is stored.
#[derive(Debug, Default)]
pub struct Quantization {
    default: Option<Affine>,
    exceptions: BTreeMap<String, Option<Affine>>,
}

impl Quantization {
    /// Reads the `quantization` object of a configuration (`quantization_config` where a tool wrote
    /// only that one). Absent means that nothing is quantised.
    pub fn read(config: &Fields) -> Result<Self, ConfigError> {
        let fields = match config.object("quantization")? {
            Some(fields) => fields,
            None => match config.object("quantization_config")? {
                Some(fields) => fields,
                None => return Ok(Self::default()),
            },
        };
        if let Some(method) = fields.text_or_none("quant_method")? {
            return Err(fields.unsupported(
                "quant_method",
                format!("\"{method}\" (only MLX's own affine format is read; convert the model with mlx_lm.convert)"),
            ));
        }
        let default = read_affine(&fields)?;
        let mut exceptions = BTreeMap::new();
        for (name, value) in fields.iter() {
            match value {
                Value::Object(_) => {
                    let object = fields.object(name)?.expect("just seen to be an object");
                    exceptions.insert(name.clone(), Some(read_affine(&object)?));
                }
                Value::Bool(false) => {
                    exceptions.insert(name.clone(), None);
                }
                _ => {}
            }
        }
        Ok(Self {
            default: Some(default),
            exceptions,
        })
    }

    /// The format of module `name` (`model.layers.3.mlp.down_proj`), `None` if it is not quantised.
    /// A module without an exception is quantised if the checkpoint holds scales for it: that is
    /// how MLX's own tools leave a module out.
    pub fn of(&self, name: &str, has_scales: bool) -> Option<Affine> {
        match self.exceptions.get(name) {
            Some(exception) => *exception,
            None if has_scales => self.default,
            None => None,
        }
    }
}

/// Reads `bits` and `group_size` (and `mode`, which must be affine) of one object.
fn read_affine(fields: &Fields) -> Result<Affine, ConfigError> {
    if let Some(mode) = fields.text_or_none("mode")?
        && mode != "affine"
    {
        return Err(fields.unsupported("mode", format!("the quantisation mode \"{mode}\"")));
    }
    let bits = fields.size("bits")?;
    if ![2, 3, 4, 5, 6, 8].contains(&bits) {
        return Err(fields.wrong("bits", &bits.into(), "2, 3, 4, 5, 6 or 8"));
    }
    let group_size = fields.size("group_size")?;
    if ![32, 64, 128].contains(&group_size) {
        return Err(fields.wrong("group_size", &group_size.into(), "32, 64 or 128"));
    }
    Ok(Affine { bits, group_size })
}
