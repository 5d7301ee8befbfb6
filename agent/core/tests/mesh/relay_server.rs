//! This node as a relay for others.

use towline_core::forwarding::ForwardingEnd;
use towline_core::path::CHANNEL_LIFETIME;
use towline_types::frame::ProbeVersion;

use super::*;

const LIMITS: RelayLimits =
    RelayLimits { nodes: 4, channels_per_node: 2, bits_per_second: 1_000_000 };

/// A relay that knows the nodes 2 to 9, which published no address. Their probes have version 1.
fn relay() -> Us {
    let mut us = Us::relaying(1, Some(LIMITS));
    (2..=9).for_each(|number| us.upsert(of_version(peer(number), ProbeVersion::V1)));
    us.drain();
    us
}

fn of_version(mut node: NodeBuilder, version: ProbeVersion) -> NodeBuilder {
    node.record.probe_version = version;
    node
}

fn at(number: u8) -> Path {
    path(&format!("203.0.113.{number}:51830"))
}

fn sent(outputs: &[Output], to: Path) -> Vec<Probe> {
    let there = transmits(outputs).filter(|transmit| transmit.path == Some(to));
    there.map(|transmit| transmit.message.clone()).collect()
}

/// Transaction of the ping that has to prove a path.
fn challenge(outputs: &[Output], to: Path) -> Option<u64> {
    sent(outputs, to).into_iter().find_map(|message| match message {
        Probe::Ping { transaction } => Some(transaction),
        _ => None,
    })
}

/// Has a node register from a path, and answer the challenge. Returns what is sent then.
fn register(us: &mut Us, number: u8, from: Path) -> Vec<Output> {
    us.message(number, from, Probe::Register { transaction: 1 });
    let outputs = us.drain();
    let is_ping = |message: &Probe| matches!(message, Probe::Ping { .. });
    assert!(sent(&outputs, from).iter().all(is_ping), "a challenge alone");
    us.message(number, from, pong(challenge(&outputs, from).unwrap()));
    us.drain()
}

/// Has a node ask for a channel. Returns what is sent, and the channel if it was opened.
fn open(us: &mut Us, number: u8, from: Path, other: u8) -> (Vec<Output>, Option<u64>) {
    us.message(number, from, Probe::Open { transaction: 2, peer: key(other) });
    let outputs = us.drain();
    let channel = sent(&outputs, from).into_iter().find_map(|message| match message {
        Probe::Opened { transaction: 2, channel } => Some(channel),
        _ => None,
    });
    (outputs, channel)
}

/// Two registered nodes with a channel.
fn opened() -> (Us, u64) {
    let mut us = relay();
    register(&mut us, 2, at(2));
    register(&mut us, 3, at(3));
    let (_, channel) = open(&mut us, 2, at(2), 3);
    (us, channel.unwrap())
}

fn end_of(us: &Us, channel: u64, number: u8) -> Option<ForwardingEnd> {
    let ends = us.mesh.forwarding_table()?.get(ChannelId(channel))?;
    ends.iter().find(|end| end.node == key(number)).copied()
}

fn is_at(us: &Us, channel: u64, number: u8, path: Path) -> bool {
    end_of(us, channel, number).is_some_and(|end| end.path == path && end.is_proven)
}

#[test]
fn a_node_that_proved_its_address_is_announced_a_channel_there() {
    let mut us = relay();
    let lifetime = CHANNEL_LIFETIME;
    let registered = register(&mut us, 3, at(3));
    assert_eq!(sent(&registered, at(3)), [Probe::Registered { transaction: 1, lifetime }]);
    us.message(3, at(3), Probe::Register { transaction: 9 });
    let again = us.drain();
    assert_eq!(sent(&again, at(3)), [Probe::Registered { transaction: 9, lifetime }]);

    // The opener did not register: it may send at once, but nothing goes to it yet.
    let (outputs, channel) = open(&mut us, 2, at(2), 3);
    let channel = channel.unwrap();
    let incoming = Probe::Incoming { channel, peer: key(2) };
    assert_eq!(sent(&outputs, at(3)), [incoming.clone(), incoming]);
    assert!(is_at(&us, channel, 3, at(3)));
    let opener = end_of(&us, channel, 2).unwrap();
    assert_eq!((opener.path, opener.is_proven), (at(2), false));
    let table = outputs.iter().position(|output| matches!(output, Output::ForwardingTable(_)));
    let message = outputs.iter().position(|output| matches!(output, Output::Transmit(_)));
    assert!(table.unwrap() < message.unwrap(), "the table has the channel first");
    us.message(2, at(2), pong(challenge(&outputs, at(2)).unwrap()));
    us.drain();
    assert!(is_at(&us, channel, 2, at(2)));
    let (_, same) = open(&mut us, 3, at(3), 2);
    assert_eq!(same, Some(channel));
    assert_eq!(us.mesh.relay().map(|relay| (relay.nodes, relay.channels)), Some((2, 1)));
}

#[test]
fn a_request_from_a_validated_path_comes_from_an_address_that_is_proven() {
    let (mut us, channel) = opened();
    let lifetime = CHANNEL_LIFETIME;
    us.validated(2, at(22), Probe::Register { transaction: 4 });
    assert_eq!(sent(&us.drain(), at(22)), [Probe::Registered { transaction: 4, lifetime }]);
    assert!(is_at(&us, channel, 2, at(22)), "its channels move, too");
    us.validated(3, at(33), Probe::Open { transaction: 2, peer: key(2) });
    assert_eq!(sent(&us.drain(), at(33)), [Probe::Opened { transaction: 2, channel }]);
    assert!(is_at(&us, channel, 3, at(33)));
}

#[test]
fn a_record_that_names_version_2_proves_no_address() {
    let (mut us, channel) = opened();
    for number in [2, 3] {
        us.upsert(of_version(peer(number), ProbeVersion::V2).generation(2));
    }
    us.drain();
    // The data plane opened it as version 1 before the record came.
    us.message(2, at(66), Probe::Register { transaction: 5 });
    let outputs = us.drain();
    assert!(challenge(&outputs, at(66)).is_some(), "{outputs:?}");
    assert!(!sent(&outputs, at(66)).iter().any(|m| matches!(m, Probe::Registered { .. })));
    assert!(is_at(&us, channel, 2, at(2)));
}

#[test]
fn a_recorded_request_from_elsewhere_moves_nothing_and_a_node_that_moved_keeps_its_channels() {
    let (mut us, channel) = opened();
    let table = us.mesh.forwarding_table().cloned();
    us.message(2, at(66), Probe::Register { transaction: 5 });
    let outputs = us.drain();
    assert!(sent(&outputs, at(66)).len() <= 3);
    let transaction = challenge(&outputs, at(66)).unwrap();
    let (outputs, same) = open(&mut us, 2, at(67), 3);
    assert_eq!(same, Some(channel));
    assert!(sent(&outputs, at(67)).len() <= 3);
    // Guessed answers, and the right one from another address or of another node.
    us.message(2, at(66), pong(transaction ^ 1));
    us.message(2, at(65), pong(transaction));
    us.message(3, at(66), pong(transaction));
    us.drain();
    assert_eq!(us.mesh.forwarding_table().cloned(), table);

    us.message(2, at(66), pong(transaction));
    let outputs = us.drain();
    assert!(sent(&outputs, at(66)).iter().any(|m| matches!(m, Probe::Registered { .. })));
    assert!(is_at(&us, channel, 2, at(66)) && is_at(&us, channel, 3, at(3)));
    // Its end of one channel may be at another of its uplinks.
    let (outputs, _) = open(&mut us, 2, at(68), 3);
    us.message(2, at(68), pong(challenge(&outputs, at(68)).unwrap()));
    us.drain();
    assert!(is_at(&us, channel, 2, at(68)));
}

#[test]
fn what_one_node_has_too_much_of_is_refused_to_it_alone() {
    let (mut us, _) = opened();
    register(&mut us, 4, at(4));
    register(&mut us, 5, at(5));
    let refused = |outputs: &[Output], to| {
        let refused = sent(outputs, to).into_iter();
        refused.filter(|message| matches!(message, Probe::Refused { .. })).count()
    };
    us.message(6, at(6), Probe::Register { transaction: 1 });
    assert_eq!(refused(&us.drain(), at(6)), 1, "the table of nodes is full");
    assert!(open(&mut us, 2, at(2), 4).1.is_some());
    assert_eq!(refused(&open(&mut us, 2, at(2), 5).0, at(2)), 1, "a third channel");
    assert_eq!(refused(&open(&mut us, 5, at(5), 2).0, at(5)), 1, "the other one has no room");
    assert_eq!(refused(&open(&mut us, 5, at(5), 9).0, at(5)), 1, "it is not registered");
    assert!(open(&mut us, 5, at(5), 4).1.is_some());

    // No answer to a flood, and no flood of announcements.
    let mut announced = 0;
    for _ in 0..10_000 {
        announced += sent(&open(&mut us, 2, at(2), 3).0, at(3)).len();
    }
    assert!(announced <= 2, "{announced}");
    assert!(us.mesh.counters().relay_requests_refused > 8_000);
    assert!(open(&mut us, 3, at(3), 2).1.is_some());
    // What is relayed itself, of no node, or carried by a controller is not served.
    let before = us.mesh.forwarding_table().cloned();
    us.message(7, at(7).on_channel(ChannelId(1)), Probe::Register { transaction: 1 });
    us.message(99, at(99), Probe::Register { transaction: 1 });
    us.signal(Probe::Register { transaction: 1 });
    assert_eq!(transmits(&us.drain()).count(), 0);
    assert_eq!(us.mesh.forwarding_table().cloned(), before);
}

#[test]
fn nothing_from_an_address_of_this_host_or_of_its_link_is_served() {
    let mut us = relay();
    for (transaction, from) in ["127.0.0.1:9", "169.254.169.254:80", "[::1]:9", "[fe80::1]:9"]
        .map(path)
        .into_iter()
        .enumerate()
    {
        us.message(2, from, Probe::Register { transaction: transaction as u64 });
    }
    assert_eq!(transmits(&us.drain()).count(), 0);
    assert_eq!(us.mesh.counters().relay_requests_refused, 4);
}

#[test]
fn a_node_ceases_to_relay_when_its_grant_denies_it_and_registers_with_others() {
    let (mut us, _) = opened();
    us.upsert(peer(9).relay().candidates(&[OTHER]).generation(2));
    us.run(Duration::from_secs(1));
    let grant = us.mesh.grant().unwrap().clone();
    us.mesh.set_grant(us.now, Grant { relay: RelayRole::Denied, ..grant.clone() });
    let outputs = us.run(Duration::from_secs(1));
    let empty = Output::ForwardingTable(Arc::default());
    assert!(outputs.contains(&empty), "the data plane forwards nothing more");
    assert_eq!(registration(&outputs).map(|(relay, ..)| relay), Some(key(9)));
    assert!(us.mesh.relay().is_none() && us.mesh.is_relay_denied());
    us.message(4, at(4), Probe::Register { transaction: 1 });
    assert!(sent(&us.drain(), at(4)).is_empty());

    us.mesh.set_grant(us.now, Grant { relay: RelayRole::Undecided, ..grant });
    assert_eq!(registration(&us.run(Duration::from_secs(60))), None);
    register(&mut us, 4, at(4));
    let own = us.mesh.grant().unwrap().name.clone();
    assert_eq!(us.mesh.undecided_relays().collect::<Vec<_>>(), [&own]);
}

#[test]
fn a_channel_ends_when_neither_end_uses_it_and_with_its_nodes() {
    let (mut us, channel) = opened();
    let (_, other) = open(&mut us, 3, at(3), 2);
    assert_eq!(other, Some(channel));
    let pass = |us: &mut Us, used: &[ChannelId]| {
        for _ in 0..30 {
            let outputs = us.run(CHANNEL_LIFETIME / 15);
            if outputs.contains(&Output::ReportChannels) {
                us.mesh.handle_channels_used(us.now, used.iter().copied());
            }
        }
        us.drain();
    };
    pass(&mut us, &[ChannelId(channel)]);
    assert!(end_of(&us, channel, 2).is_some());
    pass(&mut us, &[]);
    assert!(end_of(&us, channel, 2).is_none());
    assert_eq!(us.mesh.relay().map(|relay| (relay.nodes, relay.channels)), Some((0, 0)));

    let (mut us, channel) = opened();
    us.mesh.handle_map_change(us.now, MapChange::Remove(tombstone(3)));
    us.drain();
    assert!(end_of(&us, channel, 2).is_none());
    assert_eq!(us.mesh.relay().map(|relay| (relay.nodes, relay.channels)), Some((1, 0)));
}
