//! The local socket: what the command line asks, the daemon answers.
//!
//! gRPC over a Unix socket of mode 0600; besides, each connection's credentials are looked at:
//! only root and the user that the agent runs as are heard. The server holds no state; each call
//! becomes a [`Request`] to the daemon's task, which owns everything.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use futures_util::Stream;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Response, Status};
use towline_proto::limits;
use towline_proto::pb;
use towline_proto::pb::local_server::{Local, LocalServer};

/// What the daemon is asked. Each carries the way back.
#[derive(Debug)]
pub enum Request {
    /// `towline status`.
    Status(oneshot::Sender<pb::StatusResponse>),
    /// `towline peers`.
    Peers(oneshot::Sender<pb::PeersResponse>),
    /// One probe of `towline ping`.
    Ping {
        /// The node's name, or one of its overlay addresses.
        node: String,
        /// How long to wait for the answer.
        timeout: Duration,
        /// Its end.
        reply: oneshot::Sender<PingAnswer>,
    },
    /// `towline leave`.
    Leave(oneshot::Sender<Result<(), String>>),
    /// `towline down`.
    Down(oneshot::Sender<Result<(), String>>),
}

/// How one probe ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PingAnswer {
    /// Answered.
    Answer {
        /// "direct" or "relay".
        path_kind: &'static str,
        /// From where.
        path: SocketAddr,
        /// After how long.
        rtt: Duration,
    },
    /// Not answered in time, or never sent, for this reason.
    Silence(String),
    /// There is no such node.
    UnknownNode,
}

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another agent answers on it.
    #[error(
        "another agent is serving {path}: stop it first, or give this one a `socket` of its own"
    )]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Binds the socket, replacing one that an agent left behind when it died.
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Io { path: path.into(), source };
    if let Some(parent) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(failed)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ListenError::InUse { path: path.into() });
    }
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // Between bind and chmod nobody but the owner gets in either: credentials are checked below.
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Serves until the task is dropped.
pub async fn serve(listener: UnixListener, daemon: mpsc::Sender<Request>) {
    let incoming = UnixListenerStream::new(listener).filter(|connection| match connection {
        Ok(stream) => allowed(stream),
        Err(_) => true,
    });
    let service =
        LocalServer::new(Service { daemon }).max_decoding_message_size(limits::MESSAGE_BYTES);
    let served = tonic::transport::Server::builder()
        .concurrency_limit_per_connection(8)
        .add_service(service)
        .serve_with_incoming(incoming)
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "local socket is not served any more");
    }
}

fn allowed(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == own => true,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "local connection refused");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "local connection without credentials refused");
            false
        }
    }
}

struct Service {
    daemon: mpsc::Sender<Request>,
}

impl Service {
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

/// Sends the probes of one `towline ping`, one after another, until the reader goes away.
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
            rtt_us: Some(u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
            path_kind: path_kind.into(),
            path: path.to_string(),
            reason: String::new(),
        }),
        PingAnswer::Silence(reason) => {
            Ok(pb::PingResponse { sequence, reason, ..Default::default() })
        }
        PingAnswer::UnknownNode => Err(Status::not_found(format!(
            "this node knows no `{node}`: `towline peers` lists those it knows"
        ))),
    }
}

type PingStream = Pin<Box<dyn Stream<Item = Result<pb::PingResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Local for Service {
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
        _: tonic::Request<pb::LocalLeaveRequest>,
    ) -> Result<Response<pb::LocalLeaveResponse>, Status> {
        self.ask(Request::Leave).await?.map_err(Status::failed_precondition)?;
        Ok(Response::new(pb::LocalLeaveResponse {}))
    }

    async fn down(
        &self,
        _: tonic::Request<pb::DownRequest>,
    ) -> Result<Response<pb::DownResponse>, Status> {
        self.ask(Request::Down).await?.map_err(Status::failed_precondition)?;
        Ok(Response::new(pb::DownResponse {}))
    }
}
