//! The CUDA kernels, on a machine that has an NVIDIA GPU: `cargo test --release --test gpu -- --ignored --test-threads=1`.
//! Logits of random checkpoints of published shapes against this program's CPU kernels, the same bits however a
//! sequence is computed, and the program itself on one to three ranks.

mod common;

use common::stages::{Pipeline, entry, kernels, logits, relative_error};
use mlx_pipe::model::{Kernels, ModelFiles};
use mlx_pipe::plan::WireDtype;
use mlx_pipe::sampler::Scores;
use mlx_pipe::stage::{DeviceChoice, KernelChoice};
use mlx_pipe::wire::{Entry, Fork, SampleParams, Upkeep};
use std::ops::Range;
use std::path::Path;

/// ‖GPU − CPU‖ / ‖CPU‖ of logits that are computed in bf16 (DESIGN).
const TOLERANCE: f64 = 2e-2;

fn gpu() -> Kernels {
    let kernels = kernels(DeviceChoice::Gpu, KernelChoice::Own);
    assert!(matches!(kernels, Kernels::Cuda(_)), "{kernels:?}");
    kernels
}

fn load(dir: &Path, kernels: &Kernels, cut: &[Range<usize>], dtype: WireDtype) -> Pipeline {
    Pipeline::load(&ModelFiles::open(dir).unwrap(), cut, kernels, dtype)
}

fn whole(dir: &Path, kernels: &Kernels, layers: usize, dtype: WireDtype) -> Pipeline {
    load(dir, kernels, std::slice::from_ref(&(0..layers)), dtype)
}

fn prompt(seed: u32, tokens: usize) -> Vec<u32> {
    (0..tokens as u32)
        .map(|position| (7919 * position + 10473 * seed) % 40_000 + 100)
        .collect()
}

/// The largest logit's place, and by how much it is larger than the next.
fn best(logits: &[f32]) -> (usize, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    (order[0], logits[order[0]] - logits[order[1]])
}

/// Checkpoints of true widths and few layers, one of each format of weights.
fn checkpoints() -> Vec<(String, std::path::PathBuf, usize)> {
    let of = |(shape, bits, layers): (&str, u32, usize)| {
        let dir = common::random_checkpoint(shape, bits, layers);
        (format!("{shape}, {bits} bits"), dir, layers)
    };
    [
        ("qwen3-0.6b", 8, 3),
        ("qwen3-1.7b", 4, 2),
        ("llama-3.2-1b", 8, 2),
        ("smollm2-135m", 16, 4),
    ]
    .map(of)
    .into()
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn logits_are_those_of_the_cpu_within_bf16() {
    let (gpu, cpu) = (gpu(), kernels(DeviceChoice::Cpu, KernelChoice::Own));
    for (name, dir, layers) in checkpoints() {
        let mut on_gpu = whole(&dir, &gpu, layers, WireDtype::Bf16);
        let mut on_cpu = whole(&dir, &cpu, layers, WireDtype::F32);
        let (mut worst, mut equal, mut clear) = (0f64, 0, 0);
        for (slot, tokens) in [1, 5, 64, 65, 300].into_iter().enumerate() {
            let prompt = prompt(slot as u32, tokens);
            let ours = on_gpu.run(slot as u32, 0, &prompt);
            let reference = on_cpu.run(slot as u32, 0, &prompt);
            let error = relative_error(&ours, &reference);
            worst = worst.max(error);
            let scale = reference
                .iter()
                .map(|logit| logit.abs())
                .fold(0.0, f32::max);
            let (token, margin) = best(&reference);
            // Where the two best are as close as rounding, either may win.
            if margin > TOLERANCE as f32 * scale {
                clear += 1;
                equal += usize::from(best(&ours).0 == token);
            }
        }
        println!("{name}: relative error {worst:.1e}, {equal} of {clear} clear tokens equal");
        assert!(worst < TOLERANCE, "{name}: {worst:e}");
        assert_eq!(equal, clear, "{name}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_sequence_has_the_same_bits_in_chunks_in_company_in_stages_and_token_by_token() {
    let gpu = gpu();
    for (name, dir, layers) in checkpoints() {
        let tokens = prompt(1, 333);
        let mut one = whole(&dir, &gpu, layers, WireDtype::Bf16);
        let whole = one.run(0, 0, &tokens);
        for chunk in [1, 7, 64, 100, 200] {
            let mut last = Vec::new();
            for (index, part) in tokens.chunks(chunk).enumerate() {
                last = one.run(0, index * chunk, part);
            }
            assert!(last == whole, "{name}: in chunks of {chunk}");
        }
        // With others before and behind it, of many sizes; the same again, as a recording is made and played.
        for round in 0..4 {
            one.run(0, 0, &tokens[..332]);
            let others = [1, 3, 70, 40].map(|count| prompt(9 + round, count));
            let mut entries: Vec<Entry> = (1..)
                .zip(&others)
                .map(|(slot, other)| entry(slot, 0, other))
                .collect();
            entries.insert(2, entry(0, 332, &tokens[332..]));
            let logits = one.logits(entries).remove(2);
            assert!(logits == whole, "{name}: in company");
            let mut few: Vec<Entry> = (1..)
                .zip(&others)
                .map(|(slot, other)| entry(slot, other.len(), &[5]))
                .collect();
            few.push(entry(0, 332, &tokens[332..]));
            assert!(
                one.logits(few).remove(4) == whole,
                "{name}: decoding in company"
            );
        }
        let mut two = load(&dir, &gpu, &[0..1, 1..layers], WireDtype::Bf16);
        assert!(two.run(0, 0, &tokens) == whole, "{name}: in two stages");
    }
}

/// More pages than there are multiprocessors for the heads of one, and more parts than are merged at a time.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_long_sequence_has_the_same_bits_token_by_token() {
    let gpu = gpu();
    for (name, dir, layers) in checkpoints() {
        let tokens = prompt(4, 2700);
        let mut one = whole(&dir, &gpu, layers, WireDtype::Bf16);
        for length in [1024, 1025, 1100, 2048, 2700] {
            let whole = one.run(0, 0, &tokens[..length]);
            one.run(0, 0, &tokens[..length - 1]);
            let alone = one.run(0, length - 1, &tokens[length - 1..length]);
            assert!(alone == whole, "{name}: token {length}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_fork_goes_on_as_if_it_were_alone_and_so_does_what_it_began_as() {
    let gpu = gpu();
    let (_, dir, layers) = checkpoints().remove(0);
    let mut model = whole(&dir, &gpu, layers, WireDtype::Bf16);
    let (first, tail, other) = (prompt(1, 200), prompt(2, 3), prompt(3, 90));
    for shared in [1, 63, 64, 100, 200] {
        model.run(0, 0, &first);
        let fork = Fork {
            from: 0,
            to: 1,
            tokens: shared as u32,
        };
        let entries = vec![entry(0, shared - 1, &tail), entry(1, shared, &other)];
        let both = logits(model.step(vec![Upkeep::Fork(fork)], entries));
        let alone = |model: &mut Pipeline, begin: &[u32], tail: &[u32]| {
            model.step(vec![Upkeep::Release(9)], vec![entry(8, 0, &[1])]);
            model.run(9, 0, &[begin, tail].concat())
        };
        assert!(
            both[0] == alone(&mut model, &first[..shared - 1], &tail),
            "{shared}: the first"
        );
        assert!(
            both[1] == alone(&mut model, &first[..shared], &other),
            "{shared}: the fork"
        );
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_best_token_is_that_of_the_logits() {
    let gpu = gpu();
    let (_, dir, layers) = checkpoints().remove(0);
    let mut model = whole(&dir, &gpu, layers, WireDtype::Bf16);
    for tokens in [1, 2, 40, 100] {
        let prompt = prompt(tokens as u32, tokens);
        let (expected, _) = best(&model.run(0, 0, &prompt));
        let scores = model.step(
            vec![],
            vec![Entry {
                sample: Some(SampleParams::GREEDY),
                ..entry(0, 0, &prompt)
            }],
        );
        assert_eq!(scores, [Scores::Best(Some(expected as u32))]);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_program_gives_one_digest_on_one_to_three_ranks_in_any_company() {
    let dir = common::random_checkpoint("qwen3-0.6b", 8, 3);
    let requests: String = (0..6)
        .map(|number| common::token_request(&prompt(number, 40 + 50 * number as usize), 20))
        .collect();
    let mut digests = Vec::new();
    for (ranks, options) in [
        (1, &["--max-sequences", "1"][..]),
        (1, &[]),
        (2, &["--prefill-chunk", "30"]),
        (3, &["--max-batch", "2"]),
    ] {
        let mut command = common::mpirun(ranks);
        command
            .args(["--model"])
            .arg(&dir)
            .args(["--device", "gpu"])
            .args(options);
        let ran = common::run(&mut command, requests.as_bytes()).succeeded();
        let digest = ran.stderr.lines().find(|line| line.starts_with("digest "));
        digests.push(digest.unwrap().to_owned());
    }
    println!("{}", digests[0]);
    assert!(
        digests.iter().all(|digest| *digest == digests[0]),
        "{digests:?}"
    );
}
