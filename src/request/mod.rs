//! What a user asks for and what comes back: request in, answer out.
//!
//! This module is the border for everything a user writes. Text becomes [`Request`] once, here, with every value checked;
//! after that the types carry the proof. On the way back [`AnswerWriter`] turns finished [`Answer`]s into output in the
//! order in which they were asked. It knows no tokenizer, no model and no clock, so that a file on stdin and an
//! HTTP body take the same path.
//!
//! | file | noun |
//! |---|---|
//! | `mod.rs` | [`Request`], its parts, and [`Rejection`] |
//! | `body.rs` | [`Body`]: a JSON body of the OpenAI API, field by field |
//! | `json.rs` | JSON text to a value, with no field twice |
//! | `reader.rs` | [`RequestReader`]: lines of stdin, one [`Request`] or [`LineError`] each |
//! | `answer.rs` | [`Answer`] and its JSON shapes |
//! | `writer.rs` | [`AnswerWriter`]: answers in input order, whatever order they finish in |

mod answer;
mod body;
mod conversation;
mod fields;
mod json;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

use serde::Serialize;
use serde_json::{Map, Value};

pub(crate) use answer::Logprobs;
pub use answer::{Answer, FinishReason, Identity, TokenChoice, TokenLogprob};
pub use body::{
    BIAS_COUNT_MAX, Body, CHOICE_COUNT_MAX, STOP_BYTES_MAX, STOP_COUNT_MAX, TOP_LOGPROBS_MAX,
};
pub use reader::{LINE_BYTES_MAX, LineError, ReadError, RequestReader};
pub use writer::{AnswerWriter, Format, Tally, WriteError, Written};

/// One thing to generate, read from one line of input.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Place in the input: 0-based over all non-blank lines, those that failed included.
    pub index: usize,
    /// Line of the input it came from, 1-based, blank lines counted.
    pub line: usize,
    /// How its answer is written.
    pub form: Form,
    /// What to continue.
    pub prompt: Prompt,
    /// How to continue it.
    pub sampling: Sampling,
}

/// The shape of an answer; it mirrors the shape of the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// The completion as text.
    Plain,
    /// One line of JSON, the response body of the endpoint.
    Json(Endpoint),
    /// One line of an OpenAI batch output file around the response body.
    Batch {
        /// The caller's name for the request, handed back unchanged.
        custom_id: String,
        /// The shape of the response body.
        endpoint: Endpoint,
    },
}

/// The two endpoints of the OpenAI API whose bodies are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`: a prompt, answered with `choices[0].text`.
    Completion,
    /// `/v1/chat/completions`: messages, answered with `choices[0].message.content`.
    Chat,
}

impl Endpoint {
    /// The path under which OpenAI serves this endpoint, as in the `url` of a batch line.
    pub fn url(self) -> &'static str {
        match self {
            Endpoint::Completion => "/v1/completions",
            Endpoint::Chat => "/v1/chat/completions",
        }
    }
}

/// What to continue, before it is tokenised.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Text taken as it is: no chat template.
    Text(String),
    /// A plain line: a user message, or text as it is under `--raw`.
    Plain(String),
    /// Token ids; never empty. They need no tokenizer. Whether each lies inside the vocabulary is for the model to say.
    Tokens(Vec<u32>),
    /// Messages for the checkpoint's chat template.
    Chat(Chat),
}

/// A conversation so far; at least one message.
#[derive(Clone, Debug, PartialEq)]
pub struct Chat {
    /// The messages in order.
    pub messages: Vec<Message>,
    /// The tools that the model may call, as the body has them.
    pub tools: Vec<Value>,
    /// Extra variables for the template (`chat_template_kwargs` of the body), such as `enable_thinking`.
    pub template_arguments: Map<String, Value>,
}

impl Chat {
    /// A conversation of one user message.
    pub fn from_user(text: impl Into<String>) -> Chat {
        let message = Message {
            role: Role::User,
            content: Some(text.into()),
            more: Map::new(),
        };
        Chat {
            messages: vec![message],
            tools: Vec::new(),
            template_arguments: Map::new(),
        }
    }
}

/// One message, serialised for the template as the flat object that a template expects.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; text parts are joined. `None` only for an assistant message that carries `tool_calls`.
    pub content: Option<String>,
    /// Every other field (`name`, `tool_calls`, `tool_call_id`, `reasoning_content`), for templates that read it.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// Who speaks in a [`Message`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that stand above the conversation.
    System,
    /// OpenAI's newer name for [`Role::System`]; a template may know either.
    Developer,
    /// The person asking.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

/// How to continue a prompt. Every value is inside its range once a [`Body`] was parsed.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Tokens to generate at most; at least 1.
    pub max_tokens: usize,
    /// Divides the logits; in [0, 2], 0 means greedy.
    pub temperature: f32,
    /// Probability mass of the nucleus, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Candidates kept by rank; 0 keeps all.
    pub top_k: u32,
    /// Candidates below this share of the best one's probability are dropped, in [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens already seen; above 0, 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken off the logits of tokens that the answer has, in [-2, 2]; 0 changes nothing.
    pub presence_penalty: f32,
    /// The same for each time that the answer has them, in [-2, 2].
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, each in [-100, 100]; ordered by token, each once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the random numbers. `None` leaves the choice to the run.
    pub seed: Option<u64>,
    /// Texts that end the answer and are not part of it; none is empty.
    pub stop: Vec<String>,
    /// `Some(n)`: report the logprob of each sampled token and of the `n` likeliest at its place (n <= 20).
    pub logprobs: Option<u8>,
}

impl Sampling {
    /// The most likely tokens, so many of them at most, and nothing else asked for.
    pub fn greedy(max_tokens: usize) -> Self {
        Self {
            max_tokens,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            stop: Vec::new(),
            logprobs: None,
        }
    }
}

/// Why a request cannot be run, in words a user can act on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Rejection {
    /// For programs.
    pub code: RejectionCode,
    /// The field at fault, where it is one.
    pub field: Option<String>,
    /// For people: what is wrong, what was expected and found.
    pub message: String,
}

impl Rejection {
    /// A rejection that no single field is to blame for.
    pub fn new(code: RejectionCode, message: impl Into<String>) -> Rejection {
        Rejection {
            code,
            field: None,
            message: message.into(),
        }
    }

    /// A rejection because of `field`, which the message should name as well.
    pub fn of_field(code: RejectionCode, field: &str, message: impl Into<String>) -> Rejection {
        Rejection {
            code,
            field: Some(field.to_owned()),
            message: message.into(),
        }
    }
}

/// The kinds of [`Rejection`], as written in the `code` of an error object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectionCode {
    /// The line is not UTF-8.
    NotUtf8,
    /// The line exceeds [`LINE_BYTES_MAX`].
    LineTooLong,
    /// The line starts like JSON and is not.
    InvalidJson,
    /// A field that must be there is not.
    MissingField,
    /// A value is of the wrong JSON type.
    InvalidType,
    /// A value is of the right type and outside what is allowed.
    InvalidValue,
    /// A field of the OpenAI API that would change the answer and is not supported.
    UnsupportedField,
    /// A field that nothing here knows; most often a typing error.
    UnknownField,
    /// The prompt cannot become tokens: no tokenizer, no chat template, or the template refused it.
    PromptNotTokenizable,
    /// A token id outside the model's vocabulary.
    TokenOutOfVocabulary,
    /// The prompt is longer than a sequence may be.
    ContextLengthExceeded,
}

impl RejectionCode {
    /// The code as written, stable across versions.
    pub fn as_str(self) -> &'static str {
        match self {
            RejectionCode::NotUtf8 => "not_utf8",
            RejectionCode::LineTooLong => "line_too_long",
            RejectionCode::InvalidJson => "invalid_json",
            RejectionCode::MissingField => "missing_field",
            RejectionCode::InvalidType => "invalid_type",
            RejectionCode::InvalidValue => "invalid_value",
            RejectionCode::UnsupportedField => "unsupported_field",
            RejectionCode::UnknownField => "unknown_field",
            RejectionCode::PromptNotTokenizable => "prompt_not_tokenizable",
            RejectionCode::TokenOutOfVocabulary => "token_out_of_vocabulary",
            RejectionCode::ContextLengthExceeded => "context_length_exceeded",
        }
    }
}
