//! When what is tried while a peer has no path, or none that is good enough.
//!
//! ```text
//!  round   0    1     2       3        4          5 ...
//!          │    │     │       │        │          │           then 5 s, 10 s, 20 s, 30 s ... for ever
//!          0  0.1 s 0.25 s  0.5 s     1 s        2 s
//!  pings   ●    ●     ●       ●        ●          ●      to every address, each round
//!  calls   ●          ○       ●        ●          ●      one initiation to every address
//!  signal  ●                           ●                 "call me", through the controller
//!  relay   ●          ●                ●                 channels at the peer's homes
//! ```
//!
//! Of the two nodes one is_initiator (●, ○ the other): the one that cannot be called, else the one with
//! the lower key. The other one holds its initiations back, so that they do not cross, but not its
//! pings: a ping proves to the beginner that its peer is listening by now and that this way is
//! open, so it initiates right there, at once. That is what opens a NAT from both sides within one
//! round trip, whichever of the two learned of the other first.

use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use towline_types::backoff::{Backoff, Jitter};

/// Pauses between the first rounds; [`BACKOFF`] follows.
const PAUSES: [Duration; 6] = [
    Duration::from_millis(100),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_millis(1_000),
    Duration::from_millis(2_000),
];
const SLOW: Duration = Duration::from_secs(5);
/// Pauses between all later rounds.
const BACKOFF: Backoff = Backoff::new(SLOW, Duration::from_secs(30), Jitter::Tenth);
/// How long the node that does not begin holds its initiations back.
const YIELD: Duration = Duration::from_millis(250);
/// The least time between initiations to everywhere; it doubles with each.
const CALL_PAUSE: Duration = Duration::from_millis(225);
/// The least time between two initiations that answer to what the peer sent.
const ANSWER_PAUSE: Duration = Duration::from_millis(40);

/// See the module.
#[derive(Debug)]
pub(super) struct ConnectSchedule {
    began: Instant,
    /// Nobody else would begin.
    is_forced: bool,
    attempts: u32,
    initiations: u32,
    last_initiation: Option<Instant>,
}

/// What one round does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attempt {
    /// Its number.
    pub(super) number: u32,
    /// Send initiations too.
    pub(super) has_initiation: bool,
    /// Signal the peer, and see about channels.
    pub(super) seeks_help: bool,
    /// When the next one follows.
    pub(super) pause: Duration,
}

impl ConnectSchedule {
    pub(super) fn new(now: Instant) -> Self {
        Self { began: now, is_forced: false, attempts: 0, initiations: 0, last_initiation: None }
    }

    /// From the beginning again.
    pub(super) fn restart(&mut self, now: Instant) {
        (self.began, self.is_forced, self.attempts, self.initiations) = (now, false, 0, 0);
    }

    /// Does not hold initiations back, whoever is_initiator: only we know that there is something to begin.
    pub(super) fn force(&mut self) {
        self.is_forced = true;
    }

    /// Since when this race runs.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// How many rounds there were.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The next round; `begins`: it is we who begin.
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

    /// An initiation went out to everywhere.
    pub(super) fn initiated(&mut self, now: Instant) {
        self.initiations = self.initiations.saturating_add(1);
        self.last_initiation = Some(now);
    }

    /// Whether an initiation may answer to something that the peer sent just now.
    pub(super) fn may_answer(&self, now: Instant, is_initiator: bool) -> bool {
        let rested = self.last_initiation.is_none_or(|at| now >= at + ANSWER_PAUSE);
        rested && self.can_begin(now, is_initiator)
    }

    /// An initiation answered to something of the peer.
    pub(super) fn answered(&mut self, now: Instant) {
        self.last_initiation = Some(now);
    }

    /// When an initiation was sent last.
    pub(super) fn last_initiation(&self) -> Option<Instant> {
        self.last_initiation
    }

    fn can_begin(&self, now: Instant, is_initiator: bool) -> bool {
        is_initiator || self.is_forced || now >= self.began + YIELD
    }

    fn can_initiate(&self, now: Instant) -> bool {
        let pause = match self.initiations {
            0 => ANSWER_PAUSE,
            calls => (CALL_PAUSE * 2u32.pow(calls.min(5) - 1)).min(SLOW),
        };
        self.last_initiation.is_none_or(|at| now >= at + pause)
    }
}
