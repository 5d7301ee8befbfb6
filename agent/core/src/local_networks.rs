//! Networks of this host that keep working although others announce them, or a network around them.
//!
//! | network | stays as it is while the host is connected to it, unless |
//! |---|---|
//! | listed by the operator | it lies in the overlay |
//! | connected when the node joined | it overlaps the overlay or a protected range, or lies in what another node holds and does not call a LAN: a DHCP server could open the mesh with it |
//!
//! Each address is judged by the longest prefix: what others hold inside a local network is guarded, and a
//! local network inside of that is not.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use towline_types::ownership::overlap;

use crate::prefixes::{by_longest_prefix, covering, is_host};

/// Networks that keep working on this host although others announce them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalNetworks {
    /// Networks that the operator lists.
    pub configured: Vec<IpNet>,
    /// Networks to which the host was connected when it joined. A network that is connected later is
    /// not trusted: a DHCP server could open the mesh with it.
    pub joined: Vec<IpNet>,
}

/// Greatest number of local networks that stay as they are. Each takes two policy rules; further ones are
/// guarded.
const MOST: usize = 64;

/// A local network to which the host is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LocalNetwork {
    pub(crate) origin: Origin,
    /// Network of the host's link; the local network is this one, or lies in it.
    pub(crate) connected: IpNet,
}

/// Reason why a network of this host may stay as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Origin {
    /// The operator lists it.
    Configured,
    /// The host was connected to it when it joined.
    Joined,
}

/// Local networks, and those of them to which the host is connected now. A host that left a network
/// would send what is for it by its default route, so that network is guarded like all others.
#[derive(Debug, Default)]
pub(crate) struct ConnectedNetworks {
    networks: LocalNetworks,
    /// Networks of the host's links.
    connected: BTreeSet<IpNet>,
    /// Local networks among the connected ones. Derived from the other fields.
    present: BTreeMap<IpNet, LocalNetwork>,
}

impl ConnectedNetworks {
    /// Sets the local networks. Returns whether other ones are present now.
    pub(crate) fn set_networks(&mut self, networks: LocalNetworks) -> bool {
        self.networks = networks;
        self.derive()
    }

    /// Sets the networks of the host's links. Returns whether other local networks are present now.
    pub(crate) fn set_connected(&mut self, connected: BTreeSet<IpNet>) -> bool {
        self.connected = connected;
        self.derive()
    }

    /// Returns the local networks to which the host is connected.
    pub(crate) fn present(&self) -> &BTreeMap<IpNet, LocalNetwork> {
        &self.present
    }

    /// Returns whether a network overlaps a local network to which the host is connected.
    pub(crate) fn touches(&self, net: &IpNet) -> bool {
        self.present.keys().any(|local| overlap(local, net))
    }

    fn derive(&mut self) -> bool {
        let LocalNetworks { configured, joined } = &self.networks;
        let joined = joined.iter().map(IpNet::trunc).filter(|net| self.connected.contains(net));
        let joined =
            joined.map(|net| (net, LocalNetwork { origin: Origin::Joined, connected: net }));
        // Of two networks that overlap, the longer prefix is what they have in common. A network sorts before
        // those in it, so that the longest of several connected ones comes last, and stays.
        let common = |net: IpNet| {
            let near = self.connected.iter().filter(move |other| overlap(other, &net));
            near.map(move |other| {
                let common = if other.contains(&net) { net } else { *other };
                (common, LocalNetwork { origin: Origin::Configured, connected: *other })
            })
        };
        let all = joined.chain(configured.iter().map(IpNet::trunc).flat_map(common));
        // A default route is no network of this host, and a host address is another's node IP.
        let present = all.filter(|(net, _)| net.prefix_len() > 0 && !is_host(net)).collect();
        let is_other = self.present != present;
        self.present = present;
        is_other
    }
}

/// Returns the first [`MOST`] of these networks, those that the operator lists first, each with the network
/// of the link that it lies in.
pub(crate) fn bounded<'a>(
    networks: impl Iterator<Item = (&'a IpNet, &'a LocalNetwork)>,
) -> BTreeMap<IpNet, IpNet> {
    let mut networks: Vec<_> = networks.collect();
    networks.sort_by_key(|(_, local)| local.origin);
    networks.into_iter().take(MOST).map(|(net, local)| (*net, local.connected)).collect()
}

/// Returns the fewest networks that cover `nets`, less each part of which a network in `local` is the
/// longest prefix.
pub(crate) fn guarded(nets: &BTreeSet<IpNet>, local: &BTreeMap<IpNet, IpNet>) -> BTreeSet<IpNet> {
    let is_inside = |net: &IpNet| local.keys().any(|own| own != net && own.contains(net));
    let inside = nets.iter().filter(|net| is_inside(net)).copied();
    by_longest_prefix(covering(nets.iter().copied()), inside, local.keys().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(list: &[&str]) -> BTreeSet<IpNet> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_longest_prefix_decides_what_is_guarded() {
        for (held, local, expected) in [
            (&["10.1.0.0/16"][..], &["10.0.0.0/8"][..], &["10.1.0.0/16"][..]),
            (&["10.1.0.0/16"], &["10.0.0.0/8", "10.1.0.0/16"], &[]),
            (&["10.0.0.0/8", "10.1.2.0/24"], &["10.0.0.0/8", "10.1.0.0/16"], &["10.1.2.0/24"]),
            (&["10.0.0.0/8", "10.1.2.0/24", "10.1.2.3/32"], &["10.0.0.0/8"], &["10.1.2.0/24"]),
            (&["10.0.0.0/8", "10.1.0.0/16"], &["10.0.0.0/8", "10.1.0.0/17"], &["10.1.128.0/17"]),
        ] {
            let local = nets(local).into_iter().map(|net| (net, net)).collect();
            assert_eq!(guarded(&nets(held), &local), nets(expected), "{held:?} {local:?}");
        }
    }

    #[test]
    fn a_network_is_present_only_while_the_host_is_connected_to_it() {
        let mut networks = ConnectedNetworks::default();
        let list = |list: &[&str]| nets(list).into_iter().collect::<Vec<_>>();
        assert!(!networks.set_networks(LocalNetworks {
            configured: list(&["172.16.0.0/12", "10.9.0.0/16"]),
            joined: list(&["192.168.1.0/24", "192.168.2.0/24"]),
        }));
        assert!(networks.set_connected(nets(&[
            "192.168.1.0/24",
            "172.17.0.0/16",
            "203.0.113.0/24"
        ])));
        let present: Vec<_> = networks.present().keys().map(ToString::to_string).collect();
        assert_eq!(present, ["172.17.0.0/16", "192.168.1.0/24"]);
        let connected = nets(&["10.0.0.0/8", "10.9.0.0/20", "192.168.1.0/24", "172.17.0.0/16"]);
        assert!(networks.set_connected(connected));
        let of = |text: &str| {
            let net: IpNet = text.parse().unwrap();
            networks.present()[&net].connected.to_string()
        };
        assert_eq!(of("10.9.0.0/16"), "10.0.0.0/8");
        assert_eq!(of("10.9.0.0/20"), "10.9.0.0/20");
        assert!(networks.touches(&"192.168.1.7/32".parse().unwrap()));
        assert!(networks.set_connected(nets(&["192.168.1.0/24", "172.17.0.0/16"])));
        let more = nets(&["192.168.1.0/24", "172.17.0.0/16", "203.0.113.0/24"]);
        assert!(!networks.set_connected(more), "no change");
        assert!(networks.set_connected(BTreeSet::new()));
        assert!(networks.present().is_empty());
    }
}
