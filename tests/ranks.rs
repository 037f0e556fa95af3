//! The real program on real MPI ranks: the same tokens and the same digest for any number of ranks and
//! any split, and an orderly end whatever happens to a rank.

mod common;

use common::{
    PROGRAM, Ran, Running, cuts, golden, golden_cases, golden_requests, run, token_request,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Within this time of a failure every rank must be gone (the promise is 10 s).
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// The program alone.
fn program() -> Command {
    common::on_cpu(common::program())
}

/// The program on `ranks` ranks of this machine.
fn mpirun(ranks: usize) -> Command {
    common::on_cpu(common::mpirun(ranks))
}

fn report_of(ran: &Ran, file: &Path) -> Value {
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
fn a_tied_table_held_once_gives_the_same_tokens_and_exactly_one_model() {
    let scratch = tempfile::tempdir().unwrap();
    for name in [
        "qwen3-tied-8bit",
        "llama-tied-bf16-llama3-rope",
        "qwen2-tied-8bit",
    ] {
        let golden = golden(name);
        for (ranks, tied) in [(2, "once"), (3, "once"), (4, "once"), (3, "both")] {
            let file = scratch.path().join(format!("{name}-{ranks}-{tied}.json"));
            let mut command = mpirun(ranks);
            command
                .arg("--model")
                .arg(&golden.dir)
                .args(["--device", "cpu", "--tied", tied]);
            command
                .arg("--report")
                .arg(&file)
                .args(["--prefill-chunk", "16"]);
            let ran = run(&mut command, golden_requests(&golden).as_bytes()).succeeded();
            for (prompt, tokens) in golden.prompts.iter().zip(ran.token_ids()) {
                assert_eq!(tokens, prompt.answer(), "{name} on {ranks} ranks, {tied}");
            }
            let report = report_of(&ran, &file);
            let (loaded, model) = (&report["loaded_bytes"], &report["model_bytes"]);
            assert_eq!(
                loaded == model,
                tied == "once",
                "{name}: {loaded} of {model}"
            );
        }
    }
}

#[test]
fn a_model_in_the_hugging_face_cache_is_found_by_its_id() {
    let golden = golden("qwen3-untied-4bit");
    let home = tempfile::tempdir().unwrap();
    // The cache's form: a reference names a snapshot, whose files are links to blobs.
    let repo = home.path().join("hub/models--someone--tiny");
    let snapshot = repo.join("snapshots/abc");
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::write(repo.join("refs/main"), "abc").unwrap();
    for entry in std::fs::read_dir(&golden.dir).unwrap() {
        let file = entry.unwrap();
        std::os::unix::fs::symlink(file.path(), snapshot.join(file.file_name())).unwrap();
    }
    let mut command = mpirun(2);
    command.args(["--model", "someone/tiny", "--device", "cpu"]);
    command
        .env("HF_HOME", home.path())
        .env("HF_HUB_OFFLINE", "1");
    let ran = run(&mut command, golden_requests(&golden).as_bytes()).succeeded();
    for (prompt, tokens) in golden.prompts.iter().zip(ran.token_ids()) {
        assert_eq!(tokens, prompt.answer());
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
fn unequal_hosts_get_what_fits_and_give_the_same_tokens() {
    let golden = golden("llama-untied-4bit-two-files");
    let scratch = tempfile::tempdir().unwrap();
    let (report, cluster) = (scratch.path().join("r.json"), scratch.path().join("c.json"));
    let host = gethostname::gethostname().to_string_lossy().into_owned();
    let run_with = |devices: &[(f64, u32)]| {
        let devices: Vec<Value> = devices
            .iter()
            .map(|(limit_gb, gpu_cores)| {
                serde_json::json!({"hostname": host, "capabilities": {"memory_gb": 16,
                    "max_recommended_model_size_gb": limit_gb, "gpu_cores": gpu_cores}})
            })
            .collect();
        let file = serde_json::json!({ "devices": devices });
        std::fs::write(&cluster, file.to_string()).unwrap();
        let mut command = mpirun(devices.len());
        command.arg("--model").arg(&golden.dir);
        command.arg("--report").arg(&report);
        command.arg("--cluster").arg(&cluster);
        let ran = run(&mut command, golden_requests(&golden).as_bytes()).succeeded();
        for (prompt, tokens) in golden.prompts.iter().zip(ran.token_ids()) {
            assert_eq!(tokens, prompt.answer(), "{devices:?}");
        }
        let ranks = report_of(&ran, &report)["ranks"].clone();
        let sizes = ranks.as_array().unwrap().iter().map(|rank| {
            let layers = &rank["layers"];
            let count = layers[1].as_u64().unwrap() - layers[0].as_u64().unwrap() + 1;
            let kv_bytes = rank["footprint"]["kv_bytes"].as_u64().unwrap();
            (count, rank["planned_bytes"].as_u64().unwrap() + kv_bytes)
        });
        sizes.collect::<Vec<_>>()
    };
    let roomy = run_with(&[(1.0, 10), (1.0, 10), (1.0, 10)]);
    // The middle one has room for one layer only; the last is three times as fast as the first.
    let one_layer_bytes = roomy[1].1 / roomy[1].0;
    let tight_gb = (one_layer_bytes + one_layer_bytes / 2) as f64 / 1e9;
    let tight = run_with(&[(1.0, 10), (tight_gb, 10), (1.0, 30)]);
    assert_eq!(tight[1].0, 1, "{tight:?}");
    assert!(tight[1].1 as f64 <= tight_gb * 1e9, "{tight:?}");
    let layers = |sizes: &[(u64, u64)]| sizes.iter().map(|(count, _)| count).sum::<u64>();
    assert_eq!(layers(&roomy), layers(&tight));
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

/// Processes of the program whose command line holds `mark`, in the order of their start.
fn processes(mark: &str) -> Vec<i32> {
    let mut found = match Path::new("/proc/self/exe").exists() {
        true => processes_of_linux(mark),
        false => processes_by_ps(mark),
    };
    found.sort_unstable();
    found
}

fn processes_of_linux(mark: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap();
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    numbers
        .filter(|pid| {
            let place = PathBuf::from(format!("/proc/{pid}"));
            // A process may end while it is looked at.
            let command = std::fs::read(place.join("cmdline")).unwrap_or_default();
            std::fs::read_link(place.join("exe")).is_ok_and(|exe| exe == Path::new(PROGRAM))
                && String::from_utf8_lossy(&command).contains(mark)
        })
        .collect()
}

fn processes_by_ps(mark: &str) -> Vec<i32> {
    let listed = Command::new("ps")
        .args(["-axww", "-o", "pid=,command="])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&listed.stdout);
    let lines = text
        .lines()
        .filter_map(|line| line.trim_start().split_once(' '));
    lines
        .filter(|(_, command)| command.trim_start().starts_with(PROGRAM) && command.contains(mark))
        .map(|(pid, _)| pid.parse().unwrap())
        .collect()
}

/// A run that would go on for very long, with the mark in the command lines of its ranks.
struct LongRun {
    running: Running,
    mark: String,
}

impl LongRun {
    /// Starts a command with a mark among its arguments.
    fn start(
        name: &str,
        mut command: Command,
        start: impl FnOnce(&mut Command) -> Running,
    ) -> Self {
        let mark = format!("mark-{name}-{}", std::process::id());
        command
            .arg("--report")
            .arg(std::env::temp_dir().join(&mark));
        let running = start(&mut command);
        Self { running, mark }
    }

    /// Three ranks with 120 000 prompts, at work: an answer is out.
    fn generating(name: &str) -> Self {
        let (command, requests) = endless();
        let mut run = Self::start(name, command, |command| {
            common::start(command, requests.as_bytes())
        });
        run.running
            .wait_until(|running| running.stdout.so_far().contains('\n'));
        run
    }

    /// `command` in the middle of a step that takes minutes: the whole of a long prompt at once.
    fn in_a_long_step(name: &str, mut command: Command) -> Self {
        let model = common::root().join("models/SmolLM2-135M-Instruct");
        assert!(
            model.join("config.json").exists(),
            "run scripts/fetch-demo-model first"
        );
        command
            .arg("--model")
            .arg(model)
            .args(["--prefill-chunk", "65536", "-vv"]);
        let ids: Vec<u32> = (1000..4000).collect();
        let request = token_request(&ids, 8);
        let mut run = Self::start(name, command, |command| {
            common::start(command, request.as_bytes())
        });
        run.running
            .wait_until(|running| running.stderr.so_far().contains("rows=3000"));
        // From the line to the computation is no way to speak of, but a little one.
        std::thread::sleep(Duration::from_millis(500));
        run
    }

    /// The ranks, in the order of their numbers: a launcher starts them one after another.
    fn ranks(&self) -> Vec<i32> {
        processes(&self.mark)
    }

    /// Waits for the end and checks that it was quick and whole.
    fn must_be_gone(self) -> Ran {
        let since = Instant::now();
        let ran = common::finish(self.running);
        assert!(since.elapsed() < GONE_WITHIN, "took {:?}", since.elapsed());
        while let left @ [_, ..] = &processes(&self.mark)[..] {
            assert!(since.elapsed() < GONE_WITHIN, "left over: {left:?}");
            std::thread::sleep(common::POLL);
        }
        // The mark is the name of a report, which a run that ends well has written.
        let _ = std::fs::remove_file(std::env::temp_dir().join(&self.mark));
        ran
    }

    /// As [`Self::must_be_gone`], and the run must not count as a success.
    fn must_fail(self) -> Ran {
        let ran = self.must_be_gone();
        assert_ne!(ran.status, 0);
        ran
    }
}

/// Three ranks, and prompts for hours.
fn endless() -> (Command, String) {
    let golden = golden("qwen3-tied-8bit");
    let mut command = mpirun(3);
    command.arg("--model").arg(&golden.dir);
    (command, golden_requests(&golden).repeat(20_000))
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: `kill` has no preconditions.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

#[test]
fn a_rank_killed_while_generating_takes_all_others_with_it() {
    for (victim, name) in ["first", "middle", "last"].into_iter().enumerate() {
        let run = LongRun::generating(&format!("kill-{name}"));
        kill(run.ranks()[victim], libc::SIGKILL);
        let ran = run.must_fail();
        assert!(ran.stderr.contains("signal 9"), "{}", ran.stderr);
    }
}

#[test]
fn a_terminated_rank_says_so_and_ends_the_job() {
    let run = LongRun::generating("term");
    kill(run.ranks()[1], libc::SIGTERM);
    let ran = run.must_fail();
    assert!(ran.stderr.contains("ended by signal 15"), "{}", ran.stderr);
}

#[test]
fn interrupting_the_launcher_leaves_no_orphans() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let run = LongRun::generating(&format!("interrupt-{signal}"));
        kill(run.running.child.id() as i32, signal);
        run.must_fail();
    }
}

#[test]
fn a_rank_terminated_in_the_middle_of_a_long_step_ends_the_job() {
    // Rank 0 computes, rank 2 waits for it.
    for victim in [0, 2] {
        let run = LongRun::in_a_long_step(&format!("step-{victim}"), mpirun(3));
        kill(run.ranks()[victim], libc::SIGTERM);
        let ran = run.must_fail();
        assert!(ran.stderr.contains("ended by signal 15"), "{}", ran.stderr);
    }
}

#[test]
fn a_single_rank_terminated_in_the_middle_of_a_long_step_ends() {
    let run = LongRun::in_a_long_step("step-alone", program());
    kill(run.running.child.id() as i32, libc::SIGTERM);
    let ran = run.must_fail();
    assert_eq!(ran.status, 128 + libc::SIGTERM, "{}", ran.stderr);
    assert!(ran.stderr.contains("ended by signal 15"), "{}", ran.stderr);
}

#[test]
fn nothing_goes_on_when_nobody_reads_the_answers_any_more() {
    let (command, requests) = endless();
    let mut run = LongRun::start("hang-up", command, |command| {
        common::start_and_hang_up(command, requests.as_bytes())
    });
    run.running
        .wait_until(|running| running.stdout.so_far().contains('\n'));
    let ran = run.must_be_gone();
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
}

#[test]
fn log_lines_of_every_rank_say_where_they_come_from_and_keep_off_the_output() {
    let golden = golden("qwen3-tied-8bit");
    let mut command = mpirun(3);
    command.arg("--model").arg(&golden.dir).arg("-v");
    let ran = run(&mut command, golden_requests(&golden).as_bytes()).succeeded();
    assert_eq!(ran.json_lines().len(), golden.prompts.len());
    let host = gethostname::gethostname();
    let places = [0, 1, 2].map(|rank| format!(" rank {rank} {}: ", host.display()));
    let logged: Vec<&str> = ran
        .stderr
        .lines()
        .filter(|line| line.contains(" INFO "))
        .collect();
    for line in &logged {
        let is_placed = places.iter().any(|place| line.contains(place));
        assert!(is_placed, "{line}");
    }
    for place in &places {
        let is_there = |line: &&str| line.contains(place) && line.contains("loaded layers");
        assert_eq!(
            logged.iter().copied().filter(is_there).count(),
            1,
            "{place}:\n{}",
            ran.stderr
        );
    }
}

#[cfg(target_os = "linux")]
#[test]
fn waiting_for_a_prompt_burns_no_core() {
    let golden = golden("qwen3-tied-8bit");
    let mut command = mpirun(3);
    command.arg("--model").arg(&golden.dir).arg("-v");
    let mut run = LongRun::start("idle", command, common::start_with_open_input);
    run.running
        .wait_until(|running| running.stderr.so_far().matches("loaded layers").count() == 3);
    let ranks = run.ranks();
    assert_eq!(ranks.len(), 3);
    // What was loaded a moment ago still looks often.
    std::thread::sleep(Duration::from_secs(1));
    common::assert_no_core_is_burnt(&ranks);
    common::feed(&mut run.running, golden_requests(&golden).as_bytes());
    let ran = run.must_be_gone().succeeded();
    assert_eq!(ran.json_lines().len(), golden.prompts.len());
}

/// A golden checkpoint in a new directory.
fn copy_checkpoint(golden: &common::Golden, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    for entry in std::fs::read_dir(&golden.dir).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn ranks_with_different_configurations_hear_that_even_if_one_of_them_cannot_do_what_is_asked() {
    let golden = golden("qwen3-tied-8bit");
    let scratch = tempfile::tempdir().unwrap();
    let hosts = ["a", "b"].map(|host| scratch.path().join(host));
    for host in &hosts {
        copy_checkpoint(&golden, &host.join("m"));
    }
    let arguments = ["--device", "cpu", "--model", "m", "--context", "800"];
    let requests = golden_requests(&golden);
    run(
        &mut common::one_rank_in_each(&hosts, &arguments),
        requests.as_bytes(),
    )
    .succeeded();

    let config = hosts[1].join("m/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let shorter = text.replace(
        "\"max_position_embeddings\": 1024",
        "\"max_position_embeddings\": 512",
    );
    assert_ne!(text, shorter);
    std::fs::write(&config, shorter).unwrap();
    let ran = run(
        &mut common::one_rank_in_each(&hosts, &arguments),
        requests.as_bytes(),
    );
    assert_eq!(ran.status, 1, "{}", ran.stderr);
    assert!(ran.took < GONE_WITHIN, "took {:?}", ran.took);
    let told = ran.stderr.matches("do not have the same config.json");
    assert_eq!(told.count(), 1, "{}", ran.stderr);
    assert!(!ran.stderr.contains("--context"), "{}", ran.stderr);
}

/// A copy of a golden checkpoint whose layer 5 lies in a second file; returns that file.
fn split_off_last_layer(golden: &common::Golden, dir: &Path) -> PathBuf {
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
