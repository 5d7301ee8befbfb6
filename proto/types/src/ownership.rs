//! Prefix ownership: the one rule by which the controller and every agent decide who may hold a
//! prefix.
//!
//! - A node always holds its own overlay addresses.
//! - No node holds another part of an overlay range, or a range in which hosts are not unicast.
//! - Nodes whose grants share a prefix in one group may all hold it.
//! - A node holds at most [`GUARDED_PREFIXES`](crate::limits::GUARDED_PREFIXES) prefixes outside the ranges
//!   that the mesh guards, the first ones of its record.
//! - Two nodes hold overlapping prefixes only if one prefix lies inside the other, and the grant of
//!   the node with the nested prefix names exactly that prefix. The node chose a pinned block of a pod
//!   range itself, so that it only counts as named inside of a network that contains the whole range.
//!
//! Which of two claims came first is not decided here: the controller keeps the present holder, an
//! agent prefers the earlier grant.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::codes;
use crate::node::{Grant, MeshConfig};
use crate::pod_range::PodRange;

/// IPv4 ranges that no node may announce: this network, loopback, link-local, and multicast with
/// what is reserved above it (RFC 6890).
const NO_HOSTS_V4: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3),
];
/// IPv6 ranges that no node may announce: unspecified and loopback, link-local, multicast
/// (RFC 6890).
const NO_HOSTS_V6: [Ipv6Net; 3] = [
    Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 127),
    Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
    Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
];

/// Claim of a node to a prefix.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// Grant of the node that claims the prefix.
    pub grant: &'a Grant,
    /// Prefix that the node claims: one that its record announces, or an overlay address.
    pub prefix: IpNet,
}

/// Reason why no node may hold a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// The prefix overlaps an overlay range of the mesh.
    #[error("prefix {prefix} overlaps the mesh's own range {overlay}: announce another")]
    Overlay {
        /// Claimed prefix.
        prefix: IpNet,
        /// Overlay range of the mesh.
        overlay: IpNet,
    },
    /// The prefix is a default route, or contains addresses that are not unicast hosts.
    #[error("prefix {prefix} is not a range of unicast hosts: remove it")]
    NoHosts {
        /// Claimed prefix.
        prefix: IpNet,
    },
}

codes! {
    Unusable {
        Overlay => "prefix-in-overlay",
        NoHosts => "prefix-not-unicast",
    }
}

/// Reason why a node may not hold a prefix.
#[derive(Debug, Clone, Copy)]
pub enum Refused<'a> {
    /// No node may hold it.
    Unusable(Unusable),
    /// Another node holds the same or an overlapping prefix.
    Held(Claim<'a>),
}

/// Decides whether the node of `claim` may hold its prefix beside `held`, the claims that are held
/// already. Those that do not overlap the prefix make no difference.
pub fn check<'a>(
    claim: Claim<'_>,
    mesh: &MeshConfig,
    held: impl IntoIterator<Item = Claim<'a>>,
) -> Result<(), Refused<'a>> {
    if !claim.is_overlay_address() {
        usable(claim.prefix, mesh).map_err(Refused::Unusable)?;
    }
    match held.into_iter().find(|other| claim.conflicts_with(*other)) {
        Some(other) => Err(Refused::Held(other)),
        None => Ok(()),
    }
}

/// Checks that a node may hold `prefix` in this mesh if no other node claims it.
pub fn usable(prefix: IpNet, mesh: &MeshConfig) -> Result<(), Unusable> {
    if prefix.prefix_len() == 0 || no_hosts().any(|range| overlap(&range, &prefix)) {
        return Err(Unusable::NoHosts { prefix });
    }
    if let Some(overlay) = mesh.overlays().into_iter().find(|overlay| overlap(overlay, &prefix)) {
        return Err(Unusable::Overlay { prefix, overlay });
    }
    Ok(())
}

/// Returns whether a prefix counts towards [`GUARDED_PREFIXES`](crate::limits::GUARDED_PREFIXES), of which a
/// node holds no more: every node guards it by itself. Others lie in a range that is guarded anyway.
pub fn is_guarded_alone(prefix: IpNet, mesh: &MeshConfig) -> bool {
    !mesh.guarded().any(|range| range.contains(&prefix))
}

/// Returns whether a grant of `prefix` allows nothing: no part of it can be announced in this mesh.
pub fn is_useless_grant(prefix: IpNet, mesh: &MeshConfig) -> bool {
    mesh.overlays().into_iter().chain(no_hosts()).any(|range| range.contains(&prefix))
}

/// Returns whether the networks have an address in common.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

fn no_hosts() -> impl Iterator<Item = IpNet> {
    NO_HOSTS_V4.into_iter().map(IpNet::V4).chain(NO_HOSTS_V6.into_iter().map(IpNet::V6))
}

impl Claim<'_> {
    /// Returns whether the two nodes cannot both hold their prefixes.
    pub fn conflicts_with(&self, other: Claim<'_>) -> bool {
        if self.grant.node_id == other.grant.node_id || !overlap(&self.prefix, &other.prefix) {
            return false;
        }
        match self.prefix.prefix_len().cmp(&other.prefix.prefix_len()) {
            std::cmp::Ordering::Equal => !self.is_shared_with(other),
            std::cmp::Ordering::Greater => !self.is_named_inside(&other.prefix),
            std::cmp::Ordering::Less => !other.is_named_inside(&self.prefix),
        }
    }

    /// Returns whether both grants share the prefix in one group.
    fn is_shared_with(&self, other: Claim<'_>) -> bool {
        let group = self.grant.sharing(&self.prefix);
        group.is_some() && group == other.grant.sharing(&other.prefix)
    }

    /// Returns whether the grant names exactly this prefix, so that it may lie inside of a wider one of
    /// another node.
    fn is_named_inside(&self, wider: &IpNet) -> bool {
        let is_chosen = |range: &PodRange| {
            range.pinned().contains(&self.prefix) && !wider.contains(&range.range())
        };
        let is_named = self.grant.allowed_prefixes.contains(&self.prefix)
            && !self.grant.pod_ranges.iter().any(is_chosen);
        is_named || self.is_overlay_address()
    }

    fn is_overlay_address(&self) -> bool {
        self.grant.overlay.contains_prefix(&self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::id::{IdentityKey, MeshId, NodeId, WireguardKey};
    use crate::node::{OverlayAddresses, SharedPrefix};

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn mesh() -> MeshConfig {
        MeshConfig {
            mesh_id: MeshId([1; 16]),
            overlay_v6: "fd00:7::/64".parse().unwrap(),
            overlay_v4: "198.19.0.0/16".parse().unwrap(),
            protected: Vec::new(),
            lease: Duration::from_secs(600),
            trusted_sites: Vec::new(),
            bypass_when_down: Vec::new(),
            controllers: Vec::new(),
            generation: 1,
            epoch: 0,
        }
    }

    fn grant(number: u8, allowed: &[IpNet]) -> Grant {
        Grant {
            mesh_id: MeshId([1; 16]),
            node_id: NodeId([number; 16]),
            name: format!("node-{number}").parse().unwrap(),
            identity_key: IdentityKey([number; 32]),
            wireguard_keys: vec![WireguardKey([number; 32])],
            overlay: OverlayAddresses {
                v6: format!("fd00:7::{number}").parse().unwrap(),
                v4: [198, 19, 0, number].into(),
            },
            allowed_prefixes: allowed.to_vec(),
            ..crate::node::tests::grant()
        }
    }

    #[test]
    fn a_range_that_contains_unusable_addresses_is_unusable_wherever_it_starts() {
        for bad in [
            "0.0.0.0/0",
            "::/0",
            "126.0.0.0/7",
            "127.1.0.0/16",
            "168.0.0.0/6",
            "128.0.0.0/1",
            "224.0.0.0/8",
            "255.255.255.255/32",
            "::/8",
            "fe00::/8",
            "fe80::/64",
            "ff02::1/128",
        ] {
            assert_eq!(
                usable(net(bad), &mesh()),
                Err(Unusable::NoHosts { prefix: net(bad) }),
                "{bad}"
            );
        }
        for overlay in ["198.18.0.0/15", "198.19.4.0/24", "fd00:7::/32", "fd00:7::9/128"] {
            let refused = usable(net(overlay), &mesh());
            assert!(matches!(refused, Err(Unusable::Overlay { .. })), "{overlay}");
        }
        for good in ["10.0.0.0/8", "192.168.0.0/16", "128.0.0.0/3", "fd00:8::/32", "2001:db8::/32"]
        {
            assert_eq!(usable(net(good), &mesh()), Ok(()), "{good}");
        }
    }

    #[test]
    fn a_node_holds_its_own_overlay_addresses_and_no_others() {
        let (a, b) = (grant(1, &[]), grant(2, &[]));
        let own = IpNet::from(std::net::IpAddr::V4(a.overlay.v4));
        assert!(check(Claim { grant: &a, prefix: own }, &mesh(), []).is_ok());
        let other = check(Claim { grant: &b, prefix: own }, &mesh(), []);
        assert!(matches!(other, Err(Refused::Unusable(Unusable::Overlay { .. }))));
    }

    #[test]
    fn a_block_that_a_node_chose_lies_in_the_whole_range_of_others_and_in_no_part_of_it() {
        let (range, block) = (net("10.244.0.0/16"), net("10.244.3.0/24"));
        let pinned = PodRange::new(range, 24, 1, vec![block]).unwrap();
        let chosen = Grant { pod_ranges: vec![pinned], ..grant(1, &[block]) };
        let wide = grant(2, &[net("10.0.0.0/8")]);
        let claim = Claim { grant: &chosen, prefix: block };
        for (other, is_conflict) in [
            ("10.0.0.0/8", false),
            ("10.244.0.0/16", false),
            ("10.244.0.0/17", true),
            ("10.244.2.0/23", true),
            ("10.244.3.0/24", true),
            ("10.244.3.0/25", true),
        ] {
            let other = Claim { grant: &wide, prefix: net(other) };
            assert_eq!(claim.conflicts_with(other), is_conflict, "{}", other.prefix);
            assert_eq!(other.conflicts_with(claim), is_conflict, "{}", other.prefix);
        }
    }

    #[test]
    fn nodes_of_one_group_hold_the_same_prefix() {
        let lan = net("192.168.50.0/24");
        let of = |number: u8, group: &str| {
            let shared = vec![SharedPrefix { prefix: lan, group: group.parse().unwrap() }];
            Grant { shared, ..grant(number, &[lan]) }
        };
        let (a, b, other, alone) = (of(1, "b"), of(2, "b"), of(3, "c"), grant(4, &[lan]));
        let claim = |grant| Claim { grant, prefix: lan };
        assert!(!claim(&a).conflicts_with(claim(&b)) && !claim(&b).conflicts_with(claim(&a)));
        for stranger in [&other, &alone] {
            assert!(claim(&a).conflicts_with(claim(stranger)));
            assert!(claim(stranger).conflicts_with(claim(&a)));
        }
        let part = Claim { grant: &b, prefix: net("192.168.50.0/25") };
        assert!(claim(&a).conflicts_with(part), "only the whole prefix is shared");
    }

    proptest! {
        /// Whatever two nodes claim: both sides of a conflict see it; equal prefixes always
        /// conflict and disjoint ones never; and nesting depends on the nested node's grant alone.
        #[test]
        fn every_node_decides_alike(
            a in (0u32..64, 26u8..=32),
            b in (0u32..64, 26u8..=32),
            named in (any::<bool>(), any::<bool>()),
        ) {
            let net = |(host, length): (u32, u8)| {
                IpNet::new(Ipv4Addr::from(0x0a00_0000 + host).into(), length).unwrap().trunc()
            };
            let (a, b) = (net(a), net(b));
            let allowed = |is_named, prefix| if is_named { vec![prefix] } else { vec![super::tests::net("10.0.0.0/8")] };
            let (of_a, of_b) = (grant(1, &allowed(named.0, a)), grant(2, &allowed(named.1, b)));
            let (claim_a, claim_b) =
                (Claim { grant: &of_a, prefix: a }, Claim { grant: &of_b, prefix: b });

            let refused = check(claim_a, &mesh(), [claim_b]).is_err();
            prop_assert_eq!(refused, check(claim_b, &mesh(), [claim_a]).is_err());
            let expected = if a == b {
                true
            } else if a.contains(&b) {
                !named.1
            } else if b.contains(&a) {
                !named.0
            } else {
                false
            };
            prop_assert_eq!(refused, expected);
            let same = Claim { grant: &of_a, prefix: b };
            prop_assert!(check(claim_a, &mesh(), [same]).is_ok(), "a node never conflicts with itself");
        }
    }
}
