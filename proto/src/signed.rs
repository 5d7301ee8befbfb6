//! Signatures: Ed25519 (RFC 8032) over `domain || 0x00 || body`.
//!
//! A body is opaque here and stays the bytes that its signer wrote. The domain keeps a signature
//! of one purpose from being shown for another; none of them can begin a TLS 1.3 signature
//! (64 spaces) or an X.509 certificate (0x30), which the same keys sign too.

use bytes::Bytes;
use ring::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};

use crate::convert::Invalid;
use crate::id::IdentityKey;
use crate::limits;
use crate::node::{Grant, MeshConfig, Node, Record, Tombstone};
use crate::pb;

/// What a signature is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// A [`Grant`], by the CA.
    Grant,
    /// A [`Record`], by the node.
    Record,
    /// A [`Tombstone`], by the CA.
    Tombstone,
    /// A [`MeshConfig`], by the CA.
    Mesh,
}

impl Domain {
    fn separator(self) -> &'static [u8] {
        match self {
            Self::Grant => b"towline grant v1\0",
            Self::Record => b"towline record v1\0",
            Self::Tombstone => b"towline tombstone v1\0",
            Self::Mesh => b"towline mesh v1\0",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Grant => "grant",
            Self::Record => "record",
            Self::Tombstone => "tombstone",
            Self::Mesh => "mesh configuration",
        }
    }
}

/// Why a signed thing is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Untrusted {
    /// Nothing there.
    #[error("the {0} is missing")]
    Missing(&'static str),
    /// Not made by the key that should have made it, or changed since.
    #[error("the signature of the {0} does not verify")]
    Signature(&'static str),
    /// Well signed, badly formed.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// A record that says what its grant does not allow.
    #[error(transparent)]
    NotGranted(#[from] crate::node::NotGranted),
}

/// Signs `body`, which is encoded here once and never again.
pub fn sign(domain: Domain, body: &impl prost::Message, key: &Ed25519KeyPair) -> pb::Signed {
    sign_encoded(domain, body.encode_to_vec(), key)
}

/// Signs a body that is encoded already, as it is: whether it is well-formed is for the reader.
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

/// A grant that the CA signed.
pub fn grant(signed: Option<&pb::Signed>, ca: &IdentityKey) -> Result<Grant, Untrusted> {
    let body = verify(Domain::Grant, signed, ca)?;
    Ok(decode::<pb::Grant>(Domain::Grant, body)?.try_into()?)
}

/// A record that `identity` signed.
pub fn record(signed: Option<&pb::Signed>, identity: &IdentityKey) -> Result<Record, Untrusted> {
    let body = verify(Domain::Record, signed, identity)?;
    Ok(decode::<pb::Record>(Domain::Record, body)?.try_into()?)
}

/// A tombstone that the CA signed.
pub fn tombstone(signed: Option<&pb::Signed>, ca: &IdentityKey) -> Result<Tombstone, Untrusted> {
    let body = verify(Domain::Tombstone, signed, ca)?;
    Ok(decode::<pb::Tombstone>(Domain::Tombstone, body)?.try_into()?)
}

/// A mesh configuration that the CA signed.
pub fn mesh(signed: Option<&pb::Signed>, ca: &IdentityKey) -> Result<MeshConfig, Untrusted> {
    let body = verify(Domain::Mesh, signed, ca)?;
    Ok(decode::<pb::MeshConfig>(Domain::Mesh, body)?.try_into()?)
}

/// A whole node: the CA's grant, the node's record, and the one standing under the other, less
/// what the controller withholds (a controller can withhold, but neither forge nor alter).
/// `Ok(None)` for a node that has joined and not yet published.
pub fn node(entry: &pb::Entry, ca: &IdentityKey) -> Result<Option<Node>, Untrusted> {
    let grant = grant(entry.grant.as_ref(), ca)?;
    if entry.record.is_none() {
        return Ok(None);
    }
    let record = record(entry.record.as_ref(), &grant.identity_key)?;
    let withheld = crate::convert::prefixes(&entry.withheld)?;
    Ok(Some(Node::new(grant, record)?.without(&withheld)))
}
