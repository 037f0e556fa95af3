//! The command line, as types checked once. Defaults stand here and nowhere else; `--help` prints them.

use crate::launcher;
use crate::model::Caches;
use crate::plan::{LayerRanges, Strategy, TiedTable};
use crate::request::{Format, Sampling};
use crate::stage::{DeviceChoice, KernelChoice};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Runs a language model across a few machines, each holding only its own layers.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    args_override_self = true,
    override_usage = "mlx-pipe [OPTIONS] < PROMPTS\n       \
                      mpirun -np RANKS [--hostfile FILE] mlx-pipe [OPTIONS] < PROMPTS\n       \
                      mlx-pipe <COMMAND>",
    after_help = "Prompts are read from standard input, one a line (plain text, or JSON as in the OpenAI\n\
                  API); the answers go to standard output in the same order.\n\
                  Exit status: 0 all answered, 1 the run failed, 2 bad usage, 3 some lines failed.",
    max_term_width = 100
)]
pub struct Cli {
    /// A command other than generating.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of generating.
    #[command(flatten)]
    pub run: RunOptions,
}

/// What else the program does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the sharding plan and the memory report; needs no MPI and reads no weights
    Plan(PlanOptions),
    /// Answer requests over HTTP as OpenAI's API does, until told to end; alone or under mpirun
    Serve(Box<ServeOptions>),
    /// Look at all hosts and links before a run, under mpirun, with the run's options; reads no weights
    Doctor(Box<RunOptions>),
    /// Convert a GGUF file to an MLX checkpoint directory, tokenizer included
    Import {
        /// The GGUF file
        #[arg(value_name = "MODEL.gguf")]
        gguf: PathBuf,
        /// The directory to make
        out_dir: PathBuf,
    },
}

/// Which model, and how to cut it.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model and plan")]
pub struct ModelOptions {
    /// Checkpoint directory, or an id in the Hugging Face cache (downloaded if it is not there)
    /// [default: model_name of the cluster file, else $MLX_PIPE_MODEL]
    #[arg(long, value_name = "DIR|ID")]
    pub model: Option<String>,

    /// Cluster file (JSON) with the devices; only rank 0 needs it
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,

    /// How to cut: balanced, memory-proportional, compute-proportional, uniform or auto
    #[arg(long, value_name = "NAME", default_value = "balanced")]
    pub strategy: Strategy,

    /// Layers of each rank by hand, such as 0-9,10-18,19-27
    #[arg(long, value_name = "RANGES", conflicts_with = "strategy")]
    pub layers: Option<LayerRanges>,

    /// What to compute on: auto (the GPU where there is one), cpu or gpu
    #[arg(long, value_enum, hide_possible_values = true, default_value = "auto")]
    pub device: DeviceName,

    /// What computes on CPUs and NVIDIA GPUs: own (kernels of this program) or mlx (MLX's, slower)
    #[arg(
        long,
        value_enum,
        value_name = "WHOSE",
        hide_possible_values = true,
        default_value = "own"
    )]
    pub kernels: KernelName,

    /// Threads of each rank's own kernels [default: the host's cores while one step is on its way, shared
    /// between its ranks while several are]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    pub threads: Option<usize>,

    /// Where an embedding table that is the head too is held: once (on the last rank), both (on the
    /// first too, so that no embedding travels), or auto (both where that is known to be faster)
    #[arg(
        long,
        value_enum,
        value_name = "WHERE",
        hide_possible_values = true,
        default_value = "auto"
    )]
    pub tied: TiedName,

    /// Tokens that a sequence may hold, prompt and answer [default: 4096, or the model's if less]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(2..=1 << 24))]
    pub context: Option<u64>,

    /// Most sequences answered at a time [default: as many as go into the steps in flight and into
    /// the memory planned for their caches: that of 8 of full length, or as many as fit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=65_536))]
    pub max_sequences: Option<u64>,

    /// Most memory that a rank may use for weights and cache, such as 12GB or 900MB [default: 80 %
    /// of the host's, shared by its ranks]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub memory_limit: Option<u64>,
}

impl ModelOptions {
    /// What makes a plan, option by option, so that ranks can compare: they might have been started with
    /// different ones.
    pub fn plan_options(&self) -> Vec<(String, String)> {
        let cut = match &self.layers {
            Some(ranges) => ("--layers", ranges.to_string()),
            None => ("--strategy", self.strategy.to_string()),
        };
        let stated =
            |value: Option<u64>| value.map_or("not given".into(), |value| value.to_string());
        let options = [
            cut,
            ("--kernels", format!("{:?}", self.kernels).to_lowercase()),
            ("--tied", format!("{:?}", self.tied).to_lowercase()),
            ("--context", stated(self.context)),
            ("--max-sequences", stated(self.max_sequences)),
            ("--memory-limit", stated(self.memory_limit)),
        ];
        options
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    /// What was asked of CPUs beside the default, as a part of a name.
    pub fn kernels_label(&self) -> String {
        let kernels = match self.kernels {
            KernelName::Own => "",
            KernelName::Mlx => "-mlx",
        };
        let threads = self.threads.map(|threads| format!("-{threads}t"));
        format!("{kernels}{}", threads.unwrap_or_default())
    }

    /// The strategy asked for, layers by hand included.
    pub fn strategy(&self) -> Strategy {
        match &self.layers {
            Some(ranges) => Strategy::Manual(ranges.clone()),
            None => self.strategy.clone(),
        }
    }
}

/// Options of `plan`.
#[derive(Debug, Args)]
pub struct PlanOptions {
    /// Which model, and how to cut it.
    #[command(flatten)]
    pub model: ModelOptions,

    /// Ranks to plan for: the first devices of the cluster file, else ranks that share this machine
    /// [default: model_parallel_size of the cluster file, its devices, or 1]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub ranks: Option<u64>,

    /// Show plans for the first device only, the first two, and so on, side by side
    #[arg(long, conflicts_with = "layers")]
    pub what_if: bool,
}

/// Options of generating.
#[derive(Debug, Args)]
pub struct RunOptions {
    /// Which model, and how to cut it.
    #[command(flatten)]
    pub model: ModelOptions,

    /// Keep each rank's tensors in a file of this directory of its host, and read only that at later starts
    #[arg(long, value_name = "DIR", help_heading = "Model and plan")]
    pub shard_cache: Option<PathBuf>,

    /// The rank that has the model: hosts without it get their ranks' tensors from there, once, and keep
    /// them in the shard cache [default of --shard-cache then: ~/.cache/mlx-pipe/shards]
    #[arg(long, value_name = "RANK", help_heading = "Model and plan")]
    pub weights_from: Option<usize>,

    /// How to sample.
    #[command(flatten)]
    pub sampling: SamplingOptions,

    /// Measure the hosts and their links before planning, for some seconds, and keep the result for later
    /// runs and for `plan`
    #[arg(long, help_heading = "Model and plan")]
    pub calibrate: bool,

    /// Take plain prompts as they are, without the chat template
    #[arg(long, help_heading = "Input and output")]
    pub raw: bool,

    /// How to write answers: auto (plain text for plain prompts, JSON for JSON), plain, or jsonl
    #[arg(
        long,
        value_enum,
        default_value = "auto",
        help_heading = "Input and output"
    )]
    pub format: FormatName,

    /// Write the report of the run to this file as JSON
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    pub report: Option<PathBuf>,

    /// Say what each rank does (-v), and every step of it (-vv), on standard error
    #[arg(short, long, action = clap::ArgAction::Count, help_heading = "Input and output")]
    pub verbose: u8,

    /// Most sequences that decode in one step
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Pipeline",
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_batch: u32,

    /// Most steps on their way at once [default: one more than there are ranks]
    #[arg(long, value_name = "N", help_heading = "Pipeline",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub steps_in_flight: Option<u32>,

    /// Most tokens of prompts in one step [default: what the plan predicts to be fastest; without known
    /// times 64 where a rank is a CPU, else 512]
    #[arg(long, value_name = "TOKENS", help_heading = "Pipeline",
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub prefill_chunk: Option<u32>,

    /// Write what every rank did when to this file, for Perfetto or Chrome's about:tracing
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    pub trace: Option<PathBuf>,

    /// Seconds without an answer to a step after which the run is given up
    #[arg(long, value_name = "SECONDS", default_value_t = 600, help_heading = "Pipeline",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub step_timeout: u64,
}

impl RunOptions {
    /// What must be the same on all ranks: [`ModelOptions::plan_options`], whether to measure and to trace, and who
    /// gives weights to whom.
    pub fn shared_options(&self) -> Vec<(String, String)> {
        let source = self.weights_from;
        let source = source.map_or("not given".into(), |rank| rank.to_string());
        let given = |is_given| if is_given { "given" } else { "not given" };
        let mut options = self.model.plan_options();
        options.push(("--weights-from".into(), source));
        options.push(("--calibrate".into(), given(self.calibrate).into()));
        options.push(("--trace".into(), given(self.trace.is_some()).into()));
        options
    }

    /// [`Self::step_timeout`] as a duration.
    pub fn step_limit(&self) -> Duration {
        Duration::from_secs(self.step_timeout)
    }
}

/// Options of `serve`.
#[derive(Debug, Args)]
pub struct ServeOptions {
    /// Which model, how to cut it, how to run it.
    #[command(flatten)]
    pub run: RunOptions,

    /// The server.
    #[command(flatten)]
    pub server: ServerOptions,
}

/// How to listen, whom to answer, and how much at a time.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server")]
pub struct ServerOptions {
    /// Address and port to listen on, on rank 0's host; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", value_parser = parse_addr)]
    pub addr: SocketAddr,

    /// File with the keys that clients may send (`Authorization: Bearer KEY`), one a line [default: no key needed]
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Let web pages of this origin, such as http://localhost:3000, call the server; may be given several times
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,

    /// Answer requests for this host name too; without a key, only addresses, localhost and this host's name are
    /// answered [may be given several times]
    #[arg(long, value_name = "NAME")]
    pub allow_host: Vec<String>,

    /// Seconds within which answers under way may end after the server was told to end
    #[arg(long, value_name = "SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub drain_s: u64,

    /// Most sequences that wait for their turn; more are refused with status 429
    #[arg(long, value_name = "N", default_value_t = 256,
          value_parser = clap::value_parser!(u32).range(..=65_536))]
    pub max_queue: u32,

    /// Most connections at a time; of more, the one idle longest is closed
    #[arg(long, value_name = "N", default_value_t = 512,
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub max_connections: u32,

    /// Largest request body
    #[arg(long, value_name = "BYTES", default_value = "4MB", value_parser = parse_body_bytes)]
    pub max_body: u64,

    /// Seconds that a request's body may take to arrive
    #[arg(long, value_name = "SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub body_s: u64,

    /// Seconds that a client which is behind may read nothing of its answer; then it is taken to be gone
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub write_s: u64,

    /// Seconds that a connection may be open until the head of a request, or of the next one, has arrived
    #[arg(long, value_name = "SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub idle_s: u64,
}

impl ServeOptions {
    /// The first option given that only a run over standard input knows.
    fn option_of_batches(&self) -> Option<&'static str> {
        let run = &self.run;
        let given = [
            ("--raw", run.raw),
            ("--format", !matches!(run.format, FormatName::Auto)),
            ("--report", run.report.is_some()),
            ("--trace", run.trace.is_some()),
        ];
        given
            .iter()
            .find(|(_, is_given)| *is_given)
            .map(|(name, _)| *name)
    }
}

/// How to sample, for requests that do not say it themselves.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling (a JSON line's own fields come first)")]
pub struct SamplingOptions {
    /// Tokens of an answer at most
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub max_tokens: usize,

    /// 0 always takes the most likely token
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub temperature: f32,

    /// Choose from the smallest set of tokens with this much probability; 1 is off
    #[arg(
        long,
        value_name = "P",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub top_p: f32,

    /// Choose from this many of the most likely tokens; 0 is off
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: u32,

    /// Drop tokens with less than this share of the best one's probability; 0 is off
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub min_p: f32,

    /// Make tokens that stand in the sequence less likely; 1 is off
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub repetition_penalty: f32,

    /// Key of the random numbers
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// End an answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

impl SamplingOptions {
    /// The defaults that requests start from. The seed is not among them: a run derives one for every
    /// request from its own.
    pub fn defaults(&self) -> Sampling {
        Sampling {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            stop: self.stop.clone(),
            logprobs: None,
        }
    }
}

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum DeviceName {
    Auto,
    Cpu,
    Gpu,
}

impl From<DeviceName> for DeviceChoice {
    fn from(name: DeviceName) -> Self {
        match name {
            DeviceName::Auto => Self::Auto,
            DeviceName::Cpu => Self::Cpu,
            DeviceName::Gpu => Self::Gpu,
        }
    }
}

/// `--kernels`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum KernelName {
    Own,
    Mlx,
}

impl From<KernelName> for KernelChoice {
    fn from(name: KernelName) -> Self {
        match name {
            KernelName::Own => Self::Own,
            KernelName::Mlx => Self::Mlx,
        }
    }
}

impl From<KernelName> for Caches {
    fn from(name: KernelName) -> Self {
        match name {
            KernelName::Own => Self::Own,
            KernelName::Mlx => Self::Mlx,
        }
    }
}

/// `--tied`.
#[derive(Debug, Clone, Copy, ValueEnum)]
#[allow(missing_docs)]
pub enum TiedName {
    Auto,
    Once,
    Both,
}

impl From<TiedName> for TiedTable {
    fn from(name: TiedName) -> Self {
        match name {
            TiedName::Auto => Self::Auto,
            TiedName::Once => Self::Once,
            TiedName::Both => Self::Both,
        }
    }
}

/// `--format`. The variants have no documentation of their own: clap would print it as a list, which
/// makes a page of what is a line.
#[derive(Debug, Clone, Copy, ValueEnum)]
#[allow(missing_docs)]
pub enum FormatName {
    Auto,
    Plain,
    Jsonl,
}

impl From<FormatName> for Format {
    fn from(name: FormatName) -> Self {
        match name {
            FormatName::Auto => Self::Auto,
            FormatName::Plain => Self::Plain,
            FormatName::Jsonl => Self::Jsonl,
        }
    }
}

/// Parses and checks the command line. On an error, or for `--help`, rank 0 prints and every rank ends.
pub fn parse() -> Cli {
    let rank = launcher::rank();
    let matches = command().try_get_matches();
    let cli = matches.and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = cli.and_then(|cli| {
        let serve = match &cli.command {
            Some(Command::Serve(options)) => Some(options),
            _ => None,
        };
        if let Some(option) = serve.and_then(|options| options.option_of_batches()) {
            let message = format!(
                "{option} does not go with serve: it is about prompts on standard input; leave it out\n"
            );
            return Err(clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, message));
        }
        let sampling = serve.map_or(&cli.run.sampling, |options| &options.run.sampling);
        let checked = sampling.defaults().validate();
        checked.map_err(|rejection| {
            // The fields of a request are named as in JSON, the options are not.
            let option = rejection.field.as_deref().unwrap_or_default();
            let message = rejection.message.replace(
                &format!("`{option}`"),
                &format!("--{}", option.replace('_', "-")),
            );
            clap::Error::raw(clap::error::ErrorKind::ValueValidation, message + "\n")
        })?;
        Ok(cli)
    });
    cli.unwrap_or_else(|error| {
        if rank == 0 {
            error.exit();
        }
        // A launcher kills the others as soon as one rank ends; the first must have spoken by then.
        std::thread::sleep(Duration::from_secs(1));
        std::process::exit(error.exit_code());
    })
}

/// The command line; what `serve` refuses is not in its help.
fn command() -> clap::Command {
    let hide = |command: clap::Command, name: &'static str| {
        command.mut_arg(name, |argument| argument.hide(true))
    };
    Cli::command().mut_subcommand("serve", |serve| {
        ["raw", "format", "report", "trace"]
            .into_iter()
            .fold(serve, hide)
    })
}

/// `$MLX_PIPE_MODEL`, the model where neither `--model` nor the cluster file names one.
pub fn model_of_environment() -> Option<String> {
    std::env::var("MLX_PIPE_MODEL")
        .ok()
        .filter(|model| !model.is_empty())
}

/// Threads of a rank; a thousand are a slip of the finger.
fn parse_threads(text: &str) -> Result<usize, String> {
    let threads = text
        .parse()
        .ok()
        .filter(|threads| (1..=1024).contains(threads));
    threads.ok_or_else(|| format!("expected a number of threads from 1 to 1024, found \"{text}\""))
}

/// Bytes with an optional decimal unit: `12GB`, `900MB`, `1.5 GB`, `800000000`. GB = 1e9.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let expected = || format!("expected a size such as 12GB, 900MB or 800000000, found \"{text}\"");
    let lower = text.trim().to_ascii_lowercase();
    let number = lower.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match &lower[number.len()..] {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        _ => return Err(expected()),
    };
    let bytes = number.trim().parse::<f64>().map_err(|_| expected())? * unit;
    match bytes.is_finite() && (1.0..1e18).contains(&bytes) {
        true => Ok(bytes as u64),
        false => Err(expected()),
    }
}

/// Largest `--max-body`.
const LARGEST_BODY_BYTES: u64 = 256_000_000;

fn parse_addr(text: &str) -> Result<SocketAddr, String> {
    let expected = || {
        format!(
            "expected an address and a port, such as 127.0.0.1:8080 or [::]:8080, found \"{text}\""
        )
    };
    text.parse().map_err(|_| expected())
}

/// As [`parse_bytes`], up to 256 MB.
fn parse_body_bytes(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        bytes @ ..=LARGEST_BODY_BYTES => Ok(bytes),
        _ => Err(format!("expected at most 256MB, found \"{text}\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn sizes_are_decimal_and_anything_else_is_named() {
        assert_eq!(parse_bytes("12GB"), Ok(12_000_000_000));
        assert_eq!(parse_bytes("1.5 gb"), Ok(1_500_000_000));
        assert_eq!(parse_bytes("900MB"), Ok(900_000_000));
        assert_eq!(parse_bytes("77"), Ok(77));
        for wrong in ["", "GB", "-1GB", "12XB", "nan", "inf", "0", "1e30"] {
            assert!(parse_bytes(wrong).unwrap_err().contains(wrong), "{wrong}");
        }
    }
}
