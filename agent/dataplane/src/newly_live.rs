//! Whether a tunnel needs ticks that needed none before. Tunnels record it, and the list of the tunnels that need
//! ticks is then made again.

use std::sync::atomic::{AtomicBool, Ordering};

/// True if a tunnel needs ticks that needed none before. All workers share it.
#[derive(Debug, Default)]
pub(super) struct NewlyLive(AtomicBool);

impl NewlyLive {
    /// Records that a tunnel needs ticks. Call it while the tunnel is locked.
    pub(super) fn record(&self) {
        // A tick that sees this also sees the state of the tunnel.
        self.0.store(true, Ordering::Release);
    }

    /// Returns whether a tunnel was recorded that no tick has looked at.
    pub(super) fn is_recorded(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Returns whether a tunnel was recorded since the last call.
    pub(super) fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}
