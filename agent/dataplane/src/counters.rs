//! What is counted for each peer. Written once per train of packets, read at any time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes count whole UDP payloads, handshakes included.
#[derive(Debug, Default)]
pub(super) struct PeerCounters {
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    /// Milliseconds after the start of the data plane, plus one; 0: never.
    last_handshake: AtomicU64,
}

impl PeerCounters {
    /// Adds what was sent.
    pub(super) fn sent(&self, bytes: usize) {
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Adds what was received and found authentic.
    pub(super) fn received(&self, bytes: usize) {
        self.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Notes that a handshake was completed now.
    pub(super) fn handshake(&self, started: Instant, now: Instant) {
        let age = now.saturating_duration_since(started).as_millis() as u64;
        self.last_handshake.store(age + 1, Ordering::Relaxed);
    }

    /// Sent, received.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.sent_bytes.load(Ordering::Relaxed), self.received_bytes.load(Ordering::Relaxed))
    }

    /// When the last handshake was completed.
    pub(super) fn last_handshake(&self, started: Instant) -> Option<Instant> {
        let age = self.last_handshake.load(Ordering::Relaxed).checked_sub(1)?;
        Some(started + Duration::from_millis(age))
    }
}
