//! Which tokens go into the next step. Rank 0 alone decides; the other ranks do what the step says.
//! Pure: no clock, no ranks, no arrays.
//!
//! One sequence at a time: its prompt goes in as chunks, which may follow each other down the pipeline
//! without waiting, then one token a step, each waiting for the one before.

use crate::wire::{Entry, SampleParams, Step};

/// The cache slot of the one sequence in flight.
const SLOT: u32 = 0;

/// Where the sequence in flight stands.
#[derive(Debug)]
enum State {
    /// No sequence.
    Idle,
    /// Tokens wait to be computed: what is left of the prompt, or the token sampled last.
    Ready(Vec<u32>),
    /// Everything known has been sent; the next token is on its way.
    Awaiting,
}

/// The queue of rank 0.
#[derive(Debug)]
pub struct Schedule {
    /// Most prompt tokens in one step.
    chunk_tokens: usize,
    next_number: u64,
    state: State,
    /// Position of the next token of the sequence.
    position: u32,
    params: SampleParams,
    release: Vec<u32>,
}

impl Schedule {
    /// An empty queue that cuts prompts into chunks of `chunk_tokens` (at least 1).
    pub fn new(chunk_tokens: usize) -> Self {
        Self {
            chunk_tokens: chunk_tokens.max(1),
            next_number: 0,
            state: State::Idle,
            position: 0,
            params: SampleParams::GREEDY,
            release: Vec::new(),
        }
    }

    /// Whether a sequence may be admitted.
    pub fn has_room(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// Takes a sequence in. `prompt` holds at least one token; the caller asks [`Self::has_room`] first.
    pub fn admit(&mut self, prompt: Vec<u32>, params: SampleParams) {
        debug_assert!(self.has_room() && !prompt.is_empty());
        self.state = State::Ready(prompt);
        self.position = 0;
        self.params = params;
    }

    /// The next step to compute, if one can be computed now.
    pub fn next_step(&mut self) -> Option<Step> {
        let State::Ready(tokens) = &mut self.state else {
            return None;
        };
        let rest = tokens.split_off(tokens.len().min(self.chunk_tokens));
        let chunk = std::mem::replace(tokens, rest);
        let is_last = tokens.is_empty();
        if is_last {
            self.state = State::Awaiting;
        }
        let step = Step {
            number: self.next_number,
            release: std::mem::take(&mut self.release),
            entries: vec![Entry {
                slot: SLOT,
                start: self.position,
                sample: is_last.then_some(self.params),
                tokens: chunk,
            }],
        };
        self.next_number += 1;
        self.position += step.row_count() as u32;
        Some(step)
    }

    /// The sequence goes on with the token that was sampled.
    pub fn continue_with(&mut self, token: u32) {
        debug_assert!(matches!(self.state, State::Awaiting));
        self.state = State::Ready(vec![token]);
    }

    /// The sequence is done; its cache is dropped before the next step.
    pub fn finish(&mut self) {
        self.state = State::Idle;
        self.release.push(SLOT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(schedule: &mut Schedule) -> Vec<Step> {
        std::iter::from_fn(|| schedule.next_step()).collect()
    }

    #[test]
    fn every_prompt_token_is_computed_once_in_order_whatever_the_chunk() {
        for length in 1..20u32 {
            for chunk_tokens in 1..22 {
                let prompt: Vec<u32> = (100..100 + length).collect();
                let mut schedule = Schedule::new(chunk_tokens);
                schedule.admit(prompt.clone(), SampleParams::GREEDY);
                let steps = steps(&mut schedule);
                let mut position = 0;
                let mut seen: Vec<u32> = Vec::new();
                for (index, step) in steps.iter().enumerate() {
                    let entry = &step.entries[0];
                    assert_eq!(step.number, index as u64);
                    assert_eq!(entry.start, position);
                    assert!((1..=chunk_tokens).contains(&entry.tokens.len()));
                    assert_eq!(entry.sample.is_some(), index + 1 == steps.len());
                    position += entry.tokens.len() as u32;
                    seen.extend(&entry.tokens);
                }
                assert_eq!(seen, prompt);
            }
        }
    }

    #[test]
    fn a_token_continues_where_the_prompt_ended_and_the_next_sequence_releases_the_slot() {
        let mut schedule = Schedule::new(8);
        schedule.admit(vec![1, 2, 3], SampleParams::GREEDY);
        assert_eq!(steps(&mut schedule).len(), 1);
        assert!(!schedule.has_room());
        schedule.continue_with(9);
        let step = schedule.next_step().unwrap();
        assert_eq!(
            (step.entries[0].start, &step.entries[0].tokens[..]),
            (3, &[9][..])
        );
        assert!(step.release.is_empty());
        schedule.finish();
        assert!(schedule.has_room());
        schedule.admit(vec![5], SampleParams::GREEDY);
        let step = schedule.next_step().unwrap();
        assert_eq!(step.release, [SLOT]);
        assert_eq!(step.entries[0].start, 0);
    }
}
