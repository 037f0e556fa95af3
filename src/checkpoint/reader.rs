//! Takes tensors out of a checkpoint, one mapped at a time, and keeps account of what was taken.
//!
//! Each tensor gets a mapping of its own range, and dropping it unmaps it. Mapping whole files
//! would be less work, but then the kernel maps pages around each fault, a neighbour's too, and
//! giving pages back is a mere hint outside Linux. With a mapping that ends where the tensor ends
//! (to the page), no other rank's tensor is ever resident, and `munmap` is no hint. The kernel's
//! read-ahead may bring the start of a neighbour into its page cache; that is not this process's
//! memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::{Advice, Mmap, MmapOptions};
use safetensors::Dtype;

use super::error::{CheckpointError, NameSample};
use super::{Checkpoint, TensorInfo};

/// Takes tensors out of a [`Checkpoint`] and remembers which.
#[derive(Debug)]
pub struct Reader<'c> {
    checkpoint: &'c Checkpoint,
    /// Bytes of each tensor taken, by its name.
    taken: BTreeMap<&'c str, u64>,
}

/// A tensor's bytes, mapped from its file until this is dropped.
///
/// It borrows the [`Reader`], so one tensor is mapped at a time: copy the bytes and drop it before
/// taking the next.
#[derive(Debug)]
pub struct Tensor<'r> {
    dtype: Dtype,
    shape: &'r [usize],
    /// `None` for a tensor without elements: there is nothing to map.
    mapping: Option<Mmap>,
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

    /// Maps the tensor `name`, which must have exactly this `shape` and one of these `dtypes`, and
    /// counts it as taken.
    ///
    /// # Errors
    ///
    /// No such tensor, another shape or dtype, a tensor taken before, or a file that has changed,
    /// shrunk or cannot be read.
    pub fn take(
        &mut self,
        name: &str,
        shape: &[usize],
        dtypes: &[Dtype],
    ) -> Result<Tensor<'_>, CheckpointError> {
        let checkpoint = self.checkpoint;
        let (name, info) = checkpoint.find(name)?;
        let path = checkpoint.path_of(info);
        check_kind(path, name, info, shape, dtypes)?;
        if self.taken.contains_key(name) {
            return Err(CheckpointError::TakenTwice {
                tensor: name.to_owned(),
            });
        }
        let mapping = match info.bytes() {
            0 => None,
            _ => Some(map(&checkpoint.reopen(info)?, path, name, info)?),
        };
        self.taken.insert(name, info.bytes());
        Ok(Tensor {
            dtype: info.dtype,
            shape: &info.shape,
            mapping,
        })
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

impl Tensor<'_> {
    /// The dtype, one of those asked for.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The shape, the one asked for.
    pub fn shape(&self) -> &[usize] {
        self.shape
    }

    /// The elements in row-major order, little endian.
    ///
    /// They may lie at any address: the format asks for no alignment.
    pub fn bytes(&self) -> &[u8] {
        self.mapping.as_deref().unwrap_or_default()
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

/// Maps the bytes of one tensor and brings them into memory.
pub(super) fn map(
    file: &File,
    path: &Path,
    name: &str,
    info: &TensorInfo,
) -> Result<Mmap, CheckpointError> {
    let failed = |cause| CheckpointError::Io {
        action: "map",
        path: path.to_owned(),
        cause,
    };
    let too_long = |_| failed(io::ErrorKind::FileTooLarge.into());
    let bytes = usize::try_from(info.bytes()).map_err(too_long)?;
    // SAFETY: a mapping is sound as long as nobody changes the file beneath it. That is the user's
    // part, said in the module's docs; ours is that it lives no longer than a copy takes, that the
    // caller has just checked that the file is the one whose header was read, and that nothing here
    // writes to it. A file cut short in that time would end the process by SIGBUS; `fetch` turns
    // what can be caught of it into an error.
    let mapping =
        unsafe { MmapOptions::new().offset(info.begin).len(bytes).map(file) }.map_err(failed)?;
    let unreadable = |_| CheckpointError::Unreadable {
        path: path.to_owned(),
        tensor: name.to_owned(),
    };
    fetch(&mapping).map_err(unreadable)?;
    Ok(mapping)
}

/// Brings all pages into memory with long reads; an error means that touching one of them would end
/// in SIGBUS.
///
/// Advice that a kernel does not know (Linux before 5.14) is no error: the pages then come when
/// they are touched.
#[cfg(target_os = "linux")]
fn fetch(mapping: &Mmap) -> io::Result<()> {
    /// What `MADV_POPULATE_READ` answers for a page that cannot be had, see madvise(2).
    const EFAULT: i32 = 14;
    // Without this advice the kernel reads around a fault, the tensor before included, not ahead.
    let _ = mapping.advise(Advice::Sequential);
    match mapping.advise(Advice::PopulateRead) {
        Err(cause) if cause.raw_os_error() == Some(EFAULT) => Err(cause),
        _ => Ok(()),
    }
}

/// Starts reading all pages. Other kernels do not tell beforehand of a page that cannot be had.
#[cfg(not(target_os = "linux"))]
fn fetch(mapping: &Mmap) -> io::Result<()> {
    let _ = mapping.advise(Advice::Sequential);
    let _ = mapping.advise(Advice::WillNeed);
    Ok(())
}
