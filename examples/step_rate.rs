//! How fast one rank computes steps: what `scripts/bench peers` measures of this program. The whole model is
//! loaded as a run loads it; sequences are decoded together, or a prompt is prefilled, with greedy sampling.
//!
//! Usage: step_rate MODEL_DIR [--threads T] [--kernels own|mlx] (--sequences S --steps K | --prefill P)
//! Prints one line of JSON: {"tokens_per_s": x}.

use anyhow::{Context, Result, bail, ensure};
use mlx_pipe::cli::{Cli, Command};
use mlx_pipe::cluster;
use mlx_pipe::model::ModelFiles;
use mlx_pipe::pipeline::Compute;
use mlx_pipe::plan::WireDtype;
use mlx_pipe::planning::Question;
use mlx_pipe::sampler::Sampler;
use mlx_pipe::stage::{self, DeviceChoice, KernelChoice, Output, Seat, Stage};
use mlx_pipe::wire::{Entry, SampleParams, Step};
use std::path::Path;
use std::time::Instant;

/// Tokens in each sequence's cache before decoding is timed.
const PROMPT_TOKENS: usize = 16;

/// Steps that are not timed.
const WARM_UP_STEPS: usize = 2;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().context("a model directory comes first")?;
    let (mut threads, mut sequences, mut steps, mut prefill) = (1, 1, 32, 0);
    let mut choice = KernelChoice::Own;
    while let Some(name) = arguments.next() {
        let value = arguments
            .next()
            .with_context(|| format!("{name} wants a value"))?;
        let number = || {
            value
                .parse::<usize>()
                .with_context(|| format!("{name} {value}"))
        };
        match name.as_str() {
            "--threads" => threads = number()?,
            "--sequences" => sequences = number()?,
            "--steps" => steps = number()?,
            "--prefill" => prefill = number()?,
            "--kernels" if value == "own" => choice = KernelChoice::Own,
            "--kernels" if value == "mlx" => choice = KernelChoice::Mlx,
            _ => bail!("{name} {value} is not understood"),
        }
    }
    ensure!(threads > 0 && sequences > 0, "at least one of each");
    let mut rig = Rig::load(Path::new(&model), choice, threads)?;
    let rate = match prefill {
        0 => rig.decode(sequences, steps)?,
        tokens => rig.prefill(tokens)?,
    };
    println!("{{\"tokens_per_s\": {rate}}}");
    Ok(())
}

/// One rank with the whole model.
struct Rig {
    stage: Stage,
    sampler: Sampler,
    vocab_size: u32,
    number: u64,
}

impl Rig {
    fn load(dir: &Path, choice: KernelChoice, threads: usize) -> Result<Self> {
        let seat = Seat { rank: 0, ranks: 1 };
        let kernels = stage::computer(DeviceChoice::Cpu, choice, threads, seat)?.kernels;
        let files = ModelFiles::open(dir)?;
        let Some(Command::Plan(options)) = <Cli as clap::Parser>::parse_from(["", "plan"]).command
        else {
            bail!("plan is a command")
        };
        let ranks = cluster::describe(None, None, &cluster::probe_local()?)?;
        let plan = Question {
            options: &options.model,
            cluster: None,
            ranks: &ranks,
            shape: &files.shape(
                WireDtype::F32,
                options.model.kernels.into(),
                options.model.tied.into(),
            ),
            longest_context_tokens: files.longest_context_tokens(),
            wire_dtype: WireDtype::F32,
            costs: None,
        };
        let plan = plan.plan()?;
        let part = plan.stages.first().context("one rank")?;
        let checkpoint = &files.checkpoint;
        let (stage, _) = Stage::load(&files, checkpoint, part, WireDtype::F32, &kernels)?;
        Ok(Self {
            stage,
            sampler: Sampler::default(),
            vocab_size: files.architecture.vocab_size as u32,
            number: 0,
        })
    }

    /// Computes a step of these sequences' tokens; the tokens sampled.
    fn step(&mut self, start: usize, tokens: Vec<Vec<u32>>) -> Result<Vec<u32>> {
        let entry = |(slot, tokens)| Entry {
            slot: slot as u32,
            start: start as u32,
            tokens,
            sample: Some(SampleParams::GREEDY),
        };
        let step = Step {
            number: self.number,
            entries: tokens.into_iter().enumerate().map(entry).collect(),
            ..Step::default()
        };
        self.number += 1;
        match self.stage.run(&step, &[])? {
            Output::Scores(scores) => {
                let sampled = self.sampler.sample_step(&step, &scores);
                Ok(sampled.iter().map(|sampled| sampled.token).collect())
            }
            Output::Hidden(_) => bail!("one rank has the head"),
        }
    }

    fn prompt(&self, sequence: usize, tokens: usize) -> Vec<u32> {
        let token = |index: usize| (index * 31 + sequence * 7 + 11) as u32 % self.vocab_size;
        (0..tokens).map(token).collect()
    }

    /// Tokens of all sequences a second.
    fn decode(&mut self, sequences: usize, steps: usize) -> Result<f64> {
        let prompts = (0..sequences).map(|sequence| self.prompt(sequence, PROMPT_TOKENS));
        let prompts = prompts.collect();
        let mut last = self.step(0, prompts)?;
        let mut began = Instant::now();
        for step in 0..WARM_UP_STEPS + steps {
            if step == WARM_UP_STEPS {
                began = Instant::now();
            }
            let tokens = last.into_iter().map(|token| vec![token]).collect();
            last = self.step(PROMPT_TOKENS + step, tokens)?;
        }
        Ok((sequences * steps) as f64 / began.elapsed().as_secs_f64())
    }

    /// Tokens a second of a prompt in one step, the first token sampled.
    fn prefill(&mut self, tokens: usize) -> Result<f64> {
        let prompt = self.prompt(0, tokens);
        self.step(0, vec![prompt[..tokens.min(PROMPT_TOKENS)].to_vec()])?;
        let began = Instant::now();
        self.step(0, vec![prompt])?;
        Ok(tokens as f64 / began.elapsed().as_secs_f64())
    }
}
