//! Bytes between ranks: frames point to point down the pipeline, shared bytes from the last rank to
//! all, and gathering while the run is set up. A narrow trait, so that the loop can be run in a unit test;
//! the only file that names `mpi`.
//!
//! No call here blocks inside MPI (see [`crate::wait`]). While a rank computes, a second thread calls MPI now and
//! then ([`Transport::overlap`]): a large message moves only while both its sender and its receiver do. Ranks share in
//! the order of the steps: every rank calls [`Transport::expect_shared`] for the same steps in the same order, which is
//! what MPI asks of collectives.

use crate::bell::Bell;
use crate::meanwhile::Meanwhile;
use crate::wait::{self, Asleep, Rest};
use anyhow::{Result, bail, ensure};
use mpi::collective::{CommunicatorCollectives, Root};
use mpi::datatype::Equivalence;
use mpi::environment::Universe;
use mpi::point_to_point::{Destination, Source};
use mpi::request::{Request, StaticScope};
use mpi::topology::{Communicator, SimpleCommunicator};
use mpi::{Rank, Tag, Threading};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What a message from rank to rank is for. Kinds do not overtake or wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A step, or the end, down the pipeline.
    Frame,
    /// What the first rank asks of the others, out of turn.
    Question,
    /// What the last rank answers.
    Answer,
    /// From the last rank to the first: the embeddings of sampled tokens.
    Rows,
    /// While a run is set up: probes of a link, weights.
    Setup,
}

impl Kind {
    fn tag(self) -> Tag {
        match self {
            Self::Frame => 1,
            Self::Question => 2,
            Self::Answer => 3,
            Self::Setup => 4,
            Self::Rows => 5,
        }
    }
}

/// What the pipeline needs of the ranks' connection.
pub trait Transport: Rest {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Ranks in the run.
    fn size(&self) -> usize;

    /// Starts sending bytes to another rank, and rings its bell; returns at once. Those of one kind arrive in this order.
    fn send(&mut self, to: usize, kind: Kind, bytes: Vec<u8>) -> Result<()>;

    /// The next bytes of this kind from that rank, if they have come.
    fn try_receive(&mut self, from: usize, kind: Kind) -> Result<Option<Vec<u8>>>;

    /// On the last rank: starts sharing bytes with all ranks, itself included; returns at once.
    fn share(&mut self, bytes: Vec<u8>) -> Result<()>;

    /// On the other ranks: announces that the last will share this many bytes; returns at once.
    fn expect_shared(&mut self, length: usize) -> Result<()>;

    /// The oldest shared bytes not yet taken, if they have come.
    fn try_shared(&mut self) -> Result<Option<Vec<u8>>>;

    /// Every rank's bytes, in rank order, on every rank. Waits for all ranks, for `limit` at most.
    fn gather_all(&mut self, bytes: &[u8], limit: Option<Duration>) -> Result<Vec<Vec<u8>>>;

    /// Waits until everything sent has left.
    fn flush(&mut self) -> Result<()>;

    /// Computes, while messages go on leaving and arriving.
    fn overlap<R>(&mut self, compute: impl FnOnce() -> R) -> R
    where
        Self: Sized,
    {
        compute()
    }
}

/// Pause between two calls of MPI while a rank computes. Short against a step, and long against the microseconds that
/// a call takes from the core that computes.
const OVERLAP_PAUSE: Duration = Duration::from_micros(500);
/// The same where cores are many, so that none is taken from who computes: short against a step of a GPU.
const OVERLAP_PAUSE_WITH_CORES: Duration = Duration::from_micros(50);
/// Up to how many bytes a message leaves at once: hidden vectors of a decoding step. A larger one leaves only once its
/// receiver has agreed, which takes both sides' calls: where they are computing, pauses of both.
const EAGER_BYTES: &str = "131072";
/// Where Open MPI's ways between processes read it: through shared memory (before and since version 5) and TCP, at
/// 4096 and 65536 bytes by themselves.
const EAGER_LIMITS: [&str; 3] = [
    "OMPI_MCA_btl_vader_eager_limit",
    "OMPI_MCA_btl_sm_eager_limit",
    "OMPI_MCA_btl_tcp_eager_limit",
];
/// Messages of a kind that are received before they are asked for.
const RECEIVED_AHEAD: usize = 4;
const FLUSH_LIMIT: Duration = Duration::from_secs(60);
/// How long MPI may take to end.
const ENDING_LIMIT: Duration = Duration::from_secs(3);

/// Ranks of an MPI job.
///
/// Owns the MPI environment: dropping it finalises MPI, which can wait for ever after another rank
/// has failed, so a failure must reach [`abort`] first.
pub struct MpiTransport {
    // Declared first, dropped first: the thread must be gone before the requests are, and these before MPI is.
    meanwhile: Option<Meanwhile>,
    messages: Arc<Mutex<Messages>>,
    bell: Option<Bell>,
    rank: usize,
    size: usize,
    _universe: Universe,
}

/// What is on its way, and the connection that it goes through.
struct Messages {
    sending: VecDeque<OwnedRequest>,
    sharing: VecDeque<OwnedRequest>,
    /// By sender.
    receiving: HashMap<(usize, Kind), Receiving>,
    world: SimpleCommunicator,
}

/// Messages of one kind from one rank.
#[derive(Default)]
struct Receiving {
    pending: Option<OwnedRequest>,
    arrived: VecDeque<Vec<u8>>,
}

// SAFETY: a second thread uses it only where MPI has granted that any thread may call, one at a time, and through
// the mutex around it; buffers and requests belong to no thread.
unsafe impl Send for Messages {}

impl MpiTransport {
    /// Starts MPI, or joins the job that `mpirun` started. Call it before there are threads that read the environment.
    ///
    /// # Errors
    /// MPI started already, or grants less than calls from one thread of several.
    pub fn start() -> Result<Self> {
        for name in EAGER_LIMITS {
            if std::env::var_os(name).is_none() {
                // SAFETY: the one other thread so far waits for signals, and reads no environment.
                unsafe { std::env::set_var(name, EAGER_BYTES) };
            }
        }
        let Some((universe, granted)) = mpi::initialize_with_threading(Threading::Serialized)
        else {
            bail!("MPI is already initialised in this process");
        };
        ensure!(
            granted >= Threading::Funneled,
            "this MPI grants {granted:?}; mlx-pipe needs Funneled or more"
        );
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        let messages = Arc::new(Mutex::new(Messages {
            sending: VecDeque::new(),
            sharing: VecDeque::new(),
            receiving: HashMap::new(),
            world,
        }));
        // Without a second thread messages move between computations only.
        let meanwhile = match granted >= Threading::Serialized && size > 1 {
            false => None,
            true => {
                let messages = Arc::clone(&messages);
                let advance = move || lock(&messages).advance();
                let pause = match wait::looks_often() {
                    true => OVERLAP_PAUSE_WITH_CORES,
                    false => OVERLAP_PAUSE,
                };
                Meanwhile::new(pause, advance).ok()
            }
        };
        Ok(Self {
            meanwhile,
            messages,
            // Where cores are many, looking takes none from who computes. A rank that has no bell looks more often.
            bell: (size > 1 && !wait::looks_often())
                .then(|| Bell::hang().ok())
                .flatten(),
            rank,
            size,
            _universe: universe,
        })
    }

    /// The name of this host as MPI knows it.
    pub fn host() -> String {
        mpi::environment::processor_name().unwrap_or_else(|_| "unknown host".into())
    }

    /// Name and version of the MPI library: the first line of what it says of itself.
    pub fn library() -> String {
        let text = mpi::environment::library_version().unwrap_or_default();
        // Open MPI goes on with where and when it was built.
        let line = text.lines().next().unwrap_or_default();
        let name = line.split(", package").next().unwrap_or(line);
        name.trim_end_matches('\0').trim().to_owned()
    }

    /// The threading level that MPI granted.
    pub fn threading() -> String {
        format!("{:?}", mpi::environment::threading_support())
    }

    fn messages(&self) -> MutexGuard<'_, Messages> {
        lock(&self.messages)
    }

    /// The port of this rank's bell, for the ranks of its host.
    pub fn bell_port(&self) -> Option<u16> {
        self.bell.as_ref()?.port().ok()
    }

    /// Takes up the ports of all ranks' bells; of other hosts' none.
    pub fn meet_neighbours(&mut self, mut ports: Vec<Option<u16>>) {
        ports[self.rank] = None;
        if let Some(bell) = &mut self.bell {
            bell.meet(ports);
        }
    }

    fn ring(&self, rank: usize) {
        if let Some(bell) = &self.bell {
            bell.ring(rank);
        }
    }
}

/// A thread that panicked has ended the process.
fn lock(messages: &Mutex<Messages>) -> MutexGuard<'_, Messages> {
    messages.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Messages {
    /// Drops the requests that have completed.
    fn reap(&mut self) {
        self.sending.retain_mut(|request| !request.is_complete());
    }

    /// No message is on its way that needs calls of this rank to move.
    fn is_at_rest(&self) -> bool {
        let mut receiving = self.receiving.values();
        self.sending.is_empty() && receiving.all(|kind| kind.pending.is_none())
    }

    /// Receives what has come of the kinds that were asked for before, and drives MPI on.
    fn advance(&mut self) {
        self.reap();
        let keys: Vec<(usize, Kind)> = self.receiving.keys().copied().collect();
        for (from, kind) in keys {
            // An error comes again when somebody asks for the message.
            let _ = self.receive(from, kind);
        }
    }

    /// Takes in messages of a kind that have come, up to a few.
    fn receive(&mut self, from: usize, kind: Kind) -> Result<&mut Receiving> {
        let source = self.world.process_at_rank(self.mpi_rank(from)?);
        let receiving = self.receiving.entry((from, kind)).or_default();
        while receiving.arrived.len() < RECEIVED_AHEAD {
            if receiving.pending.is_none() {
                let probed = source.immediate_matched_probe_with_tag(kind.tag());
                let Some((message, status)) = probed else {
                    break;
                };
                let length = status.count(u8::equivalent_datatype()) as usize;
                receiving.pending = Some(OwnedRequest::start(vec![0; length], |buffer| {
                    message.immediate_matched_receive_into(StaticScope, buffer)
                }));
            }
            let Some(bytes) = take_if_complete(&mut receiving.pending) else {
                break;
            };
            receiving.arrived.push_back(bytes);
        }
        Ok(receiving)
    }

    /// A rank as MPI counts it.
    fn mpi_rank(&self, rank: usize) -> Result<Rank> {
        let size = self.world.size() as usize;
        ensure!(rank < size, "there is no rank {rank} among {size}");
        Ok(rank as Rank)
    }

    fn share(&mut self, bytes: Vec<u8>) {
        let root = self.world.process_at_rank(self.world.size() - 1);
        self.sharing.push_back(OwnedRequest::start(bytes, |buffer| {
            root.immediate_broadcast_into(StaticScope, buffer)
        }));
    }
}

impl<T: Rest> Rest for &mut T {
    fn rest(&mut self, pause: Duration) -> bool {
        (**self).rest(pause)
    }

    fn is_rung(&self) -> bool {
        (**self).is_rung()
    }
}

impl Rest for MpiTransport {
    fn rest(&mut self, pause: Duration) -> bool {
        match &mut self.bell {
            Some(bell) => bell.sleep(pause),
            None => Asleep.rest(pause),
        }
    }

    fn is_rung(&self) -> bool {
        self.bell.as_ref().is_some_and(Bell::hears_all) && self.messages().is_at_rest()
    }
}

impl<T: Transport> Transport for &mut T {
    fn rank(&self) -> usize {
        (**self).rank()
    }

    fn size(&self) -> usize {
        (**self).size()
    }

    fn send(&mut self, to: usize, kind: Kind, bytes: Vec<u8>) -> Result<()> {
        (**self).send(to, kind, bytes)
    }

    fn try_receive(&mut self, from: usize, kind: Kind) -> Result<Option<Vec<u8>>> {
        (**self).try_receive(from, kind)
    }

    fn share(&mut self, bytes: Vec<u8>) -> Result<()> {
        (**self).share(bytes)
    }

    fn expect_shared(&mut self, length: usize) -> Result<()> {
        (**self).expect_shared(length)
    }

    fn try_shared(&mut self) -> Result<Option<Vec<u8>>> {
        (**self).try_shared()
    }

    fn gather_all(&mut self, bytes: &[u8], limit: Option<Duration>) -> Result<Vec<Vec<u8>>> {
        (**self).gather_all(bytes, limit)
    }

    fn flush(&mut self) -> Result<()> {
        (**self).flush()
    }

    fn overlap<R>(&mut self, compute: impl FnOnce() -> R) -> R {
        (**self).overlap(compute)
    }
}

impl Transport for MpiTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn send(&mut self, to: usize, kind: Kind, bytes: Vec<u8>) -> Result<()> {
        check_length(bytes.len())?;
        // Who waits wakes while the message is made ready, and looks for it for a while.
        self.ring(to);
        let mut messages = self.messages();
        messages.reap();
        let destination = messages.world.process_at_rank(messages.mpi_rank(to)?);
        let request = OwnedRequest::start(bytes, |buffer| {
            destination.immediate_send_with_tag(StaticScope, &*buffer, kind.tag())
        });
        messages.sending.push_back(request);
        Ok(())
    }

    fn try_receive(&mut self, from: usize, kind: Kind) -> Result<Option<Vec<u8>>> {
        let mut messages = self.messages();
        messages.reap();
        Ok(messages.receive(from, kind)?.arrived.pop_front())
    }

    fn share(&mut self, bytes: Vec<u8>) -> Result<()> {
        check_length(bytes.len())?;
        // Nobody else waits for them.
        self.ring(0);
        self.messages().share(bytes);
        Ok(())
    }

    fn expect_shared(&mut self, length: usize) -> Result<()> {
        // To MPI a broadcast is one call on all ranks; only the root's buffer is read.
        self.share(vec![0; length])
    }

    fn try_shared(&mut self) -> Result<Option<Vec<u8>>> {
        let mut messages = self.messages();
        let mut oldest = messages.sharing.pop_front();
        let taken = take_if_complete(&mut oldest);
        if let Some(pending) = oldest {
            messages.sharing.push_front(pending);
        }
        Ok(taken)
    }

    fn gather_all(&mut self, bytes: &[u8], limit: Option<Duration>) -> Result<Vec<Vec<u8>>> {
        let lengths = self.gather_equal((bytes.len() as u64).to_le_bytes().to_vec(), limit)?;
        let lengths: Vec<usize> = lengths
            .chunks_exact(8)
            .map(|length| u64::from_le_bytes(length.try_into().expect("chunks of eight")) as usize)
            .collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut padded = bytes.to_vec();
        padded.resize(longest, 0);
        let all = self.gather_equal(padded, limit)?;
        Ok(lengths
            .iter()
            .enumerate()
            .map(|(rank, &length)| all[rank * longest..rank * longest + length].to_vec())
            .collect())
    }

    fn flush(&mut self) -> Result<()> {
        wait::until("messages to leave this rank", Some(FLUSH_LIMIT), || {
            let mut messages = self.messages();
            messages.reap();
            messages
                .sharing
                .retain_mut(|request| !request.is_complete());
            Ok((messages.sending.is_empty() && messages.sharing.is_empty()).then_some(()))
        })
    }

    fn overlap<R>(&mut self, compute: impl FnOnce() -> R) -> R {
        match &self.meanwhile {
            None => compute(),
            Some(meanwhile) => meanwhile.during(compute),
        }
    }
}

impl MpiTransport {
    /// Gathers equally long bytes of all ranks on all ranks.
    fn gather_equal(&mut self, bytes: Vec<u8>, limit: Option<Duration>) -> Result<Vec<u8>> {
        let total = bytes.len() * self.size();
        check_length(total)?;
        if total == 0 {
            return Ok(Vec::new());
        }
        let sent = Box::into_raw(bytes.into_boxed_slice());
        let mut request = Some(OwnedRequest::start(vec![0; total], |buffer| {
            // SAFETY: the pointer comes from a box that is freed below once the request is complete,
            // and otherwise never; nothing writes to it.
            let sent: &'static [u8] = unsafe { &*sent };
            let world = &self.messages().world;
            world.immediate_all_gather_into(StaticScope, sent, buffer)
        }));
        let gathered = wait::until("the other ranks", limit, || {
            let _calling = self.messages();
            Ok(take_if_complete(&mut request))
        });
        if gathered.is_err() {
            // Dropping a request asks MPI how it is.
            let _calling = self.messages();
            drop(request);
        }
        let gathered = gathered?;
        // SAFETY: from `Box::into_raw` above, and the request that read it is complete. (After an error
        // it stays leaked: MPI may still read it.)
        drop(unsafe { Box::from_raw(sent) });
        Ok(gathered)
    }
}

/// A request in flight together with the buffer that it reads or fills.
struct OwnedRequest {
    request: Box<dyn Pending>,
    /// From `Box::into_raw`; freed once the request is complete.
    buffer: *mut [u8],
}

/// A request whose completion can be asked for; what data it names differs by call.
trait Pending {
    /// Whether the request has completed; asks MPI unless it is known.
    fn is_complete(&mut self) -> bool;

    /// Gives up a request that has not completed: dropping one would panic.
    fn forget(&mut self);
}

/// `None` once complete.
impl<D: ?Sized> Pending for Option<Request<'static, D, StaticScope>> {
    fn is_complete(&mut self) -> bool {
        *self = self.take().and_then(|request| request.test().err());
        self.is_none()
    }

    fn forget(&mut self) {
        std::mem::forget(self.take());
    }
}

impl OwnedRequest {
    /// Starts a request on a buffer that lives until the request is complete.
    fn start<D: ?Sized + 'static>(
        buffer: Vec<u8>,
        start: impl FnOnce(&'static mut [u8]) -> Request<'static, D, StaticScope>,
    ) -> Self {
        let buffer = Box::into_raw(buffer.into_boxed_slice());
        // SAFETY: the pointer comes from a box that is freed only once the request is complete, and
        // nothing else touches it until then.
        let request = start(unsafe { &mut *buffer });
        Self {
            request: Box::new(Some(request)),
            buffer,
        }
    }

    fn is_complete(&mut self) -> bool {
        self.request.is_complete()
    }
}

impl Drop for OwnedRequest {
    fn drop(&mut self) {
        if self.is_complete() {
            // SAFETY: from `Box::into_raw`, and the request that used it is complete.
            drop(unsafe { Box::from_raw(self.buffer) });
        } else {
            // Dropped in flight: only on the way to `abort`. MPI may still use the buffer, so it stays.
            self.request.forget();
        }
    }
}

/// The buffer of a request that has completed.
fn take_if_complete(slot: &mut Option<OwnedRequest>) -> Option<Vec<u8>> {
    if !slot.as_mut()?.is_complete() {
        return None;
    }
    let mut request = slot.take()?;
    let empty: Box<[u8]> = Box::default();
    let buffer = std::mem::replace(&mut request.buffer, Box::into_raw(empty));
    // SAFETY: from `Box::into_raw`, the request is complete, and the empty slice put in its place is what
    // `drop` frees.
    Some(unsafe { Box::from_raw(buffer) }.into_vec())
}

/// MPI counts in `int`.
fn check_length(length: usize) -> Result<()> {
    ensure!(
        i32::try_from(length).is_ok(),
        "a message of {length} bytes is over MPI's limit of 2 GiB; use a smaller --prefill-chunk"
    );
    Ok(())
}

/// Ends the job on all ranks. MPI is told first; should that take long, the process ends anyway.
pub fn abort(code: i32) -> ! {
    limit_ending(code);
    if mpi::environment::is_initialized() && !mpi::environment::is_finalized() {
        SimpleCommunicator::world().abort(code);
    }
    wait::end_now(code)
}

/// Makes sure that the process ends soon, with this exit status, whatever MPI waits for.
pub fn limit_ending(code: i32) {
    std::thread::spawn(move || {
        std::thread::sleep(ENDING_LIMIT);
        wait::end_now(code)
    });
}
