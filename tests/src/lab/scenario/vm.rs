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
use crate::lab::vm::pair::Testbed;
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
        let _ = writeln!(
            text,
            "{:<28} {quick:<5}  {:<22}  {}",
            case.name,
            kernels.join(" "),
            case.about
        );
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
    let lab = Lab { cache, image, software, output, kernels: Mutex::default() };
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

/// Pairs of machines that run at the same time. A pair waits for a boot of one machine or for a
/// limit most of the time, so two of them share two cores well.
const PAIRS_AT_ONCE: usize = 2;

/// What all cases share.
struct Lab {
    cache: Cache,
    image: Image,
    software: Software,
    output: ProgressOutput,
    /// Kernels that are ready, by the names of their releases.
    kernels: Mutex<BTreeMap<&'static str, Kernel>>,
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
        /// Promises that did not hold.
        failed: Vec<String>,
    },
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
        let failed = self.failed_promises(case, kernel, accelerator);
        let seconds = round(begun.elapsed().as_secs_f64());
        let name = format!("{} on {}", case.name, release.name);
        let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
        self.output.note(&format!("{name}: {verdict} after {seconds} s"));
        for promise in &failed {
            self.output.note(&format!("{name}: {promise}"));
        }
        Outcome::Ran { accelerator: accelerator.name(), kernel_version, seconds, failed }
    }

    fn failed_promises(&self, case: Case, kernel: Kernel, accelerator: Accelerator) -> Vec<String> {
        let scratch = match self.cache.scratch() {
            Ok(scratch) => scratch,
            Err(error) => return vec![format!("{error:#}")],
        };
        let bed = Testbed {
            cache: &self.cache,
            image: &self.image,
            software: &self.software,
            kernel,
            accelerator,
            output: &self.output,
            directory: scratch.path(),
        };
        let pair = match case.disks {
            Disks::Blank => bed.blank(),
            Disks::Joined => bed.joined(),
        };
        let mut pair = match pair {
            Ok(pair) => pair,
            Err(error) => return vec![format!("{error:#}")],
        };
        let mut promises = Promises::new();
        if let Err(error) = (case.run)(&bed, &mut pair, &mut promises) {
            promises.fail(format!("{error:#}"));
        }
        let failed = promises.into_failed();
        if !failed.is_empty() {
            pair.keep_evidence(&bed, case.name);
        }
        failed
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
            Outcome::Ran { accelerator, kernel_version, seconds, failed } => {
                self.accelerator = accelerator;
                self.kernels.insert(release.name, kernel_version);
                let ok = failed.is_empty();
                self.cases.push(Ran { name: case.name, kernel: release.name, ok, seconds });
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
        for Ran { name, kernel, ok, seconds } in &self.cases {
            let verdict = if *ok { "ok" } else { "FAILED" };
            let _ = writeln!(text, "{name:<28} {kernel:<8} {verdict:<7} {seconds:>6.1} s");
        }
        for Skipped { name, kernel, reason } in &self.skipped {
            let _ = writeln!(text, "{name:<28} {kernel:<8} skipped: {reason}");
        }
        let _ = write!(text, "total: {:.0} s", self.seconds);
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
}
