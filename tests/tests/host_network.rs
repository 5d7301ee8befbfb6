//! Runs the lab's host-network scenarios as tests, in short form and rootless, for their promises
//! about packets. Only the scenarios check timings: a test also runs on a busy machine.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: the panic is the report

use serde_json::Value;
use towline_tests::lab::scenario_test::figures;

fn lab(arguments: &[&str]) -> Option<Value> {
    figures(env!("CARGO_BIN_EXE_lab"), arguments).unwrap()
}

#[test]
fn nothing_leaks_and_nothing_forged_comes_in() {
    let Some(leak) = lab(&["leak", "--seconds", "8", "--seed", "7"]) else { return };
    assert_eq!(leak["seed"], 7);
    assert!(leak["acts"].as_u64() > Some(0));
    assert_eq!(leak["plaintext_packets"], 0);
    assert_eq!(leak["forged_accepted"], 0);
    assert!(leak["forged_sent"].as_u64() > Some(0));
    assert!(leak["delivered"].as_u64() > Some(0));
}

#[test]
fn every_arrow_of_a_cluster_is_drawn() {
    let short = ["nodes", "--addressing", "node-ip", "--rp-filter", "1"];
    let Some(nodes) = lab(&short) else { return };
    let arrows = nodes["arrows"].as_array().unwrap();
    assert_eq!(arrows.len(), 38, "19 of each family");
    for arrow in arrows {
        assert_eq!(arrow["ok"], true, "{arrow}");
        assert_eq!(arrow["addressing"], "node-ip");
        assert_eq!(arrow["rp_filter"], 1);
        assert!(["IPv4", "IPv6"].map(Value::from).contains(&arrow["family"]));
        assert!(["tunnel", "uplink"].map(Value::from).contains(&arrow["via"]));
        assert!(arrow["name"].is_string());
    }
}

#[test]
fn what_is_theirs_stays_and_nothing_leaves_meanwhile() {
    let Some(coexist) = lab(&["coexist", "--netlink"]) else { return };
    let acts = coexist["acts"].as_array().unwrap();
    assert!(acts.len() >= 6);
    assert!(acts.iter().all(|act| act["name"].is_string() && act["restored_ms"].is_number()));
    assert!(coexist["skipped"].is_array());
    assert_eq!(coexist["foreign_changes"], 0);
    assert_eq!(coexist["plaintext_packets"], 0);
}

#[test]
fn a_change_takes_as_many_messages_in_any_mesh() {
    let Some(plan) = lab(&["plan", "--here"]) else { return };
    assert_eq!(plan["peers"], 1_000);
    assert_eq!(plan["prefixes"], 5_000);
    assert_eq!(plan["change_messages"], plan["change_messages_small"]);
    assert!(plan["full_ms"].is_number() && plan["change_ms"].is_number());
}
