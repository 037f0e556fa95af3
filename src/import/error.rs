//! Why an import did not happen. Each text is complete by itself: the file, what in it, what was expected, what to do.

use std::io;
use std::path::PathBuf;

use super::gguf::GgufError;

/// Names listed in one message before the rest is only counted.
const NAMES_SHOWN: usize = 5;

/// The failure of an import. Nothing that looks like a checkpoint is left behind.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The GGUF file could not be opened.
    #[error("{}: cannot read: {cause}", path.display())]
    Read {
        /// The GGUF file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// What was named is there and no file.
    #[error("{} is {found}; expected one file, such as model.gguf", path.display())]
    NotAFile {
        /// What was named.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The GGUF file has no bytes.
    #[error("{}: the file is empty; download it again", path.display())]
    Empty {
        /// The GGUF file.
        path: PathBuf,
    },
    /// The GGUF file's contents cannot be imported.
    #[error("{}: {cause}", path.display())]
    Model {
        /// The GGUF file.
        path: PathBuf,
        /// What about them.
        cause: Box<ModelError>,
    },
    /// The output directory has files that the import would mix with its own.
    #[error(
        "{}: already holds {file}; name another directory, or remove this one first", dir.display()
    )]
    Occupied {
        /// The output directory.
        dir: PathBuf,
        /// The file in the way.
        file: String,
    },
    /// An output file could not be written.
    #[error("{}: cannot write: {cause}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}

/// What is in a readable file and cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file is malformed, or lacks a metadata key.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// One of several files of a model.
    #[error(
        "this is one of {count} parts of a split model; merge them first (llama-gguf-split --merge)"
    )]
    Split {
        /// `split.count`.
        count: usize,
    },
    /// A network that is not imported.
    #[error("architecture `{found}` is not supported, expected one of {supported}")]
    Architecture {
        /// `general.architecture`.
        found: String,
        /// What is supported.
        supported: String,
    },
    /// A metadata value that cannot be, or that a checkpoint cannot express.
    #[error("metadata key `{key}` is {value}, expected {expected}")]
    Value {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What was expected.
        expected: String,
    },
    /// A tensor that cannot be what its name says.
    #[error("tensor `{tensor}`: {problem}")]
    Tensor {
        /// Its name in the file.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// A tensor type that has no lossless counterpart.
    #[error(
        "tensor `{tensor}` has type {found}, expected one of {supported}; quantise the model to one of these \
         (llama-quantize --pure, or --output-tensor-type q8_0 for the head alone)"
    )]
    TensorType {
        /// Its name in the file.
        tensor: String,
        /// ggml's name of the type.
        found: String,
        /// What is supported.
        supported: String,
    },
    /// Tensors the architecture has and the file does not.
    #[error("the file lacks {}", listed(names))]
    MissingTensors {
        /// Their names, at least one.
        names: Vec<String>,
    },
    /// Tensors the file has and the architecture does not.
    #[error("architecture `{architecture}` has no place for {}", listed(names))]
    UnknownTensors {
        /// Their names, at least one.
        names: Vec<String>,
        /// The file's architecture.
        architecture: &'static str,
    },
    /// A vocabulary that makes no tokenizer.
    #[error("tokenizer: {problem}")]
    Tokenizer {
        /// What is wrong with it.
        problem: String,
    },
}

/// `tensor a, b and 12 more`.
fn listed(names: &[String]) -> String {
    let shown: Vec<String> = names
        .iter()
        .take(NAMES_SHOWN)
        .map(|name| format!("`{name}`"))
        .collect();
    let noun = if names.len() == 1 {
        "tensor"
    } else {
        "tensors"
    };
    match names.len() - shown.len() {
        0 => format!("{noun} {}", shown.join(", ")),
        more => format!("{noun} {} and {more} more", shown.join(", ")),
    }
}
