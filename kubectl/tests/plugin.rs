//! The plugin with a stand-in for kubectl that answers with files and notes its arguments.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

const NODES: &str = r#"{"items": [
    {"status": {"node": "b", "peersUp": 1, "peersDown": 1, "conditions": [
        {"type": "Connected", "status": "True"},
        {"type": "PeersReachable", "status": "False", "message": "1 peer has no path: see TowlinePath"}]}},
    {"status": {"node": "a", "site": "dc", "peersUp": 2, "conditions": []}},
    {}
]}"#;
const PATHS: &str = r#"{"items": [
    {"status": {"from": "b", "to": "c", "state": "down", "reason": "no-answer"}},
    {"status": {"from": "a", "to": "b", "state": "relay", "relay": "r"}}
]}"#;
const PODS: &str = r#"{"items": [
    {"metadata": {"name": "old"}, "status": {"phase": "Failed"}},
    {"metadata": {"name": "agent-x"}, "status": {"phase": "Running"}}
]}"#;

/// Runs the plugin with a kubectl that prints the first of these answers whose key is an argument.
fn plugin(directory: &Path, answers: &[(&str, &str)], arguments: &[&str]) -> (Output, String) {
    let mut script = format!("#!/bin/sh\necho \"$@\" >> {}/called\n", directory.display());
    script += "case \"$*\" in\n";
    for (at, (key, answer)) in answers.iter().enumerate() {
        let file = directory.join(format!("answer{at}"));
        fs::write(&file, answer).expect("a file");
        script += &format!("*\"{key}\"*) exec cat {};;\n", file.display());
    }
    script += "*exec*) echo ran; exit 7;;\nesac\necho 'the server has no such kind' >&2\nexit 1\n";
    let kubectl = directory.join("kubectl");
    fs::write(&kubectl, script).expect("a file");
    fs::set_permissions(&kubectl, fs::Permissions::from_mode(0o755)).expect("a mode");
    let path = format!("{}:/usr/bin:/bin", directory.display());
    let output = Command::new(env!("CARGO_BIN_EXE_kubectl-towline"))
        .args(arguments)
        .env("PATH", path)
        .output()
        .expect("the plugin runs");
    let called = fs::read_to_string(directory.join("called")).unwrap_or_default();
    (output, called)
}

#[test]
fn the_status_is_a_table_sorted_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let answers = [("towlinenodes", NODES)];
    let arguments = ["status", "-o", "wide", "--context", "prod"];
    let (output, called) = plugin(directory.path(), &answers, &arguments);
    assert!(output.status.success());
    let table = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("NAME"), "{table}");
    assert!(lines[1].starts_with("a ") && lines[2].starts_with("b "), "{table}");
    assert!(lines[2].contains("1 peer has no path"), "{table}");
    assert!(called.starts_with("--context=prod get towlinenodes.towline.io"), "{called}");
}

#[test]
fn a_cluster_without_the_objects_says_what_writes_them() {
    let directory = tempfile::tempdir().unwrap();
    let (output, _) = plugin(directory.path(), &[], &["status"]);
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("towline-controller publish") && told.contains("no such kind"), "{told}");
}

#[test]
fn a_command_runs_in_the_running_pod_of_the_node_and_its_status_is_passed_on() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["trace", "gpu-1", "10.0.0.1:80", "-o", "json"];
    let (output, called) = plugin(directory.path(), &[("get pods", PODS)], &arguments);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(output.stdout, b"ran\n");
    assert!(called.contains("--field-selector=spec.nodeName=gpu-1"), "{called}");
    let run = "exec --namespace=towline --container=agent agent-x -- \
               /usr/bin/towline trace --output=json -- 10.0.0.1:80";
    assert!(called.contains(run), "{called}");
}

#[test]
fn without_a_pod_there_are_the_known_paths_or_the_command_to_run() {
    let directory = tempfile::tempdir().unwrap();
    let answers = [("get pods", r#"{"items": []}"#), ("towlinepaths", PATHS)];
    let (output, _) = plugin(directory.path(), &answers, &["peers", "b"]);
    assert!(output.status.success());
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("no-answer") && !table.contains("relay  "), "{table}");
    let (output, _) = plugin(directory.path(), &answers, &["doctor", "b"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("run `towline doctor` on it"), "{told}");
}

#[test]
fn a_link_with_the_name_that_kubectl_looks_for_completes_the_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let link = directory.path().join("kubectl_complete-towline");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_kubectl-towline"), &link).expect("a link");
    let output = Command::new(&link).arg("p").output().expect("the link starts");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{text}");
    assert!(text.starts_with("peers\t") && text.ends_with("\n:4\n"), "{text}");
}
