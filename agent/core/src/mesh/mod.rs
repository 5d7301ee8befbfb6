//! The mesh as one node sees it: its peers, their states, and what is to be done.
//!
//! [`Mesh`] is made of parts that own their state; it passes each input on to those that it
//! concerns.
//!
//! | part | owns |
//! |---|---|
//! | `Roster` | our membership, the nodes of the map, who was removed, who holds what |
//! | `Peers` | for each node: its paths, its state |
//! | `StaticPeers` | the peers of the configuration |
//! | `LocalNode` | our own candidates and uplinks |
//! | `HomeRelays` | the relays of the mesh, and where we are registered |
//! | `RelayServer` | the nodes and channels that we relay for |
//! | `StunClient` | the reflectors, and our addresses as they see them |
//! | `SecondPort` | whether a second UDP port is to be used |
//! | `Probing` | pings that wait for their pongs, and what bounds them |
//! | `HostSettings` | what host and configuration add to the plan |
//! | `Derived` | peer table and plan, as they were handed out last |
//! | `Effects` | time, randomness, deadlines, outputs; shared by all parts |

mod known;
mod settings;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_types::frame::Probe;
use towline_types::id::{NodeId, WireguardKey};
use towline_types::node::{Grant, RelayRole};

use crate::derived::Derived;
use crate::effects::Effects;
use crate::home_relays::{ChannelPeer, HomeRelays};
use crate::local_node::LocalNode;
use crate::path::{ChannelId, LocalPort, Path, Source};
use crate::peer::{Peer, PeerContext};
use crate::peer_table::Observation;
use crate::peers::Peers;
use crate::prefixes::is_private;
use crate::probing::{CallOrder, Probing};
use crate::relay_server::RelayServer;
use crate::roster::{Roster, RosterEvent};
use crate::routing::{HostSettings, RoutingInput};
use crate::second_port::SecondPort;
use crate::static_peers::StaticPeers;
use crate::stun_client::StunClient;
use crate::timers::Timer;

pub use crate::config::{Config, MapChange, Membership, RelayLimits};
pub use crate::output::{Output, Transmit};
pub use crate::peers::EAGER_PEERS;
pub use crate::status::{
    GuardReason, GuardedNetwork, PathStatus, PeerState, PeerStatus, ReflectorStatus, RelayStatus,
    WakeReason,
};
pub use crate::stun_client::Mapping;

/// Every peer of one node. See the crate's contract.
#[derive(Debug)]
pub struct Mesh {
    roster: Roster,
    peers: Peers,
    static_peers: StaticPeers,
    local: LocalNode,
    relays: HomeRelays,
    /// Limits of our relay; `None` if the configuration makes us none.
    relay_limits: Option<RelayLimits>,
    /// `None` if the configuration or our grant does not let this node relay.
    relay_server: Option<RelayServer>,
    stun: StunClient,
    second_port: SecondPort,
    probing: Probing,
    settings: HostSettings,
    derived: Derived,
    fx: Effects,
}

impl Mesh {
    /// A mesh without peers. `seed` is the only source of randomness; probes are unforgeable only
    /// if nobody else knows it.
    pub fn new(mut config: Config, seed: [u8; 32], now: Instant) -> Self {
        let membership = config.membership.take();
        let own = membership.as_ref().map(|own| own.grant.node_id);
        let grant = membership.as_ref().map(|own| &own.grant);
        let limits = config.relay.filter(|_| can_relay(grant));
        let mut fx = Effects::new(seed, now);
        Self {
            local: LocalNode::new(membership.as_ref(), config.mtu),
            relays: HomeRelays::new(own.filter(|_| limits.is_none())),
            relay_limits: config.relay,
            relay_server: limits.map(RelayServer::new),
            roster: Roster::new(membership),
            peers: Peers::default(),
            static_peers: StaticPeers::default(),
            stun: StunClient::default(),
            second_port: SecondPort::new(&mut fx.rng),
            probing: Probing::new(config.boot_epoch),
            settings: HostSettings::new(config),
            derived: Derived::default(),
            fx,
        }
    }
}

/// # Inputs: what happened
impl Mesh {
    /// Handles a change of the map. The entry of our own node is ignored, and so is what is older
    /// than what we know: changes may come twice and in any order. Without a mesh there is no map.
    pub fn handle_map_change(&mut self, now: Instant, change: MapChange) {
        self.fx.advance(now);
        match self.roster.handle_map_change(&mut self.fx, change) {
            None => {}
            Some(RosterEvent::Mesh) => {
                if let Some(mesh) = self.roster.mesh() {
                    self.local.set_mesh(mesh);
                }
            }
            Some(RosterEvent::Removed(id)) => {
                let (peers, mut cx) = self.peer_context();
                peers.handle_removal(&mut cx, id);
                self.probing.unanswered.forget(id);
                let changed = self.relays.handle_node(&mut self.fx, id, None);
                let relays = changed.then_some(&self.relays);
                self.stun.handle_node(&mut self.fx, &self.local, id, None, relays);
            }
            Some(RosterEvent::Node(node)) => {
                let id = node.id();
                let changed = self.relays.handle_node(&mut self.fx, id, Some(&node));
                let relays = changed.then_some(&self.relays);
                self.stun.handle_node(&mut self.fx, &self.local, id, Some(&node), relays);
                let (peers, mut cx) = self.peer_context();
                peers.handle_node(&mut cx, node);
            }
        }
    }

    /// Handles what the data plane saw. An unknown peer is ignored: it was removed in the meantime.
    pub fn handle_observation(&mut self, now: Instant, peer: WireguardKey, what: Observation) {
        self.fx.advance(now);
        if let Observation::Handshake { from } = what {
            self.answered(&from);
        }
        if let Some(id) = self.node_with(&peer) {
            self.with_peer(id, |peer, cx| peer.handle_observation(cx, what));
        }
        self.static_peers.handle_observation(&mut self.fx, &self.local, peer, what);
    }

    /// Handles a message that was opened with the key of the pair of us and `peer`, so it is
    /// authentic; [`ProbeSession`](crate::probe_session::ProbeSession) decided to deliver it. A ping
    /// and a challenge are answered already. `source` is where it came from; `None`: a controller carried
    /// it, which holds for a [`Probe::CallMe`] alone.
    pub fn handle_message(
        &mut self,
        now: Instant,
        peer: WireguardKey,
        source: Option<Source>,
        message: Probe,
    ) {
        self.fx.advance(now);
        let node = self.node_with(&peer);
        let from = source.map(|source| source.path);
        // A peer or a relay whose own probes arrive may still get nothing of ours.
        let is_answer = matches!(
            message,
            Probe::Pong { .. }
                | Probe::Registered { .. }
                | Probe::Opened { .. }
                | Probe::Refused { .. }
        );
        if let Some(from) = from.filter(|_| is_answer && node.is_some()) {
            self.answered(&from);
        }
        // A relay serves nodes that reach it directly.
        let is_served = node.is_some()
            && from.is_some_and(|it| !it.is_relayed() && self.local.can_send_to_node(it.remote));
        match (message, source) {
            (Probe::CallMe { boot_epoch, number, candidates }, _) => {
                let order = CallOrder { boot_epoch, number };
                match node {
                    Some(id) => {
                        self.with_peer(id, |peer, cx| peer.handle_call(cx, order, &candidates));
                    }
                    None => self.fx.counters.signals_refused += 1,
                }
            }
            // Every other message is about the path that it came over.
            (_, None) => {}
            // The data plane answered a ping, and took a proof.
            (Probe::Ping { .. } | Probe::Proof { .. }, Some(Source { path: from, .. })) => {
                if let Some(id) = node {
                    self.with_peer(id, |peer, cx| peer.handle_ping(cx, from));
                }
            }
            (Probe::Challenge { .. }, Some(Source { path: from, .. })) => {
                if let Some(id) = node {
                    self.handle_challenge(id, peer, from);
                }
            }
            (Probe::Pong { transaction, observed }, Some(Source { path: from, .. })) => {
                let Some(id) = node else { return };
                let server = self.relay_server.as_mut();
                let is_proof =
                    server.is_some_and(|it| it.handle_pong(&mut self.fx, peer, from, transaction));
                if !is_proof {
                    self.handle_pong(id, from, transaction, observed);
                }
            }
            (Probe::Register { transaction }, Some(source)) => {
                match self.relay_server.as_mut().filter(|_| is_served) {
                    Some(server) => {
                        server.handle_register(&mut self.fx, peer, source, transaction);
                    }
                    None => self.fx.counters.relay_requests_refused += 1,
                }
            }
            (Probe::Open { transaction, peer: other }, Some(source)) => {
                match self.relay_server.as_mut().filter(|_| is_served) {
                    Some(server) => {
                        server.handle_open(&mut self.fx, (peer, source), other, transaction);
                    }
                    None => self.fx.counters.relay_requests_refused += 1,
                }
            }
            (answer, Some(Source { path: from, .. })) => {
                let channel = self.relays.handle_answer(&mut self.fx, node, from, &answer);
                let Some((peer, path)) = channel else { return };
                let id = match peer {
                    ChannelPeer::Node(id) => Some(id),
                    ChannelPeer::Key(key) => self.roster.key_holder(&key),
                };
                if let Some(id) = id {
                    self.with_peer(id, |peer, cx| peer.handle_channel(cx, path));
                }
            }
        }
    }

    /// Handles the channels that carried something since the last call: the answer to
    /// [`Output::ReportChannels`].
    pub fn handle_channels_used(
        &mut self,
        now: Instant,
        used: impl IntoIterator<Item = ChannelId>,
    ) {
        self.fx.advance(now);
        if let Some(server) = &mut self.relay_server {
            server.handle_used(&mut self.fx, used);
        }
    }

    /// Handles that this machine slept: its peers and the NATs on the way have forgotten it meanwhile,
    /// while its own timers stood still.
    pub fn handle_wake(&mut self, now: Instant) {
        self.fx.advance(now);
        self.static_peers.handle_local_change(&mut self.fx);
        self.local_changed();
    }

    /// Handles a reflector's answer: `mapped` is our address as it saw it.
    pub fn handle_stun(
        &mut self,
        now: Instant,
        from: SocketAddr,
        transaction: [u8; 12],
        mapped: SocketAddr,
    ) {
        self.fx.advance(now);
        if self.stun.handle_answer(&mut self.fx, &self.local, from, transaction, mapped) {
            self.advertise();
        }
    }

    /// Does what is due. To be called at the time that [`Self::poll_timeout`] names, or later.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.fx.advance(now);
        while let Some(timer) = self.fx.timers.pop_due(self.fx.now) {
            match timer {
                Timer::Attempt(id) => self.with_peer(id, |peer, cx| peer.attempt(cx)),
                Timer::Probe(id) => self.with_peer(id, |peer, cx| peer.probe(cx)),
                Timer::Mtu(id) => self.with_peer(id, |peer, cx| peer.search_mtu(cx)),
                Timer::StaticAttempt(key) => {
                    self.resolve();
                    self.static_peers.attempt(&mut self.fx, &self.local, key);
                }
                Timer::StunClient => {
                    if self.stun.handle_timeout(&mut self.fx, &self.local) {
                        self.advertise();
                    }
                }
                Timer::HomeRelays => self.relays.handle_timeout(&mut self.fx, &self.local),
                Timer::RelayServer => {
                    if let Some(server) = &mut self.relay_server {
                        server.handle_timeout(&mut self.fx);
                    }
                }
                Timer::SecondPort => self.change_port(),
                Timer::GuardRelease => self.roster.handle_release(&mut self.fx),
                Timer::OperatorPing(id) => self.probing.handle_operator_timeout(&mut self.fx, id),
            }
        }
        self.second_port.schedule(&mut self.fx, &self.local);
    }
}

/// # Commands of an operator
impl Mesh {
    /// Pings a peer; [`Output::PingResult`] with this `id` tells how it ended, at
    /// the latest after `timeout`. An unknown peer ends at once, without an answer.
    pub fn ping(&mut self, now: Instant, peer: NodeId, id: u64, timeout: Duration) {
        self.fx.advance(now);
        if self.peers.get(peer).is_none() {
            self.fx.output(Output::PingResult { id, answer: None });
            return;
        }
        self.probing.begin_operator_ping(&mut self.fx, id, timeout);
        self.with_peer(peer, |peer, cx| peer.operator_ping(cx, id));
    }

    /// Stops guarding a network that nobody holds now. Returns false if it is none of [`Self::withdrawn`].
    pub fn release_withdrawn(&mut self, now: Instant, net: &IpNet) -> bool {
        self.fx.advance(now);
        self.resolve();
        self.roster.release_withdrawn(&mut self.fx, net)
    }
}

/// # Outputs
impl Mesh {
    /// The next thing to do. A changed peer table comes before what speaks of its peers, and a changed
    /// forwarding table before what tells of its channels.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.resolve();
        let input = RoutingInput {
            settings: &self.settings,
            roster: &self.roster,
            peers: &self.peers,
            static_peers: &self.static_peers,
        };
        let derived = self.derived.poll(&mut self.fx, &input);
        if let Some(server) = &mut self.relay_server {
            if let Some(Output::PeerTable(table)) = &derived {
                let is_node =
                    |key: &WireguardKey| table.peers.get(key).is_some_and(|entry| !entry.is_static);
                server.retain(is_node);
            }
            if derived.is_none()
                && let Some(table) = server.poll_table()
            {
                return Some(table);
            }
        }
        derived.or_else(|| self.fx.next_output())
    }

    /// When [`Self::handle_timeout`] wants to be called, and why.
    pub fn poll_timeout(&self) -> Option<(Instant, WakeReason)> {
        self.fx.timers.next().map(|(at, timer)| (at, timer.reason()))
    }
}

/// # Between the parts
impl Mesh {
    /// Sends again what a peer answered by a challenge. The data plane has sent the proof.
    fn handle_challenge(&mut self, node: NodeId, key: WireguardKey, from: Path) {
        for (to, transaction) in self.probing.pings.repeat(self.fx.now, node, &from) {
            self.fx.transmit(key, to, Probe::Ping { transaction });
        }
        self.relays.handle_challenge(&mut self.fx, node, from);
    }

    fn handle_pong(&mut self, node: NodeId, from: Path, transaction: u64, observed: SocketAddr) {
        let Some(mut sent) = self.probing.pings.answered(node, from, transaction) else { return };
        if sent.to.local.is_none() {
            // The pong shows which address the kernel chose.
            sent.to = self.local.canonical(from);
        }
        self.with_peer(node, |peer, cx| peer.handle_pong(cx, &sent));
        // Behind a relay it is the relay that is seen, and on a LAN it is no news.
        let outside = !from.is_relayed() && !is_private(from.remote.ip());
        if outside && self.stun.handle_observed(self.fx.now, &self.local, node, observed) {
            self.advertise();
        }
        self.probing.handle_operator_pong(&mut self.fx, &sent, from);
    }

    /// Begins or ceases to relay, as our grant says.
    fn follow_role(&mut self) {
        let limits = self.relay_limits.filter(|_| can_relay(self.grant()));
        match (limits, self.relay_server.is_some()) {
            (Some(limits), false) => self.relay_server = Some(RelayServer::new(limits)),
            (None, true) => {
                self.relay_server = None;
                self.fx.timers.cancel(Timer::RelayServer);
                self.fx.output(Output::ForwardingTable(Arc::default()));
            }
            (None, false) | (Some(_), true) => return,
        }
        let own = self.grant().map(|grant| grant.node_id);
        let own = own.filter(|_| self.relay_server.is_none());
        self.relays.set_own(&mut self.fx, own);
    }

    /// Handles a change of our addresses or uplinks: what others see of us changed, and perhaps every path.
    fn local_changed(&mut self) {
        self.advertise();
        self.stun.handle_local_change(&mut self.fx, &self.local);
        self.advertise();
        self.relays.handle_local_change(&mut self.fx);
        let (peers, mut cx) = self.peer_context();
        peers.each(&mut cx, |peer, cx| peer.handle_local_change(cx));
        self.local.named();
        if self.local.outward_port() == LocalPort::Second && self.local.is_reachable_v4() {
            self.close_second_port();
        }
    }

    /// Records an authentic datagram from outside.
    fn answered(&mut self, from: &Path) {
        if self.fx.silence.answered(from) {
            self.second_port.answered();
        }
    }

    /// Has what goes to public addresses leave from our other port, if nobody answers.
    fn change_port(&mut self) {
        if !self.second_port.is_due(&self.fx, &self.local) {
            return;
        }
        self.second_port.changed(&mut self.fx.rng);
        self.fx.silence.restart();
        match self.local.outward_port() {
            LocalPort::Configured => self.fx.output(Output::SecondPort { open: true }),
            LocalPort::Second => self.close_second_port(),
        }
    }

    fn close_second_port(&mut self) {
        self.fx.output(Output::SecondPort { open: false });
        self.use_port(None);
    }

    /// Tries everything from another port: the second one, which has this number, or the configured one.
    fn use_port(&mut self, number: Option<u16>) {
        tracing::debug!(number, "UDP port changed");
        let port = if number.is_some() { LocalPort::Second } else { LocalPort::Configured };
        self.settings.set_second_port(&mut self.fx, number);
        self.local.set_outward_port(port);
        self.stun.handle_port_change(&mut self.fx, &self.local);
        self.advertise();
        self.relays.handle_local_change(&mut self.fx);
        self.static_peers.handle_port_change(&mut self.fx, &self.local);
        let (peers, mut cx) = self.peer_context();
        peers.each(&mut cx, |peer, cx| peer.handle_port_change(cx));
    }

    /// Follows a change of addresses that nothing is sent from but answers. Peers are only asked where the
    /// address in use is gone.
    fn addresses_changed(&mut self) {
        let (peers, mut cx) = self.peer_context();
        peers.each(&mut cx, |peer, cx| peer.handle_address_change(cx));
        self.local.named();
    }

    /// Puts our candidates together, and hands them out if they changed.
    fn advertise(&mut self) {
        let before = self.local.outer_since();
        self.local.advertise(&mut self.fx, self.stun.candidates());
        let since = self.local.outer_since();
        if since.is_some() && since != before {
            let (peers, mut cx) = self.peer_context();
            peers.each(&mut cx, |peer, cx| peer.handle_outer_address(cx));
        }
    }

    /// Decides again who holds what, if that may have changed.
    fn resolve(&mut self) {
        self.roster.resolve(&mut self.fx, &mut self.static_peers);
    }

    /// The node that holds a key, once all that is known of the map is taken into account.
    fn node_with(&mut self, key: &WireguardKey) -> Option<NodeId> {
        self.resolve();
        self.roster.key_holder(key)
    }

    fn with_peer(&mut self, id: NodeId, f: impl FnOnce(&mut Peer, &mut PeerContext<'_>)) {
        let (peers, mut cx) = self.peer_context();
        peers.with(&mut cx, id, f);
    }

    /// The peers, and what they may use of the other parts.
    fn peer_context(&mut self) -> (&mut Peers, PeerContext<'_>) {
        let context = PeerContext {
            fx: &mut self.fx,
            probing: &mut self.probing,
            relays: &mut self.relays,
            local: &self.local,
            is_eager: self.peers.is_eager(),
        };
        (&mut self.peers, context)
    }
}

/// Returns whether a node with this grant may relay for others; `None`: it is in no mesh.
fn can_relay(grant: Option<&Grant>) -> bool {
    grant.is_some_and(|grant| grant.relay != RelayRole::Denied)
}
