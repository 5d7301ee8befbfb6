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

/// The host's state: what peers hold leads into the tunnel; whatever the mesh guards or a peer
/// ever held leads there or nowhere.
pub(crate) fn plan<'a>(
    config: &Config,
    underlay: &UnderlayPlan,
    own_prefixes: &[IpNet],
    held: impl Iterator<Item = &'a IpNet>,
    withdrawn: &BTreeSet<IpNet>,
) -> Plan {
    let held: BTreeSet<IpNet> = held.copied().collect();
    let overlay = config.grant.overlay;
    let source = |net: &IpNet| match net {
        IpNet::V4(_) => IpAddr::V4(overlay.v4),
        IpNet::V6(_) => IpAddr::V6(overlay.v6),
    };

    // What we announce ourselves is reached by the host's own routes. (Our overlay addresses need
    // no hole: the local table comes before ours.)
    let guarded = without(
        covering(
            config
                .mesh
                .guarded()
                .chain(held.iter().copied())
                .chain(withdrawn.iter().copied())
                .filter(|net| net.prefix_len() > 0),
        ),
        own_prefixes,
    );

    let link = held
        .iter()
        .map(|net| ((*net, RouteVia::Link), RoutePlan { source: Some(source(net)), mtu: None }));
    let nowhere = guarded.iter().map(|net| ((*net, RouteVia::Unreachable), RoutePlan::default()));
    let routes: BTreeMap<_, _> = link.chain(nowhere).collect();

    Plan {
        link: LinkPlan {
            name: config.link.clone(),
            mtu: config.mtu,
            addresses: overlay.prefixes().collect(),
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
