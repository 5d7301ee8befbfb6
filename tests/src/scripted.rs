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
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use futures_util::Stream;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, PKCS_ED25519};
use ring::signature::Ed25519KeyPair;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};
use towline_agent::keys::{Identity, Wireguard};
use towline_proto::id::{IdentityKey, MeshId, NodeId};
use towline_proto::node::{Grant, MeshConfig, OverlayAddresses, Record, Tombstone};
use towline_proto::pb::discovery_server::{Discovery, DiscoveryServer};
use towline_proto::signed::{Domain, sign};
use towline_proto::{CONTROLLER_TLS_NAME, pb};

/// A certificate authority for tests.
pub struct Ca {
    key: KeyPair,
    signing: Ed25519KeyPair,
    certificate: CertificateDer<'static>,
}

impl Ca {
    /// Generates a CA with new keys.
    pub fn new() -> anyhow::Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key)?.der().clone();
        let signing = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&key.serialize_der())
            .map_err(|_| anyhow::anyhow!("key rejected"))?;
        Ok(Self { key, signing, certificate })
    }

    /// Returns the CA's certificate.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// Returns the CA's public key.
    pub fn public(&self) -> anyhow::Result<IdentityKey> {
        Ok(IdentityKey::try_from(self.key.public_key_raw())?)
    }

    /// Issues a certificate for `public`, valid for `life`, beginning an hour ago.
    pub fn issue(
        &self,
        name: &str,
        public: &impl rcgen::PublicKeyData,
        life: Duration,
    ) -> anyhow::Result<CertificateDer<'static>> {
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        let from = SystemTime::now() - Duration::from_secs(3600);
        params.not_before = from.into();
        params.not_after = (from + life).into();
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key)?;
        Ok(params.signed_by(public, &issuer)?.der().clone())
    }

    /// Signs a message as the CA.
    pub fn sign(&self, domain: Domain, body: &impl prost::Message) -> pb::Signed {
        sign(domain, body, &self.signing)
    }

    /// Returns the mesh configuration of [`mesh`], signed.
    pub fn mesh(&self) -> pb::Signed {
        self.sign(Domain::Mesh, &pb::MeshConfig::from(&mesh()))
    }

    /// Returns a signed grant for a node that has these keys.
    pub fn grant(&self, id: u8, identity: &Identity, wireguard: &Wireguard) -> pb::Signed {
        self.sign(Domain::Grant, &pb::Grant::from(&grant(id, identity, wireguard)))
    }

    /// Returns a complete node with new keys and a record of this generation.
    pub fn entry(&self, id: u8, generation: u64) -> anyhow::Result<pb::Entry> {
        let (identity, wireguard) = (Identity::generate()?, Wireguard::generate()?);
        let record = Record {
            node_id: NodeId([id; 16]),
            generation,
            boot_epoch: 1,
            wireguard_keys: vec![wireguard.public()],
            candidates: Vec::new(),
            prefixes: Vec::new(),
            version: String::new(),
            relay: false,
        };
        Ok(pb::Entry {
            grant: Some(self.grant(id, &identity, &wireguard)),
            record: Some(identity.sign_record(&pb::Record::from(&record))),
            withheld: Vec::new(),
        })
    }

    /// Returns a signed tombstone of a node.
    pub fn tombstone(&self, id: u8) -> anyhow::Result<pb::Signed> {
        let tombstone = Tombstone {
            mesh_id: MESH,
            node_id: NodeId([id; 16]),
            name: name(id).parse()?,
            identity_key: IdentityKey([0; 32]),
            removed_at: 0,
        };
        Ok(self.sign(Domain::Tombstone, &pb::Tombstone::from(&tombstone)))
    }
}

/// The mesh id that all tests use.
pub const MESH: MeshId = MeshId([7; 16]);

fn name(id: u8) -> String {
    format!("node-{id}")
}

/// Returns the configuration of [`MESH`].
pub fn mesh() -> MeshConfig {
    let v6 = std::net::Ipv6Addr::new(0xfd00, 0, 0, 7, 0, 0, 0, 0);
    MeshConfig {
        mesh_id: MESH,
        overlay_v6: ipnet::Ipv6Net::new_assert(v6, 64),
        overlay_v4: ipnet::Ipv4Net::new_assert([198, 19, 0, 0].into(), 16),
        protected: Vec::new(),
        trusted_sites: Vec::new(),
        bypass_when_down: Vec::new(),
        lease: Duration::from_secs(600),
        generation: 1,
    }
}

/// Returns a grant for a node that has these keys.
pub fn grant(id: u8, identity: &Identity, wireguard: &Wireguard) -> Grant {
    Grant {
        mesh_id: MESH,
        node_id: NodeId([id; 16]),
        name: name(id).parse().unwrap_or_else(|_| unreachable!("a DNS label")),
        identity_key: identity.public(),
        wireguard_keys: vec![wireguard.public()],
        overlay: OverlayAddresses {
            v6: std::net::Ipv6Addr::new(0xfd00, 0, 0, 7, 0, 0, 0, id.into()),
            v4: [198, 19, 0, id].into(),
        },
        allowed_prefixes: Vec::new(),
        site: None,
        labels: Default::default(),
        issued_at: 0,
        ephemeral: false,
    }
}

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
    /// A `Publish` call.
    Publish(pb::PublishRequest, Reply<pb::PublishResponse>),
    /// A `Watch` call, which opens a stream.
    Watch(Watch),
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
        let leaf = ca.issue(CONTROLLER_TLS_NAME, &key, Duration::from_secs(86_400))?;
        let mut tls = rustls::ServerConfig::builder_with_provider(towline_agent::tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(
                vec![leaf, ca.certificate()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )?;
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(tls));
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
                return Ok(watch);
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
    })
}

/// Returns a message of the map.
pub fn changes(revision: u64, kinds: Vec<pb::change::Kind>) -> pb::watch_response::Kind {
    let changes = kinds.into_iter().map(|kind| pb::Change { kind: Some(kind) }).collect();
    pb::watch_response::Kind::Changes(pb::Changes { changes, revision, synced: true })
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
        let _ = self.0.send(Call::Watch(watch)).await;
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn leave(
        &self,
        _: Request<pb::LeaveRequest>,
    ) -> Result<Response<pb::LeaveResponse>, Status> {
        self.pass(Call::Leave).await
    }
}
