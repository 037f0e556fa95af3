//! What each rank did when, as a trace that Chrome's `about:tracing` and Perfetto show: one track a rank, one slice
//! for each part of a step, arrows for messages.
//!
//! Each rank notes times on its own clock; before the run, rank 0 has measured how far the others' clocks are from
//! its own (half of the quickest of many round trips, as NTP does). The format: "Trace Event Format", Google.

use crate::transport::{Kind, Transport};
use crate::wait;
use crate::wire::Step;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Slices that a rank notes at most; what comes later is counted only.
const MOST_SLICES: usize = 1 << 16;
/// Round trips to each rank.
const ROUND_TRIPS: usize = 64;
/// Longest that a round trip may take.
const ROUND_TRIP_LIMIT: Duration = Duration::from_secs(60);

/// A part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// The rank's layers, and head where it has one.
    Compute,
    /// Choosing the tokens, on the last rank.
    Sample,
    /// Handing the activations to MPI.
    Send,
    /// Decoding and writing the tokens, on rank 0.
    HandOut,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Sample => "sample",
            Self::Send => "send",
            Self::HandOut => "hand out",
        }
    }
}

/// What was done from when to when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slice {
    part: Part,
    step: u64,
    /// Sequences in the step.
    sequences: u32,
    /// Tokens in the step.
    tokens: u32,
    /// Microseconds on the rank's clock.
    start_us: u64,
    end_us: u64,
}

/// Notes what one rank does.
#[derive(Debug)]
pub struct Recorder {
    clock: Clock,
    slices: Vec<Slice>,
    /// Slices that were too many.
    left_out: u64,
    /// On rank 0, by rank: how many microseconds its clock is ahead of this one.
    ahead_us: Vec<i64>,
}

/// Microseconds since a moment of this process.
#[derive(Debug, Clone, Copy)]
struct Clock(Instant);

impl Clock {
    fn us(self, moment: Instant) -> u64 {
        moment.saturating_duration_since(self.0).as_micros() as u64
    }

    fn now_us(self) -> u64 {
        self.us(Instant::now())
    }
}

/// What a rank brings to the trace.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RankTrace {
    slices: Vec<Slice>,
    left_out: u64,
    ahead_us: Vec<i64>,
}

impl Recorder {
    /// A recorder whose clock starts now, and is compared with those of the other ranks. All ranks call this at the
    /// same point.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub fn start(transport: &mut impl Transport) -> Result<Self> {
        let mut recorder = Self {
            clock: Clock(Instant::now()),
            slices: Vec::new(),
            left_out: 0,
            ahead_us: Vec::new(),
        };
        if transport.rank() > 0 {
            recorder.answer_clock(transport)?;
            return Ok(recorder);
        }
        recorder.ahead_us.push(0);
        for rank in 1..transport.size() {
            let ahead_us = recorder.compare_clock(transport, rank)?;
            recorder.ahead_us.push(ahead_us);
        }
        Ok(recorder)
    }

    /// Notes what was done since `began`.
    pub fn add(&mut self, part: Part, step: &Step, began: Instant) {
        if self.slices.len() == MOST_SLICES {
            self.left_out += 1;
            return;
        }
        self.slices.push(Slice {
            part,
            step: step.number,
            sequences: step.entries.len() as u32,
            tokens: step.row_count() as u32,
            start_us: self.clock.us(began),
            end_us: self.clock.now_us(),
        });
    }

    /// What was noted.
    pub fn finish(self) -> RankTrace {
        RankTrace {
            slices: self.slices,
            left_out: self.left_out,
            ahead_us: self.ahead_us,
        }
    }

    /// How many microseconds a rank's clock is ahead of this one.
    fn compare_clock(&self, transport: &mut impl Transport, rank: usize) -> Result<i64> {
        let mut best: Option<(u64, i64)> = None;
        for _ in 0..ROUND_TRIPS {
            let asked_us = self.clock.now_us();
            transport.send(rank, Kind::Setup, vec![0])?;
            let bytes = receive(transport, rank)?;
            let answered_us = self.clock.now_us();
            let bytes: [u8; 8] = bytes[..].try_into().context("a rank's clock is 8 bytes")?;
            let middle_us = (asked_us + answered_us) / 2;
            let ahead_us = u64::from_le_bytes(bytes) as i64 - middle_us as i64;
            let took_us = answered_us - asked_us;
            if best.is_none_or(|(quickest_us, _)| took_us < quickest_us) {
                best = Some((took_us, ahead_us));
            }
        }
        Ok(best.map_or(0, |(_, ahead_us)| ahead_us))
    }

    /// Tells rank 0 this rank's clock as often as it asks.
    fn answer_clock(&self, transport: &mut impl Transport) -> Result<()> {
        for _ in 0..ROUND_TRIPS {
            let asked = receive(transport, 0)?;
            ensure!(asked == [0], "rank 0 asks for the clock by one byte");
            let now = self.clock.now_us().to_le_bytes().to_vec();
            transport.send(0, Kind::Setup, now)?;
        }
        Ok(())
    }
}

fn receive(transport: &mut impl Transport, from: usize) -> Result<Vec<u8>> {
    wait::until("a rank's clock", Some(ROUND_TRIP_LIMIT), || {
        transport.try_receive(from, Kind::Setup)
    })
}

/// Writes all ranks' slices on rank 0's clock. `hosts`: by rank.
///
/// # Errors
/// Those of the output.
pub fn write(output: impl Write, ranks: &[RankTrace], hosts: &[&str]) -> io::Result<()> {
    let left_out: u64 = ranks.iter().map(|rank| rank.left_out).sum();
    let mut events = Events {
        output,
        has_any: false,
    };
    write!(
        events.output,
        "{{\"displayTimeUnit\":\"ms\",\"otherData\":{{\"slices_left_out\":{left_out}}},\"traceEvents\":["
    )?;
    let earliest = slices(ranks).map(|(_, slice)| slice.start).min();
    let earliest = earliest.unwrap_or(0);
    for (rank, host) in hosts.iter().enumerate() {
        events.put(json!({
            "ph": "M", "name": "thread_name", "pid": 0, "tid": rank,
            "args": {"name": format!("rank {rank} on {host}")},
        }))?;
    }
    let mut computed: HashMap<(u64, usize), Placed> = HashMap::new();
    let mut handed_out: HashMap<u64, i64> = HashMap::new();
    for (rank, slice) in slices(ranks) {
        let (part, what) = (slice.what.part, slice.what);
        events.put(json!({
            "ph": "X", "name": format!("{} {}", part.name(), what.step), "cat": part.name(),
            "pid": 0, "tid": rank, "ts": slice.start - earliest, "dur": slice.end - slice.start,
            "args": {"step": what.step, "sequences": what.sequences, "tokens": what.tokens},
        }))?;
        if part == Part::HandOut {
            handed_out.insert(what.step, slice.start);
            continue;
        }
        // A step's message leaves when its last part is done.
        let all = computed.entry((what.step, rank)).or_insert(slice);
        all.end = all.end.max(slice.end);
    }
    for (&(step, rank), slice) in &computed {
        let is_last = rank + 1 == ranks.len();
        let next = match is_last {
            false => computed
                .get(&(step, rank + 1))
                .map(|next| (rank + 1, next.start)),
            true => handed_out.get(&step).map(|&start| (0, start)),
        };
        let Some((next_rank, arrival)) = next.filter(|_| ranks.len() > 1) else {
            continue;
        };
        let id = step as usize * ranks.len() + rank;
        let name = if is_last { "tokens" } else { "activations" };
        // A message begins inside of the slice that it comes from.
        let departure = slice.end.min(arrival) - 1 - earliest;
        events.put(json!({
            "ph": "s", "name": name, "cat": "message", "id": id, "pid": 0, "tid": rank, "ts": departure,
        }))?;
        events.put(json!({
            "ph": "f", "bp": "e", "name": name, "cat": "message", "id": id, "pid": 0,
            "tid": next_rank, "ts": arrival - earliest,
        }))?;
    }
    events.output.write_all(b"]}\n")?;
    events.output.flush()
}

/// A slice on rank 0's clock, in microseconds.
#[derive(Clone, Copy)]
struct Placed<'a> {
    what: &'a Slice,
    start: i64,
    end: i64,
}

/// The slices of all ranks.
fn slices(ranks: &[RankTrace]) -> impl Iterator<Item = (usize, Placed<'_>)> {
    let ahead_us = ranks.first().map_or(&[][..], |first| &first.ahead_us);
    let ranks = ranks.iter().zip(ahead_us).enumerate();
    ranks.flat_map(|(rank, (trace, ahead))| {
        trace.slices.iter().map(move |what| {
            let (start, end) = (what.start_us as i64 - ahead, what.end_us as i64 - ahead);
            (rank, Placed { what, start, end })
        })
    })
}

/// A list of events that is written as it grows.
struct Events<W> {
    output: W,
    has_any: bool,
}

impl<W: Write> Events<W> {
    fn put(&mut self, event: Value) -> io::Result<()> {
        let separator = if self.has_any { ",\n" } else { "\n" };
        self.has_any = true;
        write!(self.output, "{separator}{event}")
    }
}
