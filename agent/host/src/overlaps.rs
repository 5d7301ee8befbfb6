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
    /// True if the network lies in the overlay, which no configuration excepts.
    is_overlay: bool,
}

codes! { Overlap => "local-network-covered" }

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { link, network, guarded, is_overlay } = self;
        if *is_overlay {
            return write!(
                f,
                "the network {network} of the link {link} is cut off: it lies in the mesh's overlay \
                 {guarded}: give the link another network"
            );
        }
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

/// Returns the networks that are cut off by a plan, in a mesh with these overlay ranges. Another node's own
/// address in a network does not cut it off.
pub(super) fn find(plan: &Plan, overlay: &[IpNet], addresses: &[LocalAddress]) -> Vec<Overlap> {
    let mut found: Vec<Overlap> = Vec::new();
    for local in addresses {
        let network = local.prefix.trunc();
        let is_meant = local.up
            && !local.loopback
            && local.link != plan.link.name
            && !is_host(&network)
            && is_global(network.addr());
        if !is_meant {
            continue;
        }
        let covers = |guarded: &&IpNet| {
            guarded.contains(&network) || network.contains(*guarded) && !is_host(guarded)
        };
        if let Some(guarded) = plan.firewall.guarded.iter().find(covers) {
            let is_overlay = overlay.iter().any(|range| range.contains(&network));
            let link = local.link.clone();
            let overlap = Overlap { link, network, guarded: *guarded, is_overlay };
            if !found.contains(&overlap) {
                found.push(overlap);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_fixtures::agent;

    fn on(link: &str, prefix: &str) -> LocalAddress {
        LocalAddress::on(2, link, prefix)
    }

    #[test]
    fn what_is_cut_off_is_named_with_what_helps() {
        let mut plan = agent::plan();
        plan.firewall.guarded = ["192.168.0.0/16", "10.0.5.0/24", "10.0.0.9/32", "198.19.0.0/16"]
            .map(|net| net.parse().unwrap())
            .into();
        let addresses = [
            on("eth0", "192.168.1.10/24"),
            on("eth0", "192.168.1.11/24"),
            on("eth1", "10.0.0.5/16"),
            on("eth2", "198.19.7.1/24"),
            on("eth3", "203.0.113.9/24"),
            on("lo", "192.168.2.1/24"),
            on("towline0", "192.168.3.1/24"),
            on("eth4", "192.168.4.1/32"),
        ];
        let overlay = ["198.19.0.0/16".parse().unwrap()];
        let found: Vec<_> =
            find(&plan, &overlay, &addresses).iter().map(ToString::to_string).collect();
        assert_eq!(found.len(), 3, "{found:?}");
        for (line, words) in found.iter().zip([
            "192.168.1.0/24 of the link eth0 is cut off: the mesh's network 192.168.0.0/16 covers it",
            "a part of the network 10.0.0.0/16 of the link eth1 is cut off",
            "198.19.7.0/24 of the link eth2 is cut off: it lies in the mesh's overlay",
        ]) {
            assert!(line.contains(words), "{line}");
        }
        assert!(found[0].contains("local_networks") && !found[2].contains("local_networks"));
    }
}
