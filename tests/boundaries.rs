//! The cut of the program, kept by reading its source: who may name what, and who may know whom.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// All Rust files under `src`, with their path relative to it and their code (comments taken out).
fn sources() -> Vec<(String, String)> {
    let found = files("src", "src");
    assert!(found.len() > 40, "only {} files found", found.len());
    found
}

/// All Rust files under `folder`, with their path relative to `base` and their code.
fn files(folder: &str, base: &str) -> Vec<(String, String)> {
    let base = common::root().join(base);
    let mut found = Vec::new();
    collect(&common::root().join(folder), &mut found);
    found
        .into_iter()
        .map(|path| {
            let name = path
                .strip_prefix(&base)
                .unwrap()
                .to_string_lossy()
                .replace('\\', "/");
            (name, code(&std::fs::read_to_string(&path).unwrap()))
        })
        .collect()
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn code(text: &str) -> String {
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Files whose code has one of the `words`, and that are none of the `allowed` (files, or folders with
/// a slash at the end).
fn trespassers(words: &[&str], allowed: &[&str]) -> Vec<String> {
    let is_allowed = |name: &str| {
        allowed
            .iter()
            .any(|place| name == *place || (place.ends_with('/') && name.starts_with(place)))
    };
    sources()
        .into_iter()
        .filter(|(name, code)| !is_allowed(name) && words.iter().any(|word| code.contains(word)))
        .map(|(name, _)| name)
        .collect()
}

const NONE: Vec<String> = Vec::new();

#[test]
fn mpi_is_named_in_the_transport_only() {
    assert_eq!(trespassers(&["mpi::", "use mpi"], &["transport.rs"]), NONE);
}

#[test]
fn arrays_are_named_in_the_model_and_the_stage_only() {
    assert_eq!(
        trespassers(&["mlx_rs", "mlx_sys"], &["model/", "stage.rs"]),
        NONE
    );
}

#[test]
fn the_kernels_are_named_in_the_model_only_and_know_nothing_of_it() {
    assert_eq!(trespassers(&["mlx_pipe_kernels"], &["model/"]), NONE);
    assert_eq!(trespassers(&["mlx_pipe_cuda"], &["model/cuda/"]), NONE);
    assert_eq!(trespassers(&["cudarc"], &[]), NONE);
    let of_kernels = files("kernels/src", "");
    assert!(
        of_kernels.len() > 15,
        "only {} files found",
        of_kernels.len()
    );
    let guilty: Vec<String> = of_kernels
        .into_iter()
        .filter(|(name, code)| {
            let names_mlx = code.contains("mlx_rs") || code.contains("mlx_sys");
            names_mlx && name != "kernels/src/primitive.rs"
        })
        .map(|(name, _)| name)
        .collect();
    assert_eq!(guilty, NONE);
}

#[test]
fn http_is_spoken_in_the_server_only_which_knows_no_ranks_and_no_arrays() {
    let http = [
        "axum",
        "hyper",
        "tokio",
        "http_body_util",
        "futures_util",
        "subtle",
    ];
    let named = http.map(|name| [format!("{name}::"), format!("use {name}")]);
    let named: Vec<&str> = named.iter().flatten().map(String::as_str).collect();
    assert_eq!(trespassers(&named, &["serve/"]), NONE);
    let below = [
        "crate::transport",
        "crate::stage",
        "crate::model",
        "crate::session",
        "crate::schedule::Schedule",
        "Worker",
        "std::fs",
    ];
    let guilty: Vec<String> = sources()
        .into_iter()
        .filter(|(name, _)| name.starts_with("serve/") && name != "serve/tests.rs")
        .filter(|(_, code)| below.iter().any(|word| code.contains(word)))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(guilty, NONE);
}

#[test]
fn the_pure_parts_do_no_io_read_no_clock_and_know_no_ranks() {
    let impure = [
        "std::fs",
        "std::io",
        "std::net",
        "std::env",
        "std::process",
        "std::thread",
        "Instant",
        "SystemTime",
        "crate::transport",
        "crate::stage",
        "crate::session",
        "println!",
        "eprintln!",
    ];
    let pure = [
        "plan/",
        "schedule",
        "wire",
        "parcel.rs",
        "sampler",
        "sequence.rs",
        "serve/tools.rs",
    ];
    let guilty: Vec<String> = sources()
        .into_iter()
        .filter(|(name, _)| pure.iter().any(|part| name.starts_with(part)))
        .filter(|(_, code)| impure.iter().any(|word| code.contains(word)))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(guilty, NONE);
}

#[test]
fn weights_are_read_by_the_model_only_and_the_checkpoint_knows_nothing_above_it() {
    let above = [
        "crate::model",
        "crate::stage",
        "crate::pipeline",
        "crate::session",
        "crate::plan",
        "crate::slice",
        "crate::handover",
        "crate::transport",
    ];
    let guilty: Vec<String> = sources()
        .into_iter()
        .filter(|(name, _)| name.starts_with("checkpoint/"))
        .filter(|(_, code)| above.iter().any(|word| code.contains(word)))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(guilty, NONE);
    assert_eq!(
        trespassers(&[".reader()"], &["checkpoint/", "stage.rs"]),
        NONE
    );
    // Without counting them: only to send them on, a piece at a time.
    assert_eq!(
        trespassers(&[".open_tensor("], &["checkpoint/", "handover/"]),
        NONE
    );
}

/// The files in the table of ARCHITECTURE.md about unsafe code: the first cell of every row, between
/// backquotes.
fn files_listed_as_unsafe() -> BTreeSet<String> {
    let page = std::fs::read_to_string(common::root().join("ARCHITECTURE.md")).unwrap();
    let (_, section) = page.split_once("\n## Unsafe code\n").unwrap();
    let section = section.split("\n## ").next().unwrap_or(section);
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| row.split('`').next().unwrap_or(row).to_owned())
        .collect()
}

#[test]
fn unsafe_code_stands_in_exactly_the_files_that_the_architecture_page_lists() {
    let kinds = ["{", "fn", "impl", "trait", "extern"].map(|kind| format!("unsafe {kind}"));
    let is_unsafe = |code: &str| {
        code.contains("#[unsafe(") || kinds.iter().any(|kind| code.contains(kind.as_str()))
    };
    // What the kernels' tests do is no part of the program.
    let of_kernels = files("kernels/src", "")
        .into_iter()
        .filter(|(name, _)| !name.starts_with("kernels/src/tests/"));
    let with_unsafe: BTreeSet<String> = sources()
        .into_iter()
        .chain(of_kernels)
        .chain(files("cuda/src", ""))
        .filter(|(_, code)| is_unsafe(code))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(with_unsafe, files_listed_as_unsafe());
}

#[test]
fn standard_output_is_written_by_the_answer_writer_and_the_commands_only() {
    assert_eq!(
        trespassers(&[" println!", " print!", "(println!"], &["commands.rs"]),
        NONE
    );
    assert_eq!(
        trespassers(&["stdout()"], &["commands.rs", "session.rs", "progress.rs"]),
        NONE
    );
}
