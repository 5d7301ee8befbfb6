//! TLS configuration of the controller: version 1.3, a short-lived server certificate, and optional
//! client certificates of the mesh.
//!
//! The server certificate is renewed while the server runs ([`ServerCertificate::renew`]). Existing
//! connections are not affected. Sessions are never resumed, so certificates are presented and
//! verified on each connection.

use std::fmt;
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use towline_service::tls;

use crate::authority::{self, Authority, AuthorityError, SERVER_LIFE};

/// Error of setting up TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The server certificate cannot be issued.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// rustls refused the configuration.
    #[error("cannot set up TLS: {0}")]
    Rustls(#[from] Error),
    /// The verifier for the mesh's CA cannot be created.
    #[error("cannot set up TLS: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// The controller's own certificate, which is renewed while it runs.
pub struct ServerCertificate {
    current: RwLock<Current>,
}

struct Current {
    key: Arc<CertifiedKey>,
    /// Time of issue in seconds since 1970.
    issued_at: i64,
}

impl ServerCertificate {
    /// Issues the first certificate.
    pub fn new(authority: &Authority, now: i64) -> Result<Self, TlsError> {
        let key = certified_key(authority, now)?;
        Ok(Self { current: RwLock::new(Current { key, issued_at: now }) })
    }

    /// Renews the certificate if half of its lifetime is over, or if the clock was set back to
    /// before its issue. Returns whether it was renewed.
    pub fn renew(&self, authority: &Authority, now: i64) -> Result<bool, TlsError> {
        if !is_due(self.current.read().issued_at, SERVER_LIFE, now) {
            return Ok(false);
        }
        let key = certified_key(authority, now)?;
        *self.current.write() = Current { key, issued_at: now };
        Ok(true)
    }
}

/// Returns whether a certificate with the lifetime `life` is due for renewal.
pub fn is_due(issued_at: i64, life: std::time::Duration, now: i64) -> bool {
    let half = i64::try_from(life.as_secs() / 2).unwrap_or(i64::MAX);
    now < issued_at || now - issued_at >= half
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().key.clone())
    }
}

impl fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCertificate").finish_non_exhaustive()
    }
}

fn certified_key(authority: &Authority, now: i64) -> Result<Arc<CertifiedKey>, TlsError> {
    let (certificate, key) = authority::server_credential(authority, now)?;
    // The chain includes the CA, since a joining node has only its fingerprint.
    let chain = vec![certificate, authority.certificate().clone()];
    Ok(Arc::new(CertifiedKey::from_der(chain, PrivateKeyDer::from(key), &tls::provider())?))
}

/// Returns the TLS configuration of the server.
pub fn server_config(
    authority: &Authority,
    certificate: Arc<ServerCertificate>,
) -> Result<ServerConfig, TlsError> {
    let verifier = MeshVerifier::new(authority)?;
    let mut config = ServerConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(tls::VERSIONS)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Verifier of client certificates: accepts those of the mesh's CA, and clients without one.
///
/// An expired certificate is accepted, because a node that was switched off for longer than the
/// certificate's lifetime must be able to renew it. `service::auth` allows it only
/// `Renew`, and the RPCs that need no certificate.
#[derive(Debug)]
struct MeshVerifier {
    inner: Arc<dyn ClientCertVerifier>,
}

impl MeshVerifier {
    fn new(authority: &Authority) -> Result<Self, TlsError> {
        let roots = Arc::new(tls::roots(authority.certificate())?);
        let inner = WebPkiClientVerifier::builder_with_provider(roots, tls::provider())
            .allow_unauthenticated()
            .build()?;
        Ok(Self { inner })
    }
}

impl ClientCertVerifier for MeshVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match self.inner.verify_client_cert(end_entity, intermediates, now) {
            Err(Error::InvalidCertificate(CertificateError::ExpiredContext {
                not_after, ..
            })) => self.inner.verify_client_cert(end_entity, intermediates, not_after),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{KeyPair, PKCS_ED25519};
    use std::time::Duration;
    use towline_proto::id::NodeId;

    use super::*;
    use crate::authority::{NODE_LIFE, Subject};
    use crate::state_dir::StateDir;

    const NOW: i64 = 1_700_000_000;

    fn verify(authority: &Authority, certificate: &CertificateDer<'_>, at: i64) -> bool {
        let verifier = MeshVerifier::new(authority).unwrap();
        let at = UnixTime::since_unix_epoch(Duration::from_secs(at as u64));
        verifier.verify_client_cert(certificate, &[], at).is_ok()
    }

    #[test]
    fn certificates_of_this_mesh_are_let_through_and_others_are_not() {
        let root = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let ours = Authority::load_or_create(&StateDir::new(root.path()), true, NOW).unwrap();
        let theirs = Authority::load_or_create(&StateDir::new(other.path()), true, NOW).unwrap();
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let certificate = ours.issue(Subject::Node(NodeId([1; 16])), &key, NOW).unwrap();
        assert!(verify(&ours, &certificate, NOW));
        assert!(verify(&ours, &certificate, NOW - 3000), "a clock that is behind");
        assert!(!verify(&ours, &certificate, NOW - 4000));
        let expired = NOW + 2 * NODE_LIFE.as_secs() as i64;
        assert!(verify(&ours, &certificate, expired), "expired, to be renewed");

        let foreign = theirs.issue(Subject::Node(NodeId([1; 16])), &key, NOW).unwrap();
        assert!(!verify(&ours, &foreign, NOW));
        assert!(!verify(&ours, &foreign, expired));
        let server = ours.issue(Subject::Controller, &key, NOW).unwrap();
        assert!(!verify(&ours, &server, NOW), "a server's certificate is no client's");
    }

    #[test]
    fn a_certificate_is_replaced_at_half_its_life_or_when_the_clock_went_back() {
        let life = Duration::from_secs(100);
        assert!(!is_due(NOW, life, NOW));
        assert!(!is_due(NOW, life, NOW + 49));
        assert!(is_due(NOW, life, NOW + 50));
        assert!(is_due(NOW, life, NOW - 1));
    }
}
