//! Switches of the kernel's offloads: each is probed at the start, disabled for a minute if the
//! kernel refuses it at run time, retried later, and shown to the operator.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use towline_types::codes;

/// Time for which an offload stays disabled after the kernel refused it.
const PAUSE: Duration = Duration::from_secs(60);

/// State of an offload, for status output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// Name in command output and in metrics.
    pub name: &'static str,
    /// True if the offload is in use.
    pub active: bool,
    /// Reason why the offload is not in use. `None` if it is.
    pub reason: Option<OffReason>,
}

/// Reason why an offload is not in use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OffReason {
    /// The configuration disables it.
    #[error("switched off in the configuration")]
    Configured,
    /// The kernel lacks it, or refused it at the start.
    #[error("{0}")]
    Unsupported(String),
    /// The kernel has it with a known defect.
    #[error("{0}")]
    Defective(&'static str),
    /// A test of it at the start failed.
    #[error("{0}")]
    SelfTest(String),
    /// The kernel refused it at run time. It is tried again.
    #[error("the kernel refused it at run time: {0}")]
    Refused(String),
    /// The kernel refused it for a network card that computes no checksums, as Linux before 6.11
    /// does. It is tried again, since the path may then leave by another card.
    #[error("the network card computes no checksums, which Linux before 6.11 needs for it")]
    NeedsChecksums,
    /// It damaged packets. It is tried again.
    #[error("coalesced datagrams arrived damaged")]
    Damaged,
}

codes! {
    OffReason {
        Configured => "offload-switched-off",
        Unsupported => "offload-unsupported",
        Defective => "offload-defective",
        SelfTest => "offload-self-test-failed",
        Refused => "offload-refused",
        NeedsChecksums => "offload-needs-checksums",
        Damaged => "offload-damages-packets",
    }
}

/// Switch of one offload. Clones share its state: the user of the offload holds one, and status
/// output others.
#[derive(Debug, Clone)]
pub struct Switch(Arc<State>);

#[derive(Debug)]
struct State {
    name: &'static str,
    active: AtomicBool,
    off: Mutex<Off>,
}

#[derive(Debug, Default)]
struct Off {
    reason: Option<OffReason>,
    /// Time of the next attempt to use the offload. `None` if it is never retried.
    again: Option<Instant>,
}

impl Switch {
    /// Creates a switch that is on, or off permanently for the reason in `probed`.
    pub fn new(name: &'static str, probed: Result<(), OffReason>) -> Self {
        let active = AtomicBool::new(probed.is_ok());
        let off = Mutex::new(Off { reason: probed.err(), again: None });
        Self(Arc::new(State { name, active, off }))
    }

    /// Returns whether to use the offload. Takes no lock and reads no clock.
    pub fn is_on(&self) -> bool {
        self.0.active.load(Ordering::Relaxed)
    }

    /// Disables the offload for a minute because the kernel returned an error.
    pub fn disable_after_error(&self, error: &std::io::Error, now: Instant) {
        self.disable(OffReason::Refused(error.to_string()), now);
    }

    /// Disables the offload for a minute because it works incorrectly.
    pub fn disable(&self, reason: OffReason, now: Instant) {
        *self.0.off.lock() = Off { reason: Some(reason), again: Some(now + PAUSE) };
        self.0.active.store(false, Ordering::Relaxed);
    }

    /// Enables the offload again if its pause has ended. Call it regularly.
    pub fn retry(&self, now: Instant) {
        if self.is_on() {
            return;
        }
        let mut off = self.0.off.lock();
        if off.again.is_some_and(|again| now >= again) {
            *off = Off::default();
            self.0.active.store(true, Ordering::Relaxed);
        }
    }

    /// Returns the current state, for status output.
    pub fn status(&self) -> Feature {
        let reason = self.0.off.lock().reason.clone();
        Feature { name: self.0.name, active: self.is_on(), reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_up_is_tried_again_and_what_is_missing_is_not() {
        let now = Instant::now();
        let refused = std::io::Error::from_raw_os_error(libc::EINVAL);
        let switch = Switch::new("some", Ok(()));
        let onlooker = switch.clone();
        switch.disable_after_error(&refused, now);
        switch.retry(now + PAUSE / 2);
        assert!(!onlooker.is_on());
        assert!(matches!(onlooker.status().reason, Some(OffReason::Refused(_))));
        switch.retry(now + PAUSE);
        assert!(onlooker.is_on());
        assert_eq!(onlooker.status().reason, None);

        let missing = Switch::new("missing", Err(OffReason::Unsupported("too old".to_owned())));
        missing.retry(now + PAUSE * 100);
        assert!(!missing.is_on());
    }
}
