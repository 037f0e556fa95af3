//! Exact searches over contiguous cuts, by dynamic programming.
//!
//! Separate because nothing here knows of models or memory: `ranks` ranks share `layers` layers in
//! order, each gets a number of layers within `counts`, and a closure scores a rank's range. The
//! closure returns `None` for a range that must not be, and has to be *monotone*: a longer range
//! never scores lower, and is never allowed where a shorter one of the same end or start is not.
//! That is what lets the loops below stop early.

use std::ops::{Range, RangeInclusive};

/// The cuts to search.
#[derive(Clone)]
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
    /// The starts of a range that ends at `end`, shortest range first.
    fn starts(&self, end: usize) -> impl Iterator<Item = usize> + use<> {
        let counts = self.counts.clone();
        counts.map_while(move |count| end.checked_sub(count))
    }

    /// The ends of a range that starts at `start`, shortest range first.
    fn ends(&self, start: usize) -> impl DoubleEndedIterator<Item = usize> + use<> {
        let longest = (*self.counts.end()).min(self.layers - start);
        (*self.counts.start()..=longest).map(move |count| start + count)
    }

    /// The smallest possible worst score of any rank. `None` if no allowed cut exists.
    pub(super) fn least_worst<K: Ord + Copy>(
        &self,
        score: impl Fn(usize, &Range<usize>) -> Option<K>,
    ) -> Option<K> {
        // worst[end]: the smallest worst score of the ranks so far when they cover `..end`.
        let mut worst: Vec<Option<K>> = vec![None; self.layers + 1];
        for end in self.ends(0) {
            worst[end] = score(0, &(0..end));
        }
        for rank in 1..self.ranks {
            let cover = |end| self.extend(end, &worst, |range| score(rank, range));
            worst = (0..=self.layers).map(cover).collect();
            if worst.iter().all(Option::is_none) {
                return None;
            }
        }
        worst[self.layers]
    }

    /// The smallest worst score over `..end` when one more rank ends there.
    fn extend<K: Ord + Copy>(
        &self,
        end: usize,
        worst: &[Option<K>],
        score: impl Fn(&Range<usize>) -> Option<K>,
    ) -> Option<K> {
        let mut best: Option<K> = None;
        for start in self.starts(end) {
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
                Tie::FewestFirst => self.ends(start).find(reaches),
                Tie::MostFirst => self.ends(start).rev().find(reaches),
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
            for start in 0..=self.layers {
                let rest = &sums[rank + 1];
                let own = |end| score(rank, &(start..end)).map(|own| (own, end));
                let sum = |(own, end): (u128, usize)| rest[end].map(|rest| own + rest);
                sums[rank][start] = self.ends(start).map_while(own).filter_map(sum).min();
            }
        }
        sums
    }
}
