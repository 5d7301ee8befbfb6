//! Tests of two data planes with the kernel's TUN links and UDP sockets, in network namespaces that
//! this process creates. They are skipped, with a reason, if that is not permitted.
//!
//! There is no test harness, because only a process with one thread may create a user namespace.

#![expect(clippy::print_stdout, reason = "the output of the tests")]
#![expect(clippy::unwrap_used, reason = "a panic is the report")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::mpsc::{Receiver, channel};
use towline_agent::tun_owner::{self, Secured, secure};
use towline_core::own_networks::OwnNetworks;
use towline_core::peer_table::{PeerEntry, PeerTable};
use towline_dataplane::{
    Aead, Config, DataPlane, Engine, EngineChoice, Event, Fault, Feature, HostTunnels, OffReason,
    Offloads, OpenTunError, OpenUdpError, Probes, open_tun, open_tun_queues, open_tun_with,
    open_udp, open_udp_group, own_tun,
};
use towline_netlink::codec::Message;
use towline_netlink::{AddressOptions, Connection, Protocol, Rtnetlink, VethPeer};
use x25519_dalek::StaticSecret;

/// Longest wait for a condition. It only bounds a failing test.
const TIMEOUT: Duration = Duration::from_secs(20);
/// MTU of the tunnel's link, in bytes: the default of the agent.
const MTU: u32 = 1420;

/// Allocator that counts the allocations of all threads while it is armed.
struct Counting;

/// True while allocations are counted.
static ARMED: AtomicBool = AtomicBool::new(false);
/// Number of allocations while armed.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
/// Places of the first allocations while armed, which a failing test shows.
static PLACES: Mutex<Vec<Backtrace>> = Mutex::new(Vec::new());
/// Number of allocations whose place is captured.
const CAPTURED: u64 = 3;

thread_local! {
    /// True while this thread captures a place, which allocates too.
    static IS_CAPTURING: Cell<bool> = const { Cell::new(false) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all calls are forwarded to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that panics may hold the lock that the capture takes.
        if ARMED.load(Ordering::Acquire) && !std::thread::panicking() && !IS_CAPTURING.replace(true)
        {
            if ALLOCATIONS.fetch_add(1, Ordering::Relaxed) < CAPTURED {
                let place = Backtrace::force_capture();
                PLACES.lock().unwrap_or_else(PoisonError::into_inner).push(place);
            }
            IS_CAPTURING.set(false);
        }
        // SAFETY: the caller upholds the contract of the allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of the allocator.
        unsafe { System.dealloc(place, layout) }
    }
}

fn main() {
    if let Err(refusal) = own_namespaces() {
        println!("skipped: this machine forbids user namespaces: {refusal}");
        return;
    }
    let tests: [(&str, fn()); 14] = [
        ("every_offload", || carries(Offloads::default())),
        ("no_offload", || carries(Offloads::NONE)),
        ("no_tun_offload", || carries(Offloads { tun_tcp: false, ..Offloads::default() })),
        ("no_udp_on_the_tun", || carries(Offloads { tun_udp: false, ..Offloads::default() })),
        ("no_segments", || carries(Offloads { udp_segment: false, ..Offloads::default() })),
        ("no_joined_receive", || carries(Offloads { udp_gro: false, ..Offloads::default() })),
        ("no_tunnel", || carries(Offloads { tun_tunnel: false, ..Offloads::default() })),
        ("several_workers", several_workers),
        ("several_workers_keep_the_order", several_workers_keep_the_order),
        ("vxlan_and_geneve_inside", vxlan_and_geneve_inside),
        ("a_steady_stream_allocates_nothing", a_steady_stream_allocates_nothing),
        ("refusals_are_clear", refusals_are_clear),
        ("a_link_that_goes_down_or_away", a_link_that_goes_down_or_away),
        ("nobody_else_attaches_to_the_link", nobody_else_attaches_to_the_link),
    ];
    // This matches the test harness: `cargo test NAME` runs the tests whose names contain NAME.
    let filter = std::env::args().nth(1).filter(|argument| !argument.starts_with('-'));
    for (name, test) in tests {
        if filter.as_ref().is_none_or(|filter| name.contains(filter.as_str())) {
            test();
            println!("test {name} ... ok");
        }
    }
}

/// Moves this process into a new network namespace, and into a new user namespace if needed.
fn own_namespaces() -> Result<(), Box<dyn std::error::Error>> {
    // Real root keeps more rights without a user namespace, such as loading eBPF programs for
    // several queues.
    if nix::unistd::geteuid().is_root() && unshare(CloneFlags::CLONE_NEWNET).is_ok() {
        File::open("/dev/net/tun")?;
        return Ok(());
    }
    let (user, group) = (nix::unistd::getuid(), nix::unistd::getgid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    File::open("/dev/net/tun")?;
    Ok(())
}

/// A host: one network namespace.
struct Host(File);

impl Host {
    fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let file = File::open("/proc/thread-self/ns/net").unwrap();
            let mut links = Rtnetlink::open().unwrap();
            let loopback = links.link_index("lo").unwrap();
            links.set_up(loopback, true).unwrap();
            file
        });
        Self(made.join().unwrap())
    }

    /// Runs `job` inside the namespace.
    fn run<R: Send>(&self, job: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
                job()
            });
            inside.join().unwrap()
        })
    }
}

fn address(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// Sets the MTU of a link, sets it up, and adds addresses.
fn configure(name: &str, mtu: u32, addresses: &[&str]) {
    let mut links = Rtnetlink::open().unwrap();
    let index = links.link_index(name).unwrap();
    links.set_mtu(index, mtu).unwrap();
    links.set_up(index, true).unwrap();
    let options = AddressOptions { no_dad: true, ..AddressOptions::default() };
    for text in addresses {
        links.add_address(index, address(text), options).unwrap();
    }
}

/// A host with a running data plane.
struct Node {
    host: Host,
    plane: DataPlane,
    events: Receiver<Event>,
    inner: [IpAddr; 2],
}

impl Node {
    /// Receives the events that have been sent, and returns their number.
    fn take_events(&mut self) -> u64 {
        std::iter::from_fn(|| self.events.try_recv().ok()).fold(0, |count, _| count + 1)
    }

    /// Returns when the last handshake with each peer completed.
    fn handshakes(&self) -> Vec<Option<Instant>> {
        let peers = self.plane.snapshot().peers;
        peers.into_values().map(|peer| peer.last_handshake).collect()
    }

    /// Waits for a fault of the data plane and returns it.
    fn fault(&self) -> Fault {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let mut faults = self.plane.faults();
        runtime.block_on(async {
            let fault = tokio::time::timeout(TIMEOUT, faults.wait_for(Option::is_some)).await;
            fault.expect("a fault in time").unwrap().clone().unwrap()
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let stopped = self.plane.stop();
        assert!(stopped.is_ok() || std::thread::panicking(), "{stopped:?}");
    }
}

/// Creates two hosts, a cable between them, and a tunnel over it.
fn pair(offloads: Offloads, outer: [&str; 2]) -> [Node; 2] {
    pair_with(offloads, outer, 1)
}

/// Creates the same as [`pair`], with `workers` workers each if the machine allows it.
fn pair_with(offloads: Offloads, outer: [&str; 2], workers: usize) -> [Node; 2] {
    let hosts = [Host::new(), Host::new()];
    let far = hosts[1].0.as_fd();
    hosts[0].run(|| {
        let peer = VethPeer { name: "cable", namespace: Some(far) };
        Rtnetlink::open().unwrap().add_veth("cable", peer).unwrap();
    });
    let mut number = 0;
    let nodes = hosts.map(|host| {
        number += 1;
        let outer = outer[number - 1];
        let inner = [format!("10.0.0.{number}/24"), format!("fd00:1::{number}/64")];
        let (plane, events) = host.run(|| {
            configure("cable", 1500, &[outer]);
            let tunnels = HostTunnels::default();
            tunnels.set([4789, 4790, 6081, 6082]);
            let queues = open_tun_queues("towline0", offloads, workers).unwrap();
            configure("towline0", MTU, &[&inner[0], &inner[1]]);
            let sockets = open_udp_group(51830, 0, offloads, queues.len()).unwrap();
            let queues = queues.into_iter().map(|tun| tun.with_host_tunnels(tunnels.clone()));
            let (sender, events) = channel(1024);
            let private_key = StaticSecret::from([number as u8; 32]);
            // One node has each engine.
            let choice =
                if number % 2 == 1 { EngineChoice::Batch } else { EngineChoice::Boringtun };
            let probes = Probes::new(private_key.clone(), 1);
            let engine = Engine::select(choice, Aead::Auto);
            let spin = Duration::from_micros(20);
            let config = Config { spin, ..Config::new(private_key, probes, engine) };
            (DataPlane::start(config, queues.zip(sockets), sender).unwrap(), events)
        });
        let inner = inner.map(|text| address(&text).addr());
        Node { host, plane, events, inner }
    });
    for (me, you) in [(0, 1), (1, 0)] {
        let entry = PeerEntry {
            endpoint: Some(SocketAddr::new(address(outer[you]).addr(), 51830).into()),
            prefixes: nodes[you].inner.map(IpNet::from).to_vec(),
            ..PeerEntry::default()
        };
        let peers = BTreeMap::from([(nodes[you].plane.public_key(), entry)]);
        let own = OwnNetworks::new(nodes[me].inner, [], []);
        nodes[me].plane.apply(&PeerTable { peers, own });
    }
    let to = SocketAddr::new(address(outer[1]).addr(), 51830);
    nodes[0].plane.handshake(nodes[1].plane.public_key(), vec![to.into()]);
    nodes
}

/// Checks that a tunnel with these offloads carries TCP and UDP in both families and directions.
fn carries(offloads: Offloads) {
    for outer in [["192.0.2.1/24", "192.0.2.2/24"], ["fd00:2::1/64", "fd00:2::2/64"]] {
        let nodes = pair(offloads, outer);
        for family in 0..2 {
            for (from, to) in [(0, 1), (1, 0)] {
                stream(&nodes[from], &nodes[to], family, 8 << 20);
                datagrams(&nodes[from], &nodes[to], family);
            }
        }
        for node in &nodes {
            let snapshot = node.plane.snapshot();
            for feature in &snapshot.features {
                let wanted = match feature.name {
                    "tun_tcp" => offloads.tun_tcp,
                    "tun_udp" => offloads.tun_tcp && offloads.tun_udp,
                    "tun_tunnel" => offloads.tun_tcp && offloads.tun_udp && offloads.tun_tunnel,
                    "udp_segment" => offloads.udp_segment,
                    "udp_gro" => offloads.udp_gro,
                    other => panic!("{other}"),
                };
                assert!(!feature.active || wanted, "{feature:?}");
            }
            // The kernel's own multicast packets have no peer.
            let mut drops = snapshot.drops.clone();
            drops.remove("no_route");
            assert!(drops.values().all(|count| *count == 0), "{drops:?}");
        }
    }
}

/// Returns whether the node has several workers. Prints the reason if not.
fn has_workers(node: &Node) -> bool {
    let features = node.plane.snapshot().features;
    let queues = features.iter().find(|feature| feature.name == "tun_queues").unwrap();
    if let Some(reason) = &queues.reason {
        println!("skipped: {reason}");
    }
    queues.active
}

fn several_workers() {
    let nodes = pair_with(Offloads::default(), ["192.0.2.1/24", "192.0.2.2/24"], 3);
    if !has_workers(&nodes[0]) {
        return;
    }
    for family in [0, 1] {
        stream(&nodes[0], &nodes[1], family, 8 << 20);
        stream(&nodes[1], &nodes[0], family, 8 << 20);
        datagrams(&nodes[0], &nodes[1], family);
    }
    for node in nodes {
        node.host.run(|| {
            let mut links = Rtnetlink::open().unwrap();
            let link = links.link_index("towline0").unwrap();
            links.delete_link(link).unwrap();
        });
        assert!(matches!(node.fault(), Fault::TunGone(_)));
        node.plane.stop().unwrap();
    }
}

/// Checks the order when a receiver starts to reply in the middle of a flow. Independent of the
/// queue and the socket of a reply, the flow keeps its own. By default the kernel would move the
/// flow to the queue of the replies, past the packets that wait in the first queue.
fn several_workers_keep_the_order() {
    const FLOWS: usize = 48;
    const EACH: u64 = 4_000;
    let nodes = pair_with(Offloads::default(), ["192.0.2.1/24", "192.0.2.2/24"], 2);
    if !has_workers(&nodes[0]) {
        return;
    }
    let receive = |receiver: UdpSocket| {
        let (mut next, mut bytes) = (0, [0; 64]);
        while next <= EACH {
            let (len, from) = receiver.recv_from(&mut bytes).unwrap();
            assert_eq!(len, bytes.len());
            let number = u64::from_be_bytes(*bytes.first_chunk().unwrap());
            assert!(number >= next, "{number} came after {}", next - 1);
            next = number + 1;
            if number >= EACH / 2 && number.is_multiple_of(7) {
                receiver.send_to(&bytes[..8], from).unwrap();
            }
        }
    };
    for number in 0..FLOWS {
        let [at, from] = [1, 0].map(|node| nodes[node].inner[number % 2]);
        let receiver = nodes[1].host.run(|| UdpSocket::bind((at, 5000 + number as u16)).unwrap());
        let sender = nodes[0].host.run(|| UdpSocket::bind((from, 0)).unwrap());
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        receiver.set_read_timeout(Some(TIMEOUT)).unwrap();
        std::thread::scope(|scope| {
            let receiving = scope.spawn(|| receive(receiver));
            let mut bytes = [0; 64];
            // The sender continues until the receiver has enough, because some datagrams may be
            // lost.
            for number in 0u64.. {
                if receiving.is_finished() {
                    break;
                }
                bytes[..8].copy_from_slice(&number.to_be_bytes());
                // Errors are ignored: the receiver may just have closed its port. No one reads the
                // replies.
                let _ = sender.send(&bytes);
            }
        });
    }
}

/// Returns bytes without a repeating pattern.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(step).take(len).collect()
}

/// Sends a TCP stream through the tunnel and compares what arrives.
fn stream(from: &Node, to: &Node, family: usize, len: usize) {
    stream_to(from, to, SocketAddr::new(to.inner[family], 4000), len);
}

/// Sends a TCP stream to the address `at` and compares what arrives.
fn stream_to(from: &Node, to: &Node, at: SocketAddr, len: usize) {
    let listener = to.host.run(|| TcpListener::bind(at).unwrap());
    let sent = pattern(len);
    std::thread::scope(|scope| {
        let received = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            received
        });
        from.host
            .run(|| TcpStream::connect_timeout(&at, TIMEOUT).unwrap().write_all(&sent).unwrap());
        assert!(received.join().unwrap() == sent, "the stream arrived changed");
    });
}

/// Sends UDP datagrams of many sizes through the tunnel and compares what arrives.
fn datagrams(from: &Node, to: &Node, family: usize) {
    let at = SocketAddr::new(to.inner[family], 4001);
    let receiver = to.host.run(|| UdpSocket::bind(at).unwrap());
    receiver.set_read_timeout(Some(TIMEOUT)).unwrap();
    let sender = from.host.run(|| UdpSocket::bind((from.inner[family], 0)).unwrap());
    sender.connect(at).unwrap();
    let sizes = (0..40).map(|_| 1200).chain([1300, 100, 0, 1, 1392, 8000, 60_000]);
    for (number, size) in sizes.enumerate() {
        let mut datagram = pattern(size);
        datagram.extend_from_slice(&(number as u32).to_be_bytes());
        sender.send(&datagram).unwrap();
        let mut received = vec![0; 65_535];
        let len = receiver.recv(&mut received).unwrap();
        assert!(received[..len] == datagram, "datagram {number} of {size} bytes");
    }
}

/// Creates a tunnel link of the host with an address. Returns false if the kernel does not support
/// this kind.
fn overlay(kind: &str, name: &str, own: &str, fill: impl FnOnce(&mut Message)) -> bool {
    const IFLA_IFNAME: u16 = 3;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_INFO_KIND: u16 = 1;
    const IFLA_INFO_DATA: u16 = 2;
    let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    let mut request = Message::new(libc::RTM_NEWLINK, flags, &[0; 16]);
    request.string(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |info| {
        info.string(IFLA_INFO_KIND, kind).nest(IFLA_INFO_DATA, fill);
    });
    let mut connection = Connection::open(Protocol::Route).unwrap();
    match connection.request(|| format!("make {name}"), request) {
        Ok(_) => {
            configure(name, 1300, &[own]);
            true
        }
        Err(error) if error.errno() == Some(nix::errno::Errno::EOPNOTSUPP) => {
            println!("skipped {name}: {error}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

fn vxlan_and_geneve_inside() {
    for tun_tunnel in [true, false] {
        let offloads = Offloads { tun_tunnel, ..Offloads::default() };
        let nodes = pair(offloads, ["192.0.2.1/24", "192.0.2.2/24"]);
        for (number, checksum) in [(0u8, 0u8), (1, 1)] {
            let mut nets = std::collections::BTreeSet::new();
            for (me, you) in [(0, 1), (1, 0)] {
                let (local, remote) = (nodes[me].inner[0], nodes[you].inner[0]);
                nodes[me].host.run(|| {
                    let own = format!("10.{}.0.{}/24", 1 + number, 1 + me);
                    let vxlan = overlay("vxlan", &format!("vxlan{number}"), &own, |data| {
                        // The attributes are: id, remote, local, UDP checksum, port.
                        data.u32(1, 1).ip(2, remote).ip(4, local).u8(18, checksum);
                        data.bytes(15, &(4789 + u16::from(number)).to_be_bytes());
                    });
                    let own = format!("10.{}.0.{}/24", 3 + number, 1 + me);
                    let geneve = overlay("geneve", &format!("geneve{number}"), &own, |data| {
                        // The attributes are: id, remote, UDP checksum, port.
                        data.u32(1, 1).ip(2, remote).u8(8, checksum);
                        data.bytes(5, &(6081 + u16::from(number)).to_be_bytes());
                    });
                    nets.extend(vxlan.then_some(1 + number));
                    nets.extend(geneve.then_some(3 + number));
                });
            }
            for net in nets {
                for (from, to) in [(0, 1), (1, 0)] {
                    let at = SocketAddr::from(([10, net, 0, 1 + to as u8], 4000));
                    stream_to(&nodes[from], &nodes[to], at, 8 << 20);
                }
            }
        }
        for node in &nodes {
            let mut drops = node.plane.snapshot().drops;
            drops.remove("no_route");
            assert!(drops.values().all(|count| *count == 0), "{drops:?}");
            let given_up =
                |feature: &&Feature| matches!(feature.reason, Some(OffReason::Refused(_)));
            let features = node.plane.snapshot().features;
            assert_eq!(features.iter().find(given_up), None);
        }
    }
}

/// Part of a stream in which the allocations of all threads were counted.
#[derive(Debug)]
struct Window {
    allocations: u64,
    /// Number of events that the data planes sent meanwhile, or just before or after.
    events: u64,
    has_handshake: bool,
}

/// Sends streams in both directions at the same time, and counts the allocations in parts of them.
///
/// Packets allocate nothing. What may allocate is rare: the channel makes room for some dozen events at
/// once, and a second of traffic is one event; a handshake, which is due after two minutes, makes a session.
fn a_steady_stream_allocates_nothing() {
    const WINDOWS: usize = 8;
    /// Bytes of one part in each direction: dozens of batches.
    const WINDOW: usize = 8 << 20;
    const BLOCK: usize = 64 << 10;
    /// Calls `block` for each block of each part. No thread ends while allocations are counted.
    fn run(meet: &Barrier, mut block: impl FnMut()) {
        for _ in 0..=WINDOWS {
            meet.wait();
            (0..WINDOW / BLOCK).for_each(|_| block());
            meet.wait();
        }
        meet.wait();
    }
    let mut nodes = pair(Offloads::default(), ["192.0.2.1/24", "192.0.2.2/24"]);
    stream(&nodes[0], &nodes[1], 0, 1 << 20);
    let at = SocketAddr::new(nodes[1].inner[0], 4003);
    let listener = nodes[1].host.run(|| TcpListener::bind(at).unwrap());
    let near = nodes[0].host.run(|| TcpStream::connect_timeout(&at, TIMEOUT).unwrap());
    let (far, _) = listener.accept().unwrap();
    let meet = Barrier::new(5);
    let mut windows = Vec::new();
    std::thread::scope(|scope| {
        let meet = &meet;
        for stream in [&near, &far] {
            let (mut writer, mut reader) = (stream, stream);
            scope.spawn(move || {
                let bytes = vec![1; BLOCK];
                run(meet, || writer.write_all(&bytes).unwrap());
            });
            scope.spawn(move || {
                let mut bytes = vec![0; BLOCK];
                run(meet, || reader.read_exact(&mut bytes).unwrap());
            });
        }
        // The first part is the warm-up.
        for number in 0..=WINDOWS {
            let handshakes = nodes.each_ref().map(Node::handshakes);
            for node in &mut nodes {
                node.take_events();
            }
            ALLOCATIONS.store(0, Ordering::Relaxed);
            ARMED.store(number > 0, Ordering::Release);
            meet.wait();
            meet.wait();
            ARMED.store(false, Ordering::Release);
            windows.push(Window {
                allocations: ALLOCATIONS.load(Ordering::Relaxed),
                events: nodes.iter_mut().map(Node::take_events).sum(),
                has_handshake: handshakes != nodes.each_ref().map(Node::handshakes),
            });
        }
        meet.wait();
    });
    let places = || {
        let places = PLACES.lock().unwrap();
        places.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    let is_rare = |window: &Window| window.has_handshake || window.allocations <= window.events;
    assert!(windows.iter().all(is_rare), "{windows:#?}\n{}", places());
    let without = windows[1..].iter().filter(|window| window.allocations == 0).count();
    assert!(without >= WINDOWS / 2, "{windows:#?}\n{}", places());
}

fn refusals_are_clear() {
    Host::new().run(|| {
        let taken = open_tun("lo").unwrap_err();
        assert!(matches!(taken, OpenTunError::NameTaken(_)), "{taken}");
        let bad = open_tun("far-too-long-for-a-link").unwrap_err();
        assert!(matches!(bad, OpenTunError::BadName(_)), "{bad}");
        let tun = open_tun("towline0").unwrap();
        let busy = open_tun("towline0").unwrap_err();
        assert!(matches!(busy, OpenTunError::Busy(_)), "{busy}");
        drop(tun);
        open_tun_with("towline0", Offloads::NONE).unwrap();
        let mut links = Rtnetlink::open().unwrap();
        assert!(links.link("towline0").unwrap().is_some(), "the link outlives its owner");

        let udp = open_udp(0, 0).unwrap();
        let busy = open_udp(udp.port(), 0).unwrap_err();
        assert!(matches!(busy, OpenUdpError::Busy(_)), "{busy}");
        open_udp(0, 0x10).unwrap();
    });
}

fn a_link_that_goes_down_or_away() {
    let nodes = pair(Offloads::default(), ["192.0.2.1/24", "192.0.2.2/24"]);
    stream(&nodes[0], &nodes[1], 0, 1 << 20);
    let set_up = |node: &Node, up| {
        node.host.run(|| {
            let mut links = Rtnetlink::open().unwrap();
            let index = links.link_index("towline0").unwrap();
            links.set_up(index, up).unwrap();
        });
    };
    set_up(&nodes[1], false);
    let from = nodes[0].inner[0];
    let to = SocketAddr::new(nodes[1].inner[0], 4002);
    nodes[0].host.run(|| UdpSocket::bind((from, 0)).unwrap().send_to(b"?", to).unwrap());
    let deadline = Instant::now() + TIMEOUT;
    while nodes[1].plane.snapshot().drops["tun_refused"] == 0 {
        assert!(Instant::now() < deadline, "{:?}", nodes[1].plane.snapshot());
        std::thread::yield_now();
    }
    set_up(&nodes[1], true);
    stream(&nodes[0], &nodes[1], 0, 1 << 20);

    // With a smaller MTU under a running tunnel, the padding stays within it, and packets arrive.
    nodes[0].host.run(|| configure("towline0", 1300, &[]));
    stream(&nodes[0], &nodes[1], 0, 1 << 20);
    stream(&nodes[1], &nodes[0], 0, 1 << 20);

    nodes[1].host.run(|| {
        let mut links = Rtnetlink::open().unwrap();
        let index = links.link_index("towline0").unwrap();
        links.delete_link(index).unwrap();
    });
    assert!(matches!(nodes[1].fault(), Fault::TunGone(_)));
}

/// How another program tries to attach: with one queue, or with one more of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queues {
    One,
    Several,
}

/// Opens `/dev/net/tun` with the rights of the test. On most systems any user may open it.
fn tun_device() -> File {
    File::options().read(true).write(true).open("/dev/net/tun").unwrap()
}

/// Attaches a descriptor to the link `name`, like any program could.
fn attach(device: &File, name: &str, queues: Queues) -> std::io::Result<()> {
    let several = if queues == Queues::Several { libc::IFF_MULTI_QUEUE } else { 0 };
    // SAFETY: `ifreq` is plain data, for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as _;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several) as _;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is.
    match unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Creates a persistent link without an owner, like earlier versions did.
fn make_unowned(name: &str, queues: Queues) {
    let device = tun_device();
    attach(&device, name, queues).unwrap();
    // SAFETY: TUNSETPERSIST takes its argument by value.
    assert_eq!(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETPERSIST as _, 1) }, 0);
}

/// Runs `job` on a thread with the user id `uid` and only these capabilities (bits). Returns `None`
/// if this process may not change its user.
fn as_user<R: Send>(uid: u32, capabilities: u32, job: impl FnOnce() -> R + Send) -> Option<R> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let uid = libc::c_long::from(uid);
            // System calls change the calling thread only, unlike the functions of the C library.
            // SAFETY: none of these takes a pointer.
            let changed = unsafe {
                libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0);
                libc::syscall(libc::SYS_setresuid, uid, uid, uid)
            };
            if changed != 0 {
                return None;
            }
            // Layout of `linux/capability.h`, version 3, for the calling thread: effective,
            // permitted and inheritable, in two words each.
            let header = [0x2008_0522u32, 0];
            let sets = [capabilities, capabilities, 0, 0, 0, 0];
            // SAFETY: header and sets have the lengths that this version requires.
            let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
            assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
            Some(job())
        });
        thread.join().unwrap()
    })
}

/// User id of the other user, without rights.
const STRANGER: u32 = 65534;
/// User id of the agent.
const AGENT: u32 = 64_999;
const CAP_DAC_OVERRIDE: u32 = 1 << 1;
const CAP_NET_ADMIN: u32 = 1 << 12;

/// Tries to attach in both ways. Both must fail.
fn nobody_else_attaches(name: &str, when: &str) {
    for queues in [Queues::One, Queues::Several] {
        let device = tun_device();
        let tried = as_user(STRANGER, 0, || attach(&device, name, queues)).unwrap();
        let code = tried.as_ref().err().and_then(std::io::Error::raw_os_error);
        // The kernel checks the number of queues first: a mismatch returns EINVAL, otherwise EPERM.
        assert!(matches!(code, Some(libc::EPERM | libc::EINVAL)), "{when}, {queues:?}: {tried:?}");
    }
}

fn nobody_else_attaches_to_the_link() {
    if as_user(STRANGER, 0, || ()).is_none() {
        println!("skipped: only root can become another user");
        return;
    }
    for (queues, count) in [(Queues::One, 1), (Queues::Several, 2)] {
        Host::new().run(|| {
            let name = "towline0";
            let stranger = |when| nobody_else_attaches(name, when);
            let opened = open_tun_queues(name, Offloads::default(), count).unwrap();
            stranger("running");
            // A crash has the same effect: closing its descriptors does not change the link.
            drop(opened);
            stranger("stopped or crashed");
            let opened = open_tun_queues(name, Offloads::default(), count).unwrap();
            stranger("running again");
            drop(opened);

            // The link was created by an earlier version, and the agent or the guard finds it
            // first.
            let mut links = Rtnetlink::open().unwrap();
            for repair in [
                (|| drop(open_tun("old0").unwrap())) as fn(),
                || own_tun("old0", 0).unwrap(),
                || assert_eq!(secure("old0", 0).unwrap(), Secured::Taken),
            ] {
                make_unowned("old0", queues);
                let device = tun_device();
                let attached = as_user(STRANGER, 0, || attach(&device, "old0", queues)).unwrap();
                assert!(attached.is_ok(), "the test shows nothing: {attached:?}");
                drop(device);
                repair();
                nobody_else_attaches("old0", "repaired");
                let tun = links.link("old0").unwrap().unwrap().tun.unwrap();
                assert_eq!((tun.owner, tun.queues), (Some(0), 0));
                assert_eq!(secure("old0", 0).unwrap(), Secured::Owned);
                let index = links.link_index("old0").unwrap();
                links.delete_link(index).unwrap();
            }

            // Another process attached before the link had an owner, and keeps its descriptor.
            make_unowned("held0", queues);
            let device = tun_device();
            as_user(STRANGER, 0, || attach(&device, "held0", queues)).unwrap().unwrap();
            assert_eq!(secure("held0", 0).unwrap(), Secured::Removed);
            drop(open_tun_queues("held0", Offloads::default(), count).unwrap());
            nobody_else_attaches("held0", "made again");
            let mut byte = [0];
            let read = (&device).read(&mut byte).unwrap_err();
            assert_eq!(read.raw_os_error(), Some(libc::EBADFD), "the other process reads nothing");

            if queues == Queues::Several {
                // Another process attached between the creation of the link and the check.
                drop(open_tun_queues("race0", Offloads::default(), count).unwrap());
                attach(&device, "race0", queues).unwrap();
                let opened = tun_owner::open("race0", Offloads::default(), count).unwrap();
                let read = (&device).read(&mut byte).unwrap_err();
                assert_eq!(
                    read.raw_os_error(),
                    Some(libc::EBADFD),
                    "the other process reads nothing"
                );
                nobody_else_attaches("race0", "made again");
                drop(opened);
            }

            // The agent of this installation now runs as another user.
            let capabilities = CAP_NET_ADMIN | CAP_DAC_OVERRIDE;
            as_user(AGENT, capabilities, || drop(open_tun(name).unwrap())).unwrap();
            let owner =
                |links: &mut Rtnetlink| links.link(name).unwrap().unwrap().tun.unwrap().owner;
            assert_eq!(owner(&mut links), Some(AGENT));
            stranger("another user's");
            // The link is then given back to the first user.
            drop(open_tun(name).unwrap());
            assert_eq!(owner(&mut links), Some(0));
            assert_eq!(secure(name, AGENT).unwrap(), Secured::Taken);
            assert_eq!(owner(&mut links), Some(AGENT));
        });
    }
    Host::new().run(|| {
        assert_eq!(secure("none0", 0).unwrap(), Secured::NoLink);
        assert_eq!(secure("lo", 0).unwrap(), Secured::NoLink);
        assert!(Rtnetlink::open().unwrap().link("none0").unwrap().is_none(), "nothing is created");
    });
}
