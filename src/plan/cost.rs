//! What computing and sending cost, in integer nanoseconds: measured by a calibration, or estimated from
//! what the cluster file says of a device.
//!
//! Integers, because every rank decides with them and must decide the same.

use serde::{Deserialize, Serialize};

/// The time that a number of tokens takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepCost {
    /// Tokens of the step.
    pub tokens: u64,
    /// Nanoseconds.
    pub ns: u64,
}

/// What one rank needs for the parts of this model, when its host computes nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceCost {
    /// One layer's part of a step of so many tokens of one sequence, near the sequence's start. Ascending
    /// in tokens, never empty, the first for one token.
    pub layer: Vec<StepCost>,
    /// Bytes of weights of that layer; one of other bytes takes proportionally long.
    pub layer_bytes: u64,
    /// How much longer one layer takes for one token, for every 1024 tokens that its cache holds already.
    pub context_ns: u64,
    /// Final norm, head and sampling of one token.
    pub head_ns: u64,
    /// What each step costs beside layers and head: the frame read and written, activations in and out.
    pub step_ns: u64,
    /// How long a step takes while all ranks of the host compute, in thousandths of what it takes alone;
    /// at least 1000.
    pub crowding_per_mille: u64,
}

/// What a message costs from one rank to another, waking the receiver included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkCost {
    /// An empty message, one way.
    pub latency_ns: u64,
    /// Bytes a second of a long one; above zero.
    pub bytes_per_s: u64,
}

impl LinkCost {
    /// Nanoseconds that a message of so many bytes takes one way.
    pub fn ns(self, bytes: u64) -> u64 {
        let transfer_ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_s.max(1));
        self.latency_ns
            .saturating_add(u64::try_from(transfer_ns).unwrap_or(u64::MAX))
    }
}

/// The links that a pipeline uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkCosts {
    /// From rank `r` to rank `r + 1`; one less than there are ranks.
    pub forward: Vec<LinkCost>,
    /// From the last rank to the first, which closes the ring: tokens, and rows of a table that stands on
    /// the last rank. The question for them takes as long the other way.
    pub back: LinkCost,
}
