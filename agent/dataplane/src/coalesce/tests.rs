use super::*;
use crate::arena::{HEADROOM, TAILROOM};
use crate::headers::PROTOCOL_UDP;
use crate::split::Split;
use crate::testing::{Recipe, Tcp};
use proptest::prelude::*;
use towline_wireguard::Segments;

const BOTH: Coalesce =
    Coalesce { tcp: true, udp: true, tunnels: [VXLAN, GENEVE, 0, 0], whole: [0; 4] };

const VXLAN: u16 = 8_472;
const GENEVE: u16 = 6_081;

/// Returns the frames into which the packets are coalesced.
fn coalesce(packets: &[Vec<u8>]) -> Vec<(VnetHeader, Vec<u8>)> {
    coalesce_as(BOTH, packets)
}

fn coalesce_as(allowed: Coalesce, packets: &[Vec<u8>]) -> Vec<(VnetHeader, Vec<u8>)> {
    let mut batch = WriteBatch::new(8);
    let mut coalescer = Coalescer::new(allowed);
    let mut at = 0;
    for packet in packets {
        at += 16;
        batch.bytes_mut()[at..at + packet.len()].copy_from_slice(packet);
        let inner = IpHeader::parse(packet).unwrap();
        coalescer.add(&mut batch, at, &inner);
        at += packet.len() + 16;
    }
    coalescer.finish(&mut batch);
    let read = |frame| batch.pieces(frame).collect::<Vec<_>>().concat();
    batch.frames().iter().map(|frame| (frame.header, read(frame))).collect()
}

fn split(frames: &[(VnetHeader, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    for (header, frame) in frames {
        let mut bytes = vec![0; HEADROOM];
        bytes.extend_from_slice(frame);
        bytes.extend_from_slice(&[0; TAILROOM]);
        let mut split = Split::new(&mut bytes, frame.len(), header, usize::MAX).unwrap();
        while split.next_len().is_some() {
            let padded = split.take();
            let len = IpHeader::parse(padded).unwrap().total_len;
            packets.push(padded[..len].to_vec());
        }
    }
    packets
}

fn stream(flow: u8, tcp: bool, v6: bool, sizes: &[usize]) -> Vec<Recipe> {
    let address = |last: u8| match v6 {
        false => IpAddr::from([10, 0, 0, last]),
        true => IpAddr::from([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]),
    };
    let mut sequence = u32::MAX - 3000;
    let each = sizes.iter().enumerate().map(|(number, size)| {
        let recipe = Recipe {
            source: address(flow),
            destination: address(200),
            ports: (1000 + u16::from(flow), 443),
            tcp: tcp.then(|| Tcp {
                sequence,
                acknowledged: 77,
                flags: TCP_ACK,
                window: 500,
                options: vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
            }),
            identification: (65_530 + number) as u16,
            traffic_class: 0,
            hops: 64,
            payload: (0..*size).map(|at| (at + number) as u8).collect(),
        };
        sequence = sequence.wrapping_add(*size as u32);
        recipe
    });
    each.collect()
}

#[test]
fn a_bulk_stream_becomes_one_frame() {
    for (tcp, v6, gso_type) in [
        (true, false, GSO_TCPV4),
        (true, true, GSO_TCPV6),
        (false, false, GSO_UDP_L4),
        (false, true, GSO_UDP_L4),
    ] {
        let packets: Vec<_> = stream(1, tcp, v6, &[[1300; 39].as_slice(), &[200]].concat())
            .iter()
            .map(Recipe::build)
            .collect();
        let frames = coalesce(&packets);
        assert_eq!(frames.len(), 1, "tcp {tcp} v6 {v6}");
        assert_eq!(frames[0].0.gso_type, gso_type);
        assert_eq!(frames[0].0.gso_size, 1300);
        assert_eq!(split(&frames), packets);
    }
}

#[test]
fn datagrams_without_checksums_are_joined_over_ipv4_alone() {
    for v6 in [false, true] {
        let mut packets: Vec<_> =
            stream(1, false, v6, &[1000; 5]).iter().map(Recipe::build).collect();
        let at = if v6 { 46 } else { 26 };
        for packet in &mut packets {
            packet[at..at + 2].fill(0);
        }
        let frames = coalesce(&packets);
        assert_eq!(frames.len(), if v6 { 5 } else { 1 });
        let got: Vec<_> = split(&frames).into_iter().map(with_checksum).collect();
        let expected: Vec<_> = packets.into_iter().map(with_checksum).collect();
        assert_eq!(got, expected);
    }
}

#[test]
fn a_wrong_checksum_is_never_blessed() {
    for wrong in 0..3 {
        let mut packets: Vec<_> =
            stream(1, true, false, &[1000; 3]).iter().map(Recipe::build).collect();
        let last = packets[wrong].len() - 1;
        packets[wrong][last] ^= 1;
        let frames = coalesce(&packets);
        assert!(frames.len() > 1);
        let alone = frames.iter().find(|(_, frame)| *frame == packets[wrong]);
        assert_eq!(alone.unwrap().0, VnetHeader::default());
        assert_eq!(split(&frames), packets);
    }
}

#[test]
fn what_differs_in_a_header_is_not_joined() {
    let change: [fn(&mut Recipe); 9] = [
        |recipe| recipe.hops = 63,
        |recipe| recipe.traffic_class = 4,
        |recipe| recipe.identification = 9,
        |recipe| recipe.ports.0 = 9,
        |recipe| recipe.tcp.as_mut().unwrap().acknowledged = 9,
        |recipe| recipe.tcp.as_mut().unwrap().window = 9,
        |recipe| recipe.tcp.as_mut().unwrap().sequence ^= 1 << 20,
        |recipe| recipe.tcp.as_mut().unwrap().options[7] = 9,
        |recipe| recipe.tcp.as_mut().unwrap().flags = TCP_ACK | 1,
    ];
    for (number, change) in change.iter().enumerate() {
        let mut recipes = stream(1, true, false, &[1000; 2]);
        change(&mut recipes[1]);
        let packets: Vec<_> = recipes.iter().map(Recipe::build).collect();
        let frames = coalesce(&packets);
        assert_eq!(frames.len(), 2, "change {number}");
        assert_eq!(split(&frames), packets);
    }
}

/// Returns the packets, each encapsulated in a tunnel of the host with destination port `port`.
fn in_tunnel(from: u8, port: u16, checksum: bool, v6: bool, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let each = packets.iter().enumerate().map(|(number, inner)| {
        let mut payload = match port {
            GENEVE => vec![2, 0, 0x65, 0x58, 0, 0, 7, 0, 1, 2, 3, 4, 5, 6, 7, 8],
            _ => vec![8, 0, 0, 0, 0, 0, 7, 0],
        };
        payload.extend_from_slice(&[2; 12]);
        payload.extend_from_slice(if inner[0] >> 4 == 4 { &[8, 0] } else { &[0x86, 0xdd] });
        payload.extend_from_slice(inner);
        let address = |last: u8| match v6 {
            false => IpAddr::from([192, 0, 2, last]),
            true => IpAddr::from([0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]),
        };
        let mut packet = Recipe {
            source: address(from),
            destination: address(200),
            ports: (50_000, port),
            tcp: None,
            identification: number as u16,
            traffic_class: 0,
            hops: 64,
            payload,
        }
        .build();
        if !checksum && !v6 {
            packet[26..28].fill(0);
        }
        packet
    });
    each.collect()
}

#[test]
fn a_stream_in_a_tunnel_of_the_host_becomes_one_frame() {
    for case in 0..16u8 {
        let [v6, geneve, checksum, over_v6] = [1, 2, 4, 8].map(|bit| case & bit != 0);
        let inner: Vec<_> =
            stream(1, true, v6, &[1300, 1300, 1300, 200]).iter().map(Recipe::build).collect();
        let port = if geneve { GENEVE } else { VXLAN };
        let packets = in_tunnel(1, port, checksum, over_v6, &inner);
        let frames = coalesce(&packets);
        assert_eq!(frames.len(), 1, "case {case}");
        let (header, _) = &frames[0];
        let inside = if v6 { GSO_TCPV6 } else { GSO_TCPV4 };
        let around = if over_v6 { GSO_TUNNEL_V6 } else { GSO_TUNNEL_V4 };
        assert_eq!(header.gso_type, inside | around);
        assert_eq!(header.flags & FLAG_TUNNEL_CSUM != 0, checksum || over_v6);
        assert_eq!(header.gso_size, 1300);
        assert_eq!(header.outer_transport, if over_v6 { 40 } else { 20 });
        assert_eq!(split(&frames), packets);
    }
}

#[test]
fn what_is_in_no_tunnel_of_the_host_is_joined_as_datagrams() {
    let inner: Vec<_> = stream(1, true, false, &[1300; 4]).iter().map(Recipe::build).collect();
    let frames = coalesce(&in_tunnel(1, 4_789, true, false, &inner));
    assert_eq!(frames.len(), 1);
    assert_eq!(frames[0].0.gso_type, GSO_UDP_L4);
}

/// A kernel without super-packets in UDP tunnels: a VXLAN socket would get one that it cannot take apart.
#[test]
fn datagrams_of_a_tunnel_of_the_host_are_written_alone_without_its_offload() {
    let inner: Vec<_> = stream(1, true, false, &[1300; 4]).iter().map(Recipe::build).collect();
    for port in [VXLAN, GENEVE] {
        let packets = in_tunnel(1, port, true, false, &inner);
        let without = Coalesce { tunnels: [0; 4], whole: [VXLAN, GENEVE, 0, 0], ..BOTH };
        assert_eq!(coalesce_as(without, &packets).len(), packets.len());
    }
}

#[test]
fn a_segment_in_a_tunnel_that_differs_is_written_alone() {
    let inner: Vec<_> = stream(1, true, false, &[1000; 3]).iter().map(Recipe::build).collect();
    // Bytes of the outer time to live, the network identifier, a hardware address, the inner
    // payload, the inner header checksum, and the outer checksum.
    let places = [(8, false), (34, false), (40, false), (600, false), (60, false), (27, true)];
    for (at, checksum) in places {
        let mut packets = in_tunnel(1, VXLAN, checksum, false, &inner);
        packets[1][at] ^= 1;
        if at == 8 {
            packets[1][10..12].fill(0);
            let sum = !checksum::fold(checksum::add(0, &packets[1][..20]));
            packets[1][10..12].copy_from_slice(&sum.to_be_bytes());
        }
        let frames = coalesce(&packets);
        assert_eq!(frames.len(), 3, "byte {at}");
        assert_eq!(split(&frames), packets);
    }
}

#[test]
fn a_fragment_is_not_overtaken() {
    let mut packets: Vec<_> =
        stream(1, false, false, &[500; 3]).iter().map(Recipe::build).collect();
    packets[1][6] = 0x20;
    packets[1][10..12].fill(0);
    let sum = !checksum::fold(checksum::add(0, &packets[1][..20]));
    packets[1][10..12].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(split(&coalesce(&packets)), packets);
}

/// Change of each packet: the field to change, and its new value.
type Changes = Vec<(u8, u8)>;
/// Parameters of a flow: TCP, IPv6, payload size and changes; and inside a tunnel also Geneve,
/// outer checksum, and outer IPv6.
type Spec = (bool, bool, usize, Changes, Option<(bool, bool, bool)>);

prop_compose! {
    fn flows()(
        flows in proptest::collection::vec(
            (
                any::<bool>(),
                any::<bool>(),
                1usize..1400,
                proptest::collection::vec((0u8..12, any::<u8>()), 1..30),
                proptest::option::of(any::<(bool, bool, bool)>()),
            ),
            1..5,
        ),
    ) -> Vec<Vec<Vec<u8>>> {
        let build = |(flow, spec): (usize, Spec)| {
            let (tcp, v6, size, changes, tunnel) = spec;
            let sizes: Vec<usize> = changes
                .iter()
                .map(|(what, value)| if *what == 0 { usize::from(*value) } else { size })
                .collect();
            let mut recipes = stream(flow as u8, tcp, v6, &sizes);
            for (recipe, (what, value)) in recipes.iter_mut().zip(&changes) {
                match (what, &mut recipe.tcp) {
                    (1, _) => recipe.hops = *value,
                    (2, _) => recipe.traffic_class = *value,
                    (3, _) => recipe.identification ^= u16::from(*value),
                    (4, Some(tcp)) => tcp.flags = *value,
                    (5, Some(tcp)) => tcp.sequence ^= u32::from(*value),
                    (6, Some(tcp)) => tcp.flags |= TCP_PSH,
                    (7, Some(tcp)) => tcp.options.truncate(usize::from(value % 4) * 4),
                    _ => {}
                }
            }
            let mut packets: Vec<_> = recipes.iter().map(Recipe::build).collect();
            for (packet, (what, value)) in packets.iter_mut().zip(&changes) {
                let last = packet.len() - 1;
                match what {
                    8 => packet[last] ^= value,
                    9 if !v6 => packet[7] = *value,
                    10 if !tcp => {
                        let at = if v6 { 46 } else { 26 };
                        packet[at..at + 2].fill(0);
                    }
                    _ => {}
                }
            }
            match tunnel {
                Some((geneve, checksum, over_v6)) => {
                    let port = if geneve { GENEVE } else { VXLAN };
                    in_tunnel(flow as u8, port, checksum, over_v6, &packets)
                }
                None => packets,
            }
        };
        flows.into_iter().enumerate().map(build).collect()
    }
}

/// Returns the packet with a UDP checksum, which is optional over IPv4.
fn with_checksum(mut packet: Vec<u8>) -> Vec<u8> {
    let is_udp = packet[0] == 0x45 && packet[9] == PROTOCOL_UDP;
    if is_udp && packet[6] & 0x3f == 0 && packet[7] == 0 && packet[26..28] == [0, 0] {
        let inner = IpHeader::parse(&packet).unwrap();
        let pseudo = checksum::pseudo(&inner.source, &inner.destination, PROTOCOL_UDP);
        let sum = checksum::add(pseudo + (packet.len() - 20) as u64, &packet[20..]);
        packet[26..28].copy_from_slice(&(!checksum::fold(sum)).to_be_bytes());
    }
    packet
}

/// Returns the packet without the IPv4 identification, if fragmentation is forbidden. The
/// identification has no meaning then (RFC 6864 section 4.1): packets with a constant value are
/// coalesced, and splitting increments it. In a tunnel also clears the outer checksum, which covers
/// the identification.
fn without_atomic_identification(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let udp = if packet[0] >> 4 == 4 { 20 } else { 40 };
    let inside = match u16::from_be_bytes([packet[udp + 2], packet[udp + 3]]) {
        VXLAN => Some(udp + 8 + 8 + 14),
        GENEVE => Some(udp + 8 + 16 + 14),
        _ => None,
    };
    for at in std::iter::once(0).chain(inside) {
        if packet[at] >> 4 == 4 && packet[at + 6] & 0x40 != 0 {
            packet[at + 4..at + 6].fill(0);
            packet[at + 10..at + 12].fill(0);
        }
    }
    if inside.is_some() {
        packet[udp + 6..udp + 8].fill(0);
    }
    packet
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn splitting_what_was_joined_gives_the_same_packets(
        flows in flows(),
        picks in proptest::collection::vec(any::<prop::sample::Index>(), 150),
    ) {
        let mut left: Vec<_> = flows.iter().map(|flow| flow.iter()).collect();
        let mut mixed = Vec::new();
        for pick in picks {
            let at = pick.index(left.len());
            mixed.extend(left[at].next().cloned());
        }
        let got = split(&coalesce(&mixed));
        prop_assert_eq!(got.len(), mixed.len());
        // Each flow has its own source address.
        let source = |packet: &Vec<u8>| IpHeader::parse(packet).unwrap().source;
        for flow in &flows {
            let of_flow = |packets: &[Vec<u8>]| -> Vec<Vec<u8>> {
                let same = packets.iter().filter(|p| source(p) == source(&flow[0]));
                same.map(|packet| without_atomic_identification(packet))
                    .map(with_checksum)
                    .collect()
            };
            prop_assert_eq!(of_flow(&got), of_flow(&mixed));
        }
    }
}
