//! Exact searches over contiguous cuts, by dynamic programming.
//!
//! Separate because nothing here knows of models or memory: `ranks` ranks share `layers` layers in
//! order, each gets a number of layers within `counts`, and a closure scores a rank's range. The
//! closure returns `None` for a range that must not be, and has to be *monotone*: a longer range
//! never scores lower, and is never allowed where a shorter one of the same end or start is not.
//! That is what lets the loops below stop early.

use std::ops::{Range, RangeInclusive};

/// The cuts to search.
pub(super) struct Cuts {
    pub(super) layers: usize,
    pub(super) ranks: usize,
    /// Layers that one rank may get.
    pub(super) counts: RangeInclusive<usize>,
}

/// Which of several equally good cuts to take.
#[derive(Clone, Copy)]
pub(super) enum Tie {
    /// The lexicographically smallest ends: early ranks get fewer layers.
    FewestFirst,
    /// The lexicographically largest ends: early ranks get more layers.
    MostFirst,
}

impl Cuts {
    /// Where rank `rank` may start, so that all ranks before and after get an allowed number.
    /// `rank == ranks` is the end of the model.
    fn starts(&self, rank: usize) -> RangeInclusive<usize> {
        let (fewest, most) = (*self.counts.start(), *self.counts.end());
        let after = self.ranks - rank;
        let first = (rank * fewest).max(self.layers.saturating_sub(after * most));
        let last = (rank * most).min(self.layers.saturating_sub(after * fewest));
        first..=last
    }

    /// The starts of `rank`'s ranges that end at `end`, shortest range first.
    fn starts_before(&self, rank: usize, end: usize) -> impl Iterator<Item = usize> + use<> {
        let (starts, counts) = (self.starts(rank), &self.counts);
        let first = end.saturating_sub(*counts.end()).max(*starts.start());
        let last = end.saturating_sub(*counts.start()).min(*starts.end());
        (first..=last).rev()
    }

    /// The ends of `rank`'s ranges that start at `start`, shortest range first.
    fn ends_after(
        &self,
        rank: usize,
        start: usize,
    ) -> impl DoubleEndedIterator<Item = usize> + use<> {
        let (ends, counts) = (self.starts(rank + 1), &self.counts);
        let first = (start + counts.start()).max(*ends.start());
        let last = (start + counts.end()).min(*ends.end());
        first..=last
    }

    /// The smallest possible worst score of any rank. `None` if no allowed cut exists.
    pub(super) fn least_worst<K: Ord + Copy>(
        &self,
        score: impl Fn(usize, &Range<usize>) -> Option<K>,
    ) -> Option<K> {
        // worst[end]: the smallest worst score of the ranks so far when they cover `..end`.
        let mut worst: Vec<Option<K>> = vec![None; self.layers + 1];
        for end in self.ends_after(0, 0) {
            worst[end] = score(0, &(0..end));
        }
        for rank in 1..self.ranks {
            let mut next = vec![None; self.layers + 1];
            for end in self.starts(rank + 1) {
                let starts = self.starts_before(rank, end);
                next[end] = extend(starts, end, &worst, |range| score(rank, range));
            }
            worst = next;
            if worst.iter().all(Option::is_none) {
                return None;
            }
        }
        worst[self.layers]
    }

    /// The cut with the smallest sum of scores. `None` if no allowed cut exists. Scores need not
    /// grow with the range here, only what is not allowed must stay so. The scores' sum must not
    /// exceed 128 bits.
    pub(super) fn least_sum(
        &self,
        tie: Tie,
        score: impl Fn(usize, &Range<usize>) -> Option<u128>,
    ) -> Option<Vec<Range<usize>>> {
        let sums = self.sums_to_the_end(&score);
        let mut ranges = Vec::with_capacity(self.ranks);
        let mut start = 0;
        for rank in 0..self.ranks {
            let goal = sums[rank][start]?;
            let reaches = |end: &usize| {
                let own = score(rank, &(start..*end));
                own.zip(sums[rank + 1][*end])
                    .is_some_and(|(own, rest)| own + rest == goal)
            };
            let end = match tie {
                Tie::FewestFirst => self.ends_after(rank, start).find(reaches),
                Tie::MostFirst => self.ends_after(rank, start).rev().find(reaches),
            }?;
            ranges.push(start..end);
            start = end;
        }
        Some(ranges)
    }

    /// `[ranks + 1][layers + 1]`: the smallest sum when rank `r` and those after it cover `start..`.
    fn sums_to_the_end(
        &self,
        score: &impl Fn(usize, &Range<usize>) -> Option<u128>,
    ) -> Vec<Vec<Option<u128>>> {
        let mut sums = vec![vec![None; self.layers + 1]; self.ranks + 1];
        sums[self.ranks][self.layers] = Some(0);
        for rank in (0..self.ranks).rev() {
            for start in self.starts(rank) {
                let rest = &sums[rank + 1];
                let own = |end| score(rank, &(start..end)).map(|own| (own, end));
                let sum = |(own, end): (u128, usize)| rest[end].map(|rest| own + rest);
                sums[rank][start] = self
                    .ends_after(rank, start)
                    .map_while(own)
                    .filter_map(sum)
                    .min();
            }
        }
        sums
    }
}

/// The smallest worst score over `..end` when one more rank ends there and starts at one of
/// `starts`, shortest range first.
fn extend<K: Ord + Copy>(
    starts: impl Iterator<Item = usize>,
    end: usize,
    worst: &[Option<K>],
    score: impl Fn(&Range<usize>) -> Option<K>,
) -> Option<K> {
    let mut best: Option<K> = None;
    for start in starts {
        let Some(own) = score(&(start..end)) else {
            break;
        };
        if best.is_some_and(|best| own >= best) {
            break;
        }
        if let Some(before) = worst[start] {
            let both = own.max(before);
            best = Some(best.map_or(both, |best| best.min(both)));
        }
    }
    best
}
