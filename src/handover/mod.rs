//! The model from a rank that has it to those that have not, while a run is set up: first what a model directory
//! says without its tensors, then to each rank its own tensors (`stream.rs`: how).

mod stream;
#[cfg(test)]
mod tests;

use self::stream::{Item, Outgoing, receive_item, send_all};
use crate::agree::{self, Failure};
use crate::checkpoint::{Checkpoint, Shard, ShardWriter};
use crate::hub;
use crate::model::{ModelFiles, ModelTexts};
use crate::tokenizer::TokenizerFiles;
use crate::transport::Transport;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::Path;
use tracing::{info, warn};

/// Longest outline that is taken: headers of thousands of layers.
const LONGEST_OUTLINE_BYTES: u64 = 256 << 20;

/// What a rank without the model is told of it.
#[derive(Serialize, Deserialize)]
struct Told {
    model: ModelTexts,
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
        model: files.texts()?,
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
    let mut files = ModelFiles::from_texts(told.model).with_context(in_outline)?;
    if let Some(tokenizer) = told.tokenizer.filter(|_| rank == 0) {
        files.dir = tokenizer.keep(&hub::cache_dir_or_default(cache_dir)?)?;
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
