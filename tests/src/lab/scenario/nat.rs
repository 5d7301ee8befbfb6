//! `cargo lab nat`: measures how nodes behind different kinds of NAT establish a path to each
//! other.
//!
//! The mesh has a controller and two public nodes, one of which relays. For each class of NAT and
//! address family there are up to two more nodes, each behind its own router. The pairs are tried
//! one after another. Both agents of a pair start without a cached map, and only next to the public
//! nodes, because two dozen running agents would compete for this machine. Packets for one node
//! already wait at the other. The result is the time from when both nodes hold each other's record
//! until the first of these packets arrives.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde::Serialize;
use towline_netlink::Family;

use super::Setting;
use crate::lab::interrupt::{self, wait_for, wait_up_to};
use crate::lab::mesh::{Controller, Node, START_LIMIT};
use crate::lab::namespace::join;
use crate::lab::nat::Nat;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, round};
use crate::lab::topology::{Host, Lab, Router};
use crate::lab::wire::Weather;

/// Command line options of the scenario.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Options {
    /// Test every pair of classes on each address family.
    #[arg(long)]
    pub full: bool,
    /// Round-trip time of the links, in milliseconds.
    #[arg(long = "rtt", value_name = "RTT", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=2_000))]
    pub rtt_ms: u32,
    /// Packet loss of the links, in percent.
    #[arg(long = "loss", value_name = "LOSS", default_value_t = 0.0, value_parser = percent)]
    pub loss_pct: f64,
}

/// Parses a percentage. Values outside of 0 to 100 become the nearest one inside.
fn percent(text: &str) -> Result<f64, std::num::ParseFloatError> {
    text.parse().map(|percent: f64| percent.clamp(0.0, 100.0))
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct NatFigures {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Round-trip time of the simulated internet, in milliseconds.
    pub rtt_ms: u32,
    /// Packet loss of the simulated internet in each direction, in percent.
    pub loss_pct: f64,
    /// Results of the pairs, in the order in which they were tried.
    pub pairs: Vec<Pair>,
    /// Pairs of which one node cannot send UDP datagrams, with the reason that `towline peers`
    /// shows.
    pub blocked: Vec<Blocked>,
    /// Median of `first_packet_ms` over all pairs.
    pub median_first_packet_ms: Option<f64>,
    /// Maximum of `first_packet_ms` over all pairs.
    pub worst_first_packet_ms: Option<f64>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Result for two nodes that had no tunnel before.
#[derive(Debug, Serialize)]
pub struct Pair {
    /// NAT class of the sender.
    pub a: &'static str,
    /// NAT class of the receiver.
    pub b: &'static str,
    /// Address family: "v4", "v6" or "dual".
    pub family: &'static str,
    /// Time from when both nodes held each other's record until the first packet arrived, in
    /// milliseconds. `None` if no packet arrived.
    pub first_packet_ms: Option<f64>,
    /// Kind of the final path: "direct" or "relay".
    pub path: Option<String>,
    /// Time from the same moment until the path was direct, in milliseconds. `None` if it was never
    /// direct.
    pub direct_ms: Option<f64>,
    /// Best kind of path that the two NATs allow: "direct" or "relay".
    pub expected: &'static str,
}

/// Pair of nodes that cannot establish a path yet.
#[derive(Debug, Serialize)]
pub struct Blocked {
    /// NAT class of the node that cannot send UDP datagrams.
    pub a: &'static str,
    /// NAT class of the other node.
    pub b: &'static str,
    /// Reason that `towline peers` shows.
    pub says: String,
}

/// NAT in front of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    /// No NAT: the node has public addresses.
    Public,
    /// One router with this kind of NAT.
    Behind(Nat),
    /// A home router behind a carrier-grade NAT.
    Carrier,
}

/// Address families of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stack {
    V4,
    V6,
    Dual,
}

use Class::{Behind, Carrier, Public};
use Nat::{
    AddressRestricted, FullCone, Masquerade, Symmetric, SymmetricRandom, UdpBlocked, Unfiltered,
};

/// Pause before the first pair, for each node that was stopped. The kernel still cleans up after
/// each of them, and until then drops packets to a link that has just come up. Real machines do not
/// share a kernel.
const REST: Duration = Duration::from_millis(300);

/// Pairs without `--full`: they cover each class, each address family, and both kinds of final
/// path.
const PAIRS: [(Class, Class, Stack); 14] = [
    (Public, Behind(Masquerade), Stack::V4),
    (Behind(Masquerade), Behind(Masquerade), Stack::V4),
    (Behind(FullCone), Behind(Symmetric), Stack::V4),
    (Behind(AddressRestricted), Behind(SymmetricRandom), Stack::V4),
    (Behind(Masquerade), Behind(AddressRestricted), Stack::V4),
    (Behind(Masquerade), Carrier, Stack::V4),
    (Carrier, Carrier, Stack::V4),
    (Behind(SymmetricRandom), Public, Stack::V4),
    (Behind(Symmetric), Behind(Masquerade), Stack::V4),
    (Behind(Symmetric), Behind(SymmetricRandom), Stack::V4),
    (Carrier, Behind(Symmetric), Stack::V4),
    (Behind(Masquerade), Behind(Masquerade), Stack::V6),
    (Behind(Symmetric), Public, Stack::V6),
    (Behind(Symmetric), Behind(Symmetric), Stack::Dual),
];

/// All classes that let UDP through.
const CLASSES: [Class; 7] = [
    Public,
    Behind(FullCone),
    Behind(AddressRestricted),
    Behind(Masquerade),
    Behind(Symmetric),
    Behind(SymmetricRandom),
    Carrier,
];

/// UDP port of the discard service (RFC 863).
const PORT: u16 = 9;
/// Limit for the first packet, in milliseconds.
const WORST_MS: f64 = 2_000.0;
/// Limit for the path to become direct.
const DIRECT: Duration = Duration::from_secs(5);
/// Limit for status to show why no path can be established.
const SAID: Duration = Duration::from_secs(20);

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<NatFigures> {
    let mut figures = NatFigures {
        rootless: setting.rank == Rank::Rootless,
        rtt_ms: options.rtt_ms,
        loss_pct: options.loss_pct,
        ..NatFigures::default()
    };
    let pairs = if options.full { grid() } else { PAIRS.to_vec() };
    setting.output.step("building the simulated internet, the NATs and the nodes");
    let mut world = World::build(setting, *options, &pairs)?;
    figures.failed =
        Promises::broken_by(|promises| figures.measure(setting, &mut world, &pairs, promises));
    Ok(figures)
}

/// Returns all pairs of classes, on all address families.
fn grid() -> Vec<(Class, Class, Stack)> {
    let mut pairs = Vec::new();
    for stack in [Stack::V4, Stack::V6, Stack::Dual] {
        for (number, a) in CLASSES.into_iter().enumerate() {
            pairs.extend(CLASSES[number..].iter().map(|b| (a, *b, stack)));
        }
    }
    pairs
}

impl Class {
    fn name(self) -> &'static str {
        match self {
            Public => "none",
            Behind(FullCone) => "full-cone",
            Behind(AddressRestricted) => "address-restricted",
            Behind(Masquerade) => "port-restricted",
            Behind(Unfiltered) => "unfiltered",
            Behind(Symmetric) => "symmetric",
            Behind(SymmetricRandom) => "symmetric-random",
            Behind(UdpBlocked) => "udp-blocked",
            Carrier => "cgnat",
        }
    }

    fn is_symmetric(self) -> bool {
        matches!(self, Behind(Symmetric | SymmetricRandom))
    }

    /// Returns whether the NAT only accepts packets from an address and port that the node has sent
    /// to.
    fn filters_ports(self) -> bool {
        matches!(self, Carrier | Behind(Masquerade | Unfiltered)) || self.is_symmetric()
    }
}

impl Stack {
    fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Dual => "dual",
        }
    }
}

/// Returns the best kind of path between two classes. The port of a symmetric NAT is not known in
/// advance. A peer discovers it if its own NAT accepts packets from every port of an address that
/// it has sent to.
fn expected(a: Class, b: Class, stack: Stack) -> &'static str {
    let unknown = a.is_symmetric() && b.filters_ports() || b.is_symmetric() && a.filters_ports();
    if unknown && stack == Stack::V4 { "relay" } else { "direct" }
}

/// Node of the scenario: its NAT, its address families, and its number within these (0 or 1).
type Place = (Class, Stack, usize);

/// Hosts and programs of the scenario. Fields are dropped in this order: processes, hosts, lab.
struct World {
    nodes: BTreeMap<Place, Node>,
    /// The two public nodes.
    fixed: Vec<Node>,
    /// Mesh address of each node.
    overlay: BTreeMap<Place, IpAddr>,
    _controller: Controller,
    _routers: Vec<Router>,
    _lab: Lab,
}

impl World {
    /// Builds the hosts and NATs, joins all nodes, and waits until each has the map.
    fn build(
        setting: &Setting,
        options: Options,
        pairs: &[(Class, Class, Stack)],
    ) -> anyhow::Result<Self> {
        let mut lab = Lab::new(setting.rank)?;
        // A packet and its reply cross four cables in total, and each direction crosses two.
        lab.weather(Weather {
            delay: Duration::from_millis(options.rtt_ms.into()) / 4,
            lost: (options.loss_pct * 1000.0 / 2.0) as u32,
            ..Weather::default()
        });
        let mut places: Vec<Place> = pairs
            .iter()
            .flat_map(|(a, b, stack)| [(*a, *stack, 0), (*b, *stack, 1)])
            .chain([(Behind(UdpBlocked), Stack::V4, 0), (Public, Stack::V4, 1)])
            .collect();
        places.sort_unstable();
        places.dedup();
        let host = lab.host("ctl").public("203.0.113.2", "2001:db8::2")?.build()?;
        let mut fixed_hosts = Vec::new();
        for (name, number) in [("relay", 3), ("cp", 4)] {
            let (v4, v6) = (format!("203.0.113.{number}"), format!("2001:db8::{number:x}"));
            fixed_hosts.push((name, lab.host(name).public(&v4, &v6)?.build()?));
        }
        let mut routers = Vec::new();
        let mut hosts = Vec::new();
        for (number, place) in places.iter().enumerate() {
            let host = settle(&mut lab, &mut routers, *place, number)?;
            hosts.push((*place, host));
        }
        setting.output.step("starting the controller");
        let controller = Controller::start_on_all(&lab, &host, &setting.binaries)?;
        let mut fixed = Vec::new();
        for (name, host) in fixed_hosts {
            let relay = if name == "relay" { "[relay]\nenabled = true\n" } else { "" };
            let mut node = Node::new(&lab, &host, name, &setting.binaries, relay)?;
            node.join(&controller.operator().token_with(&["--site", "cloud", "--relay"])?)?;
            node.launch()?;
            fixed.push(node);
        }
        setting.output.step(&format!("joining {} nodes", hosts.len()));
        let mut nodes = BTreeMap::new();
        for (number, (place, host)) in hosts.into_iter().enumerate() {
            let (class, stack, side) = place;
            let name = format!("{}-{}-{side}", class.name(), stack.name());
            let mut node = Node::new(&lab, &host, &name, &setting.binaries, "")?;
            node.join(&controller.operator().token(&format!("site-{number}"))?)?;
            node.launch()?;
            nodes.insert(place, node);
        }
        let mut world = Self {
            nodes,
            fixed,
            overlay: BTreeMap::new(),
            _controller: controller,
            _routers: routers,
            _lab: lab,
        };
        world.settle(setting)?;
        Ok(world)
    }

    /// Starts both agents without a cached map, and measures how they establish a path.
    fn pair(&mut self, a: Place, b: Place) -> anyhow::Result<Pair> {
        let expected = expected(a.0, b.0, a.1);
        let target = *self.overlay.get(&b).context("the node does not exist")?;
        let (here, there) = (Arc::clone(self.node(a)?.host()), Arc::clone(self.node(b)?.host()));
        let done = AtomicBool::new(false);
        let (seen, arrived) = std::thread::scope(|scope| {
            let arrival = scope.spawn(|| first_packet(&here, &there, target, &done));
            let seen = self.watch(a, b, expected);
            // The packet may arrive after the path is direct.
            let _ = wait_up_to(DIRECT, || Ok(arrival.is_finished().then_some(())));
            done.store(true, Ordering::Relaxed);
            (seen, arrival.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked"))))
        });
        for place in [a, b] {
            self.node(place)?.stop_and_forget_map()?;
        }
        let (known, direct, path) = seen?;
        let ms = |at: Instant| round(at.saturating_duration_since(known).as_secs_f64() * 1000.0);
        Ok(Pair {
            a: a.0.name(),
            b: b.0.name(),
            family: a.1.name(),
            first_packet_ms: arrived?.map(ms),
            path,
            direct_ms: direct.map(ms),
            expected,
        })
    }

    /// Starts both agents. Returns when they held each other's record, when their path was direct,
    /// and the final kind of path.
    fn watch(
        &mut self,
        a: Place,
        b: Place,
        expected: &str,
    ) -> anyhow::Result<(Instant, Option<Instant>, Option<String>)> {
        for place in [a, b] {
            self.node(place)?.launch()?;
        }
        let find = |place: Place| self.nodes.get(&place).context("the node does not exist");
        let (from, to) = (find(a)?, find(b)?);
        // Time of the last check at which a record was missing. The measured times are never too
        // short.
        let mut before = Instant::now();
        wait_for("each other's record on both nodes", START_LIMIT, || {
            let now = Instant::now();
            let knows = |one: &Node, other: &Node| matches!(one.peer(other.name()), Ok(Some(peer)) if peer.has_candidates());
            if knows(from, to) && knows(to, from) {
                return Ok(Some(()));
            }
            before = now;
            Ok(None)
        })?;
        let limit = if expected == "direct" { DIRECT * 2 } else { DIRECT };
        let direct = wait_up_to(limit, || {
            Ok((kind(from, to)?.as_deref() == Some("direct")).then(Instant::now))
        })?;
        Ok((before, direct, kind(from, to)?))
    }

    /// Checks a pair that cannot establish a path, because one node cannot send UDP datagrams:
    /// status must show the reason.
    fn unserved(&mut self, promises: &mut Promises) -> anyhow::Result<Blocked> {
        let (a, b) = ((Behind(UdpBlocked), Stack::V4, 0), (Public, Stack::V4, 1));
        let target = *self.overlay.get(&b).context("the node does not exist")?;
        for place in [a, b] {
            self.node(place)?.restart()?;
        }
        let find = |place: Place| self.nodes.get(&place).context("the node does not exist");
        let (blocked, open) = (find(a)?, find(b)?);
        blocked.host().namespace().run(|| {
            let socket = UdpSocket::bind((IpAddr::from([0, 0, 0, 0]), 0))?;
            let _ = socket.send_to(b"towline", SocketAddr::new(target, PORT));
            Ok(())
        })?;
        let reason = || -> anyhow::Result<Option<String>> {
            Ok(blocked.peer(open.name())?.and_then(|peer| peer.reason))
        };
        let says = wait_up_to(SAID, || Ok(reason()?.filter(|reason| reason.contains("UDP"))))?;
        promises.hold(says.is_some(), || {
            "peers of a node without UDP shows that UDP is blocked".to_owned()
        });
        let says = match says {
            Some(says) => says,
            None => reason()?.unwrap_or_default(),
        };
        Ok(Blocked { a: a.0.name(), b: b.0.name(), says })
    }

    /// Returns the node at a place.
    fn node(&mut self, place: Place) -> anyhow::Result<&mut Node> {
        self.nodes
            .get_mut(&place)
            .with_context(|| format!("there is no node of class {:?}", place.0))
    }

    /// Waits until each node knows all other nodes and has found its server-reflexive candidates.
    /// Then stops the nodes of the pairs.
    fn settle(&mut self, setting: &Setting) -> anyhow::Result<()> {
        setting.output.step("waiting until all nodes know each other");
        let others = self.nodes.len() + self.fixed.len() - 1;
        for node in self.nodes.values_mut().chain(&mut self.fixed) {
            node.await_status(START_LIMIT)?;
        }
        // The record with server-reflexive candidates follows shortly after the first record.
        for node in self.nodes.values().chain(&self.fixed) {
            let what = format!("map with {others} peers on {}", node.name());
            wait_for(&what, START_LIMIT, || Ok((node.peers()?.len() == others).then_some(())))?;
        }
        interrupt::sleep(Duration::from_secs(2))?;
        for (place, node) in &mut self.nodes {
            self.overlay.insert(*place, node.overlay_v4()?);
            node.stop_and_forget_map()?;
        }
        Ok(interrupt::sleep(REST * self.nodes.len() as u32)?)
    }
}

/// Builds a host with the routers in front of it.
fn settle(
    lab: &mut Lab,
    routers: &mut Vec<Router>,
    (class, stack, _): Place,
    number: usize,
) -> anyhow::Result<Arc<Host>> {
    let (v4, v6) = (format!("203.0.113.{}", number + 10), format!("2001:db8::{:x}", number + 16));
    let lan = (format!("192.168.{number}.0/24"), format!("2001:db8:{:x}::/64", number + 1));
    let name = format!("n{number}");
    let router = match class {
        Public => None,
        Behind(nat) => Some(
            lab.router(&format!("r{number}"))
                .public(&v4, &v6)?
                .lan(&lan.0, &lan.1)?
                .nat(nat)
                .build()?,
        ),
        Carrier => {
            let carrier = lab
                .router(&format!("c{number}"))
                .public(&v4, &v6)?
                .lan("100.64.0.0/24", &format!("2001:db8:{:x}::/64", number + 0x1001))?
                .nat(Masquerade)
                .build()?;
            let home = lab
                .router(&format!("r{number}"))
                .behind(&carrier)
                .lan(&lan.0, &lan.1)?
                .nat(Masquerade)
                .build()?;
            routers.push(carrier);
            Some(home)
        }
    };
    let builder = lab.host(&name);
    let builder = match &router {
        Some(router) => builder.behind(router),
        None => builder.public(&v4, &v6)?,
    };
    let builder = match stack {
        Stack::V4 => builder.only(Family::V4),
        Stack::V6 => builder.only(Family::V6),
        Stack::Dual => builder,
    };
    let host = builder.build()?;
    routers.extend(router);
    Ok(host)
}

impl NatFigures {
    /// Runs all pairs, and the pair that cannot establish a path.
    fn measure(
        &mut self,
        setting: &Setting,
        world: &mut World,
        pairs: &[(Class, Class, Stack)],
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        for (a, b, stack) in pairs.iter().copied() {
            let pair = world.pair((a, stack, 0), (b, stack, 1))?;
            setting.output.step(&pair.line());
            pair.check(promises);
            self.pairs.push(pair);
        }
        let mut first: Vec<f64> =
            self.pairs.iter().filter_map(|pair| pair.first_packet_ms).collect();
        first.sort_unstable_by(f64::total_cmp);
        self.median_first_packet_ms = first.get(first.len() / 2).copied();
        self.worst_first_packet_ms = first.last().copied();
        let median_limit = if self.rtt_ms == 0 { 150.0 } else { 500.0 };
        let median = self.median_first_packet_ms.unwrap_or(f64::INFINITY);
        promises.hold(median < median_limit, || {
            format!("median of first_packet_ms below {median_limit}: {median}")
        });
        self.blocked.push(world.unserved(promises)?);
        Ok(())
    }
}

/// Returns the kind of path from one node to another, as `towline peers` shows it.
fn kind(from: &Node, to: &Node) -> anyhow::Result<Option<String>> {
    Ok(from.peer(to.name())?.and_then(|peer| peer.path_kind))
}

/// Sends small inner packets until one arrives or `done` is set. Returns the time of its arrival.
fn first_packet(
    from: &Host,
    to: &Host,
    target: IpAddr,
    done: &AtomicBool,
) -> anyhow::Result<Option<Instant>> {
    /// Pause between two packets.
    const PACE: Duration = Duration::from_millis(10);
    let arrived = AtomicBool::new(false);
    let (arrived, over) = (&arrived, || done.load(Ordering::Relaxed));
    std::thread::scope(|scope| {
        let receiver = to.namespace().thread(scope, "first", move || {
            // Bind to any address, because the mesh address may not exist yet.
            let socket = UdpSocket::bind((IpAddr::from([0, 0, 0, 0]), PORT))?;
            socket.set_read_timeout(Some(PACE))?;
            let mut byte = [0; 8];
            while !over() {
                interrupt::check()?;
                if socket.recv_from(&mut byte).is_ok() {
                    arrived.store(true, Ordering::Relaxed);
                    return Ok(Some(Instant::now()));
                }
            }
            Ok(None)
        })?;
        let sender = from.namespace().thread(scope, "first", move || {
            let socket = UdpSocket::bind((IpAddr::from([0, 0, 0, 0]), 0))?;
            while !arrived.load(Ordering::Relaxed) && !over() {
                // Without a route or a path the packet is lost. A later one will arrive.
                let _ = socket.send_to(b"towline", SocketAddr::new(target, PORT));
                std::thread::sleep(PACE);
            }
            Ok(())
        })?;
        let arrived = join(receiver);
        join(sender)?;
        arrived
    })
}

impl Pair {
    /// Checks the promises about a pair.
    fn check(&self, promises: &mut Promises) {
        let name = || format!("{} to {} on {}", self.a, self.b, self.family);
        match self.first_packet_ms {
            None => promises.fail(format!("{}: a packet arrives", name())),
            Some(ms) => promises.hold(ms < WORST_MS, || {
                format!("{}: first packet within {WORST_MS} ms: {ms}", name())
            }),
        }
        if self.expected == "direct" {
            let direct = self.direct_ms.unwrap_or(f64::INFINITY);
            promises.hold(direct <= DIRECT.as_secs_f64() * 1000.0, || {
                format!("{}: the path is direct within {} s: {direct} ms", name(), DIRECT.as_secs())
            });
        }
    }

    /// Returns the result in one line.
    fn line(&self) -> String {
        let ms = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms} ms"));
        format!(
            "{} to {} on {}: first packet {}, {} (expected {}), direct after {}",
            self.a,
            self.b,
            self.family,
            ms(self.first_packet_ms),
            self.path.as_deref().unwrap_or("no path"),
            self.expected,
            ms(self.direct_ms)
        )
    }
}

impl Figures for NatFigures {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for pair in &self.pairs {
            let _ = writeln!(text, "{}", pair.line());
        }
        for blocked in &self.blocked {
            let _ = writeln!(text, "{} to {}: {}", blocked.a, blocked.b, blocked.says);
        }
        let ms = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms} ms"));
        let _ = write!(
            text,
            "first packet: median {}, worst {}",
            ms(self.median_first_packet_ms),
            ms(self.worst_first_packet_ms)
        );
        text
    }
}
