//! Number of instructions that the data plane executes for a packet in each direction: `cargo bench
//! -p towline-dataplane --bench pipeline`. Needs valgrind; without it, prints a notice and ends.
//!
//! Two data planes with one worker each exchange packets over links and a wire that only copy. The
//! first seals what the host sends (`outbound`), the second opens it (`inbound`). callgrind counts
//! the instructions twice, the second time with twice as many packets. The difference is the cost
//! of the packets, without start and end.

#![expect(clippy::print_stdout, reason = "the result of the benchmark")]

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path as FilePath;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use towline_core::own_networks::OwnNetworks;
use towline_core::peer_table::{Observation, PeerEntry, PeerTable};
use towline_dataplane::arena::{
    GsoBatch, HEADROOM, RecvBatch, SLOT_BYTES, SendBatch, TunBatch, WriteBatch,
};
use towline_dataplane::coalesce::Coalesce;
use towline_dataplane::drops::Drops;
use towline_dataplane::switch::Switch;
use towline_dataplane::udp::TooBig;
use towline_dataplane::vnet::VnetHeader;
use towline_dataplane::{
    Aead, Config, DataPlane, Engine, EngineChoice, Event, Probes, Ready, TunIo, UdpIo,
};
use x25519_dalek::StaticSecret;

mod fixtures;

use fixtures::{PAYLOAD, SEGMENTS, super_packet};

/// Number of super-packets in the shorter run.
const LOAD: u64 = 200;
/// Longest time for one run, which valgrind slows down by a large factor.
const TIMEOUT: Duration = Duration::from_secs(120);

fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("an eventfd")
}

/// State of a host: the number of super-packets that it still has to send, and the number of bytes
/// that arrived.
struct Host {
    left: AtomicU64,
    arrived: AtomicU64,
    readable: EventFd,
}

/// Link that delivers copies of one super-packet.
struct Link {
    host: Arc<Host>,
    packet: Vec<u8>,
    header: VnetHeader,
}

impl TunIo for Link {
    fn fd(&self) -> BorrowedFd<'_> {
        self.host.readable.as_fd()
    }

    fn mtu(&self) -> usize {
        1_420
    }

    fn read(&mut self, batch: &mut TunBatch, _: &Drops) -> io::Result<()> {
        while self.host.left.load(Ordering::Relaxed) > 0 {
            let Some(spare) = batch.spare() else { return Ok(()) };
            spare[HEADROOM..HEADROOM + self.packet.len()].copy_from_slice(&self.packet);
            batch.commit(self.header, self.packet.len());
            self.host.left.fetch_sub(1, Ordering::Relaxed);
        }
        let _ = self.host.readable.read();
        Ok(())
    }

    fn coalesce(&self) -> Coalesce {
        Coalesce { tcp: true, udp: true, ..Coalesce::default() }
    }

    fn write(&mut self, _: Instant, batch: &WriteBatch, _: &Drops) {
        let bytes: usize = batch.frames().iter().map(|frame| frame.len).sum();
        self.host.arrived.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn features(&self) -> Vec<Switch> {
        Vec::new()
    }
}

/// GSO batches that wait at one end of the wire, each with its segment size.
struct Inbox {
    gso_batches: Mutex<VecDeque<(Vec<u8>, usize)>>,
    readable: EventFd,
}

/// End of a wire that copies trains.
struct Wire {
    own: Arc<Inbox>,
    other: Arc<Inbox>,
    from: SocketAddr,
}

impl UdpIo for Wire {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.own.readable.as_fd()]
    }

    fn receive(&mut self, _: Ready, batch: &mut RecvBatch, _: &Drops) -> io::Result<()> {
        let mut gso_batches = self.own.gso_batches.lock().expect("the wire");
        for slot in 0..batch.slots() {
            let Some((gso, size)) = gso_batches.pop_front() else {
                let _ = self.own.readable.read();
                break;
            };
            batch.bytes_mut()[slot * SLOT_BYTES..][..gso.len()].copy_from_slice(&gso);
            batch.push(slot, self.from.into(), gso.len(), size);
        }
        Ok(())
    }

    fn send_gso_batches(&mut self, _: Instant, bytes: &[u8], gso_batches: &[GsoBatch], _: &Drops) {
        let mut waiting = self.other.gso_batches.lock().expect("the wire");
        for gso in gso_batches {
            let bytes = bytes[gso.start..gso.start + gso.len].to_vec();
            waiting.push_back((bytes, gso.len.div_ceil(gso.segments.max(1))));
        }
        let _ = self.other.readable.write(1);
    }

    fn send_whole(&mut self, now: Instant, batch: &SendBatch, drops: &Drops) -> Result<(), TooBig> {
        self.send(now, batch, drops);
        Ok(())
    }

    fn record_gro(&mut self, _: Instant, _: usize, _: usize) {}

    fn features(&self) -> Vec<Switch> {
        Vec::new()
    }
}

/// Data plane with its host.
struct End {
    plane: DataPlane,
    host: Arc<Host>,
    events: tokio::sync::mpsc::Receiver<Event>,
    address: SocketAddr,
}

impl End {
    fn start(number: u8, own: &Arc<Inbox>, other: &Arc<Inbox>) -> Self {
        let address = |number| SocketAddr::from(([192, 0, 2, number], 51830));
        let host = Arc::new(Host {
            left: AtomicU64::new(0),
            arrived: AtomicU64::new(0),
            readable: event(),
        });
        let (packet, header) = super_packet();
        let link = Link { host: host.clone(), packet, header };
        let wire = Wire { own: own.clone(), other: other.clone(), from: address(3 - number) };
        let (sender, events) = tokio::sync::mpsc::channel(256);
        let private_key = StaticSecret::from([number; 32]);
        let probes = Probes::new(private_key.clone(), 1);
        let engine = Engine::select(EngineChoice::Auto, Aead::Auto);
        let config = Config::new(private_key, probes, engine);
        let plane = DataPlane::start(config, [(link, wire)], sender).expect("a data plane");
        Self { plane, host, events, address: address(number) }
    }

    /// Makes `peer` the only peer of this end. `own` and `theirs` are the addresses inside the
    /// tunnel.
    fn add_peer(&self, peer: &Self, own: [u8; 4], theirs: [u8; 4]) {
        let entry = PeerEntry {
            endpoint: Some(peer.address.into()),
            prefixes: vec![ipnet::IpNet::from(IpAddr::from(theirs))],
            ..PeerEntry::default()
        };
        let peers = BTreeMap::from([(peer.plane.public_key(), entry)]);
        let own = OwnNetworks::new([IpAddr::from(own)], [], []);
        self.plane.apply(&PeerTable { peers, own });
    }

    fn await_handshake(&mut self) {
        let handshake = |event: &Event| {
            matches!(event, Event::Peer { what: Observation::Handshake { .. }, .. })
        };
        while !self.events.blocking_recv().as_ref().is_some_and(handshake) {}
    }
}

/// Sends `load` super-packets from one end to the other.
fn carry(load: u64) {
    let inbox = || {
        let (gso_batches, readable) = (Mutex::new(VecDeque::new()), event());
        Arc::new(Inbox { gso_batches, readable })
    };
    let (left, right) = (inbox(), inbox());
    let mut a = End::start(1, &left, &right);
    let mut b = End::start(2, &right, &left);
    a.add_peer(&b, [10, 0, 0, 1], [10, 0, 0, 2]);
    b.add_peer(&a, [10, 0, 0, 2], [10, 0, 0, 1]);
    a.plane.handshake(b.plane.public_key(), vec![b.address.into()]);
    a.await_handshake();
    b.await_handshake();
    let wanted = load * (SEGMENTS * PAYLOAD) as u64;
    a.host.left.store(load, Ordering::Relaxed);
    let _ = a.host.readable.write(1);
    let deadline = Instant::now() + TIMEOUT;
    while b.host.arrived.load(Ordering::Relaxed) < wanted {
        assert!(Instant::now() < deadline, "not everything arrives: {:?}", b.plane.snapshot());
        std::thread::yield_now();
    }
    for end in [a, b] {
        end.plane.stop().expect("the worker ends");
    }
}

/// Returns the number of instructions of each thread, by its number, in a run with `load`
/// super-packets.
fn count(directory: &FilePath, load: u64) -> BTreeMap<u32, u64> {
    let out = directory.join(load.to_string());
    let own = std::env::current_exe().expect("this program's path");
    let status = Command::new("valgrind")
        .args(["--tool=callgrind", "--separate-threads=yes", "--quiet"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(own)
        .args(["--carry", &load.to_string()])
        .status()
        .expect("valgrind starts");
    assert!(status.success(), "valgrind ended with {status}");
    let name = format!("{load}-");
    let files = std::fs::read_dir(directory).expect("the directory").flatten();
    let ours = files.filter(|file| file.file_name().to_string_lossy().starts_with(&name));
    ours.filter_map(|file| {
        let text = std::fs::read_to_string(file.path()).ok()?;
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
        Some((field("thread: ")?.trim().parse().ok()?, field("totals: ")?.trim().parse().ok()?))
    })
    .collect()
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, flag, load] = &*arguments
        && flag == "--carry"
    {
        return carry(load.parse().expect("a number"));
    }
    // `cargo test` runs benches too, with another flag. One short run without counting is enough
    // then.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return carry(4);
    }
    let valgrind = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status();
    if !valgrind.is_ok_and(|status| status.success()) {
        println!("skipped: valgrind is not installed, and nothing else counts instructions here");
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let [once, twice] = [LOAD, 2 * LOAD].map(|load| count(directory.path(), load));
    // The first thread only waits. Of the others, only the two workers execute more instructions
    // for more packets. The sender's worker has the lower number, because it is started first.
    let more = |thread: &u32| {
        let before = once.get(thread).copied().unwrap_or_default();
        twice[thread].saturating_sub(before) / (LOAD * SEGMENTS as u64)
    };
    let mut workers: Vec<u32> = twice.keys().copied().filter(|thread| *thread > 1).collect();
    workers.sort_by_key(|thread| std::cmp::Reverse(more(thread)));
    workers.truncate(2);
    workers.sort_unstable();
    for (direction, thread) in ["outbound", "inbound"].into_iter().zip(&workers) {
        println!("{direction}: {} instructions per packet", more(thread));
    }
}
