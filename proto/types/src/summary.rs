//! Summary of a node's tunnels: what the node reports about its peers, for operators.
//!
//! It is what the node says about itself and is not signed. So it is shown, and nothing is decided by it.

use crate::codes;
use crate::id::{NodeId, NodeName};

/// State of a node's tunnels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeshSummary {
    /// Number of all peers by state.
    pub counts: PeerCounts,
    /// At most [`SUMMARY_PEERS`](crate::limits::SUMMARY_PEERS) of the peers.
    pub peers: Vec<PeerSummary>,
}

/// Number of peers by the state of their tunnels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PeerCounts {
    /// Number of peers that are up by a direct path.
    pub direct: u32,
    /// Number of peers that are up through a relay.
    pub relayed: u32,
    /// Number of peers to which paths are being tried.
    pub connecting: u32,
    /// Number of peers without a path.
    pub down: u32,
    /// Number of peers without traffic, to which no path is tried.
    pub idle: u32,
}

/// A peer in a summary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerSummary {
    /// Node id of the peer.
    pub node: NodeId,
    /// State of the tunnel to the peer.
    pub tunnel: Tunnel,
    /// Round-trip time of the path in microseconds.
    pub rtt_us: Option<u32>,
    /// Share of the last pings that were lost, in thousandths.
    pub loss_permille: Option<u16>,
    /// Largest inner packet in bytes that the path carries.
    pub mtu: Option<u16>,
    /// Code of the reason why the peer is not up, or relayed.
    pub reason_code: Option<Box<str>>,
}

/// State of the tunnel to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tunnel {
    /// There is no traffic, so no path is tried.
    Idle,
    /// Paths are being tried.
    Connecting,
    /// No path was found; attempts go on.
    Down,
    /// A direct path carries traffic.
    Direct,
    /// A path through this relay carries traffic. `None`: the relay's name is not known.
    Relayed(Option<NodeName>),
}

codes! {
    Tunnel {
        Idle => "idle",
        Connecting => "connecting",
        Down => "down",
        Direct => "direct",
        Relayed => "relay",
    }
}

impl Tunnel {
    /// Returns whether a path carries traffic.
    pub fn is_up(&self) -> bool {
        matches!(self, Self::Direct | Self::Relayed(_))
    }

    /// Returns the name of the relay; `None` without a relay, or if its name is not known.
    pub fn relay(&self) -> Option<&NodeName> {
        match self {
            Self::Relayed(relay) => relay.as_ref(),
            Self::Idle | Self::Connecting | Self::Down | Self::Direct => None,
        }
    }
}

impl PeerCounts {
    /// Counts a peer with this tunnel.
    pub fn add(&mut self, tunnel: &Tunnel) {
        let count = match tunnel {
            Tunnel::Idle => &mut self.idle,
            Tunnel::Connecting => &mut self.connecting,
            Tunnel::Down => &mut self.down,
            Tunnel::Direct => &mut self.direct,
            Tunnel::Relayed(_) => &mut self.relayed,
        };
        *count = count.saturating_add(1);
    }
}
