//! A rank's slice in a file of its own, so that a later start reads this file and no other.
//!
//! It is a safetensors file. Every tensor begins at a multiple of 16 KiB, a page of Apple's machines, so that it
//! could be mapped; the format allows no holes, so the header ends in spaces and tensors of zeros fill
//! the gaps. The header is a function of the slice and the hashes of its tensors: a file that differs from what
//! this program would have written, by a single byte, is not used. The tensors themselves are proven
//! while they are read ([`super::Tensor::read`]).

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blake3::Hash;
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::file::WeightFile;
use super::{Checkpoint, CheckpointError, Headers, TensorInfo, hash_kind, hash_number, hash_text};

/// Every tensor begins at a multiple of it: the page of Apple's processors, and of all others a multiple.
pub(super) const ALIGNMENT_BYTES: u64 = 16 << 10;
/// Names of the tensors that fill gaps begin with this.
pub const PAD_PREFIX: &str = "__pad__.";
/// What the files are; change the number with anything in them.
const FORMAT: &str = "mlx-pipe shard 1";
/// Before the name of a tensor, in the metadata, where its hash is.
const HASH_PREFIX: &str = "blake3:";
/// Largest header of another slice's file that is looked into, to tell why it is not used.
const LARGEST_OTHER_HEADER: u64 = 16 << 20;

/// Why a slice's file is not used, or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// The file, or a tensor in it, cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The file has not the length of this slice's.
    #[error(
        "{}: expected {expected} bytes, found {found}; it was cut, or is another file",
        path.display()
    )]
    WrongLength {
        /// The file.
        path: PathBuf,
        /// Bytes that the slice takes.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },
    /// The file is whole, perhaps, but that of another slice.
    #[error("{}: belongs to another slice or another model", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The header is not as it was written.
    #[error("{}: its header is damaged", path.display())]
    DamagedHeader {
        /// The file.
        path: PathBuf,
    },
    /// The system refused to write.
    #[error("cannot {action} {}: {cause}", path.display())]
    Write {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        cause: io::Error,
    },
}

/// What a slice's file holds, and where; known without the file.
#[derive(Debug)]
pub struct Shard {
    /// Its name in the cache's directory.
    file_name: String,
    /// End of the name: which layers.
    label: String,
    /// Which tensors of which files, their dates included.
    key: [u8; 32],
    /// Which tensors of which model, whatever its files' dates.
    model: [u8; 32],
    tensors: Vec<ShardTensor>,
    /// Bytes before the first tensor.
    head_bytes: u64,
    file_bytes: u64,
}

/// A tensor of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Bytes in the file.
    pub bytes: u64,
    dtype: Dtype,
    shape: Vec<usize>,
    /// First byte, from the end of the header.
    offset: u64,
}

impl Shard {
    /// The slice of these tensors of a checkpoint, in this order. `config_hash` is that of the
    /// configuration; `label` says which layers, in the file's name.
    ///
    /// # Errors
    ///
    /// A tensor that the checkpoint does not have.
    pub fn new(
        checkpoint: &Checkpoint,
        names: &[&str],
        config_hash: &str,
        label: &str,
    ) -> Result<Self, CheckpointError> {
        let mut model = Sha256::new_with_prefix(FORMAT);
        hash_text(&mut model, config_hash);
        model.update(checkpoint.fingerprint());
        let mut tensors = Vec::new();
        let mut end = 0;
        for name in names {
            let (name, info) = checkpoint.find(name)?;
            hash_text(&mut model, name);
            hash_kind(&mut model, info);
            tensors.push(ShardTensor {
                name: name.to_owned(),
                bytes: info.bytes(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                offset: aligned(end),
            });
            end = aligned(end) + info.bytes();
        }
        let model: [u8; 32] = model.finalize().into();
        let key = key(&model, checkpoint);
        let mut shard = Self {
            file_name: format!("{}-{label}.safetensors", hex::encode(&key[..8])),
            label: label.to_owned(),
            key,
            model,
            tensors,
            head_bytes: 0,
            file_bytes: 0,
        };
        // Hashes as text are all of one length, so any will do to know the header's.
        let any = vec![Hash::from_bytes([0; 32]); shard.tensors.len()];
        shard.head_bytes = shard.head(&any).len() as u64;
        shard.file_bytes = shard.head_bytes + end;
        Ok(shard)
    }

    /// The file's name in the cache's directory.
    pub fn file_name(&self) -> &str {
        &self.file_name
    }

    /// The tensors in the order of the file.
    pub fn tensors(&self) -> &[ShardTensor] {
        &self.tensors
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Bytes of the tensors alone.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// Opens the slice's file in `dir`: a checkpoint of exactly these tensors, each of which is proven when it is
    /// read. `None` if there is no such file.
    ///
    /// # Errors
    ///
    /// A file of this name that is anything but this slice as it was written.
    pub fn open(&self, dir: &Path) -> Result<Option<Checkpoint>, ShardError> {
        let path = dir.join(&self.file_name);
        match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            _ => {}
        }
        let (file, open) = WeightFile::open(dir, self.file_name.clone())?;
        if file.bytes() != self.file_bytes {
            return Err(ShardError::WrongLength {
                path,
                expected: self.file_bytes,
                found: file.bytes(),
            });
        }
        let mut head = vec![0; self.head_bytes as usize];
        open.read_exact_at(&mut head, 0)
            .map_err(|cause| CheckpointError::Io {
                action: "read",
                path: path.clone(),
                cause,
            })?;
        let hashes = self.proven_hashes(&head, path)?;
        Ok(Some(self.checkpoint(dir, file, &hashes)))
    }

    /// The hashes of the tensors in a header that is, byte for byte, what [`Self::head`] makes of them.
    fn proven_hashes(&self, head: &[u8], path: PathBuf) -> Result<Vec<Hash>, ShardError> {
        let Some(metadata) = metadata(head.get(8..).unwrap_or_default()) else {
            return Err(ShardError::DamagedHeader { path });
        };
        let text = |name: &str| metadata.get(name).and_then(Value::as_str);
        if text("key").is_some_and(|key| key != hex::encode(self.key)) {
            return Err(ShardError::Foreign { path });
        }
        let hashes: Option<Vec<Hash>> = self
            .tensors
            .iter()
            .map(|tensor| Hash::from_hex(text(&format!("{HASH_PREFIX}{}", tensor.name))?).ok())
            .collect();
        match hashes {
            Some(hashes) if self.head(&hashes) == head => Ok(hashes),
            _ => Err(ShardError::DamagedHeader { path }),
        }
    }

    fn checkpoint(&self, dir: &Path, file: WeightFile, hashes: &[Hash]) -> Checkpoint {
        let infos = self.tensors.iter().zip(hashes).map(|(tensor, &hash)| {
            let begin = self.begin(tensor);
            let info = TensorInfo {
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                file: 0,
                begin,
                end: begin + tensor.bytes,
                digest: Some(hash),
            };
            (tensor.name.clone(), info)
        });
        Checkpoint(Headers {
            dir: dir.to_owned(),
            files: vec![file],
            tensors: infos.collect::<BTreeMap<_, _>>(),
        })
    }

    /// First byte of a tensor, from the file's start.
    pub(super) fn begin(&self, tensor: &ShardTensor) -> u64 {
        self.head_bytes + tensor.offset
    }

    /// The file up to its first tensor, for tensors with these hashes.
    pub(super) fn head(&self, hashes: &[Hash]) -> Vec<u8> {
        let mut entries = Map::new();
        entries.insert("__metadata__".into(), self.metadata(hashes).into());
        let mut end = 0;
        for (number, tensor) in self.tensors.iter().enumerate() {
            if tensor.offset > end {
                let shape = [tensor.offset - end];
                let pad = entry(Dtype::U8, json!(shape), end, tensor.offset);
                entries.insert(format!("{PAD_PREFIX}{number}"), pad);
            }
            end = tensor.offset + tensor.bytes;
            let shape = json!(tensor.shape);
            let tensor_entry = entry(tensor.dtype, shape, tensor.offset, end);
            entries.insert(tensor.name.clone(), tensor_entry);
        }
        let mut json = Value::Object(entries).to_string().into_bytes();
        let head_bytes = aligned(8 + json.len() as u64) as usize;
        json.resize(head_bytes - 8, b' ');
        let mut head = (json.len() as u64).to_le_bytes().to_vec();
        head.extend(json);
        head
    }

    fn metadata(&self, hashes: &[Hash]) -> Map<String, Value> {
        let mut all = blake3::Hasher::new();
        all.update(&self.key);
        let mut metadata = Map::new();
        metadata.insert("format".into(), FORMAT.into());
        metadata.insert("key".into(), hex::encode(self.key).into());
        metadata.insert("model".into(), hex::encode(self.model).into());
        for (tensor, hash) in self.tensors.iter().zip(hashes) {
            all.update(hash.as_bytes());
            let name = format!("{HASH_PREFIX}{}", tensor.name);
            metadata.insert(name, hash.to_hex().as_str().into());
        }
        let all = all.finalize().to_hex();
        metadata.insert("hashes".into(), all.as_str().into());
        metadata
    }

    /// The name of a file in `dir` with this slice of the same model, made when its weight files were others or
    /// had another date.
    pub fn stale(&self, dir: &Path) -> Option<String> {
        let ending = format!("-{}.safetensors", self.label);
        let model = hex::encode(self.model);
        let names = std::fs::read_dir(dir).ok()?.filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            (name.ends_with(&ending) && name != self.file_name).then_some(name)
        });
        names.into_iter().find(|name| {
            other_metadata(dir, name).is_some_and(|metadata| {
                metadata.get("model").and_then(Value::as_str) == Some(&model)
            })
        })
    }
}

/// Which tensors, of files with these names, lengths and dates.
fn key(model: &[u8; 32], checkpoint: &Checkpoint) -> [u8; 32] {
    let mut key = Sha256::new_with_prefix(model);
    for file in &checkpoint.files {
        hash_text(&mut key, &file.name);
        hash_number(&mut key, file.bytes());
        let (seconds, nanoseconds) = file.modified();
        key.update(seconds.to_le_bytes());
        key.update(nanoseconds.to_le_bytes());
    }
    key.finalize().into()
}

fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT_BYTES)
}

fn entry(dtype: Dtype, shape: Value, begin: u64, end: u64) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})
}

/// The `__metadata__` of a header's JSON.
fn metadata(json: &[u8]) -> Option<Map<String, Value>> {
    let Ok(Value::Object(mut header)) = serde_json::from_slice(json) else {
        return None;
    };
    match header.remove("__metadata__") {
        Some(Value::Object(metadata)) => Some(metadata),
        _ => None,
    }
}

/// The same of a file that may hold anything.
fn other_metadata(dir: &Path, name: &str) -> Option<Map<String, Value>> {
    let (file, open) = WeightFile::open(dir, name.to_owned()).ok()?;
    let mut length = [0; 8];
    open.read_exact_at(&mut length, 0).ok()?;
    let length = u64::from_le_bytes(length);
    if length > LARGEST_OTHER_HEADER.min(file.bytes()) {
        return None;
    }
    let mut json = vec![0; length as usize];
    open.read_exact_at(&mut json, 8).ok()?;
    metadata(&json)
}
