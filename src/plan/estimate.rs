//! What a device costs, guessed from what its maker says of it.
//!
//! Good for choosing between plans before any machine is there to measure; a calibration is better.
//! Integers all the way, because every rank decides with the result.

use serde::{Deserialize, Serialize};

use super::ModelShape;
use super::cost::{DeviceCost, StepCost, scaled};

/// Of the stated memory bandwidth, what a matrix-vector product reads weights with, in percent. Streaming
/// reads reach four fifths on most machines; the rest goes to refresh and to the gaps between kernels.
const BANDWIDTH_PERCENT: u64 = 80;
/// Of the stated arithmetic, what a matrix product of a few hundred rows reaches, in percent: unpacking
/// quantised weights costs about as much again as the product.
const COMPUTE_PERCENT: u64 = 50;
/// Tokens for which a layer's time is estimated where the arithmetic is known: between a few of them the
/// bandwidth stops to matter.
const POINTS_TOKENS: [u64; 4] = [1, 8, 64, 512];
const NS_PER_S: u64 = 1_000_000_000;
/// Cached tokens that [`DeviceCost::context_ns`] is for.
const CONTEXT_UNIT_TOKENS: u64 = 1024;

/// What is stated of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// Bytes a second that it reads from its memory; above zero.
    pub bandwidth_bytes_per_s: u64,
    /// Operations a second in the dtype that it computes in, if known; above zero.
    pub flops_per_s: Option<u64>,
}

impl Rates {
    /// What `shape`'s parts cost on the device when `sharers` ranks share it. A layer takes as long as
    /// reading its weights, or as two operations a weight and token, whichever is more; the mean layer
    /// stands for all. Without stated arithmetic only one token is estimated.
    pub fn cost(&self, shape: &ModelShape, sharers: u64) -> DeviceCost {
        let layers = (shape.layer_count() as u64).max(1);
        let layers_bytes = shape
            .layer_bytes
            .iter()
            .fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
        let (layer_bytes, layer_weights) = (layers_bytes / layers, shape.layer_weights / layers);
        let token_counts = match self.flops_per_s {
            Some(_) => &POINTS_TOKENS[..],
            None => &POINTS_TOKENS[..1],
        };
        let point = |tokens: &u64| StepCost {
            tokens: *tokens,
            ns: self
                .read_ns(layer_bytes)
                .max(self.compute_ns(layer_weights, *tokens)),
        };
        let kv_bytes = shape
            .kv_bytes_per_token_per_layer
            .saturating_mul(CONTEXT_UNIT_TOKENS);
        DeviceCost {
            layer: token_counts.iter().map(point).collect(),
            layer_bytes: layer_bytes.max(1),
            context_ns: self.read_ns(kv_bytes),
            head_ns: self.read_ns(shape.norm_bytes.saturating_add(shape.head_step_bytes())),
            // What a step costs beside its arithmetic is not stated anywhere.
            step_ns: 0,
            // Ranks of one device share its bandwidth and its arithmetic.
            crowding_per_mille: sharers.max(1).saturating_mul(1000),
        }
    }

    fn read_ns(&self, bytes: u64) -> u64 {
        scaled(
            NS_PER_S,
            bytes,
            percent_of(self.bandwidth_bytes_per_s, BANDWIDTH_PERCENT),
        )
    }

    fn compute_ns(&self, weights: u64, tokens: u64) -> u64 {
        let operations = weights.saturating_mul(tokens).saturating_mul(2);
        self.flops_per_s.map_or(0, |flops| {
            scaled(NS_PER_S, operations, percent_of(flops, COMPUTE_PERCENT))
        })
    }
}

fn percent_of(whole: u64, percent: u64) -> u64 {
    scaled(whole, percent, 100)
}
