//! Parsers of requests and of the store, for fuzzing. Not part of the public API.

use towline_proto::id::TokenId;
use towline_proto::pb;
use x25519_dalek::StaticSecret;

use crate::authority::csr_key;
use crate::replicas;
use crate::service::WireJoin;
use crate::store::etcd;
use crate::store_secret::StoreSecret;
use crate::stored;

/// Parses a join request as the controller does. Returns true if the request is well-formed and its
/// keys are proven.
pub fn join_request(request: pb::JoinRequest) -> bool {
    let Ok(join) = WireJoin::parse(request) else { return false };
    let proven = join.holds_wireguard_key(&StaticSecret::from([1; 32]));
    csr_key(&join.csr).is_ok() && proven
}

/// Decodes a certificate signing request. Returns true if it is well-formed and signed.
pub fn signing_request(der: &[u8]) -> bool {
    csr_key(der).is_ok()
}

/// Decodes a record of the store that has no signature, and encodes it again. `None` if it is
/// malformed.
pub fn stored(key: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    use towline_registry::Key;
    match stored::parse_key(key)? {
        Key::Counters => stored::decode_counters(bytes)
            .ok()
            .map(|(counters, sum)| stored::encode_counters(counters, &sum)),
        Key::LastSeen => stored::decode_last_seen(bytes).ok().map(stored::encode_last_seen),
        Key::Token(id) => {
            stored::decode_token(id, bytes).ok().map(|token| stored::encode_token(&token))
        }
        Key::Admin(key) => {
            stored::decode_admin(key, bytes).ok().map(|admin| stored::encode_admin(&admin))
        }
        Key::Mesh | Key::Node(_) | Key::RemovedNode(_) => None,
    }
}

/// Decodes the head of a store in etcd, and encodes it again. `None` if it is malformed.
pub fn etcd_head(bytes: &[u8]) -> Option<Vec<u8>> {
    etcd::recode_head(bytes)
}

/// Decodes a part of a staged change in etcd, and encodes it again. `None` if it is malformed.
pub fn etcd_part(bytes: &[u8]) -> Option<Vec<u8>> {
    etcd::recode_part(bytes)
}

/// Parses a key of presence in etcd, and encodes it again. `None` if it is malformed.
pub fn etcd_presence(bytes: &[u8]) -> Option<Vec<u8>> {
    etcd::recode_presence(bytes)
}

/// Parses a signal of another controller, and encodes it again. `None` if it is malformed.
pub fn forwarded_signal(bytes: &[u8]) -> Option<Vec<u8>> {
    replicas::recode_signal(bytes)
}

/// Opens an authenticated record of the store, with a secret that is not that of any store. Returns true if the record
/// is authentic.
pub fn sealed(key: &str, bytes: &[u8]) -> bool {
    let secret = StoreSecret::parse(&format!("00000000 {}", "00".repeat(32)));
    secret.is_some_and(|secret| secret.open(key, bytes).is_ok())
}

/// Returns the text of a token's key in the store.
pub fn token_key(id: TokenId) -> String {
    stored::key_text(towline_registry::Key::Token(id))
}
