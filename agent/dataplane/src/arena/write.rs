//! Packets for the TUN, in pieces.

use super::{GSO_MAX_SEGMENTS, SLOT_BYTES};
use crate::vnet::VnetHeader;

/// Part of a packet for the TUN: a range of bytes in a [`WriteBatch`], and the index of the next
/// part.
#[derive(Debug, Clone, Copy)]
struct Piece {
    start: usize,
    len: usize,
    next: Option<u32>,
}

/// Packet for the TUN, in pieces.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    /// Virtio header: the work that is left to the kernel.
    pub header: VnetHeader,
    /// Index of the first piece.
    first: u32,
    /// Index of the last piece.
    last: u32,
    /// Number of pieces.
    pub pieces: usize,
    /// Length of all pieces together, in bytes.
    pub len: usize,
}

/// Packets for the TUN, in order. They are decrypted into one block of bytes that mirrors a
/// [`RecvBatch`](super::RecvBatch).
#[derive(Debug)]
pub struct WriteBatch {
    /// Block that [`RecvBatch::swap`](super::RecvBatch::swap) exchanges.
    pub(super) bytes: Box<[u8]>,
    pieces: Vec<Piece>,
    frames: Vec<Frame>,
}

impl WriteBatch {
    /// Creates an empty batch with room for the packets of a [`RecvBatch`](super::RecvBatch) with the
    /// same number of slots.
    pub fn new(slots: usize) -> Self {
        Self {
            bytes: vec![0; slots * SLOT_BYTES].into_boxed_slice(),
            pieces: Vec::with_capacity(slots * GSO_MAX_SEGMENTS),
            frames: Vec::with_capacity(slots * GSO_MAX_SEGMENTS),
        }
    }

    /// Returns the block for writing. A datagram of the [`RecvBatch`](super::RecvBatch) is decrypted to the same
    /// offset.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Returns the block.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Appends bytes `start..start + len` of the block as a packet. Returns the index of its frame.
    pub fn push(&mut self, header: VnetHeader, start: usize, len: usize) -> usize {
        let piece = self.pieces.len() as u32;
        self.pieces.push(Piece { start, len, next: None });
        self.frames.push(Frame { header, first: piece, last: piece, pieces: 1, len });
        self.frames.len() - 1
    }

    /// Appends bytes `start..start + len` of the block to a frame.
    pub fn append(&mut self, frame: usize, start: usize, len: usize) {
        let Some(frame) = self.frames.get_mut(frame) else { return };
        let piece = self.pieces.len() as u32;
        if let Some(last) = self.pieces.get_mut(frame.last as usize) {
            last.next = Some(piece);
        }
        self.pieces.push(Piece { start, len, next: None });
        frame.last = piece;
        frame.pieces += 1;
        frame.len += len;
    }

    /// Replaces the virtio header of a frame.
    pub fn set_header(&mut self, frame: usize, header: VnetHeader) {
        if let Some(frame) = self.frames.get_mut(frame) {
            frame.header = header;
        }
    }

    /// Returns the frames, in order.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Returns the pieces of a frame, in order.
    pub fn pieces<'a>(&'a self, frame: &Frame) -> impl Iterator<Item = &'a [u8]> {
        let mut next = Some(frame.first);
        std::iter::from_fn(move || {
            let piece = self.pieces.get(next? as usize)?;
            next = piece.next;
            self.bytes.get(piece.start..piece.start + piece.len)
        })
    }

    /// Returns whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Removes all packets.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.frames.clear();
    }
}
