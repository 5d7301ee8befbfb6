//! Watchdog: notifies the service manager only while every worker of the data plane makes progress.
//!
//! The daemon's task checks the workers twice in each period. If a worker hangs, the notifications
//! stop and the service manager restarts the agent. Without a service manager, as in a pod, the
//! agent ends itself.

use std::time::{Duration, Instant};

/// Period that is used if the service manager has no watchdog.
const DEFAULT_PERIOD: Duration = Duration::from_secs(10);
/// Number of periods without progress after which a worker counts as stuck. A period is half of the
/// service manager's timeout.
const PERIODS: u32 = 2;

/// Watchdog of the data plane's workers. See the module documentation.
#[derive(Debug)]
pub(super) struct Watchdog {
    /// Half of the service manager's timeout.
    period: Duration,
    /// Time of the next check of the workers.
    due: Instant,
    /// Last time at which all workers had made progress.
    all_went_on: Instant,
    /// Number of stalled workers at the last check.
    stalled: usize,
}

/// Result of a check of the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// All workers made progress: the service manager has to be notified.
    Alive,
    /// Some workers made no progress; they may just be slow.
    Stalled {
        /// Number of stalled workers.
        workers: usize,
        /// True if no worker was stalled at the previous check.
        news: bool,
    },
    /// Some workers made no progress for too long.
    Stuck(StuckWorkers),
}

/// Error for workers that hang.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{workers} data plane workers made no progress for {for_long:?}: restart the agent")]
pub(super) struct StuckWorkers {
    /// Number of stuck workers.
    pub(super) workers: usize,
    /// Time since all workers last made progress.
    pub(super) for_long: Duration,
}

impl Watchdog {
    /// Creates a watchdog. `period` is the interval at which the service manager expects
    /// notifications, if it has a watchdog.
    pub(super) fn new(now: Instant, period: Option<Duration>) -> Self {
        let period = period.unwrap_or(DEFAULT_PERIOD);
        Self { period, due: now, all_went_on: now, stalled: 0 }
    }

    /// Returns when [`Watchdog::check`] has to be called next.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Evaluates a check of the workers, `stalled` of which made no progress since the last check.
    pub(super) fn check(&mut self, now: Instant, stalled: usize) -> Verdict {
        self.due = now + self.period / 2;
        let before = std::mem::replace(&mut self.stalled, stalled);
        if stalled == 0 {
            self.all_went_on = now;
            return Verdict::Alive;
        }
        let for_long = now.saturating_duration_since(self.all_went_on);
        if for_long >= self.period * PERIODS {
            return Verdict::Stuck(StuckWorkers { workers: stalled, for_long });
        }
        Verdict::Stalled { workers: stalled, news: before == 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_hears_of_us_only_while_every_worker_goes_on() {
        let start = Instant::now();
        let period = Duration::from_secs(10);
        let mut watchdog = Watchdog::new(start, Some(period));
        assert_eq!(watchdog.due(), start, "at once");
        let mut now = start;
        for _ in 0..10 {
            assert_eq!(watchdog.check(now, 0), Verdict::Alive);
            now = watchdog.due();
        }
        let last = now - period / 2;
        assert_eq!(watchdog.check(now, 1), Verdict::Stalled { workers: 1, news: true });
        now = watchdog.due();
        assert_eq!(watchdog.check(now, 1), Verdict::Stalled { workers: 1, news: false });
        now = watchdog.due();
        assert_eq!(watchdog.check(now, 0), Verdict::Alive, "it was only slow");
        let last = last.max(now);
        loop {
            now = watchdog.due();
            match watchdog.check(now, 2) {
                Verdict::Alive => panic!("no worker made progress"),
                Verdict::Stalled { .. } => assert!(now - last < 2 * period),
                Verdict::Stuck(stuck) => {
                    assert_eq!(stuck, StuckWorkers { workers: 2, for_long: 2 * period });
                    break;
                }
            }
        }
    }
}
