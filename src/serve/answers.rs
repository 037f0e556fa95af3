//! What passes between HTTP and the loop: jobs one way, events the other, and the news that nobody waits any more.

use super::Shared;
use super::metrics::Outcome;
use crate::request::{Answer, TokenLogprob};
use crate::sequence::Admitted;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// One sequence to be computed for a request.
pub struct Job {
    /// Its name in the schedule.
    pub key: u64,
    /// Which of the request's choices it is.
    pub choice: usize,
    /// Ready to be scheduled.
    pub admitted: Admitted<'static>,
    /// Whether its pieces are wanted, or only the whole.
    pub is_streamed: bool,
    /// Where its events go. There is room for all that may come, so that the loop never waits for a client.
    pub events: mpsc::Sender<Event>,
    /// When it was asked for.
    pub asked: Instant,
    /// Its place among those under way or waiting.
    pub place: OwnedSemaphorePermit,
}

/// What the loop says of a job.
#[derive(Debug)]
pub struct Event {
    /// The job's choice.
    pub choice: usize,
    /// What happened.
    pub news: News,
}

/// What happened to a job.
#[derive(Debug)]
pub enum News {
    /// One more token.
    Piece(Piece),
    /// The whole answer.
    Finished(Box<Answer>),
    /// There will be none, for this reason.
    Failed(String),
}

/// What one token adds to an answer.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Piece {
    /// Text that is certain now; may be empty.
    pub text: String,
    /// The tokens.
    pub token_ids: Vec<u32>,
    /// One a token, where asked for.
    pub logprobs: Vec<TokenLogprob>,
}

impl Piece {
    /// Adds what follows.
    pub fn extend(&mut self, next: Piece) {
        self.text.push_str(&next.text);
        self.token_ids.extend(next.token_ids);
        self.logprobs.extend(next.logprobs);
    }

    /// Whether it adds nothing that a client sees.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.logprobs.is_empty() && self.token_ids.is_empty()
    }
}

/// Events that a job with room for so many tokens may have.
pub fn most_events(tokens: usize) -> usize {
    tokens + 2
}

/// Keys of sequences that nobody waits for any more.
#[derive(Default)]
pub struct Cancelled {
    keys: Mutex<Vec<u64>>,
    /// Whether there may be any, to be asked without a lock.
    has_any: AtomicBool,
}

impl Cancelled {
    /// Nobody waits for these any more.
    pub fn push(&self, keys: &[u64]) {
        let mut all = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend(keys);
        self.has_any.store(true, Ordering::Release);
    }

    /// Takes one.
    pub fn pop(&self) -> Option<u64> {
        if !self.has_any.load(Ordering::Acquire) {
            return None;
        }
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let key = keys.pop();
        self.has_any.store(!keys.is_empty(), Ordering::Release);
        key
    }
}

/// Somebody waits for these sequences; when it is dropped, nobody does any more.
pub struct Waiting {
    keys: Vec<u64>,
    /// How it ended, if that is not counted elsewhere.
    outcome: Option<Outcome>,
    shared: Arc<Shared>,
}

impl Waiting {
    /// Nobody waits for anything yet.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self {
            keys: Vec::new(),
            outcome: None,
            shared,
        }
    }

    /// One more sequence.
    pub fn add(&mut self, key: u64) {
        self.keys.push(key);
    }

    /// All of them are under way. Until they end, the client may go away.
    pub fn begin(&mut self) {
        self.outcome = Some(Outcome::Cancelled);
    }

    /// It has ended so; with `None`, in an error that is counted where it is answered.
    pub fn end(&mut self, outcome: Option<Outcome>) {
        self.outcome = outcome;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(outcome) = self.outcome {
            self.shared.metrics.outcome(outcome);
        }
        if self.outcome != Some(Outcome::Answered) {
            self.shared.cancelled.push(&self.keys);
        }
    }
}
