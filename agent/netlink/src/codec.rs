//! Encoding of netlink messages: a builder, and a reader that skips unknown attributes.
//!
//! A message has a 16-byte header, a fixed header of its family, and attributes. An attribute has a
//! length and a kind of 16 bits each, a value, and padding to four bytes. Attributes can be nested.
//! Numbers are in host byte order; those of nftables are in network byte order (the `_be` methods).

use std::ffi::CStr;
use std::net::IpAddr;

/// Length of a message header in bytes: length, type, flags, sequence number and port id.
pub const HEADER_BYTES: usize = 16;
/// Greatest length of an attribute in bytes, header included. The length field has 16 bits, so longer
/// lists must be split.
pub const ATTRIBUTE_BYTES: usize = u16::MAX as usize;

/// Flag in an attribute's kind: the value consists of attributes.
const NESTED: u16 = 1 << 15;
/// Bits of an attribute's kind without flags.
const KIND_MASK: u16 = 0x3fff;

/// Request that is built from front to back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Message type.
    kind: u16,
    /// Flags (`NLM_F_*`).
    flags: u16,
    /// The message, with an empty header until [`Message::finish`] writes it.
    bytes: Vec<u8>,
}

impl Message {
    /// Creates a message of the given type, with `NLM_F_REQUEST` and the given flags. `fixed` is the
    /// family's own header.
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&[0; HEADER_BYTES]);
        bytes.extend_from_slice(fixed);
        pad(&mut bytes);
        Self { kind, flags: flags | libc::NLM_F_REQUEST as u16, bytes }
    }

    /// Appends an attribute of raw bytes.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = (value.len() + 4) as u16;
        debug_assert!(value.len() + 4 <= ATTRIBUTE_BYTES);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        pad(&mut self.bytes);
        self
    }

    /// Appends an attribute of one byte.
    pub fn u8(&mut self, kind: u16, value: u8) -> &mut Self {
        self.bytes(kind, &[value])
    }

    /// Appends an attribute of 16 bits in host byte order.
    pub fn u16(&mut self, kind: u16, value: u16) -> &mut Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Appends an attribute of 32 bits in host byte order.
    pub fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Appends an attribute of 32 bits in network byte order.
    pub fn u32_be(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Appends an attribute of 64 bits in network byte order.
    pub fn u64_be(&mut self, kind: u16, value: u64) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Appends a zero-terminated string.
    pub fn string(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// Appends an IP address of 4 or 16 bytes.
    pub fn ip(&mut self, kind: u16, value: IpAddr) -> &mut Self {
        match value {
            IpAddr::V4(v4) => self.bytes(kind, &v4.octets()),
            IpAddr::V6(v6) => self.bytes(kind, &v6.octets()),
        }
    }

    /// Appends an attribute that `fill` fills with attributes. Its length must not exceed
    /// [`ATTRIBUTE_BYTES`].
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0, 0]);
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        fill(self);
        let length = self.bytes.len() - start;
        debug_assert!(length <= ATTRIBUTE_BYTES, "an attribute of {length} bytes");
        if let Some(field) = self.bytes.get_mut(start..).and_then(<[u8]>::first_chunk_mut) {
            *field = (length as u16).to_ne_bytes();
        }
        self
    }

    /// Appends raw bytes inside an attribute, such as a header in front of nested attributes.
    pub fn raw(&mut self, value: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(value);
        pad(&mut self.bytes);
        self
    }

    /// Returns the current length in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Always returns false, because a message contains at least its header.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Returns the address family for modification. It is the first byte of every fixed header of
    /// rtnetlink. `None` if there is no fixed header.
    pub(super) fn family_mut(&mut self) -> Option<&mut u8> {
        self.bytes.get_mut(HEADER_BYTES)
    }

    /// Returns the message type.
    pub fn kind(&self) -> u16 {
        self.kind
    }

    /// Adds flags (`NLM_F_*`) to the header.
    pub(super) fn add_flags(&mut self, flags: u16) {
        self.flags |= flags;
    }

    /// Writes the header with this sequence number, and returns the finished bytes.
    pub(super) fn finish(&mut self, sequence: u32) -> &[u8] {
        let length = self.bytes.len() as u32;
        if let Some(header) = self.bytes.first_chunk_mut::<HEADER_BYTES>() {
            header[0..4].copy_from_slice(&length.to_ne_bytes());
            header[4..6].copy_from_slice(&self.kind.to_ne_bytes());
            header[6..8].copy_from_slice(&self.flags.to_ne_bytes());
            header[8..12].copy_from_slice(&sequence.to_ne_bytes());
        }
        &self.bytes
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Message as received.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a> {
    /// Message type.
    pub kind: u16,
    /// Flags (`NLM_F_*`).
    pub flags: u16,
    /// Sequence number of the request that the message answers.
    pub sequence: u32,
    /// Port id of the socket that sent the request. In a notification: of the socket that made the
    /// change, or 0 for the kernel.
    pub port: u32,
    /// Bytes after the header.
    pub payload: &'a [u8],
}

/// Returns the messages in one datagram, up to the first truncated one.
pub fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        // Every step consumes at least a header.
        let (header, rest) = datagram.split_first_chunk::<HEADER_BYTES>()?;
        let length = (u32_at(header, 0)? as usize).checked_sub(HEADER_BYTES)?;
        let payload = rest.get(..length)?;
        let message = Received {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: u32_at(header, 8)?,
            port: u32_at(header, 12)?,
            payload,
        };
        datagram = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// Returns the 32 bits in host byte order at an offset.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// Attribute as received.
#[derive(Debug, Clone, Copy)]
pub struct Attribute<'a> {
    /// Kind of the attribute, without flag bits.
    pub kind: u16,
    /// Value without padding.
    pub value: &'a [u8],
}

/// Returns the attributes after a fixed header of `skip` bytes, up to the first truncated one.
pub fn attributes(payload: &[u8], skip: usize) -> impl Iterator<Item = Attribute<'_>> {
    let mut rest = payload.get(skip.next_multiple_of(4)..).unwrap_or_default();
    std::iter::from_fn(move || {
        // Every step consumes at least a header.
        let ([l0, l1, k0, k1], values) = rest.split_first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([*l0, *l1])).checked_sub(4)?;
        let kind = u16::from_ne_bytes([*k0, *k1]) & KIND_MASK;
        let value = values.get(..length)?;
        rest = values.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Attribute { kind, value })
    })
}

impl<'a> Attribute<'a> {
    /// Returns the value's first byte.
    pub fn u8(&self) -> Option<u8> {
        self.value.first().copied()
    }

    /// Returns the value as 32 bits in host byte order.
    pub fn u32(&self) -> Option<u32> {
        Some(u32::from_ne_bytes(self.value.try_into().ok()?))
    }

    /// Returns the value as 32 bits in network byte order.
    pub fn u32_be(&self) -> Option<u32> {
        Some(u32::from_be_bytes(self.value.try_into().ok()?))
    }

    /// Returns the value as 64 bits in network byte order.
    pub fn u64_be(&self) -> Option<u64> {
        Some(u64::from_be_bytes(self.value.try_into().ok()?))
    }

    /// Returns the value as a string, up to its first zero byte if it has one. Invalid UTF-8 is
    /// replaced.
    pub fn string(&self) -> String {
        match CStr::from_bytes_until_nul(self.value) {
            Ok(text) => text.to_string_lossy().into_owned(),
            Err(_) => String::from_utf8_lossy(self.value).into_owned(),
        }
    }

    /// Returns the value as an IP address. Its length determines the family.
    pub fn ip(&self) -> Option<IpAddr> {
        if let Ok(v4) = <[u8; 4]>::try_from(self.value) {
            return Some(v4.into());
        }
        <[u8; 16]>::try_from(self.value).ok().map(Into::into)
    }

    /// Returns the attributes inside the value.
    pub fn nested(&self) -> impl Iterator<Item = Attribute<'a>> + use<'a> {
        attributes(self.value, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_read_back() {
        let mut message = Message::new(16, libc::NLM_F_ACK as u16, &[7; 6]);
        message.string(3, "eth0").u32(4, 1_500).nest(18, |inner| {
            inner.u8(1, 9).u32_be(2, 77);
        });
        let bytes = message.finish(42);
        let read: Vec<_> = messages(bytes).collect();
        assert_eq!(read.len(), 1);
        assert_eq!((read[0].kind, read[0].sequence), (16, 42));
        let found: Vec<_> = attributes(read[0].payload, 6).collect();
        assert_eq!(found[0].string(), "eth0");
        assert_eq!(found[1].u32(), Some(1_500));
        let inner: Vec<_> = found[2].nested().collect();
        assert_eq!((found[2].kind, inner[0].u8(), inner[1].u32_be()), (18, Some(9), Some(77)));
    }

    #[test]
    fn cut_messages_end_the_reading() {
        let mut message = Message::new(16, 0, &[]);
        message.string(3, "eth0").u32(4, 1_500);
        let bytes = message.finish(1).to_vec();
        for length in 0..bytes.len() {
            assert_eq!(messages(&bytes[..length]).count(), 0);
            let payload = &bytes[HEADER_BYTES.min(length)..length];
            assert!(attributes(payload, 0).count() <= 2);
        }
        assert_eq!(attributes(&[0, 0, 0, 0], 0).count(), 0);
        assert_eq!(messages(&[0; HEADER_BYTES]).count(), 0);
    }
}
