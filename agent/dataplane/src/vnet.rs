//! The virtio header before each packet of a TUN with `IFF_VNET_HDR`. It describes the work that
//! one side left to the other: completing a checksum, splitting. Virtual I/O Device specification
//! 1.2, section 5.1.6. All fields are little-endian here (`TUNSETVNETLE`).

#![deny(clippy::indexing_slicing)]

/// Length of the plain header in bytes.
pub const VNET_HEADER_BYTES: usize = 10;
/// Length of the header that can also describe a tunnel (Linux 6.17), in bytes.
pub const VNET_TUNNEL_HEADER_BYTES: usize = 24;

/// Flag: the checksum must be completed.
pub const FLAG_NEEDS_CSUM: u8 = 1;
/// Flag: the outer UDP header of a tunnel has a checksum that must be completed too.
pub const FLAG_TUNNEL_CSUM: u8 = 8;

/// Type of a packet that needs no splitting.
pub const GSO_NONE: u8 = 0;
/// Type of a super-packet of TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// Type of a super-packet of TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// Type of a super-packet of UDP over IPv4 or IPv6.
pub const GSO_UDP_L4: u8 = 5;
/// Bit added to the type: only the first segment keeps the congestion window reduced flag.
pub const GSO_ECN: u8 = 0x80;

/// Bit added to the type: the packet is inside a UDP tunnel over IPv4, and the type is that of the
/// inner packet.
pub const GSO_TUNNEL_V4: u8 = 0x20;
/// Bit added to the type: the packet is inside a UDP tunnel over IPv6, and the type is that of the
/// inner packet.
pub const GSO_TUNNEL_V6: u8 = 0x40;

/// Decoded virtio header. The default describes a complete packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    /// Flags: [`FLAG_NEEDS_CSUM`], [`FLAG_TUNNEL_CSUM`], and others that are ignored.
    pub flags: u8,
    /// Type of the packet: [`GSO_NONE`] or another `GSO_` constant.
    pub gso_type: u8,
    /// Length of all headers in bytes. Only a hint.
    pub hdr_len: u16,
    /// Payload bytes in each segment except the last.
    pub gso_size: u16,
    /// Position from which the checksum is computed, from the start of the packet. In a tunnel this
    /// is the inner checksum.
    pub csum_start: u16,
    /// Position of the checksum field, from `csum_start`.
    pub csum_offset: u16,
    /// Position of the outer UDP header, in a tunnel only.
    pub outer_transport: u16,
    /// Position of the inner IP header, in a tunnel only.
    pub inner_network: u16,
}

impl VnetHeader {
    /// Returns the plain header, for a packet that is not inside a tunnel.
    pub fn encode(&self) -> [u8; VNET_HEADER_BYTES] {
        let mut bytes = [0; VNET_HEADER_BYTES];
        bytes.copy_from_slice(&self.encode_tunnel()[..VNET_HEADER_BYTES]);
        bytes
    }

    /// Returns the longer header, for a TUN that supports it. It starts with the plain header.
    pub fn encode_tunnel(&self) -> [u8; VNET_TUNNEL_HEADER_BYTES] {
        let mut bytes = [0; VNET_TUNNEL_HEADER_BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        bytes[2..4].copy_from_slice(&self.hdr_len.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.csum_start.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_le_bytes());
        bytes[20..22].copy_from_slice(&self.outer_transport.to_le_bytes());
        bytes[22..24].copy_from_slice(&self.inner_network.to_le_bytes());
        bytes
    }

    /// Decodes a plain or a longer header. Missing fields are zero. Any bytes are accepted; the
    /// splitter checks whether the values make sense.
    pub fn decode(bytes: &[u8]) -> Self {
        let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
        let field = |at: usize| u16::from_le_bytes([byte(at), byte(at + 1)]);
        Self {
            flags: byte(0),
            gso_type: byte(1),
            hdr_len: field(2),
            gso_size: field(4),
            csum_start: field(6),
            csum_offset: field(8),
            outer_transport: field(20),
            inner_network: field(22),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_reads_back(mut bytes: [u8; VNET_TUNNEL_HEADER_BYTES]) {
            bytes[10..20].fill(0);
            prop_assert_eq!(VnetHeader::decode(&bytes).encode_tunnel(), bytes);
        }

        #[test]
        fn a_plain_header_reads_back(bytes: [u8; VNET_HEADER_BYTES]) {
            let header = VnetHeader::decode(&bytes);
            prop_assert_eq!(header.encode(), bytes);
            prop_assert_eq!((header.outer_transport, header.inner_network), (0, 0));
        }
    }
}
