//! Authentication of the records in the store, so that somebody who can write the store, or a backup of it, can
//! withhold it but not change it.
//!
//! Each record is stored with a tag, an HMAC over its key and its value. The record of the counters also has a
//! sum over all other records, so that a single record cannot be replaced by an earlier one of the same key: a
//! token that was used does not become unused. The whole store can only be replaced by an earlier one, which
//! looks like a restored backup.
//!
//! ```text
//! 0   2  0x00 0x01: a protobuf message never begins with a zero byte
//! 2   4  id of the key
//! 6  32  HMAC-SHA-256 over the record's key and the body
//! 38     body
//! ```
//!
//! The secret is in the file `store.key` beside the CA's key and never in the store. The file has a line for
//! each key: its id and 32 bytes, in hexadecimal digits. The first one authenticates new records; further ones
//! only verify those that were written with them.

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use ring::hmac;
use zeroize::Zeroizing;

use crate::entropy::{NoEntropy, random};

/// First bytes of an authenticated record.
const MAGIC: [u8; 2] = [0, 1];
/// Bytes of a tag.
const TAG: usize = 32;
/// Largest number of keys.
const KEYS: usize = 8;

/// Id of a key.
pub(crate) type KeyId = [u8; 4];

/// Keys that authenticate the store's records.
pub struct StoreSecret {
    current: RecordKey,
    /// Keys of the past, which only verify.
    former: Vec<RecordKey>,
}

/// One key, from which those of the two purposes are derived.
struct RecordKey {
    id: KeyId,
    /// Key of the tags.
    tag: hmac::Key,
    /// Key of the sum.
    sum: hmac::Key,
}

/// A record whose tag was verified.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Opened<'a> {
    /// Value of the record.
    pub(crate) body: &'a [u8],
    /// Id of the key that authenticates it; `None` for a record of an earlier version.
    pub(crate) key: Option<KeyId>,
}

/// Reason why a record is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unauthentic {
    /// The record has no tag.
    #[error(
        "it is not authenticated: if an earlier version of the controller wrote the store, start once with `serve --migrate-store`"
    )]
    Unsealed,
    /// No key in `store.key` has the id of the record's key.
    #[error("it was not written with this store.key: store and keys belong to different meshes")]
    OtherKey,
    /// The tag does not match.
    #[error("it was changed after the controller wrote it")]
    Changed,
}

impl StoreSecret {
    /// Creates a secret with one random key, and returns the text of its file too.
    pub(crate) fn generate() -> Result<(Self, Zeroizing<String>), NoEntropy> {
        let (id, secret) = (random::<4>()?, Zeroizing::new(random::<32>()?));
        let text = format!("{} {}\n", HEXLOWER.encode(&id), HEXLOWER.encode(&*secret));
        let current = RecordKey::new(id, &secret);
        Ok((Self { current, former: Vec::new() }, Zeroizing::new(text)))
    }

    /// Parses the text of the file; `None` if it is malformed.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut keys = Vec::new();
        for line in text.lines().take(KEYS + 1) {
            let (id, secret) = line.split_once(' ')?;
            let secret = Zeroizing::new(HEXLOWER_PERMISSIVE.decode(secret.as_bytes()).ok()?);
            let secret: Zeroizing<[u8; 32]> = Zeroizing::new(secret.as_slice().try_into().ok()?);
            let id = HEXLOWER_PERMISSIVE.decode(id.as_bytes()).ok()?;
            keys.push(RecordKey::new(id.as_slice().try_into().ok()?, &secret));
        }
        if keys.is_empty() || keys.len() > KEYS {
            return None;
        }
        let current = keys.remove(0);
        Some(Self { current, former: keys })
    }

    /// Returns the id of the key that authenticates new records.
    pub(crate) fn current(&self) -> KeyId {
        self.current.id
    }

    /// Returns a value with its tag, to be stored under `key`.
    pub(crate) fn seal(&self, key: &str, body: &[u8]) -> Vec<u8> {
        let tag = hmac::sign(&self.current.tag, &message(key, body));
        [MAGIC.as_slice(), self.current.id.as_slice(), tag.as_ref(), body].concat()
    }

    /// Verifies a stored value.
    pub(crate) fn open<'a>(&self, key: &str, value: &'a [u8]) -> Result<Opened<'a>, Unauthentic> {
        let rest = value.strip_prefix(&MAGIC).ok_or(Unauthentic::Unsealed)?;
        let (id, rest) = rest.split_first_chunk::<4>().ok_or(Unauthentic::Changed)?;
        let (tag, body) = rest.split_first_chunk::<TAG>().ok_or(Unauthentic::Changed)?;
        let by = self.key(*id).ok_or(Unauthentic::OtherKey)?;
        hmac::verify(&by.tag, &message(key, body), tag).map_err(|_| Unauthentic::Changed)?;
        Ok(Opened { body, key: Some(*id) })
    }

    /// Returns what a stored value adds to the sum under this key; `None` if the key is not in the file.
    pub(crate) fn item(&self, id: KeyId, key: &str, value: &[u8]) -> Option<RecordSum> {
        let tag = hmac::sign(&self.key(id)?.sum, &message(key, value));
        // A tag of SHA-256 has 32 bytes.
        tag.as_ref().first_chunk().copied().map(RecordSum)
    }

    fn key(&self, id: KeyId) -> Option<&RecordKey> {
        std::iter::once(&self.current).chain(&self.former).find(|key| key.id == id)
    }
}

impl RecordKey {
    fn new(id: KeyId, secret: &[u8; 32]) -> Self {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let derive = |purpose: &[u8]| {
            hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&secret, purpose).as_ref())
        };
        Self { id, tag: derive(b"towline store tag v1"), sum: derive(b"towline store sum v1") }
    }
}

/// Returns what is authenticated of a record. The length keeps key and body apart.
fn message(key: &str, body: &[u8]) -> Vec<u8> {
    [(key.len() as u64).to_be_bytes().as_slice(), key.as_bytes(), body].concat()
}

/// Sum over records: a number of 256 bits, big-endian. Each record adds a keyed hash, so the order does not
/// matter, and records can be added and removed one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RecordSum(pub(crate) [u8; 32]);

impl RecordSum {
    /// Adds a record.
    pub(crate) fn add(&mut self, item: &Self) {
        let mut carry = 0;
        for (byte, other) in self.0.iter_mut().zip(item.0).rev() {
            let sum = u16::from(*byte) + u16::from(other) + carry;
            *byte = sum as u8;
            carry = sum >> 8;
        }
    }

    /// Removes a record.
    pub(crate) fn remove(&mut self, item: &Self) {
        // The two's complement: all bits inverted, plus one.
        let mut one = Self::default();
        if let Some(last) = one.0.last_mut() {
            *last = 1;
        }
        self.add(&Self(item.0.map(|byte| !byte)));
        self.add(&one);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret() -> StoreSecret {
        StoreSecret::generate().unwrap().0
    }

    #[test]
    fn a_record_is_taken_only_as_it_was_written_and_under_its_key() {
        let secret = secret();
        let sealed = secret.seal("token/1", b"body");
        let opened = secret.open("token/1", &sealed).unwrap();
        assert_eq!(opened, Opened { body: b"body", key: Some(secret.current()) });
        assert_eq!(secret.open("token/2", &sealed), Err(Unauthentic::Changed));
        for index in 0..sealed.len() {
            let mut altered = sealed.clone();
            altered[index] ^= 1;
            assert!(secret.open("token/1", &altered).is_err(), "{index}");
            assert!(secret.open("token/1", &sealed[..index]).is_err(), "{index}");
        }
        assert_eq!(super::tests::secret().open("token/1", &sealed), Err(Unauthentic::OtherKey));
        assert_eq!(secret.open("token/1", b"\x0a\x00"), Err(Unauthentic::Unsealed));
    }

    #[test]
    fn a_key_that_was_replaced_still_verifies() {
        let (old, old_text) = StoreSecret::generate().unwrap();
        let (new, new_text) = StoreSecret::generate().unwrap();
        let both = StoreSecret::parse(&format!("{}{}", *new_text, *old_text)).unwrap();
        assert_eq!(both.current(), new.current());
        let sealed = old.seal("mesh", b"body");
        assert_eq!(both.open("mesh", &sealed).unwrap().key, Some(old.current()));
        assert_eq!(new.open("mesh", &sealed), Err(Unauthentic::OtherKey));
        for bad in ["", "00000000", "00000000 00", "zz 00", &new_text.repeat(KEYS + 1)] {
            assert!(StoreSecret::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_sum_does_not_depend_on_the_order_and_forgets_what_is_removed() {
        let secret = secret();
        let item = |key: &str| secret.item(secret.current(), key, b"value").unwrap();
        let (mut one, mut other) = (RecordSum::default(), RecordSum::default());
        for key in ["a", "b", "c"] {
            one.add(&item(key));
        }
        for key in ["c", "a", "b"] {
            other.add(&item(key));
        }
        assert_eq!(one, other);
        one.remove(&item("b"));
        assert_ne!(one, other);
        one.remove(&item("c"));
        one.remove(&item("a"));
        assert_eq!(one, RecordSum::default());
    }
}
