//! The nodes of the mesh, with an index for every value that is unique among them.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use ipnet::IpNet;
use towline_types::id::{IdentityKey, NodeId, NodeName, TokenId, WireguardKey};
use towline_types::node::{Grant, Record, RelayRole};

/// A node of the mesh.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Grant of the node, which the CA signs.
    pub grant: Grant,
    /// Newest record of the node; `None` until it published one.
    pub record: Option<Record>,
    /// Prefixes of the record that are withheld from the map.
    pub withheld: Vec<IpNet>,
    /// Revision of the last change that watchers see.
    pub revision: u64,
    /// Id of the token that the node joined with.
    pub token: TokenId,
    /// Time of the join, in seconds since 1970.
    pub joined_at: i64,
    /// Monotonic time of the join, or of the start of this process if that was later.
    pub known_since: Instant,
}

/// The nodes. No two have the same id, name, key or overlay address.
#[derive(Debug, Default)]
pub(super) struct Members {
    by_id: BTreeMap<NodeId, Member>,
    names: BTreeMap<NodeName, NodeId>,
    identities: BTreeMap<IdentityKey, NodeId>,
    wireguard_keys: BTreeMap<WireguardKey, NodeId>,
    overlay_v4: BTreeMap<Ipv4Addr, NodeId>,
    overlay_v6: BTreeMap<Ipv6Addr, NodeId>,
    /// Nodes whose grant is ephemeral.
    ephemeral: BTreeSet<NodeId>,
    /// Nodes with withheld prefixes.
    withheld: BTreeSet<NodeId>,
    /// Number of nodes that were read or written, for tests of the cost of an operation.
    touched: Cell<u64>,
}

impl Members {
    /// Adds a node. Returns false, and changes nothing, if another node has its id, name, a key or
    /// an address.
    pub(super) fn insert(&mut self, member: Member) -> bool {
        let grant = &member.grant;
        let id = grant.node_id;
        let is_taken = self.by_id.contains_key(&id)
            || self.names.contains_key(&grant.name)
            || self.identities.contains_key(&grant.identity_key)
            || grant.wireguard_keys.iter().any(|key| self.wireguard_keys.contains_key(key))
            || self.overlay_v4.contains_key(&grant.overlay.v4)
            || self.overlay_v6.contains_key(&grant.overlay.v6);
        if is_taken {
            return false;
        }
        self.names.insert(grant.name.clone(), id);
        self.identities.insert(grant.identity_key, id);
        for key in &grant.wireguard_keys {
            self.wireguard_keys.insert(*key, id);
        }
        self.overlay_v4.insert(grant.overlay.v4, id);
        self.overlay_v6.insert(grant.overlay.v6, id);
        if grant.ephemeral {
            self.ephemeral.insert(id);
        }
        if !member.withheld.is_empty() {
            self.withheld.insert(id);
        }
        self.touch();
        self.by_id.insert(id, member);
        true
    }

    /// Removes a node.
    pub(super) fn remove(&mut self, id: NodeId) -> Option<Member> {
        let member = self.by_id.remove(&id)?;
        self.touch();
        let grant = &member.grant;
        self.names.remove(&grant.name);
        self.identities.remove(&grant.identity_key);
        for key in &grant.wireguard_keys {
            self.wireguard_keys.remove(key);
        }
        self.overlay_v4.remove(&grant.overlay.v4);
        self.overlay_v6.remove(&grant.overlay.v6);
        self.ephemeral.remove(&id);
        self.withheld.remove(&id);
        Some(member)
    }

    /// Replaces the record of a node.
    pub(super) fn set_record(&mut self, id: NodeId, record: Record) {
        self.edit(id, |member| member.record = Some(record));
    }

    /// Replaces the networks that a node may announce by those of `grant`. All else of its grant stays.
    pub(super) fn set_allowed(&mut self, id: NodeId, grant: Grant) {
        self.edit(id, |member| {
            member.grant.allowed_prefixes = grant.allowed_prefixes;
            member.grant.pod_ranges = grant.pod_ranges;
        });
    }

    /// Replaces the relay role of a node, in a grant that is issued at `issued_at`.
    pub(super) fn set_relay(&mut self, id: NodeId, role: RelayRole, issued_at: i64) {
        self.edit(id, |member| {
            member.grant.relay = role;
            member.grant.issued_at = issued_at;
        });
    }

    /// Replaces the list of withheld prefixes of a node. Returns whether it changed.
    pub(super) fn set_withheld(&mut self, id: NodeId, list: Vec<IpNet>) -> bool {
        if list.is_empty() {
            self.withheld.remove(&id);
        } else if self.by_id.contains_key(&id) {
            self.withheld.insert(id);
        }
        let mut changed = false;
        self.edit(id, |member| {
            changed = member.withheld != list;
            member.withheld = list;
        });
        changed
    }

    /// Sets the revision of a node.
    pub(super) fn set_revision(&mut self, id: NodeId, revision: u64) {
        self.edit(id, |member| member.revision = revision);
    }

    fn edit(&mut self, id: NodeId, change: impl FnOnce(&mut Member)) {
        self.touch();
        if let Some(member) = self.by_id.get_mut(&id) {
            change(member);
        }
    }

    /// Returns a node.
    pub(super) fn get(&self, id: NodeId) -> Option<&Member> {
        self.touch();
        self.by_id.get(&id)
    }

    /// Returns whether a node with this id exists.
    pub(super) fn contains(&self, id: NodeId) -> bool {
        self.by_id.contains_key(&id)
    }

    /// Returns all nodes, sorted by id.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Member> {
        self.by_id.values().inspect(|_| self.touch())
    }

    /// Returns the number of nodes.
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Returns the node that has a name.
    pub(super) fn by_name(&self, name: &NodeName) -> Option<NodeId> {
        self.names.get(name).copied()
    }

    /// Returns the node that has an identity key.
    pub(super) fn by_identity(&self, key: &IdentityKey) -> Option<NodeId> {
        self.identities.get(key).copied()
    }

    /// Returns the node that has a WireGuard key.
    pub(super) fn by_wireguard_key(&self, key: &WireguardKey) -> Option<NodeId> {
        self.wireguard_keys.get(key).copied()
    }

    /// Returns whether a node has this overlay address.
    pub(super) fn has_v4(&self, address: Ipv4Addr) -> bool {
        self.overlay_v4.contains_key(&address)
    }

    /// Returns whether a node has this overlay address.
    pub(super) fn has_v6(&self, address: Ipv6Addr) -> bool {
        self.overlay_v6.contains_key(&address)
    }

    /// Returns the nodes whose grant is ephemeral.
    pub(super) fn ephemeral(&self) -> Vec<NodeId> {
        self.ephemeral.iter().copied().collect()
    }

    /// Returns the nodes with withheld prefixes.
    pub(super) fn with_withheld(&self) -> Vec<NodeId> {
        self.withheld.iter().copied().collect()
    }

    /// Returns how many nodes were read or written since the registry was created.
    pub(super) fn touched(&self) -> u64 {
        self.touched.get()
    }

    fn touch(&self) {
        self.touched.set(self.touched.get() + 1);
    }
}
