//! Receiving side of one peer's probes: which of them are fresh, which need a challenge, and how
//! many are answered. The frames are in [`towline_types::frame`].
//!
//! The worker of the data plane that opened a probe asks [`ProbeSession::receive`] and carries the
//! answer out, without the daemon. So a busy daemon costs no path, and what is replayed, or comes
//! from an address that nobody validated, gets no further.
//!
//! | probe | decision |
//! |---|---|
//! | its stamp is fresh, or it has version 1 | delivered; a ping is answered by a pong |
//! | its epoch is not the known one, or its counter was seen or is too old | challenge |
//! | it asks the relay for something, from a path that is not validated | challenge |
//! | challenge | proof; delivered, so that what was refused is sent again |
//! | proof with a valid token | its stamp is the current one, its path is validated; delivered |
//!
//! An epoch is never better because it is higher: only a proof shows which one is current. So a node
//! whose clock, disk or memory went back is in contact again after two round trips, and what was
//! recorded before an epoch was proven is refused.
//!
//! Tokens are stateless: a keyed hash of peer, path, time and number of proofs. Replays from any
//! number of addresses make no challenge invalid. Each accepted proof ends the tokens before it.
//! A proof takes the window of its epoch back only if its token has the highest counter that was
//! accepted, too: one that was held back on the way does not open what was accepted meanwhile.
//!
//! Replays can have the address of the peer itself. They and what they elicit have limits of their own, so
//! that they use up nothing that the peer needs:
//!
//! | limit | what a third party that replays adds to it |
//! |---|---|
//! | messages, pongs | nothing in version 2: only fresh messages count, which no replay makes the peer send |
//! | challenges | each replay |
//! | proofs that are delivered | proofs of the peer, since it answers the challenges |
//! | answers to fresh challenges | challenges of the peer, within its limit, if replays are sent to it too |
//! | answers to other challenges | each replay of a challenge |

use std::hash::BuildHasher;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use towline_types::frame::{Probe, Stamp};
use towline_types::id::WireguardKey;
use towline_types::rate::{Rate, TokenBucket};

use crate::path::{ChannelId, Path};

/// Fresh messages of one peer that are delivered, per second and in a burst: some times what the
/// doubt about a path and the search for another one need.
const MESSAGES: Rate = Rate::per_second(128, 256);
/// Pings of one peer that are answered, per second and in a burst.
const PONGS: Rate = Rate::per_second(60, 60);
/// Challenges for one peer, per second and in a burst, and as many proofs of each kind. Replays elicit them
/// too, so the rate is generous: the caller limits those to one source address.
const ANSWERS: Rate = Rate::per_second(256, 256);
/// Challenges of one peer that are delivered, per second and in a burst, of each kind. A challenge can be
/// replayed.
const REPEATS: Rate = Rate::per_second(8, 16);
/// Proofs of one peer that are delivered, per second and in a burst: one for each path of a peer that is just
/// found. Replays elicit more, whose delivery adds nothing: an accepted proof has its effect without it.
const PROOFS: Rate = Rate::per_second(32, 64);
/// Length of a period of tokens, in seconds. A token is valid in its period and the next one: longer
/// than any round trip.
const PERIOD: u64 = 8;
/// Time for which a path stays validated. Its address may belong to somebody else later.
const VALIDATED_FOR: Duration = Duration::from_secs(300);
/// Largest number of validated paths of one peer: its uplinks, in both families.
const VALIDATED: usize = 8;
/// Number of 64-bit words of the replay window.
const WORDS: usize = 8;
/// Number of counters in the replay window. Probes of one peer overtake each other on paths of
/// different latency.
const WINDOW: u64 = 64 * WORDS as u64;

/// Counters of one epoch that were seen: the highest one, and a ring of bits for those just below
/// it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ReplayWindow {
    /// Highest counter that was seen.
    top: u64,
    /// Bit of each counter of the window, at its number modulo [`WINDOW`].
    seen: [u64; WORDS],
}

impl ReplayWindow {
    /// Creates a window that accepts only counters above `top`.
    fn above(top: u64) -> Self {
        Self { top, seen: [u64::MAX; WORDS] }
    }

    /// Marks a counter as seen. Returns whether it is fresh: neither seen nor below the window.
    fn mark(&mut self, counter: u64) -> bool {
        if counter > self.top {
            if counter - self.top >= WINDOW {
                self.seen = [0; WORDS];
            } else {
                for entering in self.top + 1..=counter {
                    let (word, bit) = place(entering);
                    self.seen[word] &= !bit;
                }
            }
            self.top = counter;
        } else if self.top - counter >= WINDOW {
            return false;
        }
        let (word, bit) = place(counter);
        let is_fresh = self.seen[word] & bit == 0;
        self.seen[word] |= bit;
        is_fresh
    }
}

/// Returns the word and the bit of a counter in the ring.
fn place(counter: u64) -> (usize, u64) {
    ((counter / 64 % WORDS as u64) as usize, 1 << (counter % 64))
}

/// Secret from which the tokens of all peers are derived. It lasts as long as the agent runs.
#[derive(Debug)]
pub struct TokenSecret<S> {
    /// Hasher with a random key.
    hasher: S,
    /// Time from which the periods are counted.
    started: Instant,
}

impl<S: BuildHasher> TokenSecret<S> {
    /// Creates a secret from a hasher, whose key must be random.
    pub fn new(hasher: S, started: Instant) -> Self {
        Self { hasher, started }
    }

    fn period(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_secs() / PERIOD
    }

    /// Returns a token. `newest` is the highest counter that was accepted, for a challenge after which
    /// the window may be taken back.
    fn token(&self, period: u64, session: &ProbeSession, from: &Path, newest: Option<u64>) -> u64 {
        let channel = from.channel.map(|ChannelId(channel)| channel);
        let ProbeSession { peer, proofs, .. } = session;
        self.hasher.hash_one((peer.0, *proofs, period, from.remote, channel, newest))
    }

    /// Returns whether a token is one of this period or the last one.
    fn is_valid(
        &self,
        now: Instant,
        session: &ProbeSession,
        from: &Path,
        newest: Option<u64>,
        token: u64,
    ) -> bool {
        let period = self.period(now);
        [period, period.saturating_sub(1)]
            .iter()
            .any(|period| self.token(*period, session, from, newest) == token)
    }
}

/// How a probe arrived.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// Time of the arrival.
    pub now: Instant,
    /// Path that it came over.
    pub from: Path,
    /// True if `from` is the path that carries the peer's traffic. It has limits of its own.
    pub is_in_use: bool,
    /// Stamp of the probe. `None` for version 1, which the caller accepts from peers whose record
    /// names no later one.
    pub stamp: Option<Stamp>,
}

/// Decision about an authentic probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The message is delivered to the mesh, or, if it is a request, to the relay.
    Deliver {
        /// Message to send back on the path that it came over.
        answer: Option<Probe>,
        /// True if the peer proved lately that it receives what is sent on that path. False for
        /// version 1, in which nothing is proven.
        is_validated: bool,
    },
    /// The message is dropped and counted.
    Drop {
        /// Message to send back on the path that it came over.
        answer: Option<Probe>,
        /// Reason of the drop.
        reason: ProbeRefusal,
    },
}

/// Reason why an authentic probe is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeRefusal {
    /// It may be a replay: it is answered by a challenge.
    Stale,
    /// It is a request to the relay, and its path is not validated: it is answered by a challenge.
    Unvalidated,
    /// The peer sends more than its share.
    Limited,
}

/// State of the probes that come from one peer; see the module.
#[derive(Debug)]
pub struct ProbeSession {
    peer: WireguardKey,
    /// Epoch that the peer proved last, and its window. `None` before the first proof.
    known: Option<Known>,
    /// Number of proofs that were accepted, which is part of each token.
    proofs: u64,
    /// Paths whose address the peer proved to receive at, the latest last.
    validated: Vec<ValidatedPath>,
    /// Limits on the path in use, and elsewhere.
    limits: [Limits; 2],
}

#[derive(Debug)]
struct Known {
    epoch: u64,
    window: ReplayWindow,
}

#[derive(Debug)]
struct ValidatedPath {
    remote: SocketAddr,
    channel: Option<ChannelId>,
    until: Instant,
}

#[derive(Debug, Default)]
struct Limits {
    messages: TokenBucket,
    pongs: TokenBucket,
    challenges: TokenBucket,
    proofs: TokenBucket,
    /// Answers to fresh challenges, which the peer has just sent.
    to_fresh: ProofLimits,
    /// Answers to challenges that may be replays, or of an epoch that is not known yet.
    to_stale: ProofLimits,
}

/// Limits of the answers to challenges of one kind.
#[derive(Debug, Default)]
struct ProofLimits {
    answers: TokenBucket,
    repeats: TokenBucket,
}

impl ProbeSession {
    /// Creates the state for a peer of which no probe came yet.
    pub fn new(peer: WireguardKey) -> Self {
        let limits = [Limits::default(), Limits::default()];
        Self { peer, known: None, proofs: 0, validated: Vec::new(), limits }
    }

    /// Decides about a probe that was opened with the peer's key.
    pub fn receive<S: BuildHasher>(
        &mut self,
        arrival: &Arrival,
        secret: &TokenSecret<S>,
        message: &Probe,
    ) -> Decision {
        match (message, arrival.stamp) {
            (Probe::Challenge { token }, Some(stamp)) => self.prove(arrival, stamp, *token),
            (Probe::Proof { token }, Some(stamp)) => {
                self.accept_proof(arrival, secret, stamp, *token)
            }
            // Version 1 has none of them.
            (Probe::Challenge { .. } | Probe::Proof { .. }, None) => {
                Decision::Drop { answer: None, reason: ProbeRefusal::Stale }
            }
            (_, None) => self.deliver(arrival, message),
            (_, Some(stamp)) => {
                if !self.is_fresh(stamp) {
                    return self.challenge(arrival, secret, ProbeRefusal::Stale);
                }
                let is_request = matches!(message, Probe::Register { .. } | Probe::Open { .. });
                if is_request && !self.is_validated(arrival.now, &arrival.from) {
                    return self.challenge(arrival, secret, ProbeRefusal::Unvalidated);
                }
                self.deliver(arrival, message)
            }
        }
    }

    /// Returns whether a message that a controller carried is to be delivered. There is no path on
    /// which to challenge it, so only what was certainly seen before is refused: a message of another
    /// epoch may be the only way to meet the peer.
    pub fn receive_signal(&mut self, stamp: Stamp) -> bool {
        match &mut self.known {
            Some(known) if known.epoch == stamp.epoch => known.window.mark(stamp.counter),
            Some(_) | None => true,
        }
    }

    /// Returns whether the peer proved lately that it receives what is sent on a path.
    pub fn is_validated(&self, now: Instant, from: &Path) -> bool {
        self.validated.iter().any(|path| {
            path.remote == from.remote && path.channel == from.channel && now < path.until
        })
    }

    /// Returns whether a stamp is fresh in the known epoch, and marks it as seen.
    fn is_fresh(&mut self, stamp: Stamp) -> bool {
        match &mut self.known {
            Some(known) => known.epoch == stamp.epoch && known.window.mark(stamp.counter),
            None => false,
        }
    }

    fn limits(&mut self, arrival: &Arrival) -> &mut Limits {
        let [in_use, elsewhere] = &mut self.limits;
        if arrival.is_in_use { in_use } else { elsewhere }
    }

    /// Returns the decision to deliver a message, with an answer if it has one.
    fn delivery(&self, arrival: &Arrival, answer: Option<Probe>) -> Decision {
        let is_validated = arrival.stamp.is_some() && self.is_validated(arrival.now, &arrival.from);
        Decision::Deliver { answer, is_validated }
    }

    fn deliver(&mut self, arrival: &Arrival, message: &Probe) -> Decision {
        let limits = self.limits(arrival);
        if !limits.messages.take(&MESSAGES, arrival.now, 1) {
            return Decision::Drop { answer: None, reason: ProbeRefusal::Limited };
        }
        let Probe::Ping { transaction } = *message else {
            return self.delivery(arrival, None);
        };
        if !limits.pongs.take(&PONGS, arrival.now, 1) {
            return Decision::Drop { answer: None, reason: ProbeRefusal::Limited };
        }
        let observed = arrival.from.remote;
        self.delivery(arrival, Some(Probe::Pong { transaction, observed }))
    }

    fn challenge<S: BuildHasher>(
        &mut self,
        arrival: &Arrival,
        secret: &TokenSecret<S>,
        reason: ProbeRefusal,
    ) -> Decision {
        let is_admitted = self.limits(arrival).challenges.take(&ANSWERS, arrival.now, 1);
        // Only a peer whose message of the known epoch is stale may have gone back within it.
        let stamp = arrival.stamp.filter(|_| reason == ProbeRefusal::Stale);
        let known =
            self.known.as_ref().zip(stamp).filter(|(known, stamp)| known.epoch == stamp.epoch);
        let newest = known.map(|(known, _)| known.window.top);
        let answer = is_admitted.then(|| {
            let token = secret.token(secret.period(arrival.now), self, &arrival.from, newest);
            Probe::Challenge { token }
        });
        Decision::Drop { answer, reason }
    }

    /// Answers a challenge, whether or not it is fresh: its sender may have just started. Replays of
    /// challenges do not use up what fresh ones get.
    fn prove(&mut self, arrival: &Arrival, stamp: Stamp, token: u64) -> Decision {
        let is_fresh = self.is_fresh(stamp);
        let limits = self.limits(arrival);
        let limits = if is_fresh { &mut limits.to_fresh } else { &mut limits.to_stale };
        if !limits.answers.take(&ANSWERS, arrival.now, 1) {
            return Decision::Drop { answer: None, reason: ProbeRefusal::Limited };
        }
        let answer = Some(Probe::Proof { token });
        if limits.repeats.take(&REPEATS, arrival.now, 1) {
            self.delivery(arrival, answer)
        } else {
            Decision::Drop { answer, reason: ProbeRefusal::Limited }
        }
    }

    fn accept_proof<S: BuildHasher>(
        &mut self,
        arrival: &Arrival,
        secret: &TokenSecret<S>,
        stamp: Stamp,
        token: u64,
    ) -> Decision {
        let (session, known) = (&*self, self.known.as_ref());
        let has_token =
            |newest| secret.is_valid(arrival.now, session, &arrival.from, newest, token);
        let is_other_epoch = known.is_none_or(|known| known.epoch != stamp.epoch);
        let is_valid = has_token(None);
        // Nothing newer was accepted since the challenge, so the window may go back.
        let may_go_back = known.is_some_and(|known| has_token(Some(known.window.top)));
        let is_fresh = self.is_fresh(stamp);
        if may_go_back || is_valid && (is_fresh || is_other_epoch) {
            self.proofs = self.proofs.wrapping_add(1);
            if !is_fresh {
                let window = ReplayWindow::above(stamp.counter);
                self.known = Some(Known { epoch: stamp.epoch, window });
            }
            self.validate(arrival.now, &arrival.from);
        } else if !is_fresh {
            return Decision::Drop { answer: None, reason: ProbeRefusal::Stale };
        }
        // A fresh proof whose token another one ended still shows that the path leads here. Replays with the
        // peer's address elicit many: they must not use up what its pongs need.
        if !self.limits(arrival).proofs.take(&PROOFS, arrival.now, 1) {
            return Decision::Drop { answer: None, reason: ProbeRefusal::Limited };
        }
        self.delivery(arrival, None)
    }

    fn validate(&mut self, now: Instant, from: &Path) {
        let (remote, channel) = (from.remote, from.channel);
        self.validated.retain(|path| (path.remote, path.channel) != (remote, channel));
        if self.validated.len() == VALIDATED {
            self.validated.remove(0);
        }
        self.validated.push(ValidatedPath { remote, channel, until: now + VALIDATED_FOR });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::hash::{BuildHasherDefault, DefaultHasher};

    type Secret = TokenSecret<BuildHasherDefault<DefaultHasher>>;

    #[allow(clippy::disallowed_methods)] // some instant to count from
    fn start() -> Instant {
        Instant::now()
    }

    const PING: Probe = Probe::Ping { transaction: 7 };

    /// One end of a pair: what it received, and what it sends.
    struct End {
        session: ProbeSession,
        secret: Secret,
        epoch: u64,
        counter: u64,
    }

    impl End {
        fn new(peer: u8, epoch: u64, now: Instant) -> Self {
            let secret = Secret::new(BuildHasherDefault::default(), now);
            Self { session: ProbeSession::new(WireguardKey([peer; 32])), secret, epoch, counter: 0 }
        }

        fn stamp(&mut self) -> Stamp {
            self.counter += 1;
            Stamp { epoch: self.epoch, counter: self.counter }
        }

        fn receive(&mut self, now: Instant, from: Path, stamp: Stamp, probe: &Probe) -> Decision {
            let arrival = Arrival { now, from, is_in_use: false, stamp: Some(stamp) };
            self.session.receive(&arrival, &self.secret, probe)
        }
    }

    fn at(last: u8) -> Path {
        Path::direct(([192, 0, 2, last], 51_830).into())
    }

    fn challenge(decision: Decision) -> u64 {
        match decision {
            Decision::Drop { answer: Some(Probe::Challenge { token }), .. } => token,
            Decision::Deliver { .. } | Decision::Drop { .. } => {
                panic!("no challenge: {decision:?}")
            }
        }
    }

    fn is_delivered(decision: &Decision) -> bool {
        matches!(decision, Decision::Deliver { .. })
    }

    /// Lets `sender` prove its epoch to `receiver`, and returns the proof.
    fn introduce(receiver: &mut End, sender: &mut End, now: Instant, from: Path) -> (Stamp, Probe) {
        let token = challenge(receiver.receive(now, from, sender.stamp(), &PING));
        let (stamp, proof) = (sender.stamp(), Probe::Proof { token });
        assert!(is_delivered(&receiver.receive(now, from, stamp, &proof)));
        (stamp, proof)
    }

    #[test]
    fn a_first_probe_is_challenged_and_the_proof_opens_the_epoch() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        introduce(&mut b, &mut a, now, at(1));
        let stamp = a.stamp();
        let pong = Probe::Pong { transaction: 7, observed: at(1).remote };
        let answered = Decision::Deliver { answer: Some(pong), is_validated: true };
        assert_eq!(b.receive(now, at(1), stamp, &PING), answered);
        challenge(b.receive(now, at(1), stamp, &PING));
    }

    #[test]
    fn a_recorded_probe_is_refused_from_anywhere_and_a_recorded_proof_too() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        let (stamp, proof) = introduce(&mut b, &mut a, now, at(1));
        let recorded = a.stamp();
        assert!(is_delivered(&b.receive(now, at(1), recorded, &PING)));
        for from in [at(1), at(66)] {
            assert!(!is_delivered(&b.receive(now, from, recorded, &PING)));
            assert!(!is_delivered(&b.receive(now, from, stamp, &proof)), "it resets nothing");
        }
        let next = a.stamp();
        assert!(is_delivered(&b.receive(now, at(1), next, &PING)), "and the peer goes on");
    }

    #[test]
    fn an_end_that_went_back_is_heard_after_a_challenge_and_its_former_epoch_is_over() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        introduce(&mut b, &mut a, now, at(1));
        let recorded = a.stamp();
        // The clock went back, the disk did not keep the start, the machine was restored.
        for (epoch, counter) in [(4, 0), (5, 0), (5, 1), (u64::MAX, 0)] {
            (a.epoch, a.counter) = (epoch, counter);
            introduce(&mut b, &mut a, now, at(1));
            let stamp = a.stamp();
            assert!(is_delivered(&b.receive(now, at(1), stamp, &PING)), "{epoch} {counter}");
        }
        assert!(!is_delivered(&b.receive(now, at(1), recorded, &PING)));
    }

    #[test]
    fn a_proof_that_was_held_back_does_not_open_what_was_accepted_since() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        introduce(&mut b, &mut a, now, at(1));
        let (replayed, former) = (a.stamp(), Stamp { epoch: 4, counter: 7 });
        assert!(is_delivered(&b.receive(now, at(1), replayed, &PING)));
        // Somebody on the way elicits proofs of each kind, and keeps them.
        let request = Probe::Register { transaction: 3 };
        let tokens = [
            challenge(b.receive(now, at(1), replayed, &PING)),
            challenge(b.receive(now, at(1), former, &PING)),
            challenge(b.receive(now, at(3), a.stamp(), &request)),
        ];
        let held = tokens.map(|token| (a.stamp(), Probe::Proof { token }));
        let later = a.stamp();
        assert!(is_delivered(&b.receive(now, at(1), later, &PING)));
        a.counter += WINDOW;
        let last = a.stamp();
        assert!(is_delivered(&b.receive(now, at(1), last, &PING)));
        for (stamp, proof) in held {
            for from in [at(1), at(3)] {
                assert!(!is_delivered(&b.receive(now, from, stamp, &proof)), "{stamp:?}");
            }
            for recorded in [later, last] {
                assert!(!is_delivered(&b.receive(now, at(1), recorded, &PING)), "{stamp:?}");
            }
        }
        let next = a.stamp();
        assert!(is_delivered(&b.receive(now, at(1), next, &PING)), "and the peer goes on");
    }

    #[test]
    fn messages_that_overtake_a_proof_do_not_keep_it_from_validating_its_path() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        introduce(&mut b, &mut a, now, at(1));
        let request = Probe::Register { transaction: 3 };
        let token = challenge(b.receive(now, at(3), a.stamp(), &request));
        let (proof, next) = (a.stamp(), a.stamp());
        assert!(is_delivered(&b.receive(now, at(1), next, &PING)));
        assert!(is_delivered(&b.receive(now, at(3), proof, &Probe::Proof { token })));
        assert!(b.session.is_validated(now, &at(3)));
    }

    #[test]
    fn a_restarted_peer_proves_its_epoch_though_its_former_messages_arrive_late() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        introduce(&mut b, &mut a, now, at(1));
        let late = a.stamp();
        (a.epoch, a.counter) = (6, 0);
        let token = challenge(b.receive(now, at(1), a.stamp(), &PING));
        assert!(is_delivered(&b.receive(now, at(1), late, &PING)));
        let proof = a.stamp();
        assert!(is_delivered(&b.receive(now, at(1), proof, &Probe::Proof { token })));
        // A challenge of a replay serves as well: replays may use up the limit.
        (a.epoch, a.counter) = (7, 0);
        let token = challenge(b.receive(now, at(1), proof, &PING));
        let proof = a.stamp();
        assert!(is_delivered(&b.receive(now, at(1), proof, &Probe::Proof { token })));
        assert!(is_delivered(&b.receive(now, at(1), a.stamp(), &PING)));
    }

    #[test]
    fn both_may_restart_at_once() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 1, now), End::new(1, 1, now));
        let to_b = challenge(b.receive(now, at(1), a.stamp(), &PING));
        let to_a = challenge(a.receive(now, at(2), b.stamp(), &PING));
        // A challenge is answered though its sender has proven nothing.
        let decision = a.receive(now, at(2), b.stamp(), &Probe::Challenge { token: to_b });
        let answer = Some(Probe::Proof { token: to_b });
        assert_eq!(decision, Decision::Deliver { answer, is_validated: false });
        let proof = a.stamp();
        assert!(is_delivered(&b.receive(now, at(1), proof, &Probe::Proof { token: to_b })));
        let proof = b.stamp();
        assert!(is_delivered(&a.receive(now, at(2), proof, &Probe::Proof { token: to_a })));
    }

    #[test]
    fn a_request_is_taken_from_validated_paths_only() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        introduce(&mut b, &mut a, now, at(1));
        let register = Probe::Register { transaction: 3 };
        assert!(is_delivered(&b.receive(now, at(1), a.stamp(), &register)));
        // The node itself names an address that is not its own.
        let token = challenge(b.receive(now, at(66), a.stamp(), &register));
        let proof = Probe::Proof { token };
        assert!(is_delivered(&b.receive(now, at(1), a.stamp(), &proof)), "fresh, but no proof");
        assert!(!b.session.is_validated(now, &at(66)));
        let later = now + VALIDATED_FOR;
        challenge(b.receive(later, at(1), a.stamp(), &register));
    }

    #[test]
    fn a_delivered_message_says_whether_its_own_path_was_proven() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        introduce(&mut b, &mut a, now, at(1));
        let answer = Probe::Refused { transaction: 3 };
        let delivered = |is_validated| Decision::Deliver { answer: None, is_validated };
        assert_eq!(b.receive(now, at(1), a.stamp(), &answer), delivered(true));
        assert_eq!(b.receive(now, at(66), a.stamp(), &answer), delivered(false));
        // Anybody may have recorded a message of version 1, and may send it from a proven path.
        let arrival = Arrival { now, from: at(1), is_in_use: false, stamp: None };
        let register = Probe::Register { transaction: 3 };
        assert_eq!(b.session.receive(&arrival, &b.secret, &register), delivered(false));
        let later = now + VALIDATED_FOR;
        assert_eq!(b.receive(later, at(1), a.stamp(), &answer), delivered(false));
    }

    #[test]
    fn a_token_ends_with_its_time_and_with_the_next_proof() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        let first = challenge(b.receive(now, at(1), a.stamp(), &PING));
        let late = now + Duration::from_secs(2 * PERIOD);
        let proof = Probe::Proof { token: first };
        assert!(!is_delivered(&b.receive(late, at(1), a.stamp(), &proof)));
        let other = challenge(b.receive(late, at(3), a.stamp(), &PING));
        introduce(&mut b, &mut a, late, at(1));
        a.epoch = 4;
        let proof = Probe::Proof { token: other };
        assert!(!is_delivered(&b.receive(late, at(3), a.stamp(), &proof)));
    }

    #[test]
    fn replays_do_not_use_up_what_the_path_in_use_gets() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        introduce(&mut b, &mut a, now, at(1));
        let recorded = a.stamp();
        b.receive(now, at(1), recorded, &PING);
        let answers = (0..10_000)
            .filter(|_| {
                let decision = b.receive(now, at(66), recorded, &PING);
                matches!(decision, Decision::Drop { answer: Some(_), .. })
            })
            .count();
        assert!(answers <= 256, "{answers}");
        let arrival = Arrival { now, from: at(1), is_in_use: true, stamp: Some(a.stamp()) };
        assert!(is_delivered(&b.session.receive(&arrival, &b.secret, &PING)));
    }

    /// Delivers a datagram that comes over the path in use.
    fn receive_in_use(end: &mut End, now: Instant, stamp: Stamp, probe: &Probe) -> Decision {
        let arrival = Arrival { now, from: at(1), is_in_use: true, stamp: Some(stamp) };
        end.session.receive(&arrival, &end.secret, probe)
    }

    #[test]
    fn replays_with_the_address_of_the_peer_cost_none_of_its_messages() {
        let (now, ms) = (start(), Duration::from_millis);
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        introduce(&mut b, &mut a, now, at(1));
        introduce(&mut a, &mut b, now, at(2));
        let recorded = a.stamp();
        receive_in_use(&mut b, now, recorded, &PING);
        let (mut proofs, mut delivered) = (0, 0);
        for millisecond in 0..8_000 {
            let now = now + ms(millisecond);
            for _ in 0..5 {
                let decision = receive_in_use(&mut b, now, recorded, &PING);
                let Decision::Drop { answer: Some(challenge), .. } = decision else { continue };
                // The peer proves each time, as it has to after a restart of ours.
                let proof = match a.receive(now, at(2), b.stamp(), &challenge) {
                    Decision::Deliver { answer, .. } | Decision::Drop { answer, .. } => answer,
                };
                let proof = proof.expect("a fresh challenge is answered");
                proofs += 1;
                let stamp = a.stamp();
                delivered += usize::from(is_delivered(&receive_in_use(&mut b, now, stamp, &proof)));
            }
            // Far more than a path in doubt needs.
            if millisecond % 50 == 0 {
                let pong = Probe::Pong { transaction: millisecond, observed: at(2).remote };
                for message in [pong, PING, Probe::Register { transaction: 3 }] {
                    let decision = receive_in_use(&mut b, now, a.stamp(), &message);
                    assert!(is_delivered(&decision), "{message:?} after {millisecond} ms");
                }
            }
        }
        assert!(proofs > 1_000, "{proofs}: the flood reaches the limit of challenges");
        assert!(delivered < 400, "{delivered} proofs are delivered");
    }

    #[test]
    fn replays_of_any_kind_keep_no_fresh_challenge_from_its_proof() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        introduce(&mut b, &mut a, now, at(1));
        let (stamp, recorded) = (a.stamp(), Probe::Challenge { token: 7 });
        let (ping, challenge) = (a.stamp(), Probe::Challenge { token: 8 });
        receive_in_use(&mut b, now, stamp, &recorded);
        receive_in_use(&mut b, now, ping, &PING);
        for _ in 0..10_000 {
            receive_in_use(&mut b, now, stamp, &recorded);
            receive_in_use(&mut b, now, ping, &PING);
        }
        let answer = Some(Probe::Proof { token: 8 });
        let proven = Decision::Deliver { answer, is_validated: true };
        assert_eq!(receive_in_use(&mut b, now, a.stamp(), &challenge), proven);
    }

    #[test]
    fn a_signal_is_refused_only_if_it_was_seen() {
        let now = start();
        let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
        assert!(b.session.receive_signal(a.stamp()), "nothing is known yet");
        introduce(&mut b, &mut a, now, at(1));
        let stamp = a.stamp();
        assert!(b.session.receive_signal(stamp) && !b.session.receive_signal(stamp));
        a.epoch = 4;
        assert!(b.session.receive_signal(a.stamp()), "an older epoch is not locked out");
    }

    proptest! {
        /// The window accepts exactly what a set of all counters would, above its lower end.
        #[test]
        fn the_window_is_a_set_of_the_latest_counters(
            base in prop_oneof![Just(0u64), any::<u64>()],
            steps in prop::collection::vec(prop_oneof![
                4 => -600i64..600,
                1 => -3i64..3,
                1 => -100_000i64..100_000,
            ], 1..300),
        ) {
            let mut window = ReplayWindow::above(base);
            let (mut top, mut seen, mut counter) = (base, BTreeSet::new(), base);
            for step in steps {
                counter = counter.saturating_add_signed(step);
                let in_window = counter > top || top - counter < WINDOW;
                let expected = counter > base && in_window && !seen.contains(&counter);
                prop_assert_eq!(window.mark(counter), expected, "{} of {}", counter, top);
                seen.insert(counter);
                top = top.max(counter);
            }
        }

        /// Whatever is replayed, from wherever, in whatever order, no stamp is delivered twice.
        #[test]
        fn nothing_is_delivered_twice(
            order in prop::collection::vec((any::<prop::sample::Index>(), 0u8..4), 1..400),
        ) {
            let now = start();
            let (mut a, mut b) = (End::new(2, 5, now), End::new(1, 9, now));
            let mut recorded = vec![introduce(&mut b, &mut a, now, at(0))];
            recorded.extend((0..40).map(|_| (a.stamp(), PING)));
            let mut delivered = BTreeSet::from([recorded[0].0.counter]);
            for (index, from) in order {
                let (stamp, probe) = index.get(&recorded);
                if is_delivered(&b.receive(now, at(from), *stamp, probe)) {
                    prop_assert!(delivered.insert(stamp.counter), "{stamp:?}");
                }
            }
        }
    }
}
