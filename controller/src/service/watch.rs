//! One task for each watch: it sends what its cursor has not seen, listens for heartbeats, and
//! ends the session with itself.
//!
//! At most one message waits for the client. While it waits, changes only raise the revision of
//! the map; the next message holds the newest state of all that changed meanwhile.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tonic::{Status, Streaming};
use towline_proto::convert;
use towline_proto::id::NodeId;
use towline_proto::rate::TokenBucket;
use towline_proto::{limits, pb, signed};

use crate::clock::Now;
use crate::registry::Registry;
use crate::registry::sessions::SessionId;

use super::auth::CallingNode;
use super::signals::ALLOWANCE;
use super::{Shared, invalid, refused, unavailable};

/// Signatures that are verified before other tasks have their turn.
const VERIFIED_AT_ONCE: usize = 64;

/// A watch that was begun.
pub(super) struct Watcher {
    shared: Arc<Shared>,
    node: CallingNode,
    session: SessionId,
    /// Everything up to this revision was sent.
    cursor: u64,
    synced: bool,
    responses: mpsc::Sender<Result<pb::WatchResponse, Status>>,
    /// Signals of this node.
    allowance: TokenBucket,
}

/// What is to be sent next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Ready,
    Changes,
    Heartbeat,
    Nothing,
}

impl Watcher {
    /// For a client that stands at `from` (epoch and revision). One of another epoch, or ahead of
    /// the map, begins anew: the controller was restored from a backup since.
    pub(super) fn new(
        shared: Arc<Shared>,
        node: CallingNode,
        session: SessionId,
        from: (u64, u64),
        responses: mpsc::Sender<Result<pb::WatchResponse, Status>>,
    ) -> Self {
        let (epoch, revision) = from;
        let known = epoch == shared.map.epoch() && revision <= shared.map.revision();
        let cursor = if known { revision } else { 0 };
        let allowance = TokenBucket::default();
        Self { shared, node, session, cursor, synced: false, responses, allowance }
    }

    /// Runs until either side ends it.
    pub(super) async fn run(mut self, mut requests: Streaming<pb::WatchRequest>) {
        let mut signals = self.shared.signals.open(self.node.id, self.session);
        let end = self.follow(&mut requests, &mut signals).await;
        self.shared.signals.close(self.node.id, self.session);
        let reason = end.as_ref().map_or("closed by the client", Status::message);
        tracing::info!(node = %self.node.name, reason, "session ended");
        if let Some(status) = end {
            // The client may be gone, or not reading: then nobody waits for it.
            let _ = self.responses.try_send(Err(status));
        }
        let id = self.node.id;
        if self.shared.sessions.lock().close(id, self.session) {
            let run = move |registry: &mut Registry, _: &_, now| {
                registry.session_ended(id, now);
            };
            // Only when it was last seen is lost, if this fails.
            let _ = self.shared.writer.run(run).await;
        }
    }

    /// Why the watch ended; `None` if the client closed it.
    async fn follow(
        &mut self,
        requests: &mut Streaming<pb::WatchRequest>,
        signals: &mut mpsc::Receiver<pb::Signal>,
    ) -> Option<Status> {
        let mut latest = self.shared.map.latest();
        let mut stopping = self.shared.stopping.clone();
        let (heartbeat, deadline) = {
            let sessions = self.shared.sessions.lock();
            (sessions.heartbeat(), sessions.deadline())
        };
        let mut ticks = interval(heartbeat);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        let mut due = Due::Ready;
        // Goes before whatever else is due: it is short, and cannot wait.
        let mut signal = None;
        loop {
            let responses = self.responses.clone();
            tokio::select! {
                _ = stopping.wait_for(|stopping| *stopping) => {
                    return Some(Status::unavailable("the controller is stopping: try again"));
                }
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        if !self.heard() {
                            return Some(Status::aborted("the session was replaced by a newer one"));
                        }
                        if let Some(pb::watch_request::Kind::Signal(signal)) = request.kind {
                            self.carry(signal);
                        }
                    }
                    Ok(None) => return None,
                    Err(status) => {
                        tracing::debug!(node = %self.node.name, %status, "watch");
                        return None;
                    }
                },
                // There is one as long as this session is the node's.
                Some(next) = signals.recv(), if signal.is_none() => signal = Some(next),
                permit = responses.reserve(), if due != Due::Nothing || signal.is_some() => {
                    let Ok(permit) = permit else { return None };
                    if due != Due::Ready && let Some(signal) = signal.take() {
                        let kind = Some(pb::watch_response::Kind::Signal(signal));
                        permit.send(Ok(pb::WatchResponse { kind }));
                        continue;
                    }
                    latest.mark_unchanged();
                    let (response, then) = self.next(due);
                    permit.send(Ok(response));
                    due = then;
                }
                () = responses.closed(), if due == Due::Nothing && signal.is_none() => return None,
                changed = latest.changed(), if self.synced => {
                    // The sender lives as long as `shared`.
                    let _ = changed;
                    if due != Due::Ready {
                        due = Due::Changes;
                    }
                }
                _ = ticks.tick() => {
                    if let Some(end) = self.check(deadline) {
                        return Some(end);
                    }
                    if due == Due::Nothing {
                        due = Due::Heartbeat;
                    }
                }
            }
        }
    }

    /// The message that is due, and what is due after it.
    fn next(&mut self, due: Due) -> (pb::WatchResponse, Due) {
        use pb::watch_response::Kind;
        let map = &self.shared.map;
        let (kind, then) = match due {
            Due::Ready => (Kind::Ready(self.ready()), Due::Changes),
            Due::Changes => {
                let (mut changes, all) = map.changes_after(self.cursor);
                self.cursor = changes.revision;
                self.synced |= all;
                changes.synced = self.synced;
                (Kind::Changes(changes), if all { Due::Nothing } else { Due::Changes })
            }
            Due::Heartbeat | Due::Nothing => {
                (Kind::Heartbeat(pb::Heartbeat { revision: self.cursor }), Due::Nothing)
            }
        };
        (pb::WatchResponse { kind: Some(kind) }, then)
    }

    fn ready(&self) -> pb::WatchReady {
        let map = &self.shared.map;
        let heartbeat = self.shared.sessions.lock().heartbeat();
        pb::WatchReady {
            session_id: self.session.to_vec(),
            epoch: map.epoch(),
            heartbeat_ms: u32::try_from(heartbeat.as_millis()).unwrap_or(u32::MAX),
            mesh: Some(map.mesh()),
            // Gone only if it was removed in this very moment; then the session ends soon.
            grant: map.member(self.node.id, &self.node.identity).ok().map(|(_, grant)| grant),
            reflector_port: self.shared.reflector.map_or(0, u32::from),
            reflectors: self.shared.reflectors(),
        }
    }

    fn carry(&mut self, signal: pb::Signal) {
        let may = self.allowance.take(&ALLOWANCE, Now::read().mono, 1);
        let carried = may && self.shared.signals.carry(self.node.id, signal);
        if !carried {
            tracing::debug!(node = %self.node.name, limited = !may, "signal lost");
        }
    }

    fn heard(&self) -> bool {
        self.shared.sessions.lock().heard(self.node.id, self.session, Now::read())
    }

    /// Whether the session is to end: the node was removed, the client is silent, or another
    /// session took its place.
    fn check(&self, deadline: std::time::Duration) -> Option<Status> {
        if let Some(refusal) = self.shared.map.refusal(self.node.id) {
            return Some(refused(refusal));
        }
        let sessions = self.shared.sessions.lock();
        match sessions.live(self.node.id, Now::read()) {
            Some(live) if live.id == self.session => None,
            Some(_) => Some(Status::aborted("the session was replaced by a newer one")),
            None => Some(Status::deadline_exceeded(format!(
                "no heartbeat for {} ms: open the watch again",
                deadline.as_millis()
            ))),
        }
    }
}

/// Learns the tombstones that a client kept and this controller does not know.
pub(super) async fn relearn(shared: &Shared, tombstones: Vec<pb::Signed>) -> Result<(), Status> {
    convert::bounded("list of tombstones", tombstones.len(), limits::TOMBSTONES)
        .map_err(invalid)?;
    let mut unknown = Vec::new();
    for (i, tombstone) in tombstones.into_iter().enumerate() {
        if names_removed_node(shared, &tombstone) {
            continue;
        }
        let verified = signed::tombstone(Some(&tombstone), shared.authority.public_key())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        unknown.push((verified, tombstone));
        if i % VERIFIED_AT_ONCE == 0 {
            tokio::task::yield_now().await;
        }
    }
    if unknown.is_empty() {
        return Ok(());
    }
    let run =
        move |registry: &mut Registry, sessions: &_, now| registry.relearn(unknown, sessions, now);
    let learned = shared.writer.run(run).await.map_err(unavailable)?;
    tracing::info!(learned, "tombstones learned from a node");
    Ok(())
}

/// Read without its signature: it decides only whether there is anything to learn.
fn names_removed_node(shared: &Shared, tombstone: &pb::Signed) -> bool {
    let body: Result<pb::Tombstone, _> = prost::Message::decode(tombstone.body.clone());
    body.ok()
        .and_then(|body| NodeId::try_from(body.node_id.as_slice()).ok())
        .is_some_and(|node| shared.map.is_removed(node))
}

/// Tells the operator of a cloned machine.
pub(super) async fn note_clone(
    shared: &Shared,
    node: NodeId,
    address: SocketAddr,
    other: SocketAddr,
) {
    tracing::warn!(%node, %address, %other, "second session of one identity refused");
    let text = format!(
        "two machines use this node's identity: one is connected from {}, another tried from {}",
        other.ip(),
        address.ip()
    );
    let run = move |registry: &mut Registry, _: &_, _| {
        registry.note_clone(node, text);
    };
    // It is only told; the refusal stands in any case.
    let _ = shared.writer.run(run).await;
}
