//! TLS between the programs of a mesh: version 1.3 with HTTP/2, under the mesh's CA.

use std::sync::{Arc, OnceLock};

use rustls::client::{ClientConfig, WantsClientCert};
use rustls::crypto::CryptoProvider;
use rustls::{ConfigBuilder, Error, RootCertStore, WantsVerifier};
use rustls_pki_types::{CertificateDer, ServerName};
use towline_proto::CONTROLLER_TLS_NAME;

/// ALPN protocol id of HTTP/2 over TLS (RFC 9113 section 3.2).
pub const ALPN: &[u8] = b"h2";
/// Versions of TLS that are offered and accepted.
pub const VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// Returns the process-wide cryptography provider.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())).clone()
}

/// Returns the name that the controller's certificate must contain, independent of the address that
/// is dialled: the CA identifies the controller.
pub fn server_name() -> ServerName<'static> {
    // The constant is a DNS name, which a test verifies.
    ServerName::try_from(CONTROLLER_TLS_NAME).unwrap_or(ServerName::IpAddress(
        std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED).into(),
    ))
}

/// Begins the configuration of a client.
///
/// # Errors
///
/// If the provider has no cipher suite for the versions.
pub fn client() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, Error> {
    ClientConfig::builder_with_provider(provider()).with_protocol_versions(VERSIONS)
}

/// Begins the configuration of a client that trusts one CA.
///
/// # Errors
///
/// If the CA's certificate is damaged.
pub fn client_of(
    ca: &CertificateDer<'static>,
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, Error> {
    Ok(client()?.with_root_certificates(roots(ca)?))
}

/// Returns a store with one CA.
///
/// # Errors
///
/// If the CA's certificate is damaged.
pub fn roots(ca: &CertificateDer<'static>) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_controllers_name_is_a_dns_name() {
        assert!(matches!(server_name(), ServerName::DnsName(_)));
    }
}
