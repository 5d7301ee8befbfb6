//! Tests of the ingress checks: packets out of the tunnel must be addressed to this node, and packets
//! from outside must not have a source of this node.
//!
//! The host (the test's namespace) and another machine of its LAN (a namespace of its own) share
//! `eth0`. The tests hold the other end of the tunnel.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use towline_core::own_networks::OwnNetworks;
use towline_core::plan::{Plan, RoutePlan, RouteVia};

use super::traffic::{
    PAIRS, TIMEOUT, at, counter, from_tunnel, into_tunnel, lan, set_reverse_path_filter, udp,
    with_tunnel,
};
use super::{address, apply, net, plan};
use towline_dataplane::{Tun, checksum};
use towline_netlink::{AddressOptions, Family, Route, Rtnetlink, VethPeer};
use towline_netns::{NetworkNamespace, add_link, namespace_test};
use towline_nftables::{Chain, ChainKind, Hook, Nft, Policy, Rule, Table, TableFamily};

const OVERLAY: [&str; 2] = ["198.19.0.1", "fd00:9::1"];
/// Addresses of another node of the mesh, one per family.
const THERE: [&str; 2] = ["10.9.2.7", "fd00:9::7"];
const PORT: u16 = 4_444;
const ANY: [&str; 2] = ["0.0.0.0", "::"];

/// Returns the plan of a node that announces the networks `announced` and forwards to `forward_to`.
fn announcing(announced: &[&str], forward_to: &[&str]) -> Plan {
    let mut plan = plan();
    let nets = |list: &[&str]| list.iter().map(|text| net(text)).collect::<Vec<_>>();
    // Networks that this node announces are not guarded.
    plan.firewall.guarded = ["198.19.0.0/16", "10.9.2.0/24", "fd00:9::/64"].map(net).into();
    plan.routes.retain(|(guard, _), _| *guard != net("10.9.0.0/16"));
    plan.routes.insert((net("fd00:9::7/128"), RouteVia::Link), RoutePlan::default());
    plan.firewall.own = OwnNetworks::new(OVERLAY.map(address), nets(announced), nets(forward_to));
    plan
}

/// Returns an IP packet with a UDP datagram, with valid checksums.
fn datagram(from: &str, to: &str, port: u16, payload: &[u8]) -> Vec<u8> {
    const UDP: u8 = 17;
    let (from, to) = (address(from), address(to));
    let length = (8 + payload.len()) as u16;
    let mut packet = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = (20 + length).to_be_bytes();
            let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, UDP, 0, 0];
            header.extend(from.octets());
            header.extend(to.octets());
            let sum = !checksum::fold(checksum::add(0, &header));
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            header
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let total = length.to_be_bytes();
            let mut header = vec![0x60, 0, 0, 0, total[0], total[1], UDP, 64];
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        _ => panic!("two families"),
    };
    let mut udp = 999u16.to_be_bytes().to_vec();
    udp.extend(port.to_be_bytes());
    udp.extend(length.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(payload);
    let pseudo = checksum::pseudo(&from, &to, UDP) + u64::from(length);
    let sum = !checksum::fold(checksum::add(pseudo, &udp));
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    packet.extend(udp);
    packet
}

pub(super) fn received(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 100];
    let length = socket.recv(&mut buffer).expect("a datagram in time");
    buffer[..length].to_vec()
}

/// Sends until a datagram arrives, because a new link may drop the first ones.
pub(super) fn reach(from: &UdpSocket, to: SocketAddr, service: &UdpSocket) {
    let send = |number: u8| {
        // It fails while a link comes up.
        let _ = from.send_to(&[number], to);
    };
    reach_by(send, service);
}

/// Sends numbers until one arrives in time. All before it have arrived or are lost then, since none
/// overtakes another, so that none arrives later.
fn reach_by(send: impl Fn(u8), service: &UdpSocket) {
    service.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let arrives = |number: u8| {
        send(number);
        let mut buffer = [0; 100];
        while let Ok(length) = service.recv(&mut buffer) {
            if buffer[..length] == [number] {
                return true;
            }
        }
        false
    };
    assert!((0..=u8::MAX).any(arrives), "nothing arrived");
    service.set_read_timeout(Some(TIMEOUT)).unwrap();
}

/// Writes a datagram for this node into the tunnel until it arrives, because a new link may drop the
/// first packets.
fn reach_by_tunnel(tunnel: &Tun, family: usize, port: u16, service: &UdpSocket) {
    let send = |number: u8| {
        into_tunnel(tunnel, &datagram(THERE[family], OVERLAY[family], port, &[number]));
    };
    reach_by(send, service);
}

/// Asserts that the socket has no queued datagram.
pub(super) fn is_empty(socket: &UdpSocket, what: &str) {
    socket.set_nonblocking(true).unwrap();
    let error = socket.recv(&mut [0; 100]).expect_err(what);
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{what}");
    socket.set_nonblocking(false).unwrap();
}

/// Enables forwarding in the current namespace.
pub(super) fn forward() {
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
}

/// Adds routes to these networks through the host. Called in the other machine's namespace.
fn route_to_host(networks: &[&str]) {
    let mut rtnetlink = Rtnetlink::open().unwrap();
    for network in networks {
        let gateway = PAIRS[usize::from(network.contains(':'))].0;
        rtnetlink.add_route(&Route::new(net(network)).via(address(gateway))).unwrap();
    }
}

fn add_addresses(link: &str, addresses: &[&str]) {
    let mut rtnetlink = Rtnetlink::open().unwrap();
    let index = rtnetlink.link_index(link).unwrap();
    rtnetlink.set_up(index, true).unwrap();
    let options = AddressOptions { no_dad: true, no_prefix_route: false };
    for address in addresses {
        rtnetlink.add_address(index, net(address), options).unwrap();
    }
}

/// Creates the namespace of a pod, whose `eth0` is the other end of a link of the host.
pub(super) fn pod(link: &str, host: &[&str], pod: &[&str]) -> NetworkNamespace {
    let namespace = NetworkNamespace::new();
    let peer = VethPeer { name: "eth0", namespace: Some(namespace.as_fd()) };
    Rtnetlink::open().unwrap().add_veth(link, peer).unwrap();
    add_addresses(link, host);
    namespace.enter(|| add_addresses("eth0", pod));
    namespace
}

namespace_test! {
    fn what_comes_out_of_the_tunnel_for_somebody_else_goes_nowhere() {
        let neighbour = lan();
        forward();
        neighbour.enter(|| set_reverse_path_filter(0));
        let Some((mut host, tunnel)) = with_tunnel(&announcing(&[], &[])) else { return };
        // An IPv6 socket occupies the IPv4 port too.
        let port = |family: usize| PORT + family as u16;
        let services = [0, 1].map(|family| udp(at(ANY[family], port(family)), false));
        let theirs =
            neighbour.enter(|| [0, 1].map(|family| udp(at(ANY[family], port(family)), false)));
        let elsewhere = [
            // The uplink's address, another machine of the LAN, the broadcast address, special
            // addresses, and addresses outside the LAN.
            vec![
                "192.0.2.1", "192.0.2.2", "192.0.2.255", "127.0.0.1", "169.254.169.254",
                "224.0.0.1", "255.255.255.255", "203.0.113.1", "10.9.2.9",
            ],
            vec!["2001:db8::1", "2001:db8::2", "::1", "fe80::1", "ff02::1", "2001:db8:5::1"],
        ];
        for family in [0, 1] {
            reach_by_tunnel(&tunnel, family, port(family), &services[family]);
            for to in &elsewhere[family] {
                into_tunnel(&tunnel, &datagram(THERE[family], to, port(family), b"stray"));
            }
            into_tunnel(&tunnel, &datagram(THERE[family], OVERLAY[family], port(family), b"ours"));
            assert_eq!(received(&services[family]), b"ours");
            is_empty(&services[family], "packets to other destinations");
        }
        assert!(counter("ingress", "not for this node").packets >= 6);
        assert!(counter("ingress", "special destination, IPv4").packets >= 4);
        assert!(counter("ingress", "special destination, IPv6").packets >= 2);

        // The LAN is announced, or only forwarded to: its machines are reached, but not by broadcast.
        for (announced, forward_to) in [
            (vec!["192.0.2.0/24", "2001:db8::/64"], vec![]),
            (vec![], vec!["192.0.2.0/24", "2001:db8::/64"]),
            (vec![], vec!["0.0.0.0/0", "::/0"]),
        ] {
            apply(&mut host, &announcing(&announced, &forward_to));
            for family in [0, 1] {
                let special = ["127.0.0.1", "169.254.169.254", "192.0.2.255", "224.0.0.1"];
                for to in special.iter().filter(|_| family == 0) {
                    into_tunnel(&tunnel, &datagram(THERE[family], to, port(family), b"stray"));
                }
                into_tunnel(&tunnel, &datagram(THERE[family], PAIRS[family].1, port(family), b"reached"));
                assert_eq!(received(&theirs[family]), b"reached");
                is_empty(&theirs[family], "a broadcast");
                is_empty(&services[family], "a broadcast or a loopback address");
            }
        }
        assert!(counter("ingress", "broadcast out of the tunnel").packets >= 3);
    }
}

namespace_test! {
    fn a_service_behind_one_of_our_addresses_is_judged_by_that_address() {
        let neighbour = lan();
        forward();
        neighbour.enter(|| {
            set_reverse_path_filter(0);
            route_to_host(&["10.9.2.0/24", "fd00:9::7/128"]);
        });
        let Some((_host, tunnel)) = with_tunnel(&announcing(&[], &[])) else { return };
        let mut arriving = Chain::base(ChainKind::Nat, Hook::Prerouting, -100);
        for (family, backend) in Family::ALL.into_iter().zip(PAIRS.map(|pair| pair.1)) {
            let port = Rule::new().family(family).protocol(17).destination_port(3_000);
            arriving = arriving.rule(port.dnat(address(backend), Some(PORT)));
        }
        let table = Table::new(TableFamily::Inet, "nat").chain("arriving", arriving);
        Nft::open().unwrap().load(&table).unwrap();
        for family in [0, 1] {
            let (backend, there) = (PAIRS[family].1, THERE[family]);
            let theirs = neighbour.enter(|| udp(at(backend, PORT), false));
            // The service cannot be reached by an address that is not this node's.
            into_tunnel(&tunnel, &datagram(there, PAIRS[family].0, 3_000, b"stray"));
            into_tunnel(&tunnel, &datagram(there, OVERLAY[family], 3_000, b"called"));
            let mut buffer = [0; 100];
            let (length, from) = theirs.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], from), (&b"called"[..], at(there, 999)));
            theirs.send_to(b"answer", from).unwrap();
            let answer = from_tunnel(&tunnel);
            assert!(answer.ends_with(b"answer"));
            let source = if family == 0 { answer[12..16].to_vec() } else { answer[8..24].to_vec() };
            let service = match address(OVERLAY[family]) {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            assert_eq!(source, service);
            is_empty(&theirs, "the service by another address");
        }
    }
}

namespace_test! {
    fn what_docker_keeps_from_strangers_it_keeps_from_the_mesh() {
        // The other machine stands for a container, and the LAN for Docker's bridge.
        let container = lan();
        forward();
        container.enter(|| {
            set_reverse_path_filter(0);
            route_to_host(&["10.9.2.0/24"]);
        });
        let user = Chain::regular();
        let drop_all = |hook| Chain::base(ChainKind::Filter, hook, 0).policy(Policy::Drop);
        let docker = Table::new(TableFamily::Ip, "filter")
            .chain("DOCKER-USER", user)
            .chain("FORWARD", drop_all(Hook::Forward).rule(Rule::new().jump("DOCKER-USER")));
        let mut nft = Nft::open().unwrap();
        nft.load(&docker).unwrap();
        let port = Rule::new().destination(net("198.19.0.1/32")).protocol(17).destination_port(80);
        let published = port.dnat(address("192.0.2.2"), Some(PORT));
        let arriving = Chain::base(ChainKind::Nat, Hook::Prerouting, -100).rule(published);
        nft.load(&Table::new(TableFamily::Ip, "nat").chain("arriving", arriving)).unwrap();

        let Some((mut host, tunnel)) = with_tunnel(&announcing(&[], &[])) else { return };
        let service = container.enter(|| udp(at("192.0.2.2", PORT), false));
        let unpublished = container.enter(|| udp(at("192.0.2.2", 22), false));
        into_tunnel(&tunnel, &datagram(THERE[0], "192.0.2.2", 22, b"stray"));
        into_tunnel(&tunnel, &datagram(THERE[0], "192.0.2.2", PORT, b"stray"));
        into_tunnel(&tunnel, &datagram(THERE[0], "198.19.0.1", 80, b"published"));
        assert_eq!(received(&service), b"published");
        is_empty(&unpublished, "a port that is not published");
        is_empty(&service, "a published port by the container's own address");
        service.send_to(b"answer", at(THERE[0], 999)).unwrap();
        assert!(from_tunnel(&tunnel).ends_with(b"answer"));
        // If the container's network is announced, both directions pass.
        apply(&mut host, &announcing(&["192.0.2.0/24"], &[]));
        into_tunnel(&tunnel, &datagram(THERE[0], "192.0.2.2", 22, b"reached"));
        assert_eq!(received(&unpublished), b"reached");
        unpublished.send_to(b"begun here", at("10.9.2.8", 9)).unwrap();
        assert!(from_tunnel(&tunnel).ends_with(b"begun here"));
        // They do not pass any more once it is not announced any more.
        apply(&mut host, &announcing(&[], &[]));
        into_tunnel(&tunnel, &datagram(THERE[0], "192.0.2.2", 23, b"stray"));
        let rules = nft.read_chain(TableFamily::Ip, "filter", "DOCKER-USER").unwrap().unwrap();
        assert_eq!(rules.table.chains["DOCKER-USER"].rules.len(), 2);
        host.invalidate();
        assert_eq!(apply(&mut host, &announcing(&[], &[])).messages, 0, "read as it was written");
    }
}

const PODS: [&str; 2] = ["10.9.1.0/24", "fd00:9:1::/64"];
const POD: [&str; 2] = ["10.9.1.7", "fd00:9:1::7"];

namespace_test! {
    fn a_source_of_ours_passes_by_the_link_that_leads_to_it_alone() {
        let neighbour = lan();
        forward();
        let pod_gateway = ["10.9.1.1", "fd00:9:1::1"];
        let pod = pod(
            "cni0",
            &["10.9.1.1/24", "fd00:9:1::1/64"],
            &["10.9.1.7/24", "fd00:9:1::7/64"],
        );
        pod.enter(|| {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            for (any, gateway) in ["0.0.0.0/0", "::/0"].into_iter().zip(pod_gateway) {
                rtnetlink.add_route(&Route::new(net(any)).via(address(gateway))).unwrap();
            }
        });
        neighbour.enter(|| {
            add_addresses("lo", &["10.9.1.7/32", "fd00:9:1::7/128"]);
            route_to_host(&["10.9.1.1/32", "10.9.2.7/32", "198.19.0.1/32"]);
            route_to_host(&["fd00:9:1::1/128", "fd00:9::/64"]);
        });
        let Some((_host, tunnel)) = with_tunnel(&announcing(&PODS, &[])) else { return };
        for mode in [0, 1, 2] {
            set_reverse_path_filter(mode);
            for family in [0, 1] {
                let (uplink, lan_address) = PAIRS[family];
                let service = udp(at(ANY[family], PORT), false);
                let honest = pod.enter(|| udp(at(POD[family], 0), false));
                reach(&honest, at(uplink, PORT), &service);
                let mesh = THERE[family];
                let forged = neighbour.enter(|| udp(at(POD[family], 0), false));
                for to in [uplink, pod_gateway[family], mesh, OVERLAY[family]] {
                    forged.send_to(b"forged", at(to, PORT)).unwrap();
                }
                let other = neighbour.enter(|| udp(at(lan_address, 0), false));
                other.send_to(b"honest", at(uplink, PORT)).unwrap();
                assert_eq!(received(&service), b"honest", "rp_filter {mode}");
                is_empty(&service, &format!("a forged pod, rp_filter {mode}, {uplink}"));

                // The pod itself may use its address.
                honest.send_to(b"pod", at(uplink, PORT)).unwrap();
                assert_eq!(received(&service), b"pod", "rp_filter {mode}");
                honest.send_to(b"pod", at(mesh, PORT)).unwrap();
                assert!(from_tunnel(&tunnel).ends_with(b"pod"), "and nothing forged before it");
            }
        }
        assert!(counter("outer", "own network as source, IPv4").packets >= 12);
        assert!(counter("outer", "own network as source, IPv6").packets >= 12);
    }
}

namespace_test! {
    fn pods_are_closed_while_the_container_network_has_no_route_to_them() {
        let neighbour = lan();
        forward();
        set_reverse_path_filter(0);
        let mut rtnetlink = Rtnetlink::open().unwrap();
        for (any, (_, gateway)) in ["0.0.0.0/0", "::/0"].into_iter().zip(PAIRS) {
            rtnetlink.add_route(&Route::new(net(any)).via(address(gateway))).unwrap();
        }
        neighbour.enter(|| {
            add_addresses("lo", &["10.9.1.7/32", "fd00:9:1::7/128"]);
            route_to_host(&["10.9.2.7/32", "198.19.0.1/32", "fd00:9::/64"]);
        });
        let mut plan = announcing(&PODS, &[]);
        plan.pods = PODS.map(net).into();
        let Some((_host, tunnel)) = with_tunnel(&plan) else { return };
        for family in [0, 1] {
            let (uplink, lan_address) = PAIRS[family];
            let service = udp(at(ANY[family], PORT), false);
            let other = neighbour.enter(|| udp(at(lan_address, 0), false));
            reach(&other, at(uplink, PORT), &service);
            reach_by_tunnel(&tunnel, family, PORT, &service);
            let forged = neighbour.enter(|| udp(at(POD[family], PORT), false));
            for to in [uplink, THERE[family], OVERLAY[family]] {
                forged.send_to(b"forged", at(to, PORT)).unwrap();
            }
            other.send_to(b"honest", at(uplink, PORT)).unwrap();
            assert_eq!(received(&service), b"honest");
            is_empty(&service, "a forged pod");
            // Neither what this host sends nor what comes out of the tunnel leaves by the default
            // route.
            assert!(service.send_to(b"clear", at(POD[family], PORT)).is_err());
            into_tunnel(&tunnel, &datagram(THERE[family], POD[family], PORT, b"clear"));
            into_tunnel(&tunnel, &datagram(THERE[family], OVERLAY[family], PORT, b"ours"));
            assert_eq!(received(&service), b"ours");
            is_empty(&forged, "a packet for a pod");
        }
        // The container network starts.
        let pod =
            pod("cni0", &["10.9.1.1/24", "fd00:9:1::1/64"], &["10.9.1.7/24", "fd00:9:1::7/64"]);
        for family in [0, 1] {
            let service = pod.enter(|| udp(at(POD[family], PORT), false));
            let host = udp(at(ANY[family], 0), false);
            reach(&host, at(POD[family], PORT), &service);
            into_tunnel(&tunnel, &datagram(THERE[family], POD[family], PORT, b"reached"));
            assert_eq!(received(&service), b"reached");
        }
    }
}

namespace_test! {
    fn a_local_network_never_leaves_by_another_route_when_its_link_loses_it() {
        let neighbour = lan();
        forward();
        let mut rtnetlink = Rtnetlink::open().unwrap();
        for (any, (_, gateway)) in ["0.0.0.0/0", "::/0"].into_iter().zip(PAIRS) {
            rtnetlink.add_route(&Route::new(net(any)).via(address(gateway))).unwrap();
        }
        // A wider route than the network of the link leads elsewhere too.
        let wider = Route::new(net("192.168.0.0/16")).via(address(PAIRS[0].1));
        rtnetlink.add_route(&wider).unwrap();
        const LOCAL: [&str; 2] = ["192.168.1.0/24", "fd77::/64"];
        const NEAR: [&str; 2] = ["192.168.1.7", "fd77::7"];
        neighbour.enter(|| add_addresses("lo", &["192.168.1.7/32", "fd77::7/128"]));
        let near = pod("lan0", &["192.168.1.1/24", "fd77::1/64"], &["192.168.1.7/24", "fd77::7/64"]);
        let mut plan = announcing(&[], &LOCAL);
        for local in LOCAL.map(net) {
            plan.local.insert(local, local);
            plan.routes.insert((local, RouteVia::Native), RoutePlan::default());
        }
        // Another node holds the range around it, and an address in it.
        for held in ["192.168.0.0/16", "192.168.1.9/32", "fd77::9/128"].map(net) {
            plan.routes.insert((held, RouteVia::Link), RoutePlan::default());
        }
        let Some((_host, tunnel)) = with_tunnel(&plan) else { return };
        for family in [0, 1] {
            let service = near.enter(|| udp(at(NEAR[family], PORT), false));
            let host = udp(at(ANY[family], 0), false);
            reach(&host, at(NEAR[family], PORT), &service);
            let inside = ["192.168.1.9", "fd77::9"][family];
            host.send_to(b"inside", at(inside, PORT)).unwrap();
            assert!(from_tunnel(&tunnel).ends_with(b"inside"));
        }
        let link = rtnetlink.link_index("lan0").unwrap();
        rtnetlink.set_up(link, false).unwrap();
        for family in [0, 1] {
            let elsewhere = neighbour.enter(|| udp(at(NEAR[family], PORT), false));
            let host = udp(at(ANY[family], 0), false);
            assert!(host.send_to(b"clear", at(NEAR[family], PORT)).is_err(), "{family}");
            into_tunnel(&tunnel, &datagram(THERE[family], NEAR[family], PORT, b"clear"));
            is_empty(&elsewhere, "a packet for the network that was left");
        }
    }
}

namespace_test! {
    fn our_own_addresses_come_from_nowhere_else() {
        let neighbour = lan();
        forward();
        set_reverse_path_filter(0);
        neighbour.enter(|| add_addresses("lo", &["10.99.0.1/32", "fd99::1/128"]));
        let mut plan = announcing(&[], &[]);
        let addresses = OVERLAY.into_iter().chain(["10.99.0.1", "fd99::1"]).map(address);
        plan.firewall.own = OwnNetworks::new(addresses, [], []);
        let Some((_host, _tunnel)) = with_tunnel(&plan) else { return };
        // The addresses have return routes by the LAN in the main table.
        let mut rtnetlink = Rtnetlink::open().unwrap();
        for (own, (_, lan_address)) in ["10.99.0.1/32", "fd99::1/128"].into_iter().zip(PAIRS) {
            rtnetlink.add_route(&Route::new(net(own)).via(address(lan_address))).unwrap();
        }
        for (own, (uplink, lan_address)) in ["10.99.0.1", "fd99::1"].into_iter().zip(PAIRS) {
            let service = udp(at(uplink, PORT), false);
            for (from, what) in [(own, b"forged"), (lan_address, b"honest")] {
                let theirs = neighbour.enter(|| udp(at(from, 0), false));
                theirs.send_to(what, at(uplink, PORT)).unwrap();
            }
            assert_eq!(received(&service), b"honest");
            is_empty(&service, own);
        }
    }
}

namespace_test! {
    fn a_subnet_router_with_one_link_keeps_working() {
        let neighbour = lan();
        forward();
        neighbour.enter(|| route_to_host(&["10.9.2.0/24", "fd00:9::7/128"]));
        let networks = ["192.0.2.0/24", "2001:db8::/64"];
        let Some((_host, tunnel)) = with_tunnel(&announcing(&networks, &[])) else { return };
        for mode in [0, 1, 2] {
            set_reverse_path_filter(mode);
            for family in [0, 1] {
                let (uplink, lan_address) = PAIRS[family];
                let service = udp(at(uplink, PORT), false);
                let theirs = neighbour.enter(|| udp(at(lan_address, 0), false));
                theirs.send_to(b"to us", at(uplink, PORT)).unwrap();
                assert_eq!(received(&service), b"to us", "rp_filter {mode}");
                theirs.send_to(b"to the mesh", at(THERE[family], PORT)).unwrap();
                assert!(from_tunnel(&tunnel).ends_with(b"to the mesh"), "rp_filter {mode}");
            }
        }
    }
}

namespace_test! {
    fn pods_of_cilium_pass_though_the_way_back_is_another_link() {
        let _neighbour = lan();
        set_reverse_path_filter(0);
        let Some((_host, _tunnel)) = with_tunnel(&announcing(&PODS, &[])) else { return };
        let pod = pod("lxc1a2b3c", &[], &["10.9.1.8/32"]);
        pod.enter(|| {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            let link = rtnetlink.link_index("eth0").unwrap();
            rtnetlink.add_route(&Route::new(net("192.0.2.1/32")).dev(link)).unwrap();
        });
        let other = add_link("cilium_host");
        Rtnetlink::open().unwrap().add_route(&Route::new(net(PODS[0])).dev(other)).unwrap();
        std::fs::write("/proc/sys/net/ipv4/conf/lxc1a2b3c/rp_filter", "0").unwrap();
        let service = udp(at("192.0.2.1", PORT), false);
        let theirs = pod.enter(|| udp(at("10.9.1.8", 0), false));
        reach(&theirs, at("192.0.2.1", PORT), &service);
    }
}
