//! When it is reported that a peer sends from another path than the one that is used for it.

use std::time::{Duration, Instant};

use towline_core::path::Path;

/// Shortest time between two reports. Each one has the peer table made again, so a peer that sends each datagram from
/// another port must not cause one for each.
const INTERVAL: Duration = Duration::from_secs(1);

/// Reports that one peer roamed: each path once, and one per second at most.
#[derive(Debug, Default)]
pub(super) struct RoamReports {
    /// Path of the last report. Cleared by [`Self::settle`].
    reported: Option<Path>,
    /// Time of the last report.
    at: Option<Instant>,
}

impl RoamReports {
    /// Returns whether to report an authentic datagram by the path `from`, which is not the path in use. One that comes
    /// too soon after a report is reported by a later datagram from there.
    pub(super) fn is_due(&mut self, from: Path, now: Instant) -> bool {
        let is_soon = self.at.is_some_and(|at| now < at + INTERVAL);
        if self.reported == Some(from) || is_soon {
            return false;
        }
        (self.reported, self.at) = (Some(from), Some(now));
        true
    }

    /// Forgets the reported path, because a datagram came by the path in use.
    pub(super) fn settle(&mut self) {
        self.reported = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(port: u16) -> Path {
        Path::direct(([192, 0, 2, 1], port).into())
    }

    #[test]
    fn a_peer_that_sends_each_datagram_from_another_port_is_reported_once_a_second() {
        let (mut reports, start) = (RoamReports::default(), Instant::now());
        let reported = (0..5_000u16).filter(|number| {
            let now = start + Duration::from_millis((*number).into());
            // It also sends from the path in use in between.
            reports.settle();
            reports.is_due(from(1_000 + number), now)
        });
        assert_eq!(reported.collect::<Vec<_>>(), [0, 1_000, 2_000, 3_000, 4_000]);
    }

    #[test]
    fn a_path_is_reported_once_and_again_after_the_peer_was_back() {
        let (mut reports, start) = (RoamReports::default(), Instant::now());
        assert!(reports.is_due(from(1), start));
        assert!(!reports.is_due(from(1), start + INTERVAL));
        assert!(reports.is_due(from(2), start + INTERVAL));
        reports.settle();
        assert!(!reports.is_due(from(2), start + INTERVAL), "too soon");
        assert!(reports.is_due(from(2), start + INTERVAL * 2));
    }
}
