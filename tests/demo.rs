//! The demo model, a real trained one: it must know what the capital of France is, say it in every form of
//! output, and say the same on one rank and on three.

mod common;

use common::{Ran, mpirun, on_cpu, program, root, run};
use std::path::PathBuf;
use std::process::Command;

fn model() -> PathBuf {
    let dir = root().join("models/SmolLM2-135M-Instruct");
    assert!(
        dir.join("config.json").exists(),
        "run scripts/fetch-demo-model first"
    );
    dir
}

fn ask(command: Command, arguments: &[&str], input: &str) -> Ran {
    let mut command = on_cpu(command);
    command.arg("--model").arg(model()).args(arguments);
    run(&mut command, input.as_bytes()).succeeded()
}

fn digest(ran: &Ran) -> String {
    let line = ran.stderr.lines().find(|line| line.starts_with("digest "));
    line.unwrap_or_else(|| panic!("no digest:\n{}", ran.stderr))
        .to_owned()
}

const QUESTION: &str = "What is the capital of France?\n";

#[test]
fn the_capital_of_france_is_paris_on_one_rank_and_on_three() {
    let one = ask(program(), &["--max-tokens", "24"], QUESTION);
    let three = ask(mpirun(3), &["--max-tokens", "24"], QUESTION);
    assert!(one.stdout.contains("Paris"), "{}", one.stdout);
    assert_eq!(one.stdout, three.stdout);
    assert_eq!(digest(&one), digest(&three));
}

#[test]
fn each_kind_of_line_is_answered_in_its_own_form_and_in_order() {
    let input = [
        r#"{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 12}"#,
        r#"{"prompt": "The capital of France is", "max_tokens": 4, "logprobs": 2}"#,
        r#"{"custom_id": "b-1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages":
            [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 12}}"#
            .replace('\n', " ")
            .as_str(),
        "What is the capital of France?",
    ]
    .join("\n");
    let ran = ask(program(), &["--max-tokens", "12"], &input);
    let lines: Vec<&str> = ran.stdout.lines().collect();
    let chat: serde_json::Value = serde_json::from_str(lines[0]).unwrap();
    let chat_text = chat["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(chat_text.contains("Paris"), "{chat}");
    assert_eq!(chat["object"], "chat.completion");
    assert_eq!(
        chat["usage"]["completion_tokens"].as_u64(),
        Some(chat["choices"][0]["token_ids"].as_array().unwrap().len() as u64)
    );
    let completion: serde_json::Value = serde_json::from_str(lines[1]).unwrap();
    assert!(
        completion["choices"][0]["text"]
            .as_str()
            .unwrap()
            .contains("Paris"),
        "{completion}"
    );
    assert_eq!(completion["choices"][0]["finish_reason"], "length");
    let logprobs = completion["choices"][0]["logprobs"]["token_logprobs"]
        .as_array()
        .unwrap();
    assert!(logprobs.len() == 4 && logprobs.iter().all(|value| value.as_f64().unwrap() <= 0.0));
    let batch: serde_json::Value = serde_json::from_str(lines[2]).unwrap();
    assert_eq!(batch["custom_id"], "b-1");
    assert_eq!(batch["response"]["status_code"], 200);
    assert_eq!(batch["response"]["body"]["choices"], chat["choices"]);
    assert!(
        ran.stdout.ends_with('\n') && lines.last().unwrap().contains("Paris"),
        "{}",
        ran.stdout
    );
}

#[test]
fn a_stop_text_ends_the_answer_before_it() {
    let ran = ask(
        program(),
        &["--max-tokens", "24", "--stop", "Par"],
        QUESTION,
    );
    assert!(
        ran.stdout.contains("capital of France is"),
        "{}",
        ran.stdout
    );
    assert!(!ran.stdout.contains("Par"), "{}", ran.stdout);
}

#[test]
fn a_bad_line_does_not_stop_the_others() {
    let mut command = on_cpu(mpirun(2));
    command
        .arg("--model")
        .arg(model())
        .args(["--max-tokens", "12", "--format", "jsonl"]);
    let ran = run(&mut command, format!("{{broken\n{QUESTION}").as_bytes());
    assert_eq!(ran.status, 3, "{}", ran.stderr);
    let lines = ran.json_lines();
    assert_eq!(lines[0]["error"]["line"], 1);
    assert!(
        lines[1]["choices"][0]["text"]
            .as_str()
            .unwrap()
            .contains("Paris")
    );
}

#[test]
fn what_is_asked_together_is_answered_as_if_it_were_alone() {
    let questions = [
        r#"{"messages": [{"role": "user", "content": "What is the capital of France?"}], "stop": ["Par"]}"#,
        r#"{"prompt": "Once upon a time", "temperature": 0.8, "seed": 7, "max_tokens": 30, "stop": [".", "\n"]}"#,
        r#"{"prompt": "The sea is", "temperature": 1.1, "top_p": 0.9, "max_tokens": 20, "logprobs": 2}"#,
        "Name three colours.",
        "What is the capital of Italy?",
        r#"{"prompt": "1, 2, 3, 4,", "max_tokens": 12, "repetition_penalty": 1.2}"#,
    ];
    // Twice, so that the second time every beginning is known already.
    let input = [&questions[..], &questions[..]].concat().join("\n");
    let answers = |command, options: &[&str]| {
        let options = [options, &["--max-tokens", "16", "--format", "jsonl"]].concat();
        let ran = ask(command, &options, &input);
        let choices = ran.json_lines();
        let choices = choices.iter().map(|answer| answer["choices"].clone());
        (choices.collect::<Vec<_>>(), digest(&ran))
    };
    let alone = answers(program(), &["--max-sequences", "1"]);
    assert_eq!(answers(mpirun(3), &[]), alone);
    let crowded = [
        "--max-batch",
        "3",
        "--steps-in-flight",
        "5",
        "--prefill-chunk",
        "9",
    ];
    assert_eq!(answers(mpirun(2), &crowded), alone);
}
