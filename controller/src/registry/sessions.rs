//! Who is connected: at most one live session for each node.
//!
//! A session lives from its watch's start until it is closed, replaced by the same instance, or
//! not heard of for [`MISSED`] heartbeats. None of it is stored.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use towline_proto::id::NodeId;

use crate::clock::Now;

/// Heartbeats that may be missed before a session is dead.
pub const MISSED: u32 = 3;

/// Names a session; random.
pub type SessionId = [u8; 16];

/// A watch that runs.
#[derive(Debug, Clone)]
pub struct Session {
    /// Its name.
    pub id: SessionId,
    /// What the client drew at its start: two live ones for one node are a cloned machine.
    pub instance: Vec<u8>,
    /// Where the client is.
    pub address: SocketAddr,
    /// When it was last heard.
    pub heard: Instant,
}

/// The live sessions.
#[derive(Debug)]
pub struct Sessions {
    heartbeat: Duration,
    live: BTreeMap<NodeId, Session>,
}

impl Sessions {
    /// None yet; each is to be heard every `heartbeat`.
    pub fn new(heartbeat: Duration) -> Self {
        Self { heartbeat, live: BTreeMap::new() }
    }

    /// How often each side lets itself be heard.
    pub fn heartbeat(&self) -> Duration {
        self.heartbeat
    }

    /// How long a session may stay silent.
    pub fn deadline(&self) -> Duration {
        self.heartbeat * MISSED
    }

    /// Begins a session. Refused, with the other's address, while another instance of the node
    /// is alive; the same instance replaces its own.
    pub fn open(&mut self, node: NodeId, session: Session, now: Now) -> Result<(), SocketAddr> {
        match self.live(node, now) {
            Some(other) if other.instance != session.instance => Err(other.address),
            _ => {
                self.live.insert(node, session);
                Ok(())
            }
        }
    }

    /// The client let itself be heard; `false` if this is no longer its session.
    pub fn heard(&mut self, node: NodeId, id: SessionId, now: Now) -> bool {
        match self.live.get_mut(&node) {
            Some(session) if session.id == id => {
                session.heard = now.mono;
                true
            }
            _ => false,
        }
    }

    /// Ends a session; `false` if it was not the node's any more.
    pub fn close(&mut self, node: NodeId, id: SessionId) -> bool {
        let current = self.live.get(&node).is_some_and(|session| session.id == id);
        if current {
            self.live.remove(&node);
        }
        current
    }

    /// The node's session, if it was heard of in time.
    pub fn live(&self, node: NodeId, now: Now) -> Option<&Session> {
        self.live.get(&node).filter(|session| now.since(session.heard) <= self.deadline())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId([1; 16]);
    const SECOND: Duration = Duration::from_secs(1);

    fn session(id: u8, instance: u8, now: Now) -> Session {
        let address = SocketAddr::from(([192, 0, 2, id], 1000));
        Session { id: [id; 16], instance: vec![instance], address, heard: now.mono }
    }

    #[test]
    fn a_second_instance_is_refused_while_the_first_is_heard() {
        let now = Now::read();
        let mut sessions = Sessions::new(SECOND);
        sessions.open(NODE, session(1, 1, now), now).unwrap();
        let refused = sessions.open(NODE, session(2, 2, now), now);
        assert_eq!(refused, Err(SocketAddr::from(([192, 0, 2, 1], 1000))));

        let later = now.plus(SECOND * 3);
        assert!(sessions.open(NODE, session(2, 2, later), later).is_err());
        let late = later.plus(Duration::from_millis(1));
        sessions.open(NODE, session(2, 2, late), late).unwrap();
        assert!(!sessions.heard(NODE, [1; 16], late), "the first one is over");
    }

    #[test]
    fn the_same_instance_replaces_its_own_session() {
        let now = Now::read();
        let mut sessions = Sessions::new(SECOND);
        sessions.open(NODE, session(1, 1, now), now).unwrap();
        sessions.open(NODE, session(2, 1, now), now).unwrap();
        assert!(
            !sessions.close(NODE, [1; 16]),
            "a late close of the first must not end the second"
        );
        assert!(sessions.live(NODE, now).is_some());
        assert!(sessions.close(NODE, [2; 16]));
        assert!(sessions.is_empty());
    }

    #[test]
    fn a_silent_session_is_dead() {
        let now = Now::read();
        let mut sessions = Sessions::new(SECOND);
        sessions.open(NODE, session(1, 1, now), now).unwrap();
        let later = now.plus(SECOND * 2);
        assert!(sessions.heard(NODE, [1; 16], later));
        assert!(sessions.live(NODE, later.plus(SECOND * 3)).is_some());
        assert!(sessions.live(NODE, later.plus(SECOND * 4)).is_none());
    }
}
