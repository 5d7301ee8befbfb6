//! Tests of two data planes that exchange packets over TUN links and a network in memory, which
//! records all datagrams.

#![expect(clippy::unwrap_used, reason = "a panic is the report")]

mod faults;
mod seal_ahead;
mod sources;
mod strangers;
mod traffic;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{Receiver, channel};
use towline_core::forwarding::{ForwardingEnd, ForwardingTable};
use towline_core::own_networks::OwnNetworks;
use towline_core::path::{ChannelId, Path};
use towline_core::peer_table::{Observation, PeerEntry, PeerPath, PeerTable};
use towline_dataplane::arena::{GSO_MAX_BYTES, SLOT_BYTES, TunBatch, WriteBatch};
use towline_dataplane::coalesce::Coalesce;
use towline_dataplane::drops::Drops;
use towline_dataplane::memory::{self, Datagram, MemoryHost, MemoryTun, Network};
use towline_dataplane::switch::Switch;
use towline_dataplane::vnet::{FLAG_NEEDS_CSUM, GSO_UDP_L4, VnetHeader};
use towline_dataplane::{
    Aead, Config, DataPlane, Engine, EngineChoice, Event, Fault, Probes, StuckWorkers, TunIo,
    checksum,
};
use towline_types::frame::{Probe, ProbeVersion, relayed_header};
use towline_types::id::{PresharedKey, WireguardKey};
use towline_types::mtu::Mtu;
use towline_types::rate::Rate;
use towline_types::stun;
use towline_wireguard::{HANDSHAKE_BYTES, Inputs, Secrets, Session};
use x25519_dalek::{PublicKey, StaticSecret};

/// Longest time to wait for something that must happen. It only bounds a failing test.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Time to wait for something that must not happen. Every thread has run by then.
const A_WHILE: Duration = Duration::from_millis(100);
const PATTERN: &[u8] = b"an inner byte pattern that nobody may see";

/// Returns the WireGuard engine of an end: the batch engine where the number is odd, so that each
/// engine talks to the other in both roles.
fn engine_of(number: u8) -> Engine {
    let choice = if number % 2 == 1 { EngineChoice::Batch } else { EngineChoice::Boringtun };
    Engine::select(choice, Aead::Auto)
}

/// Returns the settings of a data plane whose private key is made of a number.
fn config(number: u8, engine: Engine) -> Config {
    let private_key = StaticSecret::from([number; 32]);
    let probes = Probes::new(private_key.clone(), 1);
    Config::new(private_key, probes, engine)
}

/// Data plane with its host and its events.
struct End {
    plane: DataPlane,
    probes: Probes,
    host: MemoryHost,
    events: Receiver<Event>,
    address: SocketAddr,
    inner: Ipv4Addr,
    runtime: tokio::runtime::Runtime,
}

impl End {
    fn new(network: &Network, number: u8) -> Self {
        Self::with_helpers(network, number, 0)
    }

    /// Creates an end whose worker has helpers that seal its batches.
    fn with_helpers(network: &Network, number: u8, seal_helpers: usize) -> Self {
        let address = SocketAddr::from(([192, 0, 2, number], 51830));
        let (tun, host) = memory::tun(1420).unwrap();
        let (sender, events) = channel(256);
        let spin = Duration::from_micros(20);
        let config = Config { spin, seal_helpers, ..config(number, engine_of(number)) };
        let probes = config.probes.clone();
        let plane =
            DataPlane::start(config, [(tun, network.bind(address).unwrap())], sender).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let inner = Ipv4Addr::new(10, 0, 0, number);
        Self { plane, probes, host, events, address, inner, runtime }
    }

    /// Makes this end relay a channel between two nodes, each of which may send `bits` per second.
    fn relay(&self, channel: u64, ends: [SocketAddr; 2], bits: u64) {
        let mut number = 0;
        let ends = ends.map(|address| {
            number += 1;
            let node = WireguardKey([number; 32]);
            ForwardingEnd { node, path: address.into(), is_proven: true }
        });
        let mut table = ForwardingTable::new(Rate::per_second(bits, bits));
        table.insert(ChannelId(channel), ends);
        self.plane.apply_forwarding(&table);
    }

    fn key(&self) -> WireguardKey {
        self.plane.public_key()
    }

    /// Returns the entry of this end in the peer table of another.
    fn entry(&self) -> PeerEntry {
        PeerEntry {
            endpoint: Some(self.address.into()),
            prefixes: vec![ipnet::IpNet::from(std::net::IpAddr::from(self.inner))],
            ..PeerEntry::default()
        }
    }

    /// Sends a probe to another end.
    fn probe(&self, to: &End, message: &Probe) {
        let datagram = self.probes.seal(&to.key(), message, 0).unwrap();
        self.plane.send(to.address.into(), &datagram);
    }

    /// Waits for a message of the peer `of` that `wanted` accepts, and returns the path that it came by.
    /// Ignores other events.
    fn message(&mut self, of: WireguardKey, wanted: impl Fn(&Probe) -> bool) -> Path {
        loop {
            if let Event::Probe { peer, from, message, .. } = self.event()
                && peer == of
                && wanted(&message)
            {
                return from;
            }
        }
    }

    fn event(&mut self) -> Event {
        let Self { runtime, events, .. } = self;
        let next = runtime.block_on(async { tokio::time::timeout(TIMEOUT, events.recv()).await });
        next.expect("an event in time").expect("the data plane runs")
    }

    /// Waits for an observation of the peer `of` that `wanted` accepts. Ignores other events.
    fn observed(&mut self, of: WireguardKey, wanted: impl Fn(Observation) -> bool) {
        loop {
            if let Event::Peer { peer, what } = self.event()
                && peer == of
                && wanted(what)
            {
                return;
            }
        }
    }

    fn apply(&self, peers: impl IntoIterator<Item = (WireguardKey, PeerEntry)>) {
        self.apply_with(peers, OwnNetworks::new([self.inner.into()], [], []));
    }

    /// Applies a peer table with `own` instead of the single inner address.
    fn apply_with(
        &self,
        peers: impl IntoIterator<Item = (WireguardKey, PeerEntry)>,
        own: OwnNetworks,
    ) {
        self.plane.apply(&PeerTable { peers: BTreeMap::from_iter(peers), own });
    }

    fn drops(&self, reason: &str) -> u64 {
        self.plane.snapshot().drops[reason]
    }

    /// Waits until exactly `count` packets were dropped for this reason.
    fn dropped(&self, reason: &str, count: u64) {
        let deadline = std::time::Instant::now() + TIMEOUT;
        while self.drops(reason) < count {
            assert!(std::time::Instant::now() < deadline, "{reason}: {:?}", self.plane.snapshot());
            std::thread::yield_now();
        }
        assert_eq!(self.drops(reason), count);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let stopped = self.plane.stop();
        assert!(stopped.is_ok() || std::thread::panicking(), "{stopped:?}");
    }
}

/// Returns two ends that have each other as a peer, without a session.
fn strangers() -> (Network, End, End) {
    let network = Network::new();
    let (a, b) = (End::new(&network, 1), End::new(&network, 2));
    introduce(&a, &b);
    (network, a, b)
}

/// Returns two ends with a session that the first initiated.
fn friends() -> (Network, End, End) {
    let (network, mut a, mut b) = strangers();
    connect(&mut a, &mut b);
    (network, a, b)
}

/// Makes each of two ends the only peer of the other.
fn introduce(a: &End, b: &End) {
    a.apply([(b.key(), b.entry())]);
    b.apply([(a.key(), a.entry())]);
}

/// Makes two ends that know each other begin a session, which the first initiates.
fn connect(a: &mut End, b: &mut End) {
    a.plane.handshake(b.key(), vec![b.address.into()]);
    a.observed(b.key(), |what| what == Observation::Handshake { from: b.address.into() });
    b.observed(a.key(), |what| what == Observation::Handshake { from: a.address.into() });
}

/// Returns a UDP packet over IPv4 that contains the pattern.
fn packet(from: &End, to: &End, payload: usize) -> Vec<u8> {
    packet_from(from.inner, to.inner, payload)
}

fn packet_from(from: Ipv4Addr, to: Ipv4Addr, payload: usize) -> Vec<u8> {
    let len = 28 + payload;
    let mut packet = vec![0; len];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    packet[8] = 64;
    packet[9] = 17;
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&to.octets());
    packet[24..26].copy_from_slice(&((payload + 8) as u16).to_be_bytes());
    for (to, from) in packet[28..].iter_mut().zip(PATTERN.iter().cycle()) {
        *to = *from;
    }
    packet
}

fn net(text: &str) -> ipnet::IpNet {
    text.parse().unwrap()
}

fn carries(from: &End, to: &End, payload: usize) {
    let packet = packet(from, to, payload);
    from.host.send(&packet);
    assert_eq!(to.host.receive(TIMEOUT).as_ref(), Some(&packet));
}

fn of_type(seen: &[Datagram], kind: u8) -> Vec<&Datagram> {
    seen.iter().filter(|datagram| datagram.bytes.first() == Some(&kind)).collect()
}
