//! Problems of the nodes, for their operators. They are not stored.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use towline_types::codes;
use towline_types::id::{NodeId, NodeName};
use towline_types::limits;
use towline_types::node::NotGranted;
use towline_types::ownership::Unusable;

/// Claim of a node to a prefix, which can cause problems of several nodes.
pub(super) type ClaimKey = (NodeId, IpNet);

/// First network in sort order.
const FIRST_NET: IpNet = IpNet::new_assert(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// A problem of a node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeProblem {
    /// A prefix is withheld from the map, or the node has one that another node claims.
    #[error(transparent)]
    Withheld(#[from] WithheldReason),
    /// A prefix moved from a node that was offline for longer than the lease.
    #[error(
        "prefix {held} of node `{from}` moved to node `{to}` ({prefix}): `{from}` had been offline for \
         longer than the lease"
    )]
    Moved {
        /// Prefix of the previous holder.
        held: IpNet,
        /// Name of the previous holder.
        from: NodeName,
        /// Name of the new holder.
        to: NodeName,
        /// Prefix of the new holder.
        prefix: IpNet,
    },
    /// Another machine requested the node's name.
    #[error("another machine tried to join as `{name}` and was refused")]
    NameRequested {
        /// Name of the node.
        name: NodeName,
    },
    /// Another machine used the node's WireGuard key.
    #[error("a machine tried to join as `{name}` with this node's WireGuard key")]
    KeyUsed {
        /// Name that the machine requested.
        name: NodeName,
    },
    /// The record was refused, since the grant does not allow it.
    #[error(transparent)]
    RecordRefused(#[from] NotGranted),
    /// Two machines have the node's identity.
    #[error(
        "two machines use this node's identity: one is connected from {connected}, another tried from \
         {tried}"
    )]
    Cloned {
        /// Address of the machine that is connected.
        connected: IpAddr,
        /// Address of the other machine.
        tried: IpAddr,
    },
    /// Two machines have the node's identity and are connected to different controllers.
    #[error(
        "two machines use this node's identity: one is connected to this controller from {connected}, \
         another one to another controller"
    )]
    ClonedElsewhere {
        /// Address of the machine that is connected to this controller.
        connected: IpAddr,
    },
}

codes! {
    NodeProblem {
        Withheld(WithheldReason),
        Moved => "prefix-moved",
        NameRequested => "name-requested",
        KeyUsed => "key-used-by-other",
        RecordRefused(NotGranted),
        Cloned => "identity-cloned",
        ClonedElsewhere => "identity-cloned-elsewhere",
    }
}

/// Reason why a prefix is withheld from the map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WithheldReason {
    /// No node may hold the prefix.
    #[error(transparent)]
    Unusable(#[from] Unusable),
    /// Another node holds the prefix, or one that overlaps it.
    #[error(
        "prefix {prefix} of node `{claimant}` overlaps {held}, which node `{holder}` holds: remove it \
         from one of the two, or grant exactly the nested prefix to its node"
    )]
    Held {
        /// Claimed prefix.
        prefix: IpNet,
        /// Name of the node that claims it.
        claimant: NodeName,
        /// Prefix that is held.
        held: IpNet,
        /// Name of its holder.
        holder: NodeName,
    },
    /// The node holds the largest number of prefixes already.
    #[error(
        "prefix {prefix} of node `{claimant}` is withheld: a node holds at most {} outside protected \
         ranges: announce fewer, or protect a range around them",
        limits::GUARDED_PREFIXES
    )]
    TooMany {
        /// Claimed prefix.
        prefix: IpNet,
        /// Name of the node that claims it.
        claimant: NodeName,
    },
}

codes! {
    WithheldReason {
        Unusable(Unusable),
        Held => "prefix-overlap",
        TooMany => "too-many-prefixes",
    }
}

/// A problem with its cause.
#[derive(Debug)]
struct Noted {
    /// Claim that causes the problem. The problem is removed when the claim is settled.
    about: Option<ClaimKey>,
    problem: NodeProblem,
}

/// The problems of all nodes.
#[derive(Debug, Default)]
pub(super) struct Problems {
    by_node: BTreeMap<NodeId, VecDeque<Noted>>,
    /// Nodes that may have a problem because of a claim.
    by_claim: BTreeMap<ClaimKey, BTreeSet<NodeId>>,
    /// Nodes whose problems changed since the last [`Problems::take_changed`].
    changed: BTreeSet<NodeId>,
}

impl Problems {
    /// Adds a problem of a node at the front. Each problem occurs only once. If there are too many, the claims of other
    /// nodes take at most half of the places, and among these the node with the most gives way: no node can displace
    /// what others caused.
    pub(super) fn note(&mut self, node: NodeId, about: Option<ClaimKey>, problem: NodeProblem) {
        let problems = self.by_node.entry(node).or_default();
        if problems.front().is_some_and(|first| first.problem == problem) {
            return;
        }
        problems.retain(|noted| noted.problem != problem);
        problems.push_front(Noted { about, problem });
        if problems.len() > limits::PROBLEMS {
            remove_one(node, problems);
        }
        if let Some(claim) = about {
            self.by_claim.entry(claim).or_default().insert(node);
        }
        self.changed.insert(node);
    }

    /// Removes the problems that a claim caused, since it is settled.
    pub(super) fn settle(&mut self, claim: ClaimKey) {
        for node in self.by_claim.remove(&claim).unwrap_or_default() {
            if let Some(problems) = self.by_node.get_mut(&node) {
                problems.retain(|noted| noted.about != Some(claim));
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
        for claim in removed.into_iter().filter_map(|noted| noted.about) {
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
    pub(super) fn of(&self, node: NodeId) -> Vec<NodeProblem> {
        let problems = self.by_node.get(&node);
        problems.into_iter().flatten().map(|noted| noted.problem.clone()).collect()
    }

    /// Returns the nodes whose problems changed since the previous call.
    pub(super) fn take_changed(&mut self) -> BTreeSet<NodeId> {
        std::mem::take(&mut self.changed)
    }
}

/// Removes the problem of a node that gives way to others.
fn remove_one(node: NodeId, problems: &mut VecDeque<Noted>) {
    let by_other = |noted: &Noted| noted.about.map(|(of, _)| of).filter(|of| *of != node);
    let mut shares = BTreeMap::<NodeId, usize>::new();
    for other in problems.iter().filter_map(by_other) {
        *shares.entry(other).or_default() += 1;
    }
    let is_over = shares.values().sum::<usize>() > limits::PROBLEMS / 2;
    let largest = shares.values().max().copied();
    let gives_way = |noted: &Noted| match by_other(noted) {
        Some(other) => is_over && shares.get(&other).copied() == largest,
        None => !is_over,
    };
    // The oldest one is the last.
    if let Some(index) = problems.iter().rposition(gives_way) {
        problems.remove(index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId([1; 16]);

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    /// Adds a problem that a claim of another node causes.
    fn claimed(problems: &mut Problems, by: u8, number: u8) {
        let prefix = IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(10, by, number, 0)), 24);
        let claimant = name(&format!("other-{by}"));
        let problem = WithheldReason::TooMany { prefix, claimant }.into();
        problems.note(NODE, Some((NodeId([by; 16]), prefix)), problem);
    }

    #[test]
    fn no_node_displaces_the_problems_that_others_caused() {
        let mut problems = Problems::default();
        let own: Vec<NodeProblem> = ["a", "b", "c"]
            .map(|requested| NodeProblem::KeyUsed { name: name(requested) })
            .to_vec();
        for problem in &own {
            problems.note(NODE, None, problem.clone());
        }
        claimed(&mut problems, 2, 0);
        for number in 0..100 {
            claimed(&mut problems, 3, number);
        }
        let found = problems.of(NODE);
        assert_eq!(found.len(), limits::PROBLEMS);
        assert!(own.iter().all(|problem| found.contains(problem)), "{found:?}");
        let of = |by: u8| format!("`other-{by}`");
        let count = |by| found.iter().filter(|p| p.to_string().contains(&of(by))).count();
        assert_eq!((count(2), count(3)), (1, limits::PROBLEMS - own.len() - 1));
        assert!(found[0].to_string().contains("10.3.99.0/24"), "the newest first: {found:?}");
    }

    #[test]
    fn many_nodes_together_leave_half_of_the_places() {
        let mut problems = Problems::default();
        for requested in ["a", "b", "c", "d", "e"] {
            problems.note(NODE, None, NodeProblem::KeyUsed { name: name(requested) });
        }
        for by in 2..50 {
            claimed(&mut problems, by, 0);
        }
        let own = problems.of(NODE);
        let own = own.iter().filter(|problem| matches!(problem, NodeProblem::KeyUsed { .. }));
        assert_eq!(own.count(), limits::PROBLEMS / 2);
    }
}
