//! What the data plane tells its owner, through a bounded channel that it never waits for.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;
use towline_core::path::Path;
use towline_core::peer_table::Observation;
use towline_proto::id::WireguardKey;

use super::drops::{DropReason, Drops};

/// What the data plane saw.
#[derive(Debug)]
pub enum Event {
    /// Of one peer.
    Peer {
        /// Which.
        peer: WireguardKey,
        /// What.
        what: Observation,
    },
    /// A datagram that looks like a probe (see `towline_proto::frame`). Not authenticated.
    Probe {
        /// Its sender.
        from: Path,
        /// All of it.
        datagram: Box<[u8]>,
    },
    /// A datagram that looks like STUN. Not authenticated.
    Stun {
        /// Its sender.
        from: Path,
        /// All of it.
        datagram: Box<[u8]>,
    },
    /// The data plane cannot do its work any more; it has to be started anew.
    Fault(Fault),
}

/// What broke for good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The TUN link was deleted.
    #[error("the TUN link is gone: {0}")]
    TunGone(String),
    /// The sockets, or what the worker waits with.
    #[error("the data plane's worker cannot go on: {0}")]
    Worker(String),
}

/// Observations that wait for room in the channel; more than these are lost and counted.
const UNSENT: usize = 4096;

/// The sending side.
#[derive(Debug)]
pub(super) struct EventSink {
    sender: Sender<Event>,
    unsent: VecDeque<(WireguardKey, Observation)>,
    drops: Arc<Drops>,
}

impl EventSink {
    pub(super) fn new(sender: Sender<Event>, drops: Arc<Drops>) -> Self {
        Self { sender, unsent: VecDeque::new(), drops }
    }

    /// Reports an observation, now or when there is room.
    pub(super) fn observe(&mut self, peer: WireguardKey, what: Observation) {
        if self.unsent.len() == UNSENT {
            self.drops.count(DropReason::EventsFull);
            return;
        }
        self.unsent.push_back((peer, what));
        self.retry();
    }

    /// Hands on a datagram, unless the channel is so full that observations might need the room.
    pub(super) fn datagram(&self, event: impl FnOnce() -> Event) {
        let room = self.sender.capacity() > self.sender.max_capacity() / 4;
        if !room || self.sender.try_send(event()).is_err() {
            self.drops.count(DropReason::EventsFull);
        }
    }

    /// Reports a fault. The owner may be gone; then nobody needs to know.
    pub(super) fn fault(&self, fault: Fault) {
        let _ = self.sender.try_send(Event::Fault(fault));
    }

    /// Tries again what found no room.
    pub(super) fn retry(&mut self) {
        while let Some((peer, what)) = self.unsent.front().copied() {
            match self.sender.try_send(Event::Peer { peer, what }) {
                Ok(()) | Err(TrySendError::Closed(_)) => self.unsent.pop_front(),
                Err(TrySendError::Full(_)) => return,
            };
        }
    }

    /// Whether something waits for room.
    pub(super) fn is_waiting(&self) -> bool {
        !self.unsent.is_empty()
    }
}
