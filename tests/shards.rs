//! Slices in files of their own, and models that only one host has: the real program on real ranks.

mod common;

use common::{Golden, Ran, golden, golden_requests, run};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

const GOLDEN: &str = "qwen3-tied-8bit";
const GONE_WITHIN: Duration = Duration::from_secs(10);
const PAGE_BYTES: usize = 16 << 10;

/// A directory with a copy of the golden model in `m`.
fn host_with_model(golden: &Golden) -> tempfile::TempDir {
    let host = tempfile::tempdir().unwrap();
    copy_model(golden, &host.path().join("m"));
    host
}

fn copy_model(golden: &Golden, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(&golden.dir).unwrap() {
        let path = entry.unwrap().path();
        if !path
            .file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("golden")
        {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// Three ranks in one directory that keep their slices in `cache` there.
fn three_ranks(host: &Path, arguments: &[&str]) -> Command {
    let all = [
        "--device",
        "cpu",
        "--model",
        "m",
        "--shard-cache",
        "cache",
        "-v",
    ];
    let all = [&all[..], arguments].concat();
    common::one_rank_in_each(&[host, host, host], &all)
}

fn answers(golden: &Golden, ran: &Ran) {
    let tokens = ran.token_ids();
    assert_eq!(tokens.len(), golden.prompts.len(), "{}", ran.stderr);
    for (prompt, tokens) in golden.prompts.iter().zip(tokens) {
        assert_eq!(tokens, prompt.answer(), "{}", ran.stderr);
    }
}

#[track_caller]
fn run_and_compare(golden: &Golden, command: &mut Command) -> Ran {
    let ran = run(command, golden_requests(golden).as_bytes()).succeeded();
    answers(golden, &ran);
    ran
}

fn count(ran: &Ran, what: &str) -> usize {
    ran.stderr.matches(what).count()
}

/// The files of a cache, by their layers: `layers-0-1`.
fn shards(cache: &Path) -> BTreeMap<String, PathBuf> {
    let paths = fs::read_dir(cache)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    paths
        .map(|path| {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            let (key, layers) = name.split_once('-').unwrap();
            assert_eq!(key.len(), 16, "{name}");
            assert_eq!(path.extension().unwrap(), "safetensors", "{name}");
            (layers.to_owned(), path)
        })
        .collect()
}

/// Tensors of a file by name, those that only fill gaps left out.
fn tensors(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors
        .filter(|(name, _)| !name.starts_with(mlx_pipe::checkpoint::PAD_PREFIX))
        .map(|(name, tensor)| (name, tensor.data().to_vec()))
        .collect()
}

#[test]
fn the_files_are_aligned_and_together_hold_one_model() {
    let golden = golden(GOLDEN);
    let host = host_with_model(&golden);
    let ran = run_and_compare(&golden, &mut three_ranks(host.path(), &[]));
    assert_eq!(count(&ran, "shard cache: wrote"), 3, "{}", ran.stderr);
    assert_eq!(count(&ran, "shard cache: read"), 3, "{}", ran.stderr);
    let mut all = BTreeMap::new();
    let files = shards(&host.path().join("cache"));
    assert_eq!(files.len(), 3);
    for path in files.values() {
        let bytes = fs::read(path).unwrap();
        let (header_bytes, header) = SafeTensors::read_metadata(&bytes).unwrap();
        for name in tensors(&bytes).keys() {
            let begin = 8 + header_bytes + header.info(name).unwrap().data_offsets.0;
            assert_eq!(begin % PAGE_BYTES, 0, "{name}");
        }
        for (name, data) in tensors(&bytes) {
            assert_eq!(all.insert(name.clone(), data), None, "{name} twice");
        }
    }
    assert_eq!(
        all,
        tensors(&fs::read(host.path().join("m/model.safetensors")).unwrap())
    );
}

#[test]
fn a_later_start_reads_the_cache_and_no_tensor_of_the_model_directory() {
    let golden = golden(GOLDEN);
    let host = host_with_model(&golden);
    run_and_compare(&golden, &mut three_ranks(host.path(), &[]));

    // Other weights under the old date: nothing tells that they are others, but for reading them.
    let model = host.path().join("m/model.safetensors");
    let date = fs::metadata(&model).unwrap().modified().unwrap();
    overwrite_tensors(&model);
    set_date(&model, date);
    let ran = run_and_compare(&golden, &mut three_ranks(host.path(), &[]));
    assert_eq!(count(&ran, "shard cache: read"), 3, "{}", ran.stderr);
    assert_eq!(count(&ran, "shard cache: wrote"), 0, "{}", ran.stderr);
    assert_ne!(without_cache(&golden, host.path()), expected(&golden));
}

fn expected(golden: &Golden) -> Vec<Vec<u32>> {
    golden
        .prompts
        .iter()
        .map(|prompt| prompt.answer().to_vec())
        .collect()
}

fn without_cache(golden: &Golden, host: &Path) -> Vec<Vec<u32>> {
    let arguments = ["--device", "cpu", "--model", "m"];
    let mut command = common::one_rank_in_each(&[host, host], &arguments);
    run(&mut command, golden_requests(golden).as_bytes())
        .succeeded()
        .token_ids()
}

/// Makes another model of the same shape of a weight file: its tables of codes are turned round.
fn overwrite_tensors(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let (header_bytes, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let codes = header
        .offset_keys()
        .into_iter()
        .filter(|name| name.ends_with("_proj.weight"));
    let ranges: Vec<_> = codes
        .map(|name| header.info(&name).unwrap().data_offsets)
        .collect();
    for (begin, end) in ranges {
        bytes[8 + header_bytes..][begin..end].reverse();
    }
    fs::write(path, bytes).unwrap();
}

fn set_date(path: &Path, date: SystemTime) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_modified(date).unwrap();
}

#[test]
fn slices_of_weights_that_changed_are_not_used() {
    let golden = golden(GOLDEN);
    let host = host_with_model(&golden);
    run_and_compare(&golden, &mut three_ranks(host.path(), &[]));
    let model = host.path().join("m/model.safetensors");
    set_date(
        &model,
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000),
    );
    let ran = run_and_compare(&golden, &mut three_ranks(host.path(), &[]));
    assert_eq!(count(&ran, "WARN"), 3, "{}", ran.stderr);
    assert_eq!(
        count(&ran, "before its weight files changed"),
        3,
        "{}",
        ran.stderr
    );
    assert_eq!(count(&ran, "shard cache: wrote"), 3, "{}", ran.stderr);

    overwrite_tensors(&model);
    let requests = golden_requests(&golden);
    let ran = run(&mut three_ranks(host.path(), &[]), requests.as_bytes()).succeeded();
    let tokens = without_cache(&golden, host.path());
    assert_eq!(ran.token_ids(), tokens);
    assert_ne!(tokens, expected(&golden));
}

/// Does something to a file, given all of its bytes.
type Damage = fn(&Path, Vec<u8>);

fn flip(path: &Path, mut bytes: Vec<u8>, at: usize) {
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// What can happen to a file, and what the program must say of it.
const DAMAGES: [(&str, Damage, &str); 8] = [
    (
        "cut",
        |path, bytes| fs::write(path, &bytes[..bytes.len() - 1]).unwrap(),
        "was cut",
    ),
    ("emptied", |path, _| fs::write(path, "").unwrap(), "was cut"),
    (
        "lengthened",
        |path, bytes| fs::write(path, [&bytes[..], &[0]].concat()).unwrap(),
        "found",
    ),
    (
        "other last byte",
        |path, bytes| {
            let at = bytes.len() - 1;
            flip(path, bytes, at)
        },
        "file is damaged",
    ),
    (
        "other header length",
        |path, bytes| flip(path, bytes, 5),
        "header is damaged",
    ),
    (
        "other header",
        |path, bytes| flip(path, bytes, 300),
        "header is damaged",
    ),
    (
        "a space for nothing",
        |path, bytes| flip(path, bytes, PAGE_BYTES - 1),
        "header is damaged",
    ),
    (
        "a directory",
        |path, _| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        },
        "not a regular file",
    ),
];

#[test]
fn every_damage_to_a_file_is_noticed_and_mended() {
    let golden = golden(GOLDEN);
    let host = host_with_model(&golden);
    run_and_compare(&golden, &mut three_ranks(host.path(), &[]));
    let files = shards(&host.path().join("cache"));
    let path = files.values().nth(1).unwrap();
    let whole = fs::read(path).unwrap();
    for (name, damage, told) in DAMAGES {
        damage(path, whole.clone());
        let ran = run_and_compare(&golden, &mut three_ranks(host.path(), &[]));
        assert_eq!(count(&ran, "WARN"), 1, "{name}:\n{}", ran.stderr);
        assert!(ran.stderr.contains(told), "{name}:\n{}", ran.stderr);
        assert_eq!(
            count(&ran, "shard cache: wrote"),
            1,
            "{name}:\n{}",
            ran.stderr
        );
        assert!(fs::read(path).unwrap() == whole, "{name}: not mended");
    }
}

#[test]
fn the_file_of_another_slice_is_noticed_and_mended() {
    let golden = golden(GOLDEN);
    let host = host_with_model(&golden);
    let layers = ["--layers", "0-1,2-3,4-5"];
    run_and_compare(&golden, &mut three_ranks(host.path(), &layers));
    let files = shards(&host.path().join("cache"));
    let (first, second) = (&files["layers-0-1"], &files["layers-2-3"]);
    let whole = fs::read(second).unwrap();
    fs::copy(first, second).unwrap();
    let ran = run_and_compare(&golden, &mut three_ranks(host.path(), &layers));
    assert_eq!(count(&ran, "belongs to another slice"), 1, "{}", ran.stderr);
    assert!(fs::read(second).unwrap() == whole);
}

#[test]
fn a_cache_that_cannot_be_written_is_said_and_the_run_goes_on() {
    let golden = golden(GOLDEN);
    let host = host_with_model(&golden);
    fs::write(host.path().join("cache"), "a file").unwrap();
    let ran = run_and_compare(&golden, &mut three_ranks(host.path(), &[]));
    assert_eq!(
        count(&ran, "this start reads the model directory"),
        3,
        "{}",
        ran.stderr
    );
    assert_eq!(count(&ran, "loaded layers"), 3, "{}", ran.stderr);
}

#[test]
fn two_runs_may_write_the_same_files_at_once_and_leftovers_are_removed() {
    let golden = golden(GOLDEN);
    let host = host_with_model(&golden);
    run_and_compare(&golden, &mut three_ranks(host.path(), &[]));
    let cache = host.path().join("cache");
    for path in shards(&cache).values() {
        fs::rename(path, format!("{}.1-0.part", path.display())).unwrap();
    }
    let requests = golden_requests(&golden);
    let start = || common::start(&mut three_ranks(host.path(), &[]), requests.as_bytes());
    for ran in [start(), start()].map(common::finish) {
        answers(&golden, &ran.succeeded());
    }
    assert_eq!(shards(&cache).len(), 3);
}

/// Three hosts of which one has the model, and the arguments to run there.
struct Hosts {
    scratch: tempfile::TempDir,
}

impl Hosts {
    fn new(golden: &Golden, with_model: usize) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        for host in 0..3 {
            fs::create_dir(scratch.path().join(host.to_string())).unwrap();
        }
        copy_model(
            golden,
            &scratch.path().join(with_model.to_string()).join("m"),
        );
        Self { scratch }
    }

    fn dir(&self, host: usize) -> PathBuf {
        self.scratch.path().join(host.to_string())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let dirs = [0, 1, 2].map(|host| self.dir(host));
        let all = ["--device", "cpu", "--model", "m", "-v"];
        common::one_rank_in_each(&dirs, &[&all[..], arguments].concat())
    }
}

fn digest(report: &Path) -> Value {
    let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    report["digest"].clone()
}

/// The receivers have nothing to go back to: a file that another run puts in place while one is read must do.
#[test]
fn two_runs_may_receive_the_same_slices_at_once() {
    let golden = golden(GOLDEN);
    let hosts = Hosts::new(&golden, 0);
    let requests = golden_requests(&golden);
    for _ in 0..3 {
        for host in 0..3 {
            let _ = fs::remove_dir_all(hosts.dir(host).join("cache"));
        }
        let mut command = hosts.command(&["--weights-from", "0", "--shard-cache", "cache"]);
        let mut start = || common::start(&mut command, requests.as_bytes());
        for ran in [start(), start()].map(common::finish) {
            answers(&golden, &ran.succeeded());
        }
    }
}

#[test]
fn ranks_without_the_model_receive_their_tensors_once() {
    let golden = golden(GOLDEN);
    for source in [0, 2] {
        let hosts = Hosts::new(&golden, source);
        let report = hosts.scratch.path().join("report.json");
        let source = source.to_string();
        let arguments = [
            "--weights-from",
            &source,
            "--shard-cache",
            "cache",
            "--report",
            report.to_str().unwrap(),
        ];
        let first = run_and_compare(&golden, &mut hosts.command(&arguments));
        let received = format!("received its layers from rank {source}");
        assert_eq!(count(&first, &received), 2, "{}", first.stderr);
        assert_eq!(count(&first, "sending its layers"), 2, "{}", first.stderr);
        let of_three = digest(&report);

        let second = run_and_compare(&golden, &mut hosts.command(&arguments));
        assert_eq!(
            count(&second, "received its layers"),
            0,
            "{}",
            second.stderr
        );
        assert_eq!(count(&second, "sending its layers"), 0, "{}", second.stderr);
        assert_eq!(count(&second, "shard cache: read"), 3, "{}", second.stderr);

        let mut alone = common::on_cpu(common::program());
        alone
            .arg("--model")
            .arg(&golden.dir)
            .arg("--report")
            .arg(&report);
        run_and_compare(&golden, &mut alone);
        assert_eq!(digest(&report), of_three);

        // Every host has its own tensors and no other: together one model.
        let mut all = BTreeMap::new();
        for host in 0..3 {
            let files = shards_without_tokenizer(&hosts.dir(host).join("cache"));
            assert_eq!(files.len(), 1, "{files:?}");
            for (name, data) in tensors(&fs::read(&files[0]).unwrap()) {
                assert_eq!(all.insert(name.clone(), data), None, "{name} twice");
            }
        }
        assert_eq!(
            all,
            tensors(&fs::read(golden.dir.join("model.safetensors")).unwrap())
        );
    }
}

fn shards_without_tokenizer(cache: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(cache)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    paths.filter(|path| path.is_file()).collect()
}

#[test]
fn a_damaged_slice_is_received_again() {
    let golden = golden(GOLDEN);
    let hosts = Hosts::new(&golden, 0);
    let arguments = ["--weights-from", "0", "--shard-cache", "cache"];
    run_and_compare(&golden, &mut hosts.command(&arguments));
    let files = shards_without_tokenizer(&hosts.dir(1).join("cache"));
    let bytes = fs::read(&files[0]).unwrap();
    let last = bytes.len() - 1;
    flip(&files[0], bytes, last);
    let ran = run_and_compare(&golden, &mut hosts.command(&arguments));
    assert_eq!(count(&ran, "WARN"), 1, "{}", ran.stderr);
    assert_eq!(count(&ran, "received its layers"), 1, "{}", ran.stderr);
}

#[test]
fn received_weights_are_kept_in_the_users_cache_by_default() {
    let golden = golden(GOLDEN);
    let hosts = Hosts::new(&golden, 0);
    let cache = hosts.scratch.path().join("xdg");
    let mut command = hosts.command(&["--weights-from", "0"]);
    command.env("XDG_CACHE_HOME", &cache);
    run_and_compare(&golden, &mut command);
    // The rank that has the model keeps no second copy unasked.
    assert_eq!(shards(&cache.join("mlx-pipe/shards")).len(), 2);
}

#[test]
fn a_rank_with_the_same_model_uses_its_own_and_one_with_another_does_not() {
    let golden = golden(GOLDEN);
    let hosts = Hosts::new(&golden, 0);
    copy_model(&golden, &hosts.dir(1).join("m"));
    copy_model(&golden, &hosts.dir(2).join("m"));
    let config = hosts.dir(2).join("m/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text + " ").unwrap();
    let arguments = ["--weights-from", "0", "--shard-cache", "cache"];
    let ran = run_and_compare(&golden, &mut hosts.command(&arguments));
    assert_eq!(count(&ran, "received its layers"), 1, "{}", ran.stderr);
    assert_eq!(
        count(&ran, "is not the model that rank 0 has"),
        1,
        "{}",
        ran.stderr
    );
}

#[test]
fn a_prompt_in_words_needs_no_tokenizer_on_rank_0_but_that_of_the_model() {
    let golden = golden(GOLDEN);
    let hosts = Hosts::new(&golden, 1);
    let vocab: serde_json::Map<String, Value> =
        (0..256).map(|id| (format!("w{id}"), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    });
    fs::write(hosts.dir(1).join("m/tokenizer.json"), tokenizer.to_string()).unwrap();
    let arguments = ["--weights-from", "1", "--shard-cache", "cache", "--raw"];
    let prompt = &golden.prompts[0];
    let words: Vec<String> = prompt.ids.iter().map(|id| format!("w{id}")).collect();
    let request = serde_json::json!({"prompt": words.join(" "), "max_tokens": prompt.tokens.len()});
    for _ in 0..2 {
        let line = request.to_string() + "\n";
        let ran = run(&mut hosts.command(&arguments), line.as_bytes()).succeeded();
        assert_eq!(ran.token_ids(), [prompt.answer()], "{}", ran.stderr);
    }
}

#[test]
fn mistakes_with_weights_from_are_told_once() {
    let golden = golden(GOLDEN);
    let hosts = Hosts::new(&golden, 0);
    fs::write(hosts.dir(1).join("file"), "").unwrap();
    for (arguments, status, told) in [
        (
            &["--weights-from", "3"][..],
            2,
            "--weights-from 3: there is no such rank; this run has 3",
        ),
        (
            &["--weights-from", "1"],
            2,
            "--weights-from 1: that rank does not have the model",
        ),
        (&[], 2, "no directory \"m\" on this host"),
        // Nothing else has the weights there.
        (
            &["--weights-from", "0", "--shard-cache", "file"],
            1,
            "make the directory file",
        ),
    ] {
        let ran = run(
            &mut hosts.command(arguments),
            golden_requests(&golden).as_bytes(),
        );
        assert_eq!(ran.status, status, "{}", ran.stderr);
        assert!(ran.took < GONE_WITHIN, "took {:?}", ran.took);
        assert_eq!(count(&ran, told), 1, "{told}:\n{}", ran.stderr);
        assert_eq!(count(&ran, "mlx-pipe: "), 1, "{told}:\n{}", ran.stderr);
    }
}

/// A model of two gigabytes that takes no space where it lies: all of its weights are zeros.
fn write_large_model(dir: &Path) {
    let (hidden, inner, layers, vocab) = (4096, 16384, 4, 64);
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": vocab, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        "max_position_embeddings": 64
    });
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut tensors = vec![
        ("model.embed_tokens".to_owned(), vec![vocab, hidden]),
        ("model.norm".to_owned(), vec![hidden]),
    ];
    for layer in 0..layers {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![hidden, hidden]),
            ("self_attn.v_proj", vec![hidden, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}"), shape));
        }
    }
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        let entry =
            serde_json::json!({"dtype": "F16", "shape": shape, "data_offsets": [begin, end]});
        header.insert(name + ".weight", entry);
    }
    let header = Value::Object(header).to_string();
    let head = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let path = dir.join("model.safetensors");
    fs::write(&path, &head).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((head.len() + end) as u64).unwrap();
}

/// The process of a rank, among those whose command line holds `mark`.
#[cfg(target_os = "linux")]
fn process_of_rank(rank: usize, mark: &str) -> i32 {
    let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
    let numbers = fs::read_dir("/proc").unwrap();
    let mut numbers =
        numbers.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let found = numbers.find(|pid| {
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        String::from_utf8_lossy(&read("cmdline")).contains(mark)
            && read("environ")
                .split(|&byte| byte == 0)
                .any(|entry| entry == variable.as_bytes())
    });
    found.unwrap_or_else(|| panic!("no process of rank {rank}"))
}

#[cfg(target_os = "linux")]
#[test]
fn a_rank_killed_while_weights_are_handed_over_ends_all() {
    let golden = golden(GOLDEN);
    let hosts = Hosts::new(&golden, 0);
    write_large_model(&hosts.dir(0).join("large"));
    for killed in [0, 1] {
        let mark = format!("mark-handover-{killed}-{}", std::process::id());
        let report = hosts.scratch.path().join(&mark);
        let arguments = [
            "--model",
            "large",
            "--weights-from",
            "0",
            "--shard-cache",
            "cache",
            "--report",
            report.to_str().unwrap(),
        ];
        let mut running = common::start(&mut hosts.command(&arguments), b"{\"prompt\":[1]}\n");
        running.wait_until(|running| {
            running
                .stderr
                .so_far()
                .matches("sending its layers")
                .count()
                == 2
        });
        let since = std::time::Instant::now();
        // SAFETY: `kill` has no preconditions.
        unsafe { libc::kill(process_of_rank(killed, &mark), libc::SIGKILL) };
        let ran = common::finish(running);
        assert!(since.elapsed() < GONE_WITHIN, "took {:?}", since.elapsed());
        assert_ne!(ran.status, 0, "{}", ran.stderr);
        assert_eq!(count(&ran, "loaded layers"), 0, "{}", ran.stderr);
        // Nothing unfinished has the name of a slice.
        for host in [1, 2] {
            let left = shards_without_tokenizer(&hosts.dir(host).join("cache"));
            assert!(
                left.iter().all(|path| path.extension().unwrap() == "part"),
                "{left:?}"
            );
        }
    }
}
