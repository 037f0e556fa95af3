//! A JSON body of the OpenAI API, field by field.
//!
//! Separate from the reader because a line of a file and the body of an HTTP request are the same thing. Three kinds of
//! fields exist: those that are understood; those that are known and would change the answer, which are refused unless
//! they hold the value that changes nothing; and those that cannot change the answer, which are ignored. A field of no
//! kind is refused too: most often it is one of the first kind, misspelt.

use serde_json::{Map, Value};
use std::collections::BTreeMap;

use super::conversation::chat;
use super::fields::{
    Fields, found, is_empty_array, missing, shorten, string, wrong_type, wrong_value,
};
use super::json;
use super::{Endpoint, Prompt, Rejection, RejectionCode, Sampling};

/// How many stop texts a request may name. OpenAI allows 4; templates with several end markers need more.
pub const STOP_COUNT_MAX: usize = 16;

/// How long a stop text may be: each is held, with nine times its size, by every sequence.
pub const STOP_BYTES_MAX: usize = 1024;

/// How many answers a request may ask for, over all its prompts, as in OpenAI's API.
pub const CHOICE_COUNT_MAX: usize = 128;

/// How many tokens a request may bias: they travel with every step. As many as OpenAI's API allows.
pub const BIAS_COUNT_MAX: usize = 300;

/// How many likely tokens may be reported for each place, as in OpenAI's chat endpoint.
pub const TOP_LOGPROBS_MAX: u8 = 20;

/// A request as its body says it, not yet tied to a line or a connection.
#[derive(Clone, Debug, PartialEq)]
pub struct Body {
    /// Which endpoint the body is for.
    pub endpoint: Endpoint,
    /// What to continue, at least one; more than one beside `prompt` only.
    pub prompts: Vec<Prompt>,
    /// Answers to each prompt, from 1 to [`CHOICE_COUNT_MAX`].
    pub choices: usize,
    /// How to continue them; every value is inside its range.
    pub sampling: Sampling,
    /// Whether the answer was asked for piece by piece. That does not change it, so a file may say so and is answered
    /// with whole lines all the same.
    pub stream: bool,
    /// Whether an answer in pieces is to end with the count of its tokens.
    pub include_usage: bool,
}

impl Body {
    /// Reads the body of a request for `endpoint`; with `None`, the body itself says which (`messages` or `prompt`).
    ///
    /// Fields that are absent or `null` take their value from `defaults`.
    ///
    /// # Errors
    ///
    /// A [`Rejection`] that names the field, what was expected and what was found.
    pub fn parse(
        bytes: &[u8],
        endpoint: Option<Endpoint>,
        defaults: &Sampling,
    ) -> Result<Body, Rejection> {
        match json::parse(bytes, 0)? {
            Value::Object(fields) => Body::from_fields(fields, endpoint, defaults),
            other => Err(Rejection::new(
                RejectionCode::InvalidType,
                format!("the body must be a JSON object, found {}", found(&other)),
            )),
        }
    }

    /// As [`Body::parse`], for an object that is parsed already.
    ///
    /// # Errors
    ///
    /// As [`Body::parse`].
    pub fn from_fields(
        fields: Map<String, Value>,
        endpoint: Option<Endpoint>,
        defaults: &Sampling,
    ) -> Result<Body, Rejection> {
        let mut fields = Fields(fields);
        let endpoint = fields.endpoint(endpoint)?;
        fields.refuse_unsupported()?;
        let prompts = match endpoint {
            Endpoint::Completion => prompts(fields.required("prompt")?)?,
            Endpoint::Chat => vec![Prompt::Chat(chat(&mut fields)?)],
        };
        let choices = choices(&mut fields, prompts.len())?;
        let sampling = sampling(&mut fields, endpoint, defaults)?;
        if endpoint == Endpoint::Completion {
            fields.refuse_tools()?;
        }
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let include_usage = include_usage(&mut fields)?;
        fields.refuse_unknown()?;
        Ok(Body {
            endpoint,
            prompts,
            choices,
            sampling,
            stream,
            include_usage,
        })
    }

    /// The one prompt, and how to continue it: what a line of a file may ask for.
    ///
    /// # Errors
    ///
    /// A [`Rejection`] of what has more than one answer.
    pub fn single(self) -> Result<(Prompt, Sampling), Rejection> {
        let unsupported = |field: &str, message: String| {
            Err(Rejection::of_field(
                RejectionCode::UnsupportedField,
                field,
                message,
            ))
        };
        if self.choices > 1 {
            return unsupported(
                "n",
                format!(
                    "`n` must be 1 in a line, found {}; repeat the line, or use `mlx-pipe serve`",
                    self.choices
                ),
            );
        }
        if let Some(Prompt::Chat(chat)) = self.prompts.first()
            && !chat.tools.is_empty()
        {
            let message = "`tools` are not supported in a line; use `mlx-pipe serve`, which reads calls out of answers";
            return unsupported("tools", message.into());
        }
        let [prompt] = match <[Prompt; 1]>::try_from(self.prompts) {
            Ok(prompts) => prompts,
            Err(prompts) => {
                return unsupported(
                    "prompt",
                    format!(
                        "`prompt` holds {} prompts; give each a line of its own",
                        prompts.len()
                    ),
                );
            }
        };
        Ok((prompt, self.sampling))
    }
}

impl Sampling {
    /// Checks every value against its range; the command line's defaults go through here as well.
    ///
    /// # Errors
    ///
    /// A [`Rejection`] that names the first field out of range, the range, and the value.
    pub fn validate(&self) -> Result<(), Rejection> {
        let out_of_range = |field: &str, expected: &str, value: &dyn std::fmt::Display| {
            Err(Rejection::of_field(
                RejectionCode::InvalidValue,
                field,
                format!("`{field}` must be {expected}, found {value}"),
            ))
        };
        if self.max_tokens == 0 {
            return out_of_range("max_tokens", "1 or more", &self.max_tokens);
        }
        if !(0.0..=2.0).contains(&self.temperature) {
            return out_of_range("temperature", "between 0 and 2", &self.temperature);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return out_of_range("top_p", "above 0 and at most 1", &self.top_p);
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return out_of_range("min_p", "between 0 and 1", &self.min_p);
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return out_of_range(
                "repetition_penalty",
                "a finite number above 0",
                &self.repetition_penalty,
            );
        }
        for (field, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            if !(-2.0..=2.0).contains(&penalty) {
                return out_of_range(field, "between -2 and 2", &penalty);
            }
        }
        if self.logit_bias.len() > BIAS_COUNT_MAX {
            let most = format!("about at most {BIAS_COUNT_MAX} tokens");
            return out_of_range("logit_bias", &most, &self.logit_bias.len());
        }
        let wrong = |(_, bias): &&(u32, f32)| !(-100.0..=100.0).contains(bias);
        if let Some((_, bias)) = self.logit_bias.iter().find(wrong) {
            return out_of_range("logit_bias", "numbers between -100 and 100", bias);
        }
        if self.stop.len() > STOP_COUNT_MAX {
            return out_of_range(
                "stop",
                &format!("at most {STOP_COUNT_MAX} texts"),
                &self.stop.len(),
            );
        }
        if let Some(long) = self.stop.iter().find(|stop| stop.len() > STOP_BYTES_MAX) {
            let most = format!("texts of at most {STOP_BYTES_MAX} bytes");
            return out_of_range("stop", &most, &format_args!("one of {}", long.len()));
        }
        if self.stop.iter().any(String::is_empty) {
            return out_of_range("stop", "texts that are not empty", &"an empty one");
        }
        match self.logprobs {
            Some(count) if count > TOP_LOGPROBS_MAX => {
                out_of_range("logprobs", &format!("at most {TOP_LOGPROBS_MAX}"), &count)
            }
            _ => Ok(()),
        }
    }
}

/// Fields that cannot change the answer: they name, bill, store or route the request.
const HARMLESS: &[&str] = &[
    "metadata",
    "model",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
];

/// Fields that would change the answer: the name, what it may hold, in words, and the test for that.
type Unsupported = (&'static str, &'static str, fn(&Value) -> bool);
const UNSUPPORTED: &[Unsupported] = &[
    ("functions", "[]", is_empty_array),
    ("function_call", "\"none\" or \"auto\"", is_none_or_auto),
    ("echo", "false", is_false),
    ("suffix", "\"\"", |value| value == ""),
    ("response_format", "{\"type\": \"text\"}", |value| {
        value.get("type").is_some_and(|kind| kind == "text")
    }),
    ("modalities", "[\"text\"]", |value| {
        value
            .as_array()
            .is_some_and(|kinds| kinds.iter().all(|kind| kind == "text"))
    }),
    ("audio", "null", Value::is_null),
    ("reasoning_effort", "null", Value::is_null),
    ("verbosity", "\"medium\"", |value| value == "medium"),
    ("web_search_options", "null", Value::is_null),
    ("ignore_eos", "false", is_false),
    ("min_tokens", "0", is_zero),
    ("stop_token_ids", "[]", is_empty_array),
];

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_false(value: &Value) -> bool {
    value == &Value::Bool(false)
}

fn is_none_or_auto(value: &Value) -> bool {
    value == "none" || value == "auto"
}

/// What a body's fields are together.
impl Fields {
    /// The endpoint that the prompt's field names; it must be `wanted` if that is known.
    fn endpoint(&self, wanted: Option<Endpoint>) -> Result<Endpoint, Rejection> {
        let has = |name| {
            self.0
                .get(name)
                .is_some_and(|value: &Value| !value.is_null())
        };
        let named = match (has("prompt"), has("messages")) {
            (true, false) => Endpoint::Completion,
            (false, true) => Endpoint::Chat,
            (true, true) => {
                return Err(Rejection::of_field(
                    RejectionCode::InvalidValue,
                    "messages",
                    "the body has both `prompt` and `messages`; expected one of them",
                ));
            }
            (false, false) => return Err(missing_prompt(wanted)),
        };
        match wanted {
            Some(wanted) if wanted != named => Err(Rejection::of_field(
                RejectionCode::InvalidValue,
                prompt_field(named),
                format!(
                    "a body for {} has `{}`, found `{}`",
                    wanted.url(),
                    prompt_field(wanted),
                    prompt_field(named)
                ),
            )),
            _ => Ok(named),
        }
    }

    fn refuse_unsupported(&mut self) -> Result<(), Rejection> {
        self.refuse(UNSUPPORTED)
    }

    /// Tools belong to chats.
    fn refuse_tools(&mut self) -> Result<(), Rejection> {
        self.take("parallel_tool_calls");
        self.refuse(&[
            ("tools", "[]", is_empty_array),
            ("tool_choice", "\"none\" or \"auto\"", is_none_or_auto),
        ])
    }

    fn refuse(&mut self, unsupported: &[Unsupported]) -> Result<(), Rejection> {
        for (name, neutral, is_neutral) in unsupported {
            if let Some(value) = self.take(name)
                && !is_neutral(&value)
            {
                let message = format!(
                    "`{name}` would change the answer and is not supported; leave it out or set it to {neutral}, found {}",
                    found(&value)
                );
                return Err(Rejection::of_field(
                    RejectionCode::UnsupportedField,
                    name,
                    message,
                ));
            }
        }
        Ok(())
    }

    /// Refuses what is left, once everything known was taken.
    pub(super) fn refuse_unknown(&self) -> Result<(), Rejection> {
        match self
            .0
            .keys()
            .find(|name| !HARMLESS.contains(&name.as_str()))
        {
            None => Ok(()),
            Some(name) => {
                let shown = shorten(name);
                let message =
                    format!("`{shown}` is not a known field; correct its name or leave it out");
                Err(Rejection::of_field(
                    RejectionCode::UnknownField,
                    &shown,
                    message,
                ))
            }
        }
    }
}

fn prompt_field(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::Completion => "prompt",
        Endpoint::Chat => "messages",
    }
}

fn missing_prompt(wanted: Option<Endpoint>) -> Rejection {
    match wanted {
        Some(endpoint) => missing(
            prompt_field(endpoint),
            &format!("`{}` is missing", prompt_field(endpoint)),
        ),
        None => missing(
            "prompt",
            "there is neither `prompt` nor `messages`; expected one of them",
        ),
    }
}

fn sampling(
    fields: &mut Fields,
    endpoint: Endpoint,
    defaults: &Sampling,
) -> Result<Sampling, Rejection> {
    let sampling = Sampling {
        max_tokens: max_tokens(fields)?.unwrap_or(defaults.max_tokens),
        temperature: fields
            .number("temperature")?
            .unwrap_or(defaults.temperature),
        top_p: fields.number("top_p")?.unwrap_or(defaults.top_p),
        top_k: top_k(fields)?.unwrap_or(defaults.top_k),
        min_p: fields.number("min_p")?.unwrap_or(defaults.min_p),
        repetition_penalty: fields
            .number("repetition_penalty")?
            .unwrap_or(defaults.repetition_penalty),
        presence_penalty: fields
            .number("presence_penalty")?
            .unwrap_or(defaults.presence_penalty),
        frequency_penalty: fields
            .number("frequency_penalty")?
            .unwrap_or(defaults.frequency_penalty),
        logit_bias: match logit_bias(fields)? {
            Some(bias) => bias,
            None => defaults.logit_bias.clone(),
        },
        seed: seed(fields)?.or(defaults.seed),
        stop: stop(fields)?.unwrap_or_else(|| defaults.stop.clone()),
        logprobs: match endpoint {
            Endpoint::Completion => completion_logprobs(fields, defaults.logprobs)?,
            Endpoint::Chat => chat_logprobs(fields, defaults.logprobs)?,
        },
    };
    sampling.validate()?;
    Ok(sampling)
}

/// `max_tokens` and OpenAI's newer name for it; both at once must agree.
fn max_tokens(fields: &mut Fields) -> Result<Option<usize>, Rejection> {
    let old = fields.integer("max_tokens", 1, i64::MAX)?;
    let new = fields.integer("max_completion_tokens", 1, i64::MAX)?;
    if let (Some(old), Some(new)) = (old, new)
        && old != new
    {
        let message =
            format!("`max_tokens` is {old} and `max_completion_tokens` is {new}; give one of them");
        return Err(Rejection::of_field(
            RejectionCode::InvalidValue,
            "max_completion_tokens",
            message,
        ));
    }
    Ok(old
        .or(new)
        .map(|count| usize::try_from(count).unwrap_or(usize::MAX)))
}

/// `{"token id": bias}`, ordered by token.
fn logit_bias(fields: &mut Fields) -> Result<Option<Vec<(u32, f32)>>, Rejection> {
    let biases = match fields.take("logit_bias") {
        None => return Ok(None),
        Some(Value::Object(biases)) => biases,
        Some(other) => {
            let expected = "an object of token ids and numbers";
            return Err(wrong_type("logit_bias", expected, &other));
        }
    };
    let mut read = BTreeMap::new();
    for (name, bias) in biases {
        let at = format!("logit_bias.{}", shorten(&name));
        let id = name
            .parse::<u32>()
            .map_err(|_| wrong_type(&at, "named by a token id", &Value::String(name)))?;
        let number = bias
            .as_f64()
            .ok_or_else(|| wrong_type(&at, "a number", &bias))?;
        read.insert(id, number as f32);
    }
    Ok(Some(read.into_iter().collect()))
}

/// 0 keeps every candidate, and so does -1, which other servers use for it.
fn top_k(fields: &mut Fields) -> Result<Option<u32>, Rejection> {
    let top_k = fields.integer("top_k", -1, i64::from(u32::MAX))?;
    Ok(top_k.map(|count| u32::try_from(count).unwrap_or(0)))
}

/// Any 64-bit integer; a negative one stands for its two's complement.
fn seed(fields: &mut Fields) -> Result<Option<u64>, Rejection> {
    let Some(value) = fields.take("seed") else {
        return Ok(None);
    };
    let seed = value
        .as_u64()
        .or_else(|| value.as_i64().map(i64::cast_unsigned));
    seed.map(Some)
        .ok_or_else(|| wrong_type("seed", "a 64-bit integer", &value))
}

fn stop(fields: &mut Fields) -> Result<Option<Vec<String>>, Rejection> {
    match fields.take("stop") {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(vec![text])),
        Some(Value::Array(texts)) => {
            let numbered = texts.into_iter().enumerate();
            numbered
                .map(|(i, text)| string(&format!("stop[{i}]"), text))
                .collect::<Result<_, _>>()
                .map(Some)
        }
        Some(other) => Err(wrong_type(
            "stop",
            "a string or an array of strings",
            &other,
        )),
    }
}

fn completion_logprobs(fields: &mut Fields, default: Option<u8>) -> Result<Option<u8>, Rejection> {
    if fields.0.get("logprobs").is_some_and(Value::is_boolean) {
        let message = "`logprobs` is an integer beside `prompt` (how many likely tokens to report), found a boolean";
        return Err(Rejection::of_field(
            RejectionCode::InvalidType,
            "logprobs",
            message,
        ));
    }
    Ok(top_logprobs(fields, "logprobs")?.or(default))
}

fn chat_logprobs(fields: &mut Fields, default: Option<u8>) -> Result<Option<u8>, Rejection> {
    let wanted = fields.boolean("logprobs")?;
    let top = top_logprobs(fields, "top_logprobs")?;
    match (wanted, top) {
        (Some(true), top) => Ok(Some(top.unwrap_or(0))),
        (_, Some(_)) => Err(Rejection::of_field(
            RejectionCode::InvalidValue,
            "top_logprobs",
            "`top_logprobs` needs `logprobs` to be true",
        )),
        (Some(false), None) => Ok(None),
        (None, None) => Ok(default),
    }
}

fn top_logprobs(fields: &mut Fields, name: &str) -> Result<Option<u8>, Rejection> {
    let count = fields.integer(name, 0, i64::from(TOP_LOGPROBS_MAX))?;
    Ok(count.and_then(|count| u8::try_from(count).ok()))
}

/// `n`, and `best_of`, which must be the same: all answers are returned.
fn choices(fields: &mut Fields, prompts: usize) -> Result<usize, Rejection> {
    let choices = fields
        .integer("n", 1, CHOICE_COUNT_MAX as i64)?
        .unwrap_or(1);
    if choices as usize * prompts > CHOICE_COUNT_MAX {
        let message = format!(
            "{prompts} prompts with `n` answers each may be at most {CHOICE_COUNT_MAX} answers together, found `n` {choices}"
        );
        return Err(Rejection::of_field(
            RejectionCode::InvalidValue,
            "n",
            message,
        ));
    }
    match fields.integer("best_of", 1, i64::MAX)? {
        Some(best_of) if best_of != choices => Err(Rejection::of_field(
            RejectionCode::UnsupportedField,
            "best_of",
            format!(
                "`best_of` other than `n` is not supported; leave it out or set it to {choices}, found {best_of}"
            ),
        )),
        _ => Ok(choices as usize),
    }
}

fn include_usage(fields: &mut Fields) -> Result<bool, Rejection> {
    match fields.take("stream_options") {
        None => Ok(false),
        Some(Value::Object(options)) => {
            let mut options = Fields(options);
            let wrong = |_| {
                Rejection::of_field(
                    RejectionCode::InvalidType,
                    "stream_options.include_usage",
                    "`stream_options.include_usage` must be true or false",
                )
            };
            Ok(options
                .boolean("include_usage")
                .map_err(wrong)?
                .unwrap_or(false))
        }
        Some(other) => Err(wrong_type("stream_options", "an object", &other)),
    }
}

/// A text, token ids, or an array of either.
fn prompts(value: Value) -> Result<Vec<Prompt>, Rejection> {
    match value {
        Value::String(text) => Ok(vec![Prompt::Text(text)]),
        Value::Array(items) => prompt_array(items),
        other => Err(wrong_type(
            "prompt",
            "a string or an array of token ids",
            &other,
        )),
    }
}

/// Token ids, or an array of prompts.
fn prompt_array(items: Vec<Value>) -> Result<Vec<Prompt>, Rejection> {
    match items.first() {
        None => Err(wrong_value(
            "prompt",
            "at least one token id",
            &Value::Array(items),
        )),
        Some(Value::Number(_)) => Ok(vec![Prompt::Tokens(token_ids("prompt", &items)?)]),
        Some(_) if items.len() > CHOICE_COUNT_MAX => Err(wrong_value(
            "prompt",
            &format!("at most {CHOICE_COUNT_MAX} prompts"),
            &Value::Array(items),
        )),
        Some(Value::String(_) | Value::Array(_)) => {
            let numbered = items.into_iter().enumerate();
            numbered
                .map(|(i, item)| prompt_of_several(&format!("prompt[{i}]"), item))
                .collect()
        }
        Some(other) => Err(wrong_type("prompt[0]", "a token id", other)),
    }
}

fn prompt_of_several(at: &str, item: Value) -> Result<Prompt, Rejection> {
    match item {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) if ids.is_empty() => {
            Err(wrong_value(at, "at least one token id", &Value::Array(ids)))
        }
        Value::Array(ids) => token_ids(at, &ids).map(Prompt::Tokens),
        other => Err(wrong_type(at, "a string or an array of token ids", &other)),
    }
}

fn token_ids(at: &str, items: &[Value]) -> Result<Vec<u32>, Rejection> {
    let id = |(i, item): (usize, &Value)| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong_type(&format!("{at}[{i}]"), "a token id (0 to 4294967295)", item))
    };
    items.iter().enumerate().map(id).collect()
}
