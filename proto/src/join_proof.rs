//! Proof, at a join, that the node holds the WireGuard private key it names.
//!
//! The controller offers an X25519 key; both sides derive a key from the shared secret with
//! HKDF-SHA-256 (RFC 5869), and the node sends HMAC-SHA-256 over what it asks for. The certificate
//! signing request binds the proof to the identity key, so a proof that was seen is of no use to
//! anybody else.

use ring::hkdf;
use ring::hmac;

use crate::id::{TokenId, WireguardKey};

const INFO: &[u8] = b"towline join proof v1";

/// What the proof speaks of.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// The token that is used.
    pub token: TokenId,
    /// The key that is claimed.
    pub wireguard_key: &'a WireguardKey,
    /// The certificate signing request, DER.
    pub csr: &'a [u8],
}

/// The proof. `shared` is the X25519 secret of the node's WireGuard key and the controller's
/// proof key.
pub fn prove(shared: &[u8; 32], claim: Claim<'_>) -> Vec<u8> {
    hmac::sign(&key(shared), &message(claim)).as_ref().to_vec()
}

/// Whether `proof` was made with the same secret for the same claim; in constant time.
pub fn verify(shared: &[u8; 32], claim: Claim<'_>, proof: &[u8]) -> bool {
    hmac::verify(&key(shared), &message(claim), proof).is_ok()
}

fn key(shared: &[u8; 32]) -> hmac::Key {
    let secret = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(shared);
    // 32 bytes can always be expanded: the bound is 255 times the hash's length.
    let Ok(key) = secret.expand(&[INFO], hmac::HMAC_SHA256) else { unreachable!() };
    hmac::Key::from(key)
}

fn message(claim: Claim<'_>) -> Vec<u8> {
    [claim.token.as_bytes().as_slice(), claim.wireguard_key.as_bytes(), claim.csr].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_own_claim_only() {
        let key = WireguardKey([1; 32]);
        let claim = Claim { token: TokenId([2; 8]), wireguard_key: &key, csr: b"csr" };
        let proof = prove(&[7; 32], claim);
        assert!(verify(&[7; 32], claim, &proof));
        assert!(!verify(&[8; 32], claim, &proof));
        assert!(!verify(&[7; 32], Claim { csr: b"other", ..claim }, &proof));
        assert!(!verify(&[7; 32], Claim { token: TokenId([3; 8]), ..claim }, &proof));
    }
}
