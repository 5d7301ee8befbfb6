//! Inbound packets: consecutive packets of one flow are coalesced into one super-packet for the
//! TUN, which the kernel then processes as one packet.
//!
//! Contract: splitting a super-packet gives the original packets, byte for byte, and the order
//! within a flow is kept. A packet with a wrong checksum is never coalesced. It is written
//! unchanged, so that the kernel can detect the error.
//!
//! The virtio header of a super-packet says that the checksum must still be completed, so the
//! kernel skips its verification. Therefore each packet is verified here before it is coalesced.
//! UDP datagrams over IPv4 may have no checksum, and a tunnel such as VXLAN sends them without.
//! Coalesced they get one, because the kernel does not split super-packets without a checksum.
//!
//! Nothing is copied: a super-packet consists of the first packet with rewritten headers, and the
//! payloads of the others (see [`WriteBatch`]).

use std::net::IpAddr;

use super::arena::WriteBatch;
use super::checksum;
use super::headers::{IpHeader, PROTOCOL_TCP, PROTOCOL_UDP};
use super::vnet::{
    FLAG_NEEDS_CSUM, FLAG_TUNNEL_CSUM, GSO_TCPV4, GSO_TCPV6, GSO_TUNNEL_V4, GSO_TUNNEL_V6,
    GSO_UDP_L4, VnetHeader,
};

/// Largest number of flows that are coalesced at a time. A new flow replaces the oldest.
const FLOWS: usize = 16;
/// Largest number of TCP segments in one super-packet.
const TCP_PACKETS: usize = 128;
/// Largest number of UDP datagrams in one super-packet: older kernels accept at most 64.
const UDP_PACKETS: usize = 64;
/// Largest size of a super-packet in bytes, which the length field of IPv4 limits.
const FRAME_BYTES: usize = 65_535;

const IPV4_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const UDP_LENGTH: usize = 4;
const UDP_CHECKSUM: usize = 6;
const TCP_ACK: u8 = 0x10;
const TCP_PSH: u8 = 0x08;
const TCP_ECE: u8 = 0x40;
/// "Don't fragment" flag of IPv4.
const IPV4_DF: u8 = 0x40;

/// Kinds of packets that may be coalesced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Coalesce {
    /// True if TCP segments may be coalesced.
    pub tcp: bool,
    /// True if UDP datagrams may be coalesced.
    pub udp: bool,
    /// UDP tunnels of the host in which TCP segments may be coalesced.
    pub tunnels: TunnelPorts,
}

/// UDP ports on which the host itself decapsulates VXLAN or Geneve. 0 is an unused entry.
pub type TunnelPorts = [u16; 4];

/// Coalesces the packets of a batch into super-packets.
#[derive(Debug, Default)]
pub struct Coalescer {
    allowed: Coalesce,
    /// Flows with a super-packet that may still grow. The newest is last.
    flows: Vec<Flow>,
}

/// Addresses, ports and protocol of a flow. Of a tunnel these are the outer ones, which differ for
/// each flow inside because a tunnel varies its source port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    ports: u32,
    protocol: u8,
}

/// Super-packet that may still grow.
#[derive(Debug)]
struct Flow {
    key: Key,
    /// Index of its frame in the batch.
    frame: usize,
    /// Position of the first packet in the batch.
    start: usize,
    /// Layout of the headers of each packet.
    layout: Layout,
    /// Payload of each packet except the last, in bytes.
    size: usize,
    /// Number of packets.
    packets: usize,
    /// Length of the super-packet in bytes.
    total: usize,
    /// True once the checksum of the first packet was verified.
    verified: bool,
    /// TCP sequence number that the next segment must have.
    sequence: u32,
    /// Progress of the identification in the IP header of the coalesced packets.
    identification: Identification,
    /// Progress of the identification in the outer IP header of a tunnel.
    outer_identification: Identification,
    /// True if the last TCP segment had the PSH flag, which ends the super-packet.
    pushed: bool,
}

/// Progress of the IPv4 identification within a flow.
#[derive(Debug, Clone, Copy)]
struct Identification {
    /// Identification of the last packet.
    last: u16,
    /// Difference between two packets. `None` before the second packet.
    step: Option<u16>,
}

/// Positions of the headers of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    /// Outer headers, if the coalesced packet is inside a tunnel.
    outer: Option<Outer>,
    network: Network,
    /// Position of the transport header.
    transport: usize,
    is_tcp: bool,
    /// True for UDP without a checksum.
    no_checksum: bool,
    /// Length of all headers in bytes.
    len: usize,
}

/// Outer headers of a packet in a tunnel: IP, UDP and the tunnel header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Outer {
    network: Network,
    /// Position of the UDP header.
    udp: usize,
    /// True if the UDP header has a checksum.
    checksum: bool,
}

/// Position and addresses of an IP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    /// Position of the header.
    at: usize,
    source: IpAddr,
    destination: IpAddr,
}

/// Properties of a packet that decide whether it is coalesced.
struct ParsedPacket {
    key: Key,
    layout: Layout,
    /// Length of the payload in bytes.
    payload: usize,
    /// True if the packet may be coalesced with others.
    can_coalesce: bool,
}

impl Coalescer {
    /// Creates a coalescer for the kinds of packets in `allowed`.
    pub fn new(allowed: Coalesce) -> Self {
        Self { allowed, flows: Vec::with_capacity(FLOWS) }
    }

    /// Sets the kinds of packets that are coalesced. Call it between batches.
    pub fn allow(&mut self, allowed: Coalesce) {
        self.allowed = allowed;
    }

    /// Adds the packet at bytes `start..start + inner.total_len` of the batch, whose header is
    /// `inner`.
    pub fn add(&mut self, batch: &mut WriteBatch, start: usize, inner: &IpHeader) {
        let len = inner.total_len;
        let Some(parsed) = self.parse(&batch.bytes()[start..start + len], inner) else {
            // A fragment, or an IPv6 packet with extension headers, may belong to an open flow. The
            // flows between its addresses are closed, so that none of them overtakes it.
            if inner.fragment || inner.source.is_ipv6() {
                self.close_between(batch, inner);
            }
            batch.push(VnetHeader::default(), start, len);
            return;
        };
        if let Some(at) = self.flows.iter().rposition(|flow| flow.key == parsed.key) {
            if self.flows[at].join(batch, start, &parsed) {
                if self.flows[at].is_full() {
                    self.flows.remove(at).close(batch);
                }
                return;
            }
            self.flows.remove(at).close(batch);
        }
        let frame = batch.push(VnetHeader::default(), start, len);
        if parsed.can_coalesce {
            if self.flows.len() == FLOWS {
                self.flows.remove(0).close(batch);
            }
            self.flows.push(Flow::new(batch.bytes(), frame, start, &parsed));
        }
    }

    /// Completes the headers of all super-packets. Call once all packets of the batch are added.
    pub fn finish(&mut self, batch: &mut WriteBatch) {
        for flow in self.flows.drain(..) {
            flow.close(batch);
        }
    }

    fn close_between(&mut self, batch: &mut WriteBatch, inner: &IpHeader) {
        let mut at = 0;
        while at < self.flows.len() {
            let key = &self.flows[at].key;
            if (key.source, key.destination) == (inner.source, inner.destination) {
                self.flows.remove(at).close(batch);
            } else {
                at += 1;
            }
        }
    }

    /// Returns the properties of a packet. `None` if it is neither TCP nor UDP, or is a fragment.
    fn parse(&self, packet: &[u8], inner: &IpHeader) -> Option<ParsedPacket> {
        let (key, (layout, plain)) = (Key::of(packet, inner)?, Layout::of(packet, inner, 0)?);
        let allowed = if layout.is_tcp { self.allowed.tcp } else { self.allowed.udp };
        let (layout, can_coalesce) = match self.inner_layout(packet, &layout) {
            Some(inside) if plain => inside,
            _ => (layout, plain && allowed),
        };
        let payload = packet.len().saturating_sub(layout.len);
        Some(ParsedPacket { key, layout, payload, can_coalesce: can_coalesce && payload > 0 })
    }

    /// Returns the layout of a TCP segment inside a tunnel of the host, and whether it may be
    /// coalesced. `None` if there is no such segment.
    fn inner_layout(&self, packet: &[u8], layout: &Layout) -> Option<(Layout, bool)> {
        if layout.is_tcp {
            return None;
        }
        let port = u16::from_be_bytes(*packet.get(layout.transport + 2..)?.first_chunk()?);
        if port == 0 || !self.allowed.tunnels.contains(&port) {
            return None;
        }
        let at = layout.len + tunnel_len(&packet[layout.len..])?;
        let inside = packet.get(at..)?;
        let inner = IpHeader::parse(inside).filter(|inner| inner.total_len == inside.len())?;
        let (inside, plain) = Layout::of(packet, &inner, at).filter(|(inside, _)| inside.is_tcp)?;
        let Layout { network, transport: udp, no_checksum, .. } = *layout;
        let outer = Outer { network, udp, checksum: !no_checksum };
        Some((Layout { outer: Some(outer), ..inside }, plain))
    }
}

/// Returns the length of a VXLAN (RFC 7348) or Geneve (RFC 8926) header and the Ethernet header
/// after it. `None` if the payload is neither, or contains no IP packet.
fn tunnel_len(payload: &[u8]) -> Option<usize> {
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

impl Key {
    fn of(packet: &[u8], inner: &IpHeader) -> Option<Self> {
        let ports = u32::from_be_bytes(*packet.get(inner.header_len..)?.first_chunk()?);
        let (source, destination) = (inner.source, inner.destination);
        Some(Self { source, destination, ports, protocol: inner.protocol })
    }
}

impl Layout {
    /// Returns the layout of the packet that begins at `at` and ends with `packet`, and whether its
    /// headers allow coalescing. `None` if it is neither TCP nor UDP, or is a fragment.
    fn of(packet: &[u8], inner: &IpHeader, at: usize) -> Option<(Self, bool)> {
        if inner.fragment {
            return None;
        }
        let start = at + inner.header_len;
        let transport = packet.get(start..)?;
        let mut no_checksum = false;
        let (header, fits) = match inner.protocol {
            PROTOCOL_TCP => {
                let header = usize::from(transport.get(12)? >> 4) * 4;
                let flags = transport.get(TCP_FLAGS)? & !(TCP_PSH | TCP_ECE);
                (header, header >= 20 && flags == TCP_ACK)
            }
            PROTOCOL_UDP => {
                let length = u16::from_be_bytes(*transport.get(4..)?.first_chunk()?);
                no_checksum = transport.get(UDP_CHECKSUM..UDP_HEADER)? == [0, 0];
                // Over IPv6 a missing checksum is an error that the kernel must detect.
                let fits = usize::from(length) == transport.len()
                    && !(no_checksum && inner.source.is_ipv6());
                (UDP_HEADER, fits)
            }
            _ => return None,
        };
        // Packets with IPv4 options are too rare to be worth coalescing.
        let plain = inner.source.is_ipv6() || inner.header_len == IPV4_HEADER;
        let layout = Self {
            outer: None,
            network: Network { at, source: inner.source, destination: inner.destination },
            transport: start,
            is_tcp: inner.protocol == PROTOCOL_TCP,
            no_checksum,
            len: start + header,
        };
        Some((layout, fits && plain))
    }

    fn is_v4(&self) -> bool {
        self.network.source.is_ipv4()
    }

    /// Returns the partial checksum of the pseudo-header for `transport_len` bytes of transport
    /// header and payload.
    fn pseudo(&self, transport_len: usize) -> u64 {
        let protocol = if self.is_tcp { PROTOCOL_TCP } else { PROTOCOL_UDP };
        self.network.pseudo(protocol, transport_len)
    }

    /// Returns whether the checksums of a packet are correct.
    fn is_correct(&self, packet: &[u8]) -> bool {
        let is_correct = |sum: u64| checksum::fold(sum) == 0xffff;
        let (headers, transport) = packet.split_at(self.transport);
        let network = &headers[self.network.at..];
        if self.is_v4() && !is_correct(checksum::add(0, network)) {
            return false;
        }
        if self.no_checksum {
            return true;
        }
        let payload_sum = checksum::add(0, transport);
        if let Some(outer) = self.outer {
            let header = &headers[..outer.udp];
            if outer.network.source.is_ipv4() && !is_correct(checksum::add(0, header)) {
                return false;
            }
            // Every header has an even number of bytes, so the sum of the inner bytes is a part of
            // the outer sum.
            let all = checksum::add(payload_sum, &headers[outer.udp..]);
            let pseudo = outer.network.pseudo(PROTOCOL_UDP, packet.len() - outer.udp);
            if outer.checksum && !is_correct(pseudo + all) {
                return false;
            }
        }
        is_correct(self.pseudo(transport.len()) + payload_sum)
    }
}

impl Network {
    /// Returns the partial checksum of the pseudo-header for `transport_len` bytes of transport
    /// header and payload.
    fn pseudo(&self, protocol: u8, transport_len: usize) -> u64 {
        checksum::pseudo(&self.source, &self.destination, protocol) + transport_len as u64
    }

    /// Compares this header of two packets, except for addresses (compared elsewhere), length and
    /// checksum. If splitting would give the packet after `first` the header of `next`, returns the
    /// progress of the identification.
    fn continues(&self, id: Identification, first: &[u8], next: &[u8]) -> Option<Identification> {
        let (first, next) = (&first[self.at..], &next[self.at..]);
        if self.source.is_ipv4() {
            return id.continues(first, next);
        }
        // Compares version, traffic class and flow label, then next header and hop limit.
        (first[..4] == next[..4] && first[6..8] == next[6..8]).then_some(id)
    }

    /// Sets the length in this header, which ends at `transport`, for an IP packet of `len` bytes,
    /// and its checksum.
    fn write_length(&self, packet: &mut [u8], transport: usize, len: usize) {
        let header = &mut packet[self.at..transport];
        if self.source.is_ipv4() {
            put_u16(header, 2, len);
            put_u16(header, 10, 0);
            let sum = !checksum::fold(checksum::add(0, header));
            put_u16(header, 10, sum.into());
        } else {
            put_u16(header, 4, len - header.len());
        }
    }
}

impl Identification {
    fn of(header: &[u8]) -> Self {
        Self { last: identification(header), step: None }
    }

    fn continues(self, first: &[u8], next: &[u8]) -> Option<Self> {
        // Compares type of service, then flags, time to live and protocol.
        let same = first[1] == next[1] && first[6..10] == next[6..10];
        let last = identification(next);
        let step = last.wrapping_sub(self.last);
        let known = self.step.is_none_or(|known| known == step);
        // Splitting increments the identification. It has no meaning if fragmentation is forbidden,
        // and some senders then keep it constant.
        let fits = step == 1 || (step == 0 && first[6] & IPV4_DF != 0);
        (same && known && fits).then_some(Self { last, step: Some(step) })
    }
}

impl Flow {
    fn new(bytes: &[u8], frame: usize, start: usize, first: &ParsedPacket) -> Self {
        let layout = first.layout;
        let packet = &bytes[start..start + layout.len + first.payload];
        let transport = &packet[layout.transport..];
        let is_tcp = layout.is_tcp;
        let sequence = if is_tcp { sequence(transport) } else { 0 };
        Self {
            key: first.key,
            frame,
            start,
            layout,
            size: first.payload,
            packets: 1,
            total: packet.len(),
            verified: false,
            sequence: sequence.wrapping_add(first.payload as u32),
            identification: Identification::of(&packet[layout.network.at..]),
            outer_identification: Identification::of(packet),
            pushed: is_tcp && transport[TCP_FLAGS] & TCP_PSH != 0,
        }
    }

    /// Returns whether no packet can be appended any more.
    fn is_full(&self) -> bool {
        let limit = if self.layout.is_tcp { TCP_PACKETS } else { UDP_PACKETS };
        let shorter = self.total - self.layout.len < self.size * self.packets;
        self.packets >= limit || self.pushed || shorter
    }

    /// Appends the packet if it continues this super-packet. Returns whether it did.
    fn join(&mut self, batch: &mut WriteBatch, start: usize, next: &ParsedPacket) -> bool {
        if !next.can_coalesce
            || self.is_full()
            || next.layout != self.layout
            || next.payload > self.size
            || self.total + next.payload > FRAME_BYTES
        {
            return false;
        }
        let layout = self.layout;
        let bytes = batch.bytes();
        let first = &bytes[self.start..self.start + layout.len + self.size];
        let packet = &bytes[start..start + layout.len + next.payload];
        let Some((outer, inner)) = self.same_headers(first, packet) else { return false };
        if !self.verified && !layout.is_correct(first) {
            return false;
        }
        self.verified = true;
        if !layout.is_correct(packet) {
            return false;
        }
        (self.outer_identification, self.identification) = (outer, inner);
        self.pushed = layout.is_tcp && packet[layout.transport + TCP_FLAGS] & TCP_PSH != 0;
        self.sequence = self.sequence.wrapping_add(next.payload as u32);
        self.packets += 1;
        self.total += next.payload;
        batch.append(self.frame, start + layout.len, next.payload);
        true
    }

    /// Compares the headers of `packet`, which has the same layout, with those that splitting would
    /// give it. If they are equal, returns the progress of the outer and of the inner
    /// identification.
    fn same_headers(
        &self,
        first: &[u8],
        packet: &[u8],
    ) -> Option<(Identification, Identification)> {
        let Layout { outer, network, transport, len, .. } = self.layout;
        let mut outer_identification = self.outer_identification;
        if let Some(outer) = outer {
            outer_identification = outer.network.continues(outer_identification, first, packet)?;
            let between = outer.udp + UDP_HEADER..network.at;
            if first[between.clone()] != packet[between] {
                return None;
            }
        }
        let identification = network.continues(self.identification, first, packet)?;
        let (first, packet) = (&first[transport..len], &packet[transport..len]);
        if self.layout.is_tcp {
            let flags = |tcp: &[u8]| tcp[TCP_FLAGS] & !TCP_PSH;
            let same = sequence(packet) == self.sequence
                && first[..4] == packet[..4]
                && first[8..13] == packet[8..13]
                && flags(first) == flags(packet)
                && first[14..16] == packet[14..16]
                && first[18..] == packet[18..];
            if !same {
                return None;
            }
        }
        Some((outer_identification, identification))
    }

    /// Writes the headers of the super-packet, if it has more than one packet.
    fn close(self, batch: &mut WriteBatch) {
        if self.packets == 1 {
            return;
        }
        let Layout { outer, network, transport, is_tcp, .. } = self.layout;
        let packet = &mut batch.bytes_mut()[self.start..self.start + self.layout.len];
        let mut header = VnetHeader::default();
        if let Some(Outer { network: around, udp, checksum }) = outer {
            let udp_len = self.total - udp;
            around.write_length(packet, udp, self.total);
            put_u16(packet, udp + UDP_LENGTH, udp_len);
            if checksum {
                let pseudo = checksum::fold(around.pseudo(PROTOCOL_UDP, udp_len));
                put_u16(packet, udp + UDP_CHECKSUM, pseudo.into());
                header.flags = FLAG_TUNNEL_CSUM;
            }
            let is_v4 = around.source.is_ipv4();
            header.gso_type = if is_v4 { GSO_TUNNEL_V4 } else { GSO_TUNNEL_V6 };
            header.outer_transport = udp as u16;
            header.inner_network = network.at as u16;
        }
        let transport_len = self.total - transport;
        network.write_length(packet, transport, self.total - network.at);
        let part = &mut packet[transport..];
        let (gso_type, csum_offset) = if is_tcp {
            if self.pushed {
                part[TCP_FLAGS] |= TCP_PSH;
            }
            (if self.layout.is_v4() { GSO_TCPV4 } else { GSO_TCPV6 }, TCP_CHECKSUM)
        } else {
            put_u16(part, UDP_LENGTH, transport_len);
            (GSO_UDP_L4, UDP_CHECKSUM)
        };
        let pseudo = checksum::fold(self.layout.pseudo(transport_len));
        put_u16(part, csum_offset, pseudo.into());
        header.flags |= FLAG_NEEDS_CSUM;
        header.gso_type |= gso_type;
        header.hdr_len = self.layout.len as u16;
        header.gso_size = self.size as u16;
        header.csum_start = transport as u16;
        header.csum_offset = csum_offset as u16;
        batch.set_header(self.frame, header);
    }
}

fn sequence(tcp: &[u8]) -> u32 {
    u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]])
}

/// Returns the identification of an IPv4 header. The value has no meaning on IPv6.
fn identification(header: &[u8]) -> u16 {
    u16::from_be_bytes([header[4], header[5]])
}

fn put_u16(bytes: &mut [u8], at: usize, value: usize) {
    bytes[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
}

#[cfg(test)]
mod tests;
