//! Names, ids and keys.

use std::fmt;
use std::str::FromStr;

use data_encoding::{BASE64, HEXLOWER_PERMISSIVE};
use serde::{Deserialize, Serialize};

use crate::limits;

/// Error of parsing a name, an id or a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    /// The text is not a DNS label.
    #[error("`{0}` is not a DNS label: use 1 to 63 lower-case letters, digits and inner hyphens")]
    Name(String),
    /// The text is not a [`Label`].
    #[error("`{0}` is not a label: use 1 to 63 letters, digits, `-`, `_`, `.` and `/`")]
    Label(String),
    /// The input has the wrong length or characters outside of its alphabet.
    #[error("not {what}: expected {expected}")]
    Bytes {
        /// Type that was expected, for example `a node id`.
        what: &'static str,
        /// Form that was expected, for example `16 bytes`.
        expected: &'static str,
    },
}

macro_rules! byte_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Length in bytes.
            pub const LEN: usize = $len;

            /// Returns the value as bytes.
            pub fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = InvalidId;

            fn try_from(bytes: &[u8]) -> Result<Self, InvalidId> {
                bytes.try_into().map(Self).map_err(|_| InvalidId::Bytes {
                    what: $what,
                    expected: concat!(stringify!($len), " bytes"),
                })
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

macro_rules! hex_text {
    ($name:ident, $what:literal, $expected:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&HEXLOWER_PERMISSIVE.encode(&self.0))
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let bytes = HEXLOWER_PERMISSIVE
                    .decode(text.as_bytes())
                    .map_err(|_| InvalidId::Bytes { what: $what, expected: $expected })?;
                Self::try_from(bytes.as_slice())
            }
        }
    };
}

byte_id! {
    /// Id of a mesh: random, created together with the mesh's CA.
    MeshId, 16, "a mesh id"
}
hex_text!(MeshId, "a mesh id", "32 hexadecimal digits");

byte_id! {
    /// Id of a node: random, chosen by the controller when the node joins. A machine that
    /// is reinstalled becomes another node.
    NodeId, 16, "a node id"
}
hex_text!(NodeId, "a node id", "32 hexadecimal digits");

byte_id! {
    /// Id of a join token: its public half.
    TokenId, 8, "a token id"
}
hex_text!(TokenId, "a token id", "16 hexadecimal digits");

byte_id! {
    /// Fingerprint of a CA: SHA-256 over its certificate in DER.
    Fingerprint, 32, "a CA fingerprint"
}
hex_text!(Fingerprint, "a CA fingerprint", "64 hexadecimal digits");

byte_id! {
    /// Ed25519 public key (RFC 8032) of a node or of the CA.
    IdentityKey, 32, "an identity key"
}
hex_text!(IdentityKey, "an identity key", "64 hexadecimal digits");

byte_id! {
    /// X25519 public key (RFC 7748) of a WireGuard tunnel. Its text form is base64, as in the
    /// WireGuard tools.
    WireguardKey, 32, "a WireGuard public key"
}

impl fmt::Display for WireguardKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(&self.0))
    }
}

impl FromStr for WireguardKey {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let bytes = BASE64.decode(text.as_bytes()).map_err(|_| InvalidId::Bytes {
            what: "a WireGuard public key",
            expected: "44 characters of base64",
        })?;
        Self::try_from(bytes.as_slice())
    }
}

/// Pre-shared key of a WireGuard tunnel. `Debug` hides it, and it is wiped when it is dropped.
#[derive(Clone, PartialEq, Eq, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct PresharedKey(pub [u8; 32]);

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Name of a node: one DNS label in lower case (RFC 1123 section 2.1), unique in its mesh.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

impl NodeName {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let good = !text.is_empty()
            && text.len() <= limits::NAME_BYTES
            && text.bytes().all(inner)
            && !text.starts_with('-')
            && !text.ends_with('-');
        if good { Ok(Self(text.to_owned())) } else { Err(InvalidId::Name(printable(text))) }
    }
}

/// Name of a site, or key of a label. Labels are compared byte by byte.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Label(String);

impl Label {
    /// Returns the label as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Label {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/');
        let good =
            !text.is_empty() && text.len() <= limits::LABEL_KEY_BYTES && text.bytes().all(allowed);
        if good { Ok(Self(text.to_owned())) } else { Err(InvalidId::Label(printable(text))) }
    }
}

macro_rules! text_id {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.0
            }
        }
    };
}

text_id!(NodeName);
text_id!(Label);

/// Returns outside input in a form that is safe in an error message: the first 80 characters,
/// escaped.
fn printable(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_default).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_name_is_a_lower_case_dns_label() {
        for good in ["a", "worker-1", "0", &"x".repeat(63)] {
            assert_eq!(good.parse::<NodeName>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "ü", "a\n", &"x".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_refused_name_is_quoted_without_control_characters() {
        let error = "a\u{1b}[2J".parse::<NodeName>().unwrap_err().to_string();
        assert!(!error.contains('\u{1b}'), "{error:?}");
    }

    #[test]
    fn ids_and_keys_read_back_what_they_print() {
        let node = NodeId([7; 16]);
        assert_eq!(node.to_string().parse::<NodeId>().unwrap(), node);
        let key = WireguardKey([9; 32]);
        assert_eq!(key.to_string().parse::<WireguardKey>().unwrap(), key);
        assert!("AAAA".parse::<WireguardKey>().is_err());
        assert!("zz".parse::<NodeId>().is_err());
    }
}
