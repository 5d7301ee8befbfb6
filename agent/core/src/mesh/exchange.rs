//! What the core and its surroundings tell each other.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_proto::id::{NodeId, NodeName, WireguardKey};
use towline_proto::node::{Candidate, Grant, MeshConfig, Node, Tombstone};

use crate::path::{LocalEnd, Path};
use crate::peer_table::PeerTable;
use crate::plan::{Plan, RulePlan};
use crate::relay::RelayRequest;
use crate::signal::Signal;

/// What makes us a node of a mesh.
#[derive(Debug, Clone)]
pub struct Membership {
    /// Our own grant.
    pub grant: Grant,
    /// What holds for the whole mesh.
    pub mesh: MeshConfig,
}

/// What the core is told once.
#[derive(Debug, Clone)]
pub struct Config {
    /// The mesh that we are in; `None`: static peers are all there is.
    pub membership: Option<Membership>,
    /// Name of the TUN link.
    pub link: String,
    /// MTU of the TUN link, in bytes.
    pub mtu: u32,
    /// Routing table of ours.
    pub table: u32,
    /// Policy rules of ours.
    pub rules: RulePlan,
    /// Name of our nftables table.
    pub firewall_table: String,
    /// Whether we relay for others.
    pub relay: bool,
    /// Grows with every start of the agent, as in our record.
    pub boot_epoch: u64,
}

/// A change of the network map. Signatures and grants were verified before.
#[derive(Debug, Clone)]
pub enum MapChange {
    /// A node is new, or published a newer record.
    Upsert(Box<Node>),
    /// A node was removed for good.
    Remove(Tombstone),
    /// The mesh's configuration changed.
    Mesh(MeshConfig),
}

/// A probe that was opened with the key of the pair, so it is authentic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceivedProbe {
    /// To be answered, to where it came from, by [`Output::Pong`].
    Ping {
        /// The sender's.
        transaction: u64,
    },
    /// The answer to an [`Output::Ping`].
    Pong {
        /// Ours.
        transaction: u64,
        /// Where the peer saw our ping come from.
        observed: SocketAddr,
    },
}

/// What is to be done. See the crate's contract for how to drain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send a ping.
    Ping {
        /// To whom.
        peer: WireguardKey,
        /// Where.
        to: Path,
        /// To find in the pong.
        transaction: u64,
        /// To how many bytes of UDP payload it is padded (a relay channel's prefix included), and
        /// then sent unfragmented, to see whether the path takes that much. The pong is short.
        size: Option<u16>,
    },
    /// Send a pong.
    Pong {
        /// To whom.
        peer: WireguardKey,
        /// Where: the way that the ping came.
        to: Path,
        /// The ping's.
        transaction: u64,
    },
    /// Start a handshake now and send one and the same initiation to each of these addresses: the
    /// peer answers the first that arrives and refuses the later ones as replays.
    Handshake {
        /// With whom.
        peer: WireguardKey,
        /// Where; bounded by `limits::CANDIDATES`.
        to: Vec<Path>,
    },
    /// Ask a reflector for our own address as it sees it: a STUN binding request (RFC 8489).
    Stun {
        /// What to send from; `None`: the kernel chooses.
        local: Option<LocalEnd>,
        /// The reflector.
        to: SocketAddr,
        /// To find in the answer.
        transaction: [u8; 12],
    },
    /// Tell a peer something, sealed for it.
    Signal {
        /// To whom.
        peer: NodeId,
        /// How: a path to it that works, or `None`, through the controller.
        via: Option<Path>,
        /// What.
        signal: Signal,
    },
    /// Ask a relay for something.
    Relay(RelayRequest),
    /// The peer table is now this one.
    PeerTable(Arc<PeerTable>),
    /// The plan is now this one.
    Plan(Arc<Plan>),
    /// Our candidates are now these: publish them.
    Advertise(Vec<Candidate>),
    /// A peer's state changed, for log and events.
    StateChanged {
        /// Which peer.
        peer: NodeId,
        /// From.
        from: PeerState,
        /// To.
        to: PeerState,
    },
    /// The same of a static peer.
    StaticStateChanged {
        /// Which peer.
        peer: WireguardKey,
        /// From.
        from: PeerState,
        /// To.
        to: PeerState,
    },
    /// An operator's ping (see [`Mesh::ping`]) ended.
    PingResult {
        /// The number given to [`Mesh::ping`].
        id: u64,
        /// Where the answer came from and after how long; `None`: no answer in time.
        answer: Option<(Path, Duration)>,
    },
}

/// How it stands with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerState {
    /// Nothing was tried, since nothing was wanted.
    Idle,
    /// Being tried.
    Connecting,
    /// A path carries traffic.
    Up,
    /// Tried without success; tried again with backoff, for ever.
    Down,
}

/// Why the core wants to be called again.
pub type WakeReason = &'static str;

/// A peer as the operator sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerStatus {
    /// The node.
    pub node: Arc<Node>,
    /// How it stands.
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
