//! Figures of the benchmark, and the ratios between them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::case::Case;
use super::interval::{self, median};
use super::quiet::Quiet;
use super::{BEFORE, NOW};
use crate::lab::report::{Figures, Skipped};

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Bench {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Machine of the run. Figures of different machines cannot be compared.
    pub machine: Machine,
    /// What the machine did beside the benchmark.
    pub quiet: Quiet,
    /// Number of rounds. Each round ran each case with each subject, in an order that was reversed
    /// every time.
    pub rounds: usize,
    /// Version of each subject, by its name.
    pub subjects: BTreeMap<&'static str, String>,
    /// Figures of each case, by its name.
    pub cases: BTreeMap<&'static str, CaseFigures>,
    /// Medians of the rounds' ratios, by name. A ratio `a_vs_b` is the figure of `a` divided by
    /// that of `b`.
    pub ratios: BTreeMap<String, f64>,
    /// Minimum and maximum of the rounds' ratios, by the names of [`Self::ratios`].
    pub ratio_spread: BTreeMap<String, [f64; 2]>,
    /// Comparison of this checkout with the subject `before`, by case. Empty without that subject.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub against: BTreeMap<&'static str, Against>,
    /// Highest peak of resident memory of the two daemons of a subject, in megabytes (10^6 bytes).
    pub rss_mb: BTreeMap<&'static str, f64>,
    /// Number of Towline's datagrams that arrived after a later one of their flow, in all cases.
    pub reordered: u64,
    /// Number of Towline's datagrams whose order was checked.
    pub ordered_datagrams: u64,
    /// Subjects and cases that could not run.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold. A ratio is never a promise.
    pub failed: Vec<String>,
}

/// Machine that a benchmark ran on.
#[derive(Debug, Default, Serialize)]
pub struct Machine {
    /// Kernel release, as in `uname -r`.
    pub kernel: String,
    /// Number of processors that the benchmark may use.
    pub cores: usize,
}

/// Comparison of two builds in one case.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Against {
    /// Median of the ratios: the figure of this checkout divided by that of the other. Each is the
    /// geometric mean of two rounds, in which either checkout is measured first once. Above 1, this
    /// checkout is faster, except in cases measured in milliseconds.
    pub ratio: f64,
    /// Lower end of the 95 % confidence interval of the median.
    pub low: f64,
    /// Upper end of the 95 % confidence interval of the median.
    pub high: f64,
    /// Number of rounds in which both builds were measured, without an odd last one.
    pub rounds: usize,
}

/// Figures of one case.
#[derive(Debug, Serialize)]
pub struct CaseFigures {
    /// Description of the case.
    pub what: &'static str,
    /// Unit of the figures.
    pub unit: &'static str,
    /// Figures of each subject, by its name.
    pub subjects: BTreeMap<&'static str, Figure>,
}

/// Figures of one case with one subject.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Figure {
    /// Median of the rounds.
    pub median: f64,
    /// Minimum of the rounds.
    pub min: f64,
    /// Maximum of the rounds.
    pub max: f64,
    /// Median of the CPU-seconds of both daemons for each gigabit of payload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_s_per_gbit: Option<f64>,
    /// Figure of each round, in order.
    pub rounds: Vec<f64>,
    /// CPU-seconds for each gigabit of payload in each round, in order.
    #[serde(skip)]
    pub(super) cpu: Vec<f64>,
}

impl Figure {
    /// Adds the figure of a round.
    pub(super) fn add(&mut self, value: f64, cpu: Option<f64>) {
        self.rounds.push(digits(value));
        self.cpu.extend(cpu);
        self.median = median(&self.rounds);
        self.min = self.rounds.iter().copied().fold(f64::INFINITY, f64::min);
        self.max = self.rounds.iter().copied().fold(0.0, f64::max);
        self.cpu_s_per_gbit = (!self.cpu.is_empty()).then(|| digits(median(&self.cpu)));
    }
}

impl Bench {
    /// Adds the figure of one case, one subject and one round.
    pub(super) fn add(&mut self, case: Case, subject: &'static str, value: f64, cpu: Option<f64>) {
        let figures = self.cases.entry(case.name()).or_insert_with(|| CaseFigures {
            what: case.what(),
            unit: case.unit(),
            subjects: BTreeMap::new(),
        });
        figures.subjects.entry(subject).or_default().add(value, cpu);
    }

    /// Fills in [`Self::ratios`] and [`Self::ratio_spread`] from the figures.
    pub(super) fn compare(&mut self) {
        let go = "wireguard-go";
        for (case, name) in [
            (Case::Tcp1, "tcp1"),
            (Case::Tcp1Reverse, "tcp1_rev"),
            (Case::Tcp1Bbr, "tcp1_bbr"),
            (Case::Tcp4, "tcp4"),
            (Case::BothWays, "bidir"),
            (Case::UdpSmall, "udp_small"),
            (Case::Udp1200, "udp_1200"),
            (Case::Vxlan, "vxlan"),
            (Case::Geneve, "geneve"),
            (Case::Ping, "ping"),
            (Case::PingLoaded, "ping_loaded"),
            (Case::InnerV6, "inner_v6"),
            (Case::OuterV6, "outer_v6"),
            (Case::Loss1, "loss_0.1"),
            (Case::Loss10, "loss_1"),
        ] {
            self.ratio(format!("{name}_vs_wireguard_go"), (case, "towline"), (case, go), false);
        }
        let tcp1 = (Case::Tcp1, "towline");
        self.ratio("cpu_per_gb_vs_wireguard_go".to_owned(), tcp1, (Case::Tcp1, go), true);
        self.ratio("vxlan_vs_tcp".to_owned(), (Case::Vxlan, "towline"), tcp1, false);
        self.ratio("tcp1_vs_limit".to_owned(), tcp1, (Case::Tcp1, "limit"), false);
        self.ratio("peers1000_vs_1".to_owned(), (Case::Peers1000, "towline"), tcp1, true);
        for (name, two, one) in [
            ("tcp4_2workers_vs_1", Case::Tcp4Workers2, Case::Tcp4),
            ("ping_2workers_vs_1", Case::PingWorkers2, Case::Ping),
        ] {
            self.ratio(name.to_owned(), (two, "towline"), (one, "towline"), false);
        }
    }

    /// Fills in [`Self::against`] from the figures.
    pub(super) fn compare_with_before(&mut self) {
        for (name, case) in &self.cases {
            let rounds = |subject| case.subjects.get(subject).map(|figure| &*figure.rounds);
            let Some((now, before)) = rounds(NOW).zip(rounds(BEFORE)) else { continue };
            let ratios: Vec<f64> =
                now.iter().zip(before).map(|(now, before)| now / before).collect();
            // What is measured first in a round finds the machine in another state.
            let pairs = ratios.as_chunks::<2>().0.iter();
            let ratios: Vec<f64> = pairs
                .map(|[one, other]| (one * other).sqrt())
                .filter(|ratio| ratio.is_finite())
                .collect();
            let Some([low, high]) = interval::of_median(&ratios) else { continue };
            let [ratio, low, high] = [median(&ratios), low, high].map(digits);
            self.against.insert(name, Against { ratio, low, high, rounds: 2 * ratios.len() });
        }
    }

    /// Adds the ratio of two figures, or of their CPU-seconds with `cpu`. Does nothing if one was
    /// not measured.
    fn ratio(&mut self, name: String, above: (Case, &str), below: (Case, &str), cpu: bool) {
        let rounds = |(case, subject): (Case, &str)| {
            let figure = self.cases.get(case.name())?.subjects.get(subject)?;
            Some(if cpu { figure.cpu.clone() } else { figure.rounds.clone() })
        };
        let Some((above, below)) = rounds(above).zip(rounds(below)) else { return };
        let each: Vec<f64> = above
            .iter()
            .zip(&below)
            .map(|(a, b)| a / b)
            .filter(|ratio| ratio.is_finite())
            .collect();
        if each.is_empty() {
            return;
        }
        let least = each.iter().copied().fold(f64::INFINITY, f64::min);
        let most = each.iter().copied().fold(0.0, f64::max);
        self.ratio_spread.insert(name.clone(), [digits(least), digits(most)]);
        self.ratios.insert(name, digits(median(&each)));
    }
}

impl Figures for Bench {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        let subjects: Vec<&str> = self.subjects.keys().copied().collect();
        let Machine { kernel, cores } = &self.machine;
        let _ = writeln!(text, "Linux {kernel}, {cores} cores, {} rounds, medians:", self.rounds);
        let _ = write!(text, "{:44}", "");
        for subject in &subjects {
            let _ = write!(text, "{subject:>14}");
        }
        let mut cases: Vec<(&&str, &CaseFigures)> = self.cases.iter().collect();
        cases.sort_by_key(|(name, _)| Case::ALL.iter().position(|case| case.name() == **name));
        for (_, case) in &cases {
            let _ = write!(text, "\n{:44}", format!("{}, {}", case.what, case.unit));
            for subject in &subjects {
                match case.subjects.get(subject) {
                    Some(figure) => drop(write!(text, "{:>14.3}", figure.median)),
                    None => drop(write!(text, "{:>14}", "-")),
                }
            }
        }
        let _ = write!(text, "\n{:44}", "CPU-seconds per Gb, one stream");
        for subject in &subjects {
            let cpu = self
                .cases
                .get(Case::Tcp1.name())
                .and_then(|case| case.subjects.get(subject)?.cpu_s_per_gbit);
            match cpu {
                Some(cpu) => drop(write!(text, "{cpu:>14.3}")),
                None => drop(write!(text, "{:>14}", "-")),
            }
        }
        let _ = write!(text, "\n{:44}", "peak resident memory of a daemon, MB");
        for subject in &subjects {
            match self.rss_mb.get(subject) {
                Some(rss) => drop(write!(text, "{rss:>14.1}")),
                None => drop(write!(text, "{:>14}", "-")),
            }
        }
        let _ = writeln!(text, "\n\nratios:");
        for (name, ratio) in &self.ratios {
            let [least, most] = self.ratio_spread.get(name).copied().unwrap_or_default();
            let _ = writeln!(text, "  {name:34} {ratio:7.2}   ({least:.2} to {most:.2})");
        }
        if !self.against.is_empty() {
            let _ =
                writeln!(text, "this build divided by the other, with 95 % confidence intervals:");
        }
        for (name, Against { ratio, low, high, rounds }) in &self.against {
            let _ = writeln!(
                text,
                "  {name:34} {ratio:7.3}   ({low:.3} to {high:.3}, {rounds} rounds)"
            );
        }
        let _ =
            writeln!(text, "reordered: {} of {} datagrams", self.reordered, self.ordered_datagrams);
        let Quiet { waited_s, begun_busy, repeated, disturbed } = &self.quiet;
        let _ = writeln!(
            text,
            "waited {waited_s} s for an idle machine; windows disturbed by other programs: {repeated} measured \
             again, {disturbed} kept; {begun_busy} begun on a busy machine"
        );
        for Skipped { name, why } in &self.skipped {
            let _ = writeln!(text, "without {name}: {why}");
        }
        text
    }
}

/// Rounds to four significant digits. Further digits are noise.
fn digits(figure: f64) -> f64 {
    if figure == 0.0 || !figure.is_finite() {
        return 0.0;
    }
    let scale = 10f64.powi(3 - figure.abs().log10().floor() as i32);
    (figure * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_the_median_of_the_rounds_own() {
        let mut bench = Bench::default();
        for (ours, theirs) in [(4.0, 2.0), (1.0, 1.0), (9.0, 3.0)] {
            bench.add(Case::Tcp1, "towline", ours, Some(1.0));
            bench.add(Case::Tcp1, "wireguard-go", theirs, Some(4.0));
        }
        bench.compare();
        assert_eq!(bench.ratios["tcp1_vs_wireguard_go"], 2.0);
        assert_eq!(bench.ratio_spread["tcp1_vs_wireguard_go"], [1.0, 3.0]);
        assert_eq!(bench.ratios["cpu_per_gb_vs_wireguard_go"], 0.25);
        assert!(!bench.ratios.contains_key("tcp1_vs_limit"), "nothing to compare with");
    }

    #[test]
    fn two_builds_are_compared_by_pairs_of_rounds() {
        let mut bench = Bench::default();
        // What is second in a round is half as fast; the last round has no counterpart.
        let rounds =
            [(2.0, 1.0), (1.0, 2.0), (4.0, 1.0), (2.0, 2.0), (2.0, 2.0), (1.0, 4.0), (9.0, 1.0)];
        for (now, before) in rounds {
            bench.add(Case::Tcp1, "towline", now, None);
            bench.add(Case::Tcp1, "before", before, None);
            bench.add(Case::Ping, "towline", now, None);
        }
        bench.compare_with_before();
        let tcp1 = bench.against["tcp1"];
        assert_eq!((tcp1.ratio, tcp1.rounds), (1.0, 6));
        assert_eq!((tcp1.low, tcp1.high), (0.5, 2.0), "three pairs give a wide interval");
        assert!(!bench.against.contains_key("ping"), "nothing to compare with");
    }

    #[test]
    fn figures_keep_four_digits() {
        assert_eq!(digits(3.921_77), 3.922);
        assert_eq!(digits(0.012_345_6), 0.012_35);
        assert_eq!(digits(0.0), 0.0);
    }
}
