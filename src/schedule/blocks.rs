//! How many blocks of keys and values the caches hold, and who holds them: what the plan has memory for is not
//! exceeded, and a block that several sequences share counts once.

use std::collections::HashSet;

/// Tokens of a block.
pub const BLOCK_TOKENS: usize = 64;

/// All blocks there are.
#[derive(Debug)]
pub struct Blocks {
    /// By block, how many sequences hold it.
    holders: Vec<u32>,
    free: Vec<u32>,
}

impl Blocks {
    /// So many blocks, all of them free.
    pub fn new(count: usize) -> Self {
        Self {
            holders: vec![0; count],
            free: (0..count as u32).rev().collect(),
        }
    }

    /// Blocks that nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that would be free if these were all that are held.
    pub fn left_by<'a>(&self, held: impl Iterator<Item = &'a u32>) -> usize {
        let held: HashSet<u32> = held.copied().collect();
        self.holders.len() - held.len()
    }

    /// Takes free blocks; `None` if there are fewer.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        let rest = self.free.len().checked_sub(count)?;
        let taken = self.free.split_off(rest);
        self.share(&taken);
        Some(taken)
    }

    /// One more sequence holds these.
    pub fn share(&mut self, blocks: &[u32]) {
        for &block in blocks {
            self.holders[block as usize] += 1;
        }
    }

    /// One sequence less holds these; what nobody holds is free.
    pub fn give_back(&mut self, blocks: &[u32]) {
        for &block in blocks {
            let holders = &mut self.holders[block as usize];
            *holders -= 1;
            if *holders == 0 {
                self.free.push(block);
            }
        }
    }
}
