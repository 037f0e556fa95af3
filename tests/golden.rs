//! The model against mlx-lm, without MPI: the stages of every cut run one after another in this process,
//! passing each other the bytes that ranks would. Logits within 1e-4 of mlx-lm's on MLX's kernels and 1e-3 on our
//! own, and bit-equal for every cut; on our own also for every chunk and in any company, and for what begins as
//! another sequence.

mod common;

use common::stages::{Pipeline, THREADS, entry, kernels, logits, relative_error};
use common::{Golden, GoldenPrompt, cuts, golden_cases};
use mlx_pipe::model::{
    Engine, Entering, Kernels, Leaving, Left, ModelFiles, Part, Parts, Span, Wanted, Weights,
};
use mlx_pipe::plan::WireDtype;
use mlx_pipe::stage::{DeviceChoice, KernelChoice};

/// Both kinds of kernels, and ‖ours − reference‖ / ‖reference‖ that each may reach: plain f32 arithmetic 1e-4, our
/// own, which quantise activations to 16 bits, 1e-3 (DESIGN).
fn both_kernels() -> [(Kernels, f64); 2] {
    [(on_the_cpu(KernelChoice::Mlx), 1e-4), (own(), 1e-3)]
}

/// The references were computed in f32 on a CPU; a GPU, where there is one, computes in other dtypes and orders.
fn on_the_cpu(choice: KernelChoice) -> Kernels {
    kernels(DeviceChoice::Cpu, choice)
}

fn own() -> Kernels {
    let kernels = on_the_cpu(KernelChoice::Own);
    assert!(matches!(kernels, Kernels::Own(_)));
    kernels
}

fn load(files: &ModelFiles, cut: &[std::ops::Range<usize>], kernels: &Kernels) -> Pipeline {
    Pipeline::load(files, cut, kernels, WireDtype::F32)
}

/// The logits of every step of a prompt's greedy continuation.
fn continue_prompt(pipeline: &mut Pipeline, slot: u32, prompt: &GoldenPrompt) -> Vec<Vec<f32>> {
    let mut logits = vec![pipeline.run(slot, 0, &prompt.ids)];
    for (count, token) in prompt.tokens[..prompt.tokens.len() - 1].iter().enumerate() {
        logits.push(pipeline.run(slot, prompt.ids.len() + count, &[*token]));
    }
    logits
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&logit| logit == best).unwrap() as u32
}

fn files(golden: &Golden) -> ModelFiles {
    ModelFiles::open(&golden.dir).unwrap_or_else(|error| panic!("{}: {error:#}", golden.name))
}

#[test]
fn logits_and_greedy_tokens_are_those_of_mlx_lm() {
    for golden in golden_cases() {
        for (kernels, tolerance) in both_kernels() {
            let worst = worst_error(&golden, &kernels);
            println!(
                "{}: largest relative error of the logits {worst:.1e}, may be {tolerance:.0e}",
                golden.name
            );
            assert!(worst < tolerance, "{}: {worst:e}", golden.name);
        }
    }
}

/// The largest error of the logits of all prompts, whose tokens have to be mlx-lm's.
fn worst_error(golden: &Golden, kernels: &Kernels) -> f64 {
    let files = files(golden);
    let mut worst = 0.0f64;
    let cut = &cuts(files.architecture.layers.len(), 1)[0];
    let mut whole = load(&files, cut, kernels);
    for (slot, prompt) in golden.prompts.iter().enumerate() {
        let logits = continue_prompt(&mut whole, slot as u32, prompt);
        let tokens: Vec<u32> = logits.iter().map(|logits| argmax(logits)).collect();
        assert_eq!(tokens, prompt.tokens, "{} prompt {slot}", golden.name);
        for (step, reference) in golden.logit_steps.iter().zip(&prompt.logits) {
            worst = worst.max(relative_error(&logits[*step], reference));
        }
    }
    worst
}

#[test]
fn every_cut_gives_bit_equal_logits() {
    for golden in golden_cases() {
        let files = files(&golden);
        let layer_count = files.architecture.layers.len();
        let prompt = &golden.prompts[2];
        for (kernels, _) in both_kernels() {
            let mut whole = load(&files, &cuts(layer_count, 1)[0], &kernels);
            let whole = continue_prompt(&mut whole, 0, prompt);
            for ranks in 2..=4 {
                for cut in cuts(layer_count, ranks) {
                    let parts = continue_prompt(&mut load(&files, &cut, &kernels), 0, prompt);
                    assert!(parts == whole, "{}: {cut:?} differs", golden.name);
                }
            }
        }
    }
}

#[test]
fn decoding_token_by_token_ends_where_prefill_of_the_whole_does() {
    for golden in golden_cases() {
        for (kernels, _) in both_kernels() {
            let files = files(&golden);
            let cut = &cuts(files.architecture.layers.len(), 2)[1];
            let mut pipeline = load(&files, cut, &kernels);
            // The fourth prompt and its continuation pass no block border, the sixth passes one.
            for (slot, index) in [3, 5].into_iter().enumerate() {
                let prompt = &golden.prompts[index];
                let decoded = continue_prompt(&mut pipeline, slot as u32, prompt);
                let whole: Vec<u32> = prompt.ids.iter().chain(&prompt.tokens).copied().collect();
                let prefilled = pipeline.run(9, 0, &whole[..whole.len() - 1]);
                let last = decoded.last().unwrap();
                match kernels {
                    Kernels::Own(_) | Kernels::Cuda(_) => {
                        assert!(*last == prefilled, "{}", golden.name)
                    }
                    Kernels::Mlx => {
                        let error = relative_error(last, &prefilled);
                        assert!(error < 1e-5, "{}: {error:e}", golden.name);
                    }
                }
            }
        }
    }
}

#[test]
fn a_prompt_in_chunks_and_a_sequence_cut_back_give_the_same_logits() {
    for golden in golden_cases() {
        for (kernels, _) in both_kernels() {
            let files = files(&golden);
            let cut = &cuts(files.architecture.layers.len(), 3)[0];
            let mut pipeline = load(&files, cut, &kernels);
            let prompt = &golden.prompts[3];
            let whole = pipeline.run(0, 0, &prompt.ids);
            for chunk in [1, 5, 32] {
                let mut last = Vec::new();
                for (index, tokens) in prompt.ids.chunks(chunk).enumerate() {
                    // The same slot again and again: each start at 0 cuts the cache back.
                    last = pipeline.run(0, index * chunk, tokens);
                }
                assert_eq!(
                    argmax(&last),
                    prompt.tokens[0],
                    "{} by {chunk}",
                    golden.name
                );
                let is_exact = matches!(kernels, Kernels::Own(_));
                assert!(!is_exact || last == whole, "{} by {chunk}", golden.name);
            }
        }
    }
}

#[test]
fn sequences_that_share_a_step_get_their_own_tokens() {
    for golden in golden_cases() {
        for (kernels, _) in both_kernels() {
            let files = files(&golden);
            let cut = &cuts(files.architecture.layers.len(), 2)[0];
            let mut pipeline = load(&files, cut, &kernels);
            let prompts = &golden.prompts;
            let prefill = |slot: usize| entry(slot as u32, 0, &prompts[slot].ids);
            let decode = |slot: usize| {
                entry(
                    slot as u32,
                    prompts[slot].ids.len(),
                    &prompts[slot].tokens[..1],
                )
            };
            let alone = pipeline.logits(vec![prefill(2)]);
            let first = pipeline.logits(vec![prefill(1), prefill(3)]);
            assert_eq!(argmax(&first[0]), prompts[1].tokens[0], "{}", golden.name);
            assert_eq!(argmax(&first[1]), prompts[3].tokens[0], "{}", golden.name);
            let second = pipeline.logits(vec![decode(3), prefill(2), decode(1)]);
            assert_eq!(argmax(&second[0]), prompts[3].tokens[1], "{}", golden.name);
            assert_eq!(argmax(&second[1]), prompts[2].tokens[0], "{}", golden.name);
            assert_eq!(argmax(&second[2]), prompts[1].tokens[1], "{}", golden.name);
            let is_exact = matches!(kernels, Kernels::Own(_));
            assert!(!is_exact || second[1] == alone[0], "{}", golden.name);
        }
    }
}

/// A model in one piece, without a stage around it.
struct Whole(Box<dyn Engine>);

impl Whole {
    fn load(files: &ModelFiles, kernels: &Kernels) -> Self {
        let architecture = &files.architecture;
        let parts = Parts {
            architecture,
            layers: &architecture.layers,
            table: Some(&architecture.embed_tokens),
            head: Some(architecture.head_weight()),
            native_dtype: files.native_dtype(),
        };
        let mut weights = Weights::new(files.checkpoint.reader(), mlx_rs::Dtype::Float32);
        Self(kernels.load(parts, &mut weights).unwrap())
    }

    /// The logits after the last of the tokens.
    fn run(&mut self, slot: u32, start: usize, tokens: &[u32]) -> anyhow::Result<Vec<f32>> {
        let span = Span {
            row: 0,
            count: tokens.len(),
            start,
        };
        let wanted = [Wanted {
            row: tokens.len() as u32 - 1,
            is_best_enough: false,
        }];
        let leaving = Leaving::Scores(&wanted);
        match self
            .0
            .run(Entering::Tokens(tokens), &[Part { slot, span }], leaving)?
        {
            Left::Scores(scores) => Ok(logits(scores).remove(0)),
            Left::Hidden(_) => panic!("a whole model gave hidden states"),
        }
    }

    /// The same for a sequence that nothing was computed of before.
    fn run_alone(&mut self, begin: &[u32], tail: &[u32]) -> Vec<f32> {
        self.0.release(99);
        self.run(99, 0, &[begin, tail].concat()).unwrap()
    }
}

#[test]
fn a_sequence_that_begins_as_another_goes_on_as_if_it_were_alone() {
    // One of each family: caches know nothing of weights.
    let cases = ["qwen3-tied-8bit", "qwen2-tied-8bit", "llama-biases-4bit"];
    for golden in cases.map(common::golden) {
        for (kernels, _) in both_kernels() {
            let mut whole = Whole::load(&files(&golden), &kernels);
            let same = |ours: &[f32], alone: &[f32]| match kernels {
                Kernels::Own(_) | Kernels::Cuda(_) => ours == alone,
                Kernels::Mlx => relative_error(ours, alone) < 1e-5,
            };
            let [first, tail, other_tail] = [5, 3, 2].map(|index| &golden.prompts[index].ids);
            // Within a block, whole blocks of ours, and all there is.
            for shared in [1, 64, 100, first.len()] {
                whole.run(0, 0, first).unwrap();
                whole.0.fork(0, 1, shared).unwrap();
                // The first goes on from within what they share, and the other has to see nothing of that.
                let ours = whole.run(0, shared - 1, tail).unwrap();
                let alone = whole.run_alone(&first[..shared - 1], tail);
                assert!(same(&ours, &alone), "{}: {shared}, first", golden.name);
                let ours = whole.run(1, shared, other_tail).unwrap();
                let alone = whole.run_alone(&first[..shared], other_tail);
                assert!(same(&ours, &alone), "{}: {shared}, other", golden.name);
                // What the other began as may go, and it may itself be what another begins as.
                whole.0.release(0);
                whole.0.fork(1, 2, shared).unwrap();
                let ours = whole.run(2, shared, tail).unwrap();
                let alone = whole.run_alone(&first[..shared], tail);
                assert!(same(&ours, &alone), "{}: {shared}, another", golden.name);
            }
        }
    }
}

#[test]
fn a_sequence_cannot_begin_as_more_than_there_is_of_another() {
    let golden = &golden_cases()[0];
    for (kernels, _) in both_kernels() {
        let mut whole = Whole::load(&files(golden), &kernels);
        whole.0.release(7);
        whole.run(0, 0, &[1, 2, 3, 4, 5]).unwrap();
        let message = |error: anyhow::Error| format!("{error:#}");
        let found = message(whole.0.fork(7, 1, 0).unwrap_err());
        assert!(found.contains("as slot 7, but"), "{found}");
        let found = message(whole.0.fork(0, 1, 6).unwrap_err());
        assert!(found.contains("first 6 tokens of slot 0"), "{found}");
        assert!(found.contains("holds only 5"), "{found}");
        // Neither has made anything of slot 1, and what begins as four tokens goes on after four at most.
        let found = message(whole.run(1, 1, &[1]).unwrap_err());
        assert!(found.contains("holds only 0 tokens"), "{found}");
        whole.0.fork(0, 1, 4).unwrap();
        let found = message(whole.run(1, 5, &[1]).unwrap_err());
        assert!(found.contains("holds only 4 tokens"), "{found}");
    }
}

#[test]
fn logits_are_bit_equal_on_any_number_of_threads() {
    let golden = &golden_cases()[0];
    let ids = &golden.prompts[4].ids;
    for (kernels, _) in both_kernels() {
        let mut whole = Whole::load(&files(golden), &kernels);
        let expected = whole.run_alone(ids, &[]);
        for threads in [1, THREADS, THREADS + 1, 1, 0] {
            whole.0.use_threads(threads);
            assert!(whole.run_alone(ids, &[]) == expected, "{threads} threads");
        }
    }
}
