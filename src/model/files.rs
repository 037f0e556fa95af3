//! A checkpoint directory, opened and checked: configuration, headers, and the one held against the
//! other. No tensor is read here, so `plan` works where the weights would not fit, and with
//! [`Outline`] even where they are not.

use super::architecture::Architecture;
use super::generation::end_of_sequence_ids;
use super::inventory::{Caches, Inventory};
use crate::bounded_file;
use crate::checkpoint::{Checkpoint, HeaderTexts, Headers, Listed};
use crate::plan::{ModelShape, TiedTable, WireDtype};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Configurations above this are not configurations.
const LARGEST_CONFIG_BYTES: u64 = 16 << 20;

/// Everything known about a checkpoint without reading a tensor.
#[derive(Debug)]
pub struct ModelFiles {
    /// The directory.
    pub dir: PathBuf,
    /// The model that `config.json` describes.
    pub architecture: Architecture,
    /// The tensors in the files.
    pub checkpoint: Checkpoint,
    /// The tensors by part of the model.
    pub inventory: Inventory,
    /// Tokens that end an answer.
    pub end_ids: Vec<u32>,
    /// SHA-256 of `config.json`, in hexadecimal.
    pub config_hash: String,
}

impl ModelFiles {
    /// Opens a checkpoint directory.
    ///
    /// # Errors
    /// No configuration, weights that are not there or not whole, or the two not belonging together.
    pub fn open(dir: &Path) -> Result<Self> {
        let configs = Configs::read(dir)?;
        check_index_is_regular(dir)?;
        Self::check(dir, &configs, Checkpoint::open(dir)?)
    }

    /// What to tell a rank that has no model directory.
    ///
    /// # Errors
    /// A file that has changed since it was opened, or cannot be read.
    pub fn texts(&self) -> Result<ModelTexts> {
        let configs = Configs::read(&self.dir)?;
        if configs.config_hash() != self.config_hash {
            bail!(
                "{}: config.json has changed since it was read; start again when nothing writes to it",
                self.dir.display()
            );
        }
        Ok(ModelTexts {
            dir: self.dir.to_string_lossy().into_owned(),
            configs,
            headers: self.checkpoint.header_texts()?,
        })
    }

    /// The same model on a rank that was told of it. Everything is checked as if it came from files.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_texts(texts: ModelTexts) -> Result<Self> {
        let dir = PathBuf::from(texts.dir);
        let checkpoint = texts.headers.into_checkpoint(&dir)?;
        Self::check(&dir, &texts.configs, checkpoint)
    }

    /// Holds configuration and headers against each other.
    fn check(dir: &Path, configs: &Configs, checkpoint: Checkpoint) -> Result<Self> {
        let in_dir = || format!("model directory {}", dir.display());
        let config = parse(dir, "config.json", &configs.config)?;
        let generation = configs.generation_config.as_deref();
        let generation = generation
            .map(|text| parse(dir, "generation_config.json", text))
            .transpose()?;
        let end_ids = end_of_sequence_ids(&config, generation.as_ref()).with_context(in_dir)?;
        let architecture = Architecture::read(&config, |name| checkpoint.get(name).is_some())
            .with_context(in_dir)?;
        let inventory = Inventory::check(&architecture, &checkpoint).with_context(in_dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            architecture,
            inventory,
            checkpoint,
            end_ids,
            config_hash: configs.config_hash(),
        })
    }

    /// Bytes of every part of the model, for activations in `wire_dtype`; `tied` says where a tied table stands, once if
    /// the plan is to choose.
    pub fn shape(&self, wire_dtype: WireDtype, caches: Caches, tied: TiedTable) -> ModelShape {
        self.inventory
            .shape(&self.architecture, wire_dtype, caches, tied)
    }

    /// Longest sequence that the model was made for, tokens.
    pub fn longest_context_tokens(&self) -> u64 {
        self.architecture.family.context_tokens as u64
    }

    /// What names, shapes and places of all tensors hash to, in hexadecimal.
    pub fn tensor_hash(&self) -> String {
        hex::encode(self.checkpoint.fingerprint())
    }

    /// The dtype that a GPU computes this model in: that of its final norm.
    pub fn native_dtype(&self) -> WireDtype {
        let norm = self.architecture.norm.tensor();
        match self.checkpoint.get(&norm.name).map(|info| info.dtype) {
            Some(safetensors::Dtype::BF16) => WireDtype::Bf16,
            Some(safetensors::Dtype::F16) => WireDtype::F16,
            _ => WireDtype::F32,
        }
    }
}

/// What a plan needs of a checkpoint, whose weights may be elsewhere: `config.json`, and the headers of the
/// weight files (each whole, or cut off after its header) or only `model.safetensors.index.json`. A type
/// of its own, so that no run can take it for a model.
#[derive(Debug)]
pub struct Outline {
    architecture: Architecture,
    inventory: Inventory,
}

impl Outline {
    /// Opens a checkpoint directory for a plan.
    ///
    /// # Errors
    /// No configuration, neither headers nor an index, or what is there not belonging together.
    pub fn open(dir: &Path) -> Result<Self> {
        let in_dir = || format!("model directory {}", dir.display());
        let config = parse(dir, "config.json", &read_model_config(dir)?)?;
        check_index_is_regular(dir)?;
        if let Some(listed) = Listed::read(dir)? {
            let has_tensor = |name: &str| listed.tensors.contains(name);
            let architecture = Architecture::read(&config, has_tensor).with_context(in_dir)?;
            let inventory = Inventory::from_index(&architecture, &listed)?;
            return Ok(Self {
                architecture,
                inventory,
            });
        }
        let headers = Headers::open(dir)?;
        let has_tensor = |name: &str| headers.get(name).is_some();
        let architecture = Architecture::read(&config, has_tensor).with_context(in_dir)?;
        let inventory = Inventory::check(&architecture, &headers).with_context(in_dir)?;
        Ok(Self {
            architecture,
            inventory,
        })
    }

    /// As [`ModelFiles::shape`].
    pub fn shape(&self, wire_dtype: WireDtype, caches: Caches, tied: TiedTable) -> ModelShape {
        self.inventory
            .shape(&self.architecture, wire_dtype, caches, tied)
    }

    /// As [`ModelFiles::longest_context_tokens`].
    pub fn longest_context_tokens(&self) -> u64 {
        self.architecture.family.context_tokens as u64
    }
}

/// Opening the checkpoint would wait for ever if its index were a pipe.
fn check_index_is_regular(dir: &Path) -> Result<()> {
    bounded_file::is_regular(&dir.join("model.safetensors.index.json"))?;
    Ok(())
}

/// A model directory as one rank tells it to another that has none: configurations, and the headers of the
/// weight files.
#[derive(Debug, Serialize, Deserialize)]
pub struct ModelTexts {
    /// The directory on the host that has it, for messages.
    dir: String,
    configs: Configs,
    headers: HeaderTexts,
}

/// The configurations as they stand in the files.
#[derive(Debug, Serialize, Deserialize)]
struct Configs {
    config: String,
    generation_config: Option<String>,
}

impl Configs {
    fn read(dir: &Path) -> Result<Self> {
        Ok(Self {
            config: read_model_config(dir)?,
            generation_config: read_text(dir, "generation_config.json")?,
        })
    }

    /// SHA-256 of `config.json`, in hexadecimal.
    fn config_hash(&self) -> String {
        hex::encode(Sha256::digest(&self.config))
    }
}

fn read_model_config(dir: &Path) -> Result<String> {
    match read_text(dir, "config.json")? {
        Some(config) => Ok(config),
        None => bail!(
            "{} has no config.json; expected a checkpoint directory in MLX's form",
            dir.display()
        ),
    }
}

/// A configuration; `None` if it is not there.
fn read_text(dir: &Path, name: &str) -> Result<Option<String>> {
    let Some(bytes) = bounded_file::read(&dir.join(name), LARGEST_CONFIG_BYTES)? else {
        return Ok(None);
    };
    let text = String::from_utf8(bytes).with_context(|| not_json(dir, name))?;
    Ok(Some(text))
}

fn parse(dir: &Path, name: &str, text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| not_json(dir, name))
}

fn not_json(dir: &Path, name: &str) -> String {
    format!("model directory {}: {name} is not JSON", dir.display())
}
