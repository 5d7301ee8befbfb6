//! Tests of the controller's gRPC services, with nodes and operators as clients.

#![allow(clippy::unwrap_used, reason = "a panic is the report")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use towline_controller::authority::{Authority, Subject};
use towline_controller::service::{RPCS, Role, tombstone_of};
use towline_controller::state_dir::StateDir;
use towline_controller::{clock, local};
use towline_fixtures::controller::{
    Machine, Node, TestController, config, prefix, soon, tombstone, upsert,
};
use towline_proto::health::HealthCheckRequest;
use towline_proto::health::health_check_response::ServingStatus;
use towline_proto::health::health_client::HealthClient;
use towline_proto::id::NodeId;
use towline_proto::node::RelayRole;
use towline_proto::pb::admin_client::AdminClient;
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::token::TokenSecret;
use towline_proto::{limits, pb, refusal, signed};
use towline_service::grpc;

#[tokio::test]
async fn nodes_join_and_see_each_other() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let ca = controller.ca_key();
    let a = controller.node("a", &["10.1.0.0/16"]).await;
    let b = controller.node("b", &[]).await;
    assert_ne!(a.grant.overlay, b.grant.overlay);

    let mut watch_b = b.watch(&controller).await;
    let seen: Vec<_> = watch_b.synced().await.iter().filter_map(|k| upsert(k, &ca)).collect();
    assert_eq!(seen, [(a.id(), None), (b.id(), None)]);
    let mesh = signed::mesh(watch_b.ready.mesh.as_ref(), &ca).unwrap();
    assert_eq!(mesh.overlay_v4.to_string(), "198.19.0.0/16");
    assert_eq!(mesh.overlay_v6.prefix_len(), 64);

    let mut watch_a = a.watch(&controller).await;
    watch_a.synced().await;
    let published = watch_a.publish(a.record(1, &["10.1.2.0/24"])).await.unwrap();
    assert!(published.refused.is_empty());
    let seen = watch_b.until(|kind| upsert(kind, &ca).filter(|(id, _)| *id == a.id())).await;
    assert_eq!(seen, (a.id(), Some(1)));
    assert!(watch_b.revision >= published.revision);

    let info = controller.info("a").await;
    assert!(info.online && info.session_address.starts_with("127.0.0.1:"));
    controller.stop().await;
}

#[tokio::test]
async fn of_two_machines_with_one_token_exactly_one_joins() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let token = controller.token(pb::CreateTokenRequest::default()).await;
    let machines: Vec<Machine> = (0..6).map(|i| Machine::new(&format!("n{i}"))).collect();
    let joins = machines.iter().map(|machine| machine.join(&controller, &token));
    let results = futures_util::future::join_all(joins).await;
    let refused: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    assert_eq!(refused.len(), 5);
    for status in refused {
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("has been used"), "{status}");
    }
    controller.stop().await;
}

#[tokio::test]
async fn a_join_is_refused_with_the_reason_and_can_be_repeated_when_its_answer_was_lost() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let mut admin = controller.admin().await;
    let token = controller.token(pb::CreateTokenRequest::default()).await;
    let machine = Machine::new("a");
    let refused = async |machine: &Machine, token| {
        let status = machine.join(&controller, token).await.unwrap_err();
        assert!(!status.message().contains('\n'));
        (status.code(), status.message().to_owned())
    };

    let mut wrong = token.clone();
    wrong.secret = TokenSecret([0; 32]);
    let (code, message) = refused(&machine, &wrong).await;
    assert_eq!(code, Code::Unauthenticated);
    assert!(message.contains("secret") && message.contains("is wrong"), "{message}");

    let bad_name = Machine::new("Not-A-Label");
    assert_eq!(refused(&bad_name, &token).await.0, Code::InvalidArgument);

    // The WireGuard key of another machine cannot be claimed.
    let channel = controller.connect(None).await;
    let mut request = machine.request(channel.clone(), &token).await;
    request.wireguard_key = Machine::new("b").wireguard_key().0.to_vec();
    let status = DiscoveryClient::new(channel).join(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("proof"), "{status}");

    let first = machine.join(&controller, &token).await.unwrap();
    let again = machine.join(&controller, &token).await.unwrap();
    assert_eq!(first.grant, again.grant);

    let token = controller.token(pb::CreateTokenRequest::default()).await;
    let (code, message) = refused(&Machine::new("a"), &token).await;
    assert_eq!(code, Code::AlreadyExists);
    assert!(message.contains("--replace a"), "{message}");

    let revoke = pb::RevokeTokenRequest { id: token.id.to_string() };
    admin.revoke_token(revoke).await.unwrap();
    let (code, message) = refused(&Machine::new("c"), &token).await;
    assert_eq!(code, Code::FailedPrecondition);
    assert!(message.contains("revoked"), "{message}");

    let request = pb::CreateTokenRequest { replace: "a".into(), ..Default::default() };
    let token = controller.token(request).await;
    let (code, message) = refused(&Machine::new("c"), &token).await;
    assert_eq!(code, Code::PermissionDenied, "a replacement has the name of what it replaces");
    assert!(message.contains("`a`"), "{message}");
    Machine::new("a").join(&controller, &token).await.unwrap();
    controller.stop().await;
}

#[tokio::test]
async fn a_source_that_keeps_guessing_has_to_wait() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let mut token = controller.token(pb::CreateTokenRequest::default()).await;
    token.secret = TokenSecret([0; 32]);
    let machine = Machine::new("a");
    for _ in 0..100 {
        let status = machine.join(&controller, &token).await.unwrap_err();
        if status.code() == Code::ResourceExhausted {
            assert!(status.message().contains("wait"), "{status}");
            // The same source, with a secret that is right.
            let token = controller.token(pb::CreateTokenRequest::default()).await;
            machine.join(&controller, &token).await.expect("a good token is never refused");
            controller.stop().await;
            return;
        }
        assert_eq!(status.code(), Code::Unauthenticated);
    }
    panic!("the rate of failed joins is not limited");
}

#[tokio::test]
async fn a_watch_resumes_where_it_was_and_starts_over_in_another_epoch() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let ca = controller.ca_key();
    let a = controller.node("a", &[]).await;
    let mut watch = a.watch(&controller).await;
    watch.synced().await;
    let (epoch, revision) = (watch.ready.epoch, watch.revision);
    drop(watch);
    let b = controller.node("b", &[]).await;

    let start = |epoch, revision| pb::WatchStart { epoch, revision, ..Default::default() };
    let resumed = async |epoch, revision| {
        let mut watch = a.watch_from(&controller, start(epoch, revision)).await.unwrap();
        let all = watch.synced().await;
        all.iter().filter_map(|kind| upsert(kind, &ca)).map(|(id, _)| id).collect::<Vec<_>>()
    };
    assert_eq!(resumed(epoch, revision).await, [b.id()]);
    assert_eq!(resumed(epoch + 1, revision).await, [a.id(), b.id()]);
    assert_eq!(resumed(epoch, revision + 1_000).await, [a.id(), b.id()], "ahead of the map");

    // Epoch and revisions survive a restart of the controller.
    controller.stop().await;
    let controller = TestController::start(root.path());
    let mut watch = a.watch_from(&controller, start(epoch, revision)).await.unwrap();
    let seen: Vec<_> = watch.synced().await.iter().filter_map(|k| upsert(k, &ca)).collect();
    assert_eq!(seen, [(b.id(), None)]);
    controller.stop().await;
}

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
async fn a_machine_that_was_restored_from_a_copy_is_told_so_by_what_a_node_knows() {
    let root = tempfile::tempdir().unwrap();
    let (state, copy) = (root.path().join("state"), root.path().join("copy"));
    let files = ["towline.redb", "starts", "sequence"];
    let controller = TestController::start(&state);
    let ca = controller.ca_key();
    let a = controller.node("a", &[]).await;
    let token = controller.token(pb::CreateTokenRequest::default()).await;
    controller.stop().await;
    // A copy of the whole machine, also of what is beside the store.
    std::fs::create_dir(&copy).unwrap();
    for name in files {
        std::fs::copy(state.join(name), copy.join(name)).unwrap();
    }
    let controller = TestController::start(&state);
    Machine::new("b").join(&controller, &token).await.unwrap();
    let ready = a.watch(&controller).await.ready;
    let head = ready.head.clone();
    assert_eq!(signed::head(head.as_ref(), &ca).unwrap().epoch, ready.epoch);
    controller.stop().await;
    for name in files {
        std::fs::copy(copy.join(name), state.join(name)).unwrap();
    }

    let controller = TestController::start(&state);
    let forged = pb::WatchStart { head: ready.mesh.clone(), ..Default::default() };
    let watch = a.watch_from(&controller, forged).await.unwrap();
    assert_eq!(watch.ready.epoch, ready.epoch, "what is no head proves nothing");
    drop(watch);
    let start = pb::WatchStart { head, ..Default::default() };
    let later = a.watch_from(&controller, start).await.unwrap().ready;
    assert!(later.epoch > ready.epoch, "{} {}", later.epoch, ready.epoch);
    let mesh = signed::mesh(later.mesh.as_ref(), &ca).unwrap();
    assert!(mesh.is_newer_than(&signed::mesh(ready.mesh.as_ref(), &ca).unwrap()));
    let status = Machine::new("c").join(&controller, &token).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("revoked"), "{status}");
    controller.stop().await;
}

#[tokio::test]
async fn a_removed_node_is_told_so_with_its_tombstone() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let ca = controller.ca_key();
    let a = controller.node("a", &[]).await;
    let b = controller.node("b", &[]).await;
    let mut watch_a = a.watch(&controller).await;
    let mut watch_b = b.watch(&controller).await;
    watch_a.synced().await;
    watch_b.synced().await;
    let mut client = a.client(&controller).await;

    let request = pb::RemoveNodeRequest { name: "a".into() };
    controller.admin().await.remove_node(request.clone()).await.unwrap();
    assert_eq!(watch_b.until(|kind| tombstone(kind, &ca)).await, a.id());

    let is_removed = |status: &tonic::Status| {
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        let tombstone = tombstone_of(status).unwrap();
        assert_eq!(signed::tombstone(Some(&tombstone), &ca).unwrap().node_id, a.id());
    };
    is_removed(&watch_a.end().await);
    is_removed(&client.renew(pb::RenewRequest { csr: a.machine.csr() }).await.unwrap_err());
    is_removed(&a.watch_from(&controller, Default::default()).await.err().unwrap());

    let gone = controller.admin().await.remove_node(request).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);

    let left = b.client(&controller).await.leave(pb::LeaveRequest {}).await.unwrap().into_inner();
    assert_eq!(signed::tombstone(left.tombstone.as_ref(), &ca).unwrap().node_id, b.id());
    let nodes = controller.admin().await.list_nodes(pb::ListNodesRequest::default()).await;
    assert!(nodes.unwrap().into_inner().nodes.is_empty());
    controller.stop().await;
}

#[tokio::test]
async fn an_operator_decides_who_relays_and_watchers_get_the_grant() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let ca = controller.ca_key();
    let a = controller.node("a", &[]).await;
    assert_eq!(a.grant.relay, RelayRole::Denied);
    let mut watch = a.watch(&controller).await;
    watch.synced().await;
    let mut request = pb::SetNodeRequest { name: "a".into(), relay: Some(true) };
    let set = controller.admin().await.set_node(request.clone()).await.unwrap().into_inner();
    assert_eq!(signed::grant(set.grant.as_ref(), &ca).unwrap().relay, RelayRole::Granted);
    let granted = |kind: &pb::change::Kind| {
        let pb::change::Kind::Upsert(entry) = kind else { return None };
        let grant = signed::grant(entry.grant.as_ref(), &ca).ok()?;
        (grant.relay == RelayRole::Granted).then_some(grant.node_id)
    };
    assert_eq!(watch.until(granted).await, a.id());
    request.name = "b".into();
    let unknown = controller.admin().await.set_node(request).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    controller.stop().await;
}

#[tokio::test]
async fn a_cloned_machine_is_refused_and_a_restarted_one_is_not() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let a = controller.node("a", &[]).await;
    let first = a.watch(&controller).await;

    let clone = pb::WatchStart { instance_id: vec![2], ..Default::default() };
    let status = a.watch_from(&controller, clone.clone()).await.err().unwrap();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert!(status.message().contains("127.0.0.1:"), "{status}");
    assert!(controller.info("a").await.problems.is_empty(), "it may be the same machine");
    let (info, status) = loop {
        first.heartbeat().await;
        let status = a.watch_from(&controller, clone.clone()).await.err().unwrap();
        assert_eq!(status.code(), Code::AlreadyExists);
        let info = controller.info("a").await;
        if !info.problems.is_empty() {
            break (info, status);
        }
    };
    assert_eq!(towline_service::grpc::code(&status), Some("identity-cloned"));
    assert!(info.problems[0].contains("two machines"), "{:?}", info.problems);

    // The same instance connects again over another connection.
    let mut second = a.watch(&controller).await;
    second.synced().await;
    assert!(first.publish(a.record(1, &[])).await.is_err(), "the first session has ended");
    second.publish(a.record(1, &[])).await.unwrap();
    drop(first);

    // Once the machine is offline, another instance may connect.
    drop(second);
    loop {
        match a.watch_from(&controller, clone.clone()).await {
            Ok(_) => break,
            Err(status) => assert_eq!(status.code(), Code::AlreadyExists),
        }
    }
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
async fn who_is_not_heard_is_offline_and_who_is_stays() {
    let root = tempfile::tempdir().unwrap();
    let heartbeat = Duration::from_millis(100);
    let controller =
        TestController::with(towline_controller::Config { heartbeat, ..config(root.path()) });
    let silent = controller.node("silent", &[]).await;
    let heard = controller.node("heard", &[]).await;
    let mut watch = heard.watch(&controller).await;
    assert_eq!(watch.ready.heartbeat_ms, 100);
    watch.synced().await;
    let listen = tokio::spawn(async move {
        // Answers each heartbeat until the watch ends.
        let status = watch.changes().await.unwrap_err();
        status.code()
    });
    let mut watch = silent.watch(&controller).await;
    let status = watch.end().await;
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(!controller.info("silent").await.online);
    assert!(controller.info("heard").await.online);
    controller.stop().await;
    assert_eq!(soon(listen).await.unwrap(), Code::Unavailable, "the controller is stopping");
}

#[tokio::test]
async fn every_call_is_refused_without_the_certificate_that_it_needs() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = controller.node("a", &[]).await;
    let stranger = controller.connect(None).await;
    let member = controller.connect(Some(node.credential())).await;
    let call = async |channel: tonic::transport::Channel, path: &'static str| {
        let mut grpc = tonic::client::Grpc::new(channel);
        grpc.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<pb::LeaveRequest, pb::LeaveResponse>::default();
        let path = http::uri::PathAndQuery::from_static(path);
        grpc.unary(tonic::Request::new(pb::LeaveRequest {}), path, codec).await.unwrap_err().code()
    };
    for rpc in RPCS {
        let path = rpc.path;
        match rpc.role {
            Role::Anyone => {}
            Role::Node | Role::ExpiredNode | Role::Certified => {
                assert_eq!(call(stranger.clone(), path).await, Code::Unauthenticated, "{path}");
            }
            Role::Admin => {
                assert_eq!(call(stranger.clone(), path).await, Code::Unauthenticated, "{path}");
                assert_eq!(call(member.clone(), path).await, Code::PermissionDenied, "{path}");
            }
        }
    }
    let unknown = call(member, "/towline.v1.Discovery/Everything").await;
    assert_eq!(unknown, Code::Unimplemented);
    controller.stop().await;
}

#[tokio::test]
async fn a_revoked_administrator_loses_open_connections_and_the_controller_gets_a_new_key() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let mut admin = controller.admin().await;
    let list = pb::ListAdminsRequest {};
    let admins = admin.list_admins(list).await.unwrap().into_inner().admins;
    assert_eq!(admins.len(), 1);
    assert_eq!((admins[0].name.as_str(), admins[0].revoked_at), ("local", None));
    let unknown = pb::RevokeAdminRequest { key: vec![9; 32] };
    assert_eq!(admin.revoke_admin(unknown).await.unwrap_err().code(), Code::NotFound);

    let revoke = pb::RevokeAdminRequest { key: admins[0].key.clone() };
    admin.revoke_admin(revoke).await.unwrap();
    let status = admin.list_admins(list).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    assert!(status.message().contains("revoked"), "{status}");
    // The controller replaces the credential in its state directory.
    let mut by_socket = AdminClient::new(by_socket(&controller).await);
    let replaced = async {
        loop {
            let admins = by_socket.list_admins(list).await.unwrap().into_inner().admins;
            if admins.len() == 2 {
                break admins;
            }
        }
    };
    let admins = soon(replaced).await;
    assert_eq!(admins.iter().filter(|admin| admin.revoked_at.is_none()).count(), 1);
    let listed = controller.admin().await.list_admins(list).await.unwrap().into_inner();
    assert_eq!(listed.admins, admins);
    controller.stop().await;
    // Revoked also after a restart.
    let controller = TestController::start(root.path());
    let listed = controller.admin().await.list_admins(list).await.unwrap().into_inner();
    assert_eq!(listed.admins, admins);
    controller.stop().await;
}

#[tokio::test]
async fn an_administrator_gets_a_certificate_for_a_key_of_his_own_name_alone() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let admin = controller.admin().await;
    let machine = Machine::new("anna");
    let create = async |name: &str, csr: Vec<u8>| {
        let request = pb::CreateAdminRequest { name: name.to_owned(), csr };
        admin.clone().create_admin(request).await.map(tonic::Response::into_inner)
    };
    for name in ["local", "Anna", "a/b", ""] {
        let status = create(name, machine.csr()).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status}");
    }
    assert!(create("anna", b"junk".to_vec()).await.is_err());

    let created = create("anna", machine.csr()).await.unwrap();
    assert!(created.expires_at > clock::now().unix);
    let key = PrivateKeyDer::try_from(machine.identity.serialize_der()).unwrap();
    let credential = (vec![created.certificate.into()], key);
    let mut anna = AdminClient::new(controller.connect(Some(credential)).await);
    let listed = anna.list_admins(pb::ListAdminsRequest {}).await.unwrap().into_inner().admins;
    let own = listed.into_iter().find(|admin| admin.name == "anna").unwrap();
    // She renews her certificate, and gets none for another name.
    let request = |name: &str| pb::CreateAdminRequest { name: name.into(), csr: machine.csr() };
    anna.create_admin(request("anna")).await.unwrap();
    let status = anna.create_admin(request("ben")).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");

    let revoke = pb::RevokeAdminRequest { key: own.key };
    admin.clone().revoke_admin(revoke).await.unwrap();
    let status = anna.list_admins(pb::ListAdminsRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let status = create("anna", machine.csr()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    controller.stop().await;
}

/// Returns a connection by the local socket.
async fn by_socket(controller: &TestController) -> Channel {
    let stream = tokio::net::UnixStream::connect(controller.dir.join(local::SOCKET)).await.unwrap();
    grpc::channel(Endpoint::from_static("http://controller"), stream).await.unwrap()
}

#[tokio::test]
async fn administration_over_the_network_needs_a_choice_and_by_the_socket_none() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::with(towline_controller::Config {
        remote_admin: false,
        ..config(root.path())
    });
    let status = controller.admin().await.get_mesh(pb::GetMeshRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("remote_admin"), "{status}");

    let channel = by_socket(&controller).await;
    let mesh = AdminClient::new(channel.clone()).get_mesh(pb::GetMeshRequest {}).await.unwrap();
    signed::mesh(mesh.into_inner().mesh.as_ref(), &controller.ca_key()).unwrap();
    let hello = DiscoveryClient::new(channel).hello(pb::HelloRequest {}).await;
    assert!(hello.is_err(), "the socket is for administrators");
    controller.stop().await;
    assert!(!root.path().join(local::SOCKET).exists());
}

#[tokio::test]
async fn a_certificate_is_renewed_for_its_own_key_even_when_it_has_expired() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let mut node = controller.node("a", &[]).await;
    let other = Machine::new("b");
    let mut client = node.client(&controller).await;
    let status = client.renew(pb::RenewRequest { csr: other.csr() }).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);

    let authority = Authority::load_or_create(&StateDir::new(root.path()), false, 0).unwrap();
    let long_ago = clock::now().unix - 10 * 24 * 3600;
    let expired = authority.issue(Subject::Node(node.id()), &node.machine.identity, long_ago);
    node.chain = vec![expired.unwrap()];
    let status = node.watch_from(&controller, Default::default()).await.err().unwrap();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("renew"), "{status}");

    let request = pb::RenewRequest { csr: node.machine.csr() };
    let renewed = node.client(&controller).await.renew(request).await.unwrap().into_inner();
    assert_eq!(
        signed::grant(renewed.grant.as_ref(), &controller.ca_key()).unwrap(),
        node.grant,
        "the current grant"
    );
    node.chain = renewed.certificate_chain.into_iter().map(Into::into).collect();
    node.watch(&controller).await.synced().await;

    // A certificate of this CA for a node that never existed.
    let ghost = authority.issue(
        Subject::Node(towline_proto::id::NodeId([9; 16])),
        &node.machine.identity,
        clock::now().unix,
    );
    node.chain = vec![ghost.unwrap()];
    let status = node.watch_from(&controller, Default::default()).await.err().unwrap();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("not known"), "{status}");
    controller.stop().await;
}

#[tokio::test]
async fn a_record_must_be_signed_and_granted() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = controller.node("a", &["10.0.0.0/8"]).await;
    let watch = node.watch(&controller).await;
    let mut forged = node.record(1, &[]);
    let mut signature = forged.signature.to_vec();
    signature[0] ^= 1;
    forged.signature = signature.into();
    let status = watch.publish(forged).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("signature"), "{status}");

    let status = watch.publish(node.record(1, &["192.168.0.0/16"])).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("--prefix 192.168.0.0/16"), "{status}");

    watch.publish(node.record(2, &["10.1.0.0/16"])).await.unwrap();
    watch.publish(node.record(2, &["10.1.0.0/16"])).await.unwrap();
    let status = watch.publish(node.record(1, &[])).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    controller.stop().await;
}

#[tokio::test]
async fn a_contested_prefix_stays_with_its_holder_and_both_operators_see_it() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let ca = controller.ca_key();
    let a = controller.node("a", &["10.0.0.0/8"]).await;
    let b = controller.node("b", &["10.0.0.0/8"]).await;
    let mut watch_a = a.watch(&controller).await;
    let watch_b = b.watch(&controller).await;
    watch_a.synced().await;
    watch_a.publish(a.record(1, &["10.1.0.0/16"])).await.unwrap();
    let published = watch_b.publish(b.record(1, &["10.1.2.0/24", "10.2.0.0/16"])).await.unwrap();
    assert_eq!(published.refused.len(), 1);
    assert_eq!(published.refused[0].prefix, Some(prefix("10.1.2.0/24")));

    let seen = watch_a
        .until(|kind| match kind {
            pb::change::Kind::Upsert(entry) => {
                let node = signed::node(entry, &ca).unwrap()?;
                (node.id() == b.id()).then(|| node.record().prefixes.clone())
            }
            _ => None,
        })
        .await;
    assert_eq!(seen, ["10.2.0.0/16".parse().unwrap()]);
    for name in ["a", "b"] {
        let problems = controller.info(name).await.problems;
        assert_eq!(problems, [published.refused[0].reason.clone()]);
    }
    controller.stop().await;
}

#[tokio::test]
async fn a_restored_backup_begins_a_new_epoch_and_learns_its_tombstones_again() {
    let root = tempfile::tempdir().unwrap();
    let store = root.path().join("towline.redb");
    let backup = root.path().join("backup");
    let controller = TestController::start(root.path());
    let a = controller.node("a", &[]).await;
    let b = controller.node("b", &[]).await;
    let token = controller.token(pb::CreateTokenRequest::default()).await;
    let epoch = a.watch(&controller).await.ready.epoch;
    controller.stop().await;
    std::fs::copy(&store, &backup).unwrap();

    let controller = TestController::start(root.path());
    let left = b.client(&controller).await.leave(pb::LeaveRequest {}).await.unwrap().into_inner();
    Machine::new("c").join(&controller, &token).await.unwrap();
    controller.stop().await;
    std::fs::copy(&backup, &store).unwrap();

    let controller = TestController::start(root.path());
    let status = Machine::new("d").join(&controller, &token).await.unwrap_err();
    assert!(status.message().contains("revoked"), "{status}");
    b.watch(&controller).await.synced().await;
    let start = pb::WatchStart {
        epoch,
        revision: 3,
        tombstones: vec![left.tombstone.unwrap()],
        ..Default::default()
    };
    let mut watch = a.watch_from(&controller, start).await.unwrap();
    assert!(watch.ready.epoch > epoch);
    let ca = controller.ca_key();
    let all = watch.synced().await;
    assert_eq!(all.iter().filter_map(|k| tombstone(k, &ca)).collect::<Vec<_>>(), [b.id()]);
    assert_eq!(b.watch_from(&controller, Default::default()).await.err().unwrap().code(), {
        Code::PermissionDenied
    });

    // Only the CA can issue a tombstone.
    let forged = a.sign(&pb::Record::default());
    let start = pb::WatchStart { tombstones: vec![forged], ..Default::default() };
    let status = a.watch_from(&controller, start).await.err().unwrap();
    assert_eq!(status.code(), Code::InvalidArgument);
    controller.stop().await;
}

#[tokio::test]
async fn nodes_return_to_an_empty_store_with_their_grants_and_with_the_configuration() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let ca = controller.ca_key();
    let a = controller.node("a", &["10.1.0.0/16"]).await;
    let b = controller.node("b", &[]).await;
    let watch = a.watch(&controller).await;
    let (mesh, grant) = (watch.ready.mesh.clone(), watch.ready.grant.clone());
    let epoch = watch.ready.epoch;
    controller.stop().await;
    for file in ["towline.redb", "starts", "sequence"] {
        std::fs::remove_file(root.path().join(file)).unwrap();
    }

    let controller = TestController::start(root.path());
    let refused = a.watch_from(&controller, pb::WatchStart::default()).await.err().unwrap();
    assert!(refusal::is_of_unknown_node(&refused), "{refused}");
    let request =
        pb::ReadmitRequest { grant: grant.clone(), mesh: mesh.clone(), tombstones: Vec::new() };
    // Another node's grant is refused, and so is what the CA did not sign.
    let status = b.client(&controller).await.readmit(request.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let forged =
        pb::ReadmitRequest { grant: Some(a.sign(&pb::Record::default())), ..Default::default() };
    let status = a.client(&controller).await.readmit(forged).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);

    a.client(&controller).await.readmit(request).await.unwrap();
    let mut watch = a.watch(&controller).await;
    assert!(watch.ready.epoch >= epoch);
    assert_eq!(watch.ready.grant, grant, "the same id and addresses");
    let read = |mesh: Option<&pb::Signed>| signed::mesh(mesh, &ca).unwrap().overlay_v6;
    assert_eq!(read(watch.ready.mesh.as_ref()), read(mesh.as_ref()));
    watch.synced().await;
    watch.publish(a.record(7, &["10.1.2.0/24"])).await.unwrap();
    assert!(controller.info("a").await.record.is_some(), "its record is kept");
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
async fn the_time_after_which_an_ephemeral_node_is_removed_is_in_its_grant() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let request = |seconds| pb::CreateTokenRequest {
        ephemeral: true,
        ephemeral_after_seconds: seconds,
        ..Default::default()
    };
    let token = controller.token(request(300)).await;
    let machine = Machine::new("a");
    let joined = machine.join(&controller, &token).await.unwrap();
    let node = Node::new(machine, joined);
    assert_eq!(node.grant.ephemeral_after, Some(Duration::from_secs(300)));
    let refused = controller.admin().await.create_token(request(5)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
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
    let stopped = tokio::time::timeout(Duration::from_secs(2), controller.stop()).await;
    stopped.expect("the controller ends within 2 s");
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
async fn pages_of_nodes_and_tokens_hold_them_all() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let mut admin = controller.admin().await;
    // With labels of the largest size, a few dozen tokens fill a page.
    let value = "v".repeat(limits::LABEL_VALUE_BYTES);
    let labels = (0..limits::LABELS).map(|i| (format!("label-{i}"), value.clone()));
    let request =
        pb::CreateTokenRequest { labels: labels.collect(), uses: 100, ..Default::default() };
    let token = controller.token(request.clone()).await;
    for _ in 1..60 {
        controller.token(request.clone()).await;
    }
    let (mut after, mut ids, mut pages) = (String::new(), Vec::new(), 0);
    loop {
        let request = pb::ListTokensRequest { after: after.clone() };
        let page = admin.list_tokens(request).await.unwrap().into_inner();
        pages += 1;
        ids.extend(page.tokens.iter().map(|token| token.id.clone()));
        if !page.more {
            break;
        }
        after = ids.last().unwrap().clone();
    }
    assert!(pages > 1);
    assert_eq!(ids.len(), 60);
    assert!(ids.is_sorted());

    for i in 0..40 {
        Machine::new(&format!("n{i:02}")).join(&controller, &token).await.unwrap();
    }
    let (mut after, mut names, mut pages) = (String::new(), Vec::new(), 0);
    loop {
        let request = pb::ListNodesRequest { name: String::new(), after: after.clone() };
        let page = admin.list_nodes(request).await.unwrap().into_inner();
        pages += 1;
        for node in &page.nodes {
            let grant = signed::grant(node.grant.as_ref(), &controller.ca_key()).unwrap();
            names.push(grant.name.to_string());
        }
        if !page.more {
            break;
        }
        after = names.last().unwrap().clone();
    }
    assert!(pages > 1);
    assert_eq!(names, (0..40).map(|i| format!("n{i:02}")).collect::<Vec<_>>());
    controller.stop().await;
}
