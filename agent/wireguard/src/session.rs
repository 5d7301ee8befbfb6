//! Handshakes and sessions on boringtun, and the admission of initiations.
//!
//! boringtun 0.7.1 has gaps and defects. Those that need neither timers nor paths are worked around
//! here, the others in the data plane's tunnels:
//!
//! - Payloads from [`Segments`] are padded to 16 bytes already (whitepaper section 5.4.6).
//! - A counter past Reject-After-Messages is refused before boringtun processes it. Near 2^64
//!   boringtun's replay window would overflow.
//! - boringtun's handshake limiter is one global counter that also counts responses, and its cookie
//!   ignores the port. [`Secrets::admit`] checks initiations alone, with a cookie that covers
//!   address and port. The tunnels get a limiter that never refuses.
//! - boringtun's clock advances only in `update_timers`, so [`Session::refresh`] is called before
//!   everything that depends on time.
//! - boringtun panics when a buffer is too small, so every buffer is checked here first.
//! - boringtun's persistent keepalive and its packet queue are not used.
//!
//! On an established session nothing here reads the clock per packet, allocates or takes a lock,
//! except for the two uncontended locks of boringtun's replay window.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use towline_types::id::{PresharedKey, WireguardKey};
use x25519_dalek::{PublicKey, StaticSecret};

/// Bytes of the header of a data message: type, receiver, counter.
pub const DATA_HEADER: usize = 16;
/// Bytes that a data message adds to its payload: header and authentication tag.
pub const DATA_OVERHEAD: usize = 32;
/// Bytes of the longest handshake message. Every buffer for a message must have at least this size.
pub const HANDSHAKE_BYTES: usize = 148;
/// Payloads are padded to a multiple of this number of bytes.
pub const PADDING: usize = 16;

/// Initiations per second above which initiators must prove their address with a cookie. Each
/// initiation costs about a quarter of a millisecond.
const INITIATIONS_PER_SECOND: u64 = 256;
/// Reject-After-Messages (whitepaper section 6.1): a data message with this or a larger counter is
/// refused.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// Kind of a WireGuard message, by type and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// Handshake initiation, type 1.
    Initiation,
    /// Handshake response, type 2.
    Response {
        /// Receiver index of the tunnel that initiated.
        receiver: u32,
    },
    /// Cookie reply, type 3.
    CookieReply {
        /// Receiver index of the tunnel that sent the message it answers.
        receiver: u32,
    },
    /// Transport data, type 4.
    Data {
        /// Receiver index of the session.
        receiver: u32,
    },
}

impl MessageKind {
    /// Returns the kind by type, reserved bytes and length. `None` if the datagram is no WireGuard
    /// message.
    #[inline]
    pub fn of(datagram: &[u8]) -> Option<Self> {
        let word = |at: usize| {
            let bytes = datagram.get(at..at + 4)?;
            Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        };
        match (word(0)?, datagram.len()) {
            (1, 148) => Some(Self::Initiation),
            (2, 92) => Some(Self::Response { receiver: word(8)? }),
            (3, 64) => Some(Self::CookieReply { receiver: word(4)? }),
            (4, DATA_OVERHEAD..) => Some(Self::Data { receiver: word(4)? }),
            _ => None,
        }
    }
}

/// Plaintext to seal, one segment after another.
pub trait Segments {
    /// Returns the bytes of the next segment with its padding. `None` if there is none.
    fn next_len(&self) -> Option<usize>;
    /// Returns the next segment with its padding. Empty if there is none.
    fn take(&mut self) -> &[u8];
}

/// Space for sealed messages, one after another.
pub trait Sink {
    /// Returns the space for the next message, which has at least `len` bytes. `None` if there is
    /// no room.
    fn place(&mut self, len: usize) -> Option<&mut [u8]>;
    /// Appends the first `len` bytes of the space as a message.
    fn commit(&mut self, len: usize);
}

/// Reason why a message is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A message with an impossible length.
    Malformed,
    /// A handshake message whose first MAC is wrong: it is not meant for this node's key.
    WrongMac,
    /// An initiation under load without a valid cookie.
    UnderLoad,
    /// An initiation that is not newer than the last one of that peer.
    StaleHandshake,
    /// A handshake message that does not match the state of its tunnel, or does not decrypt.
    InvalidHandshake,
    /// Data of a session that does not exist.
    NoSession,
    /// Data that was received before, or is older than the replay window.
    Replayed,
    /// Data that does not decrypt.
    NotAuthentic,
    /// Data whose counter is past Reject-After-Messages.
    CounterExhausted,
    /// Authentic data that contains no IP packet.
    NoPacket,
}

/// WireGuard key of the node, and the admission of initiations.
pub struct Secrets {
    private: StaticSecret,
    public: PublicKey,
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
    /// Creates the limiters for the node with this private key.
    pub fn new(private: StaticSecret) -> Self {
        let public = PublicKey::from(&private);
        Self {
            gate: RateLimiter::new(&public, INITIATIONS_PER_SECOND),
            strict_gate: RateLimiter::new(&public, 0),
            open_gate: Arc::new(RateLimiter::new(&public, u64::MAX)),
            cookie_keys: [RandomState::new(), RandomState::new()],
            private,
            public,
        }
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
            Err(TunnResult::Err(error)) => Admission::Refused(reason(&error)),
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

    /// Returns a pseudo-address for boringtun's cookie, which covers an address only. Many nodes
    /// may be behind one NAT, so address and port are hashed into one pseudo-address.
    fn cookie_address(&self, from: SocketAddr) -> IpAddr {
        let [high, low] = &self.cookie_keys;
        let half = |key: &RandomState| u128::from(key.hash_one((from.ip(), from.port())));
        Ipv6Addr::from(half(high) << 64 | half(low)).into()
    }
}

/// WireGuard state of a tunnel with one peer: its handshake and its sessions.
pub struct Session {
    tunn: Tunn,
    /// True while there is a session to seal with. Updated after every call of boringtun that may
    /// change it.
    ready: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("ready", &self.ready).finish_non_exhaustive()
    }
}

/// Result of [`Session::seal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sealed {
    /// Length of all sealed messages, in bytes.
    pub bytes: usize,
    /// Number of segments that could not be sealed because the session has just ended.
    pub lost: usize,
}

/// Result of opening one data message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// A packet in the space of the message, truncated to the length that its header claims.
    Packet {
        /// Position of the first byte in that space.
        start: usize,
        /// Length in bytes.
        len: usize,
    },
    /// A keepalive: authentic and empty.
    Keepalive,
    /// The message is refused for this reason.
    Refused(Refusal),
}

/// Result of a handshake message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// An authentic initiation was answered. The new session is used once the first datagram for
    /// `receiver` arrives, which confirms it.
    Response {
        /// Length of the response in bytes.
        len: usize,
        /// Receiver index of the new session.
        receiver: u32,
    },
    /// The initiation of this node was answered: the session is established, and a keepalive
    /// confirms it.
    Established {
        /// Length of the keepalive in bytes.
        len: usize,
    },
    /// A cookie for the next initiation of this node.
    Cookie,
    /// The message is refused for this reason.
    Refused(Refusal),
}

/// Result of [`Session::tick`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tick {
    /// No message is due now.
    Quiet,
    /// An initiation of this number of bytes must be sent.
    Initiation(usize),
    /// A keepalive of this number of bytes must be sent.
    Keepalive(usize),
    /// The session expired, or the handshake was given up. Nothing happens until the next
    /// initiation.
    Expired,
}

impl Session {
    /// Creates the state without a session. `index` is the 24-bit tunnel index.
    pub fn new(
        secrets: &Secrets,
        peer: WireguardKey,
        psk: Option<&PresharedKey>,
        index: u32,
    ) -> Self {
        let tunn = Tunn::new(
            secrets.private.clone(),
            PublicKey::from(peer.0),
            psk.map(|psk| psk.0),
            None,
            index,
            Some(secrets.open_gate.clone()),
        );
        Self { tunn, ready: false }
    }

    /// Returns whether there is a session to seal with.
    #[inline]
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Seals segments into `sink` until none is left or the sink is full. Call only when
    /// [`Session::is_ready`].
    #[inline]
    pub fn seal(&mut self, segments: &mut impl Segments, sink: &mut impl Sink) -> Sealed {
        let mut sealed = Sealed::default();
        while let Some(len) = segments.next_len() {
            let need = (len + DATA_OVERHEAD).max(HANDSHAKE_BYTES);
            let Some(space) = sink.place(need) else { break };
            let segment = segments.take();
            // Without a session boringtun would return an initiation here, which does not carry
            // this segment.
            if let TunnResult::WriteToNetwork(message) = self.tunn.encapsulate(segment, space)
                && message.first() == Some(&4)
            {
                let len = message.len();
                sink.commit(len);
                sealed.bytes += len;
            } else {
                sealed.lost += 1;
            }
        }
        sealed
    }

    /// Opens data messages, each into its own space, which must be at least as long as the message.
    /// Calls `each` once for every message, with its length in bytes.
    #[inline]
    pub fn open<'a>(
        &mut self,
        messages: impl Iterator<Item = (&'a [u8], &'a mut [u8])>,
        mut each: impl FnMut(usize, Opened),
    ) {
        for (message, space) in messages {
            each(message.len(), self.open_one(message, space));
        }
        if !self.ready {
            self.refresh_ready();
        }
    }

    fn open_one(&mut self, message: &[u8], space: &mut [u8]) -> Opened {
        let Some(counter) = message.get(8..16).and_then(|bytes| bytes.first_chunk()) else {
            return Opened::Refused(Refusal::Malformed);
        };
        if u64::from_le_bytes(*counter) >= REJECT_AFTER_MESSAGES {
            return Opened::Refused(Refusal::CounterExhausted);
        }
        let Some(space) = space.get_mut(DATA_HEADER..message.len()) else {
            return Opened::Refused(Refusal::Malformed);
        };
        match self.tunn.decapsulate(None, message, space) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Opened::Packet { start: DATA_HEADER, len: packet.len() }
            }
            TunnResult::Done => Opened::Keepalive,
            TunnResult::Err(WireGuardError::InvalidPacket) => Opened::Refused(Refusal::NoPacket),
            TunnResult::Err(error) => Opened::Refused(reason(&error)),
            TunnResult::WriteToNetwork(_) => Opened::Refused(Refusal::Malformed),
        }
    }

    /// Handles a handshake message and writes the answer to `reply`.
    pub fn handshake(&mut self, message: &[u8], reply: &mut [u8]) -> Answered {
        if reply.len() < HANDSHAKE_BYTES {
            return Answered::Refused(Refusal::InvalidHandshake);
        }
        self.refresh();
        let answered = match self.tunn.decapsulate(None, message, reply) {
            TunnResult::WriteToNetwork(answer) => match MessageKind::of(answer) {
                Some(MessageKind::Response { .. }) => Answered::Response {
                    len: answer.len(),
                    receiver: u32::from_le_bytes([answer[4], answer[5], answer[6], answer[7]]),
                },
                Some(MessageKind::Data { .. }) => Answered::Established { len: answer.len() },
                _ => Answered::Refused(Refusal::InvalidHandshake),
            },
            TunnResult::Done => Answered::Cookie,
            TunnResult::Err(error) => Answered::Refused(match reason(&error) {
                Refusal::NotAuthentic => Refusal::InvalidHandshake,
                other => other,
            }),
            _ => Answered::Refused(Refusal::InvalidHandshake),
        };
        self.refresh_ready();
        answered
    }

    /// Starts a handshake, even when one is under way (a response to the earlier initiation is
    /// still accepted). Returns the length of the initiation in `message`, or 0 if it could not be
    /// made.
    pub fn initiate(&mut self, message: &mut [u8]) -> usize {
        if message.len() < HANDSHAKE_BYTES {
            return 0;
        }
        self.refresh();
        match self.tunn.format_handshake_initiation(message, true) {
            TunnResult::WriteToNetwork(initiation) => initiation.len(),
            _ => 0,
        }
    }

    /// Seals an empty payload. Returns the length of the datagram in `message`, or 0 without a
    /// session.
    pub fn keepalive(&mut self, message: &mut [u8]) -> usize {
        if !self.ready || message.len() < HANDSHAKE_BYTES {
            return 0;
        }
        match self.tunn.encapsulate(&[], message) {
            TunnResult::WriteToNetwork(datagram) => datagram.len(),
            _ => 0,
        }
    }

    /// Advances the protocol timers. Call it a few times per second while there is a session or a
    /// handshake.
    pub fn tick(&mut self, message: &mut [u8]) -> Tick {
        if message.len() < HANDSHAKE_BYTES {
            return Tick::Quiet;
        }
        let tick = match self.tunn.update_timers(message) {
            TunnResult::WriteToNetwork(datagram) if datagram.first() == Some(&1) => {
                Tick::Initiation(datagram.len())
            }
            TunnResult::WriteToNetwork(datagram) => Tick::Keepalive(datagram.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => Tick::Expired,
            _ => Tick::Quiet,
        };
        self.refresh_ready();
        tick
    }

    /// Updates boringtun's clock and discards the message that its timers produce. Without this,
    /// boringtun would date a new session to the start of a long silence and end it at once.
    pub fn refresh(&mut self) {
        let mut unsent = [0; HANDSHAKE_BYTES];
        self.tunn.update_timers(&mut unsent);
        self.refresh_ready();
    }

    fn refresh_ready(&mut self) {
        self.ready = self.tunn.time_since_last_handshake().is_some();
    }
}

fn reason(error: &WireGuardError) -> Refusal {
    match error {
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => Refusal::Replayed,
        WireGuardError::WrongIndex | WireGuardError::NoCurrentSession => Refusal::NoSession,
        WireGuardError::InvalidMac => Refusal::WrongMac,
        WireGuardError::UnderLoad => Refusal::UnderLoad,
        WireGuardError::WrongTai64nTimestamp => Refusal::StaleHandshake,
        WireGuardError::InvalidAeadTag => Refusal::NotAuthentic,
        WireGuardError::UnexpectedPacket | WireGuardError::WrongKey => Refusal::InvalidHandshake,
        _ => Refusal::Malformed,
    }
}
