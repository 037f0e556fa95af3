//! From `--model` to a directory on this host: a path, or an id in the local Hugging Face cache, or,
//! where a network is there, a download into that cache. And where weights are kept that another rank sent.

use crate::agree::Usage;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::user_cache;
use anyhow::{Context, Result, anyhow, bail};
use hf_hub::Cache;
use hf_hub::api::sync::{ApiBuilder, ApiError};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tracing::info;

/// The file without which a directory is no checkpoint.
const CONFIG: &str = "config.json";

/// Where a model was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Found {
    /// A checkpoint directory, given as such.
    Directory(PathBuf),
    /// In the cache of this host, whole.
    Cached(PathBuf),
    /// An id that the cache of this host does not hold.
    NotCached(String),
}

/// Looks for a model on this host, without a network.
///
/// # Errors
/// Neither a directory nor an id of the form `owner/name`, or weights in the cache that are damaged.
pub fn find(model: &str) -> Result<Found> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(Found::Directory(path.to_owned()));
    }
    if path.exists() {
        return Err(Usage::of(anyhow!(
            "--model \"{model}\" is a file; expected a checkpoint directory (a GGUF file is converted by \
             `mlx-pipe import {model} OUT_DIR`)"
        )));
    }
    if !is_id(model) {
        return Err(Usage::of(anyhow!(
            "no directory \"{model}\" on this host; --model expects a checkpoint directory, or an id such as \
             mlx-community/Qwen3-1.7B-8bit"
        )));
    }
    Ok(match cached(model)? {
        Some(dir) => Found::Cached(dir),
        None => Found::NotCached(model.to_owned()),
    })
}

/// The directory of a model, if this host has one: for a rank that gets from another what it lacks.
///
/// # Errors
/// A file in the directory's place, or weights in the cache that are damaged.
pub fn find_here(model: &str) -> Result<Option<PathBuf>> {
    if !Path::new(model).exists() && !is_id(model) {
        return Ok(None);
    }
    Ok(match find(model)? {
        Found::Directory(dir) | Found::Cached(dir) => Some(dir),
        Found::NotCached(_) => None,
    })
}

/// The directory of what was found, downloaded if need be.
///
/// # Errors
/// As [`download`].
pub fn fetch(found: Found) -> Result<PathBuf> {
    match found {
        Found::Directory(dir) | Found::Cached(dir) => Ok(dir),
        Found::NotCached(id) => {
            info!(id, "downloading");
            download(&id)
        }
    }
}

/// Where received weights are kept: in the directory named, else in `mlx-pipe/shards` in the user's cache.
///
/// # Errors
/// None is named, and neither `XDG_CACHE_HOME` nor `HOME` is set.
pub fn cache_dir_or_default(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = named {
        return Ok(dir.to_owned());
    }
    let cache = user_cache::dir().context(
        "no directory to keep received weights in: neither XDG_CACHE_HOME nor HOME names one; give one with \
         --shard-cache",
    )?;
    Ok(cache.join("shards"))
}

/// Downloads a model's files into the cache and returns their directory. The configuration comes last, so
/// that a download that was cut off does not look whole.
///
/// # Errors
/// No network, no such model, no room.
pub fn download(id: &str) -> Result<PathBuf> {
    let failed = || {
        format!(
            "there is no directory {id} here, the model {id} is not in the Hugging Face cache of this host ({}), \
             and it could not be downloaded; give a directory with --model, or run where a network is",
            Cache::from_env().path().display()
        )
    };
    if std::env::var("HF_HUB_OFFLINE").is_ok_and(|value| value != "0" && !value.is_empty()) {
        bail!("{} (HF_HUB_OFFLINE is set)", failed());
    }
    // Its chain of causes tells the same several times over; the outermost tells it all.
    let told = |error: ApiError| anyhow!("{}: {error}", failed());
    let built = ApiBuilder::from_env().build().map_err(told)?;
    let repo = built.model(id.to_owned());
    let listed = repo.info().map_err(told)?;
    let mut files: Vec<&str> = listed
        .siblings
        .iter()
        .map(|sibling| sibling.rfilename.as_str())
        .filter(|file| is_needed(file))
        .collect();
    files.sort_by_key(|file| (*file == CONFIG, file.ends_with(".safetensors")));
    if files.last() != Some(&CONFIG) {
        bail!("the model {id} has no config.json: it is not a checkpoint of MLX's form");
    }
    let mut config = PathBuf::new();
    for file in files {
        config = repo.get(file).map_err(told)?;
    }
    config
        .parent()
        .map(Path::to_owned)
        .context("a cached file has no directory")
}

/// The directory of a cached model. Without its weights it counts as not there, and is downloaded again.
fn cached(id: &str) -> Result<Option<PathBuf>> {
    let Some(config) = Cache::from_env().model(id.to_owned()).get(CONFIG) else {
        return Ok(None);
    };
    let dir = config.parent().context("a cached file has no directory")?;
    match Checkpoint::open(dir) {
        Ok(_) => Ok(Some(dir.to_owned())),
        Err(
            CheckpointError::NoWeights { .. }
            | CheckpointError::ShardMissing { .. }
            | CheckpointError::IndexedFileMissing { .. },
        ) => Ok(None),
        Err(error) => {
            Err(error).with_context(|| format!("the model {id} in the cache of this host"))
        }
    }
}

/// `owner/name`, as the hub writes it.
fn is_id(model: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter))
    };
    match model.split_once('/') {
        Some((owner, name)) => part(owner) && part(name),
        None => false,
    }
}

/// Weights, configurations and templates; not pictures, originals or other formats.
fn is_needed(file: &str) -> bool {
    !file.contains('/')
        && [".safetensors", ".json", ".jinja"]
            .iter()
            .any(|ending| file.ends_with(ending))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for id in ["mlx-community/Qwen3-1.7B-8bit", "a/b"] {
            assert!(is_id(id), "{id}");
        }
        for path in ["models", "/models/x", "../x", "a/b/c", "a/", "./x", "a b/c"] {
            assert!(!is_id(path), "{path}");
        }
    }

    #[test]
    fn a_missing_directory_says_what_was_expected() {
        let error = find("/no/such/dir").unwrap_err().to_string();
        assert!(
            error.contains("/no/such/dir") && error.contains("checkpoint directory"),
            "{error}"
        );
    }
}
