//! Traces of packets in meshes of different states.

use towline_proto::pb;

use super::destination::{Destination, DestinationError, Host};
use super::kernel::{DroppingChain, KernelView, OwnRoute, RouteSeen};
use super::{Input, Outcome, OwnAddresses, Trace, trace};
use crate::doctor::Answers;

/// Everything that a test may change.
struct World {
    destination: &'static str,
    answers: Answers,
    own: OwnAddresses,
    kernel: KernelView,
}

fn world() -> World {
    let peer = pb::PeerStatus {
        name: "node-b".into(),
        state: "up".into(),
        path_kind: "direct".into(),
        path: "192.0.2.7:51830".into(),
        mtu: Some(1_380),
        overlay_addresses: vec!["fd00::2".into(), "198.19.0.2".into()],
        prefixes: vec!["10.2.0.0/16".into()],
        ..Default::default()
    };
    let wide = pb::PeerStatus {
        name: "node-c".into(),
        state: "up".into(),
        prefixes: vec!["10.0.0.0/8".into()],
        ..Default::default()
    };
    let status = pb::StatusResponse {
        name: "node-a".into(),
        mtu: 1_420,
        overlay_addresses: vec!["fd00::1".into(), "198.19.0.1".into()],
        ..Default::default()
    };
    World {
        destination: "node-b:443",
        answers: Answers { status, peers: vec![wide, peer] },
        own: OwnAddresses::default(),
        kernel: KernelView {
            link: "towline0".into(),
            route: Some(RouteSeen {
                table: 21_580,
                rule: Some(21_585),
                link: Some("towline0".into()),
                source: Some("198.19.0.1".parse().unwrap()),
                ..Default::default()
            }),
            own_route: Some(("198.19.0.2/32".parse().unwrap(), OwnRoute::Tunnel)),
            firewall_guard: None,
            tried_port: 443,
            chains: Ok(Vec::new()),
        },
    }
}

fn run(world: &World) -> Trace {
    let destination: Destination = world.destination.parse().unwrap();
    trace(Input {
        target: &destination.resolve(&world.answers).unwrap(),
        answers: &world.answers,
        checks: &[],
        own: &world.own,
        kernel: &world.kernel,
    })
}

#[test]
fn a_packet_to_a_peer_travels_through_the_tunnel() {
    let traced = run(&world());
    assert_eq!(traced.outcome, Outcome::Tunnel, "{traced:?}");
    assert_eq!((traced.peer.as_deref(), traced.port), (Some("node-b"), Some(443)));
    assert_eq!(traced.address.to_string(), "198.19.0.2");
    let names: Vec<_> = traced.outgoing.iter().map(|step| step.name).collect();
    assert_eq!(names, ["peer", "rule", "route", "guard", "source", "firewalls", "path", "mtu"]);
    assert!(traced.outgoing[7].finding.contains("1380"), "{traced:?}");
}

#[test]
fn the_longest_prefix_names_the_peer() {
    for (destination, expected) in [("10.2.3.4", Some("node-b")), ("10.3.0.1", Some("node-c"))] {
        let traced = run(&World { destination, ..world() });
        assert_eq!(traced.peer.as_deref(), expected);
    }
}

#[test]
fn a_shared_prefix_is_reached_through_the_node_that_is_used() {
    let mut world = World { destination: "192.168.50.9", ..world() };
    let lan = || vec!["192.168.50.0/24".to_owned()];
    // The last of equal prefixes would win otherwise.
    for (name, standby_prefixes) in [("gw-a", Vec::new()), ("gw-b", lan())] {
        let gateway = pb::PeerStatus {
            name: name.into(),
            state: "up".into(),
            prefixes: lan(),
            standby_prefixes,
            ..Default::default()
        };
        world.answers.peers.push(gateway);
    }
    let traced = run(&world);
    assert_eq!(traced.peer.as_deref(), Some("gw-a"));
    let finding = traced.outgoing[0].finding.as_str();
    assert_eq!(finding, "192.168.50.0/24 is reached through gw-a (also behind gw-b)");
}

#[test]
fn the_endpoint_of_the_kubernetes_api_says_where_it_leads() {
    let mut world = World { destination: "127.0.0.1:7445", ..world() };
    world.kernel.route = Some(RouteSeen { is_local: true, ..Default::default() });
    world.answers.status.api_endpoint = Some(pb::ApiEndpointStatus {
        address: "127.0.0.1:7445".into(),
        server: "cp-1".into(),
        ..Default::default()
    });
    let finding = |traced: &Trace| traced.outgoing.last().unwrap().finding.clone();
    let traced = run(&world);
    assert_eq!(traced.outcome, Outcome::Local);
    assert_eq!(finding(&traced), "the endpoint of the Kubernetes API: it leads to cp-1");
    let other = run(&World { destination: "127.0.0.1:7446", ..world });
    assert_eq!(finding(&other), "an address of this host");
}

#[test]
fn the_step_that_drops_a_packet_is_named() {
    let chain = |is_incoming| DroppingChain {
        is_incoming,
        code: if is_incoming { "firewall-drops-input" } else { "firewall-drops-output" },
        place: "chain filter of table inet other".into(),
        command: "`nft list ruleset`".into(),
    };
    type Change = Box<dyn Fn(&mut World)>;
    let cases: [(&str, Change); 9] = [
        (
            "guard-refuses",
            Box::new(|world: &mut World| {
                world.kernel.route = None;
                world.kernel.own_route = Some(("198.19.0.0/16".parse().unwrap(), OwnRoute::Guard));
            }),
        ),
        (
            "route-missing",
            Box::new(|world: &mut World| {
                world.kernel.route = None;
                world.kernel.own_route = None;
            }),
        ),
        (
            "route-past-tunnel",
            Box::new(|world: &mut World| {
                world.kernel.route.as_mut().unwrap().link = Some("eth0".into());
            }),
        ),
        (
            "own-source-foreign",
            Box::new(|world: &mut World| {
                world.kernel.route.as_mut().unwrap().source = Some("192.0.2.5".parse().unwrap());
            }),
        ),
        (
            "firewall-drops-output",
            Box::new(move |world: &mut World| world.kernel.chains = Ok(vec![chain(false)])),
        ),
        (
            "firewall-drops-input",
            Box::new(move |world: &mut World| world.kernel.chains = Ok(vec![chain(true)])),
        ),
        (
            "no-answer",
            Box::new(|world: &mut World| {
                world.answers.peers[1].state = "down".into();
                world.answers.peers[1].reason_code = "no-answer".into();
            }),
        ),
        (
            "firewall-drops-tunnels",
            Box::new(|world: &mut World| {
                let code = "firewall-drops-tunnels".into();
                world.answers.status.problem_details =
                    vec![pb::Detail { code, ..Default::default() }];
            }),
        ),
        ("address-outside-mesh", Box::new(|world: &mut World| world.destination = "198.19.0.77")),
    ];
    for (code, change) in cases {
        let mut world = world();
        change(&mut world);
        let traced = run(&world);
        assert_eq!(traced.cause.as_deref(), Some(code), "{traced:?}");
        assert_eq!(traced.outcome, Outcome::Dropped, "{traced:?}");
        assert!(traced.remedy.is_some(), "{code}");
    }
}

#[test]
fn a_packet_that_no_guard_drops_leaves_in_clear() {
    let mut world = world();
    world.kernel.route.as_mut().unwrap().link = Some("eth0".into());
    world.answers.status.applied = Some(false);
    world.answers.status.applied_reason = "cannot use the nftables table inet towline".into();
    world.answers.status.applied_reason_code = "nftables-table-in-use".into();
    for own_route in [None, world.kernel.own_route] {
        world.kernel.own_route = own_route;
        for firewall_guard in [None, Some(false)] {
            world.kernel.firewall_guard = firewall_guard;
            let traced = run(&world);
            assert_eq!(traced.outcome, Outcome::InClear, "{traced:?}");
            assert_eq!(traced.cause.as_deref(), Some("nftables-table-in-use"));
            assert!(traced.remedy.is_some());
            let guard = traced.outgoing.last().unwrap();
            assert_eq!((guard.name, guard.fate.word()), ("guard", "pass"));
            assert!(guard.finding.contains("leaves in clear"), "{}", guard.finding);
        }
        world.kernel.firewall_guard = Some(true);
        let traced = run(&world);
        assert_eq!(traced.outcome, Outcome::Dropped, "{traced:?}");
        assert_eq!(traced.cause.as_deref(), Some("route-past-tunnel"));
    }
    // No peer holds the address.
    world.destination = "198.19.7.7";
    world.kernel.own_route = None;
    assert_eq!(run(&world).outcome, Outcome::Dropped);
}

#[test]
fn what_does_not_belong_to_the_mesh_leaves_outside() {
    let mut world = World { destination: "203.0.113.9", ..world() };
    world.kernel.own_route = None;
    world.kernel.route.as_mut().unwrap().link = Some("eth0".into());
    assert_eq!(run(&world).outcome, Outcome::Outside);
    world.destination = "node-a";
    world.kernel.route.as_mut().unwrap().is_local = true;
    assert_eq!(run(&world).outcome, Outcome::Local);
}

#[test]
fn destinations_are_parsed() {
    let address = |text: &str| Host::Address(text.parse().unwrap());
    for (text, host, port) in [
        ("node-b", Host::Name("node-b".into()), None),
        ("node-b:22", Host::Name("node-b".into()), Some(22)),
        ("198.19.0.2", address("198.19.0.2"), None),
        ("198.19.0.2:22", address("198.19.0.2"), Some(22)),
        ("fd00::2", address("fd00::2"), None),
        ("[fd00::2]:22", address("fd00::2"), Some(22)),
    ] {
        let parsed: Destination = text.parse().unwrap();
        assert_eq!((parsed.host, parsed.port), (host, port), "{text}");
    }
    for wrong in ["", ":22", "node-b:0", "node-b:http", "a:b:c", "[fd00::2", "node-b:"] {
        assert!(
            matches!(wrong.parse::<Destination>(), Err(DestinationError::Invalid(_))),
            "{wrong}"
        );
    }
    let nobody: Destination = "node-x".parse().unwrap();
    let error = nobody.resolve(&world().answers).unwrap_err();
    assert_eq!(error, DestinationError::NoPeer("node-x".into()));
}
