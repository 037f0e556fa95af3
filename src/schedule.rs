//! Which tokens go into the next step. Rank 0 alone decides; the other ranks do what the step says.
//! Pure: no clock, no ranks, no arrays.
//!
//! Sequences wait, begin, have their prompts computed in chunks, then decode a token at a time, and end. A step takes
//! a group of those that decode and as much of the oldest prompts as still goes in. Chunks of one prompt follow each
//! other without waiting; a decoding sequence waits for its token. As many steps are on their way as the limits
//! allow, so that every rank has one to work on.

mod blocks;
mod sequence;

use crate::wire::{Entry, Fork, SampleParams, Step, Upkeep};
use blocks::Blocks;
use sequence::{Sequence, Source};
use std::collections::{BTreeMap, HashSet, VecDeque};

pub use blocks::BLOCK_TOKENS;

/// How much may be under way at a time.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Ranks of the pipeline.
    pub ranks: usize,
    /// Most sequences that decode in one step.
    pub max_batch: usize,
    /// Most prompt tokens in one step. Sequences that decode in it take their place, up to half of it.
    pub step_tokens: usize,
    /// Most steps on their way.
    pub steps_in_flight: usize,
    /// Most sequences that have begun.
    pub sequences: usize,
    /// Blocks of [`BLOCK_TOKENS`] tokens that the caches of all sequences may hold.
    pub kv_blocks: usize,
    /// What the ranks' caches hold of a beginning in common.
    pub forks: Forks,
    /// Where rank 0 has the rows of prompts from.
    pub rows: PromptRows,
}

/// What caches hold of a beginning that sequences have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forks {
    /// Its blocks once.
    Shared,
    /// Its blocks for each sequence; and caches grow by so many blocks at a time.
    Copied {
        /// Blocks by which a cache grows.
        growth: usize,
    },
}

/// Where rank 0 has the rows of prompts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptRows {
    /// It has them.
    Known,
    /// It asks for them.
    AskedFor,
}

/// A sequence to be computed.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// The caller's name for it; told with its tokens.
    pub key: u64,
    /// At least one token.
    pub tokens: Vec<u32>,
    /// Most tokens that are sampled, at least one.
    pub max_tokens: usize,
    /// How to sample.
    pub params: SampleParams,
}

/// The queue of rank 0.
#[derive(Debug)]
pub struct Schedule {
    limits: Limits,
    next_number: u64,
    next_slot: u32,
    in_flight: usize,
    /// Not yet begun, oldest first.
    waiting: VecDeque<Prompt>,
    /// Whether anything has changed since it was seen that nothing more can begin.
    has_changed: bool,
    /// Begun and not ended, by slot: in the order in which they began.
    live: BTreeMap<u32, Sequence>,
    /// Slots with a token to decode, in the order in which they came by it.
    ready: VecDeque<u32>,
    /// Ended; their caches are kept for prompts that begin alike, and dropped when room is needed. Oldest first.
    ended: VecDeque<(u32, Sequence)>,
    blocks: Blocks,
    /// Cancelled while a token of theirs was on its way.
    unwanted: HashSet<u32>,
    /// Tokens of prompts that went into steps, so far.
    prompt_tokens: u64,
    /// For the next step, in the order in which it was decided.
    upkeep: Vec<Upkeep>,
}

impl Schedule {
    /// An empty queue. Limits of 0 count as 1.
    pub fn new(limits: Limits) -> Self {
        let limits = Limits {
            ranks: limits.ranks.max(1),
            max_batch: limits.max_batch.max(1),
            step_tokens: limits.step_tokens.max(1),
            steps_in_flight: limits.steps_in_flight.max(1),
            sequences: limits.sequences.max(1),
            kv_blocks: limits.kv_blocks.max(1),
            ..limits
        };
        Self {
            limits,
            next_number: 0,
            next_slot: 0,
            in_flight: 0,
            waiting: VecDeque::new(),
            has_changed: false,
            live: BTreeMap::new(),
            ready: VecDeque::new(),
            ended: VecDeque::new(),
            blocks: Blocks::new(limits.kv_blocks),
            unwanted: HashSet::new(),
            prompt_tokens: 0,
            upkeep: Vec::new(),
        }
    }

    /// Whether another prompt should be brought. A few wait beside those that have begun, so that a step can be
    /// filled with short ones.
    pub fn has_room(&self) -> bool {
        let waiting = self.waiting.len();
        waiting < self.limits.max_batch && waiting + self.live.len() < self.limits.sequences
    }

    /// Takes a prompt in. The caller asks [`Self::has_room`] first. Prompt and answer together fit in the blocks.
    pub fn admit(&mut self, prompt: Prompt) {
        debug_assert!(self.has_room() && !prompt.tokens.is_empty() && prompt.max_tokens > 0);
        debug_assert!(Sequence::blocks_of(&prompt, self.growth()) <= self.limits.kv_blocks);
        self.waiting.push_back(prompt);
        self.has_changed = true;
    }

    /// Whether nothing is under way and nothing waits.
    pub fn is_idle(&self) -> bool {
        self.live.is_empty() && self.waiting.is_empty()
    }

    /// Sequences that have begun and not ended.
    pub fn sequences(&self) -> usize {
        self.live.len()
    }

    /// Tokens that the caches of the sequences that have begun and not ended have room for; what they share counts once.
    pub fn kv_tokens(&self) -> usize {
        let live = self.live.values().flat_map(|one| &one.blocks);
        (self.limits.kv_blocks - self.blocks.left_by(live)) * BLOCK_TOKENS
    }

    /// Tokens of prompts that went into steps, so far; those that were in a cache already do not count.
    pub fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens
    }

    /// The next step to compute, if one should be computed now.
    pub fn next_step(&mut self) -> Option<Step> {
        self.begin_what_can();
        if self.in_flight >= self.limits.steps_in_flight {
            return None;
        }
        let group = self.group();
        let has_prompts = self.live.values().any(|one| one.next_chunk() > 0);
        // With a step for every rank on its way, one more is only worth its cost if it is full.
        let is_full = self.ready.len() >= group || self.in_flight < self.limits.ranks;
        if !(has_prompts || is_full && !self.ready.is_empty()) {
            return None;
        }
        let mut entries = self.decode_entries(group);
        let most = self.limits.step_tokens;
        let rest = most.saturating_sub(entries.len());
        entries.extend(self.prompt_entries(rest.max(most.div_ceil(2))));
        self.in_flight += 1;
        self.has_changed = true;
        let step = Step {
            number: self.next_number,
            in_flight: u16::try_from(self.in_flight).unwrap_or(u16::MAX),
            upkeep: std::mem::take(&mut self.upkeep),
            loads: None,
            entries,
        };
        self.next_number += 1;
        Some(step)
    }

    /// The oldest step on its way is answered. Its tokens are told one by one.
    pub fn answered(&mut self) {
        debug_assert!(self.in_flight > 0, "an answer to no step");
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Whose sequence a slot holds; `None` if none has begun there.
    pub fn key(&self, slot: u32) -> Option<u64> {
        self.live.get(&slot).map(|sequence| sequence.key)
    }

    /// A sequence goes on with the token that was sampled, whose row is known.
    pub fn continue_with(&mut self, slot: u32, token: u32) {
        if let Some(sequence) = self.live.get_mut(&slot) {
            sequence.push(token);
            self.ready.push_back(slot);
        }
    }

    /// A sequence is done. Its cache is kept as long as there is room.
    pub fn finish(&mut self, slot: u32) {
        let Some(mut sequence) = self.live.remove(&slot) else {
            return;
        };
        self.has_changed = true;
        self.blocks.give_back(&sequence.end(self.growth()));
        self.ended.push_back((slot, sequence));
        let is_of_use = |(_, ended): &(u32, Sequence)| ended.launched >= BLOCK_TOKENS;
        let too_short = self.ended.back().is_some_and(|ended| !is_of_use(ended));
        if too_short {
            self.drop_ended(self.ended.len() - 1);
        } else if self.ended.len() > self.limits.sequences {
            self.drop_ended(0);
        }
    }

    /// Nobody waits for this sequence any more, wherever it stands. Its slot, if it has begun; a token of it that is still
    /// on its way is [unwanted](Self::is_unwanted). Its cache is kept as that of a sequence that is done.
    pub fn cancel(&mut self, key: u64) -> Option<u32> {
        if let Some(index) = self.waiting.iter().position(|prompt| prompt.key == key) {
            self.waiting.remove(index);
            self.has_changed = true;
            return None;
        }
        let (&slot, sequence) = self.live.iter().find(|(_, one)| one.key == key)?;
        if sequence.awaits_token() {
            self.unwanted.insert(slot);
        }
        self.ready.retain(|&other| other != slot);
        self.finish(slot);
        Some(slot)
    }

    /// Whether the token that has come for this slot is that of a cancelled sequence. It comes once.
    pub fn is_unwanted(&mut self, slot: u32) -> bool {
        self.unwanted.remove(&slot)
    }

    /// Rows of prompts that rank 0 should ask for now: slots and tokens, in the order in which they are needed.
    /// Those of the oldest prompts, for two steps together, so that neither the ranks nor the way between them are
    /// filled with what is not needed yet.
    pub fn wanted_rows(&mut self) -> Vec<(u32, Vec<u32>)> {
        self.begin_what_can();
        let ahead = self.live.values().map(Sequence::asked_ahead).sum();
        let mut budget = (2 * self.limits.step_tokens).saturating_sub(ahead);
        let mut wanted = Vec::new();
        for (&slot, sequence) in &mut self.live {
            let tokens = sequence.ask(budget.min(self.limits.step_tokens));
            budget -= tokens.len();
            if !tokens.is_empty() {
                wanted.push((slot, tokens));
            }
        }
        wanted
    }

    /// The rows of the next `count` tokens of a prompt have come.
    pub fn rows_came(&mut self, slot: u32, count: usize) {
        if let Some(sequence) = self.live.get_mut(&slot) {
            sequence.rows_known += count;
        }
    }

    /// How many sequences decode in a step: all of them in as many groups as there are ranks, or as steps may be
    /// on their way if that makes groups too large.
    fn group(&self) -> usize {
        let limits = &self.limits;
        let decoding = self.live.values().filter(|one| one.is_decoding()).count();
        let fit = decoding <= limits.ranks * limits.max_batch;
        let groups = match fit {
            true => limits.ranks.min(limits.steps_in_flight),
            false => limits.steps_in_flight,
        };
        decoding.div_ceil(groups).clamp(1, limits.max_batch)
    }

    fn decode_entries(&mut self, group: usize) -> Vec<Entry> {
        let count = group.min(self.ready.len());
        let slots: Vec<u32> = self.ready.drain(..count).collect();
        let live = &mut self.live;
        slots
            .into_iter()
            .filter_map(|slot| Some(live.get_mut(&slot)?.launch(slot, 1)))
            .collect()
    }

    /// The next chunks of the oldest prompts, `budget` tokens together.
    fn prompt_entries(&mut self, mut budget: usize) -> Vec<Entry> {
        let mut entries = Vec::new();
        for (&slot, sequence) in &mut self.live {
            let count = sequence.next_chunk().min(budget);
            if count > 0 {
                entries.push(sequence.launch(slot, count));
                self.prompt_tokens += count as u64;
                budget -= count;
            }
            if budget == 0 {
                break;
            }
        }
        entries
    }

    /// Begins what waits, in order, as far as there is room. A prompt whose beginning another sequence is about to
    /// compute keeps its place, but holds up nobody.
    fn begin_what_can(&mut self) {
        if !std::mem::take(&mut self.has_changed) {
            return;
        }
        let mut index = 0;
        while let Some(prompt) = self.waiting.get(index) {
            if self.live.len() >= self.limits.sequences {
                return;
            }
            let source = self.source(&prompt.tokens);
            if source.is_some_and(|source| source.now < source.soon) {
                index += 1;
                continue;
            }
            let count = Sequence::blocks_of(prompt, self.growth());
            let Some((blocks, taken_over)) = self.reserve(count, source) else {
                return;
            };
            if let Some(prompt) = self.waiting.remove(index) {
                let sequence = Sequence::new(prompt, taken_over, blocks, self.limits.rows);
                self.live.insert(self.next_slot, sequence);
                self.next_slot = self.next_slot.wrapping_add(1);
            }
        }
    }

    /// Blocks by which a cache grows.
    fn growth(&self) -> usize {
        match self.limits.forks {
            Forks::Shared => 1,
            Forks::Copied { growth } => growth.max(1),
        }
    }

    /// The sequence that begins most like `prompt`.
    fn source(&self, prompt: &[u32]) -> Option<Source> {
        let live = self.live.iter().map(|(&slot, sequence)| (slot, sequence));
        let ended = self.ended.iter().map(|(slot, sequence)| (*slot, sequence));
        ended
            .chain(live)
            .filter_map(|(slot, sequence)| sequence.source(slot, prompt))
            .max_by_key(|source| (source.soon, source.now))
    }

    /// Blocks for the next sequence, those that it shares first, and how many tokens it takes over. Drops caches of
    /// ended sequences, the oldest first, if that makes enough room.
    fn reserve(&mut self, count: usize, source: Option<Source>) -> Option<(Vec<u32>, usize)> {
        let is_shared = self.limits.forks == Forks::Shared;
        let mut blocks = match source {
            Some(source) if is_shared => self.shared_blocks(source),
            _ => Vec::new(),
        };
        self.blocks.share(&blocks);
        let own = count - blocks.len();
        let live = self.live.values().flat_map(|one| &one.blocks);
        if self.blocks.free() < own && self.blocks.left_by(live.chain(&blocks)) < own {
            self.blocks.give_back(&blocks);
            return None;
        }
        // Blocks that are shared outlive the source; for a copy there must be room beside it.
        let mut source = source;
        let mut taken_over = 0;
        if is_shared {
            taken_over = self.fork(source.take());
        }
        while self.blocks.free() < own && !self.ended.is_empty() {
            let spared = source.map(|source| source.slot);
            let other = self
                .ended
                .iter()
                .position(|(slot, _)| Some(*slot) != spared);
            if other.is_none() {
                source = None;
            }
            self.drop_ended(other.unwrap_or(0));
        }
        if !is_shared {
            taken_over = self.fork(source);
        }
        blocks.extend(self.blocks.take(own)?);
        Some((blocks, taken_over))
    }

    /// The next sequence begins as its source; the tokens that it takes over.
    fn fork(&mut self, source: Option<Source>) -> usize {
        let Some(source) = source else {
            return 0;
        };
        self.upkeep.push(Upkeep::Fork(Fork {
            from: source.slot,
            to: self.next_slot,
            tokens: source.now as u32,
        }));
        source.now
    }

    fn shared_blocks(&self, source: Source) -> Vec<u32> {
        let ended = self.ended.iter().find(|(slot, _)| *slot == source.slot);
        let sequence = self
            .live
            .get(&source.slot)
            .or(ended.map(|(_, sequence)| sequence));
        let shared = source.now / BLOCK_TOKENS;
        sequence.map_or_else(Vec::new, |sequence| sequence.blocks[..shared].to_vec())
    }

    fn drop_ended(&mut self, index: usize) {
        if let Some((slot, sequence)) = self.ended.remove(index) {
            self.blocks.give_back(&sequence.blocks);
            // The ranks know of no slot that nothing was computed for.
            if sequence.launched > 0 {
                self.upkeep.push(Upkeep::Release(slot));
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
