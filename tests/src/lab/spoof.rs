//! Spoofed packets on the wire next to a host: what a stranger on the host's LAN, or its provider,
//! could send.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use anyhow::{Context, anyhow};
use nix::ifaddrs::getifaddrs;
use socket2::{Domain, Socket, Type};
use towline_netlink::Rtnetlink;

use super::namespace::Namespace;
use super::ping::checksum;

/// Sends packets on one port of a bridge, to the host at its other end.
#[derive(Debug)]
pub struct Spoofer {
    socket: Socket,
    port: u32,
    hardware: [u8; 6],
}

impl Spoofer {
    /// Opens a spoofer on the port `port` in `switch`, towards the link `link` of `host`.
    pub fn new(
        switch: &Namespace,
        port: &str,
        host: &Namespace,
        link: &str,
    ) -> anyhow::Result<Self> {
        let hardware = host.run(|| hardware_address(link))?;
        switch.run(|| {
            let port = Rtnetlink::open()?.link_index(port)?;
            // Without a protocol the socket receives nothing.
            let socket = Socket::new(Domain::PACKET, Type::DGRAM, None)?;
            socket.set_nonblocking(true)?;
            Ok(Self { socket, port, hardware })
        })
    }

    /// Sends an IP packet on the wire.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        let protocol = match packet.first() {
            Some(first) if first >> 4 == 4 => libc::ETH_P_IP,
            _ => libc::ETH_P_IPV6,
        };
        let mut address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (protocol as u16).to_be(),
            sll_ifindex: self.port.cast_signed(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0; 8],
        };
        address.sll_addr[..6].copy_from_slice(&self.hardware);
        // SAFETY: pointers and lengths describe the packet and one sockaddr_ll.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn hardware_address(link: &str) -> anyhow::Result<[u8; 6]> {
    getifaddrs()?
        .filter(|entry| entry.interface_name == link)
        .find_map(|entry| entry.address?.as_link_addr()?.addr())
        .with_context(|| format!("{link} has no hardware address"))
}

/// Builds a UDP datagram as an IP packet.
///
/// # Errors
/// If the two addresses are of different families, or the payload is too long.
pub fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> anyhow::Result<Vec<u8>> {
    let length =
        u16::try_from(8 + payload.len()).context("the payload is too long for a UDP datagram")?;
    let mut datagram = Vec::with_capacity(usize::from(length));
    datagram.extend(from.port().to_be_bytes());
    datagram.extend(to.port().to_be_bytes());
    datagram.extend(length.to_be_bytes());
    datagram.extend([0; 2]);
    datagram.extend(payload);
    packet(from.ip(), to.ip(), libc::IPPROTO_UDP as u8, datagram, 6)
}

/// Builds the SYN of a TCP connection as an IP packet.
///
/// # Errors
/// If the two addresses are of different families.
pub fn tcp_syn(from: SocketAddr, to: SocketAddr) -> anyhow::Result<Vec<u8>> {
    let mut segment = Vec::with_capacity(20);
    segment.extend(from.port().to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    // Sequence number, acknowledgement number, data offset of 5 words, SYN flag, window.
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, 2, 0xff, 0xff, 0, 0, 0, 0]);
    packet(from.ip(), to.ip(), libc::IPPROTO_TCP as u8, segment, 16)
}

/// Prepends an IP header to a body and fills in the checksums; the body's own checksum is at
/// `sum_at`.
fn packet(
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    mut body: Vec<u8>,
    sum_at: usize,
) -> anyhow::Result<Vec<u8>> {
    let length = u16::try_from(body.len()).context("too long")?;
    let addresses = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
        _ => return Err(anyhow!("{from} and {to} are of different families")),
    };
    let [high, low] = length.to_be_bytes();
    let pseudo = [&*addresses, &[0, protocol, high, low], &*body].concat();
    body[sum_at..sum_at + 2].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    let mut packet = Vec::with_capacity(V6_HEADER + body.len());
    if from.is_ipv4() {
        packet.extend([0x45, 0]);
        packet.extend(length.checked_add(20).context("too long")?.to_be_bytes());
        packet.extend([0, 0, 0x40, 0, HOPS, protocol, 0, 0]);
        packet.extend(addresses);
        let sum = checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        packet.extend([0x60, 0, 0, 0]);
        packet.extend(length.to_be_bytes());
        packet.extend([protocol, HOPS]);
        packet.extend(addresses);
    }
    packet.extend(body);
    Ok(packet)
}

/// Hop limit (TTL) of every packet that is built here.
pub const HOPS: u8 = 64;
/// Sizes of the fixed IPv4 and IPv6 headers, in bytes.
const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;
/// Next-header value of an IPv6 fragment header (RFC 8200, section 4.5).
const FRAGMENT: u8 = 44;
/// Next-header value of destination options (RFC 8200, section 4.6).
pub const DESTINATION_OPTIONS: u8 = 60;
/// Next-header value of hop-by-hop options (RFC 8200, section 4.3).
pub const HOP_BY_HOP: u8 = 0;

/// Splits a packet without IP options or extension headers into fragments of at most `mtu` bytes.
///
/// # Errors
/// If the packet has no IP header, or no fragment fits into `mtu` bytes.
pub fn fragments(packet: &[u8], mtu: usize) -> anyhow::Result<Vec<Vec<u8>>> {
    const IDENTIFICATION: u32 = 0x544c;
    const FRAGMENT_HEADER: usize = 8;
    let is_v4 = packet.first().is_some_and(|first| first >> 4 == 4);
    let (header, overhead) =
        if is_v4 { (V4_HEADER, V4_HEADER) } else { (V6_HEADER, V6_HEADER + FRAGMENT_HEADER) };
    let (header, body) = packet.split_at_checked(header).context("not an IP packet")?;
    // Fragment offsets count in units of 8 bytes.
    let room = mtu.saturating_sub(overhead) / 8 * 8;
    anyhow::ensure!(room > 0, "no fragment fits in {mtu} bytes");
    let count = body.len().div_ceil(room);
    let pieces = body.chunks(room).enumerate().map(|(number, piece)| {
        let offset = u16::try_from(number * room).context("too long")?;
        let more = u16::from(number + 1 < count);
        let mut fragment = header.to_vec();
        if is_v4 {
            let length = u16::try_from(V4_HEADER + piece.len())?;
            fragment[2..4].copy_from_slice(&length.to_be_bytes());
            fragment[4..6].copy_from_slice(&(IDENTIFICATION as u16).to_be_bytes());
            fragment[6..8].copy_from_slice(&((offset / 8) | (more << 13)).to_be_bytes());
            fragment[10..12].fill(0);
            let sum = checksum(&fragment);
            fragment[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            let length = u16::try_from(FRAGMENT_HEADER + piece.len())?;
            let protocol = std::mem::replace(&mut fragment[6], FRAGMENT);
            fragment[4..6].copy_from_slice(&length.to_be_bytes());
            fragment.extend([protocol, 0]);
            fragment.extend((offset | more).to_be_bytes());
            fragment.extend(IDENTIFICATION.to_be_bytes());
        }
        fragment.extend(piece);
        Ok(fragment)
    });
    pieces.collect()
}

/// Inserts an extension header of this kind, filled with padding, before the payload of an IPv6
/// packet.
///
/// # Errors
/// If it is not an IPv6 packet, or would become too long.
pub fn extended(packet: &[u8], kind: u8) -> anyhow::Result<Vec<u8>> {
    anyhow::ensure!(packet.first().is_some_and(|first| first >> 4 == 6), "not an IPv6 packet");
    let (header, body) = packet.split_at_checked(V6_HEADER).context("not an IPv6 packet")?;
    let mut extended = header.to_vec();
    let protocol = std::mem::replace(&mut extended[6], kind);
    extended[4..6].copy_from_slice(&u16::try_from(8 + body.len())?.to_be_bytes());
    // A PadN option of six bytes.
    extended.extend([protocol, 0, 1, 4, 0, 0, 0, 0]);
    extended.extend(body);
    Ok(extended)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_and_its_header_have_their_checksums() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let packet = udp(at("192.0.2.1:7"), at("192.0.2.2:9"), b"hello").unwrap();
        assert_eq!(packet.len(), 20 + 8 + 5);
        assert_eq!(checksum(&packet[..20]), 0);
        assert!(packet.ends_with(b"hello"));
        let packet = udp(at("[2001:db8::1]:7"), at("[2001:db8::2]:9"), b"hello").unwrap();
        let pseudo = [&packet[8..40], &[0, 17, 0, 13], &packet[40..]].concat();
        assert_eq!(checksum(&pseudo), 0);
        assert!(udp(at("192.0.2.1:7"), at("[2001:db8::2]:9"), b"").is_err());
        let packet = tcp_syn(at("192.0.2.1:7"), at("192.0.2.2:9")).unwrap();
        let pseudo = [&packet[12..20], &[0, 6, 0, 20], &packet[20..]].concat();
        assert_eq!(checksum(&pseudo), 0);
    }

    #[test]
    fn fragments_and_extension_headers_keep_the_payload() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let payload = vec![0x5a; 3_000];
        let v4 = udp(at("192.0.2.1:7"), at("192.0.2.2:9"), &payload).unwrap();
        let pieces = fragments(&v4, 1_500).unwrap();
        assert_eq!(pieces.len(), 3);
        assert!(pieces.iter().all(|piece| piece.len() <= 1_500 && checksum(&piece[..20]) == 0));
        let whole: Vec<u8> = pieces.iter().flat_map(|piece| piece[20..].to_vec()).collect();
        assert_eq!(whole, v4[20..]);
        let v6 = udp(at("[2001:db8::1]:7"), at("[2001:db8::2]:9"), &payload).unwrap();
        let pieces = fragments(&v6, 1_500).unwrap();
        let whole: Vec<u8> = pieces.iter().flat_map(|piece| piece[48..].to_vec()).collect();
        assert_eq!(whole, v6[40..]);
        assert_eq!((pieces[0][6], pieces[0][40], pieces[2][43] & 1), (44, 17, 0));
        let extended = extended(&v6, DESTINATION_OPTIONS).unwrap();
        assert_eq!((extended[6], extended[40]), (60, 17));
        assert_eq!(extended[48..], v6[40..]);
        assert!(super::extended(&v4, HOP_BY_HOP).is_err());
    }
}
