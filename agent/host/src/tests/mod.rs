//! Tests of [`HostNetwork`] in network namespaces: the applied state, its repair and removal, and the
//! state of other programs, which stays unchanged.

mod connectivity;
mod families;
mod ingress;
mod redirects;
mod traffic;
mod transit;
mod trust;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_core::own_networks::OwnNetworks;
use towline_core::plan::{Plan, RoutePlan, RouteVia};
use towline_fixtures::agent;
use towline_fixtures::node::net;

use super::*;
use towline_netlink::{
    Address, AddressOptions, Family, Link, Route, RouteKind, Rtnetlink, Rule, RuleAction, VethPeer,
};
use towline_netns::{NetworkNamespace, add_link, namespace_test};
use towline_nftables::{
    Chain, ChainKind, Expression, Hook, Ownership, Table, TableFamily, Transaction, Verdict,
};
use towline_types::mtu::Mtu;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Returns a plan with routes to three prefixes of peers, and with three guarded networks.
pub(super) fn plan() -> Plan {
    let guarded = [net("198.19.0.0/16"), net("10.9.0.0/16"), net("fd00:9::/64")];
    let mut routes = BTreeMap::new();
    for (peer, source) in [
        ("198.19.0.2/32", "198.19.0.1"),
        ("10.9.2.0/24", "198.19.0.1"),
        ("fd00:9::2/128", "fd00:9::1"),
    ] {
        let attributes =
            RoutePlan { source: Some(source.parse().unwrap()), mtu: Some(Mtu::clamp(1_380)) };
        routes.insert((net(peer), RouteVia::Link), attributes);
    }
    for guard in guarded {
        routes.insert((guard, RouteVia::Unreachable), RoutePlan::default());
    }
    let mut plan = Plan { routes, ..agent::plan() };
    plan.link.addresses = [net("198.19.0.1/32"), net("fd00:9::1/128")].into();
    plan.firewall.guarded = guarded.into();
    plan.firewall.own = OwnNetworks::new(["198.19.0.1", "fd00:9::1"].map(address), [], []);
    plan
}

/// State of the namespace, without the state that the kernel maintains itself and updates later:
/// link-local addresses, and routes that follow from addresses.
#[derive(Debug, PartialEq)]
struct Snapshot {
    links: Vec<Link>,
    addresses: Vec<Address>,
    routes: Vec<Route>,
    rules: Vec<Rule>,
    firewall: Option<Table>,
}

fn snapshot() -> Snapshot {
    let mut rtnetlink = Rtnetlink::open().unwrap();
    let mut routes = Vec::new();
    let mut rules = Vec::new();
    for family in Family::ALL {
        let by_kernel = |route: &Route| route.protocol == libc::RTPROT_KERNEL;
        routes
            .extend(rtnetlink.routes(family, None).unwrap().into_iter().filter(|r| !by_kernel(r)));
        rules.extend(rtnetlink.rules(family).unwrap());
    }
    let firewall = Nft::open().unwrap().read(TableFamily::Inet, "towline").unwrap();
    Snapshot {
        links: rtnetlink.links().unwrap(),
        addresses: rtnetlink
            .addresses(None)
            .unwrap()
            .into_iter()
            .filter(|a| a.scope == 0)
            .collect(),
        routes,
        rules,
        firewall: firewall.map(|loaded| loaded.table),
    }
}

/// Sets up a host with an uplink, and with routes, a rule and an nftables table of other programs.
fn host_with_foreign_state() {
    let mut rtnetlink = Rtnetlink::open().unwrap();
    let loopback = rtnetlink.link_index("lo").unwrap();
    rtnetlink.set_up(loopback, true).unwrap();
    let uplink = add_link("eth0");
    let options = AddressOptions { no_dad: true, no_prefix_route: false };
    rtnetlink.add_address(uplink, net("192.0.2.1/24"), options).unwrap();
    rtnetlink.add_address(uplink, net("2001:db8::1/64"), options).unwrap();
    rtnetlink
        .add_route(&Route::new(net("0.0.0.0/0")).via("192.0.2.254".parse().unwrap()).dev(uplink))
        .unwrap();
    rtnetlink
        .add_route(&Route::new(net("::/0")).via("2001:db8::fe".parse().unwrap()).dev(uplink))
        .unwrap();
    rtnetlink.add_route(&Route::new(net("10.77.0.0/16")).dev(uplink).table(77)).unwrap();
    rtnetlink.add_rule(&Rule::new(Family::V4, 77, RuleAction::Table(77))).unwrap();
    let theirs = Table::new(TableFamily::Inet, "theirs").chain(
        "input",
        Chain::base(ChainKind::Filter, Hook::Input, 0)
            .rule(towline_nftables::Rule::new().counter()),
    );
    Nft::open().unwrap().load(&theirs).unwrap();
}

/// Returns the error number with which the kernel refuses a datagram to the address, or `None` if it
/// was sent.
fn connect_error(to: &str) -> Option<i32> {
    let socket = if to.contains(':') {
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap()
    } else {
        UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap()
    };
    let to: IpAddr = to.parse().unwrap();
    socket.send_to(b"clear", (to, 9)).err().and_then(|error| error.raw_os_error())
}

/// Opens the host network as on a kernel without owned tables, so that the test can delete the table.
fn open_without_ownership() -> HostNetwork {
    HostNetwork::open_unowned().unwrap()
}

/// Applies a plan, and asserts that there is no problem.
fn apply(host: &mut HostNetwork, plan: &Plan) -> Changes {
    let changes = host.apply(plan).unwrap();
    assert_eq!(changes.problems, []);
    changes
}

/// Creates a persistent TUN link, which is down, and returns its index. Prints the reason and returns
/// `None` if TUN devices cannot be opened.
fn add_tun(name: &str) -> Option<u32> {
    if let Err(error) = towline_dataplane::open_tun(name) {
        println!("skipped: {error}");
        return None;
    }
    Some(Rtnetlink::open().expect("a netlink socket").link_index(name).expect("the link"))
}

namespace_test! {
    fn a_plan_is_applied_once() {
        host_with_foreign_state();
        if add_tun("towline0").is_none() { return };
        let mut host = HostNetwork::open().unwrap();
        assert!(apply(&mut host, &plan()).messages > 0);
        let first = snapshot();
        assert_eq!(apply(&mut host, &plan()).messages, 0);
        host.invalidate();
        assert_eq!(apply(&mut host, &plan()).messages, 0);
        let second = snapshot();
        assert_eq!((second.rules, second.firewall), (first.rules, first.firewall));

        let link = first.links.iter().find(|link| link.name == "towline0").unwrap();
        assert!(link.up && link.mtu == 1_420);
        let via: Vec<_> = first
            .routes
            .iter()
            .filter(|route| route.table == 21_580 && route.kind == RouteKind::Unicast)
            .map(|route| (route.destination, route.link, route.mtu))
            .collect();
        let expected: Vec<_> = ["10.9.2.0/24", "198.19.0.2/32", "fd00:9::2/128"]
            .map(|peer| (net(peer), Some(link.index), Some(1_380)))
            .into();
        assert_eq!(via, expected);
    }
}

namespace_test! {
    fn removing_is_exact() {
        host_with_foreign_state();
        let before = snapshot();
        if add_tun("towline0").is_none() { return };
        let mut host = HostNetwork::open().unwrap();
        apply(&mut host, &plan());
        assert!(host.remove(&Names::of(&plan())).unwrap() > 0);
        assert_eq!(snapshot(), before);
        assert_eq!(host.remove(&Names::of(&plan())).unwrap(), 0);
        assert_eq!(snapshot(), before);
    }
}

namespace_test! {
    fn what_others_flush_comes_back_and_theirs_is_left_alone() {
        host_with_foreign_state();
        let Some(link) = add_tun("towline0") else { return };
        let mut host = open_without_ownership();
        apply(&mut host, &plan());
        let whole = snapshot();
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let mut nft = Nft::open().unwrap();

        type Change<'a> = (&'a str, Box<dyn Fn(&mut Rtnetlink, &mut Nft)>);
        let edits: Vec<Change<'_>> = vec![
            ("nft flush ruleset", Box::new(|_, nft| {
                nft.delete(TableFamily::Inet, "towline").unwrap();
            })),
            ("ip rule flush", Box::new(|rtnetlink, _| {
                for family in Family::ALL {
                    for rule in rtnetlink.rules(family).unwrap() {
                        if rule.made_by == OURS { rtnetlink.delete_rule(&rule).unwrap() }
                    }
                }
            })),
            ("ip route flush", Box::new(|rtnetlink, _| {
                for family in Family::ALL {
                    for route in rtnetlink.routes(family, Some(21_580)).unwrap() {
                        rtnetlink.delete_route(&route).unwrap();
                    }
                }
            })),
            ("link down", Box::new(move |rtnetlink, _| rtnetlink.set_up(link, false).unwrap())),
            ("link mtu", Box::new(move |rtnetlink, _| rtnetlink.set_mtu(link, 1_300).unwrap())),
            ("address flush", Box::new(move |rtnetlink, _| {
                for address in ["198.19.0.1/32", "fd00:9::1/128"] {
                    rtnetlink.delete_address(link, net(address)).unwrap();
                }
            })),
            ("another's address on our link", Box::new(move |rtnetlink, _| {
                rtnetlink.add_address(link, net("192.0.2.77/32"), AddressOptions::default()).unwrap();
            })),
            ("elements", Box::new(|_, nft| {
                let mut table = nft.read(TableFamily::Inet, "towline").unwrap().unwrap().table;
                table.sets.get_mut("guarded4").unwrap().elements.clear();
                nft.load(&table).unwrap();
            })),
        ];
        for (name, change) in edits {
            change(&mut rtnetlink, &mut nft);
            host.invalidate();
            assert!(apply(&mut host, &plan()).messages > 0, "{name}");
            let now = snapshot();
            assert_eq!(now.routes, whole.routes, "{name}");
            assert_eq!(now.rules, whole.rules, "{name}");
            assert_eq!(now.firewall, whole.firewall, "{name}");
            assert_eq!(now.addresses, whole.addresses, "{name}");
        }
        let theirs = nft.read(TableFamily::Inet, "theirs").unwrap();
        assert!(theirs.is_some());
    }
}

namespace_test! {
    fn another_plan_changes_what_differs() {
        host_with_foreign_state();
        if add_tun("towline0").is_none() { return };
        let mut host = HostNetwork::open().unwrap();
        apply(&mut host, &plan());

        let mut next = plan();
        next.routes.insert((net("10.9.3.0/24"), RouteVia::Link), RoutePlan::default());
        assert_eq!(apply(&mut host, &next).messages, 1);
        next.routes.insert((net("10.8.0.0/16"), RouteVia::Unreachable), RoutePlan::default());
        next.firewall.guarded.insert(net("10.8.0.0/16"));
        assert_eq!(apply(&mut host, &next).messages, 2);
        apply(&mut host, &plan());

        // The state in the kernel equals the known state.
        host.invalidate();
        assert_eq!(apply(&mut host, &plan()).messages, 0);

        // If the names and numbers change, no state stays under the old ones.
        let mut renumbered = plan();
        renumbered.table = 4_711;
        renumbered.rules.priority = 4_711;
        renumbered.firewall.table = "other".to_owned();
        apply(&mut host, &renumbered);
        let now = snapshot();
        assert!(now.firewall.is_none());
        assert!(now.routes.iter().all(|route| route.table != 21_580));
        assert!(now.rules.iter().all(|rule| !(21_580..21_587).contains(&rule.priority)));
    }
}

namespace_test! {
    fn a_change_costs_what_differs_however_large_the_mesh() {
        host_with_foreign_state();
        if add_tun("towline0").is_none() { return };
        let pods = |n: u32| -> IpNet {
            IpNet::new(Ipv4Addr::from(0x0a80_0000 + n * 512).into(), 24).unwrap()
        };
        let mut messages = Vec::new();
        for size in [10, 5_000] {
            let mut host = HostNetwork::open().unwrap();
            let mut large = plan();
            let add = |plan: &mut Plan, n| {
                plan.routes.insert((pods(n), RouteVia::Link), RoutePlan::default());
                plan.routes.insert((pods(n), RouteVia::Unreachable), RoutePlan::default());
                plan.firewall.guarded.insert(pods(n));
            };
            (0..size).for_each(|n| add(&mut large, n));
            let start = Instant::now();
            apply(&mut host, &large);
            let full = start.elapsed();
            let mut next = large.clone();
            add(&mut next, size);
            let start = Instant::now();
            let one_more = apply(&mut host, &next).messages;
            println!("{size} networks: whole {full:?}, one more {:?}", start.elapsed());
            let mut native = next.clone();
            native.routes.remove(&(pods(3), RouteVia::Link));
            native.routes.insert((pods(3), RouteVia::Native), RoutePlan::default());
            native.firewall.native.insert(pods(3));
            let past = apply(&mut host, &native).messages;
            messages.push([one_more, past, apply(&mut host, &large).messages]);

            // The known state equals the state in the kernel.
            host.invalidate();
            assert_eq!(apply(&mut host, &large).messages, 0);
            host.remove(&Names::of(&large)).unwrap();
            add_tun("towline0");
        }
        assert_eq!(messages[0], messages[1]);
        assert!(messages[0][0] <= 3, "{messages:?}");
    }
}

namespace_test! {
    fn nothing_leaves_in_clear_whichever_guard_is_gone() {
        host_with_foreign_state();
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let mut nft = Nft::open().unwrap();
        let mut host = open_without_ownership();
        let inside = ["198.19.0.2", "10.9.2.1", "10.9.77.1", "fd00:9::2"];
        assert!(inside.iter().all(|to| connect_error(to).is_none()), "open before");

        // Without the link, the guards are installed.
        let changes = host.apply(&plan()).unwrap();
        assert_eq!(changes.problems, [Problem::LinkMissing("towline0".to_owned())]);
        assert!(inside.iter().all(|to| connect_error(to).is_some()), "both guards");
        assert_eq!(connect_error("203.0.113.1"), None);
        assert_eq!(connect_error("2001:db8:1::1"), None);

        for family in Family::ALL {
            for rule in rtnetlink.rules(family).unwrap() {
                if rule.made_by == OURS { rtnetlink.delete_rule(&rule).unwrap() }
            }
        }
        for to in inside {
            assert_eq!(connect_error(to), Some(libc::EPERM), "{to}: the firewall alone");
        }
        host.invalidate();
        host.apply(&plan()).unwrap();
        nft.delete(TableFamily::Inet, "towline").unwrap();
        assert!(inside.iter().all(|to| connect_error(to).is_some()), "the routes alone");

        host.remove(&Names::of(&plan())).unwrap();
        assert!(inside.iter().all(|to| connect_error(to).is_none()), "open after");
    }
}

namespace_test! {
    fn nobody_else_takes_the_firewall_while_we_live_and_it_outlives_us() {
        host_with_foreign_state();
        let mut host = HostNetwork::open().unwrap();
        host.apply(&plan()).unwrap();
        let mut nft = Nft::open().unwrap();
        let ownership = |nft: &mut Nft| {
            nft.read(TableFamily::Inet, "towline").unwrap().map(|loaded| loaded.table.ownership)
        };
        if ownership(&mut nft) != Some(Ownership::Owner) {
            println!("skipped: this kernel's tables have no owners");
            return;
        }
        let mut flush = Transaction::new();
        flush.delete_every_table();
        nft.commit(flush).unwrap();
        assert_eq!(nft.read(TableFamily::Inet, "theirs").unwrap().map(|_| ()), None, "flushed");
        assert_eq!(ownership(&mut nft), Some(Ownership::Owner), "our table is not flushed");
        assert!(nft.delete(TableFamily::Inet, "towline").is_err());

        drop(host);
        assert_eq!(ownership(&mut nft), Some(Ownership::Orphan));
        let mut next = HostNetwork::open().unwrap();
        assert!(next.apply(&plan()).unwrap().messages <= 1, "adopted as it is");
        assert_eq!(ownership(&mut nft), Some(Ownership::Owner));

        // A table that was created without an owner is created again.
        next.remove(&Names::of(&plan())).unwrap();
        open_without_ownership().apply(&plan()).unwrap();
        assert_eq!(ownership(&mut nft), Some(Ownership::Anybody));
        next.apply(&plan()).unwrap();
        assert_eq!(ownership(&mut nft), Some(Ownership::Owner));
    }
}

namespace_test! {
    fn the_guards_outlive_the_link() {
        host_with_foreign_state();
        let Some(link) = add_tun("towline0") else { return };
        let mut host = HostNetwork::open().unwrap();
        apply(&mut host, &plan());
        assert_eq!(connect_error("198.19.0.2"), None, "into the tunnel");
        Rtnetlink::open().unwrap().delete_link(link).unwrap();
        for to in ["198.19.0.2", "10.9.2.1", "fd00:9::2"] {
            assert!(connect_error(to).is_some(), "{to}");
        }
        add_tun("towline0");
        host.invalidate();
        apply(&mut host, &plan());
        assert_eq!(connect_error("10.9.2.1"), None, "into the tunnel again");
    }
}

namespace_test! {
    fn what_is_somebody_elses_is_refused_by_name_and_untouched_while_the_other_guard_holds() {
        host_with_foreign_state();
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let mut nft = Nft::open().unwrap();
        let uplink = rtnetlink.link_index("eth0").unwrap();
        let inside = ["198.19.0.2", "10.9.2.1", "10.9.77.1", "fd00:9::2"];
        let refused = |says: &str| {
            let before = snapshot();
            assert!(inside.iter().all(|to| connect_error(to).is_none()), "{says}: open before");
            let mut host = HostNetwork::open().unwrap();
            for _ in 0..2 {
                let error = host.apply(&plan()).unwrap_err().to_string();
                assert!(error.contains(says) && error.contains("routing.") , "{error}");
                for to in inside {
                    assert!(connect_error(to).is_some(), "{says}: {to} is guarded");
                }
                assert_eq!(connect_error("203.0.113.1"), None, "{says}");
                assert_eq!(connect_error("2001:db8:1::1"), None, "{says}");
                assert_eq!(snapshot().links, before.links, "{says}");
            }
            host.remove(&Names::of(&plan())).unwrap();
            assert_eq!(snapshot(), before);
        };

        let rule = Rule::new(Family::V4, 21_580, RuleAction::Table(99));
        rtnetlink.add_rule(&rule).unwrap();
        refused("policy rule priority 21580: a rule");
        rtnetlink.delete_rule(&rule).unwrap();

        let route = Route::new(net("10.55.0.0/16")).dev(uplink).table(21_580);
        rtnetlink.add_route(&route).unwrap();
        refused("routing table 21580: it holds a route to 10.55.0.0/16");
        rtnetlink.delete_route(&route).unwrap();

        let theirs = Table::new(TableFamily::Inet, "towline");
        nft.load(&theirs).unwrap();
        refused("nftables table inet towline");
        nft.delete(TableFamily::Inet, "towline").unwrap();

        // After the first apply, a foreign object is a problem, and the guards are restored.
        let mut host = open_without_ownership();
        host.apply(&plan()).unwrap();
        rtnetlink.add_route(&route).unwrap();
        nft.delete(TableFamily::Inet, "towline").unwrap();
        host.invalidate();
        let problems = host.apply(&plan()).unwrap().problems;
        assert!(matches!(&problems[0], Problem::Intruder(found) if found.to_string().contains("10.55.0.0/16")));
        assert!(snapshot().firewall.is_some());
        rtnetlink.delete_route(&route).unwrap();

        // A table that another program creates later stays as it is, too.
        nft.delete(TableFamily::Inet, "towline").unwrap();
        nft.load(&theirs).unwrap();
        for _ in 0..2 {
            host.invalidate();
            let problems = host.apply(&plan()).unwrap().problems;
            let is_taken = |problem: &Problem| {
                matches!(problem, Problem::Intruder(InUse::FirewallTable { .. }))
                    && problem.has_open_inverse_guard()
            };
            assert!(problems.iter().any(is_taken), "{problems:?}");
            assert!(!has_firewall_guard("towline", address("10.9.2.1")).unwrap());
            assert_eq!(snapshot().firewall.as_ref(), Some(&theirs));
            assert!(inside.iter().all(|to| connect_error(to).is_some()), "the routes alone");
        }
        nft.delete(TableFamily::Inet, "towline").unwrap();
        host.invalidate();
        host.apply(&plan()).unwrap();
        for (to, is_guarded) in [("10.9.2.1", true), ("fd00:9::2", true), ("10.8.0.1", false)] {
            assert_eq!(has_firewall_guard("towline", address(to)).unwrap(), is_guarded, "{to}");
        }

        // A link that another program has is no reason to lack the routes.
        host.remove(&Names::of(&plan())).unwrap();
        rtnetlink.add_veth("towline0", VethPeer { name: "x", namespace: None }).unwrap();
        let error = HostNetwork::open().unwrap().apply(&plan()).unwrap_err();
        assert!(error.to_string().contains("the link towline0: it is a veth"), "{error}");
        assert!(inside.iter().all(|to| connect_error(to).is_some()), "the routes alone");
    }
}

/// Waits for [`HostEvent::HooksChanged`].
async fn until_hooks_changed(watch: &mut Watch) {
    let changed = async { while watch.next().await.unwrap() != HostEvent::HooksChanged {} };
    tokio::time::timeout(Duration::from_secs(10), changed).await.expect("a notification");
}

namespace_test! {
    fn dockers_drop_of_what_is_forwarded_is_passed_where_docker_says_so() {
        host_with_foreign_state();
        if add_tun("towline0").is_none() { return };
        let mut nft = Nft::open().unwrap();
        let theirs = |family| {
            let user = Chain::regular().rule(towline_nftables::Rule::new().counter().return_());
            let forward = Chain::base(ChainKind::Filter, Hook::Forward, 0)
                .policy(towline_nftables::Policy::Drop)
                .rule(towline_nftables::Rule::new().counter().jump("DOCKER-USER"));
            Table::new(family, "filter").chain("DOCKER-USER", user).chain("FORWARD", forward)
        };
        nft.load(&theirs(TableFamily::Ip)).unwrap();
        let rules = |nft: &mut Nft, family| -> Vec<Option<String>> {
            let loaded = nft.read_chain(family, "filter", "DOCKER-USER").unwrap().unwrap();
            let rules = &loaded.table.chains["DOCKER-USER"].rules;
            rules.iter().map(|rule| rule.comment.clone()).collect()
        };
        let (into, out) = ("towline: into the tunnel", "towline: out of the tunnel");
        let with_ours = [Some(out.to_owned()), Some(into.to_owned()), None];

        let mut host = HostNetwork::open().unwrap();
        apply(&mut host, &plan());
        assert_eq!(rules(&mut nft, TableFamily::Ip), with_ours);
        assert_eq!(host.apply_hooks().unwrap(), Changes::default());

        // Docker creates the IPv6 chains later, and another program flushes the IPv4 chain.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut watch = host.watch(&Names::of(&plan())).unwrap();
            nft.load(&theirs(TableFamily::Ip6)).unwrap();
            until_hooks_changed(&mut watch).await;
            host.apply_hooks().unwrap();
            assert_eq!(rules(&mut nft, TableFamily::Ip6), with_ours);
            nft.load(&theirs(TableFamily::Ip)).unwrap();
            until_hooks_changed(&mut watch).await;
            host.apply_hooks().unwrap();
        });
        assert_eq!(rules(&mut nft, TableFamily::Ip), with_ours);

        // Another program flushes the table before it deletes the chains, which must be empty then.
        let empty = Table::new(TableFamily::Ip, "filter")
            .chain("DOCKER-USER", Chain::regular())
            .chain("FORWARD", Chain::base(ChainKind::Filter, Hook::Forward, 0));
        nft.load(&empty).unwrap();
        host.apply_hooks().unwrap();
        assert_eq!(nft.read(TableFamily::Ip, "filter").unwrap().unwrap().table, empty);
        nft.load(&theirs(TableFamily::Ip)).unwrap();
        host.apply_hooks().unwrap();
        assert_eq!(rules(&mut nft, TableFamily::Ip), with_ours);

        host.remove(&Names::of(&plan())).unwrap();
        for family in [TableFamily::Ip, TableFamily::Ip6] {
            assert_eq!(nft.read(family, "filter").unwrap().unwrap().table, theirs(family));
        }
    }
}

namespace_test! {
    fn a_firewalld_that_does_not_know_our_link_is_said_with_the_way_out() {
        host_with_foreign_state();
        if add_tun("towline0").is_none() { return };
        let goto = |zone: &str| Expression::Verdict(Verdict::Goto(zone.to_owned()));
        let zones = |links: &[&str]| {
            let rule = |link: &&str| towline_nftables::Rule::new().input(link);
            let zone = Chain::regular().rule(towline_nftables::Rule::new().accept());
            let chain = links.iter().fold(Chain::regular(), |chain, link| {
                chain.rule(rule(link).step(goto("filter_FWD_trusted")))
            });
            Table::new(TableFamily::Inet, "firewalld")
                .chain("filter_FWD_trusted", zone)
                .chain("filter_FORWARD_ZONES", chain)
        };
        let mut nft = Nft::open().unwrap();
        let mut host = HostNetwork::open().unwrap();
        apply(&mut host, &plan());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut watch = host.watch(&Names::of(&plan())).unwrap();
            nft.load(&zones(&["eth0"])).unwrap();
            until_hooks_changed(&mut watch).await;
            let problems = host.apply_hooks().unwrap().problems;
            assert_eq!(problems, [Problem::NoZone("towline0".to_owned())]);
            assert!(problems[0].to_string().contains("--zone=trusted --add-interface=towline0"));
            nft.load(&zones(&["eth0", "towline0"])).unwrap();
            until_hooks_changed(&mut watch).await;
        });
        assert_eq!(host.apply_hooks().unwrap(), Changes::default());
        apply(&mut host, &plan());
    }
}

namespace_test! {
    fn large_plans_survive_small_socket_buffers() {
        host_with_foreign_state();
        if add_tun("towline0").is_none() { return };
        let mut large = plan();
        for n in 0..3_000u32 {
            let net = IpNet::new(Ipv4Addr::from(0x0a80_0000 + n * 512).into(), 24).unwrap();
            large.routes.insert((net, RouteVia::Link), RoutePlan::default());
            large.routes.insert((net, RouteVia::Unreachable), RoutePlan::default());
            large.firewall.guarded.insert(net);
        }
        let mut host = HostNetwork::open().unwrap();
        host.rtnetlink.shrink_buffers(16 << 10);
        host.nft.as_mut().unwrap().shrink_buffers(16 << 10);
        apply(&mut host, &large);
        host.invalidate();
        assert_eq!(apply(&mut host, &large).messages, 0, "the whole plan is applied");
        // The kernel refuses each of these routes, and each refusal takes buffer space.
        let mut refused = large.clone();
        for (_, route) in refused.routes.iter_mut().filter(|((_, via), _)| *via == RouteVia::Link) {
            route.source = Some("203.0.113.77".parse().unwrap());
        }
        let problems = host.apply(&refused).unwrap().problems;
        assert!(matches!(&problems[..], [Problem::Refused { .. }]), "one line: {problems:?}");
        apply(&mut host, &large);
        host.remove(&Names::of(&large)).unwrap();
    }
}

namespace_test! {
    fn a_read_only_sysctl_tree_keeps_nothing_from_the_plan() {
        use nix::mount::{MsFlags, mount};
        host_with_foreign_state();
        if add_tun("towline0").is_none() { return };
        let settings = "/proc/sys";
        let read_only = |flags: MsFlags| {
            mount(Some(settings), settings, None::<&str>, flags, None::<&str>)
        };
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        std::fs::write("/proc/sys/net/ipv4/conf/towline0/rp_filter", "1").unwrap();
        if read_only(MsFlags::MS_BIND).is_err() {
            return println!("skipped: no bind mounts here");
        }
        read_only(MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY).unwrap();
        let mut host = HostNetwork::open().unwrap();
        std::fs::write("/proc/sys/net/ipv4/conf/towline0/rp_filter", "1").unwrap_err();
        let problems = host.apply(&plan()).unwrap().problems;
        assert_eq!(problems, []);
        let mode = std::fs::read_to_string("/proc/sys/net/ipv4/conf/towline0/rp_filter").unwrap();
        assert_eq!(mode.trim(), "2", "set without /proc/sys");
        assert_eq!(host.apply(&plan()).unwrap().messages, 0, "no further attempt");
        assert!(connect_error("10.9.77.1").is_some() && connect_error("10.9.2.1").is_none());
    }
}

namespace_test! {
    fn our_own_sockets_pass_the_guards() {
        host_with_foreign_state();
        let mut host = HostNetwork::open().unwrap();
        host.apply(&plan()).unwrap();
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 51_830)).unwrap();
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Mark, &0x10).unwrap();
        // The peer's endpoint is its node IP, which is inside a guarded network.
        socket.send_to(b"sealed", "10.9.2.1:51830").unwrap();
    }
}

namespace_test! {
    fn addresses_come_with_their_links() {
        host_with_foreign_state();
        let other = NetworkNamespace::new();
        let mut rtnetlink = Rtnetlink::open().unwrap();
        rtnetlink.add_bridge("br0").unwrap();
        rtnetlink
            .add_veth("pod", VethPeer { name: "eth0", namespace: Some(other.as_fd()) })
            .unwrap();
        let bridge = rtnetlink.link_index("br0").unwrap();
        let pod = rtnetlink.link_index("pod").unwrap();
        rtnetlink.set_master(pod, Some(bridge)).unwrap();
        rtnetlink.set_up(bridge, true).unwrap();
        let options = AddressOptions { no_dad: true, no_prefix_route: false };
        rtnetlink.add_address(bridge, net("10.244.1.1/24"), options).unwrap();
        let mut host = HostNetwork::open().unwrap();
        let addresses = host.local_addresses().unwrap();
        let on_bridge = addresses.iter().find(|a| a.prefix == net("10.244.1.1/24")).unwrap();
        assert_eq!((on_bridge.link.as_str(), on_bridge.outward), ("br0", false));
        let policy = CandidatePolicy { own_link: "towline0".to_owned(), excluded: Vec::new() };
        let found: Vec<_> = candidates(&addresses, &policy).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1", "2001:db8::1"]);
    }
}

namespace_test! {
    fn a_large_mesh_in_figures() {
        host_with_foreign_state();
        if add_tun("towline0").is_none() { return };
        let mut plan = plan();
        // 1,000 peers with 5 prefixes each.
        for n in 0..5_000u32 {
            let prefix = if n % 5 == 0 {
                IpNet::from(IpAddr::from(Ipv6Addr::from_bits((0xfd00_0009 << 96) | u128::from(n + 9))))
            } else {
                IpNet::new(Ipv4Addr::from(0x0a20_0000 + n * 512).into(), 24).unwrap()
            };
            plan.routes.insert((prefix, RouteVia::Link), RoutePlan::default());
            plan.routes.insert((prefix, RouteVia::Unreachable), RoutePlan::default());
            plan.firewall.guarded.insert(prefix);
        }
        let mut host = HostNetwork::open().unwrap();
        let start = Instant::now();
        let full = apply(&mut host, &plan).messages;
        let full_time = start.elapsed();

        plan.routes.insert((net("10.9.3.0/24"), RouteVia::Link), RoutePlan::default());
        let start = Instant::now();
        let change = apply(&mut host, &plan).messages;
        let change_time = start.elapsed();
        assert_eq!(change, 1);

        host.invalidate();
        let start = Instant::now();
        assert_eq!(apply(&mut host, &plan).messages, 0);
        println!(
            "full {full} messages in {full_time:?}, change {change} in {change_time:?}, \
             reading again in {:?}",
            start.elapsed()
        );
    }
}
