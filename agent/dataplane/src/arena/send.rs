//! Datagrams to send: one block of bytes, divided into GSO batches.

use std::num::NonZeroUsize;

use towline_core::path::Path;
use towline_types::frame::{RELAYED_HEADER_BYTES, relayed_header};
use towline_wireguard::{DATA_OVERHEAD, Sink, Unsealed};

use super::{GSO_MAX_BYTES, GSO_MAX_SEGMENTS};

/// Length of the shortest data message that has a packet, in bytes: an IPv4 header.
const LEAST_MESSAGE: usize = DATA_OVERHEAD + 20;

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
    /// before the batch is sent ([`crate::UdpIo::flush`] does). Returns the number of datagrams that
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
