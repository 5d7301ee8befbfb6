//! Timers of WireGuard that messages start and stop (whitepaper section 6). Repetition of an
//! initiation, and the age of sessions, are with the session.

use std::time::{Duration, Instant};

/// Keepalive-Timeout: time after which received data is acknowledged with a keepalive.
pub(super) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Rekey-Timeout: time after which an initiation is repeated. The caller adds a random delay.
pub(super) const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Rekey-Attempt-Time: time after which a handshake is given up.
pub(super) const REKEY_ATTEMPT: Duration = Duration::from_secs(90);
/// Rekey-After-Time: age at which the initiator of a session renews it when it sends.
pub(super) const REKEY_AFTER: Duration = Duration::from_secs(120);
/// Age at which the initiator of a session renews it when it receives.
pub(super) const REKEY_ON_RECEIVE: Duration = Duration::from_secs(165);

/// What was sent without an answer, and received without one.
#[derive(Debug, Default)]
pub(super) struct Timers {
    /// Time of the first data message after the last authentic message of the peer. `None` if there
    /// is none.
    unanswered: Option<Instant>,
    /// Time of the first data message of the peer after the last message to it. `None` if there is
    /// none.
    unacknowledged: Option<Instant>,
}

impl Timers {
    /// Records that data was sent.
    pub(super) fn sent_data(&mut self, now: Instant) {
        self.unanswered.get_or_insert(now);
        self.unacknowledged = None;
    }

    /// Records that a message without data was sent.
    pub(super) fn sent(&mut self) {
        self.unacknowledged = None;
    }

    /// Records that an authentic message arrived.
    pub(super) fn received(&mut self) {
        self.unanswered = None;
    }

    /// Records that authentic data arrived.
    pub(super) fn received_data(&mut self, now: Instant) {
        self.unanswered = None;
        self.unacknowledged.get_or_insert(now);
    }

    /// Returns whether the peer has been silent for so long that a handshake must find out whether
    /// it still has the session. Returns true once for each silence.
    pub(super) fn take_silence(&mut self, now: Instant) -> bool {
        self.unanswered.take_if(|since| is_over(*since, SILENCE, now)).is_some()
    }

    /// Returns whether a keepalive is due.
    pub(super) fn is_keepalive_due(&self, now: Instant) -> bool {
        self.unacknowledged.is_some_and(|since| is_over(since, KEEPALIVE_TIMEOUT, now))
    }
}

/// Keepalive-Timeout and Rekey-Timeout together: a peer that has the session has answered by then.
const SILENCE: Duration = KEEPALIVE_TIMEOUT.saturating_add(REKEY_TIMEOUT);

/// Returns whether this time has passed.
pub(super) fn is_over(since: Instant, time: Duration, now: Instant) -> bool {
    now.saturating_duration_since(since) >= time
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_is_counted_from_the_first_message_without_an_answer() {
        let (mut timers, start) = (Timers::default(), Instant::now());
        let second = Duration::from_secs(1);
        timers.sent_data(start);
        timers.sent_data(start + 14 * second);
        assert!(!timers.take_silence(start + 14 * second));
        assert!(timers.take_silence(start + 15 * second));
        assert!(!timers.take_silence(start + 60 * second), "once");
        timers.sent_data(start);
        timers.received();
        assert!(!timers.take_silence(start + 60 * second));
    }

    #[test]
    fn data_is_acknowledged_unless_something_was_sent() {
        let (mut timers, start) = (Timers::default(), Instant::now());
        let second = Duration::from_secs(1);
        timers.received();
        assert!(!timers.is_keepalive_due(start + 60 * second), "keepalives are not acknowledged");
        timers.received_data(start);
        timers.received_data(start + 9 * second);
        assert!(!timers.is_keepalive_due(start + 9 * second));
        assert!(timers.is_keepalive_due(start + 10 * second));
        timers.sent();
        assert!(!timers.is_keepalive_due(start + 10 * second));
        timers.received_data(start);
        timers.sent_data(start);
        assert!(!timers.is_keepalive_due(start + 60 * second));
    }
}
