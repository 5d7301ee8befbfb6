//! Operators: their rights, credentials and lists.

use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use towline_controller::local;
use towline_controller::service::{RPCS, Role};
use towline_fixtures::controller::{Machine, TestController, config, soon};
use towline_proto::node::RelayRole;
use towline_proto::pb::admin_client::AdminClient;
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::{limits, pb, signed};
use towline_service::grpc;

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
