//! The cases: which fault which controllers and etcd members have.

use std::fmt::{self, Display, Formatter};

use super::COUNT;
use crate::lab::scenario::selection::Entry;

/// Offset of a clock that is wrong, in seconds.
pub(super) const MINUTE: i64 = 60;

/// What happens to the targets of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// They are killed, and start again.
    Kill,
    /// They are stopped by SIGSTOP, and continue.
    Pause,
    /// They are cut off from the network.
    Partition,
    /// They are cut off, and etcd is compacted meanwhile.
    Compaction,
    /// They are told to stop, and start again: one step of a rolling restart.
    Stop,
    /// They stop as the earlier version, and start as this one: one step of a rolling upgrade.
    Upgrade,
    /// They run with a clock that is off by this number of seconds.
    Clock(i64),
}

/// A controller or an etcd member, with its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    /// A controller.
    Controller(usize),
    /// A member of the etcd cluster.
    Etcd(usize),
}

/// A case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// Kind of the fault.
    pub(super) kind: Kind,
    /// What has the fault, all at the same time.
    pub(super) targets: Vec<Target>,
}

impl Fault {
    /// Returns all cases, in the order in which they run: the upgrade is first, since the scenario begins with the
    /// earlier version then.
    pub(super) fn all() -> Vec<Self> {
        let mut faults: Vec<Self> =
            controllers().map(|target| Self::of(Kind::Upgrade, &[target])).collect();
        for kind in [Kind::Kill, Kind::Pause, Kind::Partition] {
            faults.extend(every_target().map(|target| Self::of(kind, &[target])));
        }
        faults.extend(every_target().map(|target| Self::of(Kind::Stop, &[target])));
        faults.extend(every_target().map(|target| Self::of(Kind::Compaction, &[target])));
        for offset in [MINUTE, -MINUTE] {
            faults.extend(controllers().map(|target| Self::of(Kind::Clock(offset), &[target])));
        }
        for kind in [Kind::Kill, Kind::Pause, Kind::Partition] {
            for first in every_target() {
                let second = every_target().filter(|second| first < *second);
                faults.extend(second.map(|second| Self::of(kind, &[first, second])));
            }
        }
        faults
    }

    /// Returns the cases as the command line selects them.
    pub(super) fn entries() -> Vec<Entry> {
        let entry = |fault: Self| Entry { name: fault.to_string(), is_short: fault.is_short() };
        Self::all().into_iter().map(entry).collect()
    }

    fn of(kind: Kind, targets: &[Target]) -> Self {
        Self { kind, targets: targets.to_vec() }
    }

    /// Returns whether the case runs without `--full`.
    pub(super) fn is_short(&self) -> bool {
        use Target::{Controller, Etcd};
        matches!(
            (self.kind, &self.targets[..]),
            (Kind::Kill | Kind::Pause | Kind::Partition, [_])
                | (Kind::Stop, [Controller(_)])
                | (Kind::Compaction, [Etcd(0)])
                | (Kind::Clock(MINUTE), [Controller(0)])
                | (Kind::Kill, [Controller(0), Controller(1)])
                | (Kind::Pause, [Controller(0), Etcd(0)])
                | (Kind::Partition, [Etcd(0), Etcd(1)])
        )
    }

    /// Returns whether a controller answers during the fault.
    pub(super) fn spares(&self, controller: usize) -> bool {
        matches!(self.kind, Kind::Clock(_))
            || !self.targets.contains(&Target::Controller(controller))
    }

    /// Returns whether most members of etcd reach each other during the fault.
    pub(super) fn has_quorum(&self) -> bool {
        let is_member = |target: &&Target| matches!(target, Target::Etcd(_));
        let away = self.targets.iter().filter(is_member).count();
        COUNT - away > COUNT / 2
    }

    /// Returns the number of an etcd member that the fault spares, if there is one.
    pub(super) fn spared_member(&self) -> Option<usize> {
        (0..COUNT).find(|number| !self.targets.contains(&Target::Etcd(*number)))
    }
}

fn controllers() -> impl Iterator<Item = Target> {
    (0..COUNT).map(Target::Controller)
}

fn every_target() -> impl Iterator<Item = Target> {
    controllers().chain((0..COUNT).map(Target::Etcd))
}

impl Display for Fault {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            Kind::Kill => "kill",
            Kind::Pause => "pause",
            Kind::Partition => "partition",
            Kind::Compaction => "compaction",
            Kind::Stop => "restart",
            Kind::Upgrade => "upgrade",
            Kind::Clock(offset) if offset > 0 => "clock_ahead",
            Kind::Clock(_) => "clock_behind",
        })?;
        for target in &self.targets {
            match target {
                Target::Controller(number) => write!(f, "_controller_{number}")?,
                Target::Etcd(number) => write!(f, "_etcd_{number}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_target_alone_and_every_pair_is_killed_paused_and_cut_off() {
        let all = Fault::all();
        let names: BTreeSet<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), all.len(), "each has a name of its own");
        for kind in ["kill", "pause", "partition"] {
            let of_kind = || names.iter().filter(|name| name.starts_with(&format!("{kind}_")));
            assert_eq!(of_kind().count(), 6 + 15, "{kind}");
            let pairs = of_kind().filter(|name| name.matches("etcd").count() == 2).count();
            assert_eq!(pairs, 3, "{kind}");
        }
        for name in [
            "kill_controller_0",
            "partition_controller_1_etcd_2",
            "compaction_etcd_1",
            "clock_ahead_controller_0",
            "clock_behind_controller_2",
            "restart_controller_1",
            "upgrade_controller_2",
        ] {
            assert!(names.contains(name), "{name}");
        }
    }

    #[test]
    fn two_members_of_etcd_are_needed() {
        let named =
            |name: &str| Fault::all().into_iter().find(|fault| fault.to_string() == name).unwrap();
        assert!(named("kill_etcd_1").has_quorum());
        assert!(!named("kill_etcd_0_etcd_1").has_quorum());
        assert_eq!(named("compaction_etcd_0").spared_member(), Some(1));
        let pair = named("pause_controller_0_etcd_2");
        assert!(pair.has_quorum() && !pair.spares(0) && pair.spares(1));
        assert!(named("clock_ahead_controller_0").spares(0));
    }
}
