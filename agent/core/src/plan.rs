//! The operating-system state that the agent wants, as one comparable value.
//!
//! `HostNetwork::apply` makes the host be like the plan. The same plan twice makes no system
//! call; what another program removed is restored.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use towline_types::mtu::Mtu;

use crate::own_networks::OwnNetworks;
use crate::prefixes::by_longest_prefix;

/// All state of ours on the host. Names and numbers are ours alone, so that removal is exact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The TUN link.
    pub link: LinkPlan,
    /// The routing table that holds every route of ours.
    pub table: u32,
    /// Routes in that table. A prefix with [`RouteVia::Unreachable`] is a guard: it stays when
    /// the link is gone, behind (with a worse metric than) the route through the link.
    pub routes: BTreeMap<(IpNet, RouteVia), RoutePlan>,
    /// Policy rules that send packets to the table.
    pub rules: RulePlan,
    /// Networks of this node's pods. The container network's own routes lead there; where there is
    /// none, nothing does: the host's default route would carry it out in clear.
    pub pods: BTreeSet<IpNet>,
    /// Networks of this host's links that are not guarded although others hold a network around them. Each
    /// is mapped to the network of the link that it lies in. The host's own routes lead there, except
    /// routes wider than that network, such as the default route.
    pub local: BTreeMap<IpNet, IpNet>,
    /// Traffic that enters the tunnel even where a route leaves it to the host.
    pub detour: DetourPlan,
    /// Our traffic that travels outside the tunnel.
    pub underlay: UnderlayPlan,
    /// Other nodes whose router this host is.
    pub transit: TransitPlan,
    /// The nftables side.
    pub firewall: FirewallPlan,
}

impl Plan {
    /// Returns the networks that are reached through the tunnel or not at all.
    pub fn tunnelled(&self) -> BTreeSet<IpNet> {
        let nets = |is_native| {
            let of = move |(_, via): &&(IpNet, RouteVia)| (*via == RouteVia::Native) == is_native;
            self.routes.keys().filter(of).map(|(net, _)| *net)
        };
        by_longest_prefix(BTreeSet::new(), nets(false), nets(true))
    }
}

/// The TUN link: its name, MTU and addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkPlan {
    /// Interface name.
    pub name: String,
    /// MTU of the link.
    pub mtu: Mtu,
    /// Our overlay addresses, each as a host prefix.
    pub addresses: BTreeSet<IpNet>,
}

/// Where a route leads. Ordered: the better one first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteVia {
    /// Into the tunnel.
    Link,
    /// Past the tunnel, by the host's other routes.
    Native,
    /// Nowhere: the sender gets an ICMP error.
    Unreachable,
}

/// A route's attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoutePlan {
    /// The source address that the host prefers; `None`: the kernel chooses.
    pub source: Option<IpAddr>,
    /// The route's own MTU, where the peer's path leaves less than the link's.
    pub mtu: Option<Mtu>,
}

/// Policy rules of both families: what is not known to be our own outer traffic looks into our
/// table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RulePlan {
    /// First of a few consecutive rule priorities.
    pub priority: u32,
    /// Packet mark on every socket of ours. Others can set it too: with it, a packet's port and its
    /// socket's owner are looked at, without it, nothing is.
    pub mark: u32,
    /// Bits of the mark that are ours; at least one more than the mark's own.
    pub mask: u32,
}

/// Exceptions for node IPs of a trusted site, which are reached outside the tunnel: packets from networks
/// behind this host enter the tunnel, since their addresses are unknown outside it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DetourPlan {
    /// Networks behind this host.
    pub sources: BTreeSet<IpNet>,
    /// Node IPs of the trusted site.
    pub destinations: BTreeSet<IpNet>,
}

/// Networks of this host in which other nodes have their node IPs. What those nodes send by this host
/// is encrypted, or is not for the mesh: it is forwarded like that of any other machine there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TransitPlan {
    /// Networks of the host's links, each with the name of its link.
    pub lans: BTreeSet<(String, IpNet)>,
    /// Names of the links by which packets leave for the internet.
    pub ways_out: BTreeSet<String>,
}

impl TransitPlan {
    /// Returns the part for those networks in which one of these nodes' addresses is. A network on a
    /// link that also leads to the internet needs no router.
    #[must_use]
    pub(crate) fn around<'a>(&self, nodes: impl Iterator<Item = &'a IpNet> + Clone) -> Self {
        let lans = self.lans.iter().filter(|(link, lan)| {
            !self.ways_out.contains(link) && nodes.clone().any(|node| lan.contains(node))
        });
        let lans: BTreeSet<_> = lans.cloned().collect();
        let ways_out = if lans.is_empty() { BTreeSet::new() } else { self.ways_out.clone() };
        Self { lans, ways_out }
    }
}

/// What of ours travels outside the tunnel, and would be taken for mesh traffic where the other
/// end's outer address is a mesh address too.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UnderlayPlan {
    /// User that the agent runs as, who owns its sockets.
    pub owner: u32,
    /// UDP port of the tunnels.
    pub port: Option<u16>,
    /// Second UDP port of the tunnels, while it is open.
    pub second_port: Option<u16>,
    /// Controllers (and relays), which we speak to over TCP from marked sockets.
    pub controllers: BTreeSet<SocketAddr>,
    /// TCP ports of this host: what reaches them outside the tunnel is let in and answered
    /// outside the tunnel; what reaches them inside is answered inside.
    pub plain_ports: BTreeSet<u16>,
}

impl UnderlayPlan {
    /// Returns the UDP ports of the tunnels.
    pub fn ports(&self) -> impl Iterator<Item = u16> {
        self.port.into_iter().chain(self.second_port)
    }
}

/// The table `inet towline`: named sets, and the guard that drops what must not leave in clear.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FirewallPlan {
    /// The table's name.
    pub table: String,
    /// Destinations that may leave by our link (or stay on the machine) and by no other, and
    /// sources that may arrive by our link and by no other.
    pub guarded: BTreeSet<IpNet>,
    /// Sources that may arrive outside the tunnel too, and then are answered there: node IPs of a
    /// trusted site, and networks whose owners prefer reachability while a tunnel is down.
    pub plain: BTreeSet<IpNet>,
    /// Destinations that may leave outside the tunnel now, though they are guarded.
    pub native: BTreeSet<IpNet>,
    /// What may come out of the tunnel here, and what no other link may bring in as a source.
    pub own: OwnNetworks,
    /// True if packets of this host that enter the tunnel with a source that is not ours get the
    /// address of our link as source. Needs conntrack.
    pub masquerade: bool,
}
