//! The nodes of the mesh, and which of them holds what.
//!
//! Invariants, whatever comes in:
//!
//! - A node that was removed never comes back, nor does its identity key under another id.
//! - Of one node the newest record holds; an older one changes nothing.
//! - The identity key of a node never changes. Its record, which that key signs, names its WireGuard keys.
//! - Only a removal takes a node away.
//! - What a node held last stays guarded until another node holds it, or until some time after its node
//!   was removed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use towline_types::id::{IdentityKey, NodeId, NodeName, WireguardKey};
use towline_types::limits;
use towline_types::node::{Grant, MeshConfig, Node, Tombstone};
use towline_types::ownership::overlap;

use crate::changes::{Change, Scope};
use crate::claims::{Claim, Claims};
use crate::config::{MapChange, Membership};
use crate::conflict::Holder;
use crate::effects::Effects;
use crate::local_limits::{Covered, InClear, LocalLimits};
use crate::prefixes::{covering, is_host};
use crate::static_peers::StaticPeers;
use crate::timers::Timer;
use crate::withdrawn::{RELEASE, Withdrawn};

/// Our own membership, and all that the map says of the other nodes.
#[derive(Debug)]
pub(crate) struct Roster {
    /// `None`: no mesh, static peers are all there is.
    membership: Option<Membership>,
    /// Prefixes that we announce; none lies inside another.
    own_prefixes: Vec<IpNet>,
    /// Networks that others may not cover on this host.
    limits: LocalLimits,
    /// True while no controller confirmed the map for longer than the operator allows.
    is_map_expired: bool,
    /// The other nodes, each by its newest record.
    nodes: BTreeMap<NodeId, Arc<Node>>,
    /// Nodes that were removed, this one perhaps among them. Never shrinks.
    removed: BTreeSet<NodeId>,
    /// Identity keys of the removed nodes. Never shrinks.
    removed_keys: BTreeSet<IdentityKey>,
    withdrawn: Withdrawn,
    /// Who holds what, as of the last [`Self::resolve`].
    claims: Claims,
}

/// What a change of the map came to.
#[derive(Debug)]
pub(crate) enum RosterEvent {
    /// A node is new, or its record or grant is another one.
    Node(Arc<Node>),
    /// A node is gone for good.
    Removed(NodeId),
    /// The mesh's configuration is another one.
    Mesh,
}

impl Roster {
    pub(crate) fn new(membership: Option<Membership>) -> Self {
        Self {
            membership,
            own_prefixes: Vec::new(),
            limits: LocalLimits::default(),
            is_map_expired: false,
            nodes: BTreeMap::new(),
            removed: BTreeSet::new(),
            removed_keys: BTreeSet::new(),
            withdrawn: Withdrawn::default(),
            claims: Claims::default(),
        }
    }

    /// Applies a change of the map. Returns what came of it; `None` if it says nothing new.
    pub(crate) fn handle_map_change(
        &mut self,
        fx: &mut Effects,
        change: MapChange,
    ) -> Option<RosterEvent> {
        match change {
            MapChange::Upsert(node) => {
                if !self.is_news(&node) {
                    return None;
                }
                let node = Arc::new(*node);
                self.nodes.insert(node.id(), node.clone());
                fx.mark(Change::Record(node.id()));
                Some(RosterEvent::Node(node))
            }
            MapChange::Remove(tombstone) => {
                let id = self.remove(fx, &tombstone)?;
                fx.mark(Change::Record(id));
                Some(RosterEvent::Removed(id))
            }
            MapChange::Mesh(mesh) => {
                let membership = self.membership.as_mut()?;
                if !mesh.is_newer_than(&membership.mesh) {
                    return None;
                }
                membership.mesh = mesh;
                fx.mark(Change::Ownership);
                Some(RosterEvent::Mesh)
            }
        }
    }

    /// Takes our grant. Returns whether it is another one.
    pub(crate) fn set_grant(&mut self, fx: &mut Effects, grant: Grant) -> bool {
        let Some(membership) = &mut self.membership else { return false };
        if membership.grant == grant {
            return false;
        }
        membership.grant = grant;
        fx.mark(Change::Ownership);
        true
    }

    /// Takes the prefixes that we announce, whole.
    pub(crate) fn set_own_prefixes(&mut self, fx: &mut Effects, prefixes: Vec<IpNet>) {
        let prefixes: Vec<IpNet> = covering(prefixes).into_iter().collect();
        if self.own_prefixes != prefixes {
            self.own_prefixes = prefixes;
            fx.mark(Change::Ownership);
        }
    }

    /// Takes the limits that this host sets, whole.
    pub(crate) fn set_local_limits(&mut self, fx: &mut Effects, limits: LocalLimits) {
        if self.limits != limits {
            self.limits = limits;
            fx.mark(Change::Ownership);
        }
    }

    /// Sets whether the map is too old. Returns whether that is another state than before.
    pub(crate) fn set_map_expired(&mut self, fx: &mut Effects, is_expired: bool) -> bool {
        let is_changed = std::mem::replace(&mut self.is_map_expired, is_expired) != is_expired;
        if is_changed {
            fx.mark(Change::Usability);
        }
        is_changed
    }

    /// Adds networks that were held once.
    pub(crate) fn add_withdrawn(
        &mut self,
        fx: &mut Effects,
        nets: impl IntoIterator<Item = IpNet>,
    ) {
        nets.into_iter().for_each(|net| self.withdrawn.add(net, None, false));
        fx.mark(Change::Ownership);
    }

    /// Adds networks of machines that were held once. They are among those of [`Self::add_withdrawn`].
    pub(crate) fn add_withdrawn_lans(
        &mut self,
        fx: &mut Effects,
        nets: impl IntoIterator<Item = IpNet>,
    ) {
        nets.into_iter().for_each(|net| self.withdrawn.mark_lan(net));
        fx.mark(Change::Ownership);
    }

    /// Adds the last holder of networks of [`Self::add_withdrawn`], the oldest first.
    pub(crate) fn add_withdrawn_owner(
        &mut self,
        fx: &mut Effects,
        owner: NodeId,
        nets: impl IntoIterator<Item = IpNet>,
    ) {
        for net in nets {
            if self.withdrawn.nets().contains(&net) {
                let is_lan = self.withdrawn.lans().contains(&net);
                self.withdrawn.add(net, Some(owner), is_lan);
            }
        }
        self.withdrawn.bound(owner, limits::GUARDED_PREFIXES, &[]);
        if self.removed.contains(&owner) {
            self.release_later(fx, owner);
        }
    }

    /// Releases a withdrawn network, on behalf of the operator. Returns false if it is not withdrawn.
    pub(crate) fn release_withdrawn(&mut self, fx: &mut Effects, net: &IpNet) -> bool {
        let is_released = self.withdrawn.remove(net);
        if is_released {
            fx.mark(Change::Host);
        }
        is_released
    }

    /// Releases what nodes announced that were removed some time ago.
    pub(crate) fn handle_release(&mut self, fx: &mut Effects) {
        if self.withdrawn.release_due(fx.now) {
            fx.mark(Change::Host);
        }
        if let Some(at) = self.withdrawn.next_release() {
            fx.timers.set(Timer::GuardRelease, at);
        }
    }

    /// Decides again who holds what, where something changed. What a node held and none holds now
    /// stays guarded, for a while also if its node was removed.
    pub(crate) fn resolve(&mut self, fx: &mut Effects, static_peers: &mut StaticPeers) {
        let are_resolved = match fx.changes.take_claims() {
            None => true,
            // A static peer gets what the mesh leaves: it has no claim of its own to remember.
            Some(Scope::Nodes(nodes)) if static_peers.is_empty() => self.resolve_nodes(fx, &nodes),
            Some(Scope::All | Scope::Nodes(_)) => false,
        };
        if !are_resolved {
            self.resolve_all(fx, static_peers);
        }
    }

    /// Our membership, if we are in a mesh.
    pub(crate) fn membership(&self) -> Option<&Membership> {
        self.membership.as_ref()
    }

    pub(crate) fn mesh(&self) -> Option<&MeshConfig> {
        self.membership.as_ref().map(|membership| &membership.mesh)
    }

    /// Returns what of the mesh's configuration may let traffic leave the tunnel.
    pub(crate) fn in_clear(&self) -> InClear {
        self.limits.in_clear
    }

    /// Returns the ranges of the mesh that this host guards: the overlay, and the protected ranges that
    /// cover nothing that it needs.
    pub(crate) fn guarded_ranges(&self) -> impl Iterator<Item = IpNet> {
        let overlays = self.mesh().into_iter().flat_map(MeshConfig::overlays);
        let protected = self.mesh().into_iter().flat_map(|mesh| &mesh.protected);
        overlays
            .chain(protected.filter(|range| self.limits.refuses_range(range).is_none()).copied())
    }

    /// Returns the protected ranges that this host does not guard, each with what it covers.
    pub(crate) fn refused_ranges(&self) -> impl Iterator<Item = (IpNet, Covered)> {
        let protected = self.mesh().into_iter().flat_map(|mesh| &mesh.protected);
        protected.filter_map(|range| Some((*range, self.limits.refuses_range(range)?)))
    }

    /// Returns the networks outside the overlay that the operator of this host refuses.
    pub(crate) fn refused_networks(&self) -> impl Iterator<Item = IpNet> {
        let overlays: Vec<IpNet> = self.mesh().into_iter().flat_map(MeshConfig::overlays).collect();
        let is_outside = move |net: &&IpNet| !overlays.iter().any(|range| overlap(range, net));
        self.limits.refused.iter().filter(is_outside).copied()
    }

    /// Whether this node itself was removed from the mesh: then it has no tunnels to its nodes.
    pub(crate) fn is_removed(&self) -> bool {
        let own = self.membership.as_ref().map(|membership| membership.grant.node_id);
        own.is_some_and(|own| self.removed.contains(&own))
    }

    /// Returns whether no controller confirmed the map for longer than the operator allows.
    pub(crate) fn is_map_expired(&self) -> bool {
        self.is_map_expired
    }

    /// Returns whether there may be tunnels to the nodes of the map.
    pub(crate) fn is_usable(&self) -> bool {
        !self.is_removed() && !self.is_map_expired
    }

    pub(crate) fn own_prefixes(&self) -> &[IpNet] {
        &self.own_prefixes
    }

    pub(crate) fn withdrawn(&self) -> &BTreeSet<IpNet> {
        self.withdrawn.nets()
    }

    pub(crate) fn withdrawn_lans(&self) -> &BTreeSet<IpNet> {
        self.withdrawn.lans()
    }

    /// Returns the withdrawn networks of each node, the oldest first.
    pub(crate) fn withdrawn_by_owner(&self) -> impl Iterator<Item = (NodeId, Vec<IpNet>)> {
        self.withdrawn.by_owner()
    }

    /// Returns the node that held a withdrawn network last, if it is known.
    pub(crate) fn last_holder(&self, net: &IpNet) -> Option<NodeId> {
        self.withdrawn.owner(net)
    }

    /// Returns the name of a node.
    pub(crate) fn name(&self, id: NodeId) -> Option<&NodeName> {
        self.nodes.get(&id).map(|node| node.name())
    }

    /// Who holds what, as of the last [`Self::resolve`].
    pub(crate) fn claims(&self) -> &Claims {
        &self.claims
    }

    /// What a node holds, as of the last [`Self::resolve`].
    pub(crate) fn claim(&self, id: NodeId) -> Option<&Claim> {
        self.claims.of(id)
    }

    /// The node that holds a key, as of the last [`Self::resolve`].
    pub(crate) fn key_holder(&self, key: &WireguardKey) -> Option<NodeId> {
        self.claims.key(key)
    }

    /// Whether a node is another one, of this mesh, that was never removed, and newer than what is
    /// known of it.
    fn is_news(&self, node: &Node) -> bool {
        let Some(Membership { grant, mesh }) = &self.membership else { return false };
        let id = node.id();
        let gone =
            self.removed.contains(&id) || self.removed_keys.contains(&node.grant().identity_key);
        if id == grant.node_id || gone || node.grant().mesh_id != mesh.mesh_id {
            return false;
        }
        let age = |node: &Node| (node.record().generation, node.grant().issued_at);
        match self.nodes.get(&id) {
            None => self.nodes.len() < limits::NODES,
            // Of equal age is also what differs only by the prefixes that the controller withholds:
            // the one that came last holds.
            Some(known) => {
                known.grant().identity_key == node.grant().identity_key
                    && age(known) <= age(node)
                    && **known != *node
            }
        }
    }

    /// Returns the other node that a tombstone took away, if it took one.
    fn remove(&mut self, fx: &mut Effects, tombstone: &Tombstone) -> Option<NodeId> {
        let Membership { grant, mesh } = self.membership.as_ref()?;
        let id = tombstone.node_id;
        if tombstone.mesh_id != mesh.mesh_id {
            return None;
        }
        let is_own = id == grant.node_id;
        self.removed_keys.insert(tombstone.identity_key);
        if self.removed.insert(id) && is_own {
            fx.mark(Change::Usability);
        }
        self.release_later(fx, id);
        self.nodes.remove(&id).map(|_| id)
    }

    /// Resolves the claims of some nodes. Returns false where they concern other nodes too, so that
    /// all have to be resolved.
    fn resolve_nodes(&mut self, fx: &mut Effects, nodes: &BTreeSet<NodeId>) -> bool {
        let ranges: Vec<IpNet> = self.guarded_ranges().collect();
        for id in nodes {
            let held = self.claims.of(*id).cloned();
            let held = held.unwrap_or_default();
            self.withdraw(fx, &ranges, *id, &held);
            let alone = match (self.nodes.get(id), &self.membership) {
                (Some(node), Some(membership)) => {
                    self.claims.change(membership, &self.limits, node)
                }
                _ => self.claims.remove(*id),
            };
            fx.mark(Change::Routes(*id));
            if !alone {
                return false;
            }
            let now = self.claims.of(*id).into_iter().flat_map(|claim| &claim.prefixes);
            // Another node of a group may still hold what this one held.
            for net in now.chain(held.prefixes.iter().filter(|net| self.claims.holds(**net))) {
                self.withdrawn.remove(net);
            }
            self.bound_withdrawn(fx, &ranges, *id);
        }
        true
    }

    fn resolve_all(&mut self, fx: &mut Effects, static_peers: &mut StaticPeers) {
        let claims = match &self.membership {
            Some(membership) => {
                let nodes = self.nodes.values();
                Claims::resolve(membership, &self.limits, &self.own_prefixes, nodes)
            }
            None => Claims::default(),
        };
        let ranges: Vec<IpNet> = self.guarded_ranges().collect();
        let before = std::mem::replace(&mut self.claims, claims);
        for (node, claim) in before.iter() {
            self.withdraw(fx, &ranges, node.id(), claim);
            if self.claims.of(node.id()) != Some(claim) {
                fx.mark(Change::Routes(node.id()));
            }
        }
        for (node, claim) in self.claims.iter() {
            if before.of(node.id()).is_none() {
                fx.mark(Change::Routes(node.id()));
            }
            for held in &claim.prefixes {
                self.withdrawn.remove(held);
            }
        }
        if !static_peers.is_empty() {
            self.resolve_static_peers(static_peers);
            fx.mark(Change::OwnNetworks);
        }
        for held in static_peers.prefixes() {
            self.withdrawn.remove(held);
        }
        self.prune_withdrawn(fx, &ranges);
        for owner in self.withdrawn.owners().collect::<Vec<_>>() {
            self.bound_withdrawn(fx, &ranges, owner);
        }
    }

    /// Keeps what a node held guarded. The ranges of the mesh are guarded anyway.
    fn withdraw(&mut self, fx: &mut Effects, ranges: &[IpNet], node: NodeId, held: &Claim) {
        for net in &held.prefixes {
            if !ranges.iter().any(|range| range.contains(net)) {
                self.withdrawn.add(*net, Some(node), held.lans.contains(net));
            }
        }
        if self.removed.contains(&node) {
            self.release_later(fx, node);
        }
    }

    /// Bounds what is guarded for a node: what it holds outside the ranges of the mesh, and what it held
    /// there last.
    fn bound_withdrawn(&mut self, fx: &mut Effects, ranges: &[IpNet], node: NodeId) {
        let is_outside = |net: &&IpNet| !ranges.iter().any(|range| range.contains(*net));
        let held = self.claims.of(node).into_iter().flat_map(|claim| &claim.prefixes);
        let room = limits::GUARDED_PREFIXES.saturating_sub(held.filter(is_outside).count());
        let known = self.nodes.get(&node);
        let pod_ranges = known.map_or(&[][..], |node| node.grant().pod_ranges.as_slice());
        if self.withdrawn.bound(node, room, pod_ranges) {
            // No change of a node tells the plan of it.
            fx.mark(Change::Host);
        }
    }

    /// Has what a removed node announced released after some time.
    fn release_later(&mut self, fx: &mut Effects, node: NodeId) {
        self.withdrawn.release_at(node, fx.now + RELEASE);
        if let Some(at) = self.withdrawn.next_release() {
            fx.timers.set(Timer::GuardRelease, at);
        }
    }

    /// Releases withdrawn networks that this host would refuse now, and those in the ranges that the mesh
    /// guards anyway. One address may be a node's own, whose grant named it.
    fn prune_withdrawn(&mut self, fx: &mut Effects, ranges: &[IpNet]) {
        let Some(membership) = &self.membership else { return };
        let (limits, grant) = (&self.limits, &membership.grant);
        let is_pruned = self.withdrawn.prune(|net, is_lan| {
            let is_refused = !is_host(net) && limits.refuses(grant, net, is_lan).is_some();
            is_refused || ranges.iter().any(|range| range.contains(net))
        });
        if is_pruned {
            fx.mark(Change::Host);
        }
    }

    /// Static peers get what neither the mesh nor one of its nodes holds, nor we.
    fn resolve_static_peers(&self, static_peers: &mut StaticPeers) {
        let ours = self.own_prefixes.iter().map(|net| (*net, Holder::ThisNode));
        let mut held: Vec<(IpNet, Holder)> = ours.collect();
        if let Some(mesh) = self.mesh() {
            held.extend(mesh.overlays().map(|net| (net, Holder::Mesh)));
        }
        let holder = |id: &NodeId| self.nodes.get(id).map(|node| Holder::Node(node.name().clone()));
        for (node, claim) in self.claims.iter() {
            let holder = Holder::Node(node.name().clone());
            held.extend(claim.prefixes.iter().map(|net| (*net, holder.clone())));
        }
        let own_key =
            self.membership.as_ref().and_then(|own| own.grant.wireguard_keys.first().copied());
        let key_holder = |key: &WireguardKey| {
            if own_key == Some(*key) {
                Some(Holder::ThisNode)
            } else {
                self.claims.key(key).and_then(|id| holder(&id))
            }
        };
        static_peers.resolve(held.into_iter(), key_holder);
    }
}
