//! Stop texts, found across the borders of tokens.
//!
//! Separate from decoding because the question is one of text alone: given pieces of it, what may be shown, and where
//! does it end.

/// Watches an answer for the texts that end it.
///
/// The answer ends where the first stop text is complete, and is cut where that text starts (where the longest starts, if
/// several are complete at once). So the result does not depend on how the text was split, and no token more than needed is
/// generated.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    needles: Vec<Needle>,
    /// Text that may be the beginning of a stop text.
    held: String,
    has_stopped: bool,
}

/// What is known after one more piece of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matched {
    /// Text that belongs to the answer for certain; may be empty.
    pub text: String,
    /// Whether a stop text ended the answer: `text` was the last of it.
    pub is_stopped: bool,
}

/// One stop text and how much of it the text so far ends with (Knuth, Morris, Pratt 1977: linear whatever the text).
#[derive(Clone, Debug)]
struct Needle {
    bytes: Vec<u8>,
    /// At `i`: length of the longest proper prefix of the needle that ends at byte `i` of it.
    borders: Vec<usize>,
    /// Bytes matched so far.
    matched: usize,
}

impl StopMatcher {
    /// A matcher for `stops`, at the beginning of an answer. An empty text stops nothing.
    pub fn new(stops: &[String]) -> StopMatcher {
        let needles = stops
            .iter()
            .filter(|stop| !stop.is_empty())
            .map(|stop| Needle::new(stop.as_bytes()));
        StopMatcher {
            needles: needles.collect(),
            held: String::new(),
            has_stopped: false,
        }
    }

    /// Takes the next piece and gives the text that is now certain. After a stop there is no more.
    pub fn push(&mut self, piece: &str) -> Matched {
        if self.has_stopped {
            return Matched {
                text: String::new(),
                is_stopped: true,
            };
        }
        let before = self.held.len();
        self.held.push_str(piece);
        for (i, byte) in piece.bytes().enumerate() {
            let complete = self
                .needles
                .iter_mut()
                .filter_map(|needle| needle.advance(byte))
                .max();
            if let Some(stop_bytes) = complete {
                self.has_stopped = true;
                let text = self.release(before + i + 1 - stop_bytes);
                self.held.clear();
                return Matched {
                    text,
                    is_stopped: true,
                };
            }
        }
        let may_be_stop = self
            .needles
            .iter()
            .map(|needle| needle.matched)
            .max()
            .unwrap_or(0);
        Matched {
            text: self.release(self.held.len() - may_be_stop),
            is_stopped: false,
        }
    }

    /// Ends the answer and gives the text that was held back. Nothing after a stop.
    pub fn finish(self) -> String {
        self.held
    }

    /// Takes the first `bytes` of the held text. They end between two characters, because a stop text starts with one.
    fn release(&mut self, bytes: usize) -> String {
        let rest = self.held.split_off(bytes);
        std::mem::replace(&mut self.held, rest)
    }
}

impl Needle {
    fn new(bytes: &[u8]) -> Needle {
        let mut needle = Needle {
            bytes: bytes.to_vec(),
            borders: vec![0],
            matched: 0,
        };
        for &byte in bytes.iter().skip(1) {
            needle.step(byte);
            needle.borders.push(needle.matched);
        }
        needle.matched = 0;
        needle
    }

    /// Takes one byte of the text; the needle's length if that completes it.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        self.step(byte);
        (self.matched == self.bytes.len()).then_some(self.bytes.len())
    }

    fn step(&mut self, byte: u8) {
        while self.matched > 0 && self.bytes.get(self.matched) != Some(&byte) {
            self.matched = self.borders.get(self.matched - 1).copied().unwrap_or(0);
        }
        if self.bytes.get(self.matched) == Some(&byte) {
            self.matched += 1;
        }
    }
}
