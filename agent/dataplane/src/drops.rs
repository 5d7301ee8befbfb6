//! Reasons for drops: a closed list, with one counter for each reason.
//!
//! Every packet and datagram that the data plane receives and does not pass on is counted here
//! exactly once. The packet path never logs.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use towline_wireguard::Refusal;

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
    /// Packet from the TUN that is not an IP packet, or whose lengths contradict each other.
    InnerMalformed = "inner_malformed",
    /// Packet from the TUN whose destination is in no peer's prefix.
    NoRoute = "no_route",
    /// Packet from the TUN whose source is not an address of this node, for a peer that is not
    /// static.
    ForeignSource = "foreign_source",
    /// Packet from the TUN for a peer that has a session but no known endpoint.
    NoEndpoint = "no_endpoint",
    /// Oldest packet of the queue of packets that wait for a session, dropped because the queue was
    /// full.
    QueueFull = "queue_full",
    /// Packet that waited for a session that was not established in time, or whose peer was
    /// removed.
    QueueExpired = "queue_expired",
    /// Super-packet from the TUN that cannot be split.
    Unsplittable = "unsplittable",
    /// Datagram to the network that found no room in a socket buffer or the send batch in time.
    SendBufferFull = "send_buffer_full",
    /// Datagram to the network without a route or a socket of its address family, or with another
    /// error of the kernel.
    SendRefused = "send_refused",
    /// Datagram to the network that is too large for its path or for the send batch.
    SendTooLarge = "send_too_large",
    /// Datagram from the network that was truncated, because it was longer than the buffer.
    Truncated = "truncated",
    /// Datagram from the network that is longer than any that a node of the mesh sends or forwards.
    Oversized = "oversized",
    /// Datagram from the network that is empty, or whose first bytes are of no known kind.
    UnknownKind = "unknown_kind",
    /// Datagram from the network with the type of a WireGuard message and an impossible length.
    Malformed = "malformed",
    /// Initiation or STUN response beyond the rate of its source address.
    SourceLimited = "source_limited",
    /// Probe of no known version, or of no pair of this node and a peer in that version.
    ProbeUnknown = "probe_unknown",
    /// Probe that does not decrypt, or whose content is invalid.
    ProbeNotAuthentic = "probe_not_authentic",
    /// Probe that may be a replay: it was seen before, or its sender has not proven that it is of the
    /// current start. It is answered by a challenge.
    ProbeStale = "probe_stale",
    /// Request to the relay from an address at which its sender has not proven to receive. It is
    /// answered by a challenge.
    ProbeUnvalidated = "probe_unvalidated",
    /// Probe beyond the rate of its peer.
    ProbeLimited = "probe_limited",
    /// Datagram from the network that arrived through the TUN link, where no outer datagram may
    /// come from.
    TunnelInTunnel = "tunnel_in_tunnel",
    /// STUN request beyond the rate of its source address.
    ReflectorLimited = "reflector_limited",
    /// STUN request that is invalid, relayed, or shorter than its response.
    ReflectorRefused = "reflector_refused",
    /// Datagram on a relay channel whose sender is neither of its two ends.
    RelayStranger = "relay_stranger",
    /// Datagram on a relay channel whose receiver has not proven its address yet.
    RelayUnproven = "relay_unproven",
    /// Datagram on a relay channel whose sender exceeds its rate.
    RelayLimited = "relay_limited",
    /// Initiation under load that was answered with a cookie.
    UnderLoad = "under_load",
    /// Handshake message whose first MAC is wrong: it is not meant for this node's key.
    WrongMac = "wrong_mac",
    /// Initiation with a public key that the peer table does not have.
    UnknownPeer = "unknown_peer",
    /// Message with a receiver index that belongs to no tunnel of this node.
    UnknownIndex = "unknown_index",
    /// Initiation that is not newer than the last one of that peer: a replay, or the peer's clock
    /// was set back.
    StaleHandshake = "stale_handshake",
    /// Handshake message that does not match the state of its tunnel, or does not decrypt.
    InvalidHandshake = "invalid_handshake",
    /// Received data of a session that does not exist, or a packet that could not be sealed because
    /// its session has just ended.
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
    /// Packet to the TUN that the kernel refused, for example because the link is down.
    TunRefused = "tun_refused",
    /// Packet from the TUN that the kernel could not deliver.
    TunUnreadable = "tun_unreadable",
    /// Message of a probe, or STUN message, that was not reported because the channel of events was full.
    EventsFull = "events_full",
    /// Command, such as a probe to send, that was dropped because the worker's queue was full.
    OrdersFull = "orders_full",
}

impl From<Refusal> for DropReason {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Malformed => Self::Malformed,
            Refusal::WrongMac => Self::WrongMac,
            Refusal::UnderLoad => Self::UnderLoad,
            Refusal::StaleHandshake => Self::StaleHandshake,
            Refusal::InvalidHandshake => Self::InvalidHandshake,
            Refusal::NoSession => Self::NoSession,
            Refusal::Replayed => Self::Replayed,
            Refusal::NotAuthentic => Self::NotAuthentic,
            Refusal::CounterExhausted => Self::CounterExhausted,
            Refusal::NoPacket => Self::OpenedMalformed,
        }
    }
}

/// Packet from the TUN that was dropped because of its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForeignSource {
    /// Source address, which is not an address of this node.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Time of the drop.
    pub at: Instant,
}

/// Counters, one per [`DropReason`]. Only one thread may write at a time; any thread may read.
#[derive(Debug)]
pub struct Drops {
    counters: [AtomicU64; DropReason::ALL.len()],
    /// Last packet that was dropped for [`DropReason::ForeignSource`] and that an operator would want
    /// to know of.
    foreign_source: Mutex<Option<ForeignSource>>,
}

impl Default for Drops {
    fn default() -> Self {
        Self {
            counters: [const { AtomicU64::new(0) }; DropReason::ALL.len()],
            foreign_source: Mutex::new(None),
        }
    }
}

impl Drops {
    /// Counts one packet.
    pub fn count(&self, reason: DropReason) {
        self.add(reason, 1);
    }

    /// Counts a number of packets.
    pub fn add(&self, reason: DropReason, packets: u64) {
        let counter = &self.counters[reason as usize];
        // There is one writer, so no locked instruction is needed.
        counter.store(counter.load(Ordering::Relaxed) + packets, Ordering::Relaxed);
    }

    /// Counts a packet from the TUN with a foreign source, and remembers it unless it is one of those
    /// that every host sends: link-local, multicast, or without a source.
    pub fn foreign_source(&self, source: IpAddr, destination: IpAddr, now: Instant) {
        self.count(DropReason::ForeignSource);
        let is_link_local = match source {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        if is_link_local || source.is_unspecified() || destination.is_multicast() {
            return;
        }
        // A reader may hold the lock: then another packet is remembered.
        if let Some(mut last) = self.foreign_source.try_lock() {
            *last = Some(ForeignSource { source, destination, at: now });
        }
    }

    /// Returns the last packet that [`Self::foreign_source`] remembered.
    pub fn last_foreign_source(&self) -> Option<ForeignSource> {
        *self.foreign_source.lock()
    }

    /// Returns the number of packets dropped for a reason.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.counters[reason as usize].load(Ordering::Relaxed)
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
    #[test]
    fn the_last_foreign_source_is_remembered_but_not_what_every_host_sends() {
        let (drops, now) = (Drops::default(), Instant::now());
        let send = |source: &str, destination: &str| {
            drops.foreign_source(source.parse().unwrap(), destination.parse().unwrap(), now);
            drops.last_foreign_source().map(|last| last.source.to_string())
        };
        for (source, destination) in
            [("fe80::1", "fd00:7::1"), ("::", "ff02::16"), ("192.168.1.10", "224.0.0.22")]
        {
            assert_eq!(send(source, destination), None);
        }
        assert_eq!(send("192.168.1.10", "198.19.0.1").as_deref(), Some("192.168.1.10"));
        assert_eq!(drops.get(DropReason::ForeignSource), 4);
    }
}
