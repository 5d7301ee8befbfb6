//! `cargo lab ha`: three controllers share three etcd members. Each of the six is killed, paused and cut off from the
//! network in turn, and then each controller is restarted, while operators create tokens, machines join, and nodes send to each other.
//!
//! | file | owns |
//! |---|---|
//! | `history.rs` | the check of the recorded operations |

mod history;

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use serde::Serialize;
use towline_netlink::{Family, Rtnetlink};

use super::Setting;
use crate::lab::interrupt::{wait_for, wait_up_to};
use crate::lab::mesh::{Controller, Node, Operator, START_LIMIT, Token};
use crate::lab::ping::echoes;
use crate::lab::privilege::Rank;
use crate::lab::process::{Daemon, Program};
use crate::lab::report::{Figures, Promises, round};
use crate::lab::topology::{Host, Lab};
use crate::lab::traffic::Pattern;

use history::{History, Listed, Operation, Violations};

/// Number of controllers, of etcd members and of nodes.
const COUNT: usize = 3;
/// Number of tokens that are created at each controller during a fault.
const TOKENS: usize = 3;
/// Limit for a controller that works to accept a change during a fault: a controller that died in its turn holds the
/// others up for 5 s, and a member of etcd that does not answer for 2 s.
const ACCEPT: Duration = Duration::from_secs(30);
/// Limit for all controllers to list everything after a fault.
const SETTLE: Duration = Duration::from_secs(60);
/// Limit for all pairs of nodes to answer each other.
const HEAL: Duration = Duration::from_secs(30);
/// Timeout of one ping.
const PING: Duration = Duration::from_millis(250);
/// Number of pings in a row that must be answered.
const PINGS: u32 = 3;

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Ha {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Results of the cases.
    pub cases: Vec<Case>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Result of a case.
#[derive(Debug, Serialize)]
pub struct Case {
    /// Name of the fault, and of what had it.
    pub name: String,
    /// Changes that were acknowledged during the fault.
    pub acknowledged: usize,
    /// Acknowledged changes that a controller did not list afterwards, over all controllers.
    pub lost_writes: usize,
    /// Tokens for one node that admitted more.
    pub double_spent_tokens: usize,
    /// Pairs of nodes with the same address.
    pub overlapping_prefixes: usize,
    /// Pairs of nodes that did not answer each other during the fault.
    pub tunnels_lost: usize,
    /// Time from an acknowledged change at one controller until another one listed it, in milliseconds.
    pub stale_ms: f64,
}

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Pause,
    Partition,
    /// It is told to stop, and starts again: one step of a rolling restart.
    Stop,
}

/// What has the fault, with its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Controller(usize),
    Etcd(usize),
}

/// A member of the etcd cluster.
struct Member {
    host: Arc<Host>,
    program: Program,
    log: PathBuf,
    daemon: Option<Daemon>,
}

/// Hosts and programs of the scenario. Fields are dropped in this order: processes, hosts, lab.
struct World {
    nodes: Vec<Node>,
    /// IPv4 address in the mesh of each node.
    overlay: Vec<IpAddr>,
    controllers: Vec<Controller>,
    /// Host of each controller.
    hosts: Vec<Arc<Host>>,
    members: Vec<Member>,
    history: History,
    /// Number of machines that tried to join during faults.
    joined: usize,
    pattern: Pattern,
    lab: Lab,
}

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting) -> anyhow::Result<Ha> {
    let mut figures = Ha { rootless: setting.rank == Rank::Rootless, ..Ha::default() };
    let mut promises = Promises::new();
    let mut world = World::build(setting)?;
    for (fault, target) in faults() {
        let name = name(fault, target);
        setting.output.step(&name);
        match world.run(setting, fault, target, name.clone()) {
            Ok(case) => {
                case.check(&mut promises);
                figures.cases.push(case);
            }
            Err(error) => {
                // What follows would be measured with the rest of this fault.
                promises.fail(format!("{name}: {error:#}"));
                break;
            }
        }
    }
    figures.failed = promises.into_failed();
    Ok(figures)
}

fn faults() -> Vec<(Fault, Target)> {
    let mut faults = Vec::new();
    for fault in [Fault::Kill, Fault::Pause, Fault::Partition] {
        faults.extend((0..COUNT).map(|number| (fault, Target::Controller(number))));
        faults.extend((0..COUNT).map(|number| (fault, Target::Etcd(number))));
    }
    faults.extend((0..COUNT).map(|number| (Fault::Stop, Target::Controller(number))));
    faults
}

fn name(fault: Fault, target: Target) -> String {
    let fault = match fault {
        Fault::Kill => "kill",
        Fault::Pause => "pause",
        Fault::Partition => "partition",
        Fault::Stop => "restart",
    };
    match target {
        Target::Controller(number) => format!("{fault}_controller_{number}"),
        Target::Etcd(number) => format!("{fault}_etcd_{number}"),
    }
}

impl Case {
    fn check(&self, promises: &mut Promises) {
        let counts = [
            ("lost_writes", self.lost_writes),
            ("double_spent_tokens", self.double_spent_tokens),
            ("overlapping_prefixes", self.overlapping_prefixes),
            ("tunnels_lost", self.tunnels_lost),
        ];
        for (what, count) in counts {
            promises.hold(count == 0, || format!("{}: {what}: {count}", self.name));
        }
    }
}

impl Member {
    /// Returns the members of a cluster, which do not run yet.
    fn all(lab: &Lab, hosts: &[Arc<Host>]) -> anyhow::Result<Vec<Self>> {
        let address = |host: &Host| host.addresses().first().copied().context("no address");
        let mut cluster = Vec::new();
        for (number, host) in hosts.iter().enumerate() {
            cluster.push(format!("e{number}=http://{}:2380", address(host)?));
        }
        let path = std::env::var_os("TOWLINE_TEST_ETCD").unwrap_or_else(|| "etcd".into());
        let mut members = Vec::new();
        for (number, host) in hosts.iter().enumerate() {
            let own = address(host)?;
            let (client, peer) = (format!("http://{own}:2379"), format!("http://{own}:2380"));
            let program = Program::new(&path)
                .args(["--name", &format!("e{number}"), "--log-level", "error"])
                .arg("--data-dir")
                .arg(lab.directory().join(format!("etcd-{number}")))
                .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
                .args(["--initial-cluster", &cluster.join(",")])
                .env("ETCD_UNSUPPORTED_ARCH", "arm64");
            let log = lab.directory().join(format!("etcd-{number}.log"));
            members.push(Self { host: Arc::clone(host), program, log, daemon: None });
        }
        Ok(members)
    }

    fn start(&mut self) -> anyhow::Result<()> {
        let started = self.program.start(self.host.namespace(), "etcd", &self.log);
        self.daemon = Some(started.context("apt-get install etcd-server")?);
        Ok(())
    }
}

impl World {
    fn build(setting: &Setting) -> anyhow::Result<Self> {
        setting
            .output
            .step("starting three etcd members and three controllers, joining three nodes");
        let mut lab = Lab::new(setting.rank)?;
        let mut build = |name: &str, number: usize| {
            let (v4, v6) = (format!("203.0.113.{number}"), format!("2001:db8::{number}"));
            lab.host(name).only(Family::V4).public(&v4, &v6)?.build()
        };
        let (mut etcd, mut hosts, mut machines) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..COUNT {
            etcd.push(build(&format!("e{number}"), 20 + number)?);
            hosts.push(build(&format!("c{number}"), 30 + number)?);
            machines.push(build(&format!("n{number}"), 40 + number)?);
        }
        let mut members = Member::all(&lab, &etcd)?;
        members.iter_mut().try_for_each(Member::start)?;
        let controllers = start_controllers(setting, &lab, &etcd, &hosts)?;
        let pattern = Pattern::random()?;
        let mut world = Self {
            nodes: Vec::new(),
            overlay: Vec::new(),
            controllers,
            hosts,
            members,
            history: History::default(),
            joined: 0,
            pattern,
            lab,
        };
        for (number, host) in machines.iter().enumerate() {
            let mut node =
                Node::new(&world.lab, host, &format!("n{number}"), &setting.binaries, "")?;
            node.join(&world.controllers[number].operator().token("lab")?)?;
            node.restart()?;
            world.nodes.push(node);
        }
        for node in &world.nodes {
            wait_for("complete map on every node", START_LIMIT, || {
                Ok((node.peers()?.len() == COUNT - 1).then_some(()))
            })?;
            world.overlay.push(node.overlay_v4()?);
        }
        if wait_up_to(HEAL, || Ok((world.lost()? == 0).then_some(())))?.is_none() {
            bail!("the nodes do not reach each other at the start");
        }
        Ok(world)
    }

    /// Runs a case: the fault, what is done during it, its end, and the check.
    fn run(
        &mut self,
        setting: &Setting,
        fault: Fault,
        target: Target,
        name: String,
    ) -> anyhow::Result<Case> {
        self.begin(fault, target)?;
        let working: Vec<usize> =
            (0..COUNT).filter(|number| target != Target::Controller(*number)).collect();
        let mut acknowledged = 0;
        for _ in 0..TOKENS {
            for number in &working {
                acknowledged += usize::from(self.create(*number).is_ok());
            }
        }
        let stale = self.stale(working[0], working[working.len() - 1])?;
        acknowledged += self.race(setting, working[0])?;
        // A tunnel does not depend on any controller.
        let healed = wait_up_to(HEAL, || Ok((self.lost()? == 0).then_some(())))?;
        let tunnels_lost = if healed.is_some() { 0 } else { self.lost()? };
        self.end(fault, target)?;
        let settled = wait_up_to(SETTLE, || {
            let listed = self.listed().ok();
            let is_complete = |listed: &Vec<Listed>| {
                listed.iter().all(|listed| self.history.lost(listed) == 0)
                    && listed.windows(2).all(|pair| pair[0] == pair[1])
            };
            Ok(listed.filter(is_complete))
        })?;
        let listed = match settled {
            Some(listed) => listed,
            None => self.listed()?,
        };
        let Violations { lost_writes, double_spent_tokens, overlapping_prefixes } =
            self.history.check(&listed);
        Ok(Case {
            name,
            acknowledged,
            lost_writes,
            double_spent_tokens,
            overlapping_prefixes,
            tunnels_lost,
            stale_ms: round(stale.as_secs_f64() * 1000.0),
        })
    }

    fn begin(&mut self, fault: Fault, target: Target) -> anyhow::Result<()> {
        match fault {
            Fault::Kill => match target {
                Target::Controller(number) => self.controllers[number].daemon()?.kill(),
                Target::Etcd(number) => daemon(&mut self.members[number])?.kill(),
            },
            Fault::Pause => self.signal(target, Signal::SIGSTOP),
            Fault::Partition => self.connect(target, false),
            Fault::Stop => {
                let daemon = match target {
                    Target::Controller(number) => self.controllers[number].take_daemon(),
                    Target::Etcd(number) => self.members[number].daemon.take(),
                };
                daemon.map_or(Ok(()), |daemon| daemon.stop().map(drop))
            }
        }
    }

    fn end(&mut self, fault: Fault, target: Target) -> anyhow::Result<()> {
        match fault {
            Fault::Kill | Fault::Stop => match target {
                Target::Controller(number) => self.controllers[number].restart(),
                Target::Etcd(number) => self.members[number].start(),
            },
            Fault::Pause => self.signal(target, Signal::SIGCONT),
            Fault::Partition => self.connect(target, true),
        }
    }

    fn signal(&mut self, target: Target, signal: Signal) -> anyhow::Result<()> {
        let pid = match target {
            Target::Controller(number) => self.controllers[number].daemon()?.pid(),
            Target::Etcd(number) => daemon(&mut self.members[number])?.pid(),
        };
        Ok(kill(pid, signal)?)
    }

    /// Connects a host to the others, or cuts it off: the port of its cable goes down, and its own link stays.
    fn connect(&self, target: Target, is_connected: bool) -> anyhow::Result<()> {
        let host = match target {
            Target::Controller(number) => &self.hosts[number],
            Target::Etcd(number) => &self.members[number].host,
        };
        self.lab.internet().run(|| {
            let mut netlink = Rtnetlink::open()?;
            let port = netlink.link_index(host.name())?;
            Ok(netlink.set_up(port, is_connected)?)
        })
    }

    fn operator(&self, number: usize) -> &Operator {
        self.controllers[number].operator()
    }

    /// Creates a token at a controller, and records it.
    fn create(&mut self, number: usize) -> anyhow::Result<Token> {
        let token = self.operator(number).token("lab")?;
        self.history.add(Operation::Create { token: token.id.clone() });
        Ok(token)
    }

    /// Creates a token at a controller until it accepts that.
    fn create_in_time(&mut self, number: usize) -> anyhow::Result<Token> {
        let operator = self.operator(number).clone();
        let token = wait_for("acknowledged change", ACCEPT, || Ok(operator.token("lab").ok()))?;
        self.history.add(Operation::Create { token: token.id.clone() });
        Ok(token)
    }

    /// Returns the time until the controller `there` lists what the controller `here` has acknowledged.
    fn stale(&mut self, here: usize, there: usize) -> anyhow::Result<Duration> {
        let token = self.create_in_time(here)?;
        let start = Instant::now();
        let operator = self.operator(there);
        wait_for("acknowledged change at another controller", ACCEPT, || {
            let listed = operator.tokens().unwrap_or_default();
            Ok(listed.iter().any(|listed| listed.id == token.id).then(|| start.elapsed()))
        })
    }

    /// Lets two machines join at once with a token for one. Returns how many changes were acknowledged.
    fn race(&mut self, setting: &Setting, number: usize) -> anyhow::Result<usize> {
        let token = self.create_in_time(number)?;
        let mut machines = Vec::new();
        for node in &self.nodes[..2] {
            self.joined += 1;
            let name = format!("j{}", self.joined);
            machines.push(Node::new(&self.lab, node.host(), &name, &setting.binaries, "")?);
        }
        let token_of = &token;
        let joined: Vec<bool> = std::thread::scope(|scope| {
            let start = |node| scope.spawn(move || Node::join(node, token_of).is_ok());
            let running: Vec<_> = machines.iter().map(start).collect();
            // A thread that panics did not join.
            running.into_iter().map(|thread| thread.join().unwrap_or(false)).collect()
        });
        let mut acknowledged = 1;
        for (node, _) in machines.iter().zip(joined).filter(|(_, joined)| *joined) {
            let (token, node) = (token.id.clone(), node.name().to_owned());
            self.history.add(Operation::Join { token, node });
            acknowledged += 1;
        }
        Ok(acknowledged)
    }

    /// Returns what each controller lists.
    fn listed(&self) -> anyhow::Result<Vec<Listed>> {
        let of = |controller: &Controller| {
            let (tokens, nodes) = (controller.operator().tokens()?, controller.operator().nodes()?);
            anyhow::Ok(Listed {
                tokens: tokens.into_iter().map(|token| token.id).collect(),
                nodes: nodes.into_iter().map(|node| (node.name, node.overlay_addresses)).collect(),
            })
        };
        self.controllers.iter().map(of).collect()
    }

    /// Returns the number of pairs of nodes of which the first gets no answers from the second.
    fn lost(&self) -> anyhow::Result<usize> {
        let mut lost = 0;
        for (here, node) in self.nodes.iter().enumerate() {
            for (_, target) in self.overlay.iter().enumerate().filter(|(n, _)| *n != here) {
                // A request is refused while the link does not exist.
                let answered = echoes(node.host().namespace(), *target, PINGS, PING, self.pattern)
                    .is_ok_and(|echoes| echoes.received == PINGS);
                lost += usize::from(!answered);
            }
        }
        Ok(lost)
    }
}

fn daemon(member: &mut Member) -> anyhow::Result<&mut Daemon> {
    member.daemon.as_mut().context("etcd is not running")
}

/// Starts the controllers. All of them have the CA of the first one.
fn start_controllers(
    setting: &Setting,
    lab: &Lab,
    etcd: &[Arc<Host>],
    hosts: &[Arc<Host>],
) -> anyhow::Result<Vec<Controller>> {
    let at = |hosts: &[Arc<Host>], port: u16| -> Vec<SocketAddr> {
        let first = hosts.iter().filter_map(|host| host.addresses().first());
        first.map(|address| SocketAddr::new(*address, port)).collect()
    };
    let endpoints: Vec<String> = at(etcd, 2379).iter().map(ToString::to_string).collect();
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
        let started =
            Controller::start_configured(lab, host, &setting.binaries, &config, advertise);
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

impl Figures for Ha {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for case in &self.cases {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{}: {} changes acknowledged, {} lost; {} tokens spent twice, {} addresses given twice, {} tunnels \
                 lost; shown elsewhere after {} ms",
                case.name,
                case.acknowledged,
                case.lost_writes,
                case.double_spent_tokens,
                case.overlapping_prefixes,
                case.tunnels_lost,
                case.stale_ms
            );
        }
        text
    }
}
