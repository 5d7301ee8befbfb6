//! Switches of the kernel's offloads: each is probed at the start, disabled for a minute if the
//! kernel refuses it at run time, retried later, and shown to the operator.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Time for which an offload stays disabled after the kernel refused it.
const PAUSE: Duration = Duration::from_secs(60);

/// State of an offload, for status output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// Name in command output and in metrics.
    pub name: &'static str,
    /// True if the offload is in use.
    pub active: bool,
    /// Reason why the offload is not in use. Empty if it is.
    pub reason: String,
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
    reason: String,
    /// Time of the next attempt to use the offload. `None` if it is never retried.
    again: Option<Instant>,
}

impl Switch {
    /// Creates a switch that is on, or off permanently for the reason in `probed`.
    pub fn new(name: &'static str, probed: Result<(), String>) -> Self {
        let active = AtomicBool::new(probed.is_ok());
        let off = Mutex::new(Off { reason: probed.err().unwrap_or_default(), again: None });
        Self(Arc::new(State { name, active, off }))
    }

    /// Returns whether to use the offload. Takes no lock and reads no clock.
    pub fn is_on(&self) -> bool {
        self.0.active.load(Ordering::Relaxed)
    }

    /// Disables the offload for a minute because the kernel returned an error.
    pub fn disable_after_error(&self, error: &std::io::Error, now: Instant) {
        self.disable(format!("the kernel refused it at run time: {error}"), now);
    }

    /// Disables the offload for a minute because it works incorrectly.
    pub fn disable(&self, reason: String, now: Instant) {
        *self.0.off.lock() = Off { reason, again: Some(now + PAUSE) };
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

/// Returns the probe result of an offload that the configuration disables.
pub(super) fn switched_off() -> Result<(), String> {
    Err("switched off in the configuration".to_owned())
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
        assert!(onlooker.status().reason.contains("refused"));
        switch.retry(now + PAUSE);
        assert!(onlooker.is_on());
        assert_eq!(onlooker.status().reason, "");

        let missing = Switch::new("missing", Err("too old".to_owned()));
        missing.retry(now + PAUSE * 100);
        assert!(!missing.is_on());
    }
}
