//! Runs the lab's scenario of `towline down`, `up`, `leave` and `confirm` with the real binaries.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: the panic is the report

use std::process::Command;

use serde_json::Value;

#[test]
fn every_order_of_down_up_leave_and_confirm_ends_as_it_says() {
    let output = Command::new(env!("CARGO_BIN_EXE_lab"))
        .args(["departure", "--rootless", "--json"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(3) {
        println!("skipped: {}", stderr.trim_end());
        return;
    }
    let figures: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("stdout is not one JSON object ({error}): {stderr}"));
    assert_eq!(figures["failed"], Value::Array(Vec::new()), "{stderr}");
    assert!(figures["commands"].as_u64() > Some(40), "{figures}");
}
