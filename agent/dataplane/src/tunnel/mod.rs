//! The tunnel with one peer: which session seals, which packets wait for one, when a handshake is
//! repeated, when a keepalive is due, and the path that the peer last used.
//!
//! This module owns WireGuard's timer rules that need no decision. The core decides whether and on
//! which paths to start a handshake. In particular:
//!
//! - A tunnel without a session starts no handshake by itself, but it repeats one that was
//!   commanded; it reports [`Observation::Wanted`].
//! - A keepalive is sent only on a session, and only when nothing else was sent for the interval.
//!   So two ends with keepalives neither compete to initiate nor add traffic to a busy tunnel.
//! - The initiator of a session starts the next handshake (rekey) while keepalives hold it open (the engines count
//!   data only). The responder does not.
//! - A tunnel that was rebuilt (pre-shared key, boot epoch) uses the old session until the new one
//!   is established, so there is no gap.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use towline_core::path::Path;
use towline_core::peer_table::{Observation, REKEY_TIMEOUT};
use towline_types::id::{PresharedKey, WireguardKey};

use super::arena::{Destination, SendBatch};
use super::counters::PeerCounters;
use super::drops::{DropReason, Drops};
use super::events::EventSink;
use super::inner_traffic::InnerTraffic;
use super::newly_live::NewlyLive;
use super::roaming::RoamReports;
use super::runs::Run;
use towline_wireguard::{
    Answered, Buffers, HANDSHAKE_BYTES, InitiationHistory, Inputs, Message, MessageKind, Opened,
    Refusal, Secrets, Segments, Session, Single, Tick,
};

/// Rekey-After-Time (whitepaper section 6.1): age at which the initiator renews a session.
const REKEY_AFTER: Duration = Duration::from_secs(120);
/// Reject-After-Time (180 s) plus a margin: the engine has dropped the session by then.
const SESSION_GONE: Duration = Duration::from_secs(182);
/// Rekey-Attempt-Time (90 s) plus a margin: the engine has given up by then.
const ATTEMPT_GONE: Duration = Duration::from_secs(92);
/// Upper bound of the random delay of a repeated initiation, in milliseconds.
const RETRY_JITTER_MS: u64 = 333;
/// Time within which a second command to initiate on the same paths is ignored: the engine may have
/// repeated the initiation just before it arrived.
const SAME_COMMAND: Duration = Duration::from_millis(20);
/// Largest number of segments that wait for a session. A super-packet counts once per segment.
const WAITING: usize = 16;
/// Longest time that a packet waits for a session.
const WAITING_TIME: Duration = Duration::from_secs(10);

/// Context of a call: the time, the send batch, the event sink and the counters.
pub(super) struct TunnelContext<'a> {
    pub(super) now: Instant,
    /// Start of the data plane, from which [`PeerCounters`] count.
    pub(super) started: Instant,
    pub(super) out: &'a mut SendBatch,
    pub(super) events: &'a mut EventSink,
    pub(super) newly_live: &'a NewlyLive,
    pub(super) drops: &'a Drops,
    pub(super) counters: &'a PeerCounters,
    /// True for a peer of the configuration, which is followed as WireGuard does: to wherever its last
    /// authentic datagram came from.
    pub(super) is_static: bool,
}

/// Tunnel with one peer. Owns its sessions and the packets that wait for one.
#[derive(Debug)]
pub(super) struct Tunnel {
    peer: WireguardKey,
    secrets: Arc<Secrets>,
    psk: Option<PresharedKey>,
    /// Tunnel index of `active`: the upper 24 bits of its receiver indices.
    index: u32,
    /// Current WireGuard state. Created when it is first needed, because it takes several
    /// kilobytes.
    active: Option<Session>,
    /// Initiations of the states before the last rebuild.
    history: InitiationHistory,
    /// State from before a rebuild, and its tunnel index. Removed once it has no session.
    retired: Option<(Session, u32)>,
    /// Handshake that this node started. Cleared when it is answered or given up.
    initiation: Option<Initiation>,
    /// Session that the peer initiated and has not used yet.
    unconfirmed: Option<Unconfirmed>,
    /// Time when the session that seals was established, and whether this node initiated it.
    established: Option<(Instant, bool)>,
    /// Time when a datagram was last sent to the peer.
    last_sent: Option<Instant>,
    /// Packets that wait for a session, each with its arrival time.
    waiting: VecDeque<(Instant, Box<[u8]>)>,
    /// Time when [`Observation::Wanted`] was reported. Cleared when a handshake is completed or given
    /// up, and when the session expired and nothing waits. Without a handshake it is reported again after
    /// [`WAITING_TIME`].
    wanted_reported: Option<Instant>,
    /// Path over which the last handshake was completed, used while the core knows no endpoint.
    adopted: Option<Path>,
    /// Reports of [`Observation::Roamed`].
    roaming: RoamReports,
    /// Inner traffic that must be reported.
    inner_traffic: InnerTraffic,
    /// Time until which the tunnel needs ticks. `None` if it needs none.
    live_until: Option<Instant>,
    /// True once the peer left the table. No packet may wait for a session after that.
    closed: bool,
}

/// Handshake that this node started and that is not answered yet.
#[derive(Debug)]
struct Initiation {
    /// Time of the last transmission.
    sent: Instant,
    /// Random part of the delay until the next transmission.
    jitter: Duration,
    /// Paths that the initiation is sent on.
    to: Vec<Path>,
    /// Paths of the initiation that this one replaced, which may still be answered.
    before: Vec<Path>,
}

impl Initiation {
    /// Returns whether an answer that came by `from` came from where an initiation went.
    fn is_answered_by(&self, from: &Path) -> bool {
        self.to.iter().chain(&self.before).any(|to| to.is(from))
    }
}

/// Session that the peer initiated and has not used yet.
#[derive(Debug)]
struct Unconfirmed {
    /// Receiver index of the session.
    receiver: u32,
    /// Path on which the initiation was answered.
    answered: Path,
    /// True once a session that this node initiated was established. The engines seal with that one
    /// then, and use this one for receiving only.
    is_replaced: bool,
}

impl Tunnel {
    pub(super) fn new(
        peer: WireguardKey,
        psk: Option<PresharedKey>,
        index: u32,
        secrets: &Arc<Secrets>,
    ) -> Self {
        Self {
            peer,
            secrets: secrets.clone(),
            psk,
            index,
            active: None,
            history: InitiationHistory::default(),
            retired: None,
            initiation: None,
            unconfirmed: None,
            established: None,
            last_sent: None,
            waiting: VecDeque::new(),
            wanted_reported: None,
            adopted: None,
            roaming: RoamReports::default(),
            inner_traffic: InnerTraffic::default(),
            live_until: None,
            closed: false,
        }
    }

    /// Returns the number of packets that wait for a session.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Closes the tunnel because the peer left the table. Returns the number of waiting packets,
    /// which are lost.
    pub(super) fn close(&mut self) -> usize {
        self.closed = true;
        std::mem::take(&mut self.waiting).len()
    }

    /// Replaces the pre-shared key and the index for future handshakes. Existing sessions stay
    /// until the next handshake completes. Initiations of before stay stale, unless the peer has
    /// started again: its clock may have been set back.
    pub(super) fn rebuild(
        &mut self,
        now: Instant,
        psk: Option<PresharedKey>,
        index: u32,
        has_restarted: bool,
    ) {
        if let Some(history) = self.active.as_ref().and_then(Session::history) {
            self.history = history.clone();
        }
        if has_restarted {
            self.history.forget_peer();
        }
        if let Some(active) = self.active.take().filter(|active| active.is_ready(now)) {
            self.retired = Some((active, self.index));
        }
        self.psk = psk;
        self.index = index;
        self.initiation = None;
        self.unconfirmed = None;
    }

    /// Returns the path for datagrams to the peer: the `known` endpoint of the core, or the adopted
    /// path.
    pub(super) fn endpoint(&mut self, known: Option<Path>) -> Option<Path> {
        if known.is_some() {
            self.adopted = None;
        }
        known.or(self.adopted)
    }

    /// Returns whether there is a session to seal with.
    pub(super) fn is_ready(&self, now: Instant) -> bool {
        self.active.as_ref().is_some_and(|active| active.is_ready(now))
            || self.retired.as_ref().is_some_and(|(retired, _)| retired.is_ready(now))
    }

    /// Seals `segments` until none is left or `out` is full. Returns the number of bytes written.
    /// Call only when [`Tunnel::is_ready`].
    pub(super) fn seal(
        &mut self,
        segments: &mut impl Segments,
        to: &Destination,
        out: &mut SendBatch,
        drops: &Drops,
        now: Instant,
    ) -> usize {
        self.last_sent = Some(now);
        if let Some(session) = self.sealing(now) {
            let sealed = session.seal(now, segments, &mut out.to(to));
            if sealed.lost > 0 {
                drops.add(DropReason::NoSession, sealed.lost as u64);
            }
            return sealed.bytes;
        }
        while segments.next_len().is_some() {
            segments.take();
            drops.count(DropReason::NoSession);
        }
        0
    }

    /// Records that inner packets were sent. Returns the report that is due.
    pub(super) fn sent_inner(&mut self, now: Instant) -> Option<Observation> {
        self.inner_traffic.sent = true;
        self.inner_traffic.take_report(now)
    }

    /// Keeps a padded packet until there is a session, for at most [`WAITING_TIME`]. If [`WAITING`] packets
    /// wait already, drops the oldest.
    pub(super) fn enqueue(&mut self, packet: &[u8], context: &mut TunnelContext<'_>) {
        if self.closed {
            context.drops.count(DropReason::NoRoute);
            return;
        }
        if self.waiting.len() == WAITING {
            self.waiting.pop_front();
            context.drops.count(DropReason::QueueFull);
        }
        self.waiting.push_back((context.now, packet.into()));
        self.live_for(WAITING_TIME, context);
        // The core may have given up a peer whose addresses it did not know, without any initiation.
        let is_over = |at| context.now.saturating_duration_since(at) >= WAITING_TIME;
        let has_no_attempt = self.initiation.is_none();
        if self.wanted_reported.is_none_or(|at| has_no_attempt && is_over(at)) {
            self.wanted_reported = Some(context.now);
            context.events.observe(self.peer, Observation::Wanted);
        }
    }

    /// Opens runs of data messages that continue each other. Calls `each` with the position of each
    /// packet in the buffer where the engine leaves packets. Returns the number of messages that
    /// arrived with others in one receive call and were not authentic.
    pub(super) fn open(
        &mut self,
        known: Option<Path>,
        runs: &[Run],
        buffers: Buffers<'_>,
        context: &mut TunnelContext<'_>,
        mut each: impl FnMut(Message),
    ) -> usize {
        let Some(Run { from, receiver, skip, .. }) = runs.first().copied() else { return 0 };
        let session = match (&mut self.active, &mut self.retired) {
            (Some(active), _) if receiver >> 8 == self.index => active,
            (_, Some((retired, index))) if receiver >> 8 == *index => retired,
            _ => {
                let count: usize = runs.iter().map(Run::count).sum();
                context.drops.add(DropReason::NoSession, count as u64);
                return 0;
            }
        };
        let drops = context.drops;
        let (mut authentic, mut packets, mut corrupted) = (0, false, 0);
        let mut counts = runs.iter().map(Run::count);
        // Messages of the run, and those of it that are not handled yet.
        let (mut count, mut left) = (0, 0);
        let messages = runs.iter().flat_map(Run::messages);
        session.open(context.now, messages, buffers, |message, opened| {
            if left == 0 {
                count = counts.next().unwrap_or(0);
                left = count;
            }
            left = left.saturating_sub(1);
            match opened {
                Opened::Packet { start, len } => {
                    authentic += skip + message.len;
                    packets = true;
                    each(Message { start, len });
                }
                Opened::Keepalive => authentic += skip + message.len,
                Opened::Refused(refusal) => {
                    corrupted += usize::from(count > 1 && refusal == Refusal::NotAuthentic);
                    drops.count(refusal.into());
                }
            }
        });
        if authentic == 0 {
            return corrupted;
        }
        context.counters.received(authentic);
        if packets {
            self.inner_traffic.received = true;
            let by_endpoint = self.endpoint(known).is_some_and(|endpoint| endpoint.is(&from));
            self.inner_traffic.by_endpoint |= by_endpoint;
            if let Some(what) = self.inner_traffic.take_report(context.now) {
                context.events.observe(self.peer, what);
            }
        }
        let confirmed = self.unconfirmed.take_if(|waiting| waiting.receiver == receiver);
        if let Some(Unconfirmed { answered, is_replaced, .. }) = confirmed {
            // The peer received the response there. Its own datagram may have been redirected.
            if known.is_none() {
                self.adopted = Some(answered);
            }
            if !is_replaced {
                self.established = Some((context.now, false));
            }
            self.completed(answered, context);
        }
        self.seen(from, known, context);
        corrupted
    }

    /// Handles a handshake message of any kind.
    pub(super) fn handshake(
        &mut self,
        message: &[u8],
        from: Path,
        known: Option<Path>,
        context: &mut TunnelContext<'_>,
    ) {
        let solicited = matches!(MessageKind::of(message), Some(MessageKind::Initiation))
            || self.initiation.is_some();
        if !solicited {
            context.drops.count(DropReason::InvalidHandshake);
            return;
        }
        let mut reply = [0; HANDSHAKE_BYTES];
        let active = self.active();
        let answered =
            Inputs::system(context.now, |inputs| active.handshake(inputs, message, &mut reply));
        match answered {
            Answered::Response { len, receiver } => {
                context.counters.received(message.len());
                self.unconfirmed =
                    Some(Unconfirmed { receiver, answered: from, is_replaced: false });
                self.live_for(SESSION_GONE, context);
                self.send(&reply[..len], from, context);
                self.seen(from, known, context);
            }
            Answered::Established { len } => {
                context.counters.received(message.len());
                let begun = self.initiation.take();
                let is_proven = begun.is_some_and(|begun| begun.is_answered_by(&from));
                self.live_for(SESSION_GONE, context);
                self.established = Some((context.now, true));
                if let Some(unconfirmed) = &mut self.unconfirmed {
                    unconfirmed.is_replaced = true;
                }
                // The peer can use the session only after this datagram, so it takes the path that
                // just worked.
                self.send(&reply[..len], from, context);
                // Where nothing was sent before, the core validates the address.
                if is_proven || context.is_static {
                    if known.is_none() {
                        self.adopted = Some(from);
                    }
                    self.completed(from, context);
                }
                self.seen(from, known, context);
            }
            Answered::Cookie => {}
            Answered::Refused(refusal) => context.drops.count(refusal.into()),
        }
    }

    /// Starts a handshake: sends one initiation, with the same bytes, on each path.
    pub(super) fn initiate(&mut self, to: Vec<Path>, context: &mut TunnelContext<'_>) {
        if let Some(running) = &self.initiation
            && context.now.saturating_duration_since(running.sent) < SAME_COMMAND
            && to.iter().all(|address| running.to.contains(address))
        {
            return;
        }
        let mut message = [0; HANDSHAKE_BYTES];
        let active = self.active();
        let len = Inputs::system(context.now, |inputs| active.initiate(inputs, &mut message));
        if len > 0 {
            self.initiated(&message[..len], to, context);
        }
    }

    /// Advances the timers. Returns whether it must be called again, a few times per second.
    pub(super) fn tick(
        &mut self,
        known: Option<Path>,
        keepalive: Option<Duration>,
        context: &mut TunnelContext<'_>,
    ) -> bool {
        // A tunnel whose time is over is ticked once more. If ticks were missed (the process was
        // stopped, the machine was paused), that one finds that its session or handshake ended.
        if self.live_until.is_none() {
            return false;
        }
        while let Some((since, _)) = self.waiting.front()
            && context.now.saturating_duration_since(*since) >= WAITING_TIME
        {
            self.waiting.pop_front();
            context.drops.count(DropReason::QueueExpired);
        }
        if let Some(what) = self.inner_traffic.take_report(context.now) {
            context.events.observe(self.peer, what);
        }
        self.tick_engines(known, context);
        if self.established.is_some() && !self.is_ready(context.now) && self.initiation.is_none() {
            self.expired(context);
        }
        self.keep_alive(known, keepalive, context);
        if !self.is_live(context.now) {
            self.live_until = None;
        }
        self.live_until.is_some()
    }

    fn tick_engines(&mut self, known: Option<Path>, context: &mut TunnelContext<'_>) {
        let mut message = [0; HANDSHAKE_BYTES];
        let mut renew = false;
        // Once the new session is established, the old one is not renewed any more.
        let is_followed = self.active.as_ref().is_some_and(|active| active.is_ready(context.now));
        if let Some((retired, _)) = &mut self.retired {
            let tick = Inputs::system(context.now, |inputs| retired.tick(inputs, &mut message));
            if !retired.is_ready(context.now) {
                self.retired = None;
            }
            match tick {
                Tick::Initiation(_) => renew = !is_followed,
                // The peer still sends on that session, and expects its answer there.
                Tick::Keepalive(len) => self.send_keepalive(&message[..len], known, context),
                Tick::Quiet | Tick::Expired => {}
            }
        }
        let repeated = self.initiation.as_ref().map(|initiation| {
            let age = context.now.saturating_duration_since(initiation.sent);
            (age >= REKEY_TIMEOUT, age >= REKEY_TIMEOUT + initiation.jitter)
        });
        let tick = match (&mut self.active, repeated) {
            // The engine would repeat the initiation now. The jitter keeps all nodes that lost the
            // same peer from repeating theirs at the same moment.
            (_, Some((true, false))) | (None, _) => Tick::Quiet,
            (Some(active), _) => {
                Inputs::system(context.now, |inputs| active.tick(inputs, &mut message))
            }
        };
        match tick {
            Tick::Quiet if renew && self.initiation.is_none() => {
                let to = self.endpoint(known).into_iter().collect();
                self.initiate(to, context);
            }
            Tick::Quiet => {
                // boringtun does not repeat an initiation after it answered one from the peer, the
                // batch engine not after the peer used that session.
                if let Some((_, true)) = repeated {
                    self.initiation = None;
                }
            }
            Tick::Initiation(len) => {
                let to = match self.initiation.take() {
                    Some(unanswered) => {
                        context.events.observe(self.peer, Observation::HandshakeUnanswered);
                        unanswered.to
                    }
                    None => self.endpoint(known).into_iter().collect(),
                };
                self.initiated(&message[..len], to, context);
            }
            Tick::Keepalive(len) => self.send_keepalive(&message[..len], known, context),
            // boringtun repeats this at every tick until the next handshake.
            Tick::Expired if self.established.is_some() || self.initiation.is_some() => {
                self.given_up(context);
            }
            Tick::Expired => {}
        }
    }

    /// Sends a keepalive that an engine has made, if the path to the peer is known.
    fn send_keepalive(
        &mut self,
        keepalive: &[u8],
        known: Option<Path>,
        context: &mut TunnelContext<'_>,
    ) {
        if let Some(to) = self.endpoint(known) {
            self.send(keepalive, to, context);
        }
    }

    fn keep_alive(
        &mut self,
        known: Option<Path>,
        keepalive: Option<Duration>,
        context: &mut TunnelContext<'_>,
    ) {
        let Some(interval) = keepalive else { return };
        if let Some((since, true)) = self.established
            && self.initiation.is_none()
            && context.now.saturating_duration_since(since) >= REKEY_AFTER
        {
            let to = self.endpoint(known).into_iter().collect();
            self.initiate(to, context);
        }
        let silent = |since: Instant| context.now.saturating_duration_since(since) >= interval;
        if !self.last_sent.is_none_or(silent) {
            return;
        }
        let Some(to) = self.endpoint(known) else { return };
        let mut message = [0; HANDSHAKE_BYTES];
        if let Some(session) = self.sealing(context.now) {
            let len = session.keepalive(context.now, &mut message);
            self.send(&message[..len], to, context);
        }
    }

    /// Returns the delay after which the unanswered initiation is repeated, if there is one.
    #[cfg(test)]
    pub(super) fn repeats_after(&self) -> Option<Duration> {
        self.initiation.as_ref().map(|initiation| REKEY_TIMEOUT + initiation.jitter)
    }

    fn is_live(&self, now: Instant) -> bool {
        self.live_until.is_some_and(|until| now < until)
    }

    /// Needs ticks for this time from now on.
    fn live_for(&mut self, time: Duration, context: &TunnelContext<'_>) {
        if self.live_until.is_none() {
            context.newly_live.record();
        }
        self.live_until = self.live_until.max(Some(context.now + time));
    }

    fn active(&mut self) -> &mut Session {
        let Self { secrets, peer, psk, index, history, .. } = self;
        self.active.get_or_insert_with(|| {
            let mut session = Session::new(secrets, *peer, psk.as_ref(), *index);
            session.follow(history);
            session
        })
    }

    fn sealing(&mut self, now: Instant) -> Option<&mut Session> {
        match &mut self.active {
            Some(active) if active.is_ready(now) => Some(active),
            _ => self.retired.as_mut().map(|(retired, _)| retired).filter(|r| r.is_ready(now)),
        }
    }

    /// Sends an initiation on each path and records it.
    fn initiated(&mut self, message: &[u8], to: Vec<Path>, context: &mut TunnelContext<'_>) {
        for address in &to {
            self.send(message, *address, context);
        }
        let jitter = Duration::from_millis(super::random() % RETRY_JITTER_MS);
        let before = self.initiation.take().map_or_else(Vec::new, |before| before.to);
        self.initiation = Some(Initiation { sent: context.now, jitter, to, before });
        self.live_for(ATTEMPT_GONE, context);
    }

    /// Records a completed handshake and sends the waiting packets.
    fn completed(&mut self, from: Path, context: &mut TunnelContext<'_>) {
        self.wanted_reported = None;
        context.counters.handshake(context.started, context.now);
        context.events.observe(self.peer, Observation::Handshake { from });
        // They take the path that the handshake came by: it works, and the previous one may be
        // dead.
        while let Some((since, packet)) = self.waiting.pop_front() {
            if context.now.saturating_duration_since(since) >= WAITING_TIME {
                context.drops.count(DropReason::QueueExpired);
                continue;
            }
            let mut waited = Single::new(&packet);
            let sealed =
                self.seal(&mut waited, &from.into(), context.out, context.drops, context.now);
            context.counters.sent(sealed);
            if waited.next_len().is_some() {
                context.drops.count(DropReason::SendBufferFull);
            }
        }
    }

    /// Reports that the session expired while no handshake of this node is under way. What has begun
    /// since stays: packets that wait, and a session that the peer initiated.
    fn expired(&mut self, context: &mut TunnelContext<'_>) {
        self.established = None;
        if self.waiting.is_empty() {
            self.wanted_reported = None;
        }
        context.events.observe(self.peer, Observation::SessionExpired);
    }

    /// Resets the tunnel after a handshake was given up, with which the engine has forgotten its
    /// sessions.
    fn given_up(&mut self, context: &mut TunnelContext<'_>) {
        self.initiation = None;
        self.unconfirmed = None;
        context.drops.add(DropReason::QueueExpired, self.waiting.len() as u64);
        self.waiting.clear();
        if !self.is_ready(context.now) {
            self.live_until = None;
        }
        self.expired(context);
    }

    /// Records that an authentic datagram came by the path `from`, and reports a change.
    fn seen(&mut self, from: Path, known: Option<Path>, context: &mut TunnelContext<'_>) {
        if self.endpoint(known).is_some_and(|endpoint| endpoint.is(&from)) {
            if known.is_some() {
                self.roaming.settle();
            }
        } else if self.roaming.is_due(from, context.now) {
            context.events.observe(self.peer, Observation::Roamed { from });
        }
    }

    fn send(&mut self, message: &[u8], to: Path, context: &mut TunnelContext<'_>) {
        self.last_sent = Some(context.now);
        if context.out.push(to, message) {
            context.counters.sent(message.len());
        } else {
            context.drops.count(DropReason::SendBufferFull);
        }
    }
}
