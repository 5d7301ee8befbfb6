//! TLS connection settings for the controller. Only certificates from the mesh's pinned CA are
//! accepted.
//!
//! Before the join only the CA's fingerprint is known, from the token. The controller sends its CA
//! certificate along. `Pin` compares that certificate with the fingerprint and then verifies the
//! chain. After the join the stored certificate is the only root. The expected server name is
//! always [`CONTROLLER_TLS_NAME`], independent of the dialled address: the CA identifies the
//! controller.

use std::sync::{Arc, OnceLock};

use ring::digest::{SHA256, digest};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use towline_proto::CONTROLLER_TLS_NAME;
use towline_proto::id::{Fingerprint, IdentityKey};

use crate::keys::Identity;

/// Returns the process-wide cryptography provider.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())).clone()
}

/// Returns the name that the controller's certificate must contain.
pub fn server_name() -> ServerName<'static> {
    // The constant is a DNS name, which a test verifies.
    ServerName::try_from(CONTROLLER_TLS_NAME).unwrap_or(ServerName::IpAddress(
        std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED).into(),
    ))
}

/// Returns the SHA-256 hash of a certificate.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, certificate).as_ref());
    Fingerprint(bytes)
}

/// Returns the Ed25519 key in a certificate.
pub fn public_key(certificate: &CertificateDer<'_>) -> Option<IdentityKey> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let info = parsed.public_key();
    let ed25519 = x509_parser::oid_registry::OID_SIG_ED25519;
    if info.algorithm.algorithm != ed25519 {
        return None;
    }
    IdentityKey::try_from(info.subject_public_key.data.as_ref()).ok()
}

/// Returns the start and the end of a certificate's validity, in seconds since 1970.
pub fn validity(certificate: &CertificateDer<'_>) -> Option<(i64, i64)> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some((parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp()))
}

/// Returns the settings for a join: trusts the CA with this fingerprint, and has no client
/// certificate.
pub fn joining(pin: Fingerprint) -> Result<ClientConfig, TlsError> {
    let verifier = Arc::new(Pin { fingerprint: pin, provider: provider() });
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Returns the settings for a member: trusts the CA, and uses the node's certificate if there is
/// one.
pub fn member(
    ca: &CertificateDer<'static>,
    client: Option<(&[CertificateDer<'static>], &Identity)>,
) -> Result<ClientConfig, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let mut config = match client {
        Some((chain, identity)) => {
            let certified = CertifiedKey::new(chain.to_vec(), identity.tls_key()?);
            certified.keys_match()?;
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Returns the CA certificate in a chain that `Pin` accepted.
pub fn pinned_ca(
    chain: &[CertificateDer<'_>],
    pin: Fingerprint,
) -> Option<CertificateDer<'static>> {
    chain.iter().find(|cert| fingerprint(cert) == pin).map(|cert| cert.clone().into_owned())
}

/// Verifier of the controller's chain, for the CA whose fingerprint is in the token.
#[derive(Debug)]
struct Pin {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let ca = pinned_ca(intermediates, self.fingerprint)
            .ok_or(TlsError::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(ca)?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| TlsError::General(error.to_string()))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General("TLS 1.2 is not supported".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_controllers_name_is_a_dns_name() {
        assert!(matches!(server_name(), ServerName::DnsName(_)));
    }

    #[test]
    fn the_key_in_a_certificate_is_found() {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let certificate =
            rcgen::CertificateParams::new(vec!["x".into()]).unwrap().self_signed(&key).unwrap();
        let found = public_key(certificate.der()).unwrap();
        assert_eq!(found.as_bytes().as_slice(), key.public_key_raw());
        let (from, until) = validity(certificate.der()).unwrap();
        assert!(from < until);
    }
}
