//! Tests of records, and of who holds the prefixes that they claim.

use super::*;

#[test]
fn a_second_claim_is_withheld_and_both_operators_see_why() {
    let mut world = World::new();
    let (a, b) = (world.node("a", 1, &["10.0.0.0/8"]), world.node("b", 2, &["10.0.0.0/8"]));
    assert!(world.announce(a, 1, "10.1.0.0/16").is_empty());
    for (generation, claim) in ["10.1.0.0/16", "10.1.2.0/24", "10.0.0.0/8"].iter().enumerate() {
        let reasons = world.announce(b, 1 + generation as u64, claim);
        assert!(reasons[0].contains("`a`") && reasons[0].contains("`b`"), "{reasons:?}");
        assert!(world.problems(a).contains(&reasons[0]));
        assert!(world.problems(b).contains(&reasons[0]));
        assert_eq!(world.holder("10.1.0.0/16"), Some(a));
    }
    // A claim that was given up causes no problem any more.
    world.announce(b, 9, "10.2.0.0/16");
    assert_eq!(world.holder("10.2.0.0/16"), Some(b));
    assert!(world.problems(b).is_empty() && world.problems(a).is_empty());
}

#[test]
fn a_nested_prefix_stands_where_its_own_grant_names_it() {
    let mut world = World::new();
    let wide = world.node("wide", 1, &["10.0.0.0/8"]);
    let nested = world.node("nested", 2, &["10.1.0.0/16"]);
    assert!(world.announce(wide, 1, "10.0.0.0/8").is_empty());
    assert!(world.announce(nested, 1, "10.1.0.0/16").is_empty());
    // A part of a granted prefix does not count as named by the grant.
    assert_eq!(world.announce(nested, 2, "10.1.2.0/24").len(), 1);
    // The order does not matter.
    let other = world.node("other", 3, &["10.1.0.0/16", "10.1.3.0/24"]);
    assert!(world.announce(other, 1, "10.1.3.0/24").is_empty());
    assert!(world.announce(nested, 3, "10.1.0.0/16").is_empty());
}

#[test]
fn a_node_that_stays_away_yields_its_prefix_and_gets_it_back_when_it_is_free() {
    let mut world = World::new();
    let (a, b) = (world.node("a", 1, &["10.0.0.0/8"]), world.node("b", 2, &["10.0.0.0/8"]));
    world.announce(a, 1, "10.1.0.0/16");
    world.close(a);
    world.advance(LEASE / 2);
    assert_eq!(world.announce(b, 1, "10.1.0.0/16").len(), 1, "not offline for long enough");
    let before = world.registry.counters().revision;
    world.advance(LEASE);
    assert_eq!(world.holder("10.1.0.0/16"), Some(b), "taken over by the periodic work");
    assert!(world.registry.counters().revision > before, "watchers receive the change");
    assert!(world.problems(a).iter().any(|line| line.contains("had been offline")));

    world.open(a);
    assert_eq!(world.announce(a, 1, "10.1.0.0/16").len(), 1, "b is there now");
    world.remove(b);
    assert_eq!(world.holder("10.1.0.0/16"), Some(a));
    assert!(world.problems(a).is_empty());
}

#[test]
fn the_pod_networks_of_a_dead_node_follow_to_the_one_that_kubernetes_gives_them_to() {
    let mut world = World::new();
    let pods = ["10.244.0.0/16", "fd10:244::/48"];
    let (dead, heir) = (world.node("dead", 1, &pods), world.node("heir", 2, &pods));
    let given = [net("10.244.1.0/24"), net("fd10:244:0:1::/64")];
    assert!(world.publish(dead, 1, &given).unwrap().withheld.is_empty());
    // Kubernetes may reassign the networks before the lease ends, even while the node is online.
    assert_eq!(world.publish(heir, 1, &given).unwrap().withheld.len(), 2);
    world.close(dead);
    world.advance(LEASE / 2);
    assert_eq!(world.holder("10.244.1.0/24"), Some(dead));
    world.advance(LEASE);
    for network in ["10.244.1.0/24", "fd10:244:0:1::/64"] {
        assert_eq!(world.holder(network), Some(heir), "without another publication");
    }
    let moved = |line: &&String| line.contains("had been offline");
    assert_eq!(world.problems(heir).iter().filter(moved).count(), 2);
    // The node comes back with its old networks, and then publishes its new ones.
    world.open(dead);
    let refused = world.publish(dead, 2, &given).unwrap().withheld;
    assert!(
        refused.iter().all(|withheld| withheld.reason.to_string().contains("`heir`")),
        "{refused:?}"
    );
    assert_eq!(world.announce(dead, 3, "10.244.7.0/24"), Vec::<String>::new());
    // A network that only overlaps one of another node is withheld too.
    let reasons = world.announce(dead, 4, "10.244.0.0/20");
    assert!(reasons[0].contains("`heir`"), "{reasons:?}");
}

#[test]
fn prefixes_that_cannot_be_announced_are_refused() {
    let mut world = World::new();
    for bad in ["198.19.0.0/25", "fd00:7::/80", "127.0.0.0/8", "ff02::/16", "169.254.1.0/24"] {
        let terms = TokenTerms { allowed_prefixes: vec![net(bad)], ..terms() };
        let made = world.registry.create_token(TokenId([250; 8]), SECRET, terms, 1, world.now);
        assert!(matches!(made, Err(CreateTokenError::Unusable(_))), "{bad}");
    }
    let node = world.node("a", 1, &["0.0.0.0/0"]);
    for (generation, bad) in
        ["0.0.0.0/0", "198.18.0.0/15", "224.0.0.0/8", "126.0.0.0/7"].iter().enumerate()
    {
        assert_eq!(world.announce(node, 1 + generation as u64, bad).len(), 1, "{bad}");
    }
    assert!(world.announce(node, 9, "10.0.0.0/8").is_empty());
    let outside = world.publish(node, 10, &[net("2001:db8::/32")]);
    assert!(matches!(outside, Err(PublishError::NotGranted(_))));
}

#[test]
fn generations_grow_and_the_same_record_is_no_change() {
    let mut world = World::new();
    let node = world.node("a", 1, &["10.0.0.0/8"]);
    let first = world.publish(node, 5, &[]).unwrap();
    let again = world.publish(node, 5, &[]).unwrap();
    assert_eq!(again, Published { is_stored: false, ..first });
    let other = world.publish(node, 5, &[net("10.0.0.0/8")]);
    assert!(matches!(other, Err(PublishError::GenerationReused { generation: 5 })));
    let behind = world.publish(node, 4, &[]);
    assert!(matches!(behind, Err(PublishError::GenerationBehind { offered: 4, stored: 5 })));
    world.close(node);
    assert!(matches!(world.publish(node, 6, &[]), Err(PublishError::NoSession)));
}

#[test]
fn a_record_of_which_only_the_generation_is_new_is_no_change_of_the_map() {
    let mut world = World::new();
    let node = world.node("a", 1, &["10.0.0.0/8"]);
    let first = world.publish(node, 1, &[net("10.1.0.0/16")]).unwrap();
    let refreshed = world.publish(node, 2, &[net("10.1.0.0/16")]).unwrap();
    assert_eq!(refreshed, first, "with the same revision");
    world.reload();
    let behind = world.publish(node, 1, &[]);
    assert!(matches!(behind, Err(PublishError::GenerationBehind { stored: 2, .. })), "{behind:?}");
    // The number of the agent's start matters to its peers.
    let grant = world.registry.member(node).unwrap().grant.clone();
    let prefixes = vec![net("10.1.0.0/16")];
    let restarted = Record { generation: 3, boot_epoch: 2, prefixes, ..record(&grant) };
    assert!(world.publish_record(node, restarted).unwrap().revision > first.revision);
}

#[test]
fn a_generation_cannot_run_ahead_of_the_owner() {
    let mut world = World::new();
    let node = world.node("a", 1, &[]);
    world.publish(node, 5, &[]).unwrap();
    let step = towline_types::limits::GENERATION_STEP;
    let refused = world.publish(node, 6 + step, &[]);
    assert!(matches!(refused, Err(PublishError::GenerationAhead { stored: 5, .. })), "{refused:?}");
    world.publish(node, 5 + step, &[]).unwrap();
}

/// Adds a node that may announce some blocks of /24 of 10.244.0.0/16, and opens its session.
fn worker(world: &mut World, name: &str, key: u16, blocks: u32) -> NodeId {
    let range = PodRange::new(net("10.244.0.0/16"), 24, blocks, Vec::new()).unwrap();
    let token = world.token(TokenTerms { pod_ranges: vec![range], ..terms() });
    let node = world.join(token, name, key).unwrap();
    world.open(node);
    node
}

#[test]
fn a_worker_announces_the_block_that_it_named_first_and_not_those_of_others() {
    let mut world = World::new();
    let (a, b) = (worker(&mut world, "a", 1, 1), worker(&mut world, "b", 2, 1));
    let before = world.registry.member(a).unwrap().revision;
    assert!(world.announce(a, 1, "10.244.1.0/24").is_empty());
    let member = world.registry.member(a).unwrap();
    assert_eq!(member.grant.allowed_prefixes, [net("10.244.1.0/24")]);
    assert!(member.revision > before && world.signed.contains(&Unsigned::Grant(a)));

    // A second block is refused, with the whole record, and so is a wider network.
    for (generation, more) in [(2, "10.244.2.0/24"), (3, "10.244.0.0/23"), (4, "10.245.0.0/24")] {
        let refused = world.publish(a, generation, &[net("10.244.1.0/24"), net(more)]);
        assert!(matches!(refused, Err(PublishError::NotGranted(_))), "{more}");
    }
    // The block of another node is withheld, and so is a part of one.
    assert_eq!(world.announce(b, 1, "10.244.1.0/24").len(), 1);
    assert_eq!(world.holder("10.244.1.0/24"), Some(a));
    world.reload();
    assert_eq!(world.holder("10.244.1.0/24"), Some(a));
    // Blocks come and go.
    assert!(world.announce(a, 5, "10.244.7.0/24").is_empty());
    assert_eq!(world.holder("10.244.1.0/24"), Some(b), "it is free");
    let member = world.registry.member(a).unwrap();
    assert_eq!(member.grant.allowed_prefixes, [net("10.244.7.0/24")]);
}

#[test]
fn a_chosen_block_is_no_part_of_another_nodes_wider_network() {
    let mut world = World::new();
    let old = world.node("old", 1, &["10.244.0.0/16"]);
    let worker = worker(&mut world, "worker", 2, 4);
    assert!(world.announce(old, 1, "10.244.2.0/23").is_empty());
    assert_eq!(world.announce(worker, 1, "10.244.3.0/24").len(), 1);
    // A gateway of the whole range leaves room for the blocks.
    assert!(world.announce(old, 2, "10.244.0.0/16").is_empty());
    assert_eq!(world.holder("10.244.3.0/24"), Some(worker));
}

#[test]
fn two_gateways_of_one_group_hold_their_lan_together() {
    let mut world = World::new();
    let lan = net("192.168.50.0/24");
    let gateway = |world: &mut World, name: &str, key: u16, group: Option<&str>| {
        let shared = group.map(|group| SharedPrefix { prefix: lan, group: group.parse().unwrap() });
        let shared = shared.into_iter().collect();
        let token = world.token(TokenTerms { allowed_prefixes: vec![lan], shared, ..terms() });
        let node = world.join(token, name, key).unwrap();
        world.open(node);
        world.announce(node, 1, "192.168.50.0/24")
    };
    assert!(gateway(&mut world, "a", 1, Some("lan-b")).is_empty());
    assert!(gateway(&mut world, "b", 2, Some("lan-b")).is_empty());
    assert_eq!(gateway(&mut world, "c", 3, Some("lan-c")).len(), 1);
    assert_eq!(gateway(&mut world, "d", 4, None).len(), 1);
    world.reload();
    // It is free for others once both are gone.
    for name in ["a", "b"] {
        let node = world.registry.by_name(&name.parse().unwrap()).unwrap();
        assert!(world.registry.claims.holds(&lan, node), "{name}");
        world.remove(node);
    }
    let holder = world.registry.claims.holder(&lan).unwrap();
    let name = &world.registry.member(holder).unwrap().grant.name;
    assert!(["c", "d"].contains(&name.as_str()), "{name}");
}

#[test]
fn a_prefix_stays_while_its_holder_is_or_may_be_connected_to_another_controller() {
    let mut world = World::new();
    let holder = world.node("a", 1, &["10.0.0.0/8"]);
    let claimant = world.node("b", 2, &["10.0.0.0/8"]);
    world.announce(holder, 1, "10.1.0.0/16");
    assert_eq!(world.announce(claimant, 1, "10.1.0.0/16").len(), 1);
    world.close(holder);
    world.sessions.share();
    world.advance(LEASE * 2);
    assert_eq!(world.holder("10.1.0.0/16"), Some(holder), "nothing is known of it");

    let step = Duration::from_secs(15);
    for _ in 0..100 {
        world.sessions.hear([holder], world.now);
        world.step(step);
    }
    assert_eq!(world.holder("10.1.0.0/16"), Some(holder), "it is connected elsewhere");
    for _ in 0..39 {
        world.sessions.hear([], world.now);
        world.step(step);
    }
    assert_eq!(world.holder("10.1.0.0/16"), Some(holder), "it has the whole lease");
    for _ in 0..4 {
        world.sessions.hear([], world.now);
        world.step(step);
    }
    assert_eq!(world.holder("10.1.0.0/16"), Some(claimant));
}
