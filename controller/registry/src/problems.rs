//! Problems of the nodes, for their operators. They are not stored.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use towline_types::id::NodeId;
use towline_types::limits;

/// Claim of a node to a prefix, which can cause problems of several nodes.
pub(super) type ClaimKey = (NodeId, IpNet);

/// First network in sort order.
const FIRST_NET: IpNet = IpNet::new_assert(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// A problem of a node.
#[derive(Debug)]
struct Problem {
    /// Claim that causes the problem. The problem is removed when the claim is settled.
    about: Option<ClaimKey>,
    text: String,
}

/// The problems of all nodes.
#[derive(Debug, Default)]
pub(super) struct Problems {
    by_node: BTreeMap<NodeId, VecDeque<Problem>>,
    /// Nodes that may have a problem because of a claim.
    by_claim: BTreeMap<ClaimKey, BTreeSet<NodeId>>,
    /// Nodes whose problems changed since the last [`Problems::take_changed`].
    changed: BTreeSet<NodeId>,
}

impl Problems {
    /// Adds a problem of a node at the front. Each text occurs only once.
    pub(super) fn note(&mut self, node: NodeId, about: Option<ClaimKey>, text: String) {
        let problems = self.by_node.entry(node).or_default();
        if problems.front().is_some_and(|first| first.text == text) {
            return;
        }
        problems.retain(|problem| problem.text != text);
        problems.push_front(Problem { about, text });
        problems.truncate(limits::PROBLEMS);
        if let Some(claim) = about {
            self.by_claim.entry(claim).or_default().insert(node);
        }
        self.changed.insert(node);
    }

    /// Removes the problems that a claim caused, since it is settled.
    pub(super) fn settle(&mut self, claim: ClaimKey) {
        for node in self.by_claim.remove(&claim).unwrap_or_default() {
            if let Some(problems) = self.by_node.get_mut(&node) {
                problems.retain(|problem| problem.about != Some(claim));
                self.changed.insert(node);
            }
        }
    }

    /// Removes all problems of a node that was removed, and those that its claims caused.
    pub(super) fn remove(&mut self, node: NodeId) {
        let claims = self.by_claim.range((node, FIRST_NET)..);
        let claims: Vec<ClaimKey> =
            claims.map(|(claim, _)| *claim).take_while(|(of, _)| *of == node).collect();
        for claim in claims {
            self.settle(claim);
        }
        let removed = self.by_node.remove(&node).unwrap_or_default();
        for claim in removed.into_iter().filter_map(|problem| problem.about) {
            if let Some(nodes) = self.by_claim.get_mut(&claim) {
                nodes.remove(&node);
                if nodes.is_empty() {
                    self.by_claim.remove(&claim);
                }
            }
        }
        self.changed.remove(&node);
    }

    /// Returns the problems of a node, newest first.
    pub(super) fn of(&self, node: NodeId) -> Vec<String> {
        let problems = self.by_node.get(&node);
        problems.into_iter().flatten().map(|problem| problem.text.clone()).collect()
    }

    /// Returns the nodes whose problems changed since the previous call.
    pub(super) fn take_changed(&mut self) -> BTreeSet<NodeId> {
        std::mem::take(&mut self.changed)
    }
}
