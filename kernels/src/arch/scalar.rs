//! Sixteen lanes in plain Rust: runs anywhere, and says what the other instruction sets have to compute.

use super::{LANES, QUAD_BYTES, Simd};
use half::{bf16, f16};

/// No instruction set.
#[derive(Debug, Clone, Copy)]
pub struct Scalar;

#[inline(always)]
fn lanes<T: Copy, U>(a: [T; LANES], f: impl Fn(T) -> U) -> [U; LANES] {
    a.map(f)
}

#[inline(always)]
fn pairs<T: Copy, U>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> U) -> [U; LANES] {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

#[inline(always)]
fn fold(mut a: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            a[lane] = f(a[lane], a[lane + width]);
        }
        width /= 2;
    }
    a[0]
}

// SAFETY: needs no instruction set; reads and writes what the trait says.
unsafe impl Simd for Scalar {
    type F = [f32; LANES];
    type W = [u32; LANES];
    type Codes = [u32; LANES];
    type Sum = [i32; LANES];

    const TILE: usize = 2;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::F {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        lanes(bits, |bits| f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::F {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        lanes(bits, |bits| bf16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self::F>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self::F {
        // SAFETY: the caller's promise.
        let whole = unsafe { from.cast::<[i16; LANES]>().read_unaligned() };
        whole.map(f32::from)
    }
    #[inline(always)]
    unsafe fn store_i16(to: *mut i16, value: Self::F) {
        // SAFETY: the caller's promise.
        unsafe {
            to.cast::<[i16; LANES]>()
                .write_unaligned(value.map(|value| value as i16))
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn max_magnitude(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| {
            f32::from_bits(a.abs().to_bits().max(b.abs().to_bits()))
        })
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        lanes(a, f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn scale_by_power(a: Self::F, n: Self::F) -> Self::F {
        pairs(a, n, |a, n| {
            a * f32::from_bits(((n as i32 + 127) << 23) as u32)
        })
    }
    #[inline(always)]
    unsafe fn or_zero_below(x: Self::F, limit: f32, a: Self::F) -> Self::F {
        pairs(x, a, |x, a| if x >= limit { a } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        fold(a, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn largest(a: Self::F) -> f32 {
        fold(a, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> Self::W {
        // SAFETY: the caller's promise.
        lanes(
            unsafe { from.cast::<Self::W>().read_unaligned() },
            u32::from_le,
        )
    }
    #[inline(always)]
    unsafe fn and(a: Self::W, mask: u32) -> Self::W {
        lanes(a, |a| a & mask)
    }
    #[inline(always)]
    unsafe fn or(a: Self::W, b: Self::W) -> Self::W {
        pairs(a, b, |a, b| a | b)
    }
    #[inline(always)]
    unsafe fn shift_right(a: Self::W, bits: u32) -> Self::W {
        lanes(a, |a| a >> bits)
    }
    #[inline(always)]
    unsafe fn shift_left(a: Self::W, bits: u32) -> Self::W {
        lanes(a, |a| a << bits)
    }
    #[inline(always)]
    unsafe fn codes(words: Self::W) -> Self::Codes {
        words
    }

    #[inline(always)]
    unsafe fn pack(values: Self::F, to: *mut u8) {
        let packed: [[u8; 2]; LANES] = lanes(values, |value| (value as i16).to_ne_bytes());
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[[u8; 2]; LANES]>().write_unaligned(packed) }
    }
    #[inline(always)]
    unsafe fn no_sum() -> Self::Sum {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::Sum, codes: Self::Codes, quad: *const u8) -> Self::Sum {
        // SAFETY: the caller's promise.
        let quad = unsafe { quad.cast::<[[u8; 2]; QUAD_BYTES / 2]>().read_unaligned() };
        pairs(sum, codes.map(|word| word as i32), |sum, word| {
            let bytes = (word as u32).to_le_bytes();
            (0..4).fold(sum, |sum, column| {
                sum + i32::from(bytes[column]) * i32::from(i16::from_ne_bytes(quad[column]))
            })
        })
    }
    #[inline(always)]
    unsafe fn finish(sum: Self::Sum, _quanta: f32) -> Self::F {
        lanes(sum, |sum| sum as f32)
    }
}
