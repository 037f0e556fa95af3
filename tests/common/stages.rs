//! A model whose stages run one after another in this process, passing each other the bytes that ranks would.

use mlx_pipe::model::{Caches, Kernels, ModelFiles};
use mlx_pipe::pipeline::Compute;
use mlx_pipe::plan::{
    Device, LayerRanges, Plan, PlanRequest, Strategy, TiedTable, TimeSource, WireDtype, plan,
};
use mlx_pipe::sampler::Scores;
use mlx_pipe::stage::{DeviceChoice, KernelChoice, Output, Seat, Stage, computer};
use mlx_pipe::wire::{Entry, SampleParams, Step, Upkeep};
use std::ops::Range;

/// Threads of our CPU kernels: more than one, so that work is divided.
pub const THREADS: usize = 2;

/// What one rank, alone on its host, computes with.
pub fn kernels(device: DeviceChoice, kernels: KernelChoice) -> Kernels {
    let seat = Seat { rank: 0, ranks: 1 };
    computer(device, kernels, THREADS, seat).unwrap().kernels
}

/// What makes a stage give all logits.
pub fn all_logits() -> SampleParams {
    SampleParams {
        logprobs: Some(0),
        ..SampleParams::GREEDY
    }
}

/// Tokens of a sequence, after which all logits are wanted.
pub fn entry(slot: u32, start: usize, tokens: &[u32]) -> Entry {
    Entry {
        slot,
        start: start as u32,
        tokens: tokens.to_vec(),
        sample: Some(all_logits()),
    }
}

/// All logits of each.
pub fn logits(scores: Vec<Scores>) -> Vec<Vec<f32>> {
    let logits = |scores| match scores {
        Scores::All(logits) => logits,
        Scores::Best(token) => panic!("only the best token: {token:?}"),
    };
    scores.into_iter().map(logits).collect()
}

/// ‖ours − reference‖ / ‖reference‖.
pub fn relative_error(ours: &[f32], reference: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| {
        values.map(|value| value * value).sum::<f64>().sqrt()
    };
    let difference = ours.iter().zip(reference).map(|(a, b)| (*a - *b) as f64);
    norm(&mut difference.into_iter()) / norm(&mut reference.iter().map(|&v| v as f64))
}

/// A model cut into stages.
pub struct Pipeline {
    stages: Vec<Stage>,
    next: u64,
}

impl Pipeline {
    /// The stages of a cut.
    pub fn load(
        files: &ModelFiles,
        cut: &[Range<usize>],
        kernels: &Kernels,
        dtype: WireDtype,
    ) -> Self {
        let load = |stage| Stage::load(files, &files.checkpoint, stage, dtype, kernels);
        let plan = plan_of(files, cut, dtype);
        Self {
            stages: plan
                .stages
                .iter()
                .map(|stage| load(stage).unwrap().0)
                .collect(),
            next: 0,
        }
    }

    /// Runs a step through all stages; what the last makes of it.
    pub fn step(&mut self, upkeep: Vec<Upkeep>, entries: Vec<Entry>) -> Vec<Scores> {
        let step = Step {
            number: self.next,
            upkeep,
            entries,
            ..Step::default()
        };
        self.next += 1;
        let mut payload = Vec::new();
        for stage in &mut self.stages {
            match stage.run(&step, &payload).unwrap() {
                Output::Hidden(bytes) => payload = bytes,
                Output::Scores(scores) => return scores,
            }
        }
        panic!("the last stage gave no scores");
    }

    /// The logits after each of the entries.
    pub fn logits(&mut self, entries: Vec<Entry>) -> Vec<Vec<f32>> {
        logits(self.step(vec![], entries))
    }

    /// Runs tokens of one sequence; the logits after the last.
    pub fn run(&mut self, slot: u32, start: usize, tokens: &[u32]) -> Vec<f32> {
        self.logits(vec![entry(slot, start, tokens)]).remove(0)
    }
}

fn plan_of(files: &ModelFiles, cut: &[Range<usize>], dtype: WireDtype) -> Plan {
    let device = Device {
        name: "here".into(),
        memory_limit_bytes: 1 << 40,
        speed: 1,
        cost: None,
    };
    plan(&PlanRequest {
        shape: &files.shape(dtype, Caches::Own, TiedTable::Both),
        devices: &vec![device; cut.len()],
        strategy: Strategy::Manual(LayerRanges(cut.to_vec())),
        context_tokens: 512,
        sequences: 1,
        wire_dtype: dtype,
        links: None,
        cost_source: TimeSource::Estimated,
    })
    .unwrap()
}
