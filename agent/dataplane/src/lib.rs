//! The data plane: packets without decisions.
//!
//! TUN on one side, UDP on the other, WireGuard between. It obeys the core's [`PeerTable`] and
//! reports what it saw as [`Event`]s; it never decides whom to talk to, or where.
//!
//! # Contract
//!
//! - [`DataPlane::start`] runs a thread for each pair of a TUN queue and a socket. The handle is
//!   cheap to clone and never waits.
//! - [`DataPlane::apply`] takes effect whole: a packet sees one table from lookup to send. Peers
//!   that stay keep their sessions, also when their pre-shared key or boot epoch changes.
//! - Batches, never packets, cross the two seams ([`TunIo`], [`UdpIo`]). The order within a flow
//!   is kept.
//! - A fault is a state ([`DataPlane::faults`]), which nobody can miss, and every worker counts its
//!   loops, so that one that hangs is noticed ([`DataPlane::stalled_workers`]).
//! - Every packet that goes no further is counted under one [`DropReason`]. A datagram from
//!   outside never panics and never logs; boringtun does log handshakes at `debug` and timers up
//!   to `error`, so a subscriber should turn the target `boringtun` off.
//! - Datagrams are told apart one by one (`towline_types::frame`): WireGuard is handled here,
//!   probes and STUN are handed on as [`Event`]s.
//!
//! # Files
//!
//! | file | owns |
//! |---|---|
//! | `worker` | a thread: what wakes it, in which order it works |
//! | `rest` | pauses between batches of small packets |
//! | `engine` | what happens to a batch in each direction |
//! | `peer` | one tunnel over time |
//! | `session` | the protocol engine; the only file that names boringtun |
//! | `table` | address, key and index to peer |
//! | `arena` | the buffers of a batch |
//! | `split`, `coalesce`, `vnet`, `checksum`, `packet` | inner packets, and the kernel's super-packets |
//! | `tun`, `udp`, `memory` | the seams |
//! | `steering` | which queue of the TUN a packet comes by |
//! | `switch` | what of the kernel is in use |
//! | `relay` | channels between other nodes, forwarded as they come |
//! | `events`, `drops`, `counters` | what is told and counted |
//! | `internals` | the packet path without its thread, for fuzzing |

pub mod arena;
pub mod checksum;
pub mod coalesce;
mod counters;
#[cfg(test)]
mod defects;
pub mod drops;
mod engine;
mod events;
#[doc(hidden)]
pub mod internals;
pub mod memory;
pub mod packet;
mod peer;
pub mod relay;
mod rest;
pub mod session;
pub mod split;
mod steering;
pub mod switch;
pub mod table;
#[cfg(test)]
mod testing;
pub mod tun;
pub mod udp;
pub mod vnet;
mod worker;

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::Sender;
use tokio::sync::watch;
use towline_core::path::Path;
use towline_core::peer_table::PeerTable;
use towline_types::id::WireguardKey;
use x25519_dalek::StaticSecret;

pub use drops::DropReason;
pub use events::{Event, Fault};
pub use relay::Relay;
pub use switch::Feature;
pub use tun::{
    HostTunnels, NoTun, OpenTunError, Tun, TunIo, open_tun, open_tun_queues, open_tun_with, own_tun,
};
pub use udp::{OpenUdpError, Ready, Udp, UdpIo, open_udp, open_udp_group, open_udp_with};

use drops::Drops;
use engine::Engine;
use events::{EventSink, FaultState};
use session::Secrets;
use switch::Switch;
use table::Table;
use worker::{Command, Inbox, Pace, Worker};

/// What the data plane is told once.
pub struct Config {
    /// The node's WireGuard key.
    pub private_key: StaticSecret,
    /// Whether we forward for other nodes, and within which limits: the daemon holds a clone.
    pub relay: Relay,
    /// Index of the TUN link, from which no outer datagram can come; `None`: there is none.
    pub link: Option<u32>,
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").finish_non_exhaustive()
    }
}

/// Which of the kernel's offloads may be used, each where the kernel has it. By default all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Offloads {
    /// The TUN hands over, and takes, many segments of a TCP stream as one packet.
    pub tun_tcp: bool,
    /// Likewise many datagrams of a UDP flow (Linux 6.2). Needs `tun_tcp`.
    pub tun_udp: bool,
    /// The TUN hands over super-packets that are inside a UDP tunnel of the host, such as VXLAN
    /// or Geneve (Linux 6.17). Needs `tun_udp`.
    pub tun_tunnel: bool,
    /// Many datagrams for one peer are sent at once (`UDP_SEGMENT`).
    pub udp_segment: bool,
    /// Many datagrams of one peer are received at once (`UDP_GRO`).
    pub udp_gro: bool,
}

impl Offloads {
    /// None of them.
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

/// How it stands at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// By public key.
    pub peers: BTreeMap<WireguardKey, PeerSnapshot>,
    /// What was dropped since the start, by [`DropReason::name`]; reasons that never occurred are
    /// there with 0.
    pub drops: BTreeMap<&'static str, u64>,
    /// What speeds it up, and if not, why not.
    pub features: Vec<Feature>,
}

/// State of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerSnapshot {
    /// Bytes of UDP payload received from it, authentic ones only.
    pub received_bytes: u64,
    /// Bytes of UDP payload sent to it.
    pub sent_bytes: u64,
    /// When the last handshake was completed.
    pub last_handshake: Option<Instant>,
    /// Where its datagrams go.
    pub endpoint: Option<Path>,
}

/// Workers that did not end when they were told to. Their threads, descriptors and the link's queues
/// stay until the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{workers} of the data plane's workers did not stop within {patience:?}")]
pub struct StuckWorkers {
    /// Number of workers.
    pub workers: usize,
    /// How long they were waited for.
    pub patience: Duration,
}

/// How long a snapshot waits for a tunnel that a worker is busy with. A batch takes less than a
/// millisecond.
const SNAPSHOT_PATIENCE: Duration = Duration::from_millis(100);
/// How long [`DataPlane::stop`] waits. A worker may wait about a second for room in a socket.
const STOP_PATIENCE: Duration = Duration::from_secs(4);

/// A running data plane. The last handle to go stops it without waiting; [`DataPlane::stop`]
/// waits.
#[derive(Debug, Clone)]
pub struct DataPlane(Arc<Running>);

#[derive(Debug)]
struct Running {
    secrets: Arc<Secrets>,
    table: Arc<ArcSwap<Table>>,
    /// One at a time builds the next table.
    building: Mutex<()>,
    /// What was lost with peers that left the table. Written under `building` alone.
    building_drops: Drops,
    /// Of each worker. Orders go to the first.
    inboxes: Vec<Arc<Inbox>>,
    /// Of each worker.
    drops: Vec<Arc<Drops>>,
    started: Instant,
    features: Vec<Switch>,
    /// The first fault of any worker.
    faults: watch::Receiver<Option<Fault>>,
    /// Loops of each worker at the last call of [`DataPlane::stalled_workers`].
    loops_seen: Mutex<Vec<Option<u64>>>,
    threads: Mutex<Threads>,
}

/// The workers' threads.
#[derive(Debug)]
struct Threads {
    handles: Vec<JoinHandle<()>>,
    /// Disconnected once all of them have ended. Nothing is ever sent.
    ended: mpsc::Receiver<std::convert::Infallible>,
}

impl Running {
    fn order(&self, command: Command) {
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
    /// Starts moving packets, with a thread for each of `shards`: queues of one link, with sockets
    /// of one port. Without peers it drops everything, so [`DataPlane::apply`] is next.
    ///
    /// `events` should hold some hundred: it is never waited for. A fault is not among them, see
    /// [`DataPlane::faults`].
    ///
    /// # Errors
    ///
    /// When the system gives no thread or no descriptors.
    pub fn start<T: TunIo, U: UdpIo>(
        config: Config,
        shards: impl IntoIterator<Item = (T, U)>,
        events: Sender<Event>,
    ) -> io::Result<Self> {
        let started = Instant::now();
        let (fault_state, faults) = FaultState::new();
        let (alive, ended) = mpsc::channel();
        let mut running = Running {
            secrets: Arc::new(Secrets::new(config.private_key)),
            table: Arc::new(ArcSwap::from_pointee(Table::default())),
            building: Mutex::new(()),
            building_drops: Drops::default(),
            inboxes: Vec::new(),
            drops: Vec::new(),
            started,
            features: Vec::new(),
            faults,
            loops_seen: Mutex::default(),
            threads: Mutex::new(Threads { handles: Vec::new(), ended }),
        };
        let pace = Arc::new(Pace::new(started));
        let mut workers = Vec::new();
        for (tun, udp) in shards {
            let (inbox, drops) = (Arc::new(Inbox::new()?), Arc::new(Drops::default()));
            if workers.is_empty() {
                // The others share them.
                running.features.extend(tun.features());
                running.features.extend(udp.features());
            }
            let engine = Engine::new(
                running.secrets.clone(),
                running.table.clone(),
                drops.clone(),
                EventSink::new(events.clone(), drops.clone()),
                config.relay.clone(),
                config.link,
                started,
            );
            workers.push(Worker::new(
                tun,
                udp,
                engine,
                pace.clone(),
                inbox.clone(),
                drops.clone(),
                fault_state.clone(),
            )?);
            running.inboxes.push(inbox);
            running.drops.push(drops);
        }
        for worker in workers {
            // One that cannot be started ends those before it: `running` is dropped.
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

    /// The node's own public key.
    pub fn public_key(&self) -> WireguardKey {
        self.0.secrets.public_key()
    }

    /// The peers are now these. Those that stay keep their sessions.
    pub fn apply(&self, table: &PeerTable) {
        let _building = self.0.building.lock();
        let before = self.0.table.load_full();
        self.0.table.store(Arc::new(before.next(table, &self.0.secrets)));
        for peer in before.peers.iter().filter(|peer| !table.peers.contains_key(&peer.key)) {
            let lost = peer.tunnel.lock().close();
            self.0.building_drops.add(DropReason::QueueExpired, lost as u64);
        }
        self.0.inboxes.iter().for_each(|inbox| inbox.wake());
    }

    /// Starts a handshake: one initiation, the same bytes to each address. It is repeated every
    /// five seconds (and a little) for 90 s, to the same addresses, unless it is answered or
    /// another order comes. Nothing happens for a peer that is not in the table.
    pub fn handshake(&self, peer: WireguardKey, to: Vec<Path>) {
        self.0.order(Command::Handshake(peer, to));
    }

    /// Sends a datagram as it is, from the WireGuard port.
    pub fn send(&self, to: Path, datagram: &[u8]) {
        self.0.order(Command::Send(to, datagram.to_vec()));
    }

    /// As [`DataPlane::send`], but nobody may fragment it on the way to `peer`. If already the
    /// kernel knows that it is too big, that is observed ([`Observation::TooBig`]).
    ///
    /// [`Observation::TooBig`]: towline_core::peer_table::Observation::TooBig
    pub fn send_whole(&self, peer: WireguardKey, to: Path, datagram: &[u8]) {
        self.0.order(Command::SendWhole(peer, to, datagram.to_vec()));
    }

    /// Shows the first fault of any worker, after which the data plane has to be started again. It
    /// stays, so a receiver that looks late finds it too.
    pub fn faults(&self) -> watch::Receiver<Option<Fault>> {
        self.0.faults.clone()
    }

    /// Number of workers that did not go through their loop since the last call, if that is some
    /// seconds ago. Wakes each of them, so that an idle one will have done so by the next call.
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

    /// How it stands now.
    pub fn snapshot(&self) -> Snapshot {
        let table = self.0.table.load();
        let peers = table.peers.iter().map(|peer| {
            let (sent_bytes, received_bytes) = peer.counters.bytes();
            let snapshot = PeerSnapshot {
                received_bytes,
                sent_bytes,
                last_handshake: peer.counters.last_handshake(self.0.started),
                // A worker that hangs may hold it; that must not hang who looks at it.
                endpoint: match peer.tunnel.try_lock_for(SNAPSHOT_PATIENCE) {
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
            features: self.0.features.iter().map(Switch::look).collect(),
        }
    }

    /// Ends it, and waits a few seconds until its threads are gone. The TUN link stays if it is
    /// persistent.
    ///
    /// # Errors
    ///
    /// When a worker hangs: only the end of the process ends it.
    pub fn stop(&self) -> Result<(), StuckWorkers> {
        self.stop_within(STOP_PATIENCE)
    }

    /// As [`DataPlane::stop`], but waits at most `patience`.
    ///
    /// # Errors
    ///
    /// When a worker hangs: only the end of the process ends it.
    pub fn stop_within(&self, patience: Duration) -> Result<(), StuckWorkers> {
        self.0.stop();
        let mut threads = self.0.threads.lock();
        let ended = match threads.ended.recv_timeout(patience) {
            Err(mpsc::RecvTimeoutError::Disconnected) => true,
            Err(mpsc::RecvTimeoutError::Timeout) => false,
            Ok(never) => match never {},
        };
        let (done, stuck): (Vec<_>, Vec<_>) =
            threads.handles.drain(..).partition(|thread| ended || thread.is_finished());
        for thread in done {
            if thread.join().is_err() {
                tracing::error!("a thread of the data plane panicked");
            }
        }
        if stuck.is_empty() {
            return Ok(());
        }
        let workers = stuck.len();
        threads.handles = stuck;
        Err(StuckWorkers { workers, patience })
    }
}

/// A random number, for what has to differ from node to node and need not be secret.
fn random() -> u64 {
    // Each state has keys of its own, which come from the system's randomness.
    RandomState::new().hash_one(())
}
