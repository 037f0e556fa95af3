//! Things from one rank to others, a chunk at a time.
//!
//! At most [`IN_FLIGHT`] chunks are on their way to a rank, so neither side, nor MPI between them, holds more. No
//! wait is for ever: a rank that dies is noticed by the launcher, one that is stuck after [`STALL_LIMIT`].

use crate::checkpoint::{Checkpoint, Tensor};
use crate::parcel::{self, CHUNK_BYTES, Parcel};
use crate::transport::{Kind, Transport};
use crate::wait::{self, Asleep, Patience};
use anyhow::{Context, Result, bail, ensure};
use std::collections::VecDeque;
use std::time::Duration;

/// Chunks on their way to one rank.
pub(super) const IN_FLIGHT: usize = 2;
/// How long the other side may take for one chunk: far longer than any disk or network that works.
const STALL_LIMIT: Duration = Duration::from_secs(120);

/// A thing to hand over.
pub(super) enum Item<'a> {
    Bytes(&'a [u8]),
    Tensor(&'a Checkpoint, &'a str),
}

/// The same, opened.
enum Source<'a> {
    Bytes(&'a [u8]),
    Tensor(Tensor),
}

impl<'a> Item<'a> {
    fn open(&self) -> Result<Source<'a>> {
        match *self {
            Self::Bytes(bytes) => Ok(Source::Bytes(bytes)),
            Self::Tensor(checkpoint, name) => Ok(Source::Tensor(checkpoint.open_tensor(name)?)),
        }
    }
}

impl Source<'_> {
    fn length(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Tensor(tensor) => tensor.bytes(),
        }
    }

    /// Reads bytes that lie within the length.
    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        match self {
            Self::Bytes(bytes) => to.copy_from_slice(&bytes[offset as usize..][..to.len()]),
            Self::Tensor(tensor) => tensor.read_at(offset, to)?,
        }
        Ok(())
    }
}

/// What is being sent to one rank.
pub(super) struct Outgoing<'a> {
    to: usize,
    items: VecDeque<Item<'a>>,
    /// The number of the first of them.
    item: u32,
    current: Option<Current<'a>>,
    /// Chunks on their way, by item and offset.
    in_flight: VecDeque<(u32, u64)>,
}

/// The thing that is under way.
struct Current<'a> {
    source: Source<'a>,
    sent: u64,
    hasher: blake3::Hasher,
}

impl<'a> Outgoing<'a> {
    pub(super) fn new(to: usize, items: VecDeque<Item<'a>>) -> Self {
        Self {
            to,
            items,
            item: 0,
            current: None,
            in_flight: VecDeque::new(),
        }
    }

    fn is_done(&self) -> bool {
        self.items.is_empty() && self.in_flight.is_empty()
    }

    /// Does what can be done at once; returns whether anything could.
    fn advance(&mut self, transport: &mut impl Transport) -> Result<bool> {
        let has_answer = self.take_answer(transport)?;
        let may_send = !self.items.is_empty() && self.in_flight.len() < IN_FLIGHT;
        if may_send {
            self.send_next(transport)?;
        }
        Ok(has_answer || may_send)
    }

    fn take_answer(&mut self, transport: &mut impl Transport) -> Result<bool> {
        let Some(message) = transport.try_receive(self.to, Kind::Setup)? else {
            return Ok(false);
        };
        let oldest = self.in_flight.pop_front();
        match Parcel::decode(&message).with_context(|| format!("rank {}", self.to))? {
            Parcel::Taken { item, offset } if oldest == Some((item, offset)) => Ok(true),
            other => bail!("rank {}: unexpected: {}", self.to, described(&other)),
        }
    }

    /// Sends the next chunk of the item under way, or its seal.
    fn send_next(&mut self, transport: &mut impl Transport) -> Result<()> {
        let Some(next) = self.items.front() else {
            return Ok(());
        };
        let current = match &mut self.current {
            Some(current) => current,
            none => none.insert(Current {
                source: next.open()?,
                sent: 0,
                hasher: blake3::Hasher::new(),
            }),
        };
        let (item, offset) = (self.item, current.sent);
        let left = current.source.length() - offset;
        if left == 0 {
            let seal = Parcel::Seal {
                item,
                length: offset,
                hash: current.hasher.finalize().into(),
            };
            transport.send(self.to, Kind::Setup, seal.encode())?;
            self.current = None;
            self.items.pop_front();
            self.item += 1;
            return Ok(());
        }
        let count = left.min(CHUNK_BYTES as u64) as usize;
        let message = parcel::chunk(item, offset, count, |to| {
            current.source.read_at(offset, to)?;
            current.hasher.update(to);
            anyhow::Ok(())
        })?;
        current.sent += count as u64;
        self.in_flight.push_back((item, offset));
        transport.send(self.to, Kind::Setup, message)
    }
}

/// Sends everything, to all ranks by turns.
pub(super) fn send_all(transport: &mut impl Transport, mut all: Vec<Outgoing>) -> Result<()> {
    let mut patience = Patience::new();
    loop {
        let mut has_moved = false;
        for outgoing in &mut all {
            has_moved |= outgoing.advance(transport)?;
        }
        all.retain(|outgoing| !outgoing.is_done());
        if all.is_empty() {
            return transport.flush();
        }
        if has_moved {
            wait::check_signals()?;
            patience.reset();
            continue;
        }
        if patience.elapsed() > STALL_LIMIT {
            let ranks: Vec<String> = all.iter().map(|rank| rank.to.to_string()).collect();
            bail!(
                "rank {} has taken no weights for {} s",
                ranks.join(", "),
                STALL_LIMIT.as_secs()
            );
        }
        // That a message has left rings no bell.
        patience.pause_for_answer(&mut Asleep)?;
    }
}

/// Takes one thing of at most `limit_bytes`, piece by piece; returns its length. Its hash is checked at its end.
pub(super) fn receive_item(
    transport: &mut impl Transport,
    source: usize,
    expected: u32,
    limit_bytes: u64,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<u64> {
    let what = format!("the weights from rank {source}");
    let (mut length, mut hasher) = (0, blake3::Hasher::new());
    loop {
        wait::check_signals()?;
        let message = wait::until(&what, Some(STALL_LIMIT), || {
            transport.try_receive(source, Kind::Setup)
        })?;
        match Parcel::decode(&message).with_context(|| what.clone())? {
            Parcel::Chunk {
                item,
                offset,
                bytes,
            } if item == expected
                && offset == length
                && bytes.len() as u64 <= limit_bytes - length =>
            {
                hasher.update(bytes);
                take(bytes)?;
                length += bytes.len() as u64;
                let taken = Parcel::Taken { item, offset };
                transport.send(source, Kind::Setup, taken.encode())?;
            }
            Parcel::Seal {
                item,
                length: sealed,
                hash,
            } if item == expected && sealed == length => {
                ensure!(
                    hasher.finalize() == hash,
                    "{what}: {length} bytes did not arrive as they left: the hashes differ; does the \
                     network, or memory, corrupt data?"
                );
                return Ok(length);
            }
            other => bail!(
                "{what}: out of order: expected item {expected} from byte {length} of {limit_bytes} at most, \
                 found {}",
                described(&other)
            ),
        }
    }
}

fn described(parcel: &Parcel) -> String {
    match parcel {
        Parcel::Chunk {
            item,
            offset,
            bytes,
        } => format!("{} bytes of item {item} from byte {offset}", bytes.len()),
        Parcel::Seal { item, length, .. } => format!("the end of item {item} at byte {length}"),
        Parcel::Taken { item, offset } => format!("an answer to item {item}, byte {offset}"),
    }
}
