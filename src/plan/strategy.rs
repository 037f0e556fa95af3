//! The strategies: their names, and where each one cuts.
//!
//! All of them obey the memory limits in the same way: first the smallest possible lack of the
//! rank that lacks most is found (zero when everything fits), then the strategy chooses among the
//! cuts that lack no more. So rounding never pushes a rank over its limit while another cut would
//! avoid it, and when nothing fits, the cut returned is the one that comes nearest.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use super::balance::{Cuts, Tie};
use super::footprint::Ledger;
use super::{PlanError, check_cover};

/// How the layers are divided.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Strategy {
    /// The smallest predicted time of the slowest stage, exactly; among equals the smallest
    /// footprint of the fullest rank, then the smallest first cuts.
    #[default]
    Balanced,
    /// Layer counts proportional to the memory limits, by largest remainder.
    MemoryProportional,
    /// Layer counts proportional to the speeds, by largest remainder.
    ComputeProportional,
    /// Layer counts that differ by at most one. The longer stages are the earliest ranks that can
    /// hold one, because the last rank has the head to compute.
    Uniform,
    /// Whichever of the others predicts the fastest slowest stage and fits; in a tie the first of
    /// balanced, compute-proportional, memory-proportional, uniform.
    Auto,
    /// One range a rank, given by hand.
    Manual(LayerRanges),
}

impl Strategy {
    /// The strategies that have a name on the command line, in the order of the help text.
    pub const NAMED: [Self; 5] = [
        Self::Balanced,
        Self::MemoryProportional,
        Self::ComputeProportional,
        Self::Uniform,
        Self::Auto,
    ];

    /// What `auto` tries besides `balanced`, the preferred one first.
    const CANDIDATES: [Self; 3] = [
        Self::ComputeProportional,
        Self::MemoryProportional,
        Self::Uniform,
    ];

    /// Name as on the command line and in the report; `manual` for ranges given by hand.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::MemoryProportional => "memory-proportional",
            Self::ComputeProportional => "compute-proportional",
            Self::Uniform => "uniform",
            Self::Auto => "auto",
            Self::Manual(_) => "manual",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Strategy {
    type Err = ParseStrategyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::NAMED
            .into_iter()
            .find(|strategy| strategy.name() == text);
        found.ok_or_else(|| ParseStrategyError {
            found: text.to_owned(),
        })
    }
}

/// A name that is no strategy's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown strategy `{found}`; expected balanced, memory-proportional, compute-proportional, \
     uniform or auto (ranges by hand: --layers 0-9,10-18,19-27)"
)]
pub struct ParseStrategyError {
    found: String,
}

/// Layer ranges given by hand, one a rank: `0-9,10-18,19-27`, both ends included. Not yet checked
/// against a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerRanges(pub Vec<Range<usize>>);

impl fmt::Display for LayerRanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (rank, range) in self.0.iter().enumerate() {
            let comma = if rank == 0 { "" } else { "," };
            write!(f, "{comma}{}", ShowLayers(range))?;
        }
        Ok(())
    }
}

/// A range of layers as people write it: first and last, `0-9`; a single one as `7`.
pub(super) struct ShowLayers<'a>(pub(super) &'a Range<usize>);

impl fmt::Display for ShowLayers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.len() {
            0 => f.write_str("none"),
            1 => write!(f, "{}", self.0.start),
            _ => write!(f, "{}-{}", self.0.start, self.0.end - 1),
        }
    }
}

/// Why a text is no list of layer ranges.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseLayersError {
    /// A part is neither `first-last` nor a single number.
    #[error(
        "rank {rank}: `{part}` is no layer range; expected first-last such as 0-9, or one number"
    )]
    Malformed {
        /// The rank whose range it is.
        rank: usize,
        /// What stands there.
        part: String,
    },
    /// The first layer comes after the last.
    #[error("rank {rank}: layers {first}-{last} run backwards; expected {last}-{first}?")]
    Backwards {
        /// The rank whose range it is.
        rank: usize,
        /// First number.
        first: usize,
        /// Second number.
        last: usize,
    },
}

impl FromStr for LayerRanges {
    type Err = ParseLayersError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split(',').enumerate();
        parts
            .map(|(rank, part)| parse_range(rank, part.trim()))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

fn parse_range(rank: usize, part: &str) -> Result<Range<usize>, ParseLayersError> {
    let malformed = || ParseLayersError::Malformed {
        rank,
        part: part.to_owned(),
    };
    let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse::<usize>().map_err(|_| malformed()),
        false => Err(malformed()),
    };
    let (first, last) = part.split_once('-').unwrap_or((part, part));
    let (first, last) = (number(first)?, number(last)?);
    if last < first {
        return Err(ParseLayersError::Backwards { rank, first, last });
    }
    Ok(first..last.checked_add(1).ok_or_else(malformed)?)
}

/// Cuts by `strategy`. Returns the strategy that made the cut (for `auto` the winner) and one range
/// a rank. If the ranges put some rank over its limit, no cut of that strategy fits.
///
/// # Errors
///
/// [`PlanError::Cover`] for ranges by hand that do not cover the model.
pub(super) fn cut(
    strategy: &Strategy,
    ledger: &Ledger<'_>,
) -> Result<(Strategy, Vec<Range<usize>>), PlanError> {
    let ranges = match strategy {
        Strategy::Auto => return Ok(fastest_that_fits(ledger)),
        Strategy::Manual(LayerRanges(ranges)) => {
            check_cover(ranges, ledger.rank_count(), ledger.layer_count())?;
            ranges.clone()
        }
        _ => automatic(strategy, ledger),
    };
    Ok((strategy.clone(), ranges))
}

/// Whether some cut that the strategy may make keeps every rank within its limit.
pub(super) fn can_fit(strategy: &Strategy, ledger: &Ledger<'_>) -> bool {
    match strategy {
        Strategy::Manual(LayerRanges(ranges)) => {
            let covers = check_cover(ranges, ledger.rank_count(), ledger.layer_count()).is_ok();
            covers && ledger.fits(ranges)
        }
        _ => {
            let fits = |rank, layers: &_| ledger.lack_bytes(rank, layers) == 0;
            let cuts = cuts(strategy, ledger);
            cuts.least_worst(|rank, layers| fits(rank, layers).then_some(()))
                .is_some()
        }
    }
}

/// All cuts that the strategy may make.
fn cuts(strategy: &Strategy, ledger: &Ledger<'_>) -> Cuts {
    let (layers, ranks) = (ledger.layer_count(), ledger.rank_count());
    let counts = match strategy {
        Strategy::Uniform => layers / ranks..=layers.div_ceil(ranks),
        _ => 1..=layers + 1 - ranks,
    };
    Cuts {
        layers,
        ranks,
        counts,
    }
}

/// The smallest lack of the rank that lacks most, over all `cuts`: 0 if one of them fits.
fn least_lack_bytes(cuts: &Cuts, ledger: &Ledger<'_>) -> Option<u64> {
    cuts.least_worst(|rank, layers| Some(ledger.lack_bytes(rank, layers)))
}

fn automatic(strategy: &Strategy, ledger: &Ledger<'_>) -> Vec<Range<usize>> {
    let devices = ledger.devices.iter();
    let weights: Vec<u64> = match strategy {
        Strategy::MemoryProportional => devices.map(|device| device.memory_limit_bytes).collect(),
        Strategy::ComputeProportional => devices.map(|device| device.speed).collect(),
        Strategy::Uniform => devices.map(|_| 1).collect(),
        Strategy::Balanced | Strategy::Auto | Strategy::Manual(_) => return balanced(ledger),
    };
    nearest_to_quotas(strategy, ledger, &weights)
}

/// Three exact searches, each among the cuts that are best for the ones before: memory, the
/// slowest stage, the fullest rank. What is still equal then is decided by the smallest ends.
fn balanced(ledger: &Ledger<'_>) -> Vec<Range<usize>> {
    let cuts = cuts(&Strategy::Balanced, ledger);
    let lack = least_lack_bytes(&cuts, ledger);
    let fits = |rank, layers: &_| Some(ledger.lack_bytes(rank, layers)) <= lack;

    let time =
        cuts.least_worst(|rank, layers| fits(rank, layers).then(|| ledger.time(rank, layers)));
    let fast = |rank, layers: &_| fits(rank, layers) && Some(ledger.time(rank, layers)) <= time;

    let total_bytes = |rank, layers: &_| ledger.footprint(rank, layers).total_bytes();
    let fullest =
        cuts.least_worst(|rank, layers| fast(rank, layers).then(|| total_bytes(rank, layers)));
    let best = |rank, layers: &_| fast(rank, layers) && Some(total_bytes(rank, layers)) <= fullest;

    let ranges = cuts.least_sum(Tie::FewestFirst, |rank, layers| {
        best(rank, layers).then_some(0)
    });
    ranges.expect("ranks <= layers, so a cut exists, and the bounds come from cuts that exist")
}

/// The cut whose layer counts come nearest to the exact shares: the smallest sum of squared
/// differences. Without memory limits in the way that is the method of largest remainders, earlier
/// ranks first among equal remainders; with limits it is its repair, which moves layers to where
/// they disturb the proportion least.
///
/// Shares are fixed-point numbers with 32 fractional bits: counts are at most `MAX_LAYERS`, so a
/// square has at most 84 bits and the sum cannot overflow.
fn nearest_to_quotas(
    strategy: &Strategy,
    ledger: &Ledger<'_>,
    weights: &[u64],
) -> Vec<Range<usize>> {
    const FRACTION_BITS: u32 = 32;
    let whole: u128 = weights.iter().copied().map(u128::from).sum::<u128>().max(1);
    let layers = ledger.layer_count() as u128;
    let quota = |weight: &u64| ((u128::from(*weight) * layers) << FRACTION_BITS) / whole;
    let quotas: Vec<u128> = weights.iter().map(quota).collect();

    let cuts = cuts(strategy, ledger);
    let lack = least_lack_bytes(&cuts, ledger);
    let ranges = cuts.least_sum(Tie::MostFirst, |rank, layers| {
        let count = (layers.len() as u128) << FRACTION_BITS;
        let fits = Some(ledger.lack_bytes(rank, layers)) <= lack;
        fits.then(|| count.abs_diff(quotas[rank]).pow(2))
    });
    ranges.expect("ranks <= layers, so a cut exists, and the lack comes from one that exists")
}

/// The candidate with the fastest slowest stage among those that fit. If `balanced` does not fit,
/// nothing does, and its cut comes nearest.
fn fastest_that_fits(ledger: &Ledger<'_>) -> (Strategy, Vec<Range<usize>>) {
    let mut best = (Strategy::Balanced, balanced(ledger));
    for strategy in Strategy::CANDIDATES {
        let ranges = automatic(&strategy, ledger);
        if ledger.fits(&ranges) && ledger.slowest(&ranges) < ledger.slowest(&best.1) {
            best = (strategy, ranges);
        }
    }
    best
}
