//! `cargo lab bench`: compares Towline with other userspace WireGuard implementations and with the
//! bare limit.
//!
//! Each subject has its own two hosts, joined by one cable. All subjects stay up for the whole run,
//! and are idle except for the one that is measured. A round runs each case with each subject. The
//! order of the subjects is reversed after every round, and ratios are made of figures of the same
//! round, so that a machine that gets slower during the run slows both.
//!
//! A window begins once the machine is idle, and is measured again if other programs ran in it ([`quiet`]).
//!
//! Three subjects are bounds: the cable without a tunnel, the bare limit without encryption, and the
//! bare limit. They are measured with each congestion control, because BBR reaches less than CUBIC on any
//! of them. Towline with its other WireGuard engine is a subject too.
//!
//! With `--against DIR`, the build of another checkout is a subject too, named `before`. For each
//! case the report has the median of the ratios with its confidence interval ([`interval`]). A ratio is
//! made of two rounds, so that either build is measured first once.

mod case;
mod contestant;
mod figures;
mod history;
mod interval;
pub mod limit;
mod load;
mod plot;
mod quiet;
mod subject;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;

pub use case::Case;
pub use contestant::PeerBinary;
pub use figures::Bench;

use super::Setting;
use crate::lab::binaries::Binaries;
use crate::lab::interrupt;
use crate::lab::privilege::Rank;
use crate::lab::process::peak_resident_mb;
use crate::lab::report::{Promises, Skipped, WrongUsage};
use crate::lab::topology::Lab;
use crate::lab::traffic::{Pattern, tcp_both_ways};
use contestant::gather;
use figures::Machine;
use load::Window;
use quiet::Watch;
use subject::Subject;

/// Command line options of the scenario.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Run each case this many times.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub rounds: Option<u16>,
    /// Run only these cases.
    #[arg(long = "case", num_args = 1.., value_delimiter = ',', value_enum)]
    pub cases: Vec<Case>,
    /// Measure only these subjects: towline, towline-batch, towline-boringtun, wireguard-go, gotatun,
    /// boringtun, tailscale, and the bounds limit, null, raw.
    #[arg(long = "subject", num_args = 1.., value_delimiter = ',')]
    pub subjects: Vec<String>,
    /// Compare with the release build of another checkout, the subject `before`. The other subjects
    /// are measured only if `--subject` lists them.
    #[arg(long, value_name = "DIR")]
    pub against: Option<PathBuf>,
    /// Use longer windows and more rounds, run every case with every subject, and check the order
    /// of 10 million datagrams.
    #[arg(long)]
    pub full: bool,
    /// Measure this program too, as the subject NAME. A name of another implementation replaces its
    /// program; any other program is started like wireguard-go.
    #[arg(long = "peer-binary", value_name = "NAME=PATH")]
    pub peer_binaries: Vec<PeerBinary>,
    /// Append the ratios and medians to this file, as one line of JSON.
    #[arg(long, value_name = "FILE")]
    pub history: Option<PathBuf>,
    /// Write a chart to this file, as SVG.
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
}

/// Bytes that are transferred and verified in each direction before a subject is measured.
const VERIFIED: u64 = 4_000_000;
/// Measurement window without `--full`.
const WINDOW: Window =
    Window { warm_up: Duration::from_millis(300), length: Duration::from_millis(1200) };
/// Measurement window with `--full`.
const FULL_WINDOW: Window =
    Window { warm_up: Duration::from_millis(500), length: Duration::from_secs(4) };
/// Number of datagrams whose order is checked.
const ORDERED: u64 = 1_000_000;
/// Number of datagrams whose order is checked with `--full`.
const FULL_ORDERED: u64 = 10_000_000;
/// Number of rounds.
const ROUNDS: u16 = 3;
/// Number of rounds with `--full`.
const FULL_ROUNDS: u16 = 7;

/// Name of the subject that is built from this checkout.
const NOW: &str = "towline";
/// Name of the subject that is built from another checkout.
const BEFORE: &str = "before";
/// Name of the subject of this checkout with the batch engine, where it would choose the other.
const NOW_BATCH: &str = "towline-batch";
/// Name of the subject of this checkout with the engine boringtun, where it would choose the other.
const NOW_BORINGTUN: &str = "towline-boringtun";

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Bench> {
    for (number, given) in options.peer_binaries.iter().enumerate() {
        let name = given.name();
        if options.peer_binaries.iter().take(number).any(|other| other.name() == name) {
            return Err(WrongUsage(format!("--peer-binary names {name} twice")).into());
        }
    }
    let mut bench = Bench {
        rootless: setting.rank == Rank::Rootless,
        machine: Machine::this()?,
        ..Bench::default()
    };
    let mut promises = Promises::new();
    let before = options.against.as_deref().map(Binaries::build_of).transpose()?;
    let mut lab = Lab::new(setting.rank)?;
    if let Err(error) =
        measure(setting, options, before.as_ref(), &mut lab, &mut bench, &mut promises)
    {
        promises.fail(format!("{error:#}"));
    }
    bench.compare();
    bench.compare_with_before();
    promises.hold(bench.reordered == 0, || {
        format!("no datagram is reordered: {} were", bench.reordered)
    });
    bench.failed = promises.into_failed();
    if let Some(path) = &options.history {
        history::append(&bench, path)?;
    }
    if let Some(path) = &options.plot {
        std::fs::write(path, plot::chart(&bench))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(bench)
}

/// Starts the subjects and runs all rounds.
fn measure(
    setting: &Setting,
    options: &Options,
    before: Option<&Binaries>,
    lab: &mut Lab,
    bench: &mut Bench,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    let cases: &[Case] = if options.cases.is_empty() { &Case::ALL } else { &options.cases };
    let mut contestants = gather(setting, options, before, cases, lab, bench)?;
    let pattern = Pattern::random()?;
    for contestant in &contestants {
        let (there, back) = (contestant.subject.there(false), contestant.subject.there(true));
        for way in [there, back] {
            tcp_both_ways(way.from, way.to, way.address, VERIFIED, pattern, |_| ())
                .with_context(|| contestant.name)?;
        }
    }
    let rounds = options.rounds.unwrap_or(if options.full { FULL_ROUNDS } else { ROUNDS });
    let window = if options.full { FULL_WINDOW } else { WINDOW };
    let mut broken: Vec<(Case, &str)> = Vec::new();
    let mut watch = Watch::default();
    for round in 0..rounds {
        for case in cases {
            for contestant in &contestants {
                let Some(subject) = contestant.for_case(*case) else { continue };
                if broken.contains(&(*case, contestant.name)) {
                    continue;
                }
                interrupt::check()?;
                setting.output.step(&format!(
                    "round {} of {rounds}: {} with {}",
                    round + 1,
                    case.what(),
                    contestant.name
                ));
                match watch.measure(|| case.run(subject, window, pattern)) {
                    Ok(outcome) => {
                        bench.add(*case, contestant.name, outcome.value, outcome.cpu);
                        if contestant.name == NOW {
                            bench.reordered += outcome.carried.reordered;
                            bench.ordered_datagrams += outcome.carried.arrived;
                        }
                    }
                    Err(error) => {
                        interrupt::check()?;
                        broken.push((*case, contestant.name));
                        let (name, why) =
                            (format!("{}/{}", case.name(), contestant.name), format!("{error:#}"));
                        // A failure of another subject is reported as skipped. A failure of Towline
                        // is a fault.
                        if contestant.name == NOW && !case.is_optional() {
                            promises.fail(format!("{name}: {why}"));
                        } else {
                            bench.skipped.push(Skipped { name, why });
                        }
                    }
                }
            }
        }
        bench.rounds += 1;
        contestants.reverse();
    }
    bench.quiet = watch.into_quiet();
    let now = contestants.iter().find(|contestant| contestant.name == NOW);
    if let Some(now) = now.filter(|_| ordered(options)) {
        if let Some(shared) = &now.shared {
            watch_order(setting, options, shared, "two workers", bench)?;
        }
        if let Some(ahead) = &now.ahead {
            watch_order(setting, options, ahead, "two helpers", bench)?;
            let sealed = ahead.sealed_ahead()?;
            bench.sealed_ahead = Some(sealed);
            promises.hold(sealed > 0, || "helpers encrypt batches: they did nothing".to_owned());
        }
    }
    for contestant in contestants.iter().filter(|one| !one.subject.daemons.is_empty()) {
        let peaks = contestant
            .subject
            .daemons
            .iter()
            .map(|pid| peak_resident_mb(*pid))
            .collect::<anyhow::Result<Vec<_>>>()?;
        bench.rss_mb.insert(contestant.name, peaks.iter().copied().fold(0.0, f64::max).round());
    }
    Ok(())
}

/// Returns whether the order of datagrams is checked in addition to the cases.
fn ordered(options: &Options) -> bool {
    options.cases.is_empty() || options.full
}

/// Checks the order of datagrams in four flows between two agents. `threads` says what they have more
/// than one of. The receivers answer all the time.
fn watch_order(
    setting: &Setting,
    options: &Options,
    subject: &Subject,
    threads: &str,
    bench: &mut Bench,
) -> anyhow::Result<()> {
    let datagrams = if options.full { FULL_ORDERED } else { ORDERED };
    setting.output.step(&format!("checking the order of {datagrams} datagrams with {threads}"));
    let each = [false, true].map(|v6| [subject.there(v6), subject.back(v6)]);
    let carried = load::order(each.as_flattened(), datagrams)?;
    bench.reordered += carried.reordered;
    bench.ordered_datagrams += carried.arrived;
    Ok(())
}
