//! Whether and how a single tile asks memory for weights before it needs them, found out by trying.
//!
//! A tile that goes by the weights once goes at memory's pace or a little slower. Some processors then look ahead far
//! enough by themselves, and asking only gets in their way; others gain by it. What is best also depends on the width
//! of the codes and the number of tokens: the more a tile computes for each byte, the less the processor looks ahead
//! by itself. Results do not depend on it. So the first multiplications of each kind are timed in all ways, in a mixed
//! order, and the way of the best median is kept.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Multiplications that are timed, of each kind: about those of four tokens of a model of 28 layers.
const TRIALS: u32 = 384;

/// Weights of fewer bytes may come from caches, and tell nothing of memory.
const LEAST_BYTES: usize = 1 << 20;

/// Widest codes, and most tokens of a tile, plus one.
const KINDS: usize = 9;

/// How far ahead, and into which cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Not at all.
    Never,
    /// A little further than memory takes, into the first cache.
    Near,
    /// Far ahead, into the second cache: it can wait for more lines at a time than the first one.
    Far,
}

const WAYS: [Ask; 3] = [Ask::Never, Ask::Near, Ask::Far];

/// What was found out about codes of a width and a number of tokens.
struct Kind {
    /// Into [`WAYS`].
    way: AtomicUsize,
    trials: AtomicU32,
    /// Nanoseconds a byte, of each way's trials.
    times: Mutex<[Vec<f64>; WAYS.len()]>,
}

static FOUND: [[Kind; KINDS]; KINDS] = [const { [const { Kind::new() }; KINDS] }; KINDS];

/// How a tile of so many tokens asks for codes of so many bits.
#[inline(always)]
pub fn asking(bits: usize, tokens: usize) -> Ask {
    kind(bits, tokens).map_or(Ask::Never, Kind::ask)
}

/// Multiplies, by a call of `multiply`, weights of so many bits and bytes with so many tokens; measures while it is
/// not yet known what is better.
pub fn multiply_and_learn(bits: usize, tokens: usize, bytes: usize, multiply: impl FnOnce()) {
    match kind(bits, tokens) {
        Some(kind) if bytes >= LEAST_BYTES => kind.learn(bytes, multiply),
        _ => multiply(),
    }
}

fn kind(bits: usize, tokens: usize) -> Option<&'static Kind> {
    FOUND.get(bits)?.get(tokens)
}

impl Kind {
    const fn new() -> Self {
        Self {
            way: AtomicUsize::new(0),
            trials: AtomicU32::new(0),
            times: Mutex::new([const { Vec::new() }; WAYS.len()]),
        }
    }

    #[inline(always)]
    fn ask(&self) -> Ask {
        WAYS[self.way.load(Ordering::Relaxed) % WAYS.len()]
    }

    fn learn(&self, bytes: usize, multiply: impl FnOnce()) {
        if self.trials.load(Ordering::Relaxed) >= TRIALS {
            return multiply();
        }
        let trial = self.trials.fetch_add(1, Ordering::Relaxed);
        let way = way_of(trial);
        self.way.store(way, Ordering::Relaxed);
        let began = Instant::now();
        multiply();
        let ns = began.elapsed().as_nanos() as f64;
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        times[way].push(ns / bytes as f64);
        if trial + 1 >= TRIALS {
            let times = std::mem::take(&mut *times).map(median);
            let quicker = |&a: &usize, &b: &usize| times[a].total_cmp(&times[b]);
            let best = (0..WAYS.len()).min_by(quicker).unwrap_or(0);
            self.way.store(best, Ordering::Relaxed);
        }
    }
}

/// Each way in a third of the trials, with no regard to the order in which a model has its weights.
fn way_of(trial: u32) -> usize {
    ((u64::from(trial.wrapping_mul(0x9E37_79B9)) * WAYS.len() as u64) >> 32) as usize
}

/// The median; infinity of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values
        .get(values.len() / 2)
        .copied()
        .unwrap_or(f64::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_takes_least_time_is_kept_whatever_held_up_a_few() {
        for quick in WAYS {
            let kind = Kind::new();
            let mut calls = [0; WAYS.len()];
            for trial in 0..TRIALS {
                kind.learn(1000, || {
                    let ask = kind.ask();
                    calls[ask as usize] += 1;
                    if ask != quick {
                        std::thread::sleep(Duration::from_micros(200));
                    } else if trial % 16 == 0 {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                });
            }
            assert!(calls.iter().all(|&calls| calls > TRIALS / 4), "{calls:?}");
            assert_eq!(kind.ask(), quick);
            // From then on nothing changes.
            kind.learn(1000, || ());
            assert_eq!(kind.ask(), quick);
        }
    }

    #[test]
    fn what_no_tile_has_is_not_asked_for() {
        assert_eq!((asking(8, 100), asking(100, 1)), (Ask::Never, Ask::Never));
        let mut is_done = false;
        multiply_and_learn(8, 100, 1 << 30, || is_done = true);
        assert!(is_done);
    }
}
