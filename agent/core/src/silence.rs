//! Whether anybody on the internet answers us over UDP.

use std::time::{Duration, Instant};

use crate::path::Path;
use crate::prefixes::is_behind_nat;

/// Number of requests without an answer from which on the internet is silent: one or two answers may
/// still be on their way.
const REQUESTS: u32 = 4;
/// Time for which the answer of a reflector shows that UDP works. It is asked every 20 s.
const REFLECTED_FOR: Duration = Duration::from_secs(45);

/// Requests to public IPv4 addresses, and whether any peer or relay answered them.
#[derive(Debug, Default)]
pub(crate) struct Silence {
    /// Time of the first request since the last answer.
    since: Option<Instant>,
    /// Number of requests since the last answer.
    requests: u32,
    /// Time at which a reflector answered last.
    reflected: Option<Instant>,
}

impl Silence {
    /// Records a request to a peer or a relay.
    pub(crate) fn asked(&mut self, now: Instant, path: &Path) {
        if is_behind_nat(path.remote) {
            self.since.get_or_insert(now);
            self.requests = self.requests.saturating_add(1);
        }
    }

    /// Records that a peer or a relay answered. Returns whether the silence had begun.
    pub(crate) fn answered(&mut self, path: &Path) -> bool {
        if !is_behind_nat(path.remote) {
            return false;
        }
        let had_begun = self.begun().is_some();
        self.restart();
        had_begun
    }

    /// Records the answer of a reflector.
    pub(crate) fn reflected(&mut self, now: Instant) {
        self.reflected = Some(now);
    }

    /// Forgets the requests: they were sent under other conditions.
    pub(crate) fn restart(&mut self) {
        (self.since, self.requests) = (None, 0);
    }

    /// Returns since when requests are not answered, once there were a few.
    pub(crate) fn begun(&self) -> Option<Instant> {
        self.since.filter(|_| self.requests >= REQUESTS)
    }

    /// Returns whether a reflector answered lately.
    pub(crate) fn is_reflected(&self, now: Instant) -> bool {
        self.reflected.is_some_and(|at| now < at + REFLECTED_FOR)
    }
}
