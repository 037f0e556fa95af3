//! What a rank's process holds at its peak, by the kernel's count, on checkpoints of a true size with random
//! weights: while it loads and while it runs.

mod common;

use common::{mpirun, on_cpu, random_checkpoint, run, token_request};
use serde_json::Value;
use std::path::Path;

/// What a rank may hold beside planned weights and cache; the report's constant, which README states.
const ALLOWANCE_BYTES: u64 = mlx_pipe::report::PEAK_ALLOWANCE_BYTES;

/// Runs a short prompt on three ranks; the report.
fn report_of(model: &Path, more: &[&str]) -> Value {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("report.json");
    let mut command = on_cpu(mpirun(3));
    command.arg("--model").arg(model).arg("--report").arg(&file);
    // A cache that a test could fill would be room to hide in.
    command.args(["--context", "64"]).args(more);
    let prompt: Vec<u32> = (0..12).map(|id| id * 1001).collect();
    run(&mut command, token_request(&prompt, 2).as_bytes()).succeeded();
    serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap()
}

fn bytes(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no size"))
}

#[track_caller]
fn assert_within_plan(report: &Value) {
    for rank in report["ranks"].as_array().unwrap() {
        let planned = bytes(&rank["planned_bytes"]) + bytes(&rank["footprint"]["kv_bytes"]);
        let peak = bytes(&rank["peak_rss_bytes"]);
        assert_eq!(rank["loaded_bytes"], rank["planned_bytes"]);
        assert_eq!(
            rank["over_plan_bytes"].as_i64().unwrap(),
            peak as i64 - planned as i64
        );
        assert!(
            peak <= planned + ALLOWANCE_BYTES,
            "rank {} planned {planned} bytes and held {peak}, which is {} more; {ALLOWANCE_BYTES} are allowed",
            rank["rank"],
            peak - planned
        );
        // Or the count is not what we think it is.
        assert!(
            peak > bytes(&rank["planned_bytes"]),
            "a peak below the weights"
        );
    }
}

#[test]
fn no_rank_holds_more_than_its_plan_of_a_single_file_with_a_tied_table() {
    let model = random_checkpoint("qwen3-0.6b", 8, 28);
    let report = report_of(&model, &[]);
    let whole = bytes(&report["model_bytes"]);
    assert!(whole > 600_000_000, "only {whole} bytes");
    assert_eq!(bytes(&report["loaded_bytes"]), whole, "exactly one model");
    assert_within_plan(&report);
}

/// On a CPU, 16-bit weights are converted to 32 bits to compute with.
#[test]
fn no_rank_holds_converted_copies_of_its_weights() {
    let model = random_checkpoint("qwen3-0.6b", 16, 6);
    assert_within_plan(&report_of(&model, &["--tied", "both"]));
}

/// Written from the files at the first start, read at the second: neither may hold a slice twice.
#[test]
fn no_rank_holds_more_than_its_plan_with_a_shard_cache() {
    let model = random_checkpoint("qwen3-0.6b", 8, 28);
    let shards = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let cache = ["--shard-cache", shards.path().to_str().unwrap()];
    for _ in ["first start", "second start"] {
        assert_within_plan(&report_of(&model, &cache));
    }
}
