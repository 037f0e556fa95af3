//! AVX-512 with VNNI: one register of sixteen lanes. `vpdpbusd` multiplies unsigned with signed bytes, so
//! quantised activations are two bytes that are summed apart: `q = 256 * high + low`, both signed.

use super::{Kernel, Simd};
use std::arch::x86_64::*;

/// A processor with AVX-512 F, BW, DQ, VL and VNNI, and AVX2's companions.
#[derive(Debug, Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    /// The proof that this processor has them.
    pub fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }

    /// Runs a kernel compiled for it.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c,avx2")]
        unsafe fn compiled<K: Kernel>(kernel: K) -> K::Output {
            // SAFETY: the caller's promise.
            unsafe { kernel.run::<Avx512>() }
        }
        // SAFETY: `self` exists only where `new` has seen the features.
        unsafe { compiled(kernel) }
    }
}

/// Sums of the activations' high and low bytes.
#[derive(Debug, Clone, Copy)]
pub struct Sum {
    high: __m512i,
    low: __m512i,
}

// SAFETY: all instructions are of the features that `Avx512::new` looks for.
unsafe impl Simd for Avx512 {
    type F = __m512;
    type W = __m512i;
    type Codes = __m512i;
    type Sum = Sum;

    const TILE: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: the caller's promise, here and below.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> __m512 {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m512) {
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_i16(to: *mut i16, value: __m512) {
        unsafe {
            let whole = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(value));
            _mm256_storeu_si256(to.cast(), whole);
        }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max_magnitude(a: __m512, b: __m512) -> __m512 {
        unsafe {
            let bits = _mm512_set1_epi32(i32::MAX);
            let a = _mm512_and_si512(_mm512_castps_si512(a), bits);
            let b = _mm512_and_si512(_mm512_castps_si512(b), bits);
            _mm512_castsi512_ps(_mm512_max_epi32(a, b))
        }
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    unsafe fn scale_by_power(a: __m512, n: __m512) -> __m512 {
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_mul_ps(a, _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)))
        }
    }
    #[inline(always)]
    unsafe fn or_zero_below(x: __m512, limit: f32, a: __m512) -> __m512 {
        unsafe {
            let kept = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(limit));
            _mm512_maskz_mov_ps(kept, a)
        }
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn largest(a: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    unsafe fn prefetch_near(from: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_far(from: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, mask: u32) -> __m512i {
        unsafe { _mm512_and_si512(a, _mm512_set1_epi32(mask as i32)) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn shift_right(a: __m512i, bits: u32) -> __m512i {
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits as i32)) }
    }
    #[inline(always)]
    unsafe fn shift_left(a: __m512i, bits: u32) -> __m512i {
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits as i32)) }
    }
    #[inline(always)]
    unsafe fn codes(words: __m512i) -> __m512i {
        words
    }

    #[inline(always)]
    unsafe fn pack(values: __m512, to: *mut u8) {
        unsafe {
            let whole = _mm512_cvtps_epi32(values);
            let half_up = _mm512_add_epi32(whole, _mm512_set1_epi32(128));
            let high = _mm512_cvtepi32_epi8(_mm512_srai_epi32::<8>(half_up));
            let low = _mm512_cvtepi32_epi8(whole);
            _mm_storeu_si128(to.cast(), _mm_unpacklo_epi32(high, low));
            _mm_storeu_si128(to.add(16).cast(), _mm_unpackhi_epi32(high, low));
        }
    }
    #[inline(always)]
    unsafe fn no_sum() -> Sum {
        unsafe {
            Sum {
                high: _mm512_setzero_si512(),
                low: _mm512_setzero_si512(),
            }
        }
    }
    #[inline(always)]
    unsafe fn dot(sum: Sum, codes: __m512i, quad: *const u8) -> Sum {
        unsafe {
            let high = _mm512_set1_epi32(quad.cast::<i32>().read_unaligned());
            let low = _mm512_set1_epi32(quad.add(4).cast::<i32>().read_unaligned());
            Sum {
                high: _mm512_dpbusd_epi32(sum.high, codes, high),
                low: _mm512_dpbusd_epi32(sum.low, codes, low),
            }
        }
    }
    #[inline(always)]
    unsafe fn finish(sum: Sum, _quanta: f32) -> __m512 {
        unsafe {
            let high = _mm512_slli_epi32::<8>(sum.high);
            _mm512_cvtepi32_ps(_mm512_add_epi32(high, sum.low))
        }
    }
}
