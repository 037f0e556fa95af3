//! What holds for all kernels: every instruction set gives the bits of the plain one, a token's result does
//! not depend on its neighbours or on threads, and the error against 64-bit floats is bounded.

mod arch;
mod attention;
mod linear;
mod math;

use crate::FloatType;
use half::{bf16, f16};

/// Numbers without an end, the same at every run.
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Uniform in -1..1.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Roughly normal, with a few far out, as activations have.
    pub fn activation(&mut self) -> f32 {
        let sum: f32 = (0..6).map(|_| self.uniform()).sum();
        match self.bits() % 97 {
            0 => 20.0 * sum,
            _ => sum / 1.4,
        }
    }

    pub fn activations(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.activation()).collect()
    }
}

/// Floats as a checkpoint holds them.
pub fn bytes_of(values: &[f32], float_type: FloatType) -> Vec<u8> {
    let to_bytes = |value: &f32| match float_type {
        FloatType::F32 => value.to_le_bytes().to_vec(),
        FloatType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        FloatType::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(to_bytes).collect()
}

/// Equal to the bit, or both no numbers.
#[track_caller]
pub fn assert_same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(
            same,
            "{what}: element {index} is {found:e}, expected {expected:e}"
        );
    }
}

/// ‖found - expected‖ / ‖expected‖.
pub fn relative_error(found: &[f32], expected: &[f64]) -> f64 {
    let differences = found.iter().zip(expected);
    let square: f64 = differences.map(|(f, e)| (f64::from(*f) - e).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    (square / norm.max(f64::MIN_POSITIVE)).sqrt()
}
