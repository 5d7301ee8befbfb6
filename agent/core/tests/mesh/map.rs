//! What the map says, and who holds what.

use super::*;

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
            (net("fd00:7::/64"), RouteVia::Unreachable),
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
    assert_eq!(source("fd00:7::2/128"), Some("fd00:7::5".parse().unwrap()));
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
    us.mesh.handle_map_change(us.now, MapChange::Remove(tombstone(2)));
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
    assert_eq!(us.conflicts(2), ["prefix 10.244.5.0/24 is held by this node"]);
}

#[test]
fn a_prefix_that_the_controller_would_refuse_is_refused_here_too() {
    let mut us = Us::new(5);
    let wide = ["198.18.0.0/15", "128.0.0.0/1", "10.1.0.0/16"];
    let mut node = peer(2).prefixes(&wide);
    node.grant.allowed_prefixes.push(net("0.0.0.0/0"));
    us.upsert(node);
    us.drain();
    let held = &us.table().peers[&key(2)].prefixes;
    assert!(held.contains(&net("10.1.0.0/16")), "{held:?}");
    assert!(!wide[..2].iter().any(|wide| held.contains(&net(wide))), "{held:?}");
    assert_eq!(
        us.conflicts(2),
        [
            "prefix 198.18.0.0/15 overlaps the mesh's own range 198.19.0.0/16: announce another",
            "prefix 128.0.0.0/1 is not a range of unicast hosts: remove it",
        ]
    );
}

#[test]
fn no_controller_gives_a_node_another_identity() {
    let mut us = Us::new(5);
    us.upsert(peer(2));
    us.drain();
    // The identity key of somebody else, and with it another WireGuard key.
    us.upsert(peer(2).identity(9).wireguard(9).generation(9).issued_at(1_000_000));
    us.drain();
    let keys: Vec<_> = us.table().peers.keys().copied().collect();
    assert_eq!(keys, [key(2)]);
    // The node itself may have another WireGuard key: its record names it.
    us.upsert(peer(2).wireguard(9).generation(10));
    us.drain();
    let keys: Vec<_> = us.table().peers.keys().copied().collect();
    assert_eq!(keys, [key(9)]);
}

/// Limits of a host with these addresses in its LAN, to which it was connected when it joined.
fn limits() -> LocalLimits {
    let host = HostAddresses {
        gateways: ["192.168.1.1".parse().unwrap()].into(),
        dns_servers: ["172.31.0.53".parse().unwrap()].into(),
        uplinks: ["192.168.1.10".parse().unwrap()].into(),
    };
    LocalLimits {
        host,
        controllers: ["172.30.0.4".parse().unwrap()].into(),
        local_networks: vec![net("192.168.1.0/24")],
        ..LocalLimits::default()
    }
}

#[test]
fn what_this_host_needs_is_covered_by_no_prefix_of_another_node() {
    let mut us = Us::new(5);
    us.mesh.set_local_limits(us.now, limits());
    let mut node =
        peer(2).prefixes(&["172.30.0.0/16", "172.31.0.0/24", "192.168.0.0/16", "172.20.0.0/16"]);
    us.upsert(node.clone());
    us.drain();
    assert_eq!(
        us.conflicts(2),
        [
            "prefix 172.30.0.0/16 is refused here: it covers the controller 172.30.0.4",
            "prefix 172.31.0.0/24 is refused here: it covers 172.31.0.53, a DNS server of this machine",
            "prefix 192.168.0.0/16 is refused here: it covers 192.168.1.1, a gateway of this machine",
        ]
    );
    assert!(!us.guards("192.168.7.7") && !us.guards("172.30.0.4") && us.guards("172.20.0.1"));

    // A LAN around a local network leaves that as it is, and a node's own address may be named exactly.
    node.record.lans = vec![net("192.168.0.0/16")];
    node.record.prefixes = vec![net("192.168.0.0/16"), net("172.30.0.4/32")];
    node.grant.allowed_prefixes.push(net("172.30.0.4/32"));
    us.upsert(node.clone().generation(2));
    us.drain();
    assert_eq!(us.conflicts(2), [""; 0]);

    // What the operator accepts is accepted, and what he refuses is refused in any case.
    let (accepted, refused) = (vec![net("172.31.0.0/16")], vec![net("172.20.7.0/24")]);
    us.mesh.set_local_limits(us.now, LocalLimits { accepted, refused, ..limits() });
    us.upsert(node.prefixes(&["172.31.0.0/24", "172.20.7.9/32"]).generation(3));
    us.drain();
    let refused = "prefix 172.20.7.9/32 is refused here: it covers 172.20.7.0/24, which [trust] refused_networks names";
    assert_eq!(us.conflicts(2), [refused]);
}

#[test]
fn a_candidate_of_another_node_is_no_reason_to_refuse_a_prefix() {
    let mut us = Us::new(5);
    us.mesh.set_local_limits(us.now, limits());
    us.upsert(peer(2).prefixes(&["172.20.0.0/16"]));
    us.upsert(peer(3).candidates(&["172.20.0.9:51830"]));
    let outputs = us.run(Duration::from_secs(3));
    assert_eq!(us.conflicts(2), [""; 0]);
    assert!(us.guards("172.20.0.9"));
    let outer: SocketAddr = "172.20.0.9:51830".parse().unwrap();
    let called = handshakes(&outputs).concat().iter().any(|path| path.remote == outer);
    let pinged = transmits(&outputs).any(|t| t.path.is_some_and(|path| path.remote == outer));
    assert!(called || pinged, "outer datagrams to it stay outside the tunnel");
}

#[test]
fn a_protected_range_that_covers_the_gateway_is_not_guarded_here() {
    let mut us = Us::new(5);
    us.mesh.set_local_limits(us.now, LocalLimits { refused: vec![net("10.9.0.0/16")], ..limits() });
    us.configure(|mesh| mesh.protected = vec![net("10.0.0.0/8"), net("128.0.0.0/1")]);
    us.drain();
    assert!(us.guards("10.1.0.1") && !us.guards("10.9.1.1") && us.guards("198.19.9.9"));
    assert!(!us.guards("192.168.1.1") && !us.guards("203.0.113.9"));
    let refused: Vec<_> = us.mesh.refused_ranges().map(|(range, _)| range).collect();
    assert_eq!(refused, [net("128.0.0.0/1")]);
    us.upsert(peer(2).prefixes(&["10.9.1.0/24"]));
    us.drain();
    assert!(!us.guards("10.9.1.1"), "it stays with this host");
}

#[test]
fn a_withdrawn_prefix_stays_guarded_until_its_node_is_removed_for_some_time() {
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
    us.mesh.handle_map_change(us.now, MapChange::Remove(tombstone(3)));
    us.run(Duration::from_secs(599));
    assert!(!us.plan().routes.contains_key(&(net("172.20.0.0/16"), RouteVia::Link)));
    assert!(us.plan().firewall.guarded.contains(&net("172.20.0.0/16")));
    us.run(Duration::from_secs(2));
    assert!(!us.plan().firewall.guarded.contains(&net("172.20.0.0/16")));
}

#[test]
fn a_node_that_announces_other_networks_all_the_time_has_few_guarded() {
    let fresh = |generation: u64| -> Vec<String> {
        (0..200).map(|host| format!("172.16.{generation}.{host}/32")).collect()
    };
    let mut us = Us::new(5);
    let own: Vec<String> = (0..200).map(|host| format!("10.7.0.{host}/32")).collect();
    for generation in 1..=10 {
        let fresh = [fresh(generation), own.clone()].concat();
        let fresh: Vec<&str> = fresh.iter().map(String::as_str).collect();
        us.upsert(peer(2).generation(generation).prefixes(&fresh));
        us.drain();
        assert!(us.mesh.withdrawn().len() <= limits::GUARDED_PREFIXES);
        // The overlay, the protected range, and as many as a node may have.
        assert!(us.plan().firewall.guarded.len() <= 4 + limits::GUARDED_PREFIXES);
        let held = &us.table().peers[&key(2)].prefixes;
        assert_eq!(held.len(), 2 + limits::GUARDED_PREFIXES + own.len(), "in a range: all");
    }
    us.upsert(peer(2).generation(11));
    us.drain();
    assert_eq!(us.mesh.withdrawn().len(), limits::GUARDED_PREFIXES);
    assert!(us.guards("172.16.10.0") && !us.guards("172.16.9.0"), "the last ones");

    // The next start knows as much, and releases it in time.
    let mut next = Us::new(5);
    next.mesh.set_withdrawn(next.now, us.mesh.withdrawn().iter().copied());
    for (node, nets) in us.mesh.withdrawn_by_owner() {
        next.mesh.set_withdrawn_owner(next.now, node, nets);
    }
    for us in [&mut us, &mut next] {
        us.mesh.handle_map_change(us.now, MapChange::Remove(tombstone(2)));
        us.run(Duration::from_secs(601));
        assert!(us.mesh.withdrawn().is_empty() && !us.guards("172.16.10.0"));
        assert!(us.guards("10.7.0.1"), "never inside a protected range");
    }
}

#[test]
fn two_gateways_share_a_lan_and_the_one_that_is_not_down_is_used() {
    let lan = net("172.20.0.0/16");
    let gateway = |number: u8, at: &str| {
        let mut node = peer(number).candidates(&[at]).prefixes(&["172.20.0.0/16"]);
        node.grant.allowed_prefixes.push(lan);
        node.grant.shared = vec![SharedPrefix { prefix: lan, group: "lan".parse().unwrap() }];
        node
    };
    let users = |us: &Us| -> Vec<u8> {
        let has = |number: &u8| us.table().peers[&key(*number)].prefixes.contains(&lan);
        [2, 3].into_iter().filter(has).collect()
    };
    let mut us = Us::new(5);
    us.upsert(gateway(2, PUBLIC));
    us.upsert(gateway(3, OTHER));
    us.drain();
    assert!(us.conflicts(2).is_empty() && us.conflicts(3).is_empty());
    let [first] = users(&us)[..] else { panic!("one of them is used") };
    let second = 5 - first;
    assert_eq!(us.table().peers[&key(second)].shared_sources, [lan], "a valid source all the same");
    // Only the second one answers.
    let from = if second == 2 { PUBLIC } else { OTHER };
    let from = from.parse::<SocketAddr>().unwrap().into();
    for _ in 0..20 {
        us.mesh.handle_observation(us.now, key(second), Observation::Handshake { from });
        us.run(Duration::from_secs(1));
    }
    assert_eq!(us.peer(first).state, PeerState::Down);
    assert_ne!(us.peer(second).state, PeerState::Down);
    assert_eq!(users(&us), [second]);
    assert!(us.plan().routes.contains_key(&(lan, RouteVia::Link)));
    // The first one is removed: the second one still holds it.
    us.mesh.handle_map_change(us.now, MapChange::Remove(tombstone(first)));
    us.drain();
    assert!(us.table().peers[&key(second)].prefixes.contains(&lan));
    assert!(us.guards("172.20.0.1") && us.mesh.withdrawn().is_empty());
    // A gateway reaches its LAN by its own link.
    let shared = gateway(2, PUBLIC).grant.shared;
    us.mesh.set_grant(us.now, Grant { shared, ..us.mesh.grant().unwrap().clone() });
    us.mesh.set_prefixes(us.now, vec![lan]);
    us.drain();
    assert!(us.conflicts(second).is_empty() && !us.guards("172.20.0.1"));
    assert!(!us.plan().routes.contains_key(&(lan, RouteVia::Link)));
}

#[test]
fn an_operator_sees_what_is_guarded_and_releases_what_nobody_holds() {
    let mut us = Us::new(5);
    us.upsert(peer(2).prefixes(&["172.20.0.0/16", "172.21.0.0/16"]));
    us.drain();
    us.upsert(peer(2).generation(2).prefixes(&["172.21.0.0/16"]));
    us.drain();
    let guarded = us.mesh.guarded_networks();
    let reason =
        |text: &str| &guarded.iter().find(|guarded| guarded.network == net(text)).unwrap().reason;
    assert_eq!(*reason("10.0.0.0/8"), GuardReason::Protected);
    assert_eq!(*reason("198.19.0.0/16"), GuardReason::Overlay);
    let name = us.peer(2).node.name().clone();
    assert_eq!(*reason("172.21.0.0/16"), GuardReason::Announced(name.clone()));
    let withdrawn = GuardReason::Withdrawn { owner: Some(id(2)), name: Some(name) };
    assert_eq!(*reason("172.20.0.0/16"), withdrawn);

    assert!(!us.mesh.release_withdrawn(us.now, &net("172.21.0.0/16")), "a node holds it");
    assert!(us.mesh.release_withdrawn(us.now, &net("172.20.0.0/16")));
    us.drain();
    assert!(!us.guards("172.20.0.1") && us.guards("172.21.0.1"));
}

#[test]
fn of_two_claims_the_earlier_grant_wins_whatever_came_first() {
    let claims = || {
        [
            peer(2).issued_at(20).prefixes(&["10.1.0.0/16"]),
            peer(3).issued_at(10).prefixes(&["10.1.0.0/16"]),
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
        assert_eq!(us.conflicts(2), ["prefix 10.1.0.0/16 is held by node-3"]);
    }
}

#[test]
fn who_holds_what_does_not_depend_on_the_order_in_which_it_was_heard() {
    let nodes = [
        peer(2).issued_at(20).prefixes(&["10.1.0.0/16", "10.5.0.0/16"]),
        peer(3).issued_at(10).prefixes(&["10.1.0.0/16"]),
        // Of the same second; and it covers what others hold.
        peer(4).issued_at(20).prefixes(&["10.4.0.0/15", "10.9.0.0/24"]),
        // Another's key, and what it claims is free for who comes later.
        peer(6).issued_at(30).wireguard(3).prefixes(&["10.6.0.0/16"]),
        peer(7).issued_at(40).prefixes(&["10.6.0.0/16", "10.9.0.0/24"]),
    ];
    let mut found = BTreeSet::new();
    for order in orders(nodes.len()) {
        let mut us = Us::new(5);
        for number in order {
            us.upsert(nodes[number].clone());
            us.drain();
        }
        let holds =
            us.table().peers.iter().map(|(key, peer)| format!("{key}: {:?}", peer.prefixes));
        let peers = us.mesh.peers();
        let why = peers.map(|peer| {
            let conflicts: Vec<String> = peer.conflicts.iter().map(ToString::to_string).collect();
            format!("{:?} {conflicts:?}", peer.node.name())
        });
        let through = us.plan().routes.iter().filter(|((_, via), _)| *via == RouteVia::Link);
        let through = through.map(|route| format!("{route:?}"));
        found.insert(holds.chain(why).chain(through).collect::<Vec<_>>());
    }
    assert_eq!(found.len(), 1, "{found:#?}");
    let text = format!("{found:?}");
    for line in [
        "prefix 10.1.0.0/16 is held by node-3",
        "prefix 10.4.0.0/15 overlaps 10.5.0.0/16 of node-2",
        "prefix 10.9.0.0/24 is held by node-4",
        "its WireGuard key is held by node-3",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

/// Every order of `count` things.
fn orders(count: usize) -> Vec<Vec<usize>> {
    let Some(last) = count.checked_sub(1) else { return vec![Vec::new()] };
    let insert = |order: Vec<usize>| {
        (0..=order.len()).map(move |place| {
            let mut order = order.clone();
            order.insert(place, last);
            order
        })
    };
    orders(last).into_iter().flat_map(insert).collect()
}

#[test]
fn a_key_that_another_node_holds_gives_no_tunnel_and_says_why() {
    let mut us = Us::new(5);
    us.upsert(peer(2).issued_at(1).candidates(&[PUBLIC]));
    us.upsert(peer(3).issued_at(2).wireguard(2).candidates(&[PUBLIC]));
    us.run(Duration::from_secs(1));
    assert_eq!(us.table().peers.len(), 1);
    assert_eq!(us.reason(3), "its WireGuard key is held by node-2");
}

#[test]
fn a_map_that_is_too_old_carries_no_traffic_until_a_controller_confirms_it() {
    let mut us = Us::up(PUBLIC);
    let guarded = us.plan().firewall.guarded.clone();
    us.mesh.set_map_expired(us.now, true);
    us.drain();
    assert!(us.table().peers.is_empty() && us.mesh.is_map_expired());
    us.run(Duration::from_secs(60));
    assert!(us.table().peers.is_empty());
    assert_ne!(us.peer(2).state, PeerState::Up);
    assert_eq!(us.plan().firewall.guarded, guarded, "nothing leaves in clear");

    us.mesh.set_map_expired(us.now, false);
    let outputs = us.run(Duration::from_millis(100));
    assert!(us.table().peers.contains_key(&key(2)));
    assert!(pings(&outputs).iter().any(|(to, _)| *to == path(PUBLIC)), "it is tried at once");
    us.mesh.set_map_expired(us.now, false);
    assert!(!us.drain().iter().any(|output| matches!(output, Output::PeerTable(_))));
}
