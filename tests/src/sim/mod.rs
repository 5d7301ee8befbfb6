//! The simulator: many cores on virtual time, with NATs, loss, partitions and restarts.
//!
//! [`Sim`] owns everything: the clock, the event queue, the network, the hosts, and a controller
//! that only keeps the map. Each host runs the real [`Mesh`](towline_core::mesh::Mesh) above a
//! model of the data plane ([`tunnel`]). The seed decides everything: the same seed and the same
//! calls give the same [`Sim::trace`].

pub mod evil_relay;
pub mod host;
pub mod nat;
pub mod net;
pub mod payload;
pub mod probes;
pub mod tunnel;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rand::SeedableRng;
use rand::rngs::StdRng;
use towline_core::mesh::{MapChange, PeerState};
use towline_core::path::Path;
use towline_fixtures::node::tombstone_of;
use towline_proto::frame::Probe;
use towline_proto::id::{NodeId, WireguardKey};
use towline_proto::node::{Node, Tombstone};

use host::{Action, Host};
use net::{Arrival, Conditions, HostId, Network, RealmId};
use payload::Payload;

/// Latency between an agent and the controller, in each direction.
const CONTROLLER_LATENCY: Duration = Duration::from_millis(20);
/// Interval at which an agent without a watch tries to open one.
const WATCH_RETRY: Duration = Duration::from_millis(500);

#[derive(Debug)]
enum Event {
    Arrive { host: HostId, at: SocketAddr, from: SocketAddr, payload: Payload },
    Signal { from: WireguardKey, to: HostId, message: Probe },
    Wake(HostId),
    Published(HostId, Box<Node>),
    Map(HostId, MapChange),
    Watch(HostId),
}

/// A datagram that somebody on the way recorded.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// Host that received it.
    pub host: HostId,
    /// Address and port of that host at which it arrived.
    pub at: SocketAddr,
    /// Content of the datagram.
    pub payload: Payload,
}

/// Somebody on the way from one host to another who changes the source of what passes.
#[derive(Debug, Clone)]
pub struct Redirection {
    /// Host whose datagrams are changed.
    pub sender: HostId,
    /// Host that receives them.
    pub receiver: HostId,
    /// Source address that they get.
    pub from: SocketAddr,
    /// Bytes of UDP payload that were changed so far.
    pub bytes: u64,
}

/// A simulation; see the module's documentation.
#[derive(Debug)]
pub struct Sim {
    /// Current virtual time.
    pub now: Instant,
    /// The simulated network.
    pub net: Network,
    /// All hosts, whether their agents run or not.
    pub hosts: Vec<Host>,
    /// True while the controller answers.
    pub controller_up: bool,
    /// Every change of a peer's state: time since the start, observing host, peer, new state.
    pub changes: Vec<(Duration, HostId, NodeId, PeerState)>,
    /// Probes that arrived at their receivers, while they are recorded.
    pub recorded: Option<Vec<Recorded>>,
    /// Host whose datagrams from a local UDP port are dropped on the way.
    pub dropped: Option<(HostId, u16)>,
    /// What somebody on the way does to the datagrams of one host to another.
    pub redirection: Option<Redirection>,
    /// Bytes of UDP payload sent to each address.
    pub bytes_to: BTreeMap<SocketAddr, u64>,
    start: Instant,
    seed: u64,
    rng: StdRng,
    queue: BTreeMap<(Instant, u64), Event>,
    next_event: u64,
    next_inner: u64,
    map: BTreeMap<NodeId, Node>,
    tombstones: BTreeMap<NodeId, Tombstone>,
    trace: DefaultHasher,
}

impl Sim {
    /// Creates a simulation without hosts.
    pub fn new(seed: u64, conditions: Conditions) -> Self {
        let start = Instant::now();
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        Self {
            now: start,
            net: Network::new(conditions),
            hosts: Vec::new(),
            controller_up: true,
            changes: Vec::new(),
            recorded: None,
            dropped: None,
            redirection: None,
            bytes_to: BTreeMap::new(),
            start,
            seed,
            rng: StdRng::from_seed(bytes),
            queue: BTreeMap::new(),
            next_event: 0,
            next_inner: 0,
            map: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            trace: DefaultHasher::new(),
        }
    }

    /// Returns the virtual time since the start.
    pub fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    /// Returns a digest of every event so far.
    pub fn trace(&self) -> u64 {
        self.trace.finish()
    }

    /// Adds a machine with these addresses. Its agent does not run yet.
    pub fn add_host(&mut self, addresses: &[(RealmId, IpAddr)]) -> HostId {
        let id = self.hosts.len();
        let number = u16::try_from(id + 1).expect("few hosts");
        let mut host = Host::new(number, self.seed, host::mesh_config());
        host.addresses = addresses.to_vec();
        for (realm, ip) in addresses {
            self.net.attach(id, *realm, *ip);
        }
        self.hosts.push(host);
        id
    }

    /// Starts or restarts an agent.
    pub fn start(&mut self, host: HostId) {
        self.hosts[host].start(self.now);
        self.settle(host);
        self.schedule(self.now + CONTROLLER_LATENCY, Event::Watch(host));
    }

    /// Kills an agent.
    pub fn stop(&mut self, host: HostId) {
        self.hosts[host].agent = None;
        self.hosts[host].watching = false;
    }

    /// Removes a node from the mesh permanently.
    pub fn remove(&mut self, host: HostId) {
        let tombstone = tombstone_of(&self.hosts[host].grant);
        self.map.remove(&tombstone.node_id);
        self.tombstones.insert(tombstone.node_id, tombstone.clone());
        self.stop(host);
        self.tell_all(&MapChange::Remove(tombstone));
    }

    /// Changes the prefixes that a host announces.
    pub fn set_prefixes(&mut self, host: HostId, prefixes: Vec<IpNet>) {
        let actions = self.hosts[host].set_prefixes(self.now, prefixes);
        self.act(host, actions);
        self.settle(host);
    }

    /// Replaces the addresses of a host.
    pub fn readdress(&mut self, host: HostId, addresses: &[(RealmId, IpAddr)]) {
        for (realm, ip) in std::mem::take(&mut self.hosts[host].addresses) {
            self.net.detach(realm, ip);
        }
        for (realm, ip) in addresses {
            self.net.attach(host, *realm, *ip);
        }
        self.hosts[host].addresses = addresses.to_vec();
        self.hosts[host].addresses_changed(self.now);
        self.settle(host);
    }

    /// Stops or restarts the controller.
    pub fn set_controller(&mut self, up: bool) {
        self.controller_up = up;
        if !up {
            for host in 0..self.hosts.len() {
                self.lose_watch(host);
            }
        }
    }

    /// Cuts or restores a host's connection to the controller.
    pub fn set_reachable(&mut self, host: HostId, reachable: bool) {
        self.hosts[host].controller_reachable = reachable;
        if !reachable {
            self.lose_watch(host);
        }
    }

    /// Sends an inner packet and returns its number; [`Self::replied`] tells whether its echo came
    /// back.
    pub fn send_inner(&mut self, from: HostId, to: HostId) -> u64 {
        self.next_inner += 1;
        let key = self.hosts[to].key();
        self.hosts[from].send_inner(self.now, key, self.next_inner);
        self.settle(from);
        self.next_inner
    }

    /// Lets a datagram that was recorded arrive once more, from any address.
    pub fn replay(&mut self, recorded: &Recorded, from: SocketAddr) {
        let Recorded { host, at, payload } = recorded.clone();
        self.schedule(self.now, Event::Arrive { host, at, from, payload });
    }

    /// Returns whether the echo of an inner packet came back.
    pub fn replied(&self, host: HostId, number: u64) -> bool {
        self.hosts[host].agent.as_ref().is_some_and(|agent| agent.replies.contains(&number))
    }

    /// Returns whether `a`'s core reports `b` as up.
    pub fn is_up(&self, a: HostId, b: HostId) -> bool {
        self.hosts[a].peer_state(self.hosts[b].id()) == Some(PeerState::Up)
    }

    /// Advances the virtual time by `time`.
    pub fn run(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    /// Advances the virtual time until a condition holds, by at most `time`. Returns whether it
    /// held.
    pub fn run_until(&mut self, time: Duration, mut holds: impl FnMut(&Self) -> bool) -> bool {
        let end = self.now + time;
        loop {
            if holds(self) {
                return true;
            }
            match self.queue.first_key_value() {
                Some(((at, _), _)) if *at <= end => {}
                _ => break,
            }
            if let Some(((at, _), event)) = self.queue.pop_first() {
                self.now = at;
                self.handle(event);
            }
        }
        self.now = end;
        false
    }

    fn handle(&mut self, event: Event) {
        (self.elapsed(), format!("{event:?}")).hash(&mut self.trace);
        match event {
            Event::Arrive { host, at, from, payload } => {
                if let Some(recorded) = self.recorded.as_mut().filter(|_| payload.is_probe()) {
                    recorded.push(Recorded { host, at, payload: payload.clone() });
                }
                for (to, payload) in self.hosts[host].receive(self.now, at, from, payload) {
                    self.send(host, to, payload);
                }
                self.settle(host);
            }
            Event::Wake(host) => {
                let due = |agent: &host::Agent| agent.wake.is_some_and(|at| at <= self.now);
                if self.hosts[host].agent.as_ref().is_some_and(due) {
                    if let Some(agent) = &mut self.hosts[host].agent {
                        agent.wake = None;
                    }
                    let clock = self.clock(host);
                    self.hosts[host].handle_timeout(self.now, clock);
                    self.settle(host);
                }
            }
            Event::Signal { from, to, message } => {
                if self.hosts[to].watching {
                    self.hosts[to].signalled(self.now, from, message);
                    self.settle(to);
                }
            }
            Event::Published(host, node) => self.published(host, *node),
            Event::Map(host, change) => {
                if self.hosts[host].watching {
                    self.hosts[host].map_changed(self.now, change);
                    self.settle(host);
                }
            }
            Event::Watch(host) => self.watch(host),
        }
    }

    /// Drains a host's actions and schedules its next wake-up.
    fn settle(&mut self, host: HostId) {
        let clock = self.clock(host);
        let actions = self.hosts[host].drain(self.now, clock);
        self.act(host, actions);
        let wanted = self.hosts[host].poll_timeout().map(|at| at.max(self.now));
        if let Some(agent) = &mut self.hosts[host].agent
            && let Some(at) = wanted
            && agent.wake.is_none_or(|wake| at < wake)
        {
            agent.wake = Some(at);
            self.schedule(at, Event::Wake(host));
        }
    }

    fn act(&mut self, host: HostId, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send(to, payload) => self.send(host, to, payload),
                Action::Open(to) => {
                    if let Some((realm, from)) = self.hosts[host].source(&to) {
                        self.net.open(self.now, &mut self.rng, realm, from, to.remote);
                    }
                }
                Action::Signal(peer, message) => {
                    let from = self.hosts[host].key();
                    let to = self.hosts.iter().position(|host| host.key() == peer);
                    if let Some(to) = to.filter(|_| self.hosts[host].watching) {
                        let at = self.now + CONTROLLER_LATENCY * 2;
                        self.schedule(at, Event::Signal { from, to, message });
                    }
                }
                Action::Publish(node) => {
                    if self.hosts[host].watching {
                        let at = self.now + CONTROLLER_LATENCY;
                        self.schedule(at, Event::Published(host, node));
                    }
                }
                Action::StateChanged(peer, _, to) => {
                    self.changes.push((self.elapsed(), host, peer, to));
                }
            }
        }
    }

    fn send(&mut self, host: HostId, to: Path, payload: Payload) {
        let second = self.elapsed().as_secs();
        *self.hosts[host].sent.entry(second).or_default() += 1;
        match &mut self.hosts[host].evil {
            None => self.transmit(host, Duration::ZERO, to, payload),
            Some(evil) => {
                for (delay, to, payload) in evil.treat(to, payload) {
                    self.transmit(host, delay, to, payload);
                }
            }
        }
    }

    fn transmit(&mut self, host: HostId, delay: Duration, to: Path, payload: Payload) {
        let Some((realm, from)) = self.hosts[host].source(&to) else { return };
        if self.dropped == Some((host, from.port())) {
            return;
        }
        if payload.size() > self.net.payload {
            return;
        }
        *self.bytes_to.entry(to.remote).or_default() += u64::from(payload.size());
        let arrival = self.net.send(self.now, &mut self.rng, host, realm, from, to.remote);
        if let Some(arrival) = arrival {
            let Arrival { host: receiver, at, mut from, .. } = arrival;
            if let Some(redirection) = &mut self.redirection
                && (redirection.sender, redirection.receiver) == (host, receiver)
            {
                from = redirection.from;
                redirection.bytes += u64::from(payload.size());
            }
            let host = receiver;
            let event = Event::Arrive { host, at, from, payload };
            self.schedule(self.now + delay + arrival.after, event);
        }
    }

    fn published(&mut self, host: HostId, node: Node) {
        let newer = self
            .map
            .get(&node.id())
            .is_none_or(|known| known.record().generation < node.record().generation);
        if !self.hosts[host].watching || !newer || self.tombstones.contains_key(&node.id()) {
            return;
        }
        self.map.insert(node.id(), node.clone());
        self.tell_all(&MapChange::Upsert(Box::new(node)));
    }

    fn tell_all(&mut self, change: &MapChange) {
        for host in 0..self.hosts.len() {
            if self.hosts[host].watching {
                let at = self.now + CONTROLLER_LATENCY;
                self.schedule(at, Event::Map(host, change.clone()));
            }
        }
    }

    fn watch(&mut self, host: HostId) {
        let it = &mut self.hosts[host];
        if it.agent.is_none() || it.watching {
            return;
        }
        if !self.controller_up || !it.controller_reachable {
            self.schedule(self.now + WATCH_RETRY, Event::Watch(host));
            return;
        }
        it.set_watching(self.now, true);
        let removed = self.tombstones.values().cloned().map(MapChange::Remove);
        let known = self.map.values().cloned().map(|node| MapChange::Upsert(Box::new(node)));
        for change in removed.chain(known).collect::<Vec<_>>() {
            self.schedule(self.now + CONTROLLER_LATENCY, Event::Map(host, change));
        }
        let publish = self.hosts[host].publish();
        self.act(host, vec![publish]);
    }

    fn lose_watch(&mut self, host: HostId) {
        if self.hosts[host].watching {
            self.hosts[host].set_watching(self.now, false);
            self.schedule(self.now + WATCH_RETRY, Event::Watch(host));
        }
    }

    /// Returns the time stamp of an initiation, in nanoseconds.
    fn clock(&self, host: HostId) -> i64 {
        let elapsed = i64::try_from(self.elapsed().as_nanos()).unwrap_or(i64::MAX);
        let offset = self.hosts[host].agent.as_ref().map_or(0, |agent| agent.clock_offset);
        elapsed + offset * 1_000_000_000
    }

    fn schedule(&mut self, at: Instant, event: Event) {
        self.next_event += 1;
        self.queue.insert((at, self.next_event), event);
    }
}
