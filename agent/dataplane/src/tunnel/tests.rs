//! Tests of a tunnel at given times: handshakes, keepalives, and packets that wait.

use super::*;
use crate::testing::Side;
use towline_wireguard::{Aead, Engine, EngineChoice};
use x25519_dalek::StaticSecret;

const KEEPALIVE: Option<Duration> = Some(Duration::from_secs(25));

/// Returns two sides that know each other's key. The first has boringtun, the second the batch
/// engine.
fn pair() -> [Side; 2] {
    let batch = Engine::select(EngineChoice::Batch, Aead::Auto);
    let secrets = [(1, Engine::BORINGTUN), (2, batch)].map(|(byte, engine)| {
        Arc::new(Secrets::with_engine(StaticSecret::from([byte; 32]), engine))
    });
    [0, 1].map(|me| {
        let address = Path::direct(([192, 0, 2, me as u8], 51830).into());
        Side::new(&secrets[me], secrets[1 - me].public_key(), 100 + me as u32, address)
    })
}

/// Receives datagrams from `from`, which is also the known endpoint.
fn take_all(side: &mut Side, now: Instant, from: Path, datagrams: &[Vec<u8>]) {
    datagrams.iter().for_each(|datagram| side.take(now, from, from, datagram));
}

/// Delivers sent datagrams in both directions until neither side sends any.
fn deliver(now: Instant, [a, b]: &mut [Side; 2]) {
    loop {
        let (to_b, to_a) = (a.sent(), b.sent());
        if to_b.is_empty() && to_a.is_empty() {
            return;
        }
        take_all(b, now, a.address, &to_b);
        take_all(a, now, b.address, &to_a);
    }
}

/// Returns two sides with a session that the first initiated.
fn connected_pair() -> ([Side; 2], Instant) {
    let mut sides = pair();
    let now = sides[0].started;
    let to = vec![sides[1].address];
    sides[0].with(now, |tunnel, context| tunnel.initiate(to, context));
    deliver(now, &mut sides);
    assert!(sides.iter().all(|side| side.tunnel.is_ready(now)));
    (sides, now)
}

/// Seals an inner packet. Returns what is sent.
fn seal(side: &mut Side, now: Instant) -> Vec<Vec<u8>> {
    let mut packet = [0; 32];
    packet[0] = 0x45;
    packet[3] = 20;
    let to = side.address;
    let Side { tunnel, out, drops, .. } = side;
    tunnel.seal(&mut Single::new(&packet), &to.into(), out, drops, now);
    side.sent()
}

fn tick(side: &mut Side, now: Instant, keepalive: Option<Duration>) -> Vec<MessageKind> {
    let known = Some(Path::direct(([192, 0, 2, 77], 51830).into()));
    side.with(now, |tunnel, context| tunnel.tick(known, keepalive, context));
    side.sent().iter().map(|datagram| MessageKind::of(datagram).unwrap()).collect()
}

#[test]
fn who_initiated_renews_a_session_that_only_keepalives_hold_open() {
    let ([mut initiator, mut responder], start) = connected_pair();
    let due = start + REKEY_AFTER;
    let initiates = |sent: &[MessageKind]| sent.contains(&MessageKind::Initiation);
    assert!(!initiates(&tick(&mut initiator, due - Duration::from_secs(1), KEEPALIVE)));
    assert!(!initiates(&tick(&mut responder, due, KEEPALIVE)), "the responder must not initiate");
    assert!(!initiates(&tick(&mut initiator, due, None)), "no renewal without keepalives");
    assert!(initiates(&tick(&mut initiator, due, KEEPALIVE)));
    let again = tick(&mut initiator, due + Duration::from_secs(1), KEEPALIVE);
    assert!(!initiates(&again), "a handshake is under way");
}

#[test]
fn after_both_initiated_at_once_each_renews_the_session_that_it_seals_with() {
    let mut sides = pair();
    let start = sides[0].started;
    let homes = [sides[1].address, sides[0].address];
    for (side, home) in sides.iter_mut().zip(homes) {
        side.with(start, |tunnel, context| tunnel.initiate(vec![home], context));
    }
    deliver(start, &mut sides);
    for side in &mut sides {
        let early = tick(side, start + REKEY_AFTER - Duration::from_secs(1), KEEPALIVE);
        assert!(!early.contains(&MessageKind::Initiation), "{early:?}");
        let due = tick(side, start + REKEY_AFTER, KEEPALIVE);
        assert!(due.contains(&MessageKind::Initiation), "{due:?}");
    }
}

#[test]
fn what_arrives_on_the_session_before_a_rebuild_is_acknowledged_there() {
    let ([mut a, mut b], start) = connected_pair();
    b.tunnel.rebuild(start, Some(PresharedKey([5; 32])), 200, false);
    let sent = seal(&mut a, start);
    take_all(&mut b, start, a.address, &sent);
    let due = start + Duration::from_secs(10);
    assert!(tick(&mut b, due - Duration::from_millis(1), None).is_empty());
    let sent = tick(&mut b, due, None);
    assert!(matches!(sent[..], [MessageKind::Data { .. }]), "{sent:?}");
}

#[test]
fn a_session_that_was_replaced_is_not_renewed() {
    // The batch engine, whose time is given, is the second.
    let (mut sides, start) = connected_pair();
    let home = sides[0].address;
    seal(&mut sides[1], start);
    let psk = PresharedKey([5; 32]);
    for (side, index) in sides.iter_mut().zip([200, 201]) {
        side.tunnel.rebuild(start, Some(psk.clone()), index, false);
    }
    let silent = start + Duration::from_secs(15);
    // Without a new session the silence of the peer leads to a handshake.
    let sent = tick(&mut sides[1], silent, None);
    assert!(matches!(sent[..], [MessageKind::Initiation]), "{sent:?}");
    sides[1].observations();
    sides[1].with(silent, |tunnel, context| tunnel.initiate(vec![home], context));
    deliver(silent, &mut sides);
    assert!(sides[1].observations().contains(&Observation::Handshake { from: home }));
    let mut later = Vec::new();
    for second in 1..15 {
        later.extend(tick(&mut sides[1], silent + Duration::from_secs(second), None));
    }
    assert!(later.is_empty(), "{later:?}");
}

#[test]
fn a_keepalive_waits_until_nothing_was_sent_for_long() {
    let ([mut side, _], start) = connected_pair();
    let second = Duration::from_secs(1);
    assert!(tick(&mut side, start + 24 * second, KEEPALIVE).is_empty());
    let busy = start + 24 * second;
    let to = side.address;
    let Side { tunnel, out, drops, .. } = &mut side;
    tunnel.seal(&mut Single::new(&[0x45; 32]), &to.into(), out, drops, busy);
    side.sent();
    assert!(tick(&mut side, busy + 24 * second, KEEPALIVE).is_empty(), "the tunnel is not idle");
    let sent = tick(&mut side, busy + 25 * second, KEEPALIVE);
    assert!(matches!(sent[..], [MessageKind::Data { .. }]), "{sent:?}");
    assert!(tick(&mut side, busy + 26 * second, KEEPALIVE).is_empty());
}

#[test]
fn without_a_session_a_keepalive_starts_nothing() {
    let [mut side, _] = pair();
    let now = side.started;
    assert!(tick(&mut side, now + Duration::from_secs(100), KEEPALIVE).is_empty());
    assert!(side.observations().is_empty());
}

#[test]
fn a_session_is_reported_when_both_have_it() {
    let mut sides = pair();
    let now = sides[0].started;
    let [a, b] = &mut sides;
    let address = b.address;
    a.with(now, |tunnel, context| tunnel.initiate(vec![address], context));
    let initiation = a.sent();
    take_all(b, now, a.address, &initiation);
    assert!(!b.tunnel.is_ready(now) && b.observations().is_empty(), "not confirmed yet");
    deliver(now, &mut sides);
    let [a, b] = &mut sides;
    assert_eq!(a.observations(), [Observation::Handshake { from: b.address }]);
    assert_eq!(b.observations(), [Observation::Handshake { from: a.address }]);
}

#[test]
fn an_answer_from_where_nothing_was_sent_completes_no_handshake() {
    let [mut a, mut b] = pair();
    let (now, home) = (a.started, b.address);
    let elsewhere = Path::direct(([192, 0, 2, 99], 1).into());
    a.with(now, |tunnel, context| tunnel.enqueue(&[0x45; 32], context));
    a.with(now, |tunnel, context| tunnel.initiate(vec![home], context));
    let initiation = a.sent();
    take_all(&mut b, now, a.address, &initiation);
    for response in b.sent() {
        a.take(now, elsewhere, home, &response);
    }
    let roamed = Observation::Roamed { from: elsewhere };
    assert_eq!(a.observations(), [Observation::Wanted, roamed]);
    assert_eq!(a.tunnel.waiting(), 1, "no packet goes there");
}

#[test]
fn an_answer_to_the_initiation_before_the_last_completes_the_handshake() {
    let [mut a, mut b] = pair();
    let (now, home) = (a.started, b.address);
    let elsewhere = Path::direct(([192, 0, 2, 99], 1).into());
    a.with(now, |tunnel, context| tunnel.initiate(vec![home], context));
    let initiation = a.sent();
    take_all(&mut b, now, a.address, &initiation);
    let response = b.sent();
    a.with(now, |tunnel, context| tunnel.initiate(vec![elsewhere], context));
    take_all(&mut a, now, home, &response);
    assert!(a.observations().contains(&Observation::Handshake { from: home }));
}

#[test]
fn a_handshake_is_reported_for_the_path_on_which_it_was_answered() {
    let [mut a, mut b] = pair();
    let (now, home) = (a.started, a.address);
    let elsewhere = Path::direct(([192, 0, 2, 99], 1).into());
    let to = vec![b.address];
    a.with(now, |tunnel, context| tunnel.initiate(to, context));
    let initiation = a.sent();
    take_all(&mut b, now, home, &initiation);
    let response = b.sent();
    take_all(&mut a, now, b.address, &response);
    for confirmation in a.sent() {
        b.take(now, elsewhere, home, &confirmation);
    }
    let handshake = Observation::Handshake { from: home };
    assert_eq!(b.observations(), [handshake, Observation::Roamed { from: elsewhere }]);
}

#[test]
fn a_recorded_initiation_stays_stale_when_the_pre_shared_key_changes() {
    let [mut a, mut b] = pair();
    let (now, home, to) = (a.started, a.address, vec![b.address]);
    let elsewhere = Path::direct(([192, 0, 2, 99], 1).into());
    a.with(now, |tunnel, context| tunnel.initiate(to, context));
    let recorded = a.sent().remove(0);
    b.take(now, home, home, &recorded);
    b.sent();
    b.tunnel.rebuild(now, Some(PresharedKey([5; 32])), 200, false);
    b.take(now, elsewhere, home, &recorded);
    assert_eq!(b.drops.get(DropReason::StaleHandshake), 1);
    assert!(b.sent().is_empty() && b.observations().is_empty());
    // A change before anything was sent with the new key loses nothing either.
    b.tunnel.rebuild(now, None, 201, false);
    b.tunnel.rebuild(now, Some(PresharedKey([6; 32])), 202, false);
    b.take(now, elsewhere, home, &recorded);
    assert_eq!(b.drops.get(DropReason::StaleHandshake), 2);
    // A peer that started again may have an earlier clock.
    b.tunnel.rebuild(now, Some(PresharedKey([7; 32])), 203, true);
    b.take(now, home, home, &recorded);
    assert_eq!(b.sent().len(), 1, "it is answered");
}

#[test]
fn the_same_command_twice_is_one_initiation() {
    let [mut side, other] = pair();
    let now = side.started;
    let both = vec![other.address, side.address];
    let mut initiate = |now, to: &[Path]| {
        side.with(now, |tunnel, context| tunnel.initiate(to.to_vec(), context));
        side.sent().len()
    };
    assert_eq!(initiate(now, &both), 2);
    assert_eq!(initiate(now, &both[..1]), 0);
    assert_eq!(initiate(now, &[Path::direct(([192, 0, 2, 9], 1).into())]), 1);
    assert_eq!(initiate(now + SAME_COMMAND, &both), 2);
}

#[test]
fn what_nobody_asked_for_is_refused() {
    let ([mut side, mut other], now) = connected_pair();
    let forged = [[2, 0, 0, 0].as_slice(), &[7; 88]].concat();
    let reply = [[3, 0, 0, 0].as_slice(), &[7; 60]].concat();
    take_all(&mut side, now, other.address, &[forged, reply]);
    assert_eq!(side.drops.get(DropReason::InvalidHandshake), 2);
    assert!(side.observations().iter().all(|what| matches!(what, Observation::Handshake { .. })));
    assert!(other.sent().is_empty());
}

#[test]
fn packets_wait_no_longer_than_they_are_good_for() {
    let [mut side, _] = pair();
    let now = side.started;
    side.with(now, |tunnel, context| tunnel.enqueue(&[0x45; 32], context));
    assert_eq!(side.observations(), [Observation::Wanted]);
    let late = now + WAITING_TIME - Duration::from_millis(1);
    tick(&mut side, late, None);
    assert_eq!(side.drops.get(DropReason::QueueExpired), 0);
    side.with(late, |tunnel, context| tunnel.enqueue(&[0x45; 32], context));
    tick(&mut side, now + WAITING_TIME, None);
    assert_eq!(side.drops.get(DropReason::QueueExpired), 1);
}

/// Ticks whose loss is tested are missed until this time after the start.
const LATE: Duration = Duration::from_secs(300);

/// Ticks without a keepalive, while the other side is known. Returns whether the tunnel needs more.
fn is_live(side: &mut Side, now: Instant) -> bool {
    let known = Some(side.address);
    side.with(now, |tunnel, context| tunnel.tick(known, None, context))
}

#[test]
fn a_session_that_expired_without_ticks_is_reported_by_the_next() {
    let ([_, mut side], start) = connected_pair();
    side.observations();
    assert!(is_live(&mut side, start + Duration::from_secs(179)));
    let late = start + LATE;
    assert!(!is_live(&mut side, late));
    assert_eq!(side.observations(), [Observation::SessionExpired]);
    assert!(!is_live(&mut side, late) && side.observations().is_empty(), "once");
    side.with(late, |tunnel, context| tunnel.enqueue(&[0x45; 32], context));
    assert_eq!(side.observations(), [Observation::Wanted]);
}

#[test]
fn packets_wait_also_if_they_come_before_the_tick_that_finds_the_session_expired() {
    let (mut sides, start) = connected_pair();
    let (late, home) = (start + LATE, sides[0].address);
    for side in &mut sides {
        assert!(!side.tunnel.is_ready(late), "a packet is queued and not sealed");
    }
    let side = &mut sides[1];
    side.observations();
    side.with(late, |tunnel, context| tunnel.enqueue(&[0x45; 32], context));
    assert!(is_live(side, late), "a packet waits");
    side.with(late, |tunnel, context| tunnel.enqueue(&[0x45; 32], context));
    assert_eq!(side.observations(), [Observation::Wanted, Observation::SessionExpired]);
    assert_eq!(side.tunnel.waiting(), 2);
    side.with(late, |tunnel, context| tunnel.initiate(vec![home], context));
    deliver(late, &mut sides);
    assert_eq!(sides[1].tunnel.waiting(), 0);
    assert_eq!(sides[1].drops.get(DropReason::QueueExpired), 0);
}

#[test]
fn a_handshake_of_the_peer_survives_the_tick_that_finds_the_session_expired() {
    let (mut sides, start) = connected_pair();
    let (late, home) = (start + LATE, sides[1].address);
    sides[1].observations();
    let [a, b] = &mut sides;
    a.with(late, |tunnel, context| tunnel.initiate(vec![home], context));
    let initiation = a.sent();
    take_all(b, late, a.address, &initiation);
    let response = b.sent();
    assert!(is_live(b, late));
    assert_eq!(b.observations(), [Observation::SessionExpired]);
    take_all(a, late, home, &response);
    deliver(late, &mut sides);
    let [a, b] = &mut sides;
    assert_eq!(b.observations(), [Observation::Handshake { from: a.address }]);
}

#[test]
fn a_handshake_that_ended_without_ticks_is_reported_by_the_next() {
    let [_, mut side] = pair();
    let start = side.started;
    let late = start + LATE;
    let home = side.address;
    let enqueue = |side: &mut Side, now| {
        side.with(now, |tunnel, context| tunnel.enqueue(&[0x45; 32], context));
    };
    enqueue(&mut side, start);
    side.with(start, |tunnel, context| tunnel.initiate(vec![home], context));
    side.sent();
    assert_eq!(side.observations(), [Observation::Wanted]);
    assert!(!is_live(&mut side, late) && side.sent().is_empty());
    assert_eq!(side.observations(), [Observation::SessionExpired]);
    assert_eq!((side.tunnel.waiting(), side.drops.get(DropReason::QueueExpired)), (0, 1));
    enqueue(&mut side, late);
    assert_eq!(side.observations(), [Observation::Wanted], "it is reported again");
}

#[test]
fn packets_without_a_handshake_are_reported_again() {
    let [_, mut side] = pair();
    let start = side.started;
    let enqueue = |side: &mut Side, seconds: u64| {
        let now = start + Duration::from_secs(seconds);
        side.with(now, |tunnel, context| tunnel.enqueue(&[0x45; 32], context));
        side.observations()
    };
    assert_eq!(enqueue(&mut side, 0), [Observation::Wanted]);
    is_live(&mut side, start + WAITING_TIME);
    assert_eq!(side.tunnel.waiting(), 0, "the packet waited in vain");
    assert_eq!(enqueue(&mut side, 20), [Observation::Wanted]);
    // Also while there is always a packet that waits.
    let reports: usize = (21..=50).map(|second| enqueue(&mut side, second).len()).sum();
    assert_eq!(reports, 3);
    let home = side.address;
    side.with(start + Duration::from_secs(50), |tunnel, context| {
        tunnel.initiate(vec![home], context);
    });
    assert!(enqueue(&mut side, 70).is_empty(), "a handshake is under way");
}

#[test]
fn a_tunnel_is_recorded_when_it_needs_ticks_that_needed_none() {
    let [_, mut side] = pair();
    let (start, home) = (side.started, side.address);
    let initiate = |side: &mut Side, now: Instant| {
        side.with(now, |tunnel, context| tunnel.initiate(vec![home], context));
    };
    assert!(!is_live(&mut side, start) && !side.newly_live.take());
    side.with(start, |tunnel, context| tunnel.enqueue(&[0x45; 32], context));
    assert!(side.newly_live.take());
    initiate(&mut side, start);
    assert!(!side.newly_live.take(), "it needs them already");
    let late = start + Duration::from_secs(600);
    assert!(!is_live(&mut side, late));
    initiate(&mut side, late);
    assert!(side.newly_live.take());
}
