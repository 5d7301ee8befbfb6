//! Whether the path that carries a peer's traffic still does.
//!
//! ```text
//!  used:  ping ── 1 s ── ping ── 1 s ── ping ∙∙ no pong in time ∙∙ ping ping ping ∙∙∙ 8 of them
//!                                               │                                       │
//!                                               ▼ doubt                                 ▼ dead
//!                                  every other path is pinged;            all are raced, the
//!                                  one that answers while this            state is Connecting
//!                                  one does not takes over
//!  idle:  ping ── 20 s ── ping ── 20 s ──∙∙ as long as the mesh is small, or the peer recent
//!                                           and a NAT of ours needs it; then nothing at all
//! ```
//!
//! A pong shows that the path works, and so does a handshake on it. Data of the peer shows only that
//! it carries the way from the peer: then more pings have to be lost before it is given up, so that
//! pongs that get lost alone cost no path. A path that carries one direction alone is still as dead as
//! one that carries none. With one packet in five lost each way, eight pings in a row still get an
//! answer.

use std::time::{Duration, Instant};

use super::loss::Loss;

/// How often a path that is in use is pinged.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Pause between pings while the path is in doubt.
const DOUBT_INTERVAL: Duration = Duration::from_millis(125);
/// Pings without a pong after which a path is dead.
const DEAD: u32 = 9;
/// Pings without a pong after which a path is dead though data of the peer comes over it.
const DEAD_THOUGH_HEARD: u32 = 12;
/// Time for which data shows that the way from the peer works. The data plane reports it once a second.
const DATA_FOR: Duration = Duration::from_millis(1_500);
/// Pings without a pong after which another path that answered takes over.
const DOUBTFUL: u32 = 3;
/// Pings without a pong after which another path of a worse kind takes over.
const DOUBTFUL_WORSE: u32 = 6;
/// How often an idle path is pinged, where it is at all: many NATs forget after 30 s.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// A path is in use for this long after inner traffic.
const USED_FOR: Duration = Duration::from_secs(15);
/// A peer is recent for this long after inner traffic.
const RECENT_FOR: Duration = Duration::from_secs(300);
/// Time after a pong for which a path needs no ping before it is used.
const FRESH: Duration = Duration::from_millis(1_500);

/// State of the path in use; see the module.
#[derive(Debug, Default)]
pub(super) struct Liveness {
    /// Time of the last inner traffic.
    used: Option<Instant>,
    /// Pings in a row that have no pong.
    unanswered: u32,
    /// Time at which the first of them was sent.
    doubt: Option<Instant>,
    /// Time of the last pong. Cleared when the path changes.
    answered: Option<Instant>,
    /// Time of the last data of the peer on the path. Cleared when the path changes.
    heard: Option<Instant>,
    /// True if data of the peer came on the path lately. Set by [`Self::due`].
    is_heard: bool,
    /// Pings on this path that were lost.
    loss: Loss,
}

/// Result of [`Liveness::due`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Ping it again, and look after this pause.
    Ping(Duration),
    /// Ping it again, look after this pause, and ping the other paths: it has just become doubtful.
    Doubt(Duration),
    /// The path is dead.
    Dead,
}

impl Liveness {
    /// Records inner traffic. Returns whether the path should be pinged now: it was not in use, and
    /// it is unknown whether it still works.
    pub(super) fn traffic(&mut self, now: Instant) -> bool {
        let was_used = self.is_used(now);
        self.used = Some(now);
        !was_used && self.answered.is_none_or(|at| now >= at + FRESH)
    }

    pub(super) fn is_used(&self, now: Instant) -> bool {
        self.used.is_some_and(|at| now < at + USED_FOR)
    }

    /// Returns whether there ever was inner traffic.
    pub(super) fn has_been_used(&self) -> bool {
        self.used.is_some()
    }

    pub(super) fn is_recent(&self, now: Instant) -> bool {
        self.used.is_some_and(|at| now < at + RECENT_FOR)
    }

    /// Forgets what is known of the path: it is another one now.
    pub(super) fn moved(&mut self) {
        self.unanswered = 0;
        self.doubt = None;
        self.answered = None;
        self.heard = None;
        self.is_heard = false;
        self.loss = Loss::default();
    }

    /// Records that data of the peer came on the path.
    pub(super) fn data(&mut self, now: Instant) {
        self.heard = Some(now);
    }

    /// Records that a handshake completed on the path: both directions work.
    pub(super) fn handshake(&mut self, now: Instant) {
        self.unanswered = 0;
        self.doubt = None;
        self.answered = Some(now);
    }

    /// Records a pong on the path, to a ping that was sent at `sent`. Returns when to ping next;
    /// `None`: not again. `keep` says that an idle path is kept open.
    pub(super) fn pong(&mut self, now: Instant, sent: Instant, keep: bool) -> Option<Instant> {
        self.unanswered = 0;
        self.doubt = None;
        self.answered = Some(now);
        self.loss.record(false);
        if self.is_used(now) {
            Some((sent + PROBE_INTERVAL).max(now))
        } else {
            keep.then_some(now + KEEPALIVE)
        }
    }

    /// Counts the ping that is due, or gives the path up. An answer takes `wait` at most.
    pub(super) fn due(&mut self, now: Instant, wait: Duration) -> Verdict {
        if self.unanswered > 0 {
            self.loss.record(true);
        }
        self.is_heard = self.heard.is_some_and(|at| now < at + DATA_FOR);
        let dead = if self.is_heard { DEAD_THOUGH_HEARD } else { DEAD };
        if self.unanswered >= dead {
            return Verdict::Dead;
        }
        self.unanswered += 1;
        match self.unanswered {
            1 => {
                self.doubt = Some(now);
                Verdict::Ping(wait)
            }
            2 => Verdict::Doubt(DOUBT_INTERVAL),
            _ => Verdict::Ping(DOUBT_INTERVAL),
        }
    }

    /// Returns the share of the last pings on the path that were lost, from 0 to 1. `None` before the first
    /// one.
    pub(super) fn loss(&self) -> Option<f64> {
        self.loss.share()
    }

    /// Returns since when the path is in doubt, once another one may take over.
    pub(super) fn doubtful(&self) -> Option<Instant> {
        let enough = if self.is_heard { DOUBTFUL_WORSE } else { DOUBTFUL };
        self.doubt.filter(|_| self.unanswered >= enough)
    }

    /// Returns whether a path of a worse kind may take over.
    pub(super) fn yields_to_worse(&self) -> bool {
        let enough = if self.is_heard { DEAD } else { DOUBTFUL_WORSE };
        self.unanswered >= enough
    }
}
