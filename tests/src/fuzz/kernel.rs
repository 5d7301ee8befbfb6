//! Fuzz targets of what the kernel answers: netlink messages, and nftables tables.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use towline_netlink::codec::{Message, attributes, messages};
use towline_netlink::{Family, RouteKind, RuleAction, internals as netlink_internals};
use towline_nftables::{
    Base, Chain, ChainKind, CtState, Hook, KeyType, Ownership, Packet, PacketLink, Rule, Set,
    Table, TableFamily, Transaction, internals as nftables_internals,
};

/// Reads the messages of a datagram as links, addresses, routes, policy rules and owners of sockets.
///
/// At most one reader of rtnetlink accepts a message. A route or rule that was read, encoded and read again stays
/// the same from then on.
pub fn netlink(bytes: &[u8]) {
    use netlink_internals::{address, link, route, route_request, rule, rule_request, socket_user};
    let mut read = 0;
    for received in messages(bytes) {
        read += received.payload.len();
        let values: usize = attributes(received.payload, 0).map(|inner| inner.value.len()).sum();
        assert!(values <= received.payload.len());
        // It answers another protocol, with the same number as an address.
        let _ = socket_user(&received, u16::from_ne_bytes([7, 7]));
        let link = link(&received).is_some();
        let address = address(&received).is_some();
        let route = route(&received);
        let rule = rule(&received);
        let accepted = [link, address, route.is_some(), rule.is_some()];
        assert!(accepted.into_iter().filter(|accepted| *accepted).count() <= 1);
        if let Some(route) = route {
            // Each next hop has a header of 8 bytes.
            assert!(route.next_hops.len() * 8 <= received.payload.len());
            let again = |route: &_| {
                let request = route_request(libc::RTM_NEWROUTE, 0, route);
                read_one(request, netlink_internals::route)
            };
            if let Some(first) = again(&route) {
                assert_eq!(again(&first).as_ref(), Some(&first));
            }
        }
        if let Some(rule) = rule {
            let again = |rule: &_| {
                let request = rule_request(libc::RTM_NEWRULE, 0, rule);
                read_one(request, netlink_internals::rule)
            };
            if let Some(first) = again(&rule) {
                assert_eq!(again(&first).as_ref(), Some(&first));
            }
        }
    }
    assert!(read <= bytes.len());
}

fn read_one<T>(
    request: Message,
    parse: impl Fn(&towline_netlink::codec::Received<'_>) -> Option<T>,
) -> Option<T> {
    let bytes = netlink_internals::bytes(request);
    messages(&bytes).next().and_then(|received| parse(&received))
}

/// Reads the messages of a datagram as a table, and as another program's table. The first message
/// names the table.
///
/// A table needs no change to become itself. A table that was read, encoded and read again stays the
/// same from then on. Every packet has a fate in every base chain.
pub fn nftables(bytes: &[u8]) {
    use nftables_internals::{foreign_table, requests, table};
    /// Header of the messages of nftables: `struct nfgenmsg`.
    const HEADER: usize = 4;
    const NAME: u16 = 1;
    let Some(first) = messages(bytes).next() else { return };
    let family = match first.payload.first() {
        Some(2) => TableFamily::Ip,
        Some(10) => TableFamily::Ip6,
        _ => TableFamily::Inet,
    };
    let name = attributes(first.payload, HEADER).find(|attribute| attribute.kind == NAME);
    let Some(name) = name.map(|attribute| attribute.string()) else { return };

    let loaded = table(bytes, family, &name).table;
    assert!(loaded.changes(Some(&loaded)).is_empty());
    let again = |read: &Table| {
        let mut transaction = Transaction::new();
        transaction.create(read);
        table(&requests(transaction), family, &name).table
    };
    let encoded = again(&loaded);
    assert_eq!(again(&encoded), encoded);

    let foreign = foreign_table(bytes, family, &name);
    for packet in packets() {
        for (name, chain) in &foreign.chains {
            if chain.base.is_some() {
                let fate = foreign.evaluate(name, &packet);
                assert!(fate.can_pass || fate.can_drop);
            }
        }
    }
}

fn packets() -> [Packet; 2] {
    let packet = |source: IpAddr, destination: IpAddr| Packet {
        hook: Hook::Forward,
        input: Some(PacketLink { index: 2, name: "eth0".into() }),
        output: None,
        source,
        destination,
        protocol: libc::IPPROTO_UDP as u8,
        source_port: 51_830,
        destination_port: 53,
    };
    [
        packet(Ipv4Addr::new(192, 0, 2, 1).into(), Ipv4Addr::new(10, 0, 0, 1).into()),
        packet(Ipv6Addr::LOCALHOST.into(), Ipv6Addr::UNSPECIFIED.into()),
    ]
}

// Inputs

pub(super) fn netlink_seeds() -> Vec<Vec<u8>> {
    use netlink_internals::{route_request, rule_request};
    let mut routes = Vec::new();
    for (destination, gateway) in [("10.1.0.0/16", "192.0.2.1"), ("fd01::/64", "2001:db8::1")] {
        let net = destination.parse().expect("a network");
        let route = towline_netlink::Route::new(net)
            .via(gateway.parse().expect("an address"))
            .dev(2)
            .table(21_580)
            .metric(10)
            .mtu(1_380);
        routes.push(route.clone().kind(RouteKind::Unreachable));
        routes.push(route);
    }
    let mut by_port = towline_netlink::Rule::new(Family::V4, 21_580, RuleAction::Table(21_580));
    by_port.mark = Some((0x10, 0x30));
    by_port.protocol = Some(17);
    by_port.source_ports = Some(51_830..=51_830);
    by_port.users = Some(0..=0);
    by_port.source = "10.0.0.0/8".parse().ok();
    let mut by_link = towline_netlink::Rule::new(Family::V6, 21_581, RuleAction::Goto(32_766));
    by_link.input = Some("lo".into());
    by_link.suppress_prefix_length = Some(0);
    let mut routes: Vec<u8> = routes
        .iter()
        .flat_map(|route| netlink_internals::bytes(route_request(libc::RTM_NEWROUTE, 0, route)))
        .collect();
    routes.extend(multipath());
    let rules = [by_port, by_link];
    let rules = rules
        .iter()
        .flat_map(|rule| netlink_internals::bytes(rule_request(libc::RTM_NEWRULE, 0, rule)));
    vec![routes, rules.collect(), links()]
}

/// Returns a route with two next hops, as the kernel describes it.
fn multipath() -> Vec<u8> {
    const RTA_MULTIPATH: u16 = 9;
    let mut message = Message::new(libc::RTM_NEWROUTE, 0, &[2, 16, 0, 0, 254, 4, 0, 1, 0, 0, 0, 0]);
    let hop = |last| [16, 0, 0, 0, 2, 0, 0, 0, 8, 0, 5, 0, 192, 0, 2, last];
    message.bytes(1, &[10, 3, 0, 0]).bytes(RTA_MULTIPATH, &[hop(1), hop(2)].concat());
    netlink_internals::bytes(message)
}

/// Returns a TUN link, a VXLAN link and two addresses, as the kernel describes them.
fn links() -> Vec<u8> {
    const LINK_INFO: u16 = 18;
    const FAMILIES: u16 = 26;
    let mut all = Vec::new();
    for (index, name, kind) in [(2u8, "towline0", "tun"), (3, "vxlan.calico", "vxlan")] {
        let mut link = Message::new(
            libc::RTM_NEWLINK,
            0,
            &[0, 0, 0, 0, index, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0],
        );
        link.string(3, name).u32(4, 1_420).u32(13, 500);
        link.nest(LINK_INFO, |info| {
            info.string(1, kind).nest(2, |data| {
                data.u32(1, 997).u32(8, 4).u32(9, 1).bytes(15, &4_789u16.to_be_bytes());
            });
        });
        link.nest(FAMILIES, |families| {
            families.nest(2, |inet| {
                inet.bytes(1, &[2; 128]);
            });
            families.nest(10, |inet6| {
                inet6.bytes(2, &[0; 240]);
            });
        });
        all.extend(netlink_internals::bytes(link));
    }
    for (family, address) in [(2, IpAddr::from([192, 0, 2, 7])), (10, Ipv6Addr::LOCALHOST.into())] {
        let mut message = Message::new(libc::RTM_NEWADDR, 0, &[family, 24, 0x80, 0, 2, 0, 0, 0]);
        message.ip(1, address).ip(2, address).u32(8, 0x80);
        all.extend(netlink_internals::bytes(message));
    }
    all
}

pub(super) fn nftables_seeds() -> Vec<Vec<u8>> {
    let nets: Vec<ipnet::IpNet> = ["10.0.0.0/8", "192.168.0.0/16", "fd00::/8"]
        .map(|net| net.parse().expect("a network"))
        .into();
    let base = |kind, hook| Chain::base(kind, hook, 10);
    let mut table = Table::new(TableFamily::Inet, "t")
        .set("v4", Set::networks(KeyType::Ipv4, &nets))
        .set("v6", Set::networks(KeyType::Ipv6, &nets))
        .set("ports", Set::ports([22, 53]))
        .set("connections", Set::expiring(KeyType::Connection, 1_000))
        .chain("regular", Chain::default().rule(Rule::new().source(nets[0]).return_()));
    let forward = [
        Rule::new().input("eth0").source_in(Family::V4, "v4").jump("regular"),
        Rule::new().comment("dns").protocol(17).destination_port_in("ports").counter().accept(),
        Rule::new().mark(0x10, 0x30).set_ct_mark(0x20, 0x30),
        Rule::new().ct_state(CtState::ESTABLISHED | CtState::RELATED).accept(),
        Rule::new().remember_connection("connections", Duration::from_secs(60)),
        Rule::new().chance(10, 100).drop(),
        Rule::new().clamp_mss(1_300),
        Rule::new().destination_is_local().reject(),
        Rule::new().not_destination(nets[2]).goto("regular"),
    ];
    let chain = forward.into_iter().fold(base(ChainKind::Filter, Hook::Forward), Chain::rule);
    let chain = Chain {
        base: chain.base.map(|base| Base { policy: towline_nftables::Policy::Drop, ..base }),
        ..chain
    };
    table = table.chain("forward", chain);
    let nat = base(ChainKind::Nat, Hook::Postrouting).rule(Rule::new().output("eth0").masquerade());
    let mut other = Table::new(TableFamily::Ip, "nat").chain("post", nat);
    other.comment = Some("of another program".into());
    other.ownership = Ownership::Owner;
    [table, other]
        .iter()
        .map(|table| {
            let mut transaction = Transaction::new();
            transaction.create(table);
            nftables_internals::requests(transaction)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_reach_what_they_are_meant_for() {
        let [routes, rules, links] = netlink_seeds().try_into().expect("three seeds");
        let count = |bytes: &[u8], is: fn(&towline_netlink::codec::Received<'_>) -> bool| {
            messages(bytes).filter(is).count()
        };
        assert_eq!(count(&routes, |received| netlink_internals::route(received).is_some()), 5);
        assert_eq!(count(&rules, |received| netlink_internals::rule(received).is_some()), 2);
        assert_eq!(count(&links, |received| netlink_internals::link(received).is_some()), 2);
        assert_eq!(count(&links, |received| netlink_internals::address(received).is_some()), 2);
        let table = nftables_internals::table(&nftables_seeds()[0], TableFamily::Inet, "t").table;
        assert_eq!((table.sets.len(), table.chains["forward"].rules.len()), (4, 9));
        assert_eq!(table.sets["v4"].elements.len(), 2);
    }
}
