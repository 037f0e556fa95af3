//! What a run did: counted on each rank, gathered, printed by rank 0 as a table and as JSON.

use crate::plan::{Plan, RequestTimes, Stage};
use crate::request::Written;
use crate::wire::Load;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::time::Duration;

/// What a rank's process may hold at most beside its planned weights and cache: program and libraries,
/// tokenizer, activations, and what MLX keeps to use again.
pub const PEAK_ALLOWANCE_BYTES: u64 = 150_000_000;

/// Time and bytes that one rank spent in the loop.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// Computing.
    pub busy: Duration,
    /// Waiting for another rank.
    pub wait: Duration,
    /// Handing messages to MPI.
    pub wire: Duration,
    /// On rank 0: time in which there was a sequence to work on.
    pub active: Duration,
    /// On rank 0: most sequences that had begun and not ended at a time.
    pub most_sequences: usize,
    /// Bytes handed to MPI.
    pub sent_bytes: u64,
}

impl Counters {
    /// What the time so far was spent on.
    pub fn load(&self) -> Load {
        let us = |time: Duration| time.as_micros() as u64;
        Load {
            busy_us: us(self.busy),
            wait_us: us(self.wait),
            wire_us: us(self.wire),
            sent_bytes: self.sent_bytes,
        }
    }
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
    /// Most bytes that MLX ever held in arrays; on a GPU the kernel's count does not see them.
    pub peak_array_bytes: u64,
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

/// What rank 0 measured of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RequestMeasured {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens sampled.
    pub sampled_tokens: usize,
    /// Seconds from its admission to its first token, and from there to its last.
    pub times: RequestTimes,
}

/// Requests of which each is remembered, for the median and the prediction; of later ones only the sums are.
const MOST_KEPT: usize = 10_000;

/// What rank 0 measured over all answered requests.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// The first ones, in the order of their answers.
    kept: Vec<RequestMeasured>,
    requests: usize,
    prompt_tokens: usize,
    sampled_tokens: usize,
    first_token_s: f64,
    decode_s: f64,
    /// Most requests that were admitted and not answered at a time.
    most_admitted: usize,
}

impl Measured {
    /// One more request is answered.
    pub fn add(&mut self, request: RequestMeasured) {
        self.requests += 1;
        self.prompt_tokens += request.prompt_tokens;
        self.sampled_tokens += request.sampled_tokens;
        self.first_token_s += request.times.first_token_s;
        self.decode_s += request.times.decode_s;
        if self.kept.len() < MOST_KEPT {
            self.kept.push(request);
        }
    }

    /// So many requests are admitted and not answered now.
    pub fn admitted(&mut self, count: usize) {
        self.most_admitted = self.most_admitted.max(count);
    }

    /// Whether each request was answered before the next was begun.
    fn is_one_by_one(&self) -> bool {
        self.most_admitted <= 1
    }

    fn pace(&self) -> Pace {
        let later = self.sampled_tokens.saturating_sub(self.requests);
        Pace {
            time_to_first_token_s: median(self.kept.iter().map(|one| one.times.first_token_s)),
            prefill_tokens_per_s: ratio(self.prompt_tokens as f64, self.first_token_s),
            decode_tokens_per_s: ratio(later as f64, self.decode_s),
        }
    }

    /// What the plan predicts for these requests; `None` where it knows no costs, or some were answered at the
    /// same time: it predicts one after the other.
    fn predicted(&self, plan: &Plan, prefill_chunk: u64) -> Option<Pace> {
        if !self.is_one_by_one() || self.kept.len() < self.requests {
            return None;
        }
        let tokens = |one: &RequestMeasured| (one.prompt_tokens as u64, one.sampled_tokens as u64);
        let requests: Vec<(u64, u64)> = self.kept.iter().map(tokens).collect();
        let mut predicted = Self::default();
        for (one, times) in self
            .kept
            .iter()
            .zip(plan.predict_run(&requests, prefill_chunk)?)
        {
            predicted.add(RequestMeasured { times, ..*one });
        }
        Some(predicted.pace())
    }
}

/// How fast requests were answered, or were predicted to be, as each of them sees it.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// Median seconds to the first token; 0 without requests.
    time_to_first_token_s: f64,
    prefill_tokens_per_s: f64,
    /// Tokens after the first of each request, over the time that they took.
    decode_tokens_per_s: f64,
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
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
    /// Seconds in which there was a sequence to work on.
    pub active_s: f64,
    /// Most sequences that had begun and not ended at a time.
    pub most_at_once: usize,
    /// What was written.
    pub written: Written,
    /// Most prompt tokens in one step, for the prediction.
    pub prefill_chunk: u64,
}

impl Report<'_> {
    /// Share of all ranks' time in which they did not compute, while there was something to do.
    fn idle_share(&self) -> f64 {
        let busy: f64 = self.ranks.iter().map(|rank| rank.busy_s).sum();
        let whole = self.active_s * self.ranks.len() as f64;
        if whole == 0.0 {
            0.0
        } else {
            (1.0 - busy / whole).max(0.0)
        }
    }

    /// Tokens of all sequences together.
    fn tokens_per_s(&self) -> f64 {
        ratio(self.measured.sampled_tokens as f64, self.active_s)
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
                    "peak_array_bytes": report.peak_array_bytes,
                    "over_plan_bytes": over_plan_bytes(report, stage),
                    "busy_s": report.busy_s,
                    "wait_s": report.wait_s,
                    "wire_s": report.wire_s,
                    "sent_bytes": report.sent_bytes,
                    "footprint": stage.footprint,
                })
            })
            .collect();
        let pace = self.measured.pace();
        json!({
            "schema": 1,
            "digest": self.written.digest,
            "answered": self.written.tally.answered,
            "failed": self.written.tally.failed,
            "prompt_tokens": self.measured.prompt_tokens,
            "sampled_tokens": self.measured.sampled_tokens,
            "most_at_once": self.most_at_once,
            "load_s": self.load_s(),
            "active_s": self.active_s,
            "tokens_per_s": self.tokens_per_s(),
            "time_to_first_token_s": pace.time_to_first_token_s,
            "prefill_tokens_per_s": pace.prefill_tokens_per_s,
            "decode_tokens_per_s": pace.decode_tokens_per_s,
            "idle_share": self.idle_share(),
            "prediction": self.prediction_json(),
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

    /// What the plan predicted for these very requests, and by what share the run took longer; null where
    /// the plan knows no costs.
    fn prediction_json(&self) -> serde_json::Value {
        let Some(predicted) = self.measured.predicted(self.plan, self.prefill_chunk) else {
            return serde_json::Value::Null;
        };
        let measured = self.measured.pace();
        json!({
            "source": self.plan.times.name(),
            "time_to_first_token_s": predicted.time_to_first_token_s,
            "prefill_tokens_per_s": predicted.prefill_tokens_per_s,
            "decode_tokens_per_s": predicted.decode_tokens_per_s,
            "idle_share": self.predicted_idle_share(),
            "error": {
                "time_to_first_token":
                    error(measured.time_to_first_token_s, predicted.time_to_first_token_s),
                "prefill": error(measured.prefill_tokens_per_s, predicted.prefill_tokens_per_s),
                "decode": error(measured.decode_tokens_per_s, predicted.decode_tokens_per_s),
            },
        })
    }

    /// Of one stream, if that is what was run.
    fn predicted_idle_share(&self) -> Option<f64> {
        if !self.measured.is_one_by_one() {
            return None;
        }
        let requests = self.measured.requests.max(1);
        let prompt_tokens = (self.measured.prompt_tokens / requests) as u64;
        let predicted = self.plan.predict(prompt_tokens, self.prefill_chunk)?;
        Some(predicted.idle_share_one)
    }

    /// The report for people, at most 80 columns wide.
    pub fn to_table(&self) -> String {
        let tally = self.written.tally;
        let mut lines = self.rank_lines();
        lines.push(format!(
            "loaded {} in {:.2} s; a copy of the model on every rank would be {}",
            gigabytes(self.loaded_bytes()),
            self.load_s(),
            gigabytes(self.plan.full_copies_bytes()),
        ));
        lines.push(format!(
            "{} answered, {} failed",
            tally.answered, tally.failed
        ));
        if tally.answered > 0 {
            lines.extend(self.pace_lines());
        }
        // A server's answers have no order that would give them one.
        if !self.written.digest.is_empty() {
            lines.push(format!("digest {}", self.written.digest));
        }
        lines.join("\n") + "\n"
    }

    /// A line a rank, under headings, and one for each rank that held more than is expected.
    fn rank_lines(&self) -> Vec<String> {
        let mut lines = vec![
            "sizes in GB = 1e9 bytes; over = peak less planned weights and cache, in MB;"
                .to_owned(),
            "busy = computing, wait = for other ranks, wire = handing messages to MPI".to_owned(),
            "rank  layers  planned  loaded   peak   over  busy %  wait %  wire %  sent MB"
                .to_owned(),
        ];
        let mut above = Vec::new();
        for (rank, (report, stage)) in self.ranks.iter().zip(&self.plan.stages).enumerate() {
            let layers = format!("{}-{}", stage.layers.start, stage.layers.end - 1);
            let over = over_plan_bytes(report, stage);
            let share = |part_s: f64| 100.0 * ratio(part_s, self.active_s).min(1.0);
            let (busy, wire) = (share(report.busy_s), share(report.wire_s));
            lines.push(format!(
                "{rank:>4}  {layers:>6}  {:>7.3}  {:>6.3}  {:>5.3}  {:>5}  {busy:>6.1}  {:>6.1}  {wire:>6.1}  {:>7.2}",
                stage.footprint.weights_bytes() as f64 / 1e9,
                report.loaded_bytes as f64 / 1e9,
                peak_bytes(report) as f64 / 1e9,
                over / 1_000_000,
                (100.0 - busy - wire).max(0.0),
                report.sent_bytes as f64 / 1e6,
            ));
            if over > PEAK_ALLOWANCE_BYTES as i64 {
                above.push(format!(
                    "rank {rank} held {} MB more than planned; up to {} MB are expected",
                    over / 1_000_000,
                    PEAK_ALLOWANCE_BYTES / 1_000_000
                ));
            }
        }
        lines.extend(above);
        lines
    }

    /// How fast it was, and how fast it was predicted to be.
    fn pace_lines(&self) -> Vec<String> {
        let (measured, pace) = (&self.measured, self.measured.pace());
        let mut lines = vec![format!(
            "{} prompt tokens at {}/s, {} sampled at {}/s; first token {:.0} ms (median)",
            measured.prompt_tokens,
            rate(pace.prefill_tokens_per_s),
            measured.sampled_tokens,
            rate(pace.decode_tokens_per_s),
            pace.time_to_first_token_s * 1e3,
        )];
        if self.most_at_once > 1 {
            lines.push(format!(
                "  as each sequence saw it; all of them, up to {} at once: {} sampled/s",
                self.most_at_once,
                rate(self.tokens_per_s()),
            ));
        }
        if let Some(predicted) = measured.predicted(self.plan, self.prefill_chunk) {
            lines.extend(prediction_lines(self.plan, pace, predicted));
        }
        let predicted = self.predicted_idle_share();
        let predicted = predicted.map_or_else(String::new, |share| {
            format!(", predicted {:.0} %", share * 100.0)
        });
        lines.push(format!(
            "stages idle {:.0} % of the time{predicted}",
            self.idle_share() * 100.0
        ));
        lines
    }
}

/// Prediction beside measurement: the same figures as in the line above it, each with what the run was off by.
fn prediction_lines(plan: &Plan, measured: Pace, predicted: Pace) -> [String; 2] {
    let off = |measured: f64, predicted: f64| match error(measured, predicted) {
        Some(error) => format!(" ({:+.0} %)", error * 100.0),
        None => String::new(),
    };
    let per_s = |measured: f64, predicted: f64| {
        format!("{}/s{}", rate(predicted), off(measured, predicted))
    };
    let first_s = predicted.time_to_first_token_s;
    [
        format!(
            "predicted, from times that were {} (in brackets: the run against it):",
            plan.times.name()
        ),
        format!(
            "  prompts {}, sampled {}, first token {:.0} ms{}",
            per_s(
                measured.prefill_tokens_per_s,
                predicted.prefill_tokens_per_s
            ),
            per_s(measured.decode_tokens_per_s, predicted.decode_tokens_per_s),
            first_s * 1e3,
            off(measured.time_to_first_token_s, first_s),
        ),
    ]
}

/// Tokens a second; `-` where there was no time to divide by.
fn rate(tokens_per_s: f64) -> String {
    match tokens_per_s > 0.0 {
        true => format!("{tokens_per_s:.1}"),
        false => "-".to_owned(),
    }
}

/// By what share the measured figure is above the predicted one; `None` if there is nothing to compare.
fn error(measured: f64, predicted: f64) -> Option<f64> {
    (measured > 0.0 && predicted > 0.0).then(|| measured / predicted - 1.0)
}

/// Most memory of a rank: by the kernel's count, and on a GPU by MLX's where that is more.
fn peak_bytes(report: &RankReport) -> u64 {
    match report.device.as_str() {
        "gpu" => report.peak_array_bytes,
        _ => report.peak_rss_bytes,
    }
}

/// Peak memory less what the plan has counted, weights and whole cache; negative where a short run has not
/// filled its cache.
fn over_plan_bytes(report: &RankReport, stage: &Stage) -> i64 {
    peak_bytes(report) as i64 - stage.footprint.total_bytes() as i64
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

/// Counts the peak anew, from what is resident now, where the system does that (Linux).
pub fn forget_peak_rss() {
    if cfg!(target_os = "linux") {
        // Where it is refused, the peak is that of the whole process.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
    }
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.3} GB", bytes as f64 / 1e9)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::{forget_peak_rss, peak_rss_bytes};

    #[test]
    fn memory_that_was_given_back_before_the_peak_is_forgotten_is_no_part_of_it() {
        const BYTES: usize = 400 << 20;
        drop(std::hint::black_box(vec![1_u8; BYTES]));
        let before = peak_rss_bytes();
        assert!(before >= BYTES as u64, "{before}");
        forget_peak_rss();
        let after = peak_rss_bytes();
        assert!(after < before - BYTES as u64 / 2, "{after} after {before}");
    }
}
