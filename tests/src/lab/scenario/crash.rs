//! `cargo lab crash`: `kill -9` at random moments, while operators and machines write. What was
//! acknowledged is still there afterwards, everything comes back by itself, and tunnels carry on
//! while the controller is away.

mod writers;

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use super::Setting;
use super::hybrid::{Hybrid, Mesh};
use crate::lab::interrupt::{self, pass, wait_up_to};
use crate::lab::mesh::{Controller, Node, START_LIMIT, await_tunnel};
use crate::lab::namespace::join;
use crate::lab::ping::Ticker;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, round};
use writers::{Acknowledged, Writers};

/// How it is run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How many kills.
    pub kills: u32,
    /// Of everything that is random.
    pub seed: u64,
}

/// What the kills did.
#[derive(Debug, Default, Serialize)]
pub struct Crash {
    /// The lab ran without root's rights over the machine.
    pub rootless: bool,
    /// Gives the same victims and moments again.
    pub seed: u64,
    /// How many were done.
    pub kills: u32,
    /// Of these, how many hit the controller.
    pub controller_kills: u32,
    /// Writes that were acknowledged.
    pub acknowledged: Acknowledged,
    /// Of these, how many were not there afterwards.
    pub lost_writes: usize,
    /// Kills after which something was not back 10 s after its restart.
    pub unrecovered: u32,
    /// The slowest recovery.
    pub recovery_ms_max: f64,
    /// The longest time without an inner reply while only the controller was away.
    pub away_gap_ms: f64,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

const RECOVERY_LIMIT: Duration = Duration::from_secs(10);
/// Kills come at most this long after the restart before.
const LONGEST_PEACE: Duration = Duration::from_millis(1200);
/// A victim stays down at most this long.
const LONGEST_DEATH: Duration = Duration::from_millis(400);
/// After this no more kills: the scenario ends within 8 minutes.
const BUDGET: Duration = Duration::from_secs(400);
const TICK: Duration = Duration::from_millis(20);
/// What a busy machine may hold up a ticking tunnel.
const AWAY_GAP_LIMIT: Duration = Duration::from_millis(500);

/// Runs it.
pub fn run(setting: &Setting, options: Options) -> anyhow::Result<Crash> {
    let hybrid = Hybrid::build(setting)?;
    setting.talk.note(&format!("seed {} (give it again with --seed)", options.seed));
    let mut crash =
        Crash { rootless: setting.rank == Rank::Rootless, seed: options.seed, ..Crash::default() };
    let mut promises = Promises::new();
    if let Err(error) = crash.play(setting, options, &hybrid, &mut promises) {
        promises.fail(format!("{error:#}"));
    }
    crash.failed = promises.into_failed();
    Ok(crash)
}

/// Who can be killed, and who watches.
struct Stage<'a> {
    controller: Controller,
    nodes: Vec<Node>,
    /// Replies from cp to each worker.
    tickers: &'a [Ticker],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Controller,
    Agent(usize),
}

impl Crash {
    fn play(
        &mut self,
        setting: &Setting,
        options: Options,
        hybrid: &Hybrid,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let Mesh { controller, nodes } = hybrid.bring_up(setting)?;
        for worker in &nodes[1..] {
            if let Some(reason) = await_tunnel(worker, &nodes[0], START_LIMIT)? {
                anyhow::bail!("tunnel {}/cp is not up: {reason}", worker.name());
            }
        }
        let cloud = nodes[0].status()?.overlay_addresses;
        let cloud = cloud.iter().find(|ip| ip.is_ipv4()).copied().context("cp has no IPv4")?;
        let tickers = [Ticker::default(), Ticker::default()];
        let stop = AtomicBool::new(false);
        let writers = Writers::new(controller.operator().clone(), hybrid, setting);
        std::thread::scope(|scope| {
            // Also when the killing below fails or panics: the threads would be waited for.
            let _stop = StopOnDrop(&stop);
            let mut threads = Vec::new();
            for (ticker, worker) in tickers.iter().zip(&hybrid.workers) {
                let stop = &stop;
                let tick = move || ticker.run(worker.namespace(), cloud, TICK, stop);
                threads.push(scope.spawn(tick));
            }
            threads.push(scope.spawn(|| writers.manage_tokens(&stop)));
            threads.push(scope.spawn(|| writers.manage_nodes(&stop)));
            let mut stage = Stage { controller, nodes, tickers: &tickers };
            let killed = self.kill_all(setting, options, &mut stage, promises);
            stop.store(true, Ordering::Relaxed);
            for thread in threads {
                join(thread)?;
            }
            killed?;
            setting.talk.step("looking for every acknowledged write");
            let lost = writers.lost()?;
            self.acknowledged = writers.acknowledged();
            self.lost_writes = lost.len();
            for write in lost {
                promises.fail(format!("lost write: {write}"));
            }
            anyhow::Ok(())
        })?;
        promises.hold(self.kills == options.kills, || {
            format!("{} kills within {} s: {}", options.kills, BUDGET.as_secs(), self.kills)
        });
        promises.hold(self.acknowledged.all() > 0, || "writes were acknowledged".to_owned());
        promises.hold(self.away_gap_ms < AWAY_GAP_LIMIT.as_secs_f64() * 1e3, || {
            format!("tunnels carry on while the controller is away: {} ms gap", self.away_gap_ms)
        });
        Ok(())
    }

    fn kill_all(
        &mut self,
        setting: &Setting,
        options: Options,
        stage: &mut Stage<'_>,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let mut random = StdRng::seed_from_u64(options.seed);
        let begun = Instant::now();
        setting.talk.step("killing");
        // Whether everything was up when the kill came.
        let mut peace = true;
        while self.kills < options.kills && begun.elapsed() < BUDGET {
            pass(LONGEST_PEACE.mul_f64(random.random()))?;
            let victim = match random.random_range(0..6_usize) {
                0..3 => Victim::Controller,
                agent => Victim::Agent(agent - 3),
            };
            let killed_at = Instant::now();
            stage.kill(victim)?;
            pass(LONGEST_DEATH.mul_f64(random.random()))?;
            stage.launch(victim)?;
            self.kills += 1;
            self.controller_kills += u32::from(victim == Victim::Controller);
            setting.talk.progress(&format!("killing: {} of {}", self.kills, options.kills));
            // One in three is followed by the next before it has recovered.
            if random.random_ratio(1, 3) && self.kills < options.kills {
                peace = false;
                continue;
            }
            let launched_at = Instant::now();
            match stage.recover()? {
                Ok(()) => {
                    let took = launched_at.elapsed().as_secs_f64() * 1e3;
                    self.recovery_ms_max = round(self.recovery_ms_max.max(took));
                    if peace && victim == Victim::Controller {
                        let gap = stage.longest_gap(killed_at, Instant::now());
                        let gap = gap.as_secs_f64() * 1e3;
                        self.away_gap_ms = round(self.away_gap_ms.max(gap));
                    }
                    peace = true;
                }
                Err(missing) => {
                    self.unrecovered += 1;
                    promises.fail(format!(
                        "recovery from kill {} of {victim:?}: {missing}",
                        self.kills
                    ));
                    peace = false;
                }
            }
        }
        Ok(())
    }
}

impl Stage<'_> {
    fn kill(&mut self, victim: Victim) -> anyhow::Result<()> {
        match victim {
            Victim::Controller => self.controller.daemon()?.kill(),
            Victim::Agent(index) => self.nodes[index].agent()?.kill(),
        }
    }

    fn launch(&mut self, victim: Victim) -> anyhow::Result<()> {
        match victim {
            Victim::Controller => self.controller.launch(),
            Victim::Agent(index) => self.nodes[index].launch(),
        }
    }

    /// Waits until everything is back: the controller answers and sees every node online, every
    /// agent is connected, and packets flow. Else what was missing when the time was up.
    fn recover(&mut self) -> anyhow::Result<Result<(), String>> {
        let asked = Instant::now();
        let mut missing = String::new();
        let back = wait_up_to(RECOVERY_LIMIT, || {
            match self.look(asked) {
                Ok(()) => return Ok(Some(())),
                Err(error) => missing = format!("{error:#}"),
            }
            interrupt::check()?;
            Ok(None)
        })?;
        Ok(back.ok_or(missing))
    }

    fn look(&mut self, asked: Instant) -> anyhow::Result<()> {
        for node in &mut self.nodes {
            node.agent()?.check()?;
        }
        self.controller.daemon()?.check()?;
        let listed = self.controller.operator().nodes()?;
        for node in &self.nodes {
            let online = listed.iter().any(|entry| entry.name == node.name() && entry.online);
            anyhow::ensure!(online, "the controller does not see {} online", node.name());
            let connected = node.status()?.controller.connected;
            anyhow::ensure!(connected, "{} is not connected", node.name());
        }
        for (ticker, worker) in self.tickers.iter().zip(&self.nodes[1..]) {
            let flows = ticker.last().is_some_and(|last| last > asked);
            anyhow::ensure!(flows, "no packet between {} and cp", worker.name());
        }
        Ok(())
    }

    fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        let gaps = self.tickers.iter().map(|ticker| ticker.longest_gap(from, to));
        gaps.max().unwrap_or_default()
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Figures for Crash {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{} kills ({} of the controller), seed {}",
            self.kills, self.controller_kills, self.seed
        );
        let _ = writeln!(
            text,
            "  {} writes acknowledged, {} lost",
            self.acknowledged.all(),
            self.lost_writes
        );
        let _ = writeln!(
            text,
            "  slowest recovery {} ms, not recovered {}",
            self.recovery_ms_max, self.unrecovered
        );
        let _ = write!(text, "  longest gap while the controller was away {} ms", self.away_gap_ms);
        text
    }
}
