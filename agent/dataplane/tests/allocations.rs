//! Tests that the packet path allocates nothing, however large a batch is. The kernel decides how much
//! one read returns, so here batches are made by hand: a small one first, and then one that is full.
//!
//! The allocator of this process counts what the calling thread allocates, so other tests do not matter.

#![expect(clippy::unwrap_used, reason = "a panic is the report")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use towline_core::own_networks::OwnNetworks;
use towline_core::peer_table::{PeerEntry, PeerTable};
use towline_dataplane::arena::{
    GSO_MAX_SEGMENTS, GsoBatch, HEADROOM, RecvBatch, SLOT_BYTES, SendBatch, TunBatch, WriteBatch,
};
use towline_dataplane::coalesce::Coalesce;
use towline_dataplane::drops::Drops;
use towline_dataplane::internals::PacketPath;
use towline_dataplane::switch::Switch;
use towline_dataplane::udp::TooBig;
use towline_dataplane::vnet::{FLAG_NEEDS_CSUM, GSO_TCPV4, VnetHeader};
use towline_dataplane::{Aead, Engine, EngineChoice, Ready, UdpIo};
use towline_types::frame::{RELAYED_HEADER_BYTES, relayed_header};
use x25519_dalek::StaticSecret;

/// Number of receive buffers of a worker.
const SLOTS: usize = 8;
/// Payload of each segment in bytes. With its headers it is a multiple of 16, so no padding is needed.
const PAYLOAD: usize = 488;
/// Length of the headers of each segment in bytes.
const HEADERS: usize = 40;

/// Allocator that counts the allocations of a thread.
struct Counting;

thread_local! {
    /// Number of allocations of this thread. `None` while they are not counted.
    static COUNTED: Cell<Option<u64>> = const { Cell::new(None) };
}
/// Place of the first allocation that was counted.
static FIRST: Mutex<Option<Backtrace>> = Mutex::new(None);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all calls are forwarded to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Nothing is counted while the place is captured, because that allocates too. A thread that
        // panics may hold the lock that the capture takes.
        if !std::thread::panicking()
            && let Some(count) = COUNTED.take()
        {
            if count == 0 {
                let place = Backtrace::force_capture();
                *FIRST.lock().unwrap_or_else(PoisonError::into_inner) = Some(place);
            }
            COUNTED.set(Some(count + 1));
        }
        // SAFETY: the caller upholds the contract of the allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of the allocator.
        unsafe { System.dealloc(place, layout) }
    }
}

/// Calls `call`, and panics with the place if it allocates.
fn without_allocation(what: &str, call: impl FnOnce()) {
    COUNTED.set(Some(0));
    call();
    let count = COUNTED.take().unwrap_or(0);
    let place = FIRST.lock().unwrap().take();
    assert_eq!(count, 0, "{what}: the first allocation:\n{}", place.unwrap());
}

/// Wire to the other node. It keeps what is sent until the other node receives it.
struct Wire {
    /// Address of the sender.
    from: SocketAddr,
    /// True if a relay is in between, and each datagram is on another channel.
    is_relayed: bool,
    received: RecvBatch,
}

impl UdpIo for Wire {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn receive(&mut self, _: Ready, _: &mut RecvBatch, _: &Drops) -> io::Result<()> {
        Ok(())
    }

    fn send_gso_batches(&mut self, _: Instant, bytes: &[u8], gso_batches: &[GsoBatch], _: &Drops) {
        for gso in gso_batches {
            let slot = self.received.next_slot();
            let (size, mut len) = (gso.segment_size.get(), 0);
            let to = &mut self.received.bytes_mut()[slot * SLOT_BYTES..][..SLOT_BYTES];
            for (number, datagram) in bytes[gso.start..][..gso.len].chunks(size).enumerate() {
                if self.is_relayed {
                    let channel = (slot * GSO_MAX_SEGMENTS + number + 1) as u64;
                    to[len..][..RELAYED_HEADER_BYTES].copy_from_slice(&relayed_header(channel));
                    len += RELAYED_HEADER_BYTES;
                }
                to[len..][..datagram.len()].copy_from_slice(datagram);
                len += datagram.len();
            }
            let size = if self.is_relayed { RELAYED_HEADER_BYTES + size } else { size };
            self.received.push(slot, self.from.into(), len, size);
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

/// A node, with the buffers of a worker.
struct Node {
    path: PacketPath,
    wire: Wire,
    read: TunBatch,
    out: SendBatch,
    writes: WriteBatch,
}

fn outer(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 51_830))
}

impl Node {
    fn new(number: u8, engine: Engine, now: Instant) -> Self {
        Self {
            path: PacketPath::new(StaticSecret::from([number; 32]), engine, None, now),
            wire: Wire { from: outer(number), is_relayed: false, received: RecvBatch::new(SLOTS) },
            read: TunBatch::new(SLOTS, 256),
            out: SendBatch::new(512 * 1024, 256),
            writes: WriteBatch::new(SLOTS),
        }
    }

    /// Receives what `from` has sent, and sends the answers.
    fn receive(&mut self, from: &mut Self, now: Instant) {
        let allowed = Coalesce { tcp: true, udp: true, ..Coalesce::default() };
        let received = &mut from.wire.received;
        self.writes.clear();
        self.path.inbound(now, allowed, received, &mut self.writes, &mut self.out);
        received.clear();
        self.wire.flush(now, &mut self.out, &Drops::default());
    }

    /// Fills the batch from the TUN with TCP super-packets of one flow each.
    fn read(&mut self, packets: usize, segments: usize) {
        let len = HEADERS + segments * PAYLOAD;
        self.read.clear();
        for number in 0..packets {
            let packet = &mut self.read.spare().unwrap()[HEADROOM..][..len];
            packet.fill(0);
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            packet[6] = 0x40;
            packet[8] = 64;
            packet[9] = 6;
            packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
            packet[16..20].copy_from_slice(&[10, 0, 0, 2]);
            packet[20..22].copy_from_slice(&(4_000 + number as u16).to_be_bytes());
            packet[32..34].copy_from_slice(&[0x50, 0x10]);
            let header = VnetHeader {
                flags: FLAG_NEEDS_CSUM,
                gso_type: GSO_TCPV4,
                hdr_len: HEADERS as u16,
                gso_size: PAYLOAD as u16,
                csum_start: 20,
                csum_offset: 16,
                ..VnetHeader::default()
            };
            self.read.commit(header, len);
        }
    }

    /// Sends what was read from the TUN.
    fn send(&mut self, now: Instant) {
        self.path.outbound(now, &mut self.read, &mut self.out, &mut self.wire);
    }
}

/// Returns two nodes with a session that the first initiated.
fn pair(engine: Engine, now: Instant) -> [Node; 2] {
    let mut nodes = [1, 2].map(|number| Node::new(number, engine, now));
    let keys = [nodes[0].path.public_key(), nodes[1].path.public_key()];
    for (me, you) in [(0, 1), (1, 0)] {
        let entry = PeerEntry {
            endpoint: Some(outer(you as u8 + 1).into()),
            prefixes: vec![format!("10.0.0.{}/32", you + 1).parse().unwrap()],
            ..PeerEntry::default()
        };
        let own = OwnNetworks::new([[10, 0, 0, me as u8 + 1].into()], [], []);
        nodes[me].path.apply(now, &PeerTable { peers: [(keys[you], entry)].into(), own });
    }
    let [a, b] = &mut nodes;
    a.path.initiate(now, &keys[1], vec![outer(2).into()], &mut a.out);
    a.wire.flush(now, &mut a.out, &Drops::default());
    b.receive(a, now);
    a.receive(b, now);
    b.receive(a, now);
    nodes
}

#[test]
fn a_batch_that_is_larger_than_all_before_allocates_nothing() {
    let now = Instant::now();
    for engine in [Engine::BORINGTUN, Engine::select(EngineChoice::Batch, Aead::Auto)] {
        let [mut a, mut b] = pair(engine, now);
        for is_relayed in [false, true] {
            a.wire.is_relayed = is_relayed;
            // What a thread or a first event needs once is allocated by the first batch.
            a.read(1, 2);
            a.send(now);
            b.receive(&mut a, now);
            assert_eq!(b.writes.frames().len(), 1, "a session, and a super-packet");
        }
        for is_relayed in [false, true] {
            let what = format!("{}, relayed: {is_relayed}", engine.name());
            a.wire.is_relayed = is_relayed;
            a.read(SLOTS, GSO_MAX_SEGMENTS);
            without_allocation(&format!("outbound, {what}"), || a.send(now));
            without_allocation(&format!("inbound, {what}"), || b.receive(&mut a, now));
            let packets: usize = b.writes.frames().iter().map(|frame| frame.pieces).sum();
            assert_eq!(packets, SLOTS * GSO_MAX_SEGMENTS, "every packet arrived");
        }
        assert_eq!(a.path.all_drops() + b.path.all_drops(), 0);
    }
}
