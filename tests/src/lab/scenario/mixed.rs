//! `cargo lab mixed`: agents and controllers of an earlier version work together with those of this checkout.
//!
//! Of each kind of place there is a node of either version: a relay, a public node, a node behind a NAT, and a
//! node behind a NAT that allows no direct path to its counterpart. First all nodes use a controller of the
//! earlier version, then that of this checkout over the same state, which it migrates once. Under each of the
//! two, pairs of both versions send to each other, directly and through a relay of either version; then a node
//! of either version restarts, roams and joins again after its removal. The daemons of the earlier version are
//! built once, from the history of this checkout.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Serialize;
use towline_netlink::Family;

use super::Setting;
use super::outage::{remove_link, roam};
use crate::lab::binaries::{Binaries, require_commit};
use crate::lab::interrupt::{self, wait_for, wait_up_to};
use crate::lab::mesh::{Controller, Node, START_LIMIT};
use crate::lab::nat::Nat;
use crate::lab::ping::echoes;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, round};
use crate::lab::topology::{Lab, Router};
use crate::lab::traffic::{Pattern, tcp_both_ways};

/// Commit of the earlier version.
const BEFORE: &str = "c5ed0463e65162facf7e67569064b7adecc5aea1";

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Mixed {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Commit of the earlier version.
    pub before: &'static str,
    /// Results, in the order in which they were tried.
    pub arrows: Vec<Arrow>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Something that nodes or a controller of both versions do together.
#[derive(Debug, Serialize)]
pub struct Arrow {
    /// Version of the controller and what was done, for example `controller-before/relay-now`.
    pub name: String,
    /// True if traffic passed in both directions afterwards, on the expected path.
    pub ok: bool,
    /// Time until it did, in milliseconds; absent if it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ms: Option<f64>,
}

/// Version of a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    Before,
    Now,
}

/// Place of a node.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// Host with a public address, whose last number this is.
    Public(u8),
    /// Host behind a router with this NAT.
    Behind(Nat),
}

/// Path that a pair is expected to use.
#[derive(Debug, Clone, Copy)]
enum Path {
    Direct,
    /// Path through the relay with this number in [`NODES`].
    Relay(usize),
}

/// Name, version, place and further configuration of each node.
const NODES: [(&str, Version, Place, &str); 8] = [
    ("relay-before", Version::Before, Place::Public(3), RELAY),
    ("relay-now", Version::Now, Place::Public(4), RELAY),
    ("public-before", Version::Before, Place::Public(20), ""),
    ("public-now", Version::Now, Place::Public(21), ""),
    ("nat-before", Version::Before, Place::Behind(Nat::Masquerade), ""),
    ("nat-now", Version::Now, Place::Behind(Nat::Masquerade), ""),
    ("random-before", Version::Before, Place::Behind(Nat::SymmetricRandom), ""),
    ("random-now", Version::Now, Place::Behind(Nat::SymmetricRandom), ""),
];
/// Configuration of a relay.
const RELAY: &str = "[relay]\nenabled = true\n";

/// Number of each node in [`NODES`].
const RELAYS: [usize; 2] = [0, 1];
const PUBLIC_BEFORE: usize = 2;
const PUBLIC_NOW: usize = 3;
const NAT_BEFORE: usize = 4;
const NAT_NOW: usize = 5;
const RANDOM_BEFORE: usize = 6;
const RANDOM_NOW: usize = 7;

/// Pairs of nodes of both versions that have a direct path.
const DIRECT: [(&str, usize, usize); 4] = [
    ("public", PUBLIC_BEFORE, PUBLIC_NOW),
    ("nat-before-to-public-now", NAT_BEFORE, PUBLIC_NOW),
    ("nat-now-to-public-before", NAT_NOW, PUBLIC_BEFORE),
    ("nat-to-nat", NAT_BEFORE, NAT_NOW),
];

/// Limit for each arrow: the longest pause between two attempts of an agent is 15 s.
const LIMIT: Duration = Duration::from_secs(60);
/// Timeout of one ping.
const PING: Duration = Duration::from_millis(250);
/// Number of pings in a row that must be answered.
const PINGS: u32 = 3;
/// Size of a TCP transfer in each direction, in bytes.
const TRANSFER: u64 = 1 << 20;
/// Distance between two addresses of a node that roams, in the last number.
const ROAMED: u8 = 50;

/// Fails where the history of this checkout does not have the earlier version.
pub fn require_history() -> anyhow::Result<()> {
    require_commit(BEFORE)
}

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting) -> anyhow::Result<Mixed> {
    let rootless = setting.rank == Rank::Rootless;
    let mut figures = Mixed { rootless, before: BEFORE, ..Mixed::default() };
    let before = Binaries::build_commit(BEFORE)?;
    let mut world = World::build(setting, before)?;
    figures.failed = Promises::broken_by(|promises| figures.measure(setting, &mut world, promises));
    Ok(figures)
}

/// Hosts and programs of the scenario. Fields are dropped in this order: processes, hosts, lab.
struct World {
    /// The nodes of [`NODES`], in this order.
    nodes: Vec<Node>,
    controller: Controller,
    /// Daemons of this checkout.
    now: Binaries,
    /// Current public addresses of the two public nodes that roam.
    addresses: [Ipv4Addr; 2],
    pattern: Pattern,
    _routers: Vec<Router>,
    _lab: Lab,
}

impl World {
    /// Builds the hosts, starts a controller of the earlier version, and joins all nodes.
    fn build(setting: &Setting, before: Binaries) -> anyhow::Result<Self> {
        setting.output.step("building four public hosts and four NATs, joining eight nodes");
        let mut lab = Lab::new(setting.rank)?;
        let ctl = lab.host("ctl").public("203.0.113.2", "2001:db8::2")?.build()?;
        let mut routers = Vec::new();
        let mut hosts = Vec::new();
        for (number, (name, _, place, _)) in (11..).zip(NODES) {
            let host = match place {
                Place::Public(last) => lab
                    .host(name)
                    .only(Family::V4)
                    .public(&public(last).to_string(), &format!("2001:db8::{last:x}"))?
                    .build()?,
                Place::Behind(nat) => {
                    let router = lab
                        .router(&format!("r{number}"))
                        .public(&public(number).to_string(), &format!("2001:db8::{number:x}"))?
                        .lan_number(number)?
                        .nat(nat)
                        .build()?;
                    let host = lab.host(name).only(Family::V4).behind(&router).build()?;
                    routers.push(router);
                    host
                }
            };
            hosts.push(host);
        }
        let controller = Controller::start(&lab, &ctl, &before)?;
        let mut nodes = Vec::new();
        for ((name, version, _, more), host) in NODES.into_iter().zip(&hosts) {
            let binaries = match version {
                Version::Before => &before,
                Version::Now => &setting.binaries,
            };
            let mut node = Node::new(&lab, host, name, binaries, more)?;
            node.join(&controller.operator().token(&format!("site-{name}"))?)?;
            node.restart()?;
            nodes.push(node);
        }
        let world = Self {
            nodes,
            controller,
            now: setting.binaries.clone(),
            addresses: [public(20), public(21)],
            pattern: Pattern::random()?,
            _routers: routers,
            _lab: lab,
        };
        wait_for("complete map on every node", START_LIMIT, || {
            Ok(world.is_complete().then_some(()))
        })?;
        Ok(world)
    }

    /// Returns whether every agent that answers has each other node as a peer, once.
    fn is_complete(&self) -> bool {
        let complete = |node: &Node| node.peers().is_ok_and(|peers| peers.len() == NODES.len() - 1);
        self.nodes.iter().all(complete)
    }

    /// Returns whether pings from one node to another are answered.
    fn answers(&self, from: usize, to: usize) -> anyhow::Result<bool> {
        interrupt::check()?;
        // An agent that starts does not answer yet, and a request is refused while the link does not exist.
        let Ok(target) = self.nodes[to].overlay_v4() else { return Ok(false) };
        let namespace = self.nodes[from].host().namespace();
        Ok(echoes(namespace, target, PINGS, PING, self.pattern)
            .is_ok_and(|echoes| echoes.received == PINGS))
    }

    /// Returns whether a node sends to another on this path.
    fn uses(&self, from: usize, to: usize, path: Path) -> anyhow::Result<bool> {
        let Some(peer) = self.nodes[from].peer(self.nodes[to].name())? else { return Ok(false) };
        Ok(match path {
            Path::Direct => peer.path_kind.as_deref() == Some("direct"),
            Path::Relay(relay) => {
                peer.path_kind.as_deref() == Some("relay")
                    && peer.relay.as_deref() == Some(self.nodes[relay].name())
            }
        })
    }

    /// Waits until two nodes answer each other on this path, then sends to and fro. Returns the time of the wait.
    fn exchange(&self, a: usize, b: usize, path: Path) -> anyhow::Result<Option<Duration>> {
        let start = Instant::now();
        let found = wait_up_to(LIMIT, || {
            for (from, to) in [(a, b), (b, a)] {
                if !self.answers(from, to)? || !self.uses(from, to, path)? {
                    return Ok(None);
                }
            }
            Ok(Some(start.elapsed()))
        })?;
        if found.is_some() {
            let address = self.nodes[b].overlay_v4()?;
            let [from, to] = [a, b].map(|number| self.nodes[number].host().namespace());
            tcp_both_ways(from, to, address, TRANSFER, self.pattern, |_| ())?;
        }
        Ok(found)
    }

    /// Waits until a node and all others answer each other, and no node has a peer twice.
    fn reaches_all(&self, node: usize) -> anyhow::Result<Option<Duration>> {
        let start = Instant::now();
        wait_up_to(LIMIT, || {
            for other in (0..self.nodes.len()).filter(|other| *other != node) {
                if !self.answers(node, other)? || !self.answers(other, node)? {
                    return Ok(None);
                }
            }
            Ok(self.is_complete().then(|| start.elapsed()))
        })
    }

    /// Waits until the controller lists every node as connected.
    fn all_connected(&self) -> anyhow::Result<Option<Duration>> {
        let start = Instant::now();
        wait_up_to(LIMIT, || {
            let listed = self.controller.operator().nodes()?;
            let is_online =
                |node: &Node| listed.iter().any(|one| one.name == node.name() && one.online);
            Ok(self.nodes.iter().all(is_online).then(|| start.elapsed()))
        })
    }

    /// Lets the two nodes without a direct path use one relay alone.
    fn exchange_through(&mut self, relay: usize) -> anyhow::Result<Option<Duration>> {
        let other = RELAYS.into_iter().find(|other| *other != relay).context("no other relay")?;
        if let Some(agent) = self.nodes[other].take_agent() {
            agent.stop()?;
        }
        let result = self.exchange(RANDOM_BEFORE, RANDOM_NOW, Path::Relay(relay));
        self.nodes[other].restart()?;
        result
    }

    /// Kills an agent and starts it again.
    fn restart(&mut self, node: usize) -> anyhow::Result<Option<Duration>> {
        self.nodes[node].agent()?.kill()?;
        self.nodes[node].launch()?;
        self.reaches_all(node)
    }

    /// Gives one of the two public nodes another address.
    fn roam(&mut self, node: usize) -> anyhow::Result<Option<Duration>> {
        let Some(address) = self.addresses.get_mut(node - PUBLIC_BEFORE) else {
            bail!("node {node} does not roam")
        };
        let [.., last] = address.octets();
        let (before, after) = (*address, public(last + ROAMED));
        roam(self.nodes[node].host().namespace(), before, after)?;
        *address = after;
        self.reaches_all(node)
    }

    /// Removes a node, and has its machine join with new keys, as one that was installed again.
    fn rejoin(&mut self, number: usize) -> anyhow::Result<Option<Duration>> {
        let operator = self.controller.operator();
        let node = &mut self.nodes[number];
        operator.command_ok(&["node", "remove", node.name()])?;
        if let Some(mut agent) = node.take_agent() {
            // It may have ended by itself, as a removed node.
            let _ = agent.kill();
        }
        remove_link(node.host().namespace())?;
        std::fs::remove_dir_all(node.state()).context("cannot remove the state")?;
        node.join(&operator.token(&format!("site-{}", node.name()))?)?;
        node.launch()?;
        self.reaches_all(number)
    }

    /// Starts the controller of this checkout over the state of the earlier one.
    fn migrate(&mut self) -> anyhow::Result<Option<Duration>> {
        self.controller.replace(&self.now, &["--migrate-store"])?;
        self.all_connected()
    }

    /// Starts the migrated controller without the flag, and decides which nodes may relay.
    fn decide(&mut self) -> anyhow::Result<Option<Duration>> {
        self.controller.replace(&self.now, &[])?;
        for relay in RELAYS {
            let name = self.nodes[relay].name();
            self.controller.operator().command_ok(&["node", "set", name, "--relay"])?;
        }
        self.all_connected()
    }

    /// Starts the agent of this checkout over the state of the earlier one.
    fn upgrade(&mut self, node: usize) -> anyhow::Result<Option<Duration>> {
        if let Some(agent) = self.nodes[node].take_agent() {
            agent.stop()?;
        }
        self.nodes[node].replace(&self.now);
        self.nodes[node].launch()?;
        self.reaches_all(node)
    }
}

/// An event of a node. Returns how long it took until traffic passed again.
type Event = fn(&mut World, usize) -> anyhow::Result<Option<Duration>>;

/// Returns the public address with this last number.
fn public(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, last)
}

impl Mixed {
    /// Tries everything with the controller of the earlier version, and then with that of this checkout.
    fn measure(
        &mut self,
        setting: &Setting,
        world: &mut World,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        self.measure_with("controller-before", setting, world, promises)?;
        setting.output.step("the controller of this checkout takes over");
        let migrated = world.migrate();
        self.add("migrate".to_owned(), migrated, promises)?;
        let decided = world.decide();
        self.add("migrated".to_owned(), decided, promises)?;
        self.measure_with("controller-now", setting, world, promises)?;
        setting.output.step("an agent of the earlier version is upgraded");
        let upgraded = world.upgrade(NAT_BEFORE);
        self.add("upgrade".to_owned(), upgraded, promises)
    }

    /// Tries everything with the current controller.
    fn measure_with(
        &mut self,
        controller: &str,
        setting: &Setting,
        world: &mut World,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        setting.output.step(&format!("{controller}: direct and relayed traffic"));
        for (name, a, b) in DIRECT {
            let result = world.exchange(a, b, Path::Direct);
            self.add(format!("{controller}/{name}"), result, promises)?;
        }
        for relay in RELAYS {
            let result = world.exchange_through(relay);
            self.add(format!("{controller}/{}", NODES[relay].0), result, promises)?;
        }
        let events: [(&str, Event); 3] =
            [("restart", World::restart), ("roam", World::roam), ("rejoin", World::rejoin)];
        for (event, cause) in events {
            for node in [PUBLIC_BEFORE, PUBLIC_NOW] {
                let name = format!("{controller}/{event}-{}", NODES[node].0);
                setting.output.step(&name);
                let result = cause(world, node);
                self.add(name, result, promises)?;
            }
        }
        Ok(())
    }

    /// Adds the result of an arrow. Only an interruption of the lab ends the run.
    fn add(
        &mut self,
        name: String,
        result: anyhow::Result<Option<Duration>>,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        interrupt::check()?;
        let time = match result {
            Ok(time) => {
                promises.hold(time.is_some(), || {
                    format!("{name}: traffic in both directions within {} s", LIMIT.as_secs())
                });
                time
            }
            Err(error) => {
                promises.fail(format!("{name}: {error:#}"));
                None
            }
        };
        let ms = time.map(|time| round(time.as_secs_f64() * 1000.0));
        self.arrows.push(Arrow { name, ok: time.is_some(), ms });
        Ok(())
    }
}

impl Figures for Mixed {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        self.arrows.iter().fold(format!("earlier version: {}\n", self.before), |mut text, arrow| {
            let time = arrow.ms.map_or("failed".to_owned(), |ms| format!("{ms} ms"));
            let _ = writeln!(text, "{:<45} {time}", arrow.name);
            text
        })
    }
}
