//! Why the registry refuses: each variant is one line that tells its reader what to do.

use std::net::SocketAddr;

use ipnet::IpNet;
use towline_proto::id::{IdentityKey, NodeId, NodeName, TokenId, WireguardKey};
use towline_proto::node::NotGranted;
use towline_proto::{limits, pb};

use super::token::NamePattern;

/// A request that is not granted. No variant repeats a secret.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// No such token.
    #[error(
        "token {token} is not known here: create one with `towline-controller token create` at this mesh's controller"
    )]
    TokenUnknown {
        /// Its id.
        token: TokenId,
    },
    /// The id of a token with another secret.
    #[error("the secret of token {token} is wrong: check that the token was copied whole")]
    TokenSecret {
        /// Its id.
        token: TokenId,
    },
    /// An operator took it back.
    #[error("token {token} was revoked: create another with `towline-controller token create`")]
    TokenRevoked {
        /// Its id.
        token: TokenId,
    },
    /// Too late.
    #[error("token {token} has expired: create another with `towline-controller token create`")]
    TokenExpired {
        /// Its id.
        token: TokenId,
    },
    /// As many nodes joined as it was good for.
    #[error(
        "token {token} has been used: create another with `towline-controller token create` (--uses N for several nodes)"
    )]
    TokenUsed {
        /// Its id.
        token: TokenId,
    },
    /// A name that the token is not for.
    #[error(
        "the token is for nodes named `{pattern}`, not `{name}`: set the node's name, or create a token with --name {name}"
    )]
    Name {
        /// The name that was asked for.
        name: NodeName,
        /// What the token says.
        pattern: NamePattern,
    },
    /// The name of another node.
    #[error(
        "the name `{name}` is taken by node {holder}: choose another, or, if this machine takes its place, create the token with --replace {name}"
    )]
    NameTaken {
        /// The name.
        name: NodeName,
        /// Who has it.
        holder: NodeId,
    },
    /// The WireGuard key of another node.
    #[error(
        "WireGuard key {key} is already held by node `{holder}`: a copied state directory? remove it and join again"
    )]
    WireguardKeyTaken {
        /// The key.
        key: WireguardKey,
        /// Who has it.
        holder: NodeName,
    },
    /// The identity key of a node that joined before, otherwise.
    #[error(
        "identity key {key} is already node `{holder}`: keep using its state directory, or remove it and join again with fresh keys"
    )]
    IdentityTaken {
        /// The key.
        key: IdentityKey,
        /// Who has it.
        holder: NodeName,
    },
    /// The identity key of a node that was removed.
    #[error(
        "this machine's identity was removed from the mesh as node `{name}`: delete its state directory and join again with a new token"
    )]
    IdentityRemoved {
        /// The name that it had.
        name: NodeName,
    },
    /// As many nodes as there may be.
    #[error("the mesh is full: it has {} nodes; remove some", limits::NODES)]
    MeshFull,
    /// No overlay address is free.
    #[error(
        "no overlay address is free: remove nodes, or set up the mesh with a larger --overlay-{family}"
    )]
    OverlayFull {
        /// `v4` or `v6`.
        family: &'static str,
    },
    /// The caller is no node.
    #[error(
        "node {node} is not known to this controller (was it restored from an older backup?): join again with a new token"
    )]
    NodeUnknown {
        /// Who asked.
        node: NodeId,
    },
    /// The caller was a node.
    #[error("node `{name}` was removed from the mesh: join again with a new token")]
    NodeRemoved {
        /// Its name.
        name: NodeName,
        /// The CA's word on it.
        tombstone: pb::Signed,
    },
    /// A node's certificate with another key than the node's.
    #[error("the certificate's key is not that of node {node}: join again with a new token")]
    NodeKey {
        /// Whom the certificate names.
        node: NodeId,
    },
    /// No node has that name.
    #[error("there is no node `{name}`: see `towline-controller node list`")]
    NoSuchNode {
        /// Which.
        name: NodeName,
    },
    /// A publication outside a live watch.
    #[error("the session is over: open the watch again, then publish")]
    NoSession,
    /// Another instance of the same node is connected.
    #[error(
        "node `{name}` is already connected from {address}: a cloned machine? stop one of them, and join the other with keys of its own"
    )]
    Cloned {
        /// The node.
        name: NodeName,
        /// Where the other one is.
        address: SocketAddr,
    },
    /// A record that is older than the one in the map.
    #[error(
        "the record's generation {offered} is behind the stored {stored}: publish a higher one"
    )]
    GenerationBehind {
        /// What came.
        offered: u64,
        /// What is there.
        stored: u64,
    },
    /// Two records of one generation.
    #[error(
        "generation {generation} was published before with another content: publish a higher one"
    )]
    GenerationReused {
        /// Which.
        generation: u64,
    },
    /// A record that says what its grant does not allow.
    #[error(transparent)]
    NotGranted(#[from] NotGranted),
    /// A token for prefixes that nobody may announce.
    #[error(
        "prefix {0} cannot be announced by a node: it lies in the mesh's own overlay range, or is no range of hosts"
    )]
    Unusable(IpNet),
    /// Too many tokens at once.
    #[error("there are too many tokens: revoke or wait for some to expire")]
    TooManyTokens,
    /// A token that replaces a node admits one.
    #[error("a token that replaces a node is good for one use: leave --uses at 1")]
    ReplaceOnce,
}
