//! One test for each thing that can be wrong with a checkpoint, with the text the user gets;
//! and properties of the header on arbitrary bytes, compared with the `safetensors` crate.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::Path;

use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

use super::*;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SHARD_1: &str = "model-00001-of-00002.safetensors";
const SHARD_2: &str = "model-00002-of-00002.safetensors";

/// A safetensors file: header and data as given, right or wrong.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A file of `U8` vectors, each filled with its number among them.
fn file_of(tensors: &[(&str, usize)]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for (number, &(name, length)) in (0..).zip(tensors) {
        let begin = data.len();
        data.resize(begin + length, number);
        entries.push(format!(
            r#""{name}":{{"dtype":"U8","shape":[{length}],"data_offsets":[{begin},{}]}}"#,
            data.len()
        ));
    }
    file(&format!("{{{}}}", entries.join(",")), &data)
}

fn directory(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn single(bytes: &[u8]) -> TempDir {
    directory(&[(SINGLE, bytes)])
}

/// Bytes of all tensors.
fn total_bytes(checkpoint: &Checkpoint) -> u64 {
    checkpoint.iter().map(|(_, info)| info.bytes()).sum()
}

/// The same file without its data.
fn cut_off(bytes: &[u8]) -> &[u8] {
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    &bytes[..8 + header_bytes as usize]
}

/// The message with the directory's path written `DIR`.
fn text(dir: &TempDir, error: &CheckpointError) -> String {
    error
        .to_string()
        .replace(dir.path().to_str().unwrap(), "DIR")
}

fn open_error(dir: &TempDir) -> String {
    text(dir, &Checkpoint::open(dir.path()).unwrap_err())
}

fn header_error(header: &str, data_bytes: usize) -> String {
    open_error(&single(&file(header, &vec![0; data_bytes])))
}

// What is there

#[test]
fn a_single_file_is_a_checkpoint() {
    let dir = single(&file(
        r#"{"__metadata__":{"format":"mlx"},
            "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},
            "a":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}   "#,
        &[7; 16],
    ));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let listed: Vec<_> = checkpoint
        .iter()
        .map(|(name, info)| (name, info.dtype, &info.shape[..], info.bytes()))
        .collect();
    assert_eq!(
        listed,
        [
            ("a", Dtype::F32, &[][..], 4),
            ("b", Dtype::BF16, &[2, 3][..], 12)
        ]
    );
    assert_eq!(total_bytes(&checkpoint), 16);
    assert_eq!(
        checkpoint.file_holding("b"),
        Some(&*dir.path().join(SINGLE))
    );
    assert_eq!(checkpoint.file_holding("c"), None);
    assert_eq!(checkpoint.get("b").unwrap().shape, [2, 3]);
    assert!(checkpoint.get("c").is_none());
}

#[test]
fn an_index_with_two_files_is_a_checkpoint() {
    let index = format!(
        r#"{{"metadata":{{"total_size":1}},"weight_map":{{"a":"{SHARD_1}","b":"{SHARD_2}"}}}}"#
    );
    let (first, second) = (file_of(&[("a", 3)]), file_of(&[("b", 5)]));
    let dir = directory(&[
        (INDEX, index.as_bytes()),
        (SHARD_1, &first),
        (SHARD_2, &second),
    ]);
    assert_eq!(total_bytes(&Checkpoint::open(dir.path()).unwrap()), 8);
}

#[test]
fn an_index_with_the_single_file_is_a_checkpoint() {
    let index = format!(r#"{{"weight_map":{{"a":"{SINGLE}"}}}}"#);
    let dir = directory(&[(INDEX, index.as_bytes()), (SINGLE, &file_of(&[("a", 3)]))]);
    assert_eq!(total_bytes(&Checkpoint::open(dir.path()).unwrap()), 3);
}

#[test]
fn shards_without_an_index_are_a_checkpoint() {
    let dir = directory(&[
        (SHARD_1, &file_of(&[("a", 3)])),
        (SHARD_2, &file_of(&[("b", 5)])),
    ]);
    assert_eq!(total_bytes(&Checkpoint::open(dir.path()).unwrap()), 8);
}

#[test]
fn files_of_older_conversions_are_a_checkpoint() {
    for names in [
        ["weights.00.safetensors", "weights.01.safetensors"],
        ["weights.safetensors", "weights.1.safetensors"],
    ] {
        let dir = directory(&[
            (names[0], &file_of(&[("a", 3)])),
            (names[1], &file_of(&[("b", 5)])),
        ]);
        assert_eq!(total_bytes(&Checkpoint::open(dir.path()).unwrap()), 8);
    }
}

#[test]
fn symbolic_links_into_a_cache_are_followed() {
    let blobs = directory(&[("0123abcd", &file_of(&[("a", 3)]))]);
    let snapshot = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(blobs.path().join("0123abcd"), snapshot.path().join(SINGLE))
        .unwrap();
    let checkpoint = Checkpoint::open(snapshot.path()).unwrap();
    let mut bytes = [9; 3];
    let tensor = checkpoint.open_tensor("a").unwrap();
    tensor.read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0, 0, 0]);
}

#[test]
fn opening_reads_the_header_and_nothing_else() {
    struct Counted<R>(R, usize);
    impl<R: Read> Read for &mut Counted<R> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let bytes = self.0.read(buffer)?;
            self.1 += bytes;
            Ok(bytes)
        }
    }
    let bytes = file_of(&[("a", 1000), ("b", 5000)]);
    let mut input = Counted(&bytes[..], 0);
    let header = Header::read(&mut input, bytes.len() as u64, Path::new("f")).unwrap();
    assert_eq!(input.1 as u64, header.data_start());
    assert_eq!(input.1, bytes.len() - 6000);
}

// Directories and indexes

#[test]
fn a_missing_directory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = Checkpoint::open(&dir.path().join("none")).unwrap_err();
    assert_eq!(
        text(&dir, &error),
        "cannot read directory DIR/none: No such file or directory (os error 2)"
    );
}

#[test]
fn an_empty_directory_has_no_weights() {
    let dir = directory(&[("config.json", b"{}"), ("other.safetensors", b"")]);
    assert_eq!(
        open_error(&dir),
        "DIR: no weights here; expected model.safetensors, model.safetensors.index.json, \
         model-*.safetensors or weights.*.safetensors. Is this the directory of an MLX checkpoint? \
         A GGUF file must be imported first: mlx-pipe import MODEL.gguf OUT_DIR"
    );
}

#[test]
fn a_single_file_beside_shards_is_ambiguous() {
    let (a, b) = (file_of(&[("a", 3)]), file_of(&[("b", 5)]));
    let index = format!(r#"{{"weight_map":{{"a":"{SHARD_1}","b":"{SHARD_2}"}}}}"#);
    let files: [(&str, &[u8]); 4] = [
        (SINGLE, &a),
        (SHARD_1, &a),
        (SHARD_2, &b),
        (INDEX, index.as_bytes()),
    ];
    for files in [&files[..3], &files[..]] {
        assert_eq!(
            open_error(&directory(files)),
            "DIR: holds model.safetensors and also \"model-00001-of-00002.safetensors\", so it is \
             not clear which are the weights; remove one of the two"
        );
    }
}

#[test]
fn a_missing_shard_is_named() {
    let dir = directory(&[(SHARD_1, &file_of(&[("a", 3)]))]);
    assert_eq!(
        open_error(&dir),
        "DIR/model-00002-of-00002.safetensors is missing: the names of the other files count 2 \
         shards; download the checkpoint again"
    );
}

#[test]
fn a_directory_in_place_of_a_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join(SINGLE)).unwrap();
    assert_eq!(
        open_error(&dir),
        "DIR/model.safetensors: not a regular file"
    );
}

#[test]
fn a_link_to_nothing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join(SINGLE)).unwrap();
    assert_eq!(
        open_error(&dir),
        "cannot open DIR/model.safetensors: No such file or directory (os error 2)"
    );
}

fn index_error(index: &str, files: &[(&str, &[u8])]) -> String {
    let dir = directory(files);
    fs::write(dir.path().join(INDEX), index).unwrap();
    open_error(&dir)
}

#[test]
fn an_index_that_is_not_json_is_refused() {
    let after = "; download it again, or delete it to go by the files alone";
    let start = "DIR/model.safetensors.index.json: not a safetensors index: ";
    for (index, cause) in [
        ("{", "EOF while parsing an object at line 1 column 1"),
        ("{}", "missing field `weight_map` at line 1 column 2"),
        (
            r#"{"weight_map":{"a":1}}"#,
            "invalid type: integer `1`, expected a string at line 1 column 20",
        ),
        (r#"{"weight_map":{}}"#, "its weight_map is empty"),
    ] {
        assert_eq!(index_error(index, &[]), format!("{start}{cause}{after}"));
    }
}

#[test]
fn an_index_naming_a_file_that_is_not_there_is_refused() {
    assert_eq!(
        index_error(&format!(r#"{{"weight_map":{{"a":"{SHARD_1}"}}}}"#), &[]),
        "DIR/model.safetensors.index.json: names \"model-00001-of-00002.safetensors\", which is \
         not there; download the missing file"
    );
}

#[test]
fn an_index_cannot_lead_out_of_the_directory() {
    for file in [
        "../x.safetensors",
        "/x.safetensors",
        "a/x.safetensors",
        "..\\\\x.safetensors",
        "..",
        "",
        "/etc/passwd",
    ] {
        assert_eq!(
            index_error(&format!(r#"{{"weight_map":{{"a":"{file}"}}}}"#), &[]),
            format!(
                "DIR/model.safetensors.index.json: tensor \"a\" is said to be in \"{file}\"; \
                 expected the name of a .safetensors file in the same directory"
            )
        );
    }
}

#[test]
fn a_tensor_that_is_not_in_the_file_the_index_names_is_refused() {
    let index = format!(r#"{{"weight_map":{{"a":"{SINGLE}","b":"{SINGLE}"}}}}"#);
    assert_eq!(
        index_error(&index, &[(SINGLE, &file_of(&[("a", 3)]))]),
        "DIR/model.safetensors.index.json: says that tensor \"b\" is in \"model.safetensors\", but \
         it is not; index and files belong to different versions: download the checkpoint again, \
         or delete the index to go by the files alone"
    );
    let swapped = format!(r#"{{"weight_map":{{"a":"{SHARD_2}","b":"{SHARD_1}"}}}}"#);
    let error = index_error(
        &swapped,
        &[
            (SHARD_1, &file_of(&[("a", 3)])),
            (SHARD_2, &file_of(&[("b", 3)])),
        ],
    );
    assert!(
        error.contains(
            "says that tensor \"a\" is in \"model-00002-of-00002.safetensors\", but it is not"
        ),
        "{error}"
    );
}

#[test]
fn a_tensor_that_the_index_does_not_list_is_refused() {
    assert_eq!(
        index_error(
            &format!(r#"{{"weight_map":{{"a":"{SINGLE}"}}}}"#),
            &[(SINGLE, &file_of(&[("a", 3), ("b", 1)]))]
        ),
        "DIR/model.safetensors.index.json: does not list tensor \"b\" of \"model.safetensors\"; \
         index and files belong to different versions: download the checkpoint again, or delete \
         the index to go by the files alone"
    );
}

#[test]
fn a_tensor_in_two_files_is_refused() {
    let dir = directory(&[
        (SHARD_1, &file_of(&[("a", 3)])),
        (SHARD_2, &file_of(&[("b", 1), ("a", 3)])),
    ]);
    assert_eq!(
        open_error(&dir),
        "tensor \"a\" is in two files, DIR/model-00001-of-00002.safetensors and \
         DIR/model-00002-of-00002.safetensors; remove the file that does not belong here"
    );
}

// Headers

#[test]
fn a_file_shorter_than_its_header_length_is_refused() {
    for length in 0..8 {
        assert_eq!(
            open_error(&single(&[0; 8][..length])),
            format!(
                "DIR/model.safetensors: the file is shorter than a safetensors file can be: \
                 expected at least 8 bytes, found {length}; download it again"
            )
        );
    }
}

#[test]
fn a_file_that_ends_inside_its_header_is_refused() {
    let whole = file_of(&[("a", 3)]);
    let header_end = whole.len() - 3;
    for length in 8..header_end {
        assert_eq!(
            open_error(&single(&whole[..length])),
            format!(
                "DIR/model.safetensors: the file ends inside its header: expected at least \
                 {header_end} bytes, found {length}; download it again"
            )
        );
    }
}

#[test]
fn a_header_beyond_the_limit_is_refused_before_it_is_read() {
    for header_bytes in [MAX_HEADER_BYTES + 1, u64::MAX] {
        assert_eq!(
            open_error(&single(&header_bytes.to_le_bytes())),
            format!(
                "DIR/model.safetensors: the header says it has {header_bytes} bytes, more than the \
                 100000000 that safetensors allows; this is not a safetensors file, or it is \
                 damaged"
            )
        );
    }
}

#[test]
fn a_header_that_is_not_utf_8_is_refused() {
    assert_eq!(
        open_error(&single(b"\x03\0\0\0\0\0\0\0{\xff}")),
        "DIR/model.safetensors: the header is not UTF-8 (at header byte 1); this is not a \
         safetensors file, or it is damaged"
    );
}

#[test]
fn a_header_that_is_not_the_right_json_is_refused() {
    for (header, cause) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{", "EOF while parsing an object at line 1 column 1"),
        (
            "[]",
            "invalid type: sequence, expected an object of tensors by name at line 1 column 0",
        ),
        ("{} x", "trailing characters at line 1 column 4"),
        (
            r#"{"a":{"dtype":"U8","shape":[0]}}"#,
            "\"a\": missing field `data_offsets` at line 1 column 31",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}}"#,
            "\"a\": invalid value: integer `-1`, expected usize at line 1 column 30",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0]}}"#,
            "\"a\": invalid length 1, expected a tuple of size 2 at line 1 column 49",
        ),
        (
            r#"{"__metadata__":{"a":1}}"#,
            "\"__metadata__\": invalid type: integer `1`, expected a string at line 1 column 22",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}"#,
            "\"a\": the name comes twice at line 1 column 56",
        ),
    ] {
        assert_eq!(
            header_error(header, 0),
            format!(
                "DIR/model.safetensors: the header is not a safetensors header: {cause}; the file \
                 is damaged, download it again"
            )
        );
    }
}

#[test]
fn an_unknown_dtype_is_named() {
    assert_eq!(
        header_error(
            r#"{"a":{"dtype":"Q4","shape":[2],"data_offsets":[0,1]}}"#,
            1
        ),
        "DIR/model.safetensors: tensor \"a\": dtype \"Q4\" is unknown; expected a safetensors \
         dtype such as BF16, F16, F32 or U32"
    );
}

#[test]
fn a_shape_that_overflows_is_refused() {
    for (dtype, shape) in [
        ("U8", "[4294967296, 4294967296]"),
        ("F64", "[1, 4611686018427387904]"),
    ] {
        assert_eq!(
            header_error(
                &format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,0]}}}}"#),
                0
            ),
            format!(
                "DIR/model.safetensors: tensor \"a\": the size of {dtype} {shape} overflows; the \
                 header is damaged"
            )
        );
    }
}

#[test]
fn half_a_byte_is_refused() {
    assert_eq!(
        header_error(
            r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#,
            1
        ),
        "DIR/model.safetensors: tensor \"a\": F4 [3] does not fill whole bytes; the header is \
         damaged"
    );
}

#[test]
fn offsets_must_fit_dtype_and_shape() {
    for (begin, end) in [(0, 3), (0, 5), (4, 0), (0, usize::MAX)] {
        assert_eq!(
            header_error(
                &format!(r#"{{"a":{{"dtype":"F16","shape":[2],"data_offsets":[{begin},{end}]}}}}"#),
                4
            ),
            format!(
                "DIR/model.safetensors: tensor \"a\": dtype and shape need 4 bytes, data_offsets \
                 [{begin}, {end}] disagree; the header is damaged"
            )
        );
    }
}

/// Two `U8` tensors of four bytes, the second at `begin`.
fn two_tensors(begin: usize) -> String {
    let end = begin + 4;
    format!(
        r#"{{"b":{{"dtype":"U8","shape":[4],"data_offsets":[{begin},{end}]}},
             "a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}}}"#
    )
}

#[test]
fn overlapping_tensors_are_refused() {
    for begin in 1..4 {
        assert_eq!(
            header_error(&two_tensors(begin), 8),
            format!(
                "DIR/model.safetensors: tensor \"b\" overlaps the one before it: expected to begin \
                 at 4, found {begin}; the header is damaged"
            )
        );
    }
}

#[test]
fn a_hole_between_tensors_is_refused() {
    assert_eq!(
        header_error(&two_tensors(5), 9),
        "DIR/model.safetensors: a hole before tensor \"b\": expected to begin at 4, found 5; the \
         header is damaged"
    );
}

#[test]
fn tensors_beyond_the_end_of_the_file_are_refused() {
    let header = two_tensors(4);
    let expected = 8 + header.len() + 8;
    for data_bytes in 0..8 {
        let found = expected - 8 + data_bytes;
        assert_eq!(
            header_error(&header, data_bytes),
            format!(
                "DIR/model.safetensors: the file is shorter than its header says: expected \
                 {expected} bytes, found {found}; download it again"
            )
        );
    }
}

#[test]
fn bytes_after_the_last_tensor_are_refused() {
    let header = two_tensors(4);
    let expected = 8 + header.len() + 8;
    assert_eq!(
        header_error(&header, 9),
        format!(
            "DIR/model.safetensors: the file is longer than its header says: expected {expected} \
             bytes, found {}; download it again",
            expected + 1
        )
    );
}

#[test]
fn hostile_names_and_shapes_are_shown_escaped_and_short() {
    let header = format!(
        r#"{{"\u001b[31m{}":{{"dtype":"{}","shape":[],"data_offsets":[0,0]}}}}"#,
        "x".repeat(5000),
        "\\n".repeat(5000)
    );
    let error = header_error(&header, 0);
    assert!(
        error.len() < 1000 && error.contains(r"\u{1b}[31mxxx") && !error.contains(['\u{1b}', '\n']),
        "{error}"
    );
    let ones = vec!["1"; 5000].join(",");
    let error = header_error(
        &format!(r#"{{"a":{{"dtype":"F4","shape":[{ones}],"data_offsets":[0,0]}}}}"#),
        0,
    );
    assert!(
        error.contains("F4 [1, 1, 1, 1, 1, 1, 1, 1, ... 5000 dimensions]"),
        "{error}"
    );
}

// Taking

#[test]
fn a_tensor_comes_with_its_bytes() {
    let dir = single(&file_of(&[("a", 3), ("b", 5000), ("c", 0)]));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut reader = checkpoint.reader();
    let tensor = reader
        .take("b", &[5000], &[Dtype::BF16, Dtype::U8])
        .unwrap();
    assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::U8, &[5000][..]));
    let mut bytes = [0; 5000];
    tensor.read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 5000]);
    let mut end = [0; 2];
    tensor.read_at(4998, &mut end).unwrap();
    assert_eq!(end, [1; 2]);
    let empty = reader.take("c", &[0], &[Dtype::U8]).unwrap();
    empty.read_at(0, &mut []).unwrap();
    assert_eq!(
        reader.finish(["c", "b"]).unwrap(),
        Consumed {
            tensors: 2,
            bytes: 5000
        }
    );
}

fn take_error(name: &str, shape: &[usize], dtypes: &[Dtype]) -> String {
    let dir = single(&file_of(&[("a", 3)]));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    text(
        &dir,
        &checkpoint.reader().take(name, shape, dtypes).unwrap_err(),
    )
}

#[test]
fn a_tensor_that_is_not_there_is_named() {
    assert_eq!(
        take_error("b", &[3], &[Dtype::U8]),
        "DIR: no tensor \"b\" among the 1 there; the checkpoint is incomplete, or its config.json \
         belongs to another model"
    );
}

#[test]
fn a_wrong_shape_is_refused() {
    assert_eq!(
        take_error("a", &[3, 1], &[Dtype::U8]),
        "DIR/model.safetensors: tensor \"a\": expected shape [3, 1], found [3]; config.json and \
         weights do not belong together"
    );
}

#[test]
fn a_wrong_dtype_is_refused() {
    assert_eq!(
        take_error("a", &[3], &[Dtype::BF16, Dtype::F16]),
        "DIR/model.safetensors: tensor \"a\": expected dtype BF16 or F16, found U8; is \
         `quantization` in config.json that of these weights?"
    );
}

#[test]
fn a_tensor_is_taken_once() {
    let dir = single(&file_of(&[("a", 3)]));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut reader = checkpoint.reader();
    assert!(
        reader.take("a", &[4], &[Dtype::U8]).is_err(),
        "a refusal does not count as taken"
    );
    reader.take("a", &[3], &[Dtype::U8]).unwrap();
    assert_eq!(
        reader
            .take("a", &[3], &[Dtype::U8])
            .unwrap_err()
            .to_string(),
        "tensor \"a\" was taken twice; this is a fault of the program, not of the checkpoint"
    );
}

/// The end of a reading that took `taken`, where `planned` was planned.
fn finish(taken: &[&str], planned: &[&str]) -> Result<Consumed, String> {
    let dir = single(&file_of(&[
        ("a", 1),
        ("b", 1),
        ("c", 1),
        ("d", 1),
        ("e", 1),
    ]));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut reader = checkpoint.reader();
    for name in taken {
        reader.take(name, &[1], &[Dtype::U8]).unwrap();
    }
    reader
        .finish(planned.iter().copied())
        .map_err(|error| error.to_string())
}

#[test]
fn what_was_taken_is_what_was_planned() {
    let error = |not_taken, not_planned| {
        Err(format!(
            "the tensors loaded are not the tensors planned: planned but not loaded: {not_taken}; \
             loaded but not planned: {not_planned}. This is a fault of the program, not of the \
             checkpoint"
        ))
    };
    assert_eq!(
        finish(&[], &[]),
        Ok(Consumed {
            tensors: 0,
            bytes: 0
        })
    );
    assert_eq!(
        finish(&["a", "b"], &["b", "a"]),
        Ok(Consumed {
            tensors: 2,
            bytes: 2
        })
    );
    assert_eq!(finish(&["a"], &["a", "b"]), error("\"b\"", "none"));
    assert_eq!(finish(&["b", "a"], &["a"]), error("none", "\"b\""));
    assert_eq!(
        finish(&["e"], &["d", "c", "b", "a"]),
        error("\"a\", \"b\", \"c\" and 1 more", "\"e\"")
    );
    assert_eq!(
        finish(&["a"], &["a", "a"]),
        Err(
            "tensor \"a\" is planned twice; this is a fault of the program, not of the checkpoint"
                .to_owned()
        )
    );
}

#[test]
fn a_file_that_changed_after_opening_is_refused() {
    type Change = fn(&Path);
    let changes: [(Change, usize); 2] = [
        (
            |path| {
                fs::File::options()
                    .write(true)
                    .open(path)
                    .unwrap()
                    .set_len(9)
                    .unwrap()
            },
            9,
        ),
        (
            |path| {
                let other = path.with_extension("part");
                fs::write(&other, file_of(&[("a", 7)])).unwrap();
                fs::rename(other, path).unwrap();
            },
            file_of(&[("a", 7)]).len(),
        ),
    ];
    for (change, found) in changes {
        let dir = single(&file_of(&[("a", 3)]));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        change(&dir.path().join(SINGLE));
        let expected = file_of(&[("a", 3)]).len();
        assert_eq!(
            text(
                &dir,
                &checkpoint
                    .reader()
                    .take("a", &[3], &[Dtype::U8])
                    .unwrap_err()
            ),
            format!(
                "DIR/model.safetensors: the file was replaced or written to since its header was \
                 read: expected {expected} bytes, found {found}; start again when nothing writes \
                 to it"
            )
        );
    }
}

#[test]
fn a_file_cut_after_it_was_opened_is_an_error() {
    let dir = single(&file_of(&[("a", 100_000)]));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let tensor = checkpoint.open_tensor("a").unwrap();
    let path = dir.path().join(SINGLE);
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(50_000).unwrap();
    let error = tensor.read_at(0, &mut [0; 100_000]).unwrap_err();
    assert_eq!(
        text(&dir, &error),
        "DIR/model.safetensors: tensor \"a\": its bytes cannot be read: failed to fill whole buffer; the \
         file was cut since its header was read, or the disk fails"
    );
}

// Fingerprint

fn fingerprint(files: &[(&str, &[u8])]) -> String {
    let dir = directory(files);
    let fingerprint = Checkpoint::open(dir.path()).unwrap().fingerprint();
    fingerprint
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[test]
fn the_fingerprint_is_the_same_in_every_directory_and_every_release() {
    let files = [(SINGLE, &file_of(&[("a", 3), ("b", 2)])[..])];
    let known = "c4f2bae8643099125fb4bfffeb94a577e7715c068ee8eda5ab2ce16b3430d3d0";
    assert_eq!([fingerprint(&files), fingerprint(&files)], [known, known]);
}

#[test]
fn the_fingerprint_tells_any_difference_of_the_headers() {
    let base = file_of(&[("a", 3), ("b", 2)]);
    let entry = |dtype, shape| {
        file(
            &format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,4]}}}}"#),
            &[0; 4],
        )
    };
    let all = [
        fingerprint(&[(SINGLE, &base)]),
        fingerprint(&[("weights.safetensors", &base)]),
        fingerprint(&[(SINGLE, &file_of(&[("b", 2), ("a", 3)]))]),
        fingerprint(&[(SINGLE, &file_of(&[("a", 3), ("c", 2)]))]),
        fingerprint(&[(SINGLE, &file_of(&[("a", 2), ("b", 3)]))]),
        fingerprint(&[
            (SHARD_1, &file_of(&[("a", 3)])),
            (SHARD_2, &file_of(&[("b", 2)])),
        ]),
        fingerprint(&[(SINGLE, &entry("U8", "[4]"))]),
        fingerprint(&[(SINGLE, &entry("I8", "[4]"))]),
        fingerprint(&[(SINGLE, &entry("U8", "[2,2]"))]),
        fingerprint(&[(SINGLE, &entry("F32", "[ 1 ]"))]),
    ];
    let distinct: std::collections::HashSet<_> = all.iter().collect();
    assert_eq!(distinct.len(), all.len());
}

// Properties

fn read(bytes: &[u8]) -> Result<Header, CheckpointError> {
    Header::read(bytes, bytes.len() as u64, Path::new("f"))
}

/// This module and the `safetensors` crate say the same of any file, save that we refuse a name
/// that comes twice.
fn agrees_with_safetensors(bytes: &[u8]) -> Result<(), TestCaseError> {
    let (ours, theirs) = (read(bytes), SafeTensors::deserialize(bytes));
    match (&ours, &theirs) {
        (Err(ours), Ok(_)) => {
            prop_assert!(ours.to_string().contains("the name comes twice"), "{ours}")
        }
        (Ok(_), Err(theirs)) => prop_assert!(false, "{theirs}"),
        (Ok(ours), Ok(theirs)) => prop_assert_eq!(ours.tensors().count(), theirs.len()),
        (Err(_), Err(_)) => {}
    }
    Ok(())
}

/// Headers that are right, or wrong by a little: lengths and offsets from a few small numbers.
fn nearly_right_file() -> impl Strategy<Value = Vec<u8>> {
    let dtype = prop::sample::select(vec!["U8", "BF16", "F32", "F4", "F6_E2M3", "Q9"]);
    let shape = prop::collection::vec(prop_oneof![0usize..5, Just(usize::MAX)], 0..3);
    let nudge = prop_oneof![6 => Just(0i64), 1 => -2i64..3];
    let tensors = prop::collection::vec((0u8..6, dtype, shape, nudge), 0..5);
    (tensors, -1i64..2, any::<bool>()).prop_map(|(tensors, extra, extra_used)| {
        let (mut entries, mut end) = (Vec::new(), 0i64);
        for (name, dtype, shape, nudge) in tensors {
            let bits = match dtype {
                "BF16" => 16,
                "F32" => 32,
                "F4" => 4,
                "F6_E2M3" => 6,
                _ => 8,
            };
            let elements = shape
                .iter()
                .fold(1usize, |product, &length| product.wrapping_mul(length));
            let begin = end + nudge;
            end = begin + (elements.wrapping_mul(bits) / 8 % 1000) as i64;
            let kind = format!(r#""dtype":"{dtype}","shape":{shape:?}"#);
            entries.push(format!(
                r#""t{name}":{{{kind},"data_offsets":[{begin},{end}]}}"#
            ));
        }
        let data_bytes = end + if extra_used { extra } else { 0 };
        file(
            &format!("{{{}}}", entries.join(",")),
            &vec![0; data_bytes.max(0) as usize],
        )
    })
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        agrees_with_safetensors(&bytes)?;
    }

    #[test]
    fn arbitrary_headers_never_panic(
        header in any::<String>(),
        data in prop::collection::vec(any::<u8>(), 0..9),
    ) {
        agrees_with_safetensors(&file(&header, &data))?;
    }

    #[test]
    fn headers_that_are_nearly_right_get_the_verdict_of_safetensors(bytes in nearly_right_file()) {
        agrees_with_safetensors(&bytes)?;
    }

    #[test]
    fn a_right_header_with_a_few_bytes_changed_never_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        length in any::<prop::sample::Index>(),
        is_cut in any::<bool>(),
    ) {
        let mut bytes = file_of(&[("a", 3), ("layers.0.weight", 40), ("b", 0)]);
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if is_cut {
            bytes.truncate(length.index(bytes.len()));
        }
        agrees_with_safetensors(&bytes)?;
    }
}

// Without weights

#[test]
fn headers_tell_the_same_with_the_tensors_and_without() {
    let bytes = file_of(&[("a", 3), ("b", 5)]);
    let (whole, headers) = (single(&bytes), single(cut_off(&bytes)));
    let described = |dir: &TempDir| {
        let headers = Headers::open(dir.path()).unwrap();
        let tensors = headers
            .iter()
            .map(|(name, info)| (name.to_owned(), info.clone()));
        tensors.collect::<Vec<_>>()
    };
    assert_eq!(described(&whole), described(&headers));
    assert_eq!(described(&headers)[1].1.bytes(), 5);
}

#[test]
fn a_file_without_its_tensors_is_no_checkpoint() {
    let bytes = file_of(&[("a", 3)]);
    let message = open_error(&single(cut_off(&bytes)));
    assert!(
        message.contains("shorter than its header says"),
        "{message}"
    );
}

#[test]
fn a_file_that_ends_within_its_tensors_is_damaged_even_where_none_are_needed() {
    let bytes = file_of(&[("a", 3), ("b", 5)]);
    let header_bytes = cut_off(&bytes).len();
    for length in 0..=bytes.len() + 1 {
        let mut cut = bytes.clone();
        cut.resize(length, 0);
        let dir = single(&cut);
        let expected = length == header_bytes || length == bytes.len();
        assert_eq!(
            Headers::open(dir.path()).is_ok(),
            expected,
            "{length} bytes"
        );
    }
}

#[test]
fn tensors_that_are_not_there_cannot_claim_more_than_64_bits() {
    let half = (1_u64 << 63) - 8;
    let header = format!(
        r#"{{"a":{{"dtype":"U8","shape":[{}],"data_offsets":[0,{}]}}}}"#,
        half, half
    );
    let dir = single(&file(&header, &[]));
    // Whatever comes of it, it is no panic.
    if let Ok(headers) = Headers::open(dir.path()) {
        assert_eq!(headers.get("a").unwrap().bytes(), half);
    }
}

#[test]
fn an_index_alone_lists_names_and_bytes() {
    let index = format!(
        r#"{{"metadata":{{"total_size":8}},"weight_map":{{"a":"{SHARD_1}","b":"{SHARD_2}"}}}}"#
    );
    let dir = directory(&[(INDEX, index.as_bytes())]);
    let listed = Listed::read(dir.path()).unwrap().unwrap();
    assert_eq!(listed.total_bytes, Some(8));
    assert_eq!(listed.tensors.into_iter().collect::<Vec<_>>(), ["a", "b"]);
    assert!(open_error(&dir).contains(SHARD_1));
    // As soon as one file is there, all must be.
    fs::write(dir.path().join(SHARD_1), file_of(&[("a", 3)])).unwrap();
    assert!(Listed::read(dir.path()).unwrap().is_none());
    let message = text(&dir, &Headers::open(dir.path()).unwrap_err());
    assert!(message.contains(SHARD_2), "{message}");
}

#[test]
fn odd_totals_of_an_index_are_no_total() {
    for metadata in [
        "",
        r#""metadata":null,"#,
        r#""metadata":[],"#,
        r#""metadata":{"total_size":-1},"#,
    ] {
        let index = format!(r#"{{{metadata}"weight_map":{{"a":"{SINGLE}"}}}}"#);
        let dir = directory(&[(INDEX, index.as_bytes())]);
        assert_eq!(Listed::read(dir.path()).unwrap().unwrap().total_bytes, None);
    }
    assert!(Listed::read(directory(&[]).path()).unwrap().is_none());
}

// A slice in a file of its own

/// A checkpoint of two tensors, and its slice of both.
fn sliced(dir: &TempDir) -> (Checkpoint, Shard) {
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let shard = Shard::new(&checkpoint, &["b", "a"], "config", "layers-0-1").unwrap();
    (checkpoint, shard)
}

fn tensor_bytes(checkpoint: &Checkpoint, name: &str) -> Result<Vec<u8>, CheckpointError> {
    let tensor = checkpoint.open_tensor(name)?;
    let mut bytes = vec![0; tensor.bytes() as usize];
    tensor.read(&mut bytes)?;
    Ok(bytes)
}

#[test]
fn a_slice_comes_back_from_its_file() {
    let dir = single(&file_of(&[("a", 3), ("b", 5), ("c", 2)]));
    let (checkpoint, shard) = sliced(&dir);
    let cache = dir.path().join("deep/cache");
    assert!(shard.open(&cache).unwrap().is_none());
    shard.write_from(&checkpoint, &cache).unwrap();
    let read = shard.open(&cache).unwrap().unwrap();
    assert_eq!(
        read.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        ["a", "b"]
    );
    assert_eq!(tensor_bytes(&read, "a").unwrap(), [0; 3]);
    assert_eq!(tensor_bytes(&read, "b").unwrap(), [1; 5]);

    let bytes = fs::read(cache.join(shard.file_name())).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("b").unwrap().data(), [1; 5]);
    let (pads, tensors): (Vec<_>, Vec<_>) = file
        .names()
        .into_iter()
        .partition(|name| name.starts_with(PAD_PREFIX));
    assert_eq!((pads.len(), tensors.len()), (1, 2));
}

#[test]
fn every_flipped_bit_of_a_slices_file_is_noticed_but_for_the_gaps() {
    let dir = single(&file_of(&[("a", 3), ("b", 5)]));
    let (checkpoint, shard) = sliced(&dir);
    shard.write_from(&checkpoint, dir.path()).unwrap();
    let path = dir.path().join(shard.file_name());
    let whole = fs::read(&path).unwrap();
    let is_noticed = || match shard.open(dir.path()) {
        Ok(Some(read)) => ["a", "b"]
            .iter()
            .any(|name| tensor_bytes(&read, name).is_err()),
        Ok(None) => panic!("it is there"),
        Err(_) => true,
    };
    assert!(!is_noticed());
    let data_begins = shard.begin(&shard.tensors()[0]) as usize;
    let last_begins = shard.begin(&shard.tensors()[1]) as usize;
    let spaces_begin = whole[..data_begins].trim_ascii_end().len();
    let looked_at = (0..spaces_begin).chain([data_begins - 1]);
    for at in looked_at
        .chain(data_begins..data_begins + 5)
        .chain(last_begins..last_begins + 3)
    {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&path, flipped).unwrap();
        assert!(is_noticed(), "byte {at}");
    }
    for cut in [0, 7, 8, 100, data_begins, whole.len() - 1] {
        fs::write(&path, &whole[..cut]).unwrap();
        assert!(is_noticed(), "cut to {cut}");
    }
}

#[test]
fn the_key_is_that_of_the_slice_and_of_its_source() {
    let dir = single(&file_of(&[("a", 3), ("b", 5)]));
    let model = fs::File::open(dir.path().join(SINGLE)).unwrap();
    let at = |seconds| std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    let name = |names: &[&str], config: &str| {
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let shard = Shard::new(&checkpoint, names, config, "layers-0-1").unwrap();
        shard.file_name().to_owned()
    };
    model.set_modified(at(1)).unwrap();
    let first = name(&["a"], "config");
    assert_eq!(name(&["a"], "config"), first);
    assert!(first.ends_with("-layers-0-1.safetensors"), "{first}");
    let others = [
        name(&["a", "b"], "config"),
        name(&["b"], "config"),
        name(&["a"], "other"),
    ];
    model.set_modified(at(2)).unwrap();
    let changed = name(&["a"], "config");
    let all: BTreeSet<_> = others.iter().chain([&first, &changed]).collect();
    assert_eq!(all.len(), 5);
}

#[test]
fn a_slice_of_the_same_model_from_before_is_named() {
    let dir = single(&file_of(&[("a", 3), ("b", 5)]));
    let (checkpoint, old) = sliced(&dir);
    let cache = dir.path().join("cache");
    old.write_from(&checkpoint, &cache).unwrap();
    assert_eq!(old.stale(&cache), None);
    let model = fs::File::open(dir.path().join(SINGLE)).unwrap();
    model
        .set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    let (_, new) = sliced(&dir);
    assert_eq!(new.stale(&cache).as_deref(), Some(old.file_name()));
    assert!(new.open(&cache).unwrap().is_none());
}

#[test]
fn what_a_dead_writer_left_is_removed_and_what_a_living_one_writes_is_not() {
    let dir = single(&file_of(&[("a", 3), ("b", 5)]));
    let (checkpoint, shard) = sliced(&dir);
    let cache = dir.path().join("cache");
    let living = ShardWriter::create(&shard, &cache).unwrap();
    let dead = cache.join(format!("{}.1-0.part", shard.file_name()));
    fs::write(&dead, "half").unwrap();
    shard.write_from(&checkpoint, &cache).unwrap();
    assert!(!dead.exists());
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 2);
    drop(living);
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 1);
}

#[test]
fn a_checkpoint_told_to_another_rank_is_the_same_one_without_bytes() {
    let index = format!(r#"{{"weight_map":{{"a":"{SHARD_1}","b":"{SHARD_2}"}}}}"#);
    let (first, second) = (file_of(&[("a", 3)]), file_of(&[("b", 5)]));
    let dir = directory(&[
        (INDEX, index.as_bytes()),
        (SHARD_1, &first),
        (SHARD_2, &second),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let json = serde_json::to_string(&checkpoint.header_texts().unwrap()).unwrap();
    let outline: HeaderTexts = serde_json::from_str(&json).unwrap();
    let told = outline.into_checkpoint(Path::new("/elsewhere")).unwrap();
    assert_eq!(told.fingerprint(), checkpoint.fingerprint());
    assert!(told.is_elsewhere() && !checkpoint.is_elsewhere());
    let key = |checkpoint: &Checkpoint| {
        let shard = Shard::new(checkpoint, &["a"], "config", "x").unwrap();
        shard.file_name().to_owned()
    };
    assert_eq!(key(&told), key(&checkpoint));
    let error = told.open_tensor("a").unwrap_err();
    assert!(
        matches!(error, CheckpointError::Elsewhere { .. }),
        "{error}"
    );
}

#[test]
fn an_outline_is_checked_as_a_file_is() {
    let dir = single(&file_of(&[("a", 3)]));
    let outline = Checkpoint::open(dir.path())
        .unwrap()
        .header_texts()
        .unwrap();
    let json = serde_json::to_value(&outline).unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut json = json.clone();
        change(&mut json["files"]);
        let outline: HeaderTexts = serde_json::from_value(json).unwrap();
        let error = outline.into_checkpoint(Path::new("DIR")).unwrap_err();
        error.to_string()
    };
    let bytes = json["files"][0]["bytes"].as_u64().unwrap();
    assert!(refused(&|files| files[0]["bytes"] = (bytes - 1).into()).contains("shorter"));
    assert!(refused(&|files| files[0]["bytes"] = u64::MAX.into()).contains("longer"));
    assert!(refused(&|files| files[0]["bytes"] = 0.into()).contains("at least 8 bytes"));
    assert!(refused(&|files| files[0]["header"] = "{".into()).contains("not a safetensors header"));
    let twice = refused(&|files| {
        let first = files[0].clone();
        files.as_array_mut().unwrap().push(first);
    });
    assert!(twice.contains("two files"), "{twice}");
}
