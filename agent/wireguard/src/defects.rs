//! Tests of the workarounds for gaps and defects of boringtun 0.7.1 that this package owns, one for
//! each. Those that need timers, paths or the peer table are in the data plane
//! (`agent/dataplane/src/defects.rs`).
//!
//! | defect | workaround in | test |
//! |---|---|---|
//! | a replay window of 1,024 | the data plane keeps the order | here |
//! | no Reject-After-Messages | `session` | here |
//! | no padding to 16 bytes | [`Segments`] are padded | here |
//! | one counter limits handshakes, for addresses without ports | `admission` | here |
//! | responses are limited too | `admission` | here |
//! | small buffers panic | `session` | here |

use std::collections::BTreeSet;
use std::iter::once;
use std::net::SocketAddr;

use proptest::prelude::*;
use x25519_dalek::StaticSecret;

use crate::internals::{establish, pair};
use crate::{
    Admission, Answered, DATA_OVERHEAD, HANDSHAKE_BYTES, Opened, PADDING, Refusal, Sealed, Secrets,
    Session, Single, Sink, Tick,
};

fn secrets(number: u8) -> Secrets {
    Secrets::new(StaticSecret::from([number; 32]))
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 51830))
}

/// Space for one message.
struct Space {
    bytes: Vec<u8>,
    sealed: Vec<u8>,
}

impl Space {
    fn new(len: usize) -> Self {
        Self { bytes: vec![0; len], sealed: Vec::new() }
    }
}

impl Sink for Space {
    fn place(&mut self, len: usize) -> Option<&mut [u8]> {
        Some(&mut *self.bytes).filter(|bytes| bytes.len() >= len)
    }

    fn commit(&mut self, len: usize) {
        self.sealed = self.bytes[..len].to_vec();
    }
}

/// Returns an IPv4 packet with an empty payload, padded.
fn packet() -> Vec<u8> {
    let mut packet = vec![0; 32];
    packet[0] = 0x45;
    packet[3] = 20;
    packet
}

fn seal(session: &mut Session) -> Vec<u8> {
    let mut message = Space::new(4096);
    session.seal(&mut Single::new(&packet()), &mut message);
    message.sealed
}

fn open(session: &mut Session, datagram: &[u8]) -> Opened {
    let mut plain = vec![0; datagram.len()];
    let mut found = None;
    session.open(once((datagram, &mut *plain)), |_, opened| found = Some(opened));
    found.unwrap()
}

#[test]
fn a_cookie_is_valid_for_one_address_and_port() {
    let theirs = secrets(2);
    let mut session = Session::new(&secrets(1), theirs.public_key(), None, 1);
    let (mut initiation, mut cookie) = ([0; HANDSHAKE_BYTES], [0; HANDSHAKE_BYTES]);
    let len = session.initiate(&mut initiation);
    let admission = theirs.admit(address(1), &initiation[..len], true, &mut cookie);
    let Admission::Cookie(cookie_len) = admission else { panic!("{admission:?}") };
    let mut reply = [0; HANDSHAKE_BYTES];
    assert_eq!(session.handshake(&cookie[..cookie_len], &mut reply), Answered::Cookie);
    let len = session.initiate(&mut initiation);
    let mut admit = |from| theirs.admit(from, &initiation[..len], true, &mut reply);
    assert_eq!(admit(address(1)), Admission::Admitted);
    assert!(matches!(admit(address(2)), Admission::Cookie(_)));
    let mut other_port = address(1);
    other_port.set_port(4);
    assert!(matches!(admit(other_port), Admission::Cookie(_)));
}

#[test]
fn a_counter_past_the_last_one_is_refused() {
    let [mut a, mut b] = pair();
    let mut sealed = seal(&mut a);
    sealed[8..16].copy_from_slice(&(u64::MAX - (1 << 13)).to_le_bytes());
    assert_eq!(open(&mut b, &sealed), Opened::Refused(Refusal::CounterExhausted));
    // Below it, the message is only not authentic.
    sealed[8..16].copy_from_slice(&(u64::MAX - (1 << 13) - 1).to_le_bytes());
    assert_eq!(open(&mut b, &sealed), Opened::Refused(Refusal::NotAuthentic));
}

#[test]
fn responses_are_not_limited() {
    let [mut a, mut b] = pair();
    for _ in 0..300 {
        assert!(establish(&mut a, &mut b));
    }
}

#[test]
fn buffers_that_are_too_small_are_refused() {
    let [mut a, mut b] = pair();
    let own = secrets(2);
    let mut initiation = [0; HANDSHAKE_BYTES];
    let len = a.initiate(&mut initiation);
    let sealed = seal(&mut a);
    for small in 0..HANDSHAKE_BYTES {
        let mut buffer = vec![0; small];
        assert_eq!(a.initiate(&mut buffer), 0);
        assert_eq!(a.keepalive(&mut buffer), 0);
        assert_eq!(a.tick(&mut buffer), Tick::Quiet);
        let refused = Answered::Refused(Refusal::InvalidHandshake);
        assert_eq!(b.handshake(&initiation[..len], &mut buffer), refused);
        let admission = own.admit(address(1), &initiation[..len], false, &mut buffer);
        assert_eq!(admission, Admission::Refused(Refusal::InvalidHandshake));
        if small < sealed.len() {
            b.open(once((&*sealed, &mut *buffer)), |_, opened| {
                assert!(matches!(opened, Opened::Refused(_)), "{small}: {opened:?}");
            });
        }
        let sealed = a.seal(&mut Single::new(&packet()), &mut Space::new(small));
        assert_eq!(sealed, Sealed::default());
    }
    assert!(matches!(open(&mut b, &sealed), Opened::Packet { .. }));
}

#[test]
fn what_is_sealed_is_a_multiple_of_16_bytes() {
    // Segments are padded already, so the engine adds only its own overhead.
    let [mut a, _] = pair();
    let sealed = seal(&mut a);
    assert_eq!(sealed.len(), packet().len() + DATA_OVERHEAD);
    assert!(sealed.len().is_multiple_of(PADDING));
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
        let [mut a, mut b] = pair();
        let sealed: Vec<Vec<u8>> = (0..1_600).map(|_| seal(&mut a)).collect();
        let (mut taken, mut highest) = (BTreeSet::new(), 0);
        for number in order {
            let opened = open(&mut b, &sealed[number]);
            if matches!(opened, Opened::Packet { .. }) {
                prop_assert!(taken.insert(number), "{} was taken twice", number);
                highest = highest.max(number);
            } else {
                prop_assert_eq!(opened, Opened::Refused(Refusal::Replayed));
                let recent = highest.saturating_sub(number) < WINDOW;
                prop_assert!(taken.contains(&number) || !recent, "{} was refused", number);
            }
        }
    }
}
