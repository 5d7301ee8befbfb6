//! Proof that a joining node holds the private key of its WireGuard public key.
//!
//! The controller offers an X25519 key. Both sides derive a key from the shared secret with
//! HKDF-SHA-256 (RFC 5869), and the node sends an HMAC-SHA-256 over its [`Claim`]. The certificate
//! signing request in it binds the proof to the identity key, so that another machine cannot reuse
//! a proof that it saw.

use ring::hkdf;
use ring::hmac;

use crate::id::{TokenId, WireguardKey};

/// Info string of the HKDF expansion.
const INFO: &[u8] = b"towline join proof v1";

/// Content that the proof authenticates.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// Id of the join token.
    pub token: TokenId,
    /// WireGuard public key of the node.
    pub wireguard_key: &'a WireguardKey,
    /// Certificate signing request, in DER.
    pub csr: &'a [u8],
}

/// Returns the proof for a claim. `shared` is the X25519 shared secret of the node's WireGuard key
/// and the controller's proof key.
pub fn prove(shared: &[u8; 32], claim: Claim<'_>) -> Vec<u8> {
    hmac::sign(&key(shared), &message(claim)).as_ref().to_vec()
}

/// Returns whether `proof` was made with the same secret for the same claim. Compares in constant
/// time.
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
