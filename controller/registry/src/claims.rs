//! Index of the prefixes that nodes hold, and of their holders. A withheld prefix is not in it. The
//! rules for a claim are in `publish`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use towline_types::id::NodeId;

/// Held prefixes, by prefix and by node. A prefix has several holders only where their grants share it.
#[derive(Debug, Default)]
pub(super) struct Claims {
    holders: BTreeMap<IpNet, BTreeSet<NodeId>>,
    held: BTreeMap<NodeId, BTreeSet<IpNet>>,
}

impl Claims {
    /// Returns the first node that holds exactly this prefix.
    #[cfg(test)]
    pub(super) fn holder(&self, prefix: &IpNet) -> Option<NodeId> {
        self.holders.get(prefix)?.first().copied()
    }

    /// Returns whether a node holds exactly this prefix.
    pub(super) fn holds(&self, prefix: &IpNet, node: NodeId) -> bool {
        self.holders.get(prefix).is_some_and(|holders| holders.contains(&node))
    }

    /// Returns the prefixes that a node holds.
    pub(super) fn held_by(&self, node: NodeId) -> Vec<IpNet> {
        self.held.get(&node).map(|held| held.iter().copied().collect()).unwrap_or_default()
    }

    /// Returns every held prefix that overlaps `prefix`, including `prefix` itself.
    pub(super) fn overlapping(&self, prefix: &IpNet) -> Vec<(IpNet, NodeId)> {
        let wider = (0..prefix.prefix_len()).filter_map(|length| {
            let wider = IpNet::new(prefix.addr(), length).ok()?.trunc();
            self.holders.get(&wider).map(|holders| (wider, holders))
        });
        // Networks sort by address, then by length, so those inside `prefix` are adjacent.
        let inside = self
            .holders
            .range(first(prefix)..=last(prefix))
            .filter(|(other, _)| prefix.contains(*other))
            .map(|(other, holders)| (*other, holders));
        let each = |(net, holders): (IpNet, &BTreeSet<NodeId>)| -> Vec<(IpNet, NodeId)> {
            holders.iter().map(|holder| (net, *holder)).collect()
        };
        wider.chain(inside).flat_map(each).collect()
    }

    /// Makes `node` a holder of the prefix.
    pub(super) fn hold(&mut self, prefix: IpNet, node: NodeId) {
        self.holders.entry(prefix).or_default().insert(node);
        self.held.entry(node).or_default().insert(prefix);
    }

    /// Removes a holder of the prefix.
    pub(super) fn release(&mut self, prefix: &IpNet, node: NodeId) {
        if let Some(holders) = self.holders.get_mut(prefix) {
            holders.remove(&node);
            if holders.is_empty() {
                self.holders.remove(prefix);
            }
        }
        if let Some(held) = self.held.get_mut(&node) {
            held.remove(prefix);
            if held.is_empty() {
                self.held.remove(&node);
            }
        }
    }
}

/// Returns the first network in sort order that `prefix` can contain.
fn first(prefix: &IpNet) -> IpNet {
    prefix.trunc()
}

/// Returns the last network in sort order that `prefix` can contain: the host network of its last
/// address.
fn last(prefix: &IpNet) -> IpNet {
    let address: IpAddr = match prefix {
        IpNet::V4(net) => net.broadcast().into(),
        IpNet::V6(net) => net.broadcast().into(),
    };
    IpNet::from(address)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_overlaps_is_found_whether_wider_narrower_or_equal() {
        let mut claims = Claims::default();
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        for (i, text) in ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.2.0.0/16", "fd00::/8"]
            .into_iter()
            .enumerate()
        {
            claims.hold(net(text), NodeId([i as u8; 16]));
        }
        let found = |text: &str| -> Vec<String> {
            claims.overlapping(&net(text)).into_iter().map(|(p, _)| p.to_string()).collect()
        };
        assert_eq!(found("10.1.0.0/16"), ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24"]);
        assert_eq!(found("10.1.2.3/32"), ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24"]);
        assert_eq!(found("11.0.0.0/8"), Vec::<String>::new());
        assert_eq!(found("fd00:1::/32"), ["fd00::/8"]);
    }

    proptest! {
        #[test]
        fn the_index_agrees_with_a_plain_search(
            nets in prop::collection::vec((0u32..256, 24u8..=32), 0..24),
            asked in (0u32..256, 24u8..=32),
        ) {
            let net = |(host, length): (u32, u8)| {
                IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 + host).into(), length)
                    .unwrap()
                    .trunc()
            };
            let mut claims = Claims::default();
            for (i, pair) in nets.iter().enumerate() {
                claims.hold(net(*pair), NodeId([i as u8; 16]));
            }
            let asked = net(asked);
            let found: BTreeSet<IpNet> =
                claims.overlapping(&asked).into_iter().map(|(p, _)| p).collect();
            let plain: BTreeSet<IpNet> = nets
                .iter()
                .map(|pair| net(*pair))
                .filter(|p| p.contains(&asked) || asked.contains(p))
                .collect();
            prop_assert_eq!(found, plain);
        }
    }
}
