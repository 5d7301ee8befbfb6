//! Events: what happened on this node lately, for `towline events`.
//!
//! The agent keeps the newest [`KEPT`] events in memory. Each has an id that grows, also over restarts, so that a
//! reader can resume after the last event that it saw.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::broadcast;
use towline_core::path::Path as NetworkPath;
use towline_core::peer_history::PathChange;
use towline_core::status::PeerState;
use towline_proto::code::Coded as _;
use towline_proto::{codes, pb};

/// Number of events that are kept.
pub const KEPT: usize = 1_000;
/// Number of events that a follower may lag behind before it misses some.
const LAG: usize = 256;

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

/// Id of an event: the number of the agent's start, and the event's number since then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EventId {
    /// Boot epoch of the agent, which grows with each start.
    pub epoch: u64,
    /// Number of the event, from 1.
    pub number: u64,
}

/// Error of reading an [`EventId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event id looks like 12-345")]
pub struct EventIdError;

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.number)
    }
}

impl FromStr for EventId {
    type Err = EventIdError;

    fn from_str(text: &str) -> Result<Self, EventIdError> {
        let (epoch, number) = text.split_once('-').ok_or(EventIdError)?;
        Ok(Self {
            epoch: epoch.parse().map_err(|_| EventIdError)?,
            number: number.parse().map_err(|_| EventIdError)?,
        })
    }
}

/// The newest events, and those who follow them.
#[derive(Debug)]
pub struct EventLog {
    epoch: u64,
    last: u64,
    kept: VecDeque<pb::Event>,
    followers: broadcast::Sender<pb::Event>,
}

impl EventLog {
    /// Returns a log of the agent's start with this boot epoch.
    pub fn new(epoch: u64) -> Self {
        let (followers, _) = broadcast::channel(LAG);
        Self { epoch, last: 0, kept: VecDeque::new(), followers }
    }

    /// Adds an event, and forgets the oldest one if there are too many.
    pub fn add(&mut self, at: SystemTime, event: &Event) {
        self.last += 1;
        let event = pb::Event {
            id: EventId { epoch: self.epoch, number: self.last }.to_string(),
            at: unix_millis(at),
            code: event.code().into(),
            peer: event.peer().unwrap_or_default().into(),
            reason_code: event.reason_code().unwrap_or_default().into(),
            text: event.to_string(),
        };
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(event.clone());
        // Nobody may be following.
        let _ = self.followers.send(event);
    }

    /// Returns the kept events after `after`, the oldest first, and a channel of those to come. All
    /// that are kept, if `after` is of another run of the agent.
    pub fn read(&self, after: Option<EventId>) -> (Vec<pb::Event>, broadcast::Receiver<pb::Event>) {
        let seen = after.filter(|after| after.epoch == self.epoch).map_or(0, |after| after.number);
        let first = self.last - self.kept.len() as u64;
        let skipped = usize::try_from(seen.saturating_sub(first)).unwrap_or(usize::MAX);
        let events = self.kept.iter().skip(skipped).cloned().collect();
        (events, self.followers.subscribe())
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

    fn numbers(log: &EventLog, after: Option<EventId>) -> Vec<u64> {
        let (events, _) = log.read(after);
        events.iter().map(|event| event.id.parse::<EventId>().unwrap().number).collect()
    }

    #[test]
    fn a_reader_resumes_after_the_last_event_that_it_saw() {
        let mut log = EventLog::new(7);
        for _ in 0..3 {
            log.add(UNIX_EPOCH, &Event::AgentStarted);
        }
        let after = |epoch, number| Some(EventId { epoch, number });
        assert_eq!(numbers(&log, None), [1, 2, 3]);
        assert_eq!(numbers(&log, after(7, 2)), [3]);
        assert_eq!(numbers(&log, after(7, 3)), [0; 0]);
        assert_eq!(numbers(&log, after(7, u64::MAX)), [0; 0]);
        assert_eq!(numbers(&log, after(6, 2)), [1, 2, 3], "an earlier run");
    }

    #[test]
    fn the_oldest_events_are_forgotten() {
        let mut log = EventLog::new(1);
        for _ in 0..KEPT + 5 {
            log.add(UNIX_EPOCH, &Event::AgentStarted);
        }
        let kept = numbers(&log, None);
        assert_eq!((kept.len(), kept[0]), (KEPT, 6));
        assert_eq!(numbers(&log, Some(EventId { epoch: 1, number: 2 }))[0], 6);
    }

    #[test]
    fn an_event_names_peer_state_path_and_reason() {
        let event = Event::PeerState {
            peer: "w1".into(),
            from: PeerState::Up,
            to: PeerState::Down,
            path: None,
            reason: Some(Reason { code: "no-answer".into(), text: "no answer".into() }),
        };
        let mut log = EventLog::new(1);
        log.add(UNIX_EPOCH + Duration::from_secs(1), &event);
        let (events, _) = log.read(None);
        assert_eq!(
            events[0],
            pb::Event {
                id: "1-1".into(),
                at: 1000,
                code: "peer-state-changed".into(),
                peer: "w1".into(),
                reason_code: "no-answer".into(),
                text: "w1 is down (was up): no answer".into(),
            }
        );
    }

    #[test]
    fn ids_that_are_none_are_refused() {
        for text in ["", "1", "1-", "-1", "a-b", "1-2-3"] {
            assert_eq!(text.parse::<EventId>(), Err(EventIdError), "{text}");
        }
        assert_eq!("3-4".parse(), Ok(EventId { epoch: 3, number: 4 }));
    }
}
