//! The only module that reads random bytes, and the hash of the random secrets in tokens. The
//! [`registry`](towline_registry) gets both as arguments.

use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use towline_proto::token::TokenSecret;

use towline_registry::token::SecretHash;

/// Error of reading random bytes from the operating system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot get random bytes from the operating system")]
pub struct NoEntropy;

/// Returns random bytes that may be used as a key.
pub fn random<const N: usize>() -> Result<[u8; N], NoEntropy> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| NoEntropy)?;
    Ok(bytes)
}

/// Returns a random number in 0 to 1 that spreads clients over time; 0.5 without random bytes.
pub fn fraction() -> f64 {
    random().map_or(0.5, |bytes| f64::from(u32::from_be_bytes(bytes)) / f64::from(u32::MAX))
}

/// Returns the SHA-256 of a token's secret. The secret is 32 random bytes, so no salt is needed.
pub fn secret_hash(secret: &TokenSecret) -> SecretHash {
    let hash = digest::digest(&digest::SHA256, &secret.0);
    // The digest of SHA-256 has 32 bytes.
    SecretHash(hash.as_ref().first_chunk().copied().unwrap_or_default())
}
