//! The path of each batch: outbound from the TUN to the network, inbound from the network to the
//! TUN, and the timers. The only I/O here is sending a batch that is full.

#![deny(clippy::indexing_slicing)]

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use towline_core::path::{ChannelId, Path};
use towline_types::frame::{DatagramKind, RELAYED_HEADER_BYTES, relayed};
use towline_types::id::WireguardKey;
use towline_types::rate::Rate;
use towline_types::source_limiter::SourceLimiter;
use towline_types::stun;

use super::Slot;
use super::arena::{
    Datagrams, Destination, GsoBatch, NoDatagrams, Received, RecvBatch, SendBatch, TunBatch,
    WriteBatch,
};
use super::coalesce::{Coalesce, Coalescer};
use super::drops::{DropReason, Drops};
use super::events::{Event, EventSink};
use super::forwarding::{Forward, Forwarding};
use super::headers::{
    IpHeader, ecn, is_congested, mark_congestion, outer_traffic_class, traffic_class,
};
use super::live_tunnels::LiveTunnels;
use super::probes::{self, Probes};
use super::runs::{Handshake, OpenedPacket, Run};
use super::split::Split;
use super::table::{Peer, Table};
use super::tunnel::TunnelContext;
use super::udp::UdpIo;
use towline_wireguard::{
    Admission, Buffers, DATA_HEADER, HANDSHAKE_BYTES, Message, MessageKind, Scratch, Secrets,
    Segments,
};

/// Rate and burst of handshakes from one source address. Many nodes may share one address.
const HANDSHAKES: Rate = Rate::per_second(64, 128);
/// Rate and burst of STUN responses from one source address.
const STUN_RESPONSES: Rate = Rate::per_second(256, 512);
/// Rate and burst of challenges and proofs that are sent to one address. Replays elicit them, so this
/// bounds what an address gets that somebody forges. Hundreds of nodes behind one address need a
/// challenge each after this node started.
const CHALLENGES: Rate = Rate::per_second(512, 1024);
/// Rate and burst of STUN requests from one source address. Each node behind a NAT sends a few, and
/// again when its address changes.
const REFLECTIONS: Rate = Rate::per_second(32, 128);

/// Number of receive buffers in one batch: one receive call fills one.
pub(super) const RECEIVE_SLOTS: usize = 8;
/// Number of datagrams in one batch, if the kernel fills each buffer. Some kernels may put more into one.
const RECEIVED: usize = RECEIVE_SLOTS * super::arena::GSO_MAX_SEGMENTS;

/// Packet path of one worker.
#[derive(Debug)]
pub(super) struct Pipeline {
    secrets: Arc<Secrets>,
    table: Arc<ArcSwap<Table>>,
    drops: Arc<Drops>,
    events: EventSink,
    live: Arc<LiveTunnels>,
    started: Instant,
    /// Limiter of initiations. Beyond it an initiator must prove its address with a cookie.
    handshakes: SourceLimiter,
    /// Limiter of initiations beyond `handshakes` that proved their address.
    proven_handshakes: SourceLimiter,
    probes: Probes,
    /// Buffer in which a probe is decrypted. Kept between calls for its capacity.
    probe_buffer: Vec<u8>,
    stun_responses: SourceLimiter,
    challenges: SourceLimiter,
    reflections: SourceLimiter,
    forwarding: Arc<ArcSwap<Forwarding>>,
    /// GSO batches in the receive buffer that are forwarded to another node.
    forwards: Vec<GsoBatch>,
    /// Index of the TUN link, from which no outer datagram may come. `None` if there is no link.
    link: Option<u32>,
    /// MTU of the link in bytes. No segment is padded beyond it, nor beyond the peer's.
    mtu: usize,
    coalescer: Coalescer,
    /// Runs of data messages that are not opened yet. Kept between calls for its capacity, like the
    /// next three.
    runs: Vec<Run>,
    /// Handshake messages that are not handled yet. Data goes first: it belongs to sessions that
    /// exist already.
    noted_handshakes: Vec<Handshake>,
    /// Packets that were decrypted.
    opened: Vec<OpenedPacket>,
    /// Working memory of the WireGuard engine.
    scratch: Scratch,
    /// Counters of the data messages that arrived coalesced by `UDP_GRO`. Cleared with each batch.
    coalesced: Coalesced,
    /// True if outer packets get the DSCP of the inner ones.
    copy_dscp: bool,
    /// Traffic class of the outer packets that are being handled. Set for each receive call.
    traffic_class: u8,
    /// Destination of the last decrypted packet, and whether it belongs to this node. Cleared with
    /// each batch.
    accepted: Option<(IpAddr, bool)>,
}

/// Counters of the data messages of one batch that the kernel had coalesced (`UDP_GRO`).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Coalesced {
    /// Number of coalesced data messages.
    pub(super) datagrams: usize,
    /// Number of them that were not authentic.
    pub(super) corrupted: usize,
}

impl Pipeline {
    #[expect(clippy::too_many_arguments, reason = "what the workers of a data plane share")]
    pub(super) fn new(
        secrets: Arc<Secrets>,
        probes: Probes,
        table: Arc<ArcSwap<Table>>,
        drops: Arc<Drops>,
        events: EventSink,
        live: Arc<LiveTunnels>,
        forwarding: Arc<ArcSwap<Forwarding>>,
        link: Option<u32>,
        started: Instant,
    ) -> Self {
        Self {
            secrets,
            table,
            drops,
            events,
            live,
            started,
            handshakes: SourceLimiter::new(HANDSHAKES),
            proven_handshakes: SourceLimiter::new(HANDSHAKES),
            probes,
            probe_buffer: Vec::new(),
            stun_responses: SourceLimiter::new(STUN_RESPONSES),
            challenges: SourceLimiter::new(CHALLENGES),
            reflections: SourceLimiter::new(REFLECTIONS),
            forwarding,
            forwards: Vec::with_capacity(RECEIVED),
            link,
            mtu: usize::MAX,
            coalescer: Coalescer::new(Coalesce::default()),
            runs: Vec::with_capacity(RECEIVED),
            noted_handshakes: Vec::new(),
            opened: Vec::with_capacity(super::arena::SLOT_BYTES / 32),
            scratch: Scratch::with_capacity(RECEIVED),
            coalesced: Coalesced::default(),
            copy_dscp: false,
            traffic_class: 0,
            accepted: None,
        }
    }

    /// Sets whether outer packets get the DSCP of the inner ones.
    pub(super) fn set_copy_dscp(&mut self, copy_dscp: bool) {
        self.copy_dscp = copy_dscp;
    }

    pub(super) fn set_mtu(&mut self, mtu: usize) {
        self.mtu = mtu;
    }

    pub(super) fn events(&mut self) -> &mut EventSink {
        &mut self.events
    }

    /// Seals the packets of `batch` for their peers. Sends `out` whenever it is full, and at the
    /// end.
    pub(super) fn outbound<U: UdpIo>(
        &mut self,
        now: Instant,
        batch: &mut TunBatch,
        out: &mut SendBatch,
        udp: &mut U,
    ) {
        let table = self.table.load();
        let mut last = None;
        let mut last_source = None;
        for number in 0..batch.packets().len() {
            let Some(packet) = batch.packets().get(number).copied() else { break };
            let bytes = batch.packet_mut(&packet);
            let inner = bytes.get(super::arena::HEADROOM..).and_then(IpHeader::parse);
            let Some(inner) = inner.filter(|inner| inner.total_len == packet.len) else {
                self.drops.count(DropReason::InnerMalformed);
                continue;
            };
            let Some(peer) = route(&table, &mut last, inner.destination) else {
                self.drops.count(DropReason::NoRoute);
                continue;
            };
            let source = inner.source;
            if !cached(&mut last_source, source, || table.owns(source)) && !peer.entry.is_static {
                self.drops.foreign_source(source, inner.destination, now);
                continue;
            }
            let mtu = self.mtu.min(peer.entry.mtu.into());
            let inner = bytes.get(super::arena::HEADROOM..).map_or(0, traffic_class);
            let class = outer_traffic_class(inner, self.copy_dscp);
            // It is large, so it is not moved.
            match &mut Split::new(bytes, packet.len, &packet.header, mtu) {
                Ok(segments) => self.seal(now, peer, class, segments, out, udp),
                Err(reason) => self.drops.count(*reason),
            }
        }
        udp.flush(now, out, &self.drops);
    }

    fn seal<U: UdpIo>(
        &mut self,
        now: Instant,
        peer: &Peer,
        traffic_class: u8,
        segments: &mut impl Segments,
        out: &mut SendBatch,
        udp: &mut U,
    ) {
        let mut tunnel = peer.tunnel.lock();
        if !tunnel.is_ready(now) {
            let mut context = self.context(now, peer, out);
            while segments.next_len().is_some() {
                tunnel.enqueue(segments.take(), &mut context);
            }
            return;
        }
        let Some(path) = tunnel.endpoint(peer.endpoint()) else {
            while segments.next_len().is_some() {
                segments.take();
                self.drops.count(DropReason::NoEndpoint);
            }
            return;
        };
        if let Some(what) = tunnel.sent_inner(now) {
            self.events.observe(peer.key, what);
        }
        let (fragment, is_single) = (peer.entry.fragment, peer.entry.is_single);
        let to = Destination { path, fragment, traffic_class, is_single };
        loop {
            peer.counters.sent(tunnel.seal(segments, &to, out, &self.drops, now));
            if segments.next_len().is_none() {
                break;
            }
            if out.is_empty() {
                // A segment that does not fit an empty batch never fits.
                while segments.next_len().is_some() {
                    segments.take();
                    self.drops.count(DropReason::SendTooLarge);
                }
                break;
            }
            udp.flush(now, out, &self.drops);
        }
    }

    /// Opens the datagrams of `batch` into `writes`, with packets coalesced as `allowed` permits,
    /// and appends responses to `out`. An engine that opens in place opens all of them together, and
    /// then the bytes of both batches are exchanged; boringtun opens what each receive call returned.
    pub(super) fn inbound(
        &mut self,
        now: Instant,
        allowed: Coalesce,
        batch: &mut RecvBatch,
        writes: &mut WriteBatch,
        out: &mut SendBatch,
    ) {
        let table = self.table.load();
        self.coalescer.allow(allowed);
        self.forwards.clear();
        self.coalesced = Coalesced::default();
        self.accepted = None;
        let in_place = self.secrets.engine().opens_in_place();
        for number in 0..batch.received().len() {
            let Some(received) = batch.received().get(number).copied() else { break };
            self.sort(now, &table, batch, &received, out);
            if !in_place {
                self.open(now, &table, batch, writes, out);
                self.pass(&table, writes);
            }
        }
        if in_place {
            self.open(now, &table, batch, writes, out);
            batch.swap(writes);
            self.pass(&table, writes);
        }
        self.coalescer.finish(writes);
    }

    /// Returns the block of bytes that holds what was received in the last batch.
    pub(super) fn received_bytes<'a>(
        &self,
        batch: &'a RecvBatch,
        writes: &'a WriteBatch,
    ) -> &'a [u8] {
        if self.secrets.engine().opens_in_place() { writes.bytes() } else { batch.bytes() }
    }

    /// Handles the datagrams of one receive call, except that data messages and handshakes are noted
    /// for [`Self::open`].
    fn sort(
        &mut self,
        now: Instant,
        table: &Table,
        batch: &RecvBatch,
        received: &Received,
        out: &mut SendBatch,
    ) {
        let datagrams = batch.datagrams(received);
        self.traffic_class = received.traffic_class;
        if self.link.is_some() && received.from.local.map(|local| local.interface) == self.link {
            let count = match datagrams {
                Ok(datagrams) => datagrams.count().get(),
                Err(NoDatagrams::Oversized { count }) => count,
                Err(NoDatagrams::Empty) => 1,
            };
            self.drops.add(DropReason::TunnelInTunnel, count as u64);
            return;
        }
        match datagrams {
            Ok(datagrams) => {
                let mut rest = Some(datagrams);
                while let Some(datagrams) = rest {
                    let run = self.step(now, table, received.from, datagrams, out);
                    rest = datagrams.skip(run);
                }
            }
            Err(NoDatagrams::Oversized { count }) => {
                self.drops.add(DropReason::Oversized, count as u64);
            }
            Err(NoDatagrams::Empty) => self.drops.count(DropReason::UnknownKind),
        }
    }

    /// Returns the GSO batches of the last batch that must be forwarded to other nodes. They refer
    /// to the bytes of that batch.
    pub(super) fn forwards(&self) -> &[GsoBatch] {
        &self.forwards
    }

    /// Returns the counters of coalesced datagrams of the last batch.
    pub(super) fn coalesced(&self) -> Coalesced {
        self.coalesced
    }

    /// Handles the first datagram, and the following ones that belong to the same relay channel or
    /// session. Returns the number of datagrams handled.
    fn step(
        &mut self,
        now: Instant,
        table: &Table,
        from: Path,
        datagrams: Datagrams<'_>,
        out: &mut SendBatch,
    ) -> NonZeroUsize {
        let Some((channel, _)) = relayed(datagrams.first()) else {
            return self.datagrams(now, table, from, datagrams, out);
        };
        let on_channel = datagrams.take(channel_run(&datagrams));
        self.forward(now, &from, channel, on_channel).unwrap_or_else(|| {
            let from = from.on_channel(ChannelId(channel));
            self.datagrams(now, table, from, on_channel, out)
        })
    }

    /// Forwards a run of datagrams if this node relays their channel. Returns the number of
    /// datagrams handled, or `None` if this node is the end of the channel.
    fn forward(
        &mut self,
        now: Instant,
        from: &Path,
        channel: u64,
        datagrams: Datagrams<'_>,
    ) -> Option<NonZeroUsize> {
        // The kernel may have coalesced more than one send takes: over IPv6 the limit is a little
        // lower.
        let run = datagrams.one_send().min(datagrams.count());
        let datagrams = datagrams.take(run);
        let (start, len, segments) = (datagrams.start(), datagrams.bytes().len(), run.get());
        match self.forwarding.load().forward(now, from, channel, len) {
            Forward::To(to) => {
                let segment_size = datagrams.segment_size();
                // What the path to this relay marked reaches the receiver.
                let to = Destination { traffic_class: ecn(self.traffic_class), ..to.into() };
                self.forwards.push(GsoBatch { to, start, len, segment_size, segments });
            }
            Forward::Refused(reason) => self.drops.add(reason, segments as u64),
            Forward::Unknown => return None,
        }
        Some(run)
    }

    /// Handles the first datagram, or notes all leading datagrams that are data messages of one
    /// session. Returns the number of datagrams handled.
    fn datagrams(
        &mut self,
        now: Instant,
        table: &Table,
        from: Path,
        datagrams: Datagrams<'_>,
        out: &mut SendBatch,
    ) -> NonZeroUsize {
        let skip = if from.is_relayed() { RELAYED_HEADER_BYTES } else { 0 };
        let first = datagrams.first().get(skip..).unwrap_or_default();
        match (DatagramKind::of(first), MessageKind::of(first)) {
            (DatagramKind::WireGuard, Some(MessageKind::Data { receiver })) => {
                let run = data_run(&datagrams, skip, receiver);
                let class = self.traffic_class;
                match table.by_receiver(receiver) {
                    Some(slot) => {
                        let datagrams = datagrams.take(run);
                        self.runs.push(Run::new(slot, from, receiver, class, skip, &datagrams));
                    }
                    None => self.drops.add(DropReason::UnknownIndex, run.get() as u64),
                }
                return run;
            }
            (DatagramKind::WireGuard, Some(kind)) => {
                let at = Message { start: datagrams.start() + skip, len: first.len() };
                self.noted_handshakes.push(Handshake { from, kind, at });
            }
            (DatagramKind::Probe, _) => self.probe(now, table, from, first, out),
            (kind, _) => self.other(now, from, kind, first, out),
        }
        NonZeroUsize::MIN
    }

    /// Opens the runs that were noted, one batch for each session, and then handles the handshake
    /// messages.
    fn open(
        &mut self,
        now: Instant,
        table: &Table,
        batch: &mut RecvBatch,
        writes: &mut WriteBatch,
        out: &mut SendBatch,
    ) {
        let mut runs = std::mem::take(&mut self.runs);
        let mut opened = std::mem::take(&mut self.opened);
        let mut scratch = std::mem::take(&mut self.scratch);
        // Each peer's messages keep their order. A stable sort by peer would do the same, but allocates.
        runs.sort_unstable_by_key(Run::order);
        for group in runs.chunk_by(|last, run| run.continues(last)) {
            let Some(Run { slot, traffic_class, .. }) = group.first().copied() else { continue };
            let counts = group.iter().map(Run::count);
            let Some(peer) = table.peer(slot) else {
                self.drops.add(DropReason::UnknownIndex, counts.sum::<usize>() as u64);
                continue;
            };
            let (sealed, plain) = (batch.bytes_mut(), writes.bytes_mut());
            let buffers = Buffers { sealed, plain, scratch: &mut scratch };
            let mut context = self.context(now, peer, out);
            let corrupted =
                peer.tunnel.lock().open(peer.endpoint(), group, buffers, &mut context, |at| {
                    opened.push(OpenedPacket { slot, traffic_class, at });
                });
            self.coalesced.datagrams += counts.filter(|count| *count > 1).sum::<usize>();
            self.coalesced.corrupted += corrupted;
        }
        runs.clear();
        (self.runs, self.opened, self.scratch) = (runs, opened, scratch);
        let mut handshakes = std::mem::take(&mut self.noted_handshakes);
        for Handshake { from, kind, at } in handshakes.drain(..) {
            let message = batch.bytes().get(at.start..at.start + at.len).unwrap_or_default();
            self.handshake(now, table, from, kind, message, out);
        }
        self.noted_handshakes = handshakes;
    }

    /// Passes the packets that were decrypted to the coalescer, if their addresses are allowed.
    fn pass(&mut self, table: &Table, writes: &mut WriteBatch) {
        let mut opened = std::mem::take(&mut self.opened);
        let mut last: Option<(IpAddr, bool)> = None;
        let mut last_slot = None;
        for OpenedPacket { slot, traffic_class, at } in opened.drain(..) {
            // The verdict on a source holds for one peer only.
            if last_slot.replace(slot) != Some(slot) {
                last = None;
            }
            let range = at.start..at.start + at.len;
            let packet = writes.bytes().get(range.clone());
            let Some(inner) = packet.and_then(IpHeader::parse) else {
                self.drops.count(DropReason::OpenedMalformed);
                continue;
            };
            let source = inner.source;
            let may_send = || {
                let owner = table.route(source);
                owner == Some(slot) || table.is_shared_source(slot, owner, source)
            };
            if !cached(&mut last, source, may_send) {
                self.drops.count(DropReason::WrongSource);
                continue;
            }
            let destination = inner.destination;
            if !cached(&mut self.accepted, destination, || table.accepts(destination)) {
                self.drops.count(DropReason::WrongDestination);
                continue;
            }
            if is_congested(traffic_class)
                && let Some(packet) = writes.bytes_mut().get_mut(range)
            {
                mark_congestion(packet);
            }
            self.coalescer.add(writes, at.start, &inner);
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
            MessageKind::Initiation => {
                self.admit_initiation(now, from, message, out).and_then(|()| {
                    let key =
                        self.secrets.initiator_key(message).ok_or(DropReason::InvalidHandshake)?;
                    table.by_key(&key).ok_or(DropReason::UnknownPeer)
                })
            }
            MessageKind::Response { receiver }
            | MessageKind::CookieReply { receiver }
            | MessageKind::Data { receiver } => {
                let slot = table.by_receiver(receiver);
                slot.and_then(|slot| table.peer(slot)).ok_or(DropReason::UnknownIndex)
            }
        };
        match peer {
            Ok(peer) => {
                let mut context = self.context(now, peer, out);
                peer.tunnel.lock().handshake(message, from, peer.endpoint(), &mut context);
            }
            Err(reason) => self.drops.count(reason),
        }
    }

    /// Checks whether an initiation may be processed. If its source address is over its rate, the
    /// initiation needs a valid cookie. Dropping it instead would let a host that forges the address
    /// lock out the real owner.
    fn admit_initiation(
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
                if !cookie.get(..len).is_some_and(|cookie| out.push(from, cookie)) {
                    self.drops.count(DropReason::SendBufferFull);
                }
                Err(if crowded { DropReason::SourceLimited } else { DropReason::UnderLoad })
            }
            Admission::Refused(_) if crowded => Err(DropReason::SourceLimited),
            Admission::Refused(refusal) => Err(refusal.into()),
        }
    }

    /// Handles a probe: opens it, answers it where that needs no decision of the mesh, and reports its
    /// message.
    fn probe(
        &mut self,
        now: Instant,
        table: &Table,
        from: Path,
        datagram: &[u8],
        out: &mut SendBatch,
    ) {
        let endpoint = |peer: &WireguardKey| table.by_key(peer)?.endpoint();
        let admit = || self.challenges.admit(from.remote.ip(), now);
        let buffer = &mut self.probe_buffer;
        let received = self.probes.receive(now, from, datagram, buffer, endpoint, admit);
        let probes::Received { peer, mut message, is_validated, answer } = match received {
            Ok(received) => received,
            Err(reason) => return self.drops.count(reason),
        };
        if let Some(answer) = answer
            && !out.push(from, &answer)
        {
            message = message.and(Err(DropReason::SendBufferFull));
        }
        match message {
            Ok(message) => {
                self.events.datagram(|| Event::Probe { peer, from, is_validated, message });
            }
            Err(reason) => self.drops.count(reason),
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
            // A STUN binding request: this node answers it as a STUN server.
            DatagramKind::Stun if datagram.starts_with(&[0, 1]) => {
                if from.is_relayed() {
                    DropReason::ReflectorRefused
                } else if !self.reflections.admit(from.remote.ip(), now) {
                    DropReason::ReflectorLimited
                } else {
                    match stun::answer(datagram, from.remote) {
                        Some((answer, len)) => {
                            let answer = answer.get(..len).unwrap_or_default();
                            if out.push(from, answer) {
                                return;
                            }
                            DropReason::SendBufferFull
                        }
                        None => DropReason::ReflectorRefused,
                    }
                }
            }
            DatagramKind::Stun if !self.stun_responses.admit(from.remote.ip(), now) => {
                DropReason::SourceLimited
            }
            DatagramKind::Stun => {
                return self.events.datagram(|| Event::Stun { from, datagram: datagram.into() });
            }
            DatagramKind::WireGuard => DropReason::Malformed,
            // No node sends a relayed datagram inside a relayed datagram.
            DatagramKind::Probe | DatagramKind::Relayed | DatagramKind::Unknown => {
                DropReason::UnknownKind
            }
        };
        self.drops.count(reason);
    }

    /// Starts a handshake with a peer, if the table has it.
    pub(super) fn initiate(
        &mut self,
        now: Instant,
        peer: &WireguardKey,
        to: Vec<Path>,
        out: &mut SendBatch,
    ) {
        let table = self.table.load();
        if let Some(peer) = table.by_key(peer) {
            let mut context = self.context(now, peer, out);
            peer.tunnel.lock().initiate(to, &mut context);
        }
    }

    /// Advances the timers of the tunnels. Returns whether further ticks are needed: a tunnel is
    /// live, or events wait for room.
    pub(super) fn tick<U: UdpIo>(
        &mut self,
        now: Instant,
        out: &mut SendBatch,
        udp: &mut U,
    ) -> bool {
        self.events.retry();
        let table = self.table.load();
        let (live, is_waiting) = (self.live.clone(), self.events.is_waiting());
        let is_live = live.tick(&table, |peer| {
            let mut context = self.context(now, peer, out);
            let is_live = peer.tunnel.lock().tick(peer.endpoint(), peer.keepalive(), &mut context);
            // One tick of a tunnel writes at most a few messages.
            if out.spare(8 * HANDSHAKE_BYTES).is_none() {
                udp.flush(now, out, &self.drops);
            }
            is_live
        });
        udp.flush(now, out, &self.drops);
        is_live || is_waiting
    }

    /// Returns whether a further tick is needed although another worker, which ran the last one, may need
    /// none: a tunnel has become live since, or events of this worker wait for room.
    pub(super) fn needs_tick(&self) -> bool {
        self.live.newly_live.is_recorded() || self.events.is_waiting()
    }

    fn context<'a>(
        &'a mut self,
        now: Instant,
        peer: &'a Peer,
        out: &'a mut SendBatch,
    ) -> TunnelContext<'a> {
        TunnelContext {
            now,
            started: self.started,
            out,
            events: &mut self.events,
            newly_live: &self.live.newly_live,
            drops: &self.drops,
            counters: &peer.counters,
            is_static: peer.entry.is_static,
        }
    }
}

/// Returns the peer for a destination. Most packets have the same destination as their predecessor,
/// which `last` keeps.
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

/// Returns the result of `look_up` for an address. Most packets have the same address as their
/// predecessor, whose result `last` keeps.
fn cached<T: Copy>(last: &mut Option<(IpAddr, T)>, address: IpAddr, look_up: impl Fn() -> T) -> T {
    match last {
        Some((known, value)) if *known == address => *value,
        _ => {
            let value = look_up();
            *last = Some((address, value));
            value
        }
    }
}

/// Returns the number of leading datagrams that are data messages for `receiver`, each after `skip`
/// bytes.
fn data_run(datagrams: &Datagrams<'_>, skip: usize, receiver: u32) -> NonZeroUsize {
    datagrams.run(|datagram| {
        let message = datagram.get(skip..).and_then(MessageKind::of);
        matches!(message, Some(MessageKind::Data { receiver: r }) if r == receiver)
    })
}

/// Returns the number of leading datagrams that are on the channel of the first.
fn channel_run(datagrams: &Datagrams<'_>) -> NonZeroUsize {
    let header = datagrams.first().get(..RELAYED_HEADER_BYTES).unwrap_or_default();
    datagrams.run(|datagram| datagram.starts_with(header))
}

// A decrypted payload starts `DATA_HEADER` bytes into its datagram. That must leave room for a
// virtio header.
const _: () = assert!(DATA_HEADER >= super::vnet::VNET_HEADER_BYTES);
