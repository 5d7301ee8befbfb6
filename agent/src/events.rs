//! Events: what happened on this node lately, for `towline events`.
//!
//! The agent keeps the newest ones in an [`EventLog`].

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use towline_core::path::Path as NetworkPath;
use towline_core::peer_history::PathChange;
use towline_core::status::PeerState;
use towline_proto::code::Coded as _;
use towline_proto::{codes, pb};

pub use towline_service::events::{EventId, EventLog};

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The agent started.
    AgentStarted,
    /// The state of a peer changed.
    PeerState {
        /// Name of the peer.
        peer: String,
        /// State until then.
        from: PeerState,
        /// State from then on.
        to: PeerState,
        /// Path that carries its traffic, if it is up.
        path: Option<NetworkPath>,
        /// Why it is not up, or relayed.
        reason: Option<Reason>,
    },
    /// The traffic of a peer takes another path.
    PeerPath {
        /// Name of the peer.
        peer: String,
        /// Path until then.
        from: Option<NetworkPath>,
        /// Path from then on.
        to: Option<NetworkPath>,
        /// Reason of the change.
        reason: PathChange,
    },
    /// A session with a controller began.
    ControllerConnected {
        /// Address of the controller.
        address: String,
    },
    /// The session with the controller ended.
    ControllerLost(Reason),
    /// Status names a problem that it did not name before.
    ProblemFound(Reason),
    /// A problem is gone.
    ProblemSolved(Reason),
    /// The data plane failed and was started again.
    DataPlaneRestarted {
        /// What failed.
        fault: String,
    },
    /// The machine slept.
    MachineSlept {
        /// Time for which it slept.
        time: Duration,
    },
}

/// A reason or problem with its code, as status has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reason {
    /// Stable code.
    pub code: String,
    /// One line for people.
    pub text: String,
}

codes! {
    Event {
        AgentStarted => "agent-started",
        PeerState => "peer-state-changed",
        PeerPath => "peer-path-changed",
        ControllerConnected => "controller-connected",
        ControllerLost => "controller-lost",
        ProblemFound => "problem-found",
        ProblemSolved => "problem-solved",
        DataPlaneRestarted => "data-plane-restarted",
        MachineSlept => "machine-slept",
    }
}

impl Event {
    /// Returns the event's message, for the log.
    pub fn message(&self) -> pb::Event {
        pb::Event {
            code: self.code().into(),
            peer: self.peer().unwrap_or_default().into(),
            reason_code: self.reason_code().unwrap_or_default().into(),
            text: self.to_string(),
            ..Default::default()
        }
    }

    /// Returns the name of the peer that the event is about.
    fn peer(&self) -> Option<&str> {
        match self {
            Self::PeerState { peer, .. } | Self::PeerPath { peer, .. } => Some(peer),
            Self::AgentStarted
            | Self::ControllerConnected { .. }
            | Self::ControllerLost(_)
            | Self::ProblemFound(_)
            | Self::ProblemSolved(_)
            | Self::DataPlaneRestarted { .. }
            | Self::MachineSlept { .. } => None,
        }
    }

    /// Returns the code of the reason, problem or state.
    fn reason_code(&self) -> Option<&str> {
        match self {
            Self::PeerState { to, reason, .. } => {
                Some(reason.as_ref().map_or(to.code(), |reason| &reason.code))
            }
            Self::PeerPath { reason, .. } => Some(reason.code()),
            Self::ControllerLost(reason)
            | Self::ProblemFound(reason)
            | Self::ProblemSolved(reason) => Some(&reason.code),
            Self::AgentStarted
            | Self::ControllerConnected { .. }
            | Self::DataPlaneRestarted { .. }
            | Self::MachineSlept { .. } => None,
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AgentStarted => write!(f, "agent {} started", towline_proto::VERSION),
            Self::PeerState { peer, from, to, path, reason } => {
                write!(f, "{peer} is {} (was {})", to.code(), from.code())?;
                if let Some(path) = path {
                    write!(f, ", by {path}")?;
                }
                reason.iter().try_for_each(|reason| write!(f, ": {}", reason.text))
            }
            Self::PeerPath { peer, to, reason, .. } => match to {
                Some(path) => write!(f, "{peer} is reached by {path}: {reason}"),
                None => write!(f, "{peer} has no path: {reason}"),
            },
            Self::ControllerConnected { address } => write!(f, "connected to controller {address}"),
            Self::ControllerLost(reason) => write!(f, "controller lost: {}", reason.text),
            Self::ProblemFound(reason) => write!(f, "problem: {}", reason.text),
            Self::ProblemSolved(reason) => write!(f, "problem solved: {}", reason.text),
            Self::DataPlaneRestarted { fault } => write!(f, "data plane restarted: {fault}"),
            Self::MachineSlept { time } => {
                write!(f, "the machine slept for {} s", time.as_secs())
            }
        }
    }
}

/// Returns a time in milliseconds since 1970.
pub(crate) fn unix_millis(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_names_peer_state_path_and_reason() {
        let event = Event::PeerState {
            peer: "w1".into(),
            from: PeerState::Up,
            to: PeerState::Down,
            path: None,
            reason: Some(Reason { code: "no-answer".into(), text: "no answer".into() }),
        };
        assert_eq!(
            event.message(),
            pb::Event {
                code: "peer-state-changed".into(),
                peer: "w1".into(),
                reason_code: "no-answer".into(),
                text: "w1 is down (was up): no answer".into(),
                ..Default::default()
            }
        );
    }
}
