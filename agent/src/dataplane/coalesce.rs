//! Inbound: packets of one flow that follow one another become one super-packet for the TUN,
//! which the kernel then takes through its stack at once.
//!
//! Contract: splitting a super-packet gives back the packets it was made of, byte for byte; the
//! order within a flow is kept; a packet whose checksum is wrong is never joined to another, but
//! written as it is, for the kernel to see what is wrong with it.
//!
//! A super-packet says that its checksum is yet to be completed, which makes the kernel skip the
//! verification. So each part is verified here before it is joined. UDP datagrams over IPv4 may
//! have none; joined they get one, since the kernel does not split super-packets without: a
//! tunnel such as VXLAN sends them so.
//!
//! Nothing is copied: a super-packet is the first packet, its headers rewritten, and the payloads
//! of the others (see [`WriteBatch`]).

use std::net::IpAddr;

use super::arena::WriteBatch;
use super::checksum;
use super::packet::{Inner, PROTOCOL_TCP, PROTOCOL_UDP};
use super::vnet::{FLAG_NEEDS_CSUM, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, VnetHeader};

/// Flows that are joined at a time; the one that was quiet longest goes.
const FLOWS: usize = 16;
/// Packets in one super-packet. UDP may have 64 at most on older kernels.
const TCP_PACKETS: usize = 128;
const UDP_PACKETS: usize = 64;
/// Bytes of one super-packet: what the length field of IPv4 can say.
const FRAME_BYTES: usize = 65_535;

const IPV4_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
const TCP_ACK: u8 = 0x10;
const TCP_PSH: u8 = 0x08;
const TCP_ECE: u8 = 0x40;
/// IPv4: do not fragment.
const IPV4_DF: u8 = 0x40;

/// What may be joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Coalesce {
    /// TCP segments.
    pub tcp: bool,
    /// UDP datagrams.
    pub udp: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Coalescer {
    allowed: Coalesce,
    /// The newest last.
    flows: Vec<Flow>,
}

/// Addresses, ports, protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    ports: u32,
    protocol: u8,
}

/// A super-packet that still grows.
#[derive(Debug)]
struct Flow {
    key: Key,
    /// Its number in the batch.
    frame: usize,
    /// The first packet's place, and its headers.
    start: usize,
    ip_len: usize,
    headers_len: usize,
    /// Payload of the first packet, and so of all but the last.
    size: usize,
    packets: usize,
    /// Bytes altogether.
    total: usize,
    /// The first packet's checksum was found correct.
    verified: bool,
    /// UDP over IPv4 without a checksum.
    no_checksum: bool,
    /// TCP: the sequence number that continues it.
    sequence: u32,
    /// IPv4: the last packet's, and by how much it grows; `None`: not known yet.
    identification: u16,
    step: Option<u16>,
    /// TCP: the last packet had it.
    pushed: bool,
}

/// What a packet is, as far as joining goes.
struct Candidate {
    key: Key,
    ip_len: usize,
    headers_len: usize,
    payload: usize,
    /// May have others joined to it, and be joined.
    joins: bool,
    /// UDP over IPv4 without a checksum.
    no_checksum: bool,
}

impl Coalescer {
    /// Joins what `allowed` says.
    pub fn new(allowed: Coalesce) -> Self {
        Self { allowed, flows: Vec::with_capacity(FLOWS) }
    }

    /// Changes what is joined. Call between batches.
    pub fn allow(&mut self, allowed: Coalesce) {
        self.allowed = allowed;
    }

    /// Bytes `start..start + inner.total_len` of the batch are a packet, whose header is `inner`.
    pub fn add(&mut self, batch: &mut WriteBatch, start: usize, inner: &Inner) {
        let len = inner.total_len;
        let Some(candidate) = self.look(&batch.bytes()[start..start + len], inner) else {
            // Whatever it is, it must not be overtaken by its own flow. Only for parts of
            // datagrams is it unknown which flow that is.
            if inner.fragment || inner.source.is_ipv6() {
                self.close_between(batch, inner);
            }
            batch.push(VnetHeader::default(), start, len);
            return;
        };
        if let Some(at) = self.flows.iter().rposition(|flow| flow.key == candidate.key) {
            if self.flows[at].join(batch, start, &candidate) {
                if self.flows[at].is_full() {
                    self.flows.remove(at).close(batch);
                }
                return;
            }
            self.flows.remove(at).close(batch);
        }
        let frame = batch.push(VnetHeader::default(), start, len);
        if candidate.joins {
            if self.flows.len() == FLOWS {
                self.flows.remove(0).close(batch);
            }
            self.flows.push(Flow::new(batch.bytes(), frame, start, &candidate));
        }
    }

    /// Completes the headers of all super-packets. Call once all packets of the batch are added.
    pub fn finish(&mut self, batch: &mut WriteBatch) {
        for flow in self.flows.drain(..) {
            flow.close(batch);
        }
    }

    fn close_between(&mut self, batch: &mut WriteBatch, inner: &Inner) {
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

    /// `None`: neither TCP nor UDP, or a part of a datagram.
    fn look(&self, packet: &[u8], inner: &Inner) -> Option<Candidate> {
        if inner.fragment {
            return None;
        }
        let transport = packet.get(inner.header_len..)?;
        let ports = u32::from_be_bytes(*transport.first_chunk()?);
        // Options make a packet rare enough to leave alone.
        let plain = inner.source.is_ipv6() || inner.header_len == IPV4_HEADER;
        let mut no_checksum = false;
        let (header, joins) = match inner.protocol {
            PROTOCOL_TCP => {
                let header = usize::from(transport.get(12)? >> 4) * 4;
                let flags = transport.get(TCP_FLAGS)? & !(TCP_PSH | TCP_ECE);
                (header, self.allowed.tcp && header >= 20 && flags == TCP_ACK)
            }
            PROTOCOL_UDP => {
                let length = u16::from_be_bytes(*transport.get(4..)?.first_chunk()?);
                no_checksum = transport.get(UDP_CHECKSUM..UDP_HEADER)? == [0, 0];
                // Over IPv6 the kernel has to see that it is missing.
                let fits = usize::from(length) == transport.len()
                    && !(no_checksum && inner.source.is_ipv6());
                (UDP_HEADER, self.allowed.udp && fits)
            }
            _ => return None,
        };
        let headers_len = inner.header_len + header;
        let payload = packet.len().saturating_sub(headers_len);
        Some(Candidate {
            key: Key {
                source: inner.source,
                destination: inner.destination,
                ports,
                protocol: inner.protocol,
            },
            ip_len: inner.header_len,
            headers_len,
            payload,
            joins: joins && plain && payload > 0,
            no_checksum,
        })
    }
}

impl Flow {
    fn new(bytes: &[u8], frame: usize, start: usize, first: &Candidate) -> Self {
        let packet = &bytes[start..start + first.headers_len + first.payload];
        let is_tcp = first.key.protocol == PROTOCOL_TCP;
        let transport = &packet[first.ip_len..];
        Self {
            key: first.key,
            frame,
            start,
            ip_len: first.ip_len,
            headers_len: first.headers_len,
            size: first.payload,
            packets: 1,
            total: packet.len(),
            verified: false,
            no_checksum: first.no_checksum,
            sequence: if is_tcp {
                sequence(transport).wrapping_add(first.payload as u32)
            } else {
                0
            },
            identification: identification(packet),
            step: None,
            pushed: is_tcp && transport[TCP_FLAGS] & TCP_PSH != 0,
        }
    }

    /// Nothing can follow any more.
    fn is_full(&self) -> bool {
        let limit = if self.is_tcp() { TCP_PACKETS } else { UDP_PACKETS };
        let shorter = self.total - self.headers_len < self.size * self.packets;
        self.packets >= limit || self.pushed || shorter
    }

    fn is_tcp(&self) -> bool {
        self.key.protocol == PROTOCOL_TCP
    }

    /// Joins the packet if it continues this one.
    fn join(&mut self, batch: &mut WriteBatch, start: usize, next: &Candidate) -> bool {
        if !next.joins
            || self.is_full()
            || next.headers_len != self.headers_len
            || next.payload > self.size
            || self.total + next.payload > FRAME_BYTES
        {
            return false;
        }
        let bytes = batch.bytes();
        let first = &bytes[self.start..self.start + self.headers_len + self.size];
        let packet = &bytes[start..start + next.headers_len + next.payload];
        let step = match self.same_headers(first, packet) {
            Some(step) => step,
            None => return false,
        };
        if !self.verified && !self.is_correct(first) {
            return false;
        }
        self.verified = true;
        if !self.is_correct(packet) {
            return false;
        }
        self.step = Some(step);
        self.identification = identification(packet);
        self.pushed = self.is_tcp() && packet[self.ip_len + TCP_FLAGS] & TCP_PSH != 0;
        self.sequence = self.sequence.wrapping_add(next.payload as u32);
        self.packets += 1;
        self.total += next.payload;
        batch.append(self.frame, start + next.headers_len, next.payload);
        true
    }

    /// Whether `packet`'s headers are those that splitting would give it. Returns the step of
    /// the IPv4 identification.
    fn same_headers(&self, first: &[u8], packet: &[u8]) -> Option<u16> {
        let step = if self.key.source.is_ipv4() {
            // Type of service, flags, time to live, protocol. Addresses are in the key.
            let same = first[1] == packet[1] && first[6..10] == packet[6..10];
            let step = identification(packet).wrapping_sub(self.identification);
            let known = self.step.is_none_or(|known| known == step);
            // Splitting counts up. Where nothing may be fragmented, the number means nothing,
            // and some leave it alone.
            let fits = step == 1 || (step == 0 && first[6] & IPV4_DF != 0);
            if !same || !known || !fits {
                return None;
            }
            step
        } else {
            // Version, traffic class, flow label; next header, hop limit.
            if first[..4] != packet[..4] || first[6..8] != packet[6..8] {
                return None;
            }
            1
        };
        let (first, packet) = (&first[self.ip_len..], &packet[self.ip_len..]);
        let same = if self.is_tcp() {
            let flags = |tcp: &[u8]| tcp[TCP_FLAGS] & !TCP_PSH;
            let header = self.headers_len - self.ip_len;
            sequence(packet) == self.sequence
                && first[8..13] == packet[8..13]
                && flags(first) == flags(packet)
                && first[14..16] == packet[14..16]
                && first[18..header] == packet[18..header]
        } else {
            // Both have a checksum, or neither.
            self.no_checksum == (packet[UDP_CHECKSUM..UDP_CHECKSUM + 2] == [0, 0])
        };
        same.then_some(step)
    }

    /// Whether the checksums of a packet of this flow are right.
    fn is_correct(&self, packet: &[u8]) -> bool {
        let (network, transport) = packet.split_at(self.ip_len);
        let source = &self.key.source;
        if source.is_ipv4() && checksum::fold(checksum::add(0, network)) != 0xffff {
            return false;
        }
        if self.no_checksum {
            return true;
        }
        let pseudo = checksum::pseudo(source, &self.key.destination, self.key.protocol);
        checksum::fold(checksum::add(pseudo + transport.len() as u64, transport)) == 0xffff
    }

    /// Writes the headers of the super-packet, if it became one.
    fn close(self, batch: &mut WriteBatch) {
        if self.packets == 1 {
            return;
        }
        let packet = &mut batch.bytes_mut()[self.start..self.start + self.headers_len];
        let is_v4 = self.key.source.is_ipv4();
        if is_v4 {
            packet[2..4].copy_from_slice(&(self.total as u16).to_be_bytes());
            packet[10..12].fill(0);
            let sum = !checksum::fold(checksum::add(0, &packet[..self.ip_len]));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            packet[4..6].copy_from_slice(&((self.total - self.ip_len) as u16).to_be_bytes());
        }
        let transport_len = self.total - self.ip_len;
        let pseudo = checksum::pseudo(&self.key.source, &self.key.destination, self.key.protocol);
        let pseudo = checksum::fold(pseudo + transport_len as u64).to_be_bytes();
        let transport = &mut packet[self.ip_len..];
        let (gso_type, csum_offset) = if self.is_tcp() {
            if self.pushed {
                transport[TCP_FLAGS] |= TCP_PSH;
            }
            (if is_v4 { GSO_TCPV4 } else { GSO_TCPV6 }, TCP_CHECKSUM)
        } else {
            transport[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
            (GSO_UDP_L4, UDP_CHECKSUM)
        };
        transport[csum_offset..csum_offset + 2].copy_from_slice(&pseudo);
        batch.set_header(
            self.frame,
            VnetHeader {
                flags: FLAG_NEEDS_CSUM,
                gso_type,
                hdr_len: self.headers_len as u16,
                gso_size: self.size as u16,
                csum_start: self.ip_len as u16,
                csum_offset: csum_offset as u16,
                ..VnetHeader::default()
            },
        );
    }
}

fn sequence(tcp: &[u8]) -> u32 {
    u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]])
}

/// Of IPv4; meaningless on IPv6.
fn identification(packet: &[u8]) -> u16 {
    u16::from_be_bytes([packet[4], packet[5]])
}

#[cfg(test)]
mod tests {
    use super::super::arena::{HEADROOM, TAILROOM};
    use super::super::session::Segments;
    use super::super::split::Split;
    use super::super::testing::{Recipe, Tcp};
    use super::*;
    use proptest::prelude::*;

    const BOTH: Coalesce = Coalesce { tcp: true, udp: true };

    /// The frames that the packets are joined to.
    fn coalesce(packets: &[Vec<u8>]) -> Vec<(VnetHeader, Vec<u8>)> {
        let mut batch = WriteBatch::new(8);
        let mut coalescer = Coalescer::new(BOTH);
        let mut at = 0;
        for packet in packets {
            at += 16;
            batch.bytes_mut()[at..at + packet.len()].copy_from_slice(packet);
            let inner = Inner::parse(packet).unwrap();
            coalescer.add(&mut batch, at, &inner);
            at += packet.len() + 16;
        }
        coalescer.finish(&mut batch);
        let read = |frame| batch.pieces(frame).collect::<Vec<_>>().concat();
        batch.frames().iter().map(|frame| (frame.header, read(frame))).collect()
    }

    fn split(frames: &[(VnetHeader, Vec<u8>)]) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        for (header, frame) in frames {
            let mut bytes = vec![0; HEADROOM];
            bytes.extend_from_slice(frame);
            bytes.extend_from_slice(&[0; TAILROOM]);
            let mut split = Split::new(&mut bytes, frame.len(), header, usize::MAX).unwrap();
            while split.next_len().is_some() {
                let padded = split.take();
                let len = Inner::parse(padded).unwrap().total_len;
                packets.push(padded[..len].to_vec());
            }
        }
        packets
    }

    fn stream(flow: u8, tcp: bool, v6: bool, sizes: &[usize]) -> Vec<Recipe> {
        let address = |last: u8| match v6 {
            false => IpAddr::from([10, 0, 0, last]),
            true => IpAddr::from([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]),
        };
        let mut sequence = u32::MAX - 3000;
        let each = sizes.iter().enumerate().map(|(number, size)| {
            let recipe = Recipe {
                source: address(flow),
                destination: address(200),
                ports: (1000 + u16::from(flow), 443),
                tcp: tcp.then(|| Tcp {
                    sequence,
                    acknowledged: 77,
                    flags: TCP_ACK,
                    window: 500,
                    options: vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
                }),
                identification: (65_530 + number) as u16,
                traffic_class: 0,
                hops: 64,
                payload: (0..*size).map(|at| (at + number) as u8).collect(),
            };
            sequence = sequence.wrapping_add(*size as u32);
            recipe
        });
        each.collect()
    }

    #[test]
    fn a_bulk_stream_becomes_one_frame() {
        for (tcp, v6, gso_type) in [
            (true, false, GSO_TCPV4),
            (true, true, GSO_TCPV6),
            (false, false, GSO_UDP_L4),
            (false, true, GSO_UDP_L4),
        ] {
            let packets: Vec<_> = stream(1, tcp, v6, &[[1300; 39].as_slice(), &[200]].concat())
                .iter()
                .map(Recipe::build)
                .collect();
            let frames = coalesce(&packets);
            assert_eq!(frames.len(), 1, "tcp {tcp} v6 {v6}");
            assert_eq!(frames[0].0.gso_type, gso_type);
            assert_eq!(frames[0].0.gso_size, 1300);
            assert_eq!(split(&frames), packets);
        }
    }

    #[test]
    fn datagrams_without_checksums_are_joined_over_ipv4_alone() {
        for v6 in [false, true] {
            let mut packets: Vec<_> =
                stream(1, false, v6, &[1000; 5]).iter().map(Recipe::build).collect();
            let at = if v6 { 46 } else { 26 };
            for packet in &mut packets {
                packet[at..at + 2].fill(0);
            }
            let frames = coalesce(&packets);
            assert_eq!(frames.len(), if v6 { 5 } else { 1 });
            let got: Vec<_> = split(&frames).into_iter().map(with_checksum).collect();
            let expected: Vec<_> = packets.into_iter().map(with_checksum).collect();
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn a_wrong_checksum_is_never_blessed() {
        for wrong in 0..3 {
            let mut packets: Vec<_> =
                stream(1, true, false, &[1000; 3]).iter().map(Recipe::build).collect();
            let last = packets[wrong].len() - 1;
            packets[wrong][last] ^= 1;
            let frames = coalesce(&packets);
            assert!(frames.len() > 1);
            let alone = frames.iter().find(|(_, frame)| *frame == packets[wrong]);
            assert_eq!(alone.unwrap().0, VnetHeader::default());
            assert_eq!(split(&frames), packets);
        }
    }

    #[test]
    fn what_differs_in_a_header_is_not_joined() {
        let change: [fn(&mut Recipe); 9] = [
            |recipe| recipe.hops = 63,
            |recipe| recipe.traffic_class = 4,
            |recipe| recipe.identification = 9,
            |recipe| recipe.ports.0 = 9,
            |recipe| recipe.tcp.as_mut().unwrap().acknowledged = 9,
            |recipe| recipe.tcp.as_mut().unwrap().window = 9,
            |recipe| recipe.tcp.as_mut().unwrap().sequence ^= 1 << 20,
            |recipe| recipe.tcp.as_mut().unwrap().options[7] = 9,
            |recipe| recipe.tcp.as_mut().unwrap().flags = TCP_ACK | 1,
        ];
        for (number, change) in change.iter().enumerate() {
            let mut recipes = stream(1, true, false, &[1000; 2]);
            change(&mut recipes[1]);
            let packets: Vec<_> = recipes.iter().map(Recipe::build).collect();
            let frames = coalesce(&packets);
            assert_eq!(frames.len(), 2, "change {number}");
            assert_eq!(split(&frames), packets);
        }
    }

    #[test]
    fn a_fragment_is_not_overtaken() {
        let mut packets: Vec<_> =
            stream(1, false, false, &[500; 3]).iter().map(Recipe::build).collect();
        packets[1][6] = 0x20;
        packets[1][10..12].fill(0);
        let sum = !checksum::fold(checksum::add(0, &packets[1][..20]));
        packets[1][10..12].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(split(&coalesce(&packets)), packets);
    }

    /// For each packet: what is changed, and to what.
    type Changes = Vec<(u8, u8)>;

    prop_compose! {
        fn flows()(
            flows in proptest::collection::vec(
                (
                    any::<bool>(),
                    any::<bool>(),
                    1usize..1400,
                    proptest::collection::vec((0u8..12, any::<u8>()), 1..30),
                ),
                1..5,
            ),
        ) -> Vec<Vec<Vec<u8>>> {
            let build = |(flow, spec): (usize, (bool, bool, usize, Changes))| {
                let (tcp, v6, size, changes) = spec;
                let sizes: Vec<usize> = changes
                    .iter()
                    .map(|(what, value)| if *what == 0 { usize::from(*value) } else { size })
                    .collect();
                let mut recipes = stream(flow as u8, tcp, v6, &sizes);
                for (recipe, (what, value)) in recipes.iter_mut().zip(&changes) {
                    match (what, &mut recipe.tcp) {
                        (1, _) => recipe.hops = *value,
                        (2, _) => recipe.traffic_class = *value,
                        (3, _) => recipe.identification ^= u16::from(*value),
                        (4, Some(tcp)) => tcp.flags = *value,
                        (5, Some(tcp)) => tcp.sequence ^= u32::from(*value),
                        (6, Some(tcp)) => tcp.flags |= TCP_PSH,
                        (7, Some(tcp)) => tcp.options.truncate(usize::from(value % 4) * 4),
                        _ => {}
                    }
                }
                let mut packets: Vec<_> = recipes.iter().map(Recipe::build).collect();
                for (packet, (what, value)) in packets.iter_mut().zip(&changes) {
                    let last = packet.len() - 1;
                    match what {
                        8 => packet[last] ^= value,
                        9 if !v6 => packet[7] = *value,
                        10 if !tcp => {
                            let at = if v6 { 46 } else { 26 };
                            packet[at..at + 2].fill(0);
                        }
                        _ => {}
                    }
                }
                packets
            };
            flows.into_iter().enumerate().map(build).collect()
        }
    }

    /// The packet, with the checksum that UDP over IPv4 may leave out.
    fn with_checksum(mut packet: Vec<u8>) -> Vec<u8> {
        let is_udp = packet[0] == 0x45 && packet[9] == PROTOCOL_UDP;
        if is_udp && packet[6] & 0x3f == 0 && packet[7] == 0 && packet[26..28] == [0, 0] {
            let inner = Inner::parse(&packet).unwrap();
            let pseudo = checksum::pseudo(&inner.source, &inner.destination, PROTOCOL_UDP);
            let sum = checksum::add(pseudo + (packet.len() - 20) as u64, &packet[20..]);
            packet[26..28].copy_from_slice(&(!checksum::fold(sum)).to_be_bytes());
        }
        packet
    }

    /// The packet, without the identification that means nothing where fragments are forbidden
    /// (RFC 6864 section 4.1): senders that leave it alone are joined, and splitting counts up.
    fn without_atomic_identification(packet: &[u8]) -> Vec<u8> {
        let mut packet = packet.to_vec();
        if packet[0] >> 4 == 4 && packet[6] & IPV4_DF != 0 {
            packet[4..6].fill(0);
            packet[10..12].fill(0);
        }
        packet
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn splitting_what_was_joined_gives_the_same_packets(
            flows in flows(),
            picks in proptest::collection::vec(any::<prop::sample::Index>(), 150),
        ) {
            let mut left: Vec<_> = flows.iter().map(|flow| flow.iter()).collect();
            let mut mixed = Vec::new();
            for pick in picks {
                let at = pick.index(left.len());
                mixed.extend(left[at].next().cloned());
            }
            let got = split(&coalesce(&mixed));
            prop_assert_eq!(got.len(), mixed.len());
            // Each flow has a source of its own.
            let source = |packet: &Vec<u8>| Inner::parse(packet).unwrap().source;
            for flow in &flows {
                let of_flow = |packets: &[Vec<u8>]| -> Vec<Vec<u8>> {
                    let same = packets.iter().filter(|p| source(p) == source(&flow[0]));
                    same.map(|packet| without_atomic_identification(packet))
                        .map(with_checksum)
                        .collect()
                };
                prop_assert_eq!(of_flow(&got), of_flow(&mixed));
            }
        }
    }
}
