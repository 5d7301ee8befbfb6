//! Channels between other nodes: datagrams that we forward as they come, unopened.
//!
//! The daemon, which opens what nodes ask ([`towline_core::relay`]), registers nodes and opens
//! channels; the worker looks a channel up once for each train and forwards the train as it lies in
//! the receive buffer, segments and all. Both hold the same [`Relay`].
//!
//! What bounds it: only nodes of the mesh get in, since requests are sealed for the pair; each has
//! at most so many channels and bytes per second, and the one who sends is charged. A datagram of a
//! stranger costs one lookup. Nothing grows with what strangers send.
//!
//! A second transport (TLS over TCP 443) would be another kind of [`End`]: the table maps a channel
//! and who it came from to where it goes, and does not care how either is reached.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use towline_core::path::{ChannelId, Path};
use towline_core::relay::CHANNEL_LIFETIME;
use towline_types::id::WireguardKey;
use towline_types::rate::{Rate, TokenBucket};

use super::drops::DropReason;

/// How much one node may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Nodes that may be registered.
    pub nodes: usize,
    /// Channels of one node.
    pub channels: usize,
    /// Bytes that one node may send in a second.
    pub bytes_per_second: u64,
}

/// Forwards for other nodes, or does not. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub struct Relay(Option<Arc<Mutex<State>>>);

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// We forward for nobody.
    Off,
    /// As many nodes, or channels of one of the two, as there may be.
    Limit,
    /// The other node is not registered.
    NotRegistered,
}

/// What becomes of a train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forward {
    /// It goes there, unchanged.
    To(Path),
    /// It goes nowhere.
    Refused(DropReason),
    /// The channel is none that we forward: we may be its end.
    Unknown,
}

/// How it stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelaySnapshot {
    /// Nodes that can be reached through us.
    pub nodes: usize,
    /// Open channels.
    pub channels: usize,
    /// Bytes forwarded so far.
    pub bytes: u64,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    /// Bytes of one node: those of one second at once.
    rate: Rate,
    nodes: HashMap<WireguardKey, Node>,
    channels: HashMap<u64, Channel>,
    pairs: HashMap<[WireguardKey; 2], u64>,
    bytes: u64,
}

#[derive(Debug)]
struct Node {
    path: Path,
    heard: Instant,
    channels: Vec<u64>,
    budget: Arc<Mutex<TokenBucket>>,
}

#[derive(Debug)]
struct Channel {
    ends: [End; 2],
    used: Instant,
}

#[derive(Debug)]
struct End {
    node: WireguardKey,
    path: Path,
    budget: Arc<Mutex<TokenBucket>>,
}

impl Relay {
    /// One that forwards, within these limits.
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

    /// A node can be reached at `path` from now on, also by the channels that it has. Returns for
    /// how long.
    ///
    /// # Errors
    ///
    /// Why it is refused.
    pub fn register(
        &self,
        now: Instant,
        node: WireguardKey,
        path: Path,
    ) -> Result<Duration, Refusal> {
        self.state()?.lock().register(now, node, path)?;
        Ok(CHANNEL_LIFETIME)
    }

    /// Opens a channel between a node, which is at `path`, and another one. Returns it with where
    /// the other one is, to be told of it. `number` is the channel's, if it is a new one: random,
    /// so that nobody can guess it.
    ///
    /// # Errors
    ///
    /// Why it is refused.
    pub fn open(
        &self,
        now: Instant,
        (node, path): (WireguardKey, Path),
        other: WireguardKey,
        number: u64,
    ) -> Result<(ChannelId, Path), Refusal> {
        self.state()?.lock().open(now, (node, path), other, number)
    }

    /// Forgets all but these nodes.
    pub fn keep(&self, stays: impl Fn(&WireguardKey) -> bool) {
        let Ok(state) = self.state() else { return };
        let mut state = state.lock();
        let gone = state.nodes.keys().copied().filter(|node| !stays(node));
        for node in gone.collect::<Vec<_>>() {
            state.forget(&node);
        }
    }

    /// Forgets what was not used for long. Call it now and then.
    pub fn expire(&self, now: Instant) {
        if let Ok(state) = self.state() {
            state.lock().expire(now);
        }
    }

    /// Current state, for status output.
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

    /// Where a train of `bytes` goes that came on `channel`.
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
                // Its NAT gave it another address: the channels that were there go on from here.
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
        // Who still sends is still there.
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
    fn the_same_pair_gets_the_same_channel_whoever_asks() {
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
        relay.keep(|node| *node != key(3));
        let late = now + CHANNEL_LIFETIME * 2;
        relay.expire(late);
        assert_eq!((relay.snapshot().nodes, relay.snapshot().channels), (0, 0));
        assert_eq!(Relay::default().register(now, key(1), at(1)), Err(Refusal::Off));
    }
}
