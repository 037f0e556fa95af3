//! A checkpoint directory, opened and checked: configuration, headers, and the one held against the
//! other. No tensor is read here, so `plan` works where the weights would not fit.

use super::architecture::Architecture;
use super::generation::end_of_sequence_ids;
use super::inventory::Inventory;
use crate::bounded_file;
use crate::checkpoint::{Checkpoint, Outline};
use crate::plan::{Head, ModelShape, TiedTable, WireDtype};
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
        let texts = Texts::read(dir)?;
        // Opening the checkpoint would wait for ever if this were a pipe.
        bounded_file::is_regular(&dir.join("model.safetensors.index.json"))?;
        Self::check(dir, &texts, Checkpoint::open(dir)?)
    }

    /// What to tell a rank that has no model directory.
    ///
    /// # Errors
    /// A file that has changed since it was opened, or cannot be read.
    pub fn outline(&self) -> Result<ModelOutline> {
        let texts = Texts::read(&self.dir)?;
        if texts.config_hash() != self.config_hash {
            bail!(
                "{}: config.json has changed since it was read; start again when nothing writes to it",
                self.dir.display()
            );
        }
        Ok(ModelOutline {
            dir: self.dir.to_string_lossy().into_owned(),
            texts,
            checkpoint: self.checkpoint.outline()?,
        })
    }

    /// The same model on a rank that was told of it. Everything is checked as if it came from files.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_outline(outline: ModelOutline) -> Result<Self> {
        let dir = PathBuf::from(outline.dir);
        let checkpoint = outline.checkpoint.into_checkpoint(&dir)?;
        Self::check(&dir, &outline.texts, checkpoint)
    }

    /// Holds configuration and headers against each other.
    fn check(dir: &Path, texts: &Texts, checkpoint: Checkpoint) -> Result<Self> {
        let in_dir = || format!("model directory {}", dir.display());
        let config = parse(dir, "config.json", &texts.config)?;
        let generation = texts.generation_config.as_deref();
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
            config_hash: texts.config_hash(),
        })
    }

    /// Bytes of every part of the model, for a cache in `kv_dtype`; `tied` says where a tied table stands.
    pub fn shape(&self, kv_dtype: WireDtype, tied: TiedTable) -> ModelShape {
        let tied_head = match tied {
            TiedTable::Once => Head::TiedOnce,
            TiedTable::Both => Head::Tied,
        };
        let element_bytes = kv_dtype.size_bytes();
        self.inventory.shape(
            &self.architecture,
            &self.checkpoint,
            element_bytes,
            tied_head,
        )
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

/// A model directory as one rank tells it to another that has none: configurations, and the headers of the
/// weight files.
#[derive(Debug, Serialize, Deserialize)]
pub struct ModelOutline {
    /// The directory on the host that has it, for messages.
    dir: String,
    texts: Texts,
    checkpoint: Outline,
}

/// The configurations as they stand in the files.
#[derive(Debug, Serialize, Deserialize)]
struct Texts {
    config: String,
    generation_config: Option<String>,
}

impl Texts {
    fn read(dir: &Path) -> Result<Self> {
        let Some(config) = read_text(dir, "config.json")? else {
            bail!(
                "{} has no config.json; expected a checkpoint directory in MLX's form",
                dir.display()
            );
        };
        Ok(Self {
            config,
            generation_config: read_text(dir, "generation_config.json")?,
        })
    }

    /// SHA-256 of `config.json`, in hexadecimal.
    fn config_hash(&self) -> String {
        hex::encode(Sha256::digest(&self.config))
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
