//! One run: a controller with its store, and a number of agents, from the first join to the return after a crash.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use nix::unistd::Pid;
use serde::Serialize;
use tokio::runtime::Builder;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use towline_netlink::Family;
use towline_proto::token::JoinToken;

use super::light_agent::{LightAgent, Member, Report};
use super::{Options, StoreKind, allow_many_sockets};
use crate::lab::interrupt::{sleep, wait_for, wait_until_steady, wait_up_to};
use crate::lab::mesh::Controller;
use crate::lab::process::{processor_time, resident_mb};
use crate::lab::report::round;
use crate::lab::scenario::Setting;
use crate::lab::scenario::ha::member::{self, CLIENTS};
use crate::lab::topology::{Host, Lab};

/// Figures of one run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Run {
    /// Store of the controller: `redb`, or `etcd` with three members on the same machine.
    pub store: StoreKind,
    /// Number of agents.
    pub agents: usize,
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
    /// Processor time of the controller under that load, in percent of a core.
    pub cpu_load_pct: f64,
    /// Processor time of all agents in the same time.
    pub clients_cpu_load_pct: f64,
    /// Resident memory of the controller, in megabytes.
    pub rss_mb: f64,
    /// Processor time of the controller while all agents are connected and nothing changes, in
    /// percent of a core.
    pub cpu_idle_pct: f64,
    /// Processor time of all agents in the same time.
    pub clients_cpu_idle_pct: f64,
    /// Resident memory of all members of etcd, in megabytes; absent with redb.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_rss_mb: Option<f64>,
    /// Processor time of all members of etcd while nothing changes, in percent of a core; absent with redb.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_cpu_idle_pct: Option<f64>,
    /// Time in seconds from the start of a killed controller until all agents are connected and
    /// have the whole map.
    pub reconnect_all_s: f64,
    /// Number of changes that were sent again to an agent after that, on average.
    pub resent_per_agent: f64,
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
/// Time without a change after which the agents have received them all.
const QUIET: Duration = Duration::from_secs(2);
/// Longest time until a change must have reached every agent.
const DELIVERY: Duration = Duration::from_secs(60);
/// Longest time until all agents must be connected again.
const RECONNECT: Duration = Duration::from_secs(300);

/// Number of members of etcd.
const MEMBERS: usize = 3;

/// Processes of the controller and of its store.
struct Daemons {
    controller: Controller,
    /// Members of etcd; empty with redb.
    members: Vec<member::Member>,
}

/// Processor times up to a moment.
#[derive(Clone, Copy)]
struct ProcessorTimes {
    at: Instant,
    controller: Duration,
    clients: Duration,
    store: Duration,
}

impl Run {
    /// Measures everything. What was measured before an error is kept.
    pub(super) fn measure(&mut self, setting: &Setting, options: &Options) -> anyhow::Result<()> {
        allow_many_sockets(2 * self.agents + 512)?;
        let mut lab = Lab::new(setting.rank)?;
        let host = lab.host("ctl").public("203.0.113.2", "2001:db8::2")?.build()?;
        let mut daemons = Daemons::start(setting, &mut lab, &host, self.store)?;
        let uses = self.agents.to_string();
        let token = daemons.controller.operator().token_with(&["--uses", &uses, "--ttl", "2h"])?;
        let token: JoinToken = token.token.parse().map_err(|_| anyhow!("invalid join token"))?;
        let report = Arc::new(Report::new());
        let (changes, requests) = mpsc::unbounded_channel();
        let count = self.agents;
        std::thread::scope(|scope| {
            let agents = host.namespace().thread(scope, "agents", || {
                let runtime = Builder::new_current_thread().enable_all().build()?;
                let agents = run_agents(count, &token, report.clone(), requests);
                runtime.block_on(agents).inspect_err(|error| report.fail(error))
            })?;
            let result = self.steps(setting, options, &mut daemons, &report, &changes);
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
        daemons: &mut Daemons,
        report: &Arc<Report>,
        changes: &mpsc::UnboundedSender<Request>,
    ) -> anyhow::Result<()> {
        let output = &setting.output;
        let ask = |request| changes.send(request).map_err(|_| anyhow!("the agents ended"));
        let all = self.agents;
        let first = all * 9 / 10;
        let rest = all - first;
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
        ask(Request::Join { from: first, to: all })?;
        joined(all, STEP)?;
        self.enrol_watched_per_s = round(rest as f64 / begun.elapsed().as_secs_f64());

        output.step("asking for the whole map once");
        self.await_quiet(report)?;
        ask(Request::Snapshot)?;
        let snapshot = wait_for("whole map", STEP, || {
            report.check()?;
            Ok(report.snapshot())
        })?;
        self.snapshot_s = round(snapshot.as_secs_f64());
        ask(Request::Watch { from: first, to: all })?;
        synced(all, STEP)?;
        self.await_quiet(report)?;

        output.step(&format!("publishing {SINGLE} changes, one after the other"));
        let mut latencies = Vec::new();
        for number in 0..SINGLE {
            let mark = report.begin_mark();
            ask(Request::Change { agent: number * all / SINGLE, mark })?;
            self.await_marks(report, mark, 1)?;
            latencies.extend(report.latencies(mark));
        }
        latencies.sort_by(f64::total_cmp);
        self.delta_p50_ms = round(percentile(&latencies, 0.5));
        self.delta_p99_ms = round(percentile(&latencies, 0.99));

        let window = Duration::from_secs(if options.full { 60 } else { 10 });
        output.step(&format!("publishing 20 changes a second for {} s", window.as_secs()));
        let before = daemons.processor_times()?;
        let begun = before.at;
        let mut marks = Vec::new();
        while begun.elapsed() < window {
            let mark = report.begin_mark();
            ask(Request::Change { agent: (7 + 13 * marks.len()) % all, mark })?;
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
        let share = before.until(daemons.processor_times()?);
        self.cpu_load_pct = share.controller;
        self.clients_cpu_load_pct = share.clients;
        for mark in marks {
            latencies.extend(report.latencies(mark));
        }
        latencies.sort_by(f64::total_cmp);
        self.load_p99_ms = round(percentile(&latencies, 0.99));

        output.step(&format!("measuring for {} s while nothing changes", IDLE.as_secs()));
        sleep(SETTLE)?;
        let before = daemons.processor_times()?;
        sleep(IDLE)?;
        let share = before.until(daemons.processor_times()?);
        self.cpu_idle_pct = share.controller;
        self.clients_cpu_idle_pct = share.clients;
        self.rss_mb = round(resident_mb(daemons.controller.daemon()?.pid())?);
        if self.store == StoreKind::Etcd {
            self.store_cpu_idle_pct = Some(share.store);
            self.store_rss_mb = Some(daemons.store_mb()?);
        }
        anyhow::ensure!(
            report.synced() == all,
            "{} of {} agents stayed connected while nothing happened: {}",
            report.synced(),
            all,
            report.last_disconnect()
        );

        output.step("killing the controller and starting it again");
        daemons.controller.daemon()?.kill()?;
        wait_for("end of all watches", STEP, || Ok((report.synced() == 0).then_some(())))?;
        let before = report.changes.load(Ordering::Relaxed);
        let begun = Instant::now();
        daemons.controller.launch()?;
        synced(all, RECONNECT)?;
        self.reconnect_all_s = round(begun.elapsed().as_secs_f64());
        let resent = report.changes.load(Ordering::Relaxed) - before;
        self.resent_per_agent = round(resent as f64 / all as f64);
        Ok(())
    }

    /// Waits until the agents have received nothing new for a while.
    fn await_quiet(&self, report: &Report) -> anyhow::Result<()> {
        wait_until_steady("end of the first changes", STEP, QUIET, || {
            report.check()?;
            Ok(Some(report.changes.load(Ordering::Relaxed)))
        })?;
        Ok(())
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

/// Processor times in percent of a core.
struct Share {
    controller: f64,
    clients: f64,
    store: f64,
}

impl ProcessorTimes {
    fn until(self, later: Self) -> Share {
        let window = later.at.duration_since(self.at).as_secs_f64();
        let percent =
            |from: Duration, to: Duration| round((to - from).as_secs_f64() / window * 100.0);
        Share {
            controller: percent(self.controller, later.controller),
            clients: percent(self.clients, later.clients),
            store: percent(self.store, later.store),
        }
    }
}

impl Daemons {
    /// Starts the controller, and the members of etcd if it has its store there.
    fn start(
        setting: &Setting,
        lab: &mut Lab,
        host: &Arc<Host>,
        store: StoreKind,
    ) -> anyhow::Result<Self> {
        let config = match store {
            StoreKind::Redb => {
                let controller = Controller::start_on_all(lab, host, &setting.binaries)?;
                return Ok(Self { controller, members: Vec::new() });
            }
            StoreKind::Etcd => lab.directory().join("controller.toml"),
        };
        let mut hosts = Vec::new();
        for number in 0..MEMBERS {
            let (v4, v6) =
                (format!("203.0.113.{}", 20 + number), format!("2001:db8::{}", 20 + number));
            let name = format!("e{number}");
            hosts.push(lab.host(&name).only(Family::V4).public(&v4, &v6)?.build()?);
        }
        let mut members = member::Member::all(lab, &hosts)?;
        members.iter_mut().try_for_each(member::Member::start)?;
        Self::configure(&config, &hosts)?;
        let controller =
            Controller::start_on_all_configured(lab, host, &setting.binaries, &config)?;
        Ok(Self { controller, members })
    }

    /// Writes the configuration of a controller that could serve with others: one that is started again need not wait
    /// for the end of a lease.
    fn configure(path: &Path, hosts: &[Arc<Host>]) -> anyhow::Result<()> {
        let first = hosts.iter().filter_map(|host| host.addresses().first());
        let endpoints: Vec<String> = first.map(|address| format!("{address}:{CLIENTS}")).collect();
        let text = format!(
            "store = \"etcd://{}\"\n[etcd]\nshared = true\nplaintext = true\n",
            endpoints.join(",")
        );
        std::fs::write(path, text).context("cannot write the configuration")
    }

    fn processor_times(&mut self) -> anyhow::Result<ProcessorTimes> {
        let mut store = Duration::ZERO;
        for member in &mut self.members {
            store += processor_time(member.daemon()?.pid())?;
        }
        Ok(ProcessorTimes {
            controller: processor_time(self.controller.daemon()?.pid())?,
            clients: processor_time(Pid::this())?,
            store,
            at: Instant::now(),
        })
    }

    /// Returns the resident memory of all members of etcd, in megabytes.
    fn store_mb(&mut self) -> anyhow::Result<f64> {
        let mut all = 0.0;
        for member in &mut self.members {
            all += resident_mb(member.daemon()?.pid())?;
        }
        Ok(round(all))
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

/// Returns a percentile of sorted values; 0 if there are none.
fn percentile(sorted: &[f64], part: f64) -> f64 {
    let index = (sorted.len() as f64 * part) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}
