//! Reports of the data plane to the program that runs it.
//!
//! | report | transport | when the receiver is slow |
//! |---|---|---|
//! | observations of a peer | the channel | they wait here; the last per peer and kind is kept |
//! | messages of probes, and STUN messages | the channel | they are dropped and counted |
//! | a fault | a state ([`FaultState`]) | it stays until it is read |
//!
//! The channel is bounded. A worker never blocks on it.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::mem::{Discriminant, discriminant};
use std::sync::Arc;

use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::watch;
use towline_core::path::Path;
use towline_core::peer_table::Observation;
use towline_types::frame::Probe;
use towline_types::id::WireguardKey;

use super::drops::{DropReason, Drops};

/// Event that the data plane observed.
#[derive(Debug)]
pub enum Event {
    /// An observation of one peer.
    Peer {
        /// Public key of the peer.
        peer: WireguardKey,
        /// The observation.
        what: Observation,
    },
    /// An authentic, fresh message of a peer (see `towline_types::frame`). Pings and challenges are
    /// answered already.
    Probe {
        /// Public key of the peer.
        peer: WireguardKey,
        /// Path that the datagram came by.
        from: Path,
        /// True if the peer proved lately that it receives what is sent on that path.
        is_validated: bool,
        /// The message.
        message: Probe,
    },
    /// A datagram that looks like STUN. Not authenticated.
    Stun {
        /// Path that the datagram came by.
        from: Path,
        /// The whole datagram.
        datagram: Box<[u8]>,
    },
}

/// Fault that ends the data plane, which must be started again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The TUN link was deleted.
    #[error("the TUN link is gone: {0}")]
    TunGone(String),
    /// A socket or the worker's epoll descriptor failed.
    #[error("the data plane's worker failed: {0}")]
    Worker(String),
    /// A panic, which is a defect of this program, ended the thread of a worker or of its helper.
    #[error("the data plane's worker panicked")]
    Panicked,
}

/// First fault of a data plane, shared by all its workers. It is never lost: a late reader finds it
/// too.
#[derive(Debug, Clone)]
pub(super) struct FaultState(Arc<watch::Sender<Option<Fault>>>);

impl FaultState {
    /// Creates the state without a fault, and its receiver.
    pub(super) fn new() -> (Self, watch::Receiver<Option<Fault>>) {
        let (sender, receiver) = watch::channel(None);
        (Self(Arc::new(sender)), receiver)
    }

    /// Sets the fault if there is none yet. Later faults are consequences of the first.
    pub(super) fn set(&self, fault: Fault) {
        self.0.send_if_modified(|state| match state {
            Some(_) => false,
            None => {
                *state = Some(fault);
                true
            }
        });
    }
}

impl Drop for FaultState {
    /// Sets [`Fault::Panicked`] if the thread that holds this state panics.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.set(Fault::Panicked);
        }
    }
}

/// Number of waiting observations above which only the last one per peer and kind is kept.
const UNSENT: usize = 4096;

/// Sending side of the channel, with the observations that wait for room in it.
#[derive(Debug)]
pub(super) struct EventSink {
    sender: Sender<Event>,
    /// Observations that wait for room in the channel, in order.
    unsent: VecDeque<(WireguardKey, Observation)>,
    /// Number of waiting observations that triggers [`Self::reduce`]. At least [`UNSENT`].
    reduce_at: usize,
    drops: Arc<Drops>,
}

impl EventSink {
    pub(super) fn new(sender: Sender<Event>, drops: Arc<Drops>) -> Self {
        Self { sender, unsent: VecDeque::new(), reduce_at: UNSENT, drops }
    }

    /// Reports an observation, now or once the channel has room.
    pub(super) fn observe(&mut self, peer: WireguardKey, what: Observation) {
        if self.unsent.len() >= self.reduce_at {
            self.reduce();
        }
        self.unsent.push_back((peer, what));
        self.retry();
    }

    /// Keeps only the last observation of each peer and kind, which describes the current state.
    /// What remains is bounded by the number of peers.
    fn reduce(&mut self) {
        let mut places: HashMap<(WireguardKey, Discriminant<Observation>), usize> = HashMap::new();
        let mut kept: Vec<(WireguardKey, Observation)> = Vec::new();
        for (peer, what) in self.unsent.drain(..).rev() {
            match places.entry((peer, discriminant(&what))) {
                Entry::Vacant(place) => {
                    place.insert(kept.len());
                    kept.push((peer, what));
                }
                Entry::Occupied(place) => {
                    if let Observation::Active {
                        sent: was_sent,
                        received: was_received,
                        by_endpoint: was_by_endpoint,
                    } = what
                        && let Some((_, Observation::Active { sent, received, by_endpoint })) =
                            kept.get_mut(*place.get())
                    {
                        *sent |= was_sent;
                        *received |= was_received;
                        *by_endpoint |= was_by_endpoint;
                    }
                }
            }
        }
        self.unsent.extend(kept.into_iter().rev());
        self.reduce_at = UNSENT.max(2 * self.unsent.len());
    }

    /// Reports a datagram, unless the channel is so full that observations may need the room. Then
    /// the datagram is dropped and counted.
    pub(super) fn datagram(&self, event: impl FnOnce() -> Event) {
        let room = self.sender.capacity() > self.sender.max_capacity() / 4;
        if !room || self.sender.try_send(event()).is_err() {
            self.drops.count(DropReason::EventsFull);
        }
    }

    /// Sends the observations that wait for room.
    pub(super) fn retry(&mut self) {
        while let Some((peer, what)) = self.unsent.front().copied() {
            match self.sender.try_send(Event::Peer { peer, what }) {
                Ok(()) | Err(TrySendError::Closed(_)) => self.unsent.pop_front(),
                Err(TrySendError::Full(_)) => return,
            };
        }
    }

    /// Returns whether an observation waits for room.
    pub(super) fn is_waiting(&self) -> bool {
        !self.unsent.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_core::path::Path;

    fn key(number: u32) -> WireguardKey {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        WireguardKey(key)
    }

    #[test]
    fn no_last_observation_of_a_peer_is_lost_however_slow_its_owner_is() {
        let (sender, mut receiver) = tokio::sync::mpsc::channel(8);
        let drops = Arc::new(Drops::default());
        let mut sink = EventSink::new(sender, drops.clone());
        let from = |port: u16| Path::direct(([192, 0, 2, 1], port).into());
        const PEERS: u32 = 2_000;
        for round in 0..20 {
            for peer in 0..PEERS {
                sink.observe(key(peer), Observation::Handshake { from: from(round) });
                let (sent, received, by_endpoint) = (round == 0, false, false);
                sink.observe(key(peer), Observation::Active { sent, received, by_endpoint });
                sink.observe(key(peer), Observation::Roamed { from: from(1_000 + round) });
                if peer % 2 == 0 {
                    sink.observe(key(peer), Observation::SessionExpired);
                }
            }
            assert!(sink.unsent.len() <= 4 * 4 * PEERS as usize, "the queue is bounded");
        }
        let mut seen: HashMap<WireguardKey, Vec<Observation>> = HashMap::new();
        while sink.is_waiting() {
            while let Ok(Event::Peer { peer, what }) = receiver.try_recv() {
                seen.entry(peer).or_default().push(what);
            }
            sink.retry();
        }
        while let Ok(Event::Peer { peer, what }) = receiver.try_recv() {
            seen.entry(peer).or_default().push(what);
        }
        for peer in 0..PEERS {
            let seen = &seen[&key(peer)];
            let last = if peer % 2 == 0 {
                Observation::SessionExpired
            } else {
                Observation::Roamed { from: from(1_019) }
            };
            assert_eq!(seen.last(), Some(&last));
            assert!(seen.contains(&Observation::Handshake { from: from(19) }));
            let sent = |what: &Observation| matches!(what, Observation::Active { sent: true, .. });
            assert!(seen.iter().any(sent), "a report of sent packets is kept");
        }
        assert_eq!(drops.get(DropReason::EventsFull), 0);
    }

    #[test]
    fn a_fault_is_there_for_one_who_looks_late_and_the_first_one_stays() {
        let (state, receiver) = FaultState::new();
        let late = receiver.clone();
        state.set(Fault::TunGone("deleted".to_owned()));
        state.clone().set(Fault::Worker("later".to_owned()));
        drop(state);
        assert_eq!(*late.borrow(), Some(Fault::TunGone("deleted".to_owned())));
        assert!(matches!(late.has_changed(), Err(_) | Ok(true)));
    }

    #[test]
    fn a_worker_that_panics_leaves_a_fault() {
        let (state, receiver) = FaultState::new();
        let worker = std::thread::spawn(move || {
            let _state = state;
            panic!("a defect");
        });
        assert!(worker.join().is_err());
        assert_eq!(*receiver.borrow(), Some(Fault::Panicked));
    }
}
