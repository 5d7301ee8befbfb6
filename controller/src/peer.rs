//! Who the other end of a connection is, read from its certificate.
//!
//! The chain and its dates were verified by rustls before; this only reads names. A certificate
//! without exactly one name of ours names nobody.

use rustls_pki_types::CertificateDer;
use towline_proto::id::{IdentityKey, MeshId, NodeId};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::OID_SIG_ED25519;
use x509_parser::prelude::FromDer;

const SCHEME: &str = "towline://";

/// What a client's certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The mesh.
    pub mesh_id: MeshId,
    /// In which role.
    pub name: PeerName,
    /// The key of the certificate.
    pub key: IdentityKey,
}

/// The role in a client's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerName {
    /// A node.
    Node(NodeId),
    /// An administrator.
    Admin(String),
}

impl Peer {
    /// Reads a client's certificate; never panics, whatever the bytes.
    pub fn from_certificate(der: &[u8]) -> Option<Self> {
        let (certificate, key) = parse(der)?;
        let uri = our_uri(&certificate)?;
        let mut parts = uri.strip_prefix(SCHEME)?.split('/');
        let mesh_id = parts.next()?.parse().ok()?;
        let name = match (parts.next()?, parts.next()?) {
            ("node", id) => PeerName::Node(id.parse().ok()?),
            ("admin", name) if !name.is_empty() => PeerName::Admin(name.to_owned()),
            _ => return None,
        };
        parts.next().is_none().then_some(Self { mesh_id, name, key })
    }
}

/// Whether a certificate is past its end at `now` (seconds since 1970); one that cannot be read is.
pub fn is_expired(der: &[u8], now: i64) -> bool {
    parse(der).is_none_or(|(certificate, _)| certificate.validity().not_after.timestamp() < now)
}

/// Mesh and key in a CA's certificate.
pub fn mesh_authority(certificate: &CertificateDer<'_>) -> Option<(MeshId, IdentityKey)> {
    let (certificate, key) = parse(certificate)?;
    let mesh_id = our_uri(&certificate)?.strip_prefix(SCHEME)?.parse().ok()?;
    Some((mesh_id, key))
}

/// The name in a CA's certificate.
pub fn mesh_uri(mesh: MeshId) -> String {
    format!("{SCHEME}{mesh}")
}

/// The name in a node's certificate.
pub fn node_uri(mesh: MeshId, node: NodeId) -> String {
    format!("{SCHEME}{mesh}/node/{node}")
}

/// The name in an administrator's certificate.
pub fn admin_uri(mesh: MeshId, name: &str) -> String {
    format!("{SCHEME}{mesh}/admin/{name}")
}

fn parse(der: &[u8]) -> Option<(X509Certificate<'_>, IdentityKey)> {
    let (rest, certificate) = X509Certificate::from_der(der).ok()?;
    let spki = certificate.public_key();
    if !rest.is_empty() || spki.algorithm.algorithm != OID_SIG_ED25519 {
        return None;
    }
    let key = IdentityKey::try_from(spki.subject_public_key.data.as_ref()).ok()?;
    Some((certificate, key))
}

fn our_uri<'a>(certificate: &X509Certificate<'a>) -> Option<&'a str> {
    let names = certificate.subject_alternative_name().ok()??.value;
    let mut ours = names.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) if uri.starts_with(SCHEME) => Some(*uri),
        _ => None,
    });
    let uri = ours.next()?;
    ours.next().is_none().then_some(uri)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = Peer::from_certificate(&bytes);
        }
    }
}
