//! Runs the lab's demo as a test: real binaries, rootless, with short transfers.

use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use towline_tests::lab::interrupt::wait_for;
use towline_tests::lab::scenario_test::figures;

#[test]
fn the_demo_keeps_its_promises_without_root() {
    let lab = env!("CARGO_BIN_EXE_lab");
    let Some(demo) = figures(lab, &["demo", "--megabytes", "4"]).unwrap() else { return };
    // Only the demo itself checks timings; a test also runs on a busy machine.
    let failed: Vec<&str> = demo["failed"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .filter(|promise| !promise.starts_with("first packet of"))
        .filter(|promise| !promise.starts_with("no end of"))
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert_eq!(demo["joined"], 3);
    assert!(demo["tunnels_up"].as_u64() >= Some(2), "{demo:#}");
    assert_eq!(demo["bytes_ok"], true);
    assert_eq!(demo["plaintext_seen"], false);
    for pair in ["worker-a/cp", "worker-b/cp"] {
        assert!(demo["first_packet_ms"][pair].is_number(), "{pair}: {demo:#}");
    }
}

#[test]
fn a_kept_lab_lets_shells_in_and_ends_at_an_interrupt() {
    // A kept lab writes its note next to its binary. A copy of the binary avoids a conflict with a
    // lab that is in use.
    let directory = tempfile::tempdir().unwrap();
    let lab = directory.path().join("lab");
    std::fs::copy(env!("CARGO_BIN_EXE_lab"), &lab).unwrap();
    let note = directory.path().join("towline-lab-kept.json");
    let shell = |arguments: &[&str]| {
        Command::new(&lab).arg("shell").args(arguments).output().expect("the lab starts")
    };
    let nobody = shell(&["cp", "true"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("demo --keep"));

    let mut demo = Command::new(&lab)
        .args(["demo", "--rootless", "--json", "--keep", "--megabytes", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let kept = wait_for("kept lab", Duration::from_secs(600), || {
        Ok(match demo.try_wait()? {
            Some(status) => Some(Err(status)),
            None => note.exists().then_some(Ok(())),
        })
    });
    if let Ok(Err(status)) = kept
        && status.code() == Some(3)
    {
        println!("skipped: this machine forbids the lab");
        return;
    }
    kept.unwrap().unwrap();
    let status = shell(&["worker-a", "towline", "status", "-o", "json"]);
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["name"], "worker-a");
    let nodes = shell(&["cp", "towline-controller", "node", "list", "-o", "json"]);
    let nodes: Value = serde_json::from_slice(&nodes.stdout).unwrap();
    assert_eq!(nodes.as_array().map(Vec::len), Some(3));
    let nowhere = shell(&["nowhere", "true"]);
    assert_eq!(nowhere.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("router-b, worker-a, worker-b"));

    kill(Pid::from_raw(demo.id().cast_signed()), Signal::SIGINT).unwrap();
    let ended = demo.wait_with_output().unwrap();
    serde_json::from_slice::<Value>(&ended.stdout).unwrap();
    assert!(!note.exists(), "nothing is left behind");
}
