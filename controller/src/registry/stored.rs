//! How the registry's records are encoded in the store. Tags are never used again.

use prost::bytes::Bytes;
use towline_proto::pb;

/// Under `meta`.
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

/// Under `mesh`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Mesh {
    #[prost(message, optional, tag = "1")]
    pub(super) config: Option<pb::Signed>,
    #[prost(uint64, tag = "2")]
    pub(super) revision: u64,
}

/// Under `node/ID`.
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

/// Under `tombstone/ID`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Grave {
    #[prost(message, optional, tag = "1")]
    pub(super) tombstone: Option<pb::Signed>,
    #[prost(uint64, tag = "2")]
    pub(super) revision: u64,
}

/// Under `token/ID`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Token {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) secret_hash: Bytes,
    #[prost(message, optional, tag = "2")]
    pub(super) token: Option<pb::Token>,
}
