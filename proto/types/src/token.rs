//! The join token: the data that a machine needs to find its mesh and to authenticate it.
//!
//! Text form: `towline1.` and base64url (RFC 4648 section 5, no padding) over
//!
//! ```text
//! 32  SHA-256 of the CA's certificate in DER
//!  8  token id
//! 32  secret
//!  1  number of controller addresses
//!     for each: 1 length, then `host:port` in UTF-8
//!  4  CRC-32 (IEEE) of all before it, big-endian: detects a token that was cut short by a paste
//! ```

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::cursor::Cursor;
use crate::id::{Fingerprint, TokenId};
use crate::limits;

/// Beginning of the text form of every token.
pub const PREFIX: &str = "towline1.";

/// Secret half of a token. It has no `Display`, `Debug` hides it, and it is wiped when it is
/// dropped.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct TokenSecret(pub [u8; 32]);

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Address of a controller, as `host:port`. The host is a DNS name, an IPv4 address, or an IPv6
/// address in brackets.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ControllerAddress(String);

impl ControllerAddress {
    /// Returns the address as `host:port`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ControllerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ControllerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ControllerAddress {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let invalid = || {
            InvalidToken::Address(text.chars().take(80).flat_map(char::escape_default).collect())
        };
        if text.len() > limits::CONTROLLER_ADDRESS_BYTES {
            return Err(invalid());
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let port_ok = port.parse::<u16>().is_ok_and(|port| port != 0);
        let host_ok = match host.strip_prefix('[') {
            Some(inner) => {
                inner.strip_suffix(']').is_some_and(|ip| ip.parse::<std::net::Ipv6Addr>().is_ok())
            }
            None => {
                !host.is_empty()
                    && host
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
            }
        };
        if port_ok && host_ok { Ok(Self(text.to_owned())) } else { Err(invalid()) }
    }
}

/// A join token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Fingerprint of the CA. It is verified before the secret is sent.
    pub ca: Fingerprint,
    /// Id of the token, under which the controller stores it.
    pub id: TokenId,
    /// Secret that authorizes the bearer to use the token.
    pub secret: TokenSecret,
    /// Addresses of the controllers; at least one.
    pub controllers: Vec<ControllerAddress>,
}

/// Error of parsing a token. No variant contains any part of the token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    /// The text does not start with the prefix of a token.
    #[error(
        "not a join token: a token starts with `towline1.`: create one with `towline-controller token create`"
    )]
    NotAToken,
    /// The token was truncated or changed.
    #[error("the join token is damaged: check that it was copied whole")]
    Damaged,
    /// The text is not `host:port`.
    #[error("`{0}` is not a controller address: use host:port, with an IPv6 host in brackets")]
    Address(String),
}

impl JoinToken {
    /// Returns the token as text. It contains the secret: show it once, to its owner.
    pub fn encode(&self) -> String {
        let controllers = self.controllers.iter().take(limits::CONTROLLERS);
        // Reserve the whole length: a buffer that grows leaves copies of the secret in memory.
        let addresses: usize = controllers.clone().map(|address| 1 + address.as_str().len()).sum();
        let mut bytes = Zeroizing::new(Vec::with_capacity(128 + addresses));
        bytes.extend_from_slice(&self.ca.0);
        bytes.extend_from_slice(&self.id.0);
        bytes.extend_from_slice(&self.secret.0);
        bytes.push(controllers.len() as u8);
        for controller in controllers {
            // The length fits in a byte: see `limits::CONTROLLER_ADDRESS_BYTES`.
            let text = controller.as_str().as_bytes();
            bytes.push(text.len() as u8);
            bytes.extend_from_slice(text);
        }
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_be_bytes());
        format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&bytes))
    }
}

impl FromStr for JoinToken {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let body = text.trim().strip_prefix(PREFIX).ok_or(InvalidToken::NotAToken)?;
        let bytes = BASE64URL_NOPAD.decode(body.as_bytes()).map(Zeroizing::new);
        let bytes = bytes.map_err(|_| InvalidToken::Damaged)?;
        let (body, crc) = bytes.split_last_chunk::<4>().ok_or(InvalidToken::Damaged)?;
        if crc32fast::hash(body) != u32::from_be_bytes(*crc) {
            return Err(InvalidToken::Damaged);
        }
        decode_body(body).ok_or(InvalidToken::Damaged)
    }
}

fn decode_body(body: &[u8]) -> Option<JoinToken> {
    let (ca, rest) = Cursor::new(body)?.chunk()?;
    let (id, rest) = rest?.chunk()?;
    let (secret, rest) = rest?.chunk()?;
    let (count, mut rest) = rest?.byte()?;
    if count == 0 || usize::from(count) > limits::CONTROLLERS {
        return None;
    }
    let mut controllers = Vec::with_capacity(usize::from(count));
    for _ in 0..count {
        let (len, after) = rest?.byte()?;
        // An empty address is none.
        let (text, after) = after?.take(NonZeroUsize::new(len.into())?)?;
        controllers.push(std::str::from_utf8(text).ok()?.parse().ok()?);
        rest = after;
    }
    rest.is_none().then_some(JoinToken {
        ca: Fingerprint(*ca),
        id: TokenId(*id),
        secret: TokenSecret(*secret),
        controllers,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            ca: Fingerprint([1; 32]),
            id: TokenId([2; 8]),
            secret: TokenSecret([3; 32]),
            controllers: vec![
                "cp.example:7443".parse().unwrap(),
                "[2001:db8::1]:7443".parse().unwrap(),
            ],
        }
    }

    #[test]
    fn a_token_reads_back_also_with_white_space_around_it() {
        let text = format!(" {}\n", token().encode());
        assert_eq!(text.parse::<JoinToken>().unwrap(), token());
    }

    #[test]
    fn a_damaged_token_says_so_whatever_is_cut_or_changed() {
        let text = token().encode();
        for end in PREFIX.len()..text.len() {
            assert_eq!(text[..end].parse::<JoinToken>().unwrap_err(), InvalidToken::Damaged);
        }
        let mut changed = text.clone().into_bytes();
        changed[20] = if changed[20] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).unwrap();
        assert_eq!(changed.parse::<JoinToken>().unwrap_err(), InvalidToken::Damaged);
        assert_eq!("hello".parse::<JoinToken>().unwrap_err(), InvalidToken::NotAToken);
    }

    #[test]
    fn debug_output_hides_the_secret() {
        let shown = format!("{:?}", token());
        assert!(shown.contains("(hidden)") && !shown.contains("3, 3"), "{shown}");
    }

    #[test]
    fn controller_addresses_have_a_host_and_a_port() {
        for good in ["h:1", "203.0.113.1:7443", "[::1]:7443", "a-b.example:65535"] {
            assert!(good.parse::<ControllerAddress>().is_ok(), "{good}");
        }
        for bad in ["", "h", ":1", "h:0", "h:65536", "::1:7443", "[h]:1", "a b:1"] {
            assert!(bad.parse::<ControllerAddress>().is_err(), "{bad}");
        }
    }
}
