//! `cargo lab crash`: kills the controller and agents with SIGKILL at random moments, while
//! operators and machines write. No acknowledged write may be lost, all programs must recover on
//! their own, and tunnels must carry traffic while the controller is down.

mod writers;

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use super::Setting;
use super::hybrid::{Hybrid, Mesh};
use crate::lab::interrupt::{self, sleep, wait_up_to};
use crate::lab::mesh::{Controller, Node, START_LIMIT, require_tunnel};
use crate::lab::namespace::join;
use crate::lab::ping::Ticker;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, round};
use crate::lab::traffic::given_or_random;
use writers::{Acknowledged, Writers};

/// Command line options of the scenario.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Options {
    /// Number of kills.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub kills: u32,
    /// Seed for the choice of victims and moments [default: random].
    #[arg(long)]
    pub seed: Option<u64>,
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Crash {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Seed of the run. Pass it with `--seed` to repeat the same victims and pauses.
    pub seed: u64,
    /// Number of kills that were done.
    pub kills: u32,
    /// Number of kills of the controller.
    pub controller_kills: u32,
    /// Numbers of acknowledged writes.
    pub acknowledged: Acknowledged,
    /// Number of acknowledged writes that were missing at the end.
    pub lost_writes: usize,
    /// Number of kills after which the recovery took more than 10 s.
    pub unrecovered: u32,
    /// Longest recovery after a restart, in milliseconds.
    pub recovery_ms_max: f64,
    /// Longest time in milliseconds without an echo reply while only the controller was down.
    pub away_gap_ms: f64,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Limit for the recovery after a restart.
const RECOVERY_LIMIT: Duration = Duration::from_secs(10);
/// Longest pause before the next kill.
const LONGEST_PEACE: Duration = Duration::from_millis(1200);
/// Longest time between a kill and the restart of the same program.
const LONGEST_DEATH: Duration = Duration::from_millis(400);
/// Time after which no more kills follow, so that the scenario ends within 8 minutes.
const BUDGET: Duration = Duration::from_secs(400);
/// Interval between two echo requests of a ticker.
const TICK: Duration = Duration::from_millis(20);
/// Limit for the time without an echo reply while only the controller is down. A busy machine can
/// delay replies this long.
const AWAY_GAP_LIMIT: Duration = Duration::from_millis(500);

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Crash> {
    let hybrid = Hybrid::build(setting)?;
    let seed = given_or_random(options.seed)?;
    setting.output.note(&format!("seed {seed} (repeat with --seed)"));
    let mut crash = Crash { rootless: setting.rank == Rank::Rootless, seed, ..Crash::default() };
    crash.failed = Promises::broken_by(|promises| crash.play(setting, *options, &hybrid, promises));
    Ok(crash)
}

/// Programs that can be killed, and the tickers that observe the tunnels.
struct Stage<'a> {
    controller: Controller,
    nodes: Vec<Node>,
    /// Tickers that send echo requests from each worker to `cp`.
    tickers: &'a [Ticker],
}

/// Program that is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Controller,
    /// Agent of the node with this index.
    Agent(usize),
}

impl Crash {
    /// Starts the mesh, the writers and the tickers, kills programs, and checks the writes.
    fn play(
        &mut self,
        setting: &Setting,
        options: Options,
        hybrid: &Hybrid,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let Mesh { controller, nodes } = hybrid.bring_up(setting)?;
        for worker in &nodes[1..] {
            require_tunnel(worker, &nodes[0], START_LIMIT)?;
        }
        let cloud = nodes[0].overlay_v4()?;
        let tickers = [Ticker::default(), Ticker::default()];
        let stop = AtomicBool::new(false);
        let writers = Writers::new(controller.operator().clone(), hybrid, setting);
        std::thread::scope(|scope| {
            // Stops the threads even if the code below fails or panics. The scope would wait for
            // them forever.
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
            setting.output.step("searching for all acknowledged writes");
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
        promises.hold(self.acknowledged.all() > 0, || {
            "the controller acknowledges writes: it acknowledged none".to_owned()
        });
        promises.hold(self.away_gap_ms < AWAY_GAP_LIMIT.as_secs_f64() * 1e3, || {
            format!(
                "tunnels carry traffic while the controller is down: {} ms without a reply",
                self.away_gap_ms
            )
        });
        Ok(())
    }

    /// Kills and restarts programs until the number of kills or the time limit is reached.
    fn kill_all(
        &mut self,
        setting: &Setting,
        options: Options,
        stage: &mut Stage<'_>,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let begun = Instant::now();
        setting.output.step("killing programs");
        // True if all programs had recovered before the current kill.
        let mut peace = true;
        while self.kills < options.kills && begun.elapsed() < BUDGET {
            sleep(LONGEST_PEACE.mul_f64(random.random()))?;
            let victim = match random.random_range(0..6_usize) {
                0..3 => Victim::Controller,
                agent => Victim::Agent(agent - 3),
            };
            let killed_at = Instant::now();
            stage.kill(victim)?;
            sleep(LONGEST_DEATH.mul_f64(random.random()))?;
            stage.launch(victim)?;
            self.kills += 1;
            self.controller_kills += u32::from(victim == Victim::Controller);
            setting.output.progress(&format!("killing: {} of {}", self.kills, options.kills));
            // After one kill in three, the next one follows before the recovery.
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

    /// Waits until the controller answers and lists every node as online, every agent is connected,
    /// and packets flow. Otherwise returns the condition that was not met within the limit.
    fn recover(&mut self) -> anyhow::Result<Result<(), String>> {
        let asked = Instant::now();
        let mut missing = String::new();
        let back = wait_up_to(RECOVERY_LIMIT, || {
            match self.check(asked) {
                Ok(()) => return Ok(Some(())),
                Err(error) => missing = format!("{error:#}"),
            }
            interrupt::check()?;
            Ok(None)
        })?;
        Ok(back.ok_or(missing))
    }

    /// Checks the conditions of [`Self::recover`] once.
    fn check(&mut self, asked: Instant) -> anyhow::Result<()> {
        for node in &mut self.nodes {
            node.agent()?.check()?;
        }
        self.controller.daemon()?.check()?;
        let listed = self.controller.operator().nodes()?;
        for node in &self.nodes {
            let online = listed.iter().any(|entry| entry.name == node.name() && entry.online);
            anyhow::ensure!(online, "the controller does not list {} as online", node.name());
            let connected = node.status()?.controller.connected;
            anyhow::ensure!(connected, "{} is not connected to the controller", node.name());
        }
        for (ticker, worker) in self.tickers.iter().zip(&self.nodes[1..]) {
            let flows = ticker.last().is_some_and(|last| last > asked);
            anyhow::ensure!(flows, "no echo reply between {} and cp", worker.name());
        }
        Ok(())
    }

    /// Returns the longest time without an echo reply on any tunnel.
    fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        let gaps = self.tickers.iter().map(|ticker| ticker.longest_gap(from, to));
        gaps.max().unwrap_or_default()
    }
}

/// Sets the flag when it is dropped.
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
        let _ = write!(
            text,
            "  longest time without a reply while the controller was down {} ms",
            self.away_gap_ms
        );
        text
    }
}
