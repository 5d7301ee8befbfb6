//! Paths: ways for datagrams between this node and one peer.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Time for which a relay keeps a channel on which neither end sends. A node in use sends more
/// often: it pings an idle path every 20 s.
pub const CHANNEL_LIFETIME: Duration = Duration::from_secs(120);

/// A path: a local address and port, a remote address, and a relay channel if there is one.
///
/// Two uplinks of this host to one address of a peer are two paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path {
    /// Address that datagrams leave from; `None`: the kernel chooses.
    pub local: Option<LocalAddress>,
    /// The peer's outer address, or the relay's.
    pub remote: SocketAddr,
    /// The channel to the peer, where `remote` is a relay's address.
    pub channel: Option<ChannelId>,
    /// UDP port of ours that datagrams leave from and arrive at.
    pub port: LocalPort,
}

/// One of our UDP ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum LocalPort {
    /// The port of the configuration.
    #[default]
    Configured,
    /// The port that the kernel chose for the second socket, see
    /// [`Output::SecondPort`](crate::output::Output::SecondPort).
    Second,
}

/// One of our own addresses and its interface, as packet info (`IP_PKTINFO`, `IPV6_PKTINFO`) has
/// them for a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalAddress {
    /// Address of this host.
    pub address: IpAddr,
    /// Index of the interface that has the address.
    pub interface: u32,
}

/// A channel at a relay: the relay forwards each datagram that begins with this number from either
/// of the two nodes that it is bound to, to the other one, under the same number.
///
/// The relay gives it out at random. It ends when neither end sent anything for
/// [`CHANNEL_LIFETIME`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelId(pub u64);

impl Path {
    /// Bytes of the header that a relay channel puts before every datagram.
    pub const CHANNEL_BYTES: u16 = towline_types::frame::RELAYED_HEADER_BYTES as u16;

    /// Returns the path to an address of the peer itself, from where the kernel chooses.
    pub fn direct(remote: SocketAddr) -> Self {
        Self { local: None, remote, channel: None, port: LocalPort::Configured }
    }

    /// Returns the path with the same ends on a relay's channel.
    #[must_use]
    pub fn on_channel(self, channel: ChannelId) -> Self {
        Self { channel: Some(channel), ..self }
    }

    /// Returns whether a datagram that came over `from` came over this path. Where the kernel chooses
    /// the local address, any local address fits.
    pub fn is(&self, from: &Self) -> bool {
        let local = self.local.is_none() || self.local == from.local;
        let ends = self.remote == from.remote && self.port == from.port;
        local && ends && self.channel == from.channel
    }

    /// Returns whether a relay forwards the datagrams.
    pub fn is_relayed(&self) -> bool {
        self.channel.is_some()
    }
}

/// Source of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Path that the message came over.
    pub path: Path,
    /// True if the sender proved lately that it receives what is sent on that path, see
    /// [`ProbeSession`](crate::probe_session::ProbeSession). Always false for a message of version 1.
    pub is_validated: bool,
}

impl From<SocketAddr> for Path {
    fn from(remote: SocketAddr) -> Self {
        Self::direct(remote)
    }
}

/// `direct 203.0.113.5:51830` or `relay 203.0.113.5:51830`. Status output has the relay's name instead.
impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_relayed() { "relay" } else { "direct" };
        write!(f, "{kind} {}", self.remote)
    }
}
