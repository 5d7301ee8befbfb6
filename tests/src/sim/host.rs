//! A simulated machine: the state that survives a restart of its agent, and the running agent.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use towline_core::mesh::{
    Config, MapChange, Membership, Mesh, Output, PeerState, RelayLimits, Transmit,
};
use towline_core::path::{LocalAddress, LocalPort, Path, Source};
use towline_core::peer_table::PeerTable;
use towline_core::plan::Plan;
use towline_core::probe_session::{Arrival, Decision};
use towline_dataplane::internals::{Forward, Forwarding};
use towline_fixtures::{agent, node};
use towline_proto::frame::{Probe, ProbeVersion};
use towline_proto::id::{IdentityKey, NodeId, WireguardKey};
use towline_proto::node::{
    Candidate, CandidateKind, Grant, MeshConfig, Node, OverlayAddresses, Record, RelayRole,
    Tombstone,
};

use super::evil_relay::EvilRelay;
use super::net::RealmId;
use super::payload::Payload;
use super::probes::Probes;
use super::tunnel::Tunnels;

/// UDP port of every agent.
pub const PORT: u16 = 51830;
/// Limits of every relay.
const RELAY: RelayLimits =
    RelayLimits { nodes: 1_024, channels_per_node: 1_024, bits_per_second: 1_000_000_000 };
/// Second UDP port of an agent before the first is opened; each gets the next number.
const SECOND_PORTS: u16 = 40_000;

/// An action that a machine asks the simulator to carry out.
#[derive(Debug, Clone)]
pub enum Action {
    /// Send a datagram on a path.
    Send(Path, Payload),
    /// Send a datagram on a path that only the first router forwards.
    Open(Path),
    /// Send a message to this node through the controller.
    Signal(WireguardKey, Probe),
    /// Publish a record to the controller.
    Publish(Box<Node>),
    /// Record that a peer's state changed, from the first state to the second.
    StateChanged(NodeId, PeerState, PeerState),
}

/// A simulated machine.
#[derive(Debug)]
pub struct Host {
    /// Number from which the host's name, keys and addresses are derived.
    pub number: u16,
    /// The node's grant.
    pub grant: Grant,
    /// Addresses of the host, each with the realm that it is in.
    pub addresses: Vec<(RealmId, IpAddr)>,
    /// Endpoints that the configuration names.
    pub configured: Vec<SocketAddr>,
    /// Prefixes that the node announces.
    pub prefixes: Vec<IpNet>,
    /// True if the node relays and answers STUN for others.
    pub relay: bool,
    /// Set if the relay is evil.
    pub evil: Option<EvilRelay>,
    /// Version of the probes of the node's agent.
    pub probe_version: ProbeVersion,
    /// Offset of the wall clock from the true time, in seconds.
    pub clock_offset: i64,
    /// True while the host has a connection to the controller.
    pub controller_reachable: bool,
    /// True while the agent has a watch at the controller.
    pub watching: bool,
    /// The agent; `None` while it is stopped.
    pub agent: Option<Agent>,
    /// The mesh configuration that the node received when it joined.
    pub mesh_config: MeshConfig,
    /// The map on the node's disk.
    pub cache: BTreeMap<NodeId, Node>,
    /// The tombstones on the node's disk.
    pub tombstones: BTreeMap<NodeId, Tombstone>,
    /// Datagrams sent, by second of the simulation.
    pub sent: BTreeMap<u64, u32>,
    /// Last second UDP port that was opened.
    pub second_port: u16,
    boot_epoch: u64,
    generation: u64,
    seed: u64,
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    /// The core under test.
    pub mesh: Mesh,
    /// The agent's data plane.
    pub tunnels: Tunnels,
    /// The relayed channels of the agent's data plane.
    pub forwarding: Forwarding,
    /// Probes of the agent's data plane.
    pub probes: Probes,
    /// The last peer table of the core.
    pub table: Option<Arc<PeerTable>>,
    /// The last plan of the core.
    pub plan: Option<Arc<Plan>>,
    /// Candidates that the agent advertises.
    pub candidates: Vec<Candidate>,
    /// When the agent has to be woken; an event is queued for it.
    pub wake: Option<Instant>,
    /// Numbers of the echo replies that arrived.
    pub replies: BTreeSet<u64>,
    /// Offset of the wall clock when the agent started, in seconds. boringtun counts the time stamps of
    /// initiations from there on by the monotonic clock.
    pub clock_offset: i64,
}

impl Host {
    /// Creates a machine that has joined and whose agent is not started.
    pub fn new(number: u16, seed: u64, mesh_config: MeshConfig) -> Self {
        Self {
            number,
            grant: grant(number),
            addresses: Vec::new(),
            configured: Vec::new(),
            prefixes: Vec::new(),
            relay: false,
            evil: None,
            probe_version: ProbeVersion::OWN,
            clock_offset: 0,
            controller_reachable: true,
            watching: false,
            agent: None,
            mesh_config,
            cache: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            sent: BTreeMap::new(),
            second_port: SECOND_PORTS,
            boot_epoch: 0,
            generation: 0,
            seed,
        }
    }

    /// Returns the node id.
    pub fn id(&self) -> NodeId {
        self.grant.node_id
    }

    /// Returns the node's WireGuard key.
    pub fn key(&self) -> WireguardKey {
        self.grant.wireguard_keys[0]
    }

    /// Creates a core for this machine, without peers.
    pub fn core(&self, now: Instant) -> Mesh {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&self.seed.to_le_bytes());
        seed[8..10].copy_from_slice(&self.number.to_le_bytes());
        seed[16..24].copy_from_slice(&self.boot_epoch.to_le_bytes());
        let membership = Membership { grant: self.grant.clone(), mesh: self.mesh_config.clone() };
        let config = Config {
            relay: self.relay.then_some(RELAY),
            boot_epoch: self.boot_epoch,
            ..agent::config(Some(membership))
        };
        Mesh::new(config, seed, now)
    }

    /// Sets the disk back: the next start has a boot epoch that was used before.
    pub fn set_back(&mut self, epochs: u64) {
        self.boot_epoch = self.boot_epoch.saturating_sub(epochs);
    }

    /// Starts the agent from the state on the disk.
    pub fn start(&mut self, now: Instant) {
        self.boot_epoch += 1;
        self.watching = false;
        let mut mesh = self.core(now);
        for tombstone in self.tombstones.values() {
            mesh.handle_map_change(now, MapChange::Remove(tombstone.clone()));
        }
        for node in self.cache.values() {
            mesh.handle_map_change(now, MapChange::Upsert(Box::new(node.clone())));
        }
        mesh.set_prefixes(now, self.prefixes.clone());
        mesh.set_uplinks(now, uplinks(&self.addresses), self.local_candidates());
        self.agent = Some(Agent {
            mesh,
            tunnels: Tunnels::new(u64::from(self.number) << 12 | self.boot_epoch),
            forwarding: Forwarding::default(),
            probes: Probes::new(self.boot_epoch, now),
            table: None,
            plan: None,
            candidates: Vec::new(),
            wake: None,
            replies: BTreeSet::new(),
            clock_offset: self.clock_offset,
        });
    }

    /// Reports the current addresses to the core after a change.
    pub fn addresses_changed(&mut self, now: Instant) {
        let candidates = self.local_candidates();
        if let Some(agent) = &mut self.agent {
            agent.mesh.set_uplinks(now, uplinks(&self.addresses), candidates);
        }
    }

    /// Replaces the prefixes that the node announces.
    pub fn set_prefixes(&mut self, now: Instant, prefixes: Vec<IpNet>) -> Vec<Action> {
        self.prefixes = prefixes;
        let Some(agent) = &mut self.agent else { return Vec::new() };
        agent.mesh.set_prefixes(now, self.prefixes.clone());
        vec![self.publish()]
    }

    /// Handles a change of the map, and stores it on the disk.
    pub fn map_changed(&mut self, now: Instant, change: MapChange) {
        match &change {
            MapChange::Upsert(node) => {
                if !self.tombstones.contains_key(&node.id()) {
                    self.cache.insert(node.id(), (**node).clone());
                }
            }
            MapChange::Remove(tombstone) => {
                self.cache.remove(&tombstone.node_id);
                self.tombstones.insert(tombstone.node_id, tombstone.clone());
            }
            MapChange::Mesh(mesh) => self.mesh_config = mesh.clone(),
        }
        if let Some(agent) = &mut self.agent {
            agent.mesh.handle_map_change(now, change);
        }
    }

    /// Handles a datagram that arrived. Returns what the data plane itself sends because of it.
    pub fn receive(
        &mut self,
        now: Instant,
        at: SocketAddr,
        from: SocketAddr,
        payload: Payload,
    ) -> Vec<(Path, Payload)> {
        let (me, own) = (self.key(), self.probe_version);
        let Some(agent) = &mut self.agent else { return Vec::new() };
        let port = match at.port() {
            PORT => LocalPort::Configured,
            port if agent.mesh.second_port() == Some(port) => LocalPort::Second,
            _ => return Vec::new(),
        };
        let local = uplinks(&self.addresses).into_iter().find(|end| end.address == at.ip());
        let from = Path { local, remote: from, channel: None, port };
        let (channel, payload) = match payload {
            Payload::Channel(channel, payload) => {
                let bytes = payload.size().into();
                match agent.forwarding.forward(now, &from, channel.0, bytes) {
                    Forward::To(to) => return vec![(to, Payload::Channel(channel, payload))],
                    Forward::Refused(_) => return Vec::new(),
                    Forward::Unknown => (Some(channel), *payload),
                }
            }
            payload => (None, payload),
        };
        let from = Path { channel, ..from };
        let (stamp, payload) = match payload {
            Payload::Stamped(stamp, payload) => (Some(stamp), *payload),
            payload => (None, payload),
        };
        match payload {
            Payload::Probe { from: peer, to, message, size: _ } => {
                let entry = agent.table.as_ref().and_then(|table| table.peers.get(&peer));
                let Some(entry) = entry.filter(|_| to == me) else { return Vec::new() };
                let accepts = match stamp {
                    Some(_) => own == ProbeVersion::V2,
                    None => own.min(entry.probe_version) == ProbeVersion::V1,
                };
                if !accepts {
                    return Vec::new();
                }
                let is_in_use = entry.endpoint.is_some_and(|endpoint| endpoint.is(&from));
                let arrival = Arrival { now, from, is_in_use, stamp };
                let (answer, source) = match agent.probes.receive(peer, &arrival, &message) {
                    Decision::Deliver { answer, is_validated } => {
                        (answer, Some(Source { path: from, is_validated }))
                    }
                    Decision::Drop { answer, .. } => (answer, None),
                };
                let mut answers = Vec::new();
                if let Some(message) = answer {
                    let answer = Payload::Probe { from: me, to: peer, message, size: None };
                    let answer = match stamp {
                        Some(_) => agent.probes.stamp(peer, answer),
                        None => answer,
                    };
                    let to = Path { port, ..Path::direct(from.remote) };
                    answers.push((to, answer.on(&from)));
                }
                if source.is_some() {
                    agent.mesh.handle_message(now, peer, source, message);
                }
                return answers;
            }
            Payload::Stamped(..) => {}
            Payload::WireGuard(message) => agent.tunnels.receive(now, me, from, message),
            Payload::StunRequest(transaction) => {
                let to = Path { port, ..Path::direct(from.remote) };
                return vec![(to, Payload::StunAnswer(transaction, from.remote))];
            }
            Payload::StunAnswer(transaction, mapped) => {
                agent.mesh.handle_stun(now, from.remote, transaction, mapped);
            }
            Payload::Channel(..) => {}
        }
        Vec::new()
    }

    /// Handles a message from the controller.
    pub fn signalled(&mut self, now: Instant, from: WireguardKey, message: Probe) {
        if let Some(agent) = &mut self.agent {
            agent.mesh.handle_message(now, from, None, message);
        }
    }

    /// Sets whether the agent has a watch at the controller.
    pub fn set_watching(&mut self, now: Instant, watching: bool) {
        self.watching = watching;
        if let Some(agent) = &mut self.agent {
            agent.mesh.set_controller_connected(now, watching);
        }
    }

    /// Sends an inner packet to a peer.
    pub fn send_inner(&mut self, now: Instant, to: WireguardKey, number: u64) {
        if let Some(agent) = &mut self.agent {
            agent.tunnels.send(now, to, super::tunnel::Inner { number, reply: false });
        }
    }

    /// Runs the timers that are due.
    pub fn handle_timeout(&mut self, now: Instant, clock: i64) {
        let me = self.key();
        let Some(agent) = &mut self.agent else { return };
        if agent.mesh.poll_timeout().is_some_and(|(at, _)| at <= now) {
            agent.mesh.handle_timeout(now);
        }
        if agent.tunnels.poll_timeout().is_some_and(|at| at <= now) {
            agent.tunnels.handle_timeout(now, clock, me);
        }
    }

    /// Returns every action that the core and the data plane ask for, until both have none left.
    pub fn drain(&mut self, now: Instant, clock: i64) -> Vec<Action> {
        let (me, own) = (self.key(), self.probe_version);
        let mut actions = Vec::new();
        loop {
            let Some(agent) = &mut self.agent else { return actions };
            if let Some(output) = agent.mesh.poll_output() {
                match output {
                    Output::Transmit(Transmit { peer, path: None, message, .. }) => {
                        actions.push(Action::Signal(peer, message));
                    }
                    Output::Transmit(Transmit { path: Some(path), hop_limit: Some(_), .. }) => {
                        actions.push(Action::Open(path));
                    }
                    Output::Transmit(Transmit {
                        peer, path: Some(path), message, size, ..
                    }) => {
                        let payload = Payload::Probe { from: me, to: peer, message, size };
                        let payload = agent.seal(own, payload);
                        actions.push(Action::Send(path, payload.on(&path)));
                    }
                    Output::Train { peer, path, transactions, size } => {
                        for transaction in transactions {
                            let payload = Payload::Probe {
                                from: me,
                                to: peer,
                                message: Probe::Ping { transaction },
                                size: Some(size),
                            };
                            let payload = agent.seal(own, payload);
                            actions.push(Action::Send(path, payload.on(&path)));
                        }
                    }
                    Output::SecondPort { open } => {
                        if open {
                            self.second_port += 1;
                            agent.mesh.set_second_port(now, Some(self.second_port));
                        }
                    }
                    Output::Stun { to, transaction } => {
                        actions.push(Action::Send(to, Payload::StunRequest(transaction)));
                    }
                    Output::Handshake { peer, to } => {
                        assert!(agent.knows(&peer), "the peer is in the table");
                        agent.tunnels.handshake(now, clock, me, peer, &to);
                    }
                    Output::PeerTable(table) => {
                        assert_ne!(
                            Some(&table),
                            agent.table.as_ref(),
                            "a table comes only when it changed"
                        );
                        agent.tunnels.apply(&table);
                        agent.table = Some(table);
                    }
                    Output::PeerPath { peer, path } => {
                        let table = agent.table.as_mut().expect("a table comes first");
                        let entry = Arc::make_mut(table).peers.get_mut(&peer);
                        let entry = entry.expect("the peer is in the table");
                        assert_ne!(entry.path(), path, "a path comes only when it changed");
                        entry.set_path(path);
                        agent.tunnels.set_path(&peer, path);
                    }
                    Output::ForwardingTable(table) => {
                        agent.forwarding = agent.forwarding.next(&table);
                    }
                    Output::ReportChannels => {
                        let used = agent.forwarding.take_used();
                        agent.mesh.handle_channels_used(now, used);
                    }
                    Output::Plan(plan) => {
                        assert_ne!(
                            Some(&plan),
                            agent.plan.as_ref(),
                            "a plan comes only when it changed"
                        );
                        agent.plan = Some(plan);
                    }
                    Output::Advertise(candidates) => {
                        agent.candidates = candidates;
                        actions.push(self.publish());
                    }
                    Output::StateChanged { peer, from, to } => {
                        actions.push(Action::StateChanged(peer, from, to));
                    }
                    Output::PathChanged { .. }
                    | Output::StaticStateChanged { .. }
                    | Output::PingResult { .. } => {}
                }
            } else if let Some(effect) = agent.tunnels.effects.pop_front() {
                use super::tunnel::Effect;
                match effect {
                    Effect::Send(to, message) => {
                        actions.push(Action::Send(to, Payload::WireGuard(message).on(&to)));
                    }
                    Effect::Observed(peer, what) => agent.mesh.handle_observation(now, peer, what),
                    Effect::Received(_, inner) if inner.reply => {
                        agent.replies.insert(inner.number);
                    }
                    Effect::Received(peer, inner) => {
                        let reply = super::tunnel::Inner { reply: true, ..inner };
                        agent.tunnels.send(now, peer, reply);
                    }
                }
            } else {
                return actions;
            }
        }
    }

    /// Returns when the agent has to be woken.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let agent = self.agent.as_ref()?;
        let core = agent.mesh.poll_timeout().map(|(at, _)| at);
        core.into_iter().chain(agent.tunnels.poll_timeout()).min()
    }

    /// Returns the address from which a datagram to `to` leaves.
    pub fn source(&self, to: &Path) -> Option<(RealmId, SocketAddr)> {
        let fits = |ip: &IpAddr| match to.local {
            Some(local) => *ip == local.address,
            None => ip.is_ipv4() == to.remote.is_ipv4(),
        };
        let (realm, ip) = self.addresses.iter().find(|(_, ip)| fits(ip))?;
        let port = match to.port {
            LocalPort::Configured => PORT,
            LocalPort::Second => self.second_port,
        };
        Some((*realm, SocketAddr::new(*ip, port)))
    }

    /// Returns the state of a peer, as the core reports it.
    pub fn peer_state(&self, peer: NodeId) -> Option<PeerState> {
        Some(self.agent.as_ref()?.mesh.peer(peer)?.state)
    }

    /// Creates a new record and the action that publishes it.
    pub fn publish(&mut self) -> Action {
        self.generation += 1;
        let candidates =
            self.agent.as_ref().map(|agent| agent.candidates.clone()).unwrap_or_default();
        let record = Record {
            generation: self.generation,
            boot_epoch: self.boot_epoch,
            candidates,
            prefixes: self.prefixes.clone(),
            relay: self.relay,
            probe_version: self.probe_version,
            ..node::record(&self.grant)
        };
        let node = Node::new(self.grant.clone(), record).expect("the record respects the grant");
        Action::Publish(Box::new(node))
    }

    fn local_candidates(&self) -> Vec<Candidate> {
        let local =
            self.addresses.iter().map(|(_, ip)| (CandidateKind::Local, SocketAddr::new(*ip, PORT)));
        let configured = self.configured.iter().map(|addr| (CandidateKind::Configured, *addr));
        local.chain(configured).filter_map(|(kind, addr)| Candidate::new(kind, addr)).collect()
    }
}

impl Agent {
    /// Seals a probe in the version that its receiver has, according to its record; an agent of version
    /// `own` seals no later one.
    fn seal(&mut self, own: ProbeVersion, payload: Payload) -> Payload {
        let Payload::Probe { to, .. } = &payload else { return payload };
        let to = *to;
        let entry = self.table.as_ref().and_then(|table| table.peers.get(&to));
        let version = entry.map_or(ProbeVersion::V1, |entry| entry.probe_version);
        match own.min(version) {
            ProbeVersion::V1 => payload,
            ProbeVersion::V2 => self.probes.stamp(to, payload),
        }
    }

    fn knows(&self, peer: &WireguardKey) -> bool {
        self.table.as_ref().is_some_and(|table| table.peers.contains_key(peer))
    }
}

/// Returns the uplinks: every address is on an interface of its realm.
fn uplinks(addresses: &[(RealmId, IpAddr)]) -> Vec<LocalAddress> {
    let uplinks = addresses.iter();
    uplinks.map(|(realm, ip)| LocalAddress { address: *ip, interface: *realm as u32 + 1 }).collect()
}

/// Returns the configuration of the mesh that every simulated host is in.
pub fn mesh_config() -> MeshConfig {
    MeshConfig {
        overlay_v6: "fd00:71::/64".parse().expect("a network"),
        protected: vec![node::net("10.244.0.0/16")],
        ..node::mesh_config()
    }
}

fn grant(number: u16) -> Grant {
    let bytes = number.to_be_bytes();
    let mut id = [0; 16];
    id[14..].copy_from_slice(&bytes);
    // Keys sort in an order of their own, so that a host's number does not decide the initiator.
    let mut key = [0; 32];
    key[..2].copy_from_slice(&number.wrapping_mul(40_503).to_be_bytes());
    Grant {
        node_id: NodeId(id),
        name: format!("host-{number}").parse().expect("a name"),
        identity_key: IdentityKey(key),
        wireguard_keys: vec![WireguardKey(key)],
        overlay: OverlayAddresses {
            v6: std::net::Ipv6Addr::new(0xfd00, 0x71, 0, 0, 0, 0, 0, number),
            v4: std::net::Ipv4Addr::new(198, 19, bytes[0], bytes[1]),
        },
        allowed_prefixes: vec![node::net("10.244.0.0/16")],
        issued_at: i64::from(number),
        relay: RelayRole::Granted,
        ..node::grant(0)
    }
}
