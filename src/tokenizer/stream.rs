//! Ids to text, one token at a time.
//!
//! A token need not end where a character ends, and in sentencepiece vocabularies a token's text depends on whether
//! it is the first. So text is given out only when no later token can change it, and the pieces put together are what
//! decoding all ids at once gives. Time is linear in the number of tokens.

use super::{Alphabet, Tokenizer, TokenizerError};

/// Decodes one answer token by token. Special tokens have no text.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    pending: Pending,
    chars: usize,
}

/// What was pushed and is not text yet.
#[derive(Debug)]
enum Pending {
    /// Byte-level: the beginning of a character, 3 bytes at most.
    Bytes(Vec<u8>),
    /// Otherwise the last ids: those already given out, which a decoder needs to see what comes after them as not the
    /// first, then those that are not.
    Window { ids: Vec<u32>, given: usize },
}

/// A character has 4 bytes at most, so after 4 byte tokens that are no character they never will be one.
const WINDOW_PENDING_MAX: usize = 4;

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> TextStream<'a> {
        let pending = match tokenizer.alphabet {
            Alphabet::ByteLevel => Pending::Bytes(Vec::new()),
            Alphabet::Text => Pending::Window {
                ids: Vec::new(),
                given: 0,
            },
        };
        TextStream {
            tokenizer,
            pending,
            chars: 0,
        }
    }

    /// Takes the next id and gives the text that is now certain; it may be empty.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Decode`].
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        if self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        let text = match &mut self.pending {
            Pending::Bytes(bytes) => {
                bytes.extend(self.tokenizer.token_bytes(id).unwrap_or_default());
                take_characters(bytes)
            }
            Pending::Window { ids, given } => {
                ids.push(id);
                let may_wait = ids.len() - *given < WINDOW_PENDING_MAX;
                take_window(self.tokenizer, ids, given, may_wait)?
            }
        };
        self.chars += text.chars().count();
        Ok(text)
    }

    /// Ends the answer and gives what is left; the beginning of a character that never ended becomes U+FFFD.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Decode`].
    pub fn finish(self) -> Result<String, TokenizerError> {
        match self.pending {
            Pending::Bytes(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Pending::Window { mut ids, mut given } => {
                take_window(self.tokenizer, &mut ids, &mut given, false)
            }
        }
    }

    /// Characters given out so far: where in the text the next token starts.
    pub fn chars(&self) -> usize {
        self.chars
    }
}

/// Takes all whole characters out of `bytes` and leaves the beginning of the next. Invalid bytes become U+FFFD, as many
/// as `String::from_utf8_lossy` makes of them.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let rest = incomplete_tail(bytes).to_vec();
    bytes.truncate(bytes.len() - rest.len());
    let text = String::from_utf8_lossy(bytes).into_owned();
    *bytes = rest;
    text
}

/// The bytes at the end that more bytes could complete to a character.
fn incomplete_tail(bytes: &[u8]) -> &[u8] {
    let last = bytes
        .utf8_chunks()
        .last()
        .map_or(&[][..], |chunk| chunk.invalid());
    match std::str::from_utf8(last) {
        Err(error) if error.error_len().is_none() => last,
        _ => &[],
    }
}

/// Decodes the window with and without the ids that are new, and takes the difference, unless it ends inside a character.
fn take_window(
    tokenizer: &Tokenizer,
    ids: &mut Vec<u32>,
    given: &mut usize,
    may_wait: bool,
) -> Result<String, TokenizerError> {
    let before = tokenizer.decode(ids.get(..*given).unwrap_or_default())?;
    let after = tokenizer.decode(ids)?;
    if may_wait && after.ends_with(char::REPLACEMENT_CHARACTER) {
        return Ok(String::new());
    }
    ids.drain(..*given);
    *given = ids.len();
    match after.strip_prefix(before.as_str()) {
        Some(new) => Ok(new.to_owned()),
        // A run of byte tokens that is no text as a whole decodes to nothing but U+FFFD, also where it once was text.
        None => tokenizer.decode(ids),
    }
}
