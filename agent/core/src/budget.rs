//! Bounds on what others can make us send.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_types::id::NodeId;

use crate::prefixes::is_private;

/// Datagrams to one address that never answered, within [`WINDOW`]. A whole site of peers may
/// stand behind one address; a victim whose address somebody advertised as its own gets no more.
const UNANSWERED: u32 = 250;
/// Share of one peer in [`UNANSWERED`]: a peer that names the address of another one leaves it room.
const UNANSWERED_OF_PEER: u32 = 125;
/// Datagrams to all addresses of one public network that never answered, within [`WINDOW`]: a victim is
/// often a network rather than a host, and its uplink is what a flood fills. About 10 kB/s.
const UNANSWERED_OF_NETWORK: u32 = 1_000;
/// Share of one peer in [`UNANSWERED_OF_NETWORK`]: nodes of one provider often share a network.
const PEER_IN_NETWORK: u32 = 500;
/// Time over which datagrams to one address or network are counted.
const WINDOW: Duration = Duration::from_secs(10);
/// Addresses that are counted at a time, and networks: this bounds the memory that lies can take.
const ADDRESSES: usize = 4_096;
/// Addresses of one peer that get something within [`WINDOW`] though they never answered. Twice as many
/// as a record names.
const ADDRESSES_OF_PEER: usize = 64;
/// Prefix length of an IPv4 network that is counted as one: usually the longest that is routed on the
/// internet.
const V4_NETWORK_BITS: u8 = 24;
/// Prefix length of an IPv6 network that is counted as one: what a site gets (RFC 6177).
const V6_NETWORK_BITS: u8 = 56;

/// Datagrams to one address or network.
#[derive(Debug)]
struct Count {
    /// Begin of the window.
    since: Instant,
    /// Datagrams sent since then.
    sent: u32,
    /// Those that the current window of the address's network has in its sum. Zero in a count of a network.
    in_network: Share,
}

/// Part of one address in the sum of its network.
#[derive(Debug, Clone, Copy)]
struct Share {
    /// Begin of the network's window.
    since: Instant,
    /// Datagrams in it.
    sent: u32,
}

impl Count {
    fn new(now: Instant) -> Self {
        Self { since: now, sent: 0, in_network: Share { since: now, sent: 0 } }
    }

    fn is_over(&self, now: Instant) -> bool {
        now >= self.since + WINDOW
    }

    /// Returns whether there is room for one more datagram.
    fn has_room(&self, now: Instant, limit: u32) -> bool {
        self.is_over(now) || self.sent < limit
    }

    /// Counts one more datagram, in a new window if the last one is over.
    fn add(&mut self, now: Instant) {
        if self.is_over(now) {
            (self.since, self.sent) = (now, 0);
        }
        self.sent += 1;
    }

    /// Records that the last datagram is also in the sum of a network, whose window began at `since`.
    fn add_to_network(&mut self, since: Instant) {
        if self.in_network.since != since {
            self.in_network = Share { since, sent: 0 };
        }
        self.in_network.sent += 1;
    }

    /// Takes back datagrams that were answered. Those of an earlier window are not in this count.
    fn take_back(&mut self, answered: Share) {
        if answered.since == self.since {
            self.sent = self.sent.saturating_sub(answered.sent);
        }
    }
}

/// What was sent to addresses that have not answered yet. Candidates come from peers, signals and
/// relays, any of which may lie: this bounds what a lie costs the one whose address or network it names,
/// and what it costs other peers.
///
/// Only public networks have a sum. Hosts of many sites have addresses of the same private networks,
/// where a sum would let the nodes of other sites use up what those of our own LAN need.
#[derive(Debug, Default)]
pub(crate) struct Unanswered {
    by_address: BTreeMap<IpAddr, Count>,
    by_peer: BTreeMap<(NodeId, IpAddr), Count>,
    by_network: BTreeMap<IpNet, Count>,
    by_peer_and_network: BTreeMap<(NodeId, IpNet), Count>,
}

impl Unanswered {
    /// Counts one more datagram for a peer to an address. Returns whether it may be sent. `has_answered` says
    /// that the peer once answered from there: then the network does not count it, so that others who name
    /// its neighbours cannot keep it from connecting again. The address and the peer have their limits.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        peer: NodeId,
        to: IpAddr,
        has_answered: bool,
    ) -> bool {
        let network = network_of(to).filter(|_| !has_answered);
        let has_room =
            |count: Option<&Count>, limit| count.is_none_or(|count| count.has_room(now, limit));
        // What one of them refuses is not sent, so none of the others counts it.
        let is_free = has_room(self.by_peer.get(&(peer, to)), UNANSWERED_OF_PEER)
            && has_room(self.by_address.get(&to), UNANSWERED)
            && network.is_none_or(|net| {
                has_room(self.by_peer_and_network.get(&(peer, net)), PEER_IN_NETWORK)
                    && has_room(self.by_network.get(&net), UNANSWERED_OF_NETWORK)
            });
        if !is_free || !self.has_place(now, peer, to) {
            return false;
        }
        evict(&mut self.by_address, now, &to);
        let of_address = count(&mut self.by_address, now, to);
        let of_peer = count(&mut self.by_peer, now, (peer, to));
        if let Some(net) = network {
            evict(&mut self.by_network, now, &net);
            of_address.add_to_network(count(&mut self.by_network, now, net).since);
            of_peer.add_to_network(count(&mut self.by_peer_and_network, now, (peer, net)).since);
        }
        true
    }

    /// Forgets an address from which an answer of the peer came: it is no victim.
    pub(crate) fn answered(&mut self, peer: NodeId, from: IpAddr) {
        let of_address = self.by_address.remove(&from);
        let of_peer = self.by_peer.remove(&(peer, from));
        let Some(net) = network_of(from) else { return };
        if let (Some(count), Some(sum)) = (of_address, self.by_network.get_mut(&net)) {
            sum.take_back(count.in_network);
        }
        let sum = self.by_peer_and_network.get_mut(&(peer, net));
        if let (Some(count), Some(sum)) = (of_peer, sum) {
            sum.take_back(count.in_network);
        }
    }

    /// Forgets a peer, which was removed.
    pub(crate) fn forget(&mut self, peer: NodeId) {
        self.by_peer.retain(|(of, _), _| *of != peer);
        self.by_peer_and_network.retain(|(of, _), _| *of != peer);
    }

    /// Returns whether an address is counted for a peer, or has a place among those that are. Forgets what
    /// is over.
    fn has_place(&mut self, now: Instant, peer: NodeId, to: IpAddr) -> bool {
        if self.by_peer.contains_key(&(peer, to)) {
            return true;
        }
        let first = (peer, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let own = self.by_peer.range(first..).take_while(|((of, _), _)| *of == peer);
        let (over, counted): (Vec<_>, Vec<_>) = own.partition(|(_, count)| count.is_over(now));
        let is_full = counted.len() >= ADDRESSES_OF_PEER;
        let over: Vec<_> = over.into_iter().map(|(key, _)| *key).collect();
        for key in over {
            self.by_peer.remove(&key);
        }
        let first = (peer, IpNet::default());
        let own = self.by_peer_and_network.range(first..).take_while(|((of, _), _)| *of == peer);
        let over: Vec<_> =
            own.filter(|(_, count)| count.is_over(now)).map(|(key, _)| *key).collect();
        for key in over {
            self.by_peer_and_network.remove(&key);
        }
        !is_full
    }
}

/// Counts one more datagram under a key. Returns the count.
fn count<K: Ord>(counts: &mut BTreeMap<K, Count>, now: Instant, key: K) -> &mut Count {
    let count = counts.entry(key).or_insert_with(|| Count::new(now));
    count.add(now);
    count
}

/// Makes a place for a key that is not counted yet. No peer alone can fill the table, and none keeps the
/// others out: a full table removes the oldest.
fn evict<K: Ord + Copy>(counts: &mut BTreeMap<K, Count>, now: Instant, key: &K) {
    if counts.len() < ADDRESSES || counts.contains_key(key) {
        return;
    }
    counts.retain(|_, count| !count.is_over(now));
    if counts.len() >= ADDRESSES {
        let oldest = counts.iter().min_by_key(|(_, count)| count.since).map(|(key, _)| *key);
        if let Some(oldest) = oldest {
            counts.remove(&oldest);
        }
    }
}

/// Returns the network whose addresses have a sum together with this one, if it is public.
fn network_of(address: IpAddr) -> Option<IpNet> {
    if is_private(address) {
        return None;
    }
    let bits = if address.is_ipv4() { V4_NETWORK_BITS } else { V6_NETWORK_BITS };
    IpNet::new(address, bits).ok().map(|net| net.trunc())
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
        (0..1_000).filter(|_| unanswered.take(now, NodeId([peer; 16]), to, false)).count()
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
        let mut take = |now, peer: u8, to| unanswered.take(now, NodeId([peer; 16]), to, false);
        let tried = (1..100_000).filter(|number| take(now, 1, numbered(*number))).count();
        assert_eq!(tried, ADDRESSES_OF_PEER);
        assert!(take(now, 2, NOBODY));
        assert!(take(now + WINDOW, 1, NOBODY));
        let counted: usize = unanswered.by_peer.len();
        assert!(counted <= 2 * ADDRESSES_OF_PEER, "{counted}");
        unanswered.answered(NodeId([2; 16]), NOBODY);
        unanswered.forget(NodeId([1; 16]));
        assert!(unanswered.by_peer.is_empty(), "{unanswered:?}");
    }

    #[test]
    fn all_addresses_of_a_public_network_have_a_sum_of_which_one_peer_leaves_others_half() {
        let (mut unanswered, now) = (Unanswered::default(), start());
        let mut to_network = |now, peer: u8, first: &str| {
            let first: IpAddr = first.parse().unwrap();
            let numbered = |number: u8| match first {
                IpAddr::V4(v4) => IpAddr::from((u32::from(v4) + u32::from(number)).to_be_bytes()),
                IpAddr::V6(v6) => IpAddr::from((u128::from(v6) + u128::from(number)).to_be_bytes()),
            };
            (1..40).map(|number| sent(&mut unanswered, now, peer, numbered(number))).sum::<usize>()
        };
        for network in ["198.51.100.0", "2001:db8:0:1200::"] {
            assert_eq!(to_network(now, 1, network), 500);
            assert_eq!(to_network(now, 2, network), 500, "one peer leaves the others half");
            assert_eq!(to_network(now, 3, network), 0, "the network gets no more");
        }
        assert_eq!(to_network(now, 3, "198.51.101.0"), 500);
        assert_eq!(to_network(now, 3, "2001:db8:0:1300::"), 500);
        assert_eq!(to_network(now + WINDOW, 3, "198.51.100.0"), 500);
        assert_eq!(to_network(now, 4, "192.168.1.0"), 39 * 125, "sites use the same ones");
    }

    #[test]
    fn what_was_answered_is_no_part_of_the_sum_of_a_network() {
        let (mut unanswered, now) = (Unanswered::default(), start());
        let node = |number: u8| IpAddr::from([198, 51, 100, number]);
        for number in 1..=100 {
            assert_eq!(sent(&mut unanswered, now, number, node(number)), 125);
            unanswered.answered(NodeId([number; 16]), node(number));
        }
        // An answer in a later window takes nothing out of that one.
        assert_eq!(sent(&mut unanswered, now, 101, node(101)), 125);
        let later = now + WINDOW;
        assert_eq!(sent(&mut unanswered, later, 102, node(102)), 125);
        unanswered.answered(NodeId([101; 16]), node(101));
        let sum = unanswered.by_network.values().map(|count| count.sent).sum::<u32>();
        assert_eq!(sum, 125);
    }

    #[test]
    fn the_sum_of_a_network_keeps_no_peer_from_an_address_that_it_answered_from() {
        let (mut unanswered, now) = (Unanswered::default(), start());
        let host = |number: u8| IpAddr::from([198, 51, 100, number]);
        for liar in [1, 2] {
            let to_each = (1..=8).map(|number| sent(&mut unanswered, now, liar, host(number)));
            assert_eq!(to_each.sum::<usize>(), 500);
        }
        assert_eq!(sent(&mut unanswered, now, 3, host(99)), 0, "the network gets no more");
        let known = (0..1_000).filter(|_| unanswered.take(now, NodeId([3; 16]), host(99), true));
        assert_eq!(known.count(), 125, "the address still has its limit");
    }

    #[test]
    fn an_answer_is_taken_out_of_a_sum_that_began_after_the_first_datagram() {
        let (mut unanswered, now) = (Unanswered::default(), start());
        let host = |number: u8| IpAddr::from([198, 51, 100, number]);
        let sum = |unanswered: &Unanswered| {
            unanswered.by_network.values().map(|count| count.sent).sum::<u32>()
        };
        // The network's next window begins inside that of the address.
        let (early, late) = (now + WINDOW / 2, now + WINDOW);
        assert!(unanswered.take(now, NodeId([2; 16]), host(2), false));
        let peer = NodeId([3; 16]);
        assert!((0..3).all(|_| unanswered.take(early, peer, host(3), false)));
        assert!((0..4).all(|_| unanswered.take(late, peer, host(3), false)));
        assert_eq!(sum(&unanswered), 4, "a new window");
        unanswered.answered(peer, host(3));
        assert_eq!(sum(&unanswered), 0, "those of the earlier window are not taken back twice");
    }
}
