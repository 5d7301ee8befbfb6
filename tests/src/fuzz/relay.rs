//! Fuzzes this node's relay: requests of nodes, answers to its challenges, time, and datagrams on
//! its channels, as the bytes select.
//!
//! Nothing is forwarded to an address that did not answer a ping, every channel has two nodes of the
//! mesh as its ends and no two channels have the same, and what one request costs is bounded.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use towline_core::mesh::{MapChange, Mesh, Output};
use towline_core::path::{Path, Source};
use towline_dataplane::internals::{Forward, Forwarding};
use towline_fixtures::node::{record, tombstone_of};
use towline_proto::frame::{Probe, ProbeVersion};
use towline_proto::id::WireguardKey;
use towline_proto::node::{Node, Record};

use super::{EPOCH, Input};
use crate::sim::host::{self, Host};

/// Datagrams that one call costs: a challenge and an announcement, each twice, and an answer.
const COST: usize = 5;

/// Runs the relay on one input; see the module's documentation.
pub fn relay(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut now = *EPOCH;
    let mut own = Host::new(1, 1, host::mesh_config());
    own.relay = true;
    let mut mesh = own.core(now);
    let mut plane = Plane::default();
    let mut members = BTreeSet::new();
    for number in 2..=5 {
        mesh.handle_map_change(now, MapChange::Upsert(Box::new(node(number))));
        members.insert(key(number));
    }
    let (mut calls, mut transaction) = (0, 0);
    while let Some(what) = input.byte() {
        calls += 1;
        transaction += 1;
        let (number, from) = (input.host(), Path::from(input.address()));
        // Those with an even number have version 1, in which nothing is proven.
        let source = Some(Source { path: from, is_validated: number % 2 == 1 });
        match what % 8 {
            0..=3 if number % 2 == 1 && !plane.proven.contains(&from.remote) => {
                // A request of version 2 is delivered only from an address that is proven.
                plane.proven.insert(from.remote);
            }
            0 | 1 => {
                mesh.handle_message(now, key(number), source, Probe::Register { transaction });
            }
            2 | 3 => {
                let open = Probe::Open { transaction, peer: input.key() };
                mesh.handle_message(now, key(number), source, open);
            }
            4 => {
                if let Some((peer, at, transaction)) = plane.pings.pop() {
                    let pong = Probe::Pong { transaction, observed: at.remote };
                    let source = Source { path: at, is_validated: false };
                    mesh.handle_message(now, peer, Some(source), pong);
                    plane.proven.insert(at.remote);
                }
            }
            5 => {
                let pong = Probe::Pong { transaction, observed: from.remote };
                mesh.handle_message(now, key(number), source, pong);
            }
            6 => {
                let number = usize::from(input.byte().unwrap_or(0));
                let channel = plane.channels.get(number % plane.channels.len().max(1));
                let channel = channel.copied().unwrap_or(0);
                if let Forward::To(to) = plane.forwarding.forward(now, &from, channel, 1_400) {
                    assert!(plane.proven.contains(&to.remote), "{to} never answered");
                }
            }
            _ if number == 5 => {
                let tombstone = tombstone_of(&Host::new(5, 1, host::mesh_config()).grant);
                mesh.handle_map_change(now, MapChange::Remove(tombstone));
                members.remove(&key(5));
            }
            _ => {
                now += Duration::from_millis(u64::from(input.byte().unwrap_or(0)) * 200);
                mesh.handle_timeout(now);
            }
        }
        plane.drain(now, &mut mesh);
        let mut pairs = BTreeSet::new();
        let table = mesh.forwarding_table().expect("the node relays");
        for ends in table.parts().iter().flat_map(|part| part.values()) {
            let pair = ends.map(|end| end.node);
            assert!(pair.iter().all(|end| members.contains(end)) && pair[0] != pair[1]);
            assert!(pairs.insert(pair), "two channels of one pair");
        }
    }
    assert!(plane.sent <= calls * COST, "{} datagrams for {calls} calls", plane.sent);
}

/// Data plane of the relay, and what it sent.
#[derive(Default)]
struct Plane {
    forwarding: Forwarding,
    /// Pings that are not answered: the peer, the path, and the transaction.
    pings: Vec<(WireguardKey, Path, u64)>,
    /// Addresses that answered a ping.
    proven: BTreeSet<SocketAddr>,
    /// Numbers of the channels that were opened.
    channels: Vec<u64>,
    sent: usize,
}

impl Plane {
    fn drain(&mut self, now: std::time::Instant, mesh: &mut Mesh) {
        while let Some(output) = mesh.poll_output() {
            if let Output::ForwardingTable(table) = &output {
                self.forwarding = self.forwarding.next(table);
            } else if output == Output::ReportChannels {
                mesh.handle_channels_used(now, self.forwarding.take_used());
            } else if let Output::Transmit(transmit) = output
                && let Some(to) = transmit.path
            {
                self.sent += 1;
                if let Probe::Ping { transaction } = transmit.message {
                    self.pings.push((transmit.peer, to, transaction));
                } else if let Probe::Opened { channel, .. } = transmit.message {
                    self.channels.push(channel);
                }
            }
        }
    }
}

fn key(number: u16) -> WireguardKey {
    Host::new(number, 1, host::mesh_config()).key()
}

/// A node that published no address, so that nothing but the relay sends it something.
fn node(number: u16) -> Node {
    let grant = Host::new(number, 1, host::mesh_config()).grant;
    // Half of the nodes have probes of version 1, whose sources are not proven.
    let probe_version = [ProbeVersion::V1, ProbeVersion::V2][usize::from(number % 2)];
    let record = Record { probe_version, ..record(&grant) };
    Node::new(grant, record).expect("it announces nothing")
}

/// Returns inputs in which nodes register, prove their addresses, and use a channel.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    // Each call: what, the node, its address; then what the call reads itself.
    let register = |node: u8, at: u8| vec![0, node, at, 4, 0, 0];
    let open = |node: u8, at: u8, other: u8| vec![2, node, at, other, 4, 0, 0];
    let send = |at: u8| vec![6, 0, at, 0];
    let wait = |time: u8| vec![7, 0, 0, time];
    let used = [register(1, 5), register(2, 10), open(1, 5, 2), send(5), send(10)].concat();
    let moved = [used.clone(), register(1, 15), send(15), open(2, 20, 1), send(15)].concat();
    let unused = [moved.clone(), wait(255), wait(255), wait(255), wait(255), send(15)].concat();
    let removed = [register(4, 5), register(3, 10), open(3, 10, 4), vec![7, 4, 0]].concat();
    vec![used, moved, unused, removed]
}
