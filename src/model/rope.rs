//! Rotary position embedding, half-split pairs (element `i` with `i + head_dim / 2`), with the
//! stretched variants that checkpoints ask for.

use super::architecture::{Architecture, Family, RopeScaling};
use anyhow::Result;
use mlx_rs::{Array, fast};
use std::f64::consts::PI;

/// Rotates queries and keys by their position.
#[derive(Debug)]
pub struct Rope {
    dimensions: i32,
    positions: Positions,
}

/// Where the angles come from.
#[derive(Debug)]
enum Positions {
    /// Angle of pair `i` at position `p`: `p * scale / base^(2 i / dimensions)`.
    Base { base: f32, scale: f32 },
    /// Angle of pair `i` at position `p`: `p / periods[i]`; `[dimensions / 2]`, f32.
    Periods(Array),
}

impl Rope {
    /// The rotary embedding that the architecture asks for.
    pub fn new(architecture: &Architecture) -> Self {
        let family = &architecture.family;
        let base = family.rope_theta;
        let positions = match architecture.rope_scaling {
            RopeScaling::None => Positions::Base {
                base: base as f32,
                scale: 1.0,
            },
            RopeScaling::Linear { factor } => Positions::Base {
                base: base as f32,
                scale: (1.0 / factor) as f32,
            },
            RopeScaling::Llama3 { .. } => {
                let periods = llama3_periods(family.head_dim, base, architecture.rope_scaling);
                let periods: Vec<f32> = periods.iter().map(|&period| period as f32).collect();
                Positions::Periods(Array::from_slice(&periods, &[periods.len() as i32]))
            }
        };
        Self {
            dimensions: family.head_dim as i32,
            positions,
        }
    }

    /// `x`: `[1, heads, tokens, head_dim]`, the first token at position `start` -> the same shape.
    pub fn forward(&self, x: &Array, start: i32) -> Result<Array> {
        let rotated = match &self.positions {
            Positions::Base { base, scale } => {
                fast::rope(x, self.dimensions, false, *base, *scale, start, None)
            }
            Positions::Periods(periods) => {
                fast::rope(x, self.dimensions, false, None, 1.0, start, periods)
            }
        };
        Ok(rotated?)
    }
}

/// Radians by which a position turns each pair of a head, `[head_dim / 2]`.
pub fn frequencies(architecture: &Architecture) -> Vec<f64> {
    let Family {
        head_dim,
        rope_theta,
        ..
    } = architecture.family;
    let of_base = |divisor: f64| {
        (0..head_dim / 2)
            .map(|pair| rope_theta.powf(-2.0 * pair as f64 / head_dim as f64) / divisor)
            .collect()
    };
    match architecture.rope_scaling {
        RopeScaling::None => of_base(1.0),
        RopeScaling::Linear { factor } => of_base(factor),
        RopeScaling::Llama3 { .. } => {
            let periods = llama3_periods(head_dim, rope_theta, architecture.rope_scaling);
            periods.iter().map(|period| 1.0 / period).collect()
        }
    }
}

/// Periods (over 2 pi) of the Llama 3 scaling, one a pair: long wavelengths are stretched by the
/// factor, short ones kept, those between blended linearly in the number of turns that the original
/// context holds. Source: the `rope_scaling` of the Llama 3.1 reference configuration.
fn llama3_periods(dimensions: usize, base: f64, scaling: RopeScaling) -> Vec<f64> {
    let RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_context,
    } = scaling
    else {
        return Vec::new();
    };
    (0..dimensions / 2)
        .map(|pair| {
            let period = base.powf(2.0 * pair as f64 / dimensions as f64);
            let turns = original_context / (2.0 * PI * period);
            let kept =
                ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            match kept {
                0.0 => period * factor,
                1.0 => period,
                kept => period / ((1.0 - kept) / factor + kept),
            }
        })
        .collect()
}
