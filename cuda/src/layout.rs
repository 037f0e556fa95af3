//! Weights in the order in which the kernels read them (`Tile` of the kernels).
//!
//! Sixteen rows of a block (64 columns, or a group of 32) stand together. Lane `l` of a warp has of rows `l / 4` and
//! `l / 4 + 8` the quarter `l % 4` of the block's columns; what it has is cut into vectors of up to sixteen bytes, and
//! the first vectors of all lanes come first. So a warp reads memory without gaps, whatever the width of the weight.
//!
//! Codes of 4 bits stand in pairs, one in either half of a word at the same place, so that one operation takes both.

use crate::program::Format;
use rayon::prelude::*;

/// Rows of a tile.
const TILE_ROWS: usize = 16;
/// Lanes that share a row.
const QUARTERS: usize = 4;
/// Most bytes of a vector.
const VECTOR_BYTES: usize = 16;

/// `codes`: `[outputs, inputs]`, row by row, as the checkpoint has them; `outputs` a multiple of 16, `inputs` of the
/// format's block.
pub fn arrange_codes(format: Format, inputs: usize, codes: &[u8]) -> Vec<u8> {
    let row_bytes = inputs * format.bits / 8;
    let block_bytes = format.block() * format.bits / 8;
    let quarter = block_bytes / QUARTERS;
    let vector = VECTOR_BYTES.min(2 * quarter);
    let piece = VECTOR_BYTES.min(quarter);
    let mut arranged = vec![0; codes.len()];
    let tiles = arranged.par_chunks_exact_mut(TILE_ROWS * row_bytes);
    let of_tiles = tiles.zip(codes.par_chunks_exact(TILE_ROWS * row_bytes));
    of_tiles.for_each(|(to, from)| {
        for (row, from) in from.chunks_exact(row_bytes).enumerate() {
            let (half, row) = (row / 8, row % 8);
            for (block, from) in from.chunks_exact(block_bytes).enumerate() {
                let to = &mut to[block * TILE_ROWS * block_bytes..][..TILE_ROWS * block_bytes];
                for (part, from) in from.chunks_exact(piece).enumerate() {
                    let lane = row * QUARTERS + part * piece / quarter;
                    let of_lane = half * quarter + part * piece % quarter;
                    let at = (of_lane / vector * 32 + lane) * vector + of_lane % vector;
                    to[at..at + piece].copy_from_slice(from);
                    if format.bits == 4 {
                        for word in to[at..at + piece].as_chunks_mut::<4>().0 {
                            *word = in_pairs(u32::from_le_bytes(*word)).to_le_bytes();
                        }
                    }
                }
            }
        }
    });
    arranged
}

/// A word of eight codes, so that the first two are the first of its halves, and so on.
fn in_pairs(word: u32) -> u32 {
    (0..4).fold(0, |all, pair| {
        let of_pair = word >> (8 * pair);
        all | (of_pair & 15) << (4 * pair) | (of_pair >> 4 & 15) << (16 + 4 * pair)
    })
}

/// `scales`, `biases`: `[outputs, groups]` of elements of two bytes, row by row -> `[outputs / 16, groups, 8]` of the
/// scale and the bias of row `i` and of row `i + 8`.
pub fn arrange_scales(groups: usize, scales: &[u8], biases: &[u8]) -> Vec<u8> {
    let tile = TILE_ROWS * groups * 2;
    let mut arranged = vec![0; scales.len() * 2];
    let tiles = arranged.par_chunks_exact_mut(2 * tile);
    let of_tiles = tiles.zip(
        scales
            .par_chunks_exact(tile)
            .zip(biases.par_chunks_exact(tile)),
    );
    of_tiles.for_each(|(to, (scales, biases))| {
        for (place, to) in to.chunks_exact_mut(4).enumerate() {
            let (half, row, group) = (place % 2, place / 2 % 8, place / 16);
            let from = ((half * 8 + row) * groups + group) * 2;
            to[..2].copy_from_slice(&scales[from..from + 2]);
            to[2..].copy_from_slice(&biases[from..from + 2]);
        }
    });
    arranged
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the kernels look for a code (`look_up` of the kernels), in bits from the start.
    fn place(format: Format, inputs: usize, row: usize, column: usize) -> usize {
        let (bits, block) = (format.bits, format.block());
        let words = block / 16 * 4 * bits / 32;
        let vector = 4.min(2 * words);
        let lane = row % 8 * 4 + column % block / (block / 4);
        let word = row % 16 / 8 * words + column % (block / 4) * bits / 32;
        let bit = match bits {
            4 => column % 2 * 16 + column % 8 / 2 * 4,
            _ => column % (32 / bits) * bits,
        };
        let first = (row / 16 * (inputs / block) + column / block) * (2 * words * 32);
        (first + (word / vector * 32 + lane) * vector + word % vector) * 32 + bit
    }

    #[test]
    fn every_code_is_where_the_kernels_look_for_it() {
        for (bits, group_size) in [
            (4, 32),
            (4, 64),
            (4, 128),
            (8, 32),
            (8, 64),
            (8, 128),
            (16, 64),
        ] {
            let format = Format { bits, group_size };
            let (outputs, inputs) = (48, 384);
            let codes: Vec<u8> = (0..outputs * inputs * bits / 8)
                .map(|at| (at * 31 + at / 251 * 7) as u8)
                .collect();
            let arranged = arrange_codes(format, inputs, &codes);
            let code = |bytes: &[u8], bit: usize| match bits {
                4 => u16::from(bytes[bit / 8] >> (bit % 8) & 15),
                8 => u16::from(bytes[bit / 8]),
                _ => u16::from_le_bytes([bytes[bit / 8], bytes[bit / 8 + 1]]),
            };
            for row in 0..outputs {
                for column in 0..inputs {
                    assert_eq!(
                        code(&arranged, place(format, inputs, row, column)),
                        code(&codes, (row * inputs + column) * bits),
                        "{format:?}, row {row}, column {column}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_scale_is_where_the_kernels_look_for_it() {
        let (outputs, groups) = (32, 3);
        let number =
            |kind: usize, row: usize, group: usize| (kind * 1000 + row * 10 + group) as u16;
        let rows = |kind: usize| -> Vec<u8> {
            (0..outputs * groups)
                .flat_map(|at| number(kind, at / groups, at % groups).to_le_bytes())
                .collect()
        };
        let arranged = arrange_scales(groups, &rows(1), &rows(2));
        for row in 0..outputs {
            for group in 0..groups {
                let first = (row / 16 * groups + group) * 32 + row % 8 * 4 + row % 16 / 8 * 2;
                for kind in 0..2 {
                    let at = (first + kind) * 2;
                    let found = u16::from_le_bytes([arranged[at], arranged[at + 1]]);
                    assert_eq!(found, number(kind + 1, row, group));
                }
            }
        }
    }
}
