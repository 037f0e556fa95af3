//! One weight file: where it is, and the proof that it is still the file whose header was read. Or, where
//! another rank told of it: what it is there.
//!
//! Headers are read when the checkpoint is opened and bytes are mapped later, so between the two a
//! download may replace or cut a file. Files are not kept open in between: large checkpoints have
//! more shards than a process may hold files.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::CheckpointError;

/// A weight file as it was when its header was read.
#[derive(Debug)]
pub(super) struct WeightFile {
    /// Its name in the checkpoint's directory.
    pub(super) name: String,
    /// Directory and name; may be a symbolic link, as in a Hugging Face cache.
    pub(super) path: PathBuf,
    identity: Identity,
}

/// What tells a file from another one, or from itself before somebody wrote to it.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    place: Place,
    bytes: u64,
    modified: Modified,
}

/// When a file was last written to: seconds since 1970, and nanoseconds.
pub(super) type Modified = (i64, i64);

#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// On this host.
    Here { device: u64, inode: u64 },
    /// On another rank's host, which told of it; it cannot be opened here.
    Elsewhere,
}

impl Identity {
    fn of(metadata: &Metadata) -> Identity {
        Identity {
            place: Place::Here {
                device: metadata.dev(),
                inode: metadata.ino(),
            },
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

impl WeightFile {
    /// Opens the file `name` in `dir` for the first time, and remembers what it is.
    pub(super) fn open(dir: &Path, name: String) -> Result<(WeightFile, File), CheckpointError> {
        let path = dir.join(&name);
        let (file, identity) = open_regular(&path)?;
        Ok((
            WeightFile {
                name,
                path,
                identity,
            },
            file,
        ))
    }

    /// A file `name` in the directory `dir` of another host.
    pub(super) fn elsewhere(
        dir: &Path,
        name: String,
        bytes: u64,
        modified: Modified,
    ) -> WeightFile {
        WeightFile {
            path: dir.join(&name),
            name,
            identity: Identity {
                place: Place::Elsewhere,
                bytes,
                modified,
            },
        }
    }

    /// Opens the file again.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::FileChanged`] if it is another file by now, or has been written to;
    /// [`CheckpointError::Elsewhere`] if it is not on this host.
    pub(super) fn reopen(&self) -> Result<File, CheckpointError> {
        if self.is_elsewhere() {
            return Err(CheckpointError::Elsewhere {
                path: self.path.clone(),
            });
        }
        let (file, identity) = open_regular(&self.path)?;
        if identity == self.identity {
            return Ok(file);
        }
        let (expected, found) = (self.identity.bytes, identity.bytes);
        Err(CheckpointError::FileChanged {
            path: self.path.clone(),
            expected,
            found,
        })
    }

    /// Bytes in the file.
    pub(super) fn bytes(&self) -> u64 {
        self.identity.bytes
    }

    /// When it was last written to.
    pub(super) fn modified(&self) -> Modified {
        self.identity.modified
    }

    /// Whether it is on another host.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.identity.place == Place::Elsewhere
    }
}

/// Opens a regular file, symbolic links followed. Asked before opening: opening a pipe would wait
/// for its writer.
fn open_regular(path: &Path) -> Result<(File, Identity), CheckpointError> {
    let failed = |cause| CheckpointError::Io {
        action: "open",
        path: path.to_owned(),
        cause,
    };
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(CheckpointError::NotAFile {
            path: path.to_owned(),
        });
    }
    let file = File::open(path).map_err(failed)?;
    let identity = Identity::of(&file.metadata().map_err(failed)?);
    Ok((file, identity))
}
