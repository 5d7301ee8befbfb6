//! The virtio header before each packet of a TUN with `IFF_VNET_HDR`: what one side left for the
//! other to do (a checksum, splitting). Virtual I/O Device specification 1.2, section 5.1.6; all
//! fields little-endian here (`TUNSETVNETLE`).

/// Bytes of the plain header.
pub const VNET_HEADER_BYTES: usize = 10;
/// Bytes of the header that can also describe a tunnel (Linux 6.17).
pub const VNET_TUNNEL_HEADER_BYTES: usize = 24;

/// The checksum is not complete.
pub const FLAG_NEEDS_CSUM: u8 = 1;
/// Of a tunnel: the outer UDP header has a checksum, to be completed too.
pub const FLAG_TUNNEL_CSUM: u8 = 8;

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

/// A bit beside the type, which is then the inner one: inside a UDP tunnel over IPv4.
pub const GSO_TUNNEL_V4: u8 = 0x20;
/// Likewise over IPv6.
pub const GSO_TUNNEL_V6: u8 = 0x40;

/// The header, decoded. The default says that nothing is left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    /// [`FLAG_NEEDS_CSUM`] and [`FLAG_TUNNEL_CSUM`], and bits that do not concern us.
    pub flags: u8,
    /// [`GSO_NONE`] and the like.
    pub gso_type: u8,
    /// Bytes of all headers together; a hint.
    pub hdr_len: u16,
    /// Bytes of payload in each segment but the last.
    pub gso_size: u16,
    /// Where the sum begins, from the start of the packet. In a tunnel: the inner sum.
    pub csum_start: u16,
    /// Where the sum is to be stored, from `csum_start`.
    pub csum_offset: u16,
    /// In a tunnel: where the outer UDP header begins.
    pub outer_transport: u16,
    /// In a tunnel: where the inner IP header begins.
    pub inner_network: u16,
}

impl VnetHeader {
    /// The plain header: the bytes before a packet that is in no tunnel.
    pub fn encode(&self) -> [u8; VNET_HEADER_BYTES] {
        let mut bytes = [0; VNET_HEADER_BYTES];
        bytes.copy_from_slice(&self.encode_tunnel()[..VNET_HEADER_BYTES]);
        bytes
    }

    /// The longer header, where the TUN takes it; it begins with the plain one.
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

    /// Reads a plain or a longer header; fields that are not there are zero. Any bytes are a
    /// header; whether it makes sense is for the splitter to find out.
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
