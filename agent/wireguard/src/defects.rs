//! Tests of the workarounds for gaps and defects of boringtun 0.7.1 that this package owns, one for
//! each, and what the batch engine does instead. Those that need timers, paths or the peer table are
//! in the data plane (`agent/dataplane/src/defects.rs`).
//!
//! | defect | workaround in | batch engine | test |
//! |---|---|---|---|
//! | a replay window of 1,024 | the data plane keeps the order | a window of 8,192 | here, `batch::replay` |
//! | no Reject-After-Messages | `single` | `batch::transport` | here, `conformance` |
//! | no padding to 16 bytes | [`Segments`](crate::Segments) are padded | the same | here |
//! | one counter limits handshakes, for addresses without ports | `admission` | the same | here |
//! | responses are limited too | `admission` | no limit | here |
//! | small buffers panic | `single` | lengths are checked | here |
//! | timestamps are 27 s ahead | none | those of WireGuard | `batch::timestamp` |
//! | a late response replaces a newer session | none | it is refused | `batch::tests` |
//! | a failed handshake ends a session on which the peer is heard | none | the session stays until it is old | `batch::tests` |
//! | a new state for another pre-shared key accepts initiations of before | none | their timestamps are kept | `batch::tests`, `tunnel` of the data plane |
//! | 256 handshakes reuse the index of a live session | none | indices in use are skipped | `batch::tests` |
//! | a session of any age seals until the timers advance | `single` | its age counts | `conformance` |
//! | the clock advances with the timers only | `single` | time is an argument | `batch::tests` |

use std::collections::BTreeSet;
use std::net::SocketAddr;

use proptest::prelude::*;
use x25519_dalek::StaticSecret;

use crate::internals::{self, Outbox, World, establish, pair_of};
use crate::{
    Admission, Aead, Answered, Buffers, DATA_OVERHEAD, Engine, EngineChoice, HANDSHAKE_BYTES,
    Message, Opened, PADDING, Refusal, Scratch, Sealed, Secrets, Session, Single, Tick,
};

/// Returns both engines.
fn engines() -> [Engine; 2] {
    [Engine::BORINGTUN, Engine::select(EngineChoice::Batch, Aead::Auto)]
}

fn secrets(number: u8, engine: Engine) -> Secrets {
    Secrets::with_engine(StaticSecret::from([number; 32]), engine)
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 51830))
}

/// Returns an IPv4 packet with an empty payload, padded.
fn packet() -> Vec<u8> {
    let mut packet = vec![0; 32];
    packet[0] = 0x45;
    packet[3] = 20;
    packet
}

fn seal(session: &mut Session, world: &World) -> Vec<u8> {
    internals::seal(session, world.now, &[packet()]).remove(0)
}

fn open(session: &mut Session, world: &World, datagram: &[u8]) -> Opened {
    internals::open(session, world.now, &[datagram.to_vec()]).remove(0).0
}

#[test]
fn a_cookie_is_valid_for_one_address_and_port() {
    for engine in engines() {
        let (mut world, theirs) = (World::new(1), secrets(2, engine));
        let mut session = Session::new(&secrets(1, engine), theirs.public_key(), None, 1);
        let (mut initiation, mut cookie) = ([0; HANDSHAKE_BYTES], [0; HANDSHAKE_BYTES]);
        let len = world.with(|inputs| session.initiate(inputs, &mut initiation));
        let admission = theirs.admit(address(1), &initiation[..len], true, &mut cookie);
        let Admission::Cookie(cookie_len) = admission else { panic!("{admission:?}") };
        let mut reply = [0; HANDSHAKE_BYTES];
        let cookie = &cookie[..cookie_len];
        let answered = world.with(|inputs| session.handshake(inputs, cookie, &mut reply));
        assert_eq!(answered, Answered::Cookie);
        let len = world.with(|inputs| session.initiate(inputs, &mut initiation));
        let mut admit = |from| theirs.admit(from, &initiation[..len], true, &mut reply);
        assert_eq!(admit(address(1)), Admission::Admitted);
        assert!(matches!(admit(address(2)), Admission::Cookie(_)));
        let mut other_port = address(1);
        other_port.set_port(4);
        assert!(matches!(admit(other_port), Admission::Cookie(_)));
    }
}

#[test]
fn a_counter_past_the_last_one_is_refused() {
    for engine in engines() {
        let mut world = World::new(1);
        let [mut a, mut b] = pair_of([engine; 2], &mut world);
        let mut sealed = seal(&mut a, &world);
        sealed[8..16].copy_from_slice(&(u64::MAX - (1 << 13)).to_le_bytes());
        let refused = Opened::Refused(Refusal::CounterExhausted);
        assert_eq!(open(&mut b, &world, &sealed), refused);
        // Below it, the message is only not authentic.
        sealed[8..16].copy_from_slice(&(u64::MAX - (1 << 13) - 1).to_le_bytes());
        assert_eq!(open(&mut b, &world, &sealed), Opened::Refused(Refusal::NotAuthentic));
    }
}

#[test]
fn responses_are_not_limited() {
    for engine in engines() {
        let mut world = World::new(1);
        let [mut a, mut b] = pair_of([engine; 2], &mut world);
        for _ in 0..300 {
            assert!(establish(&mut world, &mut a, &mut b));
        }
    }
}

#[test]
fn buffers_that_are_too_small_are_refused() {
    for engine in engines() {
        let mut world = World::new(1);
        let [mut a, mut b] = pair_of([engine; 2], &mut world);
        let own = secrets(2, engine);
        let mut initiation = [0; HANDSHAKE_BYTES];
        let len = world.with(|inputs| a.initiate(inputs, &mut initiation));
        let sealed = seal(&mut a, &world);
        for small in 0..HANDSHAKE_BYTES {
            let mut buffer = vec![0; small];
            assert_eq!(world.with(|inputs| a.initiate(inputs, &mut buffer)), 0);
            assert_eq!(a.keepalive(world.now, &mut buffer), 0);
            assert_eq!(world.with(|inputs| a.tick(inputs, &mut buffer)), Tick::Quiet);
            let refused = Answered::Refused(Refusal::InvalidHandshake);
            let initiation = &initiation[..len];
            let answered = world.with(|inputs| b.handshake(inputs, initiation, &mut buffer));
            assert_eq!(answered, refused);
            let admission = own.admit(address(1), initiation, false, &mut buffer);
            assert_eq!(admission, Admission::Refused(Refusal::InvalidHandshake));
            if small < sealed.len() {
                // Either buffer is too small.
                let message = Message { start: 0, len: sealed.len() };
                let (mut whole, mut part) = (sealed.clone(), sealed[..small].to_vec());
                for (sealed, plain) in [(&mut part, &mut buffer), (&mut whole, &mut Vec::new())] {
                    if engine.opens_in_place() && sealed.len() == message.len {
                        continue;
                    }
                    let scratch = &mut Scratch::default();
                    let buffers = Buffers { sealed, plain, scratch };
                    b.open(world.now, [message].into_iter(), buffers, |_, opened| {
                        assert!(matches!(opened, Opened::Refused(_)), "{small}: {opened:?}");
                    });
                }
                let mut outbox = Outbox::new(small);
                let sealed = a.seal(world.now, &mut Single::new(&packet()), &mut outbox);
                assert_eq!(sealed, Sealed::default());
            }
        }
        assert!(matches!(open(&mut b, &world, &sealed), Opened::Packet { .. }));
    }
}

#[test]
fn what_is_sealed_is_a_multiple_of_16_bytes() {
    // Segments are padded already, so the engine adds only its own overhead.
    for engine in engines() {
        let mut world = World::new(1);
        let [mut a, _] = pair_of([engine; 2], &mut world);
        let sealed = seal(&mut a, &world);
        assert_eq!(sealed.len(), packet().len() + DATA_OVERHEAD);
        assert!(sealed.len().is_multiple_of(PADDING));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// boringtun remembers the last 1,024 counters. In any order of arrival each counter is
    /// accepted at most once, and recent ones are accepted.
    #[test]
    fn counters_in_any_order_are_taken_once(
        order in proptest::collection::vec(0usize..1_600, 1..600),
    ) {
        const WINDOW: usize = 1_024 - 64;
        for engine in engines() {
            let mut world = World::new(1);
            let [mut a, mut b] = pair_of([engine; 2], &mut world);
            let sealed: Vec<Vec<u8>> = (0..1_600).map(|_| seal(&mut a, &world)).collect();
            let (mut taken, mut highest) = (BTreeSet::new(), 0);
            for number in &order {
                let opened = open(&mut b, &world, &sealed[*number]);
                if matches!(opened, Opened::Packet { .. }) {
                    prop_assert!(taken.insert(*number), "{} was taken twice", number);
                    highest = highest.max(*number);
                } else {
                    prop_assert_eq!(opened, Opened::Refused(Refusal::Replayed));
                    let is_recent =
                        engine.opens_in_place() || highest.saturating_sub(*number) < WINDOW;
                    prop_assert!(taken.contains(number) || !is_recent, "{} was refused", number);
                }
            }
        }
    }
}
