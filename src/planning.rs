//! From what the user asked for to a plan: the same steps for a run and for `mlx-pipe plan`, so that the
//! one shows what the other does.

use crate::agree::Usage;
use crate::cli::ModelOptions;
use crate::cluster::{self, ClusterFile, RankDevice};
use crate::plan::{
    self, Costs, Device, ModelShape, Plan, PlanError, PlanRequest, Strategy, TiedTable, TimeSource,
    WireDtype,
};
use anyhow::{Result, anyhow};

/// Sequences in flight.
const SEQUENCES: u64 = 1;
/// Context where neither the user nor the model says less, tokens.
const DEFAULT_CONTEXT_TOKENS: u64 = 4096;

/// The model's name: as asked for, else as the cluster file has it, else as the environment does.
///
/// # Errors
/// None of them names one.
pub fn choose_model(
    asked: Option<String>,
    in_cluster_file: Option<String>,
    in_environment: Option<String>,
) -> Result<String> {
    asked.or(in_cluster_file).or(in_environment).ok_or_else(|| {
        Usage::of(anyhow!(
            "no model given; use --model DIR_OR_ID, a cluster file with `model_name`, or MLX_PIPE_MODEL"
        ))
    })
}

/// What a plan is asked for.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// What the user asked for.
    pub options: &'a ModelOptions,
    /// The cluster file, for what it says of links.
    pub cluster: Option<&'a ClusterFile>,
    /// The devices, in rank order.
    pub ranks: &'a [RankDevice],
    /// The model, a tied table where [`ModelOptions::tied`] has it.
    pub shape: &'a ModelShape,
    /// Longest sequence that the model was made for, tokens.
    pub longest_context_tokens: u64,
    /// Dtype of the activations between ranks.
    pub wire_dtype: WireDtype,
    /// What a calibration measured of these ranks.
    pub costs: Option<&'a Costs>,
}

impl Question<'_> {
    /// The plan for all ranks. Times come from the calibration, else from what the cluster file states of
    /// bandwidths, else they are relative.
    ///
    /// # Errors
    /// Options that cannot be met, or nothing that fits.
    pub fn plan(&self) -> Result<Plan> {
        let all: Vec<usize> = (0..self.ranks.len()).collect();
        let context_tokens = self.context_tokens()?;
        self.plan_with(&all, self.options.strategy(), context_tokens)
            .map_err(|error| match error.is_usage() {
                true => Usage::of(error),
                false => error.into(),
            })
    }

    /// The plan for the ranks `kept` (ascending) if the others did not take part; layers given by hand are
    /// for all of them, so that they are balanced then.
    ///
    /// # Errors
    /// A context that the model is not made for, or nothing that fits.
    pub fn plan_of(&self, kept: &[usize]) -> Result<std::result::Result<Plan, PlanError>> {
        let strategy = match self.options.strategy() {
            Strategy::Manual(_) if kept.len() < self.ranks.len() => Strategy::Balanced,
            strategy => strategy,
        };
        Ok(self.plan_with(kept, strategy, self.context_tokens()?))
    }

    fn plan_with(
        &self,
        kept: &[usize],
        strategy: Strategy,
        context_tokens: u64,
    ) -> std::result::Result<Plan, PlanError> {
        let ranks = cluster::part_of(self.ranks, kept);
        let (cost_source, costs) = self.costs_of(kept, &ranks);
        let costs = costs.as_ref();
        let device = |(rank, device): (usize, &RankDevice)| Device {
            cost: costs.and_then(|costs| costs.devices.get(rank).cloned()),
            ..device.plan_device(self.options.memory_limit)
        };
        let devices: Vec<Device> = ranks.iter().enumerate().map(device).collect();
        let request = PlanRequest {
            shape: self.shape,
            devices: &devices,
            strategy,
            context_tokens,
            sequences: SEQUENCES,
            wire_dtype: self.wire_dtype,
            links: costs.and_then(|costs| costs.links.clone()),
            cost_source,
        };
        match TiedTable::from(self.options.tied) {
            TiedTable::Auto => plan::plan_choosing_table(&request),
            TiedTable::Once | TiedTable::Both => plan::plan(&request),
        }
    }

    fn costs_of(&self, kept: &[usize], ranks: &[RankDevice]) -> (TimeSource, Option<Costs>) {
        match self.costs.and_then(|costs| costs.of_ranks(kept)) {
            Some(measured) => (TimeSource::Measured, Some(measured)),
            None => (TimeSource::Estimated, self.estimate(ranks)),
        }
    }

    /// Costs from what the cluster file states; `None` if it does not state all devices' bandwidth.
    fn estimate(&self, ranks: &[RankDevice]) -> Option<Costs> {
        let device = |rank: &RankDevice| {
            let rates = rank.profile.rates?;
            Some(rates.cost(self.shape, rank.sharers.get() as u64))
        };
        Some(Costs {
            devices: ranks.iter().map(device).collect::<Option<_>>()?,
            links: self.cluster.and_then(|file| file.links(ranks)),
        })
    }

    /// The context asked for, at most the model's.
    fn context_tokens(&self) -> Result<u64> {
        let longest = self.longest_context_tokens;
        match self.options.context {
            None => Ok(longest.min(DEFAULT_CONTEXT_TOKENS)),
            Some(asked) if asked <= longest => Ok(asked),
            Some(asked) => Err(Usage::of(anyhow!(
                "--context {asked} is more than the {longest} tokens that the model was made for"
            ))),
        }
    }
}
