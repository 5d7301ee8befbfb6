//! What is sent to find and to test paths: which pings wait for their pongs, and what bounds it all.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::budget::Unanswered;
use crate::effects::Effects;
use crate::output::Output;
use crate::path::Path;
use crate::pings::{Pings, Purpose, Sent};
use crate::timers::Timer;

/// Position of a call among all calls of one node. It grows with each of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CallOrder {
    /// Start of the agent that sent the call.
    pub(crate) boot_epoch: u64,
    /// Number of the call since that start.
    pub(crate) number: u64,
}

/// State of probing that all peers share.
#[derive(Debug)]
pub(crate) struct Probing {
    /// Pings that wait for their pongs.
    pub(crate) pings: Pings,
    /// What may still be sent to addresses that never answered.
    pub(crate) unanswered: Unanswered,
    /// Pings of operators that have not ended, by the caller's number.
    operator_pings: BTreeSet<u64>,
    /// Grows with every start of the agent.
    boot_epoch: u64,
    /// Number of calls that were sent since the start.
    calls: u64,
}

impl Probing {
    pub(crate) fn new(boot_epoch: u64) -> Self {
        Self {
            pings: Pings::default(),
            unanswered: Unanswered::default(),
            operator_pings: BTreeSet::new(),
            boot_epoch,
            calls: 0,
        }
    }

    /// Replaces the boot epoch by a higher one.
    pub(crate) fn set_boot_epoch(&mut self, boot_epoch: u64) {
        self.boot_epoch = boot_epoch;
    }

    /// Returns boot epoch and number of the next call: together they only grow.
    pub(crate) fn next_call(&mut self) -> CallOrder {
        self.calls += 1;
        CallOrder { boot_epoch: self.boot_epoch, number: self.calls }
    }

    /// Begins an operator's ping, which ends after `timeout` at the latest.
    pub(crate) fn begin_operator_ping(&mut self, fx: &mut Effects, id: u64, timeout: Duration) {
        self.operator_pings.insert(id);
        fx.timers.set(Timer::OperatorPing(id), fx.now + timeout);
    }

    /// Ends the operator's ping that `sent` belongs to, if it does: its pong came over `from`.
    pub(crate) fn handle_operator_pong(&mut self, fx: &mut Effects, sent: &Sent, from: Path) {
        if let Purpose::Operator(id) = sent.purpose
            && self.operator_pings.remove(&id)
        {
            fx.timers.cancel(Timer::OperatorPing(id));
            let rtt = fx.now.saturating_duration_since(sent.at);
            fx.output(Output::PingResult { id, answer: Some((from, rtt)) });
        }
    }

    /// Ends an operator's ping that got no pong in time.
    pub(crate) fn handle_operator_timeout(&mut self, fx: &mut Effects, id: u64) {
        if self.operator_pings.remove(&id) {
            fx.output(Output::PingResult { id, answer: None });
        }
    }
}
