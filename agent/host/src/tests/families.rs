//! Tests of hosts without IPv6, or with IPv6 disabled.

use super::*;

/// Returns Towline's state of one family: the number of rules, the destinations of the routes in the
/// plan's table, and the addresses of the link.
fn ours(family: Family) -> (usize, Vec<IpNet>, Vec<IpNet>) {
    let mut rtnetlink = Rtnetlink::open().unwrap();
    let rules = rtnetlink.rules(family).unwrap().into_iter().filter(|rule| rule.made_by == OURS);
    let routes = rtnetlink.routes(family, Some(21_580)).unwrap();
    let link = rtnetlink.link("towline0").unwrap().unwrap().index;
    let addresses = rtnetlink.addresses(Some(link)).unwrap().into_iter();
    let addresses = addresses.filter(|address| address.scope == 0).map(|address| address.prefix);
    (
        rules.count(),
        routes.into_iter().map(|route| route.destination).collect(),
        addresses.filter(|prefix| Family::of(prefix.addr()) == family).collect(),
    )
}

fn set_disable_ipv6(of: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{of}/disable_ipv6"), value).unwrap();
}

fn disabled() -> Problem {
    Problem::NoIpv6OnLink { link: "towline0".to_owned() }
}

namespace_test! {
    fn a_kernel_without_ipv6_gets_all_of_ipv4() {
        host_with_foreign_state();
        if add_tun("towline0").is_none() { return };
        let mut host = HostNetwork::open().unwrap();
        host.rtnetlink.lack_ipv6();
        let changes = host.apply(&plan()).unwrap();
        assert_eq!(changes.problems, [Problem::NoIpv6]);
        assert!(changes.problems[0].is_note() && !changes.problems[0].is_blocking());

        let (rules, routes, addresses) = ours(Family::V4);
        assert!(rules >= 3, "{rules} rules");
        assert_eq!(routes.len(), 4, "{routes:?}");
        assert_eq!(addresses, [net("198.19.0.1/32")]);
        assert_eq!(ours(Family::V6), (0, vec![], vec![]));
        let table = snapshot().firewall.expect("the other guard");
        assert!(!table.sets["guarded4"].elements.is_empty());

        // Refused requests are not repeated, neither for the same plan nor for another.
        for read_again in [false, true] {
            if read_again { host.invalidate() }
            let again = host.apply(&plan()).unwrap();
            assert_eq!((again.messages, again.problems), (0, vec![Problem::NoIpv6]));
        }
        let mut next = plan();
        for destination in ["10.9.3.0/24", "fd00:9::3/128"] {
            next.routes.insert((net(destination), RouteVia::Link), RoutePlan::default());
        }
        let changes = host.apply(&next).unwrap();
        assert_eq!((changes.messages, changes.problems), (1, vec![Problem::NoIpv6]));

        // The functions that read the host's state work too.
        let policy = CandidatePolicy { own_link: "towline0".to_owned(), excluded: Vec::new() };
        let gateways: Vec<IpAddr> = vec!["192.0.2.254".parse().unwrap()];
        assert!(host.gateways().unwrap().starts_with(&gateways));
        assert_eq!(host.connectivity(&policy, 16).unwrap().node_ips[0], net("192.0.2.1/32").addr());
        assert!(host.remove(&Names::of(&next)).unwrap() > 0);
        assert_eq!(host.remove(&Names::of(&next)).unwrap(), 0);
    }
}

namespace_test! {
    fn a_kernel_without_ipv6_and_without_a_link_is_guarded() {
        host_with_foreign_state();
        let mut host = HostNetwork::open().unwrap();
        host.rtnetlink.lack_ipv6();
        host.apply(&plan()).unwrap();
        assert_eq!(connect_error("198.19.0.9"), Some(libc::EHOSTUNREACH));
        assert_eq!(connect_error("10.9.2.1"), Some(libc::EHOSTUNREACH));
        assert_eq!(connect_error("192.0.2.9"), None);
    }
}

namespace_test! {
    fn routes_of_another_family_are_not_taken_for_those_asked_for() {
        host_with_foreign_state();
        let mut rtnetlink = Rtnetlink::open().unwrap();
        rtnetlink.lack_ipv6();
        let routes = rtnetlink.routes(Family::V6, None).unwrap();
        assert!(routes.iter().all(|route| route.destination.addr().is_ipv6()), "{routes:?}");
    }
}

namespace_test! {
    fn ipv6_that_is_switched_off_by_sysctl_is_still_guarded() {
        set_disable_ipv6("all", "1");
        set_disable_ipv6("default", "1");
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let loopback = rtnetlink.link_index("lo").unwrap();
        rtnetlink.set_up(loopback, true).unwrap();
        if add_tun("towline0").is_none() { return };
        let mut host = HostNetwork::open().unwrap();
        for read_again in [false, true] {
            if read_again { host.invalidate() }
            let changes = host.apply(&plan()).unwrap();
            assert_eq!(changes.problems, [disabled()]);
            assert!(!read_again || changes.messages == 0, "nothing is tried again");
        }
        assert_eq!(ours(Family::V4).2, [net("198.19.0.1/32")]);
        assert_eq!(ours(Family::V4).1.len(), 4);
        // Another link may have IPv6, so the IPv6 guards are installed.
        let (rules, routes, addresses) = ours(Family::V6);
        assert!(rules >= 3, "{rules} rules");
        assert_eq!(routes, [net("fd00:9::/64")]);
        assert_eq!(addresses, []);
    }
}

namespace_test! {
    fn ipv6_that_is_switched_on_again_is_noticed() {
        set_disable_ipv6("all", "1");
        set_disable_ipv6("default", "1");
        // Open, as with a running agent: the kernel sends no notifications about the IPv6 settings of a
        // link without a carrier.
        let Ok(_tun) = towline_dataplane::open_tun("towline0") else {
            println!("skipped: no TUN devices here");
            return;
        };
        let mut host = HostNetwork::open().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut watch = host.watch(&Names::of(&plan())).unwrap();
            let mut applied = host.apply(&plan()).unwrap();
            assert_eq!(applied.problems, [disabled()]);
            for (value, expected) in [("0", vec![]), ("1", vec![disabled()]), ("0", vec![])] {
                set_disable_ipv6("towline0", value);
                while applied.problems != expected {
                    let event = tokio::time::timeout(Duration::from_secs(10), watch.next()).await;
                    if event.expect("a notification").unwrap() == HostEvent::OursChanged {
                        host.invalidate();
                        applied = host.apply(&plan()).unwrap();
                    }
                }
                let has_address = !ours(Family::V6).2.is_empty();
                assert_eq!(has_address, value == "0");
            }
        });
    }
}
