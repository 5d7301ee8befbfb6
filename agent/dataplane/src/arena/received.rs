//! Received datagrams, and their division into datagrams of one length.

use std::num::NonZeroUsize;
use std::slice::Chunks;

use towline_core::path::Path;

use super::write::WriteBatch;
use super::{GSO_MAX_BYTES, GSO_MAX_SEGMENTS, SLOT_BYTES};

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
    /// Largest number of receive calls until [`RecvBatch::limit`] changes it.
    limit: usize,
}

impl RecvBatch {
    /// Creates an empty batch with room for `slots` receive calls.
    pub fn new(slots: usize) -> Self {
        Self {
            bytes: vec![0; slots * SLOT_BYTES].into_boxed_slice(),
            received: Vec::with_capacity(slots),
            used: 0,
            limit: slots,
        }
    }

    /// Sets how many receive calls fit, at most as many as the batch was created for.
    pub fn limit(&mut self, slots: usize) {
        self.limit = slots.min(self.bytes.len() / SLOT_BYTES);
    }

    /// Returns the number of receive calls that fit.
    pub fn slots(&self) -> usize {
        self.limit
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

    /// Returns the number of bytes of all datagrams.
    pub fn received_bytes(&self) -> usize {
        self.received.iter().map(|received| received.len).sum()
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        assert_eq!(batch.received_bytes(), 30);
        batch.clear();
        assert_eq!(batch.next_slot(), 0);
        batch.limit(1);
        assert!(!batch.is_full());
        batch.push(0, from, 10, 0);
        assert!(batch.is_full());
        batch.limit(usize::MAX);
        assert_eq!((batch.slots(), batch.is_full()), (4, false));
    }
}
