//! Tests of the ledger: what is stored, shown and loaded again.

mod cost;

use std::sync::LazyLock;
use std::time::Duration;

use towline_fixtures::ca::{identity, public};
use towline_fixtures::node::{mesh_config, nets, record};
use towline_proto::id::{TokenId, WireguardKey};
use towline_proto::signed::{self, Domain};

use super::*;
use crate::clock;
use crate::map::Map;
use crate::state_dir::StateDir;
use towline_registry::sessions::Session;
use towline_registry::token::{SecretHash, TokenTerms};
use towline_registry::{Join, NodeProblem};

/// CA of all tests. It is shared because generating its key is slow.
static AUTHORITY: LazyLock<Arc<Authority>> = LazyLock::new(new_authority);

fn new_authority() -> Arc<Authority> {
    let root = tempfile::tempdir().unwrap();
    let dir = StateDir::new(root.path());
    Arc::new(Authority::load_or_create(&dir, true, 1_700_000_000).unwrap())
}

/// A ledger with copies of what is stored, shown to watchers and shown to operators.
struct World {
    ledger: Ledger,
    sessions: Sessions,
    now: Now,
    stored: BTreeMap<String, Vec<u8>>,
    map: Map,
    view: crate::view::View,
    /// Number of records of the last commit, and their bytes.
    written: (usize, usize),
}

impl World {
    fn new() -> Self {
        let config = MeshConfig { mesh_id: AUTHORITY.mesh_id(), ..mesh_config() };
        let mut world = Self {
            ledger: Ledger::create(AUTHORITY.clone(), config),
            sessions: Sessions::new(Duration::from_secs(1)),
            now: clock::now(),
            stored: BTreeMap::new(),
            map: Map::new(),
            view: crate::view::View::default(),
            written: (0, 0),
        };
        world.commit();
        world
    }

    fn commit(&mut self) {
        let changes = self.ledger.take_changes(|| self.sessions.all_last_seen(self.now));
        let bytes = changes.writes.iter().filter_map(|(_, value)| Some(value.as_ref()?.len()));
        self.written = (changes.writes.len(), bytes.sum());
        for (key, value) in changes.writes {
            match value {
                Some(value) => self.stored.insert(key, value),
                None => self.stored.remove(&key),
            };
        }
        let counters = self.ledger.counters();
        self.map.apply(counters.epoch, counters.revision, changes.map);
        self.view.apply(changes.view);
    }

    /// Adds a node, opens its session, and publishes its record.
    fn node(&mut self, number: u8) -> NodeId {
        let (token, hash) = (TokenId([number; 8]), SecretHash([number; 32]));
        let terms = TokenTerms { allowed_prefixes: nets(&["10.0.0.0/8"]), ..TokenTerms::once() };
        let registry = self.ledger.registry();
        registry.create_token(token, hash, terms, i64::MAX, self.now).unwrap();
        let join = Join {
            token,
            secret_hash: hash,
            name: format!("n{number}").parse().unwrap(),
            identity_key: public(&identity(number)),
            wireguard_key: WireguardKey([number; 32]),
            node_id: NodeId([number; 16]),
        };
        let node = registry.join(&join, &self.sessions, self.now).unwrap();
        let address = ([192, 0, 2, 1], 1000).into();
        let session = Session::new(node.0, vec![1], address, self.now);
        self.sessions.open(node, session, self.now).unwrap();
        self.publish(number, 1);
        node
    }

    fn publish(&mut self, number: u8, generation: u64) {
        self.publish_with(number, generation, &[]).unwrap();
    }

    /// Publishes a record that ends with fields that this version does not know.
    fn publish_with(
        &mut self,
        number: u8,
        generation: u64,
        unknown: &[u8],
    ) -> Result<Published, PublishError> {
        let node = NodeId([number; 16]);
        let grant = self.ledger.registry().member(node).unwrap().grant.clone();
        let record = Record { generation, ..record(&grant) };
        let mut body = pb::Record::from(&record).encode_to_vec();
        body.extend_from_slice(unknown);
        let signed = signed::sign_encoded(Domain::Record, body, &identity(number));
        let (sessions, now) = (&self.sessions, self.now);
        let published = self.ledger.publish(node, &node.0, (record, signed), sessions, now);
        self.commit();
        published
    }

    fn load(&self, authority: &Arc<Authority>) -> Result<Ledger, ReadError> {
        let records: Vec<StoreRecord> = self.stored.clone().into_iter().collect();
        Ledger::load(authority.clone(), &records, false, self.now)
    }

    /// Returns the records as an earlier version wrote them.
    fn unauthenticated(&self) -> Vec<StoreRecord> {
        let secret = AUTHORITY.store_secret();
        let open = |(key, value): (&String, &Vec<u8>)| {
            (key.clone(), secret.open(key, value).unwrap().body.to_vec())
        };
        self.stored.iter().map(open).collect()
    }
}

#[test]
fn what_is_stored_and_shown_is_what_is_in_the_ledger() {
    let mut world = World::new();
    let nodes: Vec<NodeId> = (1..=4).map(|number| world.node(number)).collect();
    world.publish(1, 7);
    world.ledger.registry().remove(nodes[1], "test", &world.sessions, world.now).unwrap();
    let name = "n3".parse().unwrap();
    let problem = NodeProblem::NameRequested { name };
    world.ledger.registry().note(nodes[2], problem.clone());
    world.commit();
    let loaded = world.load(&AUTHORITY).unwrap();
    let shown = Map::new();
    shown.apply(1, loaded.counters().revision, loaded.map());
    assert_eq!(shown.changes_after(0), world.map.changes_after(0));

    let tombstone = world.map.tombstone(nodes[1]);
    let verified = signed::tombstone(tombstone.as_ref(), AUTHORITY.public_key()).unwrap();
    assert_eq!(verified.node_id, nodes[1]);
    let grant = signed::grant(world.map.grant(nodes[0]).ok().as_ref(), AUTHORITY.public_key());
    assert_eq!(grant.unwrap().node_id, nodes[0]);

    let names = |view: &crate::view::View| -> Vec<String> {
        view.nodes(None, 9).iter().map(|node| node.name.to_string()).collect()
    };
    assert_eq!(names(&world.view), ["n1", "n3", "n4"]);
    assert_eq!(world.view.node(&"n3".parse().unwrap()).unwrap().problems, [problem]);
    let view = crate::view::View::default();
    view.replace(loaded.view());
    assert_eq!(names(&view), names(&world.view));
    assert_eq!(view.tokens(None, 9), world.view.tokens(None, 9));
}

#[test]
fn a_replica_has_what_another_controller_wrote_or_notices_that_it_does_not() {
    let mut world = World::new();
    let node = world.node(1);
    let mut replica = world.load(&AUTHORITY).unwrap();
    let (mut before, shown) = (world.stored.clone(), Map::new());
    shown.apply(1, replica.counters().revision, replica.map());
    let written = |world: &World, before: &BTreeMap<String, Vec<u8>>| -> Vec<Write> {
        let is_new = |(key, value): &(&String, &Vec<u8>)| before.get(*key) != Some(*value);
        let changed = world.stored.iter().filter(is_new);
        changed.map(|(key, value)| (key.clone(), Some(value.clone()))).collect()
    };
    world.node(2);
    world.publish(1, 7);
    let registry = world.ledger.registry();
    registry.remove(node, "test", &world.sessions, world.now).unwrap();
    world.commit();
    let changes = replica.refresh(&written(&world, &before), world.now).unwrap();
    assert!(changes.writes.is_empty() && changes.events.is_empty());
    shown.apply(1, replica.counters().revision, changes.map);
    assert_eq!(shown.changes_after(0), world.map.changes_after(0));
    assert!(replica.registry().member(node).is_err());

    // Both can go on: the next change of the replica is one that the other one takes.
    let (token, hash) = (TokenId([9; 8]), SecretHash([9; 32]));
    let terms = TokenTerms::once();
    replica.registry().create_token(token, hash, terms, i64::MAX, world.now).unwrap();
    let writes = replica.take_changes(BTreeMap::new).writes;
    world.ledger.refresh(&writes, world.now).unwrap();
    world
        .stored
        .extend(writes.into_iter().filter_map(|(key, value)| value.map(|value| (key, value))));
    world.load(&AUTHORITY).unwrap();
    assert_eq!(replica.counters(), world.ledger.counters());

    before = world.stored.clone();
    world.ledger.registry().revoke_token(token).unwrap();
    world.node(3);
    let mut some = written(&world, &before);
    some.retain(|(key, _)| !key.starts_with("token/0909"));
    assert!(matches!(replica.refresh(&some, world.now), Err(ReadError::Mixed)));
}

#[test]
fn a_field_that_only_newer_versions_know_is_a_change_of_the_map() {
    // Field 900, a number: 1 or 2.
    let [one, two] = [1, 2].map(|value| vec![0xa0, 0x38, value]);
    let mut world = World::new();
    world.node(1);
    let first = world.publish_with(1, 2, &one).unwrap();
    let second = world.publish_with(1, 3, &two).unwrap();
    assert!(second.revision > first.revision, "peers may know it");
    let reused = world.publish_with(1, 3, &one);
    assert!(matches!(reused, Err(PublishError::GenerationReused { generation: 3 })));
    let again = world.publish_with(1, 3, &two).unwrap();
    assert_eq!((again.revision, again.is_stored), (second.revision, false));
    let refreshed = world.publish_with(1, 4, &two).unwrap();
    assert!(refreshed.revision > second.revision, "it cannot be compared");
}

#[test]
fn a_node_of_an_older_store_keeps_when_it_was_last_seen() {
    let mut world = World::new();
    let node = world.node(1);
    let key = format!("node/{node}");
    let mut records = world.unauthenticated();
    records.retain(|(key, _)| key != "seen");
    for (_, value) in records.iter_mut().filter(|(found, _)| *found == key) {
        *value = stored::with_last_seen(value, 1_600_000_000);
    }
    let loaded = Ledger::load(AUTHORITY.clone(), &records, true, world.now).unwrap();
    assert_eq!(loaded.last_seen().collect::<Vec<_>>(), [(node, 1_600_000_000)]);
}

#[test]
fn last_seen_survives_a_restart() {
    let mut world = World::new();
    let node = world.node(1);
    world.now = world.now.plus(Duration::from_secs(90));
    world.sessions.renew(node, node.0, world.now);
    world.ledger.registry().tick(&world.sessions, world.now);
    world.commit();
    let loaded = world.load(&AUTHORITY).unwrap();
    let mut sessions = Sessions::new(Duration::from_secs(1));
    sessions.restore(loaded.last_seen());
    assert_eq!(sessions.last_seen(node, world.now), world.now.unix);
}

#[test]
fn records_of_an_earlier_version_are_taken_once_and_only_where_that_is_asked_for() {
    let mut world = World::new();
    let node = world.node(1);
    let records = world.unauthenticated();
    let load = |migrate| Ledger::load(AUTHORITY.clone(), &records, migrate, world.now);
    let error = load(false).map(drop).unwrap_err().to_string();
    assert!(error.contains("--migrate-store"), "{error}");
    world.ledger = load(true).unwrap();
    world.stored = records.iter().cloned().collect();
    world.ledger.registry().start(None, world.now);
    world.commit();
    let mut loaded = world.load(&AUTHORITY).unwrap();
    assert!(loaded.registry().member(node).is_ok());
}

#[test]
fn a_record_cannot_be_replaced_by_an_earlier_one_nor_removed() {
    let mut world = World::new();
    world.node(1);
    let unused = {
        let (token, hash) = (TokenId([2; 8]), SecretHash([2; 32]));
        let registry = world.ledger.registry();
        registry.create_token(token, hash, TokenTerms::once(), i64::MAX, world.now).unwrap();
        world.commit();
        let key = format!("token/{token}");
        (key.clone(), world.stored[&key].clone())
    };
    world.ledger.registry().revoke_token(TokenId([2; 8])).unwrap();
    world.commit();
    let good = world.stored.clone();
    world.load(&AUTHORITY).unwrap();
    world.stored.insert(unused.0, unused.1);
    assert!(matches!(world.load(&AUTHORITY), Err(ReadError::Mixed)), "a revoked token is open");
    for key in good.keys().filter(|key| *key != "meta" && *key != "mesh") {
        world.stored = good.clone();
        world.stored.remove(key);
        assert!(matches!(world.load(&AUTHORITY), Err(ReadError::Mixed)), "{key} is missing");
    }
}

#[test]
fn a_store_of_another_authority_or_with_altered_records_is_not_believed() {
    let mut world = World::new();
    world.node(1);
    let error = world.load(&new_authority()).map(drop).unwrap_err().to_string();
    assert!(error.contains("different meshes"), "{error}");

    let keys: Vec<String> = world.stored.keys().cloned().collect();
    for key in &keys {
        let mut altered = std::mem::take(&mut world.stored);
        altered.get_mut(key).unwrap()[40] ^= 1;
        world.stored = altered;
        let error = world.load(&AUTHORITY).map(drop).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
        world.stored.get_mut(key).unwrap()[40] ^= 1;
    }
    world.stored.remove("mesh");
    let error = world.load(&AUTHORITY).map(drop).unwrap_err().to_string();
    assert!(error.contains("mesh"), "{error}");
}
