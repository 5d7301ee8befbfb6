//! Network map as this node last received it, as signed bytes. Each statement is verified when it
//! is received.
//!
//! With the cache a node reconnects to its peers while no controller can be reached. The cache
//! contains the statements as they were signed. Reading it verifies them again, so modified entries
//! of a cache file are refused one by one.
//!
//! Invariants: a node with a tombstone has no entry and never gets one again. Of two records the
//! one with the higher generation is kept. The absence of a node removes nothing. The identity key of a
//! node never changes: the CA alone, which the controller holds, cannot put another machine in the place
//! of a known node. Its WireGuard keys are named by its record, which the identity key signs.

use std::collections::BTreeMap;

use prost::Message as _;
use towline_core::mesh::MapChange;
use towline_proto::id::{IdentityKey, NodeId, NodeName};
use towline_proto::limits;
use towline_proto::node::{Head, MeshConfig, Record, Tombstone};
use towline_proto::{pb, signed};

use crate::map_journal;
use crate::removals::{Removals, removed_at};

/// Start of a cache file: format name and version.
const MAGIC: &[u8; 8] = b"TLMAP\x001\n";

/// Largest number of changes that are collected for one entry of the journal. A whole map has more.
const PENDING: usize = 1_024;

/// Error of reading a cache file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCache {
    /// The file has another format, or is truncated.
    #[error("not a map, or truncated")]
    Malformed,
}

/// What a controller did with the identity of a node, and the operator should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentityAlert {
    /// The controller sent another identity key for a known node. It was refused.
    KeyChanged {
        /// Id of the node.
        node: NodeId,
        /// Name of the node.
        name: NodeName,
    },
    /// A name that a known node had is that of another node now.
    NameMoved {
        /// The name.
        name: NodeName,
        /// Id of the node that had it.
        from: NodeId,
        /// Id of the node that has it.
        to: NodeId,
    },
}

/// Result of applying changes.
#[derive(Debug, Default)]
pub struct Applied {
    /// Changes for the core, in order.
    pub changes: Vec<MapChange>,
    /// Grant of this node, if it was among the changes.
    pub own_grant: Option<pb::Signed>,
    /// Reasons of the statements that were refused: a faulty controller, or a newer format.
    pub refused: Vec<String>,
    /// What happened to the identity of nodes.
    pub alerts: Vec<IdentityAlert>,
}

/// Network map. The module documentation lists its invariants.
#[derive(Debug, Clone)]
pub struct MapCache {
    ca: IdentityKey,
    own: NodeId,
    epoch: u64,
    revision: u64,
    entries: BTreeMap<NodeId, pb::Entry>,
    generations: BTreeMap<NodeId, u64>,
    /// Identity key of each entry.
    identities: BTreeMap<NodeId, IdentityKey>,
    /// Last node with each name, also after that was removed.
    names: BTreeMap<NodeName, NodeId>,
    tombstones: BTreeMap<NodeId, pb::Signed>,
    mesh: Option<(pb::Signed, MeshConfig)>,
    head: Option<(pb::Signed, Head)>,
    /// Changes since the map was last encoded, for its journal; `None` if the whole map has to be written.
    pending: Option<Vec<pb::change::Kind>>,
    own_record: Option<Record>,
}

impl MapCache {
    /// Creates an empty map. Statements are verified with the key `ca`.
    pub fn new(ca: IdentityKey, own: NodeId) -> Self {
        Self {
            ca,
            own,
            epoch: 0,
            revision: 0,
            entries: BTreeMap::new(),
            generations: BTreeMap::new(),
            identities: BTreeMap::new(),
            names: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            mesh: None,
            head: None,
            pending: None,
            own_record: None,
        }
    }

    /// Returns the epoch and the revision from which a session resumes.
    pub fn position(&self) -> (u64, u64) {
        (self.epoch, self.revision)
    }

    /// Enters the controller's epoch. In a new epoch the map is requested again; no entry is
    /// dropped.
    pub fn enter_epoch(&mut self, epoch: u64) {
        if self.epoch != epoch {
            self.epoch = epoch;
            self.revision = 0;
            self.pending = None;
        }
    }

    /// Returns the mesh configuration, as it was signed and parsed.
    pub fn mesh(&self) -> Option<(&pb::Signed, &MeshConfig)> {
        self.mesh.as_ref().map(|(signed, mesh)| (signed, mesh))
    }

    /// Returns the newest head of the map that a controller showed, as it was signed. With it a controller that
    /// was restored from a copy of its machine knows that it lost changes.
    pub fn head(&self) -> Option<&pb::Signed> {
        self.head.as_ref().map(|(signed, _)| signed)
    }

    /// Verifies a head of the map, and stores it if it is newer than the present one. Returns whether it is.
    pub fn take_head(&mut self, head: pb::Signed) -> Result<bool, signed::Untrusted> {
        let verified = signed::head(Some(&head), &self.ca)?;
        let is_newer =
            self.head.as_ref().is_none_or(|(_, have)| have.position() < verified.position());
        if is_newer {
            self.head = Some((head, verified));
        }
        Ok(is_newer)
    }

    /// Returns the record that the mesh has of this node.
    pub fn own_record(&self) -> Option<&Record> {
        self.own_record.as_ref()
    }

    /// Returns the tombstones of the newest removals, which a session in another epoch sends to the controller.
    pub fn tombstones(&self) -> Vec<pb::Signed> {
        let all = self.timed_tombstones();
        let newest = all.get(all.len().saturating_sub(limits::TOMBSTONES)..).unwrap_or_default();
        newest.iter().map(|(_, tombstone)| (*tombstone).clone()).collect()
    }

    /// Returns whether a node was removed.
    pub fn is_removed(&self, node: NodeId) -> bool {
        self.tombstones.contains_key(&node)
    }

    /// Returns the removals at `since` (seconds since 1970) or later, the oldest first.
    pub fn removals(&self, since: i64) -> Removals {
        let all = self.timed_tombstones();
        let newest = all.last().map_or(0, |(at, _)| *at);
        let wanted = all.into_iter().filter(|(at, _)| *at >= since);
        Removals { newest, tombstones: wanted.map(|(_, tombstone)| tombstone.clone()).collect() }
    }

    /// Returns all tombstones with the time of the removal, the oldest first.
    fn timed_tombstones(&self) -> Vec<(i64, &pb::Signed)> {
        let tombstones = self.tombstones.values();
        let timed = tombstones.filter_map(|tombstone| Some((removed_at(tombstone)?, tombstone)));
        let mut all: Vec<_> = timed.collect();
        all.sort_by_key(|(at, _)| *at);
        all
    }

    /// Applies changes from the controller. Each statement is verified separately.
    pub fn apply(&mut self, changes: pb::Changes) -> Applied {
        let mut applied = Applied::default();
        self.revision = self.revision.max(changes.revision);
        for change in changes.kinds() {
            if let Ok(kind) = &change {
                self.note(kind);
            }
            let result = match change {
                Ok(pb::change::Kind::Upsert(entry)) => self.upsert(entry, &mut applied),
                Ok(pb::change::Kind::Tombstone(tombstone)) => self.remove_node(tombstone),
                Ok(pb::change::Kind::Mesh(mesh)) => self.configure(mesh),
                Err(malformed) => Err(malformed.into()),
            };
            match result {
                Ok(change) => applied.changes.extend(change),
                Err(error) => applied.refused.push(error.to_string()),
            }
        }
        applied
    }

    /// Adds a change to those for the journal, if there are not too many.
    fn note(&mut self, change: &pb::change::Kind) {
        if let Some(pending) = &mut self.pending {
            if pending.len() < PENDING {
                pending.push(change.clone());
            } else {
                self.pending = None;
            }
        }
    }

    /// Returns the whole map encoded. From now on changes are collected for its journal.
    pub fn take_whole(&mut self) -> Vec<u8> {
        self.pending = Some(Vec::new());
        self.encode()
    }

    /// Returns the changes since the last call of this or of [`Self::take_whole`] as an entry of the journal, and
    /// whether a tombstone is among them. `None` if the whole map has to be written.
    pub fn take_entry(&mut self) -> Option<(Vec<u8>, bool)> {
        let kinds = self.pending.as_mut().map(std::mem::take)?;
        let has_tombstone = kinds.iter().any(|kind| matches!(kind, pb::change::Kind::Tombstone(_)));
        let mut changes = pb::Changes::of(kinds, self.revision);
        changes.head = self.head().cloned();
        Some((map_journal::entry(&changes.encode_to_vec()), has_tombstone))
    }

    /// Applies the journal of this map, which [`Self::restore`] has just read.
    pub fn replay(&mut self, journal: &[u8]) {
        let mut is_complete = true;
        for entry in map_journal::entries(journal, self.position()) {
            let Ok(mut changes) = pb::Changes::decode(entry) else {
                is_complete = false;
                break;
            };
            let head = changes.head.take();
            is_complete &= self.apply(changes).refused.is_empty();
            if let Some(head) = head {
                let _ = self.take_head(head);
            }
        }
        if !is_complete {
            // What is missing is requested again.
            self.revision = 0;
        }
    }

    /// Verifies and stores a node. Ignores a removed node, an older record, and nodes past the
    /// limit. Passes on the grant of this node.
    fn upsert(
        &mut self,
        entry: pb::Entry,
        applied: &mut Applied,
    ) -> Result<Option<MapChange>, signed::Untrusted> {
        let Some(node) = signed::node(&entry, &self.ca)? else { return Ok(None) };
        let (id, generation) = (node.id(), node.record().generation);
        if self.tombstones.contains_key(&id)
            || self.generations.get(&id).is_some_and(|have| *have > generation)
            || (self.entries.len() >= limits::NODES && !self.entries.contains_key(&id))
        {
            return Ok(None);
        }
        let (name, identity) = (node.name().clone(), node.grant().identity_key);
        if self.identities.get(&id).is_some_and(|known| *known != identity) {
            applied.alerts.push(IdentityAlert::KeyChanged { node: id, name });
            return Ok(None);
        }
        self.identities.insert(id, identity);
        let moved = self.names.insert(name.clone(), id).filter(|from| *from != id);
        applied.alerts.extend(moved.map(|from| IdentityAlert::NameMoved { name, from, to: id }));
        if id == self.own {
            applied.own_grant.clone_from(&entry.grant);
        }
        self.entries.insert(id, entry);
        self.generations.insert(id, generation);
        if id == self.own {
            self.own_record = Some(node.record().clone());
            return Ok(None);
        }
        Ok(Some(MapChange::Upsert(Box::new(node))))
    }

    /// Verifies and stores a tombstone, and removes the node's entry.
    fn remove_node(
        &mut self,
        tombstone: pb::Signed,
    ) -> Result<Option<MapChange>, signed::Untrusted> {
        let verified = signed::tombstone(Some(&tombstone), &self.ca)?;
        let id = verified.node_id;
        self.entries.remove(&id);
        self.generations.remove(&id);
        self.identities.remove(&id);
        if self.tombstones.insert(id, tombstone).is_some() {
            return Ok(None);
        }
        Ok(Some(MapChange::Remove(verified)))
    }

    /// Verifies the mesh configuration, and stores it if it is newer than the present one.
    fn configure(&mut self, mesh: pb::Signed) -> Result<Option<MapChange>, signed::Untrusted> {
        let verified = signed::mesh(Some(&mesh), &self.ca)?;
        if self.mesh.as_ref().is_some_and(|(_, have)| !verified.is_newer_than(have)) {
            return Ok(None);
        }
        self.mesh = Some((mesh, verified.clone()));
        Ok(Some(MapChange::Mesh(verified)))
    }

    /// Encodes the map for the cache file: magic, epoch (big-endian), and one `Changes` message.
    pub fn encode(&self) -> Vec<u8> {
        let upserts = self.entries.values().cloned().map(pb::change::Kind::Upsert);
        let tombstones = self.tombstones.values().cloned().map(pb::change::Kind::Tombstone);
        let mesh = self.mesh.iter().map(|(signed, _)| pb::change::Kind::Mesh(signed.clone()));
        let mut changes = pb::Changes::of(mesh.chain(tombstones).chain(upserts), self.revision);
        changes.head = self.head().cloned();
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&self.epoch.to_be_bytes());
        bytes.extend_from_slice(&changes.encode_to_vec());
        bytes
    }

    /// Reads the output of [`MapCache::encode`] into this empty map.
    pub fn restore(mut self, bytes: &[u8]) -> Result<Self, InvalidCache> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(InvalidCache::Malformed)?;
        let (epoch, body) = rest.split_first_chunk::<8>().ok_or(InvalidCache::Malformed)?;
        let mut changes = pb::Changes::decode(body).map_err(|_| InvalidCache::Malformed)?;
        self.epoch = u64::from_be_bytes(*epoch);
        if let Some(head) = changes.head.take() {
            // Without it, a controller's rollback may be noticed by other nodes only.
            let _ = self.take_head(head);
        }
        let applied = self.apply(changes);
        if !applied.refused.is_empty() {
            // Refused statements are requested again.
            self.revision = 0;
        }
        // A node that was removed may be replaced at any time: its name is remembered.
        for tombstone in self.tombstones.values() {
            let decoded = pb::Tombstone::decode(tombstone.body.clone()).ok();
            if let Some(removed) = decoded.and_then(|removed| Tombstone::try_from(removed).ok()) {
                self.names.entry(removed.name).or_insert(removed.node_id);
            }
        }
        Ok(self)
    }

    /// Returns the whole map as changes, for the core at the start.
    pub fn changes(&self) -> Vec<MapChange> {
        let mesh = self.mesh.iter().map(|(_, mesh)| MapChange::Mesh(mesh.clone()));
        let tombstones = self
            .tombstones
            .values()
            .filter_map(|tombstone| signed::tombstone(Some(tombstone), &self.ca).ok())
            .map(MapChange::Remove);
        let upserts = self
            .entries
            .iter()
            .filter(|(id, _)| **id != self.own)
            .filter_map(|(_, entry)| signed::node(entry, &self.ca).ok().flatten())
            .map(|node| MapChange::Upsert(Box::new(node)));
        mesh.chain(tombstones).chain(upserts).collect()
    }
}

#[cfg(test)]
mod tests {
    use towline_fixtures::ca::{Ca, identity, public, sign_record};
    use towline_fixtures::node::{mesh_config, node, tombstone};
    use towline_proto::node::Grant;
    use towline_proto::signed::Domain;

    use super::*;

    fn changes(revision: u64, kinds: Vec<pb::change::Kind>) -> pb::Changes {
        pb::Changes::of(kinds, revision)
    }

    use pb::change::Kind::{Tombstone as Bury, Upsert};

    #[test]
    fn the_cache_survives_a_restart() {
        let ca = Ca::new(9);
        let mut map = MapCache::new(ca.public(), NodeId([1; 16]));
        map.enter_epoch(4);
        map.apply(changes(
            7,
            vec![Upsert(ca.entry(node(2))), Upsert(ca.entry(node(3))), Bury(ca.tombstone(3))],
        ));
        let read = MapCache::new(ca.public(), NodeId([1; 16])).restore(&map.encode()).unwrap();
        assert_eq!(read.position(), (4, 7));
        assert_eq!(read.changes().len(), 2);
        assert_eq!(read.encode(), map.encode());
    }

    #[test]
    fn the_journal_brings_back_what_changed_since_the_map_was_written() {
        let ca = Ca::new(9);
        let own = NodeId([1; 16]);
        let mut map = MapCache::new(ca.public(), own);
        map.apply(changes(5, vec![Upsert(ca.entry(node(2)))]));
        assert_eq!(map.take_entry(), None, "the whole map is written first");
        let (whole, position) = (map.take_whole(), map.position());
        let mut journal = map_journal::begin(position);
        map.apply(changes(6, vec![Upsert(ca.entry(node(3)))]));
        let (entry, has_tombstone) = map.take_entry().unwrap();
        assert!(!has_tombstone);
        journal.extend(entry);
        map.apply(changes(7, vec![Bury(ca.tombstone(2))]));
        let (entry, has_tombstone) = map.take_entry().unwrap();
        assert!(has_tombstone);
        journal.extend(entry);

        let mut read = MapCache::new(ca.public(), own).restore(&whole).unwrap();
        read.replay(&journal);
        assert_eq!(read.encode(), map.encode());
        let mut other = MapCache::new(ca.public(), own);
        other.replay(&journal);
        assert_eq!(other.position(), (0, 0), "the journal of another map");
        map.enter_epoch(9);
        assert_eq!(map.take_entry(), None);
    }

    #[test]
    fn the_newest_head_survives_a_restart_and_a_forged_one_is_refused() {
        let ca = Ca::new(9);
        let head = |ca: &Ca, epoch, revision| {
            let mesh_id = towline_fixtures::node::MESH;
            ca.sign(Domain::Head, &pb::Head::from(&Head { mesh_id, epoch, revision }))
        };
        let mut map = MapCache::new(ca.public(), NodeId([1; 16]));
        assert_eq!(map.take_head(head(&ca, 2, 5)), Ok(true));
        assert_eq!(map.take_head(head(&ca, 1, 9)), Ok(false));
        assert!(map.take_head(head(&Ca::new(8), 3, 1)).is_err());
        let read = MapCache::new(ca.public(), NodeId([1; 16])).restore(&map.encode()).unwrap();
        assert_eq!(read.head(), Some(&head(&ca, 2, 5)));
    }

    #[test]
    fn a_configuration_of_a_later_epoch_wins_over_a_higher_generation() {
        let ca = Ca::new(9);
        let mesh = |epoch, generation| {
            let mesh = MeshConfig { epoch, generation, ..mesh_config() };
            let signed = ca.sign(Domain::Mesh, &pb::MeshConfig::from(&mesh));
            changes(1, vec![pb::change::Kind::Mesh(signed)])
        };
        let mut map = MapCache::new(ca.public(), NodeId([1; 16]));
        map.apply(mesh(1, 7));
        assert!(map.apply(mesh(1, 6)).changes.is_empty());
        assert_eq!(map.apply(mesh(2, 3)).changes.len(), 1);
        assert!(map.apply(mesh(1, 8)).changes.is_empty());
    }

    #[test]
    fn a_known_node_keeps_its_identity_and_a_name_that_moves_is_told() {
        let ca = Ca::new(9);
        let mut map = MapCache::new(ca.public(), NodeId([1; 16]));
        let applied = map.apply(changes(1, vec![Upsert(ca.entry(node(2)))]));
        assert_eq!((applied.changes.len(), applied.alerts.len()), (1, 0));
        // The entry of another machine under the id of node 2, then one under its name.
        let other = identity(3);
        let grant = Grant { identity_key: public(&other), ..node(2).grant };
        let forged = pb::Entry {
            grant: Some(ca.grant(&grant)),
            record: Some(sign_record(&node(2).generation(9).record, &other)),
            withheld: Vec::new(),
        };
        let applied = map.apply(changes(2, vec![Upsert(forged)]));
        assert!(applied.changes.is_empty());
        assert!(matches!(&applied.alerts[..], [IdentityAlert::KeyChanged { .. }]));

        map.apply(changes(3, vec![Bury(ca.tombstone(2))]));
        let mut map = MapCache::new(ca.public(), NodeId([1; 16])).restore(&map.encode()).unwrap();
        let mut heir = node(4);
        heir.grant.name = "node-2".parse().unwrap();
        let applied = map.apply(changes(4, vec![Upsert(ca.entry(heir))]));
        assert_eq!(applied.changes.len(), 1);
        let moved = IdentityAlert::NameMoved {
            name: "node-2".parse().unwrap(),
            from: NodeId([2; 16]),
            to: NodeId([4; 16]),
        };
        assert_eq!(applied.alerts, [moved]);
    }

    #[test]
    fn removals_are_returned_from_a_time_on_the_oldest_first() {
        let ca = Ca::new(9);
        let removal = |number: u8, removed_at: i64| {
            let tombstone = Tombstone { removed_at, ..tombstone(number) };
            ca.sign(Domain::Tombstone, &pb::Tombstone::from(&tombstone))
        };
        let mut map = MapCache::new(ca.public(), NodeId([1; 16]));
        let (late, early, middle) = (removal(2, 30), removal(3, 10), removal(4, 20));
        let all = [&late, &early, &middle].map(|signed| Bury(signed.clone()));
        map.apply(changes(1, all.to_vec()));
        let tombstones = vec![middle.clone(), late.clone()];
        assert_eq!(map.removals(20), Removals { newest: 30, tombstones });
        assert_eq!(map.removals(31), Removals { newest: 30, tombstones: Vec::new() });
        assert_eq!(map.tombstones(), [early, middle, late]);
    }

    #[test]
    fn a_removed_node_does_not_come_back() {
        let ca = Ca::new(9);
        let mut map = MapCache::new(ca.public(), NodeId([1; 16]));
        map.apply(changes(1, vec![Bury(ca.tombstone(2))]));
        let applied = map.apply(changes(2, vec![Upsert(ca.entry(node(2).generation(9)))]));
        assert!(applied.changes.is_empty());
    }

    #[test]
    fn an_older_record_does_not_replace_a_newer_one() {
        let ca = Ca::new(9);
        let mut map = MapCache::new(ca.public(), NodeId([1; 16]));
        assert_eq!(
            map.apply(changes(1, vec![Upsert(ca.entry(node(2).generation(5)))])).changes.len(),
            1
        );
        assert!(
            map.apply(changes(2, vec![Upsert(ca.entry(node(2).generation(4)))])).changes.is_empty()
        );
    }

    #[test]
    fn a_forged_entry_is_refused_and_the_rest_taken() {
        let ca = Ca::new(9);
        let mut map = MapCache::new(ca.public(), NodeId([1; 16]));
        let mut forged = ca.entry(node(2));
        if let Some(record) = &mut forged.record {
            let mut body = record.body.to_vec();
            body.push(0);
            record.body = body.into();
        }
        let applied = map.apply(changes(1, vec![Upsert(forged), Upsert(ca.entry(node(3)))]));
        assert_eq!((applied.changes.len(), applied.refused.len()), (1, 1));
    }

    #[test]
    fn a_cut_cache_is_refused_without_panic() {
        let ca = Ca::new(9);
        let mut map = MapCache::new(ca.public(), NodeId([1; 16]));
        map.apply(changes(1, vec![Upsert(ca.entry(node(2)))]));
        let bytes = map.encode();
        for end in 0..bytes.len() {
            // Every result but a panic is fine. A cut between fields may be a valid smaller map.
            let _ = MapCache::new(ca.public(), NodeId([1; 16])).restore(&bytes[..end]);
        }
        assert!(MapCache::new(ca.public(), NodeId([1; 16])).restore(b"nonsense").is_err());
    }

    #[test]
    fn the_core_gets_our_own_tombstone_too_also_from_the_cache() {
        let ca = Ca::new(9);
        let own = NodeId([1; 16]);
        let mut map = MapCache::new(ca.public(), own);
        let applied = map.apply(changes(1, vec![Bury(ca.tombstone(1))]));
        let restored = MapCache::new(ca.public(), own).restore(&map.encode()).unwrap();
        for changes in [applied.changes, restored.changes()] {
            assert!(matches!(&changes[..], [MapChange::Remove(removed)] if removed.node_id == own));
        }
    }
}
