//! Reads a GGUF file: header, metadata, tensor directory, and each tensor's bytes as a slice of the input.
//!
//! Separate from the rest of the import because this is where untrusted bytes become types. Every length and offset is
//! checked against the file before it is used, nothing is allocated from a length in the file that the file does not
//! back with bytes, and strings and tensor data are borrowed, so reading a multi-gigabyte model costs the directory.
//!
//! Layout, all little-endian: magic `GGUF`, version `u32` (2 and 3 are alike here), tensor count `u64`, metadata
//! count `u64`, the metadata pairs, the tensor directory, padding to `general.alignment`, the data. A tensor's
//! dimensions are stored fastest first; [`Tensor::shape`] has them the other way round, as checkpoints do.
//! Source: the GGUF specification in ggml's `docs/gguf.md`.

use std::collections::{HashMap, HashSet};

use super::blocks::Encoding;

/// Deepest array in array that is read. The format sets no limit, so the reader must: it descends once per level.
const NESTING_MAX: usize = 4;
/// `GGML_MAX_DIMS`.
const DIMENSIONS_MAX: u32 = 4;
/// What the format prescribes when `general.alignment` is absent.
const ALIGNMENT_DEFAULT: usize = 32;

/// Why the bytes are not a GGUF file that can be read, or its metadata not what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file does not start with the four magic bytes.
    #[error(
        "not a GGUF file: it starts with {found:02x?}, expected {:02x?} (\"GGUF\")",
        b"GGUF"
    )]
    Magic {
        /// The first four bytes, or fewer if the file is shorter.
        found: Vec<u8>,
    },
    /// A version whose layout is not known here.
    #[error("GGUF version {found} is not supported, expected 2 or 3{}", big_endian_hint(*.found))]
    Version {
        /// The version in the header.
        found: u32,
    },
    /// The file ends inside something.
    #[error(
        "truncated: {what} at byte {offset} needs {needed} bytes, the file has {left} left; download it again"
    )]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it starts in the file.
        offset: usize,
        /// Bytes it needs.
        needed: u64,
        /// Bytes from there to the end of the file.
        left: usize,
    },
    /// A string that is not UTF-8.
    #[error("the string at byte {offset} is not UTF-8")]
    NotUtf8 {
        /// Where the string's bytes start.
        offset: usize,
    },
    /// A metadata value type, or a bool, outside the format.
    #[error("metadata key `{key}`: {problem} at byte {offset}")]
    Value {
        /// The key whose value is malformed.
        key: String,
        /// What is wrong with it.
        problem: String,
        /// Where in the file.
        offset: usize,
    },
    /// A key or a tensor name that occurs twice.
    #[error("{what} `{name}` occurs twice")]
    Duplicate {
        /// `metadata key` or `tensor`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// `general.alignment` is not a power of two.
    #[error("general.alignment is {found}, expected a power of two")]
    Alignment {
        /// The value found.
        found: usize,
    },
    /// A tensor whose directory entry contradicts the format or the file.
    #[error("tensor `{tensor}`: {problem}")]
    Tensor {
        /// The tensor's name.
        tensor: String,
        /// What is wrong with its entry.
        problem: String,
    },
    /// A metadata key the import cannot do without.
    #[error("metadata key `{key}` is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A metadata value of another type than the key calls for.
    #[error("metadata key `{key}` holds {found}, expected {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// What the key calls for.
        expected: &'static str,
        /// What the file holds.
        found: &'static str,
    },
}

/// The note for a version number that reads as 2 or 3 with its bytes swapped.
fn big_endian_hint(version: u32) -> &'static str {
    match version.swap_bytes() {
        2 | 3 => " (the file is big-endian; convert it to little-endian first)",
        _ => "",
    }
}

/// A parsed file; everything in it borrows from the bytes given to [`Gguf::parse`].
#[derive(Debug)]
pub struct Gguf<'a> {
    /// The metadata pairs.
    pub metadata: Metadata<'a>,
    /// The tensors in directory order; names are unique.
    pub tensors: Vec<Tensor<'a>>,
}

/// One tensor of the file.
#[derive(Debug)]
pub struct Tensor<'a> {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: &'a str,
    /// Dimensions, slowest first: `[out, in]` for a matrix. None is zero.
    pub shape: Vec<usize>,
    /// Its data, if the encoding is one the import knows.
    pub payload: Payload<'a>,
}

/// A tensor's data.
#[derive(Debug, Clone, Copy)]
pub enum Payload<'a> {
    /// A known encoding, and exactly the bytes it needs for the tensor's shape.
    Stored {
        /// How the values are stored.
        encoding: Encoding,
        /// Row after row, whole blocks.
        bytes: &'a [u8],
    },
    /// A ggml type that the import does not convert.
    Unsupported {
        /// The number of the type in the directory.
        type_id: u32,
    },
}

/// A metadata value. Integers of all widths are one variant, since writers disagree on widths.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    /// Any of the unsigned integer types.
    Unsigned(u64),
    /// Any of the signed integer types.
    Signed(i64),
    /// `FLOAT32`.
    Float32(f32),
    /// `FLOAT64`.
    Float64(f64),
    /// `BOOL`.
    Flag(bool),
    /// `STRING`.
    Text(&'a str),
    /// An array of strings.
    Texts(Vec<&'a str>),
    /// An array of numbers or bools, still as bytes.
    Numbers(Numbers<'a>),
    /// An array of arrays; checked and skipped, since no key of ours holds one.
    Nested,
}

impl Value<'_> {
    /// The value's kind in words, for error messages.
    fn kind(&self) -> &'static str {
        match self {
            Value::Unsigned(_) => "an unsigned integer",
            Value::Signed(_) => "a signed integer",
            Value::Float32(_) | Value::Float64(_) => "a float",
            Value::Flag(_) => "a bool",
            Value::Text(_) => "a string",
            Value::Texts(_) => "an array of strings",
            Value::Numbers(_) => "an array of numbers",
            Value::Nested => "an array of arrays",
        }
    }
}

/// An array of fixed-width elements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Numbers<'a> {
    kind: Scalar,
    bytes: &'a [u8],
}

impl<'a> Numbers<'a> {
    /// The elements as integers, or `None` if they are floats or bools, or too large for `i64`.
    fn integers(self) -> Option<Vec<i64>> {
        let integer = |bytes: &[u8]| match self.kind.decode(bytes)? {
            Value::Unsigned(value) => i64::try_from(value).ok(),
            Value::Signed(value) => Some(value),
            _ => None,
        };
        self.bytes
            .chunks_exact(self.kind.width())
            .map(integer)
            .collect()
    }
}

/// The fixed-width value types, by their number in the file.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scalar {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

/// The number of the string type in the file.
const STRING: u32 = 8;
/// The number of the array type in the file.
const ARRAY: u32 = 9;

impl Scalar {
    fn from_id(id: u32) -> Option<Scalar> {
        Some(match id {
            0 => Scalar::U8,
            1 => Scalar::I8,
            2 => Scalar::U16,
            3 => Scalar::I16,
            4 => Scalar::U32,
            5 => Scalar::I32,
            6 => Scalar::F32,
            7 => Scalar::Bool,
            10 => Scalar::U64,
            11 => Scalar::I64,
            12 => Scalar::F64,
            _ => return None,
        })
    }

    /// Bytes of one value.
    fn width(self) -> usize {
        match self {
            Scalar::U8 | Scalar::I8 | Scalar::Bool => 1,
            Scalar::U16 | Scalar::I16 => 2,
            Scalar::U32 | Scalar::I32 | Scalar::F32 => 4,
            Scalar::U64 | Scalar::I64 | Scalar::F64 => 8,
        }
    }

    /// The value in `bytes`, or `None` if they are not [`Scalar::width`] long or hold a bool other than 0 and 1.
    fn decode<'a>(self, bytes: &[u8]) -> Option<Value<'a>> {
        Some(match self {
            Scalar::U8 => Value::Unsigned(u8::from_le_bytes(bytes.try_into().ok()?).into()),
            Scalar::U16 => Value::Unsigned(u16::from_le_bytes(bytes.try_into().ok()?).into()),
            Scalar::U32 => Value::Unsigned(u32::from_le_bytes(bytes.try_into().ok()?).into()),
            Scalar::U64 => Value::Unsigned(u64::from_le_bytes(bytes.try_into().ok()?)),
            Scalar::I8 => Value::Signed(i8::from_le_bytes(bytes.try_into().ok()?).into()),
            Scalar::I16 => Value::Signed(i16::from_le_bytes(bytes.try_into().ok()?).into()),
            Scalar::I32 => Value::Signed(i32::from_le_bytes(bytes.try_into().ok()?).into()),
            Scalar::I64 => Value::Signed(i64::from_le_bytes(bytes.try_into().ok()?)),
            Scalar::F32 => Value::Float32(f32::from_le_bytes(bytes.try_into().ok()?)),
            Scalar::F64 => Value::Float64(f64::from_le_bytes(bytes.try_into().ok()?)),
            Scalar::Bool => match bytes {
                [0] => Value::Flag(false),
                [1] => Value::Flag(true),
                _ => return None,
            },
        })
    }
}

/// The metadata pairs by key.
#[derive(Debug, Default)]
pub struct Metadata<'a> {
    pairs: HashMap<&'a str, Value<'a>>,
}

/// The value under a key that must be there.
///
/// # Errors
/// [`GgufError::MissingKey`] if `value` is `None`.
pub fn required<T>(key: &str, value: Option<T>) -> Result<T, GgufError> {
    value.ok_or_else(|| GgufError::MissingKey {
        key: key.to_owned(),
    })
}

/// Each getter returns `None` for a key that is not there and [`GgufError::WrongType`] for a value of another kind.
impl<'a> Metadata<'a> {
    /// Whether there is such a key.
    pub fn has(&self, key: &str) -> bool {
        self.pairs.contains_key(key)
    }

    /// All keys, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.pairs.keys().copied()
    }

    /// A non-negative integer that fits `usize`.
    ///
    /// # Errors
    /// [`GgufError::WrongType`].
    pub fn count(&self, key: &str) -> Result<Option<usize>, GgufError> {
        self.typed(key, "a non-negative integer", |value| match value {
            Value::Unsigned(value) => usize::try_from(*value).ok(),
            Value::Signed(value) => usize::try_from(*value).ok(),
            _ => None,
        })
    }

    /// A single-precision float.
    ///
    /// # Errors
    /// [`GgufError::WrongType`].
    pub fn float(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "a 32-bit float", |value| match value {
            Value::Float32(value) => Some(*value),
            _ => None,
        })
    }

    /// A bool.
    ///
    /// # Errors
    /// [`GgufError::WrongType`].
    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a bool", |value| match value {
            Value::Flag(value) => Some(*value),
            _ => None,
        })
    }

    /// A string.
    ///
    /// # Errors
    /// [`GgufError::WrongType`].
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, GgufError> {
        self.typed(key, "a string", |value| match value {
            Value::Text(value) => Some(*value),
            _ => None,
        })
    }

    /// An array of strings.
    ///
    /// # Errors
    /// [`GgufError::WrongType`].
    pub fn texts(&self, key: &str) -> Result<Option<&[&'a str]>, GgufError> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Texts(values) => Some(values.as_slice()),
            _ => None,
        })
    }

    /// An array of integers of any width.
    ///
    /// # Errors
    /// [`GgufError::WrongType`].
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>, GgufError> {
        self.typed(key, "an array of integers", |value| match value {
            Value::Numbers(numbers) => numbers.integers(),
            _ => None,
        })
    }

    fn typed<'s, T>(
        &'s self,
        key: &str,
        expected: &'static str,
        pick: impl Fn(&'s Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.pairs.get(key) else {
            return Ok(None);
        };
        pick(value).map(Some).ok_or_else(|| GgufError::WrongType {
            key: key.to_owned(),
            expected,
            found: value.kind(),
        })
    }
}

impl<'a> Gguf<'a> {
    /// Reads the whole directory of a GGUF file and finds each tensor's bytes.
    ///
    /// # Errors
    /// [`GgufError`] for anything the format does not allow: see its variants.
    pub fn parse(file: &'a [u8]) -> Result<Gguf<'a>, GgufError> {
        let mut cursor = Cursor { file, offset: 0 };
        check_magic(file)?;
        cursor.take("the magic", 4)?;
        let version = cursor.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version { found: version });
        }
        let tensor_count = cursor.u64("the tensor count")?;
        let pair_count = cursor.u64("the metadata count")?;
        let metadata = read_metadata(&mut cursor, pair_count)?;
        let entries = read_directory(&mut cursor, tensor_count)?;
        let data = data_section(&cursor, &metadata)?;
        let tensors = entries
            .into_iter()
            .map(|entry| entry.locate(&data))
            .collect::<Result<Vec<_>, _>>()?;
        check_disjoint(&tensors)?;
        Ok(Gguf { metadata, tensors })
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor<'a>> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

fn check_magic(file: &[u8]) -> Result<(), GgufError> {
    if file.starts_with(b"GGUF") {
        return Ok(());
    }
    let found = file.iter().take(4).copied().collect();
    Err(GgufError::Magic { found })
}

/// Reads on from `offset`, never past the end.
struct Cursor<'a> {
    file: &'a [u8],
    offset: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, what: &'static str, length: u64) -> Result<&'a [u8], GgufError> {
        let rest = self.file.get(self.offset..).unwrap_or_default();
        let bytes = usize::try_from(length)
            .ok()
            .and_then(|length| rest.get(..length))
            .ok_or(GgufError::Truncated {
                what,
                offset: self.offset,
                needed: length,
                left: rest.len(),
            })?;
        self.offset += bytes.len();
        Ok(bytes)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        let bytes = self.take(what, 4)?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u32::from(byte)))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        let bytes = self.take(what, 8)?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    fn text(&mut self, what: &'static str) -> Result<&'a str, GgufError> {
        let length = self.u64(what)?;
        let offset = self.offset;
        let bytes = self.take(what, length)?;
        std::str::from_utf8(bytes).map_err(|_| GgufError::NotUtf8 { offset })
    }
}

fn read_metadata<'a>(cursor: &mut Cursor<'a>, count: u64) -> Result<Metadata<'a>, GgufError> {
    let mut metadata = Metadata::default();
    for _ in 0..count {
        let key = cursor.text("a metadata key")?;
        let value_type = cursor.u32("a metadata value's type")?;
        let value = read_value(cursor, key, value_type)?;
        if metadata.pairs.insert(key, value).is_some() {
            return Err(GgufError::Duplicate {
                what: "metadata key",
                name: key.to_owned(),
            });
        }
    }
    Ok(metadata)
}

fn read_value<'a>(
    cursor: &mut Cursor<'a>,
    key: &str,
    value_type: u32,
) -> Result<Value<'a>, GgufError> {
    match value_type {
        STRING => Ok(Value::Text(cursor.text("a metadata string")?)),
        ARRAY => read_array(cursor, key, 0),
        _ => {
            let scalar = scalar(cursor, key, value_type)?;
            let offset = cursor.offset;
            let bytes = cursor.take("a metadata value", scalar.width() as u64)?;
            scalar.decode(bytes).ok_or_else(|| GgufError::Value {
                key: key.to_owned(),
                problem: format!("a bool is {bytes:?}, expected 0 or 1"),
                offset,
            })
        }
    }
}

fn scalar(cursor: &Cursor<'_>, key: &str, value_type: u32) -> Result<Scalar, GgufError> {
    Scalar::from_id(value_type).ok_or_else(|| GgufError::Value {
        key: key.to_owned(),
        problem: format!("value type {value_type} is unknown, expected 0 to 12"),
        offset: cursor.offset,
    })
}

fn read_array<'a>(
    cursor: &mut Cursor<'a>,
    key: &str,
    depth: usize,
) -> Result<Value<'a>, GgufError> {
    if depth >= NESTING_MAX {
        return Err(GgufError::Value {
            key: key.to_owned(),
            problem: format!("arrays are nested more than {NESTING_MAX} deep"),
            offset: cursor.offset,
        });
    }
    let element_type = cursor.u32("an array's element type")?;
    let count = cursor.u64("an array's length")?;
    match element_type {
        STRING => (0..count)
            .map(|_| cursor.text("a string of an array"))
            .collect::<Result<_, _>>()
            .map(Value::Texts),
        ARRAY => {
            for _ in 0..count {
                read_array(cursor, key, depth + 1)?;
            }
            Ok(Value::Nested)
        }
        _ => {
            let kind = scalar(cursor, key, element_type)?;
            let length = count.saturating_mul(kind.width() as u64);
            let bytes = cursor.take("an array's elements", length)?;
            Ok(Value::Numbers(Numbers { kind, bytes }))
        }
    }
}

/// A directory entry before its data is looked up.
struct Entry<'a> {
    name: &'a str,
    shape: Vec<usize>,
    type_id: u32,
    offset: u64,
}

fn read_directory<'a>(cursor: &mut Cursor<'a>, count: u64) -> Result<Vec<Entry<'a>>, GgufError> {
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..count {
        let entry = read_entry(cursor)?;
        if !names.insert(entry.name) {
            return Err(GgufError::Duplicate {
                what: "tensor",
                name: entry.name.to_owned(),
            });
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn read_entry<'a>(cursor: &mut Cursor<'a>) -> Result<Entry<'a>, GgufError> {
    let name = cursor.text("a tensor's name")?;
    let dimension_count = cursor.u32("a tensor's dimension count")?;
    if !(1..=DIMENSIONS_MAX).contains(&dimension_count) {
        let problem = format!("{dimension_count} dimensions, expected 1 to {DIMENSIONS_MAX}");
        return Err(bad_tensor(name, problem));
    }
    let mut shape = Vec::new();
    for _ in 0..dimension_count {
        let dimension = cursor.u64("a tensor's dimension")?;
        let dimension = usize::try_from(dimension).ok().filter(|&size| size > 0);
        shape.push(
            dimension.ok_or_else(|| bad_tensor(name, "a dimension is zero or too large".into()))?,
        );
    }
    shape.reverse();
    let type_id = cursor.u32("a tensor's type")?;
    let offset = cursor.u64("a tensor's offset")?;
    Ok(Entry {
        name,
        shape,
        type_id,
        offset,
    })
}

fn bad_tensor(name: &str, problem: String) -> GgufError {
    GgufError::Tensor {
        tensor: name.to_owned(),
        problem,
    }
}

/// The part of the file that tensor offsets count from.
struct DataSection<'a> {
    bytes: &'a [u8],
    alignment: usize,
}

fn data_section<'a>(
    cursor: &Cursor<'a>,
    metadata: &Metadata<'a>,
) -> Result<DataSection<'a>, GgufError> {
    let alignment = metadata
        .count("general.alignment")?
        .unwrap_or(ALIGNMENT_DEFAULT);
    if !alignment.is_power_of_two() {
        return Err(GgufError::Alignment { found: alignment });
    }
    let bytes = cursor
        .offset
        .checked_next_multiple_of(alignment)
        .and_then(|start| cursor.file.get(start..))
        .unwrap_or_default();
    Ok(DataSection { bytes, alignment })
}

impl<'a> Entry<'a> {
    fn locate(self, data: &DataSection<'a>) -> Result<Tensor<'a>, GgufError> {
        let payload = match Encoding::from_type_id(self.type_id) {
            None => Payload::Unsupported {
                type_id: self.type_id,
            },
            Some(encoding) => Payload::Stored {
                encoding,
                bytes: self.slice(encoding, data)?,
            },
        };
        Ok(Tensor {
            name: self.name,
            shape: self.shape,
            payload,
        })
    }

    fn slice(&self, encoding: Encoding, data: &DataSection<'a>) -> Result<&'a [u8], GgufError> {
        let length = self.byte_length(encoding)?;
        let offset = usize::try_from(self.offset).unwrap_or(usize::MAX);
        if offset % data.alignment != 0 {
            let problem = format!(
                "its data starts at offset {}, not a multiple of general.alignment ({})",
                self.offset, data.alignment
            );
            return Err(bad_tensor(self.name, problem));
        }
        offset
            .checked_add(length)
            .and_then(|end| data.bytes.get(offset..end))
            .ok_or_else(|| {
                let problem = format!(
                    "its {length} bytes at offset {} end outside the data, which has {} bytes; the file is truncated or corrupt",
                    self.offset,
                    data.bytes.len()
                );
                bad_tensor(self.name, problem)
            })
    }

    /// Bytes of the whole tensor: rows of whole blocks.
    fn byte_length(&self, encoding: Encoding) -> Result<usize, GgufError> {
        let row_elements = self.shape.last().copied().unwrap_or(0);
        if row_elements % encoding.block_elements() != 0 {
            let problem = format!(
                "rows of {row_elements} values are not whole {} blocks of {}",
                encoding.name(),
                encoding.block_elements()
            );
            return Err(bad_tensor(self.name, problem));
        }
        self.shape
            .iter()
            .try_fold(1usize, |product, &size| product.checked_mul(size))
            .map(|elements| elements / encoding.block_elements())
            .and_then(|blocks| blocks.checked_mul(encoding.block_bytes()))
            .ok_or_else(|| {
                let problem = format!("dimensions {:?} overflow", self.shape);
                bad_tensor(self.name, problem)
            })
    }
}

/// No byte belongs to two tensors.
fn check_disjoint(tensors: &[Tensor<'_>]) -> Result<(), GgufError> {
    let mut spans: Vec<(usize, usize, &str)> = tensors
        .iter()
        .filter_map(|tensor| match tensor.payload {
            Payload::Stored { bytes, .. } => {
                let start = bytes.as_ptr() as usize;
                Some((start, start.saturating_add(bytes.len()), tensor.name))
            }
            Payload::Unsupported { .. } => None,
        })
        .collect();
    spans.sort_unstable();
    for (before, after) in spans.iter().zip(spans.iter().skip(1)) {
        if after.0 < before.1 {
            let problem = format!("its data overlaps that of tensor `{}`", before.2);
            return Err(bad_tensor(after.2, problem));
        }
    }
    Ok(())
}
