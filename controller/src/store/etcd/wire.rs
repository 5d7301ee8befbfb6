//! The messages of etcd's API v3 that the store uses, field for field as in etcd's `rpc.proto` and
//! `kv.proto`. Fields that are never set or read are left out; the tags of the others are etcd's.
//!
//! A `oneof` of the schema is a message with optional fields here: both have the same encoding.

use bytes::Bytes;

/// Path of `KV.Range`.
pub(super) const RANGE: &str = "/etcdserverpb.KV/Range";
/// Path of `KV.Put`.
pub(super) const PUT: &str = "/etcdserverpb.KV/Put";
/// Path of `KV.Txn`.
pub(super) const TXN: &str = "/etcdserverpb.KV/Txn";
/// Path of `Lease.LeaseGrant`.
pub(super) const LEASE_GRANT: &str = "/etcdserverpb.Lease/LeaseGrant";
/// Path of `Lease.LeaseRevoke`.
pub(super) const LEASE_REVOKE: &str = "/etcdserverpb.Lease/LeaseRevoke";
/// Path of `Lease.LeaseKeepAlive`. It takes a stream, and answers each message of it.
pub(super) const LEASE_KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";
/// Path of `Auth.Authenticate`.
pub(super) const AUTHENTICATE: &str = "/etcdserverpb.Auth/Authenticate";

/// Header of every response.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct ResponseHeader {
    /// Revision of the whole cluster.
    #[prost(int64, tag = "3")]
    pub(super) revision: i64,
}

/// A key with its value.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct KeyValue {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
    /// Revision of the last write of the key.
    #[prost(int64, tag = "3")]
    pub(super) mod_revision: i64,
    #[prost(bytes = "bytes", tag = "5")]
    pub(super) value: Bytes,
    /// Lease that removes the key; 0 if none does.
    #[prost(int64, tag = "6")]
    pub(super) lease: i64,
}

/// Request to read keys.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
    /// End of the range, which is not part of it. Empty: the one key.
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) range_end: Bytes,
    /// Largest number of keys in the response; 0: all.
    #[prost(int64, tag = "3")]
    pub(super) limit: i64,
    /// Revision to read at; 0: the newest, which a quorum confirms.
    #[prost(int64, tag = "4")]
    pub(super) revision: i64,
    /// Leaves out the keys whose last write was before this revision; 0: none.
    #[prost(int64, tag = "10")]
    pub(super) min_mod_revision: i64,
}

/// Response with keys, sorted.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RangeResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<ResponseHeader>,
    #[prost(message, repeated, tag = "2")]
    pub(super) kvs: Vec<KeyValue>,
    /// True if the range has more keys than the limit.
    #[prost(bool, tag = "3")]
    pub(super) more: bool,
}

/// Request to write a key.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) value: Bytes,
    /// Lease that removes the key; 0: none.
    #[prost(int64, tag = "3")]
    pub(super) lease: i64,
}

/// Response to [`PutRequest`].
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct PutResponse {}

/// Operation of a transaction that deletes keys.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DeleteRangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
    /// End of the range, as in [`RangeRequest`].
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) range_end: Bytes,
}

/// One operation of a transaction. Exactly one field is set.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RequestOp {
    #[prost(message, optional, tag = "1")]
    pub(super) range: Option<RangeRequest>,
    #[prost(message, optional, tag = "2")]
    pub(super) put: Option<PutRequest>,
    #[prost(message, optional, tag = "3")]
    pub(super) delete_range: Option<DeleteRangeRequest>,
}

/// Response to one operation of a transaction; only those that read are of interest.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ResponseOp {
    #[prost(message, optional, tag = "1")]
    pub(super) range: Option<RangeResponse>,
}

/// Condition of a transaction on one property of a key. etcd's `result` and `target` are enums, which have
/// the encoding of an `int32`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Compare {
    /// [`EQUAL`] or [`GREATER`]: what the key's property has to be.
    #[prost(int32, tag = "1")]
    result: i32,
    /// Property of the key: [`VERSION`], [`MOD_REVISION`] or [`VALUE`].
    #[prost(int32, tag = "2")]
    target: i32,
    #[prost(bytes = "bytes", tag = "3")]
    key: Bytes,
    #[prost(oneof = "CompareWith", tags = "4, 6, 7")]
    with: Option<CompareWith>,
}

/// Value that the property of a key is compared with.
#[derive(Clone, PartialEq, prost::Oneof)]
enum CompareWith {
    #[prost(int64, tag = "4")]
    Version(i64),
    #[prost(int64, tag = "6")]
    ModRevision(i64),
    #[prost(bytes = "bytes", tag = "7")]
    Value(Bytes),
}

/// `Compare.CompareResult.EQUAL`.
const EQUAL: i32 = 0;
/// `Compare.CompareResult.GREATER`.
const GREATER: i32 = 1;
/// `Compare.CompareTarget.VERSION`: number of writes since the key was created; 0 if it does not exist.
const VERSION: i32 = 0;
/// `Compare.CompareTarget.MOD`: revision of the last write; 0 if the key does not exist.
const MOD_REVISION: i32 = 2;
/// `Compare.CompareTarget.VALUE`. No comparison holds if the key does not exist.
const VALUE: i32 = 3;

/// A transaction: `success` if all comparisons hold, `failure` otherwise.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    pub(super) success: Vec<RequestOp>,
    #[prost(message, repeated, tag = "3")]
    pub(super) failure: Vec<RequestOp>,
}

/// Response to [`TxnRequest`].
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TxnResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<ResponseHeader>,
    /// True if all comparisons held.
    #[prost(bool, tag = "2")]
    pub(super) succeeded: bool,
    #[prost(message, repeated, tag = "3")]
    pub(super) responses: Vec<ResponseOp>,
}

/// Request of a lease.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct LeaseGrantRequest {
    /// Time to live, in seconds.
    #[prost(int64, tag = "1")]
    pub(super) ttl: i64,
}

/// Response with a new lease.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct LeaseGrantResponse {
    #[prost(int64, tag = "2")]
    pub(super) id: i64,
}

/// Request to end a lease, with all its keys.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct LeaseRevokeRequest {
    #[prost(int64, tag = "1")]
    pub(super) id: i64,
}

/// Response to [`LeaseRevokeRequest`].
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct LeaseRevokeResponse {}

/// Request to renew a lease.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct LeaseKeepAliveRequest {
    #[prost(int64, tag = "1")]
    pub(super) id: i64,
}

/// Response to [`LeaseKeepAliveRequest`].
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct LeaseKeepAliveResponse {
    /// Time to live, in seconds; 0 if the lease does not exist any more.
    #[prost(int64, tag = "3")]
    pub(super) ttl: i64,
}

/// Request to log in. `Debug` hides the password.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub(super) struct AuthenticateRequest {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) password: String,
}

impl std::fmt::Debug for AuthenticateRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuthenticateRequest").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Response with the token of a login. `Debug` hides it.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub(super) struct AuthenticateResponse {
    #[prost(string, tag = "2")]
    pub(super) token: String,
}

impl std::fmt::Debug for AuthenticateResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuthenticateResponse")
    }
}

impl RangeRequest {
    /// Returns the request of one key in its newest state.
    pub(super) fn of(key: Bytes) -> Self {
        Self { key, range_end: Bytes::new(), limit: 0, revision: 0, min_mod_revision: 0 }
    }
}

impl RequestOp {
    /// Returns the operation that reads one key.
    pub(super) fn read(key: Bytes) -> Self {
        Self { range: Some(RangeRequest::of(key)), put: None, delete_range: None }
    }

    /// Returns the operation that writes a key.
    pub(super) fn put(key: Bytes, value: Bytes, lease: i64) -> Self {
        Self { range: None, put: Some(PutRequest { key, value, lease }), delete_range: None }
    }

    /// Returns the operation that deletes the keys from `key` up to `range_end`; the one key if that is
    /// empty.
    pub(super) fn delete(key: Bytes, range_end: Bytes) -> Self {
        let delete_range = Some(DeleteRangeRequest { key, range_end });
        Self { range: None, put: None, delete_range }
    }
}

impl Compare {
    /// Returns the condition that the last write of a key was at this revision; 0: that the key does not
    /// exist.
    pub(super) fn last_write(key: Bytes, revision: i64) -> Self {
        let with = Some(CompareWith::ModRevision(revision));
        Self { result: EQUAL, target: MOD_REVISION, key, with }
    }

    /// Returns the condition that a key exists.
    pub(super) fn exists(key: Bytes) -> Self {
        let with = Some(CompareWith::Version(0));
        Self { result: GREATER, target: VERSION, key, with }
    }

    /// Returns the condition that a key has this value.
    pub(super) fn has_value(key: Bytes, value: Bytes) -> Self {
        let with = Some(CompareWith::Value(value));
        Self { result: EQUAL, target: VALUE, key, with }
    }
}

impl TxnResponse {
    /// Returns the key that the operation at this place has read; `None` if it does not exist.
    pub(super) fn read(&self, operation: usize) -> Option<&KeyValue> {
        self.responses.get(operation)?.range.as_ref()?.kvs.first()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// Bytes that etcd's own schema gives for the same values.
    #[test]
    fn the_encoding_is_that_of_etcds_schema() {
        let key = Bytes::from_static(b"k");
        let absent = Compare::last_write(key.clone(), 0).encode_to_vec();
        // target = MOD, key, mod_revision of the oneof, which is encoded although it is zero.
        assert_eq!(absent, [0x10, 2, 0x1a, 1, b'k', 0x30, 0]);
        let exists = Compare::exists(key.clone()).encode_to_vec();
        assert_eq!(exists, [0x08, 1, 0x1a, 1, b'k', 0x20, 0]);
        let value = Compare::has_value(key.clone(), Bytes::from_static(b"v")).encode_to_vec();
        assert_eq!(value, [0x10, 3, 0x1a, 1, b'k', 0x3a, 1, b'v']);
        let put = RequestOp::put(key.clone(), Bytes::from_static(b"v"), 7).encode_to_vec();
        assert_eq!(put, [0x12, 8, 0x0a, 1, b'k', 0x12, 1, b'v', 0x18, 7]);
        let delete = RequestOp::delete(key.clone(), Bytes::from_static(b"l")).encode_to_vec();
        assert_eq!(delete, [0x1a, 6, 0x0a, 1, b'k', 0x12, 1, b'l']);
        let read = RequestOp::read(key).encode_to_vec();
        assert_eq!(read, [0x0a, 3, 0x0a, 1, b'k']);
    }

    #[test]
    fn a_login_does_not_show_its_secrets() {
        let request = AuthenticateRequest { name: "u".into(), password: "secret".into() };
        assert!(!format!("{request:?}").contains("secret"));
        let response = AuthenticateResponse { token: "secret".into() };
        assert!(!format!("{response:?}").contains("secret"));
    }
}
