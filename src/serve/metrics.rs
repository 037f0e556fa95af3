//! Counters and histograms, in the text form that Prometheus reads (version 0.0.4).

use super::Shared;
use std::fmt::{Display, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets of times to the first token, in seconds.
const FIRST_TOKEN_BOUNDS_S: [f64; 12] = [
    0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0,
];
/// The same of times between two tokens.
const TOKEN_BOUNDS_S: [f64; 12] = [
    0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 30.0,
];

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Answered.
    Answered,
    /// The client went away: a sequence is freed.
    Cancelled,
    /// The client's mistake: 4xx other than below.
    Refused,
    /// The queue was full: 429.
    Full,
    /// Loading or draining: 503.
    Unavailable,
    /// The server's failure.
    Failed,
}

const OUTCOMES: [(Outcome, &str); 6] = [
    (Outcome::Answered, "answered"),
    (Outcome::Cancelled, "cancelled"),
    (Outcome::Refused, "refused"),
    (Outcome::Full, "full"),
    (Outcome::Unavailable, "unavailable"),
    (Outcome::Failed, "failed"),
];

/// What has happened so far.
#[derive(Debug, Default)]
pub struct Metrics {
    outcomes: [AtomicU64; OUTCOMES.len()],
    prompt_tokens: AtomicU64,
    first_token: Histogram<{ FIRST_TOKEN_BOUNDS_S.len() }>,
    token: Histogram<{ TOKEN_BOUNDS_S.len() }>,
}

/// Times by upper bound.
#[derive(Debug)]
struct Histogram<const N: usize> {
    /// Not cumulative; those above the last bound are counted by `count` only.
    buckets: [AtomicU64; N],
    count: AtomicU64,
    sum_us: AtomicU64,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        Self {
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            count: AtomicU64::new(0),
            sum_us: AtomicU64::new(0),
        }
    }
}

impl<const N: usize> Histogram<N> {
    fn add(&self, time: Duration, bounds_s: &[f64; N]) {
        let bucket = bounds_s
            .iter()
            .position(|&bound_s| time.as_secs_f64() <= bound_s);
        if let Some(bucket) = bucket {
            self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        }
        self.sum_us
            .fetch_add(time.as_micros() as u64, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }
}

impl Metrics {
    /// A request ended so.
    pub fn outcome(&self, outcome: Outcome) {
        let place = OUTCOMES.iter().position(|(other, _)| *other == outcome);
        if let Some(place) = place {
            self.outcomes[place].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A sequence has its first token, so long after it was asked for.
    pub fn first_token(&self, after: Duration, prompt_tokens: usize) {
        self.first_token.add(after, &FIRST_TOKEN_BOUNDS_S);
        self.prompt_tokens
            .fetch_add(prompt_tokens as u64, Ordering::Relaxed);
    }

    /// Writes them down.
    pub fn write(&self, page: &mut Page) {
        let count = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let outcomes = OUTCOMES
            .iter()
            .zip(&self.outcomes)
            .map(|((_, name), value)| (format!("{{outcome=\"{name}\"}}"), count(value)));
        page.family(
            "requests_total",
            "counter",
            "Requests by outcome.",
            outcomes,
        );
        page.one(
            "prompt_tokens_total",
            "counter",
            "Tokens of prompts answered.",
            count(&self.prompt_tokens),
        );
        page.histogram(
            "first_token_seconds",
            "Time from a request to its first token.",
            &self.first_token,
            &FIRST_TOKEN_BOUNDS_S,
        );
        page.histogram(
            "token_seconds",
            "Time from a token to the next of the same sequence.",
            &self.token,
            &TOKEN_BOUNDS_S,
        );
    }

    /// A sequence has its next token, so long after the one before.
    pub fn next_token(&self, after: Duration) {
        self.token.add(after, &TOKEN_BOUNDS_S);
    }
}

/// All metrics as text.
pub(super) fn text(shared: &Shared) -> String {
    let mut page = Page::default();
    shared.metrics.write(&mut page);
    let (now, running, waiting) = shared.now();
    page.one("tokens_total", "counter", "Tokens sampled.", now.tokens);
    page.one(
        "computed_prompt_tokens_total",
        "counter",
        "Tokens of prompts computed, those found in a cache not counted.",
        now.prompt_tokens,
    );
    page.one(
        "active_seconds_total",
        "counter",
        "Time with something to do.",
        now.active_s,
    );
    page.one(
        "sequences_running",
        "gauge",
        "Sequences begun and not ended.",
        running,
    );
    page.one(
        "sequences_waiting",
        "gauge",
        "Sequences that wait for their turn.",
        waiting,
    );
    page.one(
        "kv_used_tokens",
        "gauge",
        "Tokens that the caches of running sequences have room for.",
        now.kv_used_tokens,
    );
    if let Some(ready) = shared.ready.get() {
        page.one(
            "kv_tokens",
            "gauge",
            "Tokens that all caches together have room for.",
            ready.about.kv_total_tokens,
        );
    }
    page.one(
        "connections",
        "gauge",
        "Open connections.",
        shared.life.open_count(),
    );
    page.one("idle_share", "gauge", "Share of the ranks' time of the last seconds in which they did not compute though there was something to do.", now.idle_share);
    let seconds = |us: u64| us as f64 / 1e6;
    let parts = now.ranks.iter().enumerate().flat_map(|(rank, one)| {
        let load = one.load;
        [
            ("busy", load.busy_us),
            ("wait", load.wait_us),
            ("wire", load.wire_us),
        ]
        .map(|(part, us)| (format!("{{rank=\"{rank}\",part=\"{part}\"}}"), seconds(us)))
    });
    page.family(
        "rank_seconds_total",
        "counter",
        "Time of a rank computing, waiting for others, and handing messages to MPI.",
        parts,
    );
    let sent = now
        .ranks
        .iter()
        .enumerate()
        .map(|(rank, one)| (format!("{{rank=\"{rank}\"}}"), one.sent_bytes));
    page.family(
        "rank_sent_bytes_total",
        "counter",
        "Bytes that a rank handed to MPI.",
        sent,
    );
    page.0
}

/// The text so far.
#[derive(Default)]
pub struct Page(String);

impl Page {
    /// All of it.
    #[cfg(test)]
    pub fn text(&self) -> &str {
        &self.0
    }

    fn family<V: Display>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        values: impl IntoIterator<Item = (String, V)>,
    ) {
        self.head(name, kind, help);
        for (labels, value) in values {
            self.line(format_args!("mlx_pipe_{name}{labels} {value}"));
        }
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help, [(String::new(), value)]);
    }

    fn histogram<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        histogram: &Histogram<N>,
        bounds_s: &[f64; N],
    ) {
        self.head(name, "histogram", help);
        let mut sum = 0;
        for (bound_s, bucket) in bounds_s.iter().zip(&histogram.buckets) {
            sum += bucket.load(Ordering::Relaxed);
            self.line(format_args!(
                "mlx_pipe_{name}_bucket{{le=\"{bound_s}\"}} {sum}"
            ));
        }
        // Read after the buckets, and so at least their sum.
        let count = histogram.count.load(Ordering::Relaxed).max(sum);
        let sum_s = histogram.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
        self.line(format_args!(
            "mlx_pipe_{name}_bucket{{le=\"+Inf\"}} {count}"
        ));
        self.line(format_args!("mlx_pipe_{name}_sum {sum_s}"));
        self.line(format_args!("mlx_pipe_{name}_count {count}"));
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP mlx_pipe_{name} {help}"));
        self.line(format_args!("# TYPE mlx_pipe_{name} {kind}"));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{line}");
    }
}
