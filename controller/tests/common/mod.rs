//! A controller in this process, and machines that connect to it over TLS on loopback.
//!
//! Only the machine is simulated: the client below sends the same messages as an agent.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use towline_controller::config::{Config, MeshSettings};
use towline_controller::{Controller, ServeError};
use towline_proto::id::{IdentityKey, NodeId, WireguardKey};
use towline_proto::join_proof::{self, Claim};
use towline_proto::node::{Grant, Record};
use towline_proto::pb::admin_client::AdminClient;
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::signed::{self, Domain};
use towline_proto::token::JoinToken;
use towline_proto::{CONTROLLER_TLS_NAME, pb};
use x25519_dalek::{PublicKey, StaticSecret};

/// Timeout of every wait: far longer than any operation takes.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Waits for a future, at most [`TIMEOUT`].
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(TIMEOUT, future).await.expect("a result in time")
}

/// A running controller. Dropping it ends it like a kill.
pub struct TestController {
    pub dir: PathBuf,
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ServeError>>,
}

pub fn config(dir: &Path) -> Config {
    Config {
        state_dir: dir.to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        advertise: vec!["controller.example:7443".parse().unwrap()],
        mesh: MeshSettings::default(),
        heartbeat: Duration::from_secs(1),
    }
}

impl TestController {
    pub fn start(dir: &Path) -> Self {
        Self::with(config(dir))
    }

    pub fn with(config: Config) -> Self {
        let dir = config.state_dir.clone();
        let controller = Controller::start(config).unwrap();
        let address = controller.address();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(controller.run(async {
            let _ = stopped.await;
        }));
        Self { dir, address, stop: Some(stop), task }
    }

    /// Stops the controller and waits for its end.
    pub async fn stop(mut self) {
        let _ = self.stop.take().unwrap().send(());
        soon(&mut self.task).await.unwrap().unwrap();
    }

    pub fn ca(&self) -> CertificateDer<'static> {
        let pem = std::fs::read(self.dir.join("ca.crt")).unwrap();
        CertificateDer::from_pem_slice(&pem).unwrap()
    }

    pub fn ca_key(&self) -> IdentityKey {
        towline_controller::peer::mesh_authority(&self.ca()).unwrap().1
    }

    /// Returns a connection, with or without a client certificate.
    pub async fn connect(&self, credential: Option<Credential>) -> Channel {
        self.try_connect(credential).await.unwrap()
    }

    pub async fn try_connect(&self, credential: Option<Credential>) -> std::io::Result<Channel> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match credential {
            None => config.with_no_client_auth(),
            Some((chain, key)) => config.with_client_auth_cert(chain, key).unwrap(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from(CONTROLLER_TLS_NAME).unwrap();
        let mut stream = Some(connector.connect(name, stream).await?);
        // The window is small, so that a client that does not read blocks the server at once.
        let connected = Endpoint::from_static("http://controller")
            .initial_stream_window_size(16 * 1024)
            .connect_with_connector(tower::service_fn(move |_: http::Uri| {
                let stream = stream.take().map(TokioIo::new);
                async { stream.ok_or_else(|| std::io::Error::other("the connection was closed")) }
            }))
            .await;
        connected.map_err(std::io::Error::other)
    }

    pub async fn admin(&self) -> AdminClient<Channel> {
        let read = |name: &str| std::fs::read(self.dir.join(name)).unwrap();
        let certificate = CertificateDer::from_pem_slice(&read("admin.crt")).unwrap();
        let key = PrivateKeyDer::from_pem_slice(&read("admin.key")).unwrap();
        AdminClient::new(self.connect(Some((vec![certificate], key))).await)
    }

    pub async fn token(&self, request: pb::CreateTokenRequest) -> JoinToken {
        let created = self.admin().await.create_token(request).await.unwrap().into_inner();
        created.token.parse().unwrap()
    }

    /// Returns a node that joined with its own token.
    pub async fn node(&self, name: &str, prefixes: &[&str]) -> Node {
        let allowed_prefixes = prefixes.iter().map(|text| prefix(text)).collect();
        let request = pb::CreateTokenRequest { allowed_prefixes, ..Default::default() };
        let token = self.token(request).await;
        let machine = Machine::new(name);
        let joined = machine.join(self, &token).await.unwrap();
        Node::new(machine, joined)
    }

    pub async fn info(&self, name: &str) -> pb::NodeInfo {
        let request = pb::ListNodesRequest { name: name.to_owned(), after: String::new() };
        let mut listed = self.admin().await.list_nodes(request).await.unwrap().into_inner();
        listed.nodes.remove(0)
    }
}

impl Drop for TestController {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub type Credential = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

pub fn prefix(text: &str) -> pb::Prefix {
    (&text.parse::<ipnet::IpNet>().unwrap()).into()
}

/// A machine with its keys that has not joined yet.
pub struct Machine {
    pub name: String,
    pub identity: KeyPair,
    pub wireguard: StaticSecret,
}

impl Machine {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            identity: KeyPair::generate_for(&PKCS_ED25519).unwrap(),
            wireguard: StaticSecret::from(towline_controller::entropy::random::<32>().unwrap()),
        }
    }

    pub fn csr(&self) -> Vec<u8> {
        CertificateParams::default().serialize_request(&self.identity).unwrap().der().to_vec()
    }

    pub fn wireguard_key(&self) -> WireguardKey {
        WireguardKey(*PublicKey::from(&self.wireguard).as_bytes())
    }

    pub async fn request(&self, channel: Channel, token: &JoinToken) -> pb::JoinRequest {
        let hello =
            DiscoveryClient::new(channel).hello(pb::HelloRequest {}).await.unwrap().into_inner();
        let proof_key: [u8; 32] = hello.proof_key.as_slice().try_into().unwrap();
        let shared = self.wireguard.diffie_hellman(&PublicKey::from(proof_key));
        let csr = self.csr();
        let claim = Claim { token: token.id, wireguard_key: &self.wireguard_key(), csr: &csr };
        let wireguard_proof = join_proof::prove(shared.as_bytes(), claim);
        pb::JoinRequest {
            token_id: token.id.0.to_vec(),
            token_secret: token.secret.0.to_vec(),
            name: self.name.clone(),
            csr,
            wireguard_key: self.wireguard_key().0.to_vec(),
            wireguard_proof,
            proof_key: proof_key.to_vec(),
        }
    }

    pub async fn join(
        &self,
        controller: &TestController,
        token: &JoinToken,
    ) -> Result<pb::JoinResponse, Status> {
        let channel = controller.connect(None).await;
        let request = self.request(channel.clone(), token).await;
        Ok(DiscoveryClient::new(channel).join(request).await?.into_inner())
    }
}

/// A machine that has joined.
pub struct Node {
    pub machine: Machine,
    pub grant: Grant,
    pub chain: Vec<CertificateDer<'static>>,
    pub instance: Vec<u8>,
}

impl Node {
    pub fn new(machine: Machine, joined: pb::JoinResponse) -> Self {
        use prost::Message;
        let grant = pb::Grant::decode(joined.grant.unwrap().body).unwrap();
        Self {
            machine,
            grant: grant.try_into().unwrap(),
            chain: joined.certificate_chain.into_iter().map(CertificateDer::from).collect(),
            instance: vec![1],
        }
    }

    pub fn id(&self) -> NodeId {
        self.grant.node_id
    }

    pub fn credential(&self) -> Credential {
        let key = PrivateKeyDer::try_from(self.machine.identity.serialize_der()).unwrap();
        (self.chain.clone(), key)
    }

    pub async fn client(&self, controller: &TestController) -> DiscoveryClient<Channel> {
        DiscoveryClient::new(controller.connect(Some(self.credential())).await)
    }

    pub async fn watch(&self, controller: &TestController) -> Watch {
        self.watch_from(controller, pb::WatchStart::default()).await.unwrap()
    }

    pub async fn watch_from(
        &self,
        controller: &TestController,
        start: pb::WatchStart,
    ) -> Result<Watch, Status> {
        let instance_id =
            if start.instance_id.is_empty() { self.instance.clone() } else { start.instance_id };
        let start = pb::WatchStart { instance_id, ..start };
        let mut client = self.client(controller).await;
        let (requests, receiver) = mpsc::channel(8);
        let first = pb::WatchRequest { kind: Some(pb::watch_request::Kind::Start(start)) };
        requests.send(first).await.unwrap();
        let responses = soon(client.watch(ReceiverStream::new(receiver))).await?.into_inner();
        let mut watch =
            Watch { client, requests, responses, ready: pb::WatchReady::default(), revision: 0 };
        match watch.next().await?.kind.unwrap() {
            pb::watch_response::Kind::Ready(ready) => watch.ready = ready,
            other => panic!("not ready: {other:?}"),
        }
        Ok(watch)
    }

    /// Returns a signed record of this node.
    pub fn record(&self, generation: u64, prefixes: &[&str]) -> pb::Signed {
        let record = Record {
            node_id: self.id(),
            generation,
            boot_epoch: 1,
            wireguard_keys: vec![self.machine.wireguard_key()],
            candidates: Vec::new(),
            prefixes: prefixes.iter().map(|text| text.parse().unwrap()).collect(),
            version: "test".to_owned(),
            relay: false,
        };
        self.sign(&pb::Record::from(&record))
    }

    pub fn sign(&self, record: &pb::Record) -> pb::Signed {
        let der = self.machine.identity.serialized_der();
        let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).unwrap();
        assert_eq!(key.public_key().as_ref(), self.grant.identity_key.as_bytes());
        signed::sign(Domain::Record, record, &key)
    }
}

/// An open watch.
pub struct Watch {
    pub client: DiscoveryClient<Channel>,
    pub requests: mpsc::Sender<pb::WatchRequest>,
    pub responses: Streaming<pb::WatchResponse>,
    pub ready: pb::WatchReady,
    pub revision: u64,
}

impl Watch {
    pub async fn next(&mut self) -> Result<pb::WatchResponse, Status> {
        match soon(self.responses.message()).await? {
            Some(response) => Ok(response),
            None => Err(Status::unknown("the stream ended without a status")),
        }
    }

    pub async fn heartbeat(&self) {
        let heartbeat = pb::Heartbeat { revision: self.revision };
        let kind = Some(pb::watch_request::Kind::Heartbeat(heartbeat));
        self.requests.send(pb::WatchRequest { kind }).await.unwrap();
    }

    /// Returns the next changes, and answers heartbeats until then.
    pub async fn changes(&mut self) -> Result<pb::Changes, Status> {
        loop {
            match self.next().await?.kind.unwrap() {
                pb::watch_response::Kind::Changes(changes) => {
                    self.revision = changes.revision;
                    return Ok(changes);
                }
                pb::watch_response::Kind::Heartbeat(_) => self.heartbeat().await,
                pb::watch_response::Kind::Signal(_) => {}
                pb::watch_response::Kind::Ready(_) => panic!("ready twice"),
            }
        }
    }

    /// Returns all changes up to the message that is marked as synced.
    pub async fn synced(&mut self) -> Vec<pb::change::Kind> {
        let mut all = Vec::new();
        loop {
            let changes = self.changes().await.unwrap();
            all.extend(changes.changes.into_iter().filter_map(|change| change.kind));
            if changes.synced {
                return all;
            }
        }
    }

    /// Waits for a change for which `wanted` returns a value.
    pub async fn until<T>(&mut self, wanted: impl Fn(&pb::change::Kind) -> Option<T>) -> T {
        loop {
            let changes = self.changes().await.unwrap();
            let kinds = changes.changes.iter().filter_map(|change| change.kind.as_ref());
            if let Some(found) = kinds.filter_map(&wanted).next() {
                return found;
            }
        }
    }

    pub async fn publish(&self, record: pb::Signed) -> Result<pb::PublishResponse, Status> {
        let session_id = self.ready.session_id.clone();
        let request = pb::PublishRequest { record: Some(record), session_id };
        Ok(self.client.clone().publish(request).await?.into_inner())
    }

    /// Waits until the controller ends the watch, and returns the status.
    pub async fn end(&mut self) -> Status {
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
        }
    }
}

/// Returns the node id of an upsert, and the generation of its record if it has one.
pub fn upsert(kind: &pb::change::Kind, ca: &IdentityKey) -> Option<(NodeId, Option<u64>)> {
    match kind {
        pb::change::Kind::Upsert(entry) => {
            let grant = signed::grant(entry.grant.as_ref(), ca).unwrap();
            let node = signed::node(entry, ca).unwrap();
            Some((grant.node_id, node.map(|node| node.record().generation)))
        }
        _ => None,
    }
}

pub fn tombstone(kind: &pb::change::Kind, ca: &IdentityKey) -> Option<NodeId> {
    match kind {
        pb::change::Kind::Tombstone(signed) => {
            Some(signed::tombstone(Some(signed), ca).unwrap().node_id)
        }
        _ => None,
    }
}
