//! A controller whose responses a test scripts. It is a real tonic server over TLS, so that the
//! client under test is the one that ships.
//!
//! Each call arrives as a [`Call`] with its reply channel. A call that the test does not answer
//! stays unanswered.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use futures_util::Stream;
use rcgen::{CertificateSigningRequestParams, KeyPair, PKCS_ED25519};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};
use towline_agent::state::{Keys, Membership, StateDir};
use towline_fixtures::ca::Ca;
use towline_fixtures::node::grant;
use towline_proto::node::Grant;
use towline_proto::pb::discovery_server::{Discovery, DiscoveryServer};
use towline_proto::{CONTROLLER_TLS_NAME, pb};
use towline_service::tls;

/// The reply channel of a call.
pub type Reply<T> = oneshot::Sender<Result<T, Status>>;

/// A call that the controller received.
pub enum Call {
    /// A `Hello` call.
    Hello(Reply<pb::HelloResponse>),
    /// A `Join` call.
    Join(pb::JoinRequest, Reply<pb::JoinResponse>),
    /// A `Renew` call.
    Renew(pb::RenewRequest, Reply<pb::RenewResponse>),
    /// A `Readmit` call.
    Readmit(pb::ReadmitRequest, Reply<pb::ReadmitResponse>),
    /// A `Publish` call.
    Publish(pb::PublishRequest, Reply<pb::PublishResponse>),
    /// A `Watch` call, which opens a stream.
    Watch(Box<Watch>),
    /// A `Leave` call.
    Leave(Reply<pb::LeaveResponse>),
}

/// A watch stream that the test holds. Dropping it ends the stream.
pub struct Watch {
    /// First message of the client.
    pub start: pb::WatchStart,
    /// Later messages of the client.
    pub requests: Streaming<pb::WatchRequest>,
    responses: mpsc::Sender<Result<pb::WatchResponse, Status>>,
}

impl Watch {
    /// Sends a message to the client. Returns `false` if the client has disconnected.
    pub async fn send(&self, kind: pb::watch_response::Kind) -> bool {
        self.responses.send(Ok(pb::WatchResponse { kind: Some(kind) })).await.is_ok()
    }

    /// Ends the stream with an error.
    pub async fn fail(self, status: Status) {
        let _ = self.responses.send(Err(status)).await;
    }
}

/// A running scripted controller.
pub struct ScriptedController {
    /// Address on which the controller listens.
    pub address: SocketAddr,
    calls: mpsc::Receiver<Call>,
}

impl ScriptedController {
    /// Starts a controller on the loopback, with a certificate from `ca`.
    pub async fn start(ca: &Ca) -> anyhow::Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let leaf = ca.issue(CONTROLLER_TLS_NAME, &key, Duration::from_secs(86_400));
        let mut config = rustls::ServerConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(tls::VERSIONS)?
            .with_no_client_auth()
            .with_single_cert(
                vec![leaf, ca.certificate()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )?;
        config.alpn_protocols = vec![tls::ALPN.to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (connections, incoming) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                // A failed handshake concerns only that client.
                if let Ok(stream) = acceptor.accept(tcp).await {
                    let _ = connections.send(Ok::<_, std::io::Error>(Tls(stream))).await;
                }
            }
        });
        let (sender, calls) = mpsc::channel(16);
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(DiscoveryServer::new(Service(sender)))
                .serve_with_incoming(ReceiverStream::new(incoming)),
        );
        Ok(Self { address, calls })
    }

    /// Waits for the next call.
    pub async fn call(&mut self) -> anyhow::Result<Call> {
        self.calls.recv().await.context("the controller has stopped")
    }

    /// Waits for the next watch. Calls before it stay unanswered.
    pub async fn watch(&mut self) -> anyhow::Result<Watch> {
        loop {
            if let Call::Watch(watch) = self.call().await? {
                return Ok(*watch);
            }
        }
    }

    /// Waits for the next published record and accepts it.
    pub async fn published(&mut self) -> anyhow::Result<pb::Signed> {
        loop {
            if let Call::Publish(request, reply) = self.call().await? {
                let _ = reply.send(Ok(pb::PublishResponse { revision: 1, ..Default::default() }));
                return request.record.context("no record");
            }
        }
    }
}

/// Stores in `state` what a join of the node `number` gives it: new keys, a certificate that is
/// valid for `life`, beginning an hour ago, and its membership.
pub fn enroll(
    state: &StateDir,
    number: u8,
    ca: &Ca,
    controller: SocketAddr,
    life: Duration,
) -> anyhow::Result<Membership> {
    let keys = state.keys_or_generate()?;
    let csr = CertificateSigningRequestParams::from_der(&keys.identity.signing_request()?.into())?;
    state.store_certificate(&[ca.issue("node", &csr.public_key, life)])?;
    let controllers = vec![controller.to_string().parse()?];
    let grant = ca.grant(&own_grant(number, &keys));
    let membership = Membership::new(ca.certificate(), controllers, grant, ca.mesh())?;
    state.store_membership(&membership)?;
    Ok(membership)
}

/// Returns the grant of the node `number`, with these keys.
pub fn own_grant(number: u8, keys: &Keys) -> Grant {
    Grant {
        identity_key: keys.identity.public(),
        wireguard_keys: vec![keys.wireguard.public()],
        ..grant(number)
    }
}

/// Returns the first message of a watch. Its heartbeat interval of 60 s leaves a slow test enough
/// time.
pub fn ready(epoch: u64) -> pb::watch_response::Kind {
    pb::watch_response::Kind::Ready(pb::WatchReady {
        session_id: vec![1; 16],
        epoch,
        heartbeat_ms: 60_000,
        mesh: None,
        grant: None,
        reflector_port: 0,
        reflectors: Vec::new(),
        head: None,
    })
}

/// Returns a message of the map.
pub fn changes(revision: u64, kinds: Vec<pb::change::Kind>) -> pb::watch_response::Kind {
    pb::watch_response::Kind::Changes(pb::Changes::of(kinds, revision))
}

/// A TLS stream in the form that tonic accepts.
struct Tls(TlsStream<TcpStream>);

impl Connected for Tls {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Tls {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Tls {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

struct Service(mpsc::Sender<Call>);

impl Service {
    async fn pass<T>(&self, call: impl FnOnce(Reply<T>) -> Call) -> Result<Response<T>, Status> {
        let (reply, answer) = oneshot::channel();
        let gone = || Status::unavailable("the test is over");
        self.0.send(call(reply)).await.map_err(|_| gone())?;
        match answer.await {
            Ok(answer) => answer.map(Response::new),
            Err(_) => std::future::pending().await,
        }
    }
}

type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::WatchResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Discovery for Service {
    type WatchStream = WatchStream;

    async fn hello(
        &self,
        _: Request<pb::HelloRequest>,
    ) -> Result<Response<pb::HelloResponse>, Status> {
        self.pass(Call::Hello).await
    }

    async fn join(
        &self,
        request: Request<pb::JoinRequest>,
    ) -> Result<Response<pb::JoinResponse>, Status> {
        self.pass(|reply| Call::Join(request.into_inner(), reply)).await
    }

    async fn renew(
        &self,
        request: Request<pb::RenewRequest>,
    ) -> Result<Response<pb::RenewResponse>, Status> {
        self.pass(|reply| Call::Renew(request.into_inner(), reply)).await
    }

    async fn readmit(
        &self,
        request: Request<pb::ReadmitRequest>,
    ) -> Result<Response<pb::ReadmitResponse>, Status> {
        self.pass(|reply| Call::Readmit(request.into_inner(), reply)).await
    }

    async fn publish(
        &self,
        request: Request<pb::PublishRequest>,
    ) -> Result<Response<pb::PublishResponse>, Status> {
        self.pass(|reply| Call::Publish(request.into_inner(), reply)).await
    }

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<WatchStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let Some(pb::WatchRequest { kind: Some(pb::watch_request::Kind::Start(start)) }) = first
        else {
            return Err(Status::invalid_argument("the first message of a watch must be its start"));
        };
        let (responses, stream) = mpsc::channel(16);
        let watch = Watch { start, requests, responses };
        let _ = self.0.send(Call::Watch(Box::new(watch))).await;
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn leave(
        &self,
        _: Request<pb::LeaveRequest>,
    ) -> Result<Response<pb::LeaveResponse>, Status> {
        self.pass(Call::Leave).await
    }
}
