//! The node's two key pairs. They are created on this machine, stored in files of mode 0600, and
//! never sent.
//!
//! - The **identity key** (Ed25519, PKCS#8 in PEM) signs the node's records, its certificate
//!   signing requests and its TLS handshakes.
//! - The **WireGuard key** (X25519, base64 as WireGuard's tools write it) is for the tunnels.

use std::fmt;
use std::sync::Arc;

use data_encoding::BASE64;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::crypto::ring::sign::any_eddsa_type;
use rustls::sign::SigningKey;
use rustls_pki_types::PrivatePkcs8KeyDer;
use towline_proto::id::{IdentityKey, WireguardKey};
use towline_proto::join_proof::Claim;
use towline_proto::{id::TokenId, join_proof, pb, signed};
use towline_service::pem;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize as _, Zeroizing};

/// Error of a key that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidKey(&'static str);

/// Identity key pair of the node.
#[derive(Clone)]
pub struct Identity {
    pkcs8: Arc<Zeroizing<Vec<u8>>>,
    pair: Arc<Ed25519KeyPair>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.public())
    }
}

impl Identity {
    /// Creates a new key pair.
    pub fn generate() -> Result<Self, InvalidKey> {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new())
            .map_err(|_| InvalidKey("the kernel returned no random bytes"))?;
        Self::from_pkcs8(Zeroizing::new(pkcs8.as_ref().to_vec()))
    }

    /// Parses the text of the key file.
    pub fn from_pem(pem: &str) -> Result<Self, InvalidKey> {
        let der =
            pem::read_private_key(pem).ok_or(InvalidKey("not a PKCS#8 private key in PEM"))?;
        Self::from_pkcs8(der)
    }

    fn from_pkcs8(pkcs8: Zeroizing<Vec<u8>>) -> Result<Self, InvalidKey> {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&pkcs8)
            .map_err(|_| InvalidKey("not an Ed25519 private key"))?;
        Ok(Self { pkcs8: Arc::new(pkcs8), pair: Arc::new(pair) })
    }

    /// Returns the text of the key file.
    pub fn to_pem(&self) -> Zeroizing<String> {
        pem::private_key(&self.pkcs8)
    }

    /// Returns the public key.
    pub fn public(&self) -> IdentityKey {
        let mut key = [0; 32];
        key.copy_from_slice(self.pair.public_key().as_ref());
        IdentityKey(key)
    }

    /// Returns the private key for rustls. rustls keeps ring's key pair, and no copy of the file's
    /// bytes.
    pub fn tls_key(&self) -> Result<Arc<dyn SigningKey>, rustls::Error> {
        any_eddsa_type(&PrivatePkcs8KeyDer::from(self.pkcs8.as_slice()))
    }

    /// Returns a certificate signing request (PKCS#10, DER). It requests no attributes: the
    /// controller decides the content of the certificate.
    pub fn signing_request(&self) -> Result<Vec<u8>, InvalidKey> {
        let failed = |_| InvalidKey("cannot create a certificate signing request");
        let mut key = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(
            &PrivatePkcs8KeyDer::from(self.pkcs8.as_slice()),
            &rcgen::PKCS_ED25519,
        )
        .map_err(failed)?;
        let params = rcgen::CertificateParams::default();
        let request = params.serialize_request(&key).map_err(failed);
        // rcgen does not zeroize the key by itself.
        key.zeroize();
        Ok(request?.der().to_vec())
    }

    /// Signs a record.
    pub fn sign_record(&self, record: &pb::Record) -> pb::Signed {
        signed::sign(signed::Domain::Record, record, &self.pair)
    }
}

/// WireGuard key pair of the node.
#[derive(Clone)]
pub struct Wireguard(StaticSecret);

impl fmt::Debug for Wireguard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wireguard({})", self.public())
    }
}

impl Wireguard {
    /// Creates a new key pair.
    pub fn generate() -> Result<Self, InvalidKey> {
        let mut bytes = Zeroizing::new([0; 32]);
        ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), bytes.as_mut())
            .map_err(|_| InvalidKey("the kernel returned no random bytes"))?;
        Ok(Self(StaticSecret::from(*bytes)))
    }

    /// Parses the text of the key file.
    pub fn from_base64(text: &str) -> Result<Self, InvalidKey> {
        let invalid = InvalidKey("not a WireGuard private key in base64");
        let bytes = BASE64.decode(text.trim().as_bytes()).map(Zeroizing::new);
        let bytes = bytes.map_err(|_| invalid.clone())?;
        let bytes: Zeroizing<[u8; 32]> =
            Zeroizing::new(bytes.as_slice().try_into().map_err(|_| invalid)?);
        Ok(Self(StaticSecret::from(*bytes)))
    }

    /// Returns the text of the key file.
    pub fn to_base64(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(64));
        BASE64.encode_append(self.0.as_bytes(), &mut text);
        text.push('\n');
        text
    }

    /// Returns the public key.
    pub fn public(&self) -> WireguardKey {
        WireguardKey(PublicKey::from(&self.0).to_bytes())
    }

    /// Returns the private key, for the data plane.
    pub fn secret(&self) -> &StaticSecret {
        &self.0
    }

    /// Returns the X25519 secret shared with `other`. `None` for a key of low order, for which all
    /// nodes would get the same secret.
    pub fn shared(&self, other: &WireguardKey) -> Option<Zeroizing<[u8; 32]>> {
        let shared = self.0.diffie_hellman(&PublicKey::from(other.0));
        shared.was_contributory().then(|| Zeroizing::new(shared.to_bytes()))
    }

    /// Returns the proof, for a join, that this node has the private key. `None` for a proof key of
    /// low order.
    pub fn join_proof(
        &self,
        proof_key: &WireguardKey,
        token: TokenId,
        csr: &[u8],
    ) -> Option<Vec<u8>> {
        let shared = self.shared(proof_key)?;
        let claim = Claim { token, wireguard_key: &self.public(), csr };
        Some(join_proof::prove(&shared, claim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_read_back_what_they_write() {
        let identity = Identity::generate().unwrap();
        assert_eq!(Identity::from_pem(&identity.to_pem()).unwrap().public(), identity.public());
        let wireguard = Wireguard::generate().unwrap();
        let read = Wireguard::from_base64(&wireguard.to_base64()).unwrap();
        assert_eq!(read.public(), wireguard.public());
    }

    #[test]
    fn a_debug_print_shows_only_the_public_half() {
        let wireguard = Wireguard::generate().unwrap();
        let shown = format!("{wireguard:?}");
        assert!(shown.contains(&wireguard.public().to_string()));
        assert!(!shown.contains(wireguard.to_base64().trim()));
    }

    #[test]
    fn a_key_of_low_order_gives_no_secret() {
        assert!(Wireguard::generate().unwrap().shared(&WireguardKey([0; 32])).is_none());
    }

    #[test]
    fn the_signing_request_verifies_and_holds_the_identity_key() {
        let identity = Identity::generate().unwrap();
        let der = identity.signing_request().unwrap();
        let request =
            rcgen::CertificateSigningRequestParams::from_der(&der.as_slice().into()).unwrap();
        use rcgen::PublicKeyData as _;
        assert_eq!(request.public_key.der_bytes(), identity.public().as_bytes());
    }
}
