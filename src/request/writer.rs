//! Answers in input order, whatever order they finish in.
//!
//! Whoever generates may finish the third request before the first. This file alone holds back what is early, so that
//! nothing else need care about order, and so that it is also the one place that can name the digest of all tokens in
//! input order.

use std::collections::BTreeMap;
use std::io::{self, Write};

use sha2::{Digest, Sha256};

use super::{Answer, Endpoint, Form, Identity, LineError};

/// What stands between two answers if either of them is plain text.
const SEPARATOR: &[u8] = b"---\n";

/// How answers are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// As the request came: plain for plain, JSON for JSON.
    #[default]
    Auto,
    /// Only the completion's text.
    Plain,
    /// One line of JSON for every request. A plain prompt is answered in the shape of `/v1/completions`.
    Jsonl,
}

impl Format {
    /// The form in which a request of form `asked` is answered.
    fn form(self, asked: &Form) -> Form {
        match (self, asked) {
            (Format::Plain, _) => Form::Plain,
            (Format::Jsonl, Form::Plain) => Form::Json(Endpoint::Completion),
            (Format::Auto | Format::Jsonl, asked) => asked.clone(),
        }
    }
}

/// How many requests were answered and how many could not be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests with an answer.
    pub answered: usize,
    /// Requests with an error in its place.
    pub failed: usize,
}

impl Tally {
    /// The exit status of a run that got to its end: 0 if all were answered, 3 if some were not.
    pub fn exit_status(self) -> u8 {
        if self.failed == 0 { 0 } else { 3 }
    }
}

/// What a finished [`AnswerWriter`] can say about the whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Answers and errors.
    pub tally: Tally,
    /// SHA-256, in hexadecimal, of the token ids of all answers in input order, each as 4 bytes little-endian.
    pub digest: String,
}

/// Why an answer was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Nobody reads the output any more; what is still to come would be lost, so there is no point in going on.
    #[error("the output was closed by its reader after {written} answers")]
    Closed {
        /// Answers and errors written before that.
        written: usize,
    },
    /// The output failed otherwise, such as a full disk.
    #[error("writing answer {index} failed: {cause}")]
    Io {
        /// The request whose turn it was.
        index: usize,
        /// What the system said.
        cause: io::Error,
    },
    /// A request was answered twice.
    #[error("request {index} was answered twice; this is a defect of the program")]
    Duplicate {
        /// The request.
        index: usize,
    },
    /// A request was never answered, although later ones were.
    #[error(
        "request {index} was never answered, but {held} after it were; this is a defect of the program"
    )]
    Missing {
        /// The first request without an answer.
        index: usize,
        /// Answers that waited for it.
        held: usize,
    },
}

/// Writes answers to `W` in the order of their requests.
///
/// Each answer is written and flushed as soon as its turn has come; those that are early are held, as rendered bytes.
#[derive(Debug)]
pub struct AnswerWriter<W> {
    output: W,
    format: Format,
    identity: Identity,
    turn: Turn,
    held: BTreeMap<usize, Rendered>,
    held_bytes: usize,
    tally: Tally,
    digest: Sha256,
}

/// The request whose answer is written next.
#[derive(Debug, Default)]
struct Turn {
    index: usize,
    /// Whether the answer before this one was plain; `None` before the first.
    previous_is_plain: Option<bool>,
    /// Bytes of this answer that are written already.
    shown_bytes: usize,
    /// Whether these end with a line end.
    shown_ends_line: bool,
}

/// An answer or an error, ready to be written.
#[derive(Debug)]
struct Rendered {
    bytes: Vec<u8>,
    is_plain: bool,
    /// `None` for an error.
    token_ids: Option<Vec<u32>>,
}

impl Rendered {
    fn held_bytes(&self) -> usize {
        let ids = self.token_ids.as_ref().map_or(0, Vec::len);
        size_of::<Self>() + self.bytes.len() + ids * size_of::<u32>()
    }
}

impl<W: Write> AnswerWriter<W> {
    /// A writer that has written nothing and waits for the answer to request 0.
    pub fn new(output: W, format: Format, identity: Identity) -> AnswerWriter<W> {
        let (turn, held) = (Turn::default(), BTreeMap::new());
        AnswerWriter {
            output,
            format,
            identity,
            turn,
            held,
            held_bytes: 0,
            tally: Tally::default(),
            digest: Sha256::new(),
        }
    }

    /// Shows what is new in `text_so_far`, the beginning of request `index`'s answer, so that a person can read along.
    ///
    /// Does nothing unless it is this request's turn and its answer is plain; the output as a whole is the same whether
    /// this is called or not. `text_so_far` may only grow and must be a beginning of [`Answer::text`].
    ///
    /// # Errors
    ///
    /// [`WriteError::Closed`] or [`WriteError::Io`].
    pub fn progress(
        &mut self,
        index: usize,
        form: &Form,
        text_so_far: &str,
    ) -> Result<(), WriteError> {
        if index != self.turn.index || self.format.form(form) != Form::Plain {
            return Ok(());
        }
        let new = text_so_far
            .as_bytes()
            .get(self.turn.shown_bytes..)
            .unwrap_or_default();
        if new.is_empty() {
            return Ok(());
        }
        self.put(new, true).map_err(|cause| self.failed(cause))
    }

    /// Takes a finished answer; writes it and those that waited for it if its turn has come.
    ///
    /// # Errors
    ///
    /// [`WriteError::Closed`], [`WriteError::Io`] or [`WriteError::Duplicate`].
    pub fn answer(&mut self, answer: Answer) -> Result<(), WriteError> {
        let form = self.format.form(&answer.form);
        let bytes = answer.render(&form, &self.identity);
        let rendered = Rendered {
            bytes,
            is_plain: form == Form::Plain,
            token_ids: Some(answer.token_ids),
        };
        self.take(answer.index, rendered)
    }

    /// Takes an error in place of an answer.
    ///
    /// # Errors
    ///
    /// As [`AnswerWriter::answer`].
    pub fn fail(&mut self, error: LineError) -> Result<(), WriteError> {
        let form = self.format.form(&error.form);
        let rendered = Rendered {
            bytes: error.render(&form),
            is_plain: form == Form::Plain,
            token_ids: None,
        };
        self.take(error.index, rendered)
    }

    /// Bytes of answers that wait for one before them.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Ends the output.
    ///
    /// # Errors
    ///
    /// [`WriteError::Missing`] if an answer still waits for one that never came; [`WriteError::Closed`] or
    /// [`WriteError::Io`] if the last flush fails.
    pub fn finish(mut self) -> Result<Written, WriteError> {
        if !self.held.is_empty() {
            return Err(WriteError::Missing {
                index: self.turn.index,
                held: self.held.len(),
            });
        }
        self.output.flush().map_err(|cause| self.failed(cause))?;
        Ok(Written {
            tally: self.tally,
            digest: hex::encode(self.digest.finalize()),
        })
    }

    fn take(&mut self, index: usize, rendered: Rendered) -> Result<(), WriteError> {
        if index < self.turn.index || self.held.contains_key(&index) {
            return Err(WriteError::Duplicate { index });
        }
        self.held_bytes += rendered.held_bytes();
        self.held.insert(index, rendered);
        while let Some(rendered) = self.held.remove(&self.turn.index) {
            self.held_bytes -= rendered.held_bytes();
            self.write(&rendered).map_err(|cause| self.failed(cause))?;
            self.account(rendered);
        }
        Ok(())
    }

    /// Writes what is not shown yet of the answer whose turn it is.
    fn write(&mut self, rendered: &Rendered) -> io::Result<()> {
        let shown = match rendered.token_ids {
            Some(_) => self.turn.shown_bytes,
            // An error does not continue the text that was shown: it starts a line of its own.
            None if self.turn.shown_bytes > 0 && !self.turn.shown_ends_line => {
                self.put(b"\n", true)?;
                0
            }
            None => 0,
        };
        self.put(
            rendered.bytes.get(shown..).unwrap_or_default(),
            rendered.is_plain,
        )
    }

    /// Writes bytes of the answer whose turn it is, after the separator if they are the first.
    fn put(&mut self, bytes: &[u8], is_plain: bool) -> io::Result<()> {
        if self.turn.shown_bytes == 0
            && self
                .turn
                .previous_is_plain
                .is_some_and(|previous| previous || is_plain)
        {
            self.output.write_all(SEPARATOR)?;
        }
        self.output.write_all(bytes)?;
        self.output.flush()?;
        self.turn.shown_bytes += bytes.len();
        self.turn.shown_ends_line = bytes.ends_with(b"\n");
        Ok(())
    }

    fn account(&mut self, rendered: Rendered) {
        match rendered.token_ids {
            None => self.tally.failed += 1,
            Some(token_ids) => {
                self.tally.answered += 1;
                token_ids
                    .iter()
                    .for_each(|id| self.digest.update(id.to_le_bytes()));
            }
        }
        let previous_is_plain = Some(rendered.is_plain);
        self.turn = Turn {
            index: self.turn.index + 1,
            previous_is_plain,
            ..Turn::default()
        };
    }

    fn failed(&self, cause: io::Error) -> WriteError {
        match cause.kind() {
            io::ErrorKind::BrokenPipe => WriteError::Closed {
                written: self.tally.answered + self.tally.failed,
            },
            _ => WriteError::Io {
                index: self.turn.index,
                cause,
            },
        }
    }
}
