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
    assert!(pings(&us.drain()).is_empty());
    assert_eq!(us.mesh.counters().signals_refused, 1_000);
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
