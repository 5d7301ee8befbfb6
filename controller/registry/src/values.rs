//! What the registry stores, returns and reports, as plain values.

use std::collections::BTreeSet;

use ipnet::IpNet;
use towline_types::id::{IdentityKey, NodeId, NodeName, TokenId};
use towline_types::node::{MeshConfig, Tombstone};

use super::token::Token;
use super::{Admin, Member};

/// Numbers of the mesh that only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Epoch of the map. It grows when the store was restored from a backup.
    pub epoch: u64,
    /// Revision of the newest change.
    pub revision: u64,
    /// Number of starts of the controller.
    pub starts: u64,
    /// Offset of the last assigned IPv4 address in the overlay range. It wraps around.
    pub v4_cursor: u32,
    /// True in a backup that no controller has started from yet.
    pub is_backup: bool,
}

/// Configuration of the mesh, with the revision of its last change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mesh {
    /// Configuration, which the CA signs.
    pub config: MeshConfig,
    /// Revision of the last change.
    pub revision: u64,
}

/// A removed node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemovedNode {
    /// Tombstone, which the CA signs.
    pub tombstone: Tombstone,
    /// Revision of the removal.
    pub revision: u64,
}

/// Everything that is stored, as plain values.
#[derive(Debug, Clone, PartialEq)]
pub struct Contents {
    /// Counters of the mesh.
    pub counters: Counters,
    /// Configuration of the mesh.
    pub mesh: Mesh,
    /// All nodes.
    pub members: Vec<Member>,
    /// All removed nodes.
    pub removed_nodes: Vec<RemovedNode>,
    /// All tokens.
    pub tokens: Vec<Token>,
    /// Keys of all administrators.
    pub admins: Vec<Admin>,
}

/// Key of a stored record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// The [`Counters`].
    Counters,
    /// The [`Mesh`].
    Mesh,
    /// The times at which nodes were last seen, of all nodes.
    LastSeen,
    /// A [`Member`]. If it does not exist, its record is deleted.
    Node(NodeId),
    /// A [`RemovedNode`].
    RemovedNode(NodeId),
    /// A [`Token`]. If it does not exist, its record is deleted.
    Token(TokenId),
    /// An [`Admin`]. If it does not exist, its record is deleted.
    Admin(IdentityKey),
}

/// Value that the CA has to sign before it is stored and shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unsigned {
    /// The configuration of the mesh.
    Mesh,
    /// The grant of a node.
    Grant(NodeId),
    /// The tombstone of a removed node.
    Tombstone(NodeId),
}

/// Changes since the previous [`Registry::take_changes`](super::Registry::take_changes).
#[derive(Debug, Default)]
pub struct Changes {
    /// Values to sign, before anything else.
    pub unsigned: BTreeSet<Unsigned>,
    /// Records to store.
    pub records: BTreeSet<Key>,
    /// Nodes whose problems changed. They are not stored.
    pub problems: BTreeSet<NodeId>,
    /// Events to log, once the records are stored.
    pub events: Vec<Event>,
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
    /// A node returned that the store did not have.
    Readmitted {
        /// Name of the node.
        name: NodeName,
        /// Id of the node.
        node: NodeId,
    },
    /// A node returned a configuration of the mesh that the store did not have.
    MeshReturned {
        /// Generation of the configuration.
        generation: u64,
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
    /// An operator decided whether a node may relay.
    RelayDecided {
        /// Name of the node.
        name: NodeName,
        /// Id of the node.
        node: NodeId,
        /// True if it may.
        may_relay: bool,
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
    /// A node proved that the store is a copy from an earlier time.
    LaterHistory {
        /// Epoch that began.
        epoch: u64,
        /// Number of tokens that were revoked.
        voided: usize,
    },
    /// The key of an administrator was added.
    AdminAdded {
        /// Name of the administrator.
        name: String,
        /// The key.
        key: IdentityKey,
    },
    /// The key of an administrator was revoked.
    AdminRevoked {
        /// Name of the administrator.
        name: String,
        /// The key.
        key: IdentityKey,
    },
}

/// Counters in a file beside the store, which is not part of a backup of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Starts {
    /// Number of starts of the controller.
    pub count: u64,
    /// Epoch of the map.
    pub epoch: u64,
}

/// Result of counting a start of the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// Counters to write to the file `starts`, once they are in the store.
    pub starts: Starts,
    /// True if the store was restored from a backup.
    pub restored: bool,
    /// Number of tokens that were revoked for that reason.
    pub voided: usize,
}
