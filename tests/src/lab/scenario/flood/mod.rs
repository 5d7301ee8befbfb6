//! `cargo lab flood`: floods a controller and a node, and measures what others notice of it.
//!
//! ```text
//!          internet (203.0.113.0/24)
//!    ┌──────────┬──────────┬──────────┬──────────┐
//!    cp         a          b          evil       new
//!    controller node       node       floods     joins, once in each case
//! ```
//!
//! During each case `a` sends paced datagrams to `b` through the tunnel, and an honest node joins. A case is
//! ok if nearly all datagrams arrive, the path of the pair does not change, the controller's memory stays
//! bounded, and the join does not take long. The first case is the control: nobody attacks.
//!
//! | file | owns |
//! |---|---|
//! | `attacks.rs` | what the attacker does in each case |
//! | `member.rs` | clients of the controller that the attacker programs |
//! | `paced.rs` | paced datagrams, and how many of them arrive |

mod attacks;
mod member;
mod paced;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clap::Args;
use ipnet::{IpNet, Ipv4Net};
use nix::unistd::Pid;
use serde::Serialize;
use serde_json::Value;
use towline_netlink::{AddressOptions, Rtnetlink};
use towline_proto::id::WireguardKey;
use x25519_dalek::PublicKey;

use super::Setting;
use super::scale::allow_many_sockets;
use super::selection::{Entry, Selection};
use crate::lab::interrupt::{self, sleep};
use crate::lab::mesh::{Controller, Node, START_LIMIT, require_tunnel};
use crate::lab::namespace::join;
use crate::lab::privilege::Rank;
use crate::lab::process::resident_mb;
use crate::lab::raw_tunnel::private_key;
use crate::lab::report::{Figures, Promises, round};
use crate::lab::topology::{Host, Lab};
use attacks::{SOURCES, Target, source};
use paced::Way;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    /// Cases to run.
    #[command(flatten)]
    pub selection: Selection,
    /// Payload of the pair in megabits per second.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub mbit: u64,
    /// Build the daemons with the dev profile: for slow machines, with a smaller `--mbit`.
    #[arg(long)]
    pub dev: bool,
}

/// A kind of flood.
struct Case {
    /// Name of the case: what is flooded, and how, separated by a slash.
    name: &'static str,
    attack: fn(&Target, &AtomicBool) -> anyhow::Result<u64>,
}

/// All cases, in the order in which they run.
const CASES: &[Case] = &[
    Case { name: "control/nobody", attack: attacks::nothing },
    Case { name: "tunnels/handshakes", attack: attacks::handshakes },
    Case { name: "tunnels/probes-of-the-peer", attack: attacks::probes },
    Case { name: "joins/many-sources", attack: attacks::joins },
    Case { name: "joins/same-source", attack: attacks::joins_beside },
    Case { name: "tls/half-open", attack: attacks::half_open },
    Case { name: "tls/removed-certificate", attack: attacks::removed },
    Case { name: "http2/resets", attack: attacks::resets },
    Case { name: "watch/slow-readers", attack: attacks::slow_readers },
    Case { name: "member/publish-roam-watch", attack: attacks::busy_member },
];

/// Largest loss of the pair's datagrams, in percent.
const LOSS_PCT: f64 = 5.0;
/// Largest resident memory of the controller, in megabytes.
const MEMORY_MB: f64 = 256.0;
/// Longest time of the honest node's join, in seconds.
const JOIN_S: f64 = 5.0;
/// Time from the start of an attack to the honest node's join.
const LEAD: Duration = Duration::from_secs(4);
/// Length of a case, and with `--full`.
const WINDOW: (Duration, Duration) = (Duration::from_secs(12), Duration::from_secs(75));
/// Pause after a case, in which the controller closes what the attacker left.
const CALM: Duration = Duration::from_secs(3);
/// Interval at which the controller's memory is read.
const LOOK: Duration = Duration::from_millis(50);
/// UDP port of the tunnels.
const WIREGUARD: u16 = 51_830;

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Flood {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// True if the daemons are release builds.
    pub release: bool,
    /// Number of processors of the machine.
    pub cores: usize,
    /// Payload of the pair that was asked for, in megabits per second.
    pub paced_mbit_per_s: u64,
    /// Cases that ran, in order.
    pub cases: Vec<Tried>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// A case that ran.
#[derive(Debug, Default, Serialize)]
pub struct Tried {
    /// Name of the case.
    pub name: &'static str,
    /// True if all promises of the case held.
    pub ok: bool,
    /// Number of the attacker's acts that succeeded: connections opened, requests answered, datagrams sent.
    pub acts: u64,
    /// Payload that the pair sent, in megabits per second. It is less than what was asked for if the machine is
    /// too slow.
    pub sent_mbit_per_s: f64,
    /// Payload that arrived, in megabits per second.
    pub mbit_per_s: f64,
    /// Share of the pair's datagrams that did not arrive, in percent.
    pub lost_pct: f64,
    /// Number of changes of path and state of the pair, at both ends.
    pub path_changes: usize,
    /// Largest resident memory of the controller, in megabytes.
    pub controller_mb: f64,
    /// Time that the honest node's join took, in seconds. Absent if it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub join_s: Option<f64>,
    /// Promises that did not hold, in one line. Absent if all held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Returns the cases as the command line selects them.
pub fn entries() -> Vec<Entry> {
    CASES.iter().map(|case| Entry { name: case.name.to_owned(), is_short: true }).collect()
}

/// Runs the selected cases.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Flood> {
    let mut flood = Flood {
        rootless: setting.rank == Rank::Rootless,
        release: !options.dev,
        cores: std::thread::available_parallelism().map_or(1, Into::into),
        paced_mbit_per_s: options.mbit,
        ..Flood::default()
    };
    flood.failed = Promises::broken_by(|promises| flood.play(setting, options, promises));
    Ok(flood)
}

impl Flood {
    fn play(
        &mut self,
        setting: &Setting,
        options: &Options,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        // The half-open connections, those of the other attacks, and the lab's own files.
        allow_many_sockets(4_096)?;
        let mut stage = Stage::build(setting, options)?;
        let full = options.selection.full;
        let window = if full { WINDOW.1 } else { WINDOW.0 };
        for (number, case) in CASES.iter().enumerate() {
            if !options.selection.has(case.name, true) {
                continue;
            }
            interrupt::check()?;
            setting.output.progress(case.name);
            let tried = stage.try_case(number, case, window).unwrap_or_else(|error| Tried {
                name: case.name,
                why: Some(format!("could not run: {error:#}")),
                ..Tried::default()
            });
            interrupt::check()?;
            if let Some(why) = &tried.why {
                let failed = format!("{}: {why}", case.name);
                setting.output.note(&failed);
                promises.fail(failed);
            }
            self.cases.push(tried);
            sleep(CALM)?;
        }
        Ok(())
    }
}

/// Hosts and programs of one run.
struct Stage<'s> {
    setting: &'s Setting,
    mbit: u64,
    a: Node,
    b: Node,
    evil: Arc<Host>,
    honest: Arc<Host>,
    controller: Controller,
    lab: Lab,
}

impl<'s> Stage<'s> {
    /// Builds the hosts, and starts the controller and the pair.
    fn build(setting: &'s Setting, options: &Options) -> anyhow::Result<Self> {
        setting.output.step("building the hosts");
        let mut lab = Lab::new(setting.rank)?;
        let mut host = |name: &str, number: &str| {
            let (v4, v6) = (format!("203.0.113.{number}"), format!("2001:db8::{number}"));
            lab.host(name).public(&v4, &v6)?.build()
        };
        let (cp, a, b) = (host("cp", "10")?, host("a", "11")?, host("b", "12")?);
        let (evil, honest) = (host("evil", "66")?, host("new", "77")?);
        evil.namespace().run(|| {
            let mut netlink = Rtnetlink::open()?;
            let link = netlink.link_index("eth0")?;
            for number in 0..SOURCES {
                let own = IpNet::V4(Ipv4Net::new(source(number), 24)?);
                let options = AddressOptions { no_dad: true, ..AddressOptions::default() };
                netlink.add_address(link, own, options)?;
            }
            Ok(())
        })?;
        setting.output.step("starting the mesh");
        let controller = Controller::start(&lab, &cp, &setting.binaries)?;
        let start = |host: &Arc<Host>, name: &str| {
            let mut node = Node::new(&lab, host, name, &setting.binaries, "")?;
            node.join(&controller.operator().token(name)?)?;
            node.restart()?;
            anyhow::Ok(node)
        };
        let (a, b) = (start(&a, "a")?, start(&b, "b")?);
        require_tunnel(&a, &b, START_LIMIT)?;
        Ok(Self { setting, mbit: options.mbit, a, b, evil, honest, controller, lab })
    }

    /// Runs a case, and returns its figures.
    fn try_case(&mut self, number: usize, case: &Case, window: Duration) -> anyhow::Result<Tried> {
        let controller = self.controller.daemon()?.pid();
        let target = self.target(number)?;
        let name = format!("new-{number}");
        let honest = Node::new(&self.lab, &self.honest, &name, &self.setting.binaries, "")?;
        let token = self.controller.operator().token("new")?;
        let way = Way {
            from: self.a.host().namespace(),
            to: self.b.host().namespace(),
            address: self.b.overlay_v4()?,
            mbit_per_s: self.mbit,
        };
        let before = [self.history(&self.a, "b")?, self.history(&self.b, "a")?];
        let stop = AtomicBool::new(false);
        let ((join_s, carried), memory, acts) = std::thread::scope(|scope| {
            let attack = scope.spawn(|| (case.attack)(&target, &stop));
            let memory = scope.spawn(|| peak_mb(controller, &stop));
            let carried = paced::send_while(&way, || {
                let begun = Instant::now();
                sleep(LEAD)?;
                let asked = Instant::now();
                // A join that fails is a figure of the case, not an error of the lab.
                let join_s = honest.join(&token).ok().map(|()| asked.elapsed().as_secs_f64());
                sleep(window.saturating_sub(begun.elapsed()))?;
                Ok(join_s)
            });
            stop.store(true, Ordering::Relaxed);
            let (acts, memory) = (join(attack), join(memory));
            anyhow::Ok((carried?, memory?, acts.context("the attack")?))
        })?;
        let after = [self.history(&self.a, "b")?, self.history(&self.b, "a")?];
        let is_new = |(before, after): (&Vec<Value>, &Vec<Value>)| {
            after.iter().filter(|change| !before.contains(change)).count()
        };
        let mut tried = Tried {
            name: case.name,
            acts,
            sent_mbit_per_s: round(carried.sent_mbit_per_s()),
            mbit_per_s: round(carried.arrived_mbit_per_s()),
            lost_pct: round(carried.lost_pct()),
            path_changes: before.iter().zip(&after).map(is_new).sum(),
            controller_mb: round(memory),
            join_s: join_s.map(round),
            ..Tried::default()
        };
        tried.judge();
        Ok(tried)
    }

    fn target(&self, number: usize) -> anyhow::Result<Target> {
        let operator = self.controller.operator();
        let token = operator.token_with(&["--uses", "10"])?;
        let token = token.token.parse().map_err(|_| anyhow!("invalid join token"))?;
        let victim_key = PublicKey::from(&private_key(&self.a.state().join("wireguard.key"))?);
        let tunnels = |node: &Node| -> anyhow::Result<SocketAddr> {
            let first = node.host().addresses().first().context("the host has no address")?;
            Ok(SocketAddr::new(*first, WIREGUARD))
        };
        Ok(Target {
            evil: self.evil.clone(),
            honest: self.honest.clone(),
            controller: self.controller.address(),
            operator: operator.clone(),
            token,
            name: format!("evil-{number}"),
            victim: tunnels(&self.a)?,
            victim_key: WireguardKey(victim_key.to_bytes()),
            victim_overlay: self.a.overlay_v4()?,
            peer: tunnels(&self.b)?,
        })
    }

    /// Returns the changes of path and state that a node remembers of a peer.
    fn history(&self, node: &Node, peer: &str) -> anyhow::Result<Vec<Value>> {
        let output = node.command_ok(&["peer", peer, "-o", "json"])?;
        let answer: Value =
            serde_json::from_str(&output).context("cannot parse the output of `towline peer`")?;
        let history = answer["history"].as_array();
        history.cloned().context("`towline peer` shows no history")
    }
}

impl Tried {
    /// Compares the figures with the bounds.
    fn judge(&mut self) {
        let mut promises = Promises::new();
        promises.hold(self.acts > 0, || "the attacker did nothing".to_owned());
        promises.hold(self.sent_mbit_per_s > 0.0 && self.lost_pct <= LOSS_PCT, || {
            format!("{} % of the pair's datagrams lost", self.lost_pct)
        });
        promises.hold(self.path_changes == 0, || {
            format!("{} changes of the pair's path", self.path_changes)
        });
        promises.hold(self.controller_mb <= MEMORY_MB, || {
            format!("{} MB of the controller's memory", self.controller_mb)
        });
        promises.hold(self.join_s.is_some_and(|seconds| seconds <= JOIN_S), || match self.join_s {
            Some(seconds) => format!("the honest node's join took {seconds} s"),
            None => "the honest node could not join".to_owned(),
        });
        let failed = promises.into_failed();
        self.ok = failed.is_empty();
        self.why = (!failed.is_empty()).then(|| failed.join("; "));
    }
}

/// Returns the largest resident memory of a process until `stop` is set.
fn peak_mb(process: Pid, stop: &AtomicBool) -> anyhow::Result<f64> {
    let mut peak: f64 = 0.0;
    while !stop.load(Ordering::Relaxed) && !interrupt::raised() {
        peak = peak.max(resident_mb(process)?);
        std::thread::sleep(LOOK);
    }
    Ok(peak)
}

impl Figures for Flood {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let ok = self.cases.iter().filter(|case| case.ok).count();
        let mut text = format!(
            "{ok} of {} cases ok, a pair at {} Mb/s on {} cores\n",
            self.cases.len(),
            self.paced_mbit_per_s,
            self.cores
        );
        for case in &self.cases {
            let join = case.join_s.map_or("failed".to_owned(), |seconds| format!("{seconds} s"));
            let _ = writeln!(
                text,
                "  {}: {} acts; {} Mb/s, {} % lost, {} path changes; controller {} MB; join {join}",
                case.name,
                case.acts,
                case.mbit_per_s,
                case.lost_pct,
                case.path_changes,
                case.controller_mb
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Tried {
        Tried { acts: 1, sent_mbit_per_s: 500.0, join_s: Some(0.5), ..Tried::default() }
    }

    #[test]
    fn a_case_is_ok_only_if_each_figure_is_within_its_bound() {
        let judged = |mut tried: Tried| {
            tried.judge();
            assert_eq!(tried.ok, tried.why.is_none());
            tried.why
        };
        assert_eq!(judged(good()), None);
        for (bad, why) in [
            (Tried { acts: 0, ..good() }, "did nothing"),
            (Tried { lost_pct: 5.1, ..good() }, "5.1 %"),
            (Tried { path_changes: 1, ..good() }, "1 changes"),
            (Tried { controller_mb: 257.0, ..good() }, "257 MB"),
            (Tried { join_s: Some(5.5), ..good() }, "5.5 s"),
            (Tried { join_s: None, ..good() }, "could not join"),
        ] {
            let said = judged(bad).unwrap();
            assert!(said.contains(why), "{said}");
        }
    }

    #[test]
    fn no_two_cases_have_the_same_name() {
        let mut names: Vec<_> = CASES.iter().map(|case| case.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CASES.len());
    }
}
