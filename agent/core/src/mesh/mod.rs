//! The mesh as one node sees it: its peers, their states, and what is to be done.
//!
//! Invariants, whatever comes in:
//!
//! - A node that was removed never comes back, nor does its identity key under another id.
//! - Of one node the newest record holds; an older one changes nothing.
//! - Only a removal takes a peer away.
//! - What a peer ever held stays guarded until another peer holds it or its node is removed.

mod map;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rand::SeedableRng;
use rand::rngs::StdRng;
use towline_types::frame::Probe;
use towline_types::id::{IdentityKey, NodeId, WireguardKey};
use towline_types::node::{Candidate, Grant, MeshConfig};

use crate::budget::Unanswered;
use crate::changes::{Change, Changes};
use crate::claims::Claims;
use crate::counters::Counters;
use crate::derive;
use crate::homes::Homes;
use crate::local::Local;
use crate::path::{ChannelId, LocalEnd, Path};
use crate::peer::{Around, Context, Peer};
use crate::peer_table::{Observation, PeerTable};
use crate::pings::{Pings, Purpose};
use crate::plan::UnderlayPlan;
use crate::prefixes::{covering, is_private};
use crate::reflex::{Mapping, Reflex};
use crate::routing::{Facts, Routing};
use crate::static_peers::{StaticPeer, StaticPeerStatus, StaticPeers};
use crate::timers::{Timer, Timers};

pub use crate::config::{Config, MapChange, Membership};
pub use crate::output::{Output, Transmit};
pub use crate::status::{PeerState, PeerStatus, WakeReason};

/// A mesh of up to so many peers is kept connected throughout, so that an operator sees each path
/// before it is needed; in a larger one a peer is connected when there is traffic for it.
pub const EAGER_PEERS: usize = 64;

/// Every peer of one node. See the crate's contract.
#[derive(Debug)]
pub struct Mesh {
    config: Config,
    local: Local,
    own_prefixes: Vec<IpNet>,
    pod_networks: Vec<IpNet>,
    own_addresses: Vec<IpAddr>,
    forward_to: Vec<IpNet>,
    node_ips: Vec<IpAddr>,
    underlay: UnderlayPlan,
    now: Instant,
    rng: StdRng,
    timers: Timers,
    pings: Pings,
    unanswered: Unanswered,
    homes: Homes,
    reflex: Reflex,
    counters: Counters,
    signals: u64,
    /// As the host and the configuration have them: without reflexive ones.
    host_candidates: Vec<Candidate>,
    /// Nodes that can be called: they reflect.
    public: BTreeMap<NodeId, Vec<SocketAddr>>,
    operator_pings: BTreeSet<u64>,
    peers: BTreeMap<NodeId, Peer>,
    static_peers: StaticPeers,
    removed: BTreeSet<NodeId>,
    removed_keys: BTreeSet<IdentityKey>,
    withdrawn: BTreeSet<IpNet>,
    claims: Claims,
    /// What was handed out last, and whether it may have changed since.
    table: Option<Arc<PeerTable>>,
    routing: Routing,
    changes: Changes,
    outputs: VecDeque<Output>,
}

impl Mesh {
    /// A mesh without peers. `seed` is the only source of randomness; probes are unforgeable only
    /// if nobody else knows it.
    pub fn new(config: Config, seed: [u8; 32], now: Instant) -> Self {
        Self {
            local: Local::new(config.membership.as_ref()),
            config,
            own_prefixes: Vec::new(),
            pod_networks: Vec::new(),
            own_addresses: Vec::new(),
            forward_to: Vec::new(),
            node_ips: Vec::new(),
            underlay: UnderlayPlan::default(),
            now,
            rng: StdRng::from_seed(seed),
            timers: Timers::default(),
            pings: Pings::default(),
            unanswered: Unanswered::default(),
            homes: Homes::default(),
            reflex: Reflex::default(),
            counters: Counters::default(),
            signals: 0,
            host_candidates: Vec::new(),
            public: BTreeMap::new(),
            operator_pings: BTreeSet::new(),
            peers: BTreeMap::new(),
            static_peers: StaticPeers::default(),
            removed: BTreeSet::new(),
            removed_keys: BTreeSet::new(),
            withdrawn: BTreeSet::new(),
            claims: Claims::default(),
            table: None,
            routing: Routing::default(),
            changes: Changes::all(),
            outputs: VecDeque::new(),
        }
    }

    /// Our own grant, if we are in a mesh.
    pub fn grant(&self) -> Option<&Grant> {
        self.config.membership.as_ref().map(|membership| &membership.grant)
    }

    /// What holds for the whole mesh.
    pub fn config(&self) -> Option<&MeshConfig> {
        self.config.membership.as_ref().map(|membership| &membership.mesh)
    }

    /// Takes in a change of the map. Our own node is ignored, and so is what is older than what
    /// we know: changes may come twice and in any order. Without a mesh there is no map.
    pub fn update(&mut self, now: Instant, change: MapChange) {
        self.advance(now);
        match change {
            MapChange::Upsert(node) => self.upsert(*node),
            MapChange::Remove(tombstone) => self.remove(&tombstone),
            MapChange::Mesh(mesh) => {
                if let Some(membership) = &mut self.config.membership
                    && mesh.generation > membership.mesh.generation
                {
                    self.local.set_mesh(&mesh);
                    membership.mesh = mesh;
                    self.changes.mark(Change::Ownership);
                }
            }
        }
    }

    /// Our grant was issued anew (an operator changed it).
    pub fn set_grant(&mut self, now: Instant, grant: Grant) {
        self.advance(now);
        if let Some(membership) = &mut self.config.membership
            && membership.grant != grant
        {
            self.local.set_grant(&grant);
            membership.grant = grant;
            self.changes.mark(Change::Ownership);
        }
    }

    /// Takes the candidates that our host and our configuration have now, whole. Those that others
    /// can use come back as [`Output::Advertise`] when they changed.
    pub fn set_candidates(&mut self, now: Instant, candidates: Vec<Candidate>) {
        self.advance(now);
        self.with_static_peers(|statics, cx| statics.local_changed(cx));
        if self.host_candidates != candidates {
            self.host_candidates = candidates;
            self.advertise();
            self.local_changed();
        }
    }

    /// Takes the prefixes that we announce now, whole: they are reached by the host's own routes,
    /// so neither routed into the tunnel nor guarded.
    pub fn set_prefixes(&mut self, now: Instant, prefixes: Vec<IpNet>) {
        self.advance(now);
        let prefixes: Vec<IpNet> = covering(prefixes).into_iter().collect();
        if self.own_prefixes != prefixes {
            self.own_prefixes = prefixes;
            self.changes.mark(Change::Ownership);
        }
    }

    /// Replaces the networks of this node's pods, which are among what it announces. The plan lets
    /// only the container network's own routes lead there.
    pub fn set_pod_networks(&mut self, now: Instant, networks: Vec<IpNet>) {
        self.advance(now);
        let networks: Vec<IpNet> = covering(networks).into_iter().collect();
        if self.pod_networks != networks {
            self.pod_networks = networks;
            self.changes.mark(Change::Host);
        }
    }

    /// Takes the addresses that our link has besides the mesh's, whole.
    pub fn set_addresses(&mut self, now: Instant, addresses: Vec<IpAddr>) {
        self.advance(now);
        if self.own_addresses != addresses {
            self.own_addresses = addresses;
            self.changes.mark(Change::OwnNetworks);
        }
    }

    /// Takes the networks that packets out of the tunnel may be forwarded to, though we do not announce
    /// them, whole.
    pub fn set_forward_to(&mut self, now: Instant, networks: Vec<IpNet>) {
        self.advance(now);
        if self.forward_to != networks {
            self.forward_to = networks;
            self.changes.mark(Change::OwnNetworks);
        }
    }

    /// Takes our own node IPs, at most one of each family, which are announced too: they are the
    /// preferred sources of what enters the tunnel.
    pub fn set_node_ips(&mut self, now: Instant, node_ips: Vec<IpAddr>) {
        self.advance(now);
        if self.node_ips != node_ips {
            self.node_ips = node_ips;
            self.changes.mark(Change::Host);
        }
    }

    /// Takes the peers that stand in our configuration, whole: those that stay keep their
    /// sessions.
    pub fn set_static_peers(&mut self, now: Instant, peers: Vec<StaticPeer>) {
        self.advance(now);
        self.with_static_peers(|statics, cx| statics.set(cx, peers));
        self.changes.mark(Change::Ownership);
    }

    /// Networks that nobody holds now but somebody held once: they stay guarded. To be given back
    /// by [`Self::set_withdrawn`] at the next start.
    pub fn withdrawn(&self) -> &BTreeSet<IpNet> {
        &self.withdrawn
    }

    /// See [`Self::withdrawn`].
    pub fn set_withdrawn(&mut self, now: Instant, withdrawn: impl IntoIterator<Item = IpNet>) {
        self.advance(now);
        self.withdrawn.extend(withdrawn);
        self.changes.mark(Change::Ownership);
    }

    /// Takes what of ours travels outside the tunnel now, whole: the plan lets it pass.
    pub fn set_underlay(&mut self, now: Instant, underlay: UnderlayPlan) {
        self.advance(now);
        if self.underlay != underlay {
            self.underlay = underlay;
            self.changes.mark(Change::Host);
        }
    }

    /// Takes in what the data plane saw. An unknown peer is ignored: it was removed meanwhile.
    pub fn observe(&mut self, now: Instant, peer: WireguardKey, what: Observation) {
        self.advance(now);
        self.with_key(peer, |peer, cx| peer.observe(cx, what));
        self.with_static_peers(|statics, cx| statics.observe(cx, peer, what));
    }

    /// Takes in a message that was opened with the key of the pair of us and `peer`, so it is
    /// authentic. `from` is the path that it came over; `None`: a controller carried it, which holds
    /// for a [`Probe::CallMe`] alone.
    ///
    /// Requests to a relay are not for the core: who relays answers them first.
    pub fn handle_message(
        &mut self,
        now: Instant,
        peer: WireguardKey,
        from: Option<Path>,
        message: Probe,
    ) {
        self.advance(now);
        let node = self.node_with(&peer);
        match (message, from) {
            (Probe::CallMe { boot_epoch, number, candidates }, _) => {
                let order = (boot_epoch, number);
                match node {
                    Some(id) => self.with_peer(id, |peer, cx| peer.on_call(cx, order, &candidates)),
                    None => self.counters.signals_refused += 1,
                }
            }
            // Every other message is about the path that it came over.
            (_, None) => {}
            (Probe::Ping { transaction }, Some(from)) => {
                if let Some(id) = node {
                    self.with_peer(id, |peer, cx| peer.on_ping(cx, from, transaction));
                }
            }
            (Probe::Pong { transaction, observed }, Some(from)) => {
                if let Some(id) = node {
                    self.handle_pong(id, from, transaction, observed);
                }
            }
            (answer, Some(from)) => self.handle_relay_answer(node, from, &answer),
        }
    }

    fn handle_pong(&mut self, node: NodeId, from: Path, transaction: u64, observed: SocketAddr) {
        let Some(sent) = self.pings.answered(node, from, transaction) else { return };
        self.with_peer(node, |peer, cx| peer.on_pong(cx, &sent));
        // Behind a relay it is the relay that is seen, and on a LAN it is no news.
        let outside = !from.is_relayed() && !is_private(from.remote.ip());
        if outside && self.reflex.observed(self.now, &self.local, observed) {
            self.advertise();
        }
        if let Purpose::Operator(id) = sent.purpose
            && self.operator_pings.remove(&id)
        {
            self.timers.cancel(Timer::OperatorPing(id));
            let rtt = self.now.saturating_duration_since(sent.at);
            let answer = Some((from, rtt));
            self.outputs.push_back(Output::PingResult { id, answer });
        }
    }

    /// Takes in an answer of `relay`, unless it is no node, or nothing asked for it.
    fn handle_relay_answer(&mut self, relay: Option<NodeId>, from: Path, answer: &Probe) {
        let taken = relay.is_some_and(|relay| match *answer {
            Probe::Registered { transaction, lifetime } => self.homes.registered(
                self.now,
                relay,
                from,
                transaction,
                lifetime,
                &mut self.timers,
            ),
            Probe::Opened { transaction, channel } => {
                let peer = self.homes.opened(relay, transaction);
                if let Some(peer) = peer {
                    let channel = ChannelId(channel);
                    self.with_peer(peer, |peer, cx| peer.on_channel(cx, from, channel));
                }
                peer.is_some()
            }
            Probe::Incoming { peer, channel } => {
                let home = self.homes.is_home(relay);
                if home {
                    let channel = ChannelId(channel);
                    self.with_key(peer, |peer, cx| peer.on_channel(cx, from, channel));
                }
                home
            }
            Probe::Refused { .. } => true,
            Probe::Ping { .. }
            | Probe::Pong { .. }
            | Probe::Register { .. }
            | Probe::Open { .. }
            | Probe::CallMe { .. } => false,
        });
        self.counters.relay_answers_refused += u64::from(!taken);
    }

    /// Takes our uplinks, whole (every address of ours that leads outwards, with its interface), and
    /// the candidates as [`Self::set_candidates`] does: they change together.
    pub fn set_uplinks(
        &mut self,
        now: Instant,
        uplinks: Vec<LocalEnd>,
        candidates: Vec<Candidate>,
    ) {
        self.advance(now);
        self.with_static_peers(|statics, cx| statics.local_changed(cx));
        let other_uplinks = self.local.set_uplinks(uplinks);
        if other_uplinks || self.host_candidates != candidates {
            self.host_candidates = candidates;
            self.advertise();
            self.local_changed();
        }
    }

    /// Takes the reflectors that the controllers offer, whole. Relays and public nodes are known.
    pub fn set_reflectors(&mut self, now: Instant, reflectors: Vec<SocketAddr>) {
        self.advance(now);
        if self.reflex.offered != reflectors {
            self.reflex.offered = reflectors;
            self.reflex.follow(self.now, &self.local, &mut self.timers, false);
        }
    }

    /// Whether a controller takes signals now.
    pub fn set_controller_connected(&mut self, now: Instant, connected: bool) {
        self.advance(now);
        self.local.connected = connected;
    }

    /// Takes in a reflector's answer: `mapped` is our address as it saw it.
    pub fn handle_stun(
        &mut self,
        now: Instant,
        from: SocketAddr,
        transaction: [u8; 12],
        mapped: SocketAddr,
    ) {
        self.advance(now);
        let (local, timers, counters) = (&self.local, &mut self.timers, &mut self.counters);
        if self.reflex.answer(self.now, local, timers, counters, from, transaction, mapped) {
            self.advertise();
        }
    }

    /// Pings a peer for an operator; [`Output::PingResult`] with this `id` tells how it ended, at
    /// the latest after `timeout`. An unknown peer ends at once, without an answer.
    pub fn ping(&mut self, now: Instant, peer: NodeId, id: u64, timeout: Duration) {
        self.advance(now);
        if !self.peers.contains_key(&peer) {
            self.outputs.push_back(Output::PingResult { id, answer: None });
            return;
        }
        self.operator_pings.insert(id);
        self.timers.set(Timer::OperatorPing(id), self.now + timeout);
        self.with_peer(peer, |peer, cx| peer.operator_ping(cx, id));
    }

    /// Does what is due. To be called at the time that [`Self::poll_timeout`] names, or later.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.advance(now);
        while let Some(timer) = self.timers.pop_due(self.now) {
            match timer {
                Timer::Attempt(id) => self.with_peer(id, |peer, cx| peer.attempt(cx)),
                Timer::Probe(id) => self.with_peer(id, |peer, cx| peer.probe(cx)),
                Timer::StaticAttempt(key) => {
                    self.with_static_peers(|statics, cx| statics.attempt(cx, key));
                }
                Timer::Mtu(id) => self.with_peer(id, |peer, cx| peer.search_mtu(cx)),
                Timer::Reflex => {
                    let (rng, timers) = (&mut self.rng, &mut self.timers);
                    if self.reflex.ask(self.now, rng, &self.local, timers, &mut self.outputs) {
                        self.advertise();
                    }
                }
                Timer::Homes => {
                    let own = self.own_id();
                    let (rng, timers) = (&mut self.rng, &mut self.timers);
                    let outputs = &mut self.outputs;
                    self.homes.register(self.now, rng, own, &self.local, timers, outputs);
                }
                Timer::OperatorPing(id) => {
                    if self.operator_pings.remove(&id) {
                        self.outputs.push_back(Output::PingResult { id, answer: None });
                    }
                }
            }
        }
    }

    /// When [`Self::handle_timeout`] wants to be called, and why.
    pub fn poll_timeout(&self) -> Option<(Instant, WakeReason)> {
        self.timers.next().map(|(at, timer)| (at, timer.reason()))
    }

    /// The next thing to do. A changed peer table comes before what speaks of its peers.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.resolve_claims();
        if self.changes.take_table() {
            let own = self.facts().own_networks();
            let mut table = derive::peer_table(self.mtu(), &self.claims, self.peers.values(), own);
            table.peers.extend(self.static_peers.entries(self.config.mtu));
            if self.table.as_deref() != Some(&table) {
                let table = Arc::new(table);
                self.table = Some(table.clone());
                return Some(Output::PeerTable(table));
            }
        }
        if let Some(scope) = self.changes.take_plan() {
            let mut routing = std::mem::take(&mut self.routing);
            let changed = routing.update(&self.facts(), &scope);
            self.routing = routing;
            if let Some(plan) = changed {
                return Some(Output::Plan(plan));
            }
        }
        self.outputs.pop_front()
    }

    /// Every peer, by node id.
    pub fn peers(&self) -> impl Iterator<Item = PeerStatus> + '_ {
        self.peers.values().map(|peer| self.status(peer))
    }

    /// What was refused or held back.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// How the NAT on our side maps, once two reflectors told.
    pub fn mapping(&self) -> Option<Mapping> {
        self.reflex.mapping(&self.local)
    }

    /// One peer.
    pub fn peer(&self, id: NodeId) -> Option<PeerStatus> {
        self.peers.get(&id).map(|peer| self.status(peer))
    }

    /// The node that holds a WireGuard key. A map change counts from the next
    /// [`Self::poll_output`] on.
    pub fn node_id(&self, key: &WireguardKey) -> Option<NodeId> {
        self.claims.key(key)
    }

    /// Every static peer, by key.
    pub fn static_peers(&self) -> impl Iterator<Item = StaticPeerStatus> + '_ {
        self.static_peers.statuses(self.now)
    }

    fn status(&self, peer: &Peer) -> PeerStatus {
        let claim = self.claims.of(peer.id());
        let reason = match claim.and_then(|claim| claim.key_holder.as_ref()) {
            Some(holder) => format!("its WireGuard key is held by {holder}"),
            None => {
                let around = Around {
                    relays: !self.homes.is_empty(),
                    silent: self.reflex.silent(),
                    mapping: self.mapping(),
                };
                peer.reason(self.now, &self.local, around)
            }
        };
        let relayed = peer.path().filter(Path::is_relayed);
        PeerStatus {
            node: peer.node().clone(),
            state: peer.state(),
            since: peer.since(),
            reason,
            path: peer.path(),
            relay: relayed.and_then(|path| self.homes.at(path.remote)).cloned(),
            mtu: peer.mtu(),
            rtt: peer.rtt(),
            last_handshake: peer.last_handshake(),
            prefixes: claim.map(|claim| claim.prefixes.clone()).unwrap_or_default(),
            conflicts: claim.map(|claim| claim.conflicts.clone()).unwrap_or_default(),
        }
    }

    fn with_static_peers(&mut self, f: impl FnOnce(&mut StaticPeers, &mut Context<'_>)) {
        self.resolve_claims();
        let mut static_peers = std::mem::take(&mut self.static_peers);
        f(&mut static_peers, &mut self.context().1);
        self.static_peers = static_peers;
    }

    /// Everything that plan and peer table follow from.
    fn facts(&self) -> Facts<'_> {
        Facts {
            config: &self.config,
            underlay: &self.underlay,
            own_prefixes: &self.own_prefixes,
            pod_networks: &self.pod_networks,
            node_ips: &self.node_ips,
            own_addresses: &self.own_addresses,
            forward_to: &self.forward_to,
            static_peers: &self.static_peers,
            withdrawn: &self.withdrawn,
            claims: &self.claims,
            peers: &self.peers,
        }
    }

    /// Our addresses are others now: so is how others see us, and perhaps every path.
    fn local_changed(&mut self) {
        let own = self.own_id();
        self.reflex.follow(self.now, &self.local, &mut self.timers, true);
        self.advertise();
        if !self.config.relay {
            self.homes.follow(self.now, own, &mut self.timers, true);
        }
        self.each_peer(|peer, cx| peer.local_changed(cx));
        self.local.named();
    }

    /// Puts our candidates together, and tells of them if they changed.
    fn advertise(&mut self) {
        if self.local.set_candidates(&self.host_candidates, self.reflex.candidates()) {
            self.outputs.push_back(Output::Advertise(self.local.candidates().to_vec()));
        }
    }

    /// Our id; that of nobody before we are a node.
    fn own_id(&self) -> NodeId {
        self.config.membership.as_ref().map_or(NodeId([0; 16]), |own| own.grant.node_id)
    }

    fn mtu(&self) -> u16 {
        u16::try_from(self.config.mtu).unwrap_or(u16::MAX)
    }

    fn advance(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    /// The node that holds a key, once all that is known of the map is taken into account.
    fn node_with(&mut self, key: &WireguardKey) -> Option<NodeId> {
        self.resolve_claims();
        self.claims.key(key)
    }

    fn with_key(&mut self, key: WireguardKey, f: impl FnOnce(&mut Peer, &mut Context<'_>)) {
        if let Some(id) = self.node_with(&key) {
            self.with_peer(id, f);
        }
    }

    fn with_peer(&mut self, id: NodeId, f: impl FnOnce(&mut Peer, &mut Context<'_>)) {
        let (peers, mut cx) = self.context();
        if let Some(peer) = peers.get_mut(&id) {
            tracked(peer, &mut cx, f);
        }
    }

    fn each_peer(&mut self, mut f: impl FnMut(&mut Peer, &mut Context<'_>)) {
        let (peers, mut cx) = self.context();
        for peer in peers.values_mut() {
            tracked(peer, &mut cx, &mut f);
        }
    }

    fn context(&mut self) -> (&mut BTreeMap<NodeId, Peer>, Context<'_>) {
        let (mtu, eager) = (self.mtu(), self.peers.len() <= EAGER_PEERS);
        let context = Context {
            now: self.now,
            rng: &mut self.rng,
            timers: &mut self.timers,
            outputs: &mut self.outputs,
            pings: &mut self.pings,
            unanswered: &mut self.unanswered,
            homes: &mut self.homes,
            counters: &mut self.counters,
            local: &self.local,
            mtu,
            eager,
            boot_epoch: self.config.boot_epoch,
            signals: &mut self.signals,
            changes: &mut self.changes,
        };
        (&mut self.peers, context)
    }
}

/// Lets a peer handle something, and marks its routes as changed if they follow from what became of
/// it.
fn tracked(peer: &mut Peer, cx: &mut Context<'_>, f: impl FnOnce(&mut Peer, &mut Context<'_>)) {
    let before = (peer.state(), peer.mtu());
    f(peer, cx);
    if (peer.state(), peer.mtu()) != before {
        cx.changes.mark(Change::Routes(peer.id()));
    }
}
