//! Outbound packets: completes the checksums and the segmentation that the kernel left undone,
//! while the segments are encrypted.
//!
//! Contract: a packet from the TUN comes with its virtio header. Segments come out one at a time,
//! in the order of the stream. Each is a whole IP packet with correct checksums, padded for
//! WireGuard. Hostile or inconsistent headers give an error, never a panic.
//!
//! Segments are written to another buffer, and the checksum of a payload is computed while it is copied;
//! or, for an engine that copies while it encrypts, a super-packet is split in place: the headers of each
//! segment overwrite the end of the previous payload, which is encrypted by then.

#![deny(clippy::indexing_slicing)]

use towline_wireguard::{PADDING, Segments};

use super::arena::{HEADROOM, TAILROOM};
use super::checksum;
use super::drops::DropReason;
use super::headers::{
    IpHeader, Ipv4, Ipv4Mut, Ipv6Mut, Layout, Network, Outer, TCP_CWR, TCP_FIN, TCP_PSH, Tcp,
    TcpMut, Transport, UDP_HEADER, UdpMut,
};
use super::vnet::{
    FLAG_NEEDS_CSUM, FLAG_TUNNEL_CSUM, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_TUNNEL_V4,
    GSO_TUNNEL_V6, GSO_UDP_L4, VnetHeader,
};

/// Largest total length of the headers of a super-packet, in bytes: outer headers, a tunnel header
/// with options, and inner headers.
const HEADERS: usize = 448;

/// Packet from the TUN as a sequence of segments.
#[derive(Debug)]
pub struct Split<'a> {
    /// Packet with the free bytes around it.
    bytes: &'a mut [u8],
    /// Largest segment that the way to the peer takes, in bytes; 1,280 where it takes less, which it
    /// then takes in fragments. No segment is padded beyond it.
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
    /// Positions of the headers. Those of the packet that is split are inside a tunnel, such as
    /// VXLAN, if there are outer ones.
    layout: Layout,
    /// IP header of the packet that is split.
    ip: SegmentIp,
    /// Outer IP header. Unused outside a tunnel.
    outer_ip: SegmentIp,
    /// Partial checksum of the pseudo-header without the length.
    pseudo: u64,
    /// Partial checksum of the pseudo-header of the outer UDP header without the length.
    outer_pseudo: u64,
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
    /// Payload bytes that the padding of the previous segment overwrote.
    covered: Covered,
}

/// Values of the IP header that is written for each segment.
#[derive(Debug, Default)]
struct SegmentIp {
    /// Length of the header in bytes.
    len: usize,
    /// Partial checksum of the IPv4 header without length, identification and checksum.
    sum: u64,
    /// IPv4 identification of the next segment.
    identification: u16,
}

/// Copy of payload bytes that padding overwrites.
#[derive(Debug, Default)]
struct Covered {
    bytes: [u8; TAILROOM],
    len: usize,
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
        let packet = bytes.get_mut(HEADROOM..HEADROOM + len).ok_or(DropReason::Unsplittable)?;
        if header.gso_type == GSO_NONE {
            if header.flags & FLAG_NEEDS_CSUM != 0 {
                complete_checksum(packet, header).ok_or(DropReason::Unsplittable)?;
            }
            return Ok(Self { bytes, mtu, state: State::Whole(len) });
        }
        let super_packet = SuperPacket::new(packet, header).ok_or(DropReason::Unsplittable)?;
        Ok(Self { bytes, mtu, state: State::SuperPacket(super_packet) })
    }

    /// Writes the next segment with its padding. Returns its offset and its length. `None` if there
    /// is none.
    fn write_next(&mut self) -> Option<(usize, usize)> {
        let (start, len) = match &mut self.state {
            State::Whole(len) => (HEADROOM, *len),
            State::SuperPacket(super_packet) => super_packet.write_next(self.bytes)?,
            State::Done => return None,
        };
        let padded = padded(len, self.mtu);
        let padding = self.bytes.get_mut(start + len..start + padded)?;
        match &mut self.state {
            State::SuperPacket(super_packet) if super_packet.next < super_packet.end => {
                super_packet.covered.save(padding);
            }
            _ => self.state = State::Done,
        }
        padding.fill(0);
        Some((start, padded))
    }

    /// Writes the next segment with its padding to the start of `to`. Returns its length. `None` if
    /// there is none, or if `to` is too short.
    fn copy_next(&mut self, to: &mut [u8]) -> Option<usize> {
        let len = match &mut self.state {
            State::Whole(len) => {
                let packet = self.bytes.get(HEADROOM..HEADROOM + *len)?;
                to.get_mut(..*len)?.copy_from_slice(packet);
                *len
            }
            State::SuperPacket(super_packet) => super_packet.copy_next(self.bytes, to)?,
            State::Done => return None,
        };
        let padded = padded(len, self.mtu);
        to.get_mut(len..padded)?.fill(0);
        if !matches!(&self.state, State::SuperPacket(rest) if rest.next < rest.end) {
            self.state = State::Done;
        }
        Some(padded)
    }
}

impl Segments for Split<'_> {
    fn next_len(&self) -> Option<usize> {
        match &self.state {
            State::Whole(len) => Some(padded(*len, self.mtu)),
            State::SuperPacket(super_packet) => {
                Some(padded(super_packet.layout.len + super_packet.next_payload(), self.mtu))
            }
            State::Done => None,
        }
    }

    fn take(&mut self) -> &[u8] {
        let Some((start, len)) = self.write_next() else {
            self.state = State::Done;
            return &[];
        };
        self.bytes.get(start..start + len).unwrap_or_default()
    }

    fn write(&mut self, to: &mut [u8]) -> usize {
        self.copy_next(to).unwrap_or_else(|| {
            self.state = State::Done;
            0
        })
    }
}

impl SuperPacket {
    fn new(packet: &[u8], header: &VnetHeader) -> Option<Self> {
        let whole = IpHeader::parse_whole(packet)?;
        let tunnel = header.gso_type & (GSO_TUNNEL_V4 | GSO_TUNNEL_V6);
        let (at, ip) = match tunnel {
            0 => (0, whole),
            GSO_TUNNEL_V4 | GSO_TUNNEL_V6 if whole.is_v4() == (tunnel == GSO_TUNNEL_V4) => {
                let at = usize::from(header.inner_network);
                (at, IpHeader::parse_whole(packet.get(at..)?)?)
            }
            _ => return None,
        };
        let protocol = match header.gso_type & !(GSO_ECN | tunnel) {
            GSO_TCPV4 if ip.is_v4() => Transport::Tcp,
            GSO_TCPV6 if !ip.is_v4() => Transport::Tcp,
            GSO_UDP_L4 => Transport::Udp,
            _ => return None,
        };
        let transport = usize::from(header.csum_start);
        if header.flags & FLAG_NEEDS_CSUM == 0
            || header.gso_size == 0
            || header.csum_offset != protocol.checksum_at()
            || !ip.may_precede(transport.checked_sub(at)?, protocol)
        {
            return None;
        }
        let len = transport + protocol.header_len(packet.get(transport..)?)?;
        let mut headers = [0; HEADERS];
        headers.get_mut(..len)?.copy_from_slice(packet.get(..len)?);
        let mut layout = Layout {
            outer: None,
            network: Network::new(at, &ip),
            transport,
            protocol,
            has_checksum: true,
            len,
        };
        let inner_ip = SegmentIp::new(&mut headers, at, &ip)?;
        let (mut outer_ip, mut outer_pseudo) = (SegmentIp::default(), 0);
        if tunnel != 0 {
            let outer = outer(&whole, header, &layout)?;
            let mut udp = UdpMut::of(headers.get_mut(outer.udp..)?)?;
            udp.set_total_len(0);
            udp.set_checksum(0);
            outer_ip = SegmentIp::new(&mut headers, 0, &whole)?;
            outer_pseudo = outer.network.pseudo(Transport::Udp);
            layout.outer = Some(outer);
        }
        let (mut sequence, mut flags) = (0, 0);
        let part = headers.get_mut(transport..len)?;
        match protocol {
            Transport::Tcp => {
                let tcp = Tcp::of(part)?;
                (sequence, flags) = (tcp.sequence(), tcp.flags());
                let mut tcp = TcpMut::of(part)?;
                tcp.set_sequence(0);
                tcp.set_flags(0);
                tcp.set_checksum(0);
            }
            Transport::Udp => {
                let mut udp = UdpMut::of(part)?;
                udp.set_total_len(0);
                udp.set_checksum(0);
            }
        }
        let pseudo = layout.pseudo(0);
        let transport_sum = checksum::add(pseudo, part);
        Some(Self {
            headers,
            layout,
            ip: inner_ip,
            outer_ip,
            pseudo,
            outer_pseudo,
            transport_sum,
            sequence,
            flags,
            size: usize::from(header.gso_size),
            next: HEADROOM + len,
            end: HEADROOM + packet.len(),
            first: true,
            covered: Covered::default(),
        })
    }

    fn next_payload(&self) -> usize {
        self.size.min(self.end - self.next)
    }

    /// Writes the headers of the next segment before its payload, in place. Returns the offset of the
    /// segment and its length.
    fn write_next(&mut self, bytes: &mut [u8]) -> Option<(usize, usize)> {
        self.uncover(bytes)?;
        let headers_len = self.layout.len;
        let start = self.next.checked_sub(headers_len)?;
        let len = headers_len + self.next_payload();
        let segment = bytes.get_mut(start..start + len)?;
        let (headers, payload) = segment.split_at_mut_checked(headers_len)?;
        let payload_sum = checksum::add(self.transport_sum, payload);
        self.write_headers(headers, payload_sum)?;
        Some((start, len))
    }

    /// Writes the next segment to the start of `to`. Returns its length.
    fn copy_next(&mut self, bytes: &mut [u8], to: &mut [u8]) -> Option<usize> {
        self.uncover(bytes)?;
        let headers_len = self.layout.len;
        let len = headers_len + self.next_payload();
        let payload = bytes.get(self.next..self.next + self.next_payload())?;
        let (headers, copy) = to.get_mut(..len)?.split_at_mut_checked(headers_len)?;
        let payload_sum = checksum::copy_and_add(self.transport_sum, payload, copy);
        self.write_headers(headers, payload_sum)?;
        Some(len)
    }

    /// Restores the payload bytes that the padding of the previous segment overwrote.
    fn uncover(&mut self, bytes: &mut [u8]) -> Option<()> {
        self.covered.restore(bytes.get_mut(self.next..)?)?;
        self.covered.len = 0;
        Some(())
    }

    /// Writes the headers of the next segment, and goes on to the segment after it. `payload_sum` is
    /// the partial checksum of the transport header and the payload.
    fn write_headers(&mut self, headers: &mut [u8], payload_sum: u64) -> Option<()> {
        let Layout { network, transport, protocol, len: headers_len, .. } = self.layout;
        let (payload_start, payload_len) = (self.next, self.next_payload());
        let len = headers_len + payload_len;
        headers.copy_from_slice(self.headers.get(..headers_len)?);

        self.ip.write(headers.get_mut(network.at..)?, network.is_v4(), payload_len)?;
        let transport_len = (len - transport) as u64;
        let part = headers.get_mut(transport..)?;
        match protocol {
            Transport::Tcp => {
                let mut flags = self.flags;
                if !self.first {
                    flags &= !TCP_CWR;
                }
                if payload_start + payload_len != self.end {
                    flags &= !(TCP_FIN | TCP_PSH);
                }
                let sum = payload_sum + transport_len + u64::from(self.sequence) + u64::from(flags);
                let mut tcp = TcpMut::of(part)?;
                tcp.set_sequence(self.sequence);
                tcp.set_flags(flags);
                tcp.set_checksum(!checksum::fold(sum));
            }
            Transport::Udp => {
                // The length is summed twice: it is in the header and in the pseudo-header.
                let sum = payload_sum + 2 * transport_len;
                let mut udp = UdpMut::of(part)?;
                udp.set_total_len(transport_len as u16);
                udp.set_checksum(not_zero(!checksum::fold(sum)));
            }
        }
        if let Some(outer) = &self.layout.outer {
            // The checksum is complete, so transport header and payload now add up to the
            // complement of the pseudo-header.
            let inside = !checksum::fold(self.pseudo + transport_len);
            self.outer_ip.write(headers, outer.network.is_v4(), payload_len)?;
            let udp_len = len - outer.udp;
            let before = headers.get_mut(outer.udp..transport)?;
            UdpMut::of(before)?.set_total_len(udp_len as u16);
            if outer.has_checksum {
                let sum = self.outer_pseudo + udp_len as u64 + u64::from(inside);
                let sum = checksum::fold(checksum::add(sum, before));
                UdpMut::of(before)?.set_checksum(not_zero(!sum));
            }
        }

        self.sequence = self.sequence.wrapping_add(payload_len as u32);
        self.next += payload_len;
        self.first = false;
        Some(())
    }
}

/// Returns the outer headers of a super-packet in a UDP tunnel, which has the outer IP header
/// `whole` and, inside, the headers of `layout`. `None` if the virtio header does not match them.
fn outer(whole: &IpHeader, header: &VnetHeader, layout: &Layout) -> Option<Outer> {
    let udp = usize::from(header.outer_transport);
    // If inner and outer headers have the same 16-bit alignment, the inner sum is a part of the
    // outer sum.
    let aligned = layout.transport.checked_sub(udp)?.is_multiple_of(2);
    let inside = layout.network.at >= udp + UDP_HEADER;
    let has_checksum = header.flags & FLAG_TUNNEL_CSUM != 0;
    (whole.may_precede(udp, Transport::Udp) && inside && aligned).then(|| Outer {
        network: Network::new(0, whole),
        udp,
        has_checksum,
    })
}

impl SegmentIp {
    /// Reads the header at `at` and clears the fields that [`SegmentIp::write`] sets.
    fn new(headers: &mut [u8], at: usize, ip: &IpHeader) -> Option<Self> {
        let len = ip.header_len;
        let header = headers.get_mut(at..at + len)?;
        let (mut identification, mut sum) = (0, 0);
        if ip.is_v4() {
            identification = Ipv4::of(header)?.identification();
            let mut fields = Ipv4Mut::of(header)?;
            fields.set_total_len(0);
            fields.set_identification(0);
            fields.set_checksum(0);
            sum = checksum::add(0, header);
        }
        Some(Self { len, sum, identification })
    }

    /// Completes the header of a segment, with the next identification. `headers` are this header
    /// and all after it, before `payload` bytes.
    fn write(&mut self, headers: &mut [u8], is_v4: bool, payload: usize) -> Option<()> {
        let total = headers.len() + payload;
        if is_v4 {
            let sum = self.sum + total as u64 + u64::from(self.identification);
            let mut fields = Ipv4Mut::of(headers)?;
            fields.set_total_len(total as u16);
            fields.set_identification(self.identification);
            fields.set_checksum(!checksum::fold(sum));
            self.identification = self.identification.wrapping_add(1);
        } else {
            Ipv6Mut::of(headers)?.set_payload_len((total - self.len) as u16);
        }
        Some(())
    }
}

impl Covered {
    /// Saves bytes, at most [`TAILROOM`].
    fn save(&mut self, bytes: &[u8]) {
        if let Some(saved) = self.bytes.get_mut(..bytes.len()) {
            saved.copy_from_slice(bytes);
            self.len = bytes.len();
        }
    }

    /// Writes the saved bytes to the start of `bytes`.
    fn restore(&self, bytes: &mut [u8]) -> Option<()> {
        bytes.get_mut(..self.len)?.copy_from_slice(self.bytes.get(..self.len)?);
        Some(())
    }
}

/// Returns the length with WireGuard's padding to 16 bytes, but not beyond `mtu`.
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
        assert_eq!(copied(packet, header, mtu)?, segments, "copied instead of split in place");
        Ok(segments)
    }

    /// Returns the same as [`split`], with segments that are written to another buffer.
    fn copied(packet: &[u8], header: &VnetHeader, mtu: usize) -> Result<Vec<Vec<u8>>, DropReason> {
        let mut bytes = [&[0xaa; HEADROOM][..], packet, &[0xaa; TAILROOM][..]].concat();
        let mut split = Split::new(&mut bytes, packet.len(), header, mtu)?;
        let mut segments = Vec::new();
        while let Some(len) = split.next_len() {
            let mut to = vec![0x55; len + 1];
            assert_eq!(split.write(&mut to), len);
            assert_eq!(to[len], 0x55, "nothing after the segment is written");
            let inner = IpHeader::parse(&to).expect("a packet");
            assert!(to[inner.total_len..len].iter().all(|byte| *byte == 0));
            segments.push(to[..inner.total_len].to_vec());
        }
        assert_eq!(split.write(&mut [0; 64]), 0);
        Ok(segments)
    }

    #[test]
    fn segments_in_place_and_copied_ones_may_alternate() {
        let recipe = Recipe {
            source: [10, 0, 0, 1].into(),
            destination: [10, 0, 0, 2].into(),
            ports: (1, 2),
            tcp: Some(Tcp {
                sequence: 7,
                acknowledged: 8,
                flags: TCP_PSH,
                window: 9,
                options: Vec::new(),
            }),
            identification: 3,
            traffic_class: 0,
            hops: 64,
            payload: (0..250u8).cycle().take(5_000).collect(),
        };
        let (packet, header) = super_packet(&recipe, 1_001);
        let expected = split(&packet, &header, 1_420).unwrap();
        let mut bytes = [&[0; HEADROOM][..], &packet[..], &[0; TAILROOM][..]].concat();
        let mut split = Split::new(&mut bytes, packet.len(), &header, 1_420).unwrap();
        for (number, segment) in expected.iter().enumerate() {
            let mut to = [0; 1_500];
            let written = if number % 2 == 0 {
                let taken = split.take();
                to[..taken.len()].copy_from_slice(taken);
                taken.len()
            } else {
                split.write(&mut to)
            };
            assert!(written >= segment.len());
            assert_eq!(&to[..segment.len()], segment, "segment {number}");
        }
        assert_eq!(split.next_len(), None);
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
            let at = outer.headers().0 + usize::from(Transport::Udp.checksum_at());
            packet[at..at + 2].fill(0);
        }
        (packet, inside)
    }

    /// Returns a packet with the virtio header of a super-packet from the kernel.
    fn super_packet(recipe: &Recipe, size: usize) -> (Vec<u8>, VnetHeader) {
        let packet = recipe.build();
        let (ip_len, headers_len) = recipe.headers();
        let transport = if recipe.tcp.is_some() { Transport::Tcp } else { Transport::Udp };
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
            csum_offset: transport.checksum_at(),
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
            let mut to = vec![0; buffer.len()];
            if let Ok(mut split) = Split::new(&mut buffer, packet.len(), &header, 1420) {
                while split.next_len().is_some() {
                    split.write(&mut to);
                }
            }
        }
    }
}
