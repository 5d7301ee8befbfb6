//! Division of packets into the blocks of the cipher, for the batch backends.

#![deny(clippy::indexing_slicing)]

use crate::packets::{Space, TAG_BYTES};

/// Number of packets that a backend gets at once.
pub(crate) const GROUP: usize = 16;
/// Length of a block of ChaCha20 in bytes.
pub(crate) const BLOCK: usize = 64;

/// Packet as the batch backends see it.
#[derive(Debug, Default)]
pub(crate) struct Lane<'a> {
    /// Last 8 bytes of the nonce.
    pub(crate) counter: u64,
    /// Whole blocks of the packet.
    pub(crate) blocks: &'a mut [[u8; BLOCK]],
    /// Bytes after the last whole block. Shorter than a block.
    pub(crate) tail: &'a mut [u8],
    /// Bytes of the tag. `None` in a lane without a packet.
    tag: Option<&'a mut [u8; TAG_BYTES]>,
}

impl<'a> Lane<'a> {
    /// Divides a packet into blocks.
    #[inline]
    pub(crate) fn new(counter: u64, space: Space<'a>) -> Self {
        let (blocks, tail) = space.payload.as_chunks_mut();
        Self { counter, blocks, tail, tag: Some(space.tag) }
    }

    /// Returns the length of the packet in bytes.
    #[inline]
    pub(crate) fn bytes(&self) -> u64 {
        (self.blocks.len() * BLOCK + self.tail.len()) as u64
    }

    /// Returns the number of blocks that the packet has bytes in.
    #[inline]
    pub(crate) fn block_count(&self) -> usize {
        self.blocks.len() + usize::from(!self.tail.is_empty())
    }

    /// Adds a block of key stream to block `index`, or to the tail if that is its number.
    pub(crate) fn xor(&mut self, index: usize, stream: &[u8; BLOCK]) {
        let count = self.blocks.len();
        let bytes = match self.blocks.get_mut(index) {
            Some(block) => block.as_mut_slice(),
            None if index == count => &mut *self.tail,
            None => return,
        };
        for (byte, stream) in bytes.iter_mut().zip(stream) {
            *byte ^= stream;
        }
    }

    /// Writes the tag behind the packet.
    #[inline]
    pub(crate) fn set_tag(&mut self, tag: u128) {
        if let Some(place) = &mut self.tag {
            **place = tag.to_le_bytes();
        }
    }

    /// Returns whether the tag behind the packet is this one. The comparison takes the same time
    /// wherever they differ.
    #[inline]
    pub(crate) fn has_tag(&self, tag: u128) -> bool {
        self.tag.as_ref().is_some_and(|place| u128::from_le_bytes(**place) ^ tag == 0)
    }
}

/// Compares each packet's tag with the computed one and stores the result. Returns the lanes of the
/// authentic packets, which are moved to the front.
pub(crate) fn keep_authentic<'a, 'b>(
    lanes: &'b mut [Lane<'a>],
    tags: &[u128],
    authentic: &mut [bool],
) -> &'b mut [Lane<'a>] {
    let mut kept = 0;
    for (i, (tag, authentic)) in tags.iter().zip(authentic).enumerate() {
        *authentic = lanes.get(i).is_some_and(|lane| lane.has_tag(*tag));
        if *authentic {
            lanes.swap(kept, i);
            kept += 1;
        }
    }
    lanes.get_mut(..kept).unwrap_or_default()
}
