//! `cargo lab scale`: measures one controller with thousands of connected agents.
//!
//! The controller is the real binary. The agents are light: they join, watch and publish with the
//! agent's own client code over TLS, from addresses all over 127.0.0.0/8, but keep no map. Each
//! change that is measured carries a number, and each light agent reports when it has received it.
//!
//! | file | owns |
//! |---|---|
//! | `light_agent.rs` | one light agent: its session and what it reports |

mod light_agent;

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;
use serde::Serialize;
use tokio::runtime::Builder;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use towline_proto::token::JoinToken;

use super::Setting;
use crate::lab::interrupt::{self, sleep, wait_for, wait_up_to};
use crate::lab::mesh::Controller;
use crate::lab::privilege::Rank;
use crate::lab::process::{processor_time, resident_mb};
use crate::lab::report::{Figures, Promises, round};
use crate::lab::topology::Lab;

use light_agent::{LightAgent, Member, Report};

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    /// Number of agents
    #[arg(long, default_value_t = 1_000, value_parser = RangedU64ValueParser::<usize>::new().range(20..=10_000))]
    agents: usize,
    /// Offer changes for 60 s instead of 10 s
    #[arg(long)]
    full: bool,
    /// Build the daemons with the dev profile: the figures are then those of a slower program
    #[arg(long)]
    pub dev: bool,
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Scale {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Number of agents.
    pub agents: usize,
    /// True if the controller is a release build.
    pub release: bool,
    /// Number of processors of the machine.
    pub cores: usize,
    /// Number of joins per second while no watch is open.
    pub enrol_per_s: f64,
    /// Number of joins per second while nine tenths of the agents watch.
    pub enrol_watched_per_s: f64,
    /// Time in seconds until all agents had opened their watches and had the whole map.
    pub watch_all_s: f64,
    /// Time in seconds until one agent without a map has the whole map.
    pub snapshot_s: f64,
    /// Median time from the publication of a change until an agent has it, in milliseconds.
    pub delta_p50_ms: f64,
    /// 99th percentile of that time.
    pub delta_p99_ms: f64,
    /// Number of changes per second that were offered and reached every agent.
    pub deltas_per_s: f64,
    /// 99th percentile of the time until an agent has a change under that load, in milliseconds.
    pub load_p99_ms: f64,
    /// Resident memory of the controller, in megabytes.
    pub rss_mb: f64,
    /// Processor time of the controller while all agents are connected and nothing changes, in
    /// percent of a core.
    pub cpu_idle_pct: f64,
    /// Processor time of all agents in the same time.
    pub clients_cpu_idle_pct: f64,
    /// Time in seconds from the start of a killed controller until all agents are connected and
    /// have the whole map.
    pub reconnect_all_s: f64,
    /// Number of changes that were sent again to an agent after that, on average.
    pub resent_per_agent: f64,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Number of agents that join or open a watch at the same time.
const AT_ONCE: usize = 64;
/// Number of changes that are measured one by one.
const SINGLE: usize = 20;
/// Pause between two changes under load.
const LOAD_PACE: Duration = Duration::from_millis(50);
/// Time without changes before the idle measurement.
const SETTLE: Duration = Duration::from_secs(3);
/// Length of the idle measurement. It is two heartbeats, so that each agent sends two of them, whenever
/// its own ones are due.
const IDLE: Duration = Duration::from_secs(30);
/// Longest time of each step.
const STEP: Duration = Duration::from_secs(600);
/// Longest time until a change must have reached every agent.
const DELIVERY: Duration = Duration::from_secs(60);
/// Longest time until all agents must be connected again.
const RECONNECT: Duration = Duration::from_secs(300);

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Scale> {
    let mut figures = Scale {
        rootless: setting.rank == Rank::Rootless,
        agents: options.agents,
        release: !options.dev,
        cores: std::thread::available_parallelism().map_or(1, Into::into),
        ..Scale::default()
    };
    let mut promises = Promises::new();
    if let Err(error) = figures.measure(setting, options) {
        promises.fail(format!("{error:#}"));
    }
    figures.failed = promises.into_failed();
    Ok(figures)
}

impl Scale {
    fn measure(&mut self, setting: &Setting, options: &Options) -> anyhow::Result<()> {
        allow_many_sockets(2 * options.agents + 512)?;
        let mut lab = Lab::new(setting.rank)?;
        let host = lab.host("ctl").public("203.0.113.2", "2001:db8::2")?.build()?;
        let mut controller = Controller::start_on_all(&lab, &host, &setting.binaries)?;
        let uses = options.agents.to_string();
        let token = controller.operator().token_with(&["--uses", &uses, "--ttl", "2h"])?;
        let token: JoinToken = token.token.parse().map_err(|_| anyhow!("invalid join token"))?;
        let report = Arc::new(Report::new());
        let (changes, requests) = mpsc::unbounded_channel();
        std::thread::scope(|scope| {
            let agents = host.namespace().thread(scope, "agents", || {
                let runtime = Builder::new_current_thread().enable_all().build()?;
                let agents = run_agents(options.agents, &token, report.clone(), requests);
                runtime.block_on(agents).inspect_err(|error| report.fail(error))
            })?;
            let result = self.steps(setting, options, &mut controller, &report, &changes);
            // The agents end when this sender is dropped.
            report.stop();
            drop(changes);
            let agents = crate::lab::namespace::join(agents);
            result.and(agents)
        })
    }

    fn steps(
        &mut self,
        setting: &Setting,
        options: &Options,
        controller: &mut Controller,
        report: &Arc<Report>,
        changes: &mpsc::UnboundedSender<Request>,
    ) -> anyhow::Result<()> {
        let output = &setting.output;
        let ask = |request| changes.send(request).map_err(|_| anyhow!("the agents ended"));
        let first = options.agents * 9 / 10;
        let rest = options.agents - first;
        let joined = |wanted: usize, limit| {
            wait_for("joins of the agents", limit, || {
                report.check()?;
                Ok((report.joined() >= wanted).then_some(()))
            })
        };
        let synced = |wanted: usize, limit| {
            wait_for("map of all agents", limit, || {
                report.check()?;
                Ok((report.synced() >= wanted).then_some(()))
            })
        };

        output.step(&format!("joining {first} agents, no watch is open"));
        let begun = Instant::now();
        ask(Request::Join { from: 0, to: first })?;
        joined(first, STEP)?;
        self.enrol_per_s = round(first as f64 / begun.elapsed().as_secs_f64());

        output.step(&format!("opening {first} watches"));
        let begun = Instant::now();
        ask(Request::Watch { from: 0, to: first })?;
        synced(first, STEP)?;
        self.watch_all_s = round(begun.elapsed().as_secs_f64());

        output.step(&format!("joining {rest} agents while {first} watch"));
        let begun = Instant::now();
        ask(Request::Join { from: first, to: options.agents })?;
        joined(options.agents, STEP)?;
        self.enrol_watched_per_s = round(rest as f64 / begun.elapsed().as_secs_f64());

        output.step("asking for the whole map once");
        self.await_quiet(report)?;
        ask(Request::Snapshot)?;
        let snapshot = wait_for("whole map", STEP, || {
            report.check()?;
            Ok(report.snapshot())
        })?;
        self.snapshot_s = round(snapshot.as_secs_f64());
        ask(Request::Watch { from: first, to: options.agents })?;
        synced(options.agents, STEP)?;
        self.await_quiet(report)?;

        output.step(&format!("publishing {SINGLE} changes, one after the other"));
        let mut latencies = Vec::new();
        for number in 0..SINGLE {
            let mark = report.begin_mark();
            ask(Request::Change { agent: number * options.agents / SINGLE, mark })?;
            self.await_marks(report, mark, 1)?;
            latencies.extend(report.latencies(mark));
        }
        latencies.sort_by(f64::total_cmp);
        self.delta_p50_ms = round(percentile(&latencies, 0.5));
        self.delta_p99_ms = round(percentile(&latencies, 0.99));

        let window = Duration::from_secs(if options.full { 60 } else { 10 });
        output.step(&format!("publishing 20 changes a second for {} s", window.as_secs()));
        let begun = Instant::now();
        let mut marks = Vec::new();
        while begun.elapsed() < window {
            let mark = report.begin_mark();
            ask(Request::Change { agent: (7 + 13 * marks.len()) % options.agents, mark })?;
            marks.push(mark);
            let next = begun + LOAD_PACE * u32::try_from(marks.len()).unwrap_or(u32::MAX);
            sleep(next.saturating_duration_since(Instant::now()))?;
        }
        let mut latencies = Vec::new();
        if let Some(first) = marks.first() {
            // An agent that changed twice has only its newest state delivered.
            self.await_marks(report, *first, marks.len())?;
        }
        self.deltas_per_s = round(marks.len() as f64 / begun.elapsed().as_secs_f64());
        for mark in marks {
            latencies.extend(report.latencies(mark));
        }
        latencies.sort_by(f64::total_cmp);
        self.load_p99_ms = round(percentile(&latencies, 0.99));

        output.step(&format!("measuring for {} s while nothing changes", IDLE.as_secs()));
        sleep(SETTLE)?;
        let pid = controller.daemon()?.pid();
        let cpu = || anyhow::Ok((processor_time(pid)?, processor_time(Pid::this())?));
        let (begun, before) = (Instant::now(), cpu()?);
        sleep(IDLE)?;
        let (window, after) = (begun.elapsed().as_secs_f64(), cpu()?);
        let percent = |from: Duration, to: Duration| (to - from).as_secs_f64() / window * 100.0;
        self.cpu_idle_pct = round(percent(before.0, after.0));
        self.clients_cpu_idle_pct = round(percent(before.1, after.1));
        self.rss_mb = round(resident_mb(pid)?);
        anyhow::ensure!(
            report.synced() == options.agents,
            "{} of {} agents stayed connected while nothing happened: {}",
            report.synced(),
            options.agents,
            report.last_disconnect()
        );

        output.step("killing the controller and starting it again");
        controller.daemon()?.kill()?;
        wait_for("end of all watches", STEP, || Ok((report.synced() == 0).then_some(())))?;
        let before = report.changes.load(Ordering::Relaxed);
        let begun = Instant::now();
        controller.launch()?;
        synced(options.agents, RECONNECT)?;
        self.reconnect_all_s = round(begun.elapsed().as_secs_f64());
        let resent = report.changes.load(Ordering::Relaxed) - before;
        self.resent_per_agent = round(resent as f64 / options.agents as f64);
        Ok(())
    }

    /// Waits until the agents have received nothing new for a while.
    fn await_quiet(&self, report: &Report) -> anyhow::Result<()> {
        let mut before = u64::MAX;
        wait_for("end of the first changes", STEP, || {
            report.check()?;
            let now = report.changes.load(Ordering::Relaxed);
            let is_quiet = now == before;
            before = now;
            interrupt::sleep(Duration::from_secs(2))?;
            Ok(is_quiet.then_some(()))
        })
    }

    /// Waits until all agents have received `count` marks from `first` on.
    fn await_marks(&self, report: &Report, first: usize, count: usize) -> anyhow::Result<()> {
        let arrived = wait_up_to(DELIVERY, || {
            report.check()?;
            let all = (first..first + count).all(|mark| report.received(mark) >= self.agents);
            Ok(all.then_some(()))
        })?;
        let received = (first..first + count).map(|mark| report.received(mark));
        let late: Vec<usize> = received.filter(|received| *received < self.agents).collect();
        arrived.with_context(|| {
            format!(
                "{} of {count} changes did not reach every agent in {} s (the first: {} of {}); {} agents \
                 are connected; last disconnect: {}",
                late.len(),
                DELIVERY.as_secs(),
                late.first().copied().unwrap_or_default(),
                self.agents,
                report.synced(),
                report.last_disconnect()
            )
        })
    }
}

/// Request to the thread of the agents.
#[derive(Debug)]
enum Request {
    /// Let these agents join.
    Join { from: usize, to: usize },
    /// Let these agents open their watches, publish their first records, and stay connected.
    Watch { from: usize, to: usize },
    /// Let the last agent, which does not watch yet, ask for the whole map once.
    Snapshot,
    /// Let an agent publish a record with this mark.
    Change { agent: usize, mark: usize },
}

/// Runs all agents until the sender of the requests is dropped.
async fn run_agents(
    count: usize,
    token: &JoinToken,
    report: Arc<Report>,
    mut requests: mpsc::UnboundedReceiver<Request>,
) -> anyhow::Result<()> {
    let mut members: Vec<Option<Arc<Member>>> = vec![None; count];
    let mut running: Vec<Option<mpsc::UnboundedSender<usize>>> = vec![None; count];
    let mut tasks = JoinSet::new();
    let opening = Arc::new(Semaphore::new(AT_ONCE));
    while let Some(request) = requests.recv().await {
        match request {
            Request::Join { from, to } => {
                let mut joins = JoinSet::new();
                for number in from..to {
                    let (token, report, opening) = (token.clone(), report.clone(), opening.clone());
                    joins.spawn(async move {
                        let _permit = opening.acquire_owned().await?;
                        Member::join(number, &token, &report).await
                    });
                }
                while let Some(joined) = joins.join_next().await {
                    let member = joined.context("a join panicked")??;
                    let number = member.number;
                    members[number] = Some(Arc::new(member));
                }
            }
            Request::Watch { from, to } => {
                for number in from..to {
                    let member = members[number].clone().context("the agent has not joined")?;
                    let (sender, changes) = mpsc::unbounded_channel();
                    running[number] = Some(sender);
                    let agent = LightAgent::new(member, report.clone(), opening.clone());
                    tasks.spawn(agent.run(changes));
                }
            }
            Request::Snapshot => {
                let last = members.last().cloned().flatten();
                let member = last.context("the agent has not joined")?;
                report.set_snapshot(member.snapshot().await?);
            }
            Request::Change { agent, mark } => {
                let sender = running[agent].as_ref().context("the agent does not run")?;
                sender.send(mark).map_err(|_| anyhow!("agent {agent} ended"))?;
            }
        }
    }
    tasks.abort_all();
    Ok(())
}

/// Raises the limit of open files of this process to `wanted`, unless it is higher. The controller inherits
/// it.
pub(super) fn allow_many_sockets(wanted: usize) -> anyhow::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = wanted as u64;
    anyhow::ensure!(
        wanted <= hard,
        "this machine allows {hard} open files, and {wanted} are needed: raise the limit (ulimit -Hn)"
    );
    if soft < wanted {
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard)?;
    }
    Ok(())
}

/// Returns a percentile of sorted values; 0 if there are none.
fn percentile(sorted: &[f64], part: f64) -> f64 {
    let index = (sorted.len() as f64 * part) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

impl Figures for Scale {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "{} agents on {} cores:", self.agents, self.cores);
        let _ = writeln!(
            text,
            "  {} joins/s without watches, {} joins/s with; whole map in {} s",
            self.enrol_per_s, self.enrol_watched_per_s, self.snapshot_s
        );
        let _ = writeln!(
            text,
            "  a change at all agents: median {} ms, p99 {} ms; at {} changes/s p99 {} ms",
            self.delta_p50_ms, self.delta_p99_ms, self.deltas_per_s, self.load_p99_ms
        );
        let _ = write!(
            text,
            "  controller {} MB, idle {} % of a core; all connected again in {} s",
            self.rss_mb, self.cpu_idle_pct, self.reconnect_all_s
        );
        text
    }
}
