//! A checkpoint as one rank tells it to another that has none of its files: their names, lengths, dates and
//! headers. What comes of it is the same checkpoint, with the same fingerprint, of which no tensor can be read.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::file::{Modified, WeightFile};
use super::{Checkpoint, CheckpointError, Header, Headers, MAX_HEADER_BYTES};

/// Everything that [`Checkpoint::open`] learns from weight files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderTexts {
    files: Vec<FileText>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileText {
    name: String,
    bytes: u64,
    modified: Modified,
    /// The JSON of its header.
    header: String,
}

impl HeaderTexts {
    /// The checkpoint, read and checked as its headers would be in the files; `dir` names its place in
    /// messages.
    ///
    /// # Errors
    ///
    /// A header that breaks a rule of the format, or a tensor in two files.
    pub fn into_checkpoint(self, dir: &Path) -> Result<Checkpoint, CheckpointError> {
        let mut headers = Headers {
            dir: dir.to_owned(),
            files: Vec::new(),
            tensors: Default::default(),
        };
        for told in self.files {
            let file = WeightFile::elsewhere(dir, told.name, told.bytes, told.modified);
            let length = (told.header.len() as u64).to_le_bytes();
            let head = length.chain(told.header.as_bytes());
            let header = Header::read(head, told.bytes, &file.path)?;
            headers.add(file, &header)?;
        }
        Ok(Checkpoint(headers))
    }
}

impl Checkpoint {
    /// What to tell a rank without the files. Reads the headers again, and no tensor.
    ///
    /// # Errors
    ///
    /// A file that has changed since it was opened, or cannot be read.
    pub fn header_texts(&self) -> Result<HeaderTexts, CheckpointError> {
        let files = self.files.iter().map(text_of).collect::<Result<_, _>>()?;
        Ok(HeaderTexts { files })
    }
}

fn text_of(file: &WeightFile) -> Result<FileText, CheckpointError> {
    let failed = |cause| CheckpointError::Io {
        action: "read the header of",
        path: file.path.clone(),
        cause,
    };
    let open = file.reopen()?;
    let mut length = [0; 8];
    open.read_exact_at(&mut length, 0).map_err(failed)?;
    // It was within the limit when it was checked.
    let length = u64::from_le_bytes(length).min(MAX_HEADER_BYTES);
    let mut json = vec![0; length as usize];
    open.read_exact_at(&mut json, 8).map_err(failed)?;
    let header = String::from_utf8(json).map_err(|cause| CheckpointError::HeaderNotUtf8 {
        path: file.path.clone(),
        position: cause.utf8_error().valid_up_to(),
    })?;
    Ok(FileText {
        name: file.name.clone(),
        bytes: file.bytes(),
        modified: file.modified(),
        header,
    })
}
