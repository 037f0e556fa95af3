//! Whole imports: a GGUF file in, a checkpoint directory out, every value compared.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::blocks::{Encoding, Float, GROUP_SIZE};
use super::super::{ImportError, Summary, import};
use super::blocks::{assert_same_values, floats, gguf_values, interleave, mlx_values};
use super::builder::{
    Builder, HEAD, HIDDEN, INNER, LAYERS, TENSOR_BF16, TENSOR_F16, TENSOR_F32, TENSOR_Q4_0,
    TENSOR_Q4_1, TENSOR_Q6_K, TENSOR_Q8_0, TensorSpec, Vocab, model,
};

/// A model on disk and where it is to go.
struct Case {
    _dir: TempDir,
    gguf: PathBuf,
    out: PathBuf,
}

impl Case {
    fn new(model: &Builder) -> Case {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let gguf = dir.path().join("model.gguf");
        fs::write(&gguf, model.build()).expect("the model can be written");
        Case {
            gguf,
            out: dir.path().join("out"),
            _dir: dir,
        }
    }

    fn import(&self) -> Result<Summary, ImportError> {
        import(&self.gguf, &self.out)
    }

    fn json(&self, name: &str) -> Value {
        let text = fs::read_to_string(self.out.join(name)).expect("the file was written");
        serde_json::from_str(&text).expect("the file is JSON")
    }

    fn weights(&self) -> Vec<u8> {
        fs::read(self.out.join("model.safetensors")).expect("the weights were written")
    }
}

/// Imports a model that must be importable.
fn imported(model: &Builder) -> Case {
    let case = Case::new(model);
    if let Err(error) = case.import() {
        panic!("{error}");
    }
    case
}

/// The text of the error that the import ends with; no checkpoint may be left.
fn refusal(model: &Builder) -> String {
    let case = Case::new(model);
    let error = case.import().expect_err("this model cannot be imported");
    assert!(!case.out.exists(), "the import failed and left a directory");
    error.to_string()
}

#[track_caller]
fn assert_refused(model: &Builder, words: &[&str]) {
    let text = refusal(model);
    for word in words.iter().chain(&["model.gguf"]) {
        assert!(text.contains(word), "{text:?} does not mention {word:?}");
    }
}

/// The checkpoint's module for a tensor of the file.
fn module(gguf_name: &str) -> String {
    let words: Vec<&str> = gguf_name.split('.').collect();
    let inner = |name: &str| match name {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        other => panic!("no module for {other}"),
    };
    match words.as_slice() {
        ["token_embd", _] => "model.embed_tokens".to_owned(),
        ["output_norm", _] => "model.norm".to_owned(),
        ["output", _] => "lm_head".to_owned(),
        ["blk", layer, name, _] => format!("model.layers.{layer}.{}", inner(name)),
        other => panic!("no module for {other:?}"),
    }
}

/// A tensor's values by GGUF's definition, in the file's order.
fn stored_values(tensor: &TensorSpec) -> Vec<f32> {
    match Encoding::from_type_id(tensor.type_id) {
        Some(Encoding::Plain(float)) => floats(float, &tensor.data),
        Some(Encoding::Blocks(kind)) => tensor
            .data
            .chunks_exact(Encoding::Blocks(kind).block_bytes())
            .flat_map(|block| gguf_values(kind, block))
            .collect(),
        None => panic!("the test has no values for type {}", tensor.type_id),
    }
}

fn float(dtype: Dtype) -> Float {
    match dtype {
        Dtype::F32 => Float::F32,
        Dtype::F16 => Float::F16,
        Dtype::BF16 => Float::BF16,
        other => panic!("{other:?} is no float"),
    }
}

/// A checkpoint tensor's values by MLX's definition, and the names of the tensors they came from.
fn checkpoint_values(
    weights: &SafeTensors<'_>,
    module: &str,
    leaf: &str,
) -> (Vec<f32>, Vec<String>) {
    let get = |leaf: &str| weights.tensor(&format!("{module}.{leaf}"));
    let weight = get(leaf).expect("the tensor was written");
    let name = |leaf: &str| format!("{module}.{leaf}");
    if weight.dtype() != Dtype::U32 {
        return (
            floats(float(weight.dtype()), weight.data()),
            vec![name(leaf)],
        );
    }
    let scales = get("scales").expect("a quantised tensor has scales");
    let biases = get("biases").expect("a quantised tensor has biases");
    assert_eq!(scales.shape(), biases.shape());
    assert_eq!(scales.shape()[0], weight.shape()[0]);
    let bits = weight.shape()[1] * 32 / (scales.shape()[1] * GROUP_SIZE);
    let values = mlx_values(
        bits,
        weight.data(),
        &floats(float(scales.dtype()), scales.data()),
        &floats(float(biases.dtype()), biases.data()),
    );
    (values, vec![name("weight"), name("scales"), name("biases")])
}

/// Every value of every tensor is the one the GGUF file has, and the checkpoint has no other tensor.
fn assert_lossless(family: &str, model: &Builder) {
    let case = imported(model);
    let file = case.weights();
    let weights = SafeTensors::deserialize(&file).expect("the weights are well-formed");
    let mut names = BTreeSet::new();
    for tensor in &model.tensors {
        let (_, leaf) = tensor.name.rsplit_once('.').expect("names have a leaf");
        let (found, used) = checkpoint_values(&weights, &module(&tensor.name), leaf);
        names.extend(used);
        let stored = stored_values(tensor);
        let row_length = stored.len() / tensor.shape[0];
        let rotated = tensor.name.contains("attn_q.") || tensor.name.contains("attn_k.");
        if family == "llama" && rotated {
            // What the converter would make of the checkpoint must be what the file has.
            let rows: Vec<&[f32]> = found.chunks(row_length).collect();
            assert_same_values(&interleave(&rows, HEAD).concat(), &stored, &tensor.name);
            assert_ne!(found, stored, "{} is interleaved", tensor.name);
        } else {
            assert_same_values(&found, &stored, &tensor.name);
        }
    }
    let found: BTreeSet<String> = weights.names().into_iter().map(str::to_owned).collect();
    assert_eq!(found, names);
}

/// An untied head, which has the embedding's shape.
fn untied(model: Builder, type_id: u32) -> Builder {
    let shape = model.spec("token_embd.weight").shape.clone();
    let data = super::builder::random_data("output.weight", &shape, type_id);
    model.tensor("output.weight", &shape, type_id, data)
}

/// Biases of a layer's matrices, `(name, rows)`.
fn with_biases(mut model: Builder, biases: &[(&str, usize)]) -> Builder {
    for layer in 0..LAYERS {
        for (name, rows) in biases {
            let name = format!("blk.{layer}.{name}.bias");
            let data = super::builder::random_data(&name, &[*rows], TENSOR_F32);
            model = model.tensor(&name, &[*rows], TENSOR_F32, data);
        }
    }
    model
}

const ATTENTION_BIASES: [(&str, usize); 4] = [
    ("attn_q", 64),
    ("attn_k", 32),
    ("attn_v", 32),
    ("attn_output", HIDDEN),
];

#[test]
fn every_architecture_with_every_encoding_keeps_its_values() {
    for family in ["llama", "qwen2", "qwen3"] {
        for type_id in [
            TENSOR_F32,
            TENSOR_F16,
            TENSOR_BF16,
            TENSOR_Q4_0,
            TENSOR_Q4_1,
            TENSOR_Q8_0,
        ] {
            let mut model = model(family);
            for layer in 0..LAYERS {
                for name in [
                    "attn_q",
                    "attn_k",
                    "attn_v",
                    "attn_output",
                    "ffn_gate",
                    "ffn_up",
                    "ffn_down",
                ] {
                    model = model.retyped(&format!("blk.{layer}.{name}.weight"), type_id);
                }
            }
            assert_lossless(family, &untied(model, type_id));
        }
    }
}

#[test]
fn biases_of_a_llama_are_imported_and_interleaved_ones_restored() {
    let model = with_biases(model("llama"), &ATTENTION_BIASES);
    let model = with_biases(
        model,
        &[("ffn_gate", INNER), ("ffn_up", INNER), ("ffn_down", HIDDEN)],
    );
    assert_lossless("llama", &model);
    let config = imported(&model).json("config.json");
    assert_eq!(config["attention_bias"], true);
    assert_eq!(config["mlp_bias"], true);
}

#[test]
fn scales_that_overflow_f16_make_one_tensor_f32_and_leave_the_others() {
    let name = "blk.1.ffn_up.weight";
    let mut model = model("llama").retyped(name, TENSOR_Q8_0);
    let large = half::f16::from_f32(-600.0).to_le_bytes();
    for tensor in model
        .tensors
        .iter_mut()
        .filter(|tensor| tensor.name == name)
    {
        tensor.data[..2].copy_from_slice(&large);
    }
    assert_lossless("llama", &model);
    let file = imported(&model).weights();
    let weights = SafeTensors::deserialize(&file).expect("the weights are well-formed");
    for (tensor, expected) in [
        ("model.layers.1.mlp.up_proj.scales", Dtype::F32),
        ("model.layers.1.mlp.up_proj.biases", Dtype::F32),
        ("model.layers.0.mlp.up_proj.scales", Dtype::F16),
    ] {
        assert_eq!(
            weights.tensor(tensor).map(|tensor| tensor.dtype()).ok(),
            Some(expected)
        );
    }
}

#[test]
fn the_summary_counts_what_was_written() {
    let case = Case::new(&model("qwen3"));
    let summary = case.import().expect("this model can be imported");
    let file = case.weights();
    let weights = SafeTensors::deserialize(&file).expect("the weights are well-formed");
    assert_eq!(summary.architecture, "qwen3");
    assert_eq!(summary.layers, LAYERS);
    assert_eq!(summary.bytes, file.len() as u64);
    assert_eq!(summary.tensors, weights.len());
    assert_eq!(summary.warnings, Vec::<String>::new());
    let (_, header) = SafeTensors::read_metadata(&file).expect("the header is well-formed");
    let format = header
        .metadata()
        .as_ref()
        .and_then(|metadata| metadata.get("format"));
    assert_eq!(format.map(String::as_str), Some("mlx"));
}

#[test]
fn config_json_says_what_the_metadata_says() {
    let vocab = Vocab::tiny();
    let config = imported(&model("llama")).json("config.json");
    let quantization = json!({
        "group_size": 32, "bits": 4, "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    });
    assert_eq!(
        config,
        json!({
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 512,
            "vocab_size": vocab.tokens.len(),
            "tie_word_embeddings": true,
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": vocab.id("<|begin|>"),
            "eos_token_id": vocab.id("<|end|>"),
            "torch_dtype": "float16",
            "quantization": quantization,
            "quantization_config": quantization,
        })
    );
}

#[test]
fn quantization_lists_every_matrix_that_differs_and_no_other() {
    let model = untied(model("qwen2"), TENSOR_BF16)
        .retyped("token_embd.weight", TENSOR_Q4_0)
        .retyped("blk.1.ffn_down.weight", TENSOR_Q8_0)
        .retyped("blk.0.attn_v.weight", TENSOR_F16);
    let case = imported(&model);
    let config = case.json("config.json");
    assert_eq!(
        config["quantization"],
        json!({
            "group_size": 32, "bits": 4, "mode": "affine",
            "lm_head": false,
            "model.layers.0.self_attn.v_proj": false,
            "model.layers.1.mlp.down_proj": {"group_size": 32, "bits": 8},
        })
    );
    assert_eq!(config["tie_word_embeddings"], false);
}

#[test]
fn a_model_without_quantised_matrices_has_no_quantization() {
    let mut model = model("qwen3");
    let names: Vec<String> = model
        .tensors
        .iter()
        .map(|tensor| tensor.name.clone())
        .collect();
    for name in names.iter().filter(|name| !name.contains("norm")) {
        model = model.retyped(name, TENSOR_BF16);
    }
    let config = imported(&model).json("config.json");
    assert_eq!(config.get("quantization"), None);
    assert_eq!(config.get("quantization_config"), None);
    assert_eq!(config["torch_dtype"], "bfloat16");
}

#[test]
fn numbers_are_written_as_the_shortest_decimal_of_the_same_f32() {
    for (eps, text) in [(1e-5, "0.00001"), (1e-6, "1e-6"), (1.0 / 3.0, "0.33333334")] {
        let model = model("llama").f32("llama.attention.layer_norm_rms_epsilon", eps);
        let case = imported(&model);
        let written = case.json("config.json")["rms_norm_eps"]
            .as_f64()
            .expect("a number");
        assert_eq!(written as f32, eps);
        assert_eq!(written, text.parse::<f64>().expect("a number"));
    }
}

#[test]
fn metadata_that_may_be_absent_gets_the_formats_default() {
    let model = model("llama")
        .without("llama.rope.freq_base")
        .without("llama.attention.head_count_kv")
        .tensor(
            "blk.0.attn_k.weight",
            &[HIDDEN, HIDDEN],
            TENSOR_F32,
            vec![0; 4 * HIDDEN * HIDDEN],
        )
        .tensor(
            "blk.0.attn_v.weight",
            &[HIDDEN, HIDDEN],
            TENSOR_F32,
            vec![0; 4 * HIDDEN * HIDDEN],
        )
        .tensor(
            "blk.1.attn_k.weight",
            &[HIDDEN, HIDDEN],
            TENSOR_F32,
            vec![0; 4 * HIDDEN * HIDDEN],
        )
        .tensor(
            "blk.1.attn_v.weight",
            &[HIDDEN, HIDDEN],
            TENSOR_F32,
            vec![0; 4 * HIDDEN * HIDDEN],
        );
    let config = imported(&model).json("config.json");
    assert_eq!(config["rope_theta"], 10_000.0);
    assert_eq!(config["num_key_value_heads"], 4);
}

#[test]
fn heads_of_their_own_size_are_imported_where_config_json_has_a_field() {
    let wide = |family: &str| {
        let mut model = model(family)
            .u32(&format!("{family}.attention.key_length"), 32)
            .u32(&format!("{family}.attention.value_length"), 32)
            .u32(&format!("{family}.rope.dimension_count"), 32);
        for layer in 0..LAYERS {
            for (name, shape) in [
                ("attn_q", [128, HIDDEN]),
                ("attn_k", [64, HIDDEN]),
                ("attn_v", [64, HIDDEN]),
                ("attn_output", [HIDDEN, 128]),
            ] {
                let name = format!("blk.{layer}.{name}.weight");
                let data = super::builder::random_data(&name, &shape, TENSOR_Q4_1);
                model = model.tensor(&name, &shape, TENSOR_Q4_1, data);
            }
            for name in ["attn_q_norm", "attn_k_norm"] {
                if family == "qwen3" {
                    let name = format!("blk.{layer}.{name}.weight");
                    model = model.tensor(&name, &[32], TENSOR_F32, vec![0; 4 * 32]);
                }
            }
        }
        model
    };
    for family in ["llama", "qwen3"] {
        assert_eq!(imported(&wide(family)).json("config.json")["head_dim"], 32);
    }
    assert_refused(&wide("qwen2"), &["qwen2.attention.key_length", "32", "16"]);
}

#[test]
fn other_architectures_are_named_with_the_supported_ones() {
    assert_refused(&model("gemma3"), &["gemma3", "llama, qwen2, qwen3"]);
}

#[test]
fn every_needed_metadata_key_is_named_when_it_is_missing() {
    for key in [
        "general.architecture",
        "qwen3.block_count",
        "qwen3.context_length",
        "qwen3.embedding_length",
        "qwen3.feed_forward_length",
        "qwen3.attention.head_count",
        "qwen3.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
    ] {
        assert_refused(&model("qwen3").without(key), &[key, "missing"]);
    }
}

#[test]
fn sizes_that_cannot_be_are_named() {
    for (key, value) in [
        ("block_count", 0),
        ("block_count", 1_000_000),
        ("embedding_length", 0),
        ("embedding_length", u32::MAX),
        ("attention.head_count", 5),
        ("attention.head_count_kv", 3),
        ("attention.key_length", 7),
        ("attention.value_length", 8),
        ("rope.dimension_count", 8),
        ("context_length", 0),
        ("vocab_size", 5),
    ] {
        let key = format!("llama.{key}");
        assert_refused(
            &model("llama").u32(&key, value),
            &[&key, &value.to_string()],
        );
    }
    for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let key = "llama.attention.layer_norm_rms_epsilon";
        assert_refused(&model("llama").f32(key, value), &[key]);
    }
}

#[test]
fn what_config_json_cannot_say_is_refused() {
    for (model, key) in [
        (
            model("llama").u32("llama.expert_count", 8),
            "llama.expert_count",
        ),
        (
            model("qwen2").u32("qwen2.attention.sliding_window", 64),
            "qwen2.attention.sliding_window",
        ),
        (
            model("llama").f32("llama.attention.scale", 0.5),
            "llama.attention.scale",
        ),
        (
            model("llama").f32("llama.logit_scale", 2.0),
            "llama.logit_scale",
        ),
        (
            model("qwen3").flag("qwen3.attention.causal", false),
            "qwen3.attention.causal",
        ),
    ] {
        assert_refused(&model, &[key]);
    }
}

#[test]
fn metadata_nobody_asks_for_is_a_warning_and_that_without_effect_is_not() {
    let model = model("llama")
        .u32("llama.new_feature", 1)
        .text("llama.tensor_data_layout", "Meta AI original pth")
        .u32("other.new_feature", 1);
    let summary = Case::new(&model)
        .import()
        .expect("this model can be imported");
    let expected = "metadata key llama.new_feature is not known and not imported";
    assert_eq!(summary.warnings, [expected]);
}

#[test]
fn a_part_of_a_split_model_is_refused() {
    assert_refused(&model("llama").u32("split.count", 3), &["3 parts", "merge"]);
    assert!(
        Case::new(&model("llama").u32("split.count", 1))
            .import()
            .is_ok()
    );
}

#[test]
fn other_tensor_types_name_tensor_type_and_what_is_supported() {
    let shape = [INNER, HIDDEN];
    let model = model("llama").tensor("blk.0.ffn_up.weight", &shape, TENSOR_Q6_K, Vec::new());
    assert_refused(
        &model,
        &[
            "blk.0.ffn_up.weight",
            "Q6_K",
            "F32, F16, BF16, Q4_0, Q4_1, Q8_0",
        ],
    );
    let model = model.tensor("blk.0.ffn_up.weight", &shape, 999, Vec::new());
    assert_refused(&model, &["blk.0.ffn_up.weight", "999"]);
}

#[test]
fn missing_and_surplus_tensors_are_named() {
    assert_refused(
        &model("llama").without_tensor("blk.1.ffn_up.weight"),
        &["blk.1.ffn_up.weight"],
    );
    assert_refused(
        &model("llama").without_tensor("token_embd.weight"),
        &["token_embd.weight"],
    );
    assert_refused(
        &model("qwen2").without_tensor("blk.0.attn_v.bias"),
        &["blk.0.attn_v.bias"],
    );
    assert_refused(
        &model("llama").u32("llama.block_count", 12),
        &["blk.2.", "and 85 more"],
    );
    assert_refused(
        &model("llama").u32("llama.block_count", 1),
        &["no place for", "blk.1."],
    );
    let surplus = with_biases(model("qwen3"), &[("attn_q", 64)]);
    assert_refused(
        &surplus,
        &["no place for", "blk.0.attn_q.bias", "blk.1.attn_q.bias"],
    );
    let partial = with_biases(model("llama"), &ATTENTION_BIASES[..3]);
    assert_refused(&partial, &["lacks", "blk.0.attn_output.bias"]);
}

#[test]
fn a_wrong_shape_names_tensor_found_and_expected() {
    let model = model("llama").tensor("output_norm.weight", &[32], TENSOR_F32, vec![0; 128]);
    assert_refused(&model, &["output_norm.weight", "[32]", "[64]"]);
}

#[test]
fn norms_are_floats() {
    let model = model("llama").tensor("output_norm.weight", &[64], TENSOR_Q8_0, vec![0; 68]);
    assert_refused(&model, &["output_norm.weight", "F32"]);
}

#[test]
fn a_block_that_holds_no_number_names_its_tensor() {
    let mut model = model("llama");
    for tensor in model
        .tensors
        .iter_mut()
        .filter(|tensor| tensor.name == "blk.0.attn_q.weight")
    {
        tensor.data[20..22].copy_from_slice(&half::f16::NAN.to_le_bytes());
    }
    assert_refused(&model, &["blk.0.attn_q.weight", "block 1"]);
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let case = Case::new(&Builder::empty());
    let error = import(&case.gguf.with_file_name("none.gguf"), &case.out);
    let text = error.expect_err("there is no such file").to_string();
    assert!(text.contains("none.gguf: cannot read"), "{text}");
}
