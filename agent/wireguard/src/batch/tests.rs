//! Tests of the batch engine on virtual time: timers, the end of sessions, and indices.

use std::time::Duration;

use towline_types::id::PresharedKey;
use x25519_dalek::StaticSecret;

use super::timers::{
    KEEPALIVE_TIMEOUT, REKEY_AFTER, REKEY_ATTEMPT, REKEY_ON_RECEIVE, REKEY_TIMEOUT,
};
use super::transport::{REJECT_AFTER, REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES};
use crate::internals::{Outbox, World, answer, establish, initiate, open, pair_of, seal};
use crate::{
    Aead, Answered, Engine, EngineChoice, HANDSHAKE_BYTES, MessageKind, Opened, Refusal, Sealed,
    Secrets, Segments, Session, Tick,
};

const SECOND: Duration = Duration::from_secs(1);

fn engine() -> Engine {
    Engine::select(EngineChoice::Batch, Aead::Auto)
}

fn pair() -> (World, [Session; 2]) {
    let mut world = World::new(7);
    let pair = pair_of([engine(); 2], &mut world);
    (world, pair)
}

/// Returns two ends without a session.
fn strangers() -> (World, [Session; 2]) {
    let secrets = [1, 2].map(|byte| Secrets::with_engine(StaticSecret::from([byte; 32]), engine()));
    let [a, b] = &secrets;
    let sessions =
        [Session::new(a, b.public_key(), None, 1), Session::new(b, a.public_key(), None, 2)];
    (World::new(7), sessions)
}

fn packet() -> Vec<u8> {
    let mut packet = vec![0; 32];
    packet[0] = 0x45;
    packet[3] = 20;
    packet
}

/// Ticks each quarter of a second until `time` has passed. Returns what was due, with the time since
/// the start.
fn ticks(world: &mut World, session: &mut Session, time: Duration) -> Vec<(Duration, Tick)> {
    let start = world.now;
    let mut due = Vec::new();
    while world.now < start + time {
        world.advance(SECOND / 4);
        let mut message = [0; HANDSHAKE_BYTES];
        let tick = world.with(|inputs| session.tick(inputs, &mut message));
        if tick != Tick::Quiet {
            due.push((world.now - start, tick));
        }
    }
    due
}

fn send(world: &World, from: &mut Session, to: &mut Session) -> Opened {
    let sealed = seal(from, world.now, &[packet()]);
    open(to, world.now, &sealed).first().map_or(Opened::Keepalive, |(opened, _)| *opened)
}

#[test]
fn an_initiation_is_repeated_and_given_up() {
    let (mut world, [mut a, _]) = strangers();
    assert!(ticks(&mut world, &mut a, 10 * SECOND).is_empty(), "nothing starts by itself");
    initiate(&mut world, &mut a);
    let due = ticks(&mut world, &mut a, 2 * REKEY_ATTEMPT);
    let repeated = (REKEY_ATTEMPT.as_secs() / REKEY_TIMEOUT.as_secs()) as usize - 1;
    let (last, initiations) = due.split_last().unwrap();
    assert_eq!(initiations.len(), repeated);
    for (number, (time, tick)) in (1..).zip(initiations) {
        assert_eq!((*time, *tick), (REKEY_TIMEOUT * number, Tick::Initiation(HANDSHAKE_BYTES)));
    }
    assert_eq!(*last, (REKEY_ATTEMPT, Tick::Expired));
    // It can start again.
    initiate(&mut world, &mut a);
    assert!(!ticks(&mut world, &mut a, REKEY_TIMEOUT).is_empty());
}

#[test]
fn a_handshake_that_fails_ends_no_session_on_which_the_peer_is_heard() {
    let (mut world, [mut a, mut b]) = pair();
    world.advance(60 * SECOND);
    // No response arrives.
    initiate(&mut world, &mut a);
    let start = world.now;
    while world.now < start + REKEY_ATTEMPT + SECOND {
        assert!(matches!(send(&world, &mut b, &mut a), Opened::Packet { .. }));
        let due = ticks(&mut world, &mut a, SECOND / 4);
        assert!(due.iter().all(|(_, tick)| *tick != Tick::Expired), "{due:?}");
    }
    assert!(a.is_ready(world.now));
    assert!(matches!(send(&world, &mut a, &mut b), Opened::Packet { .. }));
    // The session ends when it is old, and then a failed handshake is the end.
    let due = ticks(&mut world, &mut a, 3 * REKEY_ATTEMPT);
    assert!(!a.is_ready(world.now));
    assert_eq!(due.last().map(|(_, tick)| *tick), Some(Tick::Expired));
}

#[test]
fn a_handshake_that_fails_ends_the_session_with_a_silent_peer() {
    let (mut world, [mut a, _]) = pair();
    initiate(&mut world, &mut a);
    let due = ticks(&mut world, &mut a, REKEY_ATTEMPT);
    assert_eq!(due.last().map(|(_, tick)| *tick), Some(Tick::Expired));
    assert!(!a.is_ready(world.now));
}

#[test]
fn an_attempt_that_was_not_ticked_ends_too() {
    let (mut world, [mut a, mut b]) = strangers();
    let initiation = initiate(&mut world, &mut a);
    let (_, response) = answer(&mut world, &mut b, &initiation);
    world.advance(REKEY_ATTEMPT);
    let refused = Answered::Refused(Refusal::InvalidHandshake);
    assert_eq!(answer(&mut world, &mut a, &response).0, refused, "it is too late");
    initiate(&mut world, &mut a);
    let due = ticks(&mut world, &mut a, REKEY_TIMEOUT);
    assert_eq!(due, [(REKEY_TIMEOUT, Tick::Initiation(HANDSHAKE_BYTES))]);
}

#[test]
fn the_initiator_renews_a_session_that_it_sends_with() {
    let (mut world, [mut a, mut b]) = pair();
    // Nothing was sent, so nothing is renewed.
    let mut quiet = world.clone();
    assert!(ticks(&mut quiet, &mut a, REKEY_AFTER + SECOND).is_empty());
    let (mut world_b, mut due) = (world.clone(), Vec::new());
    for _ in 0..13 {
        assert!(matches!(send(&world, &mut a, &mut b), Opened::Packet { .. }));
        assert!(matches!(send(&world, &mut b, &mut a), Opened::Packet { .. }));
        due.extend(ticks(&mut world, &mut a, 10 * SECOND).into_iter().map(|(_, tick)| tick));
        assert!(ticks(&mut world_b, &mut b, 10 * SECOND).is_empty(), "the responder waits");
    }
    assert!(due.contains(&Tick::Initiation(HANDSHAKE_BYTES)), "{due:?}");
}

#[test]
fn the_initiator_renews_a_session_that_it_only_receives_with() {
    let (mut world, [mut a, mut b]) = pair();
    let mut at = Vec::new();
    let start = world.now;
    while world.now < start + REKEY_ON_RECEIVE + SECOND {
        send(&world, &mut b, &mut a);
        let due = ticks(&mut world, &mut a, SECOND / 4);
        let initiations = due.iter().filter(|(_, tick)| matches!(tick, Tick::Initiation(_)));
        at.extend(initiations.map(|_| world.now - start));
    }
    assert_eq!(at, [REKEY_ON_RECEIVE]);
}

#[test]
fn a_state_for_another_pre_shared_key_follows_the_initiations_of_before() {
    let (mut world, [mut a, mut b]) = strangers();
    let recorded = initiate(&mut world, &mut a);
    assert!(matches!(answer(&mut world, &mut b, &recorded).0, Answered::Response { .. }));
    let [mut next_a, mut next_b] = strangers().1;
    next_a.follow(a.history().unwrap());
    next_b.follow(b.history().unwrap());
    let stale = Answered::Refused(Refusal::StaleHandshake);
    assert_eq!(answer(&mut world, &mut next_b, &recorded).0, stale);
    // The timestamps of this node increase although its clock was set back.
    world.unix_time -= 60 * SECOND;
    let initiation = initiate(&mut world, &mut next_a);
    assert!(matches!(answer(&mut world, &mut next_b, &initiation).0, Answered::Response { .. }));
    // A peer that started again may have an earlier clock.
    let mut history = next_b.history().unwrap().clone();
    history.forget_peer();
    next_b.follow(&history);
    assert!(matches!(answer(&mut world, &mut next_b, &recorded).0, Answered::Response { .. }));
}

#[test]
fn a_silent_peer_is_asked_with_a_handshake() {
    let (mut world, [mut a, _]) = pair();
    seal(&mut a, world.now, &[packet()]);
    let due = ticks(&mut world, &mut a, KEEPALIVE_TIMEOUT + REKEY_TIMEOUT);
    assert_eq!(due, [(15 * SECOND, Tick::Initiation(HANDSHAKE_BYTES))]);
    // An answer of any kind ends the silence.
    let (mut world, [mut a, mut b]) = pair();
    send(&world, &mut a, &mut b);
    let mut keepalive = [0; HANDSHAKE_BYTES];
    let len = b.keepalive(world.now, &mut keepalive);
    open(&mut a, world.now, &[keepalive[..len].to_vec()]);
    assert!(ticks(&mut world, &mut a, 60 * SECOND).is_empty());
}

#[test]
fn received_data_is_acknowledged() {
    let (mut world, [mut a, mut b]) = pair();
    send(&world, &mut a, &mut b);
    let due = ticks(&mut world, &mut b, 60 * SECOND);
    assert_eq!(due, [(KEEPALIVE_TIMEOUT, Tick::Keepalive(32))]);
}

#[test]
fn a_session_ends_by_age() {
    let (mut world, [mut a, mut b]) = pair();
    let early = seal(&mut a, world.now, &[packet(), packet()]);
    world.advance(REJECT_AFTER - SECOND);
    assert!(matches!(open(&mut b, world.now, &early[..1])[0].0, Opened::Packet { .. }));
    world.advance(SECOND);
    assert_eq!(open(&mut b, world.now, &early[1..])[0].0, Opened::Refused(Refusal::NoSession));
    assert!(seal(&mut a, world.now, &[packet()]).is_empty());
    assert_eq!(a.keepalive(world.now, &mut [0; HANDSHAKE_BYTES]), 0);
    assert!(!a.is_ready(world.now) && !b.is_ready(world.now), "before the next tick");
    for session in [&mut a, &mut b] {
        ticks(&mut world, session, SECOND / 4);
        assert!(!session.is_ready(world.now));
    }
}

#[test]
fn a_session_ends_by_count() {
    let (mut world, [mut a, mut b]) = pair();
    let epoch = a.batch().epochs().current_mut().unwrap();
    epoch.set_counter(REKEY_AFTER_MESSAGES - 1);
    assert!(ticks(&mut world, &mut a, SECOND).is_empty());
    send(&world, &mut a, &mut b);
    let due = ticks(&mut world, &mut a, SECOND / 4);
    assert_eq!(due, [(SECOND / 4, Tick::Initiation(HANDSHAKE_BYTES))]);
    let epoch = a.batch().epochs().current_mut().unwrap();
    epoch.set_counter(REJECT_AFTER_MESSAGES - 1);
    let sealed = seal(&mut a, world.now, &[packet(), packet()]);
    assert_eq!((sealed.len(), a.is_ready(world.now)), (1, false));
    assert!(matches!(open(&mut b, world.now, &sealed)[0].0, Opened::Packet { .. }));
}

#[test]
fn a_late_response_does_not_replace_a_newer_session() {
    let (mut world, [mut a, mut b]) = strangers();
    let [first, second] = [(); 2].map(|()| {
        let initiation = initiate(&mut world, &mut a);
        answer(&mut world, &mut b, &initiation).1
    });
    let (answered, keepalive) = answer(&mut world, &mut a, &second);
    assert!(matches!(answered, Answered::Established { .. }));
    open(&mut b, world.now, &[keepalive]);
    let refused = Answered::Refused(Refusal::InvalidHandshake);
    assert_eq!(answer(&mut world, &mut a, &first).0, refused);
    assert_eq!(answer(&mut world, &mut a, &second).0, refused, "one answer is used once");
    assert!(matches!(send(&world, &mut a, &mut b), Opened::Packet { .. }));
    assert!(matches!(send(&world, &mut b, &mut a), Opened::Packet { .. }));
}

#[test]
fn the_response_to_an_earlier_initiation_is_accepted() {
    let (mut world, [mut a, mut b]) = strangers();
    let [first, second] = [(); 2].map(|()| initiate(&mut world, &mut a));
    let (_, response) = answer(&mut world, &mut b, &first);
    let (answered, _) = answer(&mut world, &mut a, &response);
    assert!(matches!(answered, Answered::Established { .. }));
    // The later one is still open, and its session is newer for both.
    let (_, response) = answer(&mut world, &mut b, &second);
    let (answered, keepalive) = answer(&mut world, &mut a, &response);
    assert!(matches!(answered, Answered::Established { .. }));
    open(&mut b, world.now, &[keepalive]);
    assert!(matches!(send(&world, &mut a, &mut b), Opened::Packet { .. }));
    assert!(matches!(send(&world, &mut b, &mut a), Opened::Packet { .. }));
}

#[test]
fn indices_of_live_sessions_are_not_used_again() {
    let (mut world, [mut a, mut b]) = pair();
    let early = seal(&mut b, world.now, &[packet()]);
    let live = MessageKind::of(&early[0]).unwrap();
    for _ in 0..600 {
        let initiation = initiate(&mut world, &mut a);
        let index = u32::from_le_bytes(initiation[4..8].try_into().unwrap());
        assert_ne!(live, MessageKind::Data { receiver: index });
        assert_eq!(index >> 8, 1, "the tunnel's part stays");
    }
    assert!(matches!(open(&mut a, world.now, &early)[0].0, Opened::Packet { .. }));
    assert!(establish(&mut world, &mut a, &mut b));
}

#[test]
fn without_randomness_no_handshake_starts() {
    let (mut world, [mut a, mut b]) = strangers();
    let initiation = initiate(&mut world, &mut a);
    let (now, unix_time) = (world.now, world.unix_time);
    let mut none = crate::Inputs { now, unix_time, random: &mut || None };
    assert_eq!(a.initiate(&mut none, &mut [0; HANDSHAKE_BYTES]), 0);
    let answered = b.handshake(&mut none, &initiation, &mut [0; HANDSHAKE_BYTES]);
    assert_eq!(answered, Answered::Refused(Refusal::InvalidHandshake));
    assert!(matches!(answer(&mut world, &mut b, &initiation).0, Answered::Response { .. }));
}

#[test]
fn a_key_of_small_order_completes_no_handshake() {
    let secrets = Secrets::with_engine(StaticSecret::from([1; 32]), engine());
    let psk = PresharedKey([3; 32]);
    let peer = towline_types::id::WireguardKey([0; 32]);
    let mut session = Session::new(&secrets, peer, Some(&psk), 1);
    let mut world = World::new(1);
    let mut message = [0; HANDSHAKE_BYTES];
    assert_eq!(world.with(|inputs| session.initiate(inputs, &mut message)), 0);
}

/// Segments that are longer than they say, which loses them.
struct TooLong(usize);

impl Segments for TooLong {
    fn next_len(&self) -> Option<usize> {
        (self.0 > 0).then_some(16)
    }

    fn take(&mut self) -> &[u8] {
        self.0 = self.0.saturating_sub(1);
        &[0x45; 32]
    }
}

#[test]
fn a_segment_that_does_not_fit_in_its_space_is_lost_and_no_keepalive() {
    let (world, [mut a, _]) = pair();
    let mut outbox = Outbox::new(1_024);
    let sealed = a.seal(world.now, &mut TooLong(2), &mut outbox);
    assert_eq!(sealed, Sealed { bytes: 0, lost: 2 });
    assert!(outbox.take().is_empty());
}
