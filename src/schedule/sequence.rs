//! Where one sequence stands.

use super::blocks::BLOCK_TOKENS;
use super::{Prompt, PromptRows};
use crate::wire::{Entry, SampleParams};

/// A sequence that has begun.
#[derive(Debug)]
pub struct Sequence {
    /// The caller's name for it.
    pub key: u64,
    /// Of the prompt, and of the answer as far as it is known.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// Tokens that are cached, or will be when the steps so far are done.
    pub launched: usize,
    /// Tokens whose rows rank 0 has, and has had.
    pub rows_known: usize,
    /// Tokens whose rows rank 0 has asked for.
    rows_asked: usize,
    params: SampleParams,
    /// What its cache may grow to.
    pub blocks: Vec<u32>,
}

/// A sequence as which another one can begin.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// Where it is.
    pub slot: u32,
    /// Tokens, in whole blocks, that it has in common and in its cache.
    pub now: usize,
    /// Those that it will have there.
    pub soon: usize,
}

impl Sequence {
    /// A sequence whose first `taken_over` tokens are another's.
    pub fn new(prompt: Prompt, taken_over: usize, blocks: Vec<u32>, rows: PromptRows) -> Self {
        let prompt_tokens = prompt.tokens.len();
        let rows_known = match rows {
            PromptRows::Known => prompt_tokens,
            PromptRows::AskedFor => taken_over,
        };
        Self {
            key: prompt.key,
            tokens: prompt.tokens,
            prompt_tokens,
            launched: taken_over,
            rows_known,
            rows_asked: rows_known,
            params: prompt.params,
            blocks,
        }
    }

    /// Blocks that a prompt and its answer fill in a cache that grows by `growth` blocks. The last token sampled is
    /// never computed.
    pub fn blocks_of(prompt: &Prompt, growth: usize) -> usize {
        let tokens = prompt.tokens.len().saturating_add(prompt.max_tokens);
        filled_blocks(tokens.saturating_sub(1), growth)
    }

    /// Whether its prompt is computed, or will be when the steps so far are done.
    pub fn is_decoding(&self) -> bool {
        self.launched >= self.prompt_tokens
    }

    /// Tokens of the prompt that can be computed next.
    pub fn next_chunk(&self) -> usize {
        let known = self.rows_known.min(self.prompt_tokens);
        known.saturating_sub(self.launched)
    }

    /// Whether the token after the last one is on its way.
    pub fn awaits_token(&self) -> bool {
        self.launched == self.tokens.len()
    }

    /// Another token, whose row is known.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.rows_known = self.tokens.len();
    }

    /// The next `count` tokens, to be computed. With the last one known, the next is to be sampled.
    pub fn launch(&mut self, slot: u32, count: usize) -> Entry {
        let (start, end) = (self.launched, self.launched + count);
        self.launched = end;
        Entry {
            slot,
            start: start as u32,
            tokens: self.tokens[start..end].to_vec(),
            sample: (end == self.tokens.len()).then(|| self.params.clone()),
        }
    }

    /// Tokens of the prompt whose rows have been asked for and that are not computed yet.
    pub fn asked_ahead(&self) -> usize {
        self.rows_asked.saturating_sub(self.launched)
    }

    /// The next tokens of the prompt whose rows to ask for, `most` of them.
    pub fn ask(&mut self, most: usize) -> Vec<u32> {
        let from = self.rows_asked.min(self.prompt_tokens);
        self.rows_asked = self.prompt_tokens.min(from + most);
        self.tokens[from..self.rows_asked].to_vec()
    }

    /// No more tokens come: only what is cached counts from now on. Returns the blocks that were never filled.
    pub fn end(&mut self, growth: usize) -> Vec<u32> {
        self.tokens.truncate(self.launched);
        let filled = filled_blocks(self.launched, growth);
        self.blocks.split_off(filled.min(self.blocks.len()))
    }

    /// What a prompt could take over from this sequence: whole blocks, and never the prompt's last token, after
    /// which its answer is sampled.
    pub fn source(&self, slot: u32, prompt: &[u32]) -> Option<Source> {
        let pairs = self.tokens.iter().zip(prompt);
        let common = pairs.take_while(|(ours, its)| ours == its).count();
        let whole = |tokens: usize| tokens / BLOCK_TOKENS * BLOCK_TOKENS;
        let soon = whole(common.min(prompt.len() - 1));
        (soon > 0).then(|| Source {
            slot,
            now: soon.min(whole(self.launched)),
            soon,
        })
    }
}

/// Blocks that a cache of so many tokens has.
fn filled_blocks(tokens: usize, growth: usize) -> usize {
    tokens
        .div_ceil(BLOCK_TOKENS)
        .next_multiple_of(growth.max(1))
}
