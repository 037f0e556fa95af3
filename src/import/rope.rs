//! The scaling of rotary frequencies: from metadata, or recovered from the factors GGUF stores as a tensor.
//!
//! Separate because Llama 3 needs arithmetic: its `config.json` has four parameters, while GGUF keeps only what came
//! out of them, one divisor per frequency in `rope_freqs.weight`. The rule that made the divisors (published with
//! Llama 3.1, and what MLX evaluates) is, for a frequency of wavelength `l = 2 pi theta^(2 i / head_size)`:
//!
//! ```text
//! s = (original / l - low) / (high - low)      1 / divisor = clamp(s, 0, 1) * (1 - 1 / factor) + 1 / factor
//! ```
//!
//! so 1 for short waves, `factor` for long ones, and between them `s` is linear in `1 / l`. Two divisors in between
//! give the line. Multiplying `original`, `low` and `high` by one number changes nothing, so `low` is 1, as published.
//! The parameters count only if they give back every divisor.

use super::ModelError;
use super::architecture::{Architecture, Keys};
use super::blocks::{Encoding, Float};
use super::gguf::{Gguf, Payload, Tensor};

/// The tensor with one divisor per rotary frequency.
pub const DIVISORS_TENSOR: &str = "rope_freqs.weight";
/// How far a recomputed divisor may be off, relatively: a few roundings of the f32 arithmetic that made it.
const TOLERANCE: f64 = 1e-5;

/// A change of the rotary frequencies that `config.json` can express.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// All frequencies divided by one number.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3's rule (module text).
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// `high` of the rule, with `low` being 1.
        high_freq_factor: f64,
        /// `original` of the rule, in tokens.
        original_context_length: usize,
    },
}

/// The scaling of this model. `architecture` has the sizes; its own scaling is not looked at.
///
/// # Errors
/// A kind of scaling that is not imported, values out of range, divisors that no parameters explain.
pub fn read(
    gguf: &Gguf<'_>,
    architecture: &Architecture,
    keys: &Keys<'_, '_>,
) -> Result<Option<RopeScaling>, ModelError> {
    let named = read_named(keys)?;
    let Some(tensor) = gguf.tensor(DIVISORS_TENSOR) else {
        return Ok(named);
    };
    if named.is_some() {
        return Err(unexplained(
            "it comes on top of rope.scaling.type, which config.json cannot express".into(),
        ));
    }
    let divisors = divisors(tensor, architecture.head_size / 2)?;
    recover(&divisors, architecture.rope_theta.into())
}

fn read_named(keys: &Keys<'_, '_>) -> Result<Option<RopeScaling>, ModelError> {
    match keys.text("rope.scaling.type")? {
        // What llama.cpp takes a lone factor for, and how its early files spelt it.
        None if keys.has("rope.scaling.factor") => linear(keys, "rope.scaling.factor"),
        None if keys.has("rope.scale_linear") => linear(keys, "rope.scale_linear"),
        None | Some("none") => Ok(None),
        Some("linear") => linear(keys, "rope.scaling.factor"),
        Some(other) => Err(keys.bad(
            "rope.scaling.type",
            other,
            "none or linear (llama3 is recovered from rope_freqs.weight)",
        )),
    }
}

fn linear(keys: &Keys<'_, '_>, key: &str) -> Result<Option<RopeScaling>, ModelError> {
    let factor = decimal(keys.positive(key, None)?);
    Ok((factor != 1.0).then_some(RopeScaling::Linear { factor }))
}

/// The shortest decimal that is this f32, so that `config.json` says 1e-5 and not 9.999999747378752e-6.
pub fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn unexplained(problem: String) -> ModelError {
    ModelError::Tensor {
        tensor: DIVISORS_TENSOR.to_owned(),
        problem,
    }
}

/// The divisors, `[head_size / 2]`, highest frequency first, all at least 1 and finite.
fn divisors(tensor: &Tensor<'_>, count: usize) -> Result<Vec<f64>, ModelError> {
    let Payload::Stored {
        encoding: Encoding::Plain(Float::F32),
        bytes,
    } = tensor.payload
    else {
        return Err(unexplained("expected type F32".into()));
    };
    if tensor.shape != [count] {
        return Err(unexplained(format!(
            "shape {:?}, expected [{count}]: one per rotary frequency",
            tensor.shape
        )));
    }
    bytes
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        .map(|divisor| match divisor.is_finite() && divisor >= 1.0 {
            true => Ok(f64::from(divisor)),
            false => Err(unexplained(format!(
                "{divisor} divides a frequency, expected at least 1"
            ))),
        })
        .collect()
}

/// The scaling that gives these divisors for rotary base `theta`.
///
/// # Errors
/// No parameters do.
pub fn recover(divisors: &[f64], theta: f64) -> Result<Option<RopeScaling>, ModelError> {
    let factor = divisors.iter().copied().fold(1.0, f64::max);
    if factor == 1.0 {
        return Ok(None);
    }
    let factor = decimal(factor as f32);
    if divisors.iter().all(|&divisor| close(divisor, factor)) {
        return Ok(Some(RopeScaling::Linear { factor }));
    }
    let scaling = fit_llama3(divisors, factor, theta)
        .into_iter()
        .find(|scaling| gives(scaling, divisors, theta));
    scaling.map(Some).ok_or_else(|| {
        unexplained(
            "no parameters of Llama 3's rotary scaling give these factors, and config.json cannot hold them".into(),
        )
    })
}

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= TOLERANCE * expected
}

/// The wavelength of each frequency, in tokens.
fn wavelengths(count: usize, theta: f64) -> impl Iterator<Item = f64> {
    (0..count).map(move |index| std::f64::consts::TAU * theta.powf(index as f64 / count as f64))
}

/// Parameters through the first and the last divisor strictly between 1 and `factor`: rounded as people choose them,
/// then as they come out.
fn fit_llama3(divisors: &[f64], factor: f64, theta: f64) -> Vec<RopeScaling> {
    let between: Vec<(f64, f64)> = wavelengths(divisors.len(), theta)
        .zip(divisors)
        .filter(|&(_, &divisor)| divisor > 1.0 && !close(divisor, factor))
        .map(|(wavelength, divisor)| {
            let smooth = (1.0 / divisor - 1.0 / factor) / (1.0 - 1.0 / factor);
            (1.0 / wavelength, smooth)
        })
        .collect();
    let (Some(first), Some(last)) = (between.first(), between.last()) else {
        return Vec::new();
    };
    // smooth = slope / wavelength - offset, with slope = original / (high - 1) and offset = 1 / (high - 1).
    let slope = (first.1 - last.1) / (first.0 - last.0);
    let offset = slope * first.0 - first.1;
    let (span, original) = (1.0 / offset, slope / offset);
    if !(span.is_finite() && span > 0.0 && original.is_finite() && original >= 1.0) {
        return Vec::new();
    }
    [span.round(), (span * 100.0).round() / 100.0, span]
        .into_iter()
        .filter(|&span| span > 0.0)
        .map(|span| RopeScaling::Llama3 {
            factor,
            high_freq_factor: 1.0 + span,
            original_context_length: original.round() as usize,
        })
        .collect()
}

/// Whether the rule with these parameters gives all the divisors.
fn gives(scaling: &RopeScaling, divisors: &[f64], theta: f64) -> bool {
    let RopeScaling::Llama3 {
        factor,
        high_freq_factor,
        original_context_length,
    } = *scaling
    else {
        return false;
    };
    wavelengths(divisors.len(), theta)
        .zip(divisors)
        .all(|(wavelength, &divisor)| {
            let smooth =
                (original_context_length as f64 / wavelength - 1.0) / (high_freq_factor - 1.0);
            let inverse = smooth.clamp(0.0, 1.0) * (1.0 - 1.0 / factor) + 1.0 / factor;
            close(divisor, 1.0 / inverse)
        })
}
