//! Messages from the peer, or from a relay about it. All of them are authentic; each may be a
//! replay, or false information of that peer or relay.

use std::time::Duration;

use towline_types::limits;
use towline_types::node::Candidate;
use towline_types::rate::Rate;

use super::{HEARD_FOR, MOVE_MIN, Peer, PeerContext, Tier, source_credit};
use crate::local_node::is_outer;
use crate::path::Path;
use crate::peer_history::PathChange;
use crate::pings::{Purpose, Sent};
use crate::probing::CallOrder;
use crate::status::PeerState;
use crate::timers::Timer;

/// Shortest time between two checks of one path that answer a message of the peer.
const CHECK_MIN: Duration = Duration::from_millis(100);
/// Time for which candidates of a call are worth a try.
const SIGNALLED_FOR: Duration = Duration::from_secs(120);
/// Pings of one peer that are handled, per second and in a burst: a peer whose pings are replayed
/// costs no more.
const PINGS: Rate = Rate::per_second(60, 60);
/// Calls of an earlier boot epoch than the last one that are accepted. An epoch goes back with a clock
/// or a disk, and a call may be the only way to meet the peer; a replay costs little at this rate.
const EARLIER_CALLS: Rate = Rate::one_per(Duration::from_secs(5), 1);
/// Time within which the pong has to come that validates an address to which the peer roamed.
const ROAMING_FOR: Duration = Duration::from_secs(3);
/// Signals of one peer that are accepted, per second and in a burst.
const SIGNALS: Rate = Rate::per_second(4, 4);
/// Channels to one peer that are accepted, per second and in a burst: relays repeat each a few times.
const CHANNELS: Rate = Rate::per_second(32, 32);

impl Peer {
    /// Handles a ping, which the data plane answered, or a proof: checks the path that it came over.
    pub(crate) fn handle_ping(&mut self, cx: &mut PeerContext<'_>, from: Path) {
        if !cx.local.can_send_to_node(from.remote) {
            return;
        }
        // A node that replays pings from elsewhere does not use up the budget of the path in use.
        let elsewhere = self.path().is_none_or(|path| !path.is(&from));
        if !self.pings[usize::from(elsewhere)].take(&PINGS, cx.fx.now, 1) {
            cx.fx.counters.pings_refused += 1;
            return;
        }
        self.sources.add(cx.fx.now, from.remote, source_credit::ANSWERED_PING);
        let from = cx.local.canonical(from);
        let new = self.paths.get(&from).is_none();
        self.paths.heard(cx.fx.now, from, self.endpoint);
        if self.state == PeerState::Up {
            // It calls from somewhere else: perhaps because the way that we know has ended.
            if new && self.endpoint != Some(from) {
                self.ping(cx, from, Purpose::Check);
                if self.liveness.is_used(cx.fx.now) || cx.is_eager {
                    cx.fx.timers.set_no_later(Timer::Probe(self.id()), cx.fx.now);
                }
            }
            return;
        }
        // It is there, it knows us, and this way leads from it to us: see about the other way.
        let known = self.paths.get(&from).and_then(|known| known.checked);
        if known.is_none_or(|at| cx.fx.now >= at + CHECK_MIN) {
            self.ping(cx, from, Purpose::Check);
        }
        self.answer(cx, from);
        match self.state {
            PeerState::Down | PeerState::Idle => self.try_again(cx),
            PeerState::Connecting | PeerState::Up => {}
        }
    }

    /// Handles an authentic pong that answers `sent`, over the same path.
    pub(crate) fn handle_pong(&mut self, cx: &mut PeerContext<'_>, sent: &Sent) {
        let path = sent.to;
        let rtt = cx.fx.now.saturating_duration_since(sent.at);
        cx.probing.unanswered.answered(self.id(), path.remote.ip());
        if sent.purpose == Purpose::Train {
            self.pmtu.train_answered(path);
            return;
        }
        if let Purpose::Size(size) = sent.purpose {
            if self.pmtu.answered(path, size) {
                cx.fx.timers.set(Timer::Mtu(self.id()), cx.fx.now);
            }
            return;
        }
        self.paths.answered(cx.fx.now, path, self.endpoint, rtt);
        let roamed = self.roaming.take_if(|(to, _)| *to == path);
        if let Some((_, at)) = roamed
            && cx.fx.now < at + ROAMING_FOR
            && self.path().is_some_and(|current| current != path)
        {
            self.set_endpoint(cx, Some(path), PathChange::Roamed);
            cx.fx.timers.set(Timer::Probe(self.id()), cx.fx.now);
            return;
        }
        match self.path() {
            Some(current) if current == path => {
                if self.liveness.doubtful().is_some() {
                    // Other paths were asked too: they may be better all the same.
                    self.compared = None;
                }
                match self.liveness.pong(cx.fx.now, sent.at, self.needs_keepalive(cx)) {
                    Some(at) => cx.fx.timers.set(Timer::Probe(self.id()), at),
                    None => cx.fx.timers.cancel(Timer::Probe(self.id())),
                }
                if sent.purpose == Purpose::Path {
                    self.compare(cx, current);
                }
                self.move_to_better(cx, current);
            }
            Some(current) => {
                let doubtful = self.liveness.doubtful().is_some_and(|doubt| sent.at >= doubt);
                if doubtful && self.can_yield(current, path) {
                    self.take_over(cx, path);
                } else {
                    self.move_to_better(cx, current);
                }
            }
            None => self.answer(cx, path),
        }
    }

    /// Follows the peer to another address, once that is validated: anybody on the way can change the
    /// source of a datagram.
    pub(super) fn roamed(&mut self, cx: &mut PeerContext<'_>, from: Path) {
        if !cx.local.can_send_to_node(from.remote) {
            return;
        }
        self.sources.add(cx.fx.now, from.remote, source_credit::DATA);
        let from = cx.local.canonical(from);
        let answered = self.paths.get(&from).and_then(|known| known.answered);
        let known = answered.is_some();
        let is_validated = answered.is_some_and(|at| cx.fx.now < at + HEARD_FOR);
        self.paths.heard(cx.fx.now, from, self.endpoint);
        self.roaming = None;
        if self.endpoint == Some(from) {
            return;
        }
        let late =
            self.left.is_some_and(|(path, at)| path == from && cx.fx.now < at + MOVE_MIN * 2);
        let worse = self.path().is_some_and(|path| {
            Tier::of(&path) < Tier::of(&from) && self.paths.rtt(&path).is_some()
        });
        if self.state == PeerState::Up && (late || worse || known && self.is_leader(cx.local)) {
            // We know of it, and chose another one: see whether that still works.
            tracing::debug!(%from, late, worse, "roaming not followed");
            self.ping(cx, from, Purpose::Check);
            cx.fx.timers.set_no_later(Timer::Probe(self.id()), cx.fx.now);
            return;
        }
        if !is_validated {
            tracing::debug!(%from, "roaming followed once a pong comes from there");
            self.roaming = Some((from, cx.fx.now));
            self.ping(cx, from, Purpose::Check);
            return;
        }
        self.set_endpoint(cx, Some(from), PathChange::Roamed);
        if self.state == PeerState::Up {
            cx.fx.timers.set(Timer::Probe(self.id()), cx.fx.now);
        }
    }

    /// Handles a call: the peer asks for handshakes and pings at `candidates`. A call that is not
    /// newer than the last one is a replay or was overtaken: it is refused.
    pub(crate) fn handle_call(
        &mut self,
        cx: &mut PeerContext<'_>,
        order: CallOrder,
        candidates: &[Candidate],
    ) {
        let fresh = order > self.last_call
            || order.boot_epoch < self.last_call.boot_epoch
                && self.earlier_calls.take(&EARLIER_CALLS, cx.fx.now, 1);
        if !fresh || !self.calls.take(&SIGNALS, cx.fx.now, 1) {
            tracing::debug!(?order, fresh, "call refused");
            cx.fx.counters.signals_refused += 1;
            return;
        }
        self.last_call = order;
        if candidates.iter().any(is_outer) {
            self.called = Some(cx.fx.now);
        }
        self.signalled.retain(|_, until| cx.fx.now < *until);
        for candidate in candidates {
            let room = self.signalled.len() < limits::CANDIDATES;
            if room && cx.local.can_send_to_node(candidate.address()) {
                self.signalled.insert(candidate.address(), cx.fx.now + SIGNALLED_FOR);
            } else {
                cx.fx.counters.candidates_refused += 1;
            }
        }
        match self.path() {
            Some(path) if !path.is_relayed() && self.has_session => {
                // It may have lost us without our noticing, and our NAT lets it in again only where
                // we send something to.
                cx.fx.timers.set_no_later(Timer::Probe(self.id()), cx.fx.now);
                for to in candidates.iter().flat_map(|to| cx.local.paths_to(to.address())) {
                    if to != path && cx.local.can_send_to_node(to.remote) {
                        self.ping(cx, to, Purpose::Check);
                    }
                }
            }
            Some(_) => self.hurry(cx),
            None => self.try_again(cx),
        }
    }

    /// Handles a channel that a relay opened, at our request or at that of the peer.
    pub(crate) fn handle_channel(&mut self, cx: &mut PeerContext<'_>, path: Path) {
        if !self.channels.take(&CHANNELS, cx.fx.now, 1) {
            cx.fx.counters.relay_answers_refused += 1;
            return;
        }
        let path = cx.local.canonical(path);
        let new = self.paths.opened(cx.fx.now, path, self.endpoint);
        if !new && self.state == PeerState::Up {
            return;
        }
        self.ping(cx, path, Purpose::Check);
        match self.state {
            PeerState::Up => self.hurry(cx),
            PeerState::Idle | PeerState::Down => self.try_again(cx),
            PeerState::Connecting => {}
        }
        // Only once: an initiation replaces the previous one, and the relay reports a channel several times.
        if new && self.path().is_none() && self.is_initiator(cx.local) {
            self.initiate(cx, vec![path]);
        }
    }
}
