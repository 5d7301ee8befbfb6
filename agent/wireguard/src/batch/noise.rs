//! WireGuard's handshake (whitepaper section 5.4): Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s with
//! WireGuard's messages around it. Decides nothing about time, retries or cookies: it makes and
//! reads messages, and returns the keys of a session.

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use hmac::SimpleHmac;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

/// Length of an initiation in bytes.
pub(crate) const INITIATION_BYTES: usize = 148;
/// Length of a response in bytes.
pub(crate) const RESPONSE_BYTES: usize = 92;

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
const LABEL_MAC1: &[u8] = b"mac1----";

/// Length of a tag in bytes.
const TAG: usize = 16;
/// Length of a TAI64N timestamp in bytes.
pub(crate) const TIMESTAMP_BYTES: usize = 12;

type Secret = Zeroizing<[u8; 32]>;

/// Why a handshake message is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Invalid {
    /// Wrong length, type or reserved bytes.
    Malformed,
    /// The first MAC is wrong, or what is encrypted is not authentic.
    NotAuthentic,
    /// A public key gives a shared secret of zeros.
    WeakKey,
}

/// Keys of a new session.
pub(crate) struct SessionKeys {
    pub(crate) sending: Secret,
    pub(crate) receiving: Secret,
}

/// Static keys of both ends, and what follows from them.
pub(crate) struct Pair {
    private: StaticSecret,
    public: PublicKey,
    peer: PublicKey,
    static_static: Secret,
    psk: Secret,
}

impl Pair {
    /// Creates the state for a peer. `psk` is zero without a pre-shared key.
    pub(crate) fn new(
        private: StaticSecret,
        peer: PublicKey,
        psk: [u8; 32],
    ) -> Result<Self, Invalid> {
        let public = PublicKey::from(&private);
        let static_static = agree(&private, &peer)?;
        Ok(Self { private, public, peer, static_static, psk: Zeroizing::new(psk) })
    }
}

/// Initiation that waits for its response.
pub(crate) struct Initiated {
    symmetric: Symmetric,
    ephemeral: StaticSecret,
}

/// Hash and chaining key of a handshake.
#[derive(Clone)]
struct Symmetric {
    chain: Secret,
    hash: [u8; 32],
}

impl Symmetric {
    /// Starts a handshake towards this responder.
    fn new(responder: &PublicKey) -> Self {
        let chain = hash(&[CONSTRUCTION]);
        let start = hash(&[&chain, IDENTIFIER]);
        Self { hash: hash(&[&start, responder.as_bytes()]), chain: Zeroizing::new(chain) }
    }

    fn mix_hash(&mut self, bytes: &[u8]) {
        self.hash = hash(&[&self.hash, bytes]);
    }

    /// Mixes a public ephemeral key into both.
    fn mix_ephemeral(&mut self, key: &PublicKey) {
        self.mix_hash(key.as_bytes());
        let [chain] = expand(&self.chain, key.as_bytes());
        self.chain = chain;
    }

    /// Mixes a shared secret into the chaining key. Returns the key that follows.
    fn mix_key(&mut self, secret: &Secret) -> Secret {
        let [chain, key] = expand(&self.chain, &**secret);
        self.chain = chain;
        key
    }

    /// Mixes the pre-shared key into both. Returns the key that follows.
    fn mix_psk(&mut self, psk: &Secret) -> Secret {
        let [chain, temporary, key] = expand(&self.chain, &**psk);
        self.chain = chain;
        self.mix_hash(&*temporary);
        key
    }

    /// Encrypts the front of `space`, whose last bytes get the tag.
    fn seal(&mut self, key: &Secret, space: &mut [u8]) {
        if let Some((plain, place)) = space.split_last_chunk_mut::<TAG>()
            && let Ok(tag) =
                cipher(key).seal_in_place_separate_tag(nonce(), Aad::from(self.hash), plain)
            && let Some(tag) = tag.as_ref().first_chunk()
        {
            *place = *tag;
        }
        self.mix_hash(space);
    }

    /// Decrypts `sealed`, whose last bytes are the tag.
    fn open<const N: usize>(&mut self, key: &Secret, sealed: &[u8]) -> Result<[u8; N], Invalid> {
        let mut copy = Zeroizing::new(sealed.to_vec());
        let plain = cipher(key)
            .open_in_place(nonce(), Aad::from(self.hash), &mut copy)
            .map_err(|_| Invalid::NotAuthentic)?;
        let plain = <[u8; N]>::try_from(&*plain).map_err(|_| Invalid::Malformed)?;
        self.mix_hash(sealed);
        Ok(plain)
    }

    /// Returns the keys of the session: those that the initiator and the responder send with.
    fn split(&self) -> [Secret; 2] {
        expand(&self.chain, &[])
    }
}

/// Writes an initiation with this index, without the second MAC.
pub(crate) fn initiate(
    pair: &Pair,
    ephemeral: StaticSecret,
    index: u32,
    timestamp: [u8; TIMESTAMP_BYTES],
) -> Result<(Initiated, [u8; INITIATION_BYTES]), Invalid> {
    let mut message = [0; INITIATION_BYTES];
    let mut symmetric = Symmetric::new(&pair.peer);
    let public = PublicKey::from(&ephemeral);
    symmetric.mix_ephemeral(&public);
    write(&mut message, 0, &1u32.to_le_bytes());
    write(&mut message, 4, &index.to_le_bytes());
    write(&mut message, 8, public.as_bytes());
    let key = symmetric.mix_key(&agree(&ephemeral, &pair.peer)?);
    write(&mut message, 40, pair.public.as_bytes());
    symmetric.seal(&key, &mut message[40..88]);
    let key = symmetric.mix_key(&pair.static_static);
    write(&mut message, 88, &timestamp);
    symmetric.seal(&key, &mut message[88..116]);
    let mac1 = mac1(&pair.peer, &message[..116]);
    write(&mut message, 116, &mac1);
    Ok((Initiated { symmetric, ephemeral }, message))
}

/// Initiation that was read and whose sender is proven to hold its static key.
pub(crate) struct Received {
    symmetric: Symmetric,
    /// Index that the initiator chose.
    pub(crate) remote: u32,
    ephemeral: PublicKey,
    /// Timestamp, which must be later than that of the peer's last initiation.
    pub(crate) timestamp: [u8; TIMESTAMP_BYTES],
}

/// Reads an initiation of this peer.
pub(crate) fn receive(pair: &Pair, message: &[u8]) -> Result<Received, Invalid> {
    let message: &[u8; INITIATION_BYTES] = message.try_into().map_err(|_| Invalid::Malformed)?;
    if message[..4] != 1u32.to_le_bytes() {
        return Err(Invalid::Malformed);
    }
    check_mac1(&pair.public, &message[..116], &message[116..132])?;
    let mut symmetric = Symmetric::new(&pair.public);
    let ephemeral = PublicKey::from(read::<32>(message, 8));
    symmetric.mix_ephemeral(&ephemeral);
    let key = symmetric.mix_key(&agree(&pair.private, &ephemeral)?);
    let claimed: [u8; 32] = symmetric.open(&key, &message[40..88])?;
    if claimed != pair.peer.to_bytes() {
        return Err(Invalid::NotAuthentic);
    }
    let key = symmetric.mix_key(&pair.static_static);
    let timestamp = symmetric.open(&key, &message[88..116])?;
    Ok(Received { symmetric, remote: u32::from_le_bytes(read(message, 4)), ephemeral, timestamp })
}

/// Writes the response to an initiation, with this index and without the second MAC.
pub(crate) fn respond(
    pair: &Pair,
    received: Received,
    ephemeral: &StaticSecret,
    index: u32,
) -> Result<(SessionKeys, [u8; RESPONSE_BYTES]), Invalid> {
    let mut message = [0; RESPONSE_BYTES];
    let mut symmetric = received.symmetric;
    let public = PublicKey::from(ephemeral);
    symmetric.mix_ephemeral(&public);
    write(&mut message, 0, &2u32.to_le_bytes());
    write(&mut message, 4, &index.to_le_bytes());
    write(&mut message, 8, &received.remote.to_le_bytes());
    write(&mut message, 12, public.as_bytes());
    symmetric.mix_key(&agree(ephemeral, &received.ephemeral)?);
    symmetric.mix_key(&agree(ephemeral, &pair.peer)?);
    let key = symmetric.mix_psk(&pair.psk);
    symmetric.seal(&key, &mut message[44..60]);
    let mac1 = mac1(&pair.peer, &message[..60]);
    write(&mut message, 60, &mac1);
    let [receiving, sending] = symmetric.split();
    Ok((SessionKeys { sending, receiving }, message))
}

/// Reads the response to an initiation. Returns the keys and the index that the responder chose.
/// The initiation can still be answered if this response is not authentic.
pub(crate) fn finish(
    pair: &Pair,
    initiated: &Initiated,
    message: &[u8],
) -> Result<(SessionKeys, u32), Invalid> {
    let message: &[u8; RESPONSE_BYTES] = message.try_into().map_err(|_| Invalid::Malformed)?;
    if message[..4] != 2u32.to_le_bytes() {
        return Err(Invalid::Malformed);
    }
    check_mac1(&pair.public, &message[..60], &message[60..76])?;
    let mut symmetric = initiated.symmetric.clone();
    let ephemeral = PublicKey::from(read::<32>(message, 12));
    symmetric.mix_ephemeral(&ephemeral);
    symmetric.mix_key(&agree(&initiated.ephemeral, &ephemeral)?);
    symmetric.mix_key(&agree(&pair.private, &ephemeral)?);
    let key = symmetric.mix_psk(&pair.psk);
    let [] = symmetric.open(&key, &message[44..60])?;
    let [sending, receiving] = symmetric.split();
    Ok((SessionKeys { sending, receiving }, u32::from_le_bytes(read(message, 4))))
}

/// Returns the shared secret of two keys.
fn agree(private: &StaticSecret, public: &PublicKey) -> Result<Secret, Invalid> {
    let shared = private.diffie_hellman(public);
    if !shared.was_contributory() {
        return Err(Invalid::WeakKey);
    }
    Ok(Zeroizing::new(shared.to_bytes()))
}

fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut state = Blake2s256::new();
    for part in parts {
        Digest::update(&mut state, part);
    }
    state.finalize().into()
}

/// Returns HMAC-BLAKE2s.
fn hmac(key: &[u8], parts: &[&[u8]]) -> Secret {
    // HMAC takes a key of any length.

    let mut state = <SimpleHmac<Blake2s256> as KeyInit>::new_from_slice(key).expect("any length");
    for part in parts {
        Update::update(&mut state, part);
    }
    Zeroizing::new(state.finalize_fixed().into())
}

/// Returns the first `N` outputs of HKDF (RFC 5869) with HMAC-BLAKE2s.
fn expand<const N: usize>(salt: &Secret, input: &[u8]) -> [Secret; N] {
    let key = hmac(&**salt, &[input]);
    let mut outputs: [Secret; N] = std::array::from_fn(|_| Zeroizing::new([0; 32]));
    let mut last: Option<Secret> = None;
    for (output, number) in outputs.iter_mut().zip(1u8..) {
        let before: &[u8] = last.as_ref().map_or(&[], |last| &**last);
        *output = hmac(&*key, &[before, &[number]]);
        last = Some(output.clone());
    }
    outputs
}

fn mac1(receiver: &PublicKey, message: &[u8]) -> [u8; 16] {
    keyed_mac1(receiver, message).finalize_fixed().into()
}

fn check_mac1(receiver: &PublicKey, message: &[u8], mac: &[u8]) -> Result<(), Invalid> {
    keyed_mac1(receiver, message).verify_slice(mac).map_err(|_| Invalid::NotAuthentic)
}

fn keyed_mac1(receiver: &PublicKey, message: &[u8]) -> Blake2sMac<U16> {
    let key = hash(&[LABEL_MAC1, receiver.as_bytes()]);

    let mut mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key).expect("a key of 32 bytes");
    Update::update(&mut mac, message);
    mac
}

fn cipher(key: &Secret) -> LessSafeKey {

    LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &**key).expect("a key of 32 bytes"))
}

/// Returns the nonce of a handshake's key, each of which seals once.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

fn write<const N: usize>(message: &mut [u8; N], at: usize, bytes: &[u8]) {
    if let Some(place) = message.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn read<const N: usize>(message: &[u8], at: usize) -> [u8; N] {
    message.get(at..).and_then(|bytes| bytes.first_chunk()).copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use boringtun::noise::{Tunn, TunnResult};

    use super::*;

    const PSK: [u8; 32] = [9; 32];

    fn key(number: u8) -> StaticSecret {
        StaticSecret::from([number; 32])
    }

    fn pair(own: u8, peer: u8) -> Pair {
        Pair::new(key(own), PublicKey::from(&key(peer)), PSK).map_err(|_| ()).unwrap()
    }

    /// boringtun's end of a tunnel.
    fn oracle(own: u8, peer: u8) -> Tunn {
        Tunn::new(key(own), PublicKey::from(&key(peer)), Some(PSK), None, 7, None)
    }

    /// Seals an empty data message with counter 0.
    fn keepalive(keys: &SessionKeys, receiver: u32) -> Vec<u8> {
        let mut message = [&4u32.to_le_bytes(), &receiver.to_le_bytes(), &[0; 8][..]].concat();
        let tag = cipher(&keys.sending)
            .seal_in_place_separate_tag(nonce(), Aad::empty(), &mut [])
            .unwrap();
        message.extend(tag.as_ref());
        message
    }

    #[test]
    fn two_ends_agree_on_keys() {
        let (a, b) = (pair(1, 2), pair(2, 1));
        let (initiated, message) = initiate(&a, key(3), 0x11, [5; 12]).map_err(|_| ()).unwrap();
        let received = receive(&b, &message).map_err(|_| ()).unwrap();
        assert_eq!((received.remote, received.timestamp), (0x11, [5; 12]));
        let (theirs, response) = respond(&b, received, &key(4), 0x22).map_err(|_| ()).unwrap();
        let (ours, remote) = finish(&a, &initiated, &response).map_err(|_| ()).unwrap();
        assert_eq!(remote, 0x22);
        assert_eq!((&ours.sending, &ours.receiving), (&theirs.receiving, &theirs.sending));
        assert_ne!(ours.sending, ours.receiving);
    }

    #[test]
    fn boringtun_answers_our_initiation() {
        let (ours, mut theirs) = (pair(1, 2), oracle(2, 1));
        let timestamp = [0x40, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
        let (initiated, message) =
            initiate(&ours, key(3), 0x11, timestamp).map_err(|_| ()).unwrap();
        let mut space = [0; 2048];
        let TunnResult::WriteToNetwork(response) = theirs.decapsulate(None, &message, &mut space)
        else {
            panic!("no response")
        };
        let (keys, remote) = finish(&ours, &initiated, response).map_err(|_| ()).unwrap();
        let message = keepalive(&keys, remote);
        let mut space = [0; 2048];
        assert!(matches!(theirs.decapsulate(None, &message, &mut space), TunnResult::Done));
        assert!(theirs.time_since_last_handshake().is_some());
    }

    #[test]
    fn we_answer_the_initiation_of_boringtun() {
        let (ours, mut theirs) = (pair(1, 2), oracle(2, 1));
        let mut space = [0; 2048];
        let TunnResult::WriteToNetwork(message) =
            theirs.format_handshake_initiation(&mut space, true)
        else {
            panic!("no initiation")
        };
        let received = receive(&ours, message).map_err(|_| ()).unwrap();
        let (keys, response) = respond(&ours, received, &key(4), 0x22).map_err(|_| ()).unwrap();
        let mut space = [0; 2048];
        // It confirms the session with a keepalive, which is the tag of nothing with our key.
        let TunnResult::WriteToNetwork(data) = theirs.decapsulate(None, &response, &mut space)
        else {
            panic!("no keepalive")
        };
        assert_eq!(data.len(), 32);
        let mut sealed = data[16..].to_vec();
        let opened = cipher(&keys.receiving).open_in_place(nonce(), Aad::empty(), &mut sealed);
        assert!(opened.is_ok());
    }

    #[test]
    fn changed_messages_are_refused() {
        let (a, b) = (pair(1, 2), pair(2, 1));
        let (initiated, message) = initiate(&a, key(3), 0x11, [5; 12]).map_err(|_| ()).unwrap();
        for byte in 0..132 {
            let mut changed = message;
            changed[byte] ^= 1;
            assert!(receive(&b, &changed).is_err(), "byte {byte} of the initiation");
        }
        let received = receive(&b, &message).map_err(|_| ()).unwrap();
        let (_, response) = respond(&b, received, &key(4), 0x22).map_err(|_| ()).unwrap();
        for byte in 0..76 {
            let mut changed = response;
            changed[byte] ^= 1;
            assert!(finish(&a, &initiated, &changed).is_err(), "byte {byte} of the response");
        }
        assert!(finish(&a, &initiated, &response).is_ok());
        // Another pre-shared key, and a peer of another key.
        let other = Pair::new(key(1), PublicKey::from(&key(2)), [8; 32]).map_err(|_| ()).unwrap();
        assert!(finish(&other, &initiated, &response).is_err());
        assert!(receive(&pair(2, 3), &message).is_err());
    }

    #[test]
    fn keys_of_small_order_are_refused() {
        let zero = PublicKey::from([0; 32]);
        assert!(matches!(Pair::new(key(1), zero, PSK), Err(Invalid::WeakKey)));
    }
}
