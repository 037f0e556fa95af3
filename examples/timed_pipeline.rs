//! How near the pipeline is to what its schedule allows: the real loop over real MPI, with a model whose stages
//! only let time pass, so that more ranks than cores can be tried on one machine.
//!
//! Usage: mpirun -np RANKS timed_pipeline [--stage-us T] [--groups G] [--batch B] [--tokens K] [--row-bytes N]
//! Rank 0 prints one line of JSON: seconds with one group on its way and with G, their ratio, and the most that it
//! could be.

use anyhow::{Context, Result, bail};
use mlx_pipe::pipeline::{Compute, Feed, Next, Rows, Then, Worker};
use mlx_pipe::sampler::Scores;
use mlx_pipe::schedule::{Forks, Limits, Prompt, PromptRows, Schedule};
use mlx_pipe::stage::Output;
use mlx_pipe::transport::{MpiTransport, Transport};
use mlx_pipe::wait::Rest;
use mlx_pipe::wire::{SampleParams, SampledToken, Step};
use std::time::{Duration, Instant};

/// A stage that takes as long for every step.
struct Timed {
    is_last: bool,
    time: Duration,
    row_bytes: usize,
}

impl Compute for Timed {
    fn run(&mut self, step: &Step, _payload: &[u8]) -> Result<Output> {
        std::thread::sleep(self.time);
        Ok(match self.is_last {
            false => Output::Hidden(vec![0; step.row_count() * self.row_bytes]),
            true => Output::Scores(step.sampled().map(|_| Scores::Best(Some(0))).collect()),
        })
    }

    fn embed(&mut self, _tokens: &[u32]) -> Result<Vec<u8>> {
        bail!("no rank holds a table")
    }
}

/// Prompts of one token each.
struct List {
    left: u64,
    tokens: usize,
    remaining: Vec<usize>,
}

impl Rest for List {}

impl Feed for List {
    fn next(&mut self) -> Result<Next> {
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(Next::Done);
        };
        self.left = left;
        let key = self.remaining.len() as u64;
        self.remaining.push(self.tokens);
        Ok(Next::Prompt(Prompt {
            key,
            tokens: vec![1],
            max_tokens: self.tokens,
            params: SampleParams::GREEDY,
        }))
    }

    fn token(&mut self, key: u64, _token: SampledToken) -> Result<Then> {
        let remaining = &mut self.remaining[key as usize];
        *remaining -= 1;
        Ok(match *remaining {
            0 => Then::Finished,
            _ => Then::Continue,
        })
    }
}

/// What is asked for.
struct Question {
    stage_us: u64,
    groups: usize,
    batch: usize,
    tokens: usize,
    row_bytes: usize,
}

impl Question {
    fn of_arguments(ranks: usize) -> Result<Self> {
        let mut question = Self {
            stage_us: 20_000,
            groups: ranks,
            batch: 8,
            tokens: 64,
            row_bytes: 8192,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let value = arguments
                .next()
                .with_context(|| format!("{name} wants a value"))?;
            let number: usize = value.parse().with_context(|| format!("{name} {value}"))?;
            match name.as_str() {
                "--stage-us" => question.stage_us = number as u64,
                "--groups" => question.groups = number.max(1),
                "--batch" => question.batch = number.max(1),
                "--tokens" => question.tokens = number.max(1),
                "--row-bytes" => question.row_bytes = number,
                _ => bail!("{name} is not understood"),
            }
        }
        Ok(question)
    }

    /// Seconds for all groups, with so many of them on their way.
    fn seconds(&self, groups: usize, transport: &mut MpiTransport) -> Result<f64> {
        let (rank, ranks) = (transport.rank(), transport.size());
        let stage = Timed {
            is_last: rank + 1 == ranks,
            time: Duration::from_micros(self.stage_us),
            row_bytes: self.row_bytes,
        };
        let mut worker = Worker::new(&mut *transport, stage, Rows::Local);
        let began = Instant::now();
        if rank > 0 {
            worker.follow()?;
            return Ok(0.0);
        }
        let limits = Limits {
            ranks,
            max_batch: self.batch,
            step_tokens: self.batch,
            steps_in_flight: if groups == 1 {
                1
            } else {
                groups.max(ranks + 1)
            },
            sequences: groups * self.batch,
            kv_blocks: 1 << 20,
            forks: Forks::Shared,
            rows: PromptRows::Known,
        };
        let mut list = List {
            left: (self.groups * self.batch) as u64,
            tokens: self.tokens,
            remaining: Vec::new(),
        };
        worker.lead(
            &mut Schedule::new(limits),
            &mut list,
            Duration::from_secs(60),
        )?;
        Ok(began.elapsed().as_secs_f64())
    }
}

fn main() -> Result<()> {
    let mut transport = MpiTransport::start()?;
    let ranks = transport.size();
    let question = Question::of_arguments(ranks)?;
    let one_s = question.seconds(1, &mut transport)?;
    let all_s = question.seconds(question.groups, &mut transport)?;
    if transport.rank() == 0 {
        // One group keeps one rank busy; all of them as many as there are, once the pipeline is full.
        let steps = (question.groups * question.tokens) as f64;
        let busy = question.groups.min(ranks) as f64;
        let limit = busy * steps / (steps + busy - 1.0);
        println!(
            "{{\"ranks\": {ranks}, \"groups\": {}, \"one_group_s\": {one_s:.3}, \"groups_s\": {all_s:.3}, \
             \"ratio\": {:.3}, \"limit\": {limit:.3}}}",
            question.groups,
            one_s / all_s
        );
    }
    Ok(())
}
