//! A checkpoint directory as a set of named tensors: found, proven and read, without knowing what a
//! tensor is for.
//!
//! ```text
//! Checkpoint::open   index.rs   which files                  reads names and the index
//!                    header.rs  which tensors are in each    reads headers, no tensor
//! Headers::open                 the same for a plan, where the tensors may have been left out
//! Listed::read                  the same where there are no weight files, only their index
//! Reader::take       reader.rs  one tensor, opened           reads it when told to
//! Reader::finish                taken = planned, or an error
//! HeaderTexts        header_texts.rs   a checkpoint told to a rank that has none of its files
//! Shard, ShardWriter shard.rs, shard_writer.rs   a rank's slice in a file of its own
//! ```
//!
//! Everything in a checkpoint is untrusted. [`Checkpoint::open`] checks it once; a [`TensorInfo`]
//! can only come from there and so is proof of a range inside its file that fits its dtype and
//! shape. This module knows bytes, not arrays: it names neither MLX nor MPI.
//!
//! A file must not be written to while a run loads it: any change that can be seen is an error.

mod error;
mod file;
mod header;
mod header_texts;
mod index;
mod lock;
mod reader;
mod shard;
mod shard_writer;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use sha2::{Digest, Sha256};

pub use error::{CheckpointError, NameSample};
pub use header::{Header, MAX_HEADER_BYTES};
pub use header_texts::HeaderTexts;
pub use index::{Listed, MAX_INDEX_BYTES};
pub use reader::{Consumed, Reader, Tensor};
pub use shard::{PAD_PREFIX, Shard, ShardError, ShardTensor};
pub use shard_writer::ShardWriter;

use file::WeightFile;
use header::Data;
use index::Listing;

/// First bytes of what [`Checkpoint::fingerprint`] hashes; change the number with the encoding.
const FINGERPRINT_DOMAIN: &[u8] = b"mlx-pipe checkpoint 1\0";

/// The tensors of a checkpoint directory, known by their headers and all there to be read.
#[derive(Debug)]
pub struct Checkpoint(Headers);

/// The tensors of a checkpoint directory as its headers describe them, whether or not the tensors
/// themselves are there. Nothing can be read by it: a plan counts bytes and needs no more.
#[derive(Debug)]
pub struct Headers {
    dir: PathBuf,
    /// Sorted by name.
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// What a header says about a tensor, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Length of each dimension, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Place in [`Checkpoint::files`].
    file: usize,
    /// First byte and the one after the last, from the file's start; `begin <= end <= ` the file's
    /// length, in a [`Checkpoint`].
    begin: u64,
    end: u64,
    /// Hash of the bytes, where one was kept.
    digest: Option<blake3::Hash>,
}

impl TensorInfo {
    /// Bytes of the tensor in its file.
    pub fn bytes(&self) -> u64 {
        self.end - self.begin
    }
}

impl Checkpoint {
    /// Finds the weight files in `dir`, reads their headers and checks them; no byte of a tensor is
    /// read.
    ///
    /// The weights are, in this order: the files named by `model.safetensors.index.json`;
    /// `model-*.safetensors`; `model.safetensors`; `weights.*.safetensors`. A `model.safetensors`
    /// beside shards is an error, for one of the two is a leftover. Symbolic links are followed, as
    /// a Hugging Face cache needs.
    ///
    /// # Errors
    ///
    /// No weights, a file missing, a header that breaks a rule of the format, a tensor in two
    /// files, or an index that says something else than the headers.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        Headers::read(dir, Data::Whole).map(Checkpoint)
    }

    /// Starts taking tensors out.
    pub fn reader(&self) -> Reader<'_> {
        Reader::new(self)
    }

    fn reopen(&self, info: &TensorInfo) -> Result<File, CheckpointError> {
        self.file_of(info).reopen()
    }
}

impl Deref for Checkpoint {
    type Target = Headers;

    fn deref(&self) -> &Headers {
        &self.0
    }
}

impl Headers {
    /// As [`Checkpoint::open`], for weight files that are whole or end with their header.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn open(dir: &Path) -> Result<Headers, CheckpointError> {
        Self::read(dir, Data::MayBeLeftOut)
    }

    fn read(dir: &Path, data: Data) -> Result<Headers, CheckpointError> {
        let listing = Listing::find(dir)?;
        let mut headers = Headers {
            dir: dir.to_owned(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for name in &listing.files {
            headers.add_file(name, data)?;
        }
        listing.check(&headers.tensors, &headers.files)?;
        Ok(headers)
    }

    /// The tensor `name`, if the checkpoint has it.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// All tensors, sorted by name (by bytes, so `layers.10` comes before `layers.2`).
    pub fn iter(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors
            .iter()
            .map(|(name, info)| (name.as_str(), info))
    }

    /// The weight file that holds the tensor `name`, for messages; `None` if the checkpoint lacks it.
    pub fn file_holding(&self, name: &str) -> Option<&Path> {
        self.get(name).map(|info| self.path_of(info))
    }

    /// SHA-256 of every tensor's name, dtype, shape, file name and place, and of every file's
    /// length.
    ///
    /// Ranks compare it before they read weights. It is the same on every machine that has the same
    /// files, whatever their directory and dates. It says nothing about the weights themselves: two
    /// trainings of one model have one fingerprint.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new_with_prefix(FINGERPRINT_DOMAIN);
        hash_number(&mut hash, self.files.len() as u64);
        for file in &self.files {
            hash_text(&mut hash, &file.name);
            hash_number(&mut hash, file.bytes());
        }
        hash_number(&mut hash, self.tensors.len() as u64);
        for (name, info) in &self.tensors {
            hash_text(&mut hash, name);
            hash_tensor(&mut hash, info);
        }
        hash.finalize().into()
    }

    /// Whether its files are on another host, so that no tensor of it can be read here.
    pub fn is_elsewhere(&self) -> bool {
        self.files.iter().any(WeightFile::is_elsewhere)
    }

    /// Reads the header of one more file and adds its tensors.
    fn add_file(&mut self, name: &str, data: Data) -> Result<(), CheckpointError> {
        let (file, open) = WeightFile::open(&self.dir, name.to_owned())?;
        let header = Header::read_before(data, open, file.bytes(), &file.path)?;
        self.add(file, &header)
    }

    /// Adds a file and the tensors of its header.
    fn add(&mut self, file: WeightFile, header: &Header) -> Result<(), CheckpointError> {
        let place = self.files.len();
        self.files.push(file);
        for (tensor, info) in header.tensors() {
            let info = TensorInfo {
                dtype: info.dtype,
                shape: info.shape.clone(),
                file: place,
                begin: header.data_start() + info.data_offsets.0 as u64,
                end: header.data_start() + info.data_offsets.1 as u64,
                digest: None,
            };
            if let Some(known) = self.tensors.get(&tensor) {
                let [first, second] = [known, &info].map(|info| self.path_of(info).to_owned());
                return Err(CheckpointError::TensorInTwoFiles {
                    tensor,
                    first,
                    second,
                });
            }
            self.tensors.insert(tensor, info);
        }
        Ok(())
    }

    /// A tensor that must be there, with its name as the checkpoint keeps it.
    fn find(&self, name: &str) -> Result<(&str, &TensorInfo), CheckpointError> {
        match self.tensors.get_key_value(name) {
            Some((name, info)) => Ok((name, info)),
            None => Err(CheckpointError::NoSuchTensor {
                path: self.dir.clone(),
                tensor: name.to_owned(),
                tensor_count: self.tensors.len(),
            }),
        }
    }

    /// The file that holds a tensor of this checkpoint. Indexing holds: only `add_file` makes a
    /// `TensorInfo`.
    fn file_of(&self, info: &TensorInfo) -> &WeightFile {
        &self.files[info.file]
    }

    fn path_of(&self, info: &TensorInfo) -> &Path {
        &self.file_of(info).path
    }
}

/// Numbers are hashed as eight bytes, little endian.
fn hash_number(hash: &mut Sha256, number: u64) {
    hash.update(number.to_le_bytes());
}

/// Texts are hashed with their length before them, so that no two lists of texts read the same.
fn hash_text(hash: &mut Sha256, text: &str) {
    hash_number(hash, text.len() as u64);
    hash.update(text);
}

fn hash_tensor(hash: &mut Sha256, info: &TensorInfo) {
    hash_kind(hash, info);
    for number in [info.file as u64, info.begin, info.end] {
        hash_number(hash, number);
    }
}

fn hash_kind(hash: &mut Sha256, info: &TensorInfo) {
    hash_text(hash, &info.dtype.to_string());
    hash_number(hash, info.shape.len() as u64);
    for &dimension in &info.shape {
        hash_number(hash, dimension as u64);
    }
}
