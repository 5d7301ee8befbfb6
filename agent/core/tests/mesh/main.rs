//! One mesh, step by step.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: a panic is the report

mod bad_input;
mod help;
mod map;
mod peer;
mod plan;
mod relay_server;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_core::local_limits::{HostAddresses, InClear, LocalLimits};
use towline_core::local_networks::LocalNetworks;
use towline_core::mesh::{
    Config, GuardReason, MapChange, Membership, Mesh, Output, PeerState, PeerStatus, RelayLimits,
    Transmit,
};
use towline_core::own_networks::OwnNetworks;
use towline_core::path::{ChannelId, LocalAddress, Path, Source};
use towline_core::peer_history::{Changed, PathChange};
use towline_core::peer_table::{Observation, PeerTable};
use towline_core::plan::{Plan, RouteVia};
use towline_core::stun_client::Mapping;
use towline_fixtures::agent;
use towline_fixtures::node::{
    NodeBuilder, candidate, grant, mesh_config, net, node as peer, node_id as id, numbered_node,
    tombstone, tombstone_of, wireguard_key as key,
};
use towline_types::code::Coded as _;
use towline_types::frame::Probe;
use towline_types::id::WireguardKey;
use towline_types::limits;
use towline_types::mtu::Mtu;
use towline_types::node::{Grant, MeshConfig, RelayRole, SharedPrefix};

const PUBLIC: &str = "203.0.113.7:51830";
const PRIVATE: &str = "192.168.1.7:51830";
const OTHER: &str = "203.0.113.77:51830";

struct Us {
    mesh: Mesh,
    now: Instant,
    table: Arc<PeerTable>,
    plan: Option<Arc<Plan>>,
    results: BTreeMap<u64, Option<(Path, Duration)>>,
    outputs: usize,
    /// Pings to here are not answered, nor larger ones than this.
    silent: Option<SocketAddr>,
    payload: u16,
}

impl Us {
    fn new(number: u8) -> Self {
        Self::relaying(number, None)
    }

    fn relaying(number: u8, relay: Option<RelayLimits>) -> Self {
        #[allow(clippy::disallowed_methods)] // some instant to count from
        let now = Instant::now();
        let mesh = MeshConfig { protected: vec![net("10.0.0.0/8")], ..mesh_config() };
        let grant = Grant { relay: RelayRole::of(relay.is_some()), ..grant(number) };
        let config = agent::config(Some(Membership { grant, mesh }));
        let config = Config { relay, ..config };
        let mesh = Mesh::new(config, [7; 32], now);
        let (table, results) = (Arc::default(), BTreeMap::new());
        Self { mesh, now, table, plan: None, results, outputs: 0, silent: None, payload: u16::MAX }
    }

    /// With peer 2 up on `path`, in use, and one pong taken.
    fn up(path: &str) -> Self {
        let mut us = Self::new(1);
        us.upsert(peer(2).candidates(&[path]));
        us.drain();
        us.mesh.handle_observation(
            us.now,
            key(2),
            Observation::Handshake { from: path.parse::<SocketAddr>().unwrap().into() },
        );
        us.active();
        us.echo(Duration::from_millis(10), Duration::from_millis(500));
        us
    }

    /// The host joined in these networks, and is connected to them.
    fn joined_in(&mut self, networks: &[&str]) {
        let joined = networks.iter().copied().map(net).collect();
        self.mesh.set_local_networks(self.now, LocalNetworks { configured: Vec::new(), joined });
        self.connected_to(networks);
    }

    fn connected_to(&mut self, networks: &[&str]) {
        let networks = networks.iter().copied().map(net).collect();
        self.mesh.set_connected_networks(self.now, networks);
    }

    /// Whether packets to an address are dropped outside the tunnel.
    fn guards(&self, ip: &str) -> bool {
        let ip: std::net::IpAddr = ip.parse().unwrap();
        self.plan().firewall.guarded.iter().any(|net| net.contains(&ip))
    }

    fn site(&mut self, site: Option<&str>) {
        let site = site.map(|site| site.parse().unwrap());
        self.mesh.set_grant(self.now, Grant { site, ..self.mesh.grant().unwrap().clone() });
    }

    fn configure(&mut self, change: impl FnOnce(&mut MeshConfig)) {
        let mut mesh = self.mesh.config().unwrap().clone();
        change(&mut mesh);
        mesh.generation += 1;
        self.mesh.handle_map_change(self.now, MapChange::Mesh(mesh));
    }

    /// Inner packets travel to and from peer 2.
    fn active(&mut self) {
        let active = Observation::Active { sent: true, received: true, by_endpoint: true };
        self.mesh.handle_observation(self.now, key(2), active);
    }

    /// A message comes from a peer over a path on which it proved nothing.
    fn message(&mut self, number: u8, from: Path, message: Probe) {
        let source = Source { path: from, is_validated: false };
        self.mesh.handle_message(self.now, key(number), Some(source), message);
    }

    /// A message comes from a peer over a path on which it proved that it receives there.
    fn validated(&mut self, number: u8, from: Path, message: Probe) {
        let source = Source { path: from, is_validated: true };
        self.mesh.handle_message(self.now, key(number), Some(source), message);
    }

    /// A controller brings a message of peer 2.
    fn signal(&mut self, message: Probe) {
        self.mesh.handle_message(self.now, key(2), None, message);
    }

    fn upsert(&mut self, node: NodeBuilder) {
        self.mesh.handle_map_change(self.now, node.into());
    }

    fn drain(&mut self) -> Vec<Output> {
        let mut outputs = Vec::new();
        while let Some(output) = self.mesh.poll_output() {
            match &output {
                Output::PeerTable(table) => self.table = table.clone(),
                Output::PeerPath { peer, path } => {
                    let entry = Arc::make_mut(&mut self.table).peers.get_mut(peer);
                    entry.expect("the peer is in the table").set_path(*path);
                }
                Output::Plan(plan) => self.plan = Some(plan.clone()),
                Output::PingResult { id, answer } => {
                    assert!(self.results.insert(*id, *answer).is_none(), "ping {id} ended twice");
                }
                Output::Transmit(_)
                | Output::Handshake { .. }
                | Output::ForwardingTable(_)
                | Output::ReportChannels
                | Output::Stun { .. }
                | Output::Advertise(_)
                | Output::SecondPort { .. }
                | Output::Train { .. }
                | Output::StateChanged { .. }
                | Output::PathChanged { .. }
                | Output::StaticStateChanged { .. } => {}
            }
            self.outputs += 1;
            outputs.push(output);
        }
        outputs
    }

    /// Time passes; nobody answers.
    fn run(&mut self, time: Duration) -> Vec<Output> {
        self.pass(time, None)
    }

    /// Time passes; nobody answers, and somebody asks for the state.
    fn wait(&mut self, time: Duration) {
        self.run(time);
        self.mesh.handle_timeout(self.now);
    }

    /// Time passes; every ping is answered after `rtt`.
    fn echo(&mut self, rtt: Duration, time: Duration) {
        self.pass(time, Some(rtt));
    }

    fn pass(&mut self, time: Duration, rtt: Option<Duration>) -> Vec<Output> {
        let end = self.now + time;
        let mut all = self.drain();
        let mut pongs: Vec<_> = Vec::new();
        let mut fresh = all.clone();
        loop {
            if let Some(rtt) = rtt {
                for (to, transaction) in answerable(&fresh, self.silent, self.payload) {
                    pongs.push((self.now + rtt, to, transaction));
                }
            }
            let answer = pongs.iter().map(|(at, ..)| *at).min();
            let timeout = self.mesh.poll_timeout().map(|(at, _)| at);
            let Some(next) = answer.into_iter().chain(timeout).min().filter(|at| *at <= end) else {
                break;
            };
            self.now = self.now.max(next);
            if answer == Some(next) {
                let first = pongs.iter().position(|(at, ..)| *at == next).unwrap();
                let (_, to, transaction) = pongs.remove(first);
                self.message(2, to, pong(transaction));
            } else {
                self.mesh.handle_timeout(self.now);
            }
            fresh = self.drain();
            all.extend(fresh.iter().cloned());
        }
        self.now = end;
        all
    }

    fn table(&self) -> &PeerTable {
        &self.table
    }

    fn plan(&self) -> &Plan {
        self.plan.as_ref().unwrap()
    }

    fn peer(&self, number: u8) -> PeerStatus {
        self.mesh.peers().find(|peer| peer.node.id() == id(number)).unwrap()
    }

    fn reason(&self, number: u8) -> String {
        self.peer(number).reason.unwrap().to_string()
    }

    fn conflicts(&self, number: u8) -> Vec<String> {
        self.peer(number).conflicts.iter().map(ToString::to_string).collect()
    }
}

fn handshakes(outputs: &[Output]) -> Vec<Vec<Path>> {
    let to = outputs.iter().filter_map(|o| match o {
        Output::Handshake { to, .. } => Some(to.clone()),
        _ => None,
    });
    to.collect()
}

/// Pings that a peer gets to see.
fn answerable(outputs: &[Output], silent: Option<SocketAddr>, payload: u16) -> Vec<(Path, u64)> {
    let reach = |to: &Path, size: Option<u16>| {
        Some(to.remote) != silent && size.is_none_or(|size| size <= payload)
    };
    let to = transmits(outputs).filter_map(|transmit| match (&transmit.message, transmit.path) {
        (Probe::Ping { transaction }, Some(to)) if reach(&to, transmit.size) => {
            Some((to, *transaction))
        }
        _ => None,
    });
    to.collect()
}

fn stun(outputs: &[Output]) -> Vec<(SocketAddr, [u8; 12])> {
    let asked = outputs.iter().filter_map(|o| match o {
        Output::Stun { to, transaction } => Some((to.remote, *transaction)),
        _ => None,
    });
    asked.collect()
}

fn transmits(outputs: &[Output]) -> impl Iterator<Item = &Transmit> {
    outputs.iter().filter_map(|o| match o {
        Output::Transmit(transmit) => Some(transmit),
        _ => None,
    })
}

/// The first registration: the relay, where it is, and the transaction.
fn registration(outputs: &[Output]) -> Option<(WireguardKey, Path, u64)> {
    transmits(outputs).find_map(|transmit| match transmit.message {
        Probe::Register { transaction } => Some((transmit.peer, transmit.path?, transaction)),
        _ => None,
    })
}

/// The first request for a channel: the node at its other end, and the transaction.
fn channel_request(outputs: &[Output]) -> Option<(WireguardKey, u64)> {
    transmits(outputs).find_map(|transmit| match transmit.message {
        Probe::Open { peer, transaction } => Some((peer, transaction)),
        _ => None,
    })
}

fn pings(outputs: &[Output]) -> Vec<(Path, u64)> {
    answerable(outputs, None, u16::MAX)
}

fn pong(transaction: u64) -> Probe {
    Probe::Pong { transaction, observed: addr(PRIVATE) }
}

fn call_me(number: u64, candidate_at: &str) -> Probe {
    Probe::CallMe { boot_epoch: 1, number, candidates: vec![candidate(candidate_at)] }
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn path(text: &str) -> Path {
    addr(text).into()
}
