//! How often state that another program changed was restored lately.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Number of restorations from which another program is a problem. A program that starts, such as
/// systemd-networkd, changes things once or twice.
const MANY: usize = 5;
/// Time in which they are counted.
const PERIOD: Duration = Duration::from_secs(60);

/// Times of the last restorations, the newest last.
#[derive(Debug, Default)]
pub(super) struct Restorations(VecDeque<Instant>);

impl Restorations {
    /// Records that state was restored.
    pub(super) fn add(&mut self, now: Instant) {
        if self.0.len() == MANY {
            self.0.pop_front();
        }
        self.0.push_back(now);
    }

    /// Returns true if another program keeps changing the state.
    pub(super) fn are_many(&self, now: Instant) -> bool {
        let oldest = self.0.front().filter(|_| self.0.len() == MANY);
        oldest.is_some_and(|at| now.saturating_duration_since(*at) < PERIOD)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_restorations_are_no_problem_and_many_in_a_minute_are() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut restorations = Restorations::default();
        for second in 0..4 {
            restorations.add(at(second));
        }
        assert!(!restorations.are_many(at(4)));
        restorations.add(at(4));
        assert!(restorations.are_many(at(5)));
        assert!(!restorations.are_many(at(60)), "it ended");
        restorations.add(at(100));
        assert!(!restorations.are_many(at(100)), "one after a long time");
    }
}
