//! Tests of the registry's operations, and of its invariants under random operations.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use ipnet::IpNet;
use proptest::prelude::*;
use towline_fixtures::ca::{identity, public, sign_record};
use towline_fixtures::node::{grant, identity_key, mesh_config, net, nets, record};
use towline_proto::id::{MeshId, NodeId, NodeName, TokenId, WireguardKey};
use towline_proto::node::{Grant, MeshConfig, Record};
use towline_proto::signed;
use towline_proto::token::TokenSecret;

use super::sessions::{Session, Sessions};
use super::token::{SecretHash, TokenTerms};
use super::{Join, Joined, MapChange, Published, Refusal, Registry};
use crate::authority::Authority;
use crate::clock::Now;
use crate::map::Map;
use crate::state_dir::{Starts, StateDir};

const SECRET: TokenSecret = TokenSecret([7; 32]);
const LEASE: Duration = Duration::from_secs(600);

/// CA of all tests. It is shared because generating its key is slow.
static AUTHORITY: LazyLock<Arc<Authority>> = LazyLock::new(|| {
    let root = tempfile::tempdir().unwrap();
    let dir = StateDir::new(root.path());
    Arc::new(Authority::load_or_create(&dir, true, 1_700_000_000).unwrap())
});

fn config(mesh_id: MeshId) -> MeshConfig {
    MeshConfig { mesh_id, overlay_v4: "198.19.0.0/24".parse().unwrap(), ..mesh_config() }
}

/// Returns the terms of a token for one use that allows nothing.
pub(crate) fn terms() -> TokenTerms {
    TokenTerms {
        uses: 1,
        name: None,
        site: None,
        labels: BTreeMap::new(),
        allowed_prefixes: Vec::new(),
        replace: None,
        ephemeral: false,
    }
}

/// A registry with a clock, sessions, and copies of the store and the map.
struct World {
    registry: Registry,
    sessions: Sessions,
    now: Now,
    stored: BTreeMap<String, Vec<u8>>,
    map: Map,
    drawn: u8,
}

impl World {
    fn new() -> Self {
        let registry = Registry::create(AUTHORITY.clone(), config(AUTHORITY.mesh_id()));
        let mut world = Self {
            registry,
            sessions: Sessions::new(Duration::from_secs(1)),
            now: Now::read(),
            stored: BTreeMap::new(),
            map: Map::new(),
            drawn: 0,
        };
        world.commit();
        world
    }

    fn draw(&mut self) -> u8 {
        self.drawn += 1;
        self.drawn
    }

    /// Stores and publishes the changes, as the writer does.
    fn commit(&mut self) {
        let changes = self.registry.take_changes();
        for (key, value) in changes.writes {
            match value {
                Some(value) => self.stored.insert(key, value),
                None => self.stored.remove(&key),
            };
        }
        self.map.apply(self.registry.epoch(), self.registry.revision(), changes.map);
    }

    fn reload(&mut self) {
        let records = self.stored.clone().into_iter().collect();
        self.registry = Registry::load(AUTHORITY.clone(), records, self.now).unwrap();
    }

    fn token(&mut self, terms: TokenTerms) -> TokenId {
        let id = TokenId([self.draw(); 8]);
        let expires = self.now.unix + 3600;
        let hash = SecretHash::of(&SECRET);
        self.registry.create_token(id, hash, terms, expires, self.now).unwrap();
        self.commit();
        id
    }

    /// Sends the join request of a machine whose keys are derived from `key`.
    fn join(&mut self, token: TokenId, name: &str, key: u8) -> Result<Joined, Refusal> {
        let join = Join {
            token,
            secret: SECRET,
            name: name.parse().unwrap(),
            identity_key: public(&identity(key)),
            wireguard_key: WireguardKey([key; 32]),
            node_id: NodeId([self.draw(); 16]),
        };
        let joined = self.registry.join(&join, &self.sessions, self.now);
        self.commit();
        joined
    }

    /// Adds a node that may announce `allowed`, and opens its session.
    fn node(&mut self, name: &str, key: u8, allowed: &[&str]) -> NodeId {
        let token = self.token(TokenTerms { allowed_prefixes: nets(allowed), ..terms() });
        let node = self.join(token, name, key).unwrap().node_id;
        self.open(node);
        node
    }

    fn open(&mut self, node: NodeId) {
        let session = Session {
            id: node.0,
            instance: vec![1],
            address: ([192, 0, 2, 1], 1000).into(),
            last_seen: self.now.mono,
        };
        self.sessions.open(node, session, self.now).unwrap();
    }

    fn close(&mut self, node: NodeId) {
        if self.sessions.close(node, node.0) {
            self.registry.session_ended(node, self.now);
            self.commit();
        }
    }

    /// Advances the clock. Connected nodes send a heartbeat.
    fn advance(&mut self, time: Duration) {
        let connected: Vec<NodeId> = self.connected();
        self.now = self.now.plus(time);
        for node in connected {
            self.sessions.renew(node, node.0, self.now);
        }
        self.registry.tick(&self.sessions, self.now);
        self.commit();
    }

    fn connected(&self) -> Vec<NodeId> {
        let nodes = self.registry.nodes.keys().copied();
        nodes.filter(|node| self.sessions.live(*node, self.now).is_some()).collect()
    }

    fn publish(
        &mut self,
        node: NodeId,
        key: u8,
        generation: u64,
        prefixes: &[IpNet],
    ) -> Result<Published, Refusal> {
        let grant =
            Grant { node_id: node, wireguard_keys: vec![WireguardKey([key; 32])], ..grant(key) };
        let record = Record { generation, prefixes: prefixes.to_vec(), ..record(&grant) };
        let signed = sign_record(&record, &identity(key));
        let published =
            self.registry.publish(node, &node.0, record, signed, &self.sessions, self.now);
        self.commit();
        published
    }

    fn announce(&mut self, node: NodeId, key: u8, generation: u64, text: &str) -> Vec<String> {
        let published = self.publish(node, key, generation, &[net(text)]).unwrap();
        published.withheld.into_iter().map(|withheld| withheld.reason).collect()
    }

    fn problems(&self, node: NodeId) -> Vec<String> {
        let name = &self.registry.nodes[&node].grant.name;
        self.registry.status(name, &self.sessions, self.now).unwrap().problems
    }

    fn holder(&self, prefix: &str) -> Option<NodeId> {
        self.registry.claims.holder(&net(prefix))
    }
}

#[test]
fn a_token_admits_as_many_as_it_says_and_says_why_not_otherwise() {
    let mut world = World::new();
    let token = world.token(terms());
    world.join(token, "a", 1).unwrap();
    assert!(matches!(world.join(token, "b", 2), Err(Refusal::TokenUsed { .. })));

    let two = world.token(TokenTerms { uses: 2, ..terms() });
    world.join(two, "b", 2).unwrap();
    world.join(two, "c", 3).unwrap();
    assert!(matches!(world.join(two, "d", 4), Err(Refusal::TokenUsed { .. })));

    let unknown = world.join(TokenId([99; 8]), "d", 4);
    assert!(matches!(unknown, Err(Refusal::TokenUnknown { .. })));

    let revoked = world.token(terms());
    world.registry.revoke_token(revoked).unwrap();
    assert!(matches!(world.join(revoked, "d", 4), Err(Refusal::TokenRevoked { .. })));

    let expired = world.token(terms());
    world.advance(Duration::from_secs(3600));
    assert!(matches!(world.join(expired, "d", 4), Err(Refusal::TokenExpired { .. })));

    let pattern = Some("worker-*".parse().unwrap());
    let workers = world.token(TokenTerms { name: pattern, ..terms() });
    assert!(matches!(world.join(workers, "d", 4), Err(Refusal::Name { .. })));
    world.join(workers, "worker-d", 4).unwrap();
}

#[test]
fn a_wrong_secret_is_refused_before_anything_is_told_about_the_token() {
    let mut world = World::new();
    let token = world.token(terms());
    world.join(token, "a", 1).unwrap();
    let join = Join {
        token,
        secret: TokenSecret([8; 32]),
        name: "b".parse().unwrap(),
        identity_key: identity_key(2),
        wireguard_key: WireguardKey([2; 32]),
        node_id: NodeId([200; 16]),
    };
    let refused = world.registry.join(&join, &world.sessions, world.now);
    assert!(matches!(refused, Err(Refusal::TokenSecret { .. })), "{refused:?}");
}

#[test]
fn a_join_whose_answer_was_lost_can_be_asked_again() {
    let mut world = World::new();
    let token = world.token(terms());
    let first = world.join(token, "a", 1).unwrap();
    world.advance(Duration::from_secs(7200));
    assert_eq!(world.join(token, "a", 1).unwrap(), first);
    assert_eq!(world.registry.nodes.len(), 1);
    // A request with another name or key is a different one.
    assert!(matches!(world.join(token, "b", 1), Err(Refusal::TokenUsed { .. })));
    assert!(matches!(world.join(token, "a", 2), Err(Refusal::TokenUsed { .. })));
}

#[test]
fn names_and_keys_are_unique_and_the_holder_learns_who_tried() {
    let mut world = World::new();
    let node = world.node("a", 1, &[]);
    let token = world.token(TokenTerms { uses: 9, ..terms() });
    assert!(matches!(world.join(token, "a", 2), Err(Refusal::NameTaken { .. })));
    assert!(matches!(world.join(token, "b", 1), Err(Refusal::IdentityTaken { .. })));
    let join = Join {
        token,
        secret: SECRET,
        name: "b".parse().unwrap(),
        identity_key: identity_key(2),
        wireguard_key: WireguardKey([1; 32]),
        node_id: NodeId([201; 16]),
    };
    let refused = world.registry.join(&join, &world.sessions, world.now);
    assert!(matches!(refused, Err(Refusal::WireguardKeyTaken { .. })), "{refused:?}");
    assert_eq!(world.problems(node).len(), 2);
    assert_eq!(world.registry.tokens[&token].used, 0, "a refused join consumes no use");
}

#[test]
fn a_reinstalled_machine_takes_the_place_of_the_old_node() {
    let mut world = World::new();
    let old = world.node("a", 1, &["10.0.0.0/24"]);
    world.announce(old, 1, 1, "10.0.0.0/24");
    let replace = Some("a".parse::<NodeName>().unwrap());
    let allowed_prefixes = vec![net("10.0.0.0/24")];
    let token = world.token(TokenTerms { replace, allowed_prefixes, ..terms() });
    let new = world.join(token, "a", 2).unwrap().node_id;
    assert!(matches!(world.registry.member(old), Err(Refusal::NodeRemoved { .. })));
    world.open(new);
    assert!(world.announce(new, 2, 1, "10.0.0.0/24").is_empty());
    assert_eq!(world.holder("10.0.0.0/24"), Some(new));
    // Replacing a node that does not exist is an ordinary join.
    let replace = Some("gone".parse::<NodeName>().unwrap());
    let token = world.token(TokenTerms { replace, ..terms() });
    world.join(token, "gone", 3).unwrap();
}

#[test]
fn a_removed_identity_never_joins_again() {
    let mut world = World::new();
    let node = world.node("a", 1, &[]);
    let tombstone = world.registry.remove(node, "test", &world.sessions, world.now).unwrap();
    world.commit();
    let key = AUTHORITY.public_key();
    assert_eq!(signed::tombstone(Some(&tombstone), key).unwrap().node_id, node);
    world.reload();
    let token = world.token(terms());
    assert!(matches!(world.join(token, "b", 1), Err(Refusal::IdentityRemoved { .. })));
    world.join(token, "a", 2).unwrap();
}

#[test]
fn a_second_claim_is_withheld_and_both_operators_see_why() {
    let mut world = World::new();
    let (a, b) = (world.node("a", 1, &["10.0.0.0/8"]), world.node("b", 2, &["10.0.0.0/8"]));
    assert!(world.announce(a, 1, 1, "10.1.0.0/16").is_empty());
    for (generation, claim) in ["10.1.0.0/16", "10.1.2.0/24", "10.0.0.0/8"].iter().enumerate() {
        let reasons = world.announce(b, 2, 1 + generation as u64, claim);
        assert!(reasons[0].contains("`a`") && reasons[0].contains("`b`"), "{reasons:?}");
        assert!(world.problems(a).contains(&reasons[0]));
        assert!(world.problems(b).contains(&reasons[0]));
        assert_eq!(world.holder("10.1.0.0/16"), Some(a));
    }
    // A claim that was given up causes no problem any more.
    world.announce(b, 2, 9, "10.2.0.0/16");
    assert_eq!(world.holder("10.2.0.0/16"), Some(b));
    assert!(world.problems(b).is_empty() && world.problems(a).is_empty());
}

#[test]
fn a_nested_prefix_stands_where_its_own_grant_names_it() {
    let mut world = World::new();
    let wide = world.node("wide", 1, &["10.0.0.0/8"]);
    let nested = world.node("nested", 2, &["10.1.0.0/16"]);
    assert!(world.announce(wide, 1, 1, "10.0.0.0/8").is_empty());
    assert!(world.announce(nested, 2, 1, "10.1.0.0/16").is_empty());
    // A part of a granted prefix does not count as named by the grant.
    assert_eq!(world.announce(nested, 2, 2, "10.1.2.0/24").len(), 1);
    // The order does not matter.
    let other = world.node("other", 3, &["10.1.0.0/16", "10.1.3.0/24"]);
    assert!(world.announce(other, 3, 1, "10.1.3.0/24").is_empty());
    assert!(world.announce(nested, 2, 3, "10.1.0.0/16").is_empty());
}

#[test]
fn a_node_that_stays_away_yields_its_prefix_and_gets_it_back_when_it_is_free() {
    let mut world = World::new();
    let (a, b) = (world.node("a", 1, &["10.0.0.0/8"]), world.node("b", 2, &["10.0.0.0/8"]));
    world.announce(a, 1, 1, "10.1.0.0/16");
    world.close(a);
    world.advance(LEASE / 2);
    assert_eq!(world.announce(b, 2, 1, "10.1.0.0/16").len(), 1, "not offline for long enough");
    let before = world.registry.revision();
    world.advance(LEASE);
    assert_eq!(world.holder("10.1.0.0/16"), Some(b), "taken over by the periodic work");
    assert!(world.registry.revision() > before, "watchers receive the change");
    assert!(world.problems(a)[0].contains("offline"));

    world.open(a);
    assert_eq!(world.announce(a, 1, 1, "10.1.0.0/16").len(), 1, "b is there now");
    world.registry.remove(b, "test", &world.sessions, world.now).unwrap();
    world.commit();
    assert_eq!(world.holder("10.1.0.0/16"), Some(a));
    assert!(world.problems(a).is_empty());
}

#[test]
fn the_pod_networks_of_a_dead_node_follow_to_the_one_that_kubernetes_gives_them_to() {
    let mut world = World::new();
    let pods = ["10.244.0.0/16", "fd10:244::/48"];
    let (dead, heir) = (world.node("dead", 1, &pods), world.node("heir", 2, &pods));
    let given = [net("10.244.1.0/24"), net("fd10:244:0:1::/64")];
    assert!(world.publish(dead, 1, 1, &given).unwrap().withheld.is_empty());
    // Kubernetes may reassign the networks before the lease ends, even while the node is online.
    assert_eq!(world.publish(heir, 2, 1, &given).unwrap().withheld.len(), 2);
    world.close(dead);
    world.advance(LEASE / 2);
    assert_eq!(world.holder("10.244.1.0/24"), Some(dead));
    world.advance(LEASE);
    for network in ["10.244.1.0/24", "fd10:244:0:1::/64"] {
        assert_eq!(world.holder(network), Some(heir), "without another publication");
    }
    assert!(world.problems(heir).iter().all(|line| line.contains("had been offline")));
    // The node comes back with its old networks, and then publishes its new ones.
    world.open(dead);
    let refused = world.publish(dead, 1, 2, &given).unwrap().withheld;
    assert!(refused.iter().all(|withheld| withheld.reason.contains("`heir`")), "{refused:?}");
    assert_eq!(world.announce(dead, 1, 3, "10.244.7.0/24"), Vec::<String>::new());
    // A network that only overlaps one of another node is withheld too.
    let reasons = world.announce(dead, 1, 4, "10.244.0.0/20");
    assert!(reasons[0].contains("`heir`"), "{reasons:?}");
}

#[test]
fn prefixes_that_cannot_be_announced_are_refused() {
    let mut world = World::new();
    for bad in ["198.19.0.0/25", "fd00:7::/80", "127.0.0.0/8", "ff02::/16", "169.254.1.0/24"] {
        let terms = TokenTerms { allowed_prefixes: vec![net(bad)], ..terms() };
        let hash = SecretHash::of(&SECRET);
        let made = world.registry.create_token(TokenId([250; 8]), hash, terms, 1, world.now);
        assert!(matches!(made, Err(Refusal::Unusable(_))), "{bad}");
    }
    let node = world.node("a", 1, &["0.0.0.0/0"]);
    for (generation, bad) in
        ["0.0.0.0/0", "198.18.0.0/15", "224.0.0.0/8", "126.0.0.0/7"].iter().enumerate()
    {
        assert_eq!(world.announce(node, 1, 1 + generation as u64, bad).len(), 1, "{bad}");
    }
    assert!(world.announce(node, 1, 9, "10.0.0.0/8").is_empty());
    let outside = world.publish(node, 1, 10, &[net("2001:db8::/32")]);
    assert!(matches!(outside, Err(Refusal::NotGranted(_))));
}

#[test]
fn generations_grow_and_the_same_record_is_no_change() {
    let mut world = World::new();
    let node = world.node("a", 1, &["10.0.0.0/8"]);
    let first = world.publish(node, 1, 5, &[]).unwrap();
    assert_eq!(world.publish(node, 1, 5, &[]).unwrap(), first);
    let other = world.publish(node, 1, 5, &[net("10.0.0.0/8")]);
    assert!(matches!(other, Err(Refusal::GenerationReused { generation: 5 })));
    let behind = world.publish(node, 1, 4, &[]);
    assert!(matches!(behind, Err(Refusal::GenerationBehind { offered: 4, stored: 5 })));
    world.close(node);
    assert!(matches!(world.publish(node, 1, 6, &[]), Err(Refusal::NoSession)));
}

#[test]
fn an_ephemeral_node_goes_when_it_stays_away_and_others_never_do() {
    let mut world = World::new();
    let stays = world.node("stays", 1, &[]);
    let token = world.token(TokenTerms { ephemeral: true, uses: 2, ..terms() });
    let goes = world.join(token, "goes", 2).unwrap().node_id;
    let connected = world.join(token, "connected", 3).unwrap().node_id;
    world.open(connected);
    world.close(stays);
    world.advance(LEASE);
    assert!(world.registry.member(goes).is_ok());
    world.advance(Duration::from_secs(1));
    assert!(matches!(world.registry.member(goes), Err(Refusal::NodeRemoved { .. })));
    world.advance(LEASE * 100);
    assert!(world.registry.member(stays).is_ok());
    assert!(world.registry.member(connected).is_ok());
}

#[test]
fn a_restored_store_voids_open_tokens_and_begins_a_new_epoch() {
    let mut world = World::new();
    let started = world.registry.start(None);
    assert_eq!(started.starts, Starts { count: 1, epoch: 1 });
    assert!(!started.restored);
    let token = world.token(terms());
    world.commit();
    let node = world.node("a", 1, &[]);
    let backup = world.stored.clone();

    let tombstone = world.registry.remove(node, "test", &world.sessions, world.now).unwrap();
    let started = world.registry.start(Some(started.starts));
    assert!(!started.restored);
    world.commit();

    world.stored = backup;
    world.reload();
    assert!(world.registry.member(node).is_ok(), "the backup is older than the removal");
    let started = world.registry.start(Some(started.starts));
    assert!(started.restored);
    assert_eq!((started.starts.epoch, started.voided), (2, 2));
    assert!(matches!(world.join(token, "b", 2), Err(Refusal::TokenRevoked { .. })));

    let verified = signed::tombstone(Some(&tombstone), AUTHORITY.public_key()).unwrap();
    let known = vec![(verified, tombstone)];
    assert_eq!(world.registry.resync(known.clone(), &world.sessions, world.now), 1);
    assert_eq!(world.registry.resync(known, &world.sessions, world.now), 0);
    assert!(matches!(world.registry.member(node), Err(Refusal::NodeRemoved { .. })));
}

#[test]
fn the_overlay_ranges_stay_while_nodes_live_in_them() {
    let mut world = World::new();
    let change = |mesh: &mut MeshConfig| mesh.overlay_v4 = "198.18.0.0/16".parse().unwrap();
    world.registry.configure(change).unwrap();
    world.node("a", 1, &[]);
    let error = world.registry.configure(|mesh| {
        mesh.overlay_v4 = "198.19.0.0/16".parse().unwrap();
    });
    assert!(error.unwrap_err().to_string().contains("198.18.0.0/16"));
    let generation = world.registry.mesh().generation;
    world.registry.configure(|mesh| mesh.protected = vec![net("10.0.0.0/8")]).unwrap();
    assert_eq!(world.registry.mesh().generation, generation + 1);
    world.registry.configure(|_| {}).unwrap();
    assert_eq!(world.registry.mesh().generation, generation + 1);
}

#[test]
fn a_store_of_another_authority_or_with_altered_records_is_not_believed() {
    let mut world = World::new();
    world.node("a", 1, &[]);
    let load = |stored: BTreeMap<String, Vec<u8>>, authority: &Arc<Authority>| {
        let records = stored.into_iter().collect();
        Registry::load(authority.clone(), records, Now::read()).map(|_| ()).unwrap_err()
    };
    let root = tempfile::tempdir().unwrap();
    let other = Authority::load_or_create(&StateDir::new(root.path()), true, 0).unwrap();
    let error = load(world.stored.clone(), &Arc::new(other)).to_string();
    assert!(error.contains("different meshes"), "{error}");

    for key in world.stored.keys().filter(|key| key.starts_with("node/") || *key == "mesh") {
        let mut altered = world.stored.clone();
        altered.get_mut(key).unwrap()[40] ^= 1;
        let error = load(altered, &AUTHORITY).to_string();
        assert!(error.contains(key), "{error}");
    }
    let mut missing = world.stored.clone();
    missing.remove("mesh");
    assert!(load(missing, &AUTHORITY).to_string().contains("mesh"));
}

/// A random operation. Numbers select one of the existing nodes or tokens.
#[derive(Debug, Clone)]
enum Action {
    Token { uses: u32, replace: Option<u8>, ephemeral: bool, prefixes: Vec<u8> },
    Join { token: usize, name: u8, key: u8 },
    Open(usize),
    Close(usize),
    Publish { node: usize, prefixes: Vec<u8>, ahead: u64 },
    Remove(usize),
    Revoke(usize),
    Advance(u64),
    Restart,
}

fn action() -> impl Strategy<Value = Action> {
    let prefixes = || prop::collection::vec(0u8..6, 0..3);
    prop_oneof![
        (1u32..3, prop::option::of(0u8..5), any::<bool>(), prefixes()).prop_map(
            |(uses, replace, ephemeral, prefixes)| Action::Token {
                uses: if replace.is_some() { 1 } else { uses },
                replace,
                ephemeral,
                prefixes
            }
        ),
        (any::<usize>(), 0u8..5, 1u8..12).prop_map(|(token, name, key)| Action::Join {
            token,
            name,
            key
        }),
        any::<usize>().prop_map(Action::Open),
        any::<usize>().prop_map(Action::Close),
        (any::<usize>(), prefixes(), 0u64..3).prop_map(|(node, prefixes, ahead)| Action::Publish {
            node,
            prefixes,
            ahead
        }),
        any::<usize>().prop_map(Action::Remove),
        any::<usize>().prop_map(Action::Revoke),
        (1u64..900).prop_map(Action::Advance),
        Just(Action::Restart),
    ]
}

fn choice(number: u8) -> IpNet {
    let texts =
        ["10.0.0.0/8", "10.1.0.0/16", "10.1.0.0/16", "10.1.2.0/24", "10.2.0.0/16", "fd12::/32"];
    net(texts[usize::from(number) % texts.len()])
}

fn pick<T: Copy>(items: &[T], number: usize) -> Option<T> {
    (!items.is_empty()).then(|| items[number % items.len()])
}

impl World {
    fn apply_action(&mut self, action: &Action, keys: &mut BTreeMap<NodeId, u8>) {
        let nodes: Vec<NodeId> = self.registry.nodes.keys().copied().collect();
        let tokens: Vec<TokenId> = self.registry.tokens.keys().copied().collect();
        match action {
            Action::Token { uses, replace, ephemeral, prefixes } => {
                self.token(TokenTerms {
                    uses: *uses,
                    replace: replace.map(|name| format!("n{name}").parse().unwrap()),
                    ephemeral: *ephemeral,
                    allowed_prefixes: prefixes.iter().map(|number| choice(*number)).collect(),
                    ..terms()
                });
            }
            Action::Join { token, name, key } => {
                if let Some(token) = pick(&tokens, *token)
                    && let Ok(joined) = self.join(token, &format!("n{name}"), *key)
                {
                    keys.insert(joined.node_id, *key);
                }
            }
            Action::Open(node) => {
                if let Some(node) = pick(&nodes, *node) {
                    self.open(node);
                }
            }
            Action::Close(node) => {
                if let Some(node) = pick(&nodes, *node) {
                    self.close(node);
                }
            }
            Action::Publish { node, prefixes, ahead } => {
                if let Some(node) = pick(&nodes, *node) {
                    let member = &self.registry.nodes[&node];
                    let have = member.record.as_ref().map_or(0, |(record, _)| record.generation);
                    let prefixes: Vec<IpNet> = prefixes.iter().map(|n| choice(*n)).collect();
                    let _ = self.publish(node, keys[&node], have + ahead, &prefixes);
                }
            }
            Action::Remove(node) => {
                if let Some(node) = pick(&nodes, *node) {
                    self.registry.remove(node, "test", &self.sessions, self.now).unwrap();
                    self.commit();
                }
            }
            Action::Revoke(token) => {
                if let Some(token) = pick(&tokens, *token) {
                    self.registry.revoke_token(token).unwrap();
                    self.commit();
                }
            }
            Action::Advance(seconds) => self.advance(Duration::from_secs(*seconds)),
            Action::Restart => {
                self.reload();
                self.sessions = Sessions::new(Duration::from_secs(1));
            }
        }
    }

    fn check(&self) {
        let registry = &self.registry;
        let grants: Vec<_> = registry.nodes.values().map(|member| &member.grant).collect();
        let unique = |count: usize| assert_eq!(count, grants.len());
        unique(grants.iter().map(|g| &g.name).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| &g.identity_key).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| g.wireguard_keys[0]).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| g.overlay.v4).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| g.overlay.v6).collect::<BTreeSet<_>>().len());
        for grant in &grants {
            assert!(!registry.removed_identities.contains_key(&grant.identity_key));
            assert!(registry.mesh().overlay_v4.contains(&grant.overlay.v4));
            assert!(registry.mesh().overlay_v6.contains(&grant.overlay.v6));
        }

        // Announced prefixes in the map overlap only if the grant of the nested one names it.
        let mut announced = Vec::new();
        for member in registry.nodes.values() {
            let Some((record, _)) = &member.record else { continue };
            for prefix in record.prefixes.iter().filter(|p| !member.withheld.contains(p)) {
                announced.push((*prefix, &member.grant));
                assert_eq!(registry.claims.holder(prefix), Some(member.grant.node_id));
            }
        }
        for (i, (a, of_a)) in announced.iter().enumerate() {
            for (b, of_b) in &announced[i + 1..] {
                if of_a.node_id == of_b.node_id || !(a.contains(b) || b.contains(a)) {
                    continue;
                }
                assert_ne!(a, b);
                let (nested, of) = if a.contains(b) { (b, of_b) } else { (a, of_a) };
                assert!(of.allowed_prefixes.contains(nested), "{a} and {b}");
            }
        }

        // Store and map agree with the registry.
        let snapshot = registry.snapshot();
        let shown = Map::new();
        shown.apply(1, registry.revision(), snapshot.clone());
        assert_eq!(self.map.changes_after(0).0, shown.changes_after(0).0);
        let revisions: BTreeSet<u64> = snapshot.iter().map(MapChange::revision).collect();
        assert_eq!(revisions.len(), snapshot.len(), "each change has its own revision");
        assert!(revisions.last().is_none_or(|last| *last <= registry.revision()));
        let records = self.stored.clone().into_iter().collect();
        let loaded = Registry::load(AUTHORITY.clone(), records, self.now).unwrap();
        let again = Map::new();
        again.apply(1, loaded.revision(), loaded.snapshot());
        assert_eq!(again.changes_after(0).0, shown.changes_after(0).0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_invariants_hold_whatever_happens(actions in prop::collection::vec(action(), 1..60)) {
        let mut world = World::new();
        let mut keys = BTreeMap::new();
        let mut known: BTreeSet<NodeId> = BTreeSet::new();
        let mut revision = 0;
        for action in &actions {
            world.apply_action(action, &mut keys);
            world.check();
            prop_assert!(world.registry.revision() >= revision);
            revision = world.registry.revision();
            known.extend(world.registry.nodes.keys());
            for node in &known {
                let there = world.registry.nodes.contains_key(node);
                let removed = world.registry.removed_nodes.contains_key(node);
                prop_assert!(there != removed, "only a tombstone removes a node");
            }
        }
    }
}
