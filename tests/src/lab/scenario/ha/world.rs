//! Hosts and programs of the scenario, and a case from the beginning of its fault to the check.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ipnet::{IpNet, Ipv4Net};
use nix::sys::signal::{Signal, kill};
use serde::Deserialize;
use towline_netlink::{Family, Rtnetlink};

use super::fault::{Fault, Kind, Target};
use super::flows::{self, Flow};
use super::history::{History, Listed, Settled, View, Violations};
use super::linear::{Answer, State};
use super::member::{CLIENTS, Member};
use super::operations::{Batch, Stopwatch};
use super::{COUNT, Case};
use crate::lab::binaries::Binaries;
use crate::lab::clock::OtherClock;
use crate::lab::interrupt::{wait_for, wait_up_to};
use crate::lab::mesh::{Controller, Node, Operator, Token};
use crate::lab::ping::echoes;
use crate::lab::report::round;
use crate::lab::scenario::Setting;
use crate::lab::topology::{Host, Lab};
use crate::lab::traffic::Pattern;

/// Number of tokens that are created at each controller during a fault.
const TOKENS: usize = 3;
/// Number of nodes that claim the same network. The others observe who holds it.
const RIVALS: usize = 2;
/// Largest number of nodes that are asked for what they see.
const OBSERVERS: usize = 4;
/// Networks that the rivals claim: one for each case.
const CLAIMED: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 99, 0, 0), 16);
/// Limit for all nodes to have the whole map at the start.
const START: Duration = Duration::from_secs(90);
/// Limit for a controller that works to accept a change: a controller that died in its turn holds the others up for
/// 5 s, a member of etcd that does not answer for 2 s, and members without a majority elect a leader afterwards.
const ACCEPT: Duration = Duration::from_secs(60);
/// Limit for all controllers to list everything after a fault, and for all nodes to see who holds a network.
const SETTLE: Duration = Duration::from_secs(60);
/// Limit for all pairs of nodes to answer each other.
const HEAL: Duration = Duration::from_secs(30);
/// Time without an answer after which a tunnel counts as lost. No fault of a controller or of etcd touches a tunnel.
const INTERRUPTED: Duration = Duration::from_secs(5);
/// Timeout of one ping.
const PING: Duration = Duration::from_millis(250);
/// Number of pings in a row that must be answered.
const PINGS: u32 = 3;

/// Hosts and programs of the scenario. Fields are dropped in this order: processes, hosts, lab.
pub(super) struct World {
    nodes: Vec<Node>,
    /// IPv4 address in the mesh of each node.
    overlay: Vec<IpAddr>,
    /// Configurations of the rivals, without the networks that they claim.
    rivals: Vec<String>,
    controllers: Vec<Controller>,
    /// Host of each controller.
    hosts: Vec<Arc<Host>>,
    members: Vec<Member>,
    clock: Option<OtherClock>,
    history: History,
    watch: Stopwatch,
    /// Number of cases that began.
    cases: u8,
    /// Number of machines that tried to join during faults.
    machines: usize,
    /// Nodes that joined during faults, and that nobody removed yet.
    removable: Vec<String>,
    pattern: Pattern,
    lab: Lab,
}

/// What a case needs and is made before its fault.
struct Prepared {
    raced: Token,
    revoked: Token,
    machines: [Node; 3],
}

/// What was measured during a fault.
struct During {
    acknowledged: usize,
    stale: Duration,
    lost: usize,
    is_network_held: bool,
    settled: Settled,
}

/// The part of `towline peers -o json` that shows networks.
#[derive(Debug, Deserialize)]
struct Reached {
    name: String,
    #[serde(default)]
    prefixes: Vec<IpNet>,
}

impl World {
    /// Builds the hosts, starts members and controllers (those of the earlier version, if there is one), and joins the
    /// nodes.
    pub(super) fn build(
        setting: &Setting,
        agents: usize,
        earlier: Option<&Binaries>,
    ) -> anyhow::Result<Self> {
        let what =
            format!("starting three etcd members and three controllers, joining {agents} nodes");
        setting.output.step(&what);
        let mut lab = Lab::new(setting.rank)?;
        let mut build = |name: &str, number: usize| {
            let (v4, v6) = (format!("203.0.113.{number}"), format!("2001:db8::{number}"));
            lab.host(name).only(Family::V4).public(&v4, &v6)?.build()
        };
        let (mut etcd, mut hosts, mut machines) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..COUNT {
            etcd.push(build(&format!("e{number}"), 20 + number)?);
            hosts.push(build(&format!("c{number}"), 30 + number)?);
        }
        for number in 0..agents {
            machines.push(build(&format!("n{number}"), 40 + number)?);
        }
        let mut members = Member::all(&lab, &etcd)?;
        members.iter_mut().try_for_each(Member::start)?;
        let binaries = earlier.unwrap_or(&setting.binaries);
        let controllers = start_controllers(binaries, &lab, &etcd, &hosts)?;
        let mut world = Self {
            nodes: Vec::new(),
            overlay: Vec::new(),
            rivals: Vec::new(),
            controllers,
            hosts,
            members,
            clock: None,
            history: History::default(),
            watch: Stopwatch::start(),
            cases: 0,
            machines: 0,
            removable: Vec::new(),
            pattern: Pattern::random()?,
            lab,
        };
        let claimed = CLAIMED.to_string();
        for (number, host) in machines.iter().enumerate() {
            let operator = world.operator(number % COUNT);
            let token = operator.token_with(&["--site", "lab", "--prefix", &claimed])?;
            let mut node =
                Node::new(&world.lab, host, &format!("n{number}"), &setting.binaries, "")?;
            node.join(&token)?;
            node.restart()?;
            world.nodes.push(node);
        }
        for node in &world.nodes {
            wait_for("complete map on every node", START, || {
                Ok((node.peers()?.len() == agents - 1).then_some(()))
            })?;
            world.overlay.push(node.overlay_v4()?);
        }
        for rival in world.nodes.iter().take(RIVALS) {
            let text = std::fs::read_to_string(rival.config());
            world.rivals.push(text.context("cannot read the configuration of a node")?);
        }
        if wait_up_to(HEAL, || Ok((world.lost()? == 0).then_some(())))?.is_none() {
            bail!("the nodes do not reach each other at the start");
        }
        Ok(world)
    }

    /// Returns the lab.
    pub(super) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Takes the library that changes the time of day for controllers.
    pub(super) fn set_clock(&mut self, clock: OtherClock) {
        self.clock = Some(clock);
    }

    /// Returns the number of recorded operations.
    pub(super) fn operations(&self) -> usize {
        self.history.len()
    }

    /// Runs a case: the fault, what is done during it, its end, and the check.
    pub(super) fn run(&mut self, setting: &Setting, fault: &Fault) -> anyhow::Result<Case> {
        let prepared = self.prepare(setting)?;
        let flow = |(number, node): (usize, &Node)| {
            let target = self.overlay[(number + 1) % self.overlay.len()];
            Flow::new(Arc::clone(node.host()), target)
        };
        let flows: Vec<Flow> = self.nodes.iter().enumerate().map(flow).collect();
        let (during, gaps) = flows::during(&flows, || self.suffer(setting, fault, &prepared))?;
        let interrupted = gaps.iter().filter(|gap| **gap > INTERRUPTED).count();
        let longest = gaps.iter().max().copied().unwrap_or_default();
        let Violations {
            lost_writes,
            double_spent_tokens,
            overlapping_prefixes,
            not_linearizable,
            admitted_refused,
        } = self.history.check(&during.settled.listed);
        Ok(Case {
            name: fault.to_string(),
            acknowledged: during.acknowledged,
            lost_writes,
            double_spent_tokens,
            not_linearizable,
            admitted_refused,
            overlapping_prefixes,
            controllers_agree: during.settled.agree,
            network_held: during.is_network_held,
            tunnels_lost: during.lost + interrupted,
            traffic_gap_ms: milliseconds(longest),
            stale_ms: milliseconds(during.stale),
        })
    }

    /// Creates the tokens and machines of a case, while everything works.
    fn prepare(&mut self, setting: &Setting) -> anyhow::Result<Prepared> {
        let number = usize::from(self.cases) % COUNT;
        let (raced, revoked) = (self.create(number)?, self.create(number)?);
        let mut machine = || {
            self.machines += 1;
            // They share the host of a node: they join, and run no agent.
            let (host, name) = (self.nodes[RIVALS].host(), format!("j{}", self.machines));
            Node::new(&self.lab, host, &name, &setting.binaries, "")
        };
        let machines = [machine()?, machine()?, machine()?];
        Ok(Prepared { raced, revoked, machines })
    }

    /// Has a fault begin and end. Everything that is promised during it is tried in between.
    fn suffer(
        &mut self,
        setting: &Setting,
        fault: &Fault,
        prepared: &Prepared,
    ) -> anyhow::Result<During> {
        self.begin(fault)?;
        let claimed = self.claim()?;
        let working: Vec<usize> = (0..COUNT).filter(|number| fault.spares(*number)).collect();
        let acknowledged = self.operate(fault, &working, prepared);
        if fault.kind == Kind::Compaction {
            let spared = fault.spared_member().context("no member of etcd is left")?;
            self.members[spared].compact()?;
        }
        let pair = match (working.first(), working.last()) {
            (Some(first), Some(last)) if first != last && fault.has_quorum() => {
                Some((*first, *last))
            }
            _ => None,
        };
        let mut stale = None;
        if let Some((here, there)) = pair {
            stale = Some(self.stale(here, there)?);
        }
        for view in self.views()? {
            self.history.observe(view);
        }
        // A tunnel does not depend on any controller.
        let healed = wait_up_to(HEAL, || Ok((self.lost()? == 0).then_some(())))?;
        let lost = if healed.is_some() { 0 } else { self.lost()? };
        self.end(setting, fault)?;
        let settled = self.settle()?;
        let is_network_held = self.agree(claimed)?;
        let stale = match stale {
            Some(stale) => stale,
            None => self.stale(0, COUNT - 1)?,
        };
        Ok(During { acknowledged, stale, lost, is_network_held, settled })
    }

    /// Does all operations of a case at once. Returns how many were acknowledged.
    fn operate(&mut self, fault: &Fault, working: &[usize], prepared: &Prepared) -> usize {
        let [first, second, unlucky] = &prepared.machines;
        let removed = if self.removable.is_empty() { None } else { Some(self.removable.remove(0)) };
        let batch = Batch {
            operators: working.iter().map(|number| self.operator(*number).clone()).collect(),
            // Without a majority of etcd each attempt takes seconds until it is refused.
            tokens: if fault.has_quorum() { TOKENS } else { 1 },
            raced: &prepared.raced,
            racers: [first, second],
            revoked: &prepared.revoked,
            unlucky,
            removed,
        };
        let operations = batch.run(self.watch);
        let mut acknowledged = 0;
        for operation in operations {
            if operation.answer == Answer::Done {
                acknowledged += 1;
                self.removable.extend(operation.joined());
            }
            self.history.add(operation);
        }
        acknowledged
    }

    /// Has both rivals claim a network that nobody held before. Returns it.
    fn claim(&mut self) -> anyhow::Result<IpNet> {
        self.cases = self.cases.wrapping_add(1);
        let [a, b, ..] = CLAIMED.network().octets();
        let network = Ipv4Net::new(Ipv4Addr::new(a, b, self.cases, 0), 24)?;
        for (node, text) in self.nodes.iter_mut().zip(&self.rivals) {
            let text = format!("{text}\n[node]\nprefixes = [\"{network}\"]\n");
            std::fs::write(node.config(), text).context("cannot write the configuration")?;
            node.reload()?;
        }
        Ok(network.into())
    }

    /// Waits until all observers show the same holder of a network. Returns whether they do.
    fn agree(&mut self, network: IpNet) -> anyhow::Result<bool> {
        let mut views = Vec::new();
        let agreed = wait_up_to(SETTLE, || {
            views = self.views()?;
            let is_held = views.first().is_some_and(|view| view.has_one_holder(network));
            let is_same = views.windows(2).all(|pair| pair[0] == pair[1]);
            Ok((is_held && is_same).then_some(()))
        })?;
        if agreed.is_none() {
            // Two observers that show different holders are an overlap, too.
            self.history.observe(View::of_all(&views));
        }
        for view in views {
            self.history.observe(view);
        }
        Ok(agreed.is_some())
    }

    /// Returns what the observers show of the networks that rivals claim.
    fn views(&self) -> anyhow::Result<Vec<View>> {
        let claimed = IpNet::V4(CLAIMED);
        let of = |node: &Node| {
            let output = node.command_ok(&["peers", "-o", "json"])?;
            let peers: Vec<Reached> = serde_json::from_str(&output)
                .context("cannot parse the output of `towline peers`")?;
            let mut view = View::default();
            for peer in peers {
                let networks = peer.prefixes.into_iter().filter(|net| claimed.contains(net));
                view.holders.extend(networks.map(|net| (peer.name.clone(), net)));
            }
            view.holders.sort();
            anyhow::Ok(view)
        };
        self.nodes.iter().skip(RIVALS).take(OBSERVERS).map(of).collect()
    }

    fn begin(&mut self, fault: &Fault) -> anyhow::Result<()> {
        for target in &fault.targets {
            match fault.kind {
                Kind::Kill => match *target {
                    Target::Controller(number) => self.controllers[number].daemon()?.kill()?,
                    Target::Etcd(number) => self.members[number].daemon()?.kill()?,
                },
                Kind::Pause => self.signal(*target, Signal::SIGSTOP)?,
                Kind::Partition | Kind::Compaction => self.connect(*target, false)?,
                Kind::Stop | Kind::Upgrade => self.stop(*target)?,
                Kind::Clock(offset) => self.show_clock(*target, Some(offset))?,
            }
        }
        Ok(())
    }

    fn end(&mut self, setting: &Setting, fault: &Fault) -> anyhow::Result<()> {
        // Controllers need etcd to start, so the members are first.
        for target in fault.targets.iter().rev() {
            match fault.kind {
                Kind::Kill | Kind::Stop => match *target {
                    Target::Controller(number) => self.controllers[number].launch()?,
                    Target::Etcd(number) => self.members[number].start()?,
                },
                Kind::Pause => self.signal(*target, Signal::SIGCONT)?,
                Kind::Partition | Kind::Compaction => self.connect(*target, true)?,
                Kind::Upgrade => {
                    if let Target::Controller(number) = *target {
                        self.controllers[number].replace(&setting.binaries, &[])?;
                    }
                }
                Kind::Clock(_) => self.show_clock(*target, None)?,
            }
        }
        Ok(())
    }

    fn stop(&mut self, target: Target) -> anyhow::Result<()> {
        let daemon = match target {
            Target::Controller(number) => self.controllers[number].take_daemon(),
            Target::Etcd(number) => self.members[number].take_daemon(),
        };
        daemon.map_or(Ok(()), |daemon| daemon.stop().map(drop))
    }

    fn signal(&mut self, target: Target, signal: Signal) -> anyhow::Result<()> {
        let pid = match target {
            Target::Controller(number) => self.controllers[number].daemon()?.pid(),
            Target::Etcd(number) => self.members[number].daemon()?.pid(),
        };
        Ok(kill(pid, signal)?)
    }

    /// Connects a host to the others, or cuts it off: the port of its cable goes down, and its own link stays.
    fn connect(&self, target: Target, is_connected: bool) -> anyhow::Result<()> {
        let host: &Host = match target {
            Target::Controller(number) => &self.hosts[number],
            Target::Etcd(number) => self.members[number].host(),
        };
        self.lab.internet().run(|| {
            let mut netlink = Rtnetlink::open()?;
            let port = netlink.link_index(host.name())?;
            Ok(netlink.set_up(port, is_connected)?)
        })
    }

    /// Restarts a controller with a clock that is off, or with the right one.
    fn show_clock(&mut self, target: Target, offset: Option<i64>) -> anyhow::Result<()> {
        let Target::Controller(number) = target else {
            bail!("the clock of an etcd member cannot be changed");
        };
        let environment = match (&self.clock, offset) {
            (Some(clock), Some(offset)) => clock.environment(offset),
            (None, Some(_)) => bail!("there is no library that changes the time of day"),
            (_, None) => Vec::new(),
        };
        self.stop(target)?;
        self.controllers[number].set_environment(environment);
        self.controllers[number].restart()
    }

    /// Waits until all controllers list the same, and everything that was acknowledged. Records what those that answer
    /// in the end list, and returns it.
    fn settle(&mut self) -> anyhow::Result<Settled> {
        let complete = wait_up_to(SETTLE, || {
            self.supervise();
            let settled = Settled::of(self.listed());
            let is_lost = |listed: &Listed| self.history.lost(listed) != 0;
            let is_complete = settled.agree && !settled.listed.iter().any(is_lost);
            Ok(is_complete.then_some(settled))
        })?;
        let settled = complete.unwrap_or_else(|| Settled::of(self.listed()));
        let at = self.watch.now();
        for listed in &settled.listed {
            self.history.read(listed, at);
        }
        Ok(settled)
    }

    /// Starts controllers that ended, as a service manager does.
    fn supervise(&mut self) {
        for controller in &mut self.controllers {
            if controller.daemon().is_ok_and(|daemon| daemon.check().is_err()) {
                // While etcd elects a leader it may end again; the next call repeats this.
                let _ = controller.launch();
            }
        }
    }

    fn operator(&self, number: usize) -> &Operator {
        self.controllers[number].operator()
    }

    /// Creates a token at a controller, as soon as that accepts it.
    fn create(&mut self, number: usize) -> anyhow::Result<Token> {
        let (watch, operator) = (self.watch, self.operator(number).clone());
        let (token, operation) =
            wait_for("acknowledged change", ACCEPT, || Ok(watch.create(&operator)))?;
        self.history.add(operation);
        Ok(token)
    }

    /// Returns the time until the controller `there` lists what the controller `here` has acknowledged.
    fn stale(&mut self, here: usize, there: usize) -> anyhow::Result<Duration> {
        let token = self.create(here)?;
        let start = Instant::now();
        let operator = self.operator(there);
        wait_for("acknowledged change at another controller", ACCEPT, || {
            let listed = operator.tokens().unwrap_or_default();
            Ok(listed.iter().any(|listed| listed.id == token.id).then(|| start.elapsed()))
        })
    }

    /// Returns what each controller lists, or why it does not answer.
    fn listed(&self) -> Vec<anyhow::Result<Listed>> {
        let state = |state: &str| match state {
            "open" => Some(State::Open),
            "used" => Some(State::Used),
            "revoked" => Some(State::Revoked),
            _ => None,
        };
        let of = |controller: &Controller| {
            let (tokens, nodes) = (controller.operator().tokens()?, controller.operator().nodes()?);
            anyhow::Ok(Listed {
                tokens: tokens.into_iter().map(|token| (token.id, state(&token.state))).collect(),
                nodes: nodes.into_iter().map(|node| (node.name, node.overlay_addresses)).collect(),
            })
        };
        self.controllers.iter().map(of).collect()
    }

    /// Returns the number of pairs of nodes of which the first gets no answers from the second.
    fn lost(&self) -> anyhow::Result<usize> {
        let of = |here: usize| {
            let mut lost = 0;
            for (_, target) in self.overlay.iter().enumerate().filter(|(there, _)| *there != here) {
                let namespace = self.nodes[here].host().namespace();
                // A request is refused while the link does not exist.
                let answered = echoes(namespace, *target, PINGS, PING, self.pattern)
                    .is_ok_and(|echoes| echoes.received == PINGS);
                lost += usize::from(!answered);
            }
            lost
        };
        std::thread::scope(|scope| {
            let of = &of;
            let running: Vec<_> =
                (0..self.overlay.len()).map(|here| scope.spawn(move || of(here))).collect();
            let mut lost = 0;
            for thread in running {
                match thread.join() {
                    Ok(of_node) => lost += of_node,
                    Err(_) => bail!("a thread of the pings panicked"),
                }
            }
            Ok(lost)
        })
    }
}

fn milliseconds(time: Duration) -> f64 {
    round(time.as_secs_f64() * 1000.0)
}

/// Starts the controllers. All of them have the CA of the first one.
fn start_controllers(
    binaries: &Binaries,
    lab: &Lab,
    etcd: &[Arc<Host>],
    hosts: &[Arc<Host>],
) -> anyhow::Result<Vec<Controller>> {
    let at = |hosts: &[Arc<Host>], port: u16| -> Vec<SocketAddr> {
        let first = hosts.iter().filter_map(|host| host.addresses().first());
        first.map(|address| SocketAddr::new(*address, port)).collect()
    };
    let endpoints: Vec<String> = at(etcd, CLIENTS).iter().map(ToString::to_string).collect();
    let config = lab.directory().join("controller.toml");
    let text = format!(
        "store = \"etcd://{}\"\n[etcd]\nshared = true\nplaintext = true\n",
        endpoints.join(",")
    );
    std::fs::write(&config, text).context("cannot write the configuration")?;
    let mut controllers: Vec<Controller> = Vec::new();
    for host in hosts {
        if let Some(first) = controllers.first() {
            let state = Controller::state_directory(lab, host);
            copy_authority(first.operator().state(), &state)?;
        }
        let advertise = at(hosts, 7443);
        let started = Controller::start_configured(lab, host, binaries, &config, advertise);
        controllers.push(started?);
    }
    Ok(controllers)
}

/// Copies the CA of one controller to the state directory of another one.
fn copy_authority(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(to).context("cannot create a state directory")?;
    for file in ["ca.key", "ca.crt", "store.key"] {
        std::fs::copy(from.join(file), to.join(file)).with_context(|| format!("no {file}"))?;
    }
    Ok(())
}
