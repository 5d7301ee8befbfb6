//! The data plane moves packets between the TUN link and the network. It makes no decisions.
//!
//! A TUN link is on one side, UDP sockets are on the other, and WireGuard (`towline-wireguard`) is
//! between them. The data plane applies the core's [`PeerTable`] and reports what it observed as
//! [`Event`]s. It never decides which peer to contact or which path to use.
//!
//! # Contract
//!
//! - [`DataPlane::start`] runs one thread for each pair of a TUN queue and a socket, and the threads that
//!   seal for it ([`Config::seal_helpers`]). The handle is cheap to clone. Only [`DataPlane::stop`] waits for the threads.
//! - [`DataPlane::apply`] replaces the whole table at once: one packet uses one table from lookup
//!   to send. Peers that stay in the table keep their sessions, even when their pre-shared key or
//!   boot epoch changes.
//! - [`DataPlane::apply_forwarding`] replaces the channels that this node relays, at once too.
//! - Batches of packets cross the two I/O traits ([`TunIo`], [`UdpIo`]), never single packets. The
//!   order within a flow is kept.
//! - A fault is a state ([`DataPlane::faults`]) that cannot be lost. Every worker counts its loop
//!   iterations, so that a worker that hangs is detected ([`DataPlane::stalled_workers`]).
//! - Every dropped packet is counted under one [`DropReason`]. A datagram from outside never causes
//!   a panic or a log line of this crate (the WireGuard engine's boringtun logs some).
//! - Each datagram is classified by its first bytes (`towline_types::frame`): WireGuard messages
//!   are handled here. Probes are opened and, if they are pings, challenges or replays, answered
//!   here; their messages and STUN messages are passed on as [`Event`]s.
//!
//! # Files
//!
//! | file | owns |
//! |---|---|
//! | `worker` | a thread: what wakes it, and the order of its work |
//! | `batch_delay` | the delay after a batch of small packets |
//! | `spin` | whether a worker looks for more work before it sleeps |
//! | `tick_timer` | the timer that wakes a worker for its next tick |
//! | `lone` | whether a wake-up takes one packet or all |
//! | `pipeline` | the path of a batch in each direction |
//! | `seal_ahead` | threads that seal a worker's batches, and the order in which they are sent |
//! | `runs` | received messages that are opened together |
//! | `tunnel` | one tunnel: timers, keepalives, waiting packets |
//! | `inner_traffic` | when it is reported that inner packets travelled |
//! | `roaming` | when it is reported that a peer sends from elsewhere |
//! | `live_tunnels`, `newly_live` | which tunnels need ticks |
//! | `table` | lookup of a peer by address, key or receiver index |
//! | `arena` | the buffers of a batch |
//! | `split`, `coalesce`, `vnet`, `checksum`, `headers` | inner packets and super-packets |
//! | `tun`, `udp`, `memory` | the I/O traits and their implementations |
//! | `steering` | which queue of the TUN receives a packet |
//! | `switch` | which offloads of the kernel are in use |
//! | `probes` | keys of the pairs; which probes are delivered and which answered |
//! | `forwarding` | lookup of relayed channels |
//! | `events`, `drops`, `counters` | what is reported and counted |
//! | `internals` | the packet path without its thread, for fuzzing |

pub mod arena;
mod batch_delay;
pub mod checksum;
pub mod coalesce;
mod counters;
#[cfg(test)]
mod defects;
pub mod drops;
mod events;
mod forwarding;
pub mod headers;
mod inner_traffic;
#[doc(hidden)]
pub mod internals;
mod live_tunnels;
mod lone;
pub mod memory;
mod newly_live;
mod pipeline;
mod probes;
mod roaming;
mod runs;
mod seal_ahead;
mod spin;
pub mod split;
mod steering;
pub mod switch;
pub mod table;
#[cfg(test)]
mod testing;
mod tick_timer;
pub mod tun;
mod tunnel;
pub mod udp;
pub mod vnet;
mod worker;

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::Sender;
use tokio::sync::watch;
use towline_core::forwarding::ForwardingTable;
use towline_core::path::{ChannelId, Path};
use towline_core::peer_table::{PeerPath, PeerTable};
use towline_types::id::WireguardKey;
use towline_wireguard::Secrets;
use x25519_dalek::StaticSecret;

pub use drops::{DropReason, ForeignSource};
pub use events::{Event, Fault};
pub use probes::Probes;
pub use switch::{Feature, OffReason};
pub use towline_wireguard::{Aead, Engine, EngineChoice};
pub use tun::{
    HostTunnels, NoTun, OpenTunError, Tun, TunIo, open_tun, open_tun_queues, open_tun_with, own_tun,
};
pub use udp::{OpenUdpError, Ready, Udp, UdpIo, open_udp, open_udp_group, open_udp_with};

use drops::Drops;
use events::{EventSink, FaultState};
use forwarding::Forwarding;
use live_tunnels::LiveTunnels;
use pipeline::Pipeline;
use seal_ahead::SealAhead;
use switch::Switch;
use table::Table;
use worker::{Command, Inbox, Worker, WorkerShared, send_batch};

/// Index of a peer in the table of peers.
type Slot = u32;

/// Settings of a data plane that stay the same while it runs.
pub struct Config {
    /// The node's WireGuard key.
    pub private_key: StaticSecret,
    /// Keys and sessions of probes, which outlive this data plane. The daemon holds a clone and seals
    /// with it.
    pub probes: Probes,
    /// Index of the TUN link, from which no outer datagram may come. `None` if there is no link.
    pub link: Option<u32>,
    /// True if outer packets get the DSCP of the inner ones. Their ECN field follows RFC 6040 either
    /// way.
    pub copy_dscp: bool,
    /// WireGuard engine of all tunnels.
    pub engine: Engine,
    /// Longest time for which a worker that moves packets looks for more of them before it sleeps.
    /// Zero: it sleeps at once.
    pub spin: Duration,
    /// Number of threads for each worker that seal its large batches while it goes on. Without effect
    /// with an engine that seals one packet at a time. Should be 0 with several workers: they may share
    /// a session, whose packets would then be out of order by more than the replay window of some peers.
    pub seal_helpers: usize,
}

impl Config {
    /// Returns the settings of a data plane without a link: nothing is copied to outer packets, its workers do not
    /// spin, and have no helpers.
    pub fn new(private_key: StaticSecret, probes: Probes, engine: Engine) -> Self {
        Self {
            private_key,
            probes,
            link: None,
            copy_dscp: false,
            engine,
            spin: Duration::ZERO,
            seal_helpers: 0,
        }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").finish_non_exhaustive()
    }
}

/// Kernel offloads that may be used, each only if the kernel has it. All are enabled by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Offloads {
    /// The TUN passes several segments of a TCP stream as one packet, in both directions.
    pub tun_tcp: bool,
    /// The TUN passes several datagrams of a UDP flow as one packet, in both directions (Linux
    /// 6.2). Needs `tun_tcp`.
    pub tun_udp: bool,
    /// The TUN passes super-packets that are inside a UDP tunnel of the host, such as VXLAN or
    /// Geneve (Linux 6.17). Needs `tun_udp`.
    pub tun_tunnel: bool,
    /// One system call sends several datagrams for one peer (`UDP_SEGMENT`).
    pub udp_segment: bool,
    /// One receive buffer holds several datagrams of one peer (`UDP_GRO`).
    pub udp_gro: bool,
}

impl Offloads {
    /// The set without any offload.
    pub const NONE: Self = Self {
        tun_tcp: false,
        tun_udp: false,
        tun_tunnel: false,
        udp_segment: false,
        udp_gro: false,
    };
}

impl Default for Offloads {
    fn default() -> Self {
        Self { tun_tcp: true, tun_udp: true, tun_tunnel: true, udp_segment: true, udp_gro: true }
    }
}

/// Counters and state of the data plane at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// State of each peer, by public key.
    pub peers: BTreeMap<WireguardKey, PeerSnapshot>,
    /// Number of packets dropped since the start, by [`DropReason::name`]. Reasons that never
    /// occurred have the value 0.
    pub drops: BTreeMap<&'static str, u64>,
    /// Offloads in use, and for the others the reason why they are not.
    pub features: Vec<Feature>,
}

/// Traffic of one peer until one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of authentic UDP payload received from the peer.
    pub received_bytes: u64,
    /// Bytes of UDP payload sent to the peer.
    pub sent_bytes: u64,
}

/// Counters and state of one peer at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerSnapshot {
    /// Bytes of authentic UDP payload received from the peer.
    pub received_bytes: u64,
    /// Bytes of UDP payload sent to the peer.
    pub sent_bytes: u64,
    /// Time when the last handshake completed. `None` before the first.
    pub last_handshake: Option<Instant>,
    /// Path that datagrams to the peer take. `None` while no path is known.
    pub endpoint: Option<Path>,
}

/// Error of [`DataPlane::stop`]: some workers did not end in time. Their threads, descriptors and
/// queues of the link stay until the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot stop the data plane: {workers} of its workers still run after {timeout:?}: restart the agent"
)]
pub struct StuckWorkers {
    /// Number of workers that still run.
    pub workers: usize,
    /// Time that the call waited for them.
    pub timeout: Duration,
}

/// Longest time that a snapshot waits for a tunnel that a worker has locked. A batch takes less
/// than a millisecond.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_millis(100);
/// Longest time that [`DataPlane::stop`] waits. A worker may wait about a second for room in a
/// socket buffer.
const STOP_TIMEOUT: Duration = Duration::from_secs(4);

/// Handle of a running data plane. Dropping the last handle stops the workers without waiting for
/// them; [`DataPlane::stop`] waits.
#[derive(Debug, Clone)]
pub struct DataPlane(Arc<Running>);

#[derive(Debug)]
struct Running {
    /// Keys of the node, shared by all tunnels.
    secrets: Arc<Secrets>,
    /// Keys and sessions of probes.
    probes: Probes,
    /// Current peer table. Workers load it once per batch.
    table: Arc<ArcSwap<Table>>,
    /// Channels that this node relays. Workers load the table once per run of relayed datagrams.
    forwarding: Arc<ArcSwap<Forwarding>>,
    /// Lock that is held while the next table is built, so that updates are applied one after
    /// another.
    building: Mutex<()>,
    /// Drops of packets that waited in tunnels of peers that left the table. Written only under
    /// `building`.
    building_drops: Drops,
    /// Inbox of each worker. Commands go to the first.
    inboxes: Vec<Arc<Inbox>>,
    /// Drop counters of each worker.
    drops: Vec<Arc<Drops>>,
    /// Time of the start, from which the counters of handshakes count.
    started: Instant,
    /// Number of threads for each worker that seal its batches.
    seal_helpers: usize,
    /// Number of batches that these threads sealed.
    sealed_ahead: Arc<AtomicU64>,
    live: Arc<LiveTunnels>,
    /// Offloads in use. The workers share them.
    features: Vec<Switch>,
    /// First fault of any worker.
    faults: watch::Receiver<Option<Fault>>,
    /// Loop count of each worker at the last call of [`DataPlane::stalled_workers`].
    loops_seen: Mutex<Vec<Option<u64>>>,
    /// Threads of the workers, taken by [`DataPlane::stop`].
    threads: Mutex<Threads>,
}

/// Threads of the workers, and how to wait for them.
#[derive(Debug)]
struct Threads {
    handles: Vec<JoinHandle<()>>,
    /// Channel that disconnects when all threads have ended. Nothing is ever sent.
    ended: mpsc::Receiver<std::convert::Infallible>,
}

impl Running {
    /// Queues a command for the first worker.
    fn command(&self, command: Command) {
        if let Some(first) = self.inboxes.first() {
            first.push(command);
        }
    }

    fn stop(&self) {
        for inbox in &self.inboxes {
            inbox.stop();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

impl DataPlane {
    /// Starts the workers, with one thread for each of `shards`, and their helpers: queues of one link, each
    /// with sockets of one port. Without peers they drop every packet, so call [`DataPlane::apply`]
    /// next.
    ///
    /// `events` should have room for some hundred events, because a worker never waits for it. A
    /// fault is not an event, see [`DataPlane::faults`].
    ///
    /// # Errors
    ///
    /// Returns the system's error if it provides no thread or no descriptor.
    pub fn start<T: TunIo, U: UdpIo>(
        config: Config,
        shards: impl IntoIterator<Item = (T, U)>,
        events: Sender<Event>,
    ) -> io::Result<Self> {
        let started = Instant::now();
        let (fault_state, faults) = FaultState::new();
        let (alive, ended) = mpsc::channel();
        // The engine that opens in place is the one that leaves messages for `SendBatch::seal`.
        let seal_helpers = if config.engine.opens_in_place() { config.seal_helpers } else { 0 };
        let mut running = Running {
            secrets: Arc::new(Secrets::with_engine(config.private_key, config.engine)),
            probes: config.probes.clone(),
            table: Arc::new(ArcSwap::from_pointee(Table::default())),
            forwarding: Arc::new(ArcSwap::from_pointee(Forwarding::default())),
            building: Mutex::new(()),
            building_drops: Drops::default(),
            inboxes: Vec::new(),
            drops: Vec::new(),
            started,
            seal_helpers,
            sealed_ahead: Arc::default(),
            live: Arc::default(),
            features: Vec::new(),
            faults,
            loops_seen: Mutex::default(),
            threads: Mutex::new(Threads { handles: Vec::new(), ended }),
        };
        let shared = Arc::new(WorkerShared::new(started));
        let mut workers = Vec::new();
        for (tun, udp) in shards {
            let (inbox, drops) = (Arc::new(Inbox::new()?), Arc::new(Drops::default()));
            if workers.is_empty() {
                // All workers share the offloads of the first.
                running.features.extend(tun.features());
                running.features.extend(udp.features());
            }
            let mut pipeline = Pipeline::new(
                running.secrets.clone(),
                config.probes.clone(),
                running.table.clone(),
                drops.clone(),
                EventSink::new(events.clone(), drops.clone()),
                running.live.clone(),
                running.forwarding.clone(),
                config.link,
                started,
            );
            pipeline.set_copy_dscp(config.copy_dscp);
            let sealed = &running.sealed_ahead;
            let udp = SealAhead::start(udp, seal_helpers, send_batch, &fault_state, sealed)?;
            let mut worker = Worker::new(
                tun,
                udp,
                pipeline,
                shared.clone(),
                inbox.clone(),
                drops.clone(),
                fault_state.clone(),
            )?;
            worker.set_spin(config.spin);
            workers.push(worker);
            running.inboxes.push(inbox);
            running.drops.push(drops);
        }
        for worker in workers {
            // If a thread cannot be started, dropping `running` stops those already started.
            let thread = std::thread::Builder::new().name("dataplane".to_owned());
            let alive = alive.clone();
            let thread = thread.spawn(move || {
                worker.run();
                drop(alive);
            })?;
            running.threads.get_mut().handles.push(thread);
        }
        Ok(Self(Arc::new(running)))
    }

    /// Returns the node's own public key.
    pub fn public_key(&self) -> WireguardKey {
        self.0.secrets.public_key()
    }

    /// Returns the WireGuard engine of all tunnels.
    pub fn engine(&self) -> Engine {
        self.0.secrets.engine()
    }

    /// Returns the number of threads for each worker that seal its large batches. 0 if the workers seal
    /// all batches themselves.
    pub fn seal_helpers(&self) -> usize {
        self.0.seal_helpers
    }

    /// Returns the number of batches that these threads sealed since the start.
    pub fn sealed_ahead(&self) -> u64 {
        self.0.sealed_ahead.load(Ordering::Relaxed)
    }

    /// Replaces the peer table. Peers that stay in it keep their sessions.
    pub fn apply(&self, table: &PeerTable) {
        let _building = self.0.building.lock();
        self.0.probes.apply(table);
        let before = self.0.table.load_full();
        self.0.live.make_room(table.peers.len());
        self.0.table.store(Arc::new(before.next(Instant::now(), table, &self.0.secrets)));
        for peer in before.peers().filter(|peer| !table.peers.contains_key(&peer.key)) {
            let lost = peer.tunnel.lock().close();
            self.0.building_drops.add(DropReason::QueueExpired, lost as u64);
        }
        self.0.inboxes.iter().for_each(|inbox| inbox.wake());
    }

    /// Replaces the path of one peer. All else of the peer table stays, and is not built again. Does nothing
    /// if the peer is not in the table.
    pub fn apply_path(&self, peer: &WireguardKey, path: PeerPath) {
        let _building = self.0.building.lock();
        if let Some(next) = self.0.table.load().with_path(peer, path) {
            self.0.table.store(Arc::new(next));
            self.0.inboxes.iter().for_each(|inbox| inbox.wake());
        }
    }

    /// Replaces the forwarding table. Until the first one, this node relays nothing.
    pub fn apply_forwarding(&self, table: &ForwardingTable) {
        let _building = self.0.building.lock();
        let next = self.0.forwarding.load().next(table);
        self.0.forwarding.store(Arc::new(next));
    }

    /// Returns the relayed channels on which something was forwarded since the last call.
    pub fn take_used_channels(&self) -> Vec<ChannelId> {
        self.0.forwarding.load().take_used()
    }

    /// Returns the number of bytes forwarded between other nodes since the start.
    pub fn forwarded_bytes(&self) -> u64 {
        self.0.forwarding.load().bytes()
    }

    /// Starts a handshake: sends one initiation, with the same bytes, on each path of `to`. It is
    /// repeated about every five seconds for 90 s on the same paths, until it is answered or
    /// another command replaces it. Does nothing if the peer is not in the table.
    pub fn handshake(&self, peer: WireguardKey, to: Vec<Path>) {
        self.0.command(Command::Handshake(peer, to));
    }

    /// Sends a datagram unencrypted from the WireGuard port.
    pub fn send(&self, to: Path, datagram: &[u8]) {
        self.0.command(Command::Send(to, datagram.to_vec()));
    }

    /// Sends a datagram like [`DataPlane::send`], but with fragmentation forbidden, to find out
    /// whether the path to `peer` takes its size. If the kernel already knows that it is too big,
    /// [`Observation::TooBig`] is reported.
    ///
    /// [`Observation::TooBig`]: towline_core::peer_table::Observation::TooBig
    pub fn send_whole(&self, peer: WireguardKey, to: Path, datagram: &[u8]) {
        self.0.command(Command::SendWhole(peer, to, datagram.to_vec()));
    }

    /// Sends a datagram like [`DataPlane::send`], but with a hop limit (TTL) of `hops`: at most `hops - 1`
    /// routers forward it.
    pub fn send_limited(&self, to: Path, datagram: &[u8], hops: u8) {
        self.0.command(Command::SendLimited(to, datagram.to_vec(), hops));
    }

    /// Sends datagrams of one length together, with one system call where the kernel can.
    pub fn send_train(&self, to: Path, datagrams: Vec<Vec<u8>>) {
        self.0.command(Command::Train(to, datagrams));
    }

    /// Opens a second UDP port that the kernel chooses, in place of the last one, and returns its
    /// number. Datagrams whose path names it leave from there.
    ///
    /// # Errors
    ///
    /// Returns [`OpenUdpError`], one line for the operator.
    pub fn open_second_port(&self, mark: u32) -> Result<u16, OpenUdpError> {
        let switch = |name| {
            let of_name = self.0.features.iter().find(|switch| switch.status().name == name);
            of_name.cloned().unwrap_or_else(|| Switch::new(name, Err(OffReason::Configured)))
        };
        let switches = ["udp_segment", "udp_gro"].map(switch);
        let sockets = udp::open_second_port(mark, switches, self.0.inboxes.len())?;
        let port = sockets.first().map_or(0, Udp::port);
        for (inbox, sockets) in self.0.inboxes.iter().zip(sockets) {
            inbox.push(Command::SecondPort(Some(Box::new(sockets))));
        }
        Ok(port)
    }

    /// Closes the second UDP port.
    pub fn close_second_port(&self) {
        self.0.inboxes.iter().for_each(|inbox| inbox.push(Command::SecondPort(None)));
    }

    /// Returns a receiver of the first fault of any worker. After a fault the data plane must be
    /// started again. The fault stays readable, so a receiver that is read late finds it too.
    pub fn faults(&self) -> watch::Receiver<Option<Fault>> {
        self.0.faults.clone()
    }

    /// Returns the number of workers whose loop did not run since the last call. Meant to be called
    /// every few seconds. Wakes each worker, so that the loop of an idle one runs before the next
    /// call.
    pub fn stalled_workers(&self) -> usize {
        let mut seen = self.0.loops_seen.lock();
        seen.resize(self.0.inboxes.len(), None);
        let mut stalled = 0;
        for (seen, inbox) in seen.iter_mut().zip(&self.0.inboxes) {
            let loops = Some(inbox.loops());
            stalled += usize::from(*seen == loops);
            *seen = loops;
            inbox.wake();
        }
        stalled
    }

    /// Returns the current counters and state.
    pub fn snapshot(&self) -> Snapshot {
        let table = self.0.table.load();
        let peers = table.peers().map(|peer| {
            let (sent_bytes, received_bytes) = peer.counters.bytes();
            let snapshot = PeerSnapshot {
                received_bytes,
                sent_bytes,
                last_handshake: peer.counters.last_handshake(self.0.started),
                // A worker that hangs may hold the lock. That must not block this call.
                endpoint: match peer.tunnel.try_lock_for(SNAPSHOT_TIMEOUT) {
                    Some(mut tunnel) => tunnel.endpoint(peer.endpoint()),
                    None => peer.endpoint(),
                },
            };
            (peer.key, snapshot)
        });
        let refused: u64 = self.0.inboxes.iter().map(|inbox| inbox.refused()).sum();
        let drops = DropReason::ALL.iter().map(|reason| {
            let workers: u64 = self.0.drops.iter().map(|drops| drops.get(*reason)).sum();
            let orders = if *reason == DropReason::OrdersFull { refused } else { 0 };
            (reason.name(), workers + self.0.building_drops.get(*reason) + orders)
        });
        Snapshot {
            peers: peers.collect(),
            drops: drops.collect(),
            features: self.0.features.iter().map(Switch::status).collect(),
        }
    }

    /// Returns the traffic of each peer so far. Waits for no worker.
    pub fn traffic(&self) -> BTreeMap<WireguardKey, Traffic> {
        let table = self.0.table.load();
        let traffic = table.peers().map(|peer| {
            let (sent_bytes, received_bytes) = peer.counters.bytes();
            (peer.key, Traffic { received_bytes, sent_bytes })
        });
        traffic.collect()
    }

    /// Returns the last packet from the TUN that was dropped because of its source.
    pub fn foreign_source(&self) -> Option<ForeignSource> {
        let workers = self.0.drops.iter().filter_map(|drops| drops.last_foreign_source());
        workers.max_by_key(|last| last.at)
    }

    /// Stops the workers and waits a few seconds for their threads to end. The TUN link stays if it
    /// is persistent.
    ///
    /// # Errors
    ///
    /// Returns [`StuckWorkers`] if a worker hangs. Its thread stays until the process ends.
    pub fn stop(&self) -> Result<(), StuckWorkers> {
        self.stop_within(STOP_TIMEOUT)
    }

    /// Stops the workers like [`DataPlane::stop`], but waits at most `timeout`.
    ///
    /// # Errors
    ///
    /// Returns [`StuckWorkers`] if a worker hangs. Its thread stays until the process ends.
    pub fn stop_within(&self, timeout: Duration) -> Result<(), StuckWorkers> {
        self.0.stop();
        let mut threads = self.0.threads.lock();
        let ended = match threads.ended.recv_timeout(timeout) {
            Err(mpsc::RecvTimeoutError::Disconnected) => true,
            Err(mpsc::RecvTimeoutError::Timeout) => false,
            Ok(never) => match never {},
        };
        let (done, stuck): (Vec<_>, Vec<_>) =
            threads.handles.drain(..).partition(|thread| ended || thread.is_finished());
        for thread in done {
            if thread.join().is_err() {
                tracing::error!("data plane worker panicked");
            }
        }
        if stuck.is_empty() {
            return Ok(());
        }
        let workers = stuck.len();
        threads.handles = stuck;
        Err(StuckWorkers { workers, timeout })
    }
}

/// Returns a random number for values that must differ between nodes but need not be secret.
fn random() -> u64 {
    // Each `RandomState` has its own keys, which the system's randomness seeds.
    RandomState::new().hash_one(())
}
