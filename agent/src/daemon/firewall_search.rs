//! Searches the firewalls of other programs for chains that drop traffic of the mesh. Their rule sets may
//! be large, and the daemon's task feeds the watchdog: so a search runs in a thread of its own.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use towline_host::{Obstacle, ObstacleSearch};
use towline_proto::pb;

/// Shortest interval between two searches: a program may ask for the status many times a second.
const SHORTEST: Duration = Duration::from_secs(1);
/// Interval between searches that nobody asks for, so that the log tells what is found.
const PERIOD: Duration = Duration::from_secs(60);
/// Greatest number of requests that wait for one search.
const WAITING: usize = 64;

/// Chains that drop traffic of the mesh, or why the firewalls were not read.
pub(super) type Found = Result<Vec<Obstacle>, String>;

/// The running search, and the requests that wait for it.
pub(super) struct FirewallSearch {
    /// Set while a search runs.
    running: Option<oneshot::Receiver<Found>>,
    /// Time of the next search that nobody asks for.
    due: Instant,
    /// Time before which no search begins.
    earliest: Instant,
    /// Requests for the status that are answered once the search ends.
    waiting: Vec<oneshot::Sender<pb::StatusResponse>>,
}

impl FirewallSearch {
    pub(super) fn new(now: Instant) -> Self {
        Self { running: None, due: now + PERIOD, earliest: now, waiting: Vec::new() }
    }

    /// Returns the time of the next search that nobody asks for.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Returns whether a search may begin now.
    pub(super) fn can_begin(&self, now: Instant) -> bool {
        self.running.is_none() && now >= self.earliest
    }

    /// Begins a search, if there is something to search.
    pub(super) fn begin(&mut self, now: Instant, search: Option<ObstacleSearch>) {
        (self.due, self.earliest) = (now + PERIOD, now + SHORTEST);
        let Some(search) = search else { return };
        let (sender, receiver) = oneshot::channel();
        tokio::task::spawn_blocking(move || {
            let _ = sender.send(search.run().map_err(|error| error.to_string()));
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
        let found = running.await.unwrap_or_else(|_| Err("the search ended early".to_owned()));
        self.running = None;
        found
    }

    /// Returns the requests that waited for the search.
    pub(super) fn take_waiting(&mut self) -> Vec<oneshot::Sender<pb::StatusResponse>> {
        std::mem::take(&mut self.waiting)
    }
}
