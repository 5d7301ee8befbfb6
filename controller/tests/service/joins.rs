//! Joins, and the renewal of certificates.

use std::time::Duration;

use tonic::Code;
use towline_controller::authority::{Authority, Subject};
use towline_controller::clock;
use towline_controller::state_dir::StateDir;
use towline_fixtures::controller::{Machine, Node, TestController, upsert};
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::token::TokenSecret;
use towline_proto::{pb, signed};

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
async fn the_wireguard_key_of_a_removed_node_is_refused_under_another_identity() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = controller.node("a", &[]).await;
    let request = pb::RemoveNodeRequest { name: "a".into() };
    controller.admin().await.remove_node(request).await.unwrap();
    controller.stop().await;

    // The removal is in the store.
    let controller = TestController::start(root.path());
    let token = controller.token(pb::CreateTokenRequest::default()).await;
    let mut machine = Machine::new("b");
    machine.wireguard = node.machine.wireguard.clone();
    let status = machine.join(&controller, &token).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("WireGuard key was removed"), "{status}");
    assert!(status.message().contains("`a`"), "{status}");

    // The refusal used nothing up, and with a key of its own the machine joins.
    Machine::new("b").join(&controller, &token).await.unwrap();
    controller.stop().await;
}
