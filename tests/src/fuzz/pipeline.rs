//! Fuzzes a worker's packet path: batches from the network and from the TUN, as the bytes select.
//!
//! There is one node with one peer, whose keys the target has and for which it seals, and one relay
//! channel between two other nodes. Every call returns, forwarded ranges are disjoint parts of what
//! was received, and each datagram has exactly one outcome: delivered, forwarded, handed to the
//! daemon, answered or counted as a drop.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use towline_core::forwarding::{ForwardingEnd, ForwardingTable};
use towline_core::own_networks::OwnNetworks;
use towline_core::path::{ChannelId, LocalAddress, Path};
use towline_core::peer_table::{PeerEntry, PeerTable};
use towline_dataplane::arena::{
    GSO_MAX_BYTES, GSO_MAX_SEGMENTS, GsoBatch, HEADROOM, RecvBatch, SLOT_BYTES, SendBatch,
    TAILROOM, TunBatch, WriteBatch,
};
use towline_dataplane::coalesce::Coalesce;
use towline_dataplane::drops::{DropReason, Drops};
use towline_dataplane::headers::IpHeader;
use towline_dataplane::internals::PacketPath;
use towline_dataplane::split::Split;
use towline_dataplane::switch::Switch;
use towline_dataplane::udp::{Ready, TooBig, UdpIo};
use towline_dataplane::vnet::{FLAG_NEEDS_CSUM, GSO_UDP_L4, VNET_HEADER_BYTES, VnetHeader};
use towline_dataplane::{Event, Probes};
use towline_proto::frame::{DatagramKind, Probe, RELAYED_HEADER_BYTES, relayed, relayed_header};
use towline_proto::id::WireguardKey;
use towline_proto::rate::Rate;
use towline_wireguard::{
    Aead, Answered, DATA_OVERHEAD, Engine, EngineChoice, HANDSHAKE_BYTES, Inputs, MessageKind,
    Secrets, Segments, Session, Single,
};
use x25519_dalek::StaticSecret;

use super::{EPOCH, Input};

/// Number of calls for one input, which bounds its run time.
const CALLS: u32 = 64;
const SLOTS: usize = 8;
const MTU: usize = 1_420;
/// Interface index of the node's own TUN link, from which no outer datagram may arrive.
const LINK: u32 = 7;
/// A channel that the node relays; [`UNKNOWN`] is one that it does not relay.
const RELAYED: u64 = 77;
const UNKNOWN: u64 = 78;

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 51_830))
}

/// Runs the packet path on one input, with boringtun as its engine; see the module's documentation.
pub fn pipeline(bytes: &[u8]) {
    run(Engine::BORINGTUN, bytes);
}

/// Runs the packet path on one input, with the batch engine; see the module's documentation.
pub fn pipeline_batch(bytes: &[u8]) {
    run(*BATCH, bytes);
}

/// The batch engine with the fastest AEAD of this CPU.
static BATCH: LazyLock<Engine> = LazyLock::new(|| Engine::select(EngineChoice::Batch, Aead::Auto));

fn run(engine: Engine, bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut bench = Bench::new(engine);
    for _ in 0..CALLS {
        let Some(what) = input.byte() else { break };
        match what % 8 {
            0 | 1 => bench.junk(&mut input),
            2 => bench.sealed(&mut input),
            3 if what & 0x40 != 0 => bench.probe(&mut input),
            3 => bench.initiation(),
            4 | 5 => bench.outbound(&mut input),
            6 => bench.now += Duration::from_millis(input.below(255).into()),
            _ => bench.inbound(),
        }
        if bench.received.is_full() {
            bench.inbound();
        }
    }
    // Responses to the last batch may require another batch.
    for _ in 0..4 {
        bench.inbound();
    }
}

struct Bench {
    now: Instant,
    path: PacketPath,
    peer_key: WireguardKey,
    peer: Session,
    /// Probes of the peer.
    probes: Probes,
    received: RecvBatch,
    writes: WriteBatch,
    out: SendBatch,
    read: TunBatch,
}

/// A sink that counts the datagrams sent.
#[derive(Default)]
struct Sink {
    datagrams: usize,
}

impl UdpIo for Sink {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn receive(&mut self, _: Ready, _: &mut RecvBatch, _: &Drops) -> io::Result<()> {
        Ok(())
    }

    fn send_gso_batches(&mut self, _: Instant, bytes: &[u8], gso_batches: &[GsoBatch], _: &Drops) {
        for gso in gso_batches {
            let sent = &bytes[gso.start..gso.start + gso.len];
            assert_eq!(sent.chunks(gso.segment_size.get()).count(), gso.segments);
            self.datagrams += gso.segments;
        }
    }

    fn send_whole(&mut self, _: Instant, _: &SendBatch, _: &Drops) -> Result<(), TooBig> {
        Ok(())
    }

    fn record_gro(&mut self, _: Instant, _: usize, _: usize) {}

    fn features(&self) -> Vec<Switch> {
        Vec::new()
    }
}

impl Bench {
    fn new(engine: Engine) -> Self {
        let now = *EPOCH;
        let mut path = PacketPath::new(StaticSecret::from([1; 32]), engine, Some(LINK), now);
        let ends = [3, 4].map(|number| ForwardingEnd {
            node: WireguardKey([number; 32]),
            path: address(number).into(),
            is_proven: true,
        });
        let mut table = ForwardingTable::new(Rate::per_second(1 << 23, 1 << 23));
        table.insert(ChannelId(RELAYED), ends);
        path.apply_forwarding(&table);
        path.set_mtu(MTU);
        let secrets = Secrets::new(StaticSecret::from([2; 32]));
        let peer_key = secrets.public_key();
        let entry = PeerEntry {
            endpoint: Some(address(2).into()),
            prefixes: vec!["10.0.0.2/32".parse().expect("a prefix")],
            ..PeerEntry::default()
        };
        let own = OwnNetworks::new([Ipv4Addr::new(10, 0, 0, 1).into()], [], []);
        let probes = Probes::new(StaticSecret::from([2; 32]), 1);
        let node = [(path.public_key(), entry.clone())].into();
        probes.apply(&PeerTable { peers: node, ..PeerTable::default() });
        path.apply(now, &PeerTable { peers: [(peer_key, entry)].into(), own });
        let peer = Session::new(&secrets, path.public_key(), None, 9);
        Self {
            now,
            path,
            peer_key,
            peer,
            probes,
            received: RecvBatch::new(SLOTS),
            writes: WriteBatch::new(SLOTS),
            out: SendBatch::new(512 * 1024, 256),
            read: TunBatch::new(1, 4),
        }
    }

    /// Puts bytes into the next receive slot, as the kernel would.
    fn arrive(&mut self, from: Path, bytes: &[u8], segment_size: usize) {
        if self.received.is_full() {
            return;
        }
        let slot = self.received.next_slot();
        let len = bytes.len().min(SLOT_BYTES);
        self.received.bytes_mut()[slot * SLOT_BYTES..][..len].copy_from_slice(&bytes[..len]);
        self.received.push(slot, from, len, segment_size);
    }

    /// Receives datagrams of any size and kind, from any sender.
    fn junk(&mut self, input: &mut Input<'_>) {
        let from = input.sender();
        let len = input.size();
        let segment_size = input.size();
        let heads: Vec<Vec<u8>> = (0..=input.below(4)).map(|_| self.head(input)).collect();
        let mut bytes = vec![input.byte().unwrap_or(0); len];
        let size = if segment_size == 0 { len.max(1) } else { segment_size };
        for (datagram, head) in bytes.chunks_mut(size).zip(heads.iter().cycle()) {
            let len = head.len().min(datagram.len());
            datagram[..len].copy_from_slice(&head[..len]);
        }
        self.arrive(from, &bytes, segment_size);
    }

    fn head(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let now = self.now;
        let data = |session: &mut Session| {
            // Receiver index that the node has chosen.
            let mut message = [0; HANDSHAKE_BYTES];
            let len = session.keepalive(now, &mut message);
            message[..len.min(16)].to_vec()
        };
        match input.below(10) {
            0 => (0..16).map(|_| input.byte().unwrap_or(0)).collect(),
            1 => relayed_header(RELAYED).to_vec(),
            2 => relayed_header(UNKNOWN).to_vec(),
            3 => data(&mut self.peer),
            4 => [&relayed_header(UNKNOWN)[..], &data(&mut self.peer)].concat(),
            5 => vec![4, 0, 0, 0, 1, 2, 3, 4],
            6 => vec![0x50, 1, 0, 0, 9],
            7 => [&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42][..], &[9; 12]].concat(),
            8 => vec![input.below(5), 0, 0, 0],
            _ => [&relayed_header(RELAYED)[..], &relayed_header(UNKNOWN)].concat(),
        }
    }

    /// Receives packets that the peer sealed, coalesced as the kernel does or at wrong boundaries.
    fn sealed(&mut self, input: &mut Input<'_>) {
        if !self.peer.is_ready(self.now) {
            return;
        }
        let count = input.below(64) + 1;
        let payload = usize::from(input.below(90)) * 16;
        let to: Path = if input.below(4) == 0 {
            Path::from(address(2)).on_channel(ChannelId(UNKNOWN))
        } else {
            address(2).into()
        };
        let mut sealed = SendBatch::new(SLOT_BYTES, 8);
        for number in 0..count {
            let mut packet = vec![number; payload];
            if payload > 0 {
                let version = input.below(16);
                packet[..16].fill(0);
                packet[0] = if version < 14 { 0x45 } else { version << 4 };
                let claimed = payload as u16 - u16::from(input.below(16));
                packet[2..4].copy_from_slice(&claimed.to_be_bytes());
                packet[9] = 17;
                packet[12..16].copy_from_slice(&[10, 0, 0, if version == 0 { 3 } else { 2 }]);
            }
            if payload >= 32 {
                packet[16..20].copy_from_slice(&[10, 0, 0, 1]);
            }
            let mut segment = Single::new(&packet);
            self.peer.seal(self.now, &mut segment, &mut sealed.to(&to.into()));
        }
        let len: usize = sealed.gso_batches().iter().map(|gso| gso.len).sum();
        let size = match input.below(4) {
            0 => input.size(),
            _ => sealed.gso_batches().first().map_or(0, |gso| gso.segment_size.get()),
        };
        let bytes = sealed.bytes()[..len].to_vec();
        self.arrive(address(2).into(), &bytes, size);
    }

    /// Receives a probe that the peer sealed, from its address or another one.
    fn probe(&mut self, input: &mut Input<'_>) {
        let message = match input.below(4) {
            0 => Probe::Ping { transaction: 7 },
            1 => Probe::Register { transaction: 7 },
            2 => Probe::Challenge { token: 7 },
            _ => Probe::Proof { token: 7 },
        };
        let from = address(2 + input.below(2)).into();
        let sealed = self.probes.seal(&self.path.public_key(), &message, 0);
        self.arrive(from, &sealed.expect("the node is its peer"), 0);
    }

    fn initiation(&mut self) {
        let mut message = [0; HANDSHAKE_BYTES];
        let peer = &mut self.peer;
        let len = Inputs::system(self.now, |inputs| peer.initiate(inputs, &mut message));
        self.arrive(address(2).into(), &message[..len], 0);
    }

    /// Processes the received batch, and asserts the outcome of each datagram.
    fn inbound(&mut self) {
        let received = self.received.received().iter();
        let (mut total, mut consumable) = (0, 0);
        for (start, len) in received.flat_map(|received| {
            let places: Vec<_> = received.places().collect();
            // An empty datagram counts too.
            if places.is_empty() { vec![(0, 0)] } else { places }
        }) {
            total += 1;
            let datagram = &self.received.bytes()[start..start + len];
            let message = match relayed(datagram) {
                Some(_) => datagram.get(RELAYED_HEADER_BYTES..).unwrap_or_default(),
                None => datagram,
            };
            consumable += usize::from(match MessageKind::of(message) {
                Some(MessageKind::Data { .. }) => message.len() == DATA_OVERHEAD,
                Some(_) => true,
                None => DatagramKind::of(message) == DatagramKind::Stun,
            });
        }
        // Drops of packets that waited for a session do not belong to these datagrams.
        let drops = |path: &PacketPath| {
            path.all_drops()
                - path.drops(DropReason::QueueFull)
                - path.drops(DropReason::QueueExpired)
        };
        let before = drops(&self.path);
        let allowed = Coalesce { tcp: true, udp: true, tunnels: [4789, 0, 0, 0], whole: [0; 4] };
        self.path.inbound(self.now, allowed, &mut self.received, &mut self.writes, &mut self.out);
        let mut outcomes = usize::try_from(drops(&self.path) - before).expect("a few");

        let mut free_from = 0;
        for gso in self.path.forwards() {
            assert!(gso.len > 0 && gso.len <= GSO_MAX_BYTES, "{gso:?}");
            assert!(gso.segments <= GSO_MAX_SEGMENTS, "{gso:?}");
            assert_eq!(gso.len.div_ceil(gso.segment_size.get()), gso.segments, "{gso:?}");
            assert!(gso.start >= free_from, "forwarded twice: {gso:?}");
            free_from = gso.start + gso.len;
            let inside = self.received.received().iter().any(|received| {
                let (start, end) =
                    received.places().fold((usize::MAX, 0), |(start, end), (at, len)| {
                        (start.min(at), end.max(at + len))
                    });
                gso.start >= start && free_from <= end
            });
            assert!(inside, "never received: {gso:?}");
            outcomes += gso.segments;
        }
        for frame in self.writes.frames() {
            let bytes: usize = self.writes.pieces(frame).map(<[u8]>::len).sum();
            assert_eq!(bytes, frame.len);
            outcomes += frame.pieces;
        }
        while let Some(event) = self.path.event() {
            outcomes += usize::from(matches!(event, Event::Probe { .. } | Event::Stun { .. }));
        }
        // The other datagrams were handshakes, keepalives, and STUN requests that were answered.
        assert!(
            outcomes <= total && total - outcomes <= consumable,
            "{total} datagrams, {outcomes} outcomes, at most {consumable} consumed"
        );
        self.writes.clear();
        self.received.clear();
        self.answers();
    }

    /// Delivers to the peer what was sent to it; its responses arrive in the next batch.
    fn answers(&mut self) {
        let mut messages = Vec::new();
        assert_eq!(self.out.seal(), 0, "nothing is lost");
        for gso in self.out.gso_batches().iter().filter(|gso| gso.to.path.remote == address(2)) {
            let bytes = &self.out.bytes()[gso.start..gso.start + gso.len];
            messages.extend(bytes.chunks(gso.segment_size.get()).map(<[u8]>::to_vec));
        }
        self.out.clear();
        for message in messages {
            if let Some((node, Probe::Challenge { token })) = self.probes.open_signal(&message) {
                let proof = self.probes.seal(&node, &Probe::Proof { token }, 0);
                self.arrive(address(2).into(), &proof.expect("the node is its peer"), 0);
            }
            let handshake = matches!(MessageKind::of(&message), Some(kind) if !matches!(kind, MessageKind::Data { .. }));
            if !handshake {
                continue;
            }
            let mut reply = [0; HANDSHAKE_BYTES];
            let peer = &mut self.peer;
            let answered =
                Inputs::system(self.now, |inputs| peer.handshake(inputs, &message, &mut reply));
            if let Answered::Response { len, .. } | Answered::Established { len } = answered {
                self.arrive(address(2).into(), &reply[..len], 0);
            }
        }
    }

    /// Sends a packet from the TUN, large or small, valid or invalid.
    fn outbound(&mut self, input: &mut Input<'_>) {
        let len = input.size();
        let mut packet = vec![input.byte().unwrap_or(0); len];
        let good = input.below(4) != 0;
        if let Some(header) = packet.first_chunk_mut::<20>() {
            header[0] = if good { 0x45 } else { input.byte().unwrap_or(0) };
            header[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            header[6..8].fill(0);
            header[9] = 17;
            let to = if input.below(4) == 0 { 9 } else { 2 };
            header[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, to]);
        }
        let header = match input.below(3) {
            0 => VnetHeader::default(),
            1 => VnetHeader {
                flags: FLAG_NEEDS_CSUM,
                gso_type: GSO_UDP_L4,
                hdr_len: 28,
                gso_size: u16::from(input.byte().unwrap_or(0)) * 8,
                csum_start: 20,
                csum_offset: 6,
                ..VnetHeader::default()
            },
            _ => {
                let mut bytes = [0; VNET_HEADER_BYTES];
                bytes.fill_with(|| input.byte().unwrap_or(0));
                VnetHeader::decode(&bytes)
            }
        };
        self.read.clear();
        let spare = self.read.spare().expect("it is empty");
        spare[HEADROOM..HEADROOM + len].copy_from_slice(&packet);
        self.read.commit(header, len);

        let expected = segments(&packet, &header);
        let (drops, waiting) = (self.path.all_drops(), self.path.waiting());
        let mut sink = Sink::default();
        let mut out = SendBatch::new(512 * 1024, 256);
        self.path.outbound(self.now, &mut self.read, &mut out, &mut sink);
        assert!(out.is_empty(), "everything was sent");
        let dropped = usize::try_from(self.path.all_drops() - drops).expect("a few");
        let outcomes = sink.datagrams + dropped + self.path.waiting() - waiting;
        assert_eq!(outcomes, expected, "{len} bytes, {header:?}");
        if input.below(8) == 0 {
            let to = vec![address(2).into()];
            self.path.initiate(self.now, &self.peer_key, to, &mut self.out);
            self.answers();
        }
    }
}

/// Returns the number of outcomes that a packet from the TUN must have: one for each of its
/// segments, or one in total if the packet is invalid.
fn segments(packet: &[u8], header: &VnetHeader) -> usize {
    let good = IpHeader::parse(packet).filter(|inner| inner.total_len == packet.len());
    if good.is_none_or(|inner| inner.destination != Ipv4Addr::new(10, 0, 0, 2)) {
        return 1;
    }
    let mut buffer = vec![0; HEADROOM + packet.len() + TAILROOM];
    buffer[HEADROOM..HEADROOM + packet.len()].copy_from_slice(packet);
    let Ok(mut split) = Split::new(&mut buffer, packet.len(), header, MTU) else { return 1 };
    let mut count = 0;
    while split.next_len().is_some() {
        split.take();
        count += 1;
    }
    count
}

impl Input<'_> {
    /// Returns zero, a small size, any size, or a size near the limits.
    fn size(&mut self) -> usize {
        match self.below(4) {
            0 => self.below(3).into(),
            1 => usize::from(self.byte().unwrap_or(0)) * 6,
            2 => {
                let [high, low] = [self.byte().unwrap_or(0), self.byte().unwrap_or(0)];
                u16::from_be_bytes([high, low]).into()
            }
            _ => 65_535 - usize::from(self.byte().unwrap_or(0)) / 2,
        }
    }

    fn sender(&mut self) -> Path {
        let number = self.below(6);
        let path = Path::from(address(number));
        let local = LocalAddress { address: Ipv4Addr::new(10, 0, 0, 1).into(), interface: LINK };
        if number == 0 { Path { local: Some(local), ..path } } else { path }
    }
}

/// Returns inputs in the order in which the functions above read them.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    const SIZE_MAX: [u8; 2] = [3, 0];
    const WHOLE: [u8; 2] = [0, 0];
    let [handshake, inbound]: [&[u8]; 2] = [&[3, 7, 7], &[7]];
    // Kind of the message, address.
    let ping: &[u8] = &[0x43, 0, 0];
    // Sender, length, segment size, kind of head, fill byte.
    let junk = |from: u8, len: &[u8], size: &[u8], head: &[u8]| {
        [&[0, from], len, size, &[0], head, &[0xaa]].concat()
    };
    // Count, size, direct path, versions and lengths, coalesced as sealed.
    let sealed = |count: u8, payload: u8| {
        let mut bytes = vec![2, count - 1, payload, 1];
        bytes.extend([1, 0].repeat(count.into()));
        bytes.push(1);
        bytes
    };
    // Size, fill byte, validity, destined for the peer.
    let outbound = |size: &[u8], header: &[u8]| [&[4], size, &[7, 1, 1], header, &[1]].concat();
    vec![
        [handshake, &sealed(20, 80), &sealed(3, 0), inbound].concat(),
        [handshake, &outbound(&[2, 5, 100], &[0]), &outbound(&SIZE_MAX, &[1, 160])].concat(),
        [outbound(&[2, 0, 200], &[0]), outbound(&[2, 60, 0], &[1, 100]), handshake.to_vec()]
            .concat(),
        // Datagrams of the maximum length on a channel: from one of its ends, and from a stranger.
        [junk(3, &SIZE_MAX, &WHOLE, &[1]), junk(5, &SIZE_MAX, &WHOLE, &[1]), inbound.to_vec()]
            .concat(),
        [junk(3, &SIZE_MAX, &[2, 4, 0], &[1]), junk(4, &[2, 90, 0], &[1, 3], &[9])].concat(),
        [handshake, &junk(2, &[2, 90, 0], &[1, 40], &[3]), &junk(2, &[2, 9, 0], &[1, 40], &[4])]
            .concat(),
        [junk(0, &[2, 3, 0], &[1, 20], &[5]), junk(1, &WHOLE, &WHOLE, &[0])].concat(),
        [
            junk(1, &[1, 10], &WHOLE, &[6]),
            junk(1, &[1, 4], &[1, 4], &[7]),
            junk(1, &[1, 5], &WHOLE, &[8, 3]),
        ]
        .concat(),
        // A ping, which is challenged, its proof, and a request from two addresses.
        [ping, inbound, inbound, ping, &[0x43, 1, 0], &[0x43, 1, 1], inbound].concat(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without this test the seeds might show only that junk is dropped.
    #[test]
    fn seeds_reach_a_session_and_a_channel() {
        [Engine::BORINGTUN, *BATCH].into_iter().for_each(reach_a_session_and_a_channel);
    }

    fn reach_a_session_and_a_channel(engine: Engine) {
        let mut bench = Bench::new(engine);
        bench.initiation();
        bench.inbound();
        bench.inbound();
        assert!(bench.peer.is_ready(bench.now), "the handshake is complete");
        bench.sealed(&mut Input(&seeds()[0][4..]));
        let allowed = Coalesce::default();
        let Bench { now, path, received, writes, out, .. } = &mut bench;
        path.inbound(*now, allowed, received, writes, out);
        assert_eq!(writes.frames().len(), 20);

        let mut bench = Bench::new(engine);
        bench.junk(&mut Input(&seeds()[4][1..]));
        let Bench { now, path, received, writes, out, .. } = &mut bench;
        path.inbound(*now, allowed, received, writes, out);
        assert!(path.forwards().len() > 1, "a long run takes several sends");
    }
}
