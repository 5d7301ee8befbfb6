//! Chart of the figures: a panel for each case, and a bar for each subject.

use std::fmt::Write as _;

use super::case::Case;
use super::figures::{Bench, CaseFigures, Figure};
use crate::lab::chart::{begin, text};

/// Number of panels in a row.
const COLUMNS: usize = 3;
/// Width of a panel, in pixels.
const WIDTH: f64 = 350.0;
/// Height of a panel without its bars, in pixels.
const HEIGHT: f64 = 46.0;
/// Margin around the chart, in pixels.
const MARGIN: f64 = 24.0;
/// Height of the title, in pixels.
const TITLE: f64 = 64.0;
/// Width of the subjects' names, in pixels.
const LABEL: f64 = 112.0;
/// Height of a bar, in pixels.
const BAR: f64 = 18.0;
/// Space between two bars, in pixels.
const GAP: f64 = 6.0;

/// Subjects in the order of their bars, each with its colour.
const SUBJECTS: [(&str, &str); 8] = [
    ("towline", "#1f6feb"),
    ("towline-batch", "#4c8bf0"),
    ("towline-boringtun", "#4c8bf0"),
    ("before", "#8fb8f5"),
    ("wireguard-go", "#7d8590"),
    ("gotatun", "#9aa3ad"),
    ("boringtun", "#b7bec6"),
    ("limit", "#d9c27a"),
];
/// Subjects without a bar: they are many times faster, so that no other bar could be read.
const HIDDEN: [&str; 2] = ["null", "raw"];
/// Colour of a subject that is not in the list, from `--peer-binary`.
const OTHER: &str = "#a5abb2";

/// Returns the chart as an SVG document.
pub(super) fn chart(bench: &Bench) -> String {
    let cases: Vec<&CaseFigures> =
        Case::ALL.iter().filter_map(|case| bench.cases.get(case.name())).collect();
    let rows = cases.len().div_ceil(COLUMNS);
    let bars = cases.iter().map(|case| shown(case).len()).max().unwrap_or_default();
    let panel_height = HEIGHT + (BAR + GAP) * bars as f64;
    let width = WIDTH * COLUMNS as f64 + 2.0 * MARGIN;
    let height = TITLE + panel_height * rows as f64 + MARGIN;
    let mut svg = begin(width, height);
    text(&mut svg, MARGIN, 30.0, 18, "start", "Comparison of userspace WireGuard implementations");
    let machine = &bench.machine;
    let under = format!(
        "Linux {}, {} cores, medians of {} rounds; lines show minimum and maximum. \
         Longer is better, except for milliseconds.",
        machine.kernel, machine.cores, bench.rounds
    );
    text(&mut svg, MARGIN, 50.0, 11, "start", &under);
    for (number, case) in cases.into_iter().enumerate() {
        let left = MARGIN + WIDTH * (number % COLUMNS) as f64;
        let top = TITLE + panel_height * (number / COLUMNS) as f64;
        panel(&mut svg, left, top, case);
    }
    svg.push_str("</svg>\n");
    svg
}

/// Returns the subjects of a case that have a bar, each with its name and colour.
fn shown(case: &CaseFigures) -> Vec<(&'static str, &'static str, &Figure)> {
    let known = SUBJECTS
        .into_iter()
        .filter_map(|(name, colour)| Some((name, colour, case.subjects.get(name)?)));
    let is_other =
        |name: &str| !HIDDEN.contains(&name) && !SUBJECTS.iter().any(|(known, _)| *known == name);
    let others = case.subjects.iter().filter(|(name, _)| is_other(name));
    known.chain(others.map(|(name, figure)| (*name, OTHER, figure))).collect()
}

/// Draws the panel of a case.
fn panel(svg: &mut String, left: f64, top: f64, case: &CaseFigures) {
    let title = format!("{}, {}", case.what, case.unit);
    text(svg, left, top + 18.0, 13, "start", &title);
    let measured = shown(case);
    let most = measured.iter().map(|(_, _, figure)| figure.max).fold(0.0, f64::max);
    // The median is printed to the right of the bar.
    let scale = (WIDTH - LABEL - MARGIN - 50.0) / most.max(f64::MIN_POSITIVE);
    for (row, (name, colour, figure)) in measured.into_iter().enumerate() {
        let y = top + 30.0 + (BAR + GAP) * row as f64;
        let (x, middle) = (left + LABEL, y + BAR / 2.0);
        text(svg, x - 6.0, middle + 4.0, 11, "end", name);
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>",
            figure.median * scale
        );
        let _ = writeln!(
            svg,
            "<path d=\"M{:.1} {middle}H{:.1}\" stroke=\"#1f2328\" stroke-width=\"1\"/>",
            x + figure.min * scale,
            x + figure.max * scale
        );
        let end = x + figure.max * scale + 6.0;
        text(svg, end, middle + 4.0, 11, "start", &format!("{:.3}", figure.median));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_subject_but_the_distant_bounds_has_a_bar() {
        let mut bench = Bench::default();
        for subject in ["raw", "a&b", "wireguard-go", "towline"] {
            bench.add(Case::Tcp1, subject, 1.0, None);
        }
        let names: Vec<_> = shown(&bench.cases["tcp1"]).iter().map(|(name, ..)| *name).collect();
        assert_eq!(names, ["towline", "wireguard-go", "a&b"]);
        let svg = chart(&bench);
        assert!(svg.contains(">a&amp;b</text>") && !svg.contains(">raw</text>"));
    }
}
