//! What a run did: counted on each rank, gathered, printed by rank 0 as a table and as JSON.

use crate::plan::Plan;
use crate::request::Written;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fmt::Write;
use std::time::Duration;

/// Time and bytes that one rank spent in the loop.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// Computing.
    pub busy: Duration,
    /// Waiting for another rank.
    pub wait: Duration,
    /// Handing messages to MPI.
    pub wire: Duration,
    /// Bytes handed to MPI.
    pub sent_bytes: u64,
}

/// What a rank knows about itself at the end of a run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RankReport {
    /// Host name.
    pub host: String,
    /// `cpu` or `gpu`.
    pub device: String,
    /// Bytes of tensors read from the checkpoint.
    pub loaded_bytes: u64,
    /// Most memory that the process ever had resident, in bytes, by the kernel's count.
    pub peak_rss_bytes: u64,
    /// Seconds from the start of the process to its slice being ready.
    pub load_s: f64,
    /// Seconds computing.
    pub busy_s: f64,
    /// Seconds waiting for another rank.
    pub wait_s: f64,
    /// Seconds handing messages to MPI.
    pub wire_s: f64,
    /// Bytes handed to MPI.
    pub sent_bytes: u64,
}

impl RankReport {
    /// Adds what the loop counted.
    pub fn with_counters(mut self, counters: Counters) -> Self {
        self.busy_s = counters.busy.as_secs_f64();
        self.wait_s = counters.wait.as_secs_f64();
        self.wire_s = counters.wire.as_secs_f64();
        self.sent_bytes = counters.sent_bytes;
        self
    }
}

/// What rank 0 measured over all requests.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// Prompt tokens of all answered requests.
    pub prompt_tokens: usize,
    /// Sampled tokens of all answered requests.
    pub sampled_tokens: usize,
    /// For every request, seconds from its admission to its first token.
    pub first_token_s: Vec<f64>,
    /// Seconds between first and last tokens, summed over the requests.
    pub decode_s: f64,
}

impl Measured {
    /// Seconds in which there was a sequence to work on: one at a time.
    fn active_s(&self) -> f64 {
        self.first_token_s.iter().sum::<f64>() + self.decode_s
    }

    /// Median seconds to the first token; 0 without requests.
    fn time_to_first_token_s(&self) -> f64 {
        let mut sorted = self.first_token_s.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
    }

    fn prefill_tokens_per_s(&self) -> f64 {
        ratio(self.prompt_tokens as f64, self.first_token_s.iter().sum())
    }

    /// Tokens after the first of each request, over the time that they took.
    fn decode_tokens_per_s(&self) -> f64 {
        let later = self.sampled_tokens.saturating_sub(self.first_token_s.len());
        ratio(later as f64, self.decode_s)
    }
}

/// A whole run.
#[derive(Debug)]
pub struct Report<'a> {
    /// The plan that was run.
    pub plan: &'a Plan,
    /// One a rank.
    pub ranks: Vec<RankReport>,
    /// What rank 0 measured.
    pub measured: Measured,
    /// What was written.
    pub written: Written,
}

impl Report<'_> {
    /// Share of all ranks' time in which they did not compute, while there was something to do.
    fn idle_share(&self) -> f64 {
        let busy: f64 = self.ranks.iter().map(|rank| rank.busy_s).sum();
        let whole = self.measured.active_s() * self.ranks.len() as f64;
        if whole == 0.0 {
            0.0
        } else {
            (1.0 - busy / whole).max(0.0)
        }
    }

    fn loaded_bytes(&self) -> u64 {
        self.ranks.iter().map(|rank| rank.loaded_bytes).sum()
    }

    fn memory_saved_bytes(&self) -> u64 {
        self.plan
            .full_copies_bytes()
            .saturating_sub(self.loaded_bytes())
    }

    fn load_s(&self) -> f64 {
        self.ranks
            .iter()
            .map(|rank| rank.load_s)
            .fold(0.0, f64::max)
    }

    /// The machine-readable report; the README documents its fields.
    pub fn to_json(&self) -> serde_json::Value {
        let ranks: Vec<_> = self
            .ranks
            .iter()
            .zip(&self.plan.stages)
            .enumerate()
            .map(|(rank, (report, stage))| {
                json!({
                    "rank": rank,
                    "host": report.host,
                    "device": report.device,
                    "layers": [stage.layers.start, stage.layers.end - 1],
                    "owns": stage.role.owns(),
                    "planned_bytes": stage.footprint.weights_bytes(),
                    "loaded_bytes": report.loaded_bytes,
                    "peak_rss_bytes": report.peak_rss_bytes,
                    "busy_s": report.busy_s,
                    "wait_s": report.wait_s,
                    "wire_s": report.wire_s,
                    "sent_bytes": report.sent_bytes,
                    "footprint": stage.footprint,
                })
            })
            .collect();
        json!({
            "schema": 1,
            "digest": self.written.digest,
            "answered": self.written.tally.answered,
            "failed": self.written.tally.failed,
            "prompt_tokens": self.measured.prompt_tokens,
            "sampled_tokens": self.measured.sampled_tokens,
            "load_s": self.load_s(),
            "time_to_first_token_s": self.measured.time_to_first_token_s(),
            "prefill_tokens_per_s": self.measured.prefill_tokens_per_s(),
            "decode_tokens_per_s": self.measured.decode_tokens_per_s(),
            "idle_share": self.idle_share(),
            "model_bytes": self.plan.model_bytes,
            "loaded_bytes": self.loaded_bytes(),
            "memory_saved_bytes": self.memory_saved_bytes(),
            "plan": {
                "strategy": self.plan.strategy.name(),
                "chosen": self.plan.chosen.name(),
                "hash": self.plan.fingerprint_hex(),
                "wire_dtype": self.plan.wire_dtype.name(),
                "lookup": self.plan.lookup.name(),
                "context_tokens": self.plan.context_tokens,
                "sequences": self.plan.sequences,
            },
            "ranks": ranks,
        })
    }

    /// The report for people, at most 80 columns wide.
    pub fn to_table(&self) -> String {
        let mut table = String::new();
        let mut line = |text: String| {
            let _ = writeln!(table, "{text}");
        };
        line("rank  layers    loaded  peak RSS      busy      wait      wire      sent".into());
        for (rank, (report, stage)) in self.ranks.iter().zip(&self.plan.stages).enumerate() {
            let layers = format!("{}-{}", stage.layers.start, stage.layers.end - 1);
            line(format!(
                "{rank:>4}  {layers:>6}  {:>8}  {:>8}  {:>6.2} s  {:>6.2} s  {:>6.3} s  {:>8}",
                gigabytes(report.loaded_bytes),
                gigabytes(report.peak_rss_bytes),
                report.busy_s,
                report.wait_s,
                report.wire_s,
                megabytes(report.sent_bytes),
            ));
        }
        line(format!(
            "loaded {} in {:.2} s; a copy of the model on every rank would be {}",
            gigabytes(self.loaded_bytes()),
            self.load_s(),
            gigabytes(self.plan.full_copies_bytes()),
        ));
        let (measured, tally) = (&self.measured, self.written.tally);
        line(format!(
            "{} answered, {} failed",
            tally.answered, tally.failed
        ));
        if tally.answered > 0 {
            line(format!(
                "{} prompt tokens at {:.1}/s, {} sampled at {:.1}/s; time to first token {:.0} ms (median)",
                measured.prompt_tokens,
                measured.prefill_tokens_per_s(),
                measured.sampled_tokens,
                measured.decode_tokens_per_s(),
                measured.time_to_first_token_s() * 1e3,
            ));
            line(format!(
                "stages idle {:.0} % of the time",
                self.idle_share() * 100.0
            ));
        }
        line(format!("digest {}", self.written.digest));
        table
    }
}

/// Most memory that this process ever had resident, in bytes.
pub fn peak_rss_bytes() -> u64 {
    // SAFETY: `getrusage` fills the struct that it is given, for which all zeros is a valid value.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    // Linux counts in KiB, macOS in bytes.
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    usage.ru_maxrss as u64 * unit
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.3} GB", bytes as f64 / 1e9)
}

fn megabytes(bytes: u64) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}
