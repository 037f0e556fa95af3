//! The loop. Rank 0 leads: it decides on steps and hands tokens out. Every rank executes steps: receive,
//! compute, send on; the last samples and shares the tokens with all. Several steps are on their way at once, and
//! every one is answered, also where it samples nothing: so rank 0 knows how many there are.
//!
//! What is computed is behind [`Compute`], how bytes travel behind [`Transport`], what is asked for
//! behind [`Feed`]: the loop knows only the order of things.

use crate::report::Counters;
use crate::sampler::Sampler;
use crate::schedule::{Prompt, Schedule};
use crate::stage::Output;
use crate::trace::{Part, Recorder};
use crate::transport::{Kind, Transport};
use crate::wait::{self, Patience};
use crate::wire::{self, AnswerShape, Frame, Load, Sampled, SampledToken, Step};
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
    /// The next prompt; returns at once.
    fn next(&mut self) -> Result<Next>;

    /// Takes the next token of a sequence, by its [`Prompt::key`].
    fn token(&mut self, key: u64, token: SampledToken) -> Result<Then>;

    /// Whether somebody wants to see how busy the ranks are.
    fn is_watched(&self) -> bool {
        false
    }

    /// Is shown it, twice a second.
    fn watch(&mut self, _seen: Seen) {}
}

/// What the pipeline is doing.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Sequences that have begun and not ended.
    pub sequences: usize,
    /// Steps on their way.
    pub steps: usize,
    /// Time in which there was something to do, so far.
    pub active: Duration,
    /// What each rank has spent, so far.
    pub loads: Vec<Load>,
}

/// Answer of [`Feed::next`].
pub enum Next {
    /// A sequence to compute.
    Prompt(Prompt),
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
    /// What was done when, where a trace is wanted.
    pub trace: Option<Recorder>,
    rows: Rows,
    sampler: Sampler,
}

/// How often a step brings back how busy the ranks are.
const WATCH_EVERY: Duration = Duration::from_millis(500);

/// What rank 0 has under way.
struct Leading {
    /// Steps whose tokens are not yet back, in order.
    unanswered: VecDeque<Step>,
    /// Whether there will be no more prompts.
    is_done: bool,
    /// Rows asked for: slots and numbers of tokens, in order.
    questions: VecDeque<(u32, usize)>,
    /// By slot, the rows of the tokens to be computed next, where rows come from the last rank.
    rows: HashMap<u32, VecDeque<u8>>,
    watched: Instant,
    patience: Patience,
}

impl<T: Transport, C: Compute> Worker<T, C> {
    /// A rank ready for its first step.
    pub fn new(transport: T, compute: C, rows: Rows) -> Self {
        Self {
            transport,
            compute,
            counters: Counters::default(),
            trace: None,
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
        let mut leading = Leading {
            unanswered: VecDeque::new(),
            is_done: false,
            questions: VecDeque::new(),
            rows: HashMap::new(),
            watched: Instant::now(),
            patience: Patience::new(),
        };
        loop {
            let began = Instant::now();
            let has_admitted = admit(schedule, feed, &mut leading)?;
            let is_idle = schedule.is_idle();
            if leading.is_done && is_idle {
                return self.end();
            }
            let has_rows = self.fetch_rows(schedule, &mut leading)?;
            let has_launched = self.launch(schedule, feed, &mut leading)?;
            let has_answers = self.take_answers(schedule, feed, &mut leading)?;
            match has_admitted || has_rows || has_launched || has_answers {
                true => leading.patience.reset(),
                false => self.pause(schedule, &mut leading, step_limit)?,
            }
            if !is_idle {
                self.counters.active += began.elapsed();
            }
        }
    }

    /// Asks for the rows of prompts that are needed next, and takes those that have come; whether any have.
    fn fetch_rows(&mut self, schedule: &mut Schedule, leading: &mut Leading) -> Result<bool> {
        if self.rows == Rows::Local {
            return Ok(false);
        }
        let last = self.last();
        for (slot, tokens) in schedule.wanted_rows() {
            leading.questions.push_back((slot, tokens.len()));
            let question = wire::encode(&Frame::Lookup(tokens));
            self.counters.sent_bytes += question.len() as u64;
            self.transport.send(last, Kind::Question, question)?;
        }
        let mut has_rows = false;
        while !leading.questions.is_empty()
            && let Some(rows) = self.transport.try_receive(last, Kind::Answer)?
            && let Some((slot, count)) = leading.questions.pop_front()
        {
            if rows.len() != count * self.rows.shared_bytes() {
                bail!(
                    "the rows of {count} tokens came as {} bytes, expected {}",
                    rows.len(),
                    count * self.rows.shared_bytes()
                );
            }
            leading.rows.entry(slot).or_default().extend(rows);
            schedule.rows_came(slot, count);
            has_rows = true;
        }
        Ok(has_rows)
    }

    /// Computes this rank's part of the next step, if there should be one now; whether there was.
    fn launch(
        &mut self,
        schedule: &mut Schedule,
        feed: &impl Feed,
        leading: &mut Leading,
    ) -> Result<bool> {
        let Some(mut step) = schedule.next_step() else {
            return Ok(false);
        };
        if feed.is_watched() && leading.watched.elapsed() > WATCH_EVERY {
            leading.watched = Instant::now();
            step.loads = Some(Vec::new());
        }
        let row_bytes = self.rows.shared_bytes();
        let mut rows = Vec::with_capacity(step.row_count() * row_bytes);
        if row_bytes > 0 {
            for entry in &step.entries {
                let known = leading.rows.entry(entry.slot).or_default();
                rows.extend(known.drain(..entry.tokens.len() * row_bytes));
            }
        }
        leading.unanswered.push_back(step.clone());
        self.execute(step, &rows)?;
        Ok(true)
    }

    /// Hands out the tokens of all steps that are answered; whether there were any.
    fn take_answers(
        &mut self,
        schedule: &mut Schedule,
        feed: &mut impl Feed,
        leading: &mut Leading,
    ) -> Result<bool> {
        let mut has_answers = false;
        while let Some(bytes) = self.transport.try_shared()? {
            let began = Instant::now();
            let step = leading
                .unanswered
                .pop_front()
                .context("tokens came that no step asked for")?;
            let sampled = Sampled::decode(&step, self.answer_shape(), &bytes)?;
            schedule.answered();
            self.hand_out(&step, sampled, leading, schedule, feed)?;
            self.record(Part::HandOut, &step, began);
            has_answers = true;
        }
        Ok(has_answers)
    }

    /// Gives the tokens of one step to the feed, and its decisions to the schedule.
    fn hand_out(
        &self,
        step: &Step,
        sampled: Sampled,
        leading: &mut Leading,
        schedule: &mut Schedule,
        feed: &mut impl Feed,
    ) -> Result<()> {
        let row_bytes = self.rows.shared_bytes();
        for (index, ((entry, _), token)) in step.sampled().zip(sampled.tokens).enumerate() {
            let key = schedule
                .key(entry.slot)
                .context("a token came for no sequence")?;
            let id = token.token;
            match feed.token(key, token)? {
                Then::Continue => {
                    if row_bytes > 0 {
                        let row = &sampled.rows[index * row_bytes..][..row_bytes];
                        leading.rows.entry(entry.slot).or_default().extend(row);
                    }
                    schedule.continue_with(entry.slot, id);
                }
                Then::Finished => {
                    leading.rows.remove(&entry.slot);
                    schedule.finish(entry.slot);
                }
            }
        }
        if step.loads.is_some() {
            feed.watch(Seen {
                sequences: schedule.sequences(),
                steps: schedule.in_flight(),
                active: self.counters.active,
                loads: sampled.loads,
            });
        }
        Ok(())
    }

    /// Lets time pass in which there is nothing to do.
    fn pause(&mut self, schedule: &Schedule, leading: &mut Leading, limit: Duration) -> Result<()> {
        let patience = &mut leading.patience;
        if schedule.is_idle() {
            return Ok(patience.pause()?);
        }
        if patience.elapsed() > limit {
            let what = match leading.unanswered.front() {
                Some(step) => format!("step {}", step.number),
                None => "a question for the rows of a prompt".to_owned(),
            };
            bail!(
                "{what} has had no answer for {:.0} s: a rank or its connection is stuck (raise \
                 --step-timeout if the machines are that slow)",
                patience.elapsed().as_secs_f64()
            );
        }
        let waiting = Instant::now();
        patience.pause_for_answer()?;
        self.counters.wait += waiting.elapsed();
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
                (Frame::Step(step), payload) => self.execute(step, payload)?,
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
    fn execute(&mut self, mut step: Step, payload: &[u8]) -> Result<()> {
        wait::check_signals()?;
        debug!(
            step = step.number,
            entries = step.entries.len(),
            rows = step.row_count(),
            "step"
        );
        let started = Instant::now();
        let compute = &mut self.compute;
        let output = self
            .transport
            .overlap(|| compute.run(&step, payload))
            .with_context(|| format!("computing step {}", step.number))?;
        self.record(Part::Compute, &step, started);
        match output {
            Output::Hidden(rows) => {
                self.counters.busy += started.elapsed();
                self.add_load(&mut step);
                let length = step.sampled_bytes(self.answer_shape());
                let sending = Instant::now();
                let mut frame = wire::encode(&Frame::Step(step.clone()));
                frame.extend(rows);
                self.send(frame)?;
                self.transport.expect_shared(length)?;
                self.record(Part::Send, &step, sending);
            }
            Output::Logits(logits) => {
                let sampling = Instant::now();
                let mut sampled = self.sample(&step, &logits)?;
                self.record(Part::Sample, &step, sampling);
                self.counters.busy += started.elapsed();
                self.add_load(&mut step);
                sampled.loads = step.loads.unwrap_or_default();
                let bytes = sampled.encode();
                self.counters.sent_bytes += bytes.len() as u64;
                self.transport.share(bytes)?;
            }
        }
        Ok(())
    }

    /// Says how busy this rank is, if the step asks.
    fn add_load(&self, step: &mut Step) {
        if let Some(loads) = &mut step.loads {
            loads.push(self.counters.load());
        }
    }

    /// Notes what was done since `began`, if a trace is wanted.
    fn record(&mut self, part: Part, step: &Step, began: Instant) {
        if let Some(trace) = &mut self.trace {
            trace.add(part, step, began);
        }
    }

    /// What all answers have in common.
    fn answer_shape(&self) -> AnswerShape {
        AnswerShape {
            row_bytes: self.rows.shared_bytes(),
            ranks: self.transport.size(),
        }
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
            loads: Vec::new(),
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
}

/// Brings prompts in as long as there is room for them; whether any came.
fn admit(schedule: &mut Schedule, feed: &mut impl Feed, leading: &mut Leading) -> Result<bool> {
    let mut has_admitted = false;
    while !leading.is_done && schedule.has_room() {
        match feed.next()? {
            Next::Prompt(prompt) => schedule.admit(prompt),
            Next::NotYet => break,
            Next::Done => leading.is_done = true,
        }
        has_admitted = true;
    }
    Ok(has_admitted)
}

#[cfg(test)]
mod tests;
