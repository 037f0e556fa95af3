//! The loop over ranks that are threads, with a model that is arithmetic: what each rank is sent and in
//! which order is checked where it arrives, and so is the end.

use super::*;
use crate::sampler::Scores;
use crate::schedule::{self, Forks, Limits, PromptRows};
use crate::wire::{SampleParams, Upkeep};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// Longest that a test waits for anything; a loop that is stuck fails by it.
const LIMIT: Duration = Duration::from_secs(20);

/// What is on its way from rank to rank, oldest first, and when it arrives. Shared bytes count as sent by the last
/// rank to each.
type Post = Arc<Mutex<HashMap<(usize, usize, Way), VecDeque<(Instant, Vec<u8>)>>>>;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Way {
    Message(Kind),
    Shared,
}

/// One rank of a run inside this process.
struct LocalTransport {
    rank: usize,
    size: usize,
    post: Post,
    /// How long messages of this rank take, one after the other.
    delays: Vec<Duration>,
    sent: usize,
    /// Lengths announced and not yet received, oldest first.
    expected: VecDeque<usize>,
    bells: Bells,
}

/// What becomes of the rings between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bells {
    /// There are no bells.
    None,
    /// They are counted on, and every ring is lost.
    Lost,
    /// It rings all the time, whether there is something or not.
    Forged,
}

/// Ranks connected with each other, each with the delays of what it sends.
fn local_ranks(size: usize, delays: &[Duration]) -> Vec<LocalTransport> {
    let post = Post::default();
    (0..size)
        .map(|rank| LocalTransport {
            rank,
            size,
            post: Arc::clone(&post),
            delays: delays.to_vec(),
            // Not all ranks begin with the same delay.
            sent: rank,
            expected: VecDeque::new(),
            bells: Bells::None,
        })
        .collect()
}

impl LocalTransport {
    fn put(&mut self, to: usize, way: Way, bytes: Vec<u8>) {
        let delay = self.delays.get(self.sent % self.delays.len().max(1));
        self.sent += 1;
        let arrival = Instant::now() + delay.copied().unwrap_or_default();
        let mut post = self.post.lock().unwrap();
        let queue = post.entry((self.rank, to, way)).or_default();
        queue.push_back((arrival, bytes));
    }

    fn take(&mut self, from: usize, way: Way) -> Option<Vec<u8>> {
        let mut post = self.post.lock().unwrap();
        let queue = post.get_mut(&(from, self.rank, way))?;
        let has_arrived = queue.front()?.0 <= Instant::now();
        has_arrived
            .then(|| queue.pop_front())
            .flatten()
            .map(|(_, bytes)| bytes)
    }
}

impl Rest for LocalTransport {
    fn rest(&mut self, pause: Duration) -> bool {
        let is_forged = self.bells == Bells::Forged;
        thread::sleep(match is_forged {
            true => pause.min(Duration::from_micros(10)),
            false => pause,
        });
        is_forged
    }

    fn is_rung(&self) -> bool {
        self.bells != Bells::None
    }
}

impl Transport for LocalTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn send(&mut self, to: usize, kind: Kind, bytes: Vec<u8>) -> Result<()> {
        let last = self.size - 1;
        let is_allowed = match kind {
            Kind::Frame => to == self.rank + 1 && to < self.size,
            Kind::Question => self.rank == 0 && to > 0,
            Kind::Answer | Kind::Rows => (self.rank, to) == (last, 0),
            Kind::Setup => false,
        };
        assert!(is_allowed, "{kind:?} from rank {} to {to}", self.rank);
        self.put(to, Way::Message(kind), bytes);
        Ok(())
    }

    fn try_receive(&mut self, from: usize, kind: Kind) -> Result<Option<Vec<u8>>> {
        Ok(self.take(from, Way::Message(kind)))
    }

    fn share(&mut self, bytes: Vec<u8>) -> Result<()> {
        assert_eq!(self.rank + 1, self.size, "only the last rank shares");
        self.expected.push_back(bytes.len());
        for rank in 0..self.size {
            self.put(rank, Way::Shared, bytes.clone());
        }
        Ok(())
    }

    fn expect_shared(&mut self, length: usize) -> Result<()> {
        assert_ne!(self.rank + 1, self.size, "the last rank shares");
        self.expected.push_back(length);
        Ok(())
    }

    fn try_shared(&mut self) -> Result<Option<Vec<u8>>> {
        if self.expected.is_empty() {
            return Ok(None);
        }
        let Some(bytes) = self.take(self.size - 1, Way::Shared) else {
            return Ok(None);
        };
        // What MPI would turn into corruption or a hang: the announced length differs.
        assert_eq!(self.expected.pop_front(), Some(bytes.len()));
        Ok(Some(bytes))
    }

    fn gather_all(&mut self, _: &[u8], _: Option<Duration>) -> Result<Vec<Vec<u8>>> {
        unreachable!("the loop does not gather")
    }

    fn flush(&mut self) -> Result<()> {
        wait::until("shared bytes", Some(LIMIT), || {
            while self.try_shared()?.is_some() {}
            Ok(self.expected.is_empty().then_some(()))
        })
    }
}

/// What a sleep may be late by.
const LATE: Duration = Duration::from_micros(300);

/// Lets time pass precisely, without taking a core for long.
fn pass(time: Duration) {
    let began = Instant::now();
    thread::sleep(time.saturating_sub(LATE));
    while began.elapsed() < time {
        thread::yield_now();
    }
}

const VOCABULARY: u32 = 97;

/// A stage whose hidden state is a running sum over the sequence: every rank adds one to each row, the
/// last gives the sum's remainder as the best token. A token lost, doubled or out of order changes it.
struct Sums {
    /// Token ids come as such, not as rows.
    looks_up: bool,
    is_last: bool,
    delay: Duration,
    /// Rows of each sequence so far, as this rank received them.
    rows: HashMap<u32, Vec<u64>>,
}

/// A token's row is its number, as eight bytes.
fn embedding(tokens: &[u32]) -> Vec<u8> {
    tokens
        .iter()
        .flat_map(|&token| (token as u64).to_le_bytes())
        .collect()
}

impl Compute for Sums {
    fn embed(&mut self, tokens: &[u32]) -> Result<Vec<u8>> {
        assert!(self.is_last, "only the last rank is asked for rows");
        Ok(embedding(tokens))
    }

    fn run(&mut self, step: &Step, payload: &[u8]) -> Result<Output> {
        pass(self.delay);
        for &upkeep in &step.upkeep {
            match upkeep {
                Upkeep::Release(slot) => {
                    self.rows.remove(&slot);
                }
                Upkeep::Fork(fork) => {
                    let begun = self.rows[&fork.from][..fork.tokens as usize].to_vec();
                    self.rows.insert(fork.to, begun);
                }
            }
        }
        let incoming: Vec<u64> = match self.looks_up {
            true => step.tokens().iter().map(|&token| token as u64).collect(),
            false => payload
                .chunks_exact(8)
                .map(|row| u64::from_le_bytes(row.try_into().unwrap()))
                .collect(),
        };
        assert_eq!(incoming.len(), step.row_count());
        let mut left = &incoming[..];
        let mut scores = Vec::new();
        for entry in &step.entries {
            let (own, others) = left.split_at(entry.tokens.len());
            left = others;
            let rows = self.rows.entry(entry.slot).or_default();
            assert_eq!(
                rows.len(),
                entry.start as usize,
                "a gap, or rows computed twice"
            );
            rows.extend(own);
            if entry.sample.is_some() {
                let best = rows.iter().sum::<u64>() % VOCABULARY as u64;
                let logit = |id: u32| if id as u64 == best { 1.0 } else { 0.0 };
                scores.push(Scores::All((0..VOCABULARY).map(logit).collect()));
            }
        }
        if !self.is_last {
            let rows = incoming.iter().flat_map(|row| (row + 1).to_le_bytes());
            return Ok(Output::Hidden(rows.collect()));
        }
        Ok(Output::Scores(scores))
    }
}

/// Token ids that `ranks` ranks of [`Sums`] must give.
fn expected(prompt: &[u32], count: usize, ranks: u64) -> Vec<u32> {
    let mut sequence = prompt.to_vec();
    for _ in 0..count {
        let sum: u64 = sequence.iter().map(|&token| token as u64 + ranks - 1).sum();
        sequence.push((sum % VOCABULARY as u64) as u32);
    }
    sequence.split_off(prompt.len())
}

/// Prompts, each with the number of tokens to generate.
struct List {
    left: VecDeque<(Vec<u32>, usize)>,
    next_key: u64,
    remaining: HashMap<u64, usize>,
    answers: Vec<Vec<u32>>,
    /// Says `NotYet` this often before each prompt.
    hesitation: usize,
    hesitated: usize,
    seen: Vec<Seen>,
    /// After how many of its tokens a sequence is cancelled, by key.
    cancels: HashMap<u64, usize>,
    cancelled: Vec<u64>,
}

impl List {
    fn new(prompts: &[(Vec<u32>, usize)], hesitation: usize) -> Self {
        Self {
            left: prompts.iter().cloned().collect(),
            next_key: 0,
            remaining: HashMap::new(),
            answers: vec![Vec::new(); prompts.len()],
            hesitation,
            hesitated: 0,
            seen: Vec::new(),
            cancels: HashMap::new(),
            cancelled: Vec::new(),
        }
    }
}

impl Rest for List {}

impl Feed for List {
    fn next(&mut self) -> Result<Next> {
        if self.hesitated < self.hesitation {
            self.hesitated += 1;
            return Ok(Next::NotYet);
        }
        self.hesitated = 0;
        let Some((tokens, max_tokens)) = self.left.pop_front() else {
            return Ok(Next::Done);
        };
        let key = self.next_key;
        self.next_key += 1;
        self.remaining.insert(key, max_tokens);
        Ok(Next::Prompt(Prompt {
            key,
            tokens,
            max_tokens,
            params: SampleParams::GREEDY,
        }))
    }

    fn token(&mut self, key: u64, token: SampledToken) -> Result<Then> {
        assert!(
            !self.cancelled.contains(&key),
            "a token of a cancelled sequence"
        );
        self.answers[key as usize].push(token.token);
        let remaining = self.remaining.get_mut(&key).unwrap();
        *remaining -= 1;
        Ok(if *remaining == 0 {
            Then::Finished
        } else {
            Then::Continue
        })
    }

    fn next_cancelled(&mut self) -> Option<u64> {
        let has_enough = |(key, count): (&u64, &usize)| {
            let is_under_way = self
                .remaining
                .get(key)
                .is_some_and(|&remaining| remaining > 0);
            (is_under_way && self.answers[*key as usize].len() >= *count).then_some(*key)
        };
        let key = self.cancels.iter().find_map(has_enough)?;
        self.cancels.remove(&key);
        self.cancelled.push(key);
        Some(key)
    }

    fn is_watched(&self) -> bool {
        true
    }

    fn watch(&mut self, seen: Seen) {
        self.seen.push(seen);
    }
}

/// How a run is set up.
#[derive(Debug, Clone)]
struct Setup {
    limits: Limits,
    /// How long each rank computes a step.
    compute_us: Vec<u64>,
    /// How long each message takes.
    message_us: Vec<u64>,
    hesitation: usize,
    bells: Bells,
}

impl Setup {
    fn new(ranks: usize, steps_in_flight: usize) -> Self {
        Self {
            limits: Limits {
                ranks,
                max_batch: 8,
                step_tokens: 64,
                steps_in_flight,
                sequences: 64,
                kv_blocks: 1000,
                forks: Forks::Shared,
                rows: PromptRows::Known,
            },
            compute_us: vec![0],
            message_us: vec![0],
            hesitation: 0,
            bells: Bells::None,
        }
    }
}

/// Runs the prompts on ranks that are threads; the feed with its answers.
fn generate(prompts: &[(Vec<u32>, usize)], setup: &Setup) -> List {
    generate_with_cancels(prompts, setup, HashMap::new())
}

/// As [`generate`]; `cancels`: after how many of its tokens a sequence is cancelled.
fn generate_with_cancels(
    prompts: &[(Vec<u32>, usize)],
    setup: &Setup,
    cancels: HashMap<u64, usize>,
) -> List {
    let ranks = setup.limits.ranks;
    let rows = match setup.limits.rows {
        PromptRows::Known => Rows::Local,
        PromptRows::AskedFor => Rows::FromLast { row_bytes: 8 },
    };
    let delays: Vec<_> = setup
        .message_us
        .iter()
        .map(|&us| Duration::from_micros(us))
        .collect();
    let with_bells = |transport| LocalTransport {
        bells: setup.bells,
        ..transport
    };
    let mut transports = local_ranks(ranks, &delays).into_iter().map(with_bells);
    let stage = |rank: usize| Sums {
        looks_up: rank == 0 && rows == Rows::Local,
        is_last: rank + 1 == ranks,
        delay: Duration::from_micros(setup.compute_us[rank % setup.compute_us.len()]),
        rows: HashMap::new(),
    };
    let mut leader = Worker::new(transports.next().unwrap(), stage(0), rows);
    let followers: Vec<_> = transports
        .map(|transport| {
            let stage = stage(transport.rank);
            let mut worker = Worker::new(transport, stage, rows);
            thread::spawn(move || worker.follow())
        })
        .collect();
    let mut list = List::new(prompts, setup.hesitation);
    list.cancels = cancels;
    leader
        .lead(&mut Schedule::new(setup.limits), &mut list, LIMIT)
        .unwrap();
    for follower in followers {
        follower.join().unwrap().unwrap();
    }
    list
}

fn setups() -> impl Strategy<Value = Setup> {
    (
        schedule::tests::limits(),
        prop::collection::vec(0u64..60, 1..6),
        prop::collection::vec(0u64..200, 1..6),
        0usize..3,
    )
        .prop_map(|(limits, compute_us, message_us, hesitation)| Setup {
            limits: Limits {
                // One rank alone has nobody to ask.
                rows: match limits.ranks {
                    1 => PromptRows::Known,
                    _ => limits.rows,
                },
                ..limits
            },
            compute_us,
            message_us,
            hesitation,
            bells: Bells::None,
        })
}

/// Prompts and tokens to generate; some prompts begin alike.
fn prompts() -> impl Strategy<Value = Vec<(Vec<u32>, usize)>> {
    let one = (
        prop::option::of(60u32..140),
        prop::collection::vec(0..VOCABULARY, 1..20),
        1usize..6,
    );
    let one = one.prop_map(|(shared, own, count)| {
        let shared = (0..shared.unwrap_or(0)).map(|at| at % 5);
        (shared.chain(own).collect(), count)
    });
    prop::collection::vec(one, 0..9)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Also the proof that nothing waits for ever: a case that does fails by the time limit.
    #[test]
    fn every_prompt_is_answered_as_arithmetic_says_whatever_the_limits_speeds_and_delays(
        prompts in prompts(),
        setup in setups(),
    ) {
        let ranks = setup.limits.ranks as u64;
        let expected: Vec<Vec<u32>> =
            prompts.iter().map(|(prompt, count)| expected(prompt, *count, ranks)).collect();
        prop_assert_eq!(generate(&prompts, &setup).answers, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// The ranks too go on as if those that were cancelled had never been there.
    #[test]
    fn cancelled_sequences_harm_no_others_and_hold_up_no_end(
        prompts in prompts(),
        setup in setups(),
        cancels in prop::collection::hash_map(0u64..9, 0usize..5, 0..9),
    ) {
        let ranks = setup.limits.ranks as u64;
        let list = generate_with_cancels(&prompts, &setup, cancels);
        for (key, (prompt, count)) in prompts.iter().enumerate() {
            let expected = expected(prompt, *count, ranks);
            match list.cancelled.contains(&(key as u64)) {
                true => prop_assert!(expected.starts_with(&list.answers[key])),
                false => prop_assert_eq!(&list.answers[key], &expected),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn rings_that_are_lost_or_forged_change_no_answer_and_hold_up_no_end(
        prompts in prompts(),
        setup in setups(),
        bells in prop::sample::select(vec![Bells::Lost, Bells::Forged]),
    ) {
        let setup = Setup { bells, ..setup };
        let ranks = setup.limits.ranks as u64;
        let expected: Vec<Vec<u32>> =
            prompts.iter().map(|(prompt, count)| expected(prompt, *count, ranks)).collect();
        prop_assert_eq!(generate(&prompts, &setup).answers, expected);
    }
}

#[test]
fn every_rank_hears_of_a_prompt_before_the_steps_come_down_to_it() {
    let mut transports = local_ranks(4, &[]);
    let stage = Sums {
        looks_up: true,
        is_last: false,
        delay: Duration::ZERO,
        rows: HashMap::new(),
    };
    let mut schedule = Schedule::new(Setup::new(4, 2).limits);
    let mut list = List::new(&[(vec![1], 1)], 0);
    let mut leader = Worker::new(transports.remove(0), stage, Rows::Local);
    // Nobody follows, so the first step is not answered.
    let unanswered = leader.lead(&mut schedule, &mut list, Duration::from_millis(1));
    assert!(unanswered.is_err());
    for mut transport in transports {
        let told = transport.try_receive(0, Kind::Question).unwrap();
        assert_eq!(wire::decode(&told.unwrap()).unwrap().0, Frame::Wake);
    }
}

#[test]
fn every_step_can_bring_back_what_all_ranks_have_spent() {
    let mut setup = Setup::new(3, 4);
    setup.compute_us = vec![20_000];
    let seen = generate(&[(vec![1], 20)], &setup).seen;
    assert!(!seen.is_empty(), "a second of computing is watched");
    for seen in seen {
        assert_eq!((seen.sequences, seen.loads.len()), (1, 3));
        assert!(seen.loads.iter().all(|load| load.busy_us >= 20_000));
    }
}

/// Steps of this long on every rank, against which messages and thread switches are little.
const STEP_US: u64 = 4000;

/// How many times as fast a group for each rank is as one group, where a step takes as long on every rank.
fn gain_of_groups(ranks: usize, tokens: usize) -> f64 {
    let prompts: Vec<(Vec<u32>, usize)> = (0..2 * ranks as u32)
        .map(|token| (vec![token], tokens))
        .collect();
    let seconds = |steps_in_flight, sequences| {
        let mut setup = Setup::new(ranks, steps_in_flight);
        setup.limits.max_batch = 2;
        setup.limits.sequences = sequences;
        setup.compute_us = vec![STEP_US];
        let began = Instant::now();
        generate(&prompts, &setup);
        began.elapsed().as_secs_f64()
    };
    seconds(1, 2) / seconds(ranks + 1, 2 * ranks)
}

#[test]
fn three_ranks_are_busy_with_three_groups_and_eight_with_eight() {
    for (ranks, tokens, goal) in [(3, 30, 2.7), (8, 20, 7.0)] {
        // Filling and emptying the pipeline costs `ranks - 1` steps.
        let steps = (ranks * tokens) as f64;
        let limit = ranks as f64 * steps / (steps + ranks as f64 - 1.0);
        // The machine may be busy with something else for a moment.
        let mut gains = (0..6).map(|_| gain_of_groups(ranks, tokens));
        let gain = gains.find(|&gain| gain >= goal);
        let gain =
            gain.unwrap_or_else(|| panic!("{ranks} ranks: under {goal}; {limit:.2} is the limit"));
        eprintln!("{ranks} ranks: {gain:.2}; {limit:.2} is the limit");
    }
}

#[test]
fn an_answer_that_stays_out_is_an_error_that_names_the_step() {
    let mut transports = local_ranks(2, &[]);
    let _silent = transports.pop();
    let stage = Sums {
        looks_up: true,
        is_last: false,
        delay: Duration::ZERO,
        rows: HashMap::new(),
    };
    let mut leader = Worker::new(transports.pop().unwrap(), stage, Rows::Local);
    let mut list = List::new(&[(vec![1], 1)], 0);
    let limit = Duration::from_millis(30);
    let error = leader
        .lead(
            &mut Schedule::new(Setup::new(2, 3).limits),
            &mut list,
            limit,
        )
        .unwrap_err();
    assert!(
        error.to_string().contains("step 0 has had no answer"),
        "{error}"
    );
}

#[test]
fn a_frame_that_is_none_ends_the_rank_with_an_error() {
    let mut transports = local_ranks(2, &[]);
    let last = transports.pop().unwrap();
    transports[0]
        .send(1, Kind::Frame, b"not a frame at all".to_vec())
        .unwrap();
    let stage = Sums {
        looks_up: false,
        is_last: true,
        delay: Duration::ZERO,
        rows: HashMap::new(),
    };
    let error = Worker::new(last, stage, Rows::Local).follow().unwrap_err();
    assert!(
        format!("{error:#}").contains("a frame from the previous rank"),
        "{error:#}"
    );
}
