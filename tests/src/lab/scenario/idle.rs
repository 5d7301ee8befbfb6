//! `cargo lab idle`: measures the memory and processor time that agents and controller use while
//! nothing happens.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::Setting;
use super::hybrid::{Hybrid, Mesh};
use crate::lab::interrupt::sleep;
use crate::lab::mesh::{START_LIMIT, await_tunnel};
use crate::lab::privilege::Rank;
use crate::lab::process::{processor_time, resident_mb};
use crate::lab::report::{Figures, Promises, round};

/// Results of one run, for an idle mesh of three nodes.
#[derive(Debug, Default, Serialize)]
pub struct Idle {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Number of nodes in the mesh.
    pub nodes: usize,
    /// Length of the measurement in seconds.
    pub window_s: f64,
    /// Resident memory of the largest agent, in megabytes.
    pub agent_rss_mb: f64,
    /// Processor time of the busiest agent, in percent of a core.
    pub agent_cpu_pct: f64,
    /// Resident memory of the controller, in megabytes.
    pub controller_rss_mb: f64,
    /// Processor time of the controller, in percent of a core.
    pub controller_cpu_pct: f64,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Pause between the tunnels coming up and the measurement, so that work of the start is not
/// counted.
const SETTLE: Duration = Duration::from_secs(10);
/// Length of the measurement.
const WINDOW: Duration = Duration::from_secs(30);
/// Upper bound of [`Idle::agent_rss_mb`].
const AGENT_RSS_MB: f64 = 30.0;
/// Upper bound of [`Idle::agent_cpu_pct`].
const AGENT_CPU_PCT: f64 = 0.5;
/// Upper bound of [`Idle::controller_rss_mb`].
const CONTROLLER_RSS_MB: f64 = 50.0;

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting) -> anyhow::Result<Idle> {
    let hybrid = Hybrid::build(setting)?;
    let mut idle = Idle { rootless: setting.rank == Rank::Rootless, ..Idle::default() };
    idle.failed = Promises::broken_by(|promises| idle.measure(setting, &hybrid, promises));
    Ok(idle)
}

impl Idle {
    /// Starts the mesh, waits until it is idle, and measures its programs.
    fn measure(
        &mut self,
        setting: &Setting,
        hybrid: &Hybrid,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let Mesh { mut controller, mut nodes } = hybrid.bring_up(setting)?;
        self.nodes = nodes.len();
        setting.output.step("waiting for the tunnels");
        for worker in &nodes[1..] {
            if let Some(reason) = await_tunnel(worker, &nodes[0], START_LIMIT)? {
                promises.fail(format!("tunnel {}/cp comes up: {reason}", worker.name()));
            }
        }
        setting.output.step("waiting until the nodes are idle");
        sleep(SETTLE)?;
        setting.output.step(&format!("measuring for {} s", WINDOW.as_secs()));
        let controller = controller.daemon()?.pid();
        let agents = nodes
            .iter_mut()
            .map(|node| Ok(node.agent()?.pid()))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let everyone = || std::iter::once(controller).chain(agents.iter().copied());
        let begun = Instant::now();
        let before = everyone().map(processor_time).collect::<anyhow::Result<Vec<_>>>()?;
        sleep(WINDOW)?;
        let window = begun.elapsed().as_secs_f64();
        let after = everyone().map(processor_time).collect::<anyhow::Result<Vec<_>>>()?;
        let percent: Vec<f64> = before
            .iter()
            .zip(&after)
            .map(|(before, after)| (*after - *before).as_secs_f64() / window * 100.0)
            .collect();
        let memory = everyone().map(resident_mb).collect::<anyhow::Result<Vec<_>>>()?;
        let largest = |figures: &[f64]| round(figures.iter().copied().fold(0.0, f64::max));
        self.window_s = round(window);
        self.controller_cpu_pct = round(percent[0]);
        self.controller_rss_mb = round(memory[0]);
        self.agent_cpu_pct = largest(&percent[1..]);
        self.agent_rss_mb = largest(&memory[1..]);
        for (what, figure, limit) in [
            ("agent_rss_mb", self.agent_rss_mb, AGENT_RSS_MB),
            ("agent_cpu_pct", self.agent_cpu_pct, AGENT_CPU_PCT),
            ("controller_rss_mb", self.controller_rss_mb, CONTROLLER_RSS_MB),
        ] {
            promises.hold(figure < limit, || format!("{what} below {limit}: {figure}"));
        }
        Ok(())
    }
}

impl Figures for Idle {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "{} nodes, idle for {} s:", self.nodes, self.window_s);
        let _ = writeln!(
            text,
            "  largest agent {} MB resident, busiest {} % of a core",
            self.agent_rss_mb, self.agent_cpu_pct
        );
        let _ = write!(
            text,
            "  controller {} MB resident, {} % of a core",
            self.controller_rss_mb, self.controller_cpu_pct
        );
        text
    }
}
