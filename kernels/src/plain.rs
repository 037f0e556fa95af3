//! A weight of plain floats, in the checkpoint's dtype, in blocks of sixteen rows: for each column the
//! sixteen rows' elements beside one another.

use crate::arch::LANES;
use crate::memory::Buffer;
use crate::pool::Pool;
use crate::quantized::FloatType;

/// Shape and dtype of a weight of floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlainShape {
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// Dtype.
    pub float_type: FloatType,
}

impl PlainShape {
    /// Blocks of sixteen rows.
    pub fn blocks(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// Bytes of a row in the checkpoint.
    pub fn row_bytes(&self) -> usize {
        self.inputs * self.float_type.bytes()
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        LANES * self.row_bytes()
    }
}

/// A weight `[outputs, inputs]` of floats, repacked.
#[derive(Debug)]
pub struct Plain {
    shape: PlainShape,
    buffer: Buffer,
}

impl Plain {
    /// A weight of zeros, to be filled by [`Self::pack`].
    pub fn zeroed(shape: PlainShape) -> Self {
        Self {
            shape,
            buffer: Buffer::zeroed(shape.blocks() * shape.block_bytes()),
        }
    }

    /// The shape.
    pub fn shape(&self) -> &PlainShape {
        &self.shape
    }

    /// A block's bytes.
    pub(crate) fn block(&self, block: usize) -> &[u8] {
        let bytes = self.shape.block_bytes();
        &self.buffer.as_slice()[block * bytes..][..bytes]
    }

    /// Packs rows (row-major, little-endian) from the first row of block `first` on, on all threads.
    ///
    /// # Panics
    /// Rows that end within a block that is not the last one.
    pub fn pack(&mut self, pool: &Pool, first: usize, rows: &[u8]) {
        let shape = self.shape;
        let row_bytes = shape.row_bytes();
        let count = rows.len() / row_bytes.max(1);
        assert!(count.is_multiple_of(LANES) || first * LANES + count == shape.outputs);
        let blocks = first..first + count.div_ceil(LANES);
        let block_bytes = shape.block_bytes();
        self.buffer
            .for_each_block(pool, block_bytes, blocks, |index, block| {
                let of_block = index * LANES..count.min((index + 1) * LANES);
                let rows = &rows[of_block.start * row_bytes..of_block.end * row_bytes];
                pack_plain_block(&shape, rows, block);
            });
    }

    /// Row `row` as f32, `[inputs]`.
    ///
    /// # Panics
    /// No such row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.shape.outputs,
            "row {row} of {}",
            self.shape.outputs
        );
        let block = self.block(row / LANES);
        for (column, out) in out.iter_mut().enumerate() {
            *out = self
                .shape
                .float_type
                .get(block, column * LANES + row % LANES);
        }
    }
}

/// Packs up to sixteen rows (row-major, little-endian) into a block of zeros.
///
/// # Panics
/// Slices of other lengths than the shape says.
fn pack_plain_block(shape: &PlainShape, rows: &[u8], block: &mut [u8]) {
    let count = rows.len() / shape.row_bytes().max(1);
    assert!(count <= LANES && rows.len() == count * shape.row_bytes());
    assert_eq!(block.len(), shape.block_bytes());
    match shape.float_type.bytes() {
        4 => interleave::<4>(rows, count, block),
        _ => interleave::<2>(rows, count, block),
    }
}

fn interleave<const BYTES: usize>(rows: &[u8], count: usize, block: &mut [u8]) {
    let row_bytes = rows.len() / count.max(1);
    for lane in 0..count {
        let row = rows[lane * row_bytes..][..row_bytes].chunks_exact(BYTES);
        for (element, column) in row.zip(block.chunks_exact_mut(LANES * BYTES)) {
            column[lane * BYTES..][..BYTES].copy_from_slice(element);
        }
    }
}
