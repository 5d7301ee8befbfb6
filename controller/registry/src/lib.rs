//! The registry: the nodes of the mesh, the tokens to join it, and the rules for both.
//!
//! It reads no clock, draws no randomness, does no I/O and knows neither a wire API nor a signature:
//! every operation gets `now` as an argument and works on plain values. The values that the CA has
//! to sign come out unsigned.
//!
//! An operation checks everything before it changes anything, so a refused one changes no stored
//! state; it may add a problem for the operator. Changes are collected. [`Registry::take_changes`]
//! returns what to sign, what to store and what to show, in that order of work.
//!
//! | module | owns |
//! |---|---|
//! | `members` | the nodes, with an index for every value that is unique |
//! | `claims` | which node holds which prefix |
//! | `join` | admission of a node with a token |
//! | `readmit` | the return of what a restored or empty store lost |
//! | `refresh` | changes that another controller made |
//! | `publish` | a node's record, and the assignment of the prefixes that it claims |
//! | `problems` | what the operator of a node should know |
//! | [`sessions`] | the live sessions |
//! | [`token`] | join tokens |
//! | `admins` | keys of administrators |
//! | `values` | what is stored, returned and reported |
//!
//! # Invariants
//!
//! - No two nodes share a name, an identity key, a WireGuard key or an overlay address.
//! - No two nodes hold the same or an overlapping prefix, unless the grant of the one that holds
//!   the nested prefix names exactly that prefix, or their grants share the prefix in one group. What a
//!   record claims beyond that is withheld.
//! - A node announces at most as many blocks of a pod range as its token allows.
//! - The identity key and the WireGuard keys of a removed node can never join again; a tombstone is never
//!   deleted.
//! - Revisions only grow, and each change of a node, a tombstone or the mesh has its own.
//! - A node is removed by an operator, by itself, or by a machine that replaces it. An ephemeral
//!   node is also removed when it is offline for longer than its token says, by default the lease.
//! - An operation on one node reads and writes a number of nodes that does not depend on the size of
//!   the mesh.

#![forbid(unsafe_code)]

mod address;
mod admins;
mod claims;
mod errors;
mod join;
mod members;
mod now;
mod problems;
mod publish;
mod readmit;
mod refresh;
pub mod sessions;
pub mod token;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_types::id::{IdentityKey, NodeId, NodeName, TokenId, WireguardKey};
use towline_types::limits;
use towline_types::node::{Head, MeshConfig, Node, RelayRole, Tombstone};
use towline_types::ownership;
use towline_types::pod_range::PodRange;

pub use admins::{Admin, LOCAL_ADMIN};
use claims::Claims;
pub use errors::{
    CreateAdminError, CreateTokenError, JoinError, LoadError, NoSuchAdmin, NoSuchNode, NodeAbsent,
    OverlayInUse, PublishError, ReadmitError, TokenUnknown,
};
pub use join::Join;
pub use members::Member;
use members::Members;
pub use now::Now;
use problems::Problems;
pub use problems::{NodeProblem, WithheldReason};
pub use publish::{Difference, Published, Withheld};
pub use refresh::Refreshed;
use sessions::Sessions;
use token::{SecretHash, Token, TokenTerms};
pub use values::{
    Changes, Contents, Counters, Event, Key, Mesh, RemovedNode, Started, Starts, Unsigned,
};

/// Largest number of tokens, including those that are not open any more.
const TOKENS: usize = 10_000;
/// Time in seconds for which a token is still listed after its expiry.
const TOKEN_KEPT: i64 = 7 * 24 * 3600;
/// Shortest time between two writes of the times at which nodes were last seen.
const LAST_SEEN_INTERVAL: Duration = Duration::from_secs(60);

/// Time without periodic work after which the process counts as stopped in the meantime. The work is due every 5 s,
/// and may wait for a slow disk.
const STALLED: Duration = Duration::from_secs(30);

/// Complete state of the registry.
pub struct Registry {
    mesh: Mesh,
    counters: Counters,
    members: Members,
    claims: Claims,
    removed_nodes: BTreeMap<NodeId, RemovedNode>,
    removed_identities: BTreeMap<IdentityKey, NodeId>,
    /// WireGuard keys of removed nodes that their tombstones name. A tombstone of an earlier version names none.
    removed_wireguard_keys: BTreeMap<WireguardKey, NodeId>,
    tokens: BTreeMap<TokenId, Token>,
    admins: BTreeMap<IdentityKey, Admin>,
    problems: Problems,
    /// Monotonic time at which the last-seen times were last marked to be stored; `None` before the first
    /// time in this process.
    seen_stored_at: Option<Instant>,
    /// [`Sessions::opened_and_closed`] at that time.
    seen_stored: u64,
    /// Monotonic time of the last periodic work; `None` before the first one.
    ticked_at: Option<Instant>,
    /// Monotonic time at which the process ran again after it was stopped; `None` if it never was.
    awake_since: Option<Instant>,
    /// Records that changed since the last [`Registry::take_changes`].
    dirty: BTreeSet<Key>,
    /// Values that changed since then and have no signature yet.
    unsigned: BTreeSet<Unsigned>,
    /// Events since the last [`Registry::take_changes`].
    events: Vec<Event>,
}

impl Registry {
    /// Creates the registry of a new mesh without nodes.
    pub fn create(config: MeshConfig) -> Self {
        let mut registry = Self::empty(Mesh { config, revision: 0 });
        registry.counters.epoch = 1;
        registry.mesh.revision = registry.next_revision();
        registry.dirty.insert(Key::Mesh);
        registry.unsigned.insert(Unsigned::Mesh);
        registry
    }

    /// Loads the registry from what is stored. The caller has verified the signatures.
    pub fn load(contents: Contents) -> Result<Self, LoadError> {
        let mut registry = Self::empty(contents.mesh);
        registry.counters = contents.counters;
        for member in contents.members {
            let id = member.grant.node_id;
            if let Some(record) = &member.record {
                Node::new(member.grant.clone(), record.clone())
                    .map_err(|error| LoadError::NotGranted { node: id, error })?;
                let held =
                    record.prefixes.iter().filter(|prefix| !member.withheld.contains(prefix));
                for prefix in held {
                    registry.claims.hold(*prefix, id);
                }
            }
            if !registry.members.insert(member) {
                return Err(LoadError::NotUnique(id));
            }
        }
        for removed in contents.removed_nodes {
            registry.insert_removed(removed);
        }
        registry.tokens = contents.tokens.into_iter().map(|token| (token.id, token)).collect();
        registry.admins = contents.admins.into_iter().map(|admin| (admin.key, admin)).collect();
        Ok(registry)
    }

    fn empty(mesh: Mesh) -> Self {
        Self {
            mesh,
            counters: Counters::default(),
            members: Members::default(),
            claims: Claims::default(),
            removed_nodes: BTreeMap::new(),
            removed_identities: BTreeMap::new(),
            removed_wireguard_keys: BTreeMap::new(),
            tokens: BTreeMap::new(),
            admins: BTreeMap::new(),
            problems: Problems::default(),
            seen_stored_at: None,
            seen_stored: 0,
            ticked_at: None,
            awake_since: None,
            dirty: BTreeSet::new(),
            unsigned: BTreeSet::new(),
            events: Vec::new(),
        }
    }

    /// Counts a start of the controller. `beside` are the counters in the file `starts`, if it exists.
    /// A store that is marked as a backup, or that is behind the file, was restored. Then the epoch is
    /// raised, so that all watches start with a full snapshot, and all tokens and keys of administrators
    /// are revoked, since some may have been used or revoked after the backup.
    ///
    /// An epoch is at least the time at which it began, in seconds since 1970. So a second store under the
    /// same CA (an empty one, or the same backup restored twice) does not repeat the epoch of the first, and
    /// no client takes a revision of the first for one of the second.
    pub fn start(&mut self, beside: Option<Starts>, now: Now) -> Started {
        let beside = beside.unwrap_or(Starts { count: 0, epoch: 0 });
        let counters = &mut self.counters;
        if counters.starts == 0 && !counters.is_backup {
            counters.epoch = counters.epoch.max(least_epoch(now));
        }
        let restored = counters.is_backup || counters.starts < beside.count;
        counters.is_backup = false;
        counters.starts = counters.starts.max(beside.count) + 1;
        self.dirty.insert(Key::Counters);
        let voided = if restored { self.begin_epoch(beside.epoch, now) } else { 0 };
        let starts = Starts { count: self.counters.starts, epoch: self.counters.epoch };
        Started { starts, restored, voided }
    }

    /// Begins a new epoch if a node proved that this store is a copy from an earlier time: the CA signed a later
    /// head of the map than the store has. Returns the number of tokens that were revoked; `None` if the head is not
    /// a later one.
    pub fn prove_later(&mut self, head: Head, now: Now) -> Option<usize> {
        let is_later = head.mesh_id == self.mesh.config.mesh_id
            && head.position() > (self.counters.epoch, self.counters.revision);
        is_later.then(|| {
            // Revisions go on after those that were lost, so that no two changes have the same one.
            self.counters.revision = self.counters.revision.max(head.revision);
            let voided = self.begin_epoch(head.epoch, now);
            self.events.push(Event::LaterHistory { epoch: self.counters.epoch, voided });
            voided
        })
    }

    /// Begins an epoch after the present one and after `above`, and not before the time. All watches start with the
    /// whole map then, and the mesh configuration wins over those of earlier epochs. Revokes all tokens and keys of
    /// administrators. Returns the number of tokens.
    fn begin_epoch(&mut self, above: u64, now: Now) -> usize {
        let mut voided = 0;
        let next = self.counters.epoch.max(above).saturating_add(1);
        self.counters.epoch = next.max(least_epoch(now));
        self.mesh.config.epoch = self.counters.epoch;
        self.mesh.revision = self.next_revision();
        self.dirty.extend([Key::Counters, Key::Mesh]);
        self.unsigned.insert(Unsigned::Mesh);
        for token in self.tokens.values_mut().filter(|token| !token.revoked) {
            token.revoked = true;
            voided += 1;
            self.dirty.insert(Key::Token(token.id));
        }
        for admin in self.admins.values_mut().filter(|admin| admin.revoked_at.is_none()) {
            admin.revoked_at = Some(now.unix);
            self.dirty.insert(Key::Admin(admin.key));
        }
        voided
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
            && self.members.len() > 0
        {
            return Err(OverlayInUse {
                nodes: self.members.len(),
                v6: old.overlay_v6.into(),
                v4: old.overlay_v4.into(),
            });
        }
        config.generation = old.generation + 1;
        let revision = self.next_revision();
        self.mesh = Mesh { config, revision };
        self.dirty.insert(Key::Mesh);
        self.unsigned.insert(Unsigned::Mesh);
        Ok(())
    }

    /// Creates a token that is valid until `expires_at` (seconds since 1970).
    pub fn create_token(
        &mut self,
        id: TokenId,
        secret_hash: SecretHash,
        terms: TokenTerms,
        expires_at: i64,
        now: Now,
    ) -> Result<&Token, CreateTokenError> {
        if self.tokens.len() >= TOKENS {
            return Err(CreateTokenError::TooManyTokens);
        }
        if terms.replace.is_some() && terms.uses != 1 {
            return Err(CreateTokenError::ReplaceOnce);
        }
        let (least, most) = limits::EPHEMERAL_AFTER;
        if let Some(after) = terms.ephemeral_after.filter(|after| *after < least || *after > most) {
            return Err(CreateTokenError::EphemeralAfter(after));
        }
        let ranges = terms.pod_ranges.iter().map(PodRange::range);
        let mut granted = terms.allowed_prefixes.iter().copied().chain(ranges);
        let useless = |prefix: &IpNet| ownership::is_useless_grant(*prefix, &self.mesh.config);
        if let Some(prefix) = granted.find(useless) {
            return Err(CreateTokenError::Unusable(prefix));
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
    pub fn revoke_token(&mut self, id: TokenId) -> Result<(), TokenUnknown> {
        let token = self.tokens.get_mut(&id).ok_or(TokenUnknown { token: id })?;
        if !token.revoked {
            token.revoked = true;
            self.dirty.insert(Key::Token(id));
            self.events.push(Event::TokenRevoked { token: id });
        }
        Ok(())
    }

    /// Removes a node permanently.
    pub fn remove(
        &mut self,
        node: NodeId,
        why: &'static str,
        sessions: &Sessions,
        now: Now,
    ) -> Result<(), NodeAbsent> {
        let grant = &self.member(node)?.grant;
        let tombstone = Tombstone {
            mesh_id: grant.mesh_id,
            node_id: node,
            name: grant.name.clone(),
            identity_key: grant.identity_key,
            wireguard_keys: grant.wireguard_keys.clone(),
            removed_at: now.unix,
        };
        self.remove_node(tombstone, why);
        self.reconsider(sessions, now);
        Ok(())
    }

    /// Decides whether a node may relay for others. Does nothing if that was decided before.
    pub fn set_relay(&mut self, node: NodeId, may_relay: bool, now: Now) -> Result<(), NodeAbsent> {
        let grant = &self.member(node)?.grant;
        if grant.relay.decision() == Some(may_relay) {
            return Ok(());
        }
        // Of two grants with one record, agents keep the one that was issued later.
        let issued_at = now.unix.max(grant.issued_at.saturating_add(1));
        let name = grant.name.clone();
        self.members.set_relay(node, RelayRole::of(may_relay), issued_at);
        self.unsigned.insert(Unsigned::Grant(node));
        self.touch(node);
        self.events.push(Event::RelayDecided { name, node, may_relay });
        Ok(())
    }

    /// Adds tombstones that a node sent, after the caller verified them. A controller that was
    /// restored from a backup may lack them. Returns the number of new ones.
    pub fn resync(&mut self, tombstones: Vec<Tombstone>, sessions: &Sessions, now: Now) -> usize {
        let mut learned = 0;
        for tombstone in tombstones {
            let ours = tombstone.mesh_id == self.mesh.config.mesh_id;
            if ours && !self.removed_nodes.contains_key(&tombstone.node_id) {
                self.remove_node(tombstone, "tombstone received from a node");
                learned += 1;
            }
        }
        if learned > 0 {
            self.reconsider(sessions, now);
        }
        learned
    }

    /// Adds a problem of a node.
    pub fn note(&mut self, node: NodeId, problem: NodeProblem) {
        self.note_about(node, None, problem);
    }

    /// Does the periodic work: removes ephemeral nodes that are offline for too long, moves prefixes of
    /// offline nodes to connected claimants, deletes old tokens and revoked keys, and at most once a minute
    /// marks the last-seen times to be stored.
    pub fn tick(&mut self, sessions: &Sessions, now: Now) {
        let was_stalled = self.is_stalled(now);
        self.ticked_at = Some(now.mono);
        if was_stalled {
            // Nodes could not be heard in the meantime. They get their whole time again.
            self.awake_since = Some(now.mono);
        }
        for node in self.members.ephemeral() {
            let grant = self.members.get(node).map(|member| &member.grant);
            let after = grant.and_then(|grant| grant.ephemeral_after);
            let after = after.unwrap_or(self.mesh.config.lease);
            if self.is_away_for(after, node, sessions, now) {
                // This cannot fail: the node was just found.
                let why = "ephemeral, offline for too long";
                let _ = self.remove(node, why, sessions, now);
            }
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
        self.delete_old_admins(now);
        let is_changed = !sessions.is_empty() || sessions.opened_and_closed() != self.seen_stored;
        let is_due = |at| is_changed && now.since(at) >= LAST_SEEN_INTERVAL;
        if self.seen_stored_at.is_none_or(is_due) {
            self.seen_stored_at = Some(now.mono);
            self.seen_stored = sessions.opened_and_closed();
            self.store_last_seen();
        }
    }

    /// Marks the times at which nodes were last seen to be stored.
    pub fn store_last_seen(&mut self) {
        self.dirty.insert(Key::LastSeen);
    }

    /// Returns the changes since the previous call: to be signed, then stored, then shown.
    pub fn take_changes(&mut self) -> Changes {
        let mut records = std::mem::take(&mut self.dirty);
        if !records.is_empty() {
            records.insert(Key::Counters);
        }
        Changes {
            unsigned: std::mem::take(&mut self.unsigned),
            records,
            problems: self.problems.take_changed(),
            events: std::mem::take(&mut self.events),
        }
    }

    /// Returns the mesh configuration.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// Returns the counters.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Returns the id of the node with this name.
    pub fn by_name(&self, name: &NodeName) -> Result<NodeId, NoSuchNode> {
        self.members.by_name(name).ok_or_else(|| NoSuchNode { name: name.clone() })
    }

    /// Returns the node with this id.
    pub fn member(&self, node: NodeId) -> Result<&Member, NodeAbsent> {
        if let Some(member) = self.members.get(node) {
            return Ok(member);
        }
        Err(match self.removed_nodes.get(&node) {
            Some(removed) => NodeAbsent::Removed { node, name: removed.tombstone.name.clone() },
            None => NodeAbsent::Unknown { node },
        })
    }

    /// Returns all nodes, sorted by id.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.iter()
    }

    /// Returns a removed node.
    pub fn removed_node(&self, node: NodeId) -> Option<&RemovedNode> {
        self.removed_nodes.get(&node)
    }

    /// Returns all removed nodes, sorted by id.
    pub fn removed_nodes(&self) -> impl Iterator<Item = &RemovedNode> {
        self.removed_nodes.values()
    }

    /// Returns a token.
    pub fn token(&self, id: TokenId) -> Option<&Token> {
        self.tokens.get(&id)
    }

    /// Returns all tokens, sorted by id.
    pub fn tokens(&self) -> impl Iterator<Item = &Token> {
        self.tokens.values()
    }

    /// Returns the problems of a node, newest first.
    pub fn problems(&self, node: NodeId) -> Vec<NodeProblem> {
        self.problems.of(node)
    }

    /// Returns how many nodes were read or written since the registry was created. Tests hold with
    /// it that the cost of an operation does not grow with the mesh.
    pub fn touched(&self) -> u64 {
        self.members.touched()
    }

    fn next_revision(&mut self) -> u64 {
        self.counters.revision += 1;
        self.counters.revision
    }

    /// Gives a node a new revision, since its map entry changed.
    fn touch(&mut self, node: NodeId) {
        let revision = self.next_revision();
        self.members.set_revision(node, revision);
        self.dirty.insert(Key::Node(node));
    }

    /// Adds a tombstone, and removes its node.
    fn remove_node(&mut self, tombstone: Tombstone, why: &'static str) {
        let id = tombstone.node_id;
        if let Some(member) = self.members.remove(id) {
            for prefix in self.claims.held_by(id) {
                self.claims.release(&prefix, id);
            }
            self.problems.remove(id);
            self.dirty.insert(Key::Node(id));
            self.unsigned.remove(&Unsigned::Grant(id));
            self.events.push(Event::Removed { name: member.grant.name, node: id, why });
        }
        let revision = self.next_revision();
        self.insert_removed(RemovedNode { tombstone, revision });
        self.dirty.insert(Key::RemovedNode(id));
        self.unsigned.insert(Unsigned::Tombstone(id));
    }

    fn insert_removed(&mut self, removed: RemovedNode) {
        let id = removed.tombstone.node_id;
        self.removed_identities.insert(removed.tombstone.identity_key, id);
        for key in &removed.tombstone.wireguard_keys {
            self.removed_wireguard_keys.insert(*key, id);
        }
        self.removed_nodes.insert(id, removed);
    }

    /// Returns whether a node has been offline for longer than the lease.
    fn is_away(&self, node: NodeId, sessions: &Sessions, now: Now) -> bool {
        self.is_away_for(self.mesh.config.lease, node, sessions, now)
    }

    /// Returns whether a node has been offline for longer than `limit`. Time in which the controller itself was
    /// away or stopped, or did not know which nodes are connected to other controllers, does not count.
    fn is_away_for(&self, limit: Duration, node: NodeId, sessions: &Sessions, now: Now) -> bool {
        if self.is_stalled(now) || sessions.is_blind(now) || sessions.live(node, now).is_some() {
            return false;
        }
        let Some(member) = self.members.get(node) else { return false };
        let heard = [sessions.last_heard(node), sessions.last_elsewhere(node)];
        let since = [self.awake_since, sessions.sighted_since()];
        let since = heard.into_iter().chain(since).flatten().fold(member.known_since, Ord::max);
        now.since(since) > sessions.least_absence(limit)
    }

    /// Returns whether the periodic work did not run for so long that the process was stopped, for example because
    /// the machine was suspended.
    fn is_stalled(&self, now: Now) -> bool {
        self.ticked_at.is_some_and(|at| now.since(at) > STALLED)
    }

    /// Adds a problem of a node, which lasts until the claim is settled if there is one.
    fn note_about(&mut self, node: NodeId, about: Option<(NodeId, IpNet)>, problem: NodeProblem) {
        if self.members.contains(node) {
            self.problems.note(node, about, problem);
        }
    }
}

/// Returns the least number of an epoch that begins now: the time in seconds since 1970.
fn least_epoch(now: Now) -> u64 {
    u64::try_from(now.unix).unwrap_or(0)
}

#[cfg(test)]
mod tests;
