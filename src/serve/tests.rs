//! The parts of the server without sockets; `tests/serve.rs` runs the whole.

use super::answers::{Cancelled, Piece};
use super::guard::{Denial, Guard};
use super::life::{Life, Phase};
use super::metrics::{Metrics, Outcome, Page};
use super::openai::{Choice, Shape, Writer};
use super::status::Status;
use crate::cli::{Cli, Command, ServerOptions};
use crate::pipeline::Seen;
use crate::request::{Answer, Endpoint, FinishReason, Form, TokenChoice, TokenLogprob};
use crate::wire::Load;
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, HOST, HeaderName, HeaderValue, ORIGIN};
use clap::Parser;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn options(arguments: &[&str]) -> ServerOptions {
    let all = ["mlx-pipe", "serve"].iter().chain(arguments);
    match Cli::try_parse_from(all).unwrap().command {
        Some(Command::Serve(options)) => options.server,
        other => panic!("{other:?}"),
    }
}

fn headers(fields: &[(HeaderName, &str)]) -> HeaderMap {
    let fields = fields.iter();
    fields
        .map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap()))
        .collect()
}

// Who may ask

fn guard_with_keys(text: &str) -> anyhow::Result<Guard> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys");
    std::fs::write(&path, text).unwrap();
    Guard::new(&options(&["--api-key-file", path.to_str().unwrap()]))
}

#[test]
fn only_a_whole_key_opens_and_every_key_does() {
    let guard = guard_with_keys("# comment\n\n  alpha-alpha  \r\nbeta-beta-beta").unwrap();
    let check = |value: &str| guard.check_key(&headers(&[(AUTHORIZATION, value)]));
    for right in [
        "Bearer alpha-alpha",
        "BEARER beta-beta-beta",
        "Bearer  alpha-alpha ",
    ] {
        assert_eq!(check(right), Ok(()), "{right}");
    }
    for wrong in [
        "Bearer alpha-alph",
        "Bearer alpha-alphaa",
        "Bearer # comment",
        "Bearer",
        "Bearer ",
        "Basic alpha-alpha",
        "alpha-alpha",
    ] {
        assert_eq!(check(wrong), Err(Denial::Key), "{wrong}");
    }
    assert_eq!(guard.check_key(&HeaderMap::new()), Err(Denial::Key));
    let open = Guard::new(&options(&[])).unwrap();
    assert_eq!(open.check_key(&HeaderMap::new()), Ok(()));
}

#[test]
fn key_files_without_a_good_key_are_refused_by_name_and_line() {
    let error = |text: &str| format!("{:#}", guard_with_keys(text).err().unwrap());
    assert!(error("# none\n\n").contains("there is no key in it"));
    assert!(error("long-enough-key\nshort").contains("line 2: a key of 5 bytes"));
    assert!(error("").contains("--api-key-file"));
}

#[test]
fn names_that_can_be_rebound_are_refused_and_addresses_are_not() {
    let guard = Guard::new(&options(&["--allow-host", "Box.Lan"])).unwrap();
    let check = |host: &str| guard.check_place(&headers(&[(HOST, host)]), None);
    for own in [
        "localhost",
        "localhost:8080",
        "LOCALHOST.",
        "127.0.0.1:1",
        "[::1]:8080",
        "10.1.2.3",
        "box.lan:99",
    ] {
        assert_eq!(check(own), Ok(()), "{own}");
    }
    for foreign in [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:80",
        "",
        "a b",
        "@",
    ] {
        assert_eq!(
            check(foreign),
            Err(Denial::Host(foreign.to_owned())),
            "{foreign}"
        );
    }
    // What the request line says goes before the header.
    let both = guard.check_place(&headers(&[(HOST, "localhost")]), Some("evil.example"));
    assert!(both.is_err());
    // With a key, a reverse proxy may call it what it likes.
    let keyed = guard_with_keys("long-enough-key").unwrap();
    assert_eq!(
        keyed.check_place(&headers(&[(HOST, "api.example")]), None),
        Ok(())
    );
}

#[test]
fn only_the_own_origin_and_those_allowed_may_call() {
    let guard = Guard::new(&options(&["--cors-origin", "https://friend.example:8443"])).unwrap();
    let check = |origin: &str| {
        guard.check_place(
            &headers(&[(HOST, "localhost:8080"), (ORIGIN, origin)]),
            None,
        )
    };
    for own in ["http://localhost:8080", "https://friend.example:8443"] {
        assert_eq!(check(own), Ok(()), "{own}");
    }
    for foreign in [
        "null",
        "http://localhost",
        "http://localhost:80801",
        "http://friend.example:8443",
        "https://friend.example",
        "http://evil.example",
    ] {
        assert_eq!(
            check(foreign),
            Err(Denial::Origin(foreign.to_owned())),
            "{foreign}"
        );
    }
    for wrong in ["friend.example", "http://", "http://a/b", "*"] {
        assert!(
            Guard::new(&options(&["--cors-origin", wrong])).is_err(),
            "{wrong}"
        );
    }
}

// Answers

fn shape(endpoint: Endpoint, has_tools: bool) -> Shape {
    Shape {
        endpoint,
        model: "m".into(),
        fingerprint: "fp".into(),
        id: 1,
        started_s: 0,
        created_s: 5,
        include_usage: true,
        choices_per_prompt: 1,
        has_tools,
    }
}

fn answer(words: &[&str], has_logprobs: bool, reason: FinishReason) -> Answer {
    let logprob = |(id, word): (usize, &&str)| TokenLogprob {
        sampled: TokenChoice {
            id: id as u32,
            bytes: Some(word.as_bytes().to_vec()),
            logprob: -0.5,
        },
        top: Vec::new(),
        text_offset_chars: 0,
    };
    Answer {
        index: 0,
        form: Form::Plain,
        text: words.concat(),
        token_ids: (0..words.len() as u32).collect(),
        prompt_tokens: 3,
        finish_reason: reason,
        logprobs: has_logprobs.then(|| words.iter().enumerate().map(logprob).collect()),
    }
}

/// What a client makes of the events: text, ids, number of logprobs, calls, reason.
fn put_together(events: &[String]) -> (String, Vec<Value>, usize, Vec<Value>, Value) {
    let (mut text, mut ids, mut logprobs, mut calls) = (String::new(), Vec::new(), 0, Vec::new());
    let mut reason = Value::Null;
    for event in events {
        let event: Value = serde_json::from_str(event).unwrap();
        let choice = &event["choices"][0];
        for said in [&choice["text"], &choice["delta"]["content"]] {
            text.push_str(said.as_str().unwrap_or_default());
        }
        ids.extend(choice["token_ids"].as_array().cloned().unwrap_or_default());
        for of_tokens in ["content", "tokens"] {
            logprobs += choice["logprobs"][of_tokens].as_array().map_or(0, Vec::len);
        }
        for call in choice["delta"]["tool_calls"]
            .as_array()
            .into_iter()
            .flatten()
        {
            assert_eq!(call["index"], calls.len());
            calls.push(call["function"].clone());
        }
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    (text, ids, logprobs, calls, reason)
}

proptest! {
    /// However the loop's events fall together, a client gets the whole answer.
    #[test]
    fn pieces_put_together_are_the_whole(
        words in prop::collection::vec(prop::sample::select(vec![
            "a", " ", "é", "", "<tool_call>", "{\"name\": \"f\"}", "</tool_call>", "<tool",
        ]), 1..20),
        sizes in prop::collection::vec(1usize..4, 1..8),
        told in 0usize..20,
        is_chat: bool,
        has_tools: bool,
        has_logprobs: bool,
        is_cut: bool,
    ) {
        let endpoint = if is_chat { Endpoint::Chat } else { Endpoint::Completion };
        let reason = if is_cut { FinishReason::Length } else { FinishReason::Stop };
        let has_tools = is_chat && has_tools;
        let answer = answer(&words, has_logprobs, reason);
        let writer = Writer::new(shape(endpoint, has_tools));
        let mut choice = Choice::new(has_tools);
        let mut events = Vec::new();
        let mut at = 0;
        for size in sizes {
            let end = (at + size).min(told).min(words.len());
            if at < end {
                let logprobs = answer.logprobs.as_ref().map_or(Vec::new(), |all| all[at..end].to_vec());
                let piece = Piece { text: words[at..end].concat(), token_ids: answer.token_ids[at..end].to_vec(), logprobs };
                events.extend(writer.piece(0, piece, &mut choice));
            }
            at = at.max(end);
        }
        choice.end(answer.clone());
        events.extend(writer.last(0, None, &mut choice));
        let (text, ids, logprobs, calls, told_reason) = put_together(&events);

        let mut whole = Choice::new(has_tools);
        whole.end(answer.clone());
        let whole: Value = serde_json::from_str(&writer.whole_text(&[whole])).unwrap();
        let whole = &whole["choices"][0];
        let said = if is_chat { &whole["message"]["content"] } else { &whole["text"] };
        prop_assert_eq!(text, said.as_str().unwrap_or_default());
        prop_assert_eq!(json!(ids), whole["token_ids"].clone());
        prop_assert_eq!(logprobs, if has_logprobs { words.len() } else { 0 });
        let whole_calls = whole["message"]["tool_calls"].as_array().cloned().unwrap_or_default();
        let whole_calls: Vec<Value> = whole_calls.iter().map(|call| call["function"].clone()).collect();
        prop_assert_eq!(calls, whole_calls);
        prop_assert_eq!(&told_reason, &whole["finish_reason"]);
    }
}

#[test]
fn the_count_of_tokens_counts_a_prompt_once_and_every_choice() {
    let writer = Writer::new(Shape {
        choices_per_prompt: 2,
        ..shape(Endpoint::Completion, false)
    });
    let choices: Vec<Choice> = (0..4)
        .map(|_| {
            let mut choice = Choice::new(false);
            choice.end(answer(&["a", "b"], false, FinishReason::Length));
            choice
        })
        .collect();
    let whole: Value = serde_json::from_str(&writer.whole_text(&choices)).unwrap();
    let usage = json!({"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14});
    assert_eq!(whole["usage"], usage);
    let end = writer.end(&choices);
    let last: Value = serde_json::from_str(&end[0]).unwrap();
    assert_eq!((&last["usage"], &last["choices"]), (&usage, &json!([])));
    assert_eq!(end[1], "[DONE]");
}

#[test]
fn each_cancelled_key_is_told_once() {
    let cancelled = Cancelled::default();
    assert_eq!(cancelled.pop(), None);
    cancelled.push(&[1, 2]);
    cancelled.push(&[3]);
    let mut told: Vec<u64> = std::iter::from_fn(|| cancelled.pop()).collect();
    told.sort_unstable();
    assert_eq!(told, [1, 2, 3]);
    assert_eq!(cancelled.pop(), None);
}

// Life

#[test]
fn the_first_end_counts_and_nothing_comes_after_it() {
    let life = Life::new();
    life.drain();
    assert_eq!(
        life.phase(),
        Phase::Loading,
        "what loads has nothing to drain"
    );
    life.become_ready();
    life.drain();
    life.become_ready();
    assert_eq!(life.phase(), Phase::Draining);
    life.end(Phase::Failed("a rank"));
    life.end(Phase::Ended);
    life.drain();
    assert_eq!(life.phase(), Phase::Failed("a rank"));
    let open = [life.open(), life.open()];
    assert_eq!(life.open_count(), 2);
    drop(open);
    assert_eq!(life.open_count(), 0);
}

// What it tells of itself

fn load(busy_ms: u64, wire_ms: u64) -> Load {
    Load {
        busy_us: busy_ms * 1000,
        wait_us: 0,
        wire_us: wire_ms * 1000,
        sent_bytes: busy_ms,
    }
}

fn seen(active_ms: u64, loads: [Load; 2]) -> Seen {
    Seen {
        sequences: 1,
        kv_tokens: 64,
        active: Duration::from_millis(active_ms),
        loads: loads.to_vec(),
    }
}

#[test]
fn shares_and_rates_are_those_of_the_last_seconds() {
    let status = Status::default();
    let began = Instant::now();
    let at = |ms: u64| began + Duration::from_millis(ms);
    assert_eq!(status.now(at(0)).ranks, []);
    status.watch_at(seen(0, [load(0, 0), load(0, 0)]), at(0));
    for _ in 0..100 {
        status.token();
    }
    status.run(1, 300);
    status.watch_at(seen(1000, [load(500, 100), load(250, 0)]), at(2000));
    let now = status.now(at(2000));
    let shares = |rank: usize| {
        let rank = &now.ranks[rank];
        [rank.busy, rank.wire, rank.wait].map(|share| (share * 1000.0).round())
    };
    assert_eq!(shares(0), [250.0, 50.0, 200.0]);
    assert_eq!(shares(1), [125.0, 0.0, 375.0]);
    assert_eq!(
        (now.tokens_per_second, now.prompt_tokens_per_second),
        (50.0, 150.0)
    );
    assert_eq!(now.idle_share, 1.0 - 0.75 / 2.0);
    assert_eq!(now.kv_used_tokens, 64);
    // After a while without work nothing is left of it but the sums.
    status.rest();
    let later = status.now(at(60_000));
    assert_eq!(
        (
            later.tokens_per_second,
            later.idle_share,
            later.kv_used_tokens
        ),
        (0.0, 0.0, 0)
    );
    assert_eq!((later.ranks[0].busy, later.ranks[0].sent_bytes), (0.0, 500));
    // Work after a pause counts by the window, not by the pause.
    status.watch_at(seen(2000, [load(1500, 100), load(250, 0)]), at(61_000));
    assert_eq!(status.now(at(61_000)).ranks[0].busy, 0.25);
}

#[test]
fn what_was_seen_is_forgotten_after_the_window() {
    let status = Status::default();
    let began = Instant::now();
    for step in 0..10_000 {
        let at = began + Duration::from_millis(500 * step);
        status.watch_at(seen(step, [load(step, 0), load(step, 0)]), at);
    }
    assert!(status.moments() < 12, "{}", status.moments());
}

#[test]
fn metrics_are_lines_that_prometheus_reads() {
    let metrics = Metrics::default();
    metrics.outcome(Outcome::Answered);
    metrics.outcome(Outcome::Full);
    metrics.outcome(Outcome::Full);
    for ms in [1, 20, 21, 400_000] {
        metrics.first_token(Duration::from_millis(ms), 10);
    }
    metrics.next_token(Duration::from_millis(3));
    let mut page = Page::default();
    metrics.write(&mut page);
    let text = page.text();
    for line in [
        "mlx_pipe_requests_total{outcome=\"answered\"} 1",
        "mlx_pipe_requests_total{outcome=\"full\"} 2",
        "mlx_pipe_requests_total{outcome=\"failed\"} 0",
        "mlx_pipe_prompt_tokens_total 40",
        "mlx_pipe_first_token_seconds_bucket{le=\"0.02\"} 2",
        "mlx_pipe_first_token_seconds_bucket{le=\"0.05\"} 3",
        "mlx_pipe_first_token_seconds_bucket{le=\"300\"} 3",
        "mlx_pipe_first_token_seconds_bucket{le=\"+Inf\"} 4",
        "mlx_pipe_first_token_seconds_count 4",
        "mlx_pipe_first_token_seconds_sum 400.042",
        "mlx_pipe_token_seconds_count 1",
        "# TYPE mlx_pipe_token_seconds histogram",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (_, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
}
