//! NEON with dot products: four registers of four lanes. `sdot` multiplies signed with signed bytes, so 128 is
//! taken from the codes and given back to the sums; `usdot`, where the processor has it (i8mm), multiplies
//! unsigned with signed ones, and saves both. Quantised activations are two bytes that are summed apart, as
//! for AVX-512: `q = 256 * high + low`, both signed.
//!
//! What this needs of newer extensions, and the halves to floats, is not in stable Rust's `std::arch` (of Rust
//! 1.89): hence the assembly.

use super::{Kernel, Simd};
use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::array::from_fn;

/// A processor with NEON and dot products.
pub type Neon = Lanes<false>;

/// A processor that has, besides, products of unsigned with signed bytes.
pub type NeonI8mm = Lanes<true>;

/// Proof of an instruction set: with `usdot`, or with `sdot` alone.
#[derive(Debug, Clone, Copy)]
pub struct Lanes<const I8MM: bool>(());

impl Neon {
    /// The proof that this processor has it.
    pub fn new() -> Option<Self> {
        let has = is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod");
        has.then_some(Self(()))
    }

    /// Runs a kernel compiled for it.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon,dotprod")]
        unsafe fn compiled<K: Kernel>(kernel: K) -> K::Output {
            // SAFETY: the caller's promise.
            unsafe { kernel.run::<Neon>() }
        }
        // SAFETY: `self` exists only where `new` has seen the features.
        unsafe { compiled(kernel) }
    }
}

impl NeonI8mm {
    /// The proof that this processor has it.
    pub fn new() -> Option<Self> {
        let has = Neon::new().is_some() && is_aarch64_feature_detected!("i8mm");
        has.then_some(Self(()))
    }

    /// Runs a kernel compiled for it.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon,dotprod,i8mm")]
        unsafe fn compiled<K: Kernel>(kernel: K) -> K::Output {
            // SAFETY: the caller's promise.
            unsafe { kernel.run::<NeonI8mm>() }
        }
        // SAFETY: `self` exists only where `new` has seen the features.
        unsafe { compiled(kernel) }
    }
}

/// Four registers of floats.
type F = [float32x4_t; 4];

/// Four registers of words, or of bytes: a word is a row's four columns.
type W = [uint32x4_t; 4];

/// Sums of the activations' high and low bytes.
#[derive(Debug, Clone, Copy)]
pub struct Sum {
    high: [int32x4_t; 4],
    low: [int32x4_t; 4],
}

#[inline(always)]
fn each<T: Copy, U>(a: [T; 4], f: impl Fn(T) -> U) -> [U; 4] {
    [f(a[0]), f(a[1]), f(a[2]), f(a[3])]
}

#[inline(always)]
fn pairs<T: Copy, V: Copy, U>(a: [T; 4], b: [V; 4], f: impl Fn(T, V) -> U) -> [U; 4] {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

/// `sum + codes . quad[HALF]`, of four signed bytes in each lane with four signed bytes of `quad`.
#[inline]
#[target_feature(enable = "dotprod")]
fn sdot<const HALF: u32>(mut sum: int32x4_t, codes: uint32x4_t, quad: int8x8_t) -> int32x4_t {
    // SAFETY: touches nothing but these registers.
    unsafe {
        asm!("sdot {sum:v}.4s, {codes:v}.16b, {quad:v}.4b[{half}]",
            sum = inout(vreg) sum, codes = in(vreg) codes, quad = in(vreg) quad, half = const HALF,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// As [`sdot`], of four unsigned bytes in each lane.
#[inline]
#[target_feature(enable = "i8mm")]
fn usdot<const HALF: u32>(mut sum: int32x4_t, codes: uint32x4_t, quad: int8x8_t) -> int32x4_t {
    // SAFETY: touches nothing but these registers.
    unsafe {
        asm!("usdot {sum:v}.4s, {codes:v}.16b, {quad:v}.4b[{half}]",
            sum = inout(vreg) sum, codes = in(vreg) codes, quad = in(vreg) quad, half = const HALF,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Four floats of half precision.
#[inline]
#[target_feature(enable = "neon")]
fn widened(halves: uint16x4_t) -> float32x4_t {
    let wide;
    // SAFETY: touches nothing but these registers.
    unsafe {
        asm!("fcvtl {wide:v}.4s, {halves:v}.4h",
            wide = lateout(vreg) wide, halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags));
    }
    wide
}

/// Four lanes, where `max` leaves the second operand if one is no number, as instructions of x86 do.
#[inline]
#[target_feature(enable = "neon")]
fn larger(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcgtq_f32(a, b), a, b)
}

impl<const I8MM: bool> Lanes<I8MM> {
    /// Unsigned codes as what `dot` multiplies.
    #[inline(always)]
    unsafe fn signed(codes: uint8x16_t) -> uint32x4_t {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            vreinterpretq_u32_u8(match I8MM {
                true => codes,
                false => veorq_u8(codes, vdupq_n_u8(0x80)),
            })
        }
    }
}

// SAFETY: all instructions are of the features that `new` looks for.
unsafe impl<const I8MM: bool> Simd for Lanes<I8MM> {
    type F = F;
    type W = W;
    type Codes = W;
    type Sum = Sum;

    // Eight of 32 registers for a token's sums, and four for the codes.
    const TILE: usize = 2;

    #[inline(always)]
    unsafe fn splat(value: f32) -> F {
        // SAFETY: the caller's promise, here and below.
        unsafe { [vdupq_n_f32(value); 4] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> F {
        unsafe { from_fn(|part| vld1q_f32(from.add(4 * part))) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> F {
        unsafe { from_fn(|part| widened(vld1_u16(from.add(4 * part)))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> F {
        unsafe {
            from_fn(|part| {
                let bits = vmovl_u16(vld1_u16(from.add(4 * part)));
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits))
            })
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: F) {
        unsafe {
            vst1q_f32(to, value[0]);
            vst1q_f32(to.add(4), value[1]);
            vst1q_f32(to.add(8), value[2]);
            vst1q_f32(to.add(12), value[3]);
        }
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> F {
        unsafe { from_fn(|part| vcvtq_f32_s32(vmovl_s16(vld1_s16(from.add(4 * part))))) }
    }
    #[inline(always)]
    unsafe fn store_i16(to: *mut i16, value: F) {
        unsafe {
            for (part, four) in value.into_iter().enumerate() {
                vst1_s16(to.add(4 * part), vqmovn_s32(vcvtnq_s32_f32(four)));
            }
        }
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        pairs(a, b, |a, b| unsafe { vaddq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        pairs(a, b, |a, b| unsafe { vsubq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        pairs(a, b, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        pairs(a, b, |a, b| unsafe { vdivq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn mul_add(a: F, b: F, c: F) -> F {
        from_fn(|part| unsafe { vfmaq_f32(c[part], a[part], b[part]) })
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        pairs(a, b, |a, b| unsafe { larger(a, b) })
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        pairs(a, b, |a, b| unsafe { vbslq_f32(vcltq_f32(a, b), a, b) })
    }
    #[inline(always)]
    unsafe fn max_magnitude(a: F, b: F) -> F {
        pairs(a, b, |a, b| unsafe {
            let a = vreinterpretq_u32_f32(vabsq_f32(a));
            let b = vreinterpretq_u32_f32(vabsq_f32(b));
            vreinterpretq_f32_u32(vmaxq_u32(a, b))
        })
    }
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        each(a, |a| unsafe { vrndnq_f32(a) })
    }
    #[inline(always)]
    unsafe fn scale_by_power(a: F, n: F) -> F {
        pairs(a, n, |a, n| unsafe {
            let exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
            vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent)))
        })
    }
    #[inline(always)]
    unsafe fn or_zero_below(x: F, limit: f32, a: F) -> F {
        pairs(x, a, |x, a| unsafe {
            let kept = vcgeq_f32(x, vdupq_n_f32(limit));
            vreinterpretq_f32_u32(vandq_u32(kept, vreinterpretq_u32_f32(a)))
        })
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        unsafe {
            let four = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            vaddv_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        }
    }
    #[inline(always)]
    unsafe fn largest(a: F) -> f32 {
        unsafe {
            let four = larger(larger(a[0], a[2]), larger(a[1], a[3]));
            let two = larger(four, vextq_f32::<2>(four, four));
            vgetq_lane_f32::<0>(larger(two, vextq_f32::<1>(two, two)))
        }
    }

    #[inline(always)]
    unsafe fn prefetch_near(from: *const u8) {
        // SAFETY: a hint, which reads nothing.
        unsafe {
            asm!("prfm pldl1keep, [{from}]", from = in(reg) from, options(nomem, nostack, preserves_flags));
        }
    }
    #[inline(always)]
    unsafe fn prefetch_far(from: *const u8) {
        // SAFETY: a hint, which reads nothing.
        unsafe {
            asm!("prfm pldl2keep, [{from}]", from = in(reg) from, options(nomem, nostack, preserves_flags));
        }
    }
    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> W {
        unsafe { from_fn(|part| vreinterpretq_u32_u8(vld1q_u8(from.add(16 * part)))) }
    }
    #[inline(always)]
    unsafe fn and(a: W, mask: u32) -> W {
        each(a, |a| unsafe { vandq_u32(a, vdupq_n_u32(mask)) })
    }
    #[inline(always)]
    unsafe fn or(a: W, b: W) -> W {
        pairs(a, b, |a, b| unsafe { vorrq_u32(a, b) })
    }
    #[inline(always)]
    unsafe fn shift_right(a: W, bits: u32) -> W {
        // A negative number shifts to the right.
        each(a, |a| unsafe { vshlq_u32(a, vdupq_n_s32(-(bits as i32))) })
    }
    #[inline(always)]
    unsafe fn shift_left(a: W, bits: u32) -> W {
        each(a, |a| unsafe { vshlq_u32(a, vdupq_n_s32(bits as i32)) })
    }
    #[inline(always)]
    unsafe fn codes(words: W) -> W {
        each(words, |words| unsafe {
            Self::signed(vreinterpretq_u8_u32(words))
        })
    }
    #[inline(always)]
    unsafe fn codes_of_nibbles(words: W) -> [W; 2] {
        // A shift of bytes leaves nothing to be masked away.
        let low = |words| unsafe {
            let low = vandq_u8(vreinterpretq_u8_u32(words), vdupq_n_u8(0x0F));
            Self::signed(low)
        };
        let high = |words| unsafe { Self::signed(vshrq_n_u8::<4>(vreinterpretq_u8_u32(words))) };
        [each(words, low), each(words, high)]
    }

    #[inline(always)]
    unsafe fn pack(values: F, to: *mut u8) {
        #[inline(always)]
        unsafe fn of(a: float32x4_t, b: float32x4_t, to: *mut u8) {
            unsafe {
                let (a, b) = (vcvtq_s32_f32(a), vcvtq_s32_f32(b));
                let whole = vcombine_s16(vmovn_s32(a), vmovn_s32(b));
                // The high byte goes up where the low one is negative: a rounding shift.
                let high = vreinterpret_u32_s8(vrshrn_n_s16::<8>(whole));
                let low = vreinterpret_u32_s8(vmovn_s16(whole));
                vst1_u8(to, vreinterpret_u8_u32(vzip1_u32(high, low)));
                vst1_u8(to.add(8), vreinterpret_u8_u32(vzip2_u32(high, low)));
            }
        }
        unsafe {
            of(values[0], values[1], to);
            of(values[2], values[3], to.add(16));
        }
    }
    #[inline(always)]
    unsafe fn no_sum() -> Sum {
        unsafe {
            Sum {
                high: [vdupq_n_s32(0); 4],
                low: [vdupq_n_s32(0); 4],
            }
        }
    }
    #[inline(always)]
    unsafe fn dot(mut sum: Sum, codes: W, quad: *const u8) -> Sum {
        unsafe {
            let quad = vld1_s8(quad.cast());
            for part in 0..4 {
                let (high, low) = (sum.high[part], sum.low[part]);
                (sum.high[part], sum.low[part]) = match I8MM {
                    true => (
                        usdot::<0>(high, codes[part], quad),
                        usdot::<1>(low, codes[part], quad),
                    ),
                    false => (
                        sdot::<0>(high, codes[part], quad),
                        sdot::<1>(low, codes[part], quad),
                    ),
                };
            }
        }
        sum
    }
    #[inline(always)]
    unsafe fn finish(sum: Sum, quanta: f32) -> F {
        unsafe {
            // What `signed` took of every code: 128 times the whole numbers, as an integer, so exactly.
            let taken = match I8MM {
                true => vdupq_n_s32(0),
                false => vcvtq_n_s32_f32::<7>(vdupq_n_f32(quanta)),
            };
            pairs(sum.high, sum.low, |high, low| {
                let low = vaddq_s32(low, taken);
                vcvtq_f32_s32(vaddq_s32(vshlq_n_s32::<8>(high), low))
            })
        }
    }
}
