//! Runs the lab's scenario of `towline down`, `up`, `leave` and `confirm` with the real binaries.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: the panic is the report

use serde_json::Value;
use towline_tests::lab::scenario_test::figures;

#[test]
fn every_order_of_down_up_leave_and_confirm_ends_as_it_says() {
    let lab = env!("CARGO_BIN_EXE_lab");
    let Some(figures) = figures(lab, &["departure"]).unwrap() else { return };
    assert_eq!(figures["failed"], Value::Array(Vec::new()));
    assert!(figures["commands"].as_u64() > Some(40), "{figures}");
}
