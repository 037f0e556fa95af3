use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::*;
use crate::request::{Body, Sampling};

/// The character of GPT-2's table for a byte; built as the table is defined, not from its inverse under test.
fn char_of_byte(byte: u8) -> char {
    let is_printable = |byte: u8| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    if is_printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&byte| !is_printable(byte)).count();
    char::from_u32(0x100 + before as u32).unwrap()
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
           "special": special})
}

// Added tokens follow the vocabulary of 261.
const BOS: u32 = 261;
const END: u32 = 262;
const ADDED: u32 = 263;

/// One token for each byte, a few merges of which one ends inside a character, a post-processor that begins with `<s>`.
fn byte_level() -> Value {
    let spelt = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|&byte| char_of_byte(byte))
            .collect::<String>()
    };
    let merges = [&b"h i"[..], b"a b", b"ab a", b"\xC3 \xA9", b"\xE4 \xBD"];
    let pairs: Vec<[String; 2]> = merges
        .iter()
        .map(|merge| {
            let middle = merge.iter().rposition(|&byte| byte == b' ').unwrap();
            [spelt(&merge[..middle]), spelt(&merge[middle + 1..])]
        })
        .collect();
    let tokens = (0..=255)
        .map(|byte| spelt(&[byte]))
        .chain(pairs.iter().map(|pair| pair.concat()));
    let vocab: Map<String, Value> = tokens
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": [added(BOS, "<s>", true), added(END, "<|end|>", true), added(ADDED, "é ja", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": pairs}
    })
}

/// Tokens for bytes and for a few words, with `▁` for a space.
fn sentencepiece(decoder: Value) -> Value {
    let words = [
        "▁", "a", "b", "▁a", "▁b", "▁▁", "ab", "é", "\u{FFFD}", "x", "▁ab",
    ];
    let tokens = (0..=255)
        .map(|byte| format!("<0x{byte:02X}>"))
        .chain(words.map(str::to_owned));
    let vocab: Map<String, Value> = tokens
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(267, "<s>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
                  "vocab": vocab, "merges": [["▁", "a"], ["▁", "b"], ["▁", "▁"], ["a", "b"]]}
    })
}

fn llama_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

fn metaspace_decoder() -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true})
}

/// A checkpoint directory with these files.
fn directory(files: &[(&str, &str)]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in files {
        std::fs::write(directory.path().join(name), content).unwrap();
    }
    directory
}

/// 2024-02-29 12:34:56 UTC.
const NOW_S: i64 = 1_709_210_096;

fn load(files: &[(&str, &str)]) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::load(directory(files).path(), NOW_S)
}

fn load_one(tokenizer: &Value) -> Tokenizer {
    load(&[("tokenizer.json", &tokenizer.to_string())]).unwrap()
}

/// A byte-level tokenizer with a chat template.
fn load_with_template(template: &str) -> Tokenizer {
    let config = json!({"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "<|end|>"}, "pad_token": null});
    load(&[
        ("tokenizer.json", &byte_level().to_string()),
        ("tokenizer_config.json", &config.to_string()),
    ])
    .unwrap()
}

// Loading

#[test]
fn a_checkpoint_without_a_tokenizer_is_told_apart_from_a_bad_one() {
    let missing = load(&[("tokenizer_config.json", "{}")]).unwrap_err();
    assert!(
        matches!(missing, TokenizerError::Missing { .. }),
        "{missing}"
    );
    assert!(missing.to_string().contains("only prompts of token ids"));
    for bad in ["", "{}", "[]", "{\"model\": 5}"] {
        let error = load(&[("tokenizer.json", bad)]).unwrap_err();
        assert!(
            matches!(error, TokenizerError::Invalid { .. }),
            "{bad}: {error}"
        );
    }
    let tokenizer = byte_level().to_string();
    for (file, content) in [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "{\"chat_template\": 5}"),
        (
            "tokenizer_config.json",
            "{\"chat_template\": [{\"name\": \"rag\", \"template\": \"x\"}]}",
        ),
        ("chat_template.json", "nothing"),
    ] {
        let error = load(&[("tokenizer.json", &tokenizer), (file, content)]).unwrap_err();
        assert!(
            matches!(error, TokenizerError::Invalid { .. }),
            "{content}: {error}"
        );
        assert!(error.to_string().contains(file), "{error}");
    }
}

#[test]
fn a_directory_in_place_of_a_file_is_an_error_that_names_it() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("tokenizer.json")).unwrap();
    let error = Tokenizer::load(directory.path(), NOW_S).unwrap_err();
    assert!(
        matches!(error, TokenizerError::File(_)) && error.to_string().contains("tokenizer.json"),
        "{error}"
    );
}

#[test]
fn truncation_and_padding_of_the_file_are_ignored() {
    let ids = load_one(&byte_level()).encode("xyzxyzxyzxyz").unwrap();
    assert_eq!(ids.len(), 13);
    assert_eq!(load_one(&byte_level()).encode("x").unwrap().len(), 2);
}

#[test]
fn texts_that_cannot_fit_are_refused_before_they_are_tokenised() {
    let mut tokenizer = load_one(&byte_level());
    // The longest token and nothing else.
    let vocabulary = tokenizer.inner.get_vocab(true);
    let longest = vocabulary.keys().max_by_key(|token| token.len()).unwrap();
    let text = longest.repeat(50);
    let ids = tokenizer.encode(&text).unwrap();
    tokenizer.limit_texts(ids.len());
    assert_eq!(
        tokenizer.encode(&text).unwrap(),
        ids,
        "what fits is never refused"
    );
    let error = tokenizer.encode(&text.repeat(10)).unwrap_err();
    assert!(matches!(error, TokenizerError::TooLong { .. }), "{error}");
    let rejection = Rejection::from(error);
    assert_eq!(rejection.code, RejectionCode::ContextLengthExceeded);
    assert!(rejection.message.contains("--context"), "{rejection}");
}

#[test]
fn the_end_of_sequence_token_is_found_by_its_name() {
    assert_eq!(load_with_template("x").eos_token_id(), Some(END));
    assert_eq!(load_one(&byte_level()).eos_token_id(), None);
}

// Encoding

#[test]
fn a_text_gets_the_special_tokens_once() {
    let tokenizer = load_with_template("x");
    assert_eq!(tokenizer.encode("hi").unwrap(), [BOS, 256]);
    assert_eq!(tokenizer.encode("<s>hi").unwrap(), [BOS, 256]);
}

#[test]
fn a_conversation_gets_only_the_special_tokens_of_its_template() {
    let tokenizer = load_with_template("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}");
    assert_eq!(
        tokenizer.encode_chat(&Chat::from_user("hi")).unwrap(),
        [BOS, 256, END]
    );
    let tokenizer = load_with_template("{{ messages[0].content }}");
    assert_eq!(
        tokenizer.encode_chat(&Chat::from_user("hi")).unwrap(),
        [256]
    );
}

#[test]
fn each_kind_of_prompt_is_encoded_in_its_way() {
    let tokenizer = load_with_template("[{{ messages[0].content }}]");
    let hi = || "hi".to_owned();
    let (left, right) = (u32::from(b'['), u32::from(b']'));
    for (prompt, raw, ids) in [
        (Prompt::Plain(hi()), false, vec![left, 256, right]),
        (Prompt::Plain(hi()), true, vec![BOS, 256]),
        (Prompt::Text(hi()), false, vec![BOS, 256]),
        (
            Prompt::Chat(Chat::from_user("hi")),
            true,
            vec![left, 256, right],
        ),
        (Prompt::Tokens(vec![5, u32::MAX]), false, vec![5, u32::MAX]),
    ] {
        assert_eq!(
            tokenizer.encode_prompt(&prompt, raw).unwrap(),
            ids,
            "{prompt:?}, raw: {raw}"
        );
    }
}

#[test]
fn a_prompt_without_tokens_is_an_error() {
    let tokenizer = load_with_template("");
    let chat = Prompt::Chat(Chat::from_user("hi"));
    assert!(matches!(
        tokenizer.encode_prompt(&chat, false),
        Err(TokenizerError::EmptyPrompt)
    ));
    assert_eq!(
        tokenizer
            .encode_prompt(&Prompt::Text(String::new()), false)
            .unwrap(),
        [BOS]
    );
}

// The chat template

#[test]
fn templates_render_as_in_transformers() {
    let cases: Vec<Value> =
        serde_json::from_str(include_str!("../../tests/chat_templates/chat_cases.json")).unwrap();
    assert!(cases.len() >= 10);
    for case in cases {
        let config =
            json!({"chat_template": case["template"], "bos_token": "<s>", "eos_token": "</s>"})
                .to_string();
        let tokenizer = byte_level().to_string();
        let tokenizer = load(&[
            ("tokenizer.json", &tokenizer),
            ("tokenizer_config.json", &config),
        ])
        .unwrap();
        let text = tokenizer
            .render_chat(&chat(&case["messages"], &case["arguments"]))
            .unwrap();
        assert_eq!(text, case["expected"].as_str().unwrap(), "{}", case["name"]);
    }
}

/// A conversation as a request brings it.
fn chat(messages: &Value, arguments: &Value) -> Chat {
    let defaults = Sampling::greedy(1);
    let body = json!({"messages": messages, "chat_template_kwargs": arguments}).to_string();
    match Body::parse(body.as_bytes(), None, &defaults)
        .unwrap()
        .prompts
        .remove(0)
    {
        Prompt::Chat(chat) => chat,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_template_may_stand_in_any_of_its_three_places() {
    let tokenizer = byte_level().to_string();
    let render = |files: &[(&str, &str)]| {
        let files: Vec<_> = files
            .iter()
            .copied()
            .chain([("tokenizer.json", tokenizer.as_str())])
            .collect();
        load(&files)
            .unwrap()
            .render_chat(&Chat::from_user("hi"))
            .unwrap()
    };
    let field = ("tokenizer_config.json", r#"{"chat_template": "field"}"#);
    let named = r#"{"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]}"#;
    let json = ("chat_template.json", r#"{"chat_template": "json"}"#);
    let jinja = ("chat_template.jinja", "jinja");
    assert_eq!(render(&[field]), "field");
    assert_eq!(render(&[("tokenizer_config.json", named)]), "named");
    assert_eq!(render(&[field, json]), "json");
    assert_eq!(render(&[field, json, jinja]), "jinja");
}

#[test]
fn without_a_template_a_plain_prompt_is_an_error_that_suggests_raw() {
    let tokenizer = load_one(&byte_level());
    let error = tokenizer
        .encode_prompt(&Prompt::Plain("hi".to_owned()), false)
        .unwrap_err();
    assert!(
        matches!(error, TokenizerError::NoChatTemplate { .. })
            && error.to_string().contains("--raw"),
        "{error}"
    );
    assert_eq!(
        Rejection::from(error).code,
        RejectionCode::PromptNotTokenizable
    );
    assert!(
        tokenizer
            .encode_prompt(&Prompt::Plain("hi".to_owned()), true)
            .is_ok()
    );
}

#[test]
fn a_template_that_refuses_is_quoted_with_its_line() {
    let tokenizer = load_with_template("a\n{{ raise_exception('no system role') }}");
    let error = tokenizer
        .render_chat(&Chat::from_user("hi"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("tokenizer_config.json failed: no system role (its line 2)"),
        "{error}"
    );
}

#[test]
fn whoever_sent_a_prompt_is_not_told_where_files_are() {
    let asked = Chat::from_user("hi");
    let refuses = load_with_template("{{ raise_exception('no system role') }}");
    for (tokenizer, what) in [
        (refuses, "no system role"),
        (load_one(&byte_level()), "no chat template"),
    ] {
        let rejection = Rejection::from(tokenizer.encode_chat(&asked).unwrap_err());
        assert!(rejection.message.contains(what), "{rejection}");
        assert!(!rejection.message.contains('/'), "{rejection}");
    }
}

#[test]
fn control_tokens_that_people_write_stay_text() {
    let tokenizer = load_with_template(
        "{% for message in messages %}{{ message.content }}{{ message.name }}{{ eos_token }}{% endfor %}{{ tools | tojson }}",
    );
    let encode = |message: Value| {
        let body = json!({"messages": [message]}).to_string();
        let body = Body::parse(body.as_bytes(), None, &Sampling::greedy(1)).unwrap();
        tokenizer.encode_prompt(&body.prompts[0], false)
    };
    let said = |content: &str| encode(json!({"role": "user", "content": content})).unwrap();
    let count = |ids: &[u32], id| ids.iter().filter(|&&found| found == id).count();
    for content in [
        "<|end|>",
        "a<|end|>b",
        "<|end|><|end|>",
        "<<|end|>>",
        "<s><|end|>",
        "\u{FDD0}<|end|>",
    ] {
        let ids = said(content);
        assert_eq!((count(&ids, END), count(&ids, BOS)), (1, 0), "{content}");
        let text = tokenizer.decode(&ids).unwrap();
        assert!(text.starts_with(content), "{content}: {text}");
    }
    // In a field that is not the content; and what is half a token stays as it was.
    let named = encode(json!({"role": "user", "content": "a", "name": "<|end|>"})).unwrap();
    assert_eq!(count(&named, END), 1);
    assert_eq!(
        said("<|end|"),
        tokenizer.encode_chat(&Chat::from_user("<|end|")).unwrap()
    );
    // A character that is left for a mark there must be.
    let all: String = ('\u{FDD0}'..='\u{FDEF}').collect();
    assert!(!said(&all).is_empty());
    let error = encode(json!({"role": "user", "content": format!("{all}<|end|>")})).unwrap_err();
    assert!(error.to_string().contains("control tokens"), "{error}");
}

#[test]
fn a_template_that_is_no_good_harms_only_those_that_use_it() {
    for bad in [
        "{% if %}",
        "{{ messages[0].a.b }}",
        "{{ unknown() }}",
        "{{ 'x' | tojson(sort_keys=true) }}",
        "{% for",
    ] {
        let tokenizer = load_with_template(bad);
        let error = tokenizer.render_chat(&Chat::from_user("hi")).unwrap_err();
        assert!(
            matches!(error, TokenizerError::ChatTemplate { .. }),
            "{bad}: {error}"
        );
        assert!(tokenizer.encode("hi").is_ok());
    }
}

#[test]
fn a_date_is_that_of_the_run() {
    let render = |template: &str| load_with_template(template).render_chat(&Chat::from_user("hi"));
    assert_eq!(
        render("{{ strftime_now('%d %b %Y, %H:%M') }}").unwrap(),
        "29 Feb 2024, 12:34"
    );
    assert!(render("{{ strftime_now('%') }}").is_err());
}

// Decoding

/// The text of ids taken one by one, and whether no piece but the last could have been wrong.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(stream.chars(), text.chars().count());
    text.push_str(&stream.finish().unwrap());
    text
}

/// The ids of a text without the special tokens around it.
fn ids_of(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.ids(text, false).unwrap()
}

#[test]
fn every_byte_has_its_character() {
    for byte in 0..=255 {
        assert_eq!(byte_of_char(char_of_byte(byte)), Some(byte));
    }
    let chars: usize = (0..=u32::from(char::MAX))
        .filter_map(char::from_u32)
        .filter_map(byte_of_char)
        .count();
    assert_eq!(chars, 256);
}

#[test]
fn a_split_character_is_held_until_it_is_whole() {
    let tokenizer = load_one(&byte_level());
    let ids = ids_of(&tokenizer, "a你");
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, ["a", "", "你"]);
    assert_eq!(stream.finish().unwrap(), "");
}

#[test]
fn a_character_that_never_ends_becomes_a_replacement_character() {
    for tokenizer in [byte_level(), sentencepiece(llama_decoder())] {
        let tokenizer = load_one(&tokenizer);
        assert_eq!(streamed(&tokenizer, &[0xE4]), "\u{FFFD}");
    }
}

#[test]
fn special_tokens_have_bytes_and_no_text() {
    let tokenizer = load_one(&byte_level());
    assert_eq!(
        streamed(&tokenizer, &[u32::from(b'x'), END, u32::from(b'y'), BOS]),
        "xy"
    );
    assert_eq!(tokenizer.token_bytes(END).unwrap(), b"<|end|>");
    assert_eq!(tokenizer.token_bytes(0xE4).unwrap(), [0xE4]);
    assert_eq!(tokenizer.token_bytes(ADDED).unwrap(), "é ja".as_bytes());
    assert_eq!(tokenizer.token_bytes(9999), None);
    let tokenizer = load_one(&sentencepiece(llama_decoder()));
    assert_eq!(tokenizer.token_bytes(0x0A).unwrap(), b"\n");
    assert_eq!(tokenizer.token_bytes(256 + 3).unwrap(), b" a");
}

#[test]
fn only_the_first_word_loses_its_space() {
    for decoder in [llama_decoder(), metaspace_decoder()] {
        let tokenizer = load_one(&sentencepiece(decoder));
        let ids = ids_of(&tokenizer, "a b  ab");
        assert_eq!(streamed(&tokenizer, &ids), "a b  ab");
    }
}

#[test]
fn characters_of_byte_tokens_come_as_soon_as_they_are_whole() {
    let tokenizer = load_one(&sentencepiece(llama_decoder()));
    let ids = ids_of(&tokenizer, "你好");
    assert_eq!(ids.len(), 7);
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, ["", "", "", "你", "", "", "好"]);
}

#[test]
fn bytes_that_are_no_character_do_not_hold_the_answer_back() {
    let tokenizer = load_one(&sentencepiece(llama_decoder()));
    let mut stream = tokenizer.stream();
    let chars: usize = (0..1000)
        .map(|_| stream.push(0xFF).unwrap().chars().count())
        .sum();
    assert_eq!(chars, 1000);
    let mut stream = tokenizer.stream();
    assert_eq!(
        [0xE4, 0xBD, 0xA0, 0xE4]
            .map(|id| stream.push(id).unwrap())
            .concat(),
        "你"
    );
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
}

proptest! {
    #[test]
    fn byte_level_pieces_are_what_decoding_all_at_once_gives(ids in proptest::collection::vec(0_u32..270, 0..40)) {
        let tokenizer = shared_byte_level();
        prop_assert_eq!(streamed(tokenizer, &ids), tokenizer.decode(&ids).unwrap());
    }

    #[test]
    fn sentencepiece_pieces_are_what_decoding_all_at_once_gives(words in proptest::collection::vec(256_u32..267, 0..20)) {
        for tokenizer in shared_sentencepiece() {
            prop_assert_eq!(streamed(tokenizer, &words), tokenizer.decode(&words).unwrap());
        }
    }

    #[test]
    fn a_text_comes_back_from_its_ids(text in "[ab éx你𝄞\n]{0,20}") {
        for tokenizer in [shared_byte_level(), &shared_sentencepiece()[0]] {
            prop_assert_eq!(streamed(tokenizer, &ids_of(tokenizer, &text)), text.as_str());
        }
    }
}

fn shared_byte_level() -> &'static Tokenizer {
    static SHARED: std::sync::LazyLock<Tokenizer> =
        std::sync::LazyLock::new(|| load_one(&byte_level()));
    &SHARED
}

fn shared_sentencepiece() -> &'static [Tokenizer; 2] {
    static SHARED: std::sync::LazyLock<[Tokenizer; 2]> = std::sync::LazyLock::new(|| {
        [llama_decoder(), metaspace_decoder()].map(|decoder| load_one(&sentencepiece(decoder)))
    });
    &SHARED
}

// Stop texts

fn stopped(stops: &[String], pieces: &[&str]) -> (String, bool) {
    let mut matcher = StopMatcher::new(stops);
    let (mut text, mut is_stopped) = (String::new(), false);
    for piece in pieces {
        let matched = matcher.push(piece);
        assert!(
            !is_stopped
                || matched
                    == Matched {
                        text: String::new(),
                        is_stopped: true
                    }
        );
        text.push_str(&matched.text);
        is_stopped = matched.is_stopped;
    }
    text.push_str(&matcher.finish());
    (text, is_stopped)
}

/// The same by searching the whole: the stop that ends first, of those the one that starts first.
fn stopped_naively(stops: &[String], text: &str) -> (String, bool) {
    let ends = stops.iter().filter_map(|stop| {
        text.find(stop.as_str())
            .map(|start| (start + stop.len(), start))
    });
    match ends.min() {
        Some((_, start)) => (text[..start].to_owned(), true),
        None => (text.to_owned(), false),
    }
}

fn stops(stops: &[&str]) -> Vec<String> {
    stops.iter().map(|&stop| stop.to_owned()).collect()
}

#[test]
fn text_that_may_be_the_start_of_a_stop_is_held_and_no_more() {
    let mut matcher = StopMatcher::new(&stops(&["\n\nQ:", "é!"]));
    let pieces = ["a\n", "\n", "b\n\nQ", " é", "x"].map(|piece| matcher.push(piece).text);
    assert_eq!(pieces, ["a", "", "\n\nb", "\n\nQ ", "éx"]);
}

#[test]
fn a_stop_across_pieces_ends_the_answer_before_it() {
    assert_eq!(
        stopped(
            &stops(&["END"]),
            &["good E", "N", "D and more", "even more"]
        ),
        ("good ".to_owned(), true)
    );
    assert_eq!(
        stopped(&stops(&["END"]), &["good E", "N"]),
        ("good EN".to_owned(), false)
    );
    assert_eq!(
        stopped(&stops(&["bc", "abcd", "abc"]), &["xabcd"]),
        ("x".to_owned(), true)
    );
    assert_eq!(stopped(&[], &["a", "b"]), ("ab".to_owned(), false));
    assert_eq!(
        stopped(&stops(&[""]), &["a", "b"]),
        ("ab".to_owned(), false)
    );
}

proptest! {
    #[test]
    fn any_split_of_the_text_stops_where_the_whole_does(
        stops in proptest::collection::vec("[abé]{1,4}", 0..4),
        pieces in proptest::collection::vec("[abé]{0,3}", 0..8),
    ) {
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        prop_assert_eq!(stopped(&stops, &pieces), stopped_naively(&stops, &pieces.concat()));
    }
}
