//! Check of recorded operations against what all controllers list in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Operations that were acknowledged, in order.
#[derive(Debug, Default)]
pub(super) struct History {
    operations: Vec<Operation>,
}

/// An acknowledged operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Operation {
    /// A token was created.
    Create {
        /// Id of the token.
        token: String,
    },
    /// A node joined with a token for one node.
    Join {
        /// Id of the token.
        token: String,
        /// Name of the node.
        node: String,
    },
}

/// What a controller lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Listed {
    /// Ids of the tokens.
    pub(super) tokens: BTreeSet<String>,
    /// Addresses in the mesh of each node, by its name.
    pub(super) nodes: BTreeMap<String, Vec<IpAddr>>,
}

/// Violations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Violations {
    /// Acknowledged operations that a controller does not list, over all controllers.
    pub(super) lost_writes: usize,
    /// Tokens for one node that admitted more.
    pub(super) double_spent_tokens: usize,
    /// Pairs of nodes that have the same address, over all controllers.
    pub(super) overlapping_prefixes: usize,
}

impl History {
    /// Records an acknowledged operation.
    pub(super) fn add(&mut self, operation: Operation) {
        self.operations.push(operation);
    }

    /// Returns how many acknowledged operations a controller does not list.
    pub(super) fn lost(&self, listed: &Listed) -> usize {
        let is_lost = |operation: &&Operation| match operation {
            Operation::Create { token } => !listed.tokens.contains(token),
            Operation::Join { node, .. } => !listed.nodes.contains_key(node),
        };
        self.operations.iter().filter(is_lost).count()
    }

    /// Compares the operations with what each controller lists.
    pub(super) fn check(&self, controllers: &[Listed]) -> Violations {
        let mut uses = BTreeMap::<&str, usize>::new();
        for operation in &self.operations {
            if let Operation::Join { token, .. } = operation {
                *uses.entry(token).or_default() += 1;
            }
        }
        Violations {
            lost_writes: controllers.iter().map(|listed| self.lost(listed)).sum(),
            double_spent_tokens: uses.values().filter(|uses| **uses > 1).count(),
            overlapping_prefixes: controllers.iter().map(Listed::overlapping).sum(),
        }
    }
}

impl Listed {
    fn overlapping(&self) -> usize {
        let mut holders = BTreeMap::<IpAddr, usize>::new();
        for address in self.nodes.values().flatten() {
            *holders.entry(*address).or_default() += 1;
        }
        holders.values().map(|holders| holders * (holders - 1) / 2).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(tokens: &[&str], nodes: &[(&str, &str)]) -> Listed {
        let node =
            |(name, address): &(&str, &str)| ((*name).to_owned(), vec![address.parse().unwrap()]);
        Listed {
            tokens: tokens.iter().map(|token| (*token).to_owned()).collect(),
            nodes: nodes.iter().map(node).collect(),
        }
    }

    #[test]
    fn what_is_lost_spent_twice_or_given_twice_is_counted() {
        let mut history = History::default();
        for token in ["t", "u"] {
            history.add(Operation::Create { token: token.to_owned() });
        }
        let join = |node: &str| Operation::Join { token: "t".to_owned(), node: node.to_owned() };
        history.add(join("a"));
        let good = listed(&["t", "u"], &[("a", "10.0.0.1"), ("b", "10.0.0.2")]);
        assert_eq!(history.check(&[good.clone(), good.clone()]), Violations::default());

        let behind = listed(&["t"], &[]);
        assert_eq!(history.check(&[good.clone(), behind]).lost_writes, 2);
        let twice = listed(&["t", "u"], &[("a", "10.0.0.1"), ("b", "10.0.0.1")]);
        assert_eq!(history.check(&[twice]).overlapping_prefixes, 1);
        history.add(join("b"));
        assert_eq!(history.check(&[good]).double_spent_tokens, 1);
    }
}
