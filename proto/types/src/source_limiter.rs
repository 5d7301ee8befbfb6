//! Rate limit for each source address: one token bucket per source, in a table of fixed size.
//!
//! It is applied before any work that costs more than a look at the first bytes (a handshake takes
//! a quarter of a millisecond). A sender with forged source addresses passes it, and is stopped by
//! the WireGuard cookie. A sender that uses its real address cannot use up the tokens of others.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use crate::rate::{Rate, TokenBucket};

/// Places in one set of the table.
const WAYS: usize = 4;
/// Sets of the table.
const SETS: usize = 1024;

/// Token buckets per source: an IPv4 address, or an IPv6 /64.
#[derive(Debug)]
pub struct SourceLimiter {
    /// Hasher with a random key, so that an attacker cannot choose addresses that collide.
    hash: RandomState,
    slots: Box<[Slot]>,
    rate: Rate,
}

/// Slot for the bucket of one source. A bucket that was never used is full, as is the bucket of a
/// new source.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    tag: u32,
    bucket: TokenBucket,
}

impl SourceLimiter {
    /// Creates a limiter in which each source has a bucket of the given rate.
    pub fn new(rate: Rate) -> Self {
        let slots = vec![Slot::default(); SETS * WAYS].into_boxed_slice();
        Self { hash: RandomState::new(), slots, rate }
    }

    /// Takes a token from the bucket of `source`. Returns whether there was one.
    pub fn admit(&mut self, source: IpAddr, now: Instant) -> bool {
        let rate = self.rate;
        self.bucket(source).is_some_and(|bucket| bucket.take(&rate, now, 1))
    }

    /// Charges `source` for an event that has happened, whether or not it had a token left.
    pub fn charge(&mut self, source: IpAddr, now: Instant) {
        let rate = self.rate;
        if let Some(bucket) = self.bucket(source) {
            bucket.charge(&rate, now, 1);
        }
    }

    /// Returns how long `source` has to wait for its next token; zero if it has one.
    pub fn wait(&self, source: IpAddr, now: Instant) -> Duration {
        let (first, tag) = self.slot(source);
        let found = self.slots.iter().skip(first).take(WAYS).find(|slot| slot.is_of(tag));
        found.map_or(Duration::ZERO, |slot| slot.bucket.wait(&self.rate, now, 1))
    }

    /// Returns the bucket of a source. A source without a bucket replaces the fullest bucket of its
    /// set, which is the closest to a new one.
    fn bucket(&mut self, source: IpAddr) -> Option<&mut TokenBucket> {
        let (first, tag) = self.slot(source);
        let ways = self.slots.get_mut(first..first + WAYS)?;
        let found = ways.iter().position(|slot| slot.is_of(tag));
        let found = found.or_else(|| {
            let fullest = ways.iter().enumerate().min_by_key(|(_, slot)| slot.bucket.full_at());
            let (way, _) = fullest?;
            *ways.get_mut(way)? = Slot { tag, bucket: TokenBucket::default() };
            Some(way)
        });
        ways.get_mut(found?).map(|slot| &mut slot.bucket)
    }

    /// Returns the index of the first slot of the source's set, and the source's tag.
    fn slot(&self, address: IpAddr) -> (usize, u32) {
        let hash = self.hash.hash_one(source(address));
        ((hash as usize % SETS) * WAYS, (hash >> 32) as u32)
    }
}

impl Slot {
    fn is_of(&self, tag: u32) -> bool {
        self.tag == tag && self.bucket.full_at().is_some()
    }
}

/// Returns the address that counts as one source: the IPv4 address, or the IPv6 /64, since a host
/// usually controls all addresses of its /64.
pub fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !0u128 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_gets_its_burst_then_its_rate_and_harms_no_other() {
        let start = Instant::now();
        let mut limiter = SourceLimiter::new(Rate::per_second(10, 20));
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
        let mut limiter = SourceLimiter::new(Rate::per_second(1, 5));
        let admitted = (0..50u128).filter(|host| {
            let source = std::net::Ipv6Addr::from(0x2001_0db8_u128 << 96 | host);
            limiter.admit(source.into(), start)
        });
        assert_eq!(admitted.count(), 5);
    }

    #[test]
    fn what_is_charged_has_to_be_waited_for_by_that_source_alone() {
        let (now, period) = (Instant::now(), Duration::from_secs(6));
        let mut limiter = SourceLimiter::new(Rate::one_per(period, 3));
        let failing: IpAddr = "2001:db8::1".parse().unwrap();
        for _ in 0..3 {
            assert_eq!(limiter.wait(failing, now), Duration::ZERO);
            limiter.charge(failing, now);
        }
        assert_eq!(limiter.wait("2001:db8::2".parse().unwrap(), now), period);
        assert_eq!(limiter.wait("192.0.2.1".parse().unwrap(), now), Duration::ZERO);
        // An IPv4-mapped address is the same source.
        for _ in 0..3 {
            limiter.charge("::ffff:192.0.2.1".parse().unwrap(), now);
        }
        assert_eq!(limiter.wait("192.0.2.1".parse().unwrap(), now), period);
    }

    #[test]
    fn a_crowd_of_new_sources_does_not_free_one_that_is_in_arrears() {
        let now = Instant::now();
        let mut limiter = SourceLimiter::new(Rate::one_per(Duration::from_secs(6), 10));
        let failing: IpAddr = "192.0.2.1".parse().unwrap();
        for _ in 0..10 {
            limiter.charge(failing, now);
        }
        for host in 0..100_000 {
            limiter.charge(std::net::Ipv4Addr::from(host).into(), now);
        }
        assert!(limiter.wait(failing, now) > Duration::ZERO);
        assert_eq!(limiter.slots.len(), SETS * WAYS);
    }
}
