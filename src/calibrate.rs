//! Measures what the planner calculates with: a layer and the head on each host, and each link.
//!
//! Before the plan no rank knows its layers, and no rank may hold another's, so what is timed are layers of
//! made-up weights in the shapes and dtypes of the model's (no tensor is read). They are computed by the
//! same [`Stage`] that a run has. Ranks of one host are alike, so the first of them measures while the others
//! wait, and then all compute at once to see how they crowd each other. Links are measured one after the
//! other, with messages as large as a run's and receivers that have waited as long.

use crate::agree::{self, Failure};
use crate::model::ModelFiles;
use crate::pipeline::Compute;
use crate::plan::{Costs, DeviceCost, LinkCost, LinkCosts, ModelShape, StepCost, WireDtype};
use crate::sampler::Sampler;
use crate::stage::{Output, Stage};
use crate::transport::{Kind, Transport};
use crate::wait;
use crate::wire::{Entry, SampleParams, Step};
use anyhow::{Context, Result, bail};
use std::time::{Duration, Instant};
use tracing::info;

/// Time for the steps of one size.
const STEPS_BUDGET: Duration = Duration::from_millis(350);
/// Time for everything that is measured of a host, but for the first run of each kernel.
const HOST_BUDGET: Duration = Duration::from_millis(1500);
/// Time in which all ranks of a host compute at once.
const CROWDED_BUDGET: Duration = Duration::from_millis(400);
/// Steps of one size: as many as fit in the time, between these.
const STEPS_AT_LEAST: usize = 3;
const STEPS_AT_MOST: usize = 100;
/// Sizes of steps that are timed, as far as the time allows; one token always.
const STEP_TOKENS: [usize; 3] = [8, 64, 512];
/// Weights that are timed together are at least this large where the model has as much, so that a
/// processor's caches do not hold what a run has to fetch from memory.
const LARGER_THAN_CACHES_BYTES: u64 = 96 << 20;
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
    /// Each rank's host.
    pub hosts: &'a [&'a str],
    /// The model.
    pub files: &'a ModelFiles,
    /// The bytes of its parts.
    pub shape: &'a ModelShape,
    /// What is computed in.
    pub wire_dtype: WireDtype,
}

/// Measures all ranks and links. All ranks call this at the same point.
///
/// # Errors
/// A rank that cannot compute, or a link that does not carry.
pub fn measure(question: &Question, transport: &mut impl Transport) -> Result<Costs, Failure> {
    let devices = devices(question, transport)?;
    let links = links(question, transport)?;
    Ok(Costs { devices, links })
}

/// Each rank's costs.
fn devices(
    question: &Question,
    transport: &mut impl Transport,
) -> Result<Vec<DeviceCost>, Failure> {
    let (rank, hosts) = (transport.rank(), question.hosts);
    let first_on_host = |rank: usize| hosts.iter().position(|host| *host == hosts[rank]);
    let mut bench = Bench::new(question, transport.size());
    let alone = match first_on_host(rank) == Some(rank) {
        true => bench.alone().map(Some),
        false => Ok(None),
    };
    let alone = agree::gather(transport, alone.context("timing a layer"), None)?;
    let own = first_on_host(rank).and_then(|first| alone[first].clone());
    let own = own.context("the first rank of this host measured nothing")?;

    let sharers = hosts.iter().filter(|host| **host == hosts[rank]).count();
    let crowded = match sharers {
        1 => Ok(1000),
        _ => bench.crowding_per_mille(&own),
    };
    let crowded = agree::gather(transport, crowded.context("timing a layer"), None)?;
    let of_host = crowded.iter().zip(hosts);
    let of_host = of_host.filter(|(_, host)| **host == hosts[rank]);
    let sum: u64 = of_host.map(|(crowded, _)| crowded).sum();
    let own = DeviceCost {
        crowding_per_mille: (sum / sharers as u64).max(1000),
        ..own
    };
    info!(?own, "measured");
    agree::gather(transport, Ok(own), None)
}

/// Stages of made-up weights, and what they are fed with.
struct Bench<'a> {
    question: &'a Question<'a>,
    layer_count: usize,
    layer_bytes: u64,
    /// Kept for the second measurement.
    stage: Option<Stage>,
}

impl<'a> Bench<'a> {
    fn new(question: &'a Question, ranks: usize) -> Self {
        let of_layers = &question.shape.layer_bytes;
        let at_most = of_layers.len().div_ceil(ranks).max(1);
        let mut layer_count = 1;
        let bytes = |count: usize| of_layers[..count.min(of_layers.len())].iter().sum::<u64>();
        while layer_count < at_most && bytes(layer_count) < LARGER_THAN_CACHES_BYTES {
            layer_count += 1;
        }
        Self {
            question,
            layer_count,
            layer_bytes: (bytes(layer_count) / layer_count as u64).max(1),
            stage: None,
        }
    }

    fn layers(&mut self) -> Result<&mut Stage> {
        if self.stage.is_none() {
            let (files, dtype) = (self.question.files, self.question.wire_dtype);
            self.stage = Some(Stage::made_up(files, self.layer_count, None, dtype)?);
        }
        self.stage.as_mut().context("made right above")
    }

    /// Times everything while the host computes nothing else.
    fn alone(&mut self) -> Result<DeviceCost> {
        let started = Instant::now();
        let step_ns = self.empty_step_ns()?;
        let head_ns = self.head_ns(step_ns)?;
        let layer_count = self.layer_count as u64;
        let row_bytes = self.row_bytes();
        let per_layer = |ns: u64| ns.saturating_sub(step_ns) / layer_count;

        let stage = self.layers()?;
        let one_ns = median_ns(stage, 1, 0, row_bytes, STEPS_BUDGET)?;
        let mut layer = vec![StepCost {
            tokens: 1,
            ns: per_layer(one_ns),
        }];
        let mut last = (1, one_ns);
        for tokens in STEP_TOKENS {
            // A step of so many tokens takes at most proportionally long, and is done twice.
            let expected = Duration::from_nanos(last.1 * 2).mul_f64(tokens as f64 / last.0 as f64);
            if layer.len() > 1 && started.elapsed() + expected > HOST_BUDGET {
                break;
            }
            let ns = median_ns(stage, tokens, 0, row_bytes, STEPS_BUDGET / 2)?;
            layer.push(StepCost {
                tokens: tokens as u64,
                ns: per_layer(ns),
            });
            last = (tokens, ns);
        }
        stage.pretend_cached(SLOT, CONTEXT_TOKENS)?;
        let later_ns = median_ns(stage, 1, CONTEXT_TOKENS, row_bytes, STEPS_BUDGET / 2)?;
        Ok(DeviceCost {
            layer,
            layer_bytes: self.layer_bytes,
            context_ns: later_ns.saturating_sub(one_ns) / layer_count,
            head_ns,
            step_ns,
            crowding_per_mille: 1000,
        })
    }

    /// A step through no layers at all.
    fn empty_step_ns(&self) -> Result<u64> {
        let mut stage = Stage::made_up(self.question.files, 0, None, self.question.wire_dtype)?;
        median_ns(&mut stage, 1, 0, self.row_bytes(), STEPS_BUDGET / 8)
    }

    /// Norm, head and sampling of one row, from some of the head's rows.
    fn head_ns(&self, step_ns: u64) -> Result<u64> {
        let files = self.question.files;
        let vocab_size = files.architecture.vocab_size as u64;
        let head_bytes = self.question.shape.head_step_bytes().max(1);
        let rows = (vocab_size * HEAD_BYTES / head_bytes).clamp(1, vocab_size);
        let mut stage = Stage::made_up(files, 0, Some(rows as usize), self.question.wire_dtype)?;
        let ns = median_ns(&mut stage, 1, 0, self.row_bytes(), STEPS_BUDGET)?;
        let part_ns = u128::from(ns.saturating_sub(step_ns));
        Ok((part_ns * u128::from(vocab_size) / u128::from(rows)) as u64)
    }

    /// How long a step takes while every rank of the host does this, against alone.
    fn crowding_per_mille(&mut self, alone: &DeviceCost) -> Result<u64> {
        let (row_bytes, layer_count) = (self.row_bytes(), self.layer_count as u64);
        let one_ns = alone.layer[0].ns * layer_count + alone.step_ns;
        let stage = self.layers()?;
        let crowded_ns = median_ns(stage, 1, 0, row_bytes, CROWDED_BUDGET)?;
        Ok((u128::from(crowded_ns) * 1000 / u128::from(one_ns.max(1))) as u64)
    }

    fn row_bytes(&self) -> usize {
        self.question.files.architecture.hidden_size * self.question.wire_dtype.size_bytes()
    }
}

/// The slot of the sequence that is timed.
const SLOT: u32 = 0;

/// Median nanoseconds of a step of `tokens` tokens at position `start`, after one that does not count: the
/// first use of a kernel may compile it.
fn median_ns(
    stage: &mut Stage,
    tokens: usize,
    start: usize,
    row_bytes: usize,
    budget: Duration,
) -> Result<u64> {
    let step = Step {
        number: 0,
        release: Vec::new(),
        entries: vec![Entry {
            slot: SLOT,
            start: start as u32,
            tokens: vec![0; tokens],
            sample: Some(SampleParams::GREEDY),
        }],
    };
    let payload = vec![0; tokens * row_bytes];
    let mut sampler = Sampler::default();
    let mut run = || -> Result<u64> {
        wait::check_signals()?;
        let started = Instant::now();
        if let Output::Logits(logits) = stage.run(&step, &payload)? {
            sampler.sample_step(&step, &logits);
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
    Ok(median(times_ns))
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
    let what = format!("rank {from}");
    let bytes = wait::until(&what, Some(LINK_LIMIT), || {
        transport.try_receive(from, Kind::Setup)
    })?;
    if bytes.len() > LONG_BYTES[1] {
        bail!("rank {from} sent {} bytes as a probe", bytes.len());
    }
    Ok(bytes)
}
