//! Datagrams of strangers: requests, floods and oversized ones.

use super::*;

#[test]
fn a_reflector_answers_padded_requests_alone_and_each_source_a_few_times() {
    let (network, _a, b) = strangers();
    let loud = SocketAddr::from(([203, 0, 113, 1], 1));
    let ask = |from: SocketAddr, request: &[u8]| {
        network.inject(Datagram { from, to: b.address, bytes: request.to_vec() });
    };
    let request = stun::request([7; 12]);
    // The response to a request of only a header would be longer than the request.
    ask(loud, &[&[0u8, 1, 0, 0][..], &request[4..20]].concat());
    b.dropped("reflector_refused", 1);
    for _ in 0..1_000 {
        ask(loud, &request);
    }
    let quiet = SocketAddr::from(([203, 0, 113, 2], 1));
    ask(quiet, &request);
    let answers = |to: SocketAddr| {
        let seen = network.seen().into_iter();
        seen.filter(move |d| d.from == b.address && d.to == to).collect::<Vec<_>>()
    };
    let deadline = std::time::Instant::now() + TIMEOUT;
    while answers(quiet).is_empty() {
        assert!(std::time::Instant::now() < deadline, "the other source is not answered");
        std::thread::yield_now();
    }
    let to_loud = answers(loud);
    assert!(to_loud.iter().all(|answer| answer.bytes.len() <= request.len()));
    assert_eq!(to_loud.len() as u64 + b.drops("reflector_limited"), 1_000);
    assert!(b.drops("reflector_limited") > 500, "{}", to_loud.len());
}

#[test]
fn forged_probes_with_a_peers_address_take_nothing_from_the_peer() {
    let (network, mut a, mut b) = acquainted();
    let pair_id = a.probes.seal(&b.key(), &PING, 0).unwrap()[..12].to_vec();
    for number in 0..5_000u16 {
        // Half of them have the pair id, which anybody on the way can read.
        let id = if number % 2 == 0 {
            vec![0x50, 2, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9]
        } else {
            pair_id.clone()
        };
        let bytes = [&id[..], &number.to_be_bytes(), &[7; 90]].concat();
        network.inject(Datagram { from: a.address, to: b.address, bytes });
        if number % 100 == 0 {
            a.probe(&b, &PING);
            b.message(a.key(), |message| *message == PING);
            a.message(b.key(), |message| matches!(message, Probe::Pong { transaction: 7, .. }));
        }
    }
    b.dropped("probe_unknown", 2_500);
    b.dropped("probe_not_authentic", 2_500);
    assert_eq!(b.drops("source_limited") + b.drops("events_full"), 0);
}

#[test]
fn recorded_probes_reach_nobody_from_anywhere() {
    let (network, a, mut b) = acquainted();
    for message in [PING, Probe::Register { transaction: 3 }] {
        a.probe(&b, &message);
        b.message(a.key(), |received| *received == message);
    }
    let recorded: Vec<Datagram> =
        network.seen().into_iter().filter(|d| d.to == b.address).collect();
    let before = network.seen().len();
    let thief = SocketAddr::from(([203, 0, 113, 66], 51830));
    for round in 0..50 {
        for datagram in &recorded {
            let from = if round % 2 == 0 { thief } else { a.address };
            network.inject(Datagram { from, ..datagram.clone() });
        }
    }
    // One that is fresh comes last, so that all others were handled.
    let last = Probe::Ping { transaction: 99 };
    a.probe(&b, &last);
    loop {
        match b.event() {
            // A challenge is answered without a known epoch: both nodes may have restarted. And `a` proves
            // itself where recordings named its address.
            Event::Probe { message: Probe::Challenge { .. } | Probe::Proof { .. }, .. } => {}
            Event::Probe { message, .. } => {
                assert_eq!(message, last);
                break;
            }
            _ => {}
        }
    }
    let to_thief = network.seen().into_iter().skip(before).filter(|d| d.to == thief);
    let sent: usize = to_thief.map(|datagram| datagram.bytes.len()).sum();
    let came: usize = recorded.iter().map(|datagram| datagram.bytes.len() * 25).sum();
    assert!(sent <= came, "{sent} bytes for {came}");
}

#[test]
fn a_worker_answers_pings_while_nobody_takes_its_events() {
    let (network, a, b) = acquainted();
    // No task takes the events of `b`.
    let pongs = || network.seen().into_iter().filter(|d| d.from == b.address).count();
    let before = pongs();
    for transaction in 0..20 {
        a.probe(&b, &Probe::Ping { transaction });
    }
    let deadline = Instant::now() + TIMEOUT;
    while pongs() < before + 20 {
        assert!(Instant::now() < deadline, "{:?}", b.plane.snapshot().drops);
        std::thread::yield_now();
    }
}

#[test]
fn a_request_for_the_relay_is_taken_from_where_its_sender_receives() {
    let (network, mut a, mut b) = acquainted();
    let victim = SocketAddr::from(([203, 0, 113, 99], 51830));
    let register = Probe::Register { transaction: 3 };
    // The node itself forges the address of somebody else.
    let bytes = a.probes.seal(&b.key(), &register, 0).unwrap();
    network.inject(Datagram { from: victim, to: b.address, bytes });
    b.dropped("probe_unvalidated", 1);
    a.probe(&b, &register);
    assert_eq!(b.message(a.key(), |message| *message == register), a.address.into());
    let to_victim: usize =
        network.seen().iter().filter(|d| d.to == victim).map(|d| d.bytes.len()).sum();
    assert!(to_victim <= 96, "{to_victim}");
    // What a peer of version 1 asks is taken as before.
    b.apply([(a.key(), PeerEntry { probe_version: ProbeVersion::V1, ..a.entry() })]);
    a.apply([(b.key(), PeerEntry { probe_version: ProbeVersion::V1, ..b.entry() })]);
    a.probe(&b, &register);
    b.message(a.key(), |message| *message == register);
    b.probe(&a, &PING);
    b.message(a.key(), |message| matches!(message, Probe::Pong { .. }));
    a.message(b.key(), |message| *message == PING);
}

const PING: Probe = Probe::Ping { transaction: 7 };

/// Returns two ends that have proven their epoch and their address to each other.
fn acquainted() -> (Network, End, End) {
    let (network, mut a, mut b) = strangers();
    a.probe(&b, &PING);
    a.message(b.key(), |message| matches!(message, Probe::Challenge { .. }));
    b.message(a.key(), |message| matches!(message, Probe::Proof { .. }));
    b.probe(&a, &PING);
    b.message(a.key(), |message| matches!(message, Probe::Challenge { .. }));
    a.message(b.key(), |message| matches!(message, Probe::Proof { .. }));
    (network, a, b)
}

#[test]
fn a_stranger_that_floods_a_relays_channel_reaches_nobody_and_keeps_nobody_out() {
    let network = Network::new();
    let b = End::new(&network, 2);
    let ends = [1, 3].map(|n| SocketAddr::from(([192, 0, 2, n], 51830)));
    b.relay(77, ends, 1 << 23);
    let on_channel = |channel| [&relayed_header(channel)[..], &[4, 0, 0, 0], &[7; 60]].concat();
    let stranger = SocketAddr::from(([203, 0, 113, 1], 1));
    for number in 0..1_000 {
        // Half of the datagrams use the channel, the others guess one.
        let bytes = on_channel(if number % 2 == 0 { 77 } else { 1_000 + number });
        network.inject(Datagram { from: stranger, to: b.address, bytes });
    }
    let bytes = on_channel(77);
    network.inject(Datagram { from: ends[0], to: b.address, bytes: bytes.clone() });
    let deadline = std::time::Instant::now() + TIMEOUT;
    let sent = || network.seen().into_iter().filter(|d| d.from == b.address).collect::<Vec<_>>();
    while sent().is_empty() {
        assert!(
            std::time::Instant::now() < deadline,
            "the datagram of the member is not forwarded"
        );
        std::thread::yield_now();
    }
    assert_eq!(sent(), [Datagram { from: b.address, to: ends[1], bytes }]);
    assert_eq!(b.drops("relay_stranger"), 500);
}

/// The largest payload is 65,507 bytes over IPv4 and 65,527 over IPv6. One send takes fewer bytes.
#[test]
fn oversized_datagrams_are_dropped_and_counted_and_hang_nothing() {
    let network = Network::new();
    let (mut a, b) = (End::new(&network, 1), End::new(&network, 2));
    a.apply([(b.key(), b.entry())]);
    b.apply([(a.key(), a.entry())]);
    let ends = [3, 4].map(|n| SocketAddr::from(([192, 0, 2, n], 51830)));
    b.relay(77, ends, 1 << 33);
    let stranger = SocketAddr::from(([203, 0, 113, 1], 1));
    let heads: [&[u8]; 6] = [
        &relayed_header(77),
        &relayed_header(78),
        &[4, 0, 0, 0, 1, 2, 3, 4],
        &[0x50, 1, 0, 0],
        &[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42],
        &[],
    ];
    let mut count = 0;
    for from in [ends[0], ends[1], stranger, a.address] {
        for len in [GSO_MAX_BYTES + 1, 65_500, 65_507, 65_527, SLOT_BYTES] {
            for head in heads {
                let mut bytes = vec![7; len];
                bytes[..head.len()].copy_from_slice(head);
                network.inject(Datagram { from, to: b.address, bytes });
                count += 1;
            }
        }
    }
    b.dropped("oversized", count);
    // The largest datagram that a send takes is forwarded, and the relay's own tunnels still work.
    let mut bytes = vec![7; GSO_MAX_BYTES];
    bytes[..12].copy_from_slice(&relayed_header(77));
    network.inject(Datagram { from: ends[0], to: b.address, bytes: bytes.clone() });
    a.plane.handshake(b.key(), vec![b.address.into()]);
    a.observed(b.key(), |what| what == Observation::Handshake { from: b.address.into() });
    carries(&a, &b, 1000);
    let forwarded: Vec<_> = network.seen().into_iter().filter(|d| d.to == ends[1]).collect();
    assert_eq!(forwarded, [Datagram { from: b.address, to: ends[1], bytes }]);
    assert_eq!(b.drops("oversized"), count);
}

/// An engine that opens in place leaves its own packets in the buffer that the relay sends from.
#[test]
fn a_relay_of_either_engine_forwards_unchanged_what_arrives_between_its_own_packets() {
    for number in [2, 3] {
        let network = Network::new();
        let (mut a, relay) = (End::new(&network, 1), End::new(&network, number));
        introduce(&a, &relay);
        let ends = [7, 8].map(|n| SocketAddr::from(([192, 0, 2, n], 51830)));
        relay.relay(77, ends, 1 << 33);
        a.plane.handshake(relay.key(), vec![relay.address.into()]);
        a.observed(relay.key(), |what| {
            what == Observation::Handshake { from: relay.address.into() }
        });
        let own: Vec<_> = (0..200).map(|payload| packet(&a, &relay, payload)).collect();
        let mut expected = Vec::new();
        for (mark, packet) in (0..200u8).zip(&own) {
            let bytes = [&relayed_header(77)[..], &[4, 0, 0, 0], &[mark; 60]].concat();
            let datagram = Datagram { from: ends[0], to: relay.address, bytes: bytes.clone() };
            network.inject(datagram);
            expected.push(Datagram { from: relay.address, to: ends[1], bytes });
            a.host.send(packet);
        }
        for packet in &own {
            assert_eq!(relay.host.receive(TIMEOUT).as_ref(), Some(packet));
        }
        // Each packet arrived after the datagram that was sent before it, which was forwarded first.
        let forwarded: Vec<_> = network.seen().into_iter().filter(|d| d.to == ends[1]).collect();
        assert_eq!(forwarded, expected);
    }
}
