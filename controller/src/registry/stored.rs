//! Encoding of the registry's records in the store. The tag of a removed field is never reused.

use prost::bytes::Bytes;
use towline_proto::pb;

/// Record under the key `meta`: counters.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Meta {
    #[prost(uint64, tag = "1")]
    pub(super) epoch: u64,
    #[prost(uint64, tag = "2")]
    pub(super) revision: u64,
    #[prost(uint64, tag = "3")]
    pub(super) starts: u64,
    #[prost(uint32, tag = "4")]
    pub(super) v4_cursor: u32,
}

/// Record under the key `mesh`: the mesh configuration.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Mesh {
    #[prost(message, optional, tag = "1")]
    pub(super) config: Option<pb::Signed>,
    #[prost(uint64, tag = "2")]
    pub(super) revision: u64,
}

/// Record under a key `node/ID`: a node.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Node {
    #[prost(message, optional, tag = "1")]
    pub(super) grant: Option<pb::Signed>,
    #[prost(message, optional, tag = "2")]
    pub(super) record: Option<pb::Signed>,
    #[prost(message, repeated, tag = "3")]
    pub(super) withheld: Vec<pb::Prefix>,
    #[prost(uint64, tag = "4")]
    pub(super) revision: u64,
    #[prost(bytes = "bytes", tag = "5")]
    pub(super) token: Bytes,
    #[prost(int64, tag = "6")]
    pub(super) joined_at: i64,
    #[prost(int64, tag = "7")]
    pub(super) last_seen: i64,
}

/// Record under a key `tombstone/ID`: a removed node.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RemovedNode {
    #[prost(message, optional, tag = "1")]
    pub(super) tombstone: Option<pb::Signed>,
    #[prost(uint64, tag = "2")]
    pub(super) revision: u64,
}

/// Record under a key `token/ID`: a join token.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Token {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) secret_hash: Bytes,
    #[prost(message, optional, tag = "2")]
    pub(super) token: Option<pb::Token>,
}
