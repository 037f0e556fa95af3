//! The cluster file against good, bad and odd ones, and the devices that ranks are given.

use std::fs;
use std::path::Path;

use super::file::{LOCAL_LINK, MAX_FILE_BYTES};
use super::*;
use crate::plan::LinkCost;

const GIGABYTE: u64 = 1_000_000_000;

fn parse(text: &str) -> Result<ClusterFile, ClusterError> {
    ClusterFile::parse(Path::new("cluster.json"), text)
}

/// A file with one device a name, `memory_gb` 10, 20, 30 and so on.
fn file_of(hosts: &[&str]) -> ClusterFile {
    let device = |(i, host): (usize, &&str)| {
        serde_json::json!({"hostname": host,
                           "capabilities": {"memory_gb": 10 * (i + 1), "gpu_cores": i + 1}})
    };
    let devices: Vec<_> = hosts.iter().enumerate().map(device).collect();
    parse(&serde_json::json!({ "devices": devices }).to_string()).unwrap()
}

fn probed(hostname: &str) -> DeviceProfile {
    DeviceProfile {
        device_id: hostname.to_owned(),
        hostname: hostname.to_owned(),
        memory_bytes: 64 * GIGABYTE,
        cores: 8,
        max_model_bytes: None,
        rates: None,
    }
}

fn all_probed(hostnames: &[&str]) -> Vec<DeviceProfile> {
    hostnames.iter().map(|hostname| probed(hostname)).collect()
}

/// `(memory in GB, sharers)` of each rank.
fn shares(ranks: &[RankDevice]) -> Vec<(u64, usize)> {
    let share = |rank: &RankDevice| (rank.profile.memory_bytes / GIGABYTE, rank.sharers.get());
    ranks.iter().map(share).collect()
}

#[test]
fn the_example_cluster_of_three_minis_is_understood() {
    let file = parse(include_str!("../../hostfiles/minis.json")).unwrap();
    assert_eq!(
        file.model_name.as_deref(),
        Some("mlx-community/Qwen3-1.7B-8bit")
    );
    assert_eq!(file.model_parallel_size.map(NonZeroUsize::get), Some(3));
    let ranks = describe(Some(&file), None, &probed("laptop")).unwrap();
    let device = ranks[2].plan_device(None);
    assert_eq!((ranks.len(), device.name.as_str()), (3, "mini3.local"));
    assert_eq!(device.memory_limit_bytes, 12 * GIGABYTE);
    assert_eq!(device.speed, 10 * SPEED_OF_A_CORE);
}

#[test]
fn the_example_hostfile_and_cluster_file_name_the_same_hosts() {
    let hosts = include_str!("../../hostfiles/minis")
        .lines()
        .filter(|l| !l.starts_with('#'));
    let hosts: Vec<&str> = hosts
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let file = parse(include_str!("../../hostfiles/minis.json")).unwrap();
    assert_eq!(
        shares(&assign(Some(&file), &all_probed(&hosts)).unwrap()),
        [(16, 1); 3]
    );
}

#[test]
fn every_part_of_the_file_is_optional_and_unknown_parts_are_ignored() {
    for text in [
        "{}",
        r#"{"devices": []}"#,
        r#"{"devices": null, "model_name": null}"#,
        r#"{"shards": [1], "devices": [{"hostname": "a", "platform": {"os": "macOS"}}]}"#,
        r#"{"devices": [{"device_id": "a", "capabilities": {"tflops": 3.5}}]}"#,
    ] {
        let file = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(
            shares(&assign(Some(&file), &[probed("a")]).unwrap()),
            [(64, 1)]
        );
    }
}

#[test]
fn wrong_values_name_file_field_and_line() {
    let capability = |field: &str| {
        format!("{{\"devices\": [{{\"hostname\": \"a\",\n\"capabilities\": {{\n{field}}}}}]}}")
    };
    for (text, field) in [
        (
            capability("\"memory_gb\": -1"),
            "devices[0].capabilities.memory_gb",
        ),
        (
            capability("\"memory_gb\": 0"),
            "devices[0].capabilities.memory_gb",
        ),
        (
            capability("\"memory_gb\": 1e300"),
            "devices[0].capabilities.memory_gb",
        ),
        (
            capability("\"memory_gb\": 1e999"),
            "devices[0].capabilities.memory_gb",
        ),
        (
            capability("\"memory_gb\": NaN"),
            "devices[0].capabilities.memory_gb",
        ),
        (
            capability("\"memory_gb\": \"16\""),
            "devices[0].capabilities.memory_gb",
        ),
        (
            capability("\"gpu_cores\": 0"),
            "devices[0].capabilities.gpu_cores",
        ),
        (
            capability("\"gpu_cores\": -4"),
            "devices[0].capabilities.gpu_cores",
        ),
        (
            capability("\"gpu_cores\": 2.5"),
            "devices[0].capabilities.gpu_cores",
        ),
        (
            capability("\"max_recommended_model_size_gb\": -0.5"),
            "devices[0].capabilities.max_recommended_model_size_gb",
        ),
    ] {
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.contains("cluster.json"), "{error}");
        assert!(error.contains(&format!("`{field}`")), "{error}");
        assert!(error.contains("line 3"), "{error}");
    }
}

#[test]
fn malformed_files_are_errors_that_name_the_field() {
    for (text, field) in [
        ("", "."),
        ("[]", "."),
        ("{} {}", "."),
        (r#"{"model_parallel_size": 0}"#, "model_parallel_size"),
        (r#"{"model_name": 3}"#, "model_name"),
        (r#"{"devices": {}}"#, "devices"),
        (r#"{"devices": [{}]}"#, "devices[0]"),
        (r#"{"devices": [{"hostname": " "}]}"#, "devices[0]"),
        (
            r#"{"devices": [{"hostname": "a"}, {"hostname": 1}]}"#,
            "devices[1].hostname",
        ),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(
            error.contains(&format!("field `{field}`")),
            "{text}: {error}"
        );
        assert!(error.contains("line 1"), "{text}: {error}");
    }
}

#[test]
fn a_file_that_is_missing_or_too_large_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cluster.json");
    let error = ClusterFile::read(&path).unwrap_err();
    assert!(matches!(error, ClusterError::Read { .. }));
    let printed = format!("{:#}", anyhow::Error::from(error));
    assert_eq!(printed.matches("No such file").count(), 1, "{printed}");
    fs::write(&path, " ".repeat(MAX_FILE_BYTES as usize + 1)).unwrap();
    assert!(matches!(
        ClusterFile::read(&path),
        Err(ClusterError::TooLarge { .. })
    ));
    fs::write(&path, "{}").unwrap();
    assert!(ClusterFile::read(&path).unwrap().devices.is_empty());
}

#[test]
fn hosts_are_found_by_full_name_first_label_or_id_in_any_case() {
    let file = file_of(&["mini1.local", "mini2.local", "MINI3"]);
    let gathered = all_probed(&["Mini3.lan", "mini1", "mini2.LOCAL"]);
    let ranks = assign(Some(&file), &gathered).unwrap();
    assert_eq!(shares(&ranks), [(30, 1), (10, 1), (20, 1)]);
    assert_eq!(ranks[0].profile.hostname, "Mini3.lan");

    let file = parse(r#"{"devices": [{"device_id": "box", "hostname": "10.0.0.1"}]}"#).unwrap();
    let ranks = assign(Some(&file), &all_probed(&["box.lan"])).unwrap();
    assert_eq!(ranks[0].profile.device_id, "box");
}

#[test]
fn a_full_name_goes_before_a_first_label() {
    let file = file_of(&["node.east", "node.west"]);
    let ranks = assign(Some(&file), &all_probed(&["node.west", "node.east"])).unwrap();
    assert_eq!(shares(&ranks), [(20, 1), (10, 1)]);
}

#[test]
fn addresses_are_not_alike_because_they_begin_alike() {
    let error = assign(Some(&file_of(&["10.0.0.1"])), &all_probed(&["10.0.0.2"])).unwrap_err();
    assert!(matches!(error, ClusterError::UnknownHost { .. }));
}

#[test]
fn an_unknown_host_is_an_error_that_lists_the_known_ones() {
    let file = file_of(&["mini1.local", "mini2.local"]);
    let error = assign(Some(&file), &all_probed(&["mini1", "elsewhere"])).unwrap_err();
    let text = error.to_string();
    for part in [
        "`elsewhere` (rank 1)",
        "`mini1.local`, `mini2.local`",
        "cluster.json",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn ranks_on_one_host_share_its_memory_and_cores_evenly() {
    let ranks = assign(None, &all_probed(&["a", "b", "A"])).unwrap();
    assert_eq!(shares(&ranks), [(64, 2), (64, 1), (64, 2)]);
    let devices: Vec<Device> = ranks.iter().map(|rank| rank.plan_device(None)).collect();
    assert_eq!(
        devices[0].memory_limit_bytes * 2,
        devices[1].memory_limit_bytes
    );
    assert_eq!(devices[0].speed * 2, devices[1].speed);

    let ranks = assign(Some(&file_of(&["a", "b"])), &all_probed(&["a", "b", "a"])).unwrap();
    assert_eq!(shares(&ranks), [(10, 2), (20, 1), (10, 2)]);
}

#[test]
fn localhost_in_the_file_is_whatever_host_all_ranks_run_on() {
    for name in ["localhost", "127.0.0.1", "::1", "LOCALHOST"] {
        let file = file_of(&[name]);
        let here = all_probed(&["box"; 3]);
        assert_eq!(shares(&assign(Some(&file), &here).unwrap()), [(10, 3); 3]);
        let error = assign(Some(&file), &all_probed(&["box", "other"])).unwrap_err();
        assert!(matches!(error, ClusterError::UnknownHost { rank: 0, .. }));
    }
}

#[test]
fn several_devices_on_one_host_go_to_its_ranks_in_order() {
    let file = file_of(&["localhost", "127.0.0.1", "localhost"]);
    let ranks = assign(Some(&file), &all_probed(&["box"; 3])).unwrap();
    assert_eq!(shares(&ranks), [(10, 1), (20, 1), (30, 1)]);

    let error = assign(Some(&file), &all_probed(&["box"; 2])).unwrap_err();
    assert!(matches!(
        error,
        ClusterError::Ambiguous {
            devices: 3,
            ranks: 2,
            ..
        }
    ));

    let file = file_of(&["a", "b", "a"]);
    let ranks = assign(Some(&file), &all_probed(&["a", "a", "b"])).unwrap();
    assert_eq!(shares(&ranks), [(10, 1), (30, 1), (20, 1)]);
}

#[test]
fn another_number_of_ranks_than_the_file_is_meant_for_is_an_error() {
    let file = parse(r#"{"model_parallel_size": 3}"#).unwrap();
    let error = assign(Some(&file), &all_probed(&["a"; 2]))
        .unwrap_err()
        .to_string();
    assert!(error.contains("mpirun -np 3"), "{error}");
    assert!(error.contains("change model_parallel_size to 2"), "{error}");
    let error = describe(Some(&file), NonZeroUsize::new(4), &probed("a")).unwrap_err();
    assert!(matches!(
        error,
        ClusterError::ParallelSize {
            expected: 3,
            found: 4,
            ..
        }
    ));
}

#[test]
fn the_limit_is_a_share_of_the_recommended_size_or_four_fifths_unless_one_is_given() {
    let limit = |max_model_bytes, given, sharers| {
        let profile = DeviceProfile {
            max_model_bytes,
            ..probed("a")
        };
        let sharers = NonZeroUsize::new(sharers).unwrap();
        RankDevice {
            profile,
            sharers,
            entry: None,
        }
        .plan_device(given)
        .memory_limit_bytes
    };
    assert_eq!(limit(None, None, 1), 51_200_000_000);
    assert_eq!(limit(Some(12 * GIGABYTE), None, 1), 12 * GIGABYTE);
    assert_eq!(limit(Some(12 * GIGABYTE), None, 3), 4 * GIGABYTE);
    assert_eq!(
        limit(Some(12 * GIGABYTE), Some(9 * GIGABYTE), 3),
        9 * GIGABYTE
    );
    // More than the memory cannot be recommended.
    assert_eq!(limit(Some(99 * GIGABYTE), None, 1), 64 * GIGABYTE);
}

#[test]
fn plan_without_a_file_is_for_ranks_that_share_this_host() {
    let ranks = describe(None, NonZeroUsize::new(3), &probed("here")).unwrap();
    assert_eq!(shares(&ranks), [(64, 3); 3]);
    assert_eq!(
        shares(&describe(None, None, &probed("here")).unwrap()),
        [(64, 1)]
    );
    let file = parse(r#"{"model_parallel_size": 2}"#).unwrap();
    assert_eq!(
        shares(&describe(Some(&file), None, &probed("here")).unwrap()),
        [(64, 2); 2]
    );
}

#[test]
fn plan_takes_the_first_devices_of_the_file_and_no_more_than_there_are() {
    let file = file_of(&["a", "b", "c"]);
    let ranks = |ranks| describe(Some(&file), NonZeroUsize::new(ranks), &probed("here"));
    assert_eq!(shares(&ranks(2).unwrap()), [(10, 1), (20, 1)]);
    let error = ranks(4).unwrap_err();
    assert!(matches!(
        error,
        ClusterError::TooFewDevices {
            devices: 3,
            ranks: 4,
            ..
        }
    ));
}

#[test]
fn plan_fills_gaps_by_the_probe_for_this_host_only() {
    let file = parse(r#"{"devices": [{"hostname": "here.lan"}, {"hostname": "far"}]}"#).unwrap();
    let one = NonZeroUsize::new(1);
    assert_eq!(
        shares(&describe(Some(&file), one, &probed("here")).unwrap()),
        [(64, 1)]
    );
    let error = describe(Some(&file), None, &probed("here")).unwrap_err();
    assert!(matches!(error, ClusterError::NoMemory { index: 1, .. }));
    let file = parse(r#"{"devices": [{"hostname": "far", "capabilities": {"memory_gb": 8}}]}"#);
    let error = describe(Some(&file.unwrap()), None, &probed("here")).unwrap_err();
    assert!(matches!(error, ClusterError::NoCores { index: 0, .. }));
}

#[test]
fn a_profile_survives_the_way_to_other_ranks() {
    let profile = DeviceProfile {
        max_model_bytes: Some(u64::MAX),
        ..probed("høst\n\"")
    };
    let text = serde_json::to_string(&profile).unwrap();
    assert_eq!(
        serde_json::from_str::<DeviceProfile>(&text).unwrap(),
        profile
    );
}

#[test]
fn this_host_has_a_name_memory_and_cores() {
    let profile = probe_local().unwrap();
    assert!(!profile.hostname.is_empty());
    assert!(profile.memory_bytes > 1 << 20);
    assert!(profile.cores > 0);
}

#[cfg(target_os = "linux")]
#[test]
fn the_kernels_files_are_understood() {
    let text = "MemTotal:       16384 kB\nMemFree:  1 kB\n";
    assert_eq!(probe::total_bytes(text), Some(16 << 20));
    for text in [
        "",
        "MemTotal:",
        "MemTotal: 0 kB",
        "MemTotal: 99999999999999999999 kB",
    ] {
        assert_eq!(probe::total_bytes(text), None, "{text}");
    }
    assert_eq!(probe::online_cores("0-3,8\n"), Some(5));
    for text in ["", "3-0", "x", "0-18446744073709551615"] {
        assert_eq!(probe::online_cores(text), None, "{text}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn limits_of_a_control_group_and_of_those_above_it_count() {
    let files = |text| -> Vec<String> {
        let files = probe::limit_files(text).into_iter();
        files
            .map(|file| file.to_string_lossy().into_owned())
            .collect()
    };
    assert_eq!(
        files("0::/a.slice/b\n"),
        [
            "/sys/fs/cgroup/a.slice/b/memory.max",
            "/sys/fs/cgroup/a.slice/memory.max",
            "/sys/fs/cgroup/memory.max",
        ]
    );
    assert_eq!(files("0::/\n"), ["/sys/fs/cgroup/memory.max"]);
    assert_eq!(
        files("7:cpu,memory:/x\n3:pids:/y\nnonsense\n"),
        [
            "/sys/fs/cgroup/memory/x/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        ]
    );
}

/// Two devices with `capabilities`, and more of the file.
fn two_devices(first: &str, second: &str, rest: &str) -> Result<ClusterFile, ClusterError> {
    parse(&format!(
        r#"{{"devices": [{{"hostname": "a.lan", "device_id": "left", "capabilities": {{{first}}}}},
                        {{"hostname": "b.lan", "capabilities": {{{second}}}}}] {rest}}}"#
    ))
}

#[test]
fn stated_rates_are_whole_numbers_of_bytes_and_operations() {
    let both =
        r#""memory_gb": 16, "gpu_cores": 10, "memory_bandwidth_gb_s": 120, "compute_tflops": 4.3"#;
    let file = two_devices(both, both, "").unwrap();
    let ranks = describe(Some(&file), None, &probed("laptop")).unwrap();
    let expected = Rates {
        bandwidth_bytes_per_s: 120_000_000_000,
        flops_per_s: Some(4_300_000_000_000),
    };
    assert_eq!(ranks[1].profile.rates, Some(expected));
    let ranks = assign(Some(&file), &all_probed(&["a.lan", "b.lan"])).unwrap();
    assert_eq!(ranks[0].profile.rates, Some(expected));
    assert_eq!(
        assign(None, &all_probed(&["a"])).unwrap()[0].profile.rates,
        None
    );
}

#[test]
fn a_measure_of_speed_is_given_for_all_devices_or_none() {
    for field in ["gpu_cores", "memory_bandwidth_gb_s", "compute_tflops"] {
        let error = two_devices("", &format!(r#""{field}": 5"#), "").unwrap_err();
        assert!(
            matches!(&error, ClusterError::Mixed { field: found, with, without, .. }
                if *found == field && with == "b.lan" && without == "a.lan"),
            "{error}"
        );
    }
}

#[test]
fn rates_that_are_none_are_refused_with_their_place() {
    for value in ["0", "-1", "1e7", "\"120\""] {
        let error = two_devices(&format!(r#""memory_bandwidth_gb_s": {value}"#), "", "");
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("devices[0].capabilities.memory_bandwidth_gb_s"),
            "{text}"
        );
    }
    for link in [
        r#"{"latency_us": 150}"#,
        r#"{"latency_us": 150, "bandwidth_gbit_s": 0}"#,
        "5",
    ] {
        let error = two_devices("", "", &format!(r#", "link": {link}"#)).unwrap_err();
        assert!(
            matches!(&error, ClusterError::Malformed { field, .. } if field.starts_with("link")),
            "{error}"
        );
    }
}

#[test]
fn links_are_those_of_the_pair_in_either_direction_else_of_all() {
    let rest = r#", "link": {"latency_us": 150, "bandwidth_gbit_s": 1},
        "links": [{"from": "B.lan", "to": "left", "latency_us": 20.5, "bandwidth_gbit_s": 40}]"#;
    let file = two_devices("", "", rest).unwrap();
    let special = LinkCost {
        latency_ns: 20_500,
        bytes_per_s: 5_000_000_000,
    };
    let links_of = |file: &ClusterFile, hosts: &[&str]| {
        let ranks = assign(Some(file), &all_probed(hosts)).unwrap();
        file.links(&ranks)
    };
    let links = links_of(&file, &["a.lan", "b.lan"]).unwrap();
    assert_eq!((links.forward, links.back), (vec![special], special));
    // Ranks of one host do not use the network.
    let links = links_of(&file, &["a.lan", "a.lan", "b.lan"]).unwrap();
    assert_eq!(links.forward, [LOCAL_LINK, special]);
    let plain = two_devices(
        "",
        "",
        r#", "link": {"latency_us": 150, "bandwidth_gbit_s": 1}"#,
    );
    let links = links_of(&plain.unwrap(), &["a.lan", "b.lan"]).unwrap();
    let expected = LinkCost {
        latency_ns: 150_000,
        bytes_per_s: 125_000_000,
    };
    assert_eq!((links.forward, links.back), (vec![expected], expected));
    assert_eq!(
        links_of(&two_devices("", "", "").unwrap(), &["a.lan", "b.lan"]),
        None
    );
}

#[test]
fn a_link_to_a_device_that_is_not_there_is_an_error() {
    let rest =
        r#", "links": [{"from": "left", "to": "c", "latency_us": 1, "bandwidth_gbit_s": 1}]"#;
    let error = two_devices("", "", rest).unwrap_err();
    assert!(
        matches!(&error, ClusterError::UnknownLinkEnd { index: 0, end: "to", name, .. } if name == "c"),
        "{error}"
    );
}

#[test]
fn ranks_left_out_leave_their_share_of_a_device_to_the_others() {
    let ranks = assign(None, &all_probed(&["a", "a", "b", "a"])).unwrap();
    let sharers = |kept: &[usize]| {
        let part = part_of(&ranks, kept);
        part.iter()
            .map(|rank| rank.sharers.get())
            .collect::<Vec<_>>()
    };
    assert_eq!(sharers(&[0, 1, 2, 3]), [3, 3, 1, 3]);
    assert_eq!(sharers(&[0, 2, 3]), [2, 1, 2]);
    assert_eq!(sharers(&[1, 2]), [1, 1]);
    let hosts = ranks_by_host(&ranks);
    assert_eq!(hosts, [("a", vec![0, 1, 3]), ("b", vec![2])]);
}
