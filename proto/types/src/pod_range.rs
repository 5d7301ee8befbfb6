//! Pod ranges: networks of which a node may announce a few blocks of equal size.
//!
//! The pod network of a cluster is divided into one block for each node, and Kubernetes decides which
//! block a node gets after it joined. A grant of the whole network would allow each node to announce
//! the blocks of all others. A pod range allows only a number of blocks: the controller pins those
//! that the node announces first, by adding them to the allowed prefixes of its grant. A pinned block
//! that the node does not announce any more makes room for another one.

use ipnet::IpNet;

use crate::limits;

/// Network of which a node may announce a few blocks of equal size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRange {
    /// Network that contains all blocks.
    range: IpNet,
    /// Prefix length of a block, at least that of `range`.
    block_len: u8,
    /// Greatest number of pinned blocks, from 1 to [`limits::POD_BLOCKS`].
    blocks: u32,
    /// Pinned blocks, in the order in which they were announced. Empty in the terms of a token.
    pinned: Vec<IpNet>,
}

/// Error of creating a [`PodRange`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPodRange {
    /// Host bits of the range are set.
    #[error("pod range {range} has host bits set: use {}", range.trunc())]
    HostBits {
        /// Network with host bits.
        range: IpNet,
    },
    /// The blocks are larger than the range, or smaller than one address.
    #[error(
        "the blocks of pod range {range} cannot be /{block_len}: use a length from {} to {}",
        range.prefix_len(),
        range.max_prefix_len()
    )]
    BlockLen {
        /// Network that should contain the blocks.
        range: IpNet,
        /// Prefix length of a block.
        block_len: u32,
    },
    /// The number of blocks is out of bounds.
    #[error("a node cannot have {blocks} blocks of a pod range: use 1 to {}", limits::POD_BLOCKS)]
    Blocks {
        /// Number of blocks.
        blocks: u32,
    },
    /// A pinned network is no block of the range, or there are too many.
    #[error("the pinned blocks of pod range {range} are not valid")]
    Pinned {
        /// Network that should contain the blocks.
        range: IpNet,
    },
}

impl PodRange {
    /// Creates a pod range with these pinned blocks.
    ///
    /// # Errors
    ///
    /// If the numbers do not fit the range, or a pinned network is no block of it.
    pub fn new(
        range: IpNet,
        block_len: u32,
        blocks: u32,
        pinned: Vec<IpNet>,
    ) -> Result<Self, InvalidPodRange> {
        if range.trunc() != range {
            return Err(InvalidPodRange::HostBits { range });
        }
        let lengths = range.prefix_len()..=range.max_prefix_len();
        let length = u8::try_from(block_len).ok().filter(|length| lengths.contains(length));
        let block_len = length.ok_or(InvalidPodRange::BlockLen { range, block_len })?;
        if !(1..=limits::POD_BLOCKS).contains(&blocks) {
            return Err(InvalidPodRange::Blocks { blocks });
        }
        let created = Self { range, block_len, blocks, pinned };
        let is_block = |net: &IpNet| created.block_around(net) == Some(*net);
        if created.pinned.len() > blocks as usize || !created.pinned.iter().all(is_block) {
            return Err(InvalidPodRange::Pinned { range });
        }
        Ok(created)
    }

    /// Returns the network that contains all blocks.
    pub fn range(&self) -> IpNet {
        self.range
    }

    /// Returns the prefix length of a block.
    pub fn block_len(&self) -> u8 {
        self.block_len
    }

    /// Returns the greatest number of blocks.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Returns the pinned blocks.
    pub fn pinned(&self) -> &[IpNet] {
        &self.pinned
    }

    /// Returns the block in which a network lies. A wider network lies in none.
    pub fn block_around(&self, net: &IpNet) -> Option<IpNet> {
        if !self.range.contains(net) || net.prefix_len() < self.block_len {
            return None;
        }
        IpNet::new(net.network(), self.block_len).ok().map(|block| block.trunc())
    }

    /// Makes room for one more block. Returns the pinned block that was given up for it: one in which none
    /// of the announced prefixes lies. `None` if every block is in use.
    pub(crate) fn make_room(&mut self, announced: &[IpNet]) -> Option<Option<IpNet>> {
        if self.pinned.len() < self.blocks as usize {
            return Some(None);
        }
        let is_unused = |pinned: &IpNet| !announced.iter().any(|net| pinned.contains(net));
        let at = self.pinned.iter().position(is_unused)?;
        Some(Some(self.pinned.remove(at)))
    }

    /// Pins a block, for which there is room.
    pub(crate) fn pin(&mut self, block: IpNet) {
        self.pinned.push(block);
    }
}

impl std::fmt::Display for PodRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { range, block_len, blocks, .. } = self;
        write!(f, "{range} ({blocks} of /{block_len})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::node::Grant;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn range(text: &str, block_len: u32, blocks: u32) -> PodRange {
        PodRange::new(net(text), block_len, blocks, Vec::new()).unwrap()
    }

    fn grant(allowed: &[&str], pod_ranges: Vec<PodRange>) -> Grant {
        Grant {
            allowed_prefixes: allowed.iter().map(|text| net(text)).collect(),
            pod_ranges,
            ..crate::node::tests::grant()
        }
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let new = |text: &str, length, blocks| {
            PodRange::new(net(text), length, blocks, Vec::new()).map(drop)
        };
        assert_eq!(new("10.244.0.0/16", 24, 1), Ok(()));
        assert_eq!(new("10.244.0.0/24", 24, 1), Ok(()));
        for length in [15, 33, 300] {
            let refused = new("10.244.0.0/16", length, 1);
            assert!(matches!(refused, Err(InvalidPodRange::BlockLen { .. })), "{length}");
        }
        for blocks in [0, limits::POD_BLOCKS + 1] {
            assert_eq!(new("10.244.0.0/16", 24, blocks), Err(InvalidPodRange::Blocks { blocks }));
        }
        assert!(matches!(new("10.244.1.0/16", 24, 1), Err(InvalidPodRange::HostBits { .. })));
        for pinned in [&["10.244.1.0/25"][..], &["10.245.1.0/24"], &["10.244.1.0/24"; 2]] {
            let pinned = pinned.iter().map(|text| net(text)).collect();
            let refused = PodRange::new(net("10.244.0.0/16"), 24, 1, pinned);
            assert!(matches!(refused, Err(InvalidPodRange::Pinned { .. })));
        }
    }

    #[test]
    fn what_is_announced_first_is_pinned_and_makes_room_once_it_is_not_announced() {
        let first = grant(&["192.0.2.1/32"], vec![range("10.244.0.0/16", 24, 1)]);
        let pinned = first.pin(&[net("192.0.2.1/32"), net("10.244.3.0/24")]).unwrap();
        assert!(pinned.allows(&net("10.244.3.0/24")) && pinned.allows(&net("192.0.2.1/32")));
        assert_eq!(pinned.pod_ranges[0].pinned(), [net("10.244.3.0/24")]);

        assert_eq!(pinned.pin(&[net("10.244.3.0/24")]), None, "it is allowed already");
        assert_eq!(pinned.pin(&[]), None, "it stays pinned while it is not announced");
        let both = [net("10.244.3.0/24"), net("10.244.4.0/24")];
        assert_eq!(pinned.pin(&both), None, "there is one block");

        let other = pinned.pin(&[net("10.244.4.0/24")]).unwrap();
        assert!(other.allows(&net("10.244.4.0/24")) && !other.allows(&net("10.244.3.0/24")));
    }

    #[test]
    fn a_part_of_a_block_takes_the_whole_block_and_a_wider_network_takes_none() {
        let first = grant(&[], vec![range("10.244.0.0/16", 24, 1), range("fd00:10::/48", 64, 2)]);
        let parts = [net("10.244.3.0/25"), net("10.244.3.192/26"), net("fd00:10:0:7::/64")];
        let pinned = first.pin(&parts).unwrap();
        assert!(parts.iter().all(|part| pinned.allows(part)));
        assert_eq!(pinned.allowed_prefixes, [net("10.244.3.0/24"), net("fd00:10:0:7::/64")]);
        for wide in ["10.244.2.0/23", "10.0.0.0/8", "10.245.0.0/24", "0.0.0.0/0"] {
            assert_eq!(first.pin(&[net(wide)]), None, "{wide}");
        }
    }

    proptest! {
        /// Whatever a node announces, one record after the other: it never gets more blocks than its
        /// token allows, and all of them lie in the range.
        #[test]
        fn a_node_never_has_more_blocks_than_its_token_allows(
            blocks in 1u32..4,
            records in prop::collection::vec(prop::collection::vec((0u32..16, 22u8..=32), 0..6), 0..12),
        ) {
            let mut grant = grant(&["192.0.2.0/24"], vec![range("10.244.0.0/20", 24, blocks)]);
            for record in records {
                let announced: Vec<IpNet> = record
                    .iter()
                    .map(|(block, length)| {
                        let address = std::net::Ipv4Addr::from(0x0af4_0000 + (block << 8));
                        IpNet::new(address.into(), *length).unwrap().trunc()
                    })
                    .collect();
                if let Some(pinned) = grant.pin(&announced) {
                    grant = pinned;
                }
                let inside: Vec<&IpNet> =
                    grant.allowed_prefixes.iter().filter(|net| **net != super::tests::net("192.0.2.0/24")).collect();
                prop_assert!(inside.len() <= blocks as usize);
                prop_assert!(inside.iter().all(|net| net.prefix_len() == 24));
                prop_assert!(inside.iter().all(|net| grant.pod_ranges[0].range().contains(*net)));
                prop_assert_eq!(inside.len(), grant.pod_ranges[0].pinned().len());
                let again = PodRange::new(
                    super::tests::net("10.244.0.0/20"), 24, blocks, grant.pod_ranges[0].pinned().to_vec(),
                );
                prop_assert!(again.is_ok());
            }
        }
    }
}
