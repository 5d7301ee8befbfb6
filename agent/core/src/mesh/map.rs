//! What the map says of the other nodes, and who of them holds what.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use rand::Rng;
use towline_types::id::{NodeId, WireguardKey};
use towline_types::limits;
use towline_types::node::{Node, Tombstone};

use super::{EAGER_PEERS, Membership, Mesh};
use crate::changes::{Change, Scope};
use crate::claims::Claims;
use crate::homes;
use crate::peer::Peer;

/// First attempts of many peers that come at once are spread over this much for each.
const SPREAD_PER_PEER: Duration = Duration::from_millis(2);
/// And over no more than this.
const SPREAD_MAX: Duration = Duration::from_secs(2);

/// Public nodes that reflect for us, beside controllers and relays.
const PUBLIC_REFLECTORS: usize = 4;

impl Mesh {
    pub(super) fn upsert(&mut self, node: Node) {
        let Some(membership) = &self.config.membership else { return };
        let id = node.id();
        let gone =
            self.removed.contains(&id) || self.removed_keys.contains(&node.grant().identity_key);
        let ours = id == membership.grant.node_id;
        if ours || gone || node.grant().mesh_id != membership.mesh.mesh_id {
            return;
        }
        let age = |node: &Node| (node.record().generation, node.grant().issued_at);
        let known = self.peers.get(&id).map(Peer::node);
        // Of equal age is also what differs only by the prefixes that the controller withholds:
        // the later word holds.
        if known.is_none() && self.peers.len() >= limits::NODES
            || known.is_some_and(|known| age(known) > age(&node) || **known == node)
        {
            return;
        }
        self.node_changed(id, Some(&node));
        let known = self.peers.contains_key(&id);
        let node = Arc::new(node);
        if known {
            self.with_peer(id, |peer, cx| peer.set_node(cx, node));
        } else {
            let peers = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
            let spread = SPREAD_PER_PEER.saturating_mul(peers).min(SPREAD_MAX);
            let delay = spread.mul_f64(self.rng.random());
            let delay = (self.peers.len() < EAGER_PEERS).then_some(delay);
            let peer = Peer::new(&mut self.context().1, node, delay);
            self.peers.insert(id, peer);
        }
        self.changes.mark(Change::Record(id));
    }

    pub(super) fn remove(&mut self, tombstone: &Tombstone) {
        let Some(membership) = &self.config.membership else { return };
        let id = tombstone.node_id;
        if id == membership.grant.node_id || tombstone.mesh_id != membership.mesh.mesh_id {
            return;
        }
        self.removed.insert(id);
        self.removed_keys.insert(tombstone.identity_key);
        if let Some(peer) = self.peers.remove(&id) {
            peer.forget(&mut self.timers);
            self.node_changed(id, None);
            self.changes.mark(Change::Record(id));
        }
    }

    /// Decides anew who holds what, if the map changed; what somebody held and nobody holds now
    /// stays guarded, unless its node was removed.
    pub(super) fn resolve_claims(&mut self) {
        match self.changes.take_claims() {
            None => {}
            // A static peer gets what the mesh leaves: it has no claim of its own to remember.
            Some(Scope::Nodes(nodes)) if self.static_peers.is_empty() => self.resolve_nodes(&nodes),
            Some(Scope::All | Scope::Nodes(_)) => self.resolve_all(),
        }
    }

    fn resolve_nodes(&mut self, nodes: &BTreeSet<NodeId>) {
        for id in nodes {
            let held = self.claims.of(*id).map(|claim| claim.prefixes.clone());
            let alone = match (self.peers.get(id), &self.config.membership) {
                (Some(peer), Some(membership)) => {
                    self.withdrawn.extend(held.unwrap_or_default());
                    self.claims.change(&membership.grant, peer.node())
                }
                _ => self.claims.remove(*id),
            };
            self.changes.mark(Change::Routes(*id));
            if !alone {
                return self.resolve_all();
            }
            for held in self.claims.of(*id).into_iter().flat_map(|claim| &claim.prefixes) {
                self.withdrawn.remove(held);
            }
        }
    }

    fn resolve_all(&mut self) {
        let nodes = self.peers.values().map(Peer::node);
        let claims = match &self.config.membership {
            Some(membership) => Claims::resolve(&membership.grant, &self.own_prefixes, nodes),
            None => Claims::default(),
        };
        let before = std::mem::replace(&mut self.claims, claims);
        for (id, claim) in before.iter() {
            if self.peers.contains_key(id) {
                self.withdrawn.extend(&claim.prefixes);
            }
            if self.claims.of(*id) != Some(claim) {
                self.changes.mark(Change::Routes(*id));
            }
        }
        for (id, claim) in self.claims.iter() {
            if before.of(*id).is_none() {
                self.changes.mark(Change::Routes(*id));
            }
            for held in &claim.prefixes {
                self.withdrawn.remove(held);
            }
        }
        if !self.static_peers.is_empty() {
            self.resolve_static_peers();
            self.changes.mark(Change::OwnNetworks);
        }
        for held in self.static_peers.prefixes() {
            self.withdrawn.remove(held);
        }
    }

    /// Static peers get what neither the mesh nor one of its nodes holds, nor we.
    fn resolve_static_peers(&mut self) {
        let ours = self.own_prefixes.iter().map(|net| (*net, "this node".to_owned()));
        let mut held: Vec<(IpNet, String)> = ours.collect();
        if let Some(Membership { mesh, .. }) = &self.config.membership {
            for net in [IpNet::V6(mesh.overlay_v6), IpNet::V4(mesh.overlay_v4)] {
                held.push((net, "the mesh".into()));
            }
        }
        let name = |id: &NodeId| self.peers.get(id).map(|peer| peer.node().name().to_string());
        for (id, claim) in self.claims.iter() {
            let name = name(id).unwrap_or_default();
            held.extend(claim.prefixes.iter().map(|net| (*net, name.clone())));
        }
        let key_holder = |key: &WireguardKey| {
            let ours = self.local.key == Some(*key);
            if ours {
                Some("this node".into())
            } else {
                self.claims.key(key).and_then(|id| name(&id))
            }
        };
        self.static_peers.resolve(held.into_iter(), key_holder);
    }

    /// What a node is to all, not only as a peer: a relay, a reflector.
    pub(super) fn node_changed(&mut self, id: NodeId, node: Option<&Node>) {
        let own = self.own_id();
        let relays = self.homes.update(id, node);
        if relays && !self.config.relay {
            self.homes.follow(self.now, own, &mut self.timers, false);
        }
        let public = node.map(homes::addresses).unwrap_or_default();
        let known = self.public.get(&id).map(Vec::as_slice).unwrap_or_default();
        let changed = known != public;
        let of_use = self.public.len() < PUBLIC_REFLECTORS || self.public.contains_key(&id);
        if changed && public.is_empty() {
            self.public.remove(&id);
        } else if changed && of_use {
            self.public.insert(id, public);
        }
        if relays || changed && of_use {
            let public = self.public.values().flatten().copied();
            self.reflex.mesh = self.homes.addresses().chain(public).collect();
            self.reflex.follow(self.now, &self.local, &mut self.timers, false);
        }
    }
}
