//! Sealing and opening of probes, and what a worker answers by itself. The layout is in
//! `towline_types::frame`, the decisions are the core's ([`ProbeSession`]).
//!
//! Each pair of nodes has two keys for each version, one for each direction, derived with HKDF-SHA-256
//! (RFC 5869) from the X25519 secret of their WireGuard keys. Each key has a pair id, by which the
//! receiver finds it. So an observer cannot tell which nodes a probe belongs to, and only these two
//! nodes can create it.
//!
//! A datagram costs one lookup if its pair id is unknown, and one decryption if it is known. Only an
//! authentic probe takes the lock of its pair, counts towards a limit, or gets a place in the channel
//! of events. What is fresh and what is answered is decided then.
//!
//! The nonce is random: a counter would be used twice after a restored snapshot. So the stamp is in
//! the sealed body.

use std::collections::HashMap;
use std::fmt;
use std::hash::RandomState;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use ring::rand::{SecureRandom as _, SystemRandom};
use towline_core::path::Path;
use towline_core::peer_table::PeerTable;
use towline_core::probe_session::{Arrival, Decision, ProbeRefusal, ProbeSession, TokenSecret};
use towline_types::frame::{
    PROBE_BYTES, PROBE_HEADER_BYTES, PROBE_TAG_BYTES, Probe, ProbeHeader, ProbeVersion,
    STAMP_BYTES, Stamp,
};
use towline_types::id::WireguardKey;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::drops::DropReason;

/// Maximum size of the sealed part of a probe, in bytes: that of a datagram.
const OPEN_BYTES: usize = 65_535;

/// Keys and sessions of all pairs that this node is part of. Clones share their state, which outlives
/// a data plane that is started again.
#[derive(Clone)]
pub struct Probes(Arc<Shared>);

impl fmt::Debug for Probes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Probes({} peers)", self.0.pairs.load().by_peer.len())
    }
}

struct Shared {
    own: StaticSecret,
    own_key: WireguardKey,
    /// Boot epoch of this start.
    epoch: u64,
    started: Instant,
    tokens: TokenSecret<RandomState>,
    pairs: ArcSwap<Pairs>,
    /// Lock that is held while the next set of pairs is built.
    building: Mutex<()>,
}

/// Pairs with the peers of one table. Immutable: the next set replaces it.
#[derive(Default)]
struct Pairs {
    by_peer: HashMap<WireguardKey, Member>,
    /// Members by the pair id of each version that is accepted of them.
    by_id: HashMap<[u8; 8], (Arc<Pair>, ProbeVersion)>,
}

/// A peer and the version that it is sent.
#[derive(Clone)]
struct Member {
    pair: Arc<Pair>,
    version: ProbeVersion,
}

/// Keys of one pair of nodes, what was sent, and what was received.
struct Pair {
    peer: WireguardKey,
    v1: Keys,
    v2: Keys,
    /// Counter of the last probe that was sent.
    sent: AtomicU64,
    session: Mutex<ProbeSession>,
}

/// Keys of both directions.
struct Keys {
    to: Direction,
    from: Direction,
}

/// Key of one direction, with the pair id of its probes.
struct Direction {
    id: [u8; 8],
    key: LessSafeKey,
}

/// An authentic probe, as a worker handles it.
#[derive(Debug)]
pub(super) struct Received {
    /// Sender of the probe.
    pub(super) peer: WireguardKey,
    /// Message to deliver, or the reason why it is dropped.
    pub(super) message: Result<Probe, DropReason>,
    /// True if the sender proved lately that it receives what is sent on the path of the probe.
    pub(super) is_validated: bool,
    /// Sealed message to send back by the path of the probe.
    pub(super) answer: Option<Vec<u8>>,
}

impl Probes {
    /// Creates an empty set for the node with this WireGuard key, in this boot epoch.
    pub fn new(own: StaticSecret, epoch: u64) -> Self {
        let started = Instant::now();
        let own_key = WireguardKey(PublicKey::from(&own).to_bytes());
        Self(Arc::new(Shared {
            own,
            own_key,
            epoch,
            started,
            tokens: TokenSecret::new(RandomState::new(), started),
            pairs: ArcSwap::from_pointee(Pairs::default()),
            building: Mutex::new(()),
        }))
    }

    /// Replaces the set of peers. Those that stay keep their sessions. Static peers have no probes. A table
    /// with the same peers and versions, which is most of them, changes nothing.
    pub fn apply(&self, table: &PeerTable) {
        let shared = &self.0;
        let _building = shared.building.lock();
        let before = shared.pairs.load();
        let wanted = || table.peers.iter().filter(|(_, entry)| !entry.is_static);
        let is_same = wanted().count() == before.by_peer.len()
            && wanted().all(|(peer, entry)| {
                let known = before.by_peer.get(peer);
                known.is_some_and(|member| member.version == entry.probe_version)
            });
        if is_same {
            return;
        }
        let mut next = Pairs::default();
        for (peer, entry) in wanted() {
            let pair = match before.by_peer.get(peer) {
                Some(member) => member.pair.clone(),
                // A key of low order has no pair: no probe is sent to it or accepted from it.
                None => match Pair::new(shared, peer) {
                    Some(pair) => Arc::new(pair),
                    None => continue,
                },
            };
            next.by_id.insert(pair.v2.from.id, (pair.clone(), ProbeVersion::V2));
            if entry.probe_version == ProbeVersion::V1 {
                next.by_id.insert(pair.v1.from.id, (pair.clone(), ProbeVersion::V1));
            }
            next.by_peer.insert(*peer, Member { pair, version: entry.probe_version });
        }
        shared.pairs.store(Arc::new(next));
    }

    /// Returns the datagram of a probe to `peer`, padded to `size` bytes if it is shorter. `None` if
    /// the peer is not in the set.
    pub fn seal(&self, peer: &WireguardKey, probe: &Probe, size: usize) -> Option<Vec<u8>> {
        let pairs = self.0.pairs.load();
        let Member { pair, version } = pairs.by_peer.get(peer)?;
        pair.seal(*version, self.0.epoch, probe, size)
    }

    /// Opens a message that a controller carried. Returns its sender and its content. `None` if it is
    /// not authentic, or a replay.
    pub fn open_signal(&self, datagram: &[u8]) -> Option<(WireguardKey, Probe)> {
        let pairs = self.0.pairs.load();
        let mut buffer = Vec::new();
        let Opened { pair, stamp, message, .. } = pairs.open(datagram, &mut buffer).ok()?;
        if let Some(stamp) = stamp
            && !pair.session.lock().receive_signal(stamp)
        {
            return None;
        }
        Some((pair.peer, message))
    }

    /// Opens a datagram that came by `from`, and decides what to do with it. `endpoint` returns the
    /// path that carries a peer's traffic. `admit` returns whether the source address may have another
    /// answer that a replay may elicit; it is asked before that answer is sealed.
    pub(super) fn receive(
        &self,
        now: Instant,
        from: Path,
        datagram: &[u8],
        buffer: &mut Vec<u8>,
        endpoint: impl FnOnce(&WireguardKey) -> Option<Path>,
        admit: impl FnOnce() -> bool,
    ) -> Result<Received, DropReason> {
        let pairs = self.0.pairs.load();
        let Opened { pair, version, stamp, message } = pairs.open(datagram, buffer)?;
        let is_in_use = endpoint(&pair.peer).is_some_and(|endpoint| endpoint.is(&from));
        let arrival = Arrival { now, from, is_in_use, stamp };
        let decision = pair.session.lock().receive(&arrival, &self.0.tokens, &message);
        let (answer, mut message, is_validated) = match decision {
            Decision::Deliver { answer, is_validated } => (answer, Ok(message), is_validated),
            Decision::Drop { answer, reason } => (answer, Err(reason.into()), false),
        };
        let is_to_anybody = matches!(answer, Some(Probe::Challenge { .. } | Probe::Proof { .. }));
        let answer = if is_to_anybody && !admit() {
            // Without the proof the mesh has nothing to send again.
            message = message.and(Err(DropReason::ProbeLimited));
            None
        } else {
            answer.and_then(|answer| pair.seal(version, self.0.epoch, &answer, 0))
        };
        Ok(Received { peer: pair.peer, message, is_validated, answer })
    }
}

impl From<ProbeRefusal> for DropReason {
    fn from(refusal: ProbeRefusal) -> Self {
        match refusal {
            ProbeRefusal::Stale => Self::ProbeStale,
            ProbeRefusal::Unvalidated => Self::ProbeUnvalidated,
            ProbeRefusal::Limited => Self::ProbeLimited,
        }
    }
}

/// An authentic probe.
struct Opened<'a> {
    /// The two nodes.
    pair: &'a Pair,
    version: ProbeVersion,
    /// What tells whether it is fresh. `None` in version 1.
    stamp: Option<Stamp>,
    message: Probe,
}

impl Pairs {
    /// Decrypts a datagram and parses the probe in it.
    fn open(&self, datagram: &[u8], buffer: &mut Vec<u8>) -> Result<Opened<'_>, DropReason> {
        let (header, sealed) = ProbeHeader::decode(datagram).ok_or(DropReason::ProbeUnknown)?;
        let known = self.by_id.get(&header.pair).filter(|(_, version)| *version == header.version);
        let Some((pair, version)) = known.filter(|_| sealed.len() <= OPEN_BYTES) else {
            return Err(DropReason::ProbeUnknown);
        };
        buffer.clear();
        buffer.extend_from_slice(sealed);
        let key = &pair.keys(*version).from.key;
        let nonce = Nonce::assume_unique_for_key(header.nonce);
        let body = key
            .open_in_place(nonce, Aad::from(header.encode()), buffer)
            .map_err(|_| DropReason::ProbeNotAuthentic)?;
        let (stamp, body) = match version {
            ProbeVersion::V1 => (None, &*body),
            ProbeVersion::V2 => {
                let (stamp, rest) = Stamp::decode(body).ok_or(DropReason::ProbeNotAuthentic)?;
                (Some(stamp), rest)
            }
        };
        let message = Probe::decode(body).ok_or(DropReason::ProbeNotAuthentic)?;
        Ok(Opened { pair, version: *version, stamp, message })
    }
}

impl Pair {
    fn new(shared: &Shared, peer: &WireguardKey) -> Option<Self> {
        let secret = shared.own.diffie_hellman(&PublicKey::from(peer.0));
        if !secret.was_contributory() {
            return None;
        }
        let prk = Salt::new(HKDF_SHA256, &[]).extract(secret.as_bytes());
        let keys = |version| {
            Some(Keys {
                to: Direction::new(&prk, version, &shared.own_key, peer)?,
                from: Direction::new(&prk, version, peer, &shared.own_key)?,
            })
        };
        // A peer that leaves the table and comes back goes on above what it was sent before: fewer
        // probes are sent than microseconds pass.
        let sent = u64::try_from(shared.started.elapsed().as_micros()).unwrap_or_default();
        Some(Self {
            peer: *peer,
            v1: keys(ProbeVersion::V1)?,
            v2: keys(ProbeVersion::V2)?,
            sent: AtomicU64::new(sent),
            session: Mutex::new(ProbeSession::new(*peer)),
        })
    }

    fn keys(&self, version: ProbeVersion) -> &Keys {
        match version {
            ProbeVersion::V1 => &self.v1,
            ProbeVersion::V2 => &self.v2,
        }
    }

    fn seal(
        &self,
        version: ProbeVersion,
        epoch: u64,
        probe: &Probe,
        size: usize,
    ) -> Option<Vec<u8>> {
        let direction = &self.keys(version).to;
        let mut nonce = [0; 12];
        SystemRandom::new().fill(&mut nonce).ok()?;
        let header = ProbeHeader { version, pair: direction.id, nonce }.encode();
        let mut datagram = Vec::with_capacity((PROBE_BYTES + STAMP_BYTES).max(size));
        datagram.extend_from_slice(&header);
        match version {
            ProbeVersion::V1 => {}
            ProbeVersion::V2 => {
                let counter = self.sent.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
                datagram.extend_from_slice(&Stamp { epoch, counter }.encode());
            }
        }
        datagram.extend_from_slice(&probe.encode());
        datagram.resize(datagram.len().max(size.saturating_sub(PROBE_TAG_BYTES)), 0);
        let tag = direction
            .key
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(header),
                datagram.get_mut(PROBE_HEADER_BYTES..)?,
            )
            .ok()?;
        datagram.extend_from_slice(tag.as_ref());
        Some(datagram)
    }
}

/// Type of the HKDF output: 32 bytes of key, then 8 bytes of pair id.
struct KeyAndId;

impl KeyType for KeyAndId {
    fn len(&self) -> usize {
        40
    }
}

impl Direction {
    fn new(
        prk: &Prk,
        version: ProbeVersion,
        sender: &WireguardKey,
        receiver: &WireguardKey,
    ) -> Option<Self> {
        // The prefix separates these keys from others.
        let prefix: &[u8] = match version {
            ProbeVersion::V1 => b"towline probe v1",
            ProbeVersion::V2 => b"towline probe v2",
        };
        let info = [prefix, sender.as_bytes(), receiver.as_bytes()];
        let mut bytes = Zeroizing::new([0; 40]);
        prk.expand(&info, KeyAndId).ok()?.fill(bytes.as_mut()).ok()?;
        let (key, id) = bytes.split_first_chunk::<32>()?;
        Some(Self {
            id: id.try_into().ok()?,
            key: LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).ok()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;
    use std::time::Duration;
    use towline_core::peer_table::PeerEntry;
    use towline_types::frame::STAMPED_PROBE_BYTES;

    const PING: Probe = Probe::Ping { transaction: 7 };

    fn entry(probe_version: ProbeVersion) -> PeerEntry {
        PeerEntry { probe_version, ..PeerEntry::default() }
    }

    fn node(byte: u8, epoch: u64) -> Probes {
        Probes::new(StaticSecret::from([byte; 32]), epoch)
    }

    fn key(probes: &Probes) -> WireguardKey {
        probes.0.own_key
    }

    /// Has `probes` know `peer` at this version.
    fn know(probes: &Probes, peer: &Probes, version: ProbeVersion) {
        let peers = [(key(peer), entry(version))].into();
        probes.apply(&PeerTable { peers, ..PeerTable::default() });
    }

    /// Two nodes that know each other at version 2.
    fn pair() -> [Probes; 2] {
        let [a, b] = [node(1, 5), node(2, 9)];
        know(&a, &b, ProbeVersion::V2);
        know(&b, &a, ProbeVersion::V2);
        [a, b]
    }

    fn at(last: u8) -> Path {
        Path::direct(SocketAddr::from(([192, 0, 2, last], 51_830)))
    }

    fn receive(probes: &Probes, from: Path, datagram: &[u8]) -> Result<Received, DropReason> {
        probes.receive(Instant::now(), from, datagram, &mut Vec::new(), |_| None, || true)
    }

    fn delivered(probes: &Probes, from: Path, datagram: &[u8]) -> Result<Probe, DropReason> {
        receive(probes, from, datagram).and_then(|received| received.message)
    }

    /// Carries answers between the two, the first datagram being from `a`, until none comes.
    fn converse([a, b]: [&Probes; 2], first: Vec<u8>) -> Vec<Probe> {
        let (mut datagram, mut to_b, mut messages) = (Some(first), true, Vec::new());
        while let Some(bytes) = datagram.take() {
            let (receiver, from) = if to_b { (b, at(1)) } else { (a, at(2)) };
            let received = receive(receiver, from, &bytes).unwrap();
            messages.extend(received.message);
            let answer = received.answer;
            assert!(answer.as_ref().is_none_or(|answer| answer.len() <= bytes.len()));
            // The core answers no challenge and no pong.
            datagram = answer;
            to_b = !to_b;
        }
        messages
    }

    #[test]
    fn a_ping_is_answered_after_a_proof_and_nobody_else_opens_it() {
        let [a, b] = &pair();
        let ping = |size| a.seal(&key(b), &PING, size).unwrap();
        assert_eq!(ping(0).len(), STAMPED_PROBE_BYTES);
        assert_eq!(ping(1_420).len(), 1_420);
        // The challenge goes to `a`, its proof to `b`.
        let messages = converse([a, b], ping(0));
        assert!(matches!(messages[..], [Probe::Challenge { .. }, Probe::Proof { .. }]));
        let pinged = receive(b, at(1), &ping(1_420)).unwrap();
        assert_eq!(pinged.message, Ok(PING));
        let pong = pinged.answer.unwrap();
        // The pong is challenged in turn, since `b` has proven nothing to `a` yet.
        assert_eq!(delivered(a, at(2), &pong), Err(DropReason::ProbeStale));
        // The sender must not open its own probe, which an attacker might reflect.
        assert_eq!(delivered(a, at(2), &ping(0)), Err(DropReason::ProbeUnknown));
        assert_eq!(delivered(&node(3, 1), at(1), &ping(0)), Err(DropReason::ProbeUnknown));
    }

    #[test]
    fn an_answer_that_a_replay_may_elicit_is_sealed_only_if_it_is_admitted() {
        let [a, b] = &pair();
        let sent = |own: &Probes, peer: &Probes| {
            own.0.pairs.load().by_peer[&key(peer)].pair.sent.load(Ordering::Relaxed)
        };
        let refused = |own: &Probes, from, datagram: &[u8]| {
            let (now, mut buffer) = (Instant::now(), Vec::new());
            let received = own.receive(now, from, datagram, &mut buffer, |_| None, || false);
            let Received { message, answer, .. } = received.unwrap();
            (message, answer)
        };
        let ping = a.seal(&key(b), &PING, 0).unwrap();
        let before = sent(b, a);
        assert_eq!(refused(b, at(1), &ping), (Err(DropReason::ProbeStale), None));
        assert_eq!(sent(b, a), before);
        let challenge = receive(b, at(1), &ping).unwrap().answer.unwrap();
        let before = sent(a, b);
        assert_eq!(refused(a, at(2), &challenge), (Err(DropReason::ProbeLimited), None));
        assert_eq!(sent(a, b), before);
        // A pong is not limited by its address: only a fresh ping elicits it.
        converse([a, b], a.seal(&key(b), &PING, 0).unwrap());
        let (message, pong) = refused(b, at(1), &a.seal(&key(b), &PING, 0).unwrap());
        assert_eq!((message, pong.is_some()), (Ok(PING), true));
    }

    #[test]
    fn a_changed_probe_is_refused_whatever_bit_changed() {
        let [a, b] = &pair();
        let datagram = a.seal(&key(b), &PING, 0).unwrap();
        for byte in 0..datagram.len() {
            let mut changed = datagram.clone();
            changed[byte] ^= 1;
            assert!(receive(b, at(1), &changed).is_err(), "byte {byte}");
        }
        assert!(receive(b, at(1), &datagram[..datagram.len() - 1]).is_err());
        assert!(b.open_signal(&datagram).is_some() && a.open_signal(&datagram).is_none());
    }

    #[test]
    fn version_1_is_taken_from_peers_whose_record_names_no_other_and_from_no_other() {
        let [a, b] = &pair();
        know(a, b, ProbeVersion::V1);
        let old = a.seal(&key(b), &PING, 0).unwrap();
        assert_eq!(old.len(), PROBE_BYTES);
        assert_eq!(delivered(b, at(1), &old), Err(DropReason::ProbeUnknown));
        know(b, a, ProbeVersion::V1);
        assert_eq!(delivered(b, at(1), &old), Ok(PING));
        let answered = receive(b, at(1), &old).unwrap().answer.unwrap();
        assert_eq!(answered.len(), PROBE_BYTES);
        assert!(matches!(delivered(a, at(2), &answered), Ok(Probe::Pong { .. })));
        // Its next record may name version 2, and what it seals then is taken before that record comes.
        know(a, b, ProbeVersion::V2);
        let new = a.seal(&key(b), &PING, 0).unwrap();
        assert_eq!(delivered(b, at(1), &new), Err(DropReason::ProbeStale));
        know(b, a, ProbeVersion::V2);
        assert_eq!(delivered(b, at(1), &old), Err(DropReason::ProbeUnknown));
    }

    #[test]
    fn a_session_outlives_a_table_and_ends_with_its_peer() {
        let [a, b] = &pair();
        converse([a, b], a.seal(&key(b), &PING, 0).unwrap());
        know(b, a, ProbeVersion::V2);
        let recorded = a.seal(&key(b), &PING, 0).unwrap();
        assert_eq!(delivered(b, at(1), &recorded), Ok(PING));
        assert_eq!(delivered(b, at(66), &recorded), Err(DropReason::ProbeStale));
        b.apply(&PeerTable::default());
        assert_eq!(delivered(b, at(1), &recorded), Err(DropReason::ProbeUnknown));
        assert!(b.seal(&key(a), &PING, 0).is_none());
    }

    #[test]
    fn a_table_with_the_same_peers_and_versions_leaves_the_pairs_as_they_are() {
        let [a, b] = &pair();
        let pairs = || a.0.pairs.load_full();
        let before = pairs();
        let apply = |entries: Vec<(WireguardKey, PeerEntry)>| {
            a.apply(&PeerTable { peers: entries.into_iter().collect(), ..PeerTable::default() });
        };
        let moved = PeerEntry { endpoint: Some(at(7)), ..entry(ProbeVersion::V2) };
        let office = PeerEntry { is_static: true, ..entry(ProbeVersion::V2) };
        apply(vec![(key(b), moved.clone()), (WireguardKey([9; 32]), office.clone())]);
        assert!(Arc::ptr_eq(&before, &pairs()));
        // Another peer, another version, or none of them, are another set.
        for entries in [
            vec![(key(&node(3, 1)), moved.clone())],
            vec![(key(b), entry(ProbeVersion::V1))],
            vec![(key(b), office)],
        ] {
            let before = pairs();
            let expected: Vec<_> = entries
                .iter()
                .filter(|(_, entry)| !entry.is_static)
                .map(|(key, entry)| (*key, entry.probe_version))
                .collect();
            apply(entries);
            assert!(!Arc::ptr_eq(&before, &pairs()));
            let members = pairs();
            let members = members.by_peer.iter().map(|(key, member)| (*key, member.version));
            assert_eq!(members.collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn static_peers_have_no_probes() {
        let [a, b] = &pair();
        let probe = a.seal(&key(b), &PING, 0).unwrap();
        let peers = [(key(a), PeerEntry { is_static: true, ..entry(ProbeVersion::V2) })].into();
        b.apply(&PeerTable { peers, ..PeerTable::default() });
        assert_eq!(delivered(b, at(1), &probe), Err(DropReason::ProbeUnknown));
    }

    #[test]
    fn a_peer_that_comes_back_into_the_table_is_sent_higher_counters() {
        let [a, b] = &pair();
        let first = a.0.pairs.load().by_peer[&key(b)].pair.sent.load(Ordering::Relaxed);
        a.apply(&PeerTable::default());
        while a.0.started.elapsed() < Duration::from_micros(first + 1) {
            std::thread::yield_now();
        }
        know(a, b, ProbeVersion::V2);
        let again = a.0.pairs.load().by_peer[&key(b)].pair.sent.load(Ordering::Relaxed);
        assert!(again > first);
    }
}
