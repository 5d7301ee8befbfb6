//! What the core shows of its peers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_types::id::NodeName;
use towline_types::node::Node;

use crate::path::Path;

/// State of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerState {
    /// Nothing was tried, since nothing was wanted.
    Idle,
    /// Being tried.
    Connecting,
    /// A path carries traffic.
    Up,
    /// Tried without success. Tried again with backoff, without end.
    Down,
}

/// Why the core wants to be called again.
pub type WakeReason = &'static str;

/// A peer as the operator sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerStatus {
    /// The node.
    pub node: Arc<Node>,
    /// Current state, for status output.
    pub state: PeerState,
    /// Since when.
    pub since: Instant,
    /// Why it is not up, or up through a relay alone, in words for the operator; else empty.
    pub reason: String,
    /// The path that carries its traffic.
    pub path: Option<Path>,
    /// The relay on that path.
    pub relay: Option<NodeName>,
    /// The largest inner packet that the path takes, in bytes, once that was found out. Below
    /// 1,280, outer datagrams are fragmented.
    pub mtu: Option<u16>,
    /// Smoothed round-trip time of that path.
    pub rtt: Option<Duration>,
    /// When the last handshake was completed.
    pub last_handshake: Option<Instant>,
    /// What is routed to it.
    pub prefixes: Vec<IpNet>,
    /// What it claims and another node holds, a line each; empty when all is well.
    pub conflicts: Vec<String>,
}
