//! Tests of how this host is connected, as read from the kernel.

use std::net::Ipv4Addr;

use ipnet::IpNet;

use super::{address, net};
use crate::{CandidatePolicy, HostNetwork};
use towline_netlink::{AddressOptions, Family, Route, RouteChange, Rtnetlink};
use towline_netns::{add_link, namespace_test};

/// Protocol number of BGP (`RTPROT_BGP`).
const BGP: u8 = 186;

namespace_test! {
    fn a_full_routing_table_is_read_once_and_its_default_route_still_counts() {
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let loopback = rtnetlink.link_index("lo").unwrap();
        rtnetlink.set_up(loopback, true).unwrap();
        let links = ["eth0", "eth1"].map(add_link);
        let options = AddressOptions { no_dad: true, no_prefix_route: false };
        for (link, prefix) in
            links.into_iter().chain([loopback]).zip(["10.0.1.1/24", "10.0.2.1/24", "203.0.113.9/32"])
        {
            rtnetlink.add_address(link, net(prefix), options).unwrap();
        }
        // A router that learns the routes of the internet, and its default route too. What it sends has the
        // address on its loopback, which it announces to its neighbours.
        let learned = |to: IpNet| Route {
            protocol: BGP,
            ..Route::new(to).via(address("10.0.2.254")).dev(links[1]).source(address("203.0.113.9"))
        };
        let internet = (0..9_000u32).map(|n| {
            IpNet::new(Ipv4Addr::from(0x2000_0000 + n * 256).into(), 24).unwrap()
        });
        let internet: Vec<_> = internet.map(|to| RouteChange::Set(learned(to))).collect();
        rtnetlink.add_route(&learned(net("0.0.0.0/0"))).unwrap();
        let policy = CandidatePolicy { own_link: "towline0".to_owned(), excluded: Vec::new() };
        let mut host = HostNetwork::open().unwrap();
        let small = host.connectivity(&policy, 16).unwrap();
        let uplinks = small.outward.uplinks.iter().map(|at| (at.address.to_string(), at.interface));
        let uplinks: Vec<_> = uplinks.collect();
        assert_eq!(uplinks[0], ("203.0.113.9".to_owned(), links[1]));
        assert_eq!(small.node_ips[0], address("10.0.2.1"));
        assert!(small.transit.ways_out.contains("eth1"));

        assert_eq!(rtnetlink.change_routes(&internet).unwrap(), []);
        assert_eq!(host.connectivity(&policy, 16).unwrap(), small);
        assert!(host.tables.is_large(Family::V4), "not read whole any more");
        assert!(!host.tables.is_large(Family::V6));
        // A default route of the host's configuration is found too.
        let configured = Route::new(net("0.0.0.0/0")).via(address("10.0.1.254")).dev(links[0]);
        rtnetlink.add_route(&configured.metric(50)).unwrap();
        assert_eq!(
            host.connectivity(&policy, 16).unwrap().transit.ways_out,
            ["eth0", "eth1"].map(str::to_owned).into()
        );
        assert_eq!(host.gateways().unwrap(), ["10.0.1.254", "10.0.2.254"].map(address));
    }
}
