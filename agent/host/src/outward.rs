//! Orders the host's addresses by the routing table: which of them outer datagrams may leave from,
//! and which are published as candidates.
//!
//! The kernel sends a packet by the default route with the lowest metric, with the source that the
//! route prefers. What it would do comes first here, so that a host with many links or addresses is
//! reached as its routes say, although the number of paths and candidates is limited. Links that have
//! lost their carrier come last.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use towline_core::path;
use towline_core::plan::TransitPlan;
use towline_core::prefixes::is_private;
use towline_netlink::{
    Family, MAIN_TABLE, MainTables, NetlinkError, NextHop, Route, RouteKind, Rtnetlink,
};

use super::address::LocalAddress;
use super::candidates::{CandidatePolicy, candidates, is_lan, is_usable_elsewhere, leads_outside};

/// Greatest number of addresses that outer datagrams may leave from.
const ADDRESSES: usize = 64;
/// Protocol numbers (`RTPROT_*`) of the routes that the host's own configuration adds: those of the kernel,
/// of programs without a number of their own, static ones, of router advertisements, and of DHCP.
const CONFIGURED: [u8; 5] = [libc::RTPROT_KERNEL, libc::RTPROT_BOOT, libc::RTPROT_STATIC, 9, 16];

/// Addresses of the host that lead outside, in order of preference.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OutwardAddresses {
    /// Addresses that outer datagrams may leave from, each with the link that they leave by. The first
    /// address of each link is the one to begin with; the others only answer what arrives at them.
    pub uplinks: Vec<path::LocalAddress>,
    /// Addresses to publish: public ones first, and one of each link before a second one of a link.
    pub candidates: Vec<IpAddr>,
}

/// How this host is connected to other networks, as of one read of its links, addresses and routes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Connectivity {
    /// Addresses that lead outside.
    pub outward: OutwardAddresses,
    /// Addresses that can serve as node IPs, those on the links of default routes first, by metric.
    pub node_ips: Vec<IpAddr>,
    /// Networks of all links that are connected now, except Towline's own link.
    pub networks: BTreeSet<IpNet>,
    /// Networks of other machines on the host's links, and the links by which packets leave for the
    /// internet.
    pub transit: TransitPlan,
    /// UDP ports on which the host decapsulates VXLAN or Geneve, each once.
    pub tunnel_ports: Vec<u16>,
}

/// Routes of the main table by which packets leave the host.
#[derive(Debug, Clone, Default)]
pub(super) struct WaysOut {
    /// Lowest metric of the default routes of each family and link.
    defaults: BTreeMap<(Family, u32), u32>,
    /// Gateways of the default routes, with their links.
    gateways: BTreeSet<(u32, IpAddr)>,
    /// Families and links of all routes with a gateway.
    routed: BTreeSet<(Family, u32)>,
    /// Source addresses that routes with a gateway prefer, with the links of those routes.
    sources: BTreeMap<IpAddr, u32>,
}

impl WaysOut {
    /// Reads the routes of the main table. [`MainTables`] bounds their number: of the large table of a
    /// routing daemon, the kernel sends the routes of the host's configuration ([`CONFIGURED`]), and the
    /// default route that it would choose, which may be the daemon's.
    pub(super) fn read(
        rtnetlink: &mut Rtnetlink,
        tables: &mut MainTables,
    ) -> Result<Self, NetlinkError> {
        let mut ways = Self::default();
        for family in Family::ALL {
            let mut routes = tables.read(rtnetlink, family, &CONFIGURED)?;
            if tables.is_large(family) {
                let chosen = rtnetlink.route_to(elsewhere(family))?;
                routes.extend(chosen.filter(|route| route.table == MAIN_TABLE));
            }
            routes.iter().for_each(|route| ways.add(family, route));
        }
        Ok(ways)
    }

    /// Returns the gateways of the default routes, each once.
    pub(super) fn gateways(&self) -> Vec<IpAddr> {
        let gateways: BTreeSet<IpAddr> =
            self.gateways.iter().map(|(_, gateway)| *gateway).collect();
        gateways.into_iter().collect()
    }

    fn add(&mut self, family: Family, route: &Route) {
        if route.kind != RouteKind::Unicast {
            return;
        }
        let is_default = route.destination.prefix_len() == 0;
        for NextHop { link, gateway } in route.hops() {
            if gateway.is_some() || is_default {
                self.routed.insert((family, link));
                if let Some(source) = route.source {
                    self.sources.entry(source).or_insert(link);
                }
            }
            if is_default {
                let metric = self.defaults.entry((family, link)).or_insert(route.metric);
                *metric = route.metric.min(*metric);
                self.gateways.extend(gateway.map(|gateway| (link, gateway)));
            }
        }
    }
}

/// Returns an address that is in no network of the internet, nor in one of a LAN: reserved (RFC 1112), and for
/// documentation (RFC 9637).
fn elsewhere(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(240, 0, 0, 1).into(),
        Family::V6 => Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 1).into(),
    }
}

/// Returns the addresses that can serve as node IPs, which are those of [`candidates`]. Those on the links of
/// default routes come first, by metric.
pub(super) fn node_ips(
    addresses: &[LocalAddress],
    ways: &WaysOut,
    policy: &CandidatePolicy,
) -> Vec<IpAddr> {
    let mut found = candidates(addresses, policy);
    found.sort_by_key(|ip| {
        let on = addresses.iter().filter(|address| address.prefix.addr() == *ip);
        let metric = on.filter_map(|at| ways.defaults.get(&(Family::of(*ip), at.index))).min();
        (metric.is_none(), metric)
    });
    found
}

/// Returns the networks of the host's links, and the links of its default routes.
pub(super) fn transit(
    addresses: &[LocalAddress],
    ways: &WaysOut,
    policy: &CandidatePolicy,
) -> TransitPlan {
    let usable = addresses.iter().filter(|address| is_lan(address, policy));
    let lans = usable.map(|address| (address.link.clone(), address.prefix.trunc()));
    let is_default = |link: u32| ways.defaults.keys().any(|(_, default)| *default == link);
    let leads_out = addresses.iter().filter(|address| is_default(address.index));
    TransitPlan {
        lans: lans.collect(),
        ways_out: leads_out.map(|address| address.link.clone()).collect(),
    }
}

/// Orders the host's addresses, see [`OutwardAddresses`]. At most `limit` candidates are returned.
pub(super) fn outward(
    addresses: &[LocalAddress],
    ways: &WaysOut,
    policy: &CandidatePolicy,
    limit: usize,
) -> OutwardAddresses {
    let links: BTreeMap<u32, &LocalAddress> =
        addresses.iter().map(|address| (address.index, address)).collect();
    let is_outer = |link: &u32| links.get(link).is_some_and(|link| leads_outside(link, policy));
    let published: BTreeSet<IpAddr> = candidates(addresses, policy).into_iter().collect();

    // The addresses to begin with: published ones, and those that a route outside prefers although
    // they are on the loopback or on another link that leads nowhere.
    let mut chosen: Vec<(path::LocalAddress, &LocalAddress)> = Vec::new();
    let mut others: Vec<path::LocalAddress> = Vec::new();
    for local in addresses {
        let address = local.prefix.addr();
        let at = |interface| path::LocalAddress { address, interface };
        if published.contains(&address) && leads_outside(local, policy) {
            chosen.push((at(local.index), local));
        } else if !is_usable_elsewhere(local, policy) {
            // Nobody can reach it.
        } else if let Some(link) = ways.sources.get(&address).filter(|link| is_outer(link)) {
            chosen.push((at(*link), local));
        } else if local.loopback || leads_outside(local, policy) {
            others.push(at(local.index));
        }
    }

    let rank_on_link = |(at, local): &(path::LocalAddress, &LocalAddress)| {
        let is_source = ways.sources.get(&at.address) == Some(&at.interface);
        let mut gateways = ways.gateways.iter().filter(|(link, _)| *link == at.interface);
        let has_gateway = gateways.any(|(_, gateway)| local.prefix.contains(gateway));
        (!is_source, !has_gateway, is_private(at.address), at.address)
    };
    chosen.sort_by_key(rank_on_link);
    let mut seen: BTreeMap<(Family, u32), usize> = BTreeMap::new();
    let mut ranked: Vec<_> = chosen
        .into_iter()
        .map(|(at, _)| {
            let of = (Family::of(at.address), at.interface);
            let number = seen.entry(of).or_default();
            *number += 1;
            let has_carrier = links.get(&at.interface).is_some_and(|link| link.carrier);
            let metric = ways.defaults.get(&of).copied();
            let rank = (
                !has_carrier,
                *number,
                metric.is_none(),
                metric,
                !ways.routed.contains(&of),
                is_private(at.address),
            );
            (rank, at)
        })
        .collect();
    ranked.sort_by_key(|(rank, at)| (*rank, at.address));
    // The same address may be on several links. It takes one place, at the first of them.
    let mut known = BTreeSet::new();
    ranked.retain(|(_, at)| known.insert(at.address));
    others.retain(|at| known.insert(at.address));

    let mut uplinks: Vec<path::LocalAddress> = ranked.iter().map(|(_, at)| *at).collect();
    let mut public_first = uplinks.clone();
    public_first.sort_by_key(|at| is_private(at.address));
    let candidates = public_first.into_iter().map(|at| at.address).take(limit).collect();
    // What arrives at another address is answered from there. A loopback address belongs to no link:
    // it is given to the first one.
    for other in others {
        let of_family =
            || uplinks.iter().filter(|at| Family::of(at.address) == Family::of(other.address));
        let link = of_family().find(|at| at.interface == other.interface);
        let is_loopback = links.get(&other.interface).is_some_and(|link| link.loopback);
        let link = link.or_else(|| of_family().next().filter(|_| is_loopback));
        let at = link.map(|at| path::LocalAddress { interface: at.interface, ..other });
        uplinks.extend(at);
    }
    uplinks.truncate(ADDRESSES);
    OutwardAddresses { uplinks, candidates }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(index: u32, prefix: &str) -> LocalAddress {
        let link = if index == 1 { "lo".to_owned() } else { format!("eth{index}") };
        LocalAddress::on(index, &link, prefix)
    }

    fn default_by(link: u32, gateway: &str, metric: u32) -> Route {
        let net = if gateway.contains(':') { "::/0" } else { "0.0.0.0/0" };
        Route::new(net.parse().unwrap()).via(gateway.parse().unwrap()).dev(link).metric(metric)
    }

    fn ways(routes: &[Route]) -> WaysOut {
        let mut ways = WaysOut::default();
        for route in routes {
            ways.add(Family::of(route.destination.addr()), route);
        }
        ways
    }

    fn order(addresses: &[LocalAddress], routes: &[Route]) -> (Vec<String>, Vec<String>) {
        let policy = CandidatePolicy {
            own_link: "towline0".to_owned(),
            excluded: vec!["198.19.0.0/16".parse().unwrap()],
        };
        let found = outward(addresses, &ways(routes), &policy, 16);
        let text = |at: &path::LocalAddress| format!("{}%{}", at.address, at.interface);
        (
            found.uplinks.iter().map(text).collect(),
            found.candidates.iter().map(ToString::to_string).collect(),
        )
    }

    #[test]
    fn links_follow_the_metrics_of_their_default_routes() {
        let addresses = [
            on(4, "10.0.1.1/24"),
            on(3, "10.0.2.1/24"),
            on(2, "192.168.1.10/24"),
            on(5, "172.16.0.9/16"),
        ];
        let routes = [default_by(2, "192.168.1.1", 200), default_by(3, "10.0.2.254", 100)];
        let (uplinks, candidates) = order(&addresses, &routes);
        assert_eq!(uplinks, ["10.0.2.1%3", "192.168.1.10%2", "10.0.1.1%4", "172.16.0.9%5"]);
        assert_eq!(candidates, ["10.0.2.1", "192.168.1.10", "10.0.1.1", "172.16.0.9"]);
        let by =
            Route::new("10.0.0.0/8".parse().unwrap()).via("172.16.0.1".parse().unwrap()).dev(5);
        let (uplinks, _) = order(&addresses, &[routes[0].clone(), by]);
        assert_eq!(uplinks[..2], ["192.168.1.10%2", "172.16.0.9%5"], "then links with a router");
    }

    #[test]
    fn an_address_on_several_links_takes_one_place() {
        let mut addresses = vec![on(2, "203.0.113.10/24"), on(1, "203.0.113.10/32")];
        // A router with the same address on a tap for each of its machines.
        addresses.extend((1..=30).map(|n| on(10 + n, "203.0.113.10/32")));
        addresses.push(on(3, "10.0.0.5/24"));
        let routes = [default_by(2, "203.0.113.1", 0)];
        let (uplinks, candidates) = order(&addresses, &routes);
        assert_eq!(uplinks, ["203.0.113.10%2", "10.0.0.5%3"]);
        assert_eq!(candidates, ["203.0.113.10", "10.0.0.5"]);
    }

    #[test]
    fn a_multipath_default_route_names_all_its_links() {
        let addresses = [on(2, "10.0.1.1/24"), on(3, "10.0.2.1/24"), on(4, "10.0.3.1/24")];
        let mut route = Route::new("0.0.0.0/0".parse().unwrap());
        route.next_hops = [(3, "10.0.2.254"), (4, "10.0.3.254")]
            .map(|(link, gateway)| NextHop { link, gateway: gateway.parse().ok() })
            .to_vec();
        assert_eq!(order(&addresses, &[route]).0, ["10.0.2.1%3", "10.0.3.1%4", "10.0.1.1%2"]);
    }

    #[test]
    fn node_ips_follow_the_metrics_of_the_default_routes() {
        let addresses = [on(2, "10.0.1.1/24"), on(3, "10.0.2.1/24"), on(4, "10.0.3.1/24")];
        let policy = CandidatePolicy::default();
        let order = |routes: &[Route]| -> Vec<String> {
            let found = node_ips(&addresses, &ways(routes), &policy);
            found.iter().map(ToString::to_string).collect()
        };
        assert_eq!(order(&[]), ["10.0.1.1", "10.0.2.1", "10.0.3.1"]);
        let (first, second) = (default_by(4, "10.0.3.254", 100), default_by(3, "10.0.2.254", 200));
        assert_eq!(order(&[second, first]), ["10.0.3.1", "10.0.2.1", "10.0.1.1"]);
        // A route with several next hops has no link of its own.
        let mut multipath = Route::new("0.0.0.0/0".parse().unwrap());
        multipath.next_hops = [(3, "10.0.2.254"), (4, "10.0.3.254")]
            .map(|(link, gateway)| NextHop { link, gateway: gateway.parse().ok() })
            .to_vec();
        assert_eq!(order(&[multipath]), ["10.0.2.1", "10.0.3.1", "10.0.1.1"]);
    }

    #[test]
    fn a_public_address_is_published_before_many_private_ones() {
        let mut addresses: Vec<_> =
            (1..=30).map(|n| on(10 + n, &format!("10.0.{n}.1/24"))).collect();
        addresses.push(on(2, "203.0.113.10/24"));
        let (uplinks, candidates) = order(&addresses, &[default_by(2, "203.0.113.1", 0)]);
        assert_eq!(
            (uplinks[0].as_str(), candidates[0].as_str()),
            ("203.0.113.10%2", "203.0.113.10")
        );
        assert_eq!((uplinks.len(), candidates.len()), (31, 16));
        // Also where the default route is a private one.
        let (_, candidates) = order(&addresses, &[default_by(11, "10.0.1.254", 0)]);
        assert_eq!(candidates[..2], ["203.0.113.10", "10.0.1.1"]);
    }

    #[test]
    fn the_address_next_to_the_gateway_is_the_first_of_its_link() {
        let addresses = [on(2, "10.15.0.5/16"), on(2, "203.0.113.20/24"), on(3, "10.114.0.2/20")];
        let (uplinks, candidates) = order(&addresses, &[default_by(2, "203.0.113.1", 0)]);
        assert_eq!(uplinks, ["203.0.113.20%2", "10.114.0.2%3", "10.15.0.5%2"]);
        assert_eq!(candidates, ["203.0.113.20", "10.114.0.2", "10.15.0.5"]);
        let by_source = default_by(2, "203.0.113.1", 0).source("10.15.0.5".parse().unwrap());
        assert_eq!(order(&addresses, &[by_source]).0[0], "10.15.0.5%2", "unless a route says so");
    }

    #[test]
    fn an_address_on_the_loopback_counts_if_a_route_prefers_it() {
        let addresses = [on(1, "10.9.9.9/32"), on(2, "192.168.1.2/31"), on(1, "10.8.8.8/32")];
        let route = default_by(2, "192.168.1.3", 0);
        let (uplinks, candidates) = order(&addresses, std::slice::from_ref(&route));
        assert_eq!(candidates, ["192.168.1.2"]);
        assert_eq!(uplinks, ["192.168.1.2%2", "10.9.9.9%2", "10.8.8.8%2"], "answered from there");
        let (uplinks, candidates) = order(&addresses, &[route.source("10.9.9.9".parse().unwrap())]);
        assert_eq!(candidates, ["10.9.9.9", "192.168.1.2"]);
        assert_eq!(uplinks[0], "10.9.9.9%2");
    }

    #[test]
    fn service_addresses_answer_but_are_not_published_and_a_dead_link_comes_last() {
        let mut dead = on(2, "192.168.1.10/24");
        dead.carrier = false;
        let addresses =
            [dead, on(3, "10.0.0.5/24"), on(3, "10.0.0.100/32"), on(3, "198.19.0.9/32")];
        let (uplinks, candidates) = order(&addresses, &[default_by(2, "192.168.1.1", 0)]);
        assert_eq!(uplinks, ["10.0.0.5%3", "192.168.1.10%2", "10.0.0.100%3"]);
        assert_eq!(candidates, ["10.0.0.5", "192.168.1.10"]);
    }
}
