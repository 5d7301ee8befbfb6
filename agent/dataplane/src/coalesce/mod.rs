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

#![deny(clippy::indexing_slicing)]

use std::net::IpAddr;

use super::arena::WriteBatch;
use super::checksum;
use super::headers::{
    self, IpHeader, Ipv4, Ipv6, Layout, Network, Outer, TCP_ACK, TCP_ECE, TCP_HEADER, TCP_PSH, Tcp,
    TcpMut, Transport, UDP_HEADER, Udp, UdpMut,
};
use super::vnet::{
    FLAG_NEEDS_CSUM, FLAG_TUNNEL_CSUM, GSO_TCPV4, GSO_TCPV6, GSO_TUNNEL_V4, GSO_TUNNEL_V6,
    GSO_UDP_L4, VnetHeader,
};

/// Largest number of flows that are coalesced at a time. A new flow replaces the oldest.
const FLOWS: usize = 16;
/// Largest number of TCP segments in one super-packet.
pub(super) const TCP_PACKETS: usize = 128;
/// Largest number of UDP datagrams in one super-packet: older kernels accept at most 64.
const UDP_PACKETS: usize = 64;
/// Largest size of a super-packet in bytes, which the length field of IPv4 limits.
const FRAME_BYTES: usize = 65_535;

/// Kinds of packets that may be coalesced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Coalesce {
    /// True if TCP segments may be coalesced.
    pub tcp: bool,
    /// True if UDP datagrams may be coalesced.
    pub udp: bool,
    /// UDP tunnels of the host in which TCP segments may be coalesced.
    pub tunnels: TunnelPorts,
    /// UDP tunnels of the host whose datagrams are passed one by one: their sockets take no
    /// super-packet that does not say that it is a tunnel's.
    pub whole: TunnelPorts,
}

/// UDP ports on which the host itself decapsulates VXLAN or Geneve. 0 is an unused entry.
pub type TunnelPorts = [u16; 4];

/// Coalesces the packets of a batch into super-packets.
#[derive(Debug)]
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

    /// Adds the packet at bytes `start..start + header.total_len` of the batch, whose header is
    /// `header`.
    pub fn add(&mut self, batch: &mut WriteBatch, start: usize, header: &IpHeader) {
        let len = header.total_len;
        let packet = batch.bytes().get(start..start + len).unwrap_or_default();
        let Some(parsed) = self.parse(packet, header) else {
            // A fragment, or an IPv6 packet with extension headers, may belong to an open flow. The
            // flows between its addresses are closed, so that none of them overtakes it.
            if header.fragment || !header.is_v4() {
                self.close_between(batch, header);
            }
            batch.push(VnetHeader::default(), start, len);
            return;
        };
        if let Some(at) = self.flows.iter().rposition(|flow| flow.key == parsed.key) {
            if let Some(flow) = self.flows.get_mut(at)
                && flow.join(batch, start, &parsed)
            {
                if flow.is_full() {
                    self.flows.remove(at).close(batch);
                }
                return;
            }
            self.flows.remove(at).close(batch);
        }
        let frame = batch.push(VnetHeader::default(), start, len);
        let packet = batch.bytes().get(start..start + len).unwrap_or_default();
        if parsed.can_coalesce
            && let Some(flow) = Flow::new(packet, frame, start, &parsed)
        {
            if self.flows.len() == FLOWS {
                self.flows.remove(0).close(batch);
            }
            self.flows.push(flow);
        }
    }

    /// Completes the headers of all super-packets. Call once all packets of the batch are added.
    pub fn finish(&mut self, batch: &mut WriteBatch) {
        for flow in self.flows.drain(..) {
            flow.close(batch);
        }
    }

    fn close_between(&mut self, batch: &mut WriteBatch, header: &IpHeader) {
        let ends = (header.source, header.destination);
        let closed =
            self.flows.extract_if(.., |flow| (flow.key.source, flow.key.destination) == ends);
        closed.for_each(|flow| flow.close(batch));
    }

    /// Returns the properties of a packet. `None` if it is neither TCP nor UDP, or is a fragment.
    fn parse(&self, packet: &[u8], header: &IpHeader) -> Option<ParsedPacket> {
        let (key, (layout, plain)) = (Key::of(packet, header)?, layout(packet, header, 0)?);
        let allowed = match layout.protocol {
            Transport::Tcp => self.allowed.tcp,
            Transport::Udp => {
                let whole = &self.allowed.whole;
                let port = || Some(Udp::of(packet.get(layout.transport..)?)?.destination_port());
                self.allowed.udp && !port().is_some_and(|port| whole.contains(&port))
            }
        };
        let (layout, can_coalesce) = match self.inner_layout(packet, &layout) {
            Some(inside) if plain => inside,
            _ => (layout, plain && allowed),
        };
        let payload = packet.len().saturating_sub(layout.len);
        Some(ParsedPacket { key, layout, payload, can_coalesce: can_coalesce && payload > 0 })
    }

    /// Returns the layout of a TCP segment inside a tunnel of the host, and whether it may be
    /// coalesced. `None` if there is no such segment.
    fn inner_layout(&self, packet: &[u8], outer: &Layout) -> Option<(Layout, bool)> {
        if outer.protocol == Transport::Tcp {
            return None;
        }
        let port = Udp::of(packet.get(outer.transport..)?)?.destination_port();
        if port == 0 || !self.allowed.tunnels.contains(&port) {
            return None;
        }
        let at = outer.len + headers::tunnel_len(packet.get(outer.len..)?)?;
        let header = IpHeader::parse_whole(packet.get(at..)?)?;
        let (inside, plain) = layout(packet, &header, at)?;
        let Layout { network, transport: udp, has_checksum, .. } = *outer;
        let outer = Outer { network, udp, has_checksum };
        (inside.protocol == Transport::Tcp)
            .then_some((Layout { outer: Some(outer), ..inside }, plain))
    }
}

/// Returns the layout of the packet that begins at `at` and ends with `packet`, and whether its
/// headers allow coalescing. `None` if it is neither TCP nor UDP, or is a fragment.
fn layout(packet: &[u8], header: &IpHeader, at: usize) -> Option<(Layout, bool)> {
    if header.fragment {
        return None;
    }
    let protocol = Transport::of(header.protocol)?;
    let start = at + header.header_len;
    let transport = packet.get(start..)?;
    let mut has_checksum = true;
    let (len, fits) = match protocol {
        Transport::Tcp => match Tcp::of(transport) {
            Some(tcp) => {
                let flags = tcp.flags() & !(TCP_PSH | TCP_ECE);
                (tcp.header_len(), tcp.header_len() >= TCP_HEADER && flags == TCP_ACK)
            }
            // It is cut off, but the flow that its ports name must not overtake it.
            None => (TCP_HEADER, false),
        },
        Transport::Udp => {
            let udp = Udp::of(transport)?;
            has_checksum = udp.has_checksum();
            // Over IPv6 a missing checksum is an error that the kernel must detect.
            let fits = udp.total_len() == transport.len() && (has_checksum || header.is_v4());
            (UDP_HEADER, fits)
        }
    };
    let network = Network::new(at, header);
    let layout =
        Layout { outer: None, network, transport: start, protocol, has_checksum, len: start + len };
    // Packets with IPv4 options are too rare to be worth coalescing.
    Some((layout, fits && !header.has_options()))
}

impl Key {
    fn of(packet: &[u8], header: &IpHeader) -> Option<Self> {
        let ports = headers::ports(packet, header)?;
        let (source, destination) = (header.source, header.destination);
        Some(Self { source, destination, ports, protocol: header.protocol })
    }
}

impl Identification {
    /// Returns the progress after the first packet. It has no meaning on IPv6.
    fn of(header: &[u8]) -> Option<Self> {
        Some(Self { last: Ipv4::of(header)?.identification(), step: None })
    }

    /// Compares an IP header of two packets, except for addresses (compared elsewhere), length and
    /// checksum. If splitting would give the packet after `first` the header of `next`, returns the
    /// progress of the identification.
    fn continues(self, network: &Network, first: &[u8], next: &[u8]) -> Option<Self> {
        let (first, next) = (first.get(network.at..)?, next.get(network.at..)?);
        if !network.is_v4() {
            return Ipv6::of(first)?.is_like(Ipv6::of(next)?).then_some(self);
        }
        let (first, next) = (Ipv4::of(first)?, Ipv4::of(next)?);
        let last = next.identification();
        let step = last.wrapping_sub(self.last);
        let known = self.step.is_none_or(|known| known == step);
        // Splitting increments the identification. It has no meaning if fragmentation is forbidden,
        // and some senders then keep it constant.
        let fits = step == 1 || (step == 0 && first.dont_fragment());
        (first.is_like(next) && known && fits).then_some(Self { last, step: Some(step) })
    }
}

impl Flow {
    /// Returns the flow of its first packet, which is frame `frame` of the batch and begins at
    /// `start`.
    fn new(packet: &[u8], frame: usize, start: usize, first: &ParsedPacket) -> Option<Self> {
        let layout = first.layout;
        let (mut sequence, mut pushed) = (0, false);
        if layout.protocol == Transport::Tcp {
            let tcp = Tcp::of(packet.get(layout.transport..)?)?;
            (sequence, pushed) = (tcp.sequence(), tcp.flags() & TCP_PSH != 0);
        }
        Some(Self {
            key: first.key,
            frame,
            start,
            layout,
            size: first.payload,
            packets: 1,
            total: packet.len(),
            verified: false,
            sequence: sequence.wrapping_add(first.payload as u32),
            identification: Identification::of(packet.get(layout.network.at..)?)?,
            outer_identification: Identification::of(packet)?,
            pushed,
        })
    }

    /// Returns whether no packet can be appended any more.
    fn is_full(&self) -> bool {
        let limit = match self.layout.protocol {
            Transport::Tcp => TCP_PACKETS,
            Transport::Udp => UDP_PACKETS,
        };
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
        let place = |start, payload| batch.bytes().get(start..start + layout.len + payload);
        let (Some(first), Some(packet)) =
            (place(self.start, self.size), place(start, next.payload))
        else {
            return false;
        };
        let Some(same) = self.same_headers(first, packet) else { return false };
        if !self.verified && !layout.is_correct(first) {
            return false;
        }
        self.verified = true;
        if !layout.is_correct(packet) {
            return false;
        }
        (self.outer_identification, self.identification) = (same.outer, same.inner);
        self.pushed = same.pushed;
        self.sequence = self.sequence.wrapping_add(next.payload as u32);
        self.packets += 1;
        self.total += next.payload;
        batch.append(self.frame, start + layout.len, next.payload);
        true
    }

    /// Compares the headers of `packet`, which has the same layout, with those that splitting would
    /// give it. Returns the progress of the flow if they are equal.
    fn same_headers(&self, first: &[u8], packet: &[u8]) -> Option<Progress> {
        let Layout { outer, network, transport, protocol, len, .. } = self.layout;
        let mut progress = Progress {
            outer: self.outer_identification,
            inner: self.identification,
            pushed: false,
        };
        if let Some(outer) = outer {
            progress.outer = progress.outer.continues(&outer.network, first, packet)?;
            let between = outer.udp + UDP_HEADER..network.at;
            if first.get(between.clone())? != packet.get(between)? {
                return None;
            }
        }
        progress.inner = progress.inner.continues(&network, first, packet)?;
        if protocol == Transport::Tcp {
            let (first, packet) = (first.get(transport..len)?, packet.get(transport..len)?);
            let (tcp, next) = (Tcp::of(first)?, Tcp::of(packet)?);
            let options = first.get(TCP_HEADER..) == packet.get(TCP_HEADER..);
            if next.sequence() != self.sequence || !tcp.is_like(next) || !options {
                return None;
            }
            progress.pushed = next.flags() & TCP_PSH != 0;
        }
        Some(progress)
    }

    /// Writes the headers of the super-packet, if it has more than one packet.
    fn close(self, batch: &mut WriteBatch) {
        if self.packets == 1 {
            return;
        }
        let headers = batch.bytes_mut().get_mut(self.start..self.start + self.layout.len);
        if let Some(header) = headers.and_then(|headers| self.write_headers(headers)) {
            batch.set_header(self.frame, header);
        }
    }

    /// Writes the headers of the super-packet over those of its first packet. Returns its virtio
    /// header.
    fn write_headers(&self, packet: &mut [u8]) -> Option<VnetHeader> {
        let Layout { outer, network, transport, protocol, .. } = self.layout;
        let mut header = VnetHeader::default();
        if let Some(Outer { network: around, udp, has_checksum }) = outer {
            let udp_len = self.total - udp;
            around.set_len(packet, udp, self.total)?;
            let mut fields = UdpMut::of(packet.get_mut(udp..)?)?;
            fields.set_total_len(udp_len as u16);
            if has_checksum {
                let pseudo = around.pseudo(Transport::Udp) + udp_len as u64;
                fields.set_checksum(checksum::fold(pseudo));
                header.flags = FLAG_TUNNEL_CSUM;
            }
            header.gso_type = if around.is_v4() { GSO_TUNNEL_V4 } else { GSO_TUNNEL_V6 };
            header.outer_transport = udp as u16;
            header.inner_network = network.at as u16;
        }
        let transport_len = self.total - transport;
        network.set_len(packet, transport, self.total - network.at)?;
        let pseudo = checksum::fold(self.layout.pseudo(transport_len));
        let part = packet.get_mut(transport..)?;
        header.gso_type |= match protocol {
            Transport::Tcp => {
                let mut fields = TcpMut::of(part)?;
                if self.pushed {
                    fields.add_flags(TCP_PSH);
                }
                fields.set_checksum(pseudo);
                if network.is_v4() { GSO_TCPV4 } else { GSO_TCPV6 }
            }
            Transport::Udp => {
                let mut fields = UdpMut::of(part)?;
                fields.set_total_len(transport_len as u16);
                fields.set_checksum(pseudo);
                GSO_UDP_L4
            }
        };
        header.flags |= FLAG_NEEDS_CSUM;
        header.hdr_len = self.layout.len as u16;
        header.gso_size = self.size as u16;
        header.csum_start = transport as u16;
        header.csum_offset = protocol.checksum_at();
        Some(header)
    }
}

/// Progress of a flow that a packet continues.
struct Progress {
    /// Identification in the outer IP header of a tunnel.
    outer: Identification,
    /// Identification in the IP header.
    inner: Identification,
    /// True if the packet is a TCP segment with the PSH flag.
    pushed: bool,
}

#[cfg(test)]
mod tests;
