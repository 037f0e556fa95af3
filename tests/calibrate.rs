//! A calibration on real ranks: what it measures is kept, used by later runs and plans, and set beside what a
//! run then measures; and it changes no token.

mod common;

use common::{golden, golden_requests, mpirun, on_cpu, program, run};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// The command with a cache directory of its own.
fn with_cache(mut command: Command, cache: &Path) -> Command {
    command.env("XDG_CACHE_HOME", cache);
    command
}

fn report_of(file: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

#[test]
fn a_calibration_is_used_by_the_run_that_made_it_by_later_ones_and_by_the_plan() {
    let golden = golden("qwen3-tied-8bit");
    let scratch = tempfile::tempdir().unwrap();
    let (cache, file) = (scratch.path().join("cache"), scratch.path().join("r.json"));
    let answer = |more: &[&str]| {
        let mut command = with_cache(on_cpu(mpirun(2)), &cache);
        command.arg("--model").arg(&golden.dir).args(more);
        // What is predicted is one sequence at a time.
        command.args(["--max-sequences", "1"]);
        command.arg("--report").arg(&file);
        let ran = run(&mut command, golden_requests(&golden).as_bytes()).succeeded();
        for (prompt, tokens) in golden.prompts.iter().zip(ran.token_ids()) {
            assert_eq!(tokens, prompt.answer(), "{more:?}");
        }
        ran.stderr
    };

    let before = answer(&[]);
    assert!(before.contains("times: relative"), "{before}");
    assert_eq!(report_of(&file)["prediction"], Value::Null);

    let measured = answer(&["--calibrate"]);
    assert!(measured.contains("times: measured"), "{measured}");
    assert!(
        measured.contains("predicted, from times that were measured"),
        "{measured}"
    );

    let of_calibrating = report_of(&file)["plan"]["hash"].clone();

    let later = answer(&[]);
    assert!(later.contains("times: measured"), "{later}");
    assert_eq!(report_of(&file)["plan"]["hash"], of_calibrating);
    let prediction = &report_of(&file)["prediction"];
    assert_eq!(prediction["source"], "measured");
    for name in [
        "time_to_first_token_s",
        "decode_tokens_per_s",
        "prefill_tokens_per_s",
    ] {
        let value = prediction[name].as_f64();
        assert!(value.is_some_and(|value| value > 0.0), "{prediction}");
    }
    for name in ["time_to_first_token", "prefill", "decode"] {
        assert!(prediction["error"][name].is_f64(), "{prediction}");
    }

    let mut plan = with_cache(program(), &cache);
    plan.args(["plan", "--ranks", "2", "--model"])
        .arg(&golden.dir);
    let planned = run(&mut plan, b"").succeeded().stdout;
    assert!(planned.contains("times: measured"), "{planned}");
    assert!(planned.contains("one stream"), "{planned}");
    // Three ranks on this host were never measured.
    let mut plan = with_cache(program(), &cache);
    plan.args(["plan", "--ranks", "3", "--model"])
        .arg(&golden.dir);
    let planned = run(&mut plan, b"").succeeded().stdout;
    assert!(planned.contains("times: relative"), "{planned}");
}

#[test]
fn a_cache_that_cannot_be_written_or_is_damaged_stops_no_run() {
    let golden = golden("qwen3-tied-8bit");
    let scratch = tempfile::tempdir().unwrap();
    let cache = scratch.path().join("a-file");
    std::fs::write(&cache, "no directory").unwrap();
    let mut command = with_cache(on_cpu(program()), &cache);
    command.arg("--model").arg(&golden.dir).arg("--calibrate");
    let ran = run(&mut command, golden_requests(&golden).as_bytes()).succeeded();
    assert!(ran.stderr.contains("could not be kept"), "{}", ran.stderr);
    assert!(ran.stderr.contains("times: measured"), "{}", ran.stderr);
}

/// The figures themselves are for `scripts/bench prediction`, on a machine that does nothing else; this is
/// to notice a prediction that is not of this program.
#[test]
fn a_calibrated_plan_predicts_the_order_of_what_is_measured() {
    let model = common::random_checkpoint("qwen3-0.6b", 8, 4);
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("r.json");
    let mut errors = Vec::new();
    for _ in 0..5 {
        let mut command = with_cache(on_cpu(mpirun(2)), scratch.path());
        command.arg("--model").arg(&model).arg("--calibrate");
        command.arg("--report").arg(&file);
        let prompt: Vec<u32> = (0..16).collect();
        let request = common::token_request(&prompt, 4);
        run(&mut command, request.as_bytes()).succeeded();
        let error = &report_of(&file)["prediction"]["error"];
        let both = ["time_to_first_token", "decode"].map(|name| error[name].as_f64().unwrap());
        errors.push(both);
        if both.iter().all(|error| error.abs() < 0.5) {
            return;
        }
    }
    panic!("measured over predicted, less one, of time to first token and speed: {errors:?}");
}
