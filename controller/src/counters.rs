//! Counters of what no other part keeps: refused calls and commits of the store. Any thread counts and reads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Counters {
    refused: [AtomicU64; CODES.len()],
    commits: AtomicU64,
    failed_commits: AtomicU64,
    commit_nanoseconds: AtomicU64,
    sequence: AtomicU64,
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

impl Counters {
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

    /// Returns the number of refused calls by the name of their code. Codes that never occurred are left out.
    pub fn refused(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let counts = self.refused.iter().map(|counter| counter.load(Ordering::Relaxed));
        CODES.into_iter().zip(counts).filter(|(_, count)| *count > 0)
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
    fn commits_are_counted_with_their_time() {
        let counters = Counters::default();
        counters.commit(Duration::from_millis(3), true);
        counters.commit(Duration::from_millis(4), false);
        let expected = Commits { done: 1, failed: 1, time: Duration::from_millis(7) };
        assert_eq!(counters.commits(), expected);
    }
}
