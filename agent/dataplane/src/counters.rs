//! Counters of each peer. They are written once per run of packets and may be read at any time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Counters of one peer. Bytes are those of whole UDP payloads, including handshakes. On
/// a relayed path, only received data messages include the relay header.
#[derive(Debug, Default)]
pub(super) struct PeerCounters {
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    /// Time of the last handshake, in milliseconds after the start of the data plane plus one. 0 if
    /// there was none.
    last_handshake: AtomicU64,
}

impl PeerCounters {
    /// Adds to the bytes sent.
    pub(super) fn sent(&self, bytes: usize) {
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Adds to the authentic bytes received.
    pub(super) fn received(&self, bytes: usize) {
        self.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Records that a handshake completed at `now`.
    pub(super) fn handshake(&self, started: Instant, now: Instant) {
        let age = now.saturating_duration_since(started).as_millis() as u64;
        self.last_handshake.store(age + 1, Ordering::Relaxed);
    }

    /// Returns the bytes sent and the bytes received, in this order.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.sent_bytes.load(Ordering::Relaxed), self.received_bytes.load(Ordering::Relaxed))
    }

    /// Returns the time when the last handshake completed.
    pub(super) fn last_handshake(&self, started: Instant) -> Option<Instant> {
        let age = self.last_handshake.load(Ordering::Relaxed).checked_sub(1)?;
        Some(started + Duration::from_millis(age))
    }
}
