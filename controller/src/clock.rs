//! The only module that reads the clocks. The [`registry`](towline_registry) gets a [`Now`] as an
//! argument.

use std::time::{Instant, SystemTime};

use towline_registry::Now;

/// Reads both clocks.
#[allow(clippy::disallowed_methods, reason = "this is where time enters")]
pub fn now() -> Now {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seconds = since_epoch.map_or(0, |since| since.as_secs());
    Now { unix: i64::try_from(seconds).unwrap_or(i64::MAX), mono: Instant::now() }
}

/// Returns the wall-clock time in milliseconds since 1970.
#[allow(clippy::disallowed_methods, reason = "this is where time enters")]
pub fn unix_millis() -> i64 {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since_epoch.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
