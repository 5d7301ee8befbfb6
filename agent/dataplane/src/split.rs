//! Outbound packets: completes the checksums and the segmentation that the kernel left undone,
//! while the segments are encrypted.
//!
//! Contract: a packet from the TUN comes with its virtio header. Segments come out one at a time,
//! in the order of the stream. Each is a whole IP packet with correct checksums, padded for
//! WireGuard. Hostile or inconsistent headers give an error, never a panic.
//!
//! A super-packet is split in place: the headers of each segment overwrite the end of the previous
//! payload, which is encrypted by then. Only headers are copied.

use super::arena::{HEADROOM, TAILROOM};
use super::checksum;
use super::drops::DropReason;
use super::headers::{IpHeader, PROTOCOL_TCP, PROTOCOL_UDP};
use super::vnet::{
    FLAG_NEEDS_CSUM, FLAG_TUNNEL_CSUM, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_TUNNEL_V4,
    GSO_TUNNEL_V6, GSO_UDP_L4, VnetHeader,
};
use towline_wireguard::{PADDING, Segments};

/// Largest total length of the headers of a super-packet, in bytes: outer headers, a tunnel header
/// with options, and inner headers.
const HEADERS: usize = 448;

const TCP_SEQUENCE: usize = 4;
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;
const UDP_HEADER: usize = 8;
const UDP_LENGTH: usize = 4;
const UDP_CHECKSUM: usize = 6;

/// Packet from the TUN as a sequence of segments.
#[derive(Debug)]
pub struct Split<'a> {
    /// Packet with the free bytes around it.
    bytes: &'a mut [u8],
    /// MTU of the link in bytes. No segment is padded beyond it.
    mtu: usize,
    state: State,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one on the stack per packet; a box would allocate")]
enum State {
    /// A packet that needs no splitting, with its length in bytes.
    Whole(usize),
    /// A super-packet that is being split.
    SuperPacket(SuperPacket),
    /// All segments were taken.
    Done,
}

/// State of the splitting of a super-packet.
#[derive(Debug)]
struct SuperPacket {
    /// Headers of the super-packet. The fields that differ between segments are zero.
    headers: [u8; HEADERS],
    headers_len: usize,
    /// Headers of the UDP tunnel, such as VXLAN, that contains the packet. `None` outside a tunnel.
    outer: Option<Outer>,
    /// IP header of the packet that is split.
    network: Network,
    /// Position of the transport header.
    transport: usize,
    is_tcp: bool,
    /// Partial checksum of the pseudo-header without the length.
    pseudo: u64,
    /// Partial checksum of the pseudo-header and the transport header, without lengths, sequence
    /// number, flags and checksum.
    transport_sum: u64,
    /// TCP sequence number of the next segment.
    sequence: u32,
    /// TCP flags of the super-packet.
    flags: u8,
    /// Payload bytes in each segment except the last.
    size: usize,
    /// Position of the next payload in the packet's buffer.
    next: usize,
    /// Position of the end of the last payload.
    end: usize,
    /// True until the first segment was written.
    first: bool,
    /// Payload bytes that the padding of the previous segment overwrote, and their number.
    covered: ([u8; TAILROOM], usize),
}

/// IP header that is written for each segment.
#[derive(Debug)]
struct Network {
    /// Position of the header in the packet.
    at: usize,
    is_v4: bool,
    /// Length of the header in bytes.
    len: usize,
    /// Partial checksum of the IPv4 header without length, identification and checksum.
    sum: u64,
    /// IPv4 identification of the next segment.
    identification: u16,
}

/// Outer headers of a UDP tunnel.
#[derive(Debug)]
struct Outer {
    network: Network,
    /// Position of the UDP header.
    udp: usize,
    /// Partial checksum of the pseudo-header without the length. `None` if the tunnel uses no
    /// checksum.
    pseudo: Option<u64>,
}

impl<'a> Split<'a> {
    /// Prepares the packet of `len` bytes in `bytes`, which has [`HEADROOM`] free bytes before it
    /// and [`TAILROOM`] after it. Completes its checksum if no splitting is needed. No segment is
    /// padded beyond `mtu` bytes.
    ///
    /// # Errors
    ///
    /// Returns [`DropReason::Unsplittable`] if the virtio header does not match the packet.
    pub fn new(
        bytes: &'a mut [u8],
        len: usize,
        header: &VnetHeader,
        mtu: usize,
    ) -> Result<Self, DropReason> {
        if bytes.len() < HEADROOM + len + TAILROOM {
            return Err(DropReason::Unsplittable);
        }
        let packet = &mut bytes[HEADROOM..HEADROOM + len];
        let state = if header.gso_type == GSO_NONE {
            if header.flags & FLAG_NEEDS_CSUM != 0 {
                complete_checksum(packet, header).ok_or(DropReason::Unsplittable)?;
            }
            State::Whole(len)
        } else {
            State::SuperPacket(SuperPacket::new(packet, header).ok_or(DropReason::Unsplittable)?)
        };
        Ok(Self { bytes, mtu, state })
    }
}

impl Segments for Split<'_> {
    fn next_len(&self) -> Option<usize> {
        match &self.state {
            State::Whole(len) => Some(padded(*len, self.mtu)),
            State::SuperPacket(super_packet) => {
                Some(padded(super_packet.headers_len + super_packet.next_payload(), self.mtu))
            }
            State::Done => None,
        }
    }

    fn take(&mut self) -> &[u8] {
        let (start, len) = match &mut self.state {
            State::Whole(len) => (HEADROOM, *len),
            State::SuperPacket(super_packet) => super_packet.write_next(self.bytes),
            State::Done => return &[],
        };
        let padded = padded(len, self.mtu);
        let padding = &mut self.bytes[start + len..start + padded];
        match &mut self.state {
            State::SuperPacket(super_packet) if super_packet.next < super_packet.end => {
                super_packet.covered.0[..padding.len()].copy_from_slice(padding);
                super_packet.covered.1 = padding.len();
            }
            _ => self.state = State::Done,
        }
        padding.fill(0);
        &self.bytes[start..start + padded]
    }
}

impl SuperPacket {
    fn new(packet: &[u8], header: &VnetHeader) -> Option<Self> {
        let whole = IpHeader::parse(packet).filter(|inner| inner.total_len == packet.len())?;
        let tunnel = header.gso_type & (GSO_TUNNEL_V4 | GSO_TUNNEL_V6);
        let at = match tunnel {
            0 => 0,
            _ => usize::from(header.inner_network),
        };
        let inner = match tunnel {
            0 => whole,
            GSO_TUNNEL_V4 if whole.source.is_ipv4() => parse_inside(packet, at)?,
            GSO_TUNNEL_V6 if whole.source.is_ipv6() => parse_inside(packet, at)?,
            _ => return None,
        };
        let is_v4 = inner.source.is_ipv4();
        let is_tcp = match header.gso_type & !(GSO_ECN | tunnel) {
            GSO_TCPV4 if is_v4 => true,
            GSO_TCPV6 if !is_v4 => true,
            GSO_UDP_L4 => false,
            _ => return None,
        };
        let protocol = if is_tcp { PROTOCOL_TCP } else { PROTOCOL_UDP };
        let transport = usize::from(header.csum_start);
        if header.flags & FLAG_NEEDS_CSUM == 0
            || header.gso_size == 0
            || !is_behind(transport.checked_sub(at)?, &inner, protocol)
        {
            return None;
        }
        let transport_len = if is_tcp {
            let words = usize::from(packet.get(transport + 12)? >> 4);
            if words < 5 || header.csum_offset != TCP_CHECKSUM as u16 {
                return None;
            }
            words * 4
        } else if header.csum_offset == UDP_CHECKSUM as u16 {
            UDP_HEADER
        } else {
            return None;
        };
        let headers_len = transport + transport_len;
        if headers_len > HEADERS || headers_len > packet.len() {
            return None;
        }
        let mut headers = [0; HEADERS];
        headers[..headers_len].copy_from_slice(&packet[..headers_len]);
        let network = Network::new(&mut headers, at, &inner);
        let outer = match tunnel {
            0 => None,
            _ => Some(Outer::new(&mut headers, &whole, header, at, transport)?),
        };
        let (mut sequence, mut flags) = (0, 0);
        let part = &mut headers[transport..headers_len];
        if is_tcp {
            sequence = u32::from_be_bytes([part[4], part[5], part[6], part[7]]);
            flags = part[TCP_FLAGS];
            part[TCP_SEQUENCE..TCP_SEQUENCE + 4].fill(0);
            part[TCP_FLAGS] = 0;
            part[TCP_CHECKSUM..TCP_CHECKSUM + 2].fill(0);
        } else {
            part[UDP_LENGTH..UDP_HEADER].fill(0);
        }
        let pseudo = checksum::pseudo(&inner.source, &inner.destination, protocol);
        let transport_sum = checksum::add(pseudo, part);
        Some(Self {
            headers,
            headers_len,
            outer,
            network,
            transport,
            is_tcp,
            pseudo,
            transport_sum,
            sequence,
            flags,
            size: usize::from(header.gso_size),
            next: HEADROOM + headers_len,
            end: HEADROOM + packet.len(),
            first: true,
            covered: ([0; TAILROOM], 0),
        })
    }

    fn next_payload(&self) -> usize {
        self.size.min(self.end - self.next)
    }

    /// Writes the headers of the next segment before its payload. Returns the offset of the segment
    /// and its length.
    fn write_next(&mut self, bytes: &mut [u8]) -> (usize, usize) {
        let (covered, len) = &self.covered;
        bytes[self.next..self.next + len].copy_from_slice(&covered[..*len]);

        let payload = self.next..self.next + self.next_payload();
        let start = payload.start - self.headers_len;
        let len = self.headers_len + payload.len();
        let last = payload.end == self.end;
        let payload_sum = checksum::add(self.transport_sum, &bytes[payload.clone()]);
        let segment = &mut bytes[start..payload.end];
        segment[..self.headers_len].copy_from_slice(&self.headers[..self.headers_len]);

        self.network.write(segment);
        let transport_len = (len - self.transport) as u64;
        let part = &mut segment[self.transport..self.headers_len];
        if self.is_tcp {
            let mut flags = self.flags;
            if !self.first {
                flags &= !TCP_CWR;
            }
            if !last {
                flags &= !(TCP_FIN | TCP_PSH);
            }
            part[TCP_SEQUENCE..TCP_SEQUENCE + 4].copy_from_slice(&self.sequence.to_be_bytes());
            part[TCP_FLAGS] = flags;
            let sum = payload_sum + transport_len + u64::from(self.sequence) + u64::from(flags);
            put(part, TCP_CHECKSUM, !checksum::fold(sum));
        } else {
            // The length is summed twice: it is in the header and in the pseudo-header.
            let sum = payload_sum + 2 * transport_len;
            put(part, UDP_LENGTH, transport_len as u16);
            put(part, UDP_CHECKSUM, not_zero(!checksum::fold(sum)));
        }
        if let Some(outer) = &mut self.outer {
            // The checksum is complete, so transport header and payload now add up to the
            // complement of the pseudo-header.
            let inside = !checksum::fold(self.pseudo + transport_len);
            outer.write(segment, self.transport, inside);
        }

        self.sequence = self.sequence.wrapping_add(payload.len() as u32);
        self.next = payload.end;
        self.first = false;
        (start, len)
    }
}

impl Network {
    /// Reads the header at `at` and clears the fields that [`Network::write`] sets.
    fn new(headers: &mut [u8], at: usize, inner: &IpHeader) -> Self {
        let is_v4 = inner.source.is_ipv4();
        let len = inner.header_len;
        let header = &mut headers[at..at + len];
        let (mut identification, mut sum) = (0, 0);
        if is_v4 {
            identification = u16::from_be_bytes([header[4], header[5]]);
            header[2..6].fill(0);
            header[10..12].fill(0);
            sum = checksum::add(0, header);
        }
        Self { at, is_v4, len, sum, identification }
    }

    /// Completes the header of a segment, with the next identification.
    fn write(&mut self, segment: &mut [u8]) {
        let total = segment.len() - self.at;
        let header = &mut segment[self.at..self.at + self.len];
        if self.is_v4 {
            put(header, 2, total as u16);
            put(header, 4, self.identification);
            let sum = self.sum + total as u64 + u64::from(self.identification);
            put(header, 10, !checksum::fold(sum));
            self.identification = self.identification.wrapping_add(1);
        } else {
            put(header, 4, (total - self.len) as u16);
        }
    }
}

impl Outer {
    fn new(
        headers: &mut [u8],
        whole: &IpHeader,
        header: &VnetHeader,
        inner_at: usize,
        transport: usize,
    ) -> Option<Self> {
        let udp = usize::from(header.outer_transport);
        // If inner and outer headers have the same 16-bit alignment, the inner sum is a part of the
        // outer sum.
        let pairs = transport.checked_sub(udp)?.is_multiple_of(2);
        if !is_behind(udp, whole, PROTOCOL_UDP) || inner_at < udp + UDP_HEADER || !pairs {
            return None;
        }
        let pseudo = (header.flags & FLAG_TUNNEL_CSUM != 0)
            .then(|| checksum::pseudo(&whole.source, &whole.destination, PROTOCOL_UDP));
        headers.get_mut(udp + UDP_LENGTH..udp + UDP_HEADER)?.fill(0);
        Some(Self { network: Network::new(headers, 0, whole), udp, pseudo })
    }

    /// Completes the outer headers of a segment whose inner headers are complete. `inside` is the
    /// sum of its transport header, which begins at `transport`, and its payload.
    fn write(&mut self, segment: &mut [u8], transport: usize, inside: u16) {
        self.network.write(segment);
        let part = &mut segment[self.udp..];
        let len = part.len();
        put(part, UDP_LENGTH, len as u16);
        if let Some(pseudo) = self.pseudo {
            let before = &part[..transport - self.udp];
            let sum = checksum::add(pseudo + len as u64 + u64::from(inside), before);
            put(part, UDP_CHECKSUM, not_zero(!checksum::fold(sum)));
        }
    }
}

/// Returns the header of the packet inside a tunnel. The packet begins at `at` and must end where
/// the outer packet ends.
fn parse_inside(packet: &[u8], at: usize) -> Option<IpHeader> {
    let inside = packet.get(at..)?;
    IpHeader::parse(inside).filter(|inner| inner.total_len == inside.len())
}

/// Returns whether a transport header may be at `offset` of a packet. On IPv6 there may be
/// extension headers before it.
fn is_behind(offset: usize, inner: &IpHeader, protocol: u8) -> bool {
    if inner.source.is_ipv4() {
        offset == inner.header_len && inner.protocol == protocol && !inner.fragment
    } else {
        offset >= inner.header_len
    }
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Returns the length with WireGuard's padding to 16 bytes, but not beyond the MTU of the link.
fn padded(len: usize, mtu: usize) -> usize {
    len.next_multiple_of(PADDING).min(mtu.max(len))
}

/// Completes the checksum of a packet. The checksum field already contains the sum of the
/// pseudo-header.
fn complete_checksum(packet: &mut [u8], header: &VnetHeader) -> Option<()> {
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    let sum = not_zero(!checksum::fold(checksum::add(0, packet.get(start..)?)));
    packet.get_mut(at..at + 2)?.copy_from_slice(&sum.to_be_bytes());
    Some(())
}

/// Replaces a checksum of zero with its equivalent 0xffff. In UDP a checksum of zero means that
/// there is none.
fn not_zero(sum: u16) -> u16 {
    if sum == 0 { 0xffff } else { sum }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Recipe, Tcp};
    use super::*;
    use proptest::prelude::*;

    /// Returns all segments of a packet without their padding, after checking that it is all zeros.
    fn split(packet: &[u8], header: &VnetHeader, mtu: usize) -> Result<Vec<Vec<u8>>, DropReason> {
        let mut bytes = vec![0xaa; HEADROOM];
        bytes.extend_from_slice(packet);
        bytes.extend_from_slice(&[0xaa; TAILROOM]);
        let mut split = Split::new(&mut bytes, packet.len(), header, mtu)?;
        let mut segments = Vec::new();
        while let Some(len) = split.next_len() {
            let segment = split.take();
            assert_eq!(segment.len(), len);
            let inner = IpHeader::parse(segment).expect("a packet");
            assert!(len.is_multiple_of(PADDING) || len == inner.total_len.max(mtu));
            assert!(segment[inner.total_len..].iter().all(|byte| *byte == 0));
            segments.push(segment[..inner.total_len].to_vec());
        }
        assert!(split.take().is_empty());
        Ok(segments)
    }

    fn addresses() -> impl Strategy<Value = (std::net::IpAddr, std::net::IpAddr)> {
        prop_oneof![
            any::<(std::net::Ipv4Addr, std::net::Ipv4Addr)>()
                .prop_map(|(a, b)| (a.into(), b.into())),
            any::<(std::net::Ipv6Addr, std::net::Ipv6Addr)>()
                .prop_map(|(a, b)| (a.into(), b.into())),
        ]
    }

    prop_compose! {
        fn recipe(payload: usize)(
            (source, destination) in addresses(),
            ports: (u16, u16),
            tcp in proptest::option::of(any::<(u32, u32, u8, u16)>()),
            options in proptest::collection::vec(any::<[u8; 4]>(), 0..=10),
            (identification, traffic_class, hops) in any::<(u16, u8, u8)>(),
            payload in proptest::collection::vec(any::<u8>(), 1..payload),
        ) -> Recipe {
            let tcp = tcp.map(|(sequence, acknowledged, flags, window)| {
                Tcp { sequence, acknowledged, flags, window, options: options.concat() }
            });
            Recipe { source, destination, ports, tcp, identification, traffic_class, hops, payload }
        }
    }

    /// Returns `inner` in VXLAN or (with options) Geneve over UDP with the ports and addresses of
    /// `outer`, and the offset of `inner`.
    fn tunnel(outer: &Recipe, options: usize, inner: &[u8], checksum: bool) -> (Vec<u8>, usize) {
        let mut payload = vec![0; 8 + options + 14];
        payload[0] = 8;
        payload[20 + options..22 + options].copy_from_slice(&[8, 0]);
        let inside = outer.headers().1 + payload.len();
        payload.extend_from_slice(inner);
        let mut packet = Recipe { tcp: None, payload, ..outer.clone() }.build();
        if !checksum {
            let at = outer.headers().0 + UDP_CHECKSUM;
            packet[at..at + 2].fill(0);
        }
        (packet, inside)
    }

    /// Returns a packet with the virtio header of a super-packet from the kernel.
    fn super_packet(recipe: &Recipe, size: usize) -> (Vec<u8>, VnetHeader) {
        let packet = recipe.build();
        let (ip_len, headers_len) = recipe.headers();
        let csum_offset = if recipe.tcp.is_some() { TCP_CHECKSUM } else { UDP_CHECKSUM };
        let gso_type = match (&recipe.tcp, recipe.source.is_ipv4()) {
            (Some(_), true) => GSO_TCPV4,
            (Some(_), false) => GSO_TCPV6 | GSO_ECN,
            (None, _) => GSO_UDP_L4,
        };
        let header = VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type,
            hdr_len: headers_len as u16,
            gso_size: size as u16,
            csum_start: ip_len as u16,
            csum_offset: csum_offset as u16,
            ..VnetHeader::default()
        };
        (packet, header)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn segments_are_those_of_the_book(
            recipe in recipe(20_000),
            size in 1usize..3000,
            mtu in 1280usize..1500,
        ) {
            let size = size.max(recipe.payload.len() / 60);
            let (packet, header) = super_packet(&recipe, size);
            let expected: Vec<_> = recipe.segments(size).iter().map(Recipe::build).collect();
            prop_assert_eq!(split(&packet, &header, mtu), Ok(expected));
        }

        #[test]
        fn segments_in_a_tunnel_are_those_of_the_book(
            outer in recipe(2),
            recipe in recipe(20_000),
            size in 1usize..3000,
            options in 0usize..60,
            checksum: bool,
        ) {
            let size = size.max(recipe.payload.len() / 60);
            let outer = Recipe { tcp: None, ..outer };
            let (inner, header) = super_packet(&recipe, size);
            let (packet, inside) = tunnel(&outer, options * 4, &inner, checksum);
            let is_v4 = outer.source.is_ipv4();
            let header = VnetHeader {
                flags: header.flags | if checksum { FLAG_TUNNEL_CSUM } else { 0 },
                gso_type: header.gso_type | if is_v4 { GSO_TUNNEL_V4 } else { GSO_TUNNEL_V6 },
                csum_start: header.csum_start + inside as u16,
                outer_transport: outer.headers().0 as u16,
                inner_network: inside as u16,
                ..header
            };
            let expected: Vec<_> = recipe
                .segments(size)
                .iter()
                .enumerate()
                .map(|(number, inner)| {
                    let identification = outer.identification.wrapping_add(number as u16);
                    let outer = Recipe { identification, ..outer.clone() };
                    tunnel(&outer, options * 4, &inner.build(), checksum).0
                })
                .collect();
            prop_assert_eq!(split(&packet, &header, 1420), Ok(expected));
        }

        #[test]
        fn a_missing_checksum_is_completed(recipe in recipe(3000)) {
            let (mut packet, header) = super_packet(&recipe, 1);
            let expected = packet.clone();
            let at = usize::from(header.csum_start + header.csum_offset);
            packet[at..at + 2].fill(0);
            let transport = packet.len() - usize::from(header.csum_start);
            let pseudo =
                checksum::pseudo(&recipe.source, &recipe.destination, recipe.protocol());
            let pseudo = checksum::fold(pseudo + transport as u64);
            packet[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
            let header = VnetHeader { gso_type: GSO_NONE, ..header };
            let got = split(&packet, &header, 1420).unwrap().remove(0);
            prop_assert_eq!(got, expected);
        }

        #[test]
        fn hostile_headers_give_an_error_or_packets(
            recipe in recipe(3000),
            size in 1u16..2000,
            bytes: [u8; 24],
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            keep: [bool; 5],
        ) {
            let (packet, mut good) = super_packet(&recipe, usize::from(size));
            let (mut packet, inside) = match keep[4] {
                false => (packet, 0),
                true => tunnel(&Recipe { tcp: None, ..recipe }, 0, &packet, false),
            };
            if keep[4] {
                good.gso_type |= GSO_TUNNEL_V4;
                good.csum_start += inside as u16;
                good.outer_transport = 20;
                good.inner_network = inside as u16;
            }
            let bad = VnetHeader::decode(&bytes);
            let header = VnetHeader {
                flags: if keep[0] { good.flags } else { bad.flags },
                gso_type: if keep[1] { good.gso_type } else { bad.gso_type },
                gso_size: if keep[2] { good.gso_size } else { bad.gso_size },
                csum_start: if keep[3] { good.csum_start } else { bad.csum_start },
                ..good
            };
            for (at, value) in flips {
                let at = at.index(packet.len().min(80));
                packet[at] = value;
            }
            let mut buffer = vec![0; HEADROOM];
            buffer.extend_from_slice(&packet);
            buffer.extend_from_slice(&[0; TAILROOM]);
            if let Ok(mut split) = Split::new(&mut buffer, packet.len(), &header, 1420) {
                while split.next_len().is_some() {
                    split.take();
                }
            }
        }
    }
}
