//! Parses the outer headers of an Ethernet frame that a capture needs.

use std::net::IpAddr;

use towline_proto::frame::DatagramKind;

/// The outer IP packet of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::lab) struct Outer<'a> {
    pub(in crate::lab) source: IpAddr,
    pub(in crate::lab) destination: IpAddr,
    /// Protocol of the payload, or the next header of IPv6.
    pub(in crate::lab) protocol: u8,
    /// Payload of the IP packet.
    pub(in crate::lab) payload: &'a [u8],
    /// True for every fragment of a larger packet, the first one included.
    pub(in crate::lab) is_fragment: bool,
    /// UDP payload; `None` if the packet is not UDP or is a fragment.
    pub(super) udp_payload: Option<&'a [u8]>,
    /// Target of a neighbor solicitation or advertisement (RFC 4861, sections 4.3 and 4.4).
    pub(in crate::lab) neighbor_target: Option<IpAddr>,
}

const ETHERNET_BYTES: usize = 14;
const UDP: u8 = 17;
const V6_FRAGMENT: u8 = 44;
const UDP_BYTES: usize = 8;
const ICMPV6: u8 = 58;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;

impl<'a> Outer<'a> {
    /// Parses a frame. Returns `None` if it does not contain an IP packet.
    pub(in crate::lab) fn parse(frame: &'a [u8]) -> Option<Self> {
        let packet = frame.get(ETHERNET_BYTES..)?;
        match frame.get(12..14)? {
            [0x08, 0x00] => Self::v4(packet),
            [0x86, 0xdd] => Self::v6(packet),
            _ => None,
        }
    }

    pub(in crate::lab) fn is_wireguard(&self) -> bool {
        self.udp_payload.is_some_and(|bytes| DatagramKind::of(bytes) == DatagramKind::WireGuard)
    }

    fn v4(packet: &'a [u8]) -> Option<Self> {
        let (header, _) = packet.split_first_chunk::<20>()?;
        let header_bytes = usize::from(header[0] & 0x0f) * 4;
        /// Mask of the flag "more fragments" and of the fragment offset.
        const FRAGMENT: u16 = 0x3fff;
        let is_fragment = u16::from_be_bytes([header[6], header[7]]) & FRAGMENT != 0;
        let address = |at: usize| <[u8; 4]>::try_from(&header[at..at + 4]).map(IpAddr::from).ok();
        let udp = header[9] == UDP && !is_fragment;
        Some(Self {
            source: address(12)?,
            destination: address(16)?,
            protocol: header[9],
            payload: packet.get(header_bytes..)?,
            is_fragment,
            udp_payload: if udp { packet.get(header_bytes + UDP_BYTES..) } else { None },
            neighbor_target: None,
        })
    }

    fn v6(packet: &'a [u8]) -> Option<Self> {
        let (header, rest) = packet.split_first_chunk::<40>()?;
        let address = |at: usize| <[u8; 16]>::try_from(&header[at..at + 16]).map(IpAddr::from).ok();
        Some(Self {
            source: address(8)?,
            destination: address(24)?,
            protocol: header[6],
            payload: rest,
            is_fragment: header[6] == V6_FRAGMENT,
            udp_payload: if header[6] == UDP { rest.get(UDP_BYTES..) } else { None },
            neighbor_target: if header[6] == ICMPV6 { neighbor_target(rest) } else { None },
        })
    }
}

/// Returns the target of an ICMPv6 message about a neighbor: 8 bytes after its start.
fn neighbor_target(message: &[u8]) -> Option<IpAddr> {
    let (header, rest) = message.split_first_chunk::<8>()?;
    matches!(header[0], NEIGHBOR_SOLICITATION | NEIGHBOR_ADVERTISEMENT)
        .then(|| rest.first_chunk::<16>().map(|target| IpAddr::from(*target)))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outer_headers_are_read() {
        let mut frame = vec![0; ETHERNET_BYTES];
        frame[12..].copy_from_slice(&[0x08, 0x00]);
        frame.extend([0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, UDP, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
        frame.extend([0; UDP_BYTES]);
        frame.extend([4, 0, 0, 0, 9]);
        let outer = Outer::parse(&frame).unwrap();
        assert_eq!(outer.source.to_string(), "192.0.2.1");
        assert_eq!(outer.destination.to_string(), "192.0.2.2");
        assert!(outer.is_wireguard());
        for length in 0..frame.len() {
            // A truncated frame never panics.
            let _ = Outer::parse(&frame[..length]);
        }
    }

    #[test]
    fn a_fragment_is_no_datagram() {
        let mut frame = vec![0; ETHERNET_BYTES];
        frame[12..].copy_from_slice(&[0x08, 0x00]);
        frame.extend([0x45, 0, 0, 0, 0, 0, 0x00, 9, 64, UDP, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
        frame.extend([0; UDP_BYTES]);
        frame.extend([4, 0, 0, 0, 9]);
        let outer = Outer::parse(&frame).unwrap();
        assert!(outer.is_fragment && !outer.is_wireguard());
    }

    #[test]
    fn the_target_of_a_solicitation_is_read() {
        let mut frame = vec![0; ETHERNET_BYTES];
        frame[12..].copy_from_slice(&[0x86, 0xdd]);
        frame.extend([0x60, 0, 0, 0, 0, 24, ICMPV6, 255]);
        frame.extend([0xfd; 32]);
        frame.extend([NEIGHBOR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend([0x20; 16]);
        let target = Outer::parse(&frame).unwrap().neighbor_target.unwrap();
        assert_eq!(target.to_string(), "2020:2020:2020:2020:2020:2020:2020:2020");
        for length in 0..frame.len() {
            let _ = Outer::parse(&frame[..length]);
        }
    }
}
