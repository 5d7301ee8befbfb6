//! Fuzz targets: plain functions of bytes that must not panic, and that assert what they promise.
//!
//! `tests/fuzz` calls each from libFuzzer; `cargo test` calls each with the committed corpus, with
//! the well-formed inputs of [`Target::seeds`], and with thousands of mutations of both.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use prost::Message as _;
use towline_core::mesh::{MapChange, Output};
use towline_core::path::{Path, Source};
use towline_core::peer_table::Observation;
use towline_dataplane::arena::{HEADROOM, TAILROOM, WriteBatch};
use towline_dataplane::checksum;
use towline_dataplane::coalesce::{Coalesce, Coalescer};
use towline_dataplane::headers::IpHeader;
use towline_dataplane::split::Split;
use towline_dataplane::vnet::{VNET_HEADER_BYTES, VnetHeader};
use towline_fixtures::ca::Ca;
use towline_fixtures::node::{record, tombstone_of};
use towline_proto::frame::{DatagramKind, Probe, ProbeHeader, ProbeVersion, Stamp, relayed};
use towline_proto::id::WireguardKey;
use towline_proto::limits;
use towline_proto::node::{Candidate, CandidateKind, Grant, MeshConfig, Node, Record, Tombstone};
use towline_proto::pb;
use towline_proto::signed::{self, Domain};
use towline_proto::stun::behaviour::{Change, Request as BehaviourRequest, ServerAddresses};
use towline_proto::stun::{self, Message as StunMessage};
use towline_proto::token::JoinToken;
use towline_wireguard::{DATA_HEADER, MessageKind, Segments};

use crate::sim::host::{self, Host};
pub use aead::aead;
pub use files::{files, request, stored, uapi};
pub use kernel::{netlink, nftables};
pub use pipeline::{pipeline, pipeline_batch};
pub use probe_session::probe_session;
pub use relay::relay;
pub use wireguard::wireguard;

mod aead;
mod files;
mod kernel;
mod pipeline;
mod probe_session;
mod relay;
mod wireguard;

/// A function of bytes, with inputs to start from.
pub struct Target {
    /// Name of the target, of its corpus and of its libFuzzer target.
    pub name: &'static str,
    /// Function under test.
    pub run: fn(&[u8]),
    /// Returns well-formed inputs.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All fuzz targets.
pub const TARGETS: &[Target] = &[
    Target { name: "signed", run: signed, seeds: signed_seeds },
    Target { name: "map", run: map, seeds: map_seeds },
    Target { name: "token", run: token, seeds: token_seeds },
    Target { name: "probe", run: probe, seeds: probe_seeds },
    Target { name: "probe_session", run: probe_session, seeds: probe_session::seeds },
    Target { name: "datagram", run: datagram, seeds: datagram_seeds },
    Target { name: "inner", run: inner, seeds: inner_seeds },
    Target { name: "coalesce", run: coalesce, seeds: coalesce_seeds },
    Target { name: "pipeline", run: pipeline, seeds: pipeline::seeds },
    Target { name: "pipeline_batch", run: pipeline_batch, seeds: pipeline::seeds },
    Target { name: "wireguard", run: wireguard, seeds: wireguard::seeds },
    Target { name: "mesh", run: mesh, seeds: mesh_seeds },
    Target { name: "relay", run: relay, seeds: relay::seeds },
    Target { name: "helper", run: helper, seeds: helper_seeds },
    Target { name: "aead", run: aead, seeds: aead::seeds },
    Target { name: "stun", run: stun, seeds: stun_seeds },
    Target { name: "netlink", run: netlink, seeds: kernel::netlink_seeds },
    Target { name: "nftables", run: nftables, seeds: kernel::nftables_seeds },
    Target { name: "files", run: files, seeds: files::files_seeds },
    Target { name: "stored", run: stored, seeds: files::stored_seeds },
    Target { name: "request", run: request, seeds: files::request_seeds },
    Target { name: "uapi", run: uapi, seeds: files::uapi_seeds },
];

/// Decodes a body that is signed by the right key and may contain any bytes. The first byte selects
/// the kind of body.
///
/// An accepted body respects its bounds and decodes again to the same value.
pub fn signed(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else { return };
    let domain = match kind % 5 {
        0 => Domain::Grant,
        1 => Domain::Record,
        2 => Domain::Tombstone,
        3 => Domain::Mesh,
        _ => Domain::Head,
    };
    let signed = CA.sign_bytes(domain, body);
    let signed = Some(&signed);
    match domain {
        Domain::Grant => {
            if let Ok(grant) = signed::grant(signed, &CA.public()) {
                assert!(grant.allowed_prefixes.len() <= limits::PREFIXES);
                for range in &grant.pod_ranges {
                    assert!(range.pinned().len() <= range.blocks() as usize);
                    assert!(range.pinned().iter().all(|block| range.range().contains(block)));
                }
                assert!(!grant.wireguard_keys.is_empty());
                let again = CA.sign_bytes(domain, &pb::Grant::from(&grant).encode_to_vec());
                assert_eq!(signed::grant(Some(&again), &CA.public()), Ok(grant));
            }
        }
        Domain::Record => {
            if let Ok(record) = signed::record(signed, &CA.public()) {
                assert!(record.candidates.len() <= limits::CANDIDATES);
                assert!(!record.version.contains(char::is_control));
                let again = CA.sign_bytes(domain, &pb::Record::from(&record).encode_to_vec());
                assert_eq!(signed::record(Some(&again), &CA.public()), Ok(record));
            }
        }
        Domain::Tombstone => {
            if let Ok(tombstone) = signed::tombstone(signed, &CA.public()) {
                let again = CA.sign_bytes(domain, &pb::Tombstone::from(&tombstone).encode_to_vec());
                assert_eq!(signed::tombstone(Some(&again), &CA.public()), Ok(tombstone));
            }
        }
        Domain::Mesh => {
            if let Ok(mesh) = signed::mesh(signed, &CA.public()) {
                let again = CA.sign_bytes(domain, &pb::MeshConfig::from(&mesh).encode_to_vec());
                assert_eq!(signed::mesh(Some(&again), &CA.public()), Ok(mesh));
            }
        }
        Domain::Head => {
            if let Ok(head) = signed::head(signed, &CA.public()) {
                let again = CA.sign_bytes(domain, &pb::Head::from(&head).encode_to_vec());
                assert_eq!(signed::head(Some(&again), &CA.public()), Ok(head));
            }
        }
    }
}

/// Decodes a message of the map, as the agent does.
///
/// Nothing in it is accepted unless the CA or the node signed it.
pub fn map(bytes: &[u8]) {
    // Peers send parts of the map, too.
    towline_agent::internals::removal_message(bytes);
    let Ok(message) = pb::WatchResponse::decode(bytes) else { return };
    let Some(pb::watch_response::Kind::Changes(changes)) = message.kind else { return };
    for change in changes.kinds().flatten() {
        match change {
            pb::change::Kind::Upsert(entry) => {
                if let Ok(Some(node)) = signed::node(&entry, &CA.public()) {
                    for prefix in &node.record().prefixes {
                        assert!(node.grant().allows(prefix));
                    }
                    assert!(node.grant().wireguard_keys.contains(&node.wireguard_key()));
                }
            }
            pb::change::Kind::Tombstone(tombstone) => {
                let _ = signed::tombstone(Some(&tombstone), &CA.public());
            }
            pb::change::Kind::Mesh(mesh) => {
                let _ = signed::mesh(Some(&mesh), &CA.public());
            }
        }
    }
}

/// Parses a join token as a person pastes it. A parsed token encodes to the same text.
pub fn token(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match text.parse::<JoinToken>() {
        Ok(token) => {
            assert!(!token.controllers.is_empty());
            assert_eq!(token.encode().parse(), Ok(token));
        }
        Err(error) => {
            // The message must not repeat the secret, and must not contain terminal control
            // characters.
            let message = error.to_string();
            assert!(!message.contains(char::is_control));
        }
    }
}

/// Decodes a probe, both its clear header and its opened part.
pub fn probe(bytes: &[u8]) {
    if let Some((header, sealed)) = ProbeHeader::decode(bytes) {
        assert!(bytes.starts_with(&header.encode()) && bytes.ends_with(sealed));
    }
    if let Some((stamp, rest)) = Stamp::decode(bytes) {
        assert_eq!([&stamp.encode()[..], rest].concat(), bytes);
    }
    if let Some(probe) = Probe::decode(bytes) {
        assert_eq!(Probe::decode(&probe.encode()), Some(probe));
    }
}

/// Classifies a datagram of the WireGuard port: at most one parser may claim it.
pub fn datagram(bytes: &[u8]) {
    let kind = DatagramKind::of(bytes);
    let wireguard = MessageKind::of(bytes).is_some();
    let probe = ProbeHeader::decode(bytes).is_some();
    assert!(!wireguard || kind == DatagramKind::WireGuard);
    assert!(!probe || kind == DatagramKind::Probe);
    assert!(relayed(bytes).is_none() || kind == DatagramKind::Relayed);
    let from = SocketAddr::from(([192, 0, 2, 1], 51830));
    if let Some((answer, len)) = stun::answer(bytes, from) {
        // A response is never longer than its request, and no response is answered again.
        assert!(len <= bytes.len() && stun::answer(&answer[..len], from).is_none());
    }
}

/// Decodes a STUN message, as the client does with what any host sends to the WireGuard port.
///
/// A decoded message is a bounded datagram with the cookie, and its transaction id is that of the
/// header. The answer to a decoded request states the address where it came from. That to a request about
/// the NAT's behaviour is not longer than the request.
pub fn stun(bytes: &[u8]) {
    let from = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 51_830));
    let behaviour = BehaviourRequest::decode(bytes);
    let server = ServerAddresses::decode(bytes);
    let Some(message) = StunMessage::decode(bytes) else {
        assert_eq!(behaviour, None);
        return;
    };
    let is_request = matches!(message, StunMessage::Request { .. });
    assert!(if is_request { server.is_none() } else { behaviour.is_none() });
    if let Some(request) = behaviour {
        let server = ServerAddresses { origin: from, other: from };
        let answer = request.answer(from, server);
        assert!(answer.len() <= bytes.len());
        assert_eq!(ServerAddresses::decode(&answer), Some(server));
        assert_eq!(BehaviourRequest::decode(&answer), None);
    }
    assert_eq!(DatagramKind::of(bytes), DatagramKind::Stun);
    let (StunMessage::Request { transaction } | StunMessage::Success { transaction, .. }) = message;
    assert_eq!(bytes.get(8..20), Some(&transaction[..]));
    match (message, stun::answer(bytes, from)) {
        (StunMessage::Request { .. }, Some((answer, len))) => {
            let mapped = StunMessage::Success { transaction, mapped: from };
            assert_eq!(StunMessage::decode(&answer[..len]), Some(mapped));
        }
        (StunMessage::Request { .. }, None) => assert!(bytes.len() < stun::ANSWER_BYTES),
        (StunMessage::Success { .. }, answer) => assert!(answer.is_none()),
    }
}

/// Parses a packet from the TUN (its virtio header, then the packet) and splits it.
///
/// The values that the parser returns are consistent, and no segment is longer than announced.
pub fn inner(bytes: &[u8]) {
    let Some((header, packet)) = bytes.split_first_chunk::<VNET_HEADER_BYTES>() else { return };
    if let Some(inner) = IpHeader::parse(packet) {
        assert!(inner.header_len <= inner.total_len && inner.total_len <= packet.len());
    }
    let mut buffer = vec![0; HEADROOM + packet.len() + TAILROOM];
    buffer[HEADROOM..HEADROOM + packet.len()].copy_from_slice(packet);
    let header = VnetHeader::decode(header);
    if let Ok(mut segments) = Split::new(&mut buffer, packet.len(), &header, 1_420) {
        let mut count = 0;
        while let Some(len) = segments.next_len() {
            assert_eq!(segments.take().len(), len);
            count += 1;
            assert!(count <= packet.len().max(1), "a segment carries something");
        }
    }
}

/// Coalesces decrypted packets, each preceded by its length (two bytes, little-endian), then splits
/// them.
///
/// The number of packets and of bytes stays the same.
pub fn coalesce(mut bytes: &[u8]) {
    const MOST: usize = 64;
    let mut batch = WriteBatch::new(8);
    let mut coalescer = Coalescer::new(Coalesce {
        tcp: true,
        udp: true,
        tunnels: [4789, 6081, 0, 0],
        whole: [0; 4],
    });
    let (mut at, mut went_in) = (0, Vec::new());
    while let Some((len, rest)) = bytes.split_first_chunk::<2>()
        && went_in.len() < MOST
    {
        let len = usize::from(u16::from_le_bytes(*len) % 2048).min(rest.len());
        let (packet, rest) = rest.split_at(len);
        bytes = rest;
        let Some(inner) = IpHeader::parse(packet) else { continue };
        // The layout of a decrypted datagram: after its WireGuard header, before its tag.
        at += DATA_HEADER;
        batch.bytes_mut()[at..at + len].copy_from_slice(packet);
        coalescer.add(&mut batch, at, &inner);
        at += len + DATA_HEADER;
        went_in.push(inner.total_len);
    }
    coalescer.finish(&mut batch);
    let mut came_out = Vec::new();
    for frame in batch.frames() {
        let joined = batch.pieces(frame).collect::<Vec<_>>().concat();
        assert_eq!(joined.len(), frame.len);
        let mut buffer = vec![0; HEADROOM + joined.len() + TAILROOM];
        buffer[HEADROOM..HEADROOM + joined.len()].copy_from_slice(&joined);
        let mut segments = Split::new(&mut buffer, joined.len(), &frame.header, usize::MAX)
            .expect("what was joined can be split");
        while segments.next_len().is_some() {
            let packet = segments.take();
            came_out.push(IpHeader::parse(packet).expect("a packet").total_len);
        }
    }
    went_in.sort_unstable();
    came_out.sort_unstable();
    assert_eq!(went_in, came_out);
}

/// Calls the core in the order that the bytes select.
///
/// A prefix is never assigned to two peers, a removed node does not come back, nothing is sent into
/// the overlay, and the number of datagrams sent is bounded by the number of calls.
pub fn mesh(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut now = *EPOCH;
    let mut mesh = Host::new(1, 1, host::mesh_config()).core(now);
    let mut removed = BTreeSet::new();
    let mut pings: Vec<(WireguardKey, Option<Path>, u64)> = Vec::new();
    let mut calls = 0u32;
    let mut sent = 0u32;
    while let Some(what) = input.byte() {
        calls += 1;
        match what % 10 {
            0 | 1 => mesh.handle_map_change(now, MapChange::Upsert(Box::new(input.node()))),
            2 => {
                let tombstone =
                    tombstone_of(&Host::new(input.host(), 1, host::mesh_config()).grant);
                if Some(tombstone.node_id) != mesh.grant().map(|grant| grant.node_id) {
                    removed.insert(tombstone.node_id);
                }
                mesh.handle_map_change(now, MapChange::Remove(tombstone));
            }
            3 => {
                let candidates = input.candidates();
                mesh.set_candidates(now, candidates);
            }
            4 => {
                let from = input.address().into();
                let what = match input.byte().unwrap_or(0) % 5 {
                    0 => Observation::Handshake { from },
                    1 => Observation::Roamed { from },
                    2 => Observation::HandshakeUnanswered,
                    3 => Observation::SessionExpired,
                    _ => Observation::Wanted,
                };
                mesh.handle_observation(now, input.key(), what);
            }
            5 => {
                let transaction = input.byte().unwrap_or(0).into();
                let source = Some(Source { path: input.address().into(), is_validated: false });
                let message = match transaction % 4 {
                    0 => Probe::Challenge { token: transaction },
                    1 => Probe::Proof { token: transaction },
                    _ => Probe::Ping { transaction },
                };
                mesh.handle_message(now, input.key(), source, message);
            }
            6 => {
                if let Some((peer, to, transaction)) = pings.pop() {
                    let pong = Probe::Pong { transaction, observed: input.address() };
                    let source = to.map(|path| Source { path, is_validated: false });
                    mesh.handle_message(now, peer, source, pong);
                }
            }
            7 => {
                let peer = Host::new(input.host(), 1, host::mesh_config()).id();
                mesh.ping(now, peer, calls.into(), Duration::from_secs(1));
            }
            8 => {
                let prefixes = input.prefixes();
                mesh.set_prefixes(now, prefixes);
            }
            _ => {
                now += Duration::from_millis(u64::from(input.byte().unwrap_or(0)) * 40);
                mesh.handle_timeout(now);
                assert!(mesh.poll_timeout().is_none_or(|(at, _)| at > now));
            }
        }
        while let Some(output) = mesh.poll_output() {
            check(&output, &mut sent);
            if let Output::Transmit(transmit) = output
                && let Probe::Ping { transaction } = transmit.message
            {
                pings.push((transmit.peer, transmit.path, transaction));
            }
        }
        for peer in mesh.peers() {
            assert!(!removed.contains(&peer.node.id()));
        }
    }
    // Each call sends at most to a few hosts, at each of their candidates.
    let bound = (calls + 1) * 8 * 2 * limits::CANDIDATES as u32;
    assert!(sent <= bound, "{sent} datagrams for {calls} calls");
}

fn check(output: &Output, sent: &mut u32) {
    let overlay = host::mesh_config().overlay_v4;
    let mut outer = |to: &Path| {
        *sent += 1;
        let to = to.remote;
        let inside = matches!(to.ip(), std::net::IpAddr::V4(ip) if overlay.contains(&ip));
        assert!(!inside, "{to} leads into the tunnel");
    };
    match output {
        Output::Transmit(transmit) => transmit.path.iter().for_each(outer),
        Output::Train { path, .. } => outer(path),
        Output::Handshake { to, .. } => {
            assert!(to.len() <= limits::CANDIDATES);
            to.iter().for_each(outer);
        }
        Output::PeerTable(table) => {
            let mut seen = BTreeSet::new();
            for prefix in table.peers.values().flat_map(|entry| &entry.prefixes) {
                assert!(seen.insert(*prefix), "{prefix} under two peers");
            }
        }
        Output::Advertise(candidates) => assert!(candidates.len() <= limits::CANDIDATES),
        Output::Stun { to, .. } => outer(to),
        Output::PeerPath { path, .. } => path.endpoint.iter().for_each(outer),
        Output::Plan(_)
        | Output::ForwardingTable(_)
        | Output::ReportChannels
        | Output::SecondPort { .. }
        | Output::StateChanged { .. }
        | Output::PathChanged { .. }
        | Output::StaticStateChanged { .. }
        | Output::PingResult { .. } => {}
    }
}

// Inputs

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Signer of everything in this module.
static CA: LazyLock<Ca> = LazyLock::new(|| Ca::new(7));

fn signed_seeds() -> Vec<Vec<u8>> {
    let node = example_node();
    let mesh = host::mesh_config();
    [
        pb::Grant::from(node.grant()).encode_to_vec(),
        pb::Record::from(node.record()).encode_to_vec(),
        pb::Tombstone::from(&tombstone_of(node.grant())).encode_to_vec(),
        pb::MeshConfig::from(&mesh).encode_to_vec(),
    ]
    .into_iter()
    .zip(0u8..)
    .map(|(body, kind)| [&[kind], body.as_slice()].concat())
    .collect()
}

fn map_seeds() -> Vec<Vec<u8>> {
    let node = example_node();
    let sign = |domain, body: Vec<u8>| Some(CA.sign_bytes(domain, &body));
    let grant = Grant { identity_key: CA.public(), ..node.grant().clone() };
    let entry = pb::Entry {
        grant: sign(Domain::Grant, pb::Grant::from(&grant).encode_to_vec()),
        record: sign(Domain::Record, pb::Record::from(node.record()).encode_to_vec()),
        withheld: vec![(&node.record().prefixes[0]).into()],
    };
    let tombstone: Tombstone = tombstone_of(&grant);
    let tombstone =
        CA.sign_bytes(Domain::Tombstone, &pb::Tombstone::from(&tombstone).encode_to_vec());
    let mesh: MeshConfig = host::mesh_config();
    let mesh = CA.sign_bytes(Domain::Mesh, &pb::MeshConfig::from(&mesh).encode_to_vec());
    let changes = [
        pb::change::Kind::Upsert(entry),
        pb::change::Kind::Tombstone(tombstone),
        pb::change::Kind::Mesh(mesh),
    ];
    changes
        .into_iter()
        .map(|kind| {
            let changes = pb::Changes::of([kind], 7);
            let kind = Some(pb::watch_response::Kind::Changes(changes));
            pb::WatchResponse { kind }.encode_to_vec()
        })
        .collect()
}

/// Decodes a message to or from the root helper. A decoded message encodes to the same bytes, and a
/// request names only files of the fixed list.
pub fn helper(bytes: &[u8]) {
    use towline_helper::protocol::{DESCRIPTORS, Request, Response, Status};
    if let Some(request) = Request::parse(bytes) {
        assert_eq!(request.encode(), bytes);
        if let Request::Kubelet(installation) = request {
            assert!(installation.files().len() <= DESCRIPTORS);
        }
    }
    if let Some(response) = Response::parse(bytes) {
        assert_eq!(response.encode(), bytes);
        assert!(response.status == Status::Done || response.present == 0);
    }
}

fn helper_seeds() -> Vec<Vec<u8>> {
    use towline_helper::protocol::{
        EgressGuard, LinkIndex, Request, Response, Status, TunnelLink, Uplink,
    };
    let uplink = Uplink::here(2).expect("a namespace").expect("an uplink");
    let guard = EgressGuard::new(uplink, LinkIndex::new(9), 0x10, 0x30).expect("a guard");
    let link = TunnelLink::here(7).expect("a namespace").expect("a link");
    let uplinks = [
        Request::GuardUplink(guard),
        Request::OpenUplink(uplink),
        Request::WireguardSocket(link),
        Request::RemoveWireguardSocket(link),
    ];
    let responses = [
        Response { status: Status::Done, present: 0b11, errno: 0 },
        Response::without(Status::Failed, 13),
    ];
    let requests = Request::PLAIN.into_iter().chain(uplinks).map(Request::encode);
    requests.chain(responses.map(|response| response.encode().to_vec())).collect()
}

fn token_seeds() -> Vec<Vec<u8>> {
    use towline_proto::id::{Fingerprint, TokenId};
    use towline_proto::token::TokenSecret;
    let controllers = ["cp.example:7443", "[2001:db8::1]:7443", "203.0.113.1:7443"]
        .map(|text| text.parse().expect("an address"))
        .to_vec();
    let token = JoinToken {
        ca: Fingerprint([1; 32]),
        id: TokenId([2; 8]),
        secret: TokenSecret([3; 32]),
        controllers,
    };
    vec![token.encode().into_bytes(), b"towline1.".to_vec()]
}

fn probe_seeds() -> Vec<Vec<u8>> {
    let observed = SocketAddr::from((Ipv4Addr::new(203, 0, 113, 1), 51_830));
    let header = |version| ProbeHeader { version, pair: [1; 8], nonce: [2; 12] }.encode();
    let stamp = Stamp { epoch: 3, counter: 4 }.encode();
    let pong = Probe::Pong { transaction: 7, observed }.encode();
    let ping = Probe::Ping { transaction: 7 }.encode();
    let whole = [&header(ProbeVersion::V1)[..], &pong, &[0; 16]].concat();
    let stamped = [&header(ProbeVersion::V2)[..], &stamp, &pong, &[0; 16]].concat();
    let challenge = [&stamp[..], &Probe::Challenge { token: 7 }.encode()].concat();
    vec![ping, pong, whole, stamped, challenge]
}

fn datagram_seeds() -> Vec<Vec<u8>> {
    let wireguard = |kind: u8, len: usize| {
        let mut bytes = vec![0; len];
        bytes[0] = kind;
        bytes
    };
    let stun = [&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42][..], &[9; 12]].concat();
    let mut seeds =
        vec![wireguard(1, 148), wireguard(2, 92), wireguard(3, 64), wireguard(4, 32), stun];
    seeds.push(stun::request([9; 12]).to_vec());
    seeds.extend(probe_seeds());
    seeds
}

fn stun_seeds() -> Vec<Vec<u8>> {
    let request = stun::request([9; 12]);
    let answers = ["192.0.2.1:7", "[2001:db8::1]:7"].map(|from| {
        let from = from.parse().expect("an address");
        let (answer, len) = stun::answer(&request, from).expect("an answer");
        answer[..len].to_vec()
    });
    // A classic server: MAPPED-ADDRESS, and attributes that we do not know.
    let mut classic = vec![1, 1, 0, 24, 0x21, 0x12, 0xa4, 0x42];
    classic.extend([9; 12]);
    classic.extend([0x80, 0x2b, 0, 8, 0, 1, 13, 150, 192, 0, 2, 2]);
    classic.extend([0, 1, 0, 8, 0, 1, 0x80, 0x55, 192, 0, 2, 1]);
    let behaviour = BehaviourRequest { transaction: [9; 12], change: Change::ADDRESS_AND_PORT };
    let [from, origin, other] =
        [1, 2, 3].map(|host: u8| SocketAddr::from(([192, 0, 2, host], 7_443)));
    let server = ServerAddresses { origin, other };
    let about_behaviour = vec![behaviour.encode(), behaviour.answer(from, server)];
    [vec![request.to_vec(), classic], answers.into(), about_behaviour].concat()
}

fn coalesce_seeds() -> Vec<Vec<u8>> {
    // Three segments of one TCP stream, three datagrams of one UDP flow without checksums, and one
    // unrelated packet.
    let segment = |number: u32, len: u16| {
        let mut packet = vec![0; 40 + usize::from(len)];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&(40 + len).to_be_bytes());
        packet[6] = 0x40;
        packet[9] = 6;
        packet[24..28].copy_from_slice(&(number * 100).to_be_bytes());
        packet[32..34].copy_from_slice(&[0x50, 0x10]);
        packet
    };
    let datagram = |len: u16| {
        let mut packet = vec![0; 28 + usize::from(len)];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&(28 + len).to_be_bytes());
        packet[9] = 17;
        packet[24..26].copy_from_slice(&(8 + len).to_be_bytes());
        packet
    };
    let framed = |packets: Vec<Vec<u8>>| -> Vec<u8> {
        let one = |packet: &Vec<u8>| [&(packet.len() as u16).to_le_bytes()[..], packet].concat();
        packets.iter().flat_map(one).collect()
    };
    // Checksums are valid, so that the segments are coalesced.
    let mut stream = vec![segment(0, 100), segment(1, 100), segment(2, 7)];
    for packet in &mut stream {
        let sum = 6 + (packet.len() - 20) as u64;
        let sum = !checksum::fold(checksum::add(sum, &packet[20..]));
        packet[36..38].copy_from_slice(&sum.to_be_bytes());
        let sum = !checksum::fold(checksum::add(0, &packet[..20]));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    vec![framed(stream), framed(vec![datagram(50), datagram(50), datagram(3), segment(9, 9)])]
}

fn inner_seeds() -> Vec<Vec<u8>> {
    let mut v4 = vec![0u8; 60];
    v4[0] = 0x45;
    v4[3] = 60;
    v4[9] = 6;
    v4[32] = 0x50;
    let mut v6 = vec![0u8; 80];
    v6[0] = 0x60;
    v6[5] = 40;
    v6[6] = 17;
    v6[45] = 40;
    let checksum =
        VnetHeader { flags: 1, csum_start: 20, csum_offset: 16, ..VnetHeader::default() };
    let super_packet = VnetHeader { gso_type: 1, gso_size: 8, hdr_len: 40, ..checksum };
    let plain = VnetHeader::default();
    vec![
        [&plain.encode()[..], &v4].concat(),
        [&plain.encode()[..], &v6].concat(),
        [&checksum.encode()[..], &v4].concat(),
        [&super_packet.encode()[..], &v4].concat(),
    ]
}

fn mesh_seeds() -> Vec<Vec<u8>> {
    // A peer appears, becomes reachable, answers, roams, stops answering, and is removed.
    let story: &[&[u8]] = &[
        &[3, 2, 1, 7, 2, 9],
        &[0, 2, 1, 2, 5, 6, 1, 3],
        &[9, 10, 6, 1, 6, 1],
        &[4, 5, 0, 2, 9, 30, 6, 4, 7, 2, 9, 20],
        &[4, 6, 1, 2, 9, 30],
        &[9, 250, 9, 250, 4, 5, 3, 2, 9, 100],
        &[8, 1, 4, 0, 3, 1, 1, 5, 1, 4],
        &[2, 2, 0, 2, 1, 2, 5, 6, 1, 3],
    ];
    vec![story.concat(), story[..4].concat(), [&[5, 3, 6, 2][..], story[1]].concat()]
}

fn example_node() -> Node {
    let mut input = Input(&[2, 3, 2, 5, 6, 2, 3, 4]);
    input.node()
}

/// Reads small values from bytes, so that different inputs often collide on the same host or
/// prefix.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn below(&mut self, bound: u8) -> u8 {
        self.byte().unwrap_or(0) % bound
    }

    fn host(&mut self) -> u16 {
        u16::from(self.below(5)) + 1
    }

    fn key(&mut self) -> WireguardKey {
        Host::new(self.host(), 1, host::mesh_config()).key()
    }

    fn address(&mut self) -> SocketAddr {
        let byte = self.byte().unwrap_or(0);
        let ip = match byte % 5 {
            0 => Ipv4Addr::new(203, 0, 113, byte),
            1 => Ipv4Addr::new(192, 168, 1, byte),
            2 => Ipv4Addr::new(198, 19, 0, byte),
            3 => Ipv4Addr::new(224, 0, 0, byte),
            _ => Ipv4Addr::new(10, 244, byte, 1),
        };
        SocketAddr::from((ip, u16::from(byte) * 100))
    }

    fn candidates(&mut self) -> Vec<Candidate> {
        let kinds = [CandidateKind::Local, CandidateKind::Reflexive, CandidateKind::Configured];
        (0..self.below(4))
            .filter_map(|_| {
                let kind = kinds[usize::from(self.below(3))];
                Candidate::new(kind, self.address())
            })
            .collect()
    }

    fn prefixes(&mut self) -> Vec<ipnet::IpNet> {
        (0..self.below(4))
            .filter_map(|_| {
                let ip = Ipv4Addr::new(10, 244, self.below(8), 0);
                let net = ipnet::Ipv4Net::new(ip, 16 + self.below(9)).ok()?;
                Some(net.trunc().into())
            })
            .collect()
    }

    fn node(&mut self) -> Node {
        let grant = Host::new(self.host(), 1, host::mesh_config()).grant;
        let record = Record {
            generation: self.below(8).into(),
            boot_epoch: self.below(3).into(),
            candidates: self.candidates(),
            prefixes: self.prefixes(),
            ..record(&grant)
        };
        Node::new(grant, record).expect("it announces what it may")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_reach_what_they_are_meant_for() {
        for seed in signed_seeds() {
            let domain = [Domain::Grant, Domain::Record, Domain::Tombstone, Domain::Mesh]
                [usize::from(seed[0])];
            let signed = CA.sign_bytes(domain, &seed[1..]);
            let good = match domain {
                Domain::Grant => signed::grant(Some(&signed), &CA.public()).is_ok(),
                Domain::Record => signed::record(Some(&signed), &CA.public()).is_ok(),
                Domain::Tombstone => signed::tombstone(Some(&signed), &CA.public()).is_ok(),
                Domain::Mesh => signed::mesh(Some(&signed), &CA.public()).is_ok(),
                Domain::Head => signed::head(Some(&signed), &CA.public()).is_ok(),
            };
            assert!(good);
        }
        assert!(
            example_node().record().prefixes.len() + example_node().record().candidates.len() > 1
        );
        assert!(String::from_utf8(token_seeds().remove(0)).unwrap().parse::<JoinToken>().is_ok());
    }
}
