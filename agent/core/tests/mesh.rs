//! One mesh, step by step, in the order of a peer's life.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: a panic is the report

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_core::mesh::{
    Config, MapChange, Membership, Mesh, Output, PeerState, PeerStatus, ReceivedProbe,
};
use towline_core::path::{ChannelId, Path};
use towline_core::peer_table::{Observation, PeerTable};
use towline_core::plan::{Plan, RouteVia, RulePlan};
use towline_core::reflex::Mapping;
use towline_core::relay::{RelayAnswer, RelayRequest};
use towline_core::signal::Signal;
use towline_proto::id::{IdentityKey, MeshId, NodeId, WireguardKey};
use towline_proto::node::{
    Candidate, CandidateKind, Grant, MeshConfig, Node, OverlayAddresses, Record, Tombstone,
};

const PUBLIC: &str = "203.0.113.7:51830";
const PRIVATE: &str = "192.168.1.7:51830";
const OTHER: &str = "203.0.113.77:51830";

// Being told of a peer

#[test]
fn the_guards_stand_before_any_peer_is_known() {
    let mut us = Us::new(5);
    us.drain();
    let routes: Vec<_> = us.plan().routes.keys().copied().collect();
    assert_eq!(
        routes,
        [
            (net("10.0.0.0/8"), RouteVia::Unreachable),
            (net("198.19.0.0/16"), RouteVia::Unreachable),
            (net("fd00::/64"), RouteVia::Unreachable),
        ]
    );
    assert_eq!(us.plan().firewall.guarded.len(), 3);
    assert!(us.plan().link.addresses.contains(&net("198.19.0.5/32")));
}

#[test]
fn a_peers_prefixes_are_routed_into_the_tunnel_with_our_overlay_address_as_source() {
    let mut us = Us::new(5);
    us.upsert(peer(2).prefixes(&["10.244.2.0/24", "192.168.50.0/24"]));
    us.drain();
    let route = |text: &str, via| us.plan().routes.get(&(net(text), via)).copied();
    let source = |text| route(text, RouteVia::Link).and_then(|route| route.source);
    assert_eq!(source("10.244.2.0/24"), Some([198, 19, 0, 5].into()));
    assert_eq!(source("fd00::2/128"), Some("fd00::5".parse().unwrap()));
    assert!(route("192.168.50.0/24", RouteVia::Unreachable).is_some(), "guarded too");
    assert!(route("10.244.2.0/24", RouteVia::Unreachable).is_none(), "10.0.0.0/8 covers it");
    assert_eq!(us.table().peers[&key(2)].prefixes.len(), 4);
}

#[test]
fn the_same_map_twice_changes_nothing_and_an_older_record_neither() {
    let mut us = Us::new(5);
    us.upsert(peer(2).generation(4).prefixes(&["10.1.0.0/16"]));
    us.drain();
    us.upsert(peer(2).generation(4).prefixes(&["10.1.0.0/16"]));
    us.upsert(peer(2).generation(3).prefixes(&["10.2.0.0/16"]));
    let outputs = us.drain();
    assert!(!outputs.iter().any(|o| matches!(o, Output::PeerTable(_) | Output::Plan(_))));
}

#[test]
fn a_prefix_that_the_controller_begins_to_withhold_leaves_the_tunnel() {
    let mut us = Us::new(5);
    us.upsert(peer(2).prefixes(&["10.1.0.0/16"]));
    us.drain();
    us.upsert(peer(2));
    us.drain();
    assert!(!us.table().peers[&key(2)].prefixes.contains(&net("10.1.0.0/16")));
}

#[test]
fn a_removed_node_never_comes_back_nor_does_its_key_under_another_id() {
    let mut us = Us::new(5);
    us.upsert(peer(2));
    us.mesh.update(us.now, MapChange::Remove(tombstone(2)));
    us.upsert(peer(2).generation(9));
    us.upsert(peer(3).identity(2));
    us.drain();
    assert!(us.table().peers.is_empty());
    assert_eq!(us.mesh.peers().count(), 0);
}

#[test]
fn our_own_node_in_the_map_is_ignored_and_our_own_prefix_stays_out_of_the_tunnel() {
    let mut us = Us::new(5);
    us.mesh.set_prefixes(us.now, vec![net("10.244.5.0/24")]);
    us.upsert(peer(5));
    us.upsert(peer(2).prefixes(&["10.244.5.0/24"]));
    us.drain();
    assert_eq!(us.table().peers.len(), 1);
    let inside = |n: &IpNet| n.contains(&net("10.244.5.0/24")) || net("10.244.5.0/24").contains(n);
    assert!(!us.plan().routes.keys().any(|(n, _)| inside(n)), "local pods keep their routes");
    assert!(!us.plan().firewall.guarded.iter().any(inside));
    assert_eq!(us.peer(2).conflicts, ["prefix 10.244.5.0/24 is held by this node"]);
}

#[test]
fn a_withdrawn_prefix_stays_guarded_until_its_node_is_removed() {
    let mut us = Us::new(5);
    us.upsert(peer(2).prefixes(&["172.20.0.0/16"]));
    us.drain();
    us.upsert(peer(2).generation(2));
    us.drain();
    assert!(!us.plan().routes.contains_key(&(net("172.20.0.0/16"), RouteVia::Link)));
    assert!(us.plan().routes.contains_key(&(net("172.20.0.0/16"), RouteVia::Unreachable)));
    us.upsert(peer(3).prefixes(&["172.20.0.0/16"]));
    us.drain();
    assert!(us.plan().routes.contains_key(&(net("172.20.0.0/16"), RouteVia::Link)));
    us.mesh.update(us.now, MapChange::Remove(tombstone(3)));
    us.drain();
    assert!(!us.plan().firewall.guarded.contains(&net("172.20.0.0/16")));
}

#[test]
fn of_two_claims_the_earlier_grant_wins_whatever_came_first() {
    let claims = || {
        [
            peer(2).issued(20).prefixes(&["10.1.0.0/16"]),
            peer(3).issued(10).prefixes(&["10.1.0.0/16"]),
        ]
    };
    for reverse in [false, true] {
        let mut us = Us::new(5);
        let mut nodes = claims().to_vec();
        if reverse {
            nodes.reverse();
        }
        for node in nodes {
            us.upsert(node);
        }
        us.drain();
        assert!(!us.table().peers[&key(2)].prefixes.contains(&net("10.1.0.0/16")));
        assert!(us.table().peers[&key(3)].prefixes.contains(&net("10.1.0.0/16")));
        assert_eq!(us.peer(2).conflicts, ["prefix 10.1.0.0/16 is held by node-3"]);
    }
}

#[test]
fn a_key_that_another_node_holds_gives_no_tunnel_and_says_why() {
    let mut us = Us::new(5);
    us.upsert(peer(2).issued(1).candidates(&[PUBLIC]));
    us.upsert(peer(3).issued(2).wireguard(2).candidates(&[PUBLIC]));
    us.run(Duration::from_secs(1));
    assert_eq!(us.table().peers.len(), 1);
    assert_eq!(us.peer(3).reason, "its WireGuard key is held by node-2");
}

// Connecting

#[test]
fn all_candidates_are_tried_at_once_with_one_initiation() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC, "192.168.1.7:51830", "203.0.113.7:51830"]));
    let outputs = us.run(Duration::from_millis(100));
    assert_eq!(handshakes(&outputs), [vec![path(PUBLIC), path(PRIVATE)]]);
    assert_eq!(outputs.iter().filter(|o| matches!(o, Output::Ping { .. })).count(), 2);
}

#[test]
fn of_two_nodes_that_can_both_be_called_the_one_with_the_higher_key_waits_a_moment() {
    let mut us = Us::new(9);
    us.mesh.set_candidates(us.now, vec![candidate("203.0.113.9:51830")]);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    assert!(handshakes(&us.run(Duration::from_millis(250))).is_empty());
    assert_eq!(handshakes(&us.run(Duration::from_millis(200))).len(), 1);
}

#[test]
fn who_cannot_be_called_begins_at_once() {
    let mut us = Us::new(9);
    us.mesh.set_candidates(us.now, vec![candidate("192.168.7.9:51830")]);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    assert_eq!(handshakes(&us.run(Duration::from_millis(50))).len(), 1);
}

#[test]
fn no_answer_means_down_with_a_reason_and_attempts_for_ever_but_few() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate("203.0.113.9:51830")]);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.run(Duration::from_secs(60));
    let status = us.peer(2);
    assert_eq!(status.state, PeerState::Down);
    assert!(status.reason.starts_with("no answer from 1 candidate for "), "{}", status.reason);
    let later = handshakes(&us.run(Duration::from_secs(3600))).len();
    assert!((100..=160).contains(&later), "{later}");
}

#[test]
fn two_nodes_behind_nat_say_that_they_need_a_relay() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate("192.168.7.9:51830")]);
    us.upsert(peer(2).candidates(&["192.168.1.7:51830"]));
    us.run(Duration::from_secs(30));
    let reason = us.peer(2).reason;
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
    us.mesh.probe_received(us.now, key(2), from, ReceivedProbe::Ping { transaction: 7 });
    let outputs = us.run(Duration::from_secs(1));
    assert!(outputs.contains(&Output::Pong { peer: key(2), to: from, transaction: 7 }));
    assert!(handshakes(&outputs).contains(&vec![from]));
}

// Up

#[test]
fn a_handshake_makes_its_address_the_path_and_the_path_is_measured() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.drain();
    us.mesh.observe(us.now, key(2), Observation::Handshake { from: path(PUBLIC) });
    us.echo(Duration::from_millis(40), Duration::from_secs(5));
    let status = us.peer(2);
    assert_eq!((status.state, status.path), (PeerState::Up, Some(path(PUBLIC))));
    assert_eq!(status.rtt, Some(Duration::from_millis(40)));
    assert_eq!(status.reason, "");
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
fn one_lost_pong_changes_nothing() {
    let mut us = Us::up(PUBLIC);
    us.run(Duration::from_millis(1_400));
    us.echo(Duration::from_millis(10), Duration::from_secs(3));
    assert_eq!(us.peer(2).state, PeerState::Up);
}

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
fn a_session_that_ended_is_renewed_at_once_on_the_path() {
    let mut us = Us::up(PUBLIC);
    us.mesh.observe(us.now, key(2), Observation::SessionExpired);
    assert_eq!(handshakes(&us.drain()), [vec![path(PUBLIC)]]);
    assert_eq!(us.peer(2).state, PeerState::Up);
}

#[test]
fn a_peer_that_roamed_is_followed_but_not_into_the_tunnel() {
    let mut us = Us::up(PUBLIC);
    let elsewhere = path("198.51.100.9:9");
    us.mesh.observe(us.now, key(2), Observation::Roamed { from: elsewhere });
    us.drain();
    assert_eq!(us.table().peers[&key(2)].endpoint, Some(elsewhere));
    us.mesh.observe(us.now, key(2), Observation::Roamed { from: path("198.19.0.2:51830") });
    us.drain();
    assert_eq!(us.table().peers[&key(2)].endpoint, Some(elsewhere));
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

// Past the tunnel

#[test]
fn node_ips_of_a_trusted_site_are_reached_past_the_tunnel_and_nothing_else_is() {
    let mut us = Us::new(5);
    us.site(Some("dc-a"));
    us.mesh.set_prefixes(us.now, vec![net("10.244.5.0/24"), net("192.168.1.5/32")]);
    us.mesh.set_node_ips(us.now, vec!["192.168.1.5".parse().unwrap()]);
    let there = ["192.168.1.2/32", "10.244.2.0/24"];
    us.upsert(peer(2).site("dc-a").prefixes(&there));
    us.upsert(peer(3).site("dc-b").prefixes(&["192.168.1.3/32"]));
    us.drain();
    let node_ip = (net("192.168.1.2/32"), RouteVia::Native);
    assert!(!us.plan().routes.contains_key(&node_ip), "not before the mesh says so");
    let source = us.plan().routes[&(net("192.168.1.2/32"), RouteVia::Link)].source;
    assert_eq!(source, Some([192, 168, 1, 5].into()), "our node IP");

    us.configure(|mesh| mesh.trusted_sites = vec!["dc-a".parse().unwrap()]);
    us.drain();
    let plan = us.plan();
    assert!(plan.routes.contains_key(&node_ip));
    let native: Vec<_> = plan.routes.keys().filter(|(_, via)| *via == RouteVia::Native).collect();
    assert_eq!(native, [&node_ip]);
    assert_eq!(plan.firewall.native, [net("192.168.1.2/32")].into());
    assert_eq!(plan.firewall.plain, [net("192.168.1.2/32")].into());
    assert_eq!(plan.detour.sources, [net("10.244.5.0/24")].into());
    assert_eq!(plan.detour.destinations, [net("192.168.1.2/32")].into());
    assert!(plan.firewall.guarded.contains(&net("192.168.1.2/32")), "guarded all the same");
    assert!(us.table().peers[&key(2)].prefixes.contains(&net("192.168.1.2/32")));

    us.configure(|mesh| mesh.trusted_sites.clear());
    us.drain();
    assert!(us.plan().firewall.native.is_empty() && us.plan().detour.destinations.is_empty());
}

#[test]
fn what_may_go_in_clear_does_so_only_while_its_peer_is_down() {
    let mut us = Us::up(PUBLIC);
    us.upsert(
        peer(2).candidates(&[PUBLIC]).generation(2).prefixes(&["172.20.2.0/24", "10.9.9.0/24"]),
    );
    us.configure(|mesh| mesh.bypass_when_down = vec![net("172.20.0.0/16")]);
    us.drain();
    let prefix = net("172.20.2.0/24");
    assert!(us.plan().routes.contains_key(&(prefix, RouteVia::Link)));
    assert!(us.plan().firewall.native.is_empty());
    assert_eq!(us.plan().firewall.plain, [prefix].into(), "the peer may see it as down before us");
    // Nobody answers any more.
    us.run(Duration::from_secs(60));
    assert_eq!(us.peer(2).state, PeerState::Down);
    assert!(us.plan().routes.contains_key(&(prefix, RouteVia::Native)));
    assert_eq!(us.plan().firewall.native, [prefix].into());
    assert!(
        us.plan().routes.contains_key(&(net("10.9.9.0/24"), RouteVia::Link)),
        "the others stay"
    );
}

#[test]
fn a_plan_that_was_patched_is_the_one_that_is_built_anew() {
    let mut us = Us::new(1);
    us.mesh.set_prefixes(us.now, vec![net("10.244.1.0/24")]);
    us.drain();
    let steps: Vec<MapChange> = vec![
        peer(2).prefixes(&["172.20.1.0/24", "172.20.2.0/24"]).into(),
        peer(3).prefixes(&["172.21.0.0/16", "192.168.3.0/24"]).into(),
        peer(2).generation(2).prefixes(&["172.20.2.0/24", "10.244.2.0/24"]).into(),
        // Around what was withdrawn, and inside another's.
        peer(4).prefixes(&["172.20.0.0/23", "172.21.7.0/24"]).into(),
        MapChange::Remove(tombstone(3)),
        peer(2).generation(3).into(),
        MapChange::Remove(tombstone(4)),
        peer(5).prefixes(&["172.20.2.0/24", "10.244.1.0/24"]).into(),
        MapChange::Remove(tombstone(2)),
    ];
    let mut so_far = Vec::new();
    for step in steps {
        us.mesh.update(us.now, step.clone());
        us.drain();
        so_far.push(step);
        let mut anew = Us::new(1);
        anew.mesh.set_prefixes(anew.now, vec![net("10.244.1.0/24")]);
        // The same history, looked at once.
        for step in &so_far {
            anew.mesh.update(anew.now, step.clone());
            anew.mesh.peers().count();
            anew.mesh.set_withdrawn(anew.now, us.mesh.withdrawn().iter().copied());
        }
        anew.drain();
        assert_eq!(us.plan(), anew.plan(), "after {} steps", so_far.len());
        assert_eq!(us.table(), anew.table(), "after {} steps", so_far.len());
    }
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
    us.mesh.observe(us.now, key(2), Observation::Handshake { from: path(PUBLIC) });
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_secs(3));
    us.silent = Some(addr(PUBLIC));
    us.echo(Duration::from_millis(10), Duration::from_millis(1_700));
    assert_eq!(us.peer(2).path, Some(path(OTHER)));
    assert_eq!(us.peer(2).state, PeerState::Up);
}

// Many peers

#[test]
fn a_thousand_peers_cost_nothing_until_there_is_traffic_for_one() {
    let mut us = Us::new(1);
    for number in 0..1_000 {
        us.upsert(numbered(number).candidates(&[PUBLIC]));
    }
    let outputs = us.run(Duration::from_secs(600));
    let probes = |outputs: &[Output]| {
        outputs
            .iter()
            .filter(|o| matches!(o, Output::Ping { .. } | Output::Handshake { .. }))
            .count()
    };
    let eager = 64;
    assert!(handshakes(&outputs).len() < eager * 60, "only those of a small mesh");
    let quiet = numbered(700).build();
    assert_eq!(us.mesh.peer(quiet.id()).unwrap().state, PeerState::Idle);
    us.mesh.observe(us.now, quiet.wireguard_key(), Observation::Wanted);
    assert_eq!(probes(&us.run(Duration::from_millis(1))), 2);
}

// Reflexive addresses

#[test]
fn a_reflexive_address_is_advertised_and_the_mapping_judged_by_two_reflectors_only() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.mesh.set_reflectors(us.now, vec![addr("203.0.113.1:7443"), addr("203.0.113.2:7443")]);
    let asked = stun(&us.run(Duration::from_millis(1)));
    assert_eq!(asked.len(), 2);
    let mapped = addr("198.51.100.1:4000");
    us.mesh.stun_received(us.now, None, asked[0].0, asked[0].1, mapped);
    let outputs = us.drain();
    assert!(outputs.iter().any(|o| matches!(o, Output::Advertise(list) if list.len() == 2)));
    assert_eq!(us.mesh.mapping(), None);
    // Not what nobody asked for, nor what leads into the mesh.
    us.mesh.stun_received(us.now, None, asked[1].0, [0; 12], mapped);
    us.mesh.stun_received(us.now, None, asked[1].0, asked[1].1, addr("198.19.0.9:1"));
    assert_eq!(us.mesh.counters().stun_refused, 2);
    us.mesh.stun_received(us.now, None, asked[1].0, asked[1].1, addr("198.51.100.1:4001"));
    assert_eq!(us.mesh.mapping(), Some(Mapping::Dependent));
}

// Signals and relays

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

#[test]
fn a_node_registers_with_relays_and_asks_for_a_channel_where_the_peer_is_at_home() {
    let mut us = Us::new(1);
    us.mesh.set_candidates(us.now, vec![candidate(PRIVATE)]);
    us.upsert(peer(9).relay().candidates(&[OTHER]));
    us.upsert(peer(2).candidates(&["192.168.1.9:51830"]));
    let requests = relayed(&us.run(Duration::from_millis(50)));
    let register = requests.iter().find_map(|request| match request {
        RelayRequest::Register { relay, to, .. } => Some((*relay, to.remote)),
        RelayRequest::Open { .. } => None,
    });
    assert_eq!(register, Some((key(9), addr(OTHER))));
    let opened = requests.iter().find_map(|request| match request {
        RelayRequest::Open { peer, transaction, .. } => Some((*peer, *transaction)),
        RelayRequest::Register { .. } => None,
    });
    let (peer, transaction) = opened.unwrap();
    assert_eq!(peer, key(2));
    let channel = ChannelId(77);
    let answer = RelayAnswer::Opened { transaction, channel };
    us.mesh.relay_received(us.now, key(9), path(OTHER), answer);
    let through = Path { channel: Some(channel), ..path(OTHER) };
    let outputs = us.drain();
    assert!(pings(&outputs).iter().any(|(to, _)| *to == through));
    assert_eq!(handshakes(&outputs), [vec![through]]);
    // A relay that lies about channels is not believed.
    let answer = RelayAnswer::Opened { transaction: 1, channel };
    us.mesh.relay_received(us.now, key(9), path(OTHER), answer);
    let answer = RelayAnswer::Incoming { peer: key(2), channel };
    us.mesh.relay_received(us.now, key(2), path(PUBLIC), answer);
    assert_eq!(us.mesh.counters().relay_answers_refused, 2);
}

#[test]
fn traffic_moves_from_a_relay_to_a_direct_path_by_a_handshake_there() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.drain();
    let through = Path { channel: Some(ChannelId(7)), ..path(OTHER) };
    us.mesh.observe(us.now, key(2), Observation::Handshake { from: through });
    us.active();
    let outputs = us.pass(Duration::from_secs(2), Some(Duration::from_millis(10)));
    assert!(handshakes(&outputs).contains(&vec![path(PUBLIC)]));
    assert_eq!(us.table().peers[&key(2)].endpoint, Some(through), "not before it is through");
}

// Path MTU

#[test]
fn a_black_hole_is_found_and_the_route_and_the_data_plane_follow() {
    let mut us = Us::new(1);
    us.upsert(peer(2).candidates(&[PUBLIC]));
    us.drain();
    us.payload = 1_368 - 28;
    us.mesh.observe(us.now, key(2), Observation::Handshake { from: path(PUBLIC) });
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_secs(10));
    let mtu = us.peer(2).mtu.unwrap();
    assert!((1_300..=1_308).contains(&mtu), "{mtu}");
    assert_eq!(us.table().peers[&key(2)].mtu, mtu);
    assert!(us.plan().routes.values().any(|route| route.mtu == Some(mtu.into())));
    us.mesh.observe(us.now, key(2), Observation::TooBig { path: path(PUBLIC), payload: 1_252 });
    us.payload = 1_252;
    us.active();
    us.echo(Duration::from_millis(10), Duration::from_secs(10));
    let entry = &us.table().peers[&key(2)];
    assert_eq!((entry.mtu, entry.fragment), (1_280, true));
}

// Harness

fn mesh_config() -> MeshConfig {
    MeshConfig {
        mesh_id: MeshId([1; 16]),
        overlay_v6: "fd00::/64".parse().unwrap(),
        overlay_v4: "198.19.0.0/16".parse().unwrap(),
        protected: vec![net("10.0.0.0/8")],
        trusted_sites: Vec::new(),
        bypass_when_down: Vec::new(),
        lease: Duration::from_secs(600),
        generation: 1,
    }
}

struct Us {
    mesh: Mesh,
    now: Instant,
    table: Arc<PeerTable>,
    plan: Option<Arc<Plan>>,
    results: BTreeMap<u64, Option<(Path, Duration)>>,
    outputs: usize,
    /// Pings to here are not answered, nor larger ones than this.
    silent: Option<SocketAddr>,
    payload: u16,
}

impl Us {
    fn new(number: u8) -> Self {
        #[allow(clippy::disallowed_methods)] // some instant to count from
        let now = Instant::now();
        let config = Config {
            membership: Some(Membership { grant: grant(number), mesh: mesh_config() }),
            link: "towline0".into(),
            mtu: 1420,
            table: 1,
            rules: RulePlan { priority: 1, mark: 1, mask: 1 },
            firewall_table: "towline".into(),
            relay: false,
            boot_epoch: 1,
        };
        let mesh = Mesh::new(config, [7; 32], now);
        let (table, results) = (Arc::default(), BTreeMap::new());
        Self { mesh, now, table, plan: None, results, outputs: 0, silent: None, payload: u16::MAX }
    }

    /// With peer 2 up on `path`, in use, and one pong taken.
    fn up(path: &str) -> Self {
        let mut us = Self::new(1);
        us.upsert(peer(2).candidates(&[path]));
        us.drain();
        us.mesh.observe(
            us.now,
            key(2),
            Observation::Handshake { from: path.parse::<SocketAddr>().unwrap().into() },
        );
        us.active();
        us.echo(Duration::from_millis(10), Duration::from_millis(500));
        us
    }

    fn site(&mut self, site: Option<&str>) {
        let site = site.map(|site| site.parse().unwrap());
        self.mesh.set_grant(self.now, Grant { site, ..self.mesh.grant().unwrap().clone() });
    }

    fn configure(&mut self, change: impl FnOnce(&mut MeshConfig)) {
        let mut mesh = self.mesh.config().unwrap().clone();
        change(&mut mesh);
        mesh.generation += 1;
        self.mesh.update(self.now, MapChange::Mesh(mesh));
    }

    /// Inner packets travel to and from peer 2.
    fn active(&mut self) {
        let active = Observation::Active { sent: true, received: true };
        self.mesh.observe(self.now, key(2), active);
    }

    fn upsert(&mut self, node: Build) {
        self.mesh.update(self.now, MapChange::Upsert(Box::new(node.build())));
    }

    fn drain(&mut self) -> Vec<Output> {
        let mut outputs = Vec::new();
        while let Some(output) = self.mesh.poll_output() {
            match &output {
                Output::PeerTable(table) => self.table = table.clone(),
                Output::Plan(plan) => self.plan = Some(plan.clone()),
                Output::PingResult { id, answer } => {
                    assert!(self.results.insert(*id, *answer).is_none(), "ping {id} ended twice");
                }
                Output::Ping { .. }
                | Output::Pong { .. }
                | Output::Handshake { .. }
                | Output::Stun { .. }
                | Output::Signal { .. }
                | Output::Relay(_)
                | Output::Advertise(_)
                | Output::StateChanged { .. }
                | Output::StaticStateChanged { .. } => {}
            }
            self.outputs += 1;
            outputs.push(output);
        }
        outputs
    }

    /// Time passes; nobody answers.
    fn run(&mut self, time: Duration) -> Vec<Output> {
        self.pass(time, None)
    }

    /// Time passes; every ping is answered after `rtt`.
    fn echo(&mut self, rtt: Duration, time: Duration) {
        self.pass(time, Some(rtt));
    }

    fn pass(&mut self, time: Duration, rtt: Option<Duration>) -> Vec<Output> {
        let end = self.now + time;
        let mut all = self.drain();
        let mut pongs: Vec<_> = Vec::new();
        let mut fresh = all.clone();
        loop {
            if let Some(rtt) = rtt {
                for (to, transaction) in answerable(&fresh, self.silent, self.payload) {
                    pongs.push((self.now + rtt, to, transaction));
                }
            }
            let pong = pongs.iter().map(|(at, ..)| *at).min();
            let timeout = self.mesh.poll_timeout().map(|(at, _)| at);
            let Some(next) = pong.into_iter().chain(timeout).min().filter(|at| *at <= end) else {
                break;
            };
            self.now = self.now.max(next);
            if pong == Some(next) {
                let first = pongs.iter().position(|(at, ..)| *at == next).unwrap();
                let (_, to, transaction) = pongs.remove(first);
                let pong = ReceivedProbe::Pong { transaction, observed: addr(PRIVATE) };
                self.mesh.probe_received(self.now, key(2), to, pong);
            } else {
                self.mesh.handle_timeout(self.now);
            }
            fresh = self.drain();
            all.extend(fresh.iter().cloned());
        }
        self.now = end;
        all
    }

    fn table(&self) -> &PeerTable {
        &self.table
    }

    fn plan(&self) -> &Plan {
        self.plan.as_ref().unwrap()
    }

    fn peer(&self, number: u8) -> PeerStatus {
        self.mesh.peers().find(|peer| peer.node.id() == id(number)).unwrap()
    }
}

fn handshakes(outputs: &[Output]) -> Vec<Vec<Path>> {
    let to = outputs.iter().filter_map(|o| match o {
        Output::Handshake { to, .. } => Some(to.clone()),
        _ => None,
    });
    to.collect()
}

/// Pings that a peer gets to see.
fn answerable(outputs: &[Output], silent: Option<SocketAddr>, payload: u16) -> Vec<(Path, u64)> {
    let to = outputs.iter().filter_map(|o| match o {
        Output::Ping { to, transaction, size, .. }
            if Some(to.remote) != silent && size.is_none_or(|size| size <= payload) =>
        {
            Some((*to, *transaction))
        }
        _ => None,
    });
    to.collect()
}

fn stun(outputs: &[Output]) -> Vec<(SocketAddr, [u8; 12])> {
    let asked = outputs.iter().filter_map(|o| match o {
        Output::Stun { to, transaction, .. } => Some((*to, *transaction)),
        _ => None,
    });
    asked.collect()
}

fn relayed(outputs: &[Output]) -> Vec<RelayRequest> {
    let requests = outputs.iter().filter_map(|o| match o {
        Output::Relay(request) => Some(*request),
        _ => None,
    });
    requests.collect()
}

fn pings(outputs: &[Output]) -> Vec<(Path, u64)> {
    let to = outputs.iter().filter_map(|o| match o {
        Output::Ping { to, transaction, .. } => Some((*to, *transaction)),
        _ => None,
    });
    to.collect()
}

#[derive(Clone)]
struct Build {
    grant: Grant,
    record: Record,
}

fn peer(number: u8) -> Build {
    let record = Record {
        node_id: id(number),
        generation: 1,
        boot_epoch: 1,
        wireguard_keys: vec![key(number)],
        candidates: Vec::new(),
        prefixes: Vec::new(),
        version: String::new(),
        relay: false,
    };
    Build { grant: grant(number), record }
}

/// One of many: with an id and a key of two bytes.
fn numbered(number: u16) -> Build {
    let mut build = peer(2);
    let [high, low] = (number + 1_000).to_be_bytes();
    let mut id = [0; 16];
    id[..2].copy_from_slice(&[high, low]);
    let mut key = [0; 32];
    key[..2].copy_from_slice(&[high, low]);
    build.grant.node_id = NodeId(id);
    build.grant.name = format!("many-{number}").parse().unwrap();
    build.grant.identity_key = IdentityKey(key);
    build.grant.wireguard_keys = vec![WireguardKey(key)];
    build.grant.overlay = OverlayAddresses {
        v6: std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 1, number),
        v4: [198, 19, high, low].into(),
    };
    build.record.node_id = NodeId(id);
    build.record.wireguard_keys = vec![WireguardKey(key)];
    build
}

impl Build {
    fn relay(mut self) -> Self {
        self.record.relay = true;
        self
    }

    fn candidates(mut self, list: &[&str]) -> Self {
        self.record.candidates = list.iter().map(|text| candidate(text)).collect();
        self
    }

    fn prefixes(mut self, list: &[&str]) -> Self {
        self.record.prefixes = list.iter().map(|text| net(text)).collect();
        self
    }

    fn generation(mut self, generation: u64) -> Self {
        self.record.generation = generation;
        self
    }

    fn site(mut self, site: &str) -> Self {
        self.grant.site = Some(site.parse().unwrap());
        self
    }

    fn issued(mut self, at: i64) -> Self {
        self.grant.issued_at = at;
        self
    }

    fn identity(mut self, number: u8) -> Self {
        self.grant.identity_key = IdentityKey([number; 32]);
        self
    }

    fn wireguard(mut self, number: u8) -> Self {
        self.grant.wireguard_keys = vec![key(number)];
        self.record.wireguard_keys = vec![key(number)];
        self
    }

    fn build(self) -> Node {
        Node::new(self.grant, self.record).unwrap()
    }
}

impl From<Build> for MapChange {
    fn from(build: Build) -> Self {
        Self::Upsert(Box::new(build.build()))
    }
}

fn grant(number: u8) -> Grant {
    Grant {
        mesh_id: MeshId([1; 16]),
        node_id: id(number),
        name: format!("node-{number}").parse().unwrap(),
        identity_key: IdentityKey([number; 32]),
        wireguard_keys: vec![key(number)],
        overlay: OverlayAddresses {
            v6: format!("fd00::{number}").parse().unwrap(),
            v4: [198, 19, 0, number].into(),
        },
        allowed_prefixes: ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"].map(net).to_vec(),
        site: None,
        labels: BTreeMap::new(),
        issued_at: i64::from(number),
        ephemeral: false,
    }
}

fn tombstone(number: u8) -> Tombstone {
    Tombstone {
        mesh_id: MeshId([1; 16]),
        node_id: id(number),
        name: format!("node-{number}").parse().unwrap(),
        identity_key: IdentityKey([number; 32]),
        removed_at: 0,
    }
}

fn candidate(text: &str) -> Candidate {
    Candidate::new(CandidateKind::Local, addr(text)).unwrap()
}

fn id(number: u8) -> NodeId {
    NodeId([number; 16])
}

fn key(number: u8) -> WireguardKey {
    WireguardKey([number; 32])
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn path(text: &str) -> Path {
    addr(text).into()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}
