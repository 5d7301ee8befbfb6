//! Clients of newer versions, and clients that ask for the schema.

use prost::Message as _;
use tokio_stream::StreamExt as _;
use tonic::Code;
use towline_controller::service::RPCS;
use towline_fixtures::controller::{TestController, soon, upsert};
use towline_proto::pb;
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::reflection::ServerReflectionRequest;
use towline_proto::reflection::server_reflection_client::ServerReflectionClient;
use towline_proto::reflection::server_reflection_request::MessageRequest;
use towline_proto::reflection::server_reflection_response::MessageResponse;

/// Field 900 of a message, a number: 1. No version has it.
const UNKNOWN_FIELD: [u8; 3] = [0xa0, 0x38, 1];

#[tokio::test]
async fn what_a_newer_agent_says_reaches_its_peers_and_leaves_the_rest_alone() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let ca = controller.ca_key();
    let newer = controller.node("newer", &[]).await;
    let other = controller.node("other", &[]).await;
    let mut watch = newer.watch(&controller).await;
    watch.synced().await;
    let mut peer = other.watch(&controller).await;
    peer.synced().await;

    // A message of the watch that this version does not know is ignored, and the session goes on.
    watch.requests.send(pb::WatchRequest { kind: None }).await.unwrap();
    watch.heartbeat().await;
    // A record with an unknown field, a later version of the probes and an unknown kind of candidate.
    let mut record = pb::Record::decode(newer.record(1, &[]).body).unwrap();
    record.probe_version = 99;
    record.candidates.push(pb::Candidate { kind: 99, address: vec![192, 0, 2, 1], port: 1 });
    let mut body = record.encode_to_vec();
    body.extend(UNKNOWN_FIELD);
    watch.publish(newer.sign_encoded(body.clone())).await.unwrap();
    let seen = peer
        .until(|kind| match kind {
            pb::change::Kind::Upsert(entry) => {
                entry.record.as_ref().map(|signed| signed.body.clone())
            }
            pb::change::Kind::Tombstone(_) | pb::change::Kind::Mesh(_) => None,
        })
        .await;
    assert_eq!(seen, body, "peers of its version know what it means");

    // What cannot be used is refused as a whole, and the record before it stays.
    let mut wrong = pb::Record::decode(newer.record(2, &[]).body).unwrap();
    wrong.generation = u64::MAX;
    let status = watch.publish(newer.sign_encoded(wrong.encode_to_vec())).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("generation"), "{status}");
    let shown = other.watch(&controller).await.synced().await;
    let mut seen = shown.iter().filter_map(|kind| upsert(kind, &ca));
    assert!(seen.any(|node| node == (newer.id(), Some(1))));
    controller.stop().await;
}

#[tokio::test]
async fn an_rpc_that_only_newer_versions_have_is_refused_in_one_line() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = controller.node("a", &[]).await;
    let channel = controller.connect(Some(node.credential())).await;
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/towline.v1.Discovery/Later");
    let codec = tonic_prost::ProstCodec::<pb::HelloRequest, pb::HelloResponse>::default();
    let call = grpc.unary(tonic::Request::new(pb::HelloRequest {}), path, codec);
    let status = soon(call).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unimplemented, "unknown RPC"));
    // The connection can be used for everything else.
    DiscoveryClient::new(channel).hello(pb::HelloRequest {}).await.unwrap();
    controller.stop().await;
}

#[tokio::test]
async fn a_revision_of_the_future_gets_the_whole_map() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let ca = controller.ca_key();
    let a = controller.node("a", &[]).await;
    let epoch = a.watch(&controller).await.ready.epoch;
    for (epoch, revision) in [(epoch, u64::MAX), (u64::MAX, 1), (u64::MAX, u64::MAX)] {
        let start = pb::WatchStart { epoch, revision, ..Default::default() };
        let mut watch = a.watch_from(&controller, start).await.unwrap();
        let all = watch.synced().await;
        let nodes: Vec<_> = all.iter().filter_map(|kind| upsert(kind, &ca)).collect();
        assert_eq!(nodes, [(a.id(), None)], "{epoch} {revision}");
    }
    controller.stop().await;
}

#[tokio::test]
async fn administrators_are_told_the_schema() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = controller.node("a", &[]).await;
    let list = || {
        let message_request = Some(MessageRequest::ListServices(String::new()));
        tokio_stream::once(ServerReflectionRequest { host: String::new(), message_request })
    };
    let credentials = [None, Some(node.credential())];
    for credential in credentials {
        let mut client = ServerReflectionClient::new(controller.connect(credential).await);
        let status = soon(client.server_reflection_info(list())).await.err().unwrap();
        assert!(
            [Code::Unauthenticated, Code::PermissionDenied].contains(&status.code()),
            "{status}"
        );
    }
    let mut client = ServerReflectionClient::new(controller.admin_channel().await);
    let mut answers = soon(client.server_reflection_info(list())).await.unwrap().into_inner();
    let answer = soon(answers.next()).await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(services)) = answer.message_response else {
        panic!("{answer:?}")
    };
    for service in &services.service {
        let path = format!("/{}/", service.name);
        assert!(RPCS.iter().any(|rpc| rpc.path.starts_with(&path)), "{path}");
    }
    assert_eq!(services.service.len(), 4);
    controller.stop().await;
}
