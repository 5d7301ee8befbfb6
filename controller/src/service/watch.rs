//! Task of a watch: it sends the changes after its cursor, receives heartbeats, and ends the
//! session when it ends.
//!
//! At most one message waits for the client. While it waits, changes only raise the revision of
//! the map. The next message has the newest state of everything that changed in the meantime.

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, Sleep, interval, sleep, timeout};
use tonic::{Status, Streaming};
use towline_proto::convert;
use towline_proto::id::NodeId;
use towline_proto::{limits, pb, signed};

use crate::clock;
use crate::ledger::Ledger;
use crate::map::Map;
use towline_registry::sessions::{SessionId, Sessions};
use towline_registry::{NodeProblem, Now};

use super::Shared;
use super::auth::CallingNode;
use super::budgets::Work;
use super::refusal::{Refusal as _, absent};
use super::signals::ToWatch;

/// Number of signatures that are verified before the task yields to others.
const VERIFIED_AT_ONCE: usize = 64;

/// Time for this controller to get the changes that a client has seen elsewhere, before they count as lost.
const CATCH_UP: Duration = Duration::from_secs(2);

/// Pause between two messages of changes to one watcher, for each watcher that there is: 50 ms with
/// 1,000 watchers, half a second with 10,000. The first change after a pause is sent at once; what
/// changes during the pause is sent together after it, in its newest state. So a burst of changes
/// costs each watcher one message, and the controller's work for deltas stays below its capacity.
const PAUSE_PER_WATCHER: Duration = Duration::from_micros(50);

/// A running watch.
pub(super) struct Watcher {
    shared: Arc<Shared>,
    node: CallingNode,
    session: SessionId,
    /// Revision up to which everything was sent.
    cursor: u64,
    /// True once everything that existed at the start of the watch was sent.
    synced: bool,
    responses: mpsc::Sender<Result<pb::WatchResponse, Status>>,
}

/// Kind of the message to send next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Ready,
    Changes,
    Heartbeat,
    Nothing,
}

impl Watcher {
    /// Creates a watch that sends the changes after the revision `cursor`.
    pub(super) fn new(
        shared: Arc<Shared>,
        node: CallingNode,
        session: SessionId,
        cursor: u64,
        responses: mpsc::Sender<Result<pb::WatchResponse, Status>>,
    ) -> Self {
        Self { shared, node, session, cursor, synced: false, responses }
    }

    /// Returns the revision after which a client that has the map at this epoch and revision gets changes.
    /// If the epoch differs or the revision is ahead of the map (a first watch, or a controller restored
    /// from a backup), it is 0: the client gets the whole map.
    pub(super) fn cursor(map: &Map, (epoch, revision): (u64, u64)) -> u64 {
        let is_known = epoch == map.epoch() && revision <= map.revision();
        if is_known { revision } else { 0 }
    }

    /// Runs until either side ends the watch.
    pub(super) async fn run(mut self, mut requests: Streaming<pb::WatchRequest>) {
        let mut signals = self.shared.signals.open(self.node.id, self.session);
        let end = self.follow(&mut requests, &mut signals).await;
        self.shared.signals.close(self.node.id, self.session);
        let reason = end.as_ref().map_or("closed by the client", Status::message);
        tracing::info!(node = %self.node.name, reason, "session ended");
        if let Some(status) = end {
            // The client may be gone or may not read; the send must not wait for it.
            let _ = self.responses.try_send(Err(status));
        }
        self.shared.sessions.lock().close(self.node.id, self.session, clock::now());
    }

    /// Sends and receives until the watch ends. Returns the status to send to the client; `None` if
    /// the client closed the watch.
    async fn follow(
        &mut self,
        requests: &mut Streaming<pb::WatchRequest>,
        signals: &mut mpsc::Receiver<ToWatch>,
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
        let mut silence = pin!(sleep(deadline));
        let mut due = Due::Ready;
        // Set after a message of changes to a watcher that has the whole map, until its pause is over.
        let mut pause: Option<Pin<Box<Sleep>>> = None;
        // After `Ready`, a signal is sent before any other message that is due: it is short and urgent.
        let mut signal = None;
        loop {
            let responses = self.responses.clone();
            let is_paused = due == Due::Changes && pause.is_some();
            tokio::select! {
                _ = stopping.wait_for(|stopping| *stopping) => {
                    return Some(Status::unavailable("the controller is stopping: try again"));
                }
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        silence.as_mut().reset(Instant::now() + deadline);
                        if !self.renew_session() {
                            return Some(replaced());
                        }
                        if let Some(pb::watch_request::Kind::Signal(signal)) = request.kind {
                            self.carry(signal);
                        }
                    }
                    Ok(None) => return None,
                    Err(status) => {
                        tracing::debug!(node = %self.node.name, %status, "watch failed");
                        return None;
                    }
                },
                next = signals.recv(), if signal.is_none() => match next {
                    Some(ToWatch::Signal(next)) => signal = Some(next),
                    Some(ToWatch::Probe) if due == Due::Nothing => due = Due::Heartbeat,
                    // Another message is due, and finds it out too.
                    Some(ToWatch::Probe) => {}
                    // The sender exists as long as this session is the node's current one.
                    None => return Some(replaced()),
                },
                () = async { if let Some(pause) = &mut pause { pause.await } }, if pause.is_some() => {
                    pause = None;
                }
                permit = responses.reserve(),
                    if (due != Due::Nothing && !is_paused) || signal.is_some() =>
                {
                    let Ok(permit) = permit else { return None };
                    if due != Due::Ready && let Some(signal) = signal.take() {
                        let kind = Some(pb::watch_response::Kind::Signal(signal));
                        permit.send(Ok(pb::WatchResponse { kind }));
                        continue;
                    }
                    if is_paused {
                        continue;
                    }
                    // A heartbeat says nothing of changes, so it must not hide that there are some.
                    if due != Due::Heartbeat {
                        latest.mark_unchanged();
                        // The node's own removal may be among what is marked as seen.
                        if let Some(removed) = self.removed() {
                            return Some(removed);
                        }
                    }
                    if due == Due::Changes && self.synced {
                        pause = Some(Box::pin(sleep(self.pause())));
                    }
                    let (response, then) = self.next(due);
                    permit.send(Ok(response));
                    due = then;
                }
                () = responses.closed(),
                    if (due == Due::Nothing || is_paused) && signal.is_none() =>
                {
                    return None;
                }
                // During a pause, changes wake nobody.
                changed = latest.changed(), if self.synced && pause.is_none() => {
                    // The sender lives as long as `shared`.
                    let _ = changed;
                    if let Some(removed) = self.removed() {
                        return Some(removed);
                    }
                    if due != Due::Ready {
                        due = Due::Changes;
                    }
                }
                () = &mut silence => {
                    let ms = deadline.as_millis();
                    let text = format!("no heartbeat for {ms} ms: open the watch again");
                    return Some(Status::deadline_exceeded(text));
                }
                _ = ticks.tick() => {
                    // Also while the client reads nothing, and so gets no changes.
                    if let Some(removed) = self.removed() {
                        return Some(removed);
                    }
                    if due == Due::Nothing {
                        due = Due::Heartbeat;
                    }
                }
            }
        }
    }

    /// Returns the status to end the watch with, if the node was removed.
    fn removed(&self) -> Option<Status> {
        let map = &self.shared.map;
        map.absence(self.node.id).map(|error| absent(&error, map))
    }

    /// Returns the pause after a message of changes.
    fn pause(&self) -> Duration {
        PAUSE_PER_WATCHER * u32::try_from(self.shared.map.watchers()).unwrap_or(u32::MAX)
    }

    /// Returns the message that is due, and the kind that is due after it.
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
                let head = Some(self.shared.head());
                (Kind::Heartbeat(pb::Heartbeat { revision: self.cursor, head }), Due::Nothing)
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
            // Absent only if the node was just removed; the session ends soon then.
            grant: map.member(self.node.id, &self.node.identity).ok().map(|(_, grant)| grant),
            reflector_port: self.shared.reflector.map_or(0, u32::from),
            reflectors: self.shared.reflectors(),
            head: Some(self.shared.head()),
        }
    }

    fn carry(&self, signal: pb::Signal) {
        let may = self.shared.budgets.spend(self.node.id, Work::Signal, clock::now().mono).is_ok();
        let carried = may && self.shared.signals.carry(self.node.id, signal);
        if !carried {
            tracing::debug!(node = %self.node.name, limited = !may, "signal dropped");
        }
    }

    fn renew_session(&self) -> bool {
        self.shared.sessions.lock().renew(self.node.id, self.session, clock::now())
    }
}

/// Returns the status of a watch that the same node opened again.
fn replaced() -> Status {
    Status::aborted("the session was replaced by a newer one")
}

/// Begins a new epoch if a client has a later head of the map than this controller, which was then restored from a
/// copy of its machine. Only the CA can sign a head, so a node cannot make one up.
pub(super) async fn prove(shared: &Shared, head: Option<&pb::Signed>) -> Result<(), Status> {
    if head.is_none() {
        return Ok(());
    }
    let head = match signed::head(head, shared.authority.public_key()) {
        Ok(head) if head.mesh_id == shared.authority.mesh_id() => head,
        Ok(_) => return Ok(()),
        Err(error) => {
            tracing::debug!(%error, "head of a node ignored");
            return Ok(());
        }
    };
    let is_later = || head.position() > (shared.map.epoch(), shared.map.revision());
    if !is_later() {
        return Ok(());
    }
    // The node may come from another controller, whose newest changes are not here yet.
    let mut latest = shared.map.latest();
    let _ = timeout(CATCH_UP, latest.wait_for(|revision| *revision >= head.revision)).await;
    if !is_later() {
        return Ok(());
    }
    let change = move |ledger: &mut Ledger, _: &Sessions, now: Now| {
        ledger.registry().prove_later(head, now).is_some()
    };
    if shared.apply(change).await? {
        // The key of the local administrator is void, too.
        shared.admin_revoked.notify_one();
    }
    Ok(())
}

/// Adds the tombstones of a client that this controller does not have, after it verified them.
pub(super) async fn resync(shared: &Shared, tombstones: Vec<pb::Signed>) -> Result<(), Status> {
    convert::bounded("list of tombstones", tombstones.len(), limits::TOMBSTONES)
        .map_err(|error| error.status())?;
    let mut unknown = Vec::new();
    for (i, tombstone) in tombstones.into_iter().enumerate() {
        if names_removed_node(shared, &tombstone) {
            continue;
        }
        let verified = signed::tombstone(Some(&tombstone), shared.authority.public_key())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        unknown.push(verified);
        if i % VERIFIED_AT_ONCE == 0 {
            tokio::task::yield_now().await;
        }
    }
    if unknown.is_empty() {
        return Ok(());
    }
    let change = move |ledger: &mut Ledger, sessions: &Sessions, now| {
        ledger.registry().resync(unknown, sessions, now)
    };
    let learned = shared.apply(change).await?;
    tracing::info!(learned, "tombstones received from a node");
    Ok(())
}

/// Returns whether the map already has this tombstone. The signature is not verified, since a known
/// tombstone is skipped.
fn names_removed_node(shared: &Shared, tombstone: &pb::Signed) -> bool {
    let body: Result<pb::Tombstone, _> = prost::Message::decode(tombstone.body.clone());
    body.ok()
        .and_then(|body| NodeId::try_from(body.node_id.as_slice()).ok())
        .is_some_and(|node| shared.map.tombstone(node).is_some())
}

/// Logs a cloned machine and adds it to the node's problems.
pub(super) async fn note_clone(
    shared: &Shared,
    node: NodeId,
    address: SocketAddr,
    other: SocketAddr,
) {
    tracing::warn!(%node, %address, %other, "second session of one identity refused");
    let problem = NodeProblem::Cloned { connected: other.ip(), tried: address.ip() };
    let change = move |ledger: &mut Ledger, _: &Sessions, _| ledger.registry().note(node, problem);
    // If this fails, only the note is missing; the second session is refused in any case.
    let _ = shared.apply(change).await;
}
