//! Events of the mesh: what happened lately, for `towline-controller mesh events` and the web page.
//!
//! They are kept in memory alone. Changes of the mesh become events once they are stored.

use std::fmt;
use std::net::SocketAddr;

use ipnet::IpNet;
use parking_lot::Mutex;
use towline_proto::code::Coded as _;
use towline_proto::id::NodeName;
use towline_proto::{codes, pb};
use towline_registry::{Event, NodeProblem};
use towline_service::events::{EventId, EventLog};

use crate::clock;

/// What happened in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MeshEvent {
    /// The controller started.
    ControllerStarted,
    /// A node joined.
    NodeJoined {
        /// Name of the node.
        node: NodeName,
    },
    /// A node returned that the store did not have.
    NodeReadmitted {
        /// Name of the node.
        node: NodeName,
    },
    /// A node was removed.
    NodeRemoved {
        /// Name of the node.
        node: NodeName,
        /// Why it was removed.
        why: &'static str,
    },
    /// A session of a node began.
    NodeConnected {
        /// Name of the node.
        node: NodeName,
        /// Source address of the session.
        address: SocketAddr,
    },
    /// The session of a node ended.
    NodeDisconnected {
        /// Name of the node.
        node: NodeName,
        /// Why it ended.
        reason: String,
    },
    /// A prefix moved from an offline node to a connected one.
    PrefixMoved {
        /// Prefix that the new holder claimed.
        prefix: IpNet,
        /// Name of the previous holder.
        from: NodeName,
        /// Name of the new holder.
        to: NodeName,
    },
    /// A request of a node was refused, for example a prefix that another node holds.
    NodeProblem {
        /// Name of the node.
        node: NodeName,
        /// Problem, as `node show` prints it.
        problem: NodeProblem,
    },
}

codes! {
    MeshEvent {
        ControllerStarted => "controller-started",
        NodeJoined => "node-joined",
        NodeReadmitted => "node-readmitted",
        NodeRemoved => "node-removed",
        NodeConnected => "node-connected",
        NodeDisconnected => "node-disconnected",
        PrefixMoved => "node-prefix-moved",
        NodeProblem => "node-problem",
    }
}

impl MeshEvent {
    /// Returns the event of a stored change. `None` for those of tokens, administrators, the configuration and
    /// roles, which operators made.
    pub fn of(event: Event) -> Option<Self> {
        match event {
            Event::Joined { name, .. } => Some(Self::NodeJoined { node: name }),
            Event::Readmitted { name, .. } => Some(Self::NodeReadmitted { node: name }),
            Event::Removed { name, why, .. } => Some(Self::NodeRemoved { node: name, why }),
            Event::PrefixMoved { prefix, from, to } => Some(Self::PrefixMoved { prefix, from, to }),
            Event::MeshReturned { .. }
            | Event::LaterHistory { .. }
            | Event::TokenCreated { .. }
            | Event::TokenRevoked { .. }
            | Event::RelayDecided { .. }
            | Event::AdminAdded { .. }
            | Event::AdminRevoked { .. } => None,
        }
    }

    /// Returns the event's message, for the log.
    fn message(&self) -> pb::Event {
        let reason_code = match self {
            Self::NodeProblem { problem, .. } => problem.code(),
            _ => "",
        };
        pb::Event {
            code: self.code().into(),
            peer: self.node().map(ToString::to_string).unwrap_or_default(),
            reason_code: reason_code.into(),
            text: self.to_string(),
            ..Default::default()
        }
    }

    /// Returns the name of the node that the event is about.
    fn node(&self) -> Option<&NodeName> {
        match self {
            Self::ControllerStarted => None,
            Self::NodeJoined { node }
            | Self::NodeReadmitted { node }
            | Self::NodeRemoved { node, .. }
            | Self::NodeConnected { node, .. }
            | Self::NodeDisconnected { node, .. }
            | Self::PrefixMoved { to: node, .. }
            | Self::NodeProblem { node, .. } => Some(node),
        }
    }
}

impl fmt::Display for MeshEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ControllerStarted => {
                write!(f, "controller {} started", towline_proto::VERSION)
            }
            Self::NodeJoined { node } => write!(f, "{node} joined"),
            Self::NodeReadmitted { node } => {
                write!(f, "{node} returned: the store did not have it")
            }
            Self::NodeRemoved { node, why } => write!(f, "{node} is no member any more: {why}"),
            Self::NodeConnected { node, address } => write!(f, "{node} connected from {address}"),
            Self::NodeDisconnected { node, reason } => write!(f, "{node} disconnected: {reason}"),
            Self::PrefixMoved { prefix, from, to } => {
                write!(f, "prefix {prefix} moved from {from} to {to}")
            }
            Self::NodeProblem { node, problem } => write!(f, "{node}: {problem}"),
        }
    }
}

/// The newest events of the mesh.
#[derive(Debug)]
pub struct Events(Mutex<EventLog>);

impl Events {
    /// Creates the log of the controller's start with this number. The start is its first event.
    pub fn new(start: u64) -> Self {
        let events = Self(Mutex::new(EventLog::new(start)));
        events.add(&MeshEvent::ControllerStarted);
        events
    }

    /// Adds an event that happens now.
    pub fn add(&self, event: &MeshEvent) {
        self.0.lock().add(clock::unix_millis(), event.message());
    }

    /// Returns the kept events after `after`, the oldest first. All of them, if `after` is of another run of the
    /// controller.
    pub fn after(&self, after: Option<EventId>) -> Vec<pb::Event> {
        self.0.lock().read(after).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_name_their_node_and_the_code_of_a_problem() {
        let node: NodeName = "w1".parse().unwrap();
        let address = "192.0.2.1".parse().unwrap();
        let events = Events::new(3);
        events.add(&MeshEvent::NodeJoined { node: node.clone() });
        events.add(&MeshEvent::NodeProblem {
            node,
            problem: NodeProblem::Cloned { connected: address, tried: address },
        });
        let found = events.after(Some(EventId { epoch: 3, number: 1 }));
        let read: Vec<_> = found
            .iter()
            .map(|event| {
                [&event.id, &event.code, &event.peer, &event.reason_code].map(String::as_str)
            })
            .collect();
        assert_eq!(
            read,
            [["3-2", "node-joined", "w1", ""], ["3-3", "node-problem", "w1", "identity-cloned"],]
        );
        assert!(events.after(Some(EventId { epoch: 3, number: 3 })).is_empty());
        assert_eq!(events.after(Some(EventId { epoch: 2, number: 3 })).len(), 3);
    }
}
