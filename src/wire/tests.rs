//! Frames arrive as they were sent; what is none is refused.

use super::*;
use proptest::prelude::*;

fn sample_params() -> impl Strategy<Value = SampleParams> {
    let bias = prop::collection::vec((any::<u32>(), -100.0f32..100.0), 0..4);
    (
        0.0f32..2.0,
        any::<[u32; 2]>(),
        any::<u64>(),
        any::<Option<u8>>(),
        bias,
    )
        .prop_map(
            |(number, [top_k, prompt_tokens], seed, logprobs, logit_bias)| SampleParams {
                presence_penalty: number - 1.0,
                frequency_penalty: 1.0 - number,
                prompt_tokens,
                logit_bias,
                temperature: number,
                top_p: number / 2.0,
                top_k,
                min_p: number / 3.0,
                repetition_penalty: number + 0.5,
                seed,
                logprobs,
            },
        )
}

fn entry() -> impl Strategy<Value = Entry> {
    (
        any::<u32>(),
        any::<u32>(),
        prop::collection::vec(any::<u32>(), 1..9),
        prop::option::of(sample_params()),
    )
        .prop_map(|(slot, start, tokens, sample)| Entry {
            slot,
            start,
            tokens,
            sample,
        })
}

fn step() -> impl Strategy<Value = Step> {
    (
        any::<(u64, u16)>(),
        prop::collection::vec(upkeep(), 0..5),
        prop::option::of(prop::collection::vec(load(), 0..4)),
        prop::collection::vec(entry(), 0..5),
    )
        .prop_map(|((number, in_flight), upkeep, loads, entries)| Step {
            number,
            in_flight,
            upkeep,
            loads,
            entries,
        })
}

fn upkeep() -> impl Strategy<Value = Upkeep> {
    let fork = |[from, to, tokens]: [u32; 3]| Fork {
        from,
        to: if to == from { !to } else { to },
        tokens,
    };
    prop_oneof![
        any::<u32>().prop_map(Upkeep::Release),
        any::<[u32; 3]>().prop_map(move |fields| Upkeep::Fork(fork(fields))),
    ]
}

fn load() -> impl Strategy<Value = Load> {
    any::<[u64; 4]>().prop_map(|[busy_us, wait_us, wire_us, sent_bytes]| Load {
        sent_bytes,
        busy_us,
        wait_us,
        wire_us,
    })
}

proptest! {
    #[test]
    fn a_frame_arrives_as_it_was_sent_with_its_payload(step in step(), payload: Vec<u8>) {
        let frame = Frame::Step(step);
        let mut bytes = encode(&frame);
        bytes.extend(&payload);
        prop_assert_eq!(decode(&bytes), Ok((frame, &payload[..])));
    }

    #[test]
    fn a_header_cut_anywhere_is_an_error(step in step(), cut: prop::sample::Index) {
        let bytes = encode(&Frame::Step(step));
        prop_assert!(decode(&bytes[..cut.index(bytes.len())]).is_err());
    }

    #[test]
    fn any_bytes_are_decoded_or_refused_without_a_panic(tail: Vec<u8>) {
        let mut bytes = encode(&Frame::Step(Step::default()));
        bytes.truncate(7);
        bytes.extend(&tail);
        let _ = decode(&bytes);
        let _ = decode(&tail);
    }

    #[test]
    fn sampled_tokens_have_the_length_that_the_step_foretells(
        step in step(),
        all_loads in prop::collection::vec(load(), 1..5),
    ) {
        let ranks = all_loads.len();
        let sampled = Sampled {
            step: step.number,
            tokens: step.sampled().map(|(entry, sample)| SampledToken {
                token: entry.slot,
                logprob: sample.logprobs.map(|_| -0.5),
                top: vec![(7, -1.0); sample.logprobs.unwrap_or(0) as usize],
            }).collect(),
            loads: if step.loads.is_some() { all_loads } else { Vec::new() },
        };
        let bytes = sampled.encode();
        prop_assert_eq!(bytes.len(), step.sampled_bytes(ranks));
        prop_assert_eq!(Sampled::decode(&step, ranks, &bytes), Ok(sampled));
        prop_assert!(Sampled::decode(&step, ranks, &bytes[1..]).is_err());
    }
}

#[test]
fn the_header_of_a_decode_step_is_under_100_bytes() {
    let entry = Entry {
        slot: 1,
        start: 9,
        tokens: vec![3],
        sample: Some(SampleParams::GREEDY),
    };
    let step = Step {
        number: 1,
        entries: vec![entry],
        ..Step::default()
    };
    assert!(encode(&Frame::Step(step)).len() < 100);
}

#[test]
fn a_slot_that_is_to_begin_as_itself_is_refused() {
    let step = Step {
        upkeep: vec![Upkeep::Fork(Fork {
            from: 7,
            to: 7,
            tokens: 1,
        })],
        ..Step::default()
    };
    let refused = decode(&encode(&Frame::Step(step))).unwrap_err();
    assert!(refused.to_string().contains("slot 7"), "{refused}");
}

#[test]
fn another_version_and_another_program_are_named() {
    let mut bytes = encode(&Frame::End);
    bytes[4] = 99;
    assert_eq!(
        decode(&bytes).unwrap_err().to_string(),
        format!(
            "frame does not begin as expected: protocol version 99, this rank speaks {PROTOCOL_VERSION}"
        )
    );
    bytes[0] = b'?';
    assert!(decode(&bytes).unwrap_err().to_string().contains("expected"));
}

#[test]
fn the_best_is_enough_only_where_nothing_else_counts() {
    let greedy = SampleParams::GREEDY;
    assert!(greedy.takes_the_best());
    // A seed and the length of the prompt change nothing without a draw and without penalties.
    let same = SampleParams {
        seed: 5,
        prompt_tokens: 9,
        top_k: 3,
        ..greedy.clone()
    };
    assert!(same.takes_the_best());
    for other in [
        SampleParams {
            temperature: 0.1,
            ..greedy.clone()
        },
        SampleParams {
            repetition_penalty: 1.1,
            ..greedy.clone()
        },
        SampleParams {
            presence_penalty: 0.1,
            ..greedy.clone()
        },
        SampleParams {
            frequency_penalty: -0.1,
            ..greedy.clone()
        },
        SampleParams {
            logit_bias: vec![(1, 2.0)],
            ..greedy.clone()
        },
        SampleParams {
            logprobs: Some(0),
            ..greedy.clone()
        },
    ] {
        assert!(!other.takes_the_best(), "{other:?}");
    }
}
