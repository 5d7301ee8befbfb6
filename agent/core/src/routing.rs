//! The plan, kept up to date node by node.
//!
//! A change of one node costs what that node announces, not what the mesh does: [`Routing`]
//! remembers what each node is the reason for and patches the plan by the difference. What holds
//! for all of it (configuration, our own prefixes) has it built again.
//!
//! The guards are the fewest networks that cover the mesh's ranges and all that a peer holds or
//! ever held, less what we announce ourselves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use towline_types::id::NodeId;
use towline_types::mtu::Mtu;
use towline_types::node::Grant;
use towline_types::ownership::overlap;

use crate::changes::{Change, Scope};
use crate::config::Config;
use crate::effects::Effects;
use crate::home_relays::weight;
use crate::local_networks::{self, ConnectedNetworks, LocalNetwork, LocalNetworks, Origin};
use crate::own_networks::OwnNetworks;
use crate::peer::{Peer, clamped};
use crate::peers::Peers;
use crate::plan::{
    DetourPlan, FirewallPlan, LinkPlan, Plan, RoutePlan, RouteVia, RulePlan, TransitPlan,
    UnderlayPlan,
};
use crate::prefixes::{covering, is_host, without};
use crate::roster::Roster;
use crate::static_peers::StaticPeers;
use crate::status::PeerState;

/// What host and configuration add to plan and peer table.
#[derive(Debug)]
pub(crate) struct HostSettings {
    /// Name of the TUN link.
    link: String,
    /// MTU of the TUN link.
    mtu: Mtu,
    /// Our routing table.
    table: u32,
    /// Our policy rules.
    rules: RulePlan,
    /// Name of our nftables table.
    firewall_table: String,
    /// Addresses of our link in addition to the mesh's.
    addresses: Vec<IpAddr>,
    /// Networks that packets out of the tunnel may be forwarded to, though we do not announce them.
    forward_to: Vec<IpNet>,
    /// Networks of our pods; announced too. None lies inside another.
    pod_networks: Vec<IpNet>,
    /// Networks of this host that stay as they are, even if others announce them.
    local_networks: ConnectedNetworks,
    /// Networks of this host's links, and the links that lead to the internet.
    transit: TransitPlan,
    /// True if a source that is not ours is translated.
    masquerade: bool,
    /// Our own node IPs; announced too.
    node_ips: Vec<IpAddr>,
    /// What of ours travels outside the tunnel.
    underlay: UnderlayPlan,
}

impl HostSettings {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            link: config.link,
            mtu: config.mtu,
            table: config.table,
            rules: config.rules,
            firewall_table: config.firewall_table,
            addresses: Vec::new(),
            forward_to: Vec::new(),
            pod_networks: Vec::new(),
            local_networks: ConnectedNetworks::default(),
            transit: TransitPlan::default(),
            masquerade: false,
            node_ips: Vec::new(),
            underlay: UnderlayPlan::default(),
        }
    }

    pub(crate) fn set_addresses(&mut self, fx: &mut Effects, addresses: Vec<IpAddr>) {
        replace(&mut self.addresses, addresses, fx, Change::OwnNetworks);
    }

    pub(crate) fn set_forward_to(&mut self, fx: &mut Effects, networks: Vec<IpNet>) {
        replace(&mut self.forward_to, networks, fx, Change::OwnNetworks);
    }

    pub(crate) fn set_transit(&mut self, fx: &mut Effects, transit: TransitPlan) {
        replace(&mut self.transit, transit, fx, Change::Host);
    }

    pub(crate) fn set_masquerade(&mut self, fx: &mut Effects, masquerade: bool) {
        replace(&mut self.masquerade, masquerade, fx, Change::Host);
    }

    pub(crate) fn set_pod_networks(&mut self, fx: &mut Effects, networks: Vec<IpNet>) {
        let networks = covering(networks).into_iter().collect();
        replace(&mut self.pod_networks, networks, fx, Change::Host);
    }

    pub(crate) fn set_local_networks(&mut self, fx: &mut Effects, networks: LocalNetworks) {
        if self.local_networks.set_networks(networks) {
            fx.mark(Change::Host);
        }
    }

    pub(crate) fn set_connected_networks(&mut self, fx: &mut Effects, connected: BTreeSet<IpNet>) {
        if self.local_networks.set_connected(connected) {
            fx.mark(Change::Host);
        }
    }

    pub(crate) fn set_node_ips(&mut self, fx: &mut Effects, node_ips: Vec<IpAddr>) {
        replace(&mut self.node_ips, node_ips, fx, Change::Host);
    }

    pub(crate) fn set_underlay(&mut self, fx: &mut Effects, underlay: UnderlayPlan) {
        let underlay = UnderlayPlan { second_port: self.underlay.second_port, ..underlay };
        replace(&mut self.underlay, underlay, fx, Change::Host);
    }

    pub(crate) fn second_port(&self) -> Option<u16> {
        self.underlay.second_port
    }

    pub(crate) fn set_second_port(&mut self, fx: &mut Effects, port: Option<u16>) {
        replace(&mut self.underlay.second_port, port, fx, Change::Host);
    }
}

/// Puts a new value in a value's place, and marks the change if it is another one.
fn replace<T: PartialEq>(value: &mut T, new: T, fx: &mut Effects, change: Change) {
    if *value != new {
        *value = new;
        fx.mark(change);
    }
}

/// Everything that plan and peer table follow from.
pub(crate) struct RoutingInput<'a> {
    pub(crate) settings: &'a HostSettings,
    pub(crate) roster: &'a Roster,
    pub(crate) peers: &'a Peers,
    pub(crate) static_peers: &'a StaticPeers,
}

/// The plan that was handed out last.
#[derive(Debug, Default)]
pub(crate) struct Routing {
    plan: Option<Arc<Plan>>,
    by_node: BTreeMap<NodeId, Vec<Entry>>,
}

/// What one network of one node does to the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    net: IpNet,
    via: RouteVia,
    route: RoutePlan,
    /// True if packets from there may arrive outside the tunnel.
    is_plain: bool,
    /// True for a network of machines rather than of pods.
    is_lan: bool,
    /// True for a node IP of a trusted site: only what our pods send there enters the tunnel.
    is_detour: bool,
    /// True for an address of another node that is not one of the overlay.
    is_other_node_ip: bool,
}

impl Routing {
    /// Derives the part of the plan that changed. Returns the plan if it is another one than the
    /// last.
    pub(crate) fn update(
        &mut self,
        input: &RoutingInput<'_>,
        changed: &Scope,
    ) -> Option<Arc<Plan>> {
        let patched = match (&self.plan, changed) {
            (Some(plan), Scope::Nodes(nodes)) => {
                let nodes = self.with_sharers(input, nodes);
                self.patch(plan.clone(), input, &nodes)
            }
            _ => None,
        };
        let plan = patched.unwrap_or_else(|| self.build(input));
        if self.plan.as_ref().is_some_and(|before| Arc::ptr_eq(before, &plan) || *before == plan) {
            return None;
        }
        self.plan = Some(plan.clone());
        Some(plan)
    }

    fn build(&mut self, input: &RoutingInput<'_>) -> Arc<Plan> {
        let RoutingInput { settings, roster, .. } = input;
        let nodes = input.peers.iter().map(Peer::id);
        self.by_node = nodes.map(|node| (node, input.entries(node))).collect();
        let to_static_peers = input.static_entries();
        let mut entries: Vec<&Entry> =
            self.by_node.values().flatten().chain(&to_static_peers).collect();
        entries.sort_unstable_by_key(|entry| entry.net);

        // What we announce is reached by the host's own routes, so it is left out. Our own
        // addresses need no hole: the local table comes before ours.
        let holes: Vec<IpNet> =
            roster.own_prefixes().iter().filter(|net| !input.is_node_ip(net)).copied().collect();
        let unguarded: Vec<IpNet> =
            holes.iter().copied().chain(roster.refused_networks()).collect();
        let held = entries.iter().map(|entry| entry.net);
        let ever = input.guarded_by_mesh().chain(held).chain(roster.withdrawn().iter().copied());
        let ever: BTreeSet<IpNet> = ever.filter(|net| net.prefix_len() > 0).collect();
        let local = input.local_networks(&entries);
        let guarded = without(local_networks::guarded(&ever, &local), &unguarded);

        let nowhere =
            guarded.iter().map(|net| ((*net, RouteVia::Unreachable), RoutePlan::default()));
        let covered = |net: &&IpNet| entries.iter().any(|entry| entry.net.contains(*net));
        let past = local.keys().filter(covered);
        let past = past.map(|net| ((*net, RouteVia::Native), RoutePlan::default()));
        let routes = entries.iter().filter(|entry| !local.contains_key(&entry.net));
        let routes = routes.map(|entry| ((entry.net, entry.via), entry.route)).chain(past);
        let nets = |which: fn(&Entry) -> bool| -> BTreeSet<IpNet> {
            entries.iter().filter(|entry| which(entry)).map(|entry| entry.net).collect()
        };
        Arc::new(Plan {
            link: LinkPlan {
                name: settings.link.clone(),
                mtu: settings.mtu,
                addresses: input.addresses().map(IpNet::from).collect(),
            },
            table: settings.table,
            routes: routes.chain(nowhere).collect(),
            rules: settings.rules,
            pods: settings.pod_networks.iter().copied().collect(),
            local: local
                .into_iter()
                .filter(|(own, _)| ever.iter().any(|net| net.contains(own)))
                .collect(),
            detour: DetourPlan {
                sources: holes.iter().copied().collect(),
                destinations: nets(|entry| entry.is_detour),
            },
            underlay: settings.underlay.clone(),
            transit: input.transit(entries.iter().copied()),
            firewall: FirewallPlan {
                table: settings.firewall_table.clone(),
                plain: nets(|entry| entry.is_plain),
                native: nets(|entry| entry.via == RouteVia::Native),
                guarded,
                own: input.own_networks(),
                masquerade: settings.masquerade,
            },
        })
    }

    /// Adds the nodes that share a network with one of these: they may carry it from now on.
    fn with_sharers(&self, input: &RoutingInput<'_>, nodes: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
        let claims = input.roster.claims();
        let before = nodes.iter().filter_map(|node| self.by_node.get(node)).flatten();
        let now = nodes.iter().filter_map(|node| claims.of(*node));
        let nets = before.map(|entry| &entry.net).chain(now.flat_map(|claim| &claim.prefixes));
        nets.flat_map(|net| claims.holders(net)).chain(nodes.iter().copied()).collect()
    }

    /// Returns the plan with the changes of some nodes; `None`: it must be built again.
    fn patch(
        &mut self,
        mut plan: Arc<Plan>,
        input: &RoutingInput<'_>,
        changed: &BTreeSet<NodeId>,
    ) -> Option<Arc<Plan>> {
        let mut gone = Vec::new();
        let mut new = Vec::new();
        for node in changed {
            let entries = input.entries(*node);
            let before = self.by_node.remove(node).unwrap_or_default();
            gone.extend(before.iter().filter(|entry| !entries.contains(entry)).cloned());
            new.extend(entries.iter().filter(|entry| !before.contains(entry)).cloned());
            if !entries.is_empty() {
                self.by_node.insert(*node, entries);
            }
        }
        if gone.is_empty() && new.is_empty() {
            return Some(plan);
        }
        // Which local networks stay as they are, and of which nodes we are the router, may be another
        // matter now.
        let touches = |entry: &Entry| {
            let HostSettings { local_networks, transit, .. } = input.settings;
            let is_near = |(_, lan): &(String, IpNet)| lan.contains(&entry.net);
            local_networks.touches(&entry.net)
                || entry.is_other_node_ip && transit.lans.iter().any(is_near)
        };
        if gone.iter().chain(&new).any(touches) {
            return None;
        }
        let patched = Arc::make_mut(&mut plan);
        for entry in &gone {
            patched.routes.remove(&(entry.net, entry.via));
            patched.firewall.plain.remove(&entry.net);
            patched.firewall.native.remove(&entry.net);
            patched.detour.destinations.remove(&entry.net);
        }
        for entry in &new {
            patched.routes.insert((entry.net, entry.via), entry.route);
            if entry.is_plain {
                patched.firewall.plain.insert(entry.net);
            }
            if entry.via == RouteVia::Native {
                patched.firewall.native.insert(entry.net);
            }
            if entry.is_detour {
                patched.detour.destinations.insert(entry.net);
            }
            guard(patched, input, entry.net)?;
        }
        for entry in &gone {
            if !input.ever_held(entry.net) {
                release(patched, input, entry.net)?;
            }
        }
        Some(plan)
    }
}

impl RoutingInput<'_> {
    fn entries(&self, node: NodeId) -> Vec<Entry> {
        let (Some(claim), Some(peer), Some(ours)) =
            (self.roster.claim(node), self.peers.get(node), self.roster.membership())
        else {
            return Vec::new();
        };
        let (mesh, grant) = (&ours.mesh, peer.node().grant());
        let allowed = self.roster.in_clear();
        let trusted_site = allowed.trusted_sites
            && grant.site.is_some()
            && grant.site == ours.grant.site
            && grant.site.as_ref().is_some_and(|site| mesh.trusted_sites.contains(site));
        let down = peer.state() == PeerState::Down;
        let link = self.link_mtu();
        let (mtu, _) = clamped(peer.applied_mtu(), link);
        let mtu = (mtu < link).then_some(mtu);
        let entry = |net: &IpNet| {
            let overlay = grant.overlay.contains_prefix(net);
            let trusted = trusted_site && !overlay && is_host(net);
            let in_clear = allowed.bypass_when_down
                && !overlay
                && mesh.bypass_when_down.iter().any(|range| range.contains(net));
            let native = trusted || (in_clear && down);
            let route = if native {
                RoutePlan::default()
            } else {
                RoutePlan { source: self.source(net), mtu }
            };
            Entry {
                net: *net,
                via: if native { RouteVia::Native } else { RouteVia::Link },
                route,
                is_plain: trusted || in_clear,
                is_lan: claim.lans.contains(net),
                is_detour: trusted,
                is_other_node_ip: !overlay && is_host(net),
            }
        };
        let is_carried = |net: &&IpNet| net.prefix_len() > 0 && self.carries(grant, net);
        claim.prefixes.iter().filter(is_carried).map(entry).collect()
    }

    /// Returns whether packets to a network that a node holds go to that node. Of several that share it, it
    /// is one that is not down. Each node of the mesh chooses by its own id, so that all of them are used
    /// alike. None of them carries it where we hold it too.
    pub(crate) fn carries(&self, grant: &Grant, net: &IpNet) -> bool {
        if grant.sharing(net).is_none() {
            return true;
        }
        let claims = self.roster.claims();
        if claims.is_ours(net) {
            return false;
        }
        let is_down =
            |id: NodeId| self.peers.get(id).is_none_or(|peer| peer.state() == PeerState::Down);
        let own = self.roster.membership().map_or(NodeId([0; 16]), |ours| ours.grant.node_id);
        let rank = |id: &NodeId| (is_down(*id), weight(own, *id), *id);
        claims.holders(net).min_by_key(rank) == Some(grant.node_id)
    }

    /// What a static peer gets is routed and guarded like what a node holds.
    fn static_entries(&self) -> Vec<Entry> {
        let entry = |net: &IpNet| {
            // It knows the configured address of our link rather than the mesh's.
            let ours = self.settings.addresses.iter().copied().chain(self.overlay());
            let source = of_family(net, ours);
            let route = RoutePlan { source, mtu: None };
            // The operator of this node chose it.
            let is_lan = true;
            Entry {
                net: *net,
                via: RouteVia::Link,
                route,
                is_plain: false,
                is_lan,
                is_detour: false,
                is_other_node_ip: false,
            }
        };
        self.static_peers.prefixes().map(entry).collect()
    }

    /// Returns the preferred source: our node IP of that family, else our overlay address.
    fn source(&self, net: &IpNet) -> Option<IpAddr> {
        of_family(net, self.settings.node_ips.iter().copied().chain(self.overlay()))
    }

    /// Returns the MTU of the TUN link.
    pub(crate) fn link_mtu(&self) -> Mtu {
        self.settings.mtu
    }

    fn is_node_ip(&self, net: &IpNet) -> bool {
        is_host(net) && self.settings.node_ips.contains(&net.addr())
    }

    /// Returns the inner addresses and networks that are ours.
    pub(crate) fn own_networks(&self) -> OwnNetworks {
        let reachable = self.settings.forward_to.iter().chain(self.static_peers.prefixes());
        OwnNetworks::new(
            self.addresses(),
            self.roster.own_prefixes().iter().copied(),
            reachable.copied(),
        )
    }

    /// Returns all addresses of our link.
    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.overlay().chain(self.settings.addresses.iter().copied())
    }

    fn overlay(&self) -> impl Iterator<Item = IpAddr> {
        self.roster.membership().into_iter().flat_map(|ours| ours.grant.overlay.iter())
    }

    fn guarded_by_mesh(&self) -> impl Iterator<Item = IpNet> {
        self.roster.guarded_ranges()
    }

    /// Returns the local networks that stay as they are, see [`local_networks`].
    fn local_networks(&self, entries: &[&Entry]) -> BTreeMap<IpNet, IpNet> {
        let present = self.settings.local_networks.present();
        if present.is_empty() {
            return BTreeMap::new();
        }
        let mesh = self.roster.membership().map(|ours| &ours.mesh);
        let overlay: Vec<IpNet> = mesh.into_iter().flat_map(|mesh| mesh.overlays()).collect();
        // A lease that the host had when it joined must not open the network of another node's pods.
        let withdrawn = self.roster.withdrawn().difference(self.roster.withdrawn_lans()).copied();
        let held = entries.iter().filter(|entry| !entry.is_lan).map(|entry| entry.net);
        let closed: Vec<IpNet> = held.chain(withdrawn).collect();
        let stays = |(net, local): &(&IpNet, &LocalNetwork)| match local.origin {
            Origin::Configured => !overlay.iter().any(|range| range.contains(*net)),
            Origin::Joined => {
                !self.guarded_by_mesh().any(|range| overlap(&range, net))
                    && !closed.iter().any(|other| other.contains(*net))
            }
        };
        local_networks::bounded(present.iter().filter(stays))
    }

    /// Returns the networks in which other nodes have their node IPs.
    fn transit<'e>(&self, entries: impl Iterator<Item = &'e Entry> + Clone) -> TransitPlan {
        let nodes = entries.filter(|entry| entry.is_other_node_ip).map(|entry| &entry.net);
        self.settings.transit.around(nodes)
    }

    fn ever_held(&self, net: IpNet) -> bool {
        self.roster.withdrawn().contains(&net) || self.roster.claims().holds(net)
    }
}

/// Guards one more network; `None` where it meets a hole.
fn guard(plan: &mut Plan, input: &RoutingInput<'_>, net: IpNet) -> Option<()> {
    let is_unguarded = |hole: &IpNet| overlap(hole, &net);
    if input.roster.own_prefixes().iter().any(is_unguarded)
        || input.roster.refused_networks().any(|hole| is_unguarded(&hole))
    {
        return None;
    }
    let guarded = &mut plan.firewall.guarded;
    // They do not overlap, so the one around it is the last that sorts no later.
    if guarded.range(..=net).next_back().is_some_and(|wider| wider.contains(&net)) {
        return Some(());
    }
    let inside: Vec<IpNet> =
        guarded.range(net..).take_while(|other| net.contains(*other)).copied().collect();
    for net in inside {
        guarded.remove(&net);
        plan.routes.remove(&(net, RouteVia::Unreachable));
    }
    guarded.insert(net);
    plan.routes.insert((net, RouteVia::Unreachable), RoutePlan::default());
    Some(())
}

/// Stops guarding a network that no node holds and that is not withdrawn. Returns `None` (build the plan
/// again) where other guarded networks lie inside it or around it: a wider network from which one of ours
/// is cut out is guarded in pieces, and this may be one of them.
fn release(plan: &mut Plan, input: &RoutingInput<'_>, net: IpNet) -> Option<()> {
    if !plan.firewall.guarded.contains(&net) {
        return Some(());
    }
    let inside = |other: &IpNet| net.contains(other);
    let mut around = std::iter::successors(net.supernet(), IpNet::supernet);
    let needed = input.guarded_by_mesh().any(|range| inside(&range) || range.contains(&net))
        || input.roster.withdrawn().range(net..).next().is_some_and(inside)
        || around.any(|wider| input.roster.withdrawn().contains(&wider))
        || input.roster.claims().overlaps(net);
    if needed {
        return None;
    }
    plan.firewall.guarded.remove(&net);
    plan.routes.remove(&(net, RouteVia::Unreachable));
    Some(())
}

/// Returns the first address of the network's family.
fn of_family(net: &IpNet, mut addresses: impl Iterator<Item = IpAddr>) -> Option<IpAddr> {
    let v4 = matches!(net, IpNet::V4(_));
    addresses.find(|address| address.is_ipv4() == v4)
}
