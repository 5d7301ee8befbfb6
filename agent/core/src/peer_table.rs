//! The peer table: the peers of the data plane as one comparable value, and what it observes of them.

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::IpNet;
use towline_types::frame::ProbeVersion;
use towline_types::id::{PresharedKey, WireguardKey};
use towline_types::mtu::Mtu;

use crate::own_networks::OwnNetworks;
use crate::path::Path;

/// The peers of the data plane, whole. The data plane makes its own state follow it: new peers
/// get a tunnel, peers that are gone lose theirs, all others keep their sessions.
///
/// Invariant: no prefix stands under two peers; longer prefixes inside shorter ones may.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerTable {
    /// Entries by WireGuard key.
    pub peers: BTreeMap<WireguardKey, PeerEntry>,
    /// Inner addresses of this node. A packet out of the tunnel must be for one of them, and a packet into
    /// it must come from one (to static peers: from any); others are dropped. While it is empty, that is
    /// every packet of the mesh.
    pub own: OwnNetworks,
}

/// One peer of the data plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerEntry {
    /// Path that its datagrams go over; `None` while no path is known: they wait (a few of them) or are
    /// dropped and counted.
    pub endpoint: Option<Path>,
    /// Inner networks that are reached through it, and from which alone it may send.
    pub prefixes: Vec<IpNet>,
    /// Inner networks from which it may send too, although they are reached through another peer that shares
    /// them.
    pub shared_sources: Vec<IpNet>,
    /// Interval of WireGuard keepalives, which keep a NAT's mapping open; `None`: none are sent.
    pub keepalive: Option<Duration>,
    /// Key that is mixed into the handshake, for static peers.
    pub preshared_key: Option<PresharedKey>,
    /// The largest inner packet that the path takes whole. Where [`Self::fragment`] is set, it takes
    /// less.
    pub mtu: Mtu,
    /// The path takes less than inner packets of 1,280 bytes need: outer datagrams are fragmented
    /// at the source (no "don't fragment"), for the link's own MTU cannot be smaller.
    pub fragment: bool,
    /// True if each datagram is sent by itself, because the path damages those that are sent together
    /// (`UDP_SEGMENT`).
    pub is_single: bool,
    /// Boot epoch of the peer's record. When it grows, handshake timestamps of earlier boots are forgotten.
    pub boot_epoch: u64,
    /// True for a peer of the configuration: it may be sent packets from any source, and it has no
    /// probes.
    pub is_static: bool,
    /// Version of the probes of the peer, from its record. Nothing else changes it.
    pub probe_version: ProbeVersion,
}

impl Default for PeerEntry {
    /// Returns the entry of a peer of this version that nothing is known of: it has no path and no networks.
    fn default() -> Self {
        Self {
            endpoint: None,
            prefixes: Vec::new(),
            shared_sources: Vec::new(),
            keepalive: None,
            preshared_key: None,
            mtu: Mtu::DEFAULT,
            fragment: false,
            is_single: false,
            boot_epoch: 0,
            is_static: false,
            probe_version: ProbeVersion::OWN,
        }
    }
}

impl PeerEntry {
    /// Returns how datagrams reach the peer.
    pub fn path(&self) -> PeerPath {
        PeerPath {
            endpoint: self.endpoint,
            mtu: self.mtu,
            fragment: self.fragment,
            is_single: self.is_single,
        }
    }

    /// Replaces how datagrams reach the peer.
    pub fn set_path(&mut self, path: PeerPath) {
        let PeerPath { endpoint, mtu, fragment, is_single } = path;
        (self.endpoint, self.mtu) = (endpoint, mtu);
        (self.fragment, self.is_single) = (fragment, is_single);
    }
}

/// How datagrams reach one peer: the part of its [`PeerEntry`] that changes without any other peer. The
/// fields are those of the entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerPath {
    /// Path that its datagrams go over; `None` while no path is known.
    pub endpoint: Option<Path>,
    /// The largest inner packet that the path takes whole.
    pub mtu: Mtu,
    /// True if the path takes less than inner packets of 1,280 bytes need.
    pub fragment: bool,
    /// True if each datagram is sent by itself.
    pub is_single: bool,
}

/// An event of one peer that the data plane observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observation {
    /// A handshake was completed over `from`: what this node sent there was answered. A static peer may
    /// have answered from another address than that.
    Handshake {
        /// Path that it was completed over.
        from: Path,
    },
    /// An authentic datagram came from another address than the peer's endpoint. The data plane
    /// does not move by itself: the core decides. Nothing shows that the peer receives there: anybody
    /// on the way can change the source of a datagram.
    Roamed {
        /// Path that it came over.
        from: Path,
    },
    /// An initiation of ours was not answered for [`REKEY_TIMEOUT`].
    HandshakeUnanswered,
    /// The session ended (no new one for 180 s, or 90 s of unanswered initiations); the tunnel
    /// does nothing until it is told to start a handshake.
    SessionExpired,
    /// There is inner traffic for the peer and no session. Reported once until a handshake completes
    /// or is given up.
    Wanted,
    /// Inner packets travelled. Reported at most once a second for each peer, and at once when there
    /// was nothing to report for that long.
    Active {
        /// True if packets went to the peer.
        sent: bool,
        /// True if packets came from the peer.
        received: bool,
        /// True if some of them came over the peer's endpoint: the way from it works there.
        by_endpoint: bool,
    },
    /// The kernel refused a datagram as too big for the path.
    TooBig {
        /// Path that takes less.
        path: Path,
        /// Largest UDP payload in bytes that the kernel accepts.
        payload: u16,
    },
}

/// WireGuard's Rekey-Timeout: how long an initiation waits for its response.
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
