//! Reasons for drops: a closed list, with one counter for each reason.
//!
//! Every packet and datagram that the data plane receives and does not pass on is counted here
//! exactly once. The packet path never logs.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! reasons {
    ($($(#[$doc:meta])* $reason:ident = $name:literal,)*) => {
        /// Reason why a packet or datagram was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum DropReason {
            $($(#[$doc])* $reason,)*
        }

        impl DropReason {
            /// All reasons, in order of declaration.
            pub const ALL: &[Self] = &[$(Self::$reason,)*];

            /// Returns the name in metrics and in command output.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$reason => $name,)*
                }
            }
        }
    };
}

reasons! {
    /// From the TUN: not an IP packet, or its lengths contradict each other.
    InnerMalformed = "inner_malformed",
    /// From the TUN: no peer has a prefix that contains the destination.
    NoRoute = "no_route",
    /// From the TUN: the source is not an address of this node, and the peer is not static.
    ForeignSource = "foreign_source",
    /// From the TUN: the peer has a session but no known endpoint.
    NoEndpoint = "no_endpoint",
    /// From the TUN: the queue of packets that wait for a session was full, so the oldest was
    /// dropped.
    QueueFull = "queue_full",
    /// From the TUN: the packet waited for a session that was not established in time.
    QueueExpired = "queue_expired",
    /// From the TUN: a super-packet that cannot be split.
    Unsplittable = "unsplittable",
    /// To the network: the socket's buffer stayed full.
    SendBufferFull = "send_buffer_full",
    /// To the network: no route, no socket of that address family, or another error of the kernel.
    SendRefused = "send_refused",
    /// To the network: too large for the path, or for the send batch.
    SendTooLarge = "send_too_large",
    /// From the network: truncated, because it was longer than the buffer.
    Truncated = "truncated",
    /// From the network: longer than any datagram that a node of the mesh sends or forwards.
    Oversized = "oversized",
    /// From the network: empty, or its first bytes are of no known kind of datagram.
    UnknownKind = "unknown_kind",
    /// From the network: the type of a WireGuard message with an impossible length.
    Malformed = "malformed",
    /// From the network: too many handshakes, probes or STUN messages from one address.
    SourceLimited = "source_limited",
    /// From the network: arrived through the TUN link, where no outer datagram may come from.
    TunnelInTunnel = "tunnel_in_tunnel",
    /// From the network: too many STUN requests from one address.
    ReflectorLimited = "reflector_limited",
    /// From the network: a STUN request that is invalid, relayed, or shorter than its response.
    ReflectorRefused = "reflector_refused",
    /// On a relay channel: the sender is neither of its two ends.
    RelayStranger = "relay_stranger",
    /// On a relay channel: the sender exceeds its rate.
    RelayLimited = "relay_limited",
    /// An initiation under load that was answered with a cookie.
    UnderLoad = "under_load",
    /// A handshake whose first MAC is wrong: it is not meant for this node's key.
    WrongMac = "wrong_mac",
    /// A handshake with a public key that the peer table does not have.
    UnknownPeer = "unknown_peer",
    /// A receiver index that belongs to no tunnel of this node.
    UnknownIndex = "unknown_index",
    /// A handshake that is not newer than the last one of that peer: a replay, or the peer's clock
    /// was set back.
    StaleHandshake = "stale_handshake",
    /// A handshake that does not match the state of its tunnel, or does not decrypt.
    InvalidHandshake = "invalid_handshake",
    /// Data for a session that no longer exists.
    NoSession = "no_session",
    /// Data that was received before, or is older than the replay window.
    Replayed = "replayed",
    /// Data that does not decrypt.
    NotAuthentic = "not_authentic",
    /// Data whose counter is past WireGuard's Reject-After-Messages.
    CounterExhausted = "counter_exhausted",
    /// Authentic data that contains no IP packet.
    OpenedMalformed = "opened_malformed",
    /// Authentic data whose inner source does not belong to the peer that sent it.
    WrongSource = "wrong_source",
    /// Authentic data whose inner destination does not belong to this node, or never leaves a
    /// tunnel (loopback, link-local, multicast, broadcast).
    WrongDestination = "wrong_destination",
    /// To the TUN: refused by the kernel, for example because the link is down.
    TunRefused = "tun_refused",
    /// From the TUN: the kernel could not deliver the packet.
    TunUnreadable = "tun_unreadable",
    /// A probe or STUN message that was not reported because the channel of events was full.
    EventsFull = "events_full",
    /// A command, such as a probe to send, that was dropped because the worker's queue was full.
    OrdersFull = "orders_full",
}

/// Counters, one per [`DropReason`]. Only one thread may write at a time; any thread may read.
#[derive(Debug)]
pub struct Drops([AtomicU64; DropReason::ALL.len()]);

impl Default for Drops {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; DropReason::ALL.len()])
    }
}

impl Drops {
    /// Counts one packet.
    pub fn count(&self, reason: DropReason) {
        self.add(reason, 1);
    }

    /// Counts a number of packets.
    pub fn add(&self, reason: DropReason, packets: u64) {
        let counter = &self.0[reason as usize];
        // There is one writer, so no locked instruction is needed.
        counter.store(counter.load(Ordering::Relaxed) + packets, Ordering::Relaxed);
    }

    /// Returns the number of packets dropped for a reason.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_name_and_counter() {
        let drops = Drops::default();
        for (i, reason) in DropReason::ALL.iter().enumerate() {
            drops.add(*reason, i as u64);
        }
        let mut names: Vec<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        for (i, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(drops.get(*reason), i as u64);
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DropReason::ALL.len());
    }
}
