//! Buffers of batches. Each batch owns one contiguous block of bytes and a list of the positions of
//! its packets. A batch is allocated once and reused: nothing here allocates after construction
//! while the batch stays within the number of packets it was created for.
//!
//! | file | owns |
//! |---|---|
//! | `send.rs` | datagrams to send, which may be sealed together |
//! | `received.rs` | received datagrams, and the parser that divides them |
//! | `write.rs` | packets for the TUN |
//! | `mod.rs` | packets from the TUN |

#![deny(clippy::indexing_slicing)]

mod received;
mod send;
mod write;

use super::vnet::VnetHeader;

pub use received::{Datagrams, NoDatagrams, Received, RecvBatch};
pub use send::{Destination, GsoBatch, SendBatch, SendTo};
pub use write::{Frame, WriteBatch};

/// Largest number of bytes in one send. The largest UDP payload over IPv4 is 65,507; 20 bytes less
/// leaves room for the larger IPv6 header.
pub const GSO_MAX_BYTES: usize = 65_487;
/// Largest number of datagrams in one send: every kernel with `UDP_SEGMENT` takes as many.
pub const GSO_MAX_SEGMENTS: usize = 64;
/// Bytes of a slot, which holds the largest datagram or TUN packet.
pub const SLOT_BYTES: usize = 65_536;
/// Free bytes before each packet from the TUN. Its virtio header is read into them.
pub const HEADROOM: usize = 32;
/// Free bytes after each packet from the TUN. Padding is written into them.
pub const TAILROOM: usize = 16;

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
    /// Largest number of packets until [`TunBatch::limit`] changes it.
    limit: usize,
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
            limit: packets,
        }
    }

    /// Sets how many packets the batch takes, at most as many as it was created for.
    pub fn limit(&mut self, packets: usize) {
        self.limit = packets.min(self.max_packets);
    }

    /// Returns space for one more packet of any size: [`HEADROOM`] bytes, then the packet. `None`
    /// if the batch is full.
    pub fn spare(&mut self) -> Option<&mut [u8]> {
        if self.packets.len() >= self.limit {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_takes_no_more_packets_than_its_limit() {
        let mut batch = TunBatch::new(4, 3);
        let mut taken = |limit: usize| {
            batch.clear();
            batch.limit(limit);
            while batch.spare().is_some() {
                batch.commit(VnetHeader::default(), 100);
            }
            batch.packets().len()
        };
        assert_eq!([1, 2, usize::MAX, 1].map(&mut taken), [1, 2, 3, 1]);
    }
}
