//! Why a packet was dropped: a closed list, with one counter each.
//!
//! Every packet and datagram that the data plane takes in and does not carry on is counted here,
//! exactly once. Nothing on the packet path logs.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! reasons {
    ($($(#[$doc:meta])* $reason:ident = $name:literal,)*) => {
        /// Why a packet or datagram went no further.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum DropReason {
            $($(#[$doc])* $reason,)*
        }

        impl DropReason {
            /// Every reason, in order of declaration.
            pub const ALL: &[Self] = &[$(Self::$reason,)*];

            /// The name in metrics and in the operator's output.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$reason => $name,)*
                }
            }
        }
    };
}

reasons! {
    /// From the TUN: no IP packet, or its lengths contradict one another.
    InnerMalformed = "inner_malformed",
    /// From the TUN: no peer's prefix holds the destination.
    NoRoute = "no_route",
    /// From the TUN: the source is none of this node's addresses, and the peer is no static one.
    ForeignSource = "foreign_source",
    /// From the TUN: the peer has a session, but no address is known for it.
    NoEndpoint = "no_endpoint",
    /// From the TUN: no session yet, and the few places to wait were taken: the oldest went.
    QueueFull = "queue_full",
    /// Waited for a session that did not come.
    QueueExpired = "queue_expired",
    /// From the TUN: a super-packet that cannot be split.
    Unsplittable = "unsplittable",
    /// To the network: the socket's buffer stayed full.
    SendBufferFull = "send_buffer_full",
    /// To the network: no route, no such family, or another refusal of the kernel.
    SendRefused = "send_refused",
    /// To the network: larger than the path takes.
    SendTooLarge = "send_too_large",
    /// From the network: longer than the buffer, so cut off.
    Truncated = "truncated",
    /// From the network: longer than any datagram that a node of the mesh sends or forwards.
    Oversized = "oversized",
    /// From the network: the first bytes are of no known kind.
    UnknownKind = "unknown_kind",
    /// From the network: WireGuard's type with a length that cannot be.
    Malformed = "malformed",
    /// From the network: too many handshakes, probes or STUN messages from one address.
    SourceLimited = "source_limited",
    /// From the network: came in through the tunnel's own link, where no outer datagram belongs.
    TunnelInTunnel = "tunnel_in_tunnel",
    /// From the network: too many STUN requests from one address.
    ReflectorLimited = "reflector_limited",
    /// From the network: a STUN request that is shorter than its answer, or none at all.
    ReflectorRefused = "reflector_refused",
    /// On a relay's channel, but from neither of its ends.
    RelayStranger = "relay_stranger",
    /// On a relay's channel, from a node that sends more than it may.
    RelayLimited = "relay_limited",
    /// A handshake while we are under load: answered with a cookie.
    UnderLoad = "under_load",
    /// A handshake whose first MAC is wrong: not meant for our key.
    WrongMac = "wrong_mac",
    /// A handshake of a key that the peer table does not have.
    UnknownPeer = "unknown_peer",
    /// A receiver index that names no tunnel of ours.
    UnknownIndex = "unknown_index",
    /// A handshake that is not newer than the last one of that peer: a replay, or a clock that
    /// was set back.
    StaleHandshake = "stale_handshake",
    /// A handshake that does not fit the state of its tunnel, or does not decrypt.
    InvalidHandshake = "invalid_handshake",
    /// Data for a session that is gone.
    NoSession = "no_session",
    /// Data that was received before, or is older than the replay window.
    Replayed = "replayed",
    /// Data that does not decrypt.
    NotAuthentic = "not_authentic",
    /// Data whose counter is past WireGuard's Reject-After-Messages.
    CounterExhausted = "counter_exhausted",
    /// Authentic, but what is inside is no IP packet.
    OpenedMalformed = "opened_malformed",
    /// Authentic, but the inner source does not belong to the peer that sent it.
    WrongSource = "wrong_source",
    /// Authentic, but the inner destination is none of this node's addresses, or one that never comes out of
    /// a tunnel (loopback, link-local, multicast, broadcast).
    WrongDestination = "wrong_destination",
    /// To the TUN: refused, as when the link is down.
    TunRefused = "tun_refused",
    /// From the TUN: the kernel could not hand it over.
    TunUnreadable = "tun_unreadable",
    /// A probe or STUN message: the receiver of events is too slow.
    EventsFull = "events_full",
    /// An order of the daemon's, such as a probe to be sent: the worker is too slow.
    OrdersFull = "orders_full",
}

/// One counter per [`DropReason`]. One thread writes, any thread reads.
#[derive(Debug)]
pub struct Drops([AtomicU64; DropReason::ALL.len()]);

impl Default for Drops {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; DropReason::ALL.len()])
    }
}

impl Drops {
    /// Counts one.
    pub fn count(&self, reason: DropReason) {
        self.add(reason, 1);
    }

    /// Counts several.
    pub fn add(&self, reason: DropReason, packets: u64) {
        let counter = &self.0[reason as usize];
        // One writer: no need for a locked instruction.
        counter.store(counter.load(Ordering::Relaxed) + packets, Ordering::Relaxed);
    }

    /// How many so far.
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
