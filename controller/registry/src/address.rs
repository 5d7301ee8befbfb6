//! Assignment of overlay addresses to new nodes.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use towline_types::id::NodeId;

/// Number of derived IPv6 addresses that are tried before the range counts as full. With ranges of
/// at least 2^16 addresses and at most [`limits::NODES`](towline_types::limits::NODES) nodes, the
/// first few are practically always enough.
const ATTEMPTS: u8 = 64;

/// Returns an IPv6 address whose host bits are derived from the node's id, which is random. If it is
/// taken, the next derivation is tried. The host part is never all zeros (RFC 4291 section 2.6.1).
pub(super) fn v6(
    range: Ipv6Net,
    node: NodeId,
    taken: impl Fn(Ipv6Addr) -> bool,
) -> Option<Ipv6Addr> {
    let host_mask = u128::from(range.hostmask());
    (0..ATTEMPTS).find_map(|attempt| {
        let host = u128::from_be_bytes(node.0).wrapping_add(attempt.into()) & host_mask;
        let address = Ipv6Addr::from(u128::from(range.network()) | host);
        (host != 0 && !taken(address)).then_some(address)
    })
}

/// Returns the next free IPv4 address after `cursor` (an offset into the range), and the new
/// cursor. Addresses are assigned in rotation, so that a freed address stays unused for as long as
/// possible: caches and firewalls elsewhere may still associate it with the removed node.
pub(super) fn v4(
    range: Ipv4Net,
    cursor: u32,
    taken: impl Fn(Ipv4Addr) -> bool,
) -> Option<(Ipv4Addr, u32)> {
    let network = u32::from(range.network());
    // Offsets from 1 to `last` exclude the network address and the broadcast address.
    let last = u32::from(range.hostmask()).saturating_sub(1);
    let mut offset = cursor.min(last);
    for _ in 0..last {
        offset = if offset >= last { 1 } else { offset + 1 };
        let address = Ipv4Addr::from(network + offset);
        if !taken(address) {
            return Some((address, offset));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ipv4_addresses_come_round_and_the_range_can_be_used_up() {
        let range: Ipv4Net = "198.19.0.0/29".parse().unwrap();
        let mut taken = BTreeSet::new();
        let mut cursor = 0;
        for host in 1..=6u8 {
            let (address, next) = v4(range, cursor, |a| taken.contains(&a)).unwrap();
            assert_eq!(address, Ipv4Addr::new(198, 19, 0, host));
            taken.insert(address);
            cursor = next;
        }
        assert_eq!(v4(range, cursor, |a| taken.contains(&a)), None);

        taken.remove(&Ipv4Addr::new(198, 19, 0, 2));
        taken.remove(&Ipv4Addr::new(198, 19, 0, 5));
        let (address, cursor) = v4(range, 3, |a| taken.contains(&a)).unwrap();
        assert_eq!((address, cursor), (Ipv4Addr::new(198, 19, 0, 5), 5));
    }

    #[test]
    fn ipv6_addresses_derive_from_the_node_and_avoid_taken_ones() {
        let range: Ipv6Net = "fd00:1:2:3::/64".parse().unwrap();
        let first = v6(range, NodeId([1; 16]), |_| false).unwrap();
        assert!(range.contains(&first));
        assert_eq!(v6(range, NodeId([1; 16]), |_| false), Some(first));
        assert_ne!(v6(range, NodeId([2; 16]), |_| false), Some(first));
        let second = v6(range, NodeId([1; 16]), |a| a == first).unwrap();
        assert!(second != first && range.contains(&second));
        assert_eq!(v6(range, NodeId([1; 16]), |_| true), None);
    }
}
