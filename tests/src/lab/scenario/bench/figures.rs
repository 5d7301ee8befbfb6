//! Figures of the benchmark, and the ratios between them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Context as _;
use serde::Serialize;
use towline_wireguard::{Aead, Engine, EngineChoice};

use super::case::Case;
use super::interval::{self, median};
use super::load::Cpu;
use super::quiet::Quiet;
use super::{BEFORE, NOW, NOW_BATCH, NOW_BORINGTUN};
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
    /// Date of the version of each other implementation, by the name of its subject, where it is known.
    pub dates: BTreeMap<&'static str, String>,
    /// Figures of each case, by its name.
    pub cases: BTreeMap<&'static str, CaseFigures>,
    /// Medians of the rounds' ratios, by name. A ratio `a_vs_b` is the figure of `a` divided by
    /// that of `b`.
    pub ratios: BTreeMap<String, f64>,
    /// Minimum and maximum of the rounds' ratios, by the names of [`Self::ratios`].
    pub ratio_spread: BTreeMap<String, [f64; 2]>,
    /// Median of the CPU-seconds of the whole machine for each gigabit of one TCP stream, by subject. It is
    /// also the number of cores for each Gb/s.
    pub machine_cpu_per_gb: BTreeMap<&'static str, f64>,
    /// Comparison of this checkout with the subject `before`, by case. Empty without that subject.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub against: BTreeMap<&'static str, Against>,
    /// Highest peak of resident memory of the two daemons of a subject, in megabytes (10^6 bytes).
    pub rss_mb: BTreeMap<&'static str, f64>,
    /// Number of Towline's datagrams that arrived after a later one of their flow, in all cases.
    pub reordered: u64,
    /// Number of Towline's datagrams whose order was checked.
    pub ordered_datagrams: u64,
    /// Number of batches that helpers of the workers encrypted while the order was checked with them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sealed_ahead: Option<u64>,
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
    /// Model of the first processor, as in `/proc/cpuinfo`. Empty where the kernel names none.
    pub cpu: String,
    /// WireGuard engine that Towline chooses on this machine: `batch` or `boringtun`.
    pub engine: &'static str,
    /// Cipher implementation of that engine.
    pub aead: &'static str,
}

impl Machine {
    /// Returns the description of this machine.
    pub(super) fn this() -> anyhow::Result<Self> {
        let info = std::fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
        let engine = Engine::select(EngineChoice::Auto, Aead::Auto);
        Ok(Self {
            kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: cpu_model(&info).unwrap_or_default().to_owned(),
            engine: engine.name(),
            aead: engine.aead(),
        })
    }
}

/// Returns the model of the first processor in the text of `/proc/cpuinfo`.
fn cpu_model(info: &str) -> Option<&str> {
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim())
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
    /// Median of the CPU-seconds of the whole machine for each gigabit of payload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_cpu_s_per_gbit: Option<f64>,
    /// Figure of each round, in order.
    pub rounds: Vec<f64>,
    /// Processor time for each gigabit of payload in each round, in order.
    #[serde(skip)]
    pub(super) cpu: Vec<Cpu>,
}

/// Figure of a round that a ratio is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Measure {
    /// The value of the case.
    Value,
    /// CPU-seconds of both daemons for each gigabit.
    DaemonCpu,
    /// CPU-seconds of the whole machine for each gigabit.
    MachineCpu,
}

impl Figure {
    /// Adds the figure of a round.
    pub(super) fn add(&mut self, value: f64, cpu: Option<Cpu>) {
        self.rounds.push(digits(value));
        self.cpu.extend(cpu);
        self.median = median(&self.rounds);
        self.min = self.rounds.iter().copied().fold(f64::INFINITY, f64::min);
        self.max = self.rounds.iter().copied().fold(0.0, f64::max);
        let of = |measure| Some(self.each(measure)).filter(|each| !each.is_empty());
        let middle = |measure| of(measure).map(|each| digits(median(&each)));
        let [daemons, machine] = [Measure::DaemonCpu, Measure::MachineCpu].map(middle);
        (self.cpu_s_per_gbit, self.machine_cpu_s_per_gbit) = (daemons, machine);
    }

    /// Returns what was measured in each round.
    fn each(&self, measure: Measure) -> Vec<f64> {
        match measure {
            Measure::Value => self.rounds.clone(),
            Measure::DaemonCpu => self.cpu.iter().map(|cpu| cpu.daemons).collect(),
            Measure::MachineCpu => self.cpu.iter().map(|cpu| cpu.machine).collect(),
        }
    }
}

impl Bench {
    /// Adds the figure of one case, one subject and one round.
    pub(super) fn add(&mut self, case: Case, subject: &'static str, value: f64, cpu: Option<Cpu>) {
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
            let (above, below) = ((case, NOW), (case, go));
            self.ratio(&format!("{name}_vs_wireguard_go"), above, below, Measure::Value);
        }
        let tcp1 = (Case::Tcp1, NOW);
        for (name, above, below, measure) in [
            ("cpu_per_gb_vs_wireguard_go", tcp1, (Case::Tcp1, go), Measure::DaemonCpu),
            ("machine_cpu_per_gb_vs_wireguard_go", tcp1, (Case::Tcp1, go), Measure::MachineCpu),
            ("vxlan_vs_tcp", (Case::Vxlan, NOW), tcp1, Measure::Value),
            ("peers1000_vs_1", (Case::Peers1000, NOW), tcp1, Measure::DaemonCpu),
            ("tcp4_2workers_vs_1", (Case::Tcp4Workers2, NOW), (Case::Tcp4, NOW), Measure::Value),
            ("ping_2workers_vs_1", (Case::PingWorkers2, NOW), (Case::Ping, NOW), Measure::Value),
        ] {
            self.ratio(name, above, below, measure);
        }
        for bound in ["limit", "null", "raw"] {
            for (case, name) in [(Case::Tcp1, "tcp1"), (Case::Tcp1Bbr, "tcp1_bbr")] {
                let name = format!("{name}_vs_{bound}");
                self.ratio(&name, (case, NOW), (case, bound), Measure::Value);
            }
        }
        self.compare_engines();
        for (subject, figure) in self.cases.get("tcp1").into_iter().flat_map(|case| &case.subjects)
        {
            self.machine_cpu_per_gb
                .extend(figure.machine_cpu_s_per_gbit.map(|seconds| (*subject, seconds)));
        }
    }

    /// Adds the ratios of the two engines. One of them is that of the subject [`NOW`].
    fn compare_engines(&mut self) {
        let has = |name: &str| self.subjects.contains_key(name);
        let batch = if has(NOW_BATCH) { NOW_BATCH } else { NOW };
        let boringtun = if has(NOW_BORINGTUN) { NOW_BORINGTUN } else { NOW };
        if batch == boringtun {
            return;
        }
        for (name, case, measure) in [
            ("batch_vs_boringtun", Case::Tcp1, Measure::Value),
            ("tcp4_batch_vs_boringtun", Case::Tcp4, Measure::Value),
            ("udp_small_batch_vs_boringtun", Case::UdpSmall, Measure::Value),
            ("udp_1200_batch_vs_boringtun", Case::Udp1200, Measure::Value),
            ("ping_batch_vs_boringtun", Case::Ping, Measure::Value),
            ("cpu_per_gb_batch_vs_boringtun", Case::Tcp1, Measure::DaemonCpu),
        ] {
            self.ratio(name, (case, batch), (case, boringtun), measure);
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

    /// Adds the ratio of two figures. Does nothing if one was not measured.
    fn ratio(&mut self, name: &str, above: (Case, &str), below: (Case, &str), measure: Measure) {
        let rounds = |(case, subject): (Case, &str)| {
            Some(self.cases.get(case.name())?.subjects.get(subject)?.each(measure))
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
        self.ratio_spread.insert(name.to_owned(), [digits(least), digits(most)]);
        self.ratios.insert(name.to_owned(), digits(median(&each)));
    }
}

impl Figures for Bench {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        let subjects: Vec<&str> = self.subjects.keys().copied().collect();
        let Machine { kernel, cores, cpu, engine, aead } = &self.machine;
        let _ = writeln!(text, "Linux {kernel}, {cores} cores ({cpu}), engine {engine} ({aead})");
        for (subject, version) in &self.subjects {
            let date = self.dates.get(subject).map(|date| format!(", {date}")).unwrap_or_default();
            let _ = writeln!(text, "  {subject}: {version}{date}");
        }
        let _ = writeln!(text, "medians of {} rounds:", self.rounds);
        let _ = write!(text, "{:46}", "");
        for subject in &subjects {
            let _ = write!(text, "{subject:>19}");
        }
        let mut cases: Vec<(&&str, &CaseFigures)> = self.cases.iter().collect();
        cases.sort_by_key(|(name, _)| Case::ALL.iter().position(|case| case.name() == **name));
        for (_, case) in &cases {
            let _ = write!(text, "\n{:46}", format!("{}, {}", case.what, case.unit));
            for subject in &subjects {
                match case.subjects.get(subject) {
                    Some(figure) => drop(write!(text, "{:>19.3}", figure.median)),
                    None => drop(write!(text, "{:>19}", "-")),
                }
            }
        }
        let tcp1 = self.cases.get(Case::Tcp1.name());
        let cpu = |subject: &str| tcp1.and_then(|case| case.subjects.get(subject)?.cpu_s_per_gbit);
        let machine = |subject: &str| self.machine_cpu_per_gb.get(subject).copied();
        let costs: [(&str, Vec<Option<f64>>); 2] = [
            (
                "CPU-seconds of the daemons per Gb, one stream",
                subjects.iter().map(|subject| cpu(subject)).collect(),
            ),
            (
                "CPU-seconds of the machine per Gb",
                subjects.iter().map(|subject| machine(subject)).collect(),
            ),
        ];
        for (what, costs) in costs {
            let _ = write!(text, "\n{what:46}");
            for cost in costs {
                match cost {
                    Some(cpu) => drop(write!(text, "{cpu:>19.3}")),
                    None => drop(write!(text, "{:>19}", "-")),
                }
            }
        }
        let _ = write!(text, "\n{:46}", "peak resident memory of a daemon, MB");
        for subject in &subjects {
            match self.rss_mb.get(subject) {
                Some(rss) => drop(write!(text, "{rss:>19.1}")),
                None => drop(write!(text, "{:>19}", "-")),
            }
        }
        let _ = writeln!(text, "\n\nratios:");
        for (name, ratio) in &self.ratios {
            let [least, most] = self.ratio_spread.get(name).copied().unwrap_or_default();
            let _ = writeln!(text, "  {name:36} {ratio:7.2}   ({least:.2} to {most:.2})");
        }
        if !self.against.is_empty() {
            let _ =
                writeln!(text, "this build divided by the other, with 95 % confidence intervals:");
        }
        for (name, Against { ratio, low, high, rounds }) in &self.against {
            let _ = writeln!(
                text,
                "  {name:36} {ratio:7.3}   ({low:.3} to {high:.3}, {rounds} rounds)"
            );
        }
        let _ =
            writeln!(text, "reordered: {} of {} datagrams", self.reordered, self.ordered_datagrams);
        if let Some(batches) = self.sealed_ahead {
            let _ = writeln!(text, "batches encrypted by helpers: {batches}");
        }
        let Quiet { waited_s, begun_busy, repeated, disturbed, .. } = &self.quiet;
        let _ = writeln!(
            text,
            "waited {waited_s} s for an idle machine; windows disturbed by other programs: {repeated} measured \
             again, {disturbed} kept; {begun_busy} begun on a busy machine"
        );
        for skipped in &self.skipped {
            let _ = writeln!(text, "{skipped}");
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
            let cpu = |daemons| Some(Cpu { daemons, machine: 3.0 * daemons });
            bench.add(Case::Tcp1, "towline", ours, cpu(1.0));
            bench.add(Case::Tcp1, "wireguard-go", theirs, cpu(4.0));
        }
        bench.compare();
        assert_eq!(bench.ratios["tcp1_vs_wireguard_go"], 2.0);
        assert_eq!(bench.ratio_spread["tcp1_vs_wireguard_go"], [1.0, 3.0]);
        assert_eq!(bench.ratios["cpu_per_gb_vs_wireguard_go"], 0.25);
        assert_eq!(bench.ratios["machine_cpu_per_gb_vs_wireguard_go"], 0.25);
        assert_eq!(bench.machine_cpu_per_gb["wireguard-go"], 12.0);
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
    fn the_two_engines_are_compared_whichever_is_the_default() {
        for (other, expected) in [(NOW_BORINGTUN, 2.0), (NOW_BATCH, 0.5)] {
            let subjects = [NOW, other].map(|name| (name, String::new())).into();
            let mut bench = Bench { subjects, ..Bench::default() };
            bench.add(Case::Tcp1, NOW, 4.0, None);
            bench.add(Case::Tcp1, other, 2.0, None);
            bench.compare();
            assert_eq!(bench.ratios["batch_vs_boringtun"], expected);
        }
    }

    #[test]
    fn bounds_are_compared_under_each_congestion_control() {
        let mut bench = Bench::default();
        for (case, ours) in [(Case::Tcp1, 6.0), (Case::Tcp1Bbr, 2.0)] {
            bench.add(case, NOW, ours, None);
            bench.add(case, "null", 4.0, None);
        }
        bench.compare();
        assert_eq!((bench.ratios["tcp1_vs_null"], bench.ratios["tcp1_bbr_vs_null"]), (1.5, 0.5));
    }

    #[test]
    fn the_model_of_the_processor_is_that_of_the_first() {
        let info = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n\nmodel name\t: Other\n";
        assert_eq!(cpu_model(info), Some("Some CPU @ 2 GHz"));
        assert_eq!(cpu_model("processor\t: 0\n"), None, "some architectures have no such line");
    }

    #[test]
    fn figures_keep_four_digits() {
        assert_eq!(digits(3.921_77), 3.922);
        assert_eq!(digits(0.012_345_6), 0.012_35);
        assert_eq!(digits(0.0), 0.0);
    }
}
