//! Packets between two ends: sessions, tables, keys and what is dropped.

use super::*;

#[test]
fn packets_pass_both_ways_and_an_eavesdropper_learns_nothing() {
    let (network, a, b) = friends();
    for payload in [0, 1, 3, 100, 1000, 1391, 1392] {
        carries(&a, &b, payload);
        carries(&b, &a, payload);
    }
    let seen = network.seen();
    for datagram in &seen {
        let leaked =
            datagram.bytes.windows(12).any(|window| PATTERN.windows(12).any(|p| p == window));
        assert!(!leaked, "{datagram:?}");
    }
    for datagram in of_type(&seen, 4) {
        let payload = datagram.bytes.len() - 32;
        assert!(payload.is_multiple_of(16) || payload == 1420, "padding: {payload}");
    }
    assert_eq!(of_type(&seen, 1).len(), 1, "initiations");
    assert_eq!(of_type(&seen, 2).len(), 1, "responses");
    for end in [&a, &b] {
        assert!(end.plane.snapshot().drops.values().all(|count| *count == 0));
    }
}

#[test]
fn padding_makes_no_packet_too_large_for_its_path() {
    let (network, a, b) = friends();
    let mtu = Mtu::try_from(1_301).unwrap();
    a.apply([(b.key(), PeerEntry { mtu, ..b.entry() })]);
    carries(&a, &b, 1_301 - 28);
    let longest = of_type(&network.seen(), 4).iter().map(|datagram| datagram.bytes.len()).max();
    assert_eq!(longest, Some(1_301 + 32), "1,301 is no multiple of 16");
}

#[test]
fn bytes_and_handshakes_are_counted() {
    let (network, a, b) = friends();
    carries(&a, &b, 1000);
    carries(&b, &a, 10);
    let (of_a, of_b) = (a.plane.snapshot(), b.plane.snapshot());
    let (a_sees, b_sees) = (of_a.peers[&b.key()], of_b.peers[&a.key()]);
    let sent = |from: &End| -> u64 {
        let seen = network.seen();
        seen.iter().filter(|d| d.from == from.address).map(|d| d.bytes.len() as u64).sum()
    };
    assert_eq!(a_sees.sent_bytes, sent(&a));
    assert_eq!(b_sees.received_bytes, sent(&a));
    assert_eq!(b_sees.sent_bytes, sent(&b));
    assert_eq!(a_sees.received_bytes, sent(&b));
    assert!(a_sees.last_handshake.is_some() && b_sees.last_handshake.is_some());
    assert_eq!(a_sees.endpoint, Some(b.address.into()));
}

#[test]
fn a_long_burst_arrives_complete_and_in_order() {
    let (_network, a, b) = friends();
    let packets: Vec<_> = (0..2000).map(|n| packet(&a, &b, 1392 - n % 3 * (n % 600))).collect();
    for packet in &packets {
        a.host.send(packet);
    }
    for packet in &packets {
        assert_eq!(b.host.receive(TIMEOUT).as_ref(), Some(packet));
    }
}

/// No error is reported for damage by coalescing. It is visible only in the datagrams that arrive.
#[test]
fn what_is_joined_wrongly_is_soon_received_one_by_one() {
    let (network, a, b) = friends();
    network.corrupt_coalesced();
    let joins = || {
        let features = b.plane.snapshot().features;
        features.iter().any(|feature| feature.name == "udp_gro" && feature.active)
    };
    let lost = packet(&a, &b, 1000);
    let deadline = Instant::now() + TIMEOUT;
    while joins() {
        assert!(Instant::now() < deadline, "datagrams are still coalesced");
        (0..64).for_each(|_| a.host.send(&lost));
        std::thread::yield_now();
    }
    let last = packet(&a, &b, 500);
    a.host.send(&last);
    while b.host.receive(TIMEOUT).expect("a datagram that is not coalesced arrives") != last {}
    let packets: Vec<_> = (0..100).map(|_| packet(&a, &b, 1000)).collect();
    packets.iter().for_each(|packet| a.host.send(packet));
    for packet in &packets {
        assert_eq!(b.host.receive(TIMEOUT).as_ref(), Some(packet));
    }
}

#[test]
fn a_super_packet_arrives_as_its_segments() {
    let (network, a, b) = friends();
    let size = 1300;
    let payload: Vec<u8> = (0..40 * size + 77).map(|at| (at / 3) as u8).collect();
    // The splitter completes the checksum, which contains only the sum of the pseudo-header.
    let mut packet = packet(&a, &b, payload.len());
    packet[28..].copy_from_slice(&payload);
    let header = VnetHeader {
        flags: FLAG_NEEDS_CSUM,
        gso_type: GSO_UDP_L4,
        hdr_len: 28,
        gso_size: size as u16,
        csum_start: 20,
        csum_offset: 6,
        ..VnetHeader::default()
    };
    a.host.send_with(header, &packet);
    let mut received = Vec::new();
    for number in 0..41 {
        let segment = b.host.receive(TIMEOUT).unwrap();
        assert_eq!(segment.len(), 28 + if number < 40 { size } else { 77 });
        let pseudo = checksum::pseudo(&a.inner.into(), &b.inner.into(), 17);
        let sum = checksum::add(pseudo + segment.len() as u64 - 20, &segment[20..]);
        assert_eq!(checksum::fold(sum), 0xffff, "the checksum of segment {number}");
        received.extend_from_slice(&segment[28..]);
    }
    assert_eq!(received, payload);
    let data = of_type(&network.seen(), 4).len();
    assert_eq!(data, 1 + 41, "a keepalive and the segments");
}

#[test]
fn without_a_session_traffic_is_wanted_once_and_waits() {
    let (network, mut a, b) = strangers();
    let packets: Vec<_> = (0..5).map(|n| packet(&a, &b, n)).collect();
    for packet in &packets {
        a.host.send(packet);
    }
    a.observed(b.key(), |what| what == Observation::Wanted);
    assert!(network.seen().is_empty(), "nothing is sent without a command");
    a.plane.handshake(b.key(), vec![b.address.into()]);
    for packet in &packets {
        assert_eq!(b.host.receive(TIMEOUT).as_ref(), Some(packet));
    }
    a.observed(b.key(), |what| {
        assert_ne!(what, Observation::Wanted, "reported twice");
        matches!(what, Observation::Handshake { .. })
    });
}

#[test]
fn only_a_few_packets_wait() {
    let (_network, mut a, b) = strangers();
    let packets: Vec<_> = (0..40).map(|n| packet(&a, &b, n)).collect();
    for packet in &packets {
        a.host.send(packet);
    }
    a.observed(b.key(), |what| what == Observation::Wanted);
    a.dropped("queue_full", 24);
    a.plane.handshake(b.key(), vec![b.address.into()]);
    for packet in &packets[24..] {
        assert_eq!(b.host.receive(TIMEOUT).as_ref(), Some(packet), "the newest are kept");
    }
}

#[test]
fn one_initiation_goes_to_each_address_and_counts_once() {
    let (network, mut a, mut b) = strangers();
    let nowhere = SocketAddr::from(([198, 51, 100, 9], 9));
    a.plane.handshake(b.key(), vec![nowhere.into(), b.address.into(), b.address.into()]);
    a.observed(b.key(), |what| what == Observation::Handshake { from: b.address.into() });
    b.observed(a.key(), |what| what == Observation::Handshake { from: a.address.into() });
    b.dropped("stale_handshake", 1);
    let seen = network.seen();
    let initiations = of_type(&seen, 1);
    assert_eq!(initiations.len(), 3);
    assert!(initiations.iter().all(|datagram| datagram.bytes == initiations[0].bytes));
    assert_eq!(of_type(&seen, 2).len(), 1);
    carries(&b, &a, 100);
}

#[test]
fn both_ends_may_initiate_at_once() {
    let (_network, mut a, mut b) = strangers();
    a.plane.handshake(b.key(), vec![b.address.into()]);
    b.plane.handshake(a.key(), vec![a.address.into()]);
    a.observed(b.key(), |what| matches!(what, Observation::Handshake { .. }));
    b.observed(a.key(), |what| matches!(what, Observation::Handshake { .. }));
    carries(&a, &b, 100);
    carries(&b, &a, 100);
}

#[test]
fn a_responder_that_knows_no_address_answers_where_the_handshake_came_from() {
    let (_network, mut a, mut b) = strangers();
    b.apply([(a.key(), PeerEntry { endpoint: None, ..a.entry() })]);
    a.plane.handshake(b.key(), vec![b.address.into()]);
    b.observed(a.key(), |what| what == Observation::Roamed { from: a.address.into() });
    a.observed(b.key(), |what| matches!(what, Observation::Handshake { .. }));
    carries(&b, &a, 10);
    carries(&a, &b, 10);
    assert_eq!(b.plane.snapshot().peers[&a.key()].endpoint, Some(a.address.into()));
}

#[test]
fn an_authentic_datagram_from_elsewhere_is_reported_and_replies_stay() {
    let (network, a, mut b) = friends();
    let elsewhere = SocketAddr::from(([203, 0, 113, 5], 1024));
    let (inside, outside) = (a.address, b.address);
    let moving = network.clone();
    network.filter(move |datagram| {
        let moved = datagram.from == inside && datagram.to == outside;
        if moved {
            let (moving, datagram) =
                (moving.clone(), Datagram { from: elsewhere, ..datagram.clone() });
            std::thread::spawn(move || moving.inject(datagram));
        }
        !moved
    });
    carries(&a, &b, 10);
    b.observed(a.key(), |what| what == Observation::Roamed { from: elsewhere.into() });
    carries(&b, &a, 10);
    // The change is reported only once. Traffic is reported each second.
    carries(&a, &b, 10);
    while let Ok(event) = b.events.try_recv() {
        let is_active = matches!(event, Event::Peer { what: Observation::Active { .. }, .. });
        assert!(is_active, "{event:?}");
    }
}

#[test]
fn a_replay_is_refused() {
    let (network, a, b) = friends();
    carries(&a, &b, 100);
    for datagram in network.seen() {
        network.inject(datagram);
    }
    b.dropped("stale_handshake", 1);
    b.dropped("replayed", 2);
    a.dropped("invalid_handshake", 1);
    assert_eq!(b.host.receive(A_WHILE), None);
    carries(&a, &b, 100);
    carries(&b, &a, 100);
}

#[test]
fn a_foreign_source_is_dropped_and_counted() {
    let (_network, a, b) = friends();
    // The table of the sender accepts any source, because its own check would drop the packet.
    let anybody = OwnNetworks::new([], [net("10.0.0.0/8")], []);
    a.apply_with([(b.key(), b.entry())], anybody);
    a.host.send(&packet_from(Ipv4Addr::new(10, 0, 0, 77), b.inner, 10));
    b.dropped("wrong_source", 1);
    // A longer prefix of a third peer inside the peer's prefix belongs to the third peer only.
    let third = WireguardKey(PublicKey::from(&StaticSecret::from([3; 32])).to_bytes());
    let whole = PeerEntry { prefixes: vec!["10.0.0.0/8".parse().unwrap()], ..a.entry() };
    let part =
        PeerEntry { prefixes: vec!["10.7.0.0/16".parse().unwrap()], endpoint: None, ..a.entry() };
    b.apply([(a.key(), whole), (third, part)]);
    let good = packet_from(Ipv4Addr::new(10, 8, 1, 1), b.inner, 10);
    a.host.send(&packet_from(Ipv4Addr::new(10, 7, 1, 1), b.inner, 10));
    a.host.send(&good);
    assert_eq!(b.host.receive(TIMEOUT).as_ref(), Some(&good));
    b.dropped("wrong_source", 2);
}

#[test]
fn a_source_that_two_peers_share_is_taken_from_both_and_a_longer_prefix_from_its_owner_alone() {
    let (_network, a, b) = friends();
    a.apply_with([(b.key(), b.entry())], OwnNetworks::new([], [net("10.0.0.0/8")], []));
    let third = WireguardKey(PublicKey::from(&StaticSecret::from([3; 32])).to_bytes());
    let shares = PeerEntry { shared_sources: vec![net("10.7.0.0/16")], ..a.entry() };
    let carries = PeerEntry {
        prefixes: vec![net("10.7.0.0/16"), net("10.7.7.0/24")],
        endpoint: None,
        ..a.entry()
    };
    b.apply([(a.key(), shares), (third, carries)]);
    let from = |subnet, last| packet_from(Ipv4Addr::new(10, 7, subnet, last), b.inner, 10);
    // The result for one source is not used for the next one.
    for (count, last) in (1..=3).zip(1..) {
        a.host.send(&from(1, last));
        a.host.send(&from(1, last));
        a.host.send(&from(7, last));
        assert_eq!(b.host.receive(TIMEOUT), Some(from(1, last)));
        assert_eq!(b.host.receive(TIMEOUT), Some(from(1, last)));
        b.dropped("wrong_source", count);
    }
}

#[test]
fn what_is_for_somebody_else_is_dropped_and_counted() {
    let (_network, a, b) = friends();
    let everywhere = ["0.0.0.0/1", "128.0.0.0/1"].map(net).to_vec();
    let to_b = PeerEntry { prefixes: everywhere.clone(), ..b.entry() };
    a.apply([(b.key(), to_b)]);
    let to = |octets: [u8; 4]| packet_from(a.inner, octets.into(), 10);
    let own = OwnNetworks::new([b.inner.into()], [net("192.168.77.0/24")], []);
    b.apply_with([(a.key(), a.entry())], own);
    let foreign = [
        [10, 0, 0, 3],
        [192, 168, 78, 1],
        [192, 168, 77, 255],
        [8, 8, 8, 8],
        [127, 0, 0, 1],
        [169, 254, 169, 254],
        [224, 0, 0, 1],
        [255, 255, 255, 255],
        [0, 0, 0, 0],
    ];
    for (count, octets) in (1..).zip(foreign) {
        a.host.send(&to(octets));
        b.dropped("wrong_destination", count);
    }
    for good in [[192, 168, 77, 1], b.inner.octets()] {
        a.host.send(&to(good));
        assert_eq!(b.host.receive(TIMEOUT), Some(to(good)));
    }

    // Special addresses are dropped even if the node forwards to every network.
    let own = OwnNetworks::new([], [], everywhere);
    b.apply_with([(a.key(), a.entry())], own);
    a.host.send(&to([8, 8, 8, 8]));
    assert_eq!(b.host.receive(TIMEOUT), Some(to([8, 8, 8, 8])));
    for (count, octets) in (foreign.len() as u64 + 1..).zip(&foreign[4..]) {
        a.host.send(&to(*octets));
        b.dropped("wrong_destination", count);
    }

    // No destination is accepted while no own network is known.
    let before = b.drops("wrong_destination");
    b.apply_with([(a.key(), a.entry())], OwnNetworks::default());
    a.host.send(&to(b.inner.octets()));
    b.dropped("wrong_destination", before + 1);
}

#[test]
fn what_somebody_else_sends_into_the_tunnel_is_dropped_and_counted() {
    let (network, a, b) = friends();
    let before = network.seen().len();
    let foreign = packet_from(Ipv4Addr::new(10, 9, 1, 7), b.inner, 10);
    a.host.send(&foreign);
    a.dropped("foreign_source", 1);
    // A source in a network that the node only forwards to is dropped too.
    let own = OwnNetworks::new([a.inner.into()], [], [net("10.9.0.0/16")]);
    a.apply_with([(b.key(), b.entry())], own);
    a.host.send(&foreign);
    a.dropped("foreign_source", 2);
    assert_eq!(network.seen().len(), before);

    // Static peers are exempt from the check of the source.
    a.apply([(b.key(), PeerEntry { is_static: true, ..b.entry() })]);
    let wide = PeerEntry { prefixes: vec![net("10.0.0.0/8")], ..a.entry() };
    b.apply([(a.key(), wide)]);
    a.host.send(&foreign);
    assert_eq!(b.host.receive(TIMEOUT).as_ref(), Some(&foreign));
    assert_eq!(a.drops("foreign_source"), 2);
}

#[test]
fn what_no_peer_holds_is_dropped_and_counted() {
    let (network, a, _b) = friends();
    let before = network.seen().len();
    a.host.send(&packet_from(a.inner, Ipv4Addr::new(10, 9, 9, 9), 10));
    a.dropped("no_route", 1);
    a.host.send(&[0x45, 0, 0, 60]);
    a.host.send(&[]);
    a.dropped("inner_malformed", 2);
    assert_eq!(network.seen().len(), before);
}

#[test]
fn a_new_table_keeps_the_sessions_of_those_who_stay() {
    let (network, a, b) = friends();
    let other = WireguardKey(PublicKey::from(&StaticSecret::from([9; 32])).to_bytes());
    let another = PeerEntry { prefixes: vec!["10.0.9.0/24".parse().unwrap()], ..a.entry() };
    let more = PeerEntry {
        prefixes: vec!["10.0.0.2/32".parse().unwrap(), "10.5.0.0/16".parse().unwrap()],
        ..b.entry()
    };
    a.apply([(b.key(), more), (other, another)]);
    carries(&a, &b, 10);
    carries(&b, &a, 10);
    a.apply([(b.key(), b.entry())]);
    carries(&b, &a, 10);
    assert_eq!(of_type(&network.seen(), 1).len(), 1, "one handshake served all tables");
    // A peer that was removed is unknown.
    b.apply([]);
    a.host.send(&packet(&a, &b, 10));
    b.dropped("unknown_index", 1);
    a.plane.handshake(b.key(), vec![b.address.into()]);
    b.dropped("unknown_peer", 1);
}

#[test]
fn another_path_of_a_peer_takes_its_traffic_in_the_same_session() {
    let (network, a, b) = friends();
    carries(&a, &b, 10);
    let elsewhere = SocketAddr::from(([203, 0, 113, 5], 1024));
    let (redirecting, address) = (network.clone(), b.address);
    network.filter(move |datagram| {
        let is_redirected = datagram.to == elsewhere;
        if is_redirected {
            let (network, datagram) =
                (redirecting.clone(), Datagram { to: address, ..datagram.clone() });
            std::thread::spawn(move || network.inject(datagram));
        }
        !is_redirected
    });
    let path = PeerPath { endpoint: Some(elsewhere.into()), ..b.entry().path() };
    a.plane.apply_path(&b.key(), path);
    carries(&a, &b, 10);
    assert!(network.seen().iter().any(|datagram| datagram.to == elsewhere));
    assert_eq!(of_type(&network.seen(), 1).len(), 1, "one handshake served both paths");
    // A peer that is not in the table gets no path.
    b.apply([]);
    b.plane.apply_path(&a.key(), path);
    assert!(b.plane.snapshot().peers.is_empty());
}

#[test]
fn a_preshared_key_must_be_the_same_on_both_sides() {
    let (_network, mut a, b) = strangers();
    let psk = |byte| Some(PresharedKey([byte; 32]));
    a.apply([(b.key(), PeerEntry { preshared_key: psk(5), ..b.entry() })]);
    b.apply([(a.key(), PeerEntry { preshared_key: psk(6), ..a.entry() })]);
    a.plane.handshake(b.key(), vec![b.address.into()]);
    a.dropped("invalid_handshake", 1);
    b.apply([(a.key(), PeerEntry { preshared_key: psk(5), ..a.entry() })]);
    // A second command with the same addresses would be ignored, so another address is added.
    a.plane.handshake(
        b.key(),
        vec![b.address.into(), SocketAddr::from(([198, 51, 100, 9], 9)).into()],
    );
    a.observed(b.key(), |what| matches!(what, Observation::Handshake { .. }));
    carries(&a, &b, 10);
    carries(&b, &a, 10);
}

#[test]
fn a_preshared_key_changes_without_a_gap() {
    let (network, mut a, b) = friends();
    let psk = Some(PresharedKey([5; 32]));
    a.apply([(b.key(), PeerEntry { preshared_key: psk.clone(), ..b.entry() })]);
    carries(&a, &b, 10);
    carries(&b, &a, 10);
    b.apply([(a.key(), PeerEntry { preshared_key: psk, ..a.entry() })]);
    carries(&a, &b, 10);
    carries(&b, &a, 10);
    assert_eq!(of_type(&network.seen(), 1).len(), 1, "on the previous session");
    a.plane.handshake(b.key(), vec![b.address.into()]);
    a.observed(b.key(), |what| matches!(what, Observation::Handshake { .. }));
    carries(&a, &b, 10);
    carries(&b, &a, 10);
    assert_eq!(of_type(&network.seen(), 1).len(), 2);
    let before = network.seen();
    carries(&a, &b, 10);
    let receiver = |datagram: &Datagram| datagram.bytes[4..8].to_vec();
    let (first, last) = (of_type(&before, 4)[0].clone(), network.seen().pop().unwrap());
    assert_ne!(receiver(&first), receiver(&last), "on the new session");
}

#[test]
fn a_node_whose_clock_was_set_back_returns_when_its_boot_epoch_grows() {
    let (network, a, mut b) = strangers();
    a.plane.handshake(b.key(), vec![b.address.into()]);
    b.observed(a.key(), |what| matches!(what, Observation::Handshake { .. }));
    let recorded = of_type(&network.seen(), 1)[0].clone();
    // An initiation that is not newer than the last one represents any initiation of a clock that
    // was set back.
    network.inject(recorded.clone());
    b.dropped("stale_handshake", 1);
    b.apply([(a.key(), PeerEntry { boot_epoch: 1, ..a.entry() })]);
    carries(&a, &b, 10);
    let answers = of_type(&network.seen(), 2).len();
    network.inject(recorded);
    b.plane.send(a.address.into(), &[0x50]);
    carries(&b, &a, 10);
    assert_eq!(of_type(&network.seen(), 2).len(), answers + 1, "the initiation is answered now");
    b.dropped("stale_handshake", 1);
}

#[test]
fn stun_is_handed_on() {
    let (network, a, mut b) = strangers();
    let stun = [&[1u8, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42][..], &[9; 12]].concat();
    network.inject(Datagram { from: a.address, to: b.address, bytes: stun.clone() });
    match b.event() {
        Event::Stun { from, datagram } => {
            assert_eq!((from, &*datagram), (a.address.into(), &*stun));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn junk_is_dropped_and_counted_and_harms_nobody() {
    let (network, a, b) = friends();
    let mut junk: Vec<Vec<u8>> = vec![
        vec![],
        vec![0xff; 1],
        vec![1, 0, 0, 0],
        vec![0; 65_507],
        [&[1u8, 0, 0, 0][..], &[0xaa; 144]].concat(),
        [&[2u8, 0, 0, 0][..], &[0xaa; 88]].concat(),
        [&[3u8, 0, 0, 0][..], &[0xaa; 60]].concat(),
        [&[4u8, 0, 0, 0][..], &[0xaa; 28]].concat(),
        [&[4u8, 0, 0, 0][..], &[0xaa; 27]].concat(),
        [&[4u8, 0, 0, 0][..], &[0xaa; 65_503]].concat(),
    ];
    // Real datagrams with a changed bit, and truncated ones.
    carries(&a, &b, 100);
    for datagram in network.seen().iter().filter(|datagram| datagram.to == b.address) {
        for at in (0..datagram.bytes.len()).step_by(7) {
            let mut bytes = datagram.bytes.clone();
            bytes[at] ^= 0x10;
            junk.push(bytes);
            junk.push(datagram.bytes[..at].to_vec());
        }
    }
    let before: u64 = b.plane.snapshot().drops.values().sum();
    for (port, bytes) in junk.iter().enumerate() {
        let from = SocketAddr::from(([203, 0, 113, 7], port as u16));
        network.inject(Datagram { from, to: b.address, bytes: bytes.clone() });
    }
    carries(&a, &b, 100);
    carries(&b, &a, 100);
    let dropped = b.plane.snapshot().drops.values().sum::<u64>() - before;
    assert_eq!(dropped as usize, junk.len(), "{:?}", b.plane.snapshot().drops);
}

#[test]
fn a_counter_near_its_end_is_refused() {
    let (network, a, b) = friends();
    carries(&a, &b, 10);
    let mut datagram = network.seen().pop().unwrap();
    datagram.bytes[8..16].copy_from_slice(&(u64::MAX - 100).to_le_bytes());
    network.inject(datagram);
    b.dropped("counter_exhausted", 1);
    carries(&a, &b, 10);
}

#[test]
fn one_loud_source_is_limited_before_its_handshakes_cost_anything() {
    let (network, a, mut b) = strangers();
    let loud = SocketAddr::from(([203, 0, 113, 1], 1));
    a.plane.handshake(b.key(), vec![SocketAddr::from(([198, 51, 100, 9], 9)).into()]);
    while network.seen().is_empty() {
        std::thread::yield_now();
    }
    let mut initiation = network.seen()[0].bytes.clone();
    initiation[140] ^= 1;
    initiation[120] ^= 1;
    let begun = Instant::now();
    for _ in 0..1000 {
        let bytes = initiation.clone();
        network.inject(Datagram { from: loud, to: b.address, bytes });
    }
    a.plane.handshake(b.key(), vec![b.address.into()]);
    b.observed(a.key(), |what| matches!(what, Observation::Handshake { .. }));
    // A source may send 128 at once, and 64 in each second.
    let admitted = 128 + 64 * (begun.elapsed().as_secs() + 1);
    let limited = b.drops("source_limited");
    assert!(limited + admitted >= 1000, "{:?}", b.plane.snapshot().drops);
    assert_eq!(b.drops("under_load"), 0);
}

#[test]
fn a_forged_address_of_a_peer_does_not_keep_it_out() {
    let (network, a, mut b) = strangers();
    // An unknown node sends well-formed initiations.
    let forger = Secrets::new(StaticSecret::from([77; 32]));
    let mut initiation = [0; HANDSHAKE_BYTES];
    let mut session = Session::new(&forger, b.key(), None, 1);
    let len = Inputs::system(Instant::now(), |inputs| session.initiate(inputs, &mut initiation));
    let (key, target, owner, plane) = (b.key(), b.address, a.address, &a.plane);
    let (network, stop) = (&network, &AtomicBool::new(false));
    let flooded = b.plane.clone();
    let refused = move || flooded.snapshot().drops.values().sum::<u64>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..100 {
                    let bytes = initiation[..len].to_vec();
                    network.inject(Datagram { from: owner, to: target, bytes });
                }
                sent += 100;
                std::thread::sleep(Duration::from_millis(5));
                // A slow worker gets no more than it can refuse: in memory, its queue has no end.
                while refused() + 100 < sent && !stop.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
            }
        });
        // First the forger must exceed the limit of that address.
        while b.drops("source_limited") == 0 {
            std::thread::yield_now();
        }
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // The first initiation gets a cookie, the next one uses it.
                plane.handshake(key, vec![target.into()]);
                std::thread::sleep(Duration::from_millis(250));
            }
        });
        b.observed(a.key(), |what| matches!(what, Observation::Handshake { .. }));
        stop.store(true, Ordering::Relaxed);
    });
    let cookies = |d: &Datagram| d.to == owner && d.bytes.first() == Some(&3);
    assert!(network.seen().iter().any(cookies));
}

#[test]
fn keepalives_fill_a_silence_and_nothing_else() {
    let (network, a, b) = friends();
    let keepalive = Some(Duration::from_millis(300));
    a.apply([(b.key(), PeerEntry { keepalive, ..b.entry() })]);
    let keepalives = |network: &Network| {
        let seen = network.seen();
        seen.iter().filter(|d| d.from == a.address && d.bytes.len() == 32).count()
    };
    let before = keepalives(&network);
    let deadline = std::time::Instant::now() + TIMEOUT;
    while keepalives(&network) < before + 2 {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert_eq!(of_type(&network.seen(), 1).len(), 1);
    assert!(network.seen().iter().all(|d| d.from != b.address || d.bytes.len() != 32));
}

#[test]
fn a_stopped_data_plane_is_silent() {
    let (network, a, b) = friends();
    b.plane.stop().unwrap();
    let before = network.seen().len();
    a.plane.handshake(b.key(), vec![b.address.into()]);
    while network.seen().len() == before {
        std::thread::yield_now();
    }
    assert!(network.seen().iter().skip(before).all(|datagram| datagram.from == a.address));
}

#[test]
fn packets_that_wait_for_a_peer_that_is_removed_are_counted() {
    let (_network, mut a, b) = strangers();
    a.host.send(&packet(&a, &b, 100));
    a.host.send(&packet(&a, &b, 100));
    a.observed(b.key(), |what| what == Observation::Wanted);
    a.apply([]);
    a.host.send(&packet(&a, &b, 100));
    let deadline = Instant::now() + TIMEOUT;
    let lost = || a.drops("queue_expired") + a.drops("no_route");
    while lost() < 3 {
        assert!(Instant::now() < deadline, "{:?}", a.plane.snapshot());
        std::thread::yield_now();
    }
    assert_eq!(lost(), 3);
}
