//! When nothing fits: what each rank lacks, and what would fit instead.
//!
//! Separate because it plans again, several times, with fewer sequences, a shorter context or more
//! hosts. All answers are searched for with the strategy's own feasibility test, none is estimated.

use std::fmt;
use std::ops::Range;

use super::footprint::Ledger;
use super::strategy::can_fit;
use super::table::{Align, Table, counted, printable, size};
use super::{Device, PlanRequest, Strategy};

/// One rank of a cut that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankNeed {
    /// The device's name.
    pub name: String,
    /// Its layers in the cut that comes nearest to fitting.
    pub layers: Range<usize>,
    /// Bytes it would hold.
    pub need_bytes: u64,
    /// Bytes it may hold.
    pub limit_bytes: u64,
}

impl RankNeed {
    /// Bytes over the limit; 0 for a rank that fits.
    pub fn lack_bytes(&self) -> u64 {
        self.need_bytes.saturating_sub(self.limit_bytes)
    }
}

/// Why no cut fits, and what would. Displays as a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortfall {
    /// The strategy asked for.
    pub strategy: Strategy,
    /// The cut whose worst lack is the smallest, in rank order.
    pub ranks: Vec<RankNeed>,
    /// Tokens of context asked for.
    pub context_tokens: u64,
    /// Sequences asked for.
    pub sequences: u64,
    /// Most sequences that fit at this context; `None` if not even one does.
    pub max_sequences: Option<u64>,
    /// Longest context that fits at these sequences; `None` if not even one token does.
    pub max_context_tokens: Option<u64>,
    /// Fewest hosts that hold it all, when the given hosts are repeated in their order; `None` if
    /// no number of them does, or for ranges by hand.
    pub host_count: Option<usize>,
    /// Whether `balanced` fits where this strategy does not.
    pub balanced_fits: bool,
}

impl std::error::Error for Shortfall {}

impl Shortfall {
    pub(super) fn new(
        request: &PlanRequest<'_>,
        ledger: &Ledger<'_>,
        ranges: &[Range<usize>],
    ) -> Self {
        let need = |(rank, layers): (usize, &Range<usize>)| RankNeed {
            name: ledger.devices[rank].name.clone(),
            layers: layers.clone(),
            need_bytes: ledger.footprint(rank, layers).total_bytes(),
            limit_bytes: ledger.devices[rank].memory_limit_bytes,
        };
        let with_sequences = |sequences| PlanRequest {
            sequences,
            ..request.clone()
        };
        let with_context = |context_tokens| PlanRequest {
            context_tokens,
            ..request.clone()
        };
        let balanced = PlanRequest {
            strategy: Strategy::Balanced,
            ..request.clone()
        };
        Self {
            strategy: request.strategy.clone(),
            ranks: ranges.iter().enumerate().map(need).collect(),
            context_tokens: request.context_tokens,
            sequences: request.sequences,
            max_sequences: largest(request.sequences, |n| fits(&with_sequences(n))),
            max_context_tokens: largest(request.context_tokens, |n| fits(&with_context(n))),
            host_count: enough_hosts(request),
            balanced_fits: fits(&balanced),
        }
    }

    /// The answers to "what would fit", a sentence each.
    fn remedies(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.balanced_fits {
            lines.push("--strategy balanced fits on these hosts".to_owned());
        }
        if let Some(sequences) = self.max_sequences {
            lines.push(format!(
                "{} with --context {}",
                counted(sequences, "sequence"),
                self.context_tokens
            ));
        }
        if let Some(context_tokens) = self.max_context_tokens {
            lines.push(format!(
                "--context {context_tokens} at {}",
                counted(self.sequences, "sequence")
            ));
        }
        if let Some(hosts) = self.host_count {
            lines.push(format!(
                "{hosts} hosts like these instead of {}",
                self.ranks.len()
            ));
        }
        lines
    }
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let over = self
            .ranks
            .iter()
            .filter(|rank| rank.lack_bytes() > 0)
            .count();
        let ranks = counted(self.ranks.len() as u64, "rank");
        let (context_tokens, sequences) = (self.context_tokens, self.sequences);
        let cut = match &self.strategy {
            Strategy::Manual(ranges) => format!("cut by hand: --layers {ranges}"),
            strategy => format!("`{strategy}` finds no cut that fits; the nearest one:"),
        };
        writeln!(
            f,
            "the model does not fit: {over} of {ranks} over the memory limit"
        )?;
        writeln!(
            f,
            "context {context_tokens}, sequences {sequences}; MB = 1e6, GB = 1e9 bytes\n{cut}\n"
        )?;
        write!(f, "{}", self.table())?;
        let remedies = self.remedies();
        if remedies.is_empty() {
            return write!(
                f,
                "\nfewer sequences, a shorter context or more such hosts do not help"
            );
        }
        write!(f, "\nwhat would fit:")?;
        remedies
            .iter()
            .try_for_each(|line| write!(f, "\n  - {line}"))
    }
}

impl Shortfall {
    fn table(&self) -> Table {
        let mut table = Table::new(&[
            ("rank", Align::Right),
            ("host", Align::Left),
            ("layers", Align::Left),
            ("needs", Align::Right),
            ("limit", Align::Right),
            ("lacks", Align::Right),
        ]);
        for (rank, need) in self.ranks.iter().enumerate() {
            let lack_bytes = need.lack_bytes();
            table.row(vec![
                rank.to_string(),
                printable(&need.name),
                super::strategy::ShowLayers(&need.layers).to_string(),
                size(need.need_bytes),
                size(need.limit_bytes),
                if lack_bytes == 0 {
                    "-".to_owned()
                } else {
                    size(lack_bytes)
                },
            ]);
        }
        table
    }
}

/// Whether some cut of the request's strategy keeps every rank within its limit.
pub(super) fn fits(request: &PlanRequest<'_>) -> bool {
    let ledger = Ledger::new(request);
    ledger.is_ok_and(|ledger| can_fit(&request.strategy, &ledger))
}

/// The largest number from 1 to `at_most` that holds; what holds for a number holds for all
/// smaller ones.
pub(super) fn largest(at_most: u64, holds: impl Fn(u64) -> bool) -> Option<u64> {
    let (mut good, mut bad) = (0, at_most.saturating_add(1));
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if holds(middle) {
            good = middle
        } else {
            bad = middle
        }
    }
    (good > 0).then_some(good)
}

/// The fewest hosts, more than there are, that hold the model when the given ones are repeated in
/// their order. Not monotone (the last one has the head to hold), hence tried one by one.
fn enough_hosts(request: &PlanRequest<'_>) -> Option<usize> {
    if matches!(request.strategy, Strategy::Manual(_)) {
        return None;
    }
    let more = request.devices.len() + 1..=request.shape.layer_count();
    more.into_iter().find(|hosts| {
        let devices: Vec<Device> = request
            .devices
            .iter()
            .cycle()
            .take(*hosts)
            .cloned()
            .collect();
        fits(&PlanRequest {
            devices: &devices,
            ..request.clone()
        })
    })
}
