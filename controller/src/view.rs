//! What operators see: nodes, tokens and keys of administrators. Like the map, it only contains state that is stored.
//!
//! The writer replaces single items, each behind an `Arc`. A reader takes a page of them and never
//! waits in the writer's queue.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::RwLock;
use towline_proto::id::{IdentityKey, Label, NodeId, NodeName, TokenId};
use towline_proto::pb;

use towline_registry::token::SecretHash;
use towline_registry::{Admin, JoinError, NoSuchNode, NodeProblem, TokenUnknown};

/// Nodes and tokens, for operators.
#[derive(Default)]
pub struct View {
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    nodes: BTreeMap<NodeName, Arc<NodeView>>,
    names: BTreeMap<NodeId, NodeName>,
    tokens: BTreeMap<TokenId, Arc<TokenView>>,
    /// Names of the nodes that joined with each token.
    joined: BTreeMap<TokenId, BTreeSet<NodeName>>,
    admins: BTreeMap<IdentityKey, Arc<Admin>>,
}

/// A node, for operators.
#[derive(Debug)]
pub struct NodeView {
    /// Id of the node.
    pub id: NodeId,
    /// Name of the node.
    pub name: NodeName,
    /// Site of the node, if it has one.
    pub site: Option<Label>,
    /// Grant, as the CA signed it.
    pub grant: pb::Signed,
    /// Newest record, as the node signed it; `None` until it published one.
    pub record: Option<pb::Signed>,
    /// Id of the token that the node joined with.
    pub token: TokenId,
    /// Time of the join, in seconds since 1970.
    pub joined_at: i64,
    /// Problems of the node, newest first.
    pub problems: Vec<NodeProblem>,
}

/// A token, for operators, and the hash that a joining machine must match.
#[derive(Debug)]
pub struct TokenView {
    /// Message of the token, without the names of the nodes that joined with it.
    pub message: pb::Token,
    /// Hash of its secret.
    pub secret_hash: SecretHash,
}

/// A change of what operators see.
#[derive(Debug, Clone)]
pub enum ViewChange {
    /// A node was added or changed.
    Node(Arc<NodeView>),
    /// A node was removed.
    NodeRemoved(NodeId),
    /// A token was added or changed.
    Token(TokenId, Arc<TokenView>),
    /// A token was deleted.
    TokenRemoved(TokenId),
    /// The key of an administrator was added or changed.
    Admin(Arc<Admin>),
    /// The key of an administrator was deleted.
    AdminRemoved(IdentityKey),
}

impl View {
    /// Applies changes, which must be stored already. Returns the problems that are new, each with the name of
    /// its node.
    pub fn apply(&self, changes: Vec<ViewChange>) -> Vec<(NodeName, NodeProblem)> {
        let mut inner = self.inner.write();
        let mut found = Vec::new();
        for change in changes {
            if let ViewChange::Node(node) = &change {
                found.extend(inner.new_problems(node));
            }
            inner.apply(change);
        }
        found
    }

    /// Replaces everything.
    pub fn replace(&self, all: Vec<ViewChange>) {
        let mut inner = Inner::default();
        all.into_iter().for_each(|change| inner.apply(change));
        *self.inner.write() = inner;
    }

    /// Returns the node with this name.
    pub fn node(&self, name: &NodeName) -> Result<Arc<NodeView>, NoSuchNode> {
        let node = self.inner.read().nodes.get(name).cloned();
        node.ok_or_else(|| NoSuchNode { name: name.clone() })
    }

    /// Returns at most `limit` nodes after `after`, sorted by name.
    pub fn nodes(&self, after: Option<&NodeName>, limit: usize) -> Vec<Arc<NodeView>> {
        let behind = after.map_or(Bound::Unbounded, Bound::Excluded);
        let inner = self.inner.read();
        let nodes = inner.nodes.range::<NodeName, _>((behind, Bound::Unbounded));
        nodes.take(limit).map(|(_, node)| node.clone()).collect()
    }

    /// Returns the name of a node. `None` if it is no member.
    pub fn name(&self, node: NodeId) -> Option<NodeName> {
        self.inner.read().names.get(&node).cloned()
    }

    /// Returns at most `limit` tokens after `after`, sorted by id, each with the names of the
    /// current nodes that joined with it.
    pub fn tokens(&self, after: Option<TokenId>, limit: usize) -> Vec<pb::Token> {
        let behind = after.map_or(Bound::Unbounded, Bound::Excluded);
        let inner = self.inner.read();
        let tokens = inner.tokens.range((behind, Bound::Unbounded)).take(limit);
        tokens
            .map(|(id, token)| pb::Token {
                nodes: inner
                    .joined
                    .get(id)
                    .into_iter()
                    .flatten()
                    .map(ToString::to_string)
                    .collect(),
                ..token.message.clone()
            })
            .collect()
    }

    /// Returns whether an administrator has this key, and it is not revoked.
    pub fn is_admin(&self, key: &IdentityKey) -> bool {
        let inner = self.inner.read();
        inner.admins.get(key).is_some_and(|admin| admin.revoked_at.is_none())
    }

    /// Returns the keys of all administrators, sorted.
    pub fn admins(&self) -> Vec<Arc<Admin>> {
        self.inner.read().admins.values().cloned().collect()
    }

    /// Compares the hash of a secret with the token's, without waiting in the writer's queue. Returns whether
    /// the token admits another node at `now`, in seconds since 1970.
    ///
    /// # Errors
    ///
    /// If there is no such token, or the secret is another one.
    pub fn check_secret(
        &self,
        token: TokenId,
        secret_hash: &SecretHash,
        now: i64,
    ) -> Result<bool, JoinError> {
        let found = self.inner.read().tokens.get(&token).cloned();
        let found = found.ok_or(TokenUnknown { token })?;
        if found.secret_hash != *secret_hash {
            return Err(JoinError::TokenSecret { token });
        }
        let pb::Token { revoked, used, uses, expires_at, .. } = found.message;
        Ok(!revoked && used < uses && now < expires_at)
    }
}

impl Inner {
    /// Returns the problems of a node that it did not have before, the oldest first.
    fn new_problems(&self, node: &NodeView) -> Vec<(NodeName, NodeProblem)> {
        let before = self.nodes.get(&node.name).filter(|before| before.id == node.id);
        let known = before.map(|before| before.problems.as_slice()).unwrap_or_default();
        let found = node.problems.iter().rev().filter(|problem| !known.contains(problem));
        found.map(|problem| (node.name.clone(), problem.clone())).collect()
    }

    fn apply(&mut self, change: ViewChange) {
        match change {
            ViewChange::Node(node) => {
                self.names.insert(node.id, node.name.clone());
                if let Some(old) = self.nodes.get(&node.name).filter(|old| old.id != node.id) {
                    // It replaces a node of the same name, whose removal is applied later.
                    let (id, token) = (old.id, old.token);
                    self.names.remove(&id);
                    self.leave(token, &node.name);
                }
                self.joined.entry(node.token).or_default().insert(node.name.clone());
                self.nodes.insert(node.name.clone(), node);
            }
            ViewChange::NodeRemoved(id) => {
                let Some(name) = self.names.remove(&id) else { return };
                let Some(node) = self.nodes.remove(&name) else { return };
                self.leave(node.token, &name);
            }
            ViewChange::Token(id, token) => drop(self.tokens.insert(id, token)),
            ViewChange::TokenRemoved(id) => drop(self.tokens.remove(&id)),
            ViewChange::Admin(admin) => drop(self.admins.insert(admin.key, admin)),
            ViewChange::AdminRemoved(key) => drop(self.admins.remove(&key)),
        }
    }

    /// Removes a name from the nodes that joined with a token.
    fn leave(&mut self, token: TokenId, name: &NodeName) {
        if let Some(names) = self.joined.get_mut(&token) {
            names.remove(name);
            if names.is_empty() {
                self.joined.remove(&token);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u8, name: &str, token: u8) -> ViewChange {
        ViewChange::Node(Arc::new(NodeView {
            id: NodeId([id; 16]),
            name: name.parse().unwrap(),
            site: None,
            grant: pb::Signed::default(),
            record: None,
            token: TokenId([token; 8]),
            joined_at: 0,
            problems: Vec::new(),
        }))
    }

    fn token(id: u8) -> ViewChange {
        let message = pb::Token { uses: 1, expires_at: 100, ..pb::Token::default() };
        let secret_hash = SecretHash([id; 32]);
        ViewChange::Token(TokenId([id; 8]), Arc::new(TokenView { message, secret_hash }))
    }

    #[test]
    fn a_secret_is_compared_with_that_of_its_token() {
        let view = View::default();
        view.apply(vec![token(1)]);
        let check = |id: u8, secret: u8, now| {
            view.check_secret(TokenId([id; 8]), &SecretHash([secret; 32]), now)
        };
        assert_eq!(check(1, 1, 99), Ok(true));
        assert_eq!(check(1, 1, 100), Ok(false), "expired");
        assert!(matches!(check(1, 2, 99), Err(JoinError::TokenSecret { .. })));
        assert!(matches!(check(2, 2, 99), Err(JoinError::TokenUnknown(_))));
    }

    #[test]
    fn tokens_list_the_nodes_that_joined_with_them_and_still_exist() {
        let view = View::default();
        view.apply(vec![token(1), token(2), node(1, "a", 1), node(2, "b", 1), node(3, "c", 2)]);
        let names = |limit| -> Vec<Vec<String>> {
            view.tokens(None, limit).into_iter().map(|token| token.nodes).collect()
        };
        assert_eq!(names(9), [vec!["a", "b"], vec!["c"]]);
        view.apply(vec![ViewChange::NodeRemoved(NodeId([1; 16]))]);
        assert_eq!(names(9), [vec!["b"], vec!["c"]]);
        assert_eq!(names(1), [vec!["b"]]);
        let rest = view.tokens(Some(TokenId([1; 8])), 9);
        assert_eq!(rest.len(), 1);
    }

    #[test]
    fn a_problem_is_new_once() {
        let address = "192.0.2.1".parse().unwrap();
        let problem = NodeProblem::Cloned { connected: address, tried: address };
        let with = |problems: Vec<NodeProblem>| {
            let ViewChange::Node(node) = node(1, "a", 1) else { panic!("no node") };
            let NodeView { id, ref name, token, .. } = *node;
            ViewChange::Node(Arc::new(NodeView {
                id,
                name: name.clone(),
                site: None,
                grant: pb::Signed::default(),
                record: None,
                token,
                joined_at: 0,
                problems,
            }))
        };
        let view = View::default();
        let found = |problems| view.apply(vec![with(problems)]).len();
        assert_eq!(found(vec![problem.clone()]), 1);
        assert_eq!(found(vec![problem.clone()]), 0);
        assert_eq!(found(Vec::new()), 0);
        assert_eq!(found(vec![problem]), 1);
    }

    #[test]
    fn a_node_that_replaced_another_keeps_its_name_in_whatever_order_the_changes_come() {
        let removed = ViewChange::NodeRemoved(NodeId([1; 16]));
        for changes in [[removed.clone(), node(2, "a", 2)], [node(2, "a", 2), removed]] {
            let view = View::default();
            view.apply(vec![token(1), token(2), node(1, "a", 1)]);
            view.apply(changes.to_vec());
            let found = view.node(&"a".parse().unwrap()).unwrap();
            assert_eq!(found.id, NodeId([2; 16]));
            assert_eq!(view.nodes(None, 9).len(), 1);
            let names: Vec<_> = view.tokens(None, 9).into_iter().map(|t| t.nodes).collect();
            assert_eq!(names, [vec![], vec!["a".to_owned()]]);
        }
    }
}
