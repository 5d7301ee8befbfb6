//! Headers of IPv4, IPv6, TCP, UDP and of UDP tunnels: where they and their fields are. No other
//! module of this crate knows the position of a field.
//!
//! Contract: any bytes give a result or `None`, never a panic. A parsed [`IpHeader`] is consistent:
//! `header_len <= total_len <= bytes.len()`.

#![deny(clippy::indexing_slicing)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::checksum;

/// IP protocol number of TCP (RFC 9293).
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP (RFC 768).
pub const PROTOCOL_UDP: u8 = 17;

/// Bytes of an IPv4 header without options (RFC 791 section 3.1).
const IPV4_HEADER: usize = 20;
/// Bytes of an IPv6 header without extension headers (RFC 8200 section 3).
const IPV6_HEADER: usize = 40;
/// Bytes of a TCP header without options (RFC 9293 section 3.1).
pub const TCP_HEADER: usize = 20;
/// Bytes of a UDP header (RFC 768).
pub const UDP_HEADER: usize = 8;

/// Bits of the IPv4 fragment field that mark a fragment: "more fragments" and the offset.
const IPV4_FRAGMENT: u16 = 0x3fff;
/// "Don't fragment" flag of IPv4, in the first byte of the fragment field.
const IPV4_DF: u8 = 0x40;

/// Bits of the traffic class for congestion (ECN, RFC 3168).
const ECN: u8 = 0x03;
/// ECN field of a packet that met congestion.
const CONGESTED: u8 = 0x03;
/// ECN field of a packet whose endpoints understand a mark.
const CAPABLE: u8 = 0x02;
/// Position of the checksum in an IPv4 header.
const IPV4_CHECKSUM: std::ops::Range<usize> = 10..12;

/// TCP flag: the sender has no more data.
pub const TCP_FIN: u8 = 0x01;
/// TCP flag: the receiver should not wait for more data.
pub const TCP_PSH: u8 = 0x08;
/// TCP flag: the acknowledgement number is valid.
pub const TCP_ACK: u8 = 0x10;
/// TCP flag: a packet arrived with the congestion mark (RFC 3168).
pub const TCP_ECE: u8 = 0x40;
/// TCP flag: the sender reduced its congestion window (RFC 3168).
pub const TCP_CWR: u8 = 0x80;

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

    /// Parses the header of a packet that ends where the bytes end.
    pub fn parse_whole(bytes: &[u8]) -> Option<Self> {
        Self::parse(bytes).filter(|header| header.total_len == bytes.len())
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
        let address = |bytes: &[u8]| Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into());
        Some(Self {
            source: address(&header[8..])?,
            destination: address(&header[24..])?,
            total_len,
            header_len: IPV6_HEADER,
            protocol: header[6],
            fragment: false,
        })
    }

    /// Returns whether it is an IPv4 header.
    #[inline]
    pub fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }

    /// Returns whether it is an IPv4 header with options.
    #[inline]
    pub fn has_options(&self) -> bool {
        self.is_v4() && self.header_len > IPV4_HEADER
    }

    /// Returns whether a transport header may be at `offset` from the start of this header. On IPv6
    /// there may be extension headers before it.
    pub fn may_precede(&self, offset: usize, transport: Transport) -> bool {
        if self.is_v4() {
            offset == self.header_len && self.protocol == transport.protocol() && !self.fragment
        } else {
            offset >= self.header_len
        }
    }
}

/// Returns the traffic class of an IP packet: the TOS field of IPv4, with DSCP and ECN.
#[inline]
pub fn traffic_class(packet: &[u8]) -> u8 {
    match packet.first_chunk::<2>() {
        Some([first, second]) if first >> 4 == 6 => first << 4 | second >> 4,
        Some([_, second]) => *second,
        None => 0,
    }
}

/// Returns the traffic class of the outer packet around one with this traffic class (RFC 6040, as
/// the kernel's WireGuard does it): its ECN field without a congestion mark, and its DSCP if
/// `copy_dscp`.
#[inline]
pub fn outer_traffic_class(inner: u8, copy_dscp: bool) -> u8 {
    let ecn = if inner & ECN == CONGESTED { CAPABLE } else { inner & ECN };
    if copy_dscp { inner & !ECN | ecn } else { ecn }
}

/// Returns whether a packet with this traffic class met congestion.
#[inline]
pub fn is_congested(traffic_class: u8) -> bool {
    ecn(traffic_class) == CONGESTED
}

/// Returns the ECN field of a traffic class.
#[inline]
pub fn ecn(traffic_class: u8) -> u8 {
    traffic_class & ECN
}

/// Marks an IP packet as congested, if its endpoints understand that (RFC 6040 section 4.2).
pub fn mark_congestion(packet: &mut [u8]) {
    let class = traffic_class(packet);
    if matches!(ecn(class), 0 | CONGESTED) {
        return;
    }
    let Some(before) = packet.first_chunk::<2>().copied() else { return };
    let is_v4 = before[0] >> 4 == 4;
    if let Some(second) = packet.get_mut(1) {
        *second |= if is_v4 { CONGESTED } else { CONGESTED << 4 };
    }
    let Some(after) = packet.first_chunk::<2>().copied().filter(|_| is_v4) else { return };
    if let Some(Ok(checksum)) = packet.get_mut(IPV4_CHECKSUM).map(<&mut [u8; 2]>::try_from) {
        // RFC 1624, equation 3.
        let [sum, before, after] = [*checksum, before, after].map(u16::from_be_bytes);
        let sum = u64::from(!sum) + u64::from(!before) + u64::from(after);
        *checksum = (!checksum::fold(sum)).to_be_bytes();
    }
}

/// Transport protocol of packets that are split and coalesced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP (RFC 9293).
    Tcp,
    /// UDP (RFC 768).
    Udp,
}

impl Transport {
    /// Returns the transport protocol with this IP protocol number.
    #[inline]
    pub fn of(protocol: u8) -> Option<Self> {
        match protocol {
            PROTOCOL_TCP => Some(Self::Tcp),
            PROTOCOL_UDP => Some(Self::Udp),
            _ => None,
        }
    }

    /// Returns the IP protocol number.
    #[inline]
    pub fn protocol(self) -> u8 {
        match self {
            Self::Tcp => PROTOCOL_TCP,
            Self::Udp => PROTOCOL_UDP,
        }
    }

    /// Returns the position of the checksum in the transport header.
    #[inline]
    pub fn checksum_at(self) -> u16 {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }

    /// Returns the length of the header at the start of these bytes, as it claims it. `None` if it is
    /// cut off, or shorter than the protocol permits.
    pub fn header_len(self, bytes: &[u8]) -> Option<usize> {
        match self {
            Self::Tcp => Some(Tcp::of(bytes)?.header_len()).filter(|len| *len >= TCP_HEADER),
            Self::Udp => Some(UDP_HEADER).filter(|len| *len <= bytes.len()),
        }
    }
}

/// Positions of the headers of a TCP or UDP packet, from its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Outer headers, if the packet is inside a UDP tunnel.
    pub outer: Option<Outer>,
    /// IP header before the transport header.
    pub network: Network,
    /// Position of the transport header.
    pub transport: usize,
    /// Protocol of the transport header.
    pub protocol: Transport,
    /// False for UDP without a checksum.
    pub has_checksum: bool,
    /// Length of all headers in bytes.
    pub len: usize,
}

impl Layout {
    /// Returns the partial checksum of the pseudo-header for `transport_len` bytes of transport
    /// header and payload.
    #[inline]
    pub fn pseudo(&self, transport_len: usize) -> u64 {
        self.network.pseudo(self.protocol) + transport_len as u64
    }

    /// Returns whether the checksums of a packet with this layout are correct.
    pub fn is_correct(&self, packet: &[u8]) -> bool {
        let is_correct = |sum: u64| checksum::fold(sum) == 0xffff;
        let Some((headers, transport)) = packet.split_at_checked(self.transport) else {
            return false;
        };
        let network = headers.get(self.network.at..).unwrap_or_default();
        if self.network.is_v4() && !is_correct(checksum::add(0, network)) {
            return false;
        }
        if !self.has_checksum {
            return true;
        }
        let payload_sum = checksum::add(0, transport);
        if let Some(outer) = self.outer {
            let Some((header, behind)) = headers.split_at_checked(outer.udp) else { return false };
            if outer.network.is_v4() && !is_correct(checksum::add(0, header)) {
                return false;
            }
            // Every header has an even number of bytes, so the sum of the inner bytes is a part of
            // the outer sum.
            let all = checksum::add(payload_sum, behind);
            let len = behind.len() + transport.len();
            let pseudo = outer.network.pseudo(Transport::Udp) + len as u64;
            if outer.has_checksum && !is_correct(pseudo + all) {
                return false;
            }
        }
        is_correct(self.pseudo(transport.len()) + payload_sum)
    }
}

/// Outer headers of a packet in a UDP tunnel: IP, UDP and the tunnel header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outer {
    /// IP header, which is at the start of the packet.
    pub network: Network,
    /// Position of the UDP header.
    pub udp: usize,
    /// True if the UDP header has a checksum.
    pub has_checksum: bool,
}

/// Position and addresses of an IP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// Position of the header in the packet.
    pub at: usize,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
}

impl Network {
    /// Returns the position and the addresses of a header that is at `at`.
    pub fn new(at: usize, header: &IpHeader) -> Self {
        Self { at, source: header.source, destination: header.destination }
    }

    /// Returns whether it is an IPv4 header.
    #[inline]
    pub fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }

    /// Returns the partial checksum of the pseudo-header without the length.
    #[inline]
    pub fn pseudo(&self, transport: Transport) -> u64 {
        checksum::pseudo(&self.source, &self.destination, transport.protocol())
    }

    /// Sets the length in this header, which ends at `end`, for an IP packet of `len` bytes, and its
    /// checksum.
    pub fn set_len(&self, packet: &mut [u8], end: usize, len: usize) -> Option<()> {
        let header = packet.get_mut(self.at..end)?;
        if !self.is_v4() {
            let payload = len.checked_sub(header.len())?;
            Ipv6Mut::of(header)?.set_payload_len(payload as u16);
            return Some(());
        }
        let mut fields = Ipv4Mut::of(header)?;
        fields.set_total_len(len as u16);
        fields.set_checksum(0);
        let sum = !checksum::fold(checksum::add(0, header));
        Ipv4Mut::of(header)?.set_checksum(sum);
        Some(())
    }
}

/// Returns the ports of a TCP or UDP packet as one number: source, then destination.
#[inline]
pub fn ports(packet: &[u8], header: &IpHeader) -> Option<u32> {
    Some(u32::from_be_bytes(*packet.get(header.header_len..)?.first_chunk()?))
}

/// Returns the length of a VXLAN (RFC 7348) or Geneve (RFC 8926) header and the Ethernet header
/// after it. `None` if the payload is neither, or contains no IP packet.
pub fn tunnel_len(payload: &[u8]) -> Option<usize> {
    const ETHERNET: usize = 14;
    const TRANSPARENT_ETHERNET: [u8; 2] = [0x65, 0x58];
    /// Mask and value of the VXLAN flags: the network identifier is valid, and the flag of the
    /// Generic Protocol Extension is clear.
    const VXLAN_FLAGS: (u8, u8) = (0x0c, 0x08);
    let header: &[u8; 8] = payload.first_chunk()?;
    let len = if header[2..4] == TRANSPARENT_ETHERNET && header[0] >> 6 == 0 {
        8 + usize::from(header[0] & 0x3f) * 4
    } else if header[0] & VXLAN_FLAGS.0 == VXLAN_FLAGS.1 {
        8
    } else {
        return None;
    };
    let version = match *payload.get(len + 12..)?.first_chunk()? {
        [0x08, 0x00] => 4,
        [0x86, 0xdd] => 6,
        _ => return None,
    };
    (payload.get(len + ETHERNET)? >> 4 == version).then_some(len + ETHERNET)
}

/// Defines a view of a header's fixed part, at the start of a slice.
macro_rules! view {
    ($(#[$doc:meta])* $name:ident, $len:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub struct $name<'a>(&'a [u8; $len]);

        impl<'a> $name<'a> {
            /// Returns the header at the start of these bytes. `None` if there are too few.
            #[inline]
            pub fn of(bytes: &'a [u8]) -> Option<Self> {
                bytes.first_chunk().map(Self)
            }
        }
    };
    (mut $(#[$doc:meta])* $name:ident, $len:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name<'a>(&'a mut [u8; $len]);

        impl<'a> $name<'a> {
            /// Returns the header at the start of these bytes. `None` if there are too few.
            #[inline]
            pub fn of(bytes: &'a mut [u8]) -> Option<Self> {
                bytes.first_chunk_mut().map(Self)
            }
        }
    };
}

view! {
    /// IPv4 header without options.
    Ipv4, IPV4_HEADER
}
view! { mut
    /// IPv4 header without options, for writing.
    Ipv4Mut, IPV4_HEADER
}
view! {
    /// IPv6 header without extension headers.
    Ipv6, IPV6_HEADER
}
view! { mut
    /// IPv6 header without extension headers, for writing.
    Ipv6Mut, IPV6_HEADER
}
view! {
    /// TCP header without options.
    Tcp, TCP_HEADER
}
view! { mut
    /// TCP header without options, for writing.
    TcpMut, TCP_HEADER
}
view! {
    /// UDP header.
    Udp, UDP_HEADER
}
view! { mut
    /// UDP header, for writing.
    UdpMut, UDP_HEADER
}

impl Ipv4<'_> {
    /// Returns the identification.
    #[inline]
    pub fn identification(self) -> u16 {
        u16::from_be_bytes([self.0[4], self.0[5]])
    }

    /// Returns whether routers must not fragment the packet.
    #[inline]
    pub fn dont_fragment(self) -> bool {
        self.0[6] & IPV4_DF != 0
    }

    /// Returns whether type of service, flags, time to live and protocol are those of another
    /// header.
    #[inline]
    pub fn is_like(self, other: Self) -> bool {
        self.0[1] == other.0[1] && self.0[6..10] == other.0[6..10]
    }
}

impl Ipv4Mut<'_> {
    /// Sets the length of the packet.
    #[inline]
    pub fn set_total_len(&mut self, len: u16) {
        self.0[2..4].copy_from_slice(&len.to_be_bytes());
    }

    /// Sets the identification.
    #[inline]
    pub fn set_identification(&mut self, identification: u16) {
        self.0[4..6].copy_from_slice(&identification.to_be_bytes());
    }

    /// Sets the checksum of the header.
    #[inline]
    pub fn set_checksum(&mut self, sum: u16) {
        self.0[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

impl Ipv6<'_> {
    /// Returns whether version, traffic class, flow label, next header and hop limit are those of
    /// another header.
    #[inline]
    pub fn is_like(self, other: Self) -> bool {
        self.0[..4] == other.0[..4] && self.0[6..8] == other.0[6..8]
    }
}

impl Ipv6Mut<'_> {
    /// Sets the length of what follows the header.
    #[inline]
    pub fn set_payload_len(&mut self, len: u16) {
        self.0[4..6].copy_from_slice(&len.to_be_bytes());
    }
}

impl Tcp<'_> {
    /// Returns the sequence number.
    #[inline]
    pub fn sequence(self) -> u32 {
        u32::from_be_bytes([self.0[4], self.0[5], self.0[6], self.0[7]])
    }

    /// Returns the length of the header with its options in bytes, as it claims it.
    #[inline]
    pub fn header_len(self) -> usize {
        usize::from(self.0[12] >> 4) * 4
    }

    /// Returns the flags.
    #[inline]
    pub fn flags(self) -> u8 {
        self.0[13]
    }

    /// Returns whether all fields but sequence number, PSH flag and checksum are those of another
    /// header. Does not compare options.
    #[inline]
    pub fn is_like(self, other: Self) -> bool {
        let (a, b) = (self.0, other.0);
        // Ports; acknowledgement number and header length; flags; window; urgent pointer.
        a[..4] == b[..4]
            && a[8..13] == b[8..13]
            && (a[13] ^ b[13]) & !TCP_PSH == 0
            && a[14..16] == b[14..16]
            && a[18..] == b[18..]
    }
}

impl TcpMut<'_> {
    /// Sets the sequence number.
    #[inline]
    pub fn set_sequence(&mut self, sequence: u32) {
        self.0[4..8].copy_from_slice(&sequence.to_be_bytes());
    }

    /// Sets all flags.
    #[inline]
    pub fn set_flags(&mut self, flags: u8) {
        self.0[13] = flags;
    }

    /// Adds flags to those that are set.
    #[inline]
    pub fn add_flags(&mut self, flags: u8) {
        self.0[13] |= flags;
    }

    /// Sets the checksum.
    #[inline]
    pub fn set_checksum(&mut self, sum: u16) {
        self.0[16..18].copy_from_slice(&sum.to_be_bytes());
    }
}

impl Udp<'_> {
    /// Returns the destination port.
    #[inline]
    pub fn destination_port(self) -> u16 {
        u16::from_be_bytes([self.0[2], self.0[3]])
    }

    /// Returns the length of header and payload in bytes, as the header claims it.
    #[inline]
    pub fn total_len(self) -> usize {
        usize::from(u16::from_be_bytes([self.0[4], self.0[5]]))
    }

    /// Returns whether there is a checksum.
    #[inline]
    pub fn has_checksum(self) -> bool {
        self.0[6..] != [0, 0]
    }
}

impl UdpMut<'_> {
    /// Sets the length of header and payload.
    #[inline]
    pub fn set_total_len(&mut self, len: u16) {
        self.0[4..6].copy_from_slice(&len.to_be_bytes());
    }

    /// Sets the checksum. 0 means that there is none.
    #[inline]
    pub fn set_checksum(&mut self, sum: u16) {
        self.0[6..].copy_from_slice(&sum.to_be_bytes());
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
    fn congestion_is_marked_only_where_the_endpoints_understand_it() {
        for (ecn, marked) in [(0, 0), (1, 3), (2, 3), (3, 3)] {
            let mut packet =
                [0x45, 0xb8 | ecn, 0, 20, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
            let sum = !checksum::fold(checksum::add(0, &packet));
            packet[IPV4_CHECKSUM].copy_from_slice(&sum.to_be_bytes());
            mark_congestion(&mut packet);
            assert_eq!(traffic_class(&packet), 0xb8 | marked);
            assert_eq!(checksum::fold(checksum::add(0, &packet)), 0xffff, "{ecn}: {packet:x?}");
            let mut packet = [0; 40];
            packet[..2].copy_from_slice(&[0x6b, 0x80 | ecn << 4]);
            mark_congestion(&mut packet);
            assert_eq!(traffic_class(&packet), 0xb8 | marked);
        }
        mark_congestion(&mut []);
    }

    /// RFC 6040 section 4.1, normal mode, except that a mark is not copied out.
    #[test]
    fn the_outer_packet_has_the_ecn_of_the_inner_one_and_no_dscp() {
        for (inner, outer) in [(0xb8, 0), (0xb9, 1), (0xba, 2), (0xbb, 2)] {
            assert_eq!(outer_traffic_class(inner, false), outer);
            assert_eq!(outer_traffic_class(inner, true), 0xb8 | outer);
        }
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
