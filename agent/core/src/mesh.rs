//! The mesh as one node sees it: its peers, their states, and what is to be done.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_proto::id::{NodeId, WireguardKey};
use towline_proto::node::{Candidate, Grant, MeshConfig, Node, Tombstone};

use crate::peer_table::{Observation, PeerTable};
use crate::plan::{Plan, RulePlan};

/// What the core is told once.
#[derive(Debug, Clone)]
pub struct Config {
    /// Our own grant.
    pub grant: Grant,
    /// What holds for the whole mesh.
    pub mesh: MeshConfig,
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
        to: SocketAddr,
        /// To find in the pong.
        transaction: u64,
    },
    /// Send a pong.
    Pong {
        /// To whom.
        peer: WireguardKey,
        /// Where: the address that the ping came from.
        to: SocketAddr,
        /// The ping's.
        transaction: u64,
    },
    /// Start a handshake now and send one and the same initiation to each of these addresses: the
    /// peer answers the first that arrives and refuses the later ones as replays.
    Handshake {
        /// With whom.
        peer: WireguardKey,
        /// Where; bounded by `limits::CANDIDATES`.
        to: Vec<SocketAddr>,
    },
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
    /// An operator's ping (see [`Mesh::ping`]) ended.
    PingResult {
        /// The number given to [`Mesh::ping`].
        id: u64,
        /// Where the answer came from and after how long; `None`: no answer in time.
        answer: Option<(SocketAddr, Duration)>,
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
    /// Why it is not up, in words for the operator; empty when it is.
    pub reason: String,
    /// The path that carries its traffic.
    pub path: Option<SocketAddr>,
    /// Smoothed round-trip time of that path.
    pub rtt: Option<Duration>,
    /// When the last handshake was completed.
    pub last_handshake: Option<Instant>,
    /// What is routed to it.
    pub prefixes: Vec<IpNet>,
}

/// Every peer of one node. See the crate's contract.
#[derive(Debug)]
pub struct Mesh {
    config: Config,
    outputs: VecDeque<Output>,
}

impl Mesh {
    /// A mesh without peers. `seed` is the only source of randomness.
    pub fn new(config: Config, _seed: [u8; 32], _now: Instant) -> Self {
        Self { config, outputs: VecDeque::new() }
    }

    /// Our own grant.
    pub fn grant(&self) -> &Grant {
        &self.config.grant
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }
}

/// Signatures to come, so that callers can be written against them.
///
/// ```text
/// fn update(&mut self, now: Instant, change: MapChange)
/// fn set_candidates(&mut self, now: Instant, candidates: Vec<Candidate>)   // local + configured
/// fn observe(&mut self, now: Instant, peer: WireguardKey, what: Observation)
/// fn probe_received(&mut self, now: Instant, peer: WireguardKey, from: SocketAddr, probe: ReceivedProbe)
/// fn ping(&mut self, now: Instant, peer: NodeId, id: u64, timeout: Duration)
/// fn handle_timeout(&mut self, now: Instant)
/// fn poll_timeout(&self) -> Option<(Instant, WakeReason)>
/// fn peers(&self) -> impl Iterator<Item = PeerStatus> + '_
/// ```
#[doc(hidden)]
pub const _CONTRACT: (Option<Observation>, Option<PeerTable>) = (None, None);
