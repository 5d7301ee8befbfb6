//! The peer table and the plan, each built whole from what the core knows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::claims::Claims;
use crate::mesh::Config;
use crate::peer::Peer;
use crate::peer_table::{PeerEntry, PeerTable};
use crate::plan::{FirewallPlan, LinkPlan, Plan, RoutePlan, RouteVia, UnderlayPlan};
use crate::prefixes::{covering, without};

/// The data plane's peers: all that hold their key.
pub(crate) fn peer_table<'a>(
    mtu: u32,
    claims: &Claims,
    peers: impl Iterator<Item = &'a Peer>,
) -> PeerTable {
    let entries = peers.filter_map(|peer| {
        let claim = claims.of(peer.id()).filter(|claim| claim.key_holder.is_none())?;
        let entry = PeerEntry {
            endpoint: peer.endpoint(),
            prefixes: claim.prefixes.clone(),
            keepalive: peer.keepalive(),
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
            fragment: false,
            preshared_key: None,
            boot_epoch: peer.node().record().boot_epoch,
        };
        Some((peer.key(), entry))
    });
    PeerTable { peers: entries.collect() }
}

/// What is our own, besides what the mesh gave us.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Own<'a> {
    /// Networks that we announce.
    pub(crate) prefixes: &'a [IpNet],
    /// Addresses of our link.
    pub(crate) addresses: &'a [IpAddr],
}

/// The host's state: what peers hold leads into the tunnel; whatever the mesh guards or a peer
/// ever held leads there or nowhere.
pub(crate) fn plan<'a>(
    config: &Config,
    underlay: &UnderlayPlan,
    own: Own<'_>,
    held: impl Iterator<Item = &'a IpNet>,
    held_by_static_peers: impl Iterator<Item = &'a IpNet>,
    withdrawn: &BTreeSet<IpNet>,
) -> Plan {
    let overlay = config.membership.as_ref().map(|membership| membership.grant.overlay);
    let overlay: Vec<IpAddr> = overlay.iter().flat_map(|overlay| overlay.iter()).collect();
    // A node of the mesh knows our overlay address, a static peer rather the configured one.
    let source = |net: &IpNet, first: &[IpAddr], then: &[IpAddr]| {
        let is_v4 = net.addr().is_ipv4();
        first.iter().chain(then).find(|address| address.is_ipv4() == is_v4).copied()
    };
    let to_nodes = held.map(|net| (*net, source(net, &overlay, &[])));
    let to_static_peers =
        held_by_static_peers.map(|net| (*net, source(net, own.addresses, &overlay)));
    let held: BTreeMap<IpNet, Option<IpAddr>> = to_nodes.chain(to_static_peers).collect();
    let guarded_by_mesh = config.membership.iter().flat_map(|membership| membership.mesh.guarded());

    // What we announce ourselves is reached by the host's own routes. (Our overlay addresses need
    // no hole: the local table comes before ours.)
    let guarded = without(
        covering(
            guarded_by_mesh
                .chain(held.keys().copied())
                .chain(withdrawn.iter().copied())
                .filter(|net| net.prefix_len() > 0),
        ),
        own.prefixes,
    );

    let link = held
        .iter()
        .map(|(net, source)| ((*net, RouteVia::Link), RoutePlan { source: *source, mtu: None }));
    let nowhere = guarded.iter().map(|net| ((*net, RouteVia::Unreachable), RoutePlan::default()));
    let routes: BTreeMap<_, _> = link.chain(nowhere).collect();

    Plan {
        link: LinkPlan {
            name: config.link.clone(),
            mtu: config.mtu,
            addresses: overlay.iter().chain(own.addresses).copied().map(IpNet::from).collect(),
        },
        table: config.table,
        routes,
        rules: config.rules,
        underlay: underlay.clone(),
        firewall: FirewallPlan {
            table: config.firewall_table.clone(),
            guarded,
            plain: BTreeSet::new(),
        },
    }
}
