//! The engine on boringtun: handshakes and sessions with one peer, one packet at a time.
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
//! - boringtun's clock advances only in `update_timers`, so [`SingleSession::refresh`] is called before
//!   everything that depends on time.
//! - boringtun panics when a buffer is too small, so every buffer is checked here first.
//! - boringtun's persistent keepalive and its packet queue are not used.
//!
//! On an established session nothing here reads the clock per packet, allocates or takes a lock,
//! except for the two uncontended locks of boringtun's replay window.

use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};
use towline_types::id::{PresharedKey, WireguardKey};

use crate::message::word;
use crate::{
    Answered, Buffers, DATA_HEADER, DATA_OVERHEAD, HANDSHAKE_BYTES, Message, MessageKind, Opened,
    Refusal, Sealed, Secrets, Segments, Sink, Tick,
};

/// Reject-After-Messages (whitepaper section 6.1): a data message with this or a larger counter is
/// refused.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// Reject-After-Time: age at which boringtun's timers remove a session.
const REJECT_AFTER: Duration = Duration::from_secs(180);

/// State of a tunnel with one peer.
pub(crate) struct SingleSession {
    tunn: Tunn,
    /// Time until which there is a session to seal with. `None` if there is none. Updated after every
    /// call of boringtun that may change it. boringtun itself seals with a session of any age until
    /// its timers are advanced.
    ready_until: Option<Instant>,
}

impl SingleSession {
    /// Creates the state without a session. `index` is the 24-bit tunnel index.
    pub(crate) fn new(
        secrets: &Secrets,
        peer: WireguardKey,
        psk: Option<&PresharedKey>,
        index: u32,
    ) -> Self {
        Self { tunn: secrets.tunn(peer, psk, index), ready_until: None }
    }

    /// Returns whether there is a session to seal with.
    #[inline]
    pub(crate) fn is_ready(&self, now: Instant) -> bool {
        self.ready_until.is_some_and(|until| now < until)
    }

    /// Seals segments into `sink` until none is left or the sink is full. Call only when
    /// [`SingleSession::is_ready`].
    #[inline]
    pub(crate) fn seal(&mut self, segments: &mut impl Segments, sink: &mut impl Sink) -> Sealed {
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

    /// Opens data messages, each to the same position of the plain buffer.
    #[inline]
    pub(crate) fn open(
        &mut self,
        now: Instant,
        messages: impl Iterator<Item = Message>,
        buffers: Buffers<'_>,
        mut each: impl FnMut(Message, Opened),
    ) {
        for message in messages {
            let range = message.start..message.start + message.len;
            let sealed = buffers.sealed.get(range.clone()).unwrap_or_default();
            let space = buffers.plain.get_mut(range).unwrap_or_default();
            each(message, self.open_one(message.start, sealed, space));
        }
        if !self.is_ready(now) {
            self.refresh_ready(now);
        }
    }

    fn open_one(&mut self, start: usize, message: &[u8], space: &mut [u8]) -> Opened {
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
                Opened::Packet { start: start + DATA_HEADER, len: packet.len() }
            }
            TunnResult::Done => Opened::Keepalive,
            TunnResult::Err(WireGuardError::InvalidPacket) => Opened::Refused(Refusal::NoPacket),
            TunnResult::Err(error) => Opened::Refused(Refusal::from(&error)),
            TunnResult::WriteToNetwork(_) => Opened::Refused(Refusal::Malformed),
        }
    }

    /// Handles a handshake message and writes the answer to `reply`.
    pub(crate) fn handshake(&mut self, now: Instant, message: &[u8], reply: &mut [u8]) -> Answered {
        if reply.len() < HANDSHAKE_BYTES {
            return Answered::Refused(Refusal::InvalidHandshake);
        }
        // boringtun takes an empty message for a request to send what is queued.
        if MessageKind::of(message).is_none() {
            return Answered::Refused(Refusal::Malformed);
        }
        self.refresh(now);
        let answered = match self.tunn.decapsulate(None, message, reply) {
            TunnResult::WriteToNetwork(answer) => {
                match (MessageKind::of(answer), word(answer, 4)) {
                    // The second word is the index that this node chose.
                    (Some(MessageKind::Response { .. }), Some(receiver)) => {
                        Answered::Response { len: answer.len(), receiver }
                    }
                    (Some(MessageKind::Data { .. }), _) => {
                        Answered::Established { len: answer.len() }
                    }
                    _ => Answered::Refused(Refusal::InvalidHandshake),
                }
            }
            TunnResult::Done => Answered::Cookie,
            TunnResult::Err(error) => Answered::Refused(match Refusal::from(&error) {
                Refusal::NotAuthentic => Refusal::InvalidHandshake,
                other => other,
            }),
            _ => Answered::Refused(Refusal::InvalidHandshake),
        };
        self.refresh_ready(now);
        answered
    }

    /// Starts a handshake, even when one is under way (a response to the earlier initiation is
    /// still accepted). Returns the length of the initiation in `message`, or 0 if it could not be
    /// made.
    pub(crate) fn initiate(&mut self, now: Instant, message: &mut [u8]) -> usize {
        if message.len() < HANDSHAKE_BYTES {
            return 0;
        }
        self.refresh(now);
        match self.tunn.format_handshake_initiation(message, true) {
            TunnResult::WriteToNetwork(initiation) => initiation.len(),
            _ => 0,
        }
    }

    /// Seals an empty payload. Returns the length of the datagram in `message`, or 0 without a
    /// session.
    pub(crate) fn keepalive(&mut self, now: Instant, message: &mut [u8]) -> usize {
        if !self.is_ready(now) || message.len() < HANDSHAKE_BYTES {
            return 0;
        }
        match self.tunn.encapsulate(&[], message) {
            TunnResult::WriteToNetwork(datagram) => datagram.len(),
            _ => 0,
        }
    }

    /// Advances the protocol timers. Call it a few times per second while there is a session or a
    /// handshake.
    pub(crate) fn tick(&mut self, now: Instant, message: &mut [u8]) -> Tick {
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
        self.refresh_ready(now);
        tick
    }

    /// Updates boringtun's clock and discards the message that its timers produce. Without this,
    /// boringtun would date a new session to the start of a long silence and end it at once.
    fn refresh(&mut self, now: Instant) {
        let mut unsent = [0; HANDSHAKE_BYTES];
        self.tunn.update_timers(&mut unsent);
        self.refresh_ready(now);
    }

    fn refresh_ready(&mut self, now: Instant) {
        let age = self.tunn.time_since_last_handshake();
        let left = age.and_then(|age| REJECT_AFTER.checked_sub(age));
        self.ready_until = left.map(|left| now + left);
    }
}
