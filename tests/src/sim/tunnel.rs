//! A model of the data plane for the core: WireGuard's handshake, sessions and timers, without
//! cryptography. It applies the peer table and reports observations, as the agent's data plane
//! does.
//!
//! The model keeps these properties of WireGuard (and boringtun): a handshake takes one round trip;
//! a responder refuses an initiation that is not newer than the last; a session is re-keyed after
//! 120 s and ends after 180 s; an unanswered initiation is repeated every 5 s for 90 s and then
//! abandoned; a node that sent something and received nothing for 15 s initiates; a data counter
//! outside the replay window is refused. A peer that rebooted gets a new tunnel. As in the agent's data
//! plane, a handshake is reported for a path on which what was sent was answered.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use towline_core::path::Path;
use towline_core::peer_table::{Observation, PeerEntry, PeerPath, PeerTable, REKEY_TIMEOUT};
use towline_proto::id::WireguardKey;

const REKEY_AFTER: Duration = Duration::from_secs(120);
const REJECT_AFTER: Duration = Duration::from_secs(180);
const SILENCE: Duration = Duration::from_secs(15);
const ATTEMPT_TIME: Duration = Duration::from_secs(90);
const REPLAY_WINDOW: u64 = 1_024;
/// Maximum number of inner packets that wait for a session.
const QUEUE: usize = 8;

/// An inner packet: an echo request or its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inner {
    /// Number of the packet, which its reply repeats.
    pub number: u64,
    /// True for an echo reply.
    pub reply: bool,
}

/// A WireGuard message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Handshake initiation (type 1).
    Initiation {
        /// Sender's key, which the handshake authenticates.
        sender: WireguardKey,
        /// Receiver's key; no other node can read the message.
        to: WireguardKey,
        /// The initiator's number for the exchange.
        exchange: u64,
        /// The initiator's wall clock.
        timestamp: i64,
    },
    /// Handshake response (type 2).
    Response {
        /// Number of the exchange, from the initiation.
        exchange: u64,
        /// Number of the new session.
        session: u64,
    },
    /// Transport data (type 4); without an inner packet it is a keepalive.
    Data {
        /// Number of the session.
        session: u64,
        /// Packet counter, never used twice in a session.
        counter: u64,
        /// Inner packet that it carries.
        inner: Option<Inner>,
    },
}

/// An effect that a tunnel asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Send a message to the peer.
    Send(Path, Message),
    /// Report an observation to the core.
    Observed(WireguardKey, Observation),
    /// Deliver an inner packet that this peer sent.
    Received(WireguardKey, Inner),
}

/// All tunnels of a host.
#[derive(Debug, Default)]
pub struct Tunnels {
    peers: BTreeMap<WireguardKey, Tunnel>,
    /// Next number of an exchange or session. With `unique` it is unique in the whole simulation.
    next: u64,
    unique: u64,
    /// Effects to execute, in order.
    pub effects: VecDeque<Effect>,
}

#[derive(Debug)]
struct Tunnel {
    entry: PeerEntry,
    sessions: Vec<Session>,
    pending: Option<Pending>,
    /// Greatest timestamp of an accepted initiation.
    greatest: i64,
    queue: VecDeque<Inner>,
    sent_at: Option<Instant>,
    /// When the oldest inner packet was sent that is still unanswered.
    unanswered_since: Option<Instant>,
    keepalive_at: Option<Instant>,
    wanted: bool,
    /// When activity was last reported to the core.
    active_said: Option<Instant>,
}

#[derive(Debug)]
struct Session {
    id: u64,
    initiator: bool,
    since: Instant,
    /// False for a responder until it received data in the session: only then it may send.
    usable: bool,
    counter: u64,
    greatest: u64,
    seen: BTreeSet<u64>,
    /// Path over which the handshake was answered.
    answered: Path,
}

#[derive(Debug)]
struct Pending {
    exchange: u64,
    began: Instant,
    sent: Instant,
    /// Paths that the initiation went over.
    to: Vec<Path>,
}

impl Tunnels {
    /// Creates an empty set of tunnels; `unique` distinguishes this start of this host from all
    /// others.
    pub fn new(unique: u64) -> Self {
        Self { unique, ..Self::default() }
    }

    /// Applies a peer table.
    pub fn apply(&mut self, table: &PeerTable) {
        self.peers.retain(|key, _| table.peers.contains_key(key));
        for (key, entry) in &table.peers {
            match self.peers.get_mut(key) {
                Some(tunnel) => {
                    if entry.boot_epoch > tunnel.entry.boot_epoch {
                        *tunnel = Tunnel::new(entry.clone());
                    } else {
                        tunnel.entry = entry.clone();
                    }
                }
                None => {
                    self.peers.insert(*key, Tunnel::new(entry.clone()));
                }
            }
        }
    }

    /// Replaces the path of one peer.
    pub fn set_path(&mut self, peer: &WireguardKey, path: PeerPath) {
        if let Some(tunnel) = self.peers.get_mut(peer) {
            tunnel.entry.set_path(path);
        }
    }

    /// Initiates a handshake, as the core requests.
    pub fn handshake(
        &mut self,
        now: Instant,
        clock: i64,
        me: WireguardKey,
        peer: WireguardKey,
        to: &[Path],
    ) {
        let exchange = self.number();
        let Some(tunnel) = self.peers.get_mut(&peer) else { return };
        tunnel.pending = Some(Pending { exchange, began: now, sent: now, to: to.to_vec() });
        let message = Message::Initiation { sender: me, to: peer, exchange, timestamp: clock };
        self.effects.extend(to.iter().map(|to| Effect::Send(*to, message.clone())));
    }

    /// Sends an inner packet of the host to the peer.
    pub fn send(&mut self, now: Instant, peer: WireguardKey, inner: Inner) {
        let Some(tunnel) = self.peers.get_mut(&peer) else { return };
        if tunnel.transmit(now, Some(inner), &mut self.effects) {
            if tunnel.active(now) {
                let (sent, received, by_endpoint) = (true, false, false);
                let active = Observation::Active { sent, received, by_endpoint };
                self.effects.push_back(Effect::Observed(peer, active));
            }
            return;
        }
        tunnel.queue.push_back(inner);
        tunnel.queue.truncate(QUEUE);
        if !std::mem::replace(&mut tunnel.wanted, true) {
            self.effects.push_back(Effect::Observed(peer, Observation::Wanted));
        }
    }

    /// Handles a message that arrived.
    pub fn receive(&mut self, now: Instant, me: WireguardKey, from: Path, message: Message) {
        match message {
            Message::Initiation { sender, to, exchange, timestamp } => {
                if to != me {
                    return;
                }
                let session = self.number();
                let Some(tunnel) = self.peers.get_mut(&sender) else { return };
                if timestamp <= tunnel.greatest {
                    return;
                }
                tunnel.greatest = timestamp;
                tunnel.begin(now, session, false, from);
                let response = Message::Response { exchange, session };
                self.effects.push_back(Effect::Send(from, response));
                // The handshake is complete once the peer has sent data in the session.
                if !tunnel.entry.endpoint.is_some_and(|known| known.is(&from)) {
                    self.effects.push_back(Effect::Observed(sender, Observation::Roamed { from }));
                }
            }
            Message::Response { exchange, session } => {
                let waiting = self.peers.iter_mut().find(|(_, tunnel)| {
                    tunnel.pending.as_ref().is_some_and(|pending| pending.exchange == exchange)
                });
                let Some((key, tunnel)) = waiting else { return };
                let pending = tunnel.pending.take();
                tunnel.begin(now, session, true, from);
                // Nothing was sent to this address before: the core validates it.
                if !pending.is_some_and(|pending| pending.to.iter().any(|to| to.is(&from))) {
                    self.effects.push_back(Effect::Observed(*key, Observation::Roamed { from }));
                    return;
                }
                tunnel.wanted = false;
                self.effects.push_back(Effect::Observed(*key, Observation::Handshake { from }));
                tunnel.entry.endpoint = Some(from);
                // The first data message allows the responder to use the session.
                if tunnel.queue.is_empty() {
                    tunnel.transmit(now, None, &mut self.effects);
                }
                tunnel.flush(now, &mut self.effects);
            }
            Message::Data { session, counter, inner } => {
                let holder = self
                    .peers
                    .iter_mut()
                    .find(|(_, tunnel)| tunnel.sessions.iter().any(|known| known.id == session));
                let Some((key, tunnel)) = holder else { return };
                let confirms = tunnel.sessions.iter().any(|s| s.id == session && !s.usable);
                if !tunnel.accept(session, counter) {
                    return;
                }
                if confirms {
                    tunnel.wanted = false;
                    // The peer received the response there. Its own datagram may have been redirected.
                    let answered = tunnel.sessions.iter().find(|known| known.id == session);
                    let from = answered.map_or(from, |session| session.answered);
                    tunnel.entry.endpoint.get_or_insert(from);
                    self.effects.push_back(Effect::Observed(*key, Observation::Handshake { from }));
                }
                tunnel.unanswered_since = None;
                if !tunnel.entry.endpoint.is_some_and(|known| known.is(&from)) {
                    self.effects.push_back(Effect::Observed(*key, Observation::Roamed { from }));
                }
                if let Some(inner) = inner {
                    self.effects.push_back(Effect::Received(*key, inner));
                    if tunnel.active(now) {
                        let by_endpoint = tunnel.entry.endpoint.is_some_and(|at| at.is(&from));
                        let (sent, received) = (false, true);
                        let active = Observation::Active { sent, received, by_endpoint };
                        self.effects.push_back(Effect::Observed(*key, active));
                    }
                }
                tunnel.flush(now, &mut self.effects);
            }
        }
    }

    /// Returns when [`Self::handle_timeout`] must be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.peers.values().filter_map(Tunnel::deadline).min()
    }

    /// Runs the timers that are due.
    pub fn handle_timeout(&mut self, now: Instant, clock: i64, me: WireguardKey) {
        let mut initiate = Vec::new();
        for (key, tunnel) in &mut self.peers {
            if tunnel.rekey_at().is_some_and(|at| at <= now) {
                tunnel.unanswered_since = None;
                initiate.push((*key, true));
            }
            let had = !tunnel.sessions.is_empty();
            tunnel.sessions.retain(|session| now < session.since + REJECT_AFTER);
            if had && tunnel.sessions.is_empty() {
                tunnel.pending = None;
                self.effects.push_back(Effect::Observed(*key, Observation::SessionExpired));
            }
            if let Some(pending) = &tunnel.pending {
                if now >= pending.began + ATTEMPT_TIME {
                    tunnel.pending = None;
                    tunnel.wanted = false;
                    tunnel.sessions.clear();
                    tunnel.queue.clear();
                    self.effects.push_back(Effect::Observed(*key, Observation::SessionExpired));
                } else if now >= pending.sent + REKEY_TIMEOUT {
                    let unanswered = Observation::HandshakeUnanswered;
                    self.effects.push_back(Effect::Observed(*key, unanswered));
                    initiate.push((*key, false));
                }
            }
            if tunnel.keepalive_due().is_some_and(|at| at <= now) {
                tunnel.keepalive_at = Some(now);
                tunnel.transmit(now, None, &mut self.effects);
            }
        }
        for (key, is_new) in initiate {
            let exchange = self.number();
            let Some(tunnel) = self.peers.get_mut(&key) else { continue };
            let began = match &tunnel.pending {
                Some(pending) if !is_new => pending.began,
                _ => now,
            };
            let to = tunnel.entry.endpoint.into_iter().collect();
            tunnel.pending = Some(Pending { exchange, began, sent: now, to });
            if let Some(to) = tunnel.entry.endpoint {
                let message =
                    Message::Initiation { sender: me, to: key, exchange, timestamp: clock };
                self.effects.push_back(Effect::Send(to, message));
            }
        }
    }

    /// Returns whether inner packets can be sent to the peer now.
    pub fn established(&self, peer: &WireguardKey) -> bool {
        self.peers.get(peer).is_some_and(|tunnel| tunnel.sessions.iter().any(|s| s.usable))
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.unique << 32 | self.next
    }
}

impl Tunnel {
    fn new(entry: PeerEntry) -> Self {
        Self {
            entry,
            sessions: Vec::new(),
            pending: None,
            greatest: i64::MIN,
            queue: VecDeque::new(),
            sent_at: None,
            unanswered_since: None,
            keepalive_at: None,
            wanted: false,
            active_said: None,
        }
    }

    /// Returns whether activity must be reported now: at most once a second.
    fn active(&mut self, now: Instant) -> bool {
        let due = self.active_said.is_none_or(|at| now >= at + Duration::from_secs(1));
        if due {
            self.active_said = Some(now);
        }
        due
    }

    fn begin(&mut self, now: Instant, id: u64, initiator: bool, answered: Path) {
        let session = Session {
            id,
            initiator,
            since: now,
            usable: initiator,
            counter: 0,
            greatest: 0,
            seen: BTreeSet::new(),
            answered,
        };
        self.sessions.push(session);
        if self.sessions.len() > 4 {
            self.sessions.remove(0);
        }
    }

    /// Sends in the newest usable session. Returns whether there was one.
    fn transmit(
        &mut self,
        now: Instant,
        inner: Option<Inner>,
        effects: &mut VecDeque<Effect>,
    ) -> bool {
        let Some(session) = self.sessions.iter_mut().rev().find(|session| session.usable) else {
            return false;
        };
        session.counter += 1;
        let message = Message::Data { session: session.id, counter: session.counter, inner };
        self.sent_at = Some(now);
        if inner.is_some() {
            self.unanswered_since.get_or_insert(now);
        }
        if let Some(to) = self.entry.endpoint {
            effects.push_back(Effect::Send(to, message));
        }
        true
    }

    fn flush(&mut self, now: Instant, effects: &mut VecDeque<Effect>) {
        while let Some(inner) = self.queue.pop_front() {
            if !self.transmit(now, Some(inner), effects) {
                self.queue.push_front(inner);
                return;
            }
        }
    }

    fn accept(&mut self, session: u64, counter: u64) -> bool {
        let Some(session) = self.sessions.iter_mut().find(|known| known.id == session) else {
            return false;
        };
        if counter + REPLAY_WINDOW <= session.greatest || !session.seen.insert(counter) {
            return false;
        }
        session.greatest = session.greatest.max(counter);
        while session.seen.first().is_some_and(|first| first + REPLAY_WINDOW <= session.greatest) {
            session.seen.pop_first();
        }
        session.usable = true;
        true
    }

    /// Returns when to re-key. The initiator re-keys once it sent something in a session that is
    /// old enough; either side does when nothing comes back.
    fn rekey_at(&self) -> Option<Instant> {
        let newest = self.sessions.last().filter(|_| self.pending.is_none())?;
        let sent = self.sent_at.is_some_and(|at| at > newest.since);
        let age = (newest.initiator && sent).then(|| newest.since + REKEY_AFTER);
        let silence = self.unanswered_since.map(|at| at + SILENCE);
        age.into_iter().chain(silence).min()
    }

    fn keepalive_due(&self) -> Option<Instant> {
        let every = self.entry.keepalive?;
        let newest = self.sessions.last()?;
        Some(self.keepalive_at.unwrap_or(newest.since) + every)
    }

    fn deadline(&self) -> Option<Instant> {
        let pending = self
            .pending
            .as_ref()
            .map(|pending| (pending.sent + REKEY_TIMEOUT).min(pending.began + ATTEMPT_TIME));
        let expiry = self.sessions.iter().map(|session| session.since + REJECT_AFTER).min();
        pending.into_iter().chain(expiry).chain(self.rekey_at()).chain(self.keepalive_due()).min()
    }
}
