//! One peer: how it is reached, and whether it still is.
//!
//! - [`paths`]: what is known of each path, and which is the best.
//! - [`peer_candidates`]: addresses at which it might be reached, and what is sent to them.
//! - [`connect_schedule`]: when attempts are made, while there is no path or none good enough.
//! - [`inbound`]: messages from the peer, or from a relay about it.
//! - [`liveness`]: whether the one that carries traffic still does.
//! - [`loss`]: how many pings on it are lost.
//! - [`source_credit`]: how much is sent to an address that is known only as a source.
//! - [`pmtu`]: how large a datagram it takes.
//! - [`trains`]: whether it takes several that are sent together.
//! - [`local_changes`]: what a change of our own addresses, uplinks or port means for it.
//! - [`why`]: why it is not up, or up through a relay alone.
//!
//! # From nothing to the best path
//!
//! ```text
//!  Idle ── traffic, or a small mesh ──► Connecting ── handshake ──► Up (relayed) ──► Up (direct)
//!   ▲                                    ▲   │ 10 s      ▲              │  pongs came on a direct
//!   │ nothing sent for long              │   ▼           │              │  path: fresh handshake
//!   └──────────────────────────────── dead  Down ────────┘              ▼  there
//!                                     path   (goes on trying)      attempts go on, at longer and longer pauses
//! ```
//!
//! The path on which a handshake completed becomes the path in use, so traffic starts over a relay
//! where that is faster to get. Of the two nodes the one with the lower key is in charge of moving
//! it to a better path, by a fresh handshake there: the old session keeps its own replay window, so
//! nothing is lost, and the other node simply follows the handshake. One that is left behind on a
//! relay moves by itself after a second. Either of them may leave a path that is dead.

mod connect_schedule;
mod inbound;
mod liveness;
mod local_changes;
mod loss;
mod paths;
mod peer_candidates;
pub(crate) mod pmtu;
mod source_credit;
mod trains;
mod why;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use towline_types::backoff::Jitter;
use towline_types::id::{NodeId, WireguardKey};
use towline_types::mtu::Mtu;
use towline_types::node::Node;
use towline_types::rate::TokenBucket;

use crate::changes::{Change, PeerId};
use crate::effects::Effects;
use crate::home_relays::HomeRelays;
use crate::local_node::{LocalNode, is_reachable};
use crate::output::Output;
use crate::path::Path;
use crate::peer_history::{Changed, PathChange, PeerHistory};
use crate::peer_table::{Observation, REKEY_TIMEOUT};
use crate::pings::Purpose;
use crate::probing::{CallOrder, Probing};
use crate::status::PeerState;
use crate::stun_client::Mapping;
use crate::timers::{Timer, Timers};

use connect_schedule::ConnectSchedule;
use liveness::{Liveness, Verdict};
use paths::{HEARD_FOR, Paths, Tier};
use pmtu::Pmtu;
use source_credit::SourceCredit;

/// Time of attempts without success after which a peer is down.
pub(crate) const DOWN_AFTER: Duration = Duration::from_secs(10);
/// Time without traffic after which a peer is not tried any more, in a mesh that connects on need.
const IDLE_AFTER: Duration = Duration::from_secs(600);
/// Shortest time between two handshakes that move traffic to a better path.
const MOVE_MIN: Duration = Duration::from_millis(500);
/// Time that the node in charge has to move traffic off a relay before the other one does.
const LEFT_BEHIND: Duration = Duration::from_secs(1);
/// Interval at which other good paths are pinged while one is in use.
const ALTERNATIVES: Duration = Duration::from_secs(10);
/// Time without anything from a peer after which it may have ended, if nothing checks it. Longer than
/// the interval of keepalives.
const UNCHECKED: Duration = Duration::from_secs(30);
/// Attempts of a series that open our NAT first, until the peer has called: 0.5 s.
const OPENING: u32 = 4;
/// Time for which attempts open our NAT first, in however many series.
const OPENING_FOR: Duration = Duration::from_millis(1_500);
/// Time from the first attempt that opens our NAT to the next time that attempts do so.
const OPENING_AGAIN: Duration = Duration::from_secs(10);
/// Additional wait for the answer to a padded ping, which takes longer to send.
const MTU_WAIT: Duration = Duration::from_millis(100);

/// What a peer may use while it handles something.
pub(crate) struct PeerContext<'a> {
    pub(crate) fx: &'a mut Effects,
    pub(crate) probing: &'a mut Probing,
    pub(crate) relays: &'a mut HomeRelays,
    pub(crate) local: &'a LocalNode,
    /// True if the mesh is so small that all of it is kept connected.
    pub(crate) is_eager: bool,
}

/// Conditions of the network, to explain the state of a peer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NetworkConditions {
    /// True if the mesh has relays.
    pub(crate) has_relays: bool,
    /// True if the mesh has relays, and none answers.
    pub(crate) are_relays_silent: bool,
    /// True if no reflector ever answered.
    pub(crate) is_silent: bool,
    /// Mapping behaviour of our NAT, once it is known.
    pub(crate) mapping: Option<Mapping>,
}

/// One peer; see the module.
#[derive(Debug)]
pub(crate) struct Peer {
    node: Arc<Node>,
    state: PeerState,
    /// Time of the last change of state.
    since: Instant,
    /// Time at which it was last up, or at which attempts began.
    trying_since: Instant,
    /// Schedule of the attempts.
    schedule: ConnectSchedule,
    /// WireGuard endpoint: the path of the last handshake or authentic datagram.
    endpoint: Option<Path>,
    /// Time at which `endpoint` was set.
    endpoint_since: Option<Instant>,
    /// Previous endpoint, and the time at which it was left: late datagrams still come from there.
    left: Option<(Path, Instant)>,
    /// True once a handshake completed. Cleared when the session ends or is in doubt.
    has_session: bool,
    /// Time at which the last handshake completed.
    last_handshake: Option<Instant>,
    /// Better path on which we began a handshake last, and when.
    moved: Option<(Path, Instant)>,
    /// Time at which the other good paths were pinged last.
    compared: Option<Instant>,
    paths: Paths,
    history: PeerHistory,
    liveness: Liveness,
    pmtu: Pmtu,
    /// Candidates of calls, and until when each is worth a try.
    signalled: BTreeMap<SocketAddr, Instant>,
    /// Order of the last call that was accepted.
    last_call: CallOrder,
    /// Limit of calls of an earlier boot epoch.
    earlier_calls: TokenBucket,
    /// Path to which the peer roamed, and when. It is followed once a pong comes over it.
    roaming: Option<(Path, Instant)>,
    /// What may be sent to addresses that are known only as sources.
    sources: SourceCredit,
    /// Time of the last call that was accepted and named a public IPv4 address of the peer.
    called: Option<Instant>,
    /// Time of our first call that named a public IPv4 address of ours.
    told: Option<Instant>,
    /// Time of the first attempt that opened our NAT only. Cleared when our port changes.
    opening_since: Option<Instant>,
    /// Limits of pings that are handled: on the path in use, and elsewhere.
    pings: [TokenBucket; 2],
    calls: TokenBucket,
    channels: TokenBucket,
}

impl Peer {
    /// Returns a peer that is to be connected after `delay`; `None`: when there is traffic for it.
    pub(crate) fn new(fx: &mut Effects, node: Arc<Node>, delay: Option<Duration>) -> Self {
        let state = if delay.is_some() { PeerState::Connecting } else { PeerState::Idle };
        let peer = Self {
            node,
            state,
            since: fx.now,
            trying_since: fx.now,
            schedule: ConnectSchedule::new(fx.now),
            endpoint: None,
            endpoint_since: None,
            left: None,
            has_session: false,
            last_handshake: None,
            moved: None,
            compared: None,
            paths: Paths::default(),
            history: PeerHistory::default(),
            liveness: Liveness::default(),
            pmtu: Pmtu::default(),
            signalled: BTreeMap::new(),
            last_call: CallOrder::default(),
            earlier_calls: TokenBucket::default(),
            roaming: None,
            sources: SourceCredit::default(),
            called: None,
            told: None,
            opening_since: None,
            pings: <[TokenBucket; 2]>::default(),
            calls: TokenBucket::default(),
            channels: TokenBucket::default(),
        };
        if let Some(delay) = delay {
            fx.timers.set(Timer::Attempt(peer.id()), fx.now + delay);
        }
        peer
    }

    pub(crate) fn id(&self) -> NodeId {
        self.node.id()
    }

    pub(crate) fn key(&self) -> WireguardKey {
        self.node.wireguard_key()
    }

    pub(crate) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    pub(crate) fn state(&self) -> PeerState {
        self.state
    }

    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    pub(crate) fn endpoint(&self) -> Option<Path> {
        self.endpoint
    }

    pub(crate) fn last_handshake(&self) -> Option<Instant> {
        self.last_handshake
    }

    /// Returns the path that carries traffic.
    pub(crate) fn path(&self) -> Option<Path> {
        self.endpoint.filter(|_| self.state == PeerState::Up)
    }

    /// Returns the share of the last pings on the path in use that were lost, from 0 to 1.
    pub(crate) fn loss(&self) -> Option<f64> {
        self.path()?;
        self.liveness.loss()
    }

    /// Returns the changes of state and path that are remembered, the oldest first.
    pub(crate) fn history(&self) -> &PeerHistory {
        &self.history
    }

    pub(crate) fn rtt(&self) -> Option<Duration> {
        self.paths.rtt(&self.path()?)
    }

    /// Returns for how long nothing came from a peer that is up, if nothing checks whether it still is:
    /// nothing is sent to it, and the mesh connects on need.
    pub(crate) fn unchecked_for(&self, now: Instant, is_eager: bool) -> Option<Duration> {
        let path = self.path().filter(|_| !is_eager && !self.liveness.is_used(now))?;
        let heard = self.paths.get(&path).and_then(|known| known.heard).max(self.last_handshake)?;
        let time = now.saturating_duration_since(heard);
        (time >= UNCHECKED).then_some(time)
    }

    /// Returns the largest inner packet that its path takes, once that is known.
    pub(crate) fn mtu(&self) -> Option<u16> {
        let path = self.endpoint?;
        if self.pmtu.path() == Some(path) { self.pmtu.inner() } else { None }
    }

    /// Returns the largest inner packet to send now. `None`: the link's MTU holds.
    pub(crate) fn applied_mtu(&self) -> Option<u16> {
        let path = self.endpoint?;
        if self.pmtu.path() == Some(path) { self.pmtu.applied() } else { None }
    }

    /// Returns whether each datagram is to be sent by itself.
    pub(crate) fn is_single(&self) -> bool {
        self.endpoint.is_some()
            && self.pmtu.path() == self.endpoint
            && self.pmtu.is_bad_for_trains()
    }

    /// Cancels all deadlines of the peer, which was removed.
    pub(crate) fn forget(&self, timers: &mut Timers) {
        for timer in [Timer::Attempt(self.id()), Timer::Probe(self.id()), Timer::Mtu(self.id())] {
            timers.cancel(timer);
        }
    }

    /// Cancels the first attempt, unless it was made already or something was sent to the peer: the mesh is so
    /// large that a peer is connected when there is traffic for it.
    pub(crate) fn cancel_first_attempt(&mut self, cx: &mut PeerContext<'_>) {
        if self.state == PeerState::Connecting
            && self.schedule.attempts() == 0
            && !self.liveness.has_been_used()
        {
            self.set_state(cx, PeerState::Idle);
        }
    }

    /// Connects an idle peer after `delay`, or checks the path of one that is up: the mesh has become so small
    /// that all of it is kept connected.
    pub(crate) fn become_eager(&mut self, cx: &mut PeerContext<'_>, delay: Duration) {
        let timer = match self.state {
            PeerState::Idle => {
                self.schedule.restart(cx.fx.now);
                self.set_state(cx, PeerState::Connecting);
                Timer::Attempt(self.id())
            }
            PeerState::Up => Timer::Probe(self.id()),
            PeerState::Connecting | PeerState::Down => return,
        };
        cx.fx.timers.set_no_later(timer, cx.fx.now + delay);
    }

    /// Takes a newer record, or another grant.
    pub(crate) fn set_node(&mut self, cx: &mut PeerContext<'_>, node: Arc<Node>) {
        let (old, new) = (self.node.record(), node.record());
        let rebooted = new.boot_epoch > old.boot_epoch;
        let moved = new.candidates != old.candidates;
        let other_key = self.node.wireguard_key() != node.wireguard_key();
        self.node = node;
        if other_key {
            // Another tunnel: nothing of the old one holds.
            self.has_session = false;
            self.set_endpoint(cx, None, PathChange::KeyChanged);
        }
        let wanted = cx.is_eager || self.state != PeerState::Idle;
        if other_key || rebooted {
            // A peer that started again has forgotten our session, and is waiting for us if it
            // cannot call us itself.
            if wanted {
                self.try_again(cx);
            }
        } else if moved && wanted {
            match self.path() {
                None => self.try_again(cx),
                // Perhaps a better path than this.
                Some(path) if path.is_relayed() => self.hurry(cx),
                Some(_) => {}
            }
        }
    }

    /// Makes the attempt that is due.
    pub(crate) fn attempt(&mut self, cx: &mut PeerContext<'_>) {
        let wanted = cx.is_eager || self.liveness.is_recent(cx.fx.now);
        match self.state {
            // There is a path and the session is to be renewed on it.
            PeerState::Up if !self.has_session && self.liveness.is_used(cx.fx.now) => {
                let renewing = self.schedule.attempts() < 6;
                if !renewing {
                    self.set_state(cx, PeerState::Connecting);
                }
            }
            PeerState::Up if !self.needs_better(cx) => return,
            PeerState::Connecting | PeerState::Down
                if !wanted && cx.fx.now >= self.trying_since + self.patience() =>
            {
                self.set_state(cx, PeerState::Idle);
                return;
            }
            PeerState::Connecting if cx.fx.now >= self.trying_since + DOWN_AFTER => {
                self.set_state(cx, PeerState::Down);
            }
            PeerState::Idle => self.set_state(cx, PeerState::Connecting),
            PeerState::Up | PeerState::Connecting | PeerState::Down => {}
        }
        let connected = self.state == PeerState::Up && self.has_session;
        let attempt = self.schedule.next(cx.fx.now, self.is_initiator(cx.local), &mut cx.fx.rng);
        let opens = attempt.number < OPENING && self.opens_first(cx);
        let targets = self.targets(cx);
        let (closed, mut targets): (Vec<Path>, Vec<Path>) =
            targets.into_iter().partition(|to| opens && self.may_be_closed(cx.fx.now, to));
        for to in closed {
            self.open_nat(cx, to);
        }
        if attempt.seeks_help {
            self.seek_help(cx, attempt.number);
        }
        tracing::debug!(
            number = attempt.number,
            paths = targets.len(),
            connected,
            opens,
            "attempt"
        );
        if connected {
            targets.retain(|to| Some(*to) != self.endpoint);
        } else if attempt.has_initiation && self.initiate(cx, targets.clone()) {
            self.schedule.initiated(cx.fx.now);
        }
        for to in targets {
            self.ping(cx, to, Purpose::Check);
        }
        cx.fx.timers.set(Timer::Attempt(self.id()), cx.fx.now + attempt.pause);
    }

    /// Returns how long the peer is tried in a mesh that connects on need, though nothing is sent
    /// to it.
    fn patience(&self) -> Duration {
        if self.liveness.has_been_used() { IDLE_AFTER } else { DOWN_AFTER }
    }

    /// Sends the ping on the path that is due, or leaves the path if too many were not answered.
    pub(crate) fn probe(&mut self, cx: &mut PeerContext<'_>) {
        let Some(path) = self.path() else { return };
        let verdict = self.liveness.due(cx.fx.now, self.paths.wait(&path));
        if let Some(doubt) = self.liveness.doubtful()
            && let Some(other) = self.paths.best(cx.fx.now, cx.fx.now - doubt, Some(path))
            && self.can_yield(path, other)
        {
            self.take_over(cx, other);
            return;
        }
        let pause = match verdict {
            Verdict::Dead => {
                tracing::debug!(%path, "path given up: no pong in time");
                self.left = Some((path, cx.fx.now));
                self.set_state(cx, PeerState::Connecting);
                self.try_again(cx);
                return;
            }
            Verdict::Doubt(pause) => {
                tracing::debug!(%path, "path in doubt: other paths are pinged");
                cx.relays.suspect(cx.fx, path.remote);
                self.seek_help(cx, 1);
                for to in self.targets(cx) {
                    self.ping(cx, to, Purpose::Check);
                }
                pause
            }
            Verdict::Ping(pause) => pause,
        };
        self.ping(cx, path, Purpose::Path);
        cx.fx.timers.set(Timer::Probe(self.id()), cx.fx.now + pause);
    }

    /// Makes the step of the path MTU search that is due.
    pub(crate) fn search_mtu(&mut self, cx: &mut PeerContext<'_>) {
        let Some(path) = self.path().filter(|path| self.pmtu.path() == Some(*path)) else { return };
        if !cx.is_eager && !self.liveness.is_used(cx.fx.now) {
            return;
        }
        let (before, was_bad) = (self.pmtu.inner(), self.pmtu.is_bad_for_trains());
        let step = self.pmtu.step(cx.fx.now, cx.local.link_mtu());
        for size in step.sizes {
            self.ping(cx, path, Purpose::Size(size));
        }
        if let Some(size) = step.train {
            self.ping_by_train(cx, path, size);
        }
        if !was_bad && self.pmtu.is_bad_for_trains() {
            tracing::debug!(%path, "datagrams that are sent together do not arrive: sent singly");
        }
        if self.pmtu.inner() != before {
            tracing::debug!(%path, mtu = self.pmtu.inner(), "path MTU found");
        }
        let pause = step.pause.unwrap_or_else(|| self.paths.wait(&path) + MTU_WAIT);
        cx.fx.timers.set(Timer::Mtu(self.id()), cx.fx.now + pause);
    }

    /// Handles an observation of the data plane.
    pub(crate) fn handle_observation(&mut self, cx: &mut PeerContext<'_>, what: Observation) {
        match what {
            Observation::Handshake { from } => self.handshake(cx, from),
            Observation::Roamed { from } => self.roamed(cx, from),
            // The next round is scheduled; while up, the tunnel repeats its own re-key.
            Observation::HandshakeUnanswered => {}
            Observation::SessionExpired => {
                self.has_session = false;
                match self.state {
                    PeerState::Up if self.liveness.is_used(cx.fx.now) => self.renew(cx),
                    PeerState::Up if cx.is_eager => {}
                    PeerState::Up => self.set_state(cx, PeerState::Idle),
                    // The data plane goes on for a while with a handshake of a peer that was given up. If its end
                    // began another attempt, that one would be followed by the next, without end.
                    PeerState::Idle if !cx.is_eager => {}
                    PeerState::Idle | PeerState::Connecting | PeerState::Down => self.renew(cx),
                }
            }
            // Also while up: perhaps only our side lost the session, or it was never confirmed.
            Observation::Wanted => {
                self.traffic(cx);
                self.renew(cx);
            }
            Observation::Active { by_endpoint, .. } => {
                if by_endpoint {
                    self.liveness.data(cx.fx.now);
                }
                self.traffic(cx);
            }
            Observation::TooBig { path, payload } => {
                let path = cx.local.canonical(path);
                if self.pmtu.too_big(path, payload) {
                    cx.fx.timers.set(Timer::Mtu(self.id()), cx.fx.now);
                }
            }
        }
    }

    /// Sends an operator's ping on the path, or to everywhere while there is none.
    pub(crate) fn operator_ping(&mut self, cx: &mut PeerContext<'_>, id: u64) {
        self.traffic(cx);
        match self.path() {
            Some(path) => {
                self.ping(cx, path, Purpose::Operator(id));
            }
            None => {
                let opens = self.schedule.attempts() < OPENING && self.opens_first(cx);
                for to in self.targets(cx) {
                    if !opens || !self.may_be_closed(cx.fx.now, &to) {
                        self.ping(cx, to, Purpose::Operator(id));
                    }
                }
                if self.state == PeerState::Idle {
                    self.try_again(cx);
                }
            }
        }
    }

    fn handshake(&mut self, cx: &mut PeerContext<'_>, from: Path) {
        self.has_session = true;
        self.last_handshake = Some(cx.fx.now);
        if !cx.local.can_send_to_node(from.remote) {
            return;
        }
        let from = cx.local.canonical(from);
        self.paths.heard(cx.fx.now, from, self.endpoint);
        self.roaming = None;
        let was = self.path();
        if was.is_some_and(|was| Tier::of(&was) < Tier::of(&from)) && self.is_new_there(cx.fx.now) {
            // They crossed: this one began before the better way was found.
            tracing::debug!(%from, path = ?was, "handshake on a worse path ignored");
            return;
        }
        // Round-trip times may have changed since we chose it.
        let is_chosen = self
            .moved
            .is_some_and(|(to, at)| cx.local.canonical(to) == from && cx.fx.now < at + MOVE_MIN);
        let is_better = was.is_some_and(|was| {
            is_chosen
                || Tier::of(&from) < Tier::of(&was)
                || self.paths.better(cx.fx.now, was) == Some(from)
        });
        let reason = if is_better { PathChange::Better } else { PathChange::Handshake };
        self.set_endpoint(cx, Some(from), reason);
        if was == Some(from) {
            self.liveness.handshake(cx.fx.now);
            return;
        }
        self.set_state(cx, PeerState::Up);
        cx.fx.timers.set(Timer::Probe(self.id()), cx.fx.now);
        self.settle(cx);
    }

    /// Returns whether the peer took its path only just now.
    fn is_new_there(&self, now: Instant) -> bool {
        self.endpoint_since.is_some_and(|at| now < at + MOVE_MIN)
    }

    /// Schedules attempts to find a better path, unless there can be none.
    fn settle(&self, cx: &mut PeerContext<'_>) {
        if self.needs_better(cx) {
            cx.fx.timers.set_no_later(Timer::Attempt(self.id()), cx.fx.now + MOVE_MIN);
        } else {
            cx.fx.timers.cancel(Timer::Attempt(self.id()));
        }
    }

    /// Records inner traffic.
    fn traffic(&mut self, cx: &mut PeerContext<'_>) {
        let was_used = self.liveness.is_used(cx.fx.now);
        let unsure = self.liveness.traffic(cx.fx.now);
        if self.state != PeerState::Up || was_used {
            return;
        }
        let next = if unsure { cx.fx.now } else { cx.fx.now + Duration::from_secs(1) };
        cx.fx.timers.set_no_later(Timer::Probe(self.id()), next);
        cx.fx.timers.set_no_later(Timer::Mtu(self.id()), cx.fx.now);
        if self.needs_better(cx) {
            self.hurry(cx);
        }
    }

    /// Renews the session: by a handshake on the path if there is one, else by an attempt; neither
    /// sooner after the last initiation than WireGuard would.
    fn renew(&mut self, cx: &mut PeerContext<'_>) {
        self.has_session = false;
        let last = self.schedule.last_initiation();
        match self.path() {
            Some(path) => {
                let rested = last.map_or(cx.fx.now, |at| (at + REKEY_TIMEOUT).max(cx.fx.now));
                self.schedule.restart(cx.fx.now);
                if rested <= cx.fx.now {
                    self.schedule.initiated(cx.fx.now);
                    self.initiate(cx, vec![path]);
                }
                let wait = self.paths.wait(&path) * 2;
                cx.fx.timers.set(Timer::Attempt(self.id()), cx.fx.now + wait);
                cx.fx.timers.set_no_later(Timer::Probe(self.id()), cx.fx.now);
            }
            None if self.state == PeerState::Idle => self.try_again(cx),
            None if self.state == PeerState::Down => {
                let rested = last.map_or(cx.fx.now, |at| (at + REKEY_TIMEOUT).max(cx.fx.now));
                cx.fx.timers.set_no_later(Timer::Attempt(self.id()), rested);
            }
            None => cx.fx.timers.set_no_later(Timer::Attempt(self.id()), cx.fx.now + REKEY_TIMEOUT),
        }
    }

    /// Begins a new series of attempts, now.
    fn try_again(&mut self, cx: &mut PeerContext<'_>) {
        self.schedule.restart(cx.fx.now);
        match self.state {
            PeerState::Up => self.has_session = false,
            PeerState::Idle => self.set_state(cx, PeerState::Connecting),
            PeerState::Connecting | PeerState::Down => {}
        }
        cx.fx.timers.set(Timer::Attempt(self.id()), cx.fx.now);
    }

    /// Begins a new series of attempts to find a better path, and keeps the current one.
    fn hurry(&mut self, cx: &mut PeerContext<'_>) {
        if self.schedule.began() + MOVE_MIN <= cx.fx.now {
            self.schedule.restart(cx.fx.now);
        }
        cx.fx.timers.set_no_later(Timer::Attempt(self.id()), cx.fx.now);
    }

    /// Returns whether a doubtful path is left for another one that answers: sooner for one that is
    /// as good.
    fn can_yield(&self, from: Path, to: Path) -> bool {
        Tier::of(&to) <= Tier::of(&from) || self.liveness.yields_to_worse()
    }

    /// Leaves a path that seems dead for one that answers.
    fn take_over(&mut self, cx: &mut PeerContext<'_>, to: Path) {
        tracing::debug!(from = ?self.endpoint, %to, "path in doubt left for one that answers");
        self.set_endpoint(cx, Some(to), PathChange::Silent);
        // So that the peer follows at once, whether or not we have something to send.
        self.initiate(cx, vec![to]);
        cx.fx.timers.set(Timer::Probe(self.id()), cx.fx.now);
        self.settle(cx);
    }

    /// Moves traffic to a better path by a handshake there, if it is we who decide, or if the one who
    /// does has left us behind on a relay: it may be on a better path already, and think that we are.
    fn move_to_better(&mut self, cx: &mut PeerContext<'_>, current: Path) {
        if self.moved.is_some_and(|(_, at)| cx.fx.now < at + MOVE_MIN) {
            return;
        }
        let since_left = |path: &Path| {
            let answered = self.paths.get(path).and_then(|known| known.answered);
            self.left.is_none_or(|(left, at)| left != *path || answered > Some(at))
        };
        let Some(better) = self.paths.better(cx.fx.now, current).filter(since_left) else { return };
        let left_behind = current.is_relayed()
            && !better.is_relayed()
            && self.endpoint_since.is_some_and(|at| cx.fx.now >= at + LEFT_BEHIND);
        if left_behind || self.is_leader(cx.local) {
            tracing::debug!(from = %current, to = %better, left_behind, "handshake on a better path");
            self.moved = Some((better, cx.fx.now));
            self.initiate(cx, vec![better]);
        }
    }

    /// Now and then pings the other good paths while one is in use.
    fn compare(&mut self, cx: &mut PeerContext<'_>, current: Path) {
        let due = self.compared.is_none_or(|at| cx.fx.now >= at + ALTERNATIVES);
        if due && self.liveness.is_used(cx.fx.now) && self.is_leader(cx.local) {
            self.compared = Some(cx.fx.now);
            for other in self.paths.alternatives(cx.fx.now, current) {
                self.ping(cx, other, Purpose::Check);
            }
        }
    }

    /// Sends an initiation over a path that is open, to a peer that is listening, if we are the
    /// initiator.
    fn answer(&mut self, cx: &mut PeerContext<'_>, to: Path) {
        if self.schedule.may_answer(cx.fx.now, self.is_initiator(cx.local))
            && self.initiate(cx, vec![to])
        {
            self.schedule.answered(cx.fx.now);
        }
    }

    fn set_state(&mut self, cx: &mut PeerContext<'_>, to: PeerState) {
        if self.state == to {
            return;
        }
        let from = std::mem::replace(&mut self.state, to);
        tracing::debug!(?from, ?to, path = ?self.endpoint, "state changed");
        self.since = cx.fx.now;
        self.history.add(cx.fx.now, Changed::State { from, to });
        if matches!(from, PeerState::Up | PeerState::Idle) {
            self.trying_since = cx.fx.now;
        }
        if from == PeerState::Up {
            self.liveness.moved();
            cx.fx.timers.cancel(Timer::Probe(self.id()));
            cx.fx.timers.cancel(Timer::Mtu(self.id()));
        }
        if to == PeerState::Idle {
            cx.fx.timers.cancel(Timer::Attempt(self.id()));
        }
        cx.fx.output(Output::StateChanged { peer: self.id(), from, to });
    }

    /// Renames the endpoint: it is the same path, so what is known of it holds.
    fn rename_endpoint(&mut self, cx: &mut PeerContext<'_>, name: Path) {
        if self.pmtu.path() == self.endpoint {
            self.pmtu.rename(name);
        }
        self.endpoint = Some(name);
        cx.fx.mark(Change::Path(PeerId::Node(self.id())));
    }

    fn set_endpoint(
        &mut self,
        cx: &mut PeerContext<'_>,
        endpoint: Option<Path>,
        reason: PathChange,
    ) {
        if self.endpoint == endpoint && (endpoint.is_none() || self.pmtu.path() == endpoint) {
            return;
        }
        let (from, to) = (self.endpoint, endpoint);
        tracing::debug!(?from, ?to, %reason, "endpoint changed");
        if from != to {
            self.history.add(cx.fx.now, Changed::Path { from, to, reason });
            cx.fx.output(Output::PathChanged { peer: self.id(), from, to, reason });
        }
        if let Some(before) = self.endpoint {
            self.left = Some((before, cx.fx.now));
        }
        self.endpoint = endpoint;
        self.endpoint_since = Some(cx.fx.now);
        self.liveness.moved();
        cx.fx.mark(Change::Path(PeerId::Node(self.id())));
        if let Some(path) = endpoint {
            self.pmtu.begin(path, cx.local.link_mtu());
            cx.fx.timers.set(Timer::Mtu(self.id()), cx.fx.now);
        }
    }

    /// Returns whether attempts go on although the peer is up: the path is relayed, or was only the
    /// first to answer.
    fn needs_better(&self, cx: &PeerContext<'_>) -> bool {
        let Some(path) = self.path() else { return true };
        if !cx.is_eager && !self.liveness.is_used(cx.fx.now) {
            return false;
        }
        path.is_relayed() || self.schedule.attempts() < 4 && self.paths_beside(cx, path)
    }

    /// Returns whether this node is the initiator of the two.
    fn is_initiator(&self, local: &LocalNode) -> bool {
        match (local.is_reachable(), is_reachable(&self.node.record().candidates)) {
            (false, true) => true,
            (true, false) => false,
            _ => self.is_leader(local),
        }
    }

    /// Returns whether this node of the two is in charge of moving traffic to a better path.
    fn is_leader(&self, local: &LocalNode) -> bool {
        local.key() < Some(self.key())
    }

    /// Returns whether an idle path is pinged: in a small mesh always; else where our NAT requires
    /// it and the peer is recent.
    fn needs_keepalive(&self, cx: &PeerContext<'_>) -> bool {
        cx.is_eager || self.liveness.is_recent(cx.fx.now) && !cx.local.is_reachable()
    }
}

/// Returns what a path MTU means to the data plane: the largest inner packet, and whether to
/// fragment.
pub(crate) fn clamped(mtu: Option<u16>, link: Mtu) -> (Mtu, bool) {
    match mtu {
        None => (link, false),
        Some(mtu) => (Mtu::clamp(mtu).min(link), mtu < Mtu::MIN.get()),
    }
}

/// Returns a random pause between four fifths and six fifths of `pause`.
pub(crate) fn jittered(rng: &mut StdRng, pause: Duration) -> Duration {
    Jitter::Fifth.apply(pause, rng.random())
}
