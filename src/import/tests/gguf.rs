//! Hostile files: whatever the bytes are, the reader answers with an error and never panics.

use proptest::prelude::*;

use super::super::gguf::{Gguf, GgufError};
use super::super::{Checkpoint, ModelError};
use super::builder::{
    ARRAY, BOOL, Builder, F32, STRING, TENSOR_F32, TENSOR_Q4_0, TENSOR_Q8_0, U32, model,
};

/// The text of the error that parsing ends with.
fn error(file: &[u8]) -> String {
    match Gguf::parse(file) {
        Ok(_) => panic!("this file should not be readable"),
        Err(error) => error.to_string(),
    }
}

/// Everything an import does before it writes.
fn plan(file: &[u8]) -> Result<(), ModelError> {
    let source = Gguf::parse(file)?;
    let checkpoint = Checkpoint::plan(&source)?;
    checkpoint.config();
    checkpoint.tokenizer_json().map(drop)
}

/// Asserts that the error names all the words.
#[track_caller]
fn assert_names(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "{error:?} does not mention {word:?}");
    }
}

/// One small tensor and nothing else.
fn one_tensor(shape: &[usize], type_id: u32, bytes: usize) -> Builder {
    Builder::empty().tensor("t", shape, type_id, vec![0; bytes])
}

#[test]
fn every_prefix_of_a_file_is_an_error() {
    let file = model("llama").build();
    assert!(plan(&file).is_ok());
    for length in 0..file.len() {
        assert!(
            Gguf::parse(&file[..length]).is_err(),
            "the first {length} bytes"
        );
    }
}

#[test]
fn versions_2_and_3_are_read_alike() {
    for version in [2, 3] {
        let file = Builder {
            version,
            ..model("qwen3")
        };
        assert!(plan(&file.build()).is_ok(), "version {version}");
    }
}

#[test]
fn other_versions_and_big_endian_files_are_named() {
    for version in [0, 1, 4] {
        let file = Builder {
            version,
            ..Builder::empty()
        };
        let text = error(&file.build());
        assert_names(&text, &[&format!("version {version}"), "2 or 3"]);
        assert!(!text.contains("big-endian"));
    }
    let file = Builder {
        version: 3u32.swap_bytes(),
        ..Builder::empty()
    };
    assert_names(&error(&file.build()), &["big-endian"]);
}

#[test]
fn other_magic_bytes_are_shown() {
    assert_names(
        &error(b"PK\x03\x04...."),
        &["not a GGUF file", "50, 4b, 03, 04"],
    );
    assert_names(&error(b""), &["not a GGUF file"]);
}

#[test]
fn counts_and_lengths_beyond_the_file_cost_no_memory() {
    let header = |tensors: u64, pairs: u64| {
        let mut file = Builder::empty().build();
        file.truncate(8);
        file.extend(tensors.to_le_bytes());
        file.extend(pairs.to_le_bytes());
        file
    };
    assert_names(
        &error(&header(u64::MAX, 0)),
        &["truncated", "a tensor's name"],
    );
    assert_names(
        &error(&header(0, u64::MAX)),
        &["truncated", "a metadata key"],
    );

    let mut long_key = header(0, 1);
    long_key.extend(u64::MAX.to_le_bytes());
    assert_names(&error(&long_key), &["truncated", &u64::MAX.to_string()]);

    for element_type in [U32, F32, BOOL, STRING, ARRAY] {
        for count in [usize::MAX, usize::MAX / 4 + 1, 1 << 40] {
            let file = Builder::empty().array("k", element_type, count, &[]);
            assert_names(&error(&file.build()), &["truncated"]);
        }
    }
}

#[test]
fn strings_that_are_not_utf8_are_refused_wherever_they_stand() {
    let not_utf8 = [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat();
    let value = Builder::empty().raw("k", STRING, &not_utf8);
    let element = Builder::empty().array("k", STRING, 1, &not_utf8);
    let nested = [&STRING.to_le_bytes()[..], &1u64.to_le_bytes(), &not_utf8].concat();
    let nested = Builder::empty().array("k", ARRAY, 1, &nested);
    for file in [value, element, nested] {
        assert_names(&error(&file.build()), &["not UTF-8"]);
    }
    let mut key = Builder::empty().u32("kk", 1).build();
    let at = key.windows(2).position(|bytes| bytes == b"kk");
    key[at.expect("the key is in the file")] = 0xff;
    assert_names(&error(&key), &["not UTF-8"]);
}

#[test]
fn arrays_may_nest_but_not_without_end() {
    let nested = |depth: usize| {
        let mut value = [&U32.to_le_bytes()[..], &0u64.to_le_bytes()].concat();
        for _ in 1..depth {
            value = [&ARRAY.to_le_bytes()[..], &1u64.to_le_bytes(), &value].concat();
        }
        Builder::empty().raw("deep", ARRAY, &value).build()
    };
    for depth in 1..=4 {
        assert!(Gguf::parse(&nested(depth)).is_ok(), "depth {depth}");
    }
    for depth in [5, 6, 100_000] {
        assert_names(&error(&nested(depth)), &["deep", "nested"]);
    }
}

#[test]
fn unknown_value_types_and_odd_bools_name_their_key() {
    let scalar = Builder::empty().raw("k", 13, &[0; 8]);
    assert_names(&error(&scalar.build()), &["`k`", "value type 13"]);
    let element = Builder::empty().array("k", 99, 0, &[]);
    assert_names(&error(&element.build()), &["`k`", "value type 99"]);
    let odd = Builder::empty().raw("k", BOOL, &[2]);
    assert_names(&error(&odd.build()), &["`k`", "bool"]);
}

#[test]
fn names_that_occur_twice_are_refused() {
    let mut file = Builder::empty().u32("k", 1);
    file.pairs.push(file.pairs[0].clone());
    assert_names(&error(&file.build()), &["metadata key `k`", "twice"]);
    let mut file = one_tensor(&[1], TENSOR_F32, 4);
    file.tensors.push(file.tensors[0].clone());
    assert_names(&error(&file.build()), &["tensor `t`", "twice"]);
}

#[test]
fn the_alignment_is_a_power_of_two_and_is_used() {
    for alignment in [0, 3, 48] {
        let file = one_tensor(&[1], TENSOR_F32, 4).u32("general.alignment", alignment);
        assert_names(
            &error(&file.build()),
            &["general.alignment", &alignment.to_string()],
        );
    }
    for alignment in [1, 8, 256, 1 << 20] {
        let file = Builder {
            alignment,
            ..one_tensor(&[1], TENSOR_F32, 4).u32("general.alignment", alignment as u32)
        };
        assert!(Gguf::parse(&file.build()).is_ok(), "alignment {alignment}");
    }
}

#[test]
fn dimensions_that_overflow_are_refused() {
    for shape in [
        vec![usize::MAX, 2],
        vec![usize::MAX / 4, 1],
        vec![1 << 32, 1 << 31],
        vec![1 << 16; 4],
    ] {
        let text = error(&one_tensor(&shape, TENSOR_F32, 4).build());
        assert_names(&text, &["tensor `t`"]);
    }
    let text = error(&one_tensor(&[1 << 32, 1 << 32], TENSOR_F32, 4).build());
    assert_names(&text, &["overflow"]);
}

#[test]
fn no_dimensions_too_many_and_empty_ones_are_refused() {
    for (shape, words) in [
        (vec![], "0 dimensions"),
        (vec![1; 5], "5 dimensions"),
        (vec![0], "zero"),
        (vec![4, 0], "zero"),
    ] {
        let text = error(&one_tensor(&shape, TENSOR_F32, 4).build());
        assert_names(&text, &["tensor `t`", words]);
    }
}

#[test]
fn rows_are_whole_blocks() {
    for (shape, type_id) in [(vec![2, 48], TENSOR_Q4_0), (vec![64, 1], TENSOR_Q8_0)] {
        let text = error(&one_tensor(&shape, type_id, 1000).build());
        assert_names(&text, &["tensor `t`", "blocks of 32"]);
    }
}

#[test]
fn offsets_outside_the_file_or_off_the_alignment_are_refused() {
    for (offset, words) in [
        (32, "outside"),
        (u64::MAX - 31, "outside"),
        (1 << 62, "outside"),
        (1, "alignment"),
        (u64::MAX, "alignment"),
    ] {
        let mut file = one_tensor(&[2], TENSOR_F32, 8);
        file.tensors[0].offset = Some(offset);
        assert_names(&error(&file.build()), &["tensor `t`", words]);
    }
}

#[test]
fn tensors_do_not_share_bytes() {
    let mut file = one_tensor(&[16], TENSOR_F32, 64).tensor("u", &[1], TENSOR_F32, vec![0; 4]);
    assert!(Gguf::parse(&file.build()).is_ok());
    for offset in [0, 32] {
        file.tensors[1].offset = Some(offset);
        assert_names(&error(&file.build()), &["tensor", "overlaps"]);
    }
}

#[test]
fn a_value_of_another_type_names_key_expected_and_found() {
    let file = Builder::empty().text("k", "seven").build();
    let gguf = Gguf::parse(&file).expect("the file is well-formed");
    let text = match gguf.metadata.count("k") {
        Err(error @ GgufError::WrongType { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert_names(&text, &["`k`", "a string", "a non-negative integer"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_damaged_file_never_panics(places in prop::collection::vec((0.0f64..1.0, any::<u8>()), 1..6)) {
        let mut file = model("llama").build();
        // The directory is where damage matters; the last tensors' data is not damaged.
        let reach = file.len() as f64 / 3.0;
        for (place, byte) in places {
            file[(place * reach) as usize] = byte;
        }
        let _ = plan(&file);
    }

    #[test]
    fn random_bytes_after_the_header_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut file = Builder::empty().build();
        file.truncate(8);
        file.extend([1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        file.extend(bytes);
        let _ = plan(&file);
    }
}
