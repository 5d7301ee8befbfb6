//! Past the tunnel, and how the plan is put together.

use super::*;

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
fn plan_and_peer_table_say_which_addresses_are_ours() {
    let mut us = Us::new(1);
    us.upsert(peer(2).prefixes(&["10.244.2.0/24"]));
    us.drain();
    let overlay = ["198.19.0.1", "fd00:7::1"];
    let all = |own: &OwnNetworks| own.destinations().map(|net| net.to_string()).collect::<Vec<_>>();
    let whole = |us: &Us| {
        assert_eq!(us.plan().firewall.own, us.table().own);
        us.table().own.clone()
    };
    assert_eq!(all(&whole(&us)), ["198.19.0.1/32", "fd00:7::1/128"]);

    us.mesh.set_prefixes(us.now, vec![net("10.244.1.0/24"), net("192.168.1.5/32")]);
    us.mesh.set_node_ips(us.now, vec!["192.168.1.5".parse().unwrap()]);
    us.drain();
    let own = whole(&us);
    for ours in overlay.into_iter().chain(["10.244.1.9", "192.168.1.5"]) {
        let ours = ours.parse().unwrap();
        assert!(own.accepts(ours) && own.owns(ours), "{ours}");
    }
    for other in ["10.244.2.9", "192.168.1.6", "198.19.0.2", "10.244.1.255"] {
        let other = other.parse().unwrap();
        assert!(!own.accepts(other) && !own.owns(other), "{other}");
    }

    us.mesh.set_addresses(us.now, vec!["10.99.0.1".parse().unwrap()]);
    us.mesh.set_forward_to(us.now, vec![net("172.30.0.0/16"), net("0.0.0.0/0")]);
    us.drain();
    let own = whole(&us);
    let (address, outside) = ("10.99.0.1".parse().unwrap(), "172.30.1.1".parse().unwrap());
    assert!(own.owns(address) && own.accepts(outside) && !own.owns(outside));
    assert!(!own.accepts("169.254.169.254".parse().unwrap()));

    us.mesh.set_forward_to(us.now, Vec::new());
    us.mesh.set_addresses(us.now, Vec::new());
    us.mesh.set_prefixes(us.now, Vec::new());
    us.mesh.set_node_ips(us.now, Vec::new());
    us.drain();
    assert_eq!(all(&whole(&us)), ["198.19.0.1/32", "fd00:7::1/128"]);
    assert!(us.table().peers.values().all(|entry| !entry.is_static));
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
    assert!(us.plan().firewall.plain.is_empty(), "the controller alone cannot allow it");
    let in_clear = InClear { bypass_when_down: true, ..InClear::default() };
    us.mesh.set_local_limits(us.now, LocalLimits { in_clear, ..LocalLimits::default() });
    us.drain();
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
fn a_protected_network_beside_our_own_stays_guarded_when_its_node_is_removed() {
    let mut us = Us::new(1);
    us.mesh.set_prefixes(us.now, vec![net("10.244.1.0/24")]);
    us.upsert(peer(2).prefixes(&["10.244.0.0/24"]));
    us.drain();
    us.mesh.handle_map_change(us.now, MapChange::Remove(tombstone(2)));
    us.drain();
    let removed = net("10.244.0.0/24");
    assert!(us.plan().firewall.guarded.iter().any(|net| net.contains(&removed)));
    assert!(us.plan().routes.contains_key(&(removed, RouteVia::Unreachable)));
}

#[test]
fn a_plan_that_was_patched_is_the_one_that_is_built_whole() {
    let own = ["10.244.1.0/24", "172.30.1.0/24"].map(net).to_vec();
    let mut us = Us::new(1);
    us.mesh.set_prefixes(us.now, own.clone());
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
        // A part of a protected range that our own network beside it cut out.
        peer(6).prefixes(&["10.244.0.0/24"]).into(),
        MapChange::Remove(tombstone(6)),
        // The same of what was withdrawn.
        peer(7).prefixes(&["172.30.0.0/16"]).into(),
        peer(7).generation(2).into(),
        peer(8).prefixes(&["172.30.0.0/24"]).into(),
        MapChange::Remove(tombstone(8)),
    ];
    let mut so_far = Vec::new();
    for step in steps {
        us.mesh.handle_map_change(us.now, step.clone());
        us.drain();
        so_far.push(step);
        let mut fresh = Us::new(1);
        fresh.mesh.set_prefixes(fresh.now, own.clone());
        // The same history, looked at once.
        for step in &so_far {
            fresh.mesh.handle_map_change(fresh.now, step.clone());
            fresh.mesh.peers().count();
            fresh.mesh.set_withdrawn(fresh.now, us.mesh.withdrawn().iter().copied());
        }
        fresh.drain();
        assert_eq!(us.plan(), fresh.plan(), "after {} steps", so_far.len());
        assert_eq!(us.table(), fresh.table(), "after {} steps", so_far.len());
    }
}

#[test]
fn a_local_network_stays_as_it_is_but_for_what_others_hold_inside_of_it() {
    let lan = net("192.168.1.0/24");
    let mut us = Us::new(1);
    us.joined_in(&["192.168.1.0/24"]);
    us.upsert(peer(2).prefixes(&["192.168.1.0/24"]).lans(&["192.168.1.0/24"]));
    let allowed = Grant { allowed_prefixes: vec![net("192.168.1.7/32")], ..grant(3) };
    us.upsert(NodeBuilder::of(allowed).prefixes(&["192.168.1.7/32"]));
    us.drain();
    let plan = us.plan();
    let node_ip = net("192.168.1.7/32");
    assert_eq!(plan.routes.get(&(lan, RouteVia::Link)), None);
    assert!(plan.routes.contains_key(&(lan, RouteVia::Native)));
    assert_eq!(plan.local, [(lan, lan)].into());
    assert!(plan.routes.contains_key(&(node_ip, RouteVia::Link)));
    let inside: Vec<_> = plan.firewall.guarded.iter().filter(|net| lan.contains(*net)).collect();
    assert_eq!(inside, [&node_ip], "another node's own address stays guarded");
    assert!(us.table().peers[&key(2)].prefixes.contains(&lan), "who holds what is not ours to say");

    // A range around it is guarded but for it.
    let around = ["192.168.0.0/16"];
    us.upsert(peer(2).generation(2).prefixes(&around).lans(&around));
    us.drain();
    let plan = us.plan();
    assert!(plan.routes.contains_key(&(net("192.168.0.0/16"), RouteVia::Link)));
    assert!(plan.routes.contains_key(&(lan, RouteVia::Native)));
    assert!(us.guards("192.168.2.1") && us.guards("192.168.1.7") && !us.guards("192.168.1.8"));
    let tunnelled = plan.tunnelled();
    let is_tunnelled = |text: &str| tunnelled.iter().any(|range| range.contains(&net(text)));
    assert!(is_tunnelled("192.168.2.1/32") && is_tunnelled("192.168.1.7/32"));
    assert!(!is_tunnelled("192.168.1.8/32"), "a session from the LAN is not cut off");

    // Also when nobody holds the range any longer.
    us.upsert(peer(2).generation(3));
    us.drain();
    assert!(us.guards("192.168.2.1") && us.guards("192.168.1.7") && !us.guards("192.168.1.8"));
}

#[test]
fn a_local_network_is_guarded_while_the_host_is_not_connected_to_it() {
    let lan = net("192.168.1.0/24");
    for listed in [false, true] {
        let mut us = Us::new(1);
        us.joined_in(&["192.168.1.0/24"]);
        if listed {
            let networks = LocalNetworks { configured: vec![lan], joined: Vec::new() };
            us.mesh.set_local_networks(us.now, networks);
        }
        us.upsert(peer(2).prefixes(&["192.168.1.0/24"]).lans(&["192.168.1.0/24"]));
        us.drain();
        assert!(!us.guards("192.168.1.8"));

        // The cable is pulled, or the machine was moved: its default route must not carry it out.
        us.connected_to(&["203.0.113.0/24"]);
        us.drain();
        assert!(us.guards("192.168.1.8"));
        let plan = us.plan();
        assert!(plan.local.is_empty());
        assert!(plan.routes.contains_key(&(lan, RouteVia::Link)));
        assert!(plan.routes.contains_key(&(lan, RouteVia::Unreachable)));
        assert!(!plan.routes.contains_key(&(lan, RouteVia::Native)));

        us.connected_to(&["203.0.113.0/24", "192.168.1.0/24"]);
        us.drain();
        assert!(!us.guards("192.168.1.8"));
    }
}

#[test]
fn a_network_that_is_connected_later_is_not_trusted() {
    let mut us = Us::new(1);
    us.joined_in(&["192.168.1.0/24"]);
    us.upsert(peer(2).prefixes(&["192.168.0.0/16"]).lans(&["192.168.0.0/16"]));
    us.connected_to(&["192.168.1.0/24", "192.168.2.0/24", "192.168.1.0/25"]);
    us.drain();
    let lan = net("192.168.1.0/24");
    assert_eq!(us.plan().local, [(lan, lan)].into());
    assert!(us.guards("192.168.2.1"));
}

#[test]
fn a_lease_at_the_join_never_opens_another_nodes_pods() {
    // Nothing is protected.
    for lease in ["10.244.2.0/24", "10.244.2.128/25", "10.244.0.0/16"] {
        let mut us = Us::new(1);
        us.configure(|mesh| mesh.protected.clear());
        us.joined_in(&[lease]);
        us.upsert(peer(2).prefixes(&["10.244.2.0/24"]));
        us.drain();
        assert!(us.guards("10.244.2.7") && us.guards("10.244.2.200"), "{lease}");
        assert!(!us.guards("10.244.3.7"), "{lease}");
        // Nor once they are withdrawn.
        us.upsert(peer(2).generation(2));
        us.drain();
        assert!(us.guards("10.244.2.7") && us.guards("10.244.2.200"), "{lease}");
        // The next start knows as much.
        let mut next = Us::new(1);
        next.configure(|mesh| mesh.protected.clear());
        next.joined_in(&[lease]);
        next.mesh.set_withdrawn(next.now, us.mesh.withdrawn().iter().copied());
        next.mesh.set_withdrawn_lans(next.now, us.mesh.withdrawn_lans().iter().copied());
        next.drain();
        assert!(next.guards("10.244.2.7") && next.guards("10.244.2.200"), "{lease}");
    }
}

#[test]
fn the_most_specific_local_network_decides() {
    let mut us = Us::new(1);
    us.configure(|mesh| mesh.protected.clear());
    us.joined_in(&["10.0.0.0/8", "10.1.0.0/16"]);
    us.upsert(peer(2).prefixes(&["10.1.0.0/16"]).lans(&["10.1.0.0/16"]));
    us.upsert(peer(3).prefixes(&["10.2.0.0/16"]).lans(&["10.2.0.0/16"]));
    us.drain();
    assert!(!us.guards("10.1.0.7") && us.guards("10.2.0.7") && !us.guards("10.3.0.7"));
    let route = |text: &str, via| us.plan().routes.contains_key(&(net(text), via));
    assert!(route("10.1.0.0/16", RouteVia::Native) && !route("10.1.0.0/16", RouteVia::Link));
    assert!(route("10.2.0.0/16", RouteVia::Link));
}

#[test]
fn a_local_network_never_opens_the_overlay_nor_by_itself_a_protected_range() {
    let mut us = Us::new(1);
    us.upsert(peer(2).prefixes(&["10.244.2.0/24"]).lans(&["10.244.2.0/24"]));
    us.drain();
    let before = us.plan().clone();
    us.joined_in(&["198.19.0.0/24", "198.0.0.0/8", "0.0.0.0/0", "10.244.2.0/24", "10.0.0.0/8"]);
    us.drain();
    assert_eq!(*us.plan(), before);
    // An operator may except a part of a protected range, and a network around the overlay but for it.
    let configured = vec![net("10.244.9.0/24"), net("198.0.0.0/8"), net("198.19.1.0/24")];
    us.mesh.set_local_networks(us.now, LocalNetworks { configured, ..LocalNetworks::default() });
    us.connected_to(&["10.244.9.0/24", "198.0.0.0/8", "198.19.1.0/24"]);
    us.drain();
    assert!(!us.guards("10.244.9.1") && us.guards("10.244.2.1"));
    assert!(us.guards("198.19.0.1") && us.guards("198.19.1.1") && !us.guards("198.18.0.1"));
}

#[test]
fn a_plan_with_local_networks_is_the_same_when_it_was_patched() {
    let lan = ["192.168.1.0/24"];
    let steps: Vec<MapChange> = vec![
        peer(2).prefixes(&lan).into(),
        peer(2).generation(2).prefixes(&lan).lans(&lan).into(),
        peer(3).prefixes(&["192.168.0.0/16"]).into(),
        MapChange::Remove(tombstone(3)),
        peer(2).generation(3).into(),
        peer(4).prefixes(&["192.168.1.0/25"]).into(),
        MapChange::Remove(tombstone(4)),
    ];
    let mut us = Us::new(1);
    us.joined_in(&lan);
    us.drain();
    for (number, step) in steps.into_iter().enumerate() {
        us.mesh.handle_map_change(us.now, step);
        us.drain();
        let patched = us.plan().clone();
        // Another one of the settings has the plan built again.
        us.mesh.set_forward_to(us.now, vec![net("172.30.0.0/16")]);
        us.drain();
        us.mesh.set_forward_to(us.now, Vec::new());
        us.drain();
        assert_eq!(*us.plan(), patched, "after step {number}");
    }
}
