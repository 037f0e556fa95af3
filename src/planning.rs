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

/// Sequences of full length that the caches are planned for where they fit and nothing else is asked for.
const SEQUENCES: u64 = 8;
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

/// What activations are computed in and travel in: the model's own dtype where all `devices` are GPUs (`gpu`), f32
/// as soon as one of them is a CPU.
pub fn wire_dtype<'a>(mut devices: impl Iterator<Item = &'a str>, native: WireDtype) -> WireDtype {
    match devices.all(|device| device == "gpu") {
        true => native,
        false => WireDtype::F32,
    }
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
    /// The plan for all ranks: cut for one sequence, since no cut should be slower for the sake of more; then its
    /// caches take as many as fit, up to a few. Times come from the calibration, else from what the cluster file
    /// states of bandwidths, else they are relative.
    ///
    /// # Errors
    /// Options that cannot be met, or nothing that fits.
    pub fn plan(&self) -> Result<Plan> {
        let all: Vec<usize> = (0..self.ranks.len()).collect();
        let context_tokens = self.context_tokens()?;
        let plan = self.plan_with(&all, self.options.strategy(), context_tokens);
        let plan = plan.map_err(|error| match error.is_usage() {
            true => Usage::of(error),
            false => error.into(),
        })?;
        Ok(self.with_sequences(plan))
    }

    fn with_sequences(&self, plan: Plan) -> Plan {
        let wanted = self
            .options
            .max_sequences
            .unwrap_or(SEQUENCES)
            .min(SEQUENCES);
        let shape = plan.shape_of(self.shape);
        let capacity = plan.capacity(&shape, self.longest_context_tokens);
        plan.with_sequences(wanted.min(capacity.sequences).max(1))
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
        let plan = self.plan_with(kept, strategy, self.context_tokens()?);
        Ok(plan.map(|plan| self.with_sequences(plan)))
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
            sequences: 1,
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
            Some(mut measured) => {
                for (rank, (place, cost)) in kept.iter().zip(&mut measured.devices).enumerate() {
                    let measured_with = self.ranks[*place].sharers.get() as u64;
                    cost.shared_by(ranks[rank].sharers.get() as u64, measured_with);
                }
                (TimeSource::Measured, Some(measured))
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::plan::{DeviceCost, Head, LinkCost, LinkCosts, StepCost};
    use clap::Parser;
    use std::path::Path;

    fn options(arguments: &[&str]) -> ModelOptions {
        let command = ["mlx-pipe", "plan"].iter().chain(arguments);
        match Cli::try_parse_from(command).unwrap().command {
            Some(Command::Plan(options)) => options.model,
            other => panic!("{other:?}"),
        }
    }

    fn shape() -> ModelShape {
        ModelShape {
            layer_bytes: vec![1_000_000; 6],
            embedding_bytes: 10,
            norm_bytes: 1,
            head: Head::TiedOnce,
            kv_bytes_per_token_per_layer: 1,
            hidden_row_bytes: 8,
            layer_weights: 6_000_000,
        }
    }

    /// Three hosts; the first one has a third of the others' bandwidth.
    fn cluster(with_rates: bool) -> ClusterFile {
        let device = |host: &str, bandwidth: u64| {
            let mut capabilities = serde_json::json!({"memory_gb": 1, "gpu_cores": 4});
            if with_rates {
                capabilities["memory_bandwidth_gb_s"] = bandwidth.into();
            }
            serde_json::json!({"hostname": host, "capabilities": capabilities})
        };
        let file = serde_json::json!({
            "devices": [device("a", 10), device("b", 30), device("c", 30)],
            "link": {"latency_us": 1, "bandwidth_gbit_s": 10},
        });
        ClusterFile::parse(Path::new("cluster.json"), &file.to_string()).unwrap()
    }

    /// What a calibration may say: the first rank is as fast as the other two together.
    fn measured() -> Costs {
        let link = LinkCost {
            latency_ns: 10,
            bytes_per_s: 1_000_000_000,
        };
        let device = |ns| DeviceCost {
            layer: vec![StepCost { tokens: 1, ns }],
            layer_bytes: 1_000_000,
            context_ns: 0,
            head_ns: 0,
            step_ns: 0,
            crowding_per_mille: 1000,
        };
        Costs {
            devices: [100, 300, 150].map(device).to_vec(),
            links: Some(LinkCosts {
                forward: vec![link; 2],
                back: link,
            }),
        }
    }

    /// The plan's layer counts and what its times rest on, for the ranks `kept`.
    fn cut(
        options: &ModelOptions,
        cluster: &ClusterFile,
        costs: Option<&Costs>,
        kept: &[usize],
    ) -> (Vec<usize>, TimeSource) {
        let local = cluster::probe_local().unwrap();
        let question = Question {
            options,
            cluster: Some(cluster),
            ranks: &cluster::describe(Some(cluster), None, &local).unwrap(),
            shape: &shape(),
            longest_context_tokens: 100,
            wire_dtype: WireDtype::F32,
            costs,
        };
        let plan = question.plan_of(kept).unwrap().unwrap();
        if kept.len() == 3 {
            assert_eq!(question.plan().unwrap(), plan);
        }
        let counts = plan.stages.iter().map(|stage| stage.layers.len());
        (counts.collect(), plan.times)
    }

    #[test]
    fn a_calibration_comes_before_stated_rates_and_those_before_cores() {
        let (plain, costs) = (options(&[]), measured());
        let all = [0, 1, 2];
        assert_eq!(
            cut(&plain, &cluster(false), None, &all),
            (vec![2, 2, 2], TimeSource::Relative)
        );
        assert_eq!(
            cut(&plain, &cluster(true), None, &all),
            (vec![1, 3, 2], TimeSource::Estimated)
        );
        assert_eq!(
            cut(&plain, &cluster(true), Some(&costs), &all),
            (vec![3, 1, 2], TimeSource::Measured)
        );
    }

    #[test]
    fn a_part_of_the_ranks_is_planned_by_its_own_costs() {
        let (plain, by_hand) = (options(&[]), options(&["--layers", "0,1-4,5"]));
        let costs = measured();
        assert_eq!(
            cut(&plain, &cluster(true), Some(&costs), &[0, 2]),
            (vec![4, 2], TimeSource::Measured)
        );
        assert_eq!(
            cut(&plain, &cluster(true), None, &[0, 1]),
            (vec![1, 5], TimeSource::Estimated)
        );
        // Layers by hand are for all ranks.
        assert_eq!(cut(&by_hand, &cluster(true), None, &[0, 1, 2]).0, [1, 4, 1]);
        assert_eq!(cut(&by_hand, &cluster(true), None, &[0, 2]).0, [1, 5]);
    }
}
