//! AVX2 with FMA and F16C: two registers of eight lanes. Quantised activations are 16-bit integers, and so
//! become the codes, for the one product that is exact for both is `vpmaddwd`.

use super::{Kernel, Simd};
use std::arch::x86_64::*;

/// A processor with AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// The proof that this processor has them.
    pub fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }

    /// Runs a kernel compiled for it.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn compiled<K: Kernel>(kernel: K) -> K::Output {
            // SAFETY: the caller's promise.
            unsafe { kernel.run::<Avx2>() }
        }
        // SAFETY: `self` exists only where `new` has seen the features.
        unsafe { compiled(kernel) }
    }
}

/// Two registers of floats.
#[derive(Debug, Clone, Copy)]
pub struct F(__m256, __m256);

/// Two registers of words.
#[derive(Debug, Clone, Copy)]
pub struct W(__m256i, __m256i);

/// Of four columns the first and third, and the second and fourth, as 16 bits; each for eight rows.
#[derive(Debug, Clone, Copy)]
pub struct Codes {
    even: W,
    odd: W,
}

// SAFETY: all instructions are of the features that `Avx2::new` looks for.
unsafe impl Simd for Avx2 {
    type F = F;
    type W = W;
    type Codes = Codes;
    type Sum = W;

    const TILE: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> F {
        // SAFETY: the caller's promise, here and below.
        unsafe { F(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> F {
        unsafe { F(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> F {
        unsafe {
            F(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> F {
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            F(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: F) {
        unsafe {
            _mm256_storeu_ps(to, value.0);
            _mm256_storeu_ps(to.add(8), value.1);
        }
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> F {
        unsafe {
            let low = _mm256_cvtepi16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepi16_epi32(_mm_loadu_si128(from.add(8).cast()));
            F(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }
    #[inline(always)]
    unsafe fn store_i16(to: *mut i16, value: F) {
        unsafe {
            let (low, high) = (_mm256_cvtps_epi32(value.0), _mm256_cvtps_epi32(value.1));
            // Of each half of a register: brought back into order.
            let mixed = _mm256_packs_epi32(low, high);
            let whole = _mm256_permute4x64_epi64::<0b11_01_10_00>(mixed);
            _mm256_storeu_si256(to.cast(), whole);
        }
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        unsafe { F(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        unsafe { F(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        unsafe { F(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        unsafe { F(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: F, b: F, c: F) -> F {
        unsafe {
            F(
                _mm256_fmadd_ps(a.0, b.0, c.0),
                _mm256_fmadd_ps(a.1, b.1, c.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        unsafe { F(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        unsafe { F(_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn max_magnitude(a: F, b: F) -> F {
        #[inline(always)]
        unsafe fn of(a: __m256, b: __m256) -> __m256 {
            unsafe {
                let bits = _mm256_set1_epi32(i32::MAX);
                let a = _mm256_and_si256(_mm256_castps_si256(a), bits);
                let b = _mm256_and_si256(_mm256_castps_si256(b), bits);
                _mm256_castsi256_ps(_mm256_max_epi32(a, b))
            }
        }
        unsafe { F(of(a.0, b.0), of(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        const TO_EVEN: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        unsafe {
            F(
                _mm256_round_ps::<TO_EVEN>(a.0),
                _mm256_round_ps::<TO_EVEN>(a.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn scale_by_power(a: F, n: F) -> F {
        #[inline(always)]
        unsafe fn of(a: __m256, n: __m256) -> __m256 {
            unsafe {
                let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
            }
        }
        unsafe { F(of(a.0, n.0), of(a.1, n.1)) }
    }
    #[inline(always)]
    unsafe fn or_zero_below(x: F, limit: f32, a: F) -> F {
        unsafe {
            let limit = _mm256_set1_ps(limit);
            F(
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(x.0, limit), a.0),
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(x.1, limit), a.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(a.0, a.1);
            let four = _mm_add_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn largest(a: F) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(a.0, a.1);
            let four = _mm_max_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
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
    unsafe fn load_words(from: *const u8) -> W {
        unsafe {
            W(
                _mm256_loadu_si256(from.cast()),
                _mm256_loadu_si256(from.add(32).cast()),
            )
        }
    }
    #[inline(always)]
    unsafe fn and(a: W, mask: u32) -> W {
        unsafe {
            let mask = _mm256_set1_epi32(mask as i32);
            W(_mm256_and_si256(a.0, mask), _mm256_and_si256(a.1, mask))
        }
    }
    #[inline(always)]
    unsafe fn or(a: W, b: W) -> W {
        unsafe { W(_mm256_or_si256(a.0, b.0), _mm256_or_si256(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn shift_right(a: W, bits: u32) -> W {
        unsafe {
            let count = _mm_cvtsi32_si128(bits as i32);
            W(_mm256_srl_epi32(a.0, count), _mm256_srl_epi32(a.1, count))
        }
    }
    #[inline(always)]
    unsafe fn shift_left(a: W, bits: u32) -> W {
        unsafe {
            let count = _mm_cvtsi32_si128(bits as i32);
            W(_mm256_sll_epi32(a.0, count), _mm256_sll_epi32(a.1, count))
        }
    }
    #[inline(always)]
    unsafe fn codes(words: W) -> Codes {
        unsafe {
            Codes {
                even: Self::and(words, 0x00FF_00FF),
                odd: W(
                    _mm256_srli_epi16::<8>(words.0),
                    _mm256_srli_epi16::<8>(words.1),
                ),
            }
        }
    }
    #[inline(always)]
    unsafe fn codes_of_nibbles(words: W) -> [Codes; 2] {
        // Nibbles go to 16 bits at once, without a stop at 8.
        #[inline(always)]
        unsafe fn shifted<const BITS: i32>(a: W) -> W {
            unsafe {
                W(
                    _mm256_srli_epi16::<BITS>(a.0),
                    _mm256_srli_epi16::<BITS>(a.1),
                )
            }
        }
        const NIBBLES: u32 = 0x000F_000F;
        unsafe {
            [
                Codes {
                    even: Self::and(words, NIBBLES),
                    odd: Self::and(shifted::<8>(words), NIBBLES),
                },
                Codes {
                    even: Self::and(shifted::<4>(words), NIBBLES),
                    odd: shifted::<12>(words),
                },
            ]
        }
    }

    #[inline(always)]
    unsafe fn pack(values: F, to: *mut u8) {
        unsafe {
            let (low, high) = (_mm256_cvtps_epi32(values.0), _mm256_cvtps_epi32(values.1));
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
            // Of each four columns the first and third, then the second and fourth.
            let packed = _mm256_shufflelo_epi16::<0b11_01_10_00>(packed);
            let packed = _mm256_shufflehi_epi16::<0b11_01_10_00>(packed);
            _mm256_storeu_si256(to.cast(), packed);
        }
    }
    #[inline(always)]
    unsafe fn no_sum() -> W {
        unsafe { W(_mm256_setzero_si256(), _mm256_setzero_si256()) }
    }
    #[inline(always)]
    unsafe fn dot(sum: W, codes: Codes, quad: *const u8) -> W {
        unsafe {
            let even = _mm256_set1_epi32(quad.cast::<i32>().read_unaligned());
            let odd = _mm256_set1_epi32(quad.add(4).cast::<i32>().read_unaligned());
            let low = _mm256_add_epi32(sum.0, _mm256_madd_epi16(codes.even.0, even));
            let high = _mm256_add_epi32(sum.1, _mm256_madd_epi16(codes.even.1, even));
            W(
                _mm256_add_epi32(low, _mm256_madd_epi16(codes.odd.0, odd)),
                _mm256_add_epi32(high, _mm256_madd_epi16(codes.odd.1, odd)),
            )
        }
    }
    #[inline(always)]
    unsafe fn finish(sum: W, _quanta: f32) -> F {
        unsafe { F(_mm256_cvtepi32_ps(sum.0), _mm256_cvtepi32_ps(sum.1)) }
    }
}
