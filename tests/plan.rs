//! `mlx-pipe plan` on paper: models of true shapes of which only `config.json` and an index or headers are
//! there, on clusters that are only described.

mod common;

use common::Ran;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const INDEX: &str = "model.safetensors.index.json";
const FILE: &str = "model.safetensors";

/// A tensor to be: name, dtype and shape.
type Tensor = (String, &'static str, Vec<usize>);

/// A published shape, quantised in groups of 64 with 16-bit scales and biases.
struct Model {
    config: Value,
    bits: usize,
}

impl Model {
    fn new(shape: Value, bits: usize) -> Self {
        let mut config = json!({
            "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
            "quantization": {"group_size": 64, "bits": bits},
        });
        for (name, value) in shape.as_object().unwrap() {
            config[name] = value.clone();
        }
        Self { config, bits }
    }

    fn qwen3_1_7b_in_8_bits() -> Self {
        let shape = json!({
            "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 151936, "rope_theta": 1000000,
            "tie_word_embeddings": true,
        });
        Self::new(shape, 8)
    }

    fn llama_70b_in_4_bits() -> Self {
        let shape = json!({
            "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
            "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": false,
        });
        Self::new(shape, 4)
    }

    fn number(&self, field: &str) -> usize {
        self.config[field].as_u64().unwrap() as usize
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Vec<Tensor> {
        vec![
            (
                format!("{name}.weight"),
                "U32",
                vec![rows, columns * self.bits / 32],
            ),
            (format!("{name}.scales"), "BF16", vec![rows, columns / 64]),
            (format!("{name}.biases"), "BF16", vec![rows, columns / 64]),
        ]
    }

    fn tensors(&self) -> Vec<Tensor> {
        let norm = |name: String, width| (format!("{name}.weight"), "BF16", vec![width]);
        let (hidden, inner) = (self.number("hidden_size"), self.number("intermediate_size"));
        let heads = self.number("num_attention_heads");
        let head_dim = self.config["head_dim"]
            .as_u64()
            .map_or(hidden / heads, |dim| dim as usize);
        let (q, kv) = (
            heads * head_dim,
            self.number("num_key_value_heads") * head_dim,
        );
        let vocab = self.number("vocab_size");
        let mut all = self.matrix("model.embed_tokens", vocab, hidden);
        for layer in 0..self.number("num_hidden_layers") {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            for (part, rows, columns) in [
                ("self_attn.q_proj", q, hidden),
                ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden),
                ("self_attn.o_proj", hidden, q),
                ("mlp.gate_proj", inner, hidden),
                ("mlp.up_proj", inner, hidden),
                ("mlp.down_proj", hidden, inner),
            ] {
                all.extend(self.matrix(&name(part), rows, columns));
            }
            all.push(norm(name("input_layernorm"), hidden));
            all.push(norm(name("post_attention_layernorm"), hidden));
            if self.config["model_type"] == "qwen3" {
                all.push(norm(name("self_attn.q_norm"), head_dim));
                all.push(norm(name("self_attn.k_norm"), head_dim));
            }
        }
        all.push(norm("model.norm".to_owned(), hidden));
        if self.config["tie_word_embeddings"] == false {
            all.extend(self.matrix("lm_head", vocab, hidden));
        }
        all
    }

    fn bytes(&self) -> usize {
        self.tensors().iter().map(tensor_bytes).sum()
    }

    /// A directory with `config.json` only.
    fn directory(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        write_json(&dir.path().join("config.json"), &self.config);
        dir
    }

    /// And with the index of weight files that are not there.
    fn with_index(&self, total_size: Value) -> TempDir {
        let dir = self.directory();
        let names = self
            .tensors()
            .into_iter()
            .map(|(name, ..)| (name, json!(FILE)));
        let index = json!({
            "metadata": {"total_size": total_size},
            "weight_map": names.collect::<serde_json::Map<_, _>>(),
        });
        write_json(&dir.path().join(INDEX), &index);
        dir
    }

    /// Or with one weight file that ends with its header.
    fn with_headers(&self) -> TempDir {
        let dir = self.directory();
        let mut end = 0;
        let entries = self.tensors().into_iter().map(|tensor| {
            let begin = end;
            end += tensor_bytes(&tensor);
            let (name, dtype, shape) = tensor;
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]});
            (name, entry)
        });
        let header = serde_json::to_vec(&entries.collect::<serde_json::Map<_, _>>()).unwrap();
        let length = (header.len() as u64).to_le_bytes();
        fs::write(dir.path().join(FILE), [&length[..], &header].concat()).unwrap();
        dir
    }
}

fn tensor_bytes((_, dtype, shape): &Tensor) -> usize {
    let element_bytes = if *dtype == "U32" { 4 } else { 2 };
    element_bytes * shape.iter().product::<usize>()
}

fn write_json(path: &Path, value: &Value) {
    fs::write(path, serde_json::to_vec(value).unwrap()).unwrap();
}

/// Mac minis with 16 GB, as `hostfiles/minis.json` describes them.
fn minis(hosts: usize) -> Value {
    let text = fs::read_to_string(common::root().join("hostfiles/minis.json")).unwrap();
    let mut file: Value = serde_json::from_str(&text).unwrap();
    let capabilities = file["devices"][0]["capabilities"].clone();
    let device =
        |host| json!({"hostname": format!("mini{host}.local"), "capabilities": capabilities});
    file["devices"] = (1..=hosts).map(device).collect();
    file["model_parallel_size"] = json!(hosts);
    file
}

fn plan(dir: &TempDir, cluster: &Value, options: &[&str]) -> Ran {
    let cluster_file = dir.path().join("cluster.json");
    write_json(&cluster_file, cluster);
    let mut command = common::program();
    command.arg("plan").arg("--model").arg(dir.path());
    command.arg("--cluster").arg(&cluster_file).args(options);
    let ran = common::run(&mut command, b"");
    for line in ran
        .stdout
        .lines()
        .filter(|line| !line.starts_with("  --layers"))
    {
        assert!(line.chars().count() <= 80, "{line}");
    }
    ran
}

/// The message of a plan that fails with this status, the directory written `DIR`.
#[track_caller]
fn refusal(ran: &Ran, dir: &TempDir, status: i32) -> String {
    assert_eq!(
        (ran.status, ran.stdout.as_str()),
        (status, ""),
        "{}",
        ran.stderr
    );
    ran.stderr.replace(dir.path().to_str().unwrap(), "DIR")
}

#[track_caller]
fn assert_contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
}

#[test]
fn three_minis_hold_exactly_one_small_qwen3() {
    let model = Model::qwen3_1_7b_in_8_bits();
    assert_eq!(model.bytes(), 1_828_227_072);
    let dir = model.with_index(json!(1_828_227_072_u64));
    let text = plan(&dir, &minis(3), &[]).succeeded().stdout;
    assert_contains(
        &text,
        &[
            "times: estimated from the cluster file's bandwidths",
            "one model 1.828 GB, 3 full copies 5.485 GB",
            "memory saved against a full copy on every rank: 3.656 GB (66.7 %)",
            "first token      ",
            "one stream       ",
            "full pipeline    ",
            "longest context  40960 at 1 sequence, the model's",
        ],
    );
}

#[test]
fn headers_without_weights_give_the_plan_of_the_index() {
    let model = Model::qwen3_1_7b_in_8_bits();
    let by_index = plan(&model.with_index(json!(model.bytes())), &minis(3), &[]).succeeded();
    let by_headers = plan(&model.with_headers(), &minis(3), &[]).succeeded();
    assert_eq!(by_index.stdout, by_headers.stdout);
}

#[test]
fn eight_minis_hold_a_llama_of_70_billion_weights_and_three_do_not() {
    let model = Model::llama_70b_in_4_bits();
    let dir = model.with_index(json!(model.bytes()));
    let text = plan(&dir, &minis(8), &[]).succeeded().stdout;
    assert_contains(
        &text,
        &["one model 39.688 GB", "mini8.local", "one stream       "],
    );
    let text = refusal(&plan(&dir, &minis(3), &[]), &dir, 1);
    assert_contains(
        &text,
        &[
            "the model does not fit: 3 of 3 ranks over the memory limit",
            "hosts like these instead of 3",
        ],
    );
    let text = plan(&dir, &minis(8), &["--what-if"]).succeeded().stdout;
    let rows: Vec<&str> = text.lines().skip(5).collect();
    assert_eq!(rows.len(), 8, "{text}");
    assert!(rows[0].starts_with("    1  does not fit: lacks "), "{text}");
    assert!(
        rows[7].starts_with("    8  5/11/") && rows[7].ends_with(" s"),
        "{text}"
    );
}

#[test]
fn a_host_that_slows_the_others_down_is_named_with_the_split_without_it() {
    let model = Model::qwen3_1_7b_in_8_bits();
    let dir = model.with_index(json!(model.bytes()));
    let mut cluster = minis(3);
    cluster["devices"][1]["capabilities"]["memory_bandwidth_gb_s"] = json!(2);
    let text = plan(&dir, &cluster, &[]).succeeded().stdout;
    assert_contains(
        &text,
        &["without mini2.local: one stream ", "\n  --layers 0-"],
    );
    assert!(!text.contains("without mini1.local"), "{text}");
}

#[test]
fn ranks_of_one_host_are_not_doubted() {
    let model = Model::qwen3_1_7b_in_8_bits();
    let dir = model.with_index(json!(model.bytes()));
    let mut cluster = minis(1);
    cluster["model_parallel_size"] = json!(3);
    let text = plan(&dir, &cluster, &[]).succeeded().stdout;
    // Three ranks share one memory bus, so the pipeline is no faster than one stream on it.
    assert_contains(&text, &["full pipeline    49.9", "limit"]);
    assert!(!text.contains("without"), "{text}");
}

#[test]
fn without_bandwidths_there_are_shares_and_no_seconds() {
    let model = Model::qwen3_1_7b_in_8_bits();
    let dir = model.with_index(json!(model.bytes()));
    let mut cluster = minis(2);
    for device in cluster["devices"].as_array_mut().unwrap() {
        device["capabilities"] = json!({"memory_gb": 16, "gpu_cores": 10});
    }
    let text = plan(&dir, &cluster, &[]).succeeded().stdout;
    assert_contains(
        &text,
        &["times: relative, by number of cores", "most sequences   "],
    );
    assert!(!text.contains("first token"), "{text}");
    let text = plan(&dir, &cluster, &["--what-if"]).succeeded().stdout;
    assert_contains(
        &text,
        &["speed against that of the first", "1.00 x", "1.99 x"],
    );
}

#[test]
fn bandwidths_without_links_give_the_full_pipeline_only() {
    let model = Model::qwen3_1_7b_in_8_bits();
    let dir = model.with_index(json!(model.bytes()));
    let mut cluster = minis(2);
    cluster.as_object_mut().unwrap().remove("link");
    let text = plan(&dir, &cluster, &[]).succeeded().stdout;
    assert_contains(&text, &["one stream       not known", "full pipeline    "]);
}

#[test]
fn an_index_whose_bytes_are_not_the_models_is_refused() {
    let model = Model::qwen3_1_7b_in_8_bits();
    let dir = model.with_index(json!(1_828_227_073_u64));
    let text = refusal(&plan(&dir, &minis(3), &[]), &dir, 1);
    assert_contains(
        &text,
        &[
            "DIR/model.safetensors.index.json: metadata.total_size is 1828227073",
            "1828227072 bytes with numbers of 16 bits, ",
            "expected one of the two",
        ],
    );
    for none in [json!(null), json!("many"), json!(-1), json!(1.5)] {
        let dir = model.with_index(none);
        let text = refusal(&plan(&dir, &minis(3), &[]), &dir, 1);
        assert_contains(
            &text,
            &["no whole number as metadata.total_size", "headers"],
        );
    }
}

#[test]
fn an_index_of_other_tensors_is_refused_by_name() {
    let model = Model::qwen3_1_7b_in_8_bits();
    let change = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let dir = model.with_index(json!(model.bytes()));
        let path = dir.path().join(INDEX);
        let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(index["weight_map"].as_object_mut().unwrap());
        write_json(&path, &index);
        refusal(&plan(&dir, &minis(3), &[]), &dir, 1)
    };
    let text = change(&|map| drop(map.remove("model.layers.27.mlp.up_proj.scales")));
    assert_contains(&text, &["model.layers.27.mlp.up_proj"]);
    let text = change(&|map| drop(map.remove("model.norm.weight")));
    assert_contains(&text, &["lists no tensor `model.norm.weight`"]);
    let text = change(&|map| drop(map.insert("model.vision.weight".into(), json!(FILE))));
    assert_contains(
        &text,
        &["`model.vision.weight` is a tensor that a qwen3 model"],
    );
}

#[test]
fn a_file_cut_off_within_its_tensors_or_its_header_is_damaged_for_a_plan_too() {
    let model = Model::qwen3_1_7b_in_8_bits();
    for (change, message) in [(1, "shorter than its header says"), (-1, "header")] {
        let dir = model.with_headers();
        let file = fs::OpenOptions::new()
            .write(true)
            .open(dir.path().join(FILE))
            .unwrap();
        let length = file.metadata().unwrap().len();
        file.set_len(length.checked_add_signed(change).unwrap())
            .unwrap();
        let text = refusal(&plan(&dir, &minis(3), &[]), &dir, 1);
        assert_contains(&text, &["DIR/model.safetensors", message]);
    }
}

#[test]
fn a_run_refuses_what_only_a_plan_can_use() {
    let model = Model::qwen3_1_7b_in_8_bits();
    for (dir, message) in [
        (model.with_headers(), "shorter than its header says"),
        (model.with_index(json!(model.bytes())), FILE),
    ] {
        let mut command = common::program();
        let ran = common::run(command.arg("--model").arg(dir.path()), b"Hello\n");
        assert_contains(&refusal(&ran, &dir, 1), &["DIR", message]);
    }
}

#[test]
fn a_directory_without_index_and_headers_is_refused() {
    let dir = Model::qwen3_1_7b_in_8_bits().directory();
    let text = refusal(&plan(&dir, &minis(3), &[]), &dir, 1);
    assert_contains(&text, &["no weights here"]);
}

/// `plan` for two ranks of this machine.
fn plan_here(dir: &Path) -> Ran {
    let mut command = common::program();
    command
        .arg("plan")
        .arg("--model")
        .arg(dir)
        .args(["--ranks", "2"]);
    common::run(&mut command, b"")
}

#[test]
fn whole_checkpoints_their_headers_and_their_indexes_are_planned_alike() {
    let mut alike = Vec::new();
    for golden in common::golden_cases() {
        let (headers, index_only) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut names, mut total_bytes) = (serde_json::Map::new(), 0);
        for entry in fs::read_dir(&golden.dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let bytes = fs::read(&path).unwrap();
            if name == "config.json" || name == INDEX {
                fs::write(headers.path().join(&name), &bytes).unwrap();
            } else if name.ends_with(".safetensors") && !name.starts_with("golden.") {
                let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                fs::write(headers.path().join(&name), &bytes[..8 + header_bytes]).unwrap();
                let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                for (tensor, view) in tensors.iter() {
                    total_bytes += view.data().len();
                    names.insert(tensor.to_owned(), json!(name));
                }
            }
        }
        fs::copy(
            headers.path().join("config.json"),
            index_only.path().join("config.json"),
        )
        .unwrap();
        let index = json!({"metadata": {"total_size": total_bytes}, "weight_map": names});
        write_json(&index_only.path().join(INDEX), &index);

        let whole = plan_here(&golden.dir).succeeded().stdout;
        assert_eq!(
            plan_here(headers.path()).succeeded().stdout,
            whole,
            "{}",
            golden.name
        );
        let by_index = plan_here(index_only.path());
        match by_index.status {
            0 => {
                assert_eq!(by_index.stdout, whole, "{}", golden.name);
                alike.push(golden.name);
            }
            _ => assert_contains(&by_index.stderr, &["expected one of the two", "headers"]),
        }
    }
    // Numbers of 16 bits and of 32; those that mix both need headers.
    assert!(alike.contains(&"qwen2-untied-f32".to_owned()), "{alike:?}");
    assert!(alike.len() >= 8, "{alike:?}");
}
