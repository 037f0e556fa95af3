//! The values of blocks, and the order of rows, against plain versions of GGUF's own definitions.

use half::f16;
use proptest::prelude::*;

use super::super::blocks::{
    BlockKind, BlockMatrix, Encoding, Float, GROUP_SIZE, NotFinite, RowOrder, Rows,
};

/// GGUF's definition of a block's values, value by value, as in ggml's dequantisation.
pub fn gguf_values(kind: BlockKind, block: &[u8]) -> Vec<f32> {
    let half = |offset: usize| f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32();
    let nibble = |codes: &[u8], index: usize| match index < 16 {
        true => codes[index] & 0x0f,
        false => codes[index - 16] >> 4,
    };
    (0..GROUP_SIZE)
        .map(|index| match kind {
            BlockKind::Q4_0 => (f32::from(nibble(&block[2..], index)) - 8.0) * half(0),
            BlockKind::Q4_1 => f32::from(nibble(&block[4..], index)) * half(0) + half(2),
            BlockKind::Q8_0 => f32::from(block[2 + index] as i8) * half(0),
        })
        .collect()
}

/// MLX's definition: code `i` is the `i`-th field of `bits` bits of the little-endian row; `scale * code + bias`.
pub fn mlx_values(bits: usize, codes: &[u8], scales: &[f32], biases: &[f32]) -> Vec<f32> {
    let code = |index: usize| {
        let bit = index * bits;
        (usize::from(codes[bit / 8]) >> (bit % 8)) & ((1 << bits) - 1)
    };
    (0..codes.len() * 8 / bits)
        .map(|index| scales[index / GROUP_SIZE] * code(index) as f32 + biases[index / GROUP_SIZE])
        .collect()
}

/// Reads little-endian floats.
pub fn floats(float: Float, bytes: &[u8]) -> Vec<f32> {
    match float {
        Float::F32 => bytes
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .collect(),
        Float::F16 => bytes
            .chunks_exact(2)
            .map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32())
            .collect(),
        Float::BF16 => bytes
            .chunks_exact(2)
            .map(|bytes| half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32())
            .collect(),
    }
}

/// Equal to the last bit, except that zeros may differ in sign.
pub fn assert_same_values(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || (*found == 0.0 && *expected == 0.0);
        assert!(
            same,
            "{what}: value {index} is {found:e}, expected {expected:e}"
        );
    }
}

fn matrix(kind: BlockKind, blocks: &[u8]) -> Result<BlockMatrix<'_>, NotFinite> {
    let rows = Rows {
        bytes: blocks,
        row_bytes: Encoding::Blocks(kind).block_bytes(),
        order: RowOrder::Natural,
    };
    BlockMatrix::survey(kind, rows)
}

/// Converts blocks and compares every value; returns the precision that was needed.
fn check_values(kind: BlockKind, blocks: &[u8]) -> Float {
    let matrix = matrix(kind, blocks).expect("the test's scales are finite");
    let precision = matrix.precision();
    let scales = floats(precision, &matrix.scales());
    let biases = floats(precision, &matrix.biases());
    let found = mlx_values(kind.bits(), &matrix.codes(), &scales, &biases);
    let expected: Vec<f32> = blocks
        .chunks_exact(Encoding::Blocks(kind).block_bytes())
        .flat_map(|block| gguf_values(kind, block))
        .collect();
    assert_same_values(&found, &expected, &format!("{kind:?}"));
    precision
}

/// Every finite f16.
fn finite_halves() -> impl Iterator<Item = f16> {
    (0..=u16::MAX)
        .map(f16::from_bits)
        .filter(|half| half.is_finite())
}

#[test]
fn every_q4_0_scale_with_every_code_keeps_its_values() {
    let codes: Vec<u8> = (0..16).map(|code| code << 4 | (15 - code)).collect();
    let block = |scale: f16| [&scale.to_le_bytes()[..], &codes].concat();
    let blocks: Vec<u8> = finite_halves().flat_map(block).collect();
    assert_eq!(check_values(BlockKind::Q4_0, &blocks), Float::F32);
}

#[test]
fn every_q8_0_scale_with_every_code_keeps_its_values() {
    for start in (0..=255u8).step_by(GROUP_SIZE) {
        let codes: Vec<u8> = (start..=start + 31).collect();
        let block = |scale: f16| [&scale.to_le_bytes()[..], &codes].concat();
        let blocks: Vec<u8> = finite_halves().flat_map(block).collect();
        assert_eq!(check_values(BlockKind::Q8_0, &blocks), Float::F32);
    }
}

#[test]
fn scales_and_biases_are_f32_only_where_the_bias_overflows_f16() {
    // f16 ends at 65504: 8 * 8188 = 65504 fits, the next scale, 8192, does not; 128 * 511.75 fits, 512 does not.
    for (kind, code_bytes, fits, overflows) in [
        (BlockKind::Q4_0, 16, 8188.0, 8192.0),
        (BlockKind::Q8_0, 32, 511.75, 512.0),
    ] {
        for (scale, precision) in [
            (fits, Float::F16),
            (-fits, Float::F16),
            (overflows, Float::F32),
            (-overflows, Float::F32),
        ] {
            let mut block = f16::from_f32(scale).to_le_bytes().to_vec();
            block.extend((0..code_bytes).map(|index| index * 7));
            assert_eq!(
                check_values(kind, &block),
                precision,
                "{kind:?} with scale {scale}"
            );
        }
    }
}

#[test]
fn a_scale_or_minimum_that_is_no_number_is_refused() {
    for bad in [f16::INFINITY, f16::NEG_INFINITY, f16::NAN] {
        for (kind, bad_at) in [
            (BlockKind::Q4_0, 0),
            (BlockKind::Q4_1, 0),
            (BlockKind::Q4_1, 2),
            (BlockKind::Q8_0, 0),
        ] {
            let block_bytes = Encoding::Blocks(kind).block_bytes();
            let mut blocks = vec![0; 3 * block_bytes];
            let at = 2 * block_bytes + bad_at;
            blocks[at..at + 2].copy_from_slice(&bad.to_le_bytes());
            assert_eq!(matrix(kind, &blocks).err(), Some(NotFinite { block: 2 }));
        }
    }
}

proptest! {
    #[test]
    fn any_q4_1_block_keeps_its_values(scale: u16, minimum: u16, codes: [u8; 16]) {
        let (scale, minimum) = (f16::from_bits(scale), f16::from_bits(minimum));
        prop_assume!(scale.is_finite() && minimum.is_finite());
        let block = [&scale.to_le_bytes()[..], &minimum.to_le_bytes(), &codes].concat();
        prop_assert_eq!(check_values(BlockKind::Q4_1, &block), Float::F16);
    }
}

/// What the converter to GGUF does to q and k: within each head, row `j` of the first half is followed by row `j` of
/// the second.
pub fn interleave<T: Clone>(rows: &[T], head_rows: usize) -> Vec<T> {
    rows.chunks(head_rows)
        .flat_map(|head| {
            let (first, second) = head.split_at(head_rows / 2);
            first
                .iter()
                .zip(second)
                .flat_map(|(a, b)| [a.clone(), b.clone()])
        })
        .collect()
}

#[test]
fn undoing_the_interleaving_gives_every_row_back_for_all_head_sizes() {
    for head_rows in (2..=128).step_by(2) {
        for heads in 1..=5 {
            let rows: Vec<usize> = (0..heads * head_rows).collect();
            let stored = interleave(&rows, head_rows);
            let order = RowOrder::Interleaved { head_rows };
            let restored: Vec<usize> = rows
                .iter()
                .map(|&row| stored[order.source_row(row)])
                .collect();
            assert_eq!(restored, rows, "{heads} heads of {head_rows}");
        }
    }
}
