//! WireGuard's handshake (whitepaper section 5.4): Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s with
//! WireGuard's messages around it. Decides nothing about time, retries or cookies: it makes and
//! reads messages, and returns the keys of a session.

use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::invalid::Invalid;
use super::macs::MacKeys;
use super::symmetric::{Secret, Symmetric, TAG, agree};

/// Length of an initiation in bytes.
pub(crate) const INITIATION_BYTES: usize = 148;
/// Length of a response in bytes.
pub(crate) const RESPONSE_BYTES: usize = 92;
/// Length of a TAI64N timestamp in bytes.
pub(crate) const TIMESTAMP_BYTES: usize = 12;

/// Prologue of the handshake.
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

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
    macs: MacKeys,
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
        let (psk, macs) = (Zeroizing::new(psk), MacKeys::new(&public, &peer));
        Ok(Self { private, public, peer, static_static, psk, macs })
    }
}

/// Initiation that waits for its response.
pub(crate) struct Initiated {
    symmetric: Symmetric,
    ephemeral: StaticSecret,
}

/// Writes an initiation with this index, without the second MAC.
pub(crate) fn initiate(
    pair: &Pair,
    ephemeral: StaticSecret,
    index: u32,
    timestamp: [u8; TIMESTAMP_BYTES],
) -> Result<(Initiated, [u8; INITIATION_BYTES]), Invalid> {
    let mut message = [0; INITIATION_BYTES];
    message[..4].copy_from_slice(&1u32.to_le_bytes());
    message[4..8].copy_from_slice(&index.to_le_bytes());
    message[88..100].copy_from_slice(&timestamp);
    let mut symmetric = Symmetric::new(IDENTIFIER, &pair.peer);
    write_first(&mut symmetric, pair, &ephemeral, &mut message[8..116])?;
    pair.macs.sign(&mut message)?;
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
    pair.macs.check(message)?;
    let mut symmetric = Symmetric::new(IDENTIFIER, &pair.public);
    let mut timestamp = [0; TIMESTAMP_BYTES];
    let ephemeral = read_first(&mut symmetric, pair, &message[8..116], &mut timestamp)?;
    Ok(Received { symmetric, remote: number(message, 4)?, ephemeral, timestamp })
}

/// Writes the response to an initiation, with this index and without the second MAC.
pub(crate) fn respond(
    pair: &Pair,
    received: Received,
    ephemeral: &StaticSecret,
    index: u32,
) -> Result<(SessionKeys, [u8; RESPONSE_BYTES]), Invalid> {
    let mut message = [0; RESPONSE_BYTES];
    message[..4].copy_from_slice(&2u32.to_le_bytes());
    message[4..8].copy_from_slice(&index.to_le_bytes());
    message[8..12].copy_from_slice(&received.remote.to_le_bytes());
    let mut symmetric = received.symmetric;
    write_second(&mut symmetric, pair, ephemeral, &received.ephemeral, &mut message[12..60])?;
    pair.macs.sign(&mut message)?;
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
    pair.macs.check(message)?;
    let mut symmetric = initiated.symmetric.clone();
    read_second(&mut symmetric, pair, &initiated.ephemeral, &message[12..60], &mut [])?;
    let [sending, receiving] = symmetric.split();
    Ok((SessionKeys { sending, receiving }, number(message, 4)?))
}

/// Writes the first message of the pattern (`e, es, s, ss`, payload) into `space`, which has the
/// payload at its place.
fn write_first(
    symmetric: &mut Symmetric,
    pair: &Pair,
    ephemeral: &StaticSecret,
    space: &mut [u8],
) -> Result<(), Invalid> {
    let public = PublicKey::from(ephemeral);
    let (place, rest) = space.split_first_chunk_mut::<32>().ok_or(Invalid::Malformed)?;
    let (identity, payload) =
        rest.split_first_chunk_mut::<{ 32 + TAG }>().ok_or(Invalid::Malformed)?;
    *place = public.to_bytes();
    symmetric.mix_ephemeral(&public);
    let key = symmetric.mix_key(&agree(ephemeral, &pair.peer)?);
    identity[..32].copy_from_slice(pair.public.as_bytes());
    symmetric.seal(&key, identity)?;
    let key = symmetric.mix_key(&pair.static_static);
    symmetric.seal(&key, payload)
}

/// Reads the first message of the pattern. Returns the ephemeral key of the initiator.
fn read_first(
    symmetric: &mut Symmetric,
    pair: &Pair,
    message: &[u8],
    payload: &mut [u8],
) -> Result<PublicKey, Invalid> {
    let (ephemeral, rest) = message.split_first_chunk::<32>().ok_or(Invalid::Malformed)?;
    let (identity, sealed) = rest.split_first_chunk::<{ 32 + TAG }>().ok_or(Invalid::Malformed)?;
    let ephemeral = PublicKey::from(*ephemeral);
    symmetric.mix_ephemeral(&ephemeral);
    let key = symmetric.mix_key(&agree(&pair.private, &ephemeral)?);
    let mut claimed = [0; 32];
    symmetric.open(&key, identity, &mut claimed)?;
    // The claimed key is not a secret.
    if claimed != pair.peer.to_bytes() {
        return Err(Invalid::NotAuthentic);
    }
    let key = symmetric.mix_key(&pair.static_static);
    symmetric.open(&key, sealed, payload)?;
    Ok(ephemeral)
}

/// Writes the second message of the pattern (`e, ee, se, psk`, payload) into `space`, which has the
/// payload at its place.
fn write_second(
    symmetric: &mut Symmetric,
    pair: &Pair,
    ephemeral: &StaticSecret,
    remote: &PublicKey,
    space: &mut [u8],
) -> Result<(), Invalid> {
    let public = PublicKey::from(ephemeral);
    let (place, payload) = space.split_first_chunk_mut::<32>().ok_or(Invalid::Malformed)?;
    *place = public.to_bytes();
    symmetric.mix_ephemeral(&public);
    symmetric.mix_key(&agree(ephemeral, remote)?);
    symmetric.mix_key(&agree(ephemeral, &pair.peer)?);
    let key = symmetric.mix_psk(&pair.psk);
    symmetric.seal(&key, payload)
}

/// Reads the second message of the pattern.
fn read_second(
    symmetric: &mut Symmetric,
    pair: &Pair,
    ephemeral: &StaticSecret,
    message: &[u8],
    payload: &mut [u8],
) -> Result<(), Invalid> {
    let (remote, sealed) = message.split_first_chunk::<32>().ok_or(Invalid::Malformed)?;
    let remote = PublicKey::from(*remote);
    symmetric.mix_ephemeral(&remote);
    symmetric.mix_key(&agree(ephemeral, &remote)?);
    symmetric.mix_key(&agree(&pair.private, &remote)?);
    let key = symmetric.mix_psk(&pair.psk);
    symmetric.open(&key, sealed, payload)
}

/// Returns the 32-bit number at an offset.
fn number(message: &[u8], at: usize) -> Result<u32, Invalid> {
    crate::message::word(message, at).ok_or(Invalid::Malformed)
}

#[cfg(test)]
mod tests {
    use boringtun::noise::{Tunn, TunnResult};
    use data_encoding::HEXLOWER;
    use ring::aead::Aad;

    use super::*;
    use crate::batch::symmetric::{cipher, nonce};

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
            .unwrap()
            .seal_in_place_separate_tag(nonce(), Aad::empty(), &mut [])
            .unwrap();
        message.extend(tag.as_ref());
        message
    }

    fn unhex<const N: usize>(text: &str) -> [u8; N] {
        HEXLOWER.decode(text.as_bytes()).unwrap().try_into().unwrap()
    }

    /// The vector of the Noise specification's test suite (cacophony) for this pattern, whose
    /// prologue and payloads are not those of WireGuard.
    #[test]
    fn messages_are_those_of_the_specification() {
        const PROLOGUE: &[u8] = b"John Galt";
        const FIRST: &str = "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944\
            001e21de9f98ddd8e2ad57527207feb56253c9c94a9e496782ecfcb2a75fbcaf1b52948cc48daefe660c62\
            119ab5000980c84831215f2441eba616548e832985464cf17e51ee93109008399a21f7e13f";
        const SECOND: &str = "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843\
            cb765f2caef0751b8f007572dab0322217755c0632f365717edbf34d33e87a";
        let key = |text: &str| StaticSecret::from(unhex::<32>(text));
        let initiator = key("e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1");
        let responder = key("4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893");
        let ours = key("893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a");
        let theirs = key("bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b");
        let psk = *b"This is my Austrian perspective!";
        let [of_initiator, of_responder] = [&initiator, &responder].map(PublicKey::from);
        let a = Pair::new(initiator, of_responder, psk).map_err(|_| ()).unwrap();
        let b = Pair::new(responder, of_initiator, psk).map_err(|_| ()).unwrap();
        let [mut a_state, mut b_state] = [(); 2].map(|()| Symmetric::new(PROLOGUE, &of_responder));

        let mut first = [0; 96 + 16];
        first[80..96].copy_from_slice(b"Ludwig von Mises");
        write_first(&mut a_state, &a, &ours, &mut first).unwrap();
        assert_eq!(HEXLOWER.encode(&first), FIRST);
        let mut payload = [0; 16];
        let ephemeral = read_first(&mut b_state, &b, &first, &mut payload).unwrap();
        assert_eq!(&payload, b"Ludwig von Mises");

        let mut second = [0; 48 + 15];
        second[32..47].copy_from_slice(b"Murray Rothbard");
        write_second(&mut b_state, &b, &theirs, &ephemeral, &mut second).unwrap();
        assert_eq!(HEXLOWER.encode(&second), SECOND);
        let mut payload = [0; 15];
        read_second(&mut a_state, &a, &ours, &second, &mut payload).unwrap();
        assert_eq!(&payload, b"Murray Rothbard");

        let hash = "f5191b875290abcd41347ac3622d9679688a7e980229cb937ef748336cfde0e5";
        assert_eq!((a_state.hash(), b_state.hash()), (&unhex(hash), &unhex(hash)));
        // The first transport message of each end.
        let plain = [&b"F. A. Hayek"[..], b"Carl Menger"];
        let sealed = [
            "8153ca9833bc3c1b91a7e66e5f4d4f5b59bf9e64c2f20d15f0bba7",
            "07af0c9c86e1b4e80f36b04ff7688d51141af3debd0332f0a705ef",
        ];
        for ((key, plain), sealed) in a_state.split().iter().zip(plain).zip(sealed) {
            let mut message = plain.to_vec();
            let key = cipher(key).unwrap();
            key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut message).unwrap();
            assert_eq!(HEXLOWER.encode(&message), sealed);
        }
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
        let key = cipher(&keys.receiving).unwrap();
        let opened = key.open_in_place(nonce(), Aad::empty(), &mut sealed);
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
