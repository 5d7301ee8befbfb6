//! Outbound: what the kernel left undone is done here, on the way into the cipher.
//!
//! Contract: a packet from the TUN comes with its virtio header; segments come out one at a time,
//! each a whole IP packet with correct checksums, padded for WireGuard, in the order of the
//! stream. Hostile or nonsensical headers give an error, never a panic.

use super::arena::HEADROOM;
use super::checksum;
use super::drops::DropReason;
use super::session::{PADDING, Segments};
use super::vnet::{FLAG_NEEDS_CSUM, GSO_NONE, VnetHeader};

/// One packet from the TUN as segments.
#[derive(Debug)]
pub struct Split<'a> {
    /// The packet, with the free bytes around it.
    bytes: &'a mut [u8],
    /// The next segment without padding, and with.
    next: Option<(usize, usize)>,
}

impl<'a> Split<'a> {
    /// `bytes` is the packet with [`HEADROOM`] free bytes before it and
    /// [`TAILROOM`](super::arena::TAILROOM) behind; `len` its length. No segment is padded beyond
    /// `mtu` bytes.
    pub fn new(
        bytes: &'a mut [u8],
        len: usize,
        header: &VnetHeader,
        mtu: usize,
    ) -> Result<Self, DropReason> {
        if header.gso_type != GSO_NONE {
            return Err(DropReason::Unsplittable);
        }
        let packet = bytes.get_mut(HEADROOM..HEADROOM + len).ok_or(DropReason::Unsplittable)?;
        if header.flags & FLAG_NEEDS_CSUM != 0 {
            complete_checksum(packet, header).ok_or(DropReason::Unsplittable)?;
        }
        let padded = padded(len, mtu);
        let padding = bytes.get_mut(HEADROOM + len..HEADROOM + padded);
        padding.ok_or(DropReason::Unsplittable)?.fill(0);
        Ok(Self { bytes, next: Some((len, padded)) })
    }
}

impl Segments for Split<'_> {
    fn next_len(&self) -> Option<usize> {
        self.next.map(|(_, padded)| padded)
    }

    fn take(&mut self) -> &[u8] {
        match self.next.take() {
            Some((_, padded)) => self.bytes.get(HEADROOM..HEADROOM + padded).unwrap_or(&[]),
            None => &[],
        }
    }
}

/// WireGuard pads to 16 bytes, but not past the link's MTU.
fn padded(len: usize, mtu: usize) -> usize {
    len.next_multiple_of(PADDING).min(mtu.max(len))
}

/// Where the sum goes there stands the sum of the pseudo-header.
fn complete_checksum(packet: &mut [u8], header: &VnetHeader) -> Option<()> {
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    let sum = !checksum::fold(checksum::add(0, packet.get(start..)?));
    // In UDP zero means that there is no sum; elsewhere both stand for zero.
    let sum = if sum == 0 { 0xffff } else { sum };
    packet.get_mut(at..at + 2)?.copy_from_slice(&sum.to_be_bytes());
    Some(())
}
