//! Peers that stand in the configuration: any WireGuard, member of no mesh.
//!
//! Of such a peer nothing is known but what the operator wrote, and it answers no probes. So there
//! is no path to choose: datagrams go to where it was last heard from, at first to the configured
//! endpoint. A handshake is begun when there is traffic for the peer; with a keepalive it is begun
//! at once, and again for ever. The data plane repeats it; what is counted here is whether it is
//! answered.
//!
//! The mesh comes first: a prefix or a key that a node holds, or we do, is refused to a static
//! peer, and the operator sees why. Static peers among themselves may nest, as WireGuard lets them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rand::Rng as _;
use towline_types::id::WireguardKey;

use crate::changes::Change;
use crate::effects::Effects;
use crate::local_node::LocalNode;
use crate::output::Output;
use crate::path::Path;
use crate::peer::{DOWN_AFTER, jittered};
use crate::peer_table::{Observation, PeerEntry, PresharedKey, REKEY_TIMEOUT};
use crate::prefixes::PrefixMap;
use crate::status::PeerState;
use crate::timers::Timer;

/// First handshakes of peers with a keepalive are spread over this long.
const SPREAD: Duration = Duration::from_millis(300);

/// A peer as its operator wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticPeer {
    /// For the operator alone.
    pub name: String,
    /// Names the peer in WireGuard; unique among the static peers.
    pub public_key: WireguardKey,
    /// Mixed into the handshake.
    pub preshared_key: Option<PresharedKey>,
    /// Where it is called; `None`: it calls us.
    pub endpoint: Option<SocketAddr>,
    /// What is reached through it. No two static peers have the same one.
    pub prefixes: Vec<IpNet>,
    /// How often an idle tunnel says something; with it, a tunnel is held up without traffic.
    pub keepalive: Option<Duration>,
}

/// A static peer as the operator sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct StaticPeerStatus {
    /// Its name.
    pub name: String,
    /// Its key.
    pub public_key: WireguardKey,
    /// Current state, for status output.
    pub state: PeerState,
    /// Since when.
    pub since: Instant,
    /// Why it is not up, in words for the operator; empty when it is.
    pub reason: String,
    /// Where its datagrams go.
    pub endpoint: Option<Path>,
    /// When the last handshake was completed.
    pub last_handshake: Option<Instant>,
    /// What is routed to it.
    pub prefixes: Vec<IpNet>,
    /// What it was refused, a line each.
    pub conflicts: Vec<String>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct StaticPeers {
    by_key: BTreeMap<WireguardKey, ConfiguredPeer>,
}

#[derive(Debug)]
struct ConfiguredPeer {
    config: StaticPeer,
    /// Of the configured prefixes those that it got.
    prefixes: Vec<IpNet>,
    conflicts: Vec<String>,
    /// It cannot be a peer: its key is another's.
    is_refused: bool,
    endpoint: Option<Path>,
    state: PeerState,
    since: Instant,
    /// When the present series of handshakes began.
    trying_since: Instant,
    last_initiation: Option<Instant>,
    last_handshake: Option<Instant>,
}

impl StaticPeers {
    /// The static peers are now these. Those that stay keep their sessions.
    pub(crate) fn set(&mut self, fx: &mut Effects, wanted: Vec<StaticPeer>) {
        let mut before = std::mem::take(&mut self.by_key);
        for config in wanted {
            let peer = match before.remove(&config.public_key) {
                Some(peer) => peer.following(fx, config),
                None => ConfiguredPeer::new(fx, config),
            };
            self.by_key.insert(peer.config.public_key, peer);
        }
        for key in before.keys() {
            fx.timers.cancel(Timer::StaticAttempt(*key));
        }
        fx.mark(Change::Ownership);
    }

    /// Decides which prefixes they get, given what the mesh `held` and by whom, and who holds a
    /// key.
    pub(crate) fn resolve(
        &mut self,
        held: impl Iterator<Item = (IpNet, String)>,
        key_holder: impl Fn(&WireguardKey) -> Option<String>,
    ) {
        let mut taken = PrefixMap::default();
        for (prefix, holder) in held {
            taken.insert(prefix, holder);
        }
        for (key, peer) in &mut self.by_key {
            peer.prefixes.clear();
            peer.conflicts.clear();
            let holder = key_holder(key);
            peer.is_refused = holder.is_some();
            if let Some(holder) = holder {
                peer.conflicts.push(format!("its WireGuard key is held by {holder}"));
                continue;
            }
            for prefix in &peer.config.prefixes {
                match taken.overlapping(*prefix).next() {
                    None => peer.prefixes.push(*prefix),
                    Some((other, holder)) if other == prefix => {
                        peer.conflicts.push(format!("prefix {prefix} is held by {holder}"));
                    }
                    Some((other, holder)) => {
                        peer.conflicts
                            .push(format!("prefix {prefix} overlaps {other} of {holder}"));
                    }
                }
            }
        }
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Their part of the peer table, over a link of this MTU.
    pub(crate) fn entries(&self, mtu: u16) -> impl Iterator<Item = (WireguardKey, PeerEntry)> {
        self.by_key.iter().filter(|(_, peer)| !peer.is_refused).map(move |(key, peer)| {
            let entry = PeerEntry {
                endpoint: peer.endpoint,
                prefixes: peer.prefixes.clone(),
                keepalive: peer.config.keepalive,
                preshared_key: peer.config.preshared_key.clone(),
                mtu,
                fragment: false,
                boot_epoch: 0,
                is_static: true,
            };
            (*key, entry)
        })
    }

    /// Everything that is routed to any of them.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = &IpNet> {
        self.by_key.values().flat_map(|peer| &peer.prefixes)
    }

    /// The data plane saw something of one. Whatever belongs to no static peer is ignored.
    pub(crate) fn handle_observation(
        &mut self,
        fx: &mut Effects,
        local: &LocalNode,
        key: WireguardKey,
        what: Observation,
    ) {
        if let Some(peer) = self.by_key.get_mut(&key).filter(|peer| !peer.is_refused) {
            peer.handle_observation(fx, local, what);
        }
    }

    /// The time for a handshake has come.
    pub(crate) fn attempt(&mut self, fx: &mut Effects, key: WireguardKey) {
        if let Some(peer) = self.by_key.get_mut(&key).filter(|peer| !peer.is_refused) {
            peer.call(fx);
        }
    }

    /// Links or addresses of ours changed: what we sent from may be gone.
    pub(crate) fn handle_local_change(&mut self, fx: &mut Effects) {
        self.by_key.values_mut().for_each(|peer| peer.let_kernel_choose(fx));
    }

    /// Every one, by key.
    pub(crate) fn statuses(&self, now: Instant) -> impl Iterator<Item = StaticPeerStatus> + '_ {
        self.by_key.values().map(move |peer| StaticPeerStatus {
            name: peer.config.name.clone(),
            public_key: peer.config.public_key,
            state: peer.state,
            since: peer.since,
            reason: peer.reason(now),
            endpoint: peer.endpoint,
            last_handshake: peer.last_handshake,
            prefixes: peer.prefixes.clone(),
            conflicts: peer.conflicts.clone(),
        })
    }
}

impl ConfiguredPeer {
    fn new(fx: &mut Effects, config: StaticPeer) -> Self {
        let peer = Self {
            endpoint: config.endpoint.map(Path::direct),
            config,
            prefixes: Vec::new(),
            conflicts: Vec::new(),
            is_refused: false,
            state: PeerState::Idle,
            since: fx.now,
            trying_since: fx.now,
            last_initiation: None,
            last_handshake: None,
        };
        peer.begin(fx);
        peer
    }

    /// This peer under another configuration. Only another endpoint undoes what was learned.
    fn following(mut self, fx: &mut Effects, config: StaticPeer) -> Self {
        if self.config.endpoint != config.endpoint {
            self.endpoint = config.endpoint.map(Path::direct);
        }
        let renewed = self.config != config;
        self.config = config;
        if renewed {
            self.begin(fx);
        }
        self
    }

    /// With a keepalive there is to be a session, traffic or not.
    fn begin(&self, fx: &mut Effects) {
        if self.persists() {
            let delay = SPREAD.mul_f64(fx.rng.random());
            fx.timers.set_no_later(Timer::StaticAttempt(self.config.public_key), fx.now + delay);
        }
    }

    fn persists(&self) -> bool {
        self.config.keepalive.is_some()
    }

    fn handle_observation(&mut self, fx: &mut Effects, local: &LocalNode, what: Observation) {
        match what {
            Observation::Handshake { from } => {
                fx.timers.cancel(Timer::StaticAttempt(self.config.public_key));
                self.last_handshake = Some(fx.now);
                self.heard(fx, local, from);
                self.set_state(fx, PeerState::Up);
            }
            Observation::Roamed { from } => self.heard(fx, local, from),
            Observation::HandshakeUnanswered => {
                self.let_kernel_choose(fx);
                match self.state {
                    PeerState::Connecting if fx.now >= self.trying_since + DOWN_AFTER => {
                        self.set_state(fx, PeerState::Down);
                    }
                    PeerState::Idle | PeerState::Up => self.set_state(fx, PeerState::Connecting),
                    PeerState::Connecting | PeerState::Down => {}
                }
            }
            Observation::SessionExpired => {
                if self.persists() {
                    if self.state == PeerState::Up {
                        self.set_state(fx, PeerState::Connecting);
                    }
                    let at = fx.now + jittered(&mut fx.rng, REKEY_TIMEOUT);
                    let timer = Timer::StaticAttempt(self.config.public_key);
                    fx.timers.set_no_later(timer, at);
                } else if self.state == PeerState::Up {
                    self.set_state(fx, PeerState::Idle);
                } else if self.state == PeerState::Connecting {
                    self.set_state(fx, PeerState::Down);
                }
            }
            Observation::Wanted => self.call(fx),
            Observation::Active { .. } | Observation::TooBig { .. } => {}
        }
    }

    /// Begins a handshake, though no sooner after the last one than WireGuard would.
    fn call(&mut self, fx: &mut Effects) {
        let mut to: Vec<Path> = Vec::new();
        to.extend(self.endpoint.map(|path| Path::direct(path.remote)));
        // A peer that roamed and went silent may be back where it was.
        let home = self.config.endpoint.filter(|home| to.iter().all(|path| path.remote != *home));
        to.extend(home.map(Path::direct));
        if to.is_empty() {
            return;
        }
        let rested = self.last_initiation.map_or(fx.now, |at| at + REKEY_TIMEOUT);
        if rested > fx.now {
            fx.timers.set_no_later(Timer::StaticAttempt(self.config.public_key), rested);
            return;
        }
        self.last_initiation = Some(fx.now);
        if self.state == PeerState::Idle {
            self.set_state(fx, PeerState::Connecting);
        }
        fx.output(Output::Handshake { peer: self.config.public_key, to });
    }

    /// Something authentic came from there: answers go there.
    fn heard(&mut self, fx: &mut Effects, local: &LocalNode, from: Path) {
        let usable = !from.is_relayed() && local.can_send_to(from.remote);
        if self.endpoint != Some(from) && usable {
            self.endpoint = Some(from);
            fx.mark(Change::Endpoint);
        }
    }

    /// Answers go out from the address that was called, until there is reason to doubt it.
    fn let_kernel_choose(&mut self, fx: &mut Effects) {
        if let Some(path) = &mut self.endpoint
            && path.local.take().is_some()
        {
            fx.mark(Change::Endpoint);
        }
    }

    fn set_state(&mut self, fx: &mut Effects, to: PeerState) {
        if self.state == to {
            return;
        }
        let from = std::mem::replace(&mut self.state, to);
        self.since = fx.now;
        if matches!(from, PeerState::Up | PeerState::Idle) {
            self.trying_since = fx.now;
        }
        let peer = self.config.public_key;
        fx.output(Output::StaticStateChanged { peer, from, to });
    }

    fn reason(&self, now: Instant) -> String {
        if self.is_refused {
            return self.conflicts.join("; ");
        }
        let seconds = now.saturating_duration_since(self.trying_since).as_secs();
        match (self.state, self.endpoint) {
            (PeerState::Up, _) => String::new(),
            (_, None) => "waiting for it to call: it has no `endpoint`".into(),
            (PeerState::Idle, Some(_)) => "nothing is sent to it, and it has no `keepalive`".into(),
            (PeerState::Connecting, Some(endpoint)) => format!("calling {}", endpoint.remote),
            (PeerState::Down, Some(endpoint)) => {
                format!(
                    "no answer from {} for {seconds} s: do both ends have the other's key, and the same preshared key?",
                    endpoint.remote
                )
            }
        }
    }
}
