//! What a mesh tells: its peers and paths, what it guards, and how it is reached.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use towline_types::id::{NodeId, NodeName, WireguardKey};
use towline_types::node::{Grant, MeshConfig, RelayRole};

use crate::counters::Counters;
use crate::forwarding::ForwardingTable;
use crate::local_limits::Covered;
use crate::path::Path;
use crate::peer::{NetworkConditions, Peer};
use crate::peer_history::PeerChange;
use crate::peer_table::PeerTable;
use crate::reason::PeerReason;
use crate::relay_server::RelayServer;
use crate::static_peers::StaticPeerStatus;
use crate::status::{
    GuardReason, GuardedNetwork, PathStatus, PeerState, PeerStatus, ReflectorStatus, RelayStatus,
};
use crate::stun_client::Mapping;

use super::Mesh;

/// # What is known
///
/// After a change of the map, the holders of keys and prefixes and the conflicts are current from the
/// next [`Self::poll_output`] on; all else is current at once.
impl Mesh {
    /// Our own grant, if we are in a mesh.
    pub fn grant(&self) -> Option<&Grant> {
        self.roster.membership().map(|membership| &membership.grant)
    }

    /// What holds for the whole mesh.
    pub fn config(&self) -> Option<&MeshConfig> {
        self.roster.mesh()
    }

    /// Returns the protected ranges of the mesh that this host does not guard, each with what it covers.
    pub fn refused_ranges(&self) -> impl Iterator<Item = (IpNet, Covered)> {
        self.roster.refused_ranges()
    }

    /// Returns the ranges of the mesh that this host guards.
    pub fn guarded_ranges(&self) -> impl Iterator<Item = IpNet> {
        self.roster.guarded_ranges()
    }

    /// Returns whether this node itself was removed from the mesh. Its peer table then has static peers
    /// only; guards and routes stay.
    pub fn is_removed(&self) -> bool {
        self.roster.is_removed()
    }

    /// Returns whether the map is too old, as [`Mesh::set_map_expired`] was told.
    pub fn is_map_expired(&self) -> bool {
        self.roster.is_map_expired()
    }

    /// Returns the peer table that was handed out last; `None` before the first one.
    pub fn peer_table(&self) -> Option<&Arc<PeerTable>> {
        self.derived.table()
    }

    /// Returns the forwarding table of this node's relay; `None` if it does not relay.
    pub fn forwarding_table(&self) -> Option<&ForwardingTable> {
        self.relay_server.as_ref().map(RelayServer::table)
    }

    /// Returns the state of this node's relay; `None` if it does not relay.
    pub fn relay(&self) -> Option<RelayStatus> {
        self.relay_server.as_ref().map(RelayServer::status)
    }

    /// Returns the relays, this node among them, that are used although no operator decided that they
    /// may relay: the next version does not use them.
    pub fn undecided_relays(&self) -> impl Iterator<Item = &NodeName> {
        let grant = self.grant().filter(|_| self.relay_server.is_some());
        let own = grant.filter(|grant| grant.relay == RelayRole::Undecided);
        own.map(|grant| &grant.name).into_iter().chain(self.relays.undecided())
    }

    /// Returns whether the configuration makes this node a relay, but its grant denies it.
    pub fn is_relay_denied(&self) -> bool {
        self.relay_limits.is_some() && self.grant().is_some() && self.relay_server.is_none()
    }

    /// Networks that nobody holds now but a node held last: they stay guarded. To be given back
    /// by [`Self::set_withdrawn`] at the next start.
    pub fn withdrawn(&self) -> &BTreeSet<IpNet> {
        self.roster.withdrawn()
    }

    /// Returns those of [`Self::withdrawn`] that are networks of machines rather than of pods. Pass them to
    /// [`Self::set_withdrawn_lans`] at the next start.
    pub fn withdrawn_lans(&self) -> &BTreeSet<IpNet> {
        self.roster.withdrawn_lans()
    }

    /// Returns those of [`Self::withdrawn`] whose last holder is known, by that node, the oldest first. Pass
    /// them to [`Self::set_withdrawn_owner`] at the next start.
    pub fn withdrawn_by_owner(&self) -> impl Iterator<Item = (NodeId, Vec<IpNet>)> {
        self.roster.withdrawn_by_owner()
    }

    /// Returns the networks that this host guards, each with the reason, sorted by network.
    pub fn guarded_networks(&self) -> Vec<GuardedNetwork> {
        let network = |network, reason| GuardedNetwork { network, reason };
        let overlays: Vec<IpNet> =
            self.roster.mesh().into_iter().flat_map(MeshConfig::overlays).collect();
        let of_mesh = |net: IpNet| {
            let is_overlay = overlays.contains(&net);
            network(net, if is_overlay { GuardReason::Overlay } else { GuardReason::Protected })
        };
        let mut all: Vec<GuardedNetwork> = self.roster.guarded_ranges().map(of_mesh).collect();
        for (node, claim) in self.roster.claims().iter() {
            let inside = |net: &&IpNet| !overlays.iter().any(|range| range.contains(*net));
            let announced = claim.prefixes.iter().filter(inside);
            let reason = || GuardReason::Announced(node.name().clone());
            all.extend(announced.map(|net| network(*net, reason())));
        }
        let static_peers = self.static_peers.prefixes();
        all.extend(static_peers.map(|net| network(*net, GuardReason::StaticPeer)));
        for net in self.roster.withdrawn() {
            let owner = self.roster.last_holder(net);
            let name = owner.and_then(|owner| self.roster.name(owner)).cloned();
            all.push(network(*net, GuardReason::Withdrawn { owner, name }));
        }
        all.sort_by_key(|guarded| guarded.network);
        all
    }

    /// Every peer, by node id.
    pub fn peers(&self) -> impl Iterator<Item = PeerStatus> + '_ {
        let conditions = self.conditions();
        self.peers.iter().map(move |peer| self.status(peer, conditions))
    }

    /// Returns every peer that has a Kubernetes API server for others, by node id.
    pub fn api_servers(&self) -> impl Iterator<Item = PeerStatus> + '_ {
        let conditions = self.conditions();
        let servers = self.peers.iter().filter(|peer| peer.node().api_port().is_some());
        servers.map(move |peer| self.status(peer, conditions))
    }

    /// One peer.
    pub fn peer(&self, id: NodeId) -> Option<PeerStatus> {
        self.peers.get(id).map(|peer| self.status(peer, self.conditions()))
    }

    /// Every path to a peer that was tried or can be tried: those that something came over, then the
    /// candidates that never answered.
    pub fn paths(&self, id: NodeId) -> Vec<PathStatus> {
        let Some(peer) = self.peers.get(id) else { return Vec::new() };
        let mut paths = peer.paths(self.fx.now, &self.local);
        for path in paths.iter_mut().filter(|status| status.path.is_relayed()) {
            path.relay = self.relays.at(path.path.remote).cloned();
        }
        paths
    }

    /// The changes of state and path of a peer that are remembered, the oldest first.
    pub fn history(&self, id: NodeId) -> Vec<PeerChange> {
        let peer = self.peers.get(id);
        peer.map(|peer| peer.history().iter().copied().collect()).unwrap_or_default()
    }

    /// The node that holds a WireGuard key.
    pub fn node_id(&self, key: &WireguardKey) -> Option<NodeId> {
        self.roster.key_holder(key)
    }

    /// Every static peer, by key.
    pub fn static_peers(&self) -> impl Iterator<Item = StaticPeerStatus> + '_ {
        self.static_peers.statuses(self.fx.now)
    }

    /// Returns the second UDP port, while it is in use.
    pub fn second_port(&self) -> Option<u16> {
        self.settings.second_port()
    }

    /// Returns the reflectors of the controllers that never answered, if peers can only reach us at an address
    /// that a reflector has to find.
    pub fn silent_reflectors(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.stun.silent().filter(|_| !self.local.is_reachable_v4())
    }

    /// Returns the reflectors that are known, with what they answered lately.
    pub fn reflectors(&self) -> Vec<ReflectorStatus> {
        self.stun.reflectors(&self.local)
    }

    /// What was refused or held back.
    pub fn counters(&self) -> Counters {
        self.fx.counters
    }

    /// How the NAT on our side maps, once two reflectors answered.
    pub fn mapping(&self) -> Option<Mapping> {
        self.stun.mapping(&self.local)
    }

    fn conditions(&self) -> NetworkConditions {
        let is_alone = self.peers.iter().all(|peer| peer.last_handshake().is_none());
        NetworkConditions {
            has_relays: !self.relays.is_empty(),
            are_relays_silent: self.relays.is_silent(),
            is_silent: self.stun.is_silent(is_alone),
            mapping: self.mapping(),
        }
    }

    fn status(&self, peer: &Peer, conditions: NetworkConditions) -> PeerStatus {
        let claim = self.roster.claim(peer.id());
        let reason = match claim.and_then(|claim| claim.key_holder.as_ref()) {
            Some(holder) => Some(PeerReason::KeyConflict { holder: holder.clone() }),
            None => peer.reason(self.fx.now, &self.local, conditions),
        };
        // What is not checked may have ended: it is shown as what it will be treated as.
        let unchecked = peer.unchecked_for(self.fx.now, self.peers.is_eager());
        let (state, path, reason) = match unchecked {
            Some(time) => {
                (PeerState::Idle, None, Some(PeerReason::Unchecked { seconds: time.as_secs() }))
            }
            None => (peer.state(), peer.path(), reason),
        };
        let relayed = path.filter(Path::is_relayed);
        PeerStatus {
            node: peer.node().clone(),
            state,
            since: peer.since(),
            reason,
            path,
            relay: relayed.and_then(|path| self.relays.at(path.remote)).cloned(),
            mtu: peer.mtu(),
            is_single: path.is_some() && peer.is_single(),
            rtt: peer.rtt(),
            loss: peer.loss(),
            last_handshake: peer.last_handshake(),
            prefixes: claim.map(|claim| claim.prefixes.clone()).unwrap_or_default(),
            conflicts: claim.map(|claim| claim.conflicts.clone()).unwrap_or_default(),
        }
    }
}
