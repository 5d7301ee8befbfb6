//! The registry: who is in the mesh, and who may be.
//!
//! Functions that take `now` and return what changed; no clock, no randomness, no I/O and no wire
//! API in here, since more than one wire API will be served over it. Every operation checks first
//! and changes afterwards, so a refused one leaves nothing behind. What an operation changed is
//! collected and taken by [`Registry::take_changes`], to be stored, then shown to the watchers.
//!
//! # Invariants
//!
//! - No two nodes share a name, an identity key, a WireGuard key or an overlay address.
//! - No two nodes hold the same or an overlapping prefix, unless the grant of the one that holds
//!   the nested prefix names exactly that prefix. What a record claims beyond that is withheld.
//! - An identity key that was removed never joins again; a tombstone is never forgotten.
//! - Revisions only grow, and each change of a node, a tombstone or the mesh has its own.
//! - Nodes are removed by an operator, by themselves, by a machine that replaces them, or, when
//!   ephemeral, by staying away; never by absence alone.

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
use towline_proto::{limits, pb};

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

/// Tokens that may exist at once.
const TOKENS: usize = 10_000;
/// How long a token that can admit nobody any more is still listed, in seconds.
const TOKEN_KEPT: i64 = 7 * 24 * 3600;

/// The registry's whole state.
pub struct Registry {
    authority: Arc<Authority>,
    mesh: Mesh,
    epoch: u64,
    revision: u64,
    starts: u64,
    v4_cursor: u32,
    nodes: BTreeMap<NodeId, Member>,
    names: BTreeMap<NodeName, NodeId>,
    identities: BTreeMap<IdentityKey, NodeId>,
    wireguard_keys: BTreeMap<WireguardKey, NodeId>,
    overlay_v4: BTreeMap<Ipv4Addr, NodeId>,
    overlay_v6: BTreeMap<Ipv6Addr, NodeId>,
    claims: Claims,
    graves: BTreeMap<NodeId, Grave>,
    removed_identities: BTreeMap<IdentityKey, NodeId>,
    tokens: BTreeMap<TokenId, Token>,
    problems: BTreeMap<NodeId, VecDeque<Problem>>,
    dirty: BTreeSet<Key>,
    /// Up to where the watchers know of changes.
    taken: u64,
    events: Vec<Event>,
}

struct Mesh {
    config: MeshConfig,
    signed: pb::Signed,
    revision: u64,
}

/// A node.
pub struct Member {
    /// Who it is.
    pub grant: Grant,
    /// The CA's word on that.
    pub signed_grant: pb::Signed,
    /// What it said last, if it spoke.
    pub record: Option<(Record, pb::Signed)>,
    /// Prefixes that its record claims and that stay out of the map.
    pub withheld: Vec<IpNet>,
    /// When it last changed for the watchers.
    pub revision: u64,
    /// The token that it joined with.
    pub token: TokenId,
    /// Seconds since 1970.
    pub joined_at: i64,
    /// Seconds since 1970, as of the end of its last session.
    pub last_seen: i64,
    /// The same within this process; its start for a node that was not seen since.
    seen: Instant,
}

struct Grave {
    tombstone: Tombstone,
    signed: pb::Signed,
    revision: u64,
}

/// What a node's operator should know.
struct Problem {
    /// The claim it is about, so that it goes away with its cause.
    about: Option<(NodeId, IpNet)>,
    text: String,
}

/// Names one stored record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Meta,
    Mesh,
    Node(NodeId),
    Grave(NodeId),
    Token(TokenId),
}

/// What changed since the last time.
#[derive(Debug, Default)]
pub struct Changes {
    /// For the store; `None` where a record is to be gone.
    pub writes: Vec<(String, Option<Vec<u8>>)>,
    /// For the watchers, in the order of the revisions.
    pub map: Vec<MapChange>,
    /// For the log.
    pub events: Vec<Event>,
}

/// A change of the network map.
#[derive(Debug, Clone)]
pub enum MapChange {
    /// A node is new or different.
    Node {
        /// When.
        revision: u64,
        /// Which.
        id: NodeId,
        /// Its name.
        name: NodeName,
        /// Its key.
        identity: IdentityKey,
        /// What watchers see.
        entry: pb::Entry,
    },
    /// A node was removed.
    Removed {
        /// When.
        revision: u64,
        /// Which.
        id: NodeId,
        /// The name that it had.
        name: NodeName,
        /// The CA's word on it.
        tombstone: pb::Signed,
    },
    /// The mesh's configuration.
    Mesh {
        /// When.
        revision: u64,
        /// As the CA signed it.
        signed: pb::Signed,
    },
}

/// What an operator would notice: logged once it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A node is new.
    Joined {
        /// Its name.
        name: NodeName,
        /// Its id.
        node: NodeId,
        /// What it joined with.
        token: TokenId,
    },
    /// A node is gone for good.
    Removed {
        /// The name that it had.
        name: NodeName,
        /// Its id.
        node: NodeId,
        /// Why.
        why: &'static str,
    },
    /// A prefix went from a node that was away to one that is there.
    PrefixMoved {
        /// Which.
        prefix: IpNet,
        /// Whose it was.
        from: NodeName,
        /// Whose it is.
        to: NodeName,
    },
    /// A token is new.
    TokenCreated {
        /// Which.
        token: TokenId,
    },
    /// A token was taken back.
    TokenRevoked {
        /// Which.
        token: TokenId,
    },
}

/// What is known of a node besides grant and record.
pub struct NodeStatus<'a> {
    /// The node.
    pub member: &'a Member,
    /// Where its live session comes from.
    pub session: Option<std::net::SocketAddr>,
    /// Seconds since 1970; now, if it is online.
    pub last_seen: i64,
    /// Newest first.
    pub problems: Vec<String>,
}

/// How a start went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// To be written beside the CA's key, once the store has it.
    pub starts: Starts,
    /// The store was behind: it was restored from a backup.
    pub restored: bool,
    /// Open tokens that were voided for that reason.
    pub voided: usize,
}

impl Registry {
    /// An empty registry for a new mesh.
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
            graves: BTreeMap::new(),
            removed_identities: BTreeMap::new(),
            tokens: BTreeMap::new(),
            problems: BTreeMap::new(),
            dirty: BTreeSet::new(),
            taken: 0,
            events: Vec::new(),
        }
    }

    /// Counts a start of the controller. `beside` is what stands beside the CA's key: a store that
    /// is behind it was restored from a backup. Then watchers must begin anew (a higher epoch than
    /// ever before), and tokens that were used since the backup must not be used again.
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

    /// Changes the mesh's configuration; nothing happens if it is the same. The overlay ranges
    /// can only change while no node has an address in them.
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

    /// What holds for every node.
    pub fn mesh(&self) -> &MeshConfig {
        &self.mesh.config
    }

    /// The same, as the CA signed it.
    pub fn signed_mesh(&self) -> &pb::Signed {
        &self.mesh.signed
    }

    /// Raised whenever watchers must begin anew.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The revision of the newest change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Makes a token, good until `expires_at`.
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
        if let Some(prefix) = terms.allowed_prefixes.iter().find(|prefix| {
            let whole_family = prefix.prefix_len() == 0;
            self.in_overlay(prefix) || (!whole_family && publish::has_no_hosts(prefix))
        }) {
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

    /// Takes a token back; again is no error.
    pub fn revoke_token(&mut self, id: TokenId) -> Result<(), Refusal> {
        let token = self.tokens.get_mut(&id).ok_or(Refusal::TokenUnknown { token: id })?;
        if !token.revoked {
            token.revoked = true;
            self.dirty.insert(Key::Token(id));
            self.events.push(Event::TokenRevoked { token: id });
        }
        Ok(())
    }

    /// The tokens behind `after`, in the order of their ids, with the names of the nodes that
    /// joined with each and are still there.
    pub fn tokens(&self, after: Option<TokenId>) -> impl Iterator<Item = (&Token, Vec<NodeName>)> {
        let behind = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.tokens.range((behind, Bound::Unbounded)).map(|(id, token)| {
            let joined = self.nodes.values().filter(|member| member.token == *id);
            (token, joined.map(|member| member.grant.name.clone()).collect())
        })
    }

    /// A node by its name.
    pub fn by_name(&self, name: &NodeName) -> Result<NodeId, Refusal> {
        self.names.get(name).copied().ok_or_else(|| Refusal::NoSuchNode { name: name.clone() })
    }

    /// A node.
    pub fn member(&self, node: NodeId) -> Result<&Member, Refusal> {
        if let Some(member) = self.nodes.get(&node) {
            return Ok(member);
        }
        Err(match self.graves.get(&node) {
            Some(grave) => Refusal::NodeRemoved {
                name: grave.tombstone.name.clone(),
                tombstone: grave.signed.clone(),
            },
            None => Refusal::NodeUnknown { node },
        })
    }

    /// How it stands with the nodes behind `after`, in the order of their names.
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

    /// How it stands with one node.
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

    /// Removes a node for good; returns its tombstone.
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
        self.bury(tombstone, signed.clone(), why);
        self.reconsider(sessions, now);
        Ok(signed)
    }

    /// Learns tombstones, verified before, that a node kept: a controller that was restored from
    /// a backup forgot them. Returns how many were new.
    pub fn relearn(
        &mut self,
        tombstones: Vec<(Tombstone, pb::Signed)>,
        sessions: &Sessions,
        now: Now,
    ) -> usize {
        let mut learned = 0;
        for (tombstone, signed) in tombstones {
            let ours = tombstone.mesh_id == self.mesh.config.mesh_id;
            if ours && !self.graves.contains_key(&tombstone.node_id) {
                self.bury(tombstone, signed, "a node kept its tombstone");
                learned += 1;
            }
        }
        if learned > 0 {
            self.reconsider(sessions, now);
        }
        learned
    }

    /// A node's session ended.
    pub fn session_ended(&mut self, node: NodeId, now: Now) {
        if let Some(member) = self.nodes.get_mut(&node) {
            member.last_seen = now.unix;
            member.seen = now.mono;
            self.dirty.insert(Key::Node(node));
        }
    }

    /// Two machines with the identity of one node were seen.
    pub fn note_clone(&mut self, node: NodeId, text: String) {
        self.note(node, None, text);
    }

    /// What time alone brings about: ephemeral nodes that stayed away are removed, prefixes go to
    /// live claimants, old tokens are forgotten.
    pub fn tick(&mut self, sessions: &Sessions, now: Now) {
        let gone: Vec<NodeId> = self
            .nodes
            .iter()
            .filter(|(id, member)| member.grant.ephemeral && self.is_away(**id, sessions, now))
            .map(|(id, _)| *id)
            .collect();
        for node in gone {
            // It was there a moment ago, under the same borrow.
            let _ =
                self.remove(node, "ephemeral, and away for longer than the lease", sessions, now);
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

    /// What changed since the last call, to be stored, then shown.
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

    /// The whole map, in the order of the revisions.
    pub fn snapshot(&self) -> Vec<MapChange> {
        let keys = self.nodes.keys().map(|id| Key::Node(*id));
        let keys = keys.chain(self.graves.keys().map(|id| Key::Grave(*id))).chain([Key::Mesh]);
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
            Key::Grave(id) => self.graves.get(id).map(|grave| MapChange::Removed {
                revision: grave.revision,
                id: *id,
                name: grave.tombstone.name.clone(),
                tombstone: grave.signed.clone(),
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
            Key::Grave(id) => self.graves.get(id).map(|grave| {
                stored::Grave { tombstone: Some(grave.signed.clone()), revision: grave.revision }
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

    /// The node is different for the watchers.
    fn touch(&mut self, node: NodeId) {
        let revision = self.next_revision();
        if let Some(member) = self.nodes.get_mut(&node) {
            member.revision = revision;
            self.dirty.insert(Key::Node(node));
        }
    }

    /// Enters a node into every index.
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

    /// Keeps a tombstone, and takes its node out of every index.
    fn bury(&mut self, tombstone: Tombstone, signed: pb::Signed, why: &'static str) {
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
        self.graves.insert(id, Grave { tombstone, signed, revision });
        self.dirty.insert(Key::Grave(id));
    }

    /// How long a node has been offline; `None` while it is connected.
    fn offline(&self, node: NodeId, sessions: &Sessions, now: Now) -> Option<Duration> {
        if sessions.live(node, now).is_some() {
            return None;
        }
        self.nodes.get(&node).map(|member| now.since(member.seen))
    }

    /// Whether a node has been offline for longer than the lease.
    fn is_away(&self, node: NodeId, sessions: &Sessions, now: Now) -> bool {
        self.offline(node, sessions, now).is_some_and(|away| away > self.mesh.config.lease)
    }

    fn in_overlay(&self, prefix: &IpNet) -> bool {
        let config = &self.mesh.config;
        IpNet::from(config.overlay_v4).contains(prefix)
            || IpNet::from(config.overlay_v6).contains(prefix)
    }

    /// Keeps a problem of a node, newest first, each text once.
    fn note(&mut self, node: NodeId, about: Option<(NodeId, IpNet)>, text: String) {
        if !self.nodes.contains_key(&node) {
            return;
        }
        let problems = self.problems.entry(node).or_default();
        problems.retain(|problem| problem.text != text);
        problems.push_front(Problem { about, text });
        problems.truncate(limits::PROBLEMS);
    }

    /// A claim is settled: what was noted about it no longer holds.
    fn forget_problems(&mut self, node: NodeId, prefix: &IpNet) {
        for problems in self.problems.values_mut() {
            problems.retain(|problem| problem.about != Some((node, *prefix)));
        }
    }
}

impl Member {
    /// What watchers see of it.
    fn entry(&self) -> pb::Entry {
        pb::Entry {
            grant: Some(self.signed_grant.clone()),
            record: self.record.as_ref().map(|(_, signed)| signed.clone()),
            withheld: self.withheld.iter().map(Into::into).collect(),
        }
    }
}

impl MapChange {
    /// When it happened.
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
            Self::Grave(id) => write!(f, "tombstone/{id}"),
            Self::Token(id) => write!(f, "token/{id}"),
        }
    }
}

/// The overlay ranges cannot change any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the overlay ranges cannot change while {nodes} nodes have addresses in {v6} and {v4}: keep them, or set up a new mesh"
)]
pub struct OverlayInUse {
    /// How many nodes there are.
    pub nodes: usize,
    /// The IPv6 range.
    pub v6: IpNet,
    /// The IPv4 range.
    pub v4: IpNet,
}

#[cfg(test)]
mod tests;
