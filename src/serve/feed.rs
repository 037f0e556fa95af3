//! The loop's side of the server: jobs become prompts, tokens become events.

use super::Shared;
use super::answers::{Event, Job, News, Piece};
use super::life::Phase;
use crate::pipeline::{Feed, Next, Seen, Then};
use crate::plan::RequestTimes;
use crate::report::{Measured, RequestMeasured};
use crate::request::{FinishReason, Tally};
use crate::schedule::Prompt;
use crate::sequence::Sequence;
use crate::wait::{self, Rest};
use crate::wire::SampledToken;
use anyhow::{Context, Result};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tracing::info;

/// Requests from HTTP, answers back to it.
pub struct HttpFeed {
    jobs: Receiver<Job>,
    /// Jobs that have come, oldest first; no more than there are places.
    arrived: VecDeque<Job>,
    under_way: HashMap<u64, UnderWay>,
    shared: Arc<Shared>,
    measured: Measured,
    tally: Tally,
    /// When answers under way are given up, once draining has begun.
    give_up: Option<Instant>,
}

/// A sequence that is being computed.
struct UnderWay {
    sequence: Sequence<'static>,
    choice: usize,
    is_streamed: bool,
    events: mpsc::Sender<Event>,
    /// Bytes of the text that have been told.
    told_bytes: usize,
    asked: Instant,
    admitted: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    _place: OwnedSemaphorePermit,
}

impl HttpFeed {
    pub(super) fn new(jobs: Receiver<Job>, shared: Arc<Shared>) -> Self {
        Self {
            jobs,
            arrived: VecDeque::new(),
            under_way: HashMap::new(),
            shared,
            measured: Measured::default(),
            tally: Tally::default(),
            give_up: None,
        }
    }

    /// What was answered and measured.
    pub fn finish(self) -> (Tally, Measured) {
        (self.tally, self.measured)
    }

    fn admit(&mut self, job: Job) -> Prompt {
        let now = Instant::now();
        let admitted = job.admitted;
        let max_tokens = admitted.sequence.remaining_tokens();
        info!(
            key = job.key,
            prompt_tokens = admitted.prompt.len(),
            max_tokens,
            "prompt"
        );
        let under_way = UnderWay {
            sequence: admitted.sequence,
            choice: job.choice,
            is_streamed: job.is_streamed,
            events: job.events,
            told_bytes: 0,
            asked: job.asked,
            admitted: now,
            first_token: None,
            last_token: now,
            _place: job.place,
        };
        self.under_way.insert(job.key, under_way);
        self.measured.admitted(self.under_way.len());
        Prompt {
            key: job.key,
            tokens: admitted.prompt,
            max_tokens,
            params: admitted.params,
        }
    }

    fn complete(&mut self, done: UnderWay, reason: FinishReason) {
        let first_token = done.first_token.unwrap_or(done.last_token);
        let sequence = done.sequence;
        self.measured.add(RequestMeasured {
            prompt_tokens: sequence.prompt_tokens(),
            sampled_tokens: sequence.sampled_tokens(),
            times: RequestTimes {
                first_token_s: (first_token - done.admitted).as_secs_f64(),
                decode_s: (done.last_token - first_token).as_secs_f64(),
            },
        });
        let news = match sequence.finish(reason) {
            Ok(answer) => {
                self.tally.answered += 1;
                News::Finished(Box::new(answer))
            }
            Err(error) => {
                self.tally.failed += 1;
                News::Failed(format!("the answer could not be decoded: {error}"))
            }
        };
        tell(&done.events, done.choice, news);
    }

    /// Gives up a sequence, and says why.
    fn give_up(&mut self, key: u64, why: &str) {
        if let Some(lost) = self.under_way.remove(&key) {
            self.tally.failed += 1;
            tell(&lost.events, lost.choice, News::Failed(why.to_owned()));
        }
    }
}

/// There is room for every event of a job; that nobody listens any more is no failure of the loop.
fn tell(events: &mpsc::Sender<Event>, choice: usize, news: News) {
    let _ = events.try_send(Event { choice, news });
}

impl Rest for HttpFeed {
    fn rest(&mut self, pause: Duration) -> bool {
        self.shared.status.rest();
        // Without senders there would be no waiting; one of them lives in the shared state.
        let arrived = self.jobs.recv_timeout(pause).ok();
        let has_arrived = arrived.is_some();
        self.arrived.extend(arrived);
        has_arrived
    }
}

impl Feed for HttpFeed {
    fn next(&mut self) -> Result<Next> {
        self.arrived.extend(self.jobs.try_iter());
        if let Some(job) = self.arrived.pop_front() {
            return Ok(Next::Prompt(self.admit(job)));
        }
        let is_over = self.give_up.is_some() && self.under_way.is_empty();
        Ok(match is_over {
            true => Next::Done,
            false => Next::NotYet,
        })
    }

    fn token(&mut self, key: u64, token: SampledToken) -> Result<Then> {
        let under_way = self.under_way.get_mut(&key);
        let under_way = under_way.context("a token came for no request")?;
        let now = Instant::now();
        let metrics = &self.shared.metrics;
        match under_way.first_token {
            None => {
                under_way.first_token = Some(now);
                metrics.first_token(now - under_way.asked, under_way.sequence.prompt_tokens());
            }
            Some(_) => metrics.next_token(now - under_way.last_token),
        }
        under_way.last_token = now;
        self.shared.status.token();
        let sequence = &mut under_way.sequence;
        let end = sequence.accept(&token);
        if let Ok(None) = end {
            if under_way.is_streamed {
                let text = &sequence.text()[under_way.told_bytes..];
                let piece = Piece {
                    text: text.to_owned(),
                    token_ids: vec![token.token],
                    logprobs: sequence.last_logprob().cloned().into_iter().collect(),
                };
                under_way.told_bytes = sequence.text().len();
                tell(&under_way.events, under_way.choice, News::Piece(piece));
            }
            return Ok(Then::Continue);
        }
        match (end, self.under_way.remove(&key)) {
            (Ok(Some(reason)), Some(done)) => self.complete(done, reason),
            (Err(error), Some(lost)) => {
                self.tally.failed += 1;
                let why = format!("the answer could not be decoded: {error}");
                tell(&lost.events, lost.choice, News::Failed(why));
            }
            _ => {}
        }
        Ok(Then::Finished)
    }

    fn next_cancelled(&mut self) -> Option<u64> {
        while let Some(key) = self.shared.cancelled.pop() {
            if self.under_way.remove(&key).is_some() {
                return Some(key);
            }
            // It waits, or has ended.
            self.arrived.extend(self.jobs.try_iter());
            self.arrived.retain(|job| job.key != key);
        }
        if !wait::is_draining() {
            return None;
        }
        self.shared.life.drain();
        let drain = Duration::from_secs(self.shared.options.drain_s);
        let give_up = *self.give_up.get_or_insert_with(|| Instant::now() + drain);
        if Instant::now() < give_up {
            return None;
        }
        let key = *self.under_way.keys().next()?;
        self.give_up(
            key,
            "the server ends and the time to finish answers (--drain-s) is over",
        );
        Some(key)
    }

    fn runs(&mut self, sequences: usize, prompt_tokens: u64) {
        self.shared.status.run(sequences, prompt_tokens);
    }

    fn is_watched(&self) -> bool {
        self.shared.life.phase() != Phase::Loading
    }

    fn watch(&mut self, seen: Seen) {
        self.shared.status.watch(seen);
    }
}
