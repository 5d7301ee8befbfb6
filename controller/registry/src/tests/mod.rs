//! Tests of the registry: a registry with its store, which the test modules drive.

mod admins;
mod cost;
mod invariants;
mod join;
mod lifecycle;
mod publish;
mod readmit;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_fixtures::node::{identity_key, mesh_config, net, nets, record};
use towline_types::id::{IdentityKey, MeshId, NodeId, NodeName, TokenId, WireguardKey};
use towline_types::node::{Head, MeshConfig, Record, RelayRole, SharedPrefix, Tombstone};
use towline_types::pod_range::PodRange;

use super::sessions::{Session, Sessions};
use super::token::{SecretHash, Token, TokenTerms};
use super::{
    Admin, Contents, Counters, CreateTokenError, Difference, Join, JoinError, Key, LoadError,
    Member, Mesh, NodeAbsent, Now, PublishError, Published, Refreshed, Registry, RemovedNode,
    Starts, Unsigned,
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
    admins: BTreeMap<IdentityKey, Admin>,
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
            Key::Admin(key) => match registry.admin(key) {
                Some(admin) => drop(self.admins.insert(key, admin.clone())),
                None => drop(self.admins.remove(&key)),
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
            admins: self.admins.values().cloned().collect(),
        }
    }
}

impl Stored {
    /// Returns the records that changed since `before`. A removed node has a tombstone, and its deleted record is
    /// not listed.
    fn since(&self, before: &Self, now: Now) -> Refreshed {
        let member = |member: &Member| Member { known_since: now.mono, ..member.clone() };
        let is_new = |id: &NodeId, member: &Member| before.members.get(id) != Some(member);
        let gone = before.tokens.keys().filter(|id| !self.tokens.contains_key(*id));
        let changed =
            self.tokens.iter().filter(|(id, token)| before.tokens.get(*id) != Some(*token));
        let tokens = changed.map(|(id, token)| (*id, Some(token.clone())));
        Refreshed {
            counters: Some(self.counters),
            mesh: self.mesh.clone().filter(|mesh| before.mesh.as_ref() != Some(mesh)),
            members: self
                .members
                .iter()
                .filter(|(id, member)| is_new(id, member))
                .map(|(_, found)| member(found))
                .collect(),
            absent: Vec::new(),
            removed_nodes: self
                .removed_nodes
                .iter()
                .filter(|(id, _)| !before.removed_nodes.contains_key(*id))
                .map(|(_, removed)| removed.clone())
                .collect(),
            tokens: tokens.chain(gone.map(|id| (*id, None))).collect(),
            admins: self.admins.iter().map(|(key, admin)| (*key, Some(admin.clone()))).collect(),
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
        let address = ([192, 0, 2, 1], 1000).into();
        let session = Session::new(node.0, vec![1], address, self.now);
        self.sessions.open(node, session, self.now).unwrap();
    }

    fn close(&mut self, node: NodeId) {
        self.sessions.close(node, node.0, self.now);
    }

    /// Advances the clock, in steps as the periodic work does. Connected nodes send a heartbeat in each.
    fn advance(&mut self, time: Duration) {
        /// Longest step, so that the controller does not seem to have been stopped.
        const STEP: Duration = Duration::from_secs(20);
        let mut left = time;
        while !left.is_zero() {
            let step = left.min(STEP);
            self.step(step);
            left -= step;
        }
    }

    fn step(&mut self, time: Duration) {
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
        let stored = self.registry.member(node)?.record.as_ref();
        let difference = match stored {
            Some(stored) if *stored == record => Difference::Nothing,
            Some(stored)
                if *stored == Record { generation: stored.generation, ..record.clone() } =>
            {
                Difference::Generation
            }
            _ => Difference::Content,
        };
        let (sessions, now) = (&self.sessions, self.now);
        let published = self.registry.publish(node, &node.0, record, difference, sessions, now);
        self.commit();
        published
    }

    fn announce(&mut self, node: NodeId, generation: u64, text: &str) -> Vec<String> {
        let published = self.publish(node, generation, &[net(text)]).unwrap();
        published.withheld.into_iter().map(|withheld| withheld.reason.to_string()).collect()
    }

    fn remove(&mut self, node: NodeId) -> Tombstone {
        self.registry.remove(node, "test", &self.sessions, self.now).unwrap();
        self.commit();
        self.registry.removed_node(node).unwrap().tombstone.clone()
    }

    fn problems(&self, node: NodeId) -> Vec<String> {
        self.registry.problems(node).iter().map(ToString::to_string).collect()
    }

    fn holder(&self, prefix: &str) -> Option<NodeId> {
        self.registry.claims.holder(&net(prefix))
    }

    fn is_removed(&self, node: NodeId) -> bool {
        matches!(self.registry.member(node), Err(NodeAbsent::Removed { .. }))
    }
}
