//! The schedule against a pipeline that is a queue: every step is checked for what the ranks would find wrong, and
//! answered after a while.

use super::*;
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

const LIMITS: Limits = Limits {
    ranks: 1,
    max_batch: 8,
    step_tokens: 8,
    steps_in_flight: 2,
    sequences: 16,
    kv_blocks: 1000,
    forks: Forks::Shared,
    rows: PromptRows::Known,
};

const FORKS: [Forks; 3] = [
    Forks::Shared,
    Forks::Copied { growth: 1 },
    Forks::Copied { growth: 4 },
];

fn prompt(key: u64, tokens: Vec<u32>, max_tokens: usize) -> Prompt {
    Prompt {
        key,
        tokens,
        max_tokens,
        params: SampleParams::GREEDY,
    }
}

/// The token that follows: a function of all before it, so that a wrong cache gives a wrong answer.
fn next_token(tokens: &[u32]) -> u32 {
    let mix = |sum: u32, token: &u32| sum.wrapping_mul(31).wrapping_add(*token + 1);
    tokens.iter().fold(7, mix) % 11
}

/// A cache as a rank has it.
#[derive(Default)]
struct Cache {
    tokens: Vec<u32>,
    /// As many as the tokens fill; caches that share a block hold the same one.
    blocks: Vec<Rc<()>>,
}

impl Cache {
    fn extend(&mut self, tokens: &[u32], growth: usize) {
        self.tokens.extend(tokens);
        let filled = self.tokens.len().div_ceil(BLOCK_TOKENS);
        self.blocks
            .resize_with(filled.next_multiple_of(growth), Rc::default);
    }
}

/// Caches as a rank has them, and the steps on their way.
struct Ranks {
    limits: Limits,
    caches: HashMap<u32, Cache>,
    under_way: VecDeque<Step>,
    next_number: u64,
    computed_tokens: usize,
    most_under_way: usize,
    largest_group: usize,
}

impl Ranks {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            caches: HashMap::new(),
            under_way: VecDeque::new(),
            next_number: 0,
            computed_tokens: 0,
            most_under_way: 0,
            largest_group: 0,
        }
    }

    /// What every rank does with a step, and what it checks.
    fn execute(&mut self, step: Step) {
        assert_eq!(step.number, self.next_number);
        self.next_number += 1;
        let growth = match self.limits.forks {
            Forks::Shared => 1,
            Forks::Copied { growth } => growth,
        };
        for &upkeep in &step.upkeep {
            match upkeep {
                Upkeep::Release(slot) => {
                    self.caches.remove(&slot);
                }
                Upkeep::Fork(fork) => {
                    let begun = self.begun(fork, growth);
                    assert!(self.caches.insert(fork.to, begun).is_none());
                }
            }
            self.check_memory();
        }
        assert!(!step.entries.is_empty(), "an empty step");
        for (index, entry) in step.entries.iter().enumerate() {
            let before = &step.entries[..index];
            assert!(before.iter().all(|other| other.slot != entry.slot));
            let cache = self.caches.entry(entry.slot).or_default();
            assert_eq!(
                cache.tokens.len(),
                entry.start as usize,
                "a gap, or tokens computed twice"
            );
            cache.extend(&entry.tokens, growth);
        }
        self.computed_tokens += step.row_count();
        let decoding = step.entries.iter().filter(|entry| entry.tokens.len() == 1);
        self.largest_group = self.largest_group.max(decoding.count());
        let most = self.limits.step_tokens;
        assert!(step.row_count() <= most.max(self.limits.max_batch + most.div_ceil(2)));
        self.check_memory();
        self.under_way.push_back(step);
        assert_eq!(
            self.under_way.len(),
            self.under_way.back().unwrap().in_flight as usize
        );
        self.most_under_way = self.most_under_way.max(self.under_way.len());
    }

    fn begun(&self, fork: Fork, growth: usize) -> Cache {
        let (from, tokens) = (&self.caches[&fork.from], fork.tokens as usize);
        assert!(from.tokens.len() >= tokens, "a fork beyond its source");
        let mut begun = Cache::default();
        if self.limits.forks == Forks::Shared {
            begun.blocks = from.blocks[..tokens / BLOCK_TOKENS].to_vec();
        }
        begun.extend(&from.tokens[..tokens], growth);
        begun
    }

    fn check_memory(&self) {
        let blocks = self.caches.values().flat_map(|cache| &cache.blocks);
        let held: HashSet<*const ()> = blocks.map(Rc::as_ptr).collect();
        assert!(
            held.len() <= self.limits.kv_blocks,
            "more than the plan has memory for"
        );
    }
}

/// Runs prompts to their ends; the answers by key. `delays`: how many turns of the loop each answer stays out.
fn run(limits: Limits, prompts: &[Prompt], delays: &[usize]) -> (HashMap<u64, Vec<u32>>, Ranks) {
    run_with_cancels(limits, prompts, delays, &HashMap::new())
}

/// As [`run`]; `cancels`: in which turn a sequence is cancelled, by key, unless it has ended by then.
fn run_with_cancels(
    limits: Limits,
    prompts: &[Prompt],
    delays: &[usize],
    cancels: &HashMap<u64, usize>,
) -> (HashMap<u64, Vec<u32>>, Ranks) {
    let mut cancelled = HashSet::new();
    let mut schedule = Schedule::new(limits);
    let mut ranks = Ranks::new(limits);
    let mut left: VecDeque<Prompt> = prompts.iter().cloned().collect();
    let mut answers: HashMap<u64, Vec<u32>> = HashMap::new();
    let mut questions: VecDeque<(u32, usize)> = VecDeque::new();
    let mut turn = 0;
    let mut due = VecDeque::new();
    while !(left.is_empty() && schedule.is_idle() && ranks.under_way.is_empty()) {
        turn += 1;
        assert!(turn < 100_000, "no end: {schedule:?}");
        while schedule.has_room() && !left.is_empty() {
            schedule.admit(left.pop_front().unwrap());
        }
        for (&key, _) in cancels.iter().filter(|(_, at)| **at == turn) {
            left.retain(|prompt| prompt.key != key);
            let is_known = answers.contains_key(&key);
            let slot = schedule.cancel(key);
            assert!(slot.is_none_or(|slot| schedule.key(slot).is_none()));
            if slot.is_some() || !is_known {
                cancelled.insert(key);
            }
            assert_eq!(schedule.cancel(key), None, "it is gone");
        }
        assert!(schedule.sequences() <= limits.sequences);
        for (slot, tokens) in schedule.wanted_rows() {
            assert_eq!(limits.rows, PromptRows::AskedFor);
            questions.push_back((slot, tokens.len()));
        }
        if turn % 2 == 0
            && let Some((slot, count)) = questions.pop_front()
        {
            schedule.rows_came(slot, count);
        }
        if let Some(step) = schedule.next_step() {
            let is_live = |entry: &Entry| schedule.key(entry.slot).is_some();
            assert!(
                step.entries.iter().all(is_live),
                "a cancelled sequence is computed"
            );
            due.push_back(turn + delays[step.number as usize % delays.len()]);
            ranks.execute(step);
        }
        assert!(ranks.under_way.len() <= limits.steps_in_flight);
        if due.front().is_some_and(|&due| due <= turn) {
            due.pop_front();
            let step = ranks.under_way.pop_front().unwrap();
            schedule.answered();
            for (entry, _) in step.sampled() {
                if schedule.is_unwanted(entry.slot) {
                    continue;
                }
                let end = entry.start as usize + entry.tokens.len();
                let sequence = &ranks.caches[&entry.slot].tokens[..end];
                let token = next_token(sequence);
                let key = schedule.key(entry.slot).unwrap();
                assert!(!cancelled.contains(&key), "a token of a cancelled sequence");
                let answer = answers.entry(key).or_default();
                answer.push(token);
                let most = prompts[key as usize].max_tokens;
                if answer.len() == most || token == 3 {
                    schedule.finish(entry.slot);
                } else {
                    schedule.continue_with(entry.slot, token);
                }
            }
        }
    }
    assert_eq!(schedule.in_flight, 0);
    assert_eq!((schedule.kv_tokens(), schedule.ready.len()), (0, 0));
    assert!(schedule.unwanted.is_empty(), "{:?}", schedule.unwanted);
    // All memory can be had again: what is held, is held by those that have ended.
    let kept = schedule.ended.iter().flat_map(|(_, ended)| &ended.blocks);
    assert_eq!(schedule.blocks.free(), schedule.blocks.left_by(kept));
    (answers, ranks)
}

/// The answer that a prompt must get.
fn expected(prompt: &Prompt) -> Vec<u32> {
    let mut tokens = prompt.tokens.clone();
    while tokens.len() < prompt.tokens.len() + prompt.max_tokens {
        tokens.push(next_token(&tokens));
        if tokens.last() == Some(&3) {
            break;
        }
    }
    tokens.split_off(prompt.tokens.len())
}

/// Prompts of which many begin alike.
fn prompts() -> impl Strategy<Value = Vec<Prompt>> {
    let one = (
        0u32..3,
        0usize..200,
        prop::collection::vec(0u32..9, 1..40),
        1usize..30,
    );
    prop::collection::vec(one, 1..25).prop_map(|all| {
        all.into_iter()
            .enumerate()
            .map(|(key, (header, shared, own, max_tokens))| {
                let shared = (0..shared as u32).map(|at| (at + header) % 7);
                prompt(key as u64, shared.chain(own).collect(), max_tokens)
            })
            .collect()
    })
}

/// Any limits within which a prompt of 270 tokens, answer included, can run.
pub(crate) fn limits() -> impl Strategy<Value = Limits> {
    (
        (1usize..6, 1usize..9, 1usize..100),
        (1usize..8, 1usize..20, 8usize..60),
        prop::sample::select(&FORKS[..]),
        prop::sample::select(&[PromptRows::Known, PromptRows::AskedFor][..]),
    )
        .prop_map(
            |(
                (ranks, max_batch, step_tokens),
                (steps_in_flight, sequences, kv_blocks),
                forks,
                rows,
            )| Limits {
                ranks,
                max_batch,
                step_tokens,
                steps_in_flight,
                sequences,
                kv_blocks,
                forks,
                rows,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn every_prompt_is_answered_right_within_all_limits(
        prompts in prompts(),
        limits in limits(),
        delays in prop::collection::vec(0usize..9, 1..8),
    ) {
        let (answers, _) = run(limits, &prompts, &delays);
        for prompt in &prompts {
            prop_assert_eq!(&answers[&prompt.key], &expected(prompt));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whoever goes away, and whenever: the others are answered as if it had never been there, and all memory returns.
    #[test]
    fn cancelling_some_changes_nothing_for_the_others(
        prompts in prompts(),
        limits in limits(),
        delays in prop::collection::vec(0usize..9, 1..8),
        cancels in prop::collection::hash_map(0u64..25, 1usize..150, 0..12),
    ) {
        let (answers, _) = run_with_cancels(limits, &prompts, &delays, &cancels);
        for prompt in &prompts {
            let expected = expected(prompt);
            let answer = answers.get(&prompt.key).map_or(&[][..], Vec::as_slice);
            match cancels.contains_key(&prompt.key) {
                true => prop_assert!(expected.starts_with(answer)),
                false => prop_assert_eq!(answer, &expected),
            }
        }
    }
}

#[test]
fn what_a_cancelled_sequence_held_is_there_for_the_next_step() {
    // Room for one of the two: 300 tokens are five blocks.
    for forks in FORKS {
        let limits = Limits {
            kv_blocks: 8,
            step_tokens: 64,
            forks,
            ..LIMITS
        };
        let mut schedule = Schedule::new(limits);
        schedule.admit(prompt(0, vec![1; 290], 10));
        schedule.admit(prompt(1, vec![2; 290], 10));
        let step = schedule.next_step().unwrap();
        assert_eq!((step.entries.len(), schedule.sequences()), (1, 1));
        assert!(schedule.kv_tokens() >= 300);
        assert_eq!(schedule.cancel(0), Some(step.entries[0].slot));
        assert_eq!((schedule.sequences(), schedule.kv_tokens()), (0, 0));
        let step = schedule.next_step().unwrap();
        assert_eq!(schedule.key(step.entries[0].slot), Some(1));
        // One that waits is simply gone.
        schedule.admit(prompt(2, vec![3; 290], 10));
        assert_eq!(schedule.cancel(2), None);
        assert_eq!(schedule.cancel(1), Some(step.entries[0].slot));
        assert!(schedule.is_idle());
        // Neither had a token on its way.
        assert!(!schedule.is_unwanted(step.entries[0].slot));
    }
}

#[test]
fn a_common_beginning_is_computed_once_also_by_prompts_that_come_together() {
    let header: Vec<u32> = (0..640).map(|at| at % 5).collect();
    let with_tail = |key: u64| prompt(key, [&header[..], &[key as u32, 9]].concat(), 4);
    let prompts: Vec<Prompt> = (0..20).map(with_tail).collect();
    for (sequences, steps_in_flight) in [(20, 3), (4, 2), (1, 1)] {
        let limits = Limits {
            sequences,
            steps_in_flight,
            step_tokens: 32,
            ..LIMITS
        };
        let (_, ranks) = run(limits, &prompts, &[2]);
        assert!(
            ranks.computed_tokens <= 640 + 20 * (2 + 4),
            "{} tokens at {sequences} sequences",
            ranks.computed_tokens
        );
    }
}

#[test]
fn shared_blocks_count_once_so_that_more_sequences_fit() {
    // A header of ten blocks, and one block of each prompt's own: room for the header and three of them.
    let header: Vec<u32> = (0..640).map(|at| at % 5).collect();
    let with_tail = |key: u64| prompt(key, [&header[..], &[key as u32]].concat(), 60);
    let prompts: Vec<Prompt> = (0..6).map(with_tail).collect();
    let most_at_once = |forks| {
        let limits = Limits {
            kv_blocks: 13,
            forks,
            step_tokens: 700,
            ..LIMITS
        };
        run(limits, &prompts, &[0]).1.largest_group
    };
    assert_eq!(most_at_once(Forks::Shared), 3);
    assert_eq!(most_at_once(Forks::Copied { growth: 1 }), 1);
}

#[test]
fn groups_even_out_whatever_they_began_as() {
    // Sixteen sequences on two ranks: soon two groups of eight.
    let long = (0..).map(|token| prompt(0, vec![token; 3], 40));
    let long = long.filter(|prompt| expected(prompt).len() == 40);
    let prompts = (0..).zip(long).take(16);
    let prompts: Vec<Prompt> = prompts
        .map(|(key, prompt)| Prompt { key, ..prompt })
        .collect();
    let limits = Limits {
        ranks: 2,
        max_batch: 16,
        steps_in_flight: 3,
        step_tokens: 13,
        ..LIMITS
    };
    let (_, ranks) = run(limits, &prompts, &[4]);
    assert_eq!(ranks.largest_group, 8);
    assert_eq!(ranks.most_under_way, 3);
}

#[test]
fn chunks_of_one_prompt_follow_each_other_without_waiting() {
    let mut schedule = Schedule::new(Limits {
        ranks: 2,
        steps_in_flight: 3,
        ..LIMITS
    });
    schedule.admit(prompt(0, (0..30).collect(), 4));
    let steps: Vec<Step> = std::iter::from_fn(|| schedule.next_step()).collect();
    let starts: Vec<u32> = steps.iter().map(|step| step.entries[0].start).collect();
    assert_eq!(starts, [0, 8, 16]);
    assert!(steps.iter().all(|step| step.entries[0].sample.is_none()));
    schedule.answered();
    let last = schedule.next_step().unwrap();
    assert_eq!(last.entries[0].tokens, (24..30).collect::<Vec<u32>>());
    assert!(last.entries[0].sample.is_some());
}

#[test]
fn decoding_goes_on_beside_a_long_prompt() {
    let mut schedule = Schedule::new(LIMITS);
    schedule.admit(prompt(0, vec![1], 50));
    let first = schedule.next_step().unwrap();
    schedule.admit(prompt(1, vec![2; 500], 2));
    schedule.answered();
    schedule.continue_with(first.entries[0].slot, 5);
    let step = schedule.next_step().unwrap();
    let counts: Vec<usize> = step
        .entries
        .iter()
        .map(|entry| entry.tokens.len())
        .collect();
    assert_eq!(counts, [1, 7]);
}

#[test]
fn a_group_waits_to_be_full_only_while_every_rank_has_a_step() {
    let mut schedule = Schedule::new(Limits {
        ranks: 2,
        steps_in_flight: 3,
        step_tokens: 2,
        ..LIMITS
    });
    for key in 0..4 {
        schedule.admit(prompt(key, vec![1], 9));
    }
    let prefills: Vec<Step> = std::iter::from_fn(|| schedule.next_step()).collect();
    assert_eq!(prefills.len(), 2);
    schedule.answered();
    schedule.continue_with(0, 5);
    // One step is on its way for two ranks: whoever is ready goes.
    assert_eq!(schedule.next_step().unwrap().entries.len(), 1);
    // Two are: one sequence of a group of two waits for another.
    schedule.continue_with(1, 5);
    assert!(schedule.next_step().is_none());
    schedule.answered();
    schedule.continue_with(2, 5);
    assert_eq!(schedule.next_step().unwrap().entries.len(), 2);
}

#[test]
fn a_prompt_that_waits_for_another_holds_up_no_third() {
    let mut schedule = Schedule::new(Limits {
        steps_in_flight: 9,
        ..LIMITS
    });
    let long: Vec<u32> = (0..300).map(|at| at % 9).collect();
    schedule.admit(prompt(0, long.clone(), 2));
    schedule.admit(prompt(1, [&long[..], &[1]].concat(), 2));
    schedule.admit(prompt(2, vec![5, 5], 2));
    schedule.next_step().unwrap();
    let begun: Vec<u64> = schedule.live.values().map(|one| one.key).collect();
    assert_eq!(begun, [0, 2]);
}

#[test]
fn a_prompt_goes_on_beside_however_many_that_decode() {
    let mut schedule = Schedule::new(LIMITS);
    for key in 0..8 {
        schedule.admit(prompt(key, vec![1], 50));
    }
    schedule.next_step().unwrap();
    schedule.answered();
    (0..8).for_each(|slot| schedule.continue_with(slot, 5));
    schedule.admit(prompt(8, vec![2; 100], 2));
    let step = schedule.next_step().unwrap();
    assert_eq!(step.entries.last().unwrap().tokens.len(), 4);
}

#[test]
fn caches_that_are_kept_are_not_dropped_for_what_then_has_no_room_anyway() {
    let header: Vec<u32> = (0..128).map(|at| at % 7).collect();
    let limits = Limits {
        kv_blocks: 8,
        step_tokens: 1000,
        ..LIMITS
    };
    let mut schedule = Schedule::new(limits);
    schedule.admit(prompt(0, header.clone(), 1));
    let first = schedule.next_step().unwrap();
    schedule.admit(prompt(1, vec![8; 200], 100));
    schedule.next_step().unwrap();
    schedule.answered();
    schedule.finish(first.entries[0].slot);
    // Two blocks are kept, five are taken, and seven are wanted.
    schedule.admit(prompt(2, vec![9; 400], 48));
    assert!(schedule.next_step().is_none());
    assert_eq!(schedule.ended.len(), 1);
    // The header is still there for who can begin.
    schedule.admit(prompt(3, [&header[..], &[1]].concat(), 1));
    assert!(schedule.upkeep.is_empty());
}
