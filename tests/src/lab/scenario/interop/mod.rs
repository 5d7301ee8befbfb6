//! `cargo lab interop`: tests Towline with other WireGuard implementations as plain peers, without
//! a controller.
//!
//! Every implementation runs the same cases ([`cases`]), each in its own lab, with each of Towline's
//! WireGuard engines. The re-key cases take two minutes of real time, because the clocks of the other
//! implementations cannot be changed. The other cases run during that time.

mod cases;
pub(super) mod flood;
mod pair;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use clap::builder::PossibleValuesParser;
use serde::Serialize;
use towline_wireguard::{Aead, Engine, EngineChoice};

use super::Setting;
use crate::lab::interrupt;
use crate::lab::peers::{Installed, WireGuard};
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Forbidden, Skipped, round};
use cases::{CASES, Judge, Outcome};
use pair::Opponent;

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Interop {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Towline's WireGuard engine in [`Self::peers`], as it was configured.
    pub engine: String,
    /// Version of each implementation, by its name.
    pub versions: BTreeMap<&'static str, String>,
    /// Results by implementation and case.
    pub peers: Peers,
    /// Results with the other engine, by its name.
    pub further_engines: BTreeMap<&'static str, Peers>,
    /// Implementations and cases that could not run.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Results by implementation and case.
pub type Peers = BTreeMap<&'static str, BTreeMap<&'static str, Case>>;

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
    /// WireGuard engine of Towline. `both`: one after the other.
    #[arg(long, value_enum, default_value_t = Engines::Both)]
    pub engine: Engines,
}

/// WireGuard engines of Towline to run the cases with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Engines {
    /// The engine that Towline chooses on this machine.
    Auto,
    /// The batch engine.
    Batch,
    /// The engine on boringtun.
    Boringtun,
    /// Both engines, that which Towline chooses first.
    Both,
}

impl Engines {
    /// Returns the engines in the order of their runs, as the configuration names them.
    fn names(self) -> Vec<&'static str> {
        match self {
            Self::Auto => vec!["auto"],
            Self::Batch => vec!["batch"],
            Self::Boringtun => vec!["boringtun"],
            Self::Both => match Engine::select(EngineChoice::Auto, Aead::Auto).name() {
                "batch" => vec!["batch", "boringtun"],
                _ => vec!["boringtun", "batch"],
            },
        }
    }
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
    let engines = engine.names();
    let mut interop = Interop { rootless: setting.rank == Rank::Rootless, ..Interop::default() };
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
    let cases: Vec<_> = CASES.into_iter().filter(|(name, _)| chosen(name, &case_names)).collect();
    for engine in engines {
        setting.output.step(&format!(
            "running all cases with the engine {engine}, each in its own lab (about three minutes)"
        ));
        interop.meet(setting, &programs, engine, &cases)?;
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
            Ok(_) => format!("{which}: {name} with {} done", opponent.engine),
            Err(error) => format!("{which}: {name} with {}: {error:#}", opponent.engine),
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
    /// Runs the cases with one engine of Towline, and records their results.
    fn meet(
        &mut self,
        setting: &Setting,
        programs: &[Installed],
        engine: &'static str,
        cases: &[(&'static str, Judge)],
    ) -> anyhow::Result<()> {
        let tried = std::thread::scope(|scope| {
            let threads: Vec<_> = programs
                .iter()
                .map(|program| {
                    let opponent = Opponent { program, engine };
                    (program, scope.spawn(move || try_all(setting, &opponent, cases)))
                })
                .collect();
            let results = threads
                .into_iter()
                .map(|(program, thread)| (program, thread.join().unwrap_or_else(|_| Vec::new())));
            results.collect::<Vec<_>>()
        });
        interrupt::check()?;
        if self.engine.is_empty() {
            self.engine = engine.to_owned();
        }
        for (program, results) in tried {
            let which = program.which.name();
            self.versions.insert(which, program.version.clone());
            if results.len() < cases.len() {
                self.failed.push(format!("{which} with {engine}: a thread of the lab panicked"));
            }
            for (name, took_s, result) in results {
                self.note(engine, which, name, took_s, result);
            }
        }
        Ok(())
    }

    /// Records the result of a case.
    fn note(
        &mut self,
        engine: &'static str,
        which: &'static str,
        name: &'static str,
        took_s: f64,
        result: anyhow::Result<Outcome>,
    ) {
        let (ok, why, figures) = match result {
            Ok(Outcome::Held(figures)) => (true, None, figures),
            Ok(Outcome::Impossible(why)) => {
                let name = format!("{which}/{name}");
                if !self.skipped.iter().any(|skipped| skipped.name == name) {
                    self.skipped.push(Skipped { name, why });
                }
                return;
            }
            Err(error) => (false, Some(format!("{error:#}")), BTreeMap::new()),
        };
        if let Some(why) = &why {
            self.failed.push(format!("{which}/{name} with {engine}: {why}"));
        }
        let peers = if self.engine == engine {
            &mut self.peers
        } else {
            self.further_engines.entry(engine).or_default()
        };
        peers.entry(which).or_default().insert(name, Case { ok, why, took_s, figures });
    }
}

impl Figures for Interop {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        let further = self.further_engines.iter().map(|(engine, peers)| (*engine, peers));
        let engines = [(self.engine.as_str(), &self.peers)].into_iter().chain(further);
        let each = engines.flat_map(|(engine, peers)| peers.iter().map(move |peer| (engine, peer)));
        for (engine, (which, cases)) in each {
            let version = self.versions.get(which).map_or("", String::as_str);
            let _ = writeln!(text, "{which} {version}, engine {engine}:");
            for (name, case) in cases {
                let ok = if case.ok { "ok" } else { "FAILED" };
                let _ = write!(text, "  {name:<24}{ok:<8}{:>6.1} s", case.took_s);
                for (figure, value) in &case.figures {
                    let _ = write!(text, "  {figure} {value}");
                }
                text.push('\n');
            }
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "{skipped}");
        }
        text.trim_end().to_owned()
    }
}
