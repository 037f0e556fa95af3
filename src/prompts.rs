//! Standard input and output as a [`Feed`]: requests are read on a thread of their own, so that the loop
//! can watch for signals meanwhile, and never further ahead than a bounded channel holds.

use crate::pipeline::{Feed, Next, Seen, Then};
use crate::plan::RequestTimes;
use crate::progress::Progress;
use crate::report::{Measured, RequestMeasured};
use crate::request::{
    AnswerWriter, FinishReason, LineError, ReadError, Rejection, RejectionCode, Request,
    RequestReader, Sampling, Written,
};
use crate::schedule::Prompt;
use crate::sequence::{Admitted, Rules, Sequence};
use crate::wait::Rest;
use crate::wire::SampledToken;
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::io::{self, BufRead, Write};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::Instant;
use tracing::info;

/// Requests read ahead of those being answered.
const READ_AHEAD: usize = 64;
/// Bytes of finished answers that may wait for one before them; then no new request is begun.
const MOST_HELD_BYTES: usize = 64 << 20;

/// Reads requests from `input` on a thread; the channel ends with the input.
pub fn read_requests(
    input: impl BufRead + Send + 'static,
    defaults: Sampling,
) -> Receiver<Result<Request, ReadError>> {
    let (sender, receiver) = mpsc::sync_channel(READ_AHEAD);
    std::thread::spawn(move || {
        for request in RequestReader::new(input, defaults) {
            if sender.send(request).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Requests from a channel, answers to a writer.
pub struct Prompts<'r, W: Write> {
    requests: Receiver<Result<Request, ReadError>>,
    rules: &'r Rules,
    writer: AnswerWriter<W>,
    progress: Progress,
    /// By the index of the request.
    under_way: HashMap<u64, UnderWay<'r>>,
    measured: Measured,
    most_held_bytes: usize,
}

/// A sequence that is being computed.
struct UnderWay<'r> {
    sequence: Sequence<'r>,
    admitted: Instant,
    first_token: Option<Instant>,
}

impl<'r, W: Write> Prompts<'r, W> {
    /// A feed at its beginning.
    pub fn new(
        requests: Receiver<Result<Request, ReadError>>,
        rules: &'r Rules,
        writer: AnswerWriter<W>,
        progress: Progress,
    ) -> Self {
        Self {
            requests,
            rules,
            writer,
            progress,
            under_way: HashMap::new(),
            measured: Measured::default(),
            most_held_bytes: MOST_HELD_BYTES,
        }
    }

    /// What was written and measured.
    pub fn finish(self) -> Result<(Written, Measured)> {
        self.progress.finish();
        Ok((self.writer.finish()?, self.measured))
    }

    /// Starts a request, or writes why it cannot be answered.
    fn admit(&mut self, request: Request) -> Result<Option<Prompt>> {
        let (line, key) = (request.line, request.index as u64);
        let admitted = match Sequence::admit(request, self.rules) {
            Ok(admitted) => admitted,
            Err(error) => {
                self.fail(*error)?;
                return Ok(None);
            }
        };
        let Admitted {
            sequence,
            prompt,
            params,
        } = admitted;
        let max_tokens = sequence.remaining_tokens();
        info!(line, prompt_tokens = prompt.len(), max_tokens, "prompt");
        let under_way = UnderWay {
            sequence,
            admitted: Instant::now(),
            first_token: None,
        };
        self.under_way.insert(key, under_way);
        self.measured.admitted(self.under_way.len());
        Ok(Some(Prompt {
            key,
            tokens: prompt,
            max_tokens,
            params,
        }))
    }

    fn fail(&mut self, error: LineError) -> Result<()> {
        self.progress
            .warn(&format!("line {}: {}", error.line, error.rejection));
        self.writer.fail(error)?;
        self.progress.answered();
        Ok(())
    }

    fn complete(&mut self, done: UnderWay<'r>, reason: FinishReason) -> Result<()> {
        let sequence = done.sequence;
        let last_token = Instant::now();
        let first_token = done.first_token.unwrap_or(last_token);
        self.measured.add(RequestMeasured {
            prompt_tokens: sequence.prompt_tokens(),
            sampled_tokens: sequence.sampled_tokens(),
            times: RequestTimes {
                first_token_s: (first_token - done.admitted).as_secs_f64(),
                decode_s: (last_token - first_token).as_secs_f64(),
            },
        });
        let request = sequence.request().clone();
        match sequence.finish(reason) {
            Ok(answer) => self.writer.answer(answer)?,
            Err(error) => self.writer.fail(undecodable(&request, &error))?,
        }
        self.progress.answered();
        Ok(())
    }
}

impl<W: Write> Rest for Prompts<'_, W> {}

impl<W: Write> Feed for Prompts<'_, W> {
    fn next(&mut self) -> Result<Next> {
        while self.writer.held_bytes() < self.most_held_bytes {
            let request = match self.requests.try_recv() {
                Err(TryRecvError::Empty) => return Ok(Next::NotYet),
                Err(TryRecvError::Disconnected) => return Ok(Next::Done),
                Ok(request) => request,
            };
            match request {
                Ok(request) => {
                    if let Some(prompt) = self.admit(request)? {
                        return Ok(Next::Prompt(prompt));
                    }
                }
                Err(ReadError::Line(error)) => self.fail(error)?,
                Err(error @ ReadError::Io { .. }) => bail!(error),
            }
        }
        Ok(Next::NotYet)
    }

    fn token(&mut self, key: u64, token: SampledToken) -> Result<Then> {
        let under_way = self.under_way.get_mut(&key);
        let under_way = under_way.context("a token came for no request")?;
        under_way.first_token.get_or_insert_with(Instant::now);
        self.progress.token();
        let sequence = &mut under_way.sequence;
        let end = match sequence.accept(&token) {
            Ok(None) => {
                let request = sequence.request();
                self.writer
                    .progress(request.index, &request.form, sequence.text())?;
                return Ok(Then::Continue);
            }
            Ok(Some(reason)) => Ok(reason),
            Err(error) => Err(undecodable(sequence.request(), &error)),
        };
        let done = self.under_way.remove(&key);
        match (end, done) {
            (Ok(reason), Some(done)) => self.complete(done, reason)?,
            (Ok(_), None) => {}
            (Err(error), _) => self.fail(error)?,
        }
        Ok(Then::Finished)
    }

    fn is_watched(&self) -> bool {
        self.progress.is_shown()
    }

    fn watch(&mut self, seen: Seen) {
        self.progress.watch(seen);
    }
}

fn undecodable(request: &Request, error: &dyn std::error::Error) -> LineError {
    LineError::for_request(
        request,
        Rejection::new(
            RejectionCode::PromptNotTokenizable,
            format!("the answer could not be decoded: {error}"),
        ),
    )
}

/// Standard input, for the reading thread.
pub fn standard_input() -> impl BufRead + Send + 'static {
    io::BufReader::new(io::stdin())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Format, Identity};

    fn sampled(token: u32) -> SampledToken {
        SampledToken {
            token,
            logprob: None,
            top: Vec::new(),
        }
    }

    fn next_key(feed: &mut impl Feed) -> Option<u64> {
        match feed.next().unwrap() {
            Next::Prompt(prompt) => Some(prompt.key),
            Next::NotYet => None,
            Next::Done => panic!("the input has not ended"),
        }
    }

    #[test]
    fn no_request_is_begun_while_too_many_answers_wait_for_a_slow_one() {
        let defaults = Sampling::greedy(1);
        let (sender, receiver) = mpsc::channel();
        for request in RequestReader::new(&b"{\"prompt\": [1]}\n".repeat(100)[..], defaults) {
            sender.send(request).unwrap();
        }
        let identity = Identity {
            model: "m".into(),
            created_s: 0,
        };
        let mut output = Vec::new();
        let writer = AnswerWriter::new(&mut output, Format::Jsonl, identity);
        let rules = Rules {
            tokenizer: None,
            raw: false,
            context_tokens: 100,
            vocab_size: 50,
            end_ids: Vec::new(),
            seed: 0,
        };
        let mut feed = Prompts::new(receiver, &rules, writer, Progress::new());
        feed.most_held_bytes = 4000;
        assert_eq!(next_key(&mut feed), Some(0));
        let mut held = 0;
        while let Some(key) = next_key(&mut feed) {
            assert!(matches!(
                feed.token(key, sampled(7)).unwrap(),
                Then::Finished
            ));
            held += 1;
        }
        assert!((2..50).contains(&held), "{held} answers wait in 4000 bytes");
        // The slow one comes: all are written, and more can begin.
        assert!(matches!(feed.token(0, sampled(7)).unwrap(), Then::Finished));
        assert!(next_key(&mut feed).is_some());
        drop(feed);
        assert_eq!(
            output.iter().filter(|&&byte| byte == b'\n').count(),
            held + 1
        );
    }
}
