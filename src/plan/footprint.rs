//! What a stage would hold and cost, for any candidate range of layers, in constant time.
//!
//! The strategies ask for millions of candidates, so the [`Ledger`] keeps running sums. All sizes
//! are checked once, when it is built; after that no sum can overflow.

use std::cmp::Ordering;
use std::ops::Range;

use serde::Serialize;

use super::{Device, DeviceCost, Head, ModelShape, PlanError, PlanRequest, Role, Stage};

/// Bytes that a rank holds, by component.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Weights of its layers.
    pub layers_bytes: u64,
    /// Embedding table, if it is the first rank.
    pub embedding_bytes: u64,
    /// Final norm, if it is the last rank.
    pub norm_bytes: u64,
    /// Head, if it is the last rank; a tied table counts here unless the rank is the first too.
    pub head_bytes: u64,
    /// KV cache of its layers for the planned context and sequences.
    pub kv_bytes: u64,
}

impl Footprint {
    /// Bytes of weights.
    pub fn weights_bytes(&self) -> u64 {
        let ends_bytes = self.embedding_bytes.saturating_add(self.norm_bytes);
        self.layers_bytes
            .saturating_add(ends_bytes)
            .saturating_add(self.head_bytes)
    }

    /// Bytes of weights and KV cache.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes().saturating_add(self.kv_bytes)
    }
}

/// Predicted time of one rank's part of a step of one token while the pipeline is full. All stages of
/// a plan are of one kind: nanoseconds where every device's costs are known, else bytes over speeds
/// that only compare.
#[derive(Clone, Copy, Debug)]
pub enum StageTime {
    /// Nanoseconds, the crowding of ranks on one host included.
    Nanoseconds(u64),
    /// A decode step is bound by reading its weights once, so it takes `bytes / speed`. Kept as a
    /// fraction and compared exactly.
    Relative {
        /// Weight bytes read in a step: layers, norm and head. An embedding lookup reads a few rows
        /// only and counts as nothing.
        bytes: u64,
        /// The device's speed; above zero.
        speed: u64,
    },
}

impl StageTime {
    /// This time as a share of `whole`, which is of the same kind; for printing.
    pub fn share_of(self, whole: Self) -> f64 {
        let ((ours, our_speed), (whole, its_speed)) = (self.fraction(), whole.fraction());
        match whole {
            0 => 1.0,
            _ => (ours as f64 / whole as f64) * (its_speed as f64 / our_speed as f64),
        }
    }

    /// The time in nanoseconds, if it is known.
    pub fn ns(self) -> Option<u64> {
        match self {
            Self::Nanoseconds(ns) => Some(ns),
            Self::Relative { .. } => None,
        }
    }

    fn fraction(self) -> (u64, u64) {
        match self {
            Self::Nanoseconds(ns) => (ns, 1),
            Self::Relative { bytes, speed } => (bytes, speed),
        }
    }

    /// Nanoseconds and shares do not compare; ordering by kind first keeps the order total.
    fn is_relative(self) -> bool {
        matches!(self, Self::Relative { .. })
    }
}

impl Ord for StageTime {
    fn cmp(&self, other: &Self) -> Ordering {
        let ((ours, our_speed), (theirs, their_speed)) = (self.fraction(), other.fraction());
        let ours = u128::from(ours) * u128::from(their_speed);
        let by_time = || ours.cmp(&(u128::from(theirs) * u128::from(our_speed)));
        self.is_relative()
            .cmp(&other.is_relative())
            .then_with(by_time)
    }
}

impl PartialOrd for StageTime {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for StageTime {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for StageTime {}

/// Answers what rank `r` holds and how long it takes with layers `a..b`.
pub(super) struct Ledger<'a> {
    pub(super) devices: &'a [Device],
    /// `[layers + 1]`: bytes of the layers before each.
    bytes_before: Vec<u64>,
    shape: &'a ModelShape,
    /// One whole model, a tied table counted once.
    pub(super) model_bytes: u64,
    /// KV bytes of one layer for all sequences.
    kv_bytes_per_layer: u64,
    /// The costs of all devices, or none: those of some do not compare with the speeds of others.
    costs: Option<Vec<&'a DeviceCost>>,
}

impl<'a> Ledger<'a> {
    /// Sums up the request's sizes.
    ///
    /// # Errors
    ///
    /// [`PlanError::TooLarge`] if everything together exceeds 64 bits.
    pub(super) fn new(request: &PlanRequest<'a>) -> Result<Self, PlanError> {
        Self::sum(request).ok_or(PlanError::TooLarge {
            layers: request.shape.layer_count(),
            context_tokens: request.context_tokens,
            sequences: request.sequences,
        })
    }

    fn sum(request: &PlanRequest<'a>) -> Option<Self> {
        let shape = request.shape;
        let kv_bytes_per_layer = shape
            .kv_bytes_per_token_per_layer
            .checked_mul(request.context_tokens)?
            .checked_mul(request.sequences)?;
        let kv_bytes = kv_bytes_per_layer.checked_mul(shape.layer_count() as u64)?;
        // A tied table may stand on two ranks, so the sum below bounds every footprint and their
        // total as well.
        let second_table_bytes = match shape.head {
            Head::Tied => shape.embedding_bytes,
            Head::TiedOnce | Head::Own { .. } => 0,
        };
        let model_bytes = shape.model_bytes()?;
        model_bytes
            .checked_add(second_table_bytes)?
            .checked_add(kv_bytes)?;
        let running = shape.layer_bytes.iter().scan(0_u64, |sum, bytes| {
            *sum += bytes;
            Some(*sum)
        });
        Some(Self {
            devices: request.devices,
            bytes_before: std::iter::once(0).chain(running).collect(),
            shape,
            model_bytes,
            kv_bytes_per_layer,
            costs: request.costs(),
        })
    }

    pub(super) fn layer_count(&self) -> usize {
        self.bytes_before.len() - 1
    }

    pub(super) fn rank_count(&self) -> usize {
        self.devices.len()
    }

    /// What `rank` holds with `layers`.
    pub(super) fn footprint(&self, rank: usize, layers: &Range<usize>) -> Footprint {
        let role = self.role(rank);
        Footprint {
            layers_bytes: self.layers_bytes(layers),
            embedding_bytes: if role.owns_embedding() {
                self.shape.embedding_bytes
            } else {
                0
            },
            norm_bytes: if role.owns_norm() {
                self.shape.norm_bytes
            } else {
                0
            },
            head_bytes: self.head_held_bytes(role),
            kv_bytes: self.kv_bytes_per_layer * layers.len() as u64,
        }
    }

    /// Predicted time of `rank` with `layers`.
    pub(super) fn time(&self, rank: usize, layers: &Range<usize>) -> StageTime {
        let owns_head = self.role(rank).owns_head();
        let layers_bytes = self.layers_bytes(layers);
        if let Some(costs) = &self.costs {
            let cost = costs[rank];
            return StageTime::Nanoseconds(cost.crowded(cost.step_ns(layers_bytes, owns_head)));
        }
        let ends_bytes = match owns_head {
            true => self.shape.norm_bytes + self.shape.head_step_bytes(),
            false => 0,
        };
        StageTime::Relative {
            bytes: layers_bytes + ends_bytes,
            speed: self.devices[rank].speed,
        }
    }

    /// Bytes by which `rank` with `layers` is over its limit; 0 if it fits.
    pub(super) fn lack_bytes(&self, rank: usize, layers: &Range<usize>) -> u64 {
        let need_bytes = self.footprint(rank, layers).total_bytes();
        need_bytes.saturating_sub(self.devices[rank].memory_limit_bytes)
    }

    /// The lack of the rank that lacks most in a cut; `None` for a cut without ranks.
    pub(super) fn worst_lack_bytes(&self, ranges: &[Range<usize>]) -> Option<u64> {
        let ranges = ranges.iter().enumerate();
        ranges
            .map(|(rank, layers)| self.lack_bytes(rank, layers))
            .max()
    }

    /// Whether a cut keeps every rank within its limit.
    pub(super) fn fits(&self, ranges: &[Range<usize>]) -> bool {
        self.worst_lack_bytes(ranges) == Some(0)
    }

    /// The time of the slowest stage of a cut; `None` for a cut without ranks.
    pub(super) fn slowest(&self, ranges: &[Range<usize>]) -> Option<StageTime> {
        let ranges = ranges.iter().enumerate();
        ranges.map(|(rank, layers)| self.time(rank, layers)).max()
    }

    /// The stages of a cut into one range a rank.
    pub(super) fn stages(&self, ranges: &[Range<usize>]) -> Vec<Stage> {
        let stage = |(rank, layers): (usize, &Range<usize>)| Stage {
            device: self.devices[rank].clone(),
            layers: layers.clone(),
            role: self.role(rank),
            footprint: self.footprint(rank, layers),
            time: self.time(rank, layers),
        };
        ranges.iter().enumerate().map(stage).collect()
    }

    fn role(&self, rank: usize) -> Role {
        Role::of(rank, self.rank_count(), self.shape.lookup())
    }

    fn layers_bytes(&self, layers: &Range<usize>) -> u64 {
        self.bytes_before[layers.end] - self.bytes_before[layers.start]
    }

    fn head_held_bytes(&self, role: Role) -> u64 {
        match (role, self.shape.head) {
            (Role::First | Role::Middle | Role::LastWithTable, _) => 0,
            (Role::Only, Head::Tied | Head::TiedOnce) => 0,
            (Role::Only | Role::Last, _) => self.shape.head_step_bytes(),
        }
    }
}
