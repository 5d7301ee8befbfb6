//! Budgets, slow clients, strangers, and the end of the controller.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use towline_fixtures::controller::{Machine, Node, TestController, prefix, soon, upsert};
use towline_proto::health::HealthCheckRequest;
use towline_proto::health::health_check_response::ServingStatus;
use towline_proto::health::health_client::HealthClient;
use towline_proto::id::NodeId;
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::{limits, pb, refusal};

#[tokio::test]
async fn a_slow_watcher_gets_the_newest_state_and_no_queue() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let ca = controller.ca_key();
    let fast = controller.node("fast", &[]).await;
    let slow = controller.node("slow", &[]).await;
    let mut watch = slow.watch(&controller).await;
    watch.synced().await;
    let publisher = fast.watch(&controller).await;

    // Each record fills a large part of the slow watcher's flow-control window. One node may not publish
    // all of them at once, so several do.
    const NODES: u64 = 3;
    const LAST: u64 = 20;
    let candidates: Vec<pb::Candidate> = (0..limits::CANDIDATES as u32)
        .map(|i| pb::Candidate { kind: 1, address: vec![10, 0, 0, 1], port: 1000 + i })
        .collect();
    drop(publisher);
    let mut publishers = Vec::new();
    for number in 0..NODES {
        let wide = controller.token(pb::CreateTokenRequest {
            allowed_prefixes: vec![prefix("10.0.0.0/8")],
            ..Default::default()
        });
        let machine = Machine::new(&format!("wide{number}"));
        let joined = machine.join(&controller, &wide.await).await.unwrap();
        let node = Node::new(machine, joined);
        let prefixes = (0..200u8).map(|i| prefix(&format!("10.{number}.{i}.0/24")));
        let prefixes: Vec<_> = prefixes.collect();
        let watch = node.watch(&controller).await;
        publishers.push((node, watch, prefixes));
    }
    for generation in 1..=LAST {
        for (node, publisher, prefixes) in &publishers {
            let record = pb::Record {
                node_id: node.id().0.to_vec(),
                generation,
                // A record of which only the generation is new would not be sent.
                boot_epoch: generation,
                wireguard_keys: vec![node.machine.wireguard_key().0.to_vec()],
                candidates: candidates.clone(),
                prefixes: prefixes.clone(),
                version: String::new(),
                relay: false,
                lans: Vec::new(),
                probe_version: 0,
                api_port: 0,
            };
            watch.heartbeat().await;
            publisher.heartbeat().await;
            publisher.publish(node.sign(&record)).await.unwrap();
        }
    }

    let mut received = 0;
    let mut newest: BTreeSet<NodeId> = BTreeSet::new();
    while newest.len() < publishers.len() {
        let changes = watch.changes().await.unwrap();
        for (id, generation) in changes.kinds().filter_map(|kind| upsert(&kind.unwrap(), &ca)) {
            if publishers.iter().any(|(node, ..)| node.id() == id) {
                received += 1;
                newest.extend((generation == Some(LAST)).then_some(id));
            }
        }
    }
    assert!(received < NODES * LAST / 2, "{received} states of {NODES} nodes were queued");
    controller.stop().await;
}

#[tokio::test]
async fn a_node_that_publishes_without_end_slows_only_itself_down() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let (a, b) = (controller.node("a", &[]).await, controller.node("b", &[]).await);
    let mut first = a.watch(&controller).await;
    let mut other = b.watch(&controller).await;
    first.synced().await;
    other.synced().await;
    let mut refused = None;
    for generation in 1..100 {
        if let Err(status) = first.publish(a.record(generation, &[])).await {
            refused = Some(status);
            break;
        }
    }
    let status = refused.expect("a budget");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("wait"), "{status}");
    other.publish(b.record(1, &[])).await.unwrap();
    controller.stop().await;
}

#[tokio::test]
async fn a_stranger_cannot_make_the_controller_buffer_much() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let mut stranger = DiscoveryClient::new(controller.connect(None).await);
    let csr = vec![0; 64 * 1024];
    let join = pb::JoinRequest { csr, ..Default::default() };
    let status = stranger.join(join).await.unwrap_err();
    assert!(status.message().contains("length limit"), "{status}");
    controller.stop().await;
}

#[tokio::test]
async fn everybody_may_ask_for_the_state_of_health() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let mut health = HealthClient::new(controller.connect(None).await);
    let request = |name: &str| HealthCheckRequest { service: name.to_owned() };
    let state = health.check(request("towline.v1.Discovery")).await.unwrap().into_inner();
    assert_eq!(state.status(), ServingStatus::Serving);
    assert_eq!(health.check(request("other")).await.unwrap_err().code(), Code::NotFound);
    controller.stop().await;
}

#[tokio::test]
async fn a_used_up_budget_says_how_long_to_wait() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = controller.node("a", &[]).await;
    let mut client = node.client(&controller).await;
    let status = loop {
        let request = pb::RenewRequest { csr: node.machine.csr() };
        if let Err(status) = client.renew(request).await {
            break status;
        }
    };
    assert_eq!(status.code(), Code::ResourceExhausted);
    let wait = refusal::retry_after(&status).unwrap();
    assert!(wait <= Duration::from_secs(60), "{wait:?}");
    controller.stop().await;
}

#[tokio::test]
async fn it_ends_in_time_though_clients_hold_on_and_its_store_is_free_at_once() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = controller.node("a", &[]).await;
    // A watch that is not read, an idle connection, and an incomplete handshake.
    let watch = node.watch(&controller).await;
    let client = node.client(&controller).await;
    let stranger = tokio::net::TcpStream::connect(controller.address).await.unwrap();
    // The limit is for a slow machine. A client holds on for much longer.
    let stopped = tokio::time::timeout(Duration::from_secs(20), controller.stop()).await;
    stopped.expect("the controller does not wait for its clients");
    let controller = TestController::start(root.path());
    assert_eq!(controller.info("a").await.problems, [""; 0]);
    drop((watch, client, stranger));
    controller.stop().await;
}

#[tokio::test]
async fn junk_at_the_port_harms_nobody() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = controller.node("a", &[]).await;
    let mut watch = node.watch(&controller).await;
    watch.synced().await;
    for junk in [
        vec![0; 4096],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        // A handshake record whose length is larger than its content.
        vec![22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3],
    ] {
        let mut stream = tokio::net::TcpStream::connect(controller.address).await.unwrap();
        stream.write_all(&junk).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        let _ = soon(stream.read_to_end(&mut rest)).await;
    }
    // Junk inside of TLS instead of HTTP/2.
    let mut roots = rustls::RootCertStore::empty();
    roots.add(controller.ca()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(controller.address).await.unwrap();
    let name = towline_proto::CONTROLLER_TLS_NAME.try_into().unwrap();
    let mut stream =
        tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, stream).await.unwrap();
    stream.write_all(&[0xff; 4096]).await.unwrap();
    let _ = soon(stream.read_to_end(&mut Vec::new())).await;

    watch.publish(node.record(1, &[])).await.unwrap();
    controller.stop().await;
}

#[tokio::test]
async fn a_record_is_no_longer_than_a_node_needs() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = controller.node("a", &["fd00:10::/32"]).await;
    let watch = node.watch(&controller).await;
    let record = |generation: u64, networks: usize| {
        let announced: Vec<_> =
            (0..networks).map(|number| prefix(&format!("fd00:10:{number:x}::/48"))).collect();
        node.sign(&pb::Record {
            node_id: node.id().0.to_vec(),
            generation,
            wireguard_keys: vec![node.machine.wireguard_key().0.to_vec()],
            prefixes: announced.clone(),
            lans: announced,
            ..Default::default()
        })
    };
    let status = watch.publish(record(1, limits::PREFIXES)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("record"), "{status}");
    watch.publish(record(1, limits::PREFIXES / 2)).await.unwrap();
    controller.stop().await;
}
