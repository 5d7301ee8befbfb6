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
    /// A node returned a configuration of the mesh that the store did not have.
    MeshReturned {
        /// Generation of the configuration.
        generation: u64,
    },
    /// A node proved that this machine was restored from a copy of an earlier time.
    LaterHistory {
        /// Epoch that began.
        epoch: u64,
        /// Number of tokens that were revoked.
        voided: usize,
    },
    /// An operator decided whether a node may relay.
    RelayDecided {
        /// Name of the node.
        node: NodeName,
        /// True if it may.
        may_relay: bool,
    },
    /// The key of an administrator was added.
    AdminAdded {
        /// Name of the administrator.
        name: String,
    },
    /// The key of an administrator was revoked.
    AdminRevoked {
        /// Name of the administrator.
        name: String,
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
        MeshReturned => "mesh-config-returned",
        LaterHistory => "later-history",
        RelayDecided => "relay-decided",
        AdminAdded => "admin-added",
        AdminRevoked => "admin-revoked",
        NodeProblem => "node-problem",
    }
}

impl MeshEvent {
    /// Returns the event of a stored change. `None` for those of tokens: their ids are shown to those who may list
    /// tokens, and events to everybody who may see the mesh.
    pub fn of(event: Event) -> Option<Self> {
        match event {
            Event::Joined { name, .. } => Some(Self::NodeJoined { node: name }),
            Event::Readmitted { name, .. } => Some(Self::NodeReadmitted { node: name }),
            Event::Removed { name, why, .. } => Some(Self::NodeRemoved { node: name, why }),
            Event::PrefixMoved { prefix, from, to } => Some(Self::PrefixMoved { prefix, from, to }),
            Event::MeshReturned { generation } => Some(Self::MeshReturned { generation }),
            Event::LaterHistory { epoch, voided } => Some(Self::LaterHistory { epoch, voided }),
            Event::RelayDecided { name, may_relay, .. } => {
                Some(Self::RelayDecided { node: name, may_relay })
            }
            Event::AdminAdded { name, .. } => Some(Self::AdminAdded { name }),
            Event::AdminRevoked { name, .. } => Some(Self::AdminRevoked { name }),
            Event::TokenCreated { .. } | Event::TokenRevoked { .. } => None,
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
            Self::ControllerStarted
            | Self::MeshReturned { .. }
            | Self::LaterHistory { .. }
            | Self::AdminAdded { .. }
            | Self::AdminRevoked { .. } => None,
            Self::NodeJoined { node }
            | Self::NodeReadmitted { node }
            | Self::NodeRemoved { node, .. }
            | Self::NodeConnected { node, .. }
            | Self::NodeDisconnected { node, .. }
            | Self::PrefixMoved { to: node, .. }
            | Self::RelayDecided { node, .. }
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
            Self::NodeRemoved { node, why } => write!(f, "{node} is no longer a member: {why}"),
            Self::NodeConnected { node, address } => write!(f, "{node} connected from {address}"),
            Self::NodeDisconnected { node, reason } => write!(f, "{node} disconnected: {reason}"),
            Self::PrefixMoved { prefix, from, to } => {
                write!(f, "prefix {prefix} moved from {from} to {to}")
            }
            Self::MeshReturned { generation } => {
                write!(f, "a node returned the mesh's configuration of generation {generation}")
            }
            Self::LaterHistory { epoch, voided } => write!(
                f,
                "this machine was restored from a copy: epoch {epoch} began, {voided} tokens and all \
                 administrators' keys are void"
            ),
            Self::RelayDecided { node, may_relay: true } => {
                write!(f, "{node} may relay for others")
            }
            Self::RelayDecided { node, may_relay: false } => {
                write!(f, "{node} may not relay for others")
            }
            Self::AdminAdded { name } => write!(f, "key of administrator {name} added"),
            Self::AdminRevoked { name } => write!(f, "key of administrator {name} revoked"),
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
    use towline_proto::id::{IdentityKey, NodeId, TokenId};

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

    #[test]
    fn what_operators_decide_is_an_event_but_no_token() {
        let (name, node) = ("r1".parse::<NodeName>().unwrap(), NodeId([1; 16]));
        let decided = Event::RelayDecided { name: name.clone(), node, may_relay: false };
        let decided = MeshEvent::of(decided).unwrap();
        assert_eq!(decided.to_string(), "r1 may not relay for others");
        assert_eq!(decided.node(), Some(&name));
        let added = Event::AdminAdded { name: "ann".to_owned(), key: IdentityKey([1; 32]) };
        assert_eq!(MeshEvent::of(added).unwrap().to_string(), "key of administrator ann added");
        let returned = MeshEvent::of(Event::MeshReturned { generation: 4 }).unwrap();
        assert_eq!(returned.message().code, "mesh-config-returned");
        assert_eq!(MeshEvent::of(Event::TokenCreated { token: TokenId([1; 8]) }), None);
    }
}
