//! Outputs of the core: what its caller has to do.

use std::sync::Arc;
use std::time::Duration;

use towline_types::frame::Probe;
use towline_types::id::{NodeId, WireguardKey};
use towline_types::node::Candidate;

use crate::forwarding::ForwardingTable;
use crate::path::Path;
use crate::peer_history::PathChange;
use crate::peer_table::{PeerPath, PeerTable};
use crate::plan::Plan;
use crate::status::PeerState;

/// One frame message to seal for a peer and to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Peer that the message is sealed for: a node, or a relay that is asked for something.
    pub peer: WireguardKey,
    /// Path to send over; `None`: through a controller, which takes a [`Probe::CallMe`] only.
    pub path: Option<Path>,
    /// The message.
    pub message: Probe,
    /// UDP payload in bytes that the datagram is padded to, the header of a relay's channel
    /// included. Set to find out whether the path takes that much: such a datagram must not be
    /// fragmented.
    pub size: Option<u16>,
    /// Number of hops after which the datagram is dropped. Set to have our own NAT expect an answer,
    /// without reaching the peer's NAT.
    pub hop_limit: Option<u8>,
}

/// One thing to do. See the crate's contract for how to drain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Seal and send a message.
    Transmit(Transmit),
    /// Seal and send pings that are padded to one size, with one system call where the kernel can. Their
    /// answers show whether the path takes datagrams that are sent together.
    Train {
        /// Peer that the pings are sealed for.
        peer: WireguardKey,
        /// Path to send over.
        path: Path,
        /// Transactions of the pings.
        transactions: Vec<u64>,
        /// UDP payload in bytes that each datagram is padded to, the header of a relay's channel
        /// included.
        size: u16,
    },
    /// Start a handshake now and send one and the same initiation to each of these addresses: the
    /// peer answers the first that arrives and refuses the later ones as replays.
    Handshake {
        /// Peer to begin the handshake with.
        peer: WireguardKey,
        /// Paths to send the initiation over; bounded by `limits::CANDIDATES`.
        to: Vec<Path>,
    },
    /// Ask a reflector for our own address as it sees it, by a STUN binding request (RFC 8489).
    /// This is no [`Self::Transmit`]: it is not sealed, and a reflector need not be a node.
    Stun {
        /// Path to the reflector.
        to: Path,
        /// Transaction id that the answer repeats.
        transaction: [u8; 12],
    },
    /// Apply this peer table: it replaces the last one.
    PeerTable(Arc<PeerTable>),
    /// Apply this path to one peer of the table: all else of the table stays.
    PeerPath {
        /// Peer whose path changed.
        peer: WireguardKey,
        /// Path of the peer from now on.
        path: PeerPath,
    },
    /// Apply this forwarding table: it replaces the last one. It comes only from a node that relays.
    ForwardingTable(Arc<ForwardingTable>),
    /// Report which channels of the forwarding table carried something since the last report. The
    /// answer is [`Mesh::handle_channels_used`](crate::mesh::Mesh::handle_channels_used); channels
    /// that it does not name for long enough are closed.
    ReportChannels,
    /// Apply this plan: it replaces the last one.
    Plan(Arc<Plan>),
    /// Open a second UDP port that the kernel chooses, or close it. The answer to opening it is
    /// [`Mesh::set_second_port`](crate::mesh::Mesh::set_second_port). The configured port stays open.
    SecondPort {
        /// True to open it, false to close it.
        open: bool,
    },
    /// Publish our candidates, which are now these.
    Advertise(Vec<Candidate>),
    /// A peer's state changed, for log and events.
    StateChanged {
        /// Node whose state changed.
        peer: NodeId,
        /// State until now.
        from: PeerState,
        /// State from now on.
        to: PeerState,
    },
    /// The path that a peer's traffic takes changed, for log and events.
    PathChanged {
        /// Node whose path changed.
        peer: NodeId,
        /// Path until now; `None`: none was known.
        from: Option<Path>,
        /// Path from now on; `None`: none is known.
        to: Option<Path>,
        /// Reason of the change.
        reason: PathChange,
    },
    /// The state of a static peer changed, for log and events.
    StaticStateChanged {
        /// Key of the static peer.
        peer: WireguardKey,
        /// State until now.
        from: PeerState,
        /// State from now on.
        to: PeerState,
    },
    /// An operator's ping (see [`Mesh::ping`](crate::mesh::Mesh::ping)) ended.
    PingResult {
        /// The number given to [`Mesh::ping`](crate::mesh::Mesh::ping).
        id: u64,
        /// Path that the answer came over, and round-trip time; `None`: no answer in time.
        answer: Option<(Path, Duration)>,
    },
}
