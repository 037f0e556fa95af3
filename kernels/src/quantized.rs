//! A weight in MLX's affine format, `w = scale * code + bias` with a scale and a bias for each group of a row,
//! repacked once so that a processor reads it from front to back.
//!
//! The rows are cut into blocks of sixteen, one for each lane. A block is its groups one after another; a
//! group is its codes, then sixteen scales, then sixteen biases, in the checkpoint's own dtype. Codes go in
//! units of 32 columns: planes of 4, 2 or 1 bits (8 bits: of bytes), each word of a plane of one row, so that
//! four columns of sixteen rows are one vector, a shift and a mask away. A unit takes exactly the bytes that
//! it takes in the checkpoint; only the last block may have rows of zeros beside.

use crate::arch::{LANES, VECTOR_BYTES};
use crate::memory::Buffer;
use crate::pool::Pool;
use half::{bf16, f16};

/// Columns of a unit of codes.
pub const UNIT_COLUMNS: usize = 32;

/// The element type of floats in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
}

impl FloatType {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Element `index` of little-endian floats.
    pub fn get(self, bytes: &[u8], index: usize) -> f32 {
        let at = &bytes[index * self.bytes()..][..self.bytes()];
        match self {
            Self::F32 => f32::from_le_bytes(at.try_into().expect("four bytes")),
            Self::F16 => f16::from_le_bytes(at.try_into().expect("two bytes")).to_f32(),
            Self::Bf16 => bf16::from_le_bytes(at.try_into().expect("two bytes")).to_f32(),
        }
    }
}

/// Shape and format of a quantised weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizedShape {
    /// Rows.
    pub outputs: usize,
    /// Columns, a multiple of the group size.
    pub inputs: usize,
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: usize,
    /// Columns that share a scale and a bias: 32, 64 or 128.
    pub group_size: usize,
    /// Dtype of scales and biases.
    pub scale_type: FloatType,
}

impl QuantizedShape {
    fn check(&self) {
        let Self {
            bits, group_size, ..
        } = *self;
        assert!(matches!(bits, 2..=6 | 8), "codes of {bits} bits");
        assert!(
            matches!(group_size, 32 | 64 | 128),
            "groups of {group_size}"
        );
        assert!(self.inputs.is_multiple_of(group_size), "a part of a group");
    }

    /// Groups in a row.
    pub fn groups(&self) -> usize {
        self.inputs / self.group_size
    }

    /// Blocks of sixteen rows.
    pub fn blocks(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// Bytes of a row's codes in the checkpoint.
    pub fn row_bytes(&self) -> usize {
        self.inputs * self.bits / 8
    }

    /// Bytes of a unit's codes for a block.
    pub fn unit_bytes(&self) -> usize {
        self.bits * VECTOR_BYTES
    }

    /// Bytes of a group's codes for a block.
    pub fn codes_bytes(&self) -> usize {
        self.group_size / UNIT_COLUMNS * self.unit_bytes()
    }

    /// Bytes of a group of a block: codes, scales, biases.
    pub fn group_bytes(&self) -> usize {
        self.codes_bytes() + 2 * LANES * self.scale_type.bytes()
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.groups() * self.group_bytes()
    }
}

/// A quantised weight `[outputs, inputs]`, repacked.
#[derive(Debug)]
pub struct Quantized {
    shape: QuantizedShape,
    buffer: Buffer,
}

impl Quantized {
    /// A weight of zeros, to be filled by [`Self::pack`].
    ///
    /// # Panics
    /// A shape that the format does not have.
    pub fn zeroed(shape: QuantizedShape) -> Self {
        shape.check();
        Self {
            shape,
            buffer: Buffer::zeroed(shape.blocks() * shape.block_bytes()),
        }
    }

    /// The shape.
    pub fn shape(&self) -> &QuantizedShape {
        &self.shape
    }

    /// A block's bytes.
    pub(crate) fn block(&self, block: usize) -> &[u8] {
        let bytes = self.shape.block_bytes();
        &self.buffer.as_slice()[block * bytes..][..bytes]
    }

    /// Packs rows as the checkpoint holds them, from the first row of block `first` on, on all threads.
    ///
    /// # Panics
    /// Rows that end within a block that is not the last one, or slices of other lengths than the shape says.
    pub fn pack(&mut self, pool: &Pool, first: usize, rows: PackedRows) {
        let shape = self.shape;
        let row_bytes = shape.row_bytes();
        let row_floats = shape.groups() * shape.scale_type.bytes();
        let count = rows.codes.len() / row_bytes.max(1);
        assert!(count.is_multiple_of(LANES) || first * LANES + count == shape.outputs);
        let blocks = first..first + count.div_ceil(LANES);
        let block_bytes = shape.block_bytes();
        self.buffer
            .for_each_block(pool, block_bytes, blocks, |index, block| {
                let of_block = index * LANES..count.min((index + 1) * LANES);
                let part = |bytes: usize| of_block.start * bytes..of_block.end * bytes;
                let rows = PackedRows {
                    codes: &rows.codes[part(row_bytes)],
                    scales: &rows.scales[part(row_floats)],
                    biases: &rows.biases[part(row_floats)],
                };
                pack_block(&shape, rows, block);
            });
    }

    /// Row `row` as floats, `[inputs]`.
    ///
    /// # Panics
    /// No such row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.shape.outputs,
            "row {row} of {}",
            self.shape.outputs
        );
        let (lane, groups) = (row % LANES, self.block(row / LANES));
        let columns = out.chunks_exact_mut(self.shape.group_size);
        for (group, out) in groups.chunks_exact(self.shape.group_bytes()).zip(columns) {
            let (codes, floats) = group.split_at(self.shape.codes_bytes());
            let scale = self.shape.scale_type.get(floats, lane);
            let bias = self.shape.scale_type.get(floats, LANES + lane);
            for (column, out) in out.iter_mut().enumerate() {
                *out = scale.mul_add(f32::from(code(self.shape.bits, codes, lane, column)), bias);
            }
        }
    }
}

/// A few rows of a weight as the checkpoint holds them, row-major, little-endian.
#[derive(Debug, Clone, Copy)]
pub struct PackedRows<'a> {
    /// `[rows, inputs * bits / 32]` words.
    pub codes: &'a [u8],
    /// `[rows, groups]`.
    pub scales: &'a [u8],
    /// `[rows, groups]`.
    pub biases: &'a [u8],
}

/// Packs up to sixteen rows into a block of zeros.
///
/// # Panics
/// Slices of other lengths than the shape says.
fn pack_block(shape: &QuantizedShape, rows: PackedRows, block: &mut [u8]) {
    let count = rows.codes.len() / shape.row_bytes().max(1);
    let float_bytes = shape.scale_type.bytes();
    let row_floats = shape.groups() * float_bytes;
    assert!(count <= LANES && rows.codes.len() == count * shape.row_bytes());
    assert_eq!(rows.scales.len(), count * row_floats);
    assert_eq!(rows.biases.len(), count * row_floats);
    assert_eq!(block.len(), shape.block_bytes());
    let unit_row_bytes = UNIT_COLUMNS * shape.bits / 8;
    let units = shape.group_size / UNIT_COLUMNS;
    for (group, out) in block.chunks_exact_mut(shape.group_bytes()).enumerate() {
        let (codes, floats) = out.split_at_mut(shape.codes_bytes());
        for (unit, out) in codes.chunks_exact_mut(shape.unit_bytes()).enumerate() {
            let at = (group * units + unit) * unit_row_bytes;
            for lane in 0..count {
                let row = &rows.codes[lane * shape.row_bytes() + at..][..unit_row_bytes];
                pack_unit(shape.bits, row, lane, out);
            }
        }
        let (scales, biases) = floats.split_at_mut(LANES * float_bytes);
        for lane in 0..count {
            let from = lane * row_floats + group * float_bytes..;
            let to = lane * float_bytes..(lane + 1) * float_bytes;
            scales[to.clone()].copy_from_slice(&rows.scales[from.clone()][..float_bytes]);
            biases[to].copy_from_slice(&rows.biases[from][..float_bytes]);
        }
    }
}

/// The planes that codes of so many bits are made of, lowest bits first.
fn planes(bits: usize) -> &'static [usize] {
    match bits {
        2 => &[2],
        3 => &[2, 1],
        4 => &[4],
        5 => &[4, 1],
        6 => &[4, 2],
        _ => &[8],
    }
}

/// Packs 32 columns of one row.
#[inline]
fn pack_unit(bits: usize, row: &[u8], lane: usize, unit: &mut [u8]) {
    let mut put = |vector: usize, word: u32| {
        unit[vector * VECTOR_BYTES + 4 * lane..][..4].copy_from_slice(&word.to_le_bytes());
    };
    match bits {
        8 => {
            for (quad, codes) in row.chunks_exact(4).enumerate() {
                put(
                    quad,
                    u32::from_le_bytes(codes.try_into().expect("four bytes")),
                );
            }
        }
        4 => {
            for (vector, codes) in row.chunks_exact(4).enumerate() {
                let word = u32::from_le_bytes(codes.try_into().expect("four bytes"));
                put(vector, spread(word & 0xFFFF) | spread(word >> 16) << 4);
            }
        }
        _ => {
            let mut codes = [0u8; UNIT_COLUMNS];
            for (column, code) in codes.iter_mut().enumerate() {
                *code = code_in_stream(bits, row, column);
            }
            let (mut vector, mut shift) = (0, 0);
            for &plane in planes(bits) {
                let mask = (1u8 << plane) - 1;
                for codes in codes.chunks_exact(4 * (8 / plane)) {
                    let word = codes.iter().enumerate().fold(0u32, |word, (index, code)| {
                        let field = u32::from(code >> shift & mask);
                        word | field << (8 * (index % 4) + plane * (index / 4))
                    });
                    put(vector, word);
                    vector += 1;
                }
                shift += plane;
            }
        }
    }
}

/// Four nibbles as the low nibbles of four bytes.
#[inline]
fn spread(nibbles: u32) -> u32 {
    let pairs = (nibbles | nibbles << 8) & 0x00FF_00FF;
    (pairs | pairs << 4) & 0x0F0F_0F0F
}

/// Code `column` of a row of packed codes, lowest bits first.
#[inline]
fn code_in_stream(bits: usize, row: &[u8], column: usize) -> u8 {
    let (byte, shift) = (column * bits / 8, column * bits % 8);
    let low = u16::from(row[byte]);
    let high = row.get(byte + 1).map_or(0, |&byte| u16::from(byte));
    ((low | high << 8) >> shift & ((1 << bits) - 1)) as u8
}

/// Code `column` of row `lane` of a group's codes.
fn code(bits: usize, codes: &[u8], lane: usize, column: usize) -> u8 {
    let unit = &codes[column / UNIT_COLUMNS * bits * VECTOR_BYTES..];
    let column = column % UNIT_COLUMNS;
    let (mut vector, mut shift, mut code) = (0, 0, 0);
    for &plane in planes(bits) {
        let columns = 4 * (8 / plane);
        let at = (vector + column / columns) * VECTOR_BYTES + 4 * lane + column % 4;
        let field = u16::from(unit[at]) >> (plane * (column % columns / 4));
        code |= (field & ((1 << plane) - 1)) << shift;
        vector += UNIT_COLUMNS / columns;
        shift += plane;
    }
    code as u8
}
