//! One peer, in the order of its life.

use super::*;

// Connecting

#[test]
fn all_candidates_are_tried_at_once_with_one_initiation() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC, "192.168.1.7:51830", "203.0.113.7:51830"]));
    let outputs = us.run(Duration::from_millis(100));
    assert_eq!(handshakes(&outputs), [vec![path(PUBLIC), path(PRIVATE)]]);
    assert_eq!(pings(&outputs).len(), 2);
}

#[test]
fn addresses_are_tried_in_the_order_in_which_the_peer_published_them() {
    let mut us = Us::new(1);
    let published = ["203.0.113.9:51830", "198.51.100.7:51830", "203.0.113.7:51830"];
    us.upsert(peer(2).candidates(&published));
    let outputs = us.run(Duration::from_millis(100));
    assert_eq!(handshakes(&outputs), [published.map(path)]);
}

#[test]
fn of_two_nodes_that_can_both_be_called_the_one_with_the_higher_key_waits_a_moment() {
    let mut us = Us::new(9);
    us.mesh.set_candidates(us.now, vec![candidate("203.0.113.9:51830")]);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    assert!(handshakes(&us.run(Duration::from_millis(250))).is_empty());
    // By the next attempt, whose time is random by a tenth.
    assert!(!handshakes(&us.run(Duration::from_millis(400))).is_empty());
}

#[test]
fn who_cannot_be_called_begins_at_once() {
    let mut us = Us::new(9);
    us.mesh.set_candidates(us.now, vec![candidate("192.168.7.9:51830")]);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    assert_eq!(handshakes(&us.run(Duration::from_millis(50))).len(), 1);
}

#[test]
fn no_answer_means_down_with_a_reason_and_attempts_permanently_but_few() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate("203.0.113.9:51830")]);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.run(Duration::from_secs(60));
    let status = us.peer(2);
    assert_eq!(status.state, PeerState::Down);
    let reason = us.reason(2);
    assert!(reason.starts_with("no answer from 1 candidate for "), "{reason}");
    let later = handshakes(&us.run(Duration::from_secs(3600))).len();
    assert!((100..=160).contains(&later), "{later}");
}

#[test]
fn a_peer_that_lost_its_power_is_not_said_to_answer_probes() {
    let mut us = Us::up(PUBLIC);
    us.run(Duration::from_secs(60));
    assert_eq!(us.peer(2).state, PeerState::Down);
    let reason = us.reason(2);
    assert!(reason.starts_with("no answer from 1 candidate for "), "{reason}");
}

#[test]
fn two_nodes_behind_nat_say_that_they_need_a_relay() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate("192.168.7.9:51830")]);
    us.upsert(peer(2).candidates(&["192.168.1.7:51830"]));
    us.run(Duration::from_secs(30));
    let reason = us.reason(2);
    assert!(reason.starts_with("both nodes are behind NAT and no relay is configured"), "{reason}");
}

#[test]
fn new_candidates_of_a_peer_that_is_down_are_tried_at_once() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&["192.168.1.7:51830"]));
    us.run(Duration::from_secs(60));
    us.upsert(peer(2).generation(2).candidates(&[PUBLIC]));
    assert_eq!(handshakes(&us.run(Duration::from_millis(10))), [vec![path(PUBLIC)]]);
}

#[test]
fn a_ping_from_a_peer_that_we_could_not_find_shows_where_it_is() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate("203.0.113.9:51830")]);
    us.upsert(peer(2));
    us.run(Duration::from_secs(60));
    let from = path("198.51.100.4:4444");
    us.message(2, from, Probe::Ping { transaction: 7 });
    let outputs = us.run(Duration::from_millis(1));
    assert!(!handshakes(&outputs).contains(&vec![from]), "it may not be the peer's address");
    let (to, transaction) = pings(&outputs).into_iter().find(|(to, _)| *to == from).unwrap();
    us.now += Duration::from_millis(20);
    us.message(2, to, pong(transaction));
    assert!(handshakes(&us.run(Duration::from_secs(1))).contains(&vec![from]));
}

#[test]
fn what_a_peer_challenged_is_sent_again_at_once() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.upsert(peer(9).relay().candidates(&[OTHER]));
    us.upsert(peer(2).candidates(&["192.168.1.9:51830"]));
    let outputs = us.run(Duration::from_millis(50));
    let (_, _, registered) = registration(&outputs).unwrap();
    let (_, opened) = channel_request(&outputs).unwrap();
    us.message(9, path(OTHER), Probe::Challenge { token: 1 });
    let again = us.drain();
    assert_eq!(registration(&again), Some((key(9), path(OTHER), registered)));
    assert_eq!(channel_request(&again), Some((key(2), opened)));
    let first = pings(&outputs).into_iter().find(|(to, _)| *to == path("192.168.1.9:51830"));
    us.message(2, path("192.168.1.9:51830"), Probe::Challenge { token: 1 });
    assert_eq!(pings(&us.drain()), Vec::from_iter(first), "the same ping");
    us.message(2, path(PUBLIC), Probe::Challenge { token: 1 });
    assert!(pings(&us.drain()).is_empty(), "nothing was sent there");
}

#[test]
fn data_of_the_peer_keeps_a_path_longer_and_a_handshake_shows_that_it_works() {
    let silence = |us: &mut Us, each: &dyn Fn(&mut Us)| {
        let began = us.now;
        while us.peer(2).state == PeerState::Up && us.now < began + Duration::from_secs(5) {
            each(us);
            us.run(Duration::from_millis(125));
        }
        us.now - began
    };
    let alone = silence(&mut Us::up(PUBLIC), &|_| {});
    let with_data = silence(&mut Us::up(PUBLIC), &Us::active);
    assert!(alone < with_data && with_data <= Duration::from_secs(3), "{alone:?} {with_data:?}");
    let handshake = Observation::Handshake { from: path(PUBLIC) };
    let kept = silence(&mut Us::up(PUBLIC), &|us| {
        us.mesh.handle_observation(us.now, key(2), handshake);
    });
    assert_eq!(kept, Duration::from_secs(5));
}

#[test]
fn a_peer_whose_boot_epoch_went_back_may_call_now_and_then() {
    let mut us = Us::new(1);
    us.upsert(peer(2));
    us.run(Duration::from_secs(1));
    let call = |boot_epoch, number| {
        let candidates = vec![candidate(PUBLIC)];
        Probe::CallMe { boot_epoch, number, candidates }
    };
    us.signal(call(7, 3));
    us.drain();
    us.signal(call(6, 1));
    assert_eq!(us.mesh.counters().signals_refused, 0);
    us.signal(call(5, 1));
    assert_eq!(us.mesh.counters().signals_refused, 1);
}

// Up

#[test]
fn a_handshake_makes_its_address_the_path_and_the_path_is_measured() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.drain();
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: path(PUBLIC) });
    us.echo(Duration::from_millis(40), Duration::from_secs(5));
    let status = us.peer(2);
    assert_eq!((status.state, status.path), (PeerState::Up, Some(path(PUBLIC))));
    assert_eq!(status.rtt, Some(Duration::from_millis(40)));
    assert_eq!(status.reason, None);
    assert_eq!(us.table().peers[&key(2)].endpoint, Some(path(PUBLIC)));
}

#[test]
fn a_silent_path_is_noticed_within_three_seconds_and_everything_is_tried() {
    let mut us = Us::up(PUBLIC);
    let outputs = us.run(Duration::from_secs(3));
    let changed = outputs.iter().any(|o| {
        matches!(o, Output::StateChanged { from: PeerState::Up, to: PeerState::Connecting, .. })
    });
    assert!(changed);
    assert!(!handshakes(&outputs).is_empty());
}

#[test]
fn the_history_has_every_change_of_state_and_path_with_its_reason() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.drain();
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: path(PUBLIC) });
    us.echo(Duration::from_millis(40), Duration::from_secs(5));
    let elsewhere = path("198.51.100.4:4444");
    us.mesh.handle_observation(us.now, key(2), Observation::Roamed { from: elsewhere });
    let outputs = us.pass(Duration::from_millis(40), Some(Duration::from_millis(40)));
    let (from, to) = (Some(path(PUBLIC)), Some(elsewhere));
    let moved = |from, to, reason| Changed::Path { from, to, reason };
    let peer = us.peer(2).node.id();
    let reason = PathChange::Roamed;
    assert!(outputs.contains(&Output::PathChanged { peer, from, to, reason }));
    let changes: Vec<Changed> = us.mesh.history(peer).iter().map(|change| change.what).collect();
    assert_eq!(
        changes,
        [
            moved(None, from, PathChange::Handshake),
            Changed::State { from: PeerState::Connecting, to: PeerState::Up },
            moved(from, to, reason),
        ]
    );
    let paths = us.mesh.paths(peer);
    let used: Vec<bool> = paths.iter().map(|status| status.in_use).collect();
    assert_eq!(used.iter().filter(|used| **used).count(), 1, "{paths:?}");
    assert!(paths.iter().any(|status| status.path == path(PUBLIC) && status.rtt.is_some()));
}

/// Lets peer 2 answer an operator's ping on the path in use after `rtt`.
fn answer_after(us: &mut Us, number: u64, rtt: Duration) -> Vec<Output> {
    us.mesh.ping(us.now, id(2), number, Duration::from_secs(1));
    let (to, transaction) = pings(&us.drain())[0];
    us.now += rtt;
    us.message(2, to, pong(transaction));
    us.drain()
}

#[test]
fn a_path_that_was_chosen_as_better_is_named_so_though_the_times_changed_since() {
    // A handshake that takes longer may be one of the peer.
    for (pause, reason) in [(20, PathChange::Better), (1_000, PathChange::Handshake)] {
        let mut us = Us::new(1);
        us.upsert(peer(2).candidates(&[PUBLIC, OTHER]));
        us.drain();
        us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: path(PUBLIC) });
        us.active();
        us.echo(Duration::from_millis(10), Duration::from_millis(3_500));
        let outputs = answer_after(&mut us, 0, Duration::from_millis(100));
        assert_eq!(handshakes(&outputs), [vec![path(OTHER)]], "it is clearly faster");
        for number in 1..10 {
            answer_after(&mut us, number, Duration::ZERO);
        }
        let paths = us.mesh.paths(id(2));
        let rtt = |to| paths.iter().find(|status| status.path == path(to)).unwrap().rtt.unwrap();
        assert!(rtt(PUBLIC) < rtt(OTHER), "{paths:?}");
        us.now += Duration::from_millis(pause);
        us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: path(OTHER) });
        let (from, to) = (Some(path(PUBLIC)), Some(path(OTHER)));
        let last = us.mesh.history(id(2)).pop().unwrap().what;
        assert_eq!(last, Changed::Path { from, to, reason }, "after {pause} ms");
    }
}

#[test]
fn pings_that_are_lost_show_in_the_loss_of_the_path() {
    let mut us = Us::up(PUBLIC);
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_secs(10));
    assert_eq!(us.peer(2).loss, Some(0.0));
    us.run(Duration::from_millis(1_600));
    us.echo(Duration::from_millis(10), Duration::from_secs(3));
    let loss = us.peer(2).loss.unwrap();
    assert!((0.05..0.5).contains(&loss), "{loss}");
}

#[test]
fn one_lost_pong_changes_nothing() {
    let mut us = Us::up(PUBLIC);
    us.run(Duration::from_millis(1_400));
    us.echo(Duration::from_millis(10), Duration::from_secs(3));
    assert_eq!(us.peer(2).state, PeerState::Up);
}

#[test]
fn a_session_that_ended_is_renewed_at_once_on_the_path() {
    let mut us = Us::up(PUBLIC);
    us.mesh.handle_observation(us.now, key(2), Observation::SessionExpired);
    assert_eq!(handshakes(&us.drain()), [vec![path(PUBLIC)]]);
    assert_eq!(us.peer(2).state, PeerState::Up);
}

#[test]
fn a_peer_that_roamed_is_followed_but_not_into_the_tunnel() {
    let mut us = Us::up(PUBLIC);
    let elsewhere = path("198.51.100.9:9");
    us.mesh.handle_observation(us.now, key(2), Observation::Roamed { from: elsewhere });
    us.drain();
    assert_eq!(
        us.table().peers[&key(2)].endpoint,
        Some(path(PUBLIC)),
        "not before it is validated"
    );
    us.mesh.handle_observation(us.now, key(2), Observation::Roamed { from: elsewhere });
    us.echo(Duration::from_millis(10), Duration::from_millis(10));
    assert_eq!(us.table().peers[&key(2)].endpoint, Some(elsewhere));
    us.mesh.handle_observation(
        us.now,
        key(2),
        Observation::Roamed { from: path("198.19.0.2:51830") },
    );
    us.drain();
    assert_eq!(us.table().peers[&key(2)].endpoint, Some(elsewhere));
}

#[test]
fn a_roam_that_is_followed_changes_one_peer_and_builds_no_table() {
    let mut us = Us::up(PUBLIC);
    for number in 0..40 {
        us.upsert(numbered_node(number));
    }
    us.drain();
    let elsewhere = path("198.51.100.9:9");
    us.mesh.handle_observation(us.now, key(2), Observation::Roamed { from: elsewhere });
    let sent = pings(&us.drain());
    let (_, transaction) = *sent.iter().find(|(to, _)| *to == elsewhere).unwrap();
    us.message(2, elsewhere, pong(transaction));
    let outputs = us.drain();
    let changed: Vec<_> = outputs
        .iter()
        .filter_map(|output| match output {
            Output::PeerPath { peer, path } => Some((*peer, path.endpoint)),
            Output::PeerTable(_) => panic!("the whole table: {output:?}"),
            _ => None,
        })
        .collect();
    assert_eq!(changed, [(key(2), Some(elsewhere))]);
    assert_eq!(us.mesh.peer_table().unwrap().as_ref(), us.table(), "both are the same");

    // Nor does a peer that went down, since nobody shares a network with it.
    let outputs = us.run(Duration::from_secs(60));
    assert_eq!(us.peer(2).state, PeerState::Down);
    assert!(!outputs.iter().any(|output| matches!(output, Output::PeerTable(_))));
    assert_eq!(us.mesh.peer_table().unwrap().as_ref(), us.table());
}

#[test]
fn an_operators_ping_ends_with_an_answer_or_without() {
    let mut us = Us::up(PUBLIC);
    us.mesh.ping(us.now, id(2), 1, Duration::from_secs(1));
    us.echo(Duration::from_millis(30), Duration::from_secs(1));
    us.mesh.ping(us.now, id(2), 2, Duration::from_secs(1));
    us.mesh.ping(us.now, id(77), 3, Duration::from_secs(1));
    us.run(Duration::from_secs(1));
    let answer = Some((path(PUBLIC), Duration::from_millis(30)));
    assert_eq!(us.results, BTreeMap::from([(1, answer), (2, None), (3, None)]));
}

#[test]
fn an_idle_mesh_of_two_is_cheap() {
    let mut us = Us::up(PUBLIC);
    let start = us.outputs;
    us.echo(Duration::from_millis(1), Duration::from_secs(100));
    assert!(us.outputs - start < 150, "{}", us.outputs - start);
}

// Liveness

#[test]
fn an_idle_path_is_pinged_often_enough_for_a_nat_and_no_oftener() {
    let mut us = Us::up(PUBLIC);
    us.echo(Duration::from_millis(10), Duration::from_secs(60));
    let start = us.outputs;
    us.echo(Duration::from_millis(10), Duration::from_secs(100));
    let pings = us.outputs - start;
    assert!((4..=20).contains(&pings), "{pings}");
}

#[test]
fn an_idle_path_that_died_is_noticed_soon_after_the_first_packet() {
    let mut us = Us::up(PUBLIC);
    us.echo(Duration::from_millis(10), Duration::from_secs(70));
    assert_eq!(us.peer(2).state, PeerState::Up);
    us.active();
    let outputs = us.run(Duration::from_secs(2));
    assert!(!handshakes(&outputs).is_empty());
    assert_ne!(us.peer(2).state, PeerState::Up);
}

#[test]
fn a_path_in_doubt_yields_to_another_one_that_answers_before_it_is_dead() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC, OTHER]));
    us.drain();
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: path(PUBLIC) });
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_secs(3));
    us.silent = Some(addr(PUBLIC));
    us.echo(Duration::from_millis(10), Duration::from_millis(1_700));
    assert_eq!(us.peer(2).path, Some(path(OTHER)));
    assert_eq!(us.peer(2).state, PeerState::Up);
}

// Path MTU

/// Returns a node whose path to peer 2 takes 1,368 bytes, after the search found that.
fn on_a_black_hole() -> Us {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.drain();
    us.payload = 1_368 - 28;
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: path(PUBLIC) });
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_secs(10));
    us
}

#[test]
fn a_black_hole_is_found_and_the_route_and_the_data_plane_follow() {
    let mut us = on_a_black_hole();
    let mtu = us.peer(2).mtu.unwrap();
    assert!((1_300..=1_308).contains(&mtu), "{mtu}");
    assert_eq!(us.table().peers[&key(2)].mtu.get(), mtu);
    assert!(us.plan().routes.values().any(|route| route.mtu.map(Mtu::get) == Some(mtu)));
    us.mesh.handle_observation(
        us.now,
        key(2),
        Observation::TooBig { path: path(PUBLIC), payload: 1_252 },
    );
    us.payload = 1_252;
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_secs(10));
    let entry = &us.table().peers[&key(2)];
    assert_eq!((entry.mtu, entry.fragment), (Mtu::MIN, true));
}

/// The largest inner packet for peer 2: what its route and the data plane were told, and whether to
/// fragment.
fn applied(us: &mut Us) -> (Option<u16>, u16, bool) {
    us.drain();
    let route = us.plan().routes.values().find_map(|route| route.mtu).map(Mtu::get);
    let entry = &us.table().peers[&key(2)];
    (route, entry.mtu.get(), entry.fragment)
}

#[test]
fn what_the_kernel_refuses_holds_for_route_and_data_plane_until_the_search_is_through() {
    let mut us = on_a_black_hole();
    assert!(us.peer(2).mtu.is_some());
    for (payload, expected) in
        [(1_320, (Some(1_288), 1_288, false)), (1_252, (Some(1_280), 1_280, true))]
    {
        let what = Observation::TooBig { path: path(PUBLIC), payload };
        us.mesh.handle_observation(us.now, key(2), what);
        assert_eq!(us.peer(2).mtu, None, "the search begins again");
        assert_eq!(applied(&mut us), expected);
    }
    us.payload = 1_252;
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_secs(10));
    assert_eq!(us.peer(2).mtu, Some(1_220));
    assert_eq!(applied(&mut us), (Some(1_280), 1_280, true));
}

// Many peers

#[test]
fn a_thousand_peers_cost_nothing_until_there_is_traffic_for_one() {
    let mut us = Us::new(1);
    for number in 0..1_000 {
        us.upsert(numbered_node(number).candidates(&[PUBLIC]));
    }
    let probes = |outputs: &[Output]| pings(outputs).len() + handshakes(outputs).len();
    assert_eq!(probes(&us.run(Duration::from_secs(600))), 0);
    let quiet = numbered_node(700).build();
    assert_eq!(us.mesh.peer(quiet.id()).unwrap().state, PeerState::Idle);
    us.mesh.handle_observation(us.now, quiet.wireguard_key(), Observation::Wanted);
    assert_eq!(probes(&us.run(Duration::from_millis(1))), 2);
}

#[test]
fn the_end_of_a_handshake_begins_no_other_one_with_an_idle_peer() {
    let mut us = Us::new(1);
    for number in 0..1_000 {
        us.upsert(numbered_node(number).candidates(&[PUBLIC]));
    }
    us.drain();
    // A peer calls, and does not answer.
    let caller = numbered_node(700).build();
    us.mesh.handle_message(us.now, caller.wireguard_key(), None, call_me(1, OTHER));
    assert!(!handshakes(&us.run(Duration::from_secs(1))).is_empty());
    us.run(Duration::from_secs(60));
    assert_eq!(us.mesh.peer(caller.id()).unwrap().state, PeerState::Idle);
    let expired = Observation::SessionExpired;
    // The data plane gives its handshake up later.
    us.mesh.handle_observation(us.now, caller.wireguard_key(), expired);
    assert!(handshakes(&us.run(Duration::from_secs(60))).is_empty());
    // One that was started again has no session with anybody.
    for number in 0..1_000 {
        let peer = numbered_node(number).build();
        us.mesh.handle_observation(us.now, peer.wireguard_key(), expired);
    }
    let outputs = us.run(Duration::from_secs(60));
    assert!(handshakes(&outputs).is_empty() && pings(&outputs).is_empty());
    us.mesh.handle_observation(us.now, caller.wireguard_key(), Observation::Wanted);
    assert!(!handshakes(&us.run(Duration::from_secs(1))).is_empty());
}

#[test]
fn a_mesh_that_becomes_small_is_connected_throughout() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    for number in 0..64 {
        us.upsert(numbered_node(number).candidates(&[PUBLIC]));
    }
    assert!(handshakes(&us.run(Duration::from_secs(60))).is_empty());
    us.mesh.handle_map_change(us.now, MapChange::Remove(tombstone(2)));
    us.run(Duration::from_secs(1));
    for number in 0..64 {
        let state = us.mesh.peer(numbered_node(number).build().id()).unwrap().state;
        assert_eq!(state, PeerState::Connecting, "{number}");
    }
}

/// Returns us with peer 2 up and unused, in a mesh in which unused peers are not checked.
fn one_of_many() -> Us {
    let mut us = Us::up(PUBLIC);
    us.mesh.set_candidates(us.now, vec![candidate("203.0.113.9:51830")]);
    for number in 0..70 {
        us.upsert(numbered_node(number));
    }
    us.echo(Duration::from_millis(10), Duration::from_secs(20));
    assert_eq!(us.peer(2).state, PeerState::Up);
    us
}

#[test]
fn a_peer_that_nothing_checks_is_not_shown_as_up_after_half_a_minute() {
    let mut us = one_of_many();
    us.wait(Duration::from_secs(20));
    assert_eq!(us.peer(2).state, PeerState::Up, "the last pong is younger than 30 s");
    us.wait(Duration::from_secs(10));
    let status = us.peer(2);
    assert_eq!((status.state, status.path), (PeerState::Idle, None));
    assert_eq!(status.reason.unwrap().code(), "peer-unchecked");
    // In a mesh that is small enough each peer is checked.
    let mut us = Us::up(PUBLIC);
    us.echo(Duration::from_millis(10), Duration::from_secs(60));
    assert_eq!(us.peer(2).state, PeerState::Up);
}

#[test]
fn a_peer_that_nothing_checked_is_checked_once_the_mesh_is_small() {
    let mut us = one_of_many();
    us.wait(Duration::from_secs(60));
    assert_eq!(us.peer(2).state, PeerState::Idle);
    for number in 0..7 {
        let removed = tombstone_of(numbered_node(number).build().grant());
        us.mesh.handle_map_change(us.now, MapChange::Remove(removed));
    }
    us.wait(Duration::from_secs(60));
    assert_eq!(us.peer(2).state, PeerState::Down, "nobody answered");
}

#[test]
fn a_ping_shows_whether_a_peer_that_nothing_checked_is_still_there() {
    for is_alive in [true, false] {
        let mut us = one_of_many();
        us.wait(Duration::from_secs(60));
        assert_eq!(us.peer(2).state, PeerState::Idle);
        us.mesh.ping(us.now, id(2), 7, Duration::from_secs(2));
        if is_alive {
            us.echo(Duration::from_millis(10), Duration::from_secs(3));
            assert_eq!(us.peer(2).state, PeerState::Up);
        } else {
            us.run(Duration::from_secs(30));
            assert_eq!(us.peer(2).state, PeerState::Down);
        }
        assert_eq!(us.results[&7].is_some(), is_alive);
    }
}

#[test]
fn a_machine_that_slept_begins_a_new_session_with_each_peer_in_use_at_once() {
    let mut us = Us::up(PUBLIC);
    us.echo(Duration::from_millis(10), Duration::from_secs(5));
    us.mesh.handle_wake(us.now);
    let outputs = us.run(Duration::from_millis(1));
    assert!(handshakes(&outputs).contains(&vec![path(PUBLIC)]), "{outputs:?}");
    assert_eq!(us.peer(2).state, PeerState::Up, "what works goes on");
}

// Uplinks

/// With two uplinks, peer 2 up by the first one, and both known to work.
fn by_two_uplinks() -> (Us, [LocalAddress; 2]) {
    let ends =
        [1, 2].map(|n| LocalAddress { address: [192, 168, n, 9].into(), interface: n.into() });
    let mut us = Us::new(1);
    us.mesh.set_uplinks(us.now, ends.to_vec(), vec![candidate(PRIVATE)]);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.drain();
    let from = Path { local: Some(ends[0]), ..path(PUBLIC) };
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from });
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_secs(12));
    assert_eq!(us.peer(2).path, Some(from));
    (us, ends)
}

#[test]
fn a_path_whose_uplink_is_gone_is_replaced_by_a_handshake_and_a_signal_at_once() {
    let (mut us, ends) = by_two_uplinks();
    us.mesh.set_controller_connected(us.now, true);
    us.mesh.set_uplinks(us.now, vec![ends[1]], vec![candidate(PRIVATE)]);
    let outputs = us.run(Duration::from_millis(1));
    assert!(handshakes(&outputs).contains(&vec![path(PUBLIC)]), "{outputs:?}");
    let mut signals = transmits(&outputs).filter(|transmit| transmit.path.is_none());
    assert!(signals.any(|t| matches!(t.message, Probe::CallMe { .. })), "{outputs:?}");
    assert_eq!(us.peer(2).state, PeerState::Connecting);
    assert_eq!(us.table().peers[&key(2)].endpoint, Some(path(PUBLIC)), "traffic goes on");
}

#[test]
fn an_uplink_that_comes_or_goes_changes_nothing_of_a_path_by_another_one() {
    let (mut us, ends) = by_two_uplinks();
    let before = us.peer(2);
    us.mesh.set_uplinks(us.now, vec![ends[0]], vec![candidate(PRIVATE)]);
    us.drain();
    let alone = us.peer(2);
    assert_eq!((alone.state, alone.path), (PeerState::Up, Some(path(PUBLIC))));
    assert_eq!((alone.mtu, alone.rtt), (before.mtu, before.rtt));
    us.mesh.set_uplinks(us.now, ends.to_vec(), vec![candidate(PRIVATE)]);
    us.drain();
    let after = us.peer(2);
    assert_eq!((after.state, after.path), (PeerState::Up, before.path));
    assert_eq!((after.mtu, after.rtt), (before.mtu, before.rtt));
}

/// With an address of interface 1 beside the first uplink's own.
fn by_two_addresses() -> (Us, [LocalAddress; 3]) {
    let ends = [("203.0.113.20", 1), ("10.114.0.2", 2), ("10.15.0.5", 1)]
        .map(|(ip, interface)| LocalAddress { address: ip.parse().unwrap(), interface });
    let mut us = Us::new(1);
    us.mesh.set_uplinks(us.now, ends.to_vec(), vec![candidate(PRIVATE)]);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    (us, ends)
}

#[test]
fn a_peer_is_answered_from_the_address_at_which_it_called() {
    let (mut us, ends) = by_two_addresses();
    us.drain();
    for end in [ends[2], ends[0]] {
        let from = Path { local: Some(end), ..path(PUBLIC) };
        us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from });
        us.drain();
        assert_eq!(us.table().peers[&key(2)].endpoint, Some(from));
    }
    // An address that goes takes the path with it.
    us.mesh.set_uplinks(us.now, vec![ends[2], ends[1]], vec![candidate(PRIVATE)]);
    us.drain();
    let endpoint = us.table().peers[&key(2)].endpoint.unwrap();
    assert_ne!(endpoint.local, Some(ends[0]));
}

#[test]
fn a_service_address_that_comes_or_goes_asks_no_peer() {
    let (mut us, ends) = by_two_uplinks();
    let service = LocalAddress { address: [192, 168, 1, 100].into(), interface: 1 };
    for uplinks in [vec![ends[0], ends[1], service], ends.to_vec()] {
        us.mesh.set_uplinks(us.now, uplinks, vec![candidate(PRIVATE)]);
        let outputs = us.run(Duration::from_millis(1));
        assert!(handshakes(&outputs).is_empty() && pings(&outputs).is_empty(), "{outputs:?}");
    }
    // Unless a peer was answered from it.
    us.mesh.set_uplinks(us.now, vec![ends[0], ends[1], service], vec![candidate(PRIVATE)]);
    let from = Path { local: Some(service), ..path(PUBLIC) };
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from });
    us.drain();
    us.mesh.set_uplinks(us.now, ends.to_vec(), vec![candidate(PRIVATE)]);
    let outputs = us.run(Duration::from_millis(1));
    assert!(!handshakes(&outputs).is_empty(), "{outputs:?}");
}

#[test]
fn what_the_kernel_chooses_is_tried_beside_each_uplink() {
    let (mut us, ends) = by_two_addresses();
    let tried: Vec<_> = pings(&us.run(Duration::from_millis(1)))
        .into_iter()
        .filter(|(to, _)| to.remote == addr(PUBLIC))
        .map(|(to, _)| to.local)
        .collect();
    assert_eq!(tried, [Some(ends[0]), Some(ends[1]), None]);
}

#[test]
fn a_pong_shows_which_address_the_kernel_chose() {
    let (mut us, ends) = by_two_addresses();
    let outputs = us.run(Duration::from_millis(1));
    let (_, transaction) = pings(&outputs).into_iter().find(|(to, _)| *to == path(PUBLIC)).unwrap();
    // An initiation answers a pong only some time after the last one.
    us.run(Duration::from_millis(45));
    let from = Path { local: Some(ends[1]), ..path(PUBLIC) };
    us.message(2, from, Probe::Pong { transaction, observed: addr(OTHER) });
    let outputs = us.drain();
    assert!(handshakes(&outputs).contains(&vec![from]), "{outputs:?}");
}

#[test]
fn a_call_shows_a_node_that_is_up_where_else_to_open_its_nat() {
    let mut us = Us::up(PUBLIC);
    us.signal(call_me(1, OTHER));
    let outputs = us.run(Duration::from_millis(1));
    assert!(pings(&outputs).iter().any(|(to, _)| *to == path(OTHER)));
    assert_eq!(us.peer(2).path, Some(path(PUBLIC)));
}

// What the operator is told

#[test]
fn a_peer_that_is_up_through_a_relay_alone_says_why() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.drain();
    let through = Path { channel: Some(ChannelId(7)), ..path(OTHER) };
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: through });
    us.silent = Some(addr(PUBLIC));
    assert_eq!(us.reason(2), "through a relay: still trying 1 candidate");
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_secs(12));
    assert_eq!(us.peer(2).state, PeerState::Up);
    assert_eq!(us.reason(2), "through a relay: no answer from 1 candidate");
}
