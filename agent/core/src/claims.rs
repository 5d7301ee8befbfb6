//! Who holds what: names, WireGuard keys and prefixes, each by one node only.
//!
//! The controller refuses a second claim. Should two claims reach us all the same (a restored
//! backup, a stolen store), every node decides alike, from signed facts alone: the node that was
//! granted earlier wins, and of two granted in the same second the one with the lower id. What a
//! node claims of ours it never gets here. A prefix may lie inside another node's where its own
//! grant names it exactly, or where it is an overlay address.

use std::collections::BTreeMap;

use ipnet::IpNet;
use towline_proto::id::{NodeId, NodeName, WireguardKey};
use towline_proto::node::{Grant, Node};

use crate::prefixes::PrefixMap;

/// What one node holds, and what it claimed in vain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Its overlay addresses and announced prefixes, as far as they are its own; empty when its
    /// WireGuard key is another's.
    pub(crate) prefixes: Vec<IpNet>,
    /// Who holds its WireGuard key, if another does: it cannot be a peer.
    pub(crate) key_holder: Option<NodeName>,
    /// What it claimed and did not get, a line each, for the operator.
    pub(crate) conflicts: Vec<String>,
}

/// What every node holds.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    by_node: BTreeMap<NodeId, Claim>,
    by_key: BTreeMap<WireguardKey, NodeId>,
}

#[derive(Clone, Copy)]
struct Holder<'a> {
    grant: &'a Grant,
    ours: bool,
}

impl Claims {
    /// Decides between `nodes` and ourselves.
    pub(crate) fn resolve<'a>(
        own: &Grant,
        own_prefixes: &[IpNet],
        nodes: impl Iterator<Item = &'a Node>,
    ) -> Self {
        let mut by_age: Vec<&Node> = nodes.collect();
        by_age.sort_by_key(|node| (node.grant().issued_at, node.id()));

        let us = Holder { grant: own, ours: true };
        let mut names = BTreeMap::from([(&own.name, own.node_id)]);
        let mut keys: BTreeMap<WireguardKey, &NodeName> =
            own.wireguard_keys.iter().map(|key| (*key, &own.name)).collect();
        let mut held: PrefixMap<Holder<'_>> = PrefixMap::default();
        for prefix in own.overlay.prefixes().chain(own_prefixes.iter().copied()) {
            held.insert(prefix, us);
        }

        let mut claims = Self::default();
        for node in by_age {
            let mut claim = Claim::default();
            let grant = node.grant();
            if let Some(holder) = names.insert(&grant.name, grant.node_id) {
                claim.conflicts.push(format!("its name is also that of node {holder}"));
                names.insert(&grant.name, holder);
            }
            let taken = node.record().wireguard_keys.iter().find_map(|key| keys.get(key));
            if let Some(holder) = taken {
                claim.conflicts.push(format!("its WireGuard key is held by {holder}"));
                claim.key_holder = Some((*holder).clone());
                claims.by_node.insert(node.id(), claim);
                continue;
            }
            for key in &node.record().wireguard_keys {
                keys.insert(*key, &grant.name);
            }
            claims.by_key.insert(node.wireguard_key(), node.id());

            let holder = Holder { grant, ours: false };
            let announced = node.record().prefixes.iter().copied();
            for prefix in grant.overlay.prefixes().chain(announced) {
                match refused(&held, prefix, grant) {
                    None => {
                        held.insert(prefix, holder);
                        claim.prefixes.push(prefix);
                    }
                    Some(why) => claim.conflicts.push(why),
                }
            }
            claim.prefixes.sort_unstable();
            claim.prefixes.dedup();
            claims.by_node.insert(node.id(), claim);
        }
        claims
    }

    /// What a node holds.
    pub(crate) fn of(&self, node: NodeId) -> Option<&Claim> {
        self.by_node.get(&node)
    }

    /// Every node with what it holds.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&NodeId, &Claim)> {
        self.by_node.iter()
    }

    /// Everything that any node holds.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = &IpNet> {
        self.by_node.values().flat_map(|claim| &claim.prefixes)
    }

    /// Which node holds a key.
    pub(crate) fn key(&self, key: &WireguardKey) -> Option<NodeId> {
        self.by_key.get(key).copied()
    }
}

/// Why `grant`'s node does not get `prefix`, if it does not.
fn refused(held: &PrefixMap<Holder<'_>>, prefix: IpNet, grant: &Grant) -> Option<String> {
    if prefix.prefix_len() == 0 {
        return Some(format!("prefix {prefix} is the whole internet: it is never routed"));
    }
    held.overlapping(prefix).find_map(|(other, holder)| {
        let nested = if *other == prefix {
            false
        } else if other.contains(&prefix) {
            names(grant, prefix)
        } else {
            names(holder.grant, *other)
        };
        if nested || holder.grant.node_id == grant.node_id {
            return None;
        }
        let name = if holder.ours { "this node" } else { holder.grant.name.as_str() };
        Some(if *other == prefix {
            format!("prefix {prefix} is held by {name}")
        } else {
            format!("prefix {prefix} overlaps {other} of {name}")
        })
    })
}

/// Whether the grant speaks of this very prefix.
fn names(grant: &Grant, prefix: IpNet) -> bool {
    grant.allowed_prefixes.contains(&prefix) || grant.overlay.prefixes().any(|own| own == prefix)
}
