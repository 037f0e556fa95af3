//! Input that is wrong: damaged checkpoints, bad requests, options and cluster files that cannot be. Each
//! ends with a message that says what is wrong and where, and with the promised exit status: 1 where the
//! run failed, 2 for bad usage, 3 where some lines failed. No input whatever may end in a panic, a signal
//! or a wait.

mod common;
#[allow(dead_code, reason = "only whole models are imported here")]
#[path = "../src/import/tests/builder.rs"]
mod gguf;

use common::{Ran, golden, mpirun, on_cpu, program, run, token_request};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// Within this time of a failure every rank must be gone.
const GONE_WITHIN: Duration = Duration::from_secs(10);

const RUN_FAILED: i32 = 1;
const BAD_USAGE: i32 = 2;
const SOME_LINES_FAILED: i32 = 3;

/// A tied Qwen3 of 6 layers and 256 tokens, context 1024, in one file; no tokenizer.
const ONE_FILE: &str = "qwen3-tied-8bit";
/// A Llama of 6 layers in two files and an index.
const TWO_FILES: &str = "llama-untied-4bit-two-files";

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SECOND_FILE: &str = "model-00002-of-00002.safetensors";
const SCALES: &str = "model.layers.2.mlp.gate_proj.scales";
const CODES: &str = "model.layers.2.mlp.gate_proj.weight";

/// A tokenizer of three words.
const SMALL_TOKENIZER: &str = r#"{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2}, "unk_token": "?"}}"#;

/// A copy of a golden checkpoint, to be damaged.
struct Checkpoint(TempDir);

impl Checkpoint {
    /// A copy without what is not the model's.
    fn of(name: &str) -> Self {
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(golden(name).dir).unwrap() {
            let file = entry.unwrap().file_name().into_string().unwrap();
            let needless_index = file == INDEX && name == ONE_FILE;
            if !file.starts_with("golden.") && !needless_index {
                std::fs::copy(golden(name).dir.join(&file), copy.path().join(&file)).unwrap();
            }
        }
        Self(copy)
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.dir().join(file)).unwrap()
    }

    fn write(&self, file: &str, bytes: impl AsRef<[u8]>) -> &Self {
        std::fs::write(self.dir().join(file), bytes).unwrap();
        self
    }

    fn remove(&self, file: &str) -> &Self {
        std::fs::remove_file(self.dir().join(file)).unwrap();
        self
    }

    fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Value)) -> &Self {
        let mut json = serde_json::from_slice(&self.read(file)).unwrap();
        edit(&mut json);
        self.write(file, json.to_string())
    }

    fn set_config(&self, field: &str, value: Value) -> &Self {
        self.edit_json("config.json", |config| config[field] = value)
    }

    /// Changes the header of the weights, and leaves the tensors' bytes as they are.
    fn edit_header(&self, edit: impl FnOnce(&mut Map<String, Value>)) -> &Self {
        let (header, data) = split_header(&self.read(WEIGHTS));
        let mut header = serde_json::from_slice(&header).unwrap();
        edit(&mut header);
        let header = serde_json::to_vec(&header).unwrap();
        self.write(WEIGHTS, join_header(&header, &data))
    }

    /// The program on this checkpoint.
    fn program(&self) -> Command {
        on(program(), self.dir())
    }

    /// Runs one good request.
    fn run(&self) -> Ran {
        run(&mut self.program(), good_line().as_bytes())
    }
}

/// The JSON of a safetensors file, and what follows it.
fn split_header(file: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (header.to_vec(), data.to_vec())
}

fn join_header(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// The names of a header's tensors in the order of their bytes.
fn in_file_order(header: &Map<String, Value>) -> Vec<String> {
    let mut names: Vec<&String> = header
        .keys()
        .filter(|name| *name != "__metadata__")
        .collect();
    names.sort_by_key(|name| header[*name]["data_offsets"][0].as_u64());
    names.into_iter().cloned().collect()
}

fn on(mut command: Command, model: impl AsRef<std::ffi::OsStr>) -> Command {
    command.arg("--model").arg(model);
    on_cpu(command)
}

/// The program on the undamaged checkpoint.
fn sound(arguments: &[&str]) -> Command {
    let mut command = on(program(), golden(ONE_FILE).dir);
    command.args(arguments);
    command
}

/// The same on some ranks.
fn sound_on(ranks: usize, arguments: &[&str]) -> Command {
    let mut command = on(mpirun(ranks), golden(ONE_FILE).dir);
    command.args(arguments);
    command
}

/// A request that can be answered.
fn good_line() -> String {
    token_request(&[1, 2, 3], 2)
}

fn words_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// However a run ended: no panic, no signal.
#[track_caller]
fn ended_in_order(ran: &Ran, what: &str) {
    for word in ["panicked", "this is a bug", "RUST_BACKTRACE"] {
        assert!(!ran.stderr.contains(word), "{what}: {}", ran.stderr);
    }
    assert!(
        (0..=SOME_LINES_FAILED).contains(&ran.status),
        "{what}: status {}: {}",
        ran.status,
        ran.stderr
    );
}

/// The run did not happen: no output, this exit status, and a message with all these words.
#[track_caller]
fn refused(ran: &Ran, status: i32, words: &[&str]) {
    ended_in_order(ran, "refusal");
    assert_eq!(ran.status, status, "{}", ran.stderr);
    assert_eq!(ran.stdout, "", "{}", ran.stderr);
    for word in words {
        assert!(
            ran.stderr.contains(word),
            "no \"{word}\" in: {}",
            ran.stderr
        );
    }
}

/// Runs good lines around a bad one: they are answered, and an error object with this code and these
/// words stands in the bad one's place. Returns it.
#[track_caller]
fn refused_line(command: &mut Command, bad: impl AsRef<[u8]>, code: &str, words: &[&str]) -> Value {
    let good = good_line();
    let input = [good.as_bytes(), bad.as_ref(), b"\n", good.as_bytes()].concat();
    let ran = run(command.args(["--format", "jsonl"]), &input);
    ended_in_order(&ran, code);
    assert_eq!(ran.status, SOME_LINES_FAILED, "{}", ran.stderr);
    let lines = ran.json_lines();
    assert_eq!(lines.len(), 3, "{}", ran.stdout);
    for good in [&lines[0], &lines[2]] {
        let ids = good["choices"][0]["token_ids"].as_array();
        assert_eq!(ids.map(Vec::len), Some(2), "{good}");
    }
    let error = lines[1]["error"].clone();
    assert_eq!(error["line"], 2, "{error}");
    assert_eq!(error["code"], code, "{error}");
    let message = error["message"].as_str().unwrap();
    for word in words {
        assert!(message.contains(word), "no \"{word}\" in: {message}");
        assert!(
            ran.stderr.contains(word),
            "no \"{word}\" in: {}",
            ran.stderr
        );
    }
    error
}

// --- The weights ---

#[test]
fn a_missing_weight_file_says_what_names_were_looked_for() {
    let copy = Checkpoint::of(ONE_FILE);
    refused(
        &copy.remove(WEIGHTS).run(),
        RUN_FAILED,
        &["no weights here", WEIGHTS, "import"],
    );
}

#[test]
fn a_file_too_short_for_a_header_length_says_how_short() {
    let copy = Checkpoint::of(ONE_FILE);
    refused(
        &copy.write(WEIGHTS, [1, 2]).run(),
        RUN_FAILED,
        &[WEIGHTS, "at least 8 bytes", "found 2"],
    );
}

#[test]
fn a_truncated_header_says_how_long_the_file_should_be() {
    let copy = Checkpoint::of(ONE_FILE);
    let whole = copy.read(WEIGHTS);
    let (header, _) = split_header(&whole);
    let expected = format!("expected at least {} bytes", 8 + header.len());
    refused(
        &copy.write(WEIGHTS, &whole[..100]).run(),
        RUN_FAILED,
        &[WEIGHTS, "ends inside its header", &expected, "found 100"],
    );
}

#[test]
fn an_oversized_header_is_refused_before_it_is_read() {
    let copy = Checkpoint::of(ONE_FILE);
    let whole = copy.read(WEIGHTS);
    let oversized = [&(1u64 << 40).to_le_bytes(), &whole[8..]].concat();
    refused(
        &copy.write(WEIGHTS, oversized).run(),
        RUN_FAILED,
        &[WEIGHTS, "1099511627776 bytes", "more than the 100000000"],
    );
}

#[test]
fn a_header_that_is_not_json_says_so() {
    let copy = Checkpoint::of(ONE_FILE);
    let (mut header, data) = split_header(&copy.read(WEIGHTS));
    header[0] = b'x';
    refused(
        &copy.write(WEIGHTS, join_header(&header, &data)).run(),
        RUN_FAILED,
        &[WEIGHTS, "not a safetensors header", "column 1"],
    );
}

#[test]
fn weights_cut_short_say_how_many_bytes_are_missing() {
    let copy = Checkpoint::of(ONE_FILE);
    let whole = copy.read(WEIGHTS);
    let (expected, found) = (whole.len(), whole.len() - 100);
    refused(
        &copy.write(WEIGHTS, &whole[..found]).run(),
        RUN_FAILED,
        &[
            WEIGHTS,
            "shorter than its header says",
            &format!("expected {expected} bytes, found {found}"),
        ],
    );
}

#[test]
fn overlapping_tensors_are_named() {
    let copy = Checkpoint::of(ONE_FILE);
    let mut moved = String::new();
    copy.edit_header(|header| {
        moved = in_file_order(header)[3].clone();
        for offset in header[&moved]["data_offsets"].as_array_mut().unwrap() {
            *offset = json!(offset.as_u64().unwrap() - 4);
        }
    });
    refused(&copy.run(), RUN_FAILED, &[WEIGHTS, &moved, "overlaps"]);
}

#[test]
fn a_tensor_beyond_a_hole_is_named() {
    let copy = Checkpoint::of(ONE_FILE);
    let mut moved = String::new();
    copy.edit_header(|header| {
        moved = in_file_order(header).pop().unwrap();
        for offset in header[&moved]["data_offsets"].as_array_mut().unwrap() {
            *offset = json!(offset.as_u64().unwrap() + 1_000_000);
        }
    });
    refused(&copy.run(), RUN_FAILED, &[WEIGHTS, &moved, "hole"]);
}

#[test]
fn offsets_beyond_the_end_of_the_file_are_refused() {
    let copy = Checkpoint::of(ONE_FILE);
    copy.edit_header(|header| {
        let last = in_file_order(header).pop().unwrap();
        let [begin, end] = [0, 1].map(|at| header[&last]["data_offsets"][at].as_u64().unwrap());
        let rows = header[&last]["shape"][0].as_u64().unwrap();
        header[&last]["data_offsets"][1] = json!(begin + 100 * (end - begin));
        header[&last]["shape"][0] = json!(100 * rows);
    });
    refused(
        &copy.run(),
        RUN_FAILED,
        &[WEIGHTS, "shorter than its header says"],
    );
}

#[test]
fn a_wrong_shape_is_shown_beside_the_right_one() {
    let copy = Checkpoint::of(ONE_FILE);
    copy.edit_header(|header| header[SCALES]["shape"] = json!([1, 128]));
    refused(
        &copy.run(),
        RUN_FAILED,
        &[WEIGHTS, SCALES, "[1, 128]", "[128, 1]"],
    );
}

#[test]
fn a_wrong_dtype_is_named() {
    let copy = Checkpoint::of(ONE_FILE);
    copy.edit_header(|header| header[CODES]["dtype"] = json!("I32"));
    refused(&copy.run(), RUN_FAILED, &[WEIGHTS, CODES, "I32", "U32"]);
}

#[test]
fn missing_scales_are_named_and_not_the_shape_of_the_codes() {
    let copy = Checkpoint::of(ONE_FILE);
    copy.edit_header(|header| {
        let entry = header.remove(SCALES).unwrap();
        header.insert("model.layers.2.mlp.gate_proj.scale".into(), entry);
    });
    let ran = copy.run();
    refused(
        &ran,
        RUN_FAILED,
        &[WEIGHTS, &format!("no tensor `{SCALES}`"), CODES],
    );
    assert!(!ran.stderr.contains("shape"), "{}", ran.stderr);
}

#[test]
fn codes_without_a_format_in_the_configuration_say_so() {
    let copy = Checkpoint::of(ONE_FILE);
    copy.edit_json("config.json", |config| {
        let fields = config.as_object_mut().unwrap();
        fields.remove("quantization").unwrap();
        fields.remove("quantization_config").unwrap();
    });
    refused(
        &copy.run(),
        RUN_FAILED,
        &[WEIGHTS, "quantised codes", "`quantization`", "config.json"],
    );
}

#[test]
fn a_missing_tensor_is_named() {
    let copy = Checkpoint::of(ONE_FILE);
    copy.edit_header(|header| {
        let entry = header.remove(CODES).unwrap();
        header.insert("model.layers.2.mlp.gate.weight".into(), entry);
    });
    refused(
        &copy.run(),
        RUN_FAILED,
        &["no tensor", CODES, "[128, 16]", "config.json"],
    );
}

#[test]
fn a_tensor_that_the_model_has_no_use_for_is_named() {
    let copy = Checkpoint::of(ONE_FILE);
    let whole = copy.read(WEIGHTS);
    let (header, data) = split_header(&whole);
    let mut header: Value = serde_json::from_slice(&header).unwrap();
    header["model.layers.2.mlp.router.weight"] =
        json!({"dtype": "F32", "shape": [2], "data_offsets": [data.len(), data.len() + 8]});
    let data = [data.as_slice(), &[0; 8]].concat();
    copy.write(WEIGHTS, join_header(header.to_string().as_bytes(), &data));
    refused(
        &copy.run(),
        RUN_FAILED,
        &[
            WEIGHTS,
            "no use for",
            "model.layers.2.mlp.router.weight",
            "qwen3",
        ],
    );
}

#[test]
fn an_index_that_names_a_file_that_is_not_there_says_which() {
    let copy = Checkpoint::of(TWO_FILES);
    refused(
        &copy.remove(SECOND_FILE).run(),
        RUN_FAILED,
        &[INDEX, SECOND_FILE, "not there"],
    );
}

#[test]
fn an_index_cannot_name_a_file_elsewhere() {
    let copy = Checkpoint::of(TWO_FILES);
    let elsewhere = "../elsewhere.safetensors";
    copy.edit_json(INDEX, |index| {
        index["weight_map"]["model.norm.weight"] = json!(elsewhere);
    });
    refused(
        &copy.run(),
        RUN_FAILED,
        &[INDEX, "model.norm.weight", elsewhere],
    );
}

// --- The configuration ---

#[test]
fn an_unknown_model_type_is_named_beside_the_known_ones() {
    let copy = Checkpoint::of(ONE_FILE);
    refused(
        &copy.set_config("model_type", json!("mixtral")).run(),
        RUN_FAILED,
        &[
            "config.json",
            "model_type",
            "mixtral",
            "llama, qwen2 and qwen3",
        ],
    );
}

#[test]
fn every_field_without_a_default_is_named_when_it_is_missing() {
    for field in [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
    ] {
        let copy = Checkpoint::of(ONE_FILE);
        copy.edit_json("config.json", |config| {
            config.as_object_mut().unwrap().remove(field).unwrap();
        });
        let field = format!("`{field}` is missing");
        refused(&copy.run(), RUN_FAILED, &["config.json", &field]);
    }
}

#[test]
fn a_field_of_the_wrong_type_is_shown() {
    let copy = Checkpoint::of(ONE_FILE);
    refused(
        &copy.set_config("hidden_size", json!("64")).run(),
        RUN_FAILED,
        &["config.json", "`hidden_size` is \"64\"", "integer"],
    );
}

#[test]
fn a_feature_that_is_not_there_is_refused_by_its_field() {
    for (field, value) in [
        ("hidden_act", json!("gelu")),
        ("final_logit_softcapping", json!(30.0)),
        ("use_sliding_window", json!(true)),
    ] {
        let copy = Checkpoint::of(ONE_FILE);
        let words = ["config.json", &format!("`{field}`"), "does not implement"];
        refused(&copy.set_config(field, value).run(), RUN_FAILED, &words);
    }
}

#[test]
fn a_bad_end_id_is_blamed_on_the_file_that_holds_it() {
    let copy = Checkpoint::of(ONE_FILE);
    copy.write("generation_config.json", r#"{"eos_token_id": "x"}"#);
    let ran = copy.run();
    let words = "generation_config.json: `eos_token_id` is \"x\"";
    refused(&ran, RUN_FAILED, &[words]);
}

/// Makes a named pipe, which nobody writes to.
fn make_pipe(path: &Path) {
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the name is a string that ends with a zero byte.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0, "{path:?}");
}

#[test]
fn a_pipe_in_place_of_a_file_is_not_waited_for() {
    for file in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        INDEX,
        WEIGHTS,
    ] {
        let copy = Checkpoint::of(ONE_FILE);
        if file.starts_with("chat") || file == "tokenizer_config.json" {
            copy.write("tokenizer.json", SMALL_TOKENIZER);
        }
        let path = copy.dir().join(file);
        let _ = std::fs::remove_file(&path);
        make_pipe(&path);
        let ran = copy.run();
        refused(&ran, RUN_FAILED, &[file, "not a regular file"]);
        assert!(ran.took < GONE_WITHIN, "{file}: took {:?}", ran.took);
    }
}

#[test]
fn a_configuration_that_is_not_json_says_where_it_stops() {
    let copy = Checkpoint::of(ONE_FILE);
    refused(
        &copy.write("config.json", "{\"a\": 1,,}").run(),
        RUN_FAILED,
        &["config.json is not JSON", "line 1 column 9"],
    );
}

#[test]
fn a_directory_without_a_configuration_says_so() {
    let copy = Checkpoint::of(ONE_FILE);
    let dir = copy.dir().to_str().unwrap().to_owned();
    refused(
        &copy.remove("config.json").run(),
        RUN_FAILED,
        &[&dir, "no config.json"],
    );
}

#[test]
fn a_tokenizer_that_is_not_json_names_its_file() {
    let copy = Checkpoint::of(ONE_FILE);
    refused(
        &copy.write("tokenizer.json", "not JSON").run(),
        RUN_FAILED,
        &["tokenizer.json", "not valid", "anew"],
    );
}

// --- The lines ---

#[test]
fn a_malformed_json_line_fails_alone() {
    refused_line(
        &mut sound(&[]),
        "{\"prompt\": [1,",
        "invalid_json",
        &["not valid JSON", "column 14"],
    );
}

#[test]
fn a_plain_line_that_is_not_utf8_fails_alone() {
    refused_line(
        &mut sound(&[]),
        b"caf\xE9",
        "not_utf8",
        &["not valid UTF-8", "byte 4", "0xE9"],
    );
}

#[test]
fn a_json_line_that_is_not_utf8_fails_alone() {
    refused_line(
        &mut sound(&[]),
        b"{\"prompt\": \"caf\xE9\"}",
        "not_utf8",
        &["not valid UTF-8", "byte 16", "0xE9"],
    );
}

#[test]
fn a_line_in_a_plain_run_gets_its_error_as_text_in_its_place() {
    let good = good_line();
    let input = [b"caf\xE9\n", good.as_bytes()].concat();
    let ran = run(&mut sound(&[]), &input);
    assert_eq!(ran.status, SOME_LINES_FAILED, "{}", ran.stderr);
    let first = ran.stdout.lines().next().unwrap();
    assert!(
        first.starts_with("error: line 1: not valid UTF-8"),
        "{first}"
    );
    assert!(ran.stdout.contains("\"token_ids\":["), "{}", ran.stdout);
}

#[test]
fn several_choices_are_refused_for_that_line() {
    let error = refused_line(
        &mut sound(&[]),
        r#"{"prompt": [1], "n": 2}"#,
        "unsupported_field",
        &["`n`", "must be 1 in a line", "found 2"],
    );
    assert_eq!(error["param"], "n");
}

#[test]
fn a_negative_temperature_is_refused_for_that_line() {
    let error = refused_line(
        &mut sound(&[]),
        r#"{"prompt": [1], "temperature": -0.5}"#,
        "invalid_value",
        &["`temperature`", "between 0 and 2", "found -0.5"],
    );
    assert_eq!(error["param"], "temperature");
}

#[test]
fn a_misspelt_field_is_refused_for_that_line() {
    refused_line(
        &mut sound(&[]),
        r#"{"prompt": [1], "temprature": 1}"#,
        "unknown_field",
        &["`temprature`", "not a known field"],
    );
}

#[test]
fn a_bad_batch_line_keeps_its_id() {
    let line = json!({"custom_id": "q7", "method": "POST", "url": "/v1/completions",
        "body": {"prompt": [1], "n": 2}});
    let good = good_line();
    let ran = run(&mut sound(&[]), format!("{good}{line}\n{good}").as_bytes());
    assert_eq!(ran.status, SOME_LINES_FAILED, "{}", ran.stderr);
    let lines = ran.json_lines();
    assert_eq!(lines[1]["custom_id"], "q7");
    assert_eq!(lines[1]["response"]["status_code"], 400);
    assert_eq!(lines[1]["error"]["param"], "n");
    assert_eq!(lines[1]["error"]["line"], 2);
    assert!(lines[2]["choices"].is_array(), "{}", lines[2]);
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_for_that_line() {
    refused_line(
        &mut sound(&["--context", "8"]),
        token_request(&[1; 9], 2).trim(),
        "context_length_exceeded",
        &["9 tokens", "context of 8", "--context"],
    );
}

#[test]
fn a_prompt_longer_than_the_model_is_refused_for_that_line() {
    refused_line(
        &mut sound(&[]),
        token_request(&[1; 1500], 2).trim(),
        "context_length_exceeded",
        &["1500 tokens", "context of 1024"],
    );
}

#[test]
fn a_token_outside_the_vocabulary_is_refused_for_that_line() {
    refused_line(
        &mut sound(&[]),
        token_request(&[1, 256], 2).trim(),
        "token_out_of_vocabulary",
        &["token id 256", "vocabulary of 256"],
    );
}

#[test]
fn a_negative_token_is_refused_for_that_line() {
    refused_line(
        &mut sound(&[]),
        r#"{"prompt": [1, -1]}"#,
        "invalid_type",
        &["prompt[1]", "found -1"],
    );
}

#[test]
fn text_needs_a_tokenizer() {
    for line in [
        "Hello",
        r#"{"prompt": "Hello"}"#,
        r#"{"messages": [{"role": "user", "content": "Hello"}]}"#,
    ] {
        refused_line(
            &mut sound(&[]),
            line,
            "prompt_not_tokenizable",
            &["no tokenizer.json", "token ids"],
        );
    }
}

#[test]
fn empty_input_is_bad_usage() {
    for input in ["", "\n", "\r\n  \n\n"] {
        let ran = run(&mut sound(&[]), input.as_bytes());
        refused(&ran, BAD_USAGE, &["no prompts on standard input"]);
    }
}

// --- The command line ---

#[test]
fn a_negative_temperature_on_the_command_line_is_bad_usage() {
    for arguments in [&["--temperature=-1"][..], &["--temperature", "-1"]] {
        let ran = run(&mut sound(arguments), b"");
        refused(
            &ran,
            BAD_USAGE,
            &["temperature", "between 0 and 2", "found -1"],
        );
    }
}

#[test]
fn an_unknown_option_is_bad_usage() {
    let ran = run(&mut sound(&["--frobnicate"]), b"");
    refused(&ran, BAD_USAGE, &["--frobnicate", "Usage"]);
}

#[test]
fn an_unknown_strategy_is_named_beside_the_known_ones() {
    let ran = run(&mut sound(&["--strategy", "fastest"]), b"");
    refused(&ran, BAD_USAGE, &["fastest", "memory-proportional"]);
}

#[test]
fn a_run_without_a_model_says_the_ways_to_name_one() {
    let ran = run(&mut program(), good_line().as_bytes());
    refused(
        &ran,
        BAD_USAGE,
        &["no model given", "--model", "MLX_PIPE_MODEL", "model_name"],
    );
}

#[test]
fn a_model_that_does_not_exist_is_named() {
    let ran = run(&mut on(program(), "/no/such/model"), b"");
    refused(
        &ran,
        BAD_USAGE,
        &["no directory", "/no/such/model", "--model"],
    );
}

#[test]
fn a_model_that_is_a_file_points_to_import() {
    let file = golden(ONE_FILE).dir.join("config.json");
    let ran = run(&mut on(program(), &file), b"");
    refused(
        &ran,
        BAD_USAGE,
        &[file.to_str().unwrap(), "is a file", "mlx-pipe import"],
    );
}

#[test]
fn a_model_that_is_not_cached_says_where_the_cache_is() {
    let home = tempfile::tempdir().unwrap();
    let mut command = on(program(), "mlx-community/not-cached");
    command
        .env("HF_HOME", home.path())
        .env("HF_HUB_OFFLINE", "1");
    refused(
        &run(&mut command, b""),
        RUN_FAILED,
        &[
            "mlx-community/not-cached",
            "not in the Hugging Face cache",
            home.path().to_str().unwrap(),
            "HF_HUB_OFFLINE",
        ],
    );
}

#[test]
fn a_context_above_the_models_is_bad_usage() {
    let ran = run(&mut sound(&["--context", "1025"]), good_line().as_bytes());
    refused(&ran, BAD_USAGE, &["--context 1025", "1024"]);
}

#[test]
fn a_model_that_does_not_fit_is_a_table_of_what_each_rank_lacks() {
    let ran = run(
        &mut sound_on(3, &["--memory-limit", "500KB"]),
        good_line().as_bytes(),
    );
    refused(
        &ran,
        RUN_FAILED,
        &[
            "does not fit",
            "3 of 3 ranks",
            "balanced",
            "what would fit",
            "--context",
        ],
    );
    let table: Vec<Vec<&str>> = ran
        .stderr
        .lines()
        .map(|line| line.split_whitespace().collect())
        .skip_while(|cells: &Vec<&str>| cells.first() != Some(&"rank"))
        .collect();
    assert!(table[0].contains(&"needs") && table[0].contains(&"lacks"));
    for (rank, layers) in ["0-1", "2-3", "4-5"].into_iter().enumerate() {
        assert_eq!(table[rank + 1][0], rank.to_string(), "{}", ran.stderr);
        assert_eq!(table[rank + 1][2], layers, "{}", ran.stderr);
    }
}

#[test]
fn layers_by_hand_must_cover_the_model_once() {
    for (layers, words) in [
        ("0-1,3-4,5", ["gap", "rank 1", "layer 2"]),
        ("0-2,2-4,5", ["overlap", "rank 1", "layer 2"]),
        ("0-2,3-5", ["2 layer ranges", "3 ranks", "one range a rank"]),
        (
            "0-1,2-3,4",
            ["layer 5 is on no rank", "6 layers", "before layer 5"],
        ),
        ("0-1,2-3,4-6", ["6 layers", "layer 6", "last one is 5"]),
    ] {
        let ran = run(
            &mut sound_on(3, &["--layers", layers]),
            good_line().as_bytes(),
        );
        refused(&ran, BAD_USAGE, &words);
    }
}

#[test]
fn layers_that_run_backwards_are_bad_usage() {
    let ran = run(&mut sound(&["--layers", "3-0,4-5"]), b"");
    refused(&ran, BAD_USAGE, &["--layers", "rank 0", "3-0"]);
}

#[test]
fn more_ranks_than_layers_say_how_many_may_start() {
    let ran = run(&mut sound_on(7, &[]), good_line().as_bytes());
    refused(&ran, BAD_USAGE, &["7 ranks for 6 layers", "mpirun -np 6"]);
}

// --- plan ---

#[test]
fn a_plan_for_what_cannot_be_asked_is_bad_usage() {
    let model = golden(ONE_FILE).dir;
    let model = model.to_str().unwrap();
    for (arguments, words) in [
        (
            &["--model", model, "--ranks", "7"][..],
            "7 ranks for 6 layers",
        ),
        (
            &["--model", model, "--layers", "0-2,3-5"],
            "--layers gives 2 layer ranges for 1 rank",
        ),
        (
            &["--model", model, "--layers", "0-4"],
            "layer 5 is on no rank",
        ),
        (&["--model", model, "--context", "1025"], "--context 1025"),
        (
            &["--model", model, "--cluster", "/no/such.json"],
            "/no/such.json",
        ),
        (&["--model", "/no/such/model"], "no directory"),
        (&[], "no model given"),
    ] {
        let ran = run(program().arg("plan").args(arguments), b"");
        refused(&ran, BAD_USAGE, &[words]);
    }
}

#[test]
fn a_plan_that_does_not_fit_is_no_bad_usage() {
    let mut command = program();
    command.arg("plan").arg("--model").arg(golden(ONE_FILE).dir);
    let ran = run(command.args(["--memory-limit", "100KB"]), b"");
    refused(&ran, RUN_FAILED, &["does not fit", "0.1 MB"]);
}

// --- The cluster file ---

/// Runs with a cluster file of this text.
fn with_cluster(command: &mut Command, text: impl AsRef<[u8]>) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("cluster.json");
    std::fs::write(&file, text).unwrap();
    let ran = run(command.arg("--cluster").arg(&file), good_line().as_bytes());
    assert!(ran.stderr.contains("cluster.json"), "{}", ran.stderr);
    ran
}

/// A cluster file of hosts that are not this one.
fn other_hosts() -> String {
    let device = |name: &str| json!({"hostname": format!("{name}.invalid"), "capabilities": {"memory_gb": 16}});
    json!({"devices": [device("mini1"), device("mini2")]}).to_string()
}

#[test]
fn a_host_that_the_cluster_file_does_not_name_is_named() {
    refused(
        &with_cluster(&mut sound(&[]), other_hosts()),
        BAD_USAGE,
        &["unknown host", "rank 0", "mini1.invalid", "mini2.invalid"],
    );
}

#[test]
fn a_cluster_file_for_another_number_of_ranks_says_both_numbers() {
    refused(
        &with_cluster(&mut sound(&[]), r#"{"model_parallel_size": 4}"#),
        BAD_USAGE,
        &["model_parallel_size is 4", "ranks is 1", "mpirun -np 4"],
    );
}

#[test]
fn a_cluster_file_with_a_wrong_field_names_it() {
    let text = json!({"devices": [{"hostname": "a", "capabilities": {"memory_gb": "16"}}]});
    refused(
        &with_cluster(&mut sound(&[]), text.to_string()),
        BAD_USAGE,
        &["devices[0].capabilities.memory_gb", "\"16\""],
    );
}

#[test]
fn a_cluster_file_that_is_not_json_says_where_it_stops() {
    refused(
        &with_cluster(&mut sound(&[]), "{\"devices\":"),
        BAD_USAGE,
        &["cluster.json", "line 1 column 11"],
    );
}

#[test]
fn a_cluster_file_that_is_not_there_is_named() {
    let ran = run(&mut sound(&["--cluster", "/no/such/cluster.json"]), b"");
    refused(
        &ran,
        BAD_USAGE,
        &["cluster file", "/no/such/cluster.json", "No such file"],
    );
    assert_eq!(
        ran.stderr.matches("No such file").count(),
        1,
        "{}",
        ran.stderr
    );
}

// --- import ---

fn import(gguf: &Path, out: &Path) -> Ran {
    run(program().arg("import").arg(gguf).arg(out), b"")
}

#[test]
fn import_refuses_what_is_not_gguf_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (
        golden(ONE_FILE).dir.join("config.json"),
        dir.path().join("out"),
    );
    let ran = import(&source, &out);
    refused(
        &ran,
        RUN_FAILED,
        &[source.to_str().unwrap(), "not a GGUF file", "\"GGUF\""],
    );
    assert!(!out.exists());
}

#[test]
fn import_names_a_file_that_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let ran = import(Path::new("/no/such.gguf"), &dir.path().join("out"));
    refused(&ran, RUN_FAILED, &["/no/such.gguf", "No such file"]);
}

#[test]
fn import_says_what_is_no_file_and_what_is_empty() {
    let dir = tempfile::tempdir().unwrap();
    let (empty, out) = (dir.path().join("empty.gguf"), dir.path().join("out"));
    std::fs::write(&empty, "").unwrap();
    refused(&import(&empty, &out), RUN_FAILED, &["the file is empty"]);
    refused(&import(dir.path(), &out), RUN_FAILED, &["is a directory"]);
    assert!(!out.exists());
}

#[test]
fn import_refuses_a_file_cut_short() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("model.gguf"), dir.path().join("out"));
    let whole = gguf::model("llama").build();
    std::fs::write(&source, &whole[..whole.len() / 2]).unwrap();
    let ran = import(&source, &out);
    refused(&ran, RUN_FAILED, &[source.to_str().unwrap()]);
    assert!(!out.exists());
    std::fs::write(&source, &whole).unwrap();
    import(&source, &out).succeeded();
}

#[test]
fn import_leaves_a_checkpoint_that_is_there_alone() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("model.gguf");
    std::fs::write(&source, gguf::model("llama").build()).unwrap();
    let copy = Checkpoint::of(ONE_FILE);
    let (config, weights) = (copy.read("config.json"), copy.read(WEIGHTS));
    let ran = import(&source, copy.dir());
    refused(
        &ran,
        RUN_FAILED,
        &[copy.dir().to_str().unwrap(), "already holds"],
    );
    assert_eq!(copy.read("config.json"), config);
    assert_eq!(copy.read(WEIGHTS), weights);
}

// --- Several ranks ---

/// Three ranks refuse: the words stand on standard error exactly once, and nobody waits.
#[track_caller]
fn refused_once(mut command: Command, input: &str, status: i32, words: &str) {
    let ran = run(&mut command, input.as_bytes());
    refused(&ran, status, &[words]);
    assert_eq!(ran.stderr.matches(words).count(), 1, "{}", ran.stderr);
    assert!(ran.took < GONE_WITHIN, "{words}: took {:?}", ran.took);
}

#[test]
fn damage_that_all_ranks_see_is_told_once() {
    let damaged = |damage: fn(&Checkpoint) -> &Checkpoint, words: &str| {
        let copy = Checkpoint::of(ONE_FILE);
        damage(&copy);
        refused_once(on(mpirun(3), copy.dir()), &good_line(), RUN_FAILED, words);
    };
    damaged(|copy| copy.remove(WEIGHTS), "no weights here");
    damaged(|copy| copy.write(WEIGHTS, [1, 2]), "at least 8 bytes");
    damaged(|copy| copy.write("config.json", "{"), "is not JSON");
    damaged(
        |copy| copy.set_config("model_type", json!("mixtral")),
        "mixtral",
    );
    damaged(
        |copy| copy.set_config("num_hidden_layers", json!(5)),
        "no use for",
    );
    // Rank 0 alone reads this one.
    damaged(|copy| copy.write("tokenizer.json", "not JSON"), "not valid");
}

#[test]
fn wrong_usage_that_all_ranks_see_is_told_once() {
    for (arguments, status, words) in [
        (["--frobnicate", "1"], BAD_USAGE, "unexpected argument"),
        (["--max-tokens", "0"], BAD_USAGE, "must be 1 or more"),
        (["--context", "1025"], BAD_USAGE, "--context 1025"),
        (["--layers", "0-1,3-4,5"], BAD_USAGE, "gap before rank 1"),
        (["--memory-limit", "100KB"], RUN_FAILED, "does not fit"),
    ] {
        refused_once(sound_on(3, &arguments), &good_line(), status, words);
    }
    refused_once(mpirun(3), &good_line(), BAD_USAGE, "no model given");
    refused_once(
        on(mpirun(3), "/no/such/model"),
        &good_line(),
        BAD_USAGE,
        "no directory",
    );
    refused_once(
        sound_on(3, &[]),
        "",
        BAD_USAGE,
        "no prompts on standard input",
    );
}

#[test]
fn a_cluster_file_that_does_not_suit_the_ranks_is_told_once() {
    for (text, words) in [
        (other_hosts(), "unknown host"),
        (r#"{"model_parallel_size": 4}"#.into(), "ranks is 3"),
        ("{".into(), "line 1 column 1"),
    ] {
        let ran = with_cluster(&mut sound_on(3, &[]), text);
        refused(&ran, BAD_USAGE, &[words]);
        assert_eq!(ran.stderr.matches(words).count(), 1, "{}", ran.stderr);
        assert!(ran.took < GONE_WITHIN, "{words}: took {:?}", ran.took);
    }
}

#[test]
fn a_bad_line_on_three_ranks_fails_alone() {
    refused_line(
        &mut sound_on(3, &[]),
        "{\"prompt\": [1,",
        "invalid_json",
        &["column 14"],
    );
}

/// Three ranks, each in its own directory, all asked for `--model m`.
fn in_directories(dirs: [&Path; 3]) -> Command {
    common::one_rank_in_each(&dirs, &["--model", "m", "--device", "cpu"])
}

/// Two hosts' worth of directories, each with a copy of the checkpoint called `m`.
struct TwoHosts {
    _keep: TempDir,
    hosts: [PathBuf; 2],
}

impl TwoHosts {
    fn new() -> Self {
        let keep = tempfile::tempdir().unwrap();
        let hosts = ["a", "b"].map(|host| keep.path().join(host));
        for host in &hosts {
            std::fs::create_dir(host).unwrap();
            let copy = Checkpoint::of(ONE_FILE).0.keep();
            std::fs::rename(copy, host.join("m")).unwrap();
        }
        Self { _keep: keep, hosts }
    }

    /// Ranks 0 and 2 on the first host, rank 1 on the second.
    fn run(&self) -> Ran {
        let [a, b] = &self.hosts;
        run(&mut in_directories([a, b, a]), good_line().as_bytes())
    }

    fn second(&self, file: &str) -> PathBuf {
        self.hosts[1].join("m").join(file)
    }
}

#[test]
fn ranks_whose_checkpoints_are_equal_run() {
    assert_eq!(TwoHosts::new().run().succeeded().json_lines().len(), 1);
}

#[test]
fn ranks_whose_configurations_differ_are_named() {
    let hosts = TwoHosts::new();
    let config = hosts.second("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text + "\n").unwrap();
    let ran = hosts.run();
    refused(
        &ran,
        RUN_FAILED,
        &["do not have the same config.json", "rank 1", "copy"],
    );
    assert!(!ran.stderr.contains("rank 2"), "{}", ran.stderr);
    assert_eq!(ran.stderr.matches("do not have the same").count(), 1);
    assert!(ran.took < GONE_WITHIN, "took {:?}", ran.took);
}

#[test]
fn ranks_whose_weights_differ_are_named() {
    let hosts = TwoHosts::new();
    let weights = hosts.second(WEIGHTS);
    let (header, data) = split_header(&std::fs::read(&weights).unwrap());
    let header = [header.as_slice(), b" "].concat();
    std::fs::write(&weights, join_header(&header, &data)).unwrap();
    let ran = hosts.run();
    refused(
        &ran,
        RUN_FAILED,
        &["do not have the same weights", "rank 1", "copy"],
    );
    assert!(!ran.stderr.contains("rank 2"), "{}", ran.stderr);
    assert!(ran.took < GONE_WITHIN, "took {:?}", ran.took);
}

#[test]
fn a_rank_whose_checkpoint_alone_is_damaged_is_named() {
    let hosts = TwoHosts::new();
    let weights = hosts.second(WEIGHTS);
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 4]).unwrap();
    let ran = hosts.run();
    refused(
        &ran,
        RUN_FAILED,
        &["rank 1", WEIGHTS, "shorter than its header says"],
    );
    assert_eq!(ran.stderr.matches("shorter than").count(), 1);
    assert!(!ran.stderr.contains("rank 0"), "{}", ran.stderr);
}

#[test]
fn a_rank_without_the_checkpoint_is_named() {
    let hosts = TwoHosts::new();
    std::fs::remove_dir_all(hosts.hosts[1].join("m")).unwrap();
    let ran = hosts.run();
    refused(&ran, BAD_USAGE, &["rank 1", "no directory"]);
    assert_eq!(ran.stderr.matches("no directory").count(), 1);
}

// --- Anything at all ---

/// Numbers without a pattern, the same in every run (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    /// Bytes changed, lost, doubled or cut off.
    fn damage_bytes(&mut self, bytes: &[u8]) -> Vec<u8> {
        let at = self.below(bytes.len());
        let end = (at + 1 + self.below(16)).min(bytes.len());
        let (head, part, tail) = (&bytes[..at], &bytes[at..end], &bytes[end..]);
        match self.below(4) {
            0 => [head, &[self.next() as u8], &bytes[at + 1..]].concat(),
            1 => [head, tail].concat(),
            2 => [head, part, part, tail].concat(),
            _ => head.to_vec(),
        }
    }

    /// One value anywhere in the JSON replaced by one that nobody expects there.
    fn damage_value(&mut self, value: &mut Value) {
        let stop = self.below(6) == 0;
        match value {
            Value::Object(fields) if !stop && !fields.is_empty() => {
                let at = self.below(fields.len());
                self.damage_value(fields.values_mut().nth(at).unwrap());
            }
            Value::Array(items) if !stop && !items.is_empty() => {
                let at = self.below(items.len());
                self.damage_value(&mut items[at]);
            }
            _ => {
                let strange = [
                    json!(null),
                    json!(true),
                    json!(0),
                    json!(-1),
                    json!(3),
                    json!(0.5),
                    json!(1e308),
                    json!(1u64 << 31),
                    json!(u64::MAX),
                    json!(i64::MIN),
                    json!(""),
                    json!("../\u{0}\u{202e}"),
                    json!([]),
                    json!([[]]),
                    json!({}),
                    json!([u64::MAX, 1, 2]),
                ];
                *value = strange[self.below(strange.len())].clone();
            }
        }
    }

    /// JSON text damaged in one of both ways.
    fn damage_json(&mut self, text: &[u8]) -> Vec<u8> {
        if self.below(3) == 0 {
            return self.damage_bytes(text);
        }
        let mut json: Value = serde_json::from_slice(text).unwrap();
        self.damage_value(&mut json);
        json.to_string().into_bytes()
    }
}

/// Damages one file of a checkpoint in many ways, and runs each: it ends with one of `statuses`, a
/// refusal names the checkpoint, and not all damage may pass unnoticed.
fn survives_damage(
    name: &str,
    file: &str,
    times: u64,
    statuses: &[i32],
    damage: impl Fn(&[u8], &mut Dice) -> Vec<u8>,
) {
    let copy = Checkpoint::of(name);
    let whole = copy.read(file);
    let mut refused_count = 0;
    for seed in 0..times {
        let damaged = damage(&whole, &mut Dice(seed));
        let shown = words_of(&damaged[..damaged.len().min(2000)]);
        let ran = copy.write(file, damaged).run();
        ended_in_order(&ran, &shown);
        assert!(
            statuses.contains(&ran.status),
            "{}: {}: {shown}",
            ran.status,
            ran.stderr
        );
        if ran.status == RUN_FAILED {
            refused_count += 1;
            let dir = copy.dir().to_str().unwrap();
            assert!(ran.stderr.contains(dir), "{}: {shown}", ran.stderr);
            assert_eq!(ran.stdout, "");
        }
    }
    assert!(
        refused_count * 3 > times,
        "{refused_count} of {times} refused"
    );
}

#[test]
fn a_damaged_header_never_ends_in_a_panic() {
    survives_damage(ONE_FILE, WEIGHTS, 24, &[0, RUN_FAILED], |whole, dice| {
        let (header, data) = split_header(whole);
        match dice.below(4) {
            // The length no longer fits.
            0 => [&whole[..8], &dice.damage_bytes(&header), &data].concat(),
            _ => join_header(&dice.damage_json(&header), &data),
        }
    });
}

#[test]
fn a_damaged_configuration_never_ends_in_a_panic() {
    let statuses = [0, RUN_FAILED, SOME_LINES_FAILED];
    survives_damage(ONE_FILE, "config.json", 24, &statuses, |whole, dice| {
        dice.damage_json(whole)
    });
}

#[test]
fn a_damaged_index_never_ends_in_a_panic() {
    survives_damage(TWO_FILES, INDEX, 12, &[0, RUN_FAILED], |whole, dice| {
        dice.damage_json(whole)
    });
}

#[test]
fn damaged_requests_each_get_an_answer_or_an_error_in_their_place() {
    let request = json!({"prompt": [1, 2, 3], "max_tokens": 3, "temperature": 0.7, "top_p": 0.9,
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 5, "logprobs": 2, "stop": []});
    let chat = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    let batch = json!({"custom_id": "q", "method": "POST", "url": "/v1/completions",
        "body": {"prompt": [4], "max_tokens": 2}});
    let mut failed = 0;
    for seed in 0..12 {
        let mut dice = Dice(seed);
        let mut input = Vec::new();
        for line in [&request, &chat, &batch, &request, &batch] {
            input.extend(dice.damage_json(line.to_string().as_bytes()));
            input.push(b'\n');
        }
        let shown = words_of(&input);
        let asked = shown.lines().filter(|line| !line.trim().is_empty()).count();
        let ran = run(&mut sound(&["--format", "jsonl"]), &input);
        ended_in_order(&ran, &shown);
        assert!(
            [0, SOME_LINES_FAILED].contains(&ran.status),
            "{}: {shown}",
            ran.stderr
        );
        assert_eq!(
            ran.json_lines().len(),
            asked,
            "{}\n{}: {shown}",
            ran.stdout,
            ran.stderr
        );
        failed += i32::from(ran.status == SOME_LINES_FAILED);
    }
    assert!(failed > 6, "{failed} of 12 runs with a failed line");
}
