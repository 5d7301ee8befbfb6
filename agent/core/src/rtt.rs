//! Round-trip time of a path, smoothed as RFC 6298 section 2 does.

use std::time::Duration;

/// The longest wait for an answer before it counts as missed.
pub(crate) const MAX_WAIT: Duration = Duration::from_secs(1);
/// The shortest wait for an answer: a busy host may take a moment.
pub(crate) const MIN_WAIT: Duration = Duration::from_millis(250);

/// Smoothed round-trip time and its variation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rtt {
    smoothed: Option<(Duration, Duration)>,
}

impl Rtt {
    /// Takes in a sample.
    pub(crate) fn sample(&mut self, rtt: Duration) {
        self.smoothed = Some(match self.smoothed {
            None => (rtt, rtt / 2),
            Some((mean, deviation)) => {
                ((mean * 7 + rtt) / 8, (deviation * 3 + mean.abs_diff(rtt)) / 4)
            }
        });
    }

    /// Returns the smoothed value; `None` before the first sample.
    pub(crate) fn mean(&self) -> Option<Duration> {
        self.smoothed.map(|(mean, _)| mean)
    }

    /// Returns how long to wait for an answer.
    pub(crate) fn wait(&self) -> Duration {
        match self.smoothed {
            None => MAX_WAIT / 2,
            Some((mean, deviation)) => (mean + deviation * 4).clamp(MIN_WAIT, MAX_WAIT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_follows_the_samples_slowly_and_the_wait_covers_their_spread() {
        let mut rtt = Rtt::default();
        let ms = Duration::from_millis;
        rtt.sample(ms(40));
        assert_eq!(rtt.mean(), Some(ms(40)));
        rtt.sample(ms(120));
        assert_eq!(rtt.mean(), Some(ms(50)));
        assert!(rtt.wait() >= ms(120) + ms(40));
        for _ in 0..100 {
            rtt.sample(ms(1));
        }
        assert_eq!(rtt.wait(), MIN_WAIT);
    }
}
