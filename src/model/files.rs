//! A checkpoint directory, opened and checked: configuration, headers, and the one held against the
//! other. No tensor is read here, so `plan` works where the weights would not fit, and with
//! [`Outline`] even where they are not.

use super::architecture::Architecture;
use super::generation::end_of_sequence_ids;
use super::inventory::Inventory;
use crate::bounded_file;
use crate::checkpoint::{Checkpoint, Headers, Listed};
use crate::plan::{Head, ModelShape, TiedTable, WireDtype};
use anyhow::{Context, Result, bail};
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
        let in_dir = || format!("model directory {}", dir.display());
        let (config, config_hash) = read_model_config(dir)?;
        let generation = read_config(dir, "generation_config.json")?.map(|(json, _)| json);
        let end_ids = end_of_sequence_ids(&config, generation.as_ref()).with_context(in_dir)?;
        check_index_is_regular(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        let architecture = Architecture::read(&config, |name| checkpoint.get(name).is_some())
            .with_context(in_dir)?;
        let inventory = Inventory::check(&architecture, &checkpoint).with_context(in_dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            architecture,
            inventory,
            checkpoint,
            end_ids,
            config_hash,
        })
    }

    /// Bytes of every part of the model, for a cache and activations in `kv_dtype`; `tied` says where a tied
    /// table stands, once if the plan is to choose.
    pub fn shape(&self, kv_dtype: WireDtype, tied: TiedTable) -> ModelShape {
        shape(&self.architecture, &self.inventory, kv_dtype, tied)
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
        let (config, _) = read_model_config(dir)?;
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
    pub fn shape(&self, kv_dtype: WireDtype, tied: TiedTable) -> ModelShape {
        shape(&self.architecture, &self.inventory, kv_dtype, tied)
    }

    /// As [`ModelFiles::longest_context_tokens`].
    pub fn longest_context_tokens(&self) -> u64 {
        self.architecture.family.context_tokens as u64
    }
}

fn shape(
    architecture: &Architecture,
    inventory: &Inventory,
    kv_dtype: WireDtype,
    tied: TiedTable,
) -> ModelShape {
    let tied_head = match tied {
        TiedTable::Once | TiedTable::Auto => Head::TiedOnce,
        TiedTable::Both => Head::Tied,
    };
    inventory.shape(architecture, kv_dtype.size_bytes(), tied_head)
}

fn read_model_config(dir: &Path) -> Result<(Value, String)> {
    match read_config(dir, "config.json")? {
        Some(config) => Ok(config),
        None => bail!(
            "{} has no config.json; expected a checkpoint directory in MLX's form",
            dir.display()
        ),
    }
}

/// Opening the checkpoint would wait for ever if its index were a pipe.
fn check_index_is_regular(dir: &Path) -> Result<()> {
    bounded_file::is_regular(&dir.join("model.safetensors.index.json"))?;
    Ok(())
}

/// A configuration and the SHA-256 of its bytes, in hexadecimal; `None` if it is not there.
fn read_config(dir: &Path, name: &str) -> Result<Option<(Value, String)>> {
    let Some(bytes) = bounded_file::read(&dir.join(name), LARGEST_CONFIG_BYTES)? else {
        return Ok(None);
    };
    let config = serde_json::from_slice(&bytes)
        .with_context(|| format!("model directory {}: {name} is not JSON", dir.display()))?;
    Ok(Some((config, hex::encode(Sha256::digest(&bytes)))))
}
