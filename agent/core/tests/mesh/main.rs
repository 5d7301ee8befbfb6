//! One mesh, step by step.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: a panic is the report

mod bad_input;
mod help;
mod map;
mod peer;
mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_core::mesh::{
    Config, MapChange, Membership, Mesh, Output, PeerState, PeerStatus, Transmit,
};
use towline_core::own_networks::OwnNetworks;
use towline_core::path::{ChannelId, LocalAddress, Path};
use towline_core::peer_table::{Observation, PeerTable};
use towline_core::plan::{Plan, RouteVia, RulePlan};
use towline_core::stun_client::Mapping;
use towline_types::frame::Probe;
use towline_types::id::{IdentityKey, MeshId, NodeId, WireguardKey};
use towline_types::node::{
    Candidate, CandidateKind, Grant, MeshConfig, Node, OverlayAddresses, Record, Tombstone,
};

const PUBLIC: &str = "203.0.113.7:51830";
const PRIVATE: &str = "192.168.1.7:51830";
const OTHER: &str = "203.0.113.77:51830";

fn mesh_config() -> MeshConfig {
    MeshConfig {
        mesh_id: MeshId([1; 16]),
        overlay_v6: "fd00::/64".parse().unwrap(),
        overlay_v4: "198.19.0.0/16".parse().unwrap(),
        protected: vec![net("10.0.0.0/8")],
        trusted_sites: Vec::new(),
        bypass_when_down: Vec::new(),
        lease: Duration::from_secs(600),
        generation: 1,
    }
}

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
        #[allow(clippy::disallowed_methods)] // some instant to count from
        let now = Instant::now();
        let config = Config {
            membership: Some(Membership { grant: grant(number), mesh: mesh_config() }),
            link: "towline0".into(),
            mtu: 1420,
            table: 1,
            rules: RulePlan { priority: 1, mark: 1, mask: 1 },
            firewall_table: "towline".into(),
            relay: false,
            boot_epoch: 1,
        };
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
        let active = Observation::Active { sent: true, received: true };
        self.mesh.handle_observation(self.now, key(2), active);
    }

    /// A message comes from a peer over a path.
    fn message(&mut self, number: u8, from: Path, message: Probe) {
        self.mesh.handle_message(self.now, key(number), Some(from), message);
    }

    /// A controller brings a message of peer 2.
    fn signal(&mut self, message: Probe) {
        self.mesh.handle_message(self.now, key(2), None, message);
    }

    fn upsert(&mut self, node: Build) {
        self.mesh.handle_map_change(self.now, MapChange::Upsert(Box::new(node.build())));
    }

    fn drain(&mut self) -> Vec<Output> {
        let mut outputs = Vec::new();
        while let Some(output) = self.mesh.poll_output() {
            match &output {
                Output::PeerTable(table) => self.table = table.clone(),
                Output::Plan(plan) => self.plan = Some(plan.clone()),
                Output::PingResult { id, answer } => {
                    assert!(self.results.insert(*id, *answer).is_none(), "ping {id} ended twice");
                }
                Output::Transmit(_)
                | Output::Handshake { .. }
                | Output::Stun { .. }
                | Output::Advertise(_)
                | Output::StateChanged { .. }
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
        Output::Stun { to, transaction, .. } => Some((*to, *transaction)),
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

#[derive(Clone)]
struct Build {
    grant: Grant,
    record: Record,
}

fn peer(number: u8) -> Build {
    let record = Record {
        node_id: id(number),
        generation: 1,
        boot_epoch: 1,
        wireguard_keys: vec![key(number)],
        candidates: Vec::new(),
        prefixes: Vec::new(),
        version: String::new(),
        relay: false,
    };
    Build { grant: grant(number), record }
}

/// One of many: with an id and a key of two bytes.
fn numbered(number: u16) -> Build {
    let mut build = peer(2);
    let [high, low] = (number + 1_000).to_be_bytes();
    let mut id = [0; 16];
    id[..2].copy_from_slice(&[high, low]);
    let mut key = [0; 32];
    key[..2].copy_from_slice(&[high, low]);
    build.grant.node_id = NodeId(id);
    build.grant.name = format!("many-{number}").parse().unwrap();
    build.grant.identity_key = IdentityKey(key);
    build.grant.wireguard_keys = vec![WireguardKey(key)];
    build.grant.overlay = OverlayAddresses {
        v6: std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 1, number),
        v4: [198, 19, high, low].into(),
    };
    build.record.node_id = NodeId(id);
    build.record.wireguard_keys = vec![WireguardKey(key)];
    build
}

impl Build {
    fn relay(mut self) -> Self {
        self.record.relay = true;
        self
    }

    fn candidates(mut self, list: &[&str]) -> Self {
        self.record.candidates = list.iter().map(|text| candidate(text)).collect();
        self
    }

    fn prefixes(mut self, list: &[&str]) -> Self {
        self.record.prefixes = list.iter().map(|text| net(text)).collect();
        self
    }

    fn generation(mut self, generation: u64) -> Self {
        self.record.generation = generation;
        self
    }

    fn site(mut self, site: &str) -> Self {
        self.grant.site = Some(site.parse().unwrap());
        self
    }

    fn issued(mut self, at: i64) -> Self {
        self.grant.issued_at = at;
        self
    }

    fn identity(mut self, number: u8) -> Self {
        self.grant.identity_key = IdentityKey([number; 32]);
        self
    }

    fn wireguard(mut self, number: u8) -> Self {
        self.grant.wireguard_keys = vec![key(number)];
        self.record.wireguard_keys = vec![key(number)];
        self
    }

    fn build(self) -> Node {
        Node::new(self.grant, self.record).unwrap()
    }
}

impl From<Build> for MapChange {
    fn from(build: Build) -> Self {
        Self::Upsert(Box::new(build.build()))
    }
}

fn grant(number: u8) -> Grant {
    Grant {
        mesh_id: MeshId([1; 16]),
        node_id: id(number),
        name: format!("node-{number}").parse().unwrap(),
        identity_key: IdentityKey([number; 32]),
        wireguard_keys: vec![key(number)],
        overlay: OverlayAddresses {
            v6: format!("fd00::{number}").parse().unwrap(),
            v4: [198, 19, 0, number].into(),
        },
        allowed_prefixes: ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"].map(net).to_vec(),
        site: None,
        labels: BTreeMap::new(),
        issued_at: i64::from(number),
        ephemeral: false,
    }
}

fn tombstone(number: u8) -> Tombstone {
    Tombstone {
        mesh_id: MeshId([1; 16]),
        node_id: id(number),
        name: format!("node-{number}").parse().unwrap(),
        identity_key: IdentityKey([number; 32]),
        removed_at: 0,
    }
}

fn candidate(text: &str) -> Candidate {
    Candidate::new(CandidateKind::Local, addr(text)).unwrap()
}

fn id(number: u8) -> NodeId {
    NodeId([number; 16])
}

fn key(number: u8) -> WireguardKey {
    WireguardKey([number; 32])
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn path(text: &str) -> Path {
    addr(text).into()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}
