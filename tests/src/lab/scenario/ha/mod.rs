//! `cargo lab ha`: three controllers share three etcd members. Each of the six is killed, paused and cut off from the
//! network in turn and in pairs; etcd is compacted while a part is cut off; clocks are a minute off; controllers are
//! restarted, and upgraded one after the other. Meanwhile operators create, revoke and remove at all controllers,
//! machines join with tokens for one, two nodes claim the same network, and all nodes send to each other.
//!
//! | file | owns |
//! |---|---|
//! | `fault.rs` | the cases |
//! | `world.rs` | hosts and programs; the beginning and the end of a fault |
//! | `operations.rs` | what is done during a fault |
//! | `member.rs` | a member of etcd |
//! | `flows.rs` | the traffic during a case |
//! | `history.rs`, `linear.rs` | the check of the recorded operations; the model of a token |
//!
//! The clock of an etcd member cannot be changed here: it is no program that uses the C library. It counts the time
//! of leases with a clock that nobody can set.

mod fault;
mod flows;
mod history;
mod linear;
pub(super) mod member;
mod operations;
mod world;

use std::fmt::Write as _;

use clap::builder::RangedU64ValueParser;
use serde::Serialize;

use super::Setting;
use super::selection::{Entry, Selection};
use crate::lab::binaries::{Binaries, require_commit};
use crate::lab::clock::OtherClock;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, Skipped};

use fault::{Fault, Kind};
use world::World;

/// Number of controllers, and of etcd members.
const COUNT: usize = 3;
/// Number of agents in the short form: two that claim the same networks, and others that see who holds them.
const AGENTS: usize = 4;
/// Number of agents with `--full`.
const AGENTS_FULL: usize = 30;
/// Commit of the earliest version whose controllers can share a store. A rolling upgrade begins with it.
const EARLIER: &str = "83d79173cd99a7b9755c6a3e2f4ba880818ce813";

/// Command line options of the scenario.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// Cases to run.
    #[command(flatten)]
    pub selection: Selection,
    /// Number of agents: 4, or 30 with --full
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(4..=100))]
    pub agents: Option<usize>,
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Ha {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Number of agents.
    pub agents: usize,
    /// Number of operations that the checker looked at.
    pub operations: usize,
    /// Results of the cases.
    pub cases: Vec<Case>,
    /// Cases that this machine cannot show.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Result of a case. What is counted in the history is counted from its beginning to this case.
#[derive(Debug, Default, Serialize)]
pub struct Case {
    /// Name of the fault, and of what had it.
    pub name: String,
    /// Changes that were acknowledged during the fault.
    pub acknowledged: usize,
    /// Acknowledged changes that a controller did not list afterwards, over all controllers.
    pub lost_writes: usize,
    /// Tokens for one node that admitted more.
    pub double_spent_tokens: usize,
    /// Tokens whose operations no order explains.
    pub not_linearizable: usize,
    /// Nodes that were refused, and that a controller listed all the same.
    pub admitted_refused: usize,
    /// Pairs of nodes with the same address or with overlapping networks.
    pub overlapping_prefixes: usize,
    /// True if all controllers answered after the fault, and listed the same.
    pub controllers_agree: bool,
    /// True if all nodes agreed in the end which one holds the network that two had claimed during the fault.
    pub network_held: bool,
    /// Pairs of nodes that did not answer each other during the fault, or whose traffic was interrupted.
    pub tunnels_lost: usize,
    /// Longest time without an answer between two nodes, from the beginning to the end of the case, in milliseconds.
    pub traffic_gap_ms: f64,
    /// Time from an acknowledged change at one controller until another one listed it, in milliseconds. It is measured
    /// during the fault where two controllers can serve, and after it otherwise.
    pub stale_ms: f64,
}

/// Returns the cases as the command line selects them.
pub fn entries() -> Vec<Entry> {
    Fault::entries()
}

/// Runs the selected cases and returns their results.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Ha> {
    let agents =
        options.agents.unwrap_or(if options.selection.full { AGENTS_FULL } else { AGENTS });
    let mut figures = Ha { rootless: setting.rank == Rank::Rootless, agents, ..Ha::default() };
    let mut faults = Fault::all();
    faults.retain(|fault| options.selection.has(&fault.to_string(), fault.is_short()));
    let earlier = figures.earlier(&mut faults)?;
    let mut promises = Promises::new();
    let mut world = World::build(setting, agents, earlier.as_ref())?;
    if faults.iter().any(|fault| matches!(fault.kind, Kind::Clock(_))) {
        match OtherClock::compile(world.lab()) {
            Ok(clock) => world.set_clock(clock),
            Err(why) => figures.skip(&mut faults, &why, |kind| matches!(kind, Kind::Clock(_))),
        }
    }
    for fault in faults {
        setting.output.step(&fault.to_string());
        match world.run(setting, &fault) {
            Ok(case) => {
                case.check(&mut promises);
                figures.cases.push(case);
            }
            Err(error) => {
                // What follows would be measured with the rest of this fault.
                promises.fail(format!("{fault}: {error:#}"));
                break;
            }
        }
    }
    figures.operations = world.operations();
    figures.failed = promises.into_failed();
    Ok(figures)
}

impl Ha {
    /// Returns the daemons of the earlier version if a case needs them. Where they cannot be built, those cases are
    /// skipped.
    fn earlier(&mut self, faults: &mut Vec<Fault>) -> anyhow::Result<Option<Binaries>> {
        if !faults.iter().any(|fault| fault.kind == Kind::Upgrade) {
            return Ok(None);
        }
        match require_commit(EARLIER) {
            Ok(()) => Binaries::build_commit(EARLIER).map(Some),
            Err(error) => {
                self.skip(faults, &format!("{error:#}"), |kind| kind == Kind::Upgrade);
                Ok(None)
            }
        }
    }

    /// Removes the cases of some kinds, and says why.
    fn skip(&mut self, faults: &mut Vec<Fault>, why: &str, is_skipped: impl Fn(Kind) -> bool) {
        for fault in faults.extract_if(.., |fault| is_skipped(fault.kind)) {
            self.skipped.push(Skipped { name: fault.to_string(), why: why.to_owned() });
        }
    }
}

impl Case {
    fn check(&self, promises: &mut Promises) {
        let counts = [
            ("lost_writes", self.lost_writes),
            ("double_spent_tokens", self.double_spent_tokens),
            ("not_linearizable", self.not_linearizable),
            ("admitted_refused", self.admitted_refused),
            ("overlapping_prefixes", self.overlapping_prefixes),
            ("tunnels_lost", self.tunnels_lost),
        ];
        for (what, count) in counts {
            promises.hold(count == 0, || format!("{}: {what}: {count}", self.name));
        }
        promises.hold(self.controllers_agree, || {
            format!("{}: controllers_agree: they do not list the same", self.name)
        });
        promises.hold(self.network_held, || {
            format!("{}: the nodes do not agree which one holds a network", self.name)
        });
    }
}

impl Figures for Ha {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for case in &self.cases {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{}: {} changes acknowledged, {} lost; {} tokens spent twice, {} without an order; {} overlaps; {} \
                 tunnels lost, longest gap {} ms; shown elsewhere after {} ms{}",
                case.name,
                case.acknowledged,
                case.lost_writes,
                case.double_spent_tokens,
                case.not_linearizable,
                case.overlapping_prefixes,
                case.tunnels_lost,
                case.traffic_gap_ms,
                case.stale_ms,
                if case.controllers_agree { "" } else { "; the controllers do not agree" }
            );
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "{skipped}");
        }
        let _ = write!(text, "{} operations checked, {} agents", self.operations, self.agents);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_promise_of_a_case_is_held() {
        let failed = |case: Case| {
            let mut promises = Promises::new();
            case.check(&mut promises);
            promises.into_failed().len()
        };
        let good = || Case { controllers_agree: true, network_held: true, ..Case::default() };
        assert_eq!(failed(good()), 0);
        assert_eq!(failed(Case { controllers_agree: false, ..good() }), 1);
        assert_eq!(failed(Case { network_held: false, ..good() }), 1);
        assert_eq!(failed(Case { admitted_refused: 1, ..good() }), 1);
        assert_eq!(failed(Case { lost_writes: 1, double_spent_tokens: 1, ..good() }), 2);
    }
}
