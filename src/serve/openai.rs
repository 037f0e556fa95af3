//! The shapes of answers, whole and in pieces, as in the reference of OpenAI's API. `token_ids` is added to each
//! choice: every sampled id, one that ended the answer included. Types rather than JSON values, so that an f32 is
//! written with the digits of an f32.

use super::answers::Piece;
use super::tools::{Part, ToolCall, ToolParser};
use crate::request::{Answer, Endpoint, FinishReason, Logprobs, TokenLogprob};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// What ends an answer in pieces.
const DONE: &str = "[DONE]";

/// What a request wants its answer to look like.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Chat or completion.
    pub endpoint: Endpoint,
    /// The model as it was named.
    pub model: String,
    /// Answers with the same one were computed alike.
    pub fingerprint: String,
    /// Unique in this process.
    pub id: u64,
    /// When this process began, in seconds since 1970: keeps the ids of two processes apart.
    pub started_s: u64,
    /// Seconds since 1970.
    pub created_s: u64,
    /// Whether an answer in pieces ends with the count of its tokens.
    pub include_usage: bool,
    /// Choices that share a prompt.
    pub choices_per_prompt: usize,
    /// Whether calls of tools are looked for in the text.
    pub has_tools: bool,
}

/// One choice as far as it is known, and as far as it was told.
#[derive(Debug)]
pub struct Choice {
    told_bytes: usize,
    told_tokens: usize,
    told_calls: usize,
    /// Where calls of tools are looked for.
    tools: Option<ToolParser>,
    answer: Option<Answer>,
}

impl Choice {
    /// A choice of which nothing is known.
    pub fn new(has_tools: bool) -> Self {
        Self {
            told_bytes: 0,
            told_tokens: 0,
            told_calls: 0,
            tools: has_tools.then(ToolParser::default),
            answer: None,
        }
    }

    /// Another piece is told: its text, and the calls that are whole with it.
    fn tell(&mut self, piece: &mut Piece) -> Vec<ToolCall> {
        self.told_bytes += piece.text.len();
        self.told_tokens += piece.token_ids.len();
        match &mut self.tools {
            None => Vec::new(),
            Some(tools) => {
                let (text, calls) = apart(tools.push(&piece.text));
                piece.text = text;
                calls
            }
        }
    }

    /// The same once there is nothing more.
    fn tell_last(&mut self, piece: &mut Piece) -> Vec<ToolCall> {
        let mut calls = self.tell(piece);
        if let Some(tools) = self.tools.take() {
            let (text, last) = apart(tools.finish());
            piece.text.push_str(&text);
            calls.extend(last);
        }
        calls
    }

    /// The whole of it is known.
    pub fn end(&mut self, answer: Answer) {
        self.answer = Some(answer);
    }

    /// Whether the whole of it is known.
    pub fn has_ended(&self) -> bool {
        self.answer.is_some()
    }

    /// What was not told yet, behind the piece that comes before it.
    fn rest(&self, answer: &Answer, mut before: Piece) -> Piece {
        let logprobs = answer.logprobs.as_deref().unwrap_or_default();
        let text = self.told_bytes + before.text.len();
        let tokens = self.told_tokens + before.token_ids.len();
        before.extend(Piece {
            text: answer.text.get(text..).unwrap_or_default().to_owned(),
            token_ids: answer.token_ids.get(tokens..).unwrap_or_default().to_vec(),
            logprobs: logprobs.get(tokens..).unwrap_or_default().to_vec(),
        });
        before
    }
}

/// The text of an answer, and the calls in it.
fn apart(parts: Vec<Part>) -> (String, Vec<ToolCall>) {
    let (mut text, mut calls) = (String::new(), Vec::new());
    for part in parts {
        match part {
            Part::Text(more) => text.push_str(&more),
            Part::Call(call) => calls.push(call),
        }
    }
    (text, calls)
}

/// Writes the answer to one request.
#[derive(Debug)]
pub struct Writer {
    shape: Shape,
    id: String,
}

/// Whether something is written whole or in pieces.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Frame {
    Whole,
    Part,
}

#[derive(Serialize)]
struct Whole<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct WholeChoice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: &'static str,
    token_ids: &'a [u32],
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: Option<String>,
    refusal: (),
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WrittenCall>,
}

/// A call of a tool.
#[derive(Serialize)]
struct WrittenCall {
    /// Which of the choice's calls it is; only in pieces.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: WrittenFunction,
}

#[derive(Serialize)]
struct WrittenFunction {
    name: String,
    arguments: String,
}

#[derive(Serialize)]
struct PartChoice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Delta<'a>>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "<[u32]>::is_empty")]
    token_ids: &'a [u32],
}

#[derive(Serialize, Default)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WrittenCall>,
}

/// Tokens of prompts and answers.
#[derive(Serialize, Debug, Clone, Copy, PartialEq, Eq)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

impl Writer {
    /// A writer for an answer of this shape.
    pub fn new(shape: Shape) -> Self {
        let prefix = match shape.endpoint {
            Endpoint::Completion => "cmpl",
            Endpoint::Chat => "chatcmpl",
        };
        Self {
            id: format!("{prefix}-{:x}-{:x}", shape.started_s, shape.id),
            shape,
        }
    }

    /// The whole answer.
    pub fn whole(&self, choices: &[Choice]) -> Response {
        let body = self.whole_text(choices);
        ([(CONTENT_TYPE, "application/json")], body).into_response()
    }

    /// Its body.
    pub fn whole_text(&self, choices: &[Choice]) -> String {
        let object = match self.shape.endpoint {
            Endpoint::Completion => "text_completion",
            Endpoint::Chat => "chat.completion",
        };
        let written = choices
            .iter()
            .enumerate()
            .filter_map(|(index, choice)| Some(self.whole_choice(index, choice.answer.as_ref()?)));
        self.frame(object, written.collect(), Some(Some(self.usage(choices))))
    }

    fn whole_choice<'a>(&self, index: usize, answer: &'a Answer) -> WholeChoice<'a> {
        let is_chat = self.shape.endpoint == Endpoint::Chat;
        let (content, calls) = match self.shape.has_tools {
            false => (answer.text.clone(), Vec::new()),
            true => {
                let mut tools = ToolParser::default();
                let mut parts = tools.push(&answer.text);
                parts.extend(tools.finish());
                apart(parts)
            }
        };
        let numbered = calls.into_iter().enumerate();
        let tool_calls: Vec<_> = numbered
            .map(|(number, call)| self.call(index, number, call, Frame::Whole))
            .collect();
        let has_calls = !tool_calls.is_empty();
        let logprobs = answer.logprobs.as_deref();
        WholeChoice {
            index,
            text: (!is_chat).then_some(answer.text.as_str()),
            message: is_chat.then(|| Message {
                role: "assistant",
                content: (!has_calls || !content.is_empty()).then_some(content),
                refusal: (),
                tool_calls,
            }),
            logprobs: logprobs.map(|logprobs| self.logprobs(logprobs)),
            finish_reason: finish_reason(answer.finish_reason, has_calls),
            token_ids: &answer.token_ids,
        }
    }

    /// What comes before the first piece.
    pub fn begin(&self, choices: usize) -> Vec<String> {
        match self.shape.endpoint {
            Endpoint::Completion => Vec::new(),
            Endpoint::Chat => {
                let role = |index| {
                    let delta = Delta {
                        role: Some("assistant"),
                        content: Some(""),
                        tool_calls: Vec::new(),
                    };
                    self.part(PartChoice {
                        index,
                        text: None,
                        delta: Some(delta),
                        logprobs: None,
                        finish_reason: None,
                        token_ids: &[],
                    })
                };
                (0..choices).map(role).collect()
            }
        }
    }

    /// A piece of a choice.
    pub fn piece(&self, index: usize, mut piece: Piece, choice: &mut Choice) -> Vec<String> {
        let calls = choice.tell(&mut piece);
        self.told(index, &piece, calls, choice)
    }

    /// The last of a choice that has ended; `before` is told with it.
    pub fn last(&self, index: usize, before: Option<Piece>, choice: &mut Choice) -> Vec<String> {
        let Some(answer) = &choice.answer else {
            return Vec::new();
        };
        let reason = answer.finish_reason;
        let mut piece = choice.rest(answer, before.unwrap_or_default());
        let calls = choice.tell_last(&mut piece);
        let mut written = self.told(index, &piece, calls, choice);
        let is_chat = self.shape.endpoint == Endpoint::Chat;
        written.push(self.part(PartChoice {
            index,
            text: (!is_chat).then_some(""),
            delta: is_chat.then(Delta::default),
            logprobs: None,
            finish_reason: Some(finish_reason(reason, choice.told_calls > 0)),
            token_ids: &[],
        }));
        written
    }

    fn told(
        &self,
        index: usize,
        piece: &Piece,
        calls: Vec<ToolCall>,
        choice: &mut Choice,
    ) -> Vec<String> {
        let mut written = Vec::new();
        if !piece.is_empty() {
            written.push(self.content(index, piece));
        }
        for call in calls {
            let call = self.call(index, choice.told_calls, call, Frame::Part);
            choice.told_calls += 1;
            written.push(self.part(PartChoice {
                index,
                text: None,
                delta: Some(Delta {
                    tool_calls: vec![call],
                    ..Delta::default()
                }),
                logprobs: None,
                finish_reason: None,
                token_ids: &[],
            }));
        }
        written
    }

    fn call(&self, choice: usize, number: usize, call: ToolCall, frame: Frame) -> WrittenCall {
        let Shape { started_s, id, .. } = self.shape;
        WrittenCall {
            index: (frame == Frame::Part).then_some(number),
            id: format!("call_{started_s:x}{id:x}_{choice}_{number}"),
            kind: "function",
            function: WrittenFunction {
                name: call.name,
                arguments: call.arguments,
            },
        }
    }

    /// What comes after the last choice has ended.
    pub fn end(&self, choices: &[Choice]) -> Vec<String> {
        let mut written = Vec::new();
        if self.shape.include_usage {
            let usage = Some(Some(self.usage(choices)));
            written.push(self.frame::<PartChoice>(self.part_object(), Vec::new(), usage));
        }
        written.push(DONE.to_owned());
        written
    }

    fn content(&self, index: usize, piece: &Piece) -> String {
        let is_chat = self.shape.endpoint == Endpoint::Chat;
        let text = piece.text.as_str();
        self.part(PartChoice {
            index,
            text: (!is_chat).then_some(text),
            delta: is_chat.then_some(Delta {
                content: Some(text),
                ..Delta::default()
            }),
            logprobs: (!piece.logprobs.is_empty()).then(|| self.logprobs(&piece.logprobs)),
            finish_reason: None,
            token_ids: &piece.token_ids,
        })
    }

    fn part(&self, choice: PartChoice<'_>) -> String {
        // With the count of tokens to come, every piece says that it is not there yet.
        let usage = self.shape.include_usage.then_some(None);
        self.frame(self.part_object(), vec![choice], usage)
    }

    fn part_object(&self) -> &'static str {
        match self.shape.endpoint {
            Endpoint::Completion => "text_completion",
            Endpoint::Chat => "chat.completion.chunk",
        }
    }

    fn frame<C: Serialize>(
        &self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Option<Usage>>,
    ) -> String {
        let whole = Whole {
            id: &self.id,
            object,
            created: self.shape.created_s,
            model: &self.shape.model,
            system_fingerprint: &self.shape.fingerprint,
            choices,
            usage,
        };
        serde_json::to_string(&whole).expect("keys are strings and memory takes any bytes")
    }

    fn logprobs<'a>(&self, entries: &'a [TokenLogprob]) -> Logprobs<'a> {
        match self.shape.endpoint {
            Endpoint::Completion => Logprobs::completion(entries),
            Endpoint::Chat => Logprobs::chat(entries),
        }
    }

    /// A prompt counts once, however many choices it has.
    fn usage(&self, choices: &[Choice]) -> Usage {
        let answers = || choices.iter().filter_map(|choice| choice.answer.as_ref());
        let prompt_tokens = answers()
            .step_by(self.shape.choices_per_prompt.max(1))
            .map(|answer| answer.prompt_tokens)
            .sum();
        let completion_tokens = answers().map(|answer| answer.token_ids.len()).sum();
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

/// An answer that calls tools ends for that reason, unless it was cut off.
fn finish_reason(reason: FinishReason, has_calls: bool) -> &'static str {
    match (reason, has_calls) {
        (FinishReason::Stop, true) => "tool_calls",
        _ => reason.as_str(),
    }
}
