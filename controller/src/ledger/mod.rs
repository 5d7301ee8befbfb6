//! The ledger: the registry together with the signed statements of nodes and of the CA.
//!
//! The [`registry`](towline_registry) decides on plain values. The ledger verifies what comes from
//! the store, signs what the registry returns unsigned, and turns changes into writes to the store
//! and into what watchers and operators see.

mod refresh;

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message as _;
use towline_proto::id::NodeId;
use towline_proto::node::{MeshConfig, Record};
use towline_proto::pb;

use crate::authority::Authority;
use crate::map::MapChange;
use crate::store::{Record as StoreRecord, Write};
use crate::store_secret::{KeyId, Opened, RecordSum, Unauthentic};
use crate::stored::{self, key_text};
use crate::view::{NodeView, TokenView, ViewChange};
use towline_registry::sessions::{SessionId, Sessions};
use towline_registry::{
    Changes, Contents, Counters, Difference, Event, Key, LoadError, Now, PublishError, Published,
    Registry, Unsigned,
};

/// The registry and its signed statements.
pub struct Ledger {
    authority: Arc<Authority>,
    registry: Registry,
    mesh: pb::Signed,
    nodes: BTreeMap<NodeId, Statements>,
    tombstones: BTreeMap<NodeId, pb::Signed>,
    /// Times at which nodes were last seen before this process started, in seconds since 1970.
    last_seen: BTreeMap<NodeId, i64>,
    /// What each stored record but the counters adds to [`Self::sum`], by its key in the store.
    items: BTreeMap<String, RecordSum>,
    /// Sum over all stored records but the counters.
    sum: RecordSum,
    /// True if stored records are not authenticated with the current key: the next changes include all records.
    must_rewrite: bool,
}

/// Signed statements of a node.
#[derive(Default)]
struct Statements {
    grant: pb::Signed,
    record: Option<pb::Signed>,
}

/// Changes of the ledger: to be stored first, then shown.
#[derive(Default)]
pub struct LedgerChanges {
    /// Writes to the store.
    pub writes: Vec<Write>,
    /// Changes that watchers see, sorted by revision.
    pub map: Vec<MapChange>,
    /// Changes that operators see.
    pub view: Vec<ViewChange>,
    /// Events to log.
    pub events: Vec<Event>,
}

/// Error of loading the ledger from the store.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A required record is absent.
    #[error("its record `{0}` is missing")]
    Missing(&'static str),
    /// A record is malformed or its signature is invalid.
    #[error("its record `{key}` is not valid: {why}")]
    Invalid {
        /// Key of the record.
        key: String,
        /// Description of the error.
        why: String,
    },
    /// A record was replaced by an earlier one of the same key, or records are missing.
    #[error("its records are of different times: some were removed or replaced by earlier ones")]
    Mixed,
    /// The records contradict each other.
    #[error("its records contradict each other: {0}")]
    Contradiction(#[from] LoadError),
}

impl Ledger {
    /// Creates the ledger of a new mesh without nodes.
    pub fn create(authority: Arc<Authority>, config: MeshConfig) -> Self {
        Self {
            authority,
            registry: Registry::create(config),
            mesh: pb::Signed::default(),
            nodes: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            last_seen: BTreeMap::new(),
            items: BTreeMap::new(),
            sum: RecordSum::default(),
            must_rewrite: false,
        }
    }

    /// Loads the ledger from the records of the store. With `migrate`, records of earlier versions are taken,
    /// which are not authenticated.
    pub fn load(
        authority: Arc<Authority>,
        records: &[StoreRecord],
        migrate: bool,
        now: Now,
    ) -> Result<Self, ReadError> {
        let secret = authority.store_secret();
        let mut must_rewrite = false;
        // Key that authenticates the counters, and thereby the sum.
        let mut sum_key = None;
        let (mut counters, mut mesh, mut last_seen) = (None, None, BTreeMap::new());
        let (mut members, mut removed_nodes, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        let mut admins = Vec::new();
        let (mut nodes, mut tombstones) = (BTreeMap::new(), BTreeMap::new());
        for (key, value) in records {
            let invalid = |why: String| ReadError::Invalid { key: key.clone(), why };
            let parsed =
                stored::parse_key(key).ok_or_else(|| invalid("its key is unknown".into()))?;
            let opened = match secret.open(key, value) {
                Err(Unauthentic::Unsealed) if migrate => Opened { body: value, key: None },
                opened => opened.map_err(|error| invalid(error.to_string()))?,
            };
            must_rewrite |= opened.key != Some(secret.current());
            let value = opened.body;
            match parsed {
                Key::Counters => {
                    counters = Some(stored::decode_counters(value).map_err(invalid)?);
                    sum_key = opened.key;
                }
                Key::Mesh => mesh = Some(stored::decode_mesh(&authority, value).map_err(invalid)?),
                Key::LastSeen => {
                    for (node, time) in stored::decode_last_seen(value).map_err(invalid)? {
                        later(&mut last_seen, node, time);
                    }
                }
                Key::Node(id) => {
                    let node = stored::decode_node(&authority, id, value, now).map_err(invalid)?;
                    members.push(node.member);
                    later(&mut last_seen, id, node.last_seen);
                    nodes.insert(id, Statements { grant: node.grant, record: node.record });
                }
                Key::RemovedNode(id) => {
                    let (removed, signed) =
                        stored::decode_removed_node(&authority, id, value).map_err(invalid)?;
                    removed_nodes.push(removed);
                    tombstones.insert(id, signed);
                }
                Key::Token(id) => tokens.push(stored::decode_token(id, value).map_err(invalid)?),
                Key::Admin(key) => admins.push(stored::decode_admin(key, value).map_err(invalid)?),
            }
        }
        last_seen.retain(|node, time| *time > 0 && nodes.contains_key(node));
        let (mesh, signed_mesh) = mesh.ok_or(ReadError::Missing("mesh"))?;
        let (counters, stored_sum) = counters.ok_or(ReadError::Missing("meta"))?;
        let (current_items, current_sum) = items(&authority, secret.current(), records);
        // A store that is migrated has no sum that could be trusted.
        if let Some(sum_key) = sum_key.filter(|_| !migrate) {
            let sum = if sum_key == secret.current() {
                current_sum
            } else {
                items(&authority, sum_key, records).1
            };
            if sum != stored_sum {
                return Err(ReadError::Mixed);
            }
        }
        let contents = Contents { counters, mesh, members, removed_nodes, tokens, admins };
        let registry = Registry::load(contents)?;
        Ok(Self {
            registry,
            mesh: signed_mesh,
            nodes,
            tombstones,
            last_seen,
            items: current_items,
            sum: current_sum,
            must_rewrite,
            authority,
        })
    }

    /// Returns the registry, to read it or to apply an operation that needs no signed statement.
    pub fn registry(&mut self) -> &mut Registry {
        &mut self.registry
    }

    /// Returns when nodes were last seen before this process started.
    pub fn last_seen(&self) -> impl Iterator<Item = (NodeId, i64)> {
        self.last_seen.iter().map(|(node, time)| (*node, *time))
    }

    /// Returns the counters of the registry.
    pub fn counters(&self) -> Counters {
        self.registry.counters()
    }

    /// Returns whether stored records are not authenticated with the current key. The next changes include all
    /// records then.
    pub fn needs_rewrite(&self) -> bool {
        self.must_rewrite
    }

    /// Stores a record that a node signed. The caller has verified the signature.
    pub fn publish(
        &mut self,
        node: NodeId,
        session: &SessionId,
        (record, signed): (Record, pb::Signed),
        sessions: &Sessions,
        now: Now,
    ) -> Result<Published, PublishError> {
        let difference = self.difference(node, &record, &signed);
        let published = self.registry.publish(node, session, record, difference, sessions, now)?;
        if published.is_stored {
            self.nodes.entry(node).or_default().record = Some(signed);
        }
        Ok(published)
    }

    /// Compares a record with the stored one of the node. [`Difference::Generation`] is only returned if
    /// this version knows every field of both, because unknown fields may differ.
    fn difference(&self, node: NodeId, record: &Record, signed: &pb::Signed) -> Difference {
        let stored = self.registry.member(node).ok().and_then(|member| member.record.as_ref());
        let before = self.nodes.get(&node).and_then(|node| node.record.as_ref());
        let (Some(stored), Some(before)) = (stored, before) else { return Difference::Content };
        if before.body == signed.body {
            return Difference::Nothing;
        }
        let encoded =
            |generation| pb::Record::from(&Record { generation, ..stored.clone() }).encode_to_vec();
        let is_known = before.body == encoded(stored.generation);
        if is_known && signed.body == encoded(record.generation) {
            Difference::Generation
        } else {
            Difference::Content
        }
    }

    /// Signs what is new, and returns the changes since the previous call. `last_seen` returns when
    /// nodes were last seen, and is called only if that is to be stored.
    pub fn take_changes(&mut self, last_seen: impl Fn() -> BTreeMap<NodeId, i64>) -> LedgerChanges {
        let Changes { unsigned, mut records, problems, events } = self.registry.take_changes();
        let rewrites = self.must_rewrite && !records.is_empty();
        if rewrites {
            self.must_rewrite = false;
            records.extend(self.keys());
            records.insert(Key::LastSeen);
        }
        unsigned.into_iter().for_each(|value| self.sign(value));
        let mut changes = LedgerChanges { events, ..LedgerChanges::default() };
        for key in &records {
            if let Key::Node(id) = key
                && self.registry.member(*id).is_err()
            {
                self.nodes.remove(id);
            }
            let body = match key {
                // Written last, because it has the sum over the others.
                Key::Counters => continue,
                // Nodes may not have been seen yet since this process started.
                Key::LastSeen if rewrites => Some(stored::encode_last_seen(self.last_seen())),
                key => self.encode(*key, &last_seen),
            };
            let write = self.write(*key, body);
            changes.writes.push(write);
            changes.map.extend(self.map_change(*key));
            changes.view.extend(self.view_change(*key));
        }
        if records.contains(&Key::Counters) {
            let counters = stored::encode_counters(self.registry.counters(), &self.sum);
            changes.writes.push(self.write(Key::Counters, Some(counters)));
        }
        let noted = problems.into_iter().filter(|node| !records.contains(&Key::Node(*node)));
        changes.view.extend(noted.filter_map(|node| self.view_change(Key::Node(node))));
        changes.map.sort_by_key(MapChange::revision);
        changes
    }

    /// Marks all records of the store as a backup, so that a controller that starts from them knows
    /// that they may be old.
    pub fn mark_backup(&self, records: &mut [StoreRecord]) {
        let name = key_text(Key::Counters);
        let counters = Counters { is_backup: true, ..self.counters() };
        let counters = stored::encode_counters(counters, &self.sum);
        let counters = self.authority.store_secret().seal(&name, &counters);
        for (_, value) in records.iter_mut().filter(|(key, _)| *key == name) {
            value.clone_from(&counters);
        }
    }

    /// Returns the complete map, sorted by revision.
    pub fn map(&self) -> Vec<MapChange> {
        let mut map: Vec<MapChange> = self.keys().filter_map(|key| self.map_change(key)).collect();
        map.sort_by_key(MapChange::revision);
        map
    }

    /// Returns everything that operators see.
    pub fn view(&self) -> Vec<ViewChange> {
        self.keys().filter_map(|key| self.view_change(key)).collect()
    }

    fn keys(&self) -> impl Iterator<Item = Key> {
        let nodes = self.registry.members().map(|member| Key::Node(member.grant.node_id));
        let removed = self.registry.removed_nodes();
        let removed = removed.map(|removed| Key::RemovedNode(removed.tombstone.node_id));
        let tokens = self.registry.tokens().map(|token| Key::Token(token.id));
        let admins = self.registry.admins().map(|admin| Key::Admin(admin.key));
        nodes.chain(removed).chain(tokens).chain(admins).chain([Key::Mesh])
    }

    fn sign(&mut self, value: Unsigned) {
        match value {
            Unsigned::Mesh => {
                self.mesh = self.authority.sign_mesh(&self.registry.mesh().config);
            }
            Unsigned::Grant(id) => {
                if let Ok(member) = self.registry.member(id) {
                    let signed = self.authority.sign_grant(&member.grant);
                    self.nodes.entry(id).or_default().grant = signed;
                }
            }
            Unsigned::Tombstone(id) => {
                if let Some(removed) = self.registry.removed_node(id) {
                    let signed = self.authority.sign_tombstone(&removed.tombstone);
                    self.tombstones.insert(id, signed);
                }
            }
        }
    }

    /// Returns the write of a record, authenticated, and updates the sum over all records.
    fn write(&mut self, key: Key, body: Option<Vec<u8>>) -> Write {
        let (name, secret) = (key_text(key), self.authority.store_secret());
        let value = body.map(|body| secret.seal(&name, &body));
        self.count(&name, value.as_deref());
        (name, value)
    }

    /// Updates the sum over all records for the value that is stored under a key now; `None` if it is deleted.
    fn count(&mut self, name: &str, value: Option<&[u8]>) {
        if name == key_text(Key::Counters) {
            return;
        }
        if let Some(old) = self.items.remove(name) {
            self.sum.remove(&old);
        }
        let secret = self.authority.store_secret();
        let item = value.and_then(|value| secret.item(secret.current(), name, value));
        if let Some(item) = item {
            self.sum.add(&item);
            self.items.insert(name.to_owned(), item);
        }
    }

    /// Returns the value to store under a key; `None` if the record is deleted.
    fn encode(&self, key: Key, last_seen: impl Fn() -> BTreeMap<NodeId, i64>) -> Option<Vec<u8>> {
        let registry = &self.registry;
        match key {
            Key::Counters => Some(stored::encode_counters(registry.counters(), &self.sum)),
            Key::Mesh => Some(stored::encode_mesh(registry.mesh().revision, &self.mesh)),
            Key::LastSeen => Some(stored::encode_last_seen(last_seen())),
            Key::Node(id) => {
                let (member, node) = (registry.member(id).ok()?, self.nodes.get(&id)?);
                Some(stored::encode_node(member, &node.grant, node.record.as_ref()))
            }
            Key::RemovedNode(id) => {
                let removed = registry.removed_node(id)?;
                Some(stored::encode_removed_node(removed.revision, self.tombstones.get(&id)?))
            }
            Key::Token(id) => registry.token(id).map(stored::encode_token),
            Key::Admin(key) => registry.admin(key).map(stored::encode_admin),
        }
    }

    fn map_change(&self, key: Key) -> Option<MapChange> {
        match key {
            Key::Node(id) => {
                let (member, node) = (self.registry.member(id).ok()?, self.nodes.get(&id)?);
                Some(MapChange::Node {
                    revision: member.revision,
                    id,
                    name: member.grant.name.clone(),
                    identity: member.grant.identity_key,
                    entry: pb::Entry {
                        grant: Some(node.grant.clone()),
                        record: node.record.clone(),
                        withheld: member.withheld.iter().map(Into::into).collect(),
                    },
                })
            }
            Key::RemovedNode(id) => {
                let removed = self.registry.removed_node(id)?;
                Some(MapChange::Removed {
                    revision: removed.revision,
                    id,
                    name: removed.tombstone.name.clone(),
                    tombstone: self.tombstones.get(&id)?.clone(),
                })
            }
            Key::Mesh => Some(MapChange::Mesh {
                revision: self.registry.mesh().revision,
                signed: self.mesh.clone(),
            }),
            Key::Counters | Key::LastSeen | Key::Token(_) | Key::Admin(_) => None,
        }
    }

    fn view_change(&self, key: Key) -> Option<ViewChange> {
        match key {
            Key::Node(id) => {
                let Ok(member) = self.registry.member(id) else {
                    return Some(ViewChange::NodeRemoved(id));
                };
                let node = self.nodes.get(&id)?;
                Some(ViewChange::Node(Arc::new(NodeView {
                    id,
                    name: member.grant.name.clone(),
                    site: member.grant.site.clone(),
                    grant: node.grant.clone(),
                    record: node.record.clone(),
                    token: member.token,
                    joined_at: member.joined_at,
                    problems: self.registry.problems(id),
                })))
            }
            Key::Token(id) => Some(match self.registry.token(id) {
                Some(token) => {
                    let message = stored::token_message(token);
                    let secret_hash = token.secret_hash;
                    ViewChange::Token(id, Arc::new(TokenView { message, secret_hash }))
                }
                None => ViewChange::TokenRemoved(id),
            }),
            Key::Admin(key) => Some(match self.registry.admin(key) {
                Some(admin) => ViewChange::Admin(Arc::new(admin.clone())),
                None => ViewChange::AdminRemoved(key),
            }),
            Key::Counters | Key::LastSeen | Key::Mesh | Key::RemovedNode(_) => None,
        }
    }
}

/// Returns what each record but the counters adds to the sum under a key of the store's secret, and the sum.
fn items(
    authority: &Authority,
    key: KeyId,
    records: &[StoreRecord],
) -> (BTreeMap<String, RecordSum>, RecordSum) {
    let (mut items, mut sum) = (BTreeMap::new(), RecordSum::default());
    let counters = key_text(Key::Counters);
    for (name, value) in records.iter().filter(|(name, _)| *name != counters) {
        if let Some(item) = authority.store_secret().item(key, name, value) {
            sum.add(&item);
            items.insert(name.clone(), item);
        }
    }
    (items, sum)
}

fn later(last_seen: &mut BTreeMap<NodeId, i64>, node: NodeId, time: i64) {
    let known = last_seen.entry(node).or_default();
    *known = time.max(*known);
}

#[cfg(test)]
mod tests;
