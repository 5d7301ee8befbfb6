//! Buffers of batches. Each batch owns one contiguous block of bytes and a list of the positions of
//! its packets. A batch is allocated once and reused: nothing here allocates after construction
//! while the batch stays within the number of packets it was created for.

#![deny(clippy::indexing_slicing)]

use std::num::NonZeroUsize;
use std::slice::Chunks;

use towline_core::path::Path;
use towline_types::frame::{RELAYED_HEADER_BYTES, relayed_header};

use super::vnet::VnetHeader;
use towline_wireguard::{DATA_OVERHEAD, Sink, Unsealed};

/// Largest number of bytes in one send. The largest UDP payload over IPv4 is 65,507; 20 bytes less
/// leaves room for the larger IPv6 header.
pub const GSO_MAX_BYTES: usize = 65_487;
/// Largest number of datagrams in one send: every kernel with `UDP_SEGMENT` takes as many.
pub const GSO_MAX_SEGMENTS: usize = 64;
/// Length of the shortest data message that has a packet, in bytes: an IPv4 header.
const LEAST_MESSAGE: usize = DATA_OVERHEAD + 20;
/// Bytes of a slot, which holds the largest datagram or TUN packet.
pub const SLOT_BYTES: usize = 65_536;
/// Free bytes before each packet from the TUN. Its virtio header is read into them.
pub const HEADROOM: usize = 32;
/// Free bytes after each packet from the TUN. Padding is written into them.
pub const TAILROOM: usize = 16;

/// Path of a datagram, and whether the kernel may fragment it. One send has one destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destination {
    /// Path to send on.
    pub path: Path,
    /// True if the kernel may send a datagram in fragments of the minimum IPv6 MTU, because it does
    /// not fit its path and cannot be made smaller.
    pub fragment: bool,
    /// Traffic class of the outer packet: DSCP and ECN.
    pub traffic_class: u8,
    /// True if each datagram is sent by itself.
    pub is_single: bool,
}

impl From<Path> for Destination {
    /// Returns the destination whose datagrams are not fragmented by this node.
    fn from(path: Path) -> Self {
        Self { path, fragment: false, traffic_class: 0, is_single: false }
    }
}

/// Consecutive datagrams for one destination in a [`SendBatch`]. All have the same length, except
/// that the last may be shorter: `UDP_SEGMENT` sends them with one call.
#[derive(Debug, Clone, Copy)]
pub struct GsoBatch {
    /// Destination of all datagrams.
    pub to: Destination,
    /// Position of the first byte in the batch.
    pub start: usize,
    /// Length of all datagrams together, in bytes.
    pub len: usize,
    /// Segment size: the length of each datagram except the last, in bytes. An empty datagram
    /// counts as 1 byte.
    pub segment_size: NonZeroUsize,
    /// Number of datagrams.
    pub segments: usize,
}

/// Datagrams to send, in order.
#[derive(Debug)]
pub struct SendBatch {
    bytes: Box<[u8]>,
    used: usize,
    gso_batches: Vec<GsoBatch>,
    max_gso_batches: usize,
    /// Data messages that are in clear until [`SendBatch::seal`].
    unsealed: Unsealed,
}

impl SendBatch {
    /// Creates an empty batch with room for `bytes` bytes and `gso_batches` GSO batches.
    pub fn new(bytes: usize, gso_batches: usize) -> Self {
        let messages = (bytes / LEAST_MESSAGE).min(gso_batches * GSO_MAX_SEGMENTS);
        Self {
            bytes: vec![0; bytes].into_boxed_slice(),
            used: 0,
            gso_batches: Vec::with_capacity(gso_batches),
            max_gso_batches: gso_batches,
            unsealed: Unsealed::with_capacity(messages, gso_batches),
        }
    }

    /// Returns the free space for the next datagram. `None` if less than `need` bytes are left, so
    /// that the batch must be sent first.
    pub fn spare(&mut self, need: usize) -> Option<&mut [u8]> {
        if self.gso_batches.len() == self.max_gso_batches {
            return None;
        }
        self.bytes.get_mut(self.used..).filter(|spare| spare.len() >= need)
    }

    /// Returns the free space for the next datagram for `to`, like [`SendBatch::spare`], but after
    /// room for the header of its relay channel, if it has one.
    pub fn place(&mut self, to: &Path, need: usize) -> Option<&mut [u8]> {
        let header = header_bytes(to);
        self.spare(header + need)?.get_mut(header..)
    }

    /// Appends the first `len` bytes of [`SendBatch::place`] as a datagram for `to`.
    pub fn commit(&mut self, to: &Destination, len: usize) {
        let continues = self.ends_with(to);
        self.append(to, len, continues);
    }

    /// Returns whether the last GSO batch is for `to`, and may have several datagrams.
    fn ends_with(&self, to: &Destination) -> bool {
        !to.is_single && self.gso_batches.last().is_some_and(|gso| gso.to == *to)
    }

    /// Appends a datagram. `continues` is the result of [`Self::ends_with`].
    #[inline]
    fn append(&mut self, to: &Destination, len: usize, continues: bool) {
        let len = match to.path.channel {
            Some(channel) => {
                let place = self.bytes.get_mut(self.used..).and_then(<[u8]>::first_chunk_mut);
                if let Some(place) = place {
                    *place = relayed_header(channel.0);
                }
                RELAYED_HEADER_BYTES + len
            }
            None => len,
        };
        debug_assert!(self.used + len <= self.bytes.len());
        match self.gso_batches.last_mut() {
            Some(gso)
                if continues
                    && gso.len == gso.segment_size.get() * gso.segments
                    && len <= gso.segment_size.get()
                    && len > 0
                    && gso.segments < GSO_MAX_SEGMENTS
                    && gso.len + len <= GSO_MAX_BYTES =>
            {
                gso.len += len;
                gso.segments += 1;
            }
            _ => {
                let start = self.used;
                let segment_size = NonZeroUsize::new(len).unwrap_or(NonZeroUsize::MIN);
                self.gso_batches.push(GsoBatch { to: *to, start, len, segment_size, segments: 1 });
            }
        }
        self.used += len;
    }

    /// Returns the batch as the space for datagrams for `to` that the WireGuard engine seals.
    #[inline]
    pub fn to<'a>(&'a mut self, to: &'a Destination) -> SendTo<'a> {
        SendTo { continues: self.ends_with(to), batch: self, to }
    }

    /// Appends a copy of a datagram. Returns `false` if there is no room.
    pub fn push(&mut self, to: Path, datagram: &[u8]) -> bool {
        let spare = self.place(&to, datagram.len());
        let Some(place) = spare.and_then(|spare| spare.get_mut(..datagram.len())) else {
            return false;
        };
        place.copy_from_slice(datagram);
        self.commit(&to.into(), datagram.len());
        true
    }

    /// Seals the data messages that the WireGuard engine left unsealed, all together. Must be called
    /// before the batch is sent ([`super::UdpIo::flush`] does). Returns the number of datagrams that
    /// were lost: if that fails, all.
    pub fn seal(&mut self) -> usize {
        if self.unsealed.is_empty() || self.unsealed.seal(&mut self.bytes) {
            return 0;
        }
        let lost = self.datagrams();
        self.clear();
        lost
    }

    /// Returns the number of bytes in use if a message among them is in clear, otherwise 0.
    pub(crate) fn bytes_to_seal(&self) -> usize {
        if self.unsealed.is_empty() { 0 } else { self.used }
    }

    /// Returns the number of datagrams, sealed or not.
    pub(crate) fn datagrams(&self) -> usize {
        self.gso_batches.iter().map(|gso| gso.segments).sum()
    }

    /// Returns the GSO batches, in order. None as long as a message is in clear.
    pub fn gso_batches(&self) -> &[GsoBatch] {
        if self.unsealed.is_empty() { &self.gso_batches } else { &[] }
    }

    /// Returns the block of bytes that [`GsoBatch::start`] is an offset of. Empty as long as a message
    /// is in clear.
    pub fn bytes(&self) -> &[u8] {
        if self.unsealed.is_empty() { &self.bytes } else { &[] }
    }

    /// Returns whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.gso_batches.is_empty()
    }

    /// Removes all datagrams.
    pub fn clear(&mut self) {
        self.used = 0;
        self.gso_batches.clear();
        self.unsealed.clear();
    }
}

/// Datagrams for one destination in a [`SendBatch`].
#[derive(Debug)]
pub struct SendTo<'a> {
    batch: &'a mut SendBatch,
    to: &'a Destination,
    /// Result of [`SendBatch::ends_with`], which is not evaluated again for each datagram.
    continues: bool,
}

impl Sink for SendTo<'_> {
    #[inline]
    fn place(&mut self, len: usize) -> Option<&mut [u8]> {
        self.batch.place(&self.to.path, len)
    }

    #[inline]
    fn unsealed(&mut self) -> (usize, &mut Unsealed) {
        (self.batch.used + header_bytes(&self.to.path), &mut self.batch.unsealed)
    }

    #[inline]
    fn commit(&mut self, len: usize) {
        self.batch.append(self.to, len, self.continues);
        self.continues = !self.to.is_single;
    }
}

fn header_bytes(to: &Path) -> usize {
    if to.channel.is_some() { RELAYED_HEADER_BYTES } else { 0 }
}

/// Consecutive datagrams in a batch, which a parser consumes step by step.
///
/// There is at least one, and none is empty or longer than [`GSO_MAX_BYTES`]. All have the same
/// length, except that the last may be shorter. [`Datagrams::skip`] takes a number that is not
/// zero, and no datagram is empty, so every step of a parser leaves fewer bytes than before.
#[derive(Debug, Clone, Copy)]
pub struct Datagrams<'a> {
    /// Position of the first byte in the batch.
    start: usize,
    /// Bytes of all datagrams. Not empty.
    bytes: &'a [u8],
    /// Length of each datagram except the last, in bytes. At most [`GSO_MAX_BYTES`].
    segment_size: NonZeroUsize,
}

/// Reason why received bytes are not [`Datagrams`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoDatagrams {
    /// One empty datagram.
    Empty,
    /// Datagrams of more than [`GSO_MAX_BYTES`] bytes, which no node of the mesh sends or forwards.
    Oversized {
        /// Number of datagrams.
        count: usize,
    },
}

impl<'a> Datagrams<'a> {
    /// Divides bytes that begin at offset `start` of their batch into datagrams of `segment_size`
    /// bytes. If the size is 0, or larger than the number of bytes, they are one datagram.
    ///
    /// # Errors
    ///
    /// Returns the reason if there are no bytes, or the datagrams are too long.
    pub fn new(bytes: &'a [u8], start: usize, segment_size: usize) -> Result<Self, NoDatagrams> {
        let whole = NonZeroUsize::new(bytes.len()).ok_or(NoDatagrams::Empty)?;
        let segment_size = NonZeroUsize::new(segment_size).map_or(whole, |size| size.min(whole));
        if segment_size.get() > GSO_MAX_BYTES {
            return Err(NoDatagrams::Oversized { count: bytes.len().div_ceil(segment_size.get()) });
        }
        Ok(Self { start, bytes, segment_size })
    }

    /// Returns the offset of the first byte in the batch.
    #[inline]
    pub fn start(&self) -> usize {
        self.start
    }

    /// Returns the bytes of all datagrams.
    #[inline]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Returns the length of each datagram except the last, which may be shorter.
    #[inline]
    pub fn segment_size(&self) -> NonZeroUsize {
        self.segment_size
    }

    /// Returns the number of datagrams.
    #[inline]
    pub fn count(&self) -> NonZeroUsize {
        // There are bytes, so it is at least 1.
        NonZeroUsize::new(self.bytes.len().div_ceil(self.segment_size.get()))
            .unwrap_or(NonZeroUsize::MIN)
    }

    /// Returns the first datagram.
    #[inline]
    pub fn first(&self) -> &'a [u8] {
        self.bytes.get(..self.segment_size.get()).unwrap_or(self.bytes)
    }

    /// Returns an iterator over the datagrams, in order.
    #[inline]
    pub fn iter(&self) -> Chunks<'a, u8> {
        self.bytes.chunks(self.segment_size.get())
    }

    /// Returns the length of the first run: the first datagram, and those after it for as long as
    /// `fits` returns true.
    #[inline]
    pub fn run(&self, mut fits: impl FnMut(&'a [u8]) -> bool) -> NonZeroUsize {
        let more = self.iter().skip(1).take_while(|datagram| fits(datagram)).count();
        NonZeroUsize::MIN.saturating_add(more)
    }

    /// Returns the number of leading datagrams that one send takes.
    #[inline]
    pub fn one_send(&self) -> NonZeroUsize {
        // No datagram is longer than `GSO_MAX_BYTES`, so it is at least 1.
        NonZeroUsize::new((GSO_MAX_BYTES / self.segment_size).min(GSO_MAX_SEGMENTS))
            .unwrap_or(NonZeroUsize::MIN)
    }

    /// Returns the first `count` datagrams, or all if there are fewer.
    #[inline]
    #[must_use]
    pub fn take(&self, count: NonZeroUsize) -> Self {
        let bytes = self.bytes.get(..self.bytes_of(count)).unwrap_or(self.bytes);
        Self { bytes, ..*self }
    }

    /// Returns the datagrams after the first `count`. `None` if there are none.
    #[inline]
    #[must_use]
    pub fn skip(&self, count: NonZeroUsize) -> Option<Self> {
        let len = self.bytes_of(count);
        let bytes = self.bytes.get(len..).filter(|bytes| !bytes.is_empty())?;
        Some(Self { start: self.start + len, bytes, ..*self })
    }

    #[inline]
    fn bytes_of(&self, count: NonZeroUsize) -> usize {
        self.segment_size.saturating_mul(count).get().min(self.bytes.len())
    }
}

/// Result of one receive call: a datagram, or several of one sender that the kernel coalesced
/// (`UDP_GRO`). [`RecvBatch::datagrams`] divides it.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    /// Path that the datagrams came by.
    pub from: Path,
    /// Position of the first byte in the batch.
    start: usize,
    /// Length of all datagrams together, in bytes.
    len: usize,
    /// Length of each datagram except the last, as the kernel reported it. 0 if there is one
    /// datagram.
    segment_size: usize,
    /// Traffic class of the outer packets: DSCP and ECN.
    pub traffic_class: u8,
}

impl Received {
    /// Returns the offset in the batch and the length of each datagram.
    pub fn places(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let Self { start, len, segment_size, .. } = *self;
        let size = NonZeroUsize::new(segment_size).map_or(len.max(1), NonZeroUsize::get);
        (0..len).step_by(size).map(move |at| (start + at, size.min(len - at)))
    }
}

/// Received datagrams, in order of arrival.
#[derive(Debug)]
pub struct RecvBatch {
    bytes: Box<[u8]>,
    received: Vec<Received>,
    /// Number of slots up to the last one in use. The slots after it are free.
    used: usize,
}

impl RecvBatch {
    /// Creates an empty batch with room for `slots` receive calls.
    pub fn new(slots: usize) -> Self {
        Self {
            bytes: vec![0; slots * SLOT_BYTES].into_boxed_slice(),
            received: Vec::with_capacity(slots),
            used: 0,
        }
    }

    /// Returns the number of receive calls that fit.
    pub fn slots(&self) -> usize {
        self.bytes.len() / SLOT_BYTES
    }

    /// Returns the index of the first free slot. Those before it may be in use.
    pub fn next_slot(&self) -> usize {
        self.used
    }

    /// Returns all slots, [`SLOT_BYTES`] each, to receive into.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Returns all slots, [`SLOT_BYTES`] each.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Records that a slot holds `len` bytes, in datagrams of `segment_size` bytes (0 for one
    /// datagram).
    pub fn push(&mut self, slot: usize, from: Path, len: usize, segment_size: usize) {
        let len = len.min(SLOT_BYTES);
        let start = slot * SLOT_BYTES;
        self.received.push(Received { from, start, len, segment_size, traffic_class: 0 });
        self.used = self.used.max(slot + 1);
    }

    /// Sets the traffic class of the datagrams that were pushed last.
    pub fn set_traffic_class(&mut self, traffic_class: u8) {
        if let Some(last) = self.received.last_mut() {
            last.traffic_class = traffic_class;
        }
    }

    /// Exchanges the slots with the block of a [`WriteBatch`] with the same number of slots, after an
    /// engine has decrypted in place. [`RecvBatch::received`] then describes that block.
    pub fn swap(&mut self, writes: &mut WriteBatch) {
        debug_assert_eq!(self.bytes.len(), writes.bytes.len());
        std::mem::swap(&mut self.bytes, &mut writes.bytes);
    }

    /// Returns the result of each receive call, in order.
    pub fn received(&self) -> &[Received] {
        &self.received
    }

    /// Returns the datagrams of one receive call.
    ///
    /// # Errors
    ///
    /// Returns the reason if there are no bytes, or the datagrams are too long.
    #[inline]
    pub fn datagrams(&self, received: &Received) -> Result<Datagrams<'_>, NoDatagrams> {
        let Received { start, len, segment_size, .. } = *received;
        let bytes = self.bytes.get(start..start + len).unwrap_or_default();
        Datagrams::new(bytes, start, segment_size)
    }

    /// Returns whether no slot is free.
    pub fn is_full(&self) -> bool {
        self.used >= self.slots()
    }

    /// Removes all datagrams.
    pub fn clear(&mut self) {
        self.received.clear();
        self.used = 0;
    }
}

/// Packet from the TUN: up to 64 KiB, which may have to be split.
#[derive(Debug, Clone, Copy)]
pub struct TunPacket {
    /// Position of the IP header in the batch. [`HEADROOM`] bytes before the packet and
    /// [`TAILROOM`] bytes after it are free.
    pub start: usize,
    /// Length in bytes.
    pub len: usize,
    /// Virtio header: the work that the kernel left to the reader.
    pub header: VnetHeader,
}

/// Packets from the TUN, in order.
#[derive(Debug)]
pub struct TunBatch {
    bytes: Box<[u8]>,
    used: usize,
    packets: Vec<TunPacket>,
    max_packets: usize,
}

impl TunBatch {
    /// Creates an empty batch with room for at least `large` packets of 64 KiB, and at most
    /// `packets` in total.
    pub fn new(large: usize, packets: usize) -> Self {
        let slot = HEADROOM + SLOT_BYTES + TAILROOM;
        Self {
            bytes: vec![0; large * slot].into_boxed_slice(),
            used: 0,
            packets: Vec::with_capacity(packets),
            max_packets: packets,
        }
    }

    /// Returns space for one more packet of any size: [`HEADROOM`] bytes, then the packet. `None`
    /// if the batch is full.
    pub fn spare(&mut self) -> Option<&mut [u8]> {
        if self.packets.len() == self.max_packets {
            return None;
        }
        self.bytes.get_mut(self.used..self.used + HEADROOM + SLOT_BYTES)
    }

    /// Appends the packet of `len` bytes that was written to [`TunBatch::spare`] after the
    /// headroom.
    pub fn commit(&mut self, header: VnetHeader, len: usize) {
        debug_assert!(len <= SLOT_BYTES);
        self.packets.push(TunPacket { start: self.used + HEADROOM, len, header });
        // Each packet starts on its own cache line.
        self.used = (self.used + HEADROOM + len + TAILROOM).next_multiple_of(64);
    }

    /// Returns the packets, in order.
    pub fn packets(&self) -> &[TunPacket] {
        &self.packets
    }

    /// Returns the number of bytes in use, including the free bytes around the packets.
    pub fn bytes(&self) -> usize {
        self.used
    }

    /// Returns a packet with the free bytes around it: [`HEADROOM`] before, [`TAILROOM`] after.
    pub fn packet_mut(&mut self, packet: &TunPacket) -> &mut [u8] {
        let range = packet.start - HEADROOM..packet.start + packet.len + TAILROOM;
        self.bytes.get_mut(range).unwrap_or_default()
    }

    /// Removes all packets.
    pub fn clear(&mut self) {
        self.used = 0;
        self.packets.clear();
    }
}

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
/// [`RecvBatch`].
#[derive(Debug)]
pub struct WriteBatch {
    bytes: Box<[u8]>,
    pieces: Vec<Piece>,
    frames: Vec<Frame>,
}

impl WriteBatch {
    /// Creates an empty batch with room for the packets of a [`RecvBatch`] with the same number of
    /// slots.
    pub fn new(slots: usize) -> Self {
        Self {
            bytes: vec![0; slots * SLOT_BYTES].into_boxed_slice(),
            pieces: Vec::with_capacity(slots * GSO_MAX_SEGMENTS),
            frames: Vec::with_capacity(slots * GSO_MAX_SEGMENTS),
        }
    }

    /// Returns the block for writing. A datagram of the [`RecvBatch`] is decrypted to the same
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn gso_batches_hold_every_datagram_in_order(
            datagrams in proptest::collection::vec((0u8..3, any::<bool>(), 0usize..2000), 0..300),
        ) {
            let mut batch = SendBatch::new(1 << 20, 512);
            let mut pushed = Vec::new();
            for (i, (port, fragment, len)) in datagrams.iter().enumerate() {
                let path = Path::direct(([127, 0, 0, 1], u16::from(*port)).into());
                let to = Destination { fragment: *fragment, ..path.into() };
                let datagram = vec![i as u8; *len];
                batch.place(&path, *len).expect("room")[..*len].copy_from_slice(&datagram);
                batch.commit(&to, *len);
                pushed.push((to, datagram));
            }
            let mut read = Vec::new();
            for gso in batch.gso_batches() {
                prop_assert!(gso.segments <= GSO_MAX_SEGMENTS);
                prop_assert!(gso.len <= GSO_MAX_BYTES);
                let bytes = &batch.bytes()[gso.start..gso.start + gso.len];
                if bytes.is_empty() {
                    read.push((gso.to, Vec::new()));
                }
                let before = read.len();
                read.extend(bytes.chunks(gso.segment_size.get()).map(|d| (gso.to, d.to_vec())));
                prop_assert!(bytes.is_empty() || read.len() - before == gso.segments);
            }
            prop_assert_eq!(read, pushed);
        }
    }

    proptest! {
        #[test]
        fn any_steps_end_and_cover_every_byte_once(
            len in prop_oneof![0usize..200, 65_400usize..=65_536],
            segment_size in prop_oneof![0usize..300, 0usize..70_000],
            start in 0usize..1000,
            steps in proptest::collection::vec(1usize..80, 1..8),
        ) {
            let bytes = vec![1; len];
            let size = if segment_size == 0 { len } else { segment_size.min(len) };
            let all = match Datagrams::new(&bytes, start, segment_size) {
                Err(NoDatagrams::Empty) => {
                    prop_assert_eq!(len, 0);
                    return Ok(());
                }
                Err(NoDatagrams::Oversized { count }) => {
                    prop_assert!(size > GSO_MAX_BYTES);
                    prop_assert_eq!(count, len.div_ceil(size));
                    return Ok(());
                }
                Ok(all) => all,
            };
            prop_assert_eq!(all.count().get(), len.div_ceil(size));
            prop_assert!(all.one_send().get() * size <= GSO_MAX_BYTES);
            let (mut rest, mut at, mut taken) = (Some(all), start, 0);
            let mut steps = steps.iter().cycle().map(|step| NonZeroUsize::new(*step).unwrap());
            while let Some(datagrams) = rest {
                let step = steps.next().unwrap();
                let run = datagrams.take(step);
                prop_assert_eq!(run.start(), at);
                prop_assert_eq!(run.count(), step.min(datagrams.count()));
                prop_assert!(run.iter().all(|datagram| !datagram.is_empty()));
                at += run.bytes().len();
                taken += run.count().get();
                rest = datagrams.skip(step);
            }
            prop_assert_eq!(at, start + len);
            prop_assert_eq!(taken, all.count().get());
        }
    }

    /// A truncated datagram leaves its slot unused. The other socket must not reuse a slot that
    /// holds data.
    #[test]
    fn a_slot_that_holds_something_is_not_free() {
        let from = Path::direct(([127, 0, 0, 1], 1).into());
        let mut batch = RecvBatch::new(4);
        batch.push(0, from, 10, 0);
        batch.push(2, from, 10, 0);
        assert_eq!((batch.next_slot(), batch.is_full()), (3, false));
        batch.push(3, from, 10, 5);
        assert!(batch.is_full());
        assert_eq!(batch.received()[2].places().count(), 2);
        batch.clear();
        assert_eq!(batch.next_slot(), 0);
    }

    /// The sink of an engine that seals later: until then, nothing of the batch can be sent.
    #[test]
    fn a_batch_with_messages_in_clear_shows_nothing() {
        use towline_wireguard::internals::{World, pair_of};
        use towline_wireguard::{Aead, Engine, EngineChoice, Single};
        let mut world = World::new(1);
        let engine = Engine::select(EngineChoice::Batch, Aead::Auto);
        let [mut session, _] = pair_of([engine; 2], &mut world);
        let mut batch = SendBatch::new(1_000, 4);
        let direct = Path::direct(([127, 0, 0, 1], 1).into());
        let relayed = direct.on_channel(towline_core::path::ChannelId(7));
        assert!(batch.push(direct, b"a handshake"));
        for to in [direct, relayed] {
            let packet = [0x45; 32];
            session.seal(world.now, &mut Single::new(&packet), &mut batch.to(&to.into()));
            assert!(!batch.is_empty() && batch.gso_batches().is_empty());
            assert!(batch.bytes().is_empty());
        }
        assert_eq!(batch.seal(), 0);
        let shown = batch.gso_batches().iter().map(|gso| (gso.segments, gso.len));
        assert_eq!(shown.collect::<Vec<_>>(), [(1, 11), (1, 64), (1, 64 + RELAYED_HEADER_BYTES)]);
        assert!(!batch.bytes().windows(16).any(|bytes| *bytes == [0x45; 16]), "nothing in clear");
        batch.clear();
        assert!(batch.is_empty());
    }

    #[test]
    fn a_full_batch_says_so() {
        let to = Path::direct(([127, 0, 0, 1], 1).into());
        let mut batch = SendBatch::new(100, 2);
        assert!(batch.push(to, &[0; 60]));
        assert!(!batch.push(to, &[0; 60]), "no bytes left");
        assert!(batch.push(to, &[0; 20]));
        assert!(batch.push(Path::direct(([127, 0, 0, 2], 1).into()), &[0; 1]));
        assert!(!batch.push(to, &[0; 1]), "no GSO batches left");
        batch.clear();
        assert!(batch.push(to, &[0; 100]));
    }
}
