//! The relays of the mesh: where we are registered, and which ones serve a pair.
//!
//! Every node is at home at [`HOMES`] relays: the first that work in an order that follows from its
//! id and theirs (rendezvous hashing). So every node that has the map knows where to look for a node,
//! also while the controller is away, and load spreads by itself. A home that does not answer is
//! passed over, and asked now and then whether it is back.
//!
//! A relay is a node whose record says that it relays and whose grant does not deny it: its own word
//! is not enough. Requests and answers are sealed for the pair
//! of node and relay, so a relay serves nodes of its mesh alone:
//!
//! - [`Probe::Register`] says that we can be reached at the address that it comes from. It is
//!   repeated before the lifetime of [`Probe::Registered`] is over, and moves our end of those
//!   channels that were bound to the address of the registration before.
//! - [`Probe::Open`] asks for a channel to a node. The relay answers with [`Probe::Opened`] and
//!   sends [`Probe::Incoming`] to that node, if it is registered. For the same pair it is always
//!   the same channel, bound to where the last request came from.
//! - [`Probe::Refused`] answers either: not registered, over a limit, or shutting down.
//! - [`Probe::Incoming`] comes a few times. What travels on the channel is the only answer.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng;
use towline_types::backoff::{Backoff, Jitter};
use towline_types::frame::Probe;
use towline_types::id::{NodeId, NodeName, WireguardKey};
use towline_types::node::{CandidateKind, Node, RelayRole};

use crate::effects::Effects;
use crate::local_node::{LocalNode, is_host_local};
use crate::path::{ChannelId, Path};
use crate::prefixes::is_private;
use crate::timers::Timer;

/// Number of relays that a node is registered with: a second one takes over if the first is lost.
pub(crate) const HOMES: usize = 2;
/// Largest number of addresses of one node that are tried.
const ADDRESSES: usize = 4;
/// Interval of registrations. Below 30 s, after which many NATs forget a mapping.
const REFRESH: Duration = Duration::from_secs(20);
/// Pauses before an unanswered registration is repeated.
const RETRY: Backoff =
    Backoff::new(Duration::from_millis(250), Duration::from_secs(30), Jitter::Tenth);
/// Unanswered registrations after which the next relay in the order is taken too.
const MISSED: u32 = 3;
/// Time within which a channel request is sent again after a challenge.
const REPEAT_WITHIN: Duration = Duration::from_secs(2);
/// Largest number of channel requests that are sent again after one challenge.
const REPEATED_OPENS: usize = 4;
/// Number of channel requests that are remembered; the oldest is forgotten first.
const OPENS: usize = 1_024;

/// A node that relays.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Relay {
    name: NodeName,
    key: WireguardKey,
    addresses: Vec<SocketAddr>,
    role: RelayRole,
}

#[derive(Debug, Default)]
struct Home {
    /// Path over which the relay answered last. Cleared when a registration is not answered.
    via: Option<Path>,
    /// Transaction of the registration that waits for its answer.
    asked: Option<u64>,
    /// Registrations in a row that were not answered.
    missed: u32,
    /// Time of the next registration.
    due: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    relay: NodeId,
    peer: NodeId,
    /// Key of the peer.
    key: WireguardKey,
    transaction: u64,
    /// Path that the request was sent over.
    to: Path,
    /// Time of the request.
    at: Instant,
    /// True once the request was sent again after a challenge.
    is_repeated: bool,
}

/// The peer at the other end of a channel that a relay opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChannelPeer {
    /// We asked for the channel.
    Node(NodeId),
    /// The node with this key did.
    Key(WireguardKey),
}

/// The relays of the mesh and our registrations; see the module.
#[derive(Debug)]
pub(crate) struct HomeRelays {
    /// Our own id; `None` if we register nowhere: we are no node, or relay ourselves.
    own: Option<NodeId>,
    relays: BTreeMap<NodeId, Relay>,
    homes: BTreeMap<NodeId, Home>,
    opens: VecDeque<Open>,
}

impl HomeRelays {
    pub(crate) fn new(own: Option<NodeId>) -> Self {
        Self { own, relays: BTreeMap::new(), homes: BTreeMap::new(), opens: VecDeque::new() }
    }

    /// Handles a node that is new, changed, or (with `None`) gone. Returns whether the relays are
    /// others now.
    pub(crate) fn handle_node(
        &mut self,
        fx: &mut Effects,
        id: NodeId,
        node: Option<&Node>,
    ) -> bool {
        let relay = node.filter(|node| node.is_relay()).map(|node| Relay {
            name: node.name().clone(),
            key: node.wireguard_key(),
            addresses: addresses(node),
            role: node.grant().relay,
        });
        let changed = match relay.filter(|relay| !relay.addresses.is_empty()) {
            Some(relay) => self.relays.insert(id, relay.clone()) != Some(relay),
            None => self.relays.remove(&id).is_some(),
        };
        if changed {
            self.follow(fx, false);
        }
        changed
    }

    /// Takes our own id, or `None` if we register nowhere from now on.
    pub(crate) fn set_own(&mut self, fx: &mut Effects, own: Option<NodeId>) {
        self.own = own;
        if own.is_none() {
            self.homes.clear();
            self.schedule(fx);
        }
        self.follow(fx, false);
    }

    /// Registers again, since our addresses changed.
    pub(crate) fn handle_local_change(&mut self, fx: &mut Effects) {
        self.follow(fx, true);
    }

    /// Returns the addresses of all relays, which reflect too.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.relays.values().flat_map(|relay| relay.addresses.iter().copied())
    }

    /// Returns the names of the relays that relay although nobody decided that they may.
    pub(crate) fn undecided(&self) -> impl Iterator<Item = &NodeName> {
        let undecided = self.relays.values().filter(|relay| relay.role == RelayRole::Undecided);
        undecided.map(|relay| &relay.name)
    }

    /// Returns whether the mesh has no relay.
    pub(crate) fn is_empty(&self) -> bool {
        self.relays.is_empty()
    }

    /// Returns whether the mesh has relays, and none of those that we ask answers.
    pub(crate) fn is_silent(&self) -> bool {
        let is_silent = |home: &Home| home.via.is_none() && home.missed >= MISSED;
        !self.homes.is_empty() && self.homes.values().all(is_silent)
    }

    /// Returns the name of the relay that has an address.
    pub(crate) fn at(&self, remote: SocketAddr) -> Option<&NodeName> {
        let relay = self.relays.values().find(|relay| relay.addresses.contains(&remote))?;
        Some(&relay.name)
    }

    /// Chooses the home relays again, since the relays changed, or (with `is_local_change`) our addresses.
    fn follow(&mut self, fx: &mut Effects, is_local_change: bool) {
        let Some(own) = self.own else { return };
        let mut working = 0;
        let mut wanted = Vec::new();
        for id in self.order(own) {
            wanted.push(id);
            working += usize::from(self.homes.get(&id).is_none_or(|home| home.missed < MISSED));
            if working == HOMES {
                break;
            }
        }
        self.homes.retain(|id, _| wanted.contains(id));
        for id in wanted {
            let home = self.homes.entry(id).or_default();
            if is_local_change {
                *home = Home::default();
            }
            home.due.get_or_insert(fx.now);
        }
        self.schedule(fx);
    }

    /// Sends the registrations that are due.
    pub(crate) fn handle_timeout(&mut self, fx: &mut Effects, local: &LocalNode) {
        let mut lost = false;
        for (id, home) in &mut self.homes {
            let Some(relay) = self.relays.get(id) else { continue };
            if home.due.is_none_or(|due| due > fx.now) {
                continue;
            }
            if home.asked.is_some() {
                home.missed = home.missed.saturating_add(1);
                home.via = None;
                if home.missed == MISSED {
                    tracing::debug!(relay = %relay.name, "relay does not answer: the next one is taken too");
                    lost = true;
                }
            }
            let transaction = fx.rng.random();
            home.asked = Some(transaction);
            home.due = Some(fx.now + RETRY.pause(home.missed, fx.rng.random()));
            for to in ways(home.via, relay, local) {
                fx.transmit(relay.key, to, Probe::Register { transaction });
            }
        }
        if lost {
            self.follow(fx, false);
        }
        self.schedule(fx);
    }

    /// Handles an answer of `relay`; what is no such answer, or what nothing asked for, is counted.
    /// Returns the channel that the relay opened, if it did.
    pub(crate) fn handle_answer(
        &mut self,
        fx: &mut Effects,
        relay: Option<NodeId>,
        from: Path,
        answer: &Probe,
    ) -> Option<(ChannelPeer, Path)> {
        // What comes from another address than the relay's record names may have been redirected.
        let is_at_home = |id: &NodeId| {
            self.relays.get(id).is_some_and(|relay| relay.addresses.contains(&from.remote))
        };
        let relay = relay.filter(is_at_home);
        let (expected, peer) = match (relay, answer) {
            (Some(relay), Probe::Registered { transaction, lifetime }) => {
                (self.registered(fx, relay, from, *transaction, *lifetime), None)
            }
            (Some(relay), Probe::Opened { transaction, channel }) => {
                let peer = self.opened(relay, *transaction).map(ChannelPeer::Node);
                (peer.is_some(), peer.map(|peer| (peer, *channel)))
            }
            (Some(relay), Probe::Incoming { peer, channel }) => {
                let home = self.is_home(relay);
                (home, home.then_some((ChannelPeer::Key(*peer), *channel)))
            }
            // The next attempt asks again.
            (Some(_), Probe::Refused { .. }) => (true, None),
            _ => (false, None),
        };
        fx.counters.relay_answers_refused += u64::from(!expected);
        peer.map(|(peer, channel)| (peer, from.on_channel(ChannelId(channel))))
    }

    /// Handles a challenge of a relay: what it did not answer on this path is sent once more, after the
    /// proof.
    pub(crate) fn handle_challenge(&mut self, fx: &mut Effects, id: NodeId, from: Path) {
        let relay = self.relays.get(&id);
        let relay = relay.filter(|relay| relay.addresses.contains(&from.remote));
        let Some(key) = relay.map(|relay| relay.key) else { return };
        if let Some(transaction) = self.homes.get(&id).and_then(|home| home.asked) {
            fx.transmit(key, from, Probe::Register { transaction });
        }
        let now = fx.now;
        let waiting = self.opens.iter_mut().rev().filter(|open| {
            let is_recent = now < open.at + REPEAT_WITHIN;
            open.relay == id && !open.is_repeated && is_recent && open.to.is(&from)
        });
        for open in waiting.take(REPEATED_OPENS) {
            open.is_repeated = true;
            let (transaction, peer) = (open.transaction, open.key);
            fx.transmit(key, open.to, Probe::Open { transaction, peer });
        }
    }

    /// Handles a registration that a relay confirms. Returns whether we had asked for it.
    fn registered(
        &mut self,
        fx: &mut Effects,
        relay: NodeId,
        from: Path,
        transaction: u64,
        lifetime: Duration,
    ) -> bool {
        let asked = self.homes.get_mut(&relay).filter(|home| home.asked == Some(transaction));
        let Some(home) = asked else { return false };
        home.asked = None;
        home.missed = 0;
        home.via = Some(from);
        home.due = Some(fx.now + REFRESH.min(lifetime / 3).max(Duration::from_secs(1)));
        self.schedule(fx);
        true
    }

    /// Returns whether we are registered with a relay.
    fn is_home(&self, relay: NodeId) -> bool {
        self.homes.get(&relay).is_some_and(|home| home.via.is_some())
    }

    /// Checks at once whether the relay at `remote` still answers: a path through it fell silent.
    pub(crate) fn suspect(&mut self, fx: &mut Effects, remote: SocketAddr) {
        for home in self.homes.values_mut() {
            if home.via.is_some_and(|via| via.remote == remote) && home.asked.is_none() {
                home.due = Some(fx.now);
            }
        }
        self.schedule(fx);
    }

    /// Asks for channels to `peer`. The first round (`turn` 0) asks its home relays; later rounds also
    /// ask the relays that would be its homes if those did not work. One address of a relay is asked
    /// at a time, for the relay binds the channel to where the request came from.
    pub(crate) fn open(
        &mut self,
        fx: &mut Effects,
        local: &LocalNode,
        (peer, key): (NodeId, WireguardKey),
        turn: u32,
    ) {
        let count = if turn > 0 { 2 * HOMES } else { HOMES };
        for id in self.order(peer).into_iter().take(count) {
            let Some(relay) = self.relays.get(&id) else { continue };
            let via = self.homes.get(&id).and_then(|home| home.via);
            let transaction = fx.rng.random();
            let mut ways = ways(via, relay, local);
            ways.sort_by_key(|way| !local.has_family(way.remote));
            let usable = ways.iter().filter(|way| local.has_family(way.remote)).count();
            let turns = if usable == 0 { ways.len() } else { usable };
            if turns == 0 {
                continue;
            }
            let to = ways[turn as usize % turns];
            if self.opens.len() == OPENS {
                self.opens.pop_front();
            }
            let (at, is_repeated) = (fx.now, false);
            self.opens.push_back(Open { relay: id, peer, key, transaction, to, at, is_repeated });
            fx.transmit(relay.key, to, Probe::Open { transaction, peer: key });
        }
    }

    /// Returns the peer that a channel was asked for, if it was asked for at this relay. The answer
    /// may come over several paths, so the request is kept.
    fn opened(&self, relay: NodeId, transaction: u64) -> Option<NodeId> {
        let open =
            self.opens.iter().rev().find(|o| o.transaction == transaction && o.relay == relay)?;
        Some(open.peer)
    }

    /// Returns all relays in the order of preference of `node`.
    fn order(&self, node: NodeId) -> Vec<NodeId> {
        let mut order: Vec<NodeId> =
            self.relays.keys().copied().filter(|relay| *relay != node).collect();
        order.sort_unstable_by_key(|relay| (weight(node, *relay), *relay));
        order
    }

    fn schedule(&self, fx: &mut Effects) {
        match self.homes.values().filter_map(|home| home.due).min() {
            Some(due) => fx.timers.set(Timer::HomeRelays, due),
            None => fx.timers.cancel(Timer::HomeRelays),
        }
    }
}

/// Returns the addresses at which a node can be reached without its having sent something first. Those of
/// this host and of its links are left out: see [`LocalNode::can_send_to_node`].
pub(crate) fn addresses(node: &Node) -> Vec<SocketAddr> {
    let elsewhere = node.record().candidates.iter().filter(|c| !is_host_local(c.address().ip()));
    let public = elsewhere.filter(|c| match c.kind() {
        CandidateKind::Configured => true,
        CandidateKind::Local => !is_private(c.address().ip()),
        CandidateKind::Reflexive | CandidateKind::Relayed => false,
    });
    public.map(|c| c.address()).take(ADDRESSES).collect()
}

fn ways(via: Option<Path>, relay: &Relay, local: &LocalNode) -> Vec<Path> {
    match via {
        Some(via) => vec![via],
        None => {
            let addresses = relay.addresses.iter().filter(|to| local.can_send_to(**to));
            addresses.flat_map(|to| local.paths_to(*to)).collect()
        }
    }
}

/// Returns the weight of another node, such as a relay, for a node (rendezvous hashing); the lowest one is
/// chosen. Every node computes the same (FNV-1a, then a mix of the bits). No attacker gains by choosing an
/// id: the controller draws it.
pub(crate) fn weight(node: NodeId, other: NodeId) -> u64 {
    let bytes = node.0.iter().chain(&other.0);
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ hash >> 33
}
