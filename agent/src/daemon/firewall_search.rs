//! Searches the firewalls of other programs for chains that drop traffic of the mesh. Their rule sets may
//! be large, and the daemon's task feeds the watchdog: so a search runs in a thread of its own.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use towline_host::{Obstacle, ObstacleSearch};
use towline_proto::pb;

/// Shortest interval between two searches: a program may ask for the status many times a second.
const SHORTEST: Duration = Duration::from_secs(1);
/// Interval between searches that nothing causes, so that the log tells what is found: iptables without
/// nftables notifies nobody.
const PERIOD: Duration = Duration::from_secs(60);
/// Time from a change of a firewall to the search: programs change their rules in several steps.
const SETTLE: Duration = Duration::from_millis(500);
/// Shortest time between two searches that changes cause, in multiples of the time that a search took. So a
/// program that changes a large rule set all the time, as kube-proxy does, costs at most 1 % of a core.
const REST: u32 = 100;
/// Greatest number of requests that wait for one search.
const WAITING: usize = 64;

/// Chains that drop traffic of the mesh, or why the firewalls were not read.
pub(super) type Found = Result<Vec<Obstacle>, String>;

/// Result of a search, and how long it took.
type Ended = (Found, Duration);

/// The running search, and the requests that wait for it.
pub(super) struct FirewallSearch {
    /// Set while a search runs.
    running: Option<oneshot::Receiver<Ended>>,
    /// Time of the next search that nothing causes.
    periodic: Instant,
    /// Time before which no search begins.
    earliest: Instant,
    /// Time of the first change since the last search began.
    changed: Option<Instant>,
    /// Time before which a change causes no search.
    rested: Instant,
    /// Requests for the status that are answered once the search ends.
    waiting: Vec<oneshot::Sender<pb::StatusResponse>>,
}

impl FirewallSearch {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            running: None,
            periodic: now + PERIOD,
            earliest: now,
            changed: None,
            rested: now,
            waiting: Vec::new(),
        }
    }

    /// Handles a change of another program's firewall.
    pub(super) fn changed(&mut self, now: Instant) {
        self.changed.get_or_insert(now);
    }

    /// Returns the time of the next search that nobody asks for. `None` while one runs.
    pub(super) fn due(&self) -> Option<Instant> {
        if self.running.is_some() {
            return None;
        }
        let caused = self.changed.map(|at| (at + SETTLE).max(self.rested).max(self.earliest));
        Some(caused.map_or(self.periodic, |at| at.min(self.periodic)))
    }

    /// Returns whether a search may begin now.
    pub(super) fn can_begin(&self, now: Instant) -> bool {
        self.running.is_none() && now >= self.earliest
    }

    /// Begins a search, if there is something to search.
    pub(super) fn begin(&mut self, now: Instant, search: Option<ObstacleSearch>) {
        (self.periodic, self.earliest, self.changed) = (now + PERIOD, now + SHORTEST, None);
        let Some(search) = search else { return };
        let (sender, receiver) = oneshot::channel();
        tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let found = search.run().map_err(|error| error.to_string());
            let _ = sender.send((found, began.elapsed()));
        });
        self.running = Some(receiver);
    }

    /// Keeps a request until the running search ends. Returns it if no search runs.
    pub(super) fn defer(
        &mut self,
        request: oneshot::Sender<pb::StatusResponse>,
    ) -> Option<oneshot::Sender<pb::StatusResponse>> {
        if self.running.is_none() || self.waiting.len() == WAITING {
            return Some(request);
        }
        self.waiting.push(request);
        None
    }

    /// Waits for the end of the running search, or forever if there is none. Cancel safe.
    pub(super) async fn finished(&mut self) -> Found {
        let Some(running) = &mut self.running else { return std::future::pending().await };
        let ended_early = |_| (Err("the search ended early".to_owned()), Duration::ZERO);
        let (found, took) = running.await.unwrap_or_else(ended_early);
        self.running = None;
        self.rest(Instant::now(), took);
        found
    }

    /// Sets how long changes cause no search, after one that took this long.
    fn rest(&mut self, now: Instant, took: Duration) {
        self.rested = now + took.saturating_mul(REST).min(PERIOD);
    }

    /// Returns the requests that waited for the search.
    pub(super) fn take_waiting(&mut self) -> Vec<oneshot::Sender<pb::StatusResponse>> {
        std::mem::take(&mut self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_causes_a_search_soon_and_many_changes_cause_few() {
        let start = Instant::now();
        let mut search = FirewallSearch::new(start);
        assert_eq!(search.due(), Some(start + PERIOD));
        search.changed(start);
        search.changed(start + SETTLE / 2);
        assert_eq!(search.due(), Some(start + SETTLE), "the first change counts");
        assert!(search.can_begin(start + SETTLE));

        // An ordinary host: the rules are read within milliseconds.
        let now = start + SETTLE;
        search.begin(now, None);
        search.rest(now, Duration::from_millis(10));
        assert_eq!(search.due(), Some(now + PERIOD));
        search.changed(now);
        assert!(search.due().unwrap() <= now + Duration::from_secs(2));

        // A host with many rules that change all the time.
        search.begin(now, None);
        search.rest(now, Duration::from_millis(200));
        search.changed(now + SETTLE);
        assert_eq!(search.due(), Some(now + Duration::from_secs(20)));
        search.rest(now, Duration::from_secs(10));
        assert_eq!(search.due(), Some(now + PERIOD), "as without changes");
        assert!(search.can_begin(now + SHORTEST), "an operator who asks gets the newest state");
    }

    #[test]
    fn no_search_is_due_while_one_runs() {
        let now = Instant::now();
        let mut search = FirewallSearch::new(now);
        let (_sender, receiver) = oneshot::channel();
        search.running = Some(receiver);
        search.changed(now);
        assert_eq!(search.due(), None);
        assert!(!search.can_begin(now + PERIOD));
    }
}
