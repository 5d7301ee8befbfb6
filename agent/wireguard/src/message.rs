//! Lengths and kinds of WireGuard messages (whitepaper section 5.4).

/// Bytes of the header of a data message: type, receiver, counter.
pub const DATA_HEADER: usize = 16;
/// Bytes that a data message adds to its payload: header and authentication tag.
pub const DATA_OVERHEAD: usize = 32;
/// Bytes of the longest handshake message. Every buffer for a message must have at least this size.
pub const HANDSHAKE_BYTES: usize = 148;
/// Payloads are padded to a multiple of this number of bytes.
pub const PADDING: usize = 16;

/// Kind of a WireGuard message, by type and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// Handshake initiation, type 1.
    Initiation,
    /// Handshake response, type 2.
    Response {
        /// Receiver index of the tunnel that initiated.
        receiver: u32,
    },
    /// Cookie reply, type 3.
    CookieReply {
        /// Receiver index of the tunnel that sent the message it answers.
        receiver: u32,
    },
    /// Transport data, type 4.
    Data {
        /// Receiver index of the session.
        receiver: u32,
    },
}

impl MessageKind {
    /// Returns the kind by type, reserved bytes and length. `None` if the datagram is no WireGuard
    /// message.
    #[inline]
    pub fn of(datagram: &[u8]) -> Option<Self> {
        let word = |at: usize| word(datagram, at);
        match (word(0)?, datagram.len()) {
            (1, 148) => Some(Self::Initiation),
            (2, 92) => Some(Self::Response { receiver: word(8)? }),
            (3, 64) => Some(Self::CookieReply { receiver: word(4)? }),
            (4, DATA_OVERHEAD..) => Some(Self::Data { receiver: word(4)? }),
            _ => None,
        }
    }
}

/// Returns the 32 bits at an offset.
#[inline]
pub(crate) fn word(message: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*message.get(at..)?.first_chunk()?))
}
