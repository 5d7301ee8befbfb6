//! Local API for the command line: a gRPC server on a Unix socket.
//!
//! The socket has mode 0600. In addition the server checks the credentials of each connection: only
//! root and the agent's user may connect. The server holds no state. Each call becomes a
//! [`Request`] to the daemon's task, which owns all state.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use futures_util::Stream;
use ipnet::IpNet;
use tokio::net::UnixListener;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Response, Status};
use towline_core::path::Path as NetworkPath;
use towline_core::reason::PeerReason;
use towline_proto::code::Coded as _;
use towline_proto::pb::local_server::{Local, LocalServer};
use towline_proto::{codes, limits, pb};
use towline_service::local_socket;

use crate::down::{Down, Lasts};
use crate::events::{self, EventId};
use crate::timing::micros;
use crate::uapi;

/// Maximum time to write the pending responses when the daemon ends.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Request to the daemon. Each contains the channel for its reply.
#[derive(Debug)]
pub enum Request {
    /// Request of `towline status`.
    Status(oneshot::Sender<pb::StatusResponse>),
    /// Request of `towline peers`.
    Peers(oneshot::Sender<pb::PeersResponse>),
    /// Request of `towline peer`.
    Peer {
        /// The node's name, or one of its overlay addresses.
        node: String,
        /// Receives what is known of the peer, or why nothing is.
        reply: oneshot::Sender<Result<pb::PeerResponse, String>>,
    },
    /// Request of `towline events`.
    Events {
        /// Only events after this one.
        after: Option<EventId>,
        /// Receives the events that are kept, and a channel of those to come.
        reply: oneshot::Sender<(Vec<pb::Event>, broadcast::Receiver<pb::Event>)>,
    },
    /// Status and peers for the metrics, as of the last search of the host: a scrape must not begin one.
    Metrics(oneshot::Sender<(pb::StatusResponse, pb::PeersResponse)>),
    /// State of the tunnels for `wg show`.
    Device(oneshot::Sender<uapi::Device>),
    /// One probe of `towline ping`.
    Ping {
        /// The node's name, or one of its overlay addresses.
        node: String,
        /// Maximum time to wait for the answer.
        timeout: Duration,
        /// Receives the result of the probe.
        reply: oneshot::Sender<PingAnswer>,
    },
    /// Request of `towline leave`.
    Leave {
        /// Remove the membership even if no controller can be informed.
        force: bool,
        /// Receives the result of leaving.
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// Request of `towline down`.
    Down(oneshot::Sender<Result<DownAnswer, String>>),
    /// Request of `towline up`. The reply is true if the machine was up before.
    Up(oneshot::Sender<Result<bool, String>>),
    /// Request of `towline guard list`.
    Guards(oneshot::Sender<pb::GuardsResponse>),
    /// Request of `towline guard release`.
    ReleaseGuard {
        /// Network that nobody holds.
        network: IpNet,
        /// Receives the result, or why the network stays guarded.
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// Request of `towline confirm`. The reply is true if the join was still to be confirmed.
    Confirm(oneshot::Sender<Result<bool, String>>),
}

/// Handle for other servers of the agent, which ask the daemon through the same queue. It does not keep the
/// queue open.
#[derive(Debug, Clone)]
pub struct Requests(mpsc::WeakSender<Request>);

impl Requests {
    /// Creates a handle to the queue.
    pub(crate) fn of(queue: &mpsc::Sender<Request>) -> Self {
        Self(queue.downgrade())
    }

    /// Sends a request and waits for the reply. Returns `None` if the agent is stopping.
    pub async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.0.upgrade()?.send(request(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// Result of `towline down`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownAnswer {
    /// True if the machine was down before.
    pub already: bool,
    /// Why the machine does not stay down until `towline up`. `None` if it does.
    pub warning: Option<String>,
}

impl DownAnswer {
    /// Creates the answer from the result of writing the marker.
    pub fn new(already: bool, marker: io::Result<Lasts>) -> Self {
        let warning = match marker {
            Ok(Lasts::UntilUp) => None,
            Ok(Lasts::UntilReboot(why)) => {
                Some(format!("this machine is down only until the next reboot: {why}"))
            }
            Err(error) => {
                Some(format!("this machine is down only until the agent starts again: {error}"))
            }
        };
        Self { already, warning }
    }
}

/// Result of one probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PingAnswer {
    /// The peer answered the probe.
    Answer {
        /// Kind of the path.
        path_kind: PathKind,
        /// Remote address of the path.
        path: SocketAddr,
        /// Round-trip time.
        rtt: Duration,
    },
    /// No answer arrived in time, or nothing was sent, for this reason.
    Silence(NoPong),
    /// No node has this name or address.
    UnknownNode,
}

/// Kind of a path, for the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathKind {
    /// The path leads to the peer itself.
    Direct,
    /// The path leads through a relay.
    Relay,
    /// The path leads to the endpoint of a static peer.
    Static,
}

codes! {
    PathKind {
        Direct => "direct",
        Relay => "relay",
        Static => "static",
    }
}

impl PathKind {
    /// Returns the kind of a path to a node.
    pub(crate) fn of(path: &NetworkPath) -> Self {
        if path.is_relayed() { Self::Relay } else { Self::Direct }
    }
}

/// Reason why a probe of `towline ping` was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPong {
    /// No answer came in time.
    #[error("no answer in time")]
    Timeout,
    /// There is no path to the peer, for this reason.
    #[error("{0}")]
    NoPath(PeerReason),
    /// There is no path to the peer.
    #[error("no path yet")]
    NoPathYet,
    /// Static peers know no probes.
    #[error("static peers do not answer probes: run `towline peers`")]
    StaticPeer,
    /// The machine is down.
    #[error("{0}")]
    Down(Down),
}

codes! {
    NoPong {
        Timeout => "ping-timeout",
        NoPath(PeerReason),
        NoPathYet => "no-path",
        StaticPeer => "static-peer-not-probed",
        Down(Down),
    }
}

/// Error of binding the socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another agent serves the socket.
    #[error(
        "cannot listen on {path}: another agent serves it: stop that agent, or set another `socket`"
    )]
    InUse {
        /// Path of the socket.
        path: PathBuf,
    },
    /// The path is that of another file.
    #[error("cannot listen on {path}: it is not a socket: set another `socket`")]
    NotASocket {
        /// Path of the file.
        path: PathBuf,
    },
    /// The operating system refused an operation.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
}

/// Binds the socket. Replaces a socket that a crashed agent left behind.
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Io { path: path.into(), source };
    if let Some(parent) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(failed)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ListenError::InUse { path: path.into() });
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            std::fs::remove_file(path).map_err(failed)?;
        }
        // The configuration may name any file by mistake.
        Ok(_) => return Err(ListenError::NotASocket { path: path.into() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // The socket is open to others until the mode is set; the check of credentials covers that
    // moment.
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Running server of the local API, and the queue of its requests.
#[derive(Debug)]
pub struct ControlServer {
    requests: mpsc::Receiver<Request>,
    handle: Requests,
    stop: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

impl ControlServer {
    /// Binds the socket and starts a task that serves it.
    pub fn start(path: &Path) -> Result<Self, ListenError> {
        let listener = listen(path)?;
        let (daemon, requests) = mpsc::channel(16);
        let handle = Requests::of(&daemon);
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(serve(listener, daemon, async {
            // The sender was used or dropped.
            let _ = stopped.await;
        }));
        Ok(Self { requests, handle, stop, served })
    }

    /// Returns a handle for another server that asks the daemon.
    pub fn requests(&self) -> Requests {
        self.handle.clone()
    }

    /// Waits for the next request. No request is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Request> {
        self.requests.recv().await
    }

    /// Stops the server. Requests in the queue fail with `UNAVAILABLE`. All responses are written
    /// before the connections are closed, within a time limit.
    pub async fn stop(self) {
        let Self { requests, stop, mut served, .. } = self;
        drop(requests);
        let _ = stop.send(());
        if tokio::time::timeout(STOP_LIMIT, &mut served).await.is_err() {
            tracing::warn!("local connections closed with unread responses");
            served.abort();
        }
    }
}

/// Serves the socket until `stopped`, then writes the pending responses.
async fn serve(
    listener: UnixListener,
    daemon: mpsc::Sender<Request>,
    stopped: impl Future<Output = ()>,
) {
    let incoming = UnixListenerStream::new(listener).filter(|connection| match connection {
        Ok(stream) => local_socket::is_allowed(stream),
        Err(_) => true,
    });
    let service =
        LocalServer::new(Service { daemon }).max_decoding_message_size(limits::MESSAGE_BYTES);
    let served = tonic::transport::Server::builder()
        .concurrency_limit_per_connection(8)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stopped)
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "local API server failed: restart the agent");
    }
}

/// Implementation of the gRPC service, which forwards each call to the daemon.
struct Service {
    daemon: mpsc::Sender<Request>,
}

impl Service {
    /// Sends a request to the daemon and waits for the reply.
    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, Status> {
        let stopping = || Status::unavailable("the agent is stopping");
        let (reply, answer) = oneshot::channel();
        self.daemon.send(request(reply)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())
    }
}

/// Sends the probes of one `towline ping` in sequence, until the client disconnects.
async fn ping(
    daemon: mpsc::Sender<Request>,
    request: pb::PingRequest,
    answers: mpsc::Sender<Result<pb::PingResponse, Status>>,
) {
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    let interval = Duration::from_millis(or(request.interval_ms, 1000).clamp(10, 60_000).into());
    let timeout = Duration::from_millis(or(request.timeout_ms, 2000).clamp(10, 60_000).into());
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for sequence in 1..=or(request.count, 5).min(1000) {
        ticks.tick().await;
        let (reply, answer) = oneshot::channel();
        let asked = Request::Ping { node: request.node.clone(), timeout, reply };
        if daemon.send(asked).await.is_err() {
            return;
        }
        let Ok(answer) = answer.await else { return };
        let unknown = answer == PingAnswer::UnknownNode;
        if answers.send(response(&request.node, sequence, answer)).await.is_err() || unknown {
            return;
        }
    }
}

fn response(node: &str, sequence: u32, answer: PingAnswer) -> Result<pb::PingResponse, Status> {
    match answer {
        PingAnswer::Answer { path_kind, path, rtt } => Ok(pb::PingResponse {
            sequence,
            rtt_us: Some(micros(rtt)),
            path_kind: path_kind.code().into(),
            path: path.to_string(),
            ..Default::default()
        }),
        PingAnswer::Silence(reason) => Ok(pb::PingResponse {
            sequence,
            reason: reason.to_string(),
            reason_code: reason.code().into(),
            ..Default::default()
        }),
        PingAnswer::UnknownNode => Err(Status::not_found(unknown_node(node))),
    }
}

/// Returns the message for a name that no node has.
pub(crate) fn unknown_node(node: &str) -> String {
    format!("no node is named `{node}`: run `towline peers` for a list")
}

/// Returns the answer to a request to release a guard.
pub(crate) fn released(network: IpNet, is_released: bool) -> Result<(), String> {
    let refused = || {
        format!(
            "{network} is not released: it is held, in a range of the mesh, or not guarded: run `towline \
             guard list`"
        )
    };
    is_released.then_some(()).ok_or_else(refused)
}

/// Sends the events that are kept, and those to come if `follow`, until the client disconnects.
async fn send_events(
    (kept, mut coming): (Vec<pb::Event>, broadcast::Receiver<pb::Event>),
    oldest_ms: i64,
    follow: bool,
    sink: mpsc::Sender<Result<pb::Event, Status>>,
) {
    for event in kept.into_iter().filter(|event| event.at >= oldest_ms) {
        if sink.send(Ok(event)).await.is_err() {
            return;
        }
    }
    if !follow {
        return;
    }
    loop {
        let event = tokio::select! {
            event = coming.recv() => event,
            () = sink.closed() => return,
        };
        let sent = match event {
            Ok(event) => sink.send(Ok(event)).await,
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                let text =
                    format!("{missed} events were missed: read faster, or resume by --after");
                sink.send(Err(Status::data_loss(text))).await
            }
            Err(broadcast::error::RecvError::Closed) => {
                sink.send(Err(Status::unavailable("the agent is stopping"))).await
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

type EventStream = Pin<Box<dyn Stream<Item = Result<pb::Event, Status>> + Send>>;
type PingStream = Pin<Box<dyn Stream<Item = Result<pb::PingResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Local for Service {
    type EventsStream = EventStream;
    type PingStream = PingStream;

    async fn status(
        &self,
        _: tonic::Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        self.ask(Request::Status).await.map(Response::new)
    }

    async fn peers(
        &self,
        _: tonic::Request<pb::PeersRequest>,
    ) -> Result<Response<pb::PeersResponse>, Status> {
        self.ask(Request::Peers).await.map(Response::new)
    }

    async fn peer(
        &self,
        request: tonic::Request<pb::PeerRequest>,
    ) -> Result<Response<pb::PeerResponse>, Status> {
        let node = request.into_inner().node;
        let answer = self.ask(|reply| Request::Peer { node, reply }).await?;
        answer.map(Response::new).map_err(Status::not_found)
    }

    async fn events(
        &self,
        request: tonic::Request<pb::EventsRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let pb::EventsRequest { after, since_ms, follow } = request.into_inner();
        let after = match after.as_str() {
            "" => None,
            id => {
                let id = id.parse::<EventId>();
                Some(id.map_err(|error| Status::invalid_argument(error.to_string()))?)
            }
        };
        let oldest_ms = match since_ms {
            0 => i64::MIN,
            age => events::unix_millis(SystemTime::now()).saturating_sub_unsigned(age),
        };
        let events = self.ask(|reply| Request::Events { after, reply }).await?;
        let (sink, stream) = mpsc::channel(16);
        tokio::spawn(send_events(events, oldest_ms, follow, sink));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn ping(
        &self,
        request: tonic::Request<pb::PingRequest>,
    ) -> Result<Response<PingStream>, Status> {
        let (answers, stream) = mpsc::channel(16);
        tokio::spawn(ping(self.daemon.clone(), request.into_inner(), answers));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn leave(
        &self,
        request: tonic::Request<pb::LocalLeaveRequest>,
    ) -> Result<Response<pb::LocalLeaveResponse>, Status> {
        let force = request.into_inner().force;
        let left = self.ask(|reply| Request::Leave { force, reply }).await?;
        left.map_err(Status::failed_precondition)?;
        Ok(Response::new(pb::LocalLeaveResponse {}))
    }

    async fn down(
        &self,
        _: tonic::Request<pb::DownRequest>,
    ) -> Result<Response<pb::DownResponse>, Status> {
        let answer = self.ask(Request::Down).await?.map_err(Status::failed_precondition)?;
        let DownAnswer { already, warning } = answer;
        Ok(Response::new(pb::DownResponse { already, warning: warning.unwrap_or_default() }))
    }

    async fn up(
        &self,
        _: tonic::Request<pb::UpRequest>,
    ) -> Result<Response<pb::UpResponse>, Status> {
        let already = self.ask(Request::Up).await?.map_err(Status::failed_precondition)?;
        Ok(Response::new(pb::UpResponse { already }))
    }

    async fn guards(
        &self,
        _: tonic::Request<pb::GuardsRequest>,
    ) -> Result<Response<pb::GuardsResponse>, Status> {
        self.ask(Request::Guards).await.map(Response::new)
    }

    async fn release_guard(
        &self,
        request: tonic::Request<pb::ReleaseGuardRequest>,
    ) -> Result<Response<pb::ReleaseGuardResponse>, Status> {
        let text = request.into_inner().network;
        let network = text.parse::<IpNet>().map_err(|_| {
            Status::invalid_argument(format!("`{text}` is not a network: use ADDRESS/LENGTH"))
        })?;
        let released = self.ask(|reply| Request::ReleaseGuard { network, reply }).await?;
        released.map_err(Status::failed_precondition)?;
        Ok(Response::new(pb::ReleaseGuardResponse {}))
    }

    async fn confirm(
        &self,
        _: tonic::Request<pb::ConfirmRequest>,
    ) -> Result<Response<pb::ConfirmResponse>, Status> {
        let was_due = self.ask(Request::Confirm).await?.map_err(Status::failed_precondition)?;
        Ok(Response::new(pb::ConfirmResponse { was_due }))
    }
}

#[cfg(test)]
mod tests {
    use tonic::transport::{Channel, Endpoint};
    use towline_proto::pb::local_client::LocalClient;
    use towline_service::grpc;

    use tokio::net::UnixStream;

    use super::*;

    async fn client(path: &Path) -> LocalClient<Channel> {
        let stream = UnixStream::connect(path).await.unwrap();
        let endpoint = Endpoint::from_static("http://agent");
        LocalClient::new(grpc::channel(endpoint, stream).await.unwrap())
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        std::fs::write(&path, "kept").unwrap();
        let error = listen(&path).unwrap_err();
        assert!(matches!(error, ListenError::NotASocket { .. }), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
        // A socket that a crashed agent left behind is replaced.
        let path = directory.path().join("agent.sock");
        drop(listen(&path).unwrap());
        listen(&path).unwrap();
    }

    /// Responses to requests that end the daemon must be written before it ends.
    #[tokio::test]
    async fn an_answer_is_delivered_though_the_daemon_ends_with_it() {
        let directory = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let path = directory.path().join(format!("{round}.sock"));
            let mut control = ControlServer::start(&path).unwrap();
            let daemon = tokio::spawn(async move {
                match control.next().await.unwrap() {
                    Request::Down(reply) => {
                        let answer = DownAnswer::new(false, Ok(Lasts::UntilUp));
                        reply.send(Ok(answer)).unwrap();
                    }
                    Request::Leave { force, reply } => {
                        assert!(force);
                        reply.send(Ok(())).unwrap();
                    }
                    other => panic!("{other:?}"),
                }
                control.stop().await;
            });
            let mut client = client(&path).await;
            if round % 2 == 0 {
                let answer = client.down(pb::DownRequest {}).await.unwrap().into_inner();
                assert_eq!(answer, pb::DownResponse::default());
            } else {
                client.leave(pb::LocalLeaveRequest { force: true }).await.unwrap();
            }
            daemon.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_request_that_was_not_taken_is_told_that_the_agent_stops() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let mut control = ControlServer::start(&path).unwrap();
        let (mut first, mut second) = (client(&path).await, client(&path).await);
        let daemon = tokio::spawn(async move {
            let Some(Request::Down(reply)) = control.next().await else { panic!("down") };
            // The other request is in flight or in the queue; in both cases the daemon does not
            // receive it.
            reply.send(Err("the host is busy".into())).unwrap();
            control.stop().await;
        });
        let (one, other) =
            tokio::join!(first.down(pb::DownRequest {}), second.down(pb::DownRequest {}));
        daemon.await.unwrap();
        let errors = [one.unwrap_err(), other.unwrap_err()];
        assert!(errors.iter().any(|error| error.message() == "the host is busy"), "{errors:?}");
        assert!(errors.iter().any(|error| error.code() == tonic::Code::Unavailable), "{errors:?}");
    }
}
