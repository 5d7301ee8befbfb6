//! Forwarding table of the relay: channels between other nodes, whose datagrams are forwarded
//! without decrypting them.
//!
//! The daemon decrypts the requests of nodes (see [`Probe`](towline_types::frame::Probe)),
//! registers nodes and opens channels. The worker looks up a channel once for each run of
//! datagrams, and forwards the run from the receive buffer without copying or splitting it. Both
//! hold the same [`Relay`].
//!
//! Limits: only nodes of the mesh get a channel, because a request is encrypted for the pair of
//! node and relay. Each node has a limited number of channels and of bytes per second, and the
//! sender is charged. A datagram from a stranger costs one lookup. Nothing grows with the traffic
//! of strangers.
//!
//! A second transport (TLS over TCP 443) would be another kind of `End`: the table maps a channel
//! and a sender to a receiver, independent of how each is reached.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use towline_core::path::{CHANNEL_LIFETIME, ChannelId, Path};
use towline_types::id::WireguardKey;
use towline_types::rate::{Rate, TokenBucket};

use super::drops::DropReason;

/// Limits of the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest number of registered nodes.
    pub nodes: usize,
    /// Largest number of channels of one node.
    pub channels: usize,
    /// Largest number of bytes that one node may send per second.
    pub bytes_per_second: u64,
}

/// Relay for other nodes, or its disabled form (the default). Clones share their state.
#[derive(Debug, Clone, Default)]
pub struct Relay(Option<Arc<Mutex<State>>>);

/// Reason why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// This node is not a relay.
    Off,
    /// The limit of nodes, or of channels of one of the two nodes, is reached.
    Limit,
    /// The other node is not registered.
    NotRegistered,
}

/// Decision about a run of datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forward {
    /// The run is forwarded unchanged on this path.
    To(Path),
    /// The run is dropped for this reason.
    Refused(DropReason),
    /// The channel is not in the table: this node may be its end.
    Unknown,
}

/// Counters of the relay at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelaySnapshot {
    /// Number of registered nodes.
    pub nodes: usize,
    /// Number of open channels.
    pub channels: usize,
    /// Number of bytes forwarded since the start.
    pub bytes: u64,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    /// Rate of one node in bytes. The burst is the amount of one second.
    rate: Rate,
    nodes: HashMap<WireguardKey, Node>,
    /// Channels by their number.
    channels: HashMap<u64, Channel>,
    /// Channel numbers by the sorted pair of nodes.
    pairs: HashMap<[WireguardKey; 2], u64>,
    /// Number of bytes forwarded.
    bytes: u64,
}

#[derive(Debug)]
struct Node {
    path: Path,
    /// Time of the last registration.
    heard: Instant,
    channels: Vec<u64>,
    /// Token bucket of bytes, shared by all channels of the node.
    budget: Arc<Mutex<TokenBucket>>,
}

#[derive(Debug)]
struct Channel {
    ends: [End; 2],
    /// Time when the channel was last opened or used.
    used: Instant,
}

#[derive(Debug)]
struct End {
    node: WireguardKey,
    path: Path,
    budget: Arc<Mutex<TokenBucket>>,
}

impl Relay {
    /// Creates a relay with these limits.
    pub fn new(limits: Limits) -> Self {
        Self(Some(Arc::new(Mutex::new(State {
            limits,
            rate: Rate::per_second(limits.bytes_per_second, limits.bytes_per_second),
            nodes: HashMap::new(),
            channels: HashMap::new(),
            pairs: HashMap::new(),
            bytes: 0,
        }))))
    }

    /// Registers a node at `path`, which its existing channels use too. Returns the lifetime of the
    /// registration.
    ///
    /// # Errors
    ///
    /// Returns the reason of the refusal.
    pub fn register(
        &self,
        now: Instant,
        node: WireguardKey,
        path: Path,
    ) -> Result<Duration, Refusal> {
        self.state()?.lock().register(now, node, path)?;
        Ok(CHANNEL_LIFETIME)
    }

    /// Opens a channel between a node at `path` and another node. Returns the channel and the path
    /// of the other node, which must be notified. `number` is used for a new channel. It must be
    /// random, so that it cannot be guessed.
    ///
    /// # Errors
    ///
    /// Returns the reason of the refusal.
    pub fn open(
        &self,
        now: Instant,
        (node, path): (WireguardKey, Path),
        other: WireguardKey,
        number: u64,
    ) -> Result<(ChannelId, Path), Refusal> {
        self.state()?.lock().open(now, (node, path), other, number)
    }

    /// Removes all nodes for which `stays` returns false, with their channels.
    pub fn retain(&self, stays: impl Fn(&WireguardKey) -> bool) {
        let Ok(state) = self.state() else { return };
        let mut state = state.lock();
        let gone = state.nodes.keys().copied().filter(|node| !stays(node));
        for node in gone.collect::<Vec<_>>() {
            state.forget(&node);
        }
    }

    /// Removes channels and nodes that were not used for the channel lifetime. Call it regularly.
    pub fn expire(&self, now: Instant) {
        if let Ok(state) = self.state() {
            state.lock().expire(now);
        }
    }

    /// Returns the current state, for status output.
    pub fn snapshot(&self) -> RelaySnapshot {
        self.state().map_or_else(
            |_| RelaySnapshot::default(),
            |state| {
                let state = state.lock();
                let (nodes, channels) = (state.nodes.len(), state.channels.len());
                RelaySnapshot { nodes, channels, bytes: state.bytes }
            },
        )
    }

    /// Decides about a run of `bytes` bytes that arrived on `channel`.
    pub(super) fn forward(&self, now: Instant, from: &Path, channel: u64, bytes: usize) -> Forward {
        match &self.0 {
            None => Forward::Unknown,
            Some(state) => state.lock().forward(now, from, channel, bytes as u64),
        }
    }

    fn state(&self) -> Result<&Mutex<State>, Refusal> {
        self.0.as_deref().ok_or(Refusal::Off)
    }
}

impl State {
    fn register(&mut self, now: Instant, key: WireguardKey, path: Path) -> Result<(), Refusal> {
        if let Some(node) = self.nodes.get_mut(&key) {
            node.heard = now;
            let before = std::mem::replace(&mut node.path, path);
            if before != path {
                // Its NAT assigned another address, so its channels at the previous path move too.
                for number in &node.channels {
                    let ends = self.channels.get_mut(number).map(|channel| &mut channel.ends);
                    let own = |end: &&mut End| end.node == key && end.path == before;
                    ends.into_iter().flatten().filter(own).for_each(|end| end.path = path);
                }
            }
            return Ok(());
        }
        if self.nodes.len() >= self.limits.nodes {
            return Err(Refusal::Limit);
        }
        let budget = Arc::new(Mutex::new(TokenBucket::default()));
        self.nodes.insert(key, Node { path, heard: now, channels: Vec::new(), budget });
        Ok(())
    }

    fn open(
        &mut self,
        now: Instant,
        (key, path): (WireguardKey, Path),
        other: WireguardKey,
        number: u64,
    ) -> Result<(ChannelId, Path), Refusal> {
        if key == other || !self.nodes.contains_key(&other) {
            return Err(Refusal::NotRegistered);
        }
        if !self.nodes.contains_key(&key) {
            self.register(now, key, path)?;
        }
        let mut pair = [key, other];
        pair.sort_unstable();
        let ends = [key, other].map(|end| {
            let node = self.nodes.get(&end)?;
            let full = node.channels.len() >= self.limits.channels;
            let (path, budget) = (node.path, node.budget.clone());
            Some((full, End { node: end, path, budget }))
        });
        let [Some((full, mut here)), Some((other_full, there))] = ends else {
            return Err(Refusal::NotRegistered);
        };
        here.path = path;
        let at = there.path;
        if let Some(number) = self.pairs.get(&pair) {
            if let Some(channel) = self.channels.get_mut(number) {
                channel.used = now;
                let own = |end: &&mut End| end.node == key;
                channel.ends.iter_mut().filter(own).for_each(|end| end.path = path);
            }
            return Ok((ChannelId(*number), at));
        }
        if full || other_full || self.channels.contains_key(&number) {
            return Err(Refusal::Limit);
        }
        self.channels.insert(number, Channel { ends: [here, there], used: now });
        self.pairs.insert(pair, number);
        for end in pair {
            if let Some(node) = self.nodes.get_mut(&end) {
                node.channels.push(number);
            }
        }
        Ok((ChannelId(number), at))
    }

    fn forward(&mut self, now: Instant, from: &Path, number: u64, bytes: u64) -> Forward {
        let Some(channel) = self.channels.get_mut(&number) else { return Forward::Unknown };
        let [a, b] = &channel.ends;
        let (sender, receiver) = if a.path.remote == from.remote {
            (a, b)
        } else if b.path.remote == from.remote {
            (b, a)
        } else {
            return Forward::Refused(DropReason::RelayStranger);
        };
        if !sender.budget.lock().take(&self.rate, now, bytes) {
            return Forward::Refused(DropReason::RelayLimited);
        }
        let to = receiver.path;
        channel.used = now;
        self.bytes += bytes;
        Forward::To(to)
    }

    fn expire(&mut self, now: Instant) {
        let silent = |since: Instant| now.saturating_duration_since(since) > CHANNEL_LIFETIME;
        let closed = self.channels.iter().filter(|(_, channel)| silent(channel.used));
        for number in closed.map(|(number, _)| *number).collect::<Vec<_>>() {
            self.close(number);
        }
        // A node with an open channel stays, because that channel was used recently.
        let gone = self.nodes.iter().filter(|(_, node)| silent(node.heard));
        let gone = gone.filter(|(_, node)| node.channels.is_empty()).map(|(key, _)| *key);
        for node in gone.collect::<Vec<_>>() {
            self.forget(&node);
        }
    }

    fn forget(&mut self, node: &WireguardKey) {
        let Some(node) = self.nodes.remove(node) else { return };
        for number in node.channels {
            self.close(number);
        }
    }

    fn close(&mut self, number: u64) {
        let Some(channel) = self.channels.remove(&number) else { return };
        let mut pair = channel.ends.map(|end| end.node);
        pair.sort_unstable();
        self.pairs.remove(&pair);
        for end in pair {
            if let Some(node) = self.nodes.get_mut(&end) {
                node.channels.retain(|channel| *channel != number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { nodes: 3, channels: 2, bytes_per_second: 10_000 };

    fn key(number: u8) -> WireguardKey {
        WireguardKey([number; 32])
    }

    fn at(number: u8) -> Path {
        Path::direct(([192, 0, 2, number], 51830).into())
    }

    fn open() -> (Relay, Instant) {
        let (relay, now) = (Relay::new(LIMITS), Instant::now());
        relay.register(now, key(2), at(2)).unwrap();
        assert_eq!(relay.open(now, (key(1), at(1)), key(2), 77), Ok((ChannelId(77), at(2))));
        (relay, now)
    }

    #[test]
    fn each_end_reaches_the_other_and_a_stranger_reaches_neither() {
        let (relay, now) = open();
        assert_eq!(relay.forward(now, &at(1), 77, 100), Forward::To(at(2)));
        assert_eq!(relay.forward(now, &at(2), 77, 100), Forward::To(at(1)));
        let stranger = Forward::Refused(DropReason::RelayStranger);
        assert_eq!(relay.forward(now, &at(9), 77, 100), stranger);
        assert_eq!(relay.forward(now, &at(1), 78, 100), Forward::Unknown);
        assert_eq!(relay.snapshot().bytes, 200);
    }

    #[test]
    fn the_same_pair_gets_the_same_channel_whichever_end_asks() {
        let (relay, now) = open();
        assert_eq!(relay.open(now, (key(2), at(2)), key(1), 99), Ok((ChannelId(77), at(1))));
        assert_eq!(relay.snapshot().channels, 1);
    }

    #[test]
    fn a_node_that_moved_keeps_its_channels() {
        let (relay, now) = open();
        relay.register(now, key(2), at(22)).unwrap();
        assert_eq!(relay.forward(now, &at(1), 77, 100), Forward::To(at(22)));
        let stranger = Forward::Refused(DropReason::RelayStranger);
        assert_eq!(relay.forward(now, &at(2), 77, 100), stranger);
    }

    #[test]
    fn a_node_that_sends_too_much_harms_itself_alone() {
        let (relay, now) = open();
        let through =
            (0..30).filter(|_| relay.forward(now, &at(1), 77, 1000) == Forward::To(at(2)));
        assert_eq!(through.count(), 10);
        assert_eq!(relay.forward(now, &at(2), 77, 1000), Forward::To(at(1)));
        let later = now + Duration::from_millis(500);
        let through =
            (0..30).filter(|_| relay.forward(later, &at(1), 77, 1000) == Forward::To(at(2)));
        assert_eq!(through.count(), 5);
    }

    #[test]
    fn everything_is_bounded_and_ends() {
        let (relay, now) = open();
        assert_eq!(relay.open(now, (key(1), at(1)), key(5), 5), Err(Refusal::NotRegistered));
        relay.register(now, key(3), at(3)).unwrap();
        assert_eq!(relay.register(now, key(4), at(4)), Err(Refusal::Limit));
        relay.retain(|node| *node != key(3));
        let late = now + CHANNEL_LIFETIME * 2;
        relay.expire(late);
        assert_eq!((relay.snapshot().nodes, relay.snapshot().channels), (0, 0));
        assert_eq!(Relay::default().register(now, key(1), at(1)), Err(Refusal::Off));
    }
}
