//! How much one source address may ask of us: a token bucket each, in a table of fixed size.
//!
//! It stands before everything that costs more than a look at the first bytes (a handshake takes
//! a quarter of a millisecond). Who forges source addresses gets past it, and meets the cookie;
//! who does not cannot use up what others need.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::time::{Duration, Instant};

const WAYS: usize = 4;
const SETS: usize = 1024;

/// A bucket per source: an IPv4 address, or an IPv6 /64.
#[derive(Debug)]
pub struct SourceLimiter {
    /// Keyed at random: nobody can choose addresses that collide.
    hash: RandomState,
    buckets: Box<[Bucket]>,
    started: Instant,
    per_second: u64,
    burst: u64,
}

/// In an empty bucket `at` is 0 and so is the tag: the first to come finds it full.
#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    tag: u32,
    /// When it was used last, in milliseconds after the start.
    at: u32,
    /// What is spent, in thousandths of a token: it drains with time.
    spent: u64,
}

impl SourceLimiter {
    /// Each source may ask `per_second` times a second, after a burst of `burst`.
    pub fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        Self {
            hash: RandomState::new(),
            buckets: vec![Bucket::default(); SETS * WAYS].into_boxed_slice(),
            started: now,
            per_second: u64::from(per_second),
            burst: u64::from(burst) * 1000,
        }
    }

    /// Whether `source` may ask once more; if so, it is charged.
    pub fn admit(&mut self, source: IpAddr, now: Instant) -> bool {
        let hash = match source {
            IpAddr::V4(v4) => self.hash.hash_one(u32::from(v4)),
            IpAddr::V6(v6) => self.hash.hash_one(u128::from(v6) >> 64),
        };
        // One second ahead, so that 0 means never.
        let age = now.saturating_duration_since(self.started) + Duration::from_secs(1);
        let at = age.as_millis() as u32;
        let set = (hash as usize % SETS) * WAYS;
        let tag = (hash >> 32) as u32;
        let Some(ways) = self.buckets.get_mut(set..set + WAYS) else { return false };
        let found = match ways.iter().position(|bucket| bucket.tag == tag && bucket.at != 0) {
            Some(found) => found,
            None => {
                // Whoever was silent longest loses the place.
                let oldest = ways.iter().enumerate().min_by_key(|(_, bucket)| bucket.at);
                let oldest = oldest.map_or(0, |(way, _)| way);
                ways[oldest] = Bucket { tag, at, spent: 0 };
                oldest
            }
        };
        let bucket = &mut ways[found];
        let drained = u64::from(at.wrapping_sub(bucket.at)) * self.per_second;
        bucket.at = at;
        bucket.spent = bucket.spent.saturating_sub(drained);
        let admitted = bucket.spent + 1000 <= self.burst;
        if admitted {
            bucket.spent += 1000;
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_gets_its_burst_then_its_rate_and_harms_no_other() {
        let start = Instant::now();
        let mut limiter = SourceLimiter::new(10, 20, start);
        let loud: IpAddr = "192.0.2.1".parse().unwrap();
        let quiet: IpAddr = "192.0.2.2".parse().unwrap();
        assert_eq!((0..100).filter(|_| limiter.admit(loud, start)).count(), 20);
        assert!(limiter.admit(quiet, start));
        let later = start + Duration::from_secs(1);
        assert_eq!((0..100).filter(|_| limiter.admit(loud, later)).count(), 10);
        let much_later = start + Duration::from_secs(3600);
        assert_eq!((0..100).filter(|_| limiter.admit(loud, much_later)).count(), 20);
    }

    #[test]
    fn a_whole_ipv6_network_is_one_source() {
        let start = Instant::now();
        let mut limiter = SourceLimiter::new(1, 5, start);
        let admitted = (0..50u128).filter(|host| {
            let source = std::net::Ipv6Addr::from(0x2001_0db8_u128 << 96 | host);
            limiter.admit(source.into(), start)
        });
        assert_eq!(admitted.count(), 5);
    }
}
