//! Coverage and ownership: the check that every plan passes before anybody loads by it.
//!
//! Separate from the strategies so that it does not share their mistakes: it knows only what a
//! right plan looks like. Layer splitters elsewhere dropped the last layers of an uneven split and
//! nobody noticed; this is the place that notices.

use std::ops::Range;

use super::table::counted;
use super::{Plan, Role};

/// How ranges fail to cover the model's layers once each and in order.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CoverError {
    /// The number of ranges is not the number of ranks.
    #[error(
        "--layers gives {} for {}; give one range a rank, or start {} (mpirun -np {found}, or plan \
         --ranks {found})",
        counted(*found as u64, "layer range"),
        counted(*expected as u64, "rank"),
        counted(*found as u64, "rank")
    )]
    RangeCount {
        /// Ranks.
        expected: usize,
        /// Ranges.
        found: usize,
    },
    /// A rank has no layer.
    #[error("rank {rank} has no layer; every rank needs at least one")]
    Empty {
        /// The rank.
        rank: usize,
    },
    /// Layers lie between two ranks and on neither.
    #[error(
        "gap before rank {rank}: it starts at layer {found}, expected layer {expected}; \
         {} on no rank", layers_are(*expected, *found)
    )]
    Gap {
        /// The rank after the gap.
        rank: usize,
        /// Where it should start.
        expected: usize,
        /// Where it starts.
        found: usize,
    },
    /// A rank starts before the one before it ends.
    #[error(
        "overlap at rank {rank}: it starts at layer {found}, expected layer {expected}; \
         the ranks before it already end with layer {}", expected - 1
    )]
    Overlap {
        /// The rank that starts too early.
        rank: usize,
        /// Where it should start.
        expected: usize,
        /// Where it starts.
        found: usize,
    },
    /// The last layers are on no rank.
    #[error(
        "{} on no rank: the model has {}, the ranges end before layer {found}",
        layers_are(*found, *expected),
        counted(*expected as u64, "layer")
    )]
    MissingLast {
        /// Layers of the model.
        expected: usize,
        /// Layers covered.
        found: usize,
    },
    /// The ranges name layers that the model does not have.
    #[error(
        "the ranges end with layer {}, but the model has {}: its last one is {}",
        found - 1, counted(*expected as u64, "layer"), expected.saturating_sub(1)
    )]
    BeyondLast {
        /// Layers of the model.
        expected: usize,
        /// Layers covered.
        found: usize,
    },
    /// A rank holds the wrong ends of the model.
    #[error("rank {rank} of {ranks} owns {found:?}, expected {expected:?}")]
    Ownership {
        /// The rank.
        rank: usize,
        /// Ranks.
        ranks: usize,
        /// What it should own besides layers.
        expected: &'static [&'static str],
        /// What it owns.
        found: &'static [&'static str],
    },
}

/// `layer 2 is` or `layers 2 to 4 are`, for the layers from `start` to before `end`.
fn layers_are(start: usize, end: usize) -> String {
    match end.saturating_sub(1) {
        last if last <= start => format!("layer {start} is"),
        last => format!("layers {start} to {last} are"),
    }
}

/// Checks that `ranges`, one a rank, cover layers `0..layer_count` once each and in order.
///
/// # Errors
///
/// The first thing found wrong, in rank order.
pub fn check_cover(
    ranges: &[Range<usize>],
    ranks: usize,
    layer_count: usize,
) -> Result<(), CoverError> {
    if ranges.len() != ranks {
        return Err(CoverError::RangeCount {
            expected: ranks,
            found: ranges.len(),
        });
    }
    let mut expected = 0;
    for (rank, range) in ranges.iter().enumerate() {
        let found = range.start;
        if range.is_empty() {
            return Err(CoverError::Empty { rank });
        } else if found > expected {
            return Err(CoverError::Gap {
                rank,
                expected,
                found,
            });
        } else if found < expected {
            return Err(CoverError::Overlap {
                rank,
                expected,
                found,
            });
        }
        expected = range.end;
    }
    let (expected, found) = (layer_count, expected);
    match found.cmp(&expected) {
        std::cmp::Ordering::Less => Err(CoverError::MissingLast { expected, found }),
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(CoverError::BeyondLast { expected, found }),
    }
}

/// Checks a plan: every one of the model's `layer_count` layers on exactly one rank, contiguous
/// and in order; the lookup on the rank that the plan says and no other, norm and head on the last only.
///
/// # Errors
///
/// The first thing found wrong, in rank order.
pub fn validate(plan: &Plan, layer_count: usize) -> Result<(), CoverError> {
    let ranges: Vec<_> = plan
        .stages
        .iter()
        .map(|stage| stage.layers.clone())
        .collect();
    let ranks = ranges.len();
    check_cover(&ranges, ranks, layer_count)?;
    for (rank, stage) in plan.stages.iter().enumerate() {
        let expected = Role::of(rank, ranks, plan.lookup);
        if stage.role != expected {
            let (expected, found) = (expected.owns(), stage.role.owns());
            return Err(CoverError::Ownership {
                rank,
                ranks,
                expected,
                found,
            });
        }
    }
    Ok(())
}
