//! `cargo lab interop`: Towline with every other WireGuard as a plain peer, without a controller.
//!
//! Each implementation goes through the same cases ([`cases`]), each in a lab of its own. The
//! re-keys take two minutes of real time, since none of the others lets its clock be shortened; all
//! else happens meanwhile.

mod cases;
mod flood;
mod pair;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use serde::Serialize;

use super::Setting;
use crate::lab::interrupt;
use crate::lab::peers::{Installed, WireGuard};
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Forbidden, round};
use cases::{CASES, Judge, Outcome};

/// How Towline and the others got along.
#[derive(Debug, Default, Serialize)]
pub struct Interop {
    /// The lab ran without root's rights over the machine.
    pub rootless: bool,
    /// Which version of each implementation it was.
    pub versions: BTreeMap<&'static str, String>,
    /// Implementation, then case.
    pub peers: BTreeMap<&'static str, BTreeMap<&'static str, Case>>,
    /// What could not be tried.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// How one case went.
#[derive(Debug, Serialize)]
pub struct Case {
    /// All that it promises held.
    pub ok: bool,
    /// What did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Seconds.
    pub took_s: f64,
    /// What it measured.
    #[serde(flatten)]
    pub figures: BTreeMap<&'static str, f64>,
}

/// Something that could not be tried here.
#[derive(Debug, Serialize)]
pub struct Skipped {
    /// An implementation, or a case of one.
    pub name: String,
    /// Why not.
    pub why: String,
}

/// The others make their sockets here, all of them.
const SOCKETS: &str = "/var/run/wireguard";

/// Runs it; with `only`, with these implementations or cases alone.
///
/// # Errors
/// [`Forbidden`] where the others cannot make their sockets.
pub fn run(setting: &Setting, only: &[String]) -> anyhow::Result<Interop> {
    std::fs::create_dir_all(SOCKETS).and_then(|()| tempfile::tempfile_in(SOCKETS)).map_err(
        |error| Forbidden {
            what: format!("other WireGuards cannot be spoken to in {SOCKETS}: {error}"),
            remedy: "run as root".into(),
        },
    )?;
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
    setting.talk.step("Towline and others, each case in a lab of its own (about three minutes)");
    let cases: Vec<_> = CASES.into_iter().filter(|(name, _)| chosen(name, &case_names)).collect();
    let tried = std::thread::scope(|scope| {
        let threads: Vec<_> = programs
            .iter()
            .map(|program| (program, scope.spawn(|| try_all(setting, program, &cases))))
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
            interop.failed.push(format!("{which}: the lab panicked"));
        }
        for (name, took_s, result) in results {
            interop.note(which, name, took_s, result);
        }
    }
    Ok(interop)
}

/// One case: its name, how long it took, how it ended.
type Tried = (&'static str, f64, anyhow::Result<Outcome>);

/// The re-keys at once, since they take so long; the others beside them, one after another.
fn try_all(setting: &Setting, program: &Installed, cases: &[(&'static str, Judge)]) -> Vec<Tried> {
    let one = |(name, judge): &(&'static str, Judge)| -> Tried {
        let begun = Instant::now();
        let result = judge(setting, program);
        let which = program.which.name();
        setting.talk.note(&match &result {
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
