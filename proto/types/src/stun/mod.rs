//! STUN binding (RFC 8489): a node learns the public address of its WireGuard port.
//!
//! Only binding requests and success responses are implemented. The address comes from
//! XOR-MAPPED-ADDRESS, or from MAPPED-ADDRESS (classic servers) if the former is absent. A
//! FINGERPRINT must be correct if it is present. All other attributes are ignored, except by
//! [`behaviour`], which asks how a NAT filters.
//!
//! A SOFTWARE attribute, which servers ignore, makes Towline's requests at least as long as its
//! responses. Towline's STUN servers ([`answer`]) refuse requests that are shorter than the
//! response, so they cannot be used for amplification.

pub mod behaviour;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;

use crate::cursor::Cursor;
use crate::frame::STUN_COOKIE;

/// Bytes in the header before the attributes (RFC 8489 section 5).
const HEADER_BYTES: usize = 20;
/// Bytes in a request of Towline: at least [`ANSWER_BYTES`].
pub const REQUEST_BYTES: usize = HEADER_BYTES + 4 + SOFTWARE.len();
/// Bytes in the longest response of Towline: one XOR-MAPPED-ADDRESS with an IPv6 address.
pub const ANSWER_BYTES: usize = HEADER_BYTES + 4 + 20;
/// Longest message that is parsed, in bytes. A binding message is far shorter, but one that is padded to
/// a packet of 1,500 bytes shows that the path carries such packets.
pub const MESSAGE_BYTES: usize = 1472;

const BINDING_REQUEST: u16 = 0x0001;
const BINDING_SUCCESS: u16 = 0x0101;

const MAPPED_ADDRESS: u16 = 0x0001;
const CHANGE_REQUEST: u16 = 0x0003;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;
const SOFTWARE_ATTRIBUTE: u16 = 0x8022;
const FINGERPRINT: u16 = 0x8028;
const RESPONSE_ORIGIN: u16 = 0x802b;
const OTHER_ADDRESS: u16 = 0x802c;
/// Value that the CRC-32 of a FINGERPRINT is XORed with (RFC 8489 section 14.7).
const FINGERPRINT_XOR: u32 = 0x5354_554e;
/// Value of the SOFTWARE attribute: a multiple of four bytes, so that it needs no padding.
const SOFTWARE: &[u8; 28] = b"towline                     ";

const _: () = assert!(REQUEST_BYTES >= ANSWER_BYTES);

/// Transaction id, which matches a response to its request.
pub type Transaction = [u8; 12];

/// A parsed STUN message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Binding request: asks for the source address that the server sees.
    Request {
        /// Transaction id that the response repeats.
        transaction: Transaction,
    },
    /// Binding success response.
    Success {
        /// Transaction id of the request.
        transaction: Transaction,
        /// Source address of the request, as the server saw it.
        mapped: SocketAddr,
    },
}

impl Message {
    /// Parses a datagram. Returns `None` for anything but a binding request or success response.
    pub fn decode(datagram: &[u8]) -> Option<Self> {
        let Parsed { kind, transaction, mapped, .. } = Parsed::decode(datagram)?;
        match kind {
            BINDING_REQUEST => Some(Self::Request { transaction }),
            BINDING_SUCCESS => Some(Self::Success { transaction, mapped: mapped? }),
            _ => None,
        }
    }
}

/// A message whose framing, addresses of the client and FINGERPRINT are valid. The other attributes are
/// those of [`behaviour`], as they are.
struct Parsed<'a> {
    kind: u16,
    transaction: Transaction,
    /// Address of XOR-MAPPED-ADDRESS, otherwise that of MAPPED-ADDRESS.
    mapped: Option<SocketAddr>,
    has_fingerprint: bool,
    /// Value of CHANGE-REQUEST.
    change: Option<&'a [u8]>,
    /// Value of RESPONSE-ORIGIN.
    origin: Option<&'a [u8]>,
    /// Value of OTHER-ADDRESS.
    other: Option<&'a [u8]>,
}

impl<'a> Parsed<'a> {
    fn decode(datagram: &'a [u8]) -> Option<Self> {
        let (header, attributes) = datagram.split_first_chunk::<HEADER_BYTES>()?;
        let [t0, t1, l0, l1, c0, c1, c2, c3, transaction @ ..] = *header;
        let length = usize::from(u16::from_be_bytes([l0, l1]));
        if [c0, c1, c2, c3] != STUN_COOKIE
            || datagram.len() > MESSAGE_BYTES
            || length != attributes.len()
            || !length.is_multiple_of(4)
        {
            return None;
        }
        let (mut xored, mut plain) = (None, None);
        let mut parsed = Self {
            kind: u16::from_be_bytes([t0, t1]),
            transaction,
            mapped: None,
            has_fingerprint: false,
            change: None,
            origin: None,
            other: None,
        };
        let mut rest = Cursor::new(attributes);
        while let Some(here) = rest {
            let (attribute, value, after) = next_attribute(here)?;
            match attribute {
                XOR_MAPPED_ADDRESS if xored.is_none() => {
                    xored = Some(address(value, &STUN_COOKIE, &transaction)?);
                }
                MAPPED_ADDRESS if plain.is_none() => {
                    plain = Some(address(value, &[0; 4], &[0; 12])?);
                }
                CHANGE_REQUEST => parsed.change = parsed.change.or(Some(value)),
                RESPONSE_ORIGIN => parsed.origin = parsed.origin.or(Some(value)),
                OTHER_ADDRESS => parsed.other = parsed.other.or(Some(value)),
                FINGERPRINT => {
                    // FINGERPRINT is the last attribute and covers everything before it.
                    let covered = datagram.strip_suffix(here.bytes())?;
                    let expected = (crc32fast::hash(covered) ^ FINGERPRINT_XOR).to_be_bytes();
                    if value != expected || after.is_some() {
                        return None;
                    }
                    parsed.has_fingerprint = true;
                }
                _ => {}
            }
            rest = after;
        }
        parsed.mapped = xored.or(plain);
        Some(parsed)
    }
}

/// Returns a binding request.
pub fn request(transaction: Transaction) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    let length = REQUEST_BYTES - HEADER_BYTES;
    bytes[..HEADER_BYTES].copy_from_slice(&header(BINDING_REQUEST, length, transaction));
    bytes[20..22].copy_from_slice(&SOFTWARE_ATTRIBUTE.to_be_bytes());
    bytes[22..24].copy_from_slice(&(SOFTWARE.len() as u16).to_be_bytes());
    bytes[24..].copy_from_slice(SOFTWARE);
    bytes
}

/// Returns a binding request of `bytes` bytes, padded by its SOFTWARE attribute, which servers ignore.
/// The length is rounded down to a multiple of four, and is at least [`REQUEST_BYTES`] and at most
/// [`MESSAGE_BYTES`].
pub fn padded_request(transaction: Transaction, bytes: usize) -> Vec<u8> {
    let bytes = bytes.clamp(REQUEST_BYTES, MESSAGE_BYTES) / 4 * 4;
    let value = bytes - HEADER_BYTES - 4;
    let mut request = header(BINDING_REQUEST, bytes - HEADER_BYTES, transaction).to_vec();
    request.extend(SOFTWARE_ATTRIBUTE.to_be_bytes());
    request.extend((value as u16).to_be_bytes());
    request.extend(SOFTWARE);
    request.resize(bytes, b' ');
    request
}

/// Returns the response to a request from `from`: a buffer and the number of bytes used in it.
/// Returns `None` for anything but a request that is at least as long as the response.
pub fn answer(datagram: &[u8], from: SocketAddr) -> Option<([u8; ANSWER_BYTES], usize)> {
    let Some(Message::Request { transaction }) = Message::decode(datagram) else { return None };
    let mut bytes = [0; ANSWER_BYTES];
    let ip = from.ip().to_canonical();
    let len = HEADER_BYTES + 4 + if ip.is_ipv4() { 8 } else { 20 };
    if datagram.len() < len {
        return None;
    }
    let header = header(BINDING_SUCCESS, len - HEADER_BYTES, transaction);
    bytes[..HEADER_BYTES].copy_from_slice(&header);
    bytes[20..22].copy_from_slice(&XOR_MAPPED_ADDRESS.to_be_bytes());
    bytes[22..24].copy_from_slice(&((len - HEADER_BYTES - 4) as u16).to_be_bytes());
    let port = from.port() ^ u16::from_be_bytes([STUN_COOKIE[0], STUN_COOKIE[1]]);
    bytes[26..28].copy_from_slice(&port.to_be_bytes());
    let mask = mask(&STUN_COOKIE, &transaction);
    let mut put = |octets: &[u8]| {
        for ((to, octet), mask) in bytes[28..].iter_mut().zip(octets).zip(mask) {
            *to = octet ^ mask;
        }
    };
    match ip {
        IpAddr::V4(v4) => put(&v4.octets()),
        IpAddr::V6(v6) => put(&v6.octets()),
    }
    bytes[25] = if ip.is_ipv4() { 1 } else { 2 };
    Some((bytes, len))
}

/// Returns the header of a message with `length` bytes of attributes.
fn header(kind: u16, length: usize, transaction: Transaction) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[0..2].copy_from_slice(&kind.to_be_bytes());
    header[2..4].copy_from_slice(&(length as u16).to_be_bytes());
    header[4..8].copy_from_slice(&STUN_COOKIE);
    header[8..20].copy_from_slice(&transaction);
    header
}

/// Returns the type and value of the first attribute, and the bytes after its padding. `None` if it is
/// cut off.
fn next_attribute(bytes: Cursor<'_>) -> Option<(u16, &[u8], Option<Cursor<'_>>)> {
    let ([t0, t1, l0, l1], rest) = bytes.chunk()?;
    let kind = u16::from_be_bytes([*t0, *t1]);
    let length = usize::from(u16::from_be_bytes([*l0, *l1]));
    let Some(padded) = NonZeroUsize::new(length.next_multiple_of(4)) else {
        return Some((kind, &[], rest));
    };
    let (padded, after) = rest?.take(padded)?;
    Some((kind, padded.get(..length)?, after))
}

/// Parses XOR-MAPPED-ADDRESS (RFC 8489 section 14.2). With a cookie and a transaction of zeros it
/// parses MAPPED-ADDRESS (section 14.1), and the attributes that have its form.
fn address(value: &[u8], cookie: &[u8; 4], transaction: &Transaction) -> Option<SocketAddr> {
    let ([_, family, p0, p1], octets) = value.split_first_chunk::<4>()?;
    let mask = mask(cookie, transaction);
    let port = u16::from_be_bytes([p0 ^ mask[0], p1 ^ mask[1]]);
    let mut plain = [0; 16];
    for ((to, octet), mask) in plain.iter_mut().zip(octets).zip(mask) {
        *to = octet ^ mask;
    }
    let ip = match (family, octets.len()) {
        (1, 4) => Ipv4Addr::from(*plain.first_chunk::<4>()?).into(),
        (2, 16) => IpAddr::from(Ipv6Addr::from(plain)).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

fn mask(cookie: &[u8; 4], transaction: &Transaction) -> [u8; 16] {
    let mut mask = [0; 16];
    mask[..4].copy_from_slice(cookie);
    mask[4..].copy_from_slice(transaction);
    mask
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sample response of RFC 5769 section 2.2: SOFTWARE, XOR-MAPPED-ADDRESS 192.0.2.1:32853,
    /// MESSAGE-INTEGRITY and FINGERPRINT.
    const RFC_5769: &[u8] = &[
        0x01, 0x01, 0x00, 0x3c, 0x21, 0x12, 0xa4, 0x42, 0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6,
        0x86, 0xfa, 0x87, 0xdf, 0xae, 0x80, 0x22, 0x00, 0x0b, 0x74, 0x65, 0x73, 0x74, 0x20, 0x76,
        0x65, 0x63, 0x74, 0x6f, 0x72, 0x20, 0x00, 0x20, 0x00, 0x08, 0x00, 0x01, 0xa1, 0x47, 0xe1,
        0x12, 0xa6, 0x43, 0x00, 0x08, 0x00, 0x14, 0x2b, 0x91, 0xf5, 0x99, 0xfd, 0x9e, 0x90, 0xc3,
        0x8c, 0x74, 0x89, 0xf9, 0x2a, 0xf9, 0xba, 0x53, 0xf0, 0x6b, 0xe7, 0xd7, 0x80, 0x28, 0x00,
        0x04, 0xc0, 0x7d, 0x4c, 0x96,
    ];

    #[test]
    fn the_vector_of_rfc_5769_is_read() {
        let Some(Message::Success { mapped, .. }) = Message::decode(RFC_5769) else { panic!() };
        assert_eq!(mapped, "192.0.2.1:32853".parse().unwrap());
        // With another type, FINGERPRINT is an unknown attribute.
        let named = RFC_5769.len() - 8..RFC_5769.len() - 6;
        for byte in (0..RFC_5769.len()).filter(|byte| !named.contains(byte)) {
            let mut changed = RFC_5769.to_vec();
            changed[byte] ^= 0x10;
            assert_eq!(Message::decode(&changed), None, "byte {byte} is covered by FINGERPRINT");
        }
    }

    #[test]
    fn a_request_that_is_shorter_than_its_answer_is_not_answered() {
        let mut bare = request([7; 12])[..HEADER_BYTES].to_vec();
        bare[2..4].copy_from_slice(&[0, 0]);
        assert!(Message::decode(&bare).is_some());
        assert!(answer(&bare, "192.0.2.1:1".parse().unwrap()).is_none());
        let (success, len) = answer(&request([7; 12]), "[2001:db8::1]:1".parse().unwrap()).unwrap();
        assert!(len <= REQUEST_BYTES);
        assert!(answer(&success[..len], "192.0.2.1:1".parse().unwrap()).is_none(), "no loop");
    }

    #[test]
    fn a_padded_request_has_the_length_that_was_asked_for() {
        let from = "192.0.2.1:1".parse().unwrap();
        for (wanted, length) in [(0, REQUEST_BYTES), (1003, 1000), (9000, MESSAGE_BYTES)] {
            let request = padded_request([7; 12], wanted);
            assert_eq!(request.len(), length);
            let read = Message::decode(&request);
            assert_eq!(read, Some(Message::Request { transaction: [7; 12] }));
            assert!(answer(&request, from).is_some());
        }
        assert_eq!(padded_request([7; 12], REQUEST_BYTES), request([7; 12]));
    }

    proptest! {
        #[test]
        fn an_answer_says_where_its_request_came_from(transaction: [u8; 12], ip: IpAddr, port: u16) {
            let from = SocketAddr::new(ip.to_canonical(), port);
            let (bytes, len) = answer(&request(transaction), from).unwrap();
            let read = Message::decode(&bytes[..len]);
            prop_assert_eq!(read, Some(Message::Success { transaction, mapped: from }));
            prop_assert_eq!(crate::frame::DatagramKind::of(&bytes[..len]), crate::frame::DatagramKind::Stun);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
            Message::decode(&bytes);
            let mut near = RFC_5769.to_vec();
            for (at, value) in flips {
                let at = at.index(near.len());
                near[at] = value;
            }
            Message::decode(&near);
            answer(&near, "192.0.2.1:1".parse().unwrap());
        }
    }
}
