//! Looks for more work before a worker sleeps.
//!
//! A worker that sleeps is woken up by the kernel. In a virtual machine that takes longer than all the
//! work for an echo: the processor was halted, and an interrupt has to reach it. So a worker that moved
//! packets looks for more of them for some microseconds before it sleeps. Between two looks it offers the
//! processor to other threads (`sched_yield`): the next packet often comes from one of them.
//!
//! The looks stop by themselves where they do not pay: packets that are far apart cause none, and a few
//! looks without success in a row pause them. A worker without packets, which only timers and commands
//! wake up, never looks.

use std::time::Duration;

/// Longest sleep after which packets count as close together. Four wake-ups, which an echo through two
/// workers takes in a virtual machine, are shorter.
const SHORT: Duration = Duration::from_micros(250);
/// Number of spins without success in a row that pause them.
const MISSES: u32 = 4;
/// Number of sleeps without a spin during a pause.
const PAUSE: u32 = 32;

/// Decision whether to look for work before a sleep, by what the last sleeps and looks found.
#[derive(Debug)]
pub(super) struct Spin {
    /// Longest time of the looks before one sleep. Zero: none.
    longest: Duration,
    /// True if the loop moved packets since the last sleep.
    moved: bool,
    /// True if the last sleep was at most [`SHORT`].
    close: bool,
    /// Number of spins without success since the last successful one or the last pause.
    misses: u32,
    /// Number of sleeps that remain of the pause.
    pause: u32,
}

impl Spin {
    /// Creates the state without any packet so far.
    pub(super) fn new(longest: Duration) -> Self {
        Self { longest, moved: false, close: false, misses: 0, pause: 0 }
    }

    /// Returns whether there are no looks, so that nothing has to be recorded.
    pub(super) fn is_off(&self) -> bool {
        self.longest.is_zero()
    }

    /// Returns how long to look for work before the sleep that comes now.
    pub(super) fn due(&mut self) -> Duration {
        if !self.moved || !self.close {
            return Duration::ZERO;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return Duration::ZERO;
        }
        self.longest
    }

    /// Records that the looks before a sleep found work after this time, so that there was no sleep. On a
    /// busy processor `sched_yield` returns only after the time slice of another thread: work that is found
    /// after that would have woken up a sleep just as early, and counts as one without success.
    pub(super) fn record_found(&mut self, after: Duration) {
        if after <= self.longest + SHORT {
            self.misses = 0;
        } else {
            self.record_nothing_found();
            self.record_sleep(after);
        }
    }

    /// Records that the looks before a sleep found no work.
    pub(super) fn record_nothing_found(&mut self) {
        self.misses += 1;
        if self.misses == MISSES {
            (self.misses, self.pause) = (0, PAUSE);
        }
    }

    /// Records the length of a sleep.
    pub(super) fn record_sleep(&mut self, length: Duration) {
        self.close = length <= SHORT;
    }

    /// Records whether an iteration of the loop moved packets.
    pub(super) fn record_work(&mut self, packets: bool) {
        self.moved = packets;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_micros(20);
    const GAP: Duration = Duration::from_micros(90);

    /// Returns the state after two packets that were this far apart.
    fn after(gap: Duration) -> Spin {
        let mut spin = Spin::new(LONGEST);
        spin.record_sleep(gap);
        spin.record_work(true);
        spin
    }

    #[test]
    fn packets_that_are_close_together_are_looked_for() {
        assert_eq!(after(GAP).due(), LONGEST);
        assert_eq!(after(SHORT).due(), LONGEST);
    }

    #[test]
    fn packets_that_are_far_apart_are_not_looked_for() {
        let mut spin = after(Duration::from_millis(1));
        assert_eq!(spin.due(), Duration::ZERO);
        spin.record_sleep(GAP);
        assert_eq!(spin.due(), LONGEST, "they came closer");
    }

    #[test]
    fn a_worker_that_moves_no_packets_does_not_look() {
        let mut spin = after(GAP);
        spin.record_work(false);
        assert_eq!(spin.due(), Duration::ZERO, "a timer or a command woke it up");
        assert_eq!(Spin::new(LONGEST).due(), Duration::ZERO);
    }

    #[test]
    fn looks_without_success_pause_and_begin_again() {
        let mut spin = after(GAP);
        for _ in 0..MISSES {
            assert_eq!(spin.due(), LONGEST);
            spin.record_nothing_found();
        }
        for _ in 0..PAUSE {
            assert_eq!(spin.due(), Duration::ZERO);
        }
        assert_eq!(spin.due(), LONGEST);
    }

    #[test]
    fn one_success_is_enough_to_go_on() {
        let mut spin = after(GAP);
        for _ in 0..100 {
            for found in [false, false, false, true] {
                assert_eq!(spin.due(), LONGEST);
                if found {
                    spin.record_found(LONGEST);
                } else {
                    spin.record_nothing_found();
                }
            }
        }
    }

    #[test]
    fn work_that_is_found_after_a_time_slice_of_another_thread_is_no_success() {
        let slice = Duration::from_millis(3);
        let mut spin = after(GAP);
        spin.record_found(slice);
        assert_eq!(spin.due(), Duration::ZERO, "the packets are far apart");
        // Packets that are close together in between do not hide it.
        for _ in 1..MISSES {
            spin.record_sleep(GAP);
            assert_eq!(spin.due(), LONGEST);
            spin.record_found(slice);
        }
        spin.record_sleep(GAP);
        for _ in 0..PAUSE {
            assert_eq!(spin.due(), Duration::ZERO);
        }
        assert_eq!(spin.due(), LONGEST);
        // A thread that had the processor for a short time may have sent the packet.
        spin.record_found(GAP);
        assert_eq!(spin.due(), LONGEST);
    }

    #[test]
    fn a_spin_of_no_time_is_none() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.record_sleep(GAP);
        spin.record_work(true);
        assert_eq!(spin.due(), Duration::ZERO);
        assert!(spin.is_off() && !after(GAP).is_off());
    }
}
