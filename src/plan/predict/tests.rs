//! Predictions against numbers worked out by hand, and what must hold of all of them.

use proptest::prelude::{ProptestConfig, any, prop, prop_assert, proptest};

use super::super::*;

/// Four layers of 100 bytes, a row of 40 bytes, a table of 620.
fn model(head: Head) -> ModelShape {
    ModelShape {
        layer_bytes: vec![100; 4],
        embedding_bytes: 620,
        norm_bytes: 0,
        head,
        kv_bytes_per_token_per_layer: 1,
        hidden_row_bytes: 40,
        layer_weights: 400,
    }
}

/// 100 ns a layer for one token, 400 for eight; 1 ns for each cached token.
fn cost() -> DeviceCost {
    let point = |(tokens, ns)| StepCost { tokens, ns };
    DeviceCost {
        layer: [(1, 100), (8, 400)].map(point).to_vec(),
        layer_bytes: 100,
        context_ns: 1024,
        head_ns: 1000,
        step_ns: 10,
        crowding_per_mille: 1000,
    }
}

fn device(cost: DeviceCost) -> Device {
    Device {
        name: "host".to_owned(),
        memory_limit_bytes: 1_000_000,
        speed: 1,
        cost: Some(cost),
    }
}

/// A byte a nanosecond; 500 ns forward, 700 back.
fn links(ranks: usize) -> LinkCosts {
    let link = |latency_ns| LinkCost {
        latency_ns,
        bytes_per_s: 1_000_000_000,
    };
    LinkCosts {
        forward: vec![link(500); ranks - 1],
        back: link(700),
    }
}

fn request<'a>(shape: &'a ModelShape, devices: &'a [Device], layers: &str) -> PlanRequest<'a> {
    PlanRequest {
        shape,
        devices,
        strategy: Strategy::Manual(layers.parse().unwrap()),
        context_tokens: 1000,
        sequences: 1,
        wire_dtype: WireDtype::F32,
        links: Some(links(devices.len())),
        cost_source: TimeSource::Measured,
    }
}

/// Two ranks with two layers each.
fn halves(head: Head, cost: DeviceCost) -> Plan {
    let devices = vec![device(cost); 2];
    plan(&request(&model(head), &devices, "0-1,2-3")).unwrap()
}

#[test]
fn a_decode_step_is_layers_context_head_and_every_link() {
    let plan = halves(Head::Tied, cost());
    let predictor = plan.predictor().unwrap();
    // Each rank 2 * (100 + 100) + 10, the head 1000; forward 500 + 40 + 64, back 700 + 16.
    assert_eq!(predictor.decode_ns(100), 2 * 410 + 1000 + 604 + 716);
    let once = halves(Head::TiedOnce, cost());
    // The row travels back with the token.
    assert_eq!(once.predictor().unwrap().decode_ns(100), 3140 + 40);
}

#[test]
fn one_rank_has_no_links() {
    let shape = model(Head::TiedOnce);
    let devices = [device(cost())];
    let request = PlanRequest {
        links: None,
        ..request(&shape, &devices, "0-3")
    };
    let plan = plan(&request).unwrap();
    let predictor = plan.predictor().unwrap();
    assert_eq!(predictor.decode_ns(100), 4 * 200 + 10 + 1000);
    assert_eq!(predictor.first_token_ns(8, 512), 4 * 400 + 10 + 1000);
}

#[test]
fn chunks_of_a_prompt_overlap() {
    let plan = halves(Head::Tied, cost());
    // Chunks of 8, 8 and 4 tokens take 810, 938 and 594 ns, and 884, 884 and 724 on the way.
    // Rank 0 is done at 810, 1748 and 2342; rank 1 at 1694 + 810, 2632 + 938, 3570 + 594 + head.
    let predictor = plan.predictor().unwrap();
    assert_eq!(predictor.first_token_ns(20, 8), 5164 + 716);
}

#[test]
fn a_prompts_rows_are_asked_for_first_where_the_last_rank_has_the_table() {
    let plan = halves(Head::TiedOnce, cost());
    // Those of the first chunk; the others come while it is computed.
    let (question_ns, rows_ns) = (700 + 8 * 4 + 64, 700 + 8 * 40 + 64);
    let predictor = plan.predictor().unwrap();
    assert_eq!(
        predictor.first_token_ns(20, 8),
        question_ns + rows_ns + 5164 + 716 + 40
    );
}

#[test]
fn ranks_of_one_host_are_slower_only_while_several_chunks_are_under_way() {
    let crowded = DeviceCost {
        crowding_per_mille: 2000,
        ..cost()
    };
    let plan = halves(Head::Tied, crowded);
    let predictor = plan.predictor().unwrap();
    // Only the first chunk on rank 0 and the last on rank 1 have the host to themselves.
    // Rank 0: 810, + 1876, + 1188; rank 1: 1694 + 1620, 3570 + 1876, 5446 + 1594.
    assert_eq!(predictor.first_token_ns(20, 8), 7040 + 716);
    let alone = halves(Head::Tied, cost());
    let alone = alone.predictor().unwrap();
    assert_eq!(predictor.first_token_ns(8, 8), alone.first_token_ns(8, 8));
    assert_eq!(predictor.decode_ns(5), alone.decode_ns(5));
    assert_eq!(plan.slowest().unwrap().ns(), Some(2 * 1210));
}

#[test]
fn figures_are_those_of_the_steps() {
    let plan = halves(Head::Tied, cost());
    let figures = plan.predict(20, 8).unwrap();
    let near = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-12);
    near(figures.time_to_first_token_s, 5880e-9);
    near(figures.prefill_tokens_per_s, 20.0 / 5880e-9);
    // At 20 tokens of context a rank takes 250, and 1000 more with the head.
    near(figures.decode_tokens_per_s, 1e9 / 2820.0);
    near(figures.idle_share_one, 1.0 - 1500.0 / (2.0 * 2820.0));
    near(figures.pipeline_tokens_per_s, 1e9 / 1210.0);
    near(figures.idle_share_full, 1.0 - (210.0 + 1210.0) / 2420.0);
}

#[test]
fn a_run_is_predicted_request_by_request() {
    let plan = halves(Head::Tied, cost());
    let times = plan.predict_run(&[(20, 0), (20, 1), (20, 3)], 8).unwrap();
    assert!(times.iter().all(|times| times.first_token_s == 5880e-9));
    let decode_s: Vec<f64> = times.iter().map(|times| times.decode_s).collect();
    assert_eq!(decode_s, [0.0, 0.0, 5644e-9]);
}

#[test]
fn without_costs_or_links_nothing_is_predicted() {
    let shape = model(Head::Tied);
    let mut devices = [device(cost()), device(cost())];
    let no_links = PlanRequest {
        links: None,
        ..request(&shape, &devices, "0-1,2-3")
    };
    let no_links = plan(&no_links).unwrap();
    assert!(no_links.predict(20, 8).is_none());
    assert_eq!(no_links.slowest().unwrap().ns(), Some(1210));
    devices[1].cost = None;
    let half_known = plan(&request(&shape, &devices, "0-1,2-3")).unwrap();
    assert!(half_known.predict(20, 8).is_none());
    assert_eq!(half_known.times, TimeSource::Relative);
    assert_eq!(half_known.slowest().unwrap().ns(), None);
}

#[test]
fn a_layers_time_is_a_line_through_its_points() {
    let of = |points: &[(u64, u64)], tokens| {
        let point = |(tokens, ns): &(u64, u64)| StepCost {
            tokens: *tokens,
            ns: *ns,
        };
        DeviceCost {
            layer: points.iter().map(point).collect(),
            ..cost()
        }
        .layer_ns(tokens)
    };
    assert_eq!(of(&[(1, 100)], 5), 500);
    let points = [(1, 100), (8, 400), (64, 2640)];
    assert_eq!(
        [1, 4, 8, 9, 64, 65].map(|tokens| of(&points, tokens)),
        [100, 228, 400, 440, 2640, 2680]
    );
    // Measured noise: two tokens cannot be faster than one.
    let noisy = [(1, 100), (2, 50), (4, 200)];
    assert_eq!(
        [1, 2, 3, 4, 8].map(|tokens| of(&noisy, tokens)),
        [100, 100, 150, 200, 400]
    );
    assert_eq!(of(&[(1, u64::MAX)], u64::MAX), u64::MAX);
}

#[test]
fn costs_that_make_no_sense_are_refused_by_rank() {
    type Change = fn(&mut DeviceCost);
    let wrong: [(Change, &str); 5] = [
        (|cost| cost.layer.clear(), "one token at least"),
        (
            |cost| cost.layer[0].tokens = 2,
            "expected that as the first",
        ),
        (|cost| cost.layer[1].tokens = 1, "do not ascend"),
        (|cost| cost.layer_bytes = 0, "0 bytes"),
        (|cost| cost.crowding_per_mille = 999, "less time"),
    ];
    let shape = model(Head::Tied);
    for (change, text) in wrong {
        let mut devices = [device(cost()), device(cost())];
        change(devices[1].cost.as_mut().unwrap());
        let error = plan(&request(&shape, &devices, "0-1,2-3"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("rank 1 (host): ") && error.contains(text),
            "{error}"
        );
    }
    let devices = [device(cost()), device(cost())];
    let request = PlanRequest {
        links: Some(links(3)),
        ..request(&shape, &devices, "0-1,2-3")
    };
    let error = plan(&request).unwrap_err().to_string();
    assert!(
        error.contains("times of 2 links for 2 ranks; expected 1"),
        "{error}"
    );
}

#[test]
fn costs_of_some_ranks_bridge_those_left_out_by_the_slowest_link() {
    let link = |latency_ns, bytes_per_s| LinkCost {
        latency_ns,
        bytes_per_s,
    };
    let numbered = |head_ns| DeviceCost { head_ns, ..cost() };
    let costs = Costs {
        devices: (0..4).map(numbered).collect(),
        links: Some(LinkCosts {
            forward: vec![link(1, 30), link(5, 20), link(3, 10)],
            back: link(2, 25),
        }),
    };
    let all = costs.of_ranks(&[0, 1, 2, 3]).unwrap();
    assert_eq!(all, costs);
    let middle_out = costs.of_ranks(&[0, 2, 3]).unwrap();
    assert_eq!(middle_out.devices, [numbered(0), numbered(2), numbered(3)]);
    let links = middle_out.links.unwrap();
    assert_eq!(
        (links.forward, links.back),
        (vec![link(5, 20), link(3, 10)], link(2, 25))
    );
    let inner = costs.of_ranks(&[1, 2]).unwrap().links.unwrap();
    assert_eq!(
        (inner.forward, inner.back),
        (vec![link(5, 20)], link(3, 10))
    );
    assert!(costs.of_ranks(&[3, 4]).is_none());
    assert!(costs.of_ranks(&[]).is_none());
}

#[test]
fn a_tied_table_is_held_twice_only_where_that_is_known_to_be_clearly_faster() {
    let shape = model(Head::TiedOnce);
    let fast = vec![device(cost()); 2];
    let lookup = |request: &PlanRequest<'_>| plan_choosing_table(request).unwrap().lookup;
    // 40 bytes of 3180 ns are too few, and so is the question among slow layers.
    let slow_layers = DeviceCost {
        layer: vec![StepCost {
            tokens: 1,
            ns: 1_000_000,
        }],
        ..cost()
    };
    let slow = vec![device(slow_layers); 2];
    assert_eq!(lookup(&request(&shape, &slow, "0-1,2-3")), Lookup::OnLast);
    // The prompt's rows take longer than its layers.
    assert_eq!(lookup(&request(&shape, &fast, "0-1,2-3")), Lookup::OnFirst);
    let unknown = PlanRequest {
        links: None,
        ..request(&shape, &fast, "0-1,2-3")
    };
    assert_eq!(lookup(&unknown), Lookup::OnLast);
    // The first rank has room for its layers and their cache, not for the table too.
    let mut tight = fast.clone();
    tight[0].memory_limit_bytes = 200 + 2000 + 619;
    assert_eq!(lookup(&request(&shape, &tight, "0-1,2-3")), Lookup::OnLast);
    tight[0].memory_limit_bytes += 1;
    assert_eq!(lookup(&request(&shape, &tight, "0-1,2-3")), Lookup::OnFirst);
    let own = model(Head::Own { bytes: 5 });
    assert_eq!(lookup(&request(&own, &fast, "0-1,2-3")), Lookup::OnFirst);
}

#[test]
fn a_host_that_slows_the_others_down_is_found() {
    let shape = model(Head::Tied);
    let slow = DeviceCost {
        layer: vec![StepCost {
            tokens: 1,
            ns: 5000,
        }],
        ..cost()
    };
    let three = [device(cost()), device(slow), device(cost())];
    let all = plan(&request(&shape, &three, "0-1,2,3")).unwrap();
    let two = [device(cost()), device(cost())];
    let fewer = plan(&request(&shape, &two, "0-1,2-3")).unwrap();
    let gain = gain_of_fewer(&all, &fewer).unwrap();
    // 5010 ns against 1210 for the slowest.
    assert_eq!(gain.pipeline_per_mille, 4140);
    // At 512 tokens of context: 2458 + 5522 + 1622 + two links forward, against 4468 and one.
    let (now, then) = (all.predictor().unwrap(), fewer.predictor().unwrap());
    let expected = now.decode_ns(512) * 1000 / then.decode_ns(512);
    assert_eq!(gain.one_stream_per_mille, Some(expected));
    assert_eq!(gain_of_fewer(&fewer, &all), None);
    let text = without_line(&["mini2.local"], gain, &fewer);
    assert!(
        text.starts_with("without mini2.local: one stream "),
        "{text}"
    );
    assert!(
        text.ends_with("full pipeline 4.14 x\n  --layers 0-1,2-3\n"),
        "{text}"
    );
}

#[test]
fn an_estimate_is_the_slower_of_reading_and_computing() {
    // 100 layers of 80 MB and 100 million weights, at 80 GB/s and 1 TFLOPS effective.
    let shape = ModelShape {
        layer_bytes: vec![80_000_000; 100],
        embedding_bytes: 160_000_000,
        norm_bytes: 0,
        head: Head::Tied,
        kv_bytes_per_token_per_layer: 4000,
        hidden_row_bytes: 40,
        layer_weights: 100 * 100_000_000,
    };
    let rates = Rates {
        bandwidth_bytes_per_s: 100_000_000_000,
        flops_per_s: Some(2_000_000_000_000),
    };
    let cost = rates.cost(&shape, 1);
    let points: Vec<(u64, u64)> = cost
        .layer
        .iter()
        .map(|point| (point.tokens, point.ns))
        .collect();
    assert_eq!(
        points,
        [
            (1, 1_000_000),
            (8, 1_600_000),
            (64, 12_800_000),
            (512, 102_400_000)
        ]
    );
    assert_eq!((cost.layer_bytes, cost.head_ns), (80_000_000, 2_000_000));
    assert_eq!((cost.context_ns, cost.crowding_per_mille), (51_200, 1000));
    let unknown = Rates {
        flops_per_s: None,
        ..rates
    };
    assert_eq!(unknown.cost(&shape, 3).layer.len(), 1);
    assert_eq!(unknown.cost(&shape, 3).crowding_per_mille, 3000);
}

/// Costs as they may be measured, noise included.
fn any_cost() -> impl proptest::strategy::Strategy<Value = DeviceCost> {
    use proptest::strategy::Strategy as _;
    let points = prop::collection::btree_map(2_u64..100, 0_u64..5000, 0..4);
    let rest = (
        1_u64..200,
        0_u64..2000,
        0_u64..500,
        0_u64..50,
        1000_u64..3000,
    );
    (0_u64..500, points, rest).prop_map(|(one_ns, points, rest)| {
        let (layer_bytes, context_ns, head_ns, step_ns, crowding_per_mille) = rest;
        let points = points
            .into_iter()
            .map(|(tokens, ns)| StepCost { tokens, ns });
        DeviceCost {
            layer: [StepCost {
                tokens: 1,
                ns: one_ns,
            }]
            .into_iter()
            .chain(points)
            .collect(),
            layer_bytes,
            context_ns,
            head_ns,
            step_ns,
            crowding_per_mille,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn more_work_is_never_predicted_to_be_faster(
        costs in prop::collection::vec(any_cost(), 1..=4),
        once in any::<bool>(),
        (prompt, chunk, longer) in (1_u64..60, 1_u64..20, 0_u64..60),
    ) {
        let head = if once { Head::TiedOnce } else { Head::Tied };
        let devices: Vec<Device> = costs.into_iter().map(device).collect();
        let of_layers = |layers: usize| {
            let shape = ModelShape { layer_bytes: vec![100; layers], ..model(head) };
            let ends = (0..devices.len()).map(|rank| match rank + 1 == devices.len() {
                true => rank..layers,
                false => rank..rank + 1,
            });
            let strategy = Strategy::Manual(LayerRanges(ends.collect()));
            plan(&PlanRequest { strategy, ..request(&shape, &devices, "0") }).unwrap()
        };
        let (small, large) = (of_layers(4), of_layers(5));
        let (few, many) = (small.predictor().unwrap(), large.predictor().unwrap());
        prop_assert!(few.decode_ns(prompt) <= many.decode_ns(prompt));
        prop_assert!(few.decode_ns(prompt) <= few.decode_ns(prompt + longer));
        prop_assert!(few.first_token_ns(prompt, chunk) <= many.first_token_ns(prompt, chunk));
        prop_assert!(
            few.first_token_ns(prompt, 1000) <= few.first_token_ns(prompt + longer, 1000)
        );
        prop_assert!(small.slowest() <= large.slowest());
        let figures = small.predict(prompt, chunk).unwrap();
        prop_assert!((0.0..=1.0).contains(&figures.idle_share_one));
        prop_assert!((0.0..1.0).contains(&figures.idle_share_full));
    }

    #[test]
    fn the_capacity_fits_and_one_more_does_not(
        limits in prop::collection::vec(1000_u64..4000, 1..=4),
        (context, sequences) in (1_u64..200, 1_u64..4),
    ) {
        let shape = model(Head::Tied);
        let limited = |limit_bytes: &u64| Device {
            memory_limit_bytes: *limit_bytes,
            ..device(cost())
        };
        let devices: Vec<Device> = limits.iter().map(limited).collect();
        let asked = PlanRequest {
            strategy: Strategy::Balanced,
            context_tokens: context,
            sequences,
            ..request(&shape, &devices, "0")
        };
        let Ok(planned) = plan(&asked) else { return Ok(()); };
        let (ours, best) = (planned.capacity(&shape, 500), planned.best_capacity(&shape, 500));
        prop_assert!(ours.context_tokens >= context && ours.sequences >= sequences);
        prop_assert!(best.context_tokens >= ours.context_tokens && best.sequences >= ours.sequences);
        let same_cut = Strategy::Manual(planned.layer_ranges());
        for (strategy, most) in [(same_cut, ours), (Strategy::Balanced, best)] {
            let fits = |context_tokens, sequences| {
                let strategy = strategy.clone();
                plan(&PlanRequest { strategy, context_tokens, sequences, ..asked.clone() }).is_ok()
            };
            prop_assert!(fits(most.context_tokens, 1) && fits(context, most.sequences));
            prop_assert!(most.context_tokens == 500 || !fits(most.context_tokens + 1, 1));
            prop_assert!(!fits(context, most.sequences + 1));
        }
    }
}
