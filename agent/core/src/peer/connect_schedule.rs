//! Schedule of the attempts to reach a peer that has no path, or none that is good enough.
//!
//! ```text
//!  attempt 0    1     2       3        4          5 ...
//!          │    │     │       │        │          │           then 5 s, 10 s, 20 s, 30 s ... without end
//!          0  0.1 s 0.25 s  0.5 s     1 s        2 s
//!  pings   ●    ●     ●       ●        ●          ●      to every address, each attempt
//!  initiations ●      ○       ●        ●          ●      one to every address
//!  signal  ●                           ●                 "call me", through the controller
//!  relay   ●          ●                ●                 channels at the peer's home relays
//! ```
//!
//! One of the two nodes is the initiator (●, the responder is ○): the one that others cannot reach
//! first, else the one with the lower key. The responder holds its own initiations back, so that
//! they do not cross, but not its pings: a ping proves to the initiator that its peer is listening
//! and that this path is open, so it initiates there at once. That opens a NAT from both sides
//! within one round trip, whichever of the two learned of the other first.

use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use towline_types::backoff::{Backoff, Jitter};

/// Pauses between the first attempts; [`BACKOFF`] follows. Short at first: two nodes that learn of
/// each other at once meet within a second.
const PAUSES: [Duration; 6] = [
    Duration::from_millis(100),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_millis(1_000),
    Duration::from_millis(2_000),
];
/// First of the later pauses, and the longest pause between initiations to every address.
const SLOW: Duration = Duration::from_secs(5);
/// Pauses between all later attempts.
const BACKOFF: Backoff = Backoff::new(SLOW, Duration::from_secs(30), Jitter::Tenth);
/// Time for which the responder holds its own initiations back.
const YIELD: Duration = Duration::from_millis(250);
/// Shortest time between initiations to every address; it doubles with each.
const INITIATION_PAUSE: Duration = Duration::from_millis(225);
/// Shortest time between two initiations that answer a message of the peer.
const ANSWER_PAUSE: Duration = Duration::from_millis(40);

/// State of one series of attempts; see the module.
#[derive(Debug)]
pub(super) struct ConnectSchedule {
    /// Begin of the series.
    began: Instant,
    /// True if the peer does not know that a handshake is needed, so that it never initiates. Set
    /// by [`Self::force`], cleared by [`Self::restart`].
    is_forced: bool,
    /// Attempts of the series so far.
    attempts: u32,
    /// Initiations to every address in the series so far.
    initiations: u32,
    /// Time of the last initiation, in this series or an earlier one.
    last_initiation: Option<Instant>,
}

/// What one attempt does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attempt {
    /// Number of the attempt in its series, from 0.
    pub(super) number: u32,
    /// True if initiations are sent too.
    pub(super) has_initiation: bool,
    /// True if the peer is signalled, and relays are asked for channels.
    pub(super) seeks_help: bool,
    /// Time until the next attempt.
    pub(super) pause: Duration,
}

impl ConnectSchedule {
    pub(super) fn new(now: Instant) -> Self {
        Self { began: now, is_forced: false, attempts: 0, initiations: 0, last_initiation: None }
    }

    /// Begins a new series.
    pub(super) fn restart(&mut self, now: Instant) {
        (self.began, self.is_forced, self.attempts, self.initiations) = (now, false, 0, 0);
    }

    /// Has this series send initiations at once even as the responder: only we know that a handshake
    /// is needed.
    pub(super) fn force(&mut self) {
        self.is_forced = true;
    }

    /// Returns when the series began.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// Returns the number of attempts so far.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Begins the next attempt. `is_initiator` says whether this node is the initiator.
    pub(super) fn next(&mut self, now: Instant, is_initiator: bool, rng: &mut StdRng) -> Attempt {
        let number = self.attempts;
        self.attempts = self.attempts.saturating_add(1);
        let pause = match PAUSES.get(number as usize) {
            Some(pause) => Jitter::Tenth.apply(*pause, rng.random()),
            None => BACKOFF.pause(number - PAUSES.len() as u32, rng.random()),
        };
        let has_initiation = self.can_begin(now, is_initiator) && self.can_initiate(now);
        Attempt {
            number,
            has_initiation,
            seeks_help: number.is_multiple_of(2) || number as usize > PAUSES.len(),
            pause,
        }
    }

    /// Records that an initiation went to every address.
    pub(super) fn initiated(&mut self, now: Instant) {
        self.initiations = self.initiations.saturating_add(1);
        self.last_initiation = Some(now);
    }

    /// Returns whether an initiation may answer what the peer sent just now.
    pub(super) fn may_answer(&self, now: Instant, is_initiator: bool) -> bool {
        let rested = self.last_initiation.is_none_or(|at| now >= at + ANSWER_PAUSE);
        rested && self.can_begin(now, is_initiator)
    }

    /// Records that an initiation answered a message of the peer.
    pub(super) fn answered(&mut self, now: Instant) {
        self.last_initiation = Some(now);
    }

    /// Returns when an initiation was sent last.
    pub(super) fn last_initiation(&self) -> Option<Instant> {
        self.last_initiation
    }

    fn can_begin(&self, now: Instant, is_initiator: bool) -> bool {
        is_initiator || self.is_forced || now >= self.began + YIELD
    }

    fn can_initiate(&self, now: Instant) -> bool {
        let pause = match self.initiations {
            0 => ANSWER_PAUSE,
            calls => (INITIATION_PAUSE * 2u32.pow(calls.min(5) - 1)).min(SLOW),
        };
        self.last_initiation.is_none_or(|at| now >= at + pause)
    }
}
