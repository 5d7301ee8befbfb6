//! Removals, and stores that lost something.

use tonic::Code;
use towline_controller::service::tombstone_of;
use towline_fixtures::controller::{Machine, TestController, tombstone};
use towline_proto::{pb, refusal, signed};

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
