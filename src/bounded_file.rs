//! Small files of a checkpoint, read whole: regular files only, and none larger than its kind can be.
//!
//! Separate because two modules read such files, and a directory that somebody else filled may hold
//! anything under a familiar name: opening a named pipe waits for ever, and a device has no end.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refused.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A directory, a pipe, a device or a socket.
    #[error("{} is not a regular file; replace it, or remove it", path.display())]
    NotAFile {
        /// What is no file.
        path: PathBuf,
    },
    /// More than a file of this name can need.
    #[error("{} has more than the {limit_bytes} bytes that are read; is it the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Most bytes that are read.
        limit_bytes: u64,
    },
}

/// The bytes of a regular file, `None` if there is none of this name. Symbolic links are followed, as a
/// Hugging Face cache needs.
///
/// # Errors
/// [`FileError`]; above `limit_bytes` no more than these are held.
pub fn read(path: &Path, limit_bytes: u64) -> Result<Option<Vec<u8>>, FileError> {
    if !is_regular(path)? {
        return Ok(None);
    }
    let failed = |cause| read_error(path, cause);
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(limit_bytes.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    match bytes.len() as u64 > limit_bytes {
        true => Err(FileError::TooLarge {
            path: path.to_owned(),
            limit_bytes,
        }),
        false => Ok(Some(bytes)),
    }
}

/// Whether `path` is there, as a regular file or a link to one. Asked before it is opened, because
/// opening a pipe would wait for its writer.
///
/// # Errors
/// [`FileError::NotAFile`] if it is something else, [`FileError::Read`] if the system does not tell.
pub fn is_regular(path: &Path) -> Result<bool, FileError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(true),
        Ok(_) => Err(FileError::NotAFile {
            path: path.to_owned(),
        }),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(cause) => Err(read_error(path, cause)),
    }
}

fn read_error(path: &Path, cause: io::Error) -> FileError {
    FileError::Read {
        path: path.to_owned(),
        cause,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit_and_not_beyond() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        assert!(read(&path, 3).unwrap().is_none());
        fs::write(&path, "abc").unwrap();
        assert_eq!(read(&path, 3).unwrap().as_deref(), Some(&b"abc"[..]));
        let error = read(&path, 2).unwrap_err();
        assert!(matches!(error, FileError::TooLarge { limit_bytes: 2, .. }));
        assert!(error.to_string().contains("config.json"), "{error}");
    }

    #[test]
    fn links_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (blob, link) = (dir.path().join("blob"), dir.path().join("link"));
        fs::write(&blob, "x").unwrap();
        std::os::unix::fs::symlink(&blob, &link).unwrap();
        assert_eq!(read(&link, 1).unwrap().as_deref(), Some(&b"x"[..]));
    }

    #[test]
    fn what_is_no_regular_file_is_refused_without_opening_it() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        for path in [pipe.as_path(), dir.path(), Path::new("/dev/zero")] {
            let error = read(path, 1).unwrap_err();
            assert!(matches!(error, FileError::NotAFile { .. }), "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()));
        }
    }
}
