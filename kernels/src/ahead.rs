//! Whether a single tile asks memory for weights before it needs them, found out by trying.
//!
//! A tile that goes by the weights once goes at memory's pace. Some processors then look ahead far enough by
//! themselves, and asking only gets in their way; others gain by it, and it depends on the width of the codes and
//! the number of tokens as well. Results do not depend on it. So the first multiplications of each kind are timed
//! in both ways, in a mixed order, and the better one is kept.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

/// Multiplications that are timed, of each kind: about those of three tokens of a model of 28 layers.
const TRIALS: u32 = 256;

/// Weights of fewer bytes may come from caches, and tell nothing of memory.
const LEAST_BYTES: usize = 1 << 20;

/// Widest codes, and most tokens of a tile, plus one.
const KINDS: usize = 9;

/// What was found out about codes of a width and a number of tokens.
struct Kind {
    asks: AtomicBool,
    trials: AtomicU32,
    /// Nanoseconds and bytes, without asking and with it.
    spent: [[AtomicU64; 2]; 2],
}

static FOUND: [[Kind; KINDS]; KINDS] = [const { [const { Kind::new() }; KINDS] }; KINDS];

/// Whether a tile of so many tokens asks ahead for codes of so many bits.
#[inline(always)]
pub fn is_asked(bits: usize, tokens: usize) -> bool {
    kind(bits, tokens).is_some_and(|kind| kind.asks.load(Ordering::Relaxed))
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
            asks: AtomicBool::new(false),
            trials: AtomicU32::new(0),
            spent: [const { [const { AtomicU64::new(0) }; 2] }; 2],
        }
    }

    fn learn(&self, bytes: usize, multiply: impl FnOnce()) {
        if self.trials.load(Ordering::Relaxed) >= TRIALS {
            return multiply();
        }
        let trial = self.trials.fetch_add(1, Ordering::Relaxed);
        let asks = is_with(trial);
        self.asks.store(asks, Ordering::Relaxed);
        let began = Instant::now();
        multiply();
        let [ns, of_bytes] = &self.spent[asks as usize];
        ns.fetch_add(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
        of_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if trial + 1 >= TRIALS {
            self.asks.store(self.is_better_with(), Ordering::Relaxed);
        }
    }

    /// Whether asking took less time a byte.
    fn is_better_with(&self) -> bool {
        let ns_per_byte = |[ns, bytes]: &[AtomicU64; 2]| {
            ns.load(Ordering::Relaxed) as f64 / bytes.load(Ordering::Relaxed).max(1) as f64
        };
        ns_per_byte(&self.spent[1]) < ns_per_byte(&self.spent[0])
    }
}

/// Half of the trials, with no regard to the order in which a model has its weights.
fn is_with(trial: u32) -> bool {
    trial.wrapping_mul(0x9E37_79B9) >> 31 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_takes_less_time_is_kept() {
        for slow_one in [false, true] {
            let kind = Kind::new();
            let mut calls = [0; 2];
            for _ in 0..TRIALS {
                kind.learn(1000, || {
                    let asks = kind.asks.load(Ordering::Relaxed);
                    calls[asks as usize] += 1;
                    if asks == slow_one {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                });
            }
            assert!(calls.iter().all(|&calls| calls > TRIALS / 3), "{calls:?}");
            assert_eq!(kind.asks.load(Ordering::Relaxed), !slow_one);
            // From then on nothing changes.
            kind.learn(1000, || ());
            assert_eq!(kind.asks.load(Ordering::Relaxed), !slow_one);
        }
    }

    #[test]
    fn what_no_tile_has_is_not_asked_for() {
        assert!(!is_asked(8, 100) && !is_asked(100, 1));
        let mut is_done = false;
        multiply_and_learn(8, 100, 1 << 30, || is_done = true);
        assert!(is_done);
    }
}
