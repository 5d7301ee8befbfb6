//! Peers of the configuration, beside a mesh and without one.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: a panic is the report

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use towline_core::mesh::{MapChange, Membership, Mesh, Output, PeerState};
use towline_core::path::{LocalAddress, Path};
use towline_core::peer_table::{Observation, PeerTable};
use towline_core::plan::{Plan, RouteVia};
use towline_core::static_peers::{StaticPeer, StaticPeerStatus};
use towline_fixtures::agent;
use towline_fixtures::node::{net, nets, node, tombstone, wireguard_key as key};
use towline_types::id::PresharedKey;

const HOME: &str = "203.0.113.7:51820";
const AWAY: &str = "198.51.100.9:4000";

#[test]
fn without_a_mesh_static_peers_are_routed_from_the_configured_address_and_guarded() {
    let mut us = Us::alone();
    us.mesh.set_addresses(us.now, vec!["10.9.0.2".parse().unwrap()]);
    us.set(vec![peer(2, &["10.9.0.0/24", "fd09::/64"])]);
    let plan = us.plan.clone().unwrap();
    assert_eq!(plan.link.addresses, [net("10.9.0.2/32")].into());
    let source = |text: &str| plan.routes[&(net(text), RouteVia::Link)].source;
    assert_eq!(source("10.9.0.0/24"), Some("10.9.0.2".parse().unwrap()));
    assert_eq!(source("fd09::/64"), None, "we have no such address");
    assert!(plan.routes.contains_key(&(net("10.9.0.0/24"), RouteVia::Unreachable)));
    assert_eq!(plan.firewall.guarded, [net("10.9.0.0/24"), net("fd09::/64")].into());
    let entry = &us.table.peers[&key(2)];
    assert_eq!(entry.endpoint, Some(path(HOME)));
    assert_eq!(entry.prefixes.len(), 2);
    assert!(entry.is_static);
    let own = &us.table.own;
    assert_eq!(plan.firewall.own, *own);
    let (ours, theirs) = ("10.9.0.2".parse().unwrap(), "10.9.0.7".parse().unwrap());
    assert!(own.accepts(ours) && own.owns(ours));
    assert!(own.accepts(theirs) && !own.owns(theirs), "another static peer may send there");
    us.set(Vec::new());
    assert!(us.table.own.accepts(ours) && !us.table.own.accepts(theirs));
}

#[test]
fn a_peer_without_keepalive_is_called_when_there_is_traffic_for_it() {
    let mut us = Us::alone();
    us.set(vec![peer(2, &["10.9.0.0/24"])]);
    assert_eq!(us.mesh.poll_timeout(), None, "nothing is wanted");
    assert_eq!(us.status(2).state, PeerState::Idle);
    assert_eq!(us.observe(Observation::Wanted), [vec![path(HOME)]]);
    assert_eq!(us.status(2).state, PeerState::Connecting);
    us.observe(Observation::Handshake { from: path(HOME) });
    assert_eq!(us.status(2).state, PeerState::Up);
    us.later(200);
    us.observe(Observation::SessionExpired);
    assert_eq!(us.status(2).state, PeerState::Idle);
    assert_eq!(us.mesh.poll_timeout(), None);
}

#[test]
fn a_peer_with_keepalive_is_called_at_once_and_permanently() {
    let mut us = Us::alone();
    us.set(vec![StaticPeer { keepalive: Some(Duration::from_secs(25)), ..peer(2, &[]) }]);
    assert_eq!(us.wait(), [vec![path(HOME)]]);
    for _ in 0..3 {
        us.later(5);
        us.observe(Observation::HandshakeUnanswered);
    }
    assert_eq!(us.status(2).state, PeerState::Down);
    assert!(us.reason(2).contains("no answer from 203.0.113.7:51820 for 15 s"));
    us.later(77);
    us.observe(Observation::SessionExpired);
    assert_eq!(us.wait(), [vec![path(HOME)]]);
    us.observe(Observation::Handshake { from: path(HOME) });
    assert_eq!((us.status(2).state, us.status(2).reason), (PeerState::Up, None));
}

#[test]
fn handshakes_are_no_closer_together_than_wireguard_makes_them() {
    let mut us = Us::alone();
    us.set(vec![peer(2, &[])]);
    assert_eq!(us.observe(Observation::Wanted).len(), 1);
    us.later(1);
    assert_eq!(us.observe(Observation::Wanted).len(), 0);
    assert_eq!(us.wait().len(), 1);
}

#[test]
fn answers_follow_a_peer_that_roams_and_a_silent_one_is_sought_at_home_too() {
    let mut us = Us::alone();
    us.set(vec![peer(2, &[])]);
    us.observe(Observation::Handshake { from: path(HOME) });
    let before = us.tables;
    us.observe(Observation::Roamed { from: path(AWAY) });
    assert_eq!(us.table.peers[&key(2)].endpoint, Some(path(AWAY)));
    assert_eq!(us.tables, before, "the rest of the table stays");
    us.observe(Observation::SessionExpired);
    assert_eq!(us.observe(Observation::Wanted), [vec![path(AWAY), path(HOME)]]);
}

#[test]
fn answers_leave_from_the_address_that_was_called_until_our_addresses_change() {
    let mut us = Us::alone();
    us.set(vec![peer(2, &[])]);
    let local = Some(LocalAddress { address: "192.0.2.1".parse().unwrap(), interface: 3 });
    us.observe(Observation::Handshake { from: Path { local, ..path(AWAY) } });
    assert_eq!(us.table.peers[&key(2)].endpoint.unwrap().local, local);
    us.mesh.set_candidates(us.now, Vec::new());
    us.drain();
    assert_eq!(us.table.peers[&key(2)].endpoint, Some(path(AWAY)));
}

#[test]
fn a_peer_without_endpoint_is_waited_for() {
    let mut us = Us::alone();
    us.set(vec![StaticPeer { endpoint: None, ..peer(2, &[]) }]);
    assert_eq!(us.observe(Observation::Wanted), Vec::<Vec<Path>>::new());
    assert!(us.reason(2).contains("waiting for it to call"));
    us.observe(Observation::Handshake { from: path(AWAY) });
    assert_eq!(us.table.peers[&key(2)].endpoint, Some(path(AWAY)));
}

#[test]
fn what_the_mesh_or_its_nodes_hold_is_refused_to_a_static_peer_and_shown() {
    let mut us = Us::in_mesh();
    us.set(vec![peer(2, &["10.1.0.0/16", "10.2.0.0/16", "198.19.0.0/24", "192.168.0.0/16"])]);
    assert_eq!(us.conflicts(2), ["prefix 198.19.0.0/24 overlaps 198.19.0.0/16 of the mesh"]);
    us.mesh.handle_map_change(us.now, node(3).prefixes(&["10.1.7.0/24"]).into());
    us.mesh.set_prefixes(us.now, vec![net("10.2.0.0/16")]);
    us.drain();
    assert_eq!(
        us.conflicts(2),
        [
            "prefix 10.1.0.0/16 overlaps 10.1.7.0/24 of node-3",
            "prefix 10.2.0.0/16 is held by this node",
            "prefix 198.19.0.0/24 overlaps 198.19.0.0/16 of the mesh",
        ]
    );
    assert_eq!(us.table.peers[&key(2)].prefixes, [net("192.168.0.0/16")]);
    // When the node is removed the prefix comes back.
    us.mesh.handle_map_change(us.now, MapChange::Remove(tombstone(3)));
    us.drain();
    assert!(us.table.peers[&key(2)].prefixes.contains(&net("10.1.0.0/16")));
}

#[test]
fn a_node_that_was_removed_itself_keeps_its_static_peers_and_its_guards_alone() {
    let mut us = Us::in_mesh();
    us.set(vec![peer(9, &["172.30.0.0/24"])]);
    us.mesh.handle_map_change(us.now, node(2).prefixes(&["10.1.0.0/16"]).into());
    us.drain();
    assert!(us.table.peers.contains_key(&key(2)) && !us.mesh.is_removed());
    let plan = us.plan.clone();
    for _ in 0..2 {
        us.mesh.handle_map_change(us.now, MapChange::Remove(tombstone(1)));
        us.drain();
        assert!(us.mesh.is_removed());
        assert_eq!(us.table.peers.keys().collect::<Vec<_>>(), [&key(9)]);
        assert_eq!(us.mesh.peer_table(), Some(&us.table));
        assert_eq!(us.plan, plan, "routes and guards stay");
    }
    us.mesh.handle_map_change(us.now, node(3).into());
    us.drain();
    assert!(!us.table.peers.contains_key(&key(3)), "a later node is no peer either");
}

#[test]
fn a_static_peer_with_a_nodes_key_is_no_peer() {
    let mut us = Us::in_mesh();
    us.mesh.handle_map_change(us.now, node(2).prefixes(&["10.1.0.0/16"]).into());
    us.set(vec![peer(2, &["10.9.0.0/24"]), peer(1, &["10.8.0.0/24"])]);
    assert_eq!(us.reason(2), "its WireGuard key is held by node-2");
    assert_eq!(us.reason(1), "its WireGuard key is held by this node");
    assert_eq!(us.table.peers.len(), 1);
    assert!(!us.table.peers[&key(2)].prefixes.contains(&net("10.9.0.0/24")));
}

#[test]
fn another_configuration_changes_what_it_says_and_nothing_else() {
    let mut us = Us::alone();
    us.set(vec![peer(2, &["10.9.0.0/24"]), peer(3, &["10.8.0.0/24"])]);
    us.observe(Observation::Handshake { from: path(AWAY) });
    let preshared_key = Some(PresharedKey([7; 32]));
    us.set(vec![StaticPeer { preshared_key: preshared_key.clone(), ..peer(2, &["10.7.0.0/24"]) }]);
    let entry = &us.table.peers[&key(2)];
    assert_eq!(entry.preshared_key, preshared_key);
    assert_eq!(entry.endpoint, Some(path(AWAY)), "learned, and still true");
    assert_eq!(us.status(2).state, PeerState::Up);
    assert_eq!(us.table.peers.len(), 1);
    let plan = us.plan.clone().unwrap();
    assert_eq!(plan.firewall.guarded, [net("10.7.0.0/24")].into(), "the operator let go");
}

struct Us {
    mesh: Mesh,
    now: Instant,
    table: Arc<PeerTable>,
    /// Number of tables so far.
    tables: usize,
    plan: Option<Arc<Plan>>,
}

impl Us {
    fn new(membership: Option<Membership>) -> Self {
        #[allow(clippy::disallowed_methods)] // some instant to count from
        let now = Instant::now();
        let config = agent::config(membership);
        let (mesh, table) = (Mesh::new(config, [7; 32], now), Arc::default());
        Self { mesh, now, table, tables: 0, plan: None }
    }

    fn alone() -> Self {
        Self::new(None)
    }

    fn in_mesh() -> Self {
        Self::new(Some(agent::membership(1)))
    }

    fn set(&mut self, peers: Vec<StaticPeer>) {
        self.mesh.set_static_peers(self.now, peers);
        self.drain();
    }

    /// Peer 2 is seen to do this. Returns where handshakes go.
    fn observe(&mut self, what: Observation) -> Vec<Vec<Path>> {
        self.mesh.handle_observation(self.now, key(2), what);
        self.drain()
    }

    /// Lets the next deadline come.
    fn wait(&mut self) -> Vec<Vec<Path>> {
        let (at, _) = self.mesh.poll_timeout().unwrap();
        self.now = at;
        self.mesh.handle_timeout(at);
        self.drain()
    }

    fn later(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }

    fn drain(&mut self) -> Vec<Vec<Path>> {
        let mut handshakes = Vec::new();
        while let Some(output) = self.mesh.poll_output() {
            match output {
                Output::PeerTable(table) => {
                    self.table = table;
                    self.tables += 1;
                }
                Output::PeerPath { peer, path } => {
                    let entry = Arc::make_mut(&mut self.table).peers.get_mut(&peer);
                    entry.expect("the peer is in the table").set_path(path);
                }
                Output::Plan(plan) => self.plan = Some(plan),
                Output::Handshake { peer, to } if peer == key(2) => handshakes.push(to),
                _ => {}
            }
        }
        handshakes
    }

    fn status(&self, number: u8) -> StaticPeerStatus {
        self.mesh.static_peers().find(|peer| peer.public_key == key(number)).unwrap()
    }

    fn reason(&self, number: u8) -> String {
        self.status(number).reason.unwrap().to_string()
    }

    fn conflicts(&self, number: u8) -> Vec<String> {
        self.status(number).conflicts.iter().map(ToString::to_string).collect()
    }
}

fn peer(number: u8, prefixes: &[&str]) -> StaticPeer {
    StaticPeer {
        name: format!("static-{number}"),
        public_key: key(number),
        preshared_key: None,
        endpoint: Some(addr(HOME)),
        prefixes: nets(prefixes),
        keepalive: None,
    }
}

fn path(text: &str) -> Path {
    addr(text).into()
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}
