//! Lookup of relayed channels: what arrives on one from either of its two ends is forwarded to the
//! other one, without decrypting it.
//!
//! The core decides which nodes have a channel and where they are (`towline_core::forwarding`). A
//! worker looks up a channel once for each run of datagrams, and forwards the run from the receive
//! buffer without copying or splitting it. A [`Forwarding`] is immutable, as the peer table is: the
//! next one is built separately and replaces it in one step. What outlives the change (the budgets of
//! nodes, and whether a channel was used) is behind shared pointers.
//!
//! Each node has a budget of bits per second for all of its channels, and the sender is charged. A
//! datagram from a stranger costs one lookup. Nothing grows with the traffic of strangers.

#![deny(clippy::indexing_slicing)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;
use towline_core::forwarding::{ForwardingEnd, ForwardingPart, ForwardingTable};
use towline_core::path::{ChannelId, Path};
use towline_types::id::WireguardKey;
use towline_types::rate::{Rate, TokenBucket};

use super::drops::DropReason;

/// Decision about a run of datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forward {
    /// The run is forwarded unchanged on this path.
    To(Path),
    /// The run is dropped for this reason.
    Refused(DropReason),
    /// The channel is not in the table: this node may be its end.
    Unknown,
}

/// Immutable lookup table of the channels that this node relays. The default one has none.
#[derive(Debug, Default)]
pub struct Forwarding {
    /// Table of the core that this one was built from.
    source: ForwardingTable,
    /// Channels by [`ForwardingTable::part_of`]. Empty before the first table of the core.
    parts: Vec<Arc<Part>>,
    shared: Arc<Shared>,
}

/// Channels of one part of the table.
type Part = HashMap<ChannelId, Channel>;

/// State that successive tables share.
#[derive(Debug, Default)]
struct Shared {
    /// Number of bytes forwarded.
    bytes: AtomicU64,
    /// Budgets of the nodes that have a channel. Locked only while a table is built.
    budgets: Mutex<HashMap<WireguardKey, Weak<Budget>>>,
}

/// Token bucket of bits of one node.
type Budget = Mutex<TokenBucket>;

#[derive(Debug)]
struct Channel {
    ends: [End; 2],
    /// True if something was forwarded since the last [`Forwarding::take_used`].
    is_used: Arc<AtomicBool>,
}

#[derive(Debug)]
struct End {
    path: Path,
    is_proven: bool,
    budget: Arc<Budget>,
}

impl Forwarding {
    /// Builds the lookup table that replaces `self`. Parts that did not change are shared with it.
    pub fn next(&self, table: &ForwardingTable) -> Self {
        let before = self.source.parts().iter().zip(&self.parts);
        let mut before = before.map(Some).chain(std::iter::repeat(None));
        let parts = table.parts().iter().map(|part| match before.next().flatten() {
            Some((source, built)) if Arc::ptr_eq(source, part) => built.clone(),
            last => Arc::new(self.build(part, last.map(|(_, built)| &**built))),
        });
        let parts = parts.collect();
        Self { source: table.clone(), parts, shared: self.shared.clone() }
    }

    /// Decides about a run of `bytes` bytes that arrived on `channel`.
    pub fn forward(&self, now: Instant, from: &Path, channel: u64, bytes: usize) -> Forward {
        let channel = ChannelId(channel);
        let part = self.parts.get(ForwardingTable::part_of(channel));
        let Some(channel) = part.and_then(|part| part.get(&channel)) else {
            return Forward::Unknown;
        };
        let [a, b] = &channel.ends;
        let (sender, receiver) = if a.path.remote == from.remote {
            (a, b)
        } else if b.path.remote == from.remote {
            (b, a)
        } else {
            return Forward::Refused(DropReason::RelayStranger);
        };
        if !receiver.is_proven {
            return Forward::Refused(DropReason::RelayUnproven);
        }
        let bytes = bytes as u64;
        if !sender.budget.lock().take(&self.budget(), now, bytes.saturating_mul(8)) {
            return Forward::Refused(DropReason::RelayLimited);
        }
        // Most runs find it set: reading it does not take the cache line from other workers.
        if !channel.is_used.load(Ordering::Relaxed) {
            channel.is_used.store(true, Ordering::Relaxed);
        }
        self.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        Forward::To(receiver.path)
    }

    /// Returns the channels on which something was forwarded since the last call, in ascending order.
    pub fn take_used(&self) -> Vec<ChannelId> {
        let channels = self.parts.iter().flat_map(|part| part.iter());
        let used = channels.filter(|(_, channel)| channel.is_used.swap(false, Ordering::Relaxed));
        let mut used: Vec<ChannelId> = used.map(|(id, _)| *id).collect();
        used.sort_unstable();
        used
    }

    /// Returns the number of bytes forwarded since the start.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    fn budget(&self) -> Rate {
        self.source.budget()
    }

    /// Builds one part. Channels that were there before keep whether they were used.
    fn build(&self, part: &ForwardingPart, before: Option<&Part>) -> Part {
        let mut budgets = self.shared.budgets.lock();
        let channels = part.iter().map(|(id, ends)| {
            let known = before.and_then(|before| before.get(id));
            let is_used = known.map(|channel| channel.is_used.clone()).unwrap_or_default();
            let ends = ends.map(|end| {
                let ForwardingEnd { node, path, is_proven } = end;
                End { path, is_proven, budget: budget_of(&mut budgets, node) }
            });
            (*id, Channel { ends, is_used })
        });
        channels.collect()
    }
}

/// Returns the budget of a node, a new one if it has no channel yet.
fn budget_of(budgets: &mut HashMap<WireguardKey, Weak<Budget>>, node: WireguardKey) -> Arc<Budget> {
    if let Some(budget) = budgets.get(&node).and_then(Weak::upgrade) {
        return budget;
    }
    if budgets.len() == budgets.capacity() {
        // Those of nodes without channels. The core keeps a channel for longer than a budget needs
        // to become full again, so nobody gains a budget by closing channels.
        budgets.retain(|_, budget| budget.strong_count() > 0);
    }
    let budget = Arc::new(Budget::default());
    budgets.insert(node, Arc::downgrade(&budget));
    budget
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const BUDGET: Rate = Rate::per_second(80_000, 80_000);

    fn end(number: u8, port: u16) -> ForwardingEnd {
        ForwardingEnd { node: WireguardKey([number; 32]), path: at(number, port), is_proven: true }
    }

    fn at(number: u8, port: u16) -> Path {
        Path::direct(([192, 0, 2, number], port).into())
    }

    fn open() -> (Forwarding, ForwardingTable, Instant) {
        let mut table = ForwardingTable::new(BUDGET);
        table.insert(ChannelId(77), [end(1, 1), end(2, 1)]);
        (Forwarding::default().next(&table), table, Instant::now())
    }

    #[test]
    fn each_end_reaches_the_other_and_a_stranger_reaches_neither() {
        let (relay, _, now) = open();
        assert_eq!(relay.forward(now, &at(1, 1), 77, 100), Forward::To(at(2, 1)));
        assert_eq!(relay.forward(now, &at(2, 1), 77, 100), Forward::To(at(1, 1)));
        let stranger = Forward::Refused(DropReason::RelayStranger);
        assert_eq!(relay.forward(now, &at(9, 1), 77, 100), stranger);
        assert_eq!(relay.forward(now, &at(1, 1), 78, 100), Forward::Unknown);
        assert_eq!(Forwarding::default().forward(now, &at(1, 1), 77, 100), Forward::Unknown);
        assert_eq!((relay.bytes(), relay.take_used()), (200, vec![ChannelId(77)]));
        assert!(relay.take_used().is_empty());
    }

    #[test]
    fn a_node_that_moved_keeps_its_channels_and_its_budget() {
        let (relay, mut table, now) = open();
        assert_eq!(relay.forward(now, &at(2, 1), 77, 10_000), Forward::To(at(1, 1)));
        table.insert(ChannelId(77), [end(1, 1), end(2, 9)]);
        table.insert(ChannelId(99 << 56), [end(1, 1), end(3, 1)]);
        let next = relay.next(&table);
        assert_eq!(next.forward(now, &at(1, 1), 77, 100), Forward::To(at(2, 9)));
        let stranger = Forward::Refused(DropReason::RelayStranger);
        assert_eq!(next.forward(now, &at(2, 1), 77, 100), stranger);
        let limited = Forward::Refused(DropReason::RelayLimited);
        assert_eq!(next.forward(now, &at(2, 9), 77, 100), limited);
        assert_eq!((next.bytes(), next.take_used()), (10_100, vec![ChannelId(77)]));
    }

    #[test]
    fn nothing_is_forwarded_to_an_address_that_is_not_proven() {
        let (relay, mut table, now) = open();
        let unproven = ForwardingEnd { is_proven: false, ..end(2, 1) };
        table.insert(ChannelId(77), [end(1, 1), unproven]);
        let relay = relay.next(&table);
        let refused = Forward::Refused(DropReason::RelayUnproven);
        assert_eq!(relay.forward(now, &at(1, 1), 77, 100), refused);
        assert_eq!(relay.forward(now, &at(2, 1), 77, 100), Forward::To(at(1, 1)));
    }

    #[test]
    fn a_node_that_sends_too_much_harms_itself_alone_on_all_of_its_channels() {
        let (relay, mut table, now) = open();
        table.insert(ChannelId(78), [end(1, 1), end(3, 1)]);
        let relay = relay.next(&table);
        let through = |now, channel, to| {
            let sent = (0..30).map(|_| relay.forward(now, &at(1, 1), channel, 1_000));
            sent.filter(|forward| *forward == Forward::To(at(to, 1))).count()
        };
        assert_eq!(through(now, 77, 2), 10);
        assert_eq!(through(now, 78, 3), 0);
        assert_eq!(relay.forward(now, &at(2, 1), 77, 1_000), Forward::To(at(1, 1)));
        assert_eq!(through(now + Duration::from_millis(500), 78, 3), 5);
    }

    #[test]
    fn budgets_of_nodes_without_channels_are_removed() {
        let mut relay = Forwarding::default();
        for number in 0..200 {
            let mut table = ForwardingTable::new(BUDGET);
            table.insert(ChannelId(number.into()), [end(number, 1), end(number + 1, 1)]);
            relay = relay.next(&table);
        }
        assert!(relay.shared.budgets.lock().len() < 100);
    }
}
