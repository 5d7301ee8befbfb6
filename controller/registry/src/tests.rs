//! Tests of the registry's operations, and of its invariants under random operations.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use proptest::prelude::*;
use towline_fixtures::node::{identity_key, mesh_config, net, nets, record};
use towline_types::id::{NodeId, NodeName, TokenId, WireguardKey};
use towline_types::node::{MeshConfig, Record, Tombstone};

use super::sessions::{Session, Sessions};
use super::token::{SecretHash, Token, TokenTerms};
use super::{
    Contents, Counters, CreateTokenError, Join, JoinError, Key, LoadError, Member, Mesh,
    NodeAbsent, Now, PublishError, Published, Registry, RemovedNode, Starts, Unsigned,
};

const SECRET: SecretHash = SecretHash([7; 32]);
const LEASE: Duration = Duration::from_secs(600);

/// Returns the current time on the monotonic clock, and a fixed time on the wall clock.
#[allow(clippy::disallowed_methods, reason = "a test has to start somewhere")]
pub(super) fn now() -> Now {
    Now { unix: 1_700_000_000, mono: Instant::now() }
}

fn config() -> MeshConfig {
    MeshConfig { overlay_v4: "198.19.0.0/24".parse().unwrap(), ..mesh_config() }
}

fn terms() -> TokenTerms {
    TokenTerms::once()
}

/// Copies of the stored values, as a store would have them.
#[derive(Debug, Default, Clone)]
struct Stored {
    counters: Counters,
    mesh: Option<Mesh>,
    members: BTreeMap<NodeId, Member>,
    removed_nodes: BTreeMap<NodeId, RemovedNode>,
    tokens: BTreeMap<TokenId, Token>,
}

impl Stored {
    fn store(&mut self, registry: &Registry, key: Key) {
        match key {
            Key::Counters => self.counters = registry.counters(),
            Key::Mesh => self.mesh = Some(registry.mesh().clone()),
            Key::LastSeen => {}
            Key::Node(id) => match registry.member(id) {
                Ok(member) => drop(self.members.insert(id, member.clone())),
                Err(_) => drop(self.members.remove(&id)),
            },
            Key::RemovedNode(id) => {
                let removed = registry.removed_node(id).unwrap().clone();
                self.removed_nodes.insert(id, removed);
            }
            Key::Token(id) => match registry.token(id) {
                Some(token) => drop(self.tokens.insert(id, token.clone())),
                None => drop(self.tokens.remove(&id)),
            },
        }
    }

    fn contents(&self, now: Now) -> Contents {
        let member = |member: &Member| Member { known_since: now.mono, ..member.clone() };
        Contents {
            counters: self.counters,
            mesh: self.mesh.clone().unwrap(),
            members: self.members.values().map(member).collect(),
            removed_nodes: self.removed_nodes.values().cloned().collect(),
            tokens: self.tokens.values().cloned().collect(),
        }
    }
}

/// A registry with a clock, sessions, and copies of what is stored and signed.
struct World {
    registry: Registry,
    sessions: Sessions,
    now: Now,
    stored: Stored,
    signed: BTreeSet<Unsigned>,
    drawn: u16,
}

impl World {
    fn new() -> Self {
        Self::of(config())
    }

    fn of(config: MeshConfig) -> Self {
        let mut world = Self {
            registry: Registry::create(config),
            sessions: Sessions::new(Duration::from_secs(1)),
            now: now(),
            stored: Stored::default(),
            signed: BTreeSet::new(),
            drawn: 0,
        };
        world.commit();
        world
    }

    fn draw(&mut self) -> [u8; 2] {
        self.drawn += 1;
        self.drawn.to_be_bytes()
    }

    /// Signs and stores the changes, as the writer does. Returns the stored keys.
    fn commit(&mut self) -> BTreeSet<Key> {
        let changes = self.registry.take_changes();
        self.signed.extend(changes.unsigned);
        for key in &changes.records {
            self.stored.store(&self.registry, *key);
        }
        changes.records
    }

    fn reload(&mut self) {
        self.registry = Registry::load(self.stored.contents(self.now)).unwrap();
    }

    fn token(&mut self, terms: TokenTerms) -> TokenId {
        let id = TokenId([self.draw(); 4].concat().try_into().unwrap());
        let expires = self.now.unix + 3600;
        self.registry.create_token(id, SECRET, terms, expires, self.now).unwrap();
        self.commit();
        id
    }

    /// Sends the join request of a machine whose keys are derived from `key`.
    fn join(&mut self, token: TokenId, name: &str, key: u16) -> Result<NodeId, JoinError> {
        let key: [u8; 32] = [key.to_be_bytes(); 16].concat().try_into().unwrap();
        let join = Join {
            token,
            secret_hash: SECRET,
            name: name.parse().unwrap(),
            identity_key: towline_types::id::IdentityKey(key),
            wireguard_key: WireguardKey(key),
            node_id: NodeId([self.draw(); 8].concat().try_into().unwrap()),
        };
        let joined = self.registry.join(&join, &self.sessions, self.now);
        self.commit();
        joined
    }

    /// Adds a node that may announce `allowed`, and opens its session.
    fn node(&mut self, name: &str, key: u16, allowed: &[&str]) -> NodeId {
        let token = self.token(TokenTerms { allowed_prefixes: nets(allowed), ..terms() });
        let node = self.join(token, name, key).unwrap();
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
        self.sessions.close(node, node.0, self.now);
    }

    /// Advances the clock. Connected nodes send a heartbeat.
    fn advance(&mut self, time: Duration) {
        let nodes = self.registry.members().map(|member| member.grant.node_id);
        let is_live = |node: &NodeId| self.sessions.live(*node, self.now).is_some();
        let connected: Vec<NodeId> = nodes.filter(is_live).collect();
        self.now = self.now.plus(time);
        for node in connected {
            self.sessions.renew(node, node.0, self.now);
        }
        self.registry.tick(&self.sessions, self.now);
        self.commit();
    }

    /// Publishes a record with these prefixes.
    fn publish(
        &mut self,
        node: NodeId,
        generation: u64,
        prefixes: &[IpNet],
    ) -> Result<Published, PublishError> {
        let grant = self.registry.member(node)?.grant.clone();
        let record = Record { generation, prefixes: prefixes.to_vec(), ..record(&grant) };
        self.publish_record(node, record)
    }

    fn publish_record(&mut self, node: NodeId, record: Record) -> Result<Published, PublishError> {
        let published = self.registry.publish(node, &node.0, record, &self.sessions, self.now);
        self.commit();
        published
    }

    fn announce(&mut self, node: NodeId, generation: u64, text: &str) -> Vec<String> {
        let published = self.publish(node, generation, &[net(text)]).unwrap();
        published.withheld.into_iter().map(|withheld| withheld.reason).collect()
    }

    fn remove(&mut self, node: NodeId) -> Tombstone {
        self.registry.remove(node, "test", &self.sessions, self.now).unwrap();
        self.commit();
        self.registry.removed_node(node).unwrap().tombstone.clone()
    }

    fn problems(&self, node: NodeId) -> Vec<String> {
        self.registry.problems(node)
    }

    fn holder(&self, prefix: &str) -> Option<NodeId> {
        self.registry.claims.holder(&net(prefix))
    }

    fn is_removed(&self, node: NodeId) -> bool {
        matches!(self.registry.member(node), Err(NodeAbsent::Removed { .. }))
    }
}

#[test]
fn a_token_admits_as_many_as_it_says_and_says_why_not_otherwise() {
    let mut world = World::new();
    let token = world.token(terms());
    world.join(token, "a", 1).unwrap();
    assert!(matches!(world.join(token, "b", 2), Err(JoinError::TokenUsed { .. })));

    let two = world.token(TokenTerms { uses: 2, ..terms() });
    world.join(two, "b", 2).unwrap();
    world.join(two, "c", 3).unwrap();
    assert!(matches!(world.join(two, "d", 4), Err(JoinError::TokenUsed { .. })));

    let unknown = world.join(TokenId([99; 8]), "d", 4);
    assert!(matches!(unknown, Err(JoinError::TokenUnknown(_))));

    let revoked = world.token(terms());
    world.registry.revoke_token(revoked).unwrap();
    assert!(matches!(world.join(revoked, "d", 4), Err(JoinError::TokenRevoked { .. })));

    let expired = world.token(terms());
    world.advance(Duration::from_secs(3600));
    assert!(matches!(world.join(expired, "d", 4), Err(JoinError::TokenExpired { .. })));

    let pattern = Some("worker-*".parse().unwrap());
    let workers = world.token(TokenTerms { name: pattern, ..terms() });
    assert!(matches!(world.join(workers, "d", 4), Err(JoinError::Name { .. })));
    world.join(workers, "worker-d", 4).unwrap();
}

#[test]
fn a_wrong_secret_is_refused_before_anything_is_told_about_the_token() {
    let mut world = World::new();
    let token = world.token(terms());
    world.join(token, "a", 1).unwrap();
    let join = Join {
        token,
        secret_hash: SecretHash([8; 32]),
        name: "b".parse().unwrap(),
        identity_key: identity_key(2),
        wireguard_key: WireguardKey([2; 32]),
        node_id: NodeId([200; 16]),
    };
    let refused = world.registry.join(&join, &world.sessions, world.now);
    assert!(matches!(refused, Err(JoinError::TokenSecret { .. })), "{refused:?}");
}

#[test]
fn a_join_whose_answer_was_lost_can_be_asked_again() {
    let mut world = World::new();
    let token = world.token(terms());
    let first = world.join(token, "a", 1).unwrap();
    world.advance(Duration::from_secs(7200));
    assert_eq!(world.join(token, "a", 1).unwrap(), first);
    assert_eq!(world.registry.members.len(), 1);
    // A request with another name or key is a different one.
    assert!(matches!(world.join(token, "b", 1), Err(JoinError::TokenUsed { .. })));
    assert!(matches!(world.join(token, "a", 2), Err(JoinError::TokenUsed { .. })));
}

#[test]
fn names_and_keys_are_unique_and_the_holder_learns_who_tried() {
    let mut world = World::new();
    let node = world.node("a", 1, &[]);
    let token = world.token(TokenTerms { uses: 9, ..terms() });
    assert!(matches!(world.join(token, "a", 2), Err(JoinError::NameTaken { .. })));
    assert!(matches!(world.join(token, "b", 1), Err(JoinError::IdentityTaken { .. })));
    let join = Join {
        token,
        secret_hash: SECRET,
        name: "b".parse().unwrap(),
        identity_key: identity_key(2),
        wireguard_key: WireguardKey([0, 1].repeat(16).try_into().unwrap()),
        node_id: NodeId([201; 16]),
    };
    let refused = world.registry.join(&join, &world.sessions, world.now);
    assert!(matches!(refused, Err(JoinError::WireguardKeyTaken { .. })), "{refused:?}");
    assert_eq!(world.problems(node).len(), 2);
    assert_eq!(world.registry.token(token).unwrap().used, 0, "a refused join consumes no use");
}

#[test]
fn a_reinstalled_machine_takes_the_place_of_the_old_node() {
    let mut world = World::new();
    let old = world.node("a", 1, &["10.0.0.0/24"]);
    world.announce(old, 1, "10.0.0.0/24");
    let replace = Some("a".parse::<NodeName>().unwrap());
    let allowed_prefixes = vec![net("10.0.0.0/24")];
    let token = world.token(TokenTerms { replace, allowed_prefixes, ..terms() });
    let new = world.join(token, "a", 2).unwrap();
    assert!(world.is_removed(old));
    world.open(new);
    assert!(world.announce(new, 1, "10.0.0.0/24").is_empty());
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
    assert_eq!(world.remove(node).node_id, node);
    assert!(world.signed.contains(&Unsigned::Tombstone(node)));
    world.reload();
    let token = world.token(terms());
    assert!(matches!(world.join(token, "b", 1), Err(JoinError::IdentityRemoved { .. })));
    world.join(token, "a", 2).unwrap();
}

#[test]
fn a_second_claim_is_withheld_and_both_operators_see_why() {
    let mut world = World::new();
    let (a, b) = (world.node("a", 1, &["10.0.0.0/8"]), world.node("b", 2, &["10.0.0.0/8"]));
    assert!(world.announce(a, 1, "10.1.0.0/16").is_empty());
    for (generation, claim) in ["10.1.0.0/16", "10.1.2.0/24", "10.0.0.0/8"].iter().enumerate() {
        let reasons = world.announce(b, 1 + generation as u64, claim);
        assert!(reasons[0].contains("`a`") && reasons[0].contains("`b`"), "{reasons:?}");
        assert!(world.problems(a).contains(&reasons[0]));
        assert!(world.problems(b).contains(&reasons[0]));
        assert_eq!(world.holder("10.1.0.0/16"), Some(a));
    }
    // A claim that was given up causes no problem any more.
    world.announce(b, 9, "10.2.0.0/16");
    assert_eq!(world.holder("10.2.0.0/16"), Some(b));
    assert!(world.problems(b).is_empty() && world.problems(a).is_empty());
}

#[test]
fn a_nested_prefix_stands_where_its_own_grant_names_it() {
    let mut world = World::new();
    let wide = world.node("wide", 1, &["10.0.0.0/8"]);
    let nested = world.node("nested", 2, &["10.1.0.0/16"]);
    assert!(world.announce(wide, 1, "10.0.0.0/8").is_empty());
    assert!(world.announce(nested, 1, "10.1.0.0/16").is_empty());
    // A part of a granted prefix does not count as named by the grant.
    assert_eq!(world.announce(nested, 2, "10.1.2.0/24").len(), 1);
    // The order does not matter.
    let other = world.node("other", 3, &["10.1.0.0/16", "10.1.3.0/24"]);
    assert!(world.announce(other, 1, "10.1.3.0/24").is_empty());
    assert!(world.announce(nested, 3, "10.1.0.0/16").is_empty());
}

#[test]
fn a_node_that_stays_away_yields_its_prefix_and_gets_it_back_when_it_is_free() {
    let mut world = World::new();
    let (a, b) = (world.node("a", 1, &["10.0.0.0/8"]), world.node("b", 2, &["10.0.0.0/8"]));
    world.announce(a, 1, "10.1.0.0/16");
    world.close(a);
    world.advance(LEASE / 2);
    assert_eq!(world.announce(b, 1, "10.1.0.0/16").len(), 1, "not offline for long enough");
    let before = world.registry.counters().revision;
    world.advance(LEASE);
    assert_eq!(world.holder("10.1.0.0/16"), Some(b), "taken over by the periodic work");
    assert!(world.registry.counters().revision > before, "watchers receive the change");
    assert!(world.problems(a)[0].contains("offline"));

    world.open(a);
    assert_eq!(world.announce(a, 1, "10.1.0.0/16").len(), 1, "b is there now");
    world.remove(b);
    assert_eq!(world.holder("10.1.0.0/16"), Some(a));
    assert!(world.problems(a).is_empty());
}

#[test]
fn the_pod_networks_of_a_dead_node_follow_to_the_one_that_kubernetes_gives_them_to() {
    let mut world = World::new();
    let pods = ["10.244.0.0/16", "fd10:244::/48"];
    let (dead, heir) = (world.node("dead", 1, &pods), world.node("heir", 2, &pods));
    let given = [net("10.244.1.0/24"), net("fd10:244:0:1::/64")];
    assert!(world.publish(dead, 1, &given).unwrap().withheld.is_empty());
    // Kubernetes may reassign the networks before the lease ends, even while the node is online.
    assert_eq!(world.publish(heir, 1, &given).unwrap().withheld.len(), 2);
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
    let refused = world.publish(dead, 2, &given).unwrap().withheld;
    assert!(refused.iter().all(|withheld| withheld.reason.contains("`heir`")), "{refused:?}");
    assert_eq!(world.announce(dead, 3, "10.244.7.0/24"), Vec::<String>::new());
    // A network that only overlaps one of another node is withheld too.
    let reasons = world.announce(dead, 4, "10.244.0.0/20");
    assert!(reasons[0].contains("`heir`"), "{reasons:?}");
}

#[test]
fn prefixes_that_cannot_be_announced_are_refused() {
    let mut world = World::new();
    for bad in ["198.19.0.0/25", "fd00:7::/80", "127.0.0.0/8", "ff02::/16", "169.254.1.0/24"] {
        let terms = TokenTerms { allowed_prefixes: vec![net(bad)], ..terms() };
        let made = world.registry.create_token(TokenId([250; 8]), SECRET, terms, 1, world.now);
        assert!(matches!(made, Err(CreateTokenError::Unusable(_))), "{bad}");
    }
    let node = world.node("a", 1, &["0.0.0.0/0"]);
    for (generation, bad) in
        ["0.0.0.0/0", "198.18.0.0/15", "224.0.0.0/8", "126.0.0.0/7"].iter().enumerate()
    {
        assert_eq!(world.announce(node, 1 + generation as u64, bad).len(), 1, "{bad}");
    }
    assert!(world.announce(node, 9, "10.0.0.0/8").is_empty());
    let outside = world.publish(node, 10, &[net("2001:db8::/32")]);
    assert!(matches!(outside, Err(PublishError::NotGranted(_))));
}

#[test]
fn generations_grow_and_the_same_record_is_no_change() {
    let mut world = World::new();
    let node = world.node("a", 1, &["10.0.0.0/8"]);
    let first = world.publish(node, 5, &[]).unwrap();
    let again = world.publish(node, 5, &[]).unwrap();
    assert_eq!(again, Published { is_stored: false, ..first });
    let other = world.publish(node, 5, &[net("10.0.0.0/8")]);
    assert!(matches!(other, Err(PublishError::GenerationReused { generation: 5 })));
    let behind = world.publish(node, 4, &[]);
    assert!(matches!(behind, Err(PublishError::GenerationBehind { offered: 4, stored: 5 })));
    world.close(node);
    assert!(matches!(world.publish(node, 6, &[]), Err(PublishError::NoSession)));
}

#[test]
fn an_ephemeral_node_goes_when_it_stays_away_and_others_never_do() {
    let mut world = World::new();
    let stays = world.node("stays", 1, &[]);
    let token = world.token(TokenTerms { ephemeral: true, uses: 2, ..terms() });
    let goes = world.join(token, "goes", 2).unwrap();
    let connected = world.join(token, "connected", 3).unwrap();
    world.open(connected);
    world.close(stays);
    world.advance(LEASE);
    assert!(world.registry.member(goes).is_ok());
    world.advance(Duration::from_secs(1));
    assert!(world.is_removed(goes));
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

    let tombstone = world.remove(node);
    let started = world.registry.start(Some(started.starts));
    assert!(!started.restored);
    world.commit();

    world.stored = backup;
    world.reload();
    assert!(world.registry.member(node).is_ok(), "the backup is older than the removal");
    let started = world.registry.start(Some(started.starts));
    assert!(started.restored);
    assert_eq!((started.starts.epoch, started.voided), (2, 2));
    assert!(matches!(world.join(token, "b", 2), Err(JoinError::TokenRevoked { .. })));

    let known = vec![tombstone];
    assert_eq!(world.registry.resync(known.clone(), &world.sessions, world.now), 1);
    assert_eq!(world.registry.resync(known, &world.sessions, world.now), 0);
    assert!(world.is_removed(node));
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
    let generation = world.registry.mesh().config.generation;
    world.registry.configure(|mesh| mesh.protected = vec![net("10.0.0.0/8")]).unwrap();
    assert_eq!(world.registry.mesh().config.generation, generation + 1);
    world.registry.configure(|_| {}).unwrap();
    assert_eq!(world.registry.mesh().config.generation, generation + 1);
}

#[test]
fn stored_values_that_contradict_each_other_are_refused() {
    let mut world = World::new();
    let node = world.node("a", 1, &["10.0.0.0/8"]);
    world.publish(node, 1, &[net("10.0.0.0/8")]).unwrap();
    let good = world.stored.contents(world.now);
    assert!(Registry::load(good.clone()).is_ok());

    let mut twice = good.clone();
    let mut copy = twice.members[0].clone();
    copy.grant.node_id = NodeId([9; 16]);
    copy.record = None;
    twice.members.push(copy);
    assert_eq!(Registry::load(twice).err(), Some(LoadError::NotUnique(NodeId([9; 16]))));

    let mut foreign = good;
    foreign.members[0].grant.allowed_prefixes.clear();
    assert!(matches!(Registry::load(foreign), Err(LoadError::NotGranted(_))));
}

#[test]
fn a_record_of_which_only_the_generation_is_new_is_no_change_of_the_map() {
    let mut world = World::new();
    let node = world.node("a", 1, &["10.0.0.0/8"]);
    let first = world.publish(node, 1, &[net("10.1.0.0/16")]).unwrap();
    let refreshed = world.publish(node, 2, &[net("10.1.0.0/16")]).unwrap();
    assert_eq!(refreshed, first, "with the same revision");
    world.reload();
    let behind = world.publish(node, 1, &[]);
    assert!(matches!(behind, Err(PublishError::GenerationBehind { stored: 2, .. })), "{behind:?}");
    // The number of the agent's start matters to its peers.
    let grant = world.registry.member(node).unwrap().grant.clone();
    let prefixes = vec![net("10.1.0.0/16")];
    let restarted = Record { generation: 3, boot_epoch: 2, prefixes, ..record(&grant) };
    assert!(world.publish_record(node, restarted).unwrap().revision > first.revision);
}

#[test]
fn last_seen_is_stored_at_most_once_a_minute_and_a_session_writes_nothing_else() {
    let mut world = World::new();
    let node = world.node("a", 1, &[]);
    let mut written = 0;
    for _ in 0..24 {
        world.close(node);
        world.now = world.now.plus(Duration::from_secs(5));
        world.open(node);
        world.registry.tick(&world.sessions, world.now);
        let keys = world.commit();
        assert!(keys.iter().all(|key| matches!(key, Key::LastSeen | Key::Counters)), "{keys:?}");
        written += usize::from(keys.contains(&Key::LastSeen));
    }
    assert_eq!(written, 2, "in two minutes");
    assert_eq!(world.sessions.all_last_seen(world.now)[&node], world.now.unix);
}

/// Returns the numbers of nodes that a join, a changed record, an equal one, a withheld claim and a
/// removal read or write in a mesh of `size` nodes.
fn cost(size: u16) -> Vec<u64> {
    let overlay_v4 = "198.18.0.0/16".parse().unwrap();
    let mut world = World::of(MeshConfig { overlay_v4, ..mesh_config() });
    let prefixes = nets(&["10.0.0.0/8"]);
    let token = world.token(TokenTerms {
        uses: u32::from(size) + 9,
        allowed_prefixes: prefixes,
        ..terms()
    });
    let block = |number: u16| {
        let [high, low] = number.to_be_bytes();
        IpNet::new([10, high, low, 0].into(), 24).unwrap()
    };
    let add = |world: &mut World, number: u16| {
        let node = world.join(token, &format!("n{number}"), number).unwrap();
        world.open(node);
        world.publish(node, 1, &[block(number)]).unwrap();
        node
    };
    let first = add(&mut world, 1);
    for number in 2..=size {
        add(&mut world, number);
    }
    let mut costs = Vec::new();
    let mut measure = |world: &mut World, work: &mut dyn FnMut(&mut World)| {
        let before = world.registry.touched();
        work(world);
        costs.push(world.registry.touched() - before);
    };
    let mut last = None;
    measure(&mut world, &mut |world| last = Some(add(world, size + 1)));
    let last = last.unwrap();
    measure(&mut world, &mut |world| drop(world.publish(last, 2, &[block(size + 2)])));
    measure(&mut world, &mut |world| drop(world.publish(last, 3, &[block(size + 2)])));
    measure(&mut world, &mut |world| drop(world.publish(last, 4, &[block(1)])));
    measure(&mut world, &mut |world| drop(world.remove(first)));
    costs
}

#[test]
fn the_cost_of_a_change_does_not_grow_with_the_mesh() {
    let small = cost(20);
    assert_eq!(cost(500), small);
    assert!(small.iter().all(|touched| *touched < 40), "{small:?}");
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
    fn apply_action(&mut self, action: &Action) {
        let nodes: Vec<NodeId> =
            self.registry.members().map(|member| member.grant.node_id).collect();
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
                if let Some(token) = pick(&tokens, *token) {
                    let _ = self.join(token, &format!("n{name}"), u16::from(*key));
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
                    let member = self.registry.member(node).unwrap();
                    let have = member.record.as_ref().map_or(0, |record| record.generation);
                    let prefixes: Vec<IpNet> = prefixes.iter().map(|n| choice(*n)).collect();
                    let _ = self.publish(node, have + ahead, &prefixes);
                }
            }
            Action::Remove(node) => {
                if let Some(node) = pick(&nodes, *node) {
                    self.remove(node);
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
        let grants: Vec<_> = registry.members().map(|member| &member.grant).collect();
        let unique = |count: usize| assert_eq!(count, grants.len());
        unique(grants.iter().map(|g| &g.name).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| &g.identity_key).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| g.wireguard_keys[0]).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| g.overlay.v4).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| g.overlay.v6).collect::<BTreeSet<_>>().len());
        for grant in &grants {
            assert!(!registry.removed_identities.contains_key(&grant.identity_key));
            assert!(registry.mesh().config.overlay_v4.contains(&grant.overlay.v4));
            assert!(registry.mesh().config.overlay_v6.contains(&grant.overlay.v6));
        }

        // Announced prefixes in the map overlap only if the grant of the nested one names it.
        let mut announced = Vec::new();
        for member in registry.members() {
            let Some(record) = &member.record else { continue };
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

        // What is stored is what is in the registry, and everything that the CA must sign was given
        // out to be signed.
        let mut revisions = BTreeSet::from([registry.mesh().revision]);
        let mut count = 1;
        for member in registry.members() {
            let id = member.grant.node_id;
            let stored = self.stored.members[&id].clone();
            assert_eq!(Member { known_since: member.known_since, ..stored }, *member);
            assert!(self.signed.contains(&Unsigned::Grant(id)));
            revisions.insert(member.revision);
            count += 1;
        }
        for removed in registry.removed_nodes() {
            let id = removed.tombstone.node_id;
            assert_eq!(self.stored.removed_nodes.get(&id), Some(removed));
            assert!(self.signed.contains(&Unsigned::Tombstone(id)));
            revisions.insert(removed.revision);
            count += 1;
        }
        assert_eq!(self.stored.members.len(), registry.members.len());
        assert!(registry.tokens().eq(self.stored.tokens.values()));
        assert_eq!(self.stored.counters, registry.counters());
        assert_eq!(revisions.len(), count, "each change has its own revision");
        assert!(revisions.last().is_none_or(|last| *last <= registry.counters().revision));
        let loaded = Registry::load(self.stored.contents(self.now)).unwrap();
        for node in registry.members().map(|member| member.grant.node_id) {
            assert_eq!(loaded.claims.held_by(node), registry.claims.held_by(node));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_invariants_hold_whatever_happens(actions in prop::collection::vec(action(), 1..60)) {
        let mut world = World::new();
        let mut known: BTreeSet<NodeId> = BTreeSet::new();
        let mut revision = 0;
        for action in &actions {
            world.apply_action(action);
            world.check();
            prop_assert!(world.registry.counters().revision >= revision);
            revision = world.registry.counters().revision;
            known.extend(world.registry.members().map(|member| member.grant.node_id));
            for node in &known {
                let there = world.registry.members.contains(*node);
                let removed = world.registry.removed_nodes.contains_key(node);
                prop_assert!(there != removed, "only a tombstone removes a node");
            }
        }
    }
}
