//! Many sequences in flight in the real program on real MPI ranks: the same answers as one at a time, whatever goes
//! together; shared beginnings; answers that stream; a hundred thousand prompts; the trace.

mod common;

use common::{Golden, golden, mpirun, on_cpu, program, run, start_with_open_input, token_request};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::Path;
use std::process::Command;

fn on_ranks(ranks: usize, golden: &Golden) -> Command {
    let command = if ranks == 1 { program() } else { mpirun(ranks) };
    let mut command = on_cpu(command);
    command.arg("--model").arg(&golden.dir);
    command
}

/// What counts of each answer: everything but its name and date.
fn answers(command: &mut Command, requests: &str) -> Vec<Value> {
    let ran = run(command, requests.as_bytes()).succeeded();
    let lines = ran.json_lines();
    lines
        .iter()
        .map(|answer| json!([answer["choices"], answer["usage"]]))
        .collect()
}

fn report(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A request with any way of sampling; some begin alike.
fn request() -> impl Strategy<Value = String> {
    let sampling = prop_oneof![
        Just(json!({})),
        Just(json!({"logprobs": 3})),
        (0u64..1000).prop_map(|seed| json!({"temperature": 0.9, "seed": seed, "logprobs": 1})),
        Just(json!({"temperature": 1.2, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.3})),
    ];
    let beginning = prop_oneof![Just(0u32), Just(70), Just(130), Just(200)];
    let own = prop::collection::vec(0u32..256, 1..30);
    (beginning, own, 1usize..14, sampling).prop_map(|(beginning, own, max_tokens, sampling)| {
        let beginning = (0..beginning).map(|at| at * 7 % 250);
        let prompt: Vec<u32> = beginning.chain(own).collect();
        let mut request = sampling;
        request["prompt"] = json!(prompt);
        request["max_tokens"] = json!(max_tokens);
        request.to_string() + "\n"
    })
}

/// Ranks and options of a run.
fn setup() -> impl Strategy<Value = (usize, Vec<String>)> {
    let option = |name: &'static str, values: &'static [u32]| {
        prop::option::of(prop::sample::select(values))
            .prop_map(move |value| value.map(|value| vec![name.to_owned(), value.to_string()]))
    };
    (
        1usize..=4,
        option("--max-batch", &[1, 2, 5, 16]),
        option("--steps-in-flight", &[1, 2, 3, 7]),
        option("--max-sequences", &[2, 6]),
        option("--prefill-chunk", &[1, 7, 33, 300]),
        option("--context", &[260]),
        prop::sample::select(&["auto", "both", "once"][..]),
    )
        .prop_map(|(ranks, batch, steps, sequences, chunk, context, tied)| {
            let options = [batch, steps, sequences, chunk, context].into_iter();
            let options = options.flatten().flatten();
            let tied = ["--tied".to_owned(), tied.to_owned()];
            (ranks, options.chain(tied).collect())
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 40, ..ProptestConfig::default() })]

    #[test]
    fn what_goes_together_changes_no_bit_of_an_answer(
        requests in prop::collection::vec(request(), 1..25),
        (ranks, options) in setup(),
    ) {
        let golden = golden("qwen3-tied-8bit");
        let requests = requests.concat();
        let alone = ["--max-sequences", "1", "--steps-in-flight", "1", "--prefill-chunk", "1000"];
        let expected = answers(on_ranks(1, &golden).args(alone), &requests);
        let found = answers(on_ranks(ranks, &golden).args(&options), &requests);
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn mlx_kernels_too_give_the_same_tokens_together_and_to_prompts_that_begin_alike() {
    let golden = golden("llama-untied-4bit-two-files");
    let beginning: Vec<u32> = (0..150).map(|at| at * 7 % 250).collect();
    let with_tail = |tail: u32| token_request(&[&beginning[..], &[tail]].concat(), 6);
    let requests: String = (0..8).map(with_tail).collect();
    let tokens = |options: &[&str]| {
        let mut command = on_ranks(2, &golden);
        command.args(["--kernels", "mlx"]).args(options);
        run(&mut command, requests.as_bytes())
            .succeeded()
            .token_ids()
    };
    assert_eq!(tokens(&[]), tokens(&["--max-sequences", "1"]));
}

#[test]
fn a_beginning_that_prompts_have_in_common_is_computed_once() {
    let golden = golden("qwen3-tied-8bit");
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("report.json");
    let sent_bytes = |multiplier: u32| {
        let prompt = |number: u32| {
            let beginning = (0..640).map(|at| (at + number * multiplier) % 250);
            token_request(&beginning.chain([number]).collect::<Vec<_>>(), 2)
        };
        let requests: String = (0..10).map(prompt).collect();
        let mut command = on_ranks(2, &golden);
        // With the table on both, what the first rank sends is the rows that it computes.
        command.args(["--tied", "both", "--report"]).arg(&file);
        run(&mut command, requests.as_bytes()).succeeded();
        report(&file)["ranks"][0]["sent_bytes"].as_u64().unwrap()
    };
    let (alike, unlike) = (sent_bytes(0), sent_bytes(11));
    assert!(
        6 * alike < unlike,
        "{alike} bytes for one beginning, {unlike} for ten"
    );
}

#[test]
fn answers_stream_while_more_prompts_are_to_come() {
    let golden = golden("qwen3-tied-8bit");
    let mut running = start_with_open_input(&mut on_ranks(3, &golden));
    let mut input = running.child.stdin.take().unwrap();
    let mut count = 0;
    for batch in [1, 5, 2] {
        for _ in 0..batch {
            input
                .write_all(token_request(&[3, 1, 4], 5).as_bytes())
                .unwrap();
        }
        count += batch;
        running.wait_until(|running| running.stdout.so_far().lines().count() == count);
    }
    drop(input);
    common::finish(running).succeeded();
}

#[test]
fn a_hundred_thousand_prompts_run_to_the_end_in_the_memory_of_a_few() {
    let golden = golden("qwen3-tied-8bit");
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("report.json");
    let peaks = |count: u32| {
        // One of them takes far longer than the next hundreds, which must wait for it to be written.
        let slow = token_request(&[5, 6, 7], 400);
        let request = |number: u32| token_request(&[number % 251, number % 7], 1);
        let requests: String = std::iter::once(slow)
            .chain((1..count).map(request))
            .collect();
        let mut command = on_ranks(2, &golden);
        command
            .args(["--max-batch", "64", "--context", "512", "--report"])
            .arg(&file);
        let ran = run(&mut command, requests.as_bytes()).succeeded();
        assert_eq!(ran.stdout.lines().count(), count as usize);
        let report = report(&file);
        assert_eq!(report["answered"], count);
        let ranks = report["ranks"].as_array().unwrap().clone();
        let peak = |rank: &Value| rank["peak_rss_bytes"].as_i64().unwrap();
        ranks.iter().map(peak).collect::<Vec<i64>>()
    };
    let (few, many) = (peaks(10_000), peaks(100_000));
    for (rank, (few, many)) in few.iter().zip(&many).enumerate() {
        let more = (many - few) / 1_000_000;
        assert!(
            more < 12,
            "rank {rank} held {more} MB more for ten times the prompts"
        );
    }
}

#[test]
fn a_trace_shows_every_rank_on_one_clock_with_arrows_for_messages() {
    let golden = golden("qwen3-tied-8bit");
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("trace.json");
    let requests: String = (0..6).map(|id| token_request(&[id, 2, 3], 10)).collect();
    let mut command = on_ranks(3, &golden);
    command.arg("--trace").arg(&file);
    run(&mut command, requests.as_bytes()).succeeded();
    let trace = report(&file);
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |phase: &'static str| events.iter().filter(move |event| event["ph"] == phase);
    assert_eq!(of("M").count(), 3);

    // When each rank computed each step.
    let mut computed: HashMap<(u64, u64), (i64, i64)> = HashMap::new();
    for slice in of("X").filter(|slice| slice["cat"] == "compute") {
        let (rank, step) = (&slice["tid"], &slice["args"]["step"]);
        let start = slice["ts"].as_i64().unwrap();
        let end = start + slice["dur"].as_i64().unwrap();
        let key = (step.as_u64().unwrap(), rank.as_u64().unwrap());
        assert!(
            computed.insert(key, (start, end)).is_none(),
            "{key:?} twice"
        );
    }
    let steps: HashSet<u64> = computed.keys().map(|&(step, _)| step).collect();
    assert!(steps.len() >= 10);
    assert_eq!(computed.len(), 3 * steps.len());
    for &step in &steps {
        for rank in 0..2 {
            // On one clock a step is done here before it begins there; clocks are known to a few microseconds.
            let (here, there) = (computed[&(step, rank)].1, computed[&(step, rank + 1)].0);
            assert!(
                here < there + 200,
                "step {step}: {here} us, then {there} us"
            );
        }
    }
    let ids = |phase| {
        of(phase)
            .map(|event| event["id"].as_u64().unwrap())
            .collect::<HashSet<_>>()
    };
    assert_eq!(ids("s"), ids("f"));
    assert_eq!(ids("s").len(), 3 * steps.len());
}

#[test]
fn a_trace_that_cannot_be_written_is_told_before_the_run() {
    let golden = golden("qwen3-tied-8bit");
    let mut command = on_ranks(2, &golden);
    command.args(["--trace", "/nowhere/trace.json"]);
    let ran = run(&mut command, b"");
    assert_eq!(ran.status, 2, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("--trace /nowhere/trace.json"),
        "{}",
        ran.stderr
    );
}
