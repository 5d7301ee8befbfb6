//! Fuzz targets of files that others write, of the stores of both programs, and of requests to the
//! controller.

use prost::Message as _;
use towline_agent::internals as agent;
use towline_agent::map_cache::MapCache;
use towline_fixtures::controller::internals as controller;
use towline_proto::id::{NodeId, TokenId};
use towline_proto::join_proof::{self, Claim};
use towline_proto::pb;
use towline_proto::summary::MeshSummary;
use towline_proto::token::TokenSecret;
use towline_service::port_owner::Transport;
use towline_service::{certificate, internals as service};

use super::{CA, map_seeds};

/// Parses text that other programs or the kernel write: a CNI configuration, a line of
/// `/proc/net/tcp`, a line of `/etc/passwd`, the variable of an SSH session, reserved ports. The first
/// byte selects the parser.
///
/// A list of reserved ports is written as it is read.
pub fn files(bytes: &[u8]) {
    let Some((which, text)) = bytes.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    match which % 5 {
        0 => {
            let _ = agent::cni_plugin(&text);
        }
        1 => {
            for line in text.lines() {
                let _ = agent::connection(line);
                let _ = service::port_owner(line, Transport::Tcp, 22);
            }
        }
        2 => {
            for line in text.lines() {
                let _ = service::account(line, "towline");
            }
        }
        3 => {
            let _ = agent::ssh_variable(&text);
        }
        _ => {
            let Some(mut ports) = agent::ReservedPorts::parse(&text) else { return };
            let written = ports.to_string();
            assert_eq!(agent::ReservedPorts::parse(&written), Some(ports));
            ports = agent::ReservedPorts::parse(&text).expect("it was parsed before");
            if ports.add(51_830) {
                assert!(ports.remove(51_830), "an added port is at both ends of its range");
            }
        }
    }
}

/// Decodes what the agent and the controller stored: a map, a certificate, records without signature, and what is
/// beside them in etcd.
/// The first byte selects the kind.
///
/// A value that is accepted is encoded to one that is accepted and encoded in the same way.
pub fn stored(bytes: &[u8]) {
    let Some((which, bytes)) = bytes.split_first() else { return };
    let empty = || MapCache::new(CA.public(), NodeId([1; 16]));
    empty().replay(bytes);
    controller::sealed("meta", bytes);
    if let Some(key) = controller::etcd_presence(bytes) {
        assert_eq!(key, bytes);
    }
    if let Some(encoded) = controller::forwarded_signal(bytes) {
        assert_eq!(controller::forwarded_signal(&encoded), Some(encoded));
    }
    match which % 7 {
        0 => {
            if let Ok(map) = empty().restore(bytes) {
                let encoded = map.encode();
                let again = empty().restore(&encoded).expect("it was just encoded");
                assert_eq!(again.encode(), encoded);
                assert_eq!(again.changes().len(), map.changes().len());
            }
        }
        1 => {
            let key = certificate::public_key(bytes);
            assert_eq!(certificate::validity(bytes).is_some(), key.is_some());
        }
        5 | 6 => {
            let recode = if which % 7 == 5 { controller::etcd_head } else { controller::etcd_part };
            if let Some(encoded) = recode(bytes) {
                assert_eq!(recode(&encoded), Some(encoded));
            }
        }
        kind => {
            let key = match kind {
                2 => "meta".to_owned(),
                3 => "seen".to_owned(),
                _ => controller::token_key(TokenId([2; 8])),
            };
            if let Some(encoded) = controller::stored(&key, bytes) {
                assert_eq!(controller::stored(&key, &encoded), Some(encoded));
            }
        }
    }
}

/// Decodes what a stranger sends to the controller: a join request, or a certificate signing request.
///
/// A request without a signing request is never well-formed.
pub fn request(bytes: &[u8]) {
    if let Ok(join) = pb::JoinRequest::decode(bytes) {
        let bare = join.csr.is_empty();
        assert!(!(controller::join_request(join) && bare));
    }
    let _ = controller::signing_request(bytes);
    if let Ok(summary) = pb::MeshSummary::decode(bytes)
        && let Ok(summary) = MeshSummary::try_from(summary)
    {
        // What was accepted can be sent again.
        let again = MeshSummary::try_from(pb::MeshSummary::from(&summary));
        assert_eq!(again.as_ref(), Ok(&summary));
    }
}

/// Parses a request at the socket of `wg show`. The first byte is where the bytes are split into pieces.
///
/// A request is the same in one piece and in several, and once it has ended it stays what it is.
pub fn uapi(bytes: &[u8]) {
    let Some((at, bytes)) = bytes.split_first() else { return };
    let (first, second) = bytes.split_at(usize::from(*at).min(bytes.len()));
    let mut parser = agent::UapiRequest::default();
    let before = parser.feed(first);
    let after = parser.feed(second);
    assert!(before == agent::UapiProgress::More || before == after);
    assert_eq!(agent::UapiRequest::default().feed(bytes), after);
    if after != agent::UapiProgress::More {
        assert_eq!(parser.feed(b"get=1\n\n"), after);
    }
}

// Inputs

pub(super) fn uapi_seeds() -> Vec<Vec<u8>> {
    let set = b"\x09set=1\nlisten_port=51830\nreplace_peers=true\nallowed_ip=198.19.0.1/32\n\n";
    vec![b"\x03get=1\n\n".to_vec(), set.to_vec()]
}

pub(super) fn files_seeds() -> Vec<Vec<u8>> {
    let texts: [(u8, &str); 7] = [
        (0, r#"{"cniVersion":"0.3.1","plugins":[{"type":"calico"},{"type":"portmap"}]}"#),
        (0, r#"{"type":"multus","delegates":[{"plugins":[{"type":"flannel"}]}]}"#),
        (
            1,
            "   0: 0100007F:1A0A 00000000:0000 0A 00000000:00000000 00:00000000 00000000   997        0 7001 1 0000000000000000\n",
        ),
        (
            1,
            "   1: 0000000000000000FFFF00000100007F:0016 0000000000000000FFFF0000020200C0:D431 01 00000000:00000000 02:00000000 00000000     0        0 7002 2\n",
        ),
        (2, "root:x:0:0:root:/root:/bin/sh\ntowline:x:997:998::/:/usr/sbin/nologin\n"),
        (3, "SSH_CONNECTION=fe80::1%eth0 50000 192.0.2.1 22"),
        (4, "80,8000-8080,51830\n"),
    ];
    texts.map(|(which, text)| [&[which], text.as_bytes()].concat()).into()
}

pub(super) fn stored_seeds() -> Vec<Vec<u8>> {
    let mut map = MapCache::new(CA.public(), NodeId([1; 16]));
    map.enter_epoch(4);
    for bytes in map_seeds() {
        if let Ok(pb::WatchResponse { kind: Some(pb::watch_response::Kind::Changes(changes)) }) =
            pb::WatchResponse::decode(bytes.as_slice())
        {
            map.apply(changes);
        }
    }
    let counters = [8, 4, 16, 9, 24, 2, 32, 7];
    let seen = [&[10, 16][..], &[7; 16], &[18, 1, 100]].concat();
    let token = pb::Token {
        id: TokenId([2; 8]).to_string(),
        created_at: 1,
        expires_at: 2,
        uses: 1,
        name_pattern: "worker-*".into(),
        site: "rack".into(),
        ..pb::Token::default()
    };
    let token = token.encode_to_vec();
    let token = [&[10, 32][..], &[3; 32], &[18, token.len() as u8], &token].concat();
    let head = [&[8, 2, 16, 1, 26, 1, b'm', 34, 1, b'c', 42, 8][..], &[9; 8]].concat();
    let part = vec![10, 6, 10, 1, b'a', 18, 1, b'v'];
    [map.encode(), CA.certificate().to_vec(), counters.to_vec(), seen, token, head, part]
        .into_iter()
        .zip(0u8..)
        .map(|(bytes, kind)| [&[kind], bytes.as_slice()].concat())
        .collect()
}

pub(super) fn request_seeds() -> Vec<Vec<u8>> {
    let csr = [0x30, 0x82, 0x01, 0x00].to_vec();
    let wireguard_key = towline_proto::id::WireguardKey([9; 32]);
    let claim = Claim { token: TokenId([2; 8]), wireguard_key: &wireguard_key, csr: &csr };
    let join = pb::JoinRequest {
        token_id: vec![2; 8],
        token_secret: TokenSecret([3; 32]).0.to_vec(),
        name: "gpu-1".into(),
        wireguard_key: wireguard_key.0.to_vec(),
        wireguard_proof: join_proof::prove(&[5; 32], claim),
        proof_key: vec![4; 32],
        csr: csr.clone(),
    };
    vec![join.encode_to_vec(), csr]
}
