//! Rotary scaling out of metadata, and out of Llama 3's divisors.

use proptest::prelude::*;

use super::super::gguf::Gguf;
use super::super::{Checkpoint, ModelError};
use super::builder::{Builder, HEAD, TENSOR_F16, TENSOR_F32, model};

/// Parameters of Llama 3's rule as they stand in `config.json`.
#[derive(Debug, Clone, Copy)]
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
}

/// The divisors as the converter to GGUF makes them: each frequency falls into one of three bands.
fn converter_divisors(parameters: Llama3, theta: f64, head_size: usize) -> Vec<f32> {
    let Llama3 {
        factor,
        low,
        high,
        original,
    } = parameters;
    (0..head_size / 2)
        .map(|index| {
            let frequency = 1.0 / (theta as f32).powf(2.0 * index as f32 / head_size as f32);
            let wavelength = 2.0 * std::f64::consts::PI / f64::from(frequency);
            if wavelength < original / high {
                1.0
            } else if wavelength > original / low {
                factor as f32
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
            }
        })
        .collect()
}

/// A Llama whose only tensors of interest are its divisors.
fn with_divisors(divisors: &[f32], theta: f32) -> Builder {
    let bytes = divisors
        .iter()
        .flat_map(|divisor| divisor.to_le_bytes())
        .collect();
    model("llama").f32("llama.rope.freq_base", theta).tensor(
        "rope_freqs.weight",
        &[divisors.len()],
        TENSOR_F32,
        bytes,
    )
}

/// The `rope_scaling` of the import's `config.json`.
fn rope_scaling(model: &Builder) -> Result<Option<serde_json::Value>, ModelError> {
    let file = model.build();
    let source = Gguf::parse(&file)?;
    let checkpoint = Checkpoint::plan(&source)?;
    Ok(checkpoint.config().get("rope_scaling").cloned())
}

/// Only the scaling, with heads of any size.
fn recover(
    divisors: &[f32],
    theta: f64,
) -> Result<Option<super::super::rope::RopeScaling>, ModelError> {
    let divisors: Vec<f64> = divisors.iter().map(|&divisor| divisor.into()).collect();
    super::super::rope::recover(&divisors, theta)
}

const PUBLISHED: Llama3 = Llama3 {
    factor: 8.0,
    low: 1.0,
    high: 4.0,
    original: 8192.0,
};

#[test]
fn published_llama_3_parameters_come_back_as_published() {
    // Llama 3.1 8B and 70B; Llama 3.2 1B (heads of 64) and 3B.
    for (factor, head_size) in [(8.0, 128), (32.0, 64), (32.0, 128)] {
        let parameters = Llama3 {
            factor,
            ..PUBLISHED
        };
        let divisors = converter_divisors(parameters, 500_000.0, head_size);
        let expected = super::super::rope::RopeScaling::Llama3 {
            factor,
            high_freq_factor: 4.0,
            original_context_length: 8192,
        };
        assert_eq!(recover(&divisors, 500_000.0).ok(), Some(Some(expected)));
    }
}

#[test]
fn llama_3_divisors_become_config_json() {
    // A small theta puts several of a small head's 8 frequencies between the bands.
    let parameters = Llama3 {
        original: 64.0,
        ..PUBLISHED
    };
    let divisors = converter_divisors(parameters, 100.0, HEAD);
    let found = rope_scaling(&with_divisors(&divisors, 100.0)).expect("it can be expressed");
    let expected = serde_json::json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    assert_eq!(found, Some(expected));
}

#[test]
fn divisors_of_one_mean_no_scaling_and_equal_ones_linear_scaling() {
    let found = |divisor: f32| rope_scaling(&with_divisors(&[divisor; HEAD / 2], 1e4)).ok();
    assert_eq!(found(1.0), Some(None));
    let linear = serde_json::json!({"rope_type": "linear", "factor": 2.5});
    assert_eq!(found(2.5), Some(Some(linear)));
}

#[test]
fn divisors_without_parameters_name_the_tensor() {
    let published = converter_divisors(PUBLISHED, 500_000.0, 128);
    for index in 0..published.len() {
        let mut divisors = published.clone();
        divisors[index] *= 1.001;
        let text = recover(&divisors, 500_000.0).map_err(|error| error.to_string());
        let named = text.is_err_and(|text| text.contains("rope_freqs.weight"));
        assert!(named, "divisor {index} is off and nobody minds");
    }
    for divisors in [
        vec![0.5; HEAD / 2],
        vec![f32::NAN; HEAD / 2],
        vec![f32::INFINITY; HEAD / 2],
        vec![2.0; HEAD / 2 - 1],
        [vec![1.0; HEAD / 4], vec![2.0; HEAD / 4]].concat(),
    ] {
        let error = rope_scaling(&with_divisors(&divisors, 1e4)).map_err(|error| error.to_string());
        assert!(
            error.is_err_and(|text| text.contains("rope_freqs.weight")),
            "{divisors:?}"
        );
    }
    let both = with_divisors(&[2.5; HEAD / 2], 1e4).f32("llama.rope.scale_linear", 4.0);
    let error = rope_scaling(&both).map_err(|error| error.to_string());
    assert!(error.is_err_and(|text| text.contains("on top of")));
    let half = model("llama").tensor("rope_freqs.weight", &[HEAD / 2], TENSOR_F16, vec![0; HEAD]);
    let error = rope_scaling(&half).map_err(|error| error.to_string());
    assert!(error.is_err_and(|text| text.contains("F32")));
}

#[test]
fn scaling_in_the_metadata_is_none_linear_or_refused() {
    let linear = serde_json::json!({"rope_type": "linear", "factor": 4.0});
    for (model, expected) in [
        (model("qwen3").text("qwen3.rope.scaling.type", "none"), None),
        (
            model("qwen3")
                .text("qwen3.rope.scaling.type", "linear")
                .f32("qwen3.rope.scaling.factor", 4.0),
            Some(linear.clone()),
        ),
        (
            model("llama").f32("llama.rope.scale_linear", 4.0),
            Some(linear),
        ),
        (model("llama").f32("llama.rope.scale_linear", 1.0), None),
    ] {
        assert_eq!(rope_scaling(&model).ok(), Some(expected));
    }
    let yarn = model("qwen3")
        .text("qwen3.rope.scaling.type", "yarn")
        .f32("qwen3.rope.scaling.factor", 4.0);
    let error = rope_scaling(&yarn).map_err(|error| error.to_string());
    assert!(
        error.is_err_and(|text| text.contains("qwen3.rope.scaling.type") && text.contains("yarn"))
    );
}

proptest! {
    #[test]
    fn recovered_parameters_give_the_same_divisors(
        factor in 2u32..64,
        high in 2u32..9,
        original in 2048u32..65536,
        theta in 100_000.0f64..2_000_000.0,
    ) {
        let parameters = Llama3 {
            factor: factor.into(),
            low: 1.0,
            high: high.into(),
            original: original.into(),
        };
        let divisors = converter_divisors(parameters, f64::from(theta as f32), 128);
        let found = recover(&divisors, f64::from(theta as f32));
        let Ok(Some(super::super::rope::RopeScaling::Llama3 {
            factor,
            high_freq_factor,
            original_context_length,
        })) = found else {
            return Err(TestCaseError::fail(format!("{found:?}")));
        };
        let again = Llama3 { factor, low: 1.0, high: high_freq_factor, original: original_context_length as f64 };
        for (found, expected) in converter_divisors(again, f64::from(theta as f32), 128).iter().zip(&divisors) {
            prop_assert!((found - expected).abs() <= 2e-5 * expected, "{found} {expected}");
        }
    }
}
