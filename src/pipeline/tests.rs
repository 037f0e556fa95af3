//! The loop over ranks that are threads, with a model that is arithmetic: what each rank is sent and in
//! which order is checked where it arrives, and so is the end.

use super::*;
use proptest::prelude::*;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Longest that a test waits for anything; a loop that is stuck fails by it.
const LIMIT: Duration = Duration::from_secs(20);

/// What is on its way from rank to rank, oldest first.
type Post = Arc<Mutex<HashMap<(usize, usize, Kind), VecDeque<Vec<u8>>>>>;

/// One rank of a run inside this process.
struct LocalTransport {
    rank: usize,
    size: usize,
    post: Post,
    /// On the last rank: to all ranks, itself included.
    to_all: Vec<Sender<Vec<u8>>>,
    shared: Receiver<Vec<u8>>,
    /// Lengths announced and not yet received, oldest first.
    expected: VecDeque<usize>,
}

/// `size` ranks connected with each other.
fn local_ranks(size: usize) -> Vec<LocalTransport> {
    let (to_all, shared): (Vec<_>, Vec<_>) = (0..size).map(|_| channel()).unzip();
    let post = Post::default();
    shared
        .into_iter()
        .enumerate()
        .map(|(rank, shared)| LocalTransport {
            rank,
            size,
            post: Arc::clone(&post),
            to_all: if rank + 1 == size {
                to_all.clone()
            } else {
                Vec::new()
            },
            shared,
            expected: VecDeque::new(),
        })
        .collect()
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
            Kind::Question => (self.rank, to) == (0, last),
            Kind::Answer => (self.rank, to) == (last, 0),
            Kind::Setup => false,
        };
        assert!(is_allowed, "{kind:?} from rank {} to {to}", self.rank);
        let mut post = self.post.lock().unwrap();
        let key = (self.rank, to, kind);
        post.entry(key).or_default().push_back(bytes);
        Ok(())
    }

    fn try_receive(&mut self, from: usize, kind: Kind) -> Result<Option<Vec<u8>>> {
        let mut post = self.post.lock().unwrap();
        let waiting = post.get_mut(&(from, self.rank, kind));
        Ok(waiting.and_then(VecDeque::pop_front))
    }

    fn share(&mut self, bytes: Vec<u8>) -> Result<()> {
        assert_eq!(self.rank + 1, self.size, "only the last rank shares");
        self.expected.push_back(bytes.len());
        for rank in &self.to_all {
            let _ = rank.send(bytes.clone());
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
        let Ok(bytes) = self.shared.try_recv() else {
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

const VOCABULARY: u32 = 97;

/// A stage whose hidden state is a running sum over the sequence: every rank adds one to each row, the
/// last gives the sum's remainder as the best token. A token lost, doubled or out of order changes it.
struct Sums {
    /// Token ids come as such, not as rows.
    looks_up: bool,
    is_last: bool,
    delay: Duration,
    /// Rows of the sequence so far, as this rank received them.
    rows: Vec<u64>,
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
        std::thread::sleep(self.delay);
        if !step.release.is_empty() {
            self.rows.clear();
        }
        let entry = &step.entries[0];
        assert!(
            entry.start as usize <= self.rows.len(),
            "a gap before {}",
            entry.start
        );
        self.rows.truncate(entry.start as usize);
        let incoming: Vec<u64> = match self.looks_up {
            true => entry.tokens.iter().map(|&token| token as u64).collect(),
            false => payload
                .chunks_exact(8)
                .map(|row| u64::from_le_bytes(row.try_into().unwrap()))
                .collect(),
        };
        assert_eq!(incoming.len(), entry.tokens.len());
        self.rows.extend(&incoming);
        if !self.is_last {
            let rows = incoming.iter().flat_map(|row| (row + 1).to_le_bytes());
            return Ok(Output::Hidden(rows.collect()));
        }
        let best = self.rows.iter().sum::<u64>() % VOCABULARY as u64;
        let logits = (0..VOCABULARY)
            .map(|id| if id as u64 == best { 1.0 } else { 0.0 })
            .collect();
        Ok(Output::Logits(
            entry.sample.iter().map(|_| Vec::clone(&logits)).collect(),
        ))
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
    remaining: usize,
    answers: Vec<Vec<u32>>,
    /// Says `NotYet` this often before each prompt.
    hesitation: usize,
    hesitated: usize,
}

impl Feed for List {
    fn next(&mut self) -> Result<Next> {
        if self.hesitated < self.hesitation {
            self.hesitated += 1;
            return Ok(Next::NotYet);
        }
        self.hesitated = 0;
        let Some((prompt, count)) = self.left.pop_front() else {
            return Ok(Next::Done);
        };
        self.remaining = count;
        self.answers.push(Vec::new());
        Ok(Next::Prompt(prompt, SampleParams::GREEDY))
    }

    fn token(&mut self, token: SampledToken) -> Result<Then> {
        self.answers.last_mut().unwrap().push(token.token);
        self.remaining -= 1;
        Ok(if self.remaining == 0 {
            Then::Finished
        } else {
            Then::Continue
        })
    }
}

/// Runs the prompts on ranks that are threads; the answers.
fn generate(
    prompts: &[(Vec<u32>, usize)],
    ranks: usize,
    chunk: usize,
    delays_us: &[u64],
    hesitation: usize,
    rows: Rows,
) -> Vec<Vec<u32>> {
    let mut transports = local_ranks(ranks).into_iter();
    let stage = |rank: usize| Sums {
        looks_up: rank == 0 && rows == Rows::Local,
        is_last: rank + 1 == ranks,
        delay: Duration::from_micros(delays_us[rank % delays_us.len()]),
        rows: Vec::new(),
    };
    let mut leader = Worker::new(transports.next().unwrap(), stage(0), rows);
    let followers: Vec<_> = transports
        .map(|transport| {
            let stage = stage(transport.rank);
            let mut worker = Worker::new(transport, stage, rows);
            std::thread::spawn(move || worker.follow())
        })
        .collect();
    let mut list = List {
        left: prompts.iter().cloned().collect(),
        remaining: 0,
        answers: Vec::new(),
        hesitation,
        hesitated: 0,
    };
    leader
        .lead(&mut Schedule::new(chunk), &mut list, LIMIT)
        .unwrap();
    for follower in followers {
        follower.join().unwrap().unwrap();
    }
    list.answers
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_prompt_is_answered_as_arithmetic_says_on_any_ranks_chunks_and_speeds(
        prompts in prop::collection::vec((prop::collection::vec(0..VOCABULARY, 1..20), 1usize..6), 0..5),
        ranks in 1usize..6,
        chunk in 1usize..9,
        delays_us in prop::collection::vec(0u64..60, 1..6),
        hesitation in 0usize..3,
        from_last: bool,
    ) {
        let rows = match from_last && ranks > 1 {
            true => Rows::FromLast { row_bytes: 8 },
            false => Rows::Local,
        };
        let answers = generate(&prompts, ranks, chunk, &delays_us, hesitation, rows);
        let expected: Vec<Vec<u32>> =
            prompts.iter().map(|(prompt, count)| expected(prompt, *count, ranks as u64)).collect();
        prop_assert_eq!(answers, expected);
    }
}

#[test]
fn an_answer_that_stays_out_is_an_error_that_names_the_step() {
    let mut transports = local_ranks(2);
    let _silent = transports.pop();
    let stage = Sums {
        looks_up: true,
        is_last: false,
        delay: Duration::ZERO,
        rows: Vec::new(),
    };
    let mut leader = Worker::new(transports.pop().unwrap(), stage, Rows::Local);
    let mut list = List {
        left: VecDeque::from([(vec![1], 1)]),
        remaining: 0,
        answers: Vec::new(),
        hesitation: 0,
        hesitated: 0,
    };
    let limit = Duration::from_millis(30);
    let error = leader
        .lead(&mut Schedule::new(8), &mut list, limit)
        .unwrap_err();
    assert!(
        error.to_string().contains("step 0 has had no answer"),
        "{error}"
    );
}

#[test]
fn a_frame_that_is_none_ends_the_rank_with_an_error() {
    let mut transports = local_ranks(2);
    let last = transports.pop().unwrap();
    transports[0]
        .send(1, Kind::Frame, b"not a frame at all".to_vec())
        .unwrap();
    let stage = Sums {
        looks_up: false,
        is_last: true,
        delay: Duration::ZERO,
        rows: Vec::new(),
    };
    let error = Worker::new(last, stage, Rows::Local).follow().unwrap_err();
    assert!(
        format!("{error:#}").contains("a frame from the previous rank"),
        "{error:#}"
    );
}
