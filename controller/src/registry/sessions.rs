//! Sessions of the connected nodes: at most one live session for each node.
//!
//! A session lives from the start of its watch until it is closed, is replaced by the same
//! instance, or has missed [`MISSED`] heartbeats. Sessions are not stored.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use towline_proto::id::NodeId;

use crate::clock::Now;

/// Number of heartbeat intervals without a message after which a session is dead.
pub const MISSED: u32 = 3;

/// Id of a session, random.
pub type SessionId = [u8; 16];

/// Session of a running watch.
#[derive(Debug, Clone)]
pub struct Session {
    /// Id of the session.
    pub id: SessionId,
    /// Random id of the agent's start. Two live instances of one node mean that the machine was
    /// cloned.
    pub instance: Vec<u8>,
    /// Source address of the client.
    pub address: SocketAddr,
    /// Time of the last message of the client.
    pub last_seen: Instant,
}

/// The live sessions.
#[derive(Debug)]
pub struct Sessions {
    heartbeat: Duration,
    live: BTreeMap<NodeId, Session>,
}

impl Sessions {
    /// Creates an empty table. Each client has to send a message every `heartbeat`.
    pub fn new(heartbeat: Duration) -> Self {
        Self { heartbeat, live: BTreeMap::new() }
    }

    /// Returns the interval at which each side sends a heartbeat.
    pub fn heartbeat(&self) -> Duration {
        self.heartbeat
    }

    /// Returns the time without a message after which a session is dead.
    pub fn deadline(&self) -> Duration {
        self.heartbeat * MISSED
    }

    /// Starts a session. It replaces an earlier session of the same instance.
    ///
    /// # Errors
    ///
    /// If another instance of the node has a live session: its address.
    pub fn open(&mut self, node: NodeId, session: Session, now: Now) -> Result<(), SocketAddr> {
        match self.live(node, now) {
            Some(other) if other.instance != session.instance => Err(other.address),
            _ => {
                self.live.insert(node, session);
                Ok(())
            }
        }
    }

    /// Records a message of the client. Returns `false` if the session is not the node's current
    /// one.
    pub fn renew(&mut self, node: NodeId, id: SessionId, now: Now) -> bool {
        match self.live.get_mut(&node) {
            Some(session) if session.id == id => {
                session.last_seen = now.mono;
                true
            }
            _ => false,
        }
    }

    /// Ends a session. Returns `false` if it was not the node's current one.
    pub fn close(&mut self, node: NodeId, id: SessionId) -> bool {
        let current = self.live.get(&node).is_some_and(|session| session.id == id);
        if current {
            self.live.remove(&node);
        }
        current
    }

    /// Returns the node's session, if it is live.
    pub fn live(&self, node: NodeId, now: Now) -> Option<&Session> {
        self.live.get(&node).filter(|session| now.since(session.last_seen) <= self.deadline())
    }

    /// Returns the number of sessions, including dead ones that were not closed yet.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Returns whether there is no session.
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
        Session { id: [id; 16], instance: vec![instance], address, last_seen: now.mono }
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
        assert!(!sessions.renew(NODE, [1; 16], late), "the first session has ended");
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
        assert!(sessions.renew(NODE, [1; 16], later));
        assert!(sessions.live(NODE, later.plus(SECOND * 3)).is_some());
        assert!(sessions.live(NODE, later.plus(SECOND * 4)).is_none());
    }
}
