//! The current time, which every operation gets as an argument.

use std::time::{Duration, Instant};

/// The current time on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Wall-clock time in seconds since 1970, for values that are stored or sent.
    pub unix: i64,
    /// Monotonic time, for durations within this process.
    pub mono: Instant,
}

impl Now {
    /// Returns the time after `later` has passed on both clocks.
    #[must_use]
    pub fn plus(self, later: Duration) -> Self {
        let seconds = i64::try_from(later.as_secs()).unwrap_or(i64::MAX);
        Self { unix: self.unix.saturating_add(seconds), mono: self.mono + later }
    }

    /// Returns the time that has passed since `earlier`; zero if it is in the future.
    pub fn since(self, earlier: Instant) -> Duration {
        self.mono.saturating_duration_since(earlier)
    }
}
