//! The two MACs of handshake messages, and the cookies that the second proves (whitepaper sections
//! 5.4.4 and 5.4.7). Only what an initiator or a responder sends: whether a message of another node
//! needs a cookie is judged by [`crate::Secrets::admit`].

use std::time::{Duration, Instant};

use blake2::Blake2sMac;
use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac, Update};
use chacha20poly1305::{AeadInPlace, Key, Tag, XChaCha20Poly1305, XNonce};
use x25519_dalek::PublicKey;
use zeroize::Zeroizing;

use super::invalid::Invalid;
use super::symmetric::hash;

const LABEL_MAC1: &[u8] = b"mac1----";
const LABEL_COOKIE: &[u8] = b"cookie--";

/// Length of a MAC, and of a cookie, in bytes.
pub(super) const MAC_BYTES: usize = 16;
/// Length of a cookie reply in bytes.
const REPLY_BYTES: usize = 64;
/// Longest time that a cookie is used (whitepaper section 5.4.7).
const COOKIE_LIFETIME: Duration = Duration::from_secs(120);

/// Keys of the first MAC in both directions.
pub(super) struct MacKeys {
    own: [u8; 32],
    peer: [u8; 32],
}

impl MacKeys {
    pub(super) fn new(own: &PublicKey, peer: &PublicKey) -> Self {
        Self {
            own: hash(&[LABEL_MAC1, own.as_bytes()]),
            peer: hash(&[LABEL_MAC1, peer.as_bytes()]),
        }
    }

    /// Writes the first MAC of a message to the peer, which ends with room for both MACs.
    pub(super) fn sign(&self, message: &mut [u8]) -> Result<(), Invalid> {
        let (body, macs) =
            message.split_last_chunk_mut::<{ 2 * MAC_BYTES }>().ok_or(Invalid::Malformed)?;
        let (first, _) = macs.split_first_chunk_mut::<MAC_BYTES>().ok_or(Invalid::Malformed)?;
        *first = keyed(&self.peer, body)?.finalize_fixed().into();
        Ok(())
    }

    /// Checks the first MAC of a message to this node.
    pub(super) fn check(&self, message: &[u8]) -> Result<(), Invalid> {
        let (body, macs) =
            message.split_last_chunk::<{ 2 * MAC_BYTES }>().ok_or(Invalid::Malformed)?;
        let (first, _) = macs.split_first_chunk::<MAC_BYTES>().ok_or(Invalid::Malformed)?;
        keyed(&self.own, body)?.verify_slice(first).map_err(|_| Invalid::WrongMac)
    }
}

/// Cookie of the peer, for the messages that this node sends to it.
pub(super) struct Cookies {
    /// Key that the peer's cookies are encrypted with.
    key: [u8; 32],
    /// First MAC and sender index of the last message. Cleared once a reply to it was used.
    last: Option<(u32, [u8; MAC_BYTES])>,
    /// Cookie, and the time when it arrived.
    cookie: Option<(Zeroizing<[u8; MAC_BYTES]>, Instant)>,
}

impl Cookies {
    pub(super) fn new(peer: &PublicKey) -> Self {
        Self { key: hash(&[LABEL_COOKIE, peer.as_bytes()]), last: None, cookie: None }
    }

    /// Writes the second MAC of a message from `index`, if there is a cookie for it.
    pub(super) fn complete(&mut self, index: u32, message: &mut [u8], now: Instant) {
        let expired = |since: Instant| now.saturating_duration_since(since) >= COOKIE_LIFETIME;
        if self.cookie.as_ref().is_some_and(|(_, since)| expired(*since)) {
            self.cookie = None;
        }
        let Some((signed, second)) = message.split_last_chunk_mut::<MAC_BYTES>() else { return };
        self.last = signed.last_chunk::<MAC_BYTES>().map(|first| (index, *first));
        if let Some((cookie, _)) = &self.cookie
            && let Ok(mac) = keyed(&**cookie, signed)
        {
            *second = mac.finalize_fixed().into();
        }
    }

    /// Reads a cookie reply to the last message.
    pub(super) fn receive(&mut self, reply: &[u8], now: Instant) -> Result<(), Invalid> {
        let reply: &[u8; REPLY_BYTES] = reply.try_into().map_err(|_| Invalid::Malformed)?;
        let (index, mac) = self.last.ok_or(Invalid::Unexpected)?;
        let (header, rest) = reply.split_first_chunk::<8>().ok_or(Invalid::Malformed)?;
        let (nonce, rest) = rest.split_first_chunk::<24>().ok_or(Invalid::Malformed)?;
        let (sealed, tag) = rest.split_first_chunk::<MAC_BYTES>().ok_or(Invalid::Malformed)?;
        let tag: &[u8; 16] = tag.try_into().map_err(|_| Invalid::Malformed)?;
        if header.first_chunk() != Some(&3u32.to_le_bytes()) {
            return Err(Invalid::Malformed);
        }
        if header.last_chunk() != Some(&index.to_le_bytes()) {
            return Err(Invalid::Unexpected);
        }
        let mut cookie = Zeroizing::new(*sealed);
        XChaCha20Poly1305::new(&Key::from(self.key))
            .decrypt_in_place_detached(&XNonce::from(*nonce), &mac, &mut *cookie, &Tag::from(*tag))
            .map_err(|_| Invalid::NotAuthentic)?;
        self.last = None;
        self.cookie = Some((cookie, now));
        Ok(())
    }
}

/// Returns BLAKE2s with a key of at most 32 bytes and 16 bytes of output, which has taken `message`.
fn keyed(key: &[u8], message: &[u8]) -> Result<Blake2sMac<U16>, Invalid> {
    let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(key);
    let mut mac = mac.map_err(|_| Invalid::Malformed)?;
    Update::update(&mut mac, message);
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use x25519_dalek::StaticSecret;

    use super::*;
    use boringtun::noise::TunnResult;
    use boringtun::noise::rate_limiter::RateLimiter;

    const FROM: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn public(number: u8) -> PublicKey {
        PublicKey::from(&StaticSecret::from([number; 32]))
    }

    /// Returns an initiation of node 1 to node 2 that only its MACs protect.
    fn initiation() -> [u8; 148] {
        let mut message = [7; 148];
        message[..4].copy_from_slice(&1u32.to_le_bytes());
        message[4..8].copy_from_slice(&0x55u32.to_le_bytes());
        message[132..].fill(0);
        MacKeys::new(&public(1), &public(2)).sign(&mut message).unwrap();
        message
    }

    #[test]
    fn a_cookie_of_boringtun_is_used_for_two_minutes() {
        let limiter = RateLimiter::new(&public(2), 0);
        let (mut cookies, now) = (Cookies::new(&public(2)), Instant::now());
        let mut reply = [0; 148];
        assert_eq!(cookies.receive(&reply[..64], now), Err(Invalid::Unexpected));
        let mut message = initiation();
        cookies.complete(0x55, &mut message, now);
        let verified = limiter.verify_packet(Some(FROM), &message, &mut reply);
        let Err(TunnResult::WriteToNetwork(reply)) = verified else { panic!("no cookie") };
        let reply = reply.to_vec();
        for byte in 0..64 {
            let mut changed = reply.clone();
            changed[byte] ^= 1;
            assert!(cookies.receive(&changed, now).is_err(), "byte {byte}");
        }
        assert_eq!(cookies.receive(&reply, now), Ok(()));
        assert_eq!(cookies.receive(&reply, now), Err(Invalid::Unexpected), "it is used once");
        let mut message = initiation();
        cookies.complete(0x56, &mut message, now + COOKIE_LIFETIME - Duration::from_secs(1));
        assert!(limiter.verify_packet(Some(FROM), &message, &mut [0; 148]).is_ok());
        let mut message = initiation();
        cookies.complete(0x57, &mut message, now + COOKIE_LIFETIME);
        assert_eq!(message[132..], [0; 16]);
    }

    #[test]
    fn the_first_mac_is_for_one_receiver() {
        let message = initiation();
        assert_eq!(MacKeys::new(&public(2), &public(1)).check(&message), Ok(()));
        assert_eq!(MacKeys::new(&public(3), &public(1)).check(&message), Err(Invalid::WrongMac));
        assert_eq!(
            MacKeys::new(&public(2), &public(1)).check(&message[..20]),
            Err(Invalid::Malformed)
        );
    }
}
