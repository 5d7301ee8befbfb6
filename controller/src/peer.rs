//! Identity of a TLS client, parsed from its certificate.
//!
//! rustls has verified the chain and that the validity has begun; an expired certificate passes, and
//! `service::auth` checks that. This module only parses names. A client
//! whose certificate does not have exactly one `towline://` name has no identity.

use rustls_pki_types::CertificateDer;
use towline_proto::id::{IdentityKey, MeshId, NodeId};
use towline_service::certificate;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

/// Scheme of the URIs in the subject alternative names of Towline's certificates.
const SCHEME: &str = "towline://";

/// Identity in a client's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Mesh of the client.
    pub mesh_id: MeshId,
    /// Role and name of the client.
    pub name: PeerName,
    /// Public key of the certificate.
    pub key: IdentityKey,
}

/// Role and name in a client's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerName {
    /// The client is a node.
    Node(NodeId),
    /// The client is an administrator of this name.
    Admin(String),
}

impl Peer {
    /// Parses a client's certificate. Returns `None` if it has no identity. Never panics on any
    /// bytes.
    pub fn from_certificate(der: &[u8]) -> Option<Self> {
        let (certificate, key) = certificate::parse(der)?;
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

/// Returns the end of a certificate's validity, in seconds since 1970; `None` if it cannot be parsed.
pub fn expires_at(der: &[u8]) -> Option<i64> {
    certificate::validity(der).map(|(_, until)| until)
}

/// Returns the mesh id and the key in a CA's certificate.
pub fn mesh_authority(certificate: &CertificateDer<'_>) -> Option<(MeshId, IdentityKey)> {
    let (certificate, key) = certificate::parse(certificate)?;
    let mesh_id = our_uri(&certificate)?.strip_prefix(SCHEME)?.parse().ok()?;
    Some((mesh_id, key))
}

/// Returns the URI in a CA's certificate.
pub fn mesh_uri(mesh: MeshId) -> String {
    format!("{SCHEME}{mesh}")
}

/// Returns the URI in a node's certificate.
pub fn node_uri(mesh: MeshId, node: NodeId) -> String {
    format!("{SCHEME}{mesh}/node/{node}")
}

/// Returns the URI in an administrator's certificate.
pub fn admin_uri(mesh: MeshId, name: &str) -> String {
    format!("{SCHEME}{mesh}/admin/{name}")
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
