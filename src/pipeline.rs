//! The loop. Rank 0 leads: it decides on steps and hands tokens out. Every rank executes steps: receive,
//! compute, send on; the last samples and shares the tokens with all.
//!
//! What is computed is behind [`Compute`], how bytes travel behind [`Transport`], what is asked for
//! behind [`Feed`]: the loop knows only the order of things.

use crate::report::Counters;
use crate::sampler::Sampler;
use crate::schedule::Schedule;
use crate::stage::Output;
use crate::transport::{Kind, Transport};
use crate::wait::{self, Patience};
use crate::wire::{self, Entry, Frame, SampleParams, Sampled, SampledToken, Step};
use anyhow::{Context, Result, bail};
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};
use tracing::debug;

/// The rank that leads.
const FIRST: usize = 0;

/// One rank's part of a step.
pub trait Compute {
    /// Computes the step from the activations that came with it.
    fn run(&mut self, step: &Step, payload: &[u8]) -> Result<Output>;

    /// The embeddings of tokens, one row a token as [`Self::run`] of the first rank takes them; asked of
    /// the last rank, where it holds the table.
    fn embed(&mut self, tokens: &[u32]) -> Result<Vec<u8>>;
}

/// How tokens become rows for the first rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// It looks them up itself.
    Local,
    /// The last rank looks them up: those of a prompt when asked, that of a sampled token unasked.
    FromLast {
        /// Bytes of one row.
        row_bytes: usize,
    },
}

impl Rows {
    /// Bytes of the row that travels with each sampled token.
    fn shared_bytes(self) -> usize {
        match self {
            Self::Local => 0,
            Self::FromLast { row_bytes } => row_bytes,
        }
    }
}

/// What rank 0 is asked to generate, and where the tokens go.
pub trait Feed {
    /// The next sequence.
    fn next(&mut self) -> Result<Next>;

    /// Takes the next token of the sequence in flight.
    fn token(&mut self, token: SampledToken) -> Result<Then>;
}

/// Answer of [`Feed::next`].
pub enum Next {
    /// Token ids of a prompt, and how to sample.
    Prompt(Vec<u32>, SampleParams),
    /// Nothing now, but there may be more.
    NotYet,
    /// There will be no more.
    Done,
}

/// Answer of [`Feed::token`].
pub enum Then {
    /// The sequence goes on.
    Continue,
    /// The sequence is complete.
    Finished,
}

/// One rank at work.
pub struct Worker<T, C> {
    /// Connection to the other ranks.
    pub transport: T,
    /// This rank's slice of the model.
    pub compute: C,
    /// Time and bytes spent.
    pub counters: Counters,
    rows: Rows,
    sampler: Sampler,
}

/// A step of rank 0 that waits for its rows, or for the steps before it.
struct Launch {
    step: Step,
    /// `None` while they are on their way.
    rows: Option<Vec<u8>>,
}

/// What rank 0 has under way.
#[derive(Default)]
struct Leading {
    /// Steps not yet computed here, in order.
    launches: VecDeque<Launch>,
    /// Steps whose tokens are not yet back, in order.
    unanswered: VecDeque<Step>,
    /// By slot, the row of the token sampled last, where rows come from the last rank.
    known_rows: HashMap<u32, Vec<u8>>,
}

impl<T: Transport, C: Compute> Worker<T, C> {
    /// A rank ready for its first step.
    pub fn new(transport: T, compute: C, rows: Rows) -> Self {
        Self {
            transport,
            compute,
            counters: Counters::default(),
            rows,
            sampler: Sampler::default(),
        }
    }

    /// Rank 0: generates all that the feed asks for. An answer that stays out for longer than
    /// `step_limit` is an error: some rank is stuck.
    pub fn lead(
        &mut self,
        schedule: &mut Schedule,
        feed: &mut impl Feed,
        step_limit: Duration,
    ) -> Result<()> {
        let mut leading = Leading::default();
        let mut patience = Patience::new();
        loop {
            if schedule.has_room() {
                match feed.next()? {
                    Next::Prompt(tokens, params) => schedule.admit(tokens, params),
                    Next::NotYet => {}
                    Next::Done => return self.end(),
                }
            }
            while let Some(step) = schedule.next_step() {
                self.prepare(step, &mut leading)?;
            }
            let has_launched = self.launch(&mut leading)?;
            match self.transport.try_shared()? {
                Some(bytes) => self.hand_out(&bytes, &mut leading, schedule, feed)?,
                None if has_launched => {}
                None => {
                    self.wait_for_answer(&mut patience, &leading, step_limit)?;
                    continue;
                }
            }
            patience.reset();
        }
    }

    /// Puts a step in line, and asks for its rows unless they are known or looked up here.
    fn prepare(&mut self, step: Step, leading: &mut Leading) -> Result<()> {
        let known = |entry: &Entry| match entry.tokens.len() {
            1 => leading.known_rows.remove(&entry.slot),
            _ => None,
        };
        let rows = match self.rows {
            Rows::Local => Some(Vec::new()),
            Rows::FromLast { .. } => step
                .entries
                .iter()
                .map(known)
                .collect::<Option<Vec<_>>>()
                .map(|rows| rows.concat()),
        };
        if rows.is_none() {
            let question = wire::encode(&Frame::Lookup(step.tokens()));
            self.counters.sent_bytes += question.len() as u64;
            self.transport.send(self.last(), Kind::Question, question)?;
        }
        leading.launches.push_back(Launch { step, rows });
        Ok(())
    }

    /// Computes this rank's part of every step in line whose rows are there; whether there was any.
    fn launch(&mut self, leading: &mut Leading) -> Result<bool> {
        let last = self.last();
        let mut has_launched = false;
        while let Some(next) = leading.launches.front_mut() {
            if next.rows.is_none() {
                next.rows = self.transport.try_receive(last, Kind::Answer)?;
            }
            let Some(rows) = next.rows.take() else {
                break;
            };
            let Some(Launch { step, .. }) = leading.launches.pop_front() else {
                break;
            };
            self.execute(&step, &rows)?;
            if step.sampled().next().is_some() {
                leading.unanswered.push_back(step);
            }
            has_launched = true;
        }
        Ok(has_launched)
    }

    /// Gives the tokens of one step to the feed, and its decision to the schedule.
    fn hand_out(
        &mut self,
        bytes: &[u8],
        leading: &mut Leading,
        schedule: &mut Schedule,
        feed: &mut impl Feed,
    ) -> Result<()> {
        let step = leading
            .unanswered
            .pop_front()
            .context("tokens came that no step asked for")?;
        let row_bytes = self.rows.shared_bytes();
        let sampled = Sampled::decode(&step, row_bytes, bytes)?;
        for (index, ((entry, _), token)) in step.sampled().zip(sampled.tokens).enumerate() {
            let id = token.token;
            match feed.token(token)? {
                Then::Continue => {
                    let row = &sampled.rows[index * row_bytes..][..row_bytes];
                    if row_bytes > 0 {
                        leading.known_rows.insert(entry.slot, row.to_vec());
                    }
                    schedule.continue_with(id);
                }
                Then::Finished => schedule.finish(),
            }
        }
        Ok(())
    }

    /// Ranks above 0: executes steps until rank 0 says that there are no more.
    pub fn follow(&mut self) -> Result<()> {
        let previous = self.transport.rank() - 1;
        loop {
            let waiting = Instant::now();
            let bytes = wait::until("the previous rank", None, || {
                while self.transport.try_shared()?.is_some() {}
                self.answer_question()?;
                self.transport.try_receive(previous, Kind::Frame)
            })?;
            self.counters.wait += waiting.elapsed();
            match wire::decode(&bytes).context("a frame from the previous rank")? {
                (Frame::Step(step), payload) => self.execute(&step, payload)?,
                (Frame::End, _) => return self.end(),
                (Frame::Lookup(_), _) => bail!("a lookup came down the pipeline"),
            }
        }
    }

    /// On the last rank, if it holds the embedding table: looks up what the first asks for.
    fn answer_question(&mut self) -> Result<()> {
        if self.rows == Rows::Local || self.transport.rank() != self.last() {
            return Ok(());
        }
        let Some(question) = self.transport.try_receive(FIRST, Kind::Question)? else {
            return Ok(());
        };
        match wire::decode(&question).context("a question of the first rank")? {
            (Frame::Lookup(tokens), _) => {
                let rows = self.compute.embed(&tokens)?;
                self.counters.sent_bytes += rows.len() as u64;
                self.transport.send(FIRST, Kind::Answer, rows)
            }
            (other, _) => bail!("the first rank asked for {other:?}, expected a lookup"),
        }
    }

    /// This rank's part of a step, and the message that follows from it.
    fn execute(&mut self, step: &Step, payload: &[u8]) -> Result<()> {
        wait::check_signals()?;
        debug!(step = step.number, rows = step.row_count(), "step");
        let started = Instant::now();
        let output = self
            .compute
            .run(step, payload)
            .with_context(|| format!("computing step {}", step.number))?;
        let asks_for_tokens = step.sampled().next().is_some();
        match output {
            Output::Hidden(rows) => {
                self.counters.busy += started.elapsed();
                let mut frame = wire::encode(&Frame::Step(step.clone()));
                frame.extend(rows);
                self.send(frame)?;
                if asks_for_tokens {
                    let length = step.sampled_bytes(self.rows.shared_bytes());
                    self.transport.expect_shared(length)?;
                }
            }
            Output::Logits(logits) => {
                let sampled = self.sample(step, &logits)?;
                self.counters.busy += started.elapsed();
                if asks_for_tokens {
                    let bytes = sampled.encode();
                    self.counters.sent_bytes += bytes.len() as u64;
                    self.transport.share(bytes)?;
                }
            }
        }
        Ok(())
    }

    /// The tokens that answer a step, with their rows where the first rank will need them.
    fn sample(&mut self, step: &Step, logits: &[Vec<f32>]) -> Result<Sampled> {
        let tokens = self.sampler.sample_step(step, logits);
        let ids: Vec<u32> = tokens.iter().map(|token| token.token).collect();
        let rows = match self.rows {
            Rows::FromLast { .. } if !ids.is_empty() => self.compute.embed(&ids)?,
            _ => Vec::new(),
        };
        Ok(Sampled {
            step: step.number,
            tokens,
            rows,
        })
    }

    fn send(&mut self, frame: Vec<u8>) -> Result<()> {
        let started = Instant::now();
        self.counters.sent_bytes += frame.len() as u64;
        let next = self.transport.rank() + 1;
        self.transport.send(next, Kind::Frame, frame)?;
        self.counters.wire += started.elapsed();
        Ok(())
    }

    /// The rank that samples.
    fn last(&self) -> usize {
        self.transport.size() - 1
    }

    /// Passes the end on and waits until it has left.
    fn end(&mut self) -> Result<()> {
        if self.transport.rank() < self.last() {
            self.send(wire::encode(&Frame::End))?;
        }
        self.transport.flush()
    }

    fn wait_for_answer(
        &mut self,
        patience: &mut Patience,
        leading: &Leading,
        limit: Duration,
    ) -> Result<()> {
        let launch = leading.launches.front().map(|launch| &launch.step);
        let Some(step) = leading.unanswered.front().or(launch) else {
            return Ok(patience.pause()?);
        };
        if patience.elapsed() > limit {
            bail!(
                "step {} has had no answer for {:.0} s: a rank or its connection is stuck (raise \
                 --step-timeout if the machines are that slow)",
                step.number,
                patience.elapsed().as_secs_f64()
            );
        }
        let waiting = Instant::now();
        patience.pause_for_answer()?;
        self.counters.wait += waiting.elapsed();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
