//! The holders of WireGuard keys and prefixes: each has one node only, except for prefixes that the grants
//! of several nodes share. A name that two nodes use is only reported.
//!
//! The controller refuses a second claim. Should two claims reach us all the same (a restored
//! backup, a stolen store), every node decides alike, from signed input alone: the node that was
//! granted earlier wins, and of two granted in the same second the one with the lower id. No node
//! gets one of our own prefixes or keys here. [`ownership`] has the rule, which the controller
//! applies too.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use towline_types::id::{NodeId, NodeName, WireguardKey};
use towline_types::limits;
use towline_types::node::{Grant, Node};
use towline_types::ownership::{self, Refused};

use crate::config::Membership;
use crate::conflict::{Conflict, Holder};
use crate::local_limits::LocalLimits;
use crate::prefixes::PrefixMap;

/// Prefixes and key that one node holds, and its claims that were refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Those of its overlay addresses and announced prefixes that it holds; empty when another node
    /// holds its WireGuard key.
    pub(crate) prefixes: Vec<IpNet>,
    /// Those of `prefixes` that are networks of machines rather than of pods.
    pub(crate) lans: Vec<IpNet>,
    /// Holder of its WireGuard key, if another has it: then it cannot be a peer.
    pub(crate) key_holder: Option<Holder>,
    /// Refused claims, for the operator.
    pub(crate) conflicts: Vec<Conflict>,
}

/// All claims, resolved.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    by_node: BTreeMap<NodeId, (Arc<Node>, Claim)>,
    names: BTreeMap<NodeName, NodeId>,
    keys: BTreeMap<WireguardKey, Owner>,
    /// Holders of each prefix: several only where their grants share it.
    held: PrefixMap<Vec<Owner>>,
    /// True if a claim was refused because of another one: then the change of one node may decide the
    /// claim of another.
    is_disputed: bool,
}

#[derive(Debug, Clone)]
enum Owner {
    Us,
    Node(Arc<Node>),
}

impl Claims {
    /// Resolves the claims of `nodes` and our own.
    pub(crate) fn resolve<'a>(
        membership: &Membership,
        limits: &LocalLimits,
        own_prefixes: &[IpNet],
        nodes: impl Iterator<Item = &'a Arc<Node>>,
    ) -> Self {
        let mut by_age: Vec<&Arc<Node>> = nodes.collect();
        by_age.sort_by_key(|node| (node.grant().issued_at, node.id()));

        let own = &membership.grant;
        let mut claims = Self::default();
        claims.names.insert(own.name.clone(), own.node_id);
        claims.keys.extend(own.wireguard_keys.iter().map(|key| (*key, Owner::Us)));
        for prefix in own.overlay.prefixes().chain(own_prefixes.iter().copied()) {
            claims.hold(prefix, Owner::Us);
        }
        for node in by_age {
            claims.admit(membership, limits, node);
        }
        claims
    }

    /// Resolves the claims of one node that is new or changed. Returns false if that may concern
    /// other nodes, so that all claims have to be resolved.
    pub(crate) fn change(
        &mut self,
        membership: &Membership,
        limits: &LocalLimits,
        node: &Arc<Node>,
    ) -> bool {
        if self.is_disputed {
            return false;
        }
        self.forget(node.id());
        self.admit(membership, limits, node);
        !self.is_disputed
    }

    /// Removes the claims of one node. Returns false under the same condition as [`Self::change`].
    pub(crate) fn remove(&mut self, node: NodeId) -> bool {
        if self.is_disputed {
            return false;
        }
        self.forget(node);
        true
    }

    fn forget(&mut self, node: NodeId) {
        let Some((node, claim)) = self.by_node.remove(&node) else { return };
        self.names.remove(node.name());
        for key in &node.record().wireguard_keys {
            self.keys.remove(key);
        }
        for prefix in &claim.prefixes {
            let Some(holders) = self.held.get_mut(prefix) else { continue };
            holders.retain(|holder| holder.id() != Some(node.id()));
            if holders.is_empty() {
                self.held.remove(prefix);
            }
        }
    }

    fn hold(&mut self, prefix: IpNet, owner: Owner) {
        match self.held.get_mut(&prefix) {
            Some(holders) => holders.push(owner),
            None => self.held.insert(prefix, vec![owner]),
        }
    }

    /// Gives a node those of its claims that no other node holds and this host does not refuse.
    fn admit(&mut self, membership: &Membership, limits: &LocalLimits, node: &Arc<Node>) {
        let own = &membership.grant;
        let mut claim = Claim::default();
        let grant = node.grant();
        let holder = *self.names.entry(grant.name.clone()).or_insert(grant.node_id);
        if holder != grant.node_id {
            claim.conflicts.push(Conflict::Name { holder });
        }
        let taken = node.record().wireguard_keys.iter().find_map(|key| self.keys.get(key));
        if let Some(holder) = taken {
            // A key of ours is named by this node's name, as other nodes would.
            let holder = Holder::Node(holder.grant(own).name.clone());
            claim.conflicts.push(Conflict::Key { holder: holder.clone() });
            claim.key_holder = Some(holder);
        } else {
            for key in &node.record().wireguard_keys {
                self.keys.insert(*key, Owner::Node(node.clone()));
            }
            let announced = node.record().prefixes.iter().copied();
            let mut room = limits::GUARDED_PREFIXES;
            for prefix in grant.overlay.prefixes().chain(announced) {
                let is_own_address = grant.overlay.contains_prefix(&prefix);
                let is_lan = node.record().lans.contains(&prefix);
                let covered = limits
                    .refuses(grant, &prefix, is_lan)
                    .filter(|_| !is_own_address)
                    .map(|covered| Conflict::Covers { prefix, covered });
                let is_alone = ownership::is_guarded_alone(prefix, &membership.mesh);
                let full = (is_alone && room == 0).then_some(Conflict::TooMany { prefix });
                match self.refused(membership, prefix, grant).or(covered).or(full) {
                    None => {
                        room -= usize::from(is_alone);
                        self.hold(prefix, Owner::Node(node.clone()));
                        claim.prefixes.push(prefix);
                    }
                    Some(why) => claim.conflicts.push(why),
                }
            }
            claim.prefixes.sort_unstable();
            claim.prefixes.dedup();
            let is_lan = |net: &&IpNet| node.record().lans.contains(net);
            claim.lans = claim.prefixes.iter().filter(is_lan).copied().collect();
        }
        self.is_disputed |= claim.conflicts.iter().any(Conflict::is_with_others);
        self.by_node.insert(node.id(), (node.clone(), claim));
    }

    /// Returns what a node holds.
    pub(crate) fn of(&self, node: NodeId) -> Option<&Claim> {
        self.by_node.get(&node).map(|(_, claim)| claim)
    }

    /// Returns every node with what it holds.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Arc<Node>, &Claim)> {
        self.by_node.values().map(|(node, claim)| (node, claim))
    }

    /// Returns whether another node holds exactly this network.
    pub(crate) fn holds(&self, net: IpNet) -> bool {
        self.holders(&net).next().is_some()
    }

    /// Returns the other nodes that hold exactly this network: several only where their grants share it.
    pub(crate) fn holders(&self, net: &IpNet) -> impl Iterator<Item = NodeId> {
        self.held.get(net).into_iter().flatten().filter_map(Owner::id)
    }

    /// Returns whether we hold exactly this network, perhaps with others.
    pub(crate) fn is_ours(&self, net: &IpNet) -> bool {
        self.held.get(net).into_iter().flatten().any(|holder| holder.id().is_none())
    }

    /// Returns whether a node (or we) holds this network, one around it or a part of it.
    pub(crate) fn overlaps(&self, net: IpNet) -> bool {
        self.held.overlapping(net).next().is_some()
    }

    /// Returns the node that holds a key.
    pub(crate) fn key(&self, key: &WireguardKey) -> Option<NodeId> {
        match self.keys.get(key)? {
            Owner::Node(node) if node.wireguard_key() == *key => Some(node.id()),
            Owner::Node(_) | Owner::Us => None,
        }
    }

    /// Returns why the node of `grant` does not get `prefix`; `None` if it does.
    fn refused(&self, membership: &Membership, prefix: IpNet, grant: &Grant) -> Option<Conflict> {
        let own = &membership.grant;
        let claim = ownership::Claim { grant, prefix };
        let held = self
            .held
            .overlapping(prefix)
            .flat_map(|(other, holders)| holders.iter().map(move |holder| (other, holder)))
            .map(|(other, holder)| ownership::Claim { grant: holder.grant(own), prefix: *other });
        let other = match ownership::check(claim, &membership.mesh, held) {
            Ok(()) => return None,
            Err(Refused::Unusable(reason)) => return Some(Conflict::Unusable(reason)),
            Err(Refused::Held(other)) => other,
        };
        let is_ours = other.grant.node_id == own.node_id;
        let holder =
            if is_ours { Holder::ThisNode } else { Holder::Node(other.grant.name.clone()) };
        Some(Conflict::over(prefix, other.prefix, holder))
    }
}

impl Owner {
    /// Returns the other node; `None` for us.
    fn id(&self) -> Option<NodeId> {
        match self {
            Self::Us => None,
            Self::Node(node) => Some(node.id()),
        }
    }

    fn grant<'a>(&'a self, own: &'a Grant) -> &'a Grant {
        match self {
            Self::Us => own,
            Self::Node(node) => node.grant(),
        }
    }
}
