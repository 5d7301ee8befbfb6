//! Parser of the IP header of an inner packet: source, destination and claimed length.
//!
//! Contract: any bytes give a result or `None`, never a panic. The result is consistent:
//! `header_len <= total_len <= bytes.len()`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IP protocol number of TCP (RFC 9293).
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP (RFC 768).
pub const PROTOCOL_UDP: u8 = 17;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
/// Bits of the IPv4 fragment field that mark a fragment: "more fragments" and the offset.
const IPV4_FRAGMENT: u16 = 0x3fff;

/// Fields of the fixed header of an IPv4 (RFC 791) or IPv6 (RFC 8200) packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpHeader {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Length of the packet that the header claims, in bytes. At most the number of bytes parsed.
    pub total_len: usize,
    /// Length of the header in bytes: with options for IPv4, without extension headers for IPv6.
    pub header_len: usize,
    /// Protocol field of IPv4, or next-header field of IPv6.
    pub protocol: u8,
    /// True for a fragment. IPv4 only: in IPv6 an extension header marks fragments.
    pub fragment: bool,
}

impl IpHeader {
    /// Parses the header. Bytes after the claimed length are allowed, because they are padding.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes),
            6 => Self::parse_v6(bytes),
            _ => None,
        }
    }

    fn parse_v4(bytes: &[u8]) -> Option<Self> {
        let header: &[u8; IPV4_HEADER] = bytes.first_chunk()?;
        let header_len = usize::from(header[0] & 0x0f) * 4;
        let total_len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if header_len < IPV4_HEADER || header_len > total_len || total_len > bytes.len() {
            return None;
        }
        Some(Self {
            source: Ipv4Addr::new(header[12], header[13], header[14], header[15]).into(),
            destination: Ipv4Addr::new(header[16], header[17], header[18], header[19]).into(),
            total_len,
            header_len,
            protocol: header[9],
            fragment: u16::from_be_bytes([header[6], header[7]]) & IPV4_FRAGMENT != 0,
        })
    }

    fn parse_v6(bytes: &[u8]) -> Option<Self> {
        let header: &[u8; IPV6_HEADER] = bytes.first_chunk()?;
        let total_len = IPV6_HEADER + usize::from(u16::from_be_bytes([header[4], header[5]]));
        if total_len > bytes.len() {
            return None;
        }
        let address = |at: usize| {
            let mut octets = [0; 16];
            octets.copy_from_slice(&header[at..at + 16]);
            IpAddr::V6(Ipv6Addr::from(octets))
        };
        Some(Self {
            source: address(8),
            destination: address(24),
            total_len,
            header_len: IPV6_HEADER,
            protocol: header[6],
            fragment: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(header_words: u8, total_len: u16, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[0] = 0x40 | header_words;
        bytes[2..4].copy_from_slice(&total_len.to_be_bytes());
        bytes
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        assert!(IpHeader::parse(&v4(5, 20, 20)).is_some());
        assert!(IpHeader::parse(&v4(5, 20, 36)).is_some(), "padding is allowed");
        assert!(IpHeader::parse(&v4(5, 21, 20)).is_none(), "claims more bytes than there are");
        assert!(IpHeader::parse(&v4(5, 19, 20)).is_none(), "claims fewer bytes than its header");
        assert!(IpHeader::parse(&v4(4, 20, 20)).is_none(), "header shorter than the minimum");
        assert!(IpHeader::parse(&v4(6, 20, 20)).is_none(), "options are missing");
        assert!(IpHeader::parse(&[0x60; 39]).is_none());
        assert!(IpHeader::parse(&[]).is_none());
    }

    #[test]
    fn fragments_are_seen() {
        let mut first = v4(5, 28, 28);
        first[6] = 0x20;
        assert!(IpHeader::parse(&first).unwrap().fragment, "more fragments");
        first[6] = 0x40;
        assert!(!IpHeader::parse(&first).unwrap().fragment, "do not fragment");
        first[7] = 1;
        assert!(IpHeader::parse(&first).unwrap().fragment, "an offset");
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_consistent_answer(mut bytes: Vec<u8>, version in 0u8..16) {
            if let Some(first) = bytes.first_mut() {
                *first = version << 4 | *first & 0x0f;
            }
            if let Some(inner) = IpHeader::parse(&bytes) {
                prop_assert!(inner.header_len >= 20);
                prop_assert!(inner.header_len <= inner.total_len);
                prop_assert!(inner.total_len <= bytes.len());
                prop_assert_eq!(inner.source.is_ipv4(), inner.destination.is_ipv4());
            }
        }
    }
}
