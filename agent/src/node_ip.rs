//! Determines the node IPs, by which other nodes reach this one, for the kubelet's `--node-ip`
//! (`towline node-ip`).
//!
//! With `node.addressing = "overlay"` they are the node's overlay addresses, known since the join.
//! With `"node-ip"` they are the machine's own addresses: those of the configuration, or else those
//! that the agent announced last, or else (before its first start) those that it would announce.

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, bail};

use crate::config::{Addressing, Config, NodeIpFamilies};
use crate::kubernetes;
use crate::state::{Membership, StateDir};
use ipnet::IpNet;
use towline_host::{CandidatePolicy, HostNetwork};
use towline_netlink::Rtnetlink;
use towline_proto::pod_range::PodRange;

/// Node IPs, at most one of each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NodeIps {
    /// IPv4 address.
    pub v4: Option<IpAddr>,
    /// IPv6 address.
    pub v6: Option<IpAddr>,
}

impl NodeIps {
    /// Returns the first address of each family.
    pub fn first(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let mut found = Self::default();
        for address in addresses {
            let place = if address.is_ipv4() { &mut found.v4 } else { &mut found.v6 };
            place.get_or_insert(address);
        }
        found
    }

    /// Returns the addresses, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.v4.into_iter().chain(self.v6)
    }
}

/// Returns the effective node IPs. Needs no agent and does not disturb a running one.
pub fn in_force(config: &Config) -> anyhow::Result<NodeIps> {
    let membership = joined(&config.state_dir)?;
    if config.node.addressing == Addressing::Overlay {
        return Ok(NodeIps::first(membership.grant.overlay.iter()));
    }
    let found = if !config.node.node_ips.is_empty() {
        NodeIps::first(config.node.node_ips.iter().copied())
    } else {
        let announced = NodeIps::first(StateDir::peek(&config.state_dir).prefixes()?.node_ips);
        if announced == NodeIps::default() {
            of_the_machine(config, &membership)?
        } else {
            announced
        }
    };
    if found == NodeIps::default() {
        bail!("this machine has no address that other nodes can reach: set node.node_ips");
    }
    Ok(found)
}

/// Returns the node IPs for the kubelet's `--node-ip`: one of each family that the cluster has. The
/// kubelet does not start with an address that the machine does not have, so an IPv6 address is left out
/// where IPv6 is disabled.
pub fn for_kubelet(config: &Config) -> anyhow::Result<NodeIps> {
    let all = in_force(config)?;
    let membership = joined(&config.state_dir)?;
    let stored = kubernetes::stored(&StateDir::peek(&config.state_dir))?;
    let pods = stored.map(|facts| facts.pod_cidrs).unwrap_or_default();
    let families = config.kubernetes.node_ip_families;
    let grant = &membership.grant;
    let ranges = grant.pod_ranges.iter().map(PodRange::range);
    let allowed: Vec<IpNet> = grant.allowed_prefixes.iter().copied().chain(ranges).collect();
    let wanted = of_families(all, families, &pods, &allowed);
    if config.kubernetes.node_ip_families == NodeIpFamilies::Auto && wanted.v4.is_some() {
        let existing = Rtnetlink::open().and_then(|mut netlink| netlink.addresses(None))?;
        let exists = |ip: &IpAddr| existing.iter().any(|address| address.prefix.addr() == *ip);
        return Ok(NodeIps { v6: wanted.v6.filter(exists), ..wanted });
    }
    Ok(wanted)
}

/// Returns the node IPs of the families that the cluster has: those of this node's pod networks, once they
/// are known. Before, it has IPv6 if the node may announce IPv6 networks.
fn of_families(
    all: NodeIps,
    families: NodeIpFamilies,
    pods: &[IpNet],
    allowed: &[IpNet],
) -> NodeIps {
    let has_v6 = |nets: &[IpNet]| nets.iter().any(|net| matches!(net, IpNet::V6(_)));
    let has_v4 = |nets: &[IpNet]| nets.iter().any(|net| matches!(net, IpNet::V4(_)));
    let (v4, v6) = match families {
        NodeIpFamilies::Ipv4 => (true, false),
        NodeIpFamilies::Ipv6 => (false, true),
        NodeIpFamilies::Dual => (true, true),
        NodeIpFamilies::Auto if pods.is_empty() => (true, has_v6(allowed)),
        NodeIpFamilies::Auto => (has_v4(pods), has_v6(pods)),
    };
    NodeIps { v4: all.v4.filter(|_| v4), v6: all.v6.filter(|_| v6) }
}

fn joined(state_dir: &Path) -> anyhow::Result<Membership> {
    Ok(StateDir::peek(state_dir).require_membership()?)
}

/// Returns the node IPs that an agent on this machine would announce.
fn of_the_machine(config: &Config, membership: &Membership) -> anyhow::Result<NodeIps> {
    let mesh = &membership.mesh;
    let policy =
        CandidatePolicy { own_link: config.link.name.clone(), excluded: mesh.overlays().to_vec() };
    let mut network = HostNetwork::open().context("cannot open a netlink socket")?;
    let found = network.connectivity(&policy, 0).context("cannot read this machine's addresses")?;
    Ok(NodeIps::first(found.node_ips))
}

#[cfg(test)]
mod tests {
    use towline_fixtures::node::nets;

    use super::*;

    #[test]
    fn the_kubelet_gets_the_families_of_its_cluster() {
        use NodeIpFamilies::{Auto, Dual, Ipv4, Ipv6};
        let all = NodeIps::first(["198.19.0.2".parse().unwrap(), "fd00::2".parse().unwrap()]);
        let dual = ["10.244.0.0/16", "fd00:10::/56"];
        for (families, pods, allowed, expected) in [
            // Before the Node object is known, the prefixes of the token tell.
            (Auto, &[][..], &[][..], "198.19.0.2"),
            (Auto, &[], &dual[..1], "198.19.0.2"),
            (Auto, &[], &dual, "198.19.0.2,fd00::2"),
            (Auto, &[], &dual[1..], "198.19.0.2,fd00::2"),
            (Auto, &dual, &[], "198.19.0.2,fd00::2"),
            (Auto, &dual[..1], &dual, "198.19.0.2"),
            (Auto, &dual[1..], &dual, "fd00::2"),
            (Ipv4, &dual, &dual, "198.19.0.2"),
            (Ipv6, &[], &[], "fd00::2"),
            (Dual, &[], &[], "198.19.0.2,fd00::2"),
        ] {
            let found = of_families(all, families, &nets(pods), &nets(allowed));
            let found: Vec<String> = found.iter().map(|ip| ip.to_string()).collect();
            assert_eq!(found.join(","), expected, "{families:?} {pods:?} {allowed:?}");
        }
    }
}
