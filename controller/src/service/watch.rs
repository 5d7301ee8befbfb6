//! Task of a watch: it sends the changes after its cursor, receives heartbeats, and ends the
//! session when it ends.
//!
//! At most one message waits for the client. While it waits, changes only raise the revision of
//! the map. The next message has the newest state of everything that changed in the meantime.

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, Sleep, interval, sleep, timeout};
use tonic::{Status, Streaming};
use towline_proto::code::Coded as _;
use towline_proto::convert;
use towline_proto::id::NodeId;
use towline_proto::summary::MeshSummary;
use towline_proto::{limits, pb, signed};

use crate::clock;
use crate::counters::Limit;
use crate::entropy;
use crate::events::MeshEvent;
use crate::ledger::Ledger;
use crate::map::Map;
use towline_registry::sessions::{SessionId, Sessions};
use towline_registry::{NodeProblem, Now};

use super::Shared;
use super::admission::{Place, drain_begins};
use super::auth::{CallingNode, expired};
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

/// Time after which a node that loads the whole map gives its place to another one, though it has not read all.
const LOADING: Duration = Duration::from_secs(60);

/// A running watch.
pub(super) struct Watcher {
    shared: Arc<Shared>,
    node: CallingNode,
    session: SessionId,
    /// Epoch of the map in which the watch was opened. The watch ends when the map has another one.
    epoch: u64,
    /// Revision up to which everything was sent.
    cursor: u64,
    /// True once everything that existed at the start of the watch was sent.
    synced: bool,
    /// Copy of the cursor for the metrics.
    sent: Arc<AtomicU64>,
    /// Place among the nodes that load the whole map, until this one has loaded it.
    loading: Option<Place>,
    responses: mpsc::Sender<Result<pb::WatchResponse, Status>>,
}

/// Position in the map up to which a client has everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cursor {
    /// Epoch of the map in which [`Self::revision`] is valid.
    pub(super) epoch: u64,
    /// Revision; 0 if the client has nothing of this epoch.
    pub(super) revision: u64,
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
    /// Creates a watch that sends the changes after `cursor`. `loading` is its place if it loads the whole map.
    pub(super) fn new(
        shared: Arc<Shared>,
        node: CallingNode,
        session: SessionId,
        cursor: Cursor,
        loading: Option<Place>,
        responses: mpsc::Sender<Result<pb::WatchResponse, Status>>,
    ) -> Self {
        let Cursor { epoch, revision } = cursor;
        let sent = shared.counters.cursor(revision);
        Self {
            shared,
            node,
            session,
            epoch,
            cursor: revision,
            synced: false,
            sent,
            loading,
            responses,
        }
    }

    /// Returns the position in the map's present epoch after which a client that has the map at this epoch and
    /// revision gets changes. If the epoch differs or the revision is ahead of the map (a first watch, or a
    /// controller restored from a backup), the revision is 0: the client gets the whole map.
    pub(super) fn cursor(map: &Map, (epoch, revision): (u64, u64)) -> Cursor {
        let (current, newest) = map.position();
        let is_known = epoch == current && revision <= newest;
        Cursor { epoch: current, revision: if is_known { revision } else { 0 } }
    }

    /// Runs until either side ends the watch.
    pub(super) async fn run(mut self, mut requests: Streaming<pb::WatchRequest>) {
        let mut signals = self.shared.signals.open(self.node.id, self.session);
        let end = self.follow(&mut requests, &mut signals).await;
        self.shared.signals.close(self.node.id, self.session);
        let reason = end.as_ref().map_or("closed by the client", Status::message);
        let disconnected =
            MeshEvent::NodeDisconnected { node: self.node.name.clone(), reason: reason.to_owned() };
        tracing::info!(event = disconnected.code(), node = %self.node.name, reason, "session ended");
        if let Some(status) = end {
            // The client may be gone or may not read; the send must not wait for it.
            let _ = self.responses.try_send(Err(status));
        }
        let is_gone = self.shared.sessions.lock().close(self.node.id, self.session, clock::now());
        // If a newer session replaced this one, the node is still connected.
        if is_gone {
            self.shared.events.add(&disconnected);
        }
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
        let mut loading = pin!(sleep(LOADING));
        let mut cut_off = self.shared.cut_off.clone();
        // Set while the controller is cut off from the others, and this watch is to end for that reason.
        let mut leaving: Option<Pin<Box<Sleep>>> = None;
        // Set once the controller stops, until this watch ends. Watches end one after the other.
        let mut last: Option<Pin<Box<Sleep>>> = None;
        let mut due = Due::Ready;
        // Set after a message of changes to a watcher that has the whole map, until its pause is over.
        let mut pause: Option<Pin<Box<Sleep>>> = None;
        // After `Ready`, a signal is sent before any other message that is due: it is short and urgent.
        let mut signal = None;
        loop {
            let responses = self.responses.clone();
            let is_paused = due == Due::Changes && pause.is_some();
            tokio::select! {
                over = drain_begins(&mut stopping), if last.is_none() => {
                    last = Some(Box::pin(sleep(over.mul_f64(entropy::fraction()))));
                }
                () = async { if let Some(last) = &mut last { last.await } }, if last.is_some() => {
                    self.shared.counters.limit(Limit::Stopping);
                    return Some(Status::unavailable("the controller is stopping: try again"));
                }
                over = cut_off_begins(&mut cut_off), if leaving.is_none() => {
                    leaving = Some(Box::pin(sleep(over.mul_f64(entropy::fraction()))));
                }
                () = async { if let Some(leaving) = &mut leaving { leaving.await } },
                    if leaving.is_some() =>
                {
                    leaving = None;
                    if cut_off.borrow().is_some() {
                        return Some(super::cut_off());
                    }
                }
                // A client that reads slowly must not keep others from loading the map.
                () = &mut loading, if self.loading.is_some() => self.loading = None,
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        silence.as_mut().reset(Instant::now() + deadline);
                        if !self.renew_session() {
                            return Some(replaced());
                        }
                        match request.kind {
                            Some(pb::watch_request::Kind::Signal(signal)) => self.carry(signal),
                            Some(pb::watch_request::Kind::Summary(summary)) => self.keep(summary),
                            // A heartbeat, a second start, or a message of a newer agent.
                            _ => {}
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
                    // A heartbeat says nothing of changes, so it must not hide that there are some.
                    if due != Due::Heartbeat {
                        latest.mark_unchanged();
                        // The node's own removal or a new epoch may be among what is marked as seen.
                        if let Some(status) = self.end_status() {
                            return Some(status);
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
                    if let Some(status) = self.end_status() {
                        return Some(status);
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
                    if let Some(status) = self.end_status() {
                        return Some(status);
                    }
                    // An agent opens the watch again with the certificate that it renewed in time.
                    if self.node.is_expired(clock::now().unix) {
                        return Some(expired());
                    }
                    if due == Due::Nothing {
                        due = Due::Heartbeat;
                    }
                }
            }
        }
    }

    /// Returns the status to end the watch with, if the node was removed or a new epoch of the map began.
    /// Revisions of one epoch mean nothing in another one, so the client has to load the whole map again.
    fn end_status(&self) -> Option<Status> {
        let map = &self.shared.map;
        let removed = map.absence(self.node.id).map(|error| absent(&error, map));
        removed.or_else(|| (map.epoch() != self.epoch).then(new_epoch))
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
                let was_synced = self.synced;
                self.synced |= all;
                changes.synced = self.synced;
                self.sent.store(self.cursor, Ordering::Relaxed);
                if was_synced && !changes.changes.is_empty() {
                    let published = map.published_at();
                    let time = published.map(|at| clock::now().since(at)).unwrap_or_default();
                    self.shared.counters.fan_out(time);
                }
                if self.synced {
                    self.loading = None;
                }
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
            epoch: self.epoch,
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
        if !may {
            self.shared.counters.limit(Limit::Signal);
        }
        let carried = may && self.shared.signals.carry(self.node.id, signal);
        if !carried {
            tracing::debug!(node = %self.node.name, limited = !may, "signal dropped");
        }
    }

    /// Keeps a summary for operators. A malformed one, and one too many, is dropped.
    fn keep(&self, summary: pb::MeshSummary) {
        let now = clock::now();
        if self.shared.budgets.spend(self.node.id, Work::Summary, now.mono).is_err() {
            self.shared.counters.limit(Limit::Summary);
            tracing::debug!(node = %self.node.name, "summary dropped: budget used up");
            return;
        }
        match MeshSummary::try_from(summary) {
            Ok(summary) => self.shared.summaries.report(self.node.id, summary, now),
            Err(error) => tracing::debug!(node = %self.node.name, %error, "summary dropped"),
        }
    }

    fn renew_session(&self) -> bool {
        self.shared.sessions.lock().renew(self.node.id, self.session, clock::now())
    }
}

/// Waits until the controller is cut off, and returns the time over which watches end then.
async fn cut_off_begins(cut_off: &mut tokio::sync::watch::Receiver<Option<Duration>>) -> Duration {
    let over = cut_off.wait_for(Option::is_some).await.ok().and_then(|over| *over);
    match over {
        Some(over) => over,
        // It is the only one.
        None => std::future::pending().await,
    }
}

/// Returns the status of a watch that the same node opened again.
fn replaced() -> Status {
    Status::aborted("the session was replaced by a newer one")
}

/// Returns the status of a watch that was opened in an earlier epoch of the map.
fn new_epoch() -> Status {
    Status::aborted("a new epoch of the map began: open the watch again")
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
    let is_later = || head.position() > shared.map.position();
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

/// Adds the tombstones of a client that this controller does not have, and takes over the client's configuration
/// of the mesh if it is newer, after it verified them.
pub(super) async fn resync(
    shared: &Shared,
    tombstones: Vec<pb::Signed>,
    mesh: Option<pb::Signed>,
) -> Result<(), Status> {
    convert::bounded("list of tombstones", tombstones.len(), limits::TOMBSTONES)
        .map_err(|error| error.status())?;
    let key = shared.authority.public_key();
    let untrusted = |error: signed::Untrusted| Status::invalid_argument(error.to_string());
    let mut unknown = Vec::new();
    for (i, tombstone) in tombstones.into_iter().enumerate() {
        if names_removed_node(shared, &tombstone) {
            continue;
        }
        unknown.push(signed::tombstone(Some(&tombstone), key).map_err(untrusted)?);
        if i % VERIFIED_AT_ONCE == 0 {
            tokio::task::yield_now().await;
        }
    }
    let ours = shared.map.mesh();
    let mesh = match mesh {
        Some(mesh) if mesh != ours => {
            let theirs = signed::mesh(Some(&mesh), key).map_err(untrusted)?;
            let ours = signed::mesh(Some(&ours), key).map_err(untrusted)?;
            theirs.is_ahead_of(&ours).then_some(theirs)
        }
        _ => None,
    };
    if unknown.is_empty() && mesh.is_none() {
        return Ok(());
    }
    let change = move |ledger: &mut Ledger, sessions: &Sessions, now| {
        if let Some(mesh) = mesh {
            ledger.registry().adopt_mesh(mesh);
        }
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

/// Logs a cloned machine and adds it to the node's problems. Returns the code of that problem.
pub(super) async fn note_clone(
    shared: &Shared,
    node: NodeId,
    address: SocketAddr,
    other: SocketAddr,
) -> &'static str {
    tracing::warn!(%node, %address, %other, "second session of one identity refused");
    let problem = NodeProblem::Cloned { connected: other.ip(), tried: address.ip() };
    let code = problem.code();
    let change = move |ledger: &mut Ledger, _: &Sessions, _| ledger.registry().note(node, problem);
    // If this fails, only the note is missing; the second session is refused in any case.
    let _ = shared.apply(change).await;
    code
}

#[cfg(test)]
pub(super) mod tests {
    use std::convert::Infallible;

    use bytes::{BufMut as _, Bytes, BytesMut};
    use http_body::Frame;
    use http_body_util::StreamBody;
    use parking_lot::Mutex;
    use prost::Message as _;
    use tokio::sync::watch;
    use tokio_stream::wrappers::ReceiverStream;
    use tonic::Code;
    use tonic::codec::Codec as _;
    use towline_proto::id::{IdentityKey, NodeName};
    use towline_proto::source_limiter::SourceLimiter;
    use towline_registry::sessions::Session;
    use x25519_dalek::{PublicKey, StaticSecret};

    use super::*;
    use crate::authority::Authority;
    use crate::config::HEARTBEAT;
    use crate::events::Events;
    use crate::map::MapChange;
    use crate::service::{Admission, Budgets, FAILED_JOINS, SentAway, Signals};
    use crate::state_dir::StateDir;
    use crate::writer::Writer;

    /// Id of the only node.
    pub(crate) const NODE: NodeId = NodeId([1; 16]);
    const SESSION: SessionId = [2; 16];

    /// A watch of a mesh with one node, and both ends of it.
    struct Scene {
        /// Messages of the client. Dropping it ends the client's stream.
        client: mpsc::Sender<Result<Frame<Bytes>, Infallible>>,
        responses: mpsc::Receiver<Result<pb::WatchResponse, Status>>,
        map: Arc<Map>,
        stop: watch::Sender<Option<Duration>>,
        isolate: watch::Sender<Option<Duration>>,
        opened: Instant,
    }

    /// Sender of the time over which watches end.
    type Ends = watch::Sender<Option<Duration>>;

    /// Returns the state of a controller whose mesh has the node `a` with this identity, and what ends its watches: the
    /// stop of the controller, and that it is cut off.
    pub(crate) fn shared(identity: IdentityKey) -> (Shared, Ends, Ends) {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path());
        let authority = Authority::load_or_create(&dir, true, 1_700_000_000).unwrap();
        let proof_key = StaticSecret::from([1; 32]);
        let (stop, stopping) = watch::channel(None);
        let (isolate, cut_off) = watch::channel(None);
        let shared = Shared {
            authority: Arc::new(authority),
            writer: Writer::ended(),
            map: Arc::new(Map::new()),
            view: Arc::default(),
            sessions: Arc::new(Mutex::new(Sessions::new(HEARTBEAT))),
            failed_joins: Mutex::new(SourceLimiter::new(FAILED_JOINS)),
            proof_public: PublicKey::from(&proof_key),
            proof_key,
            advertise: Vec::new(),
            budgets: Budgets::default(),
            signals: Signals::default(),
            summaries: Arc::default(),
            events: Arc::new(Events::new(1)),
            admin_revoked: Arc::default(),
            head: Mutex::new(None),
            admission: Arc::new(Admission::new()),
            sent_away: SentAway::default(),
            counters: Arc::default(),
            reflector: None,
            stopping,
            cut_off,
        };
        let (name, entry) = ("a".parse().unwrap(), pb::Entry::default());
        let node = MapChange::Node { revision: 1, id: NODE, name, identity, entry };
        shared.map.apply(1, 1, vec![node]);
        (shared, stop, isolate)
    }

    impl Scene {
        fn new() -> Self {
            Self::with_certificate(i64::MAX)
        }

        /// Opens a watch with a certificate that is valid until `expires_at`.
        fn with_certificate(expires_at: i64) -> Self {
            let identity = IdentityKey([3; 32]);
            let (shared, stop, isolate) = shared(identity);
            let name: NodeName = "a".parse().unwrap();
            let now = clock::now();
            let address = SocketAddr::from(([192, 0, 2, 1], 1000));
            let session = Session::new(SESSION, vec![1], address, now);
            shared.sessions.lock().open(NODE, session, now).unwrap();

            let (client, requests) = mpsc::channel(8);
            let body = StreamBody::new(ReceiverStream::new(requests));
            let mut codec =
                tonic_prost::ProstCodec::<pb::WatchResponse, pb::WatchRequest>::default();
            let requests = Streaming::new_request(codec.decoder(), body, None, None);
            let (sender, responses) = mpsc::channel(1);
            let node = CallingNode { id: NODE, name, identity, expires_at };
            let map = shared.map.clone();
            let cursor = Watcher::cursor(&map, (0, 0));
            let watcher = Watcher::new(Arc::new(shared), node, SESSION, cursor, None, sender);
            tokio::spawn(watcher.run(requests));
            Self { client, responses, map, stop, isolate, opened: Instant::now() }
        }

        /// Sends a heartbeat as a client does: the message with the head of gRPC.
        async fn beat(&self) {
            let kind =
                pb::watch_request::Kind::Heartbeat(pb::Heartbeat { revision: 1, head: None });
            let message = pb::WatchRequest { kind: Some(kind) }.encode_to_vec();
            let mut framed = BytesMut::new();
            framed.put_u8(0);
            framed.put_u32(u32::try_from(message.len()).unwrap());
            framed.put_slice(&message);
            self.client.send(Ok(Frame::data(framed.freeze()))).await.unwrap();
        }

        /// Reads until the watch ends. Returns the number of heartbeats, the code, and when it ended, in seconds
        /// after it was opened. There is no code if another message waited for the client at the end.
        async fn end(&mut self) -> (usize, Option<Code>, u64) {
            let mut heartbeats = 0;
            let code = loop {
                match self.responses.recv().await {
                    Some(Ok(response)) => {
                        let kind = response.kind.unwrap();
                        heartbeats +=
                            usize::from(matches!(kind, pb::watch_response::Kind::Heartbeat(_)));
                    }
                    Some(Err(status)) => break Some(status.code()),
                    None => break None,
                }
            };
            (heartbeats, code, self.opened.elapsed().as_secs())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_nothing_is_noticed_after_45_s_and_hears_the_controller_until_then()
    {
        let mut scene = Scene::new();
        let (heartbeats, code, seconds) = scene.end().await;
        assert!(code.is_none_or(|code| code == Code::DeadlineExceeded), "{code:?}");
        assert_eq!(seconds, 45);
        assert!((2..=3).contains(&heartbeats), "one in 15 s: {heartbeats}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_ends_with_the_certificate_that_opened_it() {
        let mut scene = Scene::with_certificate(clock::now().unix - 1);
        let (_, code, seconds) = scene.end().await;
        assert!(code.is_none_or(|code| code == Code::Unauthenticated), "{code:?}");
        assert_eq!(seconds, HEARTBEAT.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn each_heartbeat_of_the_client_starts_the_time_again() {
        let mut scene = Scene::new();
        for _ in 0..4 {
            sleep(HEARTBEAT).await;
            scene.beat().await;
            // The messages of the controller are read, as an agent does.
            while scene.responses.try_recv().is_ok() {}
        }
        let (_, code, seconds) = scene.end().await;
        assert!(code.is_none_or(|code| code == Code::DeadlineExceeded), "{code:?}");
        assert_eq!(seconds, 60 + 45);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_nothing_is_noticed_too() {
        let scene = Scene::new();
        let gone = scene.client.clone();
        let Scene { responses, .. } = scene;
        sleep(HEARTBEAT * 3).await;
        tokio::task::yield_now().await;
        sleep(Duration::from_secs(1)).await;
        assert!(gone.is_closed(), "the watch ended though a message waits for the client");
        drop(responses);
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_ends_while_its_controller_is_cut_off_from_the_others() {
        let mut scene = Scene::new();
        scene.isolate.send(Some(Duration::from_secs(5))).unwrap();
        let (_, code, seconds) = scene.end().await;
        assert!(code.is_none_or(|code| code == Code::Unavailable), "{code:?}");
        assert!(seconds <= 5, "{seconds}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_running_watch_ends_when_a_new_epoch_begins() {
        use pb::watch_response::Kind;
        let mut scene = Scene::new();
        let Some(Ok(ready)) = scene.responses.recv().await else { panic!("no first message") };
        assert!(matches!(ready.kind, Some(Kind::Ready(ready)) if ready.epoch == 1));
        let Some(Ok(changes)) = scene.responses.recv().await else { panic!("no changes") };
        assert!(matches!(changes.kind, Some(Kind::Changes(changes)) if changes.synced));
        scene.map.apply(2, 2, Vec::new());
        let status = scene.responses.recv().await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Aborted, "{status}");
        assert!(status.message().contains("new epoch"), "{status}");
        assert!(scene.responses.recv().await.is_none(), "the watch has ended");
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_is_not_opened_in_another_epoch_than_its_cursor() {
        let mut scene = Scene::new();
        // The watch has its cursor, but has sent nothing yet.
        scene.map.apply(2, 2, Vec::new());
        let status = scene.responses.recv().await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Aborted, "{status}");
    }

    #[test]
    fn a_cursor_is_valid_in_the_epoch_of_the_map_only() {
        let map = Map::new();
        map.apply(2, 7, Vec::new());
        let cursor = |epoch, revision| Watcher::cursor(&map, (epoch, revision));
        assert_eq!(cursor(2, 7), Cursor { epoch: 2, revision: 7 });
        for (epoch, revision) in [(0, 0), (1, 3), (2, 8), (3, 7)] {
            assert_eq!(cursor(epoch, revision), Cursor { epoch: 2, revision: 0 });
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_ends_within_the_time_that_the_stop_leaves() {
        let mut scene = Scene::new();
        scene.stop.send(Some(Duration::from_secs(5))).unwrap();
        let (_, code, seconds) = scene.end().await;
        assert!(code.is_none_or(|code| code == Code::Unavailable), "{code:?}");
        assert!(seconds <= 5, "{seconds}");
    }
}
