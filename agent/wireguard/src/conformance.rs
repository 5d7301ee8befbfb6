//! What every engine promises, with a peer on the same and on the other engine.

use std::time::Duration;

use towline_types::id::{PresharedKey, WireguardKey};
use x25519_dalek::StaticSecret;

use crate::internals::{World, answer, establish, initiate, open, pair_of, seal};
use crate::{
    Aead, Answered, Engine, EngineChoice, HANDSHAKE_BYTES, MessageKind, Opened, Refusal, Secrets,
    Session,
};

/// Calls `test` with each engine at each end.
fn matrix(test: impl Fn([Engine; 2])) {
    let engines = [
        Engine::BORINGTUN,
        Engine::select(EngineChoice::Batch, Aead::Auto),
        Engine::select(EngineChoice::Batch, Aead::Ring),
    ];
    for a in engines {
        for b in engines {
            test([a, b]);
        }
    }
}

/// Returns two ends without a session, with these pre-shared keys.
fn ends(engines: [Engine; 2], psk: [Option<PresharedKey>; 2]) -> [Session; 2] {
    let secrets = [(1, engines[0]), (2, engines[1])]
        .map(|(byte, engine)| Secrets::with_engine(StaticSecret::from([byte; 32]), engine));
    let [a, b] = &secrets;
    [
        Session::new(a, b.public_key(), psk[0].as_ref(), 1),
        Session::new(b, a.public_key(), psk[1].as_ref(), 2),
    ]
}

/// Returns an IPv4 packet of this length, padded to 16 bytes.
fn packet(len: usize, mark: u8) -> Vec<u8> {
    let mut packet = vec![mark; len];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    packet.resize(len.next_multiple_of(16), 0);
    packet
}

/// Asserts that a packet gets through in both directions.
fn assert_connected(world: &World, a: &mut Session, b: &mut Session) {
    assert_reaches(world, a, b);
    assert_reaches(world, b, a);
}

fn assert_reaches(world: &World, from: &mut Session, to: &mut Session) {
    let sealed = seal(from, world.now, &[packet(100, 9)]);
    let opened = open(to, world.now, &sealed);
    let [(Opened::Packet { len: 100, .. }, plain)] = &opened[..] else {
        panic!("{opened:?}");
    };
    assert_eq!(plain, &packet(100, 9)[..100]);
}

#[test]
fn a_handshake_gives_both_ends_a_session() {
    matrix(|engines| {
        for psk in [None, Some(PresharedKey([9; 32]))] {
            let [mut a, mut b] = ends(engines, [psk.clone(), psk]);
            let mut world = World::new(1);
            assert!(!a.is_ready(world.now) && !b.is_ready(world.now));
            let initiation = initiate(&mut world, &mut a);
            assert_eq!(MessageKind::of(&initiation), Some(MessageKind::Initiation));
            let (answered, response) = answer(&mut world, &mut b, &initiation);
            let Answered::Response { receiver, .. } = answered else { panic!("{answered:?}") };
            assert_eq!(receiver >> 8, 2, "the tunnel's part of the index");
            assert!(!b.is_ready(world.now), "the responder waits for a confirmation");
            let (answered, keepalive) = answer(&mut world, &mut a, &response);
            assert!(matches!(answered, Answered::Established { .. }), "{answered:?}");
            assert_eq!(MessageKind::of(&keepalive), Some(MessageKind::Data { receiver }));
            assert!(a.is_ready(world.now));
            assert_eq!(open(&mut b, world.now, &[keepalive])[0].0, Opened::Keepalive);
            assert!(b.is_ready(world.now));
            assert_connected(&world, &mut a, &mut b);
        }
    });
}

#[test]
fn the_first_data_confirms_the_session_too() {
    matrix(|engines| {
        let [mut a, mut b] = ends(engines, [None, None]);
        let mut world = World::new(1);
        let initiation = initiate(&mut world, &mut a);
        let (_, response) = answer(&mut world, &mut b, &initiation);
        answer(&mut world, &mut a, &response);
        assert_connected(&world, &mut a, &mut b);
    });
}

#[test]
fn an_old_session_is_not_ready_also_without_a_tick() {
    matrix(|engines| {
        let mut world = World::new(1);
        let [mut a, b] = pair_of(engines, &mut world);
        world.advance(Duration::from_secs(179));
        assert!(a.is_ready(world.now) && b.is_ready(world.now));
        world.advance(Duration::from_secs(1));
        assert!(!a.is_ready(world.now) && !b.is_ready(world.now));
        assert_eq!(a.keepalive(world.now, &mut [0; HANDSHAKE_BYTES]), 0);
    });
}

#[test]
fn different_pre_shared_keys_give_no_session() {
    matrix(|engines| {
        let psk = [Some(PresharedKey([9; 32])), None];
        let [mut a, mut b] = ends(engines, psk);
        let mut world = World::new(1);
        assert!(!establish(&mut world, &mut a, &mut b));
        assert!(!a.is_ready(world.now) && !b.is_ready(world.now));
    });
}

#[test]
fn packets_of_all_lengths_arrive_in_order_and_without_padding() {
    matrix(|engines| {
        let mut world = World::new(1);
        let [mut a, mut b] = pair_of(engines, &mut world);
        for lengths in [vec![20], (20..90).collect(), vec![1420; 60], vec![9000, 20, 65_000, 33]] {
            let packets: Vec<Vec<u8>> =
                (0u8..).zip(&lengths).map(|(mark, len)| packet(*len, mark)).collect();
            let sealed = seal(&mut a, world.now, &packets);
            assert_eq!(sealed.len(), packets.len());
            let opened = open(&mut b, world.now, &sealed);
            for ((_, plain), (sent, len)) in opened.iter().zip(packets.iter().zip(&lengths)) {
                assert_eq!(plain, &sent[..*len]);
            }
        }
    });
}

#[test]
fn a_forged_message_is_refused_and_harms_no_other() {
    matrix(|engines| {
        let mut world = World::new(1);
        let [mut a, mut b] = pair_of(engines, &mut world);
        let packets: Vec<Vec<u8>> = (0..40).map(|mark| packet(600, mark)).collect();
        let mut sealed = seal(&mut a, world.now, &packets);
        for (number, message) in sealed.iter_mut().enumerate().filter(|(number, _)| number % 3 == 0)
        {
            let at = 8 + (number * 37) % (message.len() - 8);
            // The upper bytes of a counter would put the message past the last one.
            let at = if (12..16).contains(&at) { 16 } else { at };
            message[at] ^= 1 << (number % 8);
        }
        let opened = open(&mut b, world.now, &sealed);
        for (number, (opened, plain)) in opened.iter().enumerate() {
            if number % 3 == 0 {
                let refused =
                    matches!(opened, Opened::Refused(Refusal::NotAuthentic | Refusal::Replayed));
                assert!(refused, "{number}: {opened:?}");
            } else {
                assert_eq!(plain, &packets[number][..600], "{number}");
            }
        }
    });
}

#[test]
fn a_message_is_opened_once() {
    matrix(|engines| {
        let mut world = World::new(1);
        let [mut a, mut b] = pair_of(engines, &mut world);
        let sealed = seal(&mut a, world.now, &[packet(100, 1), packet(200, 2)]);
        let [first, second] = &sealed[..] else { panic!("two messages") };
        let twice = [first.clone(), second.clone(), first.clone(), second.clone()];
        let opened = open(&mut b, world.now, &twice).into_iter().map(|(opened, _)| opened);
        let opened: Vec<Opened> = opened.collect();
        assert!(opened[..2].iter().all(|opened| matches!(opened, Opened::Packet { .. })));
        assert_eq!(opened[2..], [Opened::Refused(Refusal::Replayed); 2]);
        let again = open(&mut b, world.now, &sealed);
        assert!(again.iter().all(|(opened, _)| *opened == Opened::Refused(Refusal::Replayed)));
    });
}

#[test]
fn what_is_no_packet_is_refused_and_what_is_empty_is_a_keepalive() {
    matrix(|engines| {
        let mut world = World::new(1);
        let [mut a, mut b] = pair_of(engines, &mut world);
        let mut long = packet(100, 0);
        long[2..4].copy_from_slice(&113u16.to_be_bytes());
        let mut six = vec![0; 48];
        six[0] = 0x60;
        six[5] = 9;
        for bad in [vec![0; 16], vec![0x45; 16], long, six] {
            let sealed = seal(&mut a, world.now, &[bad]);
            let refused = Opened::Refused(Refusal::NoPacket);
            assert_eq!(open(&mut b, world.now, &sealed)[0].0, refused);
        }
        let mut message = [0; HANDSHAKE_BYTES];
        let len = a.keepalive(world.now, &mut message);
        assert_eq!(open(&mut b, world.now, &[message[..len].to_vec()])[0].0, Opened::Keepalive);
        assert_connected(&world, &mut a, &mut b);
    });
}

#[test]
fn data_of_no_session_is_refused() {
    matrix(|engines| {
        let mut world = World::new(1);
        let [mut a, mut b] = pair_of(engines, &mut world);
        let mut sealed = seal(&mut a, world.now, &[packet(100, 1)]);
        sealed[0][4] ^= 0x70;
        let opened = open(&mut b, world.now, &sealed)[0].0;
        assert_eq!(opened, Opened::Refused(Refusal::NoSession));
    });
}

#[test]
fn the_session_before_is_good_for_receiving() {
    matrix(|engines| {
        let mut world = World::new(1);
        let [mut a, mut b] = pair_of(engines, &mut world);
        let late = [(&mut a, 1), (&mut b, 2)]
            .map(|(session, mark)| seal(session, world.now, &[packet(100, mark)]));
        assert!(establish(&mut world, &mut b, &mut a), "the other end initiates");
        for (session, late) in [(&mut b, &late[0]), (&mut a, &late[1])] {
            assert!(matches!(open(session, world.now, late)[0].0, Opened::Packet { .. }));
        }
        assert_connected(&world, &mut a, &mut b);
    });
}

#[test]
fn ends_that_initiate_at_the_same_moment_are_connected() {
    matrix(|engines| {
        let [mut a, mut b] = ends(engines, [None, None]);
        let mut world = World::new(1);
        let [of_a, of_b] = [initiate(&mut world, &mut a), initiate(&mut world, &mut b)];
        let (_, to_b) = answer(&mut world, &mut a, &of_b);
        let (_, to_a) = answer(&mut world, &mut b, &of_a);
        let (_, from_a) = answer(&mut world, &mut a, &to_a);
        let (_, from_b) = answer(&mut world, &mut b, &to_b);
        open(&mut b, world.now, &[from_a]);
        open(&mut a, world.now, &[from_b]);
        assert_connected(&world, &mut a, &mut b);
        assert_connected(&world, &mut b, &mut a);
    });
}

#[test]
fn an_initiation_is_answered_once_and_only_if_it_is_the_newest() {
    matrix(|engines| {
        let [mut a, mut b] = ends(engines, [None, None]);
        let mut world = World::new(1);
        let [first, second] = [(); 2].map(|()| initiate(&mut world, &mut a));
        assert!(matches!(answer(&mut world, &mut b, &second).0, Answered::Response { .. }));
        for stale in [&first, &second] {
            let refused = Answered::Refused(Refusal::StaleHandshake);
            assert_eq!(answer(&mut world, &mut b, stale).0, refused);
        }
    });
}

#[test]
fn handshake_messages_of_others_are_refused() {
    matrix(|engines| {
        let mut world = World::new(1);
        let [mut a, mut b] = ends(engines, [None, None]);
        let stranger = Secrets::new(StaticSecret::from([3; 32]));
        let b_key =
            WireguardKey(x25519_dalek::PublicKey::from(&StaticSecret::from([2; 32])).to_bytes());
        let mut other = Session::new(&stranger, b_key, None, 3);
        let initiation = initiate(&mut world, &mut other);
        let refused = Answered::Refused(Refusal::InvalidHandshake);
        assert_eq!(answer(&mut world, &mut b, &initiation).0, refused);
        // For another node.
        let wrong = Answered::Refused(Refusal::WrongMac);
        assert_eq!(answer(&mut world, &mut a, &initiation).0, wrong);
        // A response and a cookie that nobody asked for.
        let of_a = initiate(&mut world, &mut a);
        let (_, response) = answer(&mut world, &mut b, &of_a);
        let [mut fresh, _] = ends(engines, [None, None]);
        assert_eq!(answer(&mut world, &mut fresh, &response).0, refused);
        let cookie = [&[3, 0, 0, 0][..], &[7; 60]].concat();
        assert_eq!(answer(&mut world, &mut fresh, &cookie).0, refused);
        let mut changed = response.clone();
        changed[50] ^= 1;
        assert!(matches!(answer(&mut world, &mut a, &changed).0, Answered::Refused(_)));
        assert!(matches!(answer(&mut world, &mut a, &response).0, Answered::Established { .. }));
    });
}

#[test]
fn messages_of_any_length_and_kind_cause_no_panic() {
    matrix(|engines| {
        let mut world = World::new(1);
        let [mut a, _] = pair_of(engines, &mut world);
        for len in 0..200 {
            for kind in 0..6u8 {
                let mut message = vec![0x5a; len];
                message.iter_mut().zip([kind, 0, 0, 0]).for_each(|(to, from)| *to = from);
                assert!(matches!(answer(&mut world, &mut a, &message).0, Answered::Refused(_)));
                let opened = open(&mut a, world.now, &[message]);
                assert!(matches!(opened[..], [(Opened::Refused(_), _)]));
            }
        }
    });
}
