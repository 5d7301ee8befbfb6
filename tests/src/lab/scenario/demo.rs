//! `cargo lab demo`: joins two datacenter workers behind NAT to a control plane in the cloud, and
//! sends traffic between all nodes through their tunnels.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;

use super::Setting;
use super::hybrid::{Hybrid, NODES};
use crate::lab::capture::Seen;
use crate::lab::interrupt;
use crate::lab::keep_running::Kept;
use crate::lab::mesh::{Controller, Node, START_LIMIT, await_tunnel};
use crate::lab::namespace::join;
use crate::lab::ping::{echoes, first_reply};
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, round};
use crate::lab::traffic::{Pattern, tcp_both_ways};

/// Command line options of the scenario.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Options {
    /// Keep the lab running afterwards, until Ctrl-C.
    #[arg(long)]
    pub keep: bool,
    /// Megabytes to send in each direction, over each tunnel and address family.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub megabytes: u64,
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Demo {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Number of nodes that joined.
    pub joined: usize,
    /// Number of pairs of nodes that both report their tunnel as up.
    pub tunnels_up: usize,
    /// Reasons why the other tunnels are down, by pair.
    pub tunnels_down: BTreeMap<String, String>,
    /// True if all bytes of all transfers, and all echo replies, arrived unchanged.
    pub bytes_ok: bool,
    /// True if any inner packet crossed the internet in clear.
    pub plaintext_seen: bool,
    /// Time in milliseconds from the start of the join of a pair's later node to the first echo
    /// reply.
    pub first_packet_ms: BTreeMap<String, f64>,
    /// Median round-trip time in milliseconds, by pair and address family.
    pub ping_ms: BTreeMap<String, BTreeMap<&'static str, f64>>,
    /// TCP throughput in Mbit/s in each direction, by pair and address family.
    pub throughput_mbit_per_s: BTreeMap<String, BTreeMap<&'static str, [f64; 2]>>,
    /// Counters of the capture on the internet.
    pub capture: Seen,
    /// Promises that did not hold.
    pub failed: Vec<String>,
    /// Limit for `first_packet_ms`, by pair.
    #[serde(skip)]
    first_packet_limits: BTreeMap<String, Duration>,
    /// Output of `towline peers` on each node, by the node's name.
    #[serde(skip)]
    tables: Vec<(String, String)>,
}

/// Limit for the first echo reply between a worker and the control plane after the worker starts to
/// join.
const FIRST_PACKET_LIMIT: Duration = Duration::from_secs(2);
/// Number of commands of the controller's operator that take as long as a join and the first packet may
/// take on a slow machine, where that is longer than [`FIRST_PACKET_LIMIT`].
const FIRST_PACKET_COMMANDS: u32 = 20;
/// Time to wait for the first echo reply between a worker and the control plane. Longer than the
/// limit, so that a late reply is measured too.
const FIRST_PACKET_TIMEOUT: Duration = Duration::from_secs(60);
/// Time to wait for the first echo reply between two workers. They may have no path to each other.
const WORKERS_TIMEOUT: Duration = Duration::from_secs(3);
/// Number of echo requests for each pair and address family.
const ECHOES: u32 = 20;
/// Time to wait for each echo reply.
const ECHO_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs the scenario and returns its results.
///
/// # Errors
/// Returns [`Forbidden`](crate::lab::report::Forbidden) if the kernel lacks a feature. Every other
/// error is a promise that did not hold.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Demo> {
    let hybrid = Hybrid::build(setting)?;
    let mut demo = Demo { rootless: setting.rank == Rank::Rootless, ..Demo::default() };
    let mut promises = Promises::new();
    let mut stage = Stage { controller: None, nodes: Vec::new() };
    let played = demo.play(setting, *options, &hybrid, &mut stage, &mut promises);
    if let Err(error) = played {
        promises.fail(format!("{error:#}"));
        if !interrupt::raised() {
            stage.explain(setting);
        }
    }
    if options.keep && !interrupt::raised() {
        stage.keep_running(setting, &hybrid)?;
    }
    demo.failed = promises.into_failed();
    Ok(demo)
}

/// Programs that run on the hosts. Kept outside of the run so that a failure can be examined.
struct Stage {
    controller: Option<Controller>,
    nodes: Vec<Node>,
}

impl Demo {
    /// Starts the mesh, and checks its tunnels and traffic.
    fn play(
        &mut self,
        setting: &Setting,
        options: Options,
        hybrid: &Hybrid,
        stage: &mut Stage,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let output = &setting.output;
        let pattern = Pattern::random()?;
        let capture = hybrid.capture(pattern)?;
        output.step("starting the controller");
        stage.controller = Some(Controller::start(&hybrid.lab, &hybrid.cp, &setting.binaries)?);
        for (name, site, configuration) in NODES {
            output.step(&format!("joining {name} with a token"));
            let host = hybrid.host(name)?;
            let node = Node::new(&hybrid.lab, host, name, &setting.binaries, configuration)?;
            self.add_node(node, site, stage)?;
        }
        self.joined = stage.nodes.len();
        output.step("waiting for the tunnels");
        let pairs = self.tunnels(stage, promises)?;
        self.bytes_ok = true;
        for (a, b) in &pairs {
            self.exchange(setting, options, pattern, &stage.nodes[*a], &stage.nodes[*b], promises)?;
        }
        self.bytes_ok &= !pairs.is_empty();
        for node in &stage.nodes {
            self.tables.push((node.name().to_owned(), node.peers_table()?));
        }
        if !options.keep {
            output.step("stopping the daemons");
            stage.stop(promises);
        }
        self.capture = capture.stop()?;
        self.judge_capture(promises);
        Ok(())
    }

    /// Joins a node, starts its agent, and measures the time until each earlier node replies to an
    /// echo request.
    fn add_node(&mut self, mut node: Node, site: &str, stage: &mut Stage) -> anyhow::Result<()> {
        let controller = stage.controller.as_ref().context("the controller does not run")?;
        let asked = Instant::now();
        let token = controller.operator().token(site)?;
        let before = asked.elapsed();
        let mut others = Vec::new();
        for other in &stage.nodes {
            let target = other.overlay_v4()?;
            let timeout = if other.name() == "cp" { FIRST_PACKET_TIMEOUT } else { WORKERS_TIMEOUT };
            others.push((format!("{}/{}", node.name(), other.name()), target, timeout));
        }
        let by_input = stage.nodes.len() % 2 == 1;
        let start = Instant::now();
        let host = std::sync::Arc::clone(node.host());
        let namespace = host.namespace();
        let first = std::thread::scope(|scope| {
            let probes: Vec<_> = others
                .iter()
                .map(|(pair, target, timeout)| {
                    let probe = scope
                        .spawn(|| first_reply(namespace, *target, "towline0", start + *timeout));
                    (pair.clone(), probe)
                })
                .collect();
            let started = (|| {
                if by_input {
                    node.join_by_input(&token)?;
                } else {
                    node.join(&token)?;
                }
                node.restart()
            })();
            let first: anyhow::Result<Vec<_>> =
                probes.into_iter().map(|(pair, probe)| Ok((pair, join(probe)?))).collect();
            started?;
            first
        })?;
        let asked = Instant::now();
        controller.operator().nodes()?;
        let command = asked.elapsed().max(before);
        for (pair, reply) in first {
            let limit = FIRST_PACKET_LIMIT.max(command * FIRST_PACKET_COMMANDS);
            self.first_packet_limits.insert(pair.clone(), limit);
            if let Some(at) = reply {
                self.first_packet_ms.insert(pair, milliseconds(at - start));
            }
        }
        stage.nodes.push(node);
        Ok(())
    }

    /// Returns the pairs whose tunnels are up. Every tunnel to the control plane must be up.
    fn tunnels(
        &mut self,
        stage: &Stage,
        promises: &mut Promises,
    ) -> anyhow::Result<Vec<(usize, usize)>> {
        let mut up = Vec::new();
        for later in 1..stage.nodes.len() {
            for earlier in 0..later {
                let (a, b) = (&stage.nodes[later], &stage.nodes[earlier]);
                let pair = format!("{}/{}", a.name(), b.name());
                let required = earlier == 0;
                let limit = if required { START_LIMIT } else { Duration::ZERO };
                match await_tunnel(a, b, limit)? {
                    None => up.push((later, earlier)),
                    Some(reason) => {
                        promises.hold(!required, || format!("tunnel {pair} up: {reason}"));
                        promises.hold(!reason.is_empty(), || {
                            format!("status shows why {pair} is down: the reason is empty")
                        });
                        self.tunnels_down.insert(pair.clone(), reason);
                    }
                }
                if required {
                    let first = self.first_packet_ms.get(&pair).copied();
                    let limit = self.first_packet_limits.get(&pair).copied();
                    let limit = milliseconds(limit.unwrap_or(FIRST_PACKET_LIMIT));
                    promises.hold(first.is_some_and(|ms| ms <= limit), || match first {
                        Some(ms) => format!("first packet of {pair} within {limit} ms: {ms} ms"),
                        None => format!("first packet of {pair} within {limit} ms: none arrived"),
                    });
                }
            }
        }
        self.tunnels_up = up.len();
        Ok(up)
    }

    /// Sends echo requests and a TCP stream in each direction, over both address families.
    fn exchange(
        &mut self,
        setting: &Setting,
        options: Options,
        pattern: Pattern,
        a: &Node,
        b: &Node,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let pair = format!("{}/{}", a.name(), b.name());
        let bytes = options.megabytes * 1_000_000;
        for target in b.status()?.overlay_addresses {
            let family = family(target);
            setting.output.step(&format!("echoes {pair} over {family}"));
            let replies = echoes(a.host().namespace(), target, ECHOES, ECHO_TIMEOUT, pattern)?;
            let all = replies.received == replies.sent;
            promises.hold(all, || {
                format!("echoes {pair} {family}: {} of {}", replies.received, replies.sent)
            });
            self.bytes_ok &= all;
            if let Some(median) = replies.median {
                self.ping_ms.entry(pair.clone()).or_default().insert(family, milliseconds(median));
            }
            let what = format!("{} MB each way {pair} over {family}", options.megabytes);
            setting.output.step(&what);
            let progress =
                |done: u64| setting.output.progress(&format!("{what}: {} MB", done / 1_000_000));
            let (from, to) = (a.host().namespace(), b.host().namespace());
            match tcp_both_ways(from, to, target, bytes, pattern, progress) {
                Ok(ways) => {
                    let figures = ways.map(|way| round(way.mbit_per_s()));
                    self.throughput_mbit_per_s
                        .entry(pair.clone())
                        .or_default()
                        .insert(family, figures);
                }
                Err(error) => {
                    interrupt::check()?;
                    self.bytes_ok = false;
                    promises.fail(format!("transfer {pair} {family}: {error:#}"));
                }
            }
        }
        Ok(())
    }

    /// Checks the counters of the capture.
    fn judge_capture(&mut self, promises: &mut Promises) {
        let seen = self.capture;
        self.plaintext_seen = seen.marked > 0 || seen.inner_addresses > 0;
        promises.hold(!self.plaintext_seen, || {
            format!(
                "no inner packet in clear: {} frames with the pattern, {} with inner addresses",
                seen.marked, seen.inner_addresses
            )
        });
        promises.hold(seen.wireguard > 0, || {
            "the capture sees WireGuard frames: it saw none".to_owned()
        });
        promises.hold(seen.fragments == 0, || {
            format!("no outer packet is fragmented: {} fragments", seen.fragments)
        });
        promises.hold(seen.missed == 0, || {
            format!("all frames are captured: {} were missed", seen.missed)
        });
    }
}

impl Stage {
    /// Stops all programs and checks their exit status.
    fn stop(&mut self, promises: &mut Promises) {
        let agents = self.nodes.iter_mut().filter_map(Node::take_agent);
        let controller = self.controller.as_mut().and_then(Controller::take_daemon);
        for daemon in agents.chain(controller) {
            let name = daemon.name().to_owned();
            match daemon.stop() {
                Ok(status) => promises.hold(status.success(), || {
                    format!(
                        "{name} exits without error on SIGTERM: {}",
                        crate::lab::process::ending(status)
                    )
                }),
                Err(error) => promises.fail(format!("{error:#}")),
            }
        }
    }

    /// Shows the last log lines of each program.
    fn explain(&mut self, setting: &Setting) {
        let agents = self.nodes.iter_mut().filter_map(|node| node.agent().ok());
        let controller = self.controller.iter_mut().filter_map(|c| c.daemon().ok());
        for daemon in agents.chain(controller) {
            let words = daemon.last_words();
            if !words.is_empty() {
                setting.output.note(&format!("last log lines of {}:\n    {words}", daemon.name()));
            }
        }
    }

    /// Keeps the lab running until Ctrl-C.
    fn keep_running(&self, setting: &Setting, hybrid: &Hybrid) -> anyhow::Result<()> {
        let mut kept = Kept::new(setting.binaries.directory())?;
        kept.add(hybrid.lab.internet(), [("", ""); 0]);
        for router in &hybrid.routers {
            kept.add(router.host().namespace(), [("", ""); 0]);
        }
        for node in &self.nodes {
            let mut environment = vec![("TOWLINE_CONFIG", node.config().display().to_string())];
            if node.name() == "cp"
                && let Some(controller) = &self.controller
            {
                environment.push((
                    "TOWLINE_CONTROLLER_STATE_DIR",
                    controller.operator().state().display().to_string(),
                ));
            }
            kept.add(node.host().namespace(), environment);
        }
        setting.output.step("the lab keeps running: stop it with Ctrl-C");
        for line in [
            "commands for another terminal:",
            "  cargo lab shell worker-a                       a shell on a node",
            "  cargo lab shell worker-a towline peers         the operator's table",
            "  cargo lab shell cp towline-controller node list",
            "  cargo lab shell internet                       the network that all outer packets cross",
            &format!("  logs and state: {}", hybrid.lab.directory().display()),
        ] {
            setting.output.note(line);
        }
        kept.stay()
    }
}

impl Figures for Demo {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for (node, table) in &self.tables {
            let _ = writeln!(text, "towline peers on {node}:\n{}\n", table.trim_end());
        }
        let _ = writeln!(
            text,
            "{} nodes joined, {} tunnels up{}",
            self.joined,
            self.tunnels_up,
            if self.rootless { " (without root)" } else { "" }
        );
        for (pair, ms) in &self.first_packet_ms {
            let _ = writeln!(text, "  {pair}: first packet after {ms} ms");
        }
        for (pair, families) in &self.throughput_mbit_per_s {
            for (family, [there, back]) in families {
                let ping = self.ping_ms.get(pair).and_then(|families| families.get(family));
                let ping = ping.map_or(String::new(), |ms| format!(", ping {ms} ms"));
                let _ = writeln!(text, "  {pair} {family}: {there} and {back} Mbit/s{ping}");
            }
        }
        for (pair, reason) in &self.tunnels_down {
            let _ = writeln!(text, "  {pair}: down: {reason}");
        }
        let _ = writeln!(
            text,
            "on the simulated internet: {} frames, {} of them WireGuard, {} with inner data in clear",
            self.capture.frames,
            self.capture.wireguard,
            self.capture.marked + self.capture.inner_addresses
        );
        text.truncate(text.trim_end().len());
        text
    }
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn milliseconds(duration: Duration) -> f64 {
    round(duration.as_secs_f64() * 1e3)
}
