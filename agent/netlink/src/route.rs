//! Reads, sets and deletes routes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;

use super::codec::{Message, Received, attributes};
use super::{CREATE, CREATE_OR_REPLACE, Failure, Family, NetlinkError, Rtnetlink};

/// Route of a routing table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination network; host bits are zero.
    pub destination: IpNet,
    /// Number of the routing table; 254 is the main table.
    pub table: u32,
    /// Kind, which determines what happens to a packet.
    pub kind: RouteKind,
    /// Index of the output link.
    pub link: Option<u32>,
    /// Address of the next hop.
    pub gateway: Option<IpAddr>,
    /// Metric. The lowest metric wins. For IPv6 the kernel replaces 0 by 1,024.
    pub metric: u32,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// MTU in bytes.
    pub mtu: Option<u32>,
    /// Protocol number (`RTPROT_*`) of the program that created the route.
    pub protocol: u8,
    /// Next hops of a multipath route, as read from the kernel. Empty for a route with one next hop.
    pub next_hops: Vec<NextHop>,
}

/// One of several next hops of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextHop {
    /// Index of the output link.
    pub link: u32,
    /// Address of the next hop; `None` if the destination is on the link itself.
    pub gateway: Option<IpAddr>,
}

/// Kind of a route, which determines what happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteKind {
    /// The packet is forwarded to the next hop.
    Unicast,
    /// The packet is dropped, and the sender gets an ICMP error.
    Unreachable,
    /// The packet is dropped silently.
    Blackhole,
    /// The lookup leaves this table, and the next policy rule is evaluated.
    Throw,
    /// Another kind (`RTN_*`), as read from the kernel.
    Other(u8),
}

/// Change of one route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteChange {
    /// Adds the route, or replaces the one to the same destination with the same metric.
    Set(Route),
    /// Deletes the route.
    Delete(Route),
}

/// Packet of a local socket whose route is looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteLookup {
    /// Destination address.
    pub destination: IpAddr,
    /// Source address that the socket is bound to; `None` if the kernel chooses it.
    pub source: Option<IpAddr>,
    /// Transport protocol (`IPPROTO_*`) with the source and the destination port. A port of 0 is not
    /// known.
    pub transport: Option<(u8, u16, u16)>,
    /// Mark of the packet.
    pub mark: u32,
    /// User id of the socket.
    pub user: u32,
}

impl RouteLookup {
    /// Creates a lookup for a packet without ports or mark, of a socket of root.
    pub fn new(destination: IpAddr) -> Self {
        Self { destination, source: None, transport: None, mark: 0, user: 0 }
    }
}

/// Number of the main routing table.
pub const MAIN_TABLE: u32 = libc::RT_TABLE_MAIN as u32;
/// Greatest number of routes of a main table that are kept. A container network adds a route for each pod
/// and each node, so that a host of a cluster has some thousands at most. A table of the internet's routes
/// has a million.
const ROUTES: usize = 8_192;

/// Reader of the main tables. A table with more than 8,192 routes is filled by a routing daemon. It is read
/// whole only once, because links and routes change often.
#[derive(Debug, Default)]
pub struct MainTables {
    /// Families whose table was too large.
    large: BTreeSet<Family>,
}

impl MainTables {
    /// Returns the routes of a family, or of a large table only those with one of these protocols
    /// (`RTPROT_*`). Protocols with too many routes themselves are left out.
    pub fn read(
        &mut self,
        rtnetlink: &mut Rtnetlink,
        family: Family,
        protocols: &[u8],
    ) -> Result<Vec<Route>, NetlinkError> {
        if !self.is_large(family) {
            match rtnetlink.routes_at_most(family, MAIN_TABLE, None, ROUTES)? {
                Some(routes) => return Ok(routes),
                None => self.large.insert(family),
            };
        }
        let mut found = Vec::new();
        for protocol in protocols {
            let routes = rtnetlink.routes_at_most(family, MAIN_TABLE, Some(*protocol), ROUTES)?;
            found.extend(routes.unwrap_or_default());
        }
        Ok(found)
    }

    /// Returns true if the table of a family was too large when it was read.
    pub fn is_large(&self, family: Family) -> bool {
        self.large.contains(&family)
    }
}

impl Route {
    /// Creates a unicast route in the main table.
    pub fn new(destination: IpNet) -> Self {
        Self {
            destination: destination.trunc(),
            table: MAIN_TABLE,
            kind: RouteKind::Unicast,
            link: None,
            gateway: None,
            metric: 0,
            source: None,
            mtu: None,
            protocol: libc::RTPROT_STATIC,
            next_hops: Vec::new(),
        }
    }

    /// Returns every next hop: its own if it has a link, and those of a multipath route.
    pub fn hops(&self) -> impl Iterator<Item = NextHop> {
        let own = self.link.map(|link| NextHop { link, gateway: self.gateway });
        own.into_iter().chain(self.next_hops.iter().copied())
    }

    /// Sets the next hop.
    pub fn via(mut self, gateway: IpAddr) -> Self {
        self.gateway = Some(gateway);
        self
    }

    /// Sets the output link.
    pub fn dev(mut self, index: u32) -> Self {
        self.link = Some(index);
        self
    }

    /// Sets the routing table.
    pub fn table(mut self, table: u32) -> Self {
        self.table = table;
        self
    }

    /// Sets the kind of the route.
    pub fn kind(mut self, kind: RouteKind) -> Self {
        self.kind = kind;
        self
    }

    /// Sets the metric.
    pub fn metric(mut self, metric: u32) -> Self {
        self.metric = metric;
        self
    }

    /// Sets the preferred source address, which must be an address of the host.
    pub fn source(mut self, source: IpAddr) -> Self {
        self.source = Some(source);
        self
    }

    /// Sets the MTU in bytes.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = Some(mtu);
        self
    }
}

const RTA_MULTIPATH: u16 = 9;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
const RTA_MARK: u16 = 16;
const RTA_UID: u16 = 25;
const RTA_IP_PROTO: u16 = 27;
const RTA_SPORT: u16 = 28;
const RTA_DPORT: u16 = 29;
const RTAX_MTU: u16 = 2;
/// Flag of a route that the kernel composed for one destination.
const RTM_F_CLONED: u32 = 0x200;
/// Flag of a lookup: the answer names the routing table that was used, not always the local or main one.
const RTM_F_LOOKUP_TABLE: u32 = 0x1000;
/// Length in bytes of `struct rtmsg`.
pub(super) const ROUTE_HEADER: usize = 12;

impl Rtnetlink {
    /// Adds a route, which must not exist yet.
    pub fn add_route(&mut self, route: &Route) -> Result<(), NetlinkError> {
        let request = message(libc::RTM_NEWROUTE, CREATE, route);
        self.connection.request(|| format!("add the route to {}", route.destination), request)
    }

    /// Adds a route, or replaces the one to the same destination with the same metric.
    pub fn replace_route(&mut self, route: &Route) -> Result<(), NetlinkError> {
        let request = message(libc::RTM_NEWROUTE, CREATE_OR_REPLACE, route);
        self.connection.request(|| format!("set the route to {}", route.destination), request)
    }

    /// Deletes a route by its key.
    pub fn delete_route(&mut self, route: &Route) -> Result<(), NetlinkError> {
        let request = message(libc::RTM_DELROUTE, 0, route);
        self.connection.request(|| format!("delete the route to {}", route.destination), request)
    }

    /// Applies many changes in order, with few system calls. A failed change does not stop the others.
    /// Each failure has its index in `changes`.
    pub fn change_routes(&mut self, changes: &[RouteChange]) -> Result<Vec<Failure>, NetlinkError> {
        let messages = changes.iter().map(|change| match change {
            RouteChange::Set(route) => message(libc::RTM_NEWROUTE, CREATE_OR_REPLACE, route),
            RouteChange::Delete(route) => message(libc::RTM_DELROUTE, 0, route),
        });
        self.connection.request_all(messages.collect())
    }

    /// Returns the route that the kernel uses for a packet: its table, output link, next hop and source
    /// address. The destination is the packet's. Returns `None` if there is no route, or if the route
    /// refuses the packet (unreachable, blackhole or prohibit).
    pub fn look_up_route(&mut self, lookup: &RouteLookup) -> Result<Option<Route>, NetlinkError> {
        let what = || format!("look up the route to {}", lookup.destination);
        match self.connection.get(what, lookup_message(lookup), |received| read(&received)) {
            Err(error) if is_refusing(&error) => Ok(None),
            other => other,
        }
    }

    /// Returns the routes of a family in one table, or in all tables for `None`. Returns no routes for a
    /// family that the kernel lacks: such a kernel answers with the routes of its other families, which
    /// are left out.
    pub fn routes(
        &mut self,
        family: Family,
        table: Option<u32>,
    ) -> Result<Vec<Route>, NetlinkError> {
        let found = self.dump_routes(family, table, libc::RTPROT_UNSPEC, usize::MAX)?;
        Ok(found.unwrap_or_default())
    }

    /// Returns the routes of a family in one table, and `None` if there are more than `most`: these are
    /// read, but not kept. With a protocol (`RTPROT_*`), the kernel sends only the routes with this one.
    fn routes_at_most(
        &mut self,
        family: Family,
        table: u32,
        protocol: Option<u8>,
        most: usize,
    ) -> Result<Option<Vec<Route>>, NetlinkError> {
        self.dump_routes(family, Some(table), protocol.unwrap_or(libc::RTPROT_UNSPEC), most)
    }

    fn dump_routes(
        &mut self,
        family: Family,
        table: Option<u32>,
        protocol: u8,
        most: usize,
    ) -> Result<Option<Vec<Route>>, NetlinkError> {
        let mut header = [0; ROUTE_HEADER];
        header[0] = family.number();
        header[5] = protocol;
        let mut request = Message::new(libc::RTM_GETROUTE, 0, &header);
        if let Some(table) = table {
            request.u32(RTA_TABLE, table);
        }
        let found = self.connection.dump_at_most("list routes", &request, most, |received| {
            parse(&received)
                .filter(|route| Family::of(route.destination.addr()) == family)
                .filter(|route| table.is_none_or(|table| table == route.table))
                .filter(|route| [libc::RTPROT_UNSPEC, route.protocol].contains(&protocol))
        });
        match found {
            // The kernel has no table that was never used.
            Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(Some(Vec::new())),
            other => other,
        }
    }

    /// Returns the route that the kernel chooses for a packet of this host to an address, as it is in its
    /// table. `None` if the address cannot be reached.
    pub fn route_to(&mut self, destination: IpAddr) -> Result<Option<Route>, NetlinkError> {
        const RTM_F_FIB_MATCH: u32 = 0x2000;
        let mut header = [0; ROUTE_HEADER];
        header[0] = Family::of(destination).number();
        header[1] = IpNet::from(destination).prefix_len();
        // For IPv6 the kernel always names the table, and refuses to be asked for it.
        let flags = match destination {
            IpAddr::V4(_) => RTM_F_LOOKUP_TABLE | RTM_F_FIB_MATCH,
            IpAddr::V6(_) => RTM_F_FIB_MATCH,
        };
        header[8..12].copy_from_slice(&flags.to_ne_bytes());
        let mut request = Message::new(libc::RTM_GETROUTE, 0, &header);
        request.ip(RTA_DST, destination);
        let what = || format!("look up the route to {destination}");
        match self.connection.get(what, request, |received| parse(&received)) {
            Err(NetlinkError::Refused { .. }) => Ok(None),
            other => other,
        }
    }
}

/// Builds a request about a route.
pub fn message(kind: u16, flags: u16, route: &Route) -> Message {
    let mut header = [0; ROUTE_HEADER];
    header[0] = Family::of(route.destination.addr()).number();
    header[1] = route.destination.prefix_len();
    header[4] = libc::RT_TABLE_UNSPEC;
    header[5] = route.protocol;
    header[6] = match (route.kind, route.gateway) {
        _ if kind == libc::RTM_DELROUTE => libc::RT_SCOPE_NOWHERE,
        (RouteKind::Unicast, None) => libc::RT_SCOPE_LINK,
        _ => libc::RT_SCOPE_UNIVERSE,
    };
    header[7] = route.kind.number();
    let mut message = Message::new(kind, flags, &header);
    message.ip(RTA_DST, route.destination.network()).u32(RTA_TABLE, route.table);
    if let Some(link) = route.link {
        message.u32(RTA_OIF, link);
    }
    if let Some(gateway) = route.gateway {
        message.ip(RTA_GATEWAY, gateway);
    }
    if route.metric != 0 {
        message.u32(RTA_PRIORITY, route.metric);
    }
    // The key of a route identifies the one to delete: destination, table, metric, kind, next hop.
    if kind != libc::RTM_DELROUTE {
        if let Some(source) = route.source {
            message.ip(RTA_PREFSRC, source);
        }
        if let Some(mtu) = route.mtu {
            message.nest(RTA_METRICS, |metrics| {
                metrics.u32(RTAX_MTU, mtu);
            });
        }
    }
    message
}

/// Builds the request for the route of one packet.
fn lookup_message(lookup: &RouteLookup) -> Message {
    let bits = |address: IpAddr| if address.is_ipv4() { 32 } else { 128 };
    let mut header = [0; ROUTE_HEADER];
    header[0] = Family::of(lookup.destination).number();
    header[1] = bits(lookup.destination);
    header[2] = lookup.source.map_or(0, bits);
    // IPv6 knows no such flag, and always names the table.
    if lookup.destination.is_ipv4() {
        let (_, flags) = header.split_at_mut(8);
        flags.copy_from_slice(&RTM_F_LOOKUP_TABLE.to_ne_bytes());
    }
    let mut message = Message::new(libc::RTM_GETROUTE, 0, &header);
    message.ip(RTA_DST, lookup.destination).u32(RTA_UID, lookup.user);
    if let Some(source) = lookup.source {
        message.ip(RTA_SRC, source);
    }
    if lookup.mark != 0 {
        message.u32(RTA_MARK, lookup.mark);
    }
    if let Some((protocol, source_port, destination_port)) = lookup.transport {
        message.u8(RTA_IP_PROTO, protocol);
        for (kind, port) in [(RTA_SPORT, source_port), (RTA_DPORT, destination_port)] {
            if port != 0 {
                message.bytes(kind, &port.to_be_bytes());
            }
        }
    }
    message
}

/// Returns true for the errors of a lookup that found no route, or a route that refuses the packet. A
/// blackhole gives the error of an invalid request, but without the kernel's message.
fn is_refusing(error: &NetlinkError) -> bool {
    let NetlinkError::Refused { refusal, .. } = error else { return false };
    match refusal.errno {
        Errno::EINVAL => refusal.text.is_none(),
        errno => matches!(errno, Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EACCES),
    }
}

/// Parses a message of a dump. Returns `None` unless it describes a route.
pub fn parse(received: &Received<'_>) -> Option<Route> {
    let is_cloned = super::codec::u32_at(received.payload, 8)? & RTM_F_CLONED != 0;
    if is_cloned { None } else { read(received) }
}

/// Parses a message that describes a route, also one that was composed for one destination.
fn read(received: &Received<'_>) -> Option<Route> {
    if received.kind != libc::RTM_NEWROUTE {
        return None;
    }
    let [family, length, _, _, table, protocol, _, kind] = *received.payload.first_chunk::<8>()?;
    let unspecified: IpAddr = match Family::from_number(family)? {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut destination = unspecified;
    let mut route = Route {
        destination: IpNet::new(unspecified, 0).ok()?,
        table: u32::from(table),
        kind: RouteKind::from_number(kind),
        link: None,
        gateway: None,
        metric: 0,
        source: None,
        mtu: None,
        protocol,
        next_hops: Vec::new(),
    };
    for attribute in attributes(received.payload, ROUTE_HEADER) {
        match attribute.kind {
            RTA_DST => destination = attribute.ip()?,
            RTA_OIF => route.link = attribute.u32(),
            RTA_GATEWAY => route.gateway = attribute.ip(),
            RTA_PRIORITY => route.metric = attribute.u32()?,
            RTA_PREFSRC => route.source = attribute.ip(),
            RTA_TABLE => route.table = attribute.u32()?,
            RTA_MULTIPATH => route.next_hops = next_hops(attribute.value),
            RTA_METRICS => {
                let mtu = attribute.nested().find(|metric| metric.kind == RTAX_MTU);
                route.mtu = mtu.and_then(|metric| metric.u32());
            }
            _ => {}
        }
    }
    route.destination = IpNet::new(destination, length).ok()?;
    Some(route)
}

/// Parses the next hops of a multipath route: each is a `struct rtnexthop` (length, flags, hops, and
/// the index of the link), followed by attributes.
fn next_hops(mut rest: &[u8]) -> Vec<NextHop> {
    const HEADER: usize = 8;
    let mut hops = Vec::new();
    while let Some(length) = rest.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes)) {
        let length = usize::from(length);
        let Some(hop) = rest.get(..length).filter(|hop| hop.len() >= HEADER) else { break };
        let gateway = attributes(hop, HEADER).find(|attribute| attribute.kind == RTA_GATEWAY);
        if let Some(link) = super::codec::u32_at(hop, 4) {
            hops.push(NextHop { link, gateway: gateway.and_then(|gateway| gateway.ip()) });
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

impl RouteKind {
    fn number(self) -> u8 {
        match self {
            Self::Unicast => libc::RTN_UNICAST,
            Self::Unreachable => libc::RTN_UNREACHABLE,
            Self::Blackhole => libc::RTN_BLACKHOLE,
            Self::Throw => libc::RTN_THROW,
            Self::Other(number) => number,
        }
    }

    fn from_number(number: u8) -> Self {
        match number {
            libc::RTN_UNICAST => Self::Unicast,
            libc::RTN_UNREACHABLE => Self::Unreachable,
            libc::RTN_BLACKHOLE => Self::Blackhole,
            libc::RTN_THROW => Self::Throw,
            other => Self::Other(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AddressOptions, Rule, RuleAction};
    use towline_netns::{add_link, namespace_test};

    fn link_with_addresses(rtnetlink: &mut Rtnetlink) -> u32 {
        let index = add_link("d0");
        let options = AddressOptions { no_dad: true, no_prefix_route: false };
        rtnetlink.add_address(index, "192.0.2.1/24".parse().unwrap(), options).unwrap();
        rtnetlink.add_address(index, "2001:db8::1/64".parse().unwrap(), options).unwrap();
        index
    }

    namespace_test! {
        fn routes_are_read_back_as_they_were_written() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            let index = link_with_addresses(&mut rtnetlink);
            let written = [
                Route::new("10.1.0.0/16".parse().unwrap())
                    .via("192.0.2.254".parse().unwrap())
                    .dev(index)
                    .metric(10),
                Route::new("10.2.0.0/16".parse().unwrap())
                    .dev(index)
                    .table(21_580)
                    .metric(10)
                    .source("192.0.2.1".parse().unwrap())
                    .mtu(1_380),
                Route::new("10.2.0.0/16".parse().unwrap())
                    .table(21_580)
                    .metric(20)
                    .kind(RouteKind::Unreachable),
                Route::new("fd01::/64".parse().unwrap())
                    .dev(index)
                    .table(21_580)
                    .metric(10)
                    .source("2001:db8::1".parse().unwrap())
                    .mtu(1_380),
                Route::new("0.0.0.0/0".parse().unwrap())
                    .via("192.0.2.254".parse().unwrap())
                    .dev(index),
            ];
            for route in &written {
                rtnetlink.add_route(route).unwrap();
                rtnetlink.replace_route(route).unwrap();
            }
            for route in &written {
                let family = Family::of(route.destination.addr());
                let listed = rtnetlink.routes(family, Some(route.table)).unwrap();
                assert!(listed.contains(route), "{route:?} is not in {listed:?}");
            }
            assert_eq!(rtnetlink.routes(Family::V4, Some(21_580)).unwrap().len(), 2);
            for route in &written {
                rtnetlink.delete_route(route).unwrap();
                let error = rtnetlink.delete_route(route).unwrap_err();
                assert_eq!(error.errno(), Some(Errno::ESRCH));
            }
        }
    }

    namespace_test! {
        fn many_routes_travel_in_few_calls_and_failures_are_named() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            let index = link_with_addresses(&mut rtnetlink);
            let mut routes: Vec<_> = (0..2_000u32)
                .map(|n| {
                    let address = std::net::Ipv4Addr::from(0x0a00_0000 + n * 256);
                    Route::new(IpNet::new(address.into(), 24).unwrap()).dev(index).table(21_580)
                })
                .collect();
            let bad = Route::new("10.99.0.0/16".parse().unwrap()).dev(9_999).table(21_580);
            routes.insert(700, bad);
            let set: Vec<_> = routes.iter().cloned().map(RouteChange::Set).collect();
            let failures = rtnetlink.change_routes(&set).unwrap();
            assert_eq!(failures.len(), 1);
            assert_eq!((failures[0].0, failures[0].1.errno), (700, Errno::ENODEV));
            assert_eq!(rtnetlink.routes(Family::V4, Some(21_580)).unwrap().len(), 2_000);
            routes.remove(700);
            let delete: Vec<_> = routes.into_iter().map(RouteChange::Delete).collect();
            assert_eq!(rtnetlink.change_routes(&delete).unwrap(), []);
            assert_eq!(rtnetlink.routes(Family::V4, Some(21_580)).unwrap(), []);
        }
    }

    namespace_test! {
        fn routes_are_selected_by_protocol_and_by_destination() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            let link = link_with_addresses(&mut rtnetlink);
            const BGP: u8 = 186;
            for (any, gateway, there) in [
                ("0.0.0.0/0", "192.0.2.254", "240.0.0.1"),
                ("::/0", "2001:db8::fe", "3fff::1"),
            ] {
                let (any, there): (IpNet, IpAddr) = (any.parse().unwrap(), there.parse().unwrap());
                let family = Family::of(there);
                assert_eq!(rtnetlink.route_to(there).unwrap(), None);
                let learned = Route {
                    protocol: BGP,
                    ..Route::new(any).via(gateway.parse().unwrap()).dev(link).metric(20)
                };
                rtnetlink.add_route(&learned).unwrap();
                assert_eq!(rtnetlink.route_to(there).unwrap(), Some(learned.clone()));
                let mut read = |protocol, most| {
                    rtnetlink.routes_at_most(family, MAIN_TABLE, protocol, most).unwrap()
                };
                assert_eq!(read(Some(BGP), 1), Some(vec![learned.clone()]));
                assert_eq!(read(Some(libc::RTPROT_STATIC), 1), Some(Vec::new()));
                assert_eq!(read(Some(BGP), 0), None);
                assert!(read(None, 9).unwrap().contains(&learned));
            }
        }
    }

    namespace_test! {
        fn the_route_of_a_packet_is_that_of_the_rules_and_tables() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            let index = link_with_addresses(&mut rtnetlink);
            let find = |rtnetlink: &mut Rtnetlink, to: &str| {
                rtnetlink.look_up_route(&RouteLookup::new(to.parse().unwrap())).unwrap()
            };
            assert_eq!(find(&mut rtnetlink, "10.2.0.9"), None);
            for (family, net) in [(Family::V4, "10.2.0.0/16"), (Family::V6, "fd01::/64")] {
                let net: IpNet = net.parse().unwrap();
                rtnetlink.add_route(&Route::new(net).dev(index).table(21_580).metric(10)).unwrap();
                let rule = Rule::new(family, 21_580, RuleAction::Table(21_580));
                rtnetlink.add_rule(&rule).unwrap();
            }
            for (to, source) in [("10.2.0.9", "192.0.2.1"), ("fd01::9", "2001:db8::1")] {
                let route = find(&mut rtnetlink, to).unwrap();
                assert_eq!((route.table, route.link), (21_580, Some(index)), "{route:?}");
                assert_eq!(route.source, Some(source.parse().unwrap()), "{route:?}");
            }
            let refused = Route::new("10.2.0.0/24".parse().unwrap())
                .table(21_580)
                .kind(RouteKind::Unreachable);
            rtnetlink.add_route(&refused).unwrap();
            assert_eq!(find(&mut rtnetlink, "10.2.0.9"), None);
            assert!(find(&mut rtnetlink, "10.2.1.9").is_some());
            let lookup = RouteLookup {
                source: Some("192.0.2.1".parse().unwrap()),
                transport: Some((libc::IPPROTO_TCP as u8, 0, 443)),
                mark: 7,
                ..RouteLookup::new("10.2.1.9".parse().unwrap())
            };
            assert!(rtnetlink.look_up_route(&lookup).unwrap().is_some());
        }
    }

    namespace_test! {
        fn a_table_that_nobody_used_is_empty() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            for family in Family::ALL {
                assert_eq!(rtnetlink.routes(family, Some(4_711)).unwrap(), []);
            }
        }
    }
}
