//! Questions about a NAT's behaviour (RFC 5780): a server answers from another of its ports or addresses
//! if it is asked to, and says which ones it has.
//!
//! Such a server sends datagrams from a port that the receiver may never have sent to, and a client that
//! forges its source address chooses the receiver. So a request must have CHANGE-REQUEST (also if it asks
//! for no change) and FINGERPRINT, and be at least as long as the longest answer. There is one answer to
//! it, which is never longer.

use std::net::{IpAddr, SocketAddr};

use super::{
    BINDING_REQUEST, BINDING_SUCCESS, CHANGE_REQUEST, FINGERPRINT, FINGERPRINT_XOR, HEADER_BYTES,
    OTHER_ADDRESS, Parsed, RESPONSE_ORIGIN, SOFTWARE_ATTRIBUTE, Transaction, XOR_MAPPED_ADDRESS,
    address, header, mask,
};
use crate::frame::STUN_COOKIE;

/// Bytes of the type and the length of an attribute.
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// Bytes in the attribute FINGERPRINT.
const FINGERPRINT_BYTES: usize = ATTRIBUTE_HEADER_BYTES + 4;
/// Bytes in the attribute CHANGE-REQUEST.
const CHANGE_BYTES: usize = ATTRIBUTE_HEADER_BYTES + 4;
/// Bytes in the longest answer: three IPv6 addresses and a FINGERPRINT.
pub const ANSWER_BYTES: usize =
    HEADER_BYTES + 3 * (ATTRIBUTE_HEADER_BYTES + 20) + FINGERPRINT_BYTES;
/// Bytes in a request of Towline. It is as long as the longest answer.
pub const REQUEST_BYTES: usize = ANSWER_BYTES;
/// Bytes in the value of SOFTWARE, which pads a request: a multiple of four.
const PADDING_BYTES: usize =
    REQUEST_BYTES - HEADER_BYTES - CHANGE_BYTES - ATTRIBUTE_HEADER_BYTES - FINGERPRINT_BYTES;
/// Flags of CHANGE-REQUEST (RFC 5780 section 7.2).
const CHANGE_ADDRESS: u32 = 4;
const CHANGE_PORT: u32 = 2;

const _: () = assert!(PADDING_BYTES.is_multiple_of(4));

/// What differs between the address and port that a request is sent to, and those of its answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    /// True if the answer shall come from another address.
    pub address: bool,
    /// True if the answer shall come from another port.
    pub port: bool,
}

impl Change {
    /// The answer comes from where the request was sent to.
    pub const NONE: Self = Self { address: false, port: false };
    /// The answer comes from another port of the same address.
    pub const PORT: Self = Self { address: false, port: true };
    /// The answer comes from another address and port.
    pub const ADDRESS_AND_PORT: Self = Self { address: true, port: true };
}

/// A request about the NAT's behaviour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Transaction id that the answer repeats.
    pub transaction: Transaction,
    /// Change that the client asks for.
    pub change: Change,
}

impl Request {
    /// Returns the datagram, of [`REQUEST_BYTES`] bytes.
    pub fn encode(self) -> Vec<u8> {
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        let flags = flag(self.change.address, CHANGE_ADDRESS) | flag(self.change.port, CHANGE_PORT);
        let mut attributes = Vec::new();
        push(&mut attributes, CHANGE_REQUEST, &flags.to_be_bytes());
        push(&mut attributes, SOFTWARE_ATTRIBUTE, &[b' '; PADDING_BYTES]);
        message(BINDING_REQUEST, self.transaction, &attributes)
    }

    /// Parses a datagram. Returns `None` for anything but a binding request with CHANGE-REQUEST and
    /// FINGERPRINT that is at least as long as the longest answer.
    pub fn decode(datagram: &[u8]) -> Option<Self> {
        let Parsed { kind, transaction, has_fingerprint, change, .. } = Parsed::decode(datagram)?;
        let flags = u32::from_be_bytes(change?.try_into().ok()?);
        let change =
            Change { address: flags & CHANGE_ADDRESS != 0, port: flags & CHANGE_PORT != 0 };
        let is_answered =
            kind == BINDING_REQUEST && has_fingerprint && datagram.len() >= ANSWER_BYTES;
        is_answered.then_some(Self { transaction, change })
    }

    /// Returns the answer to this request, which came from `mapped`.
    pub fn answer(self, mapped: SocketAddr, server: ServerAddresses) -> Vec<u8> {
        let ServerAddresses { origin, other } = server;
        let mut attributes = Vec::new();
        let value = address_value(mapped, &STUN_COOKIE, &self.transaction);
        push(&mut attributes, XOR_MAPPED_ADDRESS, &value);
        push(&mut attributes, RESPONSE_ORIGIN, &address_value(origin, &[0; 4], &[0; 12]));
        push(&mut attributes, OTHER_ADDRESS, &address_value(other, &[0; 4], &[0; 12]));
        message(BINDING_SUCCESS, self.transaction, &attributes)
    }
}

/// Addresses of a server, as it knows them. A translation in front of the server does not change them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerAddresses {
    /// Address and port that the answer leaves from.
    pub origin: SocketAddr,
    /// Another port of the server, at another address if it has one.
    pub other: SocketAddr,
}

impl ServerAddresses {
    /// Returns the addresses that a success response names; `None` if it lacks one.
    pub fn decode(datagram: &[u8]) -> Option<Self> {
        let Parsed { kind, origin, other, .. } = Parsed::decode(datagram)?;
        let plain = |value| address(value, &[0; 4], &[0; 12]);
        (kind == BINDING_SUCCESS).then_some(Self { origin: plain(origin?)?, other: plain(other?)? })
    }
}

/// Returns a message with these attributes and a FINGERPRINT.
fn message(kind: u16, transaction: Transaction, attributes: &[u8]) -> Vec<u8> {
    let length = attributes.len() + FINGERPRINT_BYTES;
    let mut message = header(kind, length, transaction).to_vec();
    message.extend(attributes);
    let fingerprint = crc32fast::hash(&message) ^ FINGERPRINT_XOR;
    push(&mut message, FINGERPRINT, &fingerprint.to_be_bytes());
    message
}

/// Appends an attribute. The length of its value is a multiple of four.
fn push(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    bytes.extend((value.len() as u16).to_be_bytes());
    bytes.extend(value);
}

/// Returns the value of an attribute that [`address`] parses.
fn address_value(of: SocketAddr, cookie: &[u8; 4], transaction: &Transaction) -> Vec<u8> {
    let mask = mask(cookie, transaction);
    let [p0, p1] = of.port().to_be_bytes();
    let (family, octets) = match of.ip().to_canonical() {
        IpAddr::V4(v4) => (1, v4.octets().to_vec()),
        IpAddr::V6(v6) => (2, v6.octets().to_vec()),
    };
    let mut value = vec![0, family, p0 ^ mask[0], p1 ^ mask[1]];
    value.extend(octets.iter().zip(mask).map(|(octet, mask)| octet ^ mask));
    value
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::stun::{self, Message};

    fn socket(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn server(origin: &str, other: &str) -> ServerAddresses {
        ServerAddresses { origin: socket(origin), other: socket(other) }
    }

    /// Returns a request without its FINGERPRINT.
    fn without_fingerprint(request: &[u8]) -> Vec<u8> {
        let mut cut = request[..request.len() - FINGERPRINT_BYTES].to_vec();
        let length = (cut.len() - HEADER_BYTES) as u16;
        cut[2..4].copy_from_slice(&length.to_be_bytes());
        cut
    }

    #[test]
    fn a_change_is_asked_for_by_the_flags_of_rfc_5780() {
        for (change, flags) in [(Change::NONE, 0), (Change::PORT, 2), (Change::ADDRESS_AND_PORT, 6)]
        {
            let request = Request { transaction: [7; 12], change };
            let datagram = request.encode();
            assert_eq!(datagram[20..28], [0, 3, 0, 4, 0, 0, 0, flags]);
            assert_eq!(Request::decode(&datagram), Some(request));
        }
    }

    #[test]
    fn only_a_long_request_with_both_attributes_is_answered_about_the_behaviour() {
        let request = Request { transaction: [7; 12], change: Change::PORT };
        let datagram = request.encode();
        let bare = without_fingerprint(&datagram);
        // Both are requests of RFC 8489 all the same.
        assert!(Message::decode(&bare).is_some() && Request::decode(&bare).is_none());
        assert_eq!(Request::decode(&stun::padded_request([7; 12], 1_000)), None);
        let mut change = Vec::new();
        push(&mut change, CHANGE_REQUEST, &CHANGE_PORT.to_be_bytes());
        let short = message(BINDING_REQUEST, [7; 12], &change);
        assert!(Message::decode(&short).is_some() && Request::decode(&short).is_none());
        let mut damaged = datagram;
        damaged[27] ^= 4;
        assert_eq!(Request::decode(&damaged), None, "FINGERPRINT covers the flags");
    }

    #[test]
    fn an_answer_is_no_request_and_never_longer_than_one() {
        let request = Request { transaction: [7; 12], change: Change::ADDRESS_AND_PORT };
        assert_eq!(request.encode().len(), REQUEST_BYTES);
        let server = server("[2001:db8::2]:7444", "[2001:db8::3]:7444");
        let answer = request.answer(socket("[2001:db8::1]:1"), server);
        assert_eq!(answer.len(), ANSWER_BYTES);
        assert_eq!(Request::decode(&answer), None);
        assert_eq!(stun::answer(&answer, socket("192.0.2.1:1")), None);
    }

    #[test]
    fn a_server_without_another_port_names_none() {
        let from = socket("192.0.2.1:1");
        let request = Request { transaction: [7; 12], change: Change::NONE }.encode();
        let (plain, len) = stun::answer(&request, from).unwrap();
        assert!(Message::decode(&plain[..len]).is_some());
        assert_eq!(ServerAddresses::decode(&plain[..len]), None);
    }

    proptest! {
        #[test]
        fn an_answer_names_the_client_and_the_server(transaction: [u8; 12], ips: [IpAddr; 3], ports: [u16; 3]) {
            let [mapped, origin, other] = [0, 1, 2].map(|n: usize| SocketAddr::new(ips[n].to_canonical(), ports[n]));
            let server = ServerAddresses { origin, other };
            let answer = Request { transaction, change: Change::PORT }.answer(mapped, server);
            prop_assert!(answer.len() <= REQUEST_BYTES);
            prop_assert_eq!(Message::decode(&answer), Some(Message::Success { transaction, mapped }));
            prop_assert_eq!(ServerAddresses::decode(&answer), Some(server));
        }

        #[test]
        fn any_bytes_are_read_without_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
            let request = Request { transaction: [7; 12], change: Change::PORT };
            let addresses = server("192.0.2.2:7444", "192.0.2.3:7444");
            for mut datagram in [request.encode(), request.answer(socket("192.0.2.1:1"), addresses)] {
                for (at, value) in &flips {
                    let at = at.index(datagram.len());
                    datagram[at] = *value;
                }
                Request::decode(&datagram);
                ServerAddresses::decode(&datagram);
            }
        }
    }
}
