//! `cargo lab scale`: measures one controller with thousands of connected agents.
//!
//! The controller is the real binary, with its store in a file or in three members of etcd. The agents are light: they
//! join, watch and publish with the agent's own client code over TLS, from addresses all over 127.0.0.0/8, but keep no
//! map. Each change that is measured carries a number, and each light agent reports when it has received it.
//!
//! | file | owns |
//! |---|---|
//! | `run.rs` | one run: what is measured, with one store and one number of agents |
//! | `light_agent.rs` | one light agent: its session and what it reports |
//! | `hardware.rs` | the description of this machine |
//! | `plot.rs` | the chart of all runs |
//! | `document.rs` | the figures in `docs/scale.md` |

mod document;
mod hardware;
mod light_agent;
mod plot;
mod run;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Serialize;

use super::Setting;
use crate::lab::interrupt;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, WrongUsage};

use hardware::Hardware;
use run::Run;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    /// Number of agents; with several numbers, one run for each
    #[arg(
        long,
        value_name = "N",
        num_args = 1..,
        value_delimiter = ',',
        default_value = "1000",
        value_parser = RangedU64ValueParser::<usize>::new().range(20..=10_000)
    )]
    agents: Vec<usize>,
    /// Store of the controller; with several ones, all runs for each
    #[arg(long = "store", num_args = 1.., value_delimiter = ',', value_enum, default_value = "redb")]
    stores: Vec<StoreKind>,
    /// Offer changes for 60 s instead of 10 s
    #[arg(long)]
    full: bool,
    /// Build the daemons with the dev profile: the figures are then those of a slower program
    #[arg(long)]
    pub dev: bool,
    /// Write a chart of all runs to this file, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Write the figures into docs/scale.md, with --full only
    #[arg(long)]
    update_docs: bool,
}

/// Store of a controller.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// A file beside the CA's key.
    #[default]
    Redb,
    /// Three members of etcd on this machine.
    Etcd,
}

impl StoreKind {
    /// Returns the name, as in options and figures.
    fn name(self) -> &'static str {
        match self {
            Self::Redb => "redb",
            Self::Etcd => "etcd",
        }
    }
}

/// Results.
#[derive(Debug, Default, Serialize)]
pub struct Scale {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// True if the controller is a release build.
    pub release: bool,
    /// True if changes were offered for 60 s.
    pub full: bool,
    /// Number of processors of the machine.
    pub cores: usize,
    /// Description of the machine.
    pub machine: Hardware,
    /// Figures of the run with the most agents on the first store.
    #[serde(flatten)]
    pub largest: Run,
    /// Figures of all runs, in the order in which they were measured.
    pub runs: Vec<Run>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

impl Options {
    /// Fails if the document would get figures that cannot be compared.
    pub fn check(&self) -> Result<(), WrongUsage> {
        if self.update_docs && (!self.full || self.dev) {
            let message = "--update-docs is about the long form with release builds: add --full, leave --dev out";
            return Err(WrongUsage(message.to_owned()));
        }
        Ok(())
    }
}

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Scale> {
    let machine = Hardware::read()?;
    let mut figures = Scale {
        rootless: setting.rank == Rank::Rootless,
        release: !options.dev,
        full: options.full,
        cores: machine.cores,
        machine,
        ..Scale::default()
    };
    let mut promises = Promises::new();
    for store in &options.stores {
        for agents in &options.agents {
            setting.output.step(&format!("{agents} agents, store {}", store.name()));
            let mut run = Run { store: *store, agents: *agents, ..Run::default() };
            if let Err(error) = run.measure(setting, options) {
                promises.fail(format!("{agents} agents on {}: {error:#}", store.name()));
            }
            figures.runs.push(run);
            interrupt::check()?;
        }
    }
    let on_first = figures.runs.iter().filter(|run| Some(&run.store) == options.stores.first());
    figures.largest = on_first.max_by_key(|run| run.agents).cloned().unwrap_or_default();
    figures.failed = promises.into_failed();
    let write = || {
        if options.update_docs { document::write(&figures) } else { Ok(()) }
    };
    let is_written = write_results(&figures, options.plot.as_deref(), write)?;
    if !is_written && (options.plot.is_some() || options.update_docs) {
        setting.output.step("a run failed: chart and document are not written");
    }
    Ok(figures)
}

/// Writes the chart to `plot`, and the document. Writes neither and returns false if a run failed: its figures are
/// incomplete, and would replace complete ones.
fn write_results(
    figures: &Scale,
    plot: Option<&Path>,
    write_document: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<bool> {
    if !figures.failed.is_empty() {
        return Ok(false);
    }
    if let Some(path) = plot {
        std::fs::write(path, plot::chart(figures))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    write_document()?;
    Ok(true)
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

impl Figures for Scale {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let lines = self.runs.iter().flat_map(|run| {
            [
                format!(
                    "{} agents on {} cores, store {}:",
                    run.agents,
                    self.cores,
                    run.store.name()
                ),
                format!(
                    "  {} joins/s without watches, {} joins/s with; whole map in {} s",
                    run.enrol_per_s, run.enrol_watched_per_s, run.snapshot_s
                ),
                format!(
                    "  a change at all agents: median {} ms, p99 {} ms; at {} changes/s p99 {} ms",
                    run.delta_p50_ms, run.delta_p99_ms, run.deltas_per_s, run.load_p99_ms
                ),
                format!(
                    "  controller {} MB, idle {} % of a core; all connected again in {} s",
                    run.rss_mb, run.cpu_idle_pct, run.reconnect_all_s
                ),
            ]
        });
        std::iter::once(self.machine.to_string()).chain(lines).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(line: &str) -> Options {
        let words = std::iter::once("scale").chain(line.split_whitespace());
        Line::try_parse_from(words).expect(line).options
    }

    #[test]
    fn one_command_measures_all_sizes_on_both_stores() {
        let all = options("--agents 1000,3000,10000 --store redb,etcd --full --update-docs");
        assert_eq!(all.agents, [1000, 3000, 10_000]);
        assert_eq!(all.stores, [StoreKind::Redb, StoreKind::Etcd]);
        assert!(all.check().is_ok());
        let short = options("");
        assert_eq!((short.agents, short.stores), (vec![1000], vec![StoreKind::Redb]));
        assert!(options("--update-docs").check().is_err());
    }

    #[test]
    fn figures_of_a_run_that_failed_replace_no_others() {
        let directory = tempfile::tempdir().unwrap();
        let chart = directory.path().join("chart.svg");
        let mut documents = 0;
        let mut write = |figures: &Scale| {
            let document = || {
                documents += 1;
                Ok(())
            };
            write_results(figures, Some(&chart), document).unwrap()
        };
        let failed = Scale { failed: vec!["no agent joined".to_owned()], ..Scale::default() };
        assert!(!write(&failed));
        assert!(!chart.exists());
        assert!(write(&Scale::default()));
        assert!(chart.exists());
        assert_eq!(documents, 1);
    }

    #[test]
    fn the_keys_of_the_largest_run_are_those_of_the_object() {
        let run = Run { agents: 3000, rss_mb: 12.5, ..Run::default() };
        let figures = Scale { largest: run.clone(), runs: vec![run], ..Scale::default() };
        let json = serde_json::to_value(&figures).unwrap();
        assert_eq!(json["agents"], 3000);
        assert_eq!(json["runs"][0]["rss_mb"], 12.5);
        assert_eq!(json["runs"][0]["store"], "redb");
        for key in [
            "enrol_per_s",
            "enrol_watched_per_s",
            "snapshot_s",
            "delta_p50_ms",
            "delta_p99_ms",
            "deltas_per_s",
            "rss_mb",
            "cpu_idle_pct",
            "clients_cpu_idle_pct",
            "reconnect_all_s",
        ] {
            assert!(json[key].is_number(), "{key}");
        }
    }
}
