//! Presence of the nodes: at most one live session for each node, and when each was last seen.
//!
//! A session lives from the start of its watch until it is closed, is replaced by the same
//! instance, or has missed [`MISSED`] heartbeats. Sessions are not stored. The times at which nodes
//! were last seen are stored now and then (see [`Key::LastSeen`](super::Key::LastSeen)).
//!
//! Where several controllers serve the mesh, each tells the others which nodes are connected to it. Without recent
//! news of all others ([`BLIND`]), no node counts as offline: it may be connected to another controller.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use towline_types::id::NodeId;

use super::Now;

/// Number of heartbeat intervals without a message after which a session is dead.
pub const MISSED: u32 = 3;

/// Time without news of the other controllers after which this one does not know which nodes are connected to
/// them. Then nodes are not offline, and this controller's own nodes should connect to another one.
pub const BLIND: Duration = Duration::from_secs(20);
/// Shortest time for which a node is offline before it counts as away, where several controllers serve the mesh. A node
/// may have to leave all but one of them first, if they are cut off: up to 7, each of which ends its watch within a minute
/// after it noticed that.
const LEAST_ABSENCE: Duration = Duration::from_secs(600);
/// Time after which the news of a session that ended have come, beyond [`Sessions::deadline`]: the lease of a controller
/// that died is part of it.
const NEWS_DELAY: Duration = Duration::from_secs(20);

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
    /// Time of the first attempt of another instance to open a session; `None` if there was none.
    contested: Option<Instant>,
}

impl Session {
    /// Creates the session of a client whose first message came now.
    pub fn new(id: SessionId, instance: Vec<u8>, address: SocketAddr, now: Now) -> Self {
        Self { id, instance, address, last_seen: now.mono, contested: None }
    }
}

/// Error of opening a session: another instance of the node has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Occupied {
    /// Source address of the other instance.
    pub address: SocketAddr,
    /// True if the other instance sent a message after its session was first contested, so that two
    /// machines run. Otherwise it may be a connection of this machine from before a restart.
    pub is_alive: bool,
}

/// Presence of the nodes.
#[derive(Debug)]
pub struct Sessions {
    heartbeat: Duration,
    live: BTreeMap<NodeId, Session>,
    seen: BTreeMap<NodeId, LastSeen>,
    opened_and_closed: u64,
    /// Presence at the other controllers; `None` if this is the only one.
    elsewhere: Option<Elsewhere>,
}

/// Presence at the other controllers.
#[derive(Debug, Default)]
struct Elsewhere {
    /// Monotonic time at which each node was last found connected to another controller.
    found: BTreeMap<NodeId, Instant>,
    /// Monotonic time of the newest news; `None` before the first.
    heard_at: Option<Instant>,
    /// Monotonic time since which the news have come without a gap of [`BLIND`].
    sighted_since: Option<Instant>,
    /// Nodes that are connected to this controller too, by the newest news.
    doubled: BTreeMap<NodeId, Doubled>,
}

/// A node that is connected to this controller and to another one.
#[derive(Debug, Clone, Copy)]
struct Doubled {
    /// Id of the session with this controller.
    session: SessionId,
    /// Monotonic time since which all news said so during this session.
    since: Instant,
    /// True once [`Sessions::take_doubled`] returned it.
    is_told: bool,
}

/// Time at which a node was last seen before its current session.
#[derive(Debug, Clone, Copy)]
struct LastSeen {
    /// Wall-clock time in seconds since 1970.
    unix: i64,
    /// Monotonic time; `None` if it was before the start of this process.
    mono: Option<Instant>,
}

impl Sessions {
    /// Creates a table without sessions. Each client has to send a message every `heartbeat`.
    pub fn new(heartbeat: Duration) -> Self {
        Self {
            heartbeat,
            live: BTreeMap::new(),
            seen: BTreeMap::new(),
            opened_and_closed: 0,
            elsewhere: None,
        }
    }

    /// Says that nodes may be connected to other controllers, too. Until [`Sessions::hear`] is called, no node is
    /// offline.
    pub fn share(&mut self) {
        self.elsewhere.get_or_insert_default();
    }

    /// Takes news: these nodes, and no others, are connected to other controllers.
    pub fn hear(&mut self, connected: impl IntoIterator<Item = NodeId>, now: Now) {
        let deadline = self.deadline();
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let is_gap = |at| now.since(at) > BLIND;
        if elsewhere.heard_at.is_none_or(is_gap) {
            elsewhere.sighted_since = Some(now.mono);
            elsewhere.doubled.clear();
        }
        elsewhere.heard_at = Some(now.mono);
        let before = std::mem::take(&mut elsewhere.doubled);
        for node in connected {
            elsewhere.found.insert(node, now.mono);
            let seen = self.seen.entry(node).or_insert(LastSeen { unix: now.unix, mono: None });
            seen.unix = seen.unix.max(now.unix);
            let Some(session) = self.live.get(&node) else { continue };
            if now.since(session.last_seen) <= deadline {
                let known = before.get(&node).filter(|known| known.session == session.id);
                let new = Doubled { session: session.id, since: now.mono, is_told: false };
                elsewhere.doubled.insert(node, known.copied().unwrap_or(new));
            }
        }
    }

    /// Returns the nodes that have had one session here, and at the same time one with another controller, for longer
    /// than the session of a machine that moved stays open. So two machines have the identity of each. Each node is
    /// returned once, with its address here.
    pub fn take_doubled(&mut self, now: Now) -> Vec<(NodeId, SocketAddr)> {
        let longest = self.deadline() + NEWS_DELAY;
        let Some(elsewhere) = &mut self.elsewhere else { return Vec::new() };
        let mut found = Vec::new();
        for (node, doubled) in &mut elsewhere.doubled {
            let session = self.live.get(node).filter(|session| session.id == doubled.session);
            if let Some(session) = session
                && !doubled.is_told
                && now.since(doubled.since) > longest
            {
                doubled.is_told = true;
                found.push((*node, session.address));
            }
        }
        found
    }

    /// Returns whether it is unknown which nodes are connected to other controllers.
    pub fn is_blind(&self, now: Now) -> bool {
        let heard = |elsewhere: &Elsewhere| elsewhere.heard_at;
        let is_recent = |at| now.since(at) <= BLIND;
        self.elsewhere.as_ref().is_some_and(|elsewhere| !heard(elsewhere).is_some_and(is_recent))
    }

    /// Returns the time of the newest news of the other controllers; `None` before the first, or if there are none.
    pub fn heard_at(&self) -> Option<Instant> {
        self.elsewhere.as_ref()?.heard_at
    }

    /// Returns since when it is known which nodes are connected to other controllers; `None` if there are none, or
    /// before the first news.
    pub fn sighted_since(&self) -> Option<Instant> {
        self.elsewhere.as_ref()?.sighted_since
    }

    /// Returns when a node was last found connected to another controller.
    pub fn last_elsewhere(&self, node: NodeId) -> Option<Instant> {
        self.elsewhere.as_ref()?.found.get(&node).copied()
    }

    /// Returns whether a node is connected to another controller, by the newest news.
    pub fn is_elsewhere(&self, node: NodeId) -> bool {
        let Some(elsewhere) = &self.elsewhere else { return false };
        let found = elsewhere.found.get(&node);
        found.is_some_and(|at| Some(*at) == elsewhere.heard_at)
    }

    /// Returns whether a node is connected to this controller or to another one.
    pub fn is_online(&self, node: NodeId, now: Now) -> bool {
        self.live(node, now).is_some() || self.is_elsewhere(node)
    }

    /// Returns the time for which a node must be offline to be away, if `limit` is the one of the mesh.
    pub fn least_absence(&self, limit: Duration) -> Duration {
        if self.elsewhere.is_some() { limit.max(LEAST_ABSENCE) } else { limit }
    }

    /// Returns the nodes with a live session.
    pub fn connected(&self, now: Now) -> Vec<NodeId> {
        let deadline = self.deadline();
        let is_live = |session: &Session| now.since(session.last_seen) <= deadline;
        let live = self.live.iter().filter(|(_, session)| is_live(session));
        live.map(|(node, _)| *node).collect()
    }

    /// Takes over times at which nodes were last seen, by another controller. Later times that are known stay.
    pub fn learn(&mut self, seen: impl IntoIterator<Item = (NodeId, i64)>) {
        for (node, unix) in seen {
            let known = self.seen.entry(node).or_insert(LastSeen { unix, mono: None });
            known.unix = known.unix.max(unix);
        }
    }

    /// Adds the times at which nodes were last seen before this process started.
    pub fn restore(&mut self, seen: impl IntoIterator<Item = (NodeId, i64)>) {
        for (node, unix) in seen {
            self.seen.insert(node, LastSeen { unix, mono: None });
        }
    }

    /// Returns the interval at which each side sends a heartbeat.
    pub fn heartbeat(&self) -> Duration {
        self.heartbeat
    }

    /// Returns the time without a message after which a session is dead.
    pub fn deadline(&self) -> Duration {
        self.heartbeat * MISSED
    }

    /// Starts a session. It replaces an earlier session of the same instance, and one of another
    /// instance that was not heard for [`Sessions::patience`] after it was first contested.
    ///
    /// # Errors
    ///
    /// If another instance of the node has a live session.
    pub fn open(&mut self, node: NodeId, session: Session, now: Now) -> Result<(), Occupied> {
        let (deadline, patience) = (self.deadline(), self.patience());
        let other = self.live.get_mut(&node).filter(|other| {
            other.instance != session.instance && now.since(other.last_seen) <= deadline
        });
        if let Some(other) = other {
            let contested = *other.contested.get_or_insert(now.mono);
            let is_alive = other.last_seen > contested;
            if is_alive || now.since(contested) <= patience {
                return Err(Occupied { address: other.address, is_alive });
            }
        }
        self.live.insert(node, session);
        self.opened_and_closed += 1;
        Ok(())
    }

    /// Returns the time within which a live client sends a message: one and a quarter heartbeat intervals.
    fn patience(&self) -> Duration {
        self.heartbeat * 5 / 4
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
    pub fn close(&mut self, node: NodeId, id: SessionId, now: Now) -> bool {
        let Some(session) = self.live.get(&node).filter(|session| session.id == id) else {
            return false;
        };
        let silent = i64::try_from(now.since(session.last_seen).as_secs()).unwrap_or(0);
        let seen = LastSeen { unix: now.unix - silent, mono: Some(session.last_seen) };
        self.seen.insert(node, seen);
        self.live.remove(&node);
        self.opened_and_closed += 1;
        true
    }

    /// Removes what is known of nodes that do not satisfy `is_member`.
    pub fn retain(&mut self, is_member: impl Fn(NodeId) -> bool) {
        self.seen.retain(|node, _| is_member(*node));
        if let Some(elsewhere) = &mut self.elsewhere {
            elsewhere.found.retain(|node, _| is_member(*node));
        }
    }

    /// Returns the node's session, if it is live.
    pub fn live(&self, node: NodeId, now: Now) -> Option<&Session> {
        self.live.get(&node).filter(|session| now.since(session.last_seen) <= self.deadline())
    }

    /// Returns the time of the last message of a node in this process's life.
    pub fn last_heard(&self, node: NodeId) -> Option<Instant> {
        let session = self.live.get(&node).map(|session| session.last_seen);
        session.or_else(|| self.seen.get(&node)?.mono)
    }

    /// Returns when a node was last seen, in seconds since 1970: now if it is connected, 0 if it
    /// never was.
    pub fn last_seen(&self, node: NodeId, now: Now) -> i64 {
        if let Some(session) = self.live.get(&node) {
            let silent = now.since(session.last_seen);
            let silent = if silent <= self.deadline() { 0 } else { silent.as_secs() };
            return now.unix - i64::try_from(silent).unwrap_or(0);
        }
        self.seen.get(&node).map_or(0, |seen| seen.unix)
    }

    /// Returns when each node was last seen, for the store.
    pub fn all_last_seen(&self, now: Now) -> BTreeMap<NodeId, i64> {
        let nodes = self.seen.keys().chain(self.live.keys());
        nodes.map(|node| (*node, self.last_seen(*node, now))).collect()
    }

    /// Returns how many sessions were opened and closed.
    pub fn opened_and_closed(&self) -> u64 {
        self.opened_and_closed
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
    use crate::tests;

    const NODE: NodeId = NodeId([1; 16]);
    const SECOND: Duration = Duration::from_secs(1);

    fn session(id: u8, instance: u8, now: Now) -> Session {
        let address = SocketAddr::from(([192, 0, 2, id], 1000));
        Session::new([id; 16], vec![instance], address, now)
    }

    #[test]
    fn a_second_instance_is_refused_while_the_first_is_heard() {
        let now = tests::now();
        let mut sessions = Sessions::new(SECOND);
        sessions.open(NODE, session(1, 1, now), now).unwrap();
        let address = SocketAddr::from(([192, 0, 2, 1], 1000));
        let occupied = |is_alive| Err(Occupied { address, is_alive });
        assert_eq!(sessions.open(NODE, session(2, 2, now), now), occupied(false));
        let mut later = now;
        for _ in 0..5 {
            later = later.plus(SECOND);
            assert!(sessions.renew(NODE, [1; 16], later));
            assert_eq!(sessions.open(NODE, session(2, 2, later), later), occupied(true));
        }
        let late = later.plus(SECOND * 3 + Duration::from_millis(1));
        sessions.open(NODE, session(2, 2, late), late).unwrap();
        assert!(!sessions.renew(NODE, [1; 16], late), "the first session has ended");
    }

    #[test]
    fn a_restarted_machine_waits_one_heartbeat_for_its_old_connection() {
        let now = tests::now();
        let mut sessions = Sessions::new(SECOND);
        sessions.open(NODE, session(1, 1, now), now).unwrap();
        assert!(sessions.open(NODE, session(2, 2, now), now).is_err());
        let early = now.plus(SECOND * 5 / 4);
        assert!(sessions.open(NODE, session(2, 2, early), early).is_err());
        let late = early.plus(Duration::from_millis(1));
        sessions.open(NODE, session(2, 2, late), late).unwrap();
    }

    #[test]
    fn the_same_instance_replaces_its_own_session() {
        let now = tests::now();
        let mut sessions = Sessions::new(SECOND);
        sessions.open(NODE, session(1, 1, now), now).unwrap();
        sessions.open(NODE, session(2, 1, now), now).unwrap();
        assert!(
            !sessions.close(NODE, [1; 16], now),
            "a late close of the first must not end the second"
        );
        assert!(sessions.live(NODE, now).is_some());
        assert!(sessions.close(NODE, [2; 16], now));
        assert!(sessions.is_empty());
    }

    #[test]
    fn without_news_of_the_other_controllers_nothing_is_known_of_their_nodes() {
        let start = tests::now();
        let mut sessions = Sessions::new(SECOND);
        assert!(!sessions.is_blind(start), "it is the only controller");
        sessions.share();
        assert!(sessions.is_blind(start) && sessions.heard_at().is_none());
        sessions.hear([NODE], start);
        assert!(!sessions.is_blind(start) && sessions.is_elsewhere(NODE));
        assert_eq!(sessions.heard_at(), Some(start.mono));
        let soon = start.plus(BLIND);
        sessions.hear([], soon);
        assert!(!sessions.is_elsewhere(NODE));
        assert_eq!(sessions.last_elsewhere(NODE), Some(start.mono));
        assert_eq!(sessions.sighted_since(), Some(start.mono));
        let late = soon.plus(BLIND + SECOND);
        assert!(sessions.is_blind(late));
        sessions.hear([], late);
        assert!(!sessions.is_blind(late));
        assert_eq!(sessions.sighted_since(), Some(late.mono), "nodes get their whole time again");
    }

    #[test]
    fn a_node_that_stays_connected_to_two_controllers_is_two_machines() {
        let start = tests::now();
        let mut sessions = Sessions::new(SECOND);
        sessions.share();
        let connect = |sessions: &mut Sessions, id, now| {
            sessions.open(NODE, session(id, 1, now), now).unwrap();
        };
        // Each second there are news, and each session that is open is heard.
        let mut now = start;
        let mut doubled_after =
            |sessions: &mut Sessions, seconds: u32, id, elsewhere: &[NodeId]| {
                let mut found = Vec::new();
                for _ in 0..seconds {
                    now = now.plus(SECOND);
                    sessions.renew(NODE, [id; 16], now);
                    sessions.hear(elsewhere.iter().copied(), now);
                    found.extend(sessions.take_doubled(now));
                }
                (found, now)
            };
        let patience = u32::try_from((SECOND * MISSED + NEWS_DELAY).as_secs()).unwrap();
        connect(&mut sessions, 1, start);
        // A machine that moves: its session elsewhere ends, or the one here is a new one.
        assert!(doubled_after(&mut sessions, patience, 1, &[NODE]).0.is_empty());
        assert!(doubled_after(&mut sessions, 1, 1, &[]).0.is_empty());
        let (found, later) = doubled_after(&mut sessions, patience, 1, &[NODE]);
        assert!(found.is_empty(), "the time began again");
        connect(&mut sessions, 2, later);
        let (found, _) = doubled_after(&mut sessions, patience, 2, &[NODE]);
        assert!(found.is_empty(), "with another session, too");
        // Two machines.
        let address = SocketAddr::from(([192, 0, 2, 2], 1000));
        let (found, _) = doubled_after(&mut sessions, patience, 2, &[NODE]);
        assert_eq!(found, [(NODE, address)], "once");
    }

    #[test]
    fn a_silent_session_is_dead() {
        let now = tests::now();
        let mut sessions = Sessions::new(SECOND);
        sessions.open(NODE, session(1, 1, now), now).unwrap();
        let later = now.plus(SECOND * 2);
        assert!(sessions.renew(NODE, [1; 16], later));
        assert!(sessions.live(NODE, later.plus(SECOND * 3)).is_some());
        let late = later.plus(SECOND * 4);
        assert!(sessions.live(NODE, late).is_none());
        assert_eq!(sessions.last_seen(NODE, late), later.unix, "the time of the last message");
        assert!(sessions.close(NODE, [1; 16], late));
        assert_eq!(sessions.last_seen(NODE, late), later.unix);
    }
}
