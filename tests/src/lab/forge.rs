//! Packets with sources that are not ours to use, put on the wire beside a host: what a stranger on the
//! host's LAN, or its provider, could send.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use anyhow::{Context, anyhow};
use nix::ifaddrs::getifaddrs;
use socket2::{Domain, Socket, Type};
use towline_netlink::Rtnetlink;

use super::namespace::Namespace;
use super::ping::checksum;

/// Sends on one port of a bridge, to the host at its other end.
#[derive(Debug)]
pub struct Forger {
    socket: Socket,
    port: u32,
    hardware: [u8; 6],
}

impl Forger {
    /// On the port `port` in `switch`, towards the link `link` of `host`.
    pub fn new(
        switch: &Namespace,
        port: &str,
        host: &Namespace,
        link: &str,
    ) -> anyhow::Result<Self> {
        let hardware = host.run(|| hardware_address(link))?;
        switch.run(|| {
            let port = Rtnetlink::open()?.link_index(port)?;
            // Without a protocol nothing is ever received.
            let socket = Socket::new(Domain::PACKET, Type::DGRAM, None)?;
            socket.set_nonblocking(true)?;
            Ok(Self { socket, port, hardware })
        })
    }

    /// Puts an IP packet on the wire.
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

/// A UDP datagram as an IP packet.
///
/// # Errors
/// When the two addresses are of different families, or the payload is too long.
pub fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> anyhow::Result<Vec<u8>> {
    const PROTOCOL: u8 = libc::IPPROTO_UDP as u8;
    const HOPS: u8 = 64;
    let length = u16::try_from(8 + payload.len()).context("too long")?;
    let mut datagram = Vec::with_capacity(usize::from(length));
    datagram.extend(from.port().to_be_bytes());
    datagram.extend(to.port().to_be_bytes());
    datagram.extend(length.to_be_bytes());
    datagram.extend([0; 2]);
    datagram.extend(payload);
    let addresses = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
        _ => return Err(anyhow!("{from} and {to} are of different families")),
    };
    let [high, low] = length.to_be_bytes();
    let pseudo = [&*addresses, &[0, PROTOCOL, high, low], &*datagram].concat();
    datagram[6..8].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    let mut packet = Vec::with_capacity(40 + datagram.len());
    if from.is_ipv4() {
        packet.extend([0x45, 0]);
        packet.extend((length + 20).to_be_bytes());
        packet.extend([0, 0, 0x40, 0, HOPS, PROTOCOL, 0, 0]);
        packet.extend(addresses);
        let sum = checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        packet.extend([0x60, 0, 0, 0]);
        packet.extend(length.to_be_bytes());
        packet.extend([PROTOCOL, HOPS]);
        packet.extend(addresses);
    }
    packet.extend(datagram);
    Ok(packet)
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
    }
}
