//! Which files of a directory are the checkpoint's, and whether they hold what its index says.
//!
//! The headers are the truth about tensors. The index, `{"weight_map": {tensor: file}}`, only says
//! which files there are and what should be in them, so it is checked against the headers both
//! ways: a difference means that two versions of a checkpoint were mixed, and half of the ranks
//! might have the other half. `metadata.total_size` is not looked at then, since converters disagree
//! on what it counts. Where there are no weight files at all it is all that is known of their bytes,
//! and [`Listed`] tells it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::TensorInfo;
use super::error::CheckpointError;
use super::file::WeightFile;

/// Longest index that is read. The longest published are a few megabytes.
pub const MAX_INDEX_BYTES: u64 = 100_000_000;

const INDEX_NAME: &str = "model.safetensors.index.json";
const SINGLE_NAME: &str = "model.safetensors";

/// The weight files of a directory, and its index if it has one.
pub(super) struct Listing {
    /// Names of the weight files, sorted.
    pub(super) files: Vec<String>,
    index: Option<Index>,
}

impl Listing {
    /// Finds the weights in `dir`: the files that `model.safetensors.index.json` names, else
    /// `model-*.safetensors`, else `model.safetensors`, else `weights.*.safetensors` (the names
    /// of MLX's first examples).
    pub(super) fn find(dir: &Path) -> Result<Listing, CheckpointError> {
        let names = safetensors_names(dir)?;
        let index = Index::read(dir)?;
        let files = match &index {
            Some(index) => index.file_names(&names)?,
            None => pick_files(dir, &names)?,
        };
        let other = files.iter().find(|file| *file != SINGLE_NAME);
        match other {
            Some(other) if names.contains(SINGLE_NAME) => Err(CheckpointError::Ambiguous {
                path: dir.to_owned(),
                other: other.clone(),
            }),
            _ => Ok(Listing { files, index }),
        }
    }

    /// Checks the index, if there is one, against the tensors that the headers list.
    pub(super) fn check(
        &self,
        tensors: &BTreeMap<String, TensorInfo>,
        files: &[WeightFile],
    ) -> Result<(), CheckpointError> {
        let Some(index) = &self.index else {
            return Ok(());
        };
        index.check_listed_tensors(tensors, files)?;
        index.check_no_other_tensors(tensors, files)
    }
}

/// Names in `dir` that end in `.safetensors`.
fn safetensors_names(dir: &Path) -> Result<BTreeSet<String>, CheckpointError> {
    let failed = |cause| CheckpointError::Io {
        action: "read directory",
        path: dir.to_owned(),
        cause,
    };
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if let Some(name) = name.to_str().filter(|name| name.ends_with(".safetensors")) {
            names.insert(name.to_owned());
        }
    }
    Ok(names)
}

/// The weights of a directory without index.
fn pick_files(dir: &Path, names: &BTreeSet<String>) -> Result<Vec<String>, CheckpointError> {
    let starting_with = |prefix: &str| -> Vec<String> {
        names
            .iter()
            .filter(|name| name.starts_with(prefix))
            .cloned()
            .collect()
    };
    let shards = starting_with("model-");
    if !shards.is_empty() {
        check_shards_complete(dir, &shards)?;
        return Ok(shards);
    }
    if names.contains(SINGLE_NAME) {
        return Ok(vec![SINGLE_NAME.to_owned()]);
    }
    let old_names = starting_with("weights.");
    if old_names.is_empty() {
        return Err(CheckpointError::NoWeights {
            path: dir.to_owned(),
        });
    }
    Ok(old_names)
}

/// Where the names are `model-00001-of-00003.safetensors`, all shards up to the count must be
/// there.
fn check_shards_complete(dir: &Path, shards: &[String]) -> Result<(), CheckpointError> {
    let Some((digits, shard_count)) = shards.iter().find_map(|name| shard_numbering(name)) else {
        return Ok(());
    };
    let expected = (1..=shard_count)
        .map(|shard| format!("model-{shard:0digits$}-of-{shard_count:0digits$}.safetensors"));
    for expected in expected {
        if !shards.contains(&expected) {
            return Err(CheckpointError::ShardMissing {
                path: dir.join(expected),
                shard_count,
            });
        }
    }
    Ok(())
}

/// Digits and shard count of `model-00001-of-00003.safetensors`: 5 and 3.
fn shard_numbering(name: &str) -> Option<(usize, usize)> {
    let numbers = name.strip_prefix("model-")?.strip_suffix(".safetensors")?;
    let (shard, count) = numbers.split_once("-of-")?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if shard.len() != count.len() || !is_number(shard) || !is_number(count) {
        return None;
    }
    Some((count.len(), count.parse().ok()?))
}

/// `model.safetensors.index.json`.
struct Index {
    path: PathBuf,
    weight_map: BTreeMap<String, String>,
    metadata: serde_json::Value,
}

/// The index as the JSON has it.
#[derive(Deserialize)]
struct IndexJson {
    weight_map: BTreeMap<String, String>,
    /// Read only where the weight files are not there; anything may stand here otherwise.
    #[serde(default)]
    metadata: serde_json::Value,
}

/// The tensors of a checkpoint of which only the index is there.
#[derive(Debug)]
pub struct Listed {
    /// The index.
    pub path: PathBuf,
    /// Names of all tensors.
    pub tensors: BTreeSet<String>,
    /// `metadata.total_size`: bytes of all tensors, if it is a whole number.
    pub total_bytes: Option<u64>,
}

impl Listed {
    /// Reads the index of `dir`; `None` if it has none, or if any weight file is there.
    ///
    /// # Errors
    ///
    /// A directory or an index that cannot be read, or an index that is none.
    pub fn read(dir: &Path) -> Result<Option<Listed>, CheckpointError> {
        let Some(index) = Index::read(dir)? else {
            return Ok(None);
        };
        let present = safetensors_names(dir)?;
        if !present.is_empty() {
            return Ok(None);
        }
        Ok(Some(Listed {
            path: index.path,
            total_bytes: index.metadata["total_size"].as_u64(),
            tensors: index.weight_map.into_keys().collect(),
        }))
    }
}

impl Index {
    /// Reads the index of `dir`; `None` if it has none.
    fn read(dir: &Path) -> Result<Option<Index>, CheckpointError> {
        let path = dir.join(INDEX_NAME);
        if !path
            .try_exists()
            .map_err(|cause| read_failed(&path, cause))?
        {
            return Ok(None);
        }
        let json = read_bounded(&path)?;
        let index: IndexJson =
            serde_json::from_slice(&json).map_err(|cause| CheckpointError::IndexNotJson {
                path: path.clone(),
                cause: cause.to_string(),
            })?;
        if index.weight_map.is_empty() {
            return Err(CheckpointError::IndexNotJson {
                path,
                cause: "its weight_map is empty".to_owned(),
            });
        }
        Ok(Some(Index {
            path,
            weight_map: index.weight_map,
            metadata: index.metadata,
        }))
    }

    /// The files named, sorted, each a plain name and present among `names`.
    fn file_names(&self, names: &BTreeSet<String>) -> Result<Vec<String>, CheckpointError> {
        let mut files = BTreeSet::new();
        for (tensor, file) in &self.weight_map {
            if !is_plain_name(file) {
                let (path, tensor, found) = (self.path.clone(), tensor.clone(), file.clone());
                return Err(CheckpointError::IndexUnsafeName {
                    path,
                    tensor,
                    found,
                });
            }
            if !names.contains(file) {
                return Err(CheckpointError::IndexedFileMissing {
                    path: self.path.clone(),
                    file: file.clone(),
                });
            }
            files.insert(file.clone());
        }
        Ok(files.into_iter().collect())
    }

    fn check_listed_tensors(
        &self,
        tensors: &BTreeMap<String, TensorInfo>,
        files: &[WeightFile],
    ) -> Result<(), CheckpointError> {
        for (tensor, file) in &self.weight_map {
            let holder = tensors.get(tensor).and_then(|info| files.get(info.file));
            if holder.is_none_or(|holder| holder.name != *file) {
                let (path, tensor, file) = (self.path.clone(), tensor.clone(), file.clone());
                return Err(CheckpointError::IndexedTensorMissing { path, tensor, file });
            }
        }
        Ok(())
    }

    fn check_no_other_tensors(
        &self,
        tensors: &BTreeMap<String, TensorInfo>,
        files: &[WeightFile],
    ) -> Result<(), CheckpointError> {
        let Some((tensor, info)) = tensors
            .iter()
            .find(|(tensor, _)| !self.weight_map.contains_key(*tensor))
        else {
            return Ok(());
        };
        let file = files
            .get(info.file)
            .map(|file| file.name.clone())
            .unwrap_or_default();
        Err(CheckpointError::TensorNotIndexed {
            path: self.path.clone(),
            tensor: tensor.clone(),
            file,
        })
    }
}

/// Reads a file of at most [`MAX_INDEX_BYTES`].
fn read_bounded(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let file = File::open(path).map_err(|cause| read_failed(path, cause))?;
    let mut json = Vec::new();
    file.take(MAX_INDEX_BYTES + 1)
        .read_to_end(&mut json)
        .map_err(|cause| read_failed(path, cause))?;
    let found = json.len() as u64;
    if found > MAX_INDEX_BYTES {
        return Err(CheckpointError::IndexTooLarge {
            path: path.to_owned(),
            found,
        });
    }
    Ok(json)
}

fn read_failed(path: &Path, cause: std::io::Error) -> CheckpointError {
    CheckpointError::Io {
        action: "read",
        path: path.to_owned(),
        cause,
    }
}

/// Whether an index may name this file: it lies beside the index and is no way out of the
/// directory.
fn is_plain_name(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains(['/', '\\', '\0'])
}
