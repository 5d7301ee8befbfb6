//! How often one source may fail: a bounded table of token buckets.
//!
//! Only failures count, so machines that join properly from behind one NAT do not slow each other
//! down. An IPv6 source is its /64, since whoever has one address there has them all.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use crate::clock::Now;

/// Failures in a row that a source may have.
const BURST: u32 = 10;
/// After which time one of them is forgotten.
const REFILL: Duration = Duration::from_secs(6);
/// Sources that are remembered; beyond that the one that failed longest ago is forgotten.
const SOURCES: usize = 4096;

/// Counts the failures of each source.
#[derive(Debug, Default)]
pub struct Limiter {
    sources: BTreeMap<IpAddr, Bucket>,
}

#[derive(Debug)]
struct Bucket {
    failures: u32,
    /// When the count last went up or down.
    since: Instant,
}

impl Limiter {
    /// How long the source has to wait before it may try again; `None`: not at all.
    pub fn wait(&mut self, source: IpAddr, now: Now) -> Option<Duration> {
        let bucket = self.sources.get_mut(&self::source(source))?;
        bucket.forget(now);
        (bucket.failures >= BURST).then(|| REFILL.saturating_sub(now.since(bucket.since)))
    }

    /// The source failed.
    pub fn failed(&mut self, source: IpAddr, now: Now) {
        let source = self::source(source);
        if !self.sources.contains_key(&source) && self.sources.len() >= SOURCES {
            let oldest = self.sources.iter().min_by_key(|(_, bucket)| bucket.since);
            if let Some(oldest) = oldest.map(|(source, _)| *source) {
                self.sources.remove(&oldest);
            }
        }
        let bucket = self.sources.entry(source).or_insert(Bucket { failures: 0, since: now.mono });
        bucket.forget(now);
        bucket.failures = (bucket.failures + 1).min(BURST);
        if bucket.failures == 1 {
            bucket.since = now.mono;
        }
    }
}

impl Bucket {
    fn forget(&mut self, now: Now) {
        let forgotten = now.since(self.since).as_secs() / REFILL.as_secs();
        self.failures = self.failures.saturating_sub(u32::try_from(forgotten).unwrap_or(u32::MAX));
        self.since = if self.failures == 0 {
            now.mono
        } else {
            // Bounded: `forgotten` is smaller than `BURST` here.
            self.since + REFILL * u32::try_from(forgotten).unwrap_or(0)
        };
    }
}

/// What counts as one source: an IPv4 address, or an IPv6 /64.
pub fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !0u128 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn a_source_that_keeps_failing_has_to_wait_and_others_do_not() {
        let mut now = Now::read();
        let mut limiter = Limiter::default();
        for _ in 0..BURST {
            assert_eq!(limiter.wait(source(1), now), None);
            limiter.failed(source(1), now);
        }
        assert_eq!(limiter.wait(source(1), now), Some(REFILL));
        assert_eq!(limiter.wait(source(2), now), None);
        now = now.plus(REFILL);
        assert_eq!(limiter.wait(source(1), now), None);
        limiter.failed(source(1), now);
        assert!(limiter.wait(source(1), now).is_some());
    }

    #[test]
    fn the_table_is_bounded_and_an_ipv6_source_is_its_network() {
        let now = Now::read();
        let mut limiter = Limiter::default();
        for _ in 0..BURST {
            limiter.failed("2001:db8::1".parse().unwrap(), now);
        }
        assert!(limiter.wait("2001:db8::2".parse().unwrap(), now).is_some());
        for i in 0..SOURCES as u32 + 10 {
            limiter.failed(std::net::Ipv4Addr::from(i).into(), now.plus(Duration::from_secs(1)));
        }
        assert_eq!(limiter.sources.len(), SOURCES);
    }
}
