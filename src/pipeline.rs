//! The loop. Rank 0 leads: it decides on steps and hands tokens out. Every rank executes steps: receive,
//! compute, send on; the last samples and shares the tokens with all.
//!
//! What is computed is behind [`Compute`], how bytes travel behind [`Transport`], what is asked for
//! behind [`Feed`]: the loop knows only the order of things.

use crate::report::Counters;
use crate::sampler::Sampler;
use crate::schedule::Schedule;
use crate::stage::Output;
use crate::transport::Transport;
use crate::wait::{self, Patience};
use crate::wire::{self, Frame, SampleParams, Sampled, SampledToken, Step};
use anyhow::{Context, Result, bail};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tracing::debug;

/// One rank's part of a step.
pub trait Compute {
    /// Computes the step from the activations that came with it.
    fn run(&mut self, step: &Step, payload: &[u8]) -> Result<Output>;
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
    sampler: Sampler,
}

impl<T: Transport, C: Compute> Worker<T, C> {
    /// A rank ready for its first step.
    pub fn new(transport: T, compute: C) -> Self {
        Self {
            transport,
            compute,
            counters: Counters::default(),
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
        let mut unanswered: VecDeque<Step> = VecDeque::new();
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
                self.execute(&step, &[])?;
                if step.sampled().next().is_some() {
                    unanswered.push_back(step);
                }
                patience.reset();
            }
            match self.transport.try_shared()? {
                Some(bytes) => {
                    let step = unanswered
                        .pop_front()
                        .context("tokens came that no step asked for")?;
                    hand_out(Sampled::decode(&step, &bytes)?, schedule, feed)?;
                    patience.reset();
                }
                None => self.wait_for_answer(&mut patience, unanswered.front(), step_limit)?,
            }
        }
    }

    /// Ranks above 0: executes steps until rank 0 says that there are no more.
    pub fn follow(&mut self) -> Result<()> {
        loop {
            let waiting = Instant::now();
            let bytes = wait::until("the previous rank", None, || {
                while self.transport.try_shared()?.is_some() {}
                self.transport.try_receive()
            })?;
            self.counters.wait += waiting.elapsed();
            match wire::decode(&bytes).context("a frame from the previous rank")? {
                (Frame::Step(step), payload) => self.execute(&step, payload)?,
                (Frame::End, _) => return self.end(),
            }
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
                    self.transport.expect_shared(step.sampled_bytes())?;
                }
            }
            Output::Logits(logits) => {
                let sampled = self.sampler.sample_step(step, &logits);
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

    fn send(&mut self, frame: Vec<u8>) -> Result<()> {
        let started = Instant::now();
        self.counters.sent_bytes += frame.len() as u64;
        self.transport.send_next(frame)?;
        self.counters.wire += started.elapsed();
        Ok(())
    }

    /// Passes the end on and waits until it has left.
    fn end(&mut self) -> Result<()> {
        if self.transport.rank() + 1 < self.transport.size() {
            self.send(wire::encode(&Frame::End))?;
        }
        self.transport.flush()
    }

    fn wait_for_answer(
        &mut self,
        patience: &mut Patience,
        unanswered: Option<&Step>,
        limit: Duration,
    ) -> Result<()> {
        if let Some(step) = unanswered
            && patience.elapsed() > limit
        {
            bail!(
                "step {} has had no answer for {:.0} s: a rank or its connection is stuck (raise \
                 --step-timeout if the machines are that slow)",
                step.number,
                patience.elapsed().as_secs_f64()
            );
        }
        if unanswered.is_none() {
            return Ok(patience.pause()?);
        }
        let waiting = Instant::now();
        patience.pause_for_answer()?;
        self.counters.wait += waiting.elapsed();
        Ok(())
    }
}

/// Gives the tokens of one step to the feed, and its decision to the schedule.
fn hand_out(sampled: Sampled, schedule: &mut Schedule, feed: &mut impl Feed) -> Result<()> {
    for token in sampled.tokens {
        let id = token.token;
        match feed.token(token)? {
            Then::Continue => schedule.continue_with(id),
            Then::Finished => schedule.finish(),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
