//! Sealing and opening of probes. The layout is in `towline_proto::frame`.
//!
//! Each pair of nodes has two keys, one for each direction, derived with HKDF-SHA-256 (RFC 5869)
//! from the X25519 secret of their WireGuard keys. Each key has a pair id, by which the receiver
//! finds it. So an observer cannot tell which nodes a probe belongs to, and only these two nodes
//! can create it.

use std::collections::HashMap;
use std::fmt;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use ring::rand::{SecureRandom as _, SystemRandom};
use towline_proto::frame::{
    PROBE_BODY_BYTES, PROBE_BYTES, PROBE_HEADER_BYTES, PROBE_TAG_BYTES, Probe, ProbeHeader,
};
use towline_proto::id::WireguardKey;

use crate::keys::Wireguard;

/// Prefix of the HKDF info, which separates these keys from others.
const INFO: &[u8] = b"towline probe v1";
/// Maximum size of the sealed part of a probe, in bytes: that of a datagram.
const OPEN_BYTES: usize = 65_535;

/// Keys of all pairs that this node is part of.
#[derive(Default)]
pub struct ProbeKeys {
    peers: HashMap<WireguardKey, Pair>,
    by_id: HashMap<[u8; 8], WireguardKey>,
    scratch: Vec<u8>,
    refused: u64,
}

impl fmt::Debug for ProbeKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProbeKeys({} peers)", self.peers.len())
    }
}

/// Keys of one pair of nodes, for both directions.
struct Pair {
    to: Direction,
    from: Direction,
}

/// Key of one direction, with the pair id of its probes.
struct Direction {
    id: [u8; 8],
    key: LessSafeKey,
}

impl ProbeKeys {
    /// Replaces the set of peers: new peers get keys, and the keys of other peers are removed.
    pub fn follow<'a>(&mut self, own: &Wireguard, peers: impl Iterator<Item = &'a WireguardKey>) {
        let wanted: std::collections::HashSet<&WireguardKey> = peers.collect();
        self.peers.retain(|peer, pair| {
            let stays = wanted.contains(peer);
            if !stays {
                self.by_id.remove(&pair.from.id);
            }
            stays
        });
        for peer in wanted {
            if self.peers.contains_key(peer) {
                continue;
            }
            // A key of low order has no pair: no probe is sent to it or accepted from it.
            let Some(pair) = Pair::new(own, peer) else { continue };
            self.by_id.insert(pair.from.id, *peer);
            self.peers.insert(*peer, pair);
        }
    }

    /// Returns the datagram of a probe to `peer`, padded to `size` bytes if it is shorter. `None`
    /// if the peer is not in the set.
    pub fn seal(&self, peer: &WireguardKey, probe: &Probe, size: usize) -> Option<Vec<u8>> {
        let direction = &self.peers.get(peer)?.to;
        let mut nonce = [0; 12];
        SystemRandom::new().fill(&mut nonce).ok()?;
        let header = ProbeHeader { pair: direction.id, nonce }.encode();
        let mut datagram = Vec::with_capacity(PROBE_BYTES.max(size));
        datagram.extend_from_slice(&header);
        datagram.extend_from_slice(&probe.encode());
        datagram.resize(datagram.len().max(size.saturating_sub(PROBE_TAG_BYTES)), 0);
        let tag = direction
            .key
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(header),
                &mut datagram[PROBE_HEADER_BYTES..],
            )
            .ok()?;
        datagram.extend_from_slice(tag.as_ref());
        Some(datagram)
    }

    /// Opens the probe in `datagram`. Returns its sender and its content. Returns `None` for a
    /// datagram that is not authentic, and counts it.
    pub fn open(&mut self, datagram: &[u8]) -> Option<(WireguardKey, Probe)> {
        let opened = self.authentic(datagram);
        self.refused += u64::from(opened.is_none());
        opened
    }

    /// Returns the number of datagrams that were not authentic.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Decrypts a datagram and parses the probe in it.
    fn authentic(&mut self, datagram: &[u8]) -> Option<(WireguardKey, Probe)> {
        let (header, sealed) = ProbeHeader::decode(datagram)?;
        if sealed.len() > OPEN_BYTES || sealed.len() < PROBE_BODY_BYTES + PROBE_TAG_BYTES {
            return None;
        }
        let peer = *self.by_id.get(&header.pair)?;
        let key = &self.peers.get(&peer)?.from.key;
        self.scratch.clear();
        self.scratch.extend_from_slice(sealed);
        let body = key
            .open_in_place(
                Nonce::assume_unique_for_key(header.nonce),
                Aad::from(header.encode()),
                &mut self.scratch,
            )
            .ok()?;
        Some((peer, Probe::decode(body)?))
    }
}

impl Pair {
    fn new(own: &Wireguard, peer: &WireguardKey) -> Option<Self> {
        let shared = own.shared(peer)?;
        let prk = Salt::new(HKDF_SHA256, &[]).extract(shared.as_slice());
        let own = own.public();
        Some(Self {
            to: Direction::new(&prk, &own, peer)?,
            from: Direction::new(&prk, peer, &own)?,
        })
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
    fn new(prk: &Prk, sender: &WireguardKey, receiver: &WireguardKey) -> Option<Self> {
        let info = [INFO, sender.as_bytes(), receiver.as_bytes()];
        let mut bytes = zeroize::Zeroizing::new([0; 40]);
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

    fn pair() -> (Wireguard, ProbeKeys, Wireguard, ProbeKeys) {
        let (a, b) = (Wireguard::generate().unwrap(), Wireguard::generate().unwrap());
        let (mut a_keys, mut b_keys) = (ProbeKeys::default(), ProbeKeys::default());
        a_keys.follow(&a, [b.public()].iter());
        b_keys.follow(&b, [a.public()].iter());
        (a, a_keys, b, b_keys)
    }

    #[test]
    fn a_probe_is_opened_by_its_peer_and_by_nobody_else() {
        let (a, mut a_keys, b, mut b_keys) = pair();
        let ping = Probe::Ping { transaction: 7 };
        let padded = a_keys.seal(&b.public(), &ping, 1420).unwrap();
        assert_eq!(padded.len(), 1420);
        assert_eq!(b_keys.open(&padded), Some((a.public(), ping.clone())));
        let datagram = a_keys.seal(&b.public(), &ping, 0).unwrap();
        assert_eq!(datagram.len(), PROBE_BYTES);
        assert_eq!(b_keys.open(&datagram), Some((a.public(), ping)));
        // The sender must not open its own probe, which an attacker might reflect.
        assert_eq!(a_keys.open(&datagram), None);
        let (_, _, _, mut stranger) = pair();
        assert_eq!(stranger.open(&datagram), None);
    }

    #[test]
    fn a_changed_probe_is_refused_whatever_bit_changed() {
        let (_, a_keys, b, mut b_keys) = pair();
        let datagram = a_keys.seal(&b.public(), &Probe::Ping { transaction: 7 }, 0).unwrap();
        for byte in 0..datagram.len() {
            let mut changed = datagram.clone();
            changed[byte] ^= 1;
            assert_eq!(b_keys.open(&changed), None, "byte {byte}");
        }
        assert_eq!(b_keys.open(&datagram[..datagram.len() - 1]), None);
        assert_eq!(b_keys.refused(), datagram.len() as u64 + 1);
    }

    #[test]
    fn a_peer_that_is_gone_is_not_believed_any_more() {
        let (_, a_keys, b, mut b_keys) = pair();
        let datagram = a_keys.seal(&b.public(), &Probe::Ping { transaction: 7 }, 0).unwrap();
        b_keys.follow(&b, std::iter::empty());
        assert_eq!(b_keys.open(&datagram), None);
    }
}
