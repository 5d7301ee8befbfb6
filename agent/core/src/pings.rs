//! Pings that wait for their pongs.
//!
//! Transaction numbers are random, so that nobody who does not see a ping can answer it. What is
//! not answered within [`FORGET_AFTER`] is forgotten; that bounds how many there are.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use towline_types::id::NodeId;

use crate::path::Path;

/// Time after which a pong is ignored. Far longer than any round trip.
const FORGET_AFTER: Duration = Duration::from_secs(10);

/// Number of pings that are searched for those to be sent again.
const LATEST: usize = 512;
/// Largest number of pings that are sent again after one challenge: one for the mesh, and one for an
/// operator.
const REPEATED: usize = 2;

/// Purpose of a ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Ping that checks whether the path in use still works.
    Path,
    /// Ping that checks whether another path works at all.
    Check,
    /// To see whether the path takes a datagram with this much UDP payload, in bytes.
    Size(u16),
    /// Ping that checks whether the path takes several datagrams that are sent together.
    Train,
    /// For an operator; the number is the caller's.
    Operator(u64),
}

/// A ping that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Node that the ping was sent to.
    pub(crate) peer: NodeId,
    /// Path that it was sent over.
    pub(crate) to: Path,
    /// Time at which it was sent.
    pub(crate) at: Instant,
    /// Purpose that the pong serves.
    pub(crate) purpose: Purpose,
}

/// All pings that have no pong yet.
#[derive(Debug, Default)]
pub(crate) struct Pings {
    by_transaction: BTreeMap<u64, Sent>,
    by_age: VecDeque<(Instant, u64)>,
}

impl Pings {
    /// Records a ping and returns its transaction number.
    pub(crate) fn sent(&mut self, rng: &mut StdRng, ping: Sent) -> u64 {
        while let Some((at, transaction)) = self.by_age.front().copied() {
            if ping.at < at + FORGET_AFTER {
                break;
            }
            self.by_age.pop_front();
            self.by_transaction.remove(&transaction);
        }
        let transaction = rng.random();
        self.by_age.push_back((ping.at, transaction));
        self.by_transaction.insert(transaction, ping);
        transaction
    }

    /// Takes the latest pings that wait for a pong of a peer over a path, to be sent again: the peer
    /// asked for a proof instead of answering them. Their round trips count from now on.
    pub(crate) fn repeat(&mut self, now: Instant, peer: NodeId, from: &Path) -> Vec<(Path, u64)> {
        let mut repeated = Vec::new();
        for (_, transaction) in self.by_age.iter().rev().take(LATEST) {
            let Some(sent) = self.by_transaction.get_mut(transaction) else { continue };
            let is_small = match sent.purpose {
                Purpose::Path | Purpose::Check | Purpose::Operator(_) => true,
                Purpose::Size(_) | Purpose::Train => false,
            };
            if is_small && sent.peer == peer && sent.to.is(from) {
                sent.at = now;
                repeated.push((sent.to, *transaction));
                if repeated.len() == REPEATED {
                    break;
                }
            }
        }
        repeated
    }

    /// Removes and returns the ping that a pong answers: it has to come from the same peer, over the
    /// path that the ping was sent over.
    pub(crate) fn answered(&mut self, peer: NodeId, from: Path, transaction: u64) -> Option<Sent> {
        let sent = self.by_transaction.get(&transaction)?;
        let same = sent.to.remote == from.remote && sent.to.channel == from.channel;
        if sent.peer != peer || !same {
            return None;
        }
        self.by_transaction.remove(&transaction)
    }
}
