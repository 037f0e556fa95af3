//! The header of one safetensors file, read and proven without touching a tensor.
//!
//! A file is eight bytes of header length (little endian), that many bytes of JSON, and the
//! tensors' bytes. The JSON maps a name to `{"dtype", "shape", "data_offsets": [begin, end]}`,
//! offsets counted from the header's end, and may carry a `__metadata__` object of strings.
//! `safetensors` has `SafeTensors::read_metadata` for this, but it wants the whole file as one
//! slice, lets the last of two equal names win, and names the tensor for one kind of fault only. So
//! the JSON is read here with the crate's own dtypes, each rule is checked with its tensor, and the
//! crate's `Metadata` has the last word.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::value::StrDeserializer;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::error::CheckpointError;

/// Longest header that is read: the limit of the format's reference implementation.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the header length at the start of a file.
const LENGTH_BYTES: u64 = 8;

/// Whether a file must hold its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Data {
    /// All of them.
    Whole,
    /// All of them, or none: the file ends with its header.
    MayBeLeftOut,
}

/// A header that has been checked: its tensors fill the rest of the file exactly, in order, without
/// overlap or hole.
#[derive(Debug)]
pub struct Header {
    data_start: u64,
    metadata: Metadata,
}

impl Header {
    /// Reads and checks the header at the start of `input`, which is a file of `input_bytes` bytes;
    /// `path` is for the messages.
    ///
    /// Reads the header and no byte more, at most `8 + MAX_HEADER_BYTES`, and allocates in
    /// proportion to it. Takes any bytes, so it is also the entry for a fuzzer.
    ///
    /// # Errors
    ///
    /// One variant for each rule of the format that the bytes break.
    pub fn read(
        input: impl Read,
        input_bytes: u64,
        path: &Path,
    ) -> Result<Header, CheckpointError> {
        Self::read_before(Data::Whole, input, input_bytes, path)
    }

    /// [`Header::read`] of a file whose tensors may have been left out.
    pub(super) fn read_before(
        data: Data,
        mut input: impl Read,
        input_bytes: u64,
        path: &Path,
    ) -> Result<Header, CheckpointError> {
        let header_bytes = read_length(&mut input, input_bytes, path)?;
        let mut json = vec![0; header_bytes];
        input
            .read_exact(&mut json)
            .map_err(|cause| read_failed(path, cause))?;
        let tensors = parse(&json, path)?;
        let data_start = LENGTH_BYTES + header_bytes as u64;
        check_layout(&tensors, path)?;
        let metadata =
            Metadata::new(None, tensors).map_err(|cause| CheckpointError::HeaderRefused {
                path: path.to_owned(),
                cause,
            })?;
        check_file_size(data, data_start, &metadata, input_bytes, path)?;
        Ok(Header {
            data_start,
            metadata,
        })
    }

    /// Where the first tensor begins, in bytes from the file's start.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Every tensor by name, in the order of their bytes; offsets count from
    /// [`Header::data_start`].
    pub fn tensors(&self) -> impl Iterator<Item = (String, &TensorInfo)> {
        let names = self.metadata.offset_keys().into_iter();
        names.filter_map(|name| self.metadata.info(&name).map(|info| (name, info)))
    }
}

/// The header's length, once it is known to lie inside the file and under the limit.
fn read_length(
    input: &mut impl Read,
    input_bytes: u64,
    path: &Path,
) -> Result<usize, CheckpointError> {
    let path_buf = || path.to_owned();
    if input_bytes < LENGTH_BYTES {
        return Err(CheckpointError::NoHeader {
            path: path_buf(),
            found: input_bytes,
        });
    }
    let mut length = [0; LENGTH_BYTES as usize];
    input
        .read_exact(&mut length)
        .map_err(|cause| read_failed(path, cause))?;
    let header_bytes = u64::from_le_bytes(length);
    let too_large = CheckpointError::HeaderTooLarge {
        path: path_buf(),
        found: header_bytes,
    };
    if header_bytes > MAX_HEADER_BYTES {
        return Err(too_large);
    }
    let expected = LENGTH_BYTES + header_bytes;
    if expected > input_bytes {
        return Err(CheckpointError::HeaderTruncated {
            path: path_buf(),
            expected,
            found: input_bytes,
        });
    }
    usize::try_from(header_bytes).map_err(|_| too_large)
}

fn read_failed(path: &Path, cause: io::Error) -> CheckpointError {
    CheckpointError::Io {
        action: "read the header of",
        path: path.to_owned(),
        cause,
    }
}

/// The tensors of a header in the order of their bytes.
fn parse(json: &[u8], path: &Path) -> Result<Vec<(String, TensorInfo)>, CheckpointError> {
    let json = std::str::from_utf8(json).map_err(|cause| CheckpointError::HeaderNotUtf8 {
        path: path.to_owned(),
        position: cause.valid_up_to(),
    })?;
    let Entries(entries) =
        serde_json::from_str(json).map_err(|cause| CheckpointError::HeaderNotJson {
            path: path.to_owned(),
            cause: cause.to_string(),
        })?;
    let mut tensors = entries
        .into_iter()
        .map(|(name, entry)| entry.into_tensor(name, path))
        .collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Ok(tensors)
}

/// One tensor as the JSON has it.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl Entry {
    fn into_tensor(
        self,
        name: String,
        path: &Path,
    ) -> Result<(String, TensorInfo), CheckpointError> {
        let Entry {
            dtype: written,
            shape,
            data_offsets,
        } = self;
        let known: Result<Dtype, serde::de::value::Error> =
            Dtype::deserialize(StrDeserializer::new(&written));
        match known {
            Ok(dtype) => Ok((
                name,
                TensorInfo {
                    dtype,
                    shape,
                    data_offsets,
                },
            )),
            Err(_) => Err(CheckpointError::UnknownDtype {
                path: path.to_owned(),
                tensor: name,
                found: written,
            }),
        }
    }
}

/// The JSON object of a header, with a name that comes twice refused and `__metadata__` checked and
/// dropped.
struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut seen = HashSet::new();
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            let in_entry = |cause: A::Error| A::Error::custom(format_args!("{name:?}: {cause}"));
            if !seen.insert(name.clone()) {
                return Err(in_entry(A::Error::custom("the name comes twice")));
            }
            if name == "__metadata__" {
                map.next_value::<Option<HashMap<String, String>>>()
                    .map_err(in_entry)?;
            } else {
                let entry = map.next_value().map_err(in_entry)?;
                entries.push((name, entry));
            }
        }
        Ok(Entries(entries))
    }
}

/// Tensors in the order of their bytes: each as long as dtype and shape say, each beginning where
/// the one before it ends.
fn check_layout(tensors: &[(String, TensorInfo)], path: &Path) -> Result<(), CheckpointError> {
    let mut expected = 0;
    for (name, info) in tensors {
        let (begin, end) = info.data_offsets;
        let needed = tensor_bytes(name, info, path)?;
        if end.checked_sub(begin) != Some(needed) {
            let (path, tensor) = (path.to_owned(), name.clone());
            return Err(CheckpointError::SizeMismatch {
                path,
                tensor,
                expected: needed,
                begin,
                end,
            });
        }
        if begin != expected {
            let (path, tensor, found) = (path.to_owned(), name.clone(), begin);
            return Err(if begin < expected {
                CheckpointError::Overlap {
                    path,
                    tensor,
                    expected,
                    found,
                }
            } else {
                CheckpointError::Hole {
                    path,
                    tensor,
                    expected,
                    found,
                }
            });
        }
        expected = end;
    }
    Ok(())
}

/// Bytes that dtype and shape need. Some dtypes are smaller than a byte, so bits are counted first.
fn tensor_bytes(name: &str, info: &TensorInfo, path: &Path) -> Result<usize, CheckpointError> {
    let (dtype, shape) = (info.dtype, &info.shape);
    let bits = shape
        .iter()
        .try_fold(1usize, |elements, &dimension| {
            elements.checked_mul(dimension)
        })
        .and_then(|elements| elements.checked_mul(dtype.bitsize()));
    let (path, tensor, shape) = (|| path.to_owned(), || name.to_owned(), || shape.clone());
    match bits {
        None => Err(CheckpointError::ShapeOverflow {
            path: path(),
            tensor: tensor(),
            dtype,
            shape: shape(),
        }),
        Some(bits) if bits % 8 != 0 => Err(CheckpointError::PartialByte {
            path: path(),
            tensor: tensor(),
            dtype,
            shape: shape(),
        }),
        Some(bits) => Ok(bits / 8),
    }
}

/// The last tensor ends where the file ends, or the header does if the tensors may be left out. A file
/// that ends in between is damaged in any case.
fn check_file_size(
    data: Data,
    data_start: u64,
    metadata: &Metadata,
    found: u64,
    path: &Path,
) -> Result<(), CheckpointError> {
    let expected = data_start.saturating_add(metadata.data_len() as u64);
    let path = || path.to_owned();
    match found {
        // An end beyond 64 bits is in no file, cut off or not.
        _ if data == Data::MayBeLeftOut && found == data_start && expected < u64::MAX => Ok(()),
        _ if found < expected => Err(CheckpointError::Truncated {
            path: path(),
            expected,
            found,
        }),
        _ if found > expected => Err(CheckpointError::TrailingBytes {
            path: path(),
            expected,
            found,
        }),
        _ => Ok(()),
    }
}
