//! What Towline reads from an X.509 certificate.

use ring::digest::{SHA256, digest};
use towline_types::id::{Fingerprint, IdentityKey};
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::OID_SIG_ED25519;
use x509_parser::prelude::FromDer as _;

/// Parses a certificate. Returns it with its public key, or `None` if it is malformed or its key is
/// not Ed25519. Never panics on any bytes.
pub fn parse(der: &[u8]) -> Option<(X509Certificate<'_>, IdentityKey)> {
    let (rest, certificate) = X509Certificate::from_der(der).ok()?;
    let key = certificate.public_key();
    if !rest.is_empty() || key.algorithm.algorithm != OID_SIG_ED25519 {
        return None;
    }
    let key = IdentityKey::try_from(key.subject_public_key.data.as_ref()).ok()?;
    Some((certificate, key))
}

/// Returns the Ed25519 key in a certificate.
pub fn public_key(der: &[u8]) -> Option<IdentityKey> {
    parse(der).map(|(_, key)| key)
}

/// Returns the start and the end of a certificate's validity, in seconds since 1970.
pub fn validity(der: &[u8]) -> Option<(i64, i64)> {
    let (certificate, _) = parse(der)?;
    let validity = certificate.validity();
    Some((validity.not_before.timestamp(), validity.not_after.timestamp()))
}

/// Returns the SHA-256 hash of a certificate.
pub fn fingerprint(der: &[u8]) -> Fingerprint {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, der).as_ref());
    Fingerprint(bytes)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519};

    use super::*;

    fn certificate(key: &KeyPair) -> Vec<u8> {
        let params = CertificateParams::new(vec!["x".into()]).unwrap();
        params.self_signed(key).unwrap().der().to_vec()
    }

    #[test]
    fn the_key_in_a_certificate_is_found() {
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let mut certificate = certificate(&key);
        let found = public_key(&certificate).unwrap();
        assert_eq!(found.as_bytes().as_slice(), key.public_key_raw());
        let (from, until) = validity(&certificate).unwrap();
        assert!(from < until);
        certificate.push(0);
        assert_eq!(public_key(&certificate), None, "bytes after the certificate");
    }

    #[test]
    fn a_key_of_another_kind_is_none() {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        assert_eq!(public_key(&certificate(&key)), None);
    }
}
