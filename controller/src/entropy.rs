//! The only module that reads random bytes. The [`registry`](crate::registry) gets them as
//! arguments.

use ring::rand::{SecureRandom, SystemRandom};

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
