//! Tests of probes on the simulator, while somebody replays them, machines go back to earlier states,
//! and agents of both versions meet.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: the panic is the report

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use towline_core::mesh::PeerState;
use towline_core::path::Path;
use towline_proto::frame::ProbeVersion;
use towline_tests::sim::host::PORT;
use towline_tests::sim::nat::{Behaviour, Nat};
use towline_tests::sim::net::{Conditions, HostId, INTERNET, Uplink};
use towline_tests::sim::{Recorded, Redirection, Sim};

const CALM: Conditions =
    Conditions { latency: Duration::from_millis(10), jitter: Duration::ZERO, loss: 0.0 };
const ROUGH: Conditions =
    Conditions { latency: Duration::from_millis(20), jitter: Duration::from_millis(15), loss: 0.1 };

/// Creates two nodes with public addresses, of these versions, started.
fn pair(seed: u64, versions: [ProbeVersion; 2]) -> (Sim, [HostId; 2]) {
    let mut sim = Sim::new(seed, CALM);
    let hosts = [1, 2].map(|n| sim.add_host(&[(INTERNET, [203, 0, 113, n].into())]));
    for (host, version) in hosts.into_iter().zip(versions) {
        sim.hosts[host].probe_version = version;
        sim.start(host);
    }
    (sim, hosts)
}

/// Creates a relay, and two nodes that only it joins: their NATs map each destination to another port.
fn relayed(seed: u64) -> (Sim, HostId, [HostId; 2]) {
    let mut sim = Sim::new(seed, CALM);
    let relay = sim.add_host(&[(INTERNET, [203, 0, 113, 9].into())]);
    sim.hosts[relay].relay = true;
    let ends = [1, 2].map(|n| {
        let nat = Nat::new(Behaviour::SYMMETRIC, IpAddr::from([198, 51, 100, n]));
        let realm = sim.net.add_realm(INTERNET, Some(Uplink { nat, blocks_udp: false }), None);
        sim.add_host(&[(realm, [192, 168, n, 2].into())])
    });
    for host in [relay, ends[0], ends[1]] {
        sim.start(host);
    }
    (sim, relay, ends)
}

fn attacker() -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 66], 51_830))
}

fn is_connected(sim: &Sim, [a, b]: [HostId; 2]) -> bool {
    sim.is_up(a, b) && sim.is_up(b, a)
}

/// Returns whether an inner packet and its echo get through.
fn echoes(sim: &mut Sim, from: HostId, to: HostId) -> bool {
    (0..5).any(|_| {
        let number = sim.send_inner(from, to);
        sim.run_until(Duration::from_millis(300), |sim| sim.replied(from, number))
    })
}

/// Replays everything twice a second from the attacker's address. Returns the bytes that the attacker
/// sent and got, and the number of echoes of 20 that came back.
fn attack(sim: &mut Sim, recorded: &[Recorded], [a, b]: [HostId; 2]) -> (u64, u64, usize) {
    let got = |sim: &Sim| sim.bytes_to.get(&attacker()).copied().unwrap_or_default();
    let (before, mut sent, mut echoed) = (got(sim), 0, 0);
    for _ in 0..20 {
        for datagram in recorded {
            sim.replay(datagram, attacker());
            sent += u64::from(datagram.payload.size());
        }
        let number = sim.send_inner(a, b);
        sim.run(Duration::from_millis(500));
        echoed += usize::from(sim.replied(a, number));
    }
    (sent, got(sim) - before, echoed)
}

#[test]
fn recorded_probes_move_neither_a_path_nor_what_a_relay_forwards() {
    let (mut sim, _, ends) = relayed(1);
    sim.recorded = Some(Vec::new());
    assert!(sim.run_until(Duration::from_secs(10), |sim| is_connected(sim, ends)));
    assert!(echoes(&mut sim, ends[0], ends[1]));
    sim.run(Duration::from_secs(3));
    let recorded = sim.recorded.take().unwrap();
    sim.changes.clear();
    let (sent, got, echoed) = attack(&mut sim, &recorded, ends);
    assert_eq!(echoed, 20);
    assert!(got <= sent, "nothing is amplified: {got} bytes for {sent}");
    assert!(sim.changes.iter().all(|(_, _, _, to)| *to == PeerState::Up), "{:?}", sim.changes);
    // Nor do they after a restart of the relay, which has forgotten what it saw.
    sim.stop(0);
    sim.start(0);
    // The ends notice the restart and register again.
    assert!((0..20).any(|_| echoes(&mut sim, ends[0], ends[1])));
    let (sent, got, echoed) = attack(&mut sim, &recorded, ends);
    assert_eq!(echoed, 20);
    assert!(got <= sent, "{got} bytes for {sent}");
}

#[test]
fn recorded_probes_of_a_direct_pair_lead_nowhere_else() {
    let (mut sim, hosts) = pair(2, [ProbeVersion::V2; 2]);
    sim.recorded = Some(Vec::new());
    assert!(sim.run_until(Duration::from_secs(5), |sim| is_connected(sim, hosts)));
    sim.run(Duration::from_secs(3));
    let recorded = sim.recorded.take().unwrap();
    let (sent, got, echoed) = attack(&mut sim, &recorded, hosts);
    assert_eq!(echoed, 20);
    assert!(got <= sent, "{got} bytes for {sent}");
    for [own, other] in [hosts, [hosts[1], hosts[0]]] {
        let mesh = &sim.hosts[own].agent.as_ref().unwrap().mesh;
        let peer = sim.hosts[other].id();
        assert!(mesh.paths(peer).iter().all(|status| status.path.remote != attacker()));
    }
}

/// Returns the path of `own` to `other`.
fn path(sim: &Sim, own: HostId, other: HostId) -> Path {
    let mesh = &sim.hosts[own].agent.as_ref().unwrap().mesh;
    mesh.peer(sim.hosts[other].id()).unwrap().path.unwrap()
}

#[test]
fn replays_with_the_address_of_the_peer_cost_neither_the_path_nor_a_pong() {
    // Nodes with two addresses, so that there is another path to leave the flooded one for.
    let mut sim = Sim::new(6, CALM);
    let hosts = [1, 2].map(|n: u8| {
        let v6 = format!("2001:db8::{n}").parse().unwrap();
        sim.add_host(&[(INTERNET, [203, 0, 113, n].into()), (INTERNET, v6)])
    });
    sim.recorded = Some(Vec::new());
    for host in hosts {
        sim.start(host);
    }
    let pairs = [hosts, [hosts[1], hosts[0]]];
    assert!(sim.run_until(Duration::from_secs(5), |sim| is_connected(sim, hosts)));
    // Until the attempts to find a better path have ended.
    for _ in 0..20 {
        assert!(echoes(&mut sim, hosts[0], hosts[1]));
        sim.run(Duration::from_secs(1));
    }
    let recorded = sim.recorded.take().unwrap();
    for [own, other] in pairs {
        let (to_peer, peer) = (path(&sim, own, other), sim.hosts[other].id());
        let mesh = |sim: &Sim| {
            let mesh = &sim.hosts[own].agent.as_ref().unwrap().mesh;
            (mesh.history(peer), mesh.peer(peer).unwrap().loss)
        };
        let (before, theirs) = (mesh(&sim), path(&sim, other, own));
        let addresses = &sim.hosts[own].addresses;
        let is_of_path = |ip: &IpAddr| ip.is_ipv4() == to_peer.remote.is_ipv4();
        let at = addresses.iter().map(|(_, ip)| *ip).find(is_of_path).unwrap();
        let at = SocketAddr::new(at, PORT);
        let replays: Vec<_> = recorded
            .iter()
            .filter(|datagram| datagram.host == own)
            .map(|datagram| Recorded { at, ..datagram.clone() })
            .collect();
        assert!(replays.len() > 10, "{} probes were recorded", replays.len());
        // 1,000 replays per second, while both nodes ping each other.
        for round in 0..80 {
            for index in 0..100 {
                let datagram = &replays[(round * 100 + index) % replays.len()];
                sim.replay(datagram, to_peer.remote);
                sim.run(Duration::from_millis(1));
            }
            assert!(echoes(&mut sim, own, other), "round {round}");
        }
        let (history, loss) = mesh(&sim);
        assert_eq!(history, before.0, "the path moves");
        assert!(loss.is_some() && loss <= before.1, "pongs are lost: {:?}, {loss:?}", before.1);
        assert_eq!(path(&sim, other, own), theirs, "the path of the peer moves");
    }
}

#[test]
fn a_source_that_is_changed_on_the_way_gets_no_traffic() {
    for seed in 0..10 {
        let (mut sim, hosts) = pair(20 + seed, [ProbeVersion::V2; 2]);
        if seed % 2 == 0 {
            assert!(sim.run_until(Duration::from_secs(5), |sim| is_connected(sim, hosts)));
            sim.run(Duration::from_secs(3));
        }
        let [sender, receiver] = if seed % 4 < 2 { hosts } else { [hosts[1], hosts[0]] };
        let from = attacker();
        sim.redirection = Some(Redirection { sender, receiver, from, bytes: 0 });
        for _ in 0..100 {
            sim.send_inner(hosts[0], hosts[1]);
            sim.send_inner(hosts[1], hosts[0]);
            sim.run(Duration::from_millis(100));
            let came = sim.redirection.as_ref().unwrap().bytes;
            let got = sim.bytes_to.get(&attacker()).copied().unwrap_or_default();
            assert!(got <= 3 * came, "seed {seed}: {got} bytes for {came}");
            let mesh = &sim.hosts[receiver].agent.as_ref().unwrap().mesh;
            let endpoint = mesh.peer_table().and_then(|table| {
                table.peers.get(&sim.hosts[sender].key()).and_then(|entry| entry.endpoint)
            });
            let history = mesh.history(sim.hosts[sender].id());
            let endpoint = endpoint.map(|path| path.remote);
            assert_ne!(endpoint, Some(attacker()), "seed {seed}: {history:#?}");
        }
        sim.redirection = None;
        assert!(sim.run_until(Duration::from_secs(45), |sim| is_connected(sim, hosts)));
        assert!(echoes(&mut sim, hosts[0], hosts[1]) && echoes(&mut sim, hosts[1], hosts[0]));
    }
}

#[test]
fn a_snapshot_of_either_end_or_of_both_costs_no_path() {
    let (mut sim, hosts) = pair(3, [ProbeVersion::V2; 2]);
    assert!(sim.run_until(Duration::from_secs(5), |sim| is_connected(sim, hosts)));
    sim.run(Duration::from_secs(30));
    for restored in [vec![hosts[0]], vec![hosts[1]], hosts.to_vec()] {
        sim.changes.clear();
        for host in &restored {
            sim.hosts[*host].agent.as_mut().unwrap().probes.restore_snapshot();
        }
        for _ in 0..20 {
            assert!(echoes(&mut sim, hosts[0], hosts[1]));
            sim.run(Duration::from_millis(200));
        }
        assert!(sim.changes.is_empty(), "{restored:?}: {:?}", sim.changes);
    }
}

#[test]
fn a_boot_epoch_that_goes_back_or_stays_locks_nobody_out() {
    let (mut sim, hosts) = pair(4, [ProbeVersion::V2; 2]);
    assert!(sim.run_until(Duration::from_secs(5), |sim| is_connected(sim, hosts)));
    // Both restart at once in the last round, with the epochs of their first start.
    for (restarted, epochs) in [(vec![0], 1), (vec![1], 1), (vec![0], 3), (vec![0, 1], 9)] {
        sim.run(Duration::from_secs(5));
        for number in &restarted {
            sim.stop(hosts[*number]);
            sim.hosts[hosts[*number]].set_back(epochs);
        }
        sim.run(Duration::from_secs(1));
        for number in &restarted {
            sim.start(hosts[*number]);
        }
        let is_back = sim.run_until(Duration::from_secs(10), |sim| is_connected(sim, hosts));
        assert!(is_back, "{restarted:?} {epochs}");
        assert!(echoes(&mut sim, hosts[0], hosts[1]) && echoes(&mut sim, hosts[1], hosts[0]));
        let rtt = |own: usize| {
            let mesh = &sim.hosts[hosts[own]].agent.as_ref().unwrap().mesh;
            mesh.peer(sim.hosts[hosts[1 - own]].id()).unwrap().rtt
        };
        assert!(rtt(0).is_some() && rtt(1).is_some(), "pongs come in both directions");
    }
}

#[test]
fn agents_of_both_versions_meet_and_an_upgrade_ends_version_1() {
    use ProbeVersion::{V1, V2};
    for versions in [[V1, V2], [V2, V1], [V1, V1]] {
        let (mut sim, hosts) = pair(5, versions);
        sim.net.conditions = ROUGH;
        sim.recorded = Some(Vec::new());
        assert!(sim.run_until(Duration::from_secs(10), |sim| is_connected(sim, hosts)));
        sim.run(Duration::from_secs(5));
        assert!(echoes(&mut sim, hosts[0], hosts[1]) && echoes(&mut sim, hosts[1], hosts[0]));
        let recorded = sim.recorded.take().unwrap();
        for host in hosts {
            sim.stop(host);
            sim.hosts[host].probe_version = V2;
            sim.start(host);
        }
        assert!(sim.run_until(Duration::from_secs(10), |sim| is_connected(sim, hosts)));
        sim.run(Duration::from_secs(5));
        sim.net.conditions = CALM;
        let (_, got, echoed) = attack(&mut sim, &recorded, hosts);
        assert_eq!((got, echoed), (0, 20), "{versions:?}: version 1 is not answered any more");
    }
}
