//! The WireGuard protocol engine: seals and opens. The only file that names boringtun.
//!
//! It works on batches ([`Session::seal`], [`Session::open`]), so that another engine can stand
//! here. Everything that boringtun 0.7.1 leaves undone or does wrong, and that can be met from
//! outside, is met here and in [`super::peer`]:
//!
//! - payloads come padded to 16 bytes (whitepaper section 5.4.6) from [`Segments`];
//! - a counter past Reject-After-Messages is refused before boringtun sees it: near 2^64 its
//!   replay window would overflow;
//! - its limiter of handshakes is one global counter, counts responses too and forgets the port:
//!   [`Secrets::admit`] judges initiations alone, with a cookie that knows address and port, and
//!   the tunnels themselves get a limiter that never says no;
//! - its clock stands still between two calls of `update_timers`: [`Session::refresh`] comes
//!   before whatever depends on time;
//! - buffers that are too small make it panic: every buffer here is checked first;
//! - its persistent keepalive and its packet queue are not used.
//!
//! Nothing here reads the clock per packet, allocates or locks once a session stands (the two
//! uncontended locks of boringtun's replay window aside).

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use towline_core::path::Path;
use towline_core::peer_table::PresharedKey;
use towline_types::id::WireguardKey;
use x25519_dalek::{PublicKey, StaticSecret};

use super::arena::{Datagrams, SendBatch};
use super::drops::{DropReason, Drops};

/// Bytes that WireGuard puts before a payload: type, receiver, counter.
pub const DATA_HEADER: usize = 16;
/// Bytes that WireGuard puts around a payload.
pub const DATA_OVERHEAD: usize = 32;
/// Bytes of the longest handshake message. No buffer for a message may be smaller.
pub const HANDSHAKE_BYTES: usize = 148;
/// Payloads are padded to a multiple of this.
pub const PADDING: usize = 16;

/// Initiations per second from which on initiators have to prove their address by a cookie.
/// Each one costs about a quarter of a millisecond.
const INITIATIONS_PER_SECOND: u64 = 256;
/// Reject-After-Messages, whitepaper section 6.1.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// What a WireGuard message is, by type and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// Type 1.
    Initiation,
    /// Type 2.
    Response {
        /// Names the tunnel that asked.
        receiver: u32,
    },
    /// Type 3.
    CookieReply {
        /// Names the tunnel that asked.
        receiver: u32,
    },
    /// Type 4.
    Data {
        /// Names the session.
        receiver: u32,
    },
}

impl MessageKind {
    /// Looks at type, reserved bytes and length; `None`: no WireGuard message.
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

/// Plaintext to be sealed, one segment after another.
pub trait Segments {
    /// Bytes of the next segment, with its padding; `None`: there is none.
    fn next_len(&self) -> Option<usize>;
    /// The next segment, with its padding; empty if there is none.
    fn take(&mut self) -> &[u8];
}

/// The node's own key, and who may knock.
pub struct Secrets {
    private: StaticSecret,
    public: PublicKey,
    /// Judges initiations, for all peers together.
    gate: RateLimiter,
    /// Judges those from addresses that too many come from: always under load.
    strict_gate: RateLimiter,
    /// What the tunnels get: never under load.
    open_gate: Arc<RateLimiter>,
    /// Folds address and port into what boringtun takes for an address.
    cookie_keys: [RandomState; 2],
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secrets").field("public", &self.public_key()).finish_non_exhaustive()
    }
}

/// What becomes of an initiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It may go on.
    Admitted,
    /// It has to prove where it is: so many bytes of a cookie reply go back.
    Cookie(usize),
    /// Dropped.
    Refused(DropReason),
}

impl Secrets {
    /// From the node's private key.
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

    /// The node's public key.
    pub fn public_key(&self) -> WireguardKey {
        WireguardKey(self.public.to_bytes())
    }

    /// Looks at an initiation: is it for us, and is there time for it? Where it has to be `proven`
    /// it needs a cookie, under load or not: then its sender is where it seems to be.
    pub fn admit(
        &self,
        from: SocketAddr,
        initiation: &[u8],
        proven: bool,
        reply: &mut [u8],
    ) -> Admission {
        if reply.len() < HANDSHAKE_BYTES {
            return Admission::Refused(DropReason::InvalidHandshake);
        }
        let gate = if proven { &self.strict_gate } else { &self.gate };
        gate.reset_count();
        match gate.verify_packet(Some(self.cookie_address(from)), initiation, reply) {
            Ok(Packet::HandshakeInit(_)) => Admission::Admitted,
            Ok(_) => Admission::Refused(DropReason::Malformed),
            Err(TunnResult::WriteToNetwork(cookie)) => Admission::Cookie(cookie.len()),
            Err(TunnResult::Err(error)) => Admission::Refused(reason(&error)),
            Err(_) => Admission::Refused(DropReason::InvalidHandshake),
        }
    }

    /// The key that an admitted initiation claims to be from; `None`: it does not decrypt. Not
    /// proven yet. The costly part.
    pub fn claims(&self, initiation: &[u8]) -> Option<WireguardKey> {
        let Ok(Packet::HandshakeInit(message)) = Tunn::parse_incoming_packet(initiation) else {
            return None;
        };
        let half = parse_handshake_anon(&self.private, &self.public, &message).ok()?;
        Some(WireguardKey(half.peer_static_public))
    }

    /// boringtun's cookie covers an address alone. Behind one NAT there are many nodes, so ours
    /// covers the port too: both are hashed into what looks like an address.
    fn cookie_address(&self, from: SocketAddr) -> IpAddr {
        let [high, low] = &self.cookie_keys;
        let half = |key: &RandomState| u128::from(key.hash_one((from.ip(), from.port())));
        Ipv6Addr::from(half(high) << 64 | half(low)).into()
    }
}

/// A tunnel with one peer: its handshake and its sessions.
pub struct Session {
    tunn: Tunn,
    /// There is a session to seal with.
    ready: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("ready", &self.ready).finish_non_exhaustive()
    }
}

/// How one datagram was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// A packet, at this place of the plain buffer; truncated to the length its header claims.
    Packet {
        /// First byte.
        start: usize,
        /// Bytes.
        len: usize,
    },
    /// Authentic and empty.
    Keepalive,
    /// Dropped.
    Refused(DropReason),
}

/// How a handshake message was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// An authentic initiation: so many bytes of response go back. The new session is used when
    /// the first datagram for `receiver` arrives, which confirms it.
    Response {
        /// Bytes.
        len: usize,
        /// The new session's receiver index.
        receiver: u32,
    },
    /// Our initiation was answered: there is a session, and so many bytes of keepalive confirm
    /// it.
    Established {
        /// Bytes.
        len: usize,
    },
    /// A cookie for our next initiation.
    Cookie,
    /// Dropped.
    Refused(DropReason),
}

/// What time has brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tick {
    /// Nothing.
    Quiet,
    /// So many bytes of an initiation are to be sent.
    Initiation(usize),
    /// So many bytes of a keepalive are to be sent.
    Keepalive(usize),
    /// Given up: nothing happens any more until an initiation.
    Expired,
}

impl Session {
    /// Without a session yet. `index` names the tunnel: 24 bits.
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

    /// There is a session to seal with.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Seals segment after segment as datagrams for `to`, until there are no more or `out` is
    /// full. A segment that cannot be sealed is counted. Returns how many bytes were written. Call
    /// only when [`Session::is_ready`].
    pub fn seal(
        &mut self,
        segments: &mut impl Segments,
        to: Path,
        out: &mut SendBatch,
        drops: &Drops,
    ) -> usize {
        let mut bytes = 0;
        while let Some(len) = segments.next_len() {
            let need = (len + DATA_OVERHEAD).max(HANDSHAKE_BYTES);
            let Some(spare) = out.place(&to, need) else { break };
            let segment = segments.take();
            // Without a session boringtun would start a handshake here, which is no datagram of
            // this segment.
            if let TunnResult::WriteToNetwork(datagram) = self.tunn.encapsulate(segment, spare)
                && datagram.first() == Some(&4)
            {
                let len = datagram.len();
                out.commit(to, len);
                bytes += len;
            } else {
                drops.count(DropReason::NoSession);
            }
        }
        bytes
    }

    /// Opens data messages, the first `skip` bytes of each of which are a relay's, into the same
    /// places of `plain`, which is as long. Calls `each` once for every datagram, with its bytes.
    pub fn open(
        &mut self,
        datagrams: Datagrams<'_>,
        skip: usize,
        plain: &mut [u8],
        mut each: impl FnMut(usize, Opened),
    ) {
        let size = datagrams.segment_size().get();
        let mut places = plain.chunks_mut(size);
        for (number, datagram) in datagrams.iter().enumerate() {
            let plain = places.next().and_then(|plain| plain.get_mut(skip..));
            let (Some(message), Some(plain)) = (datagram.get(skip..), plain) else {
                each(datagram.len(), Opened::Refused(DropReason::Malformed));
                continue;
            };
            let opened = match self.open_one(message, plain) {
                Opened::Packet { start, len } => {
                    Opened::Packet { start: start + skip + number * size, len }
                }
                other => other,
            };
            each(datagram.len(), opened);
        }
        if !self.ready {
            self.look();
        }
    }

    fn open_one(&mut self, datagram: &[u8], plain: &mut [u8]) -> Opened {
        let Some(counter) = datagram.get(8..16).and_then(|bytes| bytes.first_chunk()) else {
            return Opened::Refused(DropReason::Malformed);
        };
        if u64::from_le_bytes(*counter) >= REJECT_AFTER_MESSAGES {
            return Opened::Refused(DropReason::CounterExhausted);
        }
        let Some(plain) = plain.get_mut(DATA_HEADER..datagram.len()) else {
            return Opened::Refused(DropReason::Malformed);
        };
        match self.tunn.decapsulate(None, datagram, plain) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Opened::Packet { start: DATA_HEADER, len: packet.len() }
            }
            TunnResult::Done => Opened::Keepalive,
            TunnResult::Err(WireGuardError::InvalidPacket) => {
                Opened::Refused(DropReason::OpenedMalformed)
            }
            TunnResult::Err(error) => Opened::Refused(reason(&error)),
            TunnResult::WriteToNetwork(_) => Opened::Refused(DropReason::Malformed),
        }
    }

    /// Takes a handshake message; the answer goes to `reply`.
    pub fn handshake(&mut self, message: &[u8], reply: &mut [u8]) -> Answered {
        if reply.len() < HANDSHAKE_BYTES {
            return Answered::Refused(DropReason::InvalidHandshake);
        }
        self.refresh();
        let answered = match self.tunn.decapsulate(None, message, reply) {
            TunnResult::WriteToNetwork(answer) => match MessageKind::of(answer) {
                Some(MessageKind::Response { .. }) => Answered::Response {
                    len: answer.len(),
                    receiver: u32::from_le_bytes([answer[4], answer[5], answer[6], answer[7]]),
                },
                Some(MessageKind::Data { .. }) => Answered::Established { len: answer.len() },
                _ => Answered::Refused(DropReason::InvalidHandshake),
            },
            TunnResult::Done => Answered::Cookie,
            TunnResult::Err(error) => Answered::Refused(match reason(&error) {
                DropReason::NotAuthentic => DropReason::InvalidHandshake,
                other => other,
            }),
            _ => Answered::Refused(DropReason::InvalidHandshake),
        };
        self.look();
        answered
    }

    /// Starts a handshake, also when one is under way (the answer to the one before is still
    /// taken). Returns the bytes of the initiation in `message`; 0 if it could not be made.
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

    /// Seals an empty payload. Returns its bytes in `message`; 0 without a session.
    pub fn keepalive(&mut self, message: &mut [u8]) -> usize {
        if !self.ready || message.len() < HANDSHAKE_BYTES {
            return 0;
        }
        match self.tunn.encapsulate(&[], message) {
            TunnResult::WriteToNetwork(datagram) => datagram.len(),
            _ => 0,
        }
    }

    /// Lets time pass. Call it a few times per second while there is a session or a handshake.
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
        self.look();
        tick
    }

    /// Tells boringtun what time it is, and keeps it from acting on it. After a long silence its
    /// clock would put a new session into the past, and end it at once.
    pub fn refresh(&mut self) {
        let mut unsent = [0; HANDSHAKE_BYTES];
        self.tunn.update_timers(&mut unsent);
        self.look();
    }

    fn look(&mut self) {
        self.ready = self.tunn.time_since_last_handshake().is_some();
    }
}

fn reason(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => DropReason::Replayed,
        WireGuardError::WrongIndex | WireGuardError::NoCurrentSession => DropReason::NoSession,
        WireGuardError::InvalidMac => DropReason::WrongMac,
        WireGuardError::UnderLoad => DropReason::UnderLoad,
        WireGuardError::WrongTai64nTimestamp => DropReason::StaleHandshake,
        WireGuardError::InvalidAeadTag => DropReason::NotAuthentic,
        WireGuardError::UnexpectedPacket | WireGuardError::WrongKey => DropReason::InvalidHandshake,
        _ => DropReason::Malformed,
    }
}
