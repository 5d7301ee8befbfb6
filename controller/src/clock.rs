//! The one place where the clocks are read. What decides (`registry`) is given a [`Now`].

use std::time::{Duration, Instant, SystemTime};

/// A moment, on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Seconds since 1970: for what is written down and told to others.
    pub unix: i64,
    /// For durations within this process: never set back.
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

    /// The same moment, some time later on both clocks.
    #[must_use]
    pub fn plus(self, later: Duration) -> Self {
        let seconds = i64::try_from(later.as_secs()).unwrap_or(i64::MAX);
        Self { unix: self.unix.saturating_add(seconds), mono: self.mono + later }
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    pub fn since(self, earlier: Instant) -> Duration {
        self.mono.saturating_duration_since(earlier)
    }
}

/// Milliseconds since 1970.
#[allow(clippy::disallowed_methods, reason = "this is where time enters")]
pub fn unix_millis() -> i64 {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since_epoch.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
