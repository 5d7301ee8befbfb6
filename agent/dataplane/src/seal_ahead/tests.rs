//! Tests of batches that helpers seal: nothing is lost, reordered or sent in clear.

use std::time::Duration;

use proptest::prelude::*;
use towline_core::path::Path;
use towline_wireguard::internals::{World, open, pair_of};
use towline_wireguard::{Aead, DATA_OVERHEAD, Engine, EngineChoice, Opened, Session, Single};

use super::*;

/// Longest time to wait for something that must happen.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Length of the packets in bytes.
const PACKET: usize = 1_024;
/// Smallest number of packets in a large batch.
const LARGE: usize = LEAST_BYTES / (PACKET + DATA_OVERHEAD) + 1;

/// Network side that keeps what is sent.
#[derive(Debug, Default)]
struct Sent(Vec<Vec<u8>>);

impl UdpIo for Sent {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn receive(&mut self, _: Ready, _: &mut RecvBatch, _: &Drops) -> io::Result<()> {
        Ok(())
    }

    fn send_gso_batches(&mut self, _: Instant, bytes: &[u8], gso_batches: &[GsoBatch], _: &Drops) {
        for gso in gso_batches {
            let datagrams = bytes[gso.start..][..gso.len].chunks(gso.segment_size.get());
            self.0.extend(datagrams.map(<[u8]>::to_vec));
        }
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

fn new_batch() -> SendBatch {
    SendBatch::new(256 * 1024, 256)
}

/// Session that fills batches, and the one of its peer.
struct Ends {
    now: Instant,
    ours: Session,
    theirs: Session,
    /// Number of packets that were laid out. Each packet contains its number.
    made: u32,
}

impl Ends {
    fn new() -> Self {
        let mut world = World::new(1);
        let engine = Engine::select(EngineChoice::Batch, Aead::Auto);
        let [ours, theirs] = pair_of([engine; 2], &mut world);
        Self { now: world.now, ours, theirs, made: 0 }
    }

    /// Lays out further packets in a batch.
    fn fill(&mut self, batch: &mut SendBatch, packets: usize) {
        let to = Path::direct(([192, 0, 2, 1], 1).into()).into();
        for _ in 0..packets {
            let packet = packet(self.made);
            self.made += 1;
            let sealed = self.ours.seal(self.now, &mut Single::new(&packet), &mut batch.to(&to));
            assert_eq!((sealed.bytes, sealed.lost), (PACKET + DATA_OVERHEAD, 0));
        }
    }

    /// Checks that the peer gets all packets that were laid out, in order.
    fn receive_all(&mut self, sent: &[Vec<u8>]) {
        assert_eq!(sent.len(), self.made as usize);
        let results = open(&mut self.theirs, self.now, sent);
        for (number, (opened, received)) in (0..).zip(results) {
            assert!(matches!(opened, Opened::Packet { .. }), "packet {number}: {opened:?}");
            assert!(received == packet(number), "packet {number} is another one");
        }
    }
}

/// Returns an IPv4 packet with this number.
fn packet(number: u32) -> Vec<u8> {
    let mut packet = vec![0; PACKET];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(PACKET as u16).to_be_bytes());
    packet[20..24].copy_from_slice(&number.to_be_bytes());
    packet
}

/// What a worker does after it flushed a batch.
#[derive(Debug, Clone, Copy)]
enum Then {
    /// It goes on with the next batch.
    GoesOn,
    /// It flushes again, with an empty batch.
    FlushesNothing,
    /// It has nothing more to do.
    Finishes,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Batches of any size, with any number of helpers at any speed, leave complete and in order.
    #[test]
    fn everything_is_sent_in_the_order_of_the_flushes(
        helpers in 1usize..4,
        steps in proptest::collection::vec(
            (
                prop_oneof![0..LARGE, LARGE..2 * LARGE],
                prop_oneof![
                    4 => Just(Then::GoesOn),
                    2 => Just(Then::FlushesNothing),
                    1 => Just(Then::Finishes),
                ],
            ),
            0..40,
        ),
    ) {
        let (drops, sealed) = (Drops::default(), Arc::default());
        let (faults, _) = FaultState::new();
        let mut ahead =
            SealAhead::start(Sent::default(), helpers, new_batch, &faults, &sealed).unwrap();
        let (mut ends, mut batch) = (Ends::new(), new_batch());
        for (packets, then) in steps {
            ends.fill(&mut batch, packets);
            ahead.flush(ends.now, &mut batch, &drops);
            prop_assert!(batch.is_empty());
            match then {
                Then::GoesOn => ahead.wake_helpers(),
                Then::FlushesNothing => ahead.flush(ends.now, &mut batch, &drops),
                Then::Finishes => {
                    ahead.finish(ends.now, &drops);
                    prop_assert!(!ahead.is_behind());
                    prop_assert_eq!(ahead.udp.0.len(), ends.made as usize);
                }
            }
        }
        ahead.finish(ends.now, &drops);
        ends.receive_all(&ahead.udp.0);
        prop_assert_eq!(drops.get(DropReason::NoSession), 0);
    }
}

#[test]
fn helpers_seal_while_the_worker_goes_on() {
    let (drops, sealed) = (Drops::default(), Arc::new(AtomicU64::new(0)));
    let (faults, _) = FaultState::new();
    let mut ahead = SealAhead::start(Sent::default(), 2, new_batch, &faults, &sealed).unwrap();
    let (mut ends, mut batch) = (Ends::new(), new_batch());
    ends.fill(&mut batch, LARGE);
    ahead.flush(ends.now, &mut batch, &drops);
    assert!(ahead.is_behind() && ahead.udp.0.is_empty());
    ahead.wake_helpers();
    let deadline = Instant::now() + TIMEOUT;
    while sealed.load(Ordering::Relaxed) == 0 {
        assert!(Instant::now() < deadline, "no helper seals");
        std::thread::yield_now();
    }
    ahead.finish(ends.now, &drops);
    ends.receive_all(&ahead.udp.0);
}

#[test]
fn small_batches_are_sent_at_once_unless_others_are_before_them() {
    let (drops, sealed) = (Drops::default(), Arc::default());
    let (faults, _) = FaultState::new();
    let mut ahead = SealAhead::start(Sent::default(), 1, new_batch, &faults, &sealed).unwrap();
    let (mut ends, mut batch) = (Ends::new(), new_batch());
    ends.fill(&mut batch, LARGE - 1);
    ahead.flush(ends.now, &mut batch, &drops);
    assert!(!ahead.is_behind());
    assert_eq!(ahead.udp.0.len(), LARGE - 1);
    for packets in [LARGE, 1] {
        ends.fill(&mut batch, packets);
        ahead.flush(ends.now, &mut batch, &drops);
    }
    ahead.finish(ends.now, &drops);
    ends.receive_all(&ahead.udp.0);
}

#[test]
fn without_helpers_every_batch_is_sent_at_once() {
    let (drops, sealed) = (Drops::default(), Arc::new(AtomicU64::new(0)));
    let (faults, _) = FaultState::new();
    let mut alone = SealAhead::start(Sent::default(), 0, new_batch, &faults, &sealed).unwrap();
    let (mut ends, mut batch) = (Ends::new(), new_batch());
    ends.fill(&mut batch, 2 * LARGE);
    alone.flush(ends.now, &mut batch, &drops);
    assert!(batch.is_empty() && !alone.is_behind());
    ends.receive_all(&alone.udp.0);
    assert_eq!(sealed.load(Ordering::Relaxed), 0);
}

/// A session that is replaced meanwhile takes nothing from a batch, which holds its key.
#[test]
fn a_batch_outlives_the_session_that_filled_it() {
    let (drops, sealed) = (Drops::default(), Arc::default());
    let (faults, _) = FaultState::new();
    let mut ahead = SealAhead::start(Sent::default(), 1, new_batch, &faults, &sealed).unwrap();
    let (mut ends, mut batch) = (Ends::new(), new_batch());
    ends.fill(&mut batch, LARGE);
    ahead.flush(ends.now, &mut batch, &drops);
    ends.ours = Ends::new().ours;
    ahead.finish(ends.now, &drops);
    ends.receive_all(&ahead.udp.0);
}

#[test]
fn a_helper_that_panics_is_a_fault_and_loses_one_batch() {
    let drops = Drops::default();
    let (faults, fault) = FaultState::new();
    let seal = |_: SendBatch| -> Sealed { panic!("the test makes the helper panic") };
    let mut ahead = Ahead::start(1, new_batch, &faults, seal).unwrap();
    let (mut ends, mut batch, mut udp) = (Ends::new(), new_batch(), Sent::default());
    ends.fill(&mut batch, LARGE);
    ahead.flush(&mut udp, ends.now, &mut batch, &drops);
    ahead.ring.wake();
    let deadline = Instant::now() + TIMEOUT;
    while fault.borrow().is_none() {
        assert!(Instant::now() < deadline, "no fault is set");
        std::thread::yield_now();
    }
    assert_eq!(*fault.borrow(), Some(crate::Fault::Panicked));
    ahead.finish(&mut udp, ends.now, &drops);
    assert!(udp.0.is_empty(), "nothing is sent in clear");
    assert_eq!(drops.get(DropReason::NoSession), LARGE as u64);
    // Until the data plane is started again, the worker seals alone.
    for _ in 0..10 {
        ends.fill(&mut batch, LARGE);
        ahead.flush(&mut udp, ends.now, &mut batch, &drops);
    }
    ahead.finish(&mut udp, ends.now, &drops);
    assert_eq!(udp.0.len(), 10 * LARGE);
    assert_eq!(drops.get(DropReason::NoSession), LARGE as u64);
}

#[test]
fn the_end_of_the_worker_ends_its_helpers() {
    let (faults, _) = FaultState::new();
    let (mut ends, mut batch, mut udp) = (Ends::new(), new_batch(), Sent::default());
    let mut ahead = Ahead::start(3, new_batch, &faults, Sealed::new).unwrap();
    ends.fill(&mut batch, LARGE);
    ahead.flush(&mut udp, ends.now, &mut batch, &Drops::default());
    let ring = ahead.ring.clone();
    drop(ahead);
    assert_eq!(Arc::strong_count(&ring), 1, "no thread has the ring any more");
}
