//! What others may send or claim, and what it costs: bounded work, and a counter that shows it.

use super::*;

#[test]
fn a_pong_that_comes_from_elsewhere_or_twice_counts_for_nothing() {
    let mut us = Us::up(PUBLIC);
    let before = us.peer(2).rtt;
    let pings = pings(&us.run(Duration::from_millis(1_010)));
    let (to, transaction) = pings[0];
    let pong = ReceivedProbe::Pong { transaction, observed: addr(PRIVATE) };
    us.mesh.probe_received(us.now, key(2), path("198.51.100.1:1"), pong);
    assert_eq!(us.peer(2).rtt, before);
    us.mesh.probe_received(us.now, key(2), to, pong);
    let once = us.peer(2).rtt;
    us.now += Duration::from_millis(500);
    us.mesh.probe_received(us.now, key(2), to, pong);
    assert_eq!(us.peer(2).rtt, once);
}

#[test]
fn a_replayed_signal_and_a_flood_of_them_cost_nothing() {
    let mut us = Us::new(1);
    us.upsert(peer(2));
    us.run(Duration::from_secs(1));
    let candidates = vec![candidate(PUBLIC)];
    let signal = Signal::CallMe { boot_epoch: 1, number: 7, candidates };
    us.mesh.signal_received(us.now, id(2), signal.clone());
    assert!(!pings(&us.run(Duration::from_millis(1))).is_empty());
    for _ in 0..1_000 {
        us.mesh.signal_received(us.now, id(2), signal.clone());
    }
    // Nor one that was overtaken by a later one.
    let candidates = vec![candidate(OTHER)];
    let earlier = Signal::CallMe { boot_epoch: 1, number: 6, candidates };
    us.mesh.signal_received(us.now, id(2), earlier);
    assert!(pings(&us.drain()).is_empty());
    assert_eq!(us.mesh.counters().signals_refused, 1_001);
}

#[test]
fn a_victim_whose_address_many_peers_advertise_gets_a_bounded_number_of_datagrams() {
    let mut us = Us::new(1);
    let candidates: Vec<String> = (1..=32).map(|port| format!("192.0.2.9:{port}")).collect();
    let candidates: Vec<&str> = candidates.iter().map(String::as_str).collect();
    for number in 0..60 {
        us.upsert(numbered(number).candidates(&candidates));
    }
    let outputs = us.run(Duration::from_secs(10));
    let sent = pings(&outputs).len() + handshakes(&outputs).iter().map(Vec::len).sum::<usize>();
    assert!(sent <= 500, "{sent}");
    assert!(us.mesh.counters().probes_withheld > 1_000);
}

#[test]
fn pings_that_are_replayed_from_elsewhere_leave_the_path_in_use_its_answers() {
    let mut us = Us::up(PUBLIC);
    let ping = ReceivedProbe::Ping { transaction: 7 };
    for _ in 0..10_000 {
        us.mesh.probe_received(us.now, key(2), path(OTHER), ping);
    }
    let pongs = |outputs: &[Output], from: &str| {
        let from = path(from);
        outputs.iter().filter(|o| matches!(o, Output::Pong { to, .. } if *to == from)).count()
    };
    assert!(pongs(&us.drain(), OTHER) <= 60);
    assert!(us.mesh.counters().pings_refused > 9_000);
    us.mesh.probe_received(us.now, key(2), path(PUBLIC), ping);
    assert_eq!(pongs(&us.drain(), PUBLIC), 1);
    assert_eq!(us.peer(2).path, Some(path(PUBLIC)));
}

#[test]
fn a_relay_that_opens_channels_without_end_costs_a_bounded_number_of_datagrams() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.upsert(peer(9).relay().candidates(&[OTHER]));
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.upsert(peer(3));
    let requests = relayed(&us.run(Duration::from_millis(50)));
    let transaction = requests.iter().find_map(|request| match request {
        RelayRequest::Register { transaction, .. } => Some(*transaction),
        RelayRequest::Open { .. } => None,
    });
    let (transaction, lifetime) = (transaction.unwrap(), Duration::from_secs(60));
    let registered = RelayAnswer::Registered { transaction, lifetime };
    us.mesh.relay_received(us.now, key(9), path(OTHER), registered);
    us.mesh.observe(us.now, key(2), Observation::Handshake { from: path(PUBLIC) });
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_millis(500));
    for number in 0..10_000 {
        for peer in [2, 3] {
            let answer = RelayAnswer::Incoming { peer: key(peer), channel: ChannelId(number) };
            us.mesh.relay_received(us.now, key(9), path(OTHER), answer);
        }
    }
    let outputs = us.drain();
    let sent = pings(&outputs).len() + handshakes(&outputs).len();
    assert!(sent <= 200, "{sent}");
    assert!(us.mesh.counters().relay_answers_refused > 19_000);
    assert_eq!(us.peer(2).path, Some(path(PUBLIC)));
}

#[test]
fn a_reflector_that_lies_anew_each_time_makes_us_advertise_one_address_and_settles_nothing() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.mesh.set_reflectors(us.now, vec![addr("203.0.113.1:7443")]);
    let mut advertised = 0;
    for lie in 0..100u8 {
        let asked = stun(&us.run(Duration::from_secs(25)));
        for (to, transaction) in asked {
            let victim = SocketAddr::from(([192, 0, 2, lie], 53));
            us.mesh.stun_received(us.now, None, to, transaction, victim);
        }
        for output in us.drain() {
            if let Output::Advertise(list) = output {
                assert!(list.len() <= 2, "{list:?}");
                advertised += 1;
            }
        }
    }
    assert!(advertised <= 100, "{advertised}");
    assert!(us.mesh.counters().stun_refused >= 1, "an answer that came after the next request");
    assert_eq!(us.mesh.mapping(), None, "one reflector alone is not believed");
}
