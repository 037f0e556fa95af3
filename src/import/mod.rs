//! `mlx-pipe import`: a GGUF file becomes an MLX checkpoint directory, tokenizer included, without loss.
//!
//! The route: [`gguf`] reads the file and trusts nothing in it; `architecture` (with `rope`) learns the network from
//! the metadata; `tensors` pairs the file's tensors with the checkpoint's; `blocks` converts their values, exactly;
//! `tokenizer` and `config` write down the rest; `output` makes it appear all at once. A model that cannot be
//! expressed without loss is an error that names what is in the way.
//!
//! Separate from the program proper: nothing here is needed to run a model.

mod architecture;
mod blocks;
mod config;
mod error;
pub mod gguf;
mod output;
mod rope;
mod tensors;
mod tokenizer;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

pub use error::{ImportError, ModelError};

use architecture::Architecture;
use gguf::Gguf;
use output::OutputDir;
use tensors::Tensors;
use tokenizer::Vocabulary;

/// What an import wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The `model_type` of `config.json`.
    pub architecture: &'static str,
    /// Transformer layers.
    pub layers: usize,
    /// Tensors in `model.safetensors`; a quantised matrix counts as three.
    pub tensors: usize,
    /// Size of `model.safetensors`.
    pub bytes: u64,
    /// What the file has and the checkpoint does not, a sentence each. Nothing the model computes with.
    pub warnings: Vec<String>,
}

/// Imports the GGUF file `gguf` into the directory `out_dir`, which is made if it is not there.
///
/// Q4_0 and Q4_1 become affine 4-bit, Q8_0 affine 8-bit, all in groups of 32; F32, F16 and BF16 stay. Peak memory is
/// about one tensor.
///
/// # Errors
/// [`ImportError`]: the file cannot be read or imported, the directory holds a checkpoint, or writing failed. No
/// `config.json` is in the directory then.
pub fn import(gguf: &Path, out_dir: &Path) -> Result<Summary, ImportError> {
    let in_model = |cause: ModelError| ImportError::Model {
        path: gguf.to_owned(),
        cause: Box::new(cause),
    };
    output::refuse_occupied(out_dir)?;
    let file = map(gguf)?;
    let source = Gguf::parse(&file).map_err(|cause| in_model(cause.into()))?;
    let checkpoint = Checkpoint::plan(&source).map_err(in_model)?;
    let tokenizer = checkpoint.tokenizer_json().map_err(in_model)?;

    let mut output = OutputDir::create(out_dir)?;
    let bytes = output.write_weights(&checkpoint.tensors.outputs)?;
    output.write("tokenizer.json", &tokenizer)?;
    output.write_json("tokenizer_config.json", &checkpoint.tokenizer_config())?;
    output.write_json("generation_config.json", &checkpoint.generation_config())?;
    output.publish(&checkpoint.config())?;
    Ok(checkpoint.summary(bytes))
}

fn map(path: &Path) -> Result<Mmap, ImportError> {
    let read_error = |cause| ImportError::Read {
        path: path.to_owned(),
        cause,
    };
    let metadata = std::fs::metadata(path).map_err(read_error)?;
    if !metadata.is_file() {
        let found = if metadata.is_dir() {
            "a directory"
        } else {
            "not a regular file"
        };
        let path = path.to_owned();
        return Err(ImportError::NotAFile { path, found });
    }
    if metadata.len() == 0 {
        let path = path.to_owned();
        return Err(ImportError::Empty { path });
    }
    let file = File::open(path).map_err(read_error)?;
    // SAFETY: the map is read-only and private to this call; the promise that nobody shortens or rewrites the file
    // meanwhile is the caller's, as for every program that maps a model.
    unsafe { Mmap::map(&file) }.map_err(read_error)
}

/// Everything known about the checkpoint before the first byte of it is written.
struct Checkpoint<'a> {
    architecture: Architecture,
    tensors: Tensors<'a>,
    vocabulary: Vocabulary<'a>,
}

impl<'a> Checkpoint<'a> {
    fn plan(source: &'a Gguf<'a>) -> Result<Checkpoint<'a>, ModelError> {
        refuse_split(source)?;
        let architecture = Architecture::read(source)?;
        let tensors = tensors::plan(source, &architecture)?;
        let vocabulary = Vocabulary::read(&source.metadata, architecture.vocab_size)?;
        Ok(Checkpoint {
            architecture,
            tensors,
            vocabulary,
        })
    }

    fn tokenizer_json(&self) -> Result<Vec<u8>, ModelError> {
        let bytes = format!("{:#}\n", self.vocabulary.tokenizer()).into_bytes();
        self.vocabulary.verify(&bytes)?;
        Ok(bytes)
    }

    fn tokenizer_config(&self) -> serde_json::Value {
        self.vocabulary
            .tokenizer_config(self.architecture.context_length)
    }

    fn generation_config(&self) -> serde_json::Value {
        config::generation_config(&self.vocabulary.ids)
    }

    fn config(&self) -> serde_json::Value {
        config::config(&self.architecture, &self.tensors, &self.vocabulary.ids)
    }

    fn warnings(&self) -> Vec<String> {
        let unread = self.architecture.unread_keys.iter();
        let unread = unread.map(|key| format!("metadata key {key} is not known and not imported"));
        unread.chain(self.vocabulary.warnings.clone()).collect()
    }

    fn summary(&self, bytes: u64) -> Summary {
        Summary {
            architecture: self.architecture.family.name(),
            layers: self.architecture.layer_count,
            tensors: self.tensors.outputs.len(),
            bytes,
            warnings: self.warnings(),
        }
    }
}

/// A part of a split model has all the metadata but not all the tensors.
fn refuse_split(source: &Gguf<'_>) -> Result<(), ModelError> {
    match source.metadata.count("split.count")? {
        Some(count) if count > 1 => Err(ModelError::Split { count }),
        _ => Ok(()),
    }
}
