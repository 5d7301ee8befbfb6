//! The network map that watchers see. It only contains state that is stored.
//!
//! A watcher is a cursor: a revision up to which it has received everything. It receives the
//! changes after its cursor, each item once in its newest state, in bounded messages. So nothing is
//! queued for a watcher, and a slow one skips intermediate states.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use parking_lot::RwLock;
use prost::bytes::Bytes;
use tokio::sync::watch;
use towline_proto::id::{IdentityKey, NodeId, NodeName};
use towline_proto::{limits, pb};

use crate::clock;
use towline_registry::NodeAbsent;

/// Memory for the messages that watches send, in bytes, over all watches: with many watches, each message is
/// smaller.
const WATCHES_BYTES: usize = 512 * 1024 * 1024;
/// Smallest limit of a message's size in bytes: what [`WATCHES_BYTES`] leaves for each of the
/// [`limits::NODES`] watches of the largest mesh, rounded down.
const LEAST_MESSAGE_BYTES: usize = 48 * 1024;

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

/// Reason why the holder of a certificate is not a node of the mesh.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AccessError {
    /// The mesh has no such node.
    #[error(transparent)]
    Absent(#[from] NodeAbsent),
    /// The certificate names a node but has another key.
    #[error("the certificate's key is not the key of node {node}: join again with a new token")]
    Key {
        /// Id in the certificate.
        node: NodeId,
    },
}

/// The network map. The writer changes it; all others read it.
pub struct Map {
    inner: RwLock<Inner>,
    /// Newest revision, to wake the watchers.
    latest: watch::Sender<u64>,
}

/// Content of the map.
#[derive(Default)]
struct Inner {
    epoch: u64,
    revision: u64,
    mesh: pb::Signed,
    nodes: HashMap<NodeId, Node>,
    removed: HashMap<NodeId, Removed>,
    /// Encoded [`pb::Change`] of each item (a node, a tombstone or the mesh), by the revision of its newest
    /// state. Each item occurs once, and all watchers share its bytes.
    index: BTreeMap<u64, Bytes>,
    mesh_revision: u64,
    /// Bytes of all changes that were encoded since the start.
    encoded_bytes: u64,
    /// Time at which the newest revision was published; `None` before the first one.
    published_at: Option<Instant>,
}

/// A node, with the revision of its newest state.
struct Node {
    revision: u64,
    name: NodeName,
    identity: IdentityKey,
    grant: pb::Signed,
}

/// A removed node, with the revision of its removal.
struct Removed {
    revision: u64,
    name: NodeName,
    tombstone: pb::Signed,
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

impl Map {
    /// Creates an empty map.
    pub fn new() -> Self {
        Self { inner: RwLock::default(), latest: watch::Sender::new(0) }
    }

    /// Publishes `changes`, which must be stored already, up to `revision`, and wakes the watchers.
    pub fn apply(&self, epoch: u64, revision: u64, changes: Vec<MapChange>) {
        {
            let mut inner = self.inner.write();
            inner.epoch = epoch;
            // Commits of what is not part of the map do not make its newest revision younger.
            if revision > inner.revision {
                inner.revision = revision;
                inner.published_at = Some(clock::now().mono);
            }
            for change in changes {
                inner.apply(change);
            }
        }
        self.latest.send_if_modified(|latest| {
            let newer = revision > *latest;
            *latest = revision.max(*latest);
            newer
        });
    }

    /// Returns a receiver of the newest revision. It wakes whenever the map changes.
    pub fn latest(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }

    /// Returns the epoch of the mesh.
    pub fn epoch(&self) -> u64 {
        self.inner.read().epoch
    }

    /// Returns the epoch of the mesh and the newest revision, both of the same moment.
    pub fn position(&self) -> (u64, u64) {
        let inner = self.inner.read();
        (inner.epoch, inner.revision)
    }

    /// Returns the newest revision.
    pub fn revision(&self) -> u64 {
        self.inner.read().revision
    }

    /// Returns the time at which the newest revision was published; `None` before the first one.
    pub fn published_at(&self) -> Option<Instant> {
        self.inner.read().published_at
    }

    /// Returns the signed mesh configuration.
    pub fn mesh(&self) -> pb::Signed {
        self.inner.read().mesh.clone()
    }

    /// Returns the name and the grant of a node, if its identity key is `identity`.
    pub fn member(
        &self,
        node: NodeId,
        identity: &IdentityKey,
    ) -> Result<(NodeName, pb::Signed), AccessError> {
        let inner = self.inner.read();
        match inner.nodes.get(&node) {
            Some(member) if member.identity == *identity => {
                Ok((member.name.clone(), member.grant.clone()))
            }
            Some(_) => Err(AccessError::Key { node }),
            None => Err(inner.missing(node).into()),
        }
    }

    /// Returns the reason why a node is not in the map; `None` if it is.
    pub fn absence(&self, node: NodeId) -> Option<NodeAbsent> {
        let inner = self.inner.read();
        (!inner.nodes.contains_key(&node)).then(|| inner.missing(node))
    }

    /// Returns the signed grant of a node.
    pub fn grant(&self, node: NodeId) -> Result<pb::Signed, NodeAbsent> {
        let inner = self.inner.read();
        let member = inner.nodes.get(&node).ok_or_else(|| inner.missing(node))?;
        Ok(member.grant.clone())
    }

    /// Returns the signed tombstone of a removed node.
    pub fn tombstone(&self, node: NodeId) -> Option<pb::Signed> {
        self.inner.read().removed.get(&node).map(|removed| removed.tombstone.clone())
    }

    /// Returns the bytes of all changes that were encoded since the start. All watches share them.
    pub fn encoded_bytes(&self) -> u64 {
        self.inner.read().encoded_bytes
    }

    /// Returns the number of running watches.
    pub fn watchers(&self) -> usize {
        self.latest.receiver_count()
    }

    /// Returns the largest size of a message of changes, in bytes. Each watch has at most one message that its
    /// client did not read yet, so all watches together need at most [`WATCHES_BYTES`] for them.
    fn message_bytes(&self) -> usize {
        let share = WATCHES_BYTES / self.watchers().max(1);
        share.clamp(LEAST_MESSAGE_BYTES, limits::CHANGES_BYTES)
    }

    /// Returns the changes after `cursor` that fit in one message, and whether they are all. The
    /// message's revision is the next cursor. All watchers share the encoded bytes of a change.
    pub fn changes_after(&self, cursor: u64) -> (pb::Changes, bool) {
        let most = self.message_bytes();
        let inner = self.inner.read();
        let mut message = pb::Changes { revision: cursor, ..pb::Changes::default() };
        let mut bytes = 0;
        for (&revision, change) in inner.index.range(cursor.saturating_add(1)..) {
            let size = change.len();
            let full = message.changes.len() >= limits::CHANGES
                || (bytes + size > most && !message.changes.is_empty());
            if full {
                return (message, false);
            }
            bytes += size;
            message.revision = revision;
            message.changes.push(change.clone());
        }
        // Changes that are not part of the map may have raised the revision further.
        message.revision = message.revision.max(inner.revision);
        (message, true)
    }
}

impl Default for Map {
    fn default() -> Self {
        Self::new()
    }
}

impl Inner {
    fn apply(&mut self, change: MapChange) {
        let revision = change.revision();
        self.revision = self.revision.max(revision);
        let kind = match change {
            MapChange::Node { revision, id, name, identity, entry } => {
                let grant = entry.grant.clone().unwrap_or_default();
                let node = Node { revision, name, identity, grant };
                if let Some(old) = self.nodes.insert(id, node) {
                    self.index.remove(&old.revision);
                }
                pb::change::Kind::Upsert(entry)
            }
            MapChange::Removed { revision, id, name, tombstone } => {
                if let Some(old) = self.nodes.remove(&id) {
                    self.index.remove(&old.revision);
                }
                let removed = Removed { revision, name, tombstone: tombstone.clone() };
                if let Some(old) = self.removed.insert(id, removed) {
                    self.index.remove(&old.revision);
                }
                pb::change::Kind::Tombstone(tombstone)
            }
            MapChange::Mesh { revision, signed } => {
                self.index.remove(&self.mesh_revision);
                self.mesh_revision = revision;
                self.mesh = signed.clone();
                pb::change::Kind::Mesh(signed)
            }
        };
        let encoded = pb::Change::encoded(kind);
        self.encoded_bytes += encoded.len() as u64;
        self.index.insert(revision, encoded);
    }

    fn missing(&self, node: NodeId) -> NodeAbsent {
        match self.removed.get(&node) {
            Some(removed) => NodeAbsent::Removed { node, name: removed.name.clone() },
            None => NodeAbsent::Unknown { node },
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn upsert(revision: u64, id: u8, size: usize) -> MapChange {
        let signed = pb::Signed { body: vec![id; size].into(), signature: vec![0; 64].into() };
        MapChange::Node {
            revision,
            id: NodeId([id; 16]),
            name: format!("n{id}").parse().unwrap(),
            identity: IdentityKey([id; 32]),
            entry: pb::Entry { grant: Some(signed), record: None, withheld: Vec::new() },
        }
    }

    fn ids(changes: &pb::Changes) -> Vec<u8> {
        let id = |kind: Result<pb::change::Kind, _>| match kind.unwrap() {
            pb::change::Kind::Upsert(entry) => entry.grant.unwrap().body[0],
            pb::change::Kind::Tombstone(_) => 0,
            pb::change::Kind::Mesh(_) => 255,
        };
        changes.kinds().map(id).collect()
    }

    #[test]
    fn a_cursor_gets_each_thing_once_in_its_newest_state() {
        let map = Map::new();
        map.apply(1, 3, vec![upsert(1, 1, 8), upsert(2, 2, 8), upsert(3, 3, 8)]);
        map.apply(1, 4, vec![upsert(4, 1, 8)]);
        let (changes, all) = map.changes_after(0);
        assert_eq!((ids(&changes), changes.revision, all), (vec![2, 3, 1], 4, true));
        let (changes, all) = map.changes_after(3);
        assert_eq!((ids(&changes), changes.revision, all), (vec![1], 4, true));
        let (changes, all) = map.changes_after(4);
        assert_eq!((ids(&changes), changes.revision, all), (vec![], 4, true));
    }

    #[test]
    fn a_commit_without_a_new_revision_leaves_the_time_of_the_newest_one() {
        let map = Map::new();
        assert_eq!(map.published_at(), None);
        map.apply(1, 1, vec![upsert(1, 1, 8)]);
        let published = map.published_at();
        assert!(published.is_some());
        // A later time must differ, also where the clock is coarse.
        while published == Some(clock::now().mono) {}
        map.apply(1, 1, Vec::new());
        assert_eq!(map.published_at(), published);
        map.apply(1, 2, vec![upsert(2, 1, 8)]);
        assert!(map.published_at() > published);
    }

    #[test]
    fn messages_are_bounded_and_one_goes_on_where_the_other_ended() {
        let map = Map::new();
        let size = limits::SIGNED_BODY_BYTES;
        map.apply(1, 40, (1..=40).map(|i| upsert(i.into(), i, size)).collect());
        let (mut cursor, mut seen, mut messages) = (0, Vec::new(), 0);
        loop {
            let (changes, all) = map.changes_after(cursor);
            assert!(changes.encoded_len() <= limits::CHANGES_BYTES + 1024);
            seen.extend(ids(&changes));
            cursor = changes.revision;
            messages += 1;
            if all {
                break;
            }
        }
        assert_eq!(seen, (1..=40).collect::<Vec<u8>>());
        assert!(messages >= 5, "{messages}");
    }

    #[test]
    fn with_many_watches_messages_are_smaller() {
        let map = Map::new();
        let size = limits::SIGNED_BODY_BYTES;
        map.apply(1, 40, (1..=40).map(|i| upsert(i.into(), i, size)).collect());
        let few = map.changes_after(0).0.changes.len();
        let watches: Vec<_> = (0..limits::NODES).map(|_| map.latest()).collect();
        let (many, all) = map.changes_after(0);
        assert!(!all && (1..few).contains(&many.changes.len()), "{}", many.changes.len());
        assert!(watches.len() * LEAST_MESSAGE_BYTES <= WATCHES_BYTES);
    }

    #[test]
    fn a_removed_node_leaves_its_tombstone_and_nothing_else() {
        let map = Map::new();
        map.apply(1, 1, vec![upsert(1, 1, 8)]);
        let id = NodeId([1; 16]);
        assert!(map.member(id, &IdentityKey([1; 32])).is_ok());
        let wrong = map.member(id, &IdentityKey([2; 32]));
        assert!(matches!(wrong, Err(AccessError::Key { .. })));

        let tombstone = pb::Signed::default();
        let name: NodeName = "n1".parse().unwrap();
        map.apply(1, 2, vec![MapChange::Removed { revision: 2, id, name, tombstone }]);
        assert!(matches!(map.absence(id), Some(NodeAbsent::Removed { .. })));
        assert_eq!(ids(&map.changes_after(0).0), [0]);
    }

    #[test]
    fn a_change_is_encoded_once_whatever_the_number_of_nodes_and_watchers() {
        let map = Map::new();
        map.apply(1, 200, (1..=200).map(|i| upsert(i, i as u8, 200)).collect());
        let bytes = |cursor| -> Vec<*const u8> {
            map.changes_after(cursor).0.changes.iter().map(|change| change.as_ptr()).collect()
        };
        let before = bytes(0);
        map.apply(1, 201, vec![upsert(201, 1, 200)]);
        let after = bytes(0);
        assert_eq!(after[..199], before[1..], "what did not change is not encoded again");
        assert!(
            (0..50).all(|_| bytes(200) == after[199..]),
            "watchers share the bytes of the change"
        );
    }
}
