//! What others may send or claim, and what it costs: bounded work, and a counter that shows it.

use super::*;
use towline_types::frame::{PROBE_BYTES, STAMPED_PROBE_BYTES};
use towline_types::node::{Candidate, CandidateKind};

#[test]
fn a_pong_that_comes_from_elsewhere_or_twice_counts_for_nothing() {
    let mut us = Us::up(PUBLIC);
    let before = us.peer(2).rtt;
    let pings = pings(&us.run(Duration::from_millis(1_010)));
    let (to, transaction) = pings[0];
    us.message(2, path("198.51.100.1:1"), pong(transaction));
    assert_eq!(us.peer(2).rtt, before);
    us.message(2, to, pong(transaction));
    let once = us.peer(2).rtt;
    us.now += Duration::from_millis(500);
    us.message(2, to, pong(transaction));
    assert_eq!(us.peer(2).rtt, once);
}

#[test]
fn a_replayed_signal_and_a_flood_of_them_cost_nothing() {
    let mut us = Us::new(1);
    us.upsert(peer(2));
    us.run(Duration::from_secs(1));
    us.signal(call_me(7, PUBLIC));
    assert!(!pings(&us.run(Duration::from_millis(1))).is_empty());
    for _ in 0..1_000 {
        us.signal(call_me(7, PUBLIC));
    }
    // Nor one that was overtaken by a later one.
    us.signal(call_me(6, OTHER));
    assert!(pings(&us.drain()).is_empty());
    assert_eq!(us.mesh.counters().signals_refused, 1_001);
}

#[test]
fn a_victim_whose_address_many_peers_advertise_gets_a_bounded_number_of_datagrams() {
    let mut us = Us::new(1);
    let candidates: Vec<String> = (1..=32).map(|port| format!("192.0.2.9:{port}")).collect();
    let candidates: Vec<&str> = candidates.iter().map(String::as_str).collect();
    for number in 0..60 {
        us.upsert(numbered_node(number).candidates(&candidates));
    }
    let outputs = us.run(Duration::from_secs(10));
    let sent = pings(&outputs).len() + handshakes(&outputs).iter().map(Vec::len).sum::<usize>();
    assert!(sent <= 500, "{sent}");
    assert!(us.mesh.counters().probes_withheld > 1_000);
}

#[test]
fn a_network_of_which_many_peers_advertise_addresses_gets_a_bounded_number_of_datagrams() {
    let mut us = Us::new(1);
    for number in 0..60u16 {
        let last = |index: u16| (number * 32 + index) % 256;
        let candidates: Vec<String> =
            (0..32).map(|index| format!("198.51.100.{}:51830", last(index))).collect();
        let candidates: Vec<&str> = candidates.iter().map(String::as_str).collect();
        us.upsert(numbered_node(number).candidates(&candidates));
    }
    let outputs = us.run(Duration::from_secs(9));
    let sent = pings(&outputs).len() + handshakes(&outputs).iter().map(Vec::len).sum::<usize>();
    assert!((500..=1_000).contains(&sent), "{sent}");
    // Nodes elsewhere are tried all the same.
    us.upsert(numbered_node(61).candidates(&[OTHER]));
    let outputs = us.run(Duration::from_secs(1));
    assert!(pings(&outputs).iter().any(|(to, _)| *to == path(OTHER)));
}

#[test]
fn a_network_around_a_peers_address_does_not_keep_it_from_being_tried() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&["192.168.50.9:51830"]));
    us.upsert(peer(3).prefixes(&["192.168.50.0/24"]));
    let outputs = us.run(Duration::from_secs(1));
    assert!(us.guards("192.168.50.9"), "what others send there enters the tunnel or is dropped");
    let tried = pings(&outputs);
    assert!(tried.iter().any(|(to, _)| *to == path("192.168.50.9:51830")), "{tried:?}");
}

#[test]
fn pings_that_are_replayed_from_elsewhere_leave_the_path_in_use_its_answers() {
    let mut us = Us::up(PUBLIC);
    let ping = Probe::Ping { transaction: 7 };
    for _ in 0..10_000 {
        us.message(2, path(OTHER), ping.clone());
    }
    let to_other = |(to, _): &&(Path, u64)| *to == path(OTHER);
    assert!(pings(&us.drain()).iter().filter(to_other).count() <= 60);
    let refused = us.mesh.counters().pings_refused;
    assert!(refused > 9_000);
    us.message(2, path(PUBLIC), ping);
    assert_eq!(us.mesh.counters().pings_refused, refused);
    assert_eq!(us.peer(2).path, Some(path(PUBLIC)));
}

#[test]
fn an_address_that_is_known_only_as_a_source_gets_at_most_three_times_what_came_from_it() {
    for state in ["connecting", "down", "up"] {
        let mut us = if state == "up" { Us::up(PUBLIC) } else { Us::new(1) };
        us.mesh.set_candidates(us.now, vec![candidate("203.0.113.9:51830")]);
        us.upsert(peer(2).generation(2).candidates(&[PUBLIC]));
        us.run(Duration::from_secs(if state == "down" { 60 } else { 0 }));
        let (mut came, mut sent) = (0, 0);
        for round in 0..200 {
            if round % 3 == 0 {
                us.message(2, path(OTHER), Probe::Ping { transaction: round });
                came += PROBE_BYTES;
                // The pong of the data plane.
                sent += PROBE_BYTES;
            } else {
                let what = Observation::Roamed { from: path(OTHER) };
                us.mesh.handle_observation(us.now, key(2), what);
                came += 32;
            }
            let outputs = us.run(Duration::from_millis(70));
            let to_other = |(to, _): &&(Path, u64)| *to == path(OTHER);
            sent += pings(&outputs).iter().filter(to_other).count() * STAMPED_PROBE_BYTES;
            let initiated = handshakes(&outputs).into_iter().flatten();
            sent += initiated.filter(|to| *to == path(OTHER)).count() * 148;
            assert!(sent <= 3 * came, "{state}: {sent} of {came} bytes");
        }
        assert_ne!(us.peer(2).path, Some(path(OTHER)), "no traffic goes there");
        assert!(us.table().peers[&key(2)].endpoint != Some(path(OTHER)));
    }
}

#[test]
fn a_relay_that_answers_from_elsewhere_opens_nothing_there() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.upsert(peer(9).relay().candidates(&[OTHER]));
    us.upsert(peer(2).candidates(&["192.168.1.9:51830"]));
    let (_, transaction) = channel_request(&us.run(Duration::from_millis(50))).unwrap();
    us.message(9, path("198.51.100.66:1"), Probe::Opened { transaction, channel: 77 });
    assert!(handshakes(&us.drain()).is_empty());
    assert_eq!(us.mesh.counters().relay_answers_refused, 1);
    us.message(9, path(OTHER), Probe::Opened { transaction, channel: 77 });
    assert_eq!(handshakes(&us.drain()), [vec![path(OTHER).on_channel(ChannelId(77))]]);
}

#[test]
fn addresses_of_this_host_and_of_its_link_are_no_candidates() {
    let mut us = Us::new(1);
    let local = ["127.0.0.1:51830", "169.254.169.254:80", "[::1]:51830", "[fe80::1]:51830"];
    us.upsert(peer(2).candidates(&local));
    us.signal(call_me(1, "169.254.169.254:80"));
    let outputs = us.run(Duration::from_secs(5));
    assert!(pings(&outputs).is_empty() && handshakes(&outputs).is_empty(), "{outputs:?}");
}

#[test]
fn no_relay_and_no_reflector_is_an_address_of_this_host_or_of_its_link() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    let local = ["127.0.0.1:51830", "169.254.169.254:80", "[::1]:51830", "[fe80::1]:51830"];
    for node in [peer(9).relay(), peer(2)] {
        us.upsert(configured(node, &local));
    }
    let outputs = us.run(Duration::from_secs(5));
    assert_eq!((registration(&outputs), stun(&outputs)), (None, Vec::new()));
    // More of them than are tried take no place from a real one.
    us.upsert(configured(peer(9).relay(), &[&local[..], &[OTHER]].concat()).generation(2));
    let outputs = us.run(Duration::from_millis(50));
    assert_eq!(registration(&outputs).map(|(_, to, _)| to), Some(path(OTHER)));
    assert!(stun(&outputs).iter().all(|(to, _)| *to == addr(OTHER)), "{outputs:?}");
}

/// The node with addresses that its operator configured.
fn configured(mut node: NodeBuilder, addresses: &[&str]) -> NodeBuilder {
    let addresses = addresses.iter().map(|text| addr(text));
    let candidates = addresses.map(|at| Candidate::new(CandidateKind::Configured, at).unwrap());
    node.record.candidates = candidates.collect();
    node
}

#[test]
fn a_relay_that_opens_channels_without_end_costs_a_bounded_number_of_datagrams() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.upsert(peer(9).relay().candidates(&[OTHER]));
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.upsert(peer(3));
    let (_, _, transaction) = registration(&us.run(Duration::from_millis(50))).unwrap();
    let lifetime = Duration::from_secs(60);
    us.message(9, path(OTHER), Probe::Registered { transaction, lifetime });
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: path(PUBLIC) });
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_millis(500));
    for number in 0..10_000 {
        for peer in [2, 3] {
            us.message(9, path(OTHER), Probe::Incoming { peer: key(peer), channel: number });
        }
    }
    let outputs = us.drain();
    let sent = pings(&outputs).len() + handshakes(&outputs).len();
    assert!(sent <= 200, "{sent}");
    assert!(us.mesh.counters().relay_answers_refused > 19_000);
    assert_eq!(us.peer(2).path, Some(path(PUBLIC)));
}

#[test]
fn a_reflector_that_lies_differently_each_time_makes_us_advertise_one_address_and_settles_nothing()
{
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.mesh.set_reflectors(us.now, vec![addr("203.0.113.1:7443")]);
    let mut advertised = 0;
    for lie in 0..100u8 {
        let asked = stun(&us.run(Duration::from_secs(25)));
        for (to, transaction) in asked {
            let victim = SocketAddr::from(([192, 0, 2, lie], 53));
            us.mesh.handle_stun(us.now, to, transaction, victim);
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
