//! Several controllers that use one store at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use towline_fixtures::ca::{identity as identity_key, public};
use towline_fixtures::node::mesh_config;
use towline_proto::id::{NodeId, TokenId, WireguardKey};
use towline_proto::node::MeshConfig;
use towline_registry::sessions::Sessions;
use towline_registry::token::{SecretHash, TokenTerms};
use towline_registry::{Join, JoinError, Now};

use super::*;
use crate::authority::Authority;
use crate::clock;
use crate::events::Events;
use crate::ledger::Ledger;
use crate::map::Map;
use crate::server::opening;
use crate::state_dir::StateDir;
use crate::view::View;
use crate::writer::{self, Published, Unavailable, Writer};

fn shared(cluster: &Cluster, prefix: &str) -> EtcdStore {
    let settings = EtcdSettings { is_shared: true, ..cluster.settings(prefix) };
    EtcdStore::connect(settings).unwrap()
}

#[test]
fn controllers_take_turns_and_read_what_the_others_wrote() {
    let Some(cluster) = Cluster::start(1, &[]) else { return };
    let mut first = shared(&cluster, "m");
    first.create(&identity(), &[put("a", "1"), put("b", "1")]).unwrap();
    assert!(first.share());
    let mut second = shared(&cluster, "m");
    assert!(second.share());

    first.begin_turn().unwrap();
    assert!(first.changes().unwrap().is_empty());
    let sequence = first.sequence();
    first.commit(sequence, &[put("a", "2")]).unwrap();
    assert_eq!(second.changes().unwrap(), [put("a", "2")]);
    assert!(second.changes().unwrap().is_empty());
    assert_eq!(second.sequence(), first.sequence());

    // A change that is staged in parts, and the turn that ends with it.
    second.begin_turn().unwrap();
    let many: Vec<Write> = (0..300).map(|n| put(&format!("node/{n:03}"), "x")).collect();
    let sequence = second.sequence();
    second.commit(sequence, &many).unwrap();
    first.begin_turn().unwrap();
    assert_eq!(first.changes().unwrap(), many);
    first.end_turn();

    // A controller that stops in its turn holds the others up for seconds, and then writes nothing.
    first.begin_turn().unwrap();
    second.begin_turn().unwrap();
    let sequence = first.sequence();
    let error = first.commit(sequence, &[put("a", "3")]).unwrap_err();
    assert!(line(&error).contains("in use by the controller turn of"), "{error}");
    second.commit(sequence, &[put("a", "4")]).unwrap();
    first.reopen().unwrap();
    assert_eq!(texts(&mut first)[..2], ["a=4", "b=1"]);
    first.end_turn();

    // One that does not share the store waits, and is waited for.
    drop(second);
    first.begin_turn().unwrap();
    let refused = EtcdStore::connect(cluster.settings("m")).map(drop).unwrap_err();
    assert!(matches!(refused, EtcdError::InUse { .. }), "{refused}");
    first.end_turn();
    let alone = EtcdStore::connect(cluster.settings("m")).unwrap();
    let refused = first.begin_turn().unwrap_err();
    assert!(line(&refused).contains("in use by the controller"), "{refused}");
    drop(alone);
    first.begin_turn().unwrap();
}

/// Returns whether a controller has the turn to write the store below `m`.
fn has_turn(cluster: &Cluster) -> bool {
    let owner = Keys::new("/m/".to_owned()).owner();
    let found: RangeResponse = cluster.call(wire::RANGE, RangeRequest::of(owner)).unwrap();
    !found.kvs.is_empty()
}

#[test]
fn a_turn_that_fails_is_given_back_at_once() {
    let Some(cluster) = Cluster::start(1, &[]) else { return };
    let keys = Keys::new("/m/".to_owned());
    let mut store = shared(&cluster, "m");
    store.create(&identity(), &[put("a", "1")]).unwrap();
    assert!(store.share() && !has_turn(&cluster));

    // Another controller has a newer version.
    let known = head(&cluster, &keys);
    let mut newer = known.clone();
    newer.format += 1;
    write(&cluster, keys.head(), newer.encode_to_vec());
    let error = store.begin_turn().unwrap_err();
    assert!(line(&error).contains("unsupported format"), "{error}");
    assert!(!has_turn(&cluster));
    assert!(store.reopen().is_err() && store.peek().is_err());
    assert!(!has_turn(&cluster));

    // The head was written by another program, so the commit is refused.
    write(&cluster, keys.head(), known.encode_to_vec());
    store.begin_turn().unwrap();
    assert!(has_turn(&cluster));
    let sequence = store.sequence();
    assert!(store.commit(sequence, &[put("a", "2")]).is_err());
    assert!(!has_turn(&cluster));

    assert_eq!(store.peek().unwrap().unwrap(), [("a".to_owned(), b"1".to_vec())]);
    assert!(!has_turn(&cluster));
    store.reopen().unwrap();
    assert!(has_turn(&cluster));
    assert_eq!(texts(&mut store), ["a=1"]);
}

/// Starts a controller's writer on the store.
fn start(
    store: Box<dyn Store>,
    ledger: Ledger,
    authority: &Arc<Authority>,
) -> (Writer, Published, oneshot::Receiver<()>) {
    let published = Published {
        map: Arc::new(Map::new()),
        view: Arc::<View>::default(),
        sessions: Arc::new(Mutex::new(Sessions::new(Duration::from_secs(1)))),
        counters: Arc::default(),
        events: Arc::new(Events::new(1)),
    };
    let (writer, ended) =
        writer::start(store, ledger, authority.clone(), false, published.clone()).unwrap();
    assert!(writer.is_shared());
    (writer, published, ended)
}

/// Joins a node with the token 7, which admits one.
async fn join(writer: &Writer, key: u8) -> Result<Result<NodeId, JoinError>, Unavailable> {
    let join = Join {
        token: TokenId([7; 8]),
        secret_hash: SecretHash([7; 32]),
        name: format!("n{key}").parse().unwrap(),
        identity_key: public(&identity_key(key)),
        wireguard_key: WireguardKey([key; 32]),
        node_id: NodeId([key; 16]),
    };
    let change = move |ledger: &mut Ledger, sessions: &Sessions, now: Now| {
        ledger.registry().join(&join, sessions, now)
    };
    writer.run(change).await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_controllers_admit_one_node_with_a_token_for_one() {
    let Some(cluster) = Cluster::start(1, &[]) else { return };
    let root = tempfile::tempdir().unwrap();
    let authority =
        Arc::new(Authority::load_or_create(&StateDir::new(root.path()), true, 0).unwrap());
    let config = MeshConfig { mesh_id: authority.mesh_id(), ..mesh_config() };
    let mut ledger = Ledger::create(authority.clone(), config);
    let mut store = shared(&cluster, "m");
    let records = ledger.take_changes(BTreeMap::new).writes;
    store.create(&opening::identity(&authority), &records).unwrap();
    let (one, shown_by_one, one_ended) = start(Box::new(store), ledger, &authority);

    let mut store: Box<dyn Store> = Box::new(shared(&cluster, "m"));
    let ledger = writer::read(&mut *store, authority.clone(), false, clock::now()).unwrap();
    let (two, shown_by_two, two_ended) = start(store, ledger, &authority);

    let create = |ledger: &mut Ledger, _: &Sessions, now: Now| {
        let (id, hash) = (TokenId([7; 8]), SecretHash([7; 32]));
        ledger.registry().create_token(id, hash, TokenTerms::once(), i64::MAX, now).is_ok()
    };
    assert!(one.run(create).await.unwrap());
    // Each knows what the other has stored before it decides.
    let (left, right) = tokio::join!(join(&one, 1), join(&two, 2));
    let admitted = [left.unwrap(), right.unwrap()].iter().filter(|joined| joined.is_ok()).count();
    assert_eq!(admitted, 1);
    assert!(one.refresh().await && two.refresh().await);
    let names = |published: &Published| -> Vec<String> {
        published.view.nodes(None, 9).iter().map(|node| node.name.to_string()).collect()
    };
    assert_eq!(names(&shown_by_one).len(), 1);
    assert_eq!(names(&shown_by_one), names(&shown_by_two));
    let maps = [&shown_by_one, &shown_by_two].map(|published| published.map.changes_after(0));
    assert_eq!(maps[0], maps[1]);

    for (writer, ended) in [(one, one_ended), (two, two_ended)] {
        writer.stop().await;
        ended.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn controllers_tell_each_other_of_their_nodes_until_they_end() {
    let Some(cluster) = Cluster::start(1, &[]) else { return };
    let mut one = shared(&cluster, "m");
    one.create(&identity(), &[put("a", "1")]).unwrap();
    assert!(one.share());
    let mut two = shared(&cluster, "m");
    assert!(two.share());
    let (first, second) = (one.replicas().unwrap(), two.replicas().unwrap());
    let parts = |part: u8, value: &'static str| {
        BTreeMap::from([(part, bytes::Bytes::from_static(value.as_bytes()))])
    };
    let told = |part, value: &'static str| {
        vec![Presence { controller: first.number(), part, value: value.into() }]
    };
    assert!(first.exchange(parts(1, "x")).await.unwrap().is_empty());
    assert_eq!(second.exchange(parts(9, "of two")).await.unwrap(), told(1, "x"));
    assert_eq!(first.exchange(parts(2, "y")).await.unwrap().len(), 1);
    assert_eq!(second.exchange(BTreeMap::new()).await.unwrap(), told(2, "y"));
    assert!(first.exchange(parts(2, "y")).await.unwrap().is_empty(), "it has no nodes any more");

    let signals = vec![(second.number(), "a".into()), (second.number(), "b".into())];
    first.send(signals).await.unwrap();
    assert!(first.receive().await.unwrap().is_empty());
    assert_eq!(second.receive().await.unwrap().len(), 2);
    assert!(second.receive().await.unwrap().is_empty(), "each is received once");

    drop(one);
    assert!(second.exchange(BTreeMap::new()).await.unwrap().is_empty());
}
