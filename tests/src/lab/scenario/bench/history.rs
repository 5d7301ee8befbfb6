//! History of the figures: a file with a line of JSON for each run, to see how they change from commit to
//! commit. Only lines of one machine can be compared.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use serde::Serialize;

use super::figures::{Bench, Machine};
use super::quiet::Quiet;
use crate::lab::binaries;

/// One run.
#[derive(Debug, Serialize)]
struct Entry<'a> {
    /// Time of the end of the run, in seconds since the Unix epoch.
    time: u64,
    /// Commit of this checkout. `None` where it is not known.
    commit: Option<String>,
    machine: &'a Machine,
    quiet: &'a Quiet,
    rounds: usize,
    /// Version of each subject.
    subjects: &'a BTreeMap<&'static str, String>,
    dates: &'a BTreeMap<&'static str, String>,
    ratios: &'a BTreeMap<String, f64>,
    machine_cpu_per_gb: &'a BTreeMap<&'static str, f64>,
    rss_mb: &'a BTreeMap<&'static str, f64>,
    /// Median of each case and subject.
    medians: BTreeMap<&'static str, BTreeMap<&'static str, f64>>,
}

/// Appends the figures to a file, which is created if it does not exist.
pub(super) fn append(bench: &Bench, path: &Path) -> anyhow::Result<()> {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    let line = line(bench, time.as_secs(), binaries::head())?;
    // One write, so that two runs do not mix their lines.
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .and_then(|mut file| file.write_all(line.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Returns the line of a run.
fn line(bench: &Bench, time: u64, commit: Option<String>) -> anyhow::Result<String> {
    let medians = bench.cases.iter().map(|(name, case)| {
        let subjects = case.subjects.iter().map(|(subject, figure)| (*subject, figure.median));
        (*name, subjects.collect())
    });
    let entry = Entry {
        time,
        commit,
        machine: &bench.machine,
        quiet: &bench.quiet,
        rounds: bench.rounds,
        subjects: &bench.subjects,
        dates: &bench.dates,
        ratios: &bench.ratios,
        machine_cpu_per_gb: &bench.machine_cpu_per_gb,
        rss_mb: &bench.rss_mb,
        medians: medians.collect(),
    };
    Ok(serde_json::to_string(&entry)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::scenario::bench::Case;

    #[test]
    fn each_run_adds_a_line_with_its_ratios_and_medians() {
        let mut bench = Bench::default();
        for subject in ["towline", "wireguard-go"] {
            bench.add(Case::Tcp1, subject, if subject == "towline" { 3.0 } else { 2.0 }, None);
        }
        bench.compare();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("history.jsonl");
        append(&bench, &file).unwrap();
        append(&bench, &file).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(text.lines().count(), 2);
        for line in text.lines() {
            let entry: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(entry["ratios"]["tcp1_vs_wireguard_go"], 1.5);
            assert_eq!(entry["medians"]["tcp1"]["towline"], 3.0);
            assert!(entry["time"].as_u64().unwrap() > 0);
        }
    }
}
