//! Notices that the machine slept: the timers stood still meanwhile, but not those of peers and NATs.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Shortest sleep that peers and NATs may have noticed.
const LEAST: Duration = Duration::from_secs(10);

/// What is known of the machine's sleep.
#[derive(Debug, Default)]
pub(super) struct SleepClock {
    /// Time that the machine had slept since its boot, at the last look.
    asleep: Option<Duration>,
}

impl SleepClock {
    /// Takes the time that the machine slept since its boot. Returns how long it slept since the last
    /// look, if that is worth mentioning.
    pub(super) fn woke(&mut self, asleep: Option<Duration>) -> Option<Duration> {
        let before = std::mem::replace(&mut self.asleep, asleep)?;
        let slept = asleep?.saturating_sub(before);
        if slept >= LEAST {
            return Some(slept);
        }
        // Short sleeps add up.
        self.asleep = Some(before);
        None
    }

    /// Returns whether the machine slept since the last look of [`Self::woke`], so that it has yet to say so.
    pub(super) fn has_slept(&self, asleep: Option<Duration>) -> bool {
        let slept = asleep.zip(self.asleep).map(|(asleep, before)| asleep.saturating_sub(before));
        slept.is_some_and(|slept| slept >= LEAST)
    }
}

/// Returns the time that the machine slept since its boot. `None` if the kernel does not say.
pub(super) fn asleep() -> Option<Duration> {
    let read = |clock| clock_gettime(clock).map(Duration::from).ok();
    // The clock that goes on is read last, so that the difference is not too small.
    let monotonic = read(ClockId::CLOCK_MONOTONIC)?;
    Some(read(ClockId::CLOCK_BOOTTIME)?.saturating_sub(monotonic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sleep_that_others_notice_counts() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let mut clock = SleepClock::default();
        assert_eq!(clock.woke(seconds(3_600)), None, "it slept before the agent started");
        assert_eq!(clock.woke(seconds(3_605)), None);
        assert!(!clock.has_slept(seconds(3_605)) && clock.has_slept(seconds(3_610)));
        assert_eq!(clock.woke(seconds(3_610)), seconds(10), "short sleeps add up");
        assert!(!clock.has_slept(seconds(3_610)), "it was told");
        assert_eq!(clock.woke(seconds(3_610)), None);
        assert_eq!(clock.woke(None), None);
        assert_eq!(clock.woke(seconds(9_000)), None);
    }

    #[test]
    fn the_kernel_says_how_long_it_slept() {
        assert!(asleep().is_some());
    }
}
