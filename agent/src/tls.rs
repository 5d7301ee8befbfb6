//! TLS connection settings for the controller. Only certificates from the mesh's pinned CA are
//! accepted.
//!
//! Before the join only the CA's fingerprint is known, from the token. The controller sends its CA
//! certificate along. `Pin` compares that certificate with the fingerprint and then verifies the
//! chain. After the join the stored certificate is the only root.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use towline_proto::id::Fingerprint;
use towline_service::{certificate, tls};

use crate::keys::Identity;

/// Returns the settings for a join: trusts the CA with this fingerprint, and has no client
/// certificate.
pub fn joining(pin: Fingerprint) -> Result<ClientConfig, TlsError> {
    let verifier = Arc::new(Pin { fingerprint: pin, provider: tls::provider() });
    let mut config =
        tls::client()?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    Ok(config)
}

/// Returns the settings for a member: trusts the CA, and uses the node's certificate if there is
/// one.
pub fn member(
    ca: &CertificateDer<'static>,
    client: Option<(&[CertificateDer<'static>], &Identity)>,
) -> Result<ClientConfig, TlsError> {
    let builder = tls::client_of(ca)?;
    let mut config = match client {
        Some((chain, identity)) => {
            let certified = CertifiedKey::new(chain.to_vec(), identity.tls_key()?);
            certified.keys_match()?;
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    Ok(config)
}

/// Returns the CA certificate in a chain that `Pin` accepted.
pub fn pinned_ca(
    chain: &[CertificateDer<'_>],
    pin: Fingerprint,
) -> Option<CertificateDer<'static>> {
    chain
        .iter()
        .find(|cert| certificate::fingerprint(cert) == pin)
        .map(|cert| cert.clone().into_owned())
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
        let roots = Arc::new(tls::roots(&ca)?);
        WebPkiServerVerifier::builder_with_provider(roots, self.provider.clone())
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
