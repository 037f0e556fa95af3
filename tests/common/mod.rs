//! What the integration tests share: the golden checkpoints, and running the real program under a time
//! limit, alone or under `mpirun`.
#![allow(dead_code, reason = "each test program uses its part of this module")]

pub mod stages;

use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_mlx-pipe");

/// Longest that one run of the program may take.
pub const LIMIT: Duration = Duration::from_secs(120);

/// How often something outside this process is looked at.
pub const POLL: Duration = Duration::from_millis(10);

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// One golden checkpoint and what mlx-lm made of it.
pub struct Golden {
    pub name: String,
    pub dir: PathBuf,
    pub prompts: Vec<GoldenPrompt>,
    /// Steps of the continuation at which logits are kept.
    pub logit_steps: Vec<usize>,
}

/// One prompt and its greedy continuation.
pub struct GoldenPrompt {
    pub ids: Vec<u32>,
    pub tokens: Vec<u32>,
    /// Tokens that come out when end-of-sequence ids count.
    pub stops_after: Option<usize>,
    /// Logits at each of the kept steps.
    pub logits: Vec<Vec<f32>>,
}

impl GoldenPrompt {
    /// The tokens that a run without a limit below 24 gives.
    pub fn answer(&self) -> &[u32] {
        &self.tokens[..self.stops_after.unwrap_or(self.tokens.len())]
    }
}

/// All golden cases, by name.
pub fn golden_cases() -> Vec<Golden> {
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(root().join("tests/golden"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("golden.json").exists())
        .collect();
    dirs.sort();
    assert!(dirs.len() >= 10, "golden cases are missing: {dirs:?}");
    dirs.iter().map(|dir| golden_case(dir)).collect()
}

/// The golden case of a name.
pub fn golden(name: &str) -> Golden {
    golden_case(&root().join("tests/golden").join(name))
}

fn golden_case(dir: &Path) -> Golden {
    let text = std::fs::read_to_string(dir.join("golden.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let logit_steps = ids(&json["logit_steps"]);
    let kept = golden_logits(dir, logit_steps.len());
    let prompts = json["prompts"].as_array().unwrap();
    let prompts = prompts
        .iter()
        .zip(kept)
        .map(|(prompt, logits)| GoldenPrompt {
            ids: ids(&prompt["ids"]),
            tokens: ids(&prompt["tokens"]),
            stops_after: prompt["stops_after"].as_u64().map(|count| count as usize),
            logits,
        })
        .collect();
    Golden {
        name: dir.file_name().unwrap().to_string_lossy().into_owned(),
        dir: dir.to_owned(),
        prompts,
        logit_steps: logit_steps.into_iter().map(|step| step as usize).collect(),
    }
}

/// `[prompts][steps][vocabulary]`
fn golden_logits(dir: &Path, steps: usize) -> Vec<Vec<Vec<f32>>> {
    let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let logits = file.tensor("logits").unwrap();
    let vocab = logits.shape()[2];
    let values: Vec<f32> = logits
        .data()
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    values
        .chunks_exact(steps * vocab)
        .map(|prompt| prompt.chunks_exact(vocab).map(<[f32]>::to_vec).collect())
        .collect()
}

fn ids(value: &Value) -> Vec<u32> {
    let listed = value.as_array().unwrap();
    listed
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

/// What a run of the program printed.
#[derive(Debug)]
pub struct Ran {
    pub stdout: String,
    pub stderr: String,
    pub status: i32,
    pub took: Duration,
}

impl Ran {
    /// Open MPI 4.1's launcher forwards standard input to ranks that may have ended, and now and then reads what it has
    /// freed. Its message names the function; a crash of a rank's does not.
    fn is_crash_of_launcher(&self) -> bool {
        self.status == 128 + libc::SIGSEGV
            && self.stderr.contains("orte_iof_hnp_read_local_handler")
    }

    /// Standard output as one JSON value a line.
    pub fn json_lines(&self) -> Vec<Value> {
        let lines = self.stdout.lines();
        lines
            .map(|line| {
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
            })
            .collect()
    }

    /// The token ids of every answer.
    pub fn token_ids(&self) -> Vec<Vec<u32>> {
        let answers = self.json_lines();
        answers
            .iter()
            .map(|answer| ids(&answer["choices"][0]["token_ids"]))
            .collect()
    }

    /// Fails the test unless the run ended well.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!(
            self.status, 0,
            "stderr:\n{}\nstdout:\n{}",
            self.stderr, self.stdout
        );
        self
    }
}

/// A checkpoint of a published shape with random weights, made by `scripts/make-checkpoint` and kept for the
/// next time.
pub fn random_checkpoint(shape: &str, bits: u32, layers: usize) -> PathBuf {
    let dir =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{shape}-{bits}bit-{layers}layers"));
    // Written last, so the others are whole where it is.
    if dir.join("config.json").exists() {
        return dir;
    }
    let _ = std::fs::remove_dir_all(&dir);
    let made = Command::new("python3")
        .arg(root().join("scripts/make-checkpoint"))
        .args(["--shape", shape, "--bits", &bits.to_string()])
        .args(["--layers", &layers.to_string()])
        .arg(&dir)
        .env("PYTHONPATH", root().join(".mlx/python"))
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    dir
}

/// The program alone.
pub fn program() -> Command {
    Command::new(PROGRAM)
}

/// The program on `ranks` ranks of this machine.
pub fn mpirun(ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    command.args([
        "--oversubscribe",
        "--bind-to",
        "none",
        "-np",
        &ranks.to_string(),
    ]);
    // SAFETY: `geteuid` has no preconditions.
    if unsafe { libc::geteuid() } == 0 {
        command.arg("--allow-run-as-root");
    }
    command.arg(PROGRAM);
    command
}

/// The command computing on the CPU, where the golden tokens are those of f32.
pub fn on_cpu(mut command: Command) -> Command {
    command.args(["--device", "cpu"]);
    command
}

/// One rank in each of the directories, all with the same arguments.
pub fn one_rank_in_each(dirs: &[impl AsRef<Path>], arguments: &[&str]) -> Command {
    let one_rank: Vec<_> = mpirun(1).get_args().map(ToOwned::to_owned).collect();
    let (_, launch) = one_rank.split_last().unwrap();
    let mut command = Command::new("mpirun");
    command.args(launch);
    for (rank, dir) in dirs.iter().enumerate() {
        if rank > 0 {
            command.args([":", "-np", "1"]);
        }
        command
            .arg("-wdir")
            .arg(dir.as_ref())
            .arg(PROGRAM)
            .args(arguments);
    }
    command
}

/// Runs a command with this standard input, for [`LIMIT`] at most; again where Open MPI's launcher crashed by itself.
pub fn run(command: &mut Command, stdin: &[u8]) -> Ran {
    let ran = finish(start(command, stdin));
    match ran.is_crash_of_launcher() {
        true => {
            eprintln!("the launcher crashed, once more:\n{}", ran.stderr);
            finish(start(command, stdin))
        }
        false => ran,
    }
}

/// What a stream has brought so far, collected by a thread.
pub struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Collected {
    /// Reads the stream until it ends or `is_enough`, and closes it.
    fn reading(
        mut stream: impl Read + Send + 'static,
        is_enough: impl Fn(&[u8]) -> bool + Send + 'static,
    ) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&bytes);
        let reader = std::thread::spawn(move || {
            let mut chunk = [0; 8192];
            while let Ok(count @ 1..) = stream.read(&mut chunk) {
                let mut bytes = shared.lock().unwrap();
                bytes.extend_from_slice(&chunk[..count]);
                if is_enough(&bytes) {
                    break;
                }
            }
        });
        Self {
            bytes,
            reader: Some(reader),
        }
    }

    /// The text so far.
    pub fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }

    /// All of the text, once the stream is closed.
    fn all(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        self.so_far()
    }
}

/// A started command. If the test gives it up before [`finish`], it is killed.
pub struct Running {
    pub child: Child,
    pub stdout: Collected,
    pub stderr: Collected,
    started: Instant,
}

impl Running {
    /// Waits until it has printed what `is_there` looks for; fails the test if it ends before.
    #[track_caller]
    pub fn wait_until(&mut self, is_there: impl Fn(&Self) -> bool) {
        while !is_there(self) {
            let is_in_time = self.started.elapsed() < LIMIT;
            if !is_in_time || self.child.try_wait().unwrap().is_some() {
                panic!("this is all that came:\n{}", self.stderr.so_far());
            }
            std::thread::sleep(POLL);
        }
    }

    fn kill(&mut self) {
        // SAFETY: `killpg` has no preconditions; the group is the one that `spawn` made.
        unsafe { libc::killpg(self.child.id() as i32, libc::SIGKILL) };
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.kill();
        }
    }
}

/// Starts a command in a process group of its own, with this standard input, which then ends.
pub fn start(command: &mut Command, stdin: &[u8]) -> Running {
    let mut running = start_with_open_input(command);
    feed(&mut running, stdin);
    running
}

/// Starts a command as [`start`] does, but stops reading its output after the first lines that come, and
/// closes it.
pub fn start_and_hang_up(command: &mut Command, stdin: &[u8]) -> Running {
    let mut running = spawn(command, |output| output.contains(&b'\n'));
    feed(&mut running, stdin);
    running
}

/// Starts a command whose standard input, `child.stdin`, stays open and brings nothing yet.
pub fn start_with_open_input(command: &mut Command) -> Running {
    spawn(command, |_| false)
}

fn spawn(command: &mut Command, is_enough: impl Fn(&[u8]) -> bool + Send + 'static) -> Running {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env_remove("MLX_PIPE_MODEL")
        .process_group(0)
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    Running {
        stdout: Collected::reading(child.stdout.take().unwrap(), is_enough),
        stderr: Collected::reading(child.stderr.take().unwrap(), |_| false),
        started: Instant::now(),
        child,
    }
}

/// Gives a command the rest of its standard input.
pub fn feed(running: &mut Running, stdin: &[u8]) {
    let mut input = running.child.stdin.take().unwrap();
    let bytes = stdin.to_vec();
    std::thread::spawn(move || {
        // A program that ends early does not read on.
        let _ = input.write_all(&bytes);
    });
}

/// Waits for a started command; one that takes longer than [`LIMIT`] is killed and fails the test.
pub fn finish(mut running: Running) -> Ran {
    let status = loop {
        if let Some(status) = running.child.try_wait().unwrap() {
            break status;
        }
        if running.started.elapsed() > LIMIT {
            running.kill();
            panic!("no end after {LIMIT:?}:\n{}", running.stderr.all());
        }
        std::thread::sleep(POLL);
    };
    Ran {
        stdout: running.stdout.all(),
        stderr: running.stderr.all(),
        status: status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        took: running.started.elapsed(),
    }
}

/// A request line for token ids.
pub fn token_request(ids: &[u32], max_tokens: usize) -> String {
    serde_json::json!({"prompt": ids, "max_tokens": max_tokens}).to_string() + "\n"
}

/// Request lines for all prompts of a golden case.
pub fn golden_requests(golden: &Golden) -> String {
    golden
        .prompts
        .iter()
        .map(|prompt| token_request(&prompt.ids, prompt.tokens.len()))
        .collect()
}

/// All ways to give `layers` layers to `ranks` ranks, each at least one, as `--layers` says it.
pub fn cuts(layers: usize, ranks: usize) -> Vec<Vec<std::ops::Range<usize>>> {
    fn extend(
        from: usize,
        layers: usize,
        ranks: usize,
        head: &mut Vec<std::ops::Range<usize>>,
        all: &mut Vec<Vec<std::ops::Range<usize>>>,
    ) {
        if ranks == 1 {
            head.push(from..layers);
            all.push(head.clone());
            head.pop();
            return;
        }
        for end in from + 1..=layers - (ranks - 1) {
            head.push(from..end);
            extend(end, layers, ranks - 1, head, all);
            head.pop();
        }
    }
    let mut all = Vec::new();
    extend(0, layers, ranks, &mut Vec::new(), &mut all);
    all
}

/// Processor time that a process has used, all its threads together.
#[cfg(target_os = "linux")]
fn processor_time(pid: i32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The second field is the name in parentheses; user and system time are the 14th and 15th.
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks: u64 = fields
        .split(' ')
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap())
        .sum();
    // SAFETY: `sysconf` has no preconditions.
    let ticks_per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as u64;
    Duration::from_millis(ticks * 1000 / ticks_per_second)
}

/// Ranks without work use less than a fiftieth of a core each. A host that others slow down makes every look dearer, so
/// that one interval may be unlucky; who spins does so in all three.
#[cfg(target_os = "linux")]
pub fn assert_no_core_is_burnt(pids: &[i32]) {
    const MOST: f64 = 0.02;
    let times = || pids.iter().map(|&pid| processor_time(pid));
    let mut shares = Vec::new();
    while shares.len() < 3 && shares.last().is_none_or(|share| *share >= MOST) {
        let (before, since) = (times().collect::<Vec<_>>(), Instant::now());
        std::thread::sleep(Duration::from_secs(4));
        let used = times().zip(before).map(|(after, before)| after - before);
        let most = used.max().expect("there are ranks");
        shares.push(most.as_secs_f64() / since.elapsed().as_secs_f64());
    }
    assert!(
        shares.last().is_some_and(|share| *share < MOST),
        "the busiest rank used, of a core: {shares:?}"
    );
}
