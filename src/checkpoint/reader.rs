//! Takes tensors out of a checkpoint and keeps account of what was taken.
//!
//! Bytes are read to where they are wanted and are nowhere else in this process. Mapping the file was tried and
//! costs more than it saves: MLX copies out of it, so a large tensor would be there twice; the kernel has to
//! make page tables for it; and a file cut meanwhile ends the process by SIGBUS where here it is an error.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::error::{CheckpointError, NameSample};
use super::{Checkpoint, TensorInfo};

/// Bytes that are read and hashed at a time: few enough for a processor's cache.
const PIECE_BYTES: usize = 256 << 10;

/// Takes tensors out of a [`Checkpoint`] and remembers which.
#[derive(Debug)]
pub struct Reader<'c> {
    checkpoint: &'c Checkpoint,
    /// Bytes of each tensor taken, by its name.
    taken: BTreeMap<&'c str, u64>,
}

/// A tensor's place in its file, proven and open.
#[derive(Debug)]
pub struct Tensor {
    name: String,
    info: TensorInfo,
    path: PathBuf,
    file: File,
}

/// What a [`Reader`] took in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Consumed {
    /// Tensors taken.
    pub tensors: usize,
    /// Their bytes in the files.
    pub bytes: u64,
}

impl<'c> Reader<'c> {
    pub(super) fn new(checkpoint: &'c Checkpoint) -> Reader<'c> {
        Reader {
            checkpoint,
            taken: BTreeMap::new(),
        }
    }

    /// Opens the tensor `name`, which must have exactly this `shape` and one of these `dtypes`, and counts
    /// it as taken.
    ///
    /// # Errors
    ///
    /// No such tensor, another shape or dtype, a tensor taken before, or a file that has changed.
    pub fn take(
        &mut self,
        name: &str,
        shape: &[usize],
        dtypes: &[Dtype],
    ) -> Result<Tensor, CheckpointError> {
        let (name, info) = self.checkpoint.find(name)?;
        check_kind(self.checkpoint.path_of(info), name, info, shape, dtypes)?;
        if self.taken.contains_key(name) {
            return Err(CheckpointError::TakenTwice {
                tensor: name.to_owned(),
            });
        }
        let tensor = self.checkpoint.open_tensor(name)?;
        self.taken.insert(name, info.bytes());
        Ok(tensor)
    }

    /// Ends the reading and proves that the tensors taken are the tensors `planned`, each once.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::NotAsPlanned`] with the first few names of both differences, or
    /// [`CheckpointError::PlannedTwice`].
    pub fn finish<'p>(
        self,
        planned: impl IntoIterator<Item = &'p str>,
    ) -> Result<Consumed, CheckpointError> {
        let mut left = self.taken;
        let consumed = Consumed {
            tensors: left.len(),
            bytes: left
                .values()
                .fold(0, |sum, &bytes| sum.saturating_add(bytes)),
        };
        let planned = unique(planned)?;
        let not_taken = NameSample::of(
            planned
                .iter()
                .copied()
                .filter(|name| left.remove(name).is_none()),
        );
        let not_planned = NameSample::of(left.into_keys());
        if not_taken.count > 0 || not_planned.count > 0 {
            return Err(CheckpointError::NotAsPlanned {
                not_taken,
                not_planned,
            });
        }
        Ok(consumed)
    }
}

impl Checkpoint {
    /// Opens a tensor to read its bytes, without counting it.
    ///
    /// # Errors
    ///
    /// No such tensor, or a file that has changed since its header was read, or cannot be opened.
    pub fn open_tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let (name, info) = self.find(name)?;
        Ok(Tensor {
            name: name.to_owned(),
            info: info.clone(),
            path: self.path_of(info).to_owned(),
            file: self.reopen(info)?,
        })
    }
}

impl Tensor {
    /// The dtype.
    pub fn dtype(&self) -> Dtype {
        self.info.dtype
    }

    /// The shape.
    pub fn shape(&self) -> &[usize] {
        &self.info.shape
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.info.bytes()
    }

    /// Reads the bytes that begin `offset` bytes into the tensor, as many as `destination` has. The
    /// elements lie in row-major order, little endian.
    ///
    /// # Errors
    ///
    /// A file that was cut, or a disk that fails.
    pub fn read_at(&self, offset: u64, destination: &mut [u8]) -> Result<(), CheckpointError> {
        let end = offset.checked_add(destination.len() as u64);
        assert!(
            end.is_some_and(|end| end <= self.bytes()),
            "a read beyond the tensor's end"
        );
        self.file
            .read_exact_at(destination, self.info.begin + offset)
            .map_err(|cause| self.unreadable(cause))
    }

    /// Reads all bytes of the tensor and, where a hash of them was kept, proves them: a piece at a time, while
    /// the processor's cache still holds it.
    ///
    /// # Errors
    ///
    /// As [`Self::read_at`]; [`CheckpointError::Damaged`].
    pub fn read(&self, destination: &mut [u8]) -> Result<(), CheckpointError> {
        if self.info.digest.is_none() {
            return self.read_at(0, destination);
        }
        let mut hasher = blake3::Hasher::new();
        let mut offset = 0;
        for piece in destination.chunks_mut(PIECE_BYTES) {
            self.read_at(offset, piece)?;
            hasher.update(piece);
            offset += piece.len() as u64;
        }
        self.prove(&hasher)
    }

    /// Reads the tensor in pieces of `piece_bytes`, the last one of what is left, and hands each to `with`. Where a
    /// hash was kept, the bytes are proven once all of them were handed over.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub fn read_in_pieces(
        &self,
        piece_bytes: usize,
        mut with: impl FnMut(&[u8]),
    ) -> Result<(), CheckpointError> {
        let mut piece = vec![0; piece_bytes.min(self.bytes() as usize)];
        let mut hasher = blake3::Hasher::new();
        let mut offset = 0;
        while offset < self.bytes() {
            let left = usize::try_from(self.bytes() - offset).unwrap_or(usize::MAX);
            let count = piece.len().min(left);
            let piece = &mut piece[..count];
            self.read_at(offset, piece)?;
            if self.info.digest.is_some() {
                hasher.update(piece);
            }
            with(piece);
            offset += piece.len() as u64;
        }
        self.prove(&hasher)
    }

    /// Whether what was hashed is what a hash was kept of.
    fn prove(&self, hasher: &blake3::Hasher) -> Result<(), CheckpointError> {
        let found = hasher.finalize();
        match self.info.digest {
            Some(expected) if expected != found => Err(CheckpointError::Damaged {
                path: self.path.clone(),
                tensor: self.name.clone(),
                expected,
                found,
            }),
            _ => Ok(()),
        }
    }

    fn unreadable(&self, cause: io::Error) -> CheckpointError {
        CheckpointError::Unreadable {
            path: self.path.clone(),
            tensor: self.name.clone(),
            cause,
        }
    }
}

fn check_kind(
    path: &Path,
    name: &str,
    info: &TensorInfo,
    shape: &[usize],
    dtypes: &[Dtype],
) -> Result<(), CheckpointError> {
    if info.shape != shape {
        return Err(CheckpointError::WrongShape {
            path: path.to_owned(),
            tensor: name.to_owned(),
            expected: shape.to_vec(),
            found: info.shape.clone(),
        });
    }
    if !dtypes.contains(&info.dtype) {
        return Err(CheckpointError::WrongDtype {
            path: path.to_owned(),
            tensor: name.to_owned(),
            expected: dtypes.to_vec(),
            found: info.dtype,
        });
    }
    Ok(())
}

/// The names as a set.
fn unique<'p>(
    names: impl IntoIterator<Item = &'p str>,
) -> Result<BTreeSet<&'p str>, CheckpointError> {
    let mut set = BTreeSet::new();
    for name in names {
        if !set.insert(name) {
            return Err(CheckpointError::PlannedTwice {
                tensor: name.to_owned(),
            });
        }
    }
    Ok(set)
}
