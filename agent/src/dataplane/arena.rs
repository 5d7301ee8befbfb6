//! The buffers that cross the seams: one contiguous block of bytes per batch, and beside it where
//! each packet lies. Made once, used for ever: nothing here allocates after construction as long
//! as the batch keeps within the number of packets it was made for.

use towline_core::path::Path;
use towline_proto::frame::{RELAYED_HEADER_BYTES, relayed_header};

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
    /// Bytes of each datagram but the last.
    pub stride: usize,
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
                    && train.len == train.stride * train.segments
                    && len <= train.stride
                    && len > 0
                    && train.segments < TRAIN_SEGMENTS
                    && train.len + len <= TRAIN_BYTES =>
            {
                train.len += len;
                train.segments += 1;
            }
            _ => {
                let (start, stride) = (self.used, len);
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

/// What one receive call of the kernel brought: a datagram, or several of one sender that the
/// kernel joined (`UDP_GRO`).
#[derive(Debug, Clone, Copy)]
pub struct Received {
    /// The sender.
    pub from: Path,
    /// First byte in the batch.
    pub start: usize,
    /// Bytes altogether.
    pub len: usize,
    /// Bytes of each datagram but the last; `len` if it is one.
    pub stride: usize,
}

/// Datagrams that came in, in order of arrival.
#[derive(Debug)]
pub struct RecvBatch {
    bytes: Box<[u8]>,
    received: Vec<Received>,
}

impl RecvBatch {
    /// Room for `slots` receive calls.
    pub fn new(slots: usize) -> Self {
        Self {
            bytes: vec![0; slots * SLOT_BYTES].into_boxed_slice(),
            received: Vec::with_capacity(slots),
        }
    }

    /// How many receive calls fit.
    pub fn slots(&self) -> usize {
        self.bytes.len() / SLOT_BYTES
    }

    /// All slots, [`SLOT_BYTES`] each: for the one who receives.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// All slots.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Slot number `slot` now holds `len` bytes, in datagrams of `stride` bytes (0: one datagram).
    pub fn push(&mut self, slot: usize, from: Path, len: usize, stride: usize) {
        let len = len.min(SLOT_BYTES);
        let stride = if stride == 0 || stride > len { len } else { stride };
        self.received.push(Received { from, start: slot * SLOT_BYTES, len, stride });
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

    /// Whether another slot is free.
    pub fn is_full(&self) -> bool {
        self.received.len() == self.slots()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.received.clear();
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
                read.extend(bytes.chunks(train.stride.max(1)).map(|d| (train.to, d.to_vec())));
                prop_assert!(bytes.is_empty() || read.len() - before == train.segments);
            }
            prop_assert_eq!(read, pushed);
        }
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
