//! The largest datagram that a path takes, found out by pings padded to a size.
//!
//! ```text
//!  begin          no pong for the full size,        largest that was answered,
//!    │            or EMSGSIZE                       next step that was not
//!    ▼                 ▼                                 ▼
//!  full size ───────► every step of the ladder ───────► halving between the two ──► found
//!    │  pong            at once                          until they are STEP apart    │
//!    └────────────────────────────────────────────────────────────────────────────────┤
//!                                                       CONFIRM later: the found size │
//!                            three pings without a pong while the peer is up: search ◄──┘
//! ```
//!
//! No ICMP is needed, so a black hole is found like any other path. Until the search is through,
//! the full size holds: most paths take it, and a connection that begins small stays small. What the
//! kernel refuses is not sent again.

use std::time::{Duration, Instant};

use towline_types::mtu::Mtu;

use super::trains::Trains;
use crate::path::Path;

/// What WireGuard puts around an inner packet, in bytes.
const WIREGUARD: u16 = 32;
/// Steps of the ladder: MTUs that occur. 1,280, 1,296 and 1,368 are floors between clouds; 1,420
/// and less are tunnels; 1,492 is PPPoE.
const LADDER: [u16; 14] = [
    8_900, 4_352, 1_500, 1_492, 1_480, 1_460, 1_440, 1_420, 1_400, 1_380, 1_368, 1_340, 1_296,
    1_280,
];
/// The search ends when the answered and the unanswered size are this close.
const STEP: u16 = 8;
/// Times that a size is tried before it counts as too big.
const TRIES: u8 = 2;
/// How often a found size is confirmed while the path is in use.
const CONFIRM: Duration = Duration::from_secs(30);
/// Pause before a train of pings where the last one did not arrive whole, and before the first.
const TRAIN_AGAIN: Duration = Duration::from_secs(1);
/// How often a larger one is tried, RFC 8899 section 5.1.1.
const RAISE: Duration = Duration::from_secs(600);

/// The search on the path that carries a peer's traffic.
#[derive(Debug, Default)]
pub(crate) struct Pmtu {
    path: Option<Path>,
    /// UDP payload of the full size.
    full: u16,
    stage: Stage,
    /// UDP payload that was answered, and the least that was not.
    good: u16,
    bad: u16,
    tries: u8,
    /// True once the kernel refused a larger datagram: `full` is the size that it accepts.
    is_refused: bool,
    /// The found size was answered again.
    is_confirmed: bool,
    found_at: Option<Instant>,
    trains: Trains,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Full,
    Ladder,
    Halving,
    Found,
}

/// What to do next.
#[derive(Default)]
pub(crate) struct Step {
    /// Sizes to ping with, now.
    pub(crate) sizes: Vec<u16>,
    /// Size of several pings to send together, now.
    pub(crate) train: Option<u16>,
    /// When to look again; `None`: soon, after the time that an answer takes.
    pub(crate) pause: Option<Duration>,
}

impl Pmtu {
    /// Begins on a path, for inner packets of up to `inner` bytes.
    pub(crate) fn begin(&mut self, path: Path, inner: Mtu) {
        *self = Self { path: Some(path), full: payload(&path, inner.get()), ..Self::default() };
    }

    /// The path has another name now.
    pub(crate) fn rename(&mut self, path: Path) {
        self.path = Some(path);
    }

    /// The path that is being searched.
    pub(crate) fn path(&self) -> Option<Path> {
        self.path
    }

    /// The largest inner packet, once it is known.
    pub(crate) fn inner(&self) -> Option<u16> {
        let path = self.path?;
        (self.stage == Stage::Found).then(|| inner(&path, self.good))
    }

    /// Returns the largest inner packet to send now: the one that was found. While a search runs
    /// because the kernel refused a datagram, the one that it takes. `None`: the link's MTU holds.
    pub(crate) fn applied(&self) -> Option<u16> {
        let refused = self.path.filter(|_| self.is_refused).map(|path| inner(&path, self.full));
        self.inner().or(refused)
    }

    /// Records the answer to a ping of a train.
    pub(crate) fn train_answered(&mut self, path: Path) {
        if self.path == Some(path) {
            self.trains.answered();
        }
    }

    /// Returns whether datagrams that are sent together do not arrive, while single ones do.
    pub(crate) fn is_bad_for_trains(&self) -> bool {
        self.trains.is_bad()
    }

    /// A padded ping was answered. Says whether to go on at once.
    pub(crate) fn answered(&mut self, path: Path, size: u16) -> bool {
        if self.path != Some(path) || size <= self.good && self.stage != Stage::Found {
            return false;
        }
        match self.stage {
            Stage::Found => {
                self.tries = 0;
                self.is_confirmed = true;
                // A larger one that was tried, to see whether the path grew.
                self.good = self.good.max(size);
                false
            }
            Stage::Full | Stage::Ladder | Stage::Halving => {
                self.good = size;
                if self.stage == Stage::Halving {
                    self.tries = 0;
                }
                size >= self.full || self.stage == Stage::Halving
            }
        }
    }

    /// The kernel knows that the path takes less. Says whether to go on at once.
    pub(crate) fn too_big(&mut self, path: Path, payload: u16) -> bool {
        if self.path != Some(path) || payload >= self.full || payload < 500 {
            return false;
        }
        if self.stage == Stage::Found && self.good <= payload {
            return false;
        }
        (self.full, self.is_refused) = (payload, true);
        (self.stage, self.good, self.bad, self.tries) = (Stage::Full, 0, 0, 0);
        true
    }

    /// Time has passed: what next? `link` is the largest inner packet that is ever sent.
    pub(crate) fn step(&mut self, now: Instant, link: Mtu) -> Step {
        let Some(path) = self.path else {
            return Step { pause: Some(RAISE), ..Step::default() };
        };
        if self.good >= self.full && self.stage != Stage::Found {
            return self.found(now);
        }
        match self.stage {
            Stage::Full if self.tries < TRIES => {
                self.tries += 1;
                Step { sizes: vec![self.full], ..Step::default() }
            }
            Stage::Full => {
                (self.stage, self.bad, self.tries) = (Stage::Ladder, self.full, 1);
                Step { sizes: self.ladder(&path), ..Step::default() }
            }
            Stage::Ladder if self.tries < TRIES => {
                self.tries += 1;
                Step { sizes: self.ladder(&path), ..Step::default() }
            }
            Stage::Ladder if self.good == 0 => {
                // Not even the least step: whatever it takes, it takes it in fragments.
                self.good = payload(&path, Mtu::MIN.get()) - STEP;
                self.found(now)
            }
            Stage::Ladder => {
                let above = self.ladder(&path).into_iter().filter(|size| *size > self.good).min();
                self.bad = above.unwrap_or(self.full);
                (self.stage, self.tries) = (Stage::Halving, 0);
                self.halve(now)
            }
            Stage::Halving => self.halve(now),
            Stage::Found if std::mem::take(&mut self.is_confirmed) => {
                let pause = if self.trains.end(true) { TRAIN_AGAIN } else { CONFIRM };
                Step { pause: Some(pause), ..Step::default() }
            }
            Stage::Found if self.tries > TRIES => {
                self.begin(path, link);
                self.step(now, link)
            }
            Stage::Found => {
                self.trains.end(false);
                self.tries += 1;
                let raise = self.found_at.is_some_and(|at| now >= at + RAISE)
                    && self.good < payload(&path, link.get());
                if raise {
                    self.begin(path, link);
                    return self.step(now, link);
                }
                let train = self.trains.begin().then_some(self.good);
                Step { sizes: vec![self.good], train, pause: None }
            }
        }
    }

    /// The size of the last try was not answered in time, or the size before was: the next one.
    fn halve(&mut self, now: Instant) -> Step {
        let middle = |good: u16, bad: u16| good + (bad - good) / 2;
        if self.tries >= TRIES {
            self.bad = middle(self.good, self.bad);
            self.tries = 0;
        }
        if self.bad <= self.good + STEP {
            return self.found(now);
        }
        self.tries += 1;
        Step { sizes: vec![middle(self.good, self.bad)], ..Step::default() }
    }

    fn found(&mut self, now: Instant) -> Step {
        (self.stage, self.tries) = (Stage::Found, 0);
        self.found_at = Some(now);
        Step { pause: Some(TRAIN_AGAIN), ..Step::default() }
    }

    fn ladder(&self, path: &Path) -> Vec<u16> {
        let headers = if path.remote.is_ipv4() { 28 } else { 48 };
        LADDER.iter().map(|mtu| mtu - headers).filter(|size| *size < self.full).collect()
    }
}

/// The UDP payload that carries an inner packet.
fn payload(path: &Path, inner: u16) -> u16 {
    let channel = if path.is_relayed() { Path::CHANNEL_BYTES } else { 0 };
    inner.saturating_add(WIREGUARD + channel)
}

/// The inner packet that a UDP payload carries.
fn inner(path: &Path, payload: u16) -> u16 {
    let channel = if path.is_relayed() { Path::CHANNEL_BYTES } else { 0 };
    payload.saturating_sub(WIREGUARD + channel)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The inner MTU that is found where nothing larger than `underlay` passes, without a word.
    fn search(underlay: u16, loss: impl Fn(u32) -> bool) -> u16 {
        let path = Path::direct(([203, 0, 113, 1], 51_830).into());
        let mut pmtu = Pmtu::default();
        pmtu.begin(path, Mtu::DEFAULT);
        #[allow(clippy::disallowed_methods)] // some instant to count from
        let now = Instant::now();
        let mut sent = 0;
        for _ in 0..60 {
            let step = pmtu.step(now, Mtu::DEFAULT);
            if pmtu.stage == Stage::Found {
                break;
            }
            for size in step.sizes {
                sent += 1;
                if size + 28 <= underlay && !loss(sent) {
                    pmtu.answered(path, size);
                }
            }
        }
        pmtu.inner().unwrap()
    }

    #[test]
    fn every_floor_is_found_to_within_a_step_and_never_overrun() {
        for underlay in [1_500, 1_492, 1_480, 1_436, 1_420, 1_400, 1_368, 1_333, 1_296, 1_280] {
            let inner = search(underlay, |_| false);
            let most = (underlay - 28 - WIREGUARD).min(1_420);
            assert!(inner <= most && inner + STEP >= most, "{underlay}: {inner} of {most}");
        }
        assert_eq!(search(1_500, |_| false), 1_420);
        assert!(search(1_200, |_| false) < Mtu::MIN.get());
    }

    /// Runs the search on a path for `seconds`, on which `arrives` says whether a single ping arrives,
    /// and how many of a train. Returns whether the path ends up bad for trains.
    fn is_bad(seconds: u64, mut arrives: impl FnMut() -> (bool, u8)) -> bool {
        let path = Path::direct(([203, 0, 113, 1], 51_830).into());
        let mut pmtu = Pmtu::default();
        pmtu.begin(path, Mtu::DEFAULT);
        #[allow(clippy::disallowed_methods)] // some instant to count from
        let start = Instant::now();
        let mut now = start;
        while now < start + Duration::from_secs(seconds) {
            let step = pmtu.step(now, Mtu::DEFAULT);
            now += step.pause.unwrap_or(Duration::from_millis(200));
            let (single, train) = arrives();
            for size in step.sizes.into_iter().filter(|_| single) {
                pmtu.answered(path, size);
            }
            for _ in 0..step.train.map_or(0, |_| train) {
                pmtu.train_answered(path);
            }
        }
        assert!(pmtu.inner().is_some());
        pmtu.is_bad_for_trains()
    }

    #[test]
    fn trains_that_never_arrive_whole_beside_single_pings_are_given_up() {
        assert!(!is_bad(120, || (true, 3)));
        assert!(is_bad(20, || (true, 0)), "nothing of a train arrives");
        assert!(is_bad(20, || (true, 2)), "the last one is damaged");
        let mut number = 0;
        let mut lossy = || {
            number += 1;
            (number % 7 != 0, if number % 3 == 0 { 2 } else { 3 })
        };
        assert!(!is_bad(590, &mut lossy), "loss is no damage");
    }

    #[test]
    fn a_lost_ping_is_no_proof() {
        assert_eq!(search(1_500, |sent| sent == 1), 1_420);
    }
}
