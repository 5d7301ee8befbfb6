//! How much may be sent to an address that is known only as the source of a datagram.
//!
//! Anybody can name any address as the source of a datagram, and any host on the way can change
//! it. Until a pong shows that the peer receives there, the address gets at most three times the
//! bytes that came from it (RFC 9000 section 8), so that nobody uses this node to flood it. What the
//! peer signed as a candidate is bounded by [`Unanswered`](crate::budget::Unanswered) alone.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use towline_types::frame::{PROBE_BYTES, STAMPED_PROBE_BYTES};

/// Credit for a ping that the data plane answered: three times the smallest ping less its pong, in
/// bytes.
pub(super) const ANSWERED_PING: usize = 2 * PROBE_BYTES;
/// Credit for an authentic WireGuard message: three times the smallest one, a keepalive of 32 bytes.
pub(super) const DATA: usize = 3 * 32;
/// Bytes of a ping that is not padded.
pub(super) const PING: usize = STAMPED_PROBE_BYTES;
/// Number of addresses that are remembered. The one that was silent for the longest time is forgotten
/// first.
const SOURCES: usize = 16;
/// Largest credit of one address in bytes: a source that sends a lot is validated by a few datagrams.
const MOST: usize = 2_048;

/// Credit of the addresses that datagrams of one peer came from.
#[derive(Debug, Default)]
pub(super) struct SourceCredit {
    by_address: BTreeMap<SocketAddr, Credit>,
}

/// Credit of one address.
#[derive(Debug)]
struct Credit {
    /// Bytes that may still be sent.
    left: usize,
    /// Time of the last datagram.
    heard: Instant,
}

impl SourceCredit {
    /// Adds credit for an authentic datagram.
    pub(super) fn add(&mut self, now: Instant, from: SocketAddr, bytes: usize) {
        if self.by_address.len() == SOURCES && !self.by_address.contains_key(&from) {
            let silent = self.by_address.iter().min_by_key(|(_, credit)| credit.heard);
            if let Some(silent) = silent.map(|(address, _)| *address) {
                self.by_address.remove(&silent);
            }
        }
        let credit = self.by_address.entry(from).or_insert(Credit { left: 0, heard: now });
        credit.left = (credit.left + bytes).min(MOST);
        credit.heard = now;
    }

    /// Spends credit for a datagram. Returns whether it may be sent.
    pub(super) fn spend(&mut self, to: SocketAddr, bytes: usize) -> bool {
        let credit = self.by_address.get_mut(&to).filter(|credit| credit.left >= bytes);
        let Some(credit) = credit else { return false };
        credit.left -= bytes;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_gets_no_more_than_it_earned_and_there_are_few_addresses() {
        #[allow(clippy::disallowed_methods)] // some instant to count from
        let now = Instant::now();
        let at = |port: u16| SocketAddr::from(([192, 0, 2, 9], port));
        let mut credit = SourceCredit::default();
        assert!(!credit.spend(at(1), PING));
        credit.add(now, at(1), ANSWERED_PING);
        assert!(credit.spend(at(1), PING));
        assert!(!credit.spend(at(1), PING));
        for port in 1..1_000 {
            credit.add(now, at(port), ANSWERED_PING);
        }
        assert_eq!(credit.by_address.len(), SOURCES);
        for _ in 0..1_000 {
            credit.add(now, at(999), ANSWERED_PING);
        }
        assert!(!credit.spend(at(999), MOST + 1));
    }
}
