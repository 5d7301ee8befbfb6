//! The packet path of one worker without its thread, for fuzzing and benchmarks. Not part of the
//! public API.

use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::mpsc::{Receiver, channel};
use towline_core::forwarding::ForwardingTable;
use towline_core::path::Path;
use towline_core::peer_table::PeerTable;
use towline_types::id::WireguardKey;
use x25519_dalek::StaticSecret;

use super::arena::{GsoBatch, RecvBatch, SendBatch, TunBatch, WriteBatch};
use super::coalesce::Coalesce;
use super::drops::{DropReason, Drops};
use super::events::{Event, EventSink};
use super::pipeline::Pipeline;
use super::probes::Probes;
use super::table::Table;
use super::udp::UdpIo;
use towline_wireguard::{Engine, Secrets};

pub use super::forwarding::{Forward, Forwarding};

/// Largest number of events that are kept until they are drained.
const EVENTS: usize = 4096;

/// Packet path of one worker, with its table, counters and events.
#[derive(Debug)]
pub struct PacketPath {
    secrets: Arc<Secrets>,
    probes: Probes,
    table: Arc<ArcSwap<Table>>,
    forwarding: Arc<ArcSwap<Forwarding>>,
    drops: Arc<Drops>,
    events: Receiver<Event>,
    pipeline: Pipeline,
}

impl PacketPath {
    /// Creates a packet path without peers, with this WireGuard engine.
    pub fn new(private_key: StaticSecret, engine: Engine, link: Option<u32>, now: Instant) -> Self {
        let probes = Probes::new(private_key.clone(), 1);
        let secrets = Arc::new(Secrets::with_engine(private_key, engine));
        let table = Arc::new(ArcSwap::from_pointee(Table::default()));
        let forwarding = Arc::new(ArcSwap::from_pointee(Forwarding::default()));
        let drops = Arc::new(Drops::default());
        let (sender, events) = channel(EVENTS);
        let sink = EventSink::new(sender, drops.clone());
        let pipeline = Pipeline::new(
            secrets.clone(),
            probes.clone(),
            table.clone(),
            drops.clone(),
            sink,
            Arc::default(),
            forwarding.clone(),
            link,
            now,
        );
        Self { secrets, probes, table, forwarding, drops, events, pipeline }
    }

    /// Returns the node's own public key.
    pub fn public_key(&self) -> WireguardKey {
        self.secrets.public_key()
    }

    /// Replaces the peer table.
    pub fn apply(&self, now: Instant, table: &PeerTable) {
        self.probes.apply(table);
        self.table.store(Arc::new(self.table.load().next(now, table, &self.secrets)));
    }

    /// Replaces the forwarding table.
    pub fn apply_forwarding(&self, table: &ForwardingTable) {
        self.forwarding.store(Arc::new(self.forwarding.load().next(table)));
    }

    /// Sets the MTU in bytes. No inner packet is padded beyond it.
    pub fn set_mtu(&mut self, mtu: usize) {
        self.pipeline.set_mtu(mtu);
    }

    /// Handles a batch from the network as a worker does. An engine that opens in place exchanges
    /// the bytes of `batch` with those of `writes`.
    pub fn inbound(
        &mut self,
        now: Instant,
        allowed: Coalesce,
        batch: &mut RecvBatch,
        writes: &mut WriteBatch,
        out: &mut SendBatch,
    ) {
        self.pipeline.inbound(now, allowed, batch, writes, out);
    }

    /// Returns the GSO batches of the last batch that must be forwarded to other nodes.
    pub fn forwards(&self) -> &[GsoBatch] {
        self.pipeline.forwards()
    }

    /// Handles a batch from the TUN as a worker does.
    pub fn outbound<U: UdpIo>(
        &mut self,
        now: Instant,
        batch: &mut TunBatch,
        out: &mut SendBatch,
        udp: &mut U,
    ) {
        self.pipeline.outbound(now, batch, out, udp);
    }

    /// Starts a handshake with a peer.
    pub fn initiate(
        &mut self,
        now: Instant,
        peer: &WireguardKey,
        to: Vec<Path>,
        out: &mut SendBatch,
    ) {
        self.pipeline.initiate(now, peer, to, out);
    }

    /// Returns the number of packets dropped for this reason.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops.get(reason)
    }

    /// Returns the number of packets dropped for any reason.
    pub fn all_drops(&self) -> u64 {
        DropReason::ALL.iter().map(|reason| self.drops.get(*reason)).sum()
    }

    /// Returns the number of packets that wait for a session.
    pub fn waiting(&self) -> usize {
        self.table.load().peers().map(|peer| peer.tunnel.lock().waiting()).sum()
    }

    /// Returns the next event, if there is one.
    pub fn event(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }
}
