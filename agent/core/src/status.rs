//! State of the peers, for status output.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_types::codes;
use towline_types::id::{NodeId, NodeName};
use towline_types::node::Node;

use crate::conflict::Conflict;
use crate::path::Path;
use crate::reason::PeerReason;

/// State of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerState {
    /// No path is tried, since there is no traffic for the peer.
    Idle,
    /// Paths are being tried.
    Connecting,
    /// A path carries traffic.
    Up,
    /// No path was found in 10 s. Attempts go on with backoff.
    Down,
}

codes! {
    PeerState {
        Idle => "idle",
        Connecting => "connecting",
        Up => "up",
        Down => "down",
    }
}

/// Name of the deadline for which the core wants to be called again, e.g. `probe`.
pub type WakeReason = &'static str;

/// A peer as the operator sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerStatus {
    /// Newest grant and record of the node.
    pub node: Arc<Node>,
    /// Current state, for status output.
    pub state: PeerState,
    /// Time of the last change of state.
    pub since: Instant,
    /// Reason why the peer is not up, or up through a relay alone; else `None`.
    pub reason: Option<PeerReason>,
    /// Path that carries its traffic; `None` unless it is up.
    pub path: Option<Path>,
    /// Name of the relay on that path, if there is one.
    pub relay: Option<NodeName>,
    /// The largest inner packet that the path takes, in bytes, once that was found out. Below
    /// 1,280, outer datagrams are fragmented.
    pub mtu: Option<u16>,
    /// True if each datagram on that path is sent by itself, since several that are sent together do not
    /// arrive.
    pub is_single: bool,
    /// Smoothed round-trip time of that path.
    pub rtt: Option<Duration>,
    /// Share of the last pings on that path that were lost, from 0 to 1.
    pub loss: Option<f64>,
    /// Time at which the last handshake completed.
    pub last_handshake: Option<Instant>,
    /// Networks that are routed to it.
    pub prefixes: Vec<IpNet>,
    /// Claims that it did not get.
    pub conflicts: Vec<Conflict>,
}

/// A network that this host guards, as the operator sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardedNetwork {
    /// The network.
    pub network: IpNet,
    /// Reason why it is guarded.
    pub reason: GuardReason,
}

/// Reason why a network is guarded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuardReason {
    /// It is a range of the overlay.
    Overlay,
    /// It is a protected range of the mesh.
    Protected,
    /// A node holds it.
    Announced(NodeName),
    /// A static peer holds it.
    StaticPeer,
    /// A node held it last, and nobody holds it now.
    Withdrawn {
        /// Id of that node, if it is known.
        owner: Option<NodeId>,
        /// Name of that node, unless it was removed.
        name: Option<NodeName>,
    },
}

/// This node's relay as the operator sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelayStatus {
    /// Number of registered nodes.
    pub nodes: usize,
    /// Number of open channels.
    pub channels: usize,
}

/// A path to a peer that was tried or can be tried, as the operator sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct PathStatus {
    /// The path. Its local address is `None` where the kernel chooses.
    pub path: Path,
    /// Name of the relay, if the path leads through one that is known.
    pub relay: Option<NodeName>,
    /// True for the path that carries the peer's traffic.
    pub in_use: bool,
    /// Smoothed round-trip time, if a pong came.
    pub rtt: Option<Duration>,
    /// Time at which something authentic came over it last.
    pub heard: Option<Instant>,
    /// Time at which a pong came over it last.
    pub answered: Option<Instant>,
}

/// A reflector (STUN server) that is known, as the operator sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReflectorStatus {
    /// Address of the reflector.
    pub address: SocketAddr,
    /// Address at which it saw the tunnels' UDP port lately; `None` unless it was asked and answered.
    pub mapped: Option<SocketAddr>,
}
