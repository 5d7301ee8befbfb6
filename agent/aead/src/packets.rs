//! Lengths, and positions of packets in an arena.

#![deny(clippy::indexing_slicing)]

use std::mem;

/// Length of a key in bytes.
pub const KEY_BYTES: usize = 32;
/// Length of a tag in bytes.
pub const TAG_BYTES: usize = 16;
/// Largest length of a packet in bytes, without its tag: no datagram and no packet of a TUN is
/// longer. It also keeps ChaCha20's 32-bit block counter far from its end.
pub const MAX_PACKET_BYTES: usize = 65_536;

/// Position of a packet in the arena of its batch, and its counter. The tag is in the
/// [`TAG_BYTES`] bytes after the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Position of the first byte in the arena.
    pub start: usize,
    /// Length in bytes, without the tag. At most [`MAX_PACKET_BYTES`].
    pub len: usize,
    /// Counter of WireGuard's data message: the last 8 bytes of the nonce.
    pub counter: u64,
}

/// Error of a batch whose packets are not in the order of their positions, overlap, are too long,
/// or do not fit the arena with their tags. No packet of it was sealed or opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("packets overlap, are too long, or are not inside the buffer in ascending order")]
pub struct Misplaced;

/// Part of the nonce and the associated data that all packets of a batch share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    /// First 4 bytes of each nonce, as a little-endian number.
    pub(crate) nonce_prefix: u32,
    /// Associated data of each packet.
    pub(crate) aad: &'a [u8],
}

impl Context<'static> {
    /// Context of WireGuard's data messages.
    pub(crate) const WIREGUARD: Self = Self { nonce_prefix: 0, aad: &[] };
}

/// Checks that the packets can be divided from an arena of this length.
pub(crate) fn check(arena: usize, packets: &[Packet]) -> Result<(), Misplaced> {
    let mut free = 0;
    for packet in packets {
        if packet.start < free || packet.len > MAX_PACKET_BYTES {
            return Err(Misplaced);
        }
        free = packet.start.checked_add(packet.len + TAG_BYTES).ok_or(Misplaced)?;
    }
    if free <= arena { Ok(()) } else { Err(Misplaced) }
}

/// Bytes of one packet.
#[derive(Debug)]
pub(crate) struct Space<'a> {
    /// Bytes of the packet without the tag.
    pub(crate) payload: &'a mut [u8],
    /// Bytes of the tag.
    pub(crate) tag: &'a mut [u8; TAG_BYTES],
}

/// Divides an arena into the spaces of its packets, from its start to its end.
#[derive(Debug)]
pub(crate) struct Divider<'a> {
    rest: &'a mut [u8],
    /// Position of `rest` in the arena.
    at: usize,
}

impl<'a> Divider<'a> {
    /// Creates the divider of a whole arena.
    pub(crate) fn new(arena: &'a mut [u8]) -> Self {
        Self { rest: arena, at: 0 }
    }

    /// Returns the space of the next packet. `None` if [`check`] would have refused the packets.
    #[inline]
    pub(crate) fn next(&mut self, packet: &Packet) -> Option<Space<'a>> {
        let skip = packet.start.checked_sub(self.at)?;
        let (_, rest) = mem::take(&mut self.rest).split_at_mut_checked(skip)?;
        let (payload, rest) = rest.split_at_mut_checked(packet.len)?;
        let (tag, rest) = rest.split_first_chunk_mut()?;
        self.rest = rest;
        self.at = packet.start + packet.len + TAG_BYTES;
        Some(Space { payload, tag })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// What `check` accepts can be divided, and what it refuses cannot.
        #[test]
        fn the_check_and_the_divider_agree(
            places in proptest::collection::vec((0usize..200, 0usize..100), 0..6),
            arena in 0usize..400,
        ) {
            let packets: Vec<Packet> =
                places.iter().map(|(start, len)| Packet { start: *start, len: *len, counter: 0 }).collect();
            let mut bytes = vec![0; arena];
            let mut divider = Divider::new(&mut bytes);
            let spaces: Vec<_> = packets.iter().map_while(|packet| divider.next(packet)).collect();
            for (space, packet) in spaces.iter().zip(&packets) {
                prop_assert_eq!(space.payload.len(), packet.len);
            }
            prop_assert_eq!(check(arena, &packets).is_ok(), spaces.len() == packets.len());
        }
    }

    #[test]
    fn positions_near_the_end_of_numbers_are_refused() {
        for start in [usize::MAX, usize::MAX - TAG_BYTES, usize::MAX - TAG_BYTES - 1] {
            assert_eq!(
                check(usize::MAX - 1, &[Packet { start, len: 1, counter: 0 }]),
                Err(Misplaced)
            );
        }
        let packet = Packet { start: 0, len: MAX_PACKET_BYTES + 1, counter: 0 };
        assert_eq!(check(usize::MAX, &[packet]), Err(Misplaced));
    }
}
