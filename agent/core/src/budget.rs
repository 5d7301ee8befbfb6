//! Bounds on what others can make us send.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use towline_types::id::NodeId;

/// Datagrams to one address that never answered, within [`WINDOW`]. A whole site of peers may
/// stand behind one address; a victim whose address somebody advertised as its own gets no more.
const UNANSWERED: u32 = 250;
/// Share of one peer in [`UNANSWERED`]: a peer that names the address of another one leaves it room.
const UNANSWERED_OF_PEER: u32 = 125;
/// Time over which datagrams to one address are counted.
const WINDOW: Duration = Duration::from_secs(10);
/// Addresses that are counted at a time: this bounds the memory that lies can take.
const ADDRESSES: usize = 4_096;
/// Addresses of one peer that get something within [`WINDOW`] though they never answered. Twice as many
/// as a record names.
const ADDRESSES_OF_PEER: usize = 64;

/// Datagrams to one address.
#[derive(Debug)]
struct Count {
    /// Begin of the window.
    since: Instant,
    /// Datagrams sent since then.
    sent: u32,
}

impl Count {
    fn new(now: Instant) -> Self {
        Self { since: now, sent: 0 }
    }

    fn is_over(&self, now: Instant) -> bool {
        now >= self.since + WINDOW
    }

    /// Counts one more datagram, if there is room for it.
    fn take(&mut self, now: Instant, limit: u32) -> bool {
        if self.is_over(now) {
            *self = Self::new(now);
        }
        let has_room = self.sent < limit;
        self.sent += u32::from(has_room);
        has_room
    }
}

/// What was sent to addresses that have not answered yet. Candidates come from peers, signals and
/// relays, any of which may lie: this bounds what a lie costs the one whose address it names, and
/// what it costs other peers.
#[derive(Debug, Default)]
pub(crate) struct Unanswered {
    by_address: BTreeMap<IpAddr, Count>,
    by_peer: BTreeMap<NodeId, BTreeMap<IpAddr, Count>>,
}

impl Unanswered {
    /// Counts one more datagram for a peer to an address. Returns whether it may be sent.
    pub(crate) fn take(&mut self, now: Instant, peer: NodeId, to: IpAddr) -> bool {
        self.take_of_peer(now, peer, to) && self.take_of_address(now, to)
    }

    /// Forgets an address from which an answer of the peer came: it is no victim.
    pub(crate) fn answered(&mut self, peer: NodeId, from: IpAddr) {
        self.by_address.remove(&from);
        if let Some(own) = self.by_peer.get_mut(&peer) {
            own.remove(&from);
            if own.is_empty() {
                self.by_peer.remove(&peer);
            }
        }
    }

    /// Forgets a peer, which was removed.
    pub(crate) fn forget(&mut self, peer: NodeId) {
        self.by_peer.remove(&peer);
    }

    fn take_of_peer(&mut self, now: Instant, peer: NodeId, to: IpAddr) -> bool {
        let own = self.by_peer.entry(peer).or_default();
        if !own.contains_key(&to) {
            own.retain(|_, count| !count.is_over(now));
            if own.len() >= ADDRESSES_OF_PEER {
                return false;
            }
        }
        let count = own.entry(to).or_insert_with(|| Count::new(now));
        count.take(now, UNANSWERED_OF_PEER)
    }

    fn take_of_address(&mut self, now: Instant, to: IpAddr) -> bool {
        if self.by_address.len() >= ADDRESSES && !self.by_address.contains_key(&to) {
            self.by_address.retain(|_, count| !count.is_over(now));
            if self.by_address.len() >= ADDRESSES {
                // No peer alone can fill it, and none keeps the others out.
                let oldest = self.by_address.iter().min_by_key(|(_, count)| count.since);
                if let Some(oldest) = oldest.map(|(address, _)| *address) {
                    self.by_address.remove(&oldest);
                }
            }
        }
        let count = self.by_address.entry(to).or_insert_with(|| Count::new(now));
        count.take(now, UNANSWERED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const NOBODY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 9));

    #[allow(clippy::disallowed_methods)] // some instant to count from
    fn start() -> Instant {
        Instant::now()
    }

    fn sent(unanswered: &mut Unanswered, now: Instant, peer: u8, to: IpAddr) -> usize {
        (0..1_000).filter(|_| unanswered.take(now, NodeId([peer; 16]), to)).count()
    }

    #[test]
    fn one_peer_leaves_the_others_their_share_of_an_address() {
        let (mut unanswered, now) = (Unanswered::default(), start());
        assert_eq!(sent(&mut unanswered, now, 1, NOBODY), 125);
        assert_eq!(sent(&mut unanswered, now, 2, NOBODY), 125);
        assert_eq!(sent(&mut unanswered, now, 3, NOBODY), 0, "the address gets no more");
        assert_eq!(sent(&mut unanswered, now + WINDOW, 3, NOBODY), 125);
    }

    #[test]
    fn a_peer_with_ever_new_addresses_keeps_nobody_else_from_trying() {
        let (mut unanswered, now) = (Unanswered::default(), start());
        let numbered = |number: u32| IpAddr::from(number.to_be_bytes());
        let tried = (1..100_000).filter(|n| unanswered.take(now, NodeId([1; 16]), numbered(*n)));
        assert_eq!(tried.count(), ADDRESSES_OF_PEER);
        assert!(unanswered.take(now, NodeId([2; 16]), NOBODY));
        assert!(unanswered.take(now + WINDOW, NodeId([1; 16]), NOBODY));
        let counted: usize = unanswered.by_peer.values().map(BTreeMap::len).sum();
        assert!(counted <= 2 * ADDRESSES_OF_PEER, "{counted}");
        unanswered.answered(NodeId([2; 16]), NOBODY);
        unanswered.forget(NodeId([1; 16]));
        assert!(unanswered.by_peer.is_empty(), "{unanswered:?}");
    }
}
