//! `cargo lab leak`: every uplink is captured while nodes talk without pause, strangers inject forged
//! packets, and agents are started, killed, stopped, cut off and removed, and rules, routes, tables and
//! links flushed and deleted, in random order. Nothing of the mesh leaves in clear, and nothing forged
//! comes in.
//!
//! A node whose agent is down has nobody who puts things back. So until its next start somebody else may
//! take away one of its two guards (the nftables table, or the routing side), never both: that is what two
//! independent guards promise. The guard against forged packets is the nftables table alone; while a
//! node has neither agent nor table, nothing forged is sent to it.
//!
//! After each act the host that it was done to, and a pod of that host, also send what looks as if it
//! might pass a guard ([`crate::lab::unusual`]): from the ports and with the marks of the agent and of others, in
//! fragments, behind extension headers. Strangers forge the nodes' own pods too.
//!
//! What a node announces is guarded because it does so, and no longer once its operator removed it. So
//! before one is removed, the operator protects the pods' networks for the whole mesh: nothing may reach
//! the removed node's pods, or come from them, after that either.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use towline_netlink::Rtnetlink;

use super::Setting;
use super::hybrid::{Hybrid, Mesh};
use crate::lab::actor::Actor;
use crate::lab::capture::Capture;
use crate::lab::chatter::{Chatter, Member, PORT, StopOnDrop};
use crate::lab::forge::{self, Forger};
use crate::lab::interrupt::{pass, wait_for, wait_up_to};
use crate::lab::meddle::Meddling;
use crate::lab::mesh::{Node, START_LIMIT, await_tunnel};
use crate::lab::namespace::{Namespace, join};
use crate::lab::privilege::Rank;
use crate::lab::redirect::Redirect;
use crate::lab::report::{Figures, Promises};
use crate::lab::topology::Host;
use crate::lab::traffic::{MARK, Pattern, random_bytes};
use crate::lab::unusual::{FromHost, FromPod, Transport, Way};

/// How it is run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// For how long.
    pub duration: Duration,
    /// Of everything that is random.
    pub seed: u64,
}

/// What was tried, and what got through.
#[derive(Debug, Default, Serialize)]
pub struct Leak {
    /// The lab ran without root's rights over the machine.
    pub rootless: bool,
    /// Gives the same acts again.
    pub seed: u64,
    /// How many things were done to agents and hosts.
    pub acts: u32,
    /// Of each kind.
    pub acts_by_kind: BTreeMap<String, u32>,
    /// Frames with inner payload or inner addresses, on any uplink.
    pub plaintext_packets: u64,
    /// Packets with sources of the mesh that were injected from the uplinks.
    pub forged_sent: u64,
    /// Of these, how many a socket was given.
    pub forged_accepted: u64,
    /// Rounds of packets with unusual ports, marks and forms, each from a host and from its pod.
    pub unusual_rounds: u64,
    /// Datagrams that arrived where they were to, by the tunnel.
    pub delivered: u64,
    /// Frames with sealed packets on the uplinks.
    pub sealed_packets: u64,
    /// What could not run, and why.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// What could not run.
#[derive(Debug, Serialize)]
pub struct Skipped {
    /// What it is.
    pub name: String,
    /// In one line.
    pub why: String,
}

/// Fewer show nothing.
const FEWEST_ACTS_A_MINUTE: u64 = 20;
/// Between two acts, in milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 150..1_200;
/// Between two rounds of forged packets to one node.
const FORGING_PACE: Duration = Duration::from_millis(5);
/// Everything flows again this soon after the last act.
const RECOVERY_LIMIT: Duration = Duration::from_secs(20);
/// TCP port that every node serves on both sides.
const PLAIN_PORT: u16 = 6_443;
const WIREGUARD: u16 = 51_830;
/// The agents' bypass mark, and marks of other programs with its bits.
const MARKS: [u32; 5] = [0x10, 0x110, 0x1_bd10, 0x51, 0xc350];
const POD_BRIDGE: &str = "cni0";
/// The pod's port on it.
const POD_PORT: &str = "veth0";
/// Of all pods.
const PODS: [IpNet; 2] = [
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(10, 244, 0, 0)), 16),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xfd10, 0x244, 0, 0, 0, 0, 0, 0)), 32),
];

/// The pods of a node, by its number.
fn pods(number: u8) -> (Ipv4Net, Ipv6Net) {
    let v6 = Ipv6Addr::new(0xfd10, 0x244, number.into(), 0, 0, 0, 0, 0);
    (Ipv4Net::new_assert(Ipv4Addr::new(10, 244, number, 0), 24), Ipv6Net::new_assert(v6, 64))
}

/// A pod address of a node that no pod has.
fn absent_pods(number: u8) -> [IpAddr; 2] {
    let (v4, v6) = pods(number);
    [
        Ipv4Addr::from_bits(v4.network().to_bits() | 7).into(),
        Ipv6Addr::from_bits(v6.network().to_bits() | 7).into(),
    ]
}

/// Runs it.
pub fn run(setting: &Setting, options: Options) -> anyhow::Result<Leak> {
    let hybrid = Hybrid::build(setting)?;
    setting.talk.note(&format!("seed {} (give it again with --seed)", options.seed));
    let mut leak =
        Leak { rootless: setting.rank == Rank::Rootless, seed: options.seed, ..Leak::default() };
    let mut promises = Promises::new();
    if let Err(error) = leak.play(setting, options, &hybrid, &mut promises) {
        promises.fail(format!("{error:#}"));
    }
    leak.failed = promises.into_failed();
    Ok(leak)
}

/// Something that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Start,
    Kill,
    Stop,
    Restart,
    PullCable,
    PlugCable,
    Remove,
    Meddle(Meddling),
}

impl Act {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start the agent",
            Self::Kill => "kill -9 the agent",
            Self::Stop => "stop the agent",
            Self::Restart => "kill -9 and start the agent",
            Self::PullCable => "pull the cable",
            Self::PlugCable => "plug the cable",
            Self::Remove => "remove the node from the mesh",
            Self::Meddle(meddling) => meddling.name(),
        }
    }
}

/// A node, its cable and what is gone of it.
struct Place<'a> {
    node: Node,
    /// Behind the node.
    pod: &'a Host,
    /// Of the node, from the uplink's on.
    addresses: Vec<IpAddr>,
    /// Where the other end of its cable is.
    switch: &'a Namespace,
    running: bool,
    plugged: bool,
    removed: bool,
    /// What was taken away since the agent went down.
    without_agent: Option<Guard>,
    /// Nobody may forge: neither agent nor table.
    unarmed: &'a AtomicBool,
}

/// One of the two guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guard {
    Routing,
    Firewall,
}

impl Guard {
    fn of(meddling: Meddling) -> Self {
        match meddling {
            Meddling::FlushRuleset | Meddling::DeleteTable => Self::Firewall,
            _ => Self::Routing,
        }
    }
}

impl Place<'_> {
    fn possible(&self, late: bool) -> Vec<Act> {
        let meddlings = Meddling::ALL.into_iter().filter(|meddling| {
            self.running || self.without_agent.is_none_or(|gone| gone == Guard::of(*meddling))
        });
        let mut acts: Vec<_> = meddlings.map(Act::Meddle).collect();
        if self.running {
            acts.extend([Act::Kill, Act::Stop, Act::Restart]);
        } else {
            acts.extend([Act::Start; 6]);
        }
        if self.plugged {
            acts.push(Act::PullCable);
        } else {
            acts.extend([Act::PlugCable; 6]);
        }
        if late && !self.removed && self.running && self.plugged {
            acts.extend([Act::Remove; 4]);
        }
        acts
    }

    fn act(
        &mut self,
        act: Act,
        remove: impl FnOnce(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        if self.running {
            // Nobody starts an agent again that ended by itself.
            self.node.agent()?.check()?;
        }
        match act {
            Act::Start => self.start()?,
            Act::Kill => {
                self.node.agent()?.kill()?;
                self.running = false;
            }
            Act::Stop => {
                let agent = self.node.take_agent().context("no agent to stop")?;
                let status = agent.stop()?;
                anyhow::ensure!(status.success(), "the agent ended badly on SIGTERM");
                self.running = false;
            }
            Act::Restart => {
                self.node.agent()?.kill()?;
                self.start()?;
            }
            Act::PullCable => self.cable(false)?,
            Act::PlugCable => self.cable(true)?,
            Act::Remove => {
                remove(self.node.name())?;
                self.removed = true;
            }
            Act::Meddle(meddling) => {
                if !self.running {
                    let guard = Guard::of(meddling);
                    self.without_agent = Some(guard);
                    self.unarmed.store(guard == Guard::Firewall, Ordering::SeqCst);
                }
                self.node.host().namespace().run(|| meddling.act())?;
            }
        }
        Ok(())
    }

    /// Starts the agent; it is there again once it answers.
    fn start(&mut self) -> anyhow::Result<()> {
        self.node.launch()?;
        self.running = true;
        self.node.await_status(START_LIMIT)?;
        self.without_agent = None;
        self.unarmed.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Sends what looks as if it might pass a guard to these addresses, from the host and from its pod.
    fn probe(&self, targets: &[SocketAddr], payload: &[u8]) -> anyhow::Result<()> {
        let namespace = self.node.host().namespace();
        let ways = |own: &[IpAddr]| -> Vec<Way> {
            let way = |to: &SocketAddr| {
                let from = own.iter().find(|own| own.is_ipv4() == to.is_ipv4());
                from.map(|from| Way { from: *from, to: *to })
            };
            targets.iter().filter_map(way).collect()
        };
        let from_host = ways(&self.addresses);
        let udp = FromHost::udp(Actor::Root);
        let marks = MARKS.map(|mark| FromHost { mark: Some(mark), ..udp });
        let tcp = FromHost { transport: Transport::Tcp, port: PLAIN_PORT, ..udp };
        // While the agent runs the port is taken.
        let own_port = (!self.running).then_some(FromHost { port: WIREGUARD, ..udp });
        for how in marks.into_iter().chain([tcp]).chain(own_port) {
            how.send(namespace, &from_host, payload, 1)?;
        }
        let forger = Forger::new(self.pod.namespace(), "eth0", namespace, POD_BRIDGE)?;
        for how in [
            FromPod::Udp(PORT),
            FromPod::Udp(WIREGUARD),
            FromPod::Tcp(PLAIN_PORT),
            FromPod::Fragments(PORT),
            FromPod::Fragments(WIREGUARD),
            FromPod::Extended(WIREGUARD, forge::DESTINATION_OPTIONS),
            FromPod::Extended(WIREGUARD, forge::HOP_BY_HOP),
        ] {
            how.send(&forger, &ways(self.pod.addresses()), payload, 1)?;
        }
        Ok(())
    }

    fn cable(&mut self, plugged: bool) -> anyhow::Result<()> {
        let name = self.node.name();
        self.switch.run(|| {
            let mut netlink = Rtnetlink::open()?;
            let port = netlink.link_index(name)?;
            Ok(netlink.set_up(port, plugged)?)
        })?;
        self.plugged = plugged;
        Ok(())
    }
}

impl Leak {
    fn play(
        &mut self,
        setting: &Setting,
        options: Options,
        hybrid: &Hybrid,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let pattern = Pattern::random()?;
        let tag: [u8; MARK] = random_bytes()?;
        let captures = hybrid.capture_uplinks(pattern)?;
        for capture in &captures {
            capture.watch(PODS);
        }
        let hosts = [&hybrid.cp, &hybrid.workers[0], &hybrid.workers[1]];
        let behind = (0..).zip(hosts).map(|(number, host)| {
            let (v4, v6) = pods(number);
            host.pod(&format!("pod-{number}"), v4, v6)
        });
        let behind: Vec<Host> = behind.collect::<anyhow::Result<_>>()?;
        let Mesh { controller, nodes } = hybrid.bring_up_with(setting, |name, more| {
            let number = hosts.iter().position(|host| host.name() == name).unwrap_or_default();
            let (v4, v6) = pods(number as u8);
            let announced = format!("prefixes = [\"{v4}\", \"{v6}\"]\n");
            let node = if more.is_empty() { "[node]\n" } else { more };
            let plain = format!("[routing]\nplain_ports = [{PLAIN_PORT}]\n");
            (format!("{node}{announced}{plain}"), vec![v4.into(), v6.into()])
        })?;
        for worker in &nodes[1..] {
            if let Some(reason) = await_tunnel(worker, &nodes[0], START_LIMIT)? {
                anyhow::bail!("tunnel {}/cp is not up: {reason}", worker.name());
            }
        }
        let hosts: Vec<_> = nodes.iter().map(|node| Arc::clone(node.host())).collect();
        let members = nodes.iter().zip(&hosts).map(|(node, host)| {
            Ok(Member::new(host.namespace(), node.status()?.overlay_addresses))
        });
        let chatter = Chatter::new(members.collect::<anyhow::Result<_>>()?, pattern, tag);
        let unarmed: [AtomicBool; 3] = Default::default();
        let switches = [
            hybrid.lab.internet(),
            hybrid.routers[0].host().namespace(),
            hybrid.routers[1].host().namespace(),
        ];
        let mut places = Vec::new();
        let around = switches.into_iter().zip(&behind).zip(&unarmed);
        for (node, ((switch, pod), unarmed)) in nodes.into_iter().zip(around) {
            // As a Kubernetes node is, and with the filter that lets most in.
            let namespace = node.host().namespace();
            for (name, value) in [
                ("net.ipv4.ip_forward", "1"),
                ("net.ipv6.conf.all.forwarding", "1"),
                ("net.ipv4.conf.all.rp_filter", "0"),
                ("net.ipv4.conf.eth0.rp_filter", "0"),
            ] {
                namespace.sysctl(name, value)?;
            }
            places.push(Place {
                addresses: node.host().addresses().to_vec(),
                node,
                pod,
                switch,
                running: true,
                plugged: true,
                removed: false,
                without_agent: None,
                unarmed,
            });
        }
        let forgeries =
            hosts.iter().zip(switches).zip(&unarmed).map(|((host, switch), unarmed)| {
                let forger = Forger::new(switch, host.name(), host.namespace(), "eth0")?;
                Ok(Forgery::new(forger, &chatter, host.addresses(), tag, unarmed))
            });
        let forgeries: Vec<_> = forgeries.collect::<anyhow::Result<_>>()?;
        std::thread::scope(|scope| {
            let _stop = StopOnDrop(&chatter);
            let mut threads = chatter.listen(scope)?;
            for (forgery, member) in forgeries.iter().zip(chatter.members()) {
                forgery.prove(member)?;
            }
            threads.extend(chatter.talk(scope)?);
            threads.extend(forgeries.iter().map(|forgery| scope.spawn(|| forgery.run(&chatter))));
            let remove = |name: &str| {
                let operator = controller.operator();
                let [v4, v6] = PODS.map(|pods| pods.to_string());
                operator.command_ok(&["mesh", "set", "--protected", &v4, "--protected", &v6])?;
                operator.command_ok(&["node", "remove", name]).map(drop)
            };
            let unusual = Unusual::new(&chatter, &behind, pattern);
            let acted =
                self.acts(setting, options, &mut places, &captures, &unusual, promises, remove);
            let flows = acted
                .and_then(|()| self.recover(setting, &mut places, &chatter))
                .and_then(|()| self.redirect(setting, &mut places, &unusual));
            chatter.stop();
            for thread in threads {
                join(thread)?;
            }
            flows
        })?;
        self.count(chatter.members(), &forgeries);
        for capture in captures {
            let seen = capture.stop()?;
            self.plaintext_packets += seen.in_clear();
            self.sealed_packets += seen.wireguard;
            promises
                .hold(seen.missed == 0, || format!("a capture misses nothing: {}", seen.missed));
        }
        self.judge(options.duration, promises);
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "one caller, which made them all")]
    fn acts(
        &mut self,
        setting: &Setting,
        options: Options,
        places: &mut [Place<'_>],
        captures: &[Capture],
        unusual: &Unusual,
        promises: &mut Promises,
        remove: impl Fn(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut random = StdRng::seed_from_u64(options.seed);
        let begun = Instant::now();
        let mut leaked: u64 = 0;
        setting.talk.step("doing bad things");
        while begun.elapsed() < options.duration {
            let index = random.random_range(0..places.len());
            // One node is removed, in the last third, and never the controller's.
            let late = begun.elapsed() > options.duration * 2 / 3
                && index > 0
                && places.iter().all(|place| !place.removed);
            let place = &mut places[index];
            let Some(act) = place.possible(late).choose(&mut random).copied() else { continue };
            let what = format!("{} on {}", act.name(), place.node.name());
            setting.talk.progress(&what);
            place.act(act, &remove).with_context(|| what.clone())?;
            self.acts += 1;
            *self.acts_by_kind.entry(act.name().to_owned()).or_default() += 1;
            place.probe(&unusual.targets[index], &unusual.payload).with_context(|| what.clone())?;
            self.unusual_rounds += 1;
            pass(Duration::from_millis(random.random_range(PAUSE_MS)))?;
            let now = captures.iter().map(|capture| capture.seen().in_clear()).sum();
            if now > leaked {
                promises.fail(format!(
                    "act {}, {what}: {} frames in clear",
                    self.acts,
                    now - leaked
                ));
                leaked = now;
            }
        }
        Ok(())
    }

    /// Whatever was done, it is undone by starting agents and plugging cables.
    fn recover(
        &self,
        setting: &Setting,
        places: &mut [Place<'_>],
        chatter: &Chatter<'_>,
    ) -> anyhow::Result<()> {
        setting.talk.step("putting everything back");
        for place in places.iter_mut() {
            if !place.plugged {
                place.cable(true)?;
            }
            if !place.running {
                place.start()?;
            }
        }
        let heard = |place: usize| chatter.members()[place].heard();
        let before: Vec<_> = (0..places.len()).map(heard).collect();
        for (index, place) in places.iter().enumerate().filter(|(_, place)| !place.removed) {
            let what = format!("traffic to {} by both families", place.node.name());
            wait_for(&what, RECOVERY_LIMIT, || {
                let more = heard(index).iter().zip(before[index]).all(|(now, then)| *now > then);
                Ok(more.then_some(()))
            })?;
        }
        Ok(())
    }

    /// Has a program on a pod's link send its packets on by the kernel's tables, past every hook of
    /// nftables: with an agent, without, and without the table. The routing guard holds alone.
    fn redirect(
        &mut self,
        setting: &Setting,
        places: &mut [Place<'_>],
        unusual: &Unusual,
    ) -> anyhow::Result<()> {
        for (name, why) in [
            (
                "macvlan",
                "a port on the uplink is a host of that LAN: no guard of this host sees it",
            ),
            ("redirect without lookup", "no table of the kernel is asked, so no guard can hold it"),
        ] {
            self.skipped.push(Skipped { name: name.to_owned(), why: why.to_owned() });
        }
        let Some(index) = places.iter().position(|place| !place.removed) else { return Ok(()) };
        let place = &mut places[index];
        let attached = Redirect::attach(place.node.host().namespace(), POD_PORT);
        let redirect = match attached {
            Ok(redirect) => redirect,
            Err(error) => {
                let (name, why) = ("redirect by lookup".to_owned(), format!("{error:#}"));
                self.skipped.push(Skipped { name, why });
                return Ok(());
            }
        };
        setting.talk.step("redirecting a pod's packets past the stack");
        let nobody = |_: &str| Ok(());
        for act in [None, Some(Act::Kill), Some(Act::Meddle(Meddling::FlushRuleset))] {
            if let Some(act) = act {
                place.act(act, nobody)?;
            }
            place.probe(&unusual.targets[index], &unusual.payload)?;
            self.unusual_rounds += 1;
        }
        drop(redirect);
        place.start()
    }

    fn count(&mut self, members: &[Member<'_>], forgeries: &[Forgery<'_>]) {
        for member in members {
            self.forged_accepted += member.forged();
            self.delivered += member.heard().iter().sum::<u64>();
        }
        for forgery in forgeries {
            self.forged_sent += forgery.sent.load(Ordering::Relaxed);
            self.forged_accepted -= forgery.proof.load(Ordering::Relaxed);
        }
    }

    fn judge(&self, duration: Duration, promises: &mut Promises) {
        let fewest = FEWEST_ACTS_A_MINUTE * duration.as_secs() / 60;
        promises.hold(u64::from(self.acts) >= fewest, || format!("{fewest} acts: {}", self.acts));
        promises.hold(self.plaintext_packets == 0, || {
            format!("nothing leaves in clear: {} packets", self.plaintext_packets)
        });
        promises.hold(self.forged_accepted == 0, || {
            format!("nothing forged comes in: {} of {}", self.forged_accepted, self.forged_sent)
        });
        promises.hold(self.forged_sent > 0, || "forged packets were sent".to_owned());
        promises.hold(self.unusual_rounds > 0, || "unusual packets were sent".to_owned());
        promises.hold(self.delivered > 0, || "traffic flows".to_owned());
        promises.hold(self.sealed_packets > 0, || "the captures see the tunnels".to_owned());
    }
}

/// What is sent after each act, and where to.
struct Unusual {
    /// From each place: the other members' addresses in the mesh, and their pods'.
    targets: Vec<Vec<SocketAddr>>,
    payload: Vec<u8>,
}

impl Unusual {
    fn new(chatter: &Chatter<'_>, pods: &[Host], pattern: Pattern) -> Self {
        let all: Vec<Vec<SocketAddr>> = chatter
            .members()
            .iter()
            .zip(pods)
            .map(|(member, pod)| {
                let addresses = member.addresses.iter().chain(pod.addresses());
                addresses.map(|address| (*address, PORT).into()).collect()
            })
            .collect();
        let others = |place: usize| {
            let others = all.iter().enumerate().filter(|(other, _)| *other != place);
            others.flat_map(|(_, targets)| targets.clone()).collect()
        };
        let payload = [pattern.cell(0), pattern.cell(1)].concat();
        Self { targets: (0..all.len()).map(others).collect(), payload }
    }
}

/// Forged packets to one node.
struct Forgery<'a> {
    forger: Forger,
    packets: Vec<Vec<u8>>,
    /// Not forged, but for its tag: shows that what is let in is counted.
    honest: Vec<u8>,
    unarmed: &'a AtomicBool,
    sent: AtomicU64,
    /// Accepted while proving.
    proof: AtomicU64,
}

impl<'a> Forgery<'a> {
    /// From every address of the mesh and a pod of every node, the victim's own included, to the victim's
    /// uplink, to its addresses in the mesh, and through it to the others.
    fn new(
        forger: Forger,
        chatter: &Chatter<'_>,
        uplink: &[IpAddr],
        tag: [u8; MARK],
        unarmed: &'a AtomicBool,
    ) -> Self {
        let mesh = || chatter.members().iter().flat_map(|member| member.addresses.iter().copied());
        let mut packets = Vec::new();
        let nodes = chatter.members().len() as u8;
        for from in mesh().chain((0..nodes).flat_map(absent_pods)) {
            for to in uplink.iter().copied().chain(mesh()).filter(|to| *to != from) {
                packets.extend(forge::udp((from, PORT).into(), (to, PORT).into(), &tag));
            }
        }
        let stranger: IpAddr = [192, 0, 2, 99].into();
        let honest = uplink
            .iter()
            .filter(|ip| ip.is_ipv4())
            .find_map(|to| forge::udp((stranger, PORT).into(), (*to, PORT).into(), &tag).ok());
        let honest = honest.unwrap_or_default();
        Self { forger, packets, honest, unarmed, sent: AtomicU64::new(0), proof: AtomicU64::new(0) }
    }

    /// A packet with the tag that nobody has to refuse is counted as let in.
    fn prove(&self, member: &Member<'_>) -> anyhow::Result<()> {
        let found = wait_up_to(Duration::from_secs(5), || {
            self.forger.send(&self.honest)?;
            Ok((member.forged() > 0).then_some(()))
        })?;
        found.context("the test of the listener for forged packets: nothing was heard")?;
        // What was sent last is still on its way: it ends when nothing more comes.
        let mut last = 0;
        wait_for("silence", Duration::from_secs(5), || {
            let now = member.forged();
            Ok((std::mem::replace(&mut last, now) == now).then_some(()))
        })?;
        self.proof.store(member.forged(), Ordering::Relaxed);
        Ok(())
    }

    fn run(&self, chatter: &Chatter<'_>) -> anyhow::Result<()> {
        while !chatter.stopped() {
            for packet in &self.packets {
                if self.unarmed.load(Ordering::SeqCst) {
                    break;
                }
                // A cable that is pulled takes nothing.
                if self.forger.send(packet).is_ok() {
                    self.sent.fetch_add(1, Ordering::Relaxed);
                }
            }
            pass(FORGING_PACE)?;
        }
        Ok(())
    }
}

impl Figures for Leak {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "{} acts, seed {}", self.acts, self.seed);
        for (kind, times) in &self.acts_by_kind {
            let _ = writeln!(text, "  {times:3} x {kind}");
        }
        let _ = writeln!(
            text,
            "{} datagrams delivered, {} packets sealed, {} in clear",
            self.delivered, self.sealed_packets, self.plaintext_packets
        );
        let _ = writeln!(text, "{} rounds of unusual packets", self.unusual_rounds);
        let _ = write!(
            text,
            "{} forged packets sent, {} accepted",
            self.forged_sent, self.forged_accepted
        );
        for Skipped { name, why } in &self.skipped {
            let _ = write!(text, "\nwithout {name}: {why}");
        }
        text
    }
}
