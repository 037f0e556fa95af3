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
use crate::wait::{self, Patience, Rest};
use crate::wire::{self, Frame, Load, Sampled, SampledToken, Step};
use anyhow::{Context, Result, bail, ensure};
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
    /// The last rank looks them up: those of a prompt when asked, that of a sampled token unasked. They go to the
    /// first rank only.
    FromLast {
        /// Bytes of one row.
        row_bytes: usize,
    },
}

impl Rows {
    /// Bytes of a row where it comes from the last rank, else 0.
    fn row_bytes(self) -> usize {
        match self {
            Self::Local => 0,
            Self::FromLast { row_bytes } => row_bytes,
        }
    }
}

/// What rank 0 is asked to generate, and where the tokens go.
pub trait Feed: Rest {
    /// The next prompt; returns at once.
    fn next(&mut self) -> Result<Next>;

    /// Takes the next token of a sequence, by its [`Prompt::key`].
    fn token(&mut self, key: u64, token: SampledToken) -> Result<Then>;

    /// The key of a sequence that nobody waits for any more; of each once. No token of it is told after that.
    fn next_cancelled(&mut self) -> Option<u64> {
        None
    }

    /// Is told with every step how many sequences have begun and not ended, and how many tokens of prompts went into
    /// steps so far.
    fn runs(&mut self, _sequences: usize, _prompt_tokens: u64) {}

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
    /// Tokens that the caches of these have room for.
    pub kv_tokens: usize,
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

/// What rank 0 leads with, and what it has under way.
struct Leading<'a, F> {
    schedule: &'a mut Schedule,
    feed: &'a mut F,
    /// Steps whose tokens are not yet back, in order.
    unanswered: VecDeque<Step>,
    /// The tokens of the first of them, if they have come before their rows.
    tokens: Option<Vec<u8>>,
    /// Whether there will be no more prompts.
    is_done: bool,
    /// Rows asked for: slots and numbers of tokens, in order.
    questions: VecDeque<(u32, usize)>,
    /// By slot, the rows of the tokens to be computed next, where rows come from the last rank.
    rows: HashMap<u32, Vec<u8>>,
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
            schedule,
            feed,
            unanswered: VecDeque::new(),
            tokens: None,
            is_done: false,
            questions: VecDeque::new(),
            rows: HashMap::new(),
            watched: Instant::now(),
            patience: Patience::new(),
        };
        loop {
            let began = Instant::now();
            let was_idle = leading.is_idle();
            leading.cancel();
            let has_admitted = leading.admit()?;
            let is_idle = leading.is_idle();
            if was_idle && !is_idle {
                self.wake_others()?;
            }
            if leading.is_done && is_idle {
                return self.end();
            }
            let has_rows = self.fetch_rows(&mut leading)?;
            let has_launched = self.launch(&mut leading)?;
            let has_answers = self.take_answers(&mut leading)?;
            match has_admitted || has_rows || has_launched || has_answers {
                true => leading.patience.reset(),
                false => self.pause(&mut leading, step_limit)?,
            }
            if !is_idle {
                self.counters.active += began.elapsed();
            }
        }
    }

    /// Tells the other ranks that steps come soon. They look often while the first step is still being computed by those
    /// before them; a pause of each would else add to the time of the first token.
    fn wake_others(&mut self) -> Result<()> {
        for rank in 1..self.transport.size() {
            self.transport
                .send(rank, Kind::Question, wire::encode(&Frame::Wake))?;
        }
        Ok(())
    }

    /// Asks for the rows of prompts that are needed next, and takes those that have come; whether any have.
    fn fetch_rows<F: Feed>(&mut self, leading: &mut Leading<F>) -> Result<bool> {
        if self.rows == Rows::Local {
            return Ok(false);
        }
        let last = self.last();
        for (slot, tokens) in leading.schedule.wanted_rows() {
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
            if rows.len() != count * self.rows.row_bytes() {
                bail!(
                    "the rows of {count} tokens came as {} bytes, expected {}",
                    rows.len(),
                    count * self.rows.row_bytes()
                );
            }
            // Those of a sequence that was cancelled meanwhile are of no use.
            if leading.schedule.key(slot).is_some() {
                leading.rows.entry(slot).or_default().extend(rows);
                leading.schedule.rows_came(slot, count);
            }
            has_rows = true;
        }
        Ok(has_rows)
    }

    /// Computes this rank's part of the next step, if there should be one now; whether there was.
    fn launch<F: Feed>(&mut self, leading: &mut Leading<F>) -> Result<bool> {
        let Some(mut step) = leading.schedule.next_step() else {
            return Ok(false);
        };
        let sequences = leading.schedule.sequences();
        self.counters.most_sequences = sequences.max(self.counters.most_sequences);
        leading
            .feed
            .runs(sequences, leading.schedule.prompt_tokens());
        if leading.feed.is_watched() && leading.watched.elapsed() > WATCH_EVERY {
            leading.watched = Instant::now();
            step.loads = Some(Vec::new());
        }
        let row_bytes = self.rows.row_bytes();
        let mut rows = Vec::with_capacity(step.row_count() * row_bytes);
        if row_bytes > 0 {
            for entry in &step.entries {
                let known = leading.rows.entry(entry.slot).or_default();
                let count = entry.tokens.len() * row_bytes;
                rows.extend_from_slice(&known[..count]);
                known.drain(..count);
            }
        }
        leading.unanswered.push_back(step.clone());
        self.execute(step, &rows)?;
        Ok(true)
    }

    /// Hands out the tokens of all steps that are answered; whether there were any.
    fn take_answers<F: Feed>(&mut self, leading: &mut Leading<F>) -> Result<bool> {
        let mut has_answers = false;
        loop {
            if leading.tokens.is_none() {
                leading.tokens = self.transport.try_shared()?;
            }
            let Some(bytes) = leading.tokens.take() else {
                return Ok(has_answers);
            };
            let step = leading.unanswered.pop_front();
            let step = step.context("tokens came that no step asked for")?;
            let Some(rows) = self.rows_of_answer(&step)? else {
                leading.unanswered.push_front(step);
                leading.tokens = Some(bytes);
                return Ok(has_answers);
            };
            let began = Instant::now();
            let sampled = Sampled::decode(&step, self.transport.size(), &bytes)?;
            leading.schedule.answered();
            leading.hand_out(
                &step,
                sampled.tokens,
                rows.chunks_exact(self.rows.row_bytes().max(1)),
            )?;
            if step.loads.is_some() {
                leading.show(self.counters.active, sampled.loads);
            }
            self.record(Part::HandOut, &step, began);
            has_answers = true;
        }
    }

    /// The embeddings of the tokens that answer a step, where they come from the last rank; `None` while they are
    /// on their way.
    fn rows_of_answer(&mut self, step: &Step) -> Result<Option<Vec<u8>>> {
        let expected = step.sampled().count() * self.rows.row_bytes();
        if expected == 0 {
            return Ok(Some(Vec::new()));
        }
        let rows = self.transport.try_receive(self.last(), Kind::Rows)?;
        if let Some(rows) = &rows
            && rows.len() != expected
        {
            bail!(
                "the rows of step {} came as {} bytes, expected {expected}",
                step.number,
                rows.len()
            );
        }
        Ok(rows)
    }

    /// Lets time pass in which there is nothing to do.
    fn pause<F: Feed>(&mut self, leading: &mut Leading<F>, limit: Duration) -> Result<()> {
        if leading.is_idle() {
            return Ok(leading.patience.pause(leading.feed)?);
        }
        let patience = &mut leading.patience;
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
        patience.pause_for_answer(&mut self.transport)?;
        self.counters.wait += waiting.elapsed();
        Ok(())
    }

    /// Ranks above 0: executes steps until rank 0 says that there are no more.
    pub fn follow(&mut self) -> Result<()> {
        let previous = self.transport.rank() - 1;
        loop {
            let waiting = Instant::now();
            let mut patience = Patience::new();
            let bytes = loop {
                while self.transport.try_shared()?.is_some() {}
                while self.answer_question()? {
                    patience.reset();
                }
                match self.transport.try_receive(previous, Kind::Frame)? {
                    Some(bytes) => break bytes,
                    None => patience.pause(&mut self.transport)?,
                }
            };
            self.counters.wait += waiting.elapsed();
            match wire::decode(&bytes).context("a frame from the previous rank")? {
                (Frame::Step(step), payload) => self.execute(step, payload)?,
                (Frame::End, _) => return self.end(),
                (other, _) => bail!("{other:?} came down the pipeline, expected a step"),
            }
        }
    }

    /// Answers what the first rank has asked out of turn; whether it has.
    fn answer_question(&mut self) -> Result<bool> {
        let Some(question) = self.transport.try_receive(FIRST, Kind::Question)? else {
            return Ok(false);
        };
        match wire::decode(&question).context("a question of the first rank")? {
            (Frame::Wake, _) => Ok(true),
            (Frame::Lookup(tokens), _) => {
                ensure!(
                    self.rows != Rows::Local && self.transport.rank() == self.last(),
                    "the first rank asked for rows of a rank that has none"
                );
                let rows = self.compute.embed(&tokens)?;
                self.counters.sent_bytes += rows.len() as u64;
                self.transport.send(FIRST, Kind::Answer, rows)?;
                Ok(true)
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
        // A single row that is alone on its way meets no other message.
        let output = match step.in_flight > 1 || step.row_count() > 1 {
            true => self.transport.overlap(|| compute.run(&step, payload)),
            false => compute.run(&step, payload),
        };
        let output = output.with_context(|| format!("computing step {}", step.number))?;
        self.record(Part::Compute, &step, started);
        match output {
            Output::Hidden(rows) => {
                self.counters.busy += started.elapsed();
                self.add_load(&mut step)?;
                let length = step.sampled_bytes(self.transport.size());
                let sending = Instant::now();
                let mut frame = wire::encode(&Frame::Step(step.clone()));
                frame.extend(rows);
                self.send(frame)?;
                self.transport.expect_shared(length)?;
                self.record(Part::Send, &step, sending);
            }
            Output::Scores(scores) => {
                let sampling = Instant::now();
                let tokens = self.sampler.sample_step(&step, &scores);
                let rows = self.look_up(&tokens)?;
                self.record(Part::Sample, &step, sampling);
                self.counters.busy += started.elapsed();
                self.add_load(&mut step)?;
                self.answer(step, tokens, rows)?;
            }
        }
        Ok(())
    }

    /// Says how busy this rank is, if the step asks.
    fn add_load(&self, step: &mut Step) -> Result<()> {
        if let Some(loads) = &mut step.loads {
            ensure!(
                loads.len() == self.transport.rank(),
                "step {} came with the loads of {} ranks, expected {}",
                step.number,
                loads.len(),
                self.transport.rank()
            );
            loads.push(self.counters.load());
        }
        Ok(())
    }

    /// Notes what was done since `began`, if a trace is wanted.
    fn record(&mut self, part: Part, step: &Step, began: Instant) {
        if let Some(trace) = &mut self.trace {
            trace.add(part, step, began);
        }
    }

    /// The embeddings of tokens that were sampled, where the first rank will need them.
    fn look_up(&mut self, tokens: &[SampledToken]) -> Result<Vec<u8>> {
        if self.rows == Rows::Local || tokens.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<u32> = tokens.iter().map(|token| token.token).collect();
        self.compute.embed(&ids)
    }

    /// Shares the tokens of a step with all ranks, and sends the first one their rows.
    fn answer(&mut self, step: Step, tokens: Vec<SampledToken>, rows: Vec<u8>) -> Result<()> {
        let sampled = Sampled {
            step: step.number,
            tokens,
            loads: step.loads.unwrap_or_default(),
        };
        let bytes = sampled.encode();
        self.counters.sent_bytes += (bytes.len() + rows.len()) as u64;
        self.transport.share(bytes)?;
        if !rows.is_empty() {
            self.transport.send(FIRST, Kind::Rows, rows)?;
        }
        Ok(())
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

impl<F: Feed> Leading<'_, F> {
    /// Whether nothing waits, nothing is under way and nothing is to come back.
    fn is_idle(&self) -> bool {
        self.schedule.is_idle() && self.unanswered.is_empty() && self.questions.is_empty()
    }

    /// Gives up the sequences that nobody waits for any more.
    fn cancel(&mut self) {
        while let Some(key) = self.feed.next_cancelled() {
            if let Some(slot) = self.schedule.cancel(key) {
                self.rows.remove(&slot);
            }
        }
    }

    /// Brings prompts in as long as there is room for them; whether any came.
    fn admit(&mut self) -> Result<bool> {
        let mut has_admitted = false;
        while !self.is_done && self.schedule.has_room() {
            match self.feed.next()? {
                Next::Prompt(prompt) => self.schedule.admit(prompt),
                Next::NotYet => break,
                Next::Done => self.is_done = true,
            }
            has_admitted = true;
        }
        Ok(has_admitted)
    }

    /// Gives the tokens of one step to the feed, and its decisions to the schedule. `rows`: of each token, or none.
    fn hand_out<'r>(
        &mut self,
        step: &Step,
        tokens: Vec<SampledToken>,
        mut rows: impl Iterator<Item = &'r [u8]>,
    ) -> Result<()> {
        for ((entry, _), token) in step.sampled().zip(tokens) {
            let slot = entry.slot;
            let (id, row) = (token.token, rows.next());
            if self.schedule.is_unwanted(slot) {
                continue;
            }
            let key = self.schedule.key(slot);
            let key = key.context("a token came for no sequence")?;
            match self.feed.token(key, token)? {
                Then::Continue => {
                    if let Some(row) = row {
                        self.rows.entry(slot).or_default().extend_from_slice(row);
                    }
                    self.schedule.continue_with(slot, id);
                }
                Then::Finished => {
                    self.rows.remove(&slot);
                    self.schedule.finish(slot);
                }
            }
        }
        Ok(())
    }

    /// Shows what the pipeline is doing.
    fn show(&mut self, active: Duration, loads: Vec<Load>) {
        self.feed.watch(Seen {
            sequences: self.schedule.sequences(),
            kv_tokens: self.schedule.kv_tokens(),
            active,
            loads,
        });
    }
}

#[cfg(test)]
mod tests;
