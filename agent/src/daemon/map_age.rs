//! Age of the map: how long ago a controller confirmed it. An operator may bound it, so that nobody keeps a removed
//! node in use by cutting other nodes off from the controllers.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

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
    /// Monotonic time of the start or, once a controller confirmed the map, of the last confirmation.
    at: Instant,
    /// Time since then in which the monotonic clock stood still, because the machine slept.
    slept: Duration,
    /// Last confirmation that an earlier run stored, in seconds since 1970. Cleared when a controller confirms
    /// the map: from then on the wall clock does not matter.
    earlier: Option<u64>,
    /// True if there is a stored confirmation.
    has_stored: bool,
    /// Clocks when this run last stored a confirmation.
    stored: Option<Clocks>,
    /// Confirmation that is being stored: the clocks at its time, and a receiver that gets a message on success.
    write: Option<(Clocks, oneshot::Receiver<()>)>,
}

/// Readings of both clocks at one moment.
#[derive(Debug, Clone, Copy)]
struct Clocks {
    /// Monotonic clock.
    at: Instant,
    /// Wall clock, in seconds since 1970.
    clock: u64,
}

impl Clocks {
    /// Returns whether the wall clock was set since these readings, by more than the age of a map may be wrong
    /// after a restart. A sleep of the machine counts too.
    fn is_set_since(&self, now: Instant, clock: u64) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs();
        self.clock.saturating_add(passed).abs_diff(clock) > STORE_PERIOD.as_secs()
    }
}

impl MapAge {
    /// Begins with the time of the last confirmation that was stored, in seconds since 1970. Without a stored
    /// one the map counts as confirmed now.
    pub(super) fn new(now: Instant, limit: Option<Duration>, stored: Option<u64>) -> Self {
        Self {
            limit,
            at: now,
            slept: Duration::ZERO,
            earlier: stored,
            has_stored: stored.is_some(),
            stored: None,
            write: None,
        }
    }

    /// Replaces the bound.
    pub(super) fn set_limit(&mut self, limit: Option<Duration>) {
        self.limit = limit;
    }

    /// Counts time in which the machine slept: the monotonic clock stood still.
    pub(super) fn slept(&mut self, time: Duration) {
        self.slept = self.slept.saturating_add(time);
    }

    /// A controller confirmed the map. If that has to be stored, returns where to report success. `clock` is in
    /// seconds since 1970.
    fn confirmed(&mut self, now: Instant, clock: u64) -> Option<oneshot::Sender<()>> {
        (self.at, self.slept, self.earlier) = (now, Duration::ZERO, None);
        self.finish_write();
        let is_due = self.stored.is_none_or(|stored| {
            now >= stored.at + STORE_PERIOD || stored.is_set_since(now, clock)
        });
        if !is_due || self.limit.is_none() || self.write.is_some() {
            return None;
        }
        let (stored, write) = oneshot::channel();
        self.write = Some((Clocks { at: now, clock }, write));
        Some(stored)
    }

    /// Takes the result of a write that has ended. One that failed is repeated with the next confirmation.
    fn finish_write(&mut self) {
        let Some((clocks, write)) = &mut self.write else { return };
        match write.try_recv() {
            Ok(()) => (self.stored, self.has_stored) = (Some(*clocks), true),
            Err(TryRecvError::Closed) => {}
            Err(TryRecvError::Empty) => return,
        }
        self.write = None;
    }

    /// Returns the time to store as that of a confirmation if there is a bound and none was ever stored, in seconds
    /// since 1970. Otherwise each restart would begin with a map that counts as new.
    fn first_confirmation(&self, now: Instant, clock: u64) -> Option<u64> {
        let is_missing = self.limit.is_some() && !self.has_stored;
        is_missing.then(|| self.confirmation(now, clock))
    }

    /// Returns the time to store instead of the one that this run stored, if the clock was set since. After a restart
    /// the map would be decades old if the clock was at 1970 then, and new without end if it was ahead. A sleep of
    /// the machine has to be added before.
    fn corrected_confirmation(&mut self, now: Instant, clock: u64) -> Option<u64> {
        // No confirmation may come that would take the result.
        self.finish_write();
        let is_set = self.stored.is_some_and(|stored| stored.is_set_since(now, clock));
        let is_due = is_set && self.limit.is_some() && self.write.is_none();
        is_due.then(|| self.confirmation(now, clock))
    }

    /// Returns the time of the last confirmation by a clock, in seconds since 1970.
    fn confirmation(&self, now: Instant, clock: u64) -> u64 {
        clock.saturating_sub(self.age(now, clock).as_secs())
    }

    /// Records that a confirmation was stored by a clock.
    fn stored_by(&mut self, now: Instant, clock: u64) {
        (self.stored, self.has_stored) = (Some(Clocks { at: now, clock }), true);
    }

    /// Returns how long ago a controller confirmed the map. `clock` is in seconds since 1970. It is read each time,
    /// because it may be wrong until the machine gets the time from a server. A confirmation in the future of the
    /// clock counts as one of now: a machine whose clock does not run while it is off starts in 1970, and would
    /// otherwise be cut off from the server that tells the time.
    fn age(&self, now: Instant, clock: u64) -> Duration {
        let counted = now.saturating_duration_since(self.at).saturating_add(self.slept);
        let by_clock = self.earlier.map_or(0, |earlier| clock.saturating_sub(earlier));
        counted.max(Duration::from_secs(by_clock))
    }

    /// Returns when the map gets too old. `None` without a bound.
    fn expires_at(&self, now: Instant, clock: u64) -> Option<Instant> {
        let left = self.limit?.saturating_sub(self.age(now, clock));
        now.checked_add(left)
    }

    fn is_expired(&self, now: Instant, clock: u64) -> bool {
        self.limit.is_some_and(|limit| self.age(now, clock) >= limit)
    }
}

impl Daemon {
    /// Handles that a controller confirmed the map.
    pub(super) fn map_confirmed(&mut self) {
        let clock = unix_seconds();
        if let Some(stored) = self.map_age.confirmed(Instant::now(), clock) {
            let state = self.state.clone();
            tokio::task::spawn_blocking(move || match state.store_confirmation(clock) {
                Ok(()) => {
                    // The daemon may have ended.
                    let _ = stored.send(());
                }
                Err(error) => tracing::debug!(%error, "age of the map not stored"),
            });
        }
        self.check_map_age();
    }

    /// Begins to bound the age of the map, at the start and with another bound.
    pub(super) fn begin_map_age(&mut self) {
        let (now, clock) = (Instant::now(), unix_seconds());
        if let Some(time) = self.map_age.first_confirmation(now, clock) {
            match self.state.store_confirmation(time) {
                Ok(()) => self.map_age.stored_by(now, clock),
                Err(error) => tracing::warn!(%error, "age of the map not stored"),
            }
        }
        self.check_map_age();
    }

    /// Corrects the time that is stored if the clock was set since.
    pub(super) fn correct_map_age(&mut self) {
        let (now, clock) = (Instant::now(), unix_seconds());
        if let Some(time) = self.map_age.corrected_confirmation(now, clock) {
            match self.state.store_confirmation(time) {
                Ok(()) => self.map_age.stored_by(now, clock),
                // It is tried again soon.
                Err(error) => tracing::debug!(%error, "age of the map not stored"),
            }
        }
    }

    /// Returns when to check the age of the map. `None` without a bound, and while the map is too old.
    pub(super) fn map_expires_at(&self) -> Option<Instant> {
        let expires_at = self.map_age.expires_at(Instant::now(), unix_seconds());
        expires_at.filter(|_| !self.mesh.is_map_expired())
    }

    /// Closes the tunnels to the nodes of a map that is too old, and opens them again once it was confirmed.
    pub(super) fn check_map_age(&mut self) {
        let now = Instant::now();
        let is_expired = self.map_age.is_expired(now, unix_seconds());
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
fn unix_seconds() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);
    /// Wall clock at the start of each test.
    const CLOCK: u64 = 1_000_000;

    /// Returns whether the map is expired this long after the start, with a clock that is right.
    fn is_expired(age: &MapAge, start: Instant, after: Duration) -> bool {
        age.is_expired(start + after, CLOCK + after.as_secs())
    }

    #[test]
    fn a_map_expires_when_no_controller_confirmed_it_for_so_long() {
        let start = Instant::now();
        let mut age = MapAge::new(start, Some(HOUR * 2), None);
        assert!(!is_expired(&age, start, HOUR));
        assert!(age.confirmed(start + HOUR, CLOCK + 3_600).is_some());
        assert!(!is_expired(&age, start, HOUR * 2));
        assert!(is_expired(&age, start, HOUR * 3));
        assert_eq!(age.expires_at(start + HOUR * 2, CLOCK + 7_200), Some(start + HOUR * 3));
        age.slept(HOUR);
        assert!(is_expired(&age, start, HOUR * 2), "it gets older while the machine sleeps");
        age.set_limit(None);
        assert!(!is_expired(&age, start, HOUR * 9_999));
    }

    #[test]
    fn a_restart_does_not_make_a_map_younger_and_a_clock_that_went_back_not_older() {
        let start = Instant::now();
        let restarted = |stored| MapAge::new(start, Some(HOUR * 2), Some(stored));
        let is_expired = |age: MapAge, after| is_expired(&age, start, after);
        assert!(is_expired(restarted(CLOCK - 7_200), Duration::ZERO));
        assert!(!is_expired(restarted(CLOCK - 7_000), Duration::ZERO));
        assert!(is_expired(restarted(CLOCK - 7_000), Duration::from_secs(200)));
        assert!(!is_expired(restarted(2 * CLOCK), HOUR));
        assert!(is_expired(restarted(0), Duration::ZERO));
    }

    #[test]
    fn a_clock_that_is_set_after_the_start_changes_the_age_until_a_controller_confirms_the_map() {
        let start = Instant::now();
        let minute = start + HOUR / 60;
        let mut age = MapAge::new(start, Some(HOUR * 2), Some(CLOCK - 3_600));
        assert!(age.is_expired(start, CLOCK * 2), "the clock was ahead");
        assert!(!age.is_expired(minute, CLOCK + 60));
        assert!(age.is_expired(start + HOUR * 2, 0), "but time that passed since the start counts");
        let mut late = MapAge::new(start, Some(HOUR * 2), Some(CLOCK - 7_200));
        assert!(!late.is_expired(start, 0), "the clock was behind");
        assert!(late.is_expired(minute, CLOCK + 60));
        for age in [&mut age, &mut late] {
            age.confirmed(minute, CLOCK + 60);
            assert!(!age.is_expired(minute + HOUR, CLOCK * 2));
        }
    }

    #[test]
    fn a_machine_that_starts_in_1970_uses_its_map_until_its_clock_is_set() {
        let start = Instant::now();
        let year_2026 = 1_780_000_000;
        for clock in [0, 30, year_2026 - 86_400] {
            let mut age = MapAge::new(start, Some(HOUR * 72), Some(year_2026));
            assert!(!age.is_expired(start, clock), "{clock}");
            assert_eq!(age.expires_at(start, clock), Some(start + HOUR * 72), "{clock}");
            assert_eq!(age.first_confirmation(start, clock), None);
            assert_eq!(age.corrected_confirmation(start, clock), None, "it was stored earlier");
            let minute = start + HOUR / 60;
            assert!(!age.is_expired(minute, year_2026 + 71 * 3_600));
            assert!(age.is_expired(minute, year_2026 + 72 * 3_600), "the age counts again");
            assert!(age.is_expired(start + HOUR * 72, clock + 72 * 3_600), "if it is never set");
        }
    }

    #[test]
    fn what_was_stored_by_a_wrong_clock_is_stored_again_once_the_clock_is_set() {
        let start = Instant::now();
        let limit = Some(HOUR * 2);
        let minute = start + HOUR / 60;
        for wrong in [0, CLOCK * 2] {
            let mut first = MapAge::new(start, limit, None);
            assert_eq!(first.first_confirmation(start, wrong), Some(wrong));
            first.stored_by(start, wrong);
            assert_eq!(first.corrected_confirmation(minute, wrong + 60), None);
            assert_eq!(first.corrected_confirmation(minute, CLOCK + 60), Some(CLOCK));
            first.stored_by(minute, CLOCK + 60);
            assert_eq!(first.corrected_confirmation(minute + HOUR, CLOCK + 3_660), None);
            let mut alone = MapAge::new(start, limit, None);
            alone.confirmed(start, wrong).unwrap().send(()).unwrap();
            let corrected = alone.corrected_confirmation(minute, CLOCK + 60);
            assert_eq!(corrected, Some(CLOCK), "no other confirmation came");
            let mut confirmed = MapAge::new(start, limit, Some(CLOCK));
            confirmed.confirmed(start, wrong).unwrap().send(()).unwrap();
            assert!(confirmed.confirmed(minute, wrong + 60).is_none(), "not due yet");
            let corrected = confirmed.corrected_confirmation(minute, CLOCK + 60);
            assert_eq!(corrected, Some(CLOCK + 60));
            let storing = confirmed.confirmed(minute, CLOCK + 60);
            assert!(storing.is_some(), "the clock was set");
            let corrected = confirmed.corrected_confirmation(minute, CLOCK + 60);
            assert_eq!(corrected, None, "it is being stored");
        }
    }

    #[test]
    fn a_sleep_makes_the_stored_map_no_younger() {
        let start = Instant::now();
        let mut age = MapAge::new(start, Some(HOUR * 72), None);
        age.stored_by(start, CLOCK);
        age.slept(HOUR * 48);
        let minute = start + HOUR / 60;
        assert_eq!(age.corrected_confirmation(minute, CLOCK + 48 * 3_600 + 60), Some(CLOCK));
    }

    #[test]
    fn the_first_start_with_a_bound_is_stored_once() {
        let start = Instant::now();
        let later = start + HOUR;
        let mut age = MapAge::new(start, None, None);
        assert_eq!(age.first_confirmation(start, CLOCK), None, "there is no bound");
        age.set_limit(Some(HOUR * 2));
        assert_eq!(age.first_confirmation(later, CLOCK), Some(CLOCK - 3_600));
        let restarted = MapAge::new(start, Some(HOUR * 2), Some(CLOCK - 3_600));
        assert_eq!(restarted.first_confirmation(later, CLOCK), None);
    }

    #[test]
    fn confirmations_are_stored_now_and_then_and_only_where_there_is_a_bound() {
        let start = Instant::now();
        let mut age = MapAge::new(start, Some(HOUR), None);
        let mut confirmed = |beat: u32| {
            let passed = Duration::from_secs(15) * beat;
            age.confirmed(start + passed, CLOCK + passed.as_secs())
        };
        let mut stored = 0;
        for beat in 0..240 {
            if let Some(done) = confirmed(beat) {
                done.send(()).unwrap();
                stored += 1;
            }
        }
        assert_eq!(stored, 6, "six in an hour");
        // One that fails is repeated, but not while it runs.
        let failing = confirmed(240).expect("one is due");
        assert!(confirmed(241).is_none());
        drop(failing);
        assert!(confirmed(242).is_some());
        let mut unbounded = MapAge::new(start, None, None);
        assert!(unbounded.confirmed(start, CLOCK).is_none());
    }
}
