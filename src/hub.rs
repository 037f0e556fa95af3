//! From `--model` to a directory on this host: a path, or an id in the local Hugging Face cache, or,
//! where a network is there, a download into that cache.

use crate::checkpoint::Checkpoint;
use anyhow::{Result, anyhow, bail};
use hf_hub::Cache;
use hf_hub::api::sync::{ApiBuilder, ApiError};
use std::path::{Path, PathBuf};

/// Where a model was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A checkpoint directory on this host.
    Here(PathBuf),
    /// An id that the cache of this host does not hold whole.
    NotCached(String),
}

/// Looks for a model on this host, without a network.
///
/// # Errors
/// Neither a directory nor an id of the form `owner/name`.
pub fn find(model: &str) -> Result<Found> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(Found::Here(path.to_owned()));
    }
    if path.exists() {
        bail!(
            "--model {model} is a file; expected a checkpoint directory (a GGUF file is converted by \
             `mlx-pipe import {model} OUT_DIR`)"
        );
    }
    if !is_id(model) {
        bail!(
            "no directory {model} on this host; --model expects a checkpoint directory, or an id such as \
             mlx-community/Qwen3-1.7B-8bit"
        );
    }
    Ok(match cached(model) {
        Some(dir) => Found::Here(dir),
        None => Found::NotCached(model.to_owned()),
    })
}

/// Downloads a model's files into the cache and returns their directory.
///
/// # Errors
/// No network, no such model, no room.
pub fn download(id: &str) -> Result<PathBuf> {
    let failed = || {
        format!(
            "the model {id} is not in the Hugging Face cache of this host ({}) and could not be downloaded; \
             give a directory with --model, or run where a network is",
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
    let mut config = None;
    for file in listed.siblings.iter().map(|sibling| &sibling.rfilename) {
        if is_needed(file) {
            let path = repo.get(file).map_err(told)?;
            if file == "config.json" {
                config = Some(path);
            }
        }
    }
    match config.as_deref().and_then(Path::parent) {
        Some(dir) => Ok(dir.to_owned()),
        None => bail!("the model {id} has no config.json: it is not a checkpoint of MLX's form"),
    }
}

/// The directory of a cached model, if all its weights are there.
fn cached(id: &str) -> Option<PathBuf> {
    let config = Cache::from_env().model(id.to_owned()).get("config.json")?;
    let dir = config.parent()?.to_owned();
    Checkpoint::open(&dir).is_ok().then_some(dir)
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
