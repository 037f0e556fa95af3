//! The server on real MPI ranks, with the demo model, a real trained one: what it answers, what it refuses, and that
//! it lives and ends as it says. The client is a plain socket, so that it can also behave badly.

#![cfg(target_os = "linux")] // ranks are found in /proc, and counted by it

mod common;

use common::{PROGRAM, Ran, Running, mpirun, on_cpu, program, root, run, start_with_open_input};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Longest that a client waits for anything.
const PATIENCE: Duration = Duration::from_secs(60);

fn demo_model() -> PathBuf {
    let dir = root().join("models/SmolLM2-135M-Instruct");
    assert!(
        dir.join("config.json").exists(),
        "run scripts/fetch-demo-model first"
    );
    dir
}

/// The demo model with a template that knows tools.
fn model_with_tools(dir: &Path) -> PathBuf {
    for entry in std::fs::read_dir(demo_model()).unwrap() {
        let entry = entry.unwrap();
        std::os::unix::fs::symlink(entry.path(), dir.join(entry.file_name())).unwrap();
    }
    let template = root().join("tests/serve/hermes.jinja");
    std::fs::copy(template, dir.join("chat_template.jinja")).unwrap();
    dir.to_owned()
}

/// A server under test.
struct Server {
    running: Running,
    addr: SocketAddr,
    mark: String,
}

impl Server {
    /// Three ranks with the demo model and these options, ready.
    fn start(mark: &str, options: &[&str]) -> Self {
        Self::start_with(mark, mpirun(3), &demo_model(), options)
    }

    fn start_with(mark: &str, command: Command, model: &Path, options: &[&str]) -> Self {
        let mut server = Self::start_loading(mark, command, model, options);
        server
            .running
            .wait_until(|running| running.stderr.so_far().contains("ready on http://"));
        server
    }

    /// The mark is a name in the command lines of its ranks.
    fn start_loading(mark: &str, mut command: Command, model: &Path, options: &[&str]) -> Self {
        let mark = format!("{mark}-{}.example", std::process::id());
        command.args([
            "serve",
            "--device",
            "cpu",
            "--addr",
            "127.0.0.1:0",
            "--model",
        ]);
        command
            .arg(model)
            .args(["--allow-host", &mark])
            .args(options);
        let mut running = start_with_open_input(&mut command);
        let addr = |running: &Running| {
            let text = running.stderr.so_far();
            let (_, rest) = text.split_once("listening on http://")?;
            rest.split_once(',')?.0.parse::<SocketAddr>().ok()
        };
        running.wait_until(|running| addr(running).is_some());
        Self {
            addr: addr(&running).unwrap(),
            running,
            mark,
        }
    }

    /// Its ranks' processes, rank 0 first.
    fn ranks(&self) -> Vec<i32> {
        let mut ranks: Vec<(u32, i32)> = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap() {
            let place = entry.unwrap().path();
            let name = place.file_name().unwrap().to_string_lossy().into_owned();
            let Ok(pid) = name.parse() else { continue };
            let read = |file| {
                String::from_utf8_lossy(&std::fs::read(place.join(file)).unwrap_or_default())
                    .into_owned()
            };
            let is_ours =
                std::fs::read_link(place.join("exe")).is_ok_and(|exe| exe == Path::new(PROGRAM));
            if is_ours && read("cmdline").contains(&self.mark) {
                let environment = read("environ");
                let rank = environment
                    .split('\0')
                    .find_map(|line| line.strip_prefix("OMPI_COMM_WORLD_RANK="));
                ranks.push((rank.map_or(0, |rank| rank.parse().unwrap()), pid));
            }
        }
        ranks.sort_unstable();
        ranks.into_iter().map(|(_, pid)| pid).collect()
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.addr).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends bytes as they are; all that comes back until the server closes.
    fn send(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect();
        // A server that has answered already need not read on.
        let _ = stream.write_all(bytes);
        Reply::read(stream)
    }

    fn get(&self, path: &str) -> Reply {
        self.send(
            format!(
                "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
                self.addr
            )
            .as_bytes(),
        )
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_with(
            path,
            &body.to_string(),
            "Content-Type: application/json\r\n",
        )
    }

    fn post_with(&self, path: &str, body: &str, headers: &str) -> Reply {
        self.send(self.request(path, body, headers).as_bytes())
    }

    fn request(&self, path: &str, body: &str, headers: &str) -> String {
        format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n{body}",
            self.addr,
            body.len()
        )
    }

    /// A request that waits for its turn; the connection once it is the only one that does.
    fn begin_waiting(&self, body: &Value) -> TcpStream {
        let waiting = self.connect();
        let request = self.request(
            "/v1/completions",
            &body.to_string(),
            "Content-Type: application/json\r\n",
        );
        (&waiting).write_all(request.as_bytes()).unwrap();
        let since = Instant::now();
        while self.get("/api/pipeline").json()["waiting"] != 1 {
            assert!(since.elapsed() < common::LIMIT, "it does not wait");
            std::thread::sleep(common::POLL);
        }
        waiting
    }

    /// Begins an answer in pieces; the connection once the first piece has come.
    fn begin_stream(&self, body: &Value) -> TcpStream {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let mut stream = self.connect();
        let request = self.request(
            "/v1/completions",
            &body.to_string(),
            "Content-Type: application/json\r\n",
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut begun = Vec::new();
        while !String::from_utf8_lossy(&begun).contains("token_ids") {
            let mut bytes = [0; 4096];
            let count = stream.read(&mut bytes).unwrap();
            assert!(count > 0, "{}", String::from_utf8_lossy(&begun));
            begun.extend_from_slice(&bytes[..count]);
        }
        stream
    }

    /// A metric by name and labels.
    fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("mlx_pipe_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}"))
            .parse()
            .unwrap()
    }

    /// Whether it still answers, and has nothing else to do soon.
    fn must_be_well(&self) {
        let body = json!({"prompt": "The capital of France is", "max_tokens": 2});
        let began = Instant::now();
        let reply = loop {
            let reply = self.post("/v1/completions", &body);
            // That a client has gone is noticed soon, not at once.
            if reply.status != 429 || began.elapsed() > Duration::from_secs(3) {
                break reply;
            }
        };
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert!(
            reply.json()["choices"][0]["text"]
                .as_str()
                .unwrap()
                .contains("Paris")
        );
        loop {
            let pipeline = self.get("/api/pipeline").json();
            if (&pipeline["running"], &pipeline["waiting"]) == (&json!(0), &json!(0)) {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(3), "{pipeline}");
        }
    }

    /// Tells it to end in order; it does, and that was all that it said.
    fn end(self) -> Ran {
        kill(self.ranks()[0], libc::SIGTERM);
        let ran = common::finish(self.running).succeeded();
        assert!(!ran.stderr.contains("bug"), "{}", ran.stderr);
        ran
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: `kill` has no preconditions.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// What came back.
struct Reply {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Reply {
    fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        // A reset after the answer is as good as an end.
        let _ = stream.read_to_end(&mut bytes);
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
        let Some(end) = end else {
            return Self {
                status: 0,
                head: String::new(),
                body: bytes,
            };
        };
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let body = &bytes[end + 4..];
        Self {
            status: head
                .split(' ')
                .nth(1)
                .and_then(|status| status.parse().ok())
                .unwrap_or(0),
            body: match head.contains("transfer-encoding: chunked") {
                true => without_chunks(body),
                false => body.to_vec(),
            },
            head,
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {} {}", self.status, self.text()))
    }

    /// The error, which must have OpenAI's shape.
    #[track_caller]
    fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text());
        let error = self.json()["error"].clone();
        for field in ["message", "type", "param", "code"] {
            assert!(error.get(field).is_some(), "{error}");
        }
        error
    }

    /// The pieces of an answer, which must have ended in order.
    #[track_caller]
    fn pieces(&self) -> Vec<Value> {
        let text = self.text();
        let mut events: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{text}");
        events
            .into_iter()
            .map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }
}

fn without_chunks(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(end) = body.windows(2).position(|window| window == b"\r\n") {
        let length = usize::from_str_radix(&String::from_utf8_lossy(&body[..end]), 16).unwrap_or(0);
        let start = end + 2;
        if length == 0 || body.len() < start + length {
            break;
        }
        whole.extend_from_slice(&body[start..start + length]);
        body = body.get(start + length + 2..).unwrap_or_default();
    }
    whole
}

fn chat(content: &str) -> Value {
    json!({"messages": [{"role": "user", "content": content}], "max_tokens": 24})
}

fn with(mut body: Value, fields: Value) -> Value {
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn path_of(body: &Value) -> &'static str {
    match body.get("messages") {
        Some(_) => "/v1/chat/completions",
        None => "/v1/completions",
    }
}

/// Requests of all kinds with one answer.
fn requests() -> Vec<Value> {
    let story = json!({"prompt": "Once upon a time", "max_tokens": 30});
    let mut requests = vec![
        chat("What is the capital of France?"),
        with(
            chat("Name three colours."),
            json!({"logprobs": true, "top_logprobs": 3}),
        ),
        with(
            chat("Say hello."),
            json!({"temperature": 0.8, "seed": 7, "max_completion_tokens": 24}),
        ),
        with(story.clone(), json!({"logprobs": 2})),
        // The answer ends where the text does, which is in the middle of a token.
        with(story.clone(), json!({"stop": ["riving met", "never"]})),
        json!({"prompt": [504, 3575, 282, 4649, 314], "max_tokens": 5}),
        with(
            story.clone(),
            json!({"temperature": 1.1, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": -3}),
        ),
        with(
            story.clone(),
            json!({"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.1}),
        ),
        with(story, json!({"logit_bias": {"28": -100, "30": 4.5}})),
    ];
    for seed in 0..7 {
        requests
            .push(json!({"prompt": "Dear", "max_tokens": 16, "temperature": 1.0, "seed": seed}));
    }
    requests
}

/// What counts of an answer.
fn choices(answer: &Value) -> Value {
    let mut choices = answer["choices"].clone();
    for choice in choices.as_array_mut().unwrap() {
        if let Some(message) = choice.get_mut("message") {
            message.as_object_mut().unwrap().remove("refusal");
        }
    }
    choices
}

#[test]
fn answers_are_those_of_standard_input_whole_and_in_pieces_one_by_one_and_all_at_once() {
    let requests = requests();
    let lines: String = requests
        .iter()
        .map(|request| format!("{request}\n"))
        .collect();
    let mut command = on_cpu(program());
    command.arg("--model").arg(demo_model());
    let expected = run(&mut command, lines.as_bytes()).succeeded().json_lines();
    assert!(
        expected[0]["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .contains("Paris")
    );
    assert_eq!(
        expected[4]["choices"][0]["finish_reason"], "stop",
        "{}",
        expected[4]
    );

    let server = Server::start("same", &[]);
    for (request, expected) in requests.iter().zip(&expected) {
        let reply = server.post(path_of(request), request);
        assert_eq!(reply.status, 200, "{request}: {}", reply.text());
        let answer = reply.json();
        assert_eq!(choices(&answer), choices(expected), "{request}");
        assert_eq!(answer["usage"], expected["usage"]);
        assert_eq!(answer["object"], expected["object"]);
        assert_eq!(answer["model"], "SmolLM2-135M-Instruct");
        let streamed = with(
            request.clone(),
            json!({"stream": true, "stream_options": {"include_usage": true}}),
        );
        must_put_together(&server.post(path_of(request), &streamed), expected);
    }
    std::thread::scope(|scope| {
        let server = &server;
        let at_once = requests
            .iter()
            .map(|request| scope.spawn(|| server.post(path_of(request), request)));
        let at_once: Vec<_> = at_once.collect();
        for (reply, expected) in at_once.into_iter().zip(&expected) {
            assert_eq!(choices(&reply.join().unwrap().json()), choices(expected));
        }
    });
    assert_eq!(
        server.metric("requests_total{outcome=\"answered\"}"),
        3.0 * requests.len() as f64
    );
    assert_eq!(
        server.metric("first_token_seconds_count"),
        3.0 * requests.len() as f64
    );
    server.must_be_well();
    server.end();
}

/// The pieces put together are the whole answer.
fn must_put_together(reply: &Reply, expected: &Value) {
    assert_eq!(reply.status, 200);
    assert!(
        reply.head.contains("content-type: text/event-stream"),
        "{}",
        reply.head
    );
    let mut pieces = reply.pieces();
    let last = pieces.pop().unwrap();
    assert_eq!(
        (&last["usage"], &last["choices"]),
        (&expected["usage"], &json!([]))
    );
    let expected = &expected["choices"][0];
    let is_chat = expected.get("message").is_some();
    if is_chat {
        assert_eq!(
            pieces.remove(0)["choices"][0]["delta"],
            json!({"role": "assistant", "content": ""})
        );
    }
    let (mut text, mut ids, mut logprobs) = (String::new(), Vec::new(), Vec::new());
    let mut reason = Value::Null;
    for piece in &pieces {
        assert_eq!(piece["usage"], Value::Null);
        assert_eq!(reason, Value::Null, "nothing comes after the last piece");
        let choice = &piece["choices"][0];
        let said = if is_chat {
            &choice["delta"]["content"]
        } else {
            &choice["text"]
        };
        text.push_str(said.as_str().unwrap_or_default());
        ids.extend(choice["token_ids"].as_array().cloned().unwrap_or_default());
        let of_tokens = if is_chat { "content" } else { "token_logprobs" };
        logprobs.extend(
            choice["logprobs"][of_tokens]
                .as_array()
                .cloned()
                .unwrap_or_default(),
        );
        reason = choice["finish_reason"].clone();
    }
    assert!(pieces.len() > 2, "an answer comes in pieces");
    let (whole, of_tokens) = match is_chat {
        true => (
            &expected["message"]["content"],
            &expected["logprobs"]["content"],
        ),
        false => (&expected["text"], &expected["logprobs"]["token_logprobs"]),
    };
    assert_eq!(&json!(text), whole);
    assert_eq!(json!(ids), expected["token_ids"]);
    assert_eq!(logprobs, of_tokens.as_array().cloned().unwrap_or_default());
    assert_eq!(reason, expected["finish_reason"]);
}

#[test]
fn several_answers_and_several_prompts_share_what_they_begin_with() {
    let server = Server::start("several", &[]);
    let prompt: Vec<u32> = (0..200).map(|at| 500 + at * 7).collect();
    let body = json!({"prompt": prompt, "max_tokens": 8, "temperature": 1.5, "seed": 11});
    let alone = server.post("/v1/completions", &body).json();
    let three = with(body.clone(), json!({"n": 3, "best_of": 3}));
    let before = server.metric("computed_prompt_tokens_total");
    let answer = server.post("/v1/completions", &three).json();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    assert_eq!(
        choices[0], alone["choices"][0],
        "the first is what it is alone"
    );
    assert_ne!(choices[1]["token_ids"], choices[2]["token_ids"]);
    assert_eq!(choices[2]["index"], 2);
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": 200, "completion_tokens": 24, "total_tokens": 224})
    );
    assert_eq!(
        server.post("/v1/completions", &three).json()["choices"],
        answer["choices"]
    );
    let computed = server.metric("computed_prompt_tokens_total") - before;
    assert!(
        computed < 200.0,
        "{computed} tokens of prompts computed where 192 of 200 were known"
    );

    let pair = json!({"prompt": ["The capital of France is", "The capital of Italy is"], "max_tokens": 2, "n": 2});
    let answer = server.post("/v1/completions", &pair).json();
    let texts: Vec<&str> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["text"].as_str().unwrap())
        .collect();
    assert!(
        texts[0].contains("Paris") && texts[0] == texts[1],
        "{texts:?}"
    );
    assert!(
        texts[2].contains("Rome") && texts[2] == texts[3],
        "{texts:?}"
    );
    let pieces = server
        .post("/v1/completions", &with(pair, json!({"stream": true})))
        .pieces();
    for (index, text) in texts.iter().enumerate() {
        let own = pieces
            .iter()
            .map(|piece| &piece["choices"][0])
            .filter(|choice| choice["index"] == index);
        let streamed: String = own.map(|choice| choice["text"].as_str().unwrap()).collect();
        assert_eq!(&streamed, text);
    }
    server.end();
}

#[test]
fn calls_of_tools_are_read_out_of_answers() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_with_tools(dir.path());
    let server = Server::start_with("tools", program(), &model, &[]);
    let shown = |city: &str| {
        format!(
            "Q: Weather in {city}?\nA: <tool_call>\n{{\"name\": \"weather\", \"arguments\": {{\"city\": \"{city}\"}}}}\n</tool_call>\n\n"
        )
    };
    let text: String = ["Rome", "Berlin", "Madrid"]
        .into_iter()
        .map(shown)
        .collect();
    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]);
    let body = with(
        chat(&format!("{text}Q: Weather in Paris?\nA:")),
        json!({"max_tokens": 60, "stop": "Q:", "tools": tools}),
    );
    let answer = server.post("/v1/chat/completions", &body).json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    assert_eq!(choice["message"]["content"], Value::Null);
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(
        (&call["type"], &call["function"]["name"]),
        (&json!("function"), &json!("weather"))
    );
    let arguments: Value =
        serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(arguments, json!({"city": "Paris"}));

    let pieces = server
        .post(
            "/v1/chat/completions",
            &with(body.clone(), json!({"stream": true})),
        )
        .pieces();
    let calls: Vec<&Value> = pieces
        .iter()
        .filter_map(|piece| piece["choices"][0]["delta"].get("tool_calls"))
        .collect();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0][0]["function"], call["function"]);
    assert_eq!(
        pieces.last().unwrap()["choices"][0]["finish_reason"],
        "tool_calls"
    );

    // The conversation goes on with the call and its result.
    let mut messages = body["messages"].clone();
    messages.as_array_mut().unwrap().extend([
        json!({"role": "assistant", "content": null, "tool_calls": [call]}),
        json!({"role": "tool", "tool_call_id": call["id"], "content": "sunny"}),
    ]);
    let second = with(body.clone(), json!({"messages": messages}));
    assert_eq!(server.post("/v1/chat/completions", &second).status, 200);
    // Without tools it is text.
    let text = server
        .post(
            "/v1/chat/completions",
            &with(body.clone(), json!({"tool_choice": "none"})),
        )
        .json();
    assert!(
        text["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .contains("<tool_call>"),
        "{text}"
    );
    for (field, value) in [
        ("tool_choice", json!("required")),
        ("parallel_tool_calls", json!(false)),
    ] {
        let reply = server.post(
            "/v1/chat/completions",
            &with(body.clone(), json!({field: value})),
        );
        assert_eq!(reply.error(400)["param"], field);
    }
    server.end();
}

#[test]
fn what_cannot_be_answered_is_refused_by_status_and_field() {
    let server = Server::start("errors", &["--max-body", "100000", "--context", "256"]);
    let completion = |fields: Value| with(json!({"prompt": "a", "max_tokens": 1}), fields);
    for (body, status, param) in [
        (
            completion(json!({"temperature": -1})),
            400,
            json!("temperature"),
        ),
        (
            completion(json!({"temperature": 2.5})),
            400,
            json!("temperature"),
        ),
        (completion(json!({"echo": true})), 400, json!("echo")),
        (completion(json!({"best_of": 2})), 400, json!("best_of")),
        (
            completion(json!({"temprature": 1})),
            400,
            json!("temprature"),
        ),
        (completion(json!({"tools": [{}]})), 400, json!("tools")),
        (completion(json!({"n": 129})), 400, json!("n")),
        (completion(json!({"prompt": []})), 400, json!("prompt")),
        (
            completion(json!({"prompt": vec![5; 256]})),
            400,
            json!("prompt"),
        ),
        (
            completion(json!({"prompt": [60_000_000]})),
            422,
            json!("prompt"),
        ),
        (
            completion(json!({"logit_bias": {"60000000": 1}})),
            422,
            json!("logit_bias"),
        ),
        (json!({"max_tokens": 1}), 400, json!("prompt")),
        (json!([1]), 400, Value::Null),
    ] {
        let error = server.post("/v1/completions", &body).error(status);
        assert_eq!(
            (&error["param"], &error["type"]),
            (&param, &json!("invalid_request_error")),
            "{body}"
        );
    }
    for (fields, param) in [
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f"}}]}),
            "tools",
        ),
        (json!({"messages": []}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0]",
        ),
    ] {
        let error = server
            .post("/v1/chat/completions", &with(chat("a"), fields))
            .error(400);
        assert_eq!(error["param"], param);
    }
    let broken = server.post_with(
        "/v1/completions",
        "{\"prompt\": ",
        "Content-Type: application/json\r\n",
    );
    assert_eq!(broken.error(400)["code"], "invalid_json");
    for kind in [
        "",
        "Content-Type: text/plain\r\n",
        "Content-Type: application/x-www-form-urlencoded\r\n",
    ] {
        let error = server
            .post_with("/v1/completions", "{\"prompt\": \"a\"}", kind)
            .error(415);
        assert_eq!(error["code"], "unsupported_media_type");
    }
    let json_type = "Content-Type: application/json\r\n";
    let a = json!({"prompt": "a", "max_tokens": 1}).to_string();
    for (encoding, status) in [("gzip", 415), ("br", 415), ("identity", 200)] {
        let headers = format!("{json_type}Content-Encoding: {encoding}\r\n");
        let reply = server.post_with("/v1/completions", &a, &headers);
        assert_eq!(reply.status, status, "{}", reply.text());
        assert_eq!(reply.text().contains("Content-Encoding"), status == 415);
    }
    let twice = r#"{"prompt": "a", "seed": 1, "seed": 2}"#;
    let error = server
        .post_with("/v1/completions", twice, json_type)
        .error(400);
    assert_eq!(error["param"], "seed");
    let hosts = format!("{json_type}Host: localhost\r\n");
    let error = server.post_with("/v1/completions", &a, &hosts).error(400);
    assert_eq!(error["code"], "several_hosts");
    let lengths = format!("{json_type}Content-Length: 5\r\n");
    assert_eq!(
        server.post_with("/v1/completions", &a, &lengths).status,
        400
    );
    let large = json!({"prompt": "x".repeat(200_000)});
    server.post("/v1/completions", &large).error(413);
    let chunked = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        server.addr,
        format!("4000\r\n{}\r\n", " ".repeat(0x4000)).repeat(8)
    );
    server.send(chunked.as_bytes()).error(413);
    assert_eq!(server.get("/v1/nothing").error(404)["code"], "not_found");
    for path in [
        "/../Cargo.toml",
        "/page/index.html",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
    ] {
        server.get(path).error(404);
    }
    assert_eq!(
        server.get("/v1/models/another").error(404)["code"],
        "model_not_found"
    );
    let reply = server.get("/v1/completions");
    reply.error(405);
    assert!(reply.head.contains("allow: post"), "{}", reply.head);
    assert_eq!(
        server.get("/v1/models").json()["data"][0]["id"],
        "SmolLM2-135M-Instruct"
    );
    assert_eq!(server.get("/v1/models/SmolLM2-135M-Instruct").status, 200);
    let page = server.get("/");
    assert!(!page.head.contains("unsafe"), "{}", page.head);
    assert!(
        page.head
            .contains("content-security-policy: default-src 'none'"),
        "{}",
        page.head
    );
    assert!(page.text().contains("mlx-pipe"));
    server.must_be_well();
    server.end();
}

#[test]
fn pages_of_other_origins_cannot_drive_a_server_on_this_machine() {
    let server = Server::start_with(
        "origins",
        program(),
        &demo_model(),
        &["--cors-origin", "http://friend.example"],
    );
    let body = json!({"prompt": "a", "max_tokens": 1}).to_string();
    let ask = |host: &str, headers: &str| {
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n{headers}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        server.send(request.as_bytes())
    };
    let addr = server.addr.to_string();
    // A name that was rebound to this machine, and a page that asks on its own behalf.
    assert_eq!(ask("evil.example", "").error(403)["code"], "unknown_host");
    for origin in [
        "http://evil.example",
        "null",
        "http://127.0.0.1:1",
        "https://friend.example",
    ] {
        assert_eq!(
            ask(&addr, &format!("Origin: {origin}\r\n")).error(403)["code"],
            "unknown_origin"
        );
    }
    assert_eq!(
        ask(&addr, &format!("Origin: http://{addr}\r\n")).status,
        200
    );
    assert_eq!(
        ask(&format!("localhost:{}", server.addr.port()), "").status,
        200
    );
    assert_eq!(ask(&server.mark, "").status, 200, "--allow-host");
    let allowed = ask(&addr, "Origin: http://friend.example\r\n");
    assert_eq!(allowed.status, 200);
    assert!(
        allowed
            .head
            .contains("access-control-allow-origin: http://friend.example"),
        "{}",
        allowed.head
    );
    let preflight = |origin: &str| {
        server.send(format!("OPTIONS /v1/completions HTTP/1.1\r\nHost: {addr}\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: POST\r\nConnection: close\r\n\r\n").as_bytes())
    };
    let granted = preflight("http://friend.example");
    assert_eq!(granted.status, 204);
    assert!(
        granted
            .head
            .contains("access-control-allow-headers: *, authorization"),
        "{}",
        granted.head
    );
    let denied = preflight("http://evil.example");
    assert!(
        denied.status == 403 && !denied.head.contains("access-control"),
        "{}",
        denied.head
    );
    // Without a host it is no request.
    assert_eq!(
        server
            .send(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
            .status,
        403
    );
    server.end();
}

#[test]
fn a_key_opens_all_but_page_and_health_which_are_open() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "# two keys\nfirst-key-123\n\nsecond-key-456\n").unwrap();
    let server = Server::start_with(
        "keys",
        program(),
        &demo_model(),
        &["--api-key-file", keys.to_str().unwrap()],
    );
    let body = json!({"prompt": "a", "max_tokens": 1}).to_string();
    let ask = |key: &str| {
        let key = match key {
            "" => String::new(),
            key => format!("Authorization: {key}\r\n"),
        };
        server.post_with(
            "/v1/completions",
            &body,
            &format!("Content-Type: application/json\r\n{key}"),
        )
    };
    for wrong in [
        "",
        "Bearer",
        "Bearer ",
        "Bearer first-key-12",
        "Bearer first-key-1234",
        "Basic first-key-123",
        "Bearer # two keys",
        "first-key-123",
    ] {
        let reply = ask(wrong);
        assert_eq!(reply.error(401)["code"], "invalid_api_key", "{wrong}");
        assert!(reply.head.contains("www-authenticate: bearer"));
    }
    for right in ["Bearer first-key-123", "bearer second-key-456"] {
        assert_eq!(ask(right).status, 200);
    }
    for path in ["/v1/models", "/metrics", "/api/pipeline", "/v1/nothing"] {
        server.get(path).error(401);
    }
    for path in ["/", "/health"] {
        assert_eq!(server.get(path).status, 200);
    }
    server.end();
}

#[test]
fn a_client_that_goes_away_frees_its_place_at_once() {
    let server = Server::start("cancel", &["--max-sequences", "1"]);
    let endless = json!({"prompt": "Once upon a time", "max_tokens": 3500, "logit_bias": {"0": -100, "2": -100}});
    for is_half_closed in [false, true] {
        let stream = server.begin_stream(&endless);
        let pipeline = server.get("/api/pipeline").json();
        assert_eq!(
            pipeline["waiting"].as_u64().unwrap() + pipeline["running"].as_u64().unwrap(),
            1
        );
        let began = Instant::now();
        match is_half_closed {
            // Whoever says that it sends nothing more is taken to be gone.
            true => stream.shutdown(Shutdown::Write).unwrap(),
            false => drop(stream),
        }
        server.must_be_well();
        let took = began.elapsed();
        assert!(
            took < Duration::from_secs(3),
            "the next one had to wait for {took:?}"
        );
    }
    // One that waits for its turn, and one whose whole answer nobody waits for.
    let running = server.begin_stream(&endless);
    let waiting = server.begin_waiting(&endless);
    drop(running);
    std::thread::sleep(Duration::from_millis(200));
    drop(waiting);
    server.must_be_well();
    assert_eq!(server.metric("requests_total{outcome=\"cancelled\"}"), 4.0);
    assert_eq!(server.metric("kv_used_tokens"), 0.0);
    server.end();
}

#[test]
fn more_than_may_wait_is_refused_and_may_try_again() {
    let server = Server::start("queue", &["--max-sequences", "1", "--max-queue", "1"]);
    let endless = json!({"prompt": "Once upon a time", "max_tokens": 3500, "logit_bias": {"0": -100, "2": -100}});
    let running = server.begin_stream(&endless);
    let waiting = server.begin_waiting(&endless);
    let refused = server.post("/v1/completions", &json!({"prompt": "a"}));
    assert_eq!(refused.error(429)["type"], "rate_limit_error");
    assert!(refused.head.contains("retry-after: 1"), "{}", refused.head);
    // One that goes away while it waits makes room for another, though nothing has ended.
    drop(waiting);
    std::thread::sleep(Duration::from_millis(300));
    let waiting = server.begin_waiting(&endless);
    assert_eq!(server.metric("requests_total{outcome=\"full\"}"), 1.0);
    let never = server
        .post("/v1/completions", &json!({"prompt": "a", "n": 3}))
        .error(400);
    assert_eq!(never["code"], "too_many_choices");
    drop((running, waiting));
    server.must_be_well();
    server.end();
}

#[test]
fn told_to_end_it_finishes_what_runs_and_takes_nothing_new() {
    for (name, signal, to_launcher) in [
        ("term", libc::SIGTERM, false),
        ("usr1", libc::SIGUSR1, true),
    ] {
        let server = Server::start(&format!("drain-{name}"), &[]);
        let stream = server.begin_stream(&json!({"prompt": "Once upon a time", "max_tokens": 150, "logit_bias": {"0": -100, "2": -100}}));
        match to_launcher {
            true => kill(server.running.child.id() as i32, signal),
            false => kill(server.ranks()[0], signal),
        }
        let began = Instant::now();
        while server.get("/health").status != 503 {
            assert!(began.elapsed() < Duration::from_secs(5));
            std::thread::sleep(Duration::from_millis(10));
        }
        let refused = server.post("/v1/completions", &json!({"prompt": "a"}));
        assert_eq!(refused.error(503)["code"], "draining");
        assert!(refused.head.contains("retry-after"), "{}", refused.head);
        let mut rest = String::new();
        (&stream).read_to_string(&mut rest).unwrap();
        assert!(
            rest.contains("\"finish_reason\":\"length\"") && rest.contains("[DONE]"),
            "{rest}"
        );
        let ran = common::finish(server.running).succeeded();
        assert!(
            ran.stderr.contains("1 answered, 0 failed"),
            "{}",
            ran.stderr
        );
    }
}

#[test]
fn what_is_not_finished_in_time_gets_an_error_and_the_end_is_in_order() {
    let server = Server::start("drain-late", &["--drain-s", "1"]);
    let stream = server.begin_stream(&json!({"prompt": "Once upon a time", "max_tokens": 3500, "logit_bias": {"0": -100, "2": -100}}));
    kill(server.ranks()[0], libc::SIGTERM);
    let mut rest = String::new();
    (&stream).read_to_string(&mut rest).unwrap();
    assert!(
        rest.contains("--drain-s") && !rest.contains("[DONE]"),
        "{rest}"
    );
    common::finish(server.running).succeeded();
}

#[test]
fn a_rank_that_dies_ends_every_stream_with_an_error_and_the_job_with_a_status() {
    for victim in [1, 2] {
        let server = Server::start(&format!("killed-{victim}"), &[]);
        let stream = server.begin_stream(&json!({"prompt": "Once upon a time", "max_tokens": 3500, "logit_bias": {"0": -100, "2": -100}}));
        kill(server.ranks()[victim], libc::SIGKILL);
        let mut rest = String::new();
        let _ = (&stream).read_to_string(&mut rest);
        assert!(
            rest.contains("\"error\":{") && !rest.contains("[DONE]"),
            "{rest}"
        );
        assert!(
            !rest.contains("shutdown") && rest.contains("rank"),
            "{rest}"
        );
        let ran = common::finish(server.running);
        assert_ne!(ran.status, 0, "{}", ran.stderr);
        assert!(
            ran.stderr.contains("signal 9") && !ran.stderr.contains("shutdown"),
            "{}",
            ran.stderr
        );
    }
}

#[test]
fn bad_clients_harm_no_others() {
    let server = Server::start(
        "hostile",
        &[
            "--max-connections",
            "64",
            "--idle-s",
            "2",
            "--body-s",
            "2",
            "--write-s",
            "2",
            "--max-body",
            "1MB",
        ],
    );
    // What is no request.
    for bytes in [
        &b"\0\xff\xfe\r\n\r\n"[..],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ] {
        let reply = server.send(bytes);
        assert!(matches!(reply.status, 0 | 400 | 415), "{} {}", reply.status, reply.head);
    }
    let long_head = format!(
        "GET / HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n",
        "x".repeat(200_000)
    );
    assert!(matches!(
        server.send(long_head.as_bytes()).status,
        0 | 400 | 431
    ));
    let many_fields = format!(
        "GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n",
        "X: y\r\n".repeat(2000)
    );
    assert!(matches!(
        server.send(many_fields.as_bytes()).status,
        0 | 400 | 431
    ));
    // What is said to be huge, and what is deep.
    let json_type = "Content-Type: application/json\r\n";
    let huge = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{json_type}Content-Length: 99999999999\r\n\r\n{{"
    );
    server.send(huge.as_bytes()).error(413);
    let deep = format!("{{\"prompt\": {}", "[".repeat(500_000));
    server
        .post_with("/v1/completions", &deep, json_type)
        .error(400);
    let many = format!(
        "{{\"prompt\": \"a\", \"logit_bias\": {{{}\"1\": 0}}}}",
        "\"2\": 1,".repeat(100_000)
    );
    let reply = server.post_with("/v1/completions", &many, json_type);
    assert!(reply.status == 200 || reply.status == 400);
    // What would take hundreds of times its size to tokenise.
    let rank_0 = server.ranks()[0];
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let digits = json!({"prompt": "1".repeat(900_000)});
                let error = server.post("/v1/completions", &digits).error(400);
                assert_eq!(error["code"], "context_length_exceeded");
            });
        }
    });
    let status = std::fs::read_to_string(format!("/proc/{rank_0}/status")).unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let peak_kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak_kib < 400_000, "rank 0 held {peak_kib} KiB");
    // Who sends its head, or its body, ever so slowly.
    let began = Instant::now();
    let mut slow_head = server.connect();
    slow_head
        .write_all(b"GET /health HTTP/1.1\r\nHost: loc")
        .unwrap();
    let mut slow_body = server.connect();
    slow_body
        .write_all(format!("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{json_type}Content-Length: 50\r\n\r\n{{\"pro").as_bytes())
        .unwrap();
    let silent = server.connect();
    server.must_be_well();
    assert_eq!(Reply::read(slow_body).error(408)["code"], "body_too_slow");
    assert!(matches!(Reply::read(slow_head).status, 0 | 408));
    assert_eq!(Reply::read(silent).status, 0);
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    // Bodies that break off.
    for _ in 0..20 {
        let mut stream = server.connect();
        stream.write_all(format!("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{json_type}Content-Length: 50\r\n\r\n{{").as_bytes()).unwrap();
    }
    // Far more connections than there may be, silent all of them.
    let crowd: Vec<TcpStream> = (0..600).map(|_| server.connect()).collect();
    server.must_be_well();
    assert!(server.metric("connections") <= 64.0);
    drop(crowd);
    server.must_be_well();
    server.end();
}

#[test]
fn who_reads_nothing_loses_its_connection_and_nobody_else_anything() {
    let server = Server::start("slow-reader", &["--write-s", "2", "--max-sequences", "4"]);
    // More than sockets hold: with top logprobs, a token is some kilobytes.
    let wordy = json!({"prompt": "Once upon a time", "max_tokens": 3000, "logprobs": 20, "n": 4,
        "temperature": 1.0, "logit_bias": {"0": -100, "2": -100}});
    let stream = server.begin_stream(&wordy);
    let began = Instant::now();
    while server.metric("requests_total{outcome=\"cancelled\"}") < 1.0 {
        assert!(
            began.elapsed() < Duration::from_secs(100),
            "{}",
            server.get("/metrics").text()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    server.must_be_well();
    drop(stream);
    server.end();
}

#[test]
fn who_takes_all_places_and_reads_nothing_loses_them() {
    let options = ["--write-s", "1", "--max-sequences", "2", "--max-queue", "2"];
    let server = Server::start("unread", &options);
    // Much less than a system would take in of its own accord, and more than this server lets it.
    let unread = json!({"prompt": "Once upon a time", "max_tokens": 2000, "logprobs": 5, "stream": true,
        "temperature": 1.0, "logit_bias": {"0": -100, "2": -100}});
    let request = server.request(
        "/v1/completions",
        &unread.to_string(),
        "Content-Type: application/json\r\n",
    );
    let crowd: Vec<TcpStream> = (0..4)
        .map(|_| {
            let mut stream = server.connect();
            stream.write_all(request.as_bytes()).unwrap();
            stream
        })
        .collect();
    let began = Instant::now();
    let has_taken = || {
        let pipeline = server.get("/api/pipeline").json();
        pipeline["running"].as_u64().unwrap() + pipeline["waiting"].as_u64().unwrap()
    };
    while has_taken() < 4 {
        assert!(began.elapsed() < PATIENCE, "places are free");
    }
    let body = json!({"prompt": "The capital of France is", "max_tokens": 2});
    let answered = loop {
        let reply = server.post("/v1/completions", &body);
        if reply.status != 429 {
            break reply;
        }
        assert!(began.elapsed() < PATIENCE, "no place became free");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(answered.status, 200, "{}", answered.text());
    while server.metric("requests_total{outcome=\"cancelled\"}") < 4.0 {
        assert!(
            began.elapsed() < PATIENCE,
            "{}",
            server.get("/metrics").text()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    server.must_be_well();
    assert_eq!(server.metric("kv_used_tokens"), 0.0);
    drop(crowd);
    server.end();
}

#[test]
fn who_still_sends_what_is_refused_sees_why() {
    let server = Server::start_with(
        "linger",
        program(),
        &demo_model(),
        &["--max-body", "100000"],
    );
    let body = " ".repeat(20_000_000);
    let json_type = "Content-Type: application/json\r\n";
    let chunked = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {}\r\n{json_type}Transfer-Encoding: chunked\r\n\r\n1312D00\r\n{body}\r\n0\r\n\r\n",
        server.addr
    );
    for request in [server.request("/v1/completions", &body, json_type), chunked] {
        let mut stream = server.connect();
        stream.write_all(request.as_bytes()).unwrap();
        Reply::read(stream).error(413);
    }
    server.end();
}

#[test]
fn it_listens_while_the_ranks_load() {
    let server = Server::start_loading("loading", mpirun(3), &demo_model(), &[]);
    // Loading takes less than a second: whichever it is, health says so.
    let health = server.get("/health");
    let is_ready = health.status == 200;
    assert_eq!(
        health.json()["status"],
        if is_ready { "ready" } else { "loading" }
    );
    if !is_ready {
        let refused = server.post("/v1/completions", &json!({"prompt": "a"}));
        assert!(refused.status == 200 || refused.error(503)["code"] == "loading");
    }
    let began = Instant::now();
    while server.get("/health").status != 200 {
        assert!(began.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
    server.must_be_well();
    server.end();
}

#[test]
fn an_idle_server_burns_no_core_and_answers_at_once() {
    let server = Server::start("idle", &[]);
    server.must_be_well();
    let ranks = server.ranks();
    assert_eq!(ranks.len(), 3);
    std::thread::sleep(Duration::from_secs(1));
    common::assert_no_core_is_burnt(&ranks);
    let began = Instant::now();
    server.must_be_well();
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    server.end();
}

#[test]
fn mistakes_on_the_command_line_are_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "# none\n").unwrap();
    for (arguments, named) in [
        (
            vec!["--report", "r.json"],
            "--report does not go with serve",
        ),
        (vec!["--raw"], "--raw does not go with serve"),
        (vec!["--format", "jsonl"], "--format does not go with serve"),
        (vec!["--trace", "t.json"], "--trace does not go with serve"),
        (vec!["--addr", "nowhere"], "--addr"),
        (vec!["--addr", "8080"], "such as 127.0.0.1:8080"),
        (
            vec!["--api-key-file", dir.path().to_str().unwrap()],
            "--api-key-file",
        ),
        (vec!["--max-body", "1TB"], "256MB"),
        (vec!["--temperature", "-1"], "--temperature"),
        (vec!["--addr", &taken], "choose another --addr"),
        (vec!["--api-key-file", "/nonexistent"], "does not exist"),
        (
            vec!["--api-key-file", empty.to_str().unwrap()],
            "there is no key in it",
        ),
        (
            vec!["--cors-origin", "friend.example"],
            "expected an origin",
        ),
    ] {
        let mut command = program();
        command
            .arg("serve")
            .arg("--model")
            .arg(demo_model())
            .args(&arguments);
        let ran = run(&mut command, b"");
        assert_eq!(ran.status, 2, "{arguments:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(named), "{arguments:?}: {}", ran.stderr);
    }
}
