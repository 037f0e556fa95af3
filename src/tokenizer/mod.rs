//! Text to token ids and back.
//!
//! Everything that knows a checkpoint's vocabulary and chat template is behind [`Tokenizer`]; the rest of the program
//! sees ids. Only rank 0 needs it, and token-id prompts need none at all.
//!
//! | file | noun |
//! |---|---|
//! | `mod.rs` | [`Tokenizer`]: `tokenizer.json` with the settings beside it |
//! | `chat.rs` | the chat template, in the dialect that Hugging Face tokenizers render |
//! | `literal.rs` | what people write in a conversation stays text, also where it looks like a control token |
//! | `stream.rs` | [`TextStream`]: ids to text, one token at a time |
//! | `stop.rs` | [`StopMatcher`]: stop texts, across the borders of tokens |
//! | `files.rs` | [`TokenizerFiles`]: the files, told to another rank |

mod chat;
mod files;
mod literal;
mod stop;
mod stream;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::DecoderWrapper;
use tracing::info;

use self::chat::ChatTemplate;
use crate::bounded_file::{self, FileError};
use crate::request::{Chat, Prompt, Rejection, RejectionCode};

pub use files::TokenizerFiles;
pub use stop::{Matched, StopMatcher};
pub use stream::TextStream;

/// Most bytes of a file that are read; the largest vocabularies published take some 40 MB.
const LARGEST_FILE_BYTES: u64 = 256 << 20;

/// A checkpoint's tokenizer and chat template.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    directory: PathBuf,
    /// Special tokens by the name that templates use (`bos_token`), as `tokenizer_config.json` gives them.
    named_tokens: BTreeMap<String, String>,
    /// Ids that are not part of any text.
    special_ids: HashSet<u32>,
    /// Their texts, where they can be cut in two.
    special_texts: Vec<String>,
    chat_template: Option<ChatTemplate>,
    alphabet: Alphabet,
    /// Longer texts are not tokenised, for they cannot fit into a context of so many tokens.
    most_text_bytes: usize,
    context_tokens: usize,
}

/// How a token's text spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alphabet {
    /// Every byte is one character of GPT-2's table.
    ByteLevel,
    /// Text with `▁` for a space and `<0x0A>` for a byte without a token, as sentencepiece has it.
    Text,
}

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The checkpoint has no tokenizer. Prompts of token ids run without one.
    #[error("{} does not exist; without it only prompts of token ids can run", .path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A file is there and cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is not what it should be.
    #[error("{} is not valid: {what}; take it anew from where the checkpoint came from", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A conversation, or a plain prompt, and no template to write it with.
    #[error(
        "{} has no chat template (neither chat_template.jinja, chat_template.json nor `chat_template` in \
         tokenizer_config.json); use --raw to continue plain prompts as they are, or send `prompt` instead of `messages`",
        .directory.display()
    )]
    NoChatTemplate {
        /// The checkpoint.
        directory: PathBuf,
    },
    /// The template cannot write this conversation.
    #[error("the chat template of {} failed: {what}; --raw does without it", .path.display())]
    ChatTemplate {
        /// The file that holds the template.
        path: PathBuf,
        /// What it said, and where.
        what: String,
    },
    /// The text cannot become tokens.
    #[error("tokenising the prompt failed: {what}")]
    Encode {
        /// What the tokenizer said.
        what: String,
    },
    /// The tokens cannot become text.
    #[error("decoding the answer failed: {what}")]
    Decode {
        /// What the tokenizer said.
        what: String,
    },
    /// The text cannot fit into the context, however it is cut into tokens.
    #[error(
        "the prompt has {bytes} bytes of text; more than {most_bytes} are more tokens than a context of {context_tokens} \
         holds, whatever they are; shorten it, or raise --context if the model allows it"
    )]
    TooLong {
        /// Bytes of the text.
        bytes: usize,
        /// Most bytes that may fit.
        most_bytes: usize,
        /// Tokens that a sequence may hold.
        context_tokens: usize,
    },
    /// There is nothing to continue.
    #[error("the prompt has no tokens; this tokenizer puts none before an empty text")]
    EmptyPrompt,
}

impl TokenizerError {
    /// The same for whoever sent the prompt, who may be on another machine: no business of theirs where files are.
    fn without_paths(&self) -> String {
        match self {
            Self::NoChatTemplate { .. } => {
                "the model has no chat template; use --raw to continue plain prompts as they are, or send `prompt` \
                 instead of `messages`"
                    .into()
            }
            Self::ChatTemplate { what, .. } => {
                format!("the model's chat template failed: {what}; --raw, or `prompt` instead of `messages`, does without it")
            }
            Self::Missing { .. } | Self::File(_) | Self::Invalid { .. } => {
                "the model's tokenizer cannot be read".into()
            }
            other => other.to_string(),
        }
    }
}

/// The whole error is in the log.
impl From<TokenizerError> for Rejection {
    fn from(error: TokenizerError) -> Rejection {
        info!("a prompt was refused: {error}");
        match error {
            TokenizerError::TooLong { .. } => Rejection::of_field(
                RejectionCode::ContextLengthExceeded,
                "prompt",
                error.to_string(),
            ),
            other => Rejection::new(RejectionCode::PromptNotTokenizable, other.without_paths()),
        }
    }
}

impl Tokenizer {
    /// Loads `tokenizer.json` of a checkpoint directory, with `tokenizer_config.json` and the chat template if they are there.
    ///
    /// `now_s`, in seconds since 1970, is the time that templates which print a date see (in UTC): one time for a whole
    /// run, so that equal prompts stay equal.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Missing`] without `tokenizer.json`; [`TokenizerError::File`] and [`TokenizerError::Invalid`] for
    /// files that are there and no good. A template that is no good is reported when it is used: `--raw` does without it.
    pub fn load(directory: &Path, now_s: i64) -> Result<Tokenizer, TokenizerError> {
        let path = directory.join("tokenizer.json");
        let bytes = read(&path)?.ok_or_else(|| TokenizerError::Missing { path: path.clone() })?;
        let mut inner =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| invalid(&path, error))?;
        // Settings of somebody's training run that some files carry along; a prompt must arrive whole and as it is.
        inner
            .with_truncation(None)
            .map_err(|error| invalid(&path, error))?
            .with_padding(None);

        let config = Config::load(directory)?;
        let named_tokens = config.named_tokens();
        let added = inner.get_added_tokens_decoder();
        Ok(Tokenizer {
            special_ids: added
                .iter()
                .filter(|(_, token)| token.special)
                .map(|(id, _)| *id)
                .collect(),
            special_texts: added
                .values()
                .filter(|token| token.special && token.content.chars().nth(1).is_some())
                .map(|token| token.content.clone())
                .collect(),
            chat_template: ChatTemplate::find(directory, &config, &named_tokens, now_s)?,
            alphabet: Alphabet::of(inner.get_decoder()),
            most_text_bytes: usize::MAX,
            context_tokens: usize::MAX,
            directory: directory.to_owned(),
            named_tokens,
            inner,
        })
    }

    /// From now on texts that are more than so many tokens for certain are refused at once. To tokenise them would take
    /// hundreds of times their size in memory.
    pub fn limit_texts(&mut self, context_tokens: usize) {
        let vocabulary = self.inner.get_vocab(true);
        let longest = vocabulary.keys().map(String::len).max().unwrap_or(1);
        // What is normalised may become shorter: Unicode's composition makes 3 bytes of 9.
        let shrinks = match self.inner.get_normalizer() {
            None => 1,
            Some(_) => 3,
        };
        self.context_tokens = context_tokens;
        self.most_text_bytes = context_tokens
            .saturating_mul(longest)
            .saturating_mul(shrinks);
    }

    /// The ids of a prompt; at least one. `raw` takes a [`Prompt::Plain`] as it is; else it is a user message.
    ///
    /// Token ids are handed back unchanged, whether or not they lie inside the vocabulary.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::encode`] and [`Tokenizer::encode_chat`]; [`TokenizerError::EmptyPrompt`] if no id comes out.
    pub fn encode_prompt(&self, prompt: &Prompt, raw: bool) -> Result<Vec<u32>, TokenizerError> {
        let ids = match prompt {
            Prompt::Tokens(ids) => ids.clone(),
            Prompt::Text(text) => self.encode(text)?,
            Prompt::Plain(text) if raw => self.encode(text)?,
            Prompt::Plain(text) => self.encode_chat(&Chat::from_user(text))?,
            Prompt::Chat(chat) => self.encode_chat(chat)?,
        };
        if ids.is_empty() {
            Err(TokenizerError::EmptyPrompt)
        } else {
            Ok(ids)
        }
    }

    /// The ids of a text, with the special tokens that the model expects around one, unless the text brings its own
    /// beginning-of-sequence token.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Encode`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let brings_its_own = self
            .named_tokens
            .get("bos_token")
            .is_some_and(|token| text.starts_with(token.as_str()));
        self.ids(text, !brings_its_own)
    }

    /// The ids of a conversation, written by the chat template up to where the assistant's answer starts.
    ///
    /// The template writes every special token itself; none is added. What looks like one in the conversation stays text.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::NoChatTemplate`], [`TokenizerError::ChatTemplate`] or [`TokenizerError::Encode`].
    pub fn encode_chat(&self, chat: &Chat) -> Result<Vec<u32>, TokenizerError> {
        let marked = literal::mark(chat, &self.special_texts);
        let marked = marked.map_err(|what| TokenizerError::Encode { what: what.into() })?;
        let Some(marked) = marked else {
            return self.ids(&self.render_chat(chat)?, false);
        };
        let text = self.render_chat(&marked.chat)?;
        self.check_length(text.split(marked.mark).map(str::len).sum())?;
        let mut ids = Vec::new();
        for part in text.split(marked.mark) {
            ids.extend(self.ids(part, false)?);
        }
        Ok(ids)
    }

    /// The text that the chat template makes of a conversation.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::NoChatTemplate`] or [`TokenizerError::ChatTemplate`].
    pub fn render_chat(&self, chat: &Chat) -> Result<String, TokenizerError> {
        match &self.chat_template {
            Some(template) => template.render(chat),
            None => Err(TokenizerError::NoChatTemplate {
                directory: self.directory.clone(),
            }),
        }
    }

    /// Whether the chat template tells the model of tools, to be called in a form that can be read back:
    /// `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.
    pub fn knows_tools(&self) -> bool {
        self.chat_template
            .as_ref()
            .is_some_and(ChatTemplate::knows_tools)
    }

    /// The text of ids, without special tokens. Bytes that are no character become U+FFFD; unknown ids are left out.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Decode`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.inner
            .decode(ids, true)
            .map_err(|error| TokenizerError::Decode {
                what: error.to_string(),
            })
    }

    /// A decoder for one answer, token by token.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// The bytes that a token stands for, special or not, which need not be whole characters; `None` for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.inner
            .id_to_token(id)
            .map(|token| self.alphabet.bytes_of(&token))
    }

    /// The id of `eos_token` in `tokenizer_config.json`, for checkpoints whose `config.json` names none.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.named_tokens
            .get("eos_token")
            .and_then(|token| self.inner.token_to_id(token))
    }

    fn check_length(&self, bytes: usize) -> Result<(), TokenizerError> {
        match bytes > self.most_text_bytes {
            false => Ok(()),
            true => Err(TokenizerError::TooLong {
                bytes,
                most_bytes: self.most_text_bytes,
                context_tokens: self.context_tokens,
            }),
        }
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        self.check_length(text.len())?;
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        let encoding = encoding.map_err(|error| TokenizerError::Encode {
            what: error.to_string(),
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }
}

impl Alphabet {
    fn of(decoder: Option<&DecoderWrapper>) -> Alphabet {
        match decoder {
            Some(DecoderWrapper::ByteLevel(_)) => Alphabet::ByteLevel,
            Some(DecoderWrapper::Sequence(sequence)) => match sequence.get_decoders() {
                [only] => Alphabet::of(Some(only)),
                _ => Alphabet::Text,
            },
            _ => Alphabet::Text,
        }
    }

    fn bytes_of(self, token: &str) -> Vec<u8> {
        match self {
            // A token with a character outside the table was added as text; the tokenizers crate decodes it so, too.
            Alphabet::ByteLevel => token
                .chars()
                .map(byte_of_char)
                .collect::<Option<_>>()
                .unwrap_or_else(|| token.into()),
            Alphabet::Text => match fallback_byte(token) {
                Some(byte) => vec![byte],
                None => token.replace('\u{2581}', " ").into_bytes(),
            },
        }
    }
}

/// The byte that a character stands for in GPT-2's table: printable Latin-1 for itself, the 68 other bytes in
/// order from U+0100 on.
fn byte_of_char(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The byte of a sentencepiece byte token such as `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// What is read of `tokenizer_config.json`.
#[derive(Debug, Default, Deserialize)]
struct Config {
    #[serde(default)]
    chat_template: Option<Value>,
    #[serde(flatten)]
    more: BTreeMap<String, Value>,
}

impl Config {
    const FILE: &'static str = "tokenizer_config.json";

    /// The file's content; empty if there is no such file.
    fn load(directory: &Path) -> Result<Config, TokenizerError> {
        let path = directory.join(Config::FILE);
        match read(&path)? {
            None => Ok(Config::default()),
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|error| invalid(&path, error)),
        }
    }

    /// Every `*_token` that is set: a string, or an object whose `content` is one.
    fn named_tokens(&self) -> BTreeMap<String, String> {
        let named = self
            .more
            .iter()
            .filter(|(name, _)| name.ends_with("_token"));
        named
            .filter_map(|(name, value)| {
                let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
                Some((name.clone(), text.to_owned()))
            })
            .collect()
    }
}

/// A file's bytes, or `None` if there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    Ok(bounded_file::read(path, LARGEST_FILE_BYTES)?)
}

fn invalid(path: &Path, what: impl ToString) -> TokenizerError {
    TokenizerError::Invalid {
        path: path.to_owned(),
        what: what.to_string(),
    }
}
