use std::io::{self, BufRead, BufReader, Read, Write};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn defaults() -> Sampling {
    Sampling {
        max_tokens: 64,
        temperature: 0.5,
        top_p: 0.9,
        top_k: 7,
        min_p: 0.1,
        repetition_penalty: 1.1,
        presence_penalty: 0.25,
        frequency_penalty: -0.25,
        logit_bias: Vec::new(),
        seed: Some(3),
        stop: vec!["END".to_owned()],
        logprobs: None,
    }
}

fn read(input: &[u8]) -> Vec<Result<Request, LineError>> {
    let only_lines = |read| match read {
        Ok(request) => Ok(request),
        Err(ReadError::Line(error)) => Err(error),
        Err(ReadError::Io { cause, .. }) => panic!("memory cannot fail: {cause}"),
    };
    RequestReader::new(input, defaults())
        .map(only_lines)
        .collect()
}

fn read_one(line: &str) -> Result<Request, LineError> {
    let mut requests = read(line.as_bytes());
    assert_eq!(requests.len(), 1, "{line}");
    requests.remove(0)
}

/// The rejection of a line that must have one.
fn rejection(line: &str) -> Rejection {
    match read_one(line) {
        Ok(request) => panic!("{line} was read as {request:?}"),
        Err(error) => error.rejection,
    }
}

/// A completion body with one more field.
fn with_field(field: &str) -> String {
    format!(r#"{{"prompt": "a", {field}}}"#)
}

// Lines

#[test]
fn a_plain_line_is_a_prompt_with_the_default_sampling() {
    let request = read_one("  Why is the sky blue? \r\n").unwrap();
    assert_eq!(
        request.prompt,
        Prompt::Plain("  Why is the sky blue? ".to_owned())
    );
    assert_eq!((request.form, request.sampling), (Form::Plain, defaults()));
}

#[test]
fn blank_lines_count_as_lines_and_not_as_requests() {
    let requests = read("\n  \t\r\nfirst\n\u{3000}\n{broken\nlast".as_bytes());
    let places = requests.iter().map(|request| match request {
        Ok(request) => (request.index, request.line, true),
        Err(error) => (error.index, error.line, false),
    });
    assert_eq!(
        places.collect::<Vec<_>>(),
        [(0, 3, true), (1, 5, false), (2, 6, true)]
    );
}

#[test]
fn an_empty_input_has_no_requests() {
    assert!(read(b"").is_empty());
    assert!(read(b"\n\n").is_empty());
    assert!(read(b"\xEF\xBB\xBF").is_empty());
}

#[test]
fn a_byte_order_mark_is_not_part_of_the_prompt() {
    assert_eq!(
        read_one("\u{FEFF}hello").unwrap().prompt,
        Prompt::Plain("hello".to_owned())
    );
    assert_eq!(
        read_one("\u{FEFF} {\"prompt\": \"x\"}").unwrap().prompt,
        Prompt::Text("x".to_owned())
    );
}

#[test]
fn a_line_that_is_not_utf8_fails_alone_and_says_where() {
    let requests = read(b"good\nb\xFFd\nalso good");
    let error = requests[1].as_ref().unwrap_err();
    assert_eq!(
        (error.line, error.rejection.code, &error.form),
        (2, RejectionCode::NotUtf8, &Form::Plain)
    );
    assert_eq!(
        error.to_string(),
        "line 2: not valid UTF-8 at byte 2 (0xFF); convert the input to UTF-8"
    );
    assert!(requests[0].is_ok() && requests[2].is_ok());
}

#[test]
fn a_batch_line_that_is_not_utf8_keeps_its_custom_id() {
    let requests = read(b"{\"custom_id\": \"a-1\", \"body\": {\"messages\": \"\xFF\"}}");
    let expected = Form::Batch {
        custom_id: "a-1".to_owned(),
        endpoint: Endpoint::Chat,
    };
    assert_eq!(requests[0].as_ref().unwrap_err().form, expected);
}

#[test]
fn malformed_json_is_located_by_its_column() {
    let error = read_one(r#"  {"prompt": "a",, "n": 1}"#).unwrap_err();
    assert_eq!(error.rejection.code, RejectionCode::InvalidJson);
    assert_eq!(
        error.to_string(),
        "line 1: not valid JSON at column 18: key must be a string"
    );
    assert_eq!(
        rejection("{\"prompt\": NaN}").code,
        RejectionCode::InvalidJson
    );
    assert_eq!(
        rejection("{\"prompt\": \"a\"} more").code,
        RejectionCode::InvalidJson
    );
    assert_eq!(rejection("{").code, RejectionCode::InvalidJson);
    assert_eq!(
        rejection(&"{\"a\":".repeat(1000)).code,
        RejectionCode::InvalidJson
    );
}

#[test]
fn a_line_that_is_too_long_is_skipped_and_the_next_is_read() {
    let long = LINE_BYTES_MAX + 1;
    let input = io::repeat(b'x').take(long as u64).chain(&b"\nshort\n"[..]);
    let mut reader = RequestReader::new(BufReader::new(input), defaults());
    match reader.next() {
        Some(Err(ReadError::Line(error))) => {
            assert_eq!(error.rejection.code, RejectionCode::LineTooLong)
        }
        other => panic!("{other:?}"),
    }
    let next = reader.next().unwrap().unwrap();
    assert_eq!(
        (next.index, next.line, next.prompt),
        (1, 2, Prompt::Plain("short".to_owned()))
    );
}

#[test]
fn a_line_of_just_the_longest_length_is_read() {
    let input = io::repeat(b'x')
        .take(LINE_BYTES_MAX as u64)
        .chain(&b"\r\n"[..]);
    let request = RequestReader::new(BufReader::new(input), defaults())
        .next()
        .unwrap()
        .unwrap();
    assert_eq!(request.prompt, Prompt::Plain("x".repeat(LINE_BYTES_MAX)));
}

/// Gives one line, then fails; counts how far it was read.
struct FailingInput(BufReader<&'static [u8]>);

impl Read for FailingInput {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl BufRead for FailingInput {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        match self.0.fill_buf()? {
            [] => Err(io::Error::other("the disk is gone")),
            bytes => Ok(bytes),
        }
    }

    fn consume(&mut self, bytes: usize) {
        self.0.consume(bytes);
    }
}

#[test]
fn requests_come_before_the_input_has_ended_and_a_failing_input_ends_them() {
    let mut reader = RequestReader::new(FailingInput(BufReader::new(b"first\nsecond")), defaults());
    assert!(matches!(reader.next(), Some(Ok(_))));
    let error = reader.next().unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        "reading line 2 of the input failed: the disk is gone"
    );
    assert!(reader.next().is_none());
}

// Bodies

#[test]
fn every_known_field_is_read() {
    let line = r#"{"model": "m", "prompt": "a", "max_tokens": 5, "temperature": 0, "top_p": 1, "top_k": 40, "min_p": 0,
        "repetition_penalty": 1.25, "seed": 18446744073709551615, "stop": ["x", "y"], "logprobs": 2, "n": 1, "user": "u",
        "presence_penalty": -2, "frequency_penalty": 1.5, "logit_bias": {"9": -100, "5": 1.25}}"#;
    let request = read_one(&line.replace('\n', " ")).unwrap();
    let expected = Sampling {
        max_tokens: 5,
        temperature: 0.0,
        top_p: 1.0,
        top_k: 40,
        min_p: 0.0,
        repetition_penalty: 1.25,
        presence_penalty: -2.0,
        frequency_penalty: 1.5,
        logit_bias: vec![(5, 1.25), (9, -100.0)],
        seed: Some(u64::MAX),
        stop: vec!["x".to_owned(), "y".to_owned()],
        logprobs: Some(2),
    };
    assert_eq!(
        (request.form, request.sampling),
        (Form::Json(Endpoint::Completion), expected)
    );
}

#[test]
fn absent_and_null_fields_take_the_defaults() {
    let nulls = r#"{"prompt": "a", "max_tokens": null, "temperature": null, "stop": null, "seed": null, "n": null}"#;
    assert_eq!(read_one(nulls).unwrap().sampling, defaults());
    assert_eq!(read_one(r#"{"prompt": "a"}"#).unwrap().sampling, defaults());
}

#[test]
fn a_seed_may_be_negative_and_top_k_minus_one_is_off() {
    let sampling = read_one(&with_field(r#""seed": -1, "top_k": -1, "stop": "x""#))
        .unwrap()
        .sampling;
    assert_eq!(
        (sampling.seed, sampling.top_k, sampling.stop),
        (Some(u64::MAX), 0, vec!["x".to_owned()])
    );
}

#[test]
fn token_ids_are_a_prompt() {
    assert_eq!(
        read_one(r#"{"prompt": [1, 0, 4294967295]}"#)
            .unwrap()
            .prompt,
        Prompt::Tokens(vec![1, 0, u32::MAX])
    );
    assert_eq!(
        read_one(r#"{"prompt": [[5, 6]]}"#).unwrap().prompt,
        Prompt::Tokens(vec![5, 6])
    );
    assert_eq!(
        read_one(r#"{"prompt": ["only"]}"#).unwrap().prompt,
        Prompt::Text("only".to_owned())
    );
}

#[test]
fn a_prompt_of_the_wrong_shape_is_refused() {
    for (prompt, field) in [
        ("5", "prompt"),
        ("{}", "prompt"),
        ("[]", "prompt"),
        ("[[]]", "prompt[0]"),
        (r#"["a", 5]"#, "prompt[1]"),
        ("[[1], [-1]]", "prompt[1][0]"),
        (r#"["a", "b"]"#, "prompt"),
        ("[[1], [2]]", "prompt"),
        ("[1, -1]", "prompt[1]"),
        ("[1, 2.5]", "prompt[1]"),
        ("[1, 4294967296]", "prompt[1]"),
        (r#"[1, "a"]"#, "prompt[1]"),
        ("[true]", "prompt[0]"),
    ] {
        let rejection = rejection(&format!(r#"{{"prompt": {prompt}}}"#));
        assert_eq!(rejection.field.as_deref(), Some(field), "{prompt}");
        assert!(rejection.message.contains(field), "{}", rejection.message);
    }
}

#[test]
fn a_value_outside_its_range_is_refused_by_the_name_of_its_field() {
    for (field, value, code) in [
        ("max_tokens", "0", RejectionCode::InvalidValue),
        ("max_tokens", "-1", RejectionCode::InvalidValue),
        (
            "max_tokens",
            "18446744073709551615",
            RejectionCode::InvalidValue,
        ),
        ("max_tokens", "1.5", RejectionCode::InvalidType),
        ("max_tokens", "\"5\"", RejectionCode::InvalidType),
        ("max_completion_tokens", "0", RejectionCode::InvalidValue),
        ("temperature", "-0.1", RejectionCode::InvalidValue),
        ("temperature", "2.1", RejectionCode::InvalidValue),
        ("temperature", "1e300", RejectionCode::InvalidValue),
        ("temperature", "\"hot\"", RejectionCode::InvalidType),
        ("top_p", "0", RejectionCode::InvalidValue),
        ("top_p", "1e-60", RejectionCode::InvalidValue),
        ("top_p", "1.01", RejectionCode::InvalidValue),
        ("top_k", "-2", RejectionCode::InvalidValue),
        ("top_k", "4294967296", RejectionCode::InvalidValue),
        ("top_k", "2.5", RejectionCode::InvalidType),
        ("min_p", "-0.1", RejectionCode::InvalidValue),
        ("min_p", "1.1", RejectionCode::InvalidValue),
        ("repetition_penalty", "0", RejectionCode::InvalidValue),
        ("repetition_penalty", "-1", RejectionCode::InvalidValue),
        ("repetition_penalty", "1e39", RejectionCode::InvalidValue),
        ("presence_penalty", "2.1", RejectionCode::InvalidValue),
        ("presence_penalty", "\"much\"", RejectionCode::InvalidType),
        ("frequency_penalty", "-2.1", RejectionCode::InvalidValue),
        ("logit_bias", "[1]", RejectionCode::InvalidType),
        ("logit_bias", "{\"5\": 100.1}", RejectionCode::InvalidValue),
        ("n", "0", RejectionCode::InvalidValue),
        ("n", "129", RejectionCode::InvalidValue),
        ("n", "1.5", RejectionCode::InvalidType),
        ("stream_options", "true", RejectionCode::InvalidType),
        ("seed", "1.5", RejectionCode::InvalidType),
        ("seed", "18446744073709551616", RejectionCode::InvalidType),
        ("stop", "\"\"", RejectionCode::InvalidValue),
        ("stop", "[\"a\", \"\"]", RejectionCode::InvalidValue),
        ("stop", "5", RejectionCode::InvalidType),
        ("logprobs", "21", RejectionCode::InvalidValue),
        ("logprobs", "-1", RejectionCode::InvalidValue),
        ("logprobs", "true", RejectionCode::InvalidType),
        ("stream", "1", RejectionCode::InvalidType),
    ] {
        let rejection = rejection(&with_field(&format!("\"{field}\": {value}")));
        assert_eq!(
            (rejection.field.as_deref(), rejection.code),
            (Some(field), code),
            "{field}: {value}"
        );
        assert!(
            rejection.message.contains(&format!("`{field}`")),
            "{}",
            rejection.message
        );
    }
}

#[test]
fn an_error_says_what_was_expected_and_found() {
    let message = |field: &str| rejection(&with_field(field)).message;
    assert_eq!(
        message(r#""temperature": -1"#),
        "`temperature` must be between 0 and 2, found -1"
    );
    assert_eq!(
        message(r#""top_p": [1]"#),
        "`top_p` must be a number, found an array of 1"
    );
    assert_eq!(
        message(r#""stop": ["a", 5]"#),
        "`stop[1]` must be a string, found 5"
    );
    assert_eq!(
        message(r#""n": 2"#),
        "`n` must be 1 in a line, found 2; repeat the line, or use `mlx-pipe serve`"
    );
    assert_eq!(
        message(r#""temprature": 1"#),
        "`temprature` is not a known field; correct its name or leave it out"
    );
    assert!(message(&format!("\"seed\": \"{}\"", "é".repeat(5000))).len() < 200);
    assert!(message(&format!("\"{}\": 1", "é".repeat(5000))).len() < 200);
}

#[test]
fn a_field_that_stands_twice_is_named_wherever_it_is() {
    for (line, field) in [
        (r#"{"prompt": "a", "seed": 1, "seed": 1}"#, "seed"),
        (r#"{"prompt": "a", "prompt": "b"}"#, "prompt"),
        (
            r#"{"prompt": "a", "logit_bias": {"5": 1, "5": 2}}"#,
            "logit_bias.5",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "user", "role": "system", "content": "b"}]}"#,
            "messages[1].role",
        ),
        (
            r#"{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "user": 1, "user": 1}}"#,
            "body.user",
        ),
    ] {
        let rejection = rejection(line);
        assert_eq!(
            (rejection.field.as_deref(), rejection.code),
            (Some(field), RejectionCode::InvalidValue),
            "{line}"
        );
        assert!(rejection.message.contains("twice"), "{}", rejection.message);
    }
    let error = read_one(r#"{"custom_id": "x", "custom_id": "y", "body": {"messages": []}}"#);
    assert!(matches!(error.unwrap_err().form, Form::Batch { .. }));
}

#[test]
fn the_limit_of_answers_is_that_of_prompts_and_answers_to_each() {
    let body = |prompts: usize, n: usize| {
        let body = json!({"prompt": vec!["a"; prompts], "n": n}).to_string();
        Body::parse(body.as_bytes(), None, &defaults())
    };
    assert_eq!(body(64, 2).unwrap().choices, 2);
    assert_eq!(
        body(128, 2).unwrap_err().message,
        "128 prompts with `n` answers each may be at most 128 answers together, found `n` 2"
    );
}

#[test]
fn sixteen_stop_texts_are_allowed_and_seventeen_are_not() {
    let stops = |count: usize| with_field(&format!("\"stop\": {}", json!(vec!["x"; count])));
    assert_eq!(
        read_one(&stops(STOP_COUNT_MAX))
            .unwrap()
            .sampling
            .stop
            .len(),
        STOP_COUNT_MAX
    );
    assert_eq!(
        rejection(&stops(STOP_COUNT_MAX + 1)).field.as_deref(),
        Some("stop")
    );
}

#[test]
fn a_stop_text_may_be_a_thousand_bytes_and_no_more() {
    let stop = |bytes: usize| with_field(&format!("\"stop\": [\"a\", \"{}\"]", "x".repeat(bytes)));
    assert!(read_one(&stop(STOP_BYTES_MAX)).is_ok());
    let rejection = rejection(&stop(STOP_BYTES_MAX + 1));
    assert_eq!(
        rejection.message,
        "`stop` must be texts of at most 1024 bytes, found one of 1025"
    );
}

#[test]
fn both_names_of_max_tokens_must_agree() {
    let line = |old, new| {
        with_field(&format!(
            r#""max_tokens": {old}, "max_completion_tokens": {new}"#
        ))
    };
    assert_eq!(read_one(&line(9, 9)).unwrap().sampling.max_tokens, 9);
    assert_eq!(
        rejection(&line(9, 8)).field.as_deref(),
        Some("max_completion_tokens")
    );
}

#[test]
fn a_field_that_would_change_the_answer_is_refused_unless_it_changes_nothing() {
    for (field, refused, allowed) in [
        ("n", "2", "1"),
        ("best_of", "3", "1"),
        ("tools", "[{}]", "[]"),
        ("tool_choice", "\"required\"", "\"auto\""),
        ("functions", "[{}]", "[]"),
        ("function_call", "{}", "\"none\""),
        ("echo", "true", "false"),
        ("suffix", "\"x\"", "\"\""),
        (
            "response_format",
            r#"{"type": "json_object"}"#,
            r#"{"type": "text"}"#,
        ),
        ("modalities", "[\"audio\"]", "[\"text\"]"),
        ("audio", "{}", "null"),
        ("reasoning_effort", "\"low\"", "null"),
        ("verbosity", "\"low\"", "\"medium\""),
        ("web_search_options", "{}", "null"),
        ("ignore_eos", "true", "false"),
        ("min_tokens", "3", "0"),
        ("stop_token_ids", "[3]", "[]"),
    ] {
        let rejection = rejection(&with_field(&format!("\"{field}\": {refused}")));
        assert_eq!(rejection.code, RejectionCode::UnsupportedField, "{field}");
        assert_eq!(rejection.field.as_deref(), Some(field));
        assert!(
            read_one(&with_field(&format!("\"{field}\": {allowed}"))).is_ok(),
            "{field}: {allowed}"
        );
    }
}

#[test]
fn fields_that_cannot_change_the_answer_are_ignored() {
    let harmless = r#""model": 5, "user": "u", "metadata": {}, "store": true, "service_tier": "auto", "stream": true"#;
    assert!(read_one(&with_field(harmless)).is_ok());
}

#[test]
fn a_body_must_ask_for_one_thing() {
    assert_eq!(rejection("{}").code, RejectionCode::MissingField);
    assert_eq!(
        rejection(r#"{"prompt": null}"#).code,
        RejectionCode::MissingField
    );
    assert_eq!(
        rejection(r#"{"prompt": "a", "messages": []}"#)
            .field
            .as_deref(),
        Some("messages")
    );
}

#[test]
fn a_body_alone_can_be_parsed_for_an_endpoint() {
    let body = Body::parse(
        br#"{"prompt": "a", "stream": true}"#,
        Some(Endpoint::Completion),
        &defaults(),
    )
    .unwrap();
    assert!(body.stream);
    let parse = |bytes, endpoint| Body::parse(bytes, Some(endpoint), &defaults()).unwrap_err();
    let wrong = parse(br#"{"prompt": "a"}"#, Endpoint::Chat);
    assert_eq!(
        wrong.message,
        "a body for /v1/chat/completions has `messages`, found `prompt`"
    );
    assert_eq!(
        parse(b"{}", Endpoint::Chat).field.as_deref(),
        Some("messages")
    );
    assert_eq!(
        parse(b"[1]", Endpoint::Chat).code,
        RejectionCode::InvalidType
    );
    assert_eq!(
        parse(b"\xFF", Endpoint::Chat).code,
        RejectionCode::InvalidJson
    );
    let third_line = parse(b"{\n\n  x", Endpoint::Chat).message;
    assert_eq!(
        third_line,
        "not valid JSON at line 3 of the body, column 3: key must be a string"
    );
}

// Messages

/// The chat of a body with these messages.
fn chat(messages: Value) -> Result<Chat, Rejection> {
    let bytes = json!({"messages": messages}).to_string();
    match Body::parse(bytes.as_bytes(), None, &defaults())?
        .prompts
        .remove(0)
    {
        Prompt::Chat(chat) => Ok(chat),
        other => panic!("{other:?}"),
    }
}

#[test]
fn messages_keep_their_order_roles_and_further_fields() {
    let chat = chat(json!([
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "c"}], "refusal": null},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
    ]));
    let expected = json!([
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": ""},
        {"role": "user", "content": "ab", "name": "Ann"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "c"}]},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
    ]);
    assert_eq!(
        serde_json::to_value(chat.unwrap().messages).unwrap(),
        expected
    );
}

#[test]
fn a_message_of_the_wrong_shape_is_refused_by_its_place() {
    for (messages, field) in [
        (json!([]), "messages"),
        (json!("hi"), "messages"),
        (json!(["hi"]), "messages[0]"),
        (json!([{"content": "x"}]), "messages[0].role"),
        (
            json!([{"role": "robot", "content": "x"}]),
            "messages[0].role",
        ),
        (json!([{"role": 5, "content": "x"}]), "messages[0].role"),
        (json!([{"role": "user"}]), "messages[0].content"),
        (
            json!([{"role": "user", "content": null}]),
            "messages[0].content",
        ),
        (
            json!([{"role": "assistant", "tool_calls": []}]),
            "messages[0].content",
        ),
        (
            json!([{"role": "user", "content": "x"}, {"role": "user", "content": 5}]),
            "messages[1].content",
        ),
        (
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages[0].content[0]",
        ),
        (
            json!([{"role": "user", "content": ["x"]}]),
            "messages[0].content[0]",
        ),
        (
            json!([{"role": "user", "content": [{"text": "x"}]}]),
            "messages[0].content[0]",
        ),
        (
            json!([{"role": "user", "content": [{"type": "text"}]}]),
            "messages[0].content[0].text",
        ),
    ] {
        let rejection = chat(messages.clone()).unwrap_err();
        assert_eq!(rejection.field.as_deref(), Some(field), "{messages}");
        assert!(rejection.message.contains(field), "{}", rejection.message);
    }
    let image = chat(json!([{"role": "user", "content": [{"type": "image_url"}]}])).unwrap_err();
    assert_eq!(
        image.message,
        "`messages[0].content[0]` must be a part of type \"text\", found type \"image_url\""
    );
}

#[test]
fn template_arguments_are_passed_on_but_cannot_replace_the_messages() {
    let line = |arguments: Value| {
        json!({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": arguments})
            .to_string()
    };
    match read_one(&line(json!({"enable_thinking": false})))
        .unwrap()
        .prompt
    {
        Prompt::Chat(chat) => assert_eq!(chat.template_arguments["enable_thinking"], false),
        other => panic!("{other:?}"),
    }
    let refused = rejection(&line(json!({"messages": []})));
    assert_eq!(
        refused.field.as_deref(),
        Some("chat_template_kwargs.messages")
    );
    assert_eq!(rejection(&line(json!(5))).code, RejectionCode::InvalidType);
}

#[test]
fn chat_asks_for_logprobs_with_two_fields() {
    let logprobs = |fields: &str| {
        let line = format!(r#"{{"messages": [{{"role": "user", "content": "x"}}], {fields}}}"#);
        read_one(&line).map(|request| request.sampling.logprobs)
    };
    assert_eq!(logprobs(r#""logprobs": true"#).unwrap(), Some(0));
    assert_eq!(
        logprobs(r#""logprobs": true, "top_logprobs": 20"#).unwrap(),
        Some(20)
    );
    assert_eq!(logprobs(r#""logprobs": false"#).unwrap(), None);
    for refused in [
        r#""top_logprobs": 3"#,
        r#""logprobs": false, "top_logprobs": 3"#,
        r#""logprobs": true, "top_logprobs": 21"#,
    ] {
        assert_eq!(
            logprobs(refused).unwrap_err().rejection.field.as_deref(),
            Some("top_logprobs"),
            "{refused}"
        );
    }
    assert_eq!(
        logprobs(r#""logprobs": 5"#)
            .unwrap_err()
            .rejection
            .field
            .as_deref(),
        Some("logprobs")
    );
}

// Batch lines

fn batch_line(url: &str, method: &str, body: Value) -> String {
    json!({"custom_id": "id-7", "method": method, "url": url, "body": body}).to_string()
}

#[test]
fn a_batch_line_is_its_body_with_a_custom_id() {
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2});
    let request = read_one(&batch_line("/v1/chat/completions", "POST", body)).unwrap();
    assert_eq!(
        request.form,
        Form::Batch {
            custom_id: "id-7".to_owned(),
            endpoint: Endpoint::Chat
        }
    );
    assert_eq!(
        (request.prompt, request.sampling.max_tokens),
        (Prompt::Chat(Chat::from_user("x")), 2)
    );
}

#[test]
fn a_batch_line_that_contradicts_itself_is_refused_with_its_custom_id() {
    let body = json!({"prompt": "x"});
    for (line, field) in [
        (batch_line("/v1/embeddings", "POST", body.clone()), "url"),
        (
            batch_line("/v1/chat/completions", "POST", body.clone()),
            "prompt",
        ),
        (batch_line("/v1/completions", "GET", body.clone()), "method"),
        (batch_line("/v1/completions", "POST", json!("x")), "body"),
        (
            batch_line("/v1/completions", "POST", json!({"prompt": "x", "n": 3})),
            "n",
        ),
        (
            json!({"custom_id": "id-7", "url": "/v1/completions", "body": body}).to_string(),
            "method",
        ),
        (
            json!({"custom_id": "id-7", "method": "POST", "url": "/v1/completions"}).to_string(),
            "body",
        ),
        (
            json!({"custom_id": "id-7", "method": "POST", "body": body}).to_string(),
            "url",
        ),
    ] {
        let error = read_one(&line).unwrap_err();
        assert_eq!(error.rejection.field.as_deref(), Some(field), "{line}");
        assert!(
            matches!(error.form, Form::Batch { ref custom_id, .. } if custom_id == "id-7"),
            "{line}"
        );
    }
}

#[test]
fn a_batch_line_without_a_custom_id_is_refused() {
    let line =
        json!({"method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}).to_string();
    let error = read_one(&line).unwrap_err();
    assert_eq!(
        (error.rejection.field.as_deref(), error.form),
        (Some("custom_id"), Form::Json(Endpoint::Completion))
    );
    assert_eq!(
        rejection(r#"{"custom_id": 5, "body": {}}"#).code,
        RejectionCode::InvalidType
    );
}

// Output

fn identity() -> Identity {
    Identity {
        model: "tiny".to_owned(),
        created_s: 1_700_000_000,
    }
}

fn answer(index: usize, form: Form, text: &str) -> Answer {
    let token_ids = vec![index as u32, 2];
    let finish_reason = FinishReason::Stop;
    Answer {
        index,
        form,
        text: text.to_owned(),
        token_ids,
        prompt_tokens: 3,
        finish_reason,
        logprobs: None,
    }
}

fn line_error(index: usize, form: Form) -> LineError {
    let rejection = Rejection::of_field(RejectionCode::InvalidValue, "n", "bad\nthing");
    LineError {
        index,
        line: index + 1,
        form,
        rejection,
    }
}

fn writer(format: Format) -> AnswerWriter<Vec<u8>> {
    AnswerWriter::new(Vec::new(), format, identity())
}

/// What is written when `feed` had its turn.
fn written(format: Format, feed: impl FnOnce(&mut AnswerWriter<&mut Vec<u8>>)) -> String {
    let mut output = Vec::new();
    let mut writer = AnswerWriter::new(&mut output, format, identity());
    feed(&mut writer);
    writer.finish().unwrap();
    String::from_utf8(output).unwrap()
}

#[test]
fn plain_answers_are_separated_and_the_separator_has_a_line_of_its_own() {
    let output = written(Format::Auto, |writer| {
        for (index, text) in ["one", "two\n", "", "four\nlines"].into_iter().enumerate() {
            writer.answer(answer(index, Form::Plain, text)).unwrap();
        }
    });
    assert_eq!(output, "one\n---\ntwo\n---\n\n---\nfour\nlines\n");
}

#[test]
fn a_separator_stands_wherever_plain_text_begins_or_ends() {
    let json = || Form::Json(Endpoint::Completion);
    let output = written(Format::Auto, |writer| {
        writer.fail(line_error(0, json())).unwrap();
        writer.fail(line_error(1, json())).unwrap();
        writer.fail(line_error(2, Form::Plain)).unwrap();
        writer.fail(line_error(3, json())).unwrap();
    });
    let is_separator: Vec<bool> = output.lines().map(|line| line == "---").collect();
    assert_eq!(is_separator, [false, false, true, false, true, false]);
}

#[test]
fn an_error_stands_in_the_place_of_its_answer() {
    let batch = Form::Batch {
        custom_id: "c".to_owned(),
        endpoint: Endpoint::Chat,
    };
    assert_eq!(
        written(Format::Auto, |writer| writer
            .fail(line_error(0, Form::Plain))
            .unwrap()),
        "error: line 1: bad thing\n"
    );
    let error = json!({"message": "bad\nthing", "type": "invalid_request_error", "param": "n", "code": "invalid_value",
                       "line": 1});
    let line = written(Format::Auto, |writer| {
        writer
            .fail(line_error(0, Form::Json(Endpoint::Chat)))
            .unwrap()
    });
    assert_eq!(
        serde_json::from_str::<Value>(&line).unwrap(),
        json!({"error": error})
    );
    let line = written(Format::Auto, |writer| {
        writer.fail(line_error(0, batch)).unwrap()
    });
    let expected = json!({"id": "batch_req_0", "custom_id": "c",
                          "response": {"status_code": 400, "body": {"error": error}}, "error": error});
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), expected);
}

#[test]
fn a_completion_is_written_in_the_shape_of_the_api() {
    let line = written(Format::Auto, |writer| {
        writer
            .answer(answer(0, Form::Json(Endpoint::Completion), "hi\n"))
            .unwrap();
    });
    assert_eq!(
        line,
        "{\"id\":\"cmpl-0\",\"object\":\"text_completion\",\"created\":1700000000,\"model\":\"tiny\",\"choices\":[{\"index\":0,\
         \"text\":\"hi\\n\",\"logprobs\":null,\"finish_reason\":\"stop\",\"token_ids\":[0,2]}],\
         \"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\"total_tokens\":5}}\n"
    );
}

#[test]
fn a_chat_answer_in_a_batch_is_written_in_the_shape_of_the_batch_output() {
    let form = Form::Batch {
        custom_id: "c".to_owned(),
        endpoint: Endpoint::Chat,
    };
    let mut answer = answer(0, form, "hi");
    answer.finish_reason = FinishReason::Length;
    let line = written(Format::Auto, |writer| writer.answer(answer).unwrap());
    let body = json!({
        "id": "chatcmpl-0", "object": "chat.completion", "created": 1_700_000_000, "model": "tiny",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "logprobs": null,
                     "finish_reason": "length", "token_ids": [0, 2]}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    });
    let expected = json!({"id": "batch_req_0", "custom_id": "c", "response": {"status_code": 200, "body": body}, "error": null});
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), expected);
}

fn choice(id: u32, bytes: Option<&[u8]>, logprob: f32) -> TokenChoice {
    TokenChoice {
        id,
        bytes: bytes.map(<[u8]>::to_vec),
        logprob,
    }
}

/// Two tokens: one that is half a character, one without a tokenizer.
fn logprobs() -> Vec<TokenLogprob> {
    let half = choice(1, Some(b"\xC3"), -0.1);
    let likely = choice(2, Some(b" a"), -0.05);
    vec![
        TokenLogprob {
            sampled: half.clone(),
            top: vec![likely, half],
            text_offset_chars: 0,
        },
        TokenLogprob {
            sampled: choice(9, None, f32::NEG_INFINITY),
            top: vec![choice(3, Some(b"x"), -0.2)],
            text_offset_chars: 1,
        },
    ]
}

#[test]
fn logprobs_are_written_in_the_shape_of_each_endpoint() {
    let body = |endpoint| {
        let mut answer = answer(0, Form::Json(endpoint), "é");
        answer.logprobs = Some(logprobs());
        written(Format::Auto, |writer| writer.answer(answer).unwrap())
    };
    let completion = body(Endpoint::Completion);
    let expected = r#""logprobs":{"tokens":["bytes:\\xc3","token_id:9"],"token_logprobs":[-0.1,-9999.0],"top_logprobs":[{" a":-0.05,"bytes:\\xc3":-0.1},{"x":-0.2,"token_id:9":-9999.0}],"text_offset":[0,1]}"#;
    assert!(completion.contains(expected), "{completion}");
    let chat = body(Endpoint::Chat);
    let expected = r#""logprobs":{"content":[{"token":"bytes:\\xc3","logprob":-0.1,"bytes":[195],"top_logprobs":[{"token":" a","logprob":-0.05,"bytes":[32,97]},{"token":"bytes:\\xc3","logprob":-0.1,"bytes":[195]}]},{"token":"token_id:9","logprob":-9999.0,"bytes":null,"top_logprobs":[{"token":"x","logprob":-0.2,"bytes":[120]}]}]}"#;
    assert!(chat.contains(expected), "{chat}");
}

#[test]
fn a_format_given_by_hand_overrules_the_form_of_the_request() {
    let output = written(Format::Jsonl, |writer| {
        writer.answer(answer(0, Form::Plain, "a")).unwrap();
        writer.fail(line_error(1, Form::Plain)).unwrap();
    });
    assert!(
        output
            .lines()
            .all(|line| serde_json::from_str::<Value>(line).is_ok()),
        "{output}"
    );
    let output = written(Format::Plain, |writer| {
        writer
            .answer(answer(0, Form::Json(Endpoint::Chat), "a"))
            .unwrap();
        writer
            .fail(line_error(1, Form::Json(Endpoint::Chat)))
            .unwrap();
    });
    assert_eq!(output, "a\n---\nerror: line 2: bad thing\n");
}

#[test]
fn an_error_after_shown_text_starts_a_line_of_its_own() {
    for (shown, expected) in [
        ("half", "half\nerror: line 1: bad thing\n"),
        ("whole\n", "whole\nerror: line 1: bad thing\n"),
    ] {
        let output = written(Format::Auto, |writer| {
            writer.progress(0, &Form::Plain, shown).unwrap();
            writer.fail(line_error(0, Form::Plain)).unwrap();
        });
        assert_eq!(output, expected);
    }
}

#[test]
fn shown_text_is_flushed_at_once() {
    let mut output = Vec::new();
    let mut writer = AnswerWriter::new(io::BufWriter::new(&mut output), Format::Auto, identity());
    writer.progress(0, &Form::Plain, "Par").unwrap();
    writer.progress(0, &Form::Plain, "Paris").unwrap();
    writer.progress(1, &Form::Plain, "not its turn").unwrap();
    // Leaked, so that dropping the buffer cannot write what was not flushed.
    std::mem::forget(writer);
    assert_eq!(output, b"Paris");
}

#[test]
fn a_request_answered_twice_or_never_is_a_defect_that_is_reported() {
    let mut twice = writer(Format::Auto);
    twice.answer(answer(0, Form::Plain, "a")).unwrap();
    assert!(matches!(
        twice.fail(line_error(0, Form::Plain)),
        Err(WriteError::Duplicate { index: 0 })
    ));
    twice.answer(answer(2, Form::Plain, "c")).unwrap();
    assert!(matches!(
        twice.answer(answer(2, Form::Plain, "c")),
        Err(WriteError::Duplicate { index: 2 })
    ));
    assert!(matches!(
        twice.finish(),
        Err(WriteError::Missing { index: 1, held: 1 })
    ));
}

/// Accepts some bytes, then fails in one way.
struct Full {
    room_bytes: usize,
    kind: io::ErrorKind,
}

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.room_bytes.checked_sub(bytes.len()) {
            None => Err(self.kind.into()),
            Some(room_bytes) => {
                self.room_bytes = room_bytes;
                Ok(bytes.len())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_closed_output_is_told_apart_from_a_full_disk() {
    let fail = |kind| {
        let mut writer = AnswerWriter::new(
            Full {
                room_bytes: 6,
                kind,
            },
            Format::Auto,
            identity(),
        );
        writer.answer(answer(0, Form::Plain, "a")).unwrap();
        writer.answer(answer(1, Form::Plain, "b")).unwrap_err()
    };
    assert!(matches!(
        fail(io::ErrorKind::BrokenPipe),
        WriteError::Closed { written: 1 }
    ));
    assert!(matches!(
        fail(io::ErrorKind::StorageFull),
        WriteError::Io { index: 1, .. }
    ));
}

#[test]
fn the_exit_status_says_whether_lines_failed() {
    assert_eq!(Tally::default().exit_status(), 0);
    assert_eq!(
        Tally {
            answered: 5,
            failed: 0
        }
        .exit_status(),
        0
    );
    assert_eq!(
        Tally {
            answered: 5,
            failed: 1
        }
        .exit_status(),
        3
    );
    assert_eq!(
        Tally {
            answered: 0,
            failed: 1
        }
        .exit_status(),
        3
    );
}

#[test]
fn the_digest_is_that_of_all_token_ids_in_input_order() {
    let mut writer = writer(Format::Auto);
    writer.answer(answer(2, Form::Plain, "c")).unwrap();
    writer.fail(line_error(1, Form::Plain)).unwrap();
    writer
        .answer(answer(0, Form::Json(Endpoint::Chat), "a"))
        .unwrap();
    // sha256sum of 00000000 02000000 02000000 02000000.
    let expected = "31e605767c1be0add9c4ca26175ad5ab3ebbb006198e6f342c7aaab9d68396b1";
    let written = writer.finish().unwrap();
    assert_eq!(
        (written.digest.as_str(), written.tally),
        (
            expected,
            Tally {
                answered: 2,
                failed: 1
            }
        )
    );
}

fn any_form() -> impl Strategy<Value = Form> {
    let endpoint = || prop_oneof![Just(Endpoint::Completion), Just(Endpoint::Chat)];
    prop_oneof![
        2 => Just(Form::Plain),
        1 => endpoint().prop_map(Form::Json),
        1 => (".*", endpoint()).prop_map(|(custom_id, endpoint)| Form::Batch { custom_id, endpoint }),
    ]
}

/// Answers (`Some`) and errors (`None`) in input order, and an order to finish in.
fn any_outcomes() -> impl Strategy<Value = (Vec<(Form, Option<String>)>, Vec<usize>)> {
    let outcome = (any_form(), proptest::option::of("[a\n\u{e9}-]{0,6}"));
    proptest::collection::vec(outcome, 0..7).prop_flat_map(|outcomes| {
        let order: Vec<usize> = (0..outcomes.len()).collect();
        (Just(outcomes), Just(order).prop_shuffle())
    })
}

fn feed(
    writer: &mut AnswerWriter<&mut Vec<u8>>,
    index: usize,
    (form, text): &(Form, Option<String>),
) {
    match text {
        Some(text) => writer.answer(answer(index, form.clone(), text)).unwrap(),
        None => writer.fail(line_error(index, form.clone())).unwrap(),
    }
}

proptest! {
    #[test]
    fn the_output_is_the_same_whatever_order_answers_finish_in((outcomes, order) in any_outcomes()) {
        let in_order = written(Format::Auto, |writer| {
            outcomes.iter().enumerate().for_each(|(index, outcome)| feed(writer, index, outcome));
        });
        let shuffled = written(Format::Auto, |writer| {
            order.iter().for_each(|&index| feed(writer, index, &outcomes[index]));
        });
        prop_assert_eq!(in_order, shuffled);
    }

    #[test]
    fn the_output_is_the_same_whether_or_not_it_is_shown_in_pieces((outcomes, order) in any_outcomes()) {
        let at_once = written(Format::Auto, |writer| {
            outcomes.iter().enumerate().for_each(|(index, outcome)| feed(writer, index, outcome));
        });
        let in_pieces = written(Format::Auto, |writer| {
            for &index in &order {
                let (form, text) = &outcomes[index];
                let text = text.as_deref().unwrap_or_default();
                for (end, _) in text.char_indices().chain([(text.len(), ' ')]) {
                    writer.progress(index, form, &text[..end]).unwrap();
                }
                feed(writer, index, &outcomes[index]);
            }
        });
        prop_assert_eq!(at_once, in_pieces);
    }

    #[test]
    fn no_input_makes_the_reader_panic_and_every_line_is_accounted_for(input in proptest::collection::vec(any::<u8>(), 0..300)) {
        let places: Vec<usize> = read(&input).iter().map(|read| match read {
            Ok(request) => request.index,
            Err(error) => error.index,
        }).collect();
        prop_assert_eq!(&places, &(0..places.len()).collect::<Vec<_>>());
        prop_assert!(places.len() <= input.split(|&byte| byte == b'\n').count());
    }

    #[test]
    fn lines_do_not_depend_on_how_the_input_is_buffered(
        lines in proptest::collection::vec("[ab{}\"\r\u{feff}\u{e9} ]{0,9}", 0..6),
        capacity in 1_usize..9,
    ) {
        let input = lines.join("\n");
        let whole = read(input.as_bytes());
        let reader = RequestReader::new(BufReader::with_capacity(capacity, input.as_bytes()), defaults());
        let buffered: Vec<_> = reader.map(|read| read.map_err(|error| error.to_string())).collect();
        let whole: Vec<_> = whole.into_iter().map(|read| read.map_err(|error| error.to_string())).collect();
        prop_assert_eq!(whole, buffered);
    }

    #[test]
    fn a_sampling_that_was_read_is_inside_its_ranges(field in "(temperature|top_p|min_p|repetition_penalty)", value in any::<f64>()) {
        prop_assume!(value.is_finite());
        if let Ok(request) = read_one(&with_field(&format!("\"{field}\": {value:?}"))) {
            let sampling = request.sampling;
            prop_assert!(sampling.temperature.is_finite() && sampling.temperature >= 0.0);
            prop_assert!(sampling.top_p > 0.0 && sampling.top_p <= 1.0);
            prop_assert!((0.0..=1.0).contains(&sampling.min_p));
            prop_assert!(sampling.repetition_penalty.is_finite() && sampling.repetition_penalty > 0.0);
        }
    }
}

/// Any JSON, of the fields of a body most of the time.
fn any_json() -> impl Strategy<Value = Value> {
    const NAMES: [&str; 24] = [
        "prompt",
        "messages",
        "n",
        "best_of",
        "stop",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "tools",
        "tool_choice",
        "stream_options",
        "max_tokens",
        "temperature",
        "seed",
        "role",
        "content",
        "type",
        "text",
        "function",
        "name",
        "tool_calls",
        "arguments",
        "5",
        "x",
    ];
    const TEXTS: [&str; 11] = [
        "",
        "a",
        "user",
        "assistant",
        "tool",
        "text",
        "function",
        "auto",
        "none",
        "{\"a\": 1}",
        "é",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..200).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        prop::sample::select(&TEXTS[..]).prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 60, 6, move |inner| {
        let fields = prop::collection::vec((prop::sample::select(&NAMES[..]), inner.clone()), 0..6);
        prop_oneof![
            prop::collection::vec(inner, 0..4).prop_map(Value::from),
            fields.prop_map(|fields| {
                let fields = fields
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value));
                Value::Object(fields.collect())
            }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn json_is_read_as_serde_json_reads_it(value in any_json(), cut in prop::option::of(0usize..400)) {
        let mut bytes = value.to_string().into_bytes();
        bytes.truncate(cut.unwrap_or(usize::MAX));
        match serde_json::from_slice::<Value>(&bytes) {
            Ok(value) => prop_assert_eq!(json::parse(&bytes, 0), Ok(value)),
            Err(error) => prop_assert_eq!(json::parse(&bytes, 0), Err(fields::invalid_json(&error, 0))),
        }
    }

    #[test]
    fn any_body_is_read_within_its_limits_or_refused_briefly(
        mut body in any_json(),
        prompt in any_json(),
        is_chat: bool,
        cut in prop::option::of(0usize..400),
    ) {
        if let Some(fields) = body.as_object_mut() {
            let (given, other) = if is_chat { ("messages", "prompt") } else { ("prompt", "messages") };
            fields.remove(other);
            fields.insert(given.to_owned(), prompt);
        }
        let mut bytes = body.to_string().into_bytes();
        bytes.truncate(cut.unwrap_or(usize::MAX));
        for endpoint in [Some(Endpoint::Completion), Some(Endpoint::Chat), None] {
            match Body::parse(&bytes, endpoint, &defaults()) {
                Err(rejection) => prop_assert!(rejection.message.len() < 2000),
                Ok(body) => {
                    prop_assert!(body.sampling.validate().is_ok());
                    prop_assert!(body.choices > 0 && !body.prompts.is_empty());
                    prop_assert!(body.prompts.len() * body.choices <= CHOICE_COUNT_MAX);
                    let _ = body.single();
                }
            }
        }
    }
}
