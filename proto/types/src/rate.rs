//! The token bucket that every rate limit uses.
//!
//! Time is an argument. A bucket stores only the time at which it is full again, so that it costs
//! nothing while it is unused and needs no refill (the generic cell rate algorithm of ATM).

use std::time::{Duration, Instant};

/// Fill rate and capacity of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Tokens that are earned in `per`. If it is 0, nothing is ever admitted.
    tokens: u64,
    /// Period in which `tokens` are earned.
    per: Duration,
    /// Time in which an empty bucket becomes full.
    fill: Duration,
}

impl Rate {
    /// Creates a rate of `tokens` per second, with a burst of `burst` tokens.
    pub const fn per_second(tokens: u64, burst: u64) -> Self {
        Self::new(tokens, Duration::from_secs(1), burst)
    }

    /// Creates a rate of one token in each `period`, with a burst of `burst` tokens.
    pub const fn one_per(period: Duration, burst: u64) -> Self {
        Self::new(1, period, burst)
    }

    const fn new(tokens: u64, per: Duration, burst: u64) -> Self {
        let empty = Self { tokens, per, fill: Duration::ZERO };
        Self { fill: empty.time_for(burst), ..empty }
    }

    /// Returns the time in which `tokens` are earned, rounded down to a nanosecond. It is at most
    /// 584 years, which can still be added to an [`Instant`].
    const fn time_for(&self, tokens: u64) -> Duration {
        let nanos = self.per.as_nanos().saturating_mul(tokens as u128);
        let nanos = match nanos.checked_div(self.tokens as u128) {
            Some(nanos) if nanos <= u64::MAX as u128 => nanos as u64,
            _ => u64::MAX,
        };
        Duration::from_nanos(nanos)
    }
}

/// A token bucket. A new one is full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TokenBucket {
    /// Time at which all spent tokens are earned again; `None` if none was ever spent.
    full_at: Option<Instant>,
}

impl TokenBucket {
    /// Spends `tokens` if the bucket has them. Returns whether they were spent.
    #[inline]
    pub fn take(&mut self, rate: &Rate, now: Instant, tokens: u64) -> bool {
        let missing = self.missing(now).saturating_add(rate.time_for(tokens));
        let admitted = rate.tokens > 0 && missing <= rate.fill;
        if admitted {
            self.full_at = Some(now + missing);
        }
        admitted
    }

    /// Spends `tokens` even if the bucket has fewer. It is empty then, not in debt.
    pub fn charge(&mut self, rate: &Rate, now: Instant, tokens: u64) {
        let missing = self.missing(now).saturating_add(rate.time_for(tokens));
        self.full_at = Some(now + missing.min(rate.fill));
    }

    /// Returns the time until the bucket has `tokens`; zero if it has them now. It never has more
    /// than the burst.
    pub fn wait(&self, rate: &Rate, now: Instant, tokens: u64) -> Duration {
        let needed = self.missing(now).saturating_add(rate.time_for(tokens));
        needed.saturating_sub(rate.fill)
    }

    /// Returns whether the bucket is full, as a new one is.
    pub fn is_full(&self, now: Instant) -> bool {
        self.missing(now).is_zero()
    }

    /// Returns the time at which the bucket is full again; `None` if it was never used.
    pub(crate) fn full_at(&self) -> Option<Instant> {
        self.full_at
    }

    /// Returns the time until the bucket is full.
    #[inline]
    fn missing(&self, now: Instant) -> Duration {
        self.full_at.map_or(Duration::ZERO, |full| full.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_burst_then_the_rate() {
        let start = Instant::now();
        let rate = Rate::per_second(10, 20);
        let mut bucket = TokenBucket::default();
        let mut admitted = |at| (0..100).filter(|_| bucket.take(&rate, at, 1)).count();
        assert_eq!(admitted(start), 20);
        assert_eq!(admitted(start + Duration::from_millis(99)), 0);
        assert_eq!(admitted(start + Duration::from_millis(100)), 1);
        assert_eq!(admitted(start + Duration::from_secs(3600)), 20);
    }

    #[test]
    fn what_is_charged_is_waited_for_and_a_rate_of_nothing_admits_nothing() {
        let now = Instant::now();
        let period = Duration::from_secs(6);
        let rate = Rate::one_per(period, 2);
        let mut bucket = TokenBucket::default();
        bucket.charge(&rate, now, 1);
        assert_eq!(bucket.wait(&rate, now, 1), Duration::ZERO);
        bucket.charge(&rate, now, 5);
        assert_eq!(bucket.wait(&rate, now, 1), period, "empty, not in debt");
        assert!(!bucket.take(&rate, now, 1) && bucket.take(&rate, now + period, 1));
        for tokens in [0, 1, u64::MAX] {
            assert!(!TokenBucket::default().take(&Rate::per_second(0, 9), now, tokens));
        }
        assert!(!TokenBucket::default().take(&rate, now, 3), "more than a full bucket holds");
    }

    proptest! {
        /// No pattern of requests gets more than the burst plus the tokens earned since the start.
        /// A refused request is admitted after the wait that the bucket returns.
        #[test]
        fn no_more_than_the_burst_and_what_is_earned(
            per_second in 1u64..100_000,
            burst in 1u64..10_000,
            asked in prop::collection::vec((0u64..2_000, 1u64..100), 1..200),
        ) {
            let rate = Rate::per_second(per_second, burst);
            let start = Instant::now();
            let (mut now, mut bucket, mut spent) = (start, TokenBucket::default(), 0);
            for (pause, tokens) in asked {
                now += Duration::from_millis(pause);
                let wait = bucket.wait(&rate, now, tokens);
                let admitted = bucket.take(&rate, now, tokens);
                prop_assert_eq!(admitted, wait.is_zero());
                if admitted {
                    spent += tokens;
                } else if tokens <= burst {
                    let mut later = bucket;
                    prop_assert!(later.take(&rate, now + wait, tokens), "after the wait");
                }
                let earned = u128::from(per_second) * (now - start).as_nanos() / 1_000_000_000;
                // Each request is rounded down to a nanosecond: less than one token in total.
                prop_assert!(u128::from(spent) <= u128::from(burst) + earned + 1);
            }
        }
    }
}
