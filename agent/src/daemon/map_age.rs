//! Age of the map: how long ago a controller confirmed it. An operator may bound it, so that nobody keeps a removed
//! node in use by cutting other nodes off from the controllers.

use std::time::{Duration, Instant};

use super::Daemon;
use super::problem::Problem;

/// Shortest time between two writes of the confirmation to the disk. A restart makes the map seem older by at
/// most that much.
const STORE_PERIOD: Duration = Duration::from_secs(600);

/// Age of the map, and the operator's bound.
#[derive(Debug)]
pub(super) struct MapAge {
    /// Longest age at which the map is used; `None`: any.
    limit: Option<Duration>,
    /// Monotonic time at which the map had the age [`Self::age`].
    at: Instant,
    age: Duration,
    /// Monotonic time at which a confirmation was stored last. `None` before the first time.
    stored_at: Option<Instant>,
}

impl MapAge {
    /// Begins with the time of the last confirmation that was stored. Both times are in seconds since 1970.
    /// Without a stored one the map counts as confirmed now.
    pub(super) fn new(
        now: Instant,
        limit: Option<Duration>,
        stored: Option<u64>,
        clock: u64,
    ) -> Self {
        let age = stored.map_or(0, |stored| clock.saturating_sub(stored));
        Self { limit, at: now, age: Duration::from_secs(age), stored_at: None }
    }

    /// Replaces the bound.
    pub(super) fn set_limit(&mut self, limit: Option<Duration>) {
        self.limit = limit;
    }

    /// Counts time in which the machine slept: the monotonic clock stood still.
    pub(super) fn slept(&mut self, time: Duration) {
        self.age = self.age.saturating_add(time);
    }

    /// A controller confirmed the map. Returns whether that has to be stored.
    fn confirmed(&mut self, now: Instant) -> bool {
        (self.at, self.age) = (now, Duration::ZERO);
        let is_due = self.stored_at.is_none_or(|at| now >= at + STORE_PERIOD);
        let is_stored = is_due && self.limit.is_some();
        if is_stored {
            self.stored_at = Some(now);
        }
        is_stored
    }

    /// Returns when the map gets too old. `None` without a bound.
    pub(super) fn expires_at(&self) -> Option<Instant> {
        let left = self.limit?.saturating_sub(self.age);
        self.at.checked_add(left)
    }

    fn is_expired(&self, now: Instant) -> bool {
        self.expires_at().is_some_and(|at| now >= at)
    }
}

impl Daemon {
    /// Handles that a controller confirmed the map.
    pub(super) fn map_confirmed(&mut self) {
        if self.map_age.confirmed(Instant::now()) {
            let (state, clock) = (self.state.clone(), unix_seconds());
            tokio::task::spawn_blocking(move || {
                if let Err(error) = state.store_confirmation(clock) {
                    tracing::debug!(%error, "age of the map not stored");
                }
            });
        }
        self.check_map_age();
    }

    /// Closes the tunnels to the nodes of a map that is too old, and opens them again once it was confirmed.
    pub(super) fn check_map_age(&mut self) {
        let now = Instant::now();
        let is_expired = self.map_age.is_expired(now);
        if is_expired == self.mesh.is_map_expired() {
            return;
        }
        if is_expired {
            tracing::error!("map too old: no controller confirmed it: tunnels to all nodes closed");
        } else {
            tracing::info!("map confirmed: tunnels may be used again");
        }
        self.mesh.set_map_expired(now, is_expired);
    }

    /// Returns the problem of a map that is too old.
    pub(super) fn map_problem(&self) -> Option<Problem> {
        let limit = self.map_age.limit.filter(|_| self.mesh.is_map_expired())?;
        Some(Problem::MapExpired { hours: limit.as_secs() / 3_600 })
    }
}

/// Returns the wall-clock time in seconds since 1970.
pub(super) fn unix_seconds() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn a_map_expires_when_no_controller_confirmed_it_for_so_long() {
        let start = Instant::now();
        let mut age = MapAge::new(start, Some(HOUR * 2), None, 1_000_000);
        assert!(!age.is_expired(start + HOUR));
        assert!(age.confirmed(start + HOUR));
        assert!(!age.is_expired(start + HOUR * 2));
        assert!(age.is_expired(start + HOUR * 3));
        age.slept(HOUR);
        assert!(age.is_expired(start + HOUR * 2), "it gets older while the machine sleeps");
        age.set_limit(None);
        assert!(!age.is_expired(start + HOUR * 9_999));
    }

    #[test]
    fn a_restart_does_not_make_a_map_younger_and_a_clock_that_went_back_not_older() {
        let start = Instant::now();
        let restarted = |stored| MapAge::new(start, Some(HOUR * 2), Some(stored), 1_000_000);
        assert!(restarted(1_000_000 - 7_200).is_expired(start));
        assert!(!restarted(1_000_000 - 7_000).is_expired(start));
        assert!(restarted(1_000_000 - 7_000).is_expired(start + Duration::from_secs(200)));
        assert!(!restarted(2_000_000).is_expired(start + HOUR));
        assert!(restarted(0).is_expired(start));
    }

    #[test]
    fn confirmations_are_stored_now_and_then_and_only_where_there_is_a_bound() {
        let start = Instant::now();
        let mut age = MapAge::new(start, Some(HOUR), None, 0);
        let stored = (0..240).filter(|beat| age.confirmed(start + Duration::from_secs(15) * *beat));
        assert_eq!(stored.count(), 6, "six in an hour");
        let mut unbounded = MapAge::new(start, None, None, 0);
        assert!(!unbounded.confirmed(start));
    }
}
