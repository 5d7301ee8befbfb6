//! The virtio header before each packet of a TUN with `IFF_VNET_HDR`: what one side left for the
//! other to do (a checksum, splitting). Virtual I/O Device specification 1.2, section 5.1.6; all
//! fields little-endian here (`TUNSETVNETLE`).

/// Bytes of the plain header.
pub const VNET_HEADER_BYTES: usize = 10;

/// The checksum is not complete.
pub const FLAG_NEEDS_CSUM: u8 = 1;

/// Not to be split.
pub const GSO_NONE: u8 = 0;
/// TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// UDP, of either family.
pub const GSO_UDP_L4: u8 = 5;
/// A bit beside the type: the congestion window reduced flag stands on the first segment only.
pub const GSO_ECN: u8 = 0x80;

/// The header, decoded. The default says that nothing is left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    /// [`FLAG_NEEDS_CSUM`], and bits that do not concern us.
    pub flags: u8,
    /// [`GSO_NONE`] and the like.
    pub gso_type: u8,
    /// Bytes of all headers together; a hint.
    pub hdr_len: u16,
    /// Bytes of payload in each segment but the last.
    pub gso_size: u16,
    /// Where the sum begins, from the start of the packet.
    pub csum_start: u16,
    /// Where the sum is to be stored, from `csum_start`.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// The bytes before the packet.
    pub fn encode(&self) -> [u8; VNET_HEADER_BYTES] {
        let mut bytes = [0; VNET_HEADER_BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        bytes[2..4].copy_from_slice(&self.hdr_len.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.csum_start.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_le_bytes());
        bytes
    }

    /// Any bytes are a header; whether it makes sense is for the splitter to find out.
    pub fn decode(bytes: &[u8; VNET_HEADER_BYTES]) -> Self {
        let field = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: field(2),
            gso_size: field(4),
            csum_start: field(6),
            csum_offset: field(8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_reads_back(bytes: [u8; VNET_HEADER_BYTES]) {
            prop_assert_eq!(VnetHeader::decode(&bytes).encode(), bytes);
        }
    }
}
