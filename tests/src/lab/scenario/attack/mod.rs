//! `cargo lab attack`: what strangers, neighbours, local users, pods and members without rules can do
//! to a node, each attempt a case with the outcome that the design promises.
//!
//! | module | tries |
//! |---|---|
//! | [`oversized`] | datagrams of every size on the UDP port of a relay |
//! | [`inward`] | inner packets of a member with a raw tunnel, to where they must not go |
//! | [`sources`] | packets of a neighbour with this node's own sources |
//! | [`outward`] | traffic for the mesh in clear: ports, marks, fragments, with one guard or both |
//! | [`local`] | the TUN link, the state and the sockets of the agent, as another user |
//!
//! Some cases are controls: what has to work. An outcome that differs from the expected one is a
//! breach, for a control too. Cases run in the order of the list; each leaves the hosts as it found them.

mod inward;
mod local;
mod outward;
mod oversized;
mod sources;
mod stage;

use std::fmt::Write as _;

use serde::Serialize;

use super::Setting;
use crate::lab::interrupt;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises};
use stage::Stage;

/// How it is run.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// Every case; else those that show each kind once.
    #[arg(long)]
    pub full: bool,
    /// Only the cases whose name contains this.
    #[arg(long = "case", value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub cases: Vec<String>,
    /// Name the cases instead of running them.
    #[arg(long)]
    pub list: bool,
}

/// Who attacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attacker {
    /// Somewhere on the internet.
    Stranger,
    /// On the LAN of an uplink.
    Neighbour,
    /// A local user: root's programs, `nobody`, or `nobody` with `CAP_NET_RAW`.
    LocalUser,
    /// A network namespace behind a veth, forwarded by the host.
    Pod,
    /// A member of the mesh whose inner packets nobody checks.
    Member,
}

/// How an attempt ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The packet reached a socket.
    Delivered,
    /// It did not.
    Dropped,
    /// Nothing of the mesh left in clear.
    Held,
    /// Something did.
    InClear,
    /// The kernel or the agent said no.
    Refused,
    /// The attacker was let in.
    Granted,
    /// The agent went on as before.
    Works,
    /// It did not.
    Hangs,
}

/// An attempt.
pub(super) struct Case {
    name: String,
    attacker: Attacker,
    expected: Outcome,
    /// Part of the short form.
    is_short: bool,
    attempt: Attempt,
}

type Attempt = Box<dyn Fn(&mut Stage<'_>) -> anyhow::Result<Outcome>>;

impl Case {
    fn new(
        name: impl Into<String>,
        attacker: Attacker,
        expected: Outcome,
        attempt: impl Fn(&mut Stage<'_>) -> anyhow::Result<Outcome> + 'static,
    ) -> Self {
        let (name, attempt) = (name.into(), Box::new(attempt));
        Self { name, attacker, expected, is_short: true, attempt }
    }

    /// Leaves it to the long form.
    fn long(mut self) -> Self {
        self.is_short = false;
        self
    }

    fn is_chosen(&self, options: &Options) -> bool {
        if options.cases.is_empty() {
            return self.is_short || options.full;
        }
        options.cases.iter().any(|name| self.name.contains(name.as_str()))
    }
}

/// What was tried, and what came of it.
#[derive(Debug, Default, Serialize)]
pub struct Attack {
    /// The lab ran without root's rights over the machine.
    pub rootless: bool,
    /// Every case that ran, in order.
    pub cases: Vec<Tried>,
    /// How many ended otherwise than expected.
    pub breaches: usize,
    /// What could not run, and why.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// One case that ran.
#[derive(Debug, Serialize)]
pub struct Tried {
    /// Group, attempt and circumstances.
    pub name: String,
    /// Who made it.
    pub attacker: Attacker,
    /// What the design promises.
    pub expected: Outcome,
    /// What happened.
    pub got: Outcome,
}

/// One case that did not.
#[derive(Debug, Serialize)]
pub struct Skipped {
    /// Its name.
    pub name: String,
    /// In one line.
    pub why: String,
}

/// This machine cannot show the case.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unavailable(String);

fn every_case() -> Vec<Case> {
    [oversized::cases(), local::cases(), inward::cases(), sources::cases(), outward::cases()]
        .into_iter()
        .flatten()
        .collect()
}

/// The names of the cases, a line each; those of the long form alone say so.
pub fn list() -> String {
    every_case().into_iter().fold(String::new(), |mut text, case| {
        let _ = writeln!(text, "{}{}", case.name, if case.is_short { "" } else { "  (--full)" });
        text
    })
}

/// Runs it.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Attack> {
    let cases: Vec<Case> =
        every_case().into_iter().filter(|case| case.is_chosen(options)).collect();
    anyhow::ensure!(!cases.is_empty(), "no case has such a name: `cargo lab attack --list`");
    let mut stage = Stage::build(setting)?;
    let mut attack = Attack { rootless: setting.rank == Rank::Rootless, ..Attack::default() };
    let mut promises = Promises::new();
    if let Err(error) = stage.begin() {
        promises.fail(format!("{error:#}"));
    } else {
        attack.play(setting, &mut stage, &cases, &mut promises)?;
    }
    attack.failed = promises.into_failed();
    Ok(attack)
}

impl Attack {
    fn play(
        &mut self,
        setting: &Setting,
        stage: &mut Stage<'_>,
        cases: &[Case],
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        for Case { name, attacker, expected, attempt, .. } in cases {
            interrupt::check()?;
            setting.talk.progress(name);
            match attempt(stage) {
                Ok(got) => {
                    if got != *expected {
                        self.breaches += 1;
                        let found = format!("{name}: expected {expected:?}, got {got:?}");
                        setting.talk.note(&found);
                        promises.fail(found);
                    }
                    let (attacker, expected) = (*attacker, *expected);
                    self.cases.push(Tried { name: name.clone(), attacker, expected, got });
                }
                Err(error) if error.downcast_ref::<Unavailable>().is_some() => {
                    self.skipped.push(Skipped { name: name.clone(), why: format!("{error:#}") });
                }
                Err(error) => {
                    interrupt::check()?;
                    let failed = format!("{name} could not be tried: {error:#}");
                    setting.talk.note(&failed);
                    promises.fail(failed);
                    stage.recover()?;
                }
            }
        }
        Ok(())
    }
}

impl Figures for Attack {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = format!("{} attempts, {} breaches\n", self.cases.len(), self.breaches);
        for Tried { name, got, .. } in &self.cases {
            let _ = writeln!(text, "  {name}: {got:?}");
        }
        for Skipped { name, why } in &self.skipped {
            let _ = writeln!(text, "without {name}: {why}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own_and_the_short_form_has_every_attacker() {
        let cases = every_case();
        let names: BTreeSet<&str> = cases.iter().map(|case| &*case.name).collect();
        assert_eq!(names.len(), cases.len());
        let short: Vec<_> = cases.iter().filter(|case| case.is_short).collect();
        assert!(short.len() >= 25 && cases.len() >= 40, "{} of {}", short.len(), cases.len());
        for attacker in [
            Attacker::Stranger,
            Attacker::Neighbour,
            Attacker::LocalUser,
            Attacker::Pod,
            Attacker::Member,
        ] {
            assert!(short.iter().any(|case| case.attacker == attacker), "{attacker:?}");
        }
        assert_eq!(list().lines().count(), cases.len());
    }

    #[test]
    fn a_part_of_a_name_chooses_from_the_long_form_too() {
        let case = Case::new("a/b", Attacker::Pod, Outcome::Held, |_| Ok(Outcome::Held)).long();
        let named = |name: &str| Options { cases: vec![name.to_owned()], ..Options::default() };
        assert!(case.is_chosen(&named("/b")) && !case.is_chosen(&named("c")));
        assert!(!case.is_chosen(&Options::default()));
        assert!(case.is_chosen(&Options { full: true, ..Options::default() }));
    }
}
