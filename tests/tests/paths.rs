//! Tests every pair of network types on the simulator: a path is found, in time, and of the best
//! kind that the two types allow.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: the panic is the report
#![expect(clippy::print_stdout, reason = "the output of a test")]

use std::net::IpAddr;
use std::time::Duration;

use towline_core::mesh::PeerState;
use towline_core::reason::PeerReason;
use towline_tests::sim::Sim;
use towline_tests::sim::evil_relay::{EvilRelay, Misdeed};
use towline_tests::sim::nat::{Behaviour, Nat};
use towline_tests::sim::net::{Conditions, HostId, INTERNET, RealmId, Uplink};

/// Conditions of the lab's links without added delay.
const BARE: Conditions =
    Conditions { latency: Duration::from_millis(1), jitter: Duration::ZERO, loss: 0.0 };
/// Conditions of a long link: a round-trip time of 40 ms, and 1 % loss.
const FAR: Conditions =
    Conditions { latency: Duration::from_millis(10), jitter: Duration::from_millis(2), loss: 0.01 };
/// Conditions of a bad link: 20 % loss, and reordering.
const AWFUL: Conditions =
    Conditions { latency: Duration::from_millis(10), jitter: Duration::from_millis(30), loss: 0.2 };

/// Network type of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Open,
    FullCone,
    Restricted,
    PortRestricted,
    Symmetric,
    SymmetricRandom,
    /// A home router behind a carrier's NAT.
    Carrier,
    Blocked,
}

const PLACES: [Place; 8] = [
    Place::Open,
    Place::FullCone,
    Place::Restricted,
    Place::PortRestricted,
    Place::Symmetric,
    Place::SymmetricRandom,
    Place::Carrier,
    Place::Blocked,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
    Dual,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Direct,
    Relay,
    None,
}

/// Returns the best kind of path that two network types allow.
fn expected(a: Place, b: Place, family: Family) -> Kind {
    use Place::{Blocked, Carrier, PortRestricted, Symmetric, SymmetricRandom};
    let symmetric = |place| matches!(place, Symmetric | SymmetricRandom);
    let strict = |place| symmetric(place) || matches!(place, PortRestricted | Carrier);
    if a == Blocked || b == Blocked {
        Kind::None
    } else if family == Family::V4 && (symmetric(a) && strict(b) || symmetric(b) && strict(a)) {
        Kind::Relay
    } else {
        // Over IPv6 the device is a firewall: addresses do not change, so both nodes can learn
        // them.
        Kind::Direct
    }
}

fn behaviour(place: Place) -> Behaviour {
    match place {
        Place::Open | Place::FullCone => Behaviour::FULL_CONE,
        Place::Restricted => Behaviour::RESTRICTED,
        Place::PortRestricted | Place::Carrier | Place::Blocked => Behaviour::PORT_RESTRICTED,
        Place::Symmetric => Behaviour::SYMMETRIC,
        Place::SymmetricRandom => Behaviour::SYMMETRIC_RANDOM,
    }
}

fn uplink(place: Place, family: Family, external: IpAddr) -> Uplink {
    let nat = match family {
        Family::V6 => Nat::firewall(behaviour(place)),
        Family::V4 | Family::Dual => Nat::new(behaviour(place), external),
    };
    Uplink { nat, blocks_udp: place == Place::Blocked }
}

/// Adds a host of a network type; its addresses are derived from `n`.
fn stand(sim: &mut Sim, place: Place, family: Family, n: u8) -> HostId {
    let v4 = family != Family::V6;
    let v6 = family != Family::V4;
    let public: [IpAddr; 2] =
        [[203, 0, 113, n].into(), format!("2001:db8:{n}::1").parse().unwrap()];
    let private: [IpAddr; 2] =
        [[192, 168, n, 2].into(), format!("2001:db8:{n}::2").parse().unwrap()];
    let of_family = |addresses: [IpAddr; 2], realm: RealmId| {
        let [four, six] = addresses;
        let mut list = Vec::new();
        if v4 {
            list.push((realm, four));
        }
        if v6 {
            list.push((realm, six));
        }
        list
    };
    if place == Place::Open {
        return sim.add_host(&of_family(public, INTERNET));
    }
    let mut outer = INTERNET;
    let mut external = public[0];
    if place == Place::Carrier {
        let carrier = v4.then(|| uplink(place, Family::V4, public[0]));
        // A carrier translates only IPv4.
        let open =
            v6.then(|| Uplink { nat: Nat::firewall(Behaviour::FULL_CONE), blocks_udp: false });
        outer = sim.net.add_realm(INTERNET, carrier, open);
        external = [100, 64, n, 1].into();
    }
    let four = v4.then(|| uplink(place, Family::V4, external));
    let six = v6.then(|| uplink(place, Family::V6, external));
    let realm = sim.net.add_realm(outer, four, six);
    sim.add_host(&of_family(private, realm))
}

/// A simulation with two running relays and a pair of hosts, whose agents
/// [`Self::first_packet`] starts.
struct Pair {
    sim: Sim,
    relays: [HostId; 2],
    a: HostId,
    b: HostId,
}

impl Pair {
    fn new(seed: u64, conditions: Conditions, a: (Place, Family), b: (Place, Family)) -> Self {
        let mut sim = Sim::new(seed, conditions);
        let relays = [200, 201].map(|n| {
            let relay = stand(&mut sim, Place::Open, Family::Dual, n);
            sim.hosts[relay].relay = true;
            sim.start(relay);
            relay
        });
        let first = stand(&mut sim, a.0, a.1, 1);
        let second = stand(&mut sim, b.0, b.1, 2);
        Self { sim, relays, a: first, b: second }
    }

    /// Starts `a`, and `b` shortly afterwards. Returns the time from when both have the other's
    /// record until the first inner packet is answered, if it is.
    fn first_packet(&mut self) -> Option<Duration> {
        self.sim.run(Duration::from_secs(2));
        self.sim.start(self.a);
        self.sim.run(Duration::from_secs(2));
        self.sim.start(self.b);
        let (a, b) = (self.a, self.b);
        let knows =
            |sim: &Sim, x: HostId, y: HostId| sim.hosts[x].peer_state(sim.hosts[y].id()).is_some();
        assert!(
            self.sim.run_until(Duration::from_secs(5), |sim| knows(sim, a, b) && knows(sim, b, a))
        );
        self.answered_within(Duration::from_secs(10))
    }

    /// Sends inner packets from `a` until one is answered, and returns how long that took.
    fn answered_within(&mut self, time: Duration) -> Option<Duration> {
        let (since, a) = (self.sim.elapsed(), self.a);
        let mut packets = Vec::new();
        while self.sim.elapsed() < since + time {
            packets.push(self.sim.send_inner(a, self.b));
            let any = |sim: &Sim| packets.iter().any(|packet| sim.replied(a, *packet));
            if self.sim.run_until(Duration::from_millis(50), any) {
                return Some(self.sim.elapsed() - since);
            }
        }
        None
    }

    /// Sends inner packets in both directions every 100 ms for `time`, and returns the longest gap
    /// at `a`.
    fn traffic(&mut self, time: Duration) -> Duration {
        let end = self.sim.elapsed() + time;
        let (mut gap, mut last) = (Duration::ZERO, self.sim.elapsed());
        let mut sent = std::collections::VecDeque::new();
        while self.sim.elapsed() < end {
            sent.push_back(self.sim.send_inner(self.a, self.b));
            self.sim.run(Duration::from_millis(50));
            self.sim.send_inner(self.b, self.a);
            self.sim.run(Duration::from_millis(50));
            let newest = sent.iter().rposition(|packet| self.sim.replied(self.a, *packet));
            if let Some(newest) = newest {
                sent.drain(..=newest);
                last = self.sim.elapsed();
            }
            gap = gap.max(self.sim.elapsed() - last);
        }
        gap
    }

    fn kind(&self, from: HostId, to: HostId) -> Kind {
        let mesh = &self.sim.hosts[from].agent.as_ref().unwrap().mesh;
        match mesh.peer(self.sim.hosts[to].id()).unwrap().path {
            None => Kind::None,
            Some(path) if path.is_relayed() => Kind::Relay,
            Some(_) => Kind::Direct,
        }
    }

    fn kinds(&self) -> [Kind; 2] {
        [self.kind(self.a, self.b), self.kind(self.b, self.a)]
    }
}

fn grid(conditions: Conditions, median: Duration, worst: Duration, settled: Duration) {
    let mut times = Vec::new();
    let mut failed = Vec::new();
    let mut seed = 0;
    for family in [Family::V4, Family::V6, Family::Dual] {
        for (i, a) in PLACES.into_iter().enumerate() {
            for b in PLACES.into_iter().skip(i) {
                seed += 1;
                let mut pair = Pair::new(seed, conditions, (a, family), (b, family));
                let first = pair.first_packet();
                let expected = expected(a, b, family);
                if expected == Kind::None {
                    pair.sim.run(Duration::from_secs(30));
                    if first.is_some() || !pair.blocked_says_so(a, b) {
                        failed.push(format!("{a:?} {b:?} {family:?}: blocked, {first:?}"));
                    }
                    continue;
                }
                let good = |kinds| kinds == [expected; 2] || kinds == [Kind::Direct; 2];
                let settled = pair.sim.elapsed() + settled;
                while !good(pair.kinds()) && pair.sim.elapsed() < settled {
                    pair.traffic(Duration::from_millis(500));
                }
                let kinds = pair.kinds();
                let best = good(kinds);
                if first.is_none_or(|first| first > worst) || !best {
                    failed.push(format!(
                        "{a:?} {b:?} {family:?}: {first:?} {kinds:?}, expected {expected:?}"
                    ));
                }
                times.extend(first);
            }
        }
    }
    times.sort_unstable();
    println!(
        "{} pairs, median {:?}, 90 % {:?}, worst {:?}",
        times.len(),
        times[times.len() / 2],
        times[times.len() * 9 / 10],
        times.last()
    );
    assert!(failed.is_empty(), "{}\n{failed:#?}", failed.len());
    assert!(times[times.len() / 2] < median);
}

impl Pair {
    fn blocked_says_so(&self, a: Place, b: Place) -> bool {
        let blocked = if a == Place::Blocked { self.a } else { self.b };
        let other = if blocked == self.a { self.b } else { self.a };
        let _ = b;
        let mesh = &self.sim.hosts[blocked].agent.as_ref().unwrap().mesh;
        let status = mesh.peer(self.sim.hosts[other].id()).unwrap();
        matches!(status.reason, Some(PeerReason::UdpBlocked(_))) && status.state == PeerState::Down
    }
}

#[test]
fn every_pair_connects_at_once_on_bare_links_by_the_best_path_that_there_is() {
    grid(BARE, Duration::from_millis(150), Duration::from_secs(2), Duration::from_secs(5));
}

#[test]
fn every_pair_connects_within_half_a_second_over_far_links_that_lose() {
    grid(FAR, Duration::from_millis(500), Duration::from_secs(2), Duration::from_secs(5));
}

#[test]
fn every_pair_connects_though_one_in_five_datagrams_is_lost() {
    grid(AWFUL, Duration::from_secs(2), Duration::from_secs(10), Duration::from_secs(20));
}

#[test]
fn a_dead_direction_or_a_forgotten_nat_costs_less_than_three_seconds() {
    for (n, what) in ["in", "out", "flush", "relay"].into_iter().enumerate() {
        let (place, family) = (Place::PortRestricted, Family::V4);
        let other = if what == "relay" { Place::Symmetric } else { place };
        let mut pair = Pair::new(50 + n as u64, FAR, (place, family), (other, family));
        pair.first_packet().unwrap();
        pair.traffic(Duration::from_secs(8));
        let (a, b) = (pair.a, pair.b);
        match what {
            "in" => drop(pair.sim.net.cuts.insert((b, a))),
            "out" => drop(pair.sim.net.cuts.insert((a, b))),
            "flush" => pair.sim.net.flush_nats(),
            _ => {
                let mesh = &pair.sim.hosts[a].agent.as_ref().unwrap().mesh;
                let relay = mesh.peer(pair.sim.hosts[b].id()).unwrap().relay.unwrap();
                let used = pair.relays.into_iter().find(|r| pair.sim.hosts[*r].grant.name == relay);
                pair.sim.stop(used.unwrap());
            }
        }
        let gap = pair.traffic(Duration::from_secs(8));
        println!("{what}: {gap:?}");
        assert!(gap < Duration::from_secs(3), "{what}: {gap:?}");
    }
}

/// Nodes behind routers of which some only masquerade, a public node, and no relay: all of them are up
/// with each other soon after they started, at once or one after the other.
#[test]
fn routers_that_take_unexpected_datagrams_for_their_own_keep_no_nodes_apart() {
    const LIMIT: Duration = Duration::from_secs(3);
    let (open, filtered) = (Behaviour::UNFILTERED, Behaviour::PORT_RESTRICTED);
    let meshes = [vec![open, open], vec![open, filtered], vec![filtered, open], vec![open; 4]];
    for seed in 0..24 {
        for (number, routers) in meshes.iter().enumerate() {
            for pause in [Duration::ZERO, Duration::from_millis(70), Duration::from_secs(2)] {
                let conditions = if seed % 2 == 0 { BARE } else { FAR };
                let mut sim = Sim::new(900 + seed, conditions);
                for n in [200, 201] {
                    let reflector = stand(&mut sim, Place::Open, Family::V4, n);
                    sim.start(reflector);
                }
                sim.run(Duration::from_secs(2));
                let mut hosts = Vec::new();
                for (n, router) in (1..).zip(routers) {
                    let nat = Nat::new(*router, [203, 0, 113, n].into());
                    let uplink = Uplink { nat, blocks_udp: false };
                    let realm = sim.net.add_realm(INTERNET, Some(uplink), None);
                    let host = sim.add_host(&[(realm, [192, 168, n, 2].into())]);
                    sim.start(host);
                    sim.run(pause);
                    hosts.push(host);
                }
                let all_up = |sim: &Sim| {
                    hosts.iter().all(|a| hosts.iter().all(|b| a == b || sim.is_up(*a, *b)))
                };
                let began = sim.elapsed();
                let is_up = sim.run_until(LIMIT, all_up);
                println!("seed {seed}, mesh {number}, {pause:?}: {:?}", sim.elapsed() - began);
                assert!(is_up, "seed {seed}, mesh {number}, {pause:?}");
            }
        }
    }
}

/// A NAT that keeps its mappings while nothing passes through them: retries on the same port would
/// keep them in use.
#[test]
fn a_nat_whose_mappings_are_stuck_gets_datagrams_from_another_port() {
    for (seed, other) in [Place::Open].into_iter().enumerate() {
        let place = Place::PortRestricted;
        let pair = (place, Family::V4);
        let mut pair = Pair::new(950 + seed as u64, FAR, pair, (other, Family::V4));
        pair.first_packet().unwrap();
        pair.traffic(Duration::from_secs(5));
        let realm = pair.sim.hosts[pair.a].addresses[0].0;
        for round in 0..2 {
            pair.sim.net.uplinks(realm).for_each(|uplink| uplink.nat.jam());
            let gap = pair.traffic(Duration::from_secs(90));
            println!("{other:?}, round {round}: {gap:?}");
            assert!(gap < Duration::from_secs(50), "{other:?}, round {round}: {gap:?}");
            let mesh = &pair.sim.hosts[pair.a].agent.as_ref().unwrap().mesh;
            assert_eq!(mesh.second_port().is_some(), round == 0, "the ports take turns");
        }
    }
}

/// A firewall that drops what leaves from the configured port. What the peer sends still arrives, which is no
/// answer.
#[test]
fn a_port_from_which_nothing_leaves_is_replaced_though_the_peer_is_heard() {
    let (place, family) = (Place::PortRestricted, Family::V4);
    let mut pair = Pair::new(960, FAR, (place, family), (Place::Open, family));
    pair.first_packet().unwrap();
    pair.traffic(Duration::from_secs(5));
    pair.sim.dropped = Some((pair.a, towline_tests::sim::host::PORT));
    let gap = pair.traffic(Duration::from_secs(150));
    let mesh = &pair.sim.hosts[pair.a].agent.as_ref().unwrap().mesh;
    assert!(mesh.second_port().is_some(), "{gap:?}");
    assert!(gap < Duration::from_secs(100), "{gap:?}");
}

#[test]
fn a_clock_that_jumps_while_the_agents_run_interrupts_nothing() {
    for (seed, jump) in [3_600, -3_600].into_iter().enumerate() {
        for both in [false, true] {
            let (place, family) = (Place::PortRestricted, Family::V4);
            let mut pair = Pair::new(970 + seed as u64, FAR, (place, family), (place, family));
            pair.first_packet().unwrap();
            pair.traffic(Duration::from_secs(5));
            pair.sim.hosts[pair.a].clock_offset = jump;
            if both {
                pair.sim.hosts[pair.b].clock_offset = -jump;
            }
            // Several sessions long.
            let gap = pair.traffic(Duration::from_secs(500));
            println!("{jump} s, both {both}: {gap:?}");
            assert!(gap < Duration::from_secs(1), "{jump} s, both {both}: {gap:?}");
        }
    }
}

#[test]
fn an_evil_relay_cuts_nobody_off_that_has_another_one_or_a_direct_path() {
    for (n, misdeed) in Misdeed::ALL.into_iter().enumerate() {
        for (other, kind) in [(Place::Symmetric, Kind::Relay), (Place::Open, Kind::Direct)] {
            let (place, family) = (Place::PortRestricted, Family::V4);
            let seed = 120 + 2 * n as u64 + u64::from(kind == Kind::Relay);
            let mut pair = Pair::new(seed, FAR, (place, family), (other, family));
            pair.first_packet().unwrap();
            pair.traffic(Duration::from_secs(8));
            assert_eq!(pair.kinds(), [kind; 2]);
            // The relay in use turns evil, or any.
            let mesh = &pair.sim.hosts[pair.a].agent.as_ref().unwrap().mesh;
            let used = mesh.peer(pair.sim.hosts[pair.b].id()).unwrap().relay;
            let is_used = |relay: &HostId| {
                used.as_ref().is_none_or(|used| pair.sim.hosts[*relay].grant.name == *used)
            };
            let evil = pair.relays.into_iter().find(is_used).unwrap();
            pair.sim.hosts[evil].evil = Some(EvilRelay::new(misdeed));
            let gap = pair.traffic(Duration::from_secs(60));
            println!("{misdeed:?}, {kind:?}: {gap:?}");
            assert!(gap < Duration::from_secs(5), "{misdeed:?}, {kind:?}: {gap:?}");
            assert_eq!(pair.kinds(), [kind; 2], "{misdeed:?}");
        }
    }
}

#[test]
fn another_address_is_told_at_once() {
    for controller in [true, false] {
        let (place, family) = (Place::PortRestricted, Family::V4);
        let mut pair = Pair::new(60, FAR, (Place::Open, family), (place, family));
        pair.first_packet().unwrap();
        pair.traffic(Duration::from_secs(5));
        pair.sim.set_controller(controller);
        pair.sim.readdress(pair.a, &[(INTERNET, [203, 0, 113, 99].into())]);
        let gap = pair.traffic(Duration::from_secs(5));
        println!("controller {controller}: {gap:?}");
        assert!(gap < Duration::from_secs(1), "{gap:?}");
    }
}

#[test]
fn an_uplink_that_goes_down_costs_less_than_half_a_second_whatever_the_other_nat_forgot() {
    for seed in 0..20 {
        let (controller, quiet) = (seed % 2 == 0, seed % 4 < 2);
        let mut sim = Sim::new(80 + seed, FAR);
        let relay = stand(&mut sim, Place::Open, Family::Dual, 200);
        sim.hosts[relay].relay = true;
        sim.start(relay);
        let uplinks = [1, 3].map(|n| {
            let nat = uplink(Place::PortRestricted, Family::V4, [203, 0, 113, n].into());
            let realm = sim.net.add_realm(INTERNET, Some(nat), None);
            (realm, IpAddr::from([192, 168, n, 2]))
        });
        let a = sim.add_host(&uplinks);
        let b = stand(&mut sim, Place::PortRestricted, Family::V4, 2);
        let mut pair = Pair { sim, relays: [relay, relay], a, b };
        pair.first_packet().unwrap();
        pair.traffic(Duration::from_secs(10));
        if quiet {
            // NAT mappings expire, except those in use.
            pair.traffic(Duration::from_secs(300));
        }
        assert_eq!(pair.kinds(), [Kind::Direct; 2]);
        let mesh = &pair.sim.hosts[a].agent.as_ref().unwrap().mesh;
        let path = mesh.peer(pair.sim.hosts[b].id()).unwrap().path.unwrap();
        let left = uplinks.into_iter().find(|(_, ip)| *ip != path.local.unwrap().address);
        pair.sim.set_controller(controller);
        pair.sim.readdress(a, &[left.unwrap()]);
        let gap = pair.traffic(Duration::from_secs(5));
        println!("controller {controller}, quiet {quiet}: {gap:?}");
        assert!(gap < Duration::from_millis(500), "{gap:?}");
    }
}

#[test]
fn an_idle_pair_behind_nats_is_woken_also_while_the_controller_is_away() {
    for (n, other) in [Place::PortRestricted, Place::Symmetric].into_iter().enumerate() {
        let family = Family::V4;
        let mut pair =
            Pair::new(70 + n as u64, FAR, (Place::PortRestricted, family), (other, family));
        pair.first_packet().unwrap();
        pair.sim.set_controller(false);
        pair.sim.run(Duration::from_secs(1_800));
        let woken = pair.answered_within(Duration::from_secs(3));
        println!("{other:?}: woken in {woken:?}");
        assert!(woken.is_some());
    }
}
