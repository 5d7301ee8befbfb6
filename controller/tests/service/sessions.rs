//! Watches, records and claims.

use std::time::Duration;

use tonic::Code;
use towline_fixtures::controller::{TestController, config, prefix, soon, upsert};
use towline_proto::{pb, signed};

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
async fn who_is_not_heard_is_offline_and_who_is_stays() {
    let root = tempfile::tempdir().unwrap();
    // Long enough for the one that answers, on a slow machine too.
    let heartbeat = Duration::from_secs(1);
    let controller =
        TestController::with(towline_controller::Config { heartbeat, ..config(root.path()) });
    let silent = controller.node("silent", &[]).await;
    let heard = controller.node("heard", &[]).await;
    let mut watch = heard.watch(&controller).await;
    assert_eq!(watch.ready.heartbeat_ms, 1_000);
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
