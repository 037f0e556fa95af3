//! The output directory: everything is written to a folder inside it, and moved into place when all of it is there.
//!
//! Separate because of its one promise: a directory with a `config.json` is a complete checkpoint. Whatever goes wrong
//! (a full disk, a signal, a bad vocabulary found late), the folder is removed or, after a crash, recognised as not a
//! checkpoint; `config.json` is moved last.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use safetensors::SafeTensorError;
use serde_json::Value;

use super::ImportError;
use super::tensors::Output;

/// The folder files are written to before they are moved.
const STAGE: &str = ".mlx-pipe-import";
/// The weights.
const WEIGHTS: &str = "model.safetensors";
/// The file whose presence makes a directory a checkpoint.
const CONFIG: &str = "config.json";

/// An output directory in the making. Dropped before [`OutputDir::publish`], it takes back what it wrote.
#[derive(Debug)]
pub struct OutputDir {
    dir: PathBuf,
    stage: PathBuf,
    created: bool,
    written: Vec<&'static str>,
}

impl OutputDir {
    /// Makes the directory if it is not there. What an import that crashed left in it is removed.
    ///
    /// # Errors
    /// [`ImportError::Occupied`] if it holds a checkpoint or a part of one, [`ImportError::Write`].
    pub fn create(dir: &Path) -> Result<OutputDir, ImportError> {
        refuse_occupied(dir)?;
        let created = !dir.exists();
        let stage = dir.join(STAGE);
        if stage.exists() {
            fs::remove_dir_all(&stage).map_err(|cause| write_error(&stage, cause))?;
        }
        fs::create_dir_all(&stage).map_err(|cause| write_error(&stage, cause))?;
        Ok(OutputDir {
            dir: dir.to_owned(),
            stage,
            created,
            written: Vec::new(),
        })
    }

    /// Writes one JSON file.
    ///
    /// # Errors
    /// [`ImportError::Write`].
    pub fn write_json(&mut self, name: &'static str, value: &Value) -> Result<(), ImportError> {
        let text = format!("{value:#}\n");
        self.write(name, text.as_bytes())
    }

    /// Writes one file.
    ///
    /// # Errors
    /// [`ImportError::Write`].
    pub fn write(&mut self, name: &'static str, bytes: &[u8]) -> Result<(), ImportError> {
        let path = self.stage.join(name);
        fs::write(&path, bytes).map_err(|cause| write_error(&path, cause))?;
        self.written.push(name);
        Ok(())
    }

    /// Writes `model.safetensors`, converting one tensor at a time, and returns its size in bytes.
    ///
    /// # Errors
    /// [`ImportError::Write`].
    pub fn write_weights(&mut self, outputs: &[(String, Output<'_>)]) -> Result<u64, ImportError> {
        let path = self.stage.join(WEIGHTS);
        // What mlx writes; transformers asks for it.
        let metadata = HashMap::from([("format".to_owned(), "mlx".to_owned())]);
        let views = outputs.iter().map(|(name, output)| (name, output));
        safetensors::serialize_to_file(views, Some(metadata), &path).map_err(|error| {
            let cause = match error {
                SafeTensorError::IoError(cause) => cause,
                other => io::Error::other(other),
            };
            write_error(&path, cause)
        })?;
        self.written.push(WEIGHTS);
        let size = fs::metadata(&path).map_err(|cause| write_error(&path, cause))?;
        Ok(size.len())
    }

    /// Brings every file to the disk and moves it into place, `config.json` last.
    ///
    /// # Errors
    /// [`ImportError::Write`]; what was moved already is removed again.
    pub fn publish(mut self, config: &Value) -> Result<(), ImportError> {
        self.write_json(CONFIG, config)?;
        self.share_weights()?;
        for name in &self.written {
            let path = self.stage.join(name);
            sync(&path).map_err(|cause| write_error(&path, cause))?;
        }
        for (moved, name) in self.written.iter().enumerate() {
            if let Err(error) = self.move_into_place(name) {
                for name in self.written[..=moved].iter().rev() {
                    let _ = fs::remove_file(self.dir.join(name));
                }
                return Err(error);
            }
        }
        self.created = false;
        Ok(())
    }

    /// Moves one file, and has the directory on the disk before the next one, so that the order survives a power cut.
    fn move_into_place(&self, name: &str) -> Result<(), ImportError> {
        let target = self.dir.join(name);
        fs::rename(self.stage.join(name), &target)
            .and_then(|()| sync(&self.dir))
            .map_err(|cause| write_error(&target, cause))
    }

    /// The safetensors crate makes its file readable by the owner alone; gives it the permissions of the others.
    fn share_weights(&self) -> Result<(), ImportError> {
        let path = self.stage.join(WEIGHTS);
        fs::metadata(self.stage.join(CONFIG))
            .and_then(|config| fs::set_permissions(&path, config.permissions()))
            .map_err(|cause| write_error(&path, cause))
    }
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.stage);
        if self.created {
            // Only if nothing else is in it.
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// Waits until a file, or a directory's list of files, is on the disk. A file system that has no such thing is fine.
fn sync(path: &Path) -> io::Result<()> {
    match File::open(path)?.sync_all() {
        Err(cause)
            if matches!(
                cause.kind(),
                io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

fn write_error(path: &Path, cause: io::Error) -> ImportError {
    ImportError::Write {
        path: path.to_owned(),
        cause,
    }
}

/// Looks whether an import may write into `dir`, before the work for it is done.
///
/// # Errors
/// [`ImportError::Occupied`] if it holds a checkpoint or a part of one; [`ImportError::Write`] if it cannot be read.
pub fn refuse_occupied(dir: &Path) -> Result<(), ImportError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(write_error(dir, cause)),
    };
    for entry in entries {
        let name = entry.map_err(|cause| write_error(dir, cause))?.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".safetensors") || name.ends_with(".json") {
            return Err(ImportError::Occupied {
                dir: dir.to_owned(),
                file: name.into_owned(),
            });
        }
    }
    Ok(())
}
