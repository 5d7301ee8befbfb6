//! Whether the agent goes on: the service manager hears of it only while every worker of the data
//! plane went through its loop.
//!
//! The daemon's task asks twice in each period. A worker that hangs is not heard of again, and the
//! service manager starts the agent again; where there is none, as in a pod, the agent ends itself.

use std::time::{Duration, Instant};

/// Stands for the period of a service manager that has no watchdog.
const DEFAULT_PERIOD: Duration = Duration::from_secs(10);
/// Periods without a sign of life after which a worker is given up. A period is half of the time
/// after which the service manager acts.
const PERIODS: u32 = 2;

/// See the module.
#[derive(Debug)]
pub(super) struct Watchdog {
    /// Half of the service manager's limit.
    period: Duration,
    /// When the workers are looked at next.
    due: Instant,
    /// When all of them went on last.
    all_went_on: Instant,
    /// Workers that were stalled when they were looked at last.
    stalled: usize,
}

/// What follows from a look at the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// All went on: the service manager is told.
    Alive,
    /// Some did not go on, but may be slow. `news`: so it was not last time.
    Stalled {
        /// Number of workers.
        workers: usize,
        /// It is the first look that shows it.
        news: bool,
    },
    /// Some did not go on for too long.
    Stuck(StuckWorkers),
}

/// Workers that hang.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{workers} of the data plane's workers hung for {for_long:?}: the agent has to be started again"
)]
pub(super) struct StuckWorkers {
    /// Number of workers.
    pub(super) workers: usize,
    /// How long there was no sign of life.
    pub(super) for_long: Duration,
}

impl Watchdog {
    /// `period`: how often the service manager wants to hear of us, if it does.
    pub(super) fn new(now: Instant, period: Option<Duration>) -> Self {
        let period = period.unwrap_or(DEFAULT_PERIOD);
        Self { period, due: now, all_went_on: now, stalled: 0 }
    }

    /// When [`Watchdog::check`] is to be called next.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Judges a look at the workers, `stalled` of which did not go on since the last one.
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
                Verdict::Alive => panic!("nobody went on"),
                Verdict::Stalled { .. } => assert!(now - last < 2 * period),
                Verdict::Stuck(stuck) => {
                    assert_eq!(stuck, StuckWorkers { workers: 2, for_long: 2 * period });
                    break;
                }
            }
        }
    }
}
