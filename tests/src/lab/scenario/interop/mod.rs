//! `cargo lab interop`: tests Towline with other WireGuard implementations as plain peers, without
//! a controller.
//!
//! Every implementation runs the same cases ([`cases`]), each in its own lab. The re-key cases take
//! two minutes of real time, because the clocks of the other implementations cannot be changed. The
//! other cases run during that time.

mod cases;
pub(super) mod flood;
mod pair;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use clap::builder::PossibleValuesParser;
use serde::Serialize;

use super::Setting;
use crate::lab::interrupt;
use crate::lab::peers::WireGuard;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Forbidden, Skipped, round};
use cases::{CASES, Judge, Outcome};
use pair::Opponent;

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Interop {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Towline's WireGuard engine, as it was configured.
    pub engine: String,
    /// Version of each implementation, by its name.
    pub versions: BTreeMap<&'static str, String>,
    /// Results by implementation and case.
    pub peers: BTreeMap<&'static str, BTreeMap<&'static str, Case>>,
    /// Implementations and cases that could not run.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Result of one case.
#[derive(Debug, Serialize)]
pub struct Case {
    /// True if all promises of the case held.
    pub ok: bool,
    /// Promise that did not hold. Absent if all held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Duration of the case in seconds.
    pub took_s: f64,
    /// Figures that the case measured, by name.
    #[serde(flatten)]
    pub figures: BTreeMap<&'static str, f64>,
}

/// Command line options of the scenario.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Run only these implementations and cases.
    #[arg(value_parser = PossibleValuesParser::new(names()))]
    pub only: Vec<String>,
    /// WireGuard engine of Towline.
    #[arg(long, default_value = "auto", value_parser = ["auto", "batch", "boringtun"])]
    pub engine: String,
}

/// Returns the names of all implementations and cases.
fn names() -> Vec<&'static str> {
    let cases = CASES.into_iter().map(|(name, _)| name);
    WireGuard::ALL.map(WireGuard::name).into_iter().chain(cases).collect()
}

/// Directory of the UAPI sockets of all other implementations.
const SOCKETS: &str = "/var/run/wireguard";

/// Runs the scenario.
///
/// # Errors
/// Returns [`Forbidden`] if the other implementations cannot create their sockets.
pub fn run(setting: &Setting, Options { only, engine }: &Options) -> anyhow::Result<Interop> {
    std::fs::create_dir_all(SOCKETS).and_then(|()| tempfile::tempfile_in(SOCKETS)).map_err(
        |error| Forbidden {
            what: format!(
                "cannot create the sockets of other WireGuard implementations in {SOCKETS}: {error}"
            ),
            remedy: "run as root".into(),
        },
    )?;
    let (rootless, engine) = (setting.rank == Rank::Rootless, engine.as_str());
    let mut interop = Interop { rootless, engine: engine.into(), ..Interop::default() };
    let chosen = |name: &str, among: &[&str]| {
        let named = only.iter().any(|only| among.contains(&only.as_str()));
        !named || only.iter().any(|only| only == name)
    };
    let implementations = WireGuard::ALL.map(WireGuard::name);
    let case_names = CASES.map(|(name, _)| name);
    let mut programs = Vec::new();
    for which in WireGuard::ALL.into_iter().filter(|which| chosen(which.name(), &implementations)) {
        match which.install() {
            Ok(program) => programs.push(program),
            Err(why) => interop.skipped.push(Skipped { name: which.name().into(), why }),
        }
    }
    setting.output.step("running all cases, each in its own lab (about three minutes)");
    let cases: Vec<_> = CASES.into_iter().filter(|(name, _)| chosen(name, &case_names)).collect();
    let tried = std::thread::scope(|scope| {
        let threads: Vec<_> = programs
            .iter()
            .map(|program| {
                let opponent = Opponent { program, engine };
                let cases = &cases;
                (program, scope.spawn(move || try_all(setting, &opponent, cases)))
            })
            .collect();
        let results = threads
            .into_iter()
            .map(|(program, thread)| (program, thread.join().unwrap_or_else(|_| Vec::new())));
        results.collect::<Vec<_>>()
    });
    interrupt::check()?;
    for (program, results) in tried {
        let which = program.which.name();
        interop.versions.insert(which, program.version.clone());
        if results.len() < cases.len() {
            interop.failed.push(format!("{which}: a thread of the lab panicked"));
        }
        for (name, took_s, result) in results {
            interop.note(which, name, took_s, result);
        }
    }
    Ok(interop)
}

/// A case that ran: its name, its duration in seconds, and its outcome.
type Tried = (&'static str, f64, anyhow::Result<Outcome>);

/// Runs the re-key cases in parallel, because they take long, and meanwhile the other cases one
/// after another.
fn try_all(
    setting: &Setting,
    opponent: &Opponent<'_>,
    cases: &[(&'static str, Judge)],
) -> Vec<Tried> {
    let one = |(name, judge): &(&'static str, Judge)| -> Tried {
        let begun = Instant::now();
        let result = judge(setting, opponent);
        let which = opponent.program.which.name();
        setting.output.note(&match &result {
            Ok(_) => format!("{which}: {name} done"),
            Err(error) => format!("{which}: {name}: {error:#}"),
        });
        (name, round(begun.elapsed().as_secs_f64()), result)
    };
    let (long, short): (Vec<_>, Vec<_>) =
        cases.iter().partition(|(name, _)| name.starts_with("rekey"));
    std::thread::scope(|scope| {
        let long: Vec<_> = long.into_iter().map(|case| scope.spawn(move || one(case))).collect();
        let mut tried: Vec<Tried> = short.into_iter().map(one).collect();
        tried.extend(long.into_iter().filter_map(|thread| thread.join().ok()));
        tried
    })
}

impl Interop {
    /// Records the result of a case.
    fn note(
        &mut self,
        which: &'static str,
        name: &'static str,
        took_s: f64,
        result: anyhow::Result<Outcome>,
    ) {
        let (ok, why, figures) = match result {
            Ok(Outcome::Held(figures)) => (true, None, figures),
            Ok(Outcome::Impossible(why)) => {
                self.skipped.push(Skipped { name: format!("{which}/{name}"), why });
                return;
            }
            Err(error) => (false, Some(format!("{error:#}")), BTreeMap::new()),
        };
        if let Some(why) = &why {
            self.failed.push(format!("{which}/{name}: {why}"));
        }
        self.peers.entry(which).or_default().insert(name, Case { ok, why, took_s, figures });
    }
}

impl Figures for Interop {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for (which, cases) in &self.peers {
            let version = self.versions.get(which).map_or("", String::as_str);
            let _ = writeln!(text, "{which} {version}:");
            for (name, case) in cases {
                let ok = if case.ok { "ok" } else { "FAILED" };
                let _ = write!(text, "  {name:<24}{ok:<8}{:>6.1} s", case.took_s);
                for (figure, value) in &case.figures {
                    let _ = write!(text, "  {figure} {value}");
                }
                text.push('\n');
            }
        }
        for Skipped { name, why } in &self.skipped {
            let _ = writeln!(text, "{name} skipped: {why}");
        }
        text.trim_end().to_owned()
    }
}
