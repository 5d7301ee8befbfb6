//! Outbound: what the kernel left undone is done here, on the way into the cipher.
//!
//! Contract: a packet from the TUN comes with its virtio header; segments come out one at a time,
//! each a whole IP packet with correct checksums, padded for WireGuard, in the order of the
//! stream. Hostile or nonsensical headers give an error, never a panic.
//!
//! A super-packet is split in place: each segment's headers are written over the end of the
//! payload before it, which is sealed by then. Nothing is copied but headers.

use super::arena::{HEADROOM, TAILROOM};
use super::checksum;
use super::drops::DropReason;
use super::packet::{Inner, PROTOCOL_TCP, PROTOCOL_UDP};
use super::session::{PADDING, Segments};
use super::vnet::{
    FLAG_NEEDS_CSUM, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, VnetHeader,
};

/// The longest headers of a super-packet, IP and transport together, with all options.
const HEADERS: usize = 192;

const TCP_SEQUENCE: usize = 4;
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;
const UDP_LENGTH: usize = 4;
const UDP_CHECKSUM: usize = 6;

/// One packet from the TUN as segments.
#[derive(Debug)]
pub struct Split<'a> {
    /// The packet, with the free bytes around it.
    bytes: &'a mut [u8],
    /// No segment is padded beyond this.
    mtu: usize,
    state: State,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one on the stack per packet; a box would allocate")]
enum State {
    /// A packet as it is, of so many bytes.
    Whole(usize),
    /// A super-packet.
    Train(Train),
    Done,
}

/// A super-packet on its way through.
#[derive(Debug)]
struct Train {
    /// As in the super-packet, but what differs from segment to segment is zero.
    headers: [u8; HEADERS],
    headers_len: usize,
    /// Where the transport header begins.
    transport: usize,
    is_v4: bool,
    is_tcp: bool,
    /// Of the IPv4 header: without length, identification and checksum.
    ip_sum: u64,
    /// Of pseudo-header and transport header: without lengths, sequence, flags and checksum.
    transport_sum: u64,
    identification: u16,
    sequence: u32,
    flags: u8,
    /// Payload in each segment but the last.
    size: usize,
    /// Where the next payload begins in `bytes`, and where the last ends.
    next: usize,
    end: usize,
    first: bool,
    /// What the padding of the last segment has overwritten, and where.
    covered: ([u8; TAILROOM], usize),
}

impl<'a> Split<'a> {
    /// `bytes` is the packet with [`HEADROOM`] free bytes before it and [`TAILROOM`] behind;
    /// `len` its length. No segment is padded beyond `mtu` bytes.
    ///
    /// # Errors
    ///
    /// When the virtio header and the packet do not fit together.
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
            State::Train(Train::new(packet, header).ok_or(DropReason::Unsplittable)?)
        };
        Ok(Self { bytes, mtu, state })
    }
}

impl Segments for Split<'_> {
    fn next_len(&self) -> Option<usize> {
        match &self.state {
            State::Whole(len) => Some(padded(*len, self.mtu)),
            State::Train(train) => Some(padded(train.headers_len + train.next_payload(), self.mtu)),
            State::Done => None,
        }
    }

    fn take(&mut self) -> &[u8] {
        let (start, len) = match &mut self.state {
            State::Whole(len) => (HEADROOM, *len),
            State::Train(train) => train.write_next(self.bytes),
            State::Done => return &[],
        };
        let padded = padded(len, self.mtu);
        let padding = &mut self.bytes[start + len..start + padded];
        match &mut self.state {
            State::Train(train) if train.next < train.end => {
                train.covered.0[..padding.len()].copy_from_slice(padding);
                train.covered.1 = padding.len();
            }
            _ => self.state = State::Done,
        }
        padding.fill(0);
        &self.bytes[start..start + padded]
    }
}

impl Train {
    fn new(packet: &[u8], header: &VnetHeader) -> Option<Self> {
        let inner = Inner::parse(packet).filter(|inner| inner.total_len == packet.len())?;
        let is_v4 = inner.source.is_ipv4();
        let is_tcp = match header.gso_type & !GSO_ECN {
            GSO_TCPV4 if is_v4 => true,
            GSO_TCPV6 if !is_v4 => true,
            GSO_UDP_L4 => false,
            _ => return None,
        };
        let protocol = if is_tcp { PROTOCOL_TCP } else { PROTOCOL_UDP };
        // On IPv6 there may be extension headers between.
        let transport = usize::from(header.csum_start);
        let fits = if is_v4 {
            transport == inner.header_len && inner.protocol == protocol && !inner.fragment
        } else {
            transport >= inner.header_len
        };
        if header.flags & FLAG_NEEDS_CSUM == 0 || header.gso_size == 0 || !fits {
            return None;
        }
        let transport_len = if is_tcp {
            let words = usize::from(packet.get(transport + 12)? >> 4);
            if words < 5 || header.csum_offset != TCP_CHECKSUM as u16 {
                return None;
            }
            words * 4
        } else if header.csum_offset == UDP_CHECKSUM as u16 {
            8
        } else {
            return None;
        };
        let headers_len = transport + transport_len;
        if headers_len > HEADERS || headers_len > packet.len() {
            return None;
        }
        let mut headers = [0; HEADERS];
        headers[..headers_len].copy_from_slice(&packet[..headers_len]);
        let mut identification = 0;
        let mut ip_sum = 0;
        if is_v4 {
            identification = u16::from_be_bytes([headers[4], headers[5]]);
            headers[2..6].fill(0);
            headers[10..12].fill(0);
            ip_sum = checksum::add(0, &headers[..transport]);
        }
        let (mut sequence, mut flags) = (0, 0);
        let part = &mut headers[transport..headers_len];
        if is_tcp {
            sequence = u32::from_be_bytes([part[4], part[5], part[6], part[7]]);
            flags = part[TCP_FLAGS];
            part[TCP_SEQUENCE..TCP_SEQUENCE + 4].fill(0);
            part[TCP_FLAGS] = 0;
            part[TCP_CHECKSUM..TCP_CHECKSUM + 2].fill(0);
        } else {
            part[UDP_LENGTH..UDP_CHECKSUM + 2].fill(0);
        }
        let pseudo = checksum::pseudo(&inner.source, &inner.destination, protocol);
        let transport_sum = checksum::add(pseudo, part);
        Some(Self {
            headers,
            headers_len,
            transport,
            is_v4,
            is_tcp,
            ip_sum,
            transport_sum,
            identification,
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

    /// Writes the headers of the next segment before its payload. Returns where the segment
    /// begins, and its length.
    fn write_next(&mut self, bytes: &mut [u8]) -> (usize, usize) {
        let (covered, len) = &self.covered;
        bytes[self.next..self.next + len].copy_from_slice(&covered[..*len]);

        let payload = self.next..self.next + self.next_payload();
        let start = payload.start - self.headers_len;
        let len = self.headers_len + payload.len();
        let last = payload.end == self.end;
        let payload_sum = checksum::add(self.transport_sum, &bytes[payload.clone()]);
        let headers = &mut bytes[start..payload.start];
        headers.copy_from_slice(&self.headers[..self.headers_len]);

        if self.is_v4 {
            let total = len as u16;
            headers[2..4].copy_from_slice(&total.to_be_bytes());
            headers[4..6].copy_from_slice(&self.identification.to_be_bytes());
            let sum = self.ip_sum + u64::from(total) + u64::from(self.identification);
            headers[10..12].copy_from_slice(&(!checksum::fold(sum)).to_be_bytes());
        } else {
            let behind = (len - 40) as u16;
            headers[4..6].copy_from_slice(&behind.to_be_bytes());
        }
        let transport_len = (len - self.transport) as u64;
        let part = &mut headers[self.transport..];
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
            let sum = !checksum::fold(sum);
            part[TCP_CHECKSUM..TCP_CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
        } else {
            // The length counts twice: in the header and in the pseudo-header.
            let sum = not_zero(!checksum::fold(payload_sum + 2 * transport_len));
            part[UDP_LENGTH..UDP_LENGTH + 2].copy_from_slice(&(transport_len as u16).to_be_bytes());
            part[UDP_CHECKSUM..UDP_CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
        }

        self.sequence = self.sequence.wrapping_add(payload.len() as u32);
        self.identification = self.identification.wrapping_add(1);
        self.next = payload.end;
        self.first = false;
        (start, len)
    }
}

/// WireGuard pads to 16 bytes, but not past the link's MTU.
fn padded(len: usize, mtu: usize) -> usize {
    len.next_multiple_of(PADDING).min(mtu.max(len))
}

/// Where the sum goes there stands the sum of the pseudo-header.
fn complete_checksum(packet: &mut [u8], header: &VnetHeader) -> Option<()> {
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    let sum = not_zero(!checksum::fold(checksum::add(0, packet.get(start..)?)));
    packet.get_mut(at..at + 2)?.copy_from_slice(&sum.to_be_bytes());
    Some(())
}

/// In UDP zero means that there is no sum; elsewhere both stand for zero.
fn not_zero(sum: u16) -> u16 {
    if sum == 0 { 0xffff } else { sum }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Recipe, Tcp};
    use super::*;
    use proptest::prelude::*;

    /// All segments of a packet, without padding; each is checked to be padded with zeros.
    fn split(packet: &[u8], header: &VnetHeader, mtu: usize) -> Result<Vec<Vec<u8>>, DropReason> {
        let mut bytes = vec![0xaa; HEADROOM];
        bytes.extend_from_slice(packet);
        bytes.extend_from_slice(&[0xaa; TAILROOM]);
        let mut split = Split::new(&mut bytes, packet.len(), header, mtu)?;
        let mut segments = Vec::new();
        while let Some(len) = split.next_len() {
            let segment = split.take();
            assert_eq!(segment.len(), len);
            let inner = Inner::parse(segment).expect("a packet");
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

    /// As the kernel hands over a super-packet: the sum of the pseudo-header is in place.
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
            bytes: [u8; 10],
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            keep: [bool; 4],
        ) {
            let (mut packet, good) = super_packet(&recipe, usize::from(size));
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
