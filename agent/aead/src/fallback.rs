//! ring, packet by packet: the backend of every CPU without a batch backend, and the reference that
//! the others are compared with.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use crate::packets::{Context, KEY_BYTES, Space, TAG_BYTES};

/// Returns ring's form of a key.
pub(crate) fn key(bytes: &[u8; KEY_BYTES]) -> LessSafeKey {
    let key = UnboundKey::new(&CHACHA20_POLY1305, bytes);
    LessSafeKey::new(key.expect("ChaCha20-Poly1305 has keys of 32 bytes"))
}

/// Seals a packet. Returns false, with a packet that must not be sent, if ring refuses it, which it
/// does for more than 256 GiB.
#[must_use]
pub(crate) fn seal(
    key: &LessSafeKey,
    context: &Context<'_>,
    counter: u64,
    space: Space<'_>,
) -> bool {
    let aad = Aad::from(context.aad);
    match key.seal_in_place_separate_tag(nonce(context, counter), aad, space.payload) {
        Ok(tag) => {
            let bytes = tag.as_ref().first_chunk::<TAG_BYTES>();
            bytes.map(|bytes| *space.tag = *bytes).is_some()
        }
        Err(_) => false,
    }
}

/// Opens a packet. Returns whether it is authentic; ring overwrites one that is not with zeros.
pub(crate) fn open(
    key: &LessSafeKey,
    context: &Context<'_>,
    counter: u64,
    space: Space<'_>,
) -> bool {
    let tag = ring::aead::Tag::from(*space.tag);
    let aad = Aad::from(context.aad);
    key.open_in_place_separate_tag(nonce(context, counter), aad, tag, space.payload, 0..).is_ok()
}

fn nonce(context: &Context<'_>, counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    let (prefix, rest) = nonce.split_at_mut(4);
    prefix.copy_from_slice(&context.nonce_prefix.to_le_bytes());
    rest.copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}
