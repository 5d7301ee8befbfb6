//! Changes that another controller made: they replace what this registry has.
//!
//! They are stored already, so nothing here is to be signed, stored or logged as an event. The times of this
//! process stay: since when it knows a node does not change with the node.

use ipnet::IpNet;
use towline_types::id::{IdentityKey, NodeId, TokenId};
use towline_types::node::Node;

use super::token::Token;
use super::{Admin, Counters, LoadError, Member, Mesh, Registry, RemovedNode};

/// Records that another controller changed, as plain values. `None` in the place of a value: it was deleted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Refreshed {
    /// Counters of the mesh, if they changed.
    pub counters: Option<Counters>,
    /// Configuration of the mesh, if it changed.
    pub mesh: Option<Mesh>,
    /// Nodes that were added or changed.
    pub members: Vec<Member>,
    /// Nodes whose records were deleted.
    pub absent: Vec<NodeId>,
    /// Nodes that were removed. Their records are deleted, too.
    pub removed_nodes: Vec<RemovedNode>,
    /// Tokens that were added, changed or deleted.
    pub tokens: Vec<(TokenId, Option<Token>)>,
    /// Keys of administrators that were added, changed or deleted.
    pub admins: Vec<(IdentityKey, Option<Admin>)>,
}

impl Registry {
    /// Applies what another controller stored. The caller has verified the signatures, and has taken all changes
    /// of this registry before.
    ///
    /// # Errors
    ///
    /// If the result contradicts itself. The registry must be loaded again then.
    pub fn refresh(&mut self, refreshed: Refreshed) -> Result<(), LoadError> {
        let Refreshed { counters, mesh, members, absent, removed_nodes, tokens, admins } =
            refreshed;
        if let Some(counters) = counters {
            self.counters = counters;
        }
        if let Some(mesh) = mesh {
            self.mesh = mesh;
        }
        for removed in removed_nodes {
            self.forget(removed.tombstone.node_id);
            self.insert_removed(removed);
        }
        absent.into_iter().for_each(|node| self.forget(node));
        // All of them first: two nodes may have exchanged what is unique.
        let members: Vec<(Member, Option<Member>)> = members
            .into_iter()
            .map(|member| {
                let before = self.members.remove(member.grant.node_id);
                (member, before)
            })
            .collect();
        for (member, before) in members {
            self.replace(member, before)?;
        }
        for (id, token) in tokens {
            match token {
                Some(token) => self.tokens.insert(id, token),
                None => self.tokens.remove(&id),
            };
        }
        for (key, admin) in admins {
            match admin {
                Some(admin) => self.admins.insert(key, admin),
                None => self.admins.remove(&key),
            };
        }
        Ok(())
    }

    /// Adds a node in its new state, which replaces the state `before`.
    fn replace(&mut self, mut member: Member, before: Option<Member>) -> Result<(), LoadError> {
        let id = member.grant.node_id;
        let mut held: Vec<IpNet> = Vec::new();
        if let Some(record) = &member.record {
            Node::new(member.grant.clone(), record.clone())
                .map_err(|error| LoadError::NotGranted { node: id, error })?;
            let is_held = |prefix: &&IpNet| !member.withheld.contains(prefix);
            held.extend(record.prefixes.iter().filter(is_held));
        }
        for prefix in self.claims.held_by(id).iter().filter(|prefix| !held.contains(prefix)) {
            self.claims.release(prefix, id);
        }
        held.into_iter().for_each(|prefix| self.claims.hold(prefix, id));
        if let Some(before) = before {
            member.known_since = before.known_since;
            for settled in before.withheld.iter().filter(|was| !member.withheld.contains(was)) {
                self.problems.settle((id, *settled));
            }
        }
        if self.members.insert(member) { Ok(()) } else { Err(LoadError::NotUnique(id)) }
    }

    /// Removes what is known of a node whose record was deleted.
    fn forget(&mut self, node: NodeId) {
        if self.members.remove(node).is_some() {
            for prefix in self.claims.held_by(node) {
                self.claims.release(&prefix, node);
            }
            self.problems.remove(node);
        }
    }
}
