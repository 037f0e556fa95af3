//! What the kernels ask of a processor: sixteen lanes of 32 bits, as many as a block of a weight has rows.
//!
//! An instruction set has them as one register, two, or four; the kernels do not know. Every operation is
//! defined to the bit (fused multiply-add, rounding to even, sums in one fixed tree, integer sums that are
//! exact in any order), so that all instruction sets give the same bits, and [`scalar`] is the plain twin
//! that the others are tested against.

pub mod scalar;

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
#[cfg(target_arch = "aarch64")]
pub mod neon;

/// Lanes of a vector, and rows of a weight's block.
pub const LANES: usize = 16;

/// Bytes of one vector's lanes.
pub const VECTOR_BYTES: usize = 4 * LANES;

/// Bytes of four columns of quantised activations, see [`Simd::pack`].
pub const QUAD_BYTES: usize = 8;

/// The largest magnitude of a quantised activation: 127 * 256, so that both of its bytes fit eight signed bits.
pub const LARGEST_QUANTUM: f32 = 32512.0;

/// Sixteen lanes of one instruction set.
///
/// # Safety
/// Whoever calls a function promises that the processor has the instruction set, and that pointers are good for
/// what is read (`VECTOR_BYTES`, or half of them for 16-bit floats, at any alignment) or written.
pub unsafe trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen words of 32 bits, each of a row: four bytes are four columns.
    type W: Copy;
    /// Four columns of sixteen rows, ready to be multiplied.
    type Codes: Copy;
    /// Sixteen exact integer sums.
    type Sum: Copy;

    /// Tokens whose sums the registers hold at a time: 1, 2, 4, 6 or 8.
    const TILE: usize;

    unsafe fn splat(value: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn load_f16(from: *const u16) -> Self::F;
    unsafe fn load_bf16(from: *const u16) -> Self::F;
    unsafe fn store(to: *mut f32, value: Self::F);
    unsafe fn load_i16(from: *const i16) -> Self::F;
    /// Whole numbers that 16 bits have; of anything else, anything.
    unsafe fn store_i16(to: *mut i16, value: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger one; of numbers, not of NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// The smaller one; of numbers, not of NaN.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// The magnitude of larger bits: what is not finite is larger than all numbers.
    unsafe fn max_magnitude(a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest whole number, halves to the even one.
    unsafe fn round(a: Self::F) -> Self::F;
    /// `a * 2^n` for whole `n` in -126..=127.
    unsafe fn scale_by_power(a: Self::F, n: Self::F) -> Self::F;
    /// `a` where `x >= limit`, else 0.
    unsafe fn or_zero_below(x: Self::F, limit: f32, a: Self::F) -> Self::F;
    /// The sum of all lanes: lane `i` with lane `i + 8`, then `+ 4`, `+ 2`, `+ 1`.
    unsafe fn sum(a: Self::F) -> f32;
    /// The largest lane, by [`Self::max`].
    unsafe fn largest(a: Self::F) -> f32;

    /// Asks for a line into the first cache. Any address will do.
    unsafe fn prefetch_near(_from: *const u8) {}
    /// Asks for a line into the second cache. Any address will do.
    unsafe fn prefetch_far(_from: *const u8) {}
    unsafe fn load_words(from: *const u8) -> Self::W;
    unsafe fn and(a: Self::W, mask: u32) -> Self::W;
    unsafe fn or(a: Self::W, b: Self::W) -> Self::W;
    unsafe fn shift_right(a: Self::W, bits: u32) -> Self::W;
    unsafe fn shift_left(a: Self::W, bits: u32) -> Self::W;
    /// Four bytes a row, made ready.
    unsafe fn codes(words: Self::W) -> Self::Codes;
    /// Low and high nibbles of the four bytes of a row, made ready.
    #[inline(always)]
    unsafe fn codes_of_nibbles(words: Self::W) -> [Self::Codes; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let high = Self::shift_right(words, 4);
            [
                Self::codes(Self::and(words, 0x0F0F_0F0F)),
                Self::codes(Self::and(high, 0x0F0F_0F0F)),
            ]
        }
    }

    /// Sixteen whole numbers of at most [`LARGEST_QUANTUM`] as four times four columns in the form that
    /// [`Self::dot`] reads: 32 bytes.
    unsafe fn pack(values: Self::F, to: *mut u8);
    unsafe fn no_sum() -> Self::Sum;
    /// Adds the products of four columns (`QUAD_BYTES` at `quad`) with the codes of each row.
    unsafe fn dot(sum: Self::Sum, codes: Self::Codes, quad: *const u8) -> Self::Sum;
    /// The sums as floats, rounded to even. `quanta`: the sum of the activations' whole numbers.
    unsafe fn finish(sum: Self::Sum, quanta: f32) -> Self::F;
}

/// A computation that can run on any instruction set.
pub trait Kernel {
    /// What comes of it.
    type Output;

    /// Runs it. Must be `#[inline(always)]`, to be compiled for the instruction set.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}
