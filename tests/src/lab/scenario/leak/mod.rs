//! `cargo lab leak`: searches for traffic of the mesh that leaves in clear, and for forged packets
//! that are accepted, while things go wrong.
//!
//! Every uplink is captured. The nodes send datagrams to each other all the time, and forged
//! packets are injected on the uplinks. Meanwhile, in random order, agents are started, killed,
//! stopped, disconnected and removed, and rules, routes, tables and links are flushed and deleted.
//! No traffic of the mesh may leave in clear, and no forged packet may be accepted.
//!
//! While the agent of a node is down, nothing restores its guards. Until the next start of the
//! agent, the scenario may remove one of the two guards (the nftables table, or the routing rules
//! and routes), but never both: that is what two independent guards promise. Only the nftables
//! table guards against forged packets. While a node has neither agent nor table, no forged packets
//! are sent to it.
//!
//! After each action, the affected host and its pod also send packets that might pass a guard
//! ([`crate::lab::unusual`]): from the ports and with the marks of the agent and of other programs,
//! in fragments, and behind extension headers. Some forged packets have an address in the nodes'
//! pod networks as their source.
//!
//! A prefix is guarded because a node announces it, so it is no longer guarded once the operator
//! has removed that node. Therefore the operator first adds the pod networks to the protected
//! ranges of the mesh. Even after the removal, no packet may reach the pods of the removed node or
//! come from them.

mod packets;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
use crate::lab::background_traffic::{BackgroundTraffic, Member, PORT, StopOnDrop};
use crate::lab::capture::Capture;
use crate::lab::interrupt::{sleep, wait_for};
use crate::lab::mesh::{Node, START_LIMIT, require_tunnel};
use crate::lab::namespace::{Namespace, join};
use crate::lab::privilege::Rank;
use crate::lab::redirect::{Choice, Redirect};
use crate::lab::report::{Figures, Promises, Skipped};
use crate::lab::spoof::{self, Spoofer};
use crate::lab::tamper::Tampering;
use crate::lab::topology::Host;
use crate::lab::traffic::{MARK, Pattern, given_or_random, random_bytes};
use crate::lab::unusual::{FromHost, FromPod, Transport, Way};
use packets::{SpoofedTraffic, Unusual};

/// Command line options of the scenario.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Options {
    /// Duration in seconds.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub seconds: u64,
    /// Seed for the choice of actions and moments [default: random].
    #[arg(long)]
    pub seed: Option<u64>,
}

impl Options {
    /// Returns the duration of the random actions.
    fn duration(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    /// Returns the number of actions below which the run is not meaningful.
    fn fewest_acts(&self) -> u64 {
        FEWEST_ACTS_A_MINUTE * self.seconds / 60
    }
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Leak {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Seed of the run. Pass it with `--seed` to repeat the sequence of actions.
    pub seed: u64,
    /// Number of actions on agents and hosts.
    pub acts: u32,
    /// Number of actions of each kind, by name.
    pub acts_by_kind: BTreeMap<String, u32>,
    /// Number of frames with inner payload or inner addresses in clear, on all uplinks.
    pub plaintext_packets: u64,
    /// Number of packets with a forged mesh source that were injected on the uplinks.
    pub forged_sent: u64,
    /// Number of forged packets that a socket received.
    pub forged_accepted: u64,
    /// Number of rounds of packets with unusual ports, marks and forms. A round comes from one host
    /// and its pod.
    pub unusual_rounds: u64,
    /// Number of datagrams that arrived through the tunnels.
    pub delivered: u64,
    /// Number of WireGuard frames on the uplinks.
    pub sealed_packets: u64,
    /// Parts of the scenario that could not run on this machine.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Lowest number of actions per minute. A run with fewer actions is not meaningful.
const FEWEST_ACTS_A_MINUTE: u64 = 20;
/// Largest factor by which a run is longer on a slow machine, until it has the lowest number of actions.
const SLOWEST: u32 = 4;
/// Range of the random pause between two actions, in milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 150..1_200;
/// Limit for the recovery: after the last action, all traffic flows again within this time.
const RECOVERY_LIMIT: Duration = Duration::from_secs(60);
/// TCP port that every node serves in clear and through the tunnel (`plain_ports`).
const PLAIN_PORT: u16 = 6_443;
/// UDP port of the agents.
const WIREGUARD: u16 = 51_830;
/// Packet marks of the probes: the agents' bypass mark (0x10), and marks of other programs, some of
/// which contain its bit.
const MARKS: [u32; 5] = [0x10, 0x110, 0x1_bd10, 0x51, 0xc350];
/// Bridge of the pods on each node.
const POD_BRIDGE: &str = "cni0";
/// Port of the bridge [`POD_BRIDGE`] that leads to the pod.
const POD_PORT: &str = "veth0";
/// Link of each node that leads to the other nodes.
const UPLINK: &str = "eth0";
/// Networks that contain the pods of all nodes.
const PODS: [IpNet; 2] = [
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(10, 244, 0, 0)), 16),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xfd10, 0x244, 0, 0, 0, 0, 0, 0)), 32),
];

/// Returns the pod networks of a node, by its number.
fn pods(number: u8) -> (Ipv4Net, Ipv6Net) {
    let v6 = Ipv6Addr::new(0xfd10, 0x244, number.into(), 0, 0, 0, 0, 0);
    (Ipv4Net::new_assert(Ipv4Addr::new(10, 244, number, 0), 24), Ipv6Net::new_assert(v6, 64))
}

/// Returns addresses in the pod networks of a node that no pod uses.
fn absent_pods(number: u8) -> [IpAddr; 2] {
    let (v4, v6) = pods(number);
    [
        Ipv4Addr::from_bits(v4.network().to_bits() | 7).into(),
        Ipv6Addr::from_bits(v6.network().to_bits() | 7).into(),
    ]
}

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Leak> {
    let hybrid = Hybrid::build(setting)?;
    let seed = given_or_random(options.seed)?;
    setting.output.note(&format!("seed {seed} (repeat with --seed)"));
    let mut leak = Leak { rootless: setting.rank == Rank::Rootless, seed, ..Leak::default() };
    leak.failed = Promises::broken_by(|promises| leak.play(setting, *options, &hybrid, promises));
    Ok(leak)
}

/// One action on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Start,
    Kill,
    Stop,
    Restart,
    PullCable,
    PlugCable,
    Remove,
    Tamper(Tampering),
}

impl Action {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start the agent",
            Self::Kill => "kill -9 the agent",
            Self::Stop => "stop the agent",
            Self::Restart => "kill -9 and start the agent",
            Self::PullCable => "pull the cable",
            Self::PlugCable => "plug the cable",
            Self::Remove => "remove the node from the mesh",
            Self::Tamper(tampering) => tampering.name(),
        }
    }
}

/// A node with its pod and its uplink, and what the actions have changed.
struct Place<'a> {
    node: Node,
    /// Pod behind the node.
    pod: &'a Host,
    /// Addresses of the host, those of the uplink first.
    addresses: Vec<IpAddr>,
    /// Namespace that has the other end of the uplink's cable: the internet or a router.
    switch: &'a Namespace,
    running: bool,
    plugged: bool,
    removed: bool,
    /// Guard that was removed since the agent went down. Cleared when the agent starts.
    without_agent: Option<Guard>,
    /// True while the node has neither an agent nor the nftables table: no forged packets are sent
    /// to it.
    unarmed: &'a AtomicBool,
}

/// One of the two guards of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guard {
    Routing,
    Firewall,
}

impl Guard {
    /// Returns the guard that an operation on Towline's state removes.
    fn of(tampering: Tampering) -> Self {
        match tampering {
            Tampering::FlushRuleset | Tampering::DeleteTable => Self::Firewall,
            _ => Self::Routing,
        }
    }
}

impl Place<'_> {
    /// Returns the actions that are possible now. With `late`, the removal of the node is one of
    /// them. Actions that restore something are listed several times, so that they are chosen more
    /// often.
    fn possible(&self, late: bool) -> Vec<Action> {
        let tamperings = Tampering::ALL.into_iter().filter(|tampering| {
            self.running || self.without_agent.is_none_or(|gone| gone == Guard::of(*tampering))
        });
        let mut acts: Vec<_> = tamperings.map(Action::Tamper).collect();
        if self.running {
            acts.extend([Action::Kill, Action::Stop, Action::Restart]);
        } else {
            acts.extend([Action::Start; 6]);
        }
        if self.plugged {
            acts.push(Action::PullCable);
        } else {
            acts.extend([Action::PlugCable; 6]);
        }
        if late && !self.removed && self.running && self.plugged {
            acts.extend([Action::Remove; 4]);
        }
        acts
    }

    /// Runs an action. `remove` removes the node of this name from the mesh.
    fn run_action(
        &mut self,
        action: Action,
        remove: impl FnOnce(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        if self.running {
            // An agent that exited without being asked is an error: nothing restarts it.
            self.node.agent()?.check()?;
        }
        match action {
            Action::Start => self.start()?,
            Action::Kill => {
                self.node.agent()?.kill()?;
                self.running = false;
            }
            Action::Stop => {
                let agent = self.node.take_agent().context("no agent to stop")?;
                let status = agent.stop()?;
                anyhow::ensure!(status.success(), "the agent exited with an error on SIGTERM");
                self.running = false;
            }
            Action::Restart => {
                self.node.agent()?.kill()?;
                self.start()?;
            }
            Action::PullCable => self.cable(false)?,
            Action::PlugCable => self.cable(true)?,
            Action::Remove => {
                remove(self.node.name())?;
                self.removed = true;
            }
            Action::Tamper(tampering) => {
                if !self.running {
                    let guard = Guard::of(tampering);
                    self.without_agent = Some(guard);
                    self.unarmed.store(guard == Guard::Firewall, Ordering::SeqCst);
                }
                self.node.host().namespace().run(|| tampering.apply())?;
            }
        }
        Ok(())
    }

    /// Starts the agent and waits until it answers.
    fn start(&mut self) -> anyhow::Result<()> {
        self.node.launch()?;
        self.running = true;
        self.node.await_status(START_LIMIT)?;
        self.without_agent = None;
        self.unarmed.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Sends packets that might pass a guard to these addresses, from the host and from its pod.
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
        // While the agent runs, its port is in use.
        let own_port = (!self.running).then_some(FromHost { port: WIREGUARD, ..udp });
        for how in marks.into_iter().chain([tcp]).chain(own_port) {
            how.send(namespace, &from_host, payload, 1)?;
        }
        let spoofer = Spoofer::new(self.pod.namespace(), "eth0", namespace, POD_BRIDGE)?;
        for how in [
            FromPod::Udp(PORT),
            FromPod::Udp(WIREGUARD),
            FromPod::Tcp(PLAIN_PORT),
            FromPod::Fragments(PORT),
            FromPod::Fragments(WIREGUARD),
            FromPod::Extended(WIREGUARD, spoof::DESTINATION_OPTIONS),
            FromPod::Extended(WIREGUARD, spoof::HOP_BY_HOP),
        ] {
            how.send(&spoofer, &ways(self.pod.addresses()), payload, 1)?;
        }
        Ok(())
    }

    /// Connects or disconnects the cable of the uplink.
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
    /// Starts the mesh, the traffic and the captures, and runs the actions.
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
            require_tunnel(worker, &nodes[0], START_LIMIT)?;
        }
        let hosts: Vec<_> = nodes.iter().map(|node| Arc::clone(node.host())).collect();
        let members = nodes.iter().zip(&hosts).map(|(node, host)| {
            Ok(Member::new(host.namespace(), node.status()?.overlay_addresses))
        });
        let background_traffic =
            BackgroundTraffic::new(members.collect::<anyhow::Result<_>>()?, pattern, tag);
        let unarmed: [AtomicBool; 3] = Default::default();
        let switches = [
            hybrid.lab.internet(),
            hybrid.routers[0].host().namespace(),
            hybrid.routers[1].host().namespace(),
        ];
        let mut places = Vec::new();
        let around = switches.into_iter().zip(&behind).zip(&unarmed);
        for (node, ((switch, pod), unarmed)) in nodes.into_iter().zip(around) {
            // The node forwards like a Kubernetes node, and its reverse path filter is off.
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
        let spoofed = hosts.iter().zip(switches).zip(&unarmed).map(|((host, switch), unarmed)| {
            let spoofer = Spoofer::new(switch, host.name(), host.namespace(), "eth0")?;
            Ok(SpoofedTraffic::new(spoofer, &background_traffic, host.addresses(), tag, unarmed))
        });
        let spoofed: Vec<_> = spoofed.collect::<anyhow::Result<_>>()?;
        std::thread::scope(|scope| {
            let _stop = StopOnDrop(&background_traffic);
            let mut threads = background_traffic.listen(scope)?;
            for (traffic, member) in spoofed.iter().zip(background_traffic.members()) {
                traffic.prove(member)?;
            }
            threads.extend(background_traffic.send_all(scope)?);
            threads.extend(
                spoofed.iter().map(|traffic| scope.spawn(|| traffic.run(&background_traffic))),
            );
            let remove = |name: &str| {
                let operator = controller.operator();
                let [v4, v6] = PODS.map(|pods| pods.to_string());
                operator.command_ok(&["mesh", "set", "--protected", &v4, "--protected", &v6])?;
                operator.command_ok(&["node", "remove", name]).map(drop)
            };
            let unusual = Unusual::new(&background_traffic, &behind, pattern);
            let acted =
                self.acts(setting, options, &mut places, &captures, &unusual, promises, remove);
            let flows = acted
                .and_then(|()| self.recover(setting, &mut places, &background_traffic))
                .and_then(|()| self.redirect(setting, &mut places, &unusual));
            background_traffic.stop();
            for thread in threads {
                join(thread)?;
            }
            flows
        })?;
        self.count(background_traffic.members(), &spoofed);
        for capture in captures {
            let seen = capture.stop()?;
            self.plaintext_packets += seen.in_clear();
            self.sealed_packets += seen.wireguard;
            promises.hold(seen.missed == 0, || {
                format!("all frames are captured: {} were missed", seen.missed)
            });
        }
        self.judge(options.fewest_acts(), promises);
        Ok(())
    }

    /// Runs random actions for the given duration. Checks the captures after each of them.
    #[expect(clippy::too_many_arguments, reason = "one caller, which owns all of them")]
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
        let mut random = StdRng::seed_from_u64(self.seed);
        let begun = Instant::now();
        let mut leaked: u64 = 0;
        setting.output.step("running random actions");
        let fewest = options.fewest_acts();
        while begun.elapsed() < options.duration()
            || (u64::from(self.acts) < fewest && begun.elapsed() < options.duration() * SLOWEST)
        {
            let index = random.random_range(0..places.len());
            // In the last third of the run one node is removed, but never that of the controller.
            let late = begun.elapsed() > options.duration() * 2 / 3
                && index > 0
                && places.iter().all(|place| !place.removed);
            let place = &mut places[index];
            let Some(action) = place.possible(late).choose(&mut random).copied() else { continue };
            let what = format!("{} on {}", action.name(), place.node.name());
            setting.output.progress(&what);
            place.run_action(action, &remove).with_context(|| what.clone())?;
            self.acts += 1;
            *self.acts_by_kind.entry(action.name().to_owned()).or_default() += 1;
            place.probe(&unusual.targets[index], &unusual.payload).with_context(|| what.clone())?;
            self.unusual_rounds += 1;
            sleep(Duration::from_millis(random.random_range(PAUSE_MS)))?;
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

    /// Starts all agents and connects all cables again, and waits until every member that was not
    /// removed receives traffic of both families.
    fn recover(
        &self,
        setting: &Setting,
        places: &mut [Place<'_>],
        background_traffic: &BackgroundTraffic<'_>,
    ) -> anyhow::Result<()> {
        setting.output.step("recovering all nodes");
        for place in places.iter_mut() {
            if !place.plugged {
                place.cable(true)?;
            }
            if !place.running {
                place.start()?;
            }
        }
        let received = |place: usize| background_traffic.members()[place].received();
        let before: Vec<_> = (0..places.len()).map(received).collect();
        for (index, place) in places.iter().enumerate().filter(|(_, place)| !place.removed) {
            let what = format!("traffic to {} over both families", place.node.name());
            wait_for(&what, RECOVERY_LIMIT, || {
                let more = received(index).iter().zip(before[index]).all(|(now, then)| *now > then);
                Ok(more.then_some(()))
            })?;
        }
        Ok(())
    }

    /// Attaches eBPF programs to the link of a pod, one after the other. They redirect the packets of
    /// the pod past every nftables hook: by the kernel's routing tables, or to the uplink without a
    /// lookup. Tries each with the agent, without it, and also without the nftables table: the routing
    /// guard and the program on the uplinks must hold alone.
    fn redirect(
        &mut self,
        setting: &Setting,
        places: &mut [Place<'_>],
        unusual: &Unusual,
    ) -> anyhow::Result<()> {
        self.skipped.push(Skipped {
            name: "macvlan".to_owned(),
            why: "a port on the uplink is a separate host of that LAN: the guards of this host do not \
                  see it"
                .to_owned(),
        });
        let Some(index) = places.iter().position(|place| !place.removed) else { return Ok(()) };
        let place = &mut places[index];
        let nobody = |_: &str| Ok(());
        for (name, choice) in [
            ("redirect by lookup", Choice::ByLookup),
            ("redirect without lookup", Choice::Fixed(UPLINK)),
        ] {
            let attached = Redirect::attach(place.node.host().namespace(), POD_PORT, choice);
            let redirect = match attached {
                Ok(redirect) => redirect,
                Err(error) => {
                    let (name, why) = (name.to_owned(), format!("{error:#}"));
                    self.skipped.push(Skipped { name, why });
                    continue;
                }
            };
            setting
                .output
                .step(&format!("{name}: sending packets of a pod past the network stack"));
            // The agent looks for such programs when it is asked for its status, and guards the
            // uplinks.
            let notes = place.node.await_status(START_LIMIT)?.notes;
            let open = notes.iter().find(|note| note.contains("past nftables"));
            anyhow::ensure!(open.is_none(), "{name}: the uplinks are not guarded: {notes:?}");
            for action in [None, Some(Action::Kill), Some(Action::Tamper(Tampering::FlushRuleset))]
            {
                if let Some(action) = action {
                    place.run_action(action, nobody)?;
                }
                place.probe(&unusual.targets[index], &unusual.payload)?;
                self.unusual_rounds += 1;
            }
            drop(redirect);
            place.start()?;
        }
        Ok(())
    }

    /// Adds up the counters of the members and of the senders of forged packets.
    fn count(&mut self, members: &[Member<'_>], spoofed: &[SpoofedTraffic<'_>]) {
        for member in members {
            self.forged_accepted += member.spoofed();
            self.delivered += member.received().iter().sum::<u64>();
        }
        for traffic in spoofed {
            self.forged_sent += traffic.sent.load(Ordering::Relaxed);
            self.forged_accepted -= traffic.proof.load(Ordering::Relaxed);
        }
    }

    /// Checks the promises about the whole run.
    fn judge(&self, fewest: u64, promises: &mut Promises) {
        promises.hold(u64::from(self.acts) >= fewest, || format!("{fewest} acts: {}", self.acts));
        promises.hold(self.plaintext_packets == 0, || {
            format!("no packet leaves in clear: {} did", self.plaintext_packets)
        });
        promises.hold(self.forged_accepted == 0, || {
            format!(
                "no forged packet is accepted: {} of {} were",
                self.forged_accepted, self.forged_sent
            )
        });
        promises.hold(self.forged_sent > 0, || "forged packets were sent: none was".to_owned());
        promises.hold(self.unusual_rounds > 0, || "unusual packets were sent: none was".to_owned());
        promises.hold(self.delivered > 0, || {
            "datagrams arrive through the tunnels: none did".to_owned()
        });
        promises.hold(self.sealed_packets > 0, || {
            "the captures see WireGuard frames: none was seen".to_owned()
        });
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
        for skipped in &self.skipped {
            let _ = write!(text, "\n{skipped}");
        }
        text
    }
}
