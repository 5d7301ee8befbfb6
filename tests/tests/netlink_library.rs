//! Compares our readers with those of `netlink-packet-route`: on the answers of the running kernel, in
//! a network namespace, and on the recorded answers of other kernels. No message may be lost, and both
//! must read the same.

#![allow(clippy::unwrap_used)] // in a test a panic is the report
#![expect(clippy::print_stdout, reason = "the output of a test")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipnet::IpNet;
use netlink_packet_core::{NetlinkDeserializable as _, NetlinkHeader, NetlinkPayload, Nla as _};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, InfoData, InfoGeneve, InfoTun, InfoVxlan, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric,
};
use netlink_packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use towline_netlink::codec::{Message, Received, messages};
use towline_netlink::{
    Address, AddressFlags, AddressOptions, Connection, Family, Link, NextHop, Overlay, OverlayKind,
    Protocol, Route, RouteKind, Rtnetlink, Rule, RuleAction, TunInfo, internals,
};
use towline_netns::{add_link, add_unowned_tun, namespace_test};

namespace_test! {
    fn both_read_the_same_from_this_kernel() {
        fill_namespace();
        let mut connection = Connection::open(Protocol::Route).unwrap();
        // Request and its fixed header's length. The answer's type is two less than the request's.
        let dumps = [
            (libc::RTM_GETLINK, 16),
            (libc::RTM_GETADDR, 8),
            (libc::RTM_GETROUTE, 12),
            (libc::RTM_GETRULE, 12),
        ];
        for (kind, header) in dumps {
            let request = Message::new(kind, 0, &[0; 16][..header]);
            let answers = connection
                .dump("list objects", &request, |received| {
                    assert_eq!(received.kind, kind - 2);
                    compare(&received);
                    Some(())
                })
                .unwrap();
            assert!(answers.len() > 1, "{} objects of type {kind}", answers.len());
        }
    }
}

#[test]
fn both_read_the_same_from_recorded_kernels() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/netlink");
    let mut compared = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("linux-") {
            let bytes = std::fs::read(&path).unwrap();
            compared += messages(&bytes).inspect(|received| compare(received)).count();
        }
    }
    // The recorded answers of two kernels.
    assert!(compared > 200, "{compared} messages");
}

/// Creates links, addresses, routes and rules with the attributes that our readers read. Kinds of links
/// that this kernel does not have are left out.
fn fill_namespace() {
    let index = add_link("d0");
    let mut rtnetlink = Rtnetlink::open().unwrap();
    rtnetlink.add_bridge("br0").unwrap();
    let bridge = rtnetlink.link_index("br0").unwrap();
    let port = rtnetlink.link_index("d0p").unwrap();
    rtnetlink.set_master(port, Some(bridge)).unwrap();
    let remote = Ipv4Addr::new(192, 0, 2, 9).into();
    for (name, kind, port) in
        [("vx0", OverlayKind::Vxlan, 4_789), ("gn0", OverlayKind::Geneve, 6_081)]
    {
        if let Err(error) = rtnetlink.add_overlay(name, Overlay { kind, id: 7, remote, port }) {
            println!("without {name}: {error}");
        }
    }
    add_unowned_tun("tun0");
    let options = AddressOptions { no_dad: true, no_prefix_route: false };
    for address in ["192.0.2.1/24", "2001:db8::1/64"] {
        rtnetlink.add_address(index, address.parse().unwrap(), options).unwrap();
    }
    let route = |net: &str| Route::new(net.parse().unwrap());
    let routes = [
        route("10.1.0.0/16").via([192, 0, 2, 254].into()).dev(index).metric(10).mtu(1_300),
        route("10.2.0.0/16").dev(index).table(21_580).source([192, 0, 2, 1].into()),
        route("10.3.0.0/16").table(21_580).metric(20).kind(RouteKind::Unreachable),
        route("10.4.0.0/16").kind(RouteKind::Blackhole),
        route("10.5.0.0/16").table(21_580).kind(RouteKind::Throw),
        route("fd01::/64").dev(index).table(21_580).metric(10),
    ];
    for route in &routes {
        rtnetlink.add_route(route).unwrap();
    }
    for family in Family::ALL {
        let mut by_mark = Rule::new(family, 100, RuleAction::Table(21_580));
        by_mark.mark = Some((0x10, 0x30));
        by_mark.invert = true;
        let mut by_port = Rule::new(family, 101, RuleAction::Unreachable);
        by_port.protocol = Some(libc::IPPROTO_UDP as u8);
        by_port.source_ports = Some(51_830..=51_830);
        by_port.destination_ports = Some(1..=65_534);
        by_port.input = Some("lo".into());
        let mut by_user = Rule::new(family, 102, RuleAction::Goto(32_766));
        by_user.users = Some(0..=0);
        let mut by_net = Rule::new(family, 103, RuleAction::Table(254));
        by_net.suppress_prefix_length = Some(0);
        let net = if family == Family::V4 { "10.0.0.0/8" } else { "fd00::/8" };
        by_net.source = net.parse().ok();
        by_net.destination = net.parse().ok();
        for rule in [by_mark, by_port, by_user, by_net] {
            rtnetlink.add_rule(&rule).unwrap();
        }
    }
}

/// Compares what both make of one message, which both must accept.
fn compare(received: &Received<'_>) {
    let mut header = NetlinkHeader::default();
    header.message_type = received.kind;
    let theirs = RouteNetlinkMessage::deserialize(&header, received.payload);
    match theirs.expect("their reader accepts the message") {
        RouteNetlinkMessage::NewLink(theirs) => {
            let ours = internals::link(received);
            assert_eq!(ours.expect("our reader accepts the link"), link(&theirs));
        }
        RouteNetlinkMessage::NewAddress(theirs) => {
            let ours = internals::address(received);
            assert_eq!(ours.expect("our reader accepts the address"), address(&theirs));
        }
        RouteNetlinkMessage::NewRoute(theirs) => {
            // We leave out entries of the cache and families that we do not use.
            let cached = theirs.header.flags.contains(RouteFlags::Cloned);
            let expected = family(theirs.header.address_family).filter(|_| !cached);
            let expected = expected.map(|family| route(family, &theirs));
            assert_eq!(internals::route(received), expected);
        }
        RouteNetlinkMessage::NewRule(theirs) => {
            let expected = family(theirs.header.family).map(|family| rule(family, &theirs));
            assert_eq!(internals::rule(received), expected);
        }
        other => panic!("{:?}", NetlinkPayload::InnerMessage(other)),
    }
}

fn family(family: AddressFamily) -> Option<Family> {
    match family {
        AddressFamily::Inet => Some(Family::V4),
        AddressFamily::Inet6 => Some(Family::V6),
        _ => None,
    }
}

fn link(theirs: &LinkMessage) -> Link {
    let flags = theirs.header.flags;
    let up = flags.contains(LinkFlags::Up);
    let mut link = Link {
        index: theirs.header.index,
        name: String::new(),
        kind: None,
        mtu: 0,
        master: None,
        up,
        running: up && flags.contains(LinkFlags::LowerUp),
        loopback: flags.contains(LinkFlags::Loopback),
        point_to_point: flags.contains(LinkFlags::Pointopoint),
        queue_length: 0,
        tunnel_port: None,
        reverse_path_filter: None,
        ipv6_disabled: None,
        tun: None,
    };
    for attribute in &theirs.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(index) => link.master = Some(*index),
            LinkAttribute::TxQueueLen(packets) => link.queue_length = *packets,
            LinkAttribute::LinkInfo(infos) => {
                infos.iter().for_each(|info| link_info(&mut link, info));
            }
            LinkAttribute::AfSpecUnspec(families) => {
                for settings in families {
                    match settings {
                        AfSpecUnspec::Inet(settings) => {
                            for setting in settings {
                                if let AfSpecInet::DevConf(values) = setting {
                                    link.reverse_path_filter = Some(values.rp_filter as u32);
                                }
                            }
                        }
                        AfSpecUnspec::Inet6(settings) => {
                            for setting in settings {
                                if let AfSpecInet6::DevConf(values) = setting {
                                    link.ipv6_disabled = Some(values.disable_ipv6 != 0);
                                }
                            }
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link
}

fn link_info(link: &mut Link, info: &LinkInfo) {
    match info {
        LinkInfo::Kind(kind) => {
            link.kind = Some(kind.to_string());
            link.tun =
                (link.kind.as_deref() == Some("tun")).then_some(TunInfo { owner: None, queues: 0 });
        }
        LinkInfo::Data(InfoData::Vxlan(data)) => {
            let port =
                |value: &_| if let InfoVxlan::Port(port) = value { Some(*port) } else { None };
            link.tunnel_port = data.iter().find_map(port);
        }
        LinkInfo::Data(InfoData::Geneve(data)) => {
            let port =
                |value: &_| if let InfoGeneve::Port(port) = value { Some(*port) } else { None };
            link.tunnel_port = data.iter().find_map(port);
        }
        // They have no types for the properties of a TUN link.
        LinkInfo::Data(InfoData::Tun(data)) => {
            let value = |kind| {
                data.iter().find_map(|value| match value {
                    InfoTun::Other(value) if value.kind() == kind => {
                        let mut bytes = [0; 4];
                        (value.value_len() == bytes.len()).then(|| {
                            value.emit_value(&mut bytes);
                            u32::from_ne_bytes(bytes)
                        })
                    }
                    _ => None,
                })
            };
            let queues = [8, 9].into_iter().filter_map(value).sum();
            link.tun = Some(TunInfo { owner: value(1), queues });
        }
        _ => {}
    }
}

fn address(theirs: &AddressMessage) -> Address {
    let (mut local, mut remote) = (None, None);
    let mut flags = u32::from(theirs.header.flags.bits());
    for attribute in &theirs.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => remote = Some(*address),
            AddressAttribute::Flags(all) => flags = all.bits(),
            _ => {}
        }
    }
    Address {
        index: theirs.header.index,
        prefix: IpNet::new(local.or(remote).unwrap(), theirs.header.prefix_len).unwrap(),
        flags: AddressFlags(flags),
        scope: theirs.header.scope.into(),
    }
}

fn route(family: Family, theirs: &RouteMessage) -> Route {
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => Some(IpAddr::from(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::from(*address)),
        _ => None,
    };
    let mut destination: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut route = Route::new(IpNet::new(destination, 0).unwrap());
    route.table = theirs.header.table.into();
    route.protocol = theirs.header.protocol.into();
    route.kind = match u8::from(theirs.header.kind) {
        libc::RTN_UNICAST => RouteKind::Unicast,
        libc::RTN_UNREACHABLE => RouteKind::Unreachable,
        libc::RTN_BLACKHOLE => RouteKind::Blackhole,
        libc::RTN_THROW => RouteKind::Throw,
        other => RouteKind::Other(other),
    };
    for attribute in &theirs.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address).unwrap(),
            RouteAttribute::Oif(index) => route.link = Some(*index),
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Metrics(metrics) => {
                let mtu =
                    |metric: &_| if let RouteMetric::Mtu(mtu) = metric { Some(*mtu) } else { None };
                route.mtu = metrics.iter().find_map(mtu);
            }
            RouteAttribute::MultiPath(hops) => {
                let hops = hops.iter().map(|hop| NextHop {
                    link: hop.interface_index,
                    gateway: hop.attributes.iter().find_map(|attribute| match attribute {
                        RouteAttribute::Gateway(address) => ip(address),
                        _ => None,
                    }),
                });
                route.next_hops = hops.collect();
            }
            _ => {}
        }
    }
    let length = theirs.header.destination_prefix_length;
    route.destination = IpNet::new(destination, length).unwrap();
    route
}

fn rule(family: Family, theirs: &RuleMessage) -> Rule {
    let action = u8::from(theirs.header.action);
    let mut rule = Rule::new(family, 0, RuleAction::Other(action));
    rule.invert = theirs.header.flags.contains(RuleFlags::Invert);
    rule.made_by = libc::RTPROT_UNSPEC;
    let mut table = u32::from(theirs.header.table);
    let (mut mark, mut mask, mut target) = (None, None, 0);
    for attribute in &theirs.attributes {
        match attribute {
            RuleAttribute::Destination(address) => {
                rule.destination = IpNet::new(*address, theirs.header.dst_len).ok();
            }
            RuleAttribute::Source(address) => {
                rule.source = IpNet::new(*address, theirs.header.src_len).ok();
            }
            RuleAttribute::Iifname(name) => rule.input = Some(name.clone()),
            RuleAttribute::Oifname(name) => rule.output = Some(name.clone()),
            RuleAttribute::Goto(priority) => target = *priority,
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = Some(*value),
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::SuppressPrefixLen(length) => {
                rule.suppress_prefix_length = Some(*length).filter(|length| *length != u32::MAX);
            }
            RuleAttribute::UidRange(users) => rule.users = Some(users.start..=users.end),
            RuleAttribute::Protocol(protocol) => rule.made_by = (*protocol).into(),
            RuleAttribute::IpProtocol(protocol) => rule.protocol = Some(i32::from(*protocol) as u8),
            RuleAttribute::SourcePortRange(ports) => {
                rule.source_ports = Some(ports.start..=ports.end);
            }
            RuleAttribute::DestinationPortRange(ports) => {
                rule.destination_ports = Some(ports.start..=ports.end);
            }
            _ => {}
        }
    }
    rule.mark = match (mark, mask) {
        (None, None | Some(0)) => None,
        (mark, mask) => Some((mark.unwrap_or(0), mask.unwrap_or(u32::MAX))),
    };
    rule.action = match action {
        1 => RuleAction::Table(table),
        2 => RuleAction::Goto(target),
        3 => RuleAction::Nop,
        7 => RuleAction::Unreachable,
        other => RuleAction::Other(other),
    };
    rule
}
