//! The forwarding table: the channels of this node's relay as one comparable value, which the data
//! plane follows as it follows the peer table.

use std::collections::BTreeMap;
use std::sync::Arc;

use towline_types::id::WireguardKey;
use towline_types::rate::Rate;

use crate::path::{ChannelId, Path};

/// Number of parts of a table. A change copies one part, and the data plane builds that part alone
/// again, so that a relay with 100,000 channels copies some hundred of them for a new one.
const PARTS: usize = 256;

/// One of the two nodes that a channel is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForwardingEnd {
    /// Key of the node, whose budget is charged for what it sends.
    pub node: WireguardKey,
    /// Path to the node. What comes from its remote address comes from the node.
    pub path: Path,
    /// True once the node answered a challenge on that path. Until then nothing is forwarded to it:
    /// the node may have named somebody else's address.
    pub is_proven: bool,
}

/// Channels of one part of a table, each with its two ends.
pub type ForwardingPart = BTreeMap<ChannelId, [ForwardingEnd; 2]>;

/// The channels that this node relays, whole. The data plane forwards what arrives on one of them
/// from either of its ends to the other one, within the budget of the sender.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardingTable {
    /// Bits that one node may send, on all of its channels together.
    budget: Rate,
    /// Channels by [`Self::part_of`]; always [`PARTS`] of them.
    parts: Vec<Arc<ForwardingPart>>,
}

impl ForwardingTable {
    /// Creates a table without channels. `budget` counts bits.
    pub fn new(budget: Rate) -> Self {
        let empty: Arc<ForwardingPart> = Arc::default();
        Self { budget, parts: vec![empty; PARTS] }
    }

    /// Returns the number of the part that has a channel.
    pub fn part_of(channel: ChannelId) -> usize {
        // Channel numbers are random, so the parts have about the same size.
        (channel.0 >> 56) as usize % PARTS
    }

    /// Returns the parts. Two tables share those that are the same.
    pub fn parts(&self) -> &[Arc<ForwardingPart>] {
        &self.parts
    }

    /// Returns the rate of one node, in bits.
    pub fn budget(&self) -> Rate {
        self.budget
    }

    /// Returns the two ends of a channel.
    pub fn get(&self, channel: ChannelId) -> Option<&[ForwardingEnd; 2]> {
        self.parts.get(Self::part_of(channel))?.get(&channel)
    }

    /// Adds a channel, or replaces its ends.
    pub fn insert(&mut self, channel: ChannelId, ends: [ForwardingEnd; 2]) {
        if let Some(part) = self.parts.get_mut(Self::part_of(channel)) {
            Arc::make_mut(part).insert(channel, ends);
        }
    }

    /// Removes a channel. Returns its ends.
    pub(crate) fn remove(&mut self, channel: ChannelId) -> Option<[ForwardingEnd; 2]> {
        let part = self.parts.get_mut(Self::part_of(channel))?;
        Arc::make_mut(part).remove(&channel)
    }
}

impl Default for ForwardingTable {
    /// Returns the table of a node that relays nothing.
    fn default() -> Self {
        Self::new(Rate::per_second(0, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_copies_one_part_and_tables_are_compared_by_their_channels() {
        let end = |number: u8| ForwardingEnd {
            node: WireguardKey([number; 32]),
            path: Path::direct(([192, 0, 2, number], 51830).into()),
            is_proven: true,
        };
        let (first, second) = (ChannelId(7), ChannelId(7 << 56));
        let mut table = ForwardingTable::new(Rate::per_second(1, 1));
        table.insert(first, [end(1), end(2)]);
        let before = table.clone();
        table.insert(second, [end(1), end(3)]);
        assert_ne!(table, before);
        let shared = table.parts().iter().zip(before.parts());
        assert_eq!(shared.filter(|(a, b)| !Arc::ptr_eq(a, b)).count(), 1);
        assert_eq!(table.get(first), Some(&[end(1), end(2)]));
        assert_eq!(table.get(second), Some(&[end(1), end(3)]));
        assert_eq!(table.remove(second), Some([end(1), end(3)]));
        assert_eq!((table.get(second), &table), (None, &before));
    }
}
