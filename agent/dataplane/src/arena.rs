//! The buffers that cross the seams: one contiguous block of bytes per batch, and beside it where
//! each packet lies. Made once, used for ever: nothing here allocates after construction as long
//! as the batch keeps within the number of packets it was made for.

use std::num::NonZeroUsize;
use std::slice::Chunks;

use towline_core::path::Path;
use towline_types::frame::{RELAYED_HEADER_BYTES, relayed_header};

use super::vnet::VnetHeader;

/// The most bytes of one send. The largest UDP payload over IPv4 is 65,507; 20 less leaves room
/// for IPv6 too.
pub const TRAIN_BYTES: usize = 65_487;
/// The most datagrams of one send: what every kernel with `UDP_SEGMENT` takes.
pub const TRAIN_SEGMENTS: usize = 64;
/// The largest datagram or TUN packet, with room to spare.
pub const SLOT_BYTES: usize = 65_536;
/// Free bytes before each packet from the TUN: its virtio header is read there.
pub const HEADROOM: usize = 32;
/// Free bytes behind each packet from the TUN: padding is written there.
pub const TAILROOM: usize = 16;

/// Datagrams for one address, one behind another in a [`SendBatch`]. All have the same length,
/// except that the last may be shorter: what `UDP_SEGMENT` sends at once.
#[derive(Debug, Clone, Copy)]
pub struct Train {
    /// Where to.
    pub to: Path,
    /// First byte in the batch.
    pub start: usize,
    /// Bytes of all datagrams together.
    pub len: usize,
    /// Bytes of each datagram but the last. A datagram of no bytes counts as one of 1 byte.
    pub stride: NonZeroUsize,
    /// How many.
    pub segments: usize,
    /// Sent as fragments of the size that every path of its family takes: the path takes less than
    /// its datagrams, which cannot be made smaller.
    pub fragment: bool,
}

/// Datagrams to be sent, in order.
#[derive(Debug)]
pub struct SendBatch {
    bytes: Box<[u8]>,
    used: usize,
    trains: Vec<Train>,
    max_trains: usize,
    fragment: bool,
}

impl SendBatch {
    /// An empty batch of at most `bytes` bytes and `trains` trains.
    pub fn new(bytes: usize, trains: usize) -> Self {
        Self {
            bytes: vec![0; bytes].into_boxed_slice(),
            used: 0,
            trains: Vec::with_capacity(trains),
            max_trains: trains,
            fragment: false,
        }
    }

    /// Where the next datagram is to be written; `None` if less than `need` bytes are left, and
    /// the batch has to be sent first.
    pub fn spare(&mut self, need: usize) -> Option<&mut [u8]> {
        if self.trains.len() == self.max_trains {
            return None;
        }
        self.bytes.get_mut(self.used..).filter(|spare| spare.len() >= need)
    }

    /// As [`SendBatch::spare`], behind what a relay's channel puts before a datagram for `to`.
    pub fn place(&mut self, to: &Path, need: usize) -> Option<&mut [u8]> {
        let header = header_bytes(to);
        Some(&mut self.spare(header + need)?[header..])
    }

    /// Whether what is committed from now on is [fragmented](Train::fragment).
    pub fn fragment(&mut self, fragment: bool) {
        self.fragment = fragment;
    }

    /// The first `len` bytes of [`SendBatch::place`] are now a datagram for `to`.
    pub fn commit(&mut self, to: Path, len: usize) {
        let fragment = self.fragment;
        let len = match to.channel {
            Some(channel) => {
                self.bytes[self.used..][..RELAYED_HEADER_BYTES]
                    .copy_from_slice(&relayed_header(channel.0));
                RELAYED_HEADER_BYTES + len
            }
            None => len,
        };
        debug_assert!(self.used + len <= self.bytes.len());
        match self.trains.last_mut() {
            Some(train)
                if train.to == to
                    && train.fragment == fragment
                    && train.len == train.stride.get() * train.segments
                    && len <= train.stride.get()
                    && len > 0
                    && train.segments < TRAIN_SEGMENTS
                    && train.len + len <= TRAIN_BYTES =>
            {
                train.len += len;
                train.segments += 1;
            }
            _ => {
                let start = self.used;
                let stride = NonZeroUsize::new(len).unwrap_or(NonZeroUsize::MIN);
                self.trains.push(Train { to, start, len, stride, segments: 1, fragment });
            }
        }
        self.used += len;
    }

    /// Copies a datagram in; `false` if there is no room.
    pub fn push(&mut self, to: Path, datagram: &[u8]) -> bool {
        let Some(spare) = self.place(&to, datagram.len()) else { return false };
        spare[..datagram.len()].copy_from_slice(datagram);
        self.commit(to, datagram.len());
        true
    }

    /// What is to be sent, in order.
    pub fn trains(&self) -> &[Train] {
        &self.trains
    }

    /// The bytes that [`Train::start`] counts from.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Nothing to send.
    pub fn is_empty(&self) -> bool {
        self.trains.is_empty()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.used = 0;
        self.trains.clear();
    }
}

fn header_bytes(to: &Path) -> usize {
    if to.channel.is_some() { RELAYED_HEADER_BYTES } else { 0 }
}

/// Datagrams that lie one behind another in a batch: what a parser takes apart step by step.
///
/// There is at least one, and none is empty or longer than [`TRAIN_BYTES`]. All have the same
/// length, except that the last may be shorter. Since [`Datagrams::skip`] takes a number that is not
/// zero, and no datagram is empty, every step of a parser leaves fewer bytes than it found.
#[derive(Debug, Clone, Copy)]
pub struct Datagrams<'a> {
    /// Place of the first byte in the batch.
    start: usize,
    /// All datagrams. Not empty.
    bytes: &'a [u8],
    /// Bytes of each datagram but the last. At most [`TRAIN_BYTES`].
    segment_size: NonZeroUsize,
}

/// Why received bytes are no [`Datagrams`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoDatagrams {
    /// One datagram of no bytes.
    Empty,
    /// Datagrams of more than [`TRAIN_BYTES`] bytes, which nothing here sends or forwards.
    Oversized {
        /// How many datagrams.
        count: usize,
    },
}

impl<'a> Datagrams<'a> {
    /// Bytes that begin at `start` of their batch, as datagrams of `segment_size` bytes each. With
    /// a size of 0, or one that is longer than the bytes, they are one datagram.
    ///
    /// # Errors
    ///
    /// When there are no bytes, or the datagrams are too long.
    pub fn new(bytes: &'a [u8], start: usize, segment_size: usize) -> Result<Self, NoDatagrams> {
        let whole = NonZeroUsize::new(bytes.len()).ok_or(NoDatagrams::Empty)?;
        let segment_size = NonZeroUsize::new(segment_size).map_or(whole, |size| size.min(whole));
        if segment_size.get() > TRAIN_BYTES {
            return Err(NoDatagrams::Oversized { count: bytes.len().div_ceil(segment_size.get()) });
        }
        Ok(Self { start, bytes, segment_size })
    }

    /// Place of the first byte in the batch.
    #[inline]
    pub fn start(&self) -> usize {
        self.start
    }

    /// All datagrams, without a gap.
    #[inline]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Bytes of each datagram but the last, which may be shorter.
    #[inline]
    pub fn segment_size(&self) -> NonZeroUsize {
        self.segment_size
    }

    /// Number of datagrams.
    #[inline]
    pub fn count(&self) -> NonZeroUsize {
        // There are bytes, so it is at least 1.
        NonZeroUsize::new(self.bytes.len().div_ceil(self.segment_size.get()))
            .unwrap_or(NonZeroUsize::MIN)
    }

    /// The first datagram.
    #[inline]
    pub fn first(&self) -> &'a [u8] {
        &self.bytes[..self.bytes.len().min(self.segment_size.get())]
    }

    /// Each datagram, in order.
    #[inline]
    pub fn iter(&self) -> Chunks<'a, u8> {
        self.bytes.chunks(self.segment_size.get())
    }

    /// Number of datagrams from the start that belong together: the first, and those after it as
    /// long as they fit.
    #[inline]
    pub fn run(&self, mut fits: impl FnMut(&'a [u8]) -> bool) -> NonZeroUsize {
        let more = self.iter().skip(1).take_while(|datagram| fits(datagram)).count();
        NonZeroUsize::MIN.saturating_add(more)
    }

    /// Number of datagrams from the start that one send takes.
    #[inline]
    pub fn one_send(&self) -> NonZeroUsize {
        // No datagram is longer than `TRAIN_BYTES`, so it is at least 1.
        NonZeroUsize::new((TRAIN_BYTES / self.segment_size).min(TRAIN_SEGMENTS))
            .unwrap_or(NonZeroUsize::MIN)
    }

    /// The first `count` datagrams, or all if there are fewer.
    #[inline]
    #[must_use]
    pub fn take(&self, count: NonZeroUsize) -> Self {
        Self { bytes: &self.bytes[..self.bytes_of(count)], ..*self }
    }

    /// What follows the first `count` datagrams; `None`: nothing.
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

/// What one receive call of the kernel brought: a datagram, or several of one sender that the
/// kernel joined (`UDP_GRO`). [`RecvBatch::datagrams`] takes it apart.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    /// The sender.
    pub from: Path,
    /// First byte in the batch.
    start: usize,
    /// Bytes altogether.
    len: usize,
    /// Bytes of each datagram but the last, as the kernel said; 0: it is one datagram.
    segment_size: usize,
}

impl Received {
    /// Where each datagram begins in the batch, and its bytes.
    pub fn places(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let Self { start, len, segment_size, .. } = *self;
        let size = NonZeroUsize::new(segment_size).map_or(len.max(1), NonZeroUsize::get);
        (0..len).step_by(size).map(move |at| (start + at, size.min(len - at)))
    }
}

/// Datagrams that came in, in order of arrival.
#[derive(Debug)]
pub struct RecvBatch {
    bytes: Box<[u8]>,
    received: Vec<Received>,
    /// Slots up to the last one that holds something; those after it are free.
    used: usize,
}

impl RecvBatch {
    /// Room for `slots` receive calls.
    pub fn new(slots: usize) -> Self {
        Self {
            bytes: vec![0; slots * SLOT_BYTES].into_boxed_slice(),
            received: Vec::with_capacity(slots),
            used: 0,
        }
    }

    /// How many receive calls fit.
    pub fn slots(&self) -> usize {
        self.bytes.len() / SLOT_BYTES
    }

    /// The first of the free slots. Those before it may hold something.
    pub fn next_slot(&self) -> usize {
        self.used
    }

    /// All slots, [`SLOT_BYTES`] each: for the one who receives.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// All slots.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Slot number `slot` now holds `len` bytes, in datagrams of `segment_size` bytes (0: one
    /// datagram).
    pub fn push(&mut self, slot: usize, from: Path, len: usize, segment_size: usize) {
        let len = len.min(SLOT_BYTES);
        self.received.push(Received { from, start: slot * SLOT_BYTES, len, segment_size });
        self.used = self.used.max(slot + 1);
    }

    /// Exchanges the slots with the block of a [`WriteBatch`] of as many slots, for an engine that
    /// opens in place. What [`RecvBatch::received`] says is then said of that block.
    pub fn swap(&mut self, writes: &mut WriteBatch) {
        debug_assert_eq!(self.bytes.len(), writes.bytes.len());
        std::mem::swap(&mut self.bytes, &mut writes.bytes);
    }

    /// What came in.
    pub fn received(&self) -> &[Received] {
        &self.received
    }

    /// The datagrams that one receive call brought.
    ///
    /// # Errors
    ///
    /// When they are nothing to look at.
    #[inline]
    pub fn datagrams(&self, received: &Received) -> Result<Datagrams<'_>, NoDatagrams> {
        let Received { start, len, segment_size, .. } = *received;
        Datagrams::new(&self.bytes[start..start + len], start, segment_size)
    }

    /// Whether no slot is free.
    pub fn is_full(&self) -> bool {
        self.used >= self.slots()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.received.clear();
        self.used = 0;
    }
}

/// One packet from the TUN: up to 64 KiB that are yet to be split.
#[derive(Debug, Clone, Copy)]
pub struct TunPacket {
    /// First byte of the IP header in the batch. [`HEADROOM`] bytes before it and [`TAILROOM`]
    /// bytes behind the packet are free.
    pub start: usize,
    /// Bytes.
    pub len: usize,
    /// What the kernel left undone.
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
    /// Room for at least `large` packets of 64 KiB, and at most `packets` altogether.
    pub fn new(large: usize, packets: usize) -> Self {
        let slot = HEADROOM + SLOT_BYTES + TAILROOM;
        Self {
            bytes: vec![0; large * slot].into_boxed_slice(),
            used: 0,
            packets: Vec::with_capacity(packets),
            max_packets: packets,
        }
    }

    /// Room for one more packet of any size: [`HEADROOM`] bytes, then the packet. `None`: full.
    pub fn spare(&mut self) -> Option<&mut [u8]> {
        if self.packets.len() == self.max_packets {
            return None;
        }
        self.bytes.get_mut(self.used..self.used + HEADROOM + SLOT_BYTES)
    }

    /// A packet of `len` bytes now lies in [`TunBatch::spare`] behind the headroom.
    pub fn commit(&mut self, header: VnetHeader, len: usize) {
        debug_assert!(len <= SLOT_BYTES);
        self.packets.push(TunPacket { start: self.used + HEADROOM, len, header });
        // Packets start on cache lines of their own.
        self.used = (self.used + HEADROOM + len + TAILROOM).next_multiple_of(64);
    }

    /// The packets.
    pub fn packets(&self) -> &[TunPacket] {
        &self.packets
    }

    /// Bytes that the packets take up, with the free bytes around them.
    pub fn bytes(&self) -> usize {
        self.used
    }

    /// A packet with the free bytes around it: [`HEADROOM`] before, [`TAILROOM`] behind.
    pub fn packet_mut(&mut self, packet: &TunPacket) -> &mut [u8] {
        &mut self.bytes[packet.start - HEADROOM..packet.start + packet.len + TAILROOM]
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.used = 0;
        self.packets.clear();
    }
}

/// A part of a packet for the TUN: bytes in a [`WriteBatch`], and the part that follows.
#[derive(Debug, Clone, Copy)]
struct Piece {
    start: usize,
    len: usize,
    next: Option<u32>,
}

/// One packet for the TUN, in pieces.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    /// What the kernel is to do with it.
    pub header: VnetHeader,
    first: u32,
    last: u32,
    /// How many pieces.
    pub pieces: usize,
    /// Bytes of all pieces.
    pub len: usize,
}

/// Packets for the TUN, in order: opened into one block of bytes that mirrors a [`RecvBatch`].
#[derive(Debug)]
pub struct WriteBatch {
    bytes: Box<[u8]>,
    pieces: Vec<Piece>,
    frames: Vec<Frame>,
}

impl WriteBatch {
    /// Room for what is opened from a [`RecvBatch`] of as many slots.
    pub fn new(slots: usize) -> Self {
        Self {
            bytes: vec![0; slots * SLOT_BYTES].into_boxed_slice(),
            pieces: Vec::with_capacity(slots * TRAIN_SEGMENTS),
            frames: Vec::with_capacity(slots * TRAIN_SEGMENTS),
        }
    }

    /// The block: a datagram at some place in the [`RecvBatch`] is opened into the same place.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The block.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes `start..start + len` of the block are a packet. Returns the frame's number.
    pub fn push(&mut self, header: VnetHeader, start: usize, len: usize) -> usize {
        let piece = self.pieces.len() as u32;
        self.pieces.push(Piece { start, len, next: None });
        self.frames.push(Frame { header, first: piece, last: piece, pieces: 1, len });
        self.frames.len() - 1
    }

    /// Bytes `start..start + len` of the block continue a frame.
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

    /// What the kernel is to do with a frame.
    pub fn set_header(&mut self, frame: usize, header: VnetHeader) {
        if let Some(frame) = self.frames.get_mut(frame) {
            frame.header = header;
        }
    }

    /// What is to be written, in order.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// The bytes of a frame, piece by piece.
    pub fn pieces<'a>(&'a self, frame: &Frame) -> impl Iterator<Item = &'a [u8]> {
        let mut next = Some(frame.first);
        std::iter::from_fn(move || {
            let piece = self.pieces.get(next? as usize)?;
            next = piece.next;
            self.bytes.get(piece.start..piece.start + piece.len)
        })
    }

    /// Nothing to write.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Forgets everything.
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
        fn trains_hold_every_datagram_in_order(
            datagrams in proptest::collection::vec((0u8..3, 0usize..2000), 0..300),
        ) {
            let mut batch = SendBatch::new(1 << 20, 512);
            let mut pushed = Vec::new();
            for (i, (to, len)) in datagrams.iter().enumerate() {
                let to = Path::direct(([127, 0, 0, 1], u16::from(*to)).into());
                let datagram = vec![i as u8; *len];
                prop_assert!(batch.push(to, &datagram));
                pushed.push((to, datagram));
            }
            let mut read = Vec::new();
            for train in batch.trains() {
                prop_assert!(train.segments <= TRAIN_SEGMENTS);
                prop_assert!(train.len <= TRAIN_BYTES);
                let bytes = &batch.bytes()[train.start..train.start + train.len];
                if bytes.is_empty() {
                    read.push((train.to, Vec::new()));
                }
                let before = read.len();
                read.extend(bytes.chunks(train.stride.get()).map(|d| (train.to, d.to_vec())));
                prop_assert!(bytes.is_empty() || read.len() - before == train.segments);
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
                    prop_assert!(size > TRAIN_BYTES);
                    prop_assert_eq!(count, len.div_ceil(size));
                    return Ok(());
                }
                Ok(all) => all,
            };
            prop_assert_eq!(all.count().get(), len.div_ceil(size));
            prop_assert!(all.one_send().get() * size <= TRAIN_BYTES);
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

    /// The slot of one that was cut off stays as it is; the next family must not reuse one that
    /// holds something.
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

    #[test]
    fn a_full_batch_says_so() {
        let to = Path::direct(([127, 0, 0, 1], 1).into());
        let mut batch = SendBatch::new(100, 2);
        assert!(batch.push(to, &[0; 60]));
        assert!(!batch.push(to, &[0; 60]), "no bytes left");
        assert!(batch.push(to, &[0; 20]));
        assert!(batch.push(Path::direct(([127, 0, 0, 2], 1).into()), &[0; 1]));
        assert!(!batch.push(to, &[0; 1]), "no trains left");
        batch.clear();
        assert!(batch.push(to, &[0; 100]));
    }
}
