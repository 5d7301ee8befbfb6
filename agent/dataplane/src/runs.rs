//! Runs of received data messages, and handshake messages, which are opened together after a batch
//! was sorted.

use std::num::NonZeroUsize;

use towline_core::path::Path;
use towline_wireguard::{Message, MessageKind};

use super::Slot;
use super::arena::Datagrams;

/// Consecutive data messages for one receiver index, from one sender.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    /// Peer that the receiver index belongs to.
    pub(super) slot: Slot,
    /// Path that the messages came by.
    pub(super) from: Path,
    /// Receiver index of all messages.
    pub(super) receiver: u32,
    /// Traffic class of the outer packets.
    pub(super) traffic_class: u8,
    /// Bytes before each message: the header of a relay channel.
    pub(super) skip: usize,
    /// Position of the first datagram in the receive buffer.
    start: usize,
    /// Length of all datagrams together, in bytes.
    len: usize,
    /// Length of each datagram except the last, in bytes.
    segment_size: NonZeroUsize,
}

/// Handshake message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Handshake {
    /// Path that the message came by.
    pub(super) from: Path,
    /// Kind of the message.
    pub(super) kind: MessageKind,
    /// Position in the receive buffer.
    pub(super) at: Message,
}

/// Packet of a peer that was decrypted.
#[derive(Debug, Clone, Copy)]
pub(super) struct OpenedPacket {
    /// Peer that sent the packet.
    pub(super) slot: Slot,
    /// Traffic class of the outer packet.
    pub(super) traffic_class: u8,
    /// Position in the buffer.
    pub(super) at: Message,
}

impl Run {
    /// Creates the run of all these datagrams.
    pub(super) fn new(
        slot: Slot,
        from: Path,
        receiver: u32,
        traffic_class: u8,
        skip: usize,
        datagrams: &Datagrams<'_>,
    ) -> Self {
        let (start, len) = (datagrams.start(), datagrams.bytes().len());
        let segment_size = datagrams.segment_size();
        Self { slot, from, receiver, traffic_class, skip, start, len, segment_size }
    }

    /// Returns the key that sorts the runs of a batch by peer, and those of one peer by arrival.
    pub(super) fn order(&self) -> (Slot, usize) {
        // Later receive calls fill later slots.
        (self.slot, self.start)
    }

    /// Returns the number of messages.
    pub(super) fn count(&self) -> usize {
        self.len.div_ceil(self.segment_size.get())
    }

    /// Returns the positions of the messages, in order.
    #[inline]
    pub(super) fn messages(&self) -> impl Iterator<Item = Message> + Clone + use<> {
        let Self { start, len, skip, segment_size, .. } = *self;
        (0..len).step_by(segment_size.get()).map(move |at| Message {
            start: start + at + skip,
            len: segment_size.get().min(len - at).saturating_sub(skip),
        })
    }

    /// Returns whether the messages of both runs can be opened as one batch.
    pub(super) fn continues(&self, last: &Self) -> bool {
        (self.slot, self.receiver, self.from, self.traffic_class)
            == (last.slot, last.receiver, last.from, last.traffic_class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_where_the_datagrams_are() {
        let bytes = [0; 250];
        let from = Path::direct(([192, 0, 2, 1], 1).into());
        for (skip, last) in [(0, 50), (12, 38)] {
            let datagrams = Datagrams::new(&bytes, 1_000, 100).unwrap();
            let run = Run::new(1, from, 7, 0, skip, &datagrams);
            let messages: Vec<(usize, usize)> =
                run.messages().map(|message| (message.start, message.len)).collect();
            let (first, whole) = (1_000 + skip, 100 - skip);
            assert_eq!(messages, [(first, whole), (first + 100, whole), (first + 200, last)]);
            assert_eq!(run.count(), 3);
        }
    }
}
