//! Counters of what no other part keeps: refused calls, commits of the store, and how far watches and this controller
//! itself are behind. Any thread counts and reads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tonic::Code;

/// gRPC codes by number, as the label of a metric.
const CODES: [&str; 17] = [
    "ok",
    "cancelled",
    "unknown",
    "invalid_argument",
    "deadline_exceeded",
    "not_found",
    "already_exists",
    "permission_denied",
    "resource_exhausted",
    "failed_precondition",
    "aborted",
    "out_of_range",
    "unimplemented",
    "internal",
    "unavailable",
    "data_loss",
    "unauthenticated",
];

/// Header of a response that has the gRPC status of a call which was refused.
const GRPC_STATUS: &str = "grpc-status";

/// Limit of the controller because of which a call was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The node publishes too often.
    Publish,
    /// The node opens watches too often.
    Watch,
    /// The node loads the whole map too often.
    Snapshot,
    /// The node renews its certificate too often.
    Renew,
    /// The node sends too many signals. The signal is dropped, and the call continues.
    Signal,
    /// The node reports too often. The summary is dropped, and the call continues.
    Summary,
    /// The node asks too often to be readmitted.
    Readmit,
    /// The source has too many failed joins.
    FailedJoins,
    /// Too many nodes load the whole map at the same time.
    Loading,
    /// The controller is stopping.
    Stopping,
}

impl Limit {
    /// All limits with their labels, in the order of their discriminants, which are the indices of the counters.
    const ALL: [(Self, &'static str); 10] = [
        (Self::Publish, "publish"),
        (Self::Watch, "watch"),
        (Self::Snapshot, "snapshot"),
        (Self::Renew, "renew"),
        (Self::Signal, "signal"),
        (Self::Summary, "summary"),
        (Self::Readmit, "readmit"),
        (Self::FailedJoins, "failed_joins"),
        (Self::Loading, "loading"),
        (Self::Stopping, "stopping"),
    ];
}

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Counters {
    refused: [AtomicU64; CODES.len()],
    limited: [AtomicU64; Limit::ALL.len()],
    fan_outs: AtomicU64,
    fan_out_nanoseconds: AtomicU64,
    cursors: Cursors,
    commits: AtomicU64,
    failed_commits: AtomicU64,
    commit_nanoseconds: AtomicU64,
    sequence: AtomicU64,
    /// Monotonic time at which this controller last had everything that is in the store; `None` before it was read.
    current_at: Mutex<Option<Instant>>,
}

/// Commits of the store since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commits {
    /// Number of commits that succeeded.
    pub done: u64,
    /// Number of commits that failed.
    pub failed: u64,
    /// Time that all of them took.
    pub time: Duration,
}

/// Messages of changes that were sent to watchers that have the whole map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FanOuts {
    /// Number of messages.
    pub sent: u64,
    /// Time from the newest change of each message until it was sent, over all messages.
    pub time: Duration,
}

/// Revisions up to which the running watches were sent everything.
#[derive(Debug, Default)]
struct Cursors(Mutex<Vec<Weak<AtomicU64>>>);

/// Number of cursors after which those of ended watches are forgotten.
const CURSORS_KEPT: usize = 1024;

impl Cursors {
    fn open(&self, revision: u64) -> Arc<AtomicU64> {
        let cursor = Arc::new(AtomicU64::new(revision));
        let mut cursors = self.0.lock();
        if cursors.len() % CURSORS_KEPT == CURSORS_KEPT - 1 {
            cursors.retain(|cursor| cursor.strong_count() > 0);
        }
        cursors.push(Arc::downgrade(&cursor));
        cursor
    }

    fn least(&self) -> Option<u64> {
        let mut cursors = self.0.lock();
        cursors.retain(|cursor| cursor.strong_count() > 0);
        let read = |cursor: &Weak<AtomicU64>| Some(cursor.upgrade()?.load(Ordering::Relaxed));
        cursors.iter().filter_map(read).min()
    }
}

impl Counters {
    /// Counts a call that was refused because of a limit.
    pub fn limit(&self, limit: Limit) {
        if let Some(counter) = self.limited.get(limit as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a message of changes that was sent `time` after its newest change.
    pub fn fan_out(&self, time: Duration) {
        self.fan_outs.fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.fan_out_nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Returns the cursor of a watch that starts after this revision. The watch stores in it what it sent, and
    /// drops it at its end.
    pub fn cursor(&self, revision: u64) -> Arc<AtomicU64> {
        self.cursors.open(revision)
    }

    /// Returns by how many revisions the slowest watch is behind `revision`; 0 without watches.
    pub fn lag(&self, revision: u64) -> u64 {
        self.cursors.least().map_or(0, |least| revision.saturating_sub(least))
    }

    /// Counts a response whose call was refused before it began: its status is in the headers. The end of a
    /// watch is not counted.
    pub fn response<B>(&self, response: &http::Response<B>) {
        let Some(status) = response.headers().get(GRPC_STATUS) else { return };
        let code = Code::from_bytes(status.as_bytes());
        let number = usize::try_from(code as i32).unwrap_or_default();
        if code != Code::Ok
            && let Some(counter) = self.refused.get(number)
        {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a commit of the store that took `time`.
    pub fn commit(&self, time: Duration, is_done: bool) {
        let counter = if is_done { &self.commits } else { &self.failed_commits };
        counter.fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.commit_nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Notes the sequence number of the store after a commit.
    pub fn set_sequence(&self, sequence: u64) {
        self.sequence.store(sequence, Ordering::Relaxed);
    }

    /// Returns the sequence number of the store after the last commit; 0 before the first one.
    pub fn sequence(&self) -> u64 {
        self.sequence.load(Ordering::Relaxed)
    }

    /// Notes that this controller had everything that was in the store at this time.
    pub fn set_current_at(&self, at: Instant) {
        *self.current_at.lock() = Some(at);
    }

    /// Returns when this controller last had everything that was in the store; `None` before it was read.
    pub fn current_at(&self) -> Option<Instant> {
        *self.current_at.lock()
    }

    /// Returns the number of refused calls by the name of their code. Codes that never occurred are left out.
    pub fn refused(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let counts = self.refused.iter().map(|counter| counter.load(Ordering::Relaxed));
        CODES.into_iter().zip(counts).filter(|(_, count)| *count > 0)
    }

    /// Returns the number of calls that each limit refused, with the limit's label.
    pub fn limited(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let counts = self.limited.iter().map(|counter| counter.load(Ordering::Relaxed));
        Limit::ALL.into_iter().map(|(_, label)| label).zip(counts)
    }

    /// Returns the messages of changes that were sent.
    pub fn fan_outs(&self) -> FanOuts {
        FanOuts {
            sent: self.fan_outs.load(Ordering::Relaxed),
            time: Duration::from_nanos(self.fan_out_nanoseconds.load(Ordering::Relaxed)),
        }
    }

    /// Returns the commits of the store.
    pub fn commits(&self) -> Commits {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Commits {
            done: read(&self.commits),
            failed: read(&self.failed_commits),
            time: Duration::from_nanos(read(&self.commit_nanoseconds)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_calls_are_counted_by_their_code() {
        let counters = Counters::default();
        let refused = tonic::Status::permission_denied("no").into_http::<String>();
        counters.response(&refused);
        counters.response(&refused);
        counters.response(&tonic::Status::unauthenticated("who").into_http::<String>());
        counters.response(&http::Response::new(()));
        let counts: Vec<_> = counters.refused().collect();
        assert_eq!(counts, [("permission_denied", 2), ("unauthenticated", 1)]);
        assert_eq!(CODES[Code::Unavailable as usize], "unavailable");
    }

    #[test]
    fn the_slowest_watch_decides_how_far_watches_are_behind() {
        let counters = Counters::default();
        assert_eq!(counters.lag(10), 0, "there is no watch");
        let (slow, fast) = (counters.cursor(2), counters.cursor(0));
        fast.store(9, Ordering::Relaxed);
        assert_eq!(counters.lag(10), 8);
        drop(slow);
        assert_eq!(counters.lag(10), 1);
        for _ in 0..2 * CURSORS_KEPT {
            drop(counters.cursor(0));
        }
        assert!(counters.cursors.0.lock().len() <= CURSORS_KEPT, "ended watches are forgotten");
    }

    #[test]
    fn each_limit_has_a_counter() {
        let counters = Counters::default();
        for (index, (limit, _)) in Limit::ALL.into_iter().enumerate() {
            assert_eq!(limit as usize, index, "{limit:?}");
            counters.limit(limit);
        }
        counters.limit(Limit::Loading);
        let counts: Vec<u64> = counters.limited().map(|(_, count)| count).collect();
        assert_eq!(counts, [1, 1, 1, 1, 1, 1, 1, 1, 2, 1]);
        counters.fan_out(Duration::from_millis(3));
        let expected = FanOuts { sent: 1, time: Duration::from_millis(3) };
        assert_eq!(counters.fan_outs(), expected);
    }

    #[test]
    fn commits_are_counted_with_their_time() {
        let counters = Counters::default();
        counters.commit(Duration::from_millis(3), true);
        counters.commit(Duration::from_millis(4), false);
        let expected = Commits { done: 1, failed: 1, time: Duration::from_millis(7) };
        assert_eq!(counters.commits(), expected);
    }
}
