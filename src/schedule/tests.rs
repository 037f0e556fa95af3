//! The schedule against a pipeline that is a queue: every step is checked for what the ranks would find wrong, and
//! answered after a while.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const LIMITS: Limits = Limits {
    ranks: 1,
    max_batch: 8,
    step_tokens: 8,
    steps_in_flight: 2,
    sequences: 16,
    kv_blocks: 1000,
    forks_are_copies: false,
    looks_up: true,
};

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

/// Caches as a rank has them, and the steps on their way.
struct Ranks {
    limits: Limits,
    caches: HashMap<u32, Vec<u32>>,
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
        for fork in &step.forks {
            let from = &self.caches[&fork.from];
            assert!(
                from.len() >= fork.tokens as usize,
                "a fork beyond its source"
            );
            let begun = from[..fork.tokens as usize].to_vec();
            assert!(self.caches.insert(fork.to, begun).is_none());
        }
        for slot in &step.release {
            self.caches.remove(slot);
        }
        assert!(!step.entries.is_empty(), "an empty step");
        for (index, entry) in step.entries.iter().enumerate() {
            let before = &step.entries[..index];
            assert!(before.iter().all(|other| other.slot != entry.slot));
            let cache = self.caches.entry(entry.slot).or_default();
            assert_eq!(
                cache.len(),
                entry.start as usize,
                "a gap, or tokens computed twice"
            );
            cache.extend(&entry.tokens);
        }
        self.computed_tokens += step.row_count();
        let decoding = step.entries.iter().filter(|entry| entry.tokens.len() == 1);
        self.largest_group = self.largest_group.max(decoding.count());
        assert!(step.row_count() <= self.limits.step_tokens.max(self.limits.max_batch + 1));
        let blocks = |cache: &Vec<u32>| cache.len().div_ceil(BLOCK_TOKENS);
        if self.limits.forks_are_copies {
            let held: usize = self.caches.values().map(blocks).sum();
            assert!(
                held <= self.limits.kv_blocks,
                "more than the plan has memory for"
            );
        }
        self.under_way.push_back(step);
        assert_eq!(
            self.under_way.len(),
            self.under_way.back().unwrap().in_flight as usize
        );
        self.most_under_way = self.most_under_way.max(self.under_way.len());
    }
}

/// Runs prompts to their ends; the answers by key. `delays`: how many turns of the loop each answer stays out.
fn run(limits: Limits, prompts: &[Prompt], delays: &[usize]) -> (HashMap<u64, Vec<u32>>, Ranks) {
    let mut schedule = Schedule::new(limits);
    let mut ranks = Ranks::new(limits);
    let mut left: VecDeque<Prompt> = prompts.iter().cloned().collect();
    let mut answers: HashMap<u64, Vec<u32>> = HashMap::new();
    let mut questions: VecDeque<(u32, usize)> = VecDeque::new();
    let mut turn = 0;
    let mut due = VecDeque::new();
    while !(left.is_empty() && schedule.is_idle()) {
        turn += 1;
        assert!(turn < 100_000, "no end: {schedule:?}");
        while schedule.has_room() && !left.is_empty() {
            schedule.admit(left.pop_front().unwrap());
        }
        assert!(schedule.sequences() <= limits.sequences);
        for (slot, tokens) in schedule.wanted_rows() {
            assert!(!limits.looks_up);
            questions.push_back((slot, tokens.len()));
        }
        if turn % 2 == 0 {
            if let Some((slot, count)) = questions.pop_front() {
                schedule.rows_came(slot, count);
            }
        }
        if let Some(step) = schedule.next_step() {
            due.push_back(turn + delays[step.number as usize % delays.len()]);
            ranks.execute(step);
        }
        assert!(ranks.under_way.len() <= limits.steps_in_flight);
        if due.front().is_some_and(|&due| due <= turn) {
            due.pop_front();
            let step = ranks.under_way.pop_front().unwrap();
            schedule.answered();
            for (entry, _) in step.sampled() {
                let sequence =
                    &ranks.caches[&entry.slot][..entry.start as usize + entry.tokens.len()];
                let token = next_token(sequence);
                let key = schedule.key(entry.slot).unwrap();
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
    assert_eq!(schedule.in_flight(), 0);
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

fn limits() -> impl Strategy<Value = Limits> {
    (
        (1usize..6, 1usize..9, 1usize..100),
        (1usize..8, 1usize..20, 5usize..60),
        any::<[bool; 2]>(),
    )
        .prop_map(
            |((ranks, max_batch, step_tokens), (steps_in_flight, sequences, kv_blocks), flags)| {
                Limits {
                    ranks,
                    max_batch,
                    step_tokens,
                    steps_in_flight,
                    sequences,
                    kv_blocks,
                    forks_are_copies: flags[0],
                    looks_up: flags[1],
                }
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
    let most_at_once = |forks_are_copies| {
        let limits = Limits {
            kv_blocks: 13,
            forks_are_copies,
            step_tokens: 700,
            ..LIMITS
        };
        run(limits, &prompts, &[0]).1.largest_group
    };
    assert_eq!(most_at_once(false), 3);
    assert_eq!(most_at_once(true), 1);
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
