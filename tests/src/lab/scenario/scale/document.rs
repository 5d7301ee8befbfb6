//! The figures in `docs/scale.md`, and the chart beside it.

use std::fmt::Write as _;

use anyhow::Context as _;

use super::run::Run;
use super::{Scale, plot};
use crate::checkout;

/// Document, relative to the root of the checkout.
const DOCUMENT: &str = "docs/scale.md";
/// Chart, relative to the root of the checkout.
const CHART: &str = "docs/scale.svg";
/// Line before the figures.
const BEGIN: &str = "<!-- figures: written by cargo lab scale --full --update-docs -->\n";
/// Line after the figures.
const END: &str = "<!-- end of figures -->\n";

/// A row of the table: its name with the unit, and the figure of a run.
type Row = (&'static str, fn(&Run) -> String);

const ROWS: [Row; 16] = [
    ("joins per second, no watch open", |run| run.enrol_per_s.to_string()),
    ("joins per second, nine tenths watch", |run| run.enrol_watched_per_s.to_string()),
    ("whole map at one agent, s", |run| run.snapshot_s.to_string()),
    ("whole map at all agents, s", |run| run.watch_all_s.to_string()),
    ("one change at all agents, median, ms", |run| run.delta_p50_ms.to_string()),
    ("one change at all agents, p99, ms", |run| run.delta_p99_ms.to_string()),
    ("changes per second under load", |run| run.deltas_per_s.to_string()),
    ("a change under load, p99, ms", |run| run.load_p99_ms.to_string()),
    ("controller under load, % of a core", |run| run.cpu_load_pct.to_string()),
    ("agents under load, % of a core", |run| run.clients_cpu_load_pct.to_string()),
    ("controller while idle, % of a core", |run| run.cpu_idle_pct.to_string()),
    ("agents while idle, % of a core", |run| run.clients_cpu_idle_pct.to_string()),
    ("etcd while idle, % of a core", |run| optional(run.store_cpu_idle_pct)),
    ("memory of the controller, MB", |run| run.rss_mb.to_string()),
    ("memory of etcd, MB", |run| optional(run.store_rss_mb)),
    ("all connected after a crash, s", |run| run.reconnect_all_s.to_string()),
];

/// Writes the figures and the chart.
pub(super) fn write(figures: &Scale) -> anyhow::Result<()> {
    let path = checkout::root().join(DOCUMENT);
    let text = std::fs::read_to_string(&path)?;
    let (before, after) = around(&text).context("docs/scale.md has no place for the figures")?;
    std::fs::write(&path, format!("{before}{BEGIN}\n{}\n{END}{after}", table(figures)))?;
    Ok(std::fs::write(checkout::root().join(CHART), plot::chart(figures))?)
}

/// Returns what is before and after the figures.
fn around(document: &str) -> Option<(&str, &str)> {
    let (before, rest) = document.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some((before, after))
}

/// Returns the machine and a table with a column for each run.
fn table(figures: &Scale) -> String {
    let mut text = format!("Measured on: {}.\n\n| |", figures.machine);
    // Writing to a string cannot fail.
    for run in &figures.runs {
        let _ = write!(text, " {}, {} agents |", run.store.name(), run.agents);
    }
    text.push_str("\n|---|");
    text.push_str(&"---:|".repeat(figures.runs.len()));
    for (name, value) in ROWS {
        let _ = write!(text, "\n| {name} |");
        for run in &figures.runs {
            let _ = write!(text, " {} |", value(run));
        }
    }
    text.push_str("\n\n![Chart of these figures](scale.svg)\n");
    text
}

fn optional(figure: Option<f64>) -> String {
    figure.map_or_else(|| "–".to_owned(), |figure| figure.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::StoreKind;
    use super::*;

    #[test]
    fn the_document_has_a_place_for_the_figures() {
        let text = std::fs::read_to_string(checkout::root().join(DOCUMENT)).unwrap();
        assert!(around(&text).is_some());
    }

    #[test]
    fn a_run_is_a_column() {
        let redb = Run { agents: 1000, rss_mb: 50.5, ..Run::default() };
        let etcd = Run { store: StoreKind::Etcd, store_rss_mb: Some(99.0), ..redb.clone() };
        let text = table(&Scale { runs: vec![redb, etcd], ..Scale::default() });
        for line in [
            "| | redb, 1000 agents | etcd, 1000 agents |",
            "|---|---:|---:|",
            "| memory of the controller, MB | 50.5 | 50.5 |",
            "| memory of etcd, MB | – | 99 |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
