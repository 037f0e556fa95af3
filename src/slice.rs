//! This rank's slice, loaded from wherever it is: its file in the shard cache, the model directory, or the rank
//! that has the model.
//!
//! A file of the cache that is not what it should be is said once and made again. What the cache cannot do, for want of
//! space or rights, is said too, and the run goes on from the model directory if this host has one.

use crate::agree::{self, Failure};
use crate::checkpoint::{Checkpoint, CheckpointError, Consumed, Shard};
use crate::handover;
use crate::hub;
use crate::log::tell;
use crate::model::{Kernels, ModelFiles};
use crate::plan::{self, Plan};
use crate::stage::Stage;
use crate::transport::Transport;
use anyhow::{Context, Result, anyhow};
use std::path::{Path, PathBuf};
use tracing::{info, warn};

/// How often a file is opened that other runs put in place anew.
const MOST_TRIES: u32 = 4;

/// A stage, and what was read for it.
pub type Loaded = (Stage, Consumed);

/// What a rank is to load, and where from.
#[derive(Debug)]
pub struct Slice<'a> {
    files: &'a ModelFiles,
    plan: &'a Plan,
    part: &'a plan::Stage,
    kernels: &'a Kernels,
    cache: Option<Cache>,
}

/// A place for this rank's file.
#[derive(Debug)]
struct Cache {
    dir: PathBuf,
    shard: Shard,
}

impl<'a> Slice<'a> {
    /// The slice of a rank. `cache_dir`: where its file is to be kept; without it a file is kept only by a rank
    /// that has nothing else.
    ///
    /// # Errors
    /// A place for the cache is needed and there is none.
    pub fn new(
        files: &'a ModelFiles,
        plan: &'a Plan,
        rank: usize,
        kernels: &'a Kernels,
        cache_dir: Option<&Path>,
    ) -> Result<Self> {
        let is_needed = cache_dir.is_some() || files.checkpoint.is_elsewhere();
        let part = &plan.stages[rank];
        let cache = match is_needed {
            true => Some(Cache {
                dir: hub::cache_dir_or_default(cache_dir)?,
                shard: shard(files, part)?,
            }),
            false => None,
        };
        Ok(Self {
            files,
            plan,
            part,
            kernels,
            cache,
        })
    }

    /// Loads the slice on a host that has the model.
    ///
    /// # Errors
    /// As [`Stage::load`].
    pub fn load(&self) -> Result<Loaded> {
        match self.load_cached() {
            Some(loaded) => Ok(loaded),
            None => self.load_anew(),
        }
    }

    /// Loads the slice in a run where the rank `source` gives the others what they lack. On every rank alike.
    ///
    /// # Errors
    /// As [`Stage::load`]; and whatever keeps the weights from arriving.
    pub fn load_with_help(
        &self,
        transport: &mut impl Transport,
        source: usize,
    ) -> Result<Loaded, Failure> {
        let rank = transport.rank();
        let cached = self.load_cached();
        let is_waiting = cached.is_none() && self.files.checkpoint.is_elsewhere();
        let waiting = agree::gather(transport, Ok(is_waiting), None)?;
        if rank == source {
            let ranks = (0..waiting.len()).filter(|&rank| waiting[rank]);
            let slices = ranks
                .map(|rank| Ok((rank, shard(self.files, &self.plan.stages[rank])?)))
                .collect::<Result<Vec<_>>>()?;
            tell_of_sending(&slices);
            handover::send_slices(transport, &self.files.checkpoint, &slices)?;
        }
        match (cached, &self.cache) {
            (Some(loaded), _) => Ok(loaded),
            (None, Some(cache)) if is_waiting => {
                let received = handover::receive_slice(transport, source, &cache.shard, &cache.dir);
                received.with_context(|| {
                    format!(
                        "receiving {} bytes from rank {source} into {} (another directory: --shard-cache DIR)",
                        cache.shard.file_bytes(),
                        cache.dir.display()
                    )
                })?;
                let loaded = self.open_cached(cache)?;
                Ok(loaded.context("the file just written to the shard cache is gone")?)
            }
            (None, _) => Ok(self.load_anew()?),
        }
    }

    /// From the cache, if its file is there and is what it should be.
    fn load_cached(&self) -> Option<Loaded> {
        let cache = self.cache.as_ref()?;
        match self.open_cached(cache) {
            Ok(Some(loaded)) => return Some(loaded),
            Ok(None) => {
                if let Some(stale) = cache.shard.stale(&cache.dir) {
                    warn!(
                        "shard cache: {stale} is of this model before its weight files changed, or of a copy of \
                         it; it is not used, and can be deleted"
                    );
                }
            }
            Err(error) => warn!("shard cache: not used, made again: {error:#}"),
        }
        None
    }

    fn open_cached(&self, cache: &Cache) -> Result<Option<Loaded>> {
        let mut tries = 0;
        loop {
            let Some(checkpoint) = cache.shard.open(&cache.dir)? else {
                return Ok(None);
            };
            tries += 1;
            match self.load_from(&checkpoint) {
                // Another run that wrote the same file has put its own in this one's place: as good a file.
                Err(error) if was_replaced(&error) && tries < MOST_TRIES => {}
                Err(error) => return Err(error),
                Ok(loaded) => {
                    info!("shard cache: read {} and no other", cache.shard.file_name());
                    return Ok(Some(loaded));
                }
            }
        }
    }

    /// From the model directory: by way of the cache, if there is one, so that what was written is read once.
    fn load_anew(&self) -> Result<Loaded> {
        let Some(cache) = &self.cache else {
            return self.load_from(&self.files.checkpoint);
        };
        let written = cache.shard.write_from(&self.files.checkpoint, &cache.dir);
        let loaded = written.map_err(Into::into).and_then(|()| {
            info!("shard cache: wrote {}", cache.shard.file_name());
            let loaded = self.open_cached(cache)?;
            loaded.ok_or_else(|| anyhow!("{} is gone again", cache.shard.file_name()))
        });
        loaded.or_else(|error: anyhow::Error| {
            warn!("shard cache: this start reads the model directory: {error:#}");
            self.load_from(&self.files.checkpoint)
        })
    }

    fn load_from(&self, checkpoint: &Checkpoint) -> Result<Loaded> {
        let dtype = self.plan.wire_dtype;
        let loaded = Stage::load(self.files, checkpoint, self.part, dtype, self.kernels);
        loaded.with_context(|| {
            let layers = &self.part.layers;
            format!("loading layers {}-{}", layers.start, layers.end - 1)
        })
    }
}

/// It takes as long as the network does, so nobody should have to guess what is going on.
fn tell_of_sending(slices: &[(usize, Shard)]) {
    let bytes: u64 = slices.iter().map(|(_, shard)| shard.file_bytes()).sum();
    let ranks: Vec<String> = slices.iter().map(|(rank, _)| rank.to_string()).collect();
    if !ranks.is_empty() {
        tell(&format!(
            "sending {:.3} GB of weights to ranks without the model ({}), which keep them\n",
            bytes as f64 / 1e9,
            ranks.join(", ")
        ));
    }
}

/// Whether a load ended because its file was another one by then.
fn was_replaced(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<CheckpointError>();
        matches!(cause, Some(CheckpointError::FileChanged { .. }))
    })
}

/// The file of a stage: the same on all ranks, so that a sender knows what a receiver waits for.
fn shard(files: &ModelFiles, part: &plan::Stage) -> Result<Shard> {
    let names = files.inventory.of_stage(part);
    let label = format!("layers-{}-{}", part.layers.start, part.layers.end - 1);
    let shard = Shard::new(&files.checkpoint, &names, &files.config_hash, &label);
    Ok(shard?)
}
