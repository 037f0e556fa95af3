//! The CPU kernels as a user meets them: whose kernels, how many threads, which instruction set.

mod common;

use common::{Ran, golden, golden_requests, on_cpu, run};
use std::path::PathBuf;
use std::process::Command;

/// A model whose weights have every width, and its requests.
fn model() -> (PathBuf, String) {
    let golden = golden("qwen3-every-width");
    (golden.dir.clone(), golden_requests(&golden))
}

/// Logprobs are of the logits' bits, so that equal tokens are not enough.
fn with_logprobs(requests: &str) -> String {
    requests.replace("{\"prompt\"", "{\"logprobs\":3,\"prompt\"")
}

fn answers(mut command: Command, arguments: &[&str]) -> String {
    let (dir, requests) = model();
    let requests = with_logprobs(&requests);
    assert!(requests.contains("logprobs"));
    command.arg("--model").arg(dir).args(arguments);
    let ran: Ran = run(&mut command, requests.as_bytes()).succeeded();
    // Answers bear the second in which they were made.
    let without_time = |line: &str| {
        let mut answer: serde_json::Value = serde_json::from_str(line).unwrap();
        answer["created"] = 0.into();
        answer["id"] = 0.into();
        answer.to_string()
    };
    let answers: Vec<String> = ran.stdout.lines().map(without_time).collect();
    assert!(!answers.is_empty());
    answers.join("\n")
}

#[test]
fn threads_chunks_ranks_and_instruction_sets_change_no_bit_of_an_answer() {
    let expected = answers(on_cpu(common::program()), &["--threads", "1"]);
    assert!(expected.contains("logprobs"));
    for arguments in [
        &["--threads", "3"][..],
        &["--threads", "2", "--prefill-chunk", "1"],
        &["--prefill-chunk", "7"],
        &["--kernels", "own"],
    ] {
        let found = answers(on_cpu(common::program()), arguments);
        assert_eq!(found, expected, "{arguments:?}");
    }
    let mut plain = on_cpu(common::program());
    plain.env("MLX_PIPE_ISA", "scalar");
    assert_eq!(answers(plain, &[]), expected, "without vector instructions");
    let found = answers(on_cpu(common::mpirun(3)), &["--threads", "2"]);
    assert_eq!(found, expected, "three ranks");
}

#[test]
fn the_log_says_which_instruction_set_is_used() {
    let (dir, requests) = model();
    let mut command = on_cpu(common::program());
    command
        .env("MLX_PIPE_ISA", "scalar")
        .arg("--model")
        .arg(dir)
        .arg("-v");
    let ran = run(&mut command, requests.as_bytes()).succeeded();
    assert!(
        ran.stderr.contains("CPU kernels isa=\"scalar\""),
        "{}",
        ran.stderr
    );
}

#[test]
fn an_instruction_set_that_is_not_there_is_bad_usage_and_tells_those_that_are() {
    let (dir, requests) = model();
    let mut command = on_cpu(common::program());
    command.env("MLX_PIPE_ISA", "mmx").arg("--model").arg(dir);
    let ran = run(&mut command, requests.as_bytes());
    assert_eq!(ran.status, 2, "{}", ran.stderr);
    assert!(
        ran.stderr
            .contains("MLX_PIPE_ISA=mmx: this processor has scalar"),
        "{}",
        ran.stderr
    );
}

#[test]
fn no_threads_and_unknown_kernels_are_bad_usage() {
    for arguments in [
        ["--threads", "0"],
        ["--threads", "many"],
        ["--kernels", "best"],
    ] {
        let mut command = on_cpu(common::program());
        command.args(arguments);
        let ran = run(&mut command, b"");
        assert_eq!(ran.status, 2, "{arguments:?}: {}", ran.stderr);
    }
}
