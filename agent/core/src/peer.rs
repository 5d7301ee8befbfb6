//! One peer: how it is reached, and whether it still is.
//!
//! # Connecting
//!
//! An attempt sends one handshake initiation and a ping to every address that might be the
//! peer's, all at once. Of the two nodes one begins and the other holds its first initiation back
//! for [`YIELD`], so that they do not cross: the one that cannot be called begins, else the one
//! with the lower key. Attempts follow one another quickly at first, then ever more slowly up to
//! [`RETRY_MAX`], for ever. A ping or a pong of the peer shows an address that works and brings
//! the next initiation forward.
//!
//! # Up
//!
//! A completed handshake makes its address the path. The path is pinged every [`PROBE_INTERVAL`];
//! a missing pong is asked for again soon, and after [`PROBES_LOST`] of them the path is dead and
//! all candidates are tried at once. Only pongs count: a path that carries one direction alone is
//! as dead as one that carries none.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use towline_proto::id::{NodeId, WireguardKey};
use towline_proto::limits;
use towline_proto::node::Node;

use crate::local::{Local, preference, reachable};
use crate::mesh::{Output, PeerState};
use crate::path::Path;
use crate::peer_table::{Observation, REKEY_TIMEOUT};
use crate::pings::{Pings, Purpose, Sent};
use crate::prefixes::is_private;
use crate::rtt::Rtt;
use crate::timers::{Timer, Timers};

/// How long the node that does not begin holds its first initiation back.
const YIELD: Duration = Duration::from_millis(300);
/// Pauses between the first attempts; afterwards they double from [`REKEY_TIMEOUT`] on.
const FIRST_RETRIES: [Duration; 4] = [
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_millis(1_600),
    Duration::from_millis(3_200),
];
/// The longest pause between attempts.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Trying for longer than this is being down.
pub(crate) const DOWN_AFTER: Duration = Duration::from_secs(10);
/// The least time between two initiations that answer to what the peer sent.
const INITIATION_MIN: Duration = Duration::from_millis(100);
/// How often a path that is in use is pinged.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Pings without a pong after which a path is dead.
const PROBES_LOST: u32 = 5;
/// What a node behind a NAT says every so often to a public one, so that the mapping stays.
const KEEPALIVE: Duration = Duration::from_secs(25);
/// How long an address from which the peer was heard is worth a try.
const HEARD_FOR: Duration = Duration::from_secs(120);
/// Addresses that are remembered beside the candidates.
const HEARD_MAX: usize = 8;
/// Pongs per second and in a burst: a peer whose pings are replayed costs no more.
const PONGS_PER_SECOND: u32 = 50;

/// What a peer may use while it handles something.
pub(crate) struct Context<'a> {
    pub(crate) now: Instant,
    pub(crate) rng: &'a mut StdRng,
    pub(crate) timers: &'a mut Timers,
    pub(crate) outputs: &'a mut VecDeque<Output>,
    pub(crate) pings: &'a mut Pings,
    pub(crate) local: &'a Local,
    /// To be set when something that stands in the peer table changed.
    pub(crate) table_changed: &'a mut bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Peer {
    node: Arc<Node>,
    state: PeerState,
    since: Instant,
    /// When the present series of attempts began.
    trying_since: Instant,
    attempts: u32,
    last_initiation: Option<Instant>,
    /// The WireGuard endpoint: where the last handshake or authentic datagram came from.
    endpoint: Option<Path>,
    session: bool,
    last_handshake: Option<Instant>,
    paths: BTreeMap<Path, Seen>,
    /// The ping on the endpoint that has no pong yet.
    awaited: Option<u64>,
    lost: u32,
    pongs: Bucket,
    keepalive: bool,
}

/// An address of the peer from which we heard.
#[derive(Debug, Default)]
struct Seen {
    rtt: Rtt,
    heard: Option<Instant>,
    answered: Option<Instant>,
    checked: Option<Instant>,
}

impl Peer {
    /// A peer that is to be connected after `delay`.
    pub(crate) fn new(cx: &mut Context<'_>, node: Arc<Node>, delay: Duration) -> Self {
        let mut peer = Self {
            node,
            state: PeerState::Connecting,
            since: cx.now,
            trying_since: cx.now,
            attempts: 0,
            last_initiation: None,
            endpoint: None,
            session: false,
            last_handshake: None,
            paths: BTreeMap::new(),
            awaited: None,
            lost: 0,
            pongs: Bucket::default(),
            keepalive: false,
        };
        peer.keepalive = peer.wants_keepalive(cx.local);
        cx.timers.set(Timer::Attempt(peer.id()), cx.now + delay);
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

    pub(crate) fn keepalive(&self) -> Option<Duration> {
        self.keepalive.then_some(KEEPALIVE)
    }

    pub(crate) fn last_handshake(&self) -> Option<Instant> {
        self.last_handshake
    }

    /// The path that carries traffic.
    pub(crate) fn path(&self) -> Option<Path> {
        self.endpoint.filter(|_| self.state == PeerState::Up)
    }

    pub(crate) fn rtt(&self) -> Option<Duration> {
        self.paths.get(&self.path()?)?.rtt.mean()
    }

    /// The node published something newer.
    pub(crate) fn set_node(&mut self, cx: &mut Context<'_>, node: Arc<Node>) {
        let (old, new) = (self.node.record(), node.record());
        let rebooted = new.boot_epoch > old.boot_epoch;
        let moved = new.candidates != old.candidates;
        let other_key = self.node.wireguard_key() != node.wireguard_key();
        self.node = node;
        self.refresh_keepalive(cx);
        if other_key {
            // Another tunnel: nothing of the old one holds.
            self.session = false;
            self.set_endpoint(cx, None);
        }
        // A peer that started anew has forgotten our session, and is waiting for us if it cannot
        // call us itself.
        if rebooted || other_key || (moved && self.state != PeerState::Up) {
            self.try_anew(cx);
        }
    }

    /// Our own candidates changed: whatever is not up may be now, and what is up may not be.
    pub(crate) fn local_changed(&mut self, cx: &mut Context<'_>) {
        self.refresh_keepalive(cx);
        match self.state {
            PeerState::Up => cx.timers.set(Timer::Probe(self.id()), cx.now),
            PeerState::Idle => {}
            PeerState::Connecting | PeerState::Down => self.try_anew(cx),
        }
    }

    /// The time for the next attempt has come.
    pub(crate) fn attempt(&mut self, cx: &mut Context<'_>) {
        match self.state {
            PeerState::Up if self.session => return,
            // The session was not renewed in time although the path answers.
            PeerState::Up => self.set_state(cx, PeerState::Connecting),
            PeerState::Connecting if cx.now >= self.trying_since + DOWN_AFTER => {
                self.set_state(cx, PeerState::Down);
            }
            PeerState::Idle => self.set_state(cx, PeerState::Connecting),
            PeerState::Connecting | PeerState::Down => {}
        }
        let targets = self.targets(cx);
        let yields = self.attempts == 0 && !self.begins(cx.local);
        self.attempts = self.attempts.saturating_add(1);
        if !yields {
            self.initiate(cx, targets.clone());
        }
        for to in targets {
            self.ping(cx, to, Purpose::Check);
        }
        let pause = if yields { YIELD } else { jittered(cx.rng, self.pause()) };
        cx.timers.set(Timer::Attempt(self.id()), cx.now + pause);
    }

    /// The time for the next ping on the path has come, or for the verdict on the last one.
    pub(crate) fn probe(&mut self, cx: &mut Context<'_>) {
        let Some(path) = self.path() else { return };
        if self.awaited.take().is_some() {
            self.lost += 1;
        }
        if self.lost >= PROBES_LOST {
            self.set_state(cx, PeerState::Connecting);
            self.try_anew(cx);
            return;
        }
        self.awaited = Some(self.ping(cx, path, Purpose::Path));
        let wait = self.paths.get(&path).map_or(Rtt::default().wait(), |p| p.rtt.wait());
        cx.timers.set(Timer::Probe(self.id()), cx.now + wait);
    }

    /// The data plane saw something.
    pub(crate) fn observe(&mut self, cx: &mut Context<'_>, what: Observation) {
        match what {
            Observation::Handshake { from } => self.handshake(cx, from),
            Observation::Roamed { from } => {
                if cx.local.may_send_to(from.remote) && self.endpoint != Some(from) {
                    self.heard(cx, from);
                    self.set_endpoint(cx, Some(from));
                    self.lost = 0;
                    self.awaited = None;
                    if self.state == PeerState::Up {
                        cx.timers.set(Timer::Probe(self.id()), cx.now);
                    }
                }
            }
            // The next attempt is scheduled; while up, the tunnel repeats its own re-key.
            Observation::HandshakeUnanswered
            | Observation::Active { .. }
            | Observation::TooBig { .. } => {}
            Observation::SessionExpired => self.renew(cx),
            // Also while up: the session may have been ours alone to lose, or never confirmed.
            Observation::Wanted => self.renew(cx),
        }
    }

    /// An authentic ping came.
    pub(crate) fn on_ping(&mut self, cx: &mut Context<'_>, from: Path, transaction: u64) {
        if !cx.local.may_send_to(from.remote) || !self.pongs.take(cx.now, PONGS_PER_SECOND) {
            return;
        }
        cx.outputs.push_back(Output::Pong { peer: self.key(), to: from, transaction });
        self.heard(cx, from);
        if self.state == PeerState::Up {
            return;
        }
        // It is there and this address leads to it, if only one way: see about the other one.
        let path = self.paths.entry(from).or_default();
        if path.checked.is_none_or(|at| cx.now >= at + INITIATION_MIN) {
            self.ping(cx, from, Purpose::Check);
        }
        if self.state == PeerState::Down {
            self.try_anew(cx);
        }
    }

    /// An authentic pong came, answering `sent`, from where that was sent to.
    pub(crate) fn on_pong(&mut self, cx: &mut Context<'_>, sent: &Sent) {
        self.heard(cx, sent.to);
        let path = self.paths.entry(sent.to).or_default();
        path.rtt.sample(cx.now.saturating_duration_since(sent.at));
        path.answered = Some(cx.now);
        if self.path() == Some(sent.to) {
            self.lost = 0;
            self.awaited = None;
            cx.timers.set(Timer::Probe(self.id()), (sent.at + PROBE_INTERVAL).max(cx.now));
        } else if self.path().is_none() {
            let yields = self.attempts <= 1 && !self.begins(cx.local);
            let rested = self.last_initiation.is_none_or(|at| cx.now >= at + INITIATION_MIN);
            if rested && !yields {
                self.initiate(cx, vec![sent.to]);
            }
        }
    }

    /// Sends an operator's ping on the path, or to everywhere while there is none.
    pub(crate) fn operator_ping(&mut self, cx: &mut Context<'_>, id: u64) {
        match self.path() {
            Some(path) => {
                self.ping(cx, path, Purpose::Operator(id));
            }
            None => {
                for to in self.targets(cx) {
                    self.ping(cx, to, Purpose::Operator(id));
                }
            }
        }
    }

    /// Why it is not up, in words for the operator; empty when it is.
    pub(crate) fn reason(&self, now: Instant, local: &Local) -> String {
        if self.state == PeerState::Up {
            return String::new();
        }
        if self.state == PeerState::Idle {
            return "nothing was sent to it yet".into();
        }
        let tried = self.candidates(local).len();
        let seconds = now.saturating_duration_since(self.trying_since).as_secs();
        let answered = self.paths.values().any(|path| {
            path.answered.is_some_and(|at| now.saturating_duration_since(at) < HEARD_FOR)
        });
        let tried_all = match tried {
            0 => "it has published no address that we could call".into(),
            1 => format!("no answer from 1 candidate for {seconds} s"),
            n => format!("no answer from {n} candidates for {seconds} s"),
        };
        if self.state == PeerState::Connecting {
            return match tried {
                0 => {
                    "waiting for it to call: it has published no address that we could call".into()
                }
                1 => "trying 1 candidate".into(),
                n => format!("trying {n} candidates"),
            };
        }
        if answered {
            "it answers probes but no handshake: was its clock or ours set back?".into()
        } else if !local.reachable() && !reachable(&self.node.record().candidates) {
            format!("both nodes are behind NAT and no relay is configured ({tried_all})")
        } else {
            tried_all
        }
    }

    fn handshake(&mut self, cx: &mut Context<'_>, from: Path) {
        self.session = true;
        self.last_handshake = Some(cx.now);
        cx.timers.cancel(Timer::Attempt(self.id()));
        self.attempts = 0;
        if cx.local.may_send_to(from.remote) {
            self.heard(cx, from);
            if self.path() == Some(from) {
                return;
            }
            self.set_endpoint(cx, Some(from));
        }
        self.lost = 0;
        self.awaited = None;
        self.set_state(cx, PeerState::Up);
        cx.timers.set(Timer::Probe(self.id()), cx.now);
    }

    /// There is no session: a handshake on the path if there is one, else the next attempt now;
    /// neither sooner after the last initiation than WireGuard would.
    fn renew(&mut self, cx: &mut Context<'_>) {
        self.session = false;
        let rested = self.last_initiation.map_or(cx.now, |at| (at + REKEY_TIMEOUT).max(cx.now));
        match self.path() {
            Some(path) if rested <= cx.now => {
                self.initiate(cx, vec![path]);
                let at = cx.now + jittered(cx.rng, FIRST_RETRIES[1]);
                cx.timers.set(Timer::Attempt(self.id()), at);
            }
            _ => cx.timers.set_no_later(Timer::Attempt(self.id()), rested),
        }
    }

    /// Begins a new series of attempts, now.
    fn try_anew(&mut self, cx: &mut Context<'_>) {
        self.attempts = 0;
        self.trying_since = cx.now;
        if self.state == PeerState::Up {
            self.session = false;
        }
        cx.timers.set(Timer::Attempt(self.id()), cx.now);
    }

    fn set_state(&mut self, cx: &mut Context<'_>, to: PeerState) {
        if self.state == to {
            return;
        }
        let from = std::mem::replace(&mut self.state, to);
        self.since = cx.now;
        if matches!(from, PeerState::Up | PeerState::Idle) {
            self.trying_since = cx.now;
        }
        if from == PeerState::Up {
            self.lost = 0;
            self.awaited = None;
            cx.timers.cancel(Timer::Probe(self.id()));
        }
        cx.outputs.push_back(Output::StateChanged { peer: self.id(), from, to });
    }

    fn set_endpoint(&mut self, cx: &mut Context<'_>, endpoint: Option<Path>) {
        if self.endpoint != endpoint {
            self.endpoint = endpoint;
            *cx.table_changed = true;
        }
    }

    fn initiate(&mut self, cx: &mut Context<'_>, to: Vec<Path>) {
        if !to.is_empty() {
            self.last_initiation = Some(cx.now);
            cx.outputs.push_back(Output::Handshake { peer: self.key(), to });
        }
    }

    fn ping(&mut self, cx: &mut Context<'_>, to: Path, purpose: Purpose) -> u64 {
        if let Some(path) = self.paths.get_mut(&to) {
            path.checked = Some(cx.now);
        }
        let sent = Sent { peer: self.id(), to, at: cx.now, purpose };
        let transaction = cx.pings.sent(cx.rng, sent);
        cx.outputs.push_back(Output::Ping { peer: self.key(), to, transaction, size: None });
        transaction
    }

    /// Remembers that something authentic came from there, and forgets what was so long ago.
    fn heard(&mut self, cx: &Context<'_>, from: Path) {
        self.paths.entry(from).or_default().heard = Some(cx.now);
        if self.paths.len() > limits::CANDIDATES + HEARD_MAX {
            let keep = (Some(from), self.endpoint);
            let oldest = self
                .paths
                .iter()
                .filter(|(to, _)| Some(**to) != keep.0 && Some(**to) != keep.1)
                .min_by_key(|(_, path)| path.heard)
                .map(|(to, _)| *to);
            if let Some(oldest) = oldest {
                self.paths.remove(&oldest);
            }
        }
    }

    /// Its candidates, as far as we may send there, the likeliest first.
    fn candidates(&self, local: &Local) -> Vec<Path> {
        let same_site = self.node.grant().site.is_some() && self.node.grant().site == local.site;
        let mut usable: Vec<_> = self
            .node
            .record()
            .candidates
            .iter()
            .filter(|c| local.may_send_to(c.address()))
            .map(|c| {
                let private = is_private(c.address().ip());
                let likely = if private { u8::from(!same_site) * 2 } else { 1 };
                (likely, preference(c.kind()), Path::direct(c.address()))
            })
            .collect();
        usable.sort_unstable();
        let mut addresses: Vec<Path> = Vec::with_capacity(usable.len());
        for (_, _, address) in usable {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }

    /// Where an attempt goes: the last path, the candidates, and where it was heard from lately.
    fn targets(&self, cx: &Context<'_>) -> Vec<Path> {
        let mut targets: Vec<Path> = self.endpoint.into_iter().collect();
        let heard = self.paths.iter().filter_map(|(to, path)| {
            let at = path.heard?;
            (cx.now < at + HEARD_FOR).then_some((at, *to))
        });
        let mut heard: Vec<_> = heard.collect();
        heard.sort_unstable_by(|a, b| b.cmp(a));
        heard.truncate(HEARD_MAX);
        for to in heard.into_iter().map(|(_, to)| to).chain(self.candidates(cx.local)) {
            if !targets.contains(&to) {
                targets.push(to);
            }
        }
        targets.truncate(limits::CANDIDATES);
        targets
    }

    /// Whether of the two nodes it is we who begin.
    fn begins(&self, local: &Local) -> bool {
        match (local.reachable(), reachable(&self.node.record().candidates)) {
            (false, true) => true,
            (true, false) => false,
            _ => local.key < Some(self.key()),
        }
    }

    /// The side that needs it keeps the mapping open: we cannot be called, the peer can.
    fn wants_keepalive(&self, local: &Local) -> bool {
        !local.reachable() && reachable(&self.node.record().candidates)
    }

    fn refresh_keepalive(&mut self, cx: &mut Context<'_>) {
        let wanted = self.wants_keepalive(cx.local);
        if self.keepalive != wanted {
            self.keepalive = wanted;
            *cx.table_changed = true;
        }
    }

    fn pause(&self) -> Duration {
        let n = self.attempts.saturating_sub(1) as usize;
        FIRST_RETRIES.get(n).copied().unwrap_or_else(|| {
            let doublings = (n - FIRST_RETRIES.len()).min(8) as u32;
            (REKEY_TIMEOUT * 2u32.pow(doublings)).min(RETRY_MAX)
        })
    }
}

/// Between four fifths and six fifths of it.
pub(crate) fn jittered(rng: &mut StdRng, pause: Duration) -> Duration {
    pause.mul_f64(rng.random_range(0.8..1.2))
}

/// A bound on what happens per second.
#[derive(Debug, Default)]
struct Bucket {
    second: Option<Instant>,
    taken: u32,
}

impl Bucket {
    fn take(&mut self, now: Instant, per_second: u32) -> bool {
        if self.second.is_none_or(|start| now >= start + Duration::from_secs(1)) {
            self.second = Some(now);
            self.taken = 0;
        }
        self.taken += 1;
        self.taken <= per_second
    }
}
