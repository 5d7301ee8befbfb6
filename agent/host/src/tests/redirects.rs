//! Tests that find programs that may redirect packets past nftables.

use std::ffi::c_int;
use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Instant;

use towline_core::plan::{RoutePlan, RouteVia};
use towline_helper::egress::{Direction, count_programs};
use towline_netlink::codec::Message;
use towline_netlink::{AddressOptions, Connection, Protocol, Route, Rtnetlink};
use towline_netns::{NetworkNamespace, add_link, namespace_test, root_namespace_test};
use towline_nftables::{Nft, TableFamily};

use super::ingress::{forward, pod};
use super::traffic::{
    PAIRS, PORT, TIMEOUT, at, from_tunnel, lan, tcp, transparent, udp, with_tunnel,
};
use super::{address, apply, net, plan};
use crate::{HostNetwork, Names, PastNetfilter};

const OWN: &str = "towline0";

fn found() -> Option<PastNetfilter> {
    HostNetwork::open().unwrap().past_netfilter(OWN).unwrap()
}

fn program_on(link: &str) -> Option<PastNetfilter> {
    Some(PastNetfilter::Program(link.to_owned()))
}

namespace_test! {
    fn an_ordinary_host_redirects_nothing() {
        add_link("eth0");
        assert_eq!(found(), None);
    }
}

namespace_test! {
    fn plugins_are_known_by_their_links() {
        add_link("eth0");
        for (name, plugin) in
            [("bpfin.cali", PastNetfilter::Calico), ("cilium_host", PastNetfilter::Cilium)]
        {
            Rtnetlink::open().unwrap().add_bridge(name).unwrap();
            assert_eq!(found(), Some(plugin.clone()));
            let text = plugin.to_string();
            assert!(text.contains(" may redirect packets past nftables: only the unreachable routes"));
            assert!(!text.contains("  "), "{text}");
        }
    }
}

/// Loads an eBPF program of traffic control that accepts every packet.
fn program() -> OwnedFd {
    // r0 = 0; exit.
    load(&[0xb7, 0x95])
}

/// Loads a program that redirects all unicast frames but ARP to a link, without looking up a route.
fn redirecting_to(link: u32) -> OwnedFd {
    let instruction = |code: u64, registers: u64, offset: u64, value: u32| {
        code | registers << 8 | offset << 16 | u64::from(value) << 32
    };
    let arp = u32::from((libc::ETH_P_ARP as u16).to_be());
    load(&[
        // r2 = skb->protocol; r3 = skb->pkt_type; r0 = 0; if r2 == ARP or r3 != PACKET_HOST, skip to
        // the end.
        instruction(0x61, 0x12, 16, 0),
        instruction(0x61, 0x13, 4, 0),
        instruction(0xb7, 0x00, 0, 0),
        instruction(0x15, 0x02, 4, arp),
        instruction(0x55, 0x03, 3, 0),
        // r0 = bpf_redirect(link, 0).
        instruction(0xb7, 0x01, 0, link),
        instruction(0xb7, 0x02, 0, 0),
        instruction(0x85, 0x00, 0, 23),
        0x95,
    ])
}

fn load(instructions: &[u64]) -> OwnedFd {
    const BPF_PROG_LOAD: c_int = 5;
    const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        licence: u64,
        rest: [u64; 4],
    }
    let load = Load {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        licence: c"".as_ptr() as u64,
        rest: [0; 4],
    };
    // SAFETY: the kernel reads `load` and what it points to, all of which outlives the call.
    let descriptor =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    assert!(descriptor >= 0, "load: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and has no other owner.
    unsafe { OwnedFd::from_raw_fd(descriptor as c_int) }
}

/// Encodes `struct tcmsg`.
fn header(link: u32, handle: u32, parent: u32, information: u32) -> Vec<u8> {
    [0, link, handle, parent, information].into_iter().flat_map(u32::to_ne_bytes).collect()
}

fn request(what: &str, kind: u16, fixed: &[u8], fill: impl FnOnce(&mut Message)) {
    const CREATE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    let mut message = Message::new(kind, CREATE, fixed);
    fill(&mut message);
    let mut connection = Connection::open(Protocol::Route).unwrap();
    connection.request(|| what.to_owned(), message).unwrap();
}

const KIND: u16 = 1;
const OPTIONS: u16 = 2;
const CLSACT: u32 = 0xffff_fff1;
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;

fn add_clsact(link: u32) {
    request("add clsact", libc::RTM_NEWQDISC, &header(link, 0xffff_0000, CLSACT, 0), |message| {
        message.string(KIND, "clsact");
    });
}

/// Attaches a program to a link's ingress or egress (`parent`) by a filter.
fn add_filter(link: u32, parent: u32, program: &OwnedFd) {
    const PROGRAM: u16 = 6;
    const NAME: u16 = 7;
    let all = u32::from((libc::ETH_P_ALL as u16).to_be());
    let fixed = header(link, 0, parent, (1 << 16) | all);
    request("add a filter", libc::RTM_NEWTFILTER, &fixed, |message| {
        message.string(KIND, "bpf").nest(OPTIONS, |options| {
            options
                .u32(PROGRAM, program.as_raw_fd() as u32)
                .string(NAME, "test")
                // `TCA_BPF_FLAGS`: the program's result is the verdict.
                .u32(8, 1);
        });
    });
}

/// Opens a socket that receives every frame of the namespace.
fn sniffer() -> OwnedFd {
    let all = i32::from((libc::ETH_P_ALL as u16).to_be());
    // SAFETY: the call takes no pointer.
    let socket =
        unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, all) };
    assert!(socket >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and has no other owner.
    unsafe { OwnedFd::from_raw_fd(socket) }
}

/// Receives all frames that have arrived. Returns true if one of them has this text.
fn has_received(sniffer: &OwnedFd, text: &[u8]) -> bool {
    let mut found = false;
    let mut frame = [0u8; 2_048];
    while let Ok(length) = nix::unistd::read(sniffer, &mut frame) {
        let has = |text: &[u8]| frame[..length].windows(text.len()).any(|window| window == text);
        assert!(!has(GUARDED), "a frame in clear");
        found |= has(text);
    }
    found
}

/// Text of the datagrams that no frame may contain.
const GUARDED: &[u8] = b" guarded ";
/// Addresses of the mesh: those of peers, and guarded ones that no peer holds.
const MESH: [&str; 4] = ["10.9.2.7", "10.9.3.7", "fd00:9::2", "fd00:9::7"];
/// Addresses outside the mesh, one per family.
const ELSEWHERE: [&str; 2] = ["192.0.2.9", "2001:db8::9"];

/// A pod whose packets a program redirects to `eth0`, without looking up a route.
struct Redirected {
    sockets: [UdpSocket; 2],
    /// Receives the frames that arrive at the other end of `eth0`.
    sniffer: OwnedFd,
    _namespaces: [NetworkNamespace; 2],
}

impl Redirected {
    fn new() -> Self {
        let neighbour = lan();
        forward();
        let pod = pod("veth0", &["10.77.0.1/24", "fd77::1/64"], &["10.77.0.7/24", "fd77::7/64"]);
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let [uplink, veth] = ["eth0", "veth0"].map(|link| rtnetlink.link_index(link).unwrap());
        add_clsact(veth);
        add_filter(veth, INGRESS, &redirecting_to(uplink));
        let sniffer = neighbour.enter(sniffer);
        let sockets = pod.enter(|| {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            for (all, gateway) in [("0.0.0.0/0", "10.77.0.1"), ("::/0", "fd77::1")] {
                rtnetlink.add_route(&Route::new(net(all)).via(address(gateway))).unwrap();
            }
            ["10.77.0.7", "fd77::7"].map(|own| UdpSocket::bind(at(own, 0)).unwrap())
        });
        Self { sockets, sniffer, _namespaces: [neighbour, pod] }
    }

    fn send(&self, to: &str, payload: &[u8]) {
        let to = at(to, 9);
        // A socket reports errors of its earlier packets.
        let _ = self.sockets[usize::from(to.is_ipv6())].send_to(payload, to);
    }

    /// Sends until a datagram with this text leaves by `eth0`.
    fn leaves(&self, to: &str, text: &[u8]) {
        let deadline = Instant::now() + TIMEOUT;
        while !has_received(&self.sniffer, text) {
            assert!(Instant::now() < deadline, "nothing left for {to}");
            self.send(to, text);
        }
    }

    /// Asserts that no packet to the mesh leaves, whole or in fragments, but that others do.
    fn is_guarded(&self) {
        for mesh in MESH {
            self.send(mesh, GUARDED);
            self.send(mesh, &GUARDED.repeat(400));
        }
        for elsewhere in ELSEWHERE {
            self.leaves(elsewhere, b"to others");
            self.leaves(elsewhere, &b"many fragments to others ".repeat(40));
        }
    }
}

/// Returns the number of programs at the egress of a link.
fn programs_at_egress(link: &str) -> u32 {
    let link = Rtnetlink::open().unwrap().link_index(link).unwrap();
    count_programs(link, Direction::Egress).unwrap()
}

/// Guards the uplinks. Returns false if this kernel cannot.
fn guard(host: &mut HostNetwork) -> bool {
    match host.guard_redirects(true) {
        Ok(is_guarded) => is_guarded,
        Err(error) => {
            println!("skipped: {error}");
            false
        }
    }
}

root_namespace_test! {
    fn redirected_frames_leave_by_no_uplink_in_clear() {
        let redirected = Redirected::new();
        let mut plan = plan();
        assert!(!HostNetwork::open().unwrap().guard_redirects(true).unwrap(), "there is no plan");
        let Some((mut host, _tunnel)) = with_tunnel(&plan) else { return };
        // The path works, and leaks, without the guard.
        for mesh in MESH {
            redirected.leaves(mesh, b"not yet held");
        }
        if !guard(&mut host) {
            return;
        }
        redirected.is_guarded();
        // It outlives the agent, and does not need nftables.
        drop(host);
        assert!(Nft::open().unwrap().delete(TableFamily::Inet, "towline").unwrap());
        redirected.is_guarded();
        // It follows the routes.
        let mut host = HostNetwork::open().unwrap();
        let new = net("192.0.2.128/25");
        plan.routes.insert((new, RouteVia::Unreachable), RoutePlan::default());
        apply(&mut host, &plan);
        redirected.send("192.0.2.130", GUARDED);
        redirected.is_guarded();

        // A program is found by its name and replaced, first in order, and those of others stay.
        assert_eq!(programs_at_egress("eth0"), 1);
        let _other = attach_by_tcx("eth0", EGRESS_POINT, &program()).unwrap();
        assert_eq!(programs_at_egress("eth0"), 2);
        drop(host);
        for mark in [0x10, 0x10, 0x20] {
            plan.rules.mark = mark;
            let mut next = HostNetwork::open().unwrap();
            apply(&mut next, &plan);
            assert!(next.guard_redirects(true).unwrap());
            assert_eq!(programs_at_egress("eth0"), 2);
            redirected.is_guarded();
        }
        // It goes when it is not wanted any more.
        let mut host = HostNetwork::open().unwrap();
        assert!(!host.guard_redirects(false).unwrap());
        assert_eq!(programs_at_egress("eth0"), 1);
        apply(&mut host, &plan);
        assert!(host.guard_redirects(true).unwrap());
        assert_eq!(programs_at_egress("eth0"), 2);
        // An uplink that does not forward a family gives the program no answer for that family, so
        // the second guard is not reported there.
        for family in ["ipv4", "ipv6"] {
            let setting = format!("/proc/sys/net/{family}/conf/eth0/forwarding");
            std::fs::write(&setting, "0").unwrap();
            assert!(!host.guard_redirects(true).unwrap(), "{family}");
            std::fs::write(&setting, "1").unwrap();
        }
        assert!(host.guard_redirects(true).unwrap());
        host.remove(&Names::of(&plan)).unwrap();
        assert_eq!(programs_at_egress("eth0"), 1);
    }
}

root_namespace_test! {
    fn a_guarded_uplink_is_not_found() {
        let _neighbour = lan();
        let Some((mut host, _tunnel)) = with_tunnel(&plan()) else { return };
        if !guard(&mut host) {
            return;
        }
        assert_eq!(host.past_netfilter(OWN).unwrap(), None);
        let other = attach_by_tcx("eth0", EGRESS_POINT, &program()).unwrap();
        assert_eq!(host.past_netfilter(OWN).unwrap(), program_on("eth0"));
        drop(other);
        assert!(!host.guard_redirects(false).unwrap());
        assert_eq!(programs_at_egress("eth0"), 0);
    }
}

root_namespace_test! {
    fn own_packets_and_answers_pass_a_guarded_uplink() {
        let peer = lan();
        forward();
        let mut plan = transparent();
        plan.underlay.plain_ports.insert(6_443);
        let Some((mut host, tunnel)) = with_tunnel(&plan) else { return };
        if !guard(&mut host) {
            return;
        }
        for (own, theirs) in PAIRS {
            let receiver = peer.enter(|| udp(at(theirs, PORT), false));
            let to = receiver.local_addr().unwrap();
            udp(at(own, 0), false).send_to(b"inner", to).unwrap();
            assert!(from_tunnel(&tunnel).ends_with(b"inner"), "{own}");
            udp(at(own, PORT), true).send_to(b"outer", to).unwrap();
            let mut buffer = [0; 100];
            let (length, _) = receiver.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"outer", "{own}");

            let listener = TcpListener::bind(at(own, 6_443)).unwrap();
            let mut client = peer.enter(|| tcp(at(own, 6_443), false)).unwrap();
            let (mut accepted, _) = listener.accept().unwrap();
            client.write_all(b"question").unwrap();
            accepted.read_exact(&mut [0; 8]).unwrap();
            accepted.write_all(b"answer").unwrap();
            client.read_exact(&mut [0; 6]).unwrap();
            // Other addresses of the peer's network are no mesh addresses.
            let others = peer.enter(|| {
                let mut rtnetlink = Rtnetlink::open().unwrap();
                let link = rtnetlink.link_index("eth0").unwrap();
                let options = AddressOptions { no_dad: true, no_prefix_route: false };
                for other in ["192.0.2.9/24", "2001:db8::9/64"] {
                    let _ = rtnetlink.add_address(link, net(other), options);
                }
                udp(at(ELSEWHERE[usize::from(own.contains(':'))], 0), false)
            });
            let to = others.local_addr().unwrap();
            udp(at(own, 0), false).send_to(b"plain", to).unwrap();
            let (length, _) = others.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"plain", "{own}");
        }
    }
}

root_namespace_test! {
    fn a_program_is_found_where_it_is_attached_by_a_filter() {
        let uplink = add_link("eth0");
        add_clsact(uplink);
        assert_eq!(found(), None, "clsact alone does nothing");
        add_filter(uplink, EGRESS, &program());
        assert_eq!(found(), program_on("eth0"));
        let own = HostNetwork::open().unwrap().past_netfilter("eth0").unwrap();
        assert_eq!(own, None, "our own link is left out");
    }
}

/// Attachment points of TCX.
const INGRESS_POINT: u32 = 46;
const EGRESS_POINT: u32 = 47;

/// Attaches a program to a link by a BPF link, which holds it until it is dropped.
fn attach_by_tcx(link: &str, point: u32, program: &OwnedFd) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: c_int = 28;
    #[repr(C)]
    struct Attach {
        program: u32,
        link: u32,
        kind: u32,
        flags: u32,
        rest: [u64; 4],
    }
    let attach = Attach {
        program: program.as_raw_fd() as u32,
        link: Rtnetlink::open().unwrap().link_index(link).unwrap(),
        kind: point,
        flags: 0,
        rest: [0; 4],
    };
    // SAFETY: the kernel reads `attach`, of this size, which outlives the call.
    let attached = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const attach, size_of::<Attach>())
    };
    if attached == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(attached as c_int) })
}

root_namespace_test! {
    fn a_program_is_found_where_it_is_attached_by_tcx() {
        add_link("veth0");
        let attached = match attach_by_tcx("veth0", INGRESS_POINT, &program()) {
            Ok(attached) => attached,
            Err(error) => return println!("skipped: no TCX: {error}"),
        };
        assert_eq!(found(), program_on("veth0"));
        drop(attached);
        assert_eq!(found(), None);
    }
}
