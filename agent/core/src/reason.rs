//! Reasons for the state of a peer, for the operator.

use std::fmt;
use std::net::SocketAddr;

use towline_types::codes;

use crate::conflict::Holder;

/// Reason why a peer is not up, or up through a relay alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerReason {
    /// Another has its WireGuard key, so it cannot be a peer.
    KeyConflict {
        /// Holder of the key.
        holder: Holder,
    },
    /// Nothing is sent to it, and the mesh connects on need.
    Idle,
    /// It was up when it was last checked: nothing is sent to it, and the mesh connects on need.
    Unchecked {
        /// Time since something came from it, in seconds.
        seconds: u64,
    },
    /// Attempts began less than 10 s ago.
    Trying {
        /// Number of addresses that are tried.
        candidates: usize,
    },
    /// It published no address, and attempts began less than 10 s ago.
    Waiting,
    /// It did not connect, and no direct path was found.
    Unreached(Direct),
    /// It answers probes, but no handshake.
    NoHandshake,
    /// Nothing ever answered this node over UDP.
    UdpBlocked(Direct),
    /// Both nodes are behind NAT, and the mesh has no relay.
    NoRelay(Direct),
    /// Both nodes are behind NAT, and no relay of the mesh answers.
    RelaySilent(Direct),
    /// It is up, but through a relay alone.
    Relayed {
        /// Why no direct path is used.
        direct: RelayedPath,
    },
    /// It is up, but through a relay alone: our NAT maps each destination to another port.
    RelayedByMapping {
        /// Why no direct path is used.
        direct: RelayedPath,
    },
}

codes! {
    PeerReason {
        KeyConflict => "key-conflict",
        Idle => "peer-idle",
        Unchecked => "peer-unchecked",
        Trying => "trying-candidates",
        Waiting => "waiting-for-peer",
        Unreached(Direct),
        NoHandshake => "no-handshake",
        UdpBlocked => "udp-blocked",
        NoRelay => "no-relay",
        RelaySilent => "relay-silent",
        Relayed { direct: RelayedPath },
        RelayedByMapping => "nat-mapping-dependent",
    }
}

/// Result of the attempts to find a direct path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direct {
    /// The peer published no address.
    NoCandidates,
    /// None of its addresses answers.
    NoAnswer {
        /// Number of addresses.
        candidates: usize,
        /// Time of the attempts, in seconds.
        seconds: u64,
    },
}

codes! {
    Direct {
        NoCandidates => "no-candidates",
        NoAnswer => "no-answer",
    }
}

/// Reason why a peer that is up through a relay has no direct path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelayedPath {
    /// It published no address.
    NoCandidates,
    /// Its addresses are tried.
    Trying {
        /// Number of addresses.
        candidates: usize,
    },
    /// None of its addresses answers.
    NoAnswer {
        /// Number of addresses.
        candidates: usize,
    },
}

codes! {
    RelayedPath {
        NoCandidates => "relayed-no-candidates",
        Trying => "relayed-trying-direct",
        NoAnswer => "relayed-no-answer",
    }
}

/// Reason why a static peer is not up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StaticPeerReason {
    /// Another has its WireGuard key, so it cannot be a peer.
    KeyConflict {
        /// Holder of the key.
        holder: Holder,
    },
    /// It has no endpoint, so it has to connect.
    NoEndpoint,
    /// Nothing is sent to it, and it has no keepalive.
    Idle,
    /// Handshakes are sent.
    Trying {
        /// Address of the peer.
        endpoint: SocketAddr,
    },
    /// No handshake was answered for 10 s.
    NoAnswer {
        /// Address of the peer.
        endpoint: SocketAddr,
        /// Time of the attempts, in seconds.
        seconds: u64,
    },
}

codes! {
    StaticPeerReason {
        KeyConflict => "key-conflict",
        NoEndpoint => "static-peer-without-endpoint",
        Idle => "static-peer-idle",
        Trying => "static-peer-trying",
        NoAnswer => "static-peer-no-answer",
    }
}

impl fmt::Display for PeerReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KeyConflict { holder } => key_conflict(f, holder),
            Self::Idle => f.write_str("not connected: nothing is being sent to it"),
            Self::Unchecked { seconds } => {
                write!(f, "was up {seconds} s ago: nothing is being sent to it")
            }
            Self::Trying { candidates } => write!(f, "trying {}", counted(*candidates)),
            Self::Waiting => write!(f, "waiting for it to call: {NO_CANDIDATES}"),
            Self::Unreached(direct) => direct.fmt(f),
            Self::NoHandshake => {
                f.write_str("it answers probes but no handshake: was its clock or ours set back?")
            }
            Self::UdpBlocked(tried) => {
                write!(f, "nothing ever answered us over UDP: does a firewall block it? ({tried})")
            }
            Self::NoRelay(tried) => {
                write!(f, "both nodes are behind NAT and no relay is configured ({tried})")
            }
            Self::RelaySilent(tried) => {
                write!(f, "both nodes are behind NAT and no relay answers ({tried})")
            }
            Self::Relayed { direct } => write!(f, "through a relay: {direct}"),
            Self::RelayedByMapping { direct } => {
                write!(f, "through a relay: our NAT takes another port for each peer, {direct}")
            }
        }
    }
}

const NO_CANDIDATES: &str = "it has published no address that we could call";

impl fmt::Display for Direct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCandidates => f.write_str(NO_CANDIDATES),
            Self::NoAnswer { candidates, seconds } => {
                write!(f, "no answer from {} for {seconds} s", counted(*candidates))
            }
        }
    }
}

impl fmt::Display for RelayedPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCandidates => f.write_str(NO_CANDIDATES),
            Self::Trying { candidates } => write!(f, "still trying {}", counted(*candidates)),
            Self::NoAnswer { candidates } => write!(f, "no answer from {}", counted(*candidates)),
        }
    }
}

impl fmt::Display for StaticPeerReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KeyConflict { holder } => key_conflict(f, holder),
            Self::NoEndpoint => f.write_str("waiting for it to call: it has no `endpoint`"),
            Self::Idle => f.write_str("nothing is sent to it, and it has no `keepalive`"),
            Self::Trying { endpoint } => write!(f, "calling {endpoint}"),
            Self::NoAnswer { endpoint, seconds } => write!(
                f,
                "no answer from {endpoint} for {seconds} s: do both ends have the other's key, and the \
                 same preshared key?"
            ),
        }
    }
}

fn key_conflict(f: &mut fmt::Formatter<'_>, holder: &Holder) -> fmt::Result {
    write!(f, "its WireGuard key is held by {holder}")
}

fn counted(candidates: usize) -> String {
    format!("{candidates} candidate{}", if candidates == 1 { "" } else { "s" })
}
