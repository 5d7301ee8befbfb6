//! Frames that share the UDP port with WireGuard.
//!
//! Three kinds of datagrams share the port. Each datagram (each GRO segment) is demultiplexed by
//! its first bytes: WireGuard's first four bytes are a little-endian 1 to 4; STUN (RFC 8489
//! section 5) starts with two zero bits and has its magic cookie at offset 4; Towline's own frames
//! start with a byte from 0x41 to 0x7f.
//!
//! # Probe
//!
//! ```text
//!  0   1  0x50
//!  1   1  version, 1 or 2
//!  2   2  zero
//!  4   8  pair id: identifies the sender and the version, known only to the two peers (see below)
//! 12  12  nonce, random
//! 24  40+ sealed body, then the tag of 16 bytes
//! ```
//!
//! Body: in version 2 the [stamp](Stamp) (`epoch` 8, `counter` 8); then in both versions `kind` 1,
//! zero 7, `transaction` 8, then the fields of the kind, then zero padding to at least
//! [`PROBE_BODY_BYTES`] without the stamp. No response is longer than its request, so nothing is
//! amplified.
//!
//! | kind | message | fields after the transaction |
//! |---|---|---|
//! | 1 | [ping](Probe::Ping); padded to measure the path MTU | |
//! | 2 | [pong](Probe::Pong) | address as IPv6 16, port 2 |
//! | 3, 4 | [register](Probe::Register), [registered](Probe::Registered) | seconds 4 |
//! | 5, 6 | [open](Probe::Open), [opened](Probe::Opened) | peer's key 32; channel 8 |
//! | 7 | [refused](Probe::Refused) | |
//! | 8 | [incoming](Probe::Incoming); transaction 0 | channel 8, peer's key 32 |
//! | 9 | [call me](Probe::CallMe); its number as transaction | boot epoch 8, count 1, candidates of kind 1, address 16, port 2 |
//! | 10, 11 | [challenge](Probe::Challenge), [proof](Probe::Proof); version 2 only | |
//!
//! # Replay protection
//!
//! The receiver of version 2 keeps the epoch of each sender and a window of the counters that it
//! saw in it. A probe of another epoch, and one whose counter was seen or is too old, is answered
//! by a challenge. The sender returns its token in a proof, whose stamp the receiver then takes as
//! the current one, whether it is higher or lower:
//!
//! ```text
//!  sender                                    receiver
//!    │ ping, epoch 7, counter 1                 │  knows nothing, or another epoch
//!    │─────────────────────────────────────────►│
//!    │                        challenge, token  │
//!    │◄─────────────────────────────────────────│
//!    │ proof, token, epoch 7, counter 2         │
//!    │─────────────────────────────────────────►│  epoch 7, from counter 2 on
//!    │ ping, epoch 7, counter 3                 │
//!    │─────────────────────────────────────────►│
//!    │                                    pong  │
//!    │◄─────────────────────────────────────────│
//! ```
//!
//! So a node whose clock, disk or whole machine went back to an earlier state is in contact again
//! after two round trips. A token is valid for the path of the challenge, for some seconds, once.
//! So a proof also shows that its sender receives what is sent to its address. A relay takes
//! requests from such addresses only. Challenges and proofs themselves are accepted without a known
//! epoch: both nodes may have restarted.
//!
//! Which version a node has is in its signed record. A node that has version 2 is sent version 2,
//! and version 1 of it is refused.
//!
//! A [call-me message](Probe::CallMe) is also sent through the controller, as the same sealed
//! bytes. The controller cannot read it.
//!
//! # Relayed
//!
//! ```text
//!  0   1  0x52
//!  1   1  version, 1
//!  2   2  zero
//!  4   8  channel
//! 12      the inner datagram: WireGuard, or a probe
//! ```
//!
//! The relay forwards it unchanged to the other end of the channel; both directions use the same
//! channel number.
//!
//! The key and the pair id of each direction are derived with HKDF-SHA-256 from the X25519 shared
//! secret of the two nodes' WireGuard keys. Probes are sealed with ChaCha20-Poly1305 (RFC 8439),
//! with the header as additional data. This module only encodes and decodes bytes; the agent seals
//! and opens.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::cursor::Cursor;
use crate::id::WireguardKey;
use crate::limits;
use crate::node::{Candidate, CandidateKind};

pub use crate::probe_version::ProbeVersion;

/// Kind of a datagram by its first bytes. The parser of that kind must still confirm it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatagramKind {
    /// WireGuard message of type 1 to 4.
    WireGuard,
    /// STUN message.
    Stun,
    /// [Probe](self#probe).
    Probe,
    /// Datagram inside of a [relay's channel](self#relayed).
    Relayed,
    /// Any other datagram.
    Unknown,
}

/// Magic cookie of STUN (RFC 8489 section 5).
pub const STUN_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

const PROBE_TYPE: u8 = 0x50;
/// Bytes in the header before the sealed body.
pub const PROBE_HEADER_BYTES: usize = 24;
/// Bytes in the shortest body, without a stamp.
pub const PROBE_BODY_BYTES: usize = 40;
/// Bytes in the stamp of version 2.
pub const STAMP_BYTES: usize = 16;
/// Bytes in the authentication tag after the body.
pub const PROBE_TAG_BYTES: usize = 16;
/// Bytes in the shortest probe of version 1.
pub const PROBE_BYTES: usize = PROBE_HEADER_BYTES + PROBE_BODY_BYTES + PROBE_TAG_BYTES;
/// Bytes in the shortest probe of version 2.
pub const STAMPED_PROBE_BYTES: usize = PROBE_BYTES + STAMP_BYTES;

const RELAYED_TYPE: u8 = 0x52;
const RELAYED_VERSION: u8 = 1;
/// Bytes in the header before a relayed datagram.
pub const RELAYED_HEADER_BYTES: usize = 12;

impl DatagramKind {
    /// Returns the kind of a datagram. It reads the first bytes only.
    pub fn of(datagram: &[u8]) -> Self {
        match datagram {
            [1..=4, 0, 0, 0, ..] => Self::WireGuard,
            [PROBE_TYPE, ..] => Self::Probe,
            [RELAYED_TYPE, ..] => Self::Relayed,
            [0..=0x3f, _, _, _, cookie @ ..] if cookie.starts_with(&STUN_COOKIE) => Self::Stun,
            _ => Self::Unknown,
        }
    }
}

/// Returns the number of bytes in the shortest body of a version, with its stamp.
fn body_bytes(version: ProbeVersion) -> usize {
    match version {
        ProbeVersion::V1 => PROBE_BODY_BYTES,
        ProbeVersion::V2 => STAMP_BYTES + PROBE_BODY_BYTES,
    }
}

/// Position of a probe among all probes of one sender to one receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// Boot epoch of the sender: the number of its agent's start.
    pub epoch: u64,
    /// Number of the probe. It grows with each probe of one epoch to one receiver.
    pub counter: u64,
}

impl Stamp {
    /// Returns the bytes of the stamp.
    pub fn encode(&self) -> [u8; STAMP_BYTES] {
        let mut bytes = [0; STAMP_BYTES];
        bytes[..8].copy_from_slice(&self.epoch.to_be_bytes());
        bytes[8..].copy_from_slice(&self.counter.to_be_bytes());
        bytes
    }

    /// Splits a decrypted body of version 2 into its stamp and the rest.
    pub fn decode(body: &[u8]) -> Option<(Self, &[u8])> {
        let (epoch, rest) = body.split_first_chunk::<8>()?;
        let (counter, rest) = rest.split_first_chunk::<8>()?;
        let (epoch, counter) = (u64::from_be_bytes(*epoch), u64::from_be_bytes(*counter));
        Some((Self { epoch, counter }, rest))
    }
}

/// Header of a probe, which is not encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeHeader {
    /// Version of the probe.
    pub version: ProbeVersion,
    /// Pair id, which identifies the sender.
    pub pair: [u8; 8],
    /// Random nonce. It must never be used twice with one key.
    pub nonce: [u8; 12],
}

impl ProbeHeader {
    /// Returns the bytes of the header, which are also the additional data of the AEAD.
    pub fn encode(&self) -> [u8; PROBE_HEADER_BYTES] {
        let mut bytes = [0; PROBE_HEADER_BYTES];
        bytes[0] = PROBE_TYPE;
        bytes[1] = self.version.byte();
        bytes[4..12].copy_from_slice(&self.pair);
        bytes[12..24].copy_from_slice(&self.nonce);
        bytes
    }

    /// Splits a probe into its header and its sealed body. Returns `None` for anything but a probe
    /// of a known version.
    pub fn decode(datagram: &[u8]) -> Option<(Self, &[u8])> {
        let (header, sealed) = datagram.split_first_chunk::<PROBE_HEADER_BYTES>()?;
        let version = match header[..4] {
            [PROBE_TYPE, 1, 0, 0] => ProbeVersion::V1,
            [PROBE_TYPE, 2, 0, 0] => ProbeVersion::V2,
            _ => return None,
        };
        if sealed.len() < body_bytes(version) + PROBE_TAG_BYTES {
            return None;
        }
        let mut pair = [0; 8];
        pair.copy_from_slice(&header[4..12]);
        let mut nonce = [0; 12];
        nonce.copy_from_slice(&header[12..24]);
        Some((Self { version, pair, nonce }, sealed))
    }
}

/// Returns the header of a datagram in a relay's channel.
pub fn relayed_header(channel: u64) -> [u8; RELAYED_HEADER_BYTES] {
    let mut bytes = [0; RELAYED_HEADER_BYTES];
    bytes[..2].copy_from_slice(&[RELAYED_TYPE, RELAYED_VERSION]);
    bytes[4..].copy_from_slice(&channel.to_be_bytes());
    bytes
}

/// Splits a relayed datagram into its channel and the inner datagram. Returns `None` for anything
/// else.
pub fn relayed(datagram: &[u8]) -> Option<(u64, &[u8])> {
    let (header, inner) = datagram.split_first_chunk::<RELAYED_HEADER_BYTES>()?;
    let channel = u64::from_be_bytes(*header[4..].first_chunk()?);
    (header[..4] == [RELAYED_TYPE, RELAYED_VERSION, 0, 0]).then_some((channel, inner))
}

/// Decrypted message of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// Requests a [`Probe::Pong`].
    Ping {
        /// Transaction id, random, so that it cannot be guessed.
        transaction: u64,
    },
    /// Answers a ping. It is sent to the source address of the ping.
    Pong {
        /// Transaction id of the ping.
        transaction: u64,
        /// Source address of the ping, as its receiver saw it.
        observed: SocketAddr,
    },
    /// Request to a relay: registers the source address of this probe as the sender's address.
    Register {
        /// Transaction id, random.
        transaction: u64,
    },
    /// Response of a relay to [`Probe::Register`].
    Registered {
        /// Transaction id of the request.
        transaction: u64,
        /// Time for which the registration is valid.
        lifetime: Duration,
    },
    /// Request to a relay: opens a channel to another node.
    Open {
        /// Transaction id, random.
        transaction: u64,
        /// Key of the other node.
        peer: WireguardKey,
    },
    /// Response of a relay to [`Probe::Open`].
    Opened {
        /// Transaction id of the request.
        transaction: u64,
        /// Number of the channel.
        channel: u64,
    },
    /// Response of a relay that refuses a request for now.
    Refused {
        /// Transaction id of the request.
        transaction: u64,
    },
    /// Message of a relay: another node opened a channel to the receiver.
    Incoming {
        /// Number of the channel.
        channel: u64,
        /// Key of the other node.
        peer: WireguardKey,
    },
    /// Request to connect to the sender's candidates now. The sender connects to the receiver's
    /// candidates at the same time (hole punching).
    CallMe {
        /// Boot epoch of the sender.
        boot_epoch: u64,
        /// Number of the request. It grows with each request of one boot epoch.
        number: u64,
        /// Candidates of the sender; at most [`limits::CANDIDATES`].
        candidates: Vec<Candidate>,
    },
    /// Answers a probe of version 2 that may be a replay, or whose address is not validated: asks
    /// for a [`Probe::Proof`].
    Challenge {
        /// Token for the proof, which only the receiver can read.
        token: u64,
    },
    /// Answers a challenge: shows that the sender made this probe now, and that it receives what is
    /// sent to its address.
    Proof {
        /// The token that the challenge contained.
        token: u64,
    },
}

impl Probe {
    /// Returns the body, padded to [`PROBE_BODY_BYTES`] if it is shorter.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, transaction) = match self {
            Self::Ping { transaction } => (1, *transaction),
            Self::Pong { transaction, .. } => (2, *transaction),
            Self::Register { transaction } => (3, *transaction),
            Self::Registered { transaction, .. } => (4, *transaction),
            Self::Open { transaction, .. } => (5, *transaction),
            Self::Opened { transaction, .. } => (6, *transaction),
            Self::Refused { transaction } => (7, *transaction),
            Self::Incoming { .. } => (8, 0),
            Self::CallMe { number, .. } => (9, *number),
            Self::Challenge { token } => (10, *token),
            Self::Proof { token } => (11, *token),
        };
        let mut bytes = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend_from_slice(&transaction.to_be_bytes());
        match self {
            Self::Ping { .. }
            | Self::Register { .. }
            | Self::Refused { .. }
            | Self::Challenge { .. }
            | Self::Proof { .. } => {}
            Self::Pong { observed, .. } => put_address(&mut bytes, *observed),
            Self::Registered { lifetime, .. } => {
                let seconds = u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX);
                bytes.extend_from_slice(&seconds.to_be_bytes());
            }
            Self::Open { peer, .. } => bytes.extend_from_slice(peer.as_bytes()),
            Self::Opened { channel, .. } => bytes.extend_from_slice(&channel.to_be_bytes()),
            Self::Incoming { channel, peer } => {
                bytes.extend_from_slice(&channel.to_be_bytes());
                bytes.extend_from_slice(peer.as_bytes());
            }
            Self::CallMe { boot_epoch, candidates, .. } => {
                let count = candidates.len().min(limits::CANDIDATES);
                bytes.extend_from_slice(&boot_epoch.to_be_bytes());
                bytes.push(count as u8);
                for candidate in candidates.iter().take(count) {
                    bytes.push(candidate_code(candidate.kind()));
                    put_address(&mut bytes, candidate.address());
                }
            }
        }
        bytes.resize(bytes.len().max(PROBE_BODY_BYTES), 0);
        bytes
    }

    /// Parses a decrypted body. Padding is ignored.
    pub fn decode(body: &[u8]) -> Option<Self> {
        let ([kind, _, _, _, _, _, _, _], rest) = Cursor::new(body)?.chunk()?;
        let (transaction, rest) = take_word(rest)?;
        Some(match kind {
            1 => Self::Ping { transaction },
            2 => Self::Pong { transaction, observed: take_address(rest)?.0 },
            3 => Self::Register { transaction },
            4 => {
                let seconds = u32::from_be_bytes(*rest?.chunk()?.0);
                Self::Registered { transaction, lifetime: Duration::from_secs(seconds.into()) }
            }
            5 => Self::Open { transaction, peer: WireguardKey(*rest?.chunk()?.0) },
            6 => Self::Opened { transaction, channel: take_word(rest)?.0 },
            7 => Self::Refused { transaction },
            8 => {
                let (channel, rest) = take_word(rest)?;
                Self::Incoming { channel, peer: WireguardKey(*rest?.chunk()?.0) }
            }
            9 => {
                let (boot_epoch, rest) = take_word(rest)?;
                let (count, mut rest) = rest?.byte()?;
                let count = usize::from(count);
                if count > limits::CANDIDATES {
                    return None;
                }
                let mut candidates = Vec::with_capacity(count);
                for _ in 0..count {
                    let (code, address) = rest?.byte()?;
                    let (address, after) = take_address(address)?;
                    candidates.push(Candidate::new(candidate_kind(code)?, address)?);
                    rest = after;
                }
                Self::CallMe { boot_epoch, number: transaction, candidates }
            }
            10 => Self::Challenge { token: transaction },
            11 => Self::Proof { token: transaction },
            _ => return None,
        })
    }
}

fn put_address(bytes: &mut Vec<u8>, address: SocketAddr) {
    let ip = match address.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    bytes.extend_from_slice(&ip.octets());
    bytes.extend_from_slice(&address.port().to_be_bytes());
}

/// What a step of a parser leaves, see [`Cursor`].
type Rest<'a> = Option<Cursor<'a>>;

fn take_word(bytes: Rest<'_>) -> Option<(u64, Rest<'_>)> {
    let (word, rest) = bytes?.chunk()?;
    Some((u64::from_be_bytes(*word), rest))
}

fn take_address(bytes: Rest<'_>) -> Option<(SocketAddr, Rest<'_>)> {
    let (ip, rest) = bytes?.chunk::<16>()?;
    let (port, rest) = rest?.chunk()?;
    let ip = IpAddr::V6(Ipv6Addr::from(*ip)).to_canonical();
    Some((SocketAddr::new(ip, u16::from_be_bytes(*port)), rest))
}

fn candidate_code(kind: CandidateKind) -> u8 {
    match kind {
        CandidateKind::Local => 1,
        CandidateKind::Reflexive => 2,
        CandidateKind::Configured => 3,
        CandidateKind::Relayed => 4,
    }
}

fn candidate_kind(code: u8) -> Option<CandidateKind> {
    Some(match code {
        1 => CandidateKind::Local,
        2 => CandidateKind::Reflexive,
        3 => CandidateKind::Configured,
        4 => CandidateKind::Relayed,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_three_kinds_are_told_apart() {
        assert_eq!(DatagramKind::of(&[4, 0, 0, 0, 1]), DatagramKind::WireGuard);
        assert_eq!(DatagramKind::of(&[1, 0, 0, 1]), DatagramKind::Unknown);
        assert_eq!(DatagramKind::of(&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42]), DatagramKind::Stun);
        assert_eq!(DatagramKind::of(&[0x50]), DatagramKind::Probe);
        assert_eq!(DatagramKind::of(&relayed_header(7)), DatagramKind::Relayed);
        assert_eq!(DatagramKind::of(&[]), DatagramKind::Unknown);
    }

    proptest! {
        #[test]
        fn a_probe_reads_back(
            pair: [u8; 8],
            nonce: [u8; 12],
            transaction: u64,
            ip: std::net::IpAddr,
            port: u16,
            epoch: u64,
            counter: u64,
            is_stamped: bool,
        ) {
            let version = if is_stamped { ProbeVersion::V2 } else { ProbeVersion::V1 };
            let (header, stamp) = (ProbeHeader { version, pair, nonce }, Stamp { epoch, counter });
            let mut frame = header.encode().to_vec();
            if is_stamped {
                frame.extend_from_slice(&stamp.encode());
            }
            let pong = Probe::Pong { transaction, observed: SocketAddr::new(ip.to_canonical(), port) };
            frame.extend_from_slice(&pong.encode());
            frame.extend_from_slice(&[0; PROBE_TAG_BYTES]);
            let (read, mut sealed) = ProbeHeader::decode(&frame).unwrap();
            prop_assert_eq!(read, header);
            if is_stamped {
                let (read, rest) = Stamp::decode(sealed).unwrap();
                prop_assert_eq!(read, stamp);
                sealed = rest;
            }
            prop_assert_eq!(Probe::decode(sealed), Some(pong));
            prop_assert_eq!(DatagramKind::of(&frame), DatagramKind::Probe);
        }

        #[test]
        fn every_kind_of_probe_reads_back(
            transaction: u64,
            channel: u64,
            seconds: u32,
            key: [u8; 32],
            addresses in proptest::collection::vec(any::<SocketAddr>(), 0..limits::CANDIDATES),
        ) {
            let peer = WireguardKey(key);
            let kinds = [CandidateKind::Local, CandidateKind::Reflexive, CandidateKind::Configured, CandidateKind::Relayed];
            let candidates = addresses.iter().zip(kinds.iter().cycle());
            let candidates = candidates.filter_map(|(address, kind)| Candidate::new(*kind, *address));
            let candidates: Vec<Candidate> = candidates.map(|candidate| {
                // Scope id and flow label are not encoded.
                let address = SocketAddr::new(candidate.address().ip(), candidate.address().port());
                Candidate::new(candidate.kind(), address).unwrap()
            }).collect();
            for probe in [
                Probe::Ping { transaction },
                Probe::Register { transaction },
                Probe::Registered { transaction, lifetime: Duration::from_secs(seconds.into()) },
                Probe::Open { transaction, peer },
                Probe::Opened { transaction, channel },
                Probe::Refused { transaction },
                Probe::Incoming { channel, peer },
                Probe::CallMe { boot_epoch: channel, number: transaction, candidates },
                Probe::Challenge { token: transaction },
                Probe::Proof { token: transaction },
            ] {
                let mut body = probe.encode();
                prop_assert!(body.len() >= PROBE_BODY_BYTES);
                body.resize(body.len() + 100, 0);
                prop_assert_eq!(Probe::decode(&body), Some(probe));
            }
        }

        #[test]
        fn a_relayed_datagram_reads_back(channel: u64, inner: Vec<u8>) {
            let frame = [&relayed_header(channel)[..], &inner].concat();
            prop_assert_eq!(relayed(&frame), Some((channel, &inner[..])));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            DatagramKind::of(&bytes);
            ProbeHeader::decode(&bytes);
            Stamp::decode(&bytes);
            Probe::decode(&bytes);
            relayed(&bytes);
        }
    }
}
