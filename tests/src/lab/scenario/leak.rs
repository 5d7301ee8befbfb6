//! `cargo lab leak`: every uplink is captured while nodes talk without pause, strangers inject forged
//! packets, and agents are started, killed, stopped, cut off and removed, and rules, routes, tables and
//! links flushed and deleted, in random order. Nothing of the mesh leaves in clear, and nothing forged
//! comes in.
//!
//! A node whose agent is down has nobody who puts things back. So until its next start somebody else may
//! take away one of its two guards (the nftables table, or the routing side), never both: that is what two
//! independent guards promise. The guard against forged packets is the nftables table alone; while a
//! node has neither agent nor table, nothing forged is sent to it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use towline_netlink::Rtnetlink;

use super::Setting;
use super::hybrid::{Hybrid, Mesh};
use crate::lab::capture::Capture;
use crate::lab::chatter::{Chatter, Member, PORT, StopOnDrop};
use crate::lab::forge::{self, Forger};
use crate::lab::interrupt::{pass, wait_for, wait_up_to};
use crate::lab::meddle::Meddling;
use crate::lab::mesh::{Node, START_LIMIT, await_tunnel};
use crate::lab::namespace::{Namespace, join};
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises};
use crate::lab::traffic::{MARK, Pattern, random_bytes};

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
    /// Datagrams that arrived where they were to, by the tunnel.
    pub delivered: u64,
    /// Frames with sealed packets on the uplinks.
    pub sealed_packets: u64,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Fewer show nothing.
const FEWEST_ACTS_A_MINUTE: u64 = 20;
/// Between two acts, in milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 150..1_200;
/// Between two rounds of forged packets to one node.
const FORGING_PACE: Duration = Duration::from_millis(5);
/// Everything flows again this soon after the last act.
const RECOVERY_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(5);

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
        match act {
            Act::Start => self.start()?,
            Act::Kill => {
                self.node.agent()?.kill()?;
                self.running = false;
            }
            Act::Stop => {
                let agent = self.node.take_agent().context("no agent to stop")?;
                let status = agent.stop(STOP_LIMIT)?;
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
        let Mesh { controller, nodes } = hybrid.bring_up(setting)?;
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
        for ((node, switch), unarmed) in nodes.into_iter().zip(switches).zip(&unarmed) {
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
                node,
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
            let remove =
                |name: &str| controller.operator().command_ok(&["node", "remove", name]).map(drop);
            let acted = self.acts(setting, options, &mut places, &captures, promises, remove);
            let flows = acted.and_then(|()| self.recover(setting, &mut places, &chatter));
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

    fn acts(
        &mut self,
        setting: &Setting,
        options: Options,
        places: &mut [Place<'_>],
        captures: &[Capture],
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
        promises.hold(self.delivered > 0, || "traffic flows".to_owned());
        promises.hold(self.sealed_packets > 0, || "the captures see the tunnels".to_owned());
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
    /// From every address of the mesh, the victim's own included, to the victim's uplink, to its
    /// addresses in the mesh, and through it to the others.
    fn new(
        forger: Forger,
        chatter: &Chatter<'_>,
        uplink: &[IpAddr],
        tag: [u8; MARK],
        unarmed: &'a AtomicBool,
    ) -> Self {
        let mesh = || chatter.members().iter().flat_map(|member| member.addresses.iter().copied());
        let mut packets = Vec::new();
        for from in mesh() {
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
        let _ = write!(
            text,
            "{} forged packets sent, {} accepted",
            self.forged_sent, self.forged_accepted
        );
        text
    }
}
