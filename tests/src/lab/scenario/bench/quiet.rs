//! Watches that other programs leave the machine alone while something is measured.
//!
//! Before a window the machine must be idle, since every subject is. In a window the processor time of other
//! programs, and what the hypervisor took away, must be small; otherwise the window is measured again. Both are
//! bounded: on a machine that is never quiet the figures come all the same, and the report says so.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::unistd::{Pid, SysconfVar, sysconf};
use serde::Serialize;

use crate::lab::interrupt::sleep;
use crate::lab::report::round;

/// Least share of the machine that must be idle before a window.
const IDLE: f64 = 0.9;
/// Time for which the machine is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Longest time that a run waits for an idle machine, in all.
const PATIENCE: Duration = Duration::from_secs(600);
/// Largest share of the machine that others may use in a window.
const OTHERS: f64 = 0.02;
/// Number of times that a window is measured before its figure is taken as it is.
const ATTEMPTS: u32 = 4;

/// What the machine did beside the benchmark.
#[derive(Debug, Default, Serialize)]
pub struct Quiet {
    /// Time in seconds that the run waited for an idle machine.
    pub waited_s: f64,
    /// Least share of the machine that was idle right before a window. `None` without windows.
    pub least_idle: Option<f64>,
    /// Largest share of the machine that other programs used in a window whose figure counts. `None`
    /// without windows.
    pub most_others: Option<f64>,
    /// Number of windows that began while the machine was not idle, since the patience was used up.
    pub begun_busy: u32,
    /// Number of windows that were measured again because other programs ran in them.
    pub repeated: u32,
    /// Number of windows whose figure counts although other programs ran in them each time.
    pub disturbed: u32,
}

/// Looks at the machine before and after each window.
#[derive(Debug, Default)]
pub(super) struct Watch {
    waited: Duration,
    quiet: Quiet,
}

impl Watch {
    /// Runs a window once the machine is idle, and again while other programs disturb it.
    pub(super) fn measure<T>(
        &mut self,
        mut window: impl FnMut() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let mut attempt = 1;
        loop {
            self.await_idle()?;
            let begin = Sample::take()?;
            let outcome = window()?;
            let others = Sample::take()?.others_since(&begin);
            if others <= OTHERS || attempt == ATTEMPTS {
                self.quiet.disturbed += u32::from(others > OTHERS);
                let most = self.quiet.most_others.unwrap_or_default();
                self.quiet.most_others = Some(round(others).max(most));
                return Ok(outcome);
            }
            self.quiet.repeated += 1;
            attempt += 1;
        }
    }

    /// Returns what the machine did.
    pub(super) fn into_quiet(self) -> Quiet {
        Quiet { waited_s: round(self.waited.as_secs_f64()), ..self.quiet }
    }

    fn await_idle(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let begin = Ticks::read()?;
            sleep(LOOK)?;
            let idle = Ticks::read()?.idle_since(&begin);
            let is_idle = idle >= IDLE;
            if is_idle || self.waited + began.elapsed() >= PATIENCE {
                self.quiet.begun_busy += u32::from(!is_idle);
                let least = self.quiet.least_idle.unwrap_or(1.0);
                self.quiet.least_idle = Some(round(idle).min(least));
                break;
            }
        }
        // One look is no wait.
        self.waited += began.elapsed().saturating_sub(LOOK * 2);
        Ok(())
    }
}

/// Clock ticks of all processors since the boot, from `/proc/stat`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Ticks {
    all: u64,
    idle: u64,
    /// Taken by the hypervisor for other machines.
    stolen: u64,
}

impl Ticks {
    pub(super) fn read() -> anyhow::Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        Self::parse(&text).context("/proc/stat has no line of all processors")
    }

    /// Parses the line `cpu`: user, nice, system, idle, iowait, irq, softirq, steal, and guest times that
    /// are part of the first two.
    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let ticks: Vec<u64> =
            line.split_whitespace().map_while(|word| word.parse().ok()).take(8).collect();
        let at = |index: usize| ticks.get(index).copied();
        Some(Self {
            all: ticks.iter().sum(),
            idle: at(3)? + at(4)?,
            stolen: at(7).unwrap_or_default(),
        })
    }

    fn idle_since(&self, begin: &Self) -> f64 {
        let all = self.all.saturating_sub(begin.all).max(1);
        self.idle.saturating_sub(begin.idle) as f64 / all as f64
    }

    /// Returns the processor time in seconds that the machine worked, in all programs and the kernel.
    pub(super) fn worked_since(&self, begin: &Self) -> f64 {
        let worked = |ticks: &Self| ticks.all.saturating_sub(ticks.idle + ticks.stolen);
        worked(self).saturating_sub(worked(begin)) as f64 / ticks_per_second()
    }
}

/// Returns the number of clock ticks of a second of processor time.
fn ticks_per_second() -> f64 {
    sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64
}

/// A process: its parent, and the clock ticks of it and of its children that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    parent: i32,
    ticks: u64,
}

impl Process {
    /// Parses `/proc/PID/stat` (proc_pid_stat(5)). The name may contain spaces and parentheses.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
        let ticks = [11, 12, 13, 14].into_iter().map(number).sum::<Option<u64>>()?;
        Some(Self { parent: fields.get(1)?.parse().ok()?, ticks })
    }
}

/// The machine at one moment.
#[derive(Debug)]
struct Sample {
    at: Instant,
    stolen: u64,
    /// Ticks of the processes that do not belong to the benchmark.
    others: u64,
}

impl Sample {
    fn take() -> anyhow::Result<Self> {
        let stolen = Ticks::read()?.stolen;
        let mut processes = BTreeMap::new();
        for entry in fs::read_dir("/proc").context("cannot read /proc")? {
            let name = entry.context("cannot read /proc")?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            // A process may end at any time. Its parent then has its ticks.
            let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if let Some(process) = Process::parse(&text) {
                processes.insert(pid, process);
            }
        }
        let others = others(&processes, Pid::this().as_raw());
        Ok(Self { at: Instant::now(), stolen, others })
    }

    /// Returns the share of the machine that others used.
    fn others_since(&self, begin: &Self) -> f64 {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let used =
            self.others.saturating_sub(begin.others) + self.stolen.saturating_sub(begin.stolen);
        let length = self.at.duration_since(begin.at).as_secs_f64();
        used as f64 / (ticks_per_second() * cores as f64 * length).max(1.0)
    }
}

/// Returns the ticks of all processes but this one with its descendants, and the kernel's own threads, which work
/// for the benchmark.
fn others(processes: &BTreeMap<i32, Process>, own: i32) -> u64 {
    /// Parent of the kernel's threads.
    const KTHREADD: i32 = 2;
    let belongs = |pid: i32| {
        let mut at = pid;
        // Ancestors form no circle, but the table is not read at one moment.
        for _ in 0..processes.len() {
            if at == own || at == KTHREADD {
                return true;
            }
            let Some(process) = processes.get(&at) else { return false };
            at = process.parent;
        }
        false
    };
    let others = processes.iter().filter(|(pid, _)| !belongs(**pid));
    others.map(|(_, process)| process.ticks).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_read_from_the_line_of_all_processors() {
        let text = "cpu  10 1 5 70 4 0 2 8 3 0\ncpu0 5 0 2 35 2 0 1 4 1 0\n";
        let ticks = Ticks::parse(text).unwrap();
        assert_eq!(ticks, Ticks { all: 100, idle: 74, stolen: 8 });
        let later = Ticks { all: 200, idle: 164, stolen: 8 };
        assert_eq!(later.idle_since(&ticks), 0.9);
        assert_eq!(later.worked_since(&ticks), 10.0 / ticks_per_second());
        assert_eq!(Ticks::parse("intr 1 2\n"), None);
        assert_eq!(Ticks::parse("cpu  1 2\n"), None);
    }

    #[test]
    fn a_name_with_parentheses_is_no_field() {
        let text = "7 (a) R 9 (b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 30 40 20 0 1 0 100";
        assert_eq!(Process::parse(text), Some(Process { parent: 1, ticks: 81 }));
        assert_eq!(Process::parse("7 (a) S 1"), None);
        assert_eq!(Process::parse(""), None);
    }

    #[test]
    fn the_benchmark_its_children_and_the_kernel_are_not_others() {
        let process = |parent, ticks| Process { parent, ticks };
        let processes = BTreeMap::from([
            (1, process(0, 1)),
            (2, process(0, 10)),
            (3, process(2, 100)),
            (50, process(1, 1_000)),
            (51, process(50, 10_000)),
            (52, process(51, 100_000)),
            (60, process(1, 1_000_000)),
        ]);
        assert_eq!(others(&processes, 50), 1_000_001);
    }
}
