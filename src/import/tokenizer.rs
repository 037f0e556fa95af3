//! `tokenizer.json` and `tokenizer_config.json` from the vocabulary in the metadata.
//!
//! Separate because it knows a third format: that of the Hugging Face `tokenizers` library. GGUF names the rules that
//! cut text into words (`tokenizer.ggml.pre`) but does not contain them; they stand here as the published
//! `tokenizer.json` of each family has them. The result is loaded once before it counts.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::ModelError;
use super::gguf::{Metadata, required};

/// Tokens a chat template may end a turn with. Generation ends there too, even if they are not the file's
/// end-of-sequence token.
const TURN_ENDS: [&str; 2] = ["<|im_end|>", "<|eot_id|>"];

/// How Qwen 2 cuts words: as Llama 3, but every digit alone.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How Llama 3 cuts words.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The families of byte-level BPE, by the name GGUF gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Words {
    Gpt2,
    SmolLm,
    Qwen2,
    Llama3,
}

impl Words {
    const ALL: [Words; 4] = [Words::Gpt2, Words::SmolLm, Words::Qwen2, Words::Llama3];

    /// The value of `tokenizer.ggml.pre`.
    fn name(self) -> &'static str {
        match self {
            Words::Gpt2 => "gpt-2",
            Words::SmolLm => "smollm",
            Words::Qwen2 => "qwen2",
            Words::Llama3 => "llama-bpe",
        }
    }

    fn pre_tokenizer(self) -> Value {
        match self {
            Words::Gpt2 => byte_level(false, true, true),
            Words::SmolLm => sequence(
                "pretokenizers",
                vec![
                    json!({"type": "Digits", "individual_digits": true}),
                    byte_level(false, true, true),
                ],
            ),
            Words::Qwen2 => split(QWEN2_WORDS, byte_level(false, false, false)),
            Words::Llama3 => split(LLAMA3_WORDS, byte_level(false, true, false)),
        }
    }

    fn normalizer(self) -> Value {
        match self {
            Words::Qwen2 => json!({"type": "NFC"}),
            Words::Gpt2 | Words::SmolLm | Words::Llama3 => Value::Null,
        }
    }

    /// What happens to the ids before begin and end tokens are put around them; it only moves offsets.
    fn post_processor(self) -> Option<Value> {
        match self {
            Words::Gpt2 | Words::Llama3 => Some(byte_level(true, false, true)),
            Words::Qwen2 => Some(byte_level(false, false, false)),
            Words::SmolLm => None,
        }
    }

    fn decoder(self) -> Value {
        match self {
            Words::Qwen2 => byte_level(false, false, false),
            Words::Gpt2 | Words::SmolLm | Words::Llama3 => byte_level(true, true, true),
        }
    }

    /// A word that is a token is taken whole, whatever the merges say.
    fn ignores_merges(self) -> bool {
        self == Words::Llama3
    }

    /// Whether text starts with the begin token when the file does not say.
    fn adds_bos(self) -> bool {
        self == Words::Llama3
    }
}

fn byte_level(add_prefix_space: bool, trim_offsets: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    })
}

fn sequence(field: &str, steps: Vec<Value>) -> Value {
    json!({"type": "Sequence", field: steps})
}

fn split(regex: &str, then: Value) -> Value {
    let split = json!({
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": false,
    });
    sequence("pretokenizers", vec![split, then])
}

/// What a token is, from `tokenizer.ggml.token_type` (`enum llama_token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Part of ordinary text.
    Normal,
    /// Never comes from ordinary text, and is not shown: `<|im_end|>`.
    Special,
    /// Recognised whole in text, and shown.
    UserDefined,
    /// Fills the vocabulary up to the embedding's rows; no text makes it and it makes no text.
    Unused,
}

/// The ids with a role, each below the vocabulary's size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Begin of text.
    pub bos: Option<usize>,
    /// End of text.
    pub eos: Option<usize>,
    /// Stands for what has no token.
    pub unknown: Option<usize>,
    /// Padding.
    pub padding: Option<usize>,
    /// Ends of a turn or a message, apart from `eos`.
    pub turn_ends: Vec<usize>,
}

impl SpecialIds {
    /// The keys of `config.json` for those that are there.
    pub fn by_config_key(&self) -> impl Iterator<Item = (&'static str, usize)> {
        [
            ("bos_token_id", self.bos),
            ("eos_token_id", self.eos),
            ("pad_token_id", self.padding),
        ]
        .into_iter()
        .filter_map(|(key, id)| Some((key, id?)))
    }

    /// Every id that ends generation, `eos` first, none twice.
    pub fn ends(&self) -> Vec<usize> {
        let mut ends = Vec::new();
        for id in self.eos.iter().chain(&self.turn_ends) {
            if !ends.contains(id) {
                ends.push(*id);
            }
        }
        ends
    }
}

/// The vocabulary of a GGUF file, checked.
#[derive(Debug)]
pub struct Vocabulary<'a> {
    tokens: &'a [&'a str],
    kinds: Vec<Kind>,
    merges: Vec<(&'a str, &'a str)>,
    words: Words,
    adds_bos: bool,
    adds_eos: bool,
    chat_template: Option<&'a str>,
    /// The ids with a role.
    pub ids: SpecialIds,
    /// What the file has and the checkpoint will not.
    pub warnings: Vec<String>,
}

impl<'a> Vocabulary<'a> {
    /// Reads the `tokenizer.*` keys. `row_count` is the embedding's.
    ///
    /// # Errors
    /// A kind of tokenizer that is not imported; keys that are missing or contradict each other.
    pub fn read(metadata: &'a Metadata<'a>, row_count: usize) -> Result<Self, ModelError> {
        check_model(metadata)?;
        let words = words(metadata)?;
        let key = "tokenizer.ggml.tokens";
        let tokens = required(key, metadata.texts(key)?)?;
        if tokens.len() > row_count {
            return Err(bad(format!(
                "{} tokens, but the embedding has {row_count} rows",
                tokens.len()
            )));
        }
        let kinds = kinds(metadata, tokens.len())?;
        let ids_by_token = index(tokens)?;
        let merges = merges(metadata, &ids_by_token)?;
        let chat_template = metadata.text("tokenizer.chat_template")?;
        let mut ids = special_ids(metadata, tokens.len())?;
        for end in TURN_ENDS {
            let Some(&id) = ids_by_token.get(end) else {
                continue;
            };
            if kinds.get(id) == Some(&Kind::Special)
                && chat_template.is_some_and(|text| text.contains(end))
            {
                ids.turn_ends.push(id);
            }
        }
        let flag = |key: &str| metadata.flag(key);
        Ok(Vocabulary {
            tokens,
            kinds,
            merges,
            words,
            adds_bos: flag("tokenizer.ggml.add_bos_token")?.unwrap_or(words.adds_bos()),
            adds_eos: flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            chat_template,
            ids,
            warnings: template_warnings(metadata),
        })
    }

    /// The contents of `tokenizer.json`.
    pub fn tokenizer(&self) -> Value {
        let vocab: Map<String, Value> = self
            .used()
            .map(|(id, token, _)| (token.to_owned(), json!(id)))
            .collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added().map(|(id, token, kind)| {
                let mut entry = added_token(token, kind);
                entry.insert("id".into(), json!(id));
                Value::Object(entry)
            }).collect::<Vec<_>>(),
            "normalizer": self.words.normalizer(),
            "pre_tokenizer": self.words.pre_tokenizer(),
            "post_processor": self.post_processor(),
            "decoder": self.words.decoder(),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": self.words.ignores_merges(),
                "vocab": vocab,
                "merges": self.merges,
            },
        })
    }

    /// The contents of `tokenizer_config.json`.
    pub fn tokenizer_config(&self, context_length: usize) -> Value {
        let mut config = Map::new();
        config.insert("add_bos_token".into(), json!(self.adds_bos));
        config.insert("add_eos_token".into(), json!(self.adds_eos));
        config.insert("add_prefix_space".into(), json!(false));
        let decoder: Map<String, Value> = self
            .added()
            .map(|(id, token, kind)| (id.to_string(), Value::Object(added_token(token, kind))))
            .collect();
        config.insert("added_tokens_decoder".into(), Value::Object(decoder));
        for (key, id) in [
            ("bos_token", self.ids.bos),
            ("eos_token", self.ids.eos),
            ("unk_token", self.ids.unknown),
            ("pad_token", self.ids.padding),
        ] {
            if let Some(token) = id.and_then(|id| self.tokens.get(id)) {
                config.insert(key.into(), json!(token));
            }
        }
        if let Some(template) = self.chat_template {
            config.insert("chat_template".into(), json!(template));
        }
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        config.insert("model_max_length".into(), json!(context_length));
        // The class that takes tokenizer.json as it is; the families' own classes rebuild parts of it.
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        Value::Object(config)
    }

    /// Loads `tokenizer.json` as its readers will, and looks up every token.
    ///
    /// # Errors
    /// The library refuses it, or gives a token another id.
    pub fn verify(&self, tokenizer_json: &[u8]) -> Result<(), ModelError> {
        let tokenizer = tokenizers::Tokenizer::from_bytes(tokenizer_json).map_err(|error| {
            bad(format!(
                "the tokenizers library refuses the result: {error}"
            ))
        })?;
        for (id, token, _) in self.used() {
            let found = u32::try_from(id)
                .ok()
                .and_then(|id| tokenizer.id_to_token(id));
            if found.as_deref() != Some(token) {
                return Err(bad(format!(
                    "token {id} is {token:?}, but the result reads it as {found:?}"
                )));
            }
        }
        Ok(())
    }

    /// Id, text and kind of every token that text can contain.
    fn used(&self) -> impl Iterator<Item = (usize, &'a str, Kind)> {
        self.tokens
            .iter()
            .zip(&self.kinds)
            .enumerate()
            .map(|(id, (token, kind))| (id, *token, *kind))
            .filter(|(_, _, kind)| *kind != Kind::Unused)
    }

    /// Those that are recognised before words are cut.
    fn added(&self) -> impl Iterator<Item = (usize, &'a str, Kind)> {
        self.used().filter(|(_, _, kind)| *kind != Kind::Normal)
    }

    fn post_processor(&self) -> Value {
        let begin = self.ids.bos.filter(|_| self.adds_bos);
        let end = self.ids.eos.filter(|_| self.adds_eos);
        let template = (begin.is_some() || end.is_some()).then(|| self.template(begin, end));
        match (self.words.post_processor(), template) {
            (Some(step), Some(template)) => sequence("processors", vec![step, template]),
            (Some(step), None) => step,
            (None, Some(template)) => template,
            (None, None) => Value::Null,
        }
    }

    /// Puts `begin` before and `end` behind each text.
    fn template(&self, begin: Option<usize>, end: Option<usize>) -> Value {
        let text = |id: usize| self.tokens.get(id).copied().unwrap_or_default();
        let special = |id: Option<usize>, type_id: usize| {
            id.map(|id| json!({"SpecialToken": {"id": text(id), "type_id": type_id}}))
        };
        let around = |name: &str, type_id: usize| {
            let sequence = json!({"Sequence": {"id": name, "type_id": type_id}});
            [
                special(begin, type_id),
                Some(sequence),
                special(end, type_id),
            ]
        };
        let single: Vec<Value> = around("A", 0).into_iter().flatten().collect();
        let pair: Vec<Value> = around("A", 0)
            .into_iter()
            .chain(around("B", 1))
            .flatten()
            .collect();
        let special_tokens: Map<String, Value> = [begin, end]
            .into_iter()
            .flatten()
            .map(|id| {
                let entry = json!({"id": text(id), "ids": [id], "tokens": [text(id)]});
                (text(id).to_owned(), entry)
            })
            .collect();
        json!({
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": special_tokens,
        })
    }
}

fn added_token(token: &str, kind: Kind) -> Map<String, Value> {
    let mut entry = Map::new();
    entry.insert("content".into(), json!(token));
    for field in ["single_word", "lstrip", "rstrip", "normalized"] {
        entry.insert(field.into(), json!(false));
    }
    entry.insert("special".into(), json!(kind == Kind::Special));
    entry
}

fn bad(problem: String) -> ModelError {
    ModelError::Tokenizer { problem }
}

fn check_model(metadata: &Metadata<'_>) -> Result<(), ModelError> {
    let key = "tokenizer.ggml.model";
    match required(key, metadata.text(key)?)? {
        "gpt2" => {}
        other => return Err(unsupported(key, other, "gpt2 (byte-level BPE)")),
    }
    let key = "tokenizer.ggml.add_space_prefix";
    match metadata.flag(key)? {
        Some(true) => Err(unsupported(key, "true", "false for a byte-level BPE")),
        _ => Ok(()),
    }
}

fn unsupported(key: &str, value: &str, expected: &str) -> ModelError {
    ModelError::Value {
        key: key.to_owned(),
        value: value.to_owned(),
        expected: expected.to_owned(),
    }
}

fn words(metadata: &Metadata<'_>) -> Result<Words, ModelError> {
    let key = "tokenizer.ggml.pre";
    let found = required(key, metadata.text(key)?)?;
    Words::ALL
        .into_iter()
        .find(|words| words.name() == found)
        .ok_or_else(|| {
            unsupported(
                key,
                found,
                &format!("one of {}", Words::ALL.map(Words::name).join(", ")),
            )
        })
}

fn kinds(metadata: &Metadata<'_>, token_count: usize) -> Result<Vec<Kind>, ModelError> {
    let key = "tokenizer.ggml.token_type";
    let types = required(key, metadata.integers(key)?)?;
    if types.len() != token_count {
        let problem = format!("{} token types for {token_count} tokens", types.len());
        return Err(bad(problem));
    }
    let kind = |(id, token_type): (usize, i64)| match token_type {
        1 => Ok(Kind::Normal),
        // The unknown token is never made from text either.
        2 | 3 => Ok(Kind::Special),
        4 => Ok(Kind::UserDefined),
        5 => Ok(Kind::Unused),
        6 => Err(bad(format!(
            "token {id} has type 6 (byte), which byte-level BPE has no place for"
        ))),
        other => Err(bad(format!("token {id} has type {other}, expected 1 to 6"))),
    };
    types.into_iter().enumerate().map(kind).collect()
}

/// Ids by text.
fn index<'a>(tokens: &[&'a str]) -> Result<HashMap<&'a str, usize>, ModelError> {
    let mut ids = HashMap::new();
    for (id, token) in tokens.iter().enumerate() {
        if let Some(first) = ids.insert(*token, id) {
            return Err(bad(format!("tokens {first} and {id} are both {token:?}")));
        }
    }
    Ok(ids)
}

/// The merges in order of rank, each of two tokens that make a third.
fn merges<'a>(
    metadata: &'a Metadata<'a>,
    ids: &HashMap<&str, usize>,
) -> Result<Vec<(&'a str, &'a str)>, ModelError> {
    let key = "tokenizer.ggml.merges";
    let lines = required(key, metadata.texts(key)?)?;
    let pair = |(rank, line): (usize, &&'a str)| {
        let (left, right) = line
            .split_once(' ')
            .ok_or_else(|| bad(format!("merge {rank}, {line:?}, is not two tokens")))?;
        let merged = [left, right].concat();
        for token in [left, right, &merged] {
            if !ids.contains_key(token) {
                let problem =
                    format!("merge {rank}, {line:?}, needs {token:?}, which is not a token");
                return Err(bad(problem));
            }
        }
        Ok((left, right))
    };
    lines.iter().enumerate().map(pair).collect()
}

fn special_ids(metadata: &Metadata<'_>, token_count: usize) -> Result<SpecialIds, ModelError> {
    let id = |role: &str| -> Result<Option<usize>, ModelError> {
        let key = format!("tokenizer.ggml.{role}_token_id");
        match metadata.count(&key)? {
            Some(id) if id >= token_count => Err(ModelError::Value {
                key,
                value: id.to_string(),
                expected: format!("an id below {token_count}, the number of tokens"),
            }),
            id => Ok(id),
        }
    };
    Ok(SpecialIds {
        bos: id("bos")?,
        eos: id("eos")?,
        unknown: id("unknown")?,
        padding: id("padding")?,
        turn_ends: [id("eot")?, id("eom")?].into_iter().flatten().collect(),
    })
}

/// `tokenizer_config.json` gets the default template only.
fn template_warnings(metadata: &Metadata<'_>) -> Vec<String> {
    let mut names: Vec<&str> = metadata
        .keys()
        .filter_map(|key| key.strip_prefix("tokenizer.chat_template."))
        .collect();
    names.sort_unstable();
    match names.as_slice() {
        [] => Vec::new(),
        _ => vec![format!(
            "only the default chat template is imported, not {}",
            names.join(", ")
        )],
    }
}
