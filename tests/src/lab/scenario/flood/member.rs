//! Clients of the controller that an attacker programs: strangers with a join token, and members.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use prost::Message as _;
use rustls::ClientConfig;
use rustls_pki_types::CertificateDer;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;
use towline_agent::keys::{Identity, Wireguard};
use towline_agent::state::Keys;
use towline_agent::{dial, join, tls};
use towline_proto::pb;
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::pb::watch_request::Kind as Ask;
use towline_proto::pb::watch_response::Kind as Answer;
use towline_proto::token::{ControllerAddress, JoinToken};

/// Limit for a connection or an answer that is needed for the attack.
const LIMIT: Duration = Duration::from_secs(10);

/// Opens a TCP connection to the controller from one of the attacker's addresses.
pub(super) async fn connect(from: Ipv4Addr, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((from, 0)))?;
    Ok(timeout(LIMIT, socket.connect(to)).await??)
}

/// Opens TLS and HTTP/2 to the controller.
pub(super) async fn dial(
    from: Ipv4Addr,
    to: SocketAddr,
    config: Arc<ClientConfig>,
) -> anyhow::Result<dial::Connection> {
    let address: ControllerAddress =
        to.to_string().parse().map_err(|_| anyhow!("{to} is no address of a controller"))?;
    Ok(dial::over(connect(from, to).await?, &address, config).await?)
}

/// Sends one join with this token, and returns the controller's answer.
pub(super) async fn join_once(
    client: &mut DiscoveryClient<Channel>,
    token: &JoinToken,
    name: &str,
    keys: &Keys,
) -> anyhow::Result<pb::JoinResponse> {
    let hello = client.hello(pb::HelloRequest {}).await?.into_inner();
    let request = join::request(token, &name.parse()?, keys, &hello)?;
    Ok(client.join(request).await?.into_inner())
}

/// A node that has joined, and is in the attacker's hands.
pub(super) struct Member {
    keys: Keys,
    grant: pb::Grant,
    to: SocketAddr,
    /// TLS settings with the certificate of the member.
    pub(super) config: Arc<ClientConfig>,
    generation: u64,
}

impl Member {
    /// Joins the mesh.
    pub(super) async fn join(
        from: Ipv4Addr,
        to: SocketAddr,
        token: &JoinToken,
        name: &str,
    ) -> anyhow::Result<Self> {
        let keys = Keys { identity: Identity::generate()?, wireguard: Wireguard::generate()? };
        let connection = dial(from, to, Arc::new(tls::joining(token.ca)?)).await?;
        let ca = tls::pinned_ca(&connection.chain, token.ca).context("another CA answered")?;
        let mut client = join::client(connection.channel);
        let answer = join_once(&mut client, token, name, &keys).await?;
        let chain: Vec<CertificateDer<'static>> =
            answer.certificate_chain.into_iter().map(CertificateDer::from).collect();
        let config = Arc::new(tls::member(&ca, Some((&chain, &keys.identity)))?);
        let grant = pb::Grant::decode(answer.grant.context("no grant")?.body)?;
        Ok(Self { keys, grant, to, config, generation: 0 })
    }

    /// Returns the WireGuard keys.
    pub(super) fn wireguard(&self) -> &Wireguard {
        &self.keys.wireguard
    }

    /// Returns the addresses in the mesh, each as 4 or 16 bytes.
    pub(super) fn overlay_addresses(&self) -> &[Vec<u8>] {
        &self.grant.overlay_addresses
    }

    /// Connects to the controller.
    pub(super) async fn client(&self, from: Ipv4Addr) -> anyhow::Result<DiscoveryClient<Channel>> {
        Ok(join::client(dial(from, self.to, self.config.clone()).await?.channel))
    }

    /// Publishes a record with as many new candidates as one may have.
    pub(super) async fn publish(
        &mut self,
        client: &mut DiscoveryClient<Channel>,
        watch: &Watch,
    ) -> Result<(), tonic::Status> {
        self.generation += 1;
        let candidate = |number: usize| pb::Candidate {
            kind: pb::CandidateKind::Local.into(),
            // Addresses for documentation (RFC 5737), which no host of the lab has.
            address: vec![198, 51, 100, number as u8 + 1],
            port: 1_024 + (self.generation % 60_000) as u32,
        };
        let record = pb::Record {
            node_id: self.grant.node_id.clone(),
            generation: self.generation,
            boot_epoch: 1,
            wireguard_keys: self.grant.wireguard_keys.clone(),
            candidates: (0..towline_proto::limits::CANDIDATES).map(candidate).collect(),
            version: format!("flood-{}", self.generation),
            ..pb::Record::default()
        };
        let record = Some(self.keys.identity.sign_record(&record));
        let session_id = watch.session.clone();
        client.publish(pb::PublishRequest { record, session_id }).await.map(drop)
    }
}

/// An open watch. Nothing reads it unless the caller does.
pub(super) struct Watch {
    session: Vec<u8>,
    /// Dropping the sender ends the watch.
    _requests: mpsc::Sender<pb::WatchRequest>,
    _responses: Streaming<pb::WatchResponse>,
}

impl Watch {
    /// Opens a watch that asks for the whole map, and reads its first message.
    pub(super) async fn open(
        client: &mut DiscoveryClient<Channel>,
        instance: u64,
    ) -> anyhow::Result<Self> {
        let (requests, stream) = mpsc::channel(4);
        let start = pb::WatchStart {
            instance_id: instance.to_be_bytes().to_vec(),
            ..pb::WatchStart::default()
        };
        requests.send(pb::WatchRequest { kind: Some(Ask::Start(start)) }).await?;
        let opening = async {
            let mut responses = client.watch(ReceiverStream::new(stream)).await?.into_inner();
            match responses.message().await?.and_then(|first| first.kind) {
                Some(Answer::Ready(ready)) => Ok((ready.session_id, responses)),
                _ => Err(anyhow!("the watch did not start")),
            }
        };
        let (session, responses) = timeout(LIMIT, opening).await.context("no answer")??;
        Ok(Self { session, _requests: requests, _responses: responses })
    }
}
