//! Peers that stand in the configuration: any WireGuard, member of no mesh.
//!
//! Of such a peer nothing is known but what the operator wrote, and it answers no probes. So there
//! is no path to choose: datagrams go to where it was last heard from, at first to the configured
//! endpoint. A handshake is begun when there is traffic for the peer; with a keepalive it is begun
//! at once, and again without end. The data plane repeats it; what is counted here is whether it is
//! answered.
//!
//! The mesh comes first: a prefix or a key that a node holds, or we do, is refused to a static
//! peer, and the operator sees why. Static peers among themselves may nest, as WireGuard lets them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rand::Rng as _;
use towline_types::frame::ProbeVersion;
use towline_types::id::{PresharedKey, WireguardKey};
use towline_types::mtu::Mtu;

use crate::changes::{Change, PeerId};
use crate::conflict::{Conflict, Holder};
use crate::effects::Effects;
use crate::local_node::LocalNode;
use crate::output::Output;
use crate::path::Path;
use crate::peer::{DOWN_AFTER, jittered};
use crate::peer_table::{Observation, PeerEntry, PeerPath, REKEY_TIMEOUT};
use crate::prefixes::PrefixMap;
use crate::reason::StaticPeerReason;
use crate::status::PeerState;
use crate::timers::Timer;

/// Time over which the first handshakes of peers with a keepalive are spread.
const SPREAD: Duration = Duration::from_millis(300);

/// A peer as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticPeer {
    /// Name in the configuration and in status output.
    pub name: String,
    /// WireGuard key; unique among the static peers.
    pub public_key: WireguardKey,
    /// Key that is mixed into the handshake.
    pub preshared_key: Option<PresharedKey>,
    /// Address that handshakes go to; `None`: the peer initiates.
    pub endpoint: Option<SocketAddr>,
    /// Networks that are reached through it. No two static peers have the same one.
    pub prefixes: Vec<IpNet>,
    /// Interval of keepalives. With it, the tunnel is kept up without traffic.
    pub keepalive: Option<Duration>,
}

/// A static peer as the operator sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct StaticPeerStatus {
    /// Name in the configuration.
    pub name: String,
    /// WireGuard key.
    pub public_key: WireguardKey,
    /// Current state, for status output.
    pub state: PeerState,
    /// Time of the last change of state.
    pub since: Instant,
    /// Reason why the peer is not up; `None` when it is up.
    pub reason: Option<StaticPeerReason>,
    /// Path that its datagrams go over.
    pub endpoint: Option<Path>,
    /// Time at which the last handshake completed.
    pub last_handshake: Option<Instant>,
    /// Networks that are routed to it.
    pub prefixes: Vec<IpNet>,
    /// Prefixes and key that it was refused.
    pub conflicts: Vec<Conflict>,
}

/// All static peers.
#[derive(Debug, Default)]
pub(crate) struct StaticPeers {
    by_key: BTreeMap<WireguardKey, ConfiguredPeer>,
}

#[derive(Debug)]
struct ConfiguredPeer {
    config: StaticPeer,
    /// Those of the configured prefixes that it got. Set by [`StaticPeers::resolve`].
    prefixes: Vec<IpNet>,
    conflicts: Vec<Conflict>,
    /// Holder of its key, if a node of the mesh, or this node, has it: then it cannot be a peer.
    key_holder: Option<Holder>,
    endpoint: Option<Path>,
    state: PeerState,
    since: Instant,
    /// Begin of the current series of handshakes.
    trying_since: Instant,
    last_initiation: Option<Instant>,
    last_handshake: Option<Instant>,
}

impl StaticPeers {
    /// Replaces the static peers. Those that stay keep their sessions.
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

    /// Decides which prefixes the static peers get, given what is `held` and by which node, and the
    /// holder of a key.
    pub(crate) fn resolve(
        &mut self,
        held: impl Iterator<Item = (IpNet, Holder)>,
        key_holder: impl Fn(&WireguardKey) -> Option<Holder>,
    ) {
        let mut taken = PrefixMap::default();
        for (prefix, holder) in held {
            taken.insert(prefix, holder);
        }
        for (key, peer) in &mut self.by_key {
            peer.prefixes.clear();
            peer.conflicts.clear();
            peer.key_holder = key_holder(key);
            if let Some(holder) = peer.key_holder.clone() {
                peer.conflicts.push(Conflict::Key { holder });
                continue;
            }
            for prefix in &peer.config.prefixes {
                match taken.overlapping(*prefix).next() {
                    None => peer.prefixes.push(*prefix),
                    Some((held, holder)) => {
                        peer.conflicts.push(Conflict::over(*prefix, *held, holder.clone()));
                    }
                }
            }
        }
    }

    /// Returns whether there is no static peer.
    pub(crate) fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Returns the static peers' part of the peer table, over a link of this MTU.
    pub(crate) fn entries(&self, mtu: Mtu) -> impl Iterator<Item = (WireguardKey, PeerEntry)> {
        self.by_key.iter().filter(|(_, peer)| peer.key_holder.is_none()).map(move |(key, peer)| {
            let PeerPath { endpoint, mtu, fragment, is_single } = peer.path(mtu);
            let entry = PeerEntry {
                endpoint,
                prefixes: peer.prefixes.clone(),
                shared_sources: Vec::new(),
                keepalive: peer.config.keepalive,
                preshared_key: peer.config.preshared_key.clone(),
                mtu,
                fragment,
                is_single,
                boot_epoch: 0,
                is_static: true,
                probe_version: ProbeVersion::default(),
            };
            (*key, entry)
        })
    }

    /// Returns how datagrams reach one of [`Self::entries`].
    pub(crate) fn path(&self, key: &WireguardKey, mtu: Mtu) -> Option<PeerPath> {
        let peer = self.by_key.get(key).filter(|peer| peer.key_holder.is_none())?;
        Some(peer.path(mtu))
    }

    /// Returns all networks that are routed to static peers.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = &IpNet> {
        self.by_key.values().flat_map(|peer| &peer.prefixes)
    }

    /// Handles an observation of the data plane. Other peers are ignored.
    pub(crate) fn handle_observation(
        &mut self,
        fx: &mut Effects,
        local: &LocalNode,
        key: WireguardKey,
        what: Observation,
    ) {
        if let Some(peer) = self.by_key.get_mut(&key).filter(|peer| peer.key_holder.is_none()) {
            peer.handle_observation(fx, local, what);
        }
    }

    /// Begins the handshake that is due.
    pub(crate) fn attempt(&mut self, fx: &mut Effects, local: &LocalNode, key: WireguardKey) {
        if let Some(peer) = self.by_key.get_mut(&key).filter(|peer| peer.key_holder.is_none()) {
            peer.call(fx, local);
        }
    }

    /// Has the kernel choose the addresses that we send from: our own may be gone.
    pub(crate) fn handle_local_change(&mut self, fx: &mut Effects) {
        self.by_key.values_mut().for_each(|peer| peer.let_kernel_choose(fx));
    }

    /// Has what goes to public addresses leave from our other port.
    pub(crate) fn handle_port_change(&mut self, fx: &mut Effects, local: &LocalNode) {
        for peer in self.by_key.values_mut() {
            let moved = peer.endpoint.map(|path| local.on_port(path));
            if moved != peer.endpoint {
                peer.endpoint = moved;
                peer.path_changed(fx);
            }
        }
    }

    /// Returns the status of each static peer, by key.
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
            key_holder: None,
            state: PeerState::Idle,
            since: fx.now,
            trying_since: fx.now,
            last_initiation: None,
            last_handshake: None,
        };
        peer.begin(fx);
        peer
    }

    /// Returns this peer under another configuration. Only another endpoint undoes what was
    /// learned.
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

    /// Schedules the first handshake, if the peer has a keepalive.
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
            Observation::Wanted => self.call(fx, local),
            Observation::Active { .. } | Observation::TooBig { .. } => {}
        }
    }

    /// Begins a handshake, no sooner after the last one than WireGuard would.
    fn call(&mut self, fx: &mut Effects, local: &LocalNode) {
        let mut to: Vec<Path> = Vec::new();
        to.extend(self.endpoint.map(|path| local.path_to(path.remote)));
        // A peer that roamed and went silent may be back where it was.
        let home = self.config.endpoint.filter(|home| to.iter().all(|path| path.remote != *home));
        to.extend(home.map(|home| local.path_to(home)));
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

    /// Moves the endpoint to where something authentic came from.
    fn heard(&mut self, fx: &mut Effects, local: &LocalNode, from: Path) {
        let usable = !from.is_relayed() && local.can_send_to(from.remote);
        if self.endpoint != Some(from) && usable {
            self.endpoint = Some(from);
            self.path_changed(fx);
        }
    }

    /// Forgets the local address that the peer was answered from: there is reason to doubt it.
    fn let_kernel_choose(&mut self, fx: &mut Effects) {
        if let Some(path) = &mut self.endpoint
            && path.local.take().is_some()
        {
            self.path_changed(fx);
        }
    }

    fn path_changed(&self, fx: &mut Effects) {
        fx.mark(Change::Path(PeerId::Static(self.config.public_key)));
    }

    /// Returns how datagrams reach the peer, over a link of this MTU.
    fn path(&self, mtu: Mtu) -> PeerPath {
        PeerPath { endpoint: self.endpoint, mtu, fragment: false, is_single: false }
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

    fn reason(&self, now: Instant) -> Option<StaticPeerReason> {
        if let Some(holder) = self.key_holder.clone() {
            return Some(StaticPeerReason::KeyConflict { holder });
        }
        let endpoint = self.endpoint.map(|path| path.remote);
        Some(match (self.state, endpoint) {
            (PeerState::Up, _) => return None,
            (_, None) => StaticPeerReason::NoEndpoint,
            (PeerState::Idle, Some(_)) => StaticPeerReason::Idle,
            (PeerState::Connecting, Some(endpoint)) => StaticPeerReason::Trying { endpoint },
            (PeerState::Down, Some(endpoint)) => {
                let seconds = now.saturating_duration_since(self.trying_since).as_secs();
                StaticPeerReason::NoAnswer { endpoint, seconds }
            }
        })
    }
}
