//! Runs the explain scenario as a test: real binaries, rootless, with a few quick cases.

use std::process::Command;

use towline_tests::lab::scenario_test::figures;

#[test]
fn causes_are_named_without_root_and_a_healthy_mesh_causes_no_alarm() {
    let cases = "nodes/removed,nodes/agent-off,hosts/ufw,healthy/ipv4-only";
    let lab = env!("CARGO_BIN_EXE_lab");
    let Some(explain) = figures(lab, &["explain", "--case", cases]).unwrap() else { return };
    assert_eq!(explain["failed"].as_array().map(Vec::len), Some(0));
    assert_eq!(explain["explained"], 3);
    assert_eq!(explain["false_alarms"], 0);
    assert_eq!(explain["healthy"].as_array().map(Vec::len), Some(1));
    for case in explain["cases"].as_array().unwrap() {
        assert!(!case["named_by"].as_array().unwrap().is_empty(), "{case}");
    }
}

#[test]
fn the_cases_are_named_without_running_any() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_lab")).args(["explain", "--list"]).output().unwrap();
    let names = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && names.lines().count() >= 40, "{names}");
}
