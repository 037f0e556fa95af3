//! The model from a rank that has it to those that have not, while a run is set up: first what a model directory
//! says without its tensors, then to each rank its own tensors.
//!
//! At most [`IN_FLIGHT`] chunks are on their way to a rank, so neither side, nor MPI between them, holds more. No
//! wait is for ever: a rank that dies is noticed by the launcher, one that is stuck after [`STALL_LIMIT`].

use crate::agree::{self, Failure};
use crate::checkpoint::{Checkpoint, Shard, ShardWriter, Tensor};
use crate::hub;
use crate::model::{ModelFiles, ModelOutline};
use crate::parcel::{self, CHUNK_BYTES, Parcel};
use crate::tokenizer::TokenizerFiles;
use crate::transport::{Kind, Transport};
use crate::wait::{self, Patience};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tracing::{info, warn};

/// Chunks on their way to one rank.
const IN_FLIGHT: usize = 2;
/// How long the other side may take for one chunk: far longer than any disk or network that works.
const STALL_LIMIT: Duration = Duration::from_secs(120);
/// Longest outline that is taken: headers of thousands of layers.
const LONGEST_OUTLINE_BYTES: u64 = 256 << 20;

/// What a rank without the model is told of it.
#[derive(Serialize, Deserialize)]
struct Told {
    model: ModelOutline,
    tokenizer: Option<TokenizerFiles>,
}

/// Opens the model where it is, and tells the ranks that do not have it what it is. On every rank alike.
/// `cache_dir`: where rank 0 keeps a tokenizer that it is told.
///
/// # Errors
/// The rank `source` does not have the model; or an error of any rank.
pub fn open(
    transport: &mut impl Transport,
    model: &str,
    source: usize,
    cache_dir: Option<&Path>,
) -> Result<ModelFiles, Failure> {
    let rank = transport.rank();
    // First, and alone: it may download the model into a cache that another rank of its host would look into.
    let own = match rank == source {
        true => open_source(model, source).map(Some),
        false => Ok(None),
    };
    let own = agree::all_succeeded(transport, own)?.or_else(|| open_here(model));
    let known = own.as_ref().map(|files| {
        let tensors = files.tensor_hash();
        (files.config_hash.clone(), tensors)
    });
    let known = agree::gather(transport, Ok(known), None)?;
    let lacking = |rank: usize| known[rank] != known[source];
    let files = match own {
        Some(files) if rank == source => {
            let ranks: Vec<usize> = (0..known.len()).filter(|&rank| lacking(rank)).collect();
            tell_outline(transport, &files, &ranks)?;
            Ok(files)
        }
        Some(files) if !lacking(rank) => Ok(files),
        other => {
            if let Some(files) = other {
                warn!(
                    "{} is not the model that rank {source} has; it is not used",
                    files.dir.display()
                );
            }
            let json = hear_outline(transport, source)?;
            understand(&json, source, rank, cache_dir)
        }
    };
    agree::all_succeeded(transport, files)
}

/// The model on the rank that must have it.
fn open_source(model: &str, source: usize) -> Result<ModelFiles> {
    let dir = match hub::find(model) {
        Ok(found) => hub::fetch(found),
        Err(error) => Err(error),
    };
    dir.and_then(|dir| ModelFiles::open(&dir))
        .with_context(|| format!("--weights-from {source}: that rank does not have the model"))
}

/// The model on another rank, if its host has one that opens. It is never downloaded.
fn open_here(model: &str) -> Option<ModelFiles> {
    let opened = hub::find_here(model).and_then(|dir| {
        let opened = dir.map(|dir| ModelFiles::open(&dir));
        opened.transpose()
    });
    opened.unwrap_or_else(|error| {
        warn!("the model on this host is not used: {error:#}");
        None
    })
}

fn tell_outline(transport: &mut impl Transport, files: &ModelFiles, ranks: &[usize]) -> Result<()> {
    if ranks.is_empty() {
        return Ok(());
    }
    // Only rank 0 makes tokens of text.
    let tokenizer = match ranks.contains(&0) {
        true => Some(TokenizerFiles::read(&files.dir)?),
        false => None,
    };
    let told = Told {
        model: files.outline()?,
        tokenizer,
    };
    let outline = serde_json::to_vec(&told).context("encoding the outline")?;
    ensure!(
        outline.len() as u64 <= LONGEST_OUTLINE_BYTES,
        "headers and tokenizer of this model have {} bytes, over the {LONGEST_OUTLINE_BYTES} that another rank takes; \
         copy the model directory to every host",
        outline.len()
    );
    let outgoing = ranks.iter().map(|&to| {
        let items = VecDeque::from([Item::Bytes(&outline)]);
        Outgoing::new(to, items)
    });
    send_all(transport, outgoing.collect())
}

/// The outline as it arrives. A failure on the way is this rank's alone: the sender still waits.
fn hear_outline(transport: &mut impl Transport, source: usize) -> Result<Vec<u8>> {
    let mut json = Vec::new();
    receive_item(transport, source, 0, LONGEST_OUTLINE_BYTES, |chunk| {
        json.extend_from_slice(chunk);
        Ok(())
    })?;
    Ok(json)
}

/// The model that an outline tells of. On rank 0, with a directory for the tokenizer.
fn understand(
    json: &[u8],
    source: usize,
    rank: usize,
    cache_dir: Option<&Path>,
) -> Result<ModelFiles> {
    let in_outline = || format!("the model as rank {source} told of it");
    let told: Told = serde_json::from_slice(json).with_context(in_outline)?;
    let mut files = ModelFiles::from_outline(told.model).with_context(in_outline)?;
    if let Some(tokenizer) = told.tokenizer.filter(|_| rank == 0) {
        files.dir = tokenizer.keep(&cache_dir_or_default(cache_dir)?)?;
    }
    Ok(files)
}

/// Sends ranks the tensors of their slices, to all of them at once.
///
/// # Errors
/// A tensor that cannot be read, or a rank that takes no more.
pub fn send_slices(
    transport: &mut impl Transport,
    checkpoint: &Checkpoint,
    slices: &[(usize, Shard)],
) -> Result<()> {
    let outgoing = slices.iter().map(|(to, shard)| {
        info!(
            bytes = shard.tensor_bytes(),
            "sending its layers to rank {to}"
        );
        let tensors = shard.tensors().iter();
        let items = tensors.map(|tensor| Item::Tensor(checkpoint, &tensor.name));
        Outgoing::new(*to, items.collect())
    });
    send_all(transport, outgoing.collect())
}

/// Takes this rank's tensors from the rank that has them, into the file of its slice in `dir`.
///
/// # Errors
/// A directory or disk that cannot be written to; tensors that are not those of the slice, or that
/// did not arrive as they left.
pub fn receive_slice(
    transport: &mut impl Transport,
    source: usize,
    shard: &Shard,
    dir: &Path,
) -> Result<()> {
    let mut writer = ShardWriter::create(shard, dir)?;
    for (item, tensor) in (0..).zip(shard.tensors()) {
        let received = receive_item(transport, source, item, tensor.bytes, |chunk| {
            Ok(writer.write(chunk)?)
        });
        let length = received.with_context(|| format!("tensor {}", tensor.name))?;
        ensure!(
            length == tensor.bytes,
            "tensor {}: rank {source} sent {length} bytes, expected {}",
            tensor.name,
            tensor.bytes
        );
        writer.end_tensor();
    }
    writer.finish()?;
    info!(
        bytes = shard.tensor_bytes(),
        "received its layers from rank {source}"
    );
    Ok(())
}

/// Takes one thing of at most `limit_bytes`, piece by piece; returns its length. Its hash is checked at its end.
fn receive_item(
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

/// A thing to hand over.
enum Item<'a> {
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
struct Outgoing<'a> {
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
    fn new(to: usize, items: VecDeque<Item<'a>>) -> Self {
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
fn send_all(transport: &mut impl Transport, mut all: Vec<Outgoing>) -> Result<()> {
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
        patience.pause_for_answer()?;
    }
}

/// Where received weights are kept: in the directory named, else in `mlx-pipe/shards` in the user's cache.
///
/// # Errors
/// None is named, and neither `XDG_CACHE_HOME` nor `HOME` is set.
pub fn cache_dir_or_default(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = named {
        return Ok(dir.to_owned());
    }
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = match (set("XDG_CACHE_HOME"), set("HOME")) {
        (Some(cache), _) => PathBuf::from(cache),
        (None, Some(home)) => Path::new(&home).join(".cache"),
        (None, None) => bail!(
            "no directory to keep received weights in: neither XDG_CACHE_HOME nor HOME is set; give one with \
             --shard-cache"
        ),
    };
    Ok(cache.join("mlx-pipe").join("shards"))
}
