//! TAI64N timestamps of initiations (whitepaper section 5.1). A responder accepts an initiation only
//! if its timestamp is later than that of the last one.

use std::time::Duration;

use super::noise::TIMESTAMP_BYTES;

/// TAI64 label of the Unix epoch, as WireGuard's implementations have it: TAI was 10 s ahead of UTC
/// in 1972, and leap seconds since then are not counted. boringtun's is 27 s later, so a responder
/// that remembers an initiation of boringtun refuses those of this engine for up to 27 s.
const UNIX_EPOCH: u64 = (1 << 62) + 10;
/// Nanoseconds that a timestamp does not reveal: like the kernel, it counts in steps of about 17 ms.
const HIDDEN: u32 = (1 << 24) - 1;
/// Nanoseconds of a second.
const SECOND: u32 = 1_000_000_000;

/// Timestamps of the last initiations between this node and one peer. They outlive a change of the
/// pre-shared key, because an initiation does not depend on that: a recorded one would be accepted
/// again.
#[derive(Debug, Clone, Default)]
pub struct InitiationHistory {
    /// Timestamps of the initiations of this node.
    pub(crate) own: Timestamps,
    /// Timestamp of the peer's last initiation. Zero before the first.
    pub(crate) newest: [u8; TIMESTAMP_BYTES],
}

impl InitiationHistory {
    /// Forgets the initiations of the peer, because it started again, perhaps with a clock that was
    /// set back.
    pub fn forget_peer(&mut self) {
        self.newest = [0; TIMESTAMP_BYTES];
    }
}

/// Timestamps of the initiations to one peer. They increase, also when the clock is set back.
#[derive(Debug, Clone, Default)]
pub(crate) struct Timestamps {
    /// Seconds and nanoseconds of the last one.
    last: (u64, u32),
}

impl Timestamps {
    /// Returns the timestamp for an initiation at this time since the Unix epoch.
    pub(crate) fn next(&mut self, unix_time: Duration) -> [u8; TIMESTAMP_BYTES] {
        let seconds = UNIX_EPOCH.saturating_add(unix_time.as_secs());
        let time = (seconds, unix_time.subsec_nanos() & !HIDDEN);
        self.last = time.max(following(self.last));
        let mut timestamp = [0; TIMESTAMP_BYTES];
        timestamp[..8].copy_from_slice(&self.last.0.to_be_bytes());
        timestamp[8..].copy_from_slice(&self.last.1.to_be_bytes());
        timestamp
    }
}

fn following((seconds, nanos): (u64, u32)) -> (u64, u32) {
    if nanos + 1 < SECOND { (seconds, nanos + 1) } else { (seconds.saturating_add(1), 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_that_of_wireguard() {
        // 2023-11-14 22:13:20 UTC, with a fraction of a second of which 2^24 ns are hidden.
        let time = Duration::new(1_700_000_000, (1 << 24) + 5);
        let expected = [&0x4000_0000_6553_f10a_u64.to_be_bytes()[..], &[1, 0, 0, 0]].concat();
        assert_eq!(Timestamps::default().next(time)[..], expected);
    }

    #[test]
    fn timestamps_increase_with_any_clock() {
        let mut timestamps = Timestamps::default();
        let times = [5_000, 5_000, 5_001, 4_000, 0, 5_020, u64::MAX / 4, 3];
        let all: Vec<_> =
            times.iter().map(|time| timestamps.next(Duration::from_millis(*time))).collect();
        assert!(all.is_sorted_by(|a, b| a < b), "{all:?}");
        let mut timestamps = Timestamps { last: (7, SECOND - 1) };
        assert_eq!(timestamps.next(Duration::ZERO), Timestamps::default().next(Duration::ZERO));
        timestamps.last = (UNIX_EPOCH, SECOND - 1);
        timestamps.next(Duration::ZERO);
        assert_eq!(timestamps.last, (UNIX_EPOCH + 1, 0));
    }
}
