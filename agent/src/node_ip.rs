//! Determines the node IPs, by which other nodes reach this one, for the kubelet's `--node-ip`
//! (`towline node-ip`).
//!
//! With `node.addressing = "overlay"` they are the node's overlay addresses, known since the join.
//! With `"node-ip"` they are the machine's own addresses: those of the configuration, or else those
//! that the agent announced last, or else (before its first start) those that it would announce.

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, bail};

use crate::config::{Addressing, Config};
use crate::state::{Membership, StateDir};
use towline_host::{CandidatePolicy, HostNetwork};

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

fn joined(state_dir: &Path) -> anyhow::Result<Membership> {
    Ok(StateDir::peek(state_dir).require_membership()?)
}

/// Returns the node IPs that an agent on this machine would announce.
fn of_the_machine(config: &Config, membership: &Membership) -> anyhow::Result<NodeIps> {
    let mesh = &membership.mesh;
    let policy = CandidatePolicy {
        own_link: config.link.name.clone(),
        excluded: vec![mesh.overlay_v6.into(), mesh.overlay_v4.into()],
    };
    let mut network = HostNetwork::open().context("cannot open a netlink socket")?;
    Ok(NodeIps::first(network.node_ips(&policy).context("cannot read this machine's addresses")?))
}
