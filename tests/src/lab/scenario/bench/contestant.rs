//! Programs that the benchmark compares, each with its running tunnels and the cases that it runs.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context;

use super::case::Case;
use super::figures::Bench;
use super::subject::{Agents, Outer, Subject};
use super::{BEFORE, NOW, NOW_BATCH, NOW_BORINGTUN, Options};
use crate::lab::binaries::Binaries;
use crate::lab::mesh::COMMAND_LIMIT;
use crate::lab::peers::{Installed, WireGuard, tailscale};
use crate::lab::process::Program;
use crate::lab::report::Skipped;
use crate::lab::scenario::Setting;
use crate::lab::topology::Lab;

/// Program that another person built, with the name of its subject: `NAME=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerBinary {
    /// Name of the subject.
    name: String,
    /// Path of the program.
    path: PathBuf,
}

/// Longest name of a given program, in bytes.
const LONGEST_NAME: usize = 24;

impl FromStr for PeerBinary {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, path) = text.split_once('=').ok_or("not of the form NAME=PATH")?;
        let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(is_plain) {
            return Err(format!(
                "a name has 1 to {LONGEST_NAME} lower-case letters, digits and `-`"
            ));
        }
        if OWN.contains(&name) {
            return Err(format!("{name} is the name of a subject of the benchmark itself"));
        }
        if path.is_empty() {
            return Err("no path".to_owned());
        }
        Ok(Self { name: name.to_owned(), path: path.into() })
    }
}

/// A program to measure, with its running tunnels.
pub(super) struct Contestant {
    pub(super) name: &'static str,
    /// Tunnel that most cases use.
    pub(super) subject: Subject,
    /// Tunnel over IPv6. Built only if a case needs it.
    over_v6: Option<Subject>,
    /// Tunnel between agents with 1,000 peers. Built only if a case needs it.
    crowded: Option<Subject>,
    /// Tunnel between agents with two workers. Built only if a case or the check of the order needs
    /// it.
    pub(super) shared: Option<Subject>,
    /// Tunnel between agents whose workers have two helpers. Built only if the order is checked.
    pub(super) ahead: Option<Subject>,
    /// Cases that are measured.
    range: Range,
}

/// Set of cases that a contestant runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Range {
    /// All cases.
    All,
    /// The main cases.
    Main,
    /// The main cases, and one stream with BBR.
    Limit,
    /// One stream with CUBIC, and one with BBR: what the machine can do.
    Bound,
}

impl Range {
    fn has(self, case: Case) -> bool {
        let is_main =
            matches!(case, Case::Tcp1 | Case::Tcp4 | Case::UdpSmall | Case::Udp1200 | Case::Ping);
        match self {
            Self::All => true,
            Self::Main => is_main,
            Self::Limit => is_main || case == Case::Tcp1Bbr,
            Self::Bound => matches!(case, Case::Tcp1 | Case::Tcp1Bbr),
        }
    }
}

/// Name of Tailscale's fork of wireguard-go.
const TAILSCALE: &str = "tailscale";
/// Name of the bare limit.
const LIMIT: &str = "limit";
/// Name of the bare limit without encryption.
const NULL: &str = "null";
/// Name of the cable without a tunnel.
const RAW: &str = "raw";
/// WireGuard engines of Towline, each with the name of the subject that is told to use it. The subject
/// [`NOW`] has one of them, which is not measured twice.
const ENGINES: [(&str, &str); 2] = [("batch", NOW_BATCH), ("boringtun", NOW_BORINGTUN)];
/// Names of the subjects that do not belong to another implementation.
const OWN: [&str; 7] = [NOW, BEFORE, NOW_BATCH, NOW_BORINGTUN, LIMIT, NULL, RAW];

/// Starts all subjects that are measured.
pub(super) fn gather(
    setting: &Setting,
    options: &Options,
    before: Option<&Binaries>,
    cases: &[Case],
    lab: &mut Lab,
    bench: &mut Bench,
) -> anyhow::Result<Vec<Contestant>> {
    let named = |name: &str| options.subjects.iter().any(|subject| subject == name);
    let wanted = |name: &str| named(name) || options.subjects.is_empty() && before.is_none();
    let mut contestants = Vec::new();
    if wanted(NOW) || before.is_some() {
        setting.output.step("starting a controller and two agents");
        let binaries = &setting.binaries;
        contestants.push(Contestant::towline(NOW, binaries, options, cases, lab)?);
        bench.subjects.insert(NOW, env!("CARGO_PKG_VERSION").to_owned());
    }
    if let Some(binaries) = before {
        setting.output.step("starting a controller and two agents of the other checkout");
        contestants.push(Contestant::towline(BEFORE, binaries, options, cases, lab)?);
        let output = Program::new(&binaries.towline)
            .arg("--version")
            .run_ok(lab.internet(), COMMAND_LIMIT)?;
        let version = output.split_whitespace().next_back().unwrap_or_default();
        bench.subjects.insert(BEFORE, version.to_owned());
    }
    for (engine, name) in ENGINES {
        if engine != bench.machine.engine && wanted(name) {
            setting.output.step(&format!("starting two agents with the engine {engine}"));
            let agents = Agents { engine: Some(engine), ..Agents::default() };
            let subject = Subject::towline(&setting.binaries, lab, name, agents).context(name)?;
            contestants.push(Contestant::new(name, subject, Range::Main));
            bench.subjects.insert(name, env!("CARGO_PKG_VERSION").to_owned());
        }
    }
    for (name, program) in programs(options, wanted, lab) {
        // The others take part in the main cases only, so that a run does not get long.
        let is_given = options.peer_binaries.iter().any(|given| given.name == name);
        let all = is_given || name == WireGuard::Go.name();
        let range = if all || options.full { Range::All } else { Range::Main };
        let over_v6 = range == Range::All && cases.contains(&Case::OuterV6);
        let started = program.and_then(|program| {
            setting.output.step(&format!("starting two instances of {name}"));
            let contestant = Contestant::other(name, &program, range, over_v6, lab);
            Ok((contestant.map_err(|error| format!("{error:#}"))?, program))
        });
        match started {
            Ok((contestant, program)) => {
                contestants.push(contestant);
                bench.subjects.insert(name, program.version);
                bench.dates.extend(program.date.map(|date| (name, date)));
            }
            Err(why) => bench.skipped.push(Skipped { name: name.to_owned(), why }),
        }
    }
    for (name, null) in [(LIMIT, false), (NULL, true)] {
        if wanted(name) {
            setting.output.step(&format!("starting the bare tunnel {name}"));
            let range = match null {
                true => Range::Bound,
                false if options.full => Range::All,
                false => Range::Limit,
            };
            contestants.push(Contestant::new(name, Subject::limit(setting, lab, null)?, range));
            bench.subjects.insert(name, env!("CARGO_PKG_VERSION").to_owned());
        }
    }
    if wanted(RAW) {
        contestants.push(Contestant::new(RAW, Subject::raw(lab)?, Range::Bound));
        bench.subjects.insert(RAW, "no tunnel".to_owned());
    }
    Ok(contestants)
}

/// Returns the other implementations to measure: the names of their subjects, and the programs or the
/// reasons why there are none.
fn programs(
    options: &Options,
    wanted: impl Fn(&str) -> bool,
    lab: &Lab,
) -> Vec<(&'static str, Result<Installed, String>)> {
    let given = |name: &str| options.peer_binaries.iter().find(|given| given.name == name);
    let known = WireGuard::ALL.into_iter().map(|which| (which, given(which.name())));
    let known = known.filter(|(which, given)| given.is_some() || wanted(which.name()));
    let known = known.map(|(which, given)| {
        let program = match given {
            Some(given) => given.install(which, lab),
            None => which.install(),
        };
        (which.name(), program)
    });
    let is_known = |name: &str| WireGuard::ALL.iter().any(|which| which.name() == name);
    let further = options.peer_binaries.iter().filter(|given| !is_known(&given.name));
    let further = further.map(|given| {
        // The figures keep the names of subjects until the process ends.
        let name: &'static str = given.name.clone().leak();
        (name, given.install(WireGuard::Go, lab))
    });
    let is_fork_built = wanted(TAILSCALE) && given(TAILSCALE).is_none();
    let fork = is_fork_built.then(|| (TAILSCALE, tailscale()));
    known.chain(further).chain(fork).collect()
}

impl PeerBinary {
    /// Returns the name of the subject.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Returns the program, to be started like an implementation that the lab knows.
    fn install(&self, like: WireGuard, lab: &Lab) -> Result<Installed, String> {
        let path = std::fs::canonicalize(&self.path)
            .map_err(|error| format!("cannot find {}: {error}", self.path.display()))?;
        let version = version_of(&path, lab).unwrap_or_else(|| "unknown version".to_owned());
        Ok(like.given(&path, version))
    }
}

/// Returns the first line that a program prints about its version.
fn version_of(program: &Path, lab: &Lab) -> Option<String> {
    let output = Program::new(program).arg("--version").run(lab.internet(), COMMAND_LIMIT).ok()?;
    let first = output.stdout.lines().next()?.trim();
    (!first.is_empty()).then(|| first.to_owned())
}

impl Contestant {
    fn new(name: &'static str, subject: Subject, range: Range) -> Self {
        Self { name, subject, over_v6: None, crowded: None, shared: None, ahead: None, range }
    }

    /// Starts another implementation with all tunnels that the cases need.
    fn other(
        name: &'static str,
        program: &Installed,
        range: Range,
        over_v6: bool,
        lab: &mut Lab,
    ) -> anyhow::Result<Self> {
        let subject = Subject::other(lab, name, program, Outer::V4)?;
        let over_v6 = over_v6.then(|| Subject::other(lab, name, program, Outer::V6)).transpose()?;
        Ok(Self { over_v6, ..Self::new(name, subject, range) })
    }

    /// Starts a build of Towline with all tunnels that the cases need.
    fn towline(
        name: &'static str,
        binaries: &Binaries,
        options: &Options,
        cases: &[Case],
        lab: &mut Lab,
    ) -> anyhow::Result<Self> {
        let mut subject = |kind: &str, agents| {
            Subject::towline(binaries, lab, &format!("{name}{kind}"), agents)
                .with_context(|| format!("{name}{kind}"))
        };
        let plain = Agents::default();
        let has = |case| cases.contains(&case);
        let is_shared = has(Case::Tcp4Workers2) || has(Case::PingWorkers2);
        let is_ordered = name == NOW && super::ordered(options);
        let is_shared = is_shared || is_ordered;
        // Helpers need the batch engine, which other processors have with ring as its cipher.
        let ahead = Agents { engine: Some("batch"), seal_ahead: Some(2), ..plain };
        Ok(Self {
            name,
            subject: subject("", plain)?,
            over_v6: has(Case::OuterV6)
                .then(|| subject("6", Agents { outer: Outer::V6, ..plain }))
                .transpose()?,
            crowded: has(Case::Peers1000)
                .then(|| subject("-many", Agents { peers: 1000, ..plain }))
                .transpose()?,
            shared: is_shared
                .then(|| subject("-two", Agents { workers: 2, ..plain }))
                .transpose()?,
            ahead: is_ordered.then(|| subject("-ahead", ahead)).transpose()?,
            range: Range::All,
        })
    }

    /// Returns the tunnel that a case uses, or `None` if this contestant does not run the case.
    pub(super) fn for_case(&self, case: Case) -> Option<&Subject> {
        match case {
            Case::OuterV6 => self.over_v6.as_ref(),
            Case::Peers1000 => self.crowded.as_ref(),
            Case::Tcp4Workers2 | Case::PingWorkers2 => self.shared.as_ref(),
            _ => self.range.has(case).then_some(&self.subject),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_program_has_a_name_of_its_own_and_a_path() {
        let given: PeerBinary = "tailscale=/opt/wireguard-go".parse().unwrap();
        assert_eq!(
            (given.name(), given.path.as_path()),
            ("tailscale", Path::new("/opt/wireguard-go"))
        );
        assert!("gotatun=a=b".parse::<PeerBinary>().is_ok(), "a path may contain `=`");
        for wrong in ["tailscale", "=/opt/x", "x=", "Two Words=/opt/x", "towline=/opt/x", "raw=/x"]
        {
            assert!(wrong.parse::<PeerBinary>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn bounds_are_measured_with_both_congestion_controls() {
        for range in [Range::All, Range::Limit, Range::Bound] {
            assert!(range.has(Case::Tcp1) && range.has(Case::Tcp1Bbr), "{range:?}");
        }
        assert!(!Range::Bound.has(Case::UdpSmall));
        assert!(!Range::Main.has(Case::Vxlan));
    }
}
