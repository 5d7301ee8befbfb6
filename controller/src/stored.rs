//! Encoding of the registry's records in the store.
//!
//! Every signature is verified again when a record is decoded, so that an altered store cannot forge
//! grants, tombstones or records. What has no signature is authenticated by the
//! [store's secret](crate::store_secret), which wraps what is encoded here. The tag of a removed field is never
//! reused.

use prost::Message;
use prost::bytes::Bytes;
use towline_proto::convert::{self, Invalid};
use towline_proto::id::{IdentityKey, NodeId, NodeName, TokenId};
use towline_proto::{pb, signed};

use crate::authority::Authority;
use crate::store_secret::RecordSum;
use towline_registry::token::{NamePattern, SecretHash, Token, TokenTerms};
use towline_registry::{Admin, Counters, Key, Member, Mesh, Now, RemovedNode};

/// Record under the key `meta`: counters.
#[derive(Clone, PartialEq, prost::Message)]
struct StoredCounters {
    #[prost(uint64, tag = "1")]
    epoch: u64,
    #[prost(uint64, tag = "2")]
    revision: u64,
    #[prost(uint64, tag = "3")]
    starts: u64,
    #[prost(uint32, tag = "4")]
    v4_cursor: u32,
    #[prost(bool, tag = "5")]
    is_backup: bool,
    /// Sum over all other records, 32 bytes. Records of older versions have none.
    #[prost(bytes = "bytes", tag = "6")]
    sum: Bytes,
}

/// Record under the key `mesh`: the mesh configuration.
#[derive(Clone, PartialEq, prost::Message)]
struct StoredMesh {
    #[prost(message, optional, tag = "1")]
    config: Option<pb::Signed>,
    #[prost(uint64, tag = "2")]
    revision: u64,
}

/// Record under the key `seen`: when nodes were last seen, in two lists of the same length.
#[derive(Clone, PartialEq, prost::Message)]
struct StoredLastSeen {
    /// Ids of the nodes, 16 bytes each.
    #[prost(bytes = "bytes", tag = "1")]
    nodes: Bytes,
    /// Times in seconds since 1970.
    #[prost(int64, repeated, tag = "2")]
    times: Vec<i64>,
}

/// Record under a key `node/ID`: a node.
#[derive(Clone, PartialEq, prost::Message)]
struct StoredNode {
    #[prost(message, optional, tag = "1")]
    grant: Option<pb::Signed>,
    #[prost(message, optional, tag = "2")]
    record: Option<pb::Signed>,
    #[prost(message, repeated, tag = "3")]
    withheld: Vec<pb::Prefix>,
    #[prost(uint64, tag = "4")]
    revision: u64,
    #[prost(bytes = "bytes", tag = "5")]
    token: Bytes,
    #[prost(int64, tag = "6")]
    joined_at: i64,
    /// Only in records of older versions: now the record `seen` has it.
    #[prost(int64, tag = "7")]
    last_seen: i64,
}

/// Record under a key `tombstone/ID`: a removed node.
#[derive(Clone, PartialEq, prost::Message)]
struct StoredRemovedNode {
    #[prost(message, optional, tag = "1")]
    tombstone: Option<pb::Signed>,
    #[prost(uint64, tag = "2")]
    revision: u64,
}

/// Record under a key `token/ID`: a join token.
#[derive(Clone, PartialEq, prost::Message)]
struct StoredToken {
    #[prost(bytes = "bytes", tag = "1")]
    secret_hash: Bytes,
    #[prost(message, optional, tag = "2")]
    token: Option<pb::Token>,
}

/// Record under a key `admin/KEY`: the key of an administrator.
#[derive(Clone, PartialEq, prost::Message)]
struct StoredAdmin {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int64, tag = "2")]
    created_at: i64,
    #[prost(int64, optional, tag = "3")]
    revoked_at: Option<i64>,
}

/// Returns the text of a key in the store.
pub(crate) fn key_text(key: Key) -> String {
    match key {
        Key::Counters => "meta".to_owned(),
        Key::Mesh => "mesh".to_owned(),
        Key::LastSeen => "seen".to_owned(),
        Key::Node(id) => format!("node/{id}"),
        Key::RemovedNode(id) => format!("tombstone/{id}"),
        Key::Token(id) => format!("token/{id}"),
        Key::Admin(key) => format!("admin/{key}"),
    }
}

/// Parses the text of a key.
pub(crate) fn parse_key(text: &str) -> Option<Key> {
    match text.split_once('/') {
        None if text == "meta" => Some(Key::Counters),
        None if text == "mesh" => Some(Key::Mesh),
        None if text == "seen" => Some(Key::LastSeen),
        Some(("node", id)) => id.parse().ok().map(Key::Node),
        Some(("tombstone", id)) => id.parse().ok().map(Key::RemovedNode),
        Some(("token", id)) => id.parse().ok().map(Key::Token),
        Some(("admin", key)) => key.parse().ok().map(Key::Admin),
        _ => None,
    }
}

/// Encodes the counters, with the sum over all other records.
pub(crate) fn encode_counters(counters: Counters, sum: &RecordSum) -> Vec<u8> {
    let Counters { epoch, revision, starts, v4_cursor, is_backup } = counters;
    // Without any record there is no sum, as in older versions.
    let is_empty = *sum == RecordSum::default();
    let sum = if is_empty { Bytes::new() } else { Bytes::copy_from_slice(&sum.0) };
    StoredCounters { epoch, revision, starts, v4_cursor, is_backup, sum }.encode_to_vec()
}

/// Decodes the counters and the sum, which is zero in a record of an older version.
pub(crate) fn decode_counters(bytes: &[u8]) -> Result<(Counters, RecordSum), String> {
    let StoredCounters { epoch, revision, starts, v4_cursor, is_backup, sum } = decode(bytes)?;
    let sum = match &*sum {
        [] => RecordSum::default(),
        sum => RecordSum(sum.try_into().map_err(|_| "its sum has another length")?),
    };
    Ok((Counters { epoch, revision, starts, v4_cursor, is_backup }, sum))
}

/// Encodes the mesh configuration.
pub(crate) fn encode_mesh(revision: u64, config: &pb::Signed) -> Vec<u8> {
    StoredMesh { config: Some(config.clone()), revision }.encode_to_vec()
}

/// Decodes and verifies the mesh configuration.
pub(crate) fn decode_mesh(
    authority: &Authority,
    bytes: &[u8],
) -> Result<(Mesh, pb::Signed), String> {
    let mesh: StoredMesh = decode(bytes)?;
    let config = signed::mesh(mesh.config.as_ref(), authority.public_key()).map_err(|_| {
        "it was not signed with this ca.key: store and key belong to different meshes".to_owned()
    })?;
    if config.mesh_id != authority.mesh_id() {
        return Err("it names another mesh".into());
    }
    Ok((Mesh { config, revision: mesh.revision }, mesh.config.unwrap_or_default()))
}

/// Encodes when nodes were last seen.
pub(crate) fn encode_last_seen(seen: impl IntoIterator<Item = (NodeId, i64)>) -> Vec<u8> {
    let (mut nodes, mut times) = (Vec::new(), Vec::new());
    for (node, time) in seen {
        nodes.extend_from_slice(&node.0);
        times.push(time);
    }
    StoredLastSeen { nodes: nodes.into(), times }.encode_to_vec()
}

/// Decodes when nodes were last seen.
pub(crate) fn decode_last_seen(bytes: &[u8]) -> Result<Vec<(NodeId, i64)>, String> {
    let seen: StoredLastSeen = decode(bytes)?;
    let (nodes, rest) = seen.nodes.as_chunks::<16>();
    if !rest.is_empty() || nodes.len() != seen.times.len() {
        return Err("its lists differ in length".into());
    }
    Ok(nodes.iter().map(|id| NodeId(*id)).zip(seen.times).collect())
}

/// Encodes a node.
pub(crate) fn encode_node(
    member: &Member,
    grant: &pb::Signed,
    record: Option<&pb::Signed>,
) -> Vec<u8> {
    StoredNode {
        grant: Some(grant.clone()),
        record: record.cloned(),
        withheld: member.withheld.iter().map(Into::into).collect(),
        revision: member.revision,
        token: Bytes::copy_from_slice(&member.token.0),
        joined_at: member.joined_at,
        last_seen: 0,
    }
    .encode_to_vec()
}

/// A decoded node, with its signed statements.
pub(crate) struct DecodedNode {
    pub(crate) member: Member,
    pub(crate) grant: pb::Signed,
    pub(crate) record: Option<pb::Signed>,
    pub(crate) last_seen: i64,
}

/// Decodes and verifies the node with this id.
pub(crate) fn decode_node(
    authority: &Authority,
    id: NodeId,
    bytes: &[u8],
    now: Now,
) -> Result<DecodedNode, String> {
    let node: StoredNode = decode(bytes)?;
    let grant = signed::grant(node.grant.as_ref(), authority.public_key()).map_err(text)?;
    if grant.node_id != id || grant.mesh_id != authority.mesh_id() {
        return Err("it names another node".into());
    }
    let record = match &node.record {
        None => None,
        record => Some(signed::record(record.as_ref(), &grant.identity_key).map_err(text)?),
    };
    let member = Member {
        grant,
        record,
        withheld: convert::prefixes(&node.withheld).map_err(text)?,
        revision: node.revision,
        token: TokenId::try_from(node.token.as_ref()).map_err(text)?,
        joined_at: node.joined_at,
        known_since: now.mono,
    };
    Ok(DecodedNode {
        member,
        grant: node.grant.unwrap_or_default(),
        record: node.record,
        last_seen: node.last_seen,
    })
}

/// Encodes a removed node.
pub(crate) fn encode_removed_node(revision: u64, tombstone: &pb::Signed) -> Vec<u8> {
    StoredRemovedNode { tombstone: Some(tombstone.clone()), revision }.encode_to_vec()
}

/// Decodes and verifies the removed node with this id.
pub(crate) fn decode_removed_node(
    authority: &Authority,
    id: NodeId,
    bytes: &[u8],
) -> Result<(RemovedNode, pb::Signed), String> {
    let removed: StoredRemovedNode = decode(bytes)?;
    let tombstone =
        signed::tombstone(removed.tombstone.as_ref(), authority.public_key()).map_err(text)?;
    if tombstone.node_id != id {
        return Err("it names another node".into());
    }
    let signed = removed.tombstone.unwrap_or_default();
    Ok((RemovedNode { tombstone, revision: removed.revision }, signed))
}

/// Encodes a token.
pub(crate) fn encode_token(token: &Token) -> Vec<u8> {
    StoredToken {
        secret_hash: Bytes::copy_from_slice(&token.secret_hash.0),
        token: Some(token_message(token)),
    }
    .encode_to_vec()
}

/// Decodes the token with this id.
pub(crate) fn decode_token(id: TokenId, bytes: &[u8]) -> Result<Token, String> {
    let stored: StoredToken = decode(bytes)?;
    let hash = <[u8; 32]>::try_from(stored.secret_hash.as_ref()).map_err(|_| "it has no hash")?;
    let token = parse_token(SecretHash(hash), stored.token.unwrap_or_default()).map_err(text)?;
    if token.id != id {
        return Err("it names another token".into());
    }
    Ok(token)
}

fn parse_token(secret_hash: SecretHash, token: pb::Token) -> Result<Token, Invalid> {
    let malformed = |_| Invalid::Malformed("token");
    let optional = |text: String| Some(text).filter(|text| !text.is_empty());
    let allowed_prefixes = convert::prefixes(&token.allowed_prefixes)?;
    Ok(Token {
        id: token.id.parse()?,
        terms: TokenTerms {
            uses: token.uses,
            name: optional(token.name_pattern)
                .map(|text| text.parse().map_err(malformed))
                .transpose()?,
            site: convert::site(token.site)?,
            labels: convert::labels(token.labels)?,
            shared: convert::shared_prefixes(&token.shared, &allowed_prefixes)?,
            allowed_prefixes,
            pod_ranges: convert::pod_ranges(&token.pod_ranges)?,
            replace: optional(token.replace).map(NodeName::try_from).transpose()?,
            ephemeral: token.ephemeral,
            ephemeral_after: convert::seconds(token.ephemeral_after_seconds),
            relay: token.relay.into(),
            control_plane: token.control_plane,
        },
        created_at: token.created_at,
        expires_at: token.expires_at,
        used: token.used,
        revoked: token.revoked,
        secret_hash,
    })
}

/// Encodes the key of an administrator.
pub(crate) fn encode_admin(admin: &Admin) -> Vec<u8> {
    let Admin { name, created_at, revoked_at, .. } = admin.clone();
    StoredAdmin { name, created_at, revoked_at }.encode_to_vec()
}

/// Decodes what is stored of an administrator's key.
pub(crate) fn decode_admin(key: IdentityKey, bytes: &[u8]) -> Result<Admin, String> {
    let StoredAdmin { name, created_at, revoked_at } = decode(bytes)?;
    Ok(Admin { key, name, created_at, revoked_at })
}

/// Returns the message of a token, without the names of the nodes that joined with it.
pub(crate) fn token_message(token: &Token) -> pb::Token {
    let terms = &token.terms;
    pb::Token {
        id: token.id.to_string(),
        created_at: token.created_at,
        expires_at: token.expires_at,
        uses: terms.uses,
        used: token.used,
        revoked: token.revoked,
        name_pattern: terms.name.as_ref().map(NamePattern::to_string).unwrap_or_default(),
        site: terms.site.as_ref().map(ToString::to_string).unwrap_or_default(),
        labels: terms.labels.iter().map(|(k, v)| (k.to_string(), v.clone())).collect(),
        allowed_prefixes: terms.allowed_prefixes.iter().map(Into::into).collect(),
        pod_ranges: terms.pod_ranges.iter().map(Into::into).collect(),
        shared: terms.shared.iter().map(Into::into).collect(),
        replace: terms.replace.as_ref().map(NodeName::to_string).unwrap_or_default(),
        ephemeral: terms.ephemeral,
        ephemeral_after_seconds: convert::whole_seconds(terms.ephemeral_after),
        relay: terms.relay.decision(),
        control_plane: terms.control_plane,
        nodes: Vec::new(),
    }
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, String> {
    M::decode(bytes).map_err(text)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Returns a node's record as older versions wrote it, with the time at which it was last seen.
#[cfg(test)]
pub(crate) fn with_last_seen(node: &[u8], last_seen: i64) -> Vec<u8> {
    let node = StoredNode::decode(node).unwrap();
    StoredNode { last_seen, ..node }.encode_to_vec()
}
