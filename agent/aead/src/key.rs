//! A key, and the batches that it seals and opens.

use crate::backend::{Backend, Keys};
use crate::packets::{Context, KEY_BYTES, Misplaced, Packet, check};

/// Key of one direction of a session, bound to a backend.
pub struct Key {
    keys: Keys,
    backend: Backend,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("backend", &self.backend).finish_non_exhaustive()
    }
}

impl Key {
    /// Creates a key from its bytes, which the caller should wipe.
    pub fn new(bytes: &[u8; KEY_BYTES], backend: Backend) -> Self {
        Self { keys: Keys::new(bytes), backend }
    }

    /// Encrypts each packet of the arena in place and writes its tag behind it. The packets are in
    /// the order of their positions.
    ///
    /// # Errors
    ///
    /// Returns an error, and changes nothing, if the packets do not fit the arena.
    #[inline]
    pub fn seal(&self, arena: &mut [u8], packets: &[Packet]) -> Result<(), Misplaced> {
        self.seal_with(&Context::WIREGUARD, arena, packets)
    }

    /// Verifies each packet of the arena, and decrypts those that are authentic in place. Replaces
    /// the entries of `authentic` with one for each packet. The packets are in the order of their
    /// positions.
    ///
    /// # Errors
    ///
    /// Returns an error, and changes nothing in the arena, if the packets do not fit it. There are
    /// no entries then.
    #[inline]
    pub fn open(
        &self,
        arena: &mut [u8],
        packets: &[Packet],
        authentic: &mut Vec<bool>,
    ) -> Result<(), Misplaced> {
        self.open_with(&Context::WIREGUARD, arena, packets, authentic)
    }

    /// Seals like [`Key::seal`], with a part of the nonce and associated data for all packets.
    pub(crate) fn seal_with(
        &self,
        context: &Context<'_>,
        arena: &mut [u8],
        packets: &[Packet],
    ) -> Result<(), Misplaced> {
        check(arena.len(), packets)?;
        self.backend.seal(&self.keys, context, arena, packets)
    }

    /// Opens like [`Key::open`], with a part of the nonce and associated data for all packets.
    pub(crate) fn open_with(
        &self,
        context: &Context<'_>,
        arena: &mut [u8],
        packets: &[Packet],
        authentic: &mut Vec<bool>,
    ) -> Result<(), Misplaced> {
        authentic.clear();
        check(arena.len(), packets)?;
        authentic.resize(packets.len(), false);
        self.backend.open(&self.keys, context, arena, packets, authentic)
    }
}
