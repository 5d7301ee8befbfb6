//! What the core wants done.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use towline_types::id::{NodeId, WireguardKey};
use towline_types::node::Candidate;

use crate::path::{LocalEnd, Path};
use crate::peer_table::PeerTable;
use crate::plan::Plan;
use crate::relay::RelayRequest;
use crate::signal::Signal;
use crate::status::PeerState;

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
    /// An operator's ping (see [`Mesh::ping`](crate::mesh::Mesh::ping)) ended.
    PingResult {
        /// The number given to [`Mesh::ping`](crate::mesh::Mesh::ping).
        id: u64,
        /// Where the answer came from and after how long; `None`: no answer in time.
        answer: Option<(Path, Duration)>,
    },
}
