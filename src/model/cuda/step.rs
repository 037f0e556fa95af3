//! The numbers of a step: what kernels need to know of its rows, laid out for one copy to the GPU.

use super::super::engine::{Part, Wanted};
use super::pages::{PAGE_TOKENS, Pages};
use mlx_pipe_cuda::{TILE, parts};
use std::ops::Range;

/// Most tokens of a tile.
#[derive(Debug, Clone, Copy)]
pub(super) struct TileSizes {
    /// Where few tokens of a sequence are computed.
    pub(super) few: usize,
    /// Where many are.
    pub(super) many: usize,
}

/// The numbers of a step. Where they stand depends only on how many there are of each kind, the table apart, which
/// comes last.
#[derive(Debug)]
pub(super) struct Numbers {
    pub(super) all: Vec<i32>,
    pub(super) tokens: Range<usize>,
    pub(super) places: Range<usize>,
    pub(super) few: Range<usize>,
    pub(super) many: Range<usize>,
    pub(super) wanted: Range<usize>,
    pub(super) table: Range<usize>,
    /// Parts of the longest sequence with few tokens.
    pub(super) parts: usize,
    /// Tokens of tiles of few.
    pub(super) few_tokens: usize,
}

impl Numbers {
    /// Of parts that have their pages. A sequence's tokens are of few tiles if one is enough for them.
    pub(super) fn new(
        tokens: &[u32],
        parts_of: &[Part],
        wanted: &[Wanted],
        pages: &Pages,
        sizes: TileSizes,
    ) -> Self {
        let mut places = Vec::new();
        let (mut few, mut many, mut table) = (Vec::new(), Vec::new(), Vec::new());
        let (mut most_parts, mut few_tokens) = (0, 0);
        for part in parts_of {
            let (of, span) = (pages.of(part.slot), part.span);
            let at = table.len();
            table.extend(of.iter().map(|&page| page as i32));
            for position in span.start..span.start + span.count {
                let page = of[position / PAGE_TOKENS] as usize;
                places.extend([position, page * PAGE_TOKENS + position % PAGE_TOKENS]);
            }
            let is_few = span.count <= sizes.few;
            let size = if is_few { sizes.few } else { sizes.many };
            for first in (0..span.count).step_by(size) {
                let count = size.min(span.count - first);
                let partial = if is_few { few_tokens } else { 0 };
                let tile: [usize; TILE] =
                    [span.row + first, count, span.start + first, at, partial];
                match is_few {
                    true => few.extend(tile),
                    false => many.extend(tile),
                }
            }
            if is_few {
                most_parts = most_parts.max(parts(span.start + span.count));
                few_tokens += span.count;
            }
        }
        let mut all = Vec::with_capacity(
            tokens.len() + places.len() + few.len() + many.len() + wanted.len() + table.len(),
        );
        let mut put = |numbers: &mut dyn Iterator<Item = i32>| {
            let start = all.len();
            all.extend(numbers);
            start..all.len()
        };
        let number = |&number: &usize| number as i32;
        Self {
            tokens: put(&mut tokens.iter().map(|&token| token as i32)),
            places: put(&mut places.iter().map(number)),
            few: put(&mut few.iter().map(number)),
            many: put(&mut many.iter().map(number)),
            wanted: put(&mut wanted.iter().map(|wanted| wanted.row as i32)),
            table: put(&mut table.iter().copied()),
            parts: most_parts,
            few_tokens,
            all,
        }
    }
}
