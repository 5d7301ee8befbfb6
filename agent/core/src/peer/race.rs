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
//! Of the two nodes one begins (●, ○ the other): the one that cannot be called, else the one with
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
pub(super) struct Race {
    began: Instant,
    /// Nobody else would begin.
    insists: bool,
    round: u32,
    calls: u32,
    last_call: Option<Instant>,
}

/// What one round does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Round {
    /// Its number.
    pub(super) number: u32,
    /// Send initiations too.
    pub(super) call: bool,
    /// Signal the peer, and see about channels.
    pub(super) help: bool,
    /// When the next one follows.
    pub(super) pause: Duration,
}

impl Race {
    pub(super) fn new(now: Instant) -> Self {
        Self { began: now, insists: false, round: 0, calls: 0, last_call: None }
    }

    /// From the beginning again.
    pub(super) fn restart(&mut self, now: Instant) {
        (self.began, self.insists, self.round, self.calls) = (now, false, 0, 0);
    }

    /// Does not hold initiations back, whoever begins: only we know that there is something to begin.
    pub(super) fn insist(&mut self) {
        self.insists = true;
    }

    /// Since when this race runs.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// How many rounds there were.
    pub(super) fn rounds(&self) -> u32 {
        self.round
    }

    /// The next round; `begins`: it is we who begin.
    pub(super) fn next(&mut self, now: Instant, begins: bool, rng: &mut StdRng) -> Round {
        let number = self.round;
        self.round = self.round.saturating_add(1);
        let pause = match PAUSES.get(number as usize) {
            Some(pause) => Jitter::Tenth.apply(*pause, rng.random()),
            None => BACKOFF.pause(number - PAUSES.len() as u32, rng.random()),
        };
        let call = self.may_begin(now, begins) && self.may_call(now);
        Round {
            number,
            call,
            help: number.is_multiple_of(2) || number as usize > PAUSES.len(),
            pause,
        }
    }

    /// An initiation went out to everywhere.
    pub(super) fn called(&mut self, now: Instant) {
        self.calls = self.calls.saturating_add(1);
        self.last_call = Some(now);
    }

    /// Whether an initiation may answer to something that the peer sent just now.
    pub(super) fn may_answer(&self, now: Instant, begins: bool) -> bool {
        let rested = self.last_call.is_none_or(|at| now >= at + ANSWER_PAUSE);
        rested && self.may_begin(now, begins)
    }

    /// An initiation answered to something of the peer.
    pub(super) fn answered(&mut self, now: Instant) {
        self.last_call = Some(now);
    }

    /// When an initiation was sent last.
    pub(super) fn last_call(&self) -> Option<Instant> {
        self.last_call
    }

    fn may_begin(&self, now: Instant, begins: bool) -> bool {
        begins || self.insists || now >= self.began + YIELD
    }

    fn may_call(&self, now: Instant) -> bool {
        let pause = match self.calls {
            0 => ANSWER_PAUSE,
            calls => (CALL_PAUSE * 2u32.pow(calls.min(5) - 1)).min(SLOW),
        };
        self.last_call.is_none_or(|at| now >= at + pause)
    }
}
