//! Inputs that are whole values: each replaces the last one of its kind.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use ipnet::IpNet;
use towline_types::id::NodeId;
use towline_types::node::{Candidate, Grant};

use crate::local_limits::LocalLimits;
use crate::local_networks::LocalNetworks;
use crate::local_node::LocalNode;
use crate::path::LocalAddress;
use crate::peer_table::Observation;
use crate::plan::{TransitPlan, UnderlayPlan};
use crate::static_peers::StaticPeer;

use super::Mesh;

/// # Inputs: whole values that replace the last ones
impl Mesh {
    /// Takes our grant (an operator changed it).
    pub fn set_grant(&mut self, now: Instant, grant: Grant) {
        self.fx.advance(now);
        if self.roster.set_grant(&mut self.fx, grant)
            && let Some(membership) = self.roster.membership()
        {
            self.local.set_grant(&membership.grant);
            self.follow_role();
        }
    }

    /// Takes the candidates that our host and our configuration have now. Those that others
    /// can use come back as [`Output::Advertise`](super::Output::Advertise) when they changed.
    pub fn set_candidates(&mut self, now: Instant, candidates: Vec<Candidate>) {
        self.fx.advance(now);
        self.static_peers.handle_local_change(&mut self.fx);
        if self.local.set_host_candidates(candidates) {
            self.local_changed();
        }
    }

    /// Takes our uplinks, and the candidates as [`Self::set_candidates`] does: they change together.
    /// The uplinks are the addresses of ours that outer datagrams may leave from, each with its
    /// interface, the preferred ones first. Those that arrive at another address of an interface are
    /// answered from its preferred one.
    pub fn set_uplinks(
        &mut self,
        now: Instant,
        uplinks: Vec<LocalAddress>,
        candidates: Vec<Candidate>,
    ) {
        self.fx.advance(now);
        self.static_peers.handle_local_change(&mut self.fx);
        let ends = |local: &LocalNode| [true, false].map(|v4| local.ends(v4));
        let before = ends(&self.local);
        let other_uplinks = self.local.set_uplinks(uplinks);
        if self.local.set_host_candidates(candidates) || ends(&self.local) != before {
            self.local_changed();
        } else if other_uplinks {
            self.addresses_changed();
        }
    }

    /// Takes the prefixes that we announce now: they are reached by the host's own routes,
    /// so neither routed into the tunnel nor guarded.
    pub fn set_prefixes(&mut self, now: Instant, prefixes: Vec<IpNet>) {
        self.fx.advance(now);
        self.roster.set_own_prefixes(&mut self.fx, prefixes);
    }

    /// Takes the networks of this host that stay as they are, even if others announce them: neither routed
    /// into the tunnel nor guarded while the host is connected to them. What others hold inside of them
    /// (their own addresses) is.
    pub fn set_local_networks(&mut self, now: Instant, networks: LocalNetworks) {
        self.fx.advance(now);
        self.settings.set_local_networks(&mut self.fx, networks);
    }

    /// Takes the limits that this host sets: networks that cover what it needs are refused.
    pub fn set_local_limits(&mut self, now: Instant, limits: LocalLimits) {
        self.fx.advance(now);
        self.roster.set_local_limits(&mut self.fx, limits);
    }

    /// Takes the networks to which the host is connected now. Only those of [`Self::set_local_networks`]
    /// among them stay as they are.
    pub fn set_connected_networks(&mut self, now: Instant, connected: BTreeSet<IpNet>) {
        self.fx.advance(now);
        self.settings.set_connected_networks(&mut self.fx, connected);
    }

    /// Takes the networks of this node's pods, which are among what it announces. The plan lets
    /// only the container network's own routes lead there.
    pub fn set_pod_networks(&mut self, now: Instant, networks: Vec<IpNet>) {
        self.fx.advance(now);
        self.settings.set_pod_networks(&mut self.fx, networks);
    }

    /// Takes the addresses that our link has in addition to the mesh's.
    pub fn set_addresses(&mut self, now: Instant, addresses: Vec<IpAddr>) {
        self.fx.advance(now);
        self.settings.set_addresses(&mut self.fx, addresses);
    }

    /// Takes the networks that packets out of the tunnel may be forwarded to, though we do not
    /// announce them.
    pub fn set_forward_to(&mut self, now: Instant, networks: Vec<IpNet>) {
        self.fx.advance(now);
        self.settings.set_forward_to(&mut self.fx, networks);
    }

    /// Takes the networks of this host's links, and the links that lead to the internet: the plan lets
    /// this host be the router of other nodes there.
    pub fn set_transit(&mut self, now: Instant, transit: TransitPlan) {
        self.fx.advance(now);
        self.settings.set_transit(&mut self.fx, transit);
    }

    /// Sets whether packets of this host that enter the tunnel with a source that is not ours get our
    /// address as source.
    pub fn set_masquerade(&mut self, now: Instant, masquerade: bool) {
        self.fx.advance(now);
        self.settings.set_masquerade(&mut self.fx, masquerade);
    }

    /// Takes our own node IPs, at most one of each family, which are announced too: they are the
    /// preferred sources of what enters the tunnel.
    pub fn set_node_ips(&mut self, now: Instant, node_ips: Vec<IpAddr>) {
        self.fx.advance(now);
        self.settings.set_node_ips(&mut self.fx, node_ips);
    }

    /// Takes what of ours travels outside the tunnel now: the plan lets it pass.
    pub fn set_underlay(&mut self, now: Instant, underlay: UnderlayPlan) {
        self.fx.advance(now);
        self.settings.set_underlay(&mut self.fx, underlay);
    }

    /// Takes the peers of our configuration: those that stay keep their sessions.
    pub fn set_static_peers(&mut self, now: Instant, peers: Vec<StaticPeer>) {
        self.fx.advance(now);
        self.resolve();
        self.static_peers.set(&mut self.fx, peers);
    }

    /// Takes the reflectors that the controllers offer. Relays and public nodes are known.
    pub fn set_reflectors(&mut self, now: Instant, reflectors: Vec<SocketAddr>) {
        self.fx.advance(now);
        self.stun.set_offered(&mut self.fx, &self.local, reflectors);
    }

    /// Sets whether a controller is connected that can carry signals.
    pub fn set_controller_connected(&mut self, now: Instant, connected: bool) {
        self.fx.advance(now);
        self.local.set_controller_connected(self.fx.now, connected);
    }

    /// Sets whether no controller confirmed the map for longer than the operator allows. While that is so, the
    /// peer table has static peers only; guards and routes stay.
    pub fn set_map_expired(&mut self, now: Instant, is_expired: bool) {
        self.fx.advance(now);
        if !self.roster.set_map_expired(&mut self.fx, is_expired) {
            return;
        }
        if is_expired {
            let (peers, mut cx) = self.peer_context();
            peers.each(&mut cx, |peer, cx| {
                peer.handle_observation(cx, Observation::SessionExpired);
            });
        } else {
            // The peers, and the NATs on the way, have forgotten this node meanwhile.
            self.local_changed();
        }
    }

    /// Takes a higher boot epoch than that of the configuration: peers knew a later start.
    pub fn set_boot_epoch(&mut self, now: Instant, boot_epoch: u64) {
        self.fx.advance(now);
        self.probing.set_boot_epoch(boot_epoch);
    }

    /// Takes the number of the second UDP port, which is open now; `None`: it could not be opened.
    pub fn set_second_port(&mut self, now: Instant, port: Option<u16>) {
        self.fx.advance(now);
        if port.is_some() {
            self.use_port(port);
        }
    }

    /// Adds to [`Self::withdrawn`] what an earlier start of the agent knew.
    pub fn set_withdrawn(&mut self, now: Instant, withdrawn: impl IntoIterator<Item = IpNet>) {
        self.fx.advance(now);
        self.roster.add_withdrawn(&mut self.fx, withdrawn);
    }

    /// Adds to [`Self::withdrawn_lans`] what an earlier start of the agent knew. The networks are among
    /// those of [`Self::set_withdrawn`].
    pub fn set_withdrawn_lans(&mut self, now: Instant, lans: impl IntoIterator<Item = IpNet>) {
        self.fx.advance(now);
        self.roster.add_withdrawn_lans(&mut self.fx, lans);
    }

    /// Adds to [`Self::withdrawn_by_owner`] what an earlier start of the agent knew. The networks are among
    /// those of [`Self::set_withdrawn`].
    pub fn set_withdrawn_owner(
        &mut self,
        now: Instant,
        owner: NodeId,
        nets: impl IntoIterator<Item = IpNet>,
    ) {
        self.fx.advance(now);
        self.roster.add_withdrawn_owner(&mut self.fx, owner, nets);
    }
}
