//! What others help with: reflectors, and relays.

use super::*;

#[test]
fn our_addresses_are_advertised_in_the_order_of_preference() {
    let mut us = Us::new(1);
    // Public ones first, and of each kind those of the default route.
    let preferred =
        ["203.0.113.9:51830", "198.51.100.7:51830", "192.168.1.7:51830", "10.0.0.5:51830"];
    us.mesh.set_candidates(us.now, preferred.map(candidate).into());
    us.mesh.set_reflectors(us.now, vec![addr("203.0.113.1:7443")]);
    let asked = stun(&us.run(Duration::from_millis(1)));
    us.mesh.handle_stun(us.now, asked[0].0, asked[0].1, addr("192.0.2.1:4000"));
    let outputs = us.drain();
    let advertised = outputs.iter().find_map(|output| match output {
        Output::Advertise(list) => Some(list.iter().map(|c| c.address()).collect::<Vec<_>>()),
        _ => None,
    });
    let expected = preferred.into_iter().chain(["192.0.2.1:4000"]).map(addr).collect();
    assert_eq!(advertised, Some(expected));
}

#[test]
fn a_reflexive_address_is_advertised_and_the_mapping_judged_by_two_reflectors_only() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.mesh.set_reflectors(us.now, vec![addr("203.0.113.1:7443"), addr("203.0.113.2:7443")]);
    let asked = stun(&us.run(Duration::from_millis(1)));
    assert_eq!(asked.len(), 2);
    let mapped = addr("198.51.100.1:4000");
    us.mesh.handle_stun(us.now, asked[0].0, asked[0].1, mapped);
    let outputs = us.drain();
    assert!(outputs.iter().any(|o| matches!(o, Output::Advertise(list) if list.len() == 2)));
    assert_eq!(us.mesh.mapping(), None);
    // Not what nobody asked for, nor what leads into the mesh.
    us.mesh.handle_stun(us.now, asked[1].0, [0; 12], mapped);
    us.mesh.handle_stun(us.now, asked[1].0, asked[1].1, addr("198.19.0.9:1"));
    assert_eq!(us.mesh.counters().stun_refused, 2);
    us.mesh.handle_stun(us.now, asked[1].0, asked[1].1, addr("198.51.100.1:4001"));
    assert_eq!(us.mesh.mapping(), Some(Mapping::Dependent));
}

#[test]
fn the_reflectors_that_are_known_are_listed_with_what_they_answered() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    // One inside the mesh would be asked through the tunnel.
    let offered = ["203.0.113.1:7443", "203.0.113.1:7444", "198.19.0.9:7443"].map(addr);
    us.mesh.set_reflectors(us.now, offered.to_vec());
    us.upsert(peer(2).candidates(&[PUBLIC]));
    let asked = stun(&us.run(Duration::from_millis(1)));
    let (to, transaction) = asked[0];
    us.mesh.handle_stun(us.now, to, transaction, addr("198.51.100.1:4000"));
    let listed = us.mesh.reflectors();
    let addresses: Vec<SocketAddr> = listed.iter().map(|reflector| reflector.address).collect();
    assert_eq!(addresses, ["203.0.113.1:7443", "203.0.113.1:7444", PUBLIC].map(addr));
    let answered = listed.iter().filter(|reflector| reflector.mapped.is_some());
    assert_eq!(answered.map(|reflector| reflector.address).collect::<Vec<_>>(), [to]);
}

#[test]
fn a_node_registers_with_relays_and_asks_for_a_channel_where_the_peer_is_at_home() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.upsert(peer(9).relay().candidates(&[OTHER]));
    us.upsert(peer(2).candidates(&["192.168.1.9:51830"]));
    let outputs = us.run(Duration::from_millis(50));
    let (relay, to, _) = registration(&outputs).unwrap();
    assert_eq!((relay, to), (key(9), path(OTHER)));
    let (peer, transaction) = channel_request(&outputs).unwrap();
    assert_eq!(peer, key(2));
    let channel = 77;
    us.message(9, path(OTHER), Probe::Opened { transaction, channel });
    let through = path(OTHER).on_channel(ChannelId(channel));
    let outputs = us.drain();
    assert!(pings(&outputs).iter().any(|(to, _)| *to == through));
    assert_eq!(handshakes(&outputs), [vec![through]]);
    // A relay that lies about channels is not believed.
    us.message(9, path(OTHER), Probe::Opened { transaction: 1, channel });
    us.message(2, path(PUBLIC), Probe::Incoming { peer: key(2), channel });
    assert_eq!(us.mesh.counters().relay_answers_refused, 2);
}

#[test]
fn a_node_that_may_not_relay_is_no_relay_and_one_of_an_earlier_version_is_named() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.upsert(peer(8).relay_with(RelayRole::Denied).candidates(&[PUBLIC]));
    let outputs = us.run(Duration::from_secs(5));
    assert_eq!(registration(&outputs), None);
    us.upsert(peer(9).relay_with(RelayRole::Undecided).candidates(&[OTHER]));
    let outputs = us.run(Duration::from_millis(50));
    assert_eq!(registration(&outputs).map(|(relay, ..)| relay), Some(key(9)));
    let name = us.peer(9).node.name().clone();
    assert_eq!(us.mesh.undecided_relays().collect::<Vec<_>>(), [&name]);
    // An operator decides it: the record stays, the grant is issued again.
    us.upsert(peer(9).relay().candidates(&[OTHER]).issued_at(100));
    us.drain();
    assert_eq!(us.mesh.undecided_relays().count(), 0);
    us.upsert(peer(9).relay_with(RelayRole::Denied).candidates(&[OTHER]).issued_at(101));
    us.drain();
    assert_eq!(registration(&us.run(Duration::from_secs(60))), None);
}

#[test]
fn traffic_moves_from_a_relay_to_a_direct_path_by_a_handshake_there() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.drain();
    let through = Path { channel: Some(ChannelId(7)), ..path(OTHER) };
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: through });
    us.active();
    let outputs = us.pass(Duration::from_secs(2), Some(Duration::from_millis(10)));
    assert!(handshakes(&outputs).contains(&vec![path(PUBLIC)]));
    assert_eq!(us.table().peers[&key(2)].endpoint, Some(through), "not before it is through");
}

#[test]
fn a_node_that_was_left_behind_on_a_relay_moves_by_itself_though_the_other_one_leads() {
    let mut us = Us::new(5);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.drain();
    let through = Path { channel: Some(ChannelId(7)), ..path(OTHER) };
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: through });
    let outputs = us.pass(Duration::from_millis(900), Some(Duration::from_millis(10)));
    assert!(!handshakes(&outputs).contains(&vec![path(PUBLIC)]), "the other one has its time");
    let outputs = us.pass(Duration::from_millis(1_600), Some(Duration::from_millis(10)));
    assert!(handshakes(&outputs).contains(&vec![path(PUBLIC)]));
}

#[test]
fn a_channel_that_a_relay_tells_of_again_begins_no_further_handshake() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.upsert(peer(9).relay().candidates(&[OTHER]));
    us.upsert(peer(2));
    let (_, transaction) = channel_request(&us.run(Duration::from_millis(50))).unwrap();
    for _ in 0..5 {
        us.message(9, path(OTHER), Probe::Opened { transaction, channel: 77 });
    }
    assert_eq!(handshakes(&us.drain()).len(), 1, "each would undo the one before");
}

#[test]
fn a_handshake_over_a_relay_that_crossed_the_direct_one_does_not_take_traffic_back() {
    let mut us = Us::up(PUBLIC);
    let through = Path { channel: Some(ChannelId(7)), ..path(OTHER) };
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: through });
    us.drain();
    assert_eq!(us.peer(2).path, Some(through), "later it is the word of the peer");
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: path(PUBLIC) });
    us.run(Duration::from_millis(100));
    us.mesh.handle_observation(us.now, key(2), Observation::Handshake { from: through });
    us.drain();
    assert_eq!(us.peer(2).path, Some(path(PUBLIC)));
    assert_eq!(us.table().peers[&key(2)].endpoint, Some(path(PUBLIC)));
}

#[test]
fn a_reflexive_address_survives_a_second_address_on_the_only_uplink() {
    let mut us = Us::new(1);
    us.mesh.set_reflectors(us.now, vec![addr(PUBLIC)]);
    let at = |last: u8| LocalAddress { address: [192, 168, 1, last].into(), interface: 1 };
    us.mesh.set_uplinks(us.now, vec![at(9)], vec![candidate(PRIVATE)]);
    let asked = stun(&us.run(Duration::from_millis(1)));
    us.mesh.handle_stun(us.now, asked[0].0, asked[0].1, addr(OTHER));
    us.drain();
    for uplinks in [vec![at(9), at(10)], vec![at(9)]] {
        // Our candidates change with it.
        let more = candidate(&format!("192.168.1.{}:51830", 200 + uplinks.len()));
        us.mesh.set_uplinks(us.now, uplinks, vec![candidate(PRIVATE), more]);
        let outputs = us.drain();
        let advertised = outputs.iter().rev().find_map(|output| match output {
            Output::Advertise(list) => Some(list),
            _ => None,
        });
        let is_known = advertised.unwrap().iter().any(|own| own.address() == addr(OTHER));
        assert!(is_known, "until another answer comes: {outputs:?}");
    }
}

#[test]
fn two_uplinks_of_a_multipath_route_are_no_nat_with_a_port_for_each_peer() {
    let mut us = Us::new(1);
    us.mesh.set_reflectors(us.now, vec![addr(PUBLIC), addr("203.0.113.8:3478")]);
    let ends =
        [1, 2].map(|n| LocalAddress { address: [192, 168, n, 9].into(), interface: n.into() });
    us.mesh.set_uplinks(us.now, ends.to_vec(), vec![candidate(PRIVATE)]);
    for output in us.run(Duration::from_millis(1)) {
        let Output::Stun { to, transaction } = output else { continue };
        // What the kernel chooses goes by one uplink to the one, and by the other to the other.
        let by = match to.local {
            Some(end) => end.interface,
            None if to.remote == addr(PUBLIC) => 1,
            None => 2,
        };
        let mapped = addr(&format!("198.51.100.{by}:4000"));
        us.mesh.handle_stun(us.now, to.remote, transaction, mapped);
    }
    assert_eq!(us.mesh.mapping(), Some(Mapping::Independent));
}

#[test]
fn one_silent_reflector_means_blocked_udp_until_a_peer_was_reached() {
    use towline_core::reason::PeerReason;
    let is_blocked = |us: &Us| matches!(us.peer(2).reason, Some(PeerReason::UdpBlocked(_)));
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    // The controller runs on the only public node, so there is one reflector.
    us.mesh.set_reflectors(us.now, vec![PUBLIC.parse().unwrap()]);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.mesh.handle_observation(us.now, key(2), Observation::Wanted);
    us.run(Duration::from_secs(60));
    assert!(is_blocked(&us), "{:?}", us.peer(2).reason);
    us.upsert(peer(3).candidates(&[OTHER]));
    let from = OTHER.parse::<SocketAddr>().unwrap().into();
    us.mesh.handle_observation(us.now, key(3), Observation::Handshake { from });
    us.run(Duration::from_secs(1));
    assert!(!is_blocked(&us), "UDP leads somewhere");
}
