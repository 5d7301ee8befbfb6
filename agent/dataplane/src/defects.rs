//! Tests of the workarounds for gaps and defects of boringtun 0.7.1, one for each. Some tests are
//! next to the workaround.
//!
//! | defect | workaround in | test |
//! |---|---|---|
//! | no jitter on repeated initiations | `tunnel` | here |
//! | two ends with keepalives compete to initiate | `tunnel` | here |
//! | keepalives on busy tunnels | `tunnel` | `tunnel`, `tests/dataplane` |
//! | a replay window of 1,024 | `worker`: order is kept | here |
//! | no Reject-After-Messages | `session` | `tests/dataplane` |
//! | no padding to 16 bytes | `split` | here |
//! | one counter limits handshakes, for addresses without ports | `session`, `pipeline` | here, `tests/dataplane` |
//! | responses are limited too | `session` | here |
//! | a pre-shared key cannot change | `tunnel`, `table` | `tests/dataplane` |
//! | an expired tunnel stays expired | `tunnel`, core | here, `agent/core/tests` |
//! | small buffers panic | `session` | here |
//! | indices reveal the number of peers | `table` | here |
//! | roaming on cookie replies | `tunnel` | here |
//! | a source is checked only against the prefixes of its own peer | `pipeline` | `tests/dataplane` |
//! | a clock that was set back locks a peer out | `tunnel`, `table` | `tests/dataplane` |

use std::collections::BTreeSet;
use std::iter::once;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use towline_core::path::Path;
use towline_core::peer_table::{PeerEntry, PeerTable};
use towline_types::id::WireguardKey;
use x25519_dalek::StaticSecret;

use super::session::{
    Admission, Answered, DATA_OVERHEAD, HANDSHAKE_BYTES, Opened, PADDING, Refusal, Sealed, Secrets,
    Segments, Session, Sink, Tick,
};
use super::table::Table;
use super::testing::Side;

fn secrets(number: u8) -> Arc<Secrets> {
    Arc::new(Secrets::new(StaticSecret::from([number; 32])))
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 51830))
}

/// Single payload to seal.
struct Once(Option<Vec<u8>>, Vec<u8>);

impl Once {
    fn new(payload: Vec<u8>) -> Self {
        Self(Some(payload), Vec::new())
    }
}

impl Segments for Once {
    fn next_len(&self) -> Option<usize> {
        self.0.as_ref().map(Vec::len)
    }

    fn take(&mut self) -> &[u8] {
        self.1 = self.0.take().unwrap_or_default();
        &self.1
    }
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

/// Returns two engines with a session that the first initiated.
fn engines() -> [Session; 2] {
    let [ours, theirs] = [1, 2].map(secrets);
    let mut a = Session::new(&ours, theirs.public_key(), None, 1);
    let mut b = Session::new(&theirs, ours.public_key(), None, 2);
    establish(&mut a, &mut b);
    [a, b]
}

fn establish(a: &mut Session, b: &mut Session) {
    let (mut initiation, mut response, mut confirmation) =
        ([0; HANDSHAKE_BYTES], [0; HANDSHAKE_BYTES], [0; HANDSHAKE_BYTES]);
    let len = a.initiate(&mut initiation);
    let Answered::Response { len, .. } = b.handshake(&initiation[..len], &mut response) else {
        panic!("no response");
    };
    let Answered::Established { len } = a.handshake(&response[..len], &mut confirmation) else {
        panic!("no session");
    };
    let mut plain = [0; HANDSHAKE_BYTES];
    b.open(once((&confirmation[..len], &mut plain[..len])), |_, opened| {
        assert_eq!(opened, Opened::Keepalive);
    });
    assert!(a.is_ready() && b.is_ready());
}

fn seal(session: &mut Session) -> Vec<u8> {
    let mut message = Space::new(4096);
    session.seal(&mut Once::new(packet()), &mut message);
    message.sealed
}

fn open(session: &mut Session, datagram: &[u8]) -> Opened {
    let mut plain = vec![0; datagram.len()];
    let mut found = None;
    session.open(once((datagram, &mut *plain)), |_, opened| found = Some(opened));
    found.unwrap()
}

fn side(own: &Arc<Secrets>, peer: WireguardKey, number: u8) -> Side {
    Side::new(own, peer, 7, Path::direct(address(number)))
}

fn sides() -> [Side; 2] {
    let [ours, theirs] = [1, 2].map(secrets);
    let keys = [ours.public_key(), theirs.public_key()];
    [side(&ours, keys[1], 1), side(&theirs, keys[0], 2)]
}

/// Delivers sent datagrams in both directions until neither side sends any. Returns the number of
/// initiations of each side.
fn deliver(now: Instant, sides: &mut [Side; 2]) -> [usize; 2] {
    let ways = [Path::direct(address(1)), Path::direct(address(2))];
    let mut initiations = [0; 2];
    loop {
        let sent = [sides[0].sent(), sides[1].sent()];
        if sent.iter().all(Vec::is_empty) {
            return initiations;
        }
        for (me, sent) in sent.iter().enumerate() {
            initiations[me] += sent.iter().filter(|datagram| datagram[0] == 1).count();
            for datagram in sent {
                sides[1 - me].take(now, ways[me], ways[me], datagram);
            }
        }
    }
}

#[test]
fn two_ends_with_keepalives_do_not_fight_to_initiate() {
    let mut sides = sides();
    let start = sides[0].started;
    sides[0].with(start, |tunnel, context| tunnel.initiate(vec![address(2).into()], context));
    assert_eq!(deliver(start, &mut sides), [1, 0]);
    let mut later = [0; 2];
    let keepalive = Some(Duration::from_secs(5));
    for quarter in 1..=4 * 130 {
        let now = start + Duration::from_millis(250) * quarter;
        for (me, side) in sides.iter_mut().enumerate() {
            let known = Some(address(2 - me as u8).into());
            side.with(now, |tunnel, context| tunnel.tick(known, keepalive, context));
        }
        let initiations = deliver(now, &mut sides);
        later = [later[0] + initiations[0], later[1] + initiations[1]];
    }
    assert_eq!(later, [1, 0], "only the initiator renews the session after two minutes");
}

#[test]
fn repeated_initiations_of_many_tunnels_are_spread() {
    let own = secrets(1);
    let late: BTreeSet<Duration> = (0..50)
        .map(|number| {
            let mut side = side(&own, secrets(100 + number).public_key(), 1);
            let now = side.started;
            side.with(now, |tunnel, context| tunnel.initiate(vec![address(2).into()], context));
            side.tunnel.repeats_after().unwrap()
        })
        .collect();
    assert!(late.len() > 25, "{late:?}");
    let (first, last) = (*late.first().unwrap(), *late.last().unwrap());
    assert!(first >= Duration::from_secs(5) && last < Duration::from_millis(5_333));
    assert!(last - first > Duration::from_millis(100), "{late:?}");
}

#[test]
fn a_cookie_reply_moves_nobody_and_its_cookie_is_used() {
    let theirs = secrets(2);
    let mut side = side(&secrets(1), theirs.public_key(), 1);
    let (now, home, away) = (side.started, Path::direct(address(2)), Path::direct(address(66)));
    side.with(now, |tunnel, context| tunnel.initiate(vec![home], context));
    let initiation = side.sent().remove(0);
    assert_eq!(initiation[132..], [0; 16], "no cookie yet");
    let mut cookie = [0; HANDSHAKE_BYTES];
    let Admission::Cookie(len) = theirs.admit(address(1), &initiation, true, &mut cookie) else {
        panic!("no cookie");
    };
    side.take(now, away, home, &cookie[..len]);
    assert!(side.observations().is_empty());
    let later = now + Duration::from_secs(1);
    side.with(later, |tunnel, context| tunnel.initiate(vec![home], context));
    let initiation = side.sent().remove(0);
    assert_ne!(initiation[132..], [0; 16]);
    let mut reply = [0; HANDSHAKE_BYTES];
    assert_eq!(theirs.admit(address(1), &initiation, true, &mut reply), Admission::Admitted);
    // The cookie is valid for that address and port only.
    let mut other = address(1);
    other.set_port(4);
    assert!(matches!(theirs.admit(other, &initiation, true, &mut reply), Admission::Cookie(_)));
}

#[test]
fn a_tunnel_that_was_given_up_comes_back_when_told_to() {
    let mut sides = sides();
    let start = sides[0].started;
    sides[0].with(start, |tunnel, context| tunnel.initiate(vec![address(9).into()], context));
    sides[0].sent();
    // After a long time nothing happens by itself, and a new handshake still works.
    let now = start + Duration::from_secs(1_000);
    let live =
        sides[0].with(now, |tunnel, context| tunnel.tick(Some(address(2).into()), None, context));
    assert!(!live && sides[0].sent().is_empty());
    sides[0].with(now, |tunnel, context| tunnel.initiate(vec![address(2).into()], context));
    deliver(now, &mut sides);
    assert!(sides.iter().all(|side| side.tunnel.is_ready()));
}

#[test]
fn responses_are_not_limited() {
    let [mut a, mut b] = engines();
    for _ in 0..300 {
        establish(&mut a, &mut b);
    }
}

#[test]
fn buffers_that_are_too_small_are_refused() {
    let [mut a, mut b] = engines();
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
        let sealed = a.seal(&mut Once::new(packet()), &mut Space::new(small));
        assert_eq!(sealed, Sealed::default());
    }
    assert!(matches!(open(&mut b, &sealed), Opened::Packet { .. }));
}

#[test]
fn what_is_sealed_is_a_multiple_of_16_bytes() {
    // Segments are padded already, so the engine adds only its own overhead.
    let [mut a, _] = engines();
    let sealed = seal(&mut a);
    assert_eq!(sealed.len(), packet().len() + DATA_OVERHEAD);
    assert!(sealed.len().is_multiple_of(PADDING));
}

#[test]
fn indices_tell_nothing() {
    let entry = PeerEntry {
        endpoint: None,
        prefixes: Vec::new(),
        keepalive: None,
        preshared_key: None,
        mtu: 1420,
        fragment: false,
        boot_epoch: 0,
        is_static: false,
    };
    let peers = (0..64).map(|number| (WireguardKey([number; 32]), entry.clone())).collect();
    let table = Table::default().next(&PeerTable { peers, ..PeerTable::default() }, &secrets(1));
    let mut sent = BTreeSet::new();
    let mut neighbours = 0;
    for peer in &table.peers {
        let mut side = side(&secrets(1), peer.key, 1);
        let now = side.started;
        let mut tunnel = peer.tunnel.lock();
        side.with(now, |_, context| tunnel.initiate(vec![address(2).into()], context));
        let initiation = side.sent().remove(0);
        let index = u32::from_le_bytes(initiation[4..8].try_into().unwrap()) >> 8;
        neighbours += usize::from(sent.contains(&(index.wrapping_sub(1))));
        assert!(sent.insert(index), "two peers share an index");
    }
    assert!(neighbours < 3, "{sent:?}");
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
        let [mut a, mut b] = engines();
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
