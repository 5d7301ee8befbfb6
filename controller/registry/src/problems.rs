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
}

codes! {
    NodeProblem {
        Withheld(WithheldReason),
        Moved => "prefix-moved",
        NameRequested => "name-requested",
        KeyUsed => "key-used-by-other",
        RecordRefused(NotGranted),
        Cloned => "identity-cloned",
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
    /// Adds a problem of a node at the front. Each problem occurs only once.
    pub(super) fn note(&mut self, node: NodeId, about: Option<ClaimKey>, problem: NodeProblem) {
        let problems = self.by_node.entry(node).or_default();
        if problems.front().is_some_and(|first| first.problem == problem) {
            return;
        }
        problems.retain(|noted| noted.problem != problem);
        problems.push_front(Noted { about, problem });
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
