//! The newest summary of each node's tunnels, for operators.
//!
//! Summaries are what nodes say about themselves. They are kept in memory alone, at most one for each node,
//! and no decision depends on them.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use towline_proto::id::NodeId;
use towline_proto::summary::MeshSummary;

use towline_registry::Now;

/// Newest summary of each node.
#[derive(Debug, Default)]
pub struct Summaries(Mutex<BTreeMap<NodeId, KeptSummary>>);

/// A summary with the time at which it came.
#[derive(Debug, Clone)]
pub struct KeptSummary {
    /// Time at which the controller received the summary.
    pub at: Now,
    /// Summary, as the node sent it.
    pub summary: Arc<MeshSummary>,
}

impl Summaries {
    /// Keeps the summary of a node, instead of its previous one.
    pub fn report(&self, node: NodeId, summary: MeshSummary, now: Now) {
        self.0.lock().insert(node, KeptSummary { at: now, summary: Arc::new(summary) });
    }

    /// Forgets the summaries of nodes for which `is_member` returns `false`.
    pub fn retain(&self, is_member: impl Fn(NodeId) -> bool) {
        self.0.lock().retain(|node, _| is_member(*node));
    }

    /// Returns the newest summary of a node. `None` if it sent none since the controller's start.
    pub fn of(&self, node: NodeId) -> Option<KeptSummary> {
        self.0.lock().get(&node).cloned()
    }
}

#[cfg(test)]
mod tests {
    use towline_proto::summary::PeerCounts;

    use super::*;
    use crate::clock;

    #[test]
    fn there_is_one_summary_for_each_node_of_the_mesh() {
        let (summaries, now) = (Summaries::default(), clock::now());
        let (a, b) = (NodeId([1; 16]), NodeId([2; 16]));
        let with = |direct| MeshSummary {
            counts: PeerCounts { direct, ..Default::default() },
            ..Default::default()
        };
        for (node, direct) in [(a, 1), (b, 2), (a, 3)] {
            summaries.report(node, with(direct), now);
        }
        let direct = |node| summaries.of(node).map(|kept| kept.summary.counts.direct);
        assert_eq!((direct(a), direct(b)), (Some(3), Some(2)));
        summaries.retain(|node| node == b);
        assert_eq!((direct(a), direct(b)), (None, Some(2)));
    }
}
