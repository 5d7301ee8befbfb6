//! Signals that the agent handles.

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use super::termination::{GRACE, Termination};

/// Receivers of the signals.
pub(super) struct Signals {
    termination: Termination,
    hangup: tokio::signal::unix::Signal,
}

/// Meaning of a signal for the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SignalMeaning {
    /// SIGTERM or SIGINT: end the agent.
    End,
    /// SIGHUP: read the configuration again.
    Reload,
}

impl Signals {
    pub(super) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            termination: Termination::watch(GRACE).context("cannot receive signals")?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next signal. No signal is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> SignalMeaning {
        tokio::select! {
            () = self.termination.requested() => SignalMeaning::End,
            _ = self.hangup.recv() => SignalMeaning::Reload,
        }
    }

    /// Waits for a signal that ends the agent.
    pub(super) async fn end(&mut self) {
        while self.next().await != SignalMeaning::End {}
    }
}
