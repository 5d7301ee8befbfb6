//! Lookup of a peer by inner address, receiver index or public key.
//!
//! A [`Table`] is immutable. The next table is built separately and replaces it in one step, so
//! that a packet uses one state from lookup to send. State that outlives the change (sessions and
//! counters of a peer) is behind shared pointers, which the next table takes over.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use parking_lot::Mutex;
use prefix_trie::PrefixMap;
use towline_core::own_networks::OwnNetworks;
use towline_core::path::Path;
use towline_core::peer_table::{PeerEntry, PeerPath, PeerTable};
use towline_types::id::WireguardKey;

use super::Slot;
use super::counters::PeerCounters;
use super::tunnel::Tunnel;
use towline_wireguard::Secrets;

/// One peer: its entry from the core, its tunnel and its counters.
#[derive(Debug)]
pub(super) struct Peer {
    /// Public key of the peer.
    pub(super) key: WireguardKey,
    /// Entry that the core supplied.
    pub(super) entry: PeerEntry,
    /// Tunnel with its sessions. Locked for a whole run of packets at a time.
    pub(super) tunnel: Arc<Mutex<Tunnel>>,
    /// Counters of bytes and handshakes.
    pub(super) counters: Arc<PeerCounters>,
    /// 24-bit tunnel indices of the peer: the current one, and the one from before the last change
    /// of the pre-shared key or the boot epoch.
    indices: [Option<u32>; 2],
}

/// Number of peers in one part of a table. A change of one peer copies its part, and one pointer for each
/// other part.
const PART: usize = 128;

/// Immutable table of all peers, their prefixes and this node's addresses.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Every peer, by slot, in parts of [`PART`].
    parts: Vec<Arc<[Arc<Peer>]>>,
    /// Shared by tables that differ in paths only.
    lookup: Arc<Lookup>,
}

/// Slots of the peers by what they are looked up by.
#[derive(Debug, Default)]
struct Lookup {
    by_key: HashMap<WireguardKey, Slot>,
    by_index: HashMap<u32, Slot, BuildHasherDefault<IntHasher>>,
    routes: Routes,
    own: OwnAddresses,
}

impl Table {
    /// Builds the table that replaces `self`. Peers that stay keep their sessions and counters. New
    /// peers get tunnels with `secrets`.
    pub(super) fn next(&self, now: Instant, wanted: &PeerTable, secrets: &Arc<Secrets>) -> Self {
        let before = &self.lookup.by_index;
        let mut next = Lookup { own: OwnAddresses::new(&wanted.own), ..Lookup::default() };
        let mut peers = Vec::with_capacity(wanted.peers.len());
        for (key, entry) in &wanted.peers {
            let slot = peers.len() as Slot;
            let is_taken =
                |index: u32| next.by_index.contains_key(&index) || before.contains_key(&index);
            let peer = match self.by_key(key) {
                Some(peer) => peer.following(now, entry, is_taken),
                None => {
                    let index = free_index(is_taken);
                    let psk = entry.preshared_key.clone();
                    Peer {
                        key: *key,
                        entry: entry.clone(),
                        tunnel: Arc::new(Mutex::new(Tunnel::new(*key, psk, index, secrets))),
                        counters: Arc::default(),
                        indices: [Some(index), None],
                    }
                }
            };
            for index in peer.indices.iter().flatten() {
                next.by_index.insert(*index, slot);
            }
            for prefix in &entry.prefixes {
                next.routes.insert(*prefix, slot);
            }
            next.by_key.insert(*key, slot);
            peers.push(Arc::new(peer));
        }
        Self { parts: peers.chunks(PART).map(Arc::from).collect(), lookup: Arc::new(next) }
    }

    /// Builds the table that replaces `self` when nothing but the path of one peer changes. `None` if the
    /// peer is not in the table.
    pub(super) fn with_path(&self, key: &WireguardKey, path: PeerPath) -> Option<Self> {
        let slot = *self.lookup.by_key.get(key)? as usize;
        let peer = self.peer(slot as Slot)?.with_path(path);
        let mut parts = self.parts.clone();
        let part = parts.get_mut(slot / PART)?;
        let mut peers = part.to_vec();
        *peers.get_mut(slot % PART)? = Arc::new(peer);
        *part = Arc::from(peers);
        Some(Self { parts, lookup: self.lookup.clone() })
    }

    /// Returns every peer, by slot.
    pub(super) fn peers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.parts.iter().flat_map(|part| part.iter())
    }

    /// Returns the slot of every peer.
    pub(super) fn slots(&self) -> impl Iterator<Item = Slot> {
        (0..).zip(self.peers()).map(|(slot, _)| slot)
    }

    /// Returns the peer with the longest prefix that contains `address`.
    pub(super) fn route(&self, address: IpAddr) -> Option<Slot> {
        self.lookup.routes.longest(address)
    }

    /// Returns whether a peer may send from this address although another peer, `owner`, has it: both share
    /// the network that is the longest prefix of the address.
    pub(super) fn is_shared_source(&self, slot: Slot, owner: Option<Slot>, source: IpAddr) -> bool {
        let Some(peer) = self.peer(slot).filter(|peer| !peer.entry.shared_sources.is_empty())
        else {
            return false;
        };
        let inside = peer.entry.shared_sources.iter().filter(|net| net.contains(&source));
        let Some(shared) = inside.max_by_key(|net| net.prefix_len()) else { return false };
        let owner = owner.and_then(|slot| self.peer(slot));
        let owned = owner.into_iter().flat_map(|peer| &peer.entry.prefixes);
        // A longer prefix inside of the shared one is another node's alone.
        !owned.filter(|net| net.contains(&source)).any(|net| net.prefix_len() > shared.prefix_len())
    }

    /// Returns whether a packet to this address may leave the tunnel on this node.
    pub(super) fn accepts(&self, destination: IpAddr) -> bool {
        self.lookup.own.accepts(destination)
    }

    /// Returns whether a packet from this address may enter the tunnel towards any peer.
    pub(super) fn owns(&self, source: IpAddr) -> bool {
        self.lookup.own.owns(source)
    }

    /// Returns the peer in a slot.
    pub(super) fn peer(&self, slot: Slot) -> Option<&Arc<Peer>> {
        let slot = slot as usize;
        self.parts.get(slot / PART)?.get(slot % PART)
    }

    /// Returns the peer with this public key.
    pub(super) fn by_key(&self, key: &WireguardKey) -> Option<&Arc<Peer>> {
        self.peer(*self.lookup.by_key.get(key)?)
    }

    /// Returns the peer that a WireGuard receiver index belongs to.
    pub(super) fn by_receiver(&self, receiver: u32) -> Option<Slot> {
        // In both engines the upper 24 bits identify the tunnel and the lower 8 the session.
        self.lookup.by_index.get(&(receiver >> 8)).copied()
    }
}

impl Peer {
    /// Returns this peer with a new entry. A changed pre-shared key or a newer boot epoch needs a
    /// new tunnel state beside the old one, which is used until the new one has a session.
    fn following(&self, now: Instant, entry: &PeerEntry, taken: impl Fn(u32) -> bool) -> Self {
        let has_restarted = self.entry.boot_epoch < entry.boot_epoch;
        let renew = self.entry.preshared_key != entry.preshared_key || has_restarted;
        let indices = if renew {
            let index = free_index(taken);
            let psk = entry.preshared_key.clone();
            self.tunnel.lock().rebuild(now, psk, index, has_restarted);
            [Some(index), self.indices[0]]
        } else {
            self.indices
        };
        Self {
            key: self.key,
            entry: entry.clone(),
            tunnel: self.tunnel.clone(),
            counters: self.counters.clone(),
            indices,
        }
    }

    /// Returns this peer with another path. Its tunnel stays.
    fn with_path(&self, path: PeerPath) -> Self {
        let mut entry = self.entry.clone();
        entry.set_path(path);
        Self {
            key: self.key,
            entry,
            tunnel: self.tunnel.clone(),
            counters: self.counters.clone(),
            indices: self.indices,
        }
    }

    /// Returns the endpoint that the core supplied.
    pub(super) fn endpoint(&self) -> Option<Path> {
        self.entry.endpoint
    }

    /// Returns the keepalive interval.
    pub(super) fn keepalive(&self) -> Option<Duration> {
        self.entry.keepalive
    }
}

/// Returns a random free index, so that indices do not reveal the number of peers.
fn free_index(taken: impl Fn(u32) -> bool) -> u32 {
    loop {
        let index = super::random() as u32 >> 8;
        if !taken(index) {
            return index;
        }
    }
}

/// Lookup table of this node's addresses, see [`OwnNetworks`].
#[derive(Debug, Default)]
struct OwnAddresses(Routes<Own>);

/// Use of an address, as its longest prefix allows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Own {
    /// Allowed as a destination out of the tunnel and as a source into it.
    Both,
    /// Allowed as a destination out of the tunnel only.
    Destination,
    /// Allowed neither as a destination nor as a source.
    Refused,
}

impl OwnAddresses {
    fn new(own: &OwnNetworks) -> Self {
        let mut routes = Routes::default();
        // If a prefix occurs twice, the first insertion counts.
        for (nets, what) in [
            (own.sources().collect::<Vec<_>>(), Own::Both),
            (own.refused().collect(), Own::Refused),
            (own.destinations().collect(), Own::Destination),
        ] {
            for net in nets {
                routes.insert(net, what);
            }
        }
        Self(routes)
    }

    fn accepts(&self, destination: IpAddr) -> bool {
        matches!(self.0.longest(destination), Some(Own::Both | Own::Destination))
    }

    fn owns(&self, source: IpAddr) -> bool {
        self.0.longest(source) == Some(Own::Both)
    }
}

/// Table for longest-prefix matches. Nearly every address of a mesh is a host prefix, so those are
/// tried first: one hash lookup finds them.
#[derive(Debug)]
pub struct Routes<V = Slot> {
    hosts4: HashMap<u32, V, BuildHasherDefault<IntHasher>>,
    hosts6: HashMap<u128, V, BuildHasherDefault<IntHasher>>,
    nets4: PrefixMap<Ipv4Net, V>,
    nets6: PrefixMap<Ipv6Net, V>,
}

impl<V> Default for Routes<V> {
    fn default() -> Self {
        Self {
            hosts4: HashMap::default(),
            hosts6: HashMap::default(),
            nets4: PrefixMap::default(),
            nets6: PrefixMap::default(),
        }
    }
}

impl<V: Copy> Routes<V> {
    /// Inserts a prefix, unless it has a value already. A peer table contains each prefix once.
    pub fn insert(&mut self, prefix: IpNet, value: V) {
        match prefix {
            IpNet::V4(net) if net.prefix_len() == 32 => {
                self.hosts4.entry(net.addr().into()).or_insert(value);
            }
            IpNet::V6(net) if net.prefix_len() == 128 => {
                if let Entry::Vacant(entry) = self.hosts6.entry(net.addr().into()) {
                    entry.insert(value);
                }
            }
            IpNet::V4(net) => {
                if self.nets4.get(&net.trunc()).is_none() {
                    self.nets4.insert(net.trunc(), value);
                }
            }
            IpNet::V6(net) => {
                if self.nets6.get(&net.trunc()).is_none() {
                    self.nets6.insert(net.trunc(), value);
                }
            }
        }
    }

    /// Returns the value of the longest prefix that contains `address`.
    pub fn longest(&self, address: IpAddr) -> Option<V> {
        match address {
            IpAddr::V4(v4) => self
                .hosts4
                .get(&v4.into())
                .copied()
                .or_else(|| self.nets4.get_lpm(&Ipv4Net::from(v4)).map(|(_, value)| *value)),
            IpAddr::V6(v6) => self
                .hosts6
                .get(&v6.into())
                .copied()
                .or_else(|| self.nets6.get_lpm(&Ipv6Net::from(v6)).map(|(_, value)| *value)),
        }
    }
}

/// Hasher for one integer. The keys come from the peer table, never from a packet, so no attacker
/// can choose them to collide.
#[derive(Debug, Default)]
struct IntHasher(u64);

impl IntHasher {
    /// Odd multiplier: 2^64 divided by the golden ratio, which spreads consecutive keys.
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

    fn mix(&mut self, word: u64) {
        let wide = u128::from(self.0 ^ word) * u128::from(Self::ODD);
        self.0 = (wide >> 64) as u64 ^ wide as u64;
    }
}

impl Hasher for IntHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.mix(u64::from(*byte) + 1);
        }
    }

    fn write_u32(&mut self, word: u32) {
        self.mix(u64::from(word) ^ Self::ODD);
    }

    fn write_u128(&mut self, word: u128) {
        self.mix((word >> 64) as u64 ^ Self::ODD);
        self.mix(word as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use x25519_dalek::StaticSecret;

    /// Strategy for addresses of which many are close together, and some are special.
    fn small() -> impl Strategy<Value = IpAddr> {
        let octet = || prop_oneof![Just(0u8), Just(1), Just(3), Just(127), Just(255)];
        let first = prop_oneof![Just(0u8), Just(10), Just(127), Just(169), Just(224), Just(255)];
        (first, prop_oneof![Just(1u8), Just(254)], octet(), octet())
            .prop_map(|(a, b, c, d)| IpAddr::from([a, b, c, d]))
    }

    #[test]
    fn a_path_replaces_one_peer_and_shares_all_else_with_the_table_before() {
        let now = Instant::now();
        let secrets = Arc::new(Secrets::new(StaticSecret::from([1; 32])));
        let key = |number: u16| {
            let mut key = [9; 32];
            key[..2].copy_from_slice(&number.to_be_bytes());
            WireguardKey(key)
        };
        let net = |number: u16| {
            let [high, low] = number.to_be_bytes();
            IpNet::from(IpAddr::from([10, 0, high, low]))
        };
        let entry = |number: u16| PeerEntry { prefixes: vec![net(number)], ..PeerEntry::default() };
        let peers = (0..1_000).map(|number| (key(number), entry(number))).collect();
        let wanted = PeerTable { peers, ..PeerTable::default() };
        let before = Table::default().next(now, &wanted, &secrets);
        assert_eq!(before.peers().count(), 1_000);
        for number in [0, 127, 128, 999] {
            let slot = before.route(net(number).addr()).unwrap();
            assert_eq!(before.peer(slot).unwrap().key, key(number));
        }

        let endpoint = Some(Path::direct(([192, 0, 2, 1], 51830).into()));
        let path = PeerPath { endpoint, ..PeerEntry::default().path() };
        let next = before.with_path(&key(500), path).unwrap();
        let (old, new) = (before.by_key(&key(500)).unwrap(), next.by_key(&key(500)).unwrap());
        assert_eq!((old.endpoint(), new.endpoint()), (None, endpoint));
        assert!(Arc::ptr_eq(&old.tunnel, &new.tunnel) && Arc::ptr_eq(&old.counters, &new.counters));
        assert_eq!(new.entry.prefixes, [net(500)]);
        let both = before.peers().zip(next.peers());
        assert_eq!(both.filter(|(a, b)| !Arc::ptr_eq(a, b)).count(), 1);
        let parts = before.parts.iter().zip(&next.parts);
        assert_eq!(parts.filter(|(a, b)| !Arc::ptr_eq(a, b)).count(), 1);
        assert!(Arc::ptr_eq(&before.lookup, &next.lookup));
        assert!(next.with_path(&key(1_000), path).is_none());

        // The same as the whole table with that path.
        let mut wanted = wanted;
        wanted.peers.get_mut(&key(500)).unwrap().set_path(path);
        let whole = before.next(now, &wanted, &secrets);
        assert!(whole.peers().zip(next.peers()).all(|(a, b)| a.entry == b.entry));
    }

    proptest! {
        #[test]
        fn the_longest_prefix_wins(
            prefixes in proptest::collection::vec((any::<IpAddr>(), 0u8..=128), 0..40),
            near in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
            far in proptest::collection::vec(any::<IpAddr>(), 0..10),
        ) {
            let prefixes: Vec<IpNet> = prefixes
                .into_iter()
                .map(|(ip, len)| IpNet::new(ip, len % if ip.is_ipv4() { 33 } else { 129 }).unwrap())
                .collect();
            let mut routes = Routes::default();
            for (slot, prefix) in prefixes.iter().enumerate() {
                routes.insert(*prefix, slot as Slot);
            }
            let near = near.into_iter().filter(|_| !prefixes.is_empty()).map(|(at, flip)| {
                match prefixes[at.index(prefixes.len())].addr() {
                    IpAddr::V4(v4) => IpAddr::from((u32::from(v4) ^ u32::from(flip)).to_be_bytes()),
                    IpAddr::V6(v6) => IpAddr::from((u128::from(v6) ^ u128::from(flip)).to_be_bytes()),
                }
            });
            for address in near.chain(far) {
                let holding = prefixes.iter().filter(|prefix| prefix.contains(&address));
                let longest = holding.map(|prefix| prefix.trunc()).max_by_key(IpNet::prefix_len);
                let first = longest
                    .and_then(|net| prefixes.iter().position(|prefix| prefix.trunc() == net));
                prop_assert_eq!(routes.longest(address).map(|slot| slot as usize), first);
            }
        }

        #[test]
        fn own_addresses_are_those_of_the_core(
            addresses in proptest::collection::vec(small(), 0..4),
            announced in proptest::collection::vec((small(), 0u8..=32), 0..4),
            reachable in proptest::collection::vec((small(), 0u8..=32), 0..4),
            looked_up in proptest::collection::vec(small(), 1..40),
        ) {
            let nets = |list: Vec<(IpAddr, u8)>| {
                list.into_iter().map(|(ip, len)| IpNet::new(ip, len).unwrap().trunc())
            };
            let own = OwnNetworks::new(addresses.clone(), nets(announced), nets(reachable));
            let fast = OwnAddresses::new(&own);
            for address in looked_up.into_iter().chain(addresses) {
                prop_assert_eq!(fast.accepts(address), own.accepts(address), "{}", address);
                prop_assert_eq!(fast.owns(address), own.owns(address), "{}", address);
            }
        }
    }
}
