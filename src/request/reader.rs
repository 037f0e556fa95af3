//! Lines of input, one [`Request`] or [`LineError`] each.
//!
//! Read lazily: the first request can run while the last is not yet written, and memory holds one line however long the
//! input is.

use std::io::{self, BufRead};

use serde_json::{Map, Value};

use super::fields::{Fields, wrong_type, wrong_value};
use super::json;
use super::{Body, Endpoint, Form, Prompt, Rejection, RejectionCode, Request, Sampling};

/// The longest line that is read, in bytes, its line end not counted. A longer one is an error for that line; it is skipped
/// without being held in memory.
pub const LINE_BYTES_MAX: usize = 16 << 20;

/// A request that cannot be run. The others still run.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("line {line}: {rejection}")]
pub struct LineError {
    /// Place in the input, as in [`Request::index`].
    pub index: usize,
    /// Line of the input, as in [`Request::line`].
    pub line: usize,
    /// How the error is written: as the answer would have been, as far as the line could be read.
    pub form: Form,
    /// What is wrong with it.
    pub rejection: Rejection,
}

impl LineError {
    /// The error for a request that was read and could not be run after all, such as a prompt that is too long.
    pub fn for_request(request: &Request, rejection: Rejection) -> LineError {
        LineError {
            index: request.index,
            line: request.line,
            form: request.form.clone(),
            rejection,
        }
    }
}

/// Why [`RequestReader`] gave no request.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// One line is bad; the next may be good.
    #[error(transparent)]
    Line(#[from] LineError),
    /// The input itself failed; nothing follows.
    #[error("reading line {line} of the input failed: {cause}")]
    Io {
        /// The line that was being read, 1-based.
        line: usize,
        /// What the system said.
        cause: io::Error,
    },
}

/// Reads requests from `R`, one non-blank line each.
#[derive(Debug)]
pub struct RequestReader<R> {
    input: R,
    defaults: Sampling,
    index: usize,
    line: usize,
    ended: bool,
}

impl<R: BufRead> RequestReader<R> {
    /// A reader whose requests take `defaults` for every sampling field that their line leaves out.
    pub fn new(input: R, defaults: Sampling) -> RequestReader<R> {
        RequestReader {
            input,
            defaults,
            index: 0,
            line: 0,
            ended: false,
        }
    }
}

impl<R: BufRead> Iterator for RequestReader<R> {
    type Item = Result<Request, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            self.line += 1;
            match read_line(&mut self.input, LINE_BYTES_MAX) {
                Ok(None) => self.ended = true,
                Ok(Some(line)) if line.is_blank() => {}
                Ok(Some(line)) => return Some(self.request(&line).map_err(ReadError::Line)),
                Err(cause) => {
                    self.ended = true;
                    return Some(Err(ReadError::Io {
                        line: self.line,
                        cause,
                    }));
                }
            }
        }
        None
    }
}

impl<R> RequestReader<R> {
    /// Gives the line its place in the input and reads it.
    fn request(&mut self, line: &Line) -> Result<Request, LineError> {
        let index = self.index;
        self.index += 1;
        let (form, content) = line.read(&self.defaults);
        match content {
            Ok((prompt, sampling)) => Ok(Request {
                index,
                line: self.line,
                form,
                prompt,
                sampling,
            }),
            Err(rejection) => Err(LineError {
                index,
                line: self.line,
                form,
                rejection,
            }),
        }
    }
}

/// One line, without its line end and byte order mark.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Whole(Vec<u8>),
    /// Too long: only its first bytes, enough to see whether it was meant as JSON.
    Cut(Vec<u8>),
}

/// What a line asks for, or why not, and how to answer it in either case.
type Reading = (Form, Result<(Prompt, Sampling), Rejection>);

impl Line {
    fn is_blank(&self) -> bool {
        match self {
            Line::Whole(bytes) => {
                std::str::from_utf8(bytes).is_ok_and(|text| text.trim().is_empty())
            }
            Line::Cut(_) => false,
        }
    }

    fn read(&self, defaults: &Sampling) -> Reading {
        match self {
            Line::Cut(start) => {
                let message = format!("the line is longer than {LINE_BYTES_MAX} bytes; shorten it");
                (
                    form_of_bytes(start),
                    Err(Rejection::new(RejectionCode::LineTooLong, message)),
                )
            }
            Line::Whole(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) if looks_like_json(bytes) => read_json(text, defaults),
                Ok(text) => (
                    Form::Plain,
                    Ok((Prompt::Plain(text.to_owned()), defaults.clone())),
                ),
                Err(error) => (
                    form_of_bytes(bytes),
                    Err(not_utf8(bytes, error.valid_up_to())),
                ),
            },
        }
    }
}

/// Reads up to the next line end, or `None` at the end of the input. Holds `bytes_max` bytes and one buffer at most.
fn read_line(input: &mut impl BufRead, bytes_max: usize) -> io::Result<Option<Line>> {
    const CUT_BYTES: usize = 1024;
    let (mut line, mut is_cut, mut is_any) = (Vec::new(), false, false);
    loop {
        let buffer = match input.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if buffer.is_empty() {
            break;
        }
        is_any = true;
        let end = buffer.iter().position(|&byte| byte == b'\n');
        let taken = end.unwrap_or(buffer.len());
        if !is_cut {
            line.extend(buffer.iter().take(taken));
        }
        input.consume(end.map_or(taken, |end| end + 1));
        if content_of(&line).len() > bytes_max {
            is_cut = true;
            line.truncate(CUT_BYTES.min(bytes_max));
            line.shrink_to_fit();
        }
        if end.is_some() {
            break;
        }
    }
    let content = content_of(&line).to_vec();
    Ok(is_any.then_some(if is_cut {
        Line::Cut(content)
    } else {
        Line::Whole(content)
    }))
}

/// The line without a carriage return at its end and a byte order mark at its start.
fn content_of(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line)
}

fn looks_like_json(line: &[u8]) -> bool {
    line.trim_ascii_start().starts_with(b"{")
}

fn not_utf8(line: &[u8], valid_bytes: usize) -> Rejection {
    let byte = line.get(valid_bytes).copied().unwrap_or_default();
    let message = format!(
        "not valid UTF-8 at byte {} (0x{byte:02X}); convert the input to UTF-8",
        valid_bytes + 1
    );
    Rejection::new(RejectionCode::NotUtf8, message)
}

/// The form in which to report a line that is not text: its `custom_id` may still be legible.
fn form_of_bytes(line: &[u8]) -> Form {
    if !looks_like_json(line) {
        return Form::Plain;
    }
    match serde_json::from_str(&String::from_utf8_lossy(line)) {
        Ok(Value::Object(fields)) => form_of_fields(&fields),
        _ => Form::Json(Endpoint::Completion),
    }
}

/// The form of an object, as far as it can be told before it is checked.
fn form_of_fields(fields: &Map<String, Value>) -> Form {
    let body = fields
        .get("body")
        .and_then(Value::as_object)
        .unwrap_or(fields);
    let endpoint = if body.contains_key("messages") {
        Endpoint::Chat
    } else {
        Endpoint::Completion
    };
    match fields.get("custom_id").and_then(Value::as_str) {
        Some(custom_id) => Form::Batch {
            custom_id: custom_id.to_owned(),
            endpoint,
        },
        None => Form::Json(endpoint),
    }
}

fn read_json(line: &str, defaults: &Sampling) -> Reading {
    let text = line.trim_start();
    let fields = match json::parse(text.as_bytes(), line.len() - text.len()) {
        Ok(Value::Object(fields)) => fields,
        Ok(other) => {
            let rejection = wrong_type("line", "a JSON object", &other);
            return (Form::Json(Endpoint::Completion), Err(rejection));
        }
        Err(rejection) => return (form_of_bytes(line.as_bytes()), Err(rejection)),
    };
    let form = form_of_fields(&fields);
    let is_batch = ["custom_id", "method", "url", "body"]
        .iter()
        .any(|name| fields.contains_key(*name));
    let body = if is_batch {
        read_batch(fields, defaults)
    } else {
        Body::from_fields(fields, None, defaults)
    };
    (form, body.and_then(Body::single))
}

/// A line of an OpenAI batch file.
fn read_batch(fields: Map<String, Value>, defaults: &Sampling) -> Result<Body, Rejection> {
    let mut fields = Fields(fields);
    fields.required_string("custom_id")?;
    let method = fields.required("method")?;
    if method != "POST" {
        return Err(wrong_value("method", "\"POST\"", &method));
    }
    let url = fields.required("url")?;
    let endpoints = [Endpoint::Completion, Endpoint::Chat];
    let Some(endpoint) = endpoints.into_iter().find(|endpoint| url == endpoint.url()) else {
        return Err(wrong_value(
            "url",
            "/v1/completions or /v1/chat/completions",
            &url,
        ));
    };
    let body = match fields.required("body")? {
        Value::Object(body) => body,
        other => return Err(wrong_type("body", "an object", &other)),
    };
    fields.refuse_unknown()?;
    Body::from_fields(body, Some(endpoint), defaults)
}
