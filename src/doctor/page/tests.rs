//! What the page says of hosts and links that are in a bad way.

use super::*;
use crate::calibrate::Link;
use crate::cluster::DeviceProfile;
use crate::doctor::{Model, grown_most};
use std::net::IpAddr;

fn healthy(host: &str) -> Facts {
    Facts {
        host: host.to_owned(),
        version: "1 (protocol 1)".to_owned(),
        mpi: "Open MPI v5".to_owned(),
        threading: "Funneled".to_owned(),
        device: Ok("cpu".to_owned()),
        profile: Ok(DeviceProfile {
            device_id: host.to_owned(),
            hostname: host.to_owned(),
            memory_bytes: 16_000_000_000,
            cores: 8,
            max_model_bytes: None,
            rates: None,
        }),
        available_bytes: Some(12_000_000_000),
        usable_cores: 8,
        options: vec![("--context".to_owned(), "not given".to_owned())],
        interfaces: vec![("en0".to_owned(), IpAddr::from([192, 168, 7, 1]))],
        model: Ok(Model {
            config_hash: "c0ffee00".repeat(8),
            tensor_hash: "0123abcd".repeat(8),
        }),
    }
}

fn hosts() -> Vec<Facts> {
    ["mini1", "mini2", "mini3"].map(healthy).to_vec()
}

fn wired() -> Result<Measured, String> {
    Ok(Measured {
        link: Link {
            latency_ns: 350_000,
            eager_latency_ns: 150_000,
            bytes_per_s: 117_000_000,
            long_bytes: 51_000_000,
        },
        over: Some("en0".to_owned()),
    })
}

/// The problems that the page of these hosts and links tells, a line each, and the page itself.
fn told(
    all: &[Facts],
    links: &[Examined],
    plan: Option<&Result<Plan, NoPlan>>,
) -> (Vec<String>, String) {
    let page = Page {
        all,
        links,
        plan,
        weights_from: None,
    };
    let problems = page.problems();
    let text = page.print(&problems);
    let lines = problems
        .iter()
        .map(|problem| format!("{} -> {}", problem.what, problem.remedy));
    (lines.collect(), text)
}

#[test]
fn healthy_hosts_have_no_problem_and_the_page_fits_a_terminal() {
    let links = vec![(0, 1, wired()), (1, 2, wired()), (2, 0, wired())];
    let (problems, page) = told(&hosts(), &links, None);
    assert_eq!(problems, Vec::<String>::new());
    assert!(
        page.ends_with("nothing stands in the way of a run\n"),
        "{page}"
    );
    let longest = page.lines().map(|line| line.chars().count()).max();
    assert!(longest <= Some(80), "{page}");
}

/// Changes one of three healthy hosts; the one problem that then is told.
fn one_problem(change: impl Fn(&mut Facts)) -> String {
    let mut all = hosts();
    change(&mut all[1]);
    let (problems, _) = told(&all, &[], None);
    assert_eq!(problems.len(), 1, "{problems:?}");
    problems[0].clone()
}

#[test]
fn each_difference_between_hosts_is_named_with_both_and_a_remedy() {
    assert_eq!(
        one_problem(|facts| facts.version = "2 (protocol 1)".into()),
        "rank 1 (mini2) has mlx-pipe 2 (protocol 1), rank 0 (mini1) has 1 (protocol 1) -> build the same \
         commit on every host"
    );
    assert!(
        one_problem(|facts| facts.mpi = "Open MPI v4".into()).contains("same release of Open MPI")
    );
    let other_model = one_problem(|facts| {
        if let Ok(model) = &mut facts.model {
            model.tensor_hash = "beefbeef".repeat(8);
        }
    });
    assert!(
        other_model.contains("beefbeef and 0123abcd"),
        "{other_model}"
    );
}

#[test]
fn what_one_host_lacks_is_told_with_what_to_do() {
    let missing = one_problem(|facts| facts.model = Err(NoModel::Missing("no directory".into())));
    assert!(missing.contains("--weights-from 0"), "{missing}");
    let damaged = one_problem(|facts| facts.model = Err(NoModel::Unusable("cut short".into())));
    assert!(damaged.contains("download or convert"), "{damaged}");
    let options = one_problem(|facts| facts.options[0].1 = "512".into());
    assert!(
        options.contains("rank 1 (mini2) --context 512"),
        "{options}"
    );
    let bound = one_problem(|facts| facts.usable_cores = 1);
    assert!(
        bound.contains("1 of the host's 8 cores") && bound.contains("--bind-to none"),
        "{bound}"
    );
    let device = one_problem(|facts| facts.device = Err("no GPU here".into()));
    assert!(device.contains("no GPU here"), "{device}");
}

#[test]
fn slow_and_broken_links_between_hosts_are_problems_and_those_inside_a_host_are_not() {
    let slow = |latency_ns: u64, bytes_per_s: u64| {
        wired().map(|measured| Measured {
            link: Link {
                eager_latency_ns: latency_ns,
                bytes_per_s,
                ..measured.link
            },
            ..measured
        })
    };
    let links = vec![
        (0, 1, slow(9_000_000, 117_000_000)),
        (1, 2, slow(150_000, 3_000_000)),
        (2, 0, Err("waited 60 s for rank 0".to_owned())),
    ];
    let (problems, page) = told(&hosts(), &links, None);
    assert_eq!(problems.len(), 3, "{problems:?}");
    assert!(
        problems[0].contains("from rank 0 (mini1) to rank 1 (mini2)"),
        "{problems:?}"
    );
    assert!(
        problems[0].contains("9.0 ms") && problems[1].contains("3 MB/s"),
        "{problems:?}"
    );
    assert!(
        problems[2].contains("waited 60 s") && problems[2].contains("firewall"),
        "{problems:?}"
    );
    assert!(page.contains("failed"), "{page}");

    let one_host = ["mini1"; 3].map(healthy);
    let (problems, _) = told(&one_host, &[(0, 1, slow(9_000_000, 1))], None);
    assert_eq!(problems, Vec::<String>::new());
}

#[test]
fn a_plan_that_cannot_be_made_is_a_problem() {
    let plan = Err(NoPlan {
        does_not_fit: true,
        why: "the model does not fit".to_owned(),
    });
    let (problems, _) = told(&hosts(), &[], Some(&plan));
    assert!(
        problems[0].starts_with("the model does not fit"),
        "{problems:?}"
    );
}

#[test]
fn the_interface_that_carried_the_messages_is_the_one_whose_counter_grew_by_them() {
    let counters =
        |en0: u64, en1: u64| BTreeMap::from([("en0".to_owned(), en0), ("en1".to_owned(), en1)]);
    let before = counters(1000, 1000);
    let carrier = |after, sent| grown_most(&before, &after, sent);
    assert_eq!(carrier(counters(1500, 9000), 5000).as_deref(), Some("en1"));
    assert_eq!(
        carrier(counters(1500, 2000), 5000).as_deref(),
        Some("shared memory")
    );
    assert_eq!(carrier(BTreeMap::new(), 5000), None);
}

#[test]
fn ranks_with_the_same_trouble_are_told_together_and_not_where_another_helps() {
    let mut all = hosts();
    for facts in &mut all[1..] {
        facts.model = Err(NoModel::Missing("no directory".to_owned()));
    }
    let (problems, _) = told(&all, &[], None);
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0].starts_with("ranks 1, 2 (mini2, mini3): no directory"),
        "{problems:?}"
    );
    let page = Page {
        all: &all,
        links: &[],
        plan: None,
        weights_from: Some(0),
    };
    assert_eq!(page.problems(), Vec::new());
}
