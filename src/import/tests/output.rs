//! The output directory: all or nothing.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::super::output::OutputDir;
use super::super::{ImportError, import};
use super::builder::model;

/// Names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("the directory is there");
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("the entry can be read")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort_unstable();
    names
}

/// A directory with an importable model in it.
fn model_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    fs::write(dir.path().join("model.gguf"), model("llama").build())
        .expect("the model can be written");
    dir
}

const FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
];

#[test]
fn an_import_leaves_the_checkpoint_and_nothing_else() {
    let dir = model_dir();
    let out = dir.path().join("deep/er/out");
    import(&dir.path().join("model.gguf"), &out).expect("this model can be imported");
    assert_eq!(names(&out), FILES);
}

#[test]
fn an_import_beside_other_files_and_after_a_crash_succeeds() {
    let dir = model_dir();
    let stage = dir.path().join(".mlx-pipe-import");
    fs::create_dir(&stage).expect("the directory can be made");
    fs::write(stage.join("model.safetensors"), "half").expect("the file can be written");
    import(&dir.path().join("model.gguf"), dir.path()).expect("this model can be imported");
    let expected: Vec<&str> = [&FILES[..2], &["model.gguf"], &FILES[2..]].concat();
    assert_eq!(names(dir.path()), expected);
}

#[test]
fn a_directory_with_a_checkpoint_is_left_alone() {
    for file in [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
    ] {
        let dir = model_dir();
        fs::write(dir.path().join(file), "mine").expect("the file can be written");
        let error = import(&dir.path().join("model.gguf"), dir.path());
        let error = error.expect_err("the directory is occupied");
        assert!(matches!(error, ImportError::Occupied { .. }));
        assert!(error.to_string().contains(file), "{error}");
        assert_eq!(
            fs::read_to_string(dir.path().join(file)).ok().as_deref(),
            Some("mine")
        );
        let mut expected = vec![file, "model.gguf"];
        expected.sort_unstable();
        assert_eq!(names(dir.path()), expected);
    }
}

#[test]
fn an_occupied_directory_is_noticed_before_the_model_is_read() {
    let dir = model_dir();
    fs::write(dir.path().join("config.json"), "mine").expect("the file can be written");
    let error = import(&dir.path().join("no-such.gguf"), dir.path());
    let error = error.expect_err("the directory is occupied");
    assert!(matches!(error, ImportError::Occupied { .. }), "{error}");
}

#[test]
fn what_is_no_file_or_empty_is_told_so() {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let (empty, out) = (dir.path().join("empty.gguf"), dir.path().join("out"));
    fs::write(&empty, "").expect("the file can be written");
    for (source, words) in [
        (dir.path(), "is a directory"),
        (&empty, "the file is empty"),
    ] {
        let error = import(source, &out)
            .expect_err("there is no model")
            .to_string();
        assert!(error.contains(words), "{error}");
        assert!(error.contains(&*source.to_string_lossy()), "{error}");
        assert!(!out.exists());
    }
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let dir = model_dir();
    let gguf = dir.path().join("model.gguf");
    let error = import(&gguf, &gguf.join("out")).expect_err("a file has no files in it");
    assert!(error.to_string().contains("model.gguf/out"), "{error}");
}

#[test]
fn what_is_given_up_before_it_is_complete_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let out = dir.path().join("out");
    let mut output = OutputDir::create(&out).expect("the directory can be made");
    output
        .write("tokenizer.json", b"{}")
        .expect("the file can be written");
    assert!(out.exists());
    drop(output);
    assert!(!out.exists());
}

#[test]
fn a_file_that_cannot_be_moved_takes_the_moved_ones_back() {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let mut output = OutputDir::create(dir.path()).expect("the directory can be used");
    output.write_weights(&[]).expect("the file can be written");
    output
        .write("tokenizer.json", b"{}")
        .expect("the file can be written");
    // In the way since the directory was looked at; a file cannot replace it.
    fs::create_dir(dir.path().join("tokenizer.json")).expect("the directory can be made");
    let error = output
        .publish(&json!({}))
        .expect_err("a file cannot replace a directory");
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    assert_eq!(names(dir.path()), ["tokenizer.json"]);
}

#[cfg(unix)]
#[test]
fn all_files_have_the_same_permissions() {
    use std::os::unix::fs::PermissionsExt;

    let dir = model_dir();
    let out = dir.path().join("out");
    import(&dir.path().join("model.gguf"), &out).expect("this model can be imported");
    let mode = |file: &str| {
        fs::metadata(out.join(file))
            .map(|data| data.permissions().mode())
            .ok()
    };
    for file in FILES {
        assert_eq!(mode(file), mode("config.json"), "{file}");
    }
}
