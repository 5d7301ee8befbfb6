//! An evil relay: what it does to the datagrams that its agent sends. It has the node's keys, so what
//! it says of itself is authentic.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use towline_core::path::Path;
use towline_proto::frame::Probe;
use towline_proto::id::WireguardKey;

use super::payload::Payload;

/// What an evil relay does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misdeed {
    /// Forwards nothing.
    Drop,
    /// Forwards each datagram three times, and again later.
    Repeat,
    /// Delays every second datagram, so that the next ones overtake it.
    Reorder,
    /// Forwards each datagram to another node that uses it.
    Misdirect,
    /// Adds answers to requests that nobody sent, and channels that do not exist.
    Lie,
}

/// An evil relay, with what it remembers.
#[derive(Debug)]
pub struct EvilRelay {
    misdeed: Misdeed,
    /// Paths to the nodes that it forwarded for, the newest last.
    served: VecDeque<Path>,
    /// Number of datagrams that it treated.
    treated: u64,
    /// Counter of the last probe to each node.
    counters: BTreeMap<WireguardKey, u64>,
}

impl Misdeed {
    /// All misdeeds.
    pub const ALL: [Self; 5] =
        [Self::Drop, Self::Repeat, Self::Reorder, Self::Misdirect, Self::Lie];
}

/// Delay of a datagram that is overtaken or repeated.
const LATER: Duration = Duration::from_millis(80);
/// Number of paths that are remembered.
const SERVED: usize = 4;
/// Number of lies with each answer.
const LIES: u64 = 4;

impl EvilRelay {
    /// Creates a relay with one misdeed, which has served nobody yet.
    pub fn new(misdeed: Misdeed) -> Self {
        Self { misdeed, served: VecDeque::new(), treated: 0, counters: BTreeMap::new() }
    }

    /// Returns what the relay sends instead of a datagram, each with its delay.
    pub(super) fn treat(&mut self, to: Path, payload: Payload) -> Vec<(Duration, Path, Payload)> {
        self.treated += 1;
        // Its own traffic with peers uses channels of other relays, if any: it has none itself.
        let is_forwarded = matches!(payload, Payload::Channel(..));
        let once = |payload| vec![(Duration::ZERO, to, payload)];
        match (self.misdeed, is_forwarded) {
            (Misdeed::Drop, true) => Vec::new(),
            (Misdeed::Repeat, true) => {
                [0, 0, 0, 1, 9].map(|factor| (LATER * factor, to, payload.clone())).to_vec()
            }
            (Misdeed::Reorder, true) if self.treated.is_multiple_of(2) => {
                vec![(LATER, to, payload)]
            }
            (Misdeed::Misdirect, true) => {
                let other = self.served.iter().rev().find(|path| **path != to).copied();
                if !self.served.contains(&to) {
                    if self.served.len() == SERVED {
                        self.served.pop_front();
                    }
                    self.served.push_back(to);
                }
                vec![(Duration::ZERO, other.unwrap_or(to), payload)]
            }
            (Misdeed::Lie, false) => {
                let mut sent = vec![payload.clone()];
                let (stamp, probe) = match payload {
                    Payload::Stamped(stamp, probe) => (Some(stamp), *probe),
                    probe => (None, probe),
                };
                if let Payload::Probe { from, to: node, message: _, size } = probe {
                    let lies = self.lies(from, to.remote).into_iter();
                    let lies = lies.map(|message| Payload::Probe { from, to: node, message, size });
                    match stamp {
                        None => sent.extend(lies),
                        Some(stamp) => {
                            let lies = lies.map(|lie| Payload::Stamped(stamp, Box::new(lie)));
                            sent.extend(lies);
                            self.stamp(node, &mut sent);
                        }
                    }
                }
                sent.into_iter().map(|payload| (Duration::ZERO, to, payload)).collect()
            }
            (Misdeed::Reorder, true)
            | (Misdeed::Lie, true)
            | (Misdeed::Drop | Misdeed::Repeat | Misdeed::Reorder | Misdeed::Misdirect, false) => {
                once(payload)
            }
        }
    }

    /// Gives probes to a node the next counters, so that none of them is taken for a replay.
    fn stamp(&mut self, node: WireguardKey, probes: &mut [Payload]) {
        let last = self.counters.entry(node).or_default();
        for probe in probes {
            if let Payload::Stamped(stamp, _) = probe {
                stamp.counter = stamp.counter.max(*last + 1);
                *last = stamp.counter;
            }
        }
    }

    /// Returns messages that nothing asked for.
    fn lies(&self, own: WireguardKey, observed: SocketAddr) -> Vec<Probe> {
        let lie = |number: u64| match (self.treated + number) % 5 {
            0 => Probe::Registered { transaction: number, lifetime: Duration::ZERO },
            1 => Probe::Opened { transaction: number, channel: self.treated },
            2 => Probe::Incoming { channel: self.treated + number, peer: own },
            3 => Probe::Pong { transaction: number, observed },
            _ => Probe::Refused { transaction: number },
        };
        (0..LIES).map(lie).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_core::path::ChannelId;

    #[test]
    fn a_datagram_is_misdirected_to_the_node_that_was_served_last() {
        let mut relay = EvilRelay::new(Misdeed::Misdirect);
        let to = |number: u8| Path::direct(([192, 0, 2, number], 51_830).into());
        let mut misdirected = |number| {
            let payload = Payload::StunRequest([0; 12]);
            let payload = Payload::Channel(ChannelId(1), Box::new(payload));
            let sent = relay.treat(to(number), payload);
            sent.into_iter().map(|(_, path, _)| path).collect::<Vec<_>>()
        };
        for number in 2..=9 {
            misdirected(number);
        }
        assert_eq!(misdirected(1), [to(9)]);
    }
}
