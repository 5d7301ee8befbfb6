//! The only module that reads the clocks. The [`registry`](crate::registry) gets a [`Now`] as an
//! argument.

use std::time::{Duration, Instant, SystemTime};

/// The current time on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Wall-clock time in seconds since 1970, for values that are stored or sent.
    pub unix: i64,
    /// Monotonic time, for durations within this process.
    pub mono: Instant,
}

impl Now {
    /// Reads both clocks.
    #[allow(clippy::disallowed_methods, reason = "this is where time enters")]
    pub fn read() -> Self {
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let seconds = since_epoch.map_or(0, |since| since.as_secs());
        Self { unix: i64::try_from(seconds).unwrap_or(i64::MAX), mono: Instant::now() }
    }

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

/// Returns the wall-clock time in milliseconds since 1970.
#[allow(clippy::disallowed_methods, reason = "this is where time enters")]
pub fn unix_millis() -> i64 {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since_epoch.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
