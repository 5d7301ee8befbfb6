//! When it is reported that inner packets travelled.

use std::time::{Duration, Instant};

use towline_core::peer_table::Observation;

/// Shortest time between two reports of inner traffic ([`Observation::Active`]).
const ACTIVE_EVERY: Duration = Duration::from_secs(1);

/// Inner traffic since the last report, and the time of that report.
#[derive(Debug, Default)]
pub(super) struct InnerTraffic {
    pub(super) sent: bool,
    pub(super) received: bool,
    /// True if packets came by the endpoint.
    pub(super) by_endpoint: bool,
    reported: Option<Instant>,
}

impl InnerTraffic {
    /// Returns the report that is due now. `None` without traffic, or within [`ACTIVE_EVERY`] of
    /// the last report.
    pub(super) fn take_report(&mut self, now: Instant) -> Option<Observation> {
        let soon = self
            .reported
            .is_some_and(|reported| now.saturating_duration_since(reported) < ACTIVE_EVERY);
        if soon || !(self.sent || self.received) {
            return None;
        }
        self.reported = Some(now);
        let (sent, received, by_endpoint) = (self.sent, self.received, self.by_endpoint);
        (self.sent, self.received, self.by_endpoint) = (false, false, false);
        Some(Observation::Active { sent, received, by_endpoint })
    }
}
