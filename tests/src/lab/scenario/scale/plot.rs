//! Chart of the figures: a panel for each figure, and in it a bar for each number of agents and store.

use std::fmt::Write as _;

use super::run::Run;
use super::{Scale, StoreKind};
use crate::lab::chart::{begin, text};

/// Number of panels in a row.
const COLUMNS: usize = 3;
/// Width of a panel, in pixels.
const WIDTH: f64 = 330.0;
/// Height of a panel without its bars, in pixels.
const HEIGHT: f64 = 44.0;
/// Margin around the chart, in pixels.
const MARGIN: f64 = 24.0;
/// Height of the title, in pixels.
const TITLE: f64 = 64.0;
/// Width of the names of the runs, in pixels.
const LABEL: f64 = 92.0;
/// Height of a bar, in pixels.
const BAR: f64 = 16.0;
/// Space between two bars, in pixels.
const GAP: f64 = 5.0;
/// Width of the number beside a bar, in pixels.
const NUMBER: f64 = 60.0;

/// A figure of each run.
type Figure = (&'static str, fn(&Run) -> f64);

/// Figures of the panels, with their units.
const FIGURES: [Figure; 9] = [
    ("joins without watches, 1/s", |run| run.enrol_per_s),
    ("joins with watches, 1/s", |run| run.enrol_watched_per_s),
    ("whole map at one agent, s", |run| run.snapshot_s),
    ("one change at all agents, median, ms", |run| run.delta_p50_ms),
    ("one change at all agents, p99, ms", |run| run.delta_p99_ms),
    ("20 changes a second, p99, ms", |run| run.load_p99_ms),
    ("all connected after a crash, s", |run| run.reconnect_all_s),
    ("memory of the controller, MB", |run| run.rss_mb),
    ("controller while idle, % of a core", |run| run.cpu_idle_pct),
];

/// Returns the chart as an SVG document.
pub(super) fn chart(figures: &Scale) -> String {
    let panel_height = HEIGHT + (BAR + GAP) * figures.runs.len() as f64;
    let rows = FIGURES.len().div_ceil(COLUMNS);
    let width = WIDTH * COLUMNS as f64 + 2.0 * MARGIN;
    let height = TITLE + panel_height * rows as f64 + MARGIN;
    let mut svg = begin(width, height);
    text(&mut svg, MARGIN, 30.0, 18, "start", "One controller and its agents on one machine");
    text(&mut svg, MARGIN, 50.0, 11, "start", &figures.machine.to_string());
    for (number, figure) in FIGURES.into_iter().enumerate() {
        let left = MARGIN + WIDTH * (number % COLUMNS) as f64;
        let top = TITLE + panel_height * (number / COLUMNS) as f64;
        panel(&mut svg, left, top, figure, &figures.runs);
    }
    svg.push_str("</svg>\n");
    svg
}

/// Draws the panel of a figure.
fn panel(svg: &mut String, left: f64, top: f64, (title, value): Figure, runs: &[Run]) {
    text(svg, left, top + 18.0, 13, "start", title);
    let most = runs.iter().map(value).fold(0.0, f64::max);
    let scale = if most > 0.0 { (WIDTH - LABEL - NUMBER - MARGIN) / most } else { 0.0 };
    for (row, run) in runs.iter().enumerate() {
        let y = top + 28.0 + (BAR + GAP) * row as f64;
        let (x, middle) = (left + LABEL, y + BAR / 2.0 + 4.0);
        let colour = match run.store {
            StoreKind::Redb => "#1f6feb",
            StoreKind::Etcd => "#d9a441",
        };
        text(svg, x - 6.0, middle, 11, "end", &format!("{} {}", run.store.name(), run.agents));
        let length = value(run) * scale;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{length:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>"
        );
        text(svg, x + length + 6.0, middle, 11, "start", &value(run).to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_has_a_bar_in_every_panel() {
        let run = |store, agents, rss_mb| Run { store, agents, rss_mb, ..Run::default() };
        let runs = vec![run(StoreKind::Redb, 1000, 50.0), run(StoreKind::Etcd, 3000, 100.0)];
        let machine =
            super::super::Hardware { processor: "A&B <1>".to_owned(), ..Default::default() };
        let svg = chart(&Scale { runs, machine, ..Scale::default() });
        assert_eq!(svg.matches("<rect").count(), 1 + 2 * FIGURES.len());
        assert_eq!(svg.matches(">etcd 3000<").count(), FIGURES.len());
        assert!(svg.contains(">100</text>") && svg.contains("A&amp;B &lt;1>"), "{svg}");
        // The longest bar has the whole width, and a figure of zero none.
        let whole = format!("width=\"{:.1}\"", WIDTH - LABEL - NUMBER - MARGIN);
        assert_eq!(svg.matches(&whole).count(), 1);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
