//! Check of an API server: a TLS handshake, and nothing more.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, DigitallySignedStruct, Error as TlsError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use towline_service::tls;

use super::balancer::Failure;

/// Longest duration of a check. A handshake needs two round trips, of 0.5 s at most over a satellite.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Returns the TLS settings of the checks.
pub(super) fn settings() -> Result<Arc<ClientConfig>, TlsError> {
    let verifier = Arc::new(AnyCertificate { provider: tls::provider() });
    let settings = ClientConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(Arc::new(settings))
}

/// Completes a TLS handshake with the server at `address`, and returns the time that the connection took.
pub(super) async fn check(
    address: SocketAddr,
    settings: Arc<ClientConfig>,
) -> Result<Duration, Failure> {
    let handshake = async {
        let begun = Instant::now();
        let stream = TcpStream::connect(address).await.map_err(|error| Failure::of(&error))?;
        let time = begun.elapsed();
        let name = ServerName::IpAddress(address.ip().into());
        match TlsConnector::from(settings).connect(name, stream).await {
            Ok(mut stream) => {
                // The server logs no error for a connection that ends in order.
                let _ = stream.shutdown().await;
                Ok(time)
            }
            Err(error) if is_alert(&error) => Ok(time),
            Err(error) => Err(Failure::of(&error)),
        }
    };
    timeout(TIMEOUT, handshake).await.unwrap_or(Err(Failure::Silent))
}

/// Returns whether the server refused the handshake in the words of TLS: it runs, but wants, for example,
/// another name.
fn is_alert(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>());
    matches!(inner, Some(TlsError::AlertReceived(_)))
}

impl Failure {
    /// Returns the reason of an error of a connection or a handshake.
    pub(super) fn of(error: &io::Error) -> Self {
        let kind = error.kind();
        if kind == io::ErrorKind::ConnectionRefused {
            Self::Refused
        } else if kind == io::ErrorKind::TimedOut {
            Self::Silent
        } else if kind == io::ErrorKind::InvalidData {
            Self::NotTls
        } else {
            Self::Unreachable
        }
    }
}

/// Verifier that accepts every certificate. A check sends nothing that is secret, and uses nothing of what it
/// receives except that it came. Clients of the endpoint verify the API server themselves, end to end.
#[derive(Debug)]
struct AnyCertificate {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
