//! Measures what the planner calculates with: a layer and the head on each host, and each link.
//!
//! Before the plan no rank knows its layers, and no rank may hold another's, so what is timed are layers of
//! made-up weights in the shapes and dtypes of the model's (no tensor is read). They are computed by the
//! same [`Stage`] that a run has. Ranks of one host on the same kind of device are alike, so the first of them measures
//! while the host's others wait, and then all compute at once to see how they crowd each other. Links are measured one after the
//! other, with messages as large as a run's and receivers that have waited as long.

use crate::agree::{self, Failure};
use crate::cost_store::Seat;
use crate::model::{Kernels, ModelFiles};
use crate::pipeline::Compute;
use crate::plan::{Costs, DeviceCost, LinkCost, LinkCosts, ModelShape, StepCost, WireDtype};
use crate::sampler::Sampler;
use crate::stage::{self, Output, Stage};
use crate::transport::{Kind, Transport};
use crate::wait::{self, Patience};
use crate::wire::{Entry, SampleParams, Step};
use anyhow::{Context, Result, bail, ensure};
use std::time::{Duration, Instant};
use tracing::info;

/// Time for the steps of one size.
const STEPS_BUDGET: Duration = Duration::from_millis(300);
/// Time for all steps of a host while it computes nothing else, those that do not count left out: the first
/// use of a kernel may compile it.
const HOST_BUDGET: Duration = Duration::from_millis(1800);
/// Time in which all ranks of a host compute at once.
const CROWDED_BUDGET: Duration = Duration::from_millis(400);
/// Steps of one size: as many as fit in the time, between these.
const STEPS_AT_LEAST: usize = 3;
const STEPS_AT_MOST: usize = 100;
/// Sizes of steps that are timed beside one token, as far as the time allows; the first always.
const STEP_TOKENS: [usize; 3] = [8, 64, 512];
/// Weights that are timed together are at least this large where the model has as much, so that a
/// processor's caches do not hold what a run has to fetch from memory.
const LARGER_THAN_CACHES_BYTES: u64 = 96 << 20;
/// A step that takes less than this is mostly its beginning and end: then more layers are timed together.
const LONG_STEP: Duration = Duration::from_millis(4);
/// Above this, what a step costs beside its layers does not matter, and is not told from noise.
const LONG_STEP_NS: u64 = 16_000_000;
/// A step that takes this long is bound by arithmetic, not by memory, whatever caches hold.
const SLOW_STEP: Duration = Duration::from_millis(25);
/// Most bytes of the head that are timed; the rest takes proportionally long.
const HEAD_BYTES: u64 = 48 << 20;
/// Tokens in the cache when it is timed what a long sequence costs.
const CONTEXT_TOKENS: usize = 1024;
/// How long each side of a link lets the other wait, so that it sleeps as it does in a run.
const HOLD: Duration = Duration::from_millis(4);
/// Round trips of a link.
const ROUNDS: usize = 15;
/// Bytes of a long message, and of a longer one for fast links.
const LONG_BYTES: [usize; 2] = [1 << 20, 16 << 20];
/// A long message that takes less than this says more about the waiting than about the link.
const LONG_ENOUGH: Duration = Duration::from_millis(8);
/// Longest wait for the other end of a link.
const LINK_LIMIT: Duration = Duration::from_secs(60);

/// What is measured for.
pub struct Question<'a> {
    /// Where each rank computes.
    pub seats: &'a [Seat],
    /// The model.
    pub files: &'a ModelFiles,
    /// The bytes of its parts.
    pub shape: &'a ModelShape,
    /// What is computed in.
    pub wire_dtype: WireDtype,
    /// What computes.
    pub kernels: &'a Kernels,
    /// What this rank may hold in a run; made-up layers take half of it at most.
    pub limit_bytes: u64,
}

/// Measures all ranks and links. All ranks call this at the same point.
///
/// # Errors
/// A rank that cannot compute, or a link that does not carry.
pub fn measure(question: &Question, transport: &mut impl Transport) -> Result<Costs, Failure> {
    let devices = devices(question, transport)?;
    // What was made up is gone, and is no part of the run.
    stage::forget_peak(question.kernels);
    let links = links(question, transport)?;
    Ok(Costs { devices, links })
}

/// Each rank's costs.
fn devices(
    question: &Question,
    transport: &mut impl Transport,
) -> Result<Vec<DeviceCost>, Failure> {
    let (rank, seats) = (transport.rank(), question.seats);
    let mut bench = Bench::new(question, transport.size());
    let mut own = None;
    // As many on all ranks, which all know all seats.
    let last_turn = (0..seats.len()).map(|rank| turn_of(seats, rank)).max();
    for turn in 0..=last_turn.unwrap_or(0) {
        let first = first_of(seats, rank);
        let alone = match first == rank && turn_of(seats, rank) == turn {
            true => bench.alone().map(Some),
            false => Ok(None),
        };
        let alone = agree::gather(transport, alone.context("timing a layer"), None)?;
        own = own.or_else(|| alone.into_iter().nth(first).flatten());
    }
    let own = own.context("the first rank of this kind measured nothing")?;

    let sharers = seats.iter().filter(|seat| seat.host == seats[rank].host);
    let crowded = match sharers.count() {
        1 => Ok(1000),
        _ => bench.crowding_per_mille(&own),
    };
    let crowded = agree::gather(transport, crowded.context("timing a layer"), None)?;
    let of_kind = crowded.iter().zip(seats);
    let of_kind: Vec<u64> = of_kind
        .filter(|(_, seat)| **seat == seats[rank])
        .map(|(crowded, _)| *crowded)
        .collect();
    let mean = of_kind.iter().sum::<u64>() / of_kind.len() as u64;
    let own = DeviceCost {
        crowding_per_mille: mean.max(1000),
        ..own
    };
    info!(?own, "measured");
    agree::gather(transport, Ok(own), None)
}

/// The first rank that computes where this one does.
fn first_of(seats: &[Seat], rank: usize) -> usize {
    let alike = seats.iter().position(|seat| *seat == seats[rank]);
    alike.unwrap_or(rank)
}

/// When a rank's kind of device measures: kinds of one host one after the other, in the order of their first ranks.
fn turn_of(seats: &[Seat], rank: usize) -> usize {
    let first = first_of(seats, rank);
    let before = 0..first;
    before
        .filter(|&other| seats[other].host == seats[rank].host && first_of(seats, other) == other)
        .count()
}

/// Stages of made-up weights, and what they are fed with.
struct Bench<'a> {
    question: &'a Question<'a>,
    /// Layers that are timed together.
    layer_count: usize,
    /// Most that there can be: the model's, shared by the ranks.
    most_layers: usize,
    /// Time that timed steps have taken.
    spent: Duration,
    /// Kept for the second measurement.
    stage: Option<Stage>,
}

impl<'a> Bench<'a> {
    fn new(question: &'a Question, ranks: usize) -> Self {
        let of_layers = &question.shape.layer_bytes;
        let share = of_layers.len().div_ceil(ranks).max(1);
        let largest = of_layers.iter().copied().max().unwrap_or(0).max(1);
        let most_layers = share
            .min((question.limit_bytes / 2 / largest) as usize)
            .max(1);
        Self {
            question,
            layer_count: 1,
            most_layers,
            spent: Duration::ZERO,
            stage: None,
        }
    }

    /// Bytes of the layers timed together.
    fn layers_bytes(&self) -> u64 {
        let of_layers = &self.question.shape.layer_bytes;
        of_layers.iter().take(self.layer_count).sum()
    }

    /// Times everything while the host computes nothing else.
    fn alone(&mut self) -> Result<DeviceCost> {
        let one = Probe {
            tokens: 1,
            start: 0,
        };
        self.grow_until_long(one)?;
        let whole_ns = self.layers_ns(one, STEPS_BUDGET)?;
        let (layer_ns, step_ns) = self.split(one, whole_ns)?;
        let layer_count = self.layer_count as u64;

        let mut layer = vec![StepCost {
            tokens: 1,
            ns: layer_ns,
        }];
        let (mut tokens_before, mut before_ns) = (1, whole_ns);
        for tokens in STEP_TOKENS {
            // A step of more tokens takes at most proportionally long.
            let expected_ns = before_ns.saturating_mul(tokens as u64) / tokens_before;
            let expected = Duration::from_nanos(expected_ns) * STEPS_AT_LEAST as u32;
            if layer.len() > 1 && self.spent + expected > HOST_BUDGET {
                break;
            }
            before_ns = self.layers_ns(Probe { tokens, start: 0 }, STEPS_BUDGET / 2)?;
            tokens_before = tokens as u64;
            layer.push(StepCost {
                tokens: tokens_before,
                ns: layer_ns_of(before_ns, step_ns, layer_count),
            });
        }
        let later = Probe {
            tokens: 1,
            start: CONTEXT_TOKENS,
        };
        self.layers()?.pretend_cached(SLOT, CONTEXT_TOKENS)?;
        let later_ns = self.layers_ns(later, STEPS_BUDGET / 2)?;
        Ok(DeviceCost {
            layer,
            layer_bytes: (self.layers_bytes() / layer_count).max(1),
            context_ns: later_ns.saturating_sub(whole_ns) / layer_count,
            head_ns: self.head_ns()?,
            step_ns,
            crowding_per_mille: 1000,
        })
    }

    /// Takes more layers until a step of them takes long enough, and no cache holds them.
    fn grow_until_long(&mut self, probe: Probe) -> Result<()> {
        while self.layer_count < self.most_layers {
            let took = Duration::from_nanos(self.layers_ns(probe, Duration::ZERO)?);
            let from_memory = self.layers_bytes() >= LARGER_THAN_CACHES_BYTES;
            if took > SLOW_STEP || (took > LONG_STEP && from_memory) {
                break;
            }
            self.layer_count = (2 * self.layer_count).min(self.most_layers);
            self.stage = None;
        }
        Ok(())
    }

    /// What one layer of a step that takes `whole_ns` costs, and what the step costs beside its layers. That
    /// is what the same step takes with no layers at all, and on a GPU more: waiting for it to be done. A
    /// step with half of the layers shows it, if it is more than such a difference is uncertain by.
    fn split(&mut self, probe: Probe, whole_ns: u64) -> Result<(u64, u64)> {
        let (whole, half) = (self.layer_count as u64, self.layer_count as u64 / 2);
        let mut part_ns = |layers: u64, budget: Duration| -> Result<u64> {
            self.layers()?.use_layers(layers as usize);
            let ns = self.layers_ns(probe, budget);
            self.layers()?.use_layers(usize::MAX);
            ns
        };
        let empty_ns = part_ns(0, STEPS_BUDGET / 8)?;
        let half_ns = part_ns(half, STEPS_BUDGET / 2)?;
        let sloped_ns = whole_ns.saturating_sub(half_ns) / (whole - half);
        let beside_ns = whole_ns.saturating_sub(sloped_ns * whole);
        let step_ns = match beside_ns > whole_ns / 6 && half > 0 && whole_ns < LONG_STEP_NS {
            true => beside_ns,
            false => empty_ns,
        };
        Ok((layer_ns_of(whole_ns, step_ns, whole), step_ns))
    }

    /// Norm, head and sampling of one row: a line through two parts of the head.
    fn head_ns(&mut self) -> Result<u64> {
        let vocab_size = self.question.files.architecture.vocab_size as u64;
        let head_bytes = self.question.shape.head_step_bytes().max(1);
        let rows =
            (u128::from(vocab_size) * u128::from(HEAD_BYTES) / u128::from(head_bytes)) as u64;
        let rows = rows.clamp(1, vocab_size);
        let fewer = rows.div_ceil(4);
        let probe = Probe {
            tokens: 1,
            start: 0,
        };
        let mut time = |rows: u64| -> Result<u64> {
            let mut stage = self.made_up(0, Some(rows as usize))?;
            self.median_ns(&mut stage, probe, STEPS_BUDGET / 2)
        };
        let (fewer_ns, ns) = (time(fewer)?, time(rows)?);
        let mut empty = self.made_up(0, None)?;
        let empty_ns = self.median_ns(&mut empty, probe, STEPS_BUDGET / 8)?;
        let (rise_ns, run) = (ns.saturating_sub(fewer_ns), (rows - fewer).max(1));
        let rest_ns = u128::from(rise_ns) * u128::from(vocab_size - rows) / u128::from(run);
        Ok(ns.saturating_sub(empty_ns).saturating_add(rest_ns as u64))
    }

    /// How long a step takes while every rank of the host does this, against alone.
    fn crowding_per_mille(&mut self, alone: &DeviceCost) -> Result<u64> {
        let one_ns = alone.layer[0].ns * self.layer_count as u64 + alone.step_ns;
        let probe = Probe {
            tokens: 1,
            start: 0,
        };
        let crowded_ns = self.layers_ns(probe, CROWDED_BUDGET)?;
        Ok((u128::from(crowded_ns) * 1000 / u128::from(one_ns.max(1))) as u64)
    }

    fn layers_ns(&mut self, probe: Probe, budget: Duration) -> Result<u64> {
        self.layers()?;
        let mut stage = self.stage.take().context("made right above")?;
        let ns = self.median_ns(&mut stage, probe, budget);
        self.stage = Some(stage);
        ns
    }

    fn layers(&mut self) -> Result<&mut Stage> {
        if self.stage.is_none() {
            self.stage = Some(self.made_up(self.layer_count, None)?);
        }
        self.stage.as_mut().context("made right above")
    }

    fn made_up(&self, layers: usize, head_rows: Option<usize>) -> Result<Stage> {
        let Question {
            files,
            wire_dtype,
            kernels,
            ..
        } = self.question;
        Stage::made_up(files, layers, head_rows, *wire_dtype, kernels)
    }

    /// Median nanoseconds of a step, after one that does not count.
    fn median_ns(&mut self, stage: &mut Stage, probe: Probe, budget: Duration) -> Result<u64> {
        let step = probe.step();
        let payload = vec![0; probe.tokens * self.row_bytes()];
        let mut sampler = Sampler::default();
        let mut run = || -> Result<u64> {
            wait::check_signals()?;
            let started = Instant::now();
            if let Output::Scores(scores) = stage.run(&step, &payload)? {
                sampler.sample_step(&step, &scores);
            }
            Ok(started.elapsed().as_nanos() as u64)
        };
        run()?;
        let started = Instant::now();
        let mut times_ns = Vec::new();
        while times_ns.len() < STEPS_AT_MOST
            && (times_ns.len() < STEPS_AT_LEAST || started.elapsed() < budget)
        {
            times_ns.push(run()?);
        }
        self.spent += started.elapsed();
        Ok(median(times_ns))
    }

    fn row_bytes(&self) -> usize {
        self.question.files.architecture.hidden_size * self.question.wire_dtype.size_bytes()
    }
}

/// The slot of the sequence that is timed.
const SLOT: u32 = 0;

/// A step to time.
#[derive(Clone, Copy)]
struct Probe {
    tokens: usize,
    /// Tokens in the cache before it.
    start: usize,
}

impl Probe {
    fn step(self) -> Step {
        Step {
            number: 0,
            entries: vec![Entry {
                slot: SLOT,
                start: self.start as u32,
                tokens: vec![0; self.tokens],
                sample: Some(SampleParams::GREEDY),
            }],
            ..Step::default()
        }
    }
}

/// Nanoseconds of one of `layers` layers in a step of `whole_ns` that takes `step_ns` without them. At least one:
/// on a busy host, a step without layers may seem to take as long as one with a few tiny ones.
fn layer_ns_of(whole_ns: u64, step_ns: u64, layers: u64) -> u64 {
    (whole_ns.saturating_sub(step_ns) / layers).max(1)
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// The links of the pipeline; `None` for one rank.
fn links(
    question: &Question,
    transport: &mut impl Transport,
) -> Result<Option<LinkCosts>, Failure> {
    let last = transport.size() - 1;
    if last == 0 {
        return Ok(None);
    }
    let row_bytes = question.files.architecture.hidden_size * question.wire_dtype.size_bytes();
    let mut measured = Vec::new();
    for (from, to) in (0..last).map(|rank| (rank, rank + 1)).chain([(last, 0)]) {
        let own = link(transport, from, to, row_bytes)
            .with_context(|| format!("measuring the link from rank {from} to rank {to}"));
        let all = agree::gather(transport, own, None)?;
        let link = all[from].context("the sender measured no link")?;
        measured.push(link.cost());
    }
    let back = measured.pop().context("a ring has a link back")?;
    let forward = measured;
    Ok(Some(LinkCosts { forward, back }))
}

/// What the two ends of a link find out about it.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub struct Link {
    /// One way, nanoseconds, the receiver having slept.
    pub latency_ns: u64,
    /// One way, nanoseconds, the receiver looking all the time.
    pub eager_latency_ns: u64,
    /// Bytes a second.
    pub bytes_per_s: u64,
    /// What the long messages had together: at least this much went out.
    pub long_bytes: u64,
}

impl Link {
    fn cost(self) -> LinkCost {
        LinkCost {
            latency_ns: self.latency_ns,
            bytes_per_s: self.bytes_per_s,
        }
    }
}

/// Measures the link between two ranks by round trips, without comparing clocks. Both ends call this; the
/// sender's value counts, the others get `None`.
///
/// # Errors
/// The other end does not answer, or not as expected.
pub fn link(
    transport: &mut impl Transport,
    from: usize,
    to: usize,
    row_bytes: usize,
) -> Result<Option<Link>> {
    match transport.rank() {
        rank if rank == from => send_probes(transport, to, row_bytes).map(Some),
        rank if rank == to => answer_probes(transport, from, row_bytes).map(|()| None),
        _ => Ok(None),
    }
}

fn send_probes(transport: &mut impl Transport, to: usize, row_bytes: usize) -> Result<Link> {
    let row = vec![0; row_bytes.max(8)];
    let mut slept_ns = Vec::new();
    for _ in 0..ROUNDS {
        std::thread::sleep(HOLD);
        slept_ns.push(round_trip_ns(transport, to, &row)?);
    }
    let mut eager_ns = Vec::new();
    for _ in 0..4 * ROUNDS {
        eager_ns.push(round_trip_ns(transport, to, &row)?);
    }
    let (slept_ns, eager_ns) = (median(slept_ns), median(eager_ns));
    let (mut bytes_per_s, mut long_bytes) = (u64::MAX, 0);
    for bytes in LONG_BYTES {
        let long = vec![0; bytes];
        let times_ns = (0..3).map(|_| round_trip_ns(transport, to, &long));
        let long_ns = median(times_ns.collect::<Result<_>>()?);
        let transfer_ns = long_ns.saturating_sub(eager_ns).max(1);
        long_bytes += 3 * bytes as u64;
        bytes_per_s = (bytes as u128 * 1_000_000_000 / u128::from(transfer_ns)) as u64;
        if Duration::from_nanos(transfer_ns) > LONG_ENOUGH {
            break;
        }
    }
    transport.send(to, Kind::Setup, Vec::new())?;
    Ok(Link {
        latency_ns: slept_ns / 2,
        eager_latency_ns: eager_ns / 2,
        bytes_per_s: bytes_per_s.max(1),
        long_bytes,
    })
}

/// Nanoseconds there and back, less what the other end says that it held the answer back for.
fn round_trip_ns(transport: &mut impl Transport, to: usize, probe: &[u8]) -> Result<u64> {
    let probe = probe.to_vec();
    let started = Instant::now();
    transport.send(to, Kind::Setup, probe)?;
    let answer = receive(transport, to)?;
    let whole_ns = started.elapsed().as_nanos() as u64;
    let held = answer.first_chunk::<8>().context("too short an answer")?;
    Ok(whole_ns.saturating_sub(u64::from_le_bytes(*held)))
}

/// Answers rows with rows, long messages with short ones, until an empty one comes.
fn answer_probes(transport: &mut impl Transport, from: usize, row_bytes: usize) -> Result<()> {
    let mut count = 0;
    loop {
        let probe = receive(transport, from)?;
        let received = Instant::now();
        if probe.is_empty() {
            return Ok(());
        }
        if count < ROUNDS {
            std::thread::sleep(HOLD);
        }
        count += 1;
        let mut answer = vec![0; 8];
        if probe.len() == row_bytes.max(8) {
            answer.resize(probe.len(), 0);
        }
        answer[..8].copy_from_slice(&(received.elapsed().as_nanos() as u64).to_le_bytes());
        transport.send(from, Kind::Setup, answer)?;
    }
}

fn receive(transport: &mut impl Transport, from: usize) -> Result<Vec<u8>> {
    // As ranks wait for steps: how soon they notice is a part of what is measured.
    let mut patience = Patience::new();
    let bytes = loop {
        if let Some(bytes) = transport.try_receive(from, Kind::Setup)? {
            break bytes;
        }
        ensure!(
            patience.elapsed() < LINK_LIMIT,
            "waited {} s for rank {from}",
            LINK_LIMIT.as_secs()
        );
        patience.pause_for_answer(transport)?;
    };
    if bytes.len() > LONG_BYTES[1] {
        bail!("rank {from} sent {} bytes as a probe", bytes.len());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::{first_of, layer_ns_of, turn_of};
    use crate::cost_store::Seat;

    #[test]
    fn kinds_of_devices_of_one_host_measure_one_after_the_other() {
        let seat = |(host, device): (&str, &str)| Seat {
            host: host.into(),
            device: device.into(),
        };
        let seats = [
            ("a", "cpu"),
            ("b", "gpu"),
            ("a", "gpu"),
            ("a", "cpu"),
            ("b", "gpu"),
            ("a", "gpu"),
        ]
        .map(seat);
        let each = |of: fn(&[Seat], usize) -> usize| [0, 1, 2, 3, 4, 5].map(|r| of(&seats, r));
        assert_eq!(each(first_of), [0, 1, 2, 0, 1, 2]);
        assert_eq!(each(turn_of), [0, 0, 1, 0, 0, 1]);
    }

    #[test]
    fn no_layer_takes_no_time_whatever_noise_was_measured() {
        for (whole_ns, step_ns, layers, expected) in [
            (10_000, 1_000, 3, 3_000),
            (10_000, 10_000, 3, 1),
            (10_000, 12_000, 1, 1),
            (2, 1, 4, 1),
        ] {
            let found = layer_ns_of(whole_ns, step_ns, layers);
            assert_eq!(found, expected, "{whole_ns} {step_ns} {layers}");
        }
    }
}
