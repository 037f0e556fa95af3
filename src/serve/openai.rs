//! The shapes of answers, whole and in pieces, as in the reference of OpenAI's API. `token_ids` is added to each
//! choice: every sampled id, one that ended the answer included. Types rather than JSON values, so that an f32 is
//! written with the digits of an f32.

use super::answers::Piece;
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
}

/// One choice as far as it is known, and as far as it was told.
#[derive(Debug, Default)]
pub struct Choice {
    told_bytes: usize,
    told_tokens: usize,
    answer: Option<Answer>,
}

impl Choice {
    /// Another piece is told.
    pub fn tell(&mut self, piece: Option<&Piece>) {
        if let Some(piece) = piece {
            self.told_bytes += piece.text.len();
            self.told_tokens += piece.token_ids.len();
        }
    }

    /// The whole of it is known.
    pub fn end(&mut self, answer: Answer) {
        self.answer = Some(answer);
    }

    /// Whether the whole of it is known.
    pub fn has_ended(&self) -> bool {
        self.answer.is_some()
    }

    /// What was not told yet.
    fn rest(&self, answer: &Answer) -> Piece {
        let logprobs = answer.logprobs.as_deref().unwrap_or_default();
        Piece {
            text: answer
                .text
                .get(self.told_bytes..)
                .unwrap_or_default()
                .to_owned(),
            token_ids: answer
                .token_ids
                .get(self.told_tokens..)
                .unwrap_or_default()
                .to_vec(),
            logprobs: logprobs
                .get(self.told_tokens..)
                .unwrap_or_default()
                .to_vec(),
        }
    }
}

/// Writes the answer to one request.
#[derive(Debug)]
pub struct Writer {
    shape: Shape,
    id: String,
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
        let object = match self.shape.endpoint {
            Endpoint::Completion => "text_completion",
            Endpoint::Chat => "chat.completion",
        };
        let written = choices
            .iter()
            .enumerate()
            .filter_map(|(index, choice)| Some(self.whole_choice(index, choice.answer.as_ref()?)));
        let body = self.frame(object, written.collect(), Some(Some(self.usage(choices))));
        ([(CONTENT_TYPE, "application/json")], body).into_response()
    }

    fn whole_choice<'a>(&self, index: usize, answer: &'a Answer) -> WholeChoice<'a> {
        let is_chat = self.shape.endpoint == Endpoint::Chat;
        WholeChoice {
            index,
            text: (!is_chat).then_some(answer.text.as_str()),
            message: is_chat.then(|| Message {
                role: "assistant",
                content: Some(answer.text.clone()),
                refusal: (),
            }),
            logprobs: answer
                .logprobs
                .as_deref()
                .map(|logprobs| self.logprobs(logprobs)),
            finish_reason: finish_reason(answer.finish_reason),
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
    pub fn piece(&self, index: usize, piece: Piece, _choice: &Choice) -> Vec<String> {
        match piece.is_empty() {
            true => Vec::new(),
            false => vec![self.content(index, &piece)],
        }
    }

    /// The last of a choice that has ended; `before` is told with it.
    pub fn last(&self, index: usize, before: Option<Piece>, choice: &Choice) -> Vec<String> {
        let Some(answer) = &choice.answer else {
            return Vec::new();
        };
        let mut piece = before.unwrap_or_default();
        piece.extend(choice.rest(answer));
        let mut written = self.piece(index, piece, choice);
        let is_chat = self.shape.endpoint == Endpoint::Chat;
        written.push(self.part(PartChoice {
            index,
            text: (!is_chat).then_some(""),
            delta: is_chat.then(Delta::default),
            logprobs: None,
            finish_reason: Some(finish_reason(answer.finish_reason)),
            token_ids: &[],
        }));
        written
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
                role: None,
                content: Some(text),
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

fn finish_reason(reason: FinishReason) -> &'static str {
    reason.as_str()
}
