//! Which pages of the cache belong to which sequence. Sequences that begin alike share pages until one of them writes
//! there. Pure: knows no device.

use super::super::engine::{ensure_held, unknown};
use anyhow::{Context, Result, ensure};
use std::collections::HashMap;

/// Tokens of a page.
pub(super) use mlx_pipe_cuda::PAGE_TOKENS;

/// The pages of all sequences in flight.
#[derive(Debug, Default)]
pub(super) struct Pages {
    sequences: HashMap<u32, Sequence>,
    /// Sequences that have each page.
    holders: Vec<u32>,
    /// Pages without one.
    free: Vec<u32>,
}

#[derive(Debug, Default)]
struct Sequence {
    pages: Vec<u32>,
    tokens: usize,
}

/// A page is to hold what another one holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) from: u32,
    pub(super) to: u32,
}

impl Pages {
    /// Pages that there must be: every number that was ever given to one is below.
    pub(super) fn count(&self) -> usize {
        self.holders.len()
    }

    /// The sequence's pages, in their order.
    pub(super) fn of(&self, slot: u32) -> &[u32] {
        self.sequences
            .get(&slot)
            .map_or(&[], |sequence| &sequence.pages)
    }

    /// Cuts the sequence back to `start` tokens and makes room for `count` more, in pages that no other sequence has.
    /// The copies are to be made before they are written.
    ///
    /// # Errors
    /// It does not hold `start` tokens: nothing has changed then.
    pub(super) fn extend(&mut self, slot: u32, start: usize, count: usize) -> Result<Vec<Copy>> {
        let held = self
            .sequences
            .get(&slot)
            .map_or(0, |sequence| sequence.tokens);
        ensure!(
            start <= held,
            "the step starts at position {start}, but this rank's cache holds only {held} tokens"
        );
        let mut sequence = self.sequences.remove(&slot).unwrap_or_default();
        self.cut_back(&mut sequence, start);
        let mut copies = Vec::new();
        if count > 0
            && let Some(page) = sequence.pages.get_mut(start / PAGE_TOKENS)
            && self.holders[*page as usize] > 1
        {
            let to = self.new_page();
            copies.push(Copy { from: *page, to });
            self.drop_page(*page);
            *page = to;
        }
        while sequence.pages.len() * PAGE_TOKENS < start + count {
            sequence.pages.push(self.new_page());
        }
        sequence.tokens = start + count;
        self.sequences.insert(slot, sequence);
        Ok(copies)
    }

    /// `to` begins as the first `tokens` tokens of `from`; what it was is forgotten.
    ///
    /// # Errors
    /// `from` is unknown or holds fewer: nothing has changed then.
    pub(super) fn fork(&mut self, from: u32, to: u32, tokens: usize) -> Result<()> {
        let parent = self.sequences.get(&from).with_context(|| unknown(from))?;
        ensure_held(from, tokens, parent.tokens)?;
        let pages = parent.pages[..tokens.div_ceil(PAGE_TOKENS)].to_vec();
        for &page in &pages {
            self.holders[page as usize] += 1;
        }
        self.release(to);
        self.sequences.insert(to, Sequence { pages, tokens });
        Ok(())
    }

    /// Forgets a sequence, if there is one.
    pub(super) fn release(&mut self, slot: u32) {
        if let Some(mut sequence) = self.sequences.remove(&slot) {
            self.cut_back(&mut sequence, 0);
        }
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    fn cut_back(&mut self, sequence: &mut Sequence, tokens: usize) {
        for page in sequence.pages.drain(tokens.div_ceil(PAGE_TOKENS)..) {
            self.drop_page(page);
        }
        sequence.tokens = tokens;
    }

    fn drop_page(&mut self, page: u32) {
        let holders = &mut self.holders[page as usize];
        *holders -= 1;
        if *holders == 0 {
            self.free.push(page);
        }
    }

    fn new_page(&mut self) -> u32 {
        let page = self.free.pop().unwrap_or_else(|| {
            self.holders.push(0);
            (self.holders.len() - 1) as u32
        });
        self.holders[page as usize] = 1;
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What is asked of the pages.
    #[derive(Debug, Clone)]
    enum Asked {
        Extend {
            slot: u32,
            keep: usize,
            count: usize,
        },
        Fork {
            from: u32,
            to: u32,
            share: usize,
        },
        Release(u32),
    }

    fn asked() -> impl Strategy<Value = Asked> {
        let slot = 0..5u32;
        prop_oneof![
            4 => (slot.clone(), 0..300usize, 1..150usize)
                .prop_map(|(slot, keep, count)| Asked::Extend { slot, keep, count }),
            2 => (slot.clone(), slot.clone(), 0..300usize)
                .prop_map(|(from, to, share)| Asked::Fork { from, to, share }),
            1 => slot.prop_map(Asked::Release),
        ]
    }

    proptest! {
        /// Every sequence reads what it wrote, whatever was shared, cut back and written meanwhile; and no page is lost.
        #[test]
        fn sequences_read_what_they_wrote(all in proptest::collection::vec(asked(), 1..60)) {
            let mut pages = Pages::default();
            let mut expected: HashMap<u32, Vec<u64>> = HashMap::new();
            let mut memory: Vec<Vec<u64>> = Vec::new();
            let mut written = 0;
            for asked in all {
                match asked {
                    Asked::Extend { slot, keep, count } => {
                        let tokens = expected.entry(slot).or_default();
                        let start = keep.min(tokens.len());
                        let copies = pages.extend(slot, start, count).unwrap();
                        memory.resize(pages.count(), vec![0; PAGE_TOKENS]);
                        for copy in copies {
                            memory[copy.to as usize] = memory[copy.from as usize].clone();
                        }
                        tokens.truncate(start);
                        for position in start..start + count {
                            written += 1;
                            tokens.push(written);
                            let page = pages.of(slot)[position / PAGE_TOKENS];
                            memory[page as usize][position % PAGE_TOKENS] = written;
                        }
                    }
                    Asked::Fork { from, to, share } if from != to => {
                        match expected.get(&from).cloned() {
                            None => assert!(pages.fork(from, to, 0).is_err()),
                            Some(tokens) => {
                                let share = share.min(tokens.len());
                                assert!(pages.fork(from, to, tokens.len() + 1).is_err());
                                pages.fork(from, to, share).unwrap();
                                expected.insert(to, tokens[..share].to_vec());
                            }
                        }
                    }
                    Asked::Fork { .. } => {}
                    Asked::Release(slot) => {
                        pages.release(slot);
                        expected.remove(&slot);
                    }
                }
                for (slot, tokens) in &expected {
                    let of = pages.of(*slot);
                    assert_eq!(of.len(), tokens.len().div_ceil(PAGE_TOKENS));
                    for (position, token) in tokens.iter().enumerate() {
                        let page = of[position / PAGE_TOKENS] as usize;
                        assert_eq!(memory[page][position % PAGE_TOKENS], *token);
                    }
                }
            }
            expected.keys().for_each(|slot| pages.release(*slot));
            assert_eq!(pages.free.len(), pages.count());
        }
    }

    #[test]
    fn a_gap_is_refused_and_changes_nothing() {
        let mut pages = Pages::default();
        pages.extend(1, 0, 70).unwrap();
        let before = pages.of(1).to_vec();
        assert!(pages.extend(1, 71, 1).is_err());
        assert_eq!(pages.of(1), before);
    }
}
