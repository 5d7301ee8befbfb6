//! What travels on the WireGuard UDP port beside WireGuard itself.
//!
//! Three kinds share the port and are told apart by their first bytes, per datagram (per GRO
//! segment): WireGuard's first four bytes are a little-endian 1 to 4; STUN (RFC 8489 section 5)
//! has two zero bits first and its magic cookie at offset 4; Towline's own frames start with a
//! byte from 0x41 to 0x7f.
//!
//! # Probe
//!
//! ```text
//!  0   1  0x50
//!  1   1  version, 1
//!  2   2  zero
//!  4   8  pair: which peer sent it, known only to the two (see below)
//! 12  12  nonce, random
//! 24  40+ sealed body, then the tag of 16 bytes
//! ```
//!
//! Body: `kind` 1, zero 7, `transaction` 8, `observed` 18 (address as IPv6, port), zero 6, then
//! zero padding. A ping and its pong have one length, so nothing is amplified.
//!
//! Key and pair id of each direction come from HKDF-SHA-256 over the X25519 secret of the two
//! nodes' WireGuard keys; sealing is ChaCha20-Poly1305 (RFC 8439) with the header as additional
//! data. This module only lays out bytes; the agent seals and opens.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// What a datagram is, by its first bytes. A guess that the right parser has to confirm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatagramKind {
    /// WireGuard's type 1 to 4.
    WireGuard,
    /// STUN.
    Stun,
    /// A [probe](self#probe).
    Probe,
    /// None of ours.
    Unknown,
}

/// STUN's magic cookie, RFC 8489 section 5.
pub const STUN_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

const PROBE_TYPE: u8 = 0x50;
const PROBE_VERSION: u8 = 1;
/// Bytes before the sealed body.
pub const PROBE_HEADER_BYTES: usize = 24;
/// Bytes of an unpadded body.
pub const PROBE_BODY_BYTES: usize = 40;
/// Bytes of the tag behind the body.
pub const PROBE_TAG_BYTES: usize = 16;
/// Bytes of an unpadded probe.
pub const PROBE_BYTES: usize = PROBE_HEADER_BYTES + PROBE_BODY_BYTES + PROBE_TAG_BYTES;

impl DatagramKind {
    /// Looks at the first bytes only.
    pub fn of(datagram: &[u8]) -> Self {
        match datagram {
            [1..=4, 0, 0, 0, ..] => Self::WireGuard,
            [PROBE_TYPE, ..] => Self::Probe,
            [0..=0x3f, _, _, _, cookie @ ..] if cookie.starts_with(&STUN_COOKIE) => Self::Stun,
            _ => Self::Unknown,
        }
    }
}

/// The clear part of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeHeader {
    /// Which peer sent it.
    pub pair: [u8; 8],
    /// Never used twice with one key.
    pub nonce: [u8; 12],
}

impl ProbeHeader {
    /// The header's bytes: also the additional data of the seal.
    pub fn encode(&self) -> [u8; PROBE_HEADER_BYTES] {
        let mut bytes = [0; PROBE_HEADER_BYTES];
        bytes[0] = PROBE_TYPE;
        bytes[1] = PROBE_VERSION;
        bytes[4..12].copy_from_slice(&self.pair);
        bytes[12..24].copy_from_slice(&self.nonce);
        bytes
    }

    /// The header and the sealed rest; `None` for anything that is no probe of this version.
    pub fn decode(datagram: &[u8]) -> Option<(Self, &[u8])> {
        let (header, sealed) = datagram.split_first_chunk::<PROBE_HEADER_BYTES>()?;
        if header[..4] != [PROBE_TYPE, PROBE_VERSION, 0, 0]
            || sealed.len() < PROBE_BODY_BYTES + PROBE_TAG_BYTES
        {
            return None;
        }
        let mut pair = [0; 8];
        pair.copy_from_slice(&header[4..12]);
        let mut nonce = [0; 12];
        nonce.copy_from_slice(&header[12..24]);
        Some((Self { pair, nonce }, sealed))
    }
}

/// What a probe says, once opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// Asks for a [`Probe::Pong`] of the same length.
    Ping {
        /// Chosen by the sender, not to be guessed.
        transaction: u64,
    },
    /// Answers a ping, to where it came from.
    Pong {
        /// The ping's.
        transaction: u64,
        /// Where the ping was seen to come from.
        observed: SocketAddr,
    },
}

impl Probe {
    /// The body, unpadded.
    pub fn encode(&self) -> [u8; PROBE_BODY_BYTES] {
        let mut bytes = [0; PROBE_BODY_BYTES];
        match self {
            Self::Ping { transaction } => {
                bytes[0] = 1;
                bytes[8..16].copy_from_slice(&transaction.to_be_bytes());
            }
            Self::Pong { transaction, observed } => {
                bytes[0] = 2;
                bytes[8..16].copy_from_slice(&transaction.to_be_bytes());
                let ip = match observed.ip() {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => v6,
                };
                bytes[16..32].copy_from_slice(&ip.octets());
                bytes[32..34].copy_from_slice(&observed.port().to_be_bytes());
            }
        }
        bytes
    }

    /// Reads an opened body; padding is ignored.
    pub fn decode(body: &[u8]) -> Option<Self> {
        let (body, _padding) = body.split_first_chunk::<PROBE_BODY_BYTES>()?;
        let transaction = u64::from_be_bytes(*body[8..].first_chunk()?);
        match body[0] {
            1 => Some(Self::Ping { transaction }),
            2 => {
                let ip = Ipv6Addr::from(*body[16..].first_chunk::<16>()?);
                let port = u16::from_be_bytes(*body[32..].first_chunk()?);
                let observed = SocketAddr::new(IpAddr::V6(ip).to_canonical(), port);
                Some(Self::Pong { transaction, observed })
            }
            _ => None,
        }
    }
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
        assert_eq!(DatagramKind::of(&[]), DatagramKind::Unknown);
    }

    proptest! {
        #[test]
        fn a_probe_reads_back(pair: [u8; 8], nonce: [u8; 12], transaction: u64, ip: std::net::IpAddr, port: u16) {
            let header = ProbeHeader { pair, nonce };
            let mut frame = header.encode().to_vec();
            let pong = Probe::Pong { transaction, observed: SocketAddr::new(ip.to_canonical(), port) };
            frame.extend_from_slice(&pong.encode());
            frame.extend_from_slice(&[0; PROBE_TAG_BYTES]);
            let (read, sealed) = ProbeHeader::decode(&frame).unwrap();
            prop_assert_eq!(read, header);
            prop_assert_eq!(Probe::decode(sealed), Some(pong));
            prop_assert_eq!(DatagramKind::of(&frame), DatagramKind::Probe);
            prop_assert_eq!(Probe::decode(&Probe::Ping { transaction }.encode()), Some(Probe::Ping { transaction }));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            DatagramKind::of(&bytes);
            ProbeHeader::decode(&bytes);
            Probe::decode(&bytes);
        }
    }
}
