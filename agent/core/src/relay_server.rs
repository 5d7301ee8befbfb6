//! This node as a relay: which nodes are registered, and which channels it opened.
//!
//! Requests are sealed for the pair of node and relay, so only nodes of the mesh are served. The
//! data plane forwards by the [`ForwardingTable`], which is all that it knows of these decisions.
//!
//! ```text
//!  node A ── Register ──► relay          node B ── Open(A) ──► relay
//!         ◄── Ping ──────                       ◄── Opened ───
//!         ─── Pong ─────►                A ◄── Incoming ──────
//!         ◄── Registered                 A ◄═══ channel ═════► B
//! ```
//!
//! **An address is proven before anything goes there.** A request in a probe of version 2 is delivered
//! only if the node proved its source ([`crate::probe_session`]). That of an earlier version may be a
//! recording that somebody sends from elsewhere, or name an address that is not the sender's. So its
//! source gets a ping. Once the node answered from there, it becomes the address of the node, or the end
//! of a channel. Until then nothing is forwarded to it, and it gets at most three datagrams for one of its
//! own; what was proven before stays in use. Every version of the agent answers pings.
//!
//! **Everything is bounded for each node**: requests, challenges, channels, and the bits that the
//! data plane forwards for it. What a node has too much of is refused to that node alone. A channel
//! that neither end uses is closed after [`CHANNEL_LIFETIME`]; so is the registration of a node that
//! is not repeated.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng as _;
use towline_types::frame::Probe;
use towline_types::id::WireguardKey;
use towline_types::rate::{Rate, TokenBucket};

use crate::config::RelayLimits;
use crate::effects::Effects;
use crate::forwarding::{ForwardingEnd, ForwardingTable};
use crate::output::Output;
use crate::path::{CHANNEL_LIFETIME, ChannelId, Path, Source};
use crate::status::RelayStatus;
use crate::timers::Timer;

/// Interval at which the data plane is asked which channels were used. It adds to the time for which
/// an unused channel is kept.
const SWEEP: Duration = Duration::from_secs(10);
/// Number of copies of the message that announces a channel to the other node. If all are lost, the
/// opener repeats its request.
const INCOMING_COPIES: usize = 2;
/// Shortest time between two announcements of one channel to one node. Openers repeat their requests
/// after 250 ms or more.
const INCOMING_PAUSE: Duration = Duration::from_millis(200);
/// Shortest time between two pings of one challenge.
const CHALLENGE_PAUSE: Duration = Duration::from_millis(200);
/// Number of copies of the first ping of a challenge: a lost one would cost the time until the node
/// repeats its request.
const CHALLENGE_COPIES: usize = 2;
/// Addresses of one node that are being proven; the oldest is forgotten first. A node has a few
/// uplinks; recordings of its requests may come from anywhere.
const CHALLENGES: usize = 8;
/// Requests of one node, per second and in a burst: a node that starts asks for each of its peers.
const REQUESTS: Rate = Rate::per_second(64, 1_024);

/// The registered nodes and their channels; see the module.
#[derive(Debug)]
pub(crate) struct RelayServer {
    limits: RelayLimits,
    nodes: BTreeMap<WireguardKey, Registration>,
    channels: BTreeMap<ChannelId, Channel>,
    by_pair: BTreeMap<Pair, ChannelId>,
    /// Ends of all channels, in the order of their [`Pair`].
    table: ForwardingTable,
    /// True if the table changed since it was handed out.
    is_changed: bool,
}

/// The two nodes of a channel, the lower key first.
type Pair = [WireguardKey; 2];

#[derive(Debug)]
struct Registration {
    /// Path to the node; `None` until it answered the first challenge.
    path: Option<Path>,
    /// Time of the last request from a proven path, or of the last answered challenge.
    heard: Instant,
    channels: BTreeSet<ChannelId>,
    challenges: VecDeque<Challenge>,
    requests: TokenBucket,
}

/// A path of a node that is not proven yet.
#[derive(Debug)]
struct Challenge {
    path: Path,
    /// Transaction of the ping, random, so that only who receives it can answer.
    transaction: u64,
    /// Time at which the ping was last sent.
    sent: Instant,
    /// Transaction of the registration that waits for the answer; `None` if the node asked for a
    /// channel alone.
    registration: Option<u64>,
}

#[derive(Debug)]
struct Channel {
    /// Time when the channel was opened, or last reported as used.
    used: Instant,
    /// Path that each end asked from and has to prove; `None` if that is its present one.
    wanted: [Option<Path>; 2],
    /// Time at which the channel was last announced to each end.
    announced: [Option<Instant>; 2],
}

/// Reason why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// The limit of nodes, or of channels of one of the two nodes, is reached.
    Limit,
    /// The node sent too many requests.
    TooMany,
    /// The other node is not registered.
    NotRegistered,
}

impl RelayServer {
    pub(crate) fn new(limits: RelayLimits) -> Self {
        // The burst is what is sent in one second: a batch of 64 KiB must fit.
        let budget = Rate::per_second(limits.bits_per_second, limits.bits_per_second);
        Self {
            limits,
            nodes: BTreeMap::new(),
            channels: BTreeMap::new(),
            by_pair: BTreeMap::new(),
            table: ForwardingTable::new(budget),
            is_changed: true,
        }
    }

    /// Handles the request of `node` to be reached where `source` says.
    pub(crate) fn handle_register(
        &mut self,
        fx: &mut Effects,
        node: WireguardKey,
        source: Source,
        transaction: u64,
    ) {
        match self.register(fx, node, source, transaction) {
            Ok(()) => {}
            Err(reason) => refuse(fx, node, source.path, transaction, reason),
        }
    }

    /// Handles the request of `node`, which came from `source`, for a channel to `other`.
    pub(crate) fn handle_open(
        &mut self,
        fx: &mut Effects,
        (node, source): (WireguardKey, Source),
        other: WireguardKey,
        transaction: u64,
    ) {
        let from = source.path;
        match self.open(fx, (node, source), other) {
            Ok((channel, announce_at)) => {
                let channel = channel.0;
                fx.transmit(node, from, Probe::Opened { transaction, channel });
                for to in announce_at.into_iter().flat_map(|to| [to; INCOMING_COPIES]) {
                    fx.transmit(other, to, Probe::Incoming { channel, peer: node });
                }
            }
            Err(reason) => refuse(fx, node, from, transaction, reason),
        }
    }

    /// Handles a pong of `node`, which proves its path if it answers a challenge. Returns whether it
    /// does.
    pub(crate) fn handle_pong(
        &mut self,
        fx: &mut Effects,
        node: WireguardKey,
        from: Path,
        transaction: u64,
    ) -> bool {
        let Some(registration) = self.nodes.get_mut(&node) else { return false };
        let answers =
            |challenge: &Challenge| challenge.transaction == transaction && challenge.path == from;
        let Some(at) = registration.challenges.iter().position(answers) else { return false };
        let Some(challenge) = registration.challenges.remove(at) else { return false };
        self.accept(fx.now, node, from, challenge.registration.is_some());
        if let Some(transaction) = challenge.registration {
            registered(fx, node, from, transaction);
        }
        true
    }

    /// Handles the channels that carried something since the last call, and closes those that did
    /// not for too long. Answers [`Output::ReportChannels`].
    pub(crate) fn handle_used(
        &mut self,
        fx: &mut Effects,
        used: impl IntoIterator<Item = ChannelId>,
    ) {
        for id in used {
            if let Some(channel) = self.channels.get_mut(&id) {
                channel.used = fx.now;
            }
        }
        self.expire(fx.now);
        if self.nodes.is_empty() {
            fx.timers.cancel(Timer::RelayServer);
        }
    }

    /// Asks which channels were used.
    pub(crate) fn handle_timeout(&self, fx: &mut Effects) {
        fx.output(Output::ReportChannels);
        fx.timers.set(Timer::RelayServer, fx.now + SWEEP);
    }

    /// Removes all nodes for which `stays` returns false, with their channels.
    pub(crate) fn retain(&mut self, stays: impl Fn(&WireguardKey) -> bool) {
        let gone = self.nodes.keys().copied().filter(|node| !stays(node));
        for node in gone.collect::<Vec<_>>() {
            self.remove_node(&node);
        }
    }

    /// Returns the table, if it changed since the last call.
    pub(crate) fn poll_table(&mut self) -> Option<Output> {
        std::mem::take(&mut self.is_changed)
            .then(|| Output::ForwardingTable(Arc::new(self.table.clone())))
    }

    /// Returns the current table.
    pub(crate) fn table(&self) -> &ForwardingTable {
        &self.table
    }

    /// Returns the current state, for status output.
    pub(crate) fn status(&self) -> RelayStatus {
        RelayStatus { nodes: self.nodes.len(), channels: self.channels.len() }
    }

    fn register(
        &mut self,
        fx: &mut Effects,
        node: WireguardKey,
        source: Source,
        transaction: u64,
    ) -> Result<(), Refusal> {
        let from = source.path;
        let registration = self.admit(fx, node)?;
        if source.is_validated && registration.path != Some(from) {
            self.accept(fx.now, node, from, true);
            registered(fx, node, from, transaction);
        } else if registration.path == Some(from) {
            registration.heard = fx.now;
            registered(fx, node, from, transaction);
        } else {
            registration.challenge(fx, node, from, Some(transaction));
        }
        Ok(())
    }

    /// Opens a channel, or finds the one that the pair has. Returns it, and the path on which it has
    /// to be announced to the other node; `None`: it was just announced.
    fn open(
        &mut self,
        fx: &mut Effects,
        (node, source): (WireguardKey, Source),
        other: WireguardKey,
    ) -> Result<(ChannelId, Option<Path>), Refusal> {
        let from = source.path;
        let registration = self.admit(fx, node)?;
        if source.is_validated {
            registration.path.get_or_insert(from);
        }
        let is_proven = source.is_validated || registration.path == Some(from);
        let has_room = |registration: &Registration, limits: &RelayLimits| {
            registration.channels.len() < limits.channels_per_node
        };
        if is_proven {
            registration.heard = fx.now;
        }
        let other_registration = self.nodes.get(&other).filter(|_| node != other);
        let Some(there) = other_registration.and_then(|other| other.path) else {
            return Err(Refusal::NotRegistered);
        };
        let mut pair: Pair = [node, other];
        pair.sort_unstable();
        let (here, opposite) = if pair[0] == node { (0, 1) } else { (1, 0) };
        let known = self.by_pair.get(&pair).copied();
        let id = match known.and_then(|id| Some((id, *self.table.get(id)?))) {
            Some((id, ends)) => {
                self.bind(fx, id, (ends, here), from, is_proven);
                id
            }
            None => {
                let ends = [node, other].map(|end| self.nodes.get(&end));
                let has_room = ends.into_iter().flatten().all(|end| has_room(end, &self.limits));
                if !has_room {
                    return Err(Refusal::Limit);
                }
                let end = |node: WireguardKey| {
                    let (path, is_proven) =
                        if node == other { (there, true) } else { (from, is_proven) };
                    ForwardingEnd { node, path, is_proven }
                };
                self.add(fx, pair, pair.map(end))
            }
        };
        if !is_proven
            && !self.is_proven_end(id, here, from)
            && let Some(registration) = self.nodes.get_mut(&node)
        {
            registration.challenge(fx, node, from, None);
        }
        let channel = self.channels.get_mut(&id).ok_or(Refusal::NotRegistered)?;
        channel.used = fx.now;
        let announced = &mut channel.announced[opposite];
        let is_due = announced.is_none_or(|at| fx.now >= at + INCOMING_PAUSE);
        if is_due {
            *announced = Some(fx.now);
        }
        Ok((id, is_due.then_some(there)))
    }

    /// Returns the registration of a node, which may be new, if the node may send a request now.
    fn admit(
        &mut self,
        fx: &mut Effects,
        node: WireguardKey,
    ) -> Result<&mut Registration, Refusal> {
        if !self.nodes.contains_key(&node) && self.nodes.len() >= self.limits.nodes {
            return Err(Refusal::Limit);
        }
        fx.timers.set_no_later(Timer::RelayServer, fx.now + SWEEP);
        let registration = self.nodes.entry(node).or_insert_with(|| Registration::new(fx.now));
        if !registration.requests.take(&REQUESTS, fx.now, 1) {
            return Err(Refusal::TooMany);
        }
        Ok(registration)
    }

    /// Adds a channel with a random number, so that nobody can guess it.
    fn add(&mut self, fx: &mut Effects, pair: Pair, ends: [ForwardingEnd; 2]) -> ChannelId {
        let id = loop {
            let id = ChannelId(fx.rng.random());
            if !self.channels.contains_key(&id) {
                break id;
            }
        };
        let channel = Channel { used: fx.now, wanted: [None; 2], announced: [None; 2] };
        self.channels.insert(id, channel);
        self.by_pair.insert(pair, id);
        for node in pair {
            if let Some(registration) = self.nodes.get_mut(&node) {
                registration.channels.insert(id);
            }
        }
        self.set_ends(id, ends);
        id
    }

    /// Binds an end of a channel to the path that its node asked from. A path that is proven is
    /// replaced only by one that is, too.
    fn bind(
        &mut self,
        fx: &Effects,
        id: ChannelId,
        (mut ends, here): ([ForwardingEnd; 2], usize),
        from: Path,
        is_proven: bool,
    ) {
        let Some(channel) = self.channels.get_mut(&id) else { return };
        channel.used = fx.now;
        let end = &mut ends[here];
        if end.path == from {
            end.is_proven |= is_proven;
        } else if is_proven || !end.is_proven {
            (end.path, end.is_proven) = (from, is_proven);
        } else {
            channel.wanted[here] = Some(from);
            return;
        }
        channel.wanted[here] = None;
        self.set_ends(id, ends);
    }

    /// Handles that `node` proved `path`: it is reached there from now on if it `registers`, or is
    /// registered nowhere.
    fn accept(&mut self, now: Instant, node: WireguardKey, path: Path, registers: bool) {
        let Some(registration) = self.nodes.get_mut(&node) else { return };
        registration.heard = now;
        let mut before = None;
        if registers || registration.path.is_none() {
            before = registration.path.replace(path);
        }
        for id in registration.channels.clone() {
            self.prove(id, node, path, before);
        }
    }

    /// Handles that `node` proved `path`. Its end of a channel moves there if it asked for that, or
    /// if the end was at the path of its registration `before`.
    fn prove(&mut self, id: ChannelId, node: WireguardKey, path: Path, before: Option<Path>) {
        let Some(mut ends) = self.table.get(id).copied() else { return };
        let Some(channel) = self.channels.get_mut(&id) else { return };
        for (end, wanted) in ends.iter_mut().zip(&mut channel.wanted) {
            let moves = end.path == path || *wanted == Some(path) || before == Some(end.path);
            if end.node == node && moves {
                (end.path, end.is_proven) = (path, true);
                *wanted = None;
            }
        }
        self.set_ends(id, ends);
    }

    fn is_proven_end(&self, id: ChannelId, here: usize, path: Path) -> bool {
        let end = self.table.get(id).map(|ends| ends[here]);
        end.is_some_and(|end| end.is_proven && end.path == path)
    }

    fn set_ends(&mut self, id: ChannelId, ends: [ForwardingEnd; 2]) {
        if self.table.get(id) != Some(&ends) {
            self.table.insert(id, ends);
            self.is_changed = true;
        }
    }

    fn expire(&mut self, now: Instant) {
        let is_silent = |since: Instant| now.saturating_duration_since(since) > CHANNEL_LIFETIME;
        let closed = self.channels.iter().filter(|(_, channel)| is_silent(channel.used));
        for id in closed.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.close(id);
        }
        // A node with an open channel stays, because that channel was used recently.
        let gone = self.nodes.iter().filter(|(_, node)| is_silent(node.heard));
        let gone = gone.filter(|(_, node)| node.channels.is_empty()).map(|(key, _)| *key);
        for node in gone.collect::<Vec<_>>() {
            self.remove_node(&node);
        }
    }

    fn remove_node(&mut self, node: &WireguardKey) {
        let Some(registration) = self.nodes.remove(node) else { return };
        for id in registration.channels {
            self.close(id);
        }
    }

    fn close(&mut self, id: ChannelId) {
        self.channels.remove(&id);
        let Some(ends) = self.table.remove(id) else { return };
        self.is_changed = true;
        let pair = ends.map(|end| end.node);
        self.by_pair.remove(&pair);
        for node in pair {
            if let Some(registration) = self.nodes.get_mut(&node) {
                registration.channels.remove(&id);
            }
        }
    }
}

impl Registration {
    fn new(now: Instant) -> Self {
        Self {
            path: None,
            heard: now,
            channels: BTreeSet::new(),
            challenges: VecDeque::new(),
            requests: TokenBucket::default(),
        }
    }

    /// Has the node prove that it is at `path`. The registration with the transaction
    /// `registration` is confirmed then.
    fn challenge(
        &mut self,
        fx: &mut Effects,
        node: WireguardKey,
        path: Path,
        registration: Option<u64>,
    ) {
        let known = self.challenges.iter_mut().find(|challenge| challenge.path == path);
        if let Some(challenge) = known {
            challenge.registration = registration.or(challenge.registration);
            if fx.now < challenge.sent + CHALLENGE_PAUSE {
                return;
            }
            challenge.sent = fx.now;
            let transaction = challenge.transaction;
            return fx.transmit(node, path, Probe::Ping { transaction });
        }
        if self.challenges.len() == CHALLENGES {
            self.challenges.pop_front();
        }
        let transaction = fx.rng.random();
        self.challenges.push_back(Challenge { path, transaction, sent: fx.now, registration });
        for _ in 0..CHALLENGE_COPIES {
            fx.transmit(node, path, Probe::Ping { transaction });
        }
    }
}

fn registered(fx: &mut Effects, node: WireguardKey, to: Path, transaction: u64) {
    fx.transmit(node, to, Probe::Registered { transaction, lifetime: CHANNEL_LIFETIME });
}

/// Refuses a request. A node that sends too many gets no answer.
fn refuse(fx: &mut Effects, node: WireguardKey, to: Path, transaction: u64, reason: Refusal) {
    tracing::debug!(?reason, "request to the relay refused");
    fx.counters.relay_requests_refused += 1;
    match reason {
        Refusal::Limit | Refusal::NotRegistered => {
            fx.transmit(node, to, Probe::Refused { transaction });
        }
        Refusal::TooMany => {}
    }
}
