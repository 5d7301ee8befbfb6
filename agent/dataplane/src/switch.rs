//! What makes the data plane faster where the kernel has it: probed at the start, given up at run
//! time when the kernel turns out not to do it after all, tried again later, shown to the
//! operator.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// For how long something is left alone after the kernel refused it.
const PAUSE: Duration = Duration::from_secs(60);

/// Something that makes the data plane faster, and whether it is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// For the operator and for metrics.
    pub name: &'static str,
    /// In use.
    pub active: bool,
    /// Why not; empty if it is.
    pub reason: String,
}

/// One such thing: the side that uses it holds it, clones of it look on.
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
    /// When it is to be tried again; `None`: never.
    again: Option<Instant>,
}

impl Switch {
    /// In use, or not, for a reason that lasts.
    pub fn new(name: &'static str, probed: Result<(), String>) -> Self {
        let active = AtomicBool::new(probed.is_ok());
        let off = Mutex::new(Off { reason: probed.err().unwrap_or_default(), again: None });
        Self(Arc::new(State { name, active, off }))
    }

    /// Whether to use it. No lock, no clock.
    pub fn is_on(&self) -> bool {
        self.0.active.load(Ordering::Relaxed)
    }

    /// The kernel refused it: not used for a while.
    pub fn give_up(&self, error: &std::io::Error, now: Instant) {
        self.distrust(format!("the kernel refused it at run time: {error}"), now);
    }

    /// It does not do what it should: not used for a while.
    pub fn distrust(&self, reason: String, now: Instant) {
        *self.0.off.lock() = Off { reason, again: Some(now + PAUSE) };
        self.0.active.store(false, Ordering::Relaxed);
    }

    /// Tries again what was given up long enough ago. Call it now and then.
    pub fn reconsider(&self, now: Instant) {
        if self.is_on() {
            return;
        }
        let mut off = self.0.off.lock();
        if off.again.is_some_and(|again| now >= again) {
            *off = Off::default();
            self.0.active.store(true, Ordering::Relaxed);
        }
    }

    /// Current state, for status output.
    pub fn look(&self) -> Feature {
        let reason = self.0.off.lock().reason.clone();
        Feature { name: self.0.name, active: self.is_on(), reason }
    }
}

/// What a configuration says about something that it switches off.
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
        switch.give_up(&refused, now);
        switch.reconsider(now + PAUSE / 2);
        assert!(!onlooker.is_on());
        assert!(onlooker.look().reason.contains("refused"));
        switch.reconsider(now + PAUSE);
        assert!(onlooker.is_on());
        assert_eq!(onlooker.look().reason, "");

        let missing = Switch::new("missing", Err("too old".to_owned()));
        missing.reconsider(now + PAUSE * 100);
        assert!(!missing.is_on());
    }
}
