//! Exponential backoff with jitter: pauses between attempts.
//!
//! This module only computes durations. The caller counts its failures, reads the clock and draws
//! the random number, so that a test or a simulation controls all three.

use std::time::Duration;

/// Range in which a pause is randomized, so that machines or timers that started together spread
/// out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Jitter {
    /// 50 to 100 % of the pause: for many machines that reconnect to the same server.
    Half,
    /// 80 to 120 % of the pause: for the timers of many peers that the same event started.
    Fifth,
    /// 90 to 110 % of the pause: for repeated requests of one machine, which follow a schedule.
    Tenth,
}

impl Jitter {
    /// Returns the randomized pause. `random` must be uniformly distributed.
    pub fn apply(self, pause: Duration, random: u64) -> Duration {
        let (least, most) = match self {
            Self::Half => (0.5, 1.0),
            Self::Fifth => (0.8, 1.2),
            Self::Tenth => (0.9, 1.1),
        };
        // The upper 52 bits give a fraction in [0, 1) that an f64 represents exactly.
        let fraction = (random >> 12) as f64 / (1u64 << 52) as f64;
        let seconds = pause.as_secs_f64() * (least + (most - least) * fraction);
        Duration::try_from_secs_f64(seconds).unwrap_or(pause)
    }
}

/// Pauses that double with each failure in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// Pause after the first failure.
    first: Duration,
    /// Longest pause, before [`Jitter`].
    longest: Duration,
    jitter: Jitter,
}

impl Backoff {
    /// Creates a backoff whose pauses double from `first` to `longest`.
    pub const fn new(first: Duration, longest: Duration, jitter: Jitter) -> Self {
        Self { first, longest, jitter }
    }

    /// Returns the pause after `failures` earlier ones in a row (0: the first pause). Without
    /// jitter it is `first * 2^failures`, at most `longest`.
    pub fn pause(&self, failures: u32, random: u64) -> Duration {
        let doubled = self.first.saturating_mul(1u32.checked_shl(failures).unwrap_or(u32::MAX));
        self.jitter.apply(doubled.min(self.longest), random)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(15);

    #[test]
    fn pauses_double_up_to_the_longest() {
        let backoff = Backoff::new(FIRST, LONGEST, Jitter::Tenth);
        // This random value is the middle of its range, so it does not change the pauses.
        let pauses = [0, 1, 2, 5, 6, 31, 32, u32::MAX].map(|n| backoff.pause(n, 1 << 63));
        let expected = [250, 500, 1000, 8000, 15000, 15000, 15000, 15000];
        assert_eq!(pauses, expected.map(Duration::from_millis));
    }

    proptest! {
        #[test]
        fn a_pause_stays_within_its_jitter(failures: u32, random: u64, millis in 1u64..1 << 40) {
            for (jitter, least, most) in [
                (Jitter::Half, 50, 100),
                (Jitter::Fifth, 80, 120),
                (Jitter::Tenth, 90, 110),
            ] {
                let pause = Duration::from_millis(millis);
                // A float of that size is exact to better than a millisecond.
                let moved = jitter.apply(pause, random).as_millis() as u64;
                prop_assert!(moved + 1 >= millis / 100 * least && moved <= (millis + 1) * most / 100 + 1);
                let longest = Backoff::new(pause, LONGEST, jitter).pause(failures, random);
                prop_assert!(longest <= LONGEST * most as u32 / 100);
            }
        }
    }
}
