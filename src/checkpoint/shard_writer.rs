//! Writes a slice's file: under a name of its own first, and under the right one once it is whole and on the disk. So
//! a file of the right name is whole, whoever else writes the same one at the same time.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use blake3::{Hash, Hasher};

use super::Checkpoint;
use super::lock::{Lock, try_lock};
use super::shard::{Shard, ShardError};

/// End of the names of files that are being written.
const UNFINISHED: &str = ".part";
/// Bytes copied at a time.
const CHUNK_BYTES: usize = 4 << 20;
/// Names tried for a file being written; only a cleaner at the same moment takes one away.
const TRIES: u32 = 16;

/// Takes the tensors of a slice, in its order, a piece at a time.
#[derive(Debug)]
pub struct ShardWriter<'s> {
    shard: &'s Shard,
    dir: PathBuf,
    file: File,
    /// Where it is until it is whole.
    unfinished: PathBuf,
    /// Bytes written of the tensor that comes next, and their hash.
    written: u64,
    hasher: Hasher,
    /// Of the tensors written.
    hashes: Vec<Hash>,
}

impl<'s> ShardWriter<'s> {
    /// Begins a file in `dir`, which is made if it is not there. What dead writers of the same slice left
    /// behind is removed.
    ///
    /// # Errors
    ///
    /// The directory cannot be made or written to.
    pub fn create(shard: &'s Shard, dir: &Path) -> Result<Self, ShardError> {
        fs::create_dir_all(dir).map_err(|cause| failed("make the directory", dir, cause))?;
        remove_leftovers(shard, dir);
        let (file, unfinished) = create_unfinished(shard, dir)?;
        let writer = Self {
            shard,
            dir: dir.to_owned(),
            file,
            unfinished,
            written: 0,
            hasher: Hasher::new(),
            hashes: Vec::new(),
        };
        // The gaps between tensors are zeros that nobody has to write.
        let sized = writer.file.set_len(shard.file_bytes());
        sized.map_err(|cause| failed("write", &writer.unfinished, cause))?;
        Ok(writer)
    }

    /// Writes the next bytes of the tensor that is under way.
    ///
    /// # Errors
    ///
    /// No space, or a disk that fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ShardError> {
        let tensor = &self.shard.tensors()[self.hashes.len()];
        let end = self.written + bytes.len() as u64;
        assert!(end <= tensor.bytes, "more bytes than the tensor has");
        let position = self.shard.begin(tensor) + self.written;
        let written = self.file.write_all_at(bytes, position);
        written.map_err(|cause| failed("write", &self.unfinished, cause))?;
        self.hasher.update(bytes);
        self.written = end;
        Ok(())
    }

    /// Ends a tensor that is written to its last byte; returns its hash.
    pub fn end_tensor(&mut self) -> Hash {
        let tensor = &self.shard.tensors()[self.hashes.len()];
        assert_eq!(self.written, tensor.bytes, "{}", tensor.name);
        let hash = self.hasher.finalize();
        self.hashes.push(hash);
        self.hasher.reset();
        self.written = 0;
        hash
    }

    /// Puts the file, which now has all its tensors, on the disk and under its name. One that was there, and
    /// anybody who reads it, is not disturbed; an empty directory in its place is removed.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub fn finish(self) -> Result<(), ShardError> {
        assert_eq!(self.hashes.len(), self.shard.tensors().len());
        let head = self.shard.head(&self.hashes);
        let ended = self
            .file
            .write_all_at(&head, 0)
            .and_then(|()| self.file.sync_all());
        ended.map_err(|cause| failed("write", &self.unfinished, cause))?;
        let place = self.dir.join(self.shard.file_name());
        if place.symlink_metadata().is_ok_and(|found| found.is_dir()) {
            fs::remove_dir(&place)
                .map_err(|cause| failed("remove the directory", &place, cause))?;
        }
        fs::rename(&self.unfinished, &place).map_err(|cause| failed("make", &place, cause))?;
        // Some file systems refuse this of a directory. A name lost with the power is a file made again.
        let _ = File::open(&self.dir).and_then(|dir| dir.sync_all());
        Ok(())
    }
}

/// An unfinished file goes with its writer; a finished one has another name by then.
impl Drop for ShardWriter<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.unfinished);
    }
}

impl Shard {
    /// Writes the slice's file from the checkpoint that it is a slice of. Holds a few megabytes at a time.
    ///
    /// # Errors
    ///
    /// A tensor that cannot be read, a directory that cannot be written to, or no space.
    pub fn write_from(&self, checkpoint: &Checkpoint, dir: &Path) -> Result<(), ShardError> {
        let mut writer = ShardWriter::create(self, dir)?;
        let mut chunk = vec![0; CHUNK_BYTES];
        for wanted in self.tensors() {
            let tensor = checkpoint.open_tensor(&wanted.name)?;
            let mut offset = 0;
            while offset < wanted.bytes {
                let count = (wanted.bytes - offset).min(CHUNK_BYTES as u64);
                let piece = &mut chunk[..count as usize];
                tensor.read_at(offset, piece)?;
                writer.write(piece)?;
                offset += count;
            }
            writer.end_tensor();
        }
        writer.finish()
    }
}

/// A new file, locked, whose name says what it is to become.
fn create_unfinished(shard: &Shard, dir: &Path) -> Result<(File, PathBuf), ShardError> {
    let process = std::process::id();
    let mut path = dir.to_owned();
    for number in 0..TRIES {
        path = dir.join(format!(
            "{}.{process}-{number}{UNFINISHED}",
            shard.file_name()
        ));
        let created = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = match created {
            Ok(file) => file,
            // A process of the same number, on another host.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(cause) => return Err(failed("write", &path, cause)),
        };
        // A cleaner that came between takes the lock first, and then the name. Where the file system knows no
        // locks, nothing is ever cleaned.
        let is_ours = try_lock(&file) != Lock::Taken;
        if is_ours && file.metadata().is_ok_and(|metadata| metadata.nlink() > 0) {
            return Ok((file, path));
        }
    }
    Err(failed("write", &path, io::ErrorKind::AlreadyExists.into()))
}

/// Removes unfinished files of this slice whose writers no longer live: nobody holds their lock.
fn remove_leftovers(shard: &Shard, dir: &Path) {
    let beginning = format!("{}.", shard.file_name());
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let is_unfinished = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(&beginning) && name.ends_with(UNFINISHED));
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if !is_unfinished || !is_file {
            continue;
        }
        let opened = OpenOptions::new().write(true).open(entry.path());
        if let Ok(file) = opened
            && try_lock(&file) == Lock::Ours
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn failed(action: &'static str, path: &Path, cause: io::Error) -> ShardError {
    ShardError::Write {
        action,
        path: path.to_owned(),
        cause,
    }
}
