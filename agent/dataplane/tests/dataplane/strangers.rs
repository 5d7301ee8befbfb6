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
fn forged_probes_from_one_source_are_limited_and_a_peers_own_come_through() {
    let (network, a, mut b) = strangers();
    let loud = SocketAddr::from(([203, 0, 113, 1], 1));
    for number in 0..5_000u16 {
        let bytes = [&[0x50u8, 1, 0, 0][..], &number.to_be_bytes(), &[7; 60]].concat();
        network.inject(Datagram { from: loud, to: b.address, bytes });
    }
    let probe = [&[0x50u8, 1, 0, 0][..], &[9; 60]].concat();
    let mut forged = 0;
    loop {
        a.plane.send(b.address.into(), &probe);
        match b.event() {
            Event::Probe { from, .. } if from == a.address.into() => break,
            Event::Probe { .. } => forged += 1,
            _ => {}
        }
    }
    assert!(forged < 2_000, "{forged} cost more than a look at the first byte");
    assert!(b.drops("source_limited") > 3_000, "{:?}", b.plane.snapshot().drops);
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
