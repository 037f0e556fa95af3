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

/// `ns * factor / divisor`, rounded down and kept within 64 bits.
pub(super) fn scaled(ns: u64, factor: u64, divisor: u64) -> u64 {
    let divisor = divisor.max(1);
    // Searches ask millions of times, and division of 128 bits is slow.
    if let Some(product) = ns.checked_mul(factor) {
        return product / divisor;
    }
    let quotient = u128::from(ns) * u128::from(factor) / u128::from(divisor);
    u64::try_from(quotient).unwrap_or(u64::MAX)
}

impl DeviceCost {
    /// What is wrong with these numbers, in the words of a sentence; `None` if nothing is.
    pub fn fault(&self) -> Option<&'static str> {
        let ascends = |pair: &[StepCost]| pair[0].tokens < pair[1].tokens;
        match self.layer.first() {
            None => {
                Some("its layer was timed for no number of tokens; expected one token at least")
            }
            Some(first) if first.tokens != 1 => {
                Some("its layer was not timed for one token; expected that as the first number")
            }
            _ if !self.layer.windows(2).all(ascends) => {
                Some("the numbers of tokens that its layer was timed for do not ascend")
            }
            _ if self.layer_bytes == 0 => Some("the layer that was timed has 0 bytes"),
            _ if self.crowding_per_mille < 1000 => {
                Some("a step is said to take less time while the host computes more")
            }
            _ => None,
        }
    }

    /// Nanoseconds of the timed layer for a step of `tokens` tokens near the sequence's start: a line
    /// through the neighbouring points, beyond the last one as steep as before it. With one point only,
    /// in proportion to the tokens. More tokens never take less time, whatever noise was measured.
    pub(super) fn layer_ns(&self, tokens: u64) -> u64 {
        let (mut before, mut last) = (StepCost { tokens: 0, ns: 0 }, StepCost { tokens: 0, ns: 0 });
        for point in &self.layer {
            (before, last) = (
                last,
                StepCost {
                    ns: point.ns.max(last.ns),
                    ..*point
                },
            );
            if tokens <= last.tokens {
                break;
            }
        }
        let (rise_ns, run) = (
            last.ns - before.ns,
            last.tokens.saturating_sub(before.tokens),
        );
        let beyond = tokens.saturating_sub(before.tokens);
        before.ns.saturating_add(scaled(rise_ns, beyond, run))
    }

    /// Nanoseconds of a step of one token, near the sequence's start, through layers of so many bytes
    /// together, and through the head if it is there; with the host to itself. Grows with the bytes.
    pub(super) fn step_ns(&self, layers_bytes: u64, with_head: bool) -> u64 {
        let head_ns = if with_head { self.head_ns } else { 0 };
        scaled(self.layer_ns(1), layers_bytes, self.layer_bytes)
            .saturating_add(head_ns)
            .saturating_add(self.step_ns)
    }

    /// Where fewer ranks share the host than when it was measured, they crowd each other in proportion less.
    pub fn shared_by(&mut self, sharers: u64, measured_with: u64) {
        let crowding = self.crowding_per_mille.saturating_sub(1000);
        let others = sharers
            .saturating_sub(1)
            .min(measured_with.saturating_sub(1));
        self.crowding_per_mille =
            1000 + scaled(crowding, others, measured_with.saturating_sub(1).max(1));
    }

    /// `ns` while the other ranks of the host compute too.
    pub(super) fn crowded(&self, ns: u64) -> u64 {
        scaled(ns, self.crowding_per_mille, 1000)
    }
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

/// All that was measured about the ranks of a run, in rank order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Costs {
    /// One a rank.
    pub devices: Vec<DeviceCost>,
    /// `None` if the links are not known.
    pub links: Option<LinkCosts>,
}

impl Costs {
    /// The costs when only the ranks `kept` (ascending, each one that there is) take part. A link over
    /// ranks left out was not measured: it is taken to be as slow as the slower of those it replaces.
    /// `None` if `kept` names a rank without costs.
    pub fn of_ranks(&self, kept: &[usize]) -> Option<Self> {
        let devices: Option<Vec<_>> = kept
            .iter()
            .map(|rank| self.devices.get(*rank).cloned())
            .collect();
        let links = match &self.links {
            Some(links) => Some(links.of_ranks(kept)?),
            None => None,
        };
        Some(Self {
            devices: devices?,
            links,
        })
    }
}

impl LinkCosts {
    fn of_ranks(&self, kept: &[usize]) -> Option<Self> {
        let bridge = |pair: &[usize]| slowest(self.forward.get(pair[0]..pair[1])?);
        let forward = kept.windows(2).map(bridge).collect::<Option<_>>()?;
        let (first, last) = (*kept.first()?, *kept.last()?);
        // The ring closes over the ranks left out at either end.
        let ends = [self.forward.get(..first)?, self.forward.get(last..)?].concat();
        let back = [&[self.back][..], &ends].concat();
        Some(Self {
            forward,
            back: slowest(&back)?,
        })
    }
}

/// A link as slow as the slowest of these in either respect.
fn slowest(links: &[LinkCost]) -> Option<LinkCost> {
    Some(LinkCost {
        latency_ns: links.iter().map(|link| link.latency_ns).max()?,
        bytes_per_s: links.iter().map(|link| link.bytes_per_s).min()?,
    })
}

/// What the times of a plan rest on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimeSource {
    /// Nothing in seconds: bytes over speeds that only compare.
    #[default]
    Relative,
    /// What the cluster file says of bandwidths.
    Estimated,
    /// A calibration on these machines.
    Measured,
}

impl TimeSource {
    /// Name as hashed and reported: `relative`, `estimated`, `measured`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Relative => "relative",
            Self::Estimated => "estimated",
            Self::Measured => "measured",
        }
    }
}
