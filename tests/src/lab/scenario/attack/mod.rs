//! `cargo lab attack`: attacks a node as strangers, neighbours, local users, pods, and members that
//! ignore the protocol's rules. Each case is one attempt with the outcome that the design promises.
//!
//! | module | attack |
//! |---|---|
//! | [`oversized`] | datagrams of every size to the UDP port of a relay |
//! | [`probes`] | probes that are replayed, forged, or sealed by a member for somebody else's address |
//! | [`inward`] | inner packets of a member with a raw tunnel, to forbidden addresses |
//! | [`sources`] | packets of a neighbour with a source of this node or of the mesh |
//! | [`outward`] | traffic for the mesh that might leave in clear, with one guard or both |
//! | [`records`] | records of a member with its own discovery client, and settings of a dishonest controller |
//! | [`removals`] | a member that was removed, on a node that cannot reach the controller |
//! | [`relay`] | an evil relay between two nodes |
//! | [`local`] | access of another user to the TUN link, the state and the sockets of the agent |
//!
//! Some cases are controls, which must succeed. Any outcome other than the expected one is a
//! breach, also for a control. Cases run in the order of the list. Each leaves the hosts as it
//! found them, except those of [`relay`], which come last.

mod flooded_path;
mod inward;
mod local;
mod outward;
mod oversized;
mod probes;
mod records;
mod relay;
mod removals;
mod sources;
mod stage;

use std::fmt::Write as _;

use serde::Serialize;

use super::Setting;
use super::selection::{Entry, Selection};
use crate::lab::interrupt;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, Skipped};
use stage::Stage;

/// Position of the attacker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attacker {
    /// A host on the internet.
    Stranger,
    /// A host on the LAN of an uplink.
    Neighbour,
    /// A local user: a program of root, `nobody`, or `nobody` with `CAP_NET_RAW`.
    LocalUser,
    /// A network namespace behind a veth pair. The host forwards its packets.
    Pod,
    /// A member of the mesh that sends any inner packet and publishes any record, without the checks of an
    /// agent.
    Member,
    /// A controller whose configuration of the mesh is not in the nodes' interest.
    Controller,
    /// A relay of the mesh that carries the traffic of two nodes.
    Relay,
}

/// Outcome of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// A socket received the packet.
    Delivered,
    /// No socket received the packet.
    Dropped,
    /// No traffic of the mesh left in clear.
    Held,
    /// Some traffic of the mesh left in clear.
    InClear,
    /// The kernel or the agent refused the request.
    Refused,
    /// The attacker got access.
    Granted,
    /// The agent still works.
    Works,
    /// The agent hangs, or did not exit as it should.
    Hangs,
}

/// An attempt with its expected outcome.
pub(super) struct Case {
    name: String,
    attacker: Attacker,
    expected: Outcome,
    /// True if the case also runs without `--full`.
    is_short: bool,
    attempt: Attempt,
}

/// Function that makes the attempt and returns its outcome.
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

    /// Restricts the case to runs with `--full`.
    fn long(mut self) -> Self {
        self.is_short = false;
        self
    }
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Attack {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Cases that ran, in order.
    pub cases: Vec<Tried>,
    /// Number of cases with an unexpected outcome.
    pub breaches: usize,
    /// Cases that could not run on this machine.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// A case that ran.
#[derive(Debug, Serialize)]
pub struct Tried {
    /// Name of the case: group, attempt and circumstances, separated by slashes.
    pub name: String,
    /// Position of the attacker.
    pub attacker: Attacker,
    /// Outcome that the design promises.
    pub expected: Outcome,
    /// Outcome that was observed.
    pub got: Outcome,
}

/// Reason why this machine cannot run a case.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unavailable(String);

/// Returns all cases, in the order in which they run.
fn every_case() -> Vec<Case> {
    let groups = [
        oversized::cases(),
        probes::cases(),
        local::cases(),
        inward::cases(),
        sources::cases(),
        outward::cases(),
        records::cases(),
        removals::cases(),
        relay::cases(),
    ];
    groups.into_iter().flatten().collect()
}

/// Returns the cases as the command line selects them.
pub fn entries() -> Vec<Entry> {
    let entry = |case: Case| Entry { name: case.name, is_short: case.is_short };
    every_case().into_iter().map(entry).collect()
}

/// Runs the selected cases.
pub fn run(setting: &Setting, selection: &Selection) -> anyhow::Result<Attack> {
    let mut cases = every_case();
    cases.retain(|case| selection.has(&case.name, case.is_short));
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
    /// Runs the cases and records their outcomes.
    fn play(
        &mut self,
        setting: &Setting,
        stage: &mut Stage<'_>,
        cases: &[Case],
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        for Case { name, attacker, expected, attempt, .. } in cases {
            interrupt::check()?;
            setting.output.progress(name);
            match attempt(stage) {
                Ok(got) => {
                    if got != *expected {
                        self.breaches += 1;
                        let found = format!("{name}: expected {expected:?}, got {got:?}");
                        setting.output.note(&found);
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
                    let failed = format!("{name} could not run: {error:#}");
                    setting.output.note(&failed);
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
        for skipped in &self.skipped {
            let _ = writeln!(text, "{skipped}");
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
            Attacker::Controller,
            Attacker::Relay,
        ] {
            assert!(short.iter().any(|case| case.attacker == attacker), "{attacker:?}");
        }
    }
}
