//! Codes out of their units: eight vectors of four columns each, in the order of the columns.

use crate::arch::{Simd, VECTOR_BYTES};
use std::mem::MaybeUninit;

/// Where unpacked quads go. No closure: it has to be compiled into what calls it, for the instruction set.
pub trait TakeQuads<S: Simd> {
    /// # Safety
    /// The processor has `S`.
    unsafe fn take(&mut self, quad: usize, codes: S::Codes);
}

/// Keeps them for later.
struct Write<'a, S: Simd>(&'a mut [MaybeUninit<S::Codes>]);

impl<S: Simd> TakeQuads<S> for Write<'_, S> {
    #[inline(always)]
    unsafe fn take(&mut self, quad: usize, codes: S::Codes) {
        self.0[quad].write(codes);
    }
}

/// Unpacks a unit of codes to memory.
///
/// # Safety
/// The processor has `S`; `unit` is a unit of codes of `bits` bits.
#[inline(always)]
pub unsafe fn unpack_any<S: Simd>(bits: usize, unit: *const u8, to: &mut [MaybeUninit<S::Codes>]) {
    let write = Write::<S>(to);
    // SAFETY: the caller's promise.
    unsafe {
        match bits {
            2 => unpack::<S, 2>(unit, write),
            3 => unpack::<S, 3>(unit, write),
            4 => unpack::<S, 4>(unit, write),
            5 => unpack::<S, 5>(unit, write),
            6 => unpack::<S, 6>(unit, write),
            _ => unpack::<S, 8>(unit, write),
        }
    }
}

/// Hands over the eight quads of a unit's codes, in the order of the columns.
///
/// # Safety
/// The processor has `S`; `unit` is a unit of codes of `BITS` bits.
#[inline(always)]
pub unsafe fn unpack<S: Simd, const BITS: usize>(unit: *const u8, mut to: impl TakeQuads<S>) {
    // SAFETY: the caller's promise.
    unsafe {
        match BITS {
            8 => {
                to.take(0, S::codes(vector::<S>(unit, 0)));
                to.take(1, S::codes(vector::<S>(unit, 1)));
                to.take(2, S::codes(vector::<S>(unit, 2)));
                to.take(3, S::codes(vector::<S>(unit, 3)));
                to.take(4, S::codes(vector::<S>(unit, 4)));
                to.take(5, S::codes(vector::<S>(unit, 5)));
                to.take(6, S::codes(vector::<S>(unit, 6)));
                to.take(7, S::codes(vector::<S>(unit, 7)));
            }
            4 => {
                let [a, b] = S::codes_of_nibbles(vector::<S>(unit, 0));
                to.take(0, a);
                to.take(1, b);
                let [a, b] = S::codes_of_nibbles(vector::<S>(unit, 1));
                to.take(2, a);
                to.take(3, b);
                let [a, b] = S::codes_of_nibbles(vector::<S>(unit, 2));
                to.take(4, a);
                to.take(5, b);
                let [a, b] = S::codes_of_nibbles(vector::<S>(unit, 3));
                to.take(6, a);
                to.take(7, b);
            }
            _ => {
                to.take(0, planes::<S, BITS>(unit, 0));
                to.take(1, planes::<S, BITS>(unit, 1));
                to.take(2, planes::<S, BITS>(unit, 2));
                to.take(3, planes::<S, BITS>(unit, 3));
                to.take(4, planes::<S, BITS>(unit, 4));
                to.take(5, planes::<S, BITS>(unit, 5));
                to.take(6, planes::<S, BITS>(unit, 6));
                to.take(7, planes::<S, BITS>(unit, 7));
            }
        }
    }
}

/// Quad `quad` of a unit of codes of 2, 3, 5 or 6 bits.
///
/// # Safety
/// As [`unpack`].
#[inline(always)]
unsafe fn planes<S: Simd, const BITS: usize>(unit: *const u8, quad: usize) -> S::Codes {
    // SAFETY: the caller's promise.
    unsafe {
        let low_bits = match BITS {
            2 | 3 => 2,
            _ => 4,
        };
        let low_vectors = low_bits;
        let of_low = 8 / low_bits;
        let low = S::load_words(unit.add(quad / of_low * VECTOR_BYTES));
        let low = S::shift_right(low, (low_bits * (quad % of_low)) as u32);
        let low = S::and(low, 0x0101_0101 * ((1 << low_bits) - 1));
        let high_bits = BITS - low_bits;
        if high_bits == 0 {
            return S::codes(low);
        }
        let of_high = 8 / high_bits;
        let high = S::load_words(unit.add((low_vectors + quad / of_high) * VECTOR_BYTES));
        let high = S::shift_right(high, (high_bits * (quad % of_high)) as u32);
        let high = S::and(high, 0x0101_0101 * ((1 << high_bits) - 1));
        S::codes(S::or(low, S::shift_left(high, low_bits as u32)))
    }
}

/// Vector `index` of a unit.
///
/// # Safety
/// As [`unpack`].
#[inline(always)]
unsafe fn vector<S: Simd>(unit: *const u8, index: usize) -> S::W {
    // SAFETY: the caller's promise.
    unsafe { S::load_words(unit.add(index * VECTOR_BYTES)) }
}
