//! The seam: WireGuard state of a tunnel with one peer, on the engine of the node.
//!
//! Each call is one of a batch or of a handshake message, so the choice between the engines costs
//! nothing per packet.

use std::time::Instant;

use towline_types::id::{PresharedKey, WireguardKey};

use crate::batch::session::BatchSession;
use crate::batch::timestamp::InitiationHistory;
use crate::engine::Kind;
use crate::single::SingleSession;
use crate::{Answered, Buffers, Inputs, Message, Opened, Sealed, Secrets, Segments, Sink, Tick};

/// WireGuard state of a tunnel with one peer: its handshake and its sessions.
pub struct Session(Inner);

enum Inner {
    Single(Box<SingleSession>),
    Batch(Box<BatchSession>),
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("in_place", &self.opens_in_place()).finish_non_exhaustive()
    }
}

impl Session {
    /// Creates the state without a session, on the engine of `secrets`. `index` is the 24-bit tunnel
    /// index.
    pub fn new(
        secrets: &Secrets,
        peer: WireguardKey,
        psk: Option<&PresharedKey>,
        index: u32,
    ) -> Self {
        Self(match secrets.engine().kind() {
            Kind::Boringtun => {
                Inner::Single(Box::new(SingleSession::new(secrets, peer, psk, index)))
            }
            Kind::Batch(backend) => {
                Inner::Batch(Box::new(BatchSession::new(secrets, peer, psk, index, backend)))
            }
        })
    }

    /// Returns the timestamps of the last initiations, for a state that replaces this one. `None` if
    /// the engine does not reveal them (boringtun).
    pub fn history(&self) -> Option<&InitiationHistory> {
        match &self.0 {
            Inner::Single(_) => None,
            Inner::Batch(session) => Some(session.history()),
        }
    }

    /// Continues after the initiations of an earlier state with the same peer. boringtun starts
    /// without any.
    pub fn follow(&mut self, history: &InitiationHistory) {
        match &mut self.0 {
            Inner::Single(_) => {}
            Inner::Batch(session) => session.follow(history),
        }
    }

    /// Returns whether there is a session to seal with. One that is too old does not count, also if
    /// [`Session::tick`] was not called since.
    #[inline]
    pub fn is_ready(&self, now: Instant) -> bool {
        match &self.0 {
            Inner::Single(session) => session.is_ready(now),
            Inner::Batch(session) => session.is_ready(now),
        }
    }

    /// Returns whether [`Session::open`] leaves packets in the buffer of their messages, as
    /// [`crate::Engine::opens_in_place`] says.
    #[inline]
    pub fn opens_in_place(&self) -> bool {
        matches!(self.0, Inner::Batch(_))
    }

    /// Writes segments as data messages into `sink` until none is left or the sink is full. They are
    /// sealed at once, or noted in [`Sink::unsealed`]. Call only when [`Session::is_ready`].
    #[inline]
    pub fn seal(
        &mut self,
        now: Instant,
        segments: &mut impl Segments,
        sink: &mut impl Sink,
    ) -> Sealed {
        match &mut self.0 {
            Inner::Single(session) => session.seal(segments, sink),
            Inner::Batch(session) => session.seal(now, segments, sink),
        }
    }

    /// Opens data messages, which are in the order of their positions and all have the receiver
    /// index of the first. Calls `each` once for every message, in order.
    #[inline]
    pub fn open(
        &mut self,
        now: Instant,
        messages: impl Iterator<Item = Message> + Clone,
        buffers: Buffers<'_>,
        each: impl FnMut(Message, Opened),
    ) {
        match &mut self.0 {
            Inner::Single(session) => session.open(now, messages, buffers, each),
            Inner::Batch(session) => session.open(now, messages, buffers, each),
        }
    }

    /// Handles a handshake message and writes the answer to `reply`.
    pub fn handshake(
        &mut self,
        inputs: &mut Inputs<'_>,
        message: &[u8],
        reply: &mut [u8],
    ) -> Answered {
        match &mut self.0 {
            Inner::Single(session) => session.handshake(inputs.now, message, reply),
            Inner::Batch(session) => session.handshake(inputs, message, reply),
        }
    }

    /// Starts a handshake, even when one is under way (a response to the earlier initiation is
    /// still accepted). Returns the length of the initiation in `message`, or 0 if it could not be
    /// made.
    pub fn initiate(&mut self, inputs: &mut Inputs<'_>, message: &mut [u8]) -> usize {
        match &mut self.0 {
            Inner::Single(session) => session.initiate(inputs.now, message),
            Inner::Batch(session) => session.initiate(inputs, message),
        }
    }

    /// Seals an empty payload. Returns the length of the datagram in `message`, or 0 without a
    /// session.
    pub fn keepalive(&mut self, now: Instant, message: &mut [u8]) -> usize {
        match &mut self.0 {
            Inner::Single(session) => session.keepalive(now, message),
            Inner::Batch(session) => session.keepalive(now, message),
        }
    }

    /// Advances the protocol timers. Call it a few times per second while there is a session or a
    /// handshake. The caller adds the random delay before an initiation is repeated: it does not
    /// call this meanwhile.
    pub fn tick(&mut self, inputs: &mut Inputs<'_>, message: &mut [u8]) -> Tick {
        match &mut self.0 {
            Inner::Single(session) => session.tick(inputs.now, message),
            Inner::Batch(session) => session.tick(inputs, message),
        }
    }

    /// Returns the batch engine's state.
    #[cfg(test)]
    pub(crate) fn batch(&mut self) -> &mut BatchSession {
        match &mut self.0 {
            Inner::Single(_) => panic!("not the batch engine"),
            Inner::Batch(session) => session,
        }
    }
}
