//! Named deadlines. There is at most one of each name; setting it again moves it.
//!
//! Invariant: `by_time` and `by_name` hold the same pairs, so the next deadline is a look at the
//! first, and moving one costs the logarithm of how many there are, not how many peers there are.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use towline_types::id::{NodeId, WireguardKey};

/// What a deadline is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// The next attempt to reach a peer.
    Attempt(NodeId),
    /// The next ping on the path that carries a peer's traffic, or the verdict on the last one.
    Probe(NodeId),
    /// The next handshake with a static peer.
    StaticAttempt(WireguardKey),
    /// The next step of a search for a path's MTU.
    Mtu(NodeId),
    /// The next STUN request to a reflector.
    StunClient,
    /// The next registration with a relay.
    HomeRelays,
    /// The next report of the channels of our relay that were used.
    RelayServer,
    /// The next look at whether the second port is to be used.
    SecondPort,
    /// The release of what a removed node announced.
    GuardRelease,
    /// The end of an operator's ping; the number is the caller's.
    OperatorPing(u64),
}

impl Timer {
    /// Returns the name that the caller sees.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Attempt(_) | Self::StaticAttempt(_) => "attempt",
            Self::Probe(_) => "probe",
            Self::Mtu(_) => "mtu",
            Self::StunClient => "reflex",
            Self::HomeRelays => "homes",
            Self::RelayServer => "relay",
            Self::SecondPort => "second-port",
            Self::GuardRelease => "guard-release",
            Self::OperatorPing(_) => "operator-ping",
        }
    }
}

/// All deadlines of a mesh.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    by_time: BTreeSet<(Instant, Timer)>,
    by_name: BTreeMap<Timer, Instant>,
}

impl Timers {
    /// Sets or moves a deadline.
    pub(crate) fn set(&mut self, timer: Timer, at: Instant) {
        self.cancel(timer);
        self.by_time.insert((at, timer));
        self.by_name.insert(timer, at);
    }

    /// Sets a deadline, or moves it forward; never back.
    pub(crate) fn set_no_later(&mut self, timer: Timer, at: Instant) {
        if self.get(timer).is_none_or(|set| at < set) {
            self.set(timer, at);
        }
    }

    /// Returns when a deadline is due, if it is set.
    pub(crate) fn get(&self, timer: Timer) -> Option<Instant> {
        self.by_name.get(&timer).copied()
    }

    /// Removes a deadline.
    pub(crate) fn cancel(&mut self, timer: Timer) {
        if let Some(at) = self.by_name.remove(&timer) {
            self.by_time.remove(&(at, timer));
        }
    }

    /// Returns the earliest deadline.
    pub(crate) fn next(&self) -> Option<(Instant, Timer)> {
        self.by_time.first().copied()
    }

    /// Removes and returns the earliest deadline that has passed.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Timer> {
        let (at, timer) = self.next()?;
        if at > now {
            return None;
        }
        self.cancel(timer);
        Some(timer)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_earliest_deadline_comes_first_and_a_moved_one_only_once() {
        // Some instant to count from.
        #[allow(clippy::disallowed_methods)]
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (a, b) = (Timer::Attempt(NodeId([1; 16])), Timer::Probe(NodeId([1; 16])));
        let mut timers = Timers::default();
        timers.set(a, at(5));
        timers.set(b, at(3));
        timers.set(a, at(1));
        timers.set_no_later(b, at(4));
        assert_eq!(timers.next(), Some((at(1), a)));
        assert_eq!(timers.pop_due(at(0)), None);
        assert_eq!(timers.pop_due(at(9)), Some(a));
        assert_eq!(timers.pop_due(at(9)), Some(b));
        assert_eq!(timers.pop_due(at(9)), None);
        assert_eq!(timers.next(), None);
    }
}
