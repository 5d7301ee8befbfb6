//! The content of simulated datagrams.

use std::net::SocketAddr;

use towline_core::path::{ChannelId, Path};
use towline_proto::frame::{Probe, STAMPED_PROBE_BYTES, Stamp};
use towline_proto::id::WireguardKey;

use super::tunnel::Message;

/// The content of a datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// A message that only `from` can seal and only `to` can open.
    Probe {
        /// Key of the node that sealed it.
        from: WireguardKey,
        /// Key of the node that can open it.
        to: WireguardKey,
        /// The message itself.
        message: Probe,
        /// Size in bytes to which the message is padded.
        size: Option<u16>,
    },
    /// A probe of version 2: the stamp, and the probe itself.
    Stamped(Stamp, Box<Payload>),
    /// A WireGuard message.
    WireGuard(Message),
    /// A STUN binding request.
    StunRequest([u8; 12]),
    /// A STUN binding response, with the address that the request came from.
    StunAnswer([u8; 12], SocketAddr),
    /// A payload on a relay channel: the same bytes, preceded by the channel id.
    Channel(ChannelId, Box<Payload>),
}

impl Payload {
    /// Returns the size of the UDP payload in bytes. Payloads whose size does not matter are small.
    pub fn size(&self) -> u16 {
        match self {
            Self::Probe { size, .. } => size.unwrap_or(80),
            Self::Channel(_, payload) => payload.size(),
            Self::Stamped(_, payload) => payload.size().max(STAMPED_PROBE_BYTES as u16),
            _ => 80,
        }
    }

    /// Returns whether it is a probe, on a channel or not.
    pub fn is_probe(&self) -> bool {
        match self {
            Self::Probe { .. } | Self::Stamped(..) => true,
            Self::Channel(_, payload) => payload.is_probe(),
            Self::WireGuard(_) | Self::StunRequest(_) | Self::StunAnswer(..) => false,
        }
    }

    /// Wraps the payload in the relay channel of a path, if the path has one.
    pub(super) fn on(self, path: &Path) -> Self {
        match path.channel {
            Some(channel) => Self::Channel(channel, Box::new(self)),
            None => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamped_probe_has_the_size_of_version_2_unless_it_is_padded_to_more() {
        let stamped = |size| {
            let [from, to] = [1, 2].map(|number| WireguardKey([number; 32]));
            let message = Probe::Ping { transaction: 7 };
            let probe = Payload::Probe { from, to, message, size };
            Payload::Stamped(Stamp { epoch: 1, counter: 1 }, Box::new(probe))
        };
        assert_eq!(stamped(None).size(), 96);
        assert_eq!(stamped(Some(90)).size(), 96);
        assert_eq!(stamped(Some(1_420)).size(), 1_420);
    }
}
