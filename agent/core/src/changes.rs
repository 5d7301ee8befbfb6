//! What an input changed, and what has to be derived again because of it.
//!
//! Who holds what (the claims), the peer table and the plan follow from everything else. A setter
//! names what it changed with [`Changes::mark`], and this is the one place that knows what follows
//! from it. They are derived in this order, the next time that an output is polled:
//!
//! | change | claims | peer table | plan |
//! |---|---|---|---|
//! | [`Change::Ownership`] | all | yes | all |
//! | [`Change::Record`] | of that node | yes | of that node |
//! | [`Change::Routes`] | | | of that node |
//! | [`Change::OwnNetworks`] | | yes | all |
//! | [`Change::Host`] | | | all |
//! | [`Change::Path`] | | the path of that peer | |
//! | [`Change::Carrier`] | | yes | |
//! | [`Change::Usability`] | | yes | |

use std::collections::BTreeSet;

use towline_types::id::{NodeId, WireguardKey};

/// A change of what claims, peer table and plan follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// Something that may decide every claim: our membership or prefixes, static peers, networks
    /// that were announced once.
    Ownership,
    /// This node is new or gone, or its grant or record is another one.
    Record(NodeId),
    /// The claims, the state or the path MTU of this node changed.
    Routes(NodeId),
    /// Inner addresses or networks that are this node's own.
    OwnNetworks,
    /// What the plan alone takes from host and configuration: node IPs, outer traffic.
    Host,
    /// Where datagrams of this peer go, or the path MTU that the data plane applies.
    Path(PeerId),
    /// A node that shares networks with others went down or came back: another one carries them.
    Carrier,
    /// This node was removed from the mesh, or its map got too old or was confirmed again. Who holds what stays,
    /// and so do routes and guards.
    Usability,
}

/// A peer of the data plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PeerId {
    /// A node of the mesh.
    Node(NodeId),
    /// A peer of the configuration.
    Static(WireguardKey),
}

/// How much of the peer table has to be derived again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TableScope {
    /// Everything.
    All,
    /// The paths of these peers. A table with 10,000 peers is not built again for a peer that roams.
    Paths(BTreeSet<PeerId>),
}

/// How much has to be derived again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Everything.
    All,
    /// What follows from these nodes.
    Nodes(BTreeSet<NodeId>),
}

/// All changes since each table was derived last.
#[derive(Debug)]
pub(crate) struct Changes {
    /// Claims to resolve again. Cleared by [`Self::take_claims`].
    claims: Scope,
    /// Part of the plan to build again. Cleared by [`Self::take_plan`].
    plan: Scope,
    /// Part of the peer table to build again. Cleared by [`Self::take_table`].
    table: TableScope,
}

impl Changes {
    /// Everything has to be derived: nothing was so far.
    pub(crate) fn all() -> Self {
        Self { claims: Scope::All, plan: Scope::All, table: TableScope::All }
    }

    /// Records a change for the next derivation.
    pub(crate) fn mark(&mut self, change: Change) {
        match change {
            Change::Ownership => (self.claims, self.plan) = (Scope::All, Scope::All),
            // Its routes follow once its claims are resolved.
            Change::Record(node) => self.claims.add(node),
            Change::Routes(node) => self.plan.add(node),
            Change::OwnNetworks => (self.plan, self.table) = (Scope::All, TableScope::All),
            Change::Host => self.plan = Scope::All,
            Change::Path(peer) => self.table.add(peer),
            Change::Carrier | Change::Usability => self.table = TableScope::All,
        }
    }

    /// Returns which claims to resolve again, if any. The peer table shows them, so it follows.
    pub(crate) fn take_claims(&mut self) -> Option<Scope> {
        let scope = self.claims.take()?;
        self.table = TableScope::All;
        Some(scope)
    }

    /// Returns which part of the plan to build again, if any.
    pub(crate) fn take_plan(&mut self) -> Option<Scope> {
        self.plan.take()
    }

    /// Returns which part of the peer table to build again, if any.
    pub(crate) fn take_table(&mut self) -> Option<TableScope> {
        let nothing = TableScope::Paths(BTreeSet::new());
        let taken = std::mem::replace(&mut self.table, nothing.clone());
        (taken != nothing).then_some(taken)
    }
}

impl TableScope {
    fn add(&mut self, peer: PeerId) {
        if let Self::Paths(peers) = self {
            peers.insert(peer);
        }
    }
}

impl Scope {
    fn add(&mut self, node: NodeId) {
        if let Self::Nodes(nodes) = self {
            nodes.insert(node);
        }
    }

    /// Takes the scope, unless it is empty, and leaves an empty one.
    fn take(&mut self) -> Option<Self> {
        let taken = std::mem::replace(self, Self::Nodes(BTreeSet::new()));
        (taken != Self::Nodes(BTreeSet::new())).then_some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId([1; 16]);

    fn nothing_marked() -> Changes {
        let mut changes = Changes::all();
        assert_eq!(changes.take_claims(), Some(Scope::All));
        assert_eq!(changes.take_plan(), Some(Scope::All));
        assert_eq!(changes.take_table(), Some(TableScope::All));
        changes
    }

    #[test]
    fn a_change_marks_all_that_follows_from_it_once() {
        let mut changes = nothing_marked();
        assert_eq!((changes.take_claims(), changes.take_plan()), (None, None));
        assert_eq!(changes.take_table(), None);

        changes.mark(Change::Record(NODE));
        assert_eq!(changes.take_claims(), Some(Scope::Nodes([NODE].into())));
        assert_eq!(changes.take_table(), Some(TableScope::All), "it shows the claims");
        assert_eq!(changes.take_claims(), None);

        changes.mark(Change::Routes(NODE));
        changes.mark(Change::Host);
        changes.mark(Change::Routes(NODE));
        assert_eq!(changes.take_plan(), Some(Scope::All), "all of it includes each node");
        assert_eq!(changes.take_table(), None);

        let (first, second) = (PeerId::Node(NODE), PeerId::Static(WireguardKey([2; 32])));
        changes.mark(Change::Path(second));
        changes.mark(Change::Path(first));
        changes.mark(Change::Path(second));
        assert_eq!(changes.take_table(), Some(TableScope::Paths([first, second].into())));
        changes.mark(Change::Path(first));
        changes.mark(Change::Carrier);
        changes.mark(Change::Path(second));
        assert_eq!(changes.take_table(), Some(TableScope::All), "all of it includes each path");
        assert_eq!(changes.take_plan(), None);
    }

    #[test]
    fn ownership_concerns_everything() {
        let mut changes = nothing_marked();
        changes.mark(Change::Ownership);
        assert_eq!(changes.take_claims(), Some(Scope::All));
        assert_eq!(changes.take_plan(), Some(Scope::All));
        assert_eq!(changes.take_table(), Some(TableScope::All));
    }
}
