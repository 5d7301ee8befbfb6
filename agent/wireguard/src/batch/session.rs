//! State of the batch engine for one peer.
//!
//! ```text
//!  initiate ──► Initiation ──response──► current epoch ──2 min──► initiate
//!  initiation of the peer ──► next epoch ──first data message──► current epoch
//! ```
//!
//! Decides when a message is due ([`BatchSession::tick`]) and which messages are accepted. Where
//! messages go, when a first handshake starts, and the random delay before an initiation is repeated
//! are the caller's.

use std::time::Instant;

use towline_aead::{Backend, Packet};
use towline_types::id::{PresharedKey, WireguardKey};
use x25519_dalek::{PublicKey, StaticSecret};

use super::macs::Cookies;
use super::noise::{self, INITIATION_BYTES, Initiated, Pair, RESPONSE_BYTES};
use super::timers::{REKEY_AFTER, REKEY_ATTEMPT, REKEY_ON_RECEIVE, REKEY_TIMEOUT, Timers, is_over};
use super::timestamp::InitiationHistory;
use super::transport::{Epoch, Epochs};
use crate::message::word;
use crate::{
    Answered, Buffers, DATA_HEADER, DATA_OVERHEAD, HANDSHAKE_BYTES, Inputs, Message, MessageKind,
    Opened, Refusal, Sealed, Secrets, Segments, Sink, Tick,
};

/// Number of initiations that a response is accepted for. On a slow path the response to one
/// arrives after the next was sent.
const INITIATIONS: usize = 2;
/// Length of a keepalive in bytes.
const KEEPALIVE_BYTES: usize = DATA_OVERHEAD;

/// State of a tunnel with one peer.
pub(crate) struct BatchSession {
    /// Keys of both ends. `None` if the peer's key cannot be used, so that no handshake completes.
    pair: Option<Pair>,
    backend: Backend,
    cookies: Cookies,
    history: InitiationHistory,
    /// 24-bit tunnel index: the upper bits of the index of each session.
    tunnel_index: u32,
    /// Lower bits of the last index that was used.
    last_index: u8,
    /// Initiations of this node that may still be answered, the newest first.
    initiations: [Option<Initiation>; INITIATIONS],
    /// Handshake that this node repeats until it is answered. `None` if there is none.
    attempt: Option<Attempt>,
    epochs: Epochs,
    timers: Timers,
}

/// Initiation of this node, and its index.
struct Initiation {
    index: u32,
    initiated: Initiated,
    sent: Instant,
}

/// Handshake that this node started and that is not answered yet.
struct Attempt {
    /// Time of the first initiation.
    started: Instant,
    /// Time of the last initiation.
    sent: Instant,
    /// True once an authentic data message of the peer arrived since the first initiation: the peer
    /// is there, and has a session.
    has_received: bool,
}

impl BatchSession {
    /// Creates the state without a session. `index` is the 24-bit tunnel index.
    pub(crate) fn new(
        secrets: &Secrets,
        peer: WireguardKey,
        psk: Option<&PresharedKey>,
        index: u32,
        backend: Backend,
    ) -> Self {
        let (private, peer) = (secrets.private().clone(), PublicKey::from(peer.0));
        Self {
            cookies: Cookies::new(&peer),
            pair: Pair::new(private, peer, psk.map_or([0; 32], |psk| psk.0)).ok(),
            backend,
            history: InitiationHistory::default(),
            tunnel_index: index << 8,
            last_index: 0,
            initiations: [None, None],
            attempt: None,
            epochs: Epochs::default(),
            timers: Timers::default(),
        }
    }

    /// Returns the timestamps of the last initiations.
    pub(crate) fn history(&self) -> &InitiationHistory {
        &self.history
    }

    /// Continues after the initiations of an earlier state with the same peer.
    pub(crate) fn follow(&mut self, history: &InitiationHistory) {
        self.history = history.clone();
    }

    /// Returns whether there is a session to seal with.
    #[inline]
    pub(crate) fn is_ready(&self, now: Instant) -> bool {
        let current = self.epochs.current();
        current.is_some_and(|epoch| !epoch.is_exhausted() && !epoch.is_expired(now))
    }

    /// Writes segments into `sink` until none is left or the sink is full, and notes them as
    /// unsealed.
    #[inline]
    pub(crate) fn seal(
        &mut self,
        now: Instant,
        segments: &mut impl Segments,
        sink: &mut impl Sink,
    ) -> Sealed {
        let mut sealed = Sealed::default();
        let mut epoch = self.epochs.current_mut().filter(|epoch| !epoch.is_expired(now));
        let mut has_data = false;
        while let Some(len) = segments.next_len() {
            let Some(space) = sink.place(len + DATA_OVERHEAD) else { break };
            let space = space.get_mut(..DATA_HEADER + len);
            let parts = space.and_then(|space| space.split_first_chunk_mut::<DATA_HEADER>());
            let Some((header, payload)) = parts else {
                segments.take();
                sealed.lost += 1;
                continue;
            };
            let expected = len;
            let len = segments.write(payload);
            if len == 0 && expected > 0 {
                // The segment was longer than it said. An empty message would be a keepalive.
                sealed.lost += 1;
                continue;
            }
            let written = epoch.as_mut().and_then(|epoch| {
                let counter = epoch.take_counter()?;
                *header = data_header(epoch.remote, counter);
                Some((epoch.sending(), counter))
            });
            let Some((key, counter)) = written else {
                sealed.lost += 1;
                continue;
            };
            let (start, unsealed) = sink.unsealed();
            unsealed.push(key, Packet { start: start + DATA_HEADER, len, counter });
            sink.commit(len + DATA_OVERHEAD);
            sealed.bytes += len + DATA_OVERHEAD;
            has_data |= len > 0;
        }
        if has_data && let Some(epoch) = epoch {
            epoch.has_sent_data = true;
            self.timers.sent_data(now);
        }
        sealed
    }

    /// Opens data messages in place.
    pub(crate) fn open(
        &mut self,
        now: Instant,
        messages: impl Iterator<Item = Message> + Clone,
        buffers: Buffers<'_>,
        mut each: impl FnMut(Message, Opened),
    ) {
        let Buffers { sealed: arena, scratch, .. } = buffers;
        let first = messages.clone().next();
        let Some(receiver) = first.and_then(|first| word(arena, first.start + 4)) else {
            messages.for_each(|message| each(message, Opened::Refused(Refusal::Malformed)));
            return;
        };
        let epoch = self.epochs.receiving(receiver).filter(|epoch| !epoch.is_expired(now));
        let Some(epoch) = epoch else {
            messages.for_each(|message| each(message, Opened::Refused(Refusal::NoSession)));
            return;
        };
        scratch.packets.clear();
        scratch.refusals.clear();
        for message in messages.clone() {
            let packet = read_data(arena, message, receiver).and_then(|packet| {
                epoch.judge(packet.counter)?;
                Ok(packet)
            });
            scratch.packets.extend(packet.ok());
            scratch.refusals.push(packet.err());
        }
        let opened = epoch.receiving().open(arena, &scratch.packets, &mut scratch.authentic);
        if opened.is_err() {
            // The caller's positions are wrong. Nothing was decrypted.
            messages.for_each(|message| each(message, Opened::Refused(Refusal::Malformed)));
            return;
        }
        let (mut is_authentic, mut has_data) = (false, false);
        let mut decided = scratch.packets.iter().zip(&scratch.authentic);
        for (message, refusal) in messages.zip(&scratch.refusals) {
            let result = match refusal {
                Some(refusal) => Err(*refusal),
                None => match decided.next() {
                    Some((packet, true)) => epoch.accept(packet.counter).map(|()| packet),
                    Some((_, false)) | None => Err(Refusal::NotAuthentic),
                },
            };
            let opened = match result {
                Ok(packet) => {
                    is_authentic = true;
                    inner(arena, packet)
                }
                Err(refusal) => Opened::Refused(refusal),
            };
            has_data |= matches!(opened, Opened::Packet { .. });
            each(message, opened);
        }
        if !is_authentic {
            return;
        }
        epoch.has_received_data |= has_data;
        if let Some(attempt) = &mut self.attempt {
            attempt.has_received = true;
        }
        if has_data {
            self.timers.received_data(now);
        } else {
            self.timers.received();
        }
        if self.epochs.confirm(receiver) {
            self.attempt = None;
        }
    }

    /// Handles a handshake message and writes the answer to `reply`.
    pub(crate) fn handshake(
        &mut self,
        inputs: &mut Inputs<'_>,
        message: &[u8],
        reply: &mut [u8],
    ) -> Answered {
        let Some(reply) = reply.first_chunk_mut::<HANDSHAKE_BYTES>() else {
            return Answered::Refused(Refusal::InvalidHandshake);
        };
        let answered = match MessageKind::of(message) {
            Some(MessageKind::Initiation) => self.respond(inputs, message, reply),
            Some(MessageKind::Response { receiver }) => {
                self.establish(inputs.now, receiver, message, reply)
            }
            Some(MessageKind::CookieReply { .. }) => {
                let received = self.cookies.receive(message, inputs.now);
                received.map(|()| Answered::Cookie).map_err(Refusal::from)
            }
            Some(MessageKind::Data { .. }) => Err(Refusal::InvalidHandshake),
            None => Err(Refusal::Malformed),
        };
        answered.unwrap_or_else(Answered::Refused)
    }

    /// Answers an initiation of the peer.
    fn respond(
        &mut self,
        inputs: &mut Inputs<'_>,
        message: &[u8],
        reply: &mut [u8; HANDSHAKE_BYTES],
    ) -> Result<Answered, Refusal> {
        let index = self.free_index();
        let pair = self.pair.as_ref().ok_or(Refusal::InvalidHandshake)?;
        let received = noise::receive(pair, message)?;
        let (remote, timestamp) = (received.remote, received.timestamp);
        if timestamp <= self.history.newest {
            return Err(Refusal::StaleHandshake);
        }
        let ephemeral = random_key(inputs).ok_or(Refusal::InvalidHandshake)?;
        let (keys, mut response) = noise::respond(pair, received, &ephemeral, index)?;
        self.history.newest = timestamp;
        self.last_index = index as u8;
        self.cookies.complete(index, &mut response, inputs.now);
        self.epochs.prepare(Epoch::new(&keys, self.backend, [index, remote], false, inputs.now));
        self.timers.received();
        self.timers.sent();
        reply[..RESPONSE_BYTES].copy_from_slice(&response);
        Ok(Answered::Response { len: RESPONSE_BYTES, receiver: index })
    }

    /// Completes a handshake of this node with the response to the initiation with index `local`.
    fn establish(
        &mut self,
        now: Instant,
        local: u32,
        message: &[u8],
        reply: &mut [u8; HANDSHAKE_BYTES],
    ) -> Result<Answered, Refusal> {
        let pair = self.pair.as_ref().ok_or(Refusal::InvalidHandshake)?;
        let mut waiting = self.initiations.iter().enumerate();
        let (place, keys) = waiting
            .find_map(|(place, initiation)| {
                let initiation = initiation.as_ref().filter(|waiting| {
                    waiting.index == local && !is_over(waiting.sent, REKEY_ATTEMPT, now)
                })?;
                Some((place, noise::finish(pair, &initiation.initiated, message)))
            })
            .ok_or(Refusal::InvalidHandshake)?;
        let (keys, remote) = keys?;
        // The peer has replaced the sessions of earlier initiations, so their responses are of no
        // use if they arrive late.
        self.initiations.iter_mut().skip(place).for_each(|initiation| *initiation = None);
        self.attempt = None;
        self.timers.received();
        self.epochs.establish(Epoch::new(&keys, self.backend, [local, remote], true, now));
        let len = self.keepalive(now, reply);
        Ok(Answered::Established { len })
    }

    /// Starts a handshake, or repeats it. Returns the length of the initiation in `message`, or 0 if
    /// it could not be made.
    pub(crate) fn initiate(&mut self, inputs: &mut Inputs<'_>, message: &mut [u8]) -> usize {
        let index = self.free_index();
        let Some(space) = message.get_mut(..HANDSHAKE_BYTES) else { return 0 };
        let (Some(pair), Some(ephemeral)) = (&self.pair, random_key(inputs)) else { return 0 };
        let timestamp = self.history.own.next(inputs.unix_time);
        let Ok((initiated, mut initiation)) = noise::initiate(pair, ephemeral, index, timestamp)
        else {
            return 0;
        };
        let now = inputs.now;
        self.last_index = index as u8;
        self.cookies.complete(index, &mut initiation, now);
        space.copy_from_slice(&initiation);
        self.initiations.rotate_right(1);
        if let Some(newest) = self.initiations.first_mut() {
            *newest = Some(Initiation { index, initiated, sent: now });
        }
        // An attempt that was not ticked to its end has ended too.
        let attempt = self.attempt.take();
        let attempt = attempt.filter(|attempt| !is_over(attempt.started, REKEY_ATTEMPT, now));
        let new = Attempt { started: now, sent: now, has_received: false };
        self.attempt = Some(Attempt { sent: now, ..attempt.unwrap_or(new) });
        self.timers.sent();
        INITIATION_BYTES
    }

    /// Seals an empty payload. Returns the length of the datagram in `message`, or 0 without a
    /// session.
    pub(crate) fn keepalive(&mut self, now: Instant, message: &mut [u8]) -> usize {
        if message.len() < HANDSHAKE_BYTES {
            return 0;
        }
        let Some(message) = message.get_mut(..KEEPALIVE_BYTES) else { return 0 };
        let epoch = self.epochs.current_mut().filter(|epoch| !epoch.is_expired(now));
        let Some(epoch) = epoch else { return 0 };
        let Some(counter) = epoch.take_counter() else { return 0 };
        let packet = Packet { start: DATA_HEADER, len: 0, counter };
        let Some(header) = message.first_chunk_mut::<DATA_HEADER>() else { return 0 };
        *header = data_header(epoch.remote, counter);
        if epoch.sending().seal(message, &[packet]).is_err() {
            return 0;
        }
        self.timers.sent();
        KEEPALIVE_BYTES
    }

    /// Advances the timers. Returns the message that is due.
    pub(crate) fn tick(&mut self, inputs: &mut Inputs<'_>, message: &mut [u8]) -> Tick {
        let now = inputs.now;
        if message.len() < HANDSHAKE_BYTES {
            return Tick::Quiet;
        }
        self.epochs.expire(now);
        for initiation in &mut self.initiations {
            initiation.take_if(|initiation| is_over(initiation.sent, REKEY_ATTEMPT, now));
        }
        let is_due = match &self.attempt {
            Some(attempt) if is_over(attempt.started, REKEY_ATTEMPT, now) => {
                let is_alive = attempt.has_received && self.epochs.current().is_some();
                self.give_up();
                if !is_alive {
                    self.forget();
                    return Tick::Expired;
                }
                self.needs_handshake(now)
            }
            Some(attempt) => is_over(attempt.sent, REKEY_TIMEOUT, now),
            None => self.needs_handshake(now),
        };
        if is_due {
            let len = self.initiate(inputs, message);
            if len > 0 {
                return Tick::Initiation(len);
            }
        }
        if self.timers.is_keepalive_due(now) {
            let len = self.keepalive(now, message);
            if len > 0 {
                return Tick::Keepalive(len);
            }
        }
        Tick::Quiet
    }

    /// Returns whether the session must be renewed. Without a session nothing starts by itself.
    fn needs_handshake(&mut self, now: Instant) -> bool {
        let Some(epoch) = self.epochs.current() else { return false };
        let has_age = |age| epoch.is_initiator && is_over(epoch.created, age, now);
        epoch.needs_rekey()
            || (epoch.has_sent_data && has_age(REKEY_AFTER))
            || (epoch.has_received_data && has_age(REKEY_ON_RECEIVE))
            || self.timers.take_silence(now)
    }

    /// Ends the handshake of this node that was not answered. The sessions stay: they end by age.
    fn give_up(&mut self) {
        self.initiations = [None, None];
        self.attempt = None;
    }

    /// Forgets every key of a session. The peer has been silent for so long that it has forgotten
    /// them too, or it never had them.
    fn forget(&mut self) {
        self.epochs.clear();
        self.timers = Timers::default();
    }

    /// Returns an index that no session and no initiation of this tunnel has. There are 256, of
    /// which five are in use at most.
    fn free_index(&self) -> u32 {
        let mut low = self.last_index;
        loop {
            low = low.wrapping_add(1);
            let index = self.tunnel_index | u32::from(low);
            let mut initiations = self.initiations.iter().flatten();
            if !self.epochs.has(index) && !initiations.any(|waiting| waiting.index == index) {
                return index;
            }
        }
    }

    /// Returns the sessions, to test their limits.
    #[cfg(test)]
    pub(crate) fn epochs(&mut self) -> &mut Epochs {
        &mut self.epochs
    }
}

fn random_key(inputs: &mut Inputs<'_>) -> Option<StaticSecret> {
    (inputs.random)().map(StaticSecret::from)
}

/// Returns the header of a data message.
#[inline]
fn data_header(receiver: u32, counter: u64) -> [u8; DATA_HEADER] {
    let mut header = [0; DATA_HEADER];
    header[..4].copy_from_slice(&4u32.to_le_bytes());
    header[4..8].copy_from_slice(&receiver.to_le_bytes());
    header[8..].copy_from_slice(&counter.to_le_bytes());
    header
}

/// Reads the header of a data message for `receiver`. Returns the position of its payload.
#[inline]
fn read_data(arena: &[u8], message: Message, receiver: u32) -> Result<Packet, Refusal> {
    let Message { start, len } = message;
    let len = len.checked_sub(DATA_OVERHEAD).ok_or(Refusal::Malformed)?;
    let header = arena.get(start..).and_then(|bytes| bytes.first_chunk::<DATA_HEADER>());
    let header = header.ok_or(Refusal::Malformed)?;
    if word(header, 4) != Some(receiver) {
        return Err(Refusal::NoSession);
    }
    let counter = header.last_chunk().copied().map_or(u64::MAX, u64::from_le_bytes);
    Ok(Packet { start: start + DATA_HEADER, len, counter })
}

/// Returns the IP packet in a decrypted payload, without its padding.
#[inline]
fn inner(arena: &[u8], packet: &Packet) -> Opened {
    let Packet { start, len, .. } = *packet;
    if len == 0 {
        return Opened::Keepalive;
    }
    let header = arena.get(start..start + len).unwrap_or_default();
    let number = |at: usize| header.get(at..)?.first_chunk().copied().map(u16::from_be_bytes);
    let claimed = match header.first().map(|byte| byte >> 4) {
        Some(4) if len >= 20 => number(2).map(usize::from),
        Some(6) if len >= 40 => number(4).map(|payload| usize::from(payload) + 40),
        _ => None,
    };
    match claimed {
        Some(claimed) if claimed <= len => Opened::Packet { start, len: claimed },
        _ => Opened::Refused(Refusal::NoPacket),
    }
}
