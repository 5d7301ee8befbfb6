//! Signatures: Ed25519 (RFC 8032) over `domain || 0x00 || body`.
//!
//! A body is opaque here and is never re-encoded after its signer wrote it. The domain prevents a
//! signature for one purpose from being presented for another. It also tells statements apart from
//! the other data that the same keys sign: TLS 1.3 handshakes (which start with 64 spaces) and
//! X.509 certificates (which start with 0x30).

use bytes::Bytes;
use ring::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};

use crate::convert::Invalid;
use crate::id::IdentityKey;
use crate::limits;
use crate::node::{Grant, Head, MeshConfig, Node, Record, Tombstone};
use crate::pb;

/// Purpose of a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// Signature of the CA over a [`Grant`].
    Grant,
    /// Signature of the node over its [`Record`].
    Record,
    /// Signature of the CA over a [`Tombstone`].
    Tombstone,
    /// Signature of the CA over the [`MeshConfig`].
    Mesh,
    /// Signature of the CA over a [`Head`].
    Head,
}

impl Domain {
    fn separator(self) -> &'static [u8] {
        match self {
            Self::Grant => b"towline grant v1\0",
            Self::Record => b"towline record v1\0",
            Self::Tombstone => b"towline tombstone v1\0",
            Self::Mesh => b"towline mesh v1\0",
            Self::Head => b"towline head v1\0",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Grant => "grant",
            Self::Record => "record",
            Self::Tombstone => "tombstone",
            Self::Mesh => "mesh configuration",
            Self::Head => "head of the map",
        }
    }
}

/// Error of verifying and parsing a signed message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Untrusted {
    /// The message is absent.
    #[error("the {0} is missing")]
    Missing(&'static str),
    /// The signature is not of the expected key, or the body was changed.
    #[error("the signature of the {0} does not verify")]
    Signature(&'static str),
    /// The signature is valid, but the body is malformed.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The grant does not allow the record.
    #[error(transparent)]
    NotGranted(#[from] crate::node::NotGranted),
}

/// Encodes `body` and signs the encoded bytes.
pub fn sign(domain: Domain, body: &impl prost::Message, key: &Ed25519KeyPair) -> pb::Signed {
    sign_encoded(domain, body.encode_to_vec(), key)
}

/// Signs a body that is encoded already, without checking that it is well-formed.
pub fn sign_encoded(domain: Domain, body: Vec<u8>, key: &Ed25519KeyPair) -> pb::Signed {
    let signature = key.sign(&message(domain, &body));
    pb::Signed { body: body.into(), signature: Bytes::copy_from_slice(signature.as_ref()) }
}

fn verify<'a>(
    domain: Domain,
    signed: Option<&'a pb::Signed>,
    key: &IdentityKey,
) -> Result<&'a [u8], Untrusted> {
    let signed = signed.ok_or(Untrusted::Missing(domain.name()))?;
    if signed.body.len() > limits::SIGNED_BODY_BYTES {
        return Err(Invalid::TooLong(domain.name()).into());
    }
    UnparsedPublicKey::new(&ED25519, key.as_bytes())
        .verify(&message(domain, &signed.body), &signed.signature)
        .map_err(|_| Untrusted::Signature(domain.name()))?;
    Ok(&signed.body)
}

fn message(domain: Domain, body: &[u8]) -> Vec<u8> {
    [domain.separator(), body].concat()
}

fn decode<M: prost::Message + Default>(domain: Domain, body: &[u8]) -> Result<M, Untrusted> {
    M::decode(body).map_err(|_| Invalid::Malformed(domain.name()).into())
}

/// Verifies and parses a grant that the CA signed.
pub fn grant(signed: Option<&pb::Signed>, ca: &IdentityKey) -> Result<Grant, Untrusted> {
    let body = verify(Domain::Grant, signed, ca)?;
    Ok(decode::<pb::Grant>(Domain::Grant, body)?.try_into()?)
}

/// Verifies and parses a record that `identity` signed.
pub fn record(signed: Option<&pb::Signed>, identity: &IdentityKey) -> Result<Record, Untrusted> {
    let body = verify(Domain::Record, signed, identity)?;
    Ok(decode::<pb::Record>(Domain::Record, body)?.try_into()?)
}

/// Verifies and parses a tombstone that the CA signed.
pub fn tombstone(signed: Option<&pb::Signed>, ca: &IdentityKey) -> Result<Tombstone, Untrusted> {
    let body = verify(Domain::Tombstone, signed, ca)?;
    Ok(decode::<pb::Tombstone>(Domain::Tombstone, body)?.try_into()?)
}

/// Verifies and parses a mesh configuration that the CA signed.
pub fn mesh(signed: Option<&pb::Signed>, ca: &IdentityKey) -> Result<MeshConfig, Untrusted> {
    let body = verify(Domain::Mesh, signed, ca)?;
    Ok(decode::<pb::MeshConfig>(Domain::Mesh, body)?.try_into()?)
}

/// Verifies and parses a head of the map that the CA signed.
pub fn head(signed: Option<&pb::Signed>, ca: &IdentityKey) -> Result<Head, Untrusted> {
    let body = verify(Domain::Head, signed, ca)?;
    Ok(decode::<pb::Head>(Domain::Head, body)?.try_into()?)
}

/// Verifies a map entry: the CA's grant, the node's record, and that the grant allows the record.
/// Prefixes that the controller withholds are removed from the result (a controller can withhold
/// them, but neither forge nor alter any). Returns `Ok(None)` for a node that has joined but has
/// not yet published a record.
pub fn node(entry: &pb::Entry, ca: &IdentityKey) -> Result<Option<Node>, Untrusted> {
    let grant = grant(entry.grant.as_ref(), ca)?;
    if entry.record.is_none() {
        return Ok(None);
    }
    let record = record(entry.record.as_ref(), &grant.identity_key)?;
    let withheld = crate::convert::prefixes(&entry.withheld)?;
    Ok(Some(Node::new(grant, record)?.without(&withheld)))
}
