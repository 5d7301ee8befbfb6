//! Tests the core on the simulator: a few hand-written scenarios, then a model-based search for
//! others.
//!
//! The model ([`Model`]) knows only what an operator knows: which agents run, which nodes were
//! removed, the prefixes of each node, and which nodes accept connections. After each step the
//! safety invariants are checked. Once nothing disturbs the mesh, every pair that can connect must
//! be up within [`BUDGET`], and an inner packet must get through in both directions.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: the panic is the report
#![expect(clippy::print_stdout, reason = "the output of a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};
use towline_core::mesh::PeerState;
use towline_core::plan::RouteVia;
use towline_core::reason::PeerReason;
use towline_proto::node::OverlayAddresses;
use towline_tests::sim::nat::{Behaviour, Nat};
use towline_tests::sim::net::{Conditions, HostId, INTERNET, RealmId, Uplink};
use towline_tests::sim::{Sim, host};

/// Time within which every pair that can connect must be up, once nothing disturbs the mesh: the
/// longest pause between attempts, and a few round trips.
const BUDGET: Duration = Duration::from_secs(45);
/// Maximum number of datagrams that one host may send within one second, for each peer.
const STORM: u32 = 60;

const CALM: Conditions =
    Conditions { latency: Duration::from_millis(10), jitter: Duration::ZERO, loss: 0.0 };
const ROUGH: Conditions =
    Conditions { latency: Duration::from_millis(20), jitter: Duration::from_millis(15), loss: 0.1 };

#[test]
fn workers_behind_nat_reach_a_public_node_and_each_other_within_a_second() {
    let (mut sim, hosts) = datacenters(1);
    let started = sim.elapsed();
    let [cloud, first, second] = hosts;
    assert!(sim.run_until(Duration::from_secs(1), |sim| {
        sim.is_up(cloud, first)
            && sim.is_up(first, cloud)
            && sim.is_up(second, cloud)
            && sim.is_up(first, second)
            && sim.is_up(second, first)
    }));
    println!("up after {:?}", sim.elapsed() - started);
}

#[test]
fn two_nodes_that_no_hole_can_join_and_no_relay_serves_say_so() {
    let mut sim = Sim::new(1, CALM);
    let [first, second] = [1, 2].map(|n| {
        let behind = nat(&mut sim, Behaviour::SYMMETRIC, [198, 51, 100, n].into());
        sim.add_host(&[(behind, [192, 168, 1, 2].into())])
    });
    let cloud = sim.add_host(&[(INTERNET, [203, 0, 113, 1].into())]);
    for host in [first, second, cloud] {
        sim.start(host);
    }
    sim.run(Duration::from_secs(30));
    let mesh = &sim.hosts[first].agent.as_ref().unwrap().mesh;
    let status = mesh.peer(sim.hosts[second].id()).unwrap();
    assert!(matches!(status.reason, Some(PeerReason::NoRelay(_))), "{:?}", status.reason);
}

#[test]
fn two_nodes_whose_only_relay_is_off_say_so() {
    let mut sim = Sim::new(1, CALM);
    let [first, second] = [1, 2].map(|n| {
        let behind = nat(&mut sim, Behaviour::SYMMETRIC, [198, 51, 100, n].into());
        sim.add_host(&[(behind, [192, 168, 1, 2].into())])
    });
    let cloud = sim.add_host(&[(INTERNET, [203, 0, 113, 1].into())]);
    let relay = sim.add_host(&[(INTERNET, [203, 0, 113, 2].into())]);
    sim.hosts[relay].relay = true;
    for host in [first, second, cloud, relay] {
        sim.start(host);
    }
    sim.run(Duration::from_secs(20));
    assert!(sim.is_up(first, second));
    sim.stop(relay);
    sim.run(Duration::from_secs(60));
    let mesh = &sim.hosts[first].agent.as_ref().unwrap().mesh;
    let status = mesh.peer(sim.hosts[second].id()).unwrap();
    assert!(matches!(status.reason, Some(PeerReason::RelaySilent(_))), "{:?}", status.reason);
}

#[test]
fn a_restarted_agent_is_back_from_its_cache_while_the_controller_is_away() {
    let (mut sim, [cloud, first, _]) = datacenters(2);
    sim.run(Duration::from_secs(10));
    sim.set_controller(false);
    for host in [first, cloud] {
        sim.stop(host);
        sim.run(Duration::from_secs(3));
        sim.start(host);
        assert!(sim.run_until(Duration::from_secs(3), |sim| {
            sim.is_up(cloud, first) && sim.is_up(first, cloud)
        }));
        echo(&mut sim, cloud, first);
        echo(&mut sim, first, cloud);
    }
}

#[test]
fn a_nat_that_forgets_its_table_costs_less_than_three_seconds() {
    let (mut sim, [cloud, first, _]) = datacenters(3);
    sim.run(Duration::from_secs(10));
    sim.net.flush_nats();
    sim.run(Duration::from_secs(3));
    echo(&mut sim, cloud, first);
    echo(&mut sim, first, cloud);
}

#[test]
fn a_path_that_carries_one_direction_alone_is_noticed_within_three_seconds() {
    let (mut sim, [cloud, first, _]) = datacenters(4);
    sim.run(Duration::from_secs(10));
    for (from, to) in [(cloud, first), (first, cloud)] {
        echo(&mut sim, cloud, first);
        sim.net.cuts.insert((from, to));
        for _ in 0..30 {
            sim.send_inner(cloud, first);
            sim.run(Duration::from_millis(100));
        }
        assert!(!sim.is_up(cloud, first) && !sim.is_up(first, cloud));
        sim.net.cuts.clear();
        assert!(sim.run_until(BUDGET, |sim| sim.is_up(cloud, first) && sim.is_up(first, cloud)));
        sim.run(Duration::from_secs(5));
    }
}

#[test]
fn an_idle_pair_stays_up_for_hours_for_a_few_datagrams_a_second() {
    let (mut sim, [cloud, first, _]) = datacenters(5);
    sim.run(Duration::from_secs(30));
    sim.changes.clear();
    let before = sent(&sim, cloud);
    let time = Duration::from_secs(2 * 3600);
    sim.run(time);
    let down: Vec<_> =
        sim.changes.iter().filter(|(_, at, _, to)| *at == cloud && *to != PeerState::Up).collect();
    assert!(down.is_empty(), "{down:?}");
    assert!(sim.is_up(first, cloud));
    let per_second = f64::from(sent(&sim, cloud) - before) / time.as_secs_f64();
    assert!(per_second < 6.0, "{per_second} datagrams per second for two peers");
}

#[test]
fn nodes_that_are_off_cost_a_large_mesh_nothing_unless_something_is_sent_to_them() {
    let mut sim = Sim::new(6, CALM);
    let lan = nat(&mut sim, Behaviour::PORT_RESTRICTED, [198, 51, 100, 1].into());
    let hosts: Vec<HostId> =
        (1..=70).map(|last| sim.add_host(&[(lan, [192, 168, 1, last].into())])).collect();
    // Each publishes its record, and is switched off.
    for host in &hosts {
        sim.start(*host);
        sim.run(Duration::from_millis(100));
        sim.stop(*host);
    }
    let (us, off) = (hosts[0], hosts[1]);
    sim.start(us);
    assert_eq!(bytes_within(&mut sim, Duration::from_secs(600)), 0);
    sim.send_inner(us, off);
    assert!(bytes_within(&mut sim, Duration::from_secs(900)) > 0);
    assert_eq!(bytes_within(&mut sim, Duration::from_secs(3_600)), 0, "it was given up");
    sim.start(off);
    sim.run(Duration::from_secs(1));
    echo(&mut sim, us, off);
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let trace = |seed| {
        let (mut sim, _) = datacenters(seed);
        sim.net.conditions = ROUGH;
        sim.run(Duration::from_secs(60));
        sim.trace()
    };
    assert_eq!(trace(7), trace(7));
    assert_ne!(trace(7), trace(8));
}

#[test]
fn fifty_nodes_connect_without_a_storm() {
    let mut sim = Sim::new(9, CALM);
    let hosts: Vec<HostId> =
        (0..50).map(|n| sim.add_host(&[(INTERNET, [203, 0, 113, n].into())])).collect();
    for host in &hosts {
        sim.start(*host);
    }
    sim.run(Duration::from_secs(15));
    for a in &hosts {
        for b in &hosts {
            assert!(a == b || sim.is_up(*a, *b), "{a} {b}");
        }
    }
    check_sending(&sim);
}

// The model

/// Location of a host of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Public,
    /// Behind the first NAT, which is port-restricted.
    Home,
    /// Behind the second NAT, which is symmetric.
    Office,
}

#[derive(Debug, Clone)]
struct Model {
    places: Vec<Place>,
    seed: u64,
    running: BTreeSet<HostId>,
    /// Agents that ever ran; no other node can know the rest.
    known: BTreeSet<HostId>,
    removed: BTreeSet<HostId>,
    prefixes: BTreeMap<HostId, BTreeSet<u8>>,
    rough: bool,
    calm: bool,
}

#[derive(Debug, Clone)]
enum Transition {
    /// Starts or restarts an agent whose clock is off by this many seconds.
    Start(HostId, i64),
    Stop(HostId),
    Remove(HostId),
    /// Announces these prefixes, given by the third byte of a /24.
    Announce(HostId, BTreeSet<u8>),
    /// Changes the host's address within the same location.
    Roam(HostId),
    Cut(HostId, HostId),
    Isolate(HostId),
    Controller(bool),
    FlushNats,
    Rough(bool),
    Pass(Duration),
    /// Ends everything that disturbs the mesh; then everything must work.
    Calm,
}

impl ReferenceStateMachine for Model {
    type State = Self;
    type Transition = Transition;

    fn init_state() -> BoxedStrategy<Self> {
        let place = prop_oneof![Just(Place::Public), Just(Place::Home), Just(Place::Office)];
        (prop::collection::vec(place, 3..=5), any::<u64>())
            .prop_map(|(places, seed)| Self {
                running: BTreeSet::new(),
                known: BTreeSet::new(),
                removed: BTreeSet::new(),
                prefixes: BTreeMap::new(),
                rough: false,
                calm: false,
                places,
                seed,
            })
            .boxed()
    }

    fn transitions(model: &Self) -> BoxedStrategy<Transition> {
        let any_host = 0..model.places.len();
        let host = || any_host.clone();
        let clock = prop_oneof![Just(0), -7_200..7_200i64];
        let announced = prop::collection::btree_set(0u8..6, 0..3);
        let pass = prop_oneof![0u64..3_000, 3_000u64..400_000].prop_map(Duration::from_millis);
        prop_oneof![
            6 => (host(), clock).prop_map(|(h, clock)| Transition::Start(h, clock)),
            2 => host().prop_map(Transition::Stop),
            1 => host().prop_map(Transition::Remove),
            2 => (host(), announced).prop_map(|(h, set)| Transition::Announce(h, set)),
            2 => host().prop_map(Transition::Roam),
            2 => (host(), host()).prop_map(|(a, b)| Transition::Cut(a, b)),
            1 => host().prop_map(Transition::Isolate),
            1 => any::<bool>().prop_map(Transition::Controller),
            1 => Just(Transition::FlushNats),
            1 => any::<bool>().prop_map(Transition::Rough),
            4 => pass.prop_map(Transition::Pass),
            3 => Just(Transition::Calm),
        ]
        .boxed()
    }

    fn preconditions(model: &Self, transition: &Transition) -> bool {
        // A shrunk model may have fewer hosts than its transitions refer to.
        let there = |host: &HostId| *host < model.places.len();
        match transition {
            Transition::Start(host, _) => there(host) && !model.removed.contains(host),
            Transition::Stop(host) | Transition::Roam(host) => model.running.contains(host),
            Transition::Announce(host, set) => {
                // The controller withholds a prefix that another node announces already, which the
                // simulated controller does not do.
                let taken = |other: &BTreeSet<u8>| !other.is_disjoint(set);
                model.running.contains(host)
                    && !model.prefixes.iter().any(|(other, set)| other != host && taken(set))
            }
            Transition::Remove(host) => model.known.contains(host) && !model.removed.contains(host),
            Transition::Cut(a, b) => a != b && there(a) && there(b),
            Transition::Isolate(host) => there(host),
            Transition::Controller(_)
            | Transition::FlushNats
            | Transition::Rough(_)
            | Transition::Pass(_)
            | Transition::Calm => true,
        }
    }

    fn apply(mut model: Self, transition: &Transition) -> Self {
        model.calm = matches!(transition, Transition::Calm);
        match transition {
            Transition::Start(host, _) => {
                model.running.insert(*host);
                model.known.insert(*host);
            }
            Transition::Stop(host) => {
                model.running.remove(host);
            }
            Transition::Remove(host) => {
                model.running.remove(host);
                model.removed.insert(*host);
                model.prefixes.remove(host);
            }
            Transition::Announce(host, set) => {
                model.prefixes.insert(*host, set.clone());
            }
            Transition::Rough(rough) => model.rough = *rough,
            Transition::Calm => model.rough = false,
            Transition::Roam(_)
            | Transition::Cut(..)
            | Transition::Isolate(_)
            | Transition::Controller(_)
            | Transition::FlushNats
            | Transition::Pass(_) => {}
        }
        model
    }
}

impl Model {
    /// Returns whether two hosts can connect without a relay: one is public, or both share a LAN.
    fn connects(&self, a: HostId, b: HostId) -> bool {
        let (a, b) = (self.places[a], self.places[b]);
        a == Place::Public || b == Place::Public || a == b
    }

    fn pairs(&self) -> Vec<(HostId, HostId)> {
        let running: Vec<_> = self.running.iter().copied().collect();
        let pairs = running.iter().flat_map(|a| running.iter().map(|b| (*a, *b)));
        pairs.filter(|(a, b)| a != b && self.connects(*a, *b)).collect()
    }
}

struct World {
    sim: Sim,
    /// Receives the same calls at another instant of the machine's clock.
    twin: Sim,
    roamed: u8,
}

struct MeshTest;

impl StateMachineTest for MeshTest {
    type SystemUnderTest = World;
    type Reference = Model;

    fn init_test(model: &Model) -> World {
        let mut sim = place_hosts(model);
        let mut twin = place_hosts(model);
        let mut roamed = 10;
        for (host, place) in model.places.iter().enumerate() {
            roamed += 1;
            assert_eq!(sim.add_host(&[address(*place, roamed)]), host);
            twin.add_host(&[address(*place, roamed)]);
        }
        World { sim, twin, roamed }
    }

    fn apply(mut world: World, model: &Model, transition: Transition) -> World {
        world.roamed += 1;
        disturb(&mut world.sim, model, &transition, world.roamed);
        disturb(&mut world.twin, model, &transition, world.roamed);
        assert_eq!(world.sim.trace(), world.twin.trace(), "only the seed decides");
        world
    }

    fn check_invariants(world: &World, model: &Model) {
        for (number, host) in world.sim.hosts.iter().enumerate() {
            let Some(agent) = &host.agent else { continue };
            check_table(&world.sim, number);
            check_guards(&world.sim, number);
            // Absence never removes a peer: every node in the cache is one.
            let peers: BTreeSet<_> = agent.mesh.peers().map(|peer| peer.node.id()).collect();
            let cached: BTreeSet<_> =
                host.cache.keys().copied().filter(|id| *id != host.id()).collect();
            assert_eq!(peers, cached);
            for removed in host.tombstones.keys() {
                assert!(!peers.contains(removed), "{removed} came back");
            }
        }
        check_sending(&world.sim);
        if model.calm {
            for (a, b) in model.pairs() {
                assert!(world.sim.is_up(a, b), "{a} to {b}");
            }
        }
    }

    fn teardown(mut world: World, model: Model) {
        calm(&mut world.sim, &model);
    }
}

prop_state_machine! {
    #![proptest_config(search())]

    #[test]
    fn whatever_happens_the_mesh_stays_whole(sequential 5..30 => MeshTest);
}

/// Returns a configuration that runs the same cases each time, so that a build does not fail by
/// chance. Set `PROPTEST_RNG_SEED` and `PROPTEST_CASES` to run other and more cases.
fn search() -> ProptestConfig {
    let mut config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(1);
    }
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 200;
    }
    config
}

fn place_hosts(model: &Model) -> Sim {
    let mut sim = Sim::new(model.seed, CALM);
    assert_eq!(nat(&mut sim, Behaviour::PORT_RESTRICTED, [198, 51, 100, 1].into()), HOME);
    assert_eq!(nat(&mut sim, Behaviour::SYMMETRIC, [198, 51, 100, 2].into()), OFFICE);
    sim
}

fn disturb(sim: &mut Sim, model: &Model, transition: &Transition, roamed: u8) {
    match transition {
        Transition::Start(host, clock) => {
            sim.stop(*host);
            sim.hosts[*host].clock_offset = *clock;
            sim.start(*host);
        }
        Transition::Stop(host) => sim.stop(*host),
        Transition::Remove(host) => sim.remove(*host),
        Transition::Announce(host, set) => {
            sim.set_prefixes(*host, set.iter().map(|n| pod_cidr(*n)).collect());
        }
        Transition::Roam(host) => sim.readdress(*host, &[address(model.places[*host], roamed)]),
        Transition::Cut(a, b) => {
            sim.net.cuts.insert((*a, *b));
        }
        Transition::Isolate(host) => {
            for other in 0..sim.hosts.len() {
                sim.net.cuts.extend([(*host, other), (other, *host)]);
            }
            sim.set_reachable(*host, false);
        }
        Transition::Controller(up) => sim.set_controller(*up),
        Transition::FlushNats => sim.net.flush_nats(),
        Transition::Rough(rough) => sim.net.conditions = if *rough { ROUGH } else { CALM },
        Transition::Pass(time) => sim.run(*time),
        Transition::Calm => calm(sim, model),
    }
    sim.run(Duration::from_millis(100));
}

/// Ends everything that disturbs the mesh; then every pair that can connect must do so, and carry
/// packets in both directions.
fn calm(sim: &mut Sim, model: &Model) {
    sim.net.cuts.clear();
    sim.net.conditions = CALM;
    sim.set_controller(true);
    for host in 0..sim.hosts.len() {
        sim.set_reachable(host, true);
    }
    let pairs = model.pairs();
    let all_up = |sim: &Sim| pairs.iter().all(|(a, b)| sim.is_up(*a, *b));
    if !sim.run_until(BUDGET, all_up) {
        for (a, b) in &pairs {
            let mesh = &sim.hosts[*a].agent.as_ref().unwrap().mesh;
            let peer = mesh.peer(sim.hosts[*b].id());
            println!("{a} to {b}: {:?}", peer.map(|peer| (peer.state, peer.reason)));
        }
        panic!("not every pair is up {BUDGET:?} after the last disturbance");
    }
    // A path that has just failed may still count as up: a dead path is noticed within three
    // seconds.
    sim.run(Duration::from_secs(4));
    assert!(sim.run_until(BUDGET, all_up), "a pair went down again");
    for (a, b) in pairs {
        // A node that lost the one message that confirms a session keeps sending in the previous
        // session, until WireGuard notices after 15 s that nothing comes back.
        if !echoes(sim, a, b) {
            sim.run(Duration::from_secs(15));
            echo(sim, a, b);
        }
    }
}

// Invariants

/// Asserts that no prefix has two peers, that no prefix is the node's own, and that no removed node
/// is a peer.
fn check_table(sim: &Sim, host: HostId) {
    let host = &sim.hosts[host];
    let Some(agent) = &host.agent else { return };
    let mut seen: BTreeMap<IpNet, _> = BTreeMap::new();
    for (key, entry) in &agent.table.as_ref().unwrap().peers {
        for prefix in &entry.prefixes {
            let other = seen.insert(*prefix, *key);
            assert!(other.is_none(), "{prefix} under {key} and {other:?}");
        }
    }
    for own in host.prefixes.iter().copied().chain(host.grant.overlay.prefixes()) {
        assert!(!seen.contains_key(&own), "{own} is the node's own prefix");
    }
}

/// Asserts that every prefix that leads into the tunnel is guarded, and that the mesh's own ranges
/// always are.
fn check_guards(sim: &Sim, host: HostId) {
    let host = &sim.hosts[host];
    let Some(agent) = &host.agent else { return };
    let plan = agent.plan.as_ref().unwrap();
    let unreachable: Vec<IpNet> = plan
        .routes
        .keys()
        .filter(|(_, via)| *via == RouteVia::Unreachable)
        .map(|(net, _)| *net)
        .collect();
    let guarded = |net: &IpNet| {
        unreachable.iter().any(|guard| guard.contains(net))
            && plan.firewall.guarded.iter().any(|guard| guard.contains(net))
    };
    let linked = plan.routes.keys().filter(|(_, via)| *via == RouteVia::Link);
    for (net, _) in linked {
        assert!(guarded(net), "{net} leaves in clear without the link");
    }
    let overlay: OverlayAddresses = host.grant.overlay;
    assert!(overlay.prefixes().all(|net| guarded(&net)));
    for n in 0..=u8::MAX {
        let pods = pod_cidr(n);
        assert!(guarded(&pods) != host.prefixes.contains(&pods), "{pods}");
    }
}

fn check_sending(sim: &Sim) {
    let bound = STORM * u32::try_from(sim.hosts.len()).unwrap();
    for (number, host) in sim.hosts.iter().enumerate() {
        for (second, sent) in &host.sent {
            assert!(*sent <= bound, "host {number} sent {sent} datagrams in second {second}");
        }
    }
}

fn echo(sim: &mut Sim, from: HostId, to: HostId) {
    assert!(echoes(sim, from, to), "no echo from {to} to {from} at {:?}", sim.elapsed());
}

/// Returns whether an inner packet and its echo get through. The first packets may be lost in a
/// session that the other side has dropped.
fn echoes(sim: &mut Sim, from: HostId, to: HostId) -> bool {
    (0..5).any(|_| {
        let number = sim.send_inner(from, to);
        sim.run_until(Duration::from_millis(300), |sim| sim.replied(from, number))
    })
}

// Simulated networks

/// Creates a cloud node with a public address and two workers behind their own NATs, all started.
fn datacenters(seed: u64) -> (Sim, [HostId; 3]) {
    let mut sim = Sim::new(seed, CALM);
    let first = nat(&mut sim, Behaviour::PORT_RESTRICTED, [198, 51, 100, 1].into());
    let second = nat(&mut sim, Behaviour::PORT_RESTRICTED, [198, 51, 100, 2].into());
    let hosts = [
        sim.add_host(&[(INTERNET, [203, 0, 113, 1].into())]),
        sim.add_host(&[(first, [192, 168, 1, 2].into())]),
        sim.add_host(&[(second, [192, 168, 1, 2].into())]),
    ];
    for host in hosts {
        sim.start(host);
    }
    (sim, hosts)
}

fn nat(sim: &mut Sim, behaviour: Behaviour, external: IpAddr) -> RealmId {
    let uplink = Uplink { nat: Nat::new(behaviour, external), blocks_udp: false };
    sim.net.add_realm(INTERNET, Some(uplink), None)
}

const HOME: RealmId = 1;
const OFFICE: RealmId = 2;

fn address(place: Place, last: u8) -> (RealmId, IpAddr) {
    match place {
        Place::Public => (INTERNET, [203, 0, 113, last].into()),
        Place::Home => (HOME, [192, 168, 1, last].into()),
        Place::Office => (OFFICE, [192, 168, 2, last].into()),
    }
}

fn pod_cidr(n: u8) -> IpNet {
    format!("10.244.{n}.0/24").parse().unwrap()
}

fn sent(sim: &Sim, host: HostId) -> u32 {
    sim.hosts[host].sent.values().sum()
}

/// Advances the virtual time, and returns the bytes of UDP payload that all hosts send meanwhile.
fn bytes_within(sim: &mut Sim, time: Duration) -> u64 {
    let before: u64 = sim.bytes_to.values().sum();
    sim.run(time);
    sim.bytes_to.values().sum::<u64>() - before
}

#[test]
fn the_simulated_mesh_has_room_for_its_hosts() {
    let mesh = host::mesh_config();
    let (sim, _) = datacenters(1);
    for host in &sim.hosts {
        assert!(mesh.overlay_v4.contains(&host.grant.overlay.v4));
        assert!(mesh.overlay_v6.contains(&host.grant.overlay.v6));
    }
}
