//! Finds networks of the host that the guards cut off, since they lie in a network of the mesh. It
//! changes nothing.

use std::fmt;

use ipnet::IpNet;
use towline_core::plan::Plan;
use towline_core::prefixes::is_host;
use towline_types::codes;

use super::address::LocalAddress;
use super::candidates::is_global;

/// Network of a link of this host, all or a part of which is a network of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlap {
    /// Name of the link.
    link: String,
    /// Network of the link.
    network: IpNet,
    /// Network of the mesh.
    guarded: IpNet,
}

codes! { Overlap => "local-network-covered" }

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { link, network, guarded } = self;
        if guarded.contains(network) {
            return write!(
                f,
                "the network {network} of the link {link} is cut off: the mesh's network {guarded} \
                 covers it: add {network} to [node] local_networks if it has nothing to do with the \
                 mesh, or change one of the two networks"
            );
        }
        write!(
            f,
            "a part of the network {network} of the link {link} is cut off: the mesh has the network \
             {guarded}: add it to [node] exclude_prefixes of the node that announces it if it has \
             nothing to do with the mesh, or change one of the two networks"
        )
    }
}

/// Returns the networks that are cut off. Another node's own address in a network is not meant.
pub(super) fn find(plan: &Plan, addresses: &[LocalAddress]) -> Vec<Overlap> {
    let mut found: Vec<Overlap> = Vec::new();
    for local in addresses {
        let network = local.prefix.trunc();
        let is_meant = local.up
            && !local.loopback
            && local.link != plan.link.name
            && !is_host(&network)
            && is_global(network.addr());
        let covers = |guarded: &&IpNet| {
            guarded.contains(&network) || network.contains(*guarded) && !is_host(guarded)
        };
        if let Some(guarded) = plan.firewall.guarded.iter().find(covers).filter(|_| is_meant) {
            let overlap = Overlap { link: local.link.clone(), network, guarded: *guarded };
            if !found.contains(&overlap) {
                found.push(overlap);
            }
        }
    }
    found
}
