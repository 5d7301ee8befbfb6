//! Tests of what operators see of the mesh: nodes report their tunnels, and the command line shows them.

#![allow(clippy::unwrap_used, reason = "a panic is the report")]

use std::process::{Command, Stdio};

use serde_json::Value;
use towline_fixtures::controller::{Node, TestController, Watch, soon};
use towline_proto::pb;
use towline_proto::pb::watch_request::Kind;

/// Runs a command of the command line, and returns what it prints.
async fn run(controller: &TestController, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_towline-controller"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TOWLINE")) {
        command.env_remove(name);
    }
    command.args(arguments).arg("--state-dir").arg(&controller.dir).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = soon(output).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

async fn json(controller: &TestController, arguments: &[&str]) -> Value {
    let text = run(controller, &[arguments, &["-o", "json"]].concat()).await;
    serde_json::from_str(&text).unwrap()
}

async fn send(watch: &Watch, kind: Kind) {
    watch.requests.send(pb::WatchRequest { kind: Some(kind) }).await.unwrap();
}

/// Reports a summary, and waits until the controller has handled it: messages of a watch are handled in order, so
/// a signal of the node to itself comes back afterwards.
async fn report(node: &Node, watch: &mut Watch, summary: pb::MeshSummary) {
    send(watch, Kind::Summary(summary)).await;
    send(watch, Kind::Signal(pb::Signal { node_id: node.id().0.to_vec(), body: vec![1] })).await;
    loop {
        let message = watch.next().await.unwrap();
        if matches!(message.kind, Some(pb::watch_response::Kind::Signal(_))) {
            return;
        }
    }
}

fn peer(node: &Node, state: pb::TunnelState) -> pb::PeerSummary {
    pb::PeerSummary { node_id: node.id().0.to_vec(), state: state.into(), ..Default::default() }
}

#[tokio::test]
async fn what_a_node_reports_is_shown_to_operators_and_to_nobody_else() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let (a, b) = (controller.node("a", &[]).await, controller.node("b", &[]).await);
    let mut watch = a.watch(&controller).await;
    let up = pb::PeerSummary {
        rtt_us: 420,
        loss_permille: Some(25),
        ..peer(&b, pb::TunnelState::Direct)
    };
    // A peer that is no member is left out.
    let unknown = pb::PeerSummary { node_id: vec![9; 16], ..up.clone() };
    let summary = pb::MeshSummary { direct: 2, peers: vec![up, unknown], ..Default::default() };
    report(&a, &mut watch, summary.clone()).await;

    let status = json(&controller, &["mesh", "status"]).await;
    assert_eq!(status[0]["name"], "a");
    assert_eq!((&status[0]["online"], &status[0]["peers_up"]), (&true.into(), &2.into()));
    assert_eq!(status[0]["worst"], "b loses 2.5 %");
    assert_eq!(
        (&status[1]["online"], &status[1]["reported_seconds"]),
        (&false.into(), &Value::Null)
    );
    let matrix = json(&controller, &["mesh", "matrix"]).await;
    assert_eq!(matrix.as_array().unwrap().len(), 1);
    assert_eq!((&matrix[0]["from"], &matrix[0]["to"]), (&"a".into(), &"b".into()));
    assert_eq!((&matrix[0]["state"], &matrix[0]["rtt_us"]), (&"direct".into(), &420.into()));
    let table = run(&controller, &["mesh", "matrix"]).await;
    assert!(
        table.lines().any(|line| line.starts_with("a ") && line.ends_with("0.42 ms")),
        "{table}"
    );
    let graph = run(&controller, &["mesh", "graph"]).await;
    assert!(graph.contains("\"a\" -- \"b\""), "{graph}");
    assert!(run(&controller, &["mesh", "graph", "-o", "svg"]).await.starts_with("<svg"));

    // What is malformed changes nothing, and the session goes on.
    let twice = pb::MeshSummary { peers: vec![peer(&b, pb::TunnelState::Down); 2], ..summary };
    report(&a, &mut watch, twice).await;
    assert_eq!(json(&controller, &["mesh", "matrix"]).await, matrix);
    controller.stop().await;
}

#[tokio::test]
async fn a_node_that_reports_without_end_is_not_listened_to() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = controller.node("a", &[]).await;
    let mut watch = node.watch(&controller).await;
    for direct in 1..=20 {
        let summary = pb::MeshSummary { direct, ..Default::default() };
        report(&node, &mut watch, summary).await;
    }
    let request = pb::ListTunnelsRequest::default();
    let listed = controller.admin().await.list_tunnels(request).await.unwrap().into_inner();
    let kept = listed.nodes[0].direct;
    assert!((6..20).contains(&kept), "{kept}");
    controller.stop().await;
}

#[tokio::test]
async fn operators_see_who_came_and_who_went() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = controller.node("a", &[]).await;
    let watch = node.watch(&controller).await;
    drop(watch);
    let mut admin = controller.admin().await;
    let has_gone = async {
        loop {
            let request = pb::ListEventsRequest::default();
            let events = admin.list_events(request).await.unwrap().into_inner().events;
            if events.iter().any(|event| event.code == "node-disconnected") {
                return;
            }
        }
    };
    soon(has_gone).await;
    run(&controller, &["node", "remove", "a"]).await;
    let events = json(&controller, &["mesh", "events"]).await;
    let codes: Vec<&str> =
        events.as_array().unwrap().iter().map(|event| event["code"].as_str().unwrap()).collect();
    assert_eq!(
        codes,
        [
            "controller-started",
            "node-joined",
            "node-connected",
            "node-disconnected",
            "node-removed"
        ]
    );
    let last = events[4]["id"].as_str().unwrap();
    assert_eq!(
        json(&controller, &["mesh", "events", "--after", last]).await,
        Value::Array(Vec::new())
    );
    let wide = run(&controller, &["mesh", "events", "-o", "wide"]).await;
    assert!(wide.contains("node-joined") && wide.contains("a joined"), "{wide}");
    controller.stop().await;
}
