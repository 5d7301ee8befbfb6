//! Timer that wakes a worker for its next tick.
//!
//! It is a descriptor in the worker's epoll set, and is set once for each tick. A timeout of `epoll_wait`
//! would make the kernel start a timer before each sleep and cancel it after, which a packet waits for.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Timer and the time that it is set to.
#[derive(Debug)]
pub(super) struct TickTimer {
    timer: TimerFd,
    /// `None` while the timer is not set.
    due: Option<Instant>,
}

impl TickTimer {
    /// Creates a timer that is not set.
    pub(super) fn new() -> nix::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        // `Instant` is the time of this clock.
        Ok(Self { timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?, due: None })
    }

    /// Sets the timer to a time `left` after `now`, in place of an earlier one.
    pub(super) fn set(&mut self, now: Instant, left: Duration) -> nix::Result<()> {
        // The kernel counts from a time that is not before `now`, so the timer does not end too early.
        let expiration = Expiration::OneShot(TimeSpec::from_duration(left));
        self.timer.set(expiration, TimerSetTimeFlags::empty())?;
        self.due = Some(now + left);
        Ok(())
    }

    /// Makes the timer wake nobody until it is set again.
    pub(super) fn clear(&mut self) -> nix::Result<()> {
        self.due = None;
        self.timer.unset()
    }

    /// Returns whether the timer is set. A timer that is due stays set.
    pub(super) fn is_set(&self) -> bool {
        self.due.is_some()
    }

    /// Returns whether the timer is set to a time that has come.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| now >= due)
    }
}

impl AsFd for TickTimer {
    /// Returns the descriptor. It is readable from the time that the timer is set to until the timer is set
    /// again or cleared.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    const SOON: Duration = Duration::from_micros(100);
    const LATE: Duration = Duration::from_secs(100_000);

    fn is_readable(timer: &TickTimer, timeout: PollTimeout) -> bool {
        poll(&mut [PollFd::new(timer.as_fd(), PollFlags::POLLIN)], timeout) == Ok(1)
    }

    #[test]
    fn a_timer_wakes_from_its_time_on_until_it_is_set_again_or_cleared() {
        let mut timer = TickTimer::new().unwrap();
        assert!(!timer.is_set() && !timer.is_due(Instant::now() + LATE));
        for next in [Some(LATE), None] {
            let now = Instant::now();
            timer.set(now, SOON).unwrap();
            assert!(timer.is_set() && !timer.is_due(now));
            assert!(is_readable(&timer, PollTimeout::NONE));
            assert!(timer.is_due(Instant::now()), "it does not end too early");
            assert!(is_readable(&timer, PollTimeout::ZERO), "nobody took note of it");
            match next {
                Some(left) => timer.set(now, left).unwrap(),
                None => timer.clear().unwrap(),
            }
            assert_eq!(timer.is_set(), next.is_some());
            assert!(!is_readable(&timer, PollTimeout::ZERO));
        }
    }
}
