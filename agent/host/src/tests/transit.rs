//! Tests of a host whose LAN has other nodes in it, so that it may be their router: which of the packets
//! from that LAN pass the inverse guard.
//!
//! The other node (a namespace of its own) has its node IPs in the network of `eth0`.

use towline_core::own_networks::OwnNetworks;
use towline_core::plan::{Plan, TransitPlan};

use super::ingress::{forward, is_empty, pod, reach, received};
use super::traffic::{
    PAIRS, PORT, at, counter, lan, set_reverse_path_filter, transparent, udp, with_tunnel,
};
use super::{address, apply, net};
use towline_netlink::{Route, Rtnetlink};
use towline_netns::{NetworkNamespace, namespace_test};

/// Port of a service that is neither the tunnels' nor a plain one.
const SERVICE: u16 = 4_444;
const OVERLAY: [&str; 2] = ["198.19.0.1", "fd00:9::1"];
/// Networks of pods of this host, with the address of one pod and that of its router.
const PODS: [(&str, &str, &str); 2] =
    [("10.9.1.0/24", "10.9.1.7", "10.9.1.1"), ("fd00:9:1::/64", "fd00:9:1::7", "fd00:9:1::1")];

/// Returns the plan of a host that may be the router of the other node, and announces its pods.
fn router() -> Plan {
    let mut plan = transparent();
    // Networks that this host announces are not guarded.
    plan.firewall.guarded.remove(&net("10.9.0.0/16"));
    plan.routes.retain(|(guard, _), _| *guard != net("10.9.0.0/16"));
    let announced = PODS.map(|(pods, ..)| net(pods));
    plan.firewall.own = OwnNetworks::new(OVERLAY.map(address), announced, []);
    plan.transit = TransitPlan {
        lans: ["192.0.2.0/24", "2001:db8::/64"].map(|lan| ("eth0".to_owned(), net(lan))).into(),
        ways_out: ["wan0".to_owned()].into(),
    };
    plan
}

/// Sends a datagram from the node IP of the other node, and then an encrypted one, which always arrives.
fn send(node: &NetworkNamespace, family: usize, to: &str) {
    let (uplink, node_ip) = PAIRS[family];
    let tunnels = udp(at(uplink, PORT), true);
    node.enter(|| {
        let socket = udp(at(node_ip, 0), false);
        socket.send_to(b"plain", at(to, SERVICE)).unwrap();
        socket.send_to(b"outer", at(uplink, PORT)).unwrap();
    });
    assert_eq!(received(&tunnels), b"outer");
}

namespace_test! {
    fn a_plain_source_in_a_network_with_node_ips_reaches_this_host_and_its_pods() {
        let node = lan();
        forward();
        set_reverse_path_filter(0);
        let gateways = PODS.map(|(_, _, gateway)| gateway);
        let pods = pod(
            "cni0",
            &["10.9.1.1/24", "fd00:9:1::1/64"],
            &["10.9.1.7/24", "fd00:9:1::7/64"],
        );
        pods.enter(|| {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            for (any, gateway) in ["0.0.0.0/0", "::/0"].into_iter().zip(gateways) {
                rtnetlink.add_route(&Route::new(net(any)).via(address(gateway))).unwrap();
            }
        });
        node.enter(|| {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            for ((pods, ..), (uplink, _)) in PODS.into_iter().zip(PAIRS) {
                rtnetlink.add_route(&Route::new(net(pods)).via(address(uplink))).unwrap();
            }
        });
        let Some((mut host, _tunnel)) = with_tunnel(&router()) else { return };
        for family in [0, 1] {
            let (uplink, pod) = (PAIRS[family].0, PODS[family].1);
            let here = udp(at(uplink, SERVICE), false);
            let there = pods.enter(|| udp(at(pod, SERVICE), false));
            // The link of the pod comes up with a delay.
            reach(&here, at(pod, SERVICE), &there);

            // A node IP that is not plain must come through the tunnel.
            let forged = ["forged source, IPv4", "forged source, IPv6"][family];
            let before = counter("outer", forged).packets;
            for (to, service) in [(uplink, &here), (pod, &there)] {
                send(&node, family, to);
                is_empty(service, to);
            }
            assert!(counter("outer", forged).packets >= before + 2, "counted with the others");

            // A trusted site, or a mesh that prefers reachability while a tunnel is down.
            let mut plain = router();
            plain.firewall.plain = PAIRS.map(|(_, node_ip)| address(node_ip).into()).into();
            apply(&mut host, &plain);
            for (to, service) in [(uplink, &here), (pod, &there)] {
                send(&node, family, to);
                assert_eq!(received(service), b"plain", "{to}");
            }
            apply(&mut host, &router());
        }
    }
}
