//! Hash and chaining key of a Noise handshake (Noise specification section 5.2), with X25519,
//! ChaCha20-Poly1305 and BLAKE2s.

use blake2::{Blake2s256, Digest};
use hmac::SimpleHmac;
use hmac::digest::{FixedOutput, KeyInit, Update};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::invalid::Invalid;

/// Name of the handshake, from which the first chaining key is derived.
const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
/// Length of a tag in bytes.
pub(super) const TAG: usize = 16;

/// Secret that is wiped when it is dropped.
pub(super) type Secret = Zeroizing<[u8; 32]>;

/// Hash and chaining key of a handshake.
#[derive(Clone)]
pub(super) struct Symmetric {
    chain: Secret,
    hash: [u8; 32],
}

impl Symmetric {
    /// Starts a handshake towards this responder.
    pub(super) fn new(prologue: &[u8], responder: &PublicKey) -> Self {
        let chain = hash(&[CONSTRUCTION]);
        let start = hash(&[&chain, prologue]);
        Self { hash: hash(&[&start, responder.as_bytes()]), chain: Zeroizing::new(chain) }
    }

    /// Mixes a public ephemeral key into both.
    pub(super) fn mix_ephemeral(&mut self, key: &PublicKey) {
        self.mix_hash(key.as_bytes());
        let [chain] = expand(&self.chain, key.as_bytes());
        self.chain = chain;
    }

    /// Mixes a shared secret into the chaining key. Returns the key that follows.
    pub(super) fn mix_key(&mut self, secret: &Secret) -> Secret {
        let [chain, key] = expand(&self.chain, &**secret);
        self.chain = chain;
        key
    }

    /// Mixes the pre-shared key into both. Returns the key that follows.
    pub(super) fn mix_psk(&mut self, psk: &Secret) -> Secret {
        let [chain, temporary, key] = expand(&self.chain, &**psk);
        self.chain = chain;
        self.mix_hash(&*temporary);
        key
    }

    /// Encrypts the front of `space`, whose last bytes get the tag. If that fails, the space is
    /// cleared, so that nothing leaves the node in clear.
    pub(super) fn seal(&mut self, key: &Secret, space: &mut [u8]) -> Result<(), Invalid> {
        let (plain, place) = space.split_last_chunk_mut::<TAG>().ok_or(Invalid::Malformed)?;
        let tag = cipher(key)?.seal_in_place_separate_tag(nonce(), Aad::from(self.hash), plain);
        let tag = tag.ok().and_then(|tag| tag.as_ref().first_chunk().copied());
        let Some(tag) = tag else {
            plain.fill(0);
            return Err(Invalid::Malformed);
        };
        *place = tag;
        self.mix_hash(space);
        Ok(())
    }

    /// Decrypts `sealed`, whose last bytes are the tag, into `plain`, which is shorter by a tag.
    pub(super) fn open(
        &mut self,
        key: &Secret,
        sealed: &[u8],
        plain: &mut [u8],
    ) -> Result<(), Invalid> {
        let mut copy = Zeroizing::new(sealed.to_vec());
        let opened = cipher(key)?
            .open_in_place(nonce(), Aad::from(self.hash), &mut copy)
            .map_err(|_| Invalid::NotAuthentic)?;
        if opened.len() != plain.len() {
            return Err(Invalid::Malformed);
        }
        plain.copy_from_slice(opened);
        self.mix_hash(sealed);
        Ok(())
    }

    /// Returns the keys of the session: the one that the initiator sends with, and the one that the
    /// responder sends with.
    pub(super) fn split(&self) -> [Secret; 2] {
        expand(&self.chain, &[])
    }

    /// Returns the hash, which identifies the handshake.
    #[cfg(test)]
    pub(super) fn hash(&self) -> &[u8; 32] {
        &self.hash
    }

    fn mix_hash(&mut self, bytes: &[u8]) {
        self.hash = hash(&[&self.hash, bytes]);
    }
}

/// Returns the shared secret of two keys.
pub(super) fn agree(private: &StaticSecret, public: &PublicKey) -> Result<Secret, Invalid> {
    let shared = private.diffie_hellman(public);
    if !shared.was_contributory() {
        return Err(Invalid::WeakKey);
    }
    Ok(Zeroizing::new(shared.to_bytes()))
}

/// Returns the BLAKE2s hash of all parts together.
pub(super) fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut state = Blake2s256::new();
    for part in parts {
        Digest::update(&mut state, part);
    }
    state.finalize().into()
}

/// Returns HMAC-BLAKE2s of all parts together.
fn hmac(key: &[u8; 32], parts: &[&[u8]]) -> Secret {
    // A key of 32 bytes is shorter than a block, so it is used with zeros behind it.
    let mut block = Zeroizing::new([0; 64]);
    for (to, from) in block.iter_mut().zip(key) {
        *to = *from;
    }
    let mut state = SimpleHmac::<Blake2s256>::new((&*block).into());
    for part in parts {
        Update::update(&mut state, part);
    }
    Zeroizing::new(state.finalize_fixed().into())
}

/// Returns the first `N` outputs of HKDF (RFC 5869) with HMAC-BLAKE2s.
fn expand<const N: usize>(salt: &Secret, input: &[u8]) -> [Secret; N] {
    let key = hmac(salt, &[input]);
    let mut outputs: [Secret; N] = std::array::from_fn(|_| Zeroizing::new([0; 32]));
    let mut last: Option<Secret> = None;
    for (output, number) in outputs.iter_mut().zip(1u8..) {
        let before: &[u8] = last.as_ref().map_or(&[], |last| &**last);
        *output = hmac(&key, &[before, &[number]]);
        last = Some(output.clone());
    }
    outputs
}

/// Returns the cipher of a key of the handshake.
pub(super) fn cipher(key: &Secret) -> Result<LessSafeKey, Invalid> {
    UnboundKey::new(&CHACHA20_POLY1305, &**key)
        .map(LessSafeKey::new)
        .map_err(|_| Invalid::Malformed)
}

/// Returns the nonce of a key of the handshake, each of which seals once.
pub(super) fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}
