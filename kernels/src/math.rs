//! Functions of sixteen lanes that all instruction sets have in common.

use crate::arch::{LANES, Simd};

/// The first `count` elements at `from`, at most sixteen, and zeros behind them.
///
/// # Safety
/// The processor has `S`; `count` elements can be read.
#[inline(always)]
pub unsafe fn load_part<S: Simd>(from: *const f32, count: usize) -> S::F {
    // SAFETY: the caller's promise; the copy is as long as the array at most.
    unsafe {
        if count >= LANES {
            return S::load(from);
        }
        let mut lanes = [0f32; LANES];
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
        S::load(lanes.as_ptr())
    }
}

/// Writes the first `count` lanes, at most sixteen.
///
/// # Safety
/// The processor has `S`; `count` elements can be written.
#[inline(always)]
pub unsafe fn store_part<S: Simd>(to: *mut f32, count: usize, value: S::F) {
    // SAFETY: the caller's promise; the copy is as long as the array at most.
    unsafe {
        if count >= LANES {
            return S::store(to, value);
        }
        let mut lanes = [0f32; LANES];
        S::store(lanes.as_mut_ptr(), value);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count);
    }
}

/// Less than this is taken for zero: its reciprocal would overflow.
const SMALLEST: f32 = 1e-30;

/// What whole numbers up to `largest_whole` are multiplied with to be about these elements, and what the elements are
/// multiplied with to be whole numbers. Where one is not finite the former is no number.
///
/// # Safety
/// The processor has `S`; `x` has `count` elements.
#[inline(always)]
pub unsafe fn scale_to<S: Simd>(x: *const f32, count: usize, largest_whole: f32) -> (f32, f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut largest = S::splat(0.0);
        for at in (0..count).step_by(LANES) {
            largest = S::max_magnitude(largest, load_part::<S>(x.add(at), count - at));
        }
        let mut lanes = [0f32; LANES];
        S::store(lanes.as_mut_ptr(), largest);
        let largest = lanes.iter().map(|lane| lane.to_bits()).max().unwrap_or(0);
        let largest = f32::from_bits(largest);
        match largest {
            _ if !largest.is_finite() => (f32::NAN, 0.0),
            _ if largest < SMALLEST => (0.0, 0.0),
            _ => (largest / largest_whole, largest_whole / largest),
        }
    }
}

/// Elements as whole numbers of at most this magnitude, by the second number of [`scale_to`].
///
/// # Safety
/// The processor has `S`.
#[inline(always)]
pub unsafe fn whole_numbers<S: Simd>(x: S::F, inverse: f32, largest_whole: f32) -> S::F {
    // SAFETY: the caller's promise.
    unsafe {
        let limit = S::splat(largest_whole);
        let scaled = S::round(S::mul(x, S::splat(inverse)));
        // The first operand of both is what may be no number.
        S::min(S::max(scaled, S::sub(S::splat(0.0), limit)), limit)
    }
}

/// Below this, e^x is less than what a normal f32 can hold; [`exp`] gives 0.
const LOWEST: f32 = -87.0;

/// e^x to about one unit in the last place: 0 below -87, and never more than e^88.
///
/// # Safety
/// The processor has `S`.
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its series to the seventh power, whose rest is below 6e-9.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const SERIES: [f32; 8] = [
        1.0 / 5040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        1.0 / 2.0,
        1.0,
        1.0,
    ];
    // SAFETY: the caller's promise.
    unsafe {
        let bounded = S::min(S::max(x, S::splat(LOWEST)), S::splat(88.0));
        let n = S::round(S::mul(bounded, S::splat(std::f32::consts::LOG2_E)));
        let r = S::mul_add(n, S::splat(-LN_2_HIGH), bounded);
        let r = S::mul_add(n, S::splat(-LN_2_LOW), r);
        let mut power = S::splat(SERIES[0]);
        for &coefficient in &SERIES[1..] {
            power = S::mul_add(power, r, S::splat(coefficient));
        }
        S::or_zero_below(x, LOWEST, S::scale_by_power(power, n))
    }
}

/// `gate * sigmoid(gate) * up`.
///
/// # Safety
/// The processor has `S`.
#[inline(always)]
pub unsafe fn swiglu<S: Simd>(gate: S::F, up: S::F) -> S::F {
    // SAFETY: the caller's promise.
    unsafe {
        let one = S::splat(1.0);
        let minus = S::sub(S::splat(0.0), gate);
        S::mul(S::div(gate, S::add(one, exp::<S>(minus))), up)
    }
}

/// `1 / sqrt(mean(x^2) + eps)` of `x`, `[count]`.
///
/// # Safety
/// The processor has `S`; `count` elements can be read.
#[inline(always)]
pub unsafe fn inverse_rms<S: Simd>(x: *const f32, count: usize, eps: f32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let mut squares = S::splat(0.0);
        let mut at = 0;
        while at < count {
            let lanes = load_part::<S>(x.add(at), count - at);
            squares = S::mul_add(lanes, lanes, squares);
            at += LANES;
        }
        1.0 / (S::sum(squares) / count as f32 + eps).sqrt()
    }
}
