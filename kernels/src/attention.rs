//! Causal attention with grouped queries over a cache of keys and values.
//!
//! A query goes over the blocks of the cache in order and keeps the largest score, the sum and the weighted
//! values so far (the online softmax), so its result depends on its position and what lies before, not on the
//! queries it is computed with.

use crate::arch::{Kernel, LANES, Simd};
use crate::isa::Isa;
use crate::kv_cache::{BLOCK_TOKENS, HeadShape, Kept, KvCache, LARGEST_KEPT, Number, Places};
use crate::math::{exp, load_part, scale_to, store_part, whole_numbers};
use crate::pool::Pool;
use crate::rows::{Norm, normalise};
use crate::step::{Rotation, Span, Step};

/// Rows of scores, one for each query and head, that a thread works on at a time.
const ROWS: usize = 32;

/// What no score reaches: its exponential is 0.
const HIDDEN: f32 = -3.0e38;

/// One layer's attention.
#[derive(Debug)]
pub struct Attention {
    /// Sizes.
    pub shape: HeadShape,
    /// Norms of queries and keys over a head.
    pub qk_norm: Option<[Norm; 2]>,
}

/// Rotates, keeps and attends. `qkv`: `[tokens, qkv_width]`, queries, keys and values beside one another, and left
/// with the queries rotated; `caches`: of each span's sequence, of `span.start` tokens, and longer by the span afterwards;
/// `out`: `[tokens, width]`.
///
/// # Panics
/// Slices of other lengths, or a cache that is not where its span starts.
pub fn attend(
    (isa, pool): (Isa, &Pool),
    attention: &Attention,
    step: &Step,
    caches: &mut [&mut KvCache],
    qkv: &mut [f32],
    out: &mut [f32],
) {
    let shape = attention.shape;
    let tokens: usize = step.spans.iter().map(|span| span.count).sum();
    assert!(shape.head_count.is_multiple_of(shape.kv_head_count));
    assert_eq!(qkv.len(), tokens * shape.qkv_width());
    assert_eq!(out.len(), tokens * shape.width());
    assert_eq!(caches.len(), step.spans.len());
    assert_eq!(2 * step.rotation.pairs, shape.head_dim);
    assert_eq!(step.rotation.cosines.len(), tokens * step.rotation.pairs);
    for norm in attention.qk_norm.iter().flatten() {
        assert_eq!(norm.weight.len(), shape.head_dim);
    }
    let mut row = 0;
    let mut sequences = Vec::with_capacity(caches.len());
    for (span, cache) in step.spans.iter().zip(caches) {
        assert_eq!(
            (span.row, span.start),
            (row, cache.length()),
            "a span out of place"
        );
        assert_eq!(cache.shape, shape);
        row += span.count;
        cache.resize(span.start + span.count);
        sequences.push(Sequence {
            span: *span,
            blocks: cache.places(span.start),
        });
    }
    let task = Task {
        attention,
        rotation: &step.rotation,
        sequences: &sequences,
        qkv: qkv.as_mut_ptr(),
        out: out.as_mut_ptr(),
    };
    let of_tokens: Vec<_> = sequences
        .iter()
        .flat_map(|sequence| (0..sequence.span.count).map(move |token| (sequence, token)))
        .collect();
    pool.run(tokens, &|unit| {
        let (sequence, token) = of_tokens[unit];
        isa.run(Keep {
            task: &task,
            sequence,
            token,
        });
    });
    let units = task.units();
    pool.run(units.len(), &|unit| {
        isa.run(Attend {
            task: &task,
            unit: &units[unit],
        })
    });
}

/// A span and the blocks of its cache.
struct Sequence {
    span: Span,
    blocks: Places,
}

impl Sequence {
    /// The block of a position that the step writes.
    fn own_block(&self, position: usize) -> *mut f32 {
        self.blocks.own[position / BLOCK_TOKENS - self.blocks.shared.len()]
    }

    /// All blocks, in the order of their positions.
    fn all_blocks(&self) -> impl Iterator<Item = *const f32> {
        let own = self.blocks.own.iter().map(|block| block.cast_const());
        self.blocks.shared.iter().copied().chain(own)
    }
}

struct Task<'a> {
    attention: &'a Attention,
    rotation: &'a Rotation,
    sequences: &'a [Sequence],
    /// Written by `Keep`, each token by one thread; then only read.
    qkv: *mut f32,
    /// Each token and head by one thread.
    out: *mut f32,
}

// SAFETY: the pointers are into slices and caches that `attend` holds, and threads write to places of their own: of
// queries, keys and values those of a token, of the results those of a unit. Blocks that other caches hold too are
// only read, here and there.
unsafe impl Sync for Task<'_> {}
// SAFETY: as above.
unsafe impl Sync for Sequence {}

/// Some tokens of a sequence and the query heads that share one head of keys and values.
struct Unit<'a> {
    sequence: &'a Sequence,
    kv_head: usize,
    /// First token of the span.
    first: usize,
    count: usize,
}

impl Task<'_> {
    fn group(&self) -> usize {
        self.attention.shape.head_count / self.attention.shape.kv_head_count
    }

    fn units(&self) -> Vec<Unit<'_>> {
        let at_once = (ROWS / self.group()).max(1);
        let mut units = Vec::new();
        for sequence in self.sequences {
            let tokens = sequence.span.count;
            // The last tokens have the most to look at: they go first.
            for first in (0..tokens).step_by(at_once).rev() {
                units.extend((0..self.attention.shape.kv_head_count).map(|kv_head| Unit {
                    sequence,
                    kv_head,
                    first,
                    count: at_once.min(tokens - first),
                }));
            }
        }
        units
    }
}

/// Norms and rotates a token's queries and keys, and puts keys and values into the cache.
struct Keep<'a> {
    task: &'a Task<'a>,
    sequence: &'a Sequence,
    token: usize,
}

impl Kernel for Keep<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.task.attention.shape.kept {
                Kept::F32 => self.keep::<S, f32>(),
                Kept::I16 => self.keep::<S, i16>(),
            }
        }
    }
}

impl Keep<'_> {
    /// # Safety
    /// The processor has `S`; the blocks hold `N`.
    #[inline(always)]
    unsafe fn keep<S: Simd, N: Number>(self) {
        let shape = self.task.attention.shape;
        let dim = shape.head_dim;
        let row = self.sequence.span.row + self.token;
        let position = self.sequence.span.start + self.token;
        let rotation = self.task.rotation;
        let scale = 1.0 / (dim as f32).sqrt();
        let (q_norm, k_norm) = match &self.task.attention.qk_norm {
            None => (None, None),
            Some([q, k]) => (Some(q), Some(k)),
        };
        // SAFETY: row and heads are inside of `qkv`, position inside of the blocks; lengths were checked.
        unsafe {
            let cosines = rotation.cosines.as_ptr().add(row * rotation.pairs);
            let sines = rotation.sines.as_ptr().add(row * rotation.pairs);
            let angles = [cosines, sines];
            let queries = self.task.qkv.add(row * shape.qkv_width());
            for head in 0..shape.head_count {
                rotate::<S>(queries.add(head * dim), dim, q_norm, angles, scale);
            }
            let words = self.sequence.own_block(position);
            let block = words.cast::<N>();
            // Of keys and of values; read and written where numbers are scaled only.
            let of_keys = words.wrapping_add(shape.numbers_words());
            let of_values = of_keys.wrapping_add(shape.kv_head_count * BLOCK_TOKENS);
            let slot = position % BLOCK_TOKENS;
            let keys = queries.add(shape.width());
            let values = keys.add(shape.kv_head_count * dim);
            for head in 0..shape.kv_head_count {
                let key = keys.add(head * dim);
                rotate::<S>(key, dim, k_norm, angles, 1.0);
                let kept = block.add(head * dim * BLOCK_TOKENS);
                let kept = kept.add(slot / LANES * dim * LANES + slot % LANES);
                let mut numbers = [N::default(); LANES];
                let inverse =
                    scale_of::<S, N>(key, dim, of_keys.wrapping_add(head * BLOCK_TOKENS + slot));
                for column in (0..dim).step_by(LANES) {
                    let left = LANES.min(dim - column);
                    let part = scaled_part::<S, N>(key.add(column), left, inverse);
                    N::store::<S>(numbers.as_mut_ptr(), part);
                    for (lane, number) in numbers[..left].iter().enumerate() {
                        *kept.add((column + lane) * LANES) = *number;
                    }
                }
                // A head's values are whole vectors there: what is behind the last column is zero.
                let value = values.add(head * dim);
                let kept = block.add(shape.keys_len() + head * BLOCK_TOKENS * shape.padded());
                let inverse = scale_of::<S, N>(
                    value,
                    dim,
                    of_values.wrapping_add(head * BLOCK_TOKENS + slot),
                );
                for column in (0..dim).step_by(LANES) {
                    let part = scaled_part::<S, N>(value.add(column), dim - column, inverse);
                    N::store::<S>(kept.add(column * BLOCK_TOKENS + slot * LANES), part);
                }
            }
        }
    }
}

/// Puts down what a head's whole numbers are to be multiplied with, and returns what they come from by: its inverse.
/// Where a number is not finite the scale is none, and so is what is computed with it. 1 for numbers that are kept as
/// they are.
///
/// # Safety
/// The processor has `S`; the head has `dim` elements, and a scale can be written where there are scales.
#[inline(always)]
unsafe fn scale_of<S: Simd, N: Number>(head: *const f32, dim: usize, scale: *mut f32) -> f32 {
    if !N::IS_SCALED {
        return 1.0;
    }
    // SAFETY: the caller's promise.
    unsafe {
        let (of_head, inverse) = scale_to::<S>(head, dim, LARGEST_KEPT);
        *scale = of_head;
        inverse
    }
}

/// The first `count` elements, at most sixteen, as they are kept.
///
/// # Safety
/// The processor has `S`; there are so many elements.
#[inline(always)]
unsafe fn scaled_part<S: Simd, N: Number>(from: *const f32, count: usize, inverse: f32) -> S::F {
    // SAFETY: the caller's promise.
    unsafe {
        let part = load_part::<S>(from, count);
        match N::IS_SCALED {
            true => whole_numbers::<S>(part, inverse, LARGEST_KEPT),
            false => part,
        }
    }
}

/// Multiplies sixteen scores or weights each with its position's scale, where numbers have one.
///
/// # Safety
/// The processor has `S`; there are sixteen of both.
#[inline(always)]
unsafe fn scaled<S: Simd, N: Number>(x: S::F, scales: *const f32) -> S::F {
    match N::IS_SCALED {
        // SAFETY: the caller's promise.
        true => unsafe { S::mul(x, S::load(scales)) },
        false => x,
    }
}

/// Norms a head, rotates element `i` with `i + dim / 2`, and scales.
///
/// # Safety
/// The processor has `S`; the head has `dim` elements, the angles half as many.
#[inline(always)]
unsafe fn rotate<S: Simd>(
    head: *mut f32,
    dim: usize,
    norm: Option<&Norm>,
    [cosines, sines]: [*const f32; 2],
    scale: f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if let Some(norm) = norm {
            normalise::<S>(head, norm, head);
        }
        let half = dim / 2;
        let mut at = 0;
        while at < half {
            let left = half - at;
            let (cosine, sine) = (
                load_part::<S>(cosines.add(at), left),
                load_part::<S>(sines.add(at), left),
            );
            let (low, high) = (head.add(at), head.add(half + at));
            let (a, b) = (load_part::<S>(low, left), load_part::<S>(high, left));
            let rotated_a = S::sub(S::mul(a, cosine), S::mul(b, sine));
            let rotated_b = S::add(S::mul(b, cosine), S::mul(a, sine));
            let scale = S::splat(scale);
            store_part::<S>(low, left, S::mul(rotated_a, scale));
            store_part::<S>(high, left, S::mul(rotated_b, scale));
            at += LANES;
        }
    }
}

/// Scores, softmax and weighted values of a unit.
struct Attend<'a> {
    task: &'a Task<'a>,
    unit: &'a Unit<'a>,
}

/// One row: a query of a head.
#[derive(Clone, Copy)]
struct Row {
    query: *const f32,
    position: usize,
    /// The largest score so far.
    largest: f32,
    /// The sum of the exponentials so far.
    sum: f32,
    /// What the values so far are multiplied with.
    fade: f32,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.task.attention.shape.kept {
                Kept::F32 => self.attend::<S, f32>(),
                Kept::I16 => self.attend::<S, i16>(),
            }
        }
    }
}

impl Attend<'_> {
    /// # Safety
    /// The processor has `S`; the blocks hold `N`.
    #[inline(always)]
    unsafe fn attend<S: Simd, N: Number>(self) {
        let shape = self.task.attention.shape;
        let (group, padded) = (self.task.group(), shape.padded());
        let span = &self.unit.sequence.span;
        let mut rows: Vec<Row> = (0..self.unit.count * group)
            .map(|row| {
                let token = self.unit.first + row / group;
                let head = self.unit.kv_head * group + row % group;
                let at = (span.row + token) * shape.qkv_width() + head * shape.head_dim;
                Row {
                    query: self.task.qkv.wrapping_add(at),
                    position: span.start + token,
                    largest: f32::NEG_INFINITY,
                    sum: 0.0,
                    fade: 0.0,
                }
            })
            .collect();
        let mut scores = vec![0f32; rows.len() * BLOCK_TOKENS];
        let mut values = vec![0f32; rows.len() * padded];
        let seen = span.start + self.unit.first + self.unit.count;
        for (index, block) in self.unit.sequence.all_blocks().enumerate() {
            let from = index * BLOCK_TOKENS;
            if from >= seen {
                break;
            }
            let count = BLOCK_TOKENS.min(seen - from);
            // SAFETY: blocks, rows and scratch are as long as the shape says.
            unsafe {
                let of_keys = block.wrapping_add(shape.numbers_words());
                let of_keys = of_keys.wrapping_add(self.unit.kv_head * BLOCK_TOKENS);
                let of_scaled_values = of_keys.wrapping_add(shape.kv_head_count * BLOCK_TOKENS);
                let block = block.cast::<N>();
                let keys = block.add(self.unit.kv_head * shape.head_dim * BLOCK_TOKENS);
                let of_values =
                    block.add(shape.keys_len() + self.unit.kv_head * BLOCK_TOKENS * padded);
                score_block::<S, N>(&rows, (keys, of_keys), shape.head_dim, count, &mut scores);
                for (row, scores) in rows.iter_mut().zip(scores.chunks_exact_mut(BLOCK_TOKENS)) {
                    soften::<S>(row, from, count, scores);
                    for at in (0..count).step_by(LANES) {
                        let weights = scores.as_mut_ptr().add(at);
                        let scales = of_scaled_values.wrapping_add(at);
                        S::store(weights, scaled::<S, N>(S::load(weights), scales));
                    }
                }
                add_values::<S, N>(&rows, &scores, of_values, padded, count, &mut values);
            }
        }
        for (index, (row, values)) in rows.iter().zip(values.chunks_exact(padded)).enumerate() {
            let token = span.row + self.unit.first + index / group;
            let head = self.unit.kv_head * group + index % group;
            let at = token * shape.width() + head * shape.head_dim;
            // SAFETY: token and head are inside of `out`, and this unit's.
            unsafe {
                let inverse = S::splat(1.0 / row.sum);
                let mut column = 0;
                while column < shape.head_dim {
                    let value = S::mul(S::load(values.as_ptr().add(column)), inverse);
                    let to = self.task.out.add(at + column);
                    store_part::<S>(to, shape.head_dim - column, value);
                    column += LANES;
                }
            }
        }
    }
}

/// `scores[row][t] = query of row . key t` for the first `count` positions of a block, rounded up to vectors.
///
/// # Safety
/// The processor has `S`; `keys` is `[4, dim, 16]`, with a scale for each position, and the scores have 64 for each row.
#[inline(always)]
unsafe fn score_block<S: Simd, N: Number>(
    rows: &[Row],
    (keys, scales): (*const N, *const f32),
    dim: usize,
    count: usize,
    scores: &mut [f32],
) {
    let mut at = 0;
    while at < rows.len() {
        let left = rows.len() - at;
        // SAFETY: the caller's promise; `at` and the tile are inside of the rows.
        unsafe {
            let (rows, scores) = (
                rows.as_ptr().add(at),
                scores.as_mut_ptr().add(at * BLOCK_TOKENS),
            );
            at += match left {
                8.. if S::TILE >= 8 => {
                    score_tile::<S, N, 8>(rows, (keys, scales), dim, count, scores)
                }
                4.. => score_tile::<S, N, 4>(rows, (keys, scales), dim, count, scores),
                3 => score_tile::<S, N, 3>(rows, (keys, scales), dim, count, scores),
                2 => score_tile::<S, N, 2>(rows, (keys, scales), dim, count, scores),
                _ => score_tile::<S, N, 1>(rows, (keys, scales), dim, count, scores),
            };
        }
    }
}

/// # Safety
/// As [`score_block`], for `TILE` rows.
#[inline(always)]
unsafe fn score_tile<S: Simd, N: Number, const TILE: usize>(
    rows: *const Row,
    (keys, scales): (*const N, *const f32),
    dim: usize,
    count: usize,
    scores: *mut f32,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let mut queries = [std::ptr::null::<f32>(); TILE];
        for (row, query) in queries.iter_mut().enumerate() {
            *query = (*rows.add(row)).query;
        }
        for position in (0..count).step_by(LANES) {
            let mut sums = [S::splat(0.0); TILE];
            let keys = keys.add(position * dim);
            for column in 0..dim {
                let key = N::load::<S>(keys.add(column * LANES));
                for row in 0..TILE {
                    sums[row] = S::mul_add(S::splat(*queries[row].add(column)), key, sums[row]);
                }
            }
            for (row, sum) in sums.into_iter().enumerate() {
                let sum = scaled::<S, N>(sum, scales.wrapping_add(position));
                S::store(scores.add(row * BLOCK_TOKENS + position), sum);
            }
        }
    }
    TILE
}

/// Makes a row's scores of a block exponentials over the largest score so far.
///
/// # Safety
/// The processor has `S`.
#[inline(always)]
unsafe fn soften<S: Simd>(row: &mut Row, from: usize, count: usize, scores: &mut [f32]) {
    // What the row may see of the block: at least one position of the first block.
    let seen = (row.position + 1).saturating_sub(from).min(count);
    let padded = count.next_multiple_of(LANES);
    scores[seen..padded].fill(HIDDEN);
    // SAFETY: the caller's promise; a block is whole vectors.
    unsafe {
        let mut largest = S::splat(HIDDEN);
        for at in (0..padded).step_by(LANES) {
            largest = S::max(S::load(scores.as_ptr().add(at)), largest);
        }
        let largest = S::largest(largest).max(row.largest);
        let mut fade = [0f32; LANES];
        S::store(fade.as_mut_ptr(), exp::<S>(S::splat(row.largest - largest)));
        let mut sums = S::splat(0.0);
        for at in (0..padded).step_by(LANES) {
            let place = scores.as_mut_ptr().add(at);
            let weight = exp::<S>(S::sub(S::load(place), S::splat(largest)));
            S::store(place, weight);
            sums = S::add(sums, weight);
        }
        row.largest = largest;
        row.fade = fade[0];
        row.sum = row.sum.mul_add(row.fade, S::sum(sums));
    }
}

/// `values[row] = values[row] * fade + weights . block's values`.
///
/// # Safety
/// The processor has `S`; `of_block` is `[padded / 16, 64, 16]`, `values` `[rows, padded]`.
#[inline(always)]
unsafe fn add_values<S: Simd, N: Number>(
    rows: &[Row],
    weights: &[f32],
    of_block: *const N,
    padded: usize,
    count: usize,
    values: &mut [f32],
) {
    let mut at = 0;
    while at < rows.len() {
        let left = rows.len() - at;
        // SAFETY: the caller's promise; `at` and the tile are inside of the rows.
        unsafe {
            let rows = rows.as_ptr().add(at);
            let weights = weights.as_ptr().add(at * BLOCK_TOKENS);
            let values = values.as_mut_ptr().add(at * padded);
            let block = (of_block, padded, count);
            at += match left {
                8.. if S::TILE >= 8 => values_tile::<S, N, 8>(rows, weights, block, values),
                4.. => values_tile::<S, N, 4>(rows, weights, block, values),
                3 => values_tile::<S, N, 3>(rows, weights, block, values),
                2 => values_tile::<S, N, 2>(rows, weights, block, values),
                _ => values_tile::<S, N, 1>(rows, weights, block, values),
            };
        }
    }
}

/// # Safety
/// As [`add_values`], for `TILE` rows.
#[inline(always)]
unsafe fn values_tile<S: Simd, N: Number, const TILE: usize>(
    rows: *const Row,
    weights: *const f32,
    (of_block, padded, count): (*const N, usize, usize),
    values: *mut f32,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        for column in (0..padded).step_by(LANES) {
            let mut sums = [S::splat(0.0); TILE];
            for (row, sum) in sums.iter_mut().enumerate() {
                let before = S::load(values.add(row * padded + column));
                *sum = S::mul(before, S::splat((*rows.add(row)).fade));
            }
            for position in 0..count {
                let value = N::load::<S>(of_block.add(column * BLOCK_TOKENS + position * LANES));
                for (row, sum) in sums.iter_mut().enumerate() {
                    let weight = S::splat(*weights.add(row * BLOCK_TOKENS + position));
                    *sum = S::mul_add(weight, value, *sum);
                }
            }
            for (row, sum) in sums.into_iter().enumerate() {
                S::store(values.add(row * padded + column), sum);
            }
        }
    }
    TILE
}
