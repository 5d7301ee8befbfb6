//! Sets of IP networks: who lies inside whom, and what is left when a part is taken out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

/// Values by network, with questions about networks around and inside a given one.
#[derive(Debug)]
pub(crate) struct PrefixMap<V> {
    by_net: BTreeMap<IpNet, V>,
    /// How many networks there are of each family (IPv6: true) and length, so that looking for
    /// the networks around one costs a lookup for each length in use, not for each possible one.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl<V> Default for PrefixMap<V> {
    fn default() -> Self {
        Self { by_net: BTreeMap::new(), lengths: BTreeMap::new() }
    }
}

impl<V> PrefixMap<V> {
    /// Adds a network, or replaces its value.
    pub(crate) fn insert(&mut self, net: IpNet, value: V) {
        if self.by_net.insert(net, value).is_none() {
            *self.lengths.entry((is_v6(&net), net.prefix_len())).or_default() += 1;
        }
    }

    /// Takes a network out.
    pub(crate) fn remove(&mut self, net: &IpNet) -> Option<V> {
        let value = self.by_net.remove(net)?;
        let length = (is_v6(net), net.prefix_len());
        if let Some(count) = self.lengths.get_mut(&length) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&length);
            }
        }
        Some(value)
    }

    /// The value of exactly this network.
    pub(crate) fn get(&self, net: &IpNet) -> Option<&V> {
        self.by_net.get(net)
    }

    /// Returns the value of exactly this network, to change it.
    pub(crate) fn get_mut(&mut self, net: &IpNet) -> Option<&mut V> {
        self.by_net.get_mut(net)
    }

    /// Every network that overlaps `net`: those around it (and itself), then those inside it.
    pub(crate) fn overlapping(&self, net: IpNet) -> impl Iterator<Item = (&IpNet, &V)> {
        let v6 = is_v6(&net);
        let around = self.lengths.range((v6, 0)..=(v6, net.prefix_len())).filter_map(
            move |((_, length), _)| {
                self.by_net.get_key_value(&IpNet::new(net.addr(), *length).ok()?.trunc())
            },
        );
        let inside = self
            .by_net
            .range(net..)
            .take_while(move |(other, _)| net.contains(&other.network()))
            .filter(move |(other, _)| **other != net);
        around.chain(inside)
    }
}

/// The networks without those that lie inside another.
pub fn covering(nets: impl IntoIterator<Item = IpNet>) -> BTreeSet<IpNet> {
    let sorted: BTreeSet<IpNet> = nets.into_iter().map(|net| net.trunc()).collect();
    let mut kept = BTreeSet::new();
    let mut last: Option<IpNet> = None;
    // A network sorts directly before all that lies inside it.
    for net in sorted {
        if last.is_none_or(|last| !last.contains(&net)) {
            kept.insert(net);
            last = Some(net);
        }
    }
    kept
}

/// `nets` with `holes` cut out, as the fewest networks that cover the rest.
///
/// `nets` must not overlap one another (see [`covering`]).
pub fn without(nets: BTreeSet<IpNet>, holes: &[IpNet]) -> BTreeSet<IpNet> {
    let mut rest = nets;
    for hole in holes {
        let touched: Vec<IpNet> =
            rest.iter().filter(|net| net.contains(hole) || hole.contains(*net)).copied().collect();
        for mut net in touched {
            rest.remove(&net);
            // Halve it until the half that is left over is the hole itself.
            while net.prefix_len() < hole.prefix_len() {
                let Ok(halves) = net.subnets(net.prefix_len() + 1) else { break };
                for half in halves {
                    if half.contains(hole) {
                        net = half;
                    } else {
                        rest.insert(half);
                    }
                }
            }
        }
    }
    rest
}

/// Adds the networks of `more` to `nets` and cuts those of `holes` out, the wider ones first: the longest
/// prefix decides, and of two equal networks the hole.
///
/// `nets` must not overlap one another, and no network of `more` may be wider than a network of `nets` inside it.
pub(crate) fn by_longest_prefix(
    nets: BTreeSet<IpNet>,
    more: impl IntoIterator<Item = IpNet>,
    holes: impl IntoIterator<Item = IpNet>,
) -> BTreeSet<IpNet> {
    let more = more.into_iter().map(|net| (net, false));
    let mut steps: Vec<_> = more.chain(holes.into_iter().map(|net| (net, true))).collect();
    steps.sort_unstable_by_key(|(net, is_hole)| (net.prefix_len(), *is_hole));
    let mut rest = nets;
    for (net, is_hole) in steps {
        if is_hole {
            rest = without(rest, &[net]);
        } else if !rest.range(..=net).next_back().is_some_and(|wider| wider.contains(&net)) {
            rest.insert(net);
        }
    }
    rest
}

/// Whether the network is one address.
pub fn is_host(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// Whether the address belongs to some private network rather than to the internet: private,
/// shared (carrier NAT), link-local or loopback.
pub fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || (a == 100 && b & 0xc0 == 64)
        }
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

/// Returns whether a NAT may be on the way to an address: there is none on a LAN, nor over IPv6.
pub(crate) fn is_behind_nat(remote: SocketAddr) -> bool {
    remote.is_ipv4() && !is_private(remote.ip())
}

fn is_v6(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn overlaps_are_found_around_and_inside() {
        let mut map = PrefixMap::default();
        for text in ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.2.0.0/16", "fd00::/64"] {
            map.insert(net(text), ());
        }
        let overlapping = |text: &str| {
            map.overlapping(net(text)).map(|(net, ())| net.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(overlapping("10.1.0.0/16"), ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24"]);
        assert_eq!(overlapping("10.1.2.3/32"), ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24"]);
        assert_eq!(overlapping("11.0.0.0/8"), [""; 0]);
        assert_eq!(overlapping("fd00::7/128"), ["fd00::/64"]);
    }

    #[test]
    fn a_hole_leaves_exactly_the_rest() {
        let rest = without([net("10.0.0.0/22")].into(), &[net("10.0.1.0/24")]);
        assert_eq!(rest, [net("10.0.0.0/24"), net("10.0.2.0/23")].into());
        assert_eq!(without([net("10.0.0.0/24")].into(), &[net("10.0.0.0/16")]), [].into());
        assert_eq!(without([net("10.0.0.0/24")].into(), &[net("11.0.0.0/16")]).len(), 1);
    }

    #[test]
    fn what_lies_inside_another_is_left_out() {
        let nets = ["10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/8", "fd00::/8", "fd00::1/128"].map(net);
        assert_eq!(covering(nets), ["10.0.0.0/8", "11.0.0.0/8", "fd00::/8"].map(net).into());
    }
}
