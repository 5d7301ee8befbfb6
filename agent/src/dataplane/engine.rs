//! What happens to each batch: outbound from TUN to network, inbound from network to TUN, and the
//! timers. No I/O here beyond handing full batches to the socket.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use towline_core::path::{ChannelId, Path};
use towline_proto::frame::{DatagramKind, RELAYED_HEADER_BYTES, relayed};
use towline_proto::id::WireguardKey;
use towline_proto::source_limiter::SourceLimiter;
use towline_proto::stun;

use super::arena::{Received, RecvBatch, SendBatch, Train, TunBatch, WriteBatch};
use super::coalesce::{Coalesce, Coalescer};
use super::drops::{DropReason, Drops};
use super::events::{Event, EventSink};
use super::packet::Inner;
use super::peer::Act;
use super::relay::{Forward, Relay};
use super::session::{Admission, DATA_HEADER, HANDSHAKE_BYTES, MessageKind, Secrets, Segments};
use super::split::Split;
use super::table::{Peer, Slot, Table};
use super::udp::UdpIo;

/// Handshakes per second and source address, and how many at once: many nodes may share one.
const HANDSHAKES: (u32, u32) = (64, 128);
/// Probes and STUN answers, likewise.
const PROBES: (u32, u32) = (256, 512);
/// STUN requests, likewise: a few from each node behind a NAT, and again when its address changes.
const REFLECTIONS: (u32, u32) = (32, 128);

/// One worker's packet path.
#[derive(Debug)]
pub(super) struct Engine {
    secrets: Arc<Secrets>,
    table: Arc<ArcSwap<Table>>,
    drops: Arc<Drops>,
    events: EventSink,
    started: Instant,
    handshakes: SourceLimiter,
    /// Of those beyond that which proved their address.
    proven_handshakes: SourceLimiter,
    probes: SourceLimiter,
    reflections: SourceLimiter,
    relay: Relay,
    /// Trains in the receive buffer that go on to another node.
    forwards: Vec<Train>,
    /// Our own link, from which no outer datagram can come.
    link: Option<u32>,
    /// Of the link: no segment is padded beyond it.
    mtu: usize,
    coalescer: Coalescer,
    /// Places of the packets of one train, kept for its capacity.
    opened: Vec<(usize, usize)>,
    joined: Joined,
}

/// Data messages of one batch that the kernel had joined.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Joined {
    pub(super) datagrams: usize,
    /// Of those, not authentic.
    pub(super) damaged: usize,
}

impl Engine {
    pub(super) fn new(
        secrets: Arc<Secrets>,
        table: Arc<ArcSwap<Table>>,
        drops: Arc<Drops>,
        events: EventSink,
        relay: Relay,
        link: Option<u32>,
        started: Instant,
    ) -> Self {
        Self {
            secrets,
            table,
            drops,
            events,
            started,
            handshakes: SourceLimiter::new(HANDSHAKES.0, HANDSHAKES.1, started),
            proven_handshakes: SourceLimiter::new(HANDSHAKES.0, HANDSHAKES.1, started),
            probes: SourceLimiter::new(PROBES.0, PROBES.1, started),
            reflections: SourceLimiter::new(REFLECTIONS.0, REFLECTIONS.1, started),
            relay,
            forwards: Vec::with_capacity(
                super::worker::RECEIVE_SLOTS * super::arena::TRAIN_SEGMENTS,
            ),
            link,
            mtu: usize::MAX,
            coalescer: Coalescer::default(),
            opened: Vec::with_capacity(super::arena::SLOT_BYTES / 32),
            joined: Joined::default(),
        }
    }

    pub(super) fn set_mtu(&mut self, mtu: usize) {
        self.mtu = mtu;
    }

    pub(super) fn events(&mut self) -> &mut EventSink {
        &mut self.events
    }

    /// Seals what came from the TUN. `out` is sent whenever it is full, and at the end.
    pub(super) fn outbound<U: UdpIo>(
        &mut self,
        now: Instant,
        batch: &mut TunBatch,
        out: &mut SendBatch,
        udp: &mut U,
    ) {
        let table = self.table.load();
        let mut last = None;
        for number in 0..batch.packets().len() {
            let packet = batch.packets()[number];
            let bytes = batch.packet_mut(&packet);
            let inner = Inner::parse(&bytes[super::arena::HEADROOM..]);
            let Some(inner) = inner.filter(|inner| inner.total_len == packet.len) else {
                self.drops.count(DropReason::InnerMalformed);
                continue;
            };
            let Some(peer) = route(&table, &mut last, inner.destination) else {
                self.drops.count(DropReason::NoRoute);
                continue;
            };
            match Split::new(bytes, packet.len, &packet.header, self.mtu) {
                Ok(segments) => self.seal(now, peer, segments, out, udp),
                Err(reason) => self.drops.count(reason),
            }
        }
        if !out.is_empty() {
            udp.send(now, out, &self.drops);
            out.clear();
        }
    }

    fn seal<U: UdpIo>(
        &mut self,
        now: Instant,
        peer: &Peer,
        mut segments: impl Segments,
        out: &mut SendBatch,
        udp: &mut U,
    ) {
        let mut tunnel = peer.tunnel.lock();
        if !tunnel.is_ready() {
            let mut act = self.act(now, peer, out);
            while segments.next_len().is_some() {
                tunnel.wait(segments.take(), &mut act);
            }
            return;
        }
        let Some(to) = tunnel.endpoint(peer.endpoint()) else {
            while segments.next_len().is_some() {
                segments.take();
                self.drops.count(DropReason::NoEndpoint);
            }
            return;
        };
        if let Some(what) = tunnel.sent_inner(now) {
            self.events.observe(peer.key, what);
        }
        out.fragment(peer.entry.fragment);
        loop {
            peer.counters.sent(tunnel.seal(&mut segments, to, out, now));
            if segments.next_len().is_none() {
                break;
            }
            udp.send(now, out, &self.drops);
            out.clear();
        }
        out.fragment(false);
    }

    /// Opens what came from the network into `writes`, joined as far as `allowed`, and puts what
    /// is to be answered into `out`.
    pub(super) fn inbound(
        &mut self,
        now: Instant,
        allowed: Coalesce,
        batch: &RecvBatch,
        writes: &mut WriteBatch,
        out: &mut SendBatch,
    ) {
        let table = self.table.load();
        self.coalescer.allow(allowed);
        self.forwards.clear();
        self.joined = Joined::default();
        for received in batch.received() {
            if self.link.is_some() && received.from.local.map(|local| local.interface) == self.link
            {
                let datagrams = received.len.div_ceil(received.stride.max(1)).max(1);
                self.drops.add(DropReason::TunnelInTunnel, datagrams as u64);
                continue;
            }
            let end = received.start + received.len;
            let mut at = received.start;
            while at < end {
                let first = &batch.bytes()[at..end.min(at + received.stride)];
                at += match relayed(first) {
                    Some((channel, _)) => {
                        let train = &batch.bytes()[at..end];
                        let run = channel_run(train, received.stride);
                        match self.forward(now, received, channel, at, run) {
                            Some(run) => run,
                            None => {
                                let from = received.from.on_channel(ChannelId(channel));
                                let run = (at, &train[..run], received.stride);
                                self.datagrams(now, &table, from, run, writes, out)
                            }
                        }
                    }
                    None => {
                        let run = (at, &batch.bytes()[at..end], received.stride);
                        self.datagrams(now, &table, received.from, run, writes, out)
                    }
                };
            }
            // Only a datagram of no bytes has none to look at.
            if received.len == 0 {
                self.drops.count(DropReason::UnknownKind);
            }
        }
        self.coalescer.finish(writes);
    }

    /// What of the batch goes on to other nodes: parts of its bytes.
    pub(super) fn forwards(&self) -> &[Train] {
        &self.forwards
    }

    /// What of the batch the kernel had joined, and how that turned out.
    pub(super) fn joined(&self) -> Joined {
        self.joined
    }

    /// Sends a run of datagrams on, if we relay its channel. Returns how many bytes that was;
    /// `None`: the channel's end is here.
    fn forward(
        &mut self,
        now: Instant,
        received: &Received,
        channel: u64,
        start: usize,
        len: usize,
    ) -> Option<usize> {
        let stride = received.stride.min(len);
        // Both are as the kernel joined them, but over IPv6 a send takes a little less.
        let most = (super::arena::TRAIN_BYTES / stride).min(super::arena::TRAIN_SEGMENTS) * stride;
        let len = len.min(most);
        let segments = len.div_ceil(stride);
        match self.relay.forward(now, &received.from, channel, len) {
            Forward::To(to) => {
                self.forwards.push(Train { to, start, len, stride, segments, fragment: false });
            }
            Forward::Refused(reason) => self.drops.add(reason, segments as u64),
            Forward::Unknown => return None,
        }
        Some(len)
    }

    /// Takes the first of these datagrams, or as many as are data messages of one session. Returns
    /// how many bytes that was.
    fn datagrams(
        &mut self,
        now: Instant,
        table: &Table,
        from: Path,
        (start, train, stride): (usize, &[u8], usize),
        writes: &mut WriteBatch,
        out: &mut SendBatch,
    ) -> usize {
        let skip = if from.is_relayed() { RELAYED_HEADER_BYTES } else { 0 };
        let len = train.len().min(stride);
        let first = &train[skip.min(len)..len];
        match (DatagramKind::of(first), MessageKind::of(first)) {
            (DatagramKind::WireGuard, Some(MessageKind::Data { receiver })) => {
                let run = data_run(train, stride, skip, receiver);
                let messages = (start, &train[..run], stride);
                self.open(now, table, from, receiver, messages, writes, out);
                run
            }
            (DatagramKind::WireGuard, Some(kind)) => {
                self.handshake(now, table, from, kind, first, out);
                len
            }
            (kind, _) => {
                self.other(now, from, kind, first, out);
                len
            }
        }
    }

    /// A run of data messages with one receiver: `(first byte, bytes, stride)`.
    #[expect(clippy::too_many_arguments, reason = "a run, its sender and where the results go")]
    fn open(
        &mut self,
        now: Instant,
        table: &Table,
        from: Path,
        receiver: u32,
        (start, datagrams, stride): (usize, &[u8], usize),
        writes: &mut WriteBatch,
        out: &mut SendBatch,
    ) {
        let found = table.by_receiver(receiver);
        let Some((slot, peer)) = found.and_then(|slot| Some((slot, table.peer(slot)?))) else {
            let datagrams = datagrams.len().div_ceil(stride.max(1));
            self.drops.add(DropReason::UnknownIndex, datagrams as u64);
            return;
        };
        let mut opened = std::mem::take(&mut self.opened);
        opened.clear();
        let plain = &mut writes.bytes_mut()[start..start + datagrams.len()];
        let mut act = self.act(now, peer, out);
        let damaged = peer.tunnel.lock().open(
            from,
            peer.endpoint(),
            receiver,
            datagrams,
            stride,
            plain,
            &mut act,
            |at, len| opened.push((start + at, len)),
        );
        if datagrams.len() > stride {
            self.joined.datagrams += datagrams.len().div_ceil(stride);
            self.joined.damaged += damaged;
        }
        let mut last: Option<(IpAddr, Option<Slot>)> = None;
        for (at, len) in &opened {
            let Some(inner) = Inner::parse(&writes.bytes()[*at..at + len]) else {
                self.drops.count(DropReason::OpenedMalformed);
                continue;
            };
            let owner = match last {
                Some((source, owner)) if source == inner.source => owner,
                _ => table.route(inner.source),
            };
            last = Some((inner.source, owner));
            if owner != Some(slot) {
                self.drops.count(DropReason::WrongSource);
                continue;
            }
            self.coalescer.add(writes, *at, &inner);
        }
        self.opened = opened;
    }

    fn handshake(
        &mut self,
        now: Instant,
        table: &Table,
        from: Path,
        kind: MessageKind,
        message: &[u8],
        out: &mut SendBatch,
    ) {
        let peer = match kind {
            MessageKind::Initiation => self.knock(now, from, message, out).and_then(|()| {
                let key = self.secrets.claims(message).ok_or(DropReason::InvalidHandshake)?;
                table.by_key(&key).ok_or(DropReason::UnknownPeer)
            }),
            MessageKind::Response { receiver }
            | MessageKind::CookieReply { receiver }
            | MessageKind::Data { receiver } => {
                let slot = table.by_receiver(receiver);
                slot.and_then(|slot| table.peer(slot)).ok_or(DropReason::UnknownIndex)
            }
        };
        match peer {
            Ok(peer) => {
                let mut act = self.act(now, peer, out);
                peer.tunnel.lock().handshake(message, from, peer.endpoint(), &mut act);
            }
            Err(reason) => self.drops.count(reason),
        }
    }

    /// Whether there is time for an initiation. From an address that too many come from it needs a
    /// cookie: somebody else may be forging that address to keep its owner out.
    fn knock(
        &mut self,
        now: Instant,
        from: Path,
        initiation: &[u8],
        out: &mut SendBatch,
    ) -> Result<(), DropReason> {
        let ip = from.remote.ip();
        let crowded = !self.handshakes.admit(ip, now);
        let mut cookie = [0; HANDSHAKE_BYTES];
        match self.secrets.admit(from.remote, initiation, crowded, &mut cookie) {
            Admission::Admitted if crowded && !self.proven_handshakes.admit(ip, now) => {
                Err(DropReason::SourceLimited)
            }
            Admission::Admitted => Ok(()),
            Admission::Cookie(len) => {
                if !out.push(from, &cookie[..len]) {
                    self.drops.count(DropReason::SendBufferFull);
                }
                Err(if crowded { DropReason::SourceLimited } else { DropReason::UnderLoad })
            }
            Admission::Refused(_) if crowded => Err(DropReason::SourceLimited),
            Admission::Refused(reason) => Err(reason),
        }
    }

    fn other(
        &mut self,
        now: Instant,
        from: Path,
        kind: DatagramKind,
        datagram: &[u8],
        out: &mut SendBatch,
    ) {
        let reason = match kind {
            // A binding request: we reflect.
            DatagramKind::Stun if datagram.starts_with(&[0, 1]) => {
                if from.is_relayed() {
                    DropReason::ReflectorRefused
                } else if !self.reflections.admit(from.remote.ip(), now) {
                    DropReason::ReflectorLimited
                } else {
                    match stun::answer(datagram, from.remote) {
                        Some((answer, len)) if out.push(from, &answer[..len]) => return,
                        Some(_) => DropReason::SendBufferFull,
                        None => DropReason::ReflectorRefused,
                    }
                }
            }
            DatagramKind::Probe | DatagramKind::Stun
                if !self.probes.admit(from.remote.ip(), now) =>
            {
                DropReason::SourceLimited
            }
            DatagramKind::Probe => {
                return self.events.datagram(|| Event::Probe { from, datagram: datagram.into() });
            }
            DatagramKind::Stun => {
                return self.events.datagram(|| Event::Stun { from, datagram: datagram.into() });
            }
            DatagramKind::WireGuard => DropReason::Malformed,
            // A channel in a channel is nothing that anybody sends.
            DatagramKind::Relayed | DatagramKind::Unknown => DropReason::UnknownKind,
        };
        self.drops.count(reason);
    }

    /// Starts a handshake with a peer of the table.
    pub(super) fn initiate(
        &mut self,
        now: Instant,
        peer: &WireguardKey,
        to: Vec<Path>,
        out: &mut SendBatch,
    ) {
        let table = self.table.load();
        if let Some(peer) = table.by_key(peer) {
            let mut act = self.act(now, peer, out);
            peer.tunnel.lock().initiate(to, &mut act);
        }
    }

    /// Lets time pass for every tunnel that needs it. Returns whether there is one, or something
    /// else to be done soon.
    pub(super) fn tick<U: UdpIo>(
        &mut self,
        now: Instant,
        out: &mut SendBatch,
        udp: &mut U,
    ) -> bool {
        self.events.retry();
        let table = self.table.load();
        let mut live = self.events.is_waiting();
        for peer in &table.peers {
            let mut act = self.act(now, peer, out);
            live |= peer.tunnel.lock().tick(peer.endpoint(), peer.keepalive(), &mut act);
            // A tick writes a few messages at most.
            if out.spare(8 * HANDSHAKE_BYTES).is_none() {
                udp.send(now, out, &self.drops);
                out.clear();
            }
        }
        if !out.is_empty() {
            udp.send(now, out, &self.drops);
            out.clear();
        }
        live
    }

    fn act<'a>(&'a mut self, now: Instant, peer: &'a Peer, out: &'a mut SendBatch) -> Act<'a> {
        Act {
            now,
            started: self.started,
            out,
            events: &mut self.events,
            drops: &self.drops,
            counters: &peer.counters,
        }
    }
}

/// The peer for a destination; most packets go where the one before went.
fn route<'a>(
    table: &'a Table,
    last: &mut Option<(IpAddr, Slot)>,
    destination: IpAddr,
) -> Option<&'a Arc<Peer>> {
    let slot = match last {
        Some((address, slot)) if *address == destination => *slot,
        _ => table.route(destination)?,
    };
    *last = Some((destination, slot));
    table.peer(slot)
}

/// How many bytes of a train, from its start, are data messages for `receiver`, each behind `skip`
/// bytes.
fn data_run(train: &[u8], stride: usize, skip: usize, receiver: u32) -> usize {
    let fits = |datagram: &&[u8]| {
        let message = datagram.get(skip..).and_then(MessageKind::of);
        matches!(message, Some(MessageKind::Data { receiver: r }) if r == receiver)
    };
    train.chunks(stride.max(1)).take_while(fits).map(<[u8]>::len).sum()
}

/// How many bytes of a train, from its start, are on the channel that its first datagram is on.
fn channel_run(train: &[u8], stride: usize) -> usize {
    let header = train.get(..RELAYED_HEADER_BYTES).unwrap_or_default();
    let fits = |datagram: &&[u8]| datagram.starts_with(header);
    train.chunks(stride.max(1)).take_while(fits).map(<[u8]>::len).sum()
}

/// The place of a payload in its datagram, which must leave room for a virtio header.
const _: () = assert!(DATA_HEADER >= super::vnet::VNET_HEADER_BYTES);
