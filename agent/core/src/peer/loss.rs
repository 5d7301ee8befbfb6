//! How many pings on the path in use are lost.

/// Number of pings that the figure is about, at most.
const WINDOW: u32 = 64;

/// The outcomes of the last pings on the path in use.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Loss {
    /// One bit for each ping, the newest lowest: 1 if it was lost.
    lost: u64,
    /// Number of bits that hold an outcome, at most [`WINDOW`].
    count: u32,
}

impl Loss {
    /// Records a ping that was answered in time, or was not.
    pub(super) fn record(&mut self, lost: bool) {
        self.lost = self.lost << 1 | u64::from(lost);
        self.count = (self.count + 1).min(WINDOW);
    }

    /// Returns the share of pings that were lost, from 0 to 1. `None` before the first outcome.
    pub(super) fn share(self) -> Option<f64> {
        (self.count > 0).then(|| f64::from(self.lost.count_ones()) / f64::from(self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_that_of_the_last_pings() {
        let mut loss = Loss::default();
        assert_eq!(loss.share(), None);
        for n in 0..4 {
            loss.record(n == 0);
        }
        assert_eq!(loss.share(), Some(0.25));
        for _ in 0..WINDOW {
            loss.record(false);
        }
        assert_eq!(loss.share(), Some(0.0));
    }
}
