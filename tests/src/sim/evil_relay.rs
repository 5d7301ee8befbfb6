//! An evil relay: what it does to the datagrams that its agent sends. It has the node's keys, so what
//! it says of itself is authentic.

use std::collections::VecDeque;
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
    /// Creates a relay that does this.
    pub fn new(misdeed: Misdeed) -> Self {
        Self { misdeed, served: VecDeque::new(), treated: 0 }
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
                    self.served.push_back(to);
                    self.served.truncate(SERVED);
                }
                vec![(Duration::ZERO, other.unwrap_or(to), payload)]
            }
            (Misdeed::Lie, false) => {
                let mut sent = once(payload.clone());
                if let Payload::Probe { from, to: node, message: _, size: None } = payload {
                    let lies = self.lies(from, to.remote).into_iter();
                    sent.extend(lies.map(|message| {
                        let lie = Payload::Probe { from, to: node, message, size: None };
                        (Duration::ZERO, to, lie)
                    }));
                }
                sent
            }
            (Misdeed::Reorder, true)
            | (Misdeed::Lie, true)
            | (Misdeed::Drop | Misdeed::Repeat | Misdeed::Reorder | Misdeed::Misdirect, false) => {
                once(payload)
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
