//! `mlx-pipe doctor` on real ranks.

mod common;

use common::{PROGRAM, golden, mpirun, one_rank_in_each, run};

#[test]
fn ranks_that_can_run_are_told_so() {
    let golden = golden("qwen3-untied-4bit");
    let mut command = mpirun(3);
    command.arg("doctor").arg("--model").arg(&golden.dir);
    let ran = run(&mut command, b"").succeeded();
    for expected in [
        "0 > 1",
        "1 > 2",
        "2 > 0",
        "threads",
        "nothing stands in the way",
    ] {
        assert!(
            ran.stdout.contains(expected),
            "{expected} in:\n{}",
            ran.stdout
        );
    }
}

#[test]
fn one_rank_without_mpirun_is_examined_too() {
    let golden = golden("qwen3-untied-4bit");
    let mut command = std::process::Command::new(PROGRAM);
    command.arg("doctor").arg("--model").arg(&golden.dir);
    let ran = run(&mut command, b"").succeeded();
    assert!(!ran.stdout.contains("0 > "), "{}", ran.stdout);
}

#[test]
fn a_host_without_the_model_is_named_with_a_remedy_and_the_status_says_so() {
    let golden = golden("qwen3-untied-4bit");
    let scratch = tempfile::tempdir().unwrap();
    let dirs = [scratch.path().join("has"), scratch.path().join("lacks")];
    for dir in &dirs {
        std::fs::create_dir(dir).unwrap();
    }
    std::os::unix::fs::symlink(&golden.dir, dirs[0].join("model")).unwrap();
    let ran = run(
        &mut one_rank_in_each(&dirs, &["doctor", "--model", "model"]),
        b"",
    );
    assert_eq!(ran.status, 1, "{}", ran.stderr);
    assert!(ran.stdout.contains("problem 1: rank 1"), "{}", ran.stdout);
    assert!(ran.stdout.contains("--weights-from 0"), "{}", ran.stdout);
    // The others are examined all the same.
    assert!(ran.stdout.contains("0 > 1"), "{}", ran.stdout);
}

#[test]
fn a_plan_that_does_not_fit_is_told_before_anything_is_loaded() {
    let golden = golden("qwen3-untied-4bit");
    let mut command = mpirun(2);
    command.arg("doctor").arg("--model").arg(&golden.dir);
    command.args(["--memory-limit", "1kB"]);
    let ran = run(&mut command, b"");
    assert_eq!(ran.status, 1, "{}", ran.stderr);
    assert!(
        ran.stdout.contains("the model does not fit"),
        "{}",
        ran.stdout
    );
}

#[test]
fn wrong_arguments_are_usage_errors() {
    let mut command = mpirun(2);
    command.args(["doctor", "--cluster", "no/such/file"]);
    let ran = run(&mut command, b"");
    assert_eq!(ran.status, 2, "{}", ran.stderr);
    assert!(ran.stderr.contains("no/such/file"), "{}", ran.stderr);
}
