//! The registry: the nodes of the mesh, the tokens to join it, and the rules for both.
//!
//! All functions take `now` as an argument. This module reads no clock, draws no randomness, does
//! no I/O and knows no RPC, since more than one wire API will be served over it; it uses the schema's
//! messages for signed statements, map entries and tokens. An operation checks everything before it
//! changes anything, so a refused one changes no stored state; it may add a problem for the operator.
//! Changes are
//! collected, and returned by [`Registry::take_changes`] to be stored and then published.
//!
//! # Invariants
//!
//! - No two nodes share a name, an identity key, a WireGuard key or an overlay address.
//! - No two nodes hold the same or an overlapping prefix, unless the grant of the one that holds
//!   the nested prefix names exactly that prefix. What a record claims beyond that is withheld.
//! - The identity key of a removed node can never join again; a tombstone is never deleted.
//! - Revisions only grow, and each change of a node, a tombstone or the mesh has its own.
//! - A node is removed by an operator, by itself, or by a machine that replaces it. An ephemeral
//!   node is also removed when it is offline for longer than the lease.

mod address;
mod claims;
mod join;
mod load;
mod publish;
mod refusal;
pub mod sessions;
mod stored;
pub mod token;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use prost::Message;
use prost::bytes::Bytes;
use towline_proto::id::{IdentityKey, NodeId, NodeName, TokenId, WireguardKey};
use towline_proto::node::{Grant, MeshConfig, Record, Tombstone};
use towline_proto::{limits, ownership, pb};

use crate::authority::Authority;
use crate::clock::Now;
use crate::state_dir::Starts;

use claims::Claims;
pub use join::{Join, Joined};
pub use load::LoadError;
pub use publish::{Published, Withheld};
pub use refusal::Refusal;
use sessions::Sessions;
use token::{SecretHash, Token, TokenTerms};

/// Largest number of tokens, including those that are not open any more.
const TOKENS: usize = 10_000;
/// Time in seconds for which a token is still listed after its expiry.
const TOKEN_KEPT: i64 = 7 * 24 * 3600;

/// Complete state of the registry.
pub struct Registry {
    authority: Arc<Authority>,
    mesh: Mesh,
    /// Epoch of the map. It grows when the store was restored from a backup.
    epoch: u64,
    /// Revision of the newest change.
    revision: u64,
    /// Number of starts of the controller.
    starts: u64,
    /// Offset of the last assigned IPv4 address in the overlay range.
    v4_cursor: u32,
    nodes: BTreeMap<NodeId, Member>,
    names: BTreeMap<NodeName, NodeId>,
    identities: BTreeMap<IdentityKey, NodeId>,
    wireguard_keys: BTreeMap<WireguardKey, NodeId>,
    overlay_v4: BTreeMap<Ipv4Addr, NodeId>,
    overlay_v6: BTreeMap<Ipv6Addr, NodeId>,
    claims: Claims,
    removed_nodes: BTreeMap<NodeId, RemovedNode>,
    removed_identities: BTreeMap<IdentityKey, NodeId>,
    tokens: BTreeMap<TokenId, Token>,
    problems: BTreeMap<NodeId, VecDeque<Problem>>,
    /// Records that changed since the last [`Registry::take_changes`].
    dirty: BTreeSet<Key>,
    /// Revision up to which changes were taken for the watchers.
    taken: u64,
    /// Events since the last [`Registry::take_changes`].
    events: Vec<Event>,
}

/// Configuration of the mesh.
struct Mesh {
    config: MeshConfig,
    signed: pb::Signed,
    revision: u64,
}

/// A node of the mesh.
pub struct Member {
    /// Grant of the node.
    pub grant: Grant,
    /// The grant, as the CA signed it.
    pub signed_grant: pb::Signed,
    /// Newest record of the node, parsed and as the node signed it; `None` until it published one.
    pub record: Option<(Record, pb::Signed)>,
    /// Prefixes of the record that are withheld from the map.
    pub withheld: Vec<IpNet>,
    /// Revision of the last change that watchers see.
    pub revision: u64,
    /// Id of the token that the node joined with.
    pub token: TokenId,
    /// Time of the join, in seconds since 1970.
    pub joined_at: i64,
    /// Time of the last publication or of the end of the last session, in seconds since 1970; 0 if
    /// there was none.
    pub last_seen: i64,
    /// Monotonic time from which on the node is offline, unless it has a session: the end of its
    /// last session, or its join or the start of this process if there was none since.
    seen: Instant,
}

/// A removed node.
struct RemovedNode {
    tombstone: Tombstone,
    signed: pb::Signed,
    revision: u64,
}

/// A problem of a node, for its operator.
struct Problem {
    /// Claim that causes the problem. The problem is removed when the claim is settled.
    about: Option<(NodeId, IpNet)>,
    text: String,
}

/// Key of a stored record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Meta,
    Mesh,
    Node(NodeId),
    RemovedNode(NodeId),
    Token(TokenId),
}

/// Changes since the previous [`Registry::take_changes`].
#[derive(Debug, Default)]
pub struct Changes {
    /// Writes to the store: a key and its new value, or `None` to remove it.
    pub writes: Vec<(String, Option<Vec<u8>>)>,
    /// Changes that watchers see, sorted by revision.
    pub map: Vec<MapChange>,
    /// Events to log.
    pub events: Vec<Event>,
}

/// A change of the network map.
#[derive(Debug, Clone)]
pub enum MapChange {
    /// A node was added or changed.
    Node {
        /// Revision of the change.
        revision: u64,
        /// Id of the node.
        id: NodeId,
        /// Name of the node.
        name: NodeName,
        /// Identity key of the node.
        identity: IdentityKey,
        /// Map entry that watchers see.
        entry: pb::Entry,
    },
    /// A node was removed.
    Removed {
        /// Revision of the change.
        revision: u64,
        /// Id of the node.
        id: NodeId,
        /// Name of the node.
        name: NodeName,
        /// Tombstone, as the CA signed it.
        tombstone: pb::Signed,
    },
    /// The mesh configuration changed.
    Mesh {
        /// Revision of the change.
        revision: u64,
        /// Configuration, as the CA signed it.
        signed: pb::Signed,
    },
}

/// Event that an operator would notice. It is logged once it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A node joined.
    Joined {
        /// Name of the node.
        name: NodeName,
        /// Id of the node.
        node: NodeId,
        /// Id of the token that it joined with.
        token: TokenId,
    },
    /// A node was removed.
    Removed {
        /// Name of the node.
        name: NodeName,
        /// Id of the node.
        node: NodeId,
        /// Reason, for the log.
        why: &'static str,
    },
    /// A prefix moved from an offline node to a connected one.
    PrefixMoved {
        /// Prefix that the new holder claimed.
        prefix: IpNet,
        /// Name of the previous holder.
        from: NodeName,
        /// Name of the new holder.
        to: NodeName,
    },
    /// A token was created.
    TokenCreated {
        /// Id of the token.
        token: TokenId,
    },
    /// A token was revoked.
    TokenRevoked {
        /// Id of the token.
        token: TokenId,
    },
}

/// Status of a node, for operators.
pub struct NodeStatus<'a> {
    /// Node that the status describes.
    pub member: &'a Member,
    /// Source address of its live session; `None` if it is offline.
    pub session: Option<std::net::SocketAddr>,
    /// Time of its last session in seconds since 1970; the current time if it is online.
    pub last_seen: i64,
    /// Problems of the node, newest first.
    pub problems: Vec<String>,
}

/// Result of counting a start of the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// Counters to write to the file `starts`, once they are in the store.
    pub starts: Starts,
    /// True if the store was behind the file: it was restored from a backup.
    pub restored: bool,
    /// Number of tokens that were revoked for that reason.
    pub voided: usize,
}

impl Registry {
    /// Creates an empty registry for a new mesh.
    pub fn create(authority: Arc<Authority>, config: MeshConfig) -> Self {
        let signed = authority.sign_mesh(&config);
        let mut registry = Self::empty(authority, Mesh { config, signed, revision: 0 });
        registry.epoch = 1;
        registry.mesh.revision = registry.next_revision();
        registry.dirty.insert(Key::Mesh);
        registry
    }

    fn empty(authority: Arc<Authority>, mesh: Mesh) -> Self {
        Self {
            authority,
            mesh,
            epoch: 0,
            revision: 0,
            starts: 0,
            v4_cursor: 0,
            nodes: BTreeMap::new(),
            names: BTreeMap::new(),
            identities: BTreeMap::new(),
            wireguard_keys: BTreeMap::new(),
            overlay_v4: BTreeMap::new(),
            overlay_v6: BTreeMap::new(),
            claims: Claims::default(),
            removed_nodes: BTreeMap::new(),
            removed_identities: BTreeMap::new(),
            tokens: BTreeMap::new(),
            problems: BTreeMap::new(),
            dirty: BTreeSet::new(),
            taken: 0,
            events: Vec::new(),
        }
    }

    /// Counts a start of the controller. `beside` are the counters in the file `starts`. A store
    /// that is behind them was restored from a backup. Then the epoch is raised, so that all
    /// watches start with a full snapshot, and all tokens are revoked, since some may have been
    /// used after the backup.
    pub fn start(&mut self, beside: Option<Starts>) -> Started {
        let beside = beside.unwrap_or(Starts { count: 0, epoch: 0 });
        let restored = self.starts < beside.count;
        self.starts = self.starts.max(beside.count) + 1;
        self.dirty.insert(Key::Meta);
        let mut voided = 0;
        if restored {
            self.epoch = self.epoch.max(beside.epoch) + 1;
            for token in self.tokens.values_mut().filter(|token| !token.revoked) {
                token.revoked = true;
                voided += 1;
                self.dirty.insert(Key::Token(token.id));
            }
        }
        Started { starts: Starts { count: self.starts, epoch: self.epoch }, restored, voided }
    }

    /// Changes the mesh configuration. Does nothing if it stays the same. The overlay ranges can
    /// only change while the mesh has no nodes.
    pub fn configure(&mut self, change: impl FnOnce(&mut MeshConfig)) -> Result<(), OverlayInUse> {
        let mut config = self.mesh.config.clone();
        change(&mut config);
        if config == self.mesh.config {
            return Ok(());
        }
        let old = &self.mesh.config;
        if (config.overlay_v6, config.overlay_v4) != (old.overlay_v6, old.overlay_v4)
            && !self.nodes.is_empty()
        {
            return Err(OverlayInUse {
                nodes: self.nodes.len(),
                v6: old.overlay_v6.into(),
                v4: old.overlay_v4.into(),
            });
        }
        config.generation = old.generation + 1;
        let signed = self.authority.sign_mesh(&config);
        let revision = self.next_revision();
        self.mesh = Mesh { config, signed, revision };
        self.dirty.insert(Key::Mesh);
        Ok(())
    }

    /// Returns the mesh configuration.
    pub fn mesh(&self) -> &MeshConfig {
        &self.mesh.config
    }

    /// Returns the mesh configuration, as the CA signed it.
    pub fn signed_mesh(&self) -> &pb::Signed {
        &self.mesh.signed
    }

    /// Returns the epoch. It grows whenever watches have to start with a full snapshot.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Returns the revision of the newest change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Creates a token that is valid until `expires_at` (seconds since 1970).
    pub fn create_token(
        &mut self,
        id: TokenId,
        secret_hash: SecretHash,
        terms: TokenTerms,
        expires_at: i64,
        now: Now,
    ) -> Result<&Token, Refusal> {
        if self.tokens.len() >= TOKENS {
            return Err(Refusal::TooManyTokens);
        }
        if terms.replace.is_some() && terms.uses != 1 {
            return Err(Refusal::ReplaceOnce);
        }
        let useless = |prefix: &&IpNet| ownership::is_useless_grant(**prefix, &self.mesh.config);
        if let Some(prefix) = terms.allowed_prefixes.iter().find(useless) {
            return Err(Refusal::Unusable(*prefix));
        }
        let token = Token {
            id,
            terms,
            created_at: now.unix,
            expires_at,
            used: 0,
            revoked: false,
            secret_hash,
        };
        self.dirty.insert(Key::Token(id));
        self.events.push(Event::TokenCreated { token: id });
        Ok(self.tokens.entry(id).insert_entry(token).into_mut())
    }

    /// Revokes a token. Revoking it again is not an error.
    pub fn revoke_token(&mut self, id: TokenId) -> Result<(), Refusal> {
        let token = self.tokens.get_mut(&id).ok_or(Refusal::TokenUnknown { token: id })?;
        if !token.revoked {
            token.revoked = true;
            self.dirty.insert(Key::Token(id));
            self.events.push(Event::TokenRevoked { token: id });
        }
        Ok(())
    }

    /// Returns the tokens after `after`, sorted by id, each with the names of the current nodes
    /// that joined with it.
    pub fn tokens(&self, after: Option<TokenId>) -> impl Iterator<Item = (&Token, Vec<NodeName>)> {
        let behind = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.tokens.range((behind, Bound::Unbounded)).map(|(id, token)| {
            let joined = self.nodes.values().filter(|member| member.token == *id);
            (token, joined.map(|member| member.grant.name.clone()).collect())
        })
    }

    /// Returns the id of the node with this name.
    pub fn by_name(&self, name: &NodeName) -> Result<NodeId, Refusal> {
        self.names.get(name).copied().ok_or_else(|| Refusal::NoSuchNode { name: name.clone() })
    }

    /// Returns the node with this id.
    pub fn member(&self, node: NodeId) -> Result<&Member, Refusal> {
        if let Some(member) = self.nodes.get(&node) {
            return Ok(member);
        }
        Err(match self.removed_nodes.get(&node) {
            Some(removed) => Refusal::NodeRemoved {
                name: removed.tombstone.name.clone(),
                tombstone: removed.signed.clone(),
            },
            None => Refusal::NodeUnknown { node },
        })
    }

    /// Returns the status of the nodes after `after`, sorted by name.
    pub fn statuses(
        &self,
        after: Option<&NodeName>,
        sessions: &Sessions,
        now: Now,
    ) -> impl Iterator<Item = NodeStatus<'_>> {
        let behind = after.map_or(Bound::Unbounded, Bound::Excluded);
        let nodes = self.names.range::<NodeName, _>((behind, Bound::Unbounded));
        nodes.filter_map(move |(_, id)| self.status_of(*id, sessions, now))
    }

    /// Returns the status of one node.
    pub fn status(
        &self,
        name: &NodeName,
        sessions: &Sessions,
        now: Now,
    ) -> Result<NodeStatus<'_>, Refusal> {
        let status = self.status_of(self.by_name(name)?, sessions, now);
        status.ok_or_else(|| Refusal::NoSuchNode { name: name.clone() })
    }

    fn status_of(&self, id: NodeId, sessions: &Sessions, now: Now) -> Option<NodeStatus<'_>> {
        let member = self.nodes.get(&id)?;
        let session = sessions.live(id, now).map(|session| session.address);
        Some(NodeStatus {
            member,
            session,
            last_seen: if session.is_some() { now.unix } else { member.last_seen },
            problems: self.problems.get(&id).map_or_else(Vec::new, |problems| {
                problems.iter().map(|problem| problem.text.clone()).collect()
            }),
        })
    }

    /// Removes a node permanently. Returns its tombstone.
    pub fn remove(
        &mut self,
        node: NodeId,
        why: &'static str,
        sessions: &Sessions,
        now: Now,
    ) -> Result<pb::Signed, Refusal> {
        let grant = &self.member(node)?.grant;
        let tombstone = Tombstone {
            mesh_id: grant.mesh_id,
            node_id: node,
            name: grant.name.clone(),
            identity_key: grant.identity_key,
            removed_at: now.unix,
        };
        let signed = self.authority.sign_tombstone(&tombstone);
        self.remove_node(tombstone, signed.clone(), why);
        self.reconsider(sessions, now);
        Ok(signed)
    }

    /// Adds tombstones that a node sent, after the caller verified them. A controller that was
    /// restored from a backup may lack them. Returns the number of new ones.
    pub fn resync(
        &mut self,
        tombstones: Vec<(Tombstone, pb::Signed)>,
        sessions: &Sessions,
        now: Now,
    ) -> usize {
        let mut learned = 0;
        for (tombstone, signed) in tombstones {
            let ours = tombstone.mesh_id == self.mesh.config.mesh_id;
            if ours && !self.removed_nodes.contains_key(&tombstone.node_id) {
                self.remove_node(tombstone, signed, "tombstone received from a node");
                learned += 1;
            }
        }
        if learned > 0 {
            self.reconsider(sessions, now);
        }
        learned
    }

    /// Records the end of a node's session.
    pub fn session_ended(&mut self, node: NodeId, now: Now) {
        if let Some(member) = self.nodes.get_mut(&node) {
            member.last_seen = now.unix;
            member.seen = now.mono;
            self.dirty.insert(Key::Node(node));
        }
    }

    /// Records that two machines use the identity of one node.
    pub fn note_clone(&mut self, node: NodeId, text: String) {
        self.note(node, None, text);
    }

    /// Does the periodic work: removes ephemeral nodes that are offline for longer than the lease,
    /// moves prefixes of offline nodes to connected claimants, and deletes old tokens.
    pub fn tick(&mut self, sessions: &Sessions, now: Now) {
        let gone: Vec<NodeId> = self
            .nodes
            .iter()
            .filter(|(id, member)| member.grant.ephemeral && self.is_away(**id, sessions, now))
            .map(|(id, _)| *id)
            .collect();
        for node in gone {
            // This cannot fail: the node was just found.
            let _ =
                self.remove(node, "ephemeral, offline for longer than the lease", sessions, now);
        }
        self.reconsider(sessions, now);
        let old: Vec<TokenId> = self
            .tokens
            .values()
            .filter(|token| !token.is_open(now.unix) && now.unix - token.expires_at > TOKEN_KEPT)
            .map(|token| token.id)
            .collect();
        for token in old {
            self.tokens.remove(&token);
            self.dirty.insert(Key::Token(token));
        }
    }

    /// Returns the changes since the previous call, to be stored first and then published.
    pub fn take_changes(&mut self) -> Changes {
        if self.dirty.is_empty() {
            return Changes { events: std::mem::take(&mut self.events), ..Changes::default() };
        }
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.insert(Key::Meta);
        let mut map: Vec<MapChange> = dirty
            .iter()
            .filter_map(|key| self.map_change(key))
            .filter(|change| change.revision() > self.taken)
            .collect();
        map.sort_by_key(MapChange::revision);
        self.taken = self.revision;
        Changes {
            writes: dirty.iter().map(|key| (key.to_string(), self.encode(key))).collect(),
            map,
            events: std::mem::take(&mut self.events),
        }
    }

    /// Returns the complete map, sorted by revision.
    pub fn snapshot(&self) -> Vec<MapChange> {
        let keys = self.nodes.keys().map(|id| Key::Node(*id));
        let keys = keys
            .chain(self.removed_nodes.keys().map(|id| Key::RemovedNode(*id)))
            .chain([Key::Mesh]);
        let mut map: Vec<MapChange> = keys.filter_map(|key| self.map_change(&key)).collect();
        map.sort_by_key(MapChange::revision);
        map
    }

    fn map_change(&self, key: &Key) -> Option<MapChange> {
        match key {
            Key::Node(id) => self.nodes.get(id).map(|member| MapChange::Node {
                revision: member.revision,
                id: *id,
                name: member.grant.name.clone(),
                identity: member.grant.identity_key,
                entry: member.entry(),
            }),
            Key::RemovedNode(id) => self.removed_nodes.get(id).map(|removed| MapChange::Removed {
                revision: removed.revision,
                id: *id,
                name: removed.tombstone.name.clone(),
                tombstone: removed.signed.clone(),
            }),
            Key::Mesh => Some(MapChange::Mesh {
                revision: self.mesh.revision,
                signed: self.mesh.signed.clone(),
            }),
            Key::Meta | Key::Token(_) => None,
        }
    }

    fn encode(&self, key: &Key) -> Option<Vec<u8>> {
        match key {
            Key::Meta => Some(
                stored::Meta {
                    epoch: self.epoch,
                    revision: self.revision,
                    starts: self.starts,
                    v4_cursor: self.v4_cursor,
                }
                .encode_to_vec(),
            ),
            Key::Mesh => Some(
                stored::Mesh {
                    config: Some(self.mesh.signed.clone()),
                    revision: self.mesh.revision,
                }
                .encode_to_vec(),
            ),
            Key::Node(id) => self.nodes.get(id).map(|member| {
                stored::Node {
                    grant: Some(member.signed_grant.clone()),
                    record: member.record.as_ref().map(|(_, signed)| signed.clone()),
                    withheld: member.withheld.iter().map(Into::into).collect(),
                    revision: member.revision,
                    token: Bytes::copy_from_slice(&member.token.0),
                    joined_at: member.joined_at,
                    last_seen: member.last_seen,
                }
                .encode_to_vec()
            }),
            Key::RemovedNode(id) => self.removed_nodes.get(id).map(|removed| {
                stored::RemovedNode {
                    tombstone: Some(removed.signed.clone()),
                    revision: removed.revision,
                }
                .encode_to_vec()
            }),
            Key::Token(id) => self.tokens.get(id).map(|token| {
                stored::Token {
                    secret_hash: Bytes::copy_from_slice(token.secret_hash.as_bytes()),
                    token: Some(token.into()),
                }
                .encode_to_vec()
            }),
        }
    }

    fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    /// Gives a node a new revision, since its map entry changed.
    fn touch(&mut self, node: NodeId) {
        let revision = self.next_revision();
        if let Some(member) = self.nodes.get_mut(&node) {
            member.revision = revision;
            self.dirty.insert(Key::Node(node));
        }
    }

    /// Adds a node to every index.
    fn index(&mut self, id: NodeId, member: Member) {
        let grant = &member.grant;
        self.names.insert(grant.name.clone(), id);
        self.identities.insert(grant.identity_key, id);
        for key in &grant.wireguard_keys {
            self.wireguard_keys.insert(*key, id);
        }
        self.overlay_v4.insert(grant.overlay.v4, id);
        self.overlay_v6.insert(grant.overlay.v6, id);
        self.nodes.insert(id, member);
    }

    /// Adds a tombstone, and removes its node from every index.
    fn remove_node(&mut self, tombstone: Tombstone, signed: pb::Signed, why: &'static str) {
        let id = tombstone.node_id;
        if let Some(member) = self.nodes.remove(&id) {
            let grant = &member.grant;
            self.names.remove(&grant.name);
            self.identities.remove(&grant.identity_key);
            for key in &grant.wireguard_keys {
                self.wireguard_keys.remove(key);
            }
            self.overlay_v4.remove(&grant.overlay.v4);
            self.overlay_v6.remove(&grant.overlay.v6);
            for prefix in self.claims.held_by(id) {
                self.claims.release(&prefix);
            }
            self.problems.remove(&id);
            self.dirty.insert(Key::Node(id));
            self.events.push(Event::Removed { name: grant.name.clone(), node: id, why });
        }
        let revision = self.next_revision();
        self.removed_identities.insert(tombstone.identity_key, id);
        self.removed_nodes.insert(id, RemovedNode { tombstone, signed, revision });
        self.dirty.insert(Key::RemovedNode(id));
    }

    /// Returns how long a node has been offline; `None` if it is connected.
    fn offline(&self, node: NodeId, sessions: &Sessions, now: Now) -> Option<Duration> {
        if sessions.live(node, now).is_some() {
            return None;
        }
        self.nodes.get(&node).map(|member| now.since(member.seen))
    }

    /// Returns whether a node has been offline for longer than the lease.
    fn is_away(&self, node: NodeId, sessions: &Sessions, now: Now) -> bool {
        self.offline(node, sessions, now).is_some_and(|away| away > self.mesh.config.lease)
    }

    /// Adds a problem of a node at the front. Each text occurs only once.
    fn note(&mut self, node: NodeId, about: Option<(NodeId, IpNet)>, text: String) {
        if !self.nodes.contains_key(&node) {
            return;
        }
        let problems = self.problems.entry(node).or_default();
        problems.retain(|problem| problem.text != text);
        problems.push_front(Problem { about, text });
        problems.truncate(limits::PROBLEMS);
    }

    /// Removes the problems that a claim caused, since it is settled.
    fn forget_problems(&mut self, node: NodeId, prefix: &IpNet) {
        for problems in self.problems.values_mut() {
            problems.retain(|problem| problem.about != Some((node, *prefix)));
        }
    }
}

impl Member {
    /// Returns the map entry that watchers see.
    fn entry(&self) -> pb::Entry {
        pb::Entry {
            grant: Some(self.signed_grant.clone()),
            record: self.record.as_ref().map(|(_, signed)| signed.clone()),
            withheld: self.withheld.iter().map(Into::into).collect(),
        }
    }
}

impl MapChange {
    /// Returns the revision of the change.
    pub fn revision(&self) -> u64 {
        match self {
            Self::Node { revision, .. }
            | Self::Removed { revision, .. }
            | Self::Mesh { revision, .. } => *revision,
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Meta => f.write_str("meta"),
            Self::Mesh => f.write_str("mesh"),
            Self::Node(id) => write!(f, "node/{id}"),
            Self::RemovedNode(id) => write!(f, "tombstone/{id}"),
            Self::Token(id) => write!(f, "token/{id}"),
        }
    }
}

/// Error of changing the overlay ranges while nodes have addresses in them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot change the overlay ranges: {nodes} nodes have addresses in {v6} and {v4}: keep them, or set up a new mesh"
)]
pub struct OverlayInUse {
    /// Number of nodes.
    pub nodes: usize,
    /// Current IPv6 range.
    pub v6: IpNet,
    /// Current IPv4 range.
    pub v4: IpNet,
}

#[cfg(test)]
pub(crate) mod tests;
