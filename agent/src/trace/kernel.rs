//! Asks the kernel which rule, table and link a packet takes, and which chains of other programs drop it.
//! It changes nothing.

use std::net::IpAddr;

use ipnet::IpNet;
use towline_host::{OURS, TrialConnection, has_firewall_guard};
use towline_netlink::{
    Family, NetlinkError, Route, RouteKind, RouteLookup, Rtnetlink, Rule, RuleAction,
};
use towline_proto::code::Coded as _;

use super::destination::Target;
use crate::config::Config;

/// TCP port that is tried if the destination names none: that of the kubelet.
const DEFAULT_PORT: u16 = 10_250;
/// Name of the input link of local packets, as policy rules match it.
const LOOPBACK: &str = "lo";

/// Answers of the kernel about one destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelView {
    /// Name of Towline's link.
    pub link: String,
    /// Route of the packet; `None` if none lets it pass.
    pub route: Option<RouteSeen>,
    /// Longest route of Towline's own table that covers the destination, whether it is used or not.
    pub own_route: Option<(IpNet, OwnRoute)>,
    /// Whether Towline's nftables table drops packets to the destination outside the tunnel; `None` if the table
    /// cannot be read.
    pub firewall_guard: Option<bool>,
    /// TCP port that was tried in the chains.
    pub tried_port: u16,
    /// Chains of other programs that drop a connection, or why they were not read.
    pub chains: Result<Vec<DroppingChain>, String>,
}

/// Route that the kernel uses for a packet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RouteSeen {
    /// Number of the routing table.
    pub table: u32,
    /// Priority of the first policy rule that leads a packet of this host to the table.
    pub rule: Option<u32>,
    /// Name of the output link.
    pub link: Option<String>,
    /// Address of the next hop.
    pub gateway: Option<IpAddr>,
    /// Source address that the kernel chooses.
    pub source: Option<IpAddr>,
    /// True if the destination is an address of this host.
    pub is_local: bool,
}

/// Kind of a route of Towline's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnRoute {
    /// The route leads into the tunnel.
    Tunnel,
    /// The route refuses the packet.
    Guard,
    /// The host's own routes decide.
    Host,
}

/// Chain of another program that drops a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DroppingChain {
    /// True if it drops connections from the mesh to this host; else those of this host to the mesh.
    pub is_incoming: bool,
    /// Code of the problem.
    pub code: &'static str,
    /// Name of the chain and its table.
    pub place: String,
    /// Command that lets the connection pass, in backticks.
    pub command: String,
}

/// Asks the kernel about a destination.
///
/// # Errors
///
/// If a netlink request fails. Chains that cannot be read are no error: this needs root.
pub fn read(config: &Config, target: &Target) -> Result<KernelView, NetlinkError> {
    let mut rtnetlink = Rtnetlink::open()?;
    let address = target.address;
    let family = Family::of(address);
    let tried_port = target.port.unwrap_or(DEFAULT_PORT);
    let lookup = RouteLookup {
        transport: Some((libc::IPPROTO_TCP as u8, 0, tried_port)),
        ..RouteLookup::new(address)
    };
    let links = rtnetlink.links()?;
    let name_of = |index: u32| links.iter().find(|link| link.index == index);
    let route = rtnetlink.look_up_route(&lookup)?;
    let rules = if route.is_some() { rtnetlink.rules(family)? } else { Vec::new() };
    let route = route.map(|route| RouteSeen {
        table: route.table,
        rule: rule_to(&rules, &route, address),
        link: route.link.and_then(name_of).map(|link| link.name.clone()),
        gateway: route.gateway,
        source: route.source,
        is_local: route.kind == RouteKind::Other(libc::RTN_LOCAL),
    });
    let own_routes = rtnetlink.routes(family, Some(config.routing.table))?;
    let link = links.iter().find(|link| link.name == config.link.name);
    let source = route.as_ref().and_then(|route| route.source);
    let chains = match (link, source) {
        (Some(link), Some(own)) => chains(&TrialConnection {
            link: (link.name.clone(), link.index),
            table: config.routing.nftables_table.clone(),
            own,
            peer: address,
            port: tried_port,
        }),
        _ => Ok(Vec::new()),
    };
    Ok(KernelView {
        link: config.link.name.clone(),
        route,
        own_route: own_route(&own_routes, address),
        firewall_guard: has_firewall_guard(&config.routing.nftables_table, address).ok(),
        tried_port,
        chains,
    })
}

/// Returns the priority of the first rule that leads a packet of this host to the table of its route.
fn rule_to(rules: &[Rule], route: &Route, destination: IpAddr) -> Option<u32> {
    let covers = |net: &Option<IpNet>, address: Option<IpAddr>| match (net, address) {
        (None, _) => true,
        (Some(net), Some(address)) => net.contains(&address),
        (Some(_), None) => false,
    };
    let leads = |rule: &&Rule| {
        rule.action == RuleAction::Table(route.table)
            && !rule.invert
            && rule.mark.is_none_or(|(mark, _)| mark == 0)
            && rule.input.as_deref().is_none_or(|input| input == LOOPBACK)
            && rule.output.is_none()
            && rule.source_ports.is_none()
            && rule.destination_ports.is_none()
            && rule.users.as_ref().is_none_or(|users| users.contains(&0))
            && covers(&rule.source, route.source)
            && covers(&rule.destination, Some(destination))
    };
    rules.iter().filter(leads).map(|rule| rule.priority).min()
}

/// Returns the longest route of Towline that covers an address.
fn own_route(routes: &[Route], address: IpAddr) -> Option<(IpNet, OwnRoute)> {
    let ours = routes
        .iter()
        .filter(|route| route.protocol == OURS && route.destination.contains(&address));
    // The route with the lowest metric is used: the unreachable one is behind that into the tunnel.
    let found =
        ours.min_by_key(|route| (std::cmp::Reverse(route.destination.prefix_len()), route.metric))?;
    let kind = match found.kind {
        RouteKind::Unicast => OwnRoute::Tunnel,
        RouteKind::Throw => OwnRoute::Host,
        RouteKind::Unreachable | RouteKind::Blackhole | RouteKind::Other(_) => OwnRoute::Guard,
    };
    Some((found.destination, kind))
}

fn chains(trial: &TrialConnection) -> Result<Vec<DroppingChain>, String> {
    let found = trial.run().map_err(|error| format!("cannot read the firewalls: {error}"))?;
    let chain = |obstacle: towline_host::Obstacle| DroppingChain {
        is_incoming: obstacle.is_incoming(),
        code: obstacle.code(),
        place: obstacle.place(),
        command: obstacle.command(),
    };
    Ok(found.into_iter().map(chain).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(net: &str, kind: RouteKind, metric: u32) -> Route {
        Route { protocol: OURS, ..Route::new(net.parse().unwrap()).kind(kind).metric(metric) }
    }

    #[test]
    fn the_longest_own_route_with_the_lowest_metric_counts() {
        let routes = [
            route("10.0.0.0/8", RouteKind::Unreachable, 20),
            route("10.1.0.0/16", RouteKind::Unicast, 10),
            route("10.1.0.0/16", RouteKind::Unreachable, 20),
            route("10.2.0.0/16", RouteKind::Throw, 10),
            Route::new("10.3.0.0/16".parse().unwrap()),
        ];
        for (address, expected) in [
            ("10.1.0.1", Some(OwnRoute::Tunnel)),
            ("10.2.0.1", Some(OwnRoute::Host)),
            ("10.3.0.1", Some(OwnRoute::Guard)),
            ("192.0.2.1", None),
        ] {
            let found = own_route(&routes, address.parse().unwrap());
            assert_eq!(found.map(|(_, kind)| kind), expected, "{address}");
        }
    }

    #[test]
    fn the_rule_is_one_that_a_packet_of_this_host_matches() {
        let to = |priority, table| Rule::new(Family::V4, priority, RuleAction::Table(table));
        let rules = [
            Rule { mark: Some((1, 1)), ..to(10, 7) },
            Rule { input: Some("eth0".to_owned()), ..to(20, 7) },
            Rule { destination: Some("192.0.2.0/24".parse().unwrap()), ..to(30, 7) },
            to(40, 7),
            to(50, 254),
        ];
        let route = Route::new("10.0.0.0/8".parse().unwrap()).table(7);
        assert_eq!(rule_to(&rules, &route, "10.0.0.1".parse().unwrap()), Some(40));
        assert_eq!(rule_to(&rules, &route.table(8), "10.0.0.1".parse().unwrap()), None);
    }
}
