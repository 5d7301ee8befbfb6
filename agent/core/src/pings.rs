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

/// A pong that comes later than this means nothing any more.
const FORGET_AFTER: Duration = Duration::from_secs(10);

/// Why a ping was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Does the path still work?
    Path,
    /// Does this address work at all?
    Check,
    /// Does the path take a datagram with this much UDP payload?
    Size(u16),
    /// An operator asked; the number is theirs.
    Operator(u64),
}

/// A ping that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sent {
    /// To whom.
    pub(crate) peer: NodeId,
    /// Which way.
    pub(crate) to: Path,
    /// When.
    pub(crate) at: Instant,
    /// Why.
    pub(crate) purpose: Purpose,
}

/// All pings that have no pong yet.
#[derive(Debug, Default)]
pub(crate) struct Pings {
    by_transaction: BTreeMap<u64, Sent>,
    by_age: VecDeque<(Instant, u64)>,
}

impl Pings {
    /// Notes a ping and gives it its number.
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

    /// Takes the ping that a pong answers: same peer, and from where the ping was sent to.
    pub(crate) fn answered(&mut self, peer: NodeId, from: Path, transaction: u64) -> Option<Sent> {
        let sent = self.by_transaction.get(&transaction)?;
        let same = sent.to.remote == from.remote && sent.to.channel == from.channel;
        if sent.peer != peer || !same {
            return None;
        }
        self.by_transaction.remove(&transaction)
    }
}
