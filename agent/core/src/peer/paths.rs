//! The paths of one peer: what is known of each, and which is the best.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use towline_types::limits;

use crate::local_node::LocalNode;
use crate::path::Path;
use crate::prefixes::is_private;
use crate::rtt::Rtt;
use crate::status::PathStatus;

/// Largest number of paths that are remembered in addition to the candidates.
const MORE: usize = 8;
/// Largest number of relay channels of one peer that are remembered.
const CHANNELS: usize = 4;
/// Time for which a path is worth a try after something authentic came over it.
pub(super) const HEARD_FOR: Duration = Duration::from_secs(120);
/// Time for which a pong shows that a path works.
const WORKS_FOR: Duration = Duration::from_secs(15);
/// Difference of round-trip times from which on traffic moves to a path of the same tier: less is
/// noise.
const FASTER: Duration = Duration::from_millis(3);

/// What is known of a path.
#[derive(Debug, Default)]
pub(super) struct KnownPath {
    pub(super) rtt: Rtt,
    /// Time at which something authentic came over it last.
    pub(super) heard: Option<Instant>,
    /// Time at which a pong came over it last.
    pub(super) answered: Option<Instant>,
    pub(super) checked: Option<Instant>,
    /// Pongs since it was last silent for longer than [`WORKS_FOR`].
    answers: u32,
}

/// Kind of a path, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tier {
    /// Over a private network that both share.
    Site,
    /// Over the internet.
    Direct,
    /// Through a relay.
    Relayed,
}

impl Tier {
    pub(super) fn of(path: &Path) -> Self {
        if path.is_relayed() {
            Self::Relayed
        } else if is_private(path.remote.ip()) {
            Self::Site
        } else {
            Self::Direct
        }
    }
}

/// The known paths of one peer.
#[derive(Debug, Default)]
pub(super) struct Paths {
    known: BTreeMap<Path, KnownPath>,
}

impl Paths {
    pub(super) fn get(&self, path: &Path) -> Option<&KnownPath> {
        self.known.get(path)
    }

    /// Records that something authentic came over a path. Forgets the oldest path if there are too
    /// many, but not `keep`.
    pub(super) fn heard(&mut self, now: Instant, from: Path, keep: Option<Path>) -> &mut KnownPath {
        self.known.entry(from).or_default().heard = Some(now);
        let kept = |path: &Path| *path == from || Some(*path) == keep;
        let channels = self.known.keys().filter(|path| path.is_relayed()).count();
        let many = self.known.len() > limits::CANDIDATES + MORE;
        if many || channels > CHANNELS {
            let oldest = self
                .known
                .iter()
                .filter(|(path, _)| !kept(path) && (many || path.is_relayed()))
                .min_by_key(|(_, known)| known.heard)
                .map(|(path, _)| *path);
            if let Some(oldest) = oldest {
                self.known.remove(&oldest);
            }
        }
        self.known.entry(from).or_default()
    }

    /// Records a pong.
    pub(super) fn answered(&mut self, now: Instant, path: Path, keep: Option<Path>, rtt: Duration) {
        let known = self.heard(now, path, keep);
        if known.answered.is_none_or(|at| now >= at + WORKS_FOR) {
            known.answers = 0;
            known.rtt = Rtt::default();
        }
        known.answers += 1;
        known.answered = Some(now);
        known.rtt.sample(rtt);
    }

    /// Records a ping.
    pub(super) fn checked(&mut self, now: Instant, path: Path) {
        if let Some(known) = self.known.get_mut(&path) {
            known.checked = Some(now);
        }
    }

    /// Records a relay channel that was opened. Returns whether it is new.
    pub(super) fn opened(&mut self, now: Instant, path: Path, keep: Option<Path>) -> bool {
        let new = !self.known.contains_key(&path);
        self.heard(now, path, keep);
        new
    }

    /// Renames the paths after our uplinks changed, and forgets those whose uplink is gone.
    pub(super) fn follow_uplinks(&mut self, local: &LocalNode) {
        let known = std::mem::take(&mut self.known).into_iter();
        self.known = known.filter_map(|(path, known)| Some((local.still(path)?, known))).collect();
    }

    /// Forgets the paths that use the port which is not used outwards any more.
    pub(super) fn follow_port(&mut self, local: &LocalNode) {
        self.known.retain(|path, _| local.on_port(*path) == *path);
    }

    /// Returns the paths over which something came lately, the latest first.
    pub(super) fn recent(&self, now: Instant) -> Vec<Path> {
        let heard = self.known.iter().filter_map(|(path, known)| {
            let at = known.heard?;
            (now < at + HEARD_FOR).then_some((at, *path))
        });
        let mut heard: Vec<_> = heard.collect();
        heard.sort_unstable_by(|a, b| b.cmp(a));
        heard.truncate(MORE);
        heard.into_iter().map(|(_, path)| path).collect()
    }

    /// Returns the best path that answered within `fresh`, other than `than`.
    pub(super) fn best(&self, now: Instant, fresh: Duration, than: Option<Path>) -> Option<Path> {
        self.known
            .iter()
            .filter(|(path, known)| Some(**path) != than && works(known, now, fresh))
            .min_by_key(|(path, known)| (Tier::of(path), known.rtt.mean(), **path))
            .map(|(path, _)| *path)
    }

    /// Returns the path that traffic should move to from `current`, which works too: one of a
    /// better tier, or a clearly faster one that has answered a few times.
    pub(super) fn better(&self, now: Instant, current: Path) -> Option<Path> {
        let other = self.best(now, WORKS_FOR, Some(current))?;
        let (mine, known) = (self.known.get(&current), self.known.get(&other)?);
        if Tier::of(&other) != Tier::of(&current) {
            return (Tier::of(&other) < Tier::of(&current)).then_some(other);
        }
        let (now_rtt, then) = (mine.and_then(|mine| mine.rtt.mean())?, known.rtt.mean()?);
        let faster = then + FASTER < now_rtt && then * 5 < now_rtt * 4;
        (faster && known.answers >= 3).then_some(other)
    }

    /// Returns other working paths that are no worse in kind: worth a ping now and then.
    pub(super) fn alternatives(&self, now: Instant, current: Path) -> Vec<Path> {
        let of_use = self.known.iter().filter(|(path, known)| {
            **path != current
                && Tier::of(path) <= Tier::of(&current)
                && works(known, now, HEARD_FOR)
        });
        of_use.map(|(path, _)| *path).take(3).collect()
    }

    /// Returns whether any path answered after `since` and within [`HEARD_FOR`].
    pub(super) fn has_answered(&self, now: Instant, since: Instant) -> bool {
        let is_later = |known: &KnownPath| known.answered.is_some_and(|at| at > since);
        self.known.values().any(|known| is_later(known) && works(known, now, HEARD_FOR))
    }

    /// Returns whether a direct path to an address was ever answered.
    pub(super) fn has_answered_from(&self, remote: SocketAddr) -> bool {
        self.known.iter().any(|(path, known)| {
            path.remote == remote && !path.is_relayed() && known.answered.is_some()
        })
    }

    /// Returns every known path as the operator sees it, the best kind first.
    pub(super) fn statuses(&self, in_use: Option<Path>) -> impl Iterator<Item = PathStatus> {
        let mut known: Vec<_> = self.known.iter().collect();
        known.sort_by_key(|(path, known)| (Tier::of(path), known.rtt.mean(), **path));
        known.into_iter().map(move |(path, known)| PathStatus {
            path: *path,
            relay: None,
            in_use: in_use == Some(*path),
            rtt: known.rtt.mean(),
            heard: known.heard,
            answered: known.answered,
        })
    }

    pub(super) fn wait(&self, path: &Path) -> Duration {
        self.known.get(path).map_or(Rtt::default().wait(), |known| known.rtt.wait())
    }

    pub(super) fn rtt(&self, path: &Path) -> Option<Duration> {
        self.known.get(path)?.rtt.mean()
    }
}

fn works(known: &KnownPath, now: Instant, fresh: Duration) -> bool {
    known.answered.is_some_and(|at| now < at + fresh)
}
