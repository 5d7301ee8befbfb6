//! `cargo lab vm`: boots machines under QEMU, and runs the cases that need a real kernel, boot or
//! power loss.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use parking_lot::Mutex;
use serde::Serialize;

use crate::lab::interrupt::{self, check};
use crate::lab::output::ProgressOutput;
use crate::lab::report::{Figures, Forbidden, Promises, WrongUsage, round};
use crate::lab::vm::accelerator::Accelerator;
use crate::lab::vm::cache::Cache;
use crate::lab::vm::cases::{CASES, Case, Disks};
use crate::lab::vm::image::Image;
use crate::lab::vm::kernel::{DEFAULT, Kernel, RELEASES, Release};
use crate::lab::vm::machine::Starts;
use crate::lab::vm::pair::{Testbed, Unusable};
use crate::lab::vm::software::Software;
use crate::lab::vm::tools;

/// Command line options of the scenario.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// List the cases, one per line, and run none.
    #[arg(long)]
    pub list: bool,
    /// Run only this case (can be repeated).
    #[arg(long, value_name = "NAME")]
    pub case: Vec<String>,
    /// Run only on this kernel: 5.10, 6.1, 6.12 or newest (can be repeated).
    #[arg(long, value_name = "NAME")]
    pub kernel: Vec<String>,
    /// Run every case, each on every kernel that it is meant for.
    #[arg(long)]
    pub full: bool,
    /// Use this Debian package instead of a debug build of this checkout.
    #[arg(long, value_name = "FILE")]
    pub package: Option<PathBuf>,
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Vm {
    /// Accelerator of QEMU: "kvm" or "tcg" (emulation).
    pub accelerator: &'static str,
    /// Version of each kernel that was used, by the kernel's name.
    pub kernels: BTreeMap<&'static str, String>,
    /// Cases that ran, in order.
    pub cases: Vec<Ran>,
    /// Cases that could not run.
    pub skipped: Vec<Skipped>,
    /// Duration of the run in seconds, without the builds of the programs.
    pub seconds: f64,
    /// Number of times that the cases booted a machine.
    pub boots: u32,
    /// Number of times that the cases restored a machine from a snapshot.
    pub restored: u32,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// A case that ran.
#[derive(Debug, Serialize)]
pub struct Ran {
    /// Name of the case.
    pub name: &'static str,
    /// Name of the kernel.
    pub kernel: &'static str,
    /// True if all promises of the case held.
    pub ok: bool,
    /// Duration of the case in seconds.
    pub seconds: f64,
    /// Number of times that the case booted a machine.
    pub boots: u32,
    /// True if the case began with machines that were restored from a snapshot, not booted.
    pub from_snapshot: bool,
    /// Why machines were booted that should have been restored; absent if none was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore_error: Option<String>,
}

/// A case that could not run.
#[derive(Debug, Serialize)]
pub struct Skipped {
    /// Name of the case.
    pub name: &'static str,
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Reason, in one line.
    pub reason: String,
}

/// Returns a description of the cases, one per line.
pub fn list() -> String {
    let mut text = String::new();
    for case in CASES {
        let kernels: Vec<&str> = case.kernels.releases().iter().map(|one| one.name).collect();
        let quick = if case.is_quick { "quick" } else { "full" };
        let _ =
            write!(text, "{:<33} {quick:<5}  {:<22}  {}", case.name, kernels.join(" "), case.about);
        let _ = match case.kernels.reason() {
            Some(reason) => writeln!(text, " ({reason})"),
            None => writeln!(text),
        };
    }
    text
}

/// Runs the selected cases.
pub fn run(options: &Options) -> anyhow::Result<Vm> {
    let selected = select(options)?;
    tools::check()?;
    interrupt::install()?;
    let software = match &options.package {
        Some(path) => Software::of_file(path)?,
        None => Software::of_checkout()?,
    };
    let begun = Instant::now();
    let output = ProgressOutput::new();
    let cache = Cache::open()?;
    let image = Image::get(&cache).map_err(|error| cannot_prepare(&format!("{error:#}")))?;
    let (kernels, unusable) = (Mutex::default(), Unusable::default());
    let lab = Lab { cache, image, software, output, kernels, unusable };
    let count = selected.len();
    let queue = Mutex::new(selected.into_iter().enumerate());
    let workers: Vec<_> = std::thread::scope(|scope| {
        let started: Vec<_> =
            (0..PAIRS_AT_ONCE.min(count)).map(|_| scope.spawn(|| lab.run_queued(&queue))).collect();
        let joined = started.into_iter().map(|worker| worker.join());
        joined.map(|ended| ended.unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let mut ended = Vec::new();
    for worker in workers {
        ended.extend(worker?);
    }
    // The order does not depend on which case ended first.
    ended.sort_by_key(|(index, _)| *index);
    let mut vm = Vm::default();
    let mut promises = Promises::new();
    promises.hold(ended.len() == count, || "all selected cases ran: interrupted".to_owned());
    for (_, one) in ended {
        vm.record(one, &mut promises);
    }
    vm.seconds = round(begun.elapsed().as_secs_f64());
    vm.failed = promises.into_failed();
    if let ([], [first, ..]) = (&vm.cases[..], &vm.skipped[..]) {
        return Err(cannot_prepare(&first.reason).into());
    }
    Ok(vm)
}

/// Pairs of machines that run at the same time. Most of the time at most one machine of a pair works,
/// or the case waits for a limit, so three of them share two cores well.
const PAIRS_AT_ONCE: usize = 3;

/// What all cases share.
struct Lab {
    cache: Cache,
    image: Image,
    software: Software,
    output: ProgressOutput,
    /// Kernels that are ready, by the names of their releases.
    kernels: Mutex<BTreeMap<&'static str, Kernel>>,
    /// Snapshots that could not be restored.
    unusable: Unusable,
}

/// The end of a case.
struct Ended {
    case: Case,
    release: Release,
    outcome: Outcome,
}

enum Outcome {
    /// The case could not run.
    Skipped(String),
    Ran {
        accelerator: &'static str,
        kernel_version: String,
        seconds: f64,
        result: CaseResult,
    },
}

/// What a case left behind.
#[derive(Default)]
struct CaseResult {
    /// Promises that did not hold.
    failed: Vec<String>,
    /// How often its machines were switched on.
    starts: Starts,
    /// Why machines were booted that should have been restored.
    restore_error: Option<String>,
}

impl CaseResult {
    fn failed(error: &anyhow::Error) -> Self {
        Self { failed: vec![format!("{error:#}")], ..Self::default() }
    }
}

impl Lab {
    /// Runs cases of a queue until it is empty or the lab is interrupted. The machines of a case
    /// belong to the thread that runs it.
    ///
    /// # Errors
    /// The accelerator cannot be probed. The other threads then end after their current case.
    fn run_queued(
        &self,
        queue: &Mutex<impl Iterator<Item = (usize, (Case, Release))>>,
    ) -> anyhow::Result<Vec<(usize, Ended)>> {
        let mut ended = Vec::new();
        while check().is_ok() {
            let Some((index, (case, release))) = queue.lock().next() else { break };
            let kernel = match self.kernel(release) {
                Ok(kernel) => kernel,
                Err(_) if check().is_err() => break,
                Err(error) => {
                    let outcome = Outcome::Skipped(format!("{error:#}"));
                    ended.push((index, Ended { case, release, outcome }));
                    continue;
                }
            };
            let accelerator = Accelerator::probe(&self.cache, &kernel)
                .inspect_err(|_| queue.lock().by_ref().for_each(drop))?;
            let outcome = self.run(case, release, kernel, accelerator);
            ended.push((index, Ended { case, release, outcome }));
        }
        Ok(ended)
    }

    fn kernel(&self, release: Release) -> anyhow::Result<Kernel> {
        // Locked over the download, so that a kernel is prepared once.
        let mut kernels = self.kernels.lock();
        if let Some(kernel) = kernels.get(release.name) {
            return Ok(kernel.clone());
        }
        let kernel = Kernel::get(&self.cache, &self.image, release)?;
        kernels.insert(release.name, kernel.clone());
        Ok(kernel)
    }

    fn run(
        &self,
        case: Case,
        release: Release,
        kernel: Kernel,
        accelerator: Accelerator,
    ) -> Outcome {
        self.output.step(&format!("{} on {}", case.name, release.name));
        let begun = Instant::now();
        let kernel_version = kernel.version.clone();
        let result = self.result_of(case, kernel, accelerator);
        let seconds = round(begun.elapsed().as_secs_f64());
        let name = format!("{} on {}", case.name, release.name);
        let verdict = if result.failed.is_empty() { "ok" } else { "FAILED" };
        self.output.note(&format!("{name}: {verdict} after {seconds} s"));
        for promise in &result.failed {
            self.output.note(&format!("{name}: {promise}"));
        }
        Outcome::Ran { accelerator: accelerator.name(), kernel_version, seconds, result }
    }

    fn result_of(&self, case: Case, kernel: Kernel, accelerator: Accelerator) -> CaseResult {
        let scratch = match self.cache.scratch() {
            Ok(scratch) => scratch,
            Err(error) => return CaseResult::failed(&error),
        };
        let bed = Testbed {
            cache: &self.cache,
            image: &self.image,
            software: &self.software,
            kernel,
            accelerator,
            unusable: &self.unusable,
            output: &self.output,
            directory: scratch.path(),
        };
        let pair = match case.disks {
            Disks::Blank => bed.blank(),
            Disks::Joined => bed.joined(),
        };
        let mut pair = match pair {
            Ok(pair) => pair,
            Err(error) => return CaseResult::failed(&error),
        };
        let mut promises = Promises::new();
        if let Err(error) = (case.run)(&bed, &mut pair, &mut promises) {
            promises.fail(format!("{error:#}"));
        }
        let failed = promises.into_failed();
        if !failed.is_empty() {
            pair.keep_evidence(&bed, case.name);
        }
        let restore_error = pair.restore_error().map(str::to_owned);
        CaseResult { failed, starts: pair.starts(), restore_error }
    }
}

/// Returns the error for a machine that cannot get the packages that the guests are built from.
fn cannot_prepare(why: &str) -> Forbidden {
    Forbidden {
        what: why.to_owned(),
        remedy: "check that this machine can download Debian packages".to_owned(),
    }
}

impl Vm {
    /// Records the end of a case.
    fn record(&mut self, ended: Ended, promises: &mut Promises) {
        let Ended { case, release, outcome } = ended;
        match outcome {
            Outcome::Skipped(reason) => {
                self.skipped.push(Skipped { name: case.name, kernel: release.name, reason });
            }
            Outcome::Ran { accelerator, kernel_version, seconds, result } => {
                let CaseResult { failed, starts, restore_error } = result;
                self.accelerator = accelerator;
                self.kernels.insert(release.name, kernel_version);
                self.boots += starts.boots;
                self.restored += starts.restores;
                self.cases.push(Ran {
                    name: case.name,
                    kernel: release.name,
                    ok: failed.is_empty(),
                    seconds,
                    boots: starts.boots,
                    from_snapshot: starts.restores > 0 && restore_error.is_none(),
                    restore_error,
                });
                for promise in failed {
                    promises.fail(format!("{} on {}: {promise}", case.name, release.name));
                }
            }
        }
    }
}

/// Returns the cases to run, each with its kernel: the named cases; otherwise all with `--full`;
/// otherwise the quick ones on the default kernel.
fn select(options: &Options) -> Result<Vec<(Case, Release)>, WrongUsage> {
    for name in &options.case {
        if !CASES.iter().any(|case| case.name == name) {
            let why = format!("unknown case {name}: `cargo lab vm --list` shows the names");
            return Err(WrongUsage(why));
        }
    }
    for name in &options.kernel {
        if !RELEASES.iter().any(|release| release.name == name) {
            let why = format!("unknown kernel {name}: use 5.10, 6.1, 6.12 or newest");
            return Err(WrongUsage(why));
        }
    }
    let mut selected = Vec::new();
    for case in CASES {
        let is_named = options.case.iter().any(|name| name == case.name);
        let is_wanted =
            if options.case.is_empty() { options.full || case.is_quick } else { is_named };
        if !is_wanted {
            continue;
        }
        let releases = match (&options.kernel[..], options.full) {
            ([], true) => case.kernels.releases(),
            ([], false) => vec![DEFAULT],
            (names, _) => RELEASES
                .into_iter()
                .filter(|release| names.iter().any(|name| name == release.name))
                .collect(),
        };
        selected.extend(releases.into_iter().map(|release| (*case, release)));
    }
    // Cases are grouped by kernel, so that each kernel is prepared once.
    selected.sort_by_key(|(_, release)| RELEASES.iter().position(|one| one == release));
    Ok(selected)
}

impl Figures for Vm {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = format!("accelerator: {}\n", self.accelerator);
        for Ran { name, kernel, ok, seconds, boots, from_snapshot, restore_error } in &self.cases {
            let verdict = if *ok { "ok" } else { "FAILED" };
            let start = if *from_snapshot { "snapshot, " } else { "" };
            let _ = writeln!(
                text,
                "{name:<28} {kernel:<8} {verdict:<7} {seconds:>6.1} s  {start}boots: {boots}"
            );
            if let Some(error) = restore_error {
                let _ = writeln!(text, "{:<28} {error}", "");
            }
        }
        for Skipped { name, kernel, reason } in &self.skipped {
            let _ = writeln!(text, "{name:<28} {kernel:<8} skipped: {reason}");
        }
        let Self { seconds, boots, restored, .. } = self;
        let _ = write!(text, "total: {seconds:.0} s, {boots} boots, {restored} restored");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options { list: false, case: vec![], kernel: vec![], full: false, package: None }
    }

    #[test]
    fn without_flags_the_quick_cases_run_on_one_kernel() {
        let selected = select(&options()).unwrap();
        assert!(selected.iter().all(|(case, release)| case.is_quick && *release == DEFAULT));
        assert!(selected.iter().any(|(case, _)| case.name == "smoke"));
        let full = select(&Options { full: true, ..options() }).unwrap();
        assert!(full.len() > selected.len());
        let order: Vec<usize> = full
            .iter()
            .filter_map(|(_, release)| RELEASES.iter().position(|one| one == release))
            .collect();
        assert!(order.is_sorted());
    }

    #[test]
    fn names_are_checked() {
        let one = Options { case: vec!["leave".into()], kernel: vec!["5.10".into()], ..options() };
        let selected = select(&one).unwrap();
        assert_eq!(selected.len(), 1);
        assert_eq!((selected[0].0.name, selected[0].1.name), ("leave", "5.10"));
        select(&Options { case: vec!["levae".into()], ..options() }).unwrap_err();
        select(&Options { kernel: vec!["4.4".into()], ..options() }).unwrap_err();
    }

    #[test]
    fn a_case_that_could_not_be_restored_says_so() {
        let mut vm = Vm::default();
        let mut promises = Promises::new();
        let restored = (Starts { boots: 1, restores: 2 }, None);
        let booted = (Starts { boots: 3, restores: 0 }, Some("no answer".to_owned()));
        for (starts, restore_error) in [restored, booted] {
            let result = CaseResult { failed: vec![], starts, restore_error };
            let (accelerator, kernel_version) = ("tcg", "6.1.0".to_owned());
            let outcome = Outcome::Ran { accelerator, kernel_version, seconds: 1.0, result };
            vm.record(Ended { case: CASES[0], release: DEFAULT, outcome }, &mut promises);
        }
        assert_eq!((vm.boots, vm.restored), (4, 2));
        let cases = serde_json::to_value(&vm.cases).unwrap();
        assert_eq!(cases[0]["from_snapshot"], true);
        assert!(cases[0].get("restore_error").is_none());
        assert_eq!(cases[1]["from_snapshot"], false);
        assert_eq!(cases[1]["restore_error"], "no answer");
    }
}
