//! How much more a plan's ranks could hold: a longer context, or more sequences.
//!
//! The counterpart of `shortfall`, with the same searches.

use super::shortfall::{fits, largest};
use super::{Device, ModelShape, Plan, PlanRequest, Strategy, TimeSource};

/// Most sequences that are searched for.
const MOST_SEQUENCES: u64 = 1 << 20;

/// What fits at most, one thing changed at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Longest context of a single sequence, at most the model's: caches for several are planned where they fit.
    pub context_tokens: u64,
    /// Most sequences at the planned context, at most 1 048 576.
    pub sequences: u64,
}

impl Plan {
    /// What this plan's cut has room for. `shape` is the model that was planned for.
    pub fn capacity(&self, shape: &ModelShape, longest_context_tokens: u64) -> Capacity {
        self.capacity_of(
            Strategy::Manual(self.layer_ranges()),
            shape,
            longest_context_tokens,
        )
    }

    /// What any cut over the same devices has room for.
    pub fn best_capacity(&self, shape: &ModelShape, longest_context_tokens: u64) -> Capacity {
        self.capacity_of(Strategy::Balanced, shape, longest_context_tokens)
    }

    fn capacity_of(
        &self,
        strategy: Strategy,
        shape: &ModelShape,
        longest_context_tokens: u64,
    ) -> Capacity {
        let devices: Vec<Device> = self
            .stages
            .iter()
            .map(|stage| stage.device.clone())
            .collect();
        let request = |context_tokens, sequences| PlanRequest {
            shape,
            devices: &devices,
            strategy: strategy.clone(),
            context_tokens,
            sequences,
            wire_dtype: self.wire_dtype,
            links: None,
            cost_source: TimeSource::Relative,
        };
        let context = |tokens| fits(&request(tokens, 1));
        let sequences = |sequences| fits(&request(self.context_tokens, sequences));
        Capacity {
            context_tokens: largest(longest_context_tokens, context).unwrap_or(0),
            sequences: largest(MOST_SEQUENCES, sequences).unwrap_or(0),
        }
    }
}
