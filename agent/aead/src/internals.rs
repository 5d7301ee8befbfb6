//! What tests and benchmarks need beyond the public API: every backend of this CPU, whole nonces,
//! and associated data.

use crate::backend::Backend;
use crate::key::Key;
use crate::packets::{Context, Misplaced, Packet};

/// Returns the backends whose instructions this CPU has, the fastest first. ring is the last.
pub fn backends() -> Vec<Backend> {
    Backend::of_this_cpu().collect()
}

/// Seals like [`Key::seal`], with the first 4 bytes of the nonces and associated data for all
/// packets.
///
/// # Errors
///
/// Returns an error if the packets do not fit the arena.
pub fn seal(
    key: &Key,
    nonce_prefix: [u8; 4],
    aad: &[u8],
    arena: &mut [u8],
    packets: &[Packet],
) -> Result<(), Misplaced> {
    let context = Context { nonce_prefix: u32::from_le_bytes(nonce_prefix), aad };
    key.seal_with(&context, arena, packets)
}

/// Opens like [`Key::open`], with the first 4 bytes of the nonces and associated data for all
/// packets.
///
/// # Errors
///
/// Returns an error if the packets do not fit the arena.
pub fn open(
    key: &Key,
    nonce_prefix: [u8; 4],
    aad: &[u8],
    arena: &mut [u8],
    packets: &[Packet],
    authentic: &mut Vec<bool>,
) -> Result<(), Misplaced> {
    let context = Context { nonce_prefix: u32::from_le_bytes(nonce_prefix), aad };
    key.open_with(&context, arena, packets, authentic)
}
