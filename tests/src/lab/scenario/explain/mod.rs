//! `cargo lab explain`: breaks meshes, and checks whether a command names the true cause by its code.
//!
//! Each case builds its own mesh with the real binaries, breaks it in one way, and asks `towline doctor`,
//! `explain` and `peer` until one of them names the cause. On healthy meshes of different shapes, whatever
//! `doctor` or `explain` complains about is a false alarm. Several cases run at the same time: mostly they
//! wait. With `--keep`, one case breaks its mesh and keeps it running, as an exercise.
//!
//! | module | faults, or what it does |
//! |---|---|
//! | [`paths`] | on the way between two nodes: blocked, lossy, slow, relayed |
//! | [`relays`] | of nodes that need a relay |
//! | [`nodes`] | of a node: removed, cloned, down, without its controller, with a bad disk |
//! | [`clocks`] | of clocks and certificates; [`clock`](crate::lab::clock) shows programs another time |
//! | [`hosts`] | of the host: firewalls, conntrack, numbers and names in use |
//! | [`networks`] | of networks that overlap, and of sources |
//! | [`pods`] | of Kubernetes: MTU of the CNI, address of the node |
//! | [`shapes`] | healthy meshes |
//! | [`exercise`] | keeps a broken mesh running for `--keep` |
//! | [`ask`] | runs the commands, and looks for a code in what they print |
//! | [`document`] | table in `docs/troubleshooting.md` |

mod ask;
mod clocks;
mod document;
mod exercise;
mod hosts;
mod networks;
mod nodes;
mod paths;
mod pods;
mod relays;
mod shapes;

use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use serde::Serialize;

use super::Setting;
use super::selection::{Entry, Selection};
use crate::lab::interrupt;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, Skipped, WrongUsage};
use ask::Named;
use exercise::Exercise;
pub use exercise::keep;

/// Number of cases that run at the same time. They wait for timers of the agents most of the time.
const AT_ONCE: usize = 3;

/// Command line options of the scenario.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// Cases to run.
    #[command(flatten)]
    pub selection: Selection,
    /// Write what was named into docs/troubleshooting.md.
    #[arg(long)]
    pub update_docs: bool,
    /// Break one mesh and keep it running until Ctrl-C: by the case, or by a fault that is shown at the end.
    #[arg(long)]
    pub keep: bool,
}

impl Options {
    /// Fails if a part of a name is in the name of no case, or if the document would get only a part of
    /// the cases.
    pub fn check(&self) -> Result<(), WrongUsage> {
        self.selection.check(&entries())?;
        if self.update_docs && !self.selection.cases.is_empty() {
            let message = "--update-docs is about all cases: leave --case out";
            return Err(WrongUsage(message.to_owned()));
        }
        if self.keep && self.update_docs {
            let message = "--keep asks nothing that a document could get: leave --update-docs out";
            return Err(WrongUsage(message.to_owned()));
        }
        if self.keep {
            self.kept_cases()?;
        }
        Ok(())
    }
}

/// A way to break a mesh.
struct Case {
    /// Name of the case: the kind and the fault, separated by a slash.
    name: &'static str,
    /// The fault, for people.
    fault: &'static str,
    /// Code of the true cause.
    cause: &'static str,
    /// True if the cause needs no repair, so that a check that is ok may name it.
    is_note: bool,
    /// Keeps the broken mesh running instead of asking. Absent without `--keep`.
    exercise: Option<Exercise>,
    check: Check,
}

/// Breaks a mesh, and asks for the cause.
type Check = fn(&Setting, &Case) -> anyhow::Result<Outcome>;

/// Result of a case.
enum Outcome {
    /// The commands were asked.
    Asked(Named),
    /// This machine cannot show the fault, for this reason.
    NotShown(String),
}

impl Case {
    fn new(name: &'static str, fault: &'static str, cause: &'static str, check: Check) -> Self {
        Self { name, fault, cause, is_note: false, exercise: None, check }
    }

    /// Marks the cause as one that needs no repair.
    fn note(mut self) -> Self {
        self.is_note = true;
        self
    }
}

/// A healthy mesh.
struct Shape {
    /// Name of the mesh: `healthy` and its shape, separated by a slash.
    name: &'static str,
    check: Look,
}

/// Builds a mesh, and returns every false alarm.
type Look = fn(&Setting) -> anyhow::Result<Vec<String>>;

impl Shape {
    fn new(name: &'static str, check: Look) -> Self {
        Self { name, check }
    }
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Explained {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Number of cases in which a command named the true cause.
    pub explained: usize,
    /// Cases that ran, in order.
    pub cases: Vec<Tried>,
    /// Number of complaints about healthy meshes.
    pub false_alarms: usize,
    /// Healthy meshes, in order.
    pub healthy: Vec<Healthy>,
    /// Cases that this machine cannot show.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// A case that ran.
#[derive(Debug, Serialize)]
pub struct Tried {
    /// Name of the case: the kind and the fault, separated by a slash.
    pub name: &'static str,
    /// True if a command named the true cause.
    pub ok: bool,
    /// Code of the true cause.
    pub cause: &'static str,
    /// Commands that named it.
    pub named_by: Vec<&'static str>,
    /// Other codes that the commands complained about, as consequences of the fault.
    pub also: Vec<String>,
    /// Duration of the case in milliseconds, with building and removing the hosts.
    pub took_ms: u64,
    /// Why the case could not be run. Absent if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A healthy mesh that was looked at.
#[derive(Debug, Serialize)]
pub struct Healthy {
    /// Name of the mesh: `healthy` and its shape, separated by a slash.
    pub name: &'static str,
    /// True if there was no false alarm.
    pub ok: bool,
    /// What the commands complained about.
    pub alarms: Vec<String>,
    /// Duration in milliseconds, with building and removing the hosts.
    pub took_ms: u64,
    /// Why the mesh could not be built. Absent if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Returns all cases, in the order of the results.
fn every_case() -> Vec<Case> {
    [
        paths::cases(),
        relays::cases(),
        nodes::cases(),
        clocks::cases(),
        hosts::cases(),
        networks::cases(),
        pods::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Returns the cases and the healthy meshes as the command line selects them.
pub fn entries() -> Vec<Entry> {
    let cases = every_case().into_iter().map(|case| case.name);
    let names = cases.chain(shapes::all().into_iter().map(|shape| shape.name));
    names.map(|name| Entry { name: name.to_owned(), is_short: true }).collect()
}

/// Runs the selected cases, and looks at the selected healthy meshes.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Explained> {
    let Options { selection, update_docs, keep: _ } = options;
    let mut results =
        Explained { rootless: setting.rank == Rank::Rootless, ..Explained::default() };
    let mut promises = Promises::new();
    let mut cases = every_case();
    cases.retain(|case| selection.has(case.name, true));
    let mut shapes = shapes::all();
    shapes.retain(|shape| selection.has(shape.name, true));
    let tried = each(&cases, |case| {
        setting.output.step(case.name);
        timed(|| (case.check)(setting, case))
    });
    interrupt::check()?;
    for (case, (result, took_ms)) in cases.iter().zip(tried) {
        results.take_case(case, result, took_ms, &mut promises);
    }
    let healthy = each(&shapes, |shape| {
        setting.output.step(shape.name);
        timed(|| (shape.check)(setting))
    });
    interrupt::check()?;
    for (shape, (result, took_ms)) in shapes.iter().zip(healthy) {
        results.take_shape(shape.name, result, took_ms, &mut promises);
    }
    for failed in promises.into_failed() {
        setting.output.note(&failed);
        results.failed.push(failed);
    }
    if *update_docs {
        document::write(&every_case(), &results)?;
    }
    Ok(results)
}

/// Calls `work` for each item, on [`AT_ONCE`] threads, and returns the results in the order of the items.
fn each<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(items.len()) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(index) else { return };
                    let result = work(item);
                    results.lock().push((index, result));
                }
            });
        }
    });
    let mut results = results.into_inner();
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Returns the result of `work`, and how long it took in milliseconds.
fn timed<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let begun = Instant::now();
    let result = work();
    (result, u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX))
}

impl Explained {
    fn take_case(
        &mut self,
        case: &Case,
        result: anyhow::Result<Outcome>,
        took_ms: u64,
        promises: &mut Promises,
    ) {
        let Case { name, cause, .. } = *case;
        let (named, why) = match result {
            Ok(Outcome::Asked(named)) => (named, None),
            Ok(Outcome::NotShown(why)) => {
                return self.skipped.push(Skipped { name: name.to_owned(), why });
            }
            Err(error) => (Named::default(), Some(format!("{error:#}"))),
        };
        let named_by: Vec<&str> = named.by.into_iter().collect();
        let also: Vec<String> = named.also.into_iter().collect();
        let ok = !named_by.is_empty();
        self.explained += usize::from(ok);
        match &why {
            Some(why) => promises.fail(format!("{name}: {why}")),
            None => promises.hold(ok, || format!("{name}: nothing names {cause}, but {also:?}")),
        }
        self.cases.push(Tried { name, ok, cause, named_by, also, took_ms, why });
    }

    fn take_shape(
        &mut self,
        name: &'static str,
        result: anyhow::Result<Vec<String>>,
        took_ms: u64,
        promises: &mut Promises,
    ) {
        let (alarms, why) = match result {
            Ok(alarms) => (alarms, None),
            Err(error) => (Vec::new(), Some(format!("{error:#}"))),
        };
        let ok = alarms.is_empty() && why.is_none();
        self.false_alarms += alarms.len();
        match &why {
            Some(why) => promises.fail(format!("{name}: {why}")),
            None => promises.hold(ok, || format!("{name}: false alarms: {}", alarms.join("; "))),
        }
        self.healthy.push(Healthy { name, ok, alarms, took_ms, why });
    }
}

impl Figures for Explained {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for Tried { name, ok, cause, named_by, took_ms, .. } in &self.cases {
            let by = if *ok { named_by.join(", ") } else { "NOT NAMED".to_owned() };
            let _ = writeln!(text, "  {name:<36}{cause:<34}{by:<24}{took_ms:>6} ms");
        }
        for Healthy { name, alarms, took_ms, .. } in &self.healthy {
            let _ = writeln!(text, "  {name:<36}{} false alarms{took_ms:>6} ms", alarms.len());
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "{skipped}");
        }
        let (explained, cases) = (self.explained, self.cases.len());
        let _ = writeln!(text, "explained: {explained} of {cases}");
        let _ = writeln!(text, "false alarms: {}", self.false_alarms);
        text.trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own_and_a_cause_that_exists() {
        let (cases, shapes) = (every_case(), shapes::all());
        let names: BTreeSet<String> = entries().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names.len(), cases.len() + shapes.len());
        let faults: BTreeSet<&str> = cases.iter().map(|case| case.fault).collect();
        assert_eq!(faults.len(), cases.len());
        assert!(cases.len() >= 30 && shapes.len() >= 10);
        let codes = towline_agent::codes();
        for Case { name, cause, .. } in &cases {
            assert!(codes.contains(cause), "{name}: {cause}");
        }
    }

    #[test]
    fn a_part_of_the_cases_does_not_replace_the_document() {
        let selection = Selection { cases: vec!["paths".to_owned()], ..Selection::default() };
        let options = Options { selection, update_docs: true, ..Options::default() };
        assert!(options.check().is_err());
        assert!(Options { update_docs: false, ..options }.check().is_ok());
        assert!(Options { update_docs: true, ..Options::default() }.check().is_ok());
    }

    #[test]
    fn results_keep_the_order_of_the_items() {
        let items: Vec<u32> = (0..20).collect();
        assert_eq!(each(&items, |item| item * 2), (0..40).step_by(2).collect::<Vec<_>>());
        assert!(each(&[0; 0], |item| *item).is_empty());
    }

    #[test]
    fn a_case_counts_only_if_a_command_named_its_cause() {
        let case = Case::new("a/b", "a fault", "no-answer", |_, _| unreachable!("not run"));
        let (mut results, mut promises) = (Explained::default(), Promises::new());
        let named = Named { by: ["doctor"].into(), ..Named::default() };
        results.take_case(&case, Ok(Outcome::Asked(named)), 1, &mut promises);
        results.take_case(&case, Ok(Outcome::Asked(Named::default())), 1, &mut promises);
        results.take_case(&case, Ok(Outcome::NotShown("why".to_owned())), 1, &mut promises);
        results.take_case(&case, Err(anyhow::anyhow!("broken")), 1, &mut promises);
        results.take_shape("healthy/a", Ok(vec!["alarm".to_owned()]), 1, &mut promises);
        assert_eq!((results.explained, results.cases.len(), results.skipped.len()), (1, 3, 1));
        assert_eq!((results.false_alarms, promises.into_failed().len()), (1, 3));
    }
}
