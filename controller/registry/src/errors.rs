//! Reasons why the registry refuses an operation: one enum for each operation. Each message is one
//! line that says what to do, and none contains a secret.

use std::time::Duration;

use ipnet::IpNet;
use towline_types::id::{IdentityKey, NodeId, NodeName, TokenId, WireguardKey};
use towline_types::limits;
use towline_types::node::NotGranted;

use super::token::NamePattern;

/// Reason to refuse a join.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum JoinError {
    /// The token does not exist.
    #[error(transparent)]
    TokenUnknown(#[from] TokenUnknown),
    /// The secret is not the one of the token.
    #[error("the secret of token {token} is wrong: check that the token was copied whole")]
    TokenSecret {
        /// Id of the token.
        token: TokenId,
    },
    /// An operator revoked the token.
    #[error("token {token} was revoked: create another with `towline-controller token create`")]
    TokenRevoked {
        /// Id of the token.
        token: TokenId,
    },
    /// The token has expired.
    #[error("token {token} has expired: create another with `towline-controller token create`")]
    TokenExpired {
        /// Id of the token.
        token: TokenId,
    },
    /// All uses of the token are used up.
    #[error(
        "token {token} has been used: create another with `towline-controller token create` (--uses N for several nodes)"
    )]
    TokenUsed {
        /// Id of the token.
        token: TokenId,
    },
    /// The token does not admit a node of this name.
    #[error(
        "the token is for nodes named `{pattern}`, not `{name}`: set the node's name, or create a token with --name {name}"
    )]
    Name {
        /// Name that the node requested.
        name: NodeName,
        /// Names that the token admits.
        pattern: NamePattern,
    },
    /// Another node has the name.
    #[error(
        "the name `{name}` is taken by node {holder}: choose another one with --name, or create the token with --replace {name} if this machine replaces that node"
    )]
    NameTaken {
        /// Name that the node requested.
        name: NodeName,
        /// Node that has the name.
        holder: NodeId,
    },
    /// Another node has the WireGuard key.
    #[error(
        "WireGuard key {key} is in use by node `{holder}`: the state directory may be a copy: remove it and join again"
    )]
    WireguardKeyTaken {
        /// WireGuard key of the request.
        key: WireguardKey,
        /// Node that has the key.
        holder: NodeName,
    },
    /// A node that joined with another request has the identity key.
    #[error(
        "identity key {key} is in use by node `{holder}`: keep using its state directory, or remove it and join again with fresh keys"
    )]
    IdentityTaken {
        /// Identity key of the request.
        key: IdentityKey,
        /// Node that has the key.
        holder: NodeName,
    },
    /// The identity key belongs to a removed node.
    #[error(
        "this machine's identity was removed from the mesh as node `{name}`: delete its state directory and join again with a new token"
    )]
    IdentityRemoved {
        /// Name of the removed node.
        name: NodeName,
    },
    /// The WireGuard key belongs to a removed node.
    #[error(
        "this machine's WireGuard key was removed from the mesh with node `{name}`: delete its state directory and join again with a new token"
    )]
    WireguardKeyRemoved {
        /// Name of the removed node.
        name: NodeName,
    },
    /// The mesh has the largest number of nodes.
    #[error("the mesh is full: it has {} nodes: remove some", limits::NODES)]
    MeshFull,
    /// No overlay address is free.
    #[error(
        "no overlay address is free: remove nodes, or set up the mesh with a larger --overlay-{family}"
    )]
    OverlayFull {
        /// Address family: `v4` or `v6`.
        family: &'static str,
    },
}

/// Reason to refuse the return of a node that the registry does not know.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ReadmitError {
    /// The node was removed.
    #[error(transparent)]
    Absent(#[from] NodeAbsent),
    /// The grant is of another mesh.
    #[error("the grant is of another mesh: join again with a token of this mesh")]
    OtherMesh,
    /// Another node has the name, a key or an address.
    #[error(
        "node `{name}` cannot return: another node has its name, a key or an address: remove the other one, or join again with a new token"
    )]
    Taken {
        /// Name of the node.
        name: NodeName,
    },
    /// The mesh has other overlay ranges.
    #[error(
        "node `{name}` cannot return: its addresses are outside of the mesh's overlay ranges: join again with a new token"
    )]
    OutsideOverlay {
        /// Name of the node.
        name: NodeName,
    },
    /// The mesh has the largest number of nodes.
    #[error("the mesh is full: it has {} nodes: remove some", limits::NODES)]
    MeshFull,
}

/// Reason to refuse the publication of a record.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PublishError {
    /// The node is not in the mesh.
    #[error(transparent)]
    Absent(#[from] NodeAbsent),
    /// The record was not published from the node's current session.
    #[error("the session has ended: open the watch again, then publish")]
    NoSession,
    /// The record is older than the one in the map.
    #[error(
        "the record's generation {offered} is behind the stored {stored}: publish a higher one"
    )]
    GenerationBehind {
        /// Generation of the record.
        offered: u64,
        /// Generation of the record in the map.
        stored: u64,
    },
    /// The record's generation is much higher than that of the one in the map.
    #[error(
        "the record's generation {offered} is too far ahead of the stored {stored}: publish at most {}",
        .stored.saturating_add(limits::GENERATION_STEP)
    )]
    GenerationAhead {
        /// Generation of the record.
        offered: u64,
        /// Generation of the record in the map.
        stored: u64,
    },
    /// A different record with the same generation was published before.
    #[error(
        "generation {generation} was published before with different content: publish a higher one"
    )]
    GenerationReused {
        /// Generation of both records.
        generation: u64,
    },
    /// The grant does not allow the record.
    #[error(transparent)]
    NotGranted(#[from] NotGranted),
}

/// Reason why a node id is not that of a node of the mesh.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum NodeAbsent {
    /// The mesh never had a node with this id.
    #[error(
        "node {node} is not known: the controller may have been restored from an older backup: join again with a new token"
    )]
    Unknown {
        /// Id of the node.
        node: NodeId,
    },
    /// The node was removed.
    #[error("node `{name}` was removed from the mesh: join again with a new token")]
    Removed {
        /// Id of the removed node.
        node: NodeId,
        /// Name of the removed node.
        name: NodeName,
    },
}

/// Error of an operation on a node name that no node has.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("there is no node `{name}`: see `towline-controller node list`")]
pub struct NoSuchNode {
    /// Name of the request.
    pub name: NodeName,
}

/// Error of an operation on a token that does not exist.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "token {token} is not known here: create one with `towline-controller token create` at this mesh's controller"
)]
pub struct TokenUnknown {
    /// Id of the token.
    pub token: TokenId,
}

/// Error of an operation on a key that no administrator has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no administrator has the key {key}: see `towline-controller admin list`")]
pub struct NoSuchAdmin {
    /// Key of the request.
    pub key: IdentityKey,
}

/// Reason to refuse an administrator's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CreateAdminError {
    /// The key was revoked.
    #[error("the administrator's key {key} was revoked: use another one")]
    Revoked {
        /// Key of the request.
        key: IdentityKey,
    },
    /// The key belongs to an administrator with another name.
    #[error(
        "the key {key} belongs to an administrator with another name: use that name, or another key"
    )]
    OtherName {
        /// Key of the request.
        key: IdentityKey,
    },
    /// There are too many valid keys.
    #[error("too many keys of administrators: revoke some (`towline-controller admin list`)")]
    TooMany,
}

/// Reason to refuse the creation of a token.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CreateTokenError {
    /// The token allows a prefix that no node may announce.
    #[error(
        "prefix {0} cannot be announced: it is in the mesh's overlay range, or is not a range of unicast hosts: use another prefix"
    )]
    Unusable(IpNet),
    /// The largest number of tokens exists.
    #[error("too many tokens: wait until old ones are removed, 7 days after their expiry")]
    TooManyTokens,
    /// The time after which ephemeral nodes are removed is too short or too long.
    #[error(
        "ephemeral nodes cannot be removed after {} s offline: use {} s to {} days",
        .0.as_secs(), limits::EPHEMERAL_AFTER.0.as_secs(), limits::EPHEMERAL_AFTER.1.as_secs() / 86_400
    )]
    EphemeralAfter(Duration),
    /// A token that replaces a node has more than one use.
    #[error("a token that replaces a node allows only one use: leave --uses at 1")]
    ReplaceOnce,
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

/// Error of loading stored values that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Two nodes have the same name, key or overlay address.
    #[error("another node has the name, a key or an address of node {0}")]
    NotUnique(NodeId),
    /// The grant of a node does not allow its record.
    #[error("the grant of node {node} does not allow its record: {error}")]
    NotGranted {
        /// Id of the node.
        node: NodeId,
        /// Reason.
        error: NotGranted,
    },
}
