//! Standard input and output as a [`Feed`]: requests are read on a thread of their own, so that the loop
//! can watch for signals meanwhile, and never further ahead than a bounded channel holds.

use crate::pipeline::{Feed, Next, Then};
use crate::plan::RequestTimes;
use crate::progress::Progress;
use crate::report::{Measured, RequestMeasured};
use crate::request::{
    AnswerWriter, FinishReason, LineError, ReadError, Rejection, RejectionCode, Request,
    RequestReader, Sampling, Written,
};
use crate::sequence::{Admitted, Rules, Sequence};
use crate::wire::SampledToken;
use anyhow::{Context, Result, bail};
use std::io::{self, BufRead, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tracing::info;

/// Requests read ahead of the one being answered.
const READ_AHEAD: usize = 64;
/// How long the loop looks for a request before it looks at everything else again.
const LOOK: Duration = Duration::from_millis(20);

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
    current: Option<Current<'r>>,
    measured: Measured,
}

/// The sequence in flight.
struct Current<'r> {
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
            current: None,
            measured: Measured::default(),
        }
    }

    /// What was written and measured.
    pub fn finish(self) -> Result<(Written, Measured)> {
        self.progress.finish();
        Ok((self.writer.finish()?, self.measured))
    }

    /// Starts a request, or writes why it cannot be answered.
    fn admit(&mut self, request: Request) -> Result<Option<Next>> {
        let (line, max_tokens) = (request.line, request.sampling.max_tokens);
        match Sequence::admit(request, self.rules) {
            Ok(Admitted {
                sequence,
                prompt,
                params,
            }) => {
                info!(line, prompt_tokens = prompt.len(), max_tokens, "prompt");
                self.current = Some(Current {
                    sequence,
                    admitted: Instant::now(),
                    first_token: None,
                });
                Ok(Some(Next::Prompt(prompt, params)))
            }
            Err(error) => {
                self.fail(*error)?;
                Ok(None)
            }
        }
    }

    fn fail(&mut self, error: LineError) -> Result<()> {
        self.progress
            .warn(&format!("line {}: {}", error.line, error.rejection));
        self.writer.fail(error)?;
        self.progress.answered();
        Ok(())
    }

    fn complete(&mut self, current: Current<'r>, reason: FinishReason) -> Result<()> {
        let sequence = current.sequence;
        let last_token = Instant::now();
        let first_token = current.first_token.unwrap_or(last_token);
        self.measured.requests.push(RequestMeasured {
            prompt_tokens: sequence.prompt_tokens(),
            sampled_tokens: sequence.sampled_tokens(),
            times: RequestTimes {
                first_token_s: (first_token - current.admitted).as_secs_f64(),
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

impl<W: Write> Feed for Prompts<'_, W> {
    fn next(&mut self) -> Result<Next> {
        loop {
            let request = match self.requests.recv_timeout(LOOK) {
                Err(RecvTimeoutError::Timeout) => return Ok(Next::NotYet),
                Err(RecvTimeoutError::Disconnected) => return Ok(Next::Done),
                Ok(request) => request,
            };
            match request {
                Ok(request) => {
                    if let Some(next) = self.admit(request)? {
                        return Ok(next);
                    }
                }
                Err(ReadError::Line(error)) => self.fail(error)?,
                Err(error @ ReadError::Io { .. }) => bail!(error),
            }
        }
    }

    fn token(&mut self, token: SampledToken) -> Result<Then> {
        let mut current = self
            .current
            .take()
            .context("a token came for no sequence")?;
        current.first_token.get_or_insert_with(Instant::now);
        self.progress.token();
        match current.sequence.accept(&token) {
            Ok(None) => {
                let request = current.sequence.request();
                self.writer
                    .progress(request.index, &request.form, current.sequence.text())?;
                self.current = Some(current);
                Ok(Then::Continue)
            }
            Ok(Some(reason)) => {
                self.complete(current, reason)?;
                Ok(Then::Finished)
            }
            Err(error) => {
                self.fail(undecodable(current.sequence.request(), &error))?;
                Ok(Then::Finished)
            }
        }
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
