//! A finished answer and the JSON shapes it is written in.
//!
//! Pure: the caller brings the time and the model's name, so equal answers give equal bytes.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::{Endpoint, Form, LineError};

/// What was generated for one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The request's [`index`](super::Request::index).
    pub index: usize,
    /// The request's [`form`](super::Request::form).
    pub form: Form,
    /// The completion, without the stop text that ended it.
    pub text: String,
    /// Every sampled id, an end-of-sequence id included.
    pub token_ids: Vec<u32>,
    /// Tokens of the prompt after tokenising.
    pub prompt_tokens: usize,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// One entry for each of `token_ids`, if they were asked for.
    pub logprobs: Option<Vec<TokenLogprob>>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model said so, or a stop text came up.
    Stop,
    /// `max_tokens`, or the context, was used up.
    Length,
}

impl FinishReason {
    /// As OpenAI's API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// How likely a sampled token was, and what else was likely in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token that was sampled.
    pub sampled: TokenChoice,
    /// The likeliest tokens at this place, best first; as many as were asked for.
    pub top: Vec<TokenChoice>,
    /// Characters of the answer's text before this token.
    pub text_offset_chars: usize,
}

/// A token and its probability.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenChoice {
    /// Its id.
    pub id: u32,
    /// Its text in bytes, which need not be whole characters; `None` where there is no tokenizer.
    pub bytes: Option<Vec<u8>>,
    /// Natural logarithm of its probability in the untempered softmax.
    pub logprob: f32,
}

/// What an answer says about who gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The `model` of every response.
    pub model: String,
    /// The `created` of every response, in seconds since 1970.
    pub created_s: u64,
}

impl Answer {
    /// The answer as it is written in `form`, its last line end included.
    pub(super) fn render(&self, form: &Form, identity: &Identity) -> Vec<u8> {
        match form {
            Form::Plain if self.text.ends_with('\n') => self.text.clone().into_bytes(),
            Form::Plain => format!("{}\n", self.text).into_bytes(),
            Form::Json(endpoint) => json_line(&self.response(*endpoint, identity)),
            Form::Batch {
                custom_id,
                endpoint,
            } => json_line(&BatchLine {
                id: format!("batch_req_{}", self.index),
                custom_id,
                response: BatchResponse {
                    status_code: 200,
                    body: self.response(*endpoint, identity),
                },
                error: None,
            }),
        }
    }

    fn response<'a>(&'a self, endpoint: Endpoint, identity: &'a Identity) -> Response<'a> {
        let (prefix, object) = match endpoint {
            Endpoint::Completion => ("cmpl", "text_completion"),
            Endpoint::Chat => ("chatcmpl", "chat.completion"),
        };
        Response {
            id: format!("{prefix}-{}", self.index),
            object,
            created: identity.created_s,
            model: &identity.model,
            choices: [self.choice(endpoint)],
            usage: self.usage(),
        }
    }

    fn choice(&self, endpoint: Endpoint) -> Choice<'_> {
        let logprobs = self.logprobs.as_deref();
        let (text, message, logprobs) = match endpoint {
            Endpoint::Completion => (
                Some(self.text.as_str()),
                None,
                logprobs.map(Logprobs::completion),
            ),
            Endpoint::Chat => {
                let message = ReplyMessage {
                    role: "assistant",
                    content: &self.text,
                };
                (None, Some(message), logprobs.map(Logprobs::chat))
            }
        };
        let finish_reason = self.finish_reason.as_str();
        Choice {
            index: 0,
            text,
            message,
            logprobs,
            finish_reason,
            token_ids: &self.token_ids,
        }
    }

    fn usage(&self) -> Usage {
        let (prompt_tokens, completion_tokens) = (self.prompt_tokens, self.token_ids.len());
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens.saturating_add(completion_tokens),
        }
    }
}

impl LineError {
    /// The error as it is written in `form`, its last line end included.
    pub(super) fn render(&self, form: &Form) -> Vec<u8> {
        match form {
            Form::Plain => {
                format!("error: {}\n", self.to_string().replace(['\n', '\r'], " ")).into_bytes()
            }
            Form::Json(_) => json_line(&ErrorBody {
                error: self.object(),
            }),
            Form::Batch { custom_id, .. } => json_line(&BatchLine {
                id: format!("batch_req_{}", self.index),
                custom_id,
                response: BatchResponse {
                    status_code: 400,
                    body: ErrorBody {
                        error: self.object(),
                    },
                },
                error: Some(self.object()),
            }),
        }
    }

    fn object(&self) -> ErrorObject<'_> {
        ErrorObject {
            message: &self.rejection.message,
            kind: "invalid_request_error",
            param: self.rejection.field.as_deref(),
            code: self.rejection.code.as_str(),
            line: self.line,
        }
    }
}

// The shapes below are those of OpenAI's API reference (completion object, chat completion object, batch output object),
// with `token_ids` and `line` added. Types rather than `serde_json::Value`, so that an f32 is written with the digits of an
// f32.

#[derive(Serialize)]
struct Response<'a> {
    id: String,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: [Choice<'a>; 1],
    usage: Usage,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<ReplyMessage<'a>>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: &'static str,
    token_ids: &'a [u32],
}

#[derive(Serialize)]
struct ReplyMessage<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

/// Likely tokens as each endpoint writes them.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Logprobs<'a> {
    Completion {
        tokens: Vec<String>,
        token_logprobs: Vec<f32>,
        top_logprobs: Option<Vec<LikelyTokens<'a>>>,
        text_offset: Vec<usize>,
    },
    Chat {
        content: Vec<ChatLogprob<'a>>,
    },
}

impl Logprobs<'_> {
    pub(crate) fn completion(entries: &[TokenLogprob]) -> Logprobs<'_> {
        let wants_top = entries.iter().any(|entry| !entry.top.is_empty());
        Logprobs::Completion {
            tokens: entries.iter().map(|entry| entry.sampled.text()).collect(),
            token_logprobs: entries
                .iter()
                .map(|entry| entry.sampled.finite_logprob())
                .collect(),
            top_logprobs: wants_top.then(|| entries.iter().map(LikelyTokens).collect()),
            text_offset: entries
                .iter()
                .map(|entry| entry.text_offset_chars)
                .collect(),
        }
    }

    pub(crate) fn chat(entries: &[TokenLogprob]) -> Logprobs<'_> {
        let content = entries.iter().map(|entry| ChatLogprob {
            token: ChatToken::of(&entry.sampled),
            top_logprobs: entry.top.iter().map(ChatToken::of).collect(),
        });
        Logprobs::Chat {
            content: content.collect(),
        }
    }
}

/// `{"text": logprob}` for the likeliest tokens and the sampled one, best first; of two tokens with one text, the likelier.
pub(crate) struct LikelyTokens<'a>(&'a TokenLogprob);

impl Serialize for LikelyTokens<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut written: Vec<String> = Vec::new();
        let mut map = serializer.serialize_map(None)?;
        for choice in self.0.top.iter().chain([&self.0.sampled]) {
            let text = choice.text();
            if !written.contains(&text) {
                map.serialize_entry(&text, &choice.finite_logprob())?;
                written.push(text);
            }
        }
        map.end()
    }
}

#[derive(Serialize)]
pub(crate) struct ChatLogprob<'a> {
    #[serde(flatten)]
    token: ChatToken<'a>,
    top_logprobs: Vec<ChatToken<'a>>,
}

#[derive(Serialize)]
pub(crate) struct ChatToken<'a> {
    token: String,
    logprob: f32,
    bytes: Option<&'a [u8]>,
}

impl ChatToken<'_> {
    fn of(choice: &TokenChoice) -> ChatToken<'_> {
        ChatToken {
            token: choice.text(),
            logprob: choice.finite_logprob(),
            bytes: choice.bytes.as_deref(),
        }
    }
}

impl TokenChoice {
    /// The token as a string. Bytes that are no whole character are spelt out, as OpenAI does, so that two such tokens
    /// stay apart; without a tokenizer, the id is.
    fn text(&self) -> String {
        let Some(bytes) = &self.bytes else {
            return format!("token_id:{}", self.id);
        };
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| {
                text + &format!("\\x{byte:02x}")
            }),
        }
    }

    /// The logprob as JSON can hold it: OpenAI writes -9999 for what is next to impossible.
    fn finite_logprob(&self) -> f32 {
        self.logprob.max(-9999.0)
    }
}

#[derive(Serialize)]
struct BatchLine<'a, B> {
    id: String,
    custom_id: &'a str,
    response: BatchResponse<B>,
    error: Option<ErrorObject<'a>>,
}

#[derive(Serialize)]
struct BatchResponse<B> {
    status_code: u16,
    body: B,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: ErrorObject<'a>,
}

#[derive(Serialize)]
struct ErrorObject<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'a str>,
    code: &'static str,
    line: usize,
}

/// One line of JSON.
fn json_line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).expect("keys are strings and memory takes any bytes");
    line.push(b'\n');
    line
}
