//! A second UDP port of ours, for a NAT whose mapping of the configured port is stuck.
//!
//! A NAT keeps an old mapping as long as datagrams use it. After the NAT's own address changed, or
//! after a peer's datagram came first and took the port, nothing comes back through that mapping,
//! and our own retries keep it in use: only datagrams from another port get a new one.
//!
//! ```text
//!  configured port ── all peers silent, controller connected ──► second port, chosen by the kernel
//!        ▲                                                            │
//!        └────────────── still silent, or publicly reachable ─────────┘
//! ```
//!
//! Both sockets receive at any time. Only datagrams to public IPv4 addresses that answer nothing follow
//! the choice, so while one port is in use, the NAT forgets the mapping of the other one. A node with
//! a public or a configured IPv4 address keeps its port: peers call it there.

use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;

use crate::effects::Effects;
use crate::local_node::LocalNode;
use crate::timers::Timer;

/// Silence of all peers and reflectors after which another port is tried.
const SILENT: Duration = Duration::from_secs(20);
/// Silence of all peers while a reflector answers. It is longer, because the peers may be off, and up
/// to twice as long at random: where both nodes have to try another port, one does it first, so that
/// its NAT expects the other node when that sends something.
const PEERS_SILENT: Duration = Duration::from_secs(40);
/// Time for which a controller has to be connected: its connection may have come over the way that
/// just failed.
const CONNECTED: Duration = Duration::from_secs(5);
/// Longest silence after which another port is tried again.
const LONGEST: Duration = Duration::from_secs(600);

/// When the port is changed; see the module.
#[derive(Debug)]
pub(crate) struct SecondPort {
    /// Number of changes since a peer answered.
    changes: u32,
    /// Random part of the next silence, from 0 to 1.
    spread: f64,
}

impl SecondPort {
    pub(crate) fn new(rng: &mut StdRng) -> Self {
        Self { changes: 0, spread: rng.random() }
    }

    /// Records that a peer or a relay answered.
    pub(crate) fn answered(&mut self) {
        self.changes = 0;
    }

    /// Records a change of the port.
    pub(crate) fn changed(&mut self, rng: &mut StdRng) {
        self.spread = rng.random();
        self.changes = self.changes.saturating_add(1);
    }

    /// Schedules the next look, if there is silence.
    pub(crate) fn schedule(&self, fx: &mut Effects, local: &LocalNode) {
        if let Some(due) = self.due(fx, local) {
            fx.timers.set_no_later(Timer::SecondPort, due.max(fx.now));
        }
    }

    /// Returns whether the port is to be changed now.
    pub(crate) fn is_due(&self, fx: &Effects, local: &LocalNode) -> bool {
        self.due(fx, local).is_some_and(|due| due <= fx.now)
    }

    /// Returns when the port is to be changed, if the silence lasts.
    fn due(&self, fx: &Effects, local: &LocalNode) -> Option<Instant> {
        // Nearly always nothing is silent, and the rest need not be looked at.
        let (since, connected) = (fx.silence.begun()?, local.connected_since()?);
        if local.is_reachable_v4() {
            return None;
        }
        let silent = if fx.silence.is_reflected(fx.now) {
            PEERS_SILENT.mul_f64(1.0 + self.spread)
        } else {
            SILENT
        };
        let silent = silent.saturating_mul(1 << self.changes.min(6)).min(LONGEST);
        Some((since + silent).max(connected + CONNECTED))
    }
}
