//! What can be wrong with a checkpoint, each with the file, the tensor, what was expected, what was
//! found and what to do.
//!
//! Names and shapes come out of files that nobody has checked, so the texts quote them escaped and
//! cut them short. The operating system's errors are part of the text (field `cause`), not of the
//! `source` chain, so that a message is whole wherever it is printed.

use std::fmt;
use std::io;
use std::path::PathBuf;

use safetensors::{Dtype, SafeTensorError};

use super::header::MAX_HEADER_BYTES;
use super::index::MAX_INDEX_BYTES;

/// Most characters of a tensor's name, or of a parser's complaint, that a message repeats.
const SHOWN_CHARS: usize = 160;
/// Most dimensions of a shape that a message repeats.
const SHOWN_DIMENSIONS: usize = 8;
/// Most names of a set of tensors that a message repeats.
const SHOWN_NAMES: usize = 3;

/// Why a checkpoint could not be opened, or a tensor not be taken out of it. Sizes and offsets are
/// in bytes.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `map`.
        action: &'static str,
        /// File or directory it was tried on.
        path: PathBuf,
        /// The operating system's answer.
        cause: io::Error,
    },

    /// The directory holds no weights under a name that a checkpoint uses.
    #[error(
        "{}: no weights here; expected model.safetensors, model.safetensors.index.json, \
         model-*.safetensors or weights.*.safetensors. Is this the directory of an MLX checkpoint? \
         A GGUF file must be imported first: mlx-pipe import MODEL.gguf OUT_DIR",
        path.display()
    )]
    NoWeights {
        /// The directory.
        path: PathBuf,
    },

    /// Two sets of weights lie side by side and nothing says which one is meant.
    #[error(
        "{}: holds model.safetensors and also {}, so it is not clear which are the weights; remove \
         one of the two",
        path.display(),
        quoted(other)
    )]
    Ambiguous {
        /// The directory.
        path: PathBuf,
        /// A file of the other set.
        other: String,
    },

    /// Files named `model-00001-of-00003.safetensors` say how many there are; one of them is not
    /// there.
    #[error(
        "{} is missing: the names of the other files count {shard_count} shards; download the \
         checkpoint again",
        path.display()
    )]
    ShardMissing {
        /// The file that should be there.
        path: PathBuf,
        /// Shards the names promise.
        shard_count: usize,
    },

    /// A weight file is a directory, a socket or the like.
    #[error("{}: not a regular file", path.display())]
    NotAFile {
        /// What is no file.
        path: PathBuf,
    },

    /// The file ends before its own eight bytes of header length.
    #[error(
        "{}: the file is shorter than a safetensors file can be: expected at least 8 bytes, found \
         {found}; download it again",
        path.display()
    )]
    NoHeader {
        /// The weight file.
        path: PathBuf,
        /// Bytes in the file.
        found: u64,
    },

    /// The header length is beyond what the format allows.
    #[error(
        "{}: the header says it has {found} bytes, more than the {MAX_HEADER_BYTES} that \
         safetensors allows; this is not a safetensors file, or it is damaged",
        path.display()
    )]
    HeaderTooLarge {
        /// The weight file.
        path: PathBuf,
        /// Header length claimed.
        found: u64,
    },

    /// The header length is beyond the end of the file.
    #[error(
        "{}: the file ends inside its header: expected at least {expected} bytes, found {found}; \
         download it again",
        path.display()
    )]
    HeaderTruncated {
        /// The weight file.
        path: PathBuf,
        /// Bytes up to the end of the header.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },

    /// The header is not UTF-8.
    #[error(
        "{}: the header is not UTF-8 (at header byte {position}); this is not a safetensors file, \
         or it is damaged",
        path.display()
    )]
    HeaderNotUtf8 {
        /// The weight file.
        path: PathBuf,
        /// First byte of the header that is wrong, counted from the header's start.
        position: usize,
    },

    /// The header is not the JSON that the format asks for.
    #[error(
        "{}: the header is not a safetensors header: {}; the file is damaged, download it again",
        path.display(),
        cut(cause)
    )]
    HeaderNotJson {
        /// The weight file.
        path: PathBuf,
        /// The parser's complaint.
        cause: String,
    },

    /// A tensor of a dtype that the format does not know.
    #[error(
        "{}: tensor {}: dtype {} is unknown; expected a safetensors dtype such as BF16, F16, F32 \
         or U32",
        path.display(),
        quoted(tensor),
        quoted(found)
    )]
    UnknownDtype {
        /// The weight file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The dtype written in the header.
        found: String,
    },

    /// The shape's size in bytes does not fit into a machine word.
    #[error(
        "{}: tensor {}: the size of {dtype} {} overflows; the header is damaged",
        path.display(),
        quoted(tensor),
        shown_shape(shape)
    )]
    ShapeOverflow {
        /// The weight file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
    },

    /// A dtype smaller than a byte whose elements do not fill whole bytes.
    #[error(
        "{}: tensor {}: {dtype} {} does not fill whole bytes; the header is damaged",
        path.display(),
        quoted(tensor),
        shown_shape(shape)
    )]
    PartialByte {
        /// The weight file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
    },

    /// `data_offsets` span another number of bytes than dtype and shape need.
    #[error(
        "{}: tensor {}: dtype and shape need {expected} bytes, data_offsets [{begin}, {end}] \
         disagree; the header is damaged",
        path.display(),
        quoted(tensor)
    )]
    SizeMismatch {
        /// The weight file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Bytes that dtype and shape need.
        expected: usize,
        /// First offset of `data_offsets`.
        begin: usize,
        /// Second offset of `data_offsets`.
        end: usize,
    },

    /// Two tensors share bytes.
    #[error(
        "{}: tensor {} overlaps the one before it: expected to begin at {expected}, found {found}; \
         the header is damaged",
        path.display(),
        quoted(tensor)
    )]
    Overlap {
        /// The weight file.
        path: PathBuf,
        /// The later of the two tensors.
        tensor: String,
        /// End of the tensor before it.
        expected: usize,
        /// Where it begins.
        found: usize,
    },

    /// Bytes that belong to no tensor lie before this one.
    #[error(
        "{}: a hole before tensor {}: expected to begin at {expected}, found {found}; the header \
         is damaged",
        path.display(),
        quoted(tensor)
    )]
    Hole {
        /// The weight file.
        path: PathBuf,
        /// The tensor after the hole.
        tensor: String,
        /// End of the tensor before it.
        expected: usize,
        /// Where it begins.
        found: usize,
    },

    /// The tensors reach beyond the end of the file.
    #[error(
        "{}: the file is shorter than its header says: expected {expected} bytes, found {found}; \
         download it again",
        path.display()
    )]
    Truncated {
        /// The weight file.
        path: PathBuf,
        /// Bytes up to the end of the last tensor.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },

    /// The file goes on after its last tensor.
    #[error(
        "{}: the file is longer than its header says: expected {expected} bytes, found {found}; \
         download it again",
        path.display()
    )]
    TrailingBytes {
        /// The weight file.
        path: PathBuf,
        /// Bytes up to the end of the last tensor.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },

    /// The `safetensors` crate refuses a header in which this module found no fault.
    #[error("{}: the header is invalid: {cause}", path.display())]
    HeaderRefused {
        /// The weight file.
        path: PathBuf,
        /// The crate's reason.
        cause: SafeTensorError,
    },

    /// One name in two files.
    #[error(
        "tensor {} is in two files, {} and {}; remove the file that does not belong here",
        quoted(tensor),
        first.display(),
        second.display()
    )]
    TensorInTwoFiles {
        /// The tensor.
        tensor: String,
        /// The file it was found in first.
        first: PathBuf,
        /// The file it was found in again.
        second: PathBuf,
    },

    /// The index is larger than any real one.
    #[error(
        "{}: the index has {found} bytes or more, over the {MAX_INDEX_BYTES} allowed",
        path.display()
    )]
    IndexTooLarge {
        /// The index.
        path: PathBuf,
        /// Bytes read before giving up.
        found: u64,
    },

    /// The index is not JSON, or has no usable `weight_map`.
    #[error(
        "{}: not a safetensors index: {}; download it again, or delete it to go by the files alone",
        path.display(),
        cut(cause)
    )]
    IndexNotJson {
        /// The index.
        path: PathBuf,
        /// The parser's complaint.
        cause: String,
    },

    /// The index names something that is not the plain name of a `.safetensors` file beside it.
    #[error(
        "{}: tensor {} is said to be in {}; expected the name of a .safetensors file in the same \
         directory",
        path.display(),
        quoted(tensor),
        quoted(found)
    )]
    IndexUnsafeName {
        /// The index.
        path: PathBuf,
        /// The first tensor said to be there.
        tensor: String,
        /// The name in the index.
        found: String,
    },

    /// The index names a file that is not there.
    #[error(
        "{}: names {}, which is not there; download the missing file",
        path.display(),
        quoted(file)
    )]
    IndexedFileMissing {
        /// The index.
        path: PathBuf,
        /// The file's name.
        file: String,
    },

    /// The index puts a tensor into a file that does not hold it.
    #[error(
        "{}: says that tensor {} is in {}, but it is not; index and files belong to different \
         versions: download the checkpoint again, or delete the index to go by the files alone",
        path.display(),
        quoted(tensor),
        quoted(file)
    )]
    IndexedTensorMissing {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file the index names for it.
        file: String,
    },

    /// A file holds a tensor that the index does not list.
    #[error(
        "{}: does not list tensor {} of {}; index and files belong to different versions: download \
         the checkpoint again, or delete the index to go by the files alone",
        path.display(),
        quoted(tensor),
        quoted(file)
    )]
    TensorNotIndexed {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        file: String,
    },

    /// A tensor was asked for that the checkpoint does not hold.
    #[error(
        "{}: no tensor {} among the {tensor_count} there; the checkpoint is incomplete, or its \
         config.json belongs to another model",
        path.display(),
        quoted(tensor)
    )]
    NoSuchTensor {
        /// The checkpoint's directory.
        path: PathBuf,
        /// The tensor asked for.
        tensor: String,
        /// Tensors in the checkpoint.
        tensor_count: usize,
    },

    /// A tensor has another shape than the model needs.
    #[error(
        "{}: tensor {}: expected shape {}, found {}; config.json and weights do not belong \
         together",
        path.display(),
        quoted(tensor),
        shown_shape(expected),
        shown_shape(found)
    )]
    WrongShape {
        /// The weight file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape asked for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },

    /// A tensor has another dtype than the model can use.
    #[error(
        "{}: tensor {}: expected dtype {}, found {found}; is `quantization` in config.json that of \
         these weights?",
        path.display(),
        quoted(tensor),
        shown_dtypes(expected)
    )]
    WrongDtype {
        /// The weight file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The dtypes that would do.
        expected: Vec<Dtype>,
        /// The dtype in the file.
        found: Dtype,
    },

    /// The file is not the one whose header was read.
    #[error(
        "{}: the file was replaced or written to since its header was read: expected {expected} \
         bytes, found {found}; start again when nothing writes to it",
        path.display()
    )]
    FileChanged {
        /// The weight file.
        path: PathBuf,
        /// Bytes in the file when its header was read.
        expected: u64,
        /// Bytes in the file now.
        found: u64,
    },

    /// A tensor was to be read from a file that only another rank has.
    #[error(
        "{}: this file is on the host of another rank and not on this one; the rank's own tensors come from \
         its shard cache",
        path.display()
    )]
    Elsewhere {
        /// The weight file, as the other rank names it.
        path: PathBuf,
    },

    /// The bytes of a tensor do not have the hash that was kept of them.
    #[error(
        "{}: tensor {}: its bytes are not those that were written (expected BLAKE3 {expected}, found \
         {found}); the file is damaged",
        path.display(),
        quoted(tensor)
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The hash kept.
        expected: blake3::Hash,
        /// That of the bytes.
        found: blake3::Hash,
    },

    /// Pages of the file could not be brought into memory.
    #[error(
        "{}: tensor {}: its bytes cannot be read: {cause}; the file was cut since its header was read, or the \
         disk fails",
        path.display(),
        quoted(tensor)
    )]
    Unreadable {
        /// The weight file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The system's reason.
        cause: std::io::Error,
    },

    /// A tensor was taken a second time.
    #[error(
        "tensor {} was taken twice; this is a fault of the program, not of the checkpoint",
        quoted(tensor)
    )]
    TakenTwice {
        /// The tensor.
        tensor: String,
    },

    /// The plan names a tensor twice.
    #[error(
        "tensor {} is planned twice; this is a fault of the program, not of the checkpoint",
        quoted(tensor)
    )]
    PlannedTwice {
        /// The tensor.
        tensor: String,
    },

    /// The tensors taken are not the tensors planned.
    #[error(
        "the tensors loaded are not the tensors planned: planned but not loaded: {not_taken}; \
         loaded but not planned: {not_planned}. This is a fault of the program, not of the \
         checkpoint"
    )]
    NotAsPlanned {
        /// Planned, never taken.
        not_taken: NameSample,
        /// Taken, never planned.
        not_planned: NameSample,
    },
}

/// The first few names of a set of tensors, and how many there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameSample {
    /// The first few names in order.
    pub first: Vec<String>,
    /// Names in the whole set.
    pub count: usize,
}

impl NameSample {
    pub(super) fn of<'n>(names: impl Iterator<Item = &'n str>) -> NameSample {
        let mut sample = NameSample {
            first: Vec::new(),
            count: 0,
        };
        for name in names {
            if sample.count < SHOWN_NAMES {
                sample.first.push(name.to_owned());
            }
            sample.count += 1;
        }
        sample
    }
}

impl fmt::Display for NameSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.count == 0 {
            return f.write_str("none");
        }
        let names: Vec<String> = self.first.iter().map(|name| quoted(name)).collect();
        f.write_str(&names.join(", "))?;
        match self.count.saturating_sub(self.first.len()) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// A name as the file has it, in quotes, control characters escaped, cut to a length that fits a
/// message.
fn quoted(name: &str) -> String {
    format!("{:?}", cut(name))
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

fn shown_shape(shape: &[usize]) -> String {
    let dimensions: Vec<String> = shape
        .iter()
        .take(SHOWN_DIMENSIONS)
        .map(usize::to_string)
        .collect();
    let shown = dimensions.join(", ");
    if shape.len() > SHOWN_DIMENSIONS {
        format!("[{shown}, ... {} dimensions]", shape.len())
    } else {
        format!("[{shown}]")
    }
}

fn shown_dtypes(dtypes: &[Dtype]) -> String {
    let names: Vec<String> = dtypes.iter().map(Dtype::to_string).collect();
    names.join(" or ")
}
