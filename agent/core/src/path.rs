//! A way for datagrams between us and one peer.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// How long a relay keeps a channel on which neither end sends.
pub const CHANNEL_LIFETIME: Duration = Duration::from_secs(120);

/// A path: what we send from, where to, and through which relay channel, if any.
///
/// Two uplinks of this host to one address of a peer are two paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path {
    /// What we send from; `None`: the kernel chooses.
    pub local: Option<LocalAddress>,
    /// The peer's outer address, or the relay's.
    pub remote: SocketAddr,
    /// The channel to the peer, where `remote` is a relay's address.
    pub channel: Option<ChannelId>,
}

/// One of our own addresses and the interface that it stands on: what packet info
/// (`IP_PKTINFO`, `IPV6_PKTINFO`) says of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalAddress {
    /// The address.
    pub address: IpAddr,
    /// The interface's index.
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
    /// Bytes that a relay channel puts before every datagram.
    pub const CHANNEL_BYTES: u16 = towline_types::frame::RELAYED_HEADER_BYTES as u16;

    /// To an address of the peer's own, from wherever the kernel chooses.
    pub fn direct(remote: SocketAddr) -> Self {
        Self { local: None, remote, channel: None }
    }

    /// The same ends, on a relay's channel.
    #[must_use]
    pub fn on_channel(self, channel: ChannelId) -> Self {
        Self { channel: Some(channel), ..self }
    }

    /// Whether a datagram that came the way `from` came this way: the same, where what the kernel
    /// chooses may be any local end.
    pub fn is(&self, from: &Self) -> bool {
        let local = self.local.is_none() || self.local == from.local;
        local && self.remote == from.remote && self.channel == from.channel
    }

    /// Whether a relay forwards it.
    pub fn is_relayed(&self) -> bool {
        self.channel.is_some()
    }
}

impl From<SocketAddr> for Path {
    fn from(remote: SocketAddr) -> Self {
        Self::direct(remote)
    }
}

/// `direct 203.0.113.5:51830` or `relay 203.0.113.5:51830`. Who knows the relay's name says that.
impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_relayed() { "relay" } else { "direct" };
        write!(f, "{kind} {}", self.remote)
    }
}
