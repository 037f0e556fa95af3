//! What the pipeline is doing: told by the loop, asked for by the page and by `/metrics`. Shares and rates are those of
//! the last few seconds.

use crate::pipeline::Seen;
use crate::wire::Load;
use serde::Serialize;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is recent.
const WINDOW: Duration = Duration::from_secs(4);
/// Rates of less than this are not told.
const SHORTEST_WINDOW: Duration = Duration::from_millis(200);

/// What is known of the pipeline once it has loaded.
#[derive(Debug, Clone)]
pub struct About {
    /// The model as it was named.
    pub model: String,
    /// Pipelines that compute alike have the same.
    pub fingerprint: String,
    /// One a rank.
    pub ranks: Vec<RankAbout>,
    /// Sequences that may be under way.
    pub sequences: usize,
    /// Tokens that all caches together have room for.
    pub kv_total_tokens: usize,
}

/// What is known of a rank once it has loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankAbout {
    /// Its host.
    pub host: String,
    /// `cpu` or `gpu`.
    pub device: String,
    /// Its layers.
    pub layers: Range<usize>,
    /// Whether it has the embedding table for prompts.
    pub has_embedding: bool,
    /// Whether it has the head.
    pub has_head: bool,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Bytes planned for its caches.
    pub cache_bytes: u64,
    /// Most bytes that it may use for both.
    pub memory_limit_bytes: Option<u64>,
}

/// What the loop has told.
#[derive(Default)]
pub struct Status {
    /// Tokens sampled so far.
    tokens: AtomicU64,
    running: AtomicUsize,
    /// Tokens of prompts that went into steps so far.
    prompt_tokens: AtomicU64,
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    /// The last of each rank, so far.
    loads: Vec<Load>,
    kv_tokens: usize,
    active: Duration,
    moments: VecDeque<Moment>,
}

/// The sums at a time.
#[derive(Clone)]
struct Moment {
    at: Instant,
    tokens: u64,
    prompt_tokens: u64,
    active: Duration,
    loads: Vec<Load>,
}

/// What the pipeline is doing.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Now {
    /// Tokens that the caches of sequences under way have room for.
    pub kv_used_tokens: usize,
    /// Tokens sampled so far.
    pub tokens: u64,
    /// Tokens of prompts computed so far.
    pub prompt_tokens: u64,
    /// Tokens sampled a second.
    pub tokens_per_second: f64,
    /// Tokens of prompts computed a second.
    pub prompt_tokens_per_second: f64,
    /// Share of the ranks' time in which they did not compute though there was something to do.
    pub idle_share: f64,
    /// Seconds so far in which there was something to do.
    pub active_s: f64,
    /// One a rank; none before the first step.
    pub ranks: Vec<RankNow>,
}

/// What a rank is doing. The shares are those of the time; what they lack to 1 is time in which there was nothing to do.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub struct RankNow {
    /// Share of the time that it computed.
    pub busy: f64,
    /// Share of the time that it waited though there was something to do.
    pub wait: f64,
    /// Share of the time that it handed messages to MPI.
    pub wire: f64,
    /// Bytes handed to MPI so far.
    pub sent_bytes: u64,
    /// What it has spent so far.
    #[serde(skip)]
    pub load: Load,
}

impl Status {
    /// One more token was sampled.
    pub fn token(&self) {
        self.tokens.fetch_add(1, Ordering::Relaxed);
    }

    /// Sequences that have begun and not ended.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    /// So many have, and so many tokens of prompts went into steps so far.
    pub fn run(&self, sequences: usize, prompt_tokens: u64) {
        self.running.store(sequences, Ordering::Relaxed);
        self.prompt_tokens.store(prompt_tokens, Ordering::Relaxed);
    }

    /// There is nothing to do.
    pub fn rest(&self) {
        self.running.store(0, Ordering::Relaxed);
        self.told().kv_tokens = 0;
    }

    /// What the loop has seen.
    pub fn watch(&self, seen: Seen) {
        self.watch_at(seen, Instant::now());
    }

    /// The same at a time.
    pub(super) fn watch_at(&self, seen: Seen, now: Instant) {
        let mut told = self.told();
        told.kv_tokens = seen.kv_tokens;
        told.active = seen.active;
        told.loads = seen.loads;
        let moment = self.moment(&told, now);
        told.forget_before(moment.at);
        told.moments.push_back(moment);
    }

    /// What the pipeline is doing at this time.
    pub fn now(&self, now: Instant) -> Now {
        let mut told = self.told();
        let current = self.moment(&told, now);
        told.now(&current)
    }

    /// Moments that are remembered.
    #[cfg(test)]
    pub(super) fn moments(&self) -> usize {
        self.told().moments.len()
    }

    fn moment(&self, told: &Told, at: Instant) -> Moment {
        Moment {
            at,
            tokens: self.tokens.load(Ordering::Relaxed),
            prompt_tokens: self.prompt_tokens.load(Ordering::Relaxed),
            active: told.active,
            loads: told.loads.clone(),
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Told {
    /// Forgets the moments before the window, but for the last one: what it is compared with.
    fn forget_before(&mut self, now: Instant) {
        let is_old = |moment: &Moment| now.saturating_duration_since(moment.at) > WINDOW;
        while self.moments.get(1).is_some_and(is_old) {
            self.moments.pop_front();
        }
    }

    fn now(&mut self, current: &Moment) -> Now {
        self.forget_before(current.at);
        let sums = Now {
            kv_used_tokens: self.kv_tokens,
            tokens: current.tokens,
            prompt_tokens: current.prompt_tokens,
            active_s: current.active.as_secs_f64(),
            ranks: current
                .loads
                .iter()
                .map(|&load| RankNow {
                    sent_bytes: load.sent_bytes,
                    load,
                    ..RankNow::default()
                })
                .collect(),
            ..Now::default()
        };
        let Some(before) = self.moments.front() else {
            return sums;
        };
        // Where the moment before is long ago, there was nothing to do until the window.
        let elapsed = current.at.saturating_duration_since(before.at).min(WINDOW);
        if elapsed < SHORTEST_WINDOW {
            return sums;
        }
        let elapsed_s = elapsed.as_secs_f64();
        let active_s = (current.active.saturating_sub(before.active)).as_secs_f64();
        let nothing = Load::default();
        let ranks: Vec<RankNow> = current
            .loads
            .iter()
            .enumerate()
            .map(|(rank, load)| {
                let before = before.loads.get(rank).unwrap_or(&nothing);
                let share = |now: u64, before: u64| {
                    (now.saturating_sub(before) as f64 / 1e6 / elapsed_s).min(1.0)
                };
                let busy = share(load.busy_us, before.busy_us);
                let wire = share(load.wire_us, before.wire_us).min(1.0 - busy);
                RankNow {
                    busy,
                    wait: (active_s / elapsed_s - busy - wire).clamp(0.0, 1.0),
                    wire,
                    sent_bytes: load.sent_bytes,
                    load: *load,
                }
            })
            .collect();
        let busy_s: f64 = ranks.iter().map(|rank| rank.busy * elapsed_s).sum();
        let whole_s = active_s * ranks.len() as f64;
        Now {
            tokens_per_second: (current.tokens - before.tokens) as f64 / elapsed_s,
            prompt_tokens_per_second: (current.prompt_tokens - before.prompt_tokens) as f64
                / elapsed_s,
            idle_share: match whole_s > 0.0 {
                true => (1.0 - busy_s / whole_s).clamp(0.0, 1.0),
                false => 0.0,
            },
            ranks,
            ..sums
        }
    }
}
