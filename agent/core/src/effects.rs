//! What every part of the core shares: the time, randomness, deadlines, and what leaves the core.

use std::collections::VecDeque;
use std::time::Instant;

use rand::SeedableRng;
use rand::rngs::StdRng;
use towline_types::frame::Probe;
use towline_types::id::WireguardKey;

use crate::changes::{Change, Changes};
use crate::counters::Counters;
use crate::output::{Output, Transmit};
use crate::path::Path;
use crate::silence::Silence;
use crate::timers::Timers;

/// The time of the current input, and everything that handling it may do beyond the part's own
/// state.
#[derive(Debug)]
pub(crate) struct Effects {
    /// Time of the current input. Never goes back.
    pub(crate) now: Instant,
    /// The only source of randomness.
    pub(crate) rng: StdRng,
    /// All deadlines.
    pub(crate) timers: Timers,
    /// Counts of what was refused or held back.
    pub(crate) counters: Counters,
    /// What has to be derived again.
    pub(crate) changes: Changes,
    /// Requests to public addresses that were not answered.
    pub(crate) silence: Silence,
    /// Outputs that the caller has not taken yet, in order.
    outputs: VecDeque<Output>,
}

impl Effects {
    pub(crate) fn new(seed: [u8; 32], now: Instant) -> Self {
        Self {
            now,
            rng: StdRng::from_seed(seed),
            timers: Timers::default(),
            counters: Counters::default(),
            changes: Changes::all(),
            silence: Silence::default(),
            outputs: VecDeque::new(),
        }
    }

    /// Takes the time of an input. An earlier one than before changes nothing.
    pub(crate) fn advance(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    /// Notes that what follows from `change` has to be derived again.
    pub(crate) fn mark(&mut self, change: Change) {
        self.changes.mark(change);
    }

    /// Hands out an output, after all earlier ones.
    pub(crate) fn output(&mut self, output: Output) {
        match &output {
            Output::Transmit(Transmit { path: Some(path), .. }) => {
                self.silence.asked(self.now, path);
            }
            Output::Handshake { to, .. } => {
                to.iter().for_each(|path| self.silence.asked(self.now, path));
            }
            Output::Transmit(_)
            | Output::Train { .. }
            | Output::Stun { .. }
            | Output::PeerTable(_)
            | Output::PeerPath { .. }
            | Output::ForwardingTable(_)
            | Output::ReportChannels
            | Output::Plan(_)
            | Output::SecondPort { .. }
            | Output::Advertise(_)
            | Output::StateChanged { .. }
            | Output::PathChanged { .. }
            | Output::StaticStateChanged { .. }
            | Output::PingResult { .. } => {}
        }
        self.outputs.push_back(output);
    }

    /// Has a message sealed for `peer` and sent over `path`.
    pub(crate) fn transmit(&mut self, peer: WireguardKey, path: Path, message: Probe) {
        self.output(Output::Transmit(Transmit {
            peer,
            path: Some(path),
            message,
            size: None,
            hop_limit: None,
        }));
    }

    /// Takes the earliest output.
    pub(crate) fn next_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }
}
