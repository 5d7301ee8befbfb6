//! Tests that other programs cannot pass the guards, and that each of the two guards is enough: with
//! source ports, packet marks, connection marks, other users, raw sockets and pods.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, sendto,
    setsockopt, socket, sockopt,
};

use super::traffic::{
    ACK, MARK, PAIRS, PORT, SYN, at, from_tunnel, into_tunnel, lan, segment,
    set_reverse_path_filter, tcp, transparent, udp, with_tunnel,
};
use super::{OURS, net, plan};
use crate::{HostNetwork, Problem};
use towline_core::plan::Plan;
use towline_netlink::{AddressOptions, Family, Route, Rtnetlink, RuleAction, VethPeer};
use towline_netns::{NetworkNamespace, namespace_test, root_namespace_test};
use towline_nftables::{Chain, ChainKind, Hook, Nft, Rule, Table, TableFamily};

/// Guarded addresses of the peer, which can be reached on the LAN.
const GUARDED: [&str; 2] = ["10.9.2.1", "fd00:9::2"];
/// Source ports to try: the tunnels' port, two plain ports, and an unused port.
const PORTS: [u16; 4] = [PORT, 6_443, 7_443, 4_444];
/// Packet marks to try: none, Towline's, the other bit of Towline's mask, the whole mask, the marks of
/// Cilium (cluster id 16), NetBird, OVN-Kubernetes and wg-quick, and two more that contain Towline's.
const MARKS: [u32; 10] = [0, MARK, 0x20, 0x30, 0x0001_0f10, 0x1bd10, 0xc350, 0xca6c, 0x110, 0x51];

/// Guards that are installed during a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Both,
    Routes,
    Firewall,
}

/// Creates the peer, and returns it with a plan that has plain ports and a controller. Without guards,
/// all mesh traffic would reach the peer over the LAN.
fn host() -> (NetworkNamespace, Plan) {
    let peer = lan();
    let mut rtnetlink = Rtnetlink::open().unwrap();
    let link = rtnetlink.link_index("eth0").unwrap();
    for (default, (_, gateway)) in ["0.0.0.0/0", "::/0"].into_iter().zip(PAIRS) {
        let route = Route::new(net(default)).via(gateway.parse().unwrap()).dev(link);
        rtnetlink.add_route(&route).unwrap();
    }
    let counted = |family, prefix: &str| {
        Rule::new().comment(prefix.to_owned()).destination(net(prefix)).family(family).counter()
    };
    let seen = Table::new(TableFamily::Inet, "seen").chain(
        "seen",
        Chain::base(ChainKind::Filter, Hook::Prerouting, -400)
            .rule(counted(Family::V4, "10.9.0.0/16"))
            .rule(counted(Family::V6, "fd00:9::/64")),
    );
    peer.enter(|| Nft::open().unwrap().load(&seen).unwrap());
    let mut plan = plan();
    plan.underlay.plain_ports = [6_443, 7_443].into();
    plan.underlay.controllers = [at("10.9.3.1", 7_443), at("fd00:9::3:1", 7_443)].into();
    (peer, plan)
}

namespace_test! {
    fn outer_packets_never_have_an_inner_source() {
        let peer = lan();
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let link = rtnetlink.link_index("eth0").unwrap();
        let Some((_host, _tunnel)) = with_tunnel(&plan()) else { return };
        for (family, (here, there)) in PAIRS.into_iter().enumerate() {
            let to = at(there, 4_444);
            let theirs = peer.enter(|| udp(to, false));
            let own = udp(at(["0.0.0.0", "::"][family], PORT), true);
            own.send_to(b"outer", to).unwrap();
            let (_, from) = theirs.recv_from(&mut [0; 9]).unwrap();
            assert_eq!(from.ip(), at(here, 0).ip());
            // DHCP lost the address, and the route stays: only the tunnel's address is left.
            let prefix = net(&format!("{here}/{}", [24, 64][family]));
            let route = Route::new(net(&format!("{there}/{}", [32, 128][family]))).dev(link);
            rtnetlink.add_route(&route).unwrap();
            rtnetlink.delete_address(link, prefix).unwrap();
            assert!(own.send_to(b"inner", to).is_err(), "{there}");
            theirs.set_nonblocking(true).unwrap();
            theirs.recv_from(&mut [0; 9]).unwrap_err();
        }
    }
}

/// Returns the number of packets to guarded addresses that the peer received so far.
fn seen(peer: &NetworkNamespace) -> u64 {
    // All earlier packets of a family have arrived when this datagram arrives: they wait for the same
    // neighbour's link-layer address.
    for (here, there) in PAIRS {
        let there = peer.enter(|| udp(at(there, 99), false));
        udp(at(here, 0), false).send_to(b"all sent", there.local_addr().unwrap()).unwrap();
        there.recv(&mut [0; 9]).unwrap();
    }
    let loaded =
        peer.enter(|| Nft::open().unwrap().read(TableFamily::Inet, "seen").unwrap().unwrap());
    let count = |prefix| loaded.counter("seen", prefix).unwrap().packets;
    count("10.9.0.0/16") + count("fd00:9::/64")
}

/// Removes the other guard.
fn leave_only(standing: Standing) {
    match standing {
        Standing::Both => {}
        Standing::Firewall => {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            for family in Family::ALL {
                for rule in rtnetlink.rules(family).unwrap() {
                    if rule.made_by == OURS {
                        rtnetlink.delete_rule(&rule).unwrap();
                    }
                }
            }
        }
        Standing::Routes => {
            Nft::open().unwrap().delete(TableFamily::Inet, "towline").unwrap();
        }
    }
}

/// Runs `act` with both guards and with each guard alone. Asserts that the peer receives no packet to a
/// guarded address.
fn held_by_each(peer: &NetworkNamespace, plan: &Plan, mut change: impl FnMut()) {
    for standing in [Standing::Both, Standing::Routes, Standing::Firewall] {
        // As on a kernel without owned tables, so that the table can be deleted.
        let mut host = HostNetwork { ownable: false, ..HostNetwork::open().unwrap() };
        host.apply(plan).unwrap();
        leave_only(standing);
        let before = seen(peer);
        change();
        assert_eq!(seen(peer) - before, 0, "packets left in clear, guards: {standing:?}");
    }
}

/// Sends a datagram, or the first segment of a connection, from a port and with a mark. Ignores
/// refusals.
fn send(kind: SockType, mark: u32, port: u16, to: SocketAddr) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (family, any) = match to {
        SocketAddr::V4(_) => (AddressFamily::Inet, "0.0.0.0"),
        SocketAddr::V6(_) => (AddressFamily::Inet6, "::"),
    };
    let socket = socket(family, kind, flags, None).unwrap();
    if mark != 0 && setsockopt(&socket, sockopt::Mark, &mark).is_err() {
        return;
    }
    setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
    bind(socket.as_raw_fd(), &SockaddrStorage::from(at(any, port))).unwrap();
    if connect(socket.as_raw_fd(), &SockaddrStorage::from(to)).is_ok() {
        let _ = nix::unistd::write(&socket, b"clear");
    }
}

/// Sends packets with all combinations of marks and source ports.
fn send_each(whose: Whose) {
    for to in GUARDED {
        for mark in MARKS {
            for port in PORTS {
                // A process of the agent's user on the agent's port is the agent.
                let agent = whose == Whose::Agents && mark & 0x30 == MARK && port == PORT;
                if !agent {
                    send(SockType::Datagram, mark, port, at(to, 9));
                }
                // The routes cannot distinguish such a packet from the answer of a plain port. Setting
                // a mark takes a privilege.
                let answer = mark & 0x30 == MARK && matches!(port, 6_443 | 7_443);
                if !answer {
                    send(SockType::Stream, mark, port, at(to, 9));
                }
            }
        }
    }
}

/// User of the process that sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Agents,
    Others,
}

namespace_test! {
    fn neither_a_source_port_nor_a_mark_lets_a_local_socket_past_either_guard() {
        let (peer, plan) = host();
        held_by_each(&peer, &plan, || send_each(Whose::Agents));
    }
}

namespace_test! {
    fn raw_sockets_with_our_mark_are_held_by_both_guards() {
        let (peer, plan) = host();
        held_by_each(&peer, &plan, || {
            for mark in MARKS {
                for protocol in [libc::IPPROTO_ICMP, libc::IPPROTO_UDP, libc::IPPROTO_RAW] {
                    // SAFETY: the call only creates a socket; an owner takes its descriptor below.
                    let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, protocol) };
                    assert!(raw >= 0);
                    // SAFETY: the descriptor is new and has no other owner.
                    let raw: std::os::fd::OwnedFd =
                        unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) };
                    setsockopt(&raw, sockopt::Mark, &mark).unwrap();
                    // With the tunnels' port the packet would be the agent's, whose user is root here.
                    let [high, low] = 4_444u16.to_be_bytes();
                    let datagram = [high, low, 0, 9, 0, 8, 0, 0];
                    let to = SockaddrStorage::from(at(GUARDED[0], 0));
                    let _ = sendto(raw.as_raw_fd(), &datagram, &to, MsgFlags::empty());
                }
            }
        });
    }
}

/// Runs `body` on a thread of user 65534 that has only `CAP_NET_RAW`, for raw sockets and marks.
fn as_nobody(body: impl FnOnce() + Send) {
    const NOBODY: libc::c_long = 65_534;
    const VERSION_3: u32 = 0x2008_0522;
    const CAP_NET_RAW: u32 = 13;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let header: [u32; 2] = [VERSION_3, 0];
            let raw = 1u32 << CAP_NET_RAW;
            let data: [u32; 6] = [raw, raw, 0, 0, 0, 0];
            // SAFETY: the system calls change only this thread, and `capset` reads the two arrays.
            let results = unsafe {
                [
                    libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into(),
                    libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY),
                    libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()),
                ]
            };
            assert_eq!(results, [0; 3]);
            body();
        });
        thread.join().expect("the thread ends");
    });
}

root_namespace_test! {
    fn another_user_with_our_mark_and_our_port_is_held_by_both_guards() {
        let (peer, plan) = host();
        held_by_each(&peer, &plan, || as_nobody(|| send_each(Whose::Others)));
    }
}

root_namespace_test! {
    fn the_agents_own_user_passes_and_root_is_another() {
        let (peer, mut plan) = host();
        plan.underlay.owner = 65_534;
        let mut host = HostNetwork::open().unwrap();
        host.apply(&plan).unwrap();
        for (family, to) in GUARDED.into_iter().enumerate() {
            let before = seen(&peer);
            send(SockType::Datagram, MARK, PORT, at(to, 9));
            assert_eq!(seen(&peer), before, "packet of root");
            as_nobody(|| send(SockType::Datagram, MARK, PORT, at(to, 9)));
            assert_eq!(seen(&peer), before + 1, "packet of the agent's user");
            as_nobody(|| send(SockType::Datagram, MARK, 4_444, at(to, 9)));
            as_nobody(|| send(SockType::Datagram, 0, PORT, at(to, 9)));
            as_nobody(|| send(SockType::Stream, MARK, PORT, at(to, 7_443)));
            assert_eq!(seen(&peer), before + 1, "without port or mark");
            let controller = ["10.9.3.1", "fd00:9::3:1"][family];
            as_nobody(|| send(SockType::Stream, MARK, 4_444, at(controller, 7_443)));
            assert_eq!(seen(&peer), before + 2, "to the controller");
            // Commands that run as root connect to controllers too.
            send(SockType::Stream, MARK, 4_445, at(controller, 7_443));
            assert_eq!(seen(&peer), before + 3, "packet of root, to the controller");
            send(SockType::Stream, 0, 4_446, at(controller, 7_443));
            send(SockType::Stream, MARK, 4_447, at(controller, 7_444));
            assert_eq!(seen(&peer), before + 3, "without mark or port");
        }
    }
}

root_namespace_test! {
    fn outer_packets_of_another_user_pass_a_strict_filter_of_reverse_paths() {
        let peer = lan();
        let mut plan = transparent();
        plan.underlay.owner = 65_534;
        let Some((_host, _tunnel)) = with_tunnel(&plan) else { return };
        for mode in [0, 1, 2] {
            set_reverse_path_filter(mode);
            for (host_address, peer_address) in PAIRS {
                let theirs = peer.enter(|| udp(at(peer_address, PORT), false));
                as_nobody(|| {
                    let ours = udp(at(host_address, PORT), true);
                    ours.send_to(b"outer", theirs.local_addr().unwrap()).unwrap();
                    theirs.recv_from(&mut [0; 9]).unwrap();
                    theirs.send_to(b"answer", ours.local_addr().unwrap()).unwrap();
                    ours.recv_from(&mut [0; 9]).unwrap();
                });
            }
        }
    }
}

/// Creates a pod behind the host, with a link between them.
fn pod() -> NetworkNamespace {
    let pod = NetworkNamespace::new();
    let mut rtnetlink = Rtnetlink::open().unwrap();
    rtnetlink.add_veth("pod0", VethPeer { name: "eth0", namespace: Some(pod.as_fd()) }).unwrap();
    let ends = [["172.16.5.1/24", "fd00:5::1/64"], ["172.16.5.2/24", "fd00:5::2/64"]];
    let set_up = |link: &str, addresses: [&str; 2]| {
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let link = rtnetlink.link_index(link).unwrap();
        rtnetlink.set_up(link, true).unwrap();
        let options = AddressOptions { no_dad: true, no_prefix_route: false };
        for address in addresses {
            rtnetlink.add_address(link, net(address), options).unwrap();
        }
        link
    };
    set_up("pod0", ends[0]);
    pod.enter(|| {
        let link = set_up("eth0", ends[1]);
        let mut rtnetlink = Rtnetlink::open().unwrap();
        for (default, gateway) in [("0.0.0.0/0", "172.16.5.1"), ("::/0", "fd00:5::1")] {
            let route = Route::new(net(default)).via(gateway.parse().unwrap()).dev(link);
            rtnetlink.add_route(&route).unwrap();
        }
    });
    for path in ["ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{path}"), "1").unwrap();
    }
    // A link comes up with a delay: wait until the pod can be reached.
    for (near, far) in [("172.16.5.1", "172.16.5.2"), ("fd00:5::1", "fd00:5::2")] {
        let there = pod.enter(|| udp(at(far, 0), false));
        let here = udp(at(near, 0), false);
        while here.send_to(b"there?", there.local_addr().unwrap()).is_err() {}
        there.recv(&mut [0; 9]).unwrap();
    }
    pod
}

/// Returns a table of another program that marks all packets and their connections, at four hooks.
fn marks_of_another(mark: u32) -> Table {
    let both = || Rule::new().set_ct_mark(mark, u32::MAX).set_mark(mark, u32::MAX);
    let chain = |kind, hook, priority| Chain::base(kind, hook, priority).rule(both());
    Table::new(TableFamily::Inet, "another")
        .chain("early", chain(ChainKind::Filter, Hook::Prerouting, -190))
        .chain("late", chain(ChainKind::Filter, Hook::Prerouting, -90))
        .chain("out", chain(ChainKind::Route, Hook::Output, -90))
        .chain("leaving", chain(ChainKind::Filter, Hook::Postrouting, 0))
}

namespace_test! {
    fn pods_are_held_by_both_guards_whatever_others_mark_them_with() {
        let (peer, plan) = host();
        let pod = pod();
        let mut nft = Nft::open().unwrap();
        for mark in MARKS {
            nft.load(&marks_of_another(mark)).unwrap();
            held_by_each(&peer, &plan, || pod.enter(|| {
                for to in GUARDED {
                    for port in PORTS {
                        send(SockType::Datagram, MARK, port, at(to, 9));
                        send(SockType::Stream, 0, port, at(to, 9));
                    }
                    // The address and port of a controller.
                    send(SockType::Stream, MARK, PORT, at("10.9.3.1", 7_443));
                }
            }));
        }
        // With the tunnels' source port the pod can still reach addresses outside the mesh.
        let outside = peer.enter(|| udp(at(PAIRS[0].1, 53), false));
        pod.enter(|| send(SockType::Datagram, 0, PORT, outside.local_addr().unwrap()));
        outside.recv(&mut [0; 9]).unwrap();
    }
}

namespace_test! {
    fn other_programs_that_use_our_mark_are_named() {
        let (_peer, plan) = host();
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let marks = [(0x0200, 0x0f00), (0xca6c, u32::MAX), (0x0001_bd10, u32::MAX), (0x10, 0x10)];
        for (place, mark) in marks.into_iter().enumerate() {
            for family in Family::ALL {
                let rule = towline_netlink::Rule {
                    mark: Some(mark),
                    ..towline_netlink::Rule::new(family, 100 + place as u32, RuleAction::Table(99))
                };
                rtnetlink.add_rule(&rule).unwrap();
            }
        }
        let mut host = HostNetwork::open().unwrap();
        let marks = |problems: Vec<Problem>| -> Vec<Problem> {
            let of_marks =
                |p: &Problem| matches!(p, Problem::MarkInUse { .. } | Problem::MarkSeen { .. });
            problems.into_iter().filter(of_marks).collect()
        };
        let found = marks(host.apply(&plan).unwrap().problems);
        let by_rules = [
            Problem::MarkInUse { priority: 102, mark: 0x0001_bd10, mask: u32::MAX },
            Problem::MarkInUse { priority: 103, mark: 0x10, mask: 0x10 },
        ];
        assert_eq!(found, by_rules);

        Nft::open().unwrap().load(&marks_of_another(MARK)).unwrap();
        for family in Family::ALL {
            for rule in rtnetlink.rules(family).unwrap() {
                if rule.made_by == OURS { rtnetlink.delete_rule(&rule).unwrap() }
            }
        }
        send(SockType::Datagram, 0, 4_444, at(GUARDED[0], 9));
        host.invalidate();
        let found = marks(host.apply(&plan).unwrap().problems);
        assert_eq!(found.last(), Some(&Problem::MarkSeen { packets: 1 }));
    }
}

namespace_test! {
    fn local_sockets_are_held_by_both_guards_whatever_others_mark_them_with() {
        let (peer, plan) = host();
        let mut nft = Nft::open().unwrap();
        for mark in MARKS {
            nft.load(&marks_of_another(mark)).unwrap();
            held_by_each(&peer, &plan, || {
                for to in GUARDED {
                    send(SockType::Datagram, 0, 4_444, at(to, 9));
                    send(SockType::Stream, 0, 4_444, at(to, 9));
                    send(SockType::Stream, 0, PORT, at(to, 9));
                }
            });
        }
    }
}

namespace_test! {
    fn answers_to_the_tunnel_go_back_whatever_others_mark_their_connection_with() {
        let _peer = lan();
        let mut plan = transparent();
        plan.underlay.plain_ports = [6_443].into();
        let Some((_host, tunnel)) = with_tunnel(&plan) else { return };
        let mut nft = Nft::open().unwrap();
        for (round, mark) in MARKS.into_iter().enumerate() {
            nft.load(&marks_of_another(mark)).unwrap();
            // A packet from a plain port that has Towline's mark but answers no remembered connection is
            // dropped, so that case is left out.
            let marked = mark & 0x30 == MARK;
            for port in [80, 6_443].into_iter().filter(|port| !(marked && *port == 6_443)) {
                let listener = TcpListener::bind(at("192.0.2.1", port)).unwrap();
                let from = 2_000 + 2 * round as u16 + port % 2;
                into_tunnel(&tunnel, &segment(("192.0.2.2", from), ("192.0.2.1", port), SYN));
                let answer = from_tunnel(&tunnel);
                assert_eq!(answer[33] & (SYN | ACK), SYN | ACK, "{mark:#x}");
                assert_eq!(answer[22..24], from.to_be_bytes(), "{mark:#x}");
                drop(listener);
            }
        }
    }
}

/// Adds to the peer guarded addresses that belong to no node of the mesh.
fn stranger(peer: &NetworkNamespace) {
    let loopback = |address: &str| {
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let link = rtnetlink.link_index("lo").unwrap();
        let options = AddressOptions { no_dad: true, no_prefix_route: false };
        rtnetlink.add_address(link, net(address), options).unwrap();
    };
    peer.enter(|| ["10.9.77.1/32", "fd00:9::77/128"].map(loopback));
}

/// Asserts that data written to `ours` arrives at `theirs`.
fn speak(ours: &mut impl std::io::Write, theirs: &mut impl std::io::Read, what: &str) {
    ours.write_all(b"hello").unwrap();
    let mut buffer = [0; 5];
    theirs.read_exact(&mut buffer).expect(what);
    assert_eq!(&buffer, b"hello");
}

/// Connects from an address of the peer to a port of the host.
fn connect_from(peer: &NetworkNamespace, from: &str, to: SocketAddr) -> std::net::TcpStream {
    let from = at(from, 0);
    peer.enter(move || {
        let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let stream = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let timeout = nix::sys::time::TimeVal::new(5, 0);
        setsockopt(&stream, sockopt::SendTimeout, &timeout).unwrap();
        setsockopt(&stream, sockopt::ReceiveTimeout, &timeout).unwrap();
        bind(stream.as_raw_fd(), &SockaddrStorage::from(from)).unwrap();
        connect(stream.as_raw_fd(), &SockaddrStorage::from(to)).expect("an answer");
        stream.into()
    })
}

namespace_test! {
    fn strangers_at_guarded_addresses_are_answered_on_plain_ports_alone() {
        let (peer, plan) = host();
        stranger(&peer);
        let Some((host, _tunnel)) = with_tunnel(&plan) else { return };
        let mut open = Vec::new();
        for mode in [0, 1, 2] {
            set_reverse_path_filter(mode);
            for ((here, _), from) in PAIRS.into_iter().zip(["10.9.77.1", "fd00:9::77"]) {
                let listener = TcpListener::bind(at(here, 6_443)).unwrap();
                let mut theirs = connect_from(&peer, from, at(here, 6_443));
                let (mut ours, _) = listener.accept().unwrap();
                speak(&mut ours, &mut theirs, "answered");
                open.push((ours, theirs));
                // A connection that the host opens from that port is not answered outside.
                drop(listener);
                let before = seen(&peer);
                send(SockType::Stream, 0, 6_443, at(from, 80));
                assert_eq!(seen(&peer), before);
            }
        }
        // Connections continue after the agent ended, and after a change of the plan.
        drop(host);
        let mut host = HostNetwork::open().unwrap();
        host.apply(&plan).unwrap();
        let mut next = plan.clone();
        next.firewall.plain = [net("203.0.113.0/24")].into();
        next.underlay.plain_ports.insert(22);
        host.apply(&next).unwrap();
        host.apply(&plan).unwrap();
        for (ours, theirs) in &mut open {
            speak(ours, theirs, "still answered");
            speak(theirs, ours, "still received");
        }
    }
}

namespace_test! {
    fn what_a_pod_answers_from_a_plain_port_is_not_answered_outside() {
        let (peer, plan) = host();
        stranger(&peer);
        let pod = pod();
        let Some((_host, _tunnel)) = with_tunnel(&plan) else { return };
        // A published port: the connection is addressed to the host until destination NAT.
        let publish = Table::new(TableFamily::Ip, "publish").chain(
            "publish",
            Chain::base(ChainKind::Nat, Hook::Prerouting, -100).rule(
                Rule::new()
                    .input("eth0")
                    .protocol(libc::IPPROTO_TCP as u8)
                    .destination_port(6_443)
                    .dnat("172.16.5.2".parse().unwrap(), None),
            ),
        );
        Nft::open().unwrap().load(&publish).unwrap();
        let listener = pod.enter(|| TcpListener::bind(at("172.16.5.2", 6_443)).unwrap());
        // A client outside the mesh reaches the pod.
        let stream = peer.enter(|| tcp(at(PAIRS[0].0, 6_443), false)).unwrap();
        listener.accept().unwrap();
        drop(stream);
        let answers = Table::new(TableFamily::Inet, "answers").chain(
            "answers",
            Chain::base(ChainKind::Filter, Hook::Prerouting, -400)
                .rule(Rule::new().comment("answers").destination(net("10.9.77.1/32")).counter()),
        );
        peer.enter(|| Nft::open().unwrap().load(&answers).unwrap());
        peer.enter(|| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let stream = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
            bind(stream.as_raw_fd(), &SockaddrStorage::from(at("10.9.77.1", 0))).unwrap();
            let _ = connect(stream.as_raw_fd(), &SockaddrStorage::from(at(PAIRS[0].0, 6_443)));
        });
        let _ = seen(&peer);
        let loaded = peer
            .enter(|| Nft::open().unwrap().read(TableFamily::Inet, "answers").unwrap().unwrap());
        assert_eq!(loaded.counter("answers", "answers").unwrap().packets, 0);
    }
}

namespace_test! {
    fn a_connection_that_comes_through_the_tunnel_later_is_answered_there() {
        let peer = lan();
        let mut plan = transparent();
        plan.underlay.plain_ports = [6_443].into();
        let Some((_host, tunnel)) = with_tunnel(&plan) else { return };
        let listener = TcpListener::bind(at("192.0.2.1", 6_443)).unwrap();
        let mut theirs = connect_from(&peer, PAIRS[0].1, at("192.0.2.1", 6_443));
        let (mut ours, _) = listener.accept().unwrap();
        speak(&mut ours, &mut theirs, "answered outside");
        let port = theirs.local_addr().unwrap().port();
        // The segment is outside the TCP window, which conntrack must tolerate.
        let liberal = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";
        std::fs::write(liberal, "1").unwrap();
        into_tunnel(&tunnel, &segment((PAIRS[0].1, port), ("192.0.2.1", 6_443), ACK));
        std::io::Write::write_all(&mut ours, b"inner").unwrap();
        loop {
            if from_tunnel(&tunnel).ends_with(b"inner") {
                break;
            }
        }
    }
}
