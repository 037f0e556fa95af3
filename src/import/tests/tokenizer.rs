//! The tokenizer, by what it makes of texts.

use serde_json::Value;
use tokenizers::Tokenizer;

use super::super::gguf::Gguf;
use super::super::{Checkpoint, ModelError};
use super::builder::{Builder, Vocab, model};

/// `tokenizer.json` as its readers see it.
fn tokenizer(model: &Builder) -> Tokenizer {
    let file = model.build();
    let bytes = with_checkpoint(&file, |checkpoint| checkpoint.tokenizer_json())
        .and_then(|tokenizer| tokenizer);
    Tokenizer::from_bytes(bytes.expect("a tokenizer")).expect("the library loads it")
}

fn with_checkpoint<T>(file: &[u8], look: impl Fn(&Checkpoint<'_>) -> T) -> Result<T, ModelError> {
    let source = Gguf::parse(file)?;
    Ok(look(&Checkpoint::plan(&source)?))
}

fn generation_config(model: &Builder) -> Value {
    with_checkpoint(&model.build(), |checkpoint| checkpoint.generation_config())
        .expect("an importable model")
}

fn tokenizer_config(model: &Builder) -> Value {
    with_checkpoint(&model.build(), |checkpoint| checkpoint.tokenizer_config())
        .expect("an importable model")
}

/// The pieces a text falls into.
fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let encoding = tokenizer
        .encode(text, true)
        .expect("any text can be encoded");
    encoding.get_tokens().to_vec()
}

/// A model whose words are cut by these rules.
fn cut_by(rules: &str) -> Builder {
    model("llama").text("tokenizer.ggml.pre", rules)
}

#[track_caller]
fn assert_refused(model: &Builder, words: &[&str]) {
    let text = match with_checkpoint(&model.build(), |checkpoint| checkpoint.tokenizer_json())
        .and_then(|tokenizer| tokenizer)
    {
        Ok(_) => panic!("this tokenizer cannot be imported"),
        Err(error) => error.to_string(),
    };
    for word in words {
        assert!(text.contains(word), "{text:?} does not mention {word:?}");
    }
}

#[test]
fn digits_are_cut_as_each_family_cuts_them() {
    for (rules, expected) in [
        ("gpt-2", vec!["1234"]),
        ("smollm", vec!["1", "2", "3", "4"]),
        ("qwen2", vec!["1", "2", "3", "4"]),
        ("llama-bpe", vec!["<|begin|>", "123", "4"]),
    ] {
        assert_eq!(
            pieces(&tokenizer(&cut_by(rules)), "1234"),
            expected,
            "{rules}"
        );
    }
}

#[test]
fn words_are_cut_as_each_family_cuts_them() {
    // Llama 3 and Qwen 2 keep a punctuation mark with the letters behind it and take line ends with marks.
    for (rules, expected) in [
        ("gpt-2", vec!["Ġthe", "(", "the", ")", "Ċ", "Ċ", "Ġthe"]),
        ("smollm", vec!["Ġthe", "(", "the", ")", "Ċ", "Ċ", "Ġthe"]),
        ("qwen2", vec!["Ġthe", "(", "the", ")", "Ċ", "Ċ", "Ġthe"]),
        (
            "llama-bpe",
            vec!["<|begin|>", "Ġthe", "(", "the", ")", "Ċ", "Ċ", "Ġthe"],
        ),
    ] {
        assert_eq!(
            pieces(&tokenizer(&cut_by(rules)), " the(the)\n\n the"),
            expected,
            "{rules}"
        );
    }
}

#[test]
fn only_llama_3_takes_a_word_whole_without_merges() {
    for rules in ["gpt-2", "smollm", "qwen2"] {
        assert_eq!(
            pieces(&tokenizer(&cut_by(rules)), "whole").len(),
            5,
            "{rules}"
        );
    }
    assert_eq!(
        pieces(&tokenizer(&cut_by("llama-bpe")), "whole"),
        ["<|begin|>", "whole"]
    );
}

#[test]
fn only_qwen_2_composes_characters_first() {
    for (rules, pieces_of_composed) in [("gpt-2", 3), ("smollm", 3), ("qwen2", 1)] {
        assert_eq!(
            pieces(&tokenizer(&cut_by(rules)), "e\u{301}").len(),
            pieces_of_composed,
            "{rules}"
        );
    }
}

#[test]
fn every_text_comes_back() {
    for rules in ["gpt-2", "smollm", "qwen2", "llama-bpe"] {
        let tokenizer = tokenizer(&cut_by(rules));
        for text in [
            "",
            " ",
            "the the  the\tthe\r\nthe\n\n\n",
            "12 345\u{a0}6789 ½ ٣ Ⅷ",
            "don't WE'LL 'S",
            "fn f(x: &[u8]) -> Option<u8> { x.first().copied() } // ok",
            "naïve Straße Ελλάδα Київ 日本語 한국어 עברית",
            "😀👨‍👩‍👧🏳️‍🌈",
            "\u{0}\u{1}\u{7f}\u{feff}",
            "<tool>the</tool>",
        ] {
            let ids = tokenizer
                .encode(text, false)
                .expect("any text can be encoded");
            let back = tokenizer
                .decode(ids.get_ids(), false)
                .expect("any ids can be decoded");
            assert_eq!(back, text, "{rules}");
        }
    }
}

#[test]
fn special_tokens_are_found_in_text_and_only_they_are_hidden() {
    let vocab = Vocab::tiny();
    let tokenizer = tokenizer(&model("llama"));
    let encoding = tokenizer
        .encode("the<|im_end|><tool>[PAD]", false)
        .expect("any text can be encoded");
    let tokens: Vec<&str> = encoding.get_tokens().iter().map(String::as_str).collect();
    assert_eq!(
        tokens,
        ["the", "<|im_end|>", "<tool>", "[", "P", "A", "D", "]"]
    );
    let ids = [
        vocab.id("the"),
        vocab.id("<|im_end|>"),
        vocab.id("<tool>"),
        vocab.id("[PAD]"),
    ];
    let shown = tokenizer
        .decode(&ids, true)
        .expect("any ids can be decoded");
    assert_eq!(shown, "the<tool>");
    for (id, token) in vocab.tokens.iter().enumerate() {
        let expected = (token != "[PAD]").then(|| token.clone());
        assert_eq!(tokenizer.id_to_token(id as u32), expected);
    }
}

#[test]
fn begin_and_end_tokens_are_added_as_the_file_says() {
    let both = model("llama")
        .flag("tokenizer.ggml.add_bos_token", true)
        .flag("tokenizer.ggml.add_eos_token", true);
    assert_eq!(
        pieces(&tokenizer(&both), "the"),
        ["<|begin|>", "the", "<|end|>"]
    );
    let pair = tokenizer(&both)
        .encode(("the", "the"), true)
        .expect("a pair can be encoded");
    let expected = ["<|begin|>", "the", "<|end|>", "<|begin|>", "the", "<|end|>"];
    assert_eq!(pair.get_tokens(), expected);
    assert_eq!(pieces(&tokenizer(&model("llama")), "the"), ["the"]);
    let without = cut_by("llama-bpe").flag("tokenizer.ggml.add_bos_token", false);
    assert_eq!(pieces(&tokenizer(&without), "the"), ["the"]);
}

#[test]
fn tokenizer_config_names_template_and_roles() {
    let config = tokenizer_config(&model("llama").u32("tokenizer.ggml.padding_token_id", 0));
    assert_eq!(
        config["chat_template"],
        "{{ messages[0].content }}<|im_end|>"
    );
    assert_eq!(config["bos_token"], "<|begin|>");
    assert_eq!(config["eos_token"], "<|end|>");
    assert_eq!(config["pad_token"], Vocab::tiny().tokens[0].as_str());
    assert_eq!(config.get("unk_token"), None);
    assert_eq!(config["model_max_length"], 512);
    let added = config["added_tokens_decoder"]
        .as_object()
        .expect("an object");
    let special: Vec<(&str, bool)> = added
        .values()
        .filter_map(|entry| Some((entry["content"].as_str()?, entry["special"].as_bool()?)))
        .collect();
    let expected = [
        ("<|begin|>", true),
        ("<|im_end|>", true),
        ("<|end|>", true),
        ("<tool>", false),
    ];
    assert_eq!(special, expected);
}

#[test]
fn generation_ends_at_end_of_text_and_at_the_ends_of_turns() {
    let vocab = Vocab::tiny();
    let (end, turn_end) = (vocab.id("<|end|>"), vocab.id("<|im_end|>"));
    // The template ends turns with <|im_end|>.
    assert_eq!(
        generation_config(&model("llama"))["eos_token_id"],
        serde_json::json!([end, turn_end])
    );
    let plain = model("llama").without("tokenizer.chat_template");
    assert_eq!(generation_config(&plain)["eos_token_id"], end);
    let named = plain.clone().u32("tokenizer.ggml.eot_token_id", turn_end);
    assert_eq!(
        generation_config(&named)["eos_token_id"],
        serde_json::json!([end, turn_end])
    );
    let same = plain.clone().u32("tokenizer.ggml.eot_token_id", end);
    assert_eq!(generation_config(&same)["eos_token_id"], end);
    let none = plain.without("tokenizer.ggml.eos_token_id");
    assert_eq!(generation_config(&none).get("eos_token_id"), None);
}

#[test]
fn further_chat_templates_are_a_warning() {
    let model = model("llama").text("tokenizer.chat_template.tool_use", "{{ tools }}");
    let warnings = with_checkpoint(&model.build(), |checkpoint| checkpoint.summary(0).warnings);
    assert!(warnings.is_ok_and(|warnings| warnings.len() == 1 && warnings[0].contains("tool_use")));
}

#[test]
fn other_tokenizers_are_named_with_the_supported_ones() {
    let model_kind = model("llama").text("tokenizer.ggml.model", "llama");
    assert_refused(&model_kind, &["tokenizer.ggml.model", "llama", "gpt2"]);
    let rules = cut_by("deepseek-llm");
    assert_refused(
        &rules,
        &[
            "tokenizer.ggml.pre",
            "deepseek-llm",
            "gpt-2, smollm, qwen2, llama-bpe",
        ],
    );
    let prefix = model("llama").flag("tokenizer.ggml.add_space_prefix", true);
    assert_refused(&prefix, &["tokenizer.ggml.add_space_prefix"]);
}

#[test]
fn vocabularies_that_contradict_themselves_are_refused() {
    let Vocab {
        tokens,
        types,
        merges,
    } = Vocab::tiny();
    let base = || model("llama");
    let with_tokens = |tokens: &[String]| base().texts("tokenizer.ggml.tokens", tokens);
    let with_types = |types: &[i32]| base().integers("tokenizer.ggml.token_type", types);
    let with_merge = |merge: &str| {
        let merges = [merges.as_slice(), &[merge.to_owned()]].concat();
        base().texts("tokenizer.ggml.merges", &merges)
    };

    let mut twice = tokens.clone();
    twice[3] = twice[2].clone();
    assert_refused(&with_tokens(&twice), &["tokens 2 and 3"]);
    let more = [tokens.as_slice(), &["more".to_owned()]].concat();
    assert_refused(&with_tokens(&more), &["rows", &more.len().to_string()]);
    assert_refused(&with_types(&types[1..]), &["token types"]);
    for token_type in [0, 6, 7, -1] {
        let types = [&[token_type], &types[1..]].concat();
        assert_refused(
            &with_types(&types),
            &["token 0", &format!("type {token_type}")],
        );
    }
    assert_refused(&with_merge("alone"), &["merge 7", "two tokens"]);
    assert_refused(&with_merge("t nowhere"), &["merge 7", "nowhere"]);
    assert_refused(&with_merge("t t"), &["merge 7", "\"tt\""]);
    for role in ["bos", "eos", "unknown", "padding", "eot"] {
        let key = format!("tokenizer.ggml.{role}_token_id");
        assert_refused(&base().u32(&key, tokens.len() as u32), &[&key]);
    }
}
