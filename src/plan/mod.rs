//! Decides which rank holds which layers: model shape x devices x strategy -> [`Plan`].
//!
//! Pure on purpose. Every rank computes the plan for itself and the ranks then compare
//! [`Plan::fingerprint`], so nothing here may differ between machines: no I/O, no clock, no
//! array or MPI type, and integers only wherever something is decided (fractions are compared by
//! cross multiplication). Floats appear in the printed figures and nowhere else.
//!
//! Reading order: this file (types and entry), `footprint` (what a stage holds and costs),
//! `strategy` (where each strategy cuts), `balance` (the exact searches behind the strategies),
//! `validate` (coverage and ownership), `shortfall` (what would fit when this does not), `capacity`
//! (what more would fit when it does), `encode` (fingerprint); `cost` (what computing and sending
//! takes), `estimate` (the same guessed from a data sheet), `predict` (seconds), `tied` (where a tied
//! table stands), `advice` (whether fewer ranks were faster); `table` and `outlook` (for people).

mod advice;
mod balance;
mod capacity;
mod cost;
mod encode;
mod estimate;
mod footprint;
mod outlook;
mod predict;
mod shortfall;
mod strategy;
mod table;
mod tied;
mod validate;

#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;

pub use advice::{Gain, gain_of_fewer};
pub use capacity::Capacity;
pub use cost::{Costs, DeviceCost, LinkCost, LinkCosts, StepCost, TimeSource};
pub use estimate::Rates;
use footprint::Ledger;
pub use footprint::{Footprint, StageTime};
pub use outlook::{outlook, what_if_table, without_line};
pub use predict::{Prediction, Predictor, RequestTimes, SAMPLE_PROMPT_TOKENS};
pub use shortfall::{RankNeed, Shortfall};
pub use strategy::{LayerRanges, ParseLayersError, ParseStrategyError, Strategy};
use table::counted;
pub use table::{Align, Table, memory_table, plan_table, printable};
pub use tied::plan_choosing_table;
pub use validate::{CoverError, check_cover, validate};

/// Most layers a model may have: eight times the deepest model known today. It bounds the work a
/// hostile checkpoint can ask of the exact search.
pub const MAX_LAYERS: usize = 1024;

/// The bytes of a model, as the checkpoint's headers state them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Bytes of all tensors of layer `i`. They may differ from layer to layer: mixed quantisation.
    pub layer_bytes: Vec<u64>,
    /// Bytes of the embedding table, its scales and biases included.
    pub embedding_bytes: u64,
    /// Bytes of the final norm.
    pub norm_bytes: u64,
    /// The output head.
    pub head: Head,
    /// Bytes that one token's keys and values take in one layer's cache.
    pub kv_bytes_per_token_per_layer: u64,
    /// Bytes of one token's hidden state as it travels from rank to rank.
    pub hidden_row_bytes: u64,
    /// Weights (numbers, whatever they are packed into) of all layers together.
    pub layer_weights: u64,
}

/// Where the output head's weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The embedding table serves as head too. The first rank holds it for the lookup and the last
    /// one for the head; a rank that is both holds it once.
    Tied,
    /// The same, but the last rank alone holds the table and looks rows up for the first.
    TiedOnce,
    /// A matrix of its own.
    Own {
        /// Bytes of that matrix, scales and biases included.
        bytes: u64,
    },
}

impl ModelShape {
    /// Number of layers.
    pub fn layer_count(&self) -> usize {
        self.layer_bytes.len()
    }

    /// Bytes that the head reads in a step: its own, or those of the tied table.
    pub fn head_step_bytes(&self) -> u64 {
        match self.head {
            Head::Tied | Head::TiedOnce => self.embedding_bytes,
            Head::Own { bytes } => bytes,
        }
    }

    /// Where token ids are turned into hidden states.
    pub fn lookup(&self) -> Lookup {
        match self.head {
            Head::TiedOnce => Lookup::OnLast,
            Head::Tied | Head::Own { .. } => Lookup::OnFirst,
        }
    }

    /// Bytes of one whole model, a tied table counted once. `None` when they exceed 64 bits.
    pub fn model_bytes(&self) -> Option<u64> {
        let head_bytes = match self.head {
            Head::Tied | Head::TiedOnce => 0,
            Head::Own { bytes } => bytes,
        };
        [self.embedding_bytes, self.norm_bytes, head_bytes]
            .iter()
            .chain(&self.layer_bytes)
            .try_fold(0_u64, |sum, bytes| sum.checked_add(*bytes))
    }
}

/// What one rank runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Host name or device id, for people.
    pub name: String,
    /// Most bytes of weights and KV cache that the rank may hold.
    pub memory_limit_bytes: u64,
    /// Speed in any unit that all ranks share (bytes a second, cores); above zero.
    pub speed: u64,
    /// What it needs for this model, where that is known. Counts only if it is known of all devices.
    pub cost: Option<DeviceCost>,
}

/// The dtype in which activations travel from rank to rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireDtype {
    /// IEEE binary32: what CPUs compute in.
    F32,
    /// bfloat16: what GPUs compute in.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl WireDtype {
    /// Name as printed and hashed: `f32`, `bf16`, `f16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

impl fmt::Display for WireDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Everything a plan depends on.
#[derive(Clone, Debug)]
pub struct PlanRequest<'a> {
    /// The model.
    pub shape: &'a ModelShape,
    /// One device a rank, in rank order.
    pub devices: &'a [Device],
    /// How to cut.
    pub strategy: Strategy,
    /// Tokens that a sequence may hold.
    pub context_tokens: u64,
    /// Sequences whose KV cache is held at the same time.
    pub sequences: u64,
    /// Dtype of the activations between ranks.
    pub wire_dtype: WireDtype,
    /// The links between the ranks, where they are known; predictions need them.
    pub links: Option<LinkCosts>,
    /// Where the devices' costs come from.
    pub cost_source: TimeSource,
}

impl<'a> PlanRequest<'a> {
    /// The costs of all devices; `None` as soon as one of them has none.
    fn costs(&self) -> Option<Vec<&'a DeviceCost>> {
        self.devices
            .iter()
            .map(|device| device.cost.as_ref())
            .collect()
    }
}

/// Where an embedding table that serves as head too is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TiedTable {
    /// On the last rank only: all ranks together hold exactly one model.
    Once,
    /// On the first and the last rank: no embedding travels.
    Both,
    /// Once, unless both is predicted to be clearly faster; see [`plan_choosing_table`].
    Auto,
}

/// Which rank turns token ids into hidden states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The first, which then needs the embedding table.
    OnFirst,
    /// The last, which has the table for the head anyway; the rows travel to the first.
    OnLast,
}

impl Lookup {
    /// Name as printed and hashed: `first`, `last`.
    pub fn name(self) -> &'static str {
        match self {
            Self::OnFirst => "first",
            Self::OnLast => "last",
        }
    }
}

/// The ends of the model that a rank holds besides its layers. One value, so that a plan cannot
/// say "norm but no head".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The only rank: embedding, norm and head.
    Only,
    /// Embedding lookup.
    First,
    /// Layers only.
    Middle,
    /// Final norm and head.
    Last,
    /// Final norm and head, and the embedding lookup for the first rank.
    LastWithTable,
}

impl Role {
    /// The role of `rank` among `ranks`. A first rank without a lookup of its own is a middle one: it
    /// is sent hidden states like the others.
    pub fn of(rank: usize, ranks: usize, lookup: Lookup) -> Self {
        match (rank == 0, rank + 1 == ranks, lookup) {
            (true, true, _) => Self::Only,
            (true, false, Lookup::OnFirst) => Self::First,
            (false, true, Lookup::OnFirst) => Self::Last,
            (false, true, Lookup::OnLast) => Self::LastWithTable,
            (true, false, Lookup::OnLast) | (false, false, _) => Self::Middle,
        }
    }

    /// Whether this rank turns token ids into hidden states.
    pub fn owns_embedding(self) -> bool {
        matches!(self, Self::Only | Self::First | Self::LastWithTable)
    }

    /// Whether this rank applies the final norm. It always goes with the head.
    pub fn owns_norm(self) -> bool {
        self.owns_head()
    }

    /// Whether this rank turns hidden states into logits.
    pub fn owns_head(self) -> bool {
        matches!(self, Self::Only | Self::Last | Self::LastWithTable)
    }

    /// The components by name, as the report's `owns` lists them.
    pub fn owns(self) -> &'static [&'static str] {
        match self {
            Self::Only | Self::LastWithTable => &["embedding", "norm", "head"],
            Self::First => &["embedding"],
            Self::Middle => &[],
            Self::Last => &["norm", "head"],
        }
    }
}

/// One rank's part of the plan. Its rank is its position in [`Plan::stages`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// What the rank runs on.
    pub device: Device,
    /// Global numbers of its layers; never empty.
    pub layers: Range<usize>,
    /// What it holds besides them.
    pub role: Role,
    /// Bytes by component.
    pub footprint: Footprint,
    /// Predicted time of one step.
    pub time: StageTime,
}

/// A checked plan: every layer on exactly one rank, no rank over its limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The strategy asked for.
    pub strategy: Strategy,
    /// The strategy that made the cut; differs from `strategy` for [`Strategy::Auto`] only.
    pub chosen: Strategy,
    /// One stage a rank, in rank order.
    pub stages: Vec<Stage>,
    /// Dtype of the activations between ranks.
    pub wire_dtype: WireDtype,
    /// Which rank turns token ids into hidden states.
    pub lookup: Lookup,
    /// Layers of the whole model.
    pub layer_count: usize,
    /// Bytes of one whole model, a tied table counted once.
    pub model_bytes: u64,
    /// Tokens that a sequence may hold.
    pub context_tokens: u64,
    /// Sequences whose KV cache is held at the same time.
    pub sequences: u64,
    /// Bytes of one token's hidden state as it travels from rank to rank.
    pub hidden_row_bytes: u64,
    /// The links between the ranks, where they are known.
    pub links: Option<LinkCosts>,
    /// What the times of the stages rest on.
    pub times: TimeSource,
}

impl Plan {
    /// The model as planned: `asked`, with a tied table where the plan has put it.
    pub fn shape_of(&self, asked: &ModelShape) -> ModelShape {
        let head = match (asked.head, self.lookup) {
            (Head::Own { bytes }, _) => Head::Own { bytes },
            (Head::Tied | Head::TiedOnce, Lookup::OnFirst) => Head::Tied,
            (Head::Tied | Head::TiedOnce, Lookup::OnLast) => Head::TiedOnce,
        };
        ModelShape {
            head,
            ..asked.clone()
        }
    }

    /// The same cut with caches for `sequences` sequences of full length. The caller knows that they fit:
    /// [`Plan::capacity`].
    pub fn with_sequences(mut self, sequences: u64) -> Self {
        for stage in &mut self.stages {
            let kv_bytes = &mut stage.footprint.kv_bytes;
            *kv_bytes = *kv_bytes / self.sequences.max(1) * sequences;
        }
        self.sequences = sequences;
        self
    }

    /// The prompt tokens a step that give the first token of a prompt of [`SAMPLE_PROMPT_TOKENS`] soonest; `None`
    /// where costs or links are unknown.
    pub fn best_prefill_chunk(&self) -> Option<u64> {
        let predictor = self.predictor()?;
        let tokens = self.sample_prompt_tokens();
        let chunks = [512, 256, 128, 64, 32].into_iter();
        chunks.min_by_key(|&chunk| predictor.first_token_ns(tokens, chunk))
    }

    /// How fast this plan is predicted to be with a prompt of [`Plan::sample_prompt_tokens`], in the best chunks.
    pub fn predicted(&self) -> Option<Prediction> {
        self.predict(self.sample_prompt_tokens(), self.best_prefill_chunk()?)
    }

    /// The layers of each rank, as `--layers` takes them.
    pub fn layer_ranges(&self) -> LayerRanges {
        LayerRanges(
            self.stages
                .iter()
                .map(|stage| stage.layers.clone())
                .collect(),
        )
    }

    /// Weight bytes of all ranks together. More than [`Plan::model_bytes`] by one table when a
    /// tied table stands on two ranks.
    pub fn weights_bytes(&self) -> u64 {
        self.sum(Footprint::weights_bytes)
    }

    /// Weight and KV bytes of all ranks together.
    pub fn total_bytes(&self) -> u64 {
        self.sum(Footprint::total_bytes)
    }

    /// Weight bytes saved against every rank holding the whole model.
    pub fn memory_saved_bytes(&self) -> u64 {
        self.full_copies_bytes()
            .saturating_sub(self.weights_bytes())
    }

    /// Weight bytes if every rank held the whole model.
    pub fn full_copies_bytes(&self) -> u64 {
        self.model_bytes.saturating_mul(self.stages.len() as u64)
    }

    /// Predicted time of the slowest stage, which sets the pace of a full pipeline. `None` for a
    /// plan without stages, which [`plan`] never returns.
    pub fn slowest(&self) -> Option<StageTime> {
        self.stages.iter().map(|stage| stage.time).max()
    }

    /// Share of a full pipeline's step during which `stage` works: 1 for the slowest. For
    /// printing.
    pub fn share_of_step(&self, stage: &Stage) -> f64 {
        self.slowest()
            .map_or(1.0, |slowest| stage.time.share_of(slowest))
    }

    /// Mean of [`Plan::share_of_step`] over the ranks: 1 when all are equally slow. One minus it is
    /// the predicted idle share of a full pipeline. For printing.
    pub fn balance(&self) -> f64 {
        let shares: f64 = self
            .stages
            .iter()
            .map(|stage| self.share_of_step(stage))
            .sum();
        shares / self.stages.len().max(1) as f64
    }

    fn sum(&self, bytes: impl Fn(&Footprint) -> u64) -> u64 {
        let stages = self.stages.iter();
        stages.fold(0, |sum, stage| sum.saturating_add(bytes(&stage.footprint)))
    }
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The device list is empty.
    #[error("a plan needs at least one rank; the device list is empty")]
    NoRanks,
    /// The model has no layers.
    #[error("a plan needs at least one layer; the model has none")]
    NoLayers,
    /// More layers than [`MAX_LAYERS`].
    #[error("the model has {found} layers; at most {MAX_LAYERS} are supported")]
    TooManyLayers {
        /// Layers of the model.
        found: usize,
    },
    /// Some rank would get no layer.
    #[error(
        "{} for {}: every rank needs at least one layer; start at most {} (mpirun -np {layers})",
        counted(*ranks as u64, "rank"),
        counted(*layers as u64, "layer"),
        counted(*layers as u64, "rank")
    )]
    MoreRanksThanLayers {
        /// Ranks.
        ranks: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A device's speed is zero.
    #[error("rank {rank} ({name}): its speed is 0; expected a whole number above 0")]
    ZeroSpeed {
        /// The rank.
        rank: usize,
        /// The device's name.
        name: String,
    },
    /// The sizes do not fit in 64 bits.
    #[error(
        "the bytes needed exceed 64 bits: {layers} layers x {context_tokens} tokens of context x \
         {sequences} sequences; lower --context or the number of sequences"
    )]
    TooLarge {
        /// Layers of the model.
        layers: usize,
        /// Tokens that a sequence may hold.
        context_tokens: u64,
        /// Sequences held at the same time.
        sequences: u64,
    },
    /// A device's costs contradict themselves.
    #[error("rank {rank} ({name}): the measured times make no sense: {fault}; calibrate again")]
    Cost {
        /// The rank.
        rank: usize,
        /// The device's name.
        name: String,
        /// What is wrong.
        fault: &'static str,
    },
    /// Not one link from each rank to the next.
    #[error("times of {found} links for {ranks} ranks; expected {}, one from each rank to the next", ranks - 1)]
    Links {
        /// Ranks.
        ranks: usize,
        /// Links.
        found: usize,
    },
    /// Ranges given by hand do not cover the model.
    #[error(transparent)]
    Cover(#[from] CoverError),
    /// Some rank is over its memory limit however the strategy cuts.
    #[error(transparent)]
    DoesNotFit(#[from] Box<Shortfall>),
}

impl PlanError {
    /// Whether the command line or the number of ranks is wrong, whatever the hosts: bad usage.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::NoRanks | Self::MoreRanksThanLayers { .. } | Self::Cover(_) => true,
            Self::NoLayers
            | Self::TooManyLayers { .. }
            | Self::ZeroSpeed { .. }
            | Self::Cost { .. }
            | Self::Links { .. }
            | Self::TooLarge { .. }
            | Self::DoesNotFit(_) => false,
        }
    }
}

/// Makes the plan. The same request gives the same plan on every machine.
///
/// # Errors
///
/// See [`PlanError`]. [`PlanError::DoesNotFit`] only if no cut that the strategy allows keeps every
/// rank within its limit.
pub fn plan(request: &PlanRequest<'_>) -> Result<Plan, PlanError> {
    check_request(request)?;
    let ledger = Ledger::new(request)?;
    let (chosen, ranges) = strategy::cut(&request.strategy, &ledger)?;
    if !ledger.fits(&ranges) {
        return Err(Box::new(Shortfall::new(request, &ledger, &ranges)).into());
    }
    let plan = Plan {
        strategy: request.strategy.clone(),
        chosen,
        stages: ledger.stages(&ranges),
        wire_dtype: request.wire_dtype,
        lookup: request.shape.lookup(),
        layer_count: request.shape.layer_count(),
        model_bytes: ledger.model_bytes,
        context_tokens: request.context_tokens,
        sequences: request.sequences,
        hidden_row_bytes: request.shape.hidden_row_bytes,
        links: request.links.clone(),
        times: match request.costs() {
            Some(_) => request.cost_source,
            None => TimeSource::Relative,
        },
    };
    validate(&plan, request.shape.layer_count())?;
    Ok(plan)
}

fn check_request(request: &PlanRequest<'_>) -> Result<(), PlanError> {
    let (layers, ranks) = (request.shape.layer_count(), request.devices.len());
    match (layers, ranks) {
        (_, 0) => return Err(PlanError::NoRanks),
        (0, _) => return Err(PlanError::NoLayers),
        (found, _) if found > MAX_LAYERS => return Err(PlanError::TooManyLayers { found }),
        _ if ranks > layers => return Err(PlanError::MoreRanksThanLayers { ranks, layers }),
        _ => {}
    }
    for (rank, device) in request.devices.iter().enumerate() {
        check_device(rank, device)?;
    }
    match &request.links {
        Some(links) if links.forward.len() != ranks - 1 => Err(PlanError::Links {
            ranks,
            found: links.forward.len(),
        }),
        _ => Ok(()),
    }
}

fn check_device(rank: usize, device: &Device) -> Result<(), PlanError> {
    let name = || device.name.clone();
    if device.speed == 0 {
        return Err(PlanError::ZeroSpeed { rank, name: name() });
    }
    match device.cost.as_ref().and_then(DeviceCost::fault) {
        Some(fault) => Err(PlanError::Cost {
            rank,
            name: name(),
            fault,
        }),
        None => Ok(()),
    }
}
