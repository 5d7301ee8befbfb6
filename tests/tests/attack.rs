//! Runs the attack scenario as a test: real binaries, rootless, with a few quick cases.

use std::process::Command;

use serde_json::Value;

#[test]
fn attempts_fail_and_what_has_to_work_does_without_root() {
    let output = Command::new(env!("CARGO_BIN_EXE_lab"))
        .args(["attack", "--rootless", "--json"])
        .args(["--case", "inward/to/overlay,inward/to/loopback,sources/stranger,oversized/end"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(3) {
        println!("skipped: {}", stderr.trim_end());
        return;
    }
    let attack: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("stdout is not one JSON object ({error}): {stderr}");
    });
    assert_eq!(attack["failed"].as_array().map(Vec::len), Some(0), "{attack:#}\n{stderr}");
    assert_eq!(attack["breaches"], 0);
    assert_eq!(attack["rootless"], true);
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
