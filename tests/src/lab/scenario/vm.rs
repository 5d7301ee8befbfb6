//! `cargo lab vm`: what only a booted machine shows.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use clap::Args;
use serde::Serialize;

use crate::lab::interrupt::{self, check};
use crate::lab::report::{Figures, Forbidden, Promises, round};
use crate::lab::talk::Talk;
use crate::lab::vm::accelerator::Accelerator;
use crate::lab::vm::cache::Cache;
use crate::lab::vm::cases::{CASES, Case, Disks};
use crate::lab::vm::image::Image;
use crate::lab::vm::kernel::{DEFAULT, Kernel, RELEASES, Release};
use crate::lab::vm::pair::Testbed;
use crate::lab::vm::software::Software;
use crate::lab::vm::tools;

/// What to run.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Name the cases, a line each, and run none.
    #[arg(long)]
    pub list: bool,
    /// Only this case (can be repeated).
    #[arg(long, value_name = "NAME")]
    pub case: Vec<String>,
    /// Only this kernel: 5.10, 6.1, 6.12 or newest (can be repeated).
    #[arg(long, value_name = "NAME")]
    pub kernel: Vec<String>,
    /// Every case on every kernel that it is meant for.
    #[arg(long)]
    pub full: bool,
    /// This Debian package instead of one of this checkout's debug build.
    #[arg(long, value_name = "FILE")]
    pub package: Option<PathBuf>,
}

/// What the cases showed.
#[derive(Debug, Default, Serialize)]
pub struct Vm {
    /// What executed the machines' instructions: "kvm" or "tcg".
    pub accelerator: &'static str,
    /// Version of each kernel that was used, by its name.
    pub kernels: BTreeMap<&'static str, String>,
    /// Every case that ran.
    pub cases: Vec<Ran>,
    /// Cases that could not run, and why.
    pub skipped: Vec<Skipped>,
    /// Of the whole run, once the programs were built.
    pub seconds: f64,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// A case that ran.
#[derive(Debug, Serialize)]
pub struct Ran {
    /// Its name.
    pub name: &'static str,
    /// The kernel's name.
    pub kernel: &'static str,
    /// All of its promises held.
    pub ok: bool,
    /// How long it took.
    pub seconds: f64,
}

/// A case that could not run.
#[derive(Debug, Serialize)]
pub struct Skipped {
    /// Its name.
    pub name: &'static str,
    /// The kernel's name.
    pub kernel: &'static str,
    /// Why.
    pub reason: String,
}

/// Describes the cases, a line each.
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
    let talk = Talk::new();
    let cache = Cache::open()?;
    let image = Image::get(&cache).map_err(|error| cannot_prepare(&format!("{error:#}")))?;
    let mut kernels: BTreeMap<&str, Kernel> = BTreeMap::new();
    let mut vm = Vm::default();
    let mut promises = Promises::new();
    for (case, release) in selected {
        if check().is_err() {
            promises.fail("all selected cases ran: interrupted".to_owned());
            break;
        }
        let kernel = match kernels.get(release.name) {
            Some(kernel) => kernel.clone(),
            None => match Kernel::get(&cache, &image, release) {
                Ok(kernel) => kernels.entry(release.name).or_insert(kernel).clone(),
                Err(error) => {
                    vm.skip(case, release, format!("{error:#}"));
                    continue;
                }
            },
        };
        vm.kernels.insert(release.name, kernel.version.clone());
        let accelerator = Accelerator::probe(&cache, &kernel)?;
        vm.accelerator = accelerator.name();
        talk.step(&format!("{} on {}", case.name, release.name));
        let scratch = cache.scratch()?;
        let bed = Testbed {
            cache: &cache,
            image: &image,
            software: &software,
            kernel,
            accelerator,
            talk: &talk,
            directory: scratch.path(),
        };
        vm.run(case, release, &bed, &mut promises);
    }
    vm.seconds = round(begun.elapsed().as_secs_f64());
    vm.failed = promises.into_failed();
    if let ([], [first, ..]) = (&vm.cases[..], &vm.skipped[..]) {
        return Err(cannot_prepare(&first.reason).into());
    }
    Ok(vm)
}

/// Nothing can run: the packages of which machines are made cannot be had.
fn cannot_prepare(why: &str) -> Forbidden {
    Forbidden {
        what: why.to_owned(),
        remedy: "check that Debian's packages can be fetched from here".to_owned(),
    }
}

impl Vm {
    fn run(&mut self, case: Case, release: Release, bed: &Testbed<'_>, promises: &mut Promises) {
        let begun = Instant::now();
        let mut own = Promises::new();
        let pair = match case.disks {
            Disks::Blank => bed.blank(),
            Disks::Joined => bed.joined(),
        };
        let failed = match pair {
            Ok(mut pair) => {
                if let Err(error) = (case.run)(bed, &mut pair, &mut own) {
                    own.fail(format!("{error:#}"));
                }
                let failed = own.into_failed();
                if !failed.is_empty() {
                    pair.keep_evidence(bed, case.name);
                }
                failed
            }
            Err(error) => vec![format!("{error:#}")],
        };
        let seconds = round(begun.elapsed().as_secs_f64());
        bed.talk.note(&format!(
            "{} on {}: {} after {seconds} s",
            case.name,
            release.name,
            if failed.is_empty() { "ok" } else { "FAILED" }
        ));
        self.cases.push(Ran {
            name: case.name,
            kernel: release.name,
            ok: failed.is_empty(),
            seconds,
        });
        for promise in failed {
            bed.talk.note(&format!("  {promise}"));
            promises.fail(format!("{} on {}: {promise}", case.name, release.name));
        }
    }

    fn skip(&mut self, case: Case, release: Release, reason: String) {
        self.skipped.push(Skipped { name: case.name, kernel: release.name, reason });
    }
}

/// Returns what to run: the named cases, else all with `--full`, else the quick ones on the default
/// kernel.
fn select(options: &Options) -> anyhow::Result<Vec<(Case, Release)>> {
    for name in &options.case {
        if !CASES.iter().any(|case| case.name == name) {
            bail!("there is no case {name}: `cargo lab vm --list` names them");
        }
    }
    for name in &options.kernel {
        if !RELEASES.iter().any(|release| release.name == name) {
            bail!("there is no kernel {name}: it is one of 5.10, 6.1, 6.12 and newest");
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
    // One kernel after the other, so that what a kernel needs is made once.
    selected.sort_by_key(|(_, release)| RELEASES.iter().position(|one| one == release));
    Ok(selected)
}

impl Figures for Vm {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = format!("machines run by {}\n", self.accelerator);
        for Ran { name, kernel, ok, seconds } in &self.cases {
            let verdict = if *ok { "ok" } else { "FAILED" };
            let _ = writeln!(text, "{name:<28} {kernel:<8} {verdict:<7} {seconds:>6.1} s");
        }
        for Skipped { name, kernel, reason } in &self.skipped {
            let _ = writeln!(text, "{name:<28} {kernel:<8} skipped: {reason}");
        }
        let _ = write!(text, "all of it: {:.0} s", self.seconds);
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
