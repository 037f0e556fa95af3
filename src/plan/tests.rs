//! The planner against what it promises: exhaustively over small sizes, against brute force, and on
//! random clusters.

use std::ops::Range;

use proptest::prelude::{
    Just, ProptestConfig, prop, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use proptest::strategy::Strategy as PropStrategy;

use super::*;

const GIGABYTE: u64 = 1_000_000_000;

/// Qwen3-1.7B-8bit: group 64, bf16 scales and biases, tied table.
fn qwen3() -> ModelShape {
    ModelShape {
        layer_bytes: vec![53_486_080; 28],
        embedding_bytes: 330_612_736,
        norm_bytes: 4096,
        head: Head::Tied,
        kv_bytes_per_token_per_layer: 2 * 8 * 128 * 4,
        hidden_row_bytes: 8192,
        layer_weights: 28 * 50_331_648,
    }
}

fn equal_layers(layers: usize, head: Head) -> ModelShape {
    ModelShape {
        layer_bytes: vec![100; layers],
        embedding_bytes: 620,
        norm_bytes: 1,
        head,
        kv_bytes_per_token_per_layer: 3,
        hidden_row_bytes: 40,
        layer_weights: 90 * layers as u64,
    }
}

fn device(memory_limit_bytes: u64, speed: u64) -> Device {
    Device {
        name: "host".to_owned(),
        memory_limit_bytes,
        speed,
        cost: None,
    }
}

fn minis(hosts: usize) -> Vec<Device> {
    let mini = |i| Device {
        name: format!("mini{i}.local"),
        ..device(12 * GIGABYTE, 10)
    };
    (1..=hosts).map(mini).collect()
}

fn request<'a>(
    shape: &'a ModelShape,
    devices: &'a [Device],
    strategy: Strategy,
) -> PlanRequest<'a> {
    let (context_tokens, sequences) = (4096, 1);
    PlanRequest {
        shape,
        devices,
        strategy,
        context_tokens,
        sequences,
        wire_dtype: WireDtype::F32,
        links: None,
        cost_source: TimeSource::Measured,
    }
}

fn counts(plan: &Plan) -> Vec<usize> {
    plan.stages.iter().map(|stage| stage.layers.len()).collect()
}

fn read_bytes(time: StageTime) -> u64 {
    match time {
        StageTime::Relative { bytes, .. } => bytes,
        StageTime::Nanoseconds(ns) => panic!("{ns} ns where no costs are known"),
    }
}

/// A device that takes so long for one token in a layer of 100 bytes.
fn timed(layer_ns: u64) -> DeviceCost {
    DeviceCost {
        layer: vec![StepCost {
            tokens: 1,
            ns: layer_ns,
        }],
        layer_bytes: 100,
        context_ns: 0,
        head_ns: 0,
        step_ns: 0,
        crowding_per_mille: 1000,
    }
}

fn by_hand(text: &str) -> Strategy {
    Strategy::Manual(text.parse().unwrap())
}

fn shortfall(request: &PlanRequest<'_>) -> Shortfall {
    match plan(request) {
        Err(PlanError::DoesNotFit(shortfall)) => *shortfall,
        other => panic!("expected a shortfall, found {other:?}"),
    }
}

/// Every way to give `layers` layers to `ranks` ranks, at least one each, smallest ends first.
fn every_cut(layers: usize, ranks: usize) -> Vec<Vec<Range<usize>>> {
    fn extend(
        start: usize,
        layers: usize,
        ranks: usize,
        cut: &mut Vec<Range<usize>>,
        all: &mut Vec<Vec<Range<usize>>>,
    ) {
        if ranks == 1 {
            cut.push(start..layers);
            all.push(cut.clone());
            cut.pop();
            return;
        }
        for end in start + 1..=layers + 1 - ranks {
            cut.push(start..end);
            extend(end, layers, ranks - 1, cut, all);
            cut.pop();
        }
    }
    let mut all = Vec::new();
    extend(0, layers, ranks, &mut Vec::new(), &mut all);
    all
}

/// What a stage holds, summed up plainly: (weights and KV, bytes read in a step).
fn plain_bytes(request: &PlanRequest<'_>, rank: usize, layers: &Range<usize>) -> (u64, u64) {
    let shape = request.shape;
    let (first, last) = (rank == 0, rank == request.devices.len() - 1);
    let kv = shape.kv_bytes_per_token_per_layer * request.context_tokens * request.sequences;
    let weights: u64 = shape.layer_bytes[layers.clone()].iter().sum();
    let (mut held, mut read) = (weights + kv * layers.len() as u64, weights);
    // The last rank holds a tied table in any case; the first only if it looks tokens up itself.
    if first && (last || shape.head != Head::TiedOnce) {
        held += shape.embedding_bytes;
    }
    if last {
        held += shape.norm_bytes;
        read += shape.norm_bytes;
        match shape.head {
            Head::Own { bytes } => (held, read) = (held + bytes, read + bytes),
            Head::Tied | Head::TiedOnce => {
                read += shape.embedding_bytes;
                held += if first { 0 } else { shape.embedding_bytes };
            }
        }
    }
    (held, read)
}

/// One rank's time, plainly: relative to all speeds' product, or crowded nanoseconds.
fn plain_time(request: &PlanRequest<'_>, rank: usize, layers: &Range<usize>) -> u128 {
    let devices = request.devices;
    if devices.iter().all(|device| device.cost.is_some()) {
        let cost = devices[rank].cost.as_ref().unwrap();
        let bytes: u64 = request.shape.layer_bytes[layers.clone()].iter().sum();
        let mut ns = cost.layer[0].ns * bytes / cost.layer_bytes + cost.step_ns;
        if rank + 1 == devices.len() {
            ns += cost.head_ns;
        }
        return u128::from(ns * cost.crowding_per_mille / 1000);
    }
    let speeds = devices.iter().map(|device| u128::from(device.speed));
    let read = plain_bytes(request, rank, layers).1;
    u128::from(read) * (speeds.product::<u128>() / u128::from(devices[rank].speed))
}

fn plainly_fits(request: &PlanRequest<'_>, cut: &[Range<usize>]) -> bool {
    cut.iter()
        .zip(request.devices)
        .enumerate()
        .all(|(rank, (layers, device))| {
            plain_bytes(request, rank, layers).0 <= device.memory_limit_bytes
        })
}

fn cuts_that_fit(request: &PlanRequest<'_>) -> Vec<Vec<Range<usize>>> {
    let cuts = every_cut(request.shape.layer_count(), request.devices.len());
    cuts.into_iter()
        .filter(|cut| plainly_fits(request, cut))
        .collect()
}

/// The best cut by trying all.
fn balanced_by_brute_force(request: &PlanRequest<'_>) -> Option<Vec<Range<usize>>> {
    let worst = |cut: &Vec<Range<usize>>| {
        let stages = cut.iter().enumerate();
        let scores = stages.map(|(rank, layers)| {
            let held = plain_bytes(request, rank, layers).0;
            (plain_time(request, rank, layers), held)
        });
        let (times, held): (Vec<u128>, Vec<u64>) = scores.unzip();
        let ends: Vec<usize> = cut.iter().map(|layers| layers.end).collect();
        (times.into_iter().max(), held.into_iter().max(), ends)
    };
    cuts_that_fit(request).into_iter().min_by_key(worst)
}

/// Hamilton's method, plainly: whole shares first, then one more each by largest remainder.
fn largest_remainder(weights: &[u64], layers: usize) -> Vec<usize> {
    let whole: u64 = weights.iter().sum();
    let share = |weight: &u64| (*weight * layers as u64 / whole) as usize;
    let mut counts: Vec<usize> = weights.iter().map(share).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|rank| std::cmp::Reverse(weights[*rank] * layers as u64 % whole));
    let left = layers - counts.iter().sum::<usize>();
    order
        .into_iter()
        .take(left)
        .for_each(|rank| counts[rank] += 1);
    counts
}

fn assert_sound(plan: &Plan, request: &PlanRequest<'_>) {
    let mut owners = vec![0; request.shape.layer_count()];
    let mut next = 0;
    for (rank, stage) in plan.stages.iter().enumerate() {
        assert_eq!(stage.layers.start, next, "{:?}", counts(plan));
        next = stage.layers.end;
        stage.layers.clone().for_each(|layer| owners[layer] += 1);
        let (held, read) = plain_bytes(request, rank, &stage.layers);
        assert_eq!(stage.footprint.total_bytes(), held);
        match stage.time {
            StageTime::Relative { bytes, .. } => assert_eq!(bytes, read),
            StageTime::Nanoseconds(ns) => {
                assert_eq!(u128::from(ns), plain_time(request, rank, &stage.layers));
            }
        }
        assert!(held <= request.devices[rank].memory_limit_bytes);
    }
    assert!(
        owners.iter().all(|owners| *owners == 1),
        "{:?}",
        counts(plan)
    );
    let ranks = plan.stages.len();
    assert_eq!(ranks, request.devices.len());
    let lookup_rank = match request.shape.head {
        Head::TiedOnce => ranks - 1,
        Head::Tied | Head::Own { .. } => 0,
    };
    for (rank, stage) in plan.stages.iter().enumerate() {
        assert_eq!(stage.role.owns_embedding(), rank == lookup_rank);
        assert_eq!(stage.role.owns_head(), rank == ranks - 1);
        assert_eq!(stage.role.owns_norm(), rank == ranks - 1);
    }
}

#[test]
fn every_layer_has_exactly_one_rank_for_every_size_and_strategy() {
    for layers in 1..=80 {
        for ranks in 1..=16 {
            let shape = equal_layers(layers, Head::Tied);
            let devices = vec![device(GIGABYTE, 7); ranks];
            for strategy in Strategy::NAMED {
                let request = request(&shape, &devices, strategy);
                match plan(&request) {
                    Ok(plan) if ranks <= layers => assert_sound(&plan, &request),
                    Err(PlanError::MoreRanksThanLayers {
                        ranks: r,
                        layers: l,
                    }) => {
                        assert!((r, l) == (ranks, layers) && ranks > layers);
                    }
                    other => panic!("{layers} layers, {ranks} ranks: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn uneven_hosts_get_every_layer_too() {
    for layers in 1..=80 {
        for ranks in 1..=layers.min(16) {
            let shape = equal_layers(layers, Head::Own { bytes: 777 });
            let uneven = |rank: u64| device(100_000_000 * (1 + rank % 3), 1 + rank * rank % 7);
            let devices: Vec<Device> = (0..ranks as u64).map(uneven).collect();
            for strategy in Strategy::NAMED {
                let request = request(&shape, &devices, strategy);
                assert_sound(&plan(&request).unwrap(), &request);
            }
        }
    }
}

#[test]
fn hosts_of_unequal_costs_get_every_layer_too() {
    for layers in 1..=40 {
        for ranks in 1..=layers.min(12) {
            let shape = equal_layers(layers, Head::TiedOnce);
            let uneven = |rank: u64| Device {
                cost: Some(DeviceCost {
                    head_ns: 900 * (rank % 4),
                    step_ns: rank * rank % 5,
                    crowding_per_mille: 1000 + 500 * (rank % 2),
                    ..timed(1 + rank * rank % 7)
                }),
                ..device(100_000_000 * (1 + rank % 3), 1)
            };
            let devices: Vec<Device> = (0..ranks as u64).map(uneven).collect();
            for strategy in Strategy::NAMED {
                let request = request(&shape, &devices, strategy);
                assert_sound(&plan(&request).unwrap(), &request);
            }
        }
    }
}

#[test]
fn uniform_counts_differ_by_at_most_one_and_early_ranks_get_more() {
    for layers in 1..=80 {
        for ranks in 1..=layers.min(16) {
            let shape = equal_layers(layers, Head::Tied);
            let devices = vec![device(GIGABYTE, 7); ranks];
            let plan = plan(&request(&shape, &devices, Strategy::Uniform)).unwrap();
            let (base, longer) = (layers / ranks, layers % ranks);
            let expected = |rank| base + usize::from(rank < longer);
            assert_eq!(counts(&plan), (0..ranks).map(expected).collect::<Vec<_>>());
        }
    }
}

#[test]
fn uniform_gives_the_longer_stage_to_a_rank_that_can_hold_it() {
    let shape = ModelShape {
        kv_bytes_per_token_per_layer: 0,
        ..equal_layers(10, Head::Tied)
    };
    // Rank 0 holds the table and three layers, and not a byte more.
    let devices = [
        device(620 + 300, 1),
        device(GIGABYTE, 1),
        device(GIGABYTE, 1),
    ];
    let plan = plan(&request(&shape, &devices, Strategy::Uniform)).unwrap();
    assert_eq!(counts(&plan), [3, 4, 3]);
}

#[test]
fn qwen3_on_three_equal_hosts_is_11_12_5_because_of_the_head() {
    let (shape, devices) = (qwen3(), minis(3));
    let plan = plan(&request(&shape, &devices, Strategy::Balanced)).unwrap();
    assert_eq!(counts(&plan), [11, 12, 5]);
    assert_eq!(read_bytes(plan.slowest().unwrap()), 12 * 53_486_080);
}

#[test]
fn qwen3_sums_are_those_of_the_published_checkpoint() {
    let (shape, devices) = (qwen3(), minis(3));
    assert_eq!(shape.model_bytes(), Some(1_828_227_072));
    let plan = plan(&request(&shape, &devices, by_hand("0-9,10-18,19-27"))).unwrap();
    let weights = plan
        .stages
        .iter()
        .map(|stage| stage.footprint.weights_bytes());
    assert_eq!(
        weights.collect::<Vec<_>>(),
        [865_473_536, 481_374_720, 811_991_552]
    );
    assert_eq!(plan.weights_bytes(), 2_158_839_808);
    assert_eq!(plan.full_copies_bytes(), 3 * 1_828_227_072);
    assert_eq!(plan.memory_saved_bytes(), 3 * 1_828_227_072 - 2_158_839_808);
}

#[test]
fn a_tied_table_is_counted_once_on_one_rank_and_twice_on_two() {
    let shape = qwen3();
    let alone = plan(&request(&shape, &minis(1), Strategy::Balanced)).unwrap();
    assert_eq!(alone.stages[0].role, Role::Only);
    assert_eq!(alone.stages[0].footprint.head_bytes, 0);
    assert_eq!(alone.weights_bytes(), 1_828_227_072);
    assert_eq!(read_bytes(alone.stages[0].time), 1_828_227_072);
    assert_eq!(alone.memory_saved_bytes(), 0);

    let pair = plan(&request(&shape, &minis(2), Strategy::Balanced)).unwrap();
    assert_eq!(pair.stages[0].footprint.embedding_bytes, 330_612_736);
    assert_eq!(pair.stages[1].footprint.head_bytes, 330_612_736);
    assert_eq!(pair.weights_bytes(), 1_828_227_072 + 330_612_736);
}

#[test]
fn a_tied_table_held_once_adds_up_to_one_model_on_any_number_of_ranks() {
    let shape = ModelShape {
        head: Head::TiedOnce,
        ..qwen3()
    };
    for ranks in 1..=16 {
        let plan = plan(&request(&shape, &minis(ranks), Strategy::Balanced)).unwrap();
        assert_eq!(plan.weights_bytes(), 1_828_227_072);
        let lookups = plan
            .stages
            .iter()
            .filter(|stage| stage.role.owns_embedding());
        assert_eq!(lookups.count(), 1);
        let last = plan.stages.last().unwrap();
        assert!(last.role.owns_embedding() && last.role.owns_head());
    }
    let three = plan(&request(&shape, &minis(3), Strategy::Balanced)).unwrap();
    // 66.7 % less than three copies.
    assert_eq!(three.memory_saved_bytes(), 2 * 1_828_227_072);
    assert_eq!(three.stages[0].role.owns(), [""; 0]);
    assert_eq!(counts(&three), [11, 12, 5]);
}

#[test]
fn an_untied_head_adds_up_to_one_model_on_any_number_of_ranks() {
    let shape = ModelShape {
        head: Head::Own { bytes: 330_612_736 },
        ..qwen3()
    };
    for ranks in 1..=16 {
        let plan = plan(&request(&shape, &minis(ranks), Strategy::Balanced)).unwrap();
        assert_eq!(Some(plan.weights_bytes()), shape.model_bytes());
    }
}

#[test]
fn kv_bytes_are_layers_times_context_times_sequences() {
    let (shape, devices) = (qwen3(), minis(3));
    let request = PlanRequest {
        sequences: 5,
        ..request(&shape, &devices, Strategy::Balanced)
    };
    let plan = plan(&request).unwrap();
    let kv = plan
        .stages
        .iter()
        .map(|stage| stage.footprint.kv_bytes)
        .collect::<Vec<_>>();
    assert_eq!(kv, [11, 12, 5].map(|layers| layers * 8192 * 4096 * 5));
}

#[test]
fn proportional_counts_are_those_of_largest_remainder_where_memory_is_plenty() {
    for layers in 16..=40 {
        for weights in [
            &[3, 5, 8][..],
            &[1, 1, 1],
            &[9, 4, 2, 6],
            &[2, 2, 5, 7, 2],
            &[1, 2],
        ] {
            let shape = equal_layers(layers, Head::Tied);
            let roomy = |weight: &u64| device(weight * 1_000_000, *weight);
            let devices: Vec<Device> = weights.iter().map(roomy).collect();
            for strategy in [Strategy::MemoryProportional, Strategy::ComputeProportional] {
                let plan = plan(&request(&shape, &devices, strategy)).unwrap();
                assert_eq!(
                    counts(&plan),
                    largest_remainder(weights, layers),
                    "{weights:?}"
                );
            }
        }
    }
}

#[test]
fn rounding_never_lands_on_the_tightest_rank() {
    let shape = ModelShape {
        kv_bytes_per_token_per_layer: 0,
        ..equal_layers(10, Head::Tied)
    };
    // By speed alone rank 0 would get 5 layers; it holds the table and two.
    let devices = [
        device(620 + 250, 5),
        device(GIGABYTE, 3),
        device(GIGABYTE, 2),
    ];
    let plan = plan(&request(&shape, &devices, Strategy::ComputeProportional)).unwrap();
    assert_eq!(counts(&plan), [2, 5, 3]);
}

#[test]
fn a_share_below_one_layer_still_gets_one() {
    let shape = equal_layers(5, Head::Tied);
    let devices = [
        device(GIGABYTE, 1_000_000),
        device(GIGABYTE, 1),
        device(GIGABYTE, 1),
    ];
    let plan = plan(&request(&shape, &devices, Strategy::ComputeProportional)).unwrap();
    assert_eq!(counts(&plan), [3, 1, 1]);
}

#[test]
fn auto_says_which_strategy_it_chose_and_is_never_slower_than_any() {
    let shape = qwen3();
    let devices = [
        device(12 * GIGABYTE, 10),
        device(GIGABYTE, 30),
        device(8 * GIGABYTE, 16),
    ];
    let auto = plan(&request(&shape, &devices, Strategy::Auto)).unwrap();
    assert_eq!(
        (&auto.strategy, &auto.chosen),
        (&Strategy::Auto, &Strategy::Balanced)
    );
    for strategy in Strategy::NAMED {
        if let Ok(other) = plan(&request(&shape, &devices, strategy)) {
            assert!(auto.slowest() <= other.slowest());
        }
    }
}

#[test]
fn empty_and_impossible_requests_are_errors() {
    let (shape, none) = (qwen3(), equal_layers(0, Head::Tied));
    let deep = equal_layers(MAX_LAYERS + 1, Head::Tied);
    let still = [device(GIGABYTE, 1), device(GIGABYTE, 0)];
    let error = |shape: &ModelShape, devices: &[Device]| {
        plan(&request(shape, devices, Strategy::Balanced)).unwrap_err()
    };
    assert!(matches!(error(&shape, &[]), PlanError::NoRanks));
    assert!(matches!(error(&none, &minis(1)), PlanError::NoLayers));
    assert!(matches!(
        error(&deep, &minis(1)),
        PlanError::TooManyLayers { found: 1025 }
    ));
    assert!(matches!(
        error(&shape, &still),
        PlanError::ZeroSpeed { rank: 1, .. }
    ));
    assert!(matches!(
        error(&shape, &minis(29)),
        PlanError::MoreRanksThanLayers { .. }
    ));
}

#[test]
fn sizes_beyond_64_bits_are_an_error_and_no_wrap() {
    let (shape, devices) = (qwen3(), minis(3));
    let base = request(&shape, &devices, Strategy::Balanced);
    let vast = PlanRequest {
        context_tokens: u64::MAX,
        sequences: u64::MAX,
        ..base.clone()
    };
    assert!(matches!(plan(&vast), Err(PlanError::TooLarge { .. })));
    // One model fits in 64 bits, the second copy of the tied table does not.
    let heavy = ModelShape {
        embedding_bytes: u64::MAX / 2 + 1,
        ..qwen3()
    };
    let heavy = PlanRequest {
        shape: &heavy,
        ..base
    };
    assert!(matches!(plan(&heavy), Err(PlanError::TooLarge { .. })));
}

#[test]
fn extreme_limits_and_speeds_do_not_overflow() {
    let shape = equal_layers(MAX_LAYERS, Head::Tied);
    let devices = vec![device(u64::MAX, u64::MAX); 3];
    for strategy in Strategy::NAMED {
        let request = request(&shape, &devices, strategy);
        assert_sound(&plan(&request).unwrap(), &request);
    }
    let nothing = vec![device(0, 1); 3];
    for strategy in Strategy::NAMED {
        let error = plan(&request(&shape, &nothing, strategy)).unwrap_err();
        assert!(matches!(error, PlanError::DoesNotFit(_)));
    }
}

#[test]
fn ranges_by_hand_are_inclusive_and_read_back_the_same() {
    let ranges: LayerRanges = "0-9, 10-18,19".parse().unwrap();
    assert_eq!(ranges.0, [0..10, 10..19, 19..20]);
    assert_eq!(ranges.to_string(), "0-9,10-18,19");
    assert_eq!(ranges.to_string().parse::<LayerRanges>().unwrap(), ranges);
}

#[test]
fn texts_that_are_no_ranges_are_errors_that_name_the_rank() {
    for (text, rank) in [
        ("", 0),
        ("0-9,", 1),
        ("0-9,x", 1),
        ("0-9,10-", 1),
        ("-3", 0),
        ("+1-2", 0),
        ("0-1-2", 0),
        ("0-18446744073709551615", 0),
        ("0-99999999999999999999", 0),
    ] {
        let error = text.parse::<LayerRanges>().unwrap_err();
        assert!(
            matches!(error, ParseLayersError::Malformed { rank: r, .. } if r == rank),
            "{text}"
        );
    }
    let error = "0-9,18-10".parse::<LayerRanges>().unwrap_err();
    assert_eq!(
        error,
        ParseLayersError::Backwards {
            rank: 1,
            first: 18,
            last: 10
        }
    );
}

#[test]
fn ranges_by_hand_that_do_not_cover_the_model_name_what_is_wrong() {
    let (shape, devices) = (qwen3(), minis(3));
    for (ranges, text) in [
        (
            "0-9,11-18,19-27",
            "gap before rank 1: it starts at layer 11, expected layer 10; layer 10 is on no rank",
        ),
        (
            "0-9,13-18,19-27",
            "gap before rank 1: it starts at layer 13, expected layer 10; layers 10 to 12 are on no rank",
        ),
        (
            "0-9,9-18,19-27",
            "overlap at rank 1: it starts at layer 9, expected layer 10",
        ),
        (
            "0-9,10-18,19-26",
            "layer 27 is on no rank: the model has 28 layers, the ranges end before layer 27",
        ),
        (
            "0-9,10-18,19-28",
            "end with layer 28, but the model has 28 layers: its last one is 27",
        ),
        (
            "1-9,10-18,19-27",
            "gap before rank 0: it starts at layer 1, expected layer 0",
        ),
        (
            "0-9,10-27",
            "--layers gives 2 layer ranges for 3 ranks; give one range a rank, or start 2 ranks",
        ),
        (
            "0-27",
            "1 layer range for 3 ranks; give one range a rank, or start 1 rank ",
        ),
    ] {
        let error = plan(&request(&shape, &devices, by_hand(ranges))).unwrap_err();
        assert!(matches!(error, PlanError::Cover(_)));
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn strategies_are_known_by_the_names_they_print() {
    for strategy in Strategy::NAMED {
        assert_eq!(strategy.to_string().parse(), Ok(strategy));
    }
    assert_eq!(Strategy::default(), Strategy::Balanced);
    let error = "fastest".parse::<Strategy>().unwrap_err().to_string();
    assert!(error.contains("`fastest`"), "{error}");
    for strategy in Strategy::NAMED {
        assert!(error.contains(strategy.name()), "{error}");
    }
}

#[test]
fn validation_notices_a_plan_that_was_tampered_with() {
    let (shape, devices) = (qwen3(), minis(3));
    let good = plan(&request(&shape, &devices, Strategy::Balanced)).unwrap();
    assert_eq!(validate(&good, 28), Ok(()));
    let broken = |tamper: &dyn Fn(&mut Plan)| {
        let mut plan = good.clone();
        tamper(&mut plan);
        validate(&plan, 28).unwrap_err()
    };
    let error = broken(&|plan| plan.stages[2].layers.end = 27);
    assert_eq!(
        error,
        CoverError::MissingLast {
            expected: 28,
            found: 27
        }
    );
    let error = broken(&|plan| plan.stages[1].layers.start = 10);
    assert_eq!(
        error,
        CoverError::Overlap {
            rank: 1,
            expected: 11,
            found: 10
        }
    );
    let error = broken(&|plan| plan.stages[0].layers.end = 0);
    assert_eq!(error, CoverError::Empty { rank: 0 });
    let error = broken(&|plan| plan.stages[1].role = Role::Last);
    assert!(matches!(error, CoverError::Ownership { rank: 1, .. }));
    let error = broken(&|plan| plan.stages[0].role = Role::Only);
    assert!(matches!(error, CoverError::Ownership { rank: 0, .. }));
    let error = broken(&|plan| plan.stages.clear());
    assert_eq!(
        error,
        CoverError::MissingLast {
            expected: 28,
            found: 0
        }
    );
}

#[test]
fn the_fingerprint_is_the_same_on_every_machine() {
    let (shape, devices) = (qwen3(), minis(3));
    let plan = plan(&request(&shape, &devices, Strategy::Balanced)).unwrap();
    assert_eq!(
        plan.fingerprint_hex(),
        "f7b15f4e173bdb572b2dded5c0ab89387fc35af6fe8bd314cf158b26e752cc0c"
    );
}

#[test]
fn with_known_costs_balanced_counts_nanoseconds() {
    // By cores alone the hosts are equal; the second one is measured to be three times slower.
    let shape = ModelShape {
        embedding_bytes: 0,
        norm_bytes: 0,
        ..equal_layers(8, Head::Tied)
    };
    let host = |cost| Device {
        cost,
        ..device(GIGABYTE, 5)
    };
    let known = [host(Some(timed(100))), host(Some(timed(300)))];
    let made = plan(&request(&shape, &known, Strategy::Balanced)).unwrap();
    assert_eq!(
        (counts(&made), made.times),
        (vec![6, 2], TimeSource::Measured)
    );
    assert_eq!(made.slowest(), Some(StageTime::Nanoseconds(600)));
    // The costs of one alone compare with nothing.
    let half_known = [host(Some(timed(100))), host(None)];
    let made = plan(&request(&shape, &half_known, Strategy::Balanced)).unwrap();
    assert_eq!(
        (counts(&made), made.times),
        (vec![4, 4], TimeSource::Relative)
    );
}

#[test]
fn costs_beyond_64_bits_are_no_wrap_and_no_panic() {
    let shape = equal_layers(MAX_LAYERS, Head::Tied);
    let vast = DeviceCost {
        layer_bytes: 1,
        context_ns: u64::MAX,
        head_ns: u64::MAX,
        step_ns: u64::MAX,
        crowding_per_mille: u64::MAX,
        ..timed(u64::MAX)
    };
    let devices = vec![
        Device {
            cost: Some(vast),
            ..device(u64::MAX, u64::MAX)
        };
        3
    ];
    for strategy in Strategy::NAMED {
        let made = plan(&PlanRequest {
            links: links(&[(u64::MAX, 0), (1, 0)], (u64::MAX, 0)),
            ..request(&shape, &devices, strategy)
        });
        let made = made.unwrap();
        assert_eq!(made.slowest(), Some(StageTime::Nanoseconds(u64::MAX)));
        assert!(made.predict(4096, 1).is_some());
        made.predict_run(&[(100, u64::MAX)], 7).unwrap();
    }
}

#[test]
fn the_outlook_reads_as_intended() {
    let (shape, mut devices) = (qwen3(), minis(3));
    let rates = Rates {
        bandwidth_bytes_per_s: 120_000_000_000,
        flops_per_s: Some(4_300_000_000_000),
    };
    for device in &mut devices {
        device.cost = Some(rates.cost(&shape, 1));
    }
    let request = PlanRequest {
        links: links(&[(150_000, 125_000_000); 2], (150_000, 125_000_000)),
        ..request(&shape, &devices, Strategy::Balanced)
    };
    let made = plan(&request).unwrap();
    let expected = "\
first token      0.474 s after 512 prompt tokens (1081 a second)
one stream       48.0 tokens/s, ranks idle 68 %
full pipeline    150 tokens/s, ranks idle 5 %
longest context  40960 at 1 sequence, the model's
most sequences   28 at context 4096 (34 by another cut)
";
    assert_eq!(outlook(&made, &shape, 40960), expected);
    let hosts = |hosts: usize| {
        let links = links(
            &[(150_000, 125_000_000); 2][..hosts - 1],
            (150_000, 125_000_000),
        );
        let devices = &devices[..hosts];
        (
            hosts,
            plan(&PlanRequest {
                devices,
                links,
                ..request.clone()
            }),
        )
    };
    let mut plans = vec![hosts(1), hosts(2), hosts(3)];
    plans[0] = (1, Err(PlanError::from(Box::new(shortfall_of_one(&shape)))));
    let expected = "\
context 4096, sequences 1, wire f32
times: measured on these machines
with the first ranks only: fullest rank in GB, one stream and full pipeline
(in tokens a second)
ranks  split                         fullest  stream  pipeline  first token
    1  does not fit: lacks 1.768 GB        -       -         -            -
    2  17/11                           1.810    48.5       104      0.642 s
    3  11/12/5                         1.288    48.0       150      0.474 s
";
    assert_eq!(what_if_table(&plans), expected);
}

fn shortfall_of_one(shape: &ModelShape) -> Shortfall {
    shortfall(&request(shape, &[device(GIGABYTE, 1)], Strategy::Balanced))
}

fn relative(bytes: u64, speed: u64) -> StageTime {
    StageTime::Relative { bytes, speed }
}

fn changed_cost(change: fn(&mut DeviceCost)) -> Option<DeviceCost> {
    let mut cost = timed(1);
    change(&mut cost);
    Some(cost)
}

/// Links of (ns, bytes a second).
fn links(forward: &[(u64, u64)], back: (u64, u64)) -> Option<LinkCosts> {
    let link = |(latency_ns, bytes_per_s): (u64, u64)| LinkCost {
        latency_ns,
        bytes_per_s,
    };
    Some(LinkCosts {
        forward: forward.iter().copied().map(link).collect(),
        back: link(back),
    })
}

#[test]
fn the_fingerprint_differs_for_every_field_that_differs() {
    let (shape, devices) = (qwen3(), minis(3));
    let plan = plan(&request(&shape, &devices, Strategy::Balanced)).unwrap();
    let changes: Vec<fn(&mut Plan)> = vec![
        |_| {},
        |p| p.strategy = Strategy::Auto,
        |p| p.chosen = Strategy::Uniform,
        |p| p.wire_dtype = WireDtype::Bf16,
        |p| p.lookup = Lookup::OnLast,
        |p| p.layer_count += 1,
        |p| p.model_bytes += 1,
        |p| p.context_tokens += 1,
        |p| p.sequences += 1,
        |p| p.stages.truncate(2),
        |p| p.stages[0].device.name.push('x'),
        |p| p.stages[0].device.memory_limit_bytes += 1,
        |p| p.stages[0].device.speed += 1,
        |p| p.stages[0].layers.end += 1,
        |p| p.stages[1].layers.start += 1,
        |p| p.stages[1].role = Role::Last,
        |p| p.stages[0].footprint.layers_bytes += 1,
        |p| p.stages[0].footprint.embedding_bytes += 1,
        |p| p.stages[0].footprint.norm_bytes += 1,
        |p| p.stages[0].footprint.head_bytes += 1,
        |p| p.stages[0].footprint.kv_bytes += 1,
        |p| p.stages[0].time = StageTime::Nanoseconds(588_346_880),
        |p| p.stages[0].time = relative(588_346_881, 10),
        |p| p.stages[0].time = relative(588_346_880, 11),
        |p| p.hidden_row_bytes += 1,
        |p| p.times = TimeSource::Measured,
        |p| p.times = TimeSource::Estimated,
        |p| p.stages[0].device.cost = Some(timed(1)),
        |p| p.stages[1].device.cost = Some(timed(1)),
        |p| p.stages[0].device.cost = Some(timed(2)),
        |p| p.stages[0].device.cost = changed_cost(|c| c.layer[0].tokens += 1),
        |p| p.stages[0].device.cost = changed_cost(|c| c.layer.push(c.layer[0])),
        |p| p.stages[0].device.cost = changed_cost(|c| c.layer_bytes += 1),
        |p| p.stages[0].device.cost = changed_cost(|c| c.context_ns += 1),
        |p| p.stages[0].device.cost = changed_cost(|c| c.head_ns += 1),
        |p| p.stages[0].device.cost = changed_cost(|c| c.step_ns += 1),
        |p| p.stages[0].device.cost = changed_cost(|c| c.crowding_per_mille += 1),
        |p| p.links = links(&[(1, 1), (1, 1)], (1, 1)),
        |p| p.links = links(&[(1, 1)], (1, 1)),
        |p| p.links = links(&[(1, 1), (2, 1)], (1, 1)),
        |p| p.links = links(&[(1, 1), (1, 2)], (1, 1)),
        |p| p.links = links(&[(1, 1), (1, 1)], (2, 1)),
        |p| p.links = links(&[(1, 1), (1, 1)], (1, 2)),
    ];
    let changed = changes.iter().map(|change| {
        let mut plan = plan.clone();
        change(&mut plan);
        plan.fingerprint()
    });
    let distinct: std::collections::BTreeSet<[u8; 32]> = changed.collect();
    assert_eq!(distinct.len(), changes.len());
}

#[test]
fn the_plan_table_reads_as_intended() {
    let (shape, devices) = (qwen3(), minis(3));
    let plan = plan(&request(&shape, &devices, Strategy::Balanced)).unwrap();
    let expected = "\
plan f7b15f4e173b: balanced, context 4096, sequences 1, wire f32
times: relative, by number of cores; a run with --calibrate measures them
sizes in GB = 1e9 bytes; step = busy share of a full pipeline's step
rank  host         layers      owns        weights     KV  total   limit   step
   0  mini1.local  0-10    11  embedding     0.919  0.369  1.288  12.000   92 %
   1  mini2.local  11-22   12                0.642  0.403  1.044  12.000  100 %
   2  mini3.local  23-27    5  norm, head    0.598  0.168  0.766  12.000   93 %
      all                  28                2.159  0.940  3.098
balance 95 %; one model 1.828 GB, 3 full copies 5.485 GB
memory saved against a full copy on every rank: 3.326 GB (60.6 %)
";
    assert_eq!(plan_table(&plan), expected);
    let expected = "\
memory by component in GB
rank  host         layers  embedding  norm + head     KV  total
   0  mini1.local   0.588      0.331        0.000  0.369  1.288
   1  mini2.local   0.642      0.000        0.000  0.403  1.044
   2  mini3.local   0.267      0.000        0.331  0.168  0.766
      all           1.498      0.331        0.331  0.940  3.098
";
    assert_eq!(memory_table(&plan), expected);
}

#[test]
fn gigabytes_are_rounded_half_up() {
    for (bytes, text) in [
        (0, "0.000"),
        (499_999, "0.000"),
        (500_000, "0.001"),
        (1_828_227_072, "1.828"),
        (999_999_499_999, "999.999"),
        (999_999_500_000, "1000"),
        (1_499_999_999_999, "1500"),
        (u64::MAX, "18446744074"),
    ] {
        assert_eq!(table::gigabytes(bytes), text);
    }
}

#[test]
fn small_sizes_are_in_units_that_do_not_read_as_nothing() {
    for (bytes, text) in [
        (0, "0 B"),
        (99_999, "99999 B"),
        (100_000, "0.1 MB"),
        (449_999, "0.4 MB"),
        (450_000, "0.5 MB"),
        (99_949_999, "99.9 MB"),
        (100_000_000, "0.100 GB"),
        (u64::MAX, "18446744074 GB"),
    ] {
        assert_eq!(table::size(bytes), text);
    }
}

#[test]
fn one_of_a_thing_is_singular() {
    let shape = qwen3();
    let alone = plan(&request(&shape, &minis(1), Strategy::Balanced)).unwrap();
    assert!(plan_table(&alone).contains("1 full copy 1.828 GB"));
    let tight = [device(2 * GIGABYTE, 1)];
    let long = PlanRequest {
        context_tokens: 1 << 16,
        ..request(&shape, &tight, Strategy::Balanced)
    };
    let text = shortfall(&long).to_string();
    assert!(text.contains("1 of 1 rank over the memory limit"), "{text}");
    assert!(text.contains(" at 1 sequence\n"), "{text}");
}

#[test]
fn only_mistakes_of_the_command_line_are_bad_usage() {
    let (shape, none) = (qwen3(), equal_layers(0, Head::Tied));
    let error = |shape: &ModelShape, devices: &[Device], strategy| {
        plan(&request(shape, devices, strategy)).unwrap_err()
    };
    assert!(error(&shape, &[], Strategy::Auto).is_usage());
    assert!(error(&shape, &minis(29), Strategy::Auto).is_usage());
    assert!(error(&shape, &minis(3), by_hand("0-9,10-27")).is_usage());
    assert!(!error(&none, &minis(1), Strategy::Auto).is_usage());
    assert!(!error(&shape, &[device(GIGABYTE, 0)], Strategy::Auto).is_usage());
    assert!(!error(&shape, &[device(1, 1)], Strategy::Auto).is_usage());
}

#[test]
fn tables_keep_to_80_columns_whatever_the_names_and_sizes() {
    let long = "a-host-with-a-very-long-name.in.some.department.example\nsecond line";
    let shape = ModelShape {
        layer_bytes: vec![900 * GIGABYTE; 126],
        ..qwen3()
    };
    let vast = DeviceCost {
        layer_bytes: GIGABYTE,
        ..timed(u64::MAX)
    };
    let costs = [None, Some(timed(7)), Some(vast)];
    let limits = [GIGABYTE, 90_000 * GIGABYTE];
    for (limit_bytes, cost) in limits
        .into_iter()
        .flat_map(|l| costs.clone().map(|c| (l, c)))
    {
        let named = Device {
            name: long.to_owned(),
            cost,
            ..device(limit_bytes, 3)
        };
        for ranks in 1..=16 {
            let devices = vec![named.clone(); ranks];
            let request = PlanRequest {
                context_tokens: 1_000_000,
                links: links(&vec![(1, 1); ranks - 1], (1, u64::MAX)),
                ..request(&shape, &devices, Strategy::Auto)
            };
            let made = plan(&request);
            let text = match &made {
                Ok(plan) => [
                    plan_table(plan),
                    memory_table(plan),
                    outlook(plan, &shape, 2_000_000),
                ]
                .concat(),
                Err(error) => format!("{error}\n"),
            };
            let text = text + &what_if_table(&[(ranks, made)]);
            for line in text.lines() {
                assert!(
                    line.chars().count() <= 80,
                    "{} columns: {line}",
                    line.chars().count()
                );
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_explained_with_what_would() {
    let shape = qwen3();
    let devices: Vec<Device> = minis(3)
        .into_iter()
        .map(|mini| Device {
            memory_limit_bytes: GIGABYTE,
            ..mini
        })
        .collect();
    let request = PlanRequest {
        context_tokens: 8192,
        sequences: 8,
        ..request(&shape, &devices, Strategy::Balanced)
    };
    let error = plan(&request).unwrap_err();
    let expected = "\
the model does not fit: 3 of 3 ranks over the memory limit
context 8192, sequences 8; MB = 1e6, GB = 1e9 bytes
`balanced` finds no cut that fits; the nearest one:

rank  host         layers     needs     limit     lacks
   0  mini1.local  0-8     5.644 GB  1.000 GB  4.644 GB
   1  mini2.local  9-18    5.904 GB  1.000 GB  4.904 GB
   2  mini3.local  19-27   5.644 GB  1.000 GB  4.644 GB

what would fit:
  - --context 455 at 8 sequences
  - 28 hosts like these instead of 3";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_strategy_that_cannot_fit_points_to_the_one_that_can() {
    let shape = ModelShape {
        kv_bytes_per_token_per_layer: 0,
        ..equal_layers(12, Head::Tied)
    };
    let devices = [
        device(620 + 200, 1),
        device(GIGABYTE, 1),
        device(GIGABYTE, 1),
    ];
    for strategy in [Strategy::Uniform, by_hand("0-3,4-7,8-11")] {
        let shortfall = shortfall(&request(&shape, &devices, strategy));
        assert!(shortfall.balanced_fits);
        assert!(
            shortfall
                .to_string()
                .contains("--strategy balanced fits on these hosts")
        );
        assert_eq!(shortfall.ranks[0].lack_bytes(), 200);
    }
    assert!(plan(&request(&shape, &devices, Strategy::Balanced)).is_ok());
}

#[test]
fn where_nothing_helps_the_error_says_so() {
    let shape = equal_layers(4, Head::Tied);
    let devices = [device(50, 1), device(50, 1)];
    let shortfall = shortfall(&request(&shape, &devices, Strategy::Auto));
    assert_eq!(
        (shortfall.max_sequences, shortfall.max_context_tokens),
        (None, None)
    );
    assert_eq!(
        (shortfall.host_count, shortfall.balanced_fits),
        (None, false)
    );
    assert!(
        shortfall.to_string().ends_with("do not help"),
        "{shortfall}"
    );
}

/// Small clusters of unequal hosts, some too tight, under a model of unequal layers.
fn small_case() -> impl PropStrategy<Value = (ModelShape, Vec<Device>, u64, u64)> {
    let head = prop_oneof![
        Just(Head::Tied),
        Just(Head::TiedOnce),
        (0_u64..60).prop_map(|bytes| Head::Own { bytes })
    ];
    let shape = (
        prop::collection::vec(1_u64..30, 1..=9),
        0_u64..60,
        0_u64..3,
        head,
        0_u64..3,
    );
    let shape = shape.prop_map(
        |(layer_bytes, embedding_bytes, norm_bytes, head, kv)| ModelShape {
            layer_bytes,
            embedding_bytes,
            norm_bytes,
            head,
            kv_bytes_per_token_per_layer: kv,
            hidden_row_bytes: 40,
            layer_weights: 9,
        },
    );
    let cost = (1_u64..90, 1_u64..20, 0_u64..200, 0_u64..50, 1000_u64..3000);
    let cost = cost.prop_map(
        |(layer_ns, layer_bytes, head_ns, step_ns, crowding_per_mille)| DeviceCost {
            layer_bytes,
            head_ns,
            step_ns,
            crowding_per_mille,
            ..timed(layer_ns)
        },
    );
    let one = (20_u64..200, 1_u64..6, cost);
    // In one case in three no costs are known, in another those of the first device only.
    let devices = (prop::collection::vec(one, 1..=4), 0..3);
    let devices = devices.prop_map(|(devices, known): (Vec<(u64, u64, DeviceCost)>, i32)| {
        let known = |rank: usize| known == 2 || (known == 1 && rank == 0);
        let host = |(rank, (limit_bytes, speed, cost))| Device {
            cost: known(rank).then_some(cost),
            ..device(limit_bytes, speed)
        };
        devices.into_iter().enumerate().map(host).collect()
    });
    (shape, devices, 0_u64..4, 0_u64..4).prop_filter(
        "ranks <= layers",
        |(shape, devices, ..): &(_, Vec<Device>, _, _)| {
            let shape: &ModelShape = shape;
            devices.len() <= shape.layer_count()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn balanced_equals_brute_force((shape, devices, context_tokens, sequences) in small_case()) {
        let request = PlanRequest {
            context_tokens,
            sequences,
            ..request(&shape, &devices, Strategy::Balanced)
        };
        match (plan(&request), balanced_by_brute_force(&request)) {
            (Ok(plan), Some(best)) => {
                let cut: Vec<_> = plan.stages.iter().map(|stage| stage.layers.clone()).collect();
                prop_assert_eq!(cut, best);
            }
            (Err(PlanError::DoesNotFit(_)), None) => {}
            (plan, best) => prop_assert!(false, "{plan:?} against {best:?}"),
        }
    }

    #[test]
    fn no_rank_is_over_its_limit_and_no_fitting_cut_is_missed(
        (shape, devices, context_tokens, sequences) in small_case(),
        strategy in prop::sample::select(&Strategy::NAMED[..]),
    ) {
        let request = PlanRequest {
            context_tokens,
            sequences,
            ..request(&shape, &devices, strategy.clone())
        };
        let even = |cut: &Vec<Range<usize>>| {
            let lengths = cut.iter().map(|layers| layers.len());
            lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1
        };
        let mut fitting = cuts_that_fit(&request);
        fitting.retain(|cut| strategy != Strategy::Uniform || even(cut));
        match plan(&request) {
            Ok(plan) => {
                assert_sound(&plan, &request);
                prop_assert!(fitting.contains(
                    &plan.stages.iter().map(|stage| stage.layers.clone()).collect()
                ));
            }
            Err(error) => {
                prop_assert!(matches!(error, PlanError::DoesNotFit(_)), "{error:?}");
                prop_assert!(fitting.is_empty(), "{error} although {fitting:?}");
            }
        }
    }

    #[test]
    fn what_would_fit_does_and_one_more_does_not(
        (shape, devices, context_tokens, sequences) in small_case(),
        strategy in prop::sample::select(&Strategy::NAMED[..]),
    ) {
        let request = PlanRequest {
            context_tokens: context_tokens * 9,
            sequences: sequences * 9,
            ..request(&shape, &devices, strategy)
        };
        if let Err(PlanError::DoesNotFit(shortfall)) = plan(&request) {
            prop_assert!(shortfall.ranks.iter().any(|rank| rank.lack_bytes() > 0));
            let sequences = |sequences| plan(&PlanRequest { sequences, ..request.clone() }).is_ok();
            let context = |context_tokens| {
                plan(&PlanRequest { context_tokens, ..request.clone() }).is_ok()
            };
            let most = shortfall.max_sequences.unwrap_or(0);
            prop_assert!(most == 0 || sequences(most));
            prop_assert!(most == request.sequences || !sequences(most + 1));
            let most = shortfall.max_context_tokens.unwrap_or(0);
            prop_assert!(most == 0 || context(most));
            prop_assert!(most == request.context_tokens || !context(most + 1));
            let hosts = |hosts: usize| {
                let devices: Vec<_> = devices.iter().cycle().take(hosts).cloned().collect();
                plan(&PlanRequest { devices: &devices, ..request.clone() }).is_ok()
            };
            let enough = shortfall.host_count.unwrap_or(shape.layer_count() + 1);
            prop_assert!((devices.len()..enough).all(|fewer| !hosts(fewer)));
            prop_assert!(shortfall.host_count.is_none_or(hosts));
        }
    }
}
