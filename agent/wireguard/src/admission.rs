//! Admission of handshakes: which initiations are worth the cost of a handshake, and which must
//! prove their address first.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use towline_types::id::{PresharedKey, WireguardKey};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::{Engine, HANDSHAKE_BYTES, Refusal};

/// Initiations per second above which initiators must prove their address with a cookie. Each
/// initiation costs about a quarter of a millisecond.
const INITIATIONS_PER_SECOND: u64 = 256;

/// WireGuard key of the node, and the admission of initiations.
pub struct Secrets {
    private: StaticSecret,
    public: PublicKey,
    /// Engine of the tunnels. Admission is boringtun's for both.
    engine: Engine,
    /// Limiter of initiations for all peers together.
    gate: RateLimiter,
    /// Limiter that always demands a cookie. Used for source addresses that send too many
    /// initiations.
    strict_gate: RateLimiter,
    /// Limiter of the tunnels. Never under load, because admission was decided before.
    open_gate: Arc<RateLimiter>,
    /// Hash keys that turn an address and a port into what boringtun takes for an address.
    cookie_keys: [RandomState; 2],
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secrets").field("public", &self.public_key()).finish_non_exhaustive()
    }
}

/// Result of the admission of an initiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// The initiation may be processed.
    Admitted,
    /// The initiator must prove its address: this number of bytes of a cookie reply must be sent.
    Cookie(usize),
    /// The initiation is refused for this reason.
    Refused(Refusal),
}

impl Secrets {
    /// Creates the limiters for the node with this private key, whose tunnels use boringtun.
    pub fn new(private: StaticSecret) -> Self {
        Self::with_engine(private, Engine::BORINGTUN)
    }

    /// Creates the limiters for the node with this private key, whose tunnels use this engine.
    pub fn with_engine(private: StaticSecret, engine: Engine) -> Self {
        let public = PublicKey::from(&private);
        Self {
            gate: RateLimiter::new(&public, INITIATIONS_PER_SECOND),
            strict_gate: RateLimiter::new(&public, 0),
            open_gate: Arc::new(RateLimiter::new(&public, u64::MAX)),
            cookie_keys: [RandomState::new(), RandomState::new()],
            private,
            public,
            engine,
        }
    }

    /// Returns the engine of the tunnels.
    #[inline]
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Returns the node's public key.
    pub fn public_key(&self) -> WireguardKey {
        WireguardKey(self.public.to_bytes())
    }

    /// Checks that an initiation is meant for this node and may be processed now. If `proven` is
    /// set, the initiation needs a valid cookie, under load or not, which proves the address of its
    /// sender.
    pub fn admit(
        &self,
        from: SocketAddr,
        initiation: &[u8],
        proven: bool,
        reply: &mut [u8],
    ) -> Admission {
        if reply.len() < HANDSHAKE_BYTES {
            return Admission::Refused(Refusal::InvalidHandshake);
        }
        let gate = if proven { &self.strict_gate } else { &self.gate };
        gate.reset_count();
        match gate.verify_packet(Some(self.cookie_address(from)), initiation, reply) {
            Ok(Packet::HandshakeInit(_)) => Admission::Admitted,
            Ok(_) => Admission::Refused(Refusal::Malformed),
            Err(TunnResult::WriteToNetwork(cookie)) => Admission::Cookie(cookie.len()),
            Err(TunnResult::Err(error)) => Admission::Refused(Refusal::from(&error)),
            Err(_) => Admission::Refused(Refusal::InvalidHandshake),
        }
    }

    /// Returns the public key that an admitted initiation claims, which is not proven yet. `None`
    /// if the key does not decrypt. This is the expensive step.
    pub fn initiator_key(&self, initiation: &[u8]) -> Option<WireguardKey> {
        let Ok(Packet::HandshakeInit(message)) = Tunn::parse_incoming_packet(initiation) else {
            return None;
        };
        let half = parse_handshake_anon(&self.private, &self.public, &message).ok()?;
        Some(WireguardKey(half.peer_static_public))
    }

    /// Returns the private key, for handshakes.
    pub(crate) fn private(&self) -> &StaticSecret {
        &self.private
    }

    /// Creates boringtun's state of a tunnel with a peer. `index` is the 24-bit tunnel index.
    pub(crate) fn tunn(&self, peer: WireguardKey, psk: Option<&PresharedKey>, index: u32) -> Tunn {
        let psk = psk.map(|psk| psk.0);
        let (private, gate) = (self.private.clone(), self.open_gate.clone());
        Tunn::new(private, PublicKey::from(peer.0), psk, None, index, Some(gate))
    }

    /// Returns a pseudo-address for boringtun's cookie, which covers an address only. Many nodes
    /// may be behind one NAT, so address and port are hashed into one pseudo-address.
    fn cookie_address(&self, from: SocketAddr) -> IpAddr {
        let [high, low] = &self.cookie_keys;
        let half = |key: &RandomState| u128::from(key.hash_one((from.ip(), from.port())));
        Ipv6Addr::from(half(high) << 64 | half(low)).into()
    }
}
