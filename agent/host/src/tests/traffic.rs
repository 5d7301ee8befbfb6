//! Tests of routing and of the guards with real packets.
//!
//! The host (the test's namespace) and a peer (in a namespace of its own) share a LAN. The peer's LAN
//! addresses are mesh addresses too, so only Towline's outer packets may use the LAN to reach the peer.
//! All other packets must enter the tunnel, whose other end the tests hold.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use ipnet::IpNet;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket, sockopt,
};
use towline_core::own_networks::OwnNetworks;
use towline_core::plan::{Plan, RoutePlan, RouteVia};

use super::{apply, net, plan};
use crate::HostNetwork;
use towline_dataplane::vnet::{VNET_HEADER_BYTES, VnetHeader};
use towline_dataplane::{Offloads, Tun, TunIo, checksum, open_tun_with};
use towline_netlink::{AddressOptions, Family, Route, Rtnetlink, VethPeer};
use towline_netns::{NetworkNamespace, namespace_test};
use towline_nftables::{
    Chain, ChainKind, Counter, Expression, Hook, Nft, Rule, Table, TableFamily,
};

pub(super) const PORT: u16 = 51_830;
pub(super) const MARK: u32 = 0x10;
/// LAN addresses of the host and of the peer, one pair per family.
pub(super) const PAIRS: [(&str, &str); 2] =
    [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")];
/// Longest wait for what must happen. It only bounds a failing test.
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);

/// Creates the host's LAN link `eth0`, and the peer at its other end.
pub(super) fn lan() -> NetworkNamespace {
    let peer = NetworkNamespace::new();
    let mut rtnetlink = Rtnetlink::open().unwrap();
    rtnetlink.add_veth("eth0", VethPeer { name: "eth0", namespace: Some(peer.as_fd()) }).unwrap();
    set_up_lan(PAIRS.map(|pair| pair.0), &[]);
    peer.enter(|| set_up_lan(PAIRS.map(|pair| pair.1), &["10.9.2.1/32", "fd00:9::2/128"]));
    // A link comes up with a delay: wait until the peer answers.
    for (host, peer_address) in PAIRS {
        let near = udp(SocketAddr::new(host.parse().unwrap(), 0), false);
        let to = SocketAddr::new(peer_address.parse().unwrap(), 9);
        while near.send_to(b"anybody there?", to).is_err() {}
    }
    peer
}

fn set_up_lan(addresses: [&str; 2], others: &[&str]) {
    let mut rtnetlink = Rtnetlink::open().unwrap();
    let options = AddressOptions { no_dad: true, no_prefix_route: false };
    let loopback = rtnetlink.link_index("lo").unwrap();
    rtnetlink.set_up(loopback, true).unwrap();
    let link = rtnetlink.link_index("eth0").unwrap();
    rtnetlink.set_up(link, true).unwrap();
    for (address, length) in addresses.iter().zip([24, 64]) {
        rtnetlink.add_address(link, net(&format!("{address}/{length}")), options).unwrap();
    }
    for other in others {
        rtnetlink.add_address(loopback, net(other), options).unwrap();
    }
}

/// Returns a plan in which the peer's LAN addresses are reached through the tunnel.
pub(super) fn transparent() -> Plan {
    let mut plan = plan();
    for address in ["192.0.2.2/32", "2001:db8::2/128"] {
        for via in [RouteVia::Link, RouteVia::Unreachable] {
            plan.routes.insert((net(address), via), Default::default());
        }
        plan.firewall.guarded.insert(net(address));
    }
    let node_ips = PAIRS.map(|(host, _)| IpNet::from(host.parse::<IpAddr>().unwrap()));
    let addresses = ["198.19.0.1", "fd00:9::1"].map(|text| text.parse().unwrap());
    plan.firewall.own = OwnNetworks::new(addresses, node_ips, []);
    plan
}

/// Applies a plan, and returns the other end of the tunnel too. Returns `None` if TUN devices cannot be
/// opened.
pub(super) fn with_tunnel(plan: &Plan) -> Option<(HostNetwork, Tun)> {
    let tunnel = match open_tun_with("towline0", Offloads::NONE) {
        Ok(tunnel) => tunnel,
        Err(error) => {
            println!("skipped: {error}");
            return None;
        }
    };
    let mut host = HostNetwork::open().unwrap();
    apply(&mut host, plan);
    Some((host, tunnel))
}

pub(super) fn set_reverse_path_filter(mode: u8) {
    for link in ["all", "eth0"] {
        let path = format!("/proc/sys/net/ipv4/conf/{link}/rp_filter");
        std::fs::write(path, mode.to_string()).unwrap();
    }
}

pub(super) fn udp(bound: SocketAddr, marked: bool) -> UdpSocket {
    let socket = UdpSocket::bind(bound).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    if marked {
        setsockopt(&socket, sockopt::Mark, &MARK).unwrap();
    }
    socket
}

pub(super) fn tcp(to: SocketAddr, marked: bool) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let stream = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&stream, sockopt::SendTimeout, &nix::sys::time::TimeVal::new(5, 0))?;
    if marked {
        setsockopt(&stream, sockopt::Mark, &MARK)?;
    }
    connect(stream.as_raw_fd(), &SockaddrStorage::from(to))?;
    let stream = TcpStream::from(stream);
    stream.set_read_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

pub(super) fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Returns the next packet that the host sends into the tunnel, without the kernel's own packets.
pub(super) fn from_tunnel(tunnel: &Tun) -> Vec<u8> {
    let deadline = std::time::Instant::now() + TIMEOUT;
    let mut buffer = vec![0; 70_000];
    loop {
        assert!(std::time::Instant::now() < deadline, "nothing came out of the tunnel");
        let Ok(length) = nix::unistd::read(tunnel.fd(), &mut buffer) else {
            let mut ready = [nix::poll::PollFd::new(tunnel.fd(), nix::poll::PollFlags::POLLIN)];
            nix::poll::poll(&mut ready, 100u8).unwrap();
            continue;
        };
        let packet = buffer[VNET_HEADER_BYTES..length].to_vec();
        // The kernel sends router solicitations and multicast reports.
        let multicast = match packet[0] >> 4 {
            4 => packet[16] >= 224,
            _ => packet[24] == 0xff,
        };
        if !multicast {
            return packet;
        }
    }
}

/// Sends a packet to the host through the tunnel.
pub(super) fn into_tunnel(tunnel: &Tun, packet: &[u8]) {
    let mut bytes = VnetHeader::default().encode().to_vec();
    bytes.extend_from_slice(packet);
    nix::unistd::write(tunnel.fd(), &bytes).unwrap();
}

/// Returns an IPv4 packet with a TCP segment, with valid checksums.
pub(super) fn segment(from: (&str, u16), to: (&str, u16), flags: u8) -> Vec<u8> {
    let octets = |text: &str| text.parse::<std::net::Ipv4Addr>().unwrap().octets();
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
    packet.extend(octets(from.0));
    packet.extend(octets(to.0));
    let sum = !checksum::fold(checksum::add(0, &packet));
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(from.1.to_be_bytes());
    packet.extend(to.1.to_be_bytes());
    packet.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    let pseudo = [0, 6, 0, 20];
    let sum = checksum::add(checksum::add(0, &packet[12..]), &pseudo);
    packet[36..38].copy_from_slice(&(!checksum::fold(sum)).to_be_bytes());
    packet
}

pub(super) fn counter(chain: &str, comment: &str) -> Counter {
    let loaded = Nft::open().unwrap().read(TableFamily::Inet, "towline").unwrap().unwrap();
    loaded.counter(chain, comment).unwrap()
}

namespace_test! {
    fn outer_packets_of_a_peer_whose_endpoint_is_a_mesh_address_pass() {
        let peer = lan();
        let Some((_host, tunnel)) = with_tunnel(&transparent()) else { return };
        for mode in [0, 1, 2] {
            set_reverse_path_filter(mode);
            for (host_address, peer_address) in PAIRS {
                let ours = udp(at(host_address, PORT), true);
                let theirs = peer.enter(|| udp(at(peer_address, PORT), false));
                // Packets of other sockets enter the tunnel, even to the same address and port.
                let other = udp(at(host_address, 0), false);
                other.send_to(b"inner", theirs.local_addr().unwrap()).unwrap();
                let inner = from_tunnel(&tunnel);
                assert!(inner.ends_with(b"inner"), "{mode} {host_address}");

                ours.send_to(b"outer", theirs.local_addr().unwrap()).unwrap();
                let mut buffer = [0; 100];
                let (length, from) = theirs.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], from), (&b"outer"[..], ours.local_addr().unwrap()));
                theirs.send_to(b"answer", from).unwrap();
                let (length, _) = ours.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], b"answer", "rp_filter {mode}, {host_address}");
            }
        }
    }
}

namespace_test! {
    fn a_filter_that_asks_for_the_way_back_with_the_mark_lets_outer_packets_pass() {
        let peer = lan();
        let Some((_host, _tunnel)) = with_tunnel(&transparent()) else { return };
        // firewalld's IPv6 filter: drops packets whose return route uses another link.
        const SOURCE_MARK_INPUT: u32 = 1 | 4 | 8;
        const LINK: u32 = 1;
        let rule = Rule::new()
            .not_input("lo")
            .family(Family::V6)
            .step(Expression::Fib { flags: SOURCE_MARK_INPUT, result: LINK, register: 1 })
            .step(Expression::Compare { register: 1, operator: 0, value: vec![0; 4] })
            .comment("filtered")
            .counter()
            .drop();
        let filter = Table::new(TableFamily::Inet, "firewalld").chain(
            "rpfilter",
            Chain::base(ChainKind::Filter, Hook::Prerouting, -290).rule(rule),
        );
        Nft::open().unwrap().load(&filter).unwrap();
        let (host_address, peer_address) = PAIRS[1];
        let ours = udp(at(host_address, PORT), true);
        peer.enter(|| udp(at(peer_address, PORT), false).send_to(b"outer", at(host_address, PORT)))
            .unwrap();
        let mut buffer = [0; 100];
        let (length, _) = ours.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"outer");
    }
}

namespace_test! {
    fn packets_that_claim_a_mesh_source_outside_the_tunnel_are_dropped() {
        let peer = lan();
        let Some((_host, tunnel)) = with_tunnel(&transparent()) else { return };
        set_reverse_path_filter(0);
        let forged_sources =
            [["10.9.2.1", PAIRS[0].1], ["fd00:9::2", PAIRS[1].1]].into_iter().zip(PAIRS);
        for (sources, (host_address, peer_address)) in forged_sources {
            for forged in sources {
                let service = udp(at(host_address, 4_444), false);
                let ours = udp(at(host_address, PORT), true);
                let send = |from, port, what: &[u8]| {
                    peer.enter(|| udp(at(from, 0), false).send_to(what, at(host_address, port)))
                        .unwrap();
                };
                send(forged, 4_444, b"forged");
                // This packet takes the same link after the forged one, and is accepted.
                send(peer_address, PORT, b"outer");
                let mut buffer = [0; 100];
                ours.recv_from(&mut buffer).unwrap();
                service.set_nonblocking(true).unwrap();
                let received = service.recv_from(&mut buffer);
                assert_eq!(received.unwrap_err().kind(), io::ErrorKind::WouldBlock, "{forged}");
            }
        }
        for family in ["IPv4", "IPv6"] {
            // A lower bound, because neighbour discovery from a forged address counts too.
            assert!(counter("outer", &format!("forged source, {family}")).packets >= 2);
        }
        // A packet with the same source out of the tunnel is accepted.
        let service = TcpListener::bind(at("198.19.0.1", 4_444)).unwrap();
        into_tunnel(&tunnel, &segment(("10.9.2.1", 999), ("198.19.0.1", 4_444), SYN));
        let answer = from_tunnel(&tunnel);
        assert_eq!(answer[33] & (SYN | ACK), SYN | ACK);
        drop(service);
    }
}

pub(super) const SYN: u8 = 2;
pub(super) const ACK: u8 = 16;

namespace_test! {
    fn a_controller_at_a_mesh_address_is_reached_outside_the_tunnel() {
        let peer = lan();
        let mut plan = transparent();
        plan.underlay.controllers = PAIRS.map(|pair| at(pair.1, 7_443)).into();
        let Some((_host, _tunnel)) = with_tunnel(&plan) else { return };
        for mode in [0, 1, 2] {
            set_reverse_path_filter(mode);
            for (_, peer_address) in PAIRS {
                let listener = peer.enter(|| TcpListener::bind(at(peer_address, 7_443)).unwrap());
                let mut ours = tcp(at(peer_address, 7_443), true).unwrap();
                ours.write_all(b"hello").unwrap();
                let (mut theirs, _) = listener.accept().unwrap();
                let mut buffer = [0; 5];
                theirs.read_exact(&mut buffer).unwrap();
                assert_eq!(&buffer, b"hello", "rp_filter {mode}, {peer_address}");
            }
        }
    }
}

namespace_test! {
    fn plain_ports_are_answered_the_way_they_were_reached() {
        let peer = lan();
        let mut plan = transparent();
        plan.underlay.plain_ports = [6_443].into();
        let Some((_host, tunnel)) = with_tunnel(&plan) else { return };
        for mode in [0, 1, 2] {
            set_reverse_path_filter(mode);
            for (host_address, _) in PAIRS {
                let listener = TcpListener::bind(at(host_address, 6_443)).unwrap();
                let mut theirs = peer.enter(|| tcp(at(host_address, 6_443), false)).unwrap();
                theirs.write_all(b"hello").unwrap();
                let (mut ours, _) = listener.accept().unwrap();
                let mut buffer = [0; 5];
                ours.read_exact(&mut buffer).unwrap();
                ours.write_all(b"world").unwrap();
                theirs.read_exact(&mut buffer).unwrap();
                assert_eq!(&buffer, b"world", "rp_filter {mode}, {host_address}");
            }
            // Now the same node, port and service through the tunnel.
            let listener = TcpListener::bind(at("192.0.2.1", 6_443)).unwrap();
            let port = 1_000 + u16::from(mode);
            into_tunnel(&tunnel, &segment(("192.0.2.2", port), ("192.0.2.1", 6_443), SYN));
            let answer = from_tunnel(&tunnel);
            assert_eq!(answer[33] & (SYN | ACK), SYN | ACK, "rp_filter {mode}");
            assert_eq!(answer[22..24], port.to_be_bytes(), "rp_filter {mode}");
            drop(listener);
        }
        // Other ports cannot be reached outside the tunnel.
        let service = udp(at("192.0.2.1", 6_444), false);
        peer.enter(|| udp(at("192.0.2.2", 0), false).send_to(b"x", at("192.0.2.1", 6_444))).unwrap();
        let listener = TcpListener::bind(at("192.0.2.1", 6_443)).unwrap();
        peer.enter(|| tcp(at("192.0.2.1", 6_443), false)).unwrap();
        listener.accept().unwrap();
        service.set_nonblocking(true).unwrap();
        assert!(service.recv(&mut [0; 9]).is_err());
    }
}

namespace_test! {
    fn sources_that_may_come_either_way_are_answered_the_way_they_came() {
        let peer = lan();
        let mut plan = transparent();
        plan.firewall.plain = [net("192.0.2.2/32"), net("2001:db8::2/128")].into();
        let Some((_host, _tunnel)) = with_tunnel(&plan) else { return };
        for mode in [0, 2] {
            set_reverse_path_filter(mode);
            for (host_address, _) in PAIRS {
                let listener = TcpListener::bind(at(host_address, 80)).unwrap();
                let mut theirs = peer.enter(|| tcp(at(host_address, 80), false)).unwrap();
                let (mut ours, _) = listener.accept().unwrap();
                ours.write_all(b"world").unwrap();
                let mut buffer = [0; 5];
                theirs.read_exact(&mut buffer).unwrap();
                assert_eq!(&buffer, b"world", "rp_filter {mode}, {host_address}");
            }
        }
    }
}

namespace_test! {
    fn node_ips_of_a_trusted_site_are_reached_past_the_tunnel_but_not_by_our_pods() {
        let peer = lan();
        let mut plan = transparent();
        for (_, peer_address) in PAIRS {
            let node_ip = IpNet::from(peer_address.parse::<IpAddr>().unwrap());
            plan.routes.remove(&(node_ip, RouteVia::Link));
            plan.routes.insert((node_ip, RouteVia::Native), RoutePlan::default());
            plan.firewall.native.insert(node_ip);
            plan.firewall.plain.insert(node_ip);
            plan.detour.destinations.insert(node_ip);
        }
        plan.detour.sources = [net("10.9.1.0/24")].into();
        let Some((mut host, tunnel)) = with_tunnel(&plan) else { return };
        for mode in [0, 1, 2] {
            set_reverse_path_filter(mode);
            for (host_address, peer_address) in PAIRS {
                let listener = peer.enter(|| TcpListener::bind(at(peer_address, 80)).unwrap());
                let mut ours = tcp(at(peer_address, 80), false).unwrap();
                let (mut theirs, from) = listener.accept().unwrap();
                assert_eq!(from.ip().to_string(), host_address);
                theirs.write_all(b"hello").unwrap();
                let mut buffer = [0; 5];
                ours.read_exact(&mut buffer).unwrap();

                let listener = TcpListener::bind(at(host_address, 81)).unwrap();
                let mut theirs = peer.enter(|| tcp(at(host_address, 81), false)).unwrap();
                let (mut ours, _) = listener.accept().unwrap();
                ours.write_all(b"world").unwrap();
                theirs.read_exact(&mut buffer).unwrap();
                assert_eq!(&buffer, b"world", "rp_filter {mode}, {host_address}");
            }
        }
        // A pod of this host sends to the same node IP.
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let loopback = rtnetlink.link_index("lo").unwrap();
        rtnetlink.add_address(loopback, net("10.9.1.7/32"), AddressOptions::default()).unwrap();
        udp(at("10.9.1.7", 0), false).send_to(b"pod", at("192.0.2.2", 80)).unwrap();
        assert!(from_tunnel(&tunnel).ends_with(b"pod"));

        // The node IP is guarded again once the site is not trusted any more.
        let changes = host.apply(&transparent()).unwrap();
        assert_eq!(changes.problems, []);
        assert!(changes.messages > 0);
        udp(at("192.0.2.1", 0), false).send_to(b"inner", at("192.0.2.2", 80)).unwrap();
        assert!(from_tunnel(&tunnel).ends_with(b"inner"));
    }
}

namespace_test! {
    fn connections_through_the_tunnel_announce_what_fits_it() {
        let pod = lan();
        let mut plan = plan();
        plan.routes.get_mut(&(net("10.9.2.0/24"), RouteVia::Link)).unwrap().mtu = None;
        let Some((_host, tunnel)) = with_tunnel(&plan) else { return };
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        pod.enter(|| {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            let route = Route::new(net("10.9.2.0/24")).via("192.0.2.1".parse().unwrap());
            rtnetlink.add_route(&route).unwrap();
        });
        let mss = |packet: &[u8]| {
            let options = &packet[40..];
            assert_eq!(options[..2], [2, 4], "the first option is the MSS");
            u16::from_be_bytes([options[2], options[3]])
        };
        // The pod's connection is forwarded; its own link would allow an MSS of 1,460.
        let stream: OwnedFd = pod.enter(|| {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let stream = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
            let to = SockaddrStorage::from(at("10.9.2.7", 80));
            assert_eq!(connect(stream.as_raw_fd(), &to), Err(nix::errno::Errno::EINPROGRESS));
            stream
        });
        let syn = from_tunnel(&tunnel);
        assert_eq!(syn[33] & (SYN | ACK), SYN);
        assert_eq!(mss(&syn), 1_380);
        drop(stream);

        let listener = TcpListener::bind(at("198.19.0.1", 80)).unwrap();
        into_tunnel(&tunnel, &segment(("10.9.2.7", 999), ("198.19.0.1", 80), SYN));
        let mut answer = from_tunnel(&tunnel);
        while answer[33] & ACK == 0 {
            answer = from_tunnel(&tunnel);
        }
        assert_eq!(mss(&answer), 1_380);
        drop(listener);
    }
}

namespace_test! {
    fn a_socket_that_sent_while_our_routes_were_gone_takes_the_guard_again() {
        let _peer = lan();
        let mut rtnetlink = Rtnetlink::open().unwrap();
        for (guarded, (_, peer)) in ["10.9.0.0/16", "fd00:9::/64"].into_iter().zip(PAIRS) {
            let gateway = peer.parse().unwrap();
            rtnetlink.add_route(&Route::new(net(guarded)).via(gateway)).unwrap();
        }
        let Ok(_tunnel) = open_tun_with("towline0", Offloads::NONE) else { return };
        // Without the firewall, the routes are the only guard.
        let mut host = HostNetwork::open().unwrap();
        host.lack_nftables();
        host.apply(&plan()).unwrap();
        for rules in [false, true] {
            for family in Family::ALL {
                for route in rtnetlink.routes(family, Some(21_580)).unwrap() {
                    rtnetlink.delete_route(&route).unwrap();
                }
                let ours = |rule: &towline_netlink::Rule| rules && rule.made_by == crate::OURS;
                for rule in rtnetlink.rules(family).unwrap().into_iter().filter(ours) {
                    rtnetlink.delete_rule(&rule).unwrap();
                }
            }
            let sockets = [("0.0.0.0:0", "10.9.3.1:9"), ("[::]:0", "[fd00:9::77]:9")].map(|(any, to)| {
                let socket = UdpSocket::bind(any).unwrap();
                socket.connect(to).unwrap();
                socket.send(b"clear").unwrap();
                socket
            });
            host.invalidate();
            host.apply(&plan()).unwrap();
            for socket in &sockets {
                let to = socket.peer_addr().unwrap();
                assert!(socket.send(b"guarded").is_err(), "to {to}, rules flushed: {rules}");
            }
        }
    }
}
