//! Runs the attack scenario as a test: real binaries, rootless, with a few quick cases.

use std::process::Command;

use towline_tests::lab::scenario_test::figures;

#[test]
fn attempts_fail_and_what_has_to_work_does_without_root() {
    let cases =
        "inward/to/overlay,inward/to/loopback,sources/stranger,oversized/end,probes/register";
    let lab = env!("CARGO_BIN_EXE_lab");
    let Some(attack) = figures(lab, &["attack", "--case", cases]).unwrap() else { return };
    assert_eq!(attack["failed"].as_array().map(Vec::len), Some(0));
    assert_eq!(attack["breaches"], 0);
    let cases = attack["cases"].as_array().unwrap();
    assert!(cases.len() >= 10, "{attack:#}");
    for case in cases {
        assert_eq!(case["expected"], case["got"], "{case}");
    }
}

#[test]
fn the_cases_are_named_without_running_any() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_lab")).args(["attack", "--list"]).output().unwrap();
    let names = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && names.lines().count() >= 40, "{names}");
}
