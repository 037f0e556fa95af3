//! The real program on real MPI ranks: the same tokens and the same digest for any number of ranks and
//! any split, and an orderly end whatever happens to a rank.

mod common;

use common::{LIMIT, Ran, cuts, golden, golden_cases, golden_requests, mpirun, program, run};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Within this time of a failure every rank must be gone (the promise is 10 s).
const GONE_WITHIN: Duration = Duration::from_secs(10);

fn report_of(ran: &Ran, file: &std::path::Path) -> Value {
    let text = std::fs::read_to_string(file)
        .unwrap_or_else(|error| panic!("no report ({error}); stderr:\n{}", ran.stderr));
    serde_json::from_str(&text).unwrap()
}

#[test]
fn tokens_and_digest_are_those_of_mlx_lm_on_one_to_four_ranks() {
    let scratch = tempfile::tempdir().unwrap();
    for golden in golden_cases() {
        let requests = golden_requests(&golden);
        let mut digests = Vec::new();
        for ranks in 1..=4 {
            let report = scratch.path().join(format!("{}-{ranks}.json", golden.name));
            let mut command = if ranks == 1 { program() } else { mpirun(ranks) };
            command
                .arg("--model")
                .arg(&golden.dir)
                .arg("--report")
                .arg(&report);
            let ran = run(&mut command, requests.as_bytes()).succeeded();
            for (prompt, tokens) in golden.prompts.iter().zip(ran.token_ids()) {
                assert_eq!(tokens, prompt.answer(), "{} on {ranks} ranks", golden.name);
            }
            digests.push(report_of(&ran, &report)["digest"].clone());
        }
        assert!(
            digests.iter().all(|digest| *digest == digests[0]),
            "{}: {digests:?}",
            golden.name
        );
    }
}

#[test]
fn uneven_splits_by_hand_give_the_same_tokens() {
    let golden = golden("qwen3-tied-8bit");
    let requests = golden_requests(&golden);
    let uneven = cuts(6, 3)
        .into_iter()
        .filter(|cut| cut.iter().any(|range| range.len() == 4));
    for cut in uneven.chain([vec![0..1, 1..6], vec![0..5, 5..6]]) {
        let layers: Vec<String> = cut
            .iter()
            .map(|range| format!("{}-{}", range.start, range.end - 1))
            .collect();
        let mut command = mpirun(cut.len());
        command
            .arg("--model")
            .arg(&golden.dir)
            .args(["--layers", &layers.join(",")]);
        let ran = run(&mut command, requests.as_bytes()).succeeded();
        for (prompt, tokens) in golden.prompts.iter().zip(ran.token_ids()) {
            assert_eq!(tokens, prompt.answer(), "{layers:?}");
        }
    }
}

#[test]
fn every_strategy_and_chunk_gives_the_same_tokens() {
    let golden = golden("llama-untied-4bit-two-files");
    let requests = golden_requests(&golden);
    for arguments in [
        ["--strategy", "uniform"],
        ["--strategy", "memory-proportional"],
        ["--strategy", "compute-proportional"],
        ["--strategy", "auto"],
        ["--prefill-chunk", "1"],
        ["--prefill-chunk", "7"],
    ] {
        let mut command = mpirun(3);
        command.arg("--model").arg(&golden.dir).args(arguments);
        let ran = run(&mut command, requests.as_bytes()).succeeded();
        for (prompt, tokens) in golden.prompts.iter().zip(ran.token_ids()) {
            assert_eq!(tokens, prompt.answer(), "{arguments:?}");
        }
    }
}

#[test]
fn sampling_with_a_seed_does_not_depend_on_ranks_or_on_place_in_the_input() {
    let golden = golden("qwen2-tied-8bit");
    let line = |seed: u64| {
        serde_json::json!({"prompt": golden.prompts[2].ids, "max_tokens": 20, "seed": seed,
            "temperature": 1.5, "top_p": 0.95, "top_k": 100, "repetition_penalty": 1.2})
        .to_string()
            + "\n"
    };
    let answers = |ranks: usize, input: String| {
        let mut command = mpirun(ranks);
        command.arg("--model").arg(&golden.dir);
        run(&mut command, input.as_bytes()).succeeded().token_ids()
    };
    let one = answers(1, line(7) + &line(8));
    let three = answers(3, line(8) + &line(7));
    assert_eq!(one[0], three[1]);
    assert_eq!(one[1], three[0]);
    assert_ne!(one[0], one[1], "different seeds should differ");
}

#[test]
fn every_rank_loads_exactly_its_part_and_says_so() {
    let golden = golden("qwen3-untied-4bit");
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("report.json");
    let mut command = mpirun(3);
    command
        .arg("--model")
        .arg(&golden.dir)
        .arg("--report")
        .arg(&file);
    let ran = run(&mut command, golden_requests(&golden).as_bytes()).succeeded();
    let report = report_of(&ran, &file);
    let ranks = report["ranks"].as_array().unwrap();
    assert_eq!(ranks.len(), 3);
    let mut next = 0;
    let mut loaded = 0;
    for rank in ranks {
        assert_eq!(rank["planned_bytes"], rank["loaded_bytes"]);
        assert_eq!(rank["layers"][0], next);
        next = rank["layers"][1].as_u64().unwrap() + 1;
        loaded += rank["loaded_bytes"].as_u64().unwrap();
        assert!(rank["busy_s"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(next, 5, "every layer on a rank");
    // The head has its own weight here, so three ranks hold exactly one model.
    assert_eq!(report["model_bytes"].as_u64(), Some(loaded));
    assert_eq!(report["memory_saved_bytes"].as_u64(), Some(2 * loaded));
    assert_eq!(ranks[0]["owns"], serde_json::json!(["embedding"]));
    assert_eq!(ranks[1]["owns"], serde_json::json!([]));
    assert_eq!(ranks[2]["owns"], serde_json::json!(["norm", "head"]));
}

/// Processes of the program whose command line holds `mark`.
fn processes(mark: &str) -> Vec<i32> {
    let listed = std::process::Command::new("pgrep")
        .args(["-f", mark])
        .output()
        .unwrap();
    let own = std::process::id() as i32;
    String::from_utf8_lossy(&listed.stdout)
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|&pid| pid != own && is_rank(pid))
        .collect()
}

/// Whether a process runs the program itself (and is not its launcher).
fn is_rank(pid: i32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe"))
        .map(|exe| exe == std::path::Path::new(common::PROGRAM))
        // No /proc: macOS. There the launcher counts too, and must be gone as well.
        .unwrap_or(!std::path::Path::new("/proc/self").exists())
}

/// A run of three ranks that would go on for very long, with its marked input file and its processes.
struct LongRun {
    running: common::Running,
    mark: String,
}

impl LongRun {
    /// Starts the run and waits until its first answers are out, so that all ranks are at work.
    fn start(mark: &str) -> Self {
        let golden = golden("qwen3-tied-8bit");
        let mark = format!("mark-{mark}-{}", std::process::id());
        let scratch = std::env::temp_dir().join(&mark);
        let mut command = mpirun(3);
        command
            .arg("--model")
            .arg(&golden.dir)
            .arg("--report")
            .arg(&scratch)
            .arg("-vv");
        let requests = golden_requests(&golden).repeat(20_000);
        let running = common::start(&mut command, requests.as_bytes());
        let run = Self { running, mark };
        let started = Instant::now();
        while processes(&run.mark).len() < 3 || !run.is_working() {
            assert!(started.elapsed() < LIMIT, "the ranks did not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        run
    }

    /// Whether the ranks have used some processor time: loading alone takes next to none.
    fn is_working(&self) -> bool {
        processes(&self.mark).iter().all(|pid| {
            let listed = std::process::Command::new("ps")
                .args(["-o", "time=", "-p", &pid.to_string()])
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&listed.stdout);
            text.trim()
                .bytes()
                .any(|byte| (b'1'..=b'9').contains(&byte))
        })
    }

    /// Waits for the end and checks that it was quick, whole and not a success.
    fn must_end(self) -> Ran {
        let since = Instant::now();
        let ran = common::finish(self.running);
        assert!(since.elapsed() < GONE_WITHIN, "took {:?}", since.elapsed());
        assert_ne!(ran.status, 0);
        while !processes(&self.mark).is_empty() {
            assert!(
                since.elapsed() < GONE_WITHIN,
                "left over: {:?}",
                processes(&self.mark)
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        ran
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: `kill` has no preconditions.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

#[test]
fn a_rank_killed_while_generating_takes_all_others_with_it() {
    for (victim, name) in ["first", "middle", "last"].into_iter().enumerate() {
        let run = LongRun::start(&format!("kill-{name}"));
        let mut ranks = processes(&run.mark);
        ranks.sort_unstable();
        kill(ranks[victim], libc::SIGKILL);
        let ran = run.must_end();
        assert!(ran.stderr.contains("signal 9"), "{}", ran.stderr);
    }
}

#[test]
fn a_terminated_rank_says_so_and_ends_the_job() {
    let run = LongRun::start("term");
    kill(processes(&run.mark)[1], libc::SIGTERM);
    let ran = run.must_end();
    assert!(ran.stderr.contains("ended by signal 15"), "{}", ran.stderr);
}

#[test]
fn interrupting_the_launcher_leaves_no_orphans() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let run = LongRun::start(&format!("interrupt-{signal}"));
        kill(run.running.child.id() as i32, signal);
        run.must_end();
    }
}

/// A copy of a golden checkpoint whose layer 5 lies in a second file; returns that file.
fn split_off_last_layer(golden: &common::Golden, dir: &std::path::Path) -> std::path::PathBuf {
    for entry in std::fs::read_dir(&golden.dir).unwrap() {
        let path = entry.unwrap().path();
        if path
            .file_name()
            .unwrap()
            .to_string_lossy()
            .ends_with("config.json")
        {
            std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
        }
    }
    let bytes = std::fs::read(golden.dir.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (last, rest): (Vec<_>, Vec<_>) = file
        .tensors()
        .into_iter()
        .partition(|(name, _)| name.starts_with("model.layers.5."));
    let mut weight_map = serde_json::Map::new();
    for (name, tensors) in [("rest.safetensors", rest), ("last.safetensors", last)] {
        for (tensor, _) in &tensors {
            weight_map.insert(tensor.clone(), name.into());
        }
        safetensors::serialize_to_file(tensors, None, &dir.join(name)).unwrap();
    }
    let index = serde_json::json!({ "weight_map": weight_map }).to_string();
    std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    dir.join("last.safetensors")
}

#[test]
fn a_rank_that_fails_while_loading_is_named_and_ends_the_job() {
    let golden = golden("qwen3-tied-8bit");
    let scratch = tempfile::tempdir().unwrap();
    let last = split_off_last_layer(&golden, scratch.path());
    let command = || {
        let mut command = mpirun(3);
        command
            .arg("--model")
            .arg(scratch.path())
            .args(["--layers", "0-1,2-4,5-5"]);
        command
    };
    let requests = golden_requests(&golden);
    run(&mut command(), requests.as_bytes()).succeeded();

    // A file that keeps changing after its header was read; only rank 2 has tensors in it.
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let toucher = std::thread::spawn({
        let (done, file) = (done.clone(), std::fs::File::open(&last).unwrap());
        move || {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                file.set_modified(std::time::SystemTime::now()).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let ran = run(&mut command(), requests.as_bytes());
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    toucher.join().unwrap();
    assert_eq!(ran.status, 1, "{}", ran.stderr);
    assert!(ran.took < GONE_WITHIN, "took {:?}", ran.took);
    assert!(
        ran.stderr.contains("mlx-pipe: rank 2 on "),
        "{}",
        ran.stderr
    );
    assert!(ran.stderr.contains("loading layers 5-5"), "{}", ran.stderr);
    assert!(ran.stderr.contains("last.safetensors"), "{}", ran.stderr);
    assert_eq!(
        ran.stderr.matches("mlx-pipe: rank").count(),
        1,
        "{}",
        ran.stderr
    );
}
