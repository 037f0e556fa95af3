//! Tensor values: GGUF's blocks into MLX's packed codes, scales and biases, without a change of value.
//!
//! Separate because it is the arithmetic of the import and nothing else: bytes in, bytes out, no names and no files.
//!
//! GGUF stores a row as blocks of 32 values, each with its own scale `d`. MLX's affine quantisation stores
//! `w = scale * code + bias` with unsigned codes and one scale and bias per group. With groups of 32 the two are the
//! same thing:
//!
//! | GGUF | block | value | code | scale | bias |
//! |---|---|---|---|---|---|
//! | Q4_0 | f16 `d`, 16 bytes | `d * (q - 8)` | `q` | `d` | `-8 d` |
//! | Q4_1 | f16 `d`, f16 `m`, 16 bytes | `d * q + m` | `q` | `d` | `m` |
//! | Q8_0 | f16 `d`, 32 × i8 | `d * q` | `q + 128` | `d` | `-128 d` |
//!
//! In 4-bit blocks byte `i` holds value `i` in its low half and value `i + 16` in its high half; MLX packs neighbours.
//! The products above are exact in f32 (11-bit scale times at most 8 bits), so dequantising in f32 gives GGUF's value
//! to the last bit; only a zero may lose its sign. `-8 d` and `-128 d` only move the exponent, so they are exact in
//! f16 unless they overflow: then that tensor's scales and biases are f32.

use std::borrow::Cow;

use half::f16;
use safetensors::Dtype;

/// Values per block, and per group of the MLX checkpoint.
pub const GROUP_SIZE: usize = 32;
/// The 16 bytes of codes in a 4-bit block, the 32 in an 8-bit block.
const NIBBLE_BYTES: usize = GROUP_SIZE / 2;

/// The GGUF encodings that are converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// A plain float type, stored as it is.
    Plain(Float),
    /// Blocks that become packed codes, scales and biases.
    Blocks(BlockKind),
}

/// The float types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    BF16,
}

/// The block types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockKind {
    /// 4 bits, scale.
    Q4_0,
    /// 4 bits, scale and minimum.
    Q4_1,
    /// 8 bits, scale.
    Q8_0,
}

/// Every encoding that is converted, with its number in `enum ggml_type`.
const ENCODINGS: [(u32, Encoding); 6] = [
    (0, Encoding::Plain(Float::F32)),
    (1, Encoding::Plain(Float::F16)),
    (30, Encoding::Plain(Float::BF16)),
    (2, Encoding::Blocks(BlockKind::Q4_0)),
    (3, Encoding::Blocks(BlockKind::Q4_1)),
    (8, Encoding::Blocks(BlockKind::Q8_0)),
];

impl Encoding {
    /// The encoding with this number in `enum ggml_type`, if it is one of the converted ones.
    pub fn from_type_id(type_id: u32) -> Option<Encoding> {
        ENCODINGS
            .iter()
            .find(|(id, _)| *id == type_id)
            .map(|(_, encoding)| *encoding)
    }

    /// The names of all converted encodings, for error messages.
    pub fn supported() -> String {
        ENCODINGS.map(|(_, encoding)| encoding.name()).join(", ")
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::Plain(Float::F32) => "F32",
            Encoding::Plain(Float::F16) => "F16",
            Encoding::Plain(Float::BF16) => "BF16",
            Encoding::Blocks(BlockKind::Q4_0) => "Q4_0",
            Encoding::Blocks(BlockKind::Q4_1) => "Q4_1",
            Encoding::Blocks(BlockKind::Q8_0) => "Q8_0",
        }
    }

    /// Values that are stored together: 1 for floats.
    pub fn block_elements(self) -> usize {
        match self {
            Encoding::Plain(_) => 1,
            Encoding::Blocks(_) => GROUP_SIZE,
        }
    }

    /// Bytes of [`Encoding::block_elements`] values.
    pub fn block_bytes(self) -> usize {
        match self {
            Encoding::Plain(Float::F32) => 4,
            Encoding::Plain(Float::F16 | Float::BF16) => 2,
            Encoding::Blocks(kind) => kind.header_bytes() + kind.code_bytes(),
        }
    }
}

/// ggml's name of a type that is not converted, for error messages.
pub fn unsupported_type_name(type_id: u32) -> String {
    let name = match type_id {
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("ggml type {type_id}"),
    };
    name.to_owned()
}

impl Float {
    /// The checkpoint's dtype.
    pub fn dtype(self) -> Dtype {
        match self {
            Float::F32 => Dtype::F32,
            Float::F16 => Dtype::F16,
            Float::BF16 => Dtype::BF16,
        }
    }
}

impl BlockKind {
    /// Bits of a code.
    pub fn bits(self) -> usize {
        match self {
            BlockKind::Q4_0 | BlockKind::Q4_1 => 4,
            BlockKind::Q8_0 => 8,
        }
    }

    /// Bytes of scale, and minimum, before the codes.
    fn header_bytes(self) -> usize {
        match self {
            BlockKind::Q4_0 | BlockKind::Q8_0 => 2,
            BlockKind::Q4_1 => 4,
        }
    }

    fn code_bytes(self) -> usize {
        GROUP_SIZE * self.bits() / 8
    }

    /// Scale and bias of the block that starts with `header`, both exact in f32.
    fn affine(self, header: &[u8]) -> (f32, f32) {
        let scale = half_at(header, 0);
        match self {
            BlockKind::Q4_0 => (scale, -8.0 * scale),
            BlockKind::Q4_1 => (scale, half_at(header, 2)),
            BlockKind::Q8_0 => (scale, -128.0 * scale),
        }
    }

    /// Appends the block's 32 codes as MLX packs them: value after value, low bits first.
    fn pack(self, codes: &[u8], packed: &mut Vec<u8>) {
        match self {
            BlockKind::Q8_0 => packed.extend(codes.iter().map(|code| code ^ 0x80)),
            BlockKind::Q4_0 | BlockKind::Q4_1 => {
                debug_assert_eq!(codes.len(), NIBBLE_BYTES);
                let pairs = || codes.chunks_exact(2);
                packed.extend(pairs().map(|pair| pair[0] & 0x0f | pair[1] << 4));
                packed.extend(pairs().map(|pair| pair[0] >> 4 | pair[1] & 0xf0));
            }
        }
    }
}

fn half_at(header: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([header[offset], header[offset + 1]]).to_f32()
}

/// In which order the file stores a tensor's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// As the checkpoint.
    Natural,
    /// Within each head of this many rows, the two halves are interleaved: GGUF's `llama` rotates neighbours where
    /// the checkpoint rotates row `j` with row `j + head_rows / 2`. `head_rows` is even and divides the row count.
    Interleaved {
        /// Rows of one head.
        head_rows: usize,
    },
}

impl RowOrder {
    /// The row of the file that is row `row` of the checkpoint.
    pub fn source_row(self, row: usize) -> usize {
        match self {
            RowOrder::Natural => row,
            RowOrder::Interleaved { head_rows } => {
                let half_rows = head_rows / 2;
                let (head, within) = (row / head_rows, row % head_rows);
                head * head_rows + 2 * (within % half_rows) + within / half_rows
            }
        }
    }
}

/// A tensor's bytes as rows in the checkpoint's order. `bytes` is a whole number of rows.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The rows as the file has them.
    pub bytes: &'a [u8],
    /// Bytes of one row, not zero.
    pub row_bytes: usize,
    /// The file's order.
    pub order: RowOrder,
}

impl<'a> Rows<'a> {
    /// The rows in the checkpoint's order.
    fn iter(self) -> impl Iterator<Item = &'a [u8]> {
        let count = self.bytes.len() / self.row_bytes;
        (0..count).map(move |row| {
            let start = self.order.source_row(row) * self.row_bytes;
            &self.bytes[start..start + self.row_bytes]
        })
    }

    /// All bytes in the checkpoint's order; copied only if that differs from the file's.
    pub fn in_order(self) -> Cow<'a, [u8]> {
        match self.order {
            RowOrder::Natural => Cow::Borrowed(self.bytes),
            RowOrder::Interleaved { .. } => Cow::Owned(self.iter().flatten().copied().collect()),
        }
    }
}

/// A matrix of blocks, ready to be written in MLX's form.
#[derive(Debug, Clone, Copy)]
pub struct BlockMatrix<'a> {
    kind: BlockKind,
    rows: Rows<'a>,
    precision: Float,
}

/// A block whose scale or minimum is infinite or not a number.
#[derive(Debug, PartialEq, Eq)]
pub struct NotFinite {
    /// The block's number in the file's order.
    pub block: usize,
}

impl<'a> BlockMatrix<'a> {
    /// Looks at every block's scale and bias: all must be finite, and they decide between f16 and f32. `rows` must be
    /// whole blocks of `kind`.
    ///
    /// # Errors
    /// [`NotFinite`] for the first block that no number could come from.
    pub fn survey(kind: BlockKind, rows: Rows<'a>) -> Result<BlockMatrix<'a>, NotFinite> {
        let mut precision = Float::F16;
        let block_bytes = Encoding::Blocks(kind).block_bytes();
        for (block, bytes) in rows.bytes.chunks_exact(block_bytes).enumerate() {
            let (scale, bias) = kind.affine(bytes);
            if !scale.is_finite() || !bias.is_finite() {
                return Err(NotFinite { block });
            }
            if f16::from_f32(bias).to_f32() != bias {
                precision = Float::F32;
            }
        }
        Ok(BlockMatrix {
            kind,
            rows,
            precision,
        })
    }

    /// The type of scales and biases: f16, or f32 where f16 cannot hold them exactly.
    pub fn precision(&self) -> Float {
        self.precision
    }

    /// The codes, packed little-endian into `u32`: `[out, in * bits / 32]`.
    pub fn codes(&self) -> Vec<u8> {
        let mut packed = Vec::with_capacity(self.block_count() * self.kind.code_bytes());
        for block in self.blocks() {
            self.kind
                .pack(&block[self.kind.header_bytes()..], &mut packed);
        }
        packed
    }

    /// The scales, `[out, in / 32]`, in [`BlockMatrix::precision`], little-endian.
    pub fn scales(&self) -> Vec<u8> {
        self.floats(|(scale, _)| scale)
    }

    /// The biases, `[out, in / 32]`, in [`BlockMatrix::precision`], little-endian.
    pub fn biases(&self) -> Vec<u8> {
        self.floats(|(_, bias)| bias)
    }

    fn floats(&self, pick: impl Fn((f32, f32)) -> f32) -> Vec<u8> {
        let width = Encoding::Plain(self.precision).block_bytes();
        let mut bytes = Vec::with_capacity(self.block_count() * width);
        for block in self.blocks() {
            let value = pick(self.kind.affine(block));
            match self.precision {
                Float::F32 => bytes.extend(value.to_le_bytes()),
                _ => bytes.extend(f16::from_f32(value).to_le_bytes()),
            }
        }
        bytes
    }

    fn block_count(&self) -> usize {
        self.rows.bytes.len() / Encoding::Blocks(self.kind).block_bytes()
    }

    fn blocks(&self) -> impl Iterator<Item = &'a [u8]> {
        let block_bytes = Encoding::Blocks(self.kind).block_bytes();
        self.rows
            .iter()
            .flat_map(move |row| row.chunks_exact(block_bytes))
    }
}
